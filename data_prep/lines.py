"""Text files, JSON lines and CSV, line by line in bounded memory, plain or compressed."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data_prep import documents
from data_prep.documents import BrokenContent, Document, Faults, SourceError, WorkUnit, too_long, unreadable

SKIP_BYTES = 1 << 20  # of a line too long to keep, at a time
COMPRESSED = re.compile(r"\.(gz|zst)$")
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_text(unit: WorkUnit, faults: Faults) -> Iterator[Document]:
    """Each file is a document."""
    for path in unit.paths:
        try:
            with open(path, "rb") as file:
                raw = file.read(documents.LONGEST_DOCUMENT + 1)
            if len(raw) > documents.LONGEST_DOCUMENT:
                raise too_long("cut it into several files, which are a document each, or write JSON lines")
            text = decode(raw)
        except BrokenContent as fault:
            faults.add(fault, lambda path=path: path)
        except OSError as error:
            faults.add(unreadable(error), lambda path=path: path)
        else:
            yield Document(unit.name_of(path), text.removeprefix("\ufeff"))


def read_jsonl(unit: WorkUnit, faults: Faults) -> Iterator[Document]:
    """Each line that begins in the unit's range is a document."""
    path = unit.paths[0]
    for offset, line in _lines(unit, faults):
        try:
            text = json_text(line, unit.text_field, offset)
        except BrokenContent as fault:
            faults.add(fault, lambda offset=offset: _line_place(path, offset))
        else:
            yield Document(f"{unit.name_of(path)}:{offset}", text)


def read_csv(unit: WorkUnit, faults: Faults) -> Iterator[Document]:
    """Each row is a document; the first row names the columns.

    Raises:
        SourceError: no column is called as the unit's text_field, whatever else may be left out.
    """
    path = unit.paths[0]
    csv.field_size_limit(documents.LONGEST_DOCUMENT)
    # Bytes that are no UTF-8 become surrogates, so that they spoil their own row alone.
    lines = (line.decode(errors="surrogateescape") for _, line in _lines(unit, faults, keep_blank=True))
    is_tsv = ".tsv" in Path(path).suffixes
    rows = csv.reader(lines, "excel-tab" if is_tsv else "excel", strict=True)
    try:
        names = next(rows, None)
    except csv.Error as error:
        raise SourceError(f"{path}: the first row is not CSV: {error}: mend the names of the columns") from None
    if names is None:
        return
    names[0:1] = [name.removeprefix("\ufeff") for name in names[0:1]]  # as spreadsheets begin a file
    if unit.text_field not in names:
        raise no_column(path, unit.text_field, names)
    column, number = names.index(unit.text_field), 0
    while True:
        number += 1
        before = rows.line_num
        try:
            row = next(rows, None)
            if row is None:
                return
            if is_tsv and any("\n" in cell and "\t" in cell for cell in row):
                raise BrokenContent("quote over several rows", ": double the quotes within cells, or write JSON lines")
            if row:
                yield Document(f"{unit.name_of(path)}:{number}", _cell(row, column, len(names)))
        except BrokenContent as fault:
            _add_row(faults, fault, path, number, before, rows.line_num)
        except csv.Error as error:
            fault = BrokenContent("not CSV", f": {error}: mend or remove the row")
            _add_row(faults, fault, path, number, before, rows.line_num)


def _add_row(faults: Faults, fault: BrokenContent, path: str, number: int, before: int, last: int) -> None:
    """A quote that is never closed takes all lines up to the next one: as many rows may be lost."""
    faults.add(fault, lambda: f"{path}: row {number} (lines {before + 1} to {last})", max(1, last - before))


def _cell(row: list[str], column: int, num_columns: int) -> str:
    if len(row) != num_columns:
        raise BrokenContent("not CSV", f": {len(row)} cells, but {num_columns} columns: mend or remove the row")
    if _SURROGATE.search(row[column]):
        raise BrokenContent("invalid UTF-8", ": convert the file to UTF-8")
    return row[column]


def no_column(place: str, text_field: str, names: list[str]) -> SourceError:
    """The error of a table without the column that is asked for."""
    return SourceError(f"{place}: no column {text_field!r}, only {', '.join(map(repr, names))}; set text_field")


# Pieces that other formats share


def decode(raw: bytes, offset: int = 0) -> str:
    """UTF-8 to text. `offset` is where `raw` begins in its file."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        place = f" at byte {offset + error.start} (0x{raw[error.start]:02x})"
        raise BrokenContent("invalid UTF-8", f"{place}; convert the file to UTF-8") from None


def json_text(raw: bytes, text_field: str, offset: int = 0) -> str:
    """The text in a JSON object; the first line of a file may begin with a byte order mark."""
    decoded = decode(raw, offset).removeprefix("\ufeff")
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise BrokenContent("not JSON", f": {error}: mend or remove it") from None
    if not isinstance(record, dict) or text_field not in record:
        found = ", ".join(map(repr, record)) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise BrokenContent(f"no field {text_field!r}", f", only {found}; set text_field")
    return checked_text(record[text_field], text_field)


def checked_text(text: object, text_field: str) -> str:
    """`text`, which must be text that UTF-8 can hold."""
    if not isinstance(text, str):
        raise BrokenContent(f"field {text_field!r} is not text", f" but {type(text).__name__}: mend or remove it")
    if _SURROGATE.search(text):
        raise BrokenContent("half a surrogate pair", f" in field {text_field!r}: mend or remove it")
    return text


# Lines


def _lines(unit: WorkUnit, faults: Faults, keep_blank: bool = False) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each line that begins in the unit's range, of a compressed file in what it holds."""
    path = unit.paths[0]
    try:
        with _opened(path) as file:
            whole = COMPRESSED.search(path) is not None
            offset = 0
            if unit.start:  # the line that crosses the start belongs to the unit before
                file.seek(unit.start - 1)
                offset = unit.start - 1 + _skip_line(file)
            while whole or offset < unit.stop:
                line = file.readline(documents.LONGEST_DOCUMENT + 1)
                size = len(line)
                if size > documents.LONGEST_DOCUMENT:
                    size += 0 if line.endswith(b"\n") else _skip_line(file)
                    fault = too_long("cut it into several documents, or remove it")
                    faults.add(fault, lambda offset=offset: f"{path}: line at byte {offset}")
                elif not line:
                    return
                elif keep_blank or line.strip():
                    yield offset, line
                offset += size
    except (EOFError, gzip.BadGzipFile, zlib.error, _ZstdError) as error:
        faults.add(_broken_stream(path, error), lambda: path)
    except OSError as error:
        faults.add(unreadable(error), lambda: path)


class _ZstdError(Exception):
    """What is wrong with a .zst file."""


class _ZstdStream(io.RawIOBase):
    """Pyarrow's reader of Zstandard, as Python's buffers want it, with errors told from those of the file itself."""

    def __init__(self, path: str) -> None:
        import pyarrow as pa  # of the one kind of text that needs it

        self._file = pa.CompressedInputStream(pa.OSFile(path), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        try:
            piece = self._file.read(len(buffer))
        except OSError as error:
            raise _ZstdError(error) from None
        buffer[: len(piece)] = piece
        return len(piece)


def _opened(path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return gzip.open(path)
    return io.BufferedReader(_ZstdStream(path), SKIP_BYTES) if path.endswith(".zst") else open(path, "rb")


def _skip_line(file: BinaryIO) -> int:
    """Read to the end of the line. Gives the number of bytes."""
    skipped = 0
    while piece := file.readline(SKIP_BYTES):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _line_place(path: str, offset: int) -> str:
    lines, position = 0, 0
    with _opened(path) as file:  # only ever read when the build is about to stop
        while position < offset and (piece := file.read(min(SKIP_BYTES, offset - position))):
            lines += piece.count(b"\n")
            position += len(piece)
    return f"{path}: line {lines + 1} (byte {offset})"


def _broken_stream(path: str, error: Exception) -> BrokenContent:
    return BrokenContent(f"broken {'gzip' if path.endswith('.gz') else 'zstd'}", f": {error}: fetch the file again")
