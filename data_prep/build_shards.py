"""Command: raw text to shards of sentence pairs, or of causal rows.

python -m data_prep.build_shards --recipe launch/recipes/data/demo.yaml [--field VALUE ...]
mpirun -n 8 --bind-to none python -m data_prep.build_shards --recipe ...    the same folder, byte by byte
"""

import os
import sys
import time
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt
from transformers import PreTrainedTokenizerFast

from data_prep.build_job import Job, KeysOf
from data_prep.build_report import REPORT_NAME, write_report
from data_prep.documents import SourceError
from data_prep.duplicates import words_key
from data_prep.files import name_file, read_record, remedied, sync_tree
from data_prep.filters import QualityRules, Steps, StepSettings
from data_prep.manifest import MANIFEST_NAME, SPLITS, TOKENIZER_FOLDER, Manifest, SourceCounts, UnitRecord
from data_prep.near_duplicates import BandKeys, NearDuplicateSettings
from data_prep.origin import Inputs, Origin, changed_files, file_stamps, hash_source, record_input
from data_prep.packing import CausalLayout, PairLayout, RowLayout
from data_prep.ranks import Ranks, run_ranks
from data_prep.recipes import BelowOne, FolderName, Rule, Share, load_settings, strict
from data_prep.shards import ids_dtype
from data_prep.sources import WorkUnit, input_files, passed_over, plan_units
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
from data_prep.units import Step, UnitBuilder
from data_prep.work_folder import WORK_FOLDER, is_built, only_job, prepare, start_over

UNITS = 1024
UNIT_MEGABYTES = (8, 512)
ROW_LENGTHS = {"pairs": 128, "causal": 2048}
"""Tokens of a row where the recipe says nothing."""

Megabytes = Annotated[float, Field(gt=0)]


@strict
@dataclass(frozen=True)
class BuildSettings:
    """Build shards of rows from raw text. Started again, it goes on after the last finished work unit."""

    input: Inputs
    """Wikipedia .xml or .xml.bz2, .txt, .jsonl, .csv (.gz and .zst, too), .parquet, .arrow or .tar, a folder of such
    files or one that `datasets` saved, package://NAME/FILE, or hub://NAME[:CONFIG][@SPLIT]; may be repeated."""

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

    shard_megabytes: Megabytes = 256
    """Size of a tar file's arrays; less where a work unit has less to give, and one array of each field at least."""

    unit_megabytes: Megabytes | None = None
    """Size of a work unit, which is what one process reads at a time and what is done again after a kill, and which has
    shards of its own; null: a 1,024th of the inputs, but 8 at least and 512 at most, which fills a shard."""

    on_error: Literal["raise", "skip"] = "raise"
    """What is done where an input is broken: raise ends the build; skip leaves out what cannot be read, and reports how
    much of it there was, by reason."""

    steps: StepSettings = StepSettings()

    deduplicate: Literal["exact", "near", "none"] = "exact"
    """exact: of documents with the same words, whatever their case and spaces, the first alone is kept: a text that is
    there twice is rarely meant to be learned twice. near: besides, of documents that share most of their runs of words.
    For both the inputs are read once more. none: all are kept."""

    near_duplicates: NearDuplicateSettings = NearDuplicateSettings()

    deduplicate_megabytes: Megabytes = 1024
    """Memory that each process may take to compare hashes of documents; where it is too little, they are compared in
    parts. It does not bound the reading, which holds the hashes of a work unit."""

    overwrite: bool = False
    """Replace what another recipe built in the output folder."""


def _pair_faults(layout: str, random_next_probability: float, short_row_probability: float) -> Iterator[str]:
    if layout == "pairs":
        return
    values = {"random_next_probability": random_next_probability, "short_row_probability": short_row_probability}
    for name, value in values.items():
        if value != BuildSettings.__dataclass_fields__[name].default:
            yield f"{name}: {value} has no effect on causal rows, which have no pairs: leave it out"


