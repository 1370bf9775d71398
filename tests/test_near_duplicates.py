"""MinHash signatures against Jaccard similarities by plain sets, and what goes."""

from itertools import combinations
from random import Random

import numpy as np
import pytest

from data_prep.duplicates import UnitKeys, find_repeats, save_array
from data_prep.near_duplicates import BandKeys, NearDuplicateSettings
from data_prep.ngrams import words_of
from data_prep.ranks import Ranks


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


def test_of_near_duplicates_the_first_stays(texts, tmp_path):
    keys = BandKeys(NearDuplicateSettings())
    found = UnitKeys(0)
    for number, text in enumerate(texts):
        found.add(number, [int(key) << 64 for key in keys.keys(text)])
    save_array(tmp_path / "keys.npy", found.sorted())
    gone = set(find_repeats(Ranks(), {0: tmp_path / "keys.npy"}, [0], 1 << 20)[0].tolist())
    similar = {place for place in range(12, 48) if jaccard(texts[(place - 12) // 3], texts[place]) > 0.9}
    other = {place for place in range(12, 48) if jaccard(texts[(place - 12) // 3], texts[place]) < 0.4}
    assert len(similar) > 5 and len(other) > 5
    assert similar <= gone and not other & gone and min(gone) >= 12
