"""The manifest of a built folder: what its shards are made of, how much they hold, and whether that is still so.

<root>/manifest.json
<root>/tokenizer/                  a copy of the tokenizer that made the ids
<root>/train/index.json, *.tar
<root>/heldout/index.json, *.tar   documents that no training row is made of
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Self, TypeVar

from pydantic import ConfigDict, with_config

from data_prep.files import read_record, write_json
from data_prep.origin import Origin
from data_prep.shards import (
    LAYOUT_FIELDS,
    REMEDY,
    CorruptShard,
    Field,
    ShardIndex,
    ShardReader,
    ShardRecord,
    ids_dtype,
    row_fields,
    scan_shard,
)
from data_prep.tokenization import load_tokenizer, tokenizer_fingerprint

MANIFEST_VERSION = 4
MANIFEST_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Counts:
    """What went into a split.

    Attributes:
        documents: with at least one sentence
        sentences, tokens: of the documents; special tokens and random second segments are not counted
        unknown_tokens: those that the tokenizer has no name for
        rows: in the shards
        row_tokens: positions of the rows before their padding
        bytes: of the documents' text in UTF-8
    """

    documents: int = 0
    sentences: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    rows: int = 0
    row_tokens: int = 0
    bytes: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))


@dataclass(frozen=True)
class Tally:
    """A number of documents, and the bytes of their text in UTF-8."""

    documents: int = 0
    bytes: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(self.documents + other.documents, self.bytes + other.bytes)


Number = TypeVar("Number", Tally, int)


@dataclass(frozen=True)
class SourceCounts:
    """What became of the documents of an input: all that were read were kept, or dropped by some step.

    Attributes:
        skipped: could not be read, by reason
        read: before any step
        dropped: by reason; `changed` holds no documents, but the bytes that steps took from the texts of others
        kept: by split
    """

    read: Tally = Tally()
    dropped: dict[str, Tally] = field(default_factory=dict)
    kept: dict[str, Tally] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.read + other.read,
            _merged(self.dropped, other.dropped, Tally()),
            _merged(self.kept, other.kept, Tally()),
            _merged(self.skipped, other.skipped, 0),
        )


def _merged(one: Mapping[str, Number], other: Mapping[str, Number], nothing: Number) -> dict[str, Number]:
    return {name: one.get(name, nothing) + other.get(name, nothing) for name in (*one, *other)}


@dataclass(frozen=True)
class UnitRecord:
    """What one finished work unit left.

    Attributes:
        counts, shards: of each split
        source: what became of its documents
        lengths: of the kept documents how many have 1, 2 to 3, 4 to 7, 8 to 15 ... tokens
    """

    counts: dict[str, Counts]
    shards: dict[str, tuple[ShardRecord, ...]]
    source: SourceCounts = SourceCounts()
    lengths: tuple[int, ...] = ()

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ValueError where the file is missing or is no record."""
        return read_record(cls, path)


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Manifest:
    """What the shards of a folder are made of.

    Attributes:
        origin: the settings of build_shards that decide the rows, and its inputs
        tokenizer_fingerprint, vocab_size: of the tokenizer in the folder
        counts, indexes: for each split what went in, and the fingerprint of its index; empty in the plan of a build
        sources: what became of the documents of each of the origin's inputs; empty in a plan
        lengths: of the kept documents how many have 1, 2 to 3, 4 to 7, 8 to 15 ... tokens; empty in a plan
    """

    origin: Origin
    tokenizer_fingerprint: str
    vocab_size: int
    counts: dict[str, Counts] = field(default_factory=dict)
    indexes: dict[str, str] = field(default_factory=dict)
    sources: tuple[SourceCounts, ...] = ()
    lengths: tuple[int, ...] = ()
    version: int = MANIFEST_VERSION

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, root: str | Path) -> Self:
        """The manifest of a built folder.

        Raises:
            ValueError: missing, of another version, or not valid; the message names file and field.
        """
        path = Path(root) / MANIFEST_NAME
        if not path.exists():
            raise ValueError(f"{path} does not exist: build the shards by python -m data_prep.build_shards")
        return cls.load_file(path)

    @classmethod
    def load_file(cls, path: Path) -> Self:
        """As `load`, from a file of any name."""
        manifest = read_record(cls, path, MANIFEST_VERSION)
        row_length = manifest.origin.settings.get("row_length")
        if type(row_length) is not int or row_length < 1:
            raise ValueError(f"{path}: origin.settings.row_length is {row_length!r}, no length; {REMEDY}")
        layout = manifest.origin.settings.get("layout")
        if layout not in tuple(LAYOUT_FIELDS):  # may be of any type
            known = " or ".join(LAYOUT_FIELDS)
            raise ValueError(f"{path}: origin.settings.layout is {layout!r}, expected {known}; {REMEDY}")
        return manifest

    @property
    def row_length(self) -> int:
        """Tokens of a row, special tokens included."""
        return self.origin.settings["row_length"]

    @property
    def layout(self) -> str:
        """How the rows look: pairs or causal."""
        return self.origin.settings["layout"]

    @property
    def fields(self) -> tuple[Field, ...]:
        """The arrays of the shards."""
        return row_fields(self.layout, self.row_length, ids_dtype(self.vocab_size))

    def index(self, shards: Iterable[ShardRecord]) -> ShardIndex:
        """The index of a split with these shards."""
        return ShardIndex(self.row_length, self.tokenizer_fingerprint, self.fields, tuple(shards))

    def completed(
        self, records: Sequence[UnitRecord], inputs: Sequence[int], indexes: Mapping[str, ShardIndex]
    ) -> Self:
        """The manifest of a finished build from its plan: the counts of all units, merged.

        `inputs` has for each record the number of the input that its unit is of.
        """
        sources = [SourceCounts()] * len(self.origin.inputs)
        for record, number in zip(records, inputs, strict=True):
            sources[number] += record.source
        return replace(
            self,
            counts={split: sum((record.counts[split] for record in records), Counts()) for split in SPLITS},
            indexes={split: index.fingerprint for split, index in indexes.items()},
            sources=tuple(sources),
            lengths=tuple(map(sum, zip_longest(*(record.lengths for record in records), fillvalue=0))),
        )


