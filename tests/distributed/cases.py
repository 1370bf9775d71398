"""What a row of the fault table is, and the private folder in which its fault is brought about."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.distributed.modes import AS_ROOT
from tests.distributed.runs import STEPS, run_arguments
from tests.launcher import ROOT, deepspeed_command, free_port

ENDS_WITHIN = 120
"""Seconds, of which a sound training of STEPS steps takes a sixth; several commands share the machine."""

NAME = "tiny"
OLDER, NEWEST = (f"step{step:08d}" for step in (STEPS - 2, STEPS))


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    name: str
    prepare: Callable[["Case"], list[str] | None]
    """Brings the fault about; returns what is to be added to the command."""
    told: tuple[str, ...]
    """Patterns that the message matches: the thing, its value, the remedy."""
    begins: str
    """How the message's first line begins, as one line of the output does and no other."""
    exit_code: int
    launcher: str
    """deepspeed, or mpirun, which starts sooner."""
    writes: str
    """Pattern of the files, seen from the private folder, that may rightly be new or changed afterwards."""


class Case:
    """The private folder of a fault, with sound shards in it.

    Attributes:
        launcher: deepspeed, or mpirun
        trained: a finished run of these shards, with the checkpoints OLDER and NEWEST
        output: folder of runs
        meanwhile: called when the command has been started
        afterwards: called when the command has ended and all is hashed
        until_end: what is undone after that
    """

    def __init__(self, launcher: str, folder: Path, trained: Path) -> None:
        self.launcher = launcher
        self.folder = folder
        self.trained = trained
        self.shards = folder / "shards"
        self.train = self.shards / "train"
        self.output = folder / "runs"
        self.run = self.output / NAME
        self.checkpoints = self.run / "checkpoints"
        self.port = free_port()
        self.environment = dict(AS_ROOT)
        self.meanwhile: Callable[[], None] = lambda: None
        self.afterwards: Callable[[], None] = lambda: None
        self.until_end = ExitStack()

    def command(self, *more: str, processes: int = 2) -> list[str]:
        """Train STEPS steps on the shards, with whatever `more` says."""
        arguments = run_arguments(self.shards, self.output, NAME, 2, "fp32", *more)
        if self.launcher == "mpirun":
            launcher = ["mpirun", "-n", str(processes), "--oversubscribe", "--bind-to", "none", "python"]
            return [*launcher, "pipeline/pretrain.py", *arguments]
        command = deepspeed_command("pipeline/pretrain.py", *arguments, processes=processes)
        command[command.index("--master_port") + 1] = str(self.port)
        return command

    def unfinished_run(self, *checkpoints: str) -> None:
        """A run that was killed, with these checkpoints."""
        shutil.copytree(self.trained, self.run)
        (self.run / "DONE").unlink()
        for gone in {OLDER, NEWEST} - set(checkpoints):
            shutil.rmtree(self.checkpoints / gone)

    def recipe(self, **changes: object) -> list[str]:
        """The arguments for the recipe with sections or fields put into them."""
        content = yaml.safe_load((ROOT / "tests/distributed/tiny.yaml").read_text())
        for name, value in changes.items():
            content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(content))
        return ["--recipe", str(self.folder / "recipe.yaml")]

    def ds_config(self, **keys: object) -> list[str]:
        """The arguments for ds_configs/zero2.json with more keys in it."""
        content = json.loads((ROOT / "ds_configs/zero2.json").read_text())
        (self.folder / "ds.json").write_text(json.dumps({**content, **keys}))
        return ["--engine.ds_config", str(self.folder / "ds.json")]

    def raw_text(self, name: str, content: bytes) -> list[str]:
        """The arguments for a run that finds no shards, but recipes to make tokenizer and shards of this text."""
        shutil.rmtree(self.shards)
        (self.folder / name).write_bytes(content)
        text, tokenizer = [str(self.folder / name)], str(self.folder / "tokenizer")
        recipes = {
            "tokenizer_recipe": {"input": text, "kind": "wordpiece", "vocab_size": 256, "output": tokenizer},
            "shards_recipe": {"input": text, "tokenizer": tokenizer, "output": str(self.shards)},
        }
        for kind, recipe in recipes.items():
            (self.folder / kind).write_text(yaml.safe_dump(recipe))
        return [word for kind in recipes for word in (f"--data.{kind}", str(self.folder / kind))]


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace a file, which may be linked elsewhere, by what `change` makes of its bytes."""
    content = change(path.read_bytes())
    path.unlink()
    path.write_bytes(content)


def flip_bit(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    rewrite(path, lambda _: bytes(content))
