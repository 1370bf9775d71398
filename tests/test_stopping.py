"""Requests to stop, made to real processes, which must notice them and must not be interrupted."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress

import psutil
import pytest

from pipeline.stopping import JOB_FOLDER
from tests.launcher import BIN, environment, started
from tests.ranks import wait_for

# What every launcher does: it starts a command and waits for its end.
LAUNCHER = f"#!{sys.executable}\nimport subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))\n"

# The same by a shell script, which is a process of the shell's name.
SCRIPT = '#!/usr/bin/env bash\n"$@" &\nwait $!\n'

# Says in files of its folder how it is; works until it is asked to stop, and then until the test has seen enough.
WATCHED = """
import os, sys, time
from pathlib import Path
from pipeline import stopping

folder = Path(sys.argv[1])

def say(name, words):
    (folder / "unfinished").write_text(words)
    (folder / "unfinished").rename(folder / name)

def wait_for(condition):
    while not condition():
        time.sleep(0.01)

say("pid", str(os.getpid()))
wait_for((folder / "start").exists)
say("launchers", " ".join(str(process.pid) for process in stopping._launchers() or ()))
stop = stopping.StopRequest()
stop.listen()
say("listens", "")
wait_for(lambda: stop.reason)
say("reason", stop.reason)
wait_for((folder / "end").exists)
print("asked to stop by", stop.reason)
"""

# Its main thread waits in C for a mutex that nobody releases, as in a collective for a process that is gone.
WAITS = """
import ctypes

stop.at_once = lambda request: say("reason", stop.reason)
mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
while not library.pthread_mutex_lock(mutex):
    say("waits", "")
"""

# Prints more than any buffer holds, and ends well.
PRINTS = """
import sys
from pipeline.stopping import outlive_readers

outlive_readers()
for number in range(20000):
    print("line", number)
