"""Pretrain a SpikeLM: `deepspeed --hostfile launch/hosts pipeline/pretrain.py [--recipe FILE] [--field VALUE]`.

`--help` explains every field of a recipe; without --recipe the demonstration is trained, launch/recipes/demo.yaml. The
same command again resumes where the run stands. Exit codes: pipeline/ending.py.
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from pipeline.checkpoint import Checkpointer, find_start
from pipeline.command import run_training
from pipeline.config import RunConfig, load_run_config
from pipeline.corpus import build_missing_shards, open_corpus
from pipeline.ending import FINISHED, STOPPED, Stopped
from pipeline.engine import build_engine, seed_dropout, seed_weights, start_world
from pipeline.model import build_model
from pipeline.run_folder import RunFolder
from pipeline.stopping import StopRequest
from pipeline.trainer import Trainer, open_metrics

DEFAULT_RECIPE = "launch/recipes/demo.yaml"


def pretrain(config: RunConfig, stop: StopRequest) -> int:
    """Train the run that `config` describes to its end, from wherever it stands; FINISHED, or STOPPED on request."""
    world = start_world(config.engine.timeout_minutes, config.threads)
    stop.at_once = None
    world.on_main(lambda: build_missing_shards(config.data, stop), may_take_long=True)
    if not world.agree(stop.reason is None):
        raise Stopped("stopped before training began: the same command begins it")
    with closing(RunFolder(config)) as folder:
        if world.on_main(folder.open):
            return FINISHED
        corpus = open_corpus(config, world)
        checkpointer = Checkpointer(folder.path / "checkpoints", world, config.checkpoint.keep)
        checkpoint, state = find_start(config, checkpointer, corpus.identity())

        seed_weights(config.seed)
        model, remarks = build_model(config, corpus, world)
        engine = build_engine(model, config, world, folder.path)
        seed_dropout(config.seed, world.rank)
        if checkpoint:
            checkpointer.load(engine, checkpoint)
        metrics = open_metrics(config, engine, world, folder.path, state if checkpoint else None)
        if world.is_main:
            folder.save_recipe()
            _say_start(config.name, checkpoint, world.size, world.device.type, remarks)
        trainer = Trainer(engine, config, world, corpus, checkpointer, metrics, state, stop)
        state = trainer.run()
        metrics.close()
        if world.is_main and state.step == config.training.total_steps:
            folder.finish(state.step)
        elif world.is_main:
            _say_stopped(state.step, config.training.total_steps, trainer.stopped_by)
        return STOPPED if trainer.stopped_by else FINISHED


def _say_start(name: str, checkpoint: Path | None, processes: int, device: str, remarks: list[str]) -> None:
    where = f"resuming from {checkpoint}" if checkpoint else "starting afresh"
    print("\n  ".join([f"{name}: {where}, {processes} process(es) on {device}", *remarks]), flush=True)


def _say_stopped(step: int, total_steps: int, stopped_by: str | None) -> None:
    reason = f" by {stopped_by}" if stopped_by else ""
    remedy = "the same command goes on" if stopped_by else "go on without training.stop_after_step, or with a later one"
    print(f"stopped{reason} at step {step} of {total_steps}: {remedy}", flush=True)


def main(arguments: Sequence[str]) -> int:
    """The command. Its exit codes, and what it says where it cannot go on, are those of pipeline.ending."""
    if not any(argument.partition("=")[0] in ("--recipe", "--help", "-h") for argument in arguments):
        arguments = ["--recipe", DEFAULT_RECIPE, *arguments]
    return run_training(lambda: load_run_config(arguments), pretrain)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
