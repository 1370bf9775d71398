"""Where the blocks of a shard lie, in few numbers: blocks of as many rows follow each other at equal distances."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import pydantic

Size = Annotated[int, pydantic.Field(ge=0, lt=1 << 63)]  # what offsets in a file are, and numbers of rows


@dataclass(frozen=True)
class BlockRun:
    """Blocks of `rows` rows, each `stride` bytes behind the one before it; `offsets` is where the first has its fields.

    A shard has one or two of them, as its last block may be smaller: an index grows with shards, not with blocks.
    """

    blocks: pydantic.PositiveInt
    rows: pydantic.PositiveInt
    stride: Size
    offsets: dict[str, Size]


def block_runs(rows: Sequence[int], offsets: Mapping[str, Sequence[int]]) -> list[BlockRun]:
    """The fewest runs of a tar's blocks: `rows` of each block, and in `offsets` where each field's blocks begin."""
    runs: list[BlockRun] = []
    for block, count in enumerate(rows):
        places = {name: each[block] for name, each in offsets.items()}
        if runs and count == runs[-1].rows:
            run = runs[-1]
            ahead = {places[name] - first for name, first in run.offsets.items()}
            stride = run.stride if run.blocks > 1 else min(ahead)
            if ahead == {run.blocks * stride}:
                runs[-1] = replace(run, blocks=run.blocks + 1, stride=stride)
                continue
        runs.append(BlockRun(1, count, 0, places))
    return runs
