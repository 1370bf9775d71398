"""Documents with equal keys, found by all ranks together: the first in reading order stays, however many ranks.

keys    uint64 [3, n]: two halves of a 128-bit key and a document, sorted by them. A document may have several keys.
document    unit << 32 | number within its unit: reading order

Each rank brings the keys of some units as files. In every pass over a range of keys the ranks exchange them, so that
equal ones meet in one rank, which tells of all documents but the first; a pass takes as many keys as memory is given.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from data_prep.files import atomic_file
from data_prep.ranks import Ranks
from data_prep.sources import words_alone

NUMBER_BITS = 32
NUMBER_MASK = np.uint64((1 << NUMBER_BITS) - 1)
BYTES_PER_KEY = 256  # of a rank's memory: keys of 24 bytes read, sorted, sent, received and sorted again
KEYS_AT_ONCE = 1 << 30  # of one rank in one exchange: MPI counts values in 31 bits


def words_key(text: str) -> int:
    """128 bits by which documents are equal: xxh3 of a text's words, whatever their case and the space between them."""
    return xxhash.xxh3_128_intdigest(words_alone(text))


class UnitKeys:
    """The keys of a unit's documents as they are found, in 24 bytes each: of short texts a unit has millions."""

    def __init__(self, unit: int) -> None:
        self._unit = unit
        self._values = array("Q")

    def add(self, number: int, keys: Iterable[int]) -> None:
        """Keys of 128 bits of the document with this number within the unit. ValueError for one of 2**32 or more."""
        if number > NUMBER_MASK:
            raise ValueError(
                f"unit {self._unit} holds more than {NUMBER_MASK:,} documents: set a smaller unit_megabytes"
            )
        document = self._unit << NUMBER_BITS | number
        for key in keys:
            self._values.extend((key >> 64, key & (1 << 64) - 1, document))

    def sorted(self) -> np.ndarray:
        """All of them, as files of keys have them: uint64 [3, n]."""
        return _sorted(np.frombuffer(self._values, np.uint64).reshape(-1, 3).T)


def save_array(path: Path, values: np.ndarray) -> None:
    """Write an array as .npy, whole or not at all."""
    with atomic_file(path) as file:
        np.lib.format.write_array(file, values, version=(1, 0), allow_pickle=False)


def load_array(path: Path) -> np.ndarray:
    """What `save_array` wrote, without reading it yet."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def find_repeats(
    ranks: Ranks, key_files: Mapping[int, Path], readers: Sequence[int], memory: int
) -> dict[int, np.ndarray]:
    """Numbers (uint64, sorted) of the documents that have a key of an earlier one, by unit. Collective.

    Args:
        key_files: files of keys, by the units that this rank reads; the result speaks of the same units
        readers: for every unit of the job the rank that reads it
        memory: bytes that a rank may take for keys in a pass; documents found cost 8 bytes each beside them
    """
    sizes = {unit: load_array(path).shape[1] for unit, path in key_files.items()}
    capacity = max(1, min(memory // BYTES_PER_KEY, KEYS_AT_ONCE))
    owned = ranks.gather(sum(sizes.values()), int)
    passes = ranks.share(lambda: -(-max(max(owned), -(-sum(owned) // ranks.size)) // capacity) or 1, int)
    found: dict[int, list[np.ndarray]] = {unit: [np.empty(0, np.uint64)] for unit in key_files}
    for number in range(passes):
        keys, repeats = _keys_of_pass(key_files.values(), number, passes, capacity)
        edges = [_edge(number * ranks.size + rank, passes * ranks.size) for rank in range(1, ranks.size)]
        parts = np.split(keys, np.searchsorted(keys[0], edges), axis=1)
        received = ranks.exchange([part.ravel() for part in parts])
        met = np.concatenate([part.reshape(3, -1) for part in received], axis=1)
        repeats.append(_without_repeats(met)[1])
        for documents in _returned(ranks, np.concatenate(repeats), readers):
            for unit, group in _by_unit(documents):
                found[unit].append(group & NUMBER_MASK)
    return {unit: np.unique(np.concatenate(numbers)) for unit, numbers in found.items()}


def _edge(slot: int, slots: int) -> np.uint64:
    """The first key of one of equal ranges of keys, by their upper half."""
    return np.uint64(-(-(slot << 64) // slots))


def _keys_of_pass(
    files: Iterable[Path], number: int, passes: int, capacity: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """This rank's keys in the range of a pass, each once and sorted, and the documents that were left out for it."""
    kept, repeats = np.empty((3, 0), np.uint64), []
    pieces: list[np.ndarray] = []
    waiting = 0
    for piece in _slices(files, number, passes):
        pieces.append(piece)
        waiting += piece.shape[1]
        if waiting > capacity:  # many may be equal
            kept, later = _without_repeats(np.concatenate([kept, *pieces], axis=1))
            repeats.append(later)
            pieces, waiting = [], 0
    kept, later = _without_repeats(np.concatenate([kept, *pieces], axis=1))
    return kept, [*repeats, later]


def _slices(files: Iterable[Path], number: int, passes: int) -> Iterator[np.ndarray]:
    for path in files:
        keys = load_array(path)
        start = np.searchsorted(keys[0], _edge(number, passes))
        stop = keys.shape[1] if number + 1 == passes else np.searchsorted(keys[0], _edge(number + 1, passes))
        yield np.array(keys[:, start:stop])


def _sorted(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys[:, np.lexsort(keys[::-1])])


def _without_repeats(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys, each with its first document alone, and the other documents (uint64)."""
    keys = _sorted(keys)
    is_repeat = np.zeros(keys.shape[1], bool)
    is_repeat[1:] = (keys[:2, 1:] == keys[:2, :-1]).all(axis=0)
    return np.ascontiguousarray(keys[:, ~is_repeat]), keys[2, is_repeat]


def _returned(ranks: Ranks, documents: np.ndarray, readers: Sequence[int]) -> list[np.ndarray]:
    """Documents, each sent to the rank that reads its unit."""
    owners = np.asarray(readers)[(documents >> np.uint64(NUMBER_BITS)).astype(np.int64)]
    return ranks.exchange([documents[owners == rank] for rank in range(ranks.size)])


def _by_unit(documents: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    if not len(documents):
        return
    documents = np.sort(documents)
    units, starts = np.unique(documents >> np.uint64(NUMBER_BITS), return_index=True)
    yield from zip(units.tolist(), np.split(documents, starts[1:]), strict=True)
