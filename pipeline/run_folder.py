"""The folder of a run: one job at a time works in it, and a DONE file alone says that it is finished."""

import fcntl
import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

import yaml

from data_prep.files import atomic_file
from data_prep.recipes import save_settings, settings_from_dict
from pipeline.checkpoint import CheckpointError, refuse_changes
from pipeline.config import RunConfig, differences
from pipeline.finetune_config import TaskRun

DONE = "DONE"
"""The file that says, alone, that a run is finished."""

RECIPE = "recipe.yaml"
LOCK = ".lock"


class RunFolder:
    """Where everything about a run lies. Rank 0 alone opens it, which keeps other jobs out, and closes it."""

    def __init__(self, config: RunConfig | TaskRun) -> None:
        self.config = config
        self.path = Path(config.output) / config.name
        self._lock: int | None = None
        self._made: list[Path] = []

    def open(self) -> bool:
        """Make the folder ready for this job. Whether the run has reached its last step already.

        Raises CheckpointError where it did so by another recipe, or is not empty and `resume` is never; ValueError
        where another job works in it, or it cannot be written to.
        """
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                self._take_lock()
        except OSError as error:
            raise ValueError(
                f"{self.path} cannot be written to ({error.strerror}): change `output` or its rights"
            ) from error
        if self.config.resume == "never" and any(path.name != LOCK for path in self.path.iterdir()):
            raise CheckpointError(
                f"resume is never, but {self.path} is not empty: give the run another name, or remove it"
            )
        if not (self.path / DONE).exists():
            return False
        saved = settings_from_dict(type(self.config), yaml.safe_load((self.path / RECIPE).read_text(encoding="utf-8")))
        refuse_changes(self.path, differences(saved, self.config))
        self._say_finished()
        return True

    def save_recipe(self) -> None:
        """Write down what is trained here."""
        save_settings(self.config, self.path / RECIPE)

    def finish(self, step: int) -> None:
        """Mark the run as finished at its last step."""
        with atomic_file(self.path / DONE) as file:
            file.write(f"{step}\n".encode())
        self._say_finished()

    def close(self) -> None:
        """Let others in. Folders that were made and hold nothing yet go: a job that could not start leaves no trace."""
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None
        with suppress(OSError):  # not empty, as a rule
            for folder in self._made:
                folder.rmdir()

    def _take_lock(self) -> None:
        """Lock a file that the system unlocks when this process ends, however it does."""
        path = self.path / LOCK
        while self._lock is None:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(lock, 200).decode(errors="replace").strip() or "another process"
                os.close(lock)
                raise ValueError(
                    f"{self.path} is in use by {owner}: wait for its end, or give this run another name (--name)"
                ) from None
            except OSError as error:
                print(f"{path} cannot be locked here ({error.strerror}): start no second job here", flush=True)
            if path.exists() and os.path.samestat(os.fstat(lock), os.stat(path)):
                self._lock = lock
            else:
                os.close(lock)  # its last owner has just removed it
        os.truncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _say_finished(self) -> None:
        more = ""
        if isinstance(self.config, RunConfig):
            more = (
                f" See it: python -m pipeline.report {self.path}. "
                "To train longer, start another run: --name NAME --training.total_steps N"
            )
        print(f"{self.path} is finished.{more}", flush=True)
