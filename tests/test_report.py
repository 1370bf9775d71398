import math

import pytest
import yaml

from pipeline import report
from pipeline.metrics import Metrics

ENTROPY = 6.0
SITES = {"layer0.qkv": 0.1, "layer0.mlp_up": 0.3}


def write_run(folder, last_loss, *, spiking=True, finished=True, last_step=20, entropy=ENTROPY):
    """A run with a held-out loss of 8 at step 0 and `last_loss` at `last_step`."""

    def spikes(step):
        return {"firing_rate": 0.2 + step / 1000, "firing_rate_by_site": SITES} if spiking else {}

    log = Metrics(folder, enabled=True, total_steps=last_step, progress=False)
    targets = {"unigram_entropy": entropy}
    log.log_evaluation(0, {"masked_lm_loss": 8.0, "masked_lm_accuracy": 0.0, **targets, **spikes(0)})
    for step in range(5, last_step + 1, 5):
        log.log_step(step, {"masked_lm_loss": last_loss, "tokens_per_second": 1000.0 + step, **spikes(step)})
    last = {"masked_lm_loss": last_loss, "masked_lm_accuracy": 0.25}
    log.log_evaluation(last_step, {**last, **targets, **spikes(last_step)})
    if finished:
        (folder / "DONE").touch()
    return folder


