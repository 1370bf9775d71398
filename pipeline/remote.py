"""Files behind URLs: fetched with retries, checked before they get their name.

http and https are read by Python's own client, any other scheme by fsspec and the package of its kind (s3fs, gcsfs
...). What breaks off is taken up where it broke off; what fails for good names URL and cause.
"""

import os
import time
import urllib.error
import urllib.request
from contextlib import closing
from errno import EDQUOT, ENOSPC
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from data_prep.files import READ_BYTES, hash_file
from pipeline.file_locks import locked

ATTEMPTS = 6
"""Failures in a row, without a byte in between, after which a file is given up; so many damaged copies, too."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the second attempt, doubled before each further one."""

MOST_UNTOLD = 1 << 30
"""Bytes of a file whose size nobody has told: manifests, indexes and tokenizers."""

PATIENCE = 60.0
"""Seconds in which a server must send something."""

MAY_PASS = (408, 425, 429)
"""HTTP's refusals that another attempt may not meet; those from 500 on may pass as well."""


class RemoteError(ValueError):
    """A file behind a URL cannot be had; the message names URL, cause and remedy."""


class NoSuchFile(RemoteError):
    """The server answers, and has no such file."""


class Interrupted(Exception):
    """An attempt has failed in a way that another one may not."""


def download(url: str, path: Path, size: int | None = None, xxh3_128: str | None = None) -> None:
    """Fetch what `url` names to `path`, which it gets only when it has this size and hash, where they are known.

    One process at a time may do so for one path. Raises RemoteError.
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        # Locked it is in use, and ShardCache leaves it alone.
        with locked(unfinished) as descriptor, open(descriptor, "wb", closefd=False) as file:
            file.truncate(0)
            _fetch(url, unfinished, file, size, xxh3_128)
            os.fsync(descriptor)
            os.replace(unfinished, path)
    except OSError as error:
        what = "is full" if error.errno in (ENOSPC, EDQUOT) else f"cannot be written to ({error.strerror})"
        raise RemoteError(f"{url}: {path.parent} {what}: make room there, or set another data.cache") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _fetch(url: str, path: Path, file: BinaryIO, size: int | None, xxh3_128: str | None) -> None:
    """Fetch what `url` names into `file`, which lies at `path`."""
    stalls, damaged, pause = 0, 0, FIRST_PAUSE
    while True:
        before = file.seek(0, os.SEEK_END)
        try:
            _append(url, file, size)
            if xxh3_128 is None or (found := hash_file(path)) == xxh3_128:
                return
            damaged += 1
            cause = f"xxh3_128 {found}, expected {xxh3_128}"
            file.truncate(0)
        except Interrupted as error:
            cause = str(error)
            grown = file.seek(0, os.SEEK_END) > before
            stalls, pause = (1, FIRST_PAUSE) if grown else (stalls + 1, pause)
        if max(stalls, damaged) >= ATTEMPTS:
            raise RemoteError(f"{url}: given up after {ATTEMPTS} attempts: {cause}: see to the server")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _append(url: str, file: BinaryIO, size: int | None) -> None:
    """Fetch what `file` lacks of `url`. Raises Interrupted where it then has another size."""
    have = file.seek(0, os.SEEK_END)
    stream, begin, end = _open(url, have)
    if begin != have:
        file.truncate(0)
        file.seek(0)
    most = MOST_UNTOLD if size is None else size
    with closing(stream):
        while file.tell() <= most and (piece := _read(stream)):
            file.write(piece)
    file.flush()
    if size is None and file.tell() > most:
        raise RemoteError(f"{url} is larger than {most} bytes, as nothing is that a folder of shards has beside them")
    found, expected = file.tell(), size if size is not None else end
    if expected is not None and found != expected:
        if found > expected:
            file.truncate(0)
        raise Interrupted(f"{found} bytes came, expected {expected}")


def _read(stream: BinaryIO) -> bytes:
    try:
        return stream.read(READ_BYTES)
    except Exception as error:  # noqa: BLE001 (each kind of store has errors of its own)
        raise Interrupted(f"{type(error).__name__}: {error}") from error


def _open(url: str, offset: int) -> tuple[BinaryIO, int, int | None]:
    """A stream of the file from `offset` on, or from where the server begins; that place; the file's size if told."""
    if url.startswith(("http://", "https://")):
        return _open_http(url, offset)
    import fsspec  # takes a while, and local shards need none

    try:
        file_system, path = fsspec.core.url_to_fs(url)
        stream = file_system.open(path, "rb")
        stream.seek(offset)
        return stream, offset, None
    except ImportError as error:
        raise RemoteError(f"{url}: {error}: install that package by pip, into this environment") from error
    except FileNotFoundError as error:
        raise NoSuchFile(f"{url} does not exist: see to its name") from error
    except PermissionError as error:
        raise RemoteError(f"{url} may not be read ({error}): see to your credentials") from error
    except ValueError as error:
        raise RemoteError(f"{url}: {error}: name http, https, or a scheme that fsspec knows") from error
    except Exception as error:  # noqa: BLE001 (each kind of store has errors of its own)
        raise Interrupted(f"{type(error).__name__}: {error}") from error


def _open_http(url: str, offset: int) -> tuple[BinaryIO, int, int | None]:
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = urllib.request.urlopen(request, timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise NoSuchFile(f"{url} does not exist ({error.code} {error.reason}): see to its name") from error
        if error.code == 416:  # what we have is longer than the file: from the beginning
            return _open_http(url, 0)
        if error.code < 500 and error.code not in MAY_PASS:
            raise RemoteError(f"{url} may not be read ({error.code} {error.reason}): see to your rights") from error
        raise Interrupted(f"{error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise Interrupted(f"{type(error).__name__}: {getattr(error, 'reason', None) or error}") from error
    begin = offset if response.status == 206 else 0
    length = response.headers.get("Content-Length")
    return response, begin, begin + int(length) if length is not None else None
