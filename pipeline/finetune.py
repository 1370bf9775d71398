"""Fine-tune a SpikeLM on a task: `deepspeed pipeline/finetune.py --recipe launch/recipes/finetune/own.yaml`.

`--help` explains every field of a recipe. Each seed is a run of its own in <output>/<name>/seed-<seed>; the same
command again resumes where they stand. Exit codes: pipeline/ending.py.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pipeline  # noqa: F401 (first of all: it looks for strangers, and sets what torch reads when it is imported)
from data_prep.files import read_json, write_json
from data_prep.tokenization import tokenizer_fingerprint
from pipeline.checkpoint import Checkpointer, find_start, intact_checkpoint, refuse_changes
from pipeline.command import run_training
from pipeline.ending import FINISHED, STOPPED
from pipeline.engine import build_engine, seed_dropout, start_world
from pipeline.finetune_config import FinetuneConfig, TaskRun, load_finetune_config, row_length, task_run
from pipeline.loader import identity_differences
from pipeline.run_folder import RunFolder
from pipeline.stopping import StopRequest
from pipeline.task_corpus import EncodedRows, TaskCorpus, TaskObjective, encode_task
from pipeline.task_data import open_task
from pipeline.task_model import Start, build_task_model, open_start, refuse_penalty, save_description
from pipeline.task_results import RESULT, describe_results, measure_seed, summarize
from pipeline.task_trainer import TaskTrainer
from pipeline.tasks import TRAIN, TaskData, TaskSettings
from pipeline.trainer import open_metrics
from pipeline.world import World


@dataclass(frozen=True)
class Material:
    """What all seeds share: what they start from, and the task's rows, encoded."""

    start: Start
    data: TaskData
    length: int
    rows: Mapping[str, EncodedRows]
    truncated: Mapping[str, int]


def finetune(config: FinetuneConfig, stop: StopRequest) -> int:
    """Train every seed that `config` names to its end, from wherever it stands; FINISHED, or STOPPED on request."""
    world = start_world(config.engine.timeout_minutes, config.threads)
    stop.at_once = None
    material = _prepare(config, world)
    unfinished = False
    for seed in config.seeds:
        run = task_run(config, seed, len(material.data.splits[TRAIN]), material.length)
        trainer = _train_seed(run, material, world, stop)
        if trainer is not None and trainer.stopped_by:
            return STOPPED
        unfinished |= trainer is not None and not trainer.is_over()
    if world.is_main and not unfinished:
        print(describe_results(summarize(config.folder, config.seeds)), flush=True)
    return FINISHED


def _prepare(config: FinetuneConfig, world: World) -> Material:
    start = open_start(config.model)
    if not world.agree(start.fingerprint == world.on_main(lambda: start.fingerprint)):
        raise ValueError(
            f"model.start {config.model.start}: the processes read different weights: wait until its training has "
            "ended, or name one of its checkpoints"
        )
    refuse_penalty(start, config.training.firing_penalty)
    length = row_length(config.training, start.config.max_position_embeddings)
    data = _open_task(config.task, world)
    rows, truncated = encode_task(data, start.tokenizer, length)
    if world.is_main:
        cut = [f"{split}: {count} of {len(rows[split])}" for split, count in truncated.items() if count]
        remarks = [f"texts longer than {length} tokens, which are cut off: {', '.join(cut)}"] if cut else []
        sizes = ", ".join(f"{len(each):,} {split}" for split, each in rows.items())
        _say(f"{config.name}: task {data.task.name}, rows: {sizes}", [*data.remarks, *remarks])
    return Material(start, data, length, rows, truncated)


def _open_task(settings: TaskSettings, world: World) -> TaskData:
    """The task's rows: one process reads them first, and may fetch them for all."""
    opened: list[TaskData] = []

    def open_first() -> str:
        opened.append(open_task(settings))
        return opened[0].fingerprint

    fingerprint = world.on_main(open_first, may_take_long=True)
    data = opened[0] if opened else open_task(settings)
    if not world.agree(data.fingerprint == fingerprint):
        raise ValueError("the processes read different rows of the task: put its files into a shared folder")
    return data


def _corpus(run: TaskRun, material: Material, world: World) -> TaskCorpus:
    start, data = material.start, material.data
    tokenizer = tokenizer_fingerprint(start.tokenizer)
    return TaskCorpus(run, world, data, tokenizer, start.fingerprint, material.rows, TaskObjective.of(data.task))


def _train_seed(run: TaskRun, material: Material, world: World, stop: StopRequest) -> TaskTrainer | None:
    """Train a seed from wherever it stands, and write what it comes to; None where that is done already."""
    with closing(RunFolder(run)) as folder:
        corpus = _corpus(run, material, world)
        if world.on_main(folder.open):
            world.on_main(lambda: _refuse_other_rows(folder.path, corpus))
            return None
        corpus.check()
        checkpointer = Checkpointer(folder.path / "checkpoints", world, run.checkpoint.keep)
        checkpoint, state = find_start(run, checkpointer, corpus.identity())
        if state.search:  # it will be needed at the end: better told now
            intact_checkpoint(checkpointer.at_step(state.search.best_step), world)
        model, remarks = build_task_model(material.start, material.data.task, run, world)
        if world.is_main:
            save_description(model, material.start.tokenizer, folder.path)
        engine = build_engine(model, run, world, folder.path)
        seed_dropout(run.seed, world.rank)
        if checkpoint:
            checkpointer.load(engine, checkpoint)
        metrics = open_metrics(run, engine, world, folder.path, state if checkpoint else None)
        if world.is_main:
            folder.save_recipe()
            where = f"resuming from {checkpoint}" if checkpoint else "starting afresh"
            _say(f"{folder.path}: {where}, {world.size} process(es) on {world.device.type}", remarks)
        trainer = TaskTrainer(engine, run, world, corpus, checkpointer, metrics, state, stop)
        state = trainer.run()
        metrics.close()
        if trainer.is_over():
            best = checkpointer.at_step(trainer.state.search.best_step)
            checkpointer.load(engine, intact_checkpoint(best, world))
            result = measure_seed(trainer, material.truncated, folder.path)
            if world.is_main:
                write_json(folder.path / RESULT, result)
                folder.finish(state.step)
        elif world.is_main:
            by = f" by {trainer.stopped_by}" if trainer.stopped_by else ""
            _say(f"stopped{by} at step {state.step} of {run.training.total_steps}: the same command goes on", ())
        engine.destroy()
        return trainer


def _refuse_other_rows(run: Path, corpus: TaskCorpus) -> None:
    """CheckpointError where a finished seed has learned from, or was measured on, other rows than these."""
    refuse_changes(run, identity_differences(read_json(run / RESULT)["data"], corpus.identity()))


def _say(title: str, remarks: Iterable[str]) -> None:
    print("\n  ".join([title, *remarks]), flush=True)


def main(arguments: Sequence[str]) -> int:
    """The command. Its exit codes, and what it says where it cannot go on, are those of pipeline.ending."""
    return run_training(lambda: load_finetune_config(arguments), finetune)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