def line_of(text, name):
    """The cells of the table's line that begins with `name`."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(name)]
    return line.strip()[len(name) :].split()


def test_the_table_gives_losses_lines_to_beat_rates_and_speed(tmp_path, capsys):
    run = write_run(tmp_path / "demo", 5.0)
    twin = write_run(tmp_path / "twin", 5.5, spiking=False)
    assert report.main([str(run), "--compare", str(twin)]) == 0

    text = capsys.readouterr().out
    assert text.startswith(f"{run}: finished, at step 20\n")
    assert line_of(text, "masked-token loss (nat/token)") == ["8.0000", "5.0000"]
    assert line_of(text, "unigram entropy of the same targets") == ["6.0000", "below", "by", "1.0000"]
    assert line_of(text, "twin, step 20") == ["5.5000", "below", "by", "0.5000"]
    assert line_of(text, "masked-token accuracy") == ["0.0%", "25.0%"]
    assert line_of(text, "firing rate, mean over sites") == ["0.200", "0.220"]
    assert line_of(text, "lowest to highest site") == ["0.100", "to", "0.300"] * 2
    assert line_of(text, "speed")[0] == "1,012"
    assert line_of(text, "plot") == [str(run / "plots" / "curves.png")]
    assert "tensorboard --logdir" in text


@pytest.mark.parametrize("loss", [5.5, 7.0, math.nan])
def test_a_loss_that_is_not_below_a_line_is_called_so(tmp_path, capsys, loss):
    run = write_run(tmp_path / "demo", loss)
    twin = write_run(tmp_path / "twin", 5.5, spiking=False)
    report.main([str(run), "--compare", str(twin)])
    text = capsys.readouterr().out
    assert "NOT" in line_of(text, "twin, step 20")
    assert ("NOT" in line_of(text, "unigram entropy of the same targets")) == (loss != 5.5)


def test_an_unfinished_run_says_so_and_how_to_go_on(tmp_path, capsys):
    report.main([str(write_run(tmp_path / "demo", 5.0, finished=False))])
    text = capsys.readouterr().out
    assert "NOT finished, at step 20" in text
    assert "next: wait for demo, or start what no longer runs again" in text
    assert line_of(text, "checkpoint") == ["none", "yet"]


def test_the_ends_of_phases_are_told_and_drawn(tmp_path, capsys, monkeypatch):
    import matplotlib.pyplot

    figures = []
    monkeypatch.setattr(matplotlib.pyplot, "close", figures.append)
    run = write_run(tmp_path / "demo", 5.0)
    phases = [{"steps": 8, "sample_length": 32}, {"steps": 4, "sample_length": 64}, {"steps": 9, "sample_length": 96}]
    (run / "recipe.yaml").write_text(yaml.safe_dump({"data": {"phases": phases}}))
    report.main([str(run)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  phase")]
    assert [" ".join(line) for line in lines] == [
        f"phase to step {end} on samples of {length} tokens" for end, length in ((8, 32), (12, 64), (21, 96))
    ]
    for axes in figures[0].axes:
        dotted = [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == ":"]
        assert dotted == [8, 12], "the last one has not ended"


def test_the_newest_checkpoint_is_named(tmp_path, capsys):
    run = write_run(tmp_path / "demo", 5.0)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "latest").write_text("step00000020\n")
    report.main([str(run)])
    assert line_of(capsys.readouterr().out, "checkpoint") == [str(run / "checkpoints" / "step00000020")]


def test_a_twin_trained_for_fewer_steps_is_remarked(tmp_path, capsys):
    run = write_run(tmp_path / "demo", 5.0)
    twin = write_run(tmp_path / "twin", 5.5, last_step=10)
    report.main([str(run), "--compare", str(twin)])
    assert "the twin stands at step 10: train both equally long" in capsys.readouterr().out


def test_a_run_without_spikes_is_reported_and_drawn(tmp_path, capsys):
    run = write_run(tmp_path / "twin", 5.0, spiking=False)
    assert report.main([str(run)]) == 0
    assert "no spiking layers" in capsys.readouterr().out
    assert (run / "plots" / "curves.png").exists()


def test_the_plot_holds_curves_lines_to_beat_and_firing_rates(tmp_path, monkeypatch):
    import matplotlib.pyplot

    run = report.load_run(write_run(tmp_path / "demo", 5.0))
    twin = report.load_run(write_run(tmp_path / "twin", 5.5, spiking=False))
    figures = []
    monkeypatch.setattr(matplotlib.pyplot, "close", figures.append)
    report.draw(run, twin, tmp_path / "curves.png")

    losses, rates = figures[0].axes
    heights = {line.get_label().replace("\n", " "): line.get_ydata()[-1] for line in losses.get_lines()}
    assert heights == {
        "training": 5.0,
        "held-out": 5.0,
        "unigram entropy 6.000": 6.0,
        "twin: held-out": 5.5,
        "its last 5.500": 5.5,
    }
    assert {line.get_label() for line in rates.get_lines()} == {"qkv", "mlp up", "mean"}
    assert "nat/token" in losses.get_ylabel() and "step" in rates.get_xlabel()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_faults_are_one_line_without_traceback(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    untested = tmp_path / "untested"
    Metrics(untested, enabled=True, total_steps=9, progress=False).log_step(1, {"masked_lm_loss": 8.0})
    tuned = tmp_path / "tuned/seed-0"
    metrics = Metrics(tuned, enabled=True, total_steps=9, progress=False)
    metrics.log_step(1, {"classification_loss": 0.7})
    metrics.log_evaluation(1, {"classification_loss": 0.7, "accuracy": 0.5})
    faults = {
        (tuned,): f"is a fine-tuning, which is measured by its task: see {tmp_path}/tuned/results.json",
        (tmp_path / "missing",): "there is no run in",
        (empty,): "there is no run in",
        (untested,): "holds no held-out loss of tokens yet",
        (write_run(tmp_path / "a", 5.0), "--compare", write_run(tmp_path / "b", 5.0, entropy=6.5)): "on other targets",
    }
    for arguments, message in faults.items():
        assert report.main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_faults_of_neurons_are_listed(tmp_path, capsys):
    run = write_run(tmp_path / "demo", 5.0)
    assert report.main([str(run)]) == 0
    assert "faults of neurons" not in capsys.readouterr().out
    faults = ("fires at 97.0%: raise model.neuron.frequency", "is saturated at 70%: raise model.neuron.frequency")
    metrics = Metrics(run, enabled=True, total_steps=20, progress=False)
    metrics.log_health(15, [f"layer{site}.qkv, timestep 1, {fault}" for site in (0, 1) for fault in faults])
    metrics.log_health(16, [f"layer0.qkv, timestep 2, {faults[0].replace('97.0', '97.5')}"])  # of a run that went on
    assert report.main([str(run)]) == 0
    told = capsys.readouterr().out
    assert line_of(told, "faults of neurons") == ["4"]
    assert f"from step 15: layer0.qkv, timestep 1, {faults[0]}" in told
