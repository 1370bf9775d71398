"""Folders of shards as training sees them: tokenizer, global batches, held-out rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from data_prep.manifest import MANIFEST_NAME, SPLITS, TOKENIZER_FOLDER, Manifest
from data_prep.shards import CorruptShard, ShardReader
from data_prep.tokenization import load_tokenizer, tokenizer_fingerprint
from pipeline.config import DataSettings, RunConfig, accumulation_steps, is_decoder
from pipeline.ending import BAD_INPUT, AlreadyTold, Stopped
from pipeline.loader import Batch, ElasticLoader, JoinedRows, RowReader, SplitRows, heldout_batches, order_identity
from pipeline.mixing import Choice, mix
from pipeline.mixture import PERIOD, MixtureState, shares_of
from pipeline.objectives import Objective, build_objective
from pipeline.order import OrderState, run_and_window
from pipeline.phases import Phase, phases_of
from pipeline.places import is_on_network
from pipeline.shard_cache import ShardCache, ShardFolder, open_folder
from pipeline.stopping import POLL_SECONDS, StopRequest, die_with_parent
from pipeline.world import LAUNCHER_VARIABLES, World


@dataclass(frozen=True)
class PhaseRows:
    """What a phase trains on: its samples, and their order from its first one on."""

    phase: Phase
    train: RowReader
    order: OrderState | MixtureState


@dataclass(frozen=True)
class Corpus:
    """What `open_corpus` found, bound to one rank of one run; `heldout` has the last phase's length."""

    config: RunConfig
    world: World
    tokenizer: PreTrainedTokenizerBase
    phases: tuple[PhaseRows, ...]
    heldout: RowReader
    objective: Objective

    @property
    def train(self) -> RowReader:
        """The last phase's samples."""
        return self.phases[-1].train

    @property
    def order(self) -> OrderState | MixtureState:
        """The last phase's order."""
        return self.phases[-1].order

    @property
    def longest_sample(self) -> int:
        """Tokens of the longest samples of any phase."""
        return max(rows.train.row_length for rows in self.phases)

    def train_batches(self, samples_consumed: int, num_steps: int) -> Iterator[Batch]:
        """This rank's shares of the next `num_steps` global batches after `samples_consumed` samples, over all phases.

        A phase that follows begins with a batch of its own; the last one has no end.
        """
        for rows, following in zip(self.phases, (*self.phases[1:], None), strict=True):
            position, steps = samples_consumed - rows.phase.first_sample, num_steps
            if following is not None:
                left = following.phase.first_sample - samples_consumed
                steps = max(0, min(num_steps, left // rows.phase.global_batch_size))
            if steps:
                yield from self._loader(rows, position).batches(steps)
            samples_consumed += steps * rows.phase.global_batch_size
            num_steps -= steps

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
        if faults := list(self._faults()):
            raise ValueError("; ".join(faults))

    def identity(self) -> dict[str, Any]:
        """What decides which samples come when, and what is evaluated; kept in every checkpoint."""
        return {
            **order_identity(self.train, self.order),
            "heldout_fingerprint": self.heldout.fingerprint,
            "sample_length": self.train.row_length,
        }

    def _faults(self) -> Iterator[str]:
        for rows in self.phases:
            phase = rows.phase
            try:
                accumulation_steps(phase.config, self.world.size, phase.section)
            except ValueError as error:
                yield str(error)
                continue
            try:
                self._loader(rows)
            except ValueError as error:
                yield f"{self.config.data.named} for {phase.section}: {error}"
        try:
            self.heldout_batches()
        except ValueError as error:
            yield f"{self.config.data.named}: {error}"

    def _loader(self, rows: PhaseRows, position: int = 0) -> ElasticLoader:
        return ElasticLoader(
            rows.train,
            self.objective.make_batch,
            order=replace(rows.order, position=position),
            global_batch_size=rows.phase.global_batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            num_workers=self.config.data.num_workers,
        )


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


@dataclass(frozen=True)
class Source:
    """One folder of shards: `folder` as the recipe names it, its weight among others, where it lies, and its rows."""

    folder: str
    weight: float
    place: str
    manifest: Manifest
    train: RowReader
    heldout: RowReader


def open_corpus(config: RunConfig, world: World) -> Corpus:
    """The shards that config.data names.

    Raises ValueError where they are not whole, the tokenizer is not theirs, there are too few, or the model needs rows
    of another kind; of several folders, where they do not fit each other.
    """
    folders = open_folders(config.data)
    for folder in folders:
        world.on_main(lambda folder=folder: folder.check().version)  # one process looks at all shards, for all
    opened = {folder.name: open_tokenizer(folder.root) for folder in folders}
    manifests = {folder: manifest for folder, (manifest, _) in opened.items()}
    tokenizer = next(tokenizer for _, tokenizer in opened.values())
    phases = phases_of(config)
    _refuse_other_rows(config, phases, manifests)
    objective = build_objective(config, tokenizer)
    _refuse_little_text(config, phases, manifests)
    readers = {folder.name: [folder.reader(split) for split in SPLITS] for folder in folders}
    if config.data.verify:
        _verify([reader for pair in readers.values() for reader in pair], world)
    # One process says where they lie: the machine that exports a folder sees it as its own disk.
    places = world.on_main(lambda: [_place(folder) for folder in folders])
    rows = []
    for phase in phases:
        data = phase.config.data
        sources = [
            Source(name, weight, place, manifests[name], *(_samples(reader, data) for reader in readers[name]))
            for (name, weight), place in zip(data.weights.items(), places, strict=True)
        ]
        train, heldout, order = _join(sources, phase.config)
        rows.append(PhaseRows(phase, train, order))
    corpus = Corpus(config, world, tokenizer, tuple(rows), heldout, objective)
    corpus.check()
    return corpus


def _verify(readers: Sequence[ShardReader], world: World) -> None:
    """Every byte of the shards, each rank its part. Raises CorruptShard with the faults that any rank has found."""
    faults = [fault for reader in readers for fault in reader.faults(world.rank, world.size)]
    if faults := [fault for part in world.gather(faults) for fault in part]:
        raise CorruptShard(*faults)


def _samples(reader: ShardReader, settings: DataSettings) -> RowReader:
    whole = settings.sample_length in (None, reader.row_length)
    return reader if whole else SplitRows(reader, settings.sample_length)


def _join(sources: Sequence[Source], config: RunConfig) -> tuple[RowReader, RowReader, OrderState | MixtureState]:
    """The rows to train on, those held out, and the order of the former.

    Sources stand in the order of their fingerprints, so that neither their names nor the recipe's order count.
    """
    if len(sources) == 1:
        (source,) = sources
        order = _order(source, config.data, config.seed)
        _refuse_small_cache(sources, [order], config.data)
        return source.train, source.heldout, order
    sources = sorted(sources, key=lambda source: source.train.fingerprint)
    for source, other in pairwise(sources):
        if source.train.fingerprint == other.train.fingerprint:
            raise ValueError(f"data.mixture: {source.folder} and {other.folder} hold the same rows: name one of them")
    shares = shares_of([source.weight for source in sources])
    _refuse_small_sources(sources, shares, config.training.global_batch_size)
    seeds = mix(config.seed, Choice.SOURCE_ORDER, np.arange(len(sources))).tolist()
    orders = tuple(_order(source, config.data, seed) for source, seed in zip(sources, seeds, strict=True))
    _refuse_small_cache(sources, orders, config.data)
    train, heldout = (JoinedRows([getattr(source, split) for source in sources]) for split in SPLITS)
    return train, heldout, MixtureState(config.seed, orders, shares)


def _order(source: Source, settings: DataSettings, seed: int) -> OrderState:
    run, window = settings.shuffle_run or 1, settings.shuffle_window
    if (settings.shuffle_run, settings.shuffle_window) == (None, None):
        place = source.place if settings.order == "auto" else settings.order
        run, window = run_and_window(place, source.train.shard_sizes)
    return OrderState(seed, len(source.train), run=run, window=window)


def _place(folder: ShardFolder) -> str:
    if folder.cache is not None:
        return "remote"
    return "nfs" if is_on_network(folder.root) else "disk"


def _refuse_other_rows(config: RunConfig, phases: Sequence[Phase], manifests: Mapping[str, Manifest]) -> None:
    first_folder, first = next(iter(manifests.items()))
    for folder, manifest in manifests.items():
        _refuse_rows_of(folder, manifest, config, phases)
        if manifest.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise ValueError(
                f"data.mixture: {folder} was made with another tokenizer than {first_folder}: build both with the same"
            )
        if config.data.sample_length is None and manifest.row_length != first.row_length:
            raise ValueError(
                f"data.mixture: {folder} has rows of {manifest.row_length} tokens, {first_folder} of "
                f"{first.row_length}: build them alike (of causal ones, set data.sample_length to a common divisor)"
            )


def _refuse_rows_of(folder: str, manifest: Manifest, config: RunConfig, phases: Sequence[Phase]) -> None:
    sections = [*(phase.section for phase in phases[:-1]), "data"]
    lengths = {
        f"{section}.sample_length": length
        for section, phase in zip(sections, phases, strict=True)
        if (length := phase.config.data.sample_length) is not None
    }
    needed = "causal" if is_decoder(config.model) else "pairs"
    if manifest.layout != needed:
        raise ValueError(
            f"data.shards {folder} has rows in the layout {manifest.layout}, but {config.model.preset} learns from "
            f"{needed}: build them by data_prep.build_shards --layout {needed}, or name another model.preset"
        )
    if lengths and manifest.layout != "causal":
        named = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{named}: only causal rows can be split, pairs cannot: leave it out")
    uneven = [f"{name} {length}" for name, length in lengths.items() if manifest.row_length % length]
    if uneven:
        raise ValueError(
            f"{' and '.join(uneven)} {'do' if len(uneven) > 1 else 'does'} not divide the rows of "
            f"{manifest.row_length} tokens in {folder}: use a divisor, or leave it out"
        )


def _refuse_little_text(config: RunConfig, phases: Sequence[Phase], manifests: Mapping[str, Manifest]) -> None:
    """ValueError where so little text fills causal rows that whole batches would be padding."""
    row_length = next(iter(manifests.values())).row_length
    needed = max(phase.global_batch_size * (phase.config.data.sample_length or row_length) for phase in phases)
    tokens = sum(manifest.counts["train"].row_tokens for manifest in manifests.values())
    if is_decoder(config.model) and tokens < needed:
        raise ValueError(
            f"{config.data.named} holds {tokens:,} tokens to train on, fewer than the {needed:,} of one global "
            "batch: prepare more text, or lower training.global_batch_size or data.sample_length"
        )


def _refuse_small_sources(sources: Sequence[Source], shares: Sequence[int], global_batch_size: int) -> None:
    """ValueError where a source has so few samples that one may come twice in a batch."""
    for source, share in zip(sources, shares, strict=True):
        drawn = -(-global_batch_size * share // PERIOD)
        if len(source.train) < drawn:
            raise ValueError(
                f"data.mixture: {source.folder} has {len(source.train)} training samples, fewer than its {drawn} of a "
                f"global batch of {global_batch_size}: lower its weight {source.weight:g}, or give it more text"
            )


def _refuse_small_cache(sources: Sequence[Source], orders: Sequence[OrderState], settings: DataSettings) -> None:
    """ValueError where rows are shuffled among so many remote shards that these drive each other from the cache."""
    part = 0.0
    for source, order in zip(sources, orders, strict=True):
        if source.train.samples_ahead:
            part += _rows_at_hand(order, max(source.train.shard_sizes)) / source.train.samples_ahead
    if part > 1:
        raise ValueError(
            f"data.cache_gigabytes {settings.cache_gigabytes:g} is too small for remote shards in this order: raise it "
            f"to {part * settings.cache_gigabytes * 1.01:.3g}, or set data.order remote"
        )


def _rows_at_hand(order: OrderState, shard: int) -> int:
    """How many rows the shards hold that a window is drawn from, where the largest has `shard` of them."""
    window = min(order.window or order.num_samples, order.num_samples)
    if isinstance(order.run, tuple):
        rows = window + 2 * (shard - 1)  # a shard at either end may lie in it in part
    else:
        rows = -(-window // order.run) * (order.run - 1 + shard)
    return min(rows, order.num_samples)


def open_folders(settings: DataSettings, names: Sequence[str] | None = None) -> list[ShardFolder]:
    """The folders of the recipe, or those of other names. Raises RemoteError where one is remote and cannot be had."""
    cache = ShardCache(Path(settings.cache), int(settings.cache_gigabytes * 1e9))
    return [open_folder(str(name), cache) for name in (settings.weights if names is None else names)]


def open_tokenizer(root: Path) -> tuple[Manifest, PreTrainedTokenizerBase]:
    """Manifest and tokenizer of a folder of shards. ValueError where the tokenizer is not the one of the shards."""
    manifest = Manifest.load(root)
    tokenizer = load_tokenizer(root / TOKENIZER_FOLDER)
    if tokenizer_fingerprint(tokenizer) != manifest.tokenizer_fingerprint:
        raise ValueError(
            f"{root / TOKENIZER_FOLDER} is not the tokenizer that the shards were made with: build the shards anew"
        )
    return manifest, tokenizer
