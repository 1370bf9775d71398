"""The processes of a run: where each stands among the others, how they find each other, what they do together."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from pipeline.ending import AlreadyTold, LostProcess, RollCall, first_line

Result = TypeVar("Result")

LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "CROSS_"),  # DeepSpeed's launcher and torchrun
    *("OMPI_COMM_", "PMI_", "PMIX_", "PRTE_", "TORCHELASTIC_", "SPIKELM_"),
)
"""How the names of the environment variables begin that tell a process its place among others."""


@dataclass(frozen=True)
class Place:
    """What the launcher says of this process: its rank among all and on its machine, and where rank 0 listens."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int

    @classmethod
    def from_environment(cls) -> Self:
        """From the variables of DeepSpeed's and torch's launchers; alone where there is none."""
        known = os.environ
        return cls(
            rank=int(known.get("RANK", 0)),
            size=int(known.get("WORLD_SIZE", 1)),
            local_rank=int(known.get("LOCAL_RANK", 0)),
            local_size=int(known.get("LOCAL_WORLD_SIZE") or known.get("LOCAL_SIZE") or 1),
            address=known.get("MASTER_ADDR", "127.0.0.1"),
            port=int(known.get("MASTER_PORT", 29500)),
        )


class World:
    """This process among all: its rank, their number, and the device that is its own."""

    def __init__(
        self, place: Place, device: torch.device, store: dist.Store, roll_call: RollCall | None, limit: timedelta
    ) -> None:
        self.rank = place.rank
        self.size = place.size
        self.device = device
        self.roll_call = roll_call
        self.limit = limit
        self._store = store
        self._decisions = 0

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def reached(self, step: int) -> None:
        """Note that this rank has done so many optimizer steps, for when another one is missed."""
        if self.roll_call is not None:
            self.roll_call.step = step

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place, as a collective; every rank must call it."""
        self._enter()
        dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._enter()
        dist.barrier()

    def agree(self, ok: bool) -> bool:
        """Whether `ok` is true on every rank."""
        self._enter()
        flag = torch.tensor(int(ok), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in their order, on every rank."""
        self._enter()
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], Result], may_take_long: bool = False) -> Result:
        """What `action` gives on rank 0, as JSON has it, on every rank; no other rank runs it.

        The others wait, without a collective, and end with rank 0 where it raises. Raises LostProcess on them where
        rank 0 takes longer than the limit of a collective, unless it may.
        """
        self._enter()
        self._decisions += 1
        key = f"decision {self._decisions}"
        if self.is_main:
            self._store.set(key, json.dumps(action()))
        pause, began = 0.01, time.monotonic()
        while not self._store.check([key]):
            if self.roll_call.failed is not None:
                raise LostProcess("rank 0 has failed")
            if not may_take_long and time.monotonic() - began > self.limit.total_seconds():
                raise LostProcess(f"rank 0 is busy for more than {_minutes(self.limit)} with what all wait for")
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        return json.loads(self._store.get(key))

    def _enter(self) -> None:
        """Note that this rank has come to where it waits for the others."""
        if self.roll_call is not None:
            self.roll_call.meetings += 1


_world: World | None = None


def current_world() -> World | None:
    """The world that this process has joined, if it has."""
    return _world


def join_world(place: Place, device: torch.device, backend: str, limit: timedelta) -> World:
    """Found the process group with all others, once for each process.

    Raises LostProcess where one does not come within `limit`, which is also how long collectives wait; ValueError
    where another run meets at the same port.
    """
    global _world
    if _world is not None:
        return _world
    # DeepSpeed clones its groups with torch's default time limits, whatever the first group was given.
    distributed_c10d.default_pg_timeout = limit
    if distributed_c10d.default_pg_nccl_timeout is not None:
        distributed_c10d.default_pg_nccl_timeout = limit
    if place.size == 1:
        store, roll_call = dist.HashStore(), None
    else:
        store = _open_store(place, limit)
        if store.add(f"come{place.rank}", 1) > 1:
            raise AlreadyTold(f"another process is rank {place.rank} already: {_taken(place)}")  # rank 0 finds it, too
        connect = partial(_connect, place, limit)
        roll_call = RollCall(place.rank, place.size, place.local_rank, connect, limit.total_seconds())
        roll_call.watch()
    _world = World(place, device, store, roll_call, limit)
    if place.size > 1:
        _await_all(place, store, limit)
    device_id = None if device.type == "cpu" else device
    dist.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.size, timeout=limit, device_id=device_id
    )
    return _world


def leave_world() -> None:
    """Leave the process group where all is done, all ranks together; harmless where there is none.

    A rank that took its connections down earlier would look like a lost one to those that still use them.
    """
    global _world
    if _world is None:
        return
    dist.barrier()
    if _world.roll_call is not None:
        _world.roll_call.close()
        dist.barrier()
    dist.destroy_process_group()
    _world = None


def _open_store(place: Place, limit: timedelta) -> dist.Store:
    """The store that all ranks meet at. torchrun keeps one already; for all other launchers rank 0 does."""
    if place.rank > 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _connect(place, limit)
    try:
        return _of_this_attempt(
            dist.TCPStore(place.address, place.port, place.size, True, limit, wait_for_workers=False)
        )
    except dist.DistNetworkError as error:
        raise ValueError(f"rank 0 cannot listen: {_taken(place)} ({first_line(error)})") from error


def _taken(place: Place) -> str:
    return (
        f"another run uses port {place.port} of {place.address}: give deepspeed another --master_port, or launch by "
        "launch/pretrain.sh, which chooses one"
    )


def _connect(place: Place, limit: timedelta) -> dist.Store:
    try:
        return _of_this_attempt(dist.TCPStore(place.address, place.port, None, False, limit))
    except dist.DistNetworkError as error:
        raise LostProcess(
            f"rank 0 does not answer at {place.address}:{place.port} after {_minutes(limit)}: is "
            f"its machine up, and the port open? ({first_line(error)})"
        ) from error


def _of_this_attempt(store: dist.Store) -> dist.Store:
    """torchrun's store outlives the attempts that it makes."""
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def _await_all(place: Place, store: dist.Store, limit: timedelta) -> None:
    """Wait until every rank has come; rank 0 looks for them and tells all."""
    if place.rank > 0:
        _wait(store, "complete", limit + timedelta(minutes=1))  # rank 0 is to give up first: it knows who is missing
        return
    deadline = time.monotonic() + limit.total_seconds()
    for rank in range(place.size):
        _wait(store, f"come{rank}", timedelta(seconds=max(0.1, deadline - time.monotonic())))
    missing = [rank for rank in range(place.size) if not store.check([f"come{rank}"])]
    if missing:
        raise LostProcess(
            f"of {place.size} ranks {', '.join(map(str, missing))} did not come within {_minutes(limit)}: are all "
            "machines up and launched alike?"
        )
    store.set("complete", "yes")


def _wait(store: dist.Store, key: str, limit: timedelta) -> None:
    try:
        store.wait([key], limit)
    except dist.DistStoreError:
        return  # whoever looks next finds it missing


def _minutes(limit: timedelta) -> str:
    return f"{limit.total_seconds() / 60:g} minutes (engine.timeout_minutes)"
