import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.files import hash_file
from data_prep.recipes import settings_to_dict
from pipeline.checkpoint import Checkpointer, CheckpointError, TrainState, find_start, resolve_checkpoint
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


def _truncate(path):
    with open(path, "r+b") as file:
        file.truncate(3)


def _flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "weights.pt has 3 bytes, expected 23": _truncate,
    "weights.pt is damaged": _flip_a_bit,
    "weights.pt cannot be read: No such file": Path.unlink,
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(checkpointer, run, fault, capsys):
    checkpointer.save(Engine(), _state(run, 1))
    newest = checkpointer.save(Engine(), _state(run, 2))
    assert checkpointer.newest() == newest
    DAMAGES[fault](newest / "weights.pt")
    assert checkpointer.newest().name == "step00000001"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"checkpoint {newest} is passed over: {fault}")


@pytest.mark.parametrize("name", ["manifest.json", "train_state.json"])
def test_a_checkpoint_whose_own_files_are_no_json_is_passed_over(checkpointer, run, name):
    checkpointer.save(Engine(), _state(run, 1))
    newest = checkpointer.save(Engine(), _state(run, 2))
    (newest / name).write_text("{")
    assert checkpointer.newest().name == "step00000001"


def test_the_names_in_latest_are_for_others(checkpointer, run):
    checkpointer.save(Engine(), _state(run, 1))
    (checkpointer.folder / "latest").write_text("")
    assert checkpointer.newest().name == "step00000001"
    assert resolve_checkpoint(checkpointer.folder.parent).name == "step00000001"


def test_a_checkpoint_that_is_named_is_the_one_that_is_taken(checkpointer, run):
    older, newest = (checkpointer.save(Engine(), _state(run, step)) for step in (1, 2))
    assert resolve_checkpoint(older) == older
    assert resolve_checkpoint(checkpointer.folder.parent) == resolve_checkpoint(checkpointer.folder) == newest
    (older / "weights.pt").unlink()
    with pytest.raises(CheckpointError, match="step00000001 is no intact checkpoint"):
        resolve_checkpoint(older)


def test_a_checkpoint_that_cannot_be_removed_costs_none_that_is_newer(checkpointer, run, monkeypatch):
    for step in (1, 2, 3):
        checkpointer.save(Engine(), _state(run, step))
        if step == 2:
            monkeypatch.setattr("pipeline.checkpoint.shutil.rmtree", lambda *arguments, **options: None)
    assert (checkpointer.folder / "step00000001").exists()
    assert checkpointer.newest().name == "step00000003"


def test_what_was_given_up_is_not_kept_instead_of_what_is_intact(checkpointer, run):
    checkpointer.save(Engine(), _state(run, 1))
    _flip_a_bit(checkpointer.save(Engine(), _state(run, 5)) / "weights.pt")
    assert checkpointer.newest().name == "step00000001"
    for step in (2, 3):
        checkpointer.save(Engine(), _state(run, step))
    assert sorted(path.name for path in checkpointer.folder.glob("step*")) == ["step00000002", "step00000003"]


class FullDisk(Engine):
    """Fails in the middle, as torch does where a write fails."""

    def save_checkpoint(self, folder, tag, save_latest):
        super().save_checkpoint(folder, tag, save_latest)
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed\nmore")


def test_a_save_that_fails_leaves_what_there_was(checkpointer, run):
    kept = checkpointer.save(Engine(), _state(run, 1))
    with pytest.raises(CheckpointError, match=r"0002 cannot be written; [\d,]+ MB are free.*\(Pytorch.*failed\)$"):
        checkpointer.save(FullDisk(), _state(run, 2))
    assert sorted(path.name for path in checkpointer.folder.iterdir()) == ["latest", "step00000001"]
    assert checkpointer.newest() == kept


def test_a_peer_that_is_lost_in_a_save_is_not_a_full_disk(checkpointer, run):
    engine = Engine()
    engine.save_checkpoint = lambda folder, tag, save_latest: _raise(RuntimeError("[/gloo/pair.cc] Connection closed"))
    with pytest.raises(RuntimeError, match="Connection closed") as caught:
        checkpointer.save(engine, _state(run, 2))
    assert not isinstance(caught.value, CheckpointError)


def _raise(error):
    raise error


def test_an_engine_that_cannot_load_says_which_checkpoint(checkpointer, run):
    saved = checkpointer.save(Engine(), _state(run, 1))
    engine = Engine()
    engine.load_checkpoint = lambda folder, tag: _raise(AssertionError())
    with pytest.raises(CheckpointError, match=r"step00000001 cannot be loaded: AssertionError"):
        checkpointer.load(engine, saved)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(checkpointer, run):
    saved = checkpointer.save(Engine(), _state(run, 1))
    (saved / "weights.pt").unlink()
    with pytest.raises(CheckpointError, match="is intact any more .step00000001: weights.pt cannot be read"):
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
    for named in ("fingerprint: 'abc'", "4 processes in the checkpoint, 1 now", "ZeRO stage 3"):
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
    other.folder.mkdir(parents=True, exist_ok=True)
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        find_start(replace(run, resume=str(tmp_path / "other")), other, DATA)
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "seed-0").symlink_to(checkpointer.folder.parent)
    with pytest.raises(CheckpointError, match=r"seeds is a folder of runs: name one of them \(seed-0\)"):
        resolve_checkpoint(tmp_path / "seeds")
    (tmp_path / "other" / "recipe.yaml").touch()
    with pytest.raises(CheckpointError, match="other has no checkpoint yet: wait for the first"):
        find_start(replace(run, resume=str(tmp_path / "other")), other, DATA)
    with pytest.raises(CheckpointError, match="nowhere does not exist: name a run"):
        find_start(replace(run, resume=str(tmp_path / "nowhere")), other, DATA)


def test_a_checkpoint_of_another_version_is_refused(checkpointer, run):
    saved = checkpointer.save(Engine(), _state(run, 1))
    values = json.loads((saved / "train_state.json").read_text())
    (saved / "train_state.json").write_text(json.dumps({**values, "version": 99}))
    manifest = json.loads((saved / "manifest.json").read_text())
    state = saved / "train_state.json"
    manifest["files"]["train_state.json"] = {"bytes": state.stat().st_size, "xxh3_128": hash_file(state)}
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="version 99"):
        find_start(run, checkpointer, DATA)
