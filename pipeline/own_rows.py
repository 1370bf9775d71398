"""Rows of one's own: from columns of files, or of a folder that `datasets` saved, to a task."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.task_files import Table, dataset_table, load_saved, read_table
from pipeline.tasks import TEST, TRAIN, VALIDATION, Examples, Task, TaskSettings, own_task

MOST_CLASSES = 1000
LARGEST = float(np.finfo(np.float32).max)
SHOWN = 10  # of a list of classes, in an error


def read_own(settings: TaskSettings) -> tuple[Task, dict[str, Examples], list[str]]:
    """The task that the rows make, its splits (no "validation" where nothing is given for it), and remarks.

    Raises ValueError, with place and remedy, for rows that cannot work.
    """
    tables, remarks = _tables(settings)
    is_regression, guess = _is_regression(settings, tables[TRAIN])
    if is_regression:
        task, label_of = own_task((), settings.text_pair is not None), _value
    else:
        classes = _classes(tables[TRAIN], settings.label)
        task, label_of = own_task(classes, settings.text_pair is not None), _class_of(classes, tables[TRAIN].path)
    splits = {split: _examples(table, settings, label_of, split) for split, table in tables.items()}
    return task, splits, remarks + guess


def _tables(settings: TaskSettings) -> tuple[dict[str, Table], list[str]]:
    """The rows of each split, which all but "test" must have labels, and remarks."""
    texts = [settings.text] if settings.text_pair is None else [settings.text, settings.text_pair]

    def columns(split: str) -> dict[str, list[str]]:
        return {"names": texts, "optional": [settings.label]} if split == TEST else {"names": [*texts, settings.label]}

    known = (TRAIN, VALIDATION, TEST)
    if settings.data is None:
        files = {split: getattr(settings, split) for split in known}
        read = {split: path for split, path in files.items() if path is not None}
        return {
            split: read_table(path, delimiter=settings.delimiter, **columns(split)) for split, path in read.items()
        }, []
    saved = load_saved(settings.data)
    if TRAIN not in saved:
        raise ValueError(f"{settings.data}: it holds the splits {', '.join(saved)}, but no {TRAIN}: save it with one")
    tables = {
        split: dataset_table(saved[split], f"{settings.data}/{split}", **columns(split))
        for split in known
        if split in saved
    }
    unused = [split for split in saved if split not in known]
    told = f"{settings.data}: of its splits {', '.join(unused)} are not used, only {', '.join(known)}"
    return tables, [told] if unused else []


# Labels


def _is_regression(settings: TaskSettings, table: Table) -> tuple[bool, list[str]]:
    """Whether labels are values to predict, and how that was guessed."""
    if settings.kind is not None:
        return settings.kind == "regression", []
    labels = [label for label in table.columns[settings.label] if not _is_empty(label)]
    if not all(_number(label) is not None for label in labels):
        return False, []
    with_point = [label for label in labels if isinstance(label, float) or "." in str(label)]
    told = f"labels such as {with_point[0]!r} are taken for values to predict: see task.kind" if with_point else ""
    return bool(with_point), [told] if told else []


def _number(label: Any) -> float | None:
    """The finite number that a label is, in text or not."""
    try:
        number = math.nan if isinstance(label, bool) else float(label)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _is_empty(cell: Any) -> bool:
    is_nan = isinstance(cell, float) and math.isnan(cell)  # what tables have where nothing is
    return cell is None or is_nan or (isinstance(cell, str) and not cell.strip())


def _class_name(label: Any) -> str:
    """One name for 1, 1.0 and " 1", as files of several kinds may have them; ValueError for what names no class."""
    if not isinstance(label, (str, int, float)) or (isinstance(label, str) and len(label.strip().splitlines()) > 1):
        raise ValueError(f"{label!r:.80} names no class: write a word or a number")
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return " ".join(str(label).split())


def _classes(table: Table, column: str) -> tuple[str, ...]:
    """The classes of the rows to learn from: in the order of numbers, where all are whole numbers, else of letters."""
    names = _read_labels(table, column, lambda label: None if _is_empty(label) else _class_name(label))
    counts = Counter(name for name in names if name is not None)
    if len(counts) == 1:
        raise ValueError(
            f"{table.path}: column {column!r} has one class alone, {next(iter(counts))!r}: name another by task.label, "
            "or other rows"
        )
    if len(counts) > MOST_CLASSES or (len(counts) > 2 * SHOWN and 2 * len(counts) > len(table)):
        raise ValueError(
            f"{table.path}: column {column!r} has {len(counts)} different labels in {len(table)} rows, as "
            f"{next(iter(counts))!r:.80}: name another by task.label, or set task.kind regression for numbers"
        )
    whole = all(name.removeprefix("-").isdecimal() for name in counts)
    return tuple(sorted(counts, key=lambda name: (int(name) if whole else 0, name)))


def _class_of(classes: Sequence[str], origin: str) -> Callable[[Any], int]:
    numbers = {name: number for number, name in enumerate(classes)}
    shown = ", ".join(map(repr, classes[:SHOWN])) + (", ..." if len(classes) > SHOWN else "")

    def label_of(label: Any) -> int:
        name = _class_name(label)
        if name not in numbers:
            raise ValueError(f"class {name!r:.80} is none of {shown}, which {origin} has: mend it, or add rows there")
        return numbers[name]

    return label_of


def _value(label: Any) -> float:
    number = _number(label)
    if number is None or abs(number) > LARGEST:
        raise ValueError(f"{label!r:.80} is no finite number of 32 bits: mend it, or set task.kind classification")
    return number


# Rows


def _examples(table: Table, settings: TaskSettings, label_of: Callable[[Any], float], split: str) -> Examples:
    texts = _texts(table, settings.text)
    pairs = None if settings.text_pair is None else _texts(table, settings.text_pair)
    cells = table.columns.get(settings.label)
    is_given = cells is not None and not (split == TEST and all(map(_is_empty, cells)))
    labels = _labels(table, settings.label, label_of) if is_given else None
    return Examples(texts, pairs, labels, list(range(len(table))))


def _texts(table: Table, column: str) -> list[str]:
    cells = table.columns[column]
    _refuse_empty(table, column)
    for row, cell in enumerate(cells):
        if not isinstance(cell, str):
            raise ValueError(
                f"{table.place(row)}: {cell!r:.80} in column {column!r} is {type(cell).__name__}, not text: name "
                "another by task.text or task.text_pair"
            )
    return cells


def _labels(table: Table, column: str, label_of: Callable[[Any], float]) -> np.ndarray:
    _refuse_empty(table, column)
    return np.array(_read_labels(table, column, label_of), np.float32 if label_of is _value else np.int64)


def _read_labels(table: Table, column: str, read: Callable[[Any], Any]) -> list[Any]:
    """What `read` makes of each label; its ValueErrors with their place."""
    labels = []
    for row, cell in enumerate(table.columns[column]):
        try:
            labels.append(read(cell))
        except ValueError as error:
            raise ValueError(f"{table.place(row)}: in column {column!r} {error}") from None
    return labels


def _refuse_empty(table: Table, column: str) -> None:
    cells = table.columns[column]
    if empty := [row for row, cell in enumerate(cells) if _is_empty(cell)]:
        count = "all" if len(empty) == len(cells) else f"{len(empty)} of {len(cells)}"
        raise ValueError(
            f"{table.place(empty[0])}: column {column!r} is empty there, as in {count} rows: fill the cells, remove "
            "the rows, or name another column"
        )
