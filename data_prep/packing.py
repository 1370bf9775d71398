"""Token streams to fixed rows: pure functions of the documents and a seed, whichever process runs them."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from random import Random
from typing import NamedTuple, Protocol

import numpy as np

from data_prep.sentences import split_sentences

SPECIAL_TOKENS_PER_ROW = 3  # [CLS] A [SEP] B [SEP]


class TokenizedDocument(NamedTuple):
    """A document's tokens: `ids` uint32 [num_tokens], and where its sentences end, the last at num_tokens."""

    ids: np.ndarray
    sentence_ends: list[int]


class RowLayout(Protocol):
    """How rows look, and how documents become rows: PairLayout or CausalLayout."""

    row_length: int

    def pieces(self, text: str) -> list[str]:
        """The parts of a document that are tokenized one by one; none of an empty one."""
        ...

    def join(self, pieces: Sequence[Sequence[int]]) -> TokenizedDocument:
        """The document again, of the token ids of its pieces."""
        ...

    def pack(self, documents: Sequence[TokenizedDocument], seed: str) -> dict[str, np.ndarray]:
        """Rows: one array [n, ...] per field. Raises ValueError for a token id that the rows' type does not hold."""
        ...


@dataclass(frozen=True)
class CausalLayout:
    """How causal rows look: documents one after another, each from `begin_ids` to `end_id`, cut wherever a row is full.

    Attributes:
        row_length: positions
        begin_ids: what stands before a document's tokens: a begin of text, or nothing
        end_id, pad_id: token ids; padding stands at the end of the last row alone
        ids_dtype: "uint16", or "uint32" where the vocabulary needs it
    """

    row_length: int
    begin_ids: tuple[int, ...]
    end_id: int
    pad_id: int
    ids_dtype: str

    def pieces(self, text: str) -> list[str]:
        return [text] if text.strip() else []

    def join(self, pieces: Sequence[Sequence[int]]) -> TokenizedDocument:
        return join_sentences(pieces, max(1, sum(map(len, pieces))))

    def pack(self, documents: Sequence[TokenizedDocument], seed: str) -> dict[str, np.ndarray]:
        """ids [n, row_length] and length [n], tokens before the padding. Nothing is left to chance: no seed is used."""
        pool = [document for document in documents if len(document.ids)]
        _refuse_wide_ids(pool, self)
        begin, end = np.array(self.begin_ids, np.uint32), np.array([self.end_id], np.uint32)
        parts = chain.from_iterable((begin, document.ids, end) for document in pool)
        stream = np.concatenate([np.empty(0, np.uint32), *parts])
        rows = -(-len(stream) // self.row_length)
        ids = np.full(rows * self.row_length, self.pad_id, self.ids_dtype)
        ids[: len(stream)] = stream
        length = np.full(rows, self.row_length, np.uint16)
        if rows:
            length[-1] -= len(ids) - len(stream)
        return {"ids": ids.reshape(rows, self.row_length), "length": length}


@dataclass(frozen=True)
class PairLayout:
    """How rows of sentence pairs look: [CLS] A [SEP] B [SEP], then padding up to `row_length`.

    Attributes:
        row_length: positions, special tokens included
        cls_id, sep_id, pad_id: token ids
        ids_dtype: "uint16", or "uint32" where the vocabulary needs it
        random_next_probability: share of the rows whose B comes from another document
        short_row_probability: share of the rows that aim at fewer tokens, so that the model sees short inputs too
    """

    row_length: int
    cls_id: int
    sep_id: int
    pad_id: int
    ids_dtype: str
    random_next_probability: float = 0.5
    short_row_probability: float = 0.1

    @property
    def longest_pair(self) -> int:
        """Tokens of A and B together in a full row."""
        return self.row_length - SPECIAL_TOKENS_PER_ROW

    @property
    def longest_sentence(self) -> int:
        """Tokens; longer sentences count as several, so that every full row has a boundary to divide it at."""
        return self.longest_pair // 2

    def pieces(self, text: str) -> list[str]:
        return split_sentences(text)

    def join(self, pieces: Sequence[Sequence[int]]) -> TokenizedDocument:
        return join_sentences(pieces, self.longest_sentence)

    def pack(self, documents: Sequence[TokenizedDocument], seed: str) -> dict[str, np.ndarray]:
        return pack_sentence_pairs(documents, self, seed)


class SentencePair(NamedTuple):
    """A row before its special tokens: token ids of A and B, and 1 where B is random, 0 where it follows A."""

    first: np.ndarray
    second: np.ndarray
    next_sentence_label: int


def join_sentences(sentences: Sequence[Sequence[int]], longest_sentence: int) -> TokenizedDocument:
    """The token ids of a document's sentences in one piece; sentences over `longest_sentence` tokens in equal parts."""
    ids = np.fromiter(chain.from_iterable(sentences), np.uint32, sum(map(len, sentences)))
    lengths: list[int] = []
    for length in map(len, sentences):
        parts = -(-length // longest_sentence)
        lengths += [length // parts + (part < length % parts) for part in range(parts)]
    return TokenizedDocument(ids, list(accumulate(lengths)))


def pack_sentence_pairs(documents: Sequence[TokenizedDocument], layout: PairLayout, seed: str) -> dict[str, np.ndarray]:
    """Rows of sentence pairs as BERT has them, from a pool of documents that is also where random B segments come from.

    Every token of every document stands once in an A, or in a B that follows its A, in order: where B is random, the
    next row takes up behind A. Rows are filled, so that one may end within a sentence; then the next begins with the
    rest of it. A and B always meet where a sentence ends, unless too little is left; random segments come on top.

    Returns:
        Arrays of n rows: ids [n, row_length], length [n] (tokens before the padding), first_length [n] ([CLS] A [SEP]),
        next_sentence_label [n] (0: B follows A, 1: B is random, as transformers has it).

    Raises:
        ValueError: a token id that layout.ids_dtype does not hold.
    """
    random = Random(seed)
    pool = [document for document in documents if len(document.ids)]
    _refuse_wide_ids(pool, layout)
    pairs = [pair for number in range(len(pool)) for pair in _pairs_of(number, pool, layout, random)]
    ids = np.full((len(pairs), layout.row_length), layout.pad_id, layout.ids_dtype)
    for row, (first, second, _) in zip(ids, pairs, strict=True):
        middle, end = len(first) + 1, len(first) + len(second) + 2
        row[0], row[middle], row[end] = layout.cls_id, layout.sep_id, layout.sep_id
        row[1:middle] = first
        row[middle + 1 : end] = second
    first_length = np.array([len(pair.first) + 2 for pair in pairs], np.uint16)
    return {
        "ids": ids,
        "length": first_length + np.array([len(pair.second) + 1 for pair in pairs], np.uint16),
        "first_length": first_length,
        "next_sentence_label": np.array([pair.next_sentence_label for pair in pairs], np.uint8),
    }


def _refuse_wide_ids(pool: Sequence[TokenizedDocument], layout: PairLayout | CausalLayout) -> None:
    # numpy narrows arrays by wrapping, without a word.
    largest = max((int(document.ids.max()) for document in pool), default=0)
    if largest > np.iinfo(layout.ids_dtype).max:
        raise ValueError(
            f"token id {largest} does not fit {layout.ids_dtype}: the tokenizer gives ids beyond its vocabulary"
        )


def _pairs_of(
    number: int, pool: Sequence[TokenizedDocument], layout: PairLayout, random: Random
) -> Iterator[SentencePair]:
    ids, ends = pool[number]
    position = 0
    while position < len(ids):
        target = _target_length(layout, random)
        stop = min(position + target, len(ids))
        # Sentence ends strictly between position and stop: where A may end and B begin.
        low, high = bisect_right(ends, position), bisect_right(ends, stop - 1)
        if low < high and random.random() >= layout.random_next_probability:
            middle = ends[low + _below(high - low, random)]
            yield SentencePair(ids[position:middle], ids[middle:stop], 0)
            position = stop
        else:
            middle = ends[low + _below(high - low, random)] if low < high else min(stop, position + max(target // 2, 1))
            first = ids[position:middle]
            yield SentencePair(first, _random_segment(number, pool, target - len(first), random), 1)
            position = middle


def _target_length(layout: PairLayout, random: Random) -> int:
    """Tokens of A and B together that the next row aims at, at least one for each."""
    longest = layout.longest_pair
    if random.random() < layout.short_row_probability:
        return 2 + _below(longest - 1, random)
    return longest


def _random_segment(number: int, pool: Sequence[TokenizedDocument], length: int, random: Random) -> np.ndarray:
    """Up to `length` tokens from a sentence's start on, in another document; in this one where there is no other."""
    other = number if len(pool) == 1 else (number + 1 + _below(len(pool) - 1, random)) % len(pool)
    ids, ends = pool[other]
    sentence = _below(len(ends), random)
    start = ends[sentence - 1] if sentence else 0
    return ids[start : start + length]


def _below(count: int, random: Random) -> int:
    """A whole number in [0, count). Only Random.random() is promised to give the same numbers in every Python."""
    return int(random.random() * count)