def _needing(
    section: str, settings_type: type, switch: str, off: Sequence[Any], remedy: str, names: Sequence[str] = ()
) -> Rule:
    """A rule: fields of a section, all or those named, have no effect while the field `switch` has a value of `off`."""
    defaults = {field.name: field.default for field in fields(settings_type) if field.name in names or not names}

    def faults(setting: Any, *values: Any) -> Iterator[str]:
        for (name, default), value in zip(defaults.items(), values, strict=True):
            if setting in off and value != (list(default) if isinstance(default, tuple) else default):
                yield f"{section}.{name}: {value} has no effect with {switch} {setting}: {remedy}, or leave it out"

    return Rule((switch, *(f"{section}.{name}" for name in defaults)), faults)


EVALUATION = ("decontaminate_text_field", "ngram_words", "shortest_words")
RULES = (
    Rule(("layout", "random_next_probability", "short_row_probability"), _pair_faults),
    _needing("steps", StepSettings, "steps.decontaminate", [[]], "name data in steps.decontaminate", EVALUATION),
    _needing("steps.quality", QualityRules, "steps.check_quality", [False], "set steps.check_quality"),
    _needing("near_duplicates", NearDuplicateSettings, "deduplicate", ["exact", "none"], "set deduplicate to near"),
)


def main(argv: Sequence[str] | None = None) -> int:
    # One thread: what scales is processes, each with work units of its own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    return run_ranks(lambda ranks: build(read_settings(argv, ranks), ranks))


def read_settings(argv: Sequence[str] | None, ranks: Ranks) -> BuildSettings:
    """The settings, which every rank reads for itself."""
    return ranks.agree(lambda: load_settings(BuildSettings, argv, "python -m data_prep.build_shards", RULES))


def build(settings: BuildSettings, ranks: Ranks) -> None:
    """Build what is not built yet, unit by unit, then the indexes, then the manifest. Collective."""
    root = Path(settings.output)
    tokenizer = ranks.agree(lambda: load_tokenizer(settings.tokenizer))
    stamps = ranks.agree(lambda: file_stamps(settings.input) if ranks.is_first else {})
    hashes = hash_inputs(settings.input, ranks)
    plan = ranks.agree(lambda: make_plan(settings, tokenizer, hashes))
    builder = ranks.agree(lambda: unit_builder(settings, tokenizer, plan))
    is_clean = ranks.share(lambda: not (root / WORK_FOLDER).exists(), bool)
    if is_clean and is_finished(root, plan, settings, ranks):
        return
    with telling_what_to_do(root), only_job(root, ranks):
        if is_finished(root, plan, settings, ranks):
            return  # and leave no work folder behind
        started = time.monotonic()
        for line in ranks.share(lambda: passed_over(settings.input), list[str]):
            print(line)
        units, inputs = ranks.share(lambda: planned_units(settings, plan), tuple[list[WorkUnit], list[int]])
        ranks.agree(lambda: prepare(root, plan, settings.overwrite) if ranks.is_first else None)
        steps = ranks.agree(lambda: steps_of(settings.steps))
        job = Job(root, ranks, units, steps, comparisons_of(settings), settings.on_error == "skip")
        job.find_repeats(bytes_of(settings.deduplicate_megabytes))
        records, tokens = job.build(builder)
        ranks.agree(lambda: refuse_changed(settings, stamps, hashes) if ranks.is_first else None)
        manifest = ranks.agree(lambda: finish(root, plan, records, inputs, tokenizer) if ranks.is_first else None)
        if manifest is not None:
            print_summary(root, manifest, tokens, time.monotonic() - started)


def is_finished(root: Path, plan: Manifest, settings: BuildSettings, ranks: Ranks) -> bool:
    """Whether there is nothing to do, which it says. Fails as is_built does."""
    finished = ranks.share(lambda: is_built(root, plan, settings.overwrite), bool)
    if finished:
        print(f"{root} is built already with these settings: nothing to do")
    return finished


