"""Metrics of tasks against formulas written out once more, and where these have no value."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.task_metrics import METRICS, baseline_metrics, compute_metrics
from pipeline.tasks import TASKS, Examples, own_task


def matthews(predictions, labels):
    """Matthews, 1975, of the four counts."""
    tp, tn = np.sum(predictions & labels), np.sum((1 - predictions) & (1 - labels))
    fp, fn = np.sum(predictions & (1 - labels)), np.sum((1 - predictions) & labels)
    root = math.sqrt(float(tp + fp) * float(tp + fn) * float(tn + fp) * float(tn + fn))
    return (tp * tn - fp * fn) / root if root else 0.0


def f1(predictions, labels, number=1):
    """The harmonic mean of precision and recall."""
    hits = sum(p == number and l == number for p, l in zip(predictions, labels, strict=True))
    if not hits:
        return 0.0
    precision = hits / sum(p == number for p in predictions)
    recall = hits / sum(l == number for l in labels)
    return 2 / (1 / precision + 1 / recall)


def pearson(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    covariance = np.mean(a * b) - a.mean() * b.mean()
    return covariance / math.sqrt((np.mean(a * a) - a.mean() ** 2) * (np.mean(b * b) - b.mean() ** 2))


def ranks(values):
    """Of equal values the mean of their ranks."""
    return [np.mean([rank for rank, other in enumerate(sorted(values)) if other == value]) for value in values]


SEEDS = range(5)


@pytest.mark.parametrize("seed", SEEDS)
def test_metrics_of_two_classes(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 200)
    predictions = np.where(rng.random(200) < 0.7, labels, 1 - labels)
    accuracy = sum(p == l for p, l in zip(predictions, labels, strict=True)) / 200
    expected = {
        "cola": {"matthews": matthews(predictions, labels)},
        "sst2": {"accuracy": accuracy},
        "mrpc": {"f1": f1(predictions, labels), "accuracy": accuracy},
        "qqp": {"f1": f1(predictions, labels), "accuracy": accuracy},
        **dict.fromkeys(("qnli", "rte", "wnli"), {"accuracy": accuracy}),
    }
    for name, values in expected.items():
        measured = compute_metrics(TASKS[name], predictions, labels)
        assert list(measured) == list(values) and measured == pytest.approx(values, abs=1e-12)
    macro = (f1(predictions, labels, 0) + f1(predictions, labels, 1)) / 2
    own = compute_metrics(own_task(("a", "b"), pairs=False), predictions, labels)
    assert own == pytest.approx({"accuracy": accuracy, "macro_f1": macro, "f1": f1(predictions, labels)}, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_metrics_of_several_classes(seed):
    rng = np.random.default_rng(seed)
    labels, predictions = rng.integers(0, 3, 60), rng.integers(1, 4, 60)
    own = own_task(tuple("abcde"), pairs=False)  # a is never predicted, d predicted alone, e is nowhere
    expected = {
        "accuracy": np.sum(labels == predictions) / 60,
        "macro_f1": sum(f1(predictions, labels, number) for number in range(4)) / 4,
    }
    assert compute_metrics(own, predictions, labels) == pytest.approx(expected, abs=1e-12)
    three = predictions % 3
    assert compute_metrics(TASKS["mnli"], three, labels) == {"accuracy": np.mean(three == labels)}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("task", [TASKS["stsb"], own_task((), pairs=False)])
def test_metrics_of_values(task, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 26, 80) / np.float32(5)  # with ties
    predictions = (labels + rng.normal(0, 2, 80)).astype(np.float32)
    expected = {"pearson": pearson(predictions, labels), "spearman": pearson(ranks(predictions), ranks(labels))}
    assert compute_metrics(task, predictions, labels) == pytest.approx(expected, abs=1e-6)
    assert compute_metrics(task, 3 - labels, labels) == pytest.approx({"pearson": -1.0, "spearman": -1.0})


@pytest.mark.parametrize("value", [0.0, 2.7, -1e-30, 3e38])
def test_a_constant_says_nothing(value):
    labels, constant = np.array([0.5, 1.5, 4.0], np.float32), np.full(3, value, np.float32)
    for given_ in ((constant, labels), (labels, constant), (constant, constant)):
        assert compute_metrics(TASKS["stsb"], *given_) == {"pearson": 0.0, "spearman": 0.0}
    assert compute_metrics(TASKS["stsb"], labels[:1], labels[:1]) == {"pearson": 0.0, "spearman": 0.0}
    classes, ones = np.array([1, 0, 1]), np.ones(3, np.int64)
    assert compute_metrics(TASKS["cola"], ones, classes) == {"matthews": 0.0}
    assert compute_metrics(TASKS["mrpc"], 0 * ones, classes) == {"f1": 0.0, "accuracy": pytest.approx(1 / 3)}
    assert compute_metrics(TASKS["mrpc"], 0 * ones, 0 * ones) == {"f1": 0.0, "accuracy": 1.0}


VALUES = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(rows=st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=8))
def test_metrics_of_values_are_always_defined(rows):
    predictions, labels = np.array(rows, np.float32).T
    for value in compute_metrics(TASKS["stsb"], predictions, labels).values():
        assert -1.0 <= value <= 1.0


@given(rows=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=8))
def test_metrics_of_classes_are_always_defined(rows):
    predictions, labels = np.array(rows).T
    for name in ("accuracy", "f1", "macro_f1", "matthews"):
        assert -1.0 <= METRICS[name](predictions, labels) <= 1.0


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([0, 1, 2], [0, 1, 1], "predictions: int64 from 0 to 2: 2 classes have numbers from 0 to 1"),
        ([0, 1, 1], [0, -100, 1], "labels: int64 from -100 to 1: 2 classes"),
        ([0.0, 1.0, 1.0], [0, 1, 1], "predictions: float64 from 0.0 to 1.0: 2 classes"),
        ([0, 1], [0, 1, 1], "2 predictions for 3 labels: give one for each"),
        ([[0, 1]], [0], r"predictions have the shape \[1, 2\]: give one for each of some rows"),
        ([], [], r"predictions have the shape \[0\]"),
        ([math.nan, 1.0, math.inf], [0, 1, 1], "predictions: 2 of 3 are NaN or infinite"),
    ],
)
def test_what_cannot_be_measured(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(TASKS["cola"], np.array(predictions), np.array(labels))


def examples(labels):
    return Examples([""] * len(labels), None, labels, list(range(len(labels))))


def test_what_no_model_reaches():
    train, validation = examples(np.array([1, 1, 0, 2, 2])), examples(np.array([0, 1, 1, 2]))
    assert baseline_metrics(TASKS["mnli"], train, validation) == {"accuracy": 0.5}  # 1 comes before 2
    train, validation = examples(np.array([1, 1, 0])), examples(np.array([0, 1, 1, 1]))
    assert baseline_metrics(TASKS["mrpc"], train, validation) == {"f1": pytest.approx(6 / 7), "accuracy": 0.75}
    assert baseline_metrics(TASKS["cola"], train, validation) == {"matthews": 0.0}
    values = examples(np.array([0.1, 0.7, 4.9], np.float32))
    assert baseline_metrics(TASKS["stsb"], values, values) == {"pearson": 0.0, "spearman": 0.0}
