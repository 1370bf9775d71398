"""The table and plot of fine-tuned variants, from runs as the commands leave them."""

import json
import re
import shlex

import pytest

from models.config import NeuronConfig
from pipeline.compare import main
from pipeline.config import load_run_config
from tests.launcher import ROOT

TASK = {"task": "own", "chosen_by": "accuracy", "num_timesteps": 4, "seeds": [0, 1], "rows": {"train": 9}}


def spread(*values):
    return {"mean": sum(values) / len(values), "spread": abs(values[0] - values[1]) / 2**0.5, "values": list(values)}


def write_variant(folder, name, tuned, scratch, spikes=None, entropy=5.5, **other):
    """The folders of a variant: a pretraining that ended at 3.25 nat, and two fine-tunings."""
    run = folder / name
    run.mkdir()
    losses = {step: {"masked_lm_loss": 5.0 - 0.35 * step, "unigram_entropy": entropy} for step in (0, 5)}
    records = [{"kind": "heldout", "step": step, **values} for step, values in losses.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "DONE").write_text("{}")
    for start, values in (("tuned", tuned), ("scratch", scratch)):
        summary = {"name": f"{name}-{start}", **TASK, **other}
        summary["metrics"] = {"validation": {"accuracy": spread(*values), "f1": spread(0.0, 0.1)}}
        summary["baseline"] = {"validation": {"accuracy": 0.5, "f1": 0.0}}
        if spikes:
            summary |= {"firing_rate": spread(0.5, 0.52), "spikes_per_token": spread(*spikes)}
        (folder / f"{name}-{start}").mkdir()
        (folder / f"{name}-{start}" / "results.json").write_text(json.dumps(summary))
    return ["--variant", name, str(run), *(str(folder / f"{name}-{start}") for start in ("tuned", "scratch"))]


@pytest.fixture
def variants(tmp_path):
    ours = write_variant(tmp_path, "ours", (0.7, 0.8), (0.6, 0.5), spikes=(1000, 1100))
    return [*ours, *write_variant(tmp_path, "ordinary", (0.9, 0.8), (0.5, 0.7))]


def test_the_table_has_what_pretraining_and_spikes_are_worth(variants, tmp_path, capsys):
    assert main([*variants, "--output", str(tmp_path / "out")]) == 0
    table = (tmp_path / "out" / "compare.md").read_text()
    assert capsys.readouterr().out == table + "\n"
    ours = "| ours | 4 | 3.250 | 0.7500 ± 0.0707 | 0.5500 ± 0.0707 | +0.2000 | 0.510 ± 0.014 | 1,050 ± 71 |"
    ordinary = "| ordinary | 4 | 3.250 | 0.8500 ± 0.0707 | 0.6000 ± 0.1414 | +0.2500 | - | - |"
    assert table.splitlines()[2:4] == [ours, ordinary]
    assert table.endswith("2 seed(s): 0, 1; the trivial answer's accuracy is 0.5000.\n")
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_where_test_rows_have_labels_variants_are_compared_by_them(variants, tmp_path):
    for path in tmp_path.glob("*/results.json"):
        summary = json.loads(path.read_text())
        summary["metrics"]["test"] = {"accuracy": spread(0.6, 0.6)}
        summary["baseline"]["test"] = {"accuracy": 0.25}
        path.write_text(json.dumps(summary))
    assert main([*variants, "--output", str(tmp_path / "out")]) == 0
    head, _, ours, *_, told = (tmp_path / "out" / "compare.md").read_text().splitlines()
    assert "accuracy, test" in head and "0.6000 ± 0.0000 | 0.6000 ± 0.0000 | +0.0000" in ours
    assert told.endswith("the trivial answer's accuracy is 0.2500.")


def test_what_is_not_alike_is_not_compared(variants, tmp_path, capsys):
    other = write_variant(tmp_path, "other", (0.7, 0.8), (0.6, 0.5), rows={"train": 8})
    assert main([*variants, *other, "--output", str(tmp_path / "out")]) == 2
    assert "other-tuned: rows is {'train': 8}, but {'train': 9} in ours-tuned" in capsys.readouterr().err
    other = write_variant(tmp_path, "masked", (0.7, 0.8), (0.6, 0.5), entropy=5.4)
    assert main([*variants, *other, "--output", str(tmp_path / "out")]) == 2
    assert (
        "masked was pretrained on other tokens (unigram entropy 5.4000) than ours (5.5000)" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("ours/DONE", "ours is no finished run: its command again goes on"),
        ("ours-scratch/results.json", "results.json does not exist: finish the fine-tuning of that name first"),
    ],
)
def test_runs_that_have_not_ended_are_named(variants, tmp_path, capsys, missing, told):
    (tmp_path / missing).unlink()
    assert main([*variants, "--output", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["demo", "encoder-base", "decoder-tiny", "decoder-124m", "decoder-7b"])
def test_the_script_can_pretrain_every_variant_of_any_recipe(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = re.findall('^compare "(.*)" \\S+ (.*)$', (ROOT / "launch/compare.sh").read_text(), re.MULTILINE)
    file = f"launch/recipes/{recipe}.yaml"
    neurons = {name: load_run_config(["--recipe", file, *shlex.split(options)]).model.neuron for name, options in lines}
    assert list(neurons) == ["ordinary", "released, T=4", "ours, T=1", "ours, T=4", "lif, T=4"]
    assert neurons["released, T=4"] == NeuronConfig(preset="released")
    ours = "decoder" if recipe.startswith("decoder") else None
    assert neurons["ours, T=4"] == NeuronConfig(preset=ours)
