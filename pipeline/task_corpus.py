"""A task's rows as training sees them: in memory, in an order of their own, with the labels that they are learned by.

Legend: B batch, L tokens, N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config import accumulation_steps
from pipeline.finetune_config import TaskRun
from pipeline.loader import Batch, ElasticLoader, heldout_batches, order_identity
from pipeline.objectives import Rows
from pipeline.order import OrderState
from pipeline.task_data import encode_examples
from pipeline.tasks import TRAIN, VALIDATION, Task, TaskData
from pipeline.world import World

LENGTH_STEP = 8
"""Batches are padded to a multiple of so many tokens, not to the longest row of all."""


class EncodedRows:
    """The rows of a split, as pipeline.loader reads them; labels [N] where they are given."""

    samples_ahead = 0

    def __init__(self, arrays: Mapping[str, np.ndarray], labels: np.ndarray | None, fingerprint: str) -> None:
        self.arrays = dict(arrays) if labels is None else {**arrays, "labels": labels}
        self.fingerprint = fingerprint
        self.row_length = arrays["input_ids"].shape[1]
        self.shard_sizes = (len(self),)

    def __len__(self) -> int:
        return len(self.arrays["input_ids"])

    def read(self, sample_ids: np.ndarray) -> dict[str, np.ndarray]:
        return {name: array[sample_ids] for name, array in self.arrays.items()}


@dataclass(frozen=True)
class TaskObjective:
    """The label of whole rows: a class, or a number."""

    losses: tuple[str, ...]

    @classmethod
    def of(cls, task: Task) -> TaskObjective:
        return cls(("classification" if task.classes else "regression",))

    def make_batch(self, rows: Rows, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, Tensor]:
        """Int64 `input_ids`, `attention_mask` and `token_type_ids` [B, L], cut where all rows have ended, and `labels`
        [B]: int64 classes or float32 numbers, where rows have them.
        """
        longest = int(rows["attention_mask"].sum(1).max())
        length = -(-longest // LENGTH_STEP) * LENGTH_STEP
        batch = {name: array[:, :length].astype(np.int64) for name, array in rows.items() if name != "labels"}
        if "labels" in rows:
            batch["labels"] = rows["labels"].astype(np.int64 if self.losses == ("classification",) else np.float32)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


@dataclass(frozen=True)
class TaskCorpus:
    """A task bound to one rank of one run; the protocol of pipeline.corpus.Corpus."""

    config: TaskRun
    world: World
    data: TaskData
    tokenizer: str
    """Its fingerprint."""
    start: str | None
    """Fingerprint of the weights that are started from; None: random ones."""
    rows: Mapping[str, EncodedRows]
    objective: TaskObjective

    @property
    def order(self) -> OrderState:
        """A full shuffle of each epoch."""
        return OrderState(self.config.seed, len(self.rows[TRAIN]))

    def train_batches(self, samples_consumed: int, num_steps: int) -> Iterator[Batch]:
        """This rank's shares of the next `num_steps` global batches; an epoch's last one goes on into the next."""
        return self._loader(samples_consumed).batches(num_steps)

    def heldout_batches(self, split: str = VALIDATION) -> Iterator[Batch]:
        """One pass over the rows of a split."""
        return heldout_batches(
            self.rows[split],
            self.objective.make_batch,
            batch_size=self.config.evaluation.micro_batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def check(self) -> None:
        """Raises ValueError where the rows do not make a global batch for these ranks."""
        accumulation_steps(self.config, self.world.size)
        self._loader(0)

    def identity(self) -> dict[str, Any]:
        """What decides which samples come when, and what is evaluated; kept in every checkpoint."""
        fingerprints = {"tokenizer_fingerprint": self.tokenizer, "start_fingerprint": self.start}
        return {**order_identity(self.rows[TRAIN], self.order), **fingerprints}

    def _loader(self, position: int) -> ElasticLoader:
        return ElasticLoader(
            self.rows[TRAIN],
            self.objective.make_batch,
            order=replace(self.order, position=position),
            global_batch_size=self.config.training.global_batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
        )


def encode_task(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[dict[str, EncodedRows], dict[str, int]]:
    """The rows of every split, and how many texts of each were too long for `length` tokens and are cut off."""
    rows, truncated = {}, {}
    for split, examples in data.splits.items():
        arrays, truncated[split] = encode_examples(examples, tokenizer, length)
        rows[split] = EncodedRows(arrays, examples.labels, data.fingerprint)
    return rows, truncated
