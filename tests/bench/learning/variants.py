"""Which models are compared: each a recipe with overrides, as anyone gives them to pipeline/pretrain.py."""

from dataclasses import dataclass

from pipeline.config import RunConfig, load_run_config

RECIPES = {"causal": "tests/bench/learning/causal.yaml", "masked": "tests/bench/learning/masked.yaml"}
"""What is learned: every next token, by a decoder; masked tokens, by an encoder."""

NOTHING, EVERYTHING = "no layers", "twin"
"""What the recovered share is measured between: embeddings and head alone, and ordinary layers."""


@dataclass(frozen=True)
class Variant:
    """A row of the table: overrides of a recipe, all that it depends on, and how many times its steps are trained."""

    overrides: str
    length: int = 1


_ELASTIC = (
    "--model.neuron.kind elastic --model.neuron.frequency {k} --model.neuron.amplitude {amplitude} "
    "--model.neuron.momentum 0.99 --model.neuron.reset {reset} --model.neuron.num_timesteps {T}"
)


def _elastic(k: float, amplitude: str, reset: str, T: int, length: int = 1) -> Variant:
    return Variant(_ELASTIC.format(k=k, amplitude=amplitude, reset=reset, T=T), length)


_PENALTY = "--training.firing_penalty 0.24"


def _by_site(T: int, more: str = "") -> Variant:
    """Values fire more often and the MLP's inner activations less than the other sites."""
    sites = "--model.neuron.site_frequencies.value 1.0 --model.neuron.site_frequencies.mlp_down 1.8"
    base = _ELASTIC.format(k=1.4, amplitude="tracked", reset="normalized", T=T)
    return Variant(" ".join(filter(None, [base, sites, more])))


# Padding counts nowhere, so that all firing rates are of the same tokens.
VARIANTS = {
    NOTHING: Variant("--model.neuron.kind none --model.overrides.num_hidden_layers 0"),
    EVERYTHING: Variant("--model.neuron.kind none"),
    "lif T=4": Variant("--model.neuron.kind lif --model.neuron.num_timesteps 4"),
    "released T=1": _elastic(2, "frozen", "released", 1),
    "released T=4": _elastic(2, "frozen", "released", 4),
    "tracked T=1": _elastic(2, "tracked", "released", 1),
    "tracked T=4": _elastic(2, "tracked", "released", 4),
    "k=1.2 T=1": _elastic(1.2, "tracked", "normalized", 1),
    "k=1.2 T=4": _elastic(1.2, "tracked", "normalized", 4),
    "k=1.4 T=1": _elastic(1.4, "tracked", "normalized", 1),
    "k=1.4 T=2": _elastic(1.4, "tracked", "normalized", 2),
    "k=1.4 T=4": _elastic(1.4, "tracked", "normalized", 4),
    "k=1.4 T=4, released reset": _elastic(1.4, "tracked", "released", 4),
    "k=1.4 T=8": _elastic(1.4, "tracked", "normalized", 8),
    "k by site T=1": _by_site(1),
    "k by site T=4": _by_site(4),
    "k by site T=1, penalty": _by_site(1, _PENALTY),
    "k by site T=4, penalty": _by_site(4, _PENALTY),
    "k=1.5 T=1": _elastic(1.5, "tracked", "normalized", 1),
    "k=1.5 T=4": _elastic(1.5, "tracked", "normalized", 4),
    "k=1.4 T=1, 4 x tokens": _elastic(1.4, "tracked", "normalized", 1, length=4),
}


def command_line(recipe: str, variant: str, *more: str) -> list[str]:
    """What pipeline/pretrain.py is called with for a row of a recipe's table."""
    words = ["--recipe", RECIPES[recipe], *VARIANTS[variant].overrides.split(), *more]
    if (length := VARIANTS[variant].length) > 1:
        base = load_run_config(words)
        words += ["--training.total_steps", str(length * base.training.total_steps)]
        words += ["--schedule.warmup_steps", str(length * base.schedule.warmup_steps)]
    return words


def run_config(recipe: str, variant: str) -> RunConfig:
    """The settings of a row of a recipe's table."""
    return load_run_config(command_line(recipe, variant))
