"""data_prep.build_shards and its like under mpirun: however many ranks and whatever kills them, the same folder."""

import json
import sys
from contextlib import contextmanager

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import build_shards, train_tokenizer, verify_shards
from data_prep.manifest import Manifest, Tally
from tests.launcher import BIN, ROOT, run, started
from tests.ranks import wait_for

AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
BUILD = ["-m", "data_prep.build_shards"]


def under_mpi(ranks, *words):
    launcher = [str(BIN / "mpirun"), "-n", str(ranks), "--oversubscribe", "--bind-to", "none"]
    return [*launcher, sys.executable, *map(str, words)]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, prose):
    """Arguments of a build of some 14 units from two inputs that repeat each other's documents, and empty ones."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = prose(400)
    (folder / "lines").mkdir()
    write_lines(folder / "lines" / "0.jsonl", [*texts[:150], *texts[:30], "", " "])
    write_lines(folder / "lines" / "1.jsonl", [text.upper() for text in texts[100:300]])
    (folder / "texts").mkdir()
    for number in range(250, 400):
        (folder / "texts" / f"{number}.txt").write_text(f" {texts[number]}\n\n")
    inputs = [f"--input={folder / name}" for name in ("lines", "texts")]
    tokenizer = ["--kind=wordpiece", "--vocab_size=256", "--heldout_fraction=0.2", f"--output={folder / 'tokenizer'}"]
    assert train_tokenizer.main([*inputs, *tokenizer]) == 0
    sizes = ["--row_length=24", "--rows_per_block=16", "--shard_megabytes=0.002", "--unit_megabytes=0.016"]
    return [*inputs, f"--tokenizer={folder / 'tokenizer'}", "--heldout_fraction=0.2", *sizes]


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """What one process builds, without MPI."""
    folder = tmp_path_factory.mktemp("alone") / "shards"
    assert build_shards.main([*corpus, f"--output={folder}"]) == 0
    return contents(folder)


def test_four_ranks_build_what_one_does_and_end_together(corpus, alone, tmp_path):
    worker = [ROOT / "tests" / "distributed" / "shards_worker.py", tmp_path, *corpus]
    result = run(under_mpi(4, *worker), **AS_ROOT)
    codes = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert codes == [[0, 0, 2, 2, 0]] * 4, result.stdout
    assert contents(tmp_path / "ranks") == alone
    assert result.stdout.count("nothing to do") == 1
    assert result.stdout.count("error: ") == result.stdout.count("seed: 5, was 0") + 1 == 2
    assert result.stdout.count("seed: -1 should be greater") == 1
    # Memory for 40 keys at a time; it is no setting of the folder.
    assert contents(tmp_path / "small") == alone
    assert result.returncode == 1
    assert result.stdout.count("RuntimeError: broken on purpose") == 1
    assert "rank 3 of 4:" in result.stdout


def test_counts_add_up_and_the_first_of_equal_documents_stays(corpus, alone, tmp_path):
    (tmp_path / "manifest.json").write_bytes(next(alone[path] for path in alone if path.name == "manifest.json"))
    manifest = Manifest.load(tmp_path)
    lines, texts = manifest.sources
    assert (lines.read.documents, texts.read.documents) == (382, 150)
    assert lines.dropped["duplicate"].documents == 30 + 50 and lines.dropped["empty"] == Tally(2, 1)
    assert texts.dropped == {"duplicate": Tally(50, texts.dropped["duplicate"].bytes)}
    for source in manifest.sources:
        assert sum((*source.dropped.values(), *source.kept.values()), Tally()) == source.read
    assert sum(manifest.lengths) == sum(counts.documents for counts in manifest.counts.values()) == 400


@contextmanager
def job(command, **extra):
    """A job under mpirun, and a function that gives the process of a rank."""
    with started(command, **AS_ROOT, **extra) as process:

        def rank(number):
            below = psutil.Process(process.pid).children(recursive=True)
            place = ("OMPI_COMM_WORLD_RANK", str(number))
            return next((child for child in below if place in child.environ().items()), None)

        yield process, rank


@pytest.mark.parametrize(("left", "killed"), [("keys-*", 1), ("unit-*", 0)])
def test_a_job_whose_rank_is_killed_goes_on_with_another_number_of_ranks(corpus, alone, tmp_path, left, killed):
    output = tmp_path / "shards"
    words = [*corpus, f"--output={output}"]
    with job(under_mpi(2, *BUILD, *words)) as (process, rank):
        wait_for(lambda: rank(killed))
        victim = rank(killed)
        wait_for(lambda: any((output / ".build").glob(left)) or process.poll() is not None)
        victim.kill()
        said, _ = process.communicate(timeout=60)
    assert process.returncode != 0, said
    assert not (output / "manifest.json").exists()
    assert (output / ".build").exists()
    assert build_shards.main(words) == 0
    assert contents(output) == alone


def test_a_parquet_folder_gives_the_same_bytes_by_any_ranks(corpus, prose, tmp_path):
    texts = prose(240)
    (tmp_path / "parquet").mkdir()
    for number in range(3):
        rows = pa.table({"id": range(80), "text": texts[80 * number : 80 * number + 80]})
        pq.write_table(rows, tmp_path / "parquet" / f"{number}.parquet", row_group_size=10)
    words = [*(word for word in corpus if not word.startswith("--input=")), f"--input={tmp_path / 'parquet'}"]
    assert build_shards.main([*words, f"--output={tmp_path / 'alone'}"]) == 0
    for ranks in (1, 2):
        result = run(under_mpi(ranks, *BUILD, *words, f"--output={tmp_path / str(ranks)}"), timeout=300, **AS_ROOT)
        assert result.returncode == 0, result.stdout
    first = contents(tmp_path / "alone")
    assert len([path for path in first if path.match("train/*.tar")]) > 2
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == first
    assert Manifest.load(tmp_path / "alone").sources[0].read.documents == 240


def test_input_that_one_rank_cannot_read_ends_all(corpus, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"body": 1}\n')
    words = [*corpus, f"--input={tmp_path / 'bad.jsonl'}", f"--output={tmp_path / 'shards'}"]
    result = run(under_mpi(2, *BUILD, *words), timeout=120, **AS_ROOT)
    assert result.returncode == 2, result.stdout
    (line,) = [line for line in result.stdout.splitlines() if "error: rank " in line]
    assert line.endswith("bad.jsonl: line 2 (byte 14): no field 'text', only 'body'; set text_field")


def test_ranks_share_the_check_of_a_folder(alone, tmp_path, capsys):
    output = tmp_path / "shards"
    for path, content in alone.items():
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        (output / path).write_bytes(content)
    assert verify_shards.main([str(output)]) == 0
    tars = sorted((output / "train").glob("*.tar"))
    for tar in (tars[0], tars[1], tars[-1]):
        tar.write_bytes(tar.read_bytes()[::-1])
    assert verify_shards.main([str(output)]) == 1
    faults = [line for line in capsys.readouterr().out.splitlines() if "xxh3_128" in line]
    assert len(faults) == 3
    result = run(under_mpi(2, "-m", "data_prep.verify_shards", output), **AS_ROOT)
    assert result.returncode == 1
    assert sorted(line for line in result.stdout.splitlines() if "xxh3_128" in line) == sorted(faults)
