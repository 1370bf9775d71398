"""Fine-tuning's part of training: predictions for whole splits, the best checkpoint so far, an early end.

Legend: B batch, C classes (1 for a number), N rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from models.amplitudes import SpikeStats, spiking_stack
from pipeline.checkpoint import Search, TrainState
from pipeline.ending import NonFiniteError
from pipeline.evaluation import firing_values
from pipeline.loader import Batch
from pipeline.objectives import count_targets, loss_sums
from pipeline.task_corpus import TaskCorpus
from pipeline.task_metrics import compute_metrics
from pipeline.tasks import VALIDATION, Task
from pipeline.trainer import Trainer
from pipeline.world import World


@dataclass(frozen=True)
class Predictions:
    """What a model says of the N rows of a split.

    Attributes:
        scores: logits of the classes, or the number, fp32 [N, C].
        loss: mean over rows, nats or squared error; None where they have no labels.
        stats: what the neurons did.
    """

    scores: np.ndarray
    loss: float | None
    stats: SpikeStats

    def of(self, task: Task) -> np.ndarray:
        """Numbers of classes, or numbers, [N]."""
        return self.scores.argmax(1) if task.classes else self.scores[:, 0]


@torch.no_grad()
def predict(
    model: nn.Module, batches: Iterable[Batch], losses: tuple[str, ...], world: World | None = None
) -> Predictions:
    """The predictions of `model`, or the engine around it, for the rows of all ranks' batches, each once, on all ranks.

    A batch of sample id -1 counts for nothing. Without a world this process is alone.
    """
    model.eval()
    stack = spiking_stack(model)
    device = stack.amplitudes.device
    stats = SpikeStats.zeros(len(stack.site_names), stack.config.num_timesteps, device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    ids, scores = [], []
    for batch in batches:
        tensors = {name: tensor.to(device) for name, tensor in batch.tensors.items()}
        output = model(**tensors)
        stats += SpikeStats(output.spike_stats)
        if "labels" in tensors:
            sums += torch.cat([loss_sums(output, losses), count_targets(tensors, losses)]).to(sums)
        counted = batch.sample_ids >= 0
        ids.append(batch.sample_ids[counted].numpy())
        scores.append(output.logits.float().cpu()[counted].numpy())
    own = np.concatenate(ids), np.concatenate(scores)
    gathered = world.gather(own) if world else [own]
    order = np.argsort(np.concatenate([part for part, _ in gathered]))
    total, count = (world.sum(sums) if world else sums).tolist()
    everything = np.concatenate([part for _, part in gathered])[order]
    if ill := int(np.sum(~np.isfinite(everything).all(1))):
        raise NonFiniteError(
            f"the predictions for {ill} of {len(everything)} rows are NaN or infinite: train anew (--name), with "
            "a lower optimizer.learning_rate or with optimizer.clip_norm"
        )
    return Predictions(everything, total / count if count else None, stats.all_reduced())


class TaskTrainer(Trainer):
    """The Trainer on a TaskCorpus: it measures the task's metrics, keeps the best checkpoint, and may end early."""

    corpus: TaskCorpus

    def run(self) -> TrainState:
        """As Trainer.run; a measure that a stop has prevented comes first."""
        measured = self.state.search.evaluated_step if self.state.search else 0
        if measured < self.state.step and self._counts() and self._measure():
            self.checkpointer.save(self.engine, self.state)
        return super().run()

    def evaluate(self) -> dict[str, float | dict[str, float]]:
        """Loss, metrics and firing rates on all validation rows, each row once."""
        predictions = self.predictions(VALIDATION)
        values = {"samples_consumed": self.state.samples_consumed, f"{self.losses[0]}_loss": predictions.loss}
        return {**values, **self.metrics_of(VALIDATION, predictions), **firing_values(self.stack, predictions.stats)}

    def predictions(self, split: str) -> Predictions:
        """What the model says now of the rows of a split."""
        return predict(self.engine, self.corpus.heldout_batches(split), self.losses, self.world)

    def metrics_of(self, split: str, predictions: Predictions) -> dict[str, float]:
        """The task's metrics on a split; none where it has no labels."""
        labels, task = self.corpus.data.splits[split].labels, self.corpus.data.task
        return {} if labels is None else compute_metrics(task, predictions.of(task), labels)

    def is_over(self) -> bool:
        """Whether the last step is done, or early stopping ends the training: alike on all ranks."""
        patience, search = self.config.selection.early_stopping, self.state.search
        return self.state.step >= self.config.training.total_steps or (
            patience > 0 and search is not None and search.misses >= patience
        )

    def _measure(self) -> bool:
        """Evaluate, tell, and compare with the best so far, which a checkpoint keeps."""
        values, step, search = self.evaluate(), self.state.step, self.state.search
        self.metrics.log_evaluation(step, values)
        if not self._counts():
            return False
        score = values[self.corpus.data.task.metrics[0]]
        search = Search(step, step, score) if search is None else search.after(step, score)
        self.state = replace(self.state, search=search)
        return search.best_step == step or self.is_over() or self.stopped_by is not None

    def _counts(self) -> bool:
        """Whether a measure now is one of the recipe's, not of an early stop on request."""
        return self.state.step == self.config.training.total_steps or (
            self.state.step % self.config.evaluation.every == 0
        )
