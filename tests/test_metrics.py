import io
import json
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from models.amplitudes import SpikeStats
from models.config import NeuronConfig
from pipeline import metrics
from pipeline.metrics import Metrics, SpikeHealth, Throughput, cut_tensorboard, peak_memory_bytes, read_metrics


class RecordedStream(io.StringIO):
    """A standard error that remembers each write."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal
        self.writes = []

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.writes.append(text)
        return super().write(text)


class RecordedMonitor:
    def __init__(self):
        self.events = []

    def write_events(self, event_list):
        self.events += event_list


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets: clock[0] is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return now


def quiet(run_dir, **arguments):
    return Metrics(run_dir, **{"enabled": True, "total_steps": 10, "progress": False, **arguments})


def steps_in(run_dir):
    return [(record["kind"], record["step"]) for record in read_metrics(run_dir / "metrics.jsonl")]


def test_each_record_is_one_line_and_is_read_back(tmp_path):
    log = quiet(tmp_path)
    log.log_step(1, {"loss": 2.5, "firing_rate_by_site": {"layer0.qkv": 0.25}})
    log.log_evaluation(1, {"masked_lm_loss": 3.0})

    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert read_metrics(log.path) == [
        {"kind": "train", "step": 1, "loss": 2.5, "firing_rate_by_site": {"layer0.qkv": 0.25}},
        {"kind": "heldout", "step": 1, "masked_lm_loss": 3.0},
    ]


def test_nonfinite_numbers_are_valid_json_and_read_as_nan(tmp_path):
    log = quiet(tmp_path)
    log.log_step(1, {"loss": math.nan, "gradient_norm": math.inf, "by_site": {"a": -math.inf}})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(log.path.read_text(), parse_constant=refuse)["loss"] is None
    (record,) = read_metrics(log.path)
    assert all(math.isnan(value) for value in (record["loss"], record["gradient_norm"], record["by_site"]["a"]))


def test_a_resumed_run_has_each_step_once(tmp_path):
    log = quiet(tmp_path)
    for step in range(1, 6):
        log.log_step(step, {"loss": float(step)})
        log.log_evaluation(step, {"masked_lm_loss": math.nan})
    with open(log.path, "ab") as file:
        file.write(b'{"kind": "train", "st')

    resumed = quiet(tmp_path)
    resumed.cut_after(3)
    resumed.log_step(4, {"loss": 40.0})

    assert steps_in(tmp_path) == [(kind, step) for step in (1, 2, 3) for kind in ("train", "heldout")] + [("train", 4)]
    assert read_metrics(log.path)[-1]["loss"] == 40.0
    assert "NaN" not in log.path.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("begins_at", "shown"), [(21, [10, 20, 30]), (0, [30])])
def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path, begins_at, shown):
    for samples in ((10, 20, 30, 40), (30,)):
        with SummaryWriter(tmp_path) as writer:
            if samples == (30,):
                cut_tensorboard(writer, begins_at)
            for each in samples:
                writer.add_scalar("train/loss", float(each), each)
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [event.step for event in read.Scalars("train/loss")] == shown


def test_a_fresh_start_drops_what_an_earlier_one_left_and_needs_no_file(tmp_path):
    log = quiet(tmp_path)
    log.cut_after(None)
    log.log_evaluation(0, {"masked_lm_loss": 9.0})
    log.log_step(1, {"loss": 1.0})
    log.cut_after(0)
    assert steps_in(tmp_path) == [("heldout", 0)]
    log.cut_after(None)
    assert steps_in(tmp_path) == []


def test_a_torn_last_line_is_left_out_and_one_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1}\n{"kind": "tra')
    assert read_metrics(path) == [{"kind": "train", "step": 1}]
    path.write_bytes(b'{"kind": "tra\n{"kind": "train", "step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1"):
        read_metrics(path)


def test_other_ranks_write_nothing(tmp_path, capsys):
    monitor = RecordedMonitor()
    log = Metrics(tmp_path / "run", enabled=False, total_steps=1, progress=True, monitor=monitor)
    log.cut_after(None)
    log.log_step(1, {"loss": 1.0})
    log.log_evaluation(1, {"loss": 1.0})
    log.close()
    assert not (tmp_path / "run").exists()
    assert monitor.events == []
    assert capsys.readouterr() == ("", "")


def test_the_monitor_gets_every_number_at_the_samples_consumed(tmp_path):
    monitor = RecordedMonitor()
    log = quiet(tmp_path, monitor=monitor)
    log.log_step(2, {"loss": 1.5, "samples_consumed": 64, "firing_rate_by_site": {"layer0.qkv": 0.25}})
    log.log_evaluation(2, {"masked_lm_loss": 2.0, "samples_consumed": 64})
    assert ("train/loss", 1.5, 64) in monitor.events
    assert ("train/firing_rate_by_site/layer0.qkv", 0.25, 64) in monitor.events
    assert ("heldout/masked_lm_loss", 2.0, 64) in monitor.events


def test_without_a_terminal_each_step_is_one_write_of_one_line(tmp_path, monkeypatch, clock):
    stream = RecordedStream(terminal=False)
    monkeypatch.setattr(metrics.sys, "stderr", stream)
    log = quiet(tmp_path, progress=True)
    log.cut_after(2)
    clock[0] = 20.0
    log.log_step(4, {"loss": 5.5, "tokens_per_second": 12345.6, "firing_rate": 0.25})
    log.log_evaluation(4, {"masked_lm_loss": 6.0})
    assert stream.writes == [
        "step 4/10: loss 5.5000, 12,346 tokens/s, firing 0.250, left 01:00\n",
        "step 4/10 held out: masked_lm_loss 6.0000\n",
    ]


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
    stream = RecordedStream(terminal=True)
    monkeypatch.setattr(metrics.sys, "stderr", stream)
    log = quiet(tmp_path, progress=True)
    log.cut_after(None)
    log.log_step(5, {"loss": 5.5, "tokens_per_second": 100.0})
    log.log_evaluation(5, {"masked_lm_loss": 6.0})
    log.close()
    assert "step 5/10 |" in stream.getvalue()
    assert "loss 5.5000, 100 tokens/s, left" in stream.getvalue()
    assert "step 5/10 held out: masked_lm_loss 6.0000\n" in stream.getvalue()


def test_throughput_counts_neither_pauses_nor_earlier_intervals(clock):
    throughput = Throughput()
    throughput.add(600)
    clock[0] += 2.0
    with throughput.paused():
        clock[0] += 50.0
    throughput.add(400)
    clock[0] += 2.0
    assert throughput.values()["tokens_per_second"] == pytest.approx(250.0)
    throughput.add(30)
    clock[0] += 3.0
    assert throughput.values() == pytest.approx({"tokens_per_second": 10.0, "data_wait": 0.0})


def test_time_until_a_batch_comes_is_waiting_for_data(clock):
    throughput = Throughput()

    def slow_batches():
        for number in range(3):
            clock[0] += 2.0
            yield number

    for _ in throughput.waiting_for(slow_batches()):
        clock[0] += 6.0
    assert throughput.values()["data_wait"] == pytest.approx(0.25)
    clock[0] += 1.0
    assert throughput.values()["data_wait"] == 0.0


def test_peak_memory_is_in_bytes():
    assert 2**24 < peak_memory_bytes() < 2**42


SITES = ["layer0.qkv", "layer0.key"]


def site_stats(*, membrane=0.5, rate=0.4, saturated=0.1, timestep=2):
    """Statistics of two sites and timesteps over 1,000 elements each, sound but for layer0.key's at `timestep`."""
    sums = torch.tensor([500.0, 1000.0, 200.0, 200.0, 100.0], dtype=torch.float64).repeat(2, 2, 1)
    ill = [1000 * membrane, 1000, 500 * rate, 500 * rate, 1000 * saturated]
    sums[1, timestep - 1] = torch.tensor(ill, dtype=torch.float64)
    return SpikeStats(sums)


