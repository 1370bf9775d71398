import copy
import json
import shutil
from dataclasses import asdict, astuple, fields, replace
from functools import reduce
from operator import getitem

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.block_runs import BlockRun
from data_prep.manifest import (
    SPLITS,
    Counts,
    Manifest,
    SourceCounts,
    Tally,
    UnitRecord,
    check_folder,
    rebuild_indexes,
    verify,
)
from data_prep.origin import InputRecord, Origin, record_input
from data_prep.shards import CorruptShard, ShardIndex, ShardReader, ShardRecord, ShardWriter
from data_prep.tokenization import load_tokenizer

ROWS = {"layout": "pairs", "row_length": 8}
ORIGIN = Origin({**ROWS, "seed": 0}, (InputRecord("a.txt", 1, 10, "aa"), InputRecord("b.txt", 1, 20, "bb")))
PLAN = Manifest(ORIGIN, tokenizer_fingerprint="t", vocab_size=100)


names = st.text(max_size=9)
sizes = st.integers(0, 2**53)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | names
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6
)
counts = st.builds(Counts, *[sizes] * 6)
tallies = st.dictionaries(names, st.builds(Tally, sizes, sizes), max_size=2)
sources = st.builds(SourceCounts, st.builds(Tally, sizes, sizes), tallies, tallies)
lengths = st.lists(sizes, max_size=3).map(tuple)
manifests = st.builds(
    Manifest,
    origin=st.builds(
        Origin,
        settings=st.dictionaries(names, trees, max_size=4).map(lambda given: {**given, **ROWS}),
        inputs=st.lists(st.builds(InputRecord, names, sizes, sizes, names), max_size=3).map(tuple),
    ),
    tokenizer_fingerprint=names,
    vocab_size=sizes,
    counts=st.dictionaries(names, counts, max_size=2),
    indexes=st.dictionaries(names, names, max_size=2),
    sources=st.lists(sources, max_size=2).map(tuple),
    lengths=lengths,
)
units = st.builds(
    UnitRecord,
    counts=st.fixed_dictionaries(dict.fromkeys(SPLITS, counts)),
    shards=st.just(dict.fromkeys(SPLITS, ())),
    source=sources,
    lengths=lengths,
)


@pytest.fixture
def root(tiny_shards, tmp_path):
    """A copy of the tiny shards to break."""
    return shutil.copytree(tiny_shards, tmp_path / "shards")


def test_a_manifest_comes_back(tmp_path):
    manifest = replace(PLAN, counts={"train": Counts(1, 2, 3)}, indexes={"train": "x"})
    manifest.save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path) == manifest
    assert manifest.row_length == 8
    assert [field.name for field in manifest.fields] == ["ids", "length", "first_length", "next_sentence_label"]


@settings(max_examples=60)
@given(manifest=manifests)
def test_any_manifest_comes_back(tmp_path_factory, manifest):
    path = tmp_path_factory.getbasetemp() / "any.json"
    manifest.save(path)
    assert Manifest.load_file(path) == manifest
    assert manifest.origin.differences(Manifest.load_file(path).origin) == []


def places(content, place=()):
    """The way to every part of `content`, of the types of JSON, and to the whole."""
    yield place
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, part in parts:
        yield from places(part, (*place, key))


@st.composite
def edited(draw, content, values=trees):
    """`content` with one part of it left out or replaced by one of `values`."""
    content = copy.deepcopy(content)
    place = draw(st.sampled_from(list(places(content))))
    if not place:
        return draw(values)
    *outer, last = place
    inside = reduce(getitem, outer, content)
    if draw(st.integers(0, 4)) == 0:
        del inside[last]
    else:
        inside[last] = draw(values)
    return content


def load_index(path):
    return ShardIndex.load(path.parent)


RUNS = [BlockRun(2, 3, 512, {field.name: 128 for field in PLAN.fields})]
SHARD = ShardRecord("train-000000-0000.tar", 1024, "aa", RUNS)
RECORDS = [
    (Manifest.load_file, "manifest.json", replace(PLAN, counts={"train": Counts(1, 2)}, indexes={"train": "x"})),
    (
        UnitRecord.load,
        "unit-000000.json",
        UnitRecord({"train": Counts(1, 2)}, {"train": (SHARD,)}, SourceCounts(Tally(3)), (1,)),
    ),
    (load_index, "index.json", PLAN.index([SHARD])),
]


