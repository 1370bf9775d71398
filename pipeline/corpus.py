"""A folder of shards as training sees it: tokenizer, global batches, held-out rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data_prep.manifest import MANIFEST_NAME, SPLITS, TOKENIZER_FOLDER, Manifest, check_folder
from data_prep.shards import CorruptShard, ShardReader
from data_prep.tokenization import load_tokenizer, tokenizer_fingerprint
from pipeline.config import DataSettings, RunConfig, accumulation_steps, is_decoder
from pipeline.ending import BAD_INPUT, AlreadyTold, Stopped
from pipeline.loader import Batch, ElasticLoader, RowReader, SplitRows, heldout_batches, order_identity
from pipeline.objectives import Objective, build_objective
from pipeline.order import OrderState
from pipeline.stopping import POLL_SECONDS, StopRequest, die_with_parent
from pipeline.world import LAUNCHER_VARIABLES, World


@dataclass(frozen=True)
class Corpus:
    """What `open_corpus` found, bound to one rank of one run."""

    config: RunConfig
    world: World
    tokenizer: PreTrainedTokenizerBase
    train: RowReader
    heldout: RowReader
    objective: Objective
    order: OrderState

    def train_batches(self, samples_consumed: int, num_steps: int) -> Iterator[Batch]:
        """This rank's shares of the next `num_steps` global batches after `samples_consumed` samples."""
        loader = ElasticLoader(
            self.train,
            self.objective.make_batch,
            order=replace(self.order, position=samples_consumed),
            global_batch_size=self.config.training.global_batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            num_workers=self.config.data.num_workers,
        )
        return loader.batches(num_steps)

    def heldout_batches(self) -> Iterator[Batch]:
        """One pass over the held-out rows."""
        return heldout_batches(
            self.heldout,
            self.objective.make_batch,
            batch_size=self.config.evaluation.micro_batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def check(self) -> None:
        """Raises ValueError where the rows do not make a global batch for these ranks, or none is held out."""
        accumulation_steps(self.config, self.world.size)
        try:
            self.train_batches(0, 0)
            self.heldout_batches()
        except ValueError as error:
            raise ValueError(f"data.shards {self.config.data.shards}: {error}") from error

    def identity(self) -> dict[str, int | str | None]:
        """What decides which samples come when, and what is evaluated; kept in every checkpoint."""
        return {
            **order_identity(self.train, self.order),
            "heldout_fingerprint": self.heldout.fingerprint,
            "sample_length": self.train.row_length,
        }


def build_missing_shards(settings: DataSettings, stop: StopRequest) -> None:
    """Build the shards that are not there by the recipes that name them: each command goes on where it was interrupted.

    Raises AlreadyTold where a command fails, and Stopped where it has to be given up.
    """
    if settings.shards_recipe is None or (Path(settings.shards) / MANIFEST_NAME).exists():
        return
    if settings.tokenizer_recipe is not None:
        _run_command(["data_prep.train_tokenizer", "--recipe", settings.tokenizer_recipe], stop)
    _run_command(["data_prep.build_shards", "--recipe", settings.shards_recipe], stop)


def _run_command(command: list[str], stop: StopRequest) -> None:
    print("building what data.shards lacks: python -m", *command, flush=True)
    # To the command, which may use MPI itself, our launcher's variables would say that it is one of many.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    words = [sys.executable, "-m", *command]
    with subprocess.Popen(words, env=environment, preexec_fn=die_with_parent) as process:  # noqa: PLW1509 (one call)
        while process.poll() is None:
            if stop.reason is not None:
                process.terminate()
                raise Stopped(f"stopped by {stop.reason} while building shards: the same command goes on")
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
    if process.returncode == BAD_INPUT:
        raise AlreadyTold
    if process.returncode != 0:
        raise RuntimeError(f"python -m {' '.join(command)} ended with exit code {process.returncode}")


def open_corpus(config: RunConfig, world: World) -> Corpus:
    """The shards that config.data names.

    Raises ValueError where they are not whole, the tokenizer is not theirs, there are too few, or the model needs rows
    of another kind.
    """
    root = Path(config.data.shards)
    world.on_main(lambda: check_folder(root).version)  # one process looks at all shards, for all
    manifest, tokenizer = open_tokenizer(root)
    _refuse_other_rows(config, manifest)
    objective = build_objective(config, tokenizer)
    _refuse_little_text(config, manifest)
    readers = [ShardReader(root / split) for split in SPLITS]
    if config.data.verify:
        faults = [fault for reader in readers for fault in reader.faults(world.rank, world.size)]
        if faults := [fault for part in world.gather(faults) for fault in part]:
            raise CorruptShard(*faults)
    sample_length = config.data.sample_length or manifest.row_length
    train, heldout = (
        reader if sample_length == manifest.row_length else SplitRows(reader, sample_length) for reader in readers
    )
    order = OrderState(
        seed=config.seed,
        num_samples=len(train),
        run=config.data.shuffle_run,
        window=config.data.shuffle_window,
    )
    corpus = Corpus(config, world, tokenizer, train, heldout, objective, order)
    corpus.check()
    return corpus


def _refuse_other_rows(config: RunConfig, manifest: Manifest) -> None:
    shards, length = config.data.shards, config.data.sample_length
    needed = "causal" if is_decoder(config.model) else "pairs"
    if manifest.layout != needed:
        raise ValueError(
            f"data.shards {shards} has rows in the layout {manifest.layout}, but {config.model.preset} learns from "
            f"{needed}: build them by data_prep.build_shards --layout {needed}, or name another model.preset"
        )
    if length is not None and manifest.layout != "causal":
        raise ValueError(f"data.sample_length {length}: only causal rows can be split, pairs cannot: leave it out")
    if length is not None and manifest.row_length % length:
        raise ValueError(
            f"data.sample_length {length} does not divide the rows of {manifest.row_length} tokens in {shards}: "
            "use a divisor, or leave it out"
        )


def _refuse_little_text(config: RunConfig, manifest: Manifest) -> None:
    """ValueError where so little text fills causal rows that whole batches would be padding."""
    needed = config.training.global_batch_size * (config.data.sample_length or manifest.row_length)
    tokens = manifest.counts["train"].row_tokens
    if manifest.layout == "causal" and tokens < needed:
        raise ValueError(
            f"data.shards {config.data.shards} holds {tokens:,} tokens to train on, fewer than the {needed:,} of one "
            "global batch: prepare more text, or lower training.global_batch_size or data.sample_length"
        )


def open_tokenizer(root: Path) -> tuple[Manifest, PreTrainedTokenizerBase]:
    """Manifest and tokenizer of a folder of shards. ValueError where the tokenizer is not the one of the shards."""
    manifest = Manifest.load(root)
    tokenizer = load_tokenizer(root / TOKENIZER_FOLDER)
    if tokenizer_fingerprint(tokenizer) != manifest.tokenizer_fingerprint:
        raise ValueError(
            f"{root / TOKENIZER_FOLDER} is not the tokenizer that the shards were made with: build the shards anew"
        )
    return manifest, tokenizer
