"""Several sources of samples in one stream, each with its share: a pure function of seed, shares and position.

The stream is cut into periods of PERIOD positions. In each, source i has exactly shares[i] of them, spread evenly: the
m-th of its draws falls at a random point of the m-th of shares[i] equal parts of the period. So over any span the draws
of a source differ from its share of the span by a few samples at most. The draws of a source, one after another, are
the positions of a stream of its own (pipeline.order), with its own seed and its own epochs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import numpy as np

from pipeline.mixing import Choice, mix
from pipeline.order import OrderState, samples_at

PERIOD = 1 << 20  # the table of a period takes 6 MB; a share is exact to half a millionth


@dataclass(frozen=True)
class MixtureState:
    """All that decides which samples come next, and from where. Raises ValueError for what is no mixture."""

    seed: int
    """Chooses among ways to spread the sources."""

    sources: tuple[OrderState, ...]
    """The order of each source; their positions count for nothing."""

    shares: tuple[int, ...]
    """Positions of each source in a period; see `shares_of`."""

    position: int = 0
    """Samples consumed since the start of training, over all sources."""

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.sources) or sum(self.shares) != PERIOD or min(self.shares) < 1:
            raise ValueError(f"shares {self.shares} of {len(self.sources)} sources: each needs one, {PERIOD} together")
        if self.position < 0:
            raise ValueError(f"position is {self.position}: samples consumed cannot be negative")

    @property
    def num_samples(self) -> int:
        """Samples of all sources."""
        return sum(source.num_samples for source in self.sources)


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers that are to PERIOD as positive weights are to their sum, by largest remainders.

    Raises ValueError for a weight that is too small a part of the sum to get one.
    """
    exact = [Fraction(weight) for weight in weights]
    quotas = [weight * PERIOD / sum(exact) for weight in exact]
    shares = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: shares[i] - quotas[i])
    for i in by_remainder[: PERIOD - sum(shares)]:
        shares[i] += 1
    if min(shares) < 1:
        raise ValueError(f"weight {min(weights)} is less than a millionth of all weights: raise it, or leave it out")
    return tuple(shares)


def next_samples(order: OrderState | MixtureState, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The next `count` samples from order.position on: their ids and their epochs, both int64 [count].

    Of a mixture, ids count through the sources one after another, and epochs are those of the sample's own source.
    """
    position = np.arange(order.position, order.position + count, dtype=np.int64)
    if isinstance(order, OrderState):
        return samples_at(order, position)
    ids, epochs = np.empty_like(position), np.empty_like(position)
    source_of, draw_of = _period(order.seed, order.shares)
    period, place = np.divmod(position, PERIOD)
    first_id = 0
    for number, (source, share) in enumerate(zip(order.sources, order.shares, strict=True)):
        (chosen,) = np.nonzero(source_of[place] == number)
        ids[chosen], epochs[chosen] = samples_at(source, period[chosen] * share + draw_of[place[chosen]])
        ids[chosen] += first_id
        first_id += source.num_samples
    return ids, epochs


@cache
def _period(seed: int, shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """For each place in a period its source and which of that source's draws it is, uint16 and int32 [PERIOD]."""
    sources = np.repeat(np.arange(len(shares), dtype=np.uint16), shares)
    draws = np.concatenate([np.arange(share, dtype=np.int32) for share in shares])
    chance = mix(seed, Choice.MIXTURE_PLACE, sources, draws) * 2.0**-64
    order = np.argsort((draws + chance) / np.array(shares)[sources], kind="stable")
    return sources[order], draws[order]
