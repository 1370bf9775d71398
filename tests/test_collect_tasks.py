"""Tasks from packages: verses of a module as the SWORD project packs them, and rows that are on one side alone."""

import struct
import zlib

from tests.bench.collect_tasks import _divided, read_verses

BOOKS = [["In the <note>a <w>word</w></note>beginning", "<w>And</w> the earth"], ["Now these", ""]]


def write_module(share):
    """Two books, each a block, in one testament; place 0 is the testament's own and empty."""
    folder = share / "sword/modules/texts/ztext/toy"
    folder.mkdir(parents=True)
    packed, sizes, verses = b"", [], [struct.pack("<IIH", 0, 0, 0)]
    for number, book in enumerate(BOOKS):
        block = "".join(book).encode()
        sizes.append(struct.pack("<III", len(packed), len(zlib.compress(block)), len(block)))
        packed += zlib.compress(block)
        starts = [len("".join(book[:place]).encode()) for place in range(len(book))]
        verses += [
            struct.pack("<IIH", number, start, len(verse.encode())) for start, verse in zip(starts, book, strict=True)
        ]
    for suffix, content in (("bzz", packed), ("bzs", b"".join(sizes)), ("bzv", b"".join(verses))):
        (folder / f"ot.{suffix}").write_bytes(content)


def test_verses_are_read_without_their_marks(tmp_path):
    write_module(tmp_path)
    assert read_verses(tmp_path) == {
        ("ot", 1): "In the beginning",
        ("ot", 2): "And the earth",
        ("ot", 3): "Now these",
    }


def test_rows_of_one_text_are_to_learn_from_or_to_test_by():
    rows = [(f"text {number % 500}", number) for number in range(1000)]
    train, test = _divided(rows)
    assert sorted(train + test) == sorted(rows) and 150 <= len(test) <= 250
    assert not {text for text, _ in train} & {text for text, _ in test}
