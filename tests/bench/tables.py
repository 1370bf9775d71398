"""What the benchmarks share: timing of variants in alternation, and tables of text."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def cpu_seconds(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU-seconds of all threads for one call of each variant, over `rounds` alternations after one call to warm up.

    In alternation, a machine that slows down meanwhile slows all variants alike.
    """
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return seconds


def median_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """'median (lowest-highest)'."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of text: the first column to the left, the others to the right, as wide as their widest cell."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *rest])

    return "\n".join([line(columns), "  ".join("-" * width for width in widths), *map(line, rows)])


def machine() -> str:
    """On what was measured: every table says it."""
    return f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
