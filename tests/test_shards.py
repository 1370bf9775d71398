import io
import json
import os
import tarfile
from dataclasses import asdict
from multiprocessing import get_context

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import shards
from data_prep.shards import CorruptShard, ShardIndex, ShardReader, ShardWriter, row_fields

ROW_LENGTH = 16
FIELDS = row_fields("pairs", ROW_LENGTH, "uint16")


def write_folder(folder, rows, pieces=1, rows_per_block=8, blocks_per_shard=3):
    """A folder of shards of 24 rows; the rows arrive in `pieces`."""
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(
        folder, "train-000000", FIELDS, rows_per_block=rows_per_block, blocks_per_shard=blocks_per_shard
    )
    for piece in np.array_split(np.arange(len(rows["ids"])), pieces):
        writer.write({name: array[piece] for name, array in rows.items()})
    ShardIndex(ROW_LENGTH, "tokenizer", FIELDS, tuple(writer.finish())).save(folder)
    return folder


@pytest.fixture
def rows(pair_rows):
    return pair_rows(100, ROW_LENGTH)


@pytest.fixture
def folder(tmp_path, rows):
    return write_folder(tmp_path / "train", rows, pieces=7)


def any_rows(count, seed=0):
    """Rows of any values that their types hold."""
    rng = np.random.default_rng(seed)
    limits = {field.name: np.iinfo(field.dtype).max for field in FIELDS}
    return {
        field.name: rng.integers(0, limits[field.name], field.shape(count), field.dtype, endpoint=True)
        for field in FIELDS
    }


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """Two shards of two blocks: to damage, and to mend again."""
    return write_folder(tmp_path_factory.mktemp("small"), any_rows(11), rows_per_block=3, blocks_per_shard=2)


def assert_equal_rows(found, rows, sample_ids):
    assert set(found) == set(rows)
    for name, array in found.items():
        assert array.dtype == rows[name].dtype
        assert np.array_equal(array, rows[name][sample_ids])


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_rows_come_back_by_number(folder, rows):
    reader = ShardReader(folder)
    assert (len(reader), reader.row_length) == (100, ROW_LENGTH)
    assert reader.fields == ("ids", "length", "first_length", "next_sentence_label")
    for sample_ids in ([0], [99, 0, 50, 50], range(100), np.random.default_rng(0).permutation(100)):
        assert_equal_rows(reader.read(np.array(sample_ids)), rows, np.array(sample_ids))
    assert reader.read(np.array([], np.int64))["ids"].shape == (0, ROW_LENGTH)


@settings(max_examples=30)
@given(
    num_rows=st.integers(0, 40), seed=st.integers(0, 2**32), pieces=st.integers(1, 7),
    rows_per_block=st.integers(1, 9), blocks_per_shard=st.integers(1, 4), data=st.data(),
)  # fmt: skip
def test_any_rows_come_back(tmp_path_factory, num_rows, seed, pieces, rows_per_block, blocks_per_shard, data):
    rows = any_rows(num_rows, seed)
    folder = write_folder(tmp_path_factory.mktemp("any"), rows, pieces, rows_per_block, blocks_per_shard)
    reader = ShardReader(folder)
    reader.verify()
    assert len(reader) == num_rows
    sample_ids = data.draw(st.lists(st.integers(0, num_rows - 1), max_size=20)) if num_rows else []
    for chosen in (np.array(sample_ids, np.int64), np.arange(num_rows)):
        assert_equal_rows(reader.read(chosen), rows, chosen)
    rows_per_shard = rows_per_block * blocks_per_shard
    whole, rest = divmod(num_rows, rows_per_shard)
    index = ShardIndex.load(folder)
    assert list(reader.shard_sizes) == [shard.num_rows for shard in index.shards]
    assert [shard.num_rows for shard in index.shards] == [rows_per_shard] * whole + [rest] * (rest > 0)
    assert [shards.scan_shard(folder / shard.name, FIELDS) for shard in index.shards] == list(index.shards)


