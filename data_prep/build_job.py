"""The work of a build: every unit's keys, the repeats among them, every unit's shards; each rank does its part.

Each phase leaves a file for every unit, which is whole or not there: any number of ranks goes on where others ended.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.build_progress import BuildProgress
from data_prep.duplicates import UnitKeys, find_repeats, save_array
from data_prep.manifest import UnitRecord
from data_prep.ranks import Ranks
from data_prep.sources import WorkUnit
from data_prep.units import Screen, Step, UnitBuilder
from data_prep.work_folder import finished_record, keys_path, missing, record_path, repeats_path

KeysOf = Callable[[str], Iterable[int]]
"""From a text to keys of 128 bits; of texts that share one, the first alone is kept."""


@dataclass(frozen=True)
class Job:
    """What all ranks work on together; every method is collective.

    Attributes:
        units: all of them, by their numbers
        steps: what every document passes before it is compared with others
        comparisons: how documents are compared, by the reason for which a repeat is dropped; the first one counts
        skips_broken: whether content that cannot be read is counted and left out, instead of an error
    """

    root: Path
    ranks: Ranks
    units: Sequence[WorkUnit]
    steps: Sequence[Step] = ()
    comparisons: Mapping[str, KeysOf] = field(default_factory=dict)
    skips_broken: bool = False

    def find_repeats(self, memory: int) -> None:
        """Write down for every unit which documents repeat earlier ones. A rank takes `memory` bytes for that."""
        reading = []
        for name in self.comparisons:
            if self._without(lambda unit, name=name: repeats_path(self.root, name, unit)):
                reading.append((name, self._without(lambda unit, name=name: keys_path(self.root, name, unit))))
        todo = sorted({number for _, numbers in reading for number in numbers})
        if todo:
            self._each("reading", todo, self._write_keys)
        for name, _ in reading:
            self._compare(name, todo, memory)

    def _compare(self, name: str, todo: Sequence[int], memory: int) -> None:
        """By one of the comparisons; `todo` are the units whose keys have just been written."""
        # Each rank reads first what it has just written, which other machines may not see at once.
        done = sorted({*range(len(self.units))} - {*todo})
        reader = np.empty(len(self.units), np.int64)
        for part in (todo, done):
            for place, number in enumerate(part):
                reader[number] = place % self.ranks.size
        mine = np.flatnonzero(reader == self.ranks.rank).tolist()
        key_files = {number: keys_path(self.root, name, number) for number in mine}
        for number, repeats in find_repeats(self.ranks, key_files, reader, memory).items():
            save_array(repeats_path(self.root, name, number), repeats)
        self.ranks.wait()

    def build(self, builder: UnitBuilder) -> tuple[list[UnitRecord], int]:
        """The records of all units, in the first rank, and how many tokens this job has added."""
        found = {} if not self.ranks.is_first else self._finished_records()
        todo = self._unfinished(lambda: [unit.number for unit in self.units if unit.number not in found])
        made: dict[int, UnitRecord] = {}

        def build_unit(unit: WorkUnit, progress: BuildProgress) -> None:
            made[unit.number] = builder.build(unit, self._screen(self._repeats(unit.number)), progress.count)
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

    def _screen(self, repeats: Mapping[int, str]) -> Screen:
        return Screen(self.steps, repeats, Counter() if self.skips_broken else None)

    def _repeats(self, unit: int) -> dict[int, str]:
        """Why documents of a unit are dropped, by their numbers."""
        found: dict[int, str] = {}
        for name in reversed(self.comparisons):
            numbers = np.load(repeats_path(self.root, name, unit), allow_pickle=False)
            found |= dict.fromkeys(map(int, numbers), name)
        return found

    def _write_keys(self, unit: WorkUnit, progress: BuildProgress) -> None:
        found = {name: UnitKeys(unit.number) for name in self.comparisons}
        for number, _, text in self._screen({}).documents(unit):
            if text.strip():
                for name, keys_of in self.comparisons.items():
                    found[name].add(number, keys_of(text))
            progress.count(documents=1)
        for name, keys in found.items():
            save_array(keys_path(self.root, name, unit.number), keys.sorted())

    def _without(self, path_of: Callable[[int], Path]) -> list[int]:
        """Numbers of the units that have no such file yet, as the first rank sees them."""
        return self._unfinished(lambda: missing(self.root, [path_of(number) for number in range(len(self.units))]))

    def _unfinished(self, numbers: Callable[[], list[int]]) -> list[int]:
        """Numbers of units as the first rank sees them, alike in all."""
        return self.ranks.share(numbers, list[int])

    def _each(self, title: str, todo: Sequence[int], work: Callable[[WorkUnit, BuildProgress], None]) -> None:
        """`work` on this rank's part of the units in `todo`, until all ranks are done with theirs."""
        total = sum(unit.num_bytes for unit in self.units)
        before = total - sum(self.units[number].num_bytes for number in todo)
        with BuildProgress(self.ranks, title, total, before) as progress:
            for number in todo[self.ranks.rank :: self.ranks.size]:
                work(self.units[number], progress)
                progress.count(num_bytes=self.units[number].num_bytes)
            progress.wait()
