"""Raw inputs to documents: Wikipedia XML, text files and JSON lines, in work units that any process can read alone."""

import bz2
import json
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import xxhash

from data_prep.files import READ_BYTES
from data_prep.wikitext import clean_wikitext

UNIT_BYTES = 64 << 20
PACKAGE_SCHEME = "package://"
FORMATS = {
    "wikipedia": re.compile(r"\.xml(-p\d+p\d+[^.]*)?(\.bz2)?$"),
    "text": re.compile(r"\.txt$"),
    "jsonl": re.compile(r"\.jsonl$"),
}
PAGE_START = b"<page>"


class SourceError(ValueError):
    """An input that cannot be read as what it claims to be; the message names file, place and remedy."""


@dataclass(frozen=True)
class Document:
    """One article, file or JSON line.

    Attributes:
        id: file name, and within it the page id (Wikipedia) or the byte offset (JSON lines)
        text: prose; a blank line separates paragraphs, a single line break means no more than a space
    """

    id: str
    text: str


@dataclass(frozen=True)
class WorkUnit:
    """What one process reads from start to end: a byte range of one file, or several whole text files.

    Attributes:
        number: position in the plan, which depends on nothing but the inputs
        format: a key of FORMATS
        paths: the files; more than one only for text
        start, stop: bytes; the unit owns the pages or lines whose first byte lies in [start, stop)
        text_field: the key of the text in a JSON line
    """

    number: int
    format: str
    paths: tuple[str, ...]
    start: int
    stop: int
    text_field: str


# Finding files


def resolve_input(name: str) -> Path:
    """The path of an input: itself, or for `package://gensim/test/...` a file inside an installed Python package."""
    if not name:
        raise SourceError(f"input {name!r}: the name is empty: write a file, a folder or {PACKAGE_SCHEME}NAME/FILE")
    if not name.startswith(PACKAGE_SCHEME):
        return Path(name)
    package, _, inside = name.removeprefix(PACKAGE_SCHEME).partition("/")
    if not package.isidentifier() or not inside or ".." in Path(inside).parts:
        raise SourceError(f"input {name!r}: write {PACKAGE_SCHEME}<package>/<path of the file inside it>")
    spec = find_spec(package)  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"input {name!r}: package {package!r} is not installed: pip install {package}")
    return Path(spec.submodule_search_locations[0]) / inside


def input_files(name: str) -> list[Path]:
    """The files of an input, sorted: itself, or every file of a known format in the folder and below.

    Raises:
        SourceError: missing, empty, or of no known format.
    """
    path = resolve_input(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _format_of(file))
        if not files:
            raise SourceError(f"input {name!r}: the folder holds no .txt, .jsonl, .xml or .xml.bz2 file")
    elif not path.is_file():
        raise SourceError(f"input {name!r}: {path} does not exist")
    elif not _format_of(path):
        raise SourceError(f"input {name!r}: unknown format; known are .txt, .jsonl, Wikipedia .xml and .xml.bz2")
    else:
        files = [path]
    if not sum(file.stat().st_size for file in files):
        raise SourceError(f"input {name!r}: {path} is empty: leave it out, or give it text")
    return files


def _format_of(path: Path) -> str | None:
    return next((name for name, pattern in FORMATS.items() if pattern.search(path.name)), None)


# Planning


def plan_units(inputs: Sequence[str], *, text_field: str = "text", unit_bytes: int = UNIT_BYTES) -> list[WorkUnit]:
    """Cut the inputs into work units of about `unit_bytes`: a pure function of the files, whoever reads them.

    JSON lines and plain UTF-8 XML are cut at byte ranges and text files are grouped; a compressed file, or XML in
    another encoding, is one unit whatever its size, since it can be read only from its beginning.

    Raises:
        SourceError: an input is missing, empty or of no known format.
    """
    files = [file for name in inputs for file in input_files(name)]
    spans = _text_spans([file for file in files if _format_of(file) == "text"], unit_bytes)
    for file in files:
        if _format_of(file) != "text":
            spans += _byte_spans(file, unit_bytes)
    return [
        WorkUnit(number, _format_of(paths[0]), tuple(map(str, paths)), start, stop, text_field)
        for number, (paths, start, stop) in enumerate(spans)
    ]


def _text_spans(files: list[Path], unit_bytes: int) -> list[tuple[list[Path], int, int]]:
    spans: list[tuple[list[Path], int, int]] = []
    for file in files:
        size = file.stat().st_size
        if not spans or spans[-1][2] + size > unit_bytes:
            spans.append(([], 0, 0))
        paths, _, total = spans[-1]
        paths.append(file)
        spans[-1] = (paths, 0, total + size)
    return spans


def _byte_spans(file: Path, unit_bytes: int) -> list[tuple[list[Path], int, int]]:
    size = file.stat().st_size
    if _format_of(file) == "wikipedia" and not _is_plain_utf8_xml(file):
        return [([file], 0, size)]
    return [([file], start, min(start + unit_bytes, size)) for start in range(0, size, unit_bytes)]


def _is_plain_utf8_xml(file: Path) -> bool:
    with open(file, "rb") as stream:
        head = stream.read(200).removeprefix(b"\xef\xbb\xbf")
    declared = re.match(rb"<\?xml[^>]*encoding=[\"']([^\"']+)", head)
    return head.startswith(b"<") and (declared is None or declared[1].lower() == b"utf-8")


# Reading


def read_unit(unit: WorkUnit) -> Iterator[Document]:
    """The documents of a unit, in order, one at a time in memory.

    Raises:
        SourceError: broken XML or bz2, invalid UTF-8, a bad JSON line, a missing text field.
    """
    return {"wikipedia": _read_wikipedia, "text": _read_text, "jsonl": _read_jsonl}[unit.format](unit)


