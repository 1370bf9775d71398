"""Locks of operator builds that were killed: later runs would wait for them silently, forever.

DeepSpeed compiles an operator on first use under a file called `lock`, which a build that is killed never removes. A
living build on this machine has the lock open, or is a compiler with the build's folder as its working folder. A build
on another machine that shares the folder is invisible from here, so on a network file system a lock must be old, too.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from pipeline.places import is_on_network

HOUR = 3600.0


def clear_stale_locks() -> None:
    """Remove what killed builds left in the folder of torch's extensions, and say so."""
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = [path.resolve() for path in cache.glob("**/lock") if path.is_file()]
    if not locks:
        return
    age = HOUR if is_on_network(cache) else 0.0
    in_use = set(_open_paths())
    for lock in locks:
        with suppress(FileNotFoundError):  # its build has just ended
            if lock.stat().st_uid != os.getuid():  # whose processes cannot be looked at
                continue
            if time.time() - lock.stat().st_mtime >= age and not in_use & {str(lock), str(lock.parent)}:
                lock.unlink()
                print(f"removed the stale build lock {lock}", file=sys.stderr, flush=True)


def _open_paths() -> Iterator[str]:
    """What every process of this user has open, and its working folder."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or it has ended
            for link in (process / "cwd", *(process / "fd").iterdir()):
                with suppress(OSError):
                    yield os.readlink(link)
