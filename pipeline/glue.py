"""GLUE's files: each task's own columns, in GLUE's own layout or as `datasets` has them, and what its server takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.files import atomic_file
from pipeline.task_files import Table, dataset_table, first_line, is_saved, load_saved, read_lines
from pipeline.task_metrics import check_values
from pipeline.tasks import (
    DIAGNOSTIC,
    HUB,
    TASKS,
    TEST,
    TEST_MISMATCHED,
    TRAIN,
    VALIDATION,
    VALIDATION_MISMATCHED,
    Examples,
    Task,
    TaskSettings,
)

if TYPE_CHECKING:
    from datasets import Dataset

HUB_NAME = "nyu-mll/glue"
HUB_DIAGNOSTIC = "ax"  # rows of MNLI's kind, which `datasets` has as a task of their own
HIGHEST_SCORE = 5.0  # of STS-B, whose lowest is 0
MOST_BROKEN = 0.01  # share of the rows of a file that may be left out
UNLABELLED = (None, -1)  # what `datasets` has in test sets

IN_WORDS = ("mnli", "qnli", "rte")
"""Tasks whose classes GLUE's files have by name; those of the others by number."""


@dataclass(frozen=True)
class Layout:
    """Where a task is.

    Attributes:
        folder: within GLUE's.
        columns: of its text or texts.
        label: column of the label.
        hub_columns: of its text or texts as `datasets` has them, where label is "label" and index "idx".
        unnamed: columns of all files but the test's where these have no header.
    """

    folder: str
    columns: tuple[str, ...]
    label: str = "label"
    hub_columns: tuple[str, ...] = ("sentence1", "sentence2")
    unnamed: tuple[str, ...] | None = None


_PAIR = ("sentence1", "sentence2")

LAYOUTS = {
    "cola": Layout("CoLA", ("sentence",), hub_columns=("sentence",), unnamed=("source", "label", "mark", "sentence")),
    "sst2": Layout("SST-2", ("sentence",), hub_columns=("sentence",)),
    "mrpc": Layout("MRPC", ("#1 String", "#2 String"), "Quality"),
    "stsb": Layout("STS-B", _PAIR, "score"),
    "qqp": Layout("QQP", ("question1", "question2"), "is_duplicate", ("question1", "question2")),
    "mnli": Layout("MNLI", _PAIR, "gold_label", ("premise", "hypothesis")),
    "qnli": Layout("QNLI", ("question", "sentence"), hub_columns=("question", "sentence")),
    "rte": Layout("RTE", _PAIR),
    "wnli": Layout("WNLI", _PAIR),
}

SPLIT_FILES = {TRAIN: "train.tsv", VALIDATION: "dev.tsv", TEST: "test.tsv"}
MNLI_FILES = {
    TRAIN: "train.tsv",
    VALIDATION: "dev_matched.tsv",
    VALIDATION_MISMATCHED: "dev_mismatched.tsv",
    TEST: "test_matched.tsv",
    TEST_MISMATCHED: "test_mismatched.tsv",
}
DIAGNOSTIC_FILES = ("diagnostic/diagnostic.tsv", "AX/AX.tsv")
MRPC_TRAIN, MRPC_TEST, MRPC_DEV_IDS = "msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "dev_ids.tsv"

SUBMISSIONS = {
    ("cola", TEST): "CoLA.tsv",
    ("sst2", TEST): "SST-2.tsv",
    ("mrpc", TEST): "MRPC.tsv",
    ("stsb", TEST): "STS-B.tsv",
    ("qqp", TEST): "QQP.tsv",
    ("mnli", TEST): "MNLI-m.tsv",
    ("mnli", TEST_MISMATCHED): "MNLI-mm.tsv",
    ("mnli", DIAGNOSTIC): "AX.tsv",
    ("qnli", TEST): "QNLI.tsv",
    ("rte", TEST): "RTE.tsv",
    ("wnli", TEST): "WNLI.tsv",
}
"""What the server calls the predictions for a task's split."""


