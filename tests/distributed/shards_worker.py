"""A rank of tests/distributed/test_shard_jobs.py: builds shards some times over, and says how each build ended."""

import json
import sys
from pathlib import Path

from data_prep import build_shards, units
from data_prep.ranks import launched_as
from data_prep.sources import read_unit


def broken(unit, skipped):
    """Fails in one rank alone, as no input does; the others' units are long."""
    if unit.number == 3:
        raise RuntimeError("broken on purpose")
    yield from read_unit(unit, skipped)


def main(folder, arguments):
    small = [f"--output={folder / 'small'}", "--deduplicate_megabytes=0.01"]
    runs = [[f"--output={folder / 'ranks'}"], [f"--output={folder / 'ranks'}"]]
    runs += [[f"--output={folder / 'ranks'}", "--seed=5"], ["--output", "--seed=-1"], small]
    codes = [build_shards.main([*arguments, *run]) for run in runs]
    (folder / f"rank{launched_as()[0]}.json").write_text(json.dumps(codes))
    units.read_unit = broken
    build_shards.main([*arguments, f"--output={folder / 'broken'}"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
