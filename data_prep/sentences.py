"""Prose to sentences: one regular expression finds candidates, a few rules refuse abbreviations and initials."""

import re
from collections.abc import Iterator

_PARAGRAPH_BREAK = re.compile(r"\n[ \t\r]*\n\s*")
# A mark, what may close the sentence after it, white space, and what may open the next one before its first character.
_CANDIDATE = re.compile(r"(?P<mark>[.!?…]+)[\"'”’“»)\]]*\s+(?=[\"'“‘„«(\[]*(?P<next>[\w$€£]))|[。！？]+[」』”）]*\s*")
_LAST_WORD = re.compile(r"[^\s(\[\"'“‘«]*$")
_ABBREVIATION = re.compile(
    r"mr|mrs|ms|messrs|dr|prof|rev|hon|st|sr|jr|gen|col|maj|capt|lt|sgt|cmdr|adm|brig|gov|sen|rep|pres|dept|univ|inc|ltd"
    r"|co|corp|bros|vs|etc|cf|al|c|ca|cir|approx|est|fl|fig|figs|eq|no|nos|vol|vols|ch|sec|p|pp|ed|eds|trans|repr|orig"
    r"|incl|lit|op|cit|viz|resp|mt|ft|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec",
    re.I,
)
_LONGEST_WORD = 24  # characters before a full stop that are looked at for an abbreviation


def split_sentences(text: str) -> list[str]:
    """The sentences of a document in order, none empty, white space at their ends removed and inside them single.

    A blank line always ends a sentence; a single line break is a space.
    """
    return [
        sentence
        for paragraph in _PARAGRAPH_BREAK.split(text)
        for sentence in _sentences_of(" ".join(paragraph.split()))
        if sentence
    ]


def _sentences_of(paragraph: str) -> Iterator[str]:
    start = 0
    for candidate in _CANDIDATE.finditer(paragraph):
        if _is_end(paragraph, candidate):
            yield paragraph[start : candidate.end()].rstrip()
            start = candidate.end()
    yield paragraph[start:]


def _is_end(paragraph: str, candidate: re.Match[str]) -> bool:
    following = candidate["next"]
    if following is None:  # marks that need no white space after them
        return True
    if following.islower():
        return False
    if candidate["mark"] != ".":
        return True
    mark = candidate.start()
    word = _LAST_WORD.search(paragraph, max(mark - _LONGEST_WORD, 0), mark)[0]
    is_initial = len(word) == 1 and word.isupper() and word != "I"
    has_inner_stop = "." in word and not word[0].isdigit()  # U.S., Ph.D., e.g.
    return not (is_initial or has_inner_stop or _ABBREVIATION.fullmatch(word))
