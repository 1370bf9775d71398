"""Which models are compared: each a recipe with overrides, as anyone gives them to pipeline/pretrain.py."""

from dataclasses import dataclass

from pipeline.config import RunConfig, load_run_config

_WIDE = "--model.overrides.hidden_size 256 --model.overrides.intermediate_size 768"
_LONG = "--training.total_steps 500 --checkpoint.every 500"
_CAUSAL, _MASKED = "--recipe tests/bench/learning/causal.yaml", "--recipe tests/bench/learning/masked.yaml"

RECIPES = {
    "causal": _CAUSAL,
    "masked": _MASKED,
    "causal, D=256": f"{_CAUSAL} {_WIDE}",
    "causal, 500 steps": f"{_CAUSAL} {_LONG}",
    "causal, D=256, 500 steps": f"{_CAUSAL} {_WIDE} {_LONG}",
}
"""What is learned: every next token, by a decoder; masked tokens, by an encoder; and, to see whether the order of the
neurons stays, every next token at twice the width and with twice the budget."""

NOTHING, EVERYTHING = "no layers", "twin"
"""What the recovered share is measured between: embeddings and head alone, and ordinary layers."""


@dataclass(frozen=True)
class Variant:
    """A row of the table: overrides of a recipe, how many times its steps are trained, and by which command."""

    overrides: str
    length: int = 1
    command: str = "pipeline/pretrain.py"


_ELASTIC = (
    "--model.neuron.kind elastic --model.neuron.frequency {k} --model.neuron.amplitude {amplitude} "
    "--model.neuron.momentum 0.99 --model.neuron.reset {reset} --model.neuron.num_timesteps {T}"
)


def _elastic(k: float, amplitude: str, reset: str, T: int, length: int = 1) -> Variant:
    return Variant(_ELASTIC.format(k=k, amplitude=amplitude, reset=reset, T=T), length)


_PENALTY = "--training.firing_penalty 0.24"


def _by_site(T: int, more: str = "") -> Variant:
    """Values fire more often than the other sites."""
    base = _ELASTIC.format(k=1.5, amplitude="tracked", reset="normalized", T=T)
    return Variant(" ".join(filter(None, [base, "--model.neuron.site_frequencies.value 0.8", more])))


_PLAINLY = "-m tests.bench.learning.pretrain_plainly"

# Padding counts nowhere, so that all firing rates are of the same tokens.
VARIANTS = {
    NOTHING: Variant("--model.neuron.kind none --model.overrides.num_hidden_layers 0"),
    EVERYTHING: Variant("--model.neuron.kind none"),
    "lif T=4": Variant("--model.neuron.kind lif --model.neuron.num_timesteps 4"),
    "released T=1": _elastic(2, "frozen", "released", 1),
    "released T=4": _elastic(2, "frozen", "released", 4),
    "tracked T=1": _elastic(2, "tracked", "released", 1),
    "tracked T=4": _elastic(2, "tracked", "released", 4),
    "k=1.4 T=1": _elastic(1.4, "tracked", "normalized", 1),
    "k=1.4 T=2": _elastic(1.4, "tracked", "normalized", 2),
    "k=1.4 T=4": _elastic(1.4, "tracked", "normalized", 4),
    "k=1.4 T=4, released reset": _elastic(1.4, "tracked", "released", 4),
    "k=1.4 T=1, 4 x tokens": _elastic(1.4, "tracked", "normalized", 1, length=4),
    "k by site T=1": _by_site(1),
    "k by site T=4": _by_site(4),
    "k by site T=8": _by_site(8),
    "k by site T=1, penalty": _by_site(1, _PENALTY),
    "k by site T=4, penalty": _by_site(4, _PENALTY),
    "k by site T=1, plain autograd": Variant(_by_site(1).overrides, command=_PLAINLY),
}

_LONGEST = ("k=1.4 T=1, 4 x tokens", "k by site T=8", "k by site T=1, plain autograd")
_CONTENDERS = (NOTHING, EVERYTHING, "released T=1", "k=1.4 T=1", "k by site T=1", "k by site T=1, penalty")


def variants_of(recipe: str) -> tuple[str, ...]:
    """The variants that a recipe is trained with where nothing else is asked for: the decoder of its own size all."""
    if recipe == "causal":
        return tuple(VARIANTS)
    return tuple(name for name in VARIANTS if name not in _LONGEST) if recipe == "masked" else _CONTENDERS


def command_line(recipe: str, variant: str, *more: str) -> list[str]:
    """What pipeline/pretrain.py is called with for a row of a recipe's table."""
    words = [*RECIPES[recipe].split(), *VARIANTS[variant].overrides.split(), *more]
    if (length := VARIANTS[variant].length) > 1:
        base = load_run_config(words)
        words += ["--training.total_steps", str(length * base.training.total_steps)]
        words += ["--schedule.warmup_steps", str(length * base.schedule.warmup_steps)]
    return words


def run_config(recipe: str, variant: str) -> RunConfig:
    """The settings of a row of a recipe's table."""
    return load_run_config(command_line(recipe, variant))
