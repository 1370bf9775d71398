"""Steps between reading a document and tokenising it: normalisation, rules of quality, decontamination; all pure.

The rules of quality are those of Gopher (Rae et al., 2021, https://arxiv.org/abs/2112.11446, appendix A.1.1), with its
thresholds, and one of C4 (Raffel et al., 2020, https://arxiv.org/abs/1910.10683).
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from data_prep.ngrams import MULTIPLIER, hash_ngrams, hash_words, words_of
from data_prep.origin import InputName
from data_prep.recipes import Share
from data_prep.sources import plan_units, read_unit

LARGEST_TABLE = 1 << 28  # bytes

# Settings


@dataclass(frozen=True)
class QualityRules:
    """Rules of quality: a document that breaks one is left out, and counted by the name of the rule."""

    min_words: NonNegativeInt = 50
    """Fewest words between white space."""

    max_words: PositiveInt = 100_000
    """Most words."""

    min_mean_word_length: Annotated[float, Field(ge=0)] = 3.0
    """Least mean length of a word in characters."""

    max_mean_word_length: PositiveFloat = 10.0
    """Greatest mean length of a word."""

    max_symbol_share: Share = 0.1
    """Greatest number of # signs, and of ellipses, for each word."""

    max_bullet_line_share: Share = 0.9
    """Greatest share of lines that begin with a bullet."""

    max_ellipsis_line_share: Share = 0.3
    """Greatest share of lines that end with an ellipsis."""

    min_alphabetic_share: Share = 0.8
    """Least share of words with a letter in them."""

    min_stop_words: NonNegativeInt = 2
    """Fewest different English stop words (the, be, to, of, and, that, have, with); 0 for other languages."""

    max_duplicate_line_share: Share = 0.3
    """Greatest share of lines, and of paragraphs, that stood before in the document."""

    max_duplicate_line_characters: Share = 0.2
    """Greatest share of characters in such lines, and in such paragraphs."""

    max_top_ngram_characters: tuple[Share, Share, Share] = (0.20, 0.18, 0.16)
    """Greatest share of characters in the most frequent run of 2, 3 and 4 words."""

    max_duplicate_ngram_characters: tuple[Share, Share, Share, Share, Share, Share] = (
        *(0.15, 0.14, 0.13),
        *(0.12, 0.11, 0.10),
    )
    """Greatest share of characters in runs of 5, 6, 7, 8, 9 and 10 words that stood before in the document."""

    allow_lorem_ipsum: bool = False
    """Keep documents with the words "lorem ipsum", as C4 does not."""


@dataclass(frozen=True)
class StepSettings:
    """Steps between reading a document and tokenising it, in this order; none is taken unless asked for."""

    mend_mojibake: bool = False
    """Read lines again as UTF-8 that were taken for Windows-1252, where all of the line allows it."""

    normalize: bool = False
    """Compose characters (NFC), remove control characters, and make white space uniform."""

    check_quality: bool = False
    """Leave out documents that break the rules of quality."""

    quality: QualityRules = field(default_factory=QualityRules)

    decontaminate: tuple[InputName, ...] = ()
    """Evaluation data, named as inputs are: documents that share a run of words with it are left out."""

    decontaminate_text_field: str = "text"
    """Key of the text in the evaluation data."""

    ngram_words: Annotated[int, Field(ge=2)] = 13
    """Length of such a run; an evaluation text that is shorter counts whole, if it has shortest_words."""

    shortest_words: PositiveInt = 8
    """Words that an evaluation text must have to be looked for; shorter ones occur by chance."""


class Steps:
    """The steps that the settings ask for. Evaluation data is read once, when they are made."""

    def __init__(self, settings: StepSettings) -> None:
        self.settings = settings
        self.evaluation = EvaluationNgrams(settings) if settings.decontaminate else None

    def apply(self, text: str) -> tuple[str | None, str | None]:
        """The text as it is to be used and None, or None and the reason why it is left out."""
        if self.settings.mend_mojibake:
            text = mend_mojibake(text)
        if self.settings.normalize:
            text = normalize(text)
        reason = quality_fault(text, self.settings.quality) if self.settings.check_quality else None
        if reason is None and self.evaluation is not None:
            reason = self.evaluation.found_in(text)
        return (text, None) if reason is None else (None, reason)


# Normalisation

_CONTROL = re.compile("[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\ufeff\ufff9-\uffff]")
_LINE_END = re.compile("\r\n?|[\x0b\x0c\x85\u2028]")
_ODD_SPACES = "\t\xa0\u1680\u2000-\u200a\u202f\u205f\u3000"
_SPACES = re.compile(f"[ {_ODD_SPACES}]{{2,}}|[{_ODD_SPACES}]")  # not the single spaces that are right
_LINE_BORDER = re.compile(" \n ?|\n ")
_BLANK_LINES = re.compile("\n{3,}")
_ASCII_CONTROL = re.compile("[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f]")


