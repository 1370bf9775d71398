"""What can be wrong with a run's input, disk or processes: how each fault comes about, and how the command must end.

A fault is a function that brings it about in a private folder; the decorator says what the command has to tell of it.
"""

import bz2
import io
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import tarfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from data_prep.files import hash_file, read_json, write_json
from data_prep.manifest import Counts, Manifest
from data_prep.shards import ShardIndex
from pipeline.ending import BAD_INPUT, FINISHED, NOT_FINITE, PROCESS_LOST
from tests.distributed.cases import ENDS_WITHIN, NAME, NEWEST, OLDER, Fault, flip_bit, rewrite
from tests.launcher import ROOT, free_port, run, started
from tests.ranks import wait_for

SHARD = "train-000000-0001.tar"
DISK_BYTES = 16 << 20
REMEDY = "copy the file again, or build the shards anew"

FAULTS: dict[str, Fault] = {}


def fault(
    *told: str,
    begins: str = "error: ",
    exit_code: int = BAD_INPUT,
    launcher: str = "mpirun",
    writes: str = "nothing",
):
    """Makes a row of the function that it decorates, and of its name."""

    def register(prepare):
        name = prepare.__name__.replace("_", " ")
        FAULTS[name] = Fault(name, prepare, told, begins, exit_code, launcher, writes)
        return prepare

    return register


# Shards


@fault(SHARD, r"missing, expected \d+ bytes", REMEDY)
def shard_missing(case):
    (case.train / SHARD).unlink()


@fault(SHARD, r"\d+ bytes, expected \d+", REMEDY)
def shard_truncated(case):
    rewrite(case.train / SHARD, lambda content: content[:-1024])


@fault(SHARD, r" 0 bytes, expected \d+", REMEDY)
def shard_of_zero_bytes(case):
    rewrite(case.train / SHARD, lambda content: b"")


@fault(SHARD, r"xxh3_128 [0-9a-f]{32}, expected [0-9a-f]{32}", REMEDY)
def one_bit_flipped_in_a_shard(case):
    flip_bit(case.train / SHARD)


@fault(SHARD, r"xxh3_128 [0-9a-f]{32}, expected [0-9a-f]{32}", REMEDY)
def foreign_tar_of_the_same_size(case):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        _add(tar, "page-0001.txt", b"by somebody else")
    rewrite(case.train / SHARD, lambda content: buffer.getvalue().ljust(len(content), b"\0"))


@fault(SHARD, r"holds 'train-000000-0001-\d{5}\.label\.pickle', expected 'train-", "do not use this file")
def tar_with_a_pickle_member_that_its_index_knows(case):
    rewrite(case.train / SHARD, lambda content: content)
    with tarfile.open(case.train / SHARD, "a") as tar:
        _add(tar, "train-000000-0001-00016.label.pickle", pickle.dumps(_MakesFolder(case.folder / "unpickled")))
    size, checksum = (case.train / SHARD).stat().st_size, hash_file(case.train / SHARD)
    index = ShardIndex.load(case.train)
    shards = [replace(shard, bytes=size, xxh3_128=checksum) if shard.name == SHARD else shard for shard in index.shards]
    _save_index(case, "train", replace(index, shards=tuple(shards)))


@dataclass(frozen=True)
class _MakesFolder:
    """Makes a folder when it is unpickled."""

    path: Path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _save_index(case, split, index, **changes):
    """Put an index in the place of a split's, with a manifest that agrees, but for `changes` to it."""
    (case.shards / split / "index.json").unlink()
    index.save(case.shards / split)
    manifest = Manifest.load(case.shards)
    indexes = {**manifest.indexes, split: index.fingerprint}
    (case.shards / "manifest.json").unlink()
    replace(manifest, **{"indexes": indexes, **changes}).save(case.shards / "manifest.json")


@fault("shards/train", r"tokenizer 0{32}, but manifest\.json says [0-9a-f]{32}", "build the shards anew")
def index_of_another_tokenizer(case):
    _save_index(case, "train", replace(ShardIndex.load(case.train), tokenizer="0" * 32))


