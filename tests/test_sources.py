import bz2
import json

import pytest

from data_prep import wikipedia
from data_prep.sources import (
    Document,
    SourceError,
    input_files,
    is_heldout,
    passed_over,
    plan_units,
    read_unit,
    resolve_input,
)

HEAD = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">\n<siteinfo><sitename>W</sitename></siteinfo>\n'


def page(number, text, namespace=0, redirect=""):
    return (
        f"<page><title>T{number}</title><ns>{namespace}</ns><id>{number}</id>{redirect}<revision><id>1</id>"
        f'<text xml:space="preserve">{text}</text></revision></page>\n'
    )


def dump(*pages):
    return HEAD + "".join(pages) + "</mediawiki>"


def sentence(number):
    return f"This is the text of page number {number}."


def read(*inputs, **options):
    return [document for unit in plan_units([str(name) for name in inputs], **options) for document in read_unit(unit)]


def jsonl(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def test_wikipedia_gives_articles_as_prose(tmp_path):
    path = tmp_path / "dump.xml"
    redirect = '<redirect title="T1" />'
    path.write_text(
        dump(
            page(1, f"'''{sentence(1)}'''"),
            page(2, sentence(2), namespace=1),
            page(3, sentence(3), redirect=redirect),
            page(4, "&lt;ref&gt;note&lt;/ref&gt;" + sentence(4)),
        )
    )
    assert read(path) == [Document("dump.xml:1", sentence(1)), Document("dump.xml:4", sentence(4))]


@pytest.mark.parametrize("name", ["a.xml.bz2", "enwiki-articles1.xml-p10p30302-short.bz2"])
def test_compressed_dumps_read_alike(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(bz2.compress(dump(page(1, sentence(1))).encode()))
    assert [document.text for document in read(path)] == [sentence(1)]


def test_dumps_in_utf16_are_read_whole(tmp_path):
    path = tmp_path / "a.xml"
    text = "Аз съм страница на енциклопедия."
    path.write_bytes(dump(*[page(number, text) for number in range(50)]).encode("utf-16"))
    assert [document.text for document in read(path, unit_bytes=1000)] == [text] * 50


@pytest.mark.parametrize("unit_bytes", [100, 333, 1000, 10**6])
def test_byte_ranges_of_a_dump_have_every_page_once(tmp_path, unit_bytes):
    path = tmp_path / "a.xml"
    path.write_text(dump(*[page(number, sentence(number) + " é" * number) for number in range(40)]))
    units = plan_units([str(path)], unit_bytes=unit_bytes)
    assert len(units) == -(-path.stat().st_size // unit_bytes)
    documents = [document for unit in units for document in read_unit(unit)]
    assert [document.id for document in documents] == [f"a.xml:{number}" for number in range(40)]


def test_a_page_start_on_the_border_of_two_reads_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(wikipedia, "READ_BYTES", 7)
    path = tmp_path / "a.xml"
    path.write_text(dump(*[page(number, sentence(number)) for number in range(12)]))
    assert [document.id for document in read(path, unit_bytes=200)] == [f"a.xml:{number}" for number in range(12)]


@pytest.mark.parametrize("unit_bytes", [1, 7, 50, 10**6])
def test_byte_ranges_of_json_lines_have_every_line_once(tmp_path, unit_bytes):
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"é{number}" * (number % 5)} for number in range(30)])
    texts = [document.text for document in read(path, unit_bytes=unit_bytes)]
    assert texts == [f"é{number}" * (number % 5) for number in range(30)]


def test_json_lines_may_have_another_field_blank_lines_and_no_last_newline(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"body": "one"}\n\n{"body": "two", "text": 3}', encoding="utf-8")
    assert [document.text for document in read(path, text_field="body")] == ["one", "two"]


