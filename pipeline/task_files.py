"""Labelled rows by the names of their columns: of CSV, TSV, JSON lines and parquet, and of what `datasets` saved."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from datasets import Dataset

COMPRESSED = (".gz", ".bz2", ".zst")
DELIMITERS = (",", "\t", ";", "|")
LONGEST_CELL = 1 << 24  # characters
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Table:
    """Some columns of a file.

    Attributes:
        path: the file.
        columns: the cells by the column's name, None where there is none.
        places: number of each row, counted as users count: lines of text from 1, rows of parquet from 0.
        unit: what is counted: "line" or "row".
    """

    path: str
    columns: dict[str, list[Any]]
    places: Sequence[int]
    unit: str

    def __len__(self) -> int:
        return len(self.places)

    def place(self, row: int) -> str:
        """File and place of the row, for errors."""
        return f"{self.path}, {self.unit} {self.places[row]}"


def read_table(path: str, names: Sequence[str], delimiter: str | None = None, optional: Sequence[str] = ()) -> Table:
    """The columns `names` of a file, and those of `optional` that it has.

    Raises ValueError, with place and remedy, where the file is of no known kind, empty, broken or lacks a column.
    """
    kinds: dict[str, Callable[[], Table]] = {
        ".csv": lambda: _read_csv(path, names, optional, delimiter),
        ".tsv": lambda: _read_csv(path, names, optional, delimiter or "\t"),
        ".jsonl": lambda: _read_json(path, names, optional),
        ".parquet": lambda: _read_parquet(path, names, optional),
    }
    suffix = Path(path.removesuffix(next(filter(path.endswith, COMPRESSED), ""))).suffix
    if suffix not in kinds:
        raise ValueError(
            f"{path}: {suffix or 'no suffix'} says no known kind of file: name it {', '.join(kinds)}, all but parquet "
            f"also with {', '.join(COMPRESSED)} behind"
        )
    table = kinds[suffix]()
    if not len(table):
        raise ValueError(f"{path}: it holds no rows: name another file, or leave it out")
    return table


def read_lines(path: str) -> list[str]:
    """The lines of a file of UTF-8 without their ends: only a line feed, or a carriage return before it, ends one.

    Raises ValueError where it cannot be read, is empty, or is no UTF-8.
    """
    try:
        with pa.input_stream(path) as stream:  # unpacks by suffix
            raw = stream.read()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {first_line(error)}: fetch it again") from None
    try:
        text = raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: invalid UTF-8 (byte 0x{raw[error.start]:02x}): convert the file to UTF-8"
        ) from None
    if not text.strip():
        raise ValueError(f"{path}: it is empty: name another file, or leave it out")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def first_line(error: Exception) -> str:
    """What an error of another library says first."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def no_column(path: str, wanted: str, names: Sequence[str]) -> ValueError:
    """The error of a table without the column that is asked for."""
    found = ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")
    return ValueError(f"{path}: no column {wanted!r}, only {found}: set task.text, task.text_pair and task.label")


def _chosen(path: str, found: Sequence[str], names: Sequence[str], optional: Sequence[str]) -> list[str]:
    """Of the columns that a table has, those to be read."""
    for name in names:
        if name not in found:
            raise no_column(path, name, found)
    chosen = [*names, *(name for name in optional if name in found)]
    for name in chosen:
        if found.count(name) > 1:
            raise ValueError(f"{path}: the column {name!r} stands {found.count(name)} times: rename all but one")
    return chosen


def _read_csv(path: str, names: Sequence[str], optional: Sequence[str], delimiter: str | None) -> Table:
    lines = read_lines(path)
    delimiter, found = _header(path, lines[0], names, delimiter)
    chosen = _chosen(path, found, names, optional)
    columns: dict[str, list[str]] = {name: [] for name in chosen}
    places = []
    for line, cells in _csv_rows(path, lines, delimiter):
        if len(cells) != len(found):
            raise ValueError(
                f"{path}, line {line}: {len(cells)} cells, but {len(found)} columns, with delimiter {delimiter!r}: "
                "mend the row (a cell that holds the delimiter stands in double quotes), or set task.delimiter"
            )
        places.append(line)
        for name in chosen:
            columns[name].append(cells[found.index(name)])
    return Table(path, columns, places, "line")


