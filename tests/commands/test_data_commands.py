"""The commands of data_prep, from raw text to verified shards, and what they say when something is wrong."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep import build_shards, train_tokenizer, units, verify_shards
from data_prep.manifest import Manifest
from data_prep.recipes import known_fields, load_settings
from data_prep.shards import ShardReader
from data_prep.sources import hash_share, is_heldout, read_unit
from data_prep.tokenization import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
HELDOUT = 0.2


@pytest.fixture
def corpus(tmp_path, prose):
    """Three files of JSON lines, one work unit each: 60 documents."""
    texts = prose(60)
    for number in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[number * 20 : (number + 1) * 20]]
        (tmp_path / f"{number}.jsonl").write_text("".join(lines))
    return [f"--input={tmp_path / f'{number}.jsonl'}" for number in range(3)]


@pytest.fixture
def tokenizer(tmp_path, corpus):
    """Arguments that name a tokenizer trained on the corpus."""
    folder = tmp_path / "tokenizer"
    assert train(corpus, folder) == 0
    return f"--tokenizer={folder}"


def train(corpus, output, *more, kind="wordpiece", vocab_size=256):
    arguments = [f"--kind={kind}", f"--vocab_size={vocab_size}", f"--heldout_fraction={HELDOUT}", f"--output={output}"]
    return train_tokenizer.main([*corpus, *arguments, *more])


def build(corpus, tokenizer, output, *more):
    arguments = ["--row_length=24", f"--heldout_fraction={HELDOUT}", "--rows_per_block=16", "--shard_megabytes=0.002"]
    return build_shards.main([*corpus, tokenizer, f"--output={output}", *arguments, *more])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_text_becomes_verified_shards(corpus, tokenizer, tmp_path, prose, capsys):
    output = tmp_path / "shards"
    assert build(corpus, tokenizer, output) == 0
    heldout = sum(is_heldout(text, HELDOUT) for text in prose(60))
    assert f"{output / 'train'}: {60 - heldout} documents, " in capsys.readouterr().out
    assert verify_shards.main([str(output)]) == 0
    assert capsys.readouterr().out == f"{output}: sound\n"
    counts = Manifest.load(output).counts
    assert (counts["train"].documents, counts["heldout"].documents) == (60 - heldout, heldout)
    assert 5 < heldout < 20
    assert not (output / ".build").exists()


def test_held_out_documents_are_in_no_training_row(corpus, tokenizer, tmp_path, prose):
    output = tmp_path / "shards"
    build(corpus, tokenizer, output, "--short_row_probability=0", "--random_next_probability=0")
    loaded = load_tokenizer(output / "tokenizer")

    def words(split):
        reader = ShardReader(output / split)
        ids = reader.read(np.arange(len(reader)))["ids"].ravel().tolist()
        return "".join(loaded.decode(ids, skip_special_tokens=True).lower().split())

    sentences = {split: [] for split in ("train", "heldout")}
    for text in prose(60):
        sentences["heldout" if is_heldout(text, HELDOUT) else "train"] += text.lower().split(". ")
    for split, other in (("train", "heldout"), ("heldout", "train")):
        only_other = set(sentences[other]) - set(sentences[split])
        found = words(split)
        assert not [sentence for sentence in only_other if "".join(sentence.split()) in found]


def test_small_pools_give_every_token_once(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "POOL_TOKENS", 300)
    monkeypatch.setattr(units, "BATCH_CHARACTERS", 1000)
    output = tmp_path / "shards"
    assert build(corpus, tokenizer, output) == 0
    reader = ShardReader(output / "train")
    rows = reader.read(np.arange(len(reader)))
    own = np.where(rows["next_sentence_label"] == 0, rows["length"] - 3, rows["first_length"] - 2)
    assert own.sum(dtype=int) == Manifest.load(output).counts["train"].tokens


def test_causal_rows_hold_every_document_whole(corpus, tmp_path, prose, monkeypatch):
    monkeypatch.setattr(units, "POOL_TOKENS", 500)
    folder, output = tmp_path / "tokenizer", tmp_path / "shards"
    assert train(corpus, folder, "--template=causal") == 0
    assert build(corpus, f"--tokenizer={folder}", output, "--layout=causal") == 0
    assert verify_shards.main([str(output)]) == 0
    counts, loaded, found = Manifest.load(output).counts, load_tokenizer(output / "tokenizer"), []
    for split in ("train", "heldout"):
        rows = ShardReader(output / split).read(np.arange(counts[split].rows))
        stream = [id for ids, length in zip(rows["ids"], rows["length"], strict=True) for id in ids[:length].tolist()]
        assert len(stream) == counts[split].tokens + 2 * counts[split].documents == counts[split].row_tokens
        assert stream[0] == loaded.bos_token_id and stream[-1] == loaded.eos_token_id
        found += loaded.decode(stream).replace("[CLS]", "").split("[SEP]")[:-1]
    assert sorted("".join(text.split()) for text in found) == sorted("".join(text.split()) for text in prose(60))
    assert sum(each.bytes for each in counts.values()) == sum(len(text.encode()) for text in prose(60))


def test_causal_rows_have_a_length_of_their_own_and_no_pairs(corpus, tokenizer, tmp_path, capsys):
    causal = ["--layout=causal", f"--output={tmp_path / 'shards'}", f"--heldout_fraction={HELDOUT}"]
    assert build_shards.main([*corpus, tokenizer, *causal]) == 2
    assert "has no end of text (eos_token)" in capsys.readouterr().err
    assert build_shards.main([*corpus, tokenizer, *causal, "--short_row_probability=0.2"]) == 2
    assert "short_row_probability: 0.2 has no effect on causal rows" in capsys.readouterr().err
    assert train(corpus, tmp_path / "causal", "--template=causal") == 0
    assert build_shards.main([*corpus, f"--tokenizer={tmp_path / 'causal'}", *causal]) == 0
    assert Manifest.load(tmp_path / "shards").row_length == 2048


def test_the_same_input_gives_the_same_bytes(corpus, tokenizer, tmp_path):
    for name in ("first", "second"):
        assert build(corpus, tokenizer, tmp_path / name) == 0
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_what_is_built_is_left_alone(corpus, tokenizer, tmp_path, capsys):
    output = tmp_path / "shards"
    build(corpus, tokenizer, output)
    before = times(output)
    for more in ([], ["--overwrite"]):
        assert build(corpus, tokenizer, output, *more) == 0
        assert f"{output} is built already with these settings: nothing to do" in capsys.readouterr().out
    assert times(output) == before


@pytest.mark.parametrize(
    ("killed_at", "expected"),
    [(2, [0, 1, 1, 2, 0, 1, 2]), (5, [0, 1, 2, 0, 1, 1, 2])],
    ids=["looking for duplicates", "building"],
)
def test_a_killed_build_goes_on_after_its_last_unit(corpus, tokenizer, tmp_path, monkeypatch, killed_at, expected):
    whole, output = tmp_path / "whole", tmp_path / "shards"
    build(corpus, tokenizer, whole)
    read = []

    def killed(unit, skipped=None):
        read.append(unit.number)
        for number, document in enumerate(read_unit(unit)):
            if len(read) == killed_at and number == 10:
                raise KeyboardInterrupt
            yield document

    monkeypatch.setattr(units, "read_unit", killed)
    with pytest.raises(KeyboardInterrupt):
        build(corpus, tokenizer, output)
    assert not (output / "manifest.json").exists()
    monkeypatch.setattr(units, "read_unit", lambda unit, skipped: read.append(unit.number) or read_unit(unit))
    assert build(corpus, tokenizer, output) == 0
    assert read == expected
    assert contents(output) == contents(whole)


def test_a_unit_whose_shard_or_record_is_gone_is_built_again(corpus, tokenizer, tmp_path, monkeypatch):
    output = tmp_path / "shards"
    monkeypatch.setattr(build_shards, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(corpus, tokenizer, output)
    monkeypatch.undo()
    (output / "train" / "train-000001-0000.tar").unlink()
    (output / ".build" / "unit-000002.json").write_text("{}")
    assert build(corpus, tokenizer, output) == 0
    assert verify_shards.main([str(output)]) == 0


def test_other_settings_are_refused_with_the_difference(corpus, tokenizer, tmp_path, capsys):
    output = tmp_path / "shards"
    build(corpus, tokenizer, output)
    before = contents(output)
    assert build(corpus, tokenizer, output, "--row_length=32", "--seed=5") == 2
    error = capsys.readouterr().err
    assert "row_length: 32, was 24" in error and "seed: 5, was 0" in error and "--overwrite" in error
    (tmp_path / "1.jsonl").write_text('{"text": "Another text now."}\n')
    assert build(corpus, tokenizer, output) == 2
    assert f"input {tmp_path / '1.jsonl'}: 1 file(s) of 30 bytes" in capsys.readouterr().err
    assert contents(output) == before
    assert build(corpus, tokenizer, output, "--row_length=32", "--overwrite") == 0
    assert Manifest.load(output).row_length == 32
    assert verify_shards.main([str(output)]) == 0


def test_an_unfinished_build_is_not_mixed_with_another(corpus, tokenizer, tmp_path, monkeypatch, capsys):
    output = tmp_path / "shards"
    monkeypatch.setattr(build_shards, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(corpus, tokenizer, output)
    monkeypatch.undo()
    assert build(corpus, tokenizer, output, "--seed=5") == 2
    assert "seed: 5, was 0" in capsys.readouterr().err
    assert build(corpus, tokenizer, output, "--seed=5", "--overwrite") == 0
    assert verify_shards.main([str(output)]) == 0


def test_damage_is_found_and_mended(corpus, tokenizer, tmp_path, capsys):
    output = tmp_path / "shards"
    build(corpus, tokenizer, output)
    path = output / "train" / "train-000001-0000.tar"
    os.truncate(path, 100)
    assert build(corpus, tokenizer, output) == 2
    assert f"{path}: 100 bytes, expected" in capsys.readouterr().err
    assert verify_shards.main([str(output)]) == 1
    assert f"{path}: 100 bytes, expected" in capsys.readouterr().out
    assert build(corpus, tokenizer, output, "--overwrite") == 0
    (output / "train" / "index.json").unlink()
    assert verify_shards.main([str(output)]) == 1
    assert verify_shards.main([str(output), "--rebuild-index"]) == 0


def _older_manifest(output):
    content = json.loads((output / "manifest.json").read_text())
    (output / "manifest.json").write_text(json.dumps({**content, "version": 0}))
    return "manifest.json: version 0, expected 4"


def _no_index(output):
    (output / "train" / "index.json").unlink()
    return "train/index.json does not exist"


def _another_tokenizer(output):
    (output / "tokenizer" / "tokenizer.json").write_text("{")
    return "tokenizer holds no tokenizer that transformers can load"


@pytest.mark.parametrize("spoil", [_older_manifest, _no_index, _another_tokenizer])
def test_a_damaged_or_older_folder_is_refused_and_then_overwritten(corpus, tokenizer, tmp_path, capsys, spoil):
    output = tmp_path / "shards"
    build(corpus, tokenizer, output)
    whole = contents(output)
    fault = spoil(output)
    assert build(corpus, tokenizer, output) == 2
    error = capsys.readouterr().err
    assert fault in error and "replace it by --overwrite" in error
    assert build(corpus, tokenizer, output, "--overwrite") == 0
    assert contents(output) == whole


def test_an_older_unfinished_build_is_refused_and_then_overwritten(corpus, tokenizer, tmp_path, monkeypatch, capsys):
    output = tmp_path / "shards"
    monkeypatch.setattr(build_shards, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(corpus, tokenizer, output)
    monkeypatch.undo()
    plan = output / ".build" / "plan.json"
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "version": 0}))
    assert build(corpus, tokenizer, output) == 2
    assert "plan.json: version 0, expected 4" in capsys.readouterr().err
    assert build(corpus, tokenizer, output, "--overwrite") == 0
    assert verify_shards.main([str(output)]) == 0


def test_files_of_others_are_not_touched(corpus, tokenizer, tmp_path, capsys):
    (tmp_path / "mine" / "train").mkdir(parents=True)
    for more in ([], ["--overwrite"]):
        assert build(corpus, tokenizer, tmp_path / "mine", *more) == 2
        assert "of another origin: choose another --output" in capsys.readouterr().err
        assert train(corpus, tmp_path / "mine", *more) == 2
        assert "of another origin: choose another --output" in capsys.readouterr().err
    assert list((tmp_path / "mine").rglob("*")) == [tmp_path / "mine" / "train"]
    for name in (".build/repositories", "train/1.txt"):
        (tmp_path / "theirs" / name).parent.mkdir(parents=True)
        (tmp_path / "theirs" / name).touch()
        assert build(corpus, tokenizer, tmp_path / "theirs", "--overwrite") == 2
        assert "of another origin: choose another --output" in capsys.readouterr().err
    assert (tmp_path / "theirs" / "train/1.txt").exists()


def test_all_faults_are_told_together(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("input: [none.txt]\nrow_lenth: 64\nrow_length: '64'\nheldout_fraction: 2\ntokenizer: nowhere\n")
    assert build_shards.main(["--recipe", str(recipe), "--seed=-1", "--foo=3", "--output"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: 9 faults in {recipe} and the command line:\n")
    for fault in [
        "output: has no value: write --output VALUE",
        "foo: unknown field, with value 3: a recipe has input, tokenizer, output",
        "input.0: input 'none.txt': none.txt does not exist",
        "tokenizer: tokenizer folder nowhere does not exist: train one by python -m data_prep.train_tokenizer",
        "output: missing: set it in the recipe, or by --output VALUE",
        "row_length: '64' should be a valid integer",
        "heldout_fraction: 2 should be less than 1",
        "seed: -1 should be greater than or equal to 0",
        "row_lenth: unknown field, with value 64: did you mean row_length?",
    ]:
        assert f"\n  {fault}" in error


@pytest.mark.parametrize(
    ("recipe", "message"), [("a: [", "is not YAML"), ("- a", "holds list"), (None, "No such file")]
)
def test_recipes_that_are_none(tmp_path, capsys, recipe, message):
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe)
    assert train_tokenizer.main(["--recipe", str(tmp_path / "recipe.yaml")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        ([], "input: missing"),
        ([""], "input.0: input '': the name is empty"),
        (["a.txt", "link.txt"], "input: 'link.txt' would read link.txt again, after 'a.txt': list every text once"),
        (["b.txt", "b.txt"], "input: 'b.txt' would read b.txt again, after 'b.txt'"),
        (["a.txt", "."], "input: '.' would read a.txt again, after 'a.txt'"),
    ],
)
def test_inputs_are_named_and_read_once(tmp_path, monkeypatch, capsys, names, fault):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("Text.")
    Path("link.txt").symlink_to("a.txt")
    inputs = [argument for name in names for argument in ("--input", name)]
    assert train_tokenizer.main([*inputs, "--kind=wordpiece", "--vocab_size=256", "--output=tokenizer"]) == 2
    assert capsys.readouterr().err.startswith(f"error: 1 fault in the command line:\n  {fault}")


def test_names_of_folders_are_not_empty(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert build(corpus, "--tokenizer=", "") == 2
    error = capsys.readouterr().err
    assert "error: 2 faults" in error
    for name in ("tokenizer", "output"):
        assert f"\n  {name}: '': String should have at least 1 character" in error
    assert train(corpus, "") == 2
    assert "\n  output: '': String should have at least 1 character" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_broken_input_is_one_line_without_a_traceback(tokenizer, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"body": 1}\n')
    assert build([f"--input={tmp_path / 'bad.jsonl'}"], tokenizer, tmp_path / "shards") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.endswith("bad.jsonl: line 2 (byte 14): no field 'text', only 'body'; set text_field")


def test_splits_without_documents_are_refused(tokenizer, tmp_path, prose, capsys):
    text = next(text for text in prose(60) if not is_heldout(text, HELDOUT))
    (tmp_path / "one.txt").write_text(text)
    corpus = [f"--input={tmp_path / 'one.txt'}"]
    assert build(corpus, tokenizer, tmp_path / "a") == 2
    assert f"heldout_fraction {HELDOUT} holds no document out: raise it, or give more text" in capsys.readouterr().err
    assert build(corpus, tokenizer, tmp_path / "a", "--heldout_fraction=0", "--overwrite") == 0
    (tmp_path / "blank.txt").write_text(" \n")
    assert build([f"--input={tmp_path / 'blank.txt'}"], tokenizer, tmp_path / "b") == 2
    assert "no document to train on" in capsys.readouterr().err


def test_a_tokenizers_text_must_leave_a_document_out(tmp_path, prose, capsys):
    texts = [text for text in prose(60) if not is_heldout(text, HELDOUT)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    enough = math.ceil(1e4 * min(map(hash_share, texts)) + 1) / 1e4
    corpus = [f"--input={tmp_path / 'all.jsonl'}"]
    assert train(corpus, tmp_path / "a") == 2
    told = f"error: heldout_fraction {HELDOUT} holds no document out: use {enough} or more, here and for the shards"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_decoders_tokenizer_that_puts_a_space_before_a_text_is_trained_anew(corpus, tmp_path, capsys):
    causal = {"kind": "sentencepiece", "vocab_size": 380}
    assert train(corpus, tmp_path / "a", "--template=causal", **causal) == 0
    record = json.loads((tmp_path / "a" / "training.json").read_text())
    assert record["origin"]["settings"].pop("prefix") is False
    (tmp_path / "a" / "training.json").write_text(json.dumps(record))
    assert train(corpus, tmp_path / "a", "--template=causal", **causal) == 2
    assert "prefix" in capsys.readouterr().err
    assert train(corpus, tmp_path / "a", "--template=causal", "--overwrite", **causal) == 0


@pytest.mark.parametrize(("kind", "vocab_size"), [("wordpiece", 256), ("sentencepiece", 380)])
def test_training_a_tokenizer_is_deterministic_and_idempotent(corpus, tmp_path, capsys, kind, vocab_size):
    for name in ("a", "b"):
        assert train(corpus, tmp_path / name, kind=kind, vocab_size=vocab_size) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (tmp_path / "a" / "sentencepiece.model").exists() == (kind == "sentencepiece")
    before = times(tmp_path / "a")
    assert train(corpus, tmp_path / "a", kind=kind, vocab_size=vocab_size) == 0
    assert "is trained already with these settings: nothing to do" in capsys.readouterr().out
    assert times(tmp_path / "a") == before
    assert build(corpus, f"--tokenizer={tmp_path / 'a'}", tmp_path / "shards") == 0
    assert verify_shards.main([str(tmp_path / "shards")]) == 0


def test_another_tokenizer_is_not_replaced_unasked(corpus, tokenizer, tmp_path, capsys):
    folder = tmp_path / "tokenizer"
    before = contents(folder)
    assert train(corpus, folder, "--lowercase", vocab_size=300) == 2
    error = capsys.readouterr().err
    assert "vocab_size: 300, was 256" in error and "lowercase: True, was False" in error
    assert contents(folder) == before
    assert train(corpus, folder, "--lowercase", "--overwrite", vocab_size=300) == 0
    assert len(load_tokenizer(folder)) == 300
    (folder / "tokenizer.json").write_bytes(before[Path("tokenizer.json")])
    for content, fault in ((None, "is not as it was saved"), ("{", "holds no tokenizer"), ("", "holds no tokenizer")):
        if content is not None:
            (folder / "tokenizer.json").write_text(content)
        assert train(corpus, folder, "--lowercase", vocab_size=300) == 2
        assert fault in capsys.readouterr().err
    (folder / "training.json").write_text("{}")
    assert train(corpus, folder, "--lowercase", vocab_size=300) == 2
    assert "training.json: origin: Field required" in capsys.readouterr().err
    assert train(corpus, folder, "--lowercase", "--overwrite", vocab_size=300) == 0
    assert len(load_tokenizer(folder)) == 300


def test_a_tokenizer_never_sees_what_is_held_out(tmp_path, prose):
    texts = [text + (" ж" if is_heldout(text + " ж", HELDOUT) else " ü") for text in prose(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train([f"--input={tmp_path / 'a.jsonl'}"], tmp_path / "tokenizer")
    vocabulary = load_tokenizer(tmp_path / "tokenizer").get_vocab()
    assert "ü" in vocabulary and "ж" not in vocabulary


def test_a_sample_of_the_documents_gives_another_vocabulary(corpus, tmp_path):
    for fraction in (1.0, 0.5):
        assert train(corpus, tmp_path / str(fraction), f"--sample_fraction={fraction}", kind="wordpiece") == 0
    whole, half = (load_tokenizer(tmp_path / str(fraction)).get_vocab() for fraction in (1.0, 0.5))
    assert whole != half


def test_a_tokenizer_that_saw_what_is_held_out_is_refused(corpus, tokenizer, tmp_path, capsys):
    assert build(corpus, tokenizer, tmp_path / "shards", "--heldout_fraction=0.3") == 2
    assert "was trained with 0.2, and so on documents that are to be held out" in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()


def test_a_tokenizer_without_special_tokens_is_refused_before_anything_is_written(corpus, tmp_path, capsys):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    plain.save_pretrained(tmp_path / "plain")
    assert build(corpus, f"--tokenizer={tmp_path / 'plain'}", tmp_path / "shards") == 2
    assert "has no token for cls, pad: add it and save again" in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()


def test_ids_of_a_vocabulary_with_gaps_are_whole(corpus, tmp_path, prose):
    words = {word for text in prose(60) for word in text.replace(".", " .").split()}
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    vocabulary |= {word: 70_000 + number for number, word in enumerate(sorted(words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path / "gaps")
    assert build(corpus, f"--tokenizer={tmp_path / 'gaps'}", tmp_path / "shards") == 0
    assert Manifest.load(tmp_path / "shards").vocab_size == 70_000 + len(words)
    reader = ShardReader(tmp_path / "shards" / "train")
    ids = reader.read(np.arange(len(reader)))["ids"]
    assert ids.dtype == np.uint32 and set(np.unique(ids)) <= set(vocabulary.values())


def test_the_demo_recipes_agree():
    folder = ROOT / "launch" / "recipes" / "data"
    tokenizer = load_settings(train_tokenizer.TokenizerSettings, ["--recipe", str(folder / "demo-tokenizer.yaml")], "")
    recipe = yaml.safe_load((folder / "demo.yaml").read_text())
    assert (recipe["tokenizer"], recipe["input"]) == (tokenizer.output, list(tokenizer.input))
    assert recipe["heldout_fraction"] == tokenizer.heldout_fraction


def test_the_commands_run_as_modules_and_explain_every_field():
    for command, settings in [
        ("train_tokenizer", train_tokenizer.TokenizerSettings),
        ("build_shards", build_shards.BuildSettings),
    ]:
        arguments = [sys.executable, "-m", f"data_prep.{command}", "--help"]
        output = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        words = " ".join(output.split())
        assert words.startswith(f"usage: python -m data_prep.{command} [--recipe FILE] [--field VALUE ...]")
        for field in known_fields(settings).values():
            head = f"{field.name}:" if field.is_section else f"--{field.name} VALUE"
            assert f"{head} {field.doc[:30]}" in words


def test_verifying_what_is_no_folder_of_shards_ends_with_2(tmp_path, capsys):
    assert verify_shards.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'manifest.json'} does not exist")
