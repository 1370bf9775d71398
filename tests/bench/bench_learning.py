"""What spiking layers learn, as a share of what ordinary layers learn on the same text.

    python -m tests.bench.bench_learning                         (all that is missing)
    python -m tests.bench.bench_learning --variants "tracked T=1" --seeds 0 --again
    python -m tests.bench.bench_learning --time                  (what a step costs, all variants side by side)
    python -m tests.bench.bench_learning --report                (tables and plots anew from what is there)

Every variant of tests.bench.learning.variants is a recipe with overrides, trained by pipeline/pretrain.py on the same
rows in the same order, once for each seed, on one thread. What was measured before is not trained again, and what was
interrupted goes on. Results are appended to learning.jsonl, times are in learning/times.json; tables and plots are made
of these files alone.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.config import load_run_config
from pipeline.corpus import build_missing_shards
from pipeline.options import count
from pipeline.stopping import StopRequest
from tests.bench.learning.report import write_report
from tests.bench.learning.results import append, current_commit, measure, read_results, rows_of
from tests.bench.learning.timing import measure_times
from tests.bench.learning.variants import RECIPES, VARIANTS, command_line, variants_of
from tests.launcher import ROOT, free_port

SEEDS = (0, 1, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing and write the report. Exit status 1 where a run has failed."""
    options = _parse(arguments)
    os.chdir(ROOT)
    if options.time:
        for recipe in options.recipes:
            _build_shards(recipe)
        measure_times(options.recipes)
    elif not options.report and (failed := _train_missing(options)):
        print(f"error: {', '.join(failed)}: see the .log beside the run in {options.output}", file=sys.stderr)
        return 1
    print(write_report(read_results()))
    return 0


def _train_missing(options: argparse.Namespace) -> list[str]:
    """Train what was asked for and is not measured yet; returns the names of runs that failed."""
    runs = []
    for recipe in options.recipes:
        rows = _build_shards(recipe)
        known = [] if options.again else [each for each in read_results() if each.rows == rows and each.is_current]
        measured = {(each.recipe, each.variant, each.seed) for each in known}
        variants = options.variants or variants_of(recipe)
        wanted = [(recipe, variant, seed) for seed in options.seeds for variant in variants]
        runs += [run for run in wanted if run not in measured]
    with ThreadPoolExecutor(options.jobs) as pool:
        names = pool.map(lambda run: _train(*run, options.output), runs)
        return [name for name in names if name is not None]


def _build_shards(recipe: str) -> str:
    """Build what the recipe's shards lack, once for all runs; returns which rows they hold."""
    config = load_run_config(RECIPES[recipe].split())
    build_missing_shards(config.data, StopRequest())
    return rows_of(config)


def _train(recipe: str, variant: str, seed: int, output: Path) -> str | None:
    """Train a run to its end and append what it has learned; its name where it failed."""
    name = f"{recipe}-{variant}-{seed}".translate({ord(" "): "-", ord("="): None, ord(","): None})
    settings = command_line(recipe, variant, "--seed", str(seed), "--name", name, "--output", str(output))
    command = [*VARIANTS[variant].command.split(), *settings]
    # Runs side by side need ports of their own, and on few cores a thread each is the best use of them.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    commit = current_commit()
    output.mkdir(parents=True, exist_ok=True)
    with open(output / f"{name}.log", "a", encoding="utf-8") as log:
        ended = subprocess.run([sys.executable, *command], env=environment, stdout=log, stderr=log, check=False)
    if ended.returncode != 0:
        return name
    append(result := measure(recipe, variant, seed, " ".join(command), commit, output / name))
    print(f"{name}: held-out loss {result.loss:.4f} nat", flush=True)
    shutil.rmtree(output / name)
    return None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    description, _, _ = __doc__.partition("\n")
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_learning", description=description)
    add = parser.add_argument
    add("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="what is learned (default: all)")
    add("--variants", nargs="+", choices=VARIANTS, help="(default: all that the recipe's table has)")
    add("--seeds", nargs="+", type=int, default=SEEDS, metavar="N", help="(default: 0 1 2)")
    add("--jobs", type=count, default=2, metavar="N", help="runs at once, a thread each (default: 2)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--again", action="store_true", help="train what is measured already once more")
    instead.add_argument("--time", action="store_true", help="only measure what a step of each variant costs")
    instead.add_argument("--report", action="store_true", help="only make tables and plots")
    add(
        "--output",
        type=Path,
        default=Path("runs/learning"),
        help="folder of runs (default: runs/learning)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
