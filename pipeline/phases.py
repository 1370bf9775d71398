"""The phases of a training: stretches of steps, each on samples of one length in batches of one size.

data.phases lists those before the last one, which has the recipe's own sample length and batch sizes and goes on to
training.total_steps. Which phase comes next follows from the samples consumed alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.config import PhaseSettings, RunConfig
from pipeline.mixing import Choice, mix


@dataclass(frozen=True)
class Phase:
    """One phase of a training."""

    section: str
    """Where the recipe says its sizes: data.phases.0, data.phases.1, ..., or training for the last one."""

    config: RunConfig
    """The recipe of a run that is this phase alone, with its steps and sizes and a seed of its own."""

    first_step: int
    """Steps before it."""

    first_sample: int
    """Samples consumed by the steps before it."""

    @property
    def steps(self) -> int:
        """Its optimizer steps."""
        return self.config.training.total_steps

    @property
    def global_batch_size(self) -> int:
        """Samples of one of these steps, over all processes."""
        return self.config.training.global_batch_size

    @property
    def micro_batch_size(self) -> int:
        """Samples of one forward in one process."""
        return self.config.training.micro_batch_size


def phases_of(config: RunConfig) -> tuple[Phase, ...]:
    """The phases of a run in the order in which they are trained; of a recipe without data.phases the whole run."""
    training, earlier = config.training, config.data.phases
    steps = training.total_steps - sum(settings.steps for settings in earlier)
    last = PhaseSettings(steps, config.data.sample_length, training.global_batch_size, training.micro_batch_size)
    phases: list[Phase] = []
    first_step = first_sample = 0
    for number, settings in enumerate((*earlier, last)):
        is_last = settings is last
        own = replace(
            config,
            seed=config.seed if is_last else int(mix(config.seed, Choice.PHASE_ORDER, number)),
            data=replace(config.data, sample_length=settings.sample_length, phases=()),
            training=replace(
                training,
                total_steps=settings.steps,
                global_batch_size=settings.global_batch_size or training.global_batch_size,
                micro_batch_size=settings.micro_batch_size or training.micro_batch_size,
            ),
        )
        phases.append(Phase("training" if is_last else f"data.phases.{number}", own, first_step, first_sample))
        first_step += settings.steps
        first_sample += settings.steps * own.training.global_batch_size
    return tuple(phases)


def phase_of(phases: Sequence[Phase], samples_consumed: int) -> Phase:
    """The phase that the next sample belongs to; the last one, however many were consumed, has no end."""
    return next(phase for phase in reversed(phases) if phase.first_sample <= samples_consumed)
