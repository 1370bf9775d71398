"""Requests to stop: signals, a launcher that is gone, and a file that launch/pretrain.sh makes.

Nothing is interrupted by them. Training asks after every step, agrees over all ranks, saves and leaves.
"""

import ctypes
import io
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import psutil

SCRIPT = "pretrain.sh"
JOB_FOLDER = "SPIKELM_JOB"
"""Environment variable with the folder that launch/pretrain.sh shares with its processes: `stop`, `exit_code`."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)
POLL_SECONDS = 0.5
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


class StopRequest:
    """Whether somebody wants this process to stop; `reason` says who, and is None while nobody does.

    Args:
        at_once: called from a thread at a request while it is set: for the time in which there is nothing to save.
    """

    def __init__(self, at_once: "Callable[[StopRequest], object] | None" = None) -> None:
        self.reason: str | None = None
        self.is_bereaved = False
        """Whether DeepSpeed's launcher asked because another process has died: to it that is all the same."""
        self.at_once = at_once

    def listen(self) -> None:
        """From now on take SIGTERM and SIGINT as requests, and watch launchers and file from a thread.

        A launcher that is killed leaves its processes behind, so these look for themselves.
        """
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        # Python calls a handler when the main thread is back from what it waits for; the thread hears at once.
        ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        signal.set_wakeup_fd(mouth.detach())
        threading.Thread(target=self._watch, args=(ear, _launchers()), daemon=True, name="stop-request").start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._note(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)  # who presses Ctrl-C again will not wait for a checkpoint

    def _watch(self, ear: socket.socket, launchers: list[psutil.Process] | None) -> None:
        job = Path(os.environ[JOB_FOLDER]) if JOB_FOLDER in os.environ else None
        while True:
            heard = ear.recv(1)[0] if select.select([ear], [], [], POLL_SECONDS)[0] else None
            if heard in SIGNALS:  # others are heard, too: of children that have ended
                self.is_bereaved = _has_lost_siblings(launchers)
                self._note(signal.Signals(heard).name)
            elif launchers is None or not all(map(_is_alive, launchers)):
                self._note("the loss of its launcher")
            elif job and ((job / "stop").exists() or not job.exists()):  # without a folder the script is gone
                self._note("launch/pretrain.sh")
            at_once = self.at_once  # the main thread may set it to None now
            if self.reason is not None and at_once is not None:
                at_once(self)

    def _note(self, reason: str) -> None:
        self.reason = self.reason or reason


_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """For a child before it becomes another program: Linux ends it when the process that started it is gone."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class _Pipe(io.FileIO):
    """Where a process writes to, though perhaps nobody reads any more."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError:  # a pipe that is broken, a terminal that is closed, a log on a disk that is full
            return len(data)


def outlive_readers() -> None:
    """Print into the void where the launcher that reads it is gone, instead of failing before the last checkpoint."""
    for name in ("stdout", "stderr"):
        pipe = _Pipe(getattr(sys, name).fileno(), "w", closefd=False)
        text = io.TextIOWrapper(io.BufferedWriter(pipe), "utf-8", "backslashreplace", line_buffering=True)
        setattr(sys, name, text)


def _launchers() -> list[psutil.Process] | None:
    """The processes without which this one must not go on; None where they are gone already.

    Of DeepSpeed these are launch.py and, above it, the command `deepspeed`, or the ssh server on a machine that was
    reached by ssh. launch/pretrain.sh stands above the command.
    """
    if "CROSS_SIZE" in os.environ:  # set by DeepSpeed's launch.py alone
        parent, fronts = "launch", ("deepspeed", "ds", "runner", "sshd")
    elif "OMPI_COMM_WORLD_SIZE" in os.environ:
        parent, fronts = "mpi", ("mpirun", "mpiexec", "prterun", "prted", "orted")
    else:
        return []
    ancestors = psutil.Process().parents()
    names = [_name(ancestor) for ancestor in ancestors]
    front = next((place for place, name in enumerate(names) if name.startswith(fronts)), None)
    if front is None:
        # Under a launcher of another name its process is watched alone, if it is still there.
        return ancestors[:1] if names[:1] and parent in names[0] and len(ancestors) > 2 else None
    has_script = JOB_FOLDER in os.environ and not names[front].startswith(("sshd", "prted", "orted"))
    if has_script and not any(map(_runs_script, ancestors[front + 1 : front + 2])):
        return None  # it has gone already, and somebody else adopted its child
    return ancestors[: front + 1 + has_script]


def _has_lost_siblings(launchers: list[psutil.Process] | None) -> bool:
    """Whether DeepSpeed's launch.py has fewer children than it has started."""
    try:
        return bool(launchers) and len(launchers[0].children()) < int(os.environ.get("LOCAL_SIZE", 0))
    except psutil.Error:
        return False


def _name(process: psutil.Process) -> str:
    """What a process is called: a Python script or module by its own name, not by its interpreter's."""
    try:
        words = process.cmdline()
        module = words[words.index("-m") + 1] if "-m" in words[:-1] else next(iter(words[1:2]), "")
        is_python = process.name().startswith("python") or Path(module).name in ("deepspeed", "ds")
        return Path(module).name.rpartition(".")[2] if is_python else process.name()
    except psutil.Error:
        return ""


def _runs_script(process: psutil.Process) -> bool:
    """Whether this is launch/pretrain.sh: its process has the name of the shell that reads it."""
    try:
        return any(Path(word).name == SCRIPT for word in process.cmdline())
    except psutil.Error:
        return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
