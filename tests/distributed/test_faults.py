"""The fault table: meeting any, the command on two ranks ends soon, says once what is wrong and changes nothing."""

import os
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_prep.files import hash_file, read_json
from pipeline.checkpoint import resolve_checkpoint
from pipeline.metrics import read_metrics
from tests.distributed.cases import ENDS_WITHIN, NAME, Case, Fault
from tests.distributed.faults import FAULTS
from tests.distributed.runs import assert_same_end
from tests.launcher import started

AT_ONCE = 3
"""Commands that run side by side: each spends half of its time in one process, importing."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    exit_code: int
    seconds: float
    output: str
    changed: list[str]
    """Files of the private folder that are new, gone or changed."""
    folder: Path

    def messages(self, begins: str) -> list[str]:
        """The lines of the output that begin so, each with what follows it up to the launcher's next line."""
        parts = re.split(rf"^(?={re.escape(begins)})", self.output, flags=re.MULTILINE)[1:]
        return [re.split(r"^(?:\[\d{4}-|-{20})", part, maxsplit=1, flags=re.MULTILINE)[0].strip() for part in parts]


def meet(fault: Fault, shards: Path, trained: Path, folder: Path) -> Outcome:
    """Bring the fault about in `folder` and run the command."""
    # Linked, not copied: whoever changes a file of them replaces it.
    shutil.copytree(shards, folder / "shards", copy_function=os.link)
    case = Case(fault.launcher, folder, trained)
    with case.until_end:
        command = case.command(*(fault.prepare(case) or []))
        before = hashes(folder)
        start = time.monotonic()
        with started(command, **case.environment) as process:
            case.meanwhile()
            output = output_of(process)
        seconds, after = time.monotonic() - start, hashes(folder)
        case.afterwards()
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    return Outcome(process.returncode, seconds, output, changed, folder)


def output_of(process: subprocess.Popen) -> str:
    """What a command says until it has ended, or is killed at the time limit."""
    try:
        return process.communicate(timeout=ENDS_WITHIN)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def hashes(folder: Path) -> dict[str, str]:
    """What every file below a folder holds, by relative path; folders count, too."""
    return {
        str(path.relative_to(folder)): hash_file(path) if path.is_file() else "no file" for path in folder.rglob("*")
    }


@pytest.fixture(scope="session")
def outcomes(request, tiny_shards, runs, tmp_path_factory):
    """How the command met each fault that a selected test looks at, or every fault: futures by name."""
    selected = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    names = [name for name in FAULTS if name in selected] or list(FAULTS)
    folders = [tmp_path_factory.mktemp(name.replace(" ", "_")) for name in names]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return {
            name: threads.submit(meet, FAULTS[name], tiny_shards, runs / "whole-2-fp32", folder)
            for name, folder in zip(names, folders, strict=True)
        }


@pytest.fixture
def outcome(name, outcomes):
    return outcomes[name].result()


@pytest.mark.parametrize("name", FAULTS)
def test_the_command_ends_with_its_exit_code_and_one_message(name, outcome):
    fault, output = FAULTS[name], outcome.output
    assert outcome.seconds < ENDS_WITHIN, output
    assert outcome.exit_code == fault.exit_code, output
    assert "Traceback" not in output
    assert not re.search("died while it started|before training began", output), output
    assert len(outcome.messages("error: ")) == (fault.begins == "error: "), output
    (message,) = outcome.messages(fault.begins)
    assert [pattern for pattern in fault.told if not re.search(pattern, message)] == [], message


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_changes_on_the_disk(name, outcome):
    assert [file for file in outcome.changed if not re.fullmatch(FAULTS[name].writes, file)] == []


@pytest.mark.parametrize("name", ["damaged checkpoint beside an older one", "empty latest"])
def test_what_goes_on_from_an_intact_checkpoint_ends_as_if_nothing_had_been(name, outcome, runs):
    assert_same_end(runs / "whole-2-fp32", outcome.folder / "runs" / NAME)


@pytest.mark.parametrize("name", ["disk full in a save"])
def test_a_full_disk_costs_the_checkpoint_that_was_being_saved_and_no_other(name, outcome, runs):
    full = outcome.folder / "when_full" / "checkpoints"
    assert [path.name for path in full.glob("step*")] == ["step00000002"]
    assert resolve_checkpoint(full).name == (full / "latest").read_text() == "step00000002"
    assert_same_end(runs / "whole-2-fp32", outcome.folder / "with_room")


@pytest.mark.parametrize("name", ["loss that is not a number"])
def test_of_a_step_without_a_finite_loss_only_its_samples_are_written_down(name, outcome):
    run = outcome.folder / "runs" / NAME
    record = read_json(run / "nonfinite.json")
    samples = [sample for rank in record["ranks"] for sample in rank["samples"]]
    assert (record["step"], len(record["ranks"]), len(set(samples))) == (2, 2, 16)
    assert [path.name for path in (run / "checkpoints").glob("step*")] == ["step00000001"]
    assert max(line["step"] for line in read_metrics(run / "metrics.jsonl")) == 1


def test_the_table(outcomes, capsys):
    """Prints it, however pytest is called."""
    with capsys.disabled():
        print(f"\n\n{'fault':<48}{'exit code':>9}{'seconds':>9}  message")
        for name, future in outcomes.items():
            if future.exception():
                print(f"{name:<48}{'':>18}  not brought about: {future.exception()}")
                continue
            outcome = future.result()
            message = next(iter(outcome.messages(FAULTS[name].begins)), "none").replace(str(outcome.folder), "...")
            first_line = message.replace(":\n  ", ": ").partition("\n")[0]
            print(f"{name:<48}{outcome.exit_code:>9}{outcome.seconds:>9.0f}  {first_line}")
