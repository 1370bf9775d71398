"""Splits of tasks, their fingerprint, the rows that models get, and settings that cannot be right."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep.recipes import ConfigError, load_settings, strict
from pipeline.task_data import encode_examples, open_task
from pipeline.tasks import TASK_RULE, Examples, TaskSettings, task_faults
from tests.test_own_rows import write_csv

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(chr(97 + number) for number in range(26))]
A = WORDS.index("a")
PAD, CLS, SEP = 0, 2, 3


@pytest.fixture(scope="module")
def tokenizer():
    """One token a letter."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def examples(texts, pairs=None):
    return Examples(list(texts), pairs, None, list(range(len(texts))))


# Encoding


def test_one_text_makes_a_row(tokenizer):
    rows, num_cut = encode_examples(examples(["a b", "c", "d e f g"]), tokenizer, 5)
    assert rows["input_ids"].tolist() == [
        [CLS, A, A + 1, SEP, PAD],
        [CLS, A + 2, SEP, PAD, PAD],
        [CLS, A + 3, A + 4, A + 5, SEP],
    ]
    assert rows["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert not rows["token_type_ids"].any() and num_cut == 1
    assert all(array.dtype == np.int32 for array in rows.values())


def test_two_texts_make_a_row_as_in_pretraining(tokenizer):
    rows, num_cut = encode_examples(examples(["a b", "c"], ["d", "e f"]), tokenizer, 8)
    assert rows["input_ids"].tolist() == [
        [CLS, A, A + 1, SEP, A + 3, SEP],
        [CLS, A + 2, SEP, A + 4, A + 5, SEP],
    ]
    assert rows["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert rows["attention_mask"].all() and num_cut == 0


def cut_as_bert(first, second, room):
    """One token after the other, from the end of the longer."""
    first, second = list(first), list(second)
    while len(first) + len(second) > room:
        (first if len(first) > len(second) else second).pop()
    return first, second


@given(first=st.integers(0, 12), second=st.integers(0, 12), length=st.integers(4, 20))
def test_the_longer_text_is_cut_first(tokenizer, first, second, length):
    texts = [" ".join("abcdefghijkl"[:first])], [" ".join("mnopqrstuvwx"[:second])]
    rows, num_cut = encode_examples(examples(*texts), tokenizer, length)
    kept = cut_as_bert(range(A, A + first), range(A + 12, A + 12 + second), length - 3)
    assert rows["input_ids"][0].tolist() == [CLS, *kept[0], SEP, *kept[1], SEP]
    assert num_cut == (first + second > length - 3)


def test_special_tokens_in_a_text_are_text(tokenizer):
    rows, _ = encode_examples(examples(["a [SEP] b"]), tokenizer, 9)
    assert rows["input_ids"][0].tolist().count(SEP) == 1


def test_no_rows_are_no_error(tokenizer):
    rows, num_cut = encode_examples(examples([]), tokenizer, 9)
    assert rows["input_ids"].shape == (0, 0) and num_cut == 0


def test_what_cannot_be_encoded(tokenizer):
    for length, pairs in ((2, None), (3, ["b"])):
        with pytest.raises(
            ValueError, match=f"a length of {length} tokens leaves none for text beside {length} special"
        ):
            encode_examples(examples(["a"], pairs), tokenizer, length)
    decoder = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="z", pad_token="z")
    with pytest.raises(ValueError, match="has no cls_token, sep_token: tasks are learned by encoders"):
        encode_examples(examples(["a"]), decoder, 9)


# Splits


@pytest.fixture
def table(tmp_path):
    """200 rows, sorted by label, every text twice."""
    rows = [(f"text {number % 100}", "good" if number >= 100 else "bad") for number in range(200)]
    return write_csv(tmp_path / "train.csv", rows)


def test_rows_of_one_text_are_on_one_side(table):
    splits = open_task(TaskSettings(train=table, validation_share=0.3)).splits
    assert not set(splits["train"].texts) & set(splits["validation"].texts)
    assert len(splits["train"]) + len(splits["validation"]) == 200 and 30 <= len(splits["validation"]) <= 90
    assert sorted(splits["train"].ids + splits["validation"].ids) == list(range(200))
    fewer = open_task(TaskSettings(train=table, validation_share=0.1)).splits["validation"]
    assert set(fewer.texts) < set(splits["validation"].texts)


def test_a_share_that_leaves_nothing(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("a", "x"), ("b", "y")])
    for share, what in ((1e-9, "none"), (1 - 1e-9, "all")):
        with pytest.raises(
            ValueError, match=f"task.validation_share: .* of 2 rows, by a hash of their text, is {what}"
        ):
            open_task(TaskSettings(train=path, validation_share=share))


