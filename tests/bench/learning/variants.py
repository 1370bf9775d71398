"""Which models are compared: each a recipe with overrides, as anyone gives them to pipeline/pretrain.py."""

from dataclasses import dataclass

RECIPES = {"causal": "tests/bench/learning/causal.yaml", "masked": "tests/bench/learning/masked.yaml"}
"""What is learned: every next token by a decoder, masked tokens by an encoder."""


@dataclass(frozen=True)
class Variant:
    """A row of the table."""

    overrides: str
    """Words of the command line."""

    steps: int = 1
    """Times the recipe's steps: the same computation for a model that costs less."""

    def words(self, total_steps: int, warmup_steps: int) -> list[str]:
        """The overrides, longer schedules spelled out."""
        longer = (
            f"--training.total_steps {self.steps * total_steps} --schedule.warmup_steps {self.steps * warmup_steps}"
        )
        return [*self.overrides.split(), *(longer.split() if self.steps > 1 else ())]


RELEASED = "--model.neuron.amplitude frozen --model.neuron.reset released"
TRACKED = "--model.neuron.amplitude tracked --model.neuron.reset released"

NOTHING, EVERYTHING = "no layers", "twin"
"""What the recovered share is measured between: embeddings and head alone, and ordinary layers."""

VARIANTS = {
    NOTHING: Variant("--model.neuron.kind none --model.overrides.num_hidden_layers 0"),
    EVERYTHING: Variant("--model.neuron.kind none"),
    "lif": Variant("--model.neuron.kind lif --model.neuron.num_timesteps 4"),
    "released T=1": Variant(f"{RELEASED} --model.neuron.num_timesteps 1"),
    "released T=4": Variant(f"{RELEASED} --model.neuron.num_timesteps 4"),
    "tracked T=1": Variant(f"{TRACKED} --model.neuron.num_timesteps 1"),
    "tracked T=4": Variant(f"{TRACKED} --model.neuron.num_timesteps 4"),
}
