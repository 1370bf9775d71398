"""Batches for each rank: the global order, cut into this rank's share, read from the shards and turned into tensors."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.mixture import MixtureState, next_samples
from pipeline.objectives import without_targets
from pipeline.order import OrderState
from pipeline.read_ahead import ReadAhead


class RowReader(Protocol):
    """Where rows come from: data_prep.shards.ShardReader, or anything like it. Picklable."""

    fingerprint: str
    """Names the contents: another set of rows, or another order of them, has another fingerprint."""

    row_length: int
    """Tokens of a row."""

    shard_sizes: tuple[int, ...]
    """Rows that lie together, in one file, for each file in turn."""

    samples_ahead: int
    """Rows to `fetch` before they are read, where they come from afar; else 0."""

    def __len__(self) -> int: ...

    def read(self, sample_ids: np.ndarray) -> dict[str, np.ndarray]:
        """The rows with these ids, in this order: one array [n, ...] per field."""
        ...


class MakeBatch(Protocol):
    """Rows [n] with their sample ids [n] and epochs [n] -> tensors, row by row: pipeline.objectives."""

    def __call__(
        self, rows: Mapping[str, np.ndarray], sample_ids: np.ndarray, epochs: np.ndarray
    ) -> dict[str, Tensor]: ...


class Batch(NamedTuple):
    """Tensors for the model, and which samples they are."""

    tensors: dict[str, Tensor]
    sample_ids: Tensor  # int64 [B]
    epochs: Tensor  # int64 [B]


class SplitRows:
    """Causal rows in equal parts of `sample_length` tokens: sample s is part s % parts of row s // parts.

    The fingerprint is that of the rows. Where a row's padding fills a part, the sample has no tokens.
    """

    def __init__(self, reader: RowReader, sample_length: int) -> None:
        self.fingerprint = reader.fingerprint
        self.row_length = sample_length
        self._reader = reader
        self._parts = reader.row_length // sample_length
        self.shard_sizes = tuple(size * self._parts for size in reader.shard_sizes)
        self.samples_ahead = reader.samples_ahead * self._parts

    def __len__(self) -> int:
        return len(self._reader) * self._parts

    def read(self, sample_ids: np.ndarray) -> dict[str, np.ndarray]:
        rows = self._reader.read(sample_ids // self._parts)
        part = sample_ids % self._parts
        ids = rows["ids"].reshape(len(sample_ids), self._parts, self.row_length)[np.arange(len(sample_ids)), part]
        length = rows["length"].astype(np.int64) - part * self.row_length
        return {"ids": ids, "length": length.clip(0, self.row_length)}

    def fetch(self, sample_ids: np.ndarray) -> None:
        """As the rows' reader does."""
        self._reader.fetch(sample_ids // self._parts)


class JoinedRows:
    """The rows of several readers, of one length and with the same fields, numbered through one after another."""

    def __init__(self, readers: Sequence[RowReader]) -> None:
        self.fingerprint = " ".join(reader.fingerprint for reader in readers)
        self.row_length = readers[0].row_length
        self.shard_sizes = tuple(chain.from_iterable(reader.shard_sizes for reader in readers))
        self.samples_ahead = min((reader.samples_ahead for reader in readers if reader.samples_ahead), default=0)
        self._readers = readers
        self._first = np.cumsum([0, *map(len, readers)])  # of each reader, and the total

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, sample_ids: np.ndarray) -> dict[str, np.ndarray]:
        rows: dict[str, np.ndarray] = {}
        for reader, chosen, own_ids in self._by_reader(sample_ids):
            for name, array in reader.read(own_ids).items():
                rows.setdefault(name, np.empty((len(sample_ids), *array.shape[1:]), array.dtype))[chosen] = array
        return rows

    def fetch(self, sample_ids: np.ndarray) -> None:
        """As those readers do whose rows come from afar."""
        for reader, _, own_ids in self._by_reader(sample_ids):
            if reader.samples_ahead:
                reader.fetch(own_ids)

    def _by_reader(self, sample_ids: np.ndarray) -> Iterator[tuple[RowReader, np.ndarray, np.ndarray]]:
        """Each reader that has some of the rows, which of them (bool [n]), and their ids there."""
        number_of = np.searchsorted(self._first, sample_ids, side="right") - 1
        for number in np.unique(number_of):
            chosen = number_of == number
            yield self._readers[number], chosen, sample_ids[chosen] - self._first[number]


