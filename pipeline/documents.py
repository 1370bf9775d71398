"""Whole documents as token ids: of text, or put together again from the held-out rows of causal shards."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from data_prep.manifest import Manifest
from data_prep.shards import ShardReader
from data_prep.sources import plan_units, read_unit
from data_prep.tokenization import document_frame, text_encoder, tokenizer_fingerprint
from pipeline.shard_cache import ShardFolder

HELDOUT = "heldout"
ROWS_AT_ONCE = 64


@dataclass
class Documents:
    """Documents as token ids, from begin to end of text, to be read once, and what they are made of.

    `num_documents` have been read so far. `num_bytes` is the size of their text in UTF-8 once all have been.
    """

    ids: Iterable[np.ndarray]
    source: str
    num_bytes: int = 0
    num_documents: int = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for ids in self.ids:
            self.num_documents += 1
            yield ids


def text_documents(inputs: Sequence[str], text_field: str, tokenizer: PreTrainedTokenizerBase) -> Documents:
    """The documents of texts as data_prep reads them. Raises ValueError where one cannot be read."""
    encode, (begin_ids, end_id) = text_encoder(tokenizer), document_frame(tokenizer)
    documents = Documents((), ", ".join(inputs))

    def read() -> Iterator[np.ndarray]:
        for unit in plan_units(inputs, text_field=text_field):
            for document in read_unit(unit):
                if document.text.strip():
                    documents.num_bytes += len(document.text.encode())
                    yield np.array([*begin_ids, *encode([document.text])[0], end_id], np.int64)

    documents.ids = read()
    return documents


def heldout_documents(folders: Sequence[ShardFolder], tokenizer: PreTrainedTokenizerBase) -> Documents:
    """The held-out documents of causal shards that were made with `tokenizer`; errors of check_shards."""
    num_bytes = sum(check_shards(folder, tokenizer, "causal").counts[HELDOUT].bytes for folder in folders)
    end_id = document_frame(tokenizer)[1]
    ids = (ids for folder in folders for ids in _split_documents(_stream(folder.reader(HELDOUT)), end_id))
    return Documents(ids, f"held-out documents of {', '.join(folder.name for folder in folders)}", num_bytes)


def check_shards(folder: ShardFolder, tokenizer: PreTrainedTokenizerBase, layout: str) -> Manifest:
    """The manifest of whole shards. Raises ValueError where tokenizer or layout are others."""
    manifest = folder.check()
    if manifest.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            f"{folder.name} was made with another tokenizer than the model's: build shards with the model's"
        )
    if manifest.layout != layout:
        raise ValueError(f"{folder.name} has rows in the layout {manifest.layout}, but this model needs {layout}")
    return manifest


def _stream(reader: ShardReader) -> Iterator[np.ndarray]:
    for start in range(0, len(reader), ROWS_AT_ONCE):
        rows = reader.read(np.arange(start, min(start + ROWS_AT_ONCE, len(reader))))
        yield from (ids[:length] for ids, length in zip(rows["ids"], rows["length"], strict=True))


def _split_documents(stream: Iterable[np.ndarray], end_id: int) -> Iterator[np.ndarray]:
    parts: list[np.ndarray] = []
    for ids in stream:
        *ended, rest = np.split(ids, np.flatnonzero(ids == end_id) + 1)
        for part in ended:
            yield np.concatenate([*parts, part]).astype(np.int64)
            parts = []
        parts.append(rest)
