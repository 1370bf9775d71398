"""What reading gives, documents; what it works on, units; and what becomes of content that is broken."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

LONGEST_DOCUMENT = 64 << 20
"""Bytes of a line, page, member or text file: what is longer is never held in memory, but is an error or left out."""


class SourceError(ValueError):
    """An input that cannot be read as what it claims to be; the message names file, place and remedy."""


@dataclass(frozen=True)
class Document:
    """One article, file, line or row.

    Attributes:
        id: unique within its input: the file's place in it, and within the file the page id (Wikipedia), the byte
            offset (JSON lines), the number of the row (tables) or the name of the member (tar)
        text: prose; a blank line separates paragraphs, a single line break means no more than a space
    """

    id: str
    text: str


@dataclass(frozen=True)
class WorkUnit:
    """What one process reads from start to end: a range of one file, or several whole text files.

    Attributes:
        number: position in the plan, which depends on nothing but the inputs
        format: a key of data_prep.sources.FORMATS, or "hub"
        paths: the files; more than one only for text; of the hub the input's name
        start, stop: bytes, of tables rows; the unit owns what begins in [start, stop)
        text_field: the key of the text in a JSON line or member, the column of a table
        num_bytes: of the files, how many these are: for tables a share of the file by rows
        source: number of the input, in the order in which inputs are given
        root: the folder to which names of documents are relative
    """

    number: int
    format: str
    paths: tuple[str, ...]
    start: int
    stop: int
    text_field: str
    num_bytes: int
    source: int = 0
    root: str = ""

    def name_of(self, path: str) -> str:
        """A file's place in its input: stable wherever the input lies."""
        return _name_of(path, self.root)


@lru_cache(maxsize=1)  # every document of a file asks
def _name_of(path: str, root: str) -> str:
    return Path(path).relative_to(root).as_posix() if root else Path(path).name


class BrokenContent(Exception):
    """Content that cannot be read: the reason in a few words that are the same for its like, and a line on this one."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}{detail}")
        self.reason = reason


class Faults:
    """What becomes of broken content: an error where `skipped` is None, else a count by reason."""

    def __init__(self, skipped: Counter[str] | None) -> None:
        self.skipped = skipped
        self.count = 0

    def add(self, fault: BrokenContent, place: Callable[[], str], num_documents: int = 1) -> None:
        """Count what is left out: of a file that breaks off, whose rest is unknown, 1.

        Raises:
            SourceError: nothing may be left out; the message begins with `place`, which is found out only then.
        """
        if self.skipped is None:
            raise SourceError(f"{place()}: {fault}")
        self.skipped[fault.reason] += num_documents
        self.count += num_documents


def unreadable(error: OSError) -> BrokenContent:
    """The fault of a file that the system does not give."""
    return BrokenContent("unreadable file", f": {error.strerror or error}: make it readable, or leave it out")


def too_long(remedy: str) -> BrokenContent:
    """The fault of a document that is never held in memory."""
    return BrokenContent("too long", f": more than {LONGEST_DOCUMENT} bytes: {remedy}")