@fault("shards/tokenizer", r"fingerprint [0-9a-f]{32}, but manifest\.json says [0-9a-f]{32}", "build the shards anew")
def tokenizer_of_other_shards(case):
    rewrite(case.shards / "tokenizer/tokenizer.json", lambda content: content.replace(b'"##ing"', b'"##gni"'))


@fault("shards/train", r"rows \d+, but manifest\.json says \d+", "build the shards anew")
def index_edited_by_hand(case):
    rewrite(case.train / "index.json", lambda content: content.replace(b'"rows": 1024', b'"rows": 1023', 1))


@fault("data.shards|shards/heldout", r"no held-out rows|0 rows", "larger held-out share|heldout_fraction")
def no_heldout_rows(case):
    (case.shards / "heldout/heldout-000000-0000.tar").unlink()
    counts = {**Manifest.load(case.shards).counts, "heldout": Counts()}
    _save_index(case, "heldout", replace(ShardIndex.load(case.shards / "heldout"), shards=()), counts=counts)


@fault(r"nowhere/manifest\.json", "does not exist", r"build the shards by python -m data_prep\.build_shards")
def no_shards_and_no_builder(case):
    return ["--data.shards", str(case.folder / "nowhere")]


# Recipes


@fault(r"nowhere\.yaml", "cannot be read: No such file", r"launch/recipes|name a recipe")
def recipe_missing(case):
    return ["--recipe", str(case.folder / "nowhere.yaml")]


@fault(
    r"optimizer\.learning_rat\b",
    r"unknown field, with value 0\.01",
    r"did you mean optimizer\.learning_rate\?",
    launcher="deepspeed",
)
def recipe_with_an_unknown_key(case):
    return case.recipe(optimizer={"learning_rat": 0.01})


@fault(
    "3 faults",
    "seed: -1 should be",
    r"schedule\.kind: 'round' should be",
    r"checkpoint\.evry: .* mean checkpoint\.every",
)
def three_faults_at_once(case):
    return case.recipe(seed=-1, schedule={"kind": "round"}, checkpoint={"evry": 5})


@fault(r"ds\.json' sets gradient_clipping", r"\b5\.0", r"optimizer\.clip_norm decides: remove it there")
def ds_config_that_contradicts_the_recipe(case):
    return case.ds_config(gradient_clipping=5.0)


@fault(
    r"sets train_batch_size\b.* 64\b.*training\.global_batch_size decides: remove it there",
    r"sets train_micro_batch_size_per_gpu\b.* 8\b.*training\.micro_batch_size decides: remove it there",
)
def ds_config_that_sets_batch_sizes(case):
    return case.ds_config(train_batch_size=64, train_micro_batch_size_per_gpu=8)


@fault(r"model\.overrides\.vocab_size is 100", "the tokenizer has 256", "leave it out, or make it as large")
def vocabulary_larger_than_the_models(case):
    return ["--model.overrides.vocab_size", "100"]


@fault("the samples have 32 tokens", "the model 16 positions", r"raise model\.overrides\.max_position_embeddings")
def rows_longer_than_the_positions(case):
    return ["--model.overrides.max_position_embeddings", "16"]


@fault(r"\d+ training samples|rows", "one global batch of 1000000", r"lower training\.global_batch_size")
def fewer_rows_than_a_global_batch(case):
    return ["--training.global_batch_size", "1000000"]


@fault(r"training\.global_batch_size 12\b", r"4 x 2 processes = 8", "use a global batch of 8 or 16")
def global_batch_that_the_ranks_do_not_divide(case):
    return ["--training.global_batch_size", "12"]


# Checkpoints


@fault(OLDER, r"model\.overrides\.hidden_size: 32 in the run, 48 now", "undo the change, or give .* another name")
def checkpoint_of_another_model(case):
    case.unfinished_run(OLDER)
    case.run.rename(case.folder / "other")
    return ["--resume", str(case.folder / "other" / "checkpoints" / OLDER), "--model.overrides.hidden_size", "48"]


@fault(OLDER, "seed: 0 in the run, 7 now", "undo the change, or give .* another name")
def recipe_changed_in_the_middle(case):
    case.unfinished_run(OLDER)
    return ["--seed", "7"]


