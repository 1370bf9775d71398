"""How a process of a run ends: its exit code, one message for all ranks, and nobody left waiting for the dead."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NoReturn, TypeVar

import torch.distributed as dist

from pipeline.launched import has_ended, leave_code, speaks_without_rank_0, tell_once, told_by_launcher
from pipeline.stopping import JOB_FOLDER, StopRequest

Result = TypeVar("Result")

FINISHED = 0
"""At the last step, or at training.stop_after_step."""
FAILED = 1
"""A fault of this program: a traceback tells more."""
BAD_INPUT = 2
"""Recipe, data, checkpoint, folder or disk cannot work; the message says what to do."""
NOT_FINITE = 3
"""A loss or a gradient is NaN or infinite."""
PROCESS_LOST = 4
"""Another process of the run died or no longer answers. The same command goes on from the newest checkpoint."""
STOPPED = 75
"""Stopped on request: after a checkpoint, or before there was anything to save. The same command goes on."""

POLL_SECONDS = 0.5
ANSWER_SECONDS = 3.0
"""Within which a rank that is alive has answered the roll call, or told that it fails."""
PATIENCE_SECONDS = 10.0
"""How long a rank that fails waits for the others to hear of it, and a thread for its main thread to find out."""


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite; nothing of that step is saved."""


class Stopped(Exception):
    """A request to stop was followed before there was anything to save."""


class AlreadyTold(ValueError):
    """Another program cannot go on with what it was given, and has said why."""


class LostProcess(RuntimeError):
    """A process of the run has not come, or does not answer; the message names it."""