@pytest.mark.parametrize(("load", "name", "record"), RECORDS, ids=[name for _, name, _ in RECORDS])
@settings(max_examples=150)
@given(data=st.data())
def test_an_edited_record_loads_or_is_refused_by_name(tmp_path_factory, load, name, record, data):
    path = tmp_path_factory.getbasetemp() / name
    whole = json.dumps(asdict(record))
    texts = edited(json.loads(whole)).map(json.dumps) | st.integers(0, len(whole)).map(lambda end: whole[:end])
    path.write_bytes(data.draw(texts.map(str.encode) | st.binary()))
    try:
        found = load(path)
    except ValueError as error:
        assert all(str(path) in line for line in str(error).splitlines())
    else:
        path.write_text(json.dumps(asdict(found)))
        assert load(path) == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "manifest.json: version 1, expected 4"),
        ({"vocab_size": "many"}, "vocab_size: Input should be a valid integer"),
        ({"surprise": 1}, "surprise: Unexpected keyword argument"),
        ({"a\x1eb": 1}, r"json: 'a\\x1eb': Unexpected keyword argument"),  # which would end a line
        ({"version": "\x1e"}, r"version '\\x1e', expected 4"),
        ({"origin": {"settings": {}}}, "origin.inputs: Field required"),
        ({"origin": {"settings": {}, "inputs": []}}, r"manifest.json: origin\.settings\.row_length is None"),
        ({"origin": {"settings": {"row_length": True}, "inputs": []}}, "row_length is True"),
        ({"origin": {"settings": {"row_length": 0}, "inputs": []}}, "row_length is 0"),
        (
            {"origin": {"settings": {**ROWS, "layout": "x"}, "inputs": []}},
            "layout is 'x', expected pairs or cau",
        ),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path, changes, message):
    (tmp_path / "manifest.json").write_text(json.dumps({**asdict(PLAN), **changes}))
    with pytest.raises(ValueError, match=message):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"version": 3, "origin": ' * 5000], ids=["list", "object"])
def test_json_nested_too_deep_is_refused_by_name(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="manifest.json cannot be read as JSON"):
        Manifest.load(tmp_path)


