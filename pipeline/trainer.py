"""The training loop: global batches in, optimizer steps, evaluations, metrics and checkpoints out."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.amplitudes import SpikeStats, calibrate_amplitudes, spiking_stack, update_amplitudes
from pipeline.checkpoint import Checkpointer, TrainState
from pipeline.config import RunConfig, accumulation_steps
from pipeline.corpus import Corpus
from pipeline.ending import NonFiniteError
from pipeline.engine import DeepSpeedEngine, set_batch_sizes
from pipeline.evaluation import firing_values, tally_batches
from pipeline.loader import Batch
from pipeline.metrics import Metrics, SpikeHealth, Throughput, cut_tensorboard, peak_memory_bytes
from pipeline.objectives import count_targets, loss_sums
from pipeline.phases import phase_of, phases_of
from pipeline.stopping import StopRequest
from pipeline.world import World

CALIBRATION_ROWS = 256
"""At most so many rows of the first global batch, a micro-batch of each rank, calibrate a fresh model."""


@dataclass
class StepResult:
    """One optimizer step, over all ranks: mean losses in nats per target, and the neurons' statistics."""

    losses: Tensor
    stats: SpikeStats
    learning_rate: float
    gradient_norm: float


def open_metrics(
    config: RunConfig, engine: DeepSpeedEngine, world: World, folder: Path, state: TrainState | None
) -> Metrics:
    """The metrics of the run in `folder`, which goes on from `state`; None: begins, and drops what is there."""
    metrics = Metrics(
        folder,
        enabled=world.is_main,
        total_steps=config.training.total_steps,
        progress=config.logging.progress,
        monitor=engine.monitor if config.logging.tensorboard else None,
    )
    metrics.cut_after(state.step if state else None)
    if world.is_main and config.logging.tensorboard:
        cut_tensorboard(engine.monitor.tb_monitor.summary_writer, state.samples_consumed + 1 if state else 0)
    return metrics


