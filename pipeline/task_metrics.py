"""How good predictions are: the metrics of tasks, each defined for all predictions, and what no model at all reaches.

Legend: N rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

from pipeline.tasks import Examples, Task

NEARLY_CONSTANT = 1e-13  # spread, relative to the mean, at which a correlation is rounding alone


def compute_metrics(task: Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics by name, in their order, each a share or correlation: 1 is perfect.

    Args:
        predictions: numbers of classes [N], or values [N]
        labels: the same of the rows themselves

    Where a metric has no value, as a correlation with a constant or F1 of a class that neither has, it is 0.
    Raises ValueError where predictions or labels are not what the task has.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    for name, values in {"predictions": predictions, "labels": labels}.items():
        check_values(task, name, values)
    if len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels: give one for each")
    return {name: float(METRICS[name](predictions, labels)) for name in task.metrics}


def baseline_metrics(task: Task, train: Examples, validation: Examples) -> dict[str, float]:
    """The metrics of the trivial prediction: the most frequent class of `train` (the first of several), or the mean."""
    answer = np.bincount(train.labels).argmax() if task.classes else train.labels.mean(dtype=np.float64)
    return compute_metrics(task, np.full(len(validation), answer), validation.labels)


def check_values(task: Task, name: str, values: np.ndarray) -> None:
    """ValueError where `values` cannot be labels or predictions of a task."""
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} have the shape {list(values.shape)}: give one for each of some rows")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: {np.sum(~np.isfinite(values))} of {len(values)} are NaN or infinite")
    count = len(task.classes)
    if count and not (values.dtype.kind in "iu" and ((values >= 0) & (values < count)).all()):
        raise ValueError(
            f"{name}: {values.dtype} from {values.min()} to {values.max()}: {count} classes have numbers "
            f"from 0 to {count - 1}"
        )


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return np.mean(predictions == labels)


def _f1_of(number: int, predictions: np.ndarray, labels: np.ndarray) -> float:
    """Twice what both call the class, as a share of what either calls so; 0 where neither does."""
    predicted, true = predictions == number, labels == number
    return 2 * np.sum(predicted & true) / max(np.sum(predicted) + np.sum(true), 1)


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Of the second of two classes."""
    return _f1_of(1, predictions, labels)


def _macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes that labels or predictions have."""
    return np.mean([_f1_of(number, predictions, labels) for number in np.union1d(predictions, labels)])


def _pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' coefficient as well: of two classes it is the correlation of their numbers."""
    doubles = [values.astype(np.float64) for values in (predictions, labels)]
    scaled = [values / max(np.abs(values).max(), np.finfo(np.float64).tiny) for values in doubles]
    if any(np.std(values) <= NEARLY_CONSTANT * abs(np.mean(values)) for values in scaled):
        return 0.0
    return stats.pearsonr(*scaled).statistic


def _spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    return _pearson(stats.rankdata(predictions), stats.rankdata(labels))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews": _pearson,
    "pearson": _pearson,
    "spearman": _spearman,
}
"""Each of predictions and labels [N]."""
