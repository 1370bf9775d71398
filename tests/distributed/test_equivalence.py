"""Two ranks under ZeRO 1, 2 and 3, with and without accumulation, against plain torch on one process."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import reference
from tests.distributed.equivalence_worker import CASES, CLIP_NORM, FIRING_PENALTY
from tests.launcher import launch, run

PERTURBATION = 6e-8
BF16_PERTURBATION = 2**-9
FP32 = [name for name in CASES if "bf16" not in name]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both ranks saw in every case: results[case][rank]."""
    compile_cpu_adam()
    folder = tmp_path_factory.mktemp("equivalence")
    launch("tests/distributed/equivalence_worker.py", folder)
    of_ranks = {name: [load_file(folder / f"{name}_rank{rank}.safetensors") for rank in (0, 1)] for name in CASES}
    return {**of_ranks, "take_over": load_file(folder / "take_over.safetensors")}


def compile_cpu_adam():
    """DeepSpeed compiles its AdamW for CPUs on first use, which takes minutes: before the launch, under its PATH."""
    code = "from deepspeed.ops.op_builder import CPUAdamBuilder; from pipeline.build_locks import clear_stale_locks"
    compiled = run([sys.executable, "-c", f"{code}; clear_stale_locks(); CPUAdamBuilder().load()"], timeout=1200)
    assert compiled.returncode == 0, compiled.stdout[-6000:]


@pytest.fixture(scope="module")
def plain():
    """Losses, first gradients and amplitudes of one process."""
    return {kind: reference.train_plainly(kind) for kind in ("none", "elastic")}


@pytest.fixture(scope="module")
def phased():
    """Losses and first gradients of one process whose batches become smaller."""
    return reference.train_plainly("none", is_phased=True)


@pytest.fixture(scope="module")
def penalized():
    """Losses, first gradients and amplitudes of one process that also minimises firing rates."""
    return reference.train_plainly("elastic", firing_penalty=FIRING_PENALTY)


@pytest.fixture(scope="module")
def clipped():
    """Losses of one process that clips."""
    return reference.train_plainly("none", clip_norm=CLIP_NORM)[0]


def _drift(losses, kind, perturbation):
    """How far a relative weight perturbation moves the losses: the largest of three, at each step or before."""
    runs = [reference.train_plainly(kind, perturbation, seed)[0] for seed in (1, 2, 3)]
    return np.maximum.accumulate(np.max([np.abs(run - losses) / losses for run in runs], axis=0))


@pytest.fixture(scope="module")
def drift(plain):
    """Of the spiking losses, by what fp32 rounds."""
    return _drift(plain["elastic"][0], "elastic", PERTURBATION)


@pytest.fixture(scope="module")
def bf16_drift(plain):
    """Of each kind's first loss, by what bf16 rounds; in this small model few spikes that flip move it by percents."""
    return {kind: _drift(plain[kind][0], kind, BF16_PERTURBATION)[0] for kind in plain}


@pytest.mark.parametrize("case", FP32)
def test_first_loss_and_gradients_equal_one_process(case, results, plain, phased, penalized):
    others = {"phases": phased, "penalty": penalized}
    losses, gradients, _ = next((run for name, run in others.items() if name in case), plain[CASES[case][0]])
    ours = results[case][0]
    assert float(ours["losses"][0]) == pytest.approx(losses[0], rel=1e-5)
    parted = {n: float((ours[f"grad/{n}"] - g).norm() / g.norm()) for n, g in gradients.items()}
    assert {name: value for name, value in parted.items() if not value < 1e-5} == {}


@pytest.mark.parametrize("case", [name for name in FP32 if name.startswith("none")])
def test_ordinary_losses_equal_one_process(case, results, plain, clipped, phased):
    expected = clipped if case.endswith("clip") else phased[0] if "phases" in case else plain["none"][0]
    np.testing.assert_allclose(results[case][0]["losses"], expected, rtol=1e-5)


def test_the_firing_rate_is_minimised_too(plain, penalized):
    parted = {n: float((penalized[1][n] - g).norm() / g.norm()) for n, g in plain["elastic"][1].items()}
    assert sum(value > 1e-3 for value in parted.values()) > 20


def test_clipping_acts(plain, clipped):
    assert (np.abs(clipped / plain["none"][0] - 1)[3:] > 1e-4).all()


@pytest.mark.parametrize("case", [name for name in CASES if "bf16" in name])
def test_the_first_loss_in_bf16_is_that_of_fp32_within_its_rounding(case, results, plain, bf16_drift):
    kind = CASES[case][0]
    assert float(results[case][0]["losses"][0]) == pytest.approx(plain[kind][0][0], rel=max(0.01, 2 * bf16_drift[kind]))


@pytest.mark.parametrize("case", [name for name in FP32 if name.startswith("elastic")])
def test_spiking_losses_part_no_further_than_rounding_does(case, results, plain, drift):
    losses = plain["elastic"][0]
    parted = np.abs(results[case][0]["losses"].numpy() - losses) / losses
    allowed = np.maximum(3 * drift, 1e-6)
    assert (parted[1:] <= allowed[1:]).all(), f"parted by {parted}, allowed {allowed}"


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("elastic")])
def test_amplitudes_are_equal_on_both_ranks(case, results):
    amplitudes = [results[case][rank]["amplitudes"] for rank in (0, 1)]
    assert amplitudes[0].dtype == torch.float32
    assert torch.equal(*amplitudes)
    assert not torch.equal(amplitudes[0][0], amplitudes[0][-1])  # they are tracked


@pytest.mark.parametrize("case", [name for name in FP32 if name.startswith("elastic")])
def test_tracked_amplitudes_do_not_depend_on_accumulation_or_checkpointing(case, results):
    torch.testing.assert_close(
        results[case][0]["amplitudes"][0], results["elastic_zero2_acc1"][0]["amplitudes"][0], rtol=1e-6, atol=0
    )


def test_a_layers_weights_are_gathered_once_a_pass_not_once_a_timestep(results):
    """Where nothing that was gathered is kept: once in every forward and once in every backward."""
    names = [name for name, _ in reference.model("elastic").named_parameters()]
    gathers = results["elastic_timestep_released"][0]["gathers"]
    assert gathers.shape == (reference.STEPS, len(names))
    layers = torch.tensor([".layers." in name for name in names])
    assert int(layers.sum()) > 20 and (gathers[:, layers] == 2).all()


def test_offload_goes_on_from_the_state_of_torchs_adamw(results):
    """A run may change its ds_config. Every step moves a weight by about the rate: what is lost of the state shows."""
    alone, taken_over = results["take_over"].values()
    torch.testing.assert_close(taken_over, alone, atol=1e-3 * reference.RATE, rtol=0)


def test_layer_checkpointing_changes_no_bit(results):
    whole, recomputed = results["elastic_zero2_acc1"][0], results["elastic_layer"][0]
    assert torch.equal(whole["losses"], recomputed["losses"])
    assert torch.equal(whole["amplitudes"], recomputed["amplitudes"])
