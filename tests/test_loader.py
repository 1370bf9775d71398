import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from data_prep.shards import ShardIndex, ShardReader, ShardWriter, row_fields
from pipeline.config import ObjectiveSettings
from pipeline.loader import MOVED, ElasticLoader, SplitRows, heldout_batches, identity_differences, order_identity
from pipeline.objectives import IGNORED, MaskedTokens, SpecialTokens, count_targets
from pipeline.order import OrderState

TOKENS = SpecialTokens(mask=4, special=(0, 1, 2, 3, 4), vocab_size=1000)
OBJECTIVE = MaskedTokens(seed=11, settings=ObjectiveSettings(), tokens=TOKENS)
MAKE_BATCH, LOSSES = OBJECTIVE.make_batch, OBJECTIVE.losses


class FakeReader:
    """Rows in memory, read as ShardReader reads them."""

    fingerprint = "f00d"
    samples_ahead = 0

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows["ids"])

    def read(self, sample_ids):
        return {name: array[sample_ids] for name, array in self.rows.items()}


@pytest.fixture
def reader(pair_rows):
    return FakeReader(pair_rows(103, 16))


def global_batches(reader, *, world_size, num_workers=0, position=0, num_steps=14, global_batch_size=24):
    """The batches of all ranks, joined: per step a dict of tensors, ids and epochs included."""
    order = OrderState(seed=2, num_samples=len(reader), position=position)
    ranks = [
        ElasticLoader(
            reader,
            MAKE_BATCH,
            order=order,
            global_batch_size=global_batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
        ).batches(num_steps)
        for rank in range(world_size)
    ]
    return [
        {
            **{name: torch.cat([batch.tensors[name] for batch in shares]) for name in shares[0].tensors},
            "sample_ids": torch.cat([batch.sample_ids for batch in shares]),
            "epochs": torch.cat([batch.epochs for batch in shares]),
        }
        for shares in zip(*ranks, strict=True)
    ]


def assert_equal_batches(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[name], other[name]) for name in batch)


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0), (2, 2), (3, 0), (4, 1)])
def test_ranks_and_workers_change_nothing(reader, world_size, num_workers):
    """Issue A, show 6: every global batch is the same, across three ends of an epoch."""
    expected = global_batches(reader, world_size=1)
    assert_equal_batches(global_batches(reader, world_size=world_size, num_workers=num_workers), expected)


def test_each_sample_once_an_epoch(reader):
    batches = global_batches(reader, world_size=2, num_workers=2)
    ids = torch.cat([batch["sample_ids"] for batch in batches])
    epochs = torch.cat([batch["epochs"] for batch in batches])
    assert epochs.unique().tolist() == [0, 1, 2, 3]
    for epoch in range(3):
        assert ids[epochs == epoch].sort().values.tolist() == list(range(103))
    assert any(len(batch["epochs"].unique()) == 2 for batch in batches), "no batch crossed an epoch's end"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_real_shards_give_the_same_batches(reader, tmp_path, num_workers):
    fields = row_fields("pairs", 16, "uint16")
    writer = ShardWriter(tmp_path, "train", fields, rows_per_block=8, blocks_per_shard=4)
    writer.write(reader.rows)
    ShardIndex(row_length=16, tokenizer="toy", fields=fields, shards=tuple(writer.finish())).save(tmp_path)
    shards = ShardReader(tmp_path)
    assert len(shards) == 103
    found = global_batches(shards, world_size=2, num_workers=num_workers)
    assert_equal_batches(found, global_batches(reader, world_size=1))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stopped_run_goes_on_alike_with_other_ranks(reader, world_size):
    expected = global_batches(reader, world_size=1)
    for step in (1, 4, 9):
        resumed = global_batches(reader, world_size=world_size, position=step * 24, num_steps=14 - step)
        assert_equal_batches(resumed, expected[step:])


