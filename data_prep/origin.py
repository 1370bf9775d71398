"""What something was made of: the settings that decided it and the contents of its inputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, Self

from pydantic import AfterValidator

from data_prep.documents import SourceError
from data_prep.files import hash_file, hash_json
from data_prep.sources import format_of, input_files, is_on_hub, resolve_input
from data_prep.tables import hub_content


def _readable(name: str) -> str:
    input_files(name)
    return name


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("no input: name at least one")
    reader: dict[Path, int] = {}
    for number, name in enumerate(names):
        for file in input_files(name) or [Path(name)]:
            if (first := reader.setdefault(file.resolve(), number)) != number:
                raise ValueError(f"{name!r} would read {file} again, after {names[first]!r}: list every text once")
    return names


InputName = Annotated[str, AfterValidator(_readable)]
"""The type of a setting: an input that can be read."""

Inputs = Annotated[tuple[InputName, ...], AfterValidator(_distinct)]
"""The type of a setting: at least one input, each readable, and no file in two of them."""


@dataclass(frozen=True)
class InputRecord:
    """What an input held: xxh3_128 covers the content of a file, or names and contents of a folder's files.

    Of a dataset on the hub it covers name, configuration, revision, split and number of rows.
    """

    name: str
    files: int
    bytes: int
    xxh3_128: str

    @property
    def content(self) -> str:
        return f"{self.files} file(s) of {self.bytes} bytes with hash {self.xxh3_128}"


def hash_source(file: Path) -> str:
    """The hash of a file. Raises SourceError where it cannot be read."""
    try:
        return hash_file(file)
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror or error}: make it readable, or leave it out") from None


def file_stamps(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Size in bytes and time of the last change, in ns, of every file of inputs. Raises SourceError as input_files."""
    stats = {str(file): file.stat() for name in names for file in input_files(name)}
    return {file: (stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}


def changed_files(names: Sequence[str], stamps: Mapping[str, tuple[int, int]], hashes: Mapping[str, str]) -> list[str]:
    """Files of inputs whose content is not what it was when they had these stamps and hashes, or that came or went."""
    now = file_stamps(names)
    suspects = sorted(file for file in now.keys() | stamps.keys() if now.get(file) != stamps.get(file))
    return [file for file in suspects if file not in now or hash_source(Path(file)) != hashes.get(file)]


def record_input(name: str, hash_of: Callable[[Path], str] = hash_source) -> InputRecord:
    """Size and hash of an input, which reads all of it once unless the hashes of its files are known.

    Raises:
        SourceError: a file cannot be read.
    """
    if is_on_hub(name):
        return InputRecord(name, *hub_content(name))
    files = input_files(name)
    size = sum(file.stat().st_size for file in files)
    root = resolve_input(name)
    if files == [root]:
        return InputRecord(name, 1, size, hash_of(root))
    hashes = {file.relative_to(root).as_posix(): hash_of(file) for file in files}
    return InputRecord(name, len(files), size, hash_json(hashes))


@dataclass(frozen=True)
class Origin:
    """Equal origins give equal results: `settings` without paths, `inputs` in the order in which they are read."""

    settings: dict[str, Any]
    inputs: tuple[InputRecord, ...]

    def differences(self, other: Self) -> list[str]:
        """In what `other` differs, one line each; an input that was only moved does not."""
        lines = [
            f"{name}: {self.settings.get(name)!r}, was {other.settings.get(name)!r}"
            for name in sorted({*self.settings, *other.settings})
            if self.settings.get(name) != other.settings.get(name)
        ]
        if len(self.inputs) != len(other.inputs):
            lines.append(f"input: {len(self.inputs)} inputs, were {len(other.inputs)}")
        for now, was in zip(self.inputs, other.inputs, strict=False):
            if now.content != was.content:
                lines.append(f"input {now.name}: {now.content}, was {was.content}")
            elif format_of(Path(now.name)) != format_of(Path(was.name)):
                lines.append(f"input {now.name}: read by its name, which was {was.name}")
        return lines


class Made(Protocol):
    """A record of something made, such as a manifest."""

    @property
    def origin(self) -> Origin: ...


def faults_of(load: Callable[[Path], Made], place: Path, planned: Origin) -> list[str]:
    """Why what `load` finds at `place` is not what is planned: it was made otherwise, or cannot be read."""
    try:
        return planned.differences(load(place).origin)
    except ValueError as error:
        return str(error).splitlines()


def refusal(place: Path, faults: Sequence[str]) -> ValueError:
    """The error that keeps a command from replacing what was made otherwise."""
    remedy = "choose another --output, or replace it by --overwrite"
    return ValueError("\n  ".join([f"{place} is not what is asked for; {remedy}:", *faults]))
