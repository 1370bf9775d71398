"""The model card of an exported folder: how to use the model, how well it does, and what was trained on what."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.manifest import Manifest
from pipeline.checkpoint import TrainState

Record = Mapping[str, Any]
"""A line of metrics.jsonl."""

TASKS = {False: ("fill-mask", "masked-lm"), True: ("text-generation", "causal-lm")}
"""Of encoders and decoders: transformers' pipeline, and a tag of the card."""

CLASSIFIER = ("text-classification", "sequence-classification")
"""The same of models with a head for tasks."""

CODE = (
    "The folder carries the code of its model: torch and transformers are enough. Read that code before you trust it."
)

ENCODER_USAGE = """\
from transformers import AutoModelForSequenceClassification, pipeline

pipeline("fill-mask", model=FOLDER, trust_remote_code=True)("A word of this text is {mask}.")
AutoModelForSequenceClassification.from_pretrained(FOLDER, num_labels=2, trust_remote_code=True)  # to be fine-tuned"""

CLASSIFIER_USAGE = """\
from transformers import pipeline

pipeline("text-classification", model=FOLDER, trust_remote_code=True)("A text.")"""

DECODER_USAGE = """\
from transformers import pipeline

pipeline("text-generation", model=FOLDER, trust_remote_code=True)("Once upon a time", max_new_tokens=50)"""


def describe_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: TrainState,
    manifests: Mapping[str, Manifest],
    records: Sequence[Record],
) -> str:
    """The card: Markdown, with the header that model hubs read.

    `manifests` are those of the data by folder; `records` are the run's, up to the exported step.
    """
    sections = {
        "Use": _usage(model, tokenizer),
        "Losses": _losses(records),
        "Firing rates": _firing_rates(records),
        "Data": _data(manifests, state.recipe["data"].get("mixture", {})),
        "Recipe": block("yaml", yaml.safe_dump(state.recipe, sort_keys=False)),
    }
    body = [f"## {title}\n\n{text}" for title, text in sections.items()]
    title = f"# {state.recipe['name']}\n\n{_summary(model, state)}"
    return "\n\n".join([hub_header(model), title, *body]) + "\n"


def describe_task_model(model: PreTrainedModel, state: TrainState, records: Sequence[Record]) -> str:
    """The card of a fine-tuned model; `records` are its run's, up to the exported step."""
    config, task = model.config, state.recipe["task"]
    classes = ", ".join(config.id2label[number] for number in range(config.num_labels))
    head = "gives one number for a text" if config.problem_type == "regression" else f"tells {classes} apart"
    rows = [
        (name, f"{value:.4f}")
        for record in _last(records, "heldout")
        for name, value in record.items()
        if isinstance(value, float) and name != "spikes_per_token"
    ]
    sections = {
        "Use": f"{CODE}\n\n{block('python', CLASSIFIER_USAGE)}\n\nAutoModelForSequenceClassification opens it as well.",
        "Validation": table(("measure", "value"), rows) if rows else "Not recorded.",
        "Firing rates": _firing_rates(records),
        "Recipe": block("yaml", yaml.safe_dump(state.recipe, sort_keys=False)),
    }
    rows_of = task["name"] or task["train"] or task["data"]
    summary = f"{_shape(model)} Fine-tuned for {state.step:,} steps on {rows_of}; it {head}."
    body = [f"## {title}\n\n{text}" for title, text in sections.items()]
    return "\n\n".join([hub_header(model), f"# {Path(state.recipe['output']).name}\n\n{summary}", *body]) + "\n"


def hub_header(model: PreTrainedModel) -> str:
    """What model hubs read at the head of a card."""
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    task, tag = CLASSIFIER if is_classifier else TASKS[model.config.traits.causal]
    tags = {"library_name": "transformers", "pipeline_tag": task, "tags": ["spikelm", "spiking", tag]}
    return f"---\n{yaml.safe_dump(tags, sort_keys=False)}---"