def normalize(text: str) -> str:
    """Composed characters (NFC), no control characters, single spaces, at most one blank line in a row.

    Also goes what shows nothing or is no character: soft hyphens, byte order marks, U+FFF9 to U+FFFF (among them the
    replacement character). Joiners stay, since several scripts are spelled with them.
    """
    text = _LINE_END.sub("\n", text)
    if text.isascii():
        text = _ASCII_CONTROL.sub("", text)
    else:
        text = unicodedata.normalize("NFC", _CONTROL.sub("", text.replace("\u2029", "\n\n")))
    return _BLANK_LINES.sub("\n\n", _LINE_BORDER.sub("\n", _SPACES.sub(" ", text))).strip()


_BYTE_OF = {ord(bytes([byte]).decode("cp1252", "ignore") or chr(byte)): byte for byte in range(0x80, 0x100)}
_MISREAD = re.compile(
    "[\u00c2-\u00f4][\x80-\xbf" + "".join(re.escape(chr(code)) for code in _BYTE_OF if code > 0xFF) + "]"
)


def mend_mojibake(text: str) -> str:
    """Lines of UTF-8 that were decoded as Windows-1252 ("caf\u00c3\u00a9"), decoded right.

    A line is changed only if all of it becomes valid UTF-8: text that merely holds such characters does not.
    """
    if text.isascii() or not _MISREAD.search(text):
        return text
    return "\n".join(map(_mend_line, text.split("\n")))


def _mend_line(line: str) -> str:
    try:
        return line.translate(_BYTE_OF).encode("latin-1").decode() if _MISREAD.search(line) else line
    except UnicodeError:
        return line


# Quality

_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_BULLETS = ("•", "‣", "▪", "●", "○", "- ", "* ", "– ")
_ELLIPSES = ("...", "…")
_LETTER = re.compile(r"[^\W\d_]")
_PARAGRAPHS = re.compile(r"\n{2,}")


def quality_fault(text: str, rules: QualityRules) -> str | None:
    """The name of the first rule that the text breaks; None for a text that keeps them all."""
    return next(_faults(text, rules), None)


def _faults(text: str, rules: QualityRules) -> Iterator[str]:
    words = text.split()
    if len(words) < rules.min_words:
        yield "min_words"
    if len(words) > rules.max_words:
        yield "max_words"
    if not words:
        return
    yield from _word_faults(text, words, rules)
    lines = [line for line in text.split("\n") if line.strip()]
    if sum(line.lstrip().startswith(_BULLETS) for line in lines) > rules.max_bullet_line_share * len(lines):
        yield "max_bullet_line_share"
    if sum(line.rstrip().endswith(_ELLIPSES) for line in lines) > rules.max_ellipsis_line_share * len(lines):
        yield "max_ellipsis_line_share"
    for parts in (lines, [part for part in _PARAGRAPHS.split(text) if part.strip()]):
        yield from _part_faults(parts, rules)
    yield from _ngram_faults(words, rules)


def _word_faults(text: str, words: Sequence[str], rules: QualityRules) -> Iterator[str]:
    mean = sum(map(len, words)) / len(words)
    if mean < rules.min_mean_word_length:
        yield "min_mean_word_length"
    if mean > rules.max_mean_word_length:
        yield "max_mean_word_length"
    if max(text.count("#"), sum(map(text.count, _ELLIPSES))) > rules.max_symbol_share * len(words):
        yield "max_symbol_share"
    if sum(map(bool, map(_LETTER.search, words))) < rules.min_alphabetic_share * len(words):
        yield "min_alphabetic_share"
    if rules.min_stop_words and len(_STOP_WORDS.intersection(text.lower().split())) < rules.min_stop_words:
        yield "min_stop_words"
    if not rules.allow_lorem_ipsum and "lorem ipsum" in text.lower():
        yield "allow_lorem_ipsum"


def _part_faults(parts: Sequence[str], rules: QualityRules) -> Iterator[str]:
    """Faults of lines, or of paragraphs, that repeat."""
    unique = set(parts)
    if len(parts) - len(unique) > rules.max_duplicate_line_share * len(parts):
        yield "max_duplicate_line_share"
    length = sum(map(len, parts))
    if length - sum(map(len, unique)) > rules.max_duplicate_line_characters * length:
        yield "max_duplicate_line_characters"


