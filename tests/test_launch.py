import os
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner

LAUNCH = Path(__file__).resolve().parent.parent / "launch"

# What a shell, or DeepSpeed, might take for something else than a part of a value.
VALUES = [
    "eth0",
    "two words",
    "$HOME and ${HOME} and $(pwd) and `pwd`",
    'it\'s "quoted"',
    "back\\slash \\$ \\\\",
    "a=b;c&d|e>f*",
    "#no comment",
    "~/folder",
    "!1",
    "",
]


def in_bash(script, **changes):
    """What bash prints for `script` in this environment without what launch/env.sh sets, but with `changes`."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PROCESSES", "MASTER_PORT")}
    command = ["bash", "-euc", script]
    return subprocess.check_output(command, env={**kept, **changes}, cwd=LAUNCH.parent, text=True)


def exported(name, **changes):
    """A variable as launch/env.sh leaves it to the programs that it starts."""
    return in_bash(f". {LAUNCH / 'env.sh'} && printenv {name}", **changes).removesuffix("\n")


@pytest.fixture
def gpus(tmp_path):
    """gpus(number): the PATH of a machine that has so many."""

    def path(number):
        program = tmp_path / f"{number}" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\nseq -f 'GPU %g: a model (UUID: GPU-1)' {number}\n")
        program.chmod(0o755)
        return f"{program.parent}:{os.environ['PATH']}"

    return path


def test_there_is_a_process_for_each_gpu_or_two_without(gpus):
    assert [exported("PROCESSES", PATH=gpus(number)) for number in (0, 1, 2, 8)] == ["2", "1", "2", "8"]
    assert exported("PROCESSES", PROCESSES="5") == "5"


def test_our_packages_and_programs_come_first():
    assert exported("PYTHONPATH", PYTHONPATH="/other").split(":") == [str(LAUNCH.parent), "/other"]
    assert exported("PATH", PATH="/usr/bin:/bin") == f"{LAUNCH.parent}/.venv/bin:/usr/bin:/bin"


class TestDeepspeedEnvironment:
    """launch/deepspeed_env.sh, read by DeepSpeed as it reads such a file."""

    @pytest.fixture
    def file(self, tmp_path):
        return tmp_path / "environment"

    def test_every_line_is_a_name_and_a_value(self, file):
        values = {f"NCCL_{number}": value for number, value in enumerate(VALUES)}
        in_bash(f"{LAUNCH / 'deepspeed_env.sh'} {file}", DS_ENV_FILE="another", HF_TOKEN="secret", **values)
        lines = file.read_text().splitlines()
        names = [line.split("=", maxsplit=1)[0] for line in lines]
        assert all(name.isidentifier() for name in names)
        assert {"PATH", "PYTHONPATH", *values} <= set(names)
        assert not {"DS_ENV_FILE", "HF_TOKEN", "HOME"} & set(names)

    @pytest.mark.parametrize("shell", ["bash", "sh"])
    def test_values_arrive_as_they_are(self, file, tmp_path, shell):
        values = {f"GLOO_{number}": value for number, value in enumerate(VALUES)}
        in_bash(f"{LAUNCH / 'deepspeed_env.sh'} {file}", **values)
        names = list(values)
        command = f"{exports(file)} printenv -0 {' '.join(names)}"
        arrived = subprocess.check_output([shell, "-c", command], env={"HOME": str(tmp_path)}, text=True)
        assert dict(zip(names, arrived.split("\0"), strict=False)) == values


def exports(file):
    """The commands that DeepSpeed prepends to what pdsh runs on every machine."""
    runner = PDSHRunner(Namespace(user_args=[], user_script="script.py", launcher_args=""), "")
    for line in file.read_text().splitlines(keepends=True):
        runner.add_export(*line.split("=", maxsplit=1))
    return " ".join(f"export {name}={value};" for name, value in runner.exports.items())
