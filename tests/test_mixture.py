"""Mixtures: exact shares, each source in its own order, and nothing that depends on ranks or on where one starts."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import build_shards
from data_prep.files import write_json
from pipeline.checkpoint import CheckpointError, find_start
from pipeline.config import load_run_config
from pipeline.corpus import open_corpus
from pipeline.loader import ElasticLoader, JoinedRows
from pipeline.mixture import PERIOD, MixtureState, next_samples, shares_of
from pipeline.order import OrderState, sample_ids
from tests.tiny import OneProcess

SIZES, WEIGHTS = (1000, 50_000, 7, 300), (5, 3, 0.02, 1)


@pytest.fixture
def mixture():
    """Four sources of unlike sizes and weights, in orders of unlike kinds."""
    orders = [OrderState(seed, size, run=1 + 3 * (seed % 2), window=64) for seed, size in enumerate(SIZES)]
    return MixtureState(seed=3, sources=tuple(orders), shares=shares_of(WEIGHTS))


def source_of(ids):
    return np.searchsorted(np.cumsum(SIZES), ids, side="right")


@pytest.mark.parametrize("start", [0, 123_456, PERIOD - 1000, 10**15 + 7])
def test_every_span_holds_each_sources_share(mixture, start):
    ids, _ = next_samples(replace(mixture, position=start), 10**6)
    share = np.array(WEIGHTS) / sum(WEIGHTS)
    drawn = (source_of(ids)[:, None] == np.arange(4)).cumsum(0)
    assert (np.abs(drawn[-1] / 10**6 - share) < 1e-3 * share).all()
    span = np.arange(1, 10**6 + 1)[:, None]
    assert np.abs(drawn - span * share).max() < 5


def test_each_source_is_read_in_its_own_order_and_epochs(mixture):
    ids, epochs = next_samples(mixture, 50_000)
    sources = source_of(ids)
    first_id = np.cumsum([0, *SIZES])
    for number, order in enumerate(mixture.sources):
        chosen = sources == number
        expected = sample_ids(order, chosen.sum())
        assert np.array_equal(ids[chosen] - first_id[number], expected[0])
        assert np.array_equal(epochs[chosen], expected[1])
    assert epochs[sources == 2].max() > 10 > epochs[sources == 1].max()


@settings(max_examples=30)
@given(start=st.integers(0, 10**15), counts=st.lists(st.integers(0, 300), min_size=1, max_size=5))
def test_the_stream_does_not_depend_on_how_it_is_cut(start, counts):
    order = MixtureState(1, (OrderState(0, 40), OrderState(1, 900)), shares_of([1, 2]), start)
    ids, epochs = next_samples(order, sum(counts))
    starts = start + np.cumsum([0, *counts[:-1]])
    pieces = [next_samples(replace(order, position=int(at)), count) for at, count in zip(starts, counts, strict=True)]
    assert np.array_equal(ids, np.concatenate([piece[0] for piece in pieces]))
    assert np.array_equal(epochs, np.concatenate([piece[1] for piece in pieces]))


@settings(max_examples=200)
@given(st.lists(st.floats(1e-2, 1e3), min_size=1, max_size=9))
def test_shares_are_whole_and_nearest(weights):
    shares = shares_of(weights)
    assert sum(shares) == PERIOD
    assert all(
        abs(share - weight / sum(weights) * PERIOD) < 1.001 for share, weight in zip(shares, weights, strict=True)
    )


def test_a_weight_that_never_counts_is_refused():
    with pytest.raises(ValueError, match=r"weight 1e-09 is less than a millionth"):
        shares_of([1, 1e-9])
    with pytest.raises(ValueError, match="each needs one"):
        MixtureState(0, (OrderState(0, 5),), (7,))


class Numbers:
    """Rows that hold their own number, and of which folder they are."""

    row_length, shard_sizes = 1, ()
    samples_ahead = 0

    def __init__(self, name, size):
        self.fingerprint, self.size = name, size

    def __len__(self):
        return self.size

    def read(self, sample_ids):
        return {"ids": sample_ids[:, None].astype(np.uint16), "name": np.full(len(sample_ids), ord(self.fingerprint))}


def test_joined_rows_are_those_of_their_readers():
    joined = JoinedRows([Numbers("a", 3), Numbers("b", 5)])
    assert (len(joined), joined.row_length, joined.fingerprint) == (8, 1, "a b")
    rows = joined.read(np.array([7, 0, 3, 2, 4]))
    assert rows["ids"].tolist() == [[4], [0], [0], [2], [1]] and rows["ids"].dtype == np.uint16
    assert bytes(rows["name"].astype(np.uint8)).decode() == "babab"


def make_batch(rows, sample_ids, epochs):
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in rows.items()}


def test_ranks_may_change_in_the_middle_and_weights_hold():
    """10**6 samples by 8 ranks, of which the second half comes after a resumption by 5."""
    reader = JoinedRows([Numbers("a", 900), Numbers("b", 70_000)])
    order = MixtureState(7, (OrderState(1, 900), OrderState(2, 70_000)), shares_of([1, 3]))
    size, steps = 20_000, 50

    def stream(position, ranks, num_steps):
        state = replace(order, position=position)
        loaders = [
            ElasticLoader(reader, make_batch, order=state, global_batch_size=size, rank=rank, world_size=ranks)
            for rank in range(ranks)
        ]
        return [torch.cat([loader[step].sample_ids for loader in loaders]) for step in range(num_steps)]

    ids = torch.cat([*stream(0, 8, steps // 2), *stream(steps // 2 * size, 5, steps - steps // 2)])
    assert torch.equal(ids, torch.cat(stream(0, 1, steps)))
    assert float((ids < 900).double().mean()) == pytest.approx(0.25, rel=1e-3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_shards, prose):
    """Wikipedia's shards and others of invented prose, made by the same tokenizer."""
    folder = tmp_path_factory.mktemp("invented")
    (folder / "texts").mkdir()
    for number, text in enumerate(prose(300)):
        (folder / f"texts/{number}.txt").write_text(text)
    text = ["--input", str(folder / "texts"), "--heldout_fraction", "0.1", "--row_length", "32"]
    tokenizer = str(tiny_shards / "tokenizer")
    assert build_shards.main([*text, "--tokenizer", tokenizer, "--output", str(folder / "shards")]) == 0
    return {"wikipedia": tiny_shards, "invented": folder / "shards"}


