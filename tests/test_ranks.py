"""Joining other processes, or not; what ranks say to each other is tried under mpirun in tests/distributed."""

import sys
import types

import numpy as np
import pytest

from data_prep import ranks as module
from data_prep import train_tokenizer
from data_prep.ranks import LAUNCHERS, Ranks, Refusal, join_ranks, launched_as, run_ranks


@pytest.fixture
def launched(monkeypatch):
    """launched(NAME=value): sets a launcher's variables, and no other's."""
    for name in {name for names in LAUNCHERS for name in names}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "HEAD_START_SECONDS", 0.0)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, (2, 4)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2)),
        ({"PMIX_RANK": "3", "SLURM_NTASKS": "8"}, (3, 8)),
        ({"PMIX_RANK": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1)),
        ({"SLURM_NTASKS": "8"}, (0, 1)),  # in a job's script
        ({"PMIX_RANK": "0", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, (0, 1)),
    ],
)
def test_launchers_tell_a_process_its_place(launched, variables, place):
    launched(**variables)
    assert launched_as() == place


def no_mpi4py():
    return None  # as sys.modules says of what cannot be imported


def mpi4py_alone():
    fake = types.ModuleType("mpi4py")

    def load_library(name):
        raise RuntimeError("cannot load MPI library\nof many lines")

    fake.__getattr__ = load_library
    return fake


def another_mpi():
    fake = types.ModuleType("mpi4py")
    world = types.SimpleNamespace(rank=0, size=1)
    fake.MPI = types.SimpleNamespace(COMM_WORLD=world, Get_library_version=lambda: "MPICH Version: 4, of May")
    return fake


BROKEN = [
    (no_mpi4py, "3 processes were started together, but mpi4py does not work here (import of mpi4py halted"),
    (mpi4py_alone, "does not work here (cannot load MPI library): install it and an MPI library (pip install"),
    (another_mpi, "has started 3 processes, but MPI (MPICH Version: 4) sees 1: start them by the mpirun of this MPI"),
]


@pytest.mark.parametrize(("fake", "message"), BROKEN)
def test_processes_that_cannot_join_say_what_to_do(launched, monkeypatch, capsys, fake, message):
    launched(OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="3")
    monkeypatch.setitem(sys.modules, "mpi4py", fake())
    assert run_ranks(lambda ranks: pytest.fail("joined")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1


def test_one_process_needs_no_mpi(launched, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for variables in ({}, {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}):
        launched(**variables)
        ranks = join_ranks()
        assert type(ranks) is Ranks
        assert (ranks.rank, ranks.size, ranks.is_first) == (0, 1, True)
        assert ranks.share(lambda: [1, 2], list[int]) == [1, 2]
        assert ranks.gather("x", str) == ["x"]
        assert ranks.exchange([np.arange(3, dtype=np.uint64)])[0].tolist() == [0, 1, 2]
        assert run_ranks(lambda ranks: 1) == 1


def test_one_process_ends_as_a_command_does(launched, capsys):
    def refused(ranks):
        return ranks.agree(lambda: (_ for _ in ()).throw(ValueError("no such thing: take another")))

    assert run_ranks(refused) == 2
    assert capsys.readouterr().err == "error: no such thing: take another\n"
    with pytest.raises(ZeroDivisionError):
        run_ranks(lambda ranks: 1 / 0)
    assert issubclass(Refusal, ValueError)


def test_a_tokenizer_is_trained_by_one_process(launched, capsys):
    launched(OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="2")
    assert train_tokenizer.main([]) == 2
    assert capsys.readouterr().err == "error: 2 processes were started, but one trains a tokenizer: start one\n"
