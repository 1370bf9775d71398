"""Phases: which steps are whose, that each goes through the rows in its own order, and what recipes cannot have."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_prep import build_shards
from data_prep.files import write_json
from data_prep.recipes import ConfigError
from pipeline.checkpoint import CheckpointError, find_start
from pipeline.config import accumulation_steps, differences, load_run_config
from pipeline.corpus import open_corpus
from pipeline.model import build_model
from pipeline.phases import phase_of, phases_of
from tests.http_store import http_store
from tests.tiny import OneProcess

FIRST = "{steps: 7, sample_length: 32, global_batch_size: 24, micro_batch_size: 8}"
SECOND = "{steps: 5, sample_length: 64}"
PHASES = ("--data.phases", FIRST, "--data.phases", SECOND)
SIZES = [(7, 32, 24), (5, 64, 16), (8, 128, 16)]
"""Steps, sample length and global batch of the phases."""

STEPS = sum(steps for steps, _, _ in SIZES)


def recipe(shards, *more, phases=PHASES):
    fixed = ["--recipe", "tests/distributed/tiny.yaml", "--model.preset", "decoder-tiny", "--data.shards", str(shards)]
    return load_run_config([*fixed, "--training.total_steps", str(STEPS), *phases, *more])


class Rank(OneProcess):
    """One of several processes, of which the others do not matter."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.fixture(scope="module")
def corpus(causal_shards):
    return open_corpus(recipe(causal_shards), OneProcess())


def test_steps_and_samples_are_counted_through(causal_shards):
    config = recipe(causal_shards)
    phases = phases_of(config)
    assert [(phase.section, phase.first_step, phase.first_sample) for phase in phases] == [
        ("data.phases.0", 0, 0),
        ("data.phases.1", 7, 7 * 24),
        ("training", 12, 7 * 24 + 5 * 16),
    ]
    assert [(phase.steps, phase.global_batch_size, phase.micro_batch_size) for phase in phases] == [
        (7, 24, 8),
        (5, 16, 4),
        (8, 16, 4),
    ]
    assert len({phase.config.seed for phase in phases}) == 3 and phases[-1].config.seed == config.seed
    found = [phase_of(phases, samples).section for samples in (0, 167, 168, 247, 248, 10**9)]
    assert found == ["data.phases.0"] * 2 + ["data.phases.1"] * 2 + ["training"] * 2


def test_a_run_without_phases_is_one_that_is_its_recipe(causal_shards):
    config = recipe(causal_shards, phases=())
    (phase,) = phases_of(config)
    assert (phase.config, phase.first_step, phase.first_sample) == (config, 0, 0)


def test_every_step_has_the_sizes_of_its_phase(corpus):
    shapes = [tuple(batch.tensors["input_ids"].shape) for batch in corpus.train_batches(0, STEPS + 3)]
    expected = [(batch, length) for steps, length, batch in SIZES for _ in range(steps)]
    assert shapes == expected + [(16, 128)] * 3
    assert corpus.heldout.row_length == 128 and corpus.longest_sample == 128


