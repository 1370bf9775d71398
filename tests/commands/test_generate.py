"""The command that lets an exported decoder write: one prompt as it comes, files as JSON lines, and what it refuses."""

import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from data_prep.tokenizer_models import causal_tokenizer, train_sentencepiece
from models.amplitudes import calibrate_amplitudes
from models.auto import save_with_code
from models.config import SpikeLMConfig
from models.modeling import AUTO_CLASSES, SpikeLMForCausalLM, SpikeLMForMaskedLM
from pipeline import generate
from pipeline.generate import Search, batches_by_length, complete, encode_prompts, main, open_decoder, text_behind
from tests.tiny import make_model

POSITIONS = 48
ENDS = list(range(7, 400, 12))  # so many that texts end at different lengths
PROMPTS = ["The old river", "The green house sees number 7 of the stone.", "A", "Winter holds the garden and", "Some"]


@pytest.fixture(scope="module")
def decoder(prose, tmp_path_factory):
    """An exported decoder with random weights, its amplitudes calibrated, and 400 pieces that a call begins by <s>."""
    folder = tmp_path_factory.mktemp("exported") / "decoder"
    tokenizer = causal_tokenizer(train_sentencepiece(lambda: iter(prose(40)), 400, lowercase=False, prefix=False)[0])
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400}
    model = make_model(None, SpikeLMForCausalLM, family="llama", max_position_embeddings=POSITIONS, **shape)
    calibrate_amplitudes(model, {"input_ids": torch.randint(5, 400, (4, 32))})
    model.generation_config.eos_token_id = ENDS
    with pytest.MonkeyPatch.context() as patch:
        for registered in (SpikeLMConfig, SpikeLMForCausalLM):
            patch.setattr(registered, "_auto_class", registered._auto_class)  # taken back
        save_with_code(model, AUTO_CLASSES, folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(decoder, tmp_path):
    """A copy of the decoder's folder, to be damaged."""
    return shutil.copytree(decoder, tmp_path / "damaged")


def run_file(decoder, tmp_path, *options, lines=PROMPTS):
    """The records that the command makes of a file of prompts."""
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("\n".join(lines))
    output.unlink(missing_ok=True)
    assert main([str(decoder), "--prompts", str(prompts), "--output", str(output), *options]) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def expected_ids(model, encoded, **options):
    """What transformers generates for prompts of ids, as they are padded on the left."""
    length = max(map(len, encoded))
    rows = torch.tensor([[0] * (length - len(ids)) + ids for ids in encoded])
    found = model.generate(rows, attention_mask=(rows != 0).long(), pad_token_id=0, **options)[:, length:]
    return [[*ids[: next((n + 1 for n, each in enumerate(ids) if each in ENDS), len(ids))]] for ids in found.tolist()]


def test_one_prompts_text_is_shown_as_it_comes(decoder, monkeypatch, capsys):
    model, tokenizer = open_decoder(decoder)
    encoded = {prompt: tokenizer(prompt)["input_ids"] for prompt in PROMPTS}
    assert all(ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids for ids in encoded.values())
    longest, forwards, shown = {}, [], []
    for prompt, ids in encoded.items():
        longest[prompt] = expected_ids(model, [ids], max_new_tokens=30)[0]
    prompt, new = max(longest.items(), key=lambda item: len(item[1]))
    expected = tokenizer.decode(encoded[prompt] + new, skip_special_tokens=True)
    assert len(new) > 8 and " " in expected.removeprefix(prompt)

    forward, write = SpikeLMForCausalLM.forward, sys.stdout.write

    def count_and_forward(*arguments, **options):
        forwards.append(1)
        return forward(*arguments, **options)

    def remember_and_write(text):
        shown.extend([len(forwards)] if text.strip() else [])
        return write(text)

    monkeypatch.setattr(SpikeLMForCausalLM, "forward", count_and_forward)
    monkeypatch.setattr(sys.stdout, "write", remember_and_write)
    capsys.readouterr()
    assert main([str(decoder), "--prompt", prompt, "--max-new-tokens", "30"]) == 0
    out, err = capsys.readouterr()
    assert out == expected + "\n" and out.startswith(prompt)
    assert len(forwards) == len(new)
    assert any(0 < count < len(new) for count in shown)  # words came before the last token
    assert re.fullmatch(rf"{len(new)} new tokens, [\d,.]+ tokens/s, [\d,]+ spikes per token\n", err)


def test_a_file_becomes_json_lines_in_its_order(decoder, tmp_path, capsys):
    records = run_file(decoder, tmp_path, "--batch-size", "2", "--max-new-tokens", "20")
    told = capsys.readouterr().err
    assert [record["prompt"] for record in records] == PROMPTS
    model, tokenizer = open_decoder(decoder)
    encoded = encode_prompts(tokenizer, PROMPTS, POSITIONS)
    batches = batches_by_length(encoded, 2)
    lengths = [[len(encoded[number]) for number in batch] for batch in batches]
    assert [len(batch) for batch in batches] == [2, 2, 1] and sum(lengths, []) == sorted(map(len, encoded))
    for batch in batches:
        new = expected_ids(model, [encoded[number] for number in batch], max_new_tokens=20)
        for number, ids in zip(batch, new, strict=True):
            assert records[number]["text"] == text_behind(tokenizer, encoded[number], ids)
            assert records[number]["tokens"] == len(ids)
        assert len({(records[n]["tokens_per_second"], records[n]["spikes_per_token"]) for n in batch}) == 1
    assert len({record["tokens"] for record in records}) > 2 and min(record["tokens"] for record in records) < 20
    assert told.startswith(f"{sum(record['tokens'] for record in records)} new tokens, ")


def test_a_text_goes_on_exactly_where_its_prompt_ends(decoder):
    _, tokenizer = open_decoder(decoder)
    ids = tokenizer("The old river holds")["input_ids"]
    assert text_behind(tokenizer, ids[:3], ids[3:]) == "The old river holds"[len(tokenizer.decode(ids[1:3])) :]
    for cut in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[:cut], skip_special_tokens=True)
        assert before + text_behind(tokenizer, ids[:cut], ids[cut:]) == "The old river holds"