@fault(f"runs/{NAME}", "resume is never", "another name, or remove it")
def resume_never_in_a_folder_in_use(case):
    case.unfinished_run(OLDER)
    return ["--resume", "never"]


@fault("step00000002", "1 processes in the checkpoint, 2 now", "launch as many as then")
def checkpoint_of_another_world_size(case):
    alone = run(case.command("--training.stop_after_step", "2", processes=1), timeout=ENDS_WITHIN, **case.environment)
    assert alone.returncode == FINISHED, alone.stdout


@fault(OLDER, r"model_states\.pt is damaged: its checksum differs", "restore one, or remove the folder")
def damaged_checkpoint(case):
    case.unfinished_run(OLDER)
    flip_bit(case.checkpoints / OLDER / "mp_rank_00_model_states.pt")


@fault(
    f"{NEWEST} is passed over: .*_rank_1_.* damaged",
    begins="checkpoint ",
    exit_code=FINISHED,
    writes=r"runs/.*",
    launcher="deepspeed",
)
def damaged_checkpoint_beside_an_older_one(case):
    case.unfinished_run(OLDER, NEWEST)
    flip_bit(case.checkpoints / NEWEST / "zero_pp_rank_1_mp_rank_00_optim_states.pt")


@fault(f"resuming from .*{OLDER}", begins=f"{NAME}: ", exit_code=FINISHED, writes=r"runs/.*")
def empty_latest(case):
    case.unfinished_run(OLDER)
    (case.checkpoints / "latest").write_text("")


@fault(OLDER, r"manifest\.json cannot be read", "restore one, or remove the folder")
def manifest_of_a_checkpoint_that_is_no_json(case):
    case.unfinished_run(OLDER)
    rewrite(case.checkpoints / OLDER / "manifest.json", lambda content: content[:100])


@fault(rf"{OLDER}/train_state\.json", "version 99, expected 1", "resume with the version of spikelm that wrote it")
def checkpoint_of_another_release(case):
    case.unfinished_run(OLDER)
    state = case.checkpoints / OLDER / "train_state.json"
    write_json(state, {**read_json(state), "version": 99})
    manifest = read_json(case.checkpoints / OLDER / "manifest.json")
    manifest["files"][state.name] = {"bytes": state.stat().st_size, "xxh3_128": hash_file(state)}
    write_json(case.checkpoints / OLDER / "manifest.json", manifest)


@fault(OLDER, r"cannot be read", "restore one, or remove the folder")
def checkpoint_that_cannot_be_read(case):
    """The rights of a folder stop all but root; a link that leads into a circle stops everybody."""
    case.unfinished_run(OLDER)
    weights = case.checkpoints / OLDER / "mp_rank_00_model_states.pt"
    weights.unlink()
    weights.symlink_to(weights.name)


# Folders, disks, processes


@fault(f"file/runs/{NAME}", "cannot be written to .*Not a directory", "change `output` or its rights")
def run_folder_that_cannot_be_written(case):
    (case.folder / "file").touch()
    return ["--output", str(case.folder / "file" / "runs")]


