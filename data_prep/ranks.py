"""The processes of a job: one alone, without any MPI, or all that mpirun or srun has started.

Rank 0 is the first. Values travel as JSON and arrays as they are, so nothing is pickled. Waiting ranks sleep: those of
MPI would keep their cores busy. mpi4py is imported here alone, and only where a launcher has started several processes.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any, NoReturn, TypeVar

import numpy as np
from pydantic import TypeAdapter

from data_prep.files import remedied
from data_prep.recipes import BAD_INPUT, run_command

Value = TypeVar("Value")

POLL_SECONDS = 0.01
HEAD_START_SECONDS = 2.0
LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
    ("PMIX_RANK", "SLURM_NTASKS"),
)
"""The variables by which launchers tell a process its rank and the number of ranks. SLURM sets its own ones for shell
scripts, too: they count only beside one that speaks of MPI."""


class Refusal(ValueError):
    """What all ranks have agreed to end by; its message is told once."""


def launched_as() -> tuple[int, int]:
    """Rank and number of ranks as the launcher tells them; (0, 1) where there is none."""
    for rank, size in LAUNCHERS:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


class Ranks:
    """A job of one process; every method that speaks of all ranks is collective, so all of them must call it.

    Attributes:
        rank: number of this process, from 0
        size: number of processes
    """

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait for all ranks, calling `meanwhile` now and then."""

    def agree(self, action: Callable[[], Value]) -> Value:
        """What `action` returns here, after it has returned in all ranks.

        Raises:
            ValueError, OSError: as `action`; of several ranks all raise the Refusal of the first that failed.
        """
        return action()

    def share(self, make: Callable[[], Value], kind: Any) -> Value:
        """What `make`, called in the first rank alone, returns; `kind` is its type. Fails as `agree` does."""
        return make()

    def gather(self, value: Value, kind: Any) -> list[Value]:
        """The values of all ranks, in their order, in the first rank; elsewhere an empty list."""
        return [value]

    def exchange(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One array (uint64, one axis) for every rank, against those that every rank has for this one."""
        return list(parts)

    def tell(self, values: np.ndarray) -> None:
        """Send a few numbers (float64, always as many) to the first rank, which need not wait for them."""

    def heard(self, count: int) -> list[np.ndarray]:
        """What other ranks have told the first since it last asked, `count` numbers each."""
        return []

    def abort(self, code: int) -> NoReturn:
        """End all ranks at once, whatever they do, with this exit code."""
        sys.exit(code)


class _MpiRanks(Ranks):
    """The ranks of MPI.COMM_WORLD."""

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        self._world = mpi.COMM_WORLD
        self.rank, self.size = self._world.rank, self._world.size

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        request = self._world.Ibarrier()
        while not request.Test():
            meanwhile()
            time.sleep(POLL_SECONDS)

    def agree(self, action: Callable[[], Value]) -> Value:
        result, fault = None, ""
        try:
            result = action()
        except (ValueError, OSError) as error:
            said = remedied(error) if isinstance(error, OSError) else str(error)
            fault = (f"rank {self.rank}: " if self.rank else "") + (said or type(error).__name__)
        faults = self._all_bytes(fault.encode())
        if any(faults):
            raise Refusal(next(filter(None, faults)).decode())
        return result

    def share(self, make: Callable[[], Value], kind: Any) -> Value:
        adapter = TypeAdapter(kind)
        made = self.agree(lambda: adapter.dump_json(make()) if self.is_first else b"")
        size = np.array([len(made)], np.int64)
        self._world.Bcast(size)
        content = np.frombuffer(made, np.uint8) if self.is_first else np.empty(size[0], np.uint8)
        self._world.Bcast(content)
        return adapter.validate_json(content.tobytes())

    def gather(self, value: Value, kind: Any) -> list[Value]:
        adapter = TypeAdapter(kind)
        parts = self._all_bytes(adapter.dump_json(value), to_all=False)
        return [adapter.validate_json(part) for part in parts]

    def exchange(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        sent = np.array([len(part) for part in parts], np.int64)
        received = np.empty_like(sent)
        self.wait()
        self._world.Alltoall(sent, received)
        content = np.empty(received.sum(), np.uint64)
        self._world.Alltoallv(
            [np.concatenate(parts), (sent, _starts(sent)), self._mpi.UINT64_T],
            [content, (received, _starts(received)), self._mpi.UINT64_T],
        )
        return np.split(content, np.cumsum(received)[:-1])

    def tell(self, values: np.ndarray) -> None:
        self._world.Send(values, dest=0)  # so small that MPI keeps it until it is asked for

    def heard(self, count: int) -> list[np.ndarray]:
        told = []
        while self._world.Iprobe():
            told.append(np.empty(count))
            self._world.Recv(told[-1])
        return told

    def abort(self, code: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        self._world.Abort(code)
        sys.exit(code)  # while MPI ends it

    def _all_bytes(self, content: bytes, to_all: bool = True) -> list[bytes]:
        """The contents of all ranks, in all of them or in the first."""
        self.wait()
        sizes = np.empty(self.size, np.int64)
        self._world.Allgather(np.array([len(content)], np.int64), sizes)
        kept = to_all or self.is_first
        together = np.empty(sizes.sum() if kept else 0, np.uint8)
        target = [together, (sizes, _starts(sizes)), self._mpi.BYTE]
        if to_all:
            self._world.Allgatherv(np.frombuffer(content, np.uint8), target)
        else:
            self._world.Gatherv(np.frombuffer(content, np.uint8), target if kept else None)
        return [part.tobytes() for part in np.split(together, np.cumsum(sizes)[:-1])] if kept else []


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes) - sizes


def join_ranks() -> Ranks:
    """This process's place among those that were started with it.

    Raises:
        ValueError: a launcher has started several processes that cannot join each other.
    """
    size = launched_as()[1]
    if size == 1:
        return Ranks()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is mpi4py, but no MPI library
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{size} processes were started together, but mpi4py does not work here ({reason}): install it and an MPI "
            "library (pip install 'spikelm[mpi]', or mpi4py built for the cluster's own MPI), or start one process"
        ) from None
    if size != MPI.COMM_WORLD.size:
        library = MPI.Get_library_version().partition(",")[0]
        raise ValueError(
            f"the launcher has started {size} processes, but MPI ({library}) sees {MPI.COMM_WORLD.size}: start them by "
            "the mpirun of this MPI, or install mpi4py for the launcher's"
        )
    return _MpiRanks(MPI)


def run_ranks(run: Callable[[Ranks], int | None]) -> int:
    """run_command for all ranks of a job: what they agree to end by is told once, and none is left waiting for another.

    An error in one rank alone, which the others know nothing of, ends all: with 2 where it is about the input, else 1.
    """
    try:
        ranks = join_ranks()
    except ValueError as error:
        return refuse_apart(error)
    if ranks.size == 1:
        return run_command(lambda: run(ranks))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if ranks.is_first else nowhere):
            return run(ranks) or 0
    except SystemExit:
        raise
    except Refusal as error:
        if ranks.is_first:
            print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT  # MPI lets no rank end before the first has told
    except (ValueError, OSError) as error:
        print(f"error: rank {ranks.rank}: {error}", file=sys.stderr)
        ranks.abort(BAD_INPUT)
    except BaseException:  # noqa: BLE001 (the others would wait for ever)
        print(f"rank {ranks.rank} of {ranks.size}:", file=sys.stderr)
        traceback.print_exc()
        ranks.abort(1)


def refuse_apart(error: ValueError) -> int:
    """Tell why processes that have not joined each other cannot work, in the first alone, as a rule, whose end ends all
    by most launchers. The exit code."""
    if launched_as()[0] > 0:
        time.sleep(HEAD_START_SECONDS)
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT
