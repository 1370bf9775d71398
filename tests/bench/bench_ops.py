"""The primitives on packed spikes: time an element and bytes a second, by backend and dtype, beside a copy.

On CPUs the time is that of all cores together. encode makes its statistics, too, as in training.

    python -m tests.bench.bench_ops --rows 64 --record

Bytes are those that must pass between memory and cores: every input and output once; of an activation before the
neuron, which Triton's kernels compute in the same launch, its input and the gradient of that.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.spike_ops import (
    FASTEST,
    activated_backward,
    code_width,
    decode,
    encode,
    encode_activated,
    membrane_backward,
    worth,
)
from tests.bench.tables import format_table, machine, record, seconds
from tests.tiny import activated

CALLS = 10


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every primitive in every form that runs here, and print one table."""
    options = _parse(arguments)
    device = torch.device(options.device)
    shape = (options.timesteps, options.rows, options.tokens, options.width)
    unit = "CPU-" if device.type == "cpu" else ""
    rows, setting = [], f"T={shape[0]} B={shape[1]} L={shape[2]} D={shape[3]}"
    print(f"{setting}; {options.rounds} alternations of {CALLS} calls; {machine(device)}")
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape, device=device).to(dtype)
        moved, variants = {}, {"copy": x.clone}
        moved["copy"] = 2 * x.nbytes
        for backend in ("torch", FASTEST.get(device.type)):
            forms = primitives(x, backend)
            variants |= {f"{name}, {backend}": run for name, run in forms.items()}
            packed = x.numel() // x.shape[-1] * code_width(x.shape[-1])
            moved |= {f"{name}, {backend}": (2 if "back" in name else 1) * x.nbytes + packed for name in forms}
        if FASTEST.get(device.type) == "triton":
            for activation, gated in (("gelu", False), ("silu", True)):
                hidden = torch.randn(*shape[:-1], shape[-1] * (2 if gated else 1), device=device).to(dtype)
                forms = with_activation(hidden, activation, gated)
                variants |= forms
                moved |= {
                    name: (2 * hidden.nbytes + x.nbytes if "backward" in name else hidden.nbytes) + packed
                    for name in forms
                }
        taken = seconds({name: _repeated(run) for name, run in variants.items()}, options.rounds, device)
        each = {name: [value / CALLS for value in values] for name, values in taken.items()}
        speed = {name: moved[name] / statistics.median(values) for name, values in each.items()}
        for name, values in each.items():
            elements = statistics.median(values) / x.numel() * 1e9
            figures = (f"{elements:.3f}", f"{speed[name] / 1e9:.1f}", f"{100 * speed[name] / speed['copy']:.0f}")
            rows.append([f"{name}, {str(dtype).removeprefix('torch.')}", *figures])
        if options.record:
            record("ops", f"{setting} {dtype}", f"{unit}s", each, device)
    print(format_table(["primitive", f"{unit}ns/element", f"GB/{unit}s", "% of a copy"], rows))


def primitives(x: Tensor, backend: str) -> dict[str, Callable[[], object]]:
    """The three, on x, with the neuron that is the default."""
    alpha = 1.4 * x.float().abs().mean(dim=(1, 2, 3))
    code, *_ = encode(x, alpha, None, "normalized", 0.25, backend)
    value = worth(alpha, x.dtype)
    return {
        "encode": lambda: encode(x, alpha, None, "normalized", 0.25, backend, False),
        "decode": lambda: decode(code, value, x.shape[-1], backend),
        "membrane_backward": lambda: membrane_backward(x, code, alpha, None, "normalized", 0.25, backend, False),
    }


def with_activation(hidden: Tensor, activation: str, gated: bool) -> dict[str, Callable[[], object]]:
    """Activation and neuron in one launch and apart, there and back, by Triton."""
    x = activated(hidden.requires_grad_(), activation, gated)
    alpha = 1.4 * x.detach().float().abs().mean(dim=(1, 2, 3))
    code, *_ = encode(x.detach(), alpha, None, "normalized", 0.25, "triton")
    grad, how, given = torch.randn_like(x), (activation, gated, "normalized", 0.25), hidden.detach()

    def apart_backward() -> object:
        grad_x, _ = membrane_backward(grad, code, alpha, None, "normalized", 0.25, "triton")
        return torch.autograd.grad(x, hidden, grad_x, retain_graph=True)

    name = f"gated {activation}" if gated else activation
    return {
        f"{name}, encode apart": lambda: encode(
            activated(given, activation, gated), alpha, None, "normalized", 0.25, "triton"
        ),
        f"{name}, encode in one": lambda: encode_activated(given, alpha, None, *how),
        f"{name}, backward apart": apart_backward,
        f"{name}, backward in one": lambda: activated_backward(grad, given, code, alpha, None, *how),
    }


def _repeated(run: Callable[[], object]) -> Callable[[], None]:
    def repeat() -> None:
        for _ in range(CALLS):
            run()

    return repeat


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="rows in the batch, B")
    parser.add_argument("--tokens", type=int, default=128, help="tokens in a row, L")
    parser.add_argument("--timesteps", type=int, default=4, help="spike timesteps, T")
    parser.add_argument("--width", type=int, default=768, help="width, D")
    parser.add_argument("--rounds", type=int, default=5, help="alternations of all variants")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--record", action="store_true", help="append the raw figures to results.csv")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