@st.composite
def damaged(draw, content):
    """`content` with one bit flipped, cut short, or with something behind it."""
    place, kind = draw(st.integers(0, len(content) - 1)), draw(st.sampled_from(["flip", "cut", "append"]))
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << draw(st.integers(0, 7))]) + content[place + 1 :]
    return content[:place] if kind == "cut" else content + draw(st.binary(min_size=1, max_size=20))


@settings(max_examples=100)
@given(data=st.data())
def test_no_damage_of_a_shard_is_overlooked(small_folder, data):
    path = data.draw(st.sampled_from(sorted(small_folder.glob("*.tar"))))
    content = path.read_bytes()
    path.write_bytes(data.draw(damaged(content)))
    try:
        with pytest.raises(CorruptShard) as caught:
            ShardReader(small_folder).verify()
    finally:
        path.write_bytes(content)
    (fault,) = caught.value.faults
    assert fault.startswith(f"{path}: ")


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_shard_is_never_scanned_as_the_whole_one(small_folder, data):
    path = data.draw(st.sampled_from(sorted(small_folder.glob("*.tar"))))
    content = path.read_bytes()
    record = shards.scan_shard(path, FIELDS)
    path.write_bytes(data.draw(damaged(content)))
    try:
        assert shards.scan_shard(path, FIELDS) != record
    except CorruptShard as error:
        assert all(fault.startswith(f"{path}: ") for fault in error.faults)
    finally:
        path.write_bytes(content)


def test_equal_rows_give_equal_bytes(tmp_path, rows):
    first, second = (write_folder(tmp_path / str(pieces), rows, pieces) for pieces in (1, 13))
    names = sorted(path.name for path in first.iterdir())
    assert names == ["index.json", *(f"train-000000-000{number}.tar" for number in range(5))]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    assert ShardReader(first).fingerprint == ShardReader(second).fingerprint


def test_the_fingerprint_follows_the_rows(tmp_path, rows):
    before = ShardReader(write_folder(tmp_path / "a", rows)).fingerprint
    rows["ids"][77, 3] ^= 1
    assert ShardReader(write_folder(tmp_path / "b", rows)).fingerprint != before


def test_webdataset_reads_the_shards(folder, rows):
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    names = [f"{name}.npy" for name in rows]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode(only=names))
    assert [sample["__key__"] for sample in samples[:4]] == [
        "train-000000-0000-00000",
        "train-000000-0000-00001",
        "train-000000-0000-00002",
        "train-000000-0001-00000",
    ]
    joined = {name: np.concatenate([sample[f"{name}.npy"] for sample in samples]) for name in rows}
    assert_equal_rows(joined, rows, np.arange(100))


def test_webdataset_takes_npy_for_a_whole_suffix(folder, rows):
    (url,) = [str(path) for path in folder.glob("*-0000.tar")]
    first = next(iter(webdataset.WebDataset(url, shardshuffle=False).decode(only=["npy"])))
    assert np.array_equal(np.load(io.BytesIO(first["ids.npy"])), rows["ids"][:8])
    first = next(iter(webdataset.WebDataset(url, shardshuffle=False).decode()))
    assert np.array_equal(first["ids.npy"], rows["ids"][:8])


def test_tars_say_nothing_of_who_wrote_them_and_when(folder):
    with tarfile.open(folder / "train-000000-0000.tar") as tar:
        members = tar.getmembers()
    assert len(members) == 3 * len(FIELDS)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "spikelm", "spikelm")}


def test_large_vocabularies_take_four_bytes(tmp_path):
    fields = row_fields("pairs", 4, shards.ids_dtype(70_000))
    writer = ShardWriter(tmp_path, "train", fields)
    rows = {field.name: np.ones(field.shape(3), field.dtype) for field in fields}
    rows["ids"][1, 2] = 69_999
    writer.write(rows)
    ShardIndex(4, "tokenizer", fields, tuple(writer.finish())).save(tmp_path)
    assert ShardReader(tmp_path).read(np.array([1]))["ids"].tolist() == [[1, 1, 69_999, 1]]
    assert shards.ids_dtype(65_536) == "uint16"