@fault(
    *(f"runs/{NAME}/checkpoints/step00000004 cannot be written", "0 MB are free"),
    r"Make room, or set checkpoint\.keep lower; the same command then goes on from the checkpoint before",
    launcher="deepspeed",
)
def disk_full_in_a_save(case):
    """Room for one checkpoint and a half. What lies there when it is full, and at the end, is kept in two folders."""
    disk = case.until_end.enter_context(small_disk(case.folder / "disk"))
    case.output = disk / "runs"
    one_checkpoint = sum(path.stat().st_size for path in case.trained.glob(f"checkpoints/{NEWEST}/*"))
    (disk / "ballast").write_bytes(bytes(DISK_BYTES - one_checkpoint * 3 // 2))

    def make_room():
        shutil.copytree(case.output / NAME, case.folder / "when_full")
        (disk / "ballast").unlink()
        again = run(case.command(), timeout=ENDS_WITHIN, **case.environment)
        assert again.returncode == FINISHED, again.stdout
        shutil.copytree(case.output / NAME, case.folder / "with_room")

    case.afterwards = make_room


@contextmanager
def small_disk(place: Path):
    """A disk that is mounted at `place` for one process alone; gives the path by which everybody sees it."""
    place.mkdir()
    script = f"mount -t tmpfs -o size={DISK_BYTES} tmpfs {place} && echo mounted && exec sleep infinity"
    command = ["unshare", "-m" if os.geteuid() == 0 else "-rm", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line == "mounted\n", f"this test mounts a tmpfs, which is not allowed here: {line}"
            yield Path(f"/proc/{process.pid}/root{place}")
        finally:
            process.kill()


@fault(
    f"runs/{NAME} is in use",
    r"by process \d+ on \S+",
    "wait for its end, or give this run another name",
    launcher="deepspeed",
)
def two_runs_in_one_folder(case):
    arguments = ["--training.total_steps", "1000000", "--checkpoint.every", "1000000"]
    process = case.until_end.enter_context(started(case.command(*arguments), **case.environment))
    wait_for((case.run / "metrics.jsonl").exists, ENDS_WITHIN)
    os.killpg(process.pid, signal.SIGSTOP)  # it keeps its lock, and changes nothing that is hashed
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    wait_for(lambda: {member.status() for member in family} == {psutil.STATUS_STOPPED})
    case.port = free_port()
    return arguments


@fault(
    r"port \d+ of 127\.0\.0\.1",
    "cannot listen",
    "another --master_port, or launch by launch/pretrain.sh",
    launcher="deepspeed",
)
def port_in_use(case):
    case.until_end.enter_context(socket.create_server(("127.0.0.1", case.port)))


@fault(
    "of 2 ranks 1 did not come",
    r"within 0\.1 minutes",
    "machines up and launched alike",
    exit_code=PROCESS_LOST,
    launcher="deepspeed",
)
def rank_that_never_comes(case):
    words = {"--local_rank=1", str(case.shards)}

    def ranks():
        return [process for process in psutil.process_iter(["cmdline"]) if words <= set(process.info["cmdline"] or ())]

    def stop():
        wait_for(ranks)
        ranks()[0].suspend()

    case.meanwhile = stop
    return ["--engine.timeout_minutes", "0.1"]


@fault(
    *("the loss of step 2 is not finite", r"\(masked_lm nan", r"lower optimizer\.learning_rate"),
    exit_code=NOT_FINITE,
    writes=r"runs(/.*)?",
    launcher="deepspeed",
)
def loss_that_is_not_a_number(case):
    rate = ["--optimizer.learning_rate", "1e30", "--optimizer.clip_norm", "0", "--schedule.warmup_steps", "0"]
    return [*rate, "--checkpoint.every", "1"]


@fault(r"other/models\b", rf"{re.escape(str(ROOT))}/models\b", "PYTHONPATH|working folder|remove|rename")
def wrong_models_package(case):
    package = case.folder / "other" / "models"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    case.environment["PYTHONPATH"] = f"{package.parent}{os.pathsep}{ROOT}"


# Raw text

PAGE = b"<page><title>Stone</title><ns>0</ns><id>7</id><revision><text>The old house.</text></revision></page>"
DUMP = b"<mediawiki>" + PAGE + b"</mediawiki>"


@fault(r"dump\.xml", "broken XML: .*line 1, column", "fetch the dump again")
def broken_xml(case):
    return case.raw_text("dump.xml", DUMP.replace(b"</revision>", b"</text>"))


@fault(r"dump\.xml\.bz2", "broken bz2: ", "fetch the dump again")
def broken_bz2(case):
    return case.raw_text("dump.xml.bz2", bz2.compress(DUMP)[:-20])


@fault(r"texts\.jsonl: line 3 \(byte 28\)", "not JSON: ", "mend|repair|remove|correct")
def broken_jsonl(case):
    return case.raw_text("texts.jsonl", b'{"text": "The old house."}\n\n{"text": "cut o\n')


@fault(r"text\.txt", r"byte 9 .*0xfc", "convert the file to UTF-8")
def invalid_utf8(case):
    return case.raw_text("text.txt", "The old Tür.".encode("latin-1"))


@fault(r"text\.txt", "is empty", "name another|leave it out|remove|give")
def empty_input(case):
    return case.raw_text("text.txt", b"")
