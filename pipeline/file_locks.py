"""Locks on files, which end with the process that holds them, and only with that one."""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_held: set[int] = set()
_opening = threading.Lock()


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """A descriptor of a file, made where it is missing, that no other process, nor thread of this one, has so open.

    The others wait, and go on where it ends, however it does. A process forked meanwhile does not hold the lock.
    Raises OSError where the file cannot be opened, or files cannot be locked.
    """
    with _opening:  # no fork between the two
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        _held.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        with _opening:
            _held.remove(descriptor)
            os.close(descriptor)


def _let_go() -> None:
    """In a child: a lock lasts until every copy of its descriptor is closed, and the child would wait for itself."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()
    _opening.release()


os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_let_go)
