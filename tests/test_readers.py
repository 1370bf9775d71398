"""CSV, compressed lines, tables and tars: the same documents from every form, whole or named, never lost in silence."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from data_prep import documents
from data_prep.documents import SourceError
from data_prep.origin import record_input
from data_prep.sources import input_files, plan_units, read_unit
from data_prep.tables import ROWS_AT_ONCE

TEXTS = [f'Zeile {number}: "é", und\neine zweite; 日本' for number in range(600)]


def read(path, skipped=None, **options):
    units = plan_units([str(path)], **options)
    documents = [document for unit in units for document in read_unit(unit, skipped)]
    assert len({document.id for document in documents}) == len(documents)
    return [document.text for document in documents]


def records(texts=TEXTS):
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def write_csv(path, delimiter):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([["id", "text"], *enumerate(TEXTS)])


def write_zst(path, content):
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))


def members(texts=TEXTS):
    """Every other sample a .txt or a .json, with members between that are not read, least of all unpickled."""
    for number, text in enumerate(texts):
        raw = text.encode() if number % 2 else json.dumps({"text": text}).encode()
        yield f"folder/{number:05d}.{'txt' if number % 2 else 'json'}", raw
        yield f"folder/{number:05d}.pyd", b"cos\nsystem\n(S'false'\ntR."


def write(path):
    """TEXTS in the form that the name asks for."""
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    match path.name.split(".", 1)[1]:
        case "csv":
            write_csv(path, ",")
        case "tsv":
            write_csv(path, "\t")
        case "jsonl.gz":
            path.write_bytes(gzip.compress(records(TEXTS[:300])) + gzip.compress(records(TEXTS[300:])))
        case "json.zst":
            write_zst(path, records())
        case "parquet":
            pq.write_table(table, path, row_group_size=70)
        case "arrow":
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=50)
        case "tar":
            write_tar(path, members())
        case "tar.gz":
            write_tar(path, members(), "w:gz")
    return path


FORMS = ["a.csv", "a.tsv", "a.jsonl.gz", "a.json.zst", "a.parquet", "a.arrow", "a.tar", "a.tar.gz"]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_documents(tmp_path, name):
    path = write(tmp_path / name)
    for unit_bytes in (1000, 10**7):
        assert read(path, unit_bytes=unit_bytes) == TEXTS
    assert record_input(str(path)).bytes == path.stat().st_size


def test_tables_are_cut_into_units(tmp_path):
    for name in ("a.parquet", "a.arrow"):
        units = plan_units([str(write(tmp_path / name))], unit_bytes=5000)
        assert len(units) > 3
        assert [unit.start for unit in units[1:]] == [unit.stop for unit in units[:-1]]
        assert (units[0].start, units[-1].stop) == (0, len(TEXTS))


def test_folders_that_datasets_saved(tmp_path):
    rows = Dataset.from_dict({"text": TEXTS, "label": list(range(len(TEXTS)))})
    rows.save_to_disk(tmp_path / "one", num_shards=3)
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"what map() leaves there")
    assert len(input_files(str(tmp_path / "one"))) == 3
    assert read(tmp_path / "one") == read(tmp_path / "one", unit_bytes=4000) == TEXTS
    DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(tmp_path / "two")
    with pytest.raises(SourceError, match="it holds several splits: name .*two/train or .*two/test"):
        plan_units([str(tmp_path / "two")])
    assert read(tmp_path / "two" / "test") == TEXTS[:3]


def test_documents_of_one_input_have_names_of_their_own(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("text")
        (tmp_path / folder / "y.jsonl").write_bytes(records(TEXTS[:2]))
    units = plan_units([str(tmp_path), str(tmp_path / "a" / "y.jsonl")])
    found = [(unit.source, document.id) for unit in units for document in read_unit(unit)]
    in_folder = ["a/x.txt", "b/x.txt", "a/y.jsonl:0", "a/y.jsonl:73", "b/y.jsonl:0", "b/y.jsonl:73"]
    assert found == [*[(0, name) for name in in_folder], (1, "y.jsonl:0"), (1, "y.jsonl:73")]


def spoil(raw, number):
    """One byte turned over, so that no checksum holds."""
    return raw[:number] + bytes([raw[number] ^ 0xFF]) + raw[number + 1 :]


BROKEN = [
    ("a.jsonl.gz", lambda raw: raw[:-20], "broken gzip", r"a\.jsonl\.gz: broken gzip: .*: fetch the file again"),
    ("a.jsonl.gz", lambda raw: spoil(raw, 300), "broken gzip", "broken gzip"),
    ("a.json.zst", lambda raw: raw[:-20], "broken zstd", "broken zstd"),
    ("a.json.zst", lambda raw: spoil(raw, 2), "broken zstd", "broken zstd"),
    ("a.tar", lambda raw: raw[:100_000], "broken tar", r"a\.tar: broken tar: unexpected end of data: fetch the file"),
    ("a.tar", lambda raw: raw[:102_400], "broken tar", "broken tar: .*empty header"),
    ("a.tar", lambda raw: spoil(raw, 102_500), "broken tar", r"broken tar: .* at byte 102400"),
    ("a.tar.gz", lambda raw: raw[:-300], "broken tar", "broken tar"),
    (
        "a.csv",
        lambda raw: raw.replace(b"\xc3\xa9", b"\xe9", 1),
        "invalid UTF-8",
        r"row 1 \(lines 2 to 3\): invalid UTF-8",
    ),
    (
        "a.csv",
        lambda raw: raw + b"1,2,3\r\n",
        "not CSV",
        r"row 601 .*: not CSV: 3 cells, but 2 columns: mend or remove",
    ),
    ("a.csv", lambda raw: raw + b'1,"2"3\r\n', "not CSV", "row 601 .*: not CSV: "),
]


@pytest.mark.parametrize(("name", "change", "reason", "message"), BROKEN)
def test_broken_files_are_named_or_counted(tmp_path, name, change, reason, message):
    path = write(tmp_path / name)
    path.write_bytes(change(path.read_bytes()))
    skipped = Counter()
    texts = read(path, skipped)
    assert skipped == {reason: 1} and set(texts) < set(TEXTS) or name.endswith("csv") and len(texts) >= 599
    with pytest.raises(SourceError, match=message):
        read(path)


def test_broken_tables_are_named_or_counted_by_rows(tmp_path):
    path = write(tmp_path / "a.parquet")
    raw = path.read_bytes()
    path.write_bytes(raw[:-30])
    with pytest.raises(SourceError, match=r"a\.parquet: broken table: .*: fetch the file again"):
        plan_units([str(path)])
    middle = pq.ParquetFile(io.BytesIO(raw)).metadata.row_group(4).column(1).data_page_offset
    path.write_bytes(raw[:middle] + b"\xff" * 40 + raw[middle + 40 :])
    skipped = Counter()
    texts = read(path, skipped, unit_bytes=1000)
    assert texts == TEXTS[:280] + TEXTS[350:] and skipped == {"broken table": 70}
    with pytest.raises(SourceError, match="broken table: rows 280 to 349 cannot be read: "):
        read(path, unit_bytes=1000)
    arrow = write(tmp_path / "c.arrow")
    arrow.write_bytes(arrow.read_bytes().replace(b"Zeile 301", b"\xff" * 9))
    skipped = Counter()
    assert read(arrow, skipped) == TEXTS[:301] + TEXTS[302:] and skipped == {"invalid UTF-8": 1}
    raw = arrow.read_bytes()
    place = raw.index(np.cumsum([0, *(len(text.encode()) for text in TEXTS[50:53])], dtype=np.int32).tobytes())
    arrow.write_bytes(raw[: place + 4] + b"\xff\xff\xff\x7f" + raw[place + 8 :])
    with pytest.raises(SourceError, match=r"c\.arrow: broken table: rows 0 to 599 cannot be read: "):
        read(arrow)


@pytest.mark.parametrize("name", ["b.parquet", "b.arrow"])
def test_a_table_that_cannot_be_planned_is_counted_where_broken_content_is(tmp_path, name):
    write(tmp_path / f"a.{name[2:]}")
    (tmp_path / name).write_bytes(b"no table at all")
    with pytest.raises(SourceError, match=rf"{name}: broken table: .*: fetch the file again"):
        plan_units([str(tmp_path)])
    units = plan_units([str(tmp_path)], skips_broken=True)
    skipped = Counter()
    assert [document.text for unit in units for document in read_unit(unit, skipped)] == TEXTS
    assert skipped == {"broken table": 1}


@pytest.mark.parametrize("name", FORMS)
def test_units_share_the_bytes_of_their_files(tmp_path, name):
    path = write(tmp_path / name)
    for unit_bytes in (1000, 10**7):
        units = plan_units([str(path)], unit_bytes=unit_bytes)
        assert sum(unit.num_bytes for unit in units) == path.stat().st_size
        assert min(unit.num_bytes for unit in units) > 0


@pytest.mark.parametrize("state", ["{}", "[]", '{"_data_files": [{}]}'])
def test_a_saved_folder_without_its_list_of_files_is_named(tmp_path, state):
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path)
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(SourceError, match=r"state\.json lists no files \(_data_files\): fetch the folder again"):
        input_files(str(tmp_path))


def test_a_saved_folder_that_lacks_a_file_is_named(tmp_path):
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path, num_shards=2)
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(SourceError, match=r"00001-of-00002\.arrow does not exist, but state\.json lists it"):
        input_files(str(tmp_path))


def test_cells_without_text_are_named_or_counted(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", None, "three"]}), path)
    skipped = Counter()
    assert read(path, skipped) == ["one", "three"]
    assert skipped == {"field 'text' is not text": 1}
    with pytest.raises(SourceError, match=r"a\.parquet: row 1: field 'text' is not text but NoneType"):
        read(path)
    raw = pa.StringArray.from_buffers(1, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff"))
    pq.write_table(pa.table({"text": raw}), path)
    with pytest.raises(SourceError, match="row 0: invalid UTF-8"):
        read(path)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.arrow"])
def test_a_column_that_is_not_there_is_an_error_always(tmp_path, name):
    with pytest.raises(SourceError, match="no column 'body', only 'id', 'text'; set text_field"):
        read(write(tmp_path / name), Counter(), text_field="body")


def test_a_tar_without_texts_or_with_two_of_a_name_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("2.txt.bak", b"x")])
    with pytest.raises(SourceError, match=r"a\.tar: no member is \.txt or \.json"):
        read(tmp_path / "a.tar", Counter())
    write_tar(tmp_path / "b.tar", [("1.txt", b"x"), ("1.txt", b"y"), ("1.json", b"{}"), ("2.txt", b"z")])
    with pytest.raises(SourceError, match=r"b\.tar: 1\.txt: repeated name: .* rename or remove one"):
        read(tmp_path / "b.tar")
    skipped = Counter()
    assert read(tmp_path / "b.tar", skipped) == ["x", "z"] and skipped == {"repeated name": 1}
    write_tar(tmp_path / "c.tar", [("1.json", b'{"body": "x"}'), ("1.txt", b"y"), ("2.json", b"{")])
    skipped = Counter()
    assert read(tmp_path / "c.tar", skipped) == ["y"] and skipped == {"not JSON": 1}


def test_rows_that_an_open_quote_takes_up_are_not_a_text(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('id\ttext\n1\t"He said hi\n2\tok\n3\tand she left"\n4\t"two\nlines"\n5\tthe end\n')
    with pytest.raises(SourceError, match=r"a\.tsv: row 1 .lines 2 to 4.: quote over several rows"):
        read(path)
    skipped = Counter()
    assert read(path, skipped) == ["two\nlines", "the end"] and skipped == {"quote over several rows": 3}


def test_texts_in_a_tar_whose_names_have_several_dots_are_named_or_counted(tmp_path):
    members = [
        ("1.txt", b"one"),
        ("1.note.JSON", b"{}"),
        ("U.S. law.txt", b"law"),
        ("2.x.bin", b""),
        ("v.1/2.txt", b"2"),
    ]
    write_tar(tmp_path / "a.tar", members)
    skipped = Counter()
    assert read(tmp_path / "a.tar", skipped) == ["one", "2"]
    assert skipped == {"name with several dots": 2}
    with pytest.raises(SourceError, match=r"a\.tar: 1\.note\.JSON: name with several dots: leave one, before txt or"):
        read(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.csv", "a.tar"])
def test_what_is_too_long_is_never_held(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 3000)
    path, long = tmp_path / name, "x" * 50_000
    texts = ["first", long, "last"]
    content = {
        "a.txt": long.encode(),
        "a.jsonl": records(texts),
        "a.jsonl.gz": gzip.compress(records(texts)),
        "a.csv": "\n".join(["text", *texts]).encode(),
    }
    if name in content:
        path.write_bytes(content[name])
    else:
        write_tar(path, [(f"{number}.txt", text.encode()) for number, text in enumerate(texts)])
    for unit_bytes in (100, 10**6):
        skipped = Counter()
        assert read(path, skipped, unit_bytes=unit_bytes) == ([] if name == "a.txt" else ["first", "last"])
        assert skipped == {"too long": 1}
        with pytest.raises(SourceError, match=rf"{name}.*: too long: more than 3000 bytes: cut it"):
            read(path, unit_bytes=unit_bytes)


def test_files_that_are_empty_gone_or_shut_are_named_or_counted(tmp_path, monkeypatch):
    for name in ("a.jsonl", "b.csv", "c.xml", "d.parquet", "e.tar", "f.txt"):
        (tmp_path / name).touch()
    (tmp_path / "g.txt").write_text("text")
    skipped = Counter()
    assert read(tmp_path, skipped) == ["", "text"] and skipped == {"empty file": 5}
    with pytest.raises(SourceError, match=r"a\.jsonl: empty file: leave it out, or fetch it again"):
        read(tmp_path)
    path = write(tmp_path / "h.csv")
    units = plan_units([str(path)])
    path.unlink()
    with pytest.raises(
        SourceError, match=r"h\.csv: unreadable file: No such file .*: make it readable, or leave it out"
    ):
        list(read_unit(units[0]))
    with pytest.raises(SourceError, match=r"folder .*: Permission denied: make it readable, or leave it out"):
        monkeypatch.setattr(
            os, "scandir", lambda place: (_ for _ in ()).throw(PermissionError(13, "Permission denied", place))
        )
        input_files(str(tmp_path))


def test_datasets_is_imported_only_where_it_is_needed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(records(TEXTS[:2]))
    script = (
        "import sys\nfrom data_prep.sources import plan_units, read_unit\n"
        f"assert len([*read_unit(plan_units([{str(tmp_path / 'a.jsonl')!r}])[0])]) == 2\n"
        "assert not {'datasets', 'pyarrow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], check=True)
    assert len(TEXTS) > ROWS_AT_ONCE  # so that these tests read several slices


def test_rows_that_an_open_quote_swallows_are_counted(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufefftext,n\nfine,1\n"open,2\n' + "row,3\n" * 40, encoding="utf-8")
    skipped = Counter()
    (unit,) = plan_units([str(path)])
    assert [document.text for document in read_unit(unit, skipped)] == ["fine"]
    assert skipped == {"not CSV": 41}
    path.write_text('"te"xt,n\nfine,1\n', encoding="utf-8")
    with pytest.raises(SourceError, match=f"{path}: the first row is not CSV"):
        list(read_unit(*plan_units([str(path)]), skipped))