def test_a_limit_keeps_rows_of_all_kinds(table):
    data = open_task(TaskSettings(train=table, limit=20))
    train = data.splits["train"]
    assert len(train) == 20 and set(train.labels.tolist()) == {0, 1} and train.ids == sorted(train.ids)
    assert len(open_task(TaskSettings(train=table, limit=1000)).splits["train"]) > 100


def test_the_fingerprint_is_of_all_that_is_learned(tmp_path):
    def fingerprint(rows, **settings):
        path = write_csv(tmp_path / "a.csv", rows, ("text", "pair", "label"))
        return open_task(TaskSettings(train=path, validation=path, **settings)).fingerprint

    rows = [("a b", "c", "0"), ("d", "e", "1")]
    variants = [
        fingerprint(rows),
        fingerprint(rows, text_pair="pair"),
        fingerprint(rows, kind="regression"),
        fingerprint(rows, text="pair"),
        fingerprint([("a b", "c", "1"), ("d", "e", "0")]),
        fingerprint([("a b", "c", "0"), ("d", "e", "2")]),
        fingerprint([("a c", "c", "0"), ("d", "e", "1")]),
        fingerprint(rows[::-1]),
        fingerprint([("a", "b c", "0"), ("d", "e", "1")], text_pair="pair"),
    ]
    assert len(set(variants)) == len(variants)
    assert fingerprint(rows) == variants[0]


# Settings


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            {"name": "colla", "data": "hub"},
            "task.name: 'colla' is unknown: did you mean cola? Known are cola, sst2, mrpc",
        ),
        ({"name": "x", "data": "hub"}, "task.name: 'x' is unknown: Known are cola"),
        ({"name": "cola"}, "task.data: missing: name the folder that holds GLUE's cola, or hub"),
        ({"name": "cola", "data": "nowhere"}, "task.data: 'nowhere' is no folder: name one with GLUE's files"),
        ({"name": "rte", "data": "hub", "text": "body"}, "task.text: 'body' has no effect on GLUE's rte: leave it out"),
        ({"name": "rte", "data": "hub", "train": "a.csv"}, "task.train: 'a.csv' has no effect on GLUE's rte"),
        ({}, "task.train: missing: name a file of your own rows, or one of GLUE's tasks in task.name"),
        ({"data": "hub"}, "task.data: hub has GLUE alone: name a task in task.name"),
        ({"data": "nowhere"}, "task.data: 'nowhere' is no folder: name one that datasets saved"),
        ({"data": ".", "train": "a.csv"}, "task.train: 'a.csv' has no effect beside task.data: leave one of them out"),
        ({"train": "nowhere.csv"}, "task.train: 'nowhere.csv' is no file: name one that exists"),
        ({"train": "setup.cfg", "delimiter": ",,"}, "task.delimiter: ',,' is not one character"),
        ({"train": "setup.cfg", "delimiter": '"'}, "task.delimiter: '\"' is not one character that can part cells"),
        ({"train": "setup.cfg", "text": "label"}, "task.text, task.text_pair, task.label: 'label' stands twice"),
    ],
)
def test_settings_that_cannot_be_right(settings, fault):
    (found,) = task_faults(TaskSettings(**settings))
    assert found.startswith(fault)
    with pytest.raises(ValueError) as error:
        open_task(TaskSettings(**settings))
    assert str(error.value) == found


@strict
@dataclass(frozen=True)
class Recipe:
    """A recipe with a task."""

    task: TaskSettings


def test_a_recipe_is_told_the_same():
    with pytest.raises(ConfigError) as error:
        load_settings(Recipe, ["--task.name", "colla", "--task.limit", "0"], "", [TASK_RULE])
    assert error.value.faults == ["task.limit: 0 should be greater than 0"]
    with pytest.raises(ConfigError) as error:
        load_settings(Recipe, ["--task.name", "colla"], "", [TASK_RULE])
    assert error.value.faults == list(task_faults(TaskSettings(name="colla")))
    recipe = load_settings(Recipe, ["--task.train", "setup.cfg", "--task.delimiter", ";"], "", [TASK_RULE])
    assert recipe.task == TaskSettings(train="setup.cfg", delimiter=";")
