"""Checkpoints: complete or absent, and everything in them that decides the next step.

A checkpoint is a folder `checkpoints/step00000100/`: DeepSpeed's files (weights, optimizer, schedule, amplitudes), the
random generator of every rank, train_state.json, and manifest.json with the size of every file, written last. Only then
does `checkpoints/latest` move. DeepSpeed reads its files with pickle: load only checkpoints that you trust.
"""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file, save_file

from data_prep.files import atomic_file, sync_file, write_json
from data_prep.recipes import settings_from_dict, settings_to_dict
from pipeline.config import RunConfig, differences, zero_stage
from pipeline.engine import DeepSpeedEngine, World
from pipeline.loader import identity_differences

STATE_VERSION = 1
MANIFEST = "manifest.json"
STATE = "train_state.json"
LATEST = "latest"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names it, and the remedy."""


@dataclass(frozen=True)
class TrainState:
    """What the next step needs beside the engine's own state."""

    step: int
    """Optimizer steps done."""
    samples_consumed: int
    """Samples since the start of training: the loader's whole position."""
    world_size: int
    zero_stage: int
    data: dict[str, Any]
    """Identity of the sample order: index fingerprint, seed, shuffle (pipeline.loader)."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The recipe of the run, to name what a resumed one has changed."""
    version: int = STATE_VERSION

    def after_step(self, global_batch_size: int) -> "TrainState":
        """The state one optimizer step later."""
        return replace(self, step=self.step + 1, samples_consumed=self.samples_consumed + global_batch_size)


def find_start(config: RunConfig, checkpointer: "Checkpointer", data: dict[str, Any]) -> tuple[Path | None, TrainState]:
    """Where training starts: the checkpoint to load (None: from scratch) and the state that goes with it.

    A run goes on from its own newest checkpoint; only where it has none does `resume` name another's. Raises
    CheckpointError, naming what differs, where the checkpoint belongs to another training than `config` and `data` say.
    """
    checkpoint = checkpointer.newest()
    if checkpoint is None and config.resume not in ("auto", "never"):
        checkpoint = resolve_checkpoint(config.resume, checkpointer.world.agree)
    elif checkpoint and config.resume != "auto" and config.resume != read_state(checkpoint).recipe["resume"]:
        raise CheckpointError(
            f"resume is {config.resume}, but the run stands at {checkpoint}: set resume to auto to go on from there, "
            "or give the run another name"
        )
    stage = zero_stage(config)
    fresh = TrainState(0, 0, checkpointer.world.size, stage, data, recipe=settings_to_dict(config))
    if checkpoint is None:
        return None, fresh
    saved = read_state(checkpoint)
    changes = differences(settings_from_dict(RunConfig, saved.recipe), config) + identity_differences(saved.data, data)
    for name, unit in (("world_size", "processes"), ("zero_stage", "as ZeRO stage")):
        if getattr(saved, name) != getattr(fresh, name):
            changes.append(f"{name}: {getattr(saved, name)} {unit} in the checkpoint, {getattr(fresh, name)} now")
    refuse_changes(checkpoint, changes)
    return checkpoint, replace(fresh, step=saved.step, samples_consumed=saved.samples_consumed)


def refuse_changes(run: Path, changes: list[str]) -> None:
    """CheckpointError where anything that decides training has changed since `run` was written."""
    if changes:
        raise CheckpointError(
            f"{run} cannot be resumed by this recipe; undo the change, or give the run another name:\n  "
            + "\n  ".join(changes)
        )


