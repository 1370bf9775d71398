"""Units to shards: what screens count, and what is left of a unit that could not be written."""

import errno
import multiprocessing
import os
import re
import resource
import shutil
import sys

import numpy as np
import pytest

from data_prep import build_shards, files, train_tokenizer, units, work_folder
from data_prep.manifest import Tally
from data_prep.ranks import Ranks
from data_prep.shards import Field, ShardWriter
from data_prep.sources import plan_units, read_unit
from data_prep.units import Screen

FIELDS = (Field("ids", "uint16", 8), Field("length", "uint16"))


def squeeze(text):
    return " ".join(text.split()), None


def refuse_shouting(text):
    return (None, "loud") if text.isupper() else (text, None)


def test_a_screen_counts_every_document_and_byte(tmp_path):
    texts = ["One  two.", "THREE.", "Four.", "  Fünf. ", "SIX."]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    (unit,) = plan_units([str(tmp_path)])
    screen = Screen((squeeze, refuse_shouting), {2: "duplicate", 4: "duplicate"})
    passed = [(number, document.id, text) for number, document, text in screen.documents(unit)]
    assert passed == [(0, "0.txt", "One two."), (3, "3.txt", "Fünf.")]
    assert screen.read == Tally(5, sum(len(text.encode()) for text in texts))
    # What a step drops is its, though an earlier document has the same words.
    assert screen.dropped == {"loud": Tally(2, 10), "duplicate": Tally(1, 5), "changed": Tally(0, 4)}
    kept = Tally(2, sum(len(text.encode()) for _, _, text in passed))
    assert sum(screen.dropped.values(), kept) == screen.read


def rows(count):
    return {"ids": np.ones((count, 8), np.uint16), "length": np.full(count, 8, np.uint16)}


def test_a_writer_holds_a_block_and_names_whole_shards_alone(tmp_path):
    with ShardWriter(tmp_path, "train-000000", FIELDS, rows_per_block=2, blocks_per_shard=2) as writer:
        writer.write(rows(7))
        assert len(writer._waiting["ids"]) == 1
        assert [path.name for path in tmp_path.glob("*.tar")] == ["train-000000-0000.tar"]
        assert [record.num_rows for record in writer.finish()] == [4, 3]
    assert len(list(tmp_path.glob("*"))) == len(list(tmp_path.glob("*.tar"))) == 2


def test_a_writer_that_is_interrupted_leaves_no_half_shard(tmp_path):
    writer = ShardWriter(tmp_path, "train-000000", FIELDS, rows_per_block=2, blocks_per_shard=2)
    with pytest.raises(KeyboardInterrupt), writer:
        writer.write(rows(6))
        assert len(list(tmp_path.iterdir())) == 2
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000-0000.tar"]