def test_a_missing_manifest_names_the_command(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist: build the shards by python -m data_prep\.build_shards"):
        Manifest.load(tmp_path)


def test_counts_of_units_are_merged():
    shards = {"train": (), "heldout": ()}
    dropped = {"empty": Tally(1, 2)}
    records = [
        UnitRecord({"train": Counts(1, 2, 3, 0, 4, 5), "heldout": Counts()}, shards, SourceCounts(Tally(1, 9)), (1,)),
        UnitRecord(
            {"train": Counts(10, 20, 30, 1, 40, 50), "heldout": Counts(1)},
            shards,
            SourceCounts(Tally(2, 8), dropped, {"train": Tally(1, 6)}),
            (1, 0, 7),
        ),
        UnitRecord({"train": Counts(), "heldout": Counts()}, shards, SourceCounts(Tally(3, 7), dropped)),
    ]
    merged = PLAN.completed(records, [1, 0, 0], {"train": PLAN.index(())})
    assert merged.counts == {"train": Counts(11, 22, 33, 1, 44, 55), "heldout": Counts(1)}
    assert merged.sources == (
        SourceCounts(Tally(5, 15), {"empty": Tally(2, 4)}, {"train": Tally(1, 6)}),
        SourceCounts(Tally(1, 9)),
    )
    assert merged.lengths == (2, 0, 7)
    assert merged.origin == PLAN.origin


@settings(max_examples=40)
@given(records=st.lists(units, max_size=6), data=st.data())
def test_counts_merge_alike_in_any_order_and_any_groups(records, data):
    def merged(parts):
        return PLAN.completed(parts, [0] * len(parts), {})

    def numbers(manifest):
        lengths = [*manifest.lengths, 0, 0, 0][:3]
        return [manifest.sources[0], lengths, *(astuple(manifest.counts[split]) for split in SPLITS)]

    expected = [
        reduce(SourceCounts.__add__, (record.source for record in records), SourceCounts()),
        [sum(([*record.lengths, 0, 0, 0])[power] for record in records) for power in range(3)],
    ]
    for split in SPLITS:
        expected.append(
            tuple(sum(astuple(record.counts[split])[item] for record in records) for item in range(len(fields(Counts))))
        )
    shuffled = data.draw(st.permutations(records))
    cut = data.draw(st.integers(0, len(records)))
    parts = [merged(part) for part in (shuffled[:cut], shuffled[cut:])]
    groups = [UnitRecord(part.counts, dict.fromkeys(SPLITS, ()), part.sources[0], part.lengths) for part in parts]
    for together in (records, shuffled, groups):
        assert numbers(merged(together)) == expected


def test_unit_records_come_back(tmp_path):
    record = UnitRecord({"train": Counts(1)}, {"train": ()}, SourceCounts(Tally(1), {"empty": Tally(2)}), (0, 1))
    record.save(tmp_path / "unit.json")
    assert UnitRecord.load(tmp_path / "unit.json") == record


def test_differences_are_named_and_moves_are_none():
    moved = Origin(ORIGIN.settings, tuple(replace(item, name=f"/else/{item.name}") for item in ORIGIN.inputs))
    assert moved.differences(ORIGIN) == []
    other = replace(moved, inputs=(replace(ORIGIN.inputs[0], name="a.csv"), *ORIGIN.inputs[1:]))
    (line,) = other.differences(ORIGIN)
    assert line.startswith("input a.csv: read by its name, which was ")
    other = Origin({"layout": "pairs", "row_length": 16, "new": 1}, (replace(ORIGIN.inputs[0], xxh3_128="cc"),))
    assert other.differences(ORIGIN) == [
        "new: 1, was None",
        "row_length: 16, was 8",
        "seed: None, was 0",
        "input: 1 inputs, were 2",
        "input a.txt: 1 file(s) of 10 bytes with hash cc, was 1 file(s) of 10 bytes with hash aa",
    ]


def test_the_record_of_a_folder_follows_names_and_contents(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    before = record_input(str(tmp_path))
    assert (before.files, before.bytes) == (2, 10)
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    assert record_input(str(tmp_path)).xxh3_128 != before.xxh3_128
    (tmp_path / "c.txt").rename(tmp_path / "b.txt")
    assert record_input(str(tmp_path)) == before
    assert record_input(str(tmp_path / "a.txt")).files == 1


def test_real_shards_are_sound_and_complete(tiny_shards):
    assert verify(tiny_shards) == []
    manifest = Manifest.load(tiny_shards)
    (source,) = manifest.sources
    assert source.read.documents == 106
    assert sum((*source.dropped.values(), *source.kept.values()), Tally()) == source.read
    for split, counts in manifest.counts.items():
        assert source.kept[split] == Tally(counts.documents, counts.bytes)
    for split in ("train", "heldout"):
        reader, counts = ShardReader(tiny_shards / split), manifest.counts[split]
        assert (len(reader), reader.fingerprint) == (counts.rows, manifest.indexes[split])
        rows = reader.read(np.arange(len(reader)))
        assert rows["length"].sum(dtype=int) == counts.row_tokens
        assert rows["ids"].max() < manifest.vocab_size
        # Documents' own tokens: A always, B where it follows A.
        own = np.where(rows["next_sentence_label"] == 0, rows["length"] - 3, rows["first_length"] - 2)
        assert own.sum(dtype=int) == counts.tokens


def test_real_rows_are_english(tiny_shards):
    tokenizer = load_tokenizer(tiny_shards / "tokenizer")
    rows = ShardReader(tiny_shards / "train").read(np.arange(3))
    text = tokenizer.decode(rows["ids"].ravel().tolist(), skip_special_tokens=True)
    assert text.startswith("Anarchism is a political philosophy that advocates")


def test_verify_names_every_fault(root):
    manifest = Manifest.load(root)
    replace(manifest, tokenizer_fingerprint="other", indexes={**manifest.indexes, "train": "other"}).save(
        root / "manifest.json"
    )
    (root / "heldout" / "index.json").unlink()
    faults = verify(root)
    assert [fault.partition(": ")[2].partition(",")[0] for fault in faults[:3]] == [
        f"fingerprint {manifest.tokenizer_fingerprint}",
        f"index fingerprint {manifest.indexes['train']}",
        f"tokenizer {manifest.tokenizer_fingerprint}",
    ]
    assert "heldout/index.json does not exist" in faults[3]
    shutil.rmtree(root / "tokenizer")
    assert "tokenizer does not exist" in verify(root)[0]


@pytest.fixture(scope="module")
def whole(tiny_shards, tmp_path_factory):
    """A copy of the tiny shards for examples that mend what they broke."""
    return shutil.copytree(tiny_shards, tmp_path_factory.mktemp("whole") / "shards")


@settings(max_examples=100)
@given(data=st.data())
def test_an_edited_index_is_found(whole, data):
    path = whole / data.draw(st.sampled_from(SPLITS)) / "index.json"
    text = path.read_text()
    index = ShardIndex.load(path.parent)
    path.write_text(json.dumps(data.draw(edited(json.loads(text), values=st.integers(-(2**70), 2**70) | names))))
    try:
        if faults := verify(whole):
            assert all(str(path.parent) in fault for fault in faults)
            with pytest.raises(CorruptShard):
                check_folder(whole)
        else:
            assert ShardIndex.load(path.parent) == index
            check_folder(whole)
    finally:
        path.write_text(text)


@settings(max_examples=200)
@given(data=st.data())
def test_an_edited_index_misleads_no_reader_into_another_error(whole, data):
    folder = whole / "heldout"
    text = (folder / "index.json").read_text()
    values = st.integers(-(2**70), 2**70) | st.integers(-9, 9) | names
    (folder / "index.json").write_text(json.dumps(data.draw(edited(json.loads(text), values))))
    try:
        reader = ShardReader(folder)
        assert reader.row_length == ShardIndex.load(folder).fields[0].width
        reader.read(np.arange(len(reader))[:100])
    except CorruptShard as error:
        assert all(str(folder) in fault for fault in error.faults)
    finally:
        (folder / "index.json").write_text(text)


def test_a_whole_folder_passes_the_check_and_gives_its_manifest(root):
    assert check_folder(str(root)) == Manifest.load(root)
    with pytest.raises(ValueError, match=r"manifest\.json does not exist"):
        check_folder(root / "train")


def test_the_check_names_every_fault_but_reads_no_row(root):
    paths = [next((root / split).glob("*.tar")) for split in ("train", "heldout")]
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1])
    index = ShardIndex.load(root / "heldout")
    replace(index, shards=(*index.shards, index.shards[0])).save(root / "heldout")
    (root / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(CorruptShard) as caught:
        check_folder(root)
    faults = caught.value.faults
    assert len(faults) == 6  # the heldout shard stands in its index twice
    assert f"{root / 'tokenizer'} holds no tokenizer" in faults[0]
    assert faults[1].startswith(f"{paths[0]}: ") and "expected" in faults[1]
    assert faults[2].startswith(f"{root / 'heldout'}: index fingerprint")
    assert faults[3].startswith(f"{root / 'heldout'}: rows")
    assert faults[4].startswith(f"{paths[1]}: ")
    assert all("copy the file again" in fault or "build the shards anew" in fault for fault in faults)


def test_the_check_knows_another_tokenizer(root):
    settings = json.loads((root / "tokenizer" / "tokenizer.json").read_text())
    settings["normalizer"] = {"type": "Lowercase"}
    (root / "tokenizer" / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(CorruptShard, match=rf"{root / 'tokenizer'}: fingerprint .* build the shards anew"):
        check_folder(root)


def test_a_shard_whose_header_is_no_python_is_named_when_indexes_are_rebuilt(root):
    path = next((root / "heldout").glob("*.tar"))
    path.write_bytes(path.read_bytes().replace(b", 32), }", b", 32(, }", 1))
    (fault,) = rebuild_indexes(root)
    assert fault.startswith(f"{path}: ")


def test_lost_indexes_are_rebuilt(root):
    before = {split: (root / split / "index.json").read_bytes() for split in ("train", "heldout")}
    for split in before:
        (root / split / "index.json").unlink()
    assert rebuild_indexes(root) == []
    assert {split: (root / split / "index.json").read_bytes() for split in before} == before


def test_rebuilt_indexes_go_by_number_not_by_name(tmp_path, pair_rows):
    records = []
    for split, units in (("train", (999_999, 1_000_000)), ("heldout", (0,))):
        (tmp_path / split).mkdir()
        for unit in units:
            writer = ShardWriter(tmp_path / split, f"{split}-{unit:06d}", PLAN.fields)
            writer.write(pair_rows(5, 8, seed=unit))
            records.append((split, writer.finish()[0]))
    indexes = {split: PLAN.index(shard for where, shard in records if where == split) for split in SPLITS}
    PLAN.completed((), (), indexes).save(tmp_path / "manifest.json")
    assert rebuild_indexes(tmp_path) == []
    assert ShardIndex.load(tmp_path / "train") == indexes["train"]


def test_no_index_is_made_of_other_shards(root):
    (root / "train" / "index.json").unlink()
    next((root / "train").glob("*-0001.tar")).unlink()
    next((root / "heldout").glob("*.tar")).write_bytes(b"no tar")
    first, second = rebuild_indexes(root)
    assert "train: a shard is missing, changed or too many" in first
    assert "not a whole tar file" in second
    assert not (root / "train" / "index.json").exists()
