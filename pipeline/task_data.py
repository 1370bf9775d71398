"""The rows of a task, from files to padded token ids.

Legend: N rows, L tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from data_prep.files import hash_json
from data_prep.tokenization import text_encoder
from pipeline.task_files import Table, read_table
from pipeline.tasks import TEST, TRAIN, VALIDATION, Examples, Task, TaskData, TaskSettings, own_task, task_faults

MOST_CLASSES = 1000
SHOWN = 10  # of a list of classes, in an error
ROWS_AT_ONCE = 4096


def open_task(settings: TaskSettings) -> TaskData:
    """The task and all its rows, read and checked.

    Raises ValueError, on one line with place, value and remedy, for settings or rows that cannot work.
    """
    if faults := list(task_faults(settings)):
        raise ValueError("; ".join(faults))
    task, splits, remarks = _own_rows(settings)
    if settings.limit is not None:
        splits = {name: _sample(examples, settings.limit) for name, examples in splits.items()}
    remarks += _overlap_remarks(splits)
    return TaskData(task, splits, _fingerprint(task, splits), tuple(remarks))


def encode_examples(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[dict[str, np.ndarray], int]:
    """Rows as encoders were pretrained on them, `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`, and how many were cut.

    Of a pair that is too long the longer text is cut first, as in BERT. A special token's name in a text is text.

    Returns:
        int32 arrays [N, L], L the longest row's tokens: input_ids, attention_mask, token_type_ids (1: B and its [SEP]).
        The number of rows that lost tokens.

    Raises:
        ValueError: a length that holds no text, or a tokenizer that lacks a special token, as those of decoders do.
    """
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad")}
    if missing := [f"{name}_token" for name, number in ids.items() if number is None]:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path} has no {', '.join(missing)}: tasks are learned by encoders, in rows "
            "[CLS] A [SEP] B [SEP]; start from an encoder and its tokenizer"
        )
    num_special = 2 if examples.pairs is None else 3
    if length <= num_special:
        raise ValueError(
            f"a length of {length} tokens leaves none for text beside {num_special} special ones: use more"
        )
    firsts = _encode_texts(tokenizer, examples.texts)
    seconds = [None] * len(firsts) if examples.pairs is None else _encode_texts(tokenizer, examples.pairs)
    rows, first_lengths, num_cut = [], [], 0
    for first, second in zip(firsts, seconds, strict=True):
        first_size, second_size = _fitting(len(first), len(second or ()), length - num_special)
        num_cut += first_size < len(first) or second_size < len(second or ())
        row = [ids["cls"], *first[:first_size], ids["sep"]]
        first_lengths.append(len(row))
        rows.append(row if second is None else [*row, *second[:second_size], ids["sep"]])
    return _padded(rows, first_lengths, ids["pad"]), num_cut


def _encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    encode = text_encoder(tokenizer)
    return [ids for start in range(0, len(texts), ROWS_AT_ONCE) for ids in encode(texts[start : start + ROWS_AT_ONCE])]


def _fitting(first: int, second: int, room: int) -> tuple[int, int]:
    """Tokens to keep of both texts: one is cut only as far as it is the longer; of two too long A has the odd token."""
    if first + second <= room:
        return first, second
    second = min(second, max(room // 2, room - first))
    return min(first, room - second), second


def _padded(rows: Sequence[Sequence[int]], first_lengths: Sequence[int], pad_id: int) -> dict[str, np.ndarray]:
    lengths_N = np.array([len(row) for row in rows])
    position_L = np.arange(lengths_N.max(initial=0))
    is_token_NL = position_L < lengths_N[:, None]
    is_second_NL = is_token_NL & (position_L >= np.array(first_lengths)[:, None])
    ids_NL = np.full(is_token_NL.shape, pad_id, np.int32)
    ids_NL[is_token_NL] = [number for row in rows for number in row]
    return {
        "input_ids": ids_NL,
        "attention_mask": is_token_NL.astype(np.int32),
        "token_type_ids": is_second_NL.astype(np.int32),
    }


# Rows of one's own


def _own_rows(settings: TaskSettings) -> tuple[Task, dict[str, Examples], list[str]]:
    tables = _own_tables(settings)
    kind, remarks = _kind(settings, tables[TRAIN])
    if kind == "regression":
        task, label_of = own_task((), settings.text_pair is not None), _value
    else:
        classes = _classes(tables[TRAIN], settings.label)
        task, label_of = own_task(classes, settings.text_pair is not None), _class_of(classes, tables[TRAIN].path)
    splits = {name: _examples(table, settings, label_of) for name, table in tables.items()}
    if VALIDATION not in splits:
        splits[TRAIN], splits[VALIDATION] = _split(splits[TRAIN], settings.validation_share)
    return task, splits, remarks


def _own_tables(settings: TaskSettings) -> dict[str, Table]:
    """The file of each split; all but that of `test` have labels."""
    texts = [settings.text] if settings.text_pair is None else [settings.text, settings.text_pair]
    files = {TRAIN: settings.train, VALIDATION: settings.validation, TEST: settings.test}
    tables = {}
    for split, path in files.items():
        if path is not None:
            needed, optional = ([*texts], [settings.label]) if split == TEST else ([*texts, settings.label], [])
            tables[split] = read_table(path, needed, settings.delimiter, optional)
    return tables


def _kind(settings: TaskSettings, table: Table) -> tuple[str, list[str]]:
    """What labels are, and how that was guessed."""
    if settings.kind is not None:
        return settings.kind, []
    labels = [label for label in table.columns[settings.label] if not _is_empty(label)]
    numbers = [_number(label) for label in labels]
    if not labels or any(number is None for number in numbers):
        return "classification", []
    fractions = [label for label in labels if isinstance(label, float) or (isinstance(label, str) and "." in label)]
    if not fractions:
        return "classification", []
    told = f"labels are taken for values to predict, as {fractions[0]!r} is one: task.kind classification makes classes"
    return "regression", [told]


def _number(label: Any) -> float | None:
    """The finite number that a label is, in text or not."""
    try:
        number = None if isinstance(label, bool) else float(label)
    except (TypeError, ValueError):
        return None
    return number if number is not None and math.isfinite(number) else None


def _is_empty(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _class_name(label: Any) -> str:
    """One name for 1, 1.0 and "1", as files of several kinds may have them."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return label.strip() if isinstance(label, str) else str(label).lower() if isinstance(label, bool) else str(label)


