from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.loader import ElasticLoader
from pipeline.mixing import mix
from pipeline.order import OrderState, permute, run_and_window, sample_ids

sizes = st.integers(1, 3000)
runs = st.integers(1, 70) | st.lists(st.integers(1, 300), min_size=1, max_size=20).map(tuple)
windows = st.none() | st.integers(1, 400)
seeds = st.integers(0, 2**63)


def state_of(seed, num_samples, start=0, run=1, window=None):
    """An order; where runs are given one by one, of all their samples."""
    return OrderState(seed, sum(run) if isinstance(run, tuple) else num_samples, start, run, window)


@settings(max_examples=200)
@given(seed=seeds, num_samples=sizes, run=runs, window=windows, epoch=st.integers(0, 2**40))
def test_every_epoch_holds_each_sample_once(seed, num_samples, run, window, epoch):
    num_samples = state_of(seed, num_samples, run=run).num_samples
    ids, epochs = sample_ids(state_of(seed, num_samples, epoch * num_samples, run, window), num_samples)
    assert ids.dtype == epochs.dtype == np.int64
    assert np.array_equal(np.sort(ids), np.arange(num_samples))
    assert (epochs == epoch).all()


@settings(max_examples=100)
@given(
    seed=seeds, num_samples=sizes, run=runs, window=windows, start=st.integers(0, 10**12),
    counts=st.lists(st.integers(0, 200), min_size=1, max_size=5),
)  # fmt: skip
def test_the_stream_does_not_depend_on_how_it_is_cut(seed, num_samples, run, window, start, counts):
    state = state_of(seed, num_samples, start, run, window)
    ids, epochs = sample_ids(state, sum(counts))
    starts = accumulate(counts[:-1], initial=start)
    pieces = [sample_ids(replace(state, position=place), count) for place, count in zip(starts, counts, strict=True)]
    assert np.array_equal(ids, np.concatenate([piece[0] for piece in pieces]))
    assert np.array_equal(epochs, np.concatenate([piece[1] for piece in pieces]))
    assert np.array_equal(epochs, np.arange(start, start + sum(counts)) // state.num_samples)


class NoRows:
    """A reader for tests that look only at which samples come."""

    samples_ahead = 0

    def read(self, sample_ids):
        return {}


def no_tensors(rows, sample_ids, epochs):
    return {}


@settings(max_examples=60)
@given(
    seed=seeds, num_samples=sizes, run=runs, window=windows, start=st.integers(0, 10**12),
    batch_size=st.integers(1, 60), step=st.integers(0, 10**6),
)  # fmt: skip
def test_any_number_of_ranks_sees_the_same_global_batches(seed, num_samples, run, window, start, batch_size, step):
    order = state_of(seed, max(num_samples, batch_size), start, run, window)
    assume(order.num_samples >= batch_size)
    ids, epochs = sample_ids(replace(order, position=start + step * batch_size), batch_size)
    for world_size in (size for size in range(1, batch_size + 1) if batch_size % size == 0):
        shares = [
            ElasticLoader(
                NoRows(), no_tensors, order=order, global_batch_size=batch_size, rank=rank, world_size=world_size
            )[step]
            for rank in range(world_size)
        ]
        assert {len(share.sample_ids) for share in shares} == {batch_size // world_size}
        assert np.array_equal(ids, np.concatenate([share.sample_ids for share in shares]))
        assert np.array_equal(epochs, np.concatenate([share.epochs for share in shares]))


@settings(max_examples=60)
@given(
    seed=seeds, other=seeds, num_samples=st.integers(300, 3000), run=st.integers(1, 20), window=windows,
    epoch=st.integers(0, 10**6),
)  # fmt: skip
def test_another_seed_or_epoch_is_another_order(seed, other, num_samples, run, window, epoch):
    assume(seed != other)
    order = sample_ids(OrderState(seed, num_samples, epoch * num_samples, run, window), num_samples)[0]
    for name, place in ((other, epoch), (seed, epoch + 1)):
        ids = sample_ids(OrderState(name, num_samples, place * num_samples, run, window), num_samples)[0]
        assert np.mean(ids == order) < 0.5


@settings(max_examples=60)
@given(seed=seeds, num_samples=sizes, run=st.integers(1, 70), window=st.integers(1, 400))
def test_a_window_reads_few_places(seed, num_samples, run, window):
    """What runs are for: a window holds as many as fill it; its ends and the shorter run add three at most."""
    assume(window < num_samples)
    ids, _ = sample_ids(OrderState(seed, num_samples, run=run, window=window), num_samples)
    for start in range(0, num_samples, window):
        assert len(np.unique(ids[start : start + window] // run)) <= (window - 1) // run + 3


@settings(max_examples=60)
@given(seed=seeds, shards=st.lists(st.integers(1, 40), min_size=12, max_size=60))
def test_shards_of_any_size_are_read_in_one_go(seed, shards):
    """In the order for remote shards each is in use for a stretch of the epoch, and few at a time."""
    run, window = run_and_window("remote", shards)
    ids, _ = sample_ids(OrderState(seed, sum(shards), 0, run, window), sum(shards))
    shard_of = np.repeat(np.arange(len(shards)), shards)[ids]
    windows_of = [np.unique(np.flatnonzero(shard_of == shard) // window) for shard in range(len(shards))]
    assert all(len(used) == 1 or used.tolist() == [used[0], used[0] + 1] for used in windows_of)
    straddling = [used[0] for used in windows_of if len(used) > 1]
    assert len(straddling) == len(set(straddling)), "at most one is cut by each border"


@settings(max_examples=100)
@given(key=seeds, size=st.integers(1, 2**53), start=st.integers(0, 2**53))
def test_permute_never_leaves_its_domain_nor_meets_itself(key, size, start):
    index = np.arange(start % size, min(start % size + 300, size), dtype=np.uint64)
    result = permute(index, np.full_like(index, size), np.full_like(index, key))
    assert (result < size).all()
    assert len(np.unique(result)) == len(index)


def test_order_is_what_it_was():
    """Frozen: runs under way must not see another order after an update."""
    ids, _ = sample_ids(OrderState(seed=7, num_samples=10, position=5, run=(3, 2, 5), window=4), 10)
    assert ids.tolist() == [3, 9, 0, 1, 2, 5, 0, 1, 2, 7]
    ids, epochs = sample_ids(OrderState(seed=7, num_samples=10, position=25, run=2, window=4), 10)
    assert ids.tolist() == [4, 5, 6, 1, 0, 6, 7, 9, 8, 5]
    assert epochs.tolist() == [2] * 5 + [3] * 5
    assert int(mix(1, -2, 3)) == 0xA751334A06F3C6C3


@pytest.mark.parametrize(("run", "window"), [(1, None), (1, 64), (16, 128)])
def test_orders_differ_by_epoch_and_seed_and_settings(run, window):
    def order(seed, epoch):
        return sample_ids(OrderState(seed, 1000, epoch * 1000, run, window), 1000)[0]

    base = order(0, 0)
    for other in (order(0, 1), order(1, 0), np.arange(1000)):
        assert np.mean(base == other) < 0.02


def test_a_run_stays_within_its_window():
    """Runs of 10 in windows of 50: a window's samples come from about five places, not from fifty."""
    ids, _ = sample_ids(OrderState(seed=3, num_samples=1005, run=10, window=50), 1005)
    for window in ids[:1000].reshape(20, 50):
        assert len(np.unique(window // 10)) <= 8
        assert not np.array_equal(window, np.sort(window))


def test_the_last_shorter_run_does_not_always_come_last():
    orders = [sample_ids(OrderState(seed, 1005, run=10, window=50), 1005)[0] for seed in range(9)]
    assert len({int(np.flatnonzero(ids >= 1000)[0]) // 100 for ids in orders}) > 2


def test_full_shuffle_is_as_mixed_as_a_random_permutation():
    size, batch = 20_000, 200
    epochs = [sample_ids(OrderState(5, size, epoch * size), size)[0] for epoch in range(5)]
    for ids in epochs:
        neighbours = np.corrcoef(ids[:-1], ids[1:])[0, 1]
        assert abs(neighbours) < 4 / np.sqrt(size)
        means = ids.reshape(-1, batch).mean(axis=1)
        expected = size / np.sqrt(12 * batch)
        assert 0.7 * expected < means.std() < 1.3 * expected
    assert abs(np.corrcoef(epochs[0], epochs[1])[0, 1]) < 4 / np.sqrt(size)


def test_far_positions_of_huge_data_are_reached():
    state = OrderState(seed=1, num_samples=10**10 + 7, position=10**17)
    ids, epochs = sample_ids(state, 256)
    assert epochs[0] == 10**17 // (10**10 + 7)
    assert ids.min() >= 0 and ids.max() < state.num_samples and ids.max() > 2**32


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"num_samples": 2**53 + 1}, "2\\*\\*53"),
        ({"num_samples": 5, "position": -1}, "position is -1"),
        ({"num_samples": 5, "run": 0}, "run is 0"),
        ({"num_samples": 5, "window": 0}, "window is 0"),
        ({"num_samples": 5, "run": (5, 0)}, r"run is \(5, 0\)"),
        ({"num_samples": 5, "run": ()}, r"run is \(\)"),
        ({"num_samples": 5, "run": (2, 4)}, "runs of 6 samples, but num_samples is 5"),
    ],
)
def test_impossible_orders_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        OrderState(seed=0, **fields)