def test_rows_of_another_kind_are_not_written(tmp_path, rows):
    writer = ShardWriter(tmp_path, "train", FIELDS)
    with pytest.raises(ValueError, match=r"rows of ids: int64\[100, 16\], expected uint16\[100, 16\]"):
        writer.write({**rows, "ids": rows["ids"].astype(np.int64)})
    with pytest.raises(ValueError, match=r"rows of length: uint16\[99\], expected uint16\[100\]"):
        writer.write({**rows, "length": rows["length"][1:]})


def test_an_interrupted_writer_leaves_no_shard(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    writer = ShardWriter(tmp_path, "train", FIELDS)
    writer.write(rows)
    with pytest.raises(OSError, match="disk full"):
        writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_ids_outside_are_named(folder):
    with pytest.raises(IndexError, match="sample ids 5 to 100, but .* has rows 0 to 99"):
        ShardReader(folder).read(np.array([5, 100]))
    with pytest.raises(IndexError, match="sample ids -1 to -1"):
        ShardReader(folder).read(np.array([-1]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reader_works_in_other_processes(folder, rows, method):
    reader = ShardReader(folder)
    reader.read(np.arange(100))
    with get_context(method).Pool(1) as pool:
        found = pool.apply(reader.read, [np.arange(50, 100)])
    assert_equal_rows(found, rows, np.arange(50, 100))
    assert_equal_rows(reader.read(np.arange(7)), rows, np.arange(7))


def test_few_shards_stay_open(folder, rows, monkeypatch):
    monkeypatch.setattr(ShardReader, "open_shards", 2)
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(folder)
    order = np.random.default_rng(0).permutation(100)
    assert_equal_rows(reader.read(order), rows, order)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_shard_of_another_size_is_refused_when_opened(folder):
    path = folder / "train-000000-0002.tar"
    size = path.stat().st_size
    os.truncate(path, size - 512)
    reader = ShardReader(folder)
    reader.read(np.arange(48))
    with pytest.raises(CorruptShard, match=rf"0002\.tar: {size - 512} bytes, expected {size}; copy the file again"):
        reader.read(np.array([48]))
    path.unlink()
    with pytest.raises(CorruptShard, match=rf"0002\.tar: missing, expected {size} bytes"):
        reader.read(np.array([48]))


def test_a_shard_that_shrinks_while_open_is_a_named_error(folder):
    reader = ShardReader(folder)
    reader.read(np.array([99]))
    os.truncate(folder / "train-000000-0004.tar", 1024)
    with pytest.raises(CorruptShard, match=r"0004\.tar: \d+ bytes at offset \d+, expected \d+"):
        reader.read(np.array([99]))


def test_what_a_read_leaves_out_is_read_after_it(folder, monkeypatch):
    """As a network file system may do, or a signal."""
    whole, pread = ShardReader(folder).read(np.arange(100)), os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 5), offset))
    rows = ShardReader(folder).read(np.arange(100))
    assert all(np.array_equal(rows[name], whole[name]) for name in whole)


