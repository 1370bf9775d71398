"""Runs our programs under the real deepspeed launcher, in a process group of their own that ends with the test."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def environment(**extra):
    """The environment of a launched program: our interpreter's folder first, one thread a process."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **extra}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def deepspeed_command(script, *arguments, processes=2):
    launcher = ["deepspeed", "--num_gpus", str(processes), "--master_port", str(free_port())]
    return [str(BIN / launcher[0]), *launcher[1:], str(ROOT / script), *map(str, arguments)]


@contextmanager
def started(command, **extra):
    """A running `command`, both outputs in stdout; whatever is left of its process group is killed at the end."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(command, *, timeout=300, **extra):
    """Runs `command` to its end, or kills it at the time limit."""
    with started(command, **extra) as process:
        output, _ = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(command, process.returncode, output)


def launch(script, *arguments, processes=2, **options):
    """Runs `script` on that many processes and returns its output; fails the test with it where it did not end well."""
    result = run(deepspeed_command(script, *arguments, processes=processes), **options)
    assert result.returncode == 0, result.stdout[-6000:]
    return result.stdout
