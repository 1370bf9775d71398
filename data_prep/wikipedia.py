"""Wikipedia dumps to articles: XML, plain or in streams of bzip2, from any range of bytes, page by page."""

import bz2
import codecs
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import BinaryIO

from data_prep import documents
from data_prep.documents import BrokenContent, Document, Faults, WorkUnit, too_long, unreadable
from data_prep.files import READ_BYTES
from data_prep.wikitext import clean_wikitext

# A dump escapes its text: these are always tags.
PAGE_START, PAGE_END, DUMP_END = b"<page>", b"</page>", b"</mediawiki>"
WHITE_SPACE = b" \t\r\n"
STREAM_START = re.compile(rb"BZh[1-9](?:\x31\x41\x59\x26\x53\x59|\x17\x72\x45\x38\x50\x90)")
"""The head of a bzip2 stream and of its first block, or of the end of a stream without blocks."""
CONFIRMING_BYTES = 4 << 20  # of a stream's content; every 900 kB of it have a checksum
HEAD_BYTES = 200

Piece = tuple[bool, bytes | None]
"""Bytes of XML, and whether the unit owns the pages that begin in them; None stands for bytes that are lost."""


def read_wikipedia(unit: WorkUnit, faults: Faults) -> Iterator[Document]:
    """The articles, as prose, of the pages that begin in the unit's range."""
    path = unit.paths[0]
    try:
        for offset, page in _Pages(unit, faults):
            try:
                number, wikitext = _article(page)
            except BrokenContent as fault:
                faults.add(fault, lambda offset=offset: f"{path}: page at byte {offset} of the XML")
            else:
                if wikitext is not None:
                    yield Document(f"{unit.name_of(path)}:{number}", clean_wikitext(wikitext))
    except OSError as error:
        faults.add(unreadable(error), lambda: path)


def is_cut(path: str, unit_bytes: int) -> bool:
    """Whether units may begin inside the file: it is UTF-8 and, if compressed, has a stream that begins in time."""
    compressed = path.endswith(".bz2")
    with open(path, "rb") as file:
        try:
            head = bz2.BZ2Decompressor().decompress(file.read(READ_BYTES), HEAD_BYTES) if compressed else file.read(200)
        except OSError:
            return False
        if _encoding(head) != "utf-8":
            return False
        return not compressed or _find_stream(file, 1, unit_bytes) is not None


# Pages


def _article(page: bytes) -> tuple[str, str | None]:
    """Page id and wikitext; no text of redirects and of pages that are no articles."""
    try:
        fields = {_local(child): child for child in ET.fromstring(page)}
        namespace, number = fields["ns"].text, fields["id"].text
        if "redirect" in fields or namespace != "0":
            return number, None
        return number, next((node.text for node in fields["revision"] if _local(node) == "text"), None) or ""
    except ET.ParseError as error:
        raise BrokenContent("broken XML", f": {error}; fetch the dump again") from None
    except KeyError as error:
        raise BrokenContent(
            "broken XML", f": a page without {error}: no MediaWiki export of version 0.6 or later"
        ) from None


def _local(element: ET.Element) -> str:
    """An element's name without a namespace."""
    return element.tag.rpartition("}")[2]


class _Pages:
    """Cuts pieces of XML into pages: pairs of the offset of a page and its bytes, from <page> to </page>."""

    def __init__(self, unit: WorkUnit, faults: Faults) -> None:
        self.path = unit.paths[0]
        self.faults = faults
        self.unit = unit
        self.text = bytearray()
        self.offset = 0  # of `text` in what the unit reads
        self.limit: int | None = None  # where what the unit owns ends
        self.between = b""  # the last text outside pages
        self.is_inside = self.is_after_page = False
        self.is_torn = True  # whether nothing is known of what stands before here

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        self.offset = 0 if self.path.endswith(".bz2") else self.unit.start
        num_pages = 0
        for owned, piece in _xml_pieces(self.unit, self.faults):
            if piece is None:
                self._tear()
                continue
            self.is_torn = False
            if not owned and self.limit is None:
                self.limit = self.offset + len(self.text)
            self.text += piece
            for page in self._finished_pages():
                num_pages += 1
                yield page
            # Behind its last page a unit reads on to the next one, since what stands between is in no other's charge.
            if self._is_past_limit() and not self.is_inside and not self.is_after_page:
                return
        self._drop(0 if self.is_inside else len(self.text))
        if self.is_inside:
            yield self.offset, bytes(self.text)  # whose parser says how it is broken
        elif not self.is_torn and (self.is_after_page or not self.unit.start and not num_pages):
            self._check_end(num_pages)

    def _finished_pages(self) -> Iterator[tuple[int, bytes]]:
        while self._find_start():
            end = self.text.find(PAGE_END)
            if end < 0:
                self._check_length()
                return
            # A <page> inside of a page: the first one has lost its end, and only that one.
            if (inner := self.text.rfind(PAGE_START, 1, end)) > 0:
                self._lose(f": <page> at byte {self.offset} has no </page>; fetch the dump again")
                self._drop(inner)
                end -= inner
            page = (self.offset, bytes(self.text[: end + len(PAGE_END)]))
            self._drop(end + len(PAGE_END))
            self.is_inside, self.is_after_page, self.between = False, True, b""
            yield page

    def _find_start(self) -> bool:
        """Move on to where the next page of the unit begins; False where that is not known yet, or there is none."""
        if self.is_inside:
            return True
        found = self.text.find(PAGE_START)
        kept = len(self.text) - len(PAGE_START) + 1
        self._drop(found if found >= 0 else max(kept, 0))
        if found < 0:
            return False
        if self.is_after_page and self.between:
            self._lose(f": text between pages before byte {self.offset}; fetch the dump again")
        self.is_after_page, self.is_inside = False, not self._is_past_limit()
        return self.is_inside

    def _is_past_limit(self) -> bool:
        return self.limit is not None and self.offset >= self.limit

    def _drop(self, count: int) -> None:
        if not self.is_inside:
            self.between = (self.between + self.text[:count]).strip(WHITE_SPACE)[-1024:]
        del self.text[:count]
        self.offset += count

    def _check_length(self) -> None:
        if len(self.text) > documents.LONGEST_DOCUMENT:
            self.faults.add(too_long("remove the page"), lambda: f"{self.path}: page at byte {self.offset} of the XML")
            self._drop(len(self.text))
            self.is_inside = self.is_after_page = False

    def _tear(self) -> None:
        self._drop(len(self.text))
        self.is_inside = self.is_after_page = False
        self.is_torn, self.between = True, b""

    def _check_end(self, num_pages: int) -> None:
        if self.between != DUMP_END if num_pages else not self.between.endswith(DUMP_END):
            self._lose(": no element found at its end, which is not </mediawiki>; fetch the dump again")
        elif not num_pages and not self.unit.start:
            self._lose(": it holds no <page>: give a dump of pages and articles")

    def _lose(self, detail: str) -> None:
        self.faults.add(BrokenContent("broken XML", detail), lambda: self.path)


