"""The primitives on packed codes: each backend against the pure neurons, to the bit, and the choice of a backend."""

import configparser
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import spike_ops, spike_ops_cpp
from models.neuron import run_memoryless, run_neuron
from models.spike_ops import (
    MEASURED,
    RESETS,
    STATES,
    code_width,
    compute_dtype,
    decode,
    encode,
    membrane_backward,
    pack,
    resolve_backend,
    unpack,
    worth,
)
from tests.launcher import ROOT

CPU = torch.device("cpu")
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
BACKENDS = ("torch", "triton") if HAS_GPU else ("torch", "cpp", "triton")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LEAK = 0.3  # no power of two, so that rounding shows the order of the products


def random(*shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def reference(x, alpha, reset, carry, grad, grad_carry):
    """Output, carry, and the gradients of x and of the carry that came in, by plain autograd."""
    x, carry = x.clone().requires_grad_(), None if carry is None else carry.clone().requires_grad_()
    if reset == "memoryless":
        o, left = run_memoryless(x, alpha), None
    else:
        o, left = run_neuron(x, alpha, leak=LEAK, reset=reset, carry=carry)
    ends, grads = [o], [grad]
    if grad_carry is not None and left is not None:
        ends, grads = [o, left], [grad, grad_carry]
    torch.autograd.backward(ends, grads)
    return o.detach(), left if left is None else left.detach(), x.grad, None if carry is None else carry.grad


def same(ours, theirs):
    """Bit-equal apart from the sign of zeros, NaN where the other is."""
    return torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(7.5), theirs.nan_to_num(7.5))


def truncated(x):
    """fp32 to bf16 towards zero, as Triton's interpreter has it; its compiler rounds to nearest."""
    return (x.view(torch.int32) & -65536).view(torch.float32).bfloat16()


def check(x, alpha, reset, backend, carry=None, grad_carry=None):
    grad = random(*x.shape, seed=5, dtype=x.dtype)
    o, left, grad_x, grad_in = reference(x, alpha, reset, carry, grad, grad_carry)
    code, measured, carried = encode(x, alpha, carry, reset, LEAK, backend)
    assert code.shape == (*x.shape[:-1], code_width(x.shape[-1])) and code.dtype == torch.uint8
    assert same(decode(code, worth(alpha, x.dtype), x.shape[-1], backend), o)
    ours, ours_in = membrane_backward(grad, code, alpha, grad_carry, reset, LEAK, backend)
    if not HAS_GPU and backend == "triton" and x.dtype == torch.bfloat16:
        _, _, exact, _ = reference(x.float(), alpha, reset, carry, grad.float(), grad_carry)
        grad_x = truncated(exact)
    assert same(ours, grad_x) and ours.dtype == x.dtype
    if left is not None:
        assert same(carried, left) and carried.dtype == compute_dtype(x.dtype)
    if grad_in is not None:
        assert same(ours_in, grad_in)
    return code, measured


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 5, 100, 768])
def test_primitives_equal_plain_autograd_to_the_bit(backend, reset, dtype, width):
    for T in (1, 2, 4, 8):
        x = random(T, 2, 3, width, seed=T, dtype=dtype)
        alpha = random(T, seed=9).abs() + 0.3
        carry, grad_carry = (random(2, 3, width, seed=seed, dtype=compute_dtype(dtype)) for seed in (7, 8))
        check(x, alpha, reset, backend)
        if reset != "memoryless":
            check(x, alpha, reset, backend, carry, grad_carry)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reset", RESETS)