def read_glue(settings: TaskSettings) -> tuple[Task, dict[str, Examples], list[str]]:
    """The task, its splits, and remarks on rows that were left out.

    Raises ValueError, with place and remedy, where files or rows are not GLUE's, or the hub cannot be reached.
    """
    task, data = TASKS[settings.name], settings.data
    if data == HUB:
        saved, remarks = _from_hub(task.name), []
        if task.name == "mnli":
            try:
                saved |= _diagnostic(_from_hub(HUB_DIAGNOSTIC))
            except ValueError as error:  # tasks may have been fetched one by one
                remarks.append(f"no predictions for the diagnostic rows: {error}")
        return task, _hub_splits(task, saved, f"{HUB_NAME} {task.name}"), remarks
    folders = [folder for folder in (Path(data), Path(data, task.name)) if is_saved(folder)]
    if folders:
        saved, beside = load_saved(str(folders[0])), folders[0].with_name(HUB_DIAGNOSTIC)
        if task.name == "mnli" and is_saved(beside):
            saved |= _diagnostic(load_saved(str(beside)))
        return task, _hub_splits(task, saved, str(folders[0])), []
    reader = _Reader(task, Path(data))
    return task, reader.splits(), reader.remarks


# GLUE's own layout


class _Reader:
    """Reads a task from GLUE's folder and notes what it leaves out."""

    def __init__(self, task: Task, root: Path) -> None:
        self.task, self.layout, self.remarks = task, LAYOUTS[task.name], list[str]()
        self.root, self.folder = root, root / self.layout.folder
        if not self.folder.is_dir():
            held = ", ".join(sorted(path.name for path in root.iterdir())[:20]) or "nothing"
            raise ValueError(
                f"task.data: {root} has no folder {self.layout.folder}, only {held}: name the folder that holds it (as "
                f"GLUE's archive unpacks), or one that datasets saved"
            )

    def splits(self) -> dict[str, Examples]:
        """All splits that there are; train and validation must be."""
        files = MNLI_FILES if self.task.name == "mnli" else SPLIT_FILES
        paths = {split: self.folder / name for split, name in files.items()}
        if self.task.name == "mrpc" and not paths[TRAIN].is_file() and (self.folder / MRPC_TRAIN).is_file():
            tables = self._paraphrases()
        else:
            for split in (TRAIN, VALIDATION):
                if not paths[split].is_file():
                    needed = ", ".join(files.values())
                    raise ValueError(f"{paths[split]} does not exist: bring all of GLUE's own files, {needed}")
            tables = {split: self._table(path, split) for split, path in paths.items() if path.is_file()}
        if self.task.name == "mnli":
            found = [self.root / name for name in DIAGNOSTIC_FILES if (self.root / name).is_file()]
            if found:
                tables[DIAGNOSTIC] = self._table(found[0], DIAGNOSTIC)
        return {split: self._examples(table, split) for split, table in tables.items()}

    def _table(self, path: Path, split: str) -> Table:
        """The rows of a file. Nothing is quoted in it; rows that are cut short are left out, but of test sets."""
        lines = read_lines(str(path))
        while not lines[-1].strip():
            lines.pop()
        is_test = split not in (TRAIN, VALIDATION, VALIDATION_MISMATCHED)
        has_header = self.layout.unnamed is None or is_test
        names = lines[0].split("\t") if has_header else list(self.layout.unnamed)
        needed = [*self.layout.columns] + [self.layout.label] * (not is_test)
        if missing := [name for name in needed if name not in names]:
            raise ValueError(
                f"{path}: no column {missing[0]!r}, only {', '.join(map(repr, names))}: bring GLUE's own file, whose "
                "first line names the columns, with tabs between them"
            )
        rows, places, broken = [], [], []
        for number, line in enumerate(lines[has_header:], 1 + has_header):
            cells = line.split("\t")
            if len(cells) == len(names):
                rows.append(cells)
                places.append(number)
            else:
                broken.append((number, len(cells)))
        self._note_broken(path, broken, len(names), len(rows), is_test)
        columns = {name: [row[place] for row in rows] for place, name in enumerate(names)}
        return Table(str(path), columns, places, "line")

    def _note_broken(
        self, path: Path, broken: Sequence[tuple[int, int]], num_columns: int, num_rows: int, is_test: bool
    ) -> None:
        if not broken:
            if not num_rows:
                raise ValueError(f"{path}: it has no rows: bring GLUE's own file")
            return
        (line, cells), num_broken = broken[0], len(broken)
        what = f"{path}, line {line}: {cells} cells, but {num_columns} columns"
        if is_test or num_broken > MOST_BROKEN * num_rows + 1:
            raise ValueError(f"{what}, with tabs between them, and {num_broken} such rows: bring GLUE's own file")
        self.remarks.append(f"{what}: left out, {num_broken} of {num_broken + num_rows} rows")

    def _paraphrases(self) -> dict[str, Table]:
        """MRPC as Microsoft has it: GLUE validates by the rows that dev_ids.tsv, or mrpc_dev_ids.tsv, lists."""
        lists = [self.folder / name for name in (MRPC_DEV_IDS, f"mrpc_{MRPC_DEV_IDS}")]
        found = [path for path in lists if path.is_file()]
        if not found:
            raise ValueError(f"{lists[0]} does not exist: bring it, or GLUE's train.tsv and dev.tsv")
        held = {tuple(line.split("\t")) for line in read_lines(str(found[0]))}
        table = self._table(self.folder / MRPC_TRAIN, TRAIN)
        is_held = [ids in held for ids in zip(table.columns["#1 ID"], table.columns["#2 ID"], strict=True)]
        if not any(is_held):
            raise ValueError(f"{found[0]}: it lists no row of {MRPC_TRAIN}: bring GLUE's own")
        tables = {split: _rows_where(table, is_held, split == VALIDATION) for split in (TRAIN, VALIDATION)}
        test = self.folder / MRPC_TEST
        return tables | ({TEST: self._table(test, TEST)} if test.is_file() else {})

    def _examples(self, table: Table, split: str) -> Examples:
        texts = [table.columns[name] for name in self.layout.columns]
        for name, cells in zip(self.layout.columns, texts, strict=True):
            if empty := [row for row, cell in enumerate(cells) if not cell.strip()]:
                self.remarks.append(f"{table.place(empty[0])}: column {name!r} is empty, as in {len(empty)} rows: kept")
        is_test = split not in (TRAIN, VALIDATION, VALIDATION_MISMATCHED)
        index = next((name for name in ("index", "id") if name in table.columns), None) if is_test else None
        ids = list(range(len(table))) if index is None else [_index(table, row, index) for row in range(len(table))]
        labels = _labels(self.task, table, self.layout.label, _reading(self.task))
        return Examples(texts[0], texts[1] if self.task.pairs else None, labels, ids)


