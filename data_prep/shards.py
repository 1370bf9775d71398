"""Shards: tars of .npy blocks of rows, an index of byte offsets and checksums, and a reader by row number.

A folder of shards holds index.json and the tars it names. A tar is an ordinary WebDataset: each block of rows is one
sample, whose members `<key>.<field>.npy` have the rows along their first axis. A row's id is its number in the index.
Read by WebDataset, name the members to decode, `.decode(only=["ids.npy", ...])`: others might hold code.
"""

import io
import os
import tarfile
import tokenize
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self

import numpy as np
import pydantic
import xxhash

from data_prep.block_runs import BlockRun, Size, block_runs
from data_prep.files import atomic_file, hash_file, json_bytes, read_record

INDEX_VERSION = 2
INDEX_NAME = "index.json"
OPEN_SHARDS = 256  # descriptors a reader keeps: a process may have 1,024 by default, and training has two readers
REMEDY = "copy the file again, or build the shards anew"


class CorruptShard(ValueError):
    """Shards that are not what their index says; `faults` has a line for each: file, found, expected, remedy."""

    def __init__(self, *faults: str) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


@dataclass(frozen=True)
class Field:
    """One array of a block: `width` values of numpy type `dtype` for each row; width 0: one value, no second axis."""

    name: str
    dtype: Literal["uint8", "uint16", "uint32"]
    width: Size = 0

    @property
    def row_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * max(self.width, 1)

    def shape(self, rows: int) -> tuple[int, ...]:
        return (rows, self.width) if self.width else (rows,)


def ids_dtype(vocab_size: int) -> str:
    """The smallest type that holds every token id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


LAYOUT_FIELDS = {
    "pairs": (Field("first_length", "uint16"), Field("next_sentence_label", "uint8")),
    "causal": (),
}
"""What rows hold beside ids and length, by the layout in which data_prep.packing made them."""


def row_fields(layout: str, row_length: int, ids_type: str) -> tuple[Field, ...]:
    """The fields of rows in a layout of LAYOUT_FIELDS."""
    return (Field("ids", ids_type, row_length), Field("length", "uint16"), *LAYOUT_FIELDS[layout])


@dataclass(frozen=True)
class ShardRecord:
    """What the index knows of one tar."""

    name: str
    bytes: Size
    xxh3_128: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{32}$")]
    runs: list[BlockRun]

    @property
    def num_rows(self) -> int:
        return sum(run.blocks * run.rows for run in self.runs)


@dataclass(frozen=True)
class ShardIndex:
    """A folder's index.json. `tokenizer` is the fingerprint of the tokenizer that the ids belong to."""

    row_length: int
    tokenizer: str
    fields: tuple[Field, ...]
    shards: tuple[ShardRecord, ...]
    version: int = INDEX_VERSION

    @property
    def fingerprint(self) -> str:
        """The hash of index.json. It names the rows and their order, since it covers every shard's hash."""
        return xxhash.xxh3_128_hexdigest(self._json())

    def save(self, folder: Path) -> None:
        with atomic_file(folder / INDEX_NAME) as file:
            file.write(self._json())

    def _json(self) -> bytes:
        return json_bytes(asdict(self), indent=None)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read and check index.json.

        Raises:
            CorruptShard: missing, of another version, or inconsistent in itself.
        """
        path = folder / INDEX_NAME
        if not path.is_file():
            raise CorruptShard(f"{path} does not exist: is {folder} a finished folder of shards?")
        try:
            index = read_record(cls, path, INDEX_VERSION)
        except ValueError as error:
            raise CorruptShard(f"{error}; {REMEDY}") from None
        widths = {field.name: field.width for field in index.fields}
        if index.row_length != widths.get("ids"):
            raise CorruptShard(f"{path}: row_length {index.row_length}, but ids of {widths.get('ids')}; {REMEDY}")
        for shard in index.shards:
            index._check_blocks(shard, path)
        return index

    def _check_blocks(self, shard: ShardRecord, path: Path) -> None:
        if Path(shard.name).name != shard.name or not shard.name.endswith(".tar"):
            raise CorruptShard(f"{path}: {shard.name!r} is no name of a shard in this folder; {REMEDY}")
        widths = {field.name: field.row_bytes for field in self.fields}
        for run in shard.runs:
            if run.offsets.keys() != widths.keys():
                found, expected = ", ".join(run.offsets), ", ".join(widths)
                raise CorruptShard(f"{path}: {shard.name} has block offsets of {found}, expected {expected}; {REMEDY}")
            if run.blocks > 1 and run.stride < run.rows * sum(widths.values()):
                block = f"blocks of {run.rows} rows every {run.stride} bytes"
                raise CorruptShard(f"{path}: {shard.name} has {block}, which is too little; {REMEDY}")
            for name, first in run.offsets.items():
                offset = first + (run.blocks - 1) * run.stride
                if offset + run.rows * widths[name] > shard.bytes:
                    block = f"{run.rows} rows of {name} at {offset}"
                    raise CorruptShard(f"{path}: {shard.name} has {block}, but {shard.bytes} bytes; {REMEDY}")


class ShardWriter:
    """Writes rows to `<prefix>-0000.tar`, `<prefix>-0001.tar` ... in blocks; equal rows give equal bytes.

    It holds one block's rows in memory. A shard gets its name only when it is whole and on the disk: used as a context,
    a writer removes what it has not finished where the body raises.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        fields: Sequence[Field],
        *,
        rows_per_block: int = 1024,
        blocks_per_shard: int = 16,
    ) -> None:
        self.folder = folder
        self.prefix = prefix
        self.fields = tuple(fields)
        self.rows_per_block = rows_per_block
        self.blocks_per_shard = blocks_per_shard
        self.records: list[ShardRecord] = []
        self._waiting = {field.name: np.empty(field.shape(0), field.dtype) for field in fields}
        self._shard: _OpenShard | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._shard is not None:
            self._shard.stack.__exit__(*error)

    def write(self, rows: Mapping[str, np.ndarray]) -> None:
        """Append rows: for each field an array with the rows along its first axis."""
        count = len(rows[self.fields[0].name])
        for field in self.fields:
            array = rows[field.name]
            if array.shape != field.shape(count) or array.dtype != field.dtype:
                expected = f"{field.dtype}{list(field.shape(count))}"
                raise ValueError(f"rows of {field.name}: {array.dtype}{list(array.shape)}, expected {expected}")
        waiting = {name: np.concatenate([array, rows[name]]) for name, array in self._waiting.items()}
        total = len(waiting[self.fields[0].name])
        whole = total - total % self.rows_per_block
        for start in range(0, whole, self.rows_per_block):
            self._write_block({name: array[start : start + self.rows_per_block] for name, array in waiting.items()})
        self._waiting = {name: array[whole:].copy() for name, array in waiting.items()}

    def finish(self) -> list[ShardRecord]:
        """Write what is waiting and give the records of all shards, in order; none if there were no rows."""
        if len(self._waiting[self.fields[0].name]):
            self._write_block(self._waiting)
        self._close_shard()
        return self.records

    def _write_block(self, rows: Mapping[str, np.ndarray]) -> None:
        if self._shard is None:
            self._shard = _OpenShard(self.folder, f"{self.prefix}-{len(self.records):04d}", self.fields)
        self._shard.write(rows)
        if len(self._shard.rows) == self.blocks_per_shard:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self.records.append(self._shard.close())
            self._shard = None


