"""Command: raw text to shards of sentence pairs, or of causal rows.

python -m data_prep.build_shards --recipe launch/recipes/data/demo.yaml [--field VALUE ...]
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from data_prep.files import read_record
from data_prep.manifest import MANIFEST_NAME, SPLITS, TOKENIZER_FOLDER, Counts, Manifest, UnitRecord, check_folder
from data_prep.origin import Inputs, Origin, faults_of, record_input, refusal
from data_prep.packing import CausalLayout, PairLayout, RowLayout
from data_prep.recipes import BelowOne, FolderName, Rule, Share, load_settings, run_command, strict
from data_prep.shards import ids_dtype, size_fault
from data_prep.sources import plan_units
from data_prep.tokenization import (
    TRAINING_RECORD,
    TrainingRecord,
    check_tokenizer_folder,
    document_frame,
    load_tokenizer,
    text_encoder,
    tokenizer_fingerprint,
    vocabulary_size,
)
from data_prep.units import UnitBuilder

WORK_FOLDER = ".build"  # the plan and the records of finished units, until the manifest is written
PLAN_NAME = "plan.json"
ROW_LENGTHS = {"pairs": 128, "causal": 2048}
"""Tokens of a row where the recipe says nothing."""


@strict
@dataclass(frozen=True)
class BuildSettings:
    """Build shards of rows from raw text. Started again, it goes on after the last finished work unit."""

    input: Inputs
    """Wikipedia .xml or .xml.bz2, .jsonl, .txt, a folder of such files, or package://NAME/FILE; may be repeated."""

    tokenizer: Annotated[FolderName, AfterValidator(check_tokenizer_folder)]
    """Folder of a transformers tokenizer, such as data_prep.train_tokenizer writes."""

    output: FolderName
    """Folder to build: manifest.json, tokenizer/, train/, heldout/."""

    text_field: str = "text"
    """Key of the text in a JSON line."""

    layout: Literal["pairs", "causal"] = "pairs"
    """pairs: two segments a row, for encoders; causal: documents one after another, for decoders."""

    row_length: Annotated[int, Field(ge=8, lt=1 << 16)] | None = None
    """Tokens of a row, special tokens included; null: 128 for pairs, 2,048 for causal rows, which readers may split."""

    heldout_fraction: BelowOne = 0.01
    """Share of the documents that training never sees, chosen by a hash of their words."""

    random_next_probability: Share = 0.5
    """Of pairs: share of the rows whose second segment comes from another document."""

    short_row_probability: Share = 0.1
    """Of pairs: share of the rows that are made shorter, so that the model sees short inputs too."""

    seed: NonNegativeInt = 0
    """Of the random choices in making rows."""

    rows_per_block: PositiveInt = 1024
    """Rows of one .npy array."""

    blocks_per_shard: PositiveInt = 16
    """Arrays of each field in one tar file."""

    unit_megabytes: PositiveInt = 64
    """Size of a work unit, which is what is done again after a kill; each unit has shards of its own."""

    overwrite: bool = False
    """Replace what another recipe built in the output folder."""


def _pair_faults(layout: str, random_next_probability: float, short_row_probability: float) -> Iterator[str]:
    if layout == "pairs":
        return
    values = {"random_next_probability": random_next_probability, "short_row_probability": short_row_probability}
    for name, value in values.items():
        if value != BuildSettings.__dataclass_fields__[name].default:
            yield f"{name}: {value} has no effect on causal rows, which have no pairs: leave it out"


RULES = (Rule(("layout", "random_next_probability", "short_row_probability"), _pair_faults),)


def main(argv: Sequence[str] | None = None) -> int:
    # One thread: what scales is processes, each with work units of its own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    return run_command(lambda: build(load_settings(BuildSettings, argv, "python -m data_prep.build_shards", RULES)))