def _usage(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    if model.config.traits.causal:
        return f"{CODE}\n\n{block('python', DECODER_USAGE)}\n\nAutoModel and AutoModelForCausalLM open it as well."
    usage = block("python", ENCODER_USAGE.format(mask=tokenizer.mask_token))
    return f"{CODE}\n\n{usage}\n\nAutoModel, AutoModelForMaskedLM and AutoModelForPreTraining open it as well."


def _shape(model: PreTrainedModel) -> str:
    config, neuron = model.config, model.config.neuron
    spikes = f"{neuron.kind} neurons over {neuron.num_timesteps} timesteps before every linear layer"
    kind = "decoder" if config.traits.causal else "encoder"
    return (
        f"SpikeLM {kind} with {'no spiking neurons' if neuron.kind == 'none' else spikes}: "
        f"{config.num_hidden_layers} layers of width {config.hidden_size}, {model.num_parameters():,} parameters in "
        f"{str(model.dtype).removeprefix('torch.')}, sequences of up to {config.max_position_embeddings} tokens."
    )


def _summary(model: PreTrainedModel, state: TrainState) -> str:
    processes = f"{state.world_size} process(es)"
    return f"{_shape(model)} Pretrained for {state.step:,} steps on {state.samples_consumed:,} samples by {processes}."


def _losses(records: Sequence[Record]) -> str:
    """The last losses and accuracies of training and of the held-out rows."""
    rows = [
        (kind, record["step"], name, f"{value:.4f}")
        for kind in ("train", "heldout")
        for record in _last(records, kind)
        for name, value in record.items()
        if name.endswith(("loss", "accuracy", "entropy"))
    ]
    note = (
        "In nats per target; accuracies are shares of 1. A model that knows the frequency of every token and nothing "
    )
    note += "of its context reaches the unigram entropy."
    return f"{table(('rows', 'step', 'measure', 'value'), rows)}\n\n{note}" if rows else "Not recorded."


def _firing_rates(records: Sequence[Record]) -> str:
    """Shares of neurons that spike at a timestep, as last measured on the held-out rows."""
    for record in _last(records, "heldout"):
        if "firing_rate" in record:
            rates = {"all": record["firing_rate"], **record["firing_rate_by_site"]}
            return table(("site", "firing rate"), [(site, f"{rate:.4f}") for site, rate in rates.items()])
    return "None recorded."


def _data(manifests: Mapping[str, Manifest], weights: Mapping[str, float]) -> str:
    """What each folder holds and, of a mixture, the weights of its recipe."""
    parts = []
    for folder, manifest in manifests.items():
        parts += [f"### {folder}"] if len(manifests) > 1 else []
        parts += [
            _counts(manifest),
            table(("input", "content"), [(each.name, each.content) for each in manifest.origin.inputs]),
        ]
    if weights:
        parts.append(
            "Mixed by weight: " + ", ".join(f"{folder} {weight:g}" for folder, weight in weights.items()) + "."
        )
    first = next(iter(manifests.values()))
    parts.append(
        f"Tokenizer {first.tokenizer_fingerprint} with {first.vocab_size:,} entries. "
        "The whole manifest is in data_manifest.json."
    )
    return "\n\n".join(parts)


def _counts(manifest: Manifest) -> str:
    counts = [
        (split, *(f"{value:,}" for value in (each.documents, each.sentences, each.tokens, each.rows)))
        for split, each in manifest.counts.items()
    ]
    return table(("split", "documents", "sentences", "tokens", f"rows of {manifest.row_length}"), counts)


def _last(records: Sequence[Record], kind: str) -> list[Record]:
    """The last record of that kind; none where there is none."""
    return [record for record in records if record["kind"] == kind][-1:]


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table in Markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def block(language: str, text: str) -> str:
    """A block of code in Markdown."""
    return f"```{language}\n{text.strip()}\n```"
