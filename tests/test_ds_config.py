"""What of a run DeepSpeed's own configuration says, and what the recipe says."""

import json
from pathlib import Path

import pytest

from data_prep.recipes import ConfigError
from pipeline.config import build_ds_config, load_run_config, offloads_optimizer, zero_stage

ROOT = Path(__file__).parent.parent


def load(*overrides):
    return load_run_config(["--recipe", str(ROOT / "tests/distributed/tiny.yaml"), *overrides])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[]", "holds no JSON object"),
        ("{", "cannot be read: "),
        ('{"zero_optimization": {"stage": 4}}', "stage 4: use 1, 2 or 3"),
        ('{"zero_optimization": 2}', "stage None: use 1, 2 or 3"),
        ('{"zero_optimization": {"stage": true}}', "stage True: use 1, 2 or 3"),
        ("[" * 100_000, "cannot be read: "),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}',
            'offload_optimizer "cpu", which is no object',
        ),
        (
            '{"zero_optimization": {"stage": 2}, "activation_checkpointing": {"partition_activations": true}}',
            "sets activation_checkpointing, which cannot serve here: DeepSpeed's own checkpointing is reentrant and "
            "reduces a gradient twice where one weight serves several timesteps, and its partition_activations "
            "empties the input of a layer that the residual still needs: set engine.checkpointing",
        ),
        ('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}', "which engine.precision decides"),
    ],
)
def test_ds_configs_that_are_refused(tmp_path, content, expected):
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as raised:
        load("--engine.ds_config", str(path))
    (fault,) = raised.value.faults
    assert expected in fault


@pytest.mark.parametrize(
    ("zero", "offloads"),
    [
        ({}, False),
        ({"offload_optimizer": {"device": "none"}}, False),
        ({"offload_optimizer": {"device": "cpu"}}, True),
        ({"offload_param": {"device": "cpu"}}, False),
    ],
)
def test_who_updates_the_weights_depends_on_where_the_optimizer_rests(tmp_path, zero, offloads):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, **zero}}))
    assert offloads_optimizer(load("--engine.ds_config", str(path))) == offloads


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_ds_configs_are_what_their_names_say(path):
    config = load("--engine.ds_config", str(path))
    assert path.stem.startswith(f"zero{zero_stage(config)}")
    assert offloads_optimizer(config) == path.stem.endswith("_offload")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ds_config_gets_what_the_recipe_owns(stage):
    path = ROOT / f"ds_configs/zero{stage}.json"
    config = load("--engine.ds_config", str(path), "--engine.precision", "bf16", "--optimizer.clip_norm", "0.5")
    ds_config = build_ds_config(config, 2, Path("runs/toy"))
    assert zero_stage(config) == stage
    assert ds_config["zero_optimization"] == json.loads(path.read_text())["zero_optimization"]
    assert ds_config["train_batch_size"] == 16 == 2 * 4 * ds_config["gradient_accumulation_steps"]
    assert ds_config["train_micro_batch_size_per_gpu"] == 4
    assert ds_config["gradient_clipping"] == 0.5
    assert ds_config["bf16"] == {"enabled": True}
    assert ds_config["tensorboard"] == {"enabled": True, "output_path": "runs/toy", "job_name": "tensorboard"}
    assert build_ds_config(load(), 1, Path("r"))["bf16"] == {"enabled": False}
