"""MinHash signatures against Jaccard similarities by plain sets, groups of duplicates against a plain union-find."""

from itertools import combinations
from random import Random

import numpy as np
import pytest

from data_prep.near_duplicates import BandKeys, NearDuplicateSettings, dropped, links
from data_prep.ngrams import words_of


def jaccard(one, other, size=5):
    sets = []
    for text in (one, other):
        tokens = words_of(text)
        size = min(size, len(tokens))
        sets.append({tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def variant(text, random, share):
    """The text with this share of its words replaced."""
    return " ".join(f"new{random.random()}" if random.random() < share else word for word in text.split())


@pytest.fixture(scope="module")
def texts(prose):
    random = Random(3)
    originals = [" ".join(prose(4, seed=seed)) for seed in range(12)]
    return [*originals, *(variant(text, random, share) for text in originals for share in (0.005, 0.02, 0.1))]


def test_signatures_estimate_the_similarity(texts):
    keys = BandKeys(NearDuplicateSettings(bands=64, values_per_band=16))
    signatures = [keys.signature(text) for text in texts]
    errors = [
        np.mean(signatures[one] == signatures[other]) - jaccard(texts[one], texts[other])
        for one, other in combinations(range(len(texts)), 2)
    ]
    assert max(map(abs, errors)) < 5 * (0.25 / 1024) ** 0.5  # five standard deviations at their widest
    assert abs(np.mean(errors)) < 0.005


def test_the_share_of_pairs_that_are_found_is_as_stated(texts):
    settings = NearDuplicateSettings(bands=5, values_per_band=3)
    pairs = [(texts[number], texts[12 + 3 * number + place]) for number in range(12) for place in range(3)]
    expected = [1 - (1 - jaccard(*pair) ** 3) ** 5 for pair in pairs]
    found = 0
    for seed in range(40):
        keys = BandKeys(NearDuplicateSettings(bands=5, values_per_band=3, seed=seed))
        found += sum(bool(np.any(keys.keys(one) == keys.keys(other))) for one, other in pairs)
    assert len(BandKeys(settings).keys(texts[0])) == 5
    assert abs(found / 40 - sum(expected)) < 2


def test_keys_depend_on_words_alone_and_on_the_seed(texts):
    keys = BandKeys(NearDuplicateSettings())
    assert keys.keys(texts[0]).tolist() == keys.keys(texts[0].upper().replace(" ", ",\n")).tolist()
    assert len(set(keys.keys(texts[0]).tolist())) == 14
    assert not set(keys.keys(texts[0]).tolist()) & set(BandKeys(NearDuplicateSettings(seed=1)).keys(texts[0]).tolist())
    for text in ("", " … ", "?" * 5000):
        assert len(keys.keys(text)) == 0
    assert len(keys.keys("one")) == 14 and keys.keys("one").tolist() != keys.keys("two").tolist()
    assert keys.keys("a b c").tolist() == keys.keys("A, b: c!").tolist() != keys.keys("a b c d").tolist()


def test_a_text_longer_than_one_turn_has_the_same_signature(texts, monkeypatch):
    keys = BandKeys(NearDuplicateSettings())
    whole = keys.signature(" ".join(texts)).tolist()
    monkeypatch.setattr("data_prep.near_duplicates.SHINGLES_AT_ONCE", 7)
    assert keys.signature(" ".join(texts)).tolist() == whole


def reference(keys, documents):
    """What goes, by a plain union-find over all pairs."""
    parent = {document: document for document in documents}

    def root(document):
        while parent[document] != document:
            document = parent[document]
        return document

    for (key, document), (other_key, other) in combinations(zip(keys, documents, strict=True), 2):
        if key == other_key:
            low, high = sorted((root(document), root(other)))
            parent[high] = low
    return sorted(document for document in parent if root(document) != document)


@pytest.mark.parametrize("seed", range(12))
def test_groups_equal_a_plain_search_however_the_keys_are_divided(seed):
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 120))
    documents = random.integers(0, 60, count).astype(np.uint64) * np.uint64(2**58) // np.uint64(7)
    keys = random.integers(0, 3 + 8 * seed, count).astype(np.uint64) * np.uint64(2**63 // 100)
    expected = reference(keys.tolist(), documents.tolist())
    smallest = {key: min(documents[keys == key].tolist()) for key in keys.tolist()}
    pairs = {(document, smallest[key]) for key, document in zip(keys.tolist(), documents.tolist(), strict=True)}
    assert list(map(tuple, links(keys, documents).tolist())) == sorted(pair for pair in pairs if pair[0] != pair[1])
    assert dropped([links(keys, documents)]).tolist() == expected
    for ranks in (2, 3, 7):
        shuffled = random.permutation(count)
        parts = [shuffled[keys[shuffled] % np.uint64(ranks) == rank] for rank in range(ranks)]
        found = dropped([links(keys[part], documents[part]) for part in parts])
        assert found.tolist() == expected and found.dtype == np.uint64


def test_a_long_chain_is_one_group():
    documents = np.arange(5000, dtype=np.uint64)
    chain = np.stack([documents[1:], documents[:-1]], axis=1)
    np.random.default_rng(0).shuffle(chain)
    assert dropped([chain[:1000], chain[1000:]]).tolist() == list(range(1, 5000))


def test_nothing_links_nothing():
    nothing = np.zeros(0, np.uint64)
    assert links(nothing, nothing).shape == (0, 2)
    assert dropped([]).tolist() == dropped([links(nothing, nothing)]).tolist() == []


def test_of_near_duplicates_the_first_stays(texts):
    keys = BandKeys(NearDuplicateSettings())
    found = [keys.keys(text) for text in texts]
    numbers = np.repeat(np.arange(len(texts), dtype=np.uint64), 14)
    gone = dropped([links(np.concatenate(found), numbers)]).tolist()
    similar = [place for place in range(12, 48) if jaccard(texts[(place - 12) // 3], texts[place]) > 0.9]
    other = [place for place in range(12, 48) if jaccard(texts[(place - 12) // 3], texts[place]) < 0.4]
    assert len(similar) > 5 and len(other) > 5
    assert set(similar) <= set(gone) and not set(other) & set(gone) and min(gone) >= 12