@pytest.mark.parametrize("lines", [PROMPTS[:1], PROMPTS[:3]], ids=["one", "three"])
def test_spikes_per_token_are_those_of_every_token_seen(decoder, tmp_path, lines):
    (record, *_) = run_file(decoder, tmp_path, "--max-new-tokens", "12", "--batch-size", "3", lines=lines)
    model, tokenizer = open_decoder(decoder)
    encoded = [tokenizer(line)["input_ids"] for line in lines]
    length = max(map(len, encoded))
    rows = torch.tensor([[0] * (length - len(ids)) + ids for ids in encoded])
    found = model.generate(rows, attention_mask=(rows != 0).long(), pad_token_id=0, max_new_tokens=12)[:, :-1]
    mask = torch.ones_like(found)
    mask[:, :length] = rows != 0
    with torch.no_grad():
        sums = model(found, mask).spike_stats
    assert record["spikes_per_token"] == pytest.approx(float(sums[..., 2:4].sum() / mask.sum()), rel=1e-3)
    sites_and_widths = 4 * 2 * (16 + 8 + 8 + 16 + 16 + 32)
    assert 0.1 * sites_and_widths < record["spikes_per_token"] < 0.9 * sites_and_widths


def test_an_ordinary_model_has_no_spikes(damaged, tmp_path, capsys):
    model = make_model(
        {"kind": "none"}, SpikeLMForCausalLM, family="llama", vocab_size=400, max_position_embeddings=POSITIONS
    )
    model.save_pretrained(damaged)
    (record,) = run_file(damaged, tmp_path, "--max-new-tokens", "3", lines=["The"])
    assert record["spikes_per_token"] is None
    assert capsys.readouterr().err.endswith("tokens/s, no spikes\n")


def test_sampling_follows_the_seed(decoder, tmp_path):
    texts = [
        [record["text"] for record in run_file(decoder, tmp_path, *options, "--num-return-sequences", "2")]
        for options in (
            ["--temperature", "1.5", "--seed", "1"],
            ["--temperature", "1.5", "--seed", "1"],
            ["--temperature", "1.5", "--seed", "2"],
            ["--top-k", "1"],
            ["--top-p", "0.0001"],
            ["--temperature", "0.0001"],
        )
    ]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 2 * len(PROMPTS)
    greedy = [record["text"] for record in run_file(decoder, tmp_path)]
    assert texts[3] == texts[4] == texts[5] == [text for text in greedy for _ in range(2)]


