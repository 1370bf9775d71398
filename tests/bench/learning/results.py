"""learning.jsonl: one line for every run, from which all tables and plots are made."""

import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from data_prep.manifest import Manifest
from pipeline.config import RunConfig, load_run_config
from pipeline.footprint import Data, step_work
from pipeline.report import load_run

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "tests" / "bench" / "learning.jsonl"


@dataclass(frozen=True)
class Result:
    """What a run has learned, at what cost."""

    recipe: str
    variant: str
    seed: int
    command: str
    commit: str
    torch: str
    rows: str
    """Fingerprints of the rows, trained and held out: losses of others say nothing about these."""

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


def measure(recipe: str, variant: str, seed: int, command: str, folder: Path) -> Result:
    """The result of the finished run in `folder`."""
    run = load_run(folder)
    config = load_run_config(["--recipe", str(folder / "recipe.yaml")])
    manifest, data = Manifest.load(Path(config.data.shards)), sizes(config)
    training, last = config.training, run.heldout[-1]
    return Result(
        recipe=recipe,
        variant=variant,
        seed=seed,
        command=command,
        commit=_commit(),
        torch=torch.__version__,
        rows=" ".join(manifest.indexes[split] for split in sorted(manifest.indexes)),
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


def append(result: Result) -> None:
    """One more line, whole."""
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def read_results() -> list[Result]:
    """All results in the order they came; of a run that was repeated, all."""
    if not RESULTS.exists():
        return []
    return [Result(**json.loads(line)) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def _commit() -> str:
    """The commit that is checked out, marked where files differ from it."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
