"""The primitives of spike_ops for CPUs: spike_ops.cpp, compiled at first use and called through its C interface.

The library lies in torch's folder of extensions, under a name made of source, flags, compiler and processor. It is
written in one move: processes that compile it at the same time do not wait for each other, and none is left half done.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("spike_ops.cpp")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # No fused multiply-add: the roundings are those of models.neuron. The others let loops become vectors.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""Others pass through fp32, which holds them exactly."""

_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_SIZES = (_I, _I, _I, _I, ctypes.c_int)
_ARGUMENTS = {
    "encode": (_P, _I, _I, _P, _P, _D, ctypes.c_int, _P, _P, _P, _P, *_SIZES),
    "decode": (_P, _P, _P, *_SIZES),
    "membrane_backward": (_P, _P, _P, _P, _D, ctypes.c_int, _P, _P, _P, *_SIZES),
}


def check(device_type: str) -> None:
    """Compile the library, or raise OSError or RuntimeError saying why it cannot be."""
    if device_type != "cpu":
        raise RuntimeError(f"it runs on CPUs, and the tensors are on {device_type}")
    _library()


def encode(
    x_TBLD: Tensor,
    apart_t: int,
    apart_n: int,
    alpha_T: Tensor,
    floored_T: Tensor,
    carry_BLD: Tensor | None,
    reset: int,
    leak: float,
    code_TBLN: Tensor,
    measured: Tensor,
    left_BLD: Tensor,
) -> None:
    """As spike_ops.encode."""
    if x_TBLD.dtype not in DTYPES:
        x_TBLD, apart_t, apart_n = x_TBLD.float().contiguous(), x_TBLD[0].numel(), x_TBLD.shape[-1]
    where = (carry_BLD, left_BLD, code_TBLN, measured)
    _call("encode", x_TBLD, code_TBLN, x_TBLD, apart_t, apart_n, alpha_T, floored_T, leak, reset, *where)


def decode(code_TBLN: Tensor, worth_T: Tensor, decoded_TBLD: Tensor) -> None:
    """As spike_ops.decode."""
    out_TBLD = _writable(decoded_TBLD)
    worth_T = worth_T.to(torch.promote_types(worth_T.dtype, torch.float32))
    _call("decode", out_TBLD, code_TBLN, code_TBLN, worth_T, out_TBLD)
    _write_back(out_TBLD, decoded_TBLD)


def membrane_backward(
    grad_TBLD: Tensor,
    code_TBLN: Tensor,
    alpha_T: Tensor,
    floored_T: Tensor,
    grad_carry_BLD: Tensor | None,
    reset: int,
    leak: float,
    grad_x_TBLD: Tensor,
    grad_left_BLD: Tensor,
) -> None:
    """As spike_ops.membrane_backward."""
    out_TBLD = _writable(grad_x_TBLD)
    grad_TBLD = grad_TBLD.to(out_TBLD.dtype)
    where = (grad_carry_BLD, out_TBLD, grad_left_BLD)
    _call("membrane_backward", out_TBLD, code_TBLN, grad_TBLD, code_TBLN, alpha_T, floored_T, leak, reset, *where)
    _write_back(out_TBLD, grad_x_TBLD)


def _call(name: str, x_TBLD: Tensor, code_TBLN: Tensor, *arguments: Any) -> None:
    """Call the form for x's dtype. Tensors go as their addresses, empty ones and None as null."""
    function = getattr(_library(), f"{name}_{str(x_TBLD.dtype).removeprefix('torch.')}")
    function.argtypes = _ARGUMENTS[name]
    T, *_, N = code_TBLN.shape
    rows = code_TBLN.numel() // max(T * N, 1)
    sizes = (T, rows, x_TBLD.shape[-1], N, torch.get_num_threads())
    function(*(_address(each) if isinstance(each, Tensor) else each for each in arguments), *sizes)


def _address(tensor: Tensor) -> int | None:
    return tensor.data_ptr() if tensor.numel() else None


def _writable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in DTYPES else torch.empty_like(tensor, dtype=torch.float32)


def _write_back(written: Tensor, tensor: Tensor) -> None:
    if written is not tensor:
        tensor.copy_(written)


@cache
def _library() -> ctypes.CDLL:
    if not SOURCE.exists():
        raise OSError(f"{SOURCE} is not installed")
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    path = _folder() / f"spike_ops-{_fingerprint(compiler)}.so"
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            pass  # half a file, as full disks leave them: made anew
    _compile(compiler, path)
    return ctypes.CDLL(str(path))


def _folder() -> Path:
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given) / "spikelm"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "torch_extensions" / "spikelm"


def _fingerprint(compiler: list[str]) -> str:
    """Of all that the library depends on; nodes that share a home may have different processors."""
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text(encoding="utf-8").splitlines() if processor.exists() else []
    features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    version = _run([*compiler, "--version"])
    parts = (SOURCE.read_text(encoding="utf-8"), *compiler, *FLAGS, version, platform.machine(), *features)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        _run([*compiler, *FLAGS, str(SOURCE), "-o", str(made)])
        os.replace(made, path)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