class ElasticLoader(Dataset):
    """This rank's share of global batch after global batch, from `order.position` samples on.

    Global batch k covers the positions [k * global_batch_size, (k + 1) * global_batch_size) after `order.position`,
    whatever the number of ranks; rank r has the r-th of world_size equal, contiguous shares. Item k of this data set is
    a whole step, so that the number of worker processes cannot change what comes when. An epoch's last batch goes on
    into the next epoch. Nothing here counts samples consumed: that is the trainer's, since workers read ahead.

    Raises ValueError where ranks do not divide the global batch, or an epoch has fewer samples than one global batch.
    """

    def __init__(
        self,
        reader: RowReader,
        make_batch: MakeBatch,
        *,
        order: OrderState | MixtureState,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        if global_batch_size % world_size:
            raise ValueError(
                f"global batch size {global_batch_size} is not divisible by {world_size} processes: change one of them"
            )
        if order.num_samples < global_batch_size:
            raise ValueError(
                f"there are {order.num_samples} training samples, fewer than one global batch of {global_batch_size}: "
                "prepare more text, or lower training.global_batch_size"
            )
        self.reader = reader
        self.make_batch = make_batch
        self.order = order
        self.global_batch_size = global_batch_size
        self.share = global_batch_size // world_size
        self.rank = rank
        self.num_workers = num_workers

    def __getitem__(self, step: int) -> Batch:
        """This rank's share of the global batch `step` steps after the start."""
        start = self.order.position + step * self.global_batch_size + self.rank * self.share
        ids, epochs = next_samples(replace(self.order, position=start), self.share)
        return _read(self.reader, self.make_batch, ids, epochs)

    def batches(self, num_steps: int) -> Iterator[Batch]:
        """The shares of the next `num_steps` steps. Workers end with the iterator, also when it is dropped early."""
        # DataLoader draws a number even where nothing is random. A generator of its own keeps torch's as it is, so that
        # dropout after a resumption is what it would have been.
        batches = iter(
            DataLoader(
                self,
                batch_size=None,
                sampler=range(num_steps),
                num_workers=self.num_workers,
                generator=torch.Generator(),
                worker_init_fn=_ignore_stops,
            )
        )
        ahead = ReadAhead(self.reader, self.order) if self.reader.samples_ahead else None
        try:
            for step in range(num_steps):
                if ahead:
                    ahead.reached(self.order.position + step * self.global_batch_size)
                yield next(batches)
        finally:
            if ahead:
                ahead.close()
            if self.num_workers:
                # Left to the garbage collector, workers outlive an exception of theirs, whose traceback holds them.
                batches._shutdown_workers()


def heldout_batches(
    reader: RowReader, make_batch: MakeBatch, *, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """This rank's batches of one pass over all rows of `reader`, each row once over all ranks, as in epoch 0.

    Every rank gets the same number of batches, of `batch_size` rows but for the last ones. A rank for which no row is
    left then gets one that is ignored, whose sample id is -1. Raises ValueError where there are no rows.
    """
    if not len(reader):
        raise ValueError("there are no held-out rows: prepare the data with a larger held-out share")
    num_batches = -(-len(reader) // (batch_size * world_size))
    starts = ((number * world_size + rank) * batch_size for number in range(num_batches))
    return (_heldout_batch(reader, make_batch, start, batch_size) for start in starts)


def order_identity(reader: RowReader, order: OrderState | MixtureState) -> dict[str, Any]:
    """What a checkpoint has to keep, beside the number of samples consumed, for the same samples to follow."""
    identity = {"fingerprint": reader.fingerprint, "num_samples": order.num_samples, "seed": order.seed}
    if isinstance(order, OrderState):
        return {**identity, "shuffle_run": _run_of(order), "shuffle_window": order.window}
    return {
        **identity,
        "shares": list(order.shares),
        "shuffle_run": [_run_of(source) for source in order.sources],
        "shuffle_window": [source.window for source in order.sources],
    }


def _run_of(order: OrderState) -> int | str:
    """The length of runs; shards are known by the fingerprint of their rows."""
    return "shard" if isinstance(order.run, tuple) else order.run


MOVED = " (data.order auto goes by where shards lie: set data.order, or both numbers, to what they were)"


def identity_differences(saved: Mapping[str, object], current: Mapping[str, object]) -> list[str]:
    """One line for each entry in which two order identities differ; empty where training may go on."""
    names = dict.fromkeys([*current, *saved])
    return [
        f"{name}: {saved.get(name, 'missing')!r} in the checkpoint, {current.get(name, 'missing')!r} now"
        + (MOVED if name.startswith("shuffle_") else "")
        for name in names
        if saved.get(name, "missing") != current.get(name, "missing")
    ]


def _heldout_batch(reader: RowReader, make_batch: MakeBatch, start: int, batch_size: int) -> Batch:
    """The rows from `start` on; where there are none, the last of all, ignored."""
    ids = np.arange(start, min(start + batch_size, len(reader)))
    if len(ids):
        return _read(reader, make_batch, ids, np.zeros_like(ids))
    last = np.array([len(reader) - 1])
    batch = _read(reader, make_batch, last, np.zeros_like(last))
    return batch._replace(tensors=without_targets(batch.tensors), sample_ids=torch.full_like(batch.sample_ids, -1))


def _ignore_stops(worker: int) -> None:
    """Launchers send their signals to all processes: what a worker is needed for, its trainer decides."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _read(reader: RowReader, make_batch: MakeBatch, ids: np.ndarray, epochs: np.ndarray) -> Batch:
    tensors = make_batch(reader.read(ids), ids, epochs)
    return Batch(tensors, torch.from_numpy(ids), torch.from_numpy(epochs))