def test_verify_finds_every_fault(folder):
    reader = ShardReader(folder)
    reader.verify()
    flip(folder / "train-000000-0000.tar", 1000)
    os.truncate(folder / "train-000000-0001.tar", 4096)
    (folder / "train-000000-0002.tar").unlink()
    (folder / "train-000000-0009.tar").write_bytes(b"")
    with pytest.raises(CorruptShard) as caught:
        reader.verify()
    assert len(caught.value.faults) == 4
    for name, fault in zip(("0000", "0001", "0002", "0009"), caught.value.faults, strict=True):
        assert f"train-000000-{name}.tar: " in fault
    assert "xxh3_128" in caught.value.faults[0]
    assert "missing" in caught.value.faults[2]
    assert "not in index.json" in caught.value.faults[3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-000000-0000-00000.ids.pyd", b"cos\nsystem\n(S'true'\ntR.", "holds 'train-000000-0000-00000.ids.pyd'"),
        ("../escape.npy", b"", r"holds '\.\./escape\.npy'"),
        ("train-000000-0000-00000.ids.npy", b"not an array", "is no .npy array"),
        ("train-000000-0000-00000.ids.npy", np.zeros((8, 15), np.uint16), r"is uint16\[8, 15\]"),
        ("train-000000-0000-00000.ids.npy", np.zeros((8, 16), np.int16), r"is int16\[8, 16\]"),
        ("train-000000-0000-00000.ids.npy", np.zeros((8, 16), np.uint16), "the last block lacks members"),
    ],
)
def test_scan_refuses_what_is_not_ours(tmp_path, name, content, message):
    if isinstance(content, np.ndarray):
        buffer = io.BytesIO()
        np.save(buffer, content)
        content = buffer.getvalue()
    path = tmp_path / "train-000000-0000.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    with pytest.raises(CorruptShard, match=message):
        shards.scan_shard(path, FIELDS)


def test_scan_gives_what_the_writer_recorded(folder):
    index = ShardIndex.load(folder)
    assert [shards.scan_shard(folder / shard.name, FIELDS) for shard in index.shards] == list(index.shards)


def break_index(folder, **changes):
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**content, **changes}))


def test_a_broken_index_is_refused(folder):
    first = asdict(ShardIndex.load(folder).shards[0])
    *_, run = first["runs"]
    last = (run["blocks"] - 1) * run["stride"]
    end = max(run["offsets"][field.name] + last + run["rows"] * field.row_bytes for field in FIELDS)

    def with_run(**changes):
        return [{**first, "runs": [{**run, **changes}]}]

    break_index(folder, shards=[{**first, "bytes": end}])
    assert len(ShardReader(folder)) == 24
    for changes, message in [
        ({"version": 1}, "version 1, expected 2"),
        ({"version": 2, "row_length": "x"}, "row_length: Input should be a valid integer"),
        ({"row_length": 16, "shards": [{**first, "name": "../x.tar"}]}, "no name of a shard"),
        ({"shards": with_run(offsets={"ids": 512})}, "block offsets of ids, expected ids, length"),
        ({"shards": with_run(rows=0)}, "shards.0.runs.0.rows: Input should be greater than 0"),
        ({"shards": with_run(stride=0)}, "blocks of 8 rows every 0 bytes, which is too little"),
        ({"shards": with_run(blocks=1 << 70)}, r"has 8 rows of \w+ at [0-9]{20}"),
        ({"shards": [{**first, "bytes": 1 << 63}]}, "shards.0.bytes: Input should be less than"),
        ({"shards": [{**first, "bytes": end - 1}]}, rf"has 8 rows of \w+ at \d+, but {end - 1} bytes"),
        ({"shards": [], "row_length": 15}, "row_length 15, but ids of 16"),
        ({"row_length": 16, "fields": []}, "row_length 16, but ids of None"),
        ({"fields": [{"name": "ids", "dtype": "uint16", "width": -1}]}, "fields.0.width: Input should be greater"),
    ]:
        break_index(folder, **changes)
        with pytest.raises(CorruptShard, match=f"index.json.*{message}"):
            ShardReader(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(CorruptShard, match="cannot be read as JSON"):
        ShardReader(folder)
    (folder / "index.json").unlink()
    with pytest.raises(CorruptShard, match="is .* a finished folder of shards"):
        ShardReader(folder)


def test_an_index_without_shards_is_an_empty_reader(tmp_path):
    ShardIndex(ROW_LENGTH, "tokenizer", FIELDS, ()).save(tmp_path)
    assert len(ShardReader(tmp_path)) == 0
    ShardReader(tmp_path).verify()