def test_what_is_not_finite_stays_visible(backend, reset):
    x = random(4, 2, 3, 70, seed=0)
    x.view(-1)[::7], x.view(-1)[3::11], x.view(-1)[5::13] = torch.nan, torch.inf, -torch.inf
    for grad_carry in (None, random(2, 3, 70, seed=2)):
        code, _ = check(x, random(4, seed=1).abs() + 0.3, reset, backend, grad_carry=grad_carry)
        assert unpack(code, 70)[~x.isfinite()].unique().tolist() == [STATES - 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reset", RESETS)
def test_an_amplitude_that_is_not_finite_is_no_silence(backend, reset):
    x = random(3, 2, 3, 70, seed=0)
    check(x, torch.tensor([0.5, torch.nan, 0.8], device=DEVICE), reset, backend, grad_carry=random(2, 3, 70, seed=2))
    for a in (torch.nan, torch.inf):
        alpha = torch.tensor([0.5, a, 0.8], device=DEVICE)
        code, *_ = encode(x, alpha, None, reset, LEAK, backend)
        assert decode(code, worth(alpha, torch.float32), 70, backend)[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("a", [1.0, 0.7316, 3.3, 1e-5, 1e-6])
def test_ties_and_their_neighbours(backend, a):
    alpha = torch.tensor([a], device=DEVICE)
    points = alpha.clamp(min=1e-5) * torch.tensor([0.5, 1.0, 1.5, 2.0], device=DEVICE)
    below, above = (torch.nextafter(points, torch.full_like(points, end)) for end in (0.0, torch.inf))
    x = torch.stack([below, points, above])
    for reset in RESETS:
        check(torch.cat([x, -x]).view(1, 1, 6, 4), alpha, reset, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_measured_of_each_token(backend):
    x, alpha = random(3, 2, 5, 100, seed=0), torch.tensor([0.5, 1.0, 1.5], device=DEVICE)
    _, measured, _ = encode(x, alpha, None, "memoryless", LEAK, backend)
    a = alpha.view(3, 1, 1, 1)
    expected = {"membrane": x.abs(), "positive": x > a / 2, "negative": x < -a / 2, "saturated": x.abs() > a}
    assert measured.dtype == torch.float64 and tuple(expected) == MEASURED
    for ours, theirs in zip(measured, expected.values(), strict=True):
        torch.testing.assert_close(ours, theirs.double().sum(-1), rtol=1e-6, atol=0)
    assert torch.equal(measured[1:], torch.stack([each.double().sum(-1) for each in list(expected.values())[1:]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_read_where_they_lie(backend):
    """Slices of a product, timesteps that share their memory, and what is neither."""
    alpha, wide = torch.tensor([0.5, 1.0, 1.5], device=DEVICE), random(3, 2, 5, 300, seed=0)
    views = [wide[..., 100:200], wide[:1].expand(3, -1, -1, -1), wide.transpose(1, 2), wide[:, :, ::2]]
    views += [wide[:, :1].transpose(1, 2), wide[:, :, :1], wide[..., :1], wide[:, :1].expand(-1, 4, -1, -1)]
    for x in views:
        for reset in RESETS:
            ours, expected = (encode(each, alpha, None, reset, LEAK, backend) for each in (x, x.contiguous()))
            assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))
        assert same(*(membrane_backward(x, ours[0], alpha, None, reset, LEAK, each)[0] for each in (backend, "torch")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_at_all(backend):
    x, alpha = torch.zeros(2, 0, 3, 8, device=DEVICE), torch.ones(2, device=DEVICE)
    code, measured, carry = encode(x, alpha, None, "normalized", LEAK, backend)
    assert decode(code, alpha, 8, backend).shape == x.shape and carry.shape == x.shape[1:]
    assert membrane_backward(x, code, alpha, None, "normalized", LEAK, backend)[0].shape == x.shape
    assert measured.sum() == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(0, 1000))
def test_bytes_hold_three_states_and_at_most_four_bits_each(width, seed):
    states = torch.randint(0, STATES, (2, 1, 3, width), generator=torch.Generator().manual_seed(seed)).byte()
    code = pack(states)
    assert torch.equal(unpack(code, width), states)
    assert code.shape[-1] == code_width(width) and (width < 3 or code_width(width) <= width / 2 + 0.5)


def test_wide_rows_take_eight_thirds_of_a_bit():
    assert [code_width(width) for width in (768, 1024, 4096, 64, 2)] == [256, 352, 1376, 32, 1]


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_operators_keep_what_they_promise_to_torch(reset, dtype):
    """Schemas, fake kernels and devices, by torch's own checks."""
    x, alpha = random(2, 1, 3, 70, seed=0, dtype=dtype), torch.tensor([0.5, 1.0], device=DEVICE)
    carry = None if reset == "memoryless" else random(1, 3, 70, seed=1, dtype=compute_dtype(dtype))
    code, *_ = encode(x, alpha, carry, reset, LEAK, "torch")
    checks = ("test_schema", "test_faketensor")
    for backend in BACKENDS:
        torch.library.opcheck(encode, (x, alpha, carry, reset, LEAK, backend), test_utils=checks)
        torch.library.opcheck(decode, (code, worth(alpha, dtype), 70, backend), test_utils=checks)
        arguments = (x, code, alpha, carry, reset, LEAK, backend)
        torch.library.opcheck(membrane_backward, arguments, test_utils=checks)


def test_kernels_compile_for_gpus_and_round_as_the_reference_does():
    """By Triton's compiler, which needs no GPU; the interpreter takes more than it does. About 15 s."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels"], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    fused = json.loads(done.stdout.splitlines()[-1])
    assert fused.pop("encode gelu") and fused.pop("backward gelu"), "erf is a polynomial of them"
    assert len(fused) == 26 and not any(fused.values()), fused


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reset", ["released", "normalized"])
def test_a_carry_that_nobody_wants_is_not_made(backend, reset):
    x, alpha, grad = random(3, 2, 3, 70, seed=0), random(3, seed=1).abs() + 0.3, random(3, 2, 3, 70, seed=2)
    whole, bare = (encode(x, alpha, None, reset, LEAK, backend, leaves) for leaves in (True, False))
    assert bare[2].numel() == 0 and all(torch.equal(*pair) for pair in zip(whole[:2], bare[:2], strict=True))
    given = (grad, whole[0], alpha, None, reset, LEAK, backend)
    ours, none = membrane_backward(*given, False)
    assert none.numel() == 0 and torch.equal(ours, membrane_backward(*given)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_together_is_refused(backend):
    x, alpha = random(2, 1, 3, 70, seed=0), torch.tensor([0.5, 1.0], device=DEVICE)
    code, *_ = encode(x, alpha, None, "released", LEAK, backend)
    with pytest.raises(ValueError, match="1 amplitudes for 2 timesteps"):
        encode(x, alpha[:1], None, "released", LEAK, backend)
    with pytest.raises(ValueError, match=r"a carry of shape \(1, 3, 5\) for rows of \(1, 3, 70\)"):
        encode(x, alpha, x[0, ..., :5], "released", LEAK, backend)
    with pytest.raises(ValueError, match="codes of 32 bytes a row do not hold 170 elements"):
        decode(code, alpha, 170, backend)
    with pytest.raises(ValueError, match="codes of 32 bytes a row do not hold 5 elements"):
        membrane_backward(x[..., :5], code, alpha, None, "released", LEAK, backend)
    with pytest.raises(ValueError, match=r"codes of shape \(2, 1, 3, 32\) for elements of \(2, 4, 3, 70\)"):
        membrane_backward(x.expand(2, 4, 3, 70), code, alpha, None, "released", LEAK, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_spike_is_worth_nothing_even_where_a_spike_overflows(backend):
    x, alpha = torch.full((1, 1, 1, 6), 100.0, dtype=torch.float16, device=DEVICE), torch.tensor([7e4], device=DEVICE)
    code, *_ = encode(x, alpha, None, "memoryless", LEAK, backend)
    assert torch.equal(decode(code, worth(alpha, torch.float16), 6, backend), torch.zeros_like(x))


# The choice of a backend


def test_auto_takes_the_compiled_form_on_cpus_and_plain_torch_where_there_is_none():
    assert resolve_backend("auto", CPU) == "cpp" == resolve_backend("cpp", CPU)
    assert resolve_backend("torch", CPU) == resolve_backend("auto", torch.device("meta")) == "torch"


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    caches = (spike_ops_cpp._library, spike_ops._fault, spike_ops._warn_once)
    for cached in caches:
        cached.cache_clear()
    yield monkeypatch
    for cached in caches:
        cached.cache_clear()


def test_without_a_compiler_auto_falls_back_with_a_message_and_an_explicit_choice_is_refused(no_compiler, caplog):
    with caplog.at_level(logging.WARNING):
        assert [resolve_backend("auto", CPU) for _ in range(3)] == ["torch"] * 3
    assert len(caplog.records) == 1 and "plain torch" in caplog.text and "no-such-compiler" in caplog.text
    with pytest.raises(ValueError, match="'cpp' cannot run here: .*no-such-compiler.*: use auto or torch"):
        resolve_backend("cpp", CPU)
    assert len(caplog.records) == 1, "a choice that is refused runs nothing"


def test_a_source_that_does_not_compile_is_told(no_compiler, tmp_path):
    no_compiler.setenv("CXX", "g++")
    no_compiler.setattr(spike_ops_cpp, "FLAGS", ("--no-such-option",))
    with pytest.raises(ValueError, match=r"g\+\+ failed: .*no-such-option"):
        resolve_backend("cpp", CPU)
    assert list((tmp_path / "spikelm").iterdir()) == [], "nothing half done is left"


def test_half_a_library_is_made_anew(no_compiler, tmp_path):
    no_compiler.setenv("CXX", "g++ -pipe")
    torn = tmp_path / "spikelm" / f"spike_ops-{spike_ops_cpp._fingerprint(['g++', '-pipe'])}.so"
    torn.parent.mkdir()
    torn.write_bytes(b"\x7fELF")
    assert resolve_backend("cpp", CPU) == "cpp" and torn.stat().st_size > 1000


def test_the_source_is_installed_with_the_package():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    patterns = settings["options.package_data"]["models"].split()
    others = [path for path in (ROOT / "models").iterdir() if path.is_file() and path.suffix != ".py"]
    assert others and all(any(path.match(pattern) for pattern in patterns) for path in others)


def test_backends_that_cannot_run_are_refused():
    with pytest.raises(ValueError, match="'cuda': use one of auto, torch, cpp, triton"):
        resolve_backend("cuda", CPU)
    with pytest.raises(ValueError, match="'cpp' cannot run here: it runs on CPUs, and the tensors are on cuda"):
        resolve_backend("cpp", torch.device("cuda"))
    assert resolve_backend("triton", torch.device("meta")) == "triton", "where nothing is computed all can"
