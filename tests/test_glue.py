"""GLUE's nine tasks from a miniature of their real layout, from folders of `datasets`, and what its server takes."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest

from pipeline.glue import write_submission
from pipeline.task_data import open_task
from pipeline.tasks import PUBLISHED_EPOCHS, TASKS, TaskSettings
from tests.glue_files import QUOTE, write_glue, write_rows


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    return write_glue(tmp_path_factory.mktemp("glue"))


def read(name, folder, **settings):
    return open_task(TaskSettings(name=name, data=str(folder), **settings))


# Rows by split as (first text, second text, label), of rows that were not left out.
SINGLE = {
    "cola": {
        "train": [("The baker sold it .", 1), ("Them sold it .", 0), (QUOTE, 1), ("Milk the cat drank of .", 0)],
        "validation": [("The nurse closed the window .", 1), ("Slept she the .", 0)],
        "test": [("Anna walked home .", None), ("Walked Anna home to .", None)],
    },
    "sst2": {
        "train": [("dull from the first scene ", 0), ("a warm little film ", 1), (QUOTE, 0)],
        "validation": [("funny and kind . ", 1), ("slow and empty ", 0)],
        "test": [("noise without a plot ", None), ("well worth a look ", None)],
    },
}
_ENTAILMENT = {
    "train": [("When did it end ?", QUOTE, 1), ("Who ran ?", "The man ran .", 0)],
    "validation": [("What came ?", "A law came .", 0)],
    "test": [("What is it ?", "It is a shirt .", None), ("Is it ?", "It is not .", None)],
}
PAIRS = {
    "mrpc": {
        "train": [("The mayor blamed them .", QUOTE, 1), ("They owned it .", "It fell .", 0)],
        "validation": [("He said so .", "So he said .", 1)],
        "test": [("The price rose .", "Prices went up .", None)],
    },
    "stsb": {
        "train": [
            ("A boat leaves .", "A ship leaves .", 5.0),
            ("A man .", QUOTE, np.float32(3.8)),
            ("Three cats .", "Two dogs .", 0.0),
        ],
        "validation": [("A cook with a pan .", "A cook and a pan .", np.float32(4.2)), ("A road .", "A river .", 0.75)],
        "test": [("A boy reads a book .", "A boy holds a book .", None)],
    },
    "qqp": {
        "train": [("How is life ?", QUOTE, 0), ("Why ?", "What for ?", 1)],
        "validation": [("Why so ?", "Why not ?", 0)],
        "test": [("Would it rain ?", "Could it rain ?", None), ("A ?", "", None)],
    },
    "mnli": {
        "train": [
            ("It has two sides .", QUOTE, 1),
            ("They lost .", "They won .", 2),
            ("Our neighbour came .", "Someone came .", 0),
        ],
        "validation": [("The rules are new .", "All know the rules .", 1)],
        "validation_mismatched": [("Thank you for it .", "We are glad of it .", 0)],
        "test": [("Tea is sold here .", "They sell a drink .", None), ("The hall is old .", "No .", None)],
        "test_mismatched": [("What do you choose ?", "You should choose .", None)],
        "diagnostic": [
            ("The dog slept .", "It did not sleep .", None),
            ("It did not sleep .", "The dog slept .", None),
        ],
    },
    "qnli": _ENTAILMENT,
    "rte": _ENTAILMENT,
    "wnli": {  # where alone 1 is entailment
        "train": [("When did it end ?", QUOTE, 0), ("Who ran ?", "The man ran .", 1)],
        "validation": [("What came ?", "A law came .", 1)],
        "test": [("What is it ?", "It is a shirt .", None), ("Is it ?", "It is not .", None)],
    },
}
EXPECTED = SINGLE | PAIRS


CLASSES = {
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "stsb": (),
    "qqp": ("not_duplicate", "duplicate"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
    "wnli": ("not_entailment", "entailment"),
}


def rows_of(examples):
    columns = [examples.texts, *([] if examples.pairs is None else [examples.pairs])]
    labels = [None] * len(examples) if examples.labels is None else examples.labels.tolist()
    return list(zip(*columns, labels, strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_each_task_is_read_as_it_lies_in_glues_folder(glue, name):
    data = read(name, glue)
    assert data.task == TASKS[name] and data.task.classes == CLASSES[name]
    assert {split: rows_of(examples) for split, examples in data.splits.items()} == EXPECTED[name]
    kind = np.int64 if data.task.classes else np.float32
    assert all(each.labels is None or each.labels.dtype == kind for each in data.splits.values())
    last = 9847 if name == "mnli" else len(data.splits["test"]) - 1
    assert data.splits.get("test_mismatched", data.splits["test"]).ids[-1] == last
    assert set(PUBLISHED_EPOCHS) == set(TASKS)


def test_rows_that_are_cut_in_two_are_left_out_and_told(glue):
    path = glue / "QQP"
    assert read("qqp", glue).remarks == (
        f"{path}/train.tsv, line 3: 4 cells, but 6 columns: left out, 1 of 3 rows",
        f"{path}/test.tsv, line 3: column 'question2' is empty, as in 1 rows: kept",
    )


def test_empty_lines_at_the_end_are_no_rows(glue):
    for name in ("train", "test"):
        path = glue / f"SST-2/{name}.tsv"
        path.write_bytes(path.read_bytes() + b"\n\r\n")
    data = read("sst2", glue)
    assert not data.remarks and not any(text.strip() == "" for text in data.splits["test"].texts)


def test_paraphrases_as_microsoft_has_them(tmp_path):
    header = ("\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String")
    train = [header, (1, 10, 20, "A .", QUOTE), (0, 11, 21, "B .", "b ."), (1, 12, 22, "C .", "c .")]
    write_rows(tmp_path / "MRPC/msr_paraphrase_train.txt", *train, end="\r\n")
    write_rows(tmp_path / "MRPC/msr_paraphrase_test.txt", header, (0, 13, 23, "D .", "d ."), end="\r\n")
    for name in ("mrpc_dev_ids.tsv", "dev_ids.tsv"):
        with pytest.raises(ValueError, match="dev_ids.tsv does not exist: bring it, or GLUE's train.tsv and dev.tsv"):
            read("mrpc", tmp_path)
        write_rows(tmp_path / "MRPC" / name, (11, 21), (99, 98))
        splits = read("mrpc", tmp_path).splits
        assert {split: rows_of(examples) for split, examples in splits.items()} == {
            "train": [("A .", QUOTE, 1), ("C .", "c .", 1)],
            "validation": [("B .", "b .", 0)],
            "test": [("D .", "d .", 0)],  # whose labels are public
        }
        (tmp_path / "MRPC" / name).unlink()
    write_rows(tmp_path / "MRPC/dev_ids.tsv", (99, 98))
    with pytest.raises(ValueError, match="dev_ids.tsv: it lists no row of msr_paraphrase_train.txt: bring GLUE's own"):
        read("mrpc", tmp_path)


# Folders that `datasets` saved


def save(data, folder):
    """`data`, which was read from GLUE's folder, as the hub's dataset of the task, saved."""
    name, texts = data.task.name, {"cola": ["sentence"], "sst2": ["sentence"], "qqp": ["question1", "question2"]}
    texts |= {"mnli": ["premise", "hypothesis"], "qnli": ["question", "sentence"]}
    columns = texts.get(name, ["sentence1", "sentence2"])
    label = datasets.ClassLabel(names=list(data.task.classes)) if data.task.classes else datasets.Value("float32")
    features = datasets.Features(
        {**dict.fromkeys(columns, datasets.Value("string")), "label": label, "idx": datasets.Value("int32")}
    )
    splits = {}
    for split, examples in data.splits.items():
        rows = {columns[0]: examples.texts, "idx": examples.ids}
        rows |= {} if examples.pairs is None else {columns[1]: examples.pairs}
        rows["label"] = [-1] * len(examples) if examples.labels is None else examples.labels.tolist()
        if name == "mnli" and split in ("validation", "test"):
            split += "_matched"
        splits[split] = datasets.Dataset.from_dict(rows, features)
    if "diagnostic" in splits:
        datasets.DatasetDict({"test": splits.pop("diagnostic")}).save_to_disk(folder.with_name("ax"))
    datasets.DatasetDict(splits).save_to_disk(folder)


@pytest.mark.parametrize("name", ["cola", "sst2", "stsb", "qqp", "mnli", "wnli"])
def test_each_task_is_read_alike_from_a_folder_of_datasets(glue, tmp_path, name):
    data = read(name, glue)
    save(data, tmp_path / name)
    splits = data.splits
    for folder in (tmp_path, tmp_path / name):
        saved = read(name, folder)
        assert saved.task == data.task and list(saved.splits) == list(splits)
        assert [rows_of(each) for each in saved.splits.values()] == [rows_of(each) for each in splits.values()]
        assert saved.splits["test"].ids == data.splits["test"].ids
    assert saved.fingerprint == data.fingerprint


def test_classes_of_datasets_are_known_by_their_names(tmp_path):
    classes = datasets.ClassLabel(names=["acceptable", "unacceptable"])  # the other way round
    features = datasets.Features({"sentence": datasets.Value("string"), "label": classes})
    rows = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1]}, features)
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "named")
    assert read("cola", tmp_path / "named").splits["train"].labels.tolist() == [1, 0]
    rows = rows.cast_column("label", datasets.ClassLabel(names=["0", "1"]))
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "digits")
    assert read("cola", tmp_path / "digits").splits["train"].labels.tolist() == [0, 1]
    rows = rows.cast_column("label", datasets.Value("int64"))
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "numbered")
    assert read("cola", tmp_path / "numbered").splits["train"].labels.tolist() == [0, 1]


# What cannot work


def change(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new))


FAULTS = [
    ("RTE/dev.tsv", b"entailment", b"maybe", r"RTE/dev.tsv, line 2: label 'maybe' is none of rte's \(entailment, not_"),
    ("STS-B/train.tsv", b"5.000", b"5.100", r"line 2: label '5.100' is none of stsb's \(a score from 0 to 5\): bring"),
    ("WNLI/train.tsv", b"\t1\n", b"\t2\n", r"line 3: label '2' is none of wnli's \(0, 1\): bring GLUE's own file"),
    ("CoLA/train.tsv", b"ab01\t1", b"ab01\tx", r"CoLA/train.tsv, line 1: label 'x' is none of cola's \(0, 1\)"),
    ("SST-2/train.tsv", b"sentence\t", b"text\t", "SST-2/train.tsv: no column 'sentence', only 'text', 'label': bring"),
    ("SST-2/train.tsv", b"\t", b",", "no column 'sentence', only 'sentence,label': .* with tabs between them"),
    ("QNLI/test.tsv", b"1\tIs it", b"1Is it", "QNLI/test.tsv, line 3: 2 cells, but 3 columns, .* 1 such rows"),
    ("QNLI/test.tsv", b"1\tIs it", b"x\tIs it", "QNLI/test.tsv, line 3: 'x' in column 'index' is no number"),
    ("CoLA/dev.tsv", b"\t*\t", b"", "CoLA/dev.tsv, line 2: 2 cells, but 4 columns: left out, 1 of 2 rows"),
    ("RTE/train.tsv", b"ran", b"r\xff", r"RTE/train.tsv, line 3: invalid UTF-8 \(byte 0xff\): convert the file"),
]
NAMES = {"CoLA": "cola", "SST-2": "sst2", "STS-B": "stsb"}


@pytest.mark.parametrize(("file", "old", "new", "message"), FAULTS)
def test_files_that_are_not_glues(tmp_path, file, old, new, message):
    change(write_glue(tmp_path) / file, old, new)
    name = NAMES.get(Path(file).parent.name, Path(file).parent.name.lower())
    if "left out" in message:
        assert any(message in remark for remark in read(name, tmp_path).remarks)
        return
    with pytest.raises(ValueError, match=message) as error:
        read(name, tmp_path)
    assert "\n" not in str(error.value)


def test_many_broken_rows_are_another_file(tmp_path):
    change(write_glue(tmp_path) / "CoLA/train.tsv", b"ab01\t", b"ab01")
    with pytest.raises(ValueError, match="line 1: 3 cells, but 4 columns, with tabs between them, and 2 such rows"):
        read("cola", tmp_path)


def test_files_that_are_missing(tmp_path):
    write_rows(tmp_path / "other/x", ("a",))
    with pytest.raises(ValueError, match=r"has no folder MNLI, only other: name the folder that holds it"):
        read("mnli", tmp_path)
    write_glue(tmp_path)
    (tmp_path / "MNLI/dev_matched.tsv").unlink()
    with pytest.raises(ValueError, match=r"MNLI/dev_matched.tsv does not exist: bring all of GLUE's own files, train"):
        read("mnli", tmp_path)
    for file in ("QQP/test.tsv", "CoLA/test.tsv"):
        (tmp_path / file).unlink()
    assert list(read("qqp", tmp_path).splits) == ["train", "validation"]
    (tmp_path / "CoLA/dev.tsv").write_text("\n")
    with pytest.raises(ValueError, match="CoLA/dev.tsv: it is empty: name another file"):
        read("cola", tmp_path)
    write_rows(tmp_path / "SST-2/dev.tsv", ("sentence", "label"))
    with pytest.raises(ValueError, match="SST-2/dev.tsv: it has no rows: bring GLUE's own file"):
        read("sst2", tmp_path)


def test_saved_folders_that_are_not_glues(tmp_path):
    rows = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": ["good", "bad"]})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "a")
    with pytest.raises(ValueError, match="a: no split 'validation', only train: save all of nyu-mll/glue's"):
        read("cola", tmp_path / "a")
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "b")
    with pytest.raises(ValueError, match=r"b, train, row 0: label 'good' is none of cola's \(0, 1\)"):
        read("cola", tmp_path / "b")
    with pytest.raises(ValueError, match="b, train: no column 'sentence1', only 'sentence', 'label'"):
        read("rte", tmp_path / "b")


HUB_SCRIPT = """
from pipeline.task_data import open_task
from pipeline.tasks import TaskSettings
try:
    open_task(TaskSettings(name="rte", data="hub"))
