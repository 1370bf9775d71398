import os
from random import Random

import torch

# Before anything imports Triton: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import pytest
from hypothesis import settings

from data_prep import build_shards, train_tokenizer
from tests.distributed.runs import train_runs
from tests.sshd import ssh_server

WIKIPEDIA = "package://gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


# The same examples in every run, and no limit on how long one takes: other work may slow the machine.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory):
    """Folder of real shards: Wikipedia articles as sentence pairs in rows of 32, with 256 word pieces."""
    folder = tmp_path_factory.mktemp("wikipedia")
    tokenizer, shards = str(folder / "tokenizer"), str(folder / "shards")
    split = ["--input", WIKIPEDIA, "--heldout_fraction", "0.01"]
    assert train_tokenizer.main([*split, "--kind", "wordpiece", "--vocab_size", "256", "--output", tokenizer]) == 0
    rows = ["--row_length", "32", "--shard_megabytes", "1.1"]  # several shards
    assert build_shards.main([*split, *rows, "--tokenizer", tokenizer, "--output", shards]) == 0
    return folder / "shards"


@pytest.fixture(scope="session")
def causal_shards(tmp_path_factory):
    """The same articles as causal rows of 128, with 512 pieces of SentencePiece."""
    folder = tmp_path_factory.mktemp("causal")
    tokenizer, shards = str(folder / "tokenizer"), str(folder / "shards")
    split = ["--input", WIKIPEDIA, "--heldout_fraction", "0.05"]
    kind = ["--kind", "sentencepiece", "--template", "causal", "--vocab_size", "512", "--sample_fraction", "0.3"]
    assert train_tokenizer.main([*split, *kind, "--output", tokenizer]) == 0
    rows = ["--layout", "causal", "--row_length", "128"]
    assert build_shards.main([*split, *rows, "--tokenizer", tokenizer, "--output", shards]) == 0
    return folder / "shards"


@pytest.fixture(scope="session")
def runs(tiny_shards, causal_shards, tmp_path_factory):
    """Folder of the runs that tests.distributed.runs describes. Treat them as finished: others read them."""
    folder = tmp_path_factory.mktemp("runs")
    train_runs(tiny_shards, causal_shards, folder)
    return folder


@pytest.fixture(scope="session")
def loopback(tmp_path_factory):
    """A real sshd of the tests' own."""
    with ssh_server(tmp_path_factory.mktemp("ssh")) as hosts:
        yield hosts


@pytest.fixture
def hosts(loopback):
    """Two hosts; what a test leaves running on them is killed."""
    yield loopback
    loopback.kill_processes()


@pytest.fixture(scope="session")
def prose():
    """prose(num_documents, seed=0): texts of invented sentences, three to twelve each, all different."""

    def make(num_documents, seed=0):
        random = Random(seed)
        nouns = ["house", "river", "stone", "garden", "winter", "letter", "train", "mountain", "window", "teacher"]
        verbs = ["sees", "holds", "crosses", "follows", "remembers", "paints", "forgets", "carries", "measures"]
        adjectives = ["old", "green", "quiet", "Roman", "heavy", "small", "distant", "golden", "northern"]

        def sentence():
            adjective, noun, verb = (random.choice(words) for words in (adjectives, nouns, verbs))
            return f"The {adjective} {noun} {verb} number {random.randrange(1000)} of the {random.choice(nouns)}."

        return [" ".join(sentence() for _ in range(random.randint(3, 12))) for _ in range(num_documents)]

    return make


@pytest.fixture
def pair_rows():
    """pair_rows(num_rows, row_length): sentence pairs as a shard holds them, ids below 1000, 0 to 4 special."""

    def make(num_rows, row_length, seed=0):
        rng = np.random.default_rng(seed)
        length = rng.integers(max(5, row_length // 2), row_length + 1, num_rows)
        first_length = rng.integers(3, length - 1)
        ids = rng.integers(5, 1000, (num_rows, row_length))
        position = np.arange(row_length)
        ids[:, 0] = 2
        ids[position == first_length[:, None] - 1] = 3
        ids[position == length[:, None] - 1] = 3
        ids[position >= length[:, None]] = 0
        return {
            "ids": ids.astype(np.uint16),
            "length": length.astype(np.uint16),
            "first_length": first_length.astype(np.uint16),
            "next_sentence_label": rng.integers(0, 2, num_rows).astype(np.uint8),
        }

    return make
