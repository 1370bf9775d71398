"""What launcher and processes of a run tell each other before the ranks have met. Imported before torch is."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipeline.stopping import JOB_FOLDER

START_SECONDS = 30.0
"""How long the others leave it to rank 0, which may still be starting, to say what all of them have found alike."""
POLL_SECONDS = 0.1


def told_by_launcher(name: str) -> int:
    """This process's RANK or LOCAL_RANK; 0 where there is no launcher."""
    return int(os.environ.get(name) or os.environ.get(f"OMPI_COMM_WORLD_{name}") or 0)


def speaks_without_rank_0(rank: int, local_rank: int) -> bool:
    """Where rank 0 may be gone nobody knows who speaks first: one of each machine does, and on rank 0's rank 1."""
    return rank == 1 or local_rank == 0


def tell_once(say: Callable[[], None]) -> None:
    """Say what all ranks have found alike: rank 0 at once, and the others where it has not ended by then.

    These wait, since launchers kill all processes when one ends, and rank 0 may be about to speak.
    """
    rank, local_rank = told_by_launcher("RANK"), told_by_launcher("LOCAL_RANK")
    if rank > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if has_ended():
                return
            time.sleep(POLL_SECONDS)
        if not speaks_without_rank_0(rank, local_rank):
            return
    say()


def has_ended() -> bool:
    """Whether a rank has left its exit code, after what it had to say."""
    job = os.environ.get(JOB_FOLDER)
    return bool(job) and (Path(job) / "exit_code").exists()


def leave_code(code: int) -> None:
    """Write the exit code to where launch/pretrain.sh looks for it: launchers do not always pass it on."""
    job = os.environ.get(JOB_FOLDER)
    if job:
        # The first code stays. The script may be gone, with its folder, or the disk full.
        with suppress(OSError), open(Path(job) / "exit_code", "x", encoding="utf-8") as file:
            file.write(f"{code}\n")