def build(settings: BuildSettings) -> None:
    """Build what is not built yet, unit by unit, then the indexes, then the manifest."""
    root = Path(settings.output)
    tokenizer = load_tokenizer(settings.tokenizer)
    plan = make_plan(settings, tokenizer)
    if is_built(root, plan, settings.overwrite):
        print(f"{root} is built already with these settings: nothing to do")
        return
    started = time.monotonic()
    units = plan_units(settings.input, text_field=settings.text_field, unit_bytes=settings.unit_megabytes << 20)
    builder = unit_builder(settings, tokenizer, plan)
    prepare(root, plan, settings.overwrite)
    records, built = [], Counts()
    with tqdm(unit=" documents", file=sys.stderr, mininterval=1) as progress:
        for unit in units:
            progress.set_description(f"unit {unit.number + 1} of {len(units)}")
            path = root / WORK_FOLDER / f"unit-{unit.number:06d}.json"
            record = finished_record(root, path)
            if record is None:
                record = builder.build(unit, progress)
                record.save(path)
                built = sum(record.counts.values(), built)
            records.append(record)
    manifest = finish(root, plan, records, tokenizer)
    print_summary(root, manifest, built.tokens, time.monotonic() - started)


def make_plan(settings: BuildSettings, tokenizer: PreTrainedTokenizerFast) -> Manifest:
    """What the rows will be made of: a manifest without counts.

    Raises:
        ValueError: the tokenizer was trained on documents that are to be held out.
    """
    training = Path(settings.tokenizer) / TRAINING_RECORD
    if training.exists():
        fraction = read_record(TrainingRecord, training).origin.settings["heldout_fraction"]
        if fraction < settings.heldout_fraction:
            raise ValueError(
                f"heldout_fraction: {settings.heldout_fraction}, but tokenizer {settings.tokenizer} was trained with "
                f"{fraction}, and so on documents that are to be held out: train it with the same fraction"
            )
    fingerprint = tokenizer_fingerprint(tokenizer)
    deciding = {**asdict(settings), "tokenizer": fingerprint, "row_length": row_length(settings)}
    for name in ("input", "output", "overwrite"):
        del deciding[name]
    return Manifest(Origin(deciding, tuple(map(record_input, settings.input))), fingerprint, vocabulary_size(tokenizer))


def unit_builder(settings: BuildSettings, tokenizer: PreTrainedTokenizerFast, plan: Manifest) -> UnitBuilder:
    """What turns units into shards by these settings."""
    return UnitBuilder(
        root=Path(settings.output),
        encode=text_encoder(tokenizer),
        unknown_id=tokenizer.unk_token_id,
        layout=row_layout(settings, tokenizer),
        fields=plan.fields,
        seed=settings.seed,
        heldout_fraction=settings.heldout_fraction,
        rows_per_block=settings.rows_per_block,
        blocks_per_shard=settings.blocks_per_shard,
    )


def row_length(settings: BuildSettings) -> int:
    """Tokens of a row: the recipe's, or its layout's."""
    return settings.row_length or ROW_LENGTHS[settings.layout]


def row_layout(settings: BuildSettings, tokenizer: PreTrainedTokenizerFast) -> RowLayout:
    """The look of the rows.

    Raises:
        ValueError: the tokenizer lacks a special token that they need, or adds others than decoders want.
    """
    return (_pair_layout if settings.layout == "pairs" else _causal_layout)(settings, tokenizer)


def _causal_layout(settings: BuildSettings, tokenizer: PreTrainedTokenizerFast) -> CausalLayout:
    """Documents begin as texts do when the model is used; padding, which nothing sees, may be any token."""
    begin_ids, end_id = document_frame(tokenizer)
    pad_id = end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return CausalLayout(row_length(settings), begin_ids, end_id, pad_id, ids_dtype(vocabulary_size(tokenizer)))


def _pair_layout(settings: BuildSettings, tokenizer: PreTrainedTokenizerFast) -> PairLayout:
    """Where a tokenizer has no [CLS] and [SEP], its begin and end of text stand for them."""
    first_of = {
        "cls_id": (tokenizer.cls_token_id, tokenizer.bos_token_id),
        "sep_id": (tokenizer.sep_token_id, tokenizer.eos_token_id),
        "pad_id": (tokenizer.pad_token_id,),
    }
    ids = {name: next((id for id in choices if id is not None), None) for name, choices in first_of.items()}
    missing = [name.removesuffix("_id") for name, id in ids.items() if id is None]
    if missing:
        raise ValueError(f"tokenizer {settings.tokenizer} has no token for {', '.join(missing)}: add it and save again")
    return PairLayout(
        row_length(settings),
        **ids,
        ids_dtype=ids_dtype(vocabulary_size(tokenizer)),
        random_next_probability=settings.random_next_probability,
        short_row_probability=settings.short_row_probability,
    )


