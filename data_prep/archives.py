"""Text shards of others: tars whose members are a sample each, as WebDataset has them. Members are never unpickled."""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

from data_prep import documents
from data_prep.documents import BrokenContent, Document, Faults, SourceError, WorkUnit, too_long, unreadable
from data_prep.lines import decode, json_text

MEMBERS = ("txt", "json")
"""Extensions of the members that hold a sample's text; a sample that has both gives the first."""

# To WebDataset a sample is called by what stands before the first dot: this may be a text of its own or another's note.
_DOTTED = BrokenContent("name with several dots", ": leave one, before txt or json, or give it another extension")

_REPEATED = BrokenContent("repeated name", ": its sample has such a member already: rename or remove one")


class _CheckedMember(tarfile.TarInfo):
    """A header that is an error where it is broken or missing, which `tarfile` takes for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_CheckedMember":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from None


def read_tar(unit: WorkUnit, faults: Faults) -> Iterator[Document]:
    """Each sample is a document: its .txt member, or the text field of its .json.

    Raises:
        SourceError: the tar has no such member, whatever else may be left out.
    """
    from webdataset.tariterators import group_by_keys  # which imports torch: not for those who read no tar

    path = unit.paths[0]
    num_samples = 0
    try:
        for sample in group_by_keys(_members(path, faults)):
            num_samples += 1
            extension = next(extension for extension in MEMBERS if extension in sample)
            try:
                text = _text(sample[extension], extension, unit.text_field)
            except BrokenContent as fault:
                faults.add(fault, lambda key=sample["__key__"], end=extension: f"{path}: {key}.{end}")
            else:
                yield Document(f"{unit.name_of(path)}:{sample['__key__']}", text)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        if isinstance(error, SourceError):
            raise
        faults.add(BrokenContent("broken tar", f": {error.args[0]}: fetch the file again"), lambda: path)
    except OSError as error:
        faults.add(unreadable(error), lambda: path)
    if not num_samples + faults.count:
        raise SourceError(f"{path}: no member is .txt or .json: a tar of text has one of them for each sample")


def _text(raw: bytes, extension: str, text_field: str) -> str:
    return json_text(raw, text_field) if extension == "json" else decode(raw).removeprefix("\ufeff")


def _members(path: str, faults: Faults) -> Iterator[dict[str, Any]]:
    """Names and bytes of the members with text, as webdataset's grouping wants them."""
    from webdataset.tariterators import base_plus_ext

    key_before, seen = None, set[str]()
    with tarfile.open(path, "r|gz" if path.endswith("gz") else "r|", tarinfo=_CheckedMember) as archive:
        for member in archive:
            archive.members = []  # which would hold every header
            key, extension = base_plus_ext(member.name)
            if not member.isreg() or key is None:
                continue
            if extension.lower() not in MEMBERS:
                if extension.lower().endswith(tuple(f".{end}" for end in MEMBERS)):
                    faults.add(_DOTTED, lambda name=member.name: f"{path}: {name}")
                continue
            if member.size > documents.LONGEST_DOCUMENT:
                fault = too_long("cut it into several documents, or remove it")
                faults.add(fault, lambda name=member.name: f"{path}: {name}")
                continue
            key_before, seen = key, seen if key == key_before else set()
            if extension.lower() in seen:
                faults.add(_REPEATED, lambda name=member.name: f"{path}: {name}")
                continue
            seen.add(extension.lower())
            yield {"fname": member.name, "data": archive.extractfile(member).read(), "__url__": path}
