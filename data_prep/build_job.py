"""The work of a build: every unit's keys, the duplicates among them, every unit's shards; each rank does its part.

Each phase leaves a file for every unit, which is whole or not there: any number of ranks goes on where others ended.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.build_progress import BuildProgress
from data_prep.duplicates import find_repeats, keys_array, save_array, words_key
from data_prep.manifest import UnitRecord
from data_prep.ranks import Ranks
from data_prep.sources import WorkUnit
from data_prep.units import Screen, Step, UnitBuilder
from data_prep.work_folder import finished_record, keys_path, missing, record_path, repeats_path

DUPLICATE = "duplicate"
"""The reason for which a document is dropped whose words an earlier one has."""


@dataclass(frozen=True)
class Job:
    """What all ranks work on together; every method is collective.

    Attributes:
        units: all of them, by their numbers
        steps: what every document passes before it is compared with others
    """

    root: Path
    ranks: Ranks
    units: Sequence[WorkUnit]
    steps: Sequence[Step] = ()

    def find_duplicates(self, memory: int) -> None:
        """Write down for every unit which documents repeat earlier ones. A rank takes `memory` bytes for that."""
        numbers = range(len(self.units))
        if not self._unfinished(lambda: missing(self.root, [repeats_path(self.root, number) for number in numbers])):
            return
        todo = self._unfinished(lambda: missing(self.root, [keys_path(self.root, number) for number in numbers]))
        self._each("reading", todo, self._write_keys)
        # Each rank reads first what it has just written, which other machines may not see at once.
        done = sorted({*numbers} - {*todo})
        reader = np.empty(len(self.units), np.int64)
        for part in (todo, done):
            for place, number in enumerate(part):
                reader[number] = place % self.ranks.size
        mine = np.flatnonzero(reader == self.ranks.rank).tolist()
        key_files = {number: keys_path(self.root, number) for number in mine}
        for number, repeats in find_repeats(self.ranks, key_files, reader, memory).items():
            save_array(repeats_path(self.root, number), repeats)
        self.ranks.wait()

    def build(self, builder: UnitBuilder, deduplicate: bool) -> tuple[list[UnitRecord], int]:
        """The records of all units, in the first rank, and how many tokens this job has added."""
        found = {} if not self.ranks.is_first else self._finished_records()
        todo = self._unfinished(lambda: [unit.number for unit in self.units if unit.number not in found])
        made: dict[int, UnitRecord] = {}

        def build_unit(unit: WorkUnit, progress: BuildProgress) -> None:
            repeats = np.load(repeats_path(self.root, unit.number), allow_pickle=False) if deduplicate else ()
            screen = Screen(self.steps, dict.fromkeys(map(int, repeats), DUPLICATE))
            made[unit.number] = builder.build(unit, screen, progress.count)
            made[unit.number].save(record_path(self.root, unit.number))

        self._each("building", todo, build_unit)
        new: dict[int, UnitRecord] = {}
        for part in self.ranks.gather(made, dict[int, UnitRecord]):
            new |= part
        tokens = sum(counts.tokens for record in new.values() for counts in record.counts.values())
        found |= new
        return [found[number] for number in sorted(found)], tokens

    def _finished_records(self) -> dict[int, UnitRecord]:
        gone = {*missing(self.root, [record_path(self.root, unit.number) for unit in self.units])}
        there = [unit.number for unit in self.units if unit.number not in gone]
        records = {number: finished_record(self.root, number) for number in there}
        return {number: record for number, record in records.items() if record is not None}

    def _write_keys(self, unit: WorkUnit, progress: BuildProgress) -> None:
        keys = []
        for number, document in Screen(self.steps).documents(unit):
            if document.text.strip():
                keys.append((words_key(document.text), number))
            progress.count(documents=1)
        save_array(keys_path(self.root, unit.number), keys_array(unit.number, keys))

    def _unfinished(self, numbers: Callable[[], list[int]]) -> list[int]:
        """Numbers of units as the first rank sees them, alike in all."""
        return self.ranks.share(numbers, list[int])

    def _each(self, title: str, todo: Sequence[int], work: Callable[[WorkUnit, BuildProgress], None]) -> None:
        """`work` on this rank's part of the units in `todo`, until all ranks are done with theirs."""
        total = sum(map(_size, self.units))
        before = total - sum(_size(self.units[number]) for number in todo)
        with BuildProgress(self.ranks, title, total, before) as progress:
            for number in todo[self.ranks.rank :: self.ranks.size]:
                work(self.units[number], progress)
                progress.count(num_bytes=_size(self.units[number]))
            progress.wait()


def _size(unit: WorkUnit) -> int:
    return unit.stop - unit.start
