"""Folders of shards behind URLs: what is small is fetched at once, shards when they are needed, into a local cache.

<cache>/folders/<hash>/      manifest, tokenizer and indexes of a folder, by the hash of its manifest
<cache>/<xxh3_128>.tar       a shard, by the hash of its content
<cache>/<xxh3_128>.tar.tmp   one that is coming
<cache>/<xxh3_128>.room      of the size that it will have
<cache>/locks/               who fetches: one process at a time for each file, for whom the others wait

Processes of all jobs of a user may share a cache. A shard that a reader has open is locked (shared) and never evicted.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_prep.files import READ_BYTES, sync_tree
from data_prep.manifest import MANIFEST_NAME, SPLITS, TOKENIZER_FOLDER, Manifest, check_folder, check_indexes
from data_prep.shards import INDEX_NAME, ShardReader
from pipeline.file_locks import locked
from pipeline.places import is_url
from pipeline.remote import NoSuchFile, RemoteError, download

DOWNLOADS = 4
"""Shards that one process fetches at once."""

LOCKS = 256
"""Files of which one is locked for each name: shards of the same one wait for each other."""

STALE = 60.0
"""Seconds after which a download that nobody has locked is one that was killed."""

READ_AHEAD_SHARE = 3
"""Shards are read ahead up to this part of the cache: as much is in use, and as much may be another job's."""

TOKENIZER_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
"""What a tokenizer's folder may hold; which of them it does, a server need not tell. The manifest knows what counts."""


