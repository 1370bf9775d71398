"""Runs of words as 64-bit hashes, computed with numpy: what decontamination and near-duplicates compare texts by."""

import re

import numpy as np
import xxhash

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a word's hash is lost
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """The words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def hash_words(words: list[str]) -> np.ndarray:
    """xxh3 of each word, uint64 [words]."""
    hashes = {word: xxhash.xxh3_64_intdigest(word.encode()) for word in set(words)}
    return np.fromiter(map(hashes.__getitem__, words), np.uint64, len(words))


def hash_ngrams(word_hashes: np.ndarray, size: int) -> np.ndarray:
    """A hash of each run of `size` words, uint64 [max(words - size + 1, 0)]: a polynomial of the words' own."""
    count = max(len(word_hashes) - size + 1, 0)
    total = np.zeros(count, np.uint64)
    for offset in range(size):
        total *= MULTIPLIER
        total += word_hashes[offset : offset + count]
    return total