def _ngram_faults(words: Sequence[str], rules: QualityRules) -> Iterator[str]:
    """Faults of runs of words that repeat; characters are those of the words, without white space."""
    number_of = {word: number for number, word in enumerate(dict.fromkeys(words))}
    numbers = np.fromiter(map(number_of.__getitem__, words), np.uint64, len(words))
    ends = np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))
    length, starts = ends[-1], np.concatenate([[0], ends[:-1]])
    places, runs = np.arange(len(words)), numbers  # ascending; a run can repeat only where the one a word shorter does
    for size in range(2, 11):
        fits = places + size <= len(words)
        places = places[fits]
        runs = runs[fits] * MULTIPLIER + numbers[places + size - 1]
        order = np.argsort(runs, kind="stable")
        repeats = runs[order[1:]] == runs[order[:-1]]  # [runs - 1]: equal to the one before it in the sorted order
        if not repeats.any():
            return
        if size < 5:
            characters = _top_characters(places[order], repeats, starts, ends, size)
            name, limit = "max_top_ngram_characters", rules.max_top_ngram_characters[size - 2]
        else:
            characters = _covered(places[order[1:][repeats]], starts, ends, size)
            name, limit = "max_duplicate_ngram_characters", rules.max_duplicate_ngram_characters[size - 5]
        if characters > limit * length:
            yield name
        kept = np.sort(order[np.append(repeats, False) | np.append(False, repeats)])
        places, runs = places[kept], runs[kept]


def _top_characters(places: np.ndarray, repeats: np.ndarray, starts: np.ndarray, ends: np.ndarray, size: int) -> int:
    """Characters of the most frequent run of words, all its occurrences together; `places` are sorted by run."""
    breaks = np.flatnonzero(np.concatenate([[True], ~repeats, [True]]))
    counts = np.diff(breaks)
    most = counts.max()
    first = places[breaks[:-1][counts == most]]
    return int(most * (ends[first + size - 1] - starts[first]).max())  # the longest of equally frequent ones


def _covered(repeated: np.ndarray, starts: np.ndarray, ends: np.ndarray, size: int) -> int:
    """Characters of the words in runs that stood before, each word once."""
    change = np.zeros(len(starts) + 1, np.int64)
    np.add.at(change, repeated, 1)
    np.add.at(change, repeated + size, -1)
    return int((ends - starts)[np.cumsum(change[:-1]) > 0].sum())


# Decontamination


class EvaluationNgrams:
    """Runs of words of evaluation data, and what of it a text holds.

    Raises:
        ValueError: evaluation data cannot be read, or has no text that is long enough.
    """

    def __init__(self, settings: StepSettings) -> None:
        self.names = settings.decontaminate
        self.size = settings.ngram_words
        found: dict[int, list[tuple[np.ndarray, int]]] = {}
        for number, name in enumerate(self.names):
            num_texts = 0
            for text in _texts(name, settings.decontaminate_text_field):
                hashes = hash_words(words_of(text))
                if len(hashes) >= settings.shortest_words:
                    size = min(self.size, len(hashes))
                    found.setdefault(size, []).append((hash_ngrams(hashes, size), number))
                    num_texts += 1
            if not num_texts:
                raise ValueError(
                    f"decontaminate: {name!r} has no text of {settings.shortest_words} words: leave it out"
                )
        self.sorted = {size: _sorted_ngrams(found[size]) for size in sorted(found, reverse=True)}
        self.tables = {size: _table(known) for size, (known, _) in self.sorted.items()}

    def found_in(self, text: str) -> str | None:
        """A reason that names the evaluation data of which the text holds a run of words; None if it holds none."""
        hashes = hash_words(words_of(text))
        for size, (known, owners) in self.sorted.items():
            table = self.tables[size]
            ngrams = hash_ngrams(hashes, size)
            ngrams = ngrams[table[_table_place(ngrams, table)]]  # which leaves few to be searched for
            places = np.minimum(np.searchsorted(known, ngrams), len(known) - 1)
            hits = np.flatnonzero(known[places] == ngrams)
            if len(hits):
                return f"in evaluation data {Path(self.names[owners[places[hits[0]]]]).name}"
        return None


def _texts(name: str, text_field: str) -> Iterator[str]:
    for unit in plan_units([name], text_field=text_field):
        yield from (document.text for document in read_unit(unit))


def _sorted_ngrams(found: Iterable[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Distinct hashes in ascending order, uint64, and for each the number of the first data that has it."""
    hashes = np.concatenate([ngrams for ngrams, _ in found])
    owners = np.concatenate([np.full(len(ngrams), number) for ngrams, number in found])
    unique, first = np.unique(hashes, return_index=True)
    return unique, owners[first]


def _table(known: np.ndarray) -> np.ndarray:
    """For each value of the first bits of a hash, whether a known one has it: most others have not. bool [2^bits]."""
    table = np.zeros(1 << int(min(16 * len(known), LARGEST_TABLE) - 1).bit_length(), bool)
    table[_table_place(known, table)] = True
    return table


def _table_place(hashes: np.ndarray, table: np.ndarray) -> np.ndarray:
    return hashes >> np.uint64(65 - len(table).bit_length())