def _rows_where(table: Table, flags: Sequence[bool], wanted: bool) -> Table:
    rows = [row for row, flag in enumerate(flags) if flag == wanted]
    columns = {name: [cells[row] for row in rows] for name, cells in table.columns.items()}
    return Table(table.path, columns, [table.places[row] for row in rows], table.unit)


def _index(table: Table, row: int, column: str) -> int:
    cell = table.columns[column][row]
    if not cell.isdecimal():
        raise ValueError(f"{table.place(row)}: {cell!r} in column {column!r} is no number: bring GLUE's own file")
    return int(cell)


# Labels


def _labels(task: Task, table: Table, column: str, read: Callable[[Any], float | None]) -> np.ndarray | None:
    """Labels as numbers by `read`, which gives None for what is none; None where the column is not there."""
    if column not in table.columns:
        return None
    labels = [read(cell) for cell in table.columns[column]]
    if None in labels:
        row = labels.index(None)
        known = ", ".join(_words(task)) or f"a score from 0 to {HIGHEST_SCORE:g}"
        raise ValueError(
            f"{table.place(row)}: label {table.columns[column][row]!r:.80} is none of {task.name}'s ({known}): bring "
            "GLUE's own file"
        )
    return np.array(labels, np.int64 if task.classes else np.float32)


def _words(task: Task) -> tuple[str, ...]:
    """The classes as GLUE's files write them; none of a regression."""
    return task.classes if task.name in IN_WORDS else tuple(map(str, range(len(task.classes))))


def _reading(task: Task) -> Callable[[str], float | None]:
    """What a cell of GLUE's files means."""
    numbers = {word: number for number, word in enumerate(_words(task))}
    return numbers.get if task.classes else _score


def _score(cell: str | float) -> float | None:
    try:
        score = float(cell)
    except (TypeError, ValueError):
        return None
    return score if math.isfinite(score) and 0 <= score <= HIGHEST_SCORE else None