def test_beams_give_the_best_texts_of_each_prompt(decoder, tmp_path, capsys):
    options = ["--num-beams", "3", "--num-return-sequences", "2", "--max-new-tokens", "9"]
    records = run_file(decoder, tmp_path, *options, "--batch-size", "9")
    assert [record["prompt"] for record in records] == [prompt for prompt in PROMPTS for _ in range(2)]
    model, tokenizer = open_decoder(decoder)
    encoded = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    order = batches_by_length(encoded, 9)[0]
    new = expected_ids(model, [encoded[n] for n in order], num_beams=3, num_return_sequences=2, max_new_tokens=9)
    for place, number in enumerate(order):
        found = [record["text"] for record in records[2 * number : 2 * number + 2]]
        assert found == [text_behind(tokenizer, encoded[number], ids) for ids in new[2 * place : 2 * place + 2]]
        assert new[2 * place] != new[2 * place + 1]
    capsys.readouterr()
    assert main([str(decoder), "--prompt", PROMPTS[0], "--num-beams", "3", "--max-new-tokens", "9"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == PROMPTS[0]


def test_prompts_come_from_a_field_of_json_lines(decoder, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"question": each, "id": 1}) + "\n" for each in PROMPTS[:2]) + "\n")
    arguments = [str(decoder), "--prompts", str(prompts), "--max-new-tokens", "2"]
    assert main([*arguments, "--field", "question"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in records] == PROMPTS[:2]
    assert main(arguments) == 2
    expected = f"error: {prompts}, line 1: no JSON object with a text as its 'prompt': mend it, or name another --field"
    assert capsys.readouterr().err == expected + "\n"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", None])
def test_the_weights_have_the_type_asked_for(decoder, damaged, dtype):
    SpikeLMForCausalLM.from_pretrained(decoder).to(torch.bfloat16).save_pretrained(damaged)
    model, tokenizer = open_decoder(damaged, dtype=dtype)
    assert model.dtype == getattr(torch, dtype or "bfloat16") and not model.training
    assert model.model.stack.amplitudes.dtype == torch.float32
    (((new,),), work) = complete(model, [tokenizer("The")["input_ids"]], Search(max_new_tokens=4))
    assert work.tokens == len(new) > 0


def test_fewer_timesteps_are_the_first_ones(decoder, tmp_path):
    model, _ = open_decoder(decoder, num_timesteps=2)
    whole, _ = open_decoder(decoder)
    assert model.config.num_timesteps == 2 and whole.config.num_timesteps == 4
    assert torch.equal(model.model.stack.amplitudes, whole.model.stack.amplitudes[:, :2])
    half, full = (run_file(decoder, tmp_path, *options) for options in (["--num-timesteps", "2"], []))
    assert [record["text"] for record in half] != [record["text"] for record in full]
    assert 0.3 < half[0]["spikes_per_token"] / full[0]["spikes_per_token"] < 0.7


# What is refused


def error_of(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


LONG = "The old river sees number 7 of the stone. " * 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--prompt", LONG],
            r"prompt 1 \('The old river sees n'\) has \d+ tokens, the model 48 positions: shorten it$",
        ),
        (
            ["--prompt", "The", "--max-new-tokens", "46"],
            "the longest prompt has 3 tokens, the model 48 positions: ask for 45",
        ),
        (["--prompt", "A", "--num-return-sequences", "3"], "--num-return-sequences 3: this search finds 1: sample by"),
        (["--prompt", "A", "--num-beams", "2", "--num-return-sequences", "3"], "this search finds 2: .*--num-beams 3"),
        (["--prompt", "A", "--seed", "3"], "--seed 3: nothing is drawn: give --temperature"),
        (["--prompt", "A", "--field", "text"], "--field text: only a .jsonl file of --prompts has fields"),
        (["--prompt", "A", "--batch-size", "3"], "--batch-size 3: there is one prompt"),
        (["--prompt", "A", "--device", "abacus"], "--device abacus: .*: use another, as cpu or cuda$"),
        (["--prompt", "A", "--device", "cuda:99"], "--device cuda:99: .*: use another, as cpu or cuda$"),
        (
            ["--prompt", "A", "--num-timesteps", "5"],
            "num_timesteps is 5, but .* 4: use 1 to 4",
        ),
        (["--prompt", "A", "--output", __file__], f"--output {__file__} exists: name another file$"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_options_that_cannot_work_are_refused(decoder, capsys, options, message):
    assert re.search(message, error_of(capsys, decoder, *options).strip())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b" \n\n", "p.txt holds no prompt: write one a line"),
        ("p.txt", b"", "p.txt holds no prompt: write one a line"),
        ("p.txt", None, "p.txt cannot be read: .*No such file"),
        ("p.txt", b"\xff\xfe", "p.txt cannot be read: .*: give a file of UTF-8 text"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": 3}', "p.jsonl, line 3: no JSON object with a text as its 'prompt'"),
        ("p.jsonl", b'["a"]', "p.jsonl, line 1: no JSON object"),
        ("p.jsonl", b"text", "p.jsonl, line 1: no JSON object"),
        (
            "p.jsonl",
            rb'{"prompt": "\ud800"}',
            r"prompt 1 \('\\ud800'\) holds half a character, or bytes that are no UTF-8",
        ),
        ("p.txt", b"The\n" + LONG.encode(), r"prompt 2 \('The old river sees n'\) has \d+ tokens"),
    ],
)
def test_files_without_prompts_are_refused(decoder, tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert re.search(message, error_of(capsys, decoder, "--prompts", path))


def test_an_encoder_is_refused(damaged, capsys):
    make_model({"kind": "none"}, SpikeLMForMaskedLM, vocab_size=400).save_pretrained(damaged)
    message = r"holds an encoder \(family bert\), which writes no text: give a decoder"
    assert re.search(message, error_of(capsys, damaged, "--prompt", "The"))


def test_folders_without_a_decoder_are_refused(damaged, tmp_path, capsys):
    def refused(message):
        assert re.search(message, error_of(capsys, damaged, "--prompt", "The"))

    weights = load_file(damaged / "model.safetensors")
    uncalibrated = {**weights, "model.stack.calibrated": torch.tensor(False)}
    lacking = {name: tensor for name, tensor in weights.items() if name != "model.stack.norm.weight"}
    save_file(uncalibrated, damaged / "model.safetensors", {"format": "pt"})
    refused("is not calibrated: export one that was trained")
    save_file(lacking, damaged / "model.safetensors", {"format": "pt"})
    refused("the weights in .* lack model.stack.norm.weight: export the model again")
    (damaged / "model.safetensors").write_bytes(b"torn")
    refused("the weights in .* do not fit its config.json")
    (damaged / "model.safetensors").unlink()
    refused("no file named")
    make_model(None, SpikeLMForCausalLM, family="llama", vocab_size=300).save_pretrained(damaged)
    refused("the tokenizer has 400 ids, the model 300: they are not of one export")
    (damaged / "tokenizer.json").unlink()
    refused("holds no tokenizer that transformers can load")
    LlamaConfig().save_pretrained(damaged)
    refused("holds a model of type llama, not spikelm")
    (damaged / "config.json").unlink()
    refused("there is no model in .*damaged: give a folder that pipeline.export has made")
    shutil.rmtree(damaged)
    refused("there is no model in .*damaged: give a folder")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--prompt", "a", "--prompts", "b"],
        ["--prompt", "a", "--top-p", "1.5"],
        ["--prompt", "a", "--temperature", "0"],
        ["--prompt", "a", "--temperature", "nan"],
        ["--prompt", "a", "--top-k", "0"],
        ["--prompt", "a", "--max-new-tokens", "many"],
        ["--prompt", "a", "--dtype", "int8"],
    ],
    ids=" ".join,
)
def test_the_command_line_names_what_is_wrong_with_it(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(["folder", *arguments])
    assert end.value.code == 2 and "error: " in capsys.readouterr().err


def test_ctrl_c_leaves_the_texts_of_finished_batches(decoder, tmp_path, monkeypatch, capsys):
    whole = run_file(decoder, tmp_path, "--batch-size", "2", "--max-new-tokens", "4")
    complete = generate.complete
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return complete(*arguments)

    monkeypatch.setattr(generate, "complete", interrupted)
    output = tmp_path / "interrupted.jsonl"
    arguments = [str(decoder), "--prompts", str(tmp_path / "prompts.txt"), "--output", str(output)]
    assert main([*arguments, "--batch-size", "2", "--max-new-tokens", "4"]) == 130
    texts = [(record["prompt"], record["text"]) for record in map(json.loads, output.read_text().splitlines())]
    assert texts == [pair for pair in ((each["prompt"], each["text"]) for each in whole) if pair in texts]
    told = capsys.readouterr().err
    assert len(texts) == 4 and "ended early: the texts of 4 of 5 prompts are written" in told
    assert "Traceback" not in told


def test_ctrl_c_ends_without_a_traceback(decoder, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "show", interrupt)
    assert main([str(decoder), "--prompt", "The"]) == 130
    assert capsys.readouterr().err == "\n"
