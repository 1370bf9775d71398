"""Kills from outside: SIGKILL to a random process of a training at a random time, and then the same command again.

    python -m tests.chaos.chaos --kills 50 --seed 7

Two ranks train chaos.yaml. After each kill everything of the job must be gone within a minute, and the next job must go
on from the newest checkpoint. Where a run reaches its last step, it must be what a run is that nobody disturbed: the
same bits in its last checkpoint, each step once in metrics.jsonl, nothing else in its folder. Then the next run begins.
"""

import argparse
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import psutil

from pipeline.checkpoint import LATEST, MANIFEST
from pipeline.config import load_run_config
from pipeline.metrics import METRICS_FILE, read_metrics
from pipeline.run_folder import DONE, LOCK
from tests.bench.tables import format_table, median_and_spread
from tests.chaos.job import Job
from tests.distributed.modes import AS_ROOT
from tests.distributed.runs import assert_same_end
from tests.launcher import ROOT, deepspeed_command, free_port

RECIPE = "tests/chaos/chaos.yaml"
GONE_SECONDS = 60.0
"""Within which nothing is left of a job after a kill."""
END_SECONDS = 1200.0
"""Within which a job that nobody disturbs ends."""
STARTS_UNDER_FIRE = 4.0
"""Kills fall into so many times the time that a job takes to start: in three of four it trains by then."""
PATIENCE = 5
"""So many faults end the whole; so many kills that miss are bad luck."""

PHASES = ("launching", "starting", "loading", "stepping", "evaluating", "saving", "finishing")
"""Before there is a rank; before rank 0 holds the run's folder; before it says where it starts; the loop; the end."""
START = re.compile(r"resuming from \S*step(\d+)|starting afresh")
VOLATILE = ("tokens_per_second", "data_wait", "peak_memory_bytes")


@dataclass(frozen=True)
class Hit:
    """A kill: who, when, in the middle of what, and what came of it."""

    launcher: str
    victim: str
    seconds: float
    phase: str
    start: int | None
    """The step that the job started from; None where it did not come to say so."""
    gone: float | None
    code: int | None

    def __str__(self):
        start = "not yet at work" if self.start is None else f"from step {self.start}"
        gone = "NOT GONE" if self.gone is None else f"gone after {self.gone:.1f} s, exit code {self.code}"
        return f"{self.victim:<11} by {self.launcher:<11} at {self.seconds:5.1f} s, {self.phase}, {start}; {gone}"


class Watch:
    """Tells from a run's files and a job's output where the job is. To be made before the job starts."""

    def __init__(self, run, config, log):
        self.run = run
        self.config = config
        self.newest = max(_sealed(run), default=0)
        """The step of the newest whole checkpoint that the job finds."""
        self._log = log
        self._found = _steps(run)

    def saved(self):
        """The step that `latest` names; 0 where there is none."""
        path = self.run / "checkpoints" / LATEST
        return int(path.read_text().removeprefix("step")) if path.exists() else 0

    def start(self):
        """The step that the job says it starts from; None while it says nothing."""
        found = START.search(self._log.read_text(errors="replace"))
        return found and int(found[1] or 0)

    def phase(self, parts=()):
        """One of PHASES; `parts` of the job are needed only as long as it does not train."""
        if self.start() is None:
            return self._phase_before_start(parts)
        try:
            if self._is_saving():
                return "saving"
        except FileNotFoundError:  # removed between two looks, as a save does at its beginning and its end
            return "saving"
        if (self.run / DONE).exists() or self.saved() == self.config.training.total_steps:
            return "finishing"
        return "evaluating" if self._is_evaluating() else "stepping"

    def _phase_before_start(self, parts):
        if not any(name.startswith("rank") for name in parts):
            return "launching"
        lock = self.run / LOCK
        holder = lock.read_text().split()[1:2] if lock.exists() else None
        return "loading" if "rank 0" in parts and holder == [str(parts["rank 0"].pid)] else "starting"

    def _is_saving(self):
        """Whether a checkpoint that this job has touched is torn, or is the newest but not yet the latest.

        What earlier jobs have left torn says nothing of this one.
        """
        ours = {step for step, changed in _steps(self.run).items() if self._found.get(step) != changed}
        sealed = _sealed(self.run)
        return bool(ours - sealed) or bool(ours) and max(ours) == max(sealed) != self.saved()

    def _is_evaluating(self):
        """Whether the held-out losses are all that is missing between the last line and the save."""
        path = self.run / METRICS_FILE
        lines = read_metrics(path) if path.exists() else []
        if not lines:
            return True  # of the untrained model
        step, every = lines[-1]["step"], self.config.evaluation.every
        is_due = step == self.config.training.total_steps or (every > 0 and step % every == 0)
        return lines[-1]["kind"] != "heldout" and is_due


