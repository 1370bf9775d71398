"""Command: train a tokenizer on the documents that are not held out, and save it as a transformers folder.

python -m data_prep.train_tokenizer --input X [--input Y] --kind wordpiece --vocab_size 30522 --output DIR
"""

import fcntl
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from data_prep.files import read_record, sync_folder, sync_tree, write_json
from data_prep.origin import Inputs, Origin, faults_of, record_input, refusal
from data_prep.ranks import launched_as, refuse_apart
from data_prep.recipes import BelowOne, FolderName, load_settings, run_command, strict
from data_prep.sources import hash_share, is_heldout, passed_over, plan_units, read_unit
from data_prep.tokenization import TRAINING_RECORD, TrainingRecord, load_tokenizer, tokenizer_fingerprint
from data_prep.tokenizer_models import causal_tokenizer, train_byte_bpe, train_sentencepiece, train_wordpiece

MODEL_NAME = "sentencepiece.model"
SAMPLE_SALT = 1  # so that sampling does not go by the hash that holds out


@strict
@dataclass(frozen=True)
class TokenizerSettings:
    """Train a WordPiece, SentencePiece or BPE tokenizer and save it as a folder that transformers loads."""

    input: Inputs
    """As data_prep.build_shards has them; may be repeated."""

    kind: Literal["wordpiece", "sentencepiece", "byte_bpe"]
    """WordPiece as BERT has it, SentencePiece's unigram model with byte fallback, or byte-level BPE as GPT-2 has it,
    which gives every text back."""

    vocab_size: Annotated[int, Field(ge=256)]
    """Entries of the vocabulary, special tokens included."""

    output: FolderName
    """Folder to write."""

    template: Literal["pairs", "causal"] = "pairs"
    """What a call adds to a text: begin and end of one or two segments, for encoders; causal: the begin alone, and
    SentencePiece then puts no space before a text, so that what a decoder writes can be decoded alone."""

    lowercase: bool = False
    """Make text lower-case first; WordPiece then drops accents too, as uncased BERT does."""

    text_field: str = "text"
    """Key of the text in a JSON line."""

    on_error: Literal["raise", "skip"] = "raise"
    """What is done where an input is broken: raise ends the training; skip leaves out what cannot be read, and says how
    much of it there was."""

    heldout_fraction: BelowOne = 0.01
    """Share of the documents to leave out: the same as for build_shards, or more."""

    sample_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the other documents to train on; a few GB of text are plenty, and SentencePiece holds them in memory."""

    overwrite: bool = False
    """Replace another tokenizer in the output folder."""


def main(argv: Sequence[str] | None = None) -> int:
    size = launched_as()[1]
    if size > 1:
        return refuse_apart(ValueError(f"{size} processes were started, but one trains a tokenizer: start one"))
    return run_command(lambda: train(load_settings(TokenizerSettings, argv, "python -m data_prep.train_tokenizer")))


def train(settings: TokenizerSettings) -> None:
    """Train and save, unless that is done already."""
    output = Path(settings.output)
    origin = origin_of(settings)
    with putting_in_place(output):
        is_done = is_trained(output, origin, settings.overwrite)
    if is_done:
        print(f"{output} is trained already with these settings: nothing to do")
        return
    for line in passed_over(settings.input):
        print(line)
    with tqdm(unit=" documents", file=sys.stderr, mininterval=1) as progress:
        texts = TrainingTexts(settings, progress)
        size, lowercase, model = settings.vocab_size, settings.lowercase, None
        if settings.kind == "sentencepiece":
            tokenizer, model = train_sentencepiece(texts, size, lowercase, prefix=_has_prefix(settings))
        else:
            train_pieces = train_wordpiece if settings.kind == "wordpiece" else train_byte_bpe
            tokenizer = train_pieces(texts, size, lowercase)
    if settings.heldout_fraction and texts.least_share >= settings.heldout_fraction:
        enough = math.ceil(texts.least_share * 1e4 + 1) / 1e4
        raise ValueError(
            f"heldout_fraction {settings.heldout_fraction} holds no document out: use {enough} or more, here and for "
            "the shards, or give more text"
        )
    if settings.template == "causal":
        tokenizer = causal_tokenizer(tokenizer)
    with putting_in_place(output):
        if not is_trained(output, origin, settings.overwrite):  # by another job of the same recipe, meanwhile
            save(output, tokenizer, model, origin)
    print(f"{output}: {settings.kind} tokenizer with {len(tokenizer):,} entries")
    for reason, count in sorted((texts.skipped or {}).items()):
        print(f"left out, since it cannot be read: {count:,} for: {reason}")


def origin_of(settings: TokenizerSettings) -> Origin:
    """What the vocabulary will depend on."""
    deciding = asdict(settings)
    for name in ("input", "output", "overwrite", "on_error"):
        del deciding[name]
    if settings.kind == "sentencepiece" and not _has_prefix(settings):
        deciding["prefix"] = False  # there were tokenizers for decoders that put a space before a text
    return Origin(deciding, tuple(map(record_input, settings.input)))


def _has_prefix(settings: TokenizerSettings) -> bool:
    """Whether SentencePiece puts a space before every text."""
    return settings.template == "pairs"


def is_trained(output: Path, origin: Origin, overwrite: bool) -> bool:
    """Whether the folder holds this very tokenizer.

    Raises:
        ValueError: it holds another one that may not be replaced, or files that are no tokenizer of ours.
    """
    if not (output / TRAINING_RECORD).exists():
        if output.exists() and any(output.iterdir()):
            raise ValueError(f"{output} holds files of another origin: choose another --output")
        return False
    faults = faults_of(saved_record, output, origin)
    if faults and not overwrite:
        raise refusal(output, faults)
    return not faults


def saved_record(output: Path) -> TrainingRecord:
    """What the tokenizer in the folder was trained on.

    Raises:
        ValueError: the record cannot be read, or the tokenizer is not the one that was saved with it.
    """
    record = read_record(TrainingRecord, output / TRAINING_RECORD)
    if tokenizer_fingerprint(load_tokenizer(output)) != record.fingerprint:
        raise ValueError(f"{output} is not as it was saved: its fingerprint is not {record.fingerprint}")
    return record


class TrainingTexts:
    """The texts of the documents that are neither held out nor left out by sampling: each call is a pass over them."""

    def __init__(self, settings: TokenizerSettings, progress: tqdm) -> None:
        self.least_share = 1.0
        """Any larger heldout_fraction holds some document out; known after a pass."""
        self.skipped: Counter[str] | None = Counter() if settings.on_error == "skip" else None
        """What a whole pass has left out, by reason; None: broken content is an error."""
        self._settings = settings
        self._progress = progress

    def __call__(self) -> Iterator[str]:
        settings = self._settings
        self._progress.reset()
        skipped = None if self.skipped is None else Counter()
        skips = settings.on_error == "skip"
        for unit in plan_units(settings.input, text_field=settings.text_field, skips_broken=skips):
            for document in read_unit(unit, skipped):
                self._progress.update()
                self.least_share = min(self.least_share, hash_share(document.text))
                is_sampled = hash_share(document.text, SAMPLE_SALT) < settings.sample_fraction
                if is_sampled and not is_heldout(document.text, settings.heldout_fraction):
                    yield document.text
        self.skipped = skipped  # passes may end before that


def save(output: Path, tokenizer: PreTrainedTokenizerFast, model: bytes | None, origin: Origin) -> None:
    """Put the finished folder in its place, for what was there, which is gone only after that."""
    output = output.resolve()  # a link to a folder stays one
    unfinished = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer.save_pretrained(unfinished)
    if model is not None:
        (unfinished / MODEL_NAME).write_bytes(model)
    write_json(unfinished / TRAINING_RECORD, asdict(TrainingRecord(origin, tokenizer_fingerprint(tokenizer))))
    sync_tree(unfinished)
    old = replaced(output)
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
    unfinished.rename(output)
    sync_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def replaced(output: Path) -> Path:
    """Where a tokenizer waits while another takes its place."""
    return output.with_name(f".{output.name}.old")


@contextmanager
def putting_in_place(output: Path) -> Iterator[None]:
    """One process at a time, where the system can lock folders, changes what the folder of `output` holds.

    Puts back a tokenizer whose successor a kill has kept from its place.
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output.parent, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not output.exists() and replaced(output).exists():
            replaced(output).rename(output)
        yield
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
