"""What a run tells about itself: metrics.jsonl, DeepSpeed's monitor, progress on the terminal, health, speed, memory.

metrics.jsonl holds one JSON object a line, {"kind": "train" | "heldout" | "health", "step": int, ...}. Losses are in
nats per target, rates and accuracies are shares of 1. JSON has neither nan nor infinity: both become null, which is
read as nan.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tqdm import tqdm

from data_prep.files import atomic_file, write_json

if TYPE_CHECKING:  # reading a run's metrics stays light
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

    from models.amplitudes import SpikeStats
    from models.config import NeuronConfig

METRICS_FILE = "metrics.jsonl"
NONFINITE_FILE = "nonfinite.json"

Batch = TypeVar("Batch")

Values = Mapping[str, float | Mapping[str, float]]
"""What one line holds: numbers by name, or a table of numbers, as firing_rate_by_site is."""


class Monitor(Protocol):
    """The part of DeepSpeed's monitor that is used: engine.monitor."""

    def write_events(self, event_list: list[tuple[str, float, int]]) -> None: ...


class Metrics:
    """Writes a run's numbers as they arise: to the run's metrics.jsonl, to the monitor and to the terminal.

    Args:
        run_dir: the run's folder, made where it is missing.
        enabled: whether this process writes at all: rank 0 does, all others call the same methods without effect.
        total_steps: the step that training goes up to, for the time left.
        progress: show a bar on standard error, or one plain line a logged step where that is no terminal.
        monitor: DeepSpeed's; receives "train/<name>" and "heldout/<name>" over the values' samples_consumed.
    """

    def __init__(
        self, run_dir: Path, *, enabled: bool, total_steps: int, progress: bool = True, monitor: Monitor | None = None
    ) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.enabled = enabled
        self._monitor = monitor
        self._progress = _Progress(total_steps) if enabled and progress else None
        if enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def cut_after(self, step: int | None) -> None:
        """Before training goes on from `step`: drop the lines of later steps. None: a fresh start, drop all lines."""
        if self.enabled:
            _cut_after(self.path, step)
        if self._progress:
            self._progress.start(step or 0)

    def log_step(self, step: int, values: Values) -> None:
        """One line about training at optimizer step `step`."""
        self._log("train", step, values)
        if self._progress:
            self._progress.show_step(step, values)

    def log_evaluation(self, step: int, values: Values) -> None:
        """One line about the held-out rows, measured after optimizer step `step`."""
        self._log("heldout", step, values)
        if self._progress:
            self._progress.show_evaluation(step, values)

    def log_health(self, step: int, warnings: Sequence[str]) -> None:
        """One line with what SpikeHealth has found at optimizer step `step`; none where it has found nothing."""
        if self.enabled and warnings:
            self._write("health", step, {"warnings": list(warnings)})
        if self._progress:
            for warning in warnings:
                self._progress.show_warning(step, warning)

    def write_nonfinite(self, record: Mapping[str, Any]) -> Path:
        """Write down the step whose loss or gradient is not finite; returns the file."""
        path = self.path.with_name(NONFINITE_FILE)
        if self.enabled:
            write_json(path, _without_nonfinite(record))
        return path

    def close(self) -> None:
        """Leave the terminal to others. Every line is in the file already."""
        if self._progress:
            self._progress.close()

    def _log(self, kind: str, step: int, values: Values) -> None:
        if not self.enabled:
            return
        self._write(kind, step, values)
        if self._monitor is not None:
            samples = int(values["samples_consumed"])
            self._monitor.write_events([(name, value, samples) for name, value in _flatten(kind, values)])

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        record = _without_nonfinite({"kind": kind, "step": step, **values})
        line = json.dumps(record, allow_nan=False) + "\n"
        # Opened for each line: no handle to lose when the file is cut, and the line is out in one unbuffered write.
        with open(self.path, "ab", buffering=0) as file:
            file.write(line.encode())


