"""The progress bar of a build, over all ranks: share of the input's bytes, time left, documents/s and tokens/s."""

import sys
import time
from typing import Self

import numpy as np
from tqdm import tqdm

from data_prep.ranks import Ranks

SECONDS = 1.0
"""Between two looks at the clock, the bar, or what other ranks tell."""


class BuildProgress:
    """Drawn by the first rank; the others tell it of what they have done."""

    def __init__(self, ranks: Ranks, title: str, total_bytes: int, done_bytes: int) -> None:
        """`done_bytes` of the units' `total_bytes` were read by jobs before this one."""
        self._ranks = ranks
        self._done = np.zeros(3)  # documents, tokens, bytes of units
        self._new = np.zeros(3)
        self._started = self._flushed = time.monotonic()
        self._bar = tqdm(
            desc=title,
            total=total_bytes,
            initial=done_bytes,
            unit="B",
            unit_scale=True,
            file=sys.stderr,
            mininterval=SECONDS,
            disable=not ranks.is_first,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def count(self, documents: int = 0, tokens: int = 0, num_bytes: int = 0) -> None:
        """What this rank has done since it last told. Bytes are those of finished units."""
        self._new += documents, tokens, num_bytes
        if time.monotonic() - self._flushed > SECONDS:
            self._flush()

    def wait(self) -> None:
        """Wait for all ranks, and show what they do meanwhile. Collective."""
        self._flush()
        self._ranks.wait(self._flush if self._ranks.is_first else lambda: None)
        self._flush()

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        if not self._ranks.is_first:
            if self._new.any():
                self._ranks.tell(self._new)
            self._new[:] = 0
            return
        for told in (self._new, *self._ranks.heard(3)):
            self._done += told
            self._bar.update(int(told[2]))
        self._new[:] = 0
        seconds = max(self._flushed - self._started, 1e-9)
        documents, tokens, _ = self._done
        speeds = [f"{documents / seconds:,.0f} documents/s"]
        if tokens:
            speeds.append(f"{tokens / seconds:,.0f} tokens/s")
        self._bar.set_postfix_str(", ".join(speeds), refresh=False)