class Campaign:
    """Kills over one recipe, run after run, and what they have shown: `hits` and `faults`.

    Args:
        arguments_of: the command line of the run of a name in `folder`.
        whole: a finished run of the same recipe that nobody has disturbed; None: train it, as `whole` in `folder`.
    """

    def __init__(self, arguments_of, folder, whole=None):
        self.hits = []
        self.faults = []
        self.starts = []
        """Seconds that jobs took until they said where they start, one after another."""
        self._arguments_of = arguments_of
        self._folder = folder
        self._port = free_port()
        self._jobs = 0
        self._runs = 0
        self._run = self._whole = whole or folder / "whole"
        if whole is None:
            self.finish()
        else:
            self._next_run()

    def strike(self, launcher, is_time, choose):
        """Start the command and kill the part that `choose` picks by name, once `is_time(job, watch)`.

        The job may be faster than the time, too: then nothing is killed.
        """
        job, watch = self._start(launcher)
        with job:
            hit = None
            while hit is None and self._await(job, watch, lambda: is_time(job, watch)):
                hit = self._kill(launcher, job, watch, is_time, choose)
            self._review(job, watch, hit)
        if hit:
            self.hits.append(hit)
            print(f"kill {len(self.hits):>3}: {hit}", flush=True)

    def finish(self):
        """Start the command a last time where a run is under way, and leave it alone."""
        if self._run != self._whole and not self._run.exists():
            return
        job, watch = self._start("deepspeed")
        with job:
            if self._await(job, watch, lambda: job.seconds > END_SECONDS):
                self.fault(f"{job.log}: not at its end after {END_SECONDS:g} s")
            self._review(job, watch)

    def fault(self, text):
        """Note what must not be, and say it."""
        self.faults.append(text)
        print(f"FAULT: {text}", flush=True)

    def saves(self):
        """How many kills have hit a save for certain."""
        return sum(hit.phase == "saving" for hit in self.hits)

    def shared_memory(self):
        """What jobs have left behind in the machine's memory."""
        return sorted(Path("/dev/shm").glob(f"*_{self._port}_*"))

    def _start(self, launcher):
        self._jobs += 1
        log = self._folder / f"job-{self._jobs:03}.log"
        arguments = self._arguments_of(self._run.name)
        watch = Watch(self._run, load_run_config(arguments), log)
        return Job(COMMANDS[launcher](arguments, self._port), log, MASTER_PORT=str(self._port), **AS_ROOT), watch

    def _await(self, job, watch, condition):
        """Wait for `condition`; False where the job ends before."""
        begins = None
        while job.is_running():
            if begins is None and (begins := watch.start()) is not None:
                self.starts.append(job.seconds)
            if condition():
                return True
            time.sleep(0.1 if begins is None else 0.01)  # saves are short, and a start is not to be slowed down
        return False

    def _kill(self, launcher, job, watch, is_time, choose):
        """The kill, looked at right before and right after; None where it came too late for what it was meant for."""
        parts = job.parts()
        victim = parts.get(choose(sorted(parts)))
        if victim is None or not is_time(job, watch):
            return None
        before, seconds = watch.phase(parts), job.seconds
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            return None
        after = watch.phase(parts)
        gone = job.seconds_until_gone(GONE_SECONDS)
        if gone is None:
            self.fault(f"{job.log}: {GONE_SECONDS:g} s after the kill there is still {job.processes()}")
        name = next(name for name, part in parts.items() if part is victim)
        phase = before if before == after else f"{before} or {after}"
        return Hit(launcher, name, seconds, phase, watch.start(), gone, job.process.poll())

    def _review(self, job, watch, hit=None):
        """Whether the job went on from where the run stood, and ended as it must, by the kill or at the last step."""
        start, newest = watch.start(), max(_sealed(self._run), default=0)
        if start not in (None, watch.newest):
            self.fault(f"{job.log}: started from step {start}; the newest whole checkpoint was that of {watch.newest}")
        if hit and hit.phase in ("launching", "starting") and newest > watch.newest:
            self.fault(f"{job.log}: trained up to step {newest}, though {hit.victim} was killed long before")
        if hit:
            return
        if (code := job.process.poll()) != 0 or not (self._run / DONE).exists():
            self.fault(f"{job.log}: exit code {code} though nobody had killed it:\n{job.output()[-3000:]}")
        elif self._run != self._whole:
            self._compare(watch.config)
        self._next_run()

    def _compare(self, config):
        found = list(differences(self._whole, self._run, config))
        for difference in found:
            self.fault(f"{self._run}: {difference}")
        if not found:
            print(f"{self._run.name} has ended as if nobody had killed it", flush=True)
            shutil.rmtree(self._run)

    def _next_run(self):
        self._runs += 1
        self._run = self._folder / f"killed-{self._runs}"


