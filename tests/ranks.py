"""Ranks of a run, each a process that joins the others as a launcher's would, and ends as the command ends."""

import multiprocessing
import os
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline import ending
from pipeline.world import Place, current_world, join_world, leave_world
from tests.launcher import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.ranks", "pytest"])  # imported once, for all ranks of all tests

LONG = timedelta(minutes=5)
"""A time limit that no test comes to."""

SHORT = timedelta(seconds=4)

# Torch asks for the name of every address it connects to; of a busy name server nobody here is to wait for 5 s.
NO_NAMES = {"RES_OPTIONS": "timeout:1 attempts:1"}


@contextmanager
def started(folder, worker, size, *arguments, limit=LONG, absent=(), **variables):
    """Processes that run worker(world, *arguments), a function at the top of a module; killed at the end.

    What a rank prints is in `folder`, for `said`. Ranks that are `absent` are never started. `variables` come into
    the environment, beside what launchers set.
    """
    sizes = {"WORLD_SIZE": str(size), "LOCAL_SIZE": str(size)}
    variables = {**NO_NAMES, **sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **variables}
    processes = [
        CONTEXT.Process(target=_run_rank, args=(worker, rank, variables, limit, folder, arguments), daemon=True)
        for rank in range(size)
        if rank not in absent
    ]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def ended(processes, seconds=60):
    """Their exit codes; None for those that are not gone in time."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    return [process.exitcode for process in processes]


def said(folder):
    """What all ranks have printed, on both channels, in their order."""
    return "".join(path.read_text() for path in sorted(folder.glob("rank*.txt")))


def run(folder, worker, size, *arguments, **options):
    """Exit codes of the ranks, and what they said."""
    with started(folder, worker, size, *arguments, **options) as processes:
        codes = ended(processes)
    return codes, said(folder)


def torchrun_store():
    """A store as torchrun keeps one for its ranks, and the variables that tell them of it."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    return store, {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}


def wait_for(condition, seconds=60):
    """Wait until `condition` holds; fails where it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def _run_rank(worker, rank, variables, limit, folder, arguments):
    output = os.open(folder / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    # On one machine, none of which is slow to answer, a test need not take as much time as a run may.
    ending.POLL_SECONDS, ending.ANSWER_SECONDS, ending.PATIENCE_SECONDS = 0.1, 2.0, 4.0
    try:
        worker(join_world(Place.from_environment(), torch.device("cpu"), "gloo", limit), *arguments)
        leave_world()
    except Exception as error:  # noqa: BLE001 (as in pipeline.pretrain)
        world = current_world()
        ending.end_by(error, world.roll_call if world else None)
    ending.leave(ending.FINISHED)
