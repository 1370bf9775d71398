"""The rows of a task, from files to padded token ids.

Legend: N rows, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from data_prep.files import hash_json
from data_prep.tokenization import text_encoder
from pipeline.glue import read_glue
from pipeline.own_rows import read_own
from pipeline.tasks import TRAIN, VALIDATION, Examples, Task, TaskData, TaskSettings, task_faults

ROWS_AT_ONCE = 4096


def open_task(settings: TaskSettings) -> TaskData:
    """The task and all its rows, read and checked.

    Raises ValueError, on one line with place, value and remedy, for settings or rows that cannot work.
    """
    if faults := list(task_faults(settings)):
        raise ValueError("; ".join(faults))
    task, splits, remarks = read_own(settings) if settings.name is None else read_glue(settings)
    if VALIDATION not in splits:
        splits[TRAIN], splits[VALIDATION] = _split(splits[TRAIN], settings.validation_share)
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
