"""A launched command and every process that comes of it, known by a variable in the environment that all inherit."""

import subprocess
import time
import uuid
from contextlib import suppress
from pathlib import Path

import psutil

from tests.launcher import ROOT, environment

MARK = "CHAOS_JOB"


class Job:
    """A running command, both outputs in the file `log`. Used as a context: at its end nothing of it is left.

    Its parts are `deepspeed`, `launch.py`, `mpirun`, `pretrain.sh` (those of them that there are), `rank 0`, `rank 1`.
    """

    def __init__(self, command, log, **variables):
        self.log = log
        self._mark = uuid.uuid4().hex
        self._known = set()
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(**{**variables, MARK: self._mark}),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        while left := self.processes():
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            time.sleep(0.1)
        self.process.wait()

    @property
    def seconds(self):
        """Since it was started."""
        return time.monotonic() - self._started

    def is_running(self):
        """Whether the command has not ended; what it has started may outlive it."""
        return self.process.poll() is None

    def output(self):
        """What all its processes have said so far."""
        return self.log.read_text(errors="replace")

    def processes(self):
        """Every process of it that lives, the oldest first: those that carry the mark, and those that once did."""
        self.process.poll()  # or it would stay as a zombie
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark:
                    self._known.add(process)
        self._known = {process for process in self._known if _lives(process)}
        return sorted(self._known, key=lambda process: (process.create_time(), process.pid))

    def parts(self):
        """Its launchers and ranks that live, by name; not the short-lived helpers of theirs."""
        parts = {}
        for process in self.processes():
            with suppress(psutil.Error):
                # A child is a copy of its parent before it becomes what it is to be: the older one counts.
                parts.setdefault(_part(process.cmdline(), process.environ()), process)
        parts.pop(None, None)
        return parts

    def seconds_until_gone(self, limit):
        """How long it takes from now until no process is left; None where some are after `limit` seconds."""
        began = time.monotonic()
        while self.processes():
            if time.monotonic() > began + limit:
                return None
            time.sleep(0.1)
        return time.monotonic() - began


def _part(words, variables):
    """What a process is in its job; None for a helper."""
    names = [Path(word).name for word in words]
    rank = variables.get("RANK", variables.get("OMPI_COMM_WORLD_RANK"))
    if rank is not None:
        return f"rank {rank}" if "pretrain.py" in names[:4] else None
    if "deepspeed.launcher.launch" in words:
        return "launch.py"
    if names[:1] in (["mpirun"], ["prterun"]):
        return "mpirun"
    return next((name for name in ("deepspeed", "pretrain.sh") if name in names[:3]), None)


def _lives(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
