"""How the ranks of a run find each other, and what they do together: real processes, joined by gloo."""

import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from pipeline import ending
from pipeline.world import Place, current_world, join_world, leave_world
from tests.launcher import free_port
from tests.ranks import LONG, SHORT, ended, run, said, started, torchrun_store, wait_for


def tells_its_place(world):
    print(world.rank, world.size, world.is_main, world.device)


def works_together(world):
    assert world.on_main(lambda: ["first", 1]) == ["first", 1]
    assert world.on_main(lambda: None) is None
    assert world.on_main(lambda: {"third": 3}) == {"third": 3}
    assert world.sum(torch.tensor([1, world.rank])).tolist() == [world.size, sum(range(world.size))]
    assert world.gather(f"rank {world.rank}") == [f"rank {rank}" for rank in range(world.size)]
    assert world.agree(True) and not world.agree(world.rank < world.size - 1)
    world.barrier()


def counts_actions(world):
    actions = []
    world.on_main(lambda: actions.append(world.rank))
    print(actions)


def joins_again(world):
    assert join_world(Place.from_environment(), world.device, "gloo", SHORT) is world is current_world()
    leave_world()
    assert current_world() is None
    leave_world()


def works_until(world, end):
    (end.parent / "first" / f"met{world.rank}").touch()
    while not world.agree(end.exists()):
        pass


def makes_a_group(world):
    print(dist.new_group()._get_backend(world.device).options._timeout == LONG)


@pytest.mark.parametrize("size", [1, 3])
def test_ranks_work_together(tmp_path, size):
    codes, output = run(tmp_path, works_together, size)
    assert (codes, output) == ([0] * size, "")


def test_every_rank_knows_its_place(tmp_path):
    codes, output = run(tmp_path, tells_its_place, 2)
    assert (codes, output) == ([0, 0], "0 2 True cpu\n1 2 False cpu\n")


def test_an_action_runs_on_rank_0_alone(tmp_path):
    codes, output = run(tmp_path, counts_actions, 3)
    assert (codes, output) == ([0, 0, 0], "[0]\n[]\n[]\n")


@pytest.mark.parametrize("size", [1, 2])
def test_a_world_is_joined_once_and_left_once(tmp_path, size):
    codes, output = run(tmp_path, joins_again, size)
    assert (codes, output) == ([0] * size, "")


def test_groups_made_later_wait_as_long(tmp_path):
    codes, output = run(tmp_path, makes_a_group, 2)
    assert (codes, output) == ([0, 0], "True\nTrue\n")


def test_a_rank_that_never_comes_is_named_by_rank_0(tmp_path):
    codes, output = run(tmp_path, tells_its_place, 3, absent=[2], limit=SHORT)
    assert codes == [ending.PROCESS_LOST] * 2
    assert output.startswith("error: of 3 ranks 2 did not come within ")
    assert output.count("\n") == 1


def test_without_rank_0_the_others_name_its_address(tmp_path):
    port = free_port()
    limit = timedelta(seconds=1.2)
    codes, output = run(tmp_path, tells_its_place, 3, absent=[0], limit=limit, MASTER_PORT=str(port))
    assert codes == [ending.PROCESS_LOST] * 2
    assert output.count(f"error: rank 0 does not answer at 127.0.0.1:{port} after ") == 1


def test_a_port_that_is_taken_is_named_with_the_remedy(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        codes, output = run(tmp_path, tells_its_place, 2, absent=[1], limit=SHORT, MASTER_PORT=str(port))
    assert codes == [ending.BAD_INPUT]
    assert output.startswith(f"error: rank 0 cannot listen: another run uses port {port} of 127.0.0.1")
    assert "give deepspeed another --master_port" in output
    assert output.count("\n") == 1


def test_a_run_is_not_disturbed_by_another_at_its_port(tmp_path):
    first, second, end = tmp_path / "first", tmp_path / "second", tmp_path / "end"
    first.mkdir()
    second.mkdir()
    port = str(free_port())
    with started(first, works_until, 2, end, MASTER_PORT=port) as processes:
        wait_for(lambda: len(list(first.glob("met*"))) == 2)
        codes, output = run(second, tells_its_place, 2, limit=SHORT, MASTER_PORT=port)
        end.touch()
        assert ended(processes) == [0, 0]
    assert codes == [ending.BAD_INPUT] * 2
    assert output.startswith(f"error: rank 0 cannot listen: another run uses port {port} of 127.0.0.1")
    assert output.count("\n") == 1
    assert said(first) == ""


def test_the_store_of_torchrun_is_used_where_there_is_one(tmp_path):
    _store, variables = torchrun_store()
    codes, output = run(tmp_path, works_together, 2, **variables)
    assert (codes, output) == ([0, 0], "")


def test_torchrun_may_start_the_ranks_again(tmp_path):
    _store, variables = torchrun_store()
    for attempt in range(2):
        folder = tmp_path / f"{attempt}"
        folder.mkdir()
        codes, output = run(folder, works_together, 2, TORCHELASTIC_RESTART_COUNT=f"{attempt}", **variables)
        assert (codes, output) == ([0, 0], "")


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, Place(rank=0, size=1, local_rank=0, local_size=1, address="127.0.0.1", port=29500)),
        (
            {
                "RANK": "5",
                "WORLD_SIZE": "8",
                "LOCAL_RANK": "1",
                "LOCAL_SIZE": "4",
                "MASTER_ADDR": "a",
                "MASTER_PORT": "7",
            },
            Place(rank=5, size=8, local_rank=1, local_size=4, address="a", port=7),
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            Place(rank=1, size=2, local_rank=1, local_size=2, address="127.0.0.1", port=29500),
        ),
    ],
)
def test_launchers_tell_the_place(monkeypatch, variables, place):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Place.from_environment() == place
