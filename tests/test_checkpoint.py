import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.recipes import settings_to_dict
from pipeline.checkpoint import Checkpointer, CheckpointError, TrainState, find_start, is_complete
from tests.distributed.reference import config
from tests.tiny import OneProcess

DATA = {"fingerprint": "abc", "seed": 0}


class Engine:
    """Writes what DeepSpeed would: a folder with the tag's name and files in it."""

    def __init__(self):
        self.loaded = None

    def save_checkpoint(self, folder, tag, save_latest):
        assert not save_latest  # DeepSpeed moves `latest` before other ranks have written
        (Path(folder) / tag).mkdir(parents=True)
        (Path(folder) / tag / "weights.pt").write_bytes(b"weights of " + tag.encode())

    def load_checkpoint(self, folder, tag):
        self.loaded = tag
        return f"{folder}/{tag}", {}


@pytest.fixture
def run():
    return replace(config(world_size=1), resume="auto")


@pytest.fixture
def checkpointer(tmp_path):
    return Checkpointer(tmp_path / "checkpoints", OneProcess(), keep=2)


def _state(run, step):
    return TrainState(step, step * 8, world_size=1, zero_stage=2, data=DATA, recipe=settings_to_dict(run))


def test_saves_are_complete_pruned_and_named_by_latest(checkpointer, run):
    for step in (1, 2, 3):
        checkpointer.save(Engine(), _state(run, step))
    assert sorted(path.name for path in checkpointer.folder.iterdir()) == ["latest", "step00000002", "step00000003"]
    assert (checkpointer.folder / "latest").read_text() == "step00000003"
    assert checkpointer.newest().name == "step00000003"


def test_a_torn_checkpoint_is_passed_over_and_its_name_used_again(checkpointer, run):
    checkpointer.save(Engine(), _state(run, 1))
    Engine().save_checkpoint(checkpointer.folder, "step00000002", save_latest=False)  # killed before it was sealed
    assert checkpointer.newest().name == "step00000001"
    checkpointer.save(Engine(), _state(run, 2))
    assert checkpointer.newest().name == "step00000002"


def test_a_truncated_file_makes_a_checkpoint_incomplete(checkpointer, run):
    checkpointer.save(Engine(), _state(run, 1))
    newest = checkpointer.save(Engine(), _state(run, 2))
    assert is_complete(newest)
    with open(newest / "weights.pt", "r+b") as file:
        file.truncate(3)
    assert not is_complete(newest)
    assert checkpointer.newest().name == "step00000001"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(checkpointer, run):
    saved = checkpointer.save(Engine(), _state(run, 1))
    (saved / "weights.pt").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in .* is complete any more"):
        checkpointer.newest()


def test_a_run_killed_in_its_first_save_starts_anew(checkpointer):
    Engine().save_checkpoint(checkpointer.folder, "step00000001", save_latest=False)
    assert checkpointer.newest() is None


def test_generators_are_restored(checkpointer, run):
    checkpoint = checkpointer.save(Engine(), _state(run, 1))
    drawn = torch.rand(3)
    engine = Engine()
    checkpointer.load(engine, checkpoint)
    assert engine.loaded == "step00000001"
    assert torch.equal(torch.rand(3), drawn)


def test_a_run_goes_on_where_it_stands(checkpointer, run):
    assert find_start(run, checkpointer, DATA)[0] is None
    checkpointer.save(Engine(), _state(run, 5))
    checkpoint, state = find_start(run, checkpointer, DATA)
    assert checkpoint.name == "step00000005"
    assert (state.step, state.samples_consumed) == (5, 40)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 9}, "seed"),
        ({"optimizer": replace(config().optimizer, learning_rate=0.5)}, "optimizer.learning_rate: 0.002"),
        ({"schedule": replace(config().schedule, kind="cosine")}, "schedule.kind"),
    ],
)
def test_a_changed_recipe_is_refused_by_name(checkpointer, run, change, named):
    checkpointer.save(Engine(), _state(run, 1))
    with pytest.raises(CheckpointError, match=named):
        find_start(replace(run, **change), checkpointer, DATA)


def test_other_data_world_or_stage_is_refused_by_name(checkpointer, run):
    checkpointer.save(Engine(), replace(_state(run, 1), world_size=4, zero_stage=3))
    with pytest.raises(CheckpointError) as caught:
        find_start(run, checkpointer, {**DATA, "fingerprint": "xyz"})
    for named in ("fingerprint: 'abc'", "4 processes in the checkpoint, 1 now", "zero_stage"):
        assert named in str(caught.value)


def test_intervals_may_change_on_resume(checkpointer, run):
    checkpointer.save(Engine(), _state(run, 1))
    changed = replace(run, checkpoint=replace(run.checkpoint, every=3), logging=replace(run.logging, every=7))
    assert find_start(changed, checkpointer, DATA)[1].step == 1


@pytest.mark.parametrize("resume", ["never", "runs/another"])
def test_resume_that_means_another_start_is_refused_where_the_run_stands(checkpointer, run, resume):
    checkpointer.save(Engine(), _state(run, 1))
    with pytest.raises(CheckpointError, match=f"resume is {resume}, but the run stands at"):
        find_start(replace(run, resume=resume), checkpointer, DATA)


def test_the_same_command_goes_on_though_it_names_where_it_began(checkpointer, run):
    began = replace(run, resume="runs/another")
    checkpointer.save(Engine(), _state(began, 3))
    assert find_start(began, checkpointer, DATA)[1].step == 3


def test_resume_takes_a_checkpoint_its_folder_or_its_run(checkpointer, run, tmp_path):
    saved = checkpointer.save(Engine(), _state(run, 4))
    other = Checkpointer(tmp_path / "other" / "checkpoints", OneProcess())
    for given in (saved, checkpointer.folder, checkpointer.folder.parent):
        checkpoint, state = find_start(replace(run, resume=str(given)), other, DATA)
        assert (checkpoint, state.step) == (saved, 4)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_start(replace(run, resume=str(tmp_path / "other")), other, DATA)


def test_a_checkpoint_of_another_version_is_refused(checkpointer, run):
    saved = checkpointer.save(Engine(), _state(run, 1))
    values = json.loads((saved / "train_state.json").read_text())
    (saved / "train_state.json").write_text(json.dumps({**values, "version": 99}))
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"]["train_state.json"] = (saved / "train_state.json").stat().st_size
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="version 99"):
        find_start(run, checkpointer, DATA)