def differences(whole, run, config):
    """What is wrong with a finished run, compared with one that nobody disturbed."""
    last = config.training.total_steps
    if (run / DONE).read_text() != f"{last}\n":
        yield f"DONE says {(run / DONE).read_text()!r}"
    ours, theirs = (_records(path / METRICS_FILE) for path in (run, whole))
    if ours != theirs:
        different = next(one for one, other in zip_longest(ours, theirs) if one != other)
        yield f"metrics.jsonl has {len(ours)} lines, expected {len(theirs)}; the first that differs is {different}"
    try:
        assert_same_end(whole, run, last)
    except AssertionError as error:
        yield f"another last checkpoint: {error}"
    for inner in (".", "checkpoints"):
        left, expected = (_names(path / inner) for path in (run, whole))
        if left != expected:
            yield f"{inner} has {sorted(left)}, expected {sorted(expected)}"
    kept, expected = set(_steps(run)), set(range(last, last - config.checkpoint.keep, -1))
    if kept != expected:
        yield f"checkpoints of steps {sorted(kept)}, expected {sorted(expected)}"


def _names(folder):
    """What lies in a folder, checkpoints apart."""
    return {path.name for path in folder.iterdir() if not path.name.startswith("step")}


def _records(metrics):
    """The lines of a metrics.jsonl in order, without what depends on the machine."""
    return [{name: line[name] for name in line if name not in VOLATILE} for line in read_metrics(metrics)]


def _steps(run):
    """When each checkpoint's folder last changed, by step."""
    folders = (run / "checkpoints").glob("step*")
    return {int(folder.name.removeprefix("step")): folder.stat().st_mtime_ns for folder in folders}


def _sealed(run):
    """The steps of the checkpoints that count."""
    return {int(path.parent.name.removeprefix("step")) for path in run.glob(f"checkpoints/step*/{MANIFEST}")}


def _by_deepspeed(arguments, port):
    command = deepspeed_command("pipeline/pretrain.py", *arguments)
    command[command.index("--master_port") + 1] = str(port)  # the same command as before, to the letter
    return command


def _by_script(arguments, port):
    return ["launch/pretrain.sh", *arguments]


def _by_mpirun(arguments, port):
    return ["mpirun", "-n", "2", "--oversubscribe", "--bind-to", "none", "python", "pipeline/pretrain.py", *arguments]


COMMANDS = {"deepspeed": _by_deepspeed, "pretrain.sh": _by_script, "mpirun": _by_mpirun}
"""The command that each launcher makes of the arguments and the port where the ranks are to meet."""


def main(arguments=None):
    """Kill as often as asked and print what came of it; 0 where all is as it must be."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without the job that is running
    (ROOT / "runs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=ROOT / "runs"))
    print(f"seed {options.seed}; everything lies in {folder} until it has gone well", flush=True)
    campaign = Campaign(lambda name: ["--recipe", RECIPE, "--output", str(folder), "--name", name], folder)
    numbers = random.Random(options.seed)
    while _goes_on(campaign, options):
        launcher = numbers.choice(options.launchers)
        moment = numbers.random() * STARTS_UNDER_FIRE * statistics.median(campaign.starts[-5:])
        share = numbers.random()
        campaign.strike(
            launcher,
            lambda job, watch, moment=moment: job.seconds >= moment,
            lambda names, share=share: names[int(share * len(names))] if names else None,
        )
    campaign.finish()
    for path in campaign.shared_memory():
        campaign.fault(f"{path} is left, {path.stat().st_size / 1e6:.0f} MB")
    print(summary(campaign.hits))
    if (saves := campaign.saves()) < options.saves:
        campaign.fault(f"{saves} of {len(campaign.hits)} kills have hit a save, at least {options.saves} were wanted")
    if campaign.faults:
        return 1
    shutil.rmtree(folder)
    return 0


def _goes_on(campaign, options):
    """Until all kills are done and enough have hit a save; with bad luck there are more kills, up to twice as many."""
    if len(campaign.faults) >= PATIENCE:
        return False
    kills = options.kills if campaign.saves() >= options.saves else 2 * options.kills
    return len(campaign.hits) < kills


def summary(hits):
    """How many kills hit what, and how long their jobs took to go."""
    victims = sorted({hit.victim for hit in hits})
    phases = [*PHASES, *sorted({hit.phase for hit in hits} - set(PHASES))]
    counts = Counter((phase, victim) for hit in hits for phase in (hit.phase, "all") for victim in (hit.victim, "all"))
    rows = [[phase, *(str(counts[phase, victim]) for victim in (*victims, "all"))] for phase in (*phases, "all")]
    gone = [hit.gone for hit in hits if hit.gone is not None]
    return "\n".join(
        [
            format_table(["phase", *victims, "all"], rows),
            f"seconds until everything was gone: {median_and_spread(gone, 1)}" if gone else "",
        ]
    )


def _parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--saves", type=int, default=15, help="how many of them must hit a save at least")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--launchers", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
