"""Steps of a build, each counted: what is broken, unlike prose, known from evaluation data, or there twice."""

import json
import os
from pathlib import Path

import pytest

from data_prep import build_shards, train_tokenizer
from data_prep.filters import normalize
from data_prep.manifest import Manifest, Tally
from data_prep.sources import is_heldout
from data_prep.tokenization import load_tokenizer

NGRAMS = ("max_top_ngram_characters", 3), ("max_duplicate_ngram_characters", 6)
ANY_REPETITION = ", ".join(f"{name}: {[1] * count}" for name, count in NGRAMS)  # invented sentences are all alike
STEPS = (
    *("--on_error=skip", "--deduplicate=near", "--steps.normalize", "--steps.check_quality"),
    *("--steps.quality", f"{{min_words: 5, min_stop_words: 0, {ANY_REPETITION}}}"),
)


@pytest.fixture
def inputs(tmp_path, prose):
    """Arguments that name two files: 30 sound documents, then one of each fault; and evaluation data."""
    long = [" ".join(prose(3, seed=seed)) for seed in range(31)]
    evaluation = long.pop()
    odd = {
        "duplicate": long[3].upper(),
        "near-duplicate": long[7] + " And that is all.",
        "min_words": "Too short.",
        "evaluation": f"{long[0][:40]} {evaluation[100:400]}",
        "changed": "\ufeffA\u0308pfel\r\nand  pears grow on\ttrees that stand in the garden.\n\n\n\nThere.",
    }
    lines = [json.dumps({"text": text}) for text in [*long[:20], *odd.values()]]
    (tmp_path / "one.jsonl").write_text("\n".join([*lines, "{broken", ""]))
    (tmp_path / "two.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in long[20:]))
    (tmp_path / "evaluation.jsonl").write_text(json.dumps({"question": evaluation}) + "\n")
    named = [f"--input={tmp_path / 'one.jsonl'}", f"--input={tmp_path / 'two.jsonl'}"]
    decontaminate = [f"--steps.decontaminate={tmp_path / 'evaluation.jsonl'}"]
    return named, [*decontaminate, "--steps.decontaminate_text_field=question"]


@pytest.fixture
def build(tmp_path, inputs):
    """build(output, *options): the exit code of a build with a tokenizer that was trained on the second file."""
    named, _ = inputs
    tokenizer = tmp_path / "tokenizer"
    options = ["--kind=wordpiece", "--vocab_size=256", "--heldout_fraction=0.1", f"--output={tokenizer}"]
    assert train_tokenizer.main([named[1], *options]) == 0

    def run(output, *options):
        made = [f"--tokenizer={tokenizer}", f"--output={tmp_path / output}", "--heldout_fraction=0.1"]
        return build_shards.main([*named, *made, "--row_length=24", "--rows_per_block=16", *options])

    return run


def test_every_document_is_kept_or_counted_with_its_reason(build, inputs, tmp_path, capsys):
    assert build("shards", *STEPS, *inputs[1]) == 0
    one, two = Manifest.load(tmp_path / "shards").sources
    contaminated = next(reason for reason in one.dropped if "evaluation data" in reason)
    assert contaminated == "in evaluation data evaluation.jsonl"
    assert {reason: tally.documents for reason, tally in one.dropped.items()} == {
        "duplicate": 1,
        "near-duplicate": 1,
        "min_words": 1,
        contaminated: 1,
        "changed": 0,
    }
    assert one.skipped == {"not JSON": 1} and two.skipped == {} and set(two.dropped) <= {"changed"}
    for source, number in ((one, 25), (two, 10)):
        assert source.read.documents == number
        assert sum((*source.dropped.values(), *source.kept.values()), Tally()) == source.read
    report = (tmp_path / "shards/report.md").read_text()
    assert "which is all that was read" in report and "left out: 1 for: not JSON" in report


def test_documents_are_held_out_by_what_was_read(build, inputs, tmp_path):
    two = tmp_path / "two.jsonl"
    texts = [f"O\u0308 {json.loads(line)['text']}" for line in two.read_text().splitlines()]
    two.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert build("shards", "--on_error=skip", "--steps.normalize", "--deduplicate=none") == 0
    assert not Manifest.load(tmp_path / "shards").sources[0].dropped.keys() - {"changed"}
    kept = Manifest.load(tmp_path / "shards").sources[1].kept["heldout"].documents
    by_source, by_step = (sum(is_heldout(text, 0.1) for text in each) for each in (texts, map(normalize, texts)))
    assert kept == by_source != by_step


def test_broken_content_and_other_steps_are_refused(build, inputs, tmp_path, capsys):
    assert build("shards") == 2
    assert "one.jsonl: line 26" in capsys.readouterr().err
    assert build("shards", "--overwrite", *STEPS, *inputs[1]) == 0
    assert build("shards", *STEPS, *inputs[1]) == 0 and "nothing to do" in capsys.readouterr().out
    (tmp_path / "evaluation.jsonl").write_text(json.dumps({"question": "something else of more than eight words now"}))
    assert build("shards", *STEPS[:-1], f"{{min_words: 6, min_stop_words: 0, {ANY_REPETITION}}}", *inputs[1]) == 2
    said = capsys.readouterr().err
    assert "steps.quality.min_words: 6, was 5" in said and "steps.decontaminate: ['" in said


def test_a_build_that_broken_content_has_stopped_goes_on_without_it(build, tmp_path, capsys):
    assert build("shards") == 2
    assert build("shards", "--on_error=skip") == 0
    assert not (tmp_path / "shards/.build").exists()
    (tmp_path / "shards/.build").mkdir()  # as a kill behind the manifest leaves it
    (tmp_path / "shards/.build/keys").write_text("")
    assert build("shards") == 0 and "nothing to do" in capsys.readouterr().out
    assert not (tmp_path / "shards/.build").exists()


def test_a_build_counts_a_broken_table_and_tells_what_it_passes_over(build, inputs, tmp_path, capsys):
    (tmp_path / "more/linked").mkdir(parents=True)
    (tmp_path / "more/a.parquet").write_bytes(b"no table at all")
    (tmp_path / "more/link").symlink_to(tmp_path / "more/linked")
    more = f"--input={tmp_path / 'more'}"
    assert build("shards", more) == 2
    assert "a.parquet: broken table: " in capsys.readouterr().err
    assert build("shards", "--on_error=skip", more) == 0
    assert Manifest.load(tmp_path / "shards").sources[2].skipped == {"broken table": 1}
    assert f"input {tmp_path / 'more'}: passed over: linked folders (1)\n" in capsys.readouterr().out
    options = ["--kind=byte_bpe", "--vocab_size=300", "--heldout_fraction=0.1", f"--output={tmp_path / 'bytes'}"]
    assert train_tokenizer.main([*inputs[0], more, *options, "--on_error=skip"]) == 0
    said = capsys.readouterr().out
    assert "cannot be read: 1 for: broken table" in said and "passed over: linked folders (1)" in said


def test_the_tokenizer_lies_on_the_disk_before_the_manifest_says_so(build, tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor, really=os.fsync):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert build("shards", "--on_error=skip") == 0
    root = tmp_path / "shards"
    before = {*synced[: synced.index(root / ".manifest.json.tmp")]}
    assert {root, root / "tokenizer", *(root / "tokenizer").iterdir()} <= before


def test_a_tokenizer_is_there_until_its_successor_is(inputs, tmp_path, monkeypatch, capsys):
    output = tmp_path / "bytes"
    words = [inputs[0][1], "--kind=byte_bpe", "--heldout_fraction=0.1", "--overwrite", f"--output={output}"]
    assert train_tokenizer.main([*words, "--vocab_size=300"]) == 0
    rename = Path.rename

    def killed(path, target):
        if path.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer.main([*words, "--vocab_size=310"])
    assert not output.exists()
    monkeypatch.setattr(Path, "rename", rename)
    capsys.readouterr()
    assert train_tokenizer.main([*words, "--vocab_size=300"]) == 0 and "nothing to do" in capsys.readouterr().out
    assert train_tokenizer.main([*words, "--vocab_size=310"]) == 0 and len(load_tokenizer(output)) == 310
    assert [path.name for path in tmp_path.glob(".bytes*")] == []


def test_a_tokenizer_within_the_output_is_left_alone(build, inputs, tmp_path, capsys):
    assert build("shards", "--on_error=skip") == 0
    own = tmp_path / "shards/tokenizer"
    options = [f"--tokenizer={own}", f"--output={tmp_path / 'shards'}", "--overwrite", "--seed=1"]
    assert build_shards.main([*inputs[0], *options]) == 2
    assert f"{own} lies within the output" in capsys.readouterr().err and own.exists()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--steps.ngram_words=5"], "steps.ngram_words: 5 has no effect with steps.decontaminate []: name data"),
        (
            ["--steps.quality", "{min_words: 1}"],
            "steps.quality.min_words: 1 has no effect with steps.check_quality False: set",
        ),
        (["--near_duplicates.bands=3"], "near_duplicates.bands: 3 has no effect with deduplicate exact: set"),
        (["--steps.decontaminate=nowhere.jsonl"], "nowhere.jsonl"),
        (["--on_error=ignore"], "on_error: 'ignore' should be 'raise' or 'skip'"),
    ],
)
def test_settings_without_effect_are_faults(options, fault, build, capsys):
    assert build("shards", *options) == 2
    assert fault in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece"])
def test_a_tokenizer_is_trained_on_what_can_be_read(kind, inputs, tmp_path, capsys):
    (named, _), output = inputs, tmp_path / "bytes"
    options = [f"--kind={kind}", "--vocab_size=400", "--template=causal", f"--output={output}"]
    assert train_tokenizer.main([*named, *options, "--heldout_fraction=0.1"]) == 2
    assert "one.jsonl: line 26" in capsys.readouterr().err
    assert train_tokenizer.main([*named, *options, "--heldout_fraction=0.1", "--on_error=skip"]) == 0
    assert "cannot be read: 1 for: not JSON" in capsys.readouterr().out
    tokenizer, text = load_tokenizer(output), "  Zwölf\tБоксёр \U0001f600\n"
    assert kind != "byte_bpe" or tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