class _Line:
    """A connection to the store of a run, which has no time limits of its own."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._is_dead = False

    def ask(self, question: Callable[[dist.Store], Result], seconds: float = ANSWER_SECONDS) -> Result | None:
        """What `question` gives; None, then and ever after, where rank 0 is gone or stands still for so long."""
        answers: list[Result] = []

        def ask() -> None:
            with suppress(dist.DistError):
                answers.append(question(self._store))

        if not self._is_dead:
            asking = threading.Thread(target=ask, daemon=True)
            asking.start()
            asking.join(seconds)
        self._is_dead = not answers
        return answers[0] if answers else None


class RollCall:
    """Where the ranks of a run look for each other when something ends: a store that rank 0 keeps.

    A thread of every rank answers there for it, since its main thread may be waiting in a collective for a process
    that is gone.

    Args:
        connect: opens a connection to the store that no other thread uses.
        limit: seconds that rank 0 may stand still before it counts as lost.
    """

    def __init__(self, rank: int, size: int, local_rank: int, connect: Callable[[], dist.Store], limit: float) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.limit = limit
        self.step = 0
        """Where this rank is: the optimizer steps that it has done."""
        self.meetings = 0
        """How often it has come to where it waits for all others."""
        self.failed: int | None = None
        """Exit code of another rank that has failed before this one."""
        # Opened now: later a store that is gone would be waited for.
        self._line, self._line_of_thread = _Line(connect()), _Line(connect())
        self._gone: set[int] = set()  # who cannot hear of a failure any more, or knows of it
        self._ending = False  # whether the main thread has come to an end itself
        self._closed = threading.Event()

    def watch(self) -> None:
        """Answer for this rank from now on, and end it where another fails while it waits for that one."""
        threading.Thread(target=self._stay_in_touch, daemon=True, name="roll-call").start()

    def close(self) -> None:
        """From here on the run ends well: nobody is missed any more."""
        self._closed.set()

    def fail(self, code: int) -> bool:
        """Tell the others that this rank ends with `code`. Whether it is the first to fail, who prints the message."""
        self._ending = True
        words = f"{self.rank} {code}"
        first = self._line.ask(lambda store: store.compare_set("failed", "", words).decode())
        if first is None:
            return speaks_without_rank_0(self.rank, self.local_rank)
        self._line.ask(lambda store: store.set(f"heard{self.rank}", "yes"))
        self._gone.add(int(first.split()[0]))
        return first == words

    def linger(self) -> None:
        """On rank 0, with which the store ends, and on the first to fail: wait until all that live have heard of it."""
        names = [f"heard{rank}" for rank in range(self.size) if rank not in self._gone]
        if self.rank in {0, *self._gone}:
            self._line.ask(lambda store: _wait_until(lambda: store.check(names), PATIENCE_SECONDS), PATIENCE_SECONDS)

    def missing(self) -> str:
        """Which ranks keep this one waiting: those that do not answer, or those that are steps behind."""
        self._ending = True
        here = self._line.ask(self._answers, 2 * ANSWER_SECONDS)
        if here is None:
            return f"{_ranks([0])} not answering: killed, hanging or cut off"
        self._gone = set(range(self.size)) - set(here)
        if self._gone:
            return f"{_ranks(self._gone)} not answering: killed, hanging or cut off"
        latest = max(here.values())
        late = [rank for rank, progress in here.items() if progress < latest]
        if late:
            return f"{_ranks(late)} hanging after step {min(here[rank][1] for rank in late)}, others have gone on"
        return f"all {self.size} ranks answer, after step {latest[1]}: one hangs in the next, or the network fails"

    def _stay_in_touch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            if self._line_of_thread.ask(self._listen, self.limit) is None or self.failed is not None:
                break
        if self._closed.wait(PATIENCE_SECONDS) or self._ending:
            return
        # The main thread hangs: it has come to no error of its own.
        if self.failed is None and speaks_without_rank_0(self.rank, self.local_rank):
            _tell(LostProcess("rank 0 is not answering any more. The same command goes on from the newest checkpoint"))
        leave(self.failed or PROCESS_LOST)

    def _listen(self, store: dist.Store) -> bool:
        if store.check(["roll call"]):
            store.set(f"here{self.rank}", f"{self.meetings} {self.step}")
        if store.check(["failed"]):
            self.failed = int(store.get("failed").split()[1])
            store.set(f"heard{self.rank}", "yes")
        return True

    def _answers(self, store: dist.Store) -> dict[int, tuple[int, int]]:
        """Meetings and steps by rank, of all ranks that answer in time."""
        names = [f"here{rank}" for rank in range(self.size)]
        store.set("roll call", "now")
        store.set(names[self.rank], f"{self.meetings} {self.step}")
        _wait_until(lambda: store.check(names), ANSWER_SECONDS)
        found = {rank: store.get(name) for rank, name in enumerate(names) if store.check([name])}
        return {rank: tuple(map(int, answer.split())) for rank, answer in found.items()}


def end_by(error: BaseException, roll_call: RollCall | None, is_alike: bool = False) -> NoReturn:
    """End this process because of `error`: the first of all ranks says why, once, and none outlasts the others.

    Where there is no roll call yet, every rank tells what it has found, and what all have found alike (`is_alike`) is
    told once.
    """
    if roll_call is None:
        if is_alike:
            tell_once(lambda: _tell(error))
        elif not isinstance(error, LostProcess) or speaks_without_rank_0(
            told_by_launcher("RANK"), told_by_launcher("LOCAL_RANK")
        ):
            _tell(error)
        else:  # launchers kill all processes when one ends, and rank 0 may be about to speak
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(ANSWER_SECONDS)
        leave(_code_of(error))
    reason = None
    if is_lost(error):
        _wait_until(lambda: roll_call.failed is not None, ANSWER_SECONDS)  # one that failed tells the others
        reason = roll_call.missing() if roll_call.failed is None else None
    if roll_call.failed is not None:
        roll_call.linger()
        leave(roll_call.failed)
    code = _code_of(error)
    if roll_call.fail(code):
        _tell(error, reason)
    roll_call.linger()
    leave(code)


def end_early(stop: StopRequest) -> NoReturn:
    """End this process on request, before there is anything to save; rank 1 speaks where rank 0 has not."""
    if stop.is_bereaved:
        # No error of its own: the one that died has told it, if it could.
        words = "a process of the run died while it started: its own words stand above, if it had any"
    else:
        words = f"stopped by {stop.reason} before training began: the same command begins it"
    rank = told_by_launcher("RANK")
    if rank == 1:
        _wait_until(has_ended, ANSWER_SECONDS)
    # Without launch/pretrain.sh nobody knows whether the one that died has spoken; DeepSpeed names its exit code.
    is_known = not stop.is_bereaved or JOB_FOLDER in os.environ
    if is_known and rank in (0, 1) and not has_ended():
        _tell(Stopped(words))
    leave(PROCESS_LOST if stop.is_bereaved else STOPPED)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def leave(code: int) -> NoReturn:
    """End this process at once, whatever its threads wait for, leaving its exit code to launch/pretrain.sh."""
    try:
        leave_code(code)
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(code)


def _tell(error: BaseException, reason: str | None = None) -> None:
    if isinstance(error, AlreadyTold):
        return
    if reason is not None:
        text = f"error: {reason}. The same command goes on from the newest checkpoint ({first_line(error)})"
    elif _code_of(error) == FAILED:
        text = "".join(traceback.format_exception(error)).rstrip()
    else:
        text = str(error) if isinstance(error, Stopped) else f"error: {error}"
    with suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _code_of(error: BaseException) -> int:
    if isinstance(error, Stopped):
        return STOPPED
    if isinstance(error, NonFiniteError):
        return NOT_FINITE
    if isinstance(error, LostProcess) or is_lost(error):
        return PROCESS_LOST
    return BAD_INPUT if isinstance(error, ValueError | OSError) else FAILED


def is_lost(error: BaseException) -> bool:
    """Whether torch says that a collective came to nothing: gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _ranks(ranks: Iterable[int]) -> str:
    names = [str(rank) for rank in sorted(ranks)]
    return f"rank {names[0]} is" if len(names) == 1 else f"ranks {', '.join(names)} are"


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