class Trainer:
    """Trains an engine from wherever its run stands to the end.

    Args:
        engine: the DeepSpeed engine around a SpikeLM model.
        state: where the run stands; its `recipe` and `data` go into every checkpoint.
        stop: asked after every step; training stops, with a checkpoint, where any rank's says so.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        config: RunConfig,
        world: World,
        corpus: Corpus,
        checkpointer: Checkpointer,
        metrics: Metrics,
        state: TrainState,
        stop: StopRequest,
    ) -> None:
        self.engine = engine
        self.config = config
        self.world = world
        self.corpus = corpus
        self.losses = corpus.objective.losses
        self.checkpointer = checkpointer
        self.metrics = metrics
        self.state = state
        self.stop = stop
        self.stopped_by: str | None = None
        """Who asked for the stop that `run` has followed."""
        self.phases = phases_of(config)
        self.phase = self.phases[-1]
        """Whose batches the next step takes: as the engine is built, the last one's."""
        self.accumulation = accumulation_steps(config, world.size)
        self.firing_penalty = config.training.firing_penalty
        self.stack = spiking_stack(engine.module)
        self.stack.train_firing_rate(self.firing_penalty > 0)
        self.throughput = Throughput()
        self.health = SpikeHealth(self.stack.site_names, self.stack.config.neuron)

    def run(self) -> TrainState:
        """Train up to the last step (or training.stop_after_step, or a request); returns where the run stands then."""
        last = self._last_step()
        if self._is_stopped() or self.is_over():
            return self.state  # a checkpoint of this state exists, or nothing has been done yet
        self._follow_phases()
        if self.state.step == 0:
            with self.throughput.paused():
                self._start()
        # No name for the batches: an error's traceback would keep them, and so the loader's workers, alive.
        for batch in self.throughput.waiting_for(
            self.corpus.train_batches(self.state.samples_consumed, last - self.state.step)
        ):
            self._follow_phases()
            result = self.train_step(batch)
            self.state = self.state.after_step(self.phase.global_batch_size)
            step = self.state.step
            self.world.reached(step)
            self.throughput.add(self.phase.global_batch_size * batch.tensors["input_ids"].shape[1])
            if self._due(self.config.logging.every, last):
                self.metrics.log_step(step, self._step_values(result))
                self.metrics.log_health(step, self.health.warnings(step, result.stats, self.stack.amplitudes))
            stopped = step < last and self._is_stopped()
            with self.throughput.paused():
                if stopped:  # first of all: there may not be time for more
                    self.checkpointer.save(self.engine, self.state)
                to_keep = self._due(self.config.evaluation.every, last) and self._measure()
                if to_keep or (not stopped and self._due(self.config.checkpoint.every, last)):
                    self.checkpointer.save(self.engine, self.state)
            if stopped or self.is_over():
                break
        return self.state

    def train_step(self, batch: Batch) -> StepResult:
        """One optimizer step on this rank's share of a global batch.

        Every loss is the mean over the counted targets of all ranks and micro-batches, the firing rate over their
        tokens. DeepSpeed averages over both, which the factors undo. Raises NonFiniteError on every rank: for a loss
        before the weights are touched, for a gradient after DeepSpeed has applied or skipped it, before anything is
        saved.
        """
        self.engine.train()
        counted = [*count_targets(batch.tensors, self.losses), self._count_tokens(batch.tensors["attention_mask"])]
        *counts, tokens = self.world.sum(torch.stack(counted).to(self.world.device, torch.float64))
        counts, divided = torch.stack(counts), self.world.size * self.accumulation
        learning_rate = self.engine.get_lr()[0]  # read now: the step moves the schedule on
        factor, firing_factor = divided / counts.clamp(min=1), self.firing_penalty * divided / tokens.clamp(min=1)
        sums, stats = [], self._no_stats()
        for micro_batch in self._micro_batches(batch):
            output = self.engine(**micro_batch)
            summed = loss_sums(output, self.losses)
            loss = (summed * factor.to(summed.dtype)).sum()
            if self.firing_penalty:
                loss = loss + (output.firing_sum * firing_factor).to(loss.dtype)
            self.engine.backward(loss)
            sums.append(summed.detach())
            stats += SpikeStats(output.spike_stats)
            if len(sums) == self.accumulation:
                losses = self.world.sum(torch.stack(sums).to(counts).sum(0)) / counts.clamp(min=1)
                named = dict(zip(self.losses, losses.tolist(), strict=True))
                self._refuse_nonfinite("loss", named, batch, torch.stack(sums))
            self.engine.step()
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        applied = self.engine.was_step_applied()  # DeepSpeed skips a bf16 step whose gradients overflow
        self._refuse_nonfinite("gradient", {"norm": norm if applied else math.nan}, batch)
        stats = update_amplitudes(self.engine.module, stats)
        return StepResult(losses, stats, learning_rate, norm)

    def evaluate(self) -> dict[str, float | dict[str, float]]:
        """Losses, accuracies and firing rates on all held-out rows, each row once, masked as in epoch 0."""
        self.engine.eval()
        batches = (self._on_device(batch.tensors) for batch in self.corpus.heldout_batches())
        tally = tally_batches(self.engine, batches, self.losses).summed(self.world)
        values = {"samples_consumed": self.state.samples_consumed, **tally.values()}
        return values | firing_values(self.stack, tally.stats)

    def is_over(self) -> bool:
        """Whether there is nothing left to learn before the last step."""
        return False

    def _measure(self) -> bool:
        """Evaluate and tell; whether a checkpoint has to be saved at once."""
        self.metrics.log_evaluation(self.state.step, self.evaluate())
        return False

    def _start(self) -> None:
        """Before the first step: amplitudes of a model that has none, and the losses of the untrained model."""
        if not self.stack.calibrated:
            first = next(self.corpus.train_batches(0, 1)).tensors
            rows = max(1, min(CALIBRATION_ROWS // self.world.size, self.phase.micro_batch_size))
            inputs = self._on_device({name: tensor[:rows] for name, tensor in first.items()})
            calibrate_amplitudes(self.engine, inputs)
        self.metrics.log_evaluation(0, self.evaluate())

    def _count_tokens(self, attention_mask: Tensor) -> Tensor:
        """Those that count in firing rates."""
        counts_padding = self.stack.config.neuron.count_padding
        return attention_mask.new_tensor(attention_mask.numel()) if counts_padding else attention_mask.sum()

    def _follow_phases(self) -> None:
        """Take the batch sizes of the phase that comes next."""
        phase = phase_of(self.phases, self.state.samples_consumed)
        if phase is not self.phase:
            self.phase, self.accumulation = phase, accumulation_steps(phase.config, self.world.size, phase.section)
            set_batch_sizes(self.engine, phase.config)

    def _last_step(self) -> int:
        training = self.config.training
        return min(training.total_steps, training.stop_after_step or training.total_steps)

    def _due(self, every: int, last: int) -> bool:
        """Whether something that happens every so many steps (0: only at the end) happens now."""
        return self.state.step == last or (every > 0 and self.state.step % every == 0)

    def _micro_batches(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        size = self.phase.micro_batch_size
        for start in range(0, self.accumulation * size, size):
            yield self._on_device({name: tensor[start : start + size] for name, tensor in batch.tensors.items()})

    def _on_device(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.world.device, non_blocking=True) for name, tensor in tensors.items()}

    def _no_stats(self) -> SpikeStats:
        return SpikeStats.zeros(len(self.stack.site_names), self.stack.config.num_timesteps, self.world.device)

    def _is_stopped(self) -> bool:
        """Whether any rank has been asked to stop."""
        if not self.world.agree(self.stop.reason is None):
            self.stopped_by = next(filter(None, self.world.gather(self.stop.reason)))
        return self.stopped_by is not None

    def _refuse_nonfinite(self, what: str, values: dict[str, float], batch: Batch, sums: Tensor | None = None) -> None:
        """NonFiniteError, the same on all ranks, where one of `values` is NaN or infinite.

        The samples of the step are written down before: all, by rank, and those of the micro-batches whose own losses
        `sums` [micro-batches, losses] are not finite.
        """
        if all(math.isfinite(value) for value in values.values()):
            return
        step, ids = self.state.step + 1, batch.sample_ids.reshape(self.accumulation, -1)
        suspects = torch.zeros(self.accumulation, dtype=torch.bool)
        if sums is not None:
            suspects = ~sums.isfinite().all(1).cpu()
        samples = {"samples": ids.flatten().tolist(), "suspects": ids[suspects].flatten().tolist()}
        record = {
            "step": step,
            "what": what,
            "values": values,
            "sample_length": batch.tensors["input_ids"].shape[1],  # ids count parts of rows, of this length
            "ranks": self.world.gather(samples),
        }
        path = self.metrics.write_nonfinite(record)
        named = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        neuron = self.stack.config.neuron
        explodes = neuron.kind == "elastic" and neuron.reset == "released"
        remedies = ["lower optimizer.learning_rate"]
        remedies += [] if self.config.optimizer.clip_norm else ["set optimizer.clip_norm"]
        remedies += ["set model.neuron.reset normalized"] if explodes else []
        raise NonFiniteError(
            f"the {what} of step {step} is not finite ({named}). Nothing of this step is saved; its samples stand in "
            f"{path}. In a new run (--name), {' or '.join(remedies)}"
        )

    def _step_values(self, result: StepResult) -> dict[str, float | dict[str, float]]:
        losses = dict(zip((f"{name}_loss" for name in self.losses), result.losses.tolist(), strict=True))
        values = {"loss": sum(losses.values()), **losses, "learning_rate": result.learning_rate}
        values |= {
            "gradient_norm": result.gradient_norm,
            **self.throughput.values(),
            "peak_memory_bytes": peak_memory_bytes(),
            "samples_consumed": self.state.samples_consumed,
        }
        return values | firing_values(self.stack, result.stats)
