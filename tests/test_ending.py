"""How ranks end: with real processes joined by gloo, of which one fails, dies or hangs while the others wait for it."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from pipeline import ending, launched, stopping
from pipeline.ending import (
    AlreadyTold,
    LostProcess,
    NonFiniteError,
    RollCall,
    Stopped,
    end_by,
    leave,
)
from pipeline.launched import leave_code
from tests.ranks import CONTEXT, LONG, SHORT, ended, run, said, started, torchrun_store, wait_for


def wait_for_all(world):
    world.sum(torch.ones(1))


def finishes(world):
    wait_for_all(world)
    print(f"rank {world.rank} has finished")


def fails(world, error, ranks):
    world.barrier()
    if world.rank in ranks:
        raise error
    wait_for_all(world)


def fails_while_one_hears_late(world):
    if world.rank == 2:
        ending.POLL_SECONDS = 2.0
        time.sleep(0.5)
    world.barrier()
    if world.rank == 1:
        raise ValueError("first")
    if world.rank == 0:
        wait_for(lambda: world.roll_call.failed is not None)
        raise ValueError("second")
    wait_for_all(world)


def fails_as_rank_0(world, error):
    def action():
        raise error

    ending.PATIENCE_SECONDS = 600.0  # nobody is to need it
    world.on_main(action)


def takes_its_time_as_rank_0(world, seconds):
    print(world.on_main(lambda: time.sleep(seconds) or {"waited": seconds}, may_take_long=seconds < 10))
    wait_for_all(world)


def is_lost(world, rank, action, argument):
    group = dist.new_group()  # DeepSpeed makes groups of its own, too
    world.reached(7)
    world.barrier()
    if world.rank == rank:
        action(argument)
    world.reached(8)
    dist.all_reduce(torch.ones(1), group=group)


def is_lost_deciding(world, rank, action, argument):
    world.barrier()
    world.on_main(lambda: action(argument))


def signal_itself(number):
    os.kill(os.getpid(), number)


class Loss(NamedTuple):
    """A rank that the others lose by its own action, the ranks that then end, and what is said."""

    size: int
    rank: int
    action: Callable
    argument: int
    ending: tuple[int, ...]
    words: str
    limit: timedelta = LONG
    worker: Callable = is_lost


SILENT = "not answering: killed, hanging or cut off"
LOSSES = {
    "exit": Loss(2, 1, os._exit, 9, (0,), f"rank 1 is {SILENT}"),
    "kill": Loss(3, 1, signal_itself, signal.SIGKILL, (0, 2), f"rank 1 is {SILENT}"),
    "kill of rank 0": Loss(3, 0, signal_itself, signal.SIGKILL, (1, 2), f"rank 0 is {SILENT}"),
    "kill of rank 0 of 2": Loss(2, 0, signal_itself, signal.SIGKILL, (1,), f"rank 0 is {SILENT}"),
    "standstill": Loss(3, 1, signal_itself, signal.SIGSTOP, (0, 2), f"rank 1 is {SILENT}", SHORT),
    "standstill of rank 0": Loss(3, 0, signal_itself, signal.SIGSTOP, (1, 2), f"rank 0 is {SILENT}", SHORT),
    "kill of rank 0, deciding": Loss(
        3, 0, signal_itself, signal.SIGKILL, (1, 2), f"rank 0 is {SILENT}", worker=is_lost_deciding
    ),
    "standstill of rank 0, deciding": Loss(
        3, 0, signal_itself, signal.SIGSTOP, (1, 2), "rank 0 is not answering", SHORT, is_lost_deciding
    ),
    "sleep": Loss(3, 1, time.sleep, 600, (0, 1, 2), "rank 1 is hanging after step 7, others have gone on", SHORT),
}


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """Exit codes of the ranks, and what they said, for each of LOSSES: all at once, since most of it is waiting."""
    folders = {name: tmp_path_factory.mktemp("loss") for name in LOSSES}
    with ExitStack() as stack:
        runs = {
            name: stack.enter_context(
                started(folders[name], loss.worker, loss.size, loss.rank, loss.action, loss.argument, limit=loss.limit)
            )
            for name, loss in LOSSES.items()
        }
        return {
            name: (ended([runs[name][rank] for rank in loss.ending]), said(folders[name]))
            for name, loss in LOSSES.items()
        }


def test_ranks_that_have_finished_end_well_and_silently(tmp_path):
    codes, output = run(tmp_path, finishes, 3)
    assert codes == [0, 0, 0]
    assert output == "".join(f"rank {rank} has finished\n" for rank in range(3))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_rank_that_fails_speaks_for_all(tmp_path, size, rank):
    codes, output = run(tmp_path, fails, size, ValueError("no such shards"), [rank])
    assert output == "error: no such shards\n"
    assert codes == [ending.BAD_INPUT] * size


@pytest.mark.parametrize(
    ("error", "code", "output"),
    [
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (NonFiniteError("the loss of step 3 is nan"), 3, "error: the loss of step 3 is nan\n"),
        (LostProcess("rank 2 did not come"), 4, "error: rank 2 did not come\n"),
        (Stopped("stopped by SIGTERM"), 75, "stopped by SIGTERM\n"),
        (AlreadyTold("its command has said it"), 2, ""),
    ],
)
def test_every_kind_of_end_has_its_code(tmp_path, error, code, output):
    assert run(tmp_path, fails, 2, error, [1]) == ([code, code], output)


def test_a_bug_is_traced_once(tmp_path):
    codes, output = run(tmp_path, fails, 3, KeyError("bug"), [1])
    assert codes == [ending.FAILED] * 3
    assert output.startswith("Traceback (most recent call last):\n") and output.endswith("KeyError: 'bug'\n")
    assert output.count("Traceback") == 1


@pytest.mark.parametrize("size", [2, 3])
def test_what_all_ranks_find_wrong_is_said_once(tmp_path, size):
    codes, output = run(tmp_path, fails, size, ValueError("no such preset"), range(size))
    assert output == "error: no such preset\n"
    assert codes == [ending.BAD_INPUT] * size


def test_rank_0_stays_until_all_have_heard(tmp_path):
    codes, output = run(tmp_path, fails_while_one_hears_late, 3)
    assert output == "error: first\n"
    assert codes == [ending.BAD_INPUT] * 3


@pytest.mark.parametrize("name", LOSSES)
def test_a_lost_rank_is_named_once_and_none_outlasts_it(endings, name):
    codes, output = endings[name]
    assert codes == [ending.PROCESS_LOST] * len(codes)
    assert output.startswith(f"error: {LOSSES[name].words}")
    assert ". The same command goes on from the newest checkpoint" in output
    assert output.count("\n") == 1


def test_ranks_that_wait_for_a_decision_of_rank_0_end_with_it(tmp_path):
    codes, output = run(tmp_path, fails_as_rank_0, 3, ValueError("no folder"))
    assert output == "error: no folder\n"
    assert codes == [ending.BAD_INPUT] * 3


def test_ranks_end_with_rank_0_though_torchrun_keeps_the_store(tmp_path):
    _store, variables = torchrun_store()
    codes, output = run(tmp_path, fails_as_rank_0, 2, ValueError("no folder"), **variables)
    assert output == "error: no folder\n"
    assert codes == [ending.BAD_INPUT] * 2


def test_rank_0_may_take_longer_than_collectives_wait(tmp_path):
    codes, output = run(tmp_path, takes_its_time_as_rank_0, 2, 5, limit=SHORT)
    assert codes == [0, 0]
    assert output == 2 * "{'waited': 5}\n"


def test_rank_0_may_not_keep_all_waiting_unless_it_is_known_to_take_long(tmp_path):
    codes, output = run(tmp_path, takes_its_time_as_rank_0, 2, 30, limit=SHORT)
    assert codes == [ending.PROCESS_LOST] * 2
    assert output.startswith("error: rank 0 is busy for more than ") and output.count("\n") == 1


def end_alone(output, variables, is_alike=True, patience=0.1):
    ending.ANSWER_SECONDS, launched.START_SECONDS = 0.1, patience
    os.environ.update(variables)
    with open(unread_pipe() if output is None else output, "w") as file:
        os.dup2(file.fileno(), 2)
    end_by(ValueError("bad recipe"), None, is_alike=is_alike)


@pytest.mark.parametrize(
    ("variables", "output"),
    [
        ({}, "error: bad recipe\n"),
        ({"RANK": "0"}, "error: bad recipe\n"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, "error: bad recipe\n"),
        ({"OMPI_COMM_WORLD_RANK": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "error: bad recipe\n"),
        ({"RANK": "9", "LOCAL_RANK": "1"}, ""),
    ],
)
def test_before_the_ranks_have_met_one_of_a_machine_speaks_where_rank_0_has_not_ended(tmp_path, variables, output):
    assert exit_code(end_alone, tmp_path / "output.txt", variables) == ending.BAD_INPUT
    assert (tmp_path / "output.txt").read_text() == output


def test_what_rank_0_has_told_before_it_ended_is_not_told_again(tmp_path):
    """Nor waited for: this would wait for longer than the test."""
    (tmp_path / "exit_code").write_text("2\n")
    variables = {"RANK": "1", "LOCAL_RANK": "1", stopping.JOB_FOLDER: str(tmp_path)}
    assert exit_code(end_alone, tmp_path / "output.txt", variables, True, 600.0) == ending.BAD_INPUT
    assert (tmp_path / "output.txt").read_text() == ""


def wait_alone(output):
    """End as rank 1, which leaves by another way as soon as it would sleep."""
    launched.time.sleep = lambda seconds: os._exit(9)
    end_alone(output, {"RANK": "1"}, patience=600.0)


def test_before_rank_0_has_started_the_others_do_not_end(tmp_path):
    """Or launchers would kill it before it has said what is wrong."""
    assert exit_code(wait_alone, tmp_path / "output.txt") == 9
    assert (tmp_path / "output.txt").read_text() == ""


def test_before_the_ranks_have_met_each_tells_what_it_alone_has_found(tmp_path):
    assert exit_code(end_alone, tmp_path / "output.txt", {"RANK": "1"}, False) == ending.BAD_INPUT
    assert (tmp_path / "output.txt").read_text() == "error: bad recipe\n"


def end_early_alone(output, variables, is_bereaved):
    ending.ANSWER_SECONDS = 0.1
    os.environ.update(variables)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 2)
    stop = stopping.StopRequest()
    stop.reason, stop.is_bereaved = "SIGTERM", is_bereaved
    ending.end_early(stop)


@pytest.mark.parametrize(
    ("is_bereaved", "code", "words"),
    [
        (True, ending.PROCESS_LOST, "a process of the run died while it started: its own words stand above"),
        (False, ending.STOPPED, "stopped by SIGTERM before training began"),
    ],
)
def test_before_training_rank_1_speaks_where_rank_0_has_not(tmp_path, is_bereaved, code, words):
    output, job = tmp_path / "output.txt", {stopping.JOB_FOLDER: str(tmp_path)}
    assert exit_code(end_early_alone, output, {"RANK": "2"} | job, is_bereaved) == code
    assert output.read_text() == ""
    (tmp_path / "exit_code").unlink()
    assert exit_code(end_early_alone, output, {"RANK": "1"} | job, is_bereaved) == code
    assert output.read_text().startswith(words)
    assert exit_code(end_early_alone, output, {"RANK": "1"} | job, is_bereaved) == code
    assert output.read_text() == "" and (tmp_path / "exit_code").read_text() == f"{code}\n"


def test_without_a_folder_to_look_into_a_rank_says_nothing_of_the_dead(tmp_path):
    output = tmp_path / "output.txt"
    assert exit_code(end_early_alone, output, {"RANK": "1"}, True) == ending.PROCESS_LOST
    assert output.read_text() == ""
    assert exit_code(end_early_alone, output, {"RANK": "1"}, False) == ending.STOPPED
    assert output.read_text().startswith("stopped by SIGTERM before training began")


def test_last_words_that_nobody_reads_change_no_exit_code():
    assert exit_code(end_alone, None, {}) == ending.BAD_INPUT


class TestRollCall:
    """The roll call of one rank of three, with a store in its memory."""

    @pytest.fixture(autouse=True)
    def soon(self, monkeypatch):
        monkeypatch.setattr(ending, "ANSWER_SECONDS", 0.2)

    @pytest.fixture
    def store(self):
        return dist.HashStore()

    @pytest.fixture
    def roll_call(self, store):
        return RollCall(rank=1, size=3, local_rank=1, connect=lambda: store, limit=60)

    def test_all_that_do_not_answer_are_named(self, roll_call):
        assert roll_call.missing() == "ranks 0, 2 are not answering: killed, hanging or cut off"

    def test_all_that_are_behind_are_named(self, roll_call, store):
        store.set("here0", "9 3")
        store.set("here2", "10 3")
        roll_call.meetings, roll_call.step = 9, 3
        assert roll_call.missing() == "ranks 0, 1 are hanging after step 3, others have gone on"

    def test_the_network_is_suspected_where_nobody_is_behind(self, roll_call, store):
        store.set("here0", "9 4")
        store.set("here2", "9 4")
        roll_call.meetings, roll_call.step = 9, 4
        assert roll_call.missing().startswith("all 3 ranks answer, after step 4: one hangs in the next, or the network")

    def test_only_the_first_to_fail_speaks(self, roll_call, store):
        assert roll_call.fail(3)
        assert not RollCall(rank=2, size=3, local_rank=2, connect=lambda: store, limit=60).fail(2)
        assert store.get("failed") == b"1 3"


class TestExitCode:
    """The file by which launch/pretrain.sh learns how its processes ended."""

    @pytest.fixture
    def job(self, tmp_path, monkeypatch):
        monkeypatch.setenv(stopping.JOB_FOLDER, str(tmp_path))
        return tmp_path

    def test_the_first_code_stays(self, job):
        leave_code(3)
        leave_code(4)
        assert (job / "exit_code").read_text() == "3\n"

    def test_without_a_script_there_is_no_file(self, job, monkeypatch):
        monkeypatch.delenv(stopping.JOB_FOLDER)
        leave_code(3)
        assert not list(job.iterdir())

    def test_the_script_may_have_gone_with_its_folder(self, job, monkeypatch):
        monkeypatch.setenv(stopping.JOB_FOLDER, str(job / "none"))
        leave_code(3)
        assert not list(job.iterdir())

    def test_a_process_that_leaves_writes_its_code_and_what_it_has_printed(self, job):
        assert exit_code(print_and_leave, job, job / "output.txt") == 75
        assert (job / "exit_code").read_text() == "75\n"
        assert (job / "output.txt").read_text() == "last words"

    def test_a_process_leaves_where_its_script_has_gone_already(self, job):
        assert exit_code(print_and_leave, job / "none", os.devnull) == 75

    def test_a_process_leaves_where_nobody_reads_what_it_says(self, job):
        assert exit_code(print_and_leave, job, None) == 75
        assert (job / "exit_code").read_text() == "75\n"


def exit_code(target, *arguments):
    """The exit code of a process that runs target(*arguments)."""
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return ended([process])[0]


def print_and_leave(job, output):
    os.environ[stopping.JOB_FOLDER] = str(job)
    with open(unread_pipe() if output is None else output, "w") as sys.stdout:
        print("last words", end="")
        leave(75)


def unread_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer
