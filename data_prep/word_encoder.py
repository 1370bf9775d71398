"""Token ids of texts word by word, by tokenizers to which words are independent: each is encoded once, then known.

Texts are cut where no token of the tokenizer goes across, and what it makes of one side does not depend on the other:

WordPiece as BERT has it    at every space: it normalizes by characters, and looks for pieces between white space and
                            punctuation
byte-level BPE              before every space that something follows: there a match of its regular expression ends,
                            and it merges within matches
Unigram                     before every space: its pieces have the sign for one at their beginning alone, so that the
                            best segmentation is the best one of every word
"""

import re
from array import array
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
_BEFORE_WORDS = re.compile(r"(?= \S)")
_PUNCTUATION = r"[!-/:-@[-`{-~]"  # of ASCII: a word of its own to BERT, each of them


@dataclass(frozen=True)
class WordRules:
    """What a kind of tokenizer lets one do with words.

    Attributes:
        state: the tokenizer of single words, and of many in one text
        plain: words that can be encoded in one text, with `joint` between them: they begin with a token of `begins`,
            and have no other one of them
        joint: a space, or nothing
        begins: bool [vocab_size]
        cut: where texts are cut into words; None: at every space, which then is in no word
        lead: what words so cut have before them, when they are encoded: a space, or nothing
        leads_texts: whether the first word of a text has it as well
        parts: where words can be cut once more, if they can
    """

    state: dict[str, Any]
    plain: re.Pattern[str]
    joint: str
    begins: np.ndarray
    cut: re.Pattern[str] | None = None
    lead: str = ""
    leads_texts: bool = True
    parts: re.Pattern[str] | None = None


class WordEncoder:
    """A function from texts to their ids."""

    def __init__(self, encode: Callable[[Sequence[str]], list[list[int]]], rules: WordRules) -> None:
        """`encode` gives the ids of texts by the tokenizer `rules.state`."""
        self._encode = encode
        self._rules = rules
        self._ids: dict[str, bytes] = {}  # uint32: numbers of Python would be all over the memory

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        if len(self._ids) > MOST_WORDS:
            self._ids.clear()
        words = [self._words_of(text) if text else [] for text in texts]
        new = set(chain.from_iterable(words)).difference(self._ids)
        learned = self._learn(new)
        found = [b"".join(map(self._ids.__getitem__, each)) for each in words]
        for word in learned:
            if len(word) > LONGEST_WORD:
                del self._ids[word]
        return [np.frombuffer(each, np.uint32).tolist() for each in found]

    def _words_of(self, text: str) -> list[str]:
        """The words of a text. One that stands where others have their lead, and has none, ends with a space."""
        if self._rules.cut:
            return self._rules.cut.split(text)
        words = text.split(" ")
        if not self._rules.leads_texts:
            words[0] += " "
        return words

    def _learn(self, words: set[str]) -> set[str]:
        """Encode new words. Returns all that is known since: them, and parts of them."""
        if self._rules.parts is None:
            self._ids.update(self._encoded(words))
            return words
        parts = {word: self._rules.parts.split(word) for word in words}
        new = set(chain.from_iterable(parts.values())).difference(self._ids)
        self._ids.update(self._encoded(new))
        for word, each in parts.items():
            self._ids[word] = b"".join(map(self._ids.__getitem__, each))
        return words | new

    def _encoded(self, words: set[str]) -> dict[str, bytes]:
        """Ids of words. A text for each would take three times as long as one text of many."""
        spelled = {word: self._spelled(word) for word in words}
        plain = {word: text for word, text in spelled.items() if self._rules.plain.fullmatch(text)}
        ids = self._encode([self._rules.joint.join(plain.values())])[0]
        starts = np.flatnonzero(self._rules.begins[ids]).tolist() if ids else []
        if len(starts) != len(plain):  # a vocabulary in which a letter or the space is missing
            plain, starts = {}, []
        packed, stops = array("I", ids).tobytes(), [*starts[1:], len(ids)]
        found = {word: packed[4 * i : 4 * j] for word, i, j in zip(plain, starts, stops, strict=False)}
        rest = list(words.difference(found))
        encoded = (array("I", each).tobytes() for each in self._encode([spelled[word] for word in rest]))
        found.update(zip(rest, encoded, strict=True))
        return found

    def _spelled(self, word: str) -> str:
        if not self._rules.lead:
            return word
        return word[:-1] if word.endswith(" ") else self._rules.lead + word


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
    return WordRules(state, re.compile("[A-Za-z0-9]+"), " ", begins, parts=parts)


def _byte_level_rules(state: dict[str, Any]) -> WordRules | None:
    splitting = state["pre_tokenizer"] or {}
    is_gpts = splitting.get("type") == "ByteLevel" and splitting["use_regex"] and not splitting["add_prefix_space"]
    if not is_gpts or _normalizers(state) not in ([], ["Lowercase"]) or state["model"]["dropout"]:
        return None
    begins = _beginning_with("Ġ", state["model"]["vocab"])  # the space among the signs for bytes
    return WordRules(state, re.compile(r" \S+"), "", begins, cut=_BEFORE_WORDS)


def _unigram_rules(state: dict[str, Any]) -> WordRules | None:
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = _steps(state)
    others = [step for step in steps if step not in (prepend, replace)]
    if state["pre_tokenizer"] or replace not in steps[-1:] or others not in ([], [{"type": "Lowercase"}]):
        return None
    pieces = [piece for piece, _ in state["model"]["vocab"]]
    # A space that is no piece would be unknown together with what stands before it.
    if SPACE not in pieces or any(SPACE in piece[1:] for piece in pieces):
        return None
    # The words of one text apart: far on in a text sums are rounded, and of several segmentations that are equally
    # good, as of 00000, another may be found than at the beginning.
    apart = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": True}
    by_words = {**state, "normalizer": others[0] if others else None, "pre_tokenizer": apart}
    begins = _beginning_with(SPACE, {piece: number for number, piece in enumerate(pieces)})
    return WordRules(by_words, re.compile(f" [^ {SPACE}]*"), "", begins, lead=" ", leads_texts=prepend in steps)


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