# Pieces of XML


def _xml_pieces(unit: WorkUnit, faults: Faults) -> Iterator[Piece]:
    pieces = (_bz2_pieces if unit.paths[0].endswith(".bz2") else _plain_pieces)(unit, faults)
    first = next(pieces, None)
    if first is None:
        return
    encoding = "utf-8" if unit.start or first[1] is None else _encoding(first[1])
    pieces = _chained(first, pieces)
    yield from pieces if encoding == "utf-8" else _transcoded(pieces, encoding, unit, faults)


def _chained(first: Piece, rest: Iterator[Piece]) -> Iterator[Piece]:
    yield first
    yield from rest


def _encoding(head: bytes) -> str:
    """The encoding that a byte order mark or the XML declaration names."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    declared = re.match(rb"(?:\xef\xbb\xbf)?<\?xml[^>]*encoding=[\"']([^\"']+)", head[:HEAD_BYTES])
    return declared[1].decode("ascii", "replace").lower() if declared else "utf-8"


def _transcoded(pieces: Iterator[Piece], encoding: str, unit: WorkUnit, faults: Faults) -> Iterator[Piece]:
    try:
        decoder = codecs.getincrementaldecoder(encoding)()
        for owned, piece in pieces:
            yield owned, piece if piece is None else decoder.decode(piece).encode()
    except (LookupError, UnicodeError) as error:
        faults.add(BrokenContent("broken XML", f": {error}; fetch the dump again"), lambda: unit.paths[0])
        yield True, None


def _plain_pieces(unit: WorkUnit, faults: Faults) -> Iterator[Piece]:
    with open(unit.paths[0], "rb") as file:
        file.seek(unit.start)
        position = unit.start
        while piece := file.read(min(READ_BYTES, unit.stop - position) if position < unit.stop else READ_BYTES):
            yield position < unit.stop, piece
            position += len(piece)


def _bz2_pieces(unit: WorkUnit, faults: Faults) -> Iterator[Piece]:
    """What the streams that begin in the unit's range hold, and, not owned, those after it."""
    path, size = unit.paths[0], os.path.getsize(unit.paths[0])
    with open(path, "rb") as file:
        offset = _find_stream(file, unit.start, unit.stop) if unit.start else 0
        while offset is not None and offset < size:
            owned = offset < unit.stop
            try:
                for piece in (stream := _Bz2Stream(file, offset)):
                    yield owned, piece
                offset, lost = stream.end, None
                # The next unit begins where it finds a stream, which is here, unless what is here is broken.
                if owned and unit.stop <= offset < size and _find_stream(file, unit.stop, size) != offset:
                    lost = "no stream where the one before it ends"
            except (EOFError, OSError) as error:
                lost = str(error)
            if lost is not None:
                fault = BrokenContent("broken bz2", f": {lost}; fetch the dump again")
                faults.add(fault, lambda offset=offset: f"{path}: stream at byte {offset}")
                yield owned, None
                offset = _find_stream(file, offset + 1, size)


class _Bz2Stream:
    """What one bzip2 stream holds, in pieces of bounded size; `end` is the offset behind it, once it is read."""

    def __init__(self, file: BinaryIO, offset: int) -> None:
        self.file = file
        self.end = offset

    def __iter__(self) -> Iterator[bytes]:
        decompressor = bz2.BZ2Decompressor()
        while not decompressor.eof:
            compressed = b""
            if decompressor.needs_input:
                self.file.seek(self.end)
                compressed = self.file.read(READ_BYTES // 16)
                self.end += len(compressed)
                if not compressed:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            if piece := decompressor.decompress(compressed, READ_BYTES):
                yield piece
        self.end -= len(decompressor.unused_data)


def _find_stream(file: BinaryIO, start: int, stop: int) -> int | None:
    """Offset of the first bzip2 stream that begins in [start, stop). What only looks like one is passed over."""
    overlap = 9  # a stream's first ten bytes may lie across the border of two reads
    for position in range(start, stop, READ_BYTES):
        file.seek(position)
        for found in STREAM_START.finditer(file.read(min(READ_BYTES, stop - position) + overlap)):
            if position + found.start() < stop and _is_stream(file, position + found.start()):
                return position + found.start()
    return None


def _is_stream(file: BinaryIO, offset: int) -> bool:
    confirmed = 0
    try:
        for piece in _Bz2Stream(file, offset):
            confirmed += len(piece)
            if confirmed >= CONFIRMING_BYTES:
                break
    except (EOFError, OSError):
        return False
    return True
