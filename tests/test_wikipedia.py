"""Dumps in many streams of bzip2, cut anywhere, and broken dumps: what is lost is counted, and nothing else is lost."""

import bz2
import re
from collections import Counter

import pytest

from data_prep import documents, wikipedia
from data_prep.documents import SourceError
from data_prep.sources import plan_units, read_unit
from tests.test_sources import HEAD, dump, page, sentence

END = "</mediawiki>\n"


def texts_of(path, unit_bytes, skipped=None):
    units = plan_units([str(path)], unit_bytes=unit_bytes)
    return units, [document.text for unit in units for document in read_unit(unit, skipped)]


def multistream(pages_per_stream=3, num_pages=30):
    """A dump as Wikipedia publishes it: head, pages and end in streams of their own."""
    pages = [page(number, sentence(number)) for number in range(num_pages)]
    parts = ["".join(pages[start : start + pages_per_stream]) for start in range(0, num_pages, pages_per_stream)]
    return [bz2.compress(part.encode()) for part in (HEAD, *parts, END)]


@pytest.mark.parametrize("unit_bytes", [37, 200, 500, 1500, 10**6])
def test_units_of_many_streams_have_every_page_once(tmp_path, unit_bytes):
    path = tmp_path / "a.xml.bz2"
    path.write_bytes(b"".join(multistream()))
    units, texts = texts_of(path, unit_bytes)
    # The head's stream is all that lies before the first border of 37 bytes: nothing says that there are more streams.
    assert len(units) == (1 if unit_bytes in (37, 10**6) else -(-path.stat().st_size // unit_bytes))
    assert texts == [sentence(number) for number in range(30)]


@pytest.mark.parametrize("stream_bytes", [50, 333, 1000])
def test_pages_and_tags_may_lie_across_streams(tmp_path, stream_bytes):
    raw = dump(*[page(number, sentence(number)) for number in range(30)]).encode()
    streams = [bz2.compress(raw[start : start + stream_bytes]) for start in range(0, len(raw), stream_bytes)]
    path = tmp_path / "a.xml.bz2"
    path.write_bytes(b"".join(streams))
    for unit_bytes in (100, 170, 900):
        assert texts_of(path, unit_bytes)[1] == [sentence(number) for number in range(30)]


def test_what_only_looks_like_a_stream_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(wikipedia, "STREAM_START", re.compile(b"B|Z|\x00|[a-m]"))
    monkeypatch.setattr(wikipedia, "READ_BYTES", 320)  # so that streams lie across reads, too
    path = tmp_path / "a.xml.bz2"
    path.write_bytes(b"".join(multistream()))
    units, texts = texts_of(path, 300)
    assert len(units) > 5 and texts == [sentence(number) for number in range(30)]


@pytest.mark.parametrize("read_bytes", [160, 177, 1024])
def test_a_stream_that_begins_on_the_border_of_two_reads_is_found(tmp_path, monkeypatch, read_bytes):
    monkeypatch.setattr(wikipedia, "READ_BYTES", read_bytes)
    streams = multistream()
    path = tmp_path / "a.xml.bz2"
    path.write_bytes(b"".join(streams))
    starts = [sum(map(len, streams[:number])) for number in range(len(streams))]
    with open(path, "rb") as file:
        for before, start in zip(starts, starts[1:], strict=False):
            for first in range(before + 1, start + 1):
                assert wikipedia._find_stream(file, first, path.stat().st_size) == start


def test_the_head_of_a_stream_whose_content_is_broken_is_no_stream(tmp_path):
    whole = bz2.compress(b"text " * 1000)
    path = tmp_path / "a"
    broken = whole[:20] + bytes([whole[20] ^ 1]) + whole[21:]
    path.write_bytes(broken + whole)
    with open(path, "rb") as file:
        assert wikipedia._find_stream(file, 0, 10**6) == len(whole)
        assert wikipedia._find_stream(file, 0, len(whole)) is None


def test_a_dump_in_one_stream_is_one_unit(tmp_path):
    path = tmp_path / "a.xml.bz2"
    path.write_bytes(bz2.compress(dump(*[page(number, sentence(number)) for number in range(30)]).encode()))
    units, texts = texts_of(path, 100)
    assert len(units) == 1 and len(texts) == 30


@pytest.mark.parametrize("number", [0, 4, 10, 11])
def test_a_broken_stream_costs_its_own_pages(tmp_path, number):
    streams = multistream()
    broken = bytearray(streams[number])
    broken[len(broken) // 2] ^= 0xFF
    path = tmp_path / "a.xml.bz2"
    path.write_bytes(b"".join([*streams[:number], broken, *streams[number + 1 :]]))
    lost = set(range(3 * (number - 1), 3 * number)) if 0 < number < 11 else set()
    for unit_bytes in (150, 400, 1000, 10**6):
        skipped = Counter()
        _, texts = texts_of(path, unit_bytes, skipped)
        assert texts == [sentence(each) for each in range(30) if each not in lost]
        assert skipped == {"broken bz2": 1}
        with pytest.raises(SourceError, match=r"a\.xml\.bz2: stream at byte \d+: broken bz2: .*; fetch the dump again"):
            texts_of(path, unit_bytes)


@pytest.mark.parametrize("cut", [1, 60, 700])
def test_a_dump_that_ends_too_early_is_broken(tmp_path, cut):
    path = tmp_path / "a.xml.bz2"
    path.write_bytes(b"".join(multistream())[:-cut])
    for unit_bytes in (150, 1000, 10**6):
        with pytest.raises(SourceError, match="broken"):
            texts_of(path, unit_bytes)


def test_a_dump_without_its_last_pages_is_broken(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(HEAD + "".join(page(number, sentence(number)) for number in range(9)))
    for unit_bytes in (150, 10**6):
        with pytest.raises(SourceError, match="which is not </mediawiki>; fetch the dump again"):
            texts_of(path, unit_bytes)


@pytest.mark.parametrize(
    ("spoil", "lost"),
    [
        (lambda text: text.replace("<ns>0</ns><id>4</id>", "<ns>0<ns><id>4</id>"), {4}),
        (lambda text: text.replace("number 4.</text></revision></page>", "number 4.</text></revision></pa"), {4}),
        (lambda text: text.replace("number 4.</text></revision></page>\n<page>", "number 4."), {4, 5}),
        (lambda text: text.replace("number 4.", "number & 4."), {4}),
        (lambda text: text.replace("<id>4</id>", ""), {4}),
        (lambda text: text.replace("<page><title>T4", "<pag><title>T4"), {4}),
        (lambda text: text.replace("</page>\n<page><title>T4", "</page>\nnoise<page><title>T4"), set()),
    ],
)
def test_a_broken_page_costs_itself(tmp_path, spoil, lost):
    path = tmp_path / "a.xml"
    path.write_text(spoil(dump(*[page(number, sentence(number)) for number in range(9)])))
    for unit_bytes in (300, 10**6):
        skipped = Counter()
        _, texts = texts_of(path, unit_bytes, skipped)
        assert texts == [sentence(number) for number in range(9) if number not in lost]
        assert skipped == {"broken XML": 1}
        with pytest.raises(SourceError, match=r"a\.xml.*: broken XML: "):
            texts_of(path, unit_bytes)


def test_a_page_too_long_to_hold_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 2000)
    monkeypatch.setattr(wikipedia, "READ_BYTES", 500)
    path = tmp_path / "a.xml"
    path.write_text(dump(page(1, sentence(1)), page(2, "x" * 9000), page(3, sentence(3))))
    skipped = Counter()
    assert texts_of(path, 10**6, skipped)[1] == [sentence(1), sentence(3)]
    assert skipped == {"too long": 1}
    with pytest.raises(SourceError, match="page at byte .* too long: more than 2000 bytes: remove the page"):
        texts_of(path, 10**6)


def test_xml_that_is_no_dump_is_refused(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text("<mediawiki></mediawiki>")
    with pytest.raises(SourceError, match="it holds no <page>"):
        texts_of(path, 10**6)
    path.write_text("<html>Not here</html>")
    with pytest.raises(SourceError, match="no element found at its end"):
        texts_of(path, 10**6)


def test_bytes_that_are_no_utf16_are_named(tmp_path):
    path = tmp_path / "a.xml"
    path.write_bytes(dump(page(1, "Текст."), page(2, "Текст.")).encode("utf-16")[:-1])
    with pytest.raises(SourceError, match="broken XML"):
        texts_of(path, 10**6)