def check_folder(root: str | Path) -> Manifest:
    """The manifest of a built folder that is whole, as far as its indexes, its tokenizer and the shards' sizes tell.

    It opens no shard and is cheap; `verify` reads every byte.

    Raises:
        CorruptShard: with every fault found.
        ValueError: the manifest is missing, of another version, or not valid.
    """
    root = Path(root)
    manifest = Manifest.load(root)
    if faults := _folder_faults(root, manifest, ShardReader.check_sizes):
        raise CorruptShard(*faults)
    return manifest


def check_indexes(root: str | Path) -> Manifest:
    """As `check_folder`, of a folder whose shards lie elsewhere: its indexes and its tokenizer."""
    root = Path(root)
    manifest = Manifest.load(root)
    if faults := _folder_faults(root, manifest, lambda reader: None):
        raise CorruptShard(*faults)
    return manifest


def verify(root: Path, part: int = 0, num_parts: int = 1, threads: int = 1) -> list[str]:
    """Every fault of a built folder: manifest, tokenizer, indexes, sizes, hashes and members of all shards.

    With several parts the shards are shared among them, each part's among `threads`; the rest every part looks at.
    """

    def check(reader: ShardReader) -> None:
        own = range(part * threads, (part + 1) * threads)
        with ThreadPoolExecutor(threads) as pool:  # hashing and reading need no interpreter
            found = pool.map(lambda number: reader.faults(number, num_parts * threads), own)
            faults = sorted(chain.from_iterable(found)) + reader.strays()
        if faults:
            raise CorruptShard(*faults)

    return _folder_faults(root, Manifest.load(root), check)


def _folder_faults(root: Path, manifest: Manifest, check_shards: Callable[[ShardReader], None]) -> list[str]:
    faults = _tokenizer_faults(root / TOKENIZER_FOLDER, manifest)
    for split in SPLITS:
        try:
            reader = ShardReader(root / split)
            index = ShardIndex.load(root / split)
            faults += _mismatch(root / split, "index fingerprint", index.fingerprint, manifest.indexes.get(split))
            faults += _mismatch(root / split, "tokenizer", index.tokenizer, manifest.tokenizer_fingerprint)
            faults += _mismatch(root / split, "rows", len(reader), manifest.counts.get(split, Counts()).rows)
            check_shards(reader)
        except CorruptShard as error:
            faults += error.faults
    return faults


def _tokenizer_faults(folder: Path, manifest: Manifest) -> list[str]:
    if not folder.is_dir():
        return [f"{folder} does not exist; {REMEDY}"]
    try:
        fingerprint = tokenizer_fingerprint(load_tokenizer(folder))
    except ValueError as error:
        return [f"{error}; {REMEDY}"]
    return _mismatch(folder, "fingerprint", fingerprint, manifest.tokenizer_fingerprint)


def rebuild_indexes(root: Path) -> list[str]:
    """Write each index.json anew from the shards; faults where these are not the shards that the manifest knows."""
    manifest = Manifest.load(root)
    faults: list[str] = []
    for split in SPLITS:
        tars = sorted((root / split).glob("*.tar"), key=_numbers)
        try:
            index = manifest.index(scan_shard(path, manifest.fields) for path in tars)
        except CorruptShard as error:
            faults += error.faults
            continue
        if index.fingerprint == manifest.indexes.get(split):
            index.save(root / split)
        else:
            faults.append(f"{root / split}: a shard is missing, changed or too many: copy them again, or build anew")
    return faults


def _numbers(path: Path) -> list[int]:
    """Unit and shard of a tar: names alone sort wrongly where a number has more digits than are filled up."""
    return [int(number) for number in re.findall(r"\d+", path.stem)]


def _mismatch(place: Path, name: str, found: object, expected: object) -> list[str]:
    if found == expected:
        return []
    return [f"{place}: {name} {found}, but {MANIFEST_NAME} says {expected}; build the shards anew"]