def mixed(weights, *more):
    """The recipe of a tiny run on folders with these weights."""
    weights = json.dumps({str(folder): weight for folder, weight in weights.items()})
    recipe = ["--recipe", "tests/distributed/tiny.yaml", "--data.shards", "null", "--data.mixture", weights]
    return load_run_config([*recipe, *more])


def test_a_run_on_a_mixture_sees_its_folders(folders):
    wikipedia, invented = folders.values()
    corpus = open_corpus(mixed({wikipedia: 1, invented: 3}), OneProcess())
    single = {
        folder: open_corpus(
            load_run_config(["--recipe", "tests/distributed/tiny.yaml", "--data.shards", str(folder)]), OneProcess()
        )
        for folder in (wikipedia, invented)
    }
    assert len(corpus.heldout) == sum(len(each.heldout) for each in single.values())
    again = open_corpus(mixed({invented: 0.3, wikipedia: 0.1}), OneProcess())
    assert again.identity() == corpus.identity(), "neither the recipe's order nor the scale of weights counts"
    ids = torch.cat([batch.sample_ids for batch in corpus.train_batches(0, 400)])
    first = min(single.values(), key=lambda each: each.train.fingerprint)
    is_first = ids < len(first.train)
    expected = 0.25 if first is single[wikipedia] else 0.75
    assert float(is_first.double().mean()) == pytest.approx(expected, abs=3 / len(ids))
    rows = corpus.train.read(ids.numpy())["ids"]
    assert np.array_equal(rows[is_first.numpy()], first.train.read(ids[is_first].numpy())["ids"])


def test_folders_that_do_not_fit_each_other_are_refused(folders, causal_shards, tmp_path):
    wikipedia, invented = folders.values()
    copy = tmp_path / "copy"
    copy.symlink_to(wikipedia)
    for weights, message in (
        ({wikipedia: 1, causal_shards: 1}, "rows in the layout causal"),
        ({wikipedia: 1, copy: 1}, "hold the same rows"),
        ({wikipedia: 1e-9, invented: 1}, "less than a millionth"),
    ):
        with pytest.raises(ValueError, match=message):
            open_corpus(mixed(weights), OneProcess())
    with pytest.raises(ValueError, match=r"invented.* training samples, fewer than its \d+ of a global batch of 4096"):
        open_corpus(mixed({wikipedia: 1, invented: 9}, "--training.global_batch_size", "4096"), OneProcess())


def test_another_weight_is_refused_by_the_folders_name(folders, tmp_path):
    wikipedia, invented = folders.values()

    def start(config, checkpoint=None):
        checkpointer = SimpleNamespace(newest=lambda: checkpoint, world=OneProcess())
        return find_start(config, checkpointer, open_corpus(config, OneProcess()).identity())[1]

    old = replace(start(mixed({wikipedia: 1, invented: 3})), step=3, samples_consumed=48)
    write_json(tmp_path / "train_state.json", asdict(old))
    moved = tmp_path / "moved"
    moved.symlink_to(wikipedia)
    assert start(mixed({moved: 2, invented: 6}), tmp_path).samples_consumed == 48
    with pytest.raises(CheckpointError, match=rf"data.mixture.{wikipedia}: 1.0 in the run, 2.0 now"):
        start(mixed({wikipedia: 2, invented: 3}), tmp_path)
    with pytest.raises(CheckpointError, match=rf"data.mixture.{invented}: 3.0 in the run, 'not set' now"):
        start(mixed({wikipedia: 1}), tmp_path)
