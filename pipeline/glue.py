"""GLUE's files: each task's own columns, and the files that its server takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.files import atomic_file
from pipeline.tasks import DIAGNOSTIC, TASKS, TEST, TEST_MISMATCHED, Task

IN_WORDS = ("mnli", "qnli", "rte")
"""Tasks whose classes the server takes by name; those of the others by number."""

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

HIGHEST_SCORE = 5.0  # of STS-B, whose lowest is 0


def write_submission(folder: Path, task: Task, split: str, predictions: np.ndarray, ids: Sequence[int]) -> Path:
    """Write predictions for the rows of `split` into `folder`, as GLUE's server takes them, and give the file.

    Args:
        predictions: numbers of classes, or values [N]
        ids: Examples.ids of the rows

    Of all but GLUE's test sets the file is <split>.tsv, with classes by name and values as they are.
    """
    known = SUBMISSIONS.get((task.name, split)) if TASKS.get(task.name) == task else None
    if not task.classes:
        words = [f"{value:.3f}" for value in np.clip(predictions, 0, HIGHEST_SCORE)] if known else map(str, predictions)
    elif known and task.name not in IN_WORDS:
        words = map(str, predictions)
    else:
        words = [task.classes[number] for number in predictions]
    lines = ["index\tprediction", *(f"{id_}\t{word}" for id_, word in zip(ids, words, strict=True))]
    path = folder / (known or f"{split}.tsv")
    with atomic_file(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
    return path