# What is to be done


def hash_inputs(names: Sequence[str], ranks: Ranks) -> dict[str, str]:
    """Hashes of all files of the inputs, each read by one rank."""
    files = ranks.share(lambda: [str(file) for name in names for file in input_files(name)], list[str])
    mine = ranks.agree(lambda: {file: hash_source(Path(file)) for file in files[ranks.rank :: ranks.size]})
    parts = ranks.gather(mine, dict[str, str])
    return ranks.share(lambda: dict(ChainMap(*parts)), dict[str, str])


def make_plan(settings: BuildSettings, tokenizer: PreTrainedTokenizerFast, hashes: Mapping[str, str]) -> Manifest:
    """What the rows will be made of: a manifest without counts. `hashes` are those of the inputs' files.

    Raises:
        ValueError: the tokenizer was trained on documents that are to be held out.
    """
    for name in (settings.tokenizer, *settings.input):
        if Path(name).resolve().is_relative_to(Path(settings.output).resolve()):
            raise ValueError(f"{name} lies within the output {settings.output}, which is emptied: move one of them")
    training = Path(settings.tokenizer) / TRAINING_RECORD
    if training.exists():
        fraction = read_record(TrainingRecord, training).origin.settings["heldout_fraction"]
        if fraction < settings.heldout_fraction:
            raise ValueError(
                f"heldout_fraction: {settings.heldout_fraction}, but tokenizer {settings.tokenizer} was trained with "
                f"{fraction}, and so on documents that are to be held out: train it with the same fraction"
            )
    fingerprint = tokenizer_fingerprint(tokenizer)
    inputs = tuple(record_input(name, lambda file: hashes[str(file)]) for name in settings.input)
    deciding = {
        **asdict(settings),
        "tokenizer": fingerprint,
        "row_length": row_length(settings),
        "unit_megabytes": settings.unit_megabytes or unit_megabytes(sum(each.bytes for each in inputs)),
    }
    # What could be read is the same whatever becomes of the rest.
    for name in ("input", "output", "overwrite", "on_error", "deduplicate_megabytes"):
        del deciding[name]
    # Evaluation data is known by its content, wherever it lies.
    deciding["steps"]["decontaminate"] = [record_input(name).xxh3_128 for name in settings.steps.decontaminate]
    return Manifest(Origin(flat(deciding), inputs), fingerprint, vocabulary_size(tokenizer))


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted names, with values as JSON has them."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": each for inner, each in flat(value).items()}
        else:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def steps_of(settings: StepSettings) -> tuple[Step, ...]:
    """What every document passes; nothing where no step is asked for."""
    wanted = settings.normalize or settings.mend_mojibake or settings.check_quality or settings.decontaminate
    return (Steps(settings).apply,) if wanted else ()


def comparisons_of(settings: BuildSettings) -> dict[str, KeysOf]:
    """How documents are compared with each other."""
    found: dict[str, KeysOf] = {}
    if settings.deduplicate != "none":
        found["duplicate"] = lambda text: [words_key(text)]
    if settings.deduplicate == "near":
        bands = BandKeys(settings.near_duplicates)
        found["near-duplicate"] = lambda text: [int(key) << 64 for key in bands.keys(text)]
    return found