ELASTIC = NeuronConfig(frequency=2.0, amplitude="tracked", momentum=0.99)
FROZEN = NeuronConfig(frequency=2.0, amplitude="frozen")
OWN = NeuronConfig(frequency=1.4, site_frequencies={"key": 2.0})
AMPLITUDES = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("neuron", "ill", "told"),
    [
        (ELASTIC, {"rate": 0.01}, "fires at 1.0%: lower model.neuron.frequency"),
        (ELASTIC, {"rate": 0.97}, "fires at 97.0%: raise model.neuron.frequency"),
        (OWN, {"rate": 0.01}, "fires at 1.0%: lower model.neuron.site_frequencies.key"),
        (NeuronConfig(kind="lif"), {"rate": 0.01}, "fires at 1.0%: set model.neuron.kind elastic"),
        (ELASTIC, {"saturated": 0.7}, "is saturated at 70%: raise model.neuron.frequency"),
        (
            ELASTIC,
            {"membrane": 2.0},
            "has 0.25 times the amplitude that fits its membrane: lower model.neuron.momentum",
        ),
        (ELASTIC, {"membrane": 0.1}, "has 5 times the amplitude that fits its membrane: lower model.neuron"),
        (
            FROZEN,
            {"membrane": 2.0},
            "has 0.25 times the amplitude that fits its membrane: set model.neuron.amplitude t",
        ),
        (FROZEN, {"membrane": 2.0, "saturated": 0.9}, "has 0.25 times the amplitude"),
        (FROZEN, {"membrane": 2.0, "rate": 0.97}, "has 0.25 times the amplitude"),
        (FROZEN, {"membrane": 0.1, "rate": 0.01}, "has 5 times the amplitude"),
    ],
    ids=[
        *("silent", "busy", "silent by its own k", "silent lif", "saturated", "too small", "too large", "frozen"),
        *("saturated since too small", "busy since too small", "silent since too large"),
    ],
)
def test_a_site_that_hardly_works_is_named_once(neuron, ill, told):
    health = SpikeHealth(SITES, neuron)
    assert health.warnings(300, site_stats(), AMPLITUDES) == []
    (line,) = health.warnings(301, site_stats(**ill), AMPLITUDES)
    assert line.startswith(f"layer0.key, timestep 2, {told}") and line.endswith(", in a new run (--name)")
    assert health.warnings(302, site_stats(**ill), AMPLITUDES) == []