print("last", file=sys.stderr)
"""

MPIRUN = [BIN / "mpirun", "-n", "1", "--oversubscribe", "--bind-to", "none"]
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
BY_DEEPSPEED = {"CROSS_SIZE": "1"}  # its launch.py says so


class Watched:
    """A process that listens for requests to stop, and what it says."""

    def __init__(self, folder, process):
        self.folder = folder
        self._first = process
        wait_for((folder / "pid").exists)
        self.process = psutil.Process(int(self._said("pid")))
        self.pid = self.process.pid

    def listen(self):
        (self.folder / "start").touch()
        wait_for((self.folder / "listens").exists)

    def launchers(self):
        """Names of those whose loss it watches for."""
        return [psutil.Process(int(pid)).name() for pid in self._said("launchers").split()]

    def reason(self):
        wait_for((self.folder / "reason").exists)
        return self._said("reason")

    def end(self):
        """Exit code and output of the first launcher, where there is any, after it was let go."""
        (self.folder / "end").touch()
        output, _ = self._first.communicate(timeout=60)
        return self._first.returncode, output

    def _said(self, name):
        return (self.folder / name).read_text()


@contextmanager
def watched(folder, *launchers, by=(), program=WATCHED, **variables):
    """A Watched that the first of `launchers` has started through all others and the command `by`."""
    (folder / "watched.py").write_text(program)
    for name in launchers:
        (folder / name).write_text(SCRIPT if name.endswith(".sh") else LAUNCHER)
        (folder / name).chmod(0o755)
    command = [*(folder / name for name in launchers), *by, sys.executable, folder / "watched.py", folder]
    with started(command, **variables) as process:
        watched = Watched(folder, process)
        try:
            yield watched
        finally:
            with suppress(psutil.NoSuchProcess):
                watched.process.kill()  # mpirun has put it into a process group of its own


def kill(watched, name):
    """SIGKILL to the launcher of that name."""
    above = watched.process.parents()
    next(process for process in above if name in (process.name(), *map(os.path.basename, process.cmdline()))).kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_once_and_interrupts_nothing(tmp_path, number):
    with watched(tmp_path) as process:
        process.listen()
        os.kill(process.pid, number)
        assert process.reason() == number.name
        os.kill(process.pid, signal.SIGTERM)
        assert process.end() == (0, f"asked to stop by {number.name}\n")


def test_a_second_ctrl_c_interrupts(tmp_path):
    with watched(tmp_path) as process:
        process.listen()
        os.kill(process.pid, signal.SIGINT)
        assert process.reason() == "SIGINT"
        os.kill(process.pid, signal.SIGINT)
        code, output = process.end()
    assert code == -signal.SIGINT
    assert output.endswith("KeyboardInterrupt\n")


def test_the_script_asks_by_a_file(tmp_path):
    with watched(tmp_path, **{JOB_FOLDER: str(tmp_path)}) as process:
        process.listen()
        (tmp_path / "stop").touch()
        assert process.reason() == "launch/pretrain.sh"
        assert process.end() == (0, "asked to stop by launch/pretrain.sh\n")


@pytest.mark.parametrize(
    ("launchers", "job", "watched_for"),
    [
        (["nohup", "deepspeed", "launch.py"], False, ["launch.py", "deepspeed"]),
        (["pretrain.sh", "deepspeed", "launch.py"], True, ["launch.py", "deepspeed", "bash"]),
        (["nohup", "sshd", "shell", "launch.py"], True, ["launch.py", "shell", "sshd"]),
    ],
)
def test_who_must_not_be_lost(tmp_path, launchers, job, watched_for):
    variables = {**BY_DEEPSPEED, **({JOB_FOLDER: str(tmp_path)} if job else {})}
    with watched(tmp_path, *launchers, **variables) as process:
        process.listen()
        assert process.launchers() == watched_for


@pytest.mark.parametrize("lost", ["pretrain.sh", "deepspeed", "launch.py"])
def test_the_loss_of_a_launcher_is_noticed(tmp_path, lost):
    variables = {**BY_DEEPSPEED, JOB_FOLDER: str(tmp_path)}
    with watched(tmp_path, "pretrain.sh", "deepspeed", "launch.py", **variables) as process:
        process.listen()
        kill(process, lost)
        assert process.reason() == "the loss of its launcher"


@pytest.mark.parametrize(
    ("launchers", "lost", "variables"),
    [
        (["deepspeed", "launch.py"], ["deepspeed", "launch.py"], {}),
        (["pretrain.sh", "deepspeed", "launch.py"], ["pretrain.sh"], {JOB_FOLDER: "/"}),
    ],
)
def test_a_launcher_may_be_lost_before_anyone_listens(tmp_path, launchers, lost, variables):
    with watched(tmp_path, *launchers, **BY_DEEPSPEED, **variables) as process:
        for name in lost:
            kill(process, name)
        process.listen()
        assert process.reason() == "the loss of its launcher"


def test_the_loss_of_mpirun_is_noticed(tmp_path):
    with watched(tmp_path, by=MPIRUN, **AS_ROOT) as process:
        process.listen()
        assert process.launchers() == ["prterun"]  # what mpirun has become
        kill(process, "prterun")
        assert process.reason() == "the loss of its launcher"


def test_without_a_launcher_the_loss_of_a_parent_means_nothing(tmp_path):
    with watched(tmp_path, "nohup", **{JOB_FOLDER: str(tmp_path)}) as process:
        process.listen()
        assert process.launchers() == []
        kill(process, "nohup")
        (tmp_path / "stop").touch()  # it looks for launchers first, then for this file
        assert process.reason() == "launch/pretrain.sh"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_while_the_main_thread_waits(tmp_path, number):
    program = WATCHED.partition("wait_for(lambda: stop.reason)")[0] + WAITS
    with watched(tmp_path, program=program) as process:
        process.listen()
        wait_for((tmp_path / "waits").exists)
        os.kill(process.pid, number)
        assert process.reason() == number.name


def run_printing(**outputs):
    return subprocess.run([sys.executable, "-c", PRINTS], env=environment(), timeout=60, **outputs)


def test_what_is_printed_arrives():
    result = run_printing(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert result.stdout == "".join(f"line {number}\n" for number in range(20000))
    assert (result.returncode, result.stderr) == (0, "last\n")


@pytest.mark.parametrize("make", [os.pipe, os.openpty])
def test_printing_survives_the_loss_of_the_reader(make):
    reader, writer = make()
    os.close(reader)
    result = run_printing(stdout=writer, stderr=writer)
    os.close(writer)
    assert result.returncode == 0