def unit_megabytes(total_bytes: int) -> int:
    """The size of work units for inputs of this size: many times as many as ranks, and large ones fill a shard."""
    low, high = UNIT_MEGABYTES
    return min(max(total_bytes // UNITS >> 20, low), high)


def bytes_of(megabytes: float) -> int:
    return max(1, int(megabytes * (1 << 20)))


def planned_units(settings: BuildSettings, plan: Manifest) -> tuple[list[WorkUnit], list[int]]:
    """All work units, and the number of the input that each is of."""
    unit_bytes = bytes_of(plan.origin.settings["unit_megabytes"])
    skips = settings.on_error == "skip"
    units = plan_units(settings.input, text_field=settings.text_field, unit_bytes=unit_bytes, skips_broken=skips)
    return units, [unit.source for unit in units]


def unit_builder(settings: BuildSettings, tokenizer: PreTrainedTokenizerFast, plan: Manifest) -> UnitBuilder:
    """What turns units into shards by these settings."""
    row_bytes = sum(field.row_bytes for field in plan.fields)
    return UnitBuilder(
        root=Path(settings.output),
        encode=text_encoder(tokenizer),
        unknown_id=tokenizer.unk_token_id,
        layout=row_layout(settings, tokenizer),
        fields=plan.fields,
        seed=settings.seed,
        heldout_fraction=settings.heldout_fraction,
        rows_per_block=settings.rows_per_block,
        blocks_per_shard=max(1, bytes_of(settings.shard_megabytes) // (settings.rows_per_block * row_bytes)),
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


# The end


def refuse_changed(settings: BuildSettings, stamps: Mapping[str, tuple[int, int]], hashes: Mapping[str, str]) -> None:
    """Raises SourceError where an input is not any more what it was when the job began to read."""
    if changed := changed_files(settings.input, stamps, hashes):
        start_over(Path(settings.output))
        others = f", as did {len(changed) - 1} more" if changed[1:] else ""
        raise SourceError(
            f"{changed[0]}: changed while it was being read{others}: when all is at rest give the same command, which "
            "begins anew"
        )


def finish(
    root: Path,
    plan: Manifest,
    records: Sequence[UnitRecord],
    inputs: Sequence[int],
    tokenizer: PreTrainedTokenizerFast,
) -> Manifest:
    """Write indexes, tokenizer and report, and last the manifest, which says that the folder is whole.

    Raises:
        ValueError: there are no rows to train on, or none to hold out although some were asked for.
    """
    indexes = {}
    for split in SPLITS:
        indexes[split] = plan.index(chain.from_iterable(record.shards[split] for record in records))
        indexes[split].save(root / split)
    manifest = plan.completed(records, inputs, indexes)
    fraction = plan.origin.settings["heldout_fraction"]
    if not manifest.counts["train"].rows:
        raise ValueError(f"no document to train on: all are empty or held out (heldout_fraction {fraction})")
    if fraction and not manifest.counts["heldout"].rows:
        raise ValueError(
            f"heldout_fraction {fraction} holds no document out: raise it, or give more text, and add --overwrite "
            "(a tokenizer trained on this text is trained anew with the same fraction)"
        )
    tokenizer.save_pretrained(root / TOKENIZER_FOLDER)
    sync_tree(root / TOKENIZER_FOLDER)
    write_report(root, manifest)
    manifest.save(root / MANIFEST_NAME)
    return manifest


def print_summary(root: Path, manifest: Manifest, tokens: int, seconds: float) -> None:
    """What the folder holds, and the speed of this job, which built `tokens` of it."""
    for split, counts in manifest.counts.items():
        filled = counts.row_tokens / max(counts.rows * manifest.row_length, 1)
        print(
            f"{root / split}: {counts.documents:,} documents, {counts.sentences:,} sentences, {counts.tokens:,} tokens "
            f"({counts.unknown_tokens / max(counts.tokens, 1):.2%} unknown), {counts.rows:,} rows of "
            f"{manifest.row_length} ({filled:.1%} filled)"
        )
    total = sum(manifest.sources, SourceCounts())
    dropped = [f"{tally.documents:,} {reason}" for reason, tally in sorted(total.dropped.items()) if tally.documents]
    print(f"of {total.read.documents:,} documents dropped: {', '.join(dropped) or 'none'}; see {root / REPORT_NAME}")
    print(f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")


@contextmanager
def telling_what_to_do(root: Path) -> Iterator[None]:
    """What the system refuses to write, with the remedy."""
    try:
        yield
    except OSError as error:
        name_file(error, root)
        raise ValueError(remedied(error)) from error


if __name__ == "__main__":
    sys.exit(main())
