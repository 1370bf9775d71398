"""Shards as a run sees them: rows that its model cannot learn from are refused, causal ones are split."""

import pytest

from data_prep.recipes import ConfigError
from pipeline import corpus
from pipeline.config import load_run_config
from pipeline.corpus import open_corpus
from tests.tiny import OneProcess


@pytest.fixture
def open_for(tiny_shards, causal_shards):
    """open_for(preset, layout, *more): the corpus of a tiny run of that model on shards in that layout."""
    shards = {"pairs": tiny_shards, "causal": causal_shards}

    def open_(preset, layout, *more):
        arguments = ["--recipe", "tests/distributed/tiny.yaml", "--data.shards", str(shards[layout])]
        return open_corpus(load_run_config([*arguments, "--model.preset", preset, *more]), OneProcess())

    return open_


def test_causal_rows_are_split_into_samples(open_for):
    whole, split = open_for("decoder-tiny", "causal"), open_for("decoder-tiny", "causal", "--data.sample_length", "32")
    assert (whole.train.row_length, split.train.row_length) == (128, 32)
    assert len(split.train) == 4 * len(whole.train) and len(split.heldout) == 4 * len(whole.heldout)
    ours, theirs = ({**each.identity(), "num_samples": 0} for each in (split, whole))
    assert ours.pop("sample_length") == 32 and theirs.pop("sample_length") == 128
    assert ours == theirs
    batch = next(split.train_batches(0, 1)).tensors
    assert set(batch) == {"input_ids", "attention_mask", "position_ids", "labels"}
    assert batch["input_ids"].shape == (16, 32)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), (1, None)),
        (("--data.order", "nfs"), (64, 65_536)),
        (("--data.shuffle_window", "100"), (1, 100)),
        (("--data.shuffle_run", "2", "--data.shuffle_window", "100"), (2, 100)),
    ],
)
def test_the_order_is_that_of_a_preset_or_of_two_numbers(settings, expected, open_for):
    order = open_for("decoder-tiny", "causal", "--data.sample_length", "32", *settings).order
    assert (order.run, order.window) == expected


def test_the_order_for_remote_shards_keeps_each_together(open_for):
    sizes = open_for("decoder-tiny", "causal").train.shard_sizes
    opened = open_for("decoder-tiny", "causal", "--data.sample_length", "32", "--data.order", "remote")
    assert opened.order.run == tuple(4 * size for size in sizes)
    assert opened.order.window == 32 * max(sizes)
    assert opened.identity()["shuffle_run"] == "shard"


def test_shards_on_a_network_file_system_are_read_by_runs(open_for, monkeypatch):
    monkeypatch.setattr(corpus, "is_on_network", lambda path: True)
    here = open_for("encoder-tiny", "pairs")
    assert (here.order.run, here.order.window) == (64, 65_536)
    assert open_for("encoder-tiny", "pairs", "--data.order", "disk").identity()["shuffle_run"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("decoder-tiny", "pairs"), "rows in the layout pairs, but decoder-tiny learns from causal"),
        (("encoder-tiny", "causal"), "rows in the layout causal, but encoder-tiny learns from pairs"),
        (
            ("decoder-tiny", "causal", "--data.sample_length", "48"),
            "data.sample_length 48 does not divide the rows of 128",
        ),
        (("encoder-tiny", "pairs", "--data.sample_length", "16"), "only causal rows can be split"),
        (
            ("decoder-tiny", "causal", "--training.global_batch_size", "16384"),
            r"holds [\d,]+ tokens to train on, fewer than the 2,097,152 of one global batch",
        ),
    ],
)
def test_rows_that_the_model_cannot_learn_from_are_refused(arguments, message, open_for):
    with pytest.raises(ValueError, match=message):
        open_for(*arguments)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (["--data.shards", "null"], "data.shards: missing: name a folder of shards, or several"),
        (["--data.mixture", "{a: 1, b: 2}"], "data.shards: 'here' has no effect beside data.mixture"),
        (["--data.shards", "null", "--data.mixture", "{a: 0}"], "data.mixture.a: 0 should be greater than 0"),
        (["--data.shards", "null", "--data.mixture", "{a: 1, '': 2}"], "data.mixture.*at least 1 character"),
        (["--data.order", "nfs", "--data.shuffle_window", "64"], "data.order: 'nfs' has no effect beside data.shuffle"),
        (["--data.order", "tape"], "data.order: 'tape' should be 'auto', 'disk', 'nfs' or 'remote'"),
    ],
)
def test_settings_that_contradict_each_other_are_faults(settings, fault):
    with pytest.raises(ConfigError, match=fault):
        load_run_config(["--recipe", "tests/distributed/tiny.yaml", "--data.shards", "here", *settings])