@dataclass(frozen=True)
class ShardCache:
    """Local copies of remote shards, `limit` bytes of them but for those that are open. Picklable."""

    folder: Path
    limit: int

    def fetch(self, url: str, size: int, xxh3_128: str) -> Path:
        """The local copy, fetched where it is missing. Raises RemoteError."""
        path = self.folder / f"{xxh3_128}.tar"
        if not _touched(path):
            with self._alone(f"{xxhash.xxh3_64_intdigest(xxh3_128.encode()) % LOCKS:03d}"):
                if not path.exists():
                    with self._room(path, size):
                        download(url, path, size, xxh3_128)
        return path

    def open(self, url: str, size: int, xxh3_128: str, checked: set[tuple[int, str]]) -> int:
        """A descriptor of the local copy, which stays in the cache until that is closed.

        Its content is checked unless `checked` has its inode and hash, which are added.
        """
        while True:
            path = self.fetch(url, size, xxh3_128)
            with suppress(FileNotFoundError):  # evicted just now
                descriptor = os.open(path, os.O_RDONLY)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                known = (os.fstat(descriptor).st_ino, xxh3_128)
                if _is_still(path, descriptor):
                    if known in checked or _hash(descriptor) == xxh3_128:
                        checked.add(known)
                        return descriptor
                    path.unlink(missing_ok=True)  # damaged since it was fetched
                os.close(descriptor)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One process, and one thread of it, at a time for each name. Raises RemoteError."""
        with ExitStack() as stack:
            try:
                (self.folder / "locks").mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.folder / "locks" / name))
            except OSError as error:
                raise RemoteError(
                    f"data.cache {self.folder} cannot be used ({error.strerror}): name another folder, best on this "
                    "machine's own disk"
                ) from error
            yield

    @contextmanager
    def _room(self, path: Path, size: int) -> Iterator[None]:
        """Space for a shard that is coming: downloads at the same time would find the same."""
        room = path.with_name(f"{path.stem}.room")
        with locked(room) as descriptor:
            with self._alone("room"):
                self._evict(self.limit - size)
                os.truncate(descriptor, size)  # which takes none on the disk
            try:
                yield
            finally:
                room.unlink(missing_ok=True)

    def _evict(self, limit: int) -> None:
        """Remove files that nobody has open, the longest unused first, until no more than `limit` bytes are left."""
        files = []
        for path in (path for suffix in ("tar", "tar.tmp", "room") for path in self.folder.glob(f"*.{suffix}")):
            if path.suffix == ".tmp" and path.with_name(f"{path.name.partition('.')[0]}.room").exists():
                continue
            with suppress(FileNotFoundError):
                files.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in files)
        for used, size, path in sorted(files):
            if total <= limit:
                return
            if path.suffix != ".tar" and time.time() - used < STALE:
                continue
            with suppress(FileNotFoundError):
                total -= size if _remove_unused(path) else 0

    def folder_of(self, url: str) -> Path:
        """Manifest, tokenizer and indexes of the folder at `url`, which are checked. Raises RemoteError."""
        name = xxhash.xxh3_64_hexdigest(url.encode())
        coming = self.folder / "locks" / f"{name}.json"
        with self._alone(f"{name}.lock"):
            try:
                download(f"{url}/{MANIFEST_NAME}", coming)
            except NoSuchFile as error:
                raise RemoteError(f"{url} is no finished folder of shards: {error}") from error
            content = coming.read_bytes()
            folder = self.folder / "folders" / xxhash.xxh3_128_hexdigest(content)
            if not folder.is_dir():
                unfinished = folder.with_name(f"{folder.name}.{coming.stem}.tmp")
                shutil.rmtree(unfinished, ignore_errors=True)
                _fetch_folder(url, content, unfinished)
                sync_tree(unfinished)
                with suppress(OSError):  # another URL with the same content was faster
                    os.replace(unfinished, folder)
                shutil.rmtree(unfinished, ignore_errors=True)
                if not folder.is_dir():
                    raise RemoteError(f"{url}: {folder} cannot be made: make room there, or set another data.cache")
        return folder


class CachedReader(ShardReader):
    """The rows of a remote folder of shards, each of which is fetched when it is first read, if not before."""

    open_shards = 16  # each keeps its space in the cache

    def __init__(self, folder: Path, url: str, cache: ShardCache) -> None:
        """`folder` holds the index, `url` the shards."""
        super().__init__(folder)
        self.url = url
        self.cache = cache
        self._checked: set[tuple[int, str]] = set()

    @property
    def samples_ahead(self) -> int:
        """Rows that may be fetched ahead of those that are read."""
        row_bytes = sum(size for _, size, _ in self._files) / max(1, len(self))
        return max(1, int(self.cache.limit / READ_AHEAD_SHARE / max(row_bytes, 1)))

    def fetch(self, sample_ids: np.ndarray) -> None:
        """Have the shards of these rows in the cache, those of the first rows first. Raises RemoteError."""
        numbers, first = np.unique(self.shards_of(sample_ids), return_index=True)
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            for _ in pool.map(lambda shard: self.cache.fetch(*self._place(shard)), numbers[np.argsort(first)]):
                pass

    def faults(self, part: int = 0, num_parts: int = 1) -> list[str]:
        """None: every shard is checked before it is read."""
        return []

    def _open_shard(self, shard: int) -> int:
        return self.cache.open(*self._place(shard), self._checked)

    def _place(self, shard: int) -> tuple[str, int, str]:
        name, size, xxh3_128 = self._files[shard]
        return f"{self.url}/{name}", size, xxh3_128


@dataclass(frozen=True)
class ShardFolder:
    """A built folder of shards, here or behind a URL: `root` holds its manifest, tokenizer and indexes."""

    name: str
    root: Path
    cache: ShardCache | None = None

    def reader(self, split: str) -> ShardReader:
        """The rows of a split."""
        if self.cache is None:
            return ShardReader(self.root / split)
        return CachedReader(self.root / split, f"{self.name.rstrip('/')}/{split}", self.cache)

    def check(self) -> Manifest:
        """The manifest of a folder that is whole, as far as can be seen without reading shards; else ValueError."""
        return check_folder(self.root) if self.cache is None else check_indexes(self.root)


def open_folder(name: str, cache: ShardCache) -> ShardFolder:
    """The folder of that path, or of that URL. Raises RemoteError for a URL where nothing can be fetched."""
    if not is_url(name):
        return ShardFolder(name, Path(name))
    return ShardFolder(name, cache.folder_of(name.rstrip("/")), cache)


def _fetch_folder(url: str, manifest: bytes, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / MANIFEST_NAME).write_bytes(manifest)
    indexes = Manifest.load(folder).indexes
    for split in SPLITS:
        (folder / split).mkdir()
        download(f"{url}/{split}/{INDEX_NAME}", folder / split / INDEX_NAME, xxh3_128=indexes.get(split))
    (folder / TOKENIZER_FOLDER).mkdir()
    for name in TOKENIZER_FILES:
        with suppress(NoSuchFile):
            download(f"{url}/{TOKENIZER_FOLDER}/{name}", folder / TOKENIZER_FOLDER / name)
    check_indexes(folder)


def _touched(path: Path) -> bool:
    """Whether there is such a file, which is then the latest used."""
    with suppress(FileNotFoundError):
        os.utime(path)
        return True
    return False


def _is_still(path: Path, descriptor: int) -> bool:
    return path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path))


def _remove_unused(path: Path) -> bool:
    """Remove a file unless somebody has it locked."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _hash(descriptor: int) -> str:
    digest, offset = xxhash.xxh3_128(), 0
    while piece := os.pread(descriptor, READ_BYTES, offset):
        digest.update(piece)
        offset += len(piece)
    return digest.hexdigest()
