"""What an unfinished build keeps beside its shards, and the lock that lets one job at a time work on a folder.

<root>/.build/lock             held by every rank, while it lives
<root>/.build/plan.json        what is being built
<root>/.build/emptying         there while what was built before is removed
<root>/.build/keys-*.npy       keys of a unit's documents, of one kind of comparison
<root>/.build/repeats-*.npy    numbers of a unit's documents that repeat earlier ones, by that comparison
<root>/.build/unit-*.json      the record of a finished unit
"""

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from data_prep.build_report import PLOT_NAME, REPORT_NAME
from data_prep.files import sync_folder
from data_prep.manifest import MANIFEST_NAME, SPLITS, TOKENIZER_FOLDER, Manifest, UnitRecord, check_folder
from data_prep.origin import faults_of, refusal
from data_prep.ranks import Ranks
from data_prep.shards import size_fault

WORK_FOLDER = ".build"
PLAN_NAME = "plan.json"
LOCK_NAME = "lock"
EMPTYING_NAME = "emptying"
LOCK_SECONDS = 3.0
"""How long a job waits for the ranks of one that was killed: mpirun may be gone before them."""

OURS = (TOKENIZER_FOLDER, *SPLITS)


def keys_path(root: Path, comparison: str, unit: int) -> Path:
    return root / WORK_FOLDER / f"keys-{comparison}-{unit:06d}.npy"


def repeats_path(root: Path, comparison: str, unit: int) -> Path:
    return root / WORK_FOLDER / f"repeats-{comparison}-{unit:06d}.npy"


def record_path(root: Path, unit: int) -> Path:
    return root / WORK_FOLDER / f"unit-{unit:06d}.json"


# One job


@contextmanager
def only_job(root: Path, ranks: Ranks) -> Iterator[None]:
    """Keep other jobs out of the folder while any rank of this one lives; collective. At a good end `.build` goes.

    Raises:
        ValueError: another job works in it.
    """
    path = root / WORK_FOLDER / LOCK_NAME
    lock = ranks.agree(lambda: _take_lock(path) if ranks.is_first else None)
    if ranks.size > 1:  # any rank may outlive the others, so that all hold it together from now on
        lock = ranks.agree(lambda: _join_lock(path, lock) if ranks.is_first else None)
        lock = ranks.agree(lambda: lock if ranks.is_first else _join_lock(path, None))
    try:
        yield
        if not ranks.is_first:
            os.close(lock)
            lock = None
        ranks.wait()
        if ranks.is_first:
            for file in path.parent.iterdir():
                file.unlink()
    finally:
        if lock is not None:
            os.close(lock)
    if ranks.is_first:
        with suppress(OSError):  # another job has just come, to find that all is done
            path.parent.rmdir()


def _take_lock(path: Path) -> int:
    """A file locked for this process alone, which the system unlocks when it ends, however it does."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _locked(lock, fcntl.LOCK_EX):
            owner = os.read(lock, 200).decode(errors="replace").strip() or "another process"
            os.close(lock)
            if time.monotonic() > deadline:
                folder = path.parent.parent
                raise ValueError(f"{folder} is being built by {owner}: wait for its end, or choose another --output")
            time.sleep(0.1)
        elif path.exists() and os.path.samestat(os.fstat(lock), os.stat(path)):
            os.truncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return lock
        else:
            os.close(lock)  # its last owner has just removed it


def _join_lock(path: Path, lock: int | None) -> int:
    lock = os.open(path, os.O_RDWR) if lock is None else lock
    if not _locked(lock, fcntl.LOCK_SH):
        os.close(lock)
        raise ValueError(f"{path.parent.parent} is being built by a job that has begun just now: wait for its end")
    return lock


def _locked(lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(f"files cannot be locked here ({error.strerror}): start no second job on this folder", flush=True)
    return True


# What is there


def is_built(root: Path, plan: Manifest, overwrite: bool) -> bool:
    """Whether the folder is finished and as planned.

    Raises:
        ValueError: it was built otherwise, or is damaged, and may not be overwritten; or it is none of ours.
    """
    if not (root / MANIFEST_NAME).exists():
        work = root / WORK_FOLDER
        found = {*OURS} & {*_names(root)} | {*_names(work)} - {LOCK_NAME}
        if found and not {PLAN_NAME, EMPTYING_NAME} & {*_names(work)}:
            raise ValueError(f"{root} holds {', '.join(sorted(found))} of another origin: choose another --output")
        return False
    faults = faults_of(Manifest.load, root, plan.origin) or faults_of(check_folder, root, plan.origin)
    if faults and not overwrite:
        raise refusal(root, faults)
    return not faults


def prepare(root: Path, plan: Manifest, overwrite: bool) -> None:
    """Make the folder ready for units: empty, or with those that a build by the same plan has finished.

    Raises:
        ValueError: a build by another plan has begun, which may not be overwritten.
    """
    work = root / WORK_FOLDER
    plan_path, emptying = work / PLAN_NAME, work / EMPTYING_NAME
    if plan_path.exists() and not emptying.exists():
        faults = faults_of(Manifest.load_file, plan_path, plan.origin)
        if not faults:
            return
        if not overwrite:
            raise refusal(root, faults)
    start_over(root)  # a kill from here on leaves a folder that is known as ours
    for file in work.iterdir():
        if file.name not in (LOCK_NAME, EMPTYING_NAME):
            file.unlink()
    for name in (MANIFEST_NAME, REPORT_NAME, PLOT_NAME):
        (root / name).unlink(missing_ok=True)
    for name in OURS:
        shutil.rmtree(root / name, ignore_errors=True)
    for split in SPLITS:
        (root / split).mkdir()
    plan.save(plan_path)
    emptying.unlink()


def start_over(root: Path) -> None:
    """Have the next job drop what is built so far."""
    (root / WORK_FOLDER / EMPTYING_NAME).touch()
    sync_folder(root / WORK_FOLDER)


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []


def missing(root: Path, paths: Sequence[Path]) -> list[int]:
    """Numbers of those of our files that are not there. It lists the folder: over a network file system looking for a
    file that is not there would hide it for a while after another machine has made it."""
    names = {entry.name for entry in os.scandir(root / WORK_FOLDER)}
    return [number for number, path in enumerate(paths) if path.name not in names]


def finished_record(root: Path, unit: int) -> UnitRecord | None:
    """The record of a unit, if it can be read and its shards are there."""
    try:
        record = UnitRecord.load(record_path(root, unit))
    except ValueError:
        return None
    shards = [(root / split / shard.name, shard.bytes) for split in SPLITS for shard in record.shards[split]]
    return None if any(size_fault(*shard) for shard in shards) else record