class SpikeHealth:
    """Looks for sites whose neurons hardly work any more, and tells each fault of a site once (a process's life long).

    Args:
        site_names: of the rows of statistics and amplitudes.
        neuron: which neurons stand there; amplitudes and saturation are the elastic kind's alone.
    """

    LEAST_RATE, HIGHEST_RATE = 0.02, 0.95
    """Below, a site passes next to nothing on; above, next to nothing that tells one input from another."""

    MOST_SATURATED = 0.6
    """Share of elements with |m| > alpha, where no gradient passes."""

    MOST_DRIFT = 3.0
    """Times that an amplitude is larger or smaller than k * mean|m|, what calibrating now would give."""

    def __init__(self, site_names: Sequence[str], neuron: NeuronConfig) -> None:
        self._site_names = site_names
        self._neuron = neuron
        # In their first steps activations grow faster than tracked amplitudes follow, which is as it should be.
        is_tracked = neuron.kind == "elastic" and neuron.amplitude == "tracked"
        self._settled_at = math.ceil(3 / (1 - neuron.momentum)) if is_tracked else 0
        self._told: set[tuple[str, str]] = set()

    def warnings(self, step: int, stats: SpikeStats, amplitudes: Tensor) -> list[str]:
        """One line for each new fault: the site, the first timestep that has it, the value, and the remedy.

        `stats` are of one step over all ranks, `amplitudes` [sites, T] those that it leaves. Remedies are for a new
        run: they change what is trained.
        """
        if not self._site_names:
            return []
        rate, is_counted, found = stats.firing_rate, stats.sums[..., 1] > 0, []
        if self._neuron.kind == "elastic":
            drift = amplitudes.double() / self._fitting(stats)
            is_far = is_counted & ((drift > self.MOST_DRIFT) | (drift < 1 / self.MOST_DRIFT)) & drift.isfinite()
            is_counted = is_counted & ~is_far  # what follows from an amplitude that does not fit is told once
            if step >= self._settled_at:
                found += self._amplitude_faults(drift, is_far, stats.saturated_share, is_counted)
        found += self._tell(rate, is_counted & (rate < self.LEAST_RATE), "fires at {:.1%}: ", self._for_more_spikes)
        if step >= self._settled_at:
            is_busy = is_counted & (rate > self.HIGHEST_RATE)
            found += self._tell(rate, is_busy, "fires at {:.1%}: ", self._for_fewer_spikes)
        return found

    def _fitting(self, stats: SpikeStats) -> Tensor:
        """The amplitudes that calibrating now would give, [sites, T]."""
        k = [self._neuron.frequency_of(name) for name in self._site_names]
        return stats.mean_membrane.new_tensor(k)[:, None] * stats.mean_membrane

    def _amplitude_faults(self, drift: Tensor, is_far: Tensor, saturated: Tensor, is_fit: Tensor) -> list[str]:
        if self._neuron.amplitude == "frozen":
            remedy = "set model.neuron.amplitude tracked"
        else:
            remedy = "lower model.neuron.momentum or optimizer.learning_rate"
        is_saturated = is_fit & (saturated > self.MOST_SATURATED)
        found = self._tell(saturated, is_saturated, "is saturated at {:.0%}: ", self._for_fewer_spikes)
        return found + self._tell(
            drift, is_far, "has {:.2g} times the amplitude that fits its membrane: ", lambda site, t: remedy
        )

    def _for_more_spikes(self, site: str, t: int) -> str:
        return f"lower {self._frequency(site)}" if self._neuron.kind == "elastic" else self._for_lif(site, t, "raise")

    def _for_fewer_spikes(self, site: str, t: int) -> str:
        return f"raise {self._frequency(site)}" if self._neuron.kind == "elastic" else self._for_lif(site, t, "lower")

    def _frequency(self, site: str) -> str:
        """The field that has a site's k."""
        kind = site.rpartition(".")[2]
        own = f"site_frequencies.{kind}" if kind in self._neuron.site_frequencies else "frequency"
        return f"model.neuron.{own}"

    def _for_lif(self, site: str, t: int, way: str) -> str:
        """Of neurons without membrane, and at the first timestep, to which nothing leaks, only the input decides."""
        has_membrane = t > 0 and not site.endswith((".key", ".value"))
        return f"{way} model.neuron.leak" if has_membrane else "set model.neuron.kind elastic, which follows its input"

    def _tell(self, values: Tensor, is_ill: Tensor, text: str, remedy: Callable[[str, int], str]) -> list[str]:
        """`text`, filled in, for each site that is ill at some timestep and of which it has not been told."""
        lines = []
        for site in is_ill.any(1).nonzero().flatten().tolist():
            name, t = self._site_names[site], int(is_ill[site].nonzero()[0])
            if (name, told := text + remedy(name, t)) not in self._told:
                self._told.add((name, told))
                lines.append(f"{name}, timestep {t + 1}, {told.format(float(values[site, t]))}, in a new run (--name)")
        return lines


