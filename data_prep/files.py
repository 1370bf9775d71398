"""Files that are whole or not there: atomic writes and content hashes."""

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import xxhash
from pydantic import TypeAdapter, ValidationError

Record = TypeVar("Record")

READ_BYTES = 1 << 22
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NAME_BYTES = 255  # of a file or folder, in every usual file system


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A new binary file that takes the name `path` only after everything written to it lies on the disk.

    The unfinished file is `.<name>.tmp` beside it; it is removed when the body raises, and a killed process leaves it.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        if isinstance(error, OSError):
            name_file(error, path)  # of a write that fails the system gives none
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def name_file(error: OSError, path: Path) -> None:
    """Have an error of the system name this file, where it names none."""
    if error.errno is not None and error.filename is None:
        error.filename = str(path)


def remedied(error: OSError) -> str:
    """What the system says, and where it will not let us write, what to do about it."""
    place = error.filename or "the disk"
    if error.errno in FULL:
        return f"{place}: {error.strerror}: make room there; the same command goes on"
    if isinstance(error, PermissionError):
        return f"{place}: {error.strerror}: change its rights, or choose another"
    return str(error)


def is_path(name: str) -> bool:
    """Whether there can be a file of this name. Where there can not, looking for it is an error of the system."""
    return bool(name) and "\0" not in name and all(len(part.encode()) <= NAME_BYTES for part in name.split("/"))


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` as durable as the files themselves: a rename alone may be lost with the power."""
    sync_file(folder)


def sync_tree(folder: Path) -> None:
    """Wait until a folder of files that others wrote lies on the disk, with its own name."""
    for file in folder.rglob("*"):
        sync_file(file)
    sync_folder(folder)
    sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Wait until what was written to a file, or the names in a folder, lies on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(content: Any, indent: int | None = 1) -> bytes:
    """JSON with sorted keys: equal content gives equal bytes."""
    return json.dumps(content, sort_keys=True, indent=indent).encode() + b"\n"


def write_json(path: Path, content: Any) -> None:
    """Write `content` atomically as JSON."""
    with atomic_file(path) as file:
        file.write(json_bytes(content))


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: the file is missing or is no JSON; the message names it.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def read_record(record_type: type[Record], path: Path, version: int | None = None) -> Record:
    """A dataclass from the JSON that `write_json` made of `asdict(record)`, of this version if it has one.

    Raises:
        ValueError: missing, no JSON, of another version or not of this type; the message names file and fields.
    """
    content = read_json(path)
    found = content.get("version") if isinstance(content, dict) else None
    if found != version:
        raise ValueError(f"{path}: version {found!r}, expected {version}: made by another release, make it anew")
    try:
        return TypeAdapter(record_type).validate_python(content)
    except ValidationError as error:
        details = [f"{_dotted(detail['loc'])}: {detail['msg']}" for detail in error.errors()]
        raise ValueError(f"{path}: {'; '.join(details)}") from None


def _dotted(names: Sequence[str | int]) -> str:
    """Names of fields as one, on one line whatever a strange file calls them."""
    return ".".join(name if name.isprintable() else ascii(name) for name in map(str, names))


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def hash_json(content: Any) -> str:
    """xxh3-128 of `content` as JSON, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(json_bytes(content, indent=None))
