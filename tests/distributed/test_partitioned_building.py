"""Two ranks build a model of which neither ever holds all weights: it is the one that a process alone would have."""

import pytest
import torch
from safetensors.torch import load_file

from models.amplitudes import calibrate_amplitudes
from tests.distributed import reference
from tests.distributed.building_worker import built
from tests.launcher import launch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both ranks had: results[precision][rank]."""
    folder = tmp_path_factory.mktemp("building")
    launch("tests/distributed/building_worker.py", folder)
    return {name: [load_file(folder / f"{name}_rank{rank}.safetensors") for rank in (0, 1)] for name in DTYPES}


@pytest.mark.parametrize("precision", DTYPES)
def test_a_seeds_weights_do_not_depend_on_who_holds_them(precision, results):
    expected = {f"weights/{name}": parameter for name, parameter in built().named_parameters()}
    for rank in results[precision]:
        assert {name for name in rank if name.startswith("weights/")} == expected.keys()
        assert all(torch.equal(rank[name], weight.to(DTYPES[precision])) for name, weight in expected.items())
        assert rank["tied"]


@pytest.mark.parametrize("precision", DTYPES)
def test_no_rank_holds_more_than_its_share(precision, results):
    parameters = list(built().parameters())
    for rank in results[precision]:
        assert rank["whole"] == 0
        assert rank["held"] == sum(-(-parameter.numel() // 2) for parameter in parameters)


@pytest.mark.parametrize("precision", DTYPES)
def test_amplitudes_are_calibrated_through_the_engine_and_exact(precision, results):
    ours, theirs = (rank["amplitudes"] for rank in results[precision])
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    assert not torch.equal(ours, ours.bfloat16().float())  # none of it was rounded
    whole = built().to(DTYPES[precision])
    calibrate_amplitudes(whole, next(reference.loader().batches(1)).tensors)
    tolerance = 1e-6 if precision == "fp32" else 1e-2
    torch.testing.assert_close(ours, whole.model.stack.amplitudes, rtol=tolerance, atol=0)
