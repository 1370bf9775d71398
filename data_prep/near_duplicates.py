"""Near-duplicates: MinHash signatures of texts, and bands of them as 64-bit keys.

Two texts whose runs of words have the Jaccard similarity s share a key with probability 1 - (1 - s^r)^b, where b is
the number of bands and r that of values in each (Broder, "On the resemblance and containment of documents", 1997;
Leskovec, Rajaraman and Ullman, "Mining of massive datasets", chapter 3). With the defaults, 14 bands of 8, that is 92 %
at s = 0.8 and 2 % at s = 0.45.
"""

from dataclasses import dataclass

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from data_prep.ngrams import MULTIPLIER, hash_ngrams, hash_words, words_of

SHINGLES_AT_ONCE = 1024  # of a text, for which all hash functions are computed together


@dataclass(frozen=True)
class NearDuplicateSettings:
    """What counts as a near-duplicate."""

    bands: PositiveInt = 14
    """Keys of a text: more of them find texts that are less alike."""

    values_per_band: PositiveInt = 8
    """MinHash values in a key: more of them demand texts that are more alike."""

    ngram_words: PositiveInt = 5
    """Words of the runs that are compared; a shorter text is one run."""

    seed: NonNegativeInt = 0
    """Of the hash functions."""


class BandKeys:
    """The keys of texts by these settings; texts that share one are near-duplicates."""

    def __init__(self, settings: NearDuplicateSettings) -> None:
        self.settings = settings
        generator = np.random.Generator(np.random.PCG64(settings.seed))
        shape = (settings.bands * settings.values_per_band, 1)
        self._factors = generator.integers(2**64, size=shape, dtype=np.uint64) | np.uint64(1)
        self._addends = generator.integers(2**64, size=shape, dtype=np.uint64)

    def signature(self, text: str) -> np.ndarray:
        """MinHash values, uint64 [bands * values_per_band]; the share in which two agree estimates their similarity."""
        return self._least(hash_words(words_of(text)))

    def _least(self, words: np.ndarray) -> np.ndarray:
        shingles = np.unique(hash_ngrams(words, max(min(self.settings.ngram_words, len(words)), 1)))
        least = np.full(len(self._factors), np.iinfo(np.uint64).max)
        for start in range(0, len(shingles), SHINGLES_AT_ONCE):
            hashed = shingles[start : start + SHINGLES_AT_ONCE] * self._factors
            hashed += self._addends
            np.minimum(least, hashed.min(axis=1), out=least)
        return least

    def keys(self, text: str) -> np.ndarray:
        """One key for each band, uint64 [bands], different between bands; none, [0], for a text without words."""
        words = hash_words(words_of(text))
        if not len(words):
            return words
        values = self._least(words).reshape(self.settings.bands, -1)
        keys = np.arange(1, len(values) + 1, dtype=np.uint64) * MULTIPLIER
        for column in values.T:
            keys = _mix(keys ^ column)
        return keys


def _mix(words: np.ndarray) -> np.ndarray:
    """The bijection of 64 bits of splitmix64."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
