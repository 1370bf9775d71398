import re
from dataclasses import replace

import pytest

from data_prep import verify_shards
from data_prep.build_report import MAX_BARS, PLOT_NAME, REPORT_NAME, report_text, write_report
from data_prep.manifest import Counts, Manifest, SourceCounts, Tally
from data_prep.origin import InputRecord, Origin

SOURCES = (
    SourceCounts(Tally(10, 3_000_000), {"empty": Tally(2, 0)}, {"train": Tally(8, 3_000_000)}),
    SourceCounts(Tally(5, 500_000), {"duplicate": Tally(4, 400_000)}, {"heldout": Tally(1, 100_000)}),
)
MANIFEST = Manifest(
    Origin(
        {"layout": "causal", "row_length": 8}, (InputRecord("a|b.txt", 1, 9, "x"), InputRecord("$x$.txt", 1, 9, "x"))
    ),
    tokenizer_fingerprint="t",
    vocab_size=1000,
    counts={"train": Counts(8, 9, 1600, 16, 250, 1800), "heldout": Counts(1, 1, 8, 0, 2, 10)},
    sources=SOURCES,
    lengths=(0, 1, 8),
)


def test_a_report_counts_by_input_and_step():
    lines = report_text(MANIFEST).splitlines()
    assert "| input | read | duplicate | empty | kept: train | kept: heldout |" in lines
    assert "| a\\|b.txt | 10 (3.0 MB) | 0 (0.0 MB) | 2 (0.0 MB) | 8 (3.0 MB) | 0 (0.0 MB) |" in lines
    assert "| all | 15 (3.5 MB) | 4 (0.4 MB) | 2 (0.0 MB) | 8 (3.0 MB) | 1 (0.1 MB) |" in lines
    assert "Dropped and kept together: 15 documents, 3,500,000 bytes, which is all that was read." in lines
    assert "| train | 8 | 9 | 1,600 | 1.00% | 250 | 90.0% |" in lines
    assert "- row_length: 8" in lines


def test_a_report_says_where_counts_do_not_add_up():
    lost = replace(MANIFEST, sources=(replace(SOURCES[0], read=Tally(11, 3_000_000)), SOURCES[1]))
    assert "which is NOT what was read" in report_text(lost)


@pytest.mark.parametrize("inputs", [1, MAX_BARS + 5])
def test_a_report_is_a_function_of_the_manifest(tmp_path, inputs):
    origin = replace(MANIFEST.origin, inputs=(MANIFEST.origin.inputs[1],) * inputs)
    manifest = replace(MANIFEST, origin=origin, sources=(SOURCES[0],) * inputs)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, manifest)
        assert (tmp_path / name / PLOT_NAME).read_bytes().startswith(b"\x89PNG")
    for name in (REPORT_NAME, PLOT_NAME):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_lost_report_is_made_again(tiny_shards, tmp_path, capsys):
    before = {name: (tiny_shards / name).read_bytes() for name in (REPORT_NAME, PLOT_NAME)}
    for name in before:
        (tiny_shards / name).unlink()
    assert verify_shards.main([str(tiny_shards), "--report"]) == 0
    assert {name: (tiny_shards / name).read_bytes() for name in before} == before
    (total,) = re.findall(r"\| all \| (\d+) ", (tiny_shards / REPORT_NAME).read_text())
    assert total == "106"