class _OpenShard:
    """A shard under way, in a file that has not got its name yet."""

    def __init__(self, folder: Path, stem: str, fields: Sequence[Field]) -> None:
        from webdataset import TarWriter  # takes seconds; training imports this module for the reader alone

        self.stem = stem
        self.fields = fields
        self.rows: list[int] = []
        self.offsets: dict[str, list[int]] = {field.name: [] for field in fields}
        self.stack = ExitStack()
        self._file = _HashedFile(self.stack.enter_context(atomic_file(folder / f"{stem}.tar")))
        self._tar = TarWriter(self._file, encoder=False, user="spikelm", group="spikelm", mtime=0)

    def write(self, rows: Mapping[str, np.ndarray]) -> None:
        """Append one block."""
        for field in self.fields:
            array = np.ascontiguousarray(rows[field.name])
            npy = _npy_bytes(array)
            self.offsets[field.name].append(self._tar.tarstream.offset + tarfile.BLOCKSIZE + len(npy) - array.nbytes)
            self._tar.write({"__key__": f"{self.stem}-{len(self.rows):05d}", f"{field.name}.npy": npy})
        self.rows.append(len(array))

    def close(self) -> ShardRecord:
        """Give the file its name."""
        self._tar.close()
        self.stack.close()
        digest = self._file.digest.hexdigest()
        return ShardRecord(f"{self.stem}.tar", self._file.bytes, digest, block_runs(self.rows, self.offsets))


class _HashedFile:
    """A binary file that can be written from start to end, and the xxh3-128 of its `bytes`."""

    def __init__(self, file: BinaryIO) -> None:
        self.digest = xxhash.xxh3_128()
        self.bytes = 0
        self._file = file

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.bytes += len(content)
        # tarfile writes once more where it is given up, and the file with it.
        return len(content) if self._file.closed else self._file.write(content)

    def tell(self) -> int:
        return self.bytes


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