# The folder


def is_built(root: Path, plan: Manifest, overwrite: bool) -> bool:
    """Whether the folder is finished and as planned.

    Raises:
        ValueError: it was built otherwise, or is damaged, and may not be overwritten.
    """
    if not (root / MANIFEST_NAME).exists():
        return False
    faults = faults_of(Manifest.load, root, plan.origin) or faults_of(check_folder, root, plan.origin)
    if faults and not overwrite:
        raise refusal(root, faults)
    return not faults


def prepare(root: Path, plan: Manifest, overwrite: bool) -> None:
    """Make the folder ready for units: empty, or with those that a build by the same plan has finished."""
    work, ours = root / WORK_FOLDER, (TOKENIZER_FOLDER, *SPLITS)
    plan_path = work / PLAN_NAME
    if plan_path.exists():
        faults = faults_of(Manifest.load_file, plan_path, plan.origin)
        if not faults:
            return
        if not overwrite:
            raise refusal(root, faults)
    elif not work.exists() and not (root / MANIFEST_NAME).exists() and any((root / name).exists() for name in ours):
        raise ValueError(f"{root} holds {', '.join(ours)} of another origin: choose another --output")
    # The work folder stands first and the plan comes last: a kill in between leaves a folder that is known as ours.
    work.mkdir(parents=True, exist_ok=True)
    plan_path.unlink(missing_ok=True)
    for record in work.iterdir():
        record.unlink()
    (root / MANIFEST_NAME).unlink(missing_ok=True)
    for name in ours:
        shutil.rmtree(root / name, ignore_errors=True)
    for split in SPLITS:
        (root / split).mkdir()
    plan.save(plan_path)


def finished_record(root: Path, path: Path) -> UnitRecord | None:
    """The record of a unit, if it has one that can be read and its shards are there."""
    try:
        record = UnitRecord.load(path)
    except ValueError:
        return None
    shards = [(root / split / shard.name, shard.bytes) for split in SPLITS for shard in record.shards[split]]
    return None if any(size_fault(*shard) for shard in shards) else record


def finish(root: Path, plan: Manifest, records: Sequence[UnitRecord], tokenizer: PreTrainedTokenizerFast) -> Manifest:
    """Write indexes and tokenizer, and last the manifest, which says that the folder is whole.

    Raises:
        ValueError: there are no rows to train on, or none to hold out although some were asked for.
    """
    indexes = {}
    for split in SPLITS:
        indexes[split] = plan.index(chain.from_iterable(record.shards[split] for record in records))
        indexes[split].save(root / split)
    manifest = plan.completed(records, indexes)
    fraction = plan.origin.settings["heldout_fraction"]
    if not manifest.counts["train"].rows:
        raise ValueError(f"no document to train on: all are empty or held out (heldout_fraction {fraction})")
    if fraction and not manifest.counts["heldout"].rows:
        raise ValueError(
            f"heldout_fraction {fraction} holds no document out: raise it, or give more text, and add --overwrite "
            "(a tokenizer trained on this text is trained anew with the same fraction)"
        )
    tokenizer.save_pretrained(root / TOKENIZER_FOLDER)
    manifest.save(root / MANIFEST_NAME)
    shutil.rmtree(root / WORK_FOLDER)
    return manifest


def print_summary(root: Path, manifest: Manifest, tokens: int, seconds: float) -> None:
    """What the folder holds, and the speed of this run, which built `tokens` of it."""
    for split, counts in manifest.counts.items():
        filled = counts.row_tokens / max(counts.rows * manifest.row_length, 1)
        print(
            f"{root / split}: {counts.documents:,} documents, {counts.sentences:,} sentences, {counts.tokens:,} tokens "
            f"({counts.unknown_tokens / max(counts.tokens, 1):.2%} unknown), {counts.rows:,} rows of "
            f"{manifest.row_length} ({filled:.1%} filled)"
        )
    print(
        f"{manifest.empty_documents:,} documents without prose left out; {tokens:,} tokens in {seconds:.1f} s, "
        f"{tokens / seconds:,.0f} tokens/s"
    )


if __name__ == "__main__":
    sys.exit(main())