except ValueError as error:
    print(str(error))
"""


def test_a_hub_that_cannot_be_reached(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", HUB_SCRIPT]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    (line,) = result.stdout.splitlines()
    assert line.startswith("task.data: hub: Couldn't reach 'nyu-mll/glue' on the Hub")
    remedy = (
        "datasets.load_dataset('nyu-mll/glue', 'rte').save_to_disk('FOLDER'), bring FOLDER here and name it in task"
    )
    assert remedy in line


# What the server takes

SUBMISSIONS = [
    ("cola", "test", [0, 1], "CoLA.tsv", "0\t0\n1\t1\n"),
    ("sst2", "test", [1, 0], "SST-2.tsv", "0\t1\n1\t0\n"),
    ("mrpc", "test", [1, 1], "MRPC.tsv", "0\t1\n1\t1\n"),
    ("stsb", "test", [-0.25, 2.34567, 5.5], "STS-B.tsv", "0\t0.000\n1\t2.346\n2\t5.000\n"),
    ("qqp", "test", [1, 0], "QQP.tsv", "0\t1\n1\t0\n"),
    ("mnli", "test", [0, 1, 2], "MNLI-m.tsv", "0\tentailment\n1\tneutral\n2\tcontradiction\n"),
    ("mnli", "test_mismatched", [2], "MNLI-mm.tsv", "0\tcontradiction\n"),
    ("mnli", "diagnostic", [1], "AX.tsv", "0\tneutral\n"),
    ("qnli", "test", [0, 1], "QNLI.tsv", "0\tentailment\n1\tnot_entailment\n"),
    ("rte", "test", [1, 0], "RTE.tsv", "0\tnot_entailment\n1\tentailment\n"),
    ("wnli", "test", [1, 0], "WNLI.tsv", "0\t1\n1\t0\n"),
    ("mnli", "validation_mismatched", [2, 0], "validation_mismatched.tsv", "0\tcontradiction\n1\tentailment\n"),
    ("cola", "validation", [1], "validation.tsv", "0\tacceptable\n"),
    ("stsb", "validation", [5.5], "validation.tsv", "0\t5.5\n"),
]


@pytest.mark.parametrize(("name", "split", "predictions", "file", "rows"), SUBMISSIONS)
def test_a_submission_is_what_the_server_takes(tmp_path, name, split, predictions, file, rows):
    kind = np.int64 if TASKS[name].classes else np.float32
    path = write_submission(tmp_path, TASKS[name], split, np.array(predictions, kind), range(len(predictions)))
    assert path == tmp_path / file
    assert path.read_bytes() == f"index\tprediction\n{rows}".encode()


@pytest.mark.parametrize(("name", "predictions"), [("cola", [0, -1]), ("cola", [0.0, 1.0]), ("stsb", [1.0, np.nan])])
def test_what_no_prediction_can_be_is_not_submitted(tmp_path, name, predictions):
    with pytest.raises(ValueError, match="predictions: "):
        write_submission(tmp_path, TASKS[name], "test", np.array(predictions), [0, 1])
    assert list(tmp_path.iterdir()) == []


def test_a_submission_names_rows_as_the_test_set_does(glue, tmp_path):
    data = read("mnli", glue)
    path = write_submission(tmp_path, data.task, "test_mismatched", np.array([1]), data.splits["test_mismatched"].ids)
    assert path.read_text() == "index\tprediction\n9847\tneutral\n"
    with pytest.raises(ValueError, match="argument"):
        write_submission(tmp_path, data.task, "test", np.array([1]), data.splits["test"].ids)
