"""Pretrain a SpikeLM encoder: `deepspeed --num_gpus 2 pipeline/pretrain.py --recipe launch/recipes/demo.yaml`.

`--help` explains every field of a recipe. The same command again resumes where the run stands.
"""

import os
import sys
import tempfile
from pathlib import Path

import yaml

from data_prep.recipes import save_settings, settings_from_dict
from data_prep.shards import CorruptShard
from pipeline.checkpoint import Checkpointer, CheckpointError, find_start, refuse_changes
from pipeline.config import RunConfig, differences, load_run_config
from pipeline.corpus import open_corpus
from pipeline.engine import World, build_engine, seed_dropout, seed_weights, start_world, stop_world
from pipeline.metrics import Metrics
from pipeline.model import build_model
from pipeline.trainer import NonFiniteError, Trainer, run_folder

UNFINISHED, FINISHED = "unfinished", "finished"

DONE = "DONE"
"""The file that says, alone, that a run is finished."""

RECIPE = "recipe.yaml"


def pretrain(config: RunConfig) -> None:
    """Train the run that `config` describes to its end, from wherever it stands."""
    run_dir = run_folder(config)
    world = start_world(config.engine.timeout_minutes, config.threads)
    if world.on_main(lambda: open_run(config, run_dir)) == FINISHED:
        return
    corpus = open_corpus(config, world)
    checkpointer = Checkpointer(run_dir / "checkpoints", world, config.checkpoint.keep)
    checkpoint, state = find_start(config, checkpointer, corpus.identity())

    seed_weights(config.seed)
    model, remarks = build_model(config, corpus)
    engine = build_engine(model, config, world, run_dir)
    seed_dropout(config.seed, world.rank)
    if checkpoint:
        checkpointer.load(engine, checkpoint)
    metrics = Metrics(
        run_dir,
        enabled=world.is_main,
        total_steps=config.training.total_steps,
        progress=config.logging.progress,
        monitor=engine.monitor if config.logging.tensorboard else None,
    )
    metrics.cut_after(state.step if checkpoint else None)
    if world.is_main:
        save_settings(config, run_dir / RECIPE)
        _say_start(config, world, checkpoint, remarks)
    state = Trainer(engine, config, world, corpus, checkpointer, metrics, state).run()
    metrics.close()
    if world.is_main:
        close_run(config, run_dir, state.step)
    world.barrier()  # all leave together: none takes its connections down while another still uses them


def open_run(config: RunConfig, run_dir: Path) -> str:
    """Make the run's folder ready: UNFINISHED, or FINISHED where it has reached its last step already.

    Raises CheckpointError where it did so by another recipe, or is not empty and `resume` is never; ValueError where
    the folder cannot be written to.
    """
    if config.resume == "never" and run_dir.exists() and any(run_dir.iterdir()):
        raise CheckpointError(f"resume is never, but {run_dir} is not empty: give the run another name, or remove it")
    if (run_dir / DONE).exists():
        saved = settings_from_dict(RunConfig, yaml.safe_load((run_dir / RECIPE).read_text(encoding="utf-8")))
        refuse_changes(run_dir, differences(saved, config))
        _say_finished(run_dir)
        return FINISHED
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            return UNFINISHED
    except OSError as error:
        raise ValueError(f"{run_dir} cannot be written to ({error.strerror}): change `output` or its rights") from error


def close_run(config: RunConfig, run_dir: Path, step: int) -> None:
    """Mark the run as finished at its last step, or say how to go on."""
    total = config.training.total_steps
    if step == total:
        (run_dir / DONE).write_text(f"{step}\n", encoding="utf-8")
        _say_finished(run_dir)
    else:
        print(
            f"stopped at step {step} of {total}: go on without training.stop_after_step, or with a later one",
            flush=True,
        )


def _say_start(config: RunConfig, world: World, checkpoint: Path | None, remarks: list[str]) -> None:
    where = f"resuming from {checkpoint}" if checkpoint else "starting afresh"
    print(f"{config.name}: {where}, {world.size} process(es) on {world.device.type}", flush=True)
    for remark in remarks:
        print(f"  {remark}", flush=True)


def _say_finished(run_dir: Path) -> None:
    print(
        f"{run_dir} is finished. See it: python -m pipeline.report {run_dir}. "
        "To train longer, start another run: --name NAME --training.total_steps N",
        flush=True,
    )


def main() -> int:
    """The command: exit code 0, or 2 with one line for input that cannot work."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        pretrain(load_run_config(sys.argv[1:]))
    except (ValueError, NonFiniteError) as error:
        # What every rank finds wrong, rank 0 tells; what only one can know, that one does.
        if rank == 0 or isinstance(error, (CorruptShard, NonFiniteError)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        stop_world()
    return 0


if __name__ == "__main__":
    sys.exit(main())
