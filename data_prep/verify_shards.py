"""Command: check every byte of a built folder. python -m data_prep.verify_shards ROOT [--rebuild-index]"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.manifest import rebuild_indexes, verify
from data_prep.recipes import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0: sound; 1: faults, each on a line of stdout; 2: no built folder."""
    parser = argparse.ArgumentParser(description="Check sizes, hashes and members of all shards against the manifest.")
    parser.add_argument("root", type=Path, help="folder that data_prep.build_shards wrote")
    parser.add_argument("--rebuild-index", action="store_true", help="first write lost index.json anew from the shards")
    arguments = parser.parse_args(argv)
    return run_command(lambda: check(arguments.root, arguments.rebuild_index))


def check(root: Path, rebuild_index: bool) -> int:
    """Print the faults, if any; the exit status."""
    faults = (rebuild_indexes(root) if rebuild_index else []) or verify(root)
    print("\n".join(faults) or f"{root}: sound")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