def test_rows_are_those_of_the_ids(reader):
    for batch in global_batches(reader, world_size=2, num_steps=3):
        rows = torch.from_numpy(reader.rows["ids"][batch["sample_ids"].numpy()].astype(np.int64))
        kept = batch["labels"] == IGNORED
        assert torch.equal(batch["input_ids"][kept], rows[kept])
        assert torch.equal(batch["labels"][~kept], rows[~kept])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_torch_generator_alone(reader, num_workers):
    before = torch.get_rng_state()
    global_batches(reader, world_size=1, num_workers=num_workers, num_steps=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_end_with_the_iterator(reader):
    loader = ElasticLoader(reader, MAKE_BATCH, order=OrderState(0, len(reader)), global_batch_size=4, num_workers=2)
    batches = loader.batches(1000)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()
    assert len(list(loader.batches(3))) == 3
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_to_stop_are_no_business_of_workers(reader, number):
    loader = ElasticLoader(reader, MAKE_BATCH, order=OrderState(0, len(reader)), global_batch_size=4, num_workers=1)
    batches = loader.batches(20)
    first = next(batches)
    [worker] = multiprocessing.active_children()
    os.kill(worker.pid, number)
    found = [first, *batches]
    expected = [loader[step] for step in range(20)]
    assert [batch.sample_ids.tolist() for batch in found] == [batch.sample_ids.tolist() for batch in expected]
    assert not multiprocessing.active_children()


def test_a_worker_that_fails_says_so_and_ends(reader):
    reader.rows["ids"][:] = 5000  # beyond the vocabulary
    loader = ElasticLoader(reader, MAKE_BATCH, order=OrderState(0, len(reader)), global_batch_size=4, num_workers=1)
    with pytest.raises(IndexError):
        next(loader.batches(2))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"global_batch_size": 104}, "103 training samples, fewer than one global batch of 104"),
        ({"global_batch_size": 25, "world_size": 2}, "25 is not divisible by 2 processes"),
    ],
)
def test_impossible_sizes_are_refused(reader, sizes, named):
    with pytest.raises(ValueError, match=named):
        ElasticLoader(reader, MAKE_BATCH, order=OrderState(0, len(reader)), **sizes)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 103, 200])
def test_heldout_rows_come_once_over_all_ranks(reader, world_size, batch_size):
    ranks = [
        list(heldout_batches(reader, MAKE_BATCH, batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    full, rest = divmod(103, batch_size)
    sizes = sorted((len(batch.sample_ids) for batch in batches if batch.sample_ids[0] >= 0), reverse=True)
    assert sizes == [batch_size] * full + [rest] * (rest > 0)
    assert all(len(batch.sample_ids) == 1 for batch in batches if batch.sample_ids[0] < 0)
    ids = torch.cat([batch.sample_ids for batch in batches])
    assert ids[ids >= 0].sort().values.tolist() == list(range(103))
    expected = MAKE_BATCH(reader.rows, np.arange(103), np.zeros(103, np.int64))
    counts = sum(count_targets(batch.tensors, LOSSES) for batch in batches)
    assert counts.tolist() == count_targets(expected, LOSSES).tolist()
    for batch in batches:
        counted = batch.sample_ids >= 0
        for name, tensor in batch.tensors.items():
            assert torch.equal(tensor[counted], expected[name][batch.sample_ids[counted]])
        assert (batch.tensors["attention_mask"][~counted].sum(1) == 1).all()


def test_no_heldout_rows_are_an_error_at_once(pair_rows):
    with pytest.raises(ValueError, match="no held-out rows"):
        heldout_batches(FakeReader(pair_rows(0, 16)), MAKE_BATCH, batch_size=4)


def test_identity_names_what_differs(reader):
    order = OrderState(seed=1, num_samples=103, run=4, window=32)
    saved = order_identity(reader, order)
    assert identity_differences(saved, order_identity(reader, order)) == []
    reader.fingerprint = "beef"
    now = order_identity(reader, OrderState(seed=1, num_samples=103, position=7, run=4))
    assert identity_differences(saved, now) == [
        "fingerprint: 'f00d' in the checkpoint, 'beef' now",
        "shuffle_window: 32 in the checkpoint, None now" + MOVED,
    ]
    assert identity_differences({}, {"seed": 1}) == ["seed: 'missing' in the checkpoint, 1 now"]


class CausalRows:
    """Five rows of 12 tokens: 100 * row + position."""

    fingerprint, row_length, shard_sizes, samples_ahead = "five", 12, (2, 2, 1), 0

    def __len__(self):
        return 5

    def read(self, sample_ids):
        return {"ids": 100 * sample_ids[:, None] + np.arange(12), "length": np.array([12, 12, 12, 12, 5])[sample_ids]}


def test_rows_are_split_into_samples_that_are_their_parts():
    split = SplitRows(CausalRows(), 4)
    assert (len(split), split.row_length, split.shard_sizes, split.fingerprint) == (15, 4, (6, 6, 3), "five")
    samples = split.read(np.array([4, 0, 12, 13, 14]))
    assert samples["ids"].tolist() == [
        [104, 105, 106, 107],
        [0, 1, 2, 3],
        [400, 401, 402, 403],
        [404, 405, 406, 407],
        [408, 409, 410, 411],
    ]
    assert samples["length"].tolist() == [4, 4, 4, 1, 0]
