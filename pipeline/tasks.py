"""Downstream tasks: what is asked of a model after pretraining, in which files it lies, and how it is usually trained.

task_data.py reads and encodes tasks, glue.py knows GLUE's files, task_metrics.py measures predictions.

Legend: N rows.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import numpy as np
from pydantic import Field as Bounds
from pydantic import PositiveInt

from data_prep.recipes import Rule

HUB = "hub"
OWN = "own"
VALIDATION, VALIDATION_MISMATCHED = "validation", "validation_mismatched"
TRAIN, TEST, TEST_MISMATCHED, DIAGNOSTIC = "train", "test", "test_mismatched", "diagnostic"

OpenShare = Annotated[float, Bounds(gt=0, lt=1)]


@dataclass(frozen=True)
class TaskSettings:
    """The task and where its rows are: one of GLUE's by its name, or files of one's own."""

    name: str | None = None
    """One of GLUE's tasks: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli; null: files of one's own."""

    data: str | None = None
    """Of GLUE: hub, a folder in GLUE's own layout (it holds CoLA/train.tsv and so on), or a folder that `datasets`
    saved; of one's own rows: such a saved folder, or null, where train names a file."""

    train: str | None = None
    """File of one's own rows to learn from: .csv, .tsv, .jsonl or .parquet; all but parquet also as .gz, .bz2, .zst."""

    validation: str | None = None
    """File of rows to choose the best checkpoint by; null: a share of those to learn from."""

    test: str | None = None
    """File of rows to write predictions for, with or without labels; null: none."""

    validation_share: OpenShare = 0.1
    """Share of the rows to learn from that validates where nothing else does, chosen by a hash of their text."""

    text: str = "text"
    """Column of one's own rows that holds the text."""

    text_pair: str | None = None
    """Column that holds the second text of a pair; null: no pairs."""

    label: str = "label"
    """Column that holds the class, in words or numbers, or the value to predict."""

    kind: Literal["classification", "regression"] | None = None
    """What labels are; null: values to predict where they are numbers with a decimal point, else classes."""

    delimiter: str | None = None
    """What parts the cells of a row in .csv and .tsv; null: a tab in .tsv, in .csv what gives the columns named."""

    limit: PositiveInt | None = None
    """Rows of each split to keep, chosen by a hash of their text, for a quick look; null: all."""


@dataclass(frozen=True)
class Task:
    """What is asked of the model.

    Attributes:
        name: of TASKS, or OWN.
        classes: their names, in the order of the labels' numbers; none: a value is to be predicted.
        metrics: what is measured, of task_metrics.METRICS; the first picks the best checkpoint. More is better in all.
        pairs: whether two texts make a row.
    """

    name: str
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    pairs: bool


@dataclass(frozen=True)
class Examples:
    """N rows of a task.

    Attributes:
        texts: the first or only text of every row.
        pairs: the second texts; None where the task has none.
        labels: classes, int64 [N], or values, float32 [N]; None where they are not given, as in GLUE's test sets.
        ids: what a submission calls the rows: GLUE's own index, else the row's number in its file, from 0.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: np.ndarray | None
    ids: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def chosen(self, rows: np.ndarray) -> Examples:
        """The rows with these numbers, in their order."""
        pairs = None if self.pairs is None else [self.pairs[row] for row in rows]
        labels = None if self.labels is None else self.labels[rows]
        return Examples([self.texts[row] for row in rows], pairs, labels, [self.ids[row] for row in rows])


@dataclass(frozen=True)
class TaskData:
    """A task and its rows.

    Attributes:
        task: what is asked.
        splits: "train" and "validation" always; also "test" where it is given, and of MNLI "validation_mismatched",
            "test_mismatched" and "diagnostic". Rows of the first two have labels.
        fingerprint: xxh3-128 of task and rows, in hexadecimal: equal where a run may be resumed.
        remarks: what is worth telling once about the rows, a line each: rows left out, rows in train and validation.
    """

    task: Task
    splits: Mapping[str, Examples]
    fingerprint: str
    remarks: tuple[str, ...] = ()


_ENTAILMENT = ("entailment", "not_entailment")
_F1 = ("f1", "accuracy")

TASKS = {
    task.name: task
    for task in (
        Task("cola", ("unacceptable", "acceptable"), ("matthews",), pairs=False),
        Task("sst2", ("negative", "positive"), ("accuracy",), pairs=False),
        Task("mrpc", ("not_equivalent", "equivalent"), _F1, pairs=True),
        Task("stsb", (), ("pearson", "spearman"), pairs=True),
        Task("qqp", ("not_duplicate", "duplicate"), _F1, pairs=True),
        Task("mnli", ("entailment", "neutral", "contradiction"), ("accuracy",), pairs=True),
        Task("qnli", _ENTAILMENT, ("accuracy",), pairs=True),
        Task("rte", _ENTAILMENT, ("accuracy",), pairs=True),
        Task("wnli", _ENTAILMENT[::-1], ("accuracy",), pairs=True),
    )
}
"""GLUE's nine tasks (Wang et al., ICLR 2019), classes numbered as everywhere."""


