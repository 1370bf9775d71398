"""The order in which samples are seen: a pure function of a few integers that knows no rank, worker or batch.

Position p of the endless stream belongs to epoch p // num_samples. Within an epoch, runs of `run` neighbouring samples
are permuted over the whole epoch, then the stream is shuffled inside windows of `window` positions. Both permutations
are computed point by point, so nothing of the size of the data set is ever held and any position is reached at once.
Where runs are not alike, as shards are, there is a table of them for an epoch.

    disk      a full shuffle
    nfs       run 64, window 65,536: neighbours are read together
    remote    a run for each shard, window = 8 of the largest: each shard is fetched once an epoch
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.mixing import Choice, as_uint64, mix

MAX_SAMPLES = 1 << 53  # up to here float64 counts exactly, which _bit_length relies on
FEISTEL_ROUNDS = 4
WINDOW_SHARDS = 8


def run_and_window(place: str, shard_sizes: Sequence[int]) -> tuple[int | tuple[int, ...], int | None]:
    """The order that fits where shards of so many samples lie, all there are: on disk, nfs or remote."""
    if place == "remote":
        return tuple(shard_sizes), WINDOW_SHARDS * max(shard_sizes)
    return {"disk": (1, None), "nfs": (64, 1 << 16)}[place]


@dataclass(frozen=True)
class OrderState:
    """All that decides which samples come next. Raises ValueError for settings that give no order."""

    seed: int
    """Chooses among orders."""

    num_samples: int
    """Samples in an epoch."""

    position: int = 0
    """Samples consumed since the start of training, over all epochs."""

    run: int | tuple[int, ...] = 1
    """Neighbouring samples that stay together when the epoch is permuted: so many, or those of each run in turn."""

    window: int | None = None
    """Positions within which the permuted runs are shuffled; None: the whole epoch."""

    def __post_init__(self) -> None:
        if not 0 < self.num_samples <= MAX_SAMPLES:
            raise ValueError(f"num_samples is {self.num_samples}: an order needs 1 to 2**53 samples")
        if self.position < 0:
            raise ValueError(f"position is {self.position}: samples consumed cannot be negative")
        runs = self.run if isinstance(self.run, tuple) else (self.run,)
        if min(runs, default=0) < 1 or (self.window is not None and self.window < 1):
            raise ValueError(f"run is {self.run} and window is {self.window}: both must be at least 1")
        if isinstance(self.run, tuple) and sum(runs) != self.num_samples:
            raise ValueError(f"runs of {sum(runs)} samples, but num_samples is {self.num_samples}: give them all a run")


def sample_ids(state: OrderState, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The next `count` samples from state.position on: their ids and their epochs, both int64 [count].

    An epoch's end may lie anywhere among them; every epoch holds each id of [0, num_samples) exactly once.
    """
    return samples_at(state, np.arange(state.position, state.position + count, dtype=np.int64))


def samples_at(state: OrderState, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The samples at positions (int64 [n]) of the endless stream, whatever state.position is: ids and epochs."""
    epoch = position // state.num_samples
    place = as_uint64(position % state.num_samples)
    ids = _permute_runs(state, epoch, _shuffle_windows(state, epoch, place))
    return ids.astype(np.int64), epoch


def permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Element `index` of the permutation of [0, size) that `key` names; all three uint64 [n], size up to 2**53.

    A Feistel network permutes the next larger power of two; what falls outside [0, size) is permuted again until it
    falls inside, less than twice on average (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002).
    """
    bits = _bit_length(size - np.uint64(1))
    result = index.copy()
    todo = np.arange(index.size)
    while todo.size:
        result[todo] = _feistel(result[todo], bits[todo], key[todo])
        todo = todo[result[todo] >= size[todo]]
    return result


def _shuffle_windows(state: OrderState, epoch: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Where in the stream of permuted runs the sample at `place` stands."""
    num_samples = np.uint64(state.num_samples)
    window = np.uint64(min(state.window or state.num_samples, state.num_samples))
    number = place // window
    start = number * window
    size = np.minimum(window, num_samples - start)
    return start + permute(place - start, size, mix(state.seed, Choice.WINDOW_ORDER, epoch, number))


def _permute_runs(state: OrderState, epoch: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The sample id at `place` of the stream of permuted runs; the last, shorter run stands at a random seam of it."""
    if state.window is None or state.window >= state.num_samples:
        return place  # one window shuffles the whole epoch: the order of runs before it adds nothing
    if isinstance(state.run, tuple):
        return _permute_uneven_runs(state.run, state.seed, epoch, place)
    run = np.uint64(state.run)
    runs, tail = np.divmod(np.uint64(state.num_samples), run)
    seam = mix(state.seed, Choice.TAIL_PLACE, epoch) % (runs + np.uint64(1)) * run
    in_tail = (place >= seam) & (place < seam + tail)
    # Places within the tail get an index that is in range, and are replaced below.
    place_of_run = np.where(in_tail, 0, np.where(place < seam, place, place - tail))
    key = mix(state.seed, Choice.RUN_ORDER, epoch)
    number = permute(place_of_run // run, np.full_like(place, max(runs, 1)), key)
    return np.where(in_tail, runs * run + (place - seam), number * run + place_of_run % run)


def _permute_uneven_runs(runs: tuple[int, ...], seed: int, epoch: np.ndarray, place: np.ndarray) -> np.ndarray:
    ids = np.empty_like(place)
    for number in np.unique(epoch):
        chosen = epoch == number
        first_place, first_id = _stream_of_runs(runs, seed, int(number))
        which = np.searchsorted(first_place, place[chosen], side="right") - 1
        ids[chosen] = place[chosen] - first_place[which] + first_id[which]
    return ids


@lru_cache(maxsize=64)
def _stream_of_runs(runs: tuple[int, ...], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each run, in the order of an epoch, its first place in the stream and its first sample, both uint64 [runs]."""
    sizes = np.array(runs, np.uint64)
    key = mix(seed, Choice.RUN_ORDER, epoch)
    order = permute(np.arange(len(runs), dtype=np.uint64), np.full_like(sizes, len(runs)), np.full_like(sizes, key))
    first_id = np.cumsum(sizes) - sizes
    return np.cumsum(sizes[order]) - sizes[order], first_id[order]


def _feistel(value: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A bijection of [0, 2**bits): each round mixes the right part into the left and exchanges them."""
    right_bits = bits >> np.uint64(1)
    left_bits = bits - right_bits
    for number in range(FEISTEL_ROUNDS):
        left, right = value >> right_bits, value & _ones(right_bits)
        mixed = left ^ (mix(number, key, right) & _ones(left_bits))
        value = (right << left_bits) | mixed
        left_bits, right_bits = right_bits, left_bits
    return value


def _bit_length(value: np.ndarray) -> np.ndarray:
    """Bits needed to write `value` (below 2**53), as uint64."""
    return np.frexp(value.astype(np.float64))[1].astype(np.uint64)


def _ones(bits: np.ndarray) -> np.ndarray:
    return (np.uint64(1) << bits) - np.uint64(1)
