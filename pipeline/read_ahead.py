"""Fetching what comes: a thread that has the shards of the next samples at hand before they are read."""

import sys
import threading
from dataclasses import replace
from typing import Protocol

import numpy as np

from pipeline.mixture import MixtureState, next_samples
from pipeline.order import OrderState

AT_ONCE = 256
"""Positions whose shards are looked up together, and fetched even if the walk is ended meanwhile."""


class Fetcher(Protocol):
    """The part of a pipeline.loader.RowReader that is used."""

    samples_ahead: int

    def fetch(self, sample_ids: np.ndarray) -> None: ...


class ReadAhead:
    """Walks through the order, of all ranks, up to `reader.samples_ahead` positions before the training.

    What cannot be fetched is told once, and tried again when training has gone on; whoever has to read it meets the
    same error.
    """

    def __init__(self, reader: Fetcher, order: OrderState | MixtureState) -> None:
        self._reader = reader
        self._order = order
        self._position = order.position
        self._is_closed = self._has_told = False
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._walk, daemon=True)
        self._thread.start()

    def reached(self, position: int) -> None:
        """Training stands here: the walk may go on from there."""
        with self._news:
            self._position = position
            self._news.notify()

    def close(self) -> None:
        """End the walk; a download under way is left to itself."""
        with self._news:
            self._is_closed = True
            self._news.notify()

    def _walk(self) -> None:
        place = self._position
        while self._may_go_on(place):
            place = max(place, self._position)
            ids, _ = next_samples(replace(self._order, position=place), AT_ONCE)
            try:
                self._reader.fetch(ids)
                place += AT_ONCE
            except (ValueError, OSError) as error:
                self._pause(error)

    def _pause(self, error: Exception) -> None:
        """Until training has gone on, or the walk is ended."""
        if not self._has_told:
            print(f"reading ahead has failed, and will be tried again: {error}", file=sys.stderr, flush=True)
        self._has_told = True
        with self._news:
            seen = self._position
            self._news.wait_for(lambda: self._is_closed or self._position != seen)

    def _may_go_on(self, place: int) -> bool:
        with self._news:
            self._news.wait_for(lambda: self._is_closed or place < self._position + self._reader.samples_ahead)
            return not self._is_closed
