import os
import subprocess
import sys

import pytest
import torch
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch.optim.lr_scheduler import LambdaLR

from models.config import NeuronConfig, preset
from models.modeling import SpikeLMForPreTraining
from pipeline.config import ScheduleSettings, load_run_config
from pipeline.engine import (
    _share_cores,
    build_optimizer,
    learning_rate_factor,
    parameter_groups,
    seed_dropout,
    seed_weights,
)
from pipeline.world import Place
from tests.distributed import reference


def _rates(total_steps, **settings):
    factor = learning_rate_factor(ScheduleSettings(**settings), total_steps)
    return [factor(step) for step in range(total_steps)]


def test_linear_schedule_warms_up_from_above_zero_and_ends_above_zero():
    rates = _rates(10, kind="linear", warmup_steps=4)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_cosine_schedule_ends_at_its_final_ratio():
    factor = learning_rate_factor(ScheduleSettings(kind="cosine", warmup_steps=0, final_ratio=0.1), 8)
    assert factor(0) == 1.0
    assert factor(4) == pytest.approx(0.55)
    assert factor(8) == pytest.approx(0.1)
    assert factor(100) == pytest.approx(0.1)  # beyond the end it stays there


def test_a_schedule_may_end_before_the_run():
    rates = _rates(10, kind="linear", warmup_steps=2, decay_steps=6)
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25, 0, 0, 0, 0])


def test_the_schedule_of_the_released_code_is_a_recipe():
    """Its scheduler moves once for each of 8 processes and step: 5,000 and 500,000 moves are 625 and 62,500 steps."""
    config = load_run_config(["--recipe", "launch/recipes/encoder-base-released.yaml"])
    rate = learning_rate_factor(config.schedule, config.training.total_steps)
    for step in (0, 624, 625, 30_000, 62_499, 62_500, 99_999):
        moved = 8 * step  # transformers' linear schedule, at the first of the processes' moves
        released = moved / 5000 if moved < 5000 else max(0.0, (500_000 - moved) / (500_000 - 5000))
        assert rate(step) == pytest.approx(released, abs=2 / 625)
    assert rate(62_499) > rate(62_500) == 0


def test_schedule_without_warm_up_starts_at_the_peak():
    assert _rates(3, kind="linear", warmup_steps=0) == pytest.approx([1, 2 / 3, 1 / 3])


def test_first_optimizer_step_is_not_at_rate_zero():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=1.0)
    LambdaLR(optimizer, learning_rate_factor(ScheduleSettings(warmup_steps=9), 100))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_biases_and_norms_do_not_decay():
    model = SpikeLMForPreTraining(preset("encoder-tiny", vocab_size=50, neuron=NeuronConfig(kind="none")))
    decayed, others = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    assert all(parameter.dim() == 2 for parameter in decayed["params"])
    assert all(parameter.dim() == 1 for parameter in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_an_operator_that_cannot_be_compiled_is_a_fault_of_the_ds_config(monkeypatch):
    def fail(builder):
        raise RuntimeError("Error building extension 'cpu_adam'\nand a page of g++'s output")

    monkeypatch.setattr(CPUAdamBuilder, "load", fail)
    config, expected = reference.config(stage="2_offload"), r"zero2_offload.json' offloads .* \(Error .* 'cpu_adam'\): "
    with pytest.raises(ValueError, match=f"{expected}install g\\+\\+ and ninja, or take"):
        build_optimizer(reference.model("none"), config)


def test_every_rank_drops_out_units_of_its_own():
    draws = []
    for rank in range(4):
        seed_dropout(7, rank)
        draws.append(tuple(torch.rand(4).tolist()))
    seed_weights(7)
    draws.append(tuple(torch.rand(4).tolist()))
    seed_dropout(8, 0)
    draws.append(tuple(torch.rand(4).tolist()))
    assert len(set(draws)) == len(draws)
    seed_dropout(7, 2)
    assert tuple(torch.rand(4).tolist()) == draws[2]


@pytest.mark.parametrize(
    ("cores", "processes", "threads", "shares"),
    [(8, 1, None, [8]), (8, 3, None, [2]), (2, 8, None, [1]), (8, 2, 7, [7])],
)
def test_the_cores_of_a_machine_are_shared_out_among_its_processes(monkeypatch, cores, processes, threads, shares):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    place = Place(rank=0, size=64, local_rank=0, local_size=processes, address="127.0.0.1", port=0)
    _share_cores(place, threads)
    assert given == shares


def test_a_launcher_may_set_the_threads_but_the_recipe_decides(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    place = Place(rank=0, size=1, local_rank=0, local_size=1, address="127.0.0.1", port=0)
    _share_cores(place, None)
    assert given == []
    _share_cores(place, 5)
    assert given == [5]


@pytest.mark.parametrize(("variables", "is_kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)], ids=str)
def test_the_heap_is_kept_unless_the_environment_says_otherwise(variables, is_kept):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    result = subprocess.run(
        [sys.executable, "-c", PAGE_FAULTS], env=kept | variables, capture_output=True, text=True, check=True
    )
    before, after = map(int, result.stdout.splitlines()[-1].split())
    assert after < before / 5 if is_kept else after > before / 2


PAGE_FAULTS = """
import resource, torch
from pipeline.engine import keep_heap

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 << 20)  # 64 MiB, and freed again
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_heap()
torch.ones(16 << 20)
print(before, faults())
"""
"""Prints how often the kernel had to give a page, before and after."""