def test_tracked_amplitudes_have_time_to_settle():
    assert SpikeHealth(SITES, ELASTIC).warnings(299, site_stats(membrane=2.0), AMPLITUDES) == []
    assert SpikeHealth(SITES, FROZEN).warnings(1, site_stats(membrane=2.0), AMPLITUDES)
    assert SpikeHealth(SITES, ELASTIC).warnings(1, site_stats(rate=0.0), AMPLITUDES), "its amplitude fits all the same"


@pytest.mark.parametrize(
    ("site", "timestep", "remedy"),
    [
        ("layer0.qkv", 2, "raise model.neuron.leak"),
        ("layer0.qkv", 1, "set model.neuron.kind elastic"),
        ("layer0.value", 2, "set model.neuron.kind elastic"),
    ],
)
def test_a_leak_is_no_remedy_where_nothing_leaks(site, timestep, remedy):
    health = SpikeHealth(["layer0.mlp_up", site], NeuronConfig(kind="lif"))
    (line,) = health.warnings(1, site_stats(rate=0.0, timestep=timestep), torch.zeros(2, 2))
    assert line.startswith(f"{site}, timestep {timestep}, fires at 0.0%: {remedy}")


def test_only_elastic_neurons_have_amplitudes_to_look_at():
    ill = site_stats(saturated=0.9, membrane=50.0)
    assert SpikeHealth(SITES, NeuronConfig(kind="lif")).warnings(300, ill, AMPLITUDES) == []
    assert SpikeHealth([], NeuronConfig(kind="none")).warnings(300, SpikeStats.zeros(0, 1), torch.zeros(0, 1)) == []


def test_drift_is_from_the_frequency_of_the_site():
    neuron = NeuronConfig(frequency=2.0, site_frequencies={"key": 0.5}, amplitude="frozen")
    assert SpikeHealth(SITES, neuron).warnings(300, site_stats(membrane=0.5), AMPLITUDES) != []
    fitting = torch.tensor([[1.0, 1.0], [0.25, 0.25]])
    assert SpikeHealth(SITES, neuron).warnings(300, site_stats(membrane=0.5), fitting) == []


def test_sites_that_saw_nothing_are_not_ill():
    assert SpikeHealth(SITES, ELASTIC).warnings(300, SpikeStats.zeros(2, 2), AMPLITUDES) == []


def test_health_is_written_and_shown(tmp_path, monkeypatch):
    stream = RecordedStream(terminal=False)
    monkeypatch.setattr("sys.stderr", stream)
    log = quiet(tmp_path, progress=True)
    log.log_health(3, [])
    log.log_health(4, ["layer0.key, timestep 2, fires at 1.0%"])
    assert read_metrics(log.path) == [
        {"kind": "health", "step": 4, "warnings": ["layer0.key, timestep 2, fires at 1.0%"]}
    ]
    assert stream.writes == ["step 4/10 warning: layer0.key, timestep 2, fires at 1.0%\n"]
