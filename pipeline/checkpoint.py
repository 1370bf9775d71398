"""Checkpoints: complete or absent, and everything in them that decides the next step.

A checkpoint is a folder `checkpoints/step00000100/`: DeepSpeed's files (weights, optimizer, schedule, amplitudes), the
random generator of every rank, train_state.json, and manifest.json with size and checksum of every file, written last.
Only then does `checkpoints/latest` move. DeepSpeed reads its files with pickle: load only checkpoints that you trust.
"""

import io
import shutil
import socket
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data_prep.files import atomic_file, hash_file, read_record, sync_file, write_json
from data_prep.recipes import settings_from_dict, settings_to_dict
from pipeline.config import RunConfig, differences, mixture_differences, zero_stage
from pipeline.ending import first_line, is_lost
from pipeline.engine import DeepSpeedEngine
from pipeline.loader import identity_differences
from pipeline.world import World

STATE_VERSION = 1
MANIFEST = "manifest.json"
STATE = "train_state.json"
LATEST = "latest"


@dataclass(frozen=True)
class FileRecord:
    """What a file of a checkpoint must be."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class CheckpointManifest:
    """Every file of a checkpoint but this one, by name."""

    files: dict[str, FileRecord]
    version: int = STATE_VERSION


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names it, and the remedy."""


@dataclass(frozen=True)
class Search:
    """The best checkpoint so far, by the first metric of a task."""

    evaluated_step: int
    """The last step after which it was measured."""
    best_step: int
    best_score: float
    misses: int = 0
    """Evaluations since then, none of which was better."""

    def after(self, step: int, score: float) -> "Search":
        """The search one evaluation later."""
        if score > self.best_score:
            return Search(step, step, score)
        return replace(self, evaluated_step=step, misses=self.misses + 1)


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
    search: Search | None = None
    """Of fine-tuning, once it has been measured."""
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
        checkpoint = resolve_checkpoint(config.resume, checkpointer.world)
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
    before = settings_from_dict(type(config), saved.recipe)
    changes = differences(before, config)
    if others := identity_differences(saved.data, data):
        if any(saved.data.get(name) != data.get(name) for name in ("fingerprint", "shares")):
            changes += mixture_differences(before, config)
        changes += others
    if saved.world_size != fresh.world_size:
        changes.append(
            f"{saved.world_size} processes in the checkpoint, {fresh.world_size} now: launch as many as then"
        )
    if saved.zero_stage != stage:
        changes.append(f"engine.ds_config: ZeRO stage {saved.zero_stage} in the checkpoint, {stage} now")
    refuse_changes(checkpoint, changes)
    return checkpoint, replace(fresh, step=saved.step, samples_consumed=saved.samples_consumed, search=saved.search)


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
        """Write a checkpoint; it counts once its manifest lists every file of it. Then `latest` moves.

        Raises CheckpointError where it cannot be written; what there is of it is removed, and older ones stay.
        """
        target = self.at_step(state.step)
        self.world.on_main(lambda: shutil.rmtree(target, ignore_errors=True))  # torn, or about to be replaced
        try:
            self._write(engine, target, state)
        except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:
            if self.world.is_main:
                shutil.rmtree(target, ignore_errors=True)
            if not _is_of_the_disk(error):
                raise
            free = shutil.disk_usage(next(folder for folder in (self.folder, *self.folder.parents) if folder.exists()))
            raise CheckpointError(
                f"{target} cannot be written; {free.free / 1e6:,.0f} MB are free there. Make room, or set "
                "checkpoint.keep lower; the same command then goes on from the checkpoint before "
                f"({first_line(error)})"
            ) from error
        best = None if state.search is None else self.at_step(state.search.best_step)
        self.world.on_main(lambda: self._prune(target, best))
        return target

    def at_step(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return step_folder(self.folder, step)

    def load(self, engine: DeepSpeedEngine, checkpoint: Path) -> None:
        """Restore the engine and this rank's generators from a complete checkpoint."""
        try:
            loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        except (OSError, RuntimeError, AssertionError, KeyError) as error:
            if is_lost(error):
                raise
            raise CheckpointError(f"{checkpoint} cannot be loaded: {first_line(error)}; give another one") from error
        if loaded is None:
            raise CheckpointError(f"{checkpoint}: DeepSpeed found nothing to load; give another checkpoint")
        _restore_generators(load_file(checkpoint / f"generators_rank{self.world.rank}.safetensors"))

    def newest(self) -> Path | None:
        """The newest intact checkpoint of this run, the same on every rank; None where none was ever completed.

        Raises CheckpointError where there were checkpoints but none is whole any more.
        """
        newest, faults = _newest_intact(self.world.on_main(lambda: _tags(self.folder)), self.folder, self.world)
        if newest is None and self.world.on_main(lambda: (self.folder / LATEST).exists()):
            raise CheckpointError(
                f"no checkpoint in {self.folder} is intact any more ({'; '.join(faults)}): restore one, or remove the "
                "folder to start anew"
            )
        return newest

    def _write(self, engine: DeepSpeedEngine, target: Path, state: TrainState) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        engine.save_checkpoint(str(self.folder), tag=target.name, save_latest=False)
        save_file(_generator_states(), target / f"generators_rank{self.world.rank}.safetensors")
        if self.world.is_main:
            write_json(target / STATE, asdict(state))
        self.world.barrier()
        files = sorted(path for path in target.rglob("*") if path.is_file())
        share = {str(path.relative_to(target)): _record(path) for path in files[self.world.rank :: self.world.size]}
        records = {name: record for part in self.world.gather(share) for name, record in part.items()}
        if not self.world.agree(len(records) == len(files)):
            raise CheckpointError(f"the ranks see different files in {target}: put `output` into a shared folder")
        self.world.on_main(lambda: self._seal(target, CheckpointManifest(records)))

    def _seal(self, target: Path, manifest: CheckpointManifest) -> None:
        write_json(target / MANIFEST, asdict(manifest))
        with atomic_file(self.folder / LATEST) as file:
            file.write(target.name.encode())

    def _prune(self, newest: Path, best: Path | None) -> None:
        """Keep `best` and the last checkpoints up to `newest`. Later ones are of a future given up, damaged perhaps."""
        folders = [self.folder / tag for tag in _tags(self.folder)]
        sealed = [folder for folder in folders if folder <= newest and (folder / MANIFEST).exists()]
        for old in set(folders) - {*sealed[: self.keep], best}:
            (old / MANIFEST).unlink(missing_ok=True)  # first: what is left of it by a kill is torn, not damaged
            shutil.rmtree(old, ignore_errors=True)


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where, among the checkpoints of a run, that of a step lies."""
    return checkpoints / f"step{step:08d}"


def read_state(checkpoint: Path) -> TrainState:
    """The TrainState of a checkpoint; CheckpointError where this version cannot read it."""
    try:
        return read_record(TrainState, checkpoint / STATE, STATE_VERSION)
    except ValueError as error:
        raise CheckpointError(f"{error}; or resume with the version of spikelm that wrote it") from error


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights in fp32, as the optimizer holds them, and buffers as they are, of any ZeRO stage and number of processes.

    Weights that are tied to others stand under each of their names.
    """
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # DeepSpeed tells what it does
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)


