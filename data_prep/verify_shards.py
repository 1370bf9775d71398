"""Command: check every byte of a built folder. python -m data_prep.verify_shards ROOT [--rebuild-index] [--report]

Threads share the shards, or ranks: mpirun -n 8 --bind-to none python -m data_prep.verify_shards ROOT
"""

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from data_prep.build_report import write_report
from data_prep.manifest import Manifest, rebuild_indexes, verify
from data_prep.ranks import Ranks, run_ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0: sound; 1: faults, each on a line of stdout; 2: no built folder."""
    parser = argparse.ArgumentParser(description="Check sizes, hashes and members of all shards against the manifest.")
    parser.add_argument("root", type=Path, help="folder that data_prep.build_shards wrote")
    parser.add_argument("--rebuild-index", action="store_true", help="first write lost index.json anew from the shards")
    parser.add_argument("--report", action="store_true", help="then write report.md and report.png anew")
    arguments = parser.parse_args(argv)
    return run_ranks(lambda ranks: check(arguments.root, arguments.rebuild_index, arguments.report, ranks))


def check(root: Path, rebuild_index: bool, report: bool, ranks: Ranks) -> int:
    """Print the faults, if any; the exit status. Collective."""
    faults = ranks.share(lambda: rebuild_indexes(root) if rebuild_index else [], list[str])
    if not faults:
        threads = len(os.sched_getaffinity(0)) if ranks.size == 1 else 1
        found = ranks.gather(ranks.agree(lambda: verify(root, ranks.rank, ranks.size, threads)), list[str])
        faults = list(dict.fromkeys(chain.from_iterable(found)))  # what several ranks have seen, once
    print("\n".join(faults) or f"{root}: sound")
    if report:
        ranks.agree(lambda: write_report(root, Manifest.load(root)) if ranks.is_first else None)
    return ranks.share(lambda: 1 if faults else 0, int)


if __name__ == "__main__":
    sys.exit(main())
