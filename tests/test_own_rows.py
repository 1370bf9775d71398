"""Rows of one's own, from every kind of file, and what is said of those that cannot work."""

import bz2
import gzip
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.task_data import open_task
from pipeline.tasks import TaskSettings

ROWS = [("fine, really", "good"), ('he said "no"', "bad"), ("two\nlines", "good"), ("naïve\u2028日本\x85 ", "bad")]


def write_csv(path, rows, header=("text", "label"), delimiter=","):
    quoted = [['"' + str(cell).replace('"', '""') + '"' for cell in row] for row in rows]
    path.write_text("".join(delimiter.join(row) + "\n" for row in [header, *quoted]))
    return str(path)


def write_json(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def own(train, validation=None, **settings):
    return open_task(TaskSettings(train=str(train), validation=str(validation or train), **settings))


def rows_of(examples):
    return list(zip(examples.texts, examples.labels.tolist(), strict=True))


EXPECTED = [(text, int(label == "good")) for text, label in ROWS]


@pytest.fixture
def files(tmp_path):
    """The same rows in every kind of file."""
    comma = write_csv(tmp_path / "a.csv", ROWS)
    semicolon = write_csv(tmp_path / "b.csv", ROWS, delimiter=";")
    tab = write_csv(tmp_path / "c.tsv", ROWS, delimiter="\t")
    lines = write_json(tmp_path / "d.jsonl", [{"id": 7, "text": text, "label": label} for text, label in ROWS])
    table = pa.table({"label": [label for _, label in ROWS], "text": [text for text, _ in ROWS]})
    pq.write_table(table, tmp_path / "e.parquet")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    (tmp_path / "d.jsonl.bz2").write_bytes(bz2.compress((tmp_path / "d.jsonl").read_bytes()))
    with pa.output_stream(tmp_path / "c.tsv.zst", compression="zstd") as stream:
        stream.write((tmp_path / "c.tsv").read_bytes())
    (tmp_path / "windows.csv").write_bytes(
        b"\xef\xbb\xbf" + b"\r\n".join((tmp_path / "b.csv").read_bytes().rsplit(b"\n", 2))
    )
    names = ("e.parquet", "a.csv.gz", "d.jsonl.bz2", "c.tsv.zst", "windows.csv")
    return [comma, semicolon, tab, lines, *(str(tmp_path / name) for name in names)]


def test_every_kind_of_file_gives_the_same_rows(files):
    read = [own(path) for path in files]
    assert [rows_of(data.splits["train"]) for data in read] == [EXPECTED] * len(files)
    assert {data.fingerprint for data in read} == {read[0].fingerprint}
    assert read[0].task.classes == ("bad", "good") and read[0].task.metrics == ("accuracy", "macro_f1", "f1")
    assert read[0].remarks == ("4 of 4 rows of validation have the text of a row of train",)


def test_columns_of_ones_own(tmp_path):
    rows = [("a", "b", 3), ("c", "d", 20), ("e", "f", 3)]
    train = write_csv(tmp_path / "a.csv", rows, ("first", "second", "stars"), "|")
    test = write_csv(tmp_path / "test.csv", [("x", "y")], ("first", "second"), "|")
    data = own(train, text="first", text_pair="second", label="stars", test=test, delimiter="|")
    assert data.task.classes == ("3", "20") and data.task.pairs  # numbers in their order
    assert data.splits["train"].pairs == ["b", "d", "f"] and data.splits["train"].labels.tolist() == [0, 1, 0]
    assert data.splits["test"].labels is None and data.splits["test"].texts == ["x"]


def test_classes_may_be_numbers_or_truths(tmp_path):
    mixed = write_json(tmp_path / "a.jsonl", [{"text": "a", "label": label} for label in (1, 2.0, "1", " 2")])
    assert own(mixed, kind="classification").splits["train"].labels.tolist() == [0, 1, 0, 1]
    truths = write_json(tmp_path / "b.jsonl", [{"text": "a", "label": label} for label in (True, False)])
    assert own(truths).task.classes == ("false", "true")
    three = write_csv(tmp_path / "c.csv", [("a", label) for label in "xyz"])
    assert own(three).task.metrics == ("accuracy", "macro_f1")


@pytest.mark.parametrize(
    ("labels", "kind", "is_regression"),
    [
        (["0.5", "2", "-1e-3"], None, True),
        (["1", "2", "3"], None, False),
        (["1", "2", "3"], "regression", True),
        (["1.5", "2.5", "n/a"], None, False),
        (["1.0", "2.0", "1.0"], "classification", False),
    ],
)
def test_what_labels_are(tmp_path, labels, kind, is_regression):
    data = own(write_csv(tmp_path / "a.csv", [(f"text {label}", label) for label in labels]), kind=kind)
    assert (data.task.classes == ()) == is_regression
    if is_regression:
        assert data.task.metrics == ("pearson", "spearman")
        assert data.splits["train"].labels.tolist() == np.array(labels, np.float32).tolist()
    guessed = [remark for remark in data.remarks if "task.kind" in remark]
    assert guessed == (
        ["labels such as '0.5' are taken for values to predict: see task.kind"] if "0.5" in labels else []
    )


def test_a_folder_of_datasets(tmp_path):
    features = datasets.Features(
        {"review": datasets.Value("string"), "stars": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = datasets.Dataset.from_dict({"review": ["a", "b", "c"], "stars": [1, 0, 1]}, features)
    hidden = datasets.Dataset.from_dict({"review": ["d"], "stars": [-1]}, features)
    splits = {"train": rows, "validation": rows, "test": hidden, "extra": rows}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "a")
    data = open_task(TaskSettings(data=str(tmp_path / "a"), text="review", label="stars"))
    assert data.task.classes == ("no", "yes") and data.splits["train"].labels.tolist() == [1, 0, 1]
    assert data.splits["test"].labels is None and list(data.splits) == ["train", "validation", "test"]
    assert data.remarks[0] == f"{tmp_path}/a: of its splits extra are not used, only train, validation, test"
    many = datasets.Dataset.from_dict({"review": list("abcdefghij"), "stars": [0, 1] * 5}, features)
    many.save_to_disk(tmp_path / "b")  # without splits
    data = open_task(TaskSettings(data=str(tmp_path / "b"), text="review", label="stars", validation_share=0.5))
    assert list(data.splits) == ["train", "validation"] and sum(map(len, data.splits.values())) == 10
    (tmp_path / "b" / "data-00000-of-00001.arrow").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="b: broken: .*: save it again"):
        open_task(TaskSettings(data=str(tmp_path / "b"), text="review", label="stars"))
    datasets.DatasetDict({"dev": hidden}).save_to_disk(tmp_path / "c")
    with pytest.raises(ValueError, match="c: it holds the splits dev, but no train: save it with one"):
        open_task(TaskSettings(data=str(tmp_path / "c")))
    with pytest.raises(ValueError, match="it holds neither dataset_dict.json nor state.json"):
        open_task(TaskSettings(data=str(tmp_path)))


# What cannot work: the file's name and content, and the error with the place

TABLES = [
    ("a.csv", "", "a.csv: it is empty: name another file"),
    ("a.csv", "text,label\ra,good\rb,bad\r", "a.csv: its first line is not CSV: .*, and end lines by a line feed"),
    ("a.csv", "text,label\n", "a.csv: it holds no rows: name another file"),
    ("a.csv", "a fine day,good\na bad day,bad\n", "no column 'text', only 'a fine day', 'good': set task.text, .* the"),
    ("a.csv", "text,label,text\na,b,c\n", "a.csv: the column 'text' stands 2 times: rename all but one"),
    ("a.csv", "text,label\na,b,c\n", "a.csv, line 2: 3 cells, but 2 columns, with delimiter ',': mend the row"),
    ("a.csv", 'text,label\n"a,good\nb,bad\n', "a.csv, line 2: not CSV: .*: close every double quote"),
    ("a.csv", "text,label\na,good\n ,bad\n,bad\n", "line 3: column 'text' is empty there, as in 2 of 3 rows: fill the"),
    ("a.csv", "text,label\na,\nb,\n", "line 2: column 'label' is empty there, as in all rows"),
    ("a.csv", "text,label\na,good\nb,good\n", "column 'label' has one class alone, 'good': name another by task.label"),
    (
        "a.csv",
        "text,label\n" + "".join(f"{n},w{n}\n" for n in range(30)),
        "has 30 different labels in 30 rows, as 'w0'",
    ),
    ("a.tsv", "text,label\na,good\nb,bad\n", r"a.tsv: the delimiter is ',', not '\\t': set task.delimiter"),
    ("a.jsonl", '{"text": "a"\n', "a.jsonl, line 1: not JSON: .*: write one object a line"),
    ("a.jsonl", "[1]\n", "a.jsonl, line 1: a list, not an object: write one object a line"),
    (
        "a.jsonl",
        '{"text": 3, "label": "x"}\n\n{"text": "b", "label": "y"}',
        "line 1: 3 in column 'text' is int, not text",
    ),
    (
        "a.jsonl",
        '{"text": "a", "label": "x"}\n\n{"text": "b"}\n{"text": "c", "label": "y"}',
        "line 3: column 'label' is empty there, as in 1 of 3 rows",
    ),
    ("a.jsonl", '{"text": "\\ud83d", "label": "x"}', "line 1: half a surrogate pair, which no text has"),
    ("a.jsonl", '{"body": "a", "label": "x"}', "a.jsonl: no column 'text', only 'body', 'label': set task.text"),
    ("a.xlsx", "PK", "a.xlsx: .xlsx says no known kind of file: name it .csv, .tsv, .jsonl, .parquet"),
    ("a", "text,label", "a: no suffix says no known kind of file"),
    ("a.parquet", "PAR1 and more", "a.parquet: broken parquet: .*: fetch it again"),
    ("a.csv.gz", "text,label\na,b\n", "a.csv.gz: cannot be read: .*: fetch it again"),
]


@pytest.mark.parametrize(("name", "content", "message"), TABLES)
def test_files_that_cannot_work(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        own(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\na,b\nschön,c\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.csv, line 3: invalid UTF-8 \(byte 0xf6\): convert the file to UTF-8"):
        own(tmp_path / "a.csv")
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xf6")]
    )
    pq.write_table(pa.table({"text": broken, "label": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: invalid UTF-8: .*: write the file again, in UTF-8"):
        own(tmp_path / "a.parquet")


def test_a_parquet_file_that_is_cut(files):
    path = next(path for path in files if path.endswith("parquet"))
    with open(path, "rb+") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match="e.parquet: broken parquet: "):
        own(path)


def test_an_open_quote_takes_up_no_rows(tmp_path):
    rows = [f"{index}\tsome text {index}\tyes" for index in range(40)]
    rows[3], rows[34] = '3\t"some text 3\tno', '34\tsome text\tno"'
    path = tmp_path / "open.tsv"
    path.write_text("\n".join(["id\ttext\tlabel", *rows]) + "\n")
    with pytest.raises(ValueError, match=r"open.tsv, line 5: a cell that begins .* ends in line 36: double the quotes"):
        own(path)


@pytest.mark.parametrize("label", [[0], {"a": 0}, "one\ntwo"])
def test_what_names_no_class(tmp_path, label):
    path = write_json(tmp_path / "a.jsonl", [{"text": f"text {i}", "label": i % 2 if i else label} for i in range(8)])
    with pytest.raises(ValueError, match="a.jsonl, line 1: in column 'label' .* names no class: write a word"):
        own(path, kind="classification")


def test_a_label_that_is_nan_is_an_empty_one(tmp_path):
    labels = pa.array([0.0, 1.0, float("nan"), 1.0])
    pq.write_table(pa.table({"text": list("abcd"), "label": labels}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet, row 2: column 'label' is empty there, as in 1 of 4 rows"):
        own(tmp_path / "a.parquet", kind="classification")


def test_labels_that_do_not_match(tmp_path):
    train = write_csv(tmp_path / "train.csv", [("a", "good"), ("b", "bad")])
    other = write_csv(tmp_path / "other.csv", [("c", "good"), ("d", "neutral")])
    with pytest.raises(
        ValueError, match="other.csv, line 3: in column 'label' class 'neutral' is none of 'bad', 'good'"
    ):
        own(train, other)
    with pytest.raises(ValueError, match="train.csv, line 2: in column 'label' 'good' is no finite number of 32 bits"):
        own(train, kind="regression")
    values = write_csv(tmp_path / "values.csv", [("a", "0.5"), ("b", "nan")])
    with pytest.raises(ValueError, match="values.csv, line 3: in column 'label' 'nan' is no finite number"):
        own(values, kind="regression")
    large = write_csv(tmp_path / "large.csv", [("a", "3.4e38"), ("b", "-1e39")])
    with pytest.raises(ValueError, match="large.csv, line 3: in column 'label' '-1e39' is no finite number of 32 bits"):
        own(large)


def test_a_wrong_delimiter_is_told_from_a_wrong_column(tmp_path):
    path = write_csv(tmp_path / "a.csv", ROWS, delimiter=";")
    with pytest.raises(ValueError, match="a.csv: the delimiter is ';', not ',': set task.delimiter"):
        own(path, delimiter=",")
    with pytest.raises(ValueError, match="a.csv: no column 'body', only 'text', 'label': set task.text"):
        own(path, text="body")
