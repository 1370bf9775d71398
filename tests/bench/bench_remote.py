"""Remote shards over HTTP on this machine, slow and failing, and what the index of a large corpus takes in memory.

    python -m tests.bench.bench_remote --rows 20000      (a quick try; the default is 200,000 rows of 128 tokens)

The server answers after --latency milliseconds. It runs in a process of its own, on the same cores.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from data_prep.block_runs import BlockRun
from data_prep.shards import ShardIndex, ShardReader, ShardRecord, row_fields
from pipeline.config import ObjectiveSettings
from pipeline.loader import Batch, ElasticLoader
from pipeline.objectives import MaskedTokens
from pipeline.order import OrderState, run_and_window
from pipeline.shard_cache import CachedReader, ShardCache
from tests.bench.bench_loader import TOKENS, write_shards
from tests.bench.tables import format_table, machine
from tests.http_store import http_store

FAULTS = ("cut", 503, "flip", "reset", "longer")
BLOCKS = (10_000, 100_000, 1_000_000)
BLOCKS_PER_SHARD = 256


def main(arguments: Sequence[str] | None = None) -> None:
    """Write shards, serve and read them, print two tables."""
    options = _parse(arguments)
    print(f"Rows of {options.tokens} tokens, global batch {options.batch}, one rank; {machine()}")
    with tempfile.TemporaryDirectory() as folder:
        print_remote(Path(folder), options)
    print_memory()


def print_remote(folder: Path, options: argparse.Namespace) -> None:
    """Tokens per second of one epoch in the order for remote shards, the same epoch from the disk beside it."""
    shards = folder / "shards"
    shards.mkdir()
    local = write_shards(shards, options.rows, options.tokens)
    order = OrderState(0, len(local), 0, *run_and_window("remote", local.shard_sizes))
    steps = len(local) // options.batch
    rows = [["local", *_epoch(local, order, steps, options)]]
    for name, faults in (("remote", ()), ("remote, one fault in three requests", FAULTS)):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        server = multiprocessing.Process(target=_serve, args=(shards, options.latency / 1e3, faults, sender))
        server.start()
        remote_reader = CachedReader(shards, receiver.recv(), ShardCache(folder / name, 10**12))
        rows.append([name, *_epoch(remote_reader, order, steps, options, local)])
        server.terminate()
        server.join()
    columns = [f"an epoch of {options.rows:,} rows, {len(list(shards.glob('*.tar')))} shards", "M tokens/s", "first ms"]
    print(format_table(columns, rows), end="\n\n")


def _epoch(
    reader: ShardReader, order: OrderState, steps: int, options: argparse.Namespace, local: ShardReader | None = None
) -> list[str]:
    """Tokens per second and the time to the first batch. Rows that are not `local`'s are an error."""
    make_batch = MaskedTokens(seed=0, settings=ObjectiveSettings(), tokens=TOKENS).make_batch
    loader = ElasticLoader(reader, make_batch, order=order, global_batch_size=options.batch)
    began, first, batches = time.perf_counter(), 0.0, []
    for batch in loader.batches(steps):
        first = first or time.perf_counter() - began
        batches.append(batch)
    seconds = time.perf_counter() - began
    if local is not None:
        _compare(batches, replace_reader(loader, local))
    return [f"{steps * options.batch * options.tokens / seconds / 1e6:.1f}", f"{first * 1e3:.0f}"]


def replace_reader(loader: ElasticLoader, reader: ShardReader) -> ElasticLoader:
    """The same batches from other shards."""
    return ElasticLoader(reader, loader.make_batch, order=loader.order, global_batch_size=loader.global_batch_size)


def _compare(batches: list[Batch], local: ElasticLoader) -> None:
    for step, batch in enumerate(batches):
        for name, tensor in local[step].tensors.items():
            assert tensor.equal(batch.tensors[name]), f"step {step}: {name} differs"


def _serve(folder: Path, latency: float, faults: Sequence[str | int], sender: Connection) -> None:
    with http_store(folder, latency) as store:
        shards = sorted(path.name for path in folder.glob("*.tar"))
        if faults:
            store.faults = {name: [faults[number % len(faults)]] for number, name in enumerate(shards[::2])}
        sender.send(store.url)
        time.sleep(10**6)


def print_memory() -> None:
    """What opening an index adds to a process."""
    table = []
    for blocks in BLOCKS:
        with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
            write_index(Path(folder), blocks)
            table.append([f"{blocks:,}", *pool.apply(open_index, (Path(folder),))])
    columns = ["blocks in the index", "M rows", "MB of arrays", "MB of the process", "s to open"]
    print(format_table(columns, table))


def write_index(folder: Path, blocks: int) -> None:
    """The index of pairs in blocks of 1,024 rows of 128 tokens, of which no shard exists."""
    fields = row_fields("pairs", 128, "uint16")
    places, end = {}, 0
    for field in fields:
        places[field.name] = end
        end += 1024 * field.row_bytes + 1024
    record = ShardRecord("", end * BLOCKS_PER_SHARD, "0" * 32, [BlockRun(BLOCKS_PER_SHARD, 1024, end, places)])
    records = [replace(record, name=f"train-{number:06d}.tar") for number in range(-(-blocks // BLOCKS_PER_SHARD))]
    ShardIndex(128, "none", fields, tuple(records)).save(folder)


def open_index(folder: Path) -> list[str]:
    """M rows, MB that the reader holds, MB by which the process has grown, seconds."""
    before, began = _resident(), time.perf_counter()
    reader = ShardReader(folder)
    seconds = time.perf_counter() - began
    sizes = [len(reader) / 1e6, reader.index_bytes / 1e6, (_resident() - before) / 1e6]
    return [*(f"{size:,.0f}" for size in sizes), f"{seconds:.1f}"]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="rows in the shards")
    parser.add_argument("--tokens", type=int, default=128, help="tokens in a row, L")
    parser.add_argument("--batch", type=int, default=256, help="rows in a global batch")
    parser.add_argument("--latency", type=float, default=50.0, help="milliseconds before the server answers")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