class Checkpointer:
    """Saves and loads the checkpoints of one run; every method is called by all ranks together."""

    def __init__(self, folder: Path, world: World, keep: int = 2) -> None:
        self.folder = folder
        self.world = world
        self.keep = keep

    def save(self, engine: DeepSpeedEngine, state: TrainState) -> Path:
        """Write a checkpoint; it counts once its manifest lists every file of it. Then `latest` moves."""
        tag = f"step{state.step:08d}"
        target = self.folder / tag
        self.world.on_main(lambda: shutil.rmtree(target, ignore_errors=True))  # torn, or about to be replaced
        self.folder.mkdir(parents=True, exist_ok=True)
        engine.save_checkpoint(str(self.folder), tag=tag, save_latest=False)
        save_file(_generator_states(), target / f"generators_rank{self.world.rank}.safetensors")
        self.world.barrier()
        self.world.on_main(lambda: self._seal(target, state))
        return target

    def load(self, engine: DeepSpeedEngine, checkpoint: Path) -> None:
        """Restore the engine and this rank's generators from a complete checkpoint."""
        loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if loaded is None:
            raise CheckpointError(f"{checkpoint}: DeepSpeed found nothing to load; give another checkpoint")
        _restore_generators(load_file(checkpoint / f"generators_rank{self.world.rank}.safetensors"))

    def newest(self) -> Path | None:
        """The newest complete checkpoint of this run, the same on every rank; None where none was ever completed.

        Raises CheckpointError where there were checkpoints but none is whole any more.
        """
        tag = self.world.on_main(self._newest_tag)
        if tag is None:
            return None
        if not self.world.agree(is_complete(self.folder / tag)):
            raise CheckpointError(f"{self.folder / tag} is not complete on every machine: put it on a shared folder")
        return self.folder / tag

    def _newest_tag(self) -> str | None:
        for path in sorted(self.folder.glob("step*"), reverse=True):
            if is_complete(path):
                return path.name
            print(f"checkpoint {path} is incomplete: trying the one before", flush=True)
        if (self.folder / LATEST).exists():
            raise CheckpointError(
                f"no checkpoint in {self.folder} is complete any more: restore one, or remove the folder to start anew"
            )
        return None

    def _seal(self, target: Path, state: TrainState) -> None:
        write_json(target / STATE, asdict(state))
        files = sorted(path for path in target.rglob("*") if path.is_file())
        for path in files:
            sync_file(path)  # DeepSpeed leaves its files to the operating system
        write_json(target / MANIFEST, {"files": {str(path.relative_to(target)): path.stat().st_size for path in files}})
        with atomic_file(self.folder / LATEST) as file:
            file.write(target.name.encode())
        complete = sorted(path for path in self.folder.glob("step*") if is_complete(path))
        for old in complete[: -self.keep]:
            shutil.rmtree(old)


def read_state(checkpoint: Path) -> TrainState:
    """The TrainState of a checkpoint; CheckpointError where this version cannot read it."""
    values = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if values.get("version") != STATE_VERSION:
        raise CheckpointError(
            f"{checkpoint / STATE} has version {values.get('version')}, this program reads {STATE_VERSION}: "
            "resume with the version of spikelm that wrote it"
        )
    return TrainState(**values)


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights in fp32, as the optimizer holds them, and buffers as they are, of any ZeRO stage and number of processes.

    Weights that are tied to others stand under each of their names.
    """
    with redirect_stdout(io.StringIO()):  # DeepSpeed tells what it does
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)


def resolve_checkpoint(given: str | Path, agree: Callable[[bool], bool] = bool) -> Path:
    """The complete checkpoint that a path names: the checkpoint itself, its folder of checkpoints, or its run.

    `agree` says of what this process sees whether all do. Raises CheckpointError where the checkpoint is not complete.
    """
    path = Path(given)
    for folder in (path, path / "checkpoints"):
        if (folder / LATEST).is_file():
            path = folder / (folder / LATEST).read_text(encoding="utf-8").strip()
            break
    if not agree(is_complete(path)):
        raise CheckpointError(
            f"{given} is no complete checkpoint: give a folder like runs/NAME/checkpoints/step00000100, "
            "with its manifest.json and every file that it lists"
        )
    return path


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that the checkpoint's manifest lists is there in its full size."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _generator_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_generators(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