class ShardReader:
    """The rows of a folder of shards by their ids. Shards are opened when first read, and anew in every process.

    Memory grows with the number of shards, not of rows. Copies by fork or by pickling may be used at once.

    Attributes:
        row_length: positions of a row
        fields: names of the arrays that `read` gives
        fingerprint: names the rows and their order
        open_shards: descriptors that are kept
        samples_ahead: rows to fetch before they are read; none, since they are here
    """

    open_shards = OPEN_SHARDS
    samples_ahead = 0

    def __init__(self, folder: str | Path) -> None:
        """Raises CorruptShard where the index is missing or not consistent; shards are checked when they are opened."""
        self.folder = Path(folder)
        index = ShardIndex.load(self.folder)
        self.row_length = index.row_length
        self.fields = tuple(field.name for field in index.fields)
        self.fingerprint = hash_file(self.folder / INDEX_NAME)
        self._index_fields = index.fields
        self._files = [(shard.name, shard.bytes, shard.xxh3_128) for shard in index.shards]
        runs = [(number, run) for number, shard in enumerate(index.shards) for run in shard.runs]
        rows = np.array([run.blocks * run.rows for _, run in runs], np.int64)
        self._first_row = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows)])  # of each run, and the total
        self._shard_of_run = np.array([number for number, _ in runs], np.int64)
        self._block_rows = np.array([run.rows for _, run in runs], np.int64)
        self._strides = np.array([run.stride for _, run in runs], np.int64)
        self._offsets = {name: np.array([run.offsets[name] for _, run in runs], np.int64) for name in self.fields}
        self._descriptors: OrderedDict[int, int] = OrderedDict()  # by shard, the least recently used first

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    @property
    def index_bytes(self) -> int:
        """Memory of what is kept of the index."""
        runs = (self._first_row, self._shard_of_run, self._block_rows, self._strides)
        return sum(array.nbytes for array in (*runs, *self._offsets.values()))

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Rows of each shard that has some, in the order of the rows."""
        rows = np.zeros(len(self._files), np.int64)
        np.add.at(rows, self._shard_of_run, np.diff(self._first_row))
        return tuple(rows[rows > 0].tolist())

    def close(self) -> None:
        """Close the open shards; reading opens them again."""
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)
        self._descriptors = OrderedDict()

    def read(self, sample_ids: np.ndarray) -> dict[str, np.ndarray]:
        """The rows with these ids (int64 [n]), in their order: ids [n, row_length], the other fields [n].

        Raises:
            IndexError: an id outside [0, len(self)).
            CorruptShard: a shard is missing, or shorter or longer than the index says.
        """
        sample_ids = np.asarray(sample_ids, np.int64)
        if sample_ids.size and not 0 <= sample_ids.min() <= sample_ids.max() < len(self):
            found = f"{sample_ids.min()} to {sample_ids.max()}"
            raise IndexError(f"sample ids {found}, but {self.folder} has rows 0 to {len(self) - 1}")
        runs = self._runs_of(sample_ids)
        blocks, rows = np.divmod(sample_ids - self._first_row[runs], self._block_rows[runs])
        starts = blocks * self._strides[runs]
        shards = self._shard_of_run[runs].tolist()
        few = len(set(shards)) <= self.open_shards
        descriptor = {shard: self._descriptor(shard) for shard in set(shards)}.get if few else self._descriptor
        batch = {}
        for field in self._index_fields:
            offsets = self._offsets[field.name][runs] + starts + rows * field.row_bytes
            places = list(zip(shards, offsets.tolist(), strict=True))
            size = field.row_bytes
            pieces = [os.pread(descriptor(shard), size, offset) for shard, offset in places]
            if len(joined := bytearray().join(pieces)) != len(pieces) * size:
                joined = bytearray().join(map(self._whole, places, pieces, repeat(size)))
            batch[field.name] = np.frombuffer(joined, field.dtype).reshape(field.shape(len(pieces)))
        return batch

    def shards_of(self, sample_ids: np.ndarray) -> np.ndarray:
        """Numbers of the shards that hold these rows: int64 [n]."""
        return self._shard_of_run[self._runs_of(sample_ids)]

    def _runs_of(self, sample_ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first_row, sample_ids, side="right") - 1

    def _whole(self, place: tuple[int, int], piece: bytes, size: int) -> bytes:
        """What a read of `size` bytes has given, and what it lacks: a network file system may give less than it has."""
        shard, offset = place
        while len(piece) < size:
            more = os.pread(self._descriptor(shard), size - len(piece), offset + len(piece))
            if not more:
                name = self.folder / self._files[shard][0]
                raise CorruptShard(f"{name}: {len(piece)} bytes at offset {offset}, expected {size}; {REMEDY}")
            piece += more
        return piece

    def _descriptor(self, shard: int) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        if len(self._descriptors) >= self.open_shards:
            os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[shard] = self._open_shard(shard)
        return self._descriptors[shard]

    def _open_shard(self, shard: int) -> int:
        name, size, _ = self._files[shard]
        if fault := size_fault(self.folder / name, size):
            raise CorruptShard(fault)
        return os.open(self.folder / name, os.O_RDONLY)

    def check_sizes(self) -> None:
        """Look at the name and size of every shard and open none.

        Raises:
            CorruptShard: with every fault found.
        """
        faults = [size_fault(self.folder / name, size) for name, size, _ in self._files]
        if any(faults):
            raise CorruptShard(*filter(None, faults))

    def faults(self, part: int = 0, num_parts: int = 1) -> list[str]:
        """What is wrong with the shards, every byte of which is read; or with one of equal parts of them."""
        index = ShardIndex.load(self.folder)
        shards = index.shards[part::num_parts]
        return [fault for shard in shards for fault in _shard_faults(self.folder, shard, index.fields)]

    def verify(self) -> None:
        """Read every shard whole: sizes, hashes, members, and that the folder holds no other tar.

        Raises:
            CorruptShard: with every fault found.
        """
        if faults := self.faults() + self.strays():
            raise CorruptShard(*faults)

    def strays(self) -> list[str]:
        """Tars in the folder that the index does not name."""
        known = {name for name, *_ in self._files}
        strays = sorted(path for path in self.folder.glob("*.tar") if path.name not in known)
        return [f"{path}: not in {INDEX_NAME}; remove it" for path in strays]


def size_fault(path: Path, size: int) -> str | None:
    """What is wrong with a file that should have `size` bytes."""
    if not os.path.isfile(path):  # also where it has a name that no file can have
        return f"{path}: missing, expected {size} bytes; {REMEDY}"
    found = path.stat().st_size
    return None if found == size else f"{path}: {found} bytes, expected {size}; {REMEDY}"


def _shard_faults(folder: Path, shard: ShardRecord, fields: Sequence[Field]) -> list[str]:
    path = folder / shard.name
    if fault := size_fault(path, shard.bytes):
        return [fault]
    if (found := hash_file(path)) != shard.xxh3_128:
        return [f"{path}: xxh3_128 {found}, expected {shard.xxh3_128}; {REMEDY}"]
    try:
        if _scan_members(path, fields) == shard.runs:
            return []
    except CorruptShard as error:
        return list(error.faults)
    return [f"{path}: its blocks are not those of {INDEX_NAME}; build the shards anew"]


def scan_shard(path: Path, fields: Sequence[Field]) -> ShardRecord:
    """A shard's record from the file alone.

    Raises:
        CorruptShard: no tar, or a member that is not one of our blocks: WebDataset would run what some suffixes hold.
    """
    runs = _scan_members(path, fields)
    return ShardRecord(path.name, path.stat().st_size, hash_file(path), runs)


def _scan_members(path: Path, fields: Sequence[Field]) -> list[BlockRun]:
    counts: list[int] = []
    offsets: dict[str, list[int]] = {field.name: [] for field in fields}
    try:
        with tarfile.open(path, "r:") as tar:
            for number, member in enumerate(tar):
                block, field = divmod(number, len(fields))
                expected = f"{path.stem}-{block:05d}.{fields[field].name}.npy"
                if member.name != expected or not member.isreg():
                    raise CorruptShard(f"{path}: holds {member.name!r}, expected {expected!r}; do not use this file")
                rows, header_bytes = _read_block_header(tar, member, fields[field], path)
                if field == 0:
                    counts.append(rows)
                elif rows != counts[-1]:
                    raise CorruptShard(f"{path}: {member.name} has {rows} rows, expected {counts[-1]}; {REMEDY}")
                offsets[fields[field].name].append(member.offset_data + header_bytes)
    except tarfile.TarError as error:
        raise CorruptShard(f"{path}: not a whole tar file: {error}; {REMEDY}") from None
    if {len(places) for places in offsets.values()} != {len(counts)}:
        raise CorruptShard(f"{path}: the last block lacks members, expected {', '.join(offsets)}; {REMEDY}")
    return block_runs(counts, offsets)


def _read_block_header(tar: tarfile.TarFile, member: tarfile.TarInfo, field: Field, path: Path) -> tuple[int, int]:
    """Rows of a block and bytes of its .npy header."""
    stream = tar.extractfile(member)
    try:
        np.lib.format.read_magic(stream)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError) as error:  # numpy parses it as Python
        raise CorruptShard(f"{path}: {member.name} is no .npy array: {error}; {REMEDY}") from None
    rows = shape[0] if shape else 0
    size = stream.tell() + rows * field.row_bytes
    if dtype != field.dtype or shape != field.shape(rows) or fortran_order or size != member.size:
        found, expected = f"{dtype}{list(shape)}", f"{field.dtype}{list(field.shape(rows))}"
        raise CorruptShard(f"{path}: {member.name} is {found} in {member.size} bytes, expected {expected}; {REMEDY}")
    return rows, stream.tell()