def test_folders_are_read_in_order_and_grouped(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    (tmp_path / "readme.md").write_text("not read")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "5.txt").write_text("text 5")
    jsonl(tmp_path / "z.jsonl", [{"text": "line"}])
    units = plan_units([str(tmp_path)], unit_bytes=17)
    assert [len(unit.paths) for unit in units] == [2, 2, 2, 1]
    assert [unit.number for unit in units] == [0, 1, 2, 3]
    assert [document.text for document in read(tmp_path)] == [*(f"text {number}" for number in range(6)), "line"]


def test_what_a_folder_holds_besides_is_counted(tmp_path):
    inside, elsewhere = tmp_path / "inside", tmp_path / "elsewhere"
    for folder in (inside / "sub", elsewhere):
        folder.mkdir(parents=True)
        for name in ("a.txt", "b.md", "c"):
            (folder / name).write_text("text")
    (inside / "link").symlink_to(elsewhere)
    (inside / "up").symlink_to(inside)
    (inside / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (inside / "linked.txt").symlink_to(elsewhere / "a.txt")
    assert len(read(inside)) == 2
    names = [str(inside), str(inside / "sub" / "a.txt")]
    assert passed_over(names) == [
        f"input {inside}: passed over: files of no known format (2)",
        f"input {inside}: passed over: linked folders (2)",
        f"input {inside}: passed over: links to nothing, or no files (1)",
    ]


def test_files_inside_packages_are_found_without_importing_them():
    path = resolve_input("package://numpy/py.typed")
    assert path.name == "py.typed" and path.exists()
    with pytest.raises(SourceError, match="package 'no_such_package' is not installed: pip install no_such_package"):
        resolve_input("package://no_such_package/file.txt")
    with pytest.raises(SourceError, match="write package://"):
        resolve_input("package://numpy/../secret.txt")


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert len(input_files(".")) == 1
    with pytest.raises(SourceError, match="input '': the name is empty: write a file, a folder or package://"):
        input_files("")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "missing.txt does not exist"),
        ("empty.txt", b"", "empty.txt is empty"),
        ("notes.pdf", b"x", "unknown format"),
    ],
)
def test_inputs_that_cannot_be_planned(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        input_files(str(tmp_path / name))


def test_a_folder_without_texts_is_named(tmp_path):
    with pytest.raises(SourceError, match="the folder holds no file of a known format; known are Wikipedia"):
        plan_units([str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good \xff bad", r"a.txt: invalid UTF-8 at byte 5 \(0xff\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', r"invalid UTF-8 at byte 24 \(0xe9\)"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text" 1}\n', r"line 3 \(byte 15\): not JSON: Expecting ':'"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x", "id": 1}\n', r"line 2 .*no field 'text', only 'body', 'id'"),
        ("a.jsonl", b"[1, 2]\n", r"no field 'text', only a list"),
        ("a.jsonl", b'{"text": 5}\n', r"line 1 \(byte 0\): field 'text' is not text but int"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, "not JSON"),
        ("a.xml", (HEAD + page(1, "x") + "<page>").encode(), "a.xml: page at byte .*broken XML: no element found"),
        ("a.xml", (HEAD + "<page></revision></page>").encode(), "broken XML: mismatched tag"),
        ("a.xml", (HEAD + "<page><title/></page></mediawiki>").encode(), "a page without 'ns'"),
        ("a.xml.bz2", b"BZh9 this is none", "broken bz2"),
        ("a.xml.bz2", bz2.compress(dump(page(1, "x" * 5000)).encode())[:-10], "broken bz2: Compressed file ended"),
    ],
)
def test_broken_content_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read(tmp_path / name)


def test_the_held_out_share_is_stable_and_nested():
    texts = [f"Document number {number} of many." for number in range(4000)]
    small = {text for text in texts if is_heldout(text, 0.05)}
    large = {text for text in texts if is_heldout(text, 0.1)}
    assert small < large
    assert 150 < len(small) < 250 and 340 < len(large) < 460
    assert all(is_heldout(text.upper().replace(" ", "\n  "), 0.05) for text in small)
    assert not any(is_heldout(text, 0) for text in texts)
