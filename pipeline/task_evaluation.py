"""A fine-tuned model on the rows of its task: metrics, firing rates and energy, over fewer timesteps, too."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from data_prep.recipes import settings_from_dict
from models.amplitudes import spiking_stack
from models.energy import EnergyTable, Passed
from models.modeling import SpikeLMForSequenceClassification
from pipeline.checkpoint import read_state
from pipeline.ending import NonFiniteError
from pipeline.evaluation import energy_values, firing_values
from pipeline.finetune_config import TaskRun, load_finetune_config, row_length
from pipeline.loader import heldout_batches
from pipeline.model import best_checkpoint
from pipeline.task_corpus import EncodedRows, TaskObjective, encode_task
from pipeline.task_data import open_task
from pipeline.task_metrics import baseline_metrics, compute_metrics
from pipeline.task_trainer import predict
from pipeline.tasks import TRAIN, Task, TaskData, TaskSettings


@dataclass(frozen=True)
class TaskRows:
    """The rows of a split of a task, encoded, and how many of them were cut off."""

    data: TaskData
    split: str
    rows: EncodedRows
    num_truncated: int


def open_task_rows(
    given: Path,
    model: SpikeLMForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Path | None,
    split: str,
) -> TaskRows:
    """The rows to measure `model` on, which `given` names: those of the recipe, or of its own fine-tuning.

    Args:
        recipe: of pipeline.finetune, whose sections task and training say what the rows are.

    Raises ValueError where there are no such rows, they are not those of the run, or the model has learned other
    classes.
    """
    settings, length, fingerprint = _own_task(given) if recipe is None else _task_of(recipe, given, model)
    data = open_task(settings)
    if fingerprint is not None and data.fingerprint != fingerprint:
        raise ValueError(
            f"{given} was fine-tuned on other rows than its recipe names now: name those to measure it on by "
            "--task-recipe RECIPE"
        )
    _refuse_other_task(given, model, data.task)
    labelled = [name for name, examples in data.splits.items() if examples.labels is not None]
    if split not in labelled:
        what = "has no labels" if split in data.splits else "is not there"
        raise ValueError(f"--split {split}: {what} in task {data.task.name}; use one of {', '.join(labelled)}")
    chosen = TaskData(data.task, {split: data.splits[split]}, data.fingerprint)
    rows, truncated = encode_task(chosen, tokenizer, length)
    return TaskRows(data, split, rows[split], truncated[split])


def measure_task(
    model: SpikeLMForSequenceClassification, task: TaskRows, batch_size: int, table: EnergyTable
) -> dict[str, Any]:
    """Loss and metrics on the rows, what the trivial answer reaches, firing rates and energy."""
    asked, examples = task.data.task, task.data.splits[task.split]
    objective = TaskObjective.of(asked)
    batches = heldout_batches(task.rows, objective.make_batch, batch_size=batch_size)
    try:
        predictions = predict(model, tqdm(batches, unit=" batches", file=sys.stderr), objective.losses)
    except NonFiniteError as error:
        raise ValueError(str(error)) from error
    lengths = task.rows.arrays["attention_mask"].sum(1).tolist()
    passed = Passed.in_rows(lengths, causal=False, classes=model.config.num_labels)
    baseline = baseline_metrics(asked, task.data.splits[TRAIN], examples)
    return {
        "data": f"{task.split} rows of task {asked.name}",
        "rows": len(examples),
        "truncated": task.num_truncated,
        f"{objective.losses[0]}_loss": predictions.loss,
        **compute_metrics(asked, predictions.of(asked), examples.labels),
        **{f"baseline_{name}": value for name, value in baseline.items()},
        **firing_values(spiking_stack(model), predictions.stats),
        **energy_values(model.config, predictions.stats, passed, table),
    }


def _own_task(given: Path) -> tuple[TaskSettings, int, str]:
    """Task, length of its rows, and their fingerprint, of the run that the model is of."""
    if (given / CONFIG_NAME).is_file():
        raise ValueError(f"{given} does not say where the rows of its task are: name a recipe by --task-recipe")
    state = read_state(best_checkpoint(given))
    run = settings_from_dict(TaskRun, state.recipe)
    return run.task, run.data.sample_length, state.data["fingerprint"]


def _task_of(recipe: Path, given: Path, model: SpikeLMForSequenceClassification) -> tuple[TaskSettings, int, None]:
    """What a recipe says of the task: what it starts from matters to nobody here, and may be gone."""
    section = {"start": given, "preset": "null", "tokenizer": "null", "from_scratch": "false", "overrides": "{}"}
    overrides = [word for name, value in section.items() for word in (f"--model.{name}", str(value))]
    config = load_finetune_config(["--recipe", str(recipe), *overrides])
    return config.task, row_length(config.training, model.config.max_position_embeddings), None


def _refuse_other_task(given: Path, model: SpikeLMForSequenceClassification, task: Task) -> None:
    """ValueError where the model's head is for other classes, or for numbers instead of classes."""
    known = model.config
    names = () if known.problem_type == "regression" else tuple(known.id2label[n] for n in range(known.num_labels))
    if names != task.classes:
        theirs, ours = (", ".join(each) or "a number" for each in (names, task.classes))
        raise ValueError(f"{given} gives {theirs}, but task {task.name} asks for {ours}: name the task that it learned")