def resolve_checkpoint(given: str | Path, world: World | None = None) -> Path:
    """The intact checkpoint that a path names: the checkpoint itself, or the newest of a run or its checkpoints/.

    With a world, all ranks look together. Raises CheckpointError, naming what is wrong, where there is none.
    """
    path = Path(given)
    agree = world.agree if world else bool
    if not agree(path.exists()):
        raise CheckpointError(f"{given} does not exist: name a run, as runs/NAME, or one of its checkpoints")
    folder = next((folder for folder in (path, path / "checkpoints") if _tags(folder)), None)
    if not agree(not _is_young_run(path)):
        raise CheckpointError(
            f"{given} has no checkpoint yet: wait for the first, at step checkpoint.every of its recipe"
        )
    runs = sorted(inner.parent.name for inner in path.glob("*/checkpoints") if _tags(inner))
    if not agree(bool(folder) or not runs):
        raise CheckpointError(f"{given} is a folder of runs: name one of them ({', '.join(runs)})")
    tags, folder = (_tags(folder), folder) if folder else ([path.name], path.parent)
    intact, faults = _newest_intact(tags, folder, world)
    if intact is None:
        raise CheckpointError(
            f"{given} is no intact checkpoint ({'; '.join(faults)}): give a folder like "
            "runs/NAME/checkpoints/step00000100, with its manifest.json and every file that it lists"
        )
    return intact


def intact_checkpoint(checkpoint: Path, world: World | None = None) -> Path:
    """`checkpoint` itself; CheckpointError where it is not whole. With a world, all ranks look together."""
    if faults := _faults(checkpoint, world):
        raise CheckpointError(f"{checkpoint} is not intact ({faults[0]}): restore it, or remove the run to start anew")
    return checkpoint


def _is_young_run(path: Path) -> bool:
    """Whether a run has begun in this folder and has not saved anything."""
    return (path / "recipe.yaml").exists() and not _tags(path / "checkpoints")


def _tags(folder: Path) -> list[str]:
    """The checkpoints in a folder, whole or not, the newest first."""
    return sorted((path.name for path in folder.glob("step*") if path.is_dir()), reverse=True)


def _newest_intact(tags: list[str], folder: Path, world: World | None) -> tuple[Path | None, list[str]]:
    """The first of `tags` that is intact, and what is wrong with those before it, which rank 0 tells."""
    told: list[str] = []
    for tag in tags:
        faults = _faults(folder / tag, world)
        if not faults:
            return folder / tag, told
        told.append(f"{tag}: {faults[0]}")
        if len(tags) > 1 and (world is None or world.is_main):
            print(f"checkpoint {folder / tag} is passed over: {faults[0]}", flush=True)
    return None, told


def _faults(checkpoint: Path, world: World | None) -> list[str]:
    """What is wrong with a checkpoint, as far as one line a rank tells; every rank reads its share of the files."""
    rank, size = (world.rank, world.size) if world else (0, 1)
    try:
        records = read_record(CheckpointManifest, checkpoint / MANIFEST, STATE_VERSION).files
        names = sorted(records)[rank::size]
        fault = next((fault for name in names if (fault := _file_fault(checkpoint / name, records[name]))), None)
    except ValueError as error:
        fault = str(error)
    faults = world.gather(fault and f"{fault} (seen from {socket.gethostname()})") if world else [fault]
    return [fault for fault in faults if fault]


def _is_of_the_disk(error: Exception) -> bool:
    """Whether a write has failed: torch's own errors have no type."""
    return (
        isinstance(error, OSError | SafetensorError)
        or "PytorchStreamWriter" in str(error)
        or "inline_container" in str(error)
    )


def _file_fault(path: Path, record: FileRecord) -> str | None:
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"{path.name} has {size} bytes, expected {record.bytes}"
        return None if hash_file(path) == record.xxh3_128 else f"{path.name} is damaged: its checksum differs"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"


def _record(path: Path) -> FileRecord:
    """What a file is now, once it lies on the disk: DeepSpeed leaves its files to the operating system."""
    sync_file(path)
    return FileRecord(path.stat().st_size, hash_file(path))


def _generator_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_generators(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
