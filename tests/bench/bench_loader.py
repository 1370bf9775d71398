"""The loader: tokens per second with and without worker processes, and time to the first batch after a resumption.

    python -m tests.bench.bench_loader --rows 20000      (a quick try; the default is 200,000 rows of 128 tokens)

All figures are taken in one run on synthetic shards: read them side by side, not against another machine's.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.shards import ShardIndex, ShardReader, ShardWriter, row_fields
from pipeline.config import ObjectiveSettings
from pipeline.loader import Batch, ElasticLoader, MakeBatch
from pipeline.objectives import MaskedTokens, NextTokens, SpecialTokens
from pipeline.order import OrderState, sample_ids
from tests.bench.tables import format_table, machine, median_and_spread

VOCAB_SIZE = 30_000
TOKENS = SpecialTokens(mask=4, special=(0, 1, 2, 3, 4), vocab_size=VOCAB_SIZE)
FAR_STEP = 10**8


def main(arguments: Sequence[str] | None = None) -> None:
    """Write shards, measure, print two tables."""
    options = _parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        pairs, causal = (Path(folder, layout) for layout in ("pairs", "causal"))
        reader = write_shards(pairs, options.rows, options.tokens)
        print(
            f"Rows of {options.tokens} tokens, {options.rows} of them, global batch {options.batch}, one rank; median "
            f"(range) of {options.rounds} alternations; {machine()}"
        )
        print_throughput(reader, write_shards(causal, options.rows, options.tokens, "causal"), options)
        print_time_to_first_batch(reader, options)


def write_shards(folder: Path, num_rows: int, row_length: int, layout: str = "pairs") -> ShardReader:
    """Shards of random rows, without padding."""
    rng = np.random.default_rng(0)
    rows = {
        "ids": rng.integers(5, VOCAB_SIZE, (num_rows, row_length), np.uint16),
        "length": np.full(num_rows, row_length, np.uint16),
        "first_length": np.full(num_rows, row_length // 2, np.uint16),
        "next_sentence_label": rng.integers(0, 2, num_rows, np.uint8),
    }
    folder.mkdir(exist_ok=True)
    fields = row_fields(layout, row_length, "uint16")
    writer = ShardWriter(folder, "train", fields)
    writer.write(rows)
    ShardIndex(row_length, "synthetic", fields, tuple(writer.finish())).save(folder)
    return ShardReader(folder)


def print_throughput(reader: ShardReader, causal: ShardReader, options: argparse.Namespace) -> None:
    """Tokens per second of the whole loader, of pairs and causal rows, and of its stages with pairs, which are timed
    alone in this process."""
    order = OrderState(seed=0, num_samples=len(reader))
    ids, epochs = sample_ids(order, options.batch)
    rows, mask = reader.read(ids), _make_batch()
    stages = {
        "order alone": partial(_repeat, lambda: sample_ids(order, options.batch), options.steps),
        "read alone": partial(_repeat, lambda: reader.read(ids), options.steps),
        "mask alone": partial(_repeat, lambda: mask(rows, ids, epochs), options.steps),
    }
    loaders = {
        f"{name}, {workers} workers": partial(_drain, _batches(rows, order, options, workers), options.steps)
        for name, rows in (("loader", reader), ("causal rows", causal))
        for workers in (0, 2)
    }
    seconds = _wall_seconds({**loaders, **stages}, options.rounds)
    tokens = options.steps * options.batch * options.tokens
    rates = {name: [tokens / value / 1e6 for value in values] for name, values in seconds.items()}
    base = np.median(rates["loader, 0 workers"])
    table = [[name, median_and_spread(values, 1), f"{np.median(values) / base:.2f}"] for name, values in rates.items()]
    print(format_table(["", "M tokens/s", "ratio"], table), end="\n\n")


def print_time_to_first_batch(reader: ShardReader, options: argparse.Namespace) -> None:
    """Milliseconds from making the loader to its first batch, afresh and resumed far on."""
    far = FAR_STEP * options.batch
    variants = {
        f"step {step:,}, {workers} workers": partial(
            _drain, _batches(reader, OrderState(0, len(reader), position), options, workers), 1
        )
        for workers in (0, 2)
        for step, position in ((0, 0), (FAR_STEP, far))
    }
    seconds = _wall_seconds(variants, options.rounds)
    table = [[name, median_and_spread([1e3 * value for value in values], 1)] for name, values in seconds.items()]
    print(format_table(["first batch at", "ms"], table))


def _batches(
    reader: ShardReader, order: OrderState, options: argparse.Namespace, workers: int
) -> Callable[[int], Iterator[Batch]]:
    def start(num_steps: int) -> Iterator[Batch]:
        make_batch = _make_batch() if "first_length" in reader.fields else NextTokens(end_id=3).make_batch
        loader = ElasticLoader(reader, make_batch, order=order, global_batch_size=options.batch, num_workers=workers)
        return loader.batches(num_steps)

    return start


def _make_batch() -> MakeBatch:
    return MaskedTokens(seed=0, settings=ObjectiveSettings(), tokens=TOKENS).make_batch


def _drain(start: Callable[[int], Iterator[Batch]], num_steps: int) -> None:
    for _ in start(num_steps):
        pass


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _wall_seconds(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Wall time of each variant, in alternation after one call to warm up; workers' CPU time is not ours to read."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="rows in the shards")
    parser.add_argument("--tokens", type=int, default=128, help="tokens in a row, L")
    parser.add_argument("--batch", type=int, default=256, help="rows in a global batch")
    parser.add_argument("--steps", type=int, default=100, help="global batches that one measurement loads")
    parser.add_argument("--rounds", type=int, default=5, help="alternations of all variants")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
