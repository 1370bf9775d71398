"""Shards behind URLs: every row is the local one, whatever the server does, or there is an error that says why."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest

from data_prep.shards import ShardIndex, ShardReader, ShardWriter, row_fields
from pipeline import remote
from pipeline.config import load_run_config
from pipeline.corpus import open_corpus
from pipeline.loader import ElasticLoader, JoinedRows, SplitRows
from pipeline.order import OrderState, run_and_window
from pipeline.read_ahead import ReadAhead
from pipeline.remote import RemoteError, download
from pipeline.shard_cache import CachedReader, ShardCache, open_folder
from tests.http_store import http_store
from tests.test_mixture import make_batch
from tests.tiny import OneProcess

FIELDS = row_fields("causal", 16, "uint16")
ROWS = 320


@pytest.fixture(autouse=True)
def in_haste(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.002)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten shards of 32 rows, and nothing else of a built folder."""
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder, "train", FIELDS, rows_per_block=8, blocks_per_shard=4)
    writer.write({"ids": rng.integers(0, 999, (ROWS, 16), np.uint16), "length": np.full(ROWS, 16, np.uint16)})
    ShardIndex(16, "toy", FIELDS, tuple(writer.finish())).save(folder)
    return folder


@pytest.fixture
def store(folder):
    with http_store(folder) as store:
        yield store


@pytest.fixture
def reader(folder, store, tmp_path):
    return CachedReader(folder, store.url, ShardCache(tmp_path / "cache", 10**9))


def shard_size(folder):
    return max(path.stat().st_size for path in folder.glob("*.tar"))


def assert_local_rows(reader, folder, ids=None):
    ids = np.random.default_rng(1).permutation(ROWS) if ids is None else ids
    rows, local = reader.read(ids), ShardReader(folder).read(ids)
    assert all(np.array_equal(rows[name], local[name]) for name in local)


def test_rows_are_the_local_ones_and_come_once(reader, folder, store):
    assert_local_rows(reader, folder)
    assert_local_rows(reader, folder)
    assert len(store.requests) == 10 and set(store.requests.values()) == {1}


@pytest.mark.parametrize(
    "faults",
    [
        [500, 503, 429],
        ["reset", "reset"],
        ["cut", "cut", "cut", "cut", "cut", "cut", "cut"],
        ["flip", "flip"],
        ["longer"],
        ["cut", "all"],
        ["cut", "flip", "reset", 502, "cut", "flip"],
    ],
    ids=str,
)
def test_what_the_server_does_changes_no_row(faults, reader, folder, store):
    store.faults = {f"000{number}.tar": list(faults) for number in (0, 3, 9)}
    assert_local_rows(reader, folder)
    assert not any(store.faults.values())


def test_what_broke_off_is_taken_up_where_it_broke_off(reader, folder, store):
    store.faults = {"0000.tar": ["cut"]}
    assert_local_rows(reader, folder, np.arange(32))
    assert store.sent == (folder / "train-0000.tar").stat().st_size


@pytest.mark.parametrize(
    ("faults", "cause"),
    [
        ([500] * 9, "given up after 6 attempts: 500 Internal Server Error"),
        (["reset"] * 9, "given up after 6 attempts: RemoteDisconnected"),
        (["flip"] * 9, r"given up after 6 attempts: xxh3_128 \w+, expected"),
        (["flip", "cut"] * 9, r"given up after 6 attempts: xxh3_128"),
        ([403], "may not be read .403 Forbidden.: see to your rights"),
        ([404], "does not exist .404 Not Found.: see to its name"),
    ],
    ids=str,
)
def test_what_cannot_be_had_names_url_and_cause(faults, cause, reader, store, tmp_path):
    store.faults = {"0003.tar": faults}
    with pytest.raises(RemoteError, match=f"{store.url}/train-0003.tar:? {cause}"):
        reader.read(np.array([100]))
    assert not list((tmp_path / "cache").glob("*.tar*"))


def test_nothing_listens(folder, tmp_path):
    with http_store(folder) as store:
        pass
    with pytest.raises(RemoteError, match="Connection refused"):
        CachedReader(folder, store.url, ShardCache(tmp_path, 10**9)).read(np.array([0]))


