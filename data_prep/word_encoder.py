"""Token ids of texts word by word, by tokenizers to which words are independent: each is encoded once, then known.

A word goes from a space that something follows to before the next such space. For each kind of tokenizer here no token
spans such a place, and what it makes of one side does not depend on the other:

WordPiece as BERT has it    normalizes by characters, and looks for pieces between white space and punctuation
byte-level BPE              its regular expression ends a match at every such place, and merges within matches
Unigram                     its pieces have the sign for a space at their beginning alone, so that the best segmentation
                            is the best one of every word
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

MOST_WORDS = 1 << 19
"""Words that are known, of some 250 bytes each; where there are more, all are forgotten and frequent ones return."""

LONGEST_WORD = 64
"""Characters of a word that is worth knowing: text without spaces is one word, which does not come again."""

SPACE = "▁"  # SentencePiece's sign for it
_CUT = re.compile(r"(?= \S)")
_PUNCTUATION = r"[!-/:-@[-`{-~]"  # of ASCII: a word of its own to BERT, each of them


@dataclass(frozen=True)
class WordRules:
    """What a kind of tokenizer lets one do with words.

    Attributes:
        state: the tokenizer without what it puts before a text
        prefix: what it puts before a text that is not empty
        parts: where words can be cut once more, if they can
        plain: words that can be encoded in one text, with `joint` between them: they begin with a token of `begins`,
            and have no other one of them. None for Unigram: far on in a text its sums are rounded, and of several
            segmentations that are equally good, as of 00000, it may find another than at the beginning.
        begins: bool [vocab_size]
    """

    state: dict[str, Any]
    prefix: str
    parts: re.Pattern[str] | None
    plain: re.Pattern[str] | None = None
    joint: str = ""
    begins: np.ndarray | None = None


class WordEncoder:
    """A function from texts to their ids."""

    def __init__(self, encode: Callable[[Sequence[str]], list[list[int]]], rules: WordRules) -> None:
        """`encode` gives the ids of texts by the tokenizer `rules.state`."""
        self._encode = encode
        self._rules = rules
        self._ids: dict[str, Sequence[int]] = {}

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        if len(self._ids) > MOST_WORDS:
            self._ids.clear()
        prefix = self._rules.prefix
        words = [_CUT.split(prefix + text) if text else [] for text in texts]
        new = set(chain.from_iterable(words)).difference(self._ids)
        self._learn(new)
        found = [list(chain.from_iterable(map(self._ids.__getitem__, each))) for each in words]
        for word in new:
            if len(word) > LONGEST_WORD:
                del self._ids[word]
        return found

    def _learn(self, words: set[str]) -> None:
        if self._rules.parts is None:
            self._ids.update(self._encoded(words))
            return
        parts = {word: self._rules.parts.split(word) for word in words}
        self._ids.update(self._encoded(set(chain.from_iterable(parts.values())).difference(self._ids)))
        for word, each in parts.items():
            self._ids[word] = list(chain.from_iterable(map(self._ids.__getitem__, each)))

    def _encoded(self, words: set[str]) -> dict[str, Sequence[int]]:
        """Ids of words. A text for each would take three times as long as one text of many."""
        plain = [word for word in words if self._rules.plain and self._rules.plain.fullmatch(word)]
        ids = self._encode([self._rules.joint.join(plain)])[0]
        starts = np.flatnonzero(self._rules.begins[ids]).tolist() if ids else []
        if len(starts) != len(plain):  # a vocabulary in which a letter or the space is missing
            plain, starts = [], []
        found: dict[str, Sequence[int]] = {
            word: ids[start:stop] for word, start, stop in zip(plain, starts, [*starts[1:], len(ids)], strict=False)
        }
        rest = list(words.difference(found))
        found.update(zip(rest, self._encode(rest), strict=True))
        return found


def word_rules(state: dict[str, Any]) -> WordRules | None:
    """The rules for a tokenizer with this state, as `tokenizers` writes it; None where words may depend on others."""
    if not all(token["special"] for token in state["added_tokens"]):  # which may stand across words
        return None
    rules = {"WordPiece": _berts_rules, "BPE": _byte_level_rules, "Unigram": _unigram_rules}
    return rules.get(state["model"]["type"], lambda state: None)(state)


def _berts_rules(state: dict[str, Any]) -> WordRules | None:
    if state["pre_tokenizer"] != {"type": "BertPreTokenizer"} or _normalizers(state) not in ([], ["BertNormalizer"]):
        return None
    begins = ~_beginning_with(state["model"]["continuing_subword_prefix"], state["model"]["vocab"])
    parts = re.compile(f"(?<={_PUNCTUATION})|(?={_PUNCTUATION})")
    return WordRules(state, "", parts, re.compile(" ?[A-Za-z0-9]+"), " ", begins)


def _byte_level_rules(state: dict[str, Any]) -> WordRules | None:
    splitting = state["pre_tokenizer"] or {}
    is_gpts = splitting.get("type") == "ByteLevel" and splitting["use_regex"] and not splitting["add_prefix_space"]
    if not is_gpts or _normalizers(state) not in ([], ["Lowercase"]) or state["model"]["dropout"]:
        return None
    begins = _beginning_with("Ġ", state["model"]["vocab"])  # the space among the signs for bytes
    return WordRules(state, "", None, re.compile(r" \S+"), "", begins)


def _unigram_rules(state: dict[str, Any]) -> WordRules | None:
    prepend = {"type": "Prepend", "prepend": SPACE}
    steps = _steps(state)
    prefix = " " if prepend in steps else ""
    state = {**state, "normalizer": {"type": "Sequence", "normalizers": [step for step in steps if step != prepend]}}
    names, replaced = _normalizers(state), {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if state["pre_tokenizer"] or names not in (["Replace"], ["Lowercase", "Replace"]) or steps[-1] != replaced:
        return None
    pieces = [piece for piece, _ in state["model"]["vocab"]]
    # A space that is no piece would be unknown together with what stands before it.
    if SPACE not in pieces or any(SPACE in piece[1:] for piece in pieces):
        return None
    return WordRules(state, prefix, None)


def _beginning_with(mark: str, vocabulary: dict[str, int]) -> np.ndarray:
    """Which token ids begin with `mark`: bool [vocab_size]."""
    begins = np.zeros(max(vocabulary.values(), default=-1) + 1, bool)
    begins[[number for piece, number in vocabulary.items() if piece.startswith(mark)]] = True
    return begins


def _normalizers(state: dict[str, Any]) -> list[str]:
    return [step["type"] for step in _steps(state)]


def _steps(state: dict[str, Any]) -> list[dict[str, Any]]:
    normalizer = state["normalizer"]
    if normalizer is None:
        return []
    return normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
