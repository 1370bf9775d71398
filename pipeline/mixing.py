"""Random numbers as a pure function of what they belong to, the same on every rank, worker and machine.

The number that belongs to (seed, epoch, sample id, ...) is computed from these words alone, so that no generator has to
be carried, saved or fast-forwarded. The step is that of splitmix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", 2014).
"""

from enum import IntEnum

import numpy as np

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
MASK_64 = (1 << 64) - 1


class Choice(IntEnum):
    """What a number decides: the word that keeps one choice's numbers apart from another's."""

    RUN_ORDER = 0
    TAIL_PLACE = 1
    WINDOW_ORDER = 2
    MASKED_POSITIONS = 3
    MASK_ACTION = 4
    MASK_REPLACEMENT = 5
    WEIGHTS = 6
    DROPOUT = 7
    MIXTURE_PLACE = 8
    SOURCE_ORDER = 9
    PHASE_ORDER = 10


def mix(*words: int | np.ndarray) -> np.ndarray:
    """A uint64 array of uniform bits for the sequence of `words`, which are broadcast against each other.

    Words are integers of any sign (taken modulo 2**64). For fixed other words the result is a bijection of the last
    one: no two values of it give the same number. Words that vary most go last: work on the earlier ones is shared.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            state = _finalize((state ^ as_uint64(word)) + GOLDEN_GAMMA)
    return state


def as_uint64(word: int | np.ndarray) -> np.ndarray:
    """`word` modulo 2**64 as a uint64 array."""
    if isinstance(word, int):
        return np.array(word & MASK_64, np.uint64)
    return np.asarray(word).astype(np.uint64, copy=False)


def _finalize(state: np.ndarray) -> np.ndarray:
    """The bijection of 64 bits at the end of splitmix64: every bit of the input moves every bit of the output."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