class Throughput:
    """Tokens per second of one process's clock, and the share of it spent waiting for data, read once a logged step."""

    def __init__(self) -> None:
        self._tokens = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    def add(self, tokens: int) -> None:
        """Count the tokens of one step, over all ranks."""
        self._tokens += tokens

    def waiting_for(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time until each comes counts as waiting."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent here, on an evaluation or a checkpoint, does not count."""
        paused = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - paused

    def values(self) -> dict[str, float]:
        """Both since the last call, from which a new interval begins."""
        now = time.perf_counter()
        seconds = max(now - self._started, 1e-9)
        values = {"tokens_per_second": self._tokens / seconds, "data_wait": self._waited / seconds}
        self._tokens, self._waited, self._started = 0, 0.0, now
        return values


def peak_memory_bytes() -> int:
    """The most memory this process has held: allocated on its GPU where it uses one, else resident."""
    import torch  # only here, so that reading a run's metrics stays light

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in the order written; null becomes nan and a torn last line is left out.

    Raises FileNotFoundError, and ValueError naming the first line that holds no record.
    """
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise ValueError(f"{path}, line {number}: not a record of metrics; remove the line, or restore the file")
    return records


def cut_tensorboard(writer: SummaryWriter, samples: int) -> None:
    """Have TensorBoard forget what earlier processes wrote of the samples from this number on: they come again."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    writer.file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step=samples)


def _cut_after(path: Path, step: int | None) -> None:
    if not path.exists():
        return
    kept = [] if step is None else [record for record in read_metrics(path) if record["step"] <= step]
    with atomic_file(path) as file:
        file.writelines(json.dumps(_without_nonfinite(record)).encode() + b"\n" for record in kept)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record on a line, or None where the line holds none."""
    try:
        record = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one, too
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record
    return _with_nan(record) if whole else None


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nonfinite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_nan(item) for name, item in value.items()}
    return math.nan if value is None else value


def _flatten(prefix: str, values: Values) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(f"{prefix}/{name}", value)
        else:
            yield f"{prefix}/{name}", value


class _Progress:
    """A bar on a terminal; elsewhere one whole line per write, so that the lines of several ranks never mix."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._first_step: int | None = None
        self._started = time.perf_counter()
        self._bar: tqdm | None = None

    def start(self, step: int) -> None:
        self._first_step = step
        self._started = time.perf_counter()
        if sys.stderr.isatty():
            layout = "step {n_fmt}/{total_fmt} |{bar}|{postfix}"
            self._bar = tqdm(total=self._total, initial=step, bar_format=layout, dynamic_ncols=True)

    def show_step(self, step: int, values: Values) -> None:
        if self._first_step is None:
            self.start(step)
        text = f"{_step_text(values)}, left {self._time_left(step)}"
        if self._bar is None:
            self._print(f"step {step}/{self._total}: {text}")
        else:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.refresh()

    def show_warning(self, step: int, text: str) -> None:
        self._print(f"step {step}/{self._total} warning: {text}")

    def show_evaluation(self, step: int, values: Values) -> None:
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if isinstance(value, float))
        self._print(f"step {step}/{self._total} held out: {numbers}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _print(self, line: str) -> None:
        if self._bar is None:
            sys.stderr.write(line + "\n")
        else:
            self._bar.write(line, file=sys.stderr)

    def _time_left(self, step: int) -> str:
        done = step - self._first_step
        if done <= 0:
            return "?"
        seconds_per_step = (time.perf_counter() - self._started) / done
        return tqdm.format_interval(seconds_per_step * (self._total - step))


def _step_text(values: Values) -> str:
    layout = {"loss": "loss {:.4f}", "tokens_per_second": "{:,.0f} tokens/s", "firing_rate": "firing {:.3f}"}
    return ", ".join(text.format(values[name]) for name, text in layout.items() if name in values)
