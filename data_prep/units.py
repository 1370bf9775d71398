"""One work unit to shards: documents, sentences, tokens, rows, tars; a function of the unit and the settings alone."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np

from data_prep.manifest import SPLITS, Counts, SourceCounts, Tally, UnitRecord
from data_prep.packing import RowLayout, TokenizedDocument
from data_prep.shards import Field, ShardRecord, ShardWriter
from data_prep.sources import Document, WorkUnit, is_heldout, read_unit
from data_prep.tokenization import TokenEncoder

POOL_TOKENS = 1 << 22  # of neighbouring documents, among which random second segments are drawn
BATCH_CHARACTERS = 1 << 20  # of documents that are tokenized together

Step = Callable[[str], tuple[str | None, str | None]]
"""A pure function from a document's text to the text to go on with and None, or to None and why it is dropped."""

Count = Callable[[int, int], None]
"""Is told of documents and tokens that are done, for a progress bar."""


@dataclass
class Screen:
    """What documents of a unit pass on their way: steps in their order, and repeats found before.

    Attributes:
        steps: what may change a text or drop it
        repeats: numbers of documents of the unit that are dropped for what other documents hold, with the reason
        skipped: counts by reason of what cannot be read; None: that is an error
        read, dropped: what came in, and what was left out, as in SourceCounts
    """

    steps: Sequence[Step] = ()
    repeats: Mapping[int, str] = field(default_factory=dict)
    skipped: Counter[str] | None = None
    read: Tally = Tally()
    dropped: dict[str, Tally] = field(default_factory=dict)

    def documents(self, unit: WorkUnit) -> Iterator[tuple[int, Document, str]]:
        """The documents that pass: the number in the unit, what was read, and the text that steps have made of it."""
        for number, document in enumerate(read_unit(unit, self.skipped)):
            text, reason = document.text, None
            num_bytes = len(text.encode())
            self.read += Tally(1, num_bytes)
            for step in self.steps:
                text, reason = step(text)
                if reason:
                    break
            if reason := reason or self.repeats.get(number):
                self.drop(reason, num_bytes)
                continue
            if text != document.text:
                self._count("changed", Tally(0, num_bytes - len(text.encode())))
            yield number, document, text

    def drop(self, reason: str, num_bytes: int) -> None:
        """Count a document of `num_bytes` that is left out."""
        self._count(reason, Tally(1, num_bytes))

    def _count(self, reason: str, tally: Tally) -> None:
        self.dropped[reason] = self.dropped.get(reason, Tally()) + tally


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

    def build(self, unit: WorkUnit, screen: Screen, count: Count) -> UnitRecord:
        """Write the shards of those documents of the unit that pass the screen."""
        lengths: Counter[int] = Counter()
        with ExitStack() as stack:
            splits = {name: stack.enter_context(_Split(self, name, unit.number)) for name in SPLITS}
            for passed in _batches((document, text) for _, document, text in screen.documents(unit)):
                tokens = 0
                for (document, text), pieces in zip(passed, self._tokenize([text for _, text in passed]), strict=True):
                    num_bytes, num_tokens = len(text.encode()), sum(map(len, pieces))
                    if num_tokens:
                        # By what was read, as the tokenizer's training does, whatever steps have made of it.
                        name = "heldout" if is_heldout(document.text, self.heldout_fraction) else "train"
                        splits[name].add(pieces, num_bytes)
                        lengths[num_tokens.bit_length() - 1] += 1
                    else:
                        screen.drop("empty", num_bytes)
                    tokens += num_tokens
                count(len(passed), tokens)
            shards = {name: split.finish() for name, split in splits.items()}
        counts = {name: split.counts for name, split in splits.items()}
        kept = {name: Tally(each.documents, each.bytes) for name, each in counts.items()}
        source = SourceCounts(screen.read, screen.dropped, kept, dict(screen.skipped or {}))
        return UnitRecord(counts, shards, source, tuple(lengths[size] for size in range(max(lengths, default=-1) + 1)))

    def _tokenize(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """Token ids of each piece of each text."""
        pieces = [self.layout.pieces(text) for text in texts]
        encoded = iter(self.encode(list(chain.from_iterable(pieces))))
        return [list(islice(encoded, len(each))) for each in pieces]


def _batches(passed: Iterable[tuple[Document, str]]) -> Iterator[list[tuple[Document, str]]]:
    """Documents and their texts, so many at a time that they hold BATCH_CHARACTERS together."""
    batch: list[tuple[Document, str]] = []
    characters = 0
    for document, text in passed:
        batch.append((document, text))
        characters += len(text)
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
        self.sums: Counter[str] = Counter()  # quicker than to add two Counts for every document
        self.num_pools = 0
        self.pool: list[TokenizedDocument] = []
        self.pool_tokens = 0

    def __enter__(self) -> "_Split":
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.__exit__(*error)

    def add(self, pieces: Sequence[Sequence[int]], num_bytes: int) -> None:
        document = self.builder.layout.join(pieces)
        unknown = np.count_nonzero(document.ids == self.builder.unknown_id)
        self._count(
            documents=1, sentences=len(pieces), tokens=len(document.ids), unknown_tokens=int(unknown), bytes=num_bytes
        )
        self.pool.append(document)
        self.pool_tokens += len(document.ids)
        if self.pool_tokens >= POOL_TOKENS:
            self._pack()

    @property
    def counts(self) -> Counts:
        return Counts(**self.sums)

    def _count(self, **values: int) -> None:
        for name, value in values.items():
            self.sums[name] += value

    def finish(self) -> tuple[ShardRecord, ...]:
        if self.pool:
            self._pack()
        return tuple(self.writer.finish())

    def _pack(self) -> None:
        seed = f"{self.builder.seed}/{self.prefix}/{self.num_pools}"
        rows = self.builder.layout.pack(self.pool, seed)
        self.writer.write(rows)
        self._count(rows=len(rows["ids"]), row_tokens=int(rows["length"].sum(dtype=np.int64)))
        self.num_pools += 1
        self.pool, self.pool_tokens = [], 0