def test_a_copy_that_was_damaged_in_the_cache_is_fetched_again(reader, folder, store, tmp_path):
    assert_local_rows(reader, folder)
    for path in (tmp_path / "cache").glob("*.tar"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    fresh = CachedReader(folder, store.url, ShardCache(tmp_path / "cache", 10**9))
    assert_local_rows(fresh, folder)
    assert set(store.requests.values()) == {2}


def test_the_cache_keeps_its_size_and_what_is_used(folder, store, tmp_path):
    size = shard_size(folder)
    reader = CachedReader(folder, store.url, ShardCache(tmp_path / "cache", 3 * size))
    reader.open_shards = 2
    for shard in range(10):
        assert_local_rows(reader, folder, np.arange(32 * shard, 32 * shard + 32))
        assert len(list((tmp_path / "cache").glob("*.tar"))) == min(shard + 1, 3)
    assert_local_rows(reader, folder, np.arange(7 * 32, 8 * 32))
    assert set(store.requests.values()) == {1}, "the last three are there"
    held = CachedReader(folder, store.url, ShardCache(tmp_path / "cache", size))
    rows = held.read(np.arange(3 * 32))  # has three shards open: the cache cannot become smaller
    assert len(list((tmp_path / "cache").glob("*.tar"))) >= 3
    reader.read(np.array([300]))
    before = sum(store.requests.values())
    assert np.array_equal(held.read(np.arange(3 * 32))["ids"], rows["ids"])
    held.close()
    reader.close()
    held.read(np.array([200]))
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1 and sum(store.requests.values()) == before + 1


def test_downloads_at_the_same_time_share_the_room(folder, reader):
    size = shard_size(folder)
    assert_local_rows(reader, folder, np.arange(4 * 32))
    reader.close()
    cache = ShardCache(reader.cache.folder, 4 * size)
    with ExitStack() as coming:
        for name, left in (("a", 3), ("b", 2)):
            coming.enter_context(cache._room(cache.folder / f"{name}.tar", size))
            assert len(list(cache.folder.glob("*.tar"))) == left


def test_a_cache_that_cannot_be_locked_is_refused(tmp_path):
    (tmp_path / "locks").touch()
    with pytest.raises(RemoteError, match="cannot be used .*: name another folder"):
        ShardCache(tmp_path, 100).fetch("http://nowhere", 100, "0" * 32)


def _read_all(folder, url, cache, failures):
    reader = CachedReader(folder, url, ShardCache(cache, 10**9))
    try:
        assert_local_rows(reader, folder, np.arange(ROWS))
    except BaseException as error:
        failures.put(repr(error))
        raise


def test_one_process_fetches_for_all_and_another_takes_over_when_it_is_killed(folder, tmp_path):
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    with http_store(folder, latency=0.05) as store:
        store.faults = {"0004.tar": ["reset"]}
        cache = tmp_path / "cache"
        readers = [context.Process(target=_read_all, args=(folder, store.url, cache, failures)) for _ in range(3)]
        for each in readers:
            each.start()
        deadline = time.monotonic() + 60
        while not store.requests["/train-0002.tar"] and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(readers[0].pid, signal.SIGKILL)
        for each in readers:
            each.join(timeout=60)
        assert [each.exitcode for each in readers] == [-signal.SIGKILL, 0, 0] and failures.empty()
        assert sum(store.requests.values()) <= 12, "ten, one after the reset, and perhaps one after the kill"


def test_other_schemes_go_through_fsspec(folder, tmp_path):
    reader = CachedReader(folder, folder.as_uri(), ShardCache(tmp_path, 10**9))
    assert_local_rows(reader, folder)
    (folder / "empty").touch()
    for url, message in (
        (f"{folder.as_uri()}/nowhere", "nowhere does not exist: see to its name"),
        ("tape://here/a", "tape://here/a: .*Protocol not known.*: name http, https, or a scheme that fsspec knows"),
        ("abfs://here/a", "abfs://here/a: .*[Ii]nstall adlfs.*: install that package by pip"),
    ):
        with pytest.raises(RemoteError, match=message):
            download(url, tmp_path / "file")


def test_a_full_disk_says_so(store, monkeypatch, tmp_path):
    def no_space(url, file, *rest):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote, "_fetch", no_space)
    with pytest.raises(RemoteError, match="train-0000.tar: .* is full: make room there, or set another data.cache"):
        download(f"{store.url}/train-0000.tar", tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_are_fetched_before_they_are_read(num_workers, folder, store, reader):
    store.latency = 0.05
    rows = JoinedRows([SplitRows(reader, 8)])
    order = OrderState(5, len(rows), 0, *run_and_window("remote", rows.shard_sizes))
    loader = ElasticLoader(rows, make_batch, order=order, global_batch_size=8, num_workers=num_workers)
    local = ElasticLoader(SplitRows(ShardReader(folder), 8), make_batch, order=order, global_batch_size=8)
    batches = loader.batches(90)
    found = [next(batches)]
    deadline = time.monotonic() + 30
    while len(store.requests) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(store.requests) == 10, "nothing more has been read, but all is here"
    found += batches
    for batch, expected in zip(found, local.batches(90), strict=True):
        assert np.array_equal(batch.sample_ids, expected.sample_ids)
        assert all(np.array_equal(batch.tensors[name], expected.tensors[name]) for name in expected.tensors)
    assert set(store.requests.values()) == {1}


def test_reading_ahead_is_tried_again_when_training_goes_on(folder, store, reader, capsys):
    store.faults = {"0000.tar": [403]}
    order = OrderState(5, len(reader), 0, *run_and_window("remote", reader.shard_sizes))
    ahead = ReadAhead(reader, order)

    def wait_for(condition):
        deadline = time.monotonic() + 30
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert condition()

    said = []
    wait_for(lambda: said.append(capsys.readouterr().err) or "will be tried again" in "".join(said))
    ahead.reached(8)
    wait_for(lambda: len(list(reader.cache.folder.glob("*.tar"))) == 10)
    ahead.close()


def test_a_process_forked_during_a_download_does_not_hold_it(folder, store, reader):
    store.latency = 0.5
    download = threading.Thread(target=reader.fetch, args=[np.array([0])])
    download.start()
    while not list(reader.cache.folder.glob("*.tmp")):
        time.sleep(0.01)
    child = multiprocessing.get_context("fork").Process(target=reader.read, args=[np.arange(8)])
    outliving = multiprocessing.get_context("fork").Process(target=time.sleep, args=[600])
    for process in (child, outliving):
        process.start()
    try:
        child.join(30)
        assert child.exitcode == 0, "waits for a lock of its own"
        download.join()
        reading = threading.Thread(target=assert_local_rows, args=[reader, folder, np.arange(32)], daemon=True)
        reading.start()
        reading.join(30)
        assert not reading.is_alive(), "waits for a lock of a child's"
    finally:
        for process in (child, outliving):
            process.kill()
            process.join()
    assert set(store.requests.values()) == {1}


def test_more_than_what_was_asked_for_is_not_kept(store, folder, tmp_path):
    size = (folder / "train-0000.tar").stat().st_size
    with pytest.raises(RemoteError, match="expected 100"):
        download(f"{store.url}/train-0000.tar", tmp_path / "file", size=100)
    assert size > 100 and not list(tmp_path.iterdir())


def test_reading_ahead_stops_where_a_part_of_the_cache_is_full(folder, store, tmp_path):
    reader = CachedReader(folder, store.url, ShardCache(tmp_path, 6 * shard_size(folder)))
    assert 64 <= reader.samples_ahead < 96
    reader.fetch(np.array([300, 3, 40, 3]))
    assert {path[-8:-4] for path in store.requests} == {"0009", "0000", "0001"}


def recipe(shards, tmp_path, *more):
    fixed = ["--recipe", "tests/distributed/tiny.yaml", "--data.cache", str(tmp_path / "cache")]
    return load_run_config([*fixed, "--data.shards", str(shards), *more])


def test_a_run_may_name_a_url(tiny_shards, tmp_path):
    with http_store(tiny_shards) as store:
        store.faults = {"index.json": ["flip", 500], "tokenizer.json": ["cut"], "0000.tar": ["cut", "flip"]}
        config = recipe(store.url, tmp_path)
        corpus, local = (open_corpus(each, OneProcess()) for each in (config, recipe(tiny_shards, tmp_path)))
        order = corpus.order
        assert (order.run, order.window) == run_and_window("remote", local.train.shard_sizes)
        assert {**corpus.identity(), "shuffle_run": 1, "shuffle_window": None} == local.identity()
        local = replace(local, phases=(replace(local.phases[0], order=order),))
        for batch, expected in zip(corpus.train_batches(0, 5), local.train_batches(0, 5), strict=True):
            assert all(np.array_equal(batch.tensors[name], expected.tensors[name]) for name in expected.tensors)
        open_corpus(config, OneProcess())
        assert store.requests["/tokenizer/tokenizer.json"] == 2, "once, and after the cut: not for the second opening"


def test_a_cache_that_is_too_small_is_refused(tiny_shards, tmp_path):
    with http_store(tiny_shards) as store:
        small = recipe(store.url, tmp_path, "--data.cache_gigabytes", "0.0001")
        with pytest.raises(ValueError, match=r"data.cache_gigabytes 0.0001 is too small .* raise it to 0\.\d+, or set"):
            open_corpus(small, OneProcess())


def test_a_folder_that_is_not_whole_is_refused(tiny_shards, tmp_path):
    cache = ShardCache(tmp_path / "cache", 10**9)
    with http_store(tmp_path) as store, pytest.raises(RemoteError, match="is no finished folder of shards"):
        open_folder(store.url, cache)
    other = shutil.copytree(tiny_shards, tmp_path / "other")
    (other / "tokenizer/tokenizer.json").write_text(
        (other / "tokenizer/tokenizer.json").read_text().replace("##ing", "##gni")
    )
    with http_store(other) as store:
        for _ in range(2):
            with pytest.raises(ValueError, match="fingerprint"):
                open_folder(store.url, cache)
