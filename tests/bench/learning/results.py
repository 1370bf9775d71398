"""learning.jsonl: one line for every run, from which all tables and plots are made."""

import json
import subprocess
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash

from data_prep.manifest import Manifest
from data_prep.shards import ShardReader
from pipeline.config import RunConfig, load_run_config
from pipeline.footprint import Data, step_work
from pipeline.report import load_run
from tests.bench.learning.variants import VARIANTS
from tests.launcher import ROOT

FOLDER = ROOT / "tests" / "bench" / "learning"
RESULTS = FOLDER.with_suffix(".jsonl")
RESULT_FILES = tuple(f":!tests/bench/{name}" for name in ("*.jsonl", "*.csv", "*.png", "*.json", "*.md"))


@dataclass(frozen=True)
class Result:
    """What a run has learned, at what cost."""

    recipe: str
    variant: str
    overrides: str
    seed: int
    command: str
    commit: str
    torch: str
    rows: str
    """Fingerprints of the rows, held out and trained (rows_of): losses of others say nothing about these."""

    tokens: int
    """Trained on."""

    operations: float
    """Floating-point operations of the training (pipeline.footprint.step_work)."""

    loss: float
    """At the end, of held-out rows, in nats per target."""

    unigram_entropy: float
    firing_rate: float | None
    spikes_per_token: float | None
    """Over all sites and timesteps, at the end, of held-out rows; None where nothing spikes."""

    rates: list[tuple[int, float]]
    """Firing rate at logged steps."""

    @property
    def is_current(self) -> bool:
        """Whether the variant is still what it was when this was measured."""
        return self.variant in VARIANTS and VARIANTS[self.variant].overrides == self.overrides


def measure(recipe: str, variant: str, seed: int, command: str, commit: str, folder: Path) -> Result:
    """The result of the finished run in `folder`."""
    run = load_run(folder)
    config = load_run_config(["--recipe", str(folder / "recipe.yaml")])
    training, last, data = config.training, run.heldout[-1], sizes(config)
    return Result(
        recipe=recipe,
        variant=variant,
        overrides=VARIANTS[variant].overrides,
        seed=seed,
        command=command,
        commit=commit,
        torch=torch.__version__,
        rows=rows_of(config),
        tokens=training.total_steps * training.global_batch_size * data.sample_length,
        operations=step_work(config, data).total * training.total_steps,
        loss=last[run.loss],
        unigram_entropy=last["unigram_entropy"],
        firing_rate=last.get("firing_rate"),
        spikes_per_token=last.get("spikes_per_token"),
        rates=[(record["step"], record["firing_rate"]) for record in run.train if "firing_rate" in record],
    )


def sizes(config: RunConfig) -> Data:
    """Of the shards that the recipe names."""
    manifest = Manifest.load(Path(config.data.shards))
    return Data(manifest.vocab_size, config.data.sample_length or manifest.row_length)


def rows_of(config: RunConfig) -> str:
    """What the rows of the recipe's shards hold, held out and trained, however they are cut into shards."""
    folder = Path(config.data.shards)
    return " ".join(_fingerprint(folder / split) for split in sorted(Manifest.load(folder).indexes))


def _fingerprint(folder: Path) -> str:
    """xxh3-128 of all rows of a folder of shards in their order, field by field, in hexadecimal."""
    with closing(ShardReader(folder)) as reader:
        rows = reader.read(np.arange(len(reader)))
    digest = xxhash.xxh3_128()
    for name in sorted(rows):
        digest.update(np.ascontiguousarray(rows[name]))
    return digest.hexdigest()


def append(result: Result) -> None:
    """One more line, whole."""
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def read_results() -> list[Result]:
    """All results in the order they came; of a run that was repeated, all."""
    if not RESULTS.exists():
        return []
    return [Result(**json.loads(line)) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def current_commit() -> str:
    """The commit that is checked out, marked where a file differs from it that is no result of a benchmark."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    differs = git("status", "--porcelain", "--untracked-files=no", "--", ".", *RESULT_FILES)
    return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if differs else "")
