"""Rows of tables: parquet, arrow, folders that `datasets` saved, and datasets on the hub.

`datasets` and pyarrow are imported only where such an input is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.documents import BrokenContent, Document, Faults, SourceError, WorkUnit
from data_prep.files import hash_json, read_json
from data_prep.lines import checked_text, no_column

if TYPE_CHECKING:
    from datasets import Dataset

HUB_SCHEME = "hub://"
_HUB_NAME = re.compile(
    r"hub://(?P<path>\w[\w.-]*(?:/\w[\w.-]*)?)(?::(?P<name>[^@#]+))?(?:@(?P<split>[^#]+))?(?:#(?P<revision>\S+))?"
)
ROWS_AT_ONCE = 256
_SAVE_AGAIN = "fetch the folder again, or save it anew by Dataset.save_to_disk"
SAVED_STATE, SAVED_SPLITS = "state.json", "dataset_dict.json"  # what save_to_disk writes beside the rows


class TableError(Exception):
    """What pyarrow says of a table that it cannot read."""


# Planning


def row_spans(format: str, path: str, unit_bytes: int) -> list[tuple[int, int]]:
    """Ranges of rows of about `unit_bytes` that together are the table.

    Raises:
        SourceError: a dataset of the hub cannot be had.
        TableError: the file cannot be read.
    """
    if format == "parquet":
        sizes = [(group.num_rows, group.total_byte_size) for group in _row_groups(path)]
    else:
        dataset = hub_dataset(path) if format == "hub" else _arrow_dataset(path)
        rows_at_once = max(1, unit_bytes * len(dataset) // max(dataset.data.nbytes, 1))
        starts = range(0, len(dataset), rows_at_once)
        sizes = [(min(rows_at_once, len(dataset) - start), unit_bytes) for start in starts]
    spans, start, stop, size = [], 0, 0, 0
    for num_rows, num_bytes in sizes:
        if stop > start and size + num_bytes > unit_bytes:
            spans.append((start, stop))
            start, size = stop, 0
        stop, size = stop + num_rows, size + num_bytes
    return [*spans, (start, stop)]


def saved_files(folder: Path) -> list[Path] | None:
    """The files of a folder that `datasets` saved, in the order of their rows; None for any other folder.

    Raises:
        SourceError: the folder holds several splits, its list of files is none, or a file of the list is not there.
    """
    if (folder / SAVED_SPLITS).is_file():
        splits = [folder / name for name in read_json(folder / SAVED_SPLITS)["splits"]]
        raise SourceError(f"input {str(folder)!r}: it holds several splits: name {' or '.join(map(str, splits))}")
    if not (folder / SAVED_STATE).is_file():
        return None
    state = read_json(folder / SAVED_STATE)
    try:
        files = [folder / file["filename"] for file in state["_data_files"]]
    except (KeyError, TypeError):
        raise SourceError(f"{folder / SAVED_STATE} lists no files (_data_files): {_SAVE_AGAIN}") from None
    for file in files:
        if not file.is_file():
            raise SourceError(f"{file} does not exist, but {SAVED_STATE} lists it: {_SAVE_AGAIN}")
    return files


# Reading


def read_table(unit: WorkUnit, faults: Faults) -> Iterator[Document]:
    """Each row in the unit's range is a document.

    Raises:
        SourceError: no column is called as the unit's text_field, whatever else may be left out.
    """
    path = unit.paths[0]
    name = path if unit.format == "hub" else unit.name_of(path)
    number = unit.start
    try:
        for value in _parquet_cells(unit) if unit.format == "parquet" else _dataset_cells(unit):
            try:
                yield Document(f"{name}:{number}", _text(value, unit.text_field))
            except BrokenContent as fault:
                faults.add(fault, lambda number=number: f"{path}: row {number}")
            number += 1
    except TableError as error:
        rest = f"rows {number} to {unit.stop - 1} cannot be read: {error}: fetch the file again"
        faults.add(BrokenContent("broken table", f": {rest}"), lambda: path, unit.stop - number)


def _text(cell: Any, text_field: str) -> str:
    try:
        text = cell.as_py()
    except UnicodeDecodeError as error:
        raise BrokenContent("invalid UTF-8", f": {error}; convert it to UTF-8") from None
    return checked_text(text, text_field)


def _row_groups(path: str) -> list[Any]:
    with _parquet_file(path) as file:
        return [file.metadata.row_group(number) for number in range(file.num_row_groups)]


def _parquet_file(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise TableError(_first_line(error)) from None


def _parquet_cells(unit: WorkUnit) -> Iterator[Any]:
    import pyarrow as pa

    with _parquet_file(unit.paths[0]) as file:
        _check_column(unit, file.schema_arrow.names)
        groups, start = [], 0
        for number in range(file.num_row_groups):
            if unit.start <= start < unit.stop:
                groups.append(number)
            start += file.metadata.row_group(number).num_rows
        try:
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=[unit.text_field]):
                yield from batch.column(0)
        except (pa.ArrowException, OSError) as error:
            raise TableError(_first_line(error)) from None


def _dataset_cells(unit: WorkUnit) -> Iterator[Any]:
    import pyarrow as pa

    path = unit.paths[0]
    dataset = hub_dataset(path) if unit.format == "hub" else _arrow_dataset(path)
    _check_column(unit, dataset.column_names)
    rows = dataset.select_columns([unit.text_field]).with_format("arrow")
    for start in range(unit.start, unit.stop, ROWS_AT_ONCE):
        cells = rows[start : min(start + ROWS_AT_ONCE, unit.stop)].column(0)
        try:
            _check_offsets(cells)
        except pa.ArrowException as error:
            raise TableError(_first_line(error)) from None
        yield from cells


def _check_offsets(cells: Any) -> None:
    """Arrow trusts its files: broken offsets would read any memory. Whether bytes are UTF-8 is seen cell by cell."""
    import pyarrow as pa

    as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    cells.cast(as_bytes.get(cells.type, cells.type)).validate(full=True)


def _check_column(unit: WorkUnit, names: list[str]) -> None:
    if unit.text_field not in names:
        raise no_column(unit.paths[0], unit.text_field, names)


@lru_cache(maxsize=4)  # units of one file come one after another
def _arrow_dataset(path: str) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    try:
        with open(path, "rb") as file:
            is_file_format = file.read(6) == b"ARROW1"  # else a stream, as `datasets` writes it
        if is_file_format:
            return Dataset(MemoryMappedTable(pa.ipc.open_file(pa.memory_map(path)).read_all(), path))
        return Dataset.from_file(path)
    except (pa.ArrowException, OSError) as error:
        raise TableError(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


# The hub


def parse_hub_name(name: str) -> dict[str, str | None]:
    """What `hub://PATH[:CONFIG][@SPLIT][#REVISION]` names, as arguments of `datasets.load_dataset`."""
    parts = _HUB_NAME.fullmatch(name)
    if parts is None:
        raise SourceError(f"input {name!r}: write {HUB_SCHEME}OWNER/NAME[:CONFIG][@SPLIT][#REVISION]")
    return {**parts.groupdict(), "split": parts["split"] or "train"}


@lru_cache(maxsize=4)
def hub_dataset(name: str) -> Dataset:
    """A dataset of the hub, from the local cache or fetched into it; no code of its repository is run.

    Raises:
        SourceError: it cannot be had; the message says how to bring it to a machine without network.
    """
    arguments = parse_hub_name(name)
    if Path(arguments["path"]).exists():
        raise SourceError(
            f"input {name!r}: a folder {arguments['path']} is here, too: give its path, or work elsewhere"
        )
    import datasets

    try:
        return datasets.load_dataset(**arguments)
    except ConnectionError as error:
        call = ", ".join(f"{key}={value!r}" for key, value in arguments.items() if value)
        raise SourceError(
            f"input {name!r}: {_first_line(error)}, and {datasets.config.HF_DATASETS_CACHE} does not hold it: where "
            f"there is a network run datasets.load_dataset({call}).save_to_disk('FOLDER'), bring FOLDER here and give "
            "it as the input"
        ) from None
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise SourceError(f"input {name!r}: {_first_line(error)}") from None


def hub_content(name: str) -> tuple[int, int, str]:
    """Number of files, bytes, and a hash of a dataset on the hub: of name, configuration, revision, split and rows."""
    dataset = hub_dataset(name)
    files = [Path(file["filename"]) for file in dataset.cache_files]
    # The cache has a folder for each dataset, configuration, version, and hash of revision and files.
    places = [Path(*file.parts[-5:]).as_posix() for file in files]
    return len(files), dataset.data.nbytes, hash_json([places, str(dataset.split), len(dataset)])
