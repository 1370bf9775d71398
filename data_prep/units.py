"""One work unit to shards: documents, sentences, tokens, rows, tars; a function of the unit and the settings alone."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.manifest import SPLITS, Counts, UnitRecord
from data_prep.packing import RowLayout, TokenizedDocument
from data_prep.shards import Field, ShardRecord, ShardWriter
from data_prep.sources import Document, WorkUnit, is_heldout, read_unit
from data_prep.tokenization import TokenEncoder

POOL_TOKENS = 1 << 22  # of neighbouring documents, among which random second segments are drawn
BATCH_CHARACTERS = 1 << 20  # of documents that are tokenized together


@dataclass(frozen=True)
class UnitBuilder:
    """Builds work units into `<root>/train` and `<root>/heldout`.

    Attributes:
        encode: from data_prep.tokenization.text_encoder
        unknown_id: the token id that stands for what the tokenizer does not know, if it has one
        heldout_fraction: share of the documents that go to heldout/
    """

    root: Path
    encode: TokenEncoder
    unknown_id: int | None
    layout: RowLayout
    fields: tuple[Field, ...]
    seed: int
    heldout_fraction: float
    rows_per_block: int
    blocks_per_shard: int

    def build(self, unit: WorkUnit, progress: tqdm) -> UnitRecord:
        """Write the unit's shards; `progress` counts documents."""
        splits = {name: _Split(self, name, unit.number) for name in SPLITS}
        empty_documents = 0
        for documents in _batches(read_unit(unit)):
            for document, pieces in zip(documents, self._tokenize(documents), strict=True):
                if any(pieces):
                    name = "heldout" if is_heldout(document.text, self.heldout_fraction) else "train"
                    splits[name].add(pieces, len(document.text.encode()))
                else:
                    empty_documents += 1
            progress.update(len(documents))
        shards = {name: split.finish() for name, split in splits.items()}
        return UnitRecord({name: split.counts for name, split in splits.items()}, shards, empty_documents)

    def _tokenize(self, documents: Sequence[Document]) -> list[list[list[int]]]:
        """Token ids of each piece of each document."""
        pieces = [self.layout.pieces(document.text) for document in documents]
        encoded = iter(self.encode(list(chain.from_iterable(pieces))))
        return [list(islice(encoded, len(each))) for each in pieces]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Split:
    """The documents of one split of one unit, on their way to its shards."""

    def __init__(self, builder: UnitBuilder, name: str, unit_number: int) -> None:
        self.builder = builder
        self.prefix = f"{name}-{unit_number:06d}"
        self.writer = ShardWriter(
            builder.root / name,
            self.prefix,
            builder.fields,
            rows_per_block=builder.rows_per_block,
            blocks_per_shard=builder.blocks_per_shard,
        )
        self.counts = Counts()
        self.num_pools = 0
        self.pool: list[TokenizedDocument] = []
        self.pool_tokens = 0

    def add(self, pieces: Sequence[Sequence[int]], num_bytes: int) -> None:
        document = self.builder.layout.join(pieces)
        unknown = np.count_nonzero(document.ids == self.builder.unknown_id)
        self.counts += Counts(1, len(pieces), len(document.ids), int(unknown), bytes=num_bytes)
        self.pool.append(document)
        self.pool_tokens += len(document.ids)
        if self.pool_tokens >= POOL_TOKENS:
            self._pack()

    def finish(self) -> tuple[ShardRecord, ...]:
        if self.pool:
            self._pack()
        return tuple(self.writer.finish())

    def _pack(self) -> None:
        seed = f"{self.builder.seed}/{self.prefix}/{self.num_pools}"
        rows = self.builder.layout.pack(self.pool, seed)
        self.writer.write(rows)
        self.counts += Counts(rows=len(rows["ids"]), row_tokens=int(rows["length"].sum(dtype=np.int64)))
        self.num_pools += 1
        self.pool, self.pool_tokens = [], 0