def test_each_phase_goes_through_the_same_rows_in_epochs_of_its_own(causal_shards):
    """Phases long enough for an epoch and more: each sample comes once an epoch, as the part of its row."""
    rows = open_corpus(recipe(causal_shards, phases=()), OneProcess()).train
    samples = {length: len(rows) * 128 // length for length in (32, 64)}
    text = rows.read(np.arange(len(rows)))["ids"]
    batch = 256
    steps = {length: -(-count // batch) + 3 for length, count in samples.items()}
    phases = [
        f"--data.phases={{steps: {steps[length]}, sample_length: {length}, global_batch_size: {batch}}}"
        for length in samples
    ]
    total = ["--training.total_steps", str(sum(steps.values()) + 1)]
    batches = open_corpus(recipe(causal_shards, *total, phases=phases), OneProcess()).train_batches(
        0, sum(steps.values())
    )
    orders = []
    for length, count in samples.items():
        own = [next(batches) for _ in range(steps[length])]
        ids, epochs = (torch.cat([getattr(each, name) for each in own]).numpy() for name in ("sample_ids", "epochs"))
        assert np.array_equal(np.sort(ids[epochs == 0]), np.arange(count)) and set(epochs) == {0, 1}
        tokens = torch.cat([each.tensors["input_ids"] for each in own]).numpy()
        assert np.array_equal(tokens, text.reshape(count, length)[ids])
        orders.append(ids[:1000])
    assert np.mean(orders[0] == orders[1]) < 0.02


def test_phases_of_equal_samples_have_different_orders(causal_shards):
    twice = ("--data.phases", "{steps: 4, sample_length: 128}", "--data.phases", "{steps: 4, sample_length: 128}")
    batches = open_corpus(recipe(causal_shards, phases=twice), OneProcess()).train_batches(0, 12)
    ids = torch.stack([batch.sample_ids for batch in batches]).reshape(3, -1)
    assert len(ids.unique()) > 0.9 * ids.numel() and not torch.equal(ids[0], ids[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumption_at_any_step_by_any_number_of_ranks_goes_on_alike(num_workers, corpus, causal_shards):
    expected = list(corpus.train_batches(0, STEPS))
    config = recipe(causal_shards, "--data.num_workers", str(num_workers))
    consumed = [0, *np.cumsum([batch for steps, _, batch in SIZES for _ in range(steps)]).tolist()]
    for step in (3, 6, 7, 8, 12, 17) if num_workers else range(STEPS):
        ranks = [
            replace(corpus, config=config, world=Rank(rank, 2)).train_batches(consumed[step], STEPS - step)
            for rank in range(2)
        ]
        for ours, theirs in zip(zip(*ranks, strict=True), expected[step:], strict=True):
            assert torch.equal(torch.cat([batch.sample_ids for batch in ours]), theirs.sample_ids)
            for name, tensor in theirs.tensors.items():
                assert torch.equal(torch.cat([batch.tensors[name] for batch in ours]), tensor)


def test_the_last_phase_is_what_the_recipe_without_phases_trains_on(corpus, causal_shards):
    plain = open_corpus(recipe(causal_shards, phases=()), OneProcess())
    assert corpus.identity() == plain.identity()
    start = phases_of(corpus.config)[-1].first_sample
    for ours, theirs in zip(corpus.train_batches(start, 8), plain.train_batches(0, 8), strict=True):
        assert torch.equal(ours.tensors["input_ids"], theirs.tensors["input_ids"])


def test_a_mixture_is_mixed_in_every_phase(causal_shards, prose, tmp_path):
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(prose(300)):
        (tmp_path / f"texts/{number}.txt").write_text(text)
    shards = ["--input", str(tmp_path / "texts"), "--layout", "causal", "--row_length", "256"]
    tokenizer = ["--tokenizer", str(causal_shards / "tokenizer"), "--output", str(tmp_path / "shards")]
    assert build_shards.main([*shards, *tokenizer, "--heldout_fraction", "0.1"]) == 0
    mixture = f"{{{causal_shards}: 1, {tmp_path / 'shards'}: 3}}"
    fixed = ["--data.mixture", mixture, "--data.sample_length", "128", "--training.total_steps", "300"]
    phases = ["--data.phases", "{steps: 100, sample_length: 32}"]
    corpus = open_corpus(recipe("null", *fixed, phases=phases), OneProcess())
    batches = list(corpus.train_batches(0, 200))
    for part, rows in zip((batches[:100], batches[100:]), corpus.phases, strict=True):
        ids = torch.cat([batch.sample_ids for batch in part])
        first = rows.order.sources[0].num_samples
        share = rows.order.shares[0] / sum(rows.order.shares)
        assert float((ids < first).double().mean()) == pytest.approx(share, abs=3 / len(ids))
        tokens = torch.cat([batch.tensors["input_ids"] for batch in part]).numpy()
        assert np.array_equal(tokens, rows.train.read(ids.numpy())["ids"])
    again = list(corpus.train_batches(100 * 16 + 48, 5))
    assert all(torch.equal(a.sample_ids, b.sample_ids) for a, b in zip(again, batches[103:108], strict=True))


def test_phases_read_shards_that_come_from_afar(corpus, causal_shards, tmp_path):
    with http_store(causal_shards) as store:
        more = ("--data.cache", str(tmp_path), "--data.order", "disk")
        afar = open_corpus(recipe(store.url, *more), OneProcess())
        assert afar.identity() == corpus.identity()
        for ours, theirs in zip(afar.train_batches(0, STEPS), corpus.train_batches(0, STEPS), strict=True):
            assert torch.equal(ours.tensors["input_ids"], theirs.tensors["input_ids"])
        assert max(store.requests[path] for path in store.requests if path.endswith(".tar")) == 1


@pytest.mark.parametrize(
    ("phases", "faults"),
    [
        (["{steps: 20, sample_length: 32}"], ["data.phases: 20 steps, which leave none of training.total_steps 20"]),
        (
            ["{steps: 9, sample_length: 32, micro_batch_size: 3}", "{steps: 11, sample_length: 64}"],
            [
                "data.phases: 20 steps, which leave none of training.total_steps 20",
                "data.phases.0.global_batch_size: 16 is not divisible by its micro_batch_size 3",
            ],
        ),
        (
            ["{steps: 0, sample_lenth: 8}", "7"],
            [
                "data.phases.0.steps: 0 should be greater than 0",
                "data.phases.0.sample_length: missing: write it beside the others of data.phases.0",
                "data.phases.0.sample_lenth: unknown field, with value 8: did you mean data.phases.0.sample_length?",
                "data.phases.1: 7 is not a section",
            ],
        ),
    ],
)
def test_phases_that_cannot_be_are_told_all_at_once(phases, faults):
    arguments = [word for phase in phases for word in ("--data.phases", phase)]
    with pytest.raises(ConfigError) as raised:
        recipe("here", "--checkpoint.keep", "0", phases=arguments)
    told = raised.value.faults
    assert len(told) == len(faults) + 1
    assert all(any(line.startswith(fault) for line in told) for fault in faults), told


def test_rows_of_pairs_have_another_way():
    with pytest.raises(ConfigError, match="encoder-tiny learns from sentence pairs.*model.warm_start on the export"):
        recipe("here", "--model.preset", "encoder-tiny")


@pytest.mark.parametrize(
    ("phases", "ranks", "message"),
    [
        (
            ["{steps: 2, sample_length: 48}", "{steps: 2, sample_length: 100}"],
            1,
            "data.phases.0.sample_length 48 and data.phases.1.sample_length 100 do not divide the rows of 128 tokens",
        ),
        (
            ["{steps: 2, sample_length: 32, global_batch_size: 12}"],
            2,
            r"data.phases.0.global_batch_size 12 is not divisible by data.phases.0.micro_batch_size 4 x 2 processes",
        ),
        (["{steps: 2, sample_length: 32, global_batch_size: 131072}"], 1, r"fewer than the 4,194,304 of one global b"),
    ],
)
def test_phases_that_do_not_fit_the_shards_or_the_ranks_are_refused(phases, ranks, message, causal_shards):
    config = recipe(causal_shards, phases=[word for phase in phases for word in ("--data.phases", phase)])
    with pytest.raises(ValueError, match=message):
        open_corpus(config, Rank(0, ranks))


def test_the_model_needs_positions_for_the_longest_samples_of_any_phase(causal_shards):
    more = ("--data.sample_length", "32", "--model.overrides.max_position_embeddings", "64")
    config = recipe(causal_shards, *more, phases=("--data.phases", "{steps: 2, sample_length: 128}"))
    with pytest.raises(ValueError, match="the samples have 128 tokens, the model 64 positions"):
        build_model(config, open_corpus(config, OneProcess()), OneProcess())


def test_what_may_change_of_phases_and_what_may_not(causal_shards):
    config = recipe(causal_shards)
    longer = recipe(causal_shards, phases=("--data.phases", FIRST.replace("steps: 7", "steps: 6"), *PHASES[2:]))
    assert differences(config, longer) == ["data.phases.0.steps: 7 in the run, 6 now"]
    fewer = recipe(causal_shards, phases=PHASES[:2])
    assert differences(config, fewer) == [
        "data.phases.1.steps: 5 in the run, 'not set' now",
        "data.phases.1.sample_length: 64 in the run, 'not set' now",
    ]
    smaller = recipe(causal_shards, phases=("--data.phases", FIRST.replace("size: 8", "size: 4"), *PHASES[2:]))
    assert differences(config, smaller) == [], "as training.micro_batch_size"
    assert accumulation_steps(phases_of(smaller)[0].config, 1) == 6


def test_a_checkpoint_of_other_phases_is_refused(corpus, causal_shards, tmp_path):
    def start(config, checkpoint=None):
        checkpointer = SimpleNamespace(newest=lambda: checkpoint, world=OneProcess())
        return find_start(config, checkpointer, corpus.identity())[1]

    saved = replace(start(corpus.config), step=9, samples_consumed=7 * 24 + 2 * 16)
    write_json(tmp_path / "train_state.json", asdict(saved))
    assert start(corpus.config, tmp_path).samples_consumed == 200
    later = recipe(causal_shards, phases=("--data.phases", FIRST.replace("steps: 7", "steps: 8"), *PHASES[2:]))
    with pytest.raises(CheckpointError, match="undo the change.*\n  data.phases.0.steps: 7 in the run, 8 now"):
        start(later, tmp_path)