def test_a_disk_that_is_full_in_mid_write_leaves_no_half_shard(tmp_path):
    """By the system's limit on the size of a file, which stops a write as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = ShardWriter(tmp_path, "train-000000", FIELDS, rows_per_block=1 << 12, blocks_per_shard=100)
    try:
        with pytest.raises(ValueError, match="make room there; the same command goes on"):  # noqa: SIM117
            with build_shards.telling_what_to_do(tmp_path), writer:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
                writer.write(rows(1 << 14))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def built(tmp_path_factory, prose):
    """Arguments of a build of two small units, whose tokenizer is trained."""
    folder = tmp_path_factory.mktemp("built")
    return _inputs_and_tokenizer(folder, prose(40))


@pytest.fixture(scope="module")
def whole(built, tmp_path_factory):
    """What comes of it."""
    folder = tmp_path_factory.mktemp("whole") / "shards"
    assert build_shards.main([*built, f"--output={folder}"]) == 0
    return folder


def _inputs_and_tokenizer(tmp_path, texts):
    for number, text in enumerate(texts):
        folder = tmp_path / f"input{number % 2}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.txt").write_text(text)
    inputs = [f"--input={tmp_path / name}" for name in ("input0", "input1")]
    tokenizer = str(tmp_path / "tokenizer")
    kind = ["--kind=wordpiece", "--vocab_size=256", "--heldout_fraction=0.2", "--output", tokenizer]
    assert train_tokenizer.main([*inputs, *kind]) == 0
    return [*inputs, "--tokenizer", tokenizer, "--heldout_fraction=0.2", "--row_length=24"]


@pytest.mark.parametrize("synced", [1, 6, 12])
def test_a_build_on_a_full_disk_says_so_and_goes_on(built, whole, tmp_path, monkeypatch, capsys, synced):
    """The disk is full at one file after another: hashes, shards, records, indexes, the manifest."""
    output = tmp_path / "shards"
    real, count = os.fsync, iter(range(1000))

    def full(descriptor):
        if next(count) >= synced:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    assert build_shards.main([*built, f"--output={output}"]) == 2
    assert re.search(f"{output}.*: No space left on device: make room there; the same", capsys.readouterr().err)
    assert not (output / "manifest.json").exists()
    monkeypatch.undo()
    assert build_shards.main([*built, f"--output={output}"]) == 0
    for path in whole.rglob("*"):
        assert path.is_dir() or (output / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert len(list(whole.rglob("*"))) == len(list(output.rglob("*")))


@pytest.mark.parametrize("undone", [True, False], ids=["and back", "for good"])
def test_an_input_that_changes_while_it_is_read_is_told_and_read_anew(tmp_path, prose, monkeypatch, capsys, undone):
    arguments, output = _inputs_and_tokenizer(tmp_path, prose(40)), tmp_path / "shards"
    file, touched = tmp_path / "input1/1.txt", tmp_path / "input0/0.txt"
    before = file.read_text()

    def changed(unit, skipped=None):
        os.utime(touched, (1, 1))  # which changes no content
        file.write_text(before + " More of it.")
        return read_unit(unit)

    monkeypatch.setattr(units, "read_unit", changed)
    assert build_shards.main([*arguments, f"--output={output}"]) == 2
    assert f"{file}: changed while it was being read: when all is at rest" in capsys.readouterr().err
    monkeypatch.undo()
    if undone:
        file.write_text(before)
    for folder in (output, tmp_path / "anew"):
        assert build_shards.main([*arguments, f"--output={folder}"]) == 0
    assert (output / "manifest.json").read_bytes() == (tmp_path / "anew/manifest.json").read_bytes()


def test_two_jobs_may_train_one_tokenizer_at_once(tmp_path, prose):
    _inputs_and_tokenizer(tmp_path, prose(40))
    shutil.rmtree(tmp_path / "tokenizer")
    kind = ["--kind=wordpiece", "--vocab_size=256", "--heldout_fraction=0.2"]
    arguments = [f"--input={tmp_path / 'input0'}", *kind, f"--output={tmp_path / 'tokenizer'}"]
    fork = multiprocessing.get_context("fork")
    jobs = [fork.Process(target=lambda: sys.exit(train_tokenizer.main(arguments))) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0] * 4
    assert train_tokenizer.main(arguments) == 0
    assert not list(tmp_path.glob(".tokenizer*"))


def test_a_folder_without_permission_is_refused_by_name(built, tmp_path, monkeypatch, capsys):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "shards"))

    monkeypatch.setattr(build_shards.Path, "mkdir", refused)  # root may write anywhere
    assert build_shards.main([*built, f"--output={tmp_path / 'shards'}"]) == 2
    error = capsys.readouterr().err
    assert f"error: {tmp_path / 'shards'}: Permission denied: change its rights, or choose another" in error


def test_a_second_job_is_refused_by_the_command(built, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(work_folder, "LOCK_SECONDS", 0.0)
    with work_folder.only_job(tmp_path / "shards", Ranks()):
        assert build_shards.main([*built, f"--output={tmp_path / 'shards'}"]) == 2
    assert f"error: {tmp_path / 'shards'} is being built by process {os.getpid()}" in capsys.readouterr().err
