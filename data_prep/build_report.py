"""The report of a built folder: report.md and report.png beside the manifest, a function of the manifest alone.

Speeds are no part of it: a folder holds what its inputs and settings decide, whoever built it and however fast.
"""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_prep.files import atomic_file
from data_prep.manifest import SPLITS, Manifest, SourceCounts, Tally

REPORT_NAME = "report.md"
PLOT_NAME = "report.png"
MAX_BARS = 20
MAX_REASONS = 8


def write_report(root: Path, manifest: Manifest) -> None:
    """Write both files."""
    with atomic_file(root / PLOT_NAME) as file:
        file.write(_plot(manifest))
    with atomic_file(root / REPORT_NAME) as file:
        file.write(report_text(manifest).encode())


def report_text(manifest: Manifest) -> str:
    """The report as Markdown."""
    total = sum(manifest.sources, SourceCounts())
    sections = [
        ["# What this folder is made of", ""],
        [f"Rows of {manifest.row_length} tokens, layout {manifest.layout}, {manifest.vocab_size:,} token ids.", ""],
        ["## Documents by input", ""],
        _source_table(manifest, total),
        ["", *_sum_check(total), *_skipped(total), ""],
        ["## Rows by split", ""],
        _split_table(manifest),
        ["", f"![documents by input and step, and by length]({PLOT_NAME})", ""],
        ["## Settings", ""],
        [f"- {name}: {value}" for name, value in sorted(manifest.origin.settings.items())],
    ]
    return "\n".join(line for section in sections for line in section) + "\n"


def _reasons(total: SourceCounts) -> list[str]:
    return sorted(total.dropped)


def _source_table(manifest: Manifest, total: SourceCounts) -> list[str]:
    """One line for each input and a last one for all; documents and, in brackets, MB of text."""
    reasons = _reasons(total)
    head = ["input", "read", *reasons, *(f"kept: {split}" for split in SPLITS)]
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    named = [(record.name, source) for record, source in zip(manifest.origin.inputs, manifest.sources, strict=True)]
    for name, source in [*named, ("all", total)]:
        dropped = [source.dropped.get(reason, Tally()) for reason in reasons]
        kept = [source.kept.get(split, Tally()) for split in SPLITS]
        lines.append(_row([name.replace("|", "\\|"), *map(_tally, (source.read, *dropped, *kept))]))
    return lines


def _tally(tally: Tally) -> str:
    return f"{tally.documents:,} ({tally.bytes / 1e6:,.1f} MB)"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _sum_check(total: SourceCounts) -> list[str]:
    left = sum((*total.dropped.values(), *total.kept.values()), Tally())
    verdict = "which is all that was read" if left == total.read else "which is NOT what was read"
    return [f"Dropped and kept together: {left.documents:,} documents, {left.bytes:,} bytes, {verdict}."]


def _skipped(total: SourceCounts) -> list[str]:
    reasons = [f"{count:,} for: {reason}" for reason, count in sorted(total.skipped.items())]
    return ["", f"Besides, what could not be read was left out: {'; '.join(reasons)}."] if reasons else []


def _split_table(manifest: Manifest) -> list[str]:
    lines = [_row(["split", "documents", "sentences", "tokens", "unknown", "rows", "filled"]), _row(["---"] * 7)]
    for split in SPLITS:
        counts = manifest.counts[split]
        unknown = counts.unknown_tokens / max(counts.tokens, 1)
        filled = counts.row_tokens / max(counts.rows * manifest.row_length, 1)
        numbers = (counts.documents, counts.sentences, counts.tokens)
        cells = [*(f"{number:,}" for number in numbers), f"{unknown:.2%}", f"{counts.rows:,}", f"{filled:.1%}"]
        lines.append(_row([split, *cells]))
    return lines


def _plot(manifest: Manifest) -> bytes:
    from matplotlib.figure import Figure  # takes a second, which other commands need not wait

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    by_source, by_length = figure.subplots(1, 2)
    _draw_sources(by_source, manifest)
    _draw_lengths(by_length, manifest.lengths)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def _draw_sources(axes: Any, manifest: Manifest) -> None:
    """Stacked bars: of the largest inputs' documents the shares that every step dropped and every split kept."""
    together = zip(manifest.origin.inputs, manifest.sources, strict=True)
    shown = sorted(together, key=lambda pair: -pair[1].read.bytes)[:MAX_BARS]
    places, left = range(len(shown)), [0.0] * len(shown)
    total = sum(manifest.sources, SourceCounts())
    for label, kind, names in _segments(total):
        counts = [sum(getattr(source, kind).get(name, Tally()).documents for name in names) for _, source in shown]
        shares = [100 * count / max(source.read.documents, 1) for count, (_, source) in zip(counts, shown, strict=True)]
        axes.barh(places, shares, left=left, label=label)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    names = [Path(record.name).name[-30:] for record, _ in shown]
    axes.set_yticks(places, names, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("documents (%)")
    axes.set_title("What became of the documents" + (" of the largest inputs" if len(shown) == MAX_BARS else ""))
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)


def _segments(total: SourceCounts) -> list[tuple[str, str, tuple[str, ...]]]:
    """Parts of a bar: label, attribute of SourceCounts, names. The reasons that dropped least stand together."""
    reasons = [reason for reason in _reasons(total) if total.dropped[reason].documents]
    reasons.sort(key=lambda reason: -total.dropped[reason].documents)
    several = len(reasons) > MAX_REASONS
    shown, rest = (reasons[: MAX_REASONS - 1], reasons[MAX_REASONS - 1 :]) if several else (reasons, [])
    parts = [(f"kept: {split}", "kept", (split,)) for split in SPLITS]
    parts += [(f"dropped: {reason[-40:]}", "dropped", (reason,)) for reason in shown]
    return parts + ([(f"dropped for {len(rest)} other reasons", "dropped", tuple(rest))] if rest else [])


def _draw_lengths(axes: Any, lengths: Sequence[int]) -> None:
    """Bars for documents of 1, 2 to 3, 4 to 7 ... tokens."""
    axes.bar(range(len(lengths)), lengths, width=0.9)
    axes.set_xticks(range(len(lengths)), [f"{1 << power:,}" for power in range(len(lengths))], rotation=60)
    axes.set_xlabel("tokens of a document, from this number to the next")
    axes.set_ylabel("documents")
    axes.set_title("Length of the kept documents")