def own_task(classes: tuple[str, ...], pairs: bool) -> Task:
    """The task of rows of one's own. F1 is told of two classes, for the second of them."""
    if not classes:
        return Task(OWN, (), ("pearson", "spearman"), pairs)
    return Task(OWN, classes, ("accuracy", "macro_f1", "f1")[: 3 if len(classes) == 2 else 2], pairs)


PUBLISHED_EPOCHS = {
    "cola": 50,
    "sst2": 10,
    "mrpc": 20,
    "stsb": 20,
    "qqp": 5,
    "mnli": 5,
    "qnli": 10,
    "rte": 20,  # SpikeLM's
    "wnli": 3,  # which SpikeLM leaves out: BERT's (Devlin et al. 2019), for all of its tasks
}
"""Passes over the rows of each of TASKS, where its numbers were published."""


def task_faults(settings: TaskSettings) -> Iterator[str]:
    """What of the settings cannot be right together, one line each; files are looked for, but not read."""
    if settings.name is None:
        yield from _own_faults(settings)
    else:
        yield from _glue_faults(settings)


def _glue_faults(settings: TaskSettings) -> Iterator[str]:
    name, data = settings.name, settings.data
    if name not in TASKS:
        close = difflib.get_close_matches(name.lower(), TASKS, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        yield f"task.name: {name!r} is unknown: {meant}Known are {', '.join(TASKS)}; null is for files of your own"
    if data is None:
        yield f"task.data: missing: name the folder that holds GLUE's {name}, or {HUB}"
    elif data != HUB and not os.path.isdir(data):
        yield f"task.data: {data!r} is no folder: name one with GLUE's files, one that datasets saved, or {HUB}"
    for field in fields(TaskSettings):
        value = getattr(settings, field.name)
        if field.name not in ("name", "data", "limit") and value != field.default:
            yield f"task.{field.name}: {value!r} has no effect on GLUE's {name}: leave it out, or set task.name to null"


def _own_faults(settings: TaskSettings) -> Iterator[str]:
    data, files = settings.data, {name: getattr(settings, name) for name in (TRAIN, VALIDATION, TEST)}
    if data is None and settings.train is None:
        yield "task.train: missing: name a file of your own rows, or one of GLUE's tasks in task.name"
    if data == HUB:
        yield f"task.data: {HUB} has GLUE alone: name a task in task.name, or save your dataset with save_to_disk"
    elif data is not None and not os.path.isdir(data):
        yield f"task.data: {data!r} is no folder: name one that datasets saved, or a file in task.train"
    for name, path in files.items():
        if path is not None and data is not None:
            yield f"task.{name}: {path!r} has no effect beside task.data: leave one of them out"
        elif path is not None and not os.path.isfile(path):
            yield f"task.{name}: {path!r} is no file: name one that exists"
    if settings.delimiter is not None and (len(settings.delimiter) != 1 or settings.delimiter in '"\r\n'):
        yield (
            f"task.delimiter: {settings.delimiter!r} is not one character that can part cells: use , or ; or | or a "
            'tab, which is written "\\t"'
        )
    columns = [settings.text, settings.label] + [settings.text_pair] * (settings.text_pair is not None)
    for column in sorted({column for column in columns if columns.count(column) > 1}):
        yield f"task.text, task.text_pair, task.label: {column!r} stands twice: each needs a column of its own"


TASK_RULE = Rule(
    tuple(f"task.{field.name}" for field in fields(TaskSettings)), lambda *values: task_faults(TaskSettings(*values))
)
"""Everything about a recipe's section `task` that one field's type cannot say."""