def _header(path: str, line: str, names: Sequence[str], delimiter: str | None) -> tuple[str, list[str]]:
    """Delimiter and names of the columns: by the delimiter that gives all `names`, else by that which gives most."""
    headers = {each: _cells(path, line, each) for each in DELIMITERS}
    fitting = [each for each in DELIMITERS if set(names) <= set(headers[each])]
    if delimiter is None:
        delimiter = fitting[0] if fitting else max(DELIMITERS, key=lambda each: len(headers[each]))
    found = _cells(path, line, delimiter)
    if not set(names) <= set(found):
        missing = next(name for name in names if name not in found)
        other = f"the delimiter is {fitting[0]!r}, not {delimiter!r}: set task.delimiter" if fitting else ""
        error = no_column(path, missing, found)
        raise ValueError(f"{path}: {other}" if other else f"{error}; the first line must name the columns")
    return delimiter, found


def _cells(path: str, line: str, delimiter: str) -> list[str]:
    """The names of the columns in the first line."""
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except csv.Error as error:
        raise ValueError(
            f"{path}: its first line is not CSV: {error}: write the columns' names there, and end lines by a line feed"
        ) from None


def _csv_rows(path: str, lines: Sequence[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Number of the first line and cells of each row behind the header; empty lines are none."""
    csv.field_size_limit(LONGEST_CELL)
    rows = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    next(rows)
    while True:
        line = rows.line_num + 1
        try:
            cells = next(rows, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {line}: not CSV: {error}: close every double quote, and double those within a cell"
            ) from None
        if cells is None:
            return
        if delimiter == "\t" and any(
            "\n" in cell and "\t" in cell for cell in cells
        ):  # rows that an open quote took up
            raise ValueError(
                f"{path}, line {line}: a cell that begins with a double quote holds tabs and ends in line "
                f"{rows.line_num}: double the quotes within cells, or write the file as JSON lines"
            )
        if cells:
            yield line, cells


def _read_json(path: str, names: Sequence[str], optional: Sequence[str]) -> Table:
    records, places = [], []
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            records.append(_json_object(f"{path}, line {number}", line))
            places.append(number)
    found = list(dict.fromkeys(name for record in records for name in record))
    chosen = _chosen(path, found, names, optional)
    return Table(path, {name: [record.get(name) for record in records] for name in chosen}, places, "line")


def _json_object(place: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON: {error}: write one object a line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{place}: a {type(record).__name__}, not an object: write one object a line")
    if any(isinstance(value, str) and _SURROGATE.search(value) for value in record.values()):
        raise ValueError(f"{place}: half a surrogate pair, which no text has: mend or remove it")
    return record


def _read_parquet(path: str, names: Sequence[str], optional: Sequence[str]) -> Table:
    try:
        with pq.ParquetFile(path) as file:
            chosen = _chosen(path, file.schema_arrow.names, names, optional)
            table = file.read(columns=chosen)
            return Table(path, {name: table[name].to_pylist() for name in chosen}, range(len(table)), "row")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: invalid UTF-8: {error}: write the file again, in UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: broken parquet: {first_line(error)}: fetch it again") from None


# What `datasets` saved


def is_saved(folder: str | Path) -> bool:
    """Whether `datasets` saved this folder."""
    return any((Path(folder) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def load_saved(folder: str) -> dict[str, Dataset]:
    """The splits of a folder that `datasets` saved; rows without a split are "train".

    Raises ValueError where it is none, or broken.
    """
    if not is_saved(folder):
        raise ValueError(f"{folder}: it holds neither dataset_dict.json nor state.json: name one that datasets saved")
    import datasets

    try:
        saved = datasets.load_from_disk(folder)
    except (datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: broken: {first_line(error)}: save it again") from None
    return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}


def dataset_table(dataset: Dataset, place: str, names: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """Columns of a split as those of a file. Classes have their names, and no label (-1) is None."""
    chosen = _chosen(place, dataset.column_names, names, optional)
    try:
        rows = dataset.select_columns(chosen).with_format("arrow")[:]
        rows.validate(full=True)  # Arrow trusts its files: broken offsets would read any memory
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{place}: broken: {first_line(error)}: save it again") from None
    columns = {name: rows[name].to_pylist() for name in chosen}
    for name in chosen:
        if classes := getattr(dataset.features[name], "names", None):
            columns[name] = [classes[cell] if cell is not None and cell >= 0 else None for cell in columns[name]]
    if not rows.num_rows:
        raise ValueError(f"{place}: it holds no rows: save it with some, or leave the split out")
    return Table(place, columns, range(rows.num_rows), "row")