def _classes(table: Table, column: str) -> tuple[str, ...]:
    """The classes of the rows to learn from: in the order of numbers, where all are whole numbers, else of letters."""
    counts = Counter(_class_name(label) for label in table.columns[column] if not _is_empty(label))
    if len(counts) < 2:
        only = f"one class alone, {next(iter(counts))!r}" if counts else "no label at all"
        raise ValueError(f"{table.path}: column {column!r} has {only}: name another by task.label, or other rows")
    if len(counts) > MOST_CLASSES or (len(counts) > 2 * SHOWN and 2 * len(counts) > len(table)):
        raise ValueError(
            f"{table.path}: column {column!r} has {len(counts)} different labels in {len(table)} rows, as "
            f"{next(iter(counts))!r}: name another by task.label, or set task.kind regression for numbers"
        )
    whole = all(name.removeprefix("-").isdecimal() for name in counts)
    return tuple(sorted(counts, key=lambda name: (int(name) if whole else 0, name)))


def _class_of(classes: Sequence[str], origin: str) -> Callable[[Any], int]:
    numbers = {name: number for number, name in enumerate(classes)}
    shown = ", ".join(map(repr, classes[:SHOWN])) + (", ..." if len(classes) > SHOWN else "")

    def label_of(label: Any) -> int:
        name = _class_name(label)
        if name not in numbers:
            raise ValueError(f"class {name!r} is none of {shown}, which {origin} has: mend it, or learn from it, too")
        return numbers[name]

    return label_of


