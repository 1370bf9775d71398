"""Duplicates among units, against a set, for ranks that are simulated in threads and for any memory."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import duplicates
from data_prep.duplicates import BYTES_PER_KEY, UnitKeys, find_repeats, load_array, save_array, words_key
from data_prep.ranks import Ranks


class ThreadRanks(Ranks):
    """Ranks that meet in one process, and the most keys that each had to hold in an exchange."""

    def __init__(self, rank, size, barrier, places):
        self.rank, self.size, self._barrier, self._places = rank, size, barrier, places
        self.most = 0

    def _all(self, value):
        self._places[self.rank] = value
        self._barrier.wait()
        values = list(self._places)
        self._barrier.wait()
        return values

    def share(self, make, kind):
        return self._all(make() if self.is_first else None)[0]

    def gather(self, value, kind):
        return self._all(value)

    def exchange(self, parts):
        received = [theirs[self.rank] for theirs in self._all(parts)]
        self.most = max(self.most, *(sum(map(len, each)) for each in (parts, received)))
        return received


def repeats_by_ranks(files, size, memory):
    """What `size` ranks find, units going round, and the most values of an exchange."""
    barrier, places, found = threading.Barrier(size), [None] * size, {}
    ranks = [ThreadRanks(rank, size, barrier, places) for rank in range(size)]
    readers = [unit % size for unit in range(len(files))]

    def work(each):
        mine = {unit: path for unit, path in enumerate(files) if readers[unit] == each.rank}
        found.update(find_repeats(each, mine, readers, memory))

    threads = [threading.Thread(target=work, args=(each,)) for each in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return {unit: numbers.tolist() for unit, numbers in sorted(found.items())}, max(each.most for each in ranks)


def repeats_by_set(units):
    """Documents, by unit, one of whose keys an earlier document has."""
    seen, repeats = set(), {unit: [] for unit in range(len(units))}
    for unit, documents in enumerate(units):
        for number, keys in enumerate(documents):
            if seen & keys:
                repeats[unit].append(number)
            seen |= keys
    return repeats


def write_keys(folder, units):
    files = []
    for unit, documents in enumerate(units):
        files.append(folder / f"keys-{unit}.npy")
        found = UnitKeys(unit)
        for number, keys in enumerate(documents):
            found.add(number, keys)
        save_array(files[-1], found.sorted())
    return files


# Few keys, so that there are many equal ones; some alike in one of their halves, some at the ends of the range.
few = [0, 1, 2**64, 2**64 + 1, 2**127, 2**128 - 2, 2**128 - 1, *(words_key(str(number)) for number in range(9))]
some_units = st.lists(st.lists(st.sets(st.sampled_from(few), max_size=2), max_size=9), min_size=1, max_size=5)


@settings(max_examples=40)
@given(units=some_units, size=st.integers(1, 4), memory=st.sampled_from([1, 3 * BYTES_PER_KEY, 1 << 30]))
def test_later_documents_with_a_key_of_an_earlier_one_are_found(tmp_path_factory, units, size, memory):
    files = write_keys(tmp_path_factory.mktemp("keys"), units)
    assert repeats_by_ranks(files, size, memory)[0] == repeats_by_set(units)


@pytest.mark.parametrize("size", [1, 3])
def test_no_exchange_takes_more_than_the_memory_allows(tmp_path, size):
    rng = np.random.default_rng(0)
    units = [[{words_key(str(number))} for number in rng.integers(0, 2000, 1000)] for _ in range(6)]
    files = write_keys(tmp_path, units)
    expected = repeats_by_set(units)
    assert sum(map(len, expected.values())) > 3000
    most = {}
    for keys in (100, 300, 10_000):
        found, most[keys] = repeats_by_ranks(files, size, keys * BYTES_PER_KEY)
        assert found == expected
    assert most[100] < 3 * 100 * 1.4 and most[300] < 3 * 300 * 1.3  # a key is three values; chance makes ranges uneven
    assert most[10_000] > 3 * 1000


def test_a_document_that_is_everywhere_needs_no_more_memory(tmp_path):
    units = [[{words_key("again")}] * 5000 for _ in range(4)]
    found, most = repeats_by_ranks(write_keys(tmp_path, units), 2, 100 * BYTES_PER_KEY)
    assert found == {0: list(range(1, 5000)), **{unit: list(range(5000)) for unit in (1, 2, 3)}}
    assert most <= 20_000  # the documents found, which are told to those who read them


def test_documents_are_equal_by_their_words():
    assert words_key("Some  words.\n") == words_key(" some WORDS. ")
    assert words_key("some words") != words_key("some word s")
    assert words_key("a").bit_length() > 64


def test_a_unit_of_too_many_documents_is_refused(monkeypatch):
    monkeypatch.setattr(duplicates, "NUMBER_MASK", np.uint64(3))
    keys = UnitKeys(1)
    keys.add(3, [5])
    assert keys.sorted().tolist() == [[0], [5], [(1 << 32) + 3]]
    with pytest.raises(ValueError, match="unit 1 holds more than 3 documents: set a smaller unit_megabytes"):
        keys.add(4, [5])


def test_keys_come_back(tmp_path):
    keys = UnitKeys(7)
    keys.add(0, [2**64 + 5, 3])
    keys.add(1, [3])
    save_array(tmp_path / "keys.npy", keys.sorted())
    assert load_array(tmp_path / "keys.npy").tolist() == [[0, 0, 1], [3, 3, 5], [7 << 32, (7 << 32) + 1, 7 << 32]]
