"""What each step of a build of shards costs: CPU time of a whole build by one process, with and without the step.

    python -m tests.bench.collect_text data/english      (text to measure by)
    python -m tests.bench.bench_build --input data/english/film-reviews.jsonl --input data/english/anarchism.jsonl

Every row is `python -m data_prep.build_shards` in a process of its own, start included. Tokens are those of the text as
it is without any step, so that rows compare; documents that a step drops need not be tokenized, which it is given.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from data_prep.manifest import Manifest
from tests.bench.tables import format_table, machine
from tests.launcher import ROOT

HELDOUT = "--heldout_fraction=0.01"
TOKENIZERS = {
    "WordPiece": ["--kind=wordpiece", "--vocab_size=30522", "--lowercase"],
    "SentencePiece": ["--kind=sentencepiece", "--vocab_size=16000"],
    "byte-level BPE": ["--kind=byte_bpe", "--vocab_size=32000"],
}
LAYOUTS = {"WordPiece": "pairs", "SentencePiece": "causal", "byte-level BPE": "causal"}
STEPS = {
    "exact duplicates": ["--deduplicate=exact"],
    "near-duplicates": ["--deduplicate=near"],
    "normalisation": ["--deduplicate=none", "--steps.normalize"],
    "rules of quality": ["--deduplicate=none", "--steps.check_quality"],
    "decontamination": ["--deduplicate=none"],
}
"""Each alone, beside the plain build; near-duplicates include the exact ones. Decontamination has its data named."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the tokenizers, build with each of them and with each step, print one table."""
    options = _parse(arguments)
    inputs = [f"--input={Path(name).resolve()}" for name in options.input]
    with tempfile.TemporaryDirectory() as scratch:
        rows, speeds = [], {}
        for name, kind in TOKENIZERS.items():
            trained = Path(scratch, f"tokenizer {name}")
            sample = ["--sample_fraction", str(options.sample), "--template", LAYOUTS[name]]
            cpu_seconds("data_prep.train_tokenizer", *inputs, *kind, *sample, HELDOUT, f"--output={trained}")
            built = Path(scratch, f"shards {name}")
            settings = [f"--tokenizer={trained}", f"--layout={LAYOUTS[name]}", HELDOUT]
            taken = cpu_seconds(*_build(inputs, built, settings, ["--deduplicate=none"]))
            tokens = sum(counts.tokens for counts in Manifest.load(built).counts.values())
            speeds[name] = settings, taken, tokens
            rows.append(_row(f"{name}, {LAYOUTS[name]}", taken, tokens))
        settings, plain, tokens = speeds["WordPiece"]
        for name, step in STEPS.items():
            if name == "decontamination":
                step = [*step, f"--steps.decontaminate={_evaluation_data(Path(scratch), options.input[0])}"]
            taken = cpu_seconds(*_build(inputs, Path(scratch, f"shards {name}"), settings, step))
            rows.append(_row(f"  + {name}", taken, tokens, taken - plain))
    size = sum(Path(name).stat().st_size for name in options.input) / 1e6
    print(f"Builds of {size:.0f} MB of JSON lines by one process; {machine()}")
    print(format_table(["build", "CPU-s", "M tokens/CPU-s", "of it the step, CPU-s"], rows))


def cpu_seconds(module: str, *arguments: str) -> float:
    """Of a command in a process of its own, which must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    single = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | single,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _build(inputs: Sequence[str], output: Path, settings: Sequence[str], step: Sequence[str]) -> list[str]:
    return ["data_prep.build_shards", *inputs, *settings, *step, f"--output={output}"]


def _evaluation_data(folder: Path, source: str, texts: int = 200) -> Path:
    """A file of the first texts of an input, cut to 40 words: some of what is built is contaminated."""
    path = folder / "evaluation.jsonl"
    with open(source, encoding="utf-8") as lines, open(path, "w", encoding="utf-8") as file:
        for _, line in zip(range(texts), lines, strict=False):
            file.write(json.dumps({"text": " ".join(json.loads(line)["text"].split()[:40])}) + "\n")
    return path


def _row(name: str, taken: float, tokens: int, step: float | None = None) -> list[str]:
    return [name, f"{taken:.1f}", f"{tokens / taken / 1e6:.2f}", "-" if step is None else f"{step:.1f}"]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", action="append", required=True, help="a .jsonl file; repeatable")
    parser.add_argument("--sample", type=float, default=0.2, help="share of the text that tokenizers are trained on")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