# As `datasets` has it


def _from_hub(name: str) -> dict[str, Dataset]:
    import datasets

    try:
        return dict(datasets.load_dataset(HUB_NAME, name))
    except (datasets.exceptions.DatasetsError, ConnectionError, ValueError, OSError) as error:
        raise ValueError(
            f"task.data: {HUB}: {first_line(error)}, and {datasets.config.HF_DATASETS_CACHE} does not hold it: where "
            f"there is a network run datasets.load_dataset({HUB_NAME!r}, {name!r}).save_to_disk('FOLDER'), bring "
            "FOLDER here and name it in task.data"
        ) from None


def _diagnostic(saved: Mapping[str, Dataset]) -> dict[str, Dataset]:
    return {DIAGNOSTIC: saved[TEST]} if TEST in saved else {}


def _hub_splits(task: Task, saved: dict[str, Dataset], place: str) -> dict[str, Examples]:
    """All splits that there are; train and validation must be."""
    matched = {f"{name}_matched": name for name in (VALIDATION, TEST)} if task.name == "mnli" else {}
    known = (*MNLI_FILES, DIAGNOSTIC) if task.name == "mnli" else (*SPLIT_FILES,)
    named = {matched.get(name, name): dataset for name, dataset in saved.items()}
    if missing := [name for name in (TRAIN, VALIDATION) if name not in named]:
        raise ValueError(f"{place}: no split {missing[0]!r}, only {', '.join(saved)}: save all of {HUB_NAME}'s")
    return {split: _hub_examples(task, named[split], f"{place}, {split}", split) for split in known if split in named}


def _hub_examples(task: Task, dataset: Dataset, place: str, split: str) -> Examples:
    columns = LAYOUTS[task.name].hub_columns
    table = dataset_table(dataset, place, columns, ("label", "idx"))
    for name in columns:
        for row, cell in enumerate(table.columns[name]):
            if not isinstance(cell, str):
                raise ValueError(f"{table.place(row)}: {cell!r:.80} in column {name!r} is no text: save {HUB_NAME}'s")
    is_test = split in (TEST, TEST_MISMATCHED, DIAGNOSTIC)
    ids = table.columns.get("idx") if is_test else None
    if "label" not in table.columns and not is_test:
        raise ValueError(f"{place}: no column 'label', only {', '.join(dataset.column_names)}: save {HUB_NAME}'s")
    is_labelled = not is_test or any(label not in UNLABELLED for label in table.columns.get("label", ()))
    labels = _labels(task, table, "label", _hub_reading(task)) if is_labelled else None
    texts = [table.columns[name] for name in columns]
    return Examples(texts[0], texts[1] if task.pairs else None, labels, ids or list(range(len(table))))


def _hub_reading(task: Task) -> Callable[[Any], float | None]:
    """What a label of `datasets` means: the name of a class, or its number."""
    numbers: dict[Any, int] = {name: number for number, name in enumerate(task.classes)}
    for number in range(len(task.classes)):
        numbers[number] = numbers[str(number)] = number
    return numbers.get if task.classes else _score


# What the server takes


def write_submission(folder: Path, task: Task, split: str, predictions: np.ndarray, ids: Sequence[int]) -> Path:
    """Write predictions for the rows of `split` into `folder`, as GLUE's server takes them, and give the file.

    Args:
        predictions: numbers of classes, or values [N]
        ids: Examples.ids of the rows

    Of all but GLUE's test sets the file is <split>.tsv, with classes by name and values as they are. Raises ValueError
    for what no prediction can be.
    """
    check_values(task, "predictions", predictions)
    name = SUBMISSIONS.get((task.name, split)) if TASKS.get(task.name) == task else None
    if task.classes:
        classes = task.classes if name is None else _words(task)
        cells = [classes[number] for number in predictions]
    elif name is None:
        cells = [str(value) for value in predictions]
    else:
        cells = [f"{value:.3f}" for value in np.clip(predictions, 0, HIGHEST_SCORE)]
    lines = ["index\tprediction", *(f"{number}\t{cell}" for number, cell in zip(ids, cells, strict=True))]
    path = folder / (name or f"{split}.tsv")
    with atomic_file(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
    return path