def _read_text(unit: WorkUnit) -> Iterator[Document]:
    for path in unit.paths:
        yield Document(Path(path).name, _decode(Path(path).read_bytes(), path, 0))


def _decode(raw: bytes, path: str, offset: int) -> str:
    """UTF-8 to text, without the byte order mark that a file may begin with."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        place = f"{path}: invalid UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x})"
        raise SourceError(f"{place}; convert the file to UTF-8") from None
    return text.removeprefix("\ufeff") if offset == 0 else text


def _read_jsonl(unit: WorkUnit) -> Iterator[Document]:
    path = unit.paths[0]
    with open(path, "rb") as file:
        if unit.start:  # the line that crosses the start belongs to the unit before
            file.seek(unit.start - 1)
            file.readline()
        while (offset := file.tell()) < unit.stop and (line := file.readline()):
            if line.strip():
                text = _text_of_line(line, offset, unit)
                yield Document(f"{Path(path).name}:{offset}", text)


def _text_of_line(line: bytes, offset: int, unit: WorkUnit) -> str:
    path = unit.paths[0]
    decoded = _decode(line, path, offset)
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{_line_place(path, offset)}: not JSON: {error}: mend or remove the line") from None
    if not isinstance(record, dict) or unit.text_field not in record:
        found = ", ".join(map(repr, record)) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise SourceError(f"{_line_place(path, offset)}: no field {unit.text_field!r}, only {found}; set text_field")
    text = record[unit.text_field]
    if not isinstance(text, str):
        raise SourceError(f"{_line_place(path, offset)}: field {unit.text_field!r} is {type(text).__name__}, not text")
    if re.search("[\ud800-\udfff]", text):
        raise SourceError(f"{_line_place(path, offset)}: field {unit.text_field!r} holds half a surrogate pair")
    return text


def _line_place(path: str, offset: int) -> str:
    with open(path, "rb") as file:
        lines = file.read(offset).count(b"\n")  # only ever read when the build is about to stop
    return f"{path}: line {lines + 1} (byte {offset})"


def _read_wikipedia(unit: WorkUnit) -> Iterator[Document]:
    path = unit.paths[0]
    try:
        for page in _pages(_xml_pieces(unit)):
            fields = {_local(child): child for child in page}
            if "redirect" in fields or fields["ns"].text != "0":
                continue
            wikitext = next((node.text for node in fields["revision"] if _local(node) == "text"), None)
            yield Document(f"{Path(path).name}:{fields['id'].text}", clean_wikitext(wikitext or ""))
    except ET.ParseError as error:
        where = f"{path} (bytes {unit.start} to {unit.stop})"
        raise SourceError(f"{where}: broken XML: {error}; fetch the dump again") from None
    except KeyError as error:
        raise SourceError(f"{path}: a page without {error}: not a MediaWiki export of version 0.6 or later") from None


def _local(element: ET.Element) -> str:
    """An element's name without its namespace, which differs between dump versions."""
    return element.tag.rpartition("}")[2]


def _pages(pieces: Iterator[bytes]) -> Iterator[ET.Element]:
    """The <page> elements, each forgotten before the next: the tree never holds more than one page."""
    parser = ET.XMLPullParser(("start", "end"))
    root = None
    for piece in pieces:
        parser.feed(piece)
        for event, element in parser.read_events():
            root = element if root is None else root
            if event == "end" and _local(element) == "page":
                yield element
                element.clear()
                root.clear()
    parser.close()


def _xml_pieces(unit: WorkUnit) -> Iterator[bytes]:
    path = unit.paths[0]
    size = os.path.getsize(path)
    if path.endswith(".bz2"):
        yield from _decompressed(path)
    elif (unit.start, unit.stop) == (0, size):
        with open(path, "rb") as file:
            yield from iter(lambda: file.read(READ_BYTES), b"")
    else:
        yield from _page_range(path, unit.start, unit.stop, size)


def _decompressed(path: str) -> Iterator[bytes]:
    try:
        with bz2.open(path) as file:
            yield from iter(lambda: file.read(READ_BYTES), b"")
    except (EOFError, OSError) as error:
        raise SourceError(f"{path}: broken bz2: {error}; fetch the dump again") from None


def _page_range(path: str, start: int, stop: int, size: int) -> Iterator[bytes]:
    """The pages that begin in [start, stop), as XML of their own. A dump escapes its text: <page> is always a tag."""
    with open(path, "rb") as file:
        begin, end = _find_page(file, start, size), _find_page(file, stop, size)
        yield b"<mediawiki>"
        file.seek(begin)
        for position in range(begin, end, READ_BYTES):
            yield file.read(min(READ_BYTES, end - position))
        if begin == end or end < size:  # otherwise the file's own end closes the root
            yield b"</mediawiki>"


def _find_page(file: BinaryIO, start: int, size: int) -> int:
    """Offset of the first <page> at or after `start`; the file's size where there is none."""
    position = start
    while position < size:
        file.seek(position)
        piece = file.read(READ_BYTES)
        if (found := piece.find(PAGE_START)) >= 0:
            return position + found
        position += max(len(piece) - len(PAGE_START) + 1, 1)
    return size


# Splitting


def hash_share(text: str, salt: int = 0) -> float:
    """A number in [0, 1) that depends on a text's words alone, so that copies of a text stay together."""
    words = " ".join(text.lower().split())
    return xxhash.xxh3_64_intdigest(words.encode(), seed=salt) / 2**64


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document is held out from training, whatever other documents there are.

    A smaller fraction holds out a part of what a larger one does.
    """
    return hash_share(text) < fraction