def _value(label: Any) -> float:
    number = _number(label)
    if number is None:
        raise ValueError(f"{label!r} is no finite number: mend it, or set task.kind classification")
    return number


def _examples(table: Table, settings: TaskSettings, label_of: Callable[[Any], float]) -> Examples:
    texts = _texts(table, settings.text)
    pairs = None if settings.text_pair is None else _texts(table, settings.text_pair)
    return Examples(texts, pairs, _labels(table, settings.label, label_of), list(range(len(table))))


def _texts(table: Table, column: str) -> list[str]:
    cells = table.columns[column]
    _refuse_empty(table, column, cells)
    for row, cell in enumerate(cells):
        if not isinstance(cell, str):
            raise ValueError(
                f"{table.place(row)}: {cell!r} in column {column!r} is {type(cell).__name__}, not text: name another "
                "by task.text or task.text_pair"
            )
    return cells


def _labels(table: Table, column: str, label_of: Callable[[Any], float]) -> np.ndarray | None:
    if column not in table.columns:
        return None
    cells = table.columns[column]
    _refuse_empty(table, column, cells)
    labels = []
    for row, cell in enumerate(cells):
        try:
            labels.append(label_of(cell))
        except ValueError as error:
            raise ValueError(f"{table.place(row)}: in column {column!r} {error}") from None
    return np.array(labels, np.float32 if label_of is _value else np.int64)


def _refuse_empty(table: Table, column: str, cells: Sequence[Any]) -> None:
    if empty := [row for row, cell in enumerate(cells) if _is_empty(cell)]:
        count = "all" if len(empty) == len(cells) else f"{len(empty)} of {len(cells)}"
        raise ValueError(
            f"{table.place(empty[0])}: column {column!r} is empty there, as in {count} rows: fill the cells, remove "
            "the rows, or name another column"
        )


# Rows of any task


def _keys(examples: Examples) -> list[str]:
    """A hash of the text, or both, of every row."""
    pairs = examples.pairs or [""] * len(examples)
    return [
        xxhash.xxh3_128_hexdigest(f"{len(text)} {text}{pair}".encode())
        for text, pair in zip(examples.texts, pairs, strict=True)
    ]


def _split(examples: Examples, share: float) -> tuple[Examples, Examples]:
    """Rows to learn from and to validate by: rows of the same text go the same way, whatever else the file holds."""
    held = np.array([int(key, 16) / 2**128 < share for key in _keys(examples)])
    if held.all() or not held.any():
        raise ValueError(
            f"task.validation_share: {share} of {len(examples)} rows, by a hash of their text, is "
            f"{'all' if held.all() else 'none'} of them: set another share, or name a file in task.validation"
        )
    return examples.chosen(np.flatnonzero(~held)), examples.chosen(np.flatnonzero(held))


def _sample(examples: Examples, limit: int) -> Examples:
    """The `limit` rows whose hashes are smallest, in their order: files may be sorted by label."""
    chosen = sorted(np.argsort(_keys(examples), kind="stable")[:limit].tolist())
    return examples.chosen(np.array(chosen))


def _overlap_remarks(splits: Mapping[str, Examples]) -> list[str]:
    seen = set(_keys(splits[TRAIN]))
    again = {name: sum(key in seen for key in _keys(examples)) for name, examples in splits.items() if name != TRAIN}
    return [
        f"{count} of {len(splits[name])} rows of {name} have the text of a row of {TRAIN}"
        for name, count in again.items()
        if count
    ]


def _fingerprint(task: Task, splits: Mapping[str, Examples]) -> str:
    def hash_of(examples: Examples) -> str:
        digest = xxhash.xxh3_128("".join(_keys(examples)).encode())
        digest.update(b"none" if examples.labels is None else examples.labels.tobytes())
        digest.update(np.array(examples.ids, np.int64).tobytes())
        return digest.hexdigest()

    asked = [task.name, task.classes, task.metrics, task.pairs]
    return hash_json([asked, {name: hash_of(examples) for name, examples in splits.items()}])
