import copy
import dataclasses
import functools
import json
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from data_prep.recipes import (
    ConfigError,
    known_fields,
    load_settings,
    save_settings,
    settings_from_dict,
    settings_to_dict,
)
from pipeline.config import (
    RunConfig,
    accumulation_steps,
    differences,
    is_decoder,
    load_run_config,
)

ROOT = Path(__file__).parent.parent
MINIMAL = {
    "name": "toy",
    "data": {"shards": "data/toy"},
    "schedule": {"warmup_steps": 2},
    "engine": {"ds_config": str(ROOT / "ds_configs/zero2.json")},
    "training": {"total_steps": 10, "global_batch_size": 8, "micro_batch_size": 2},
    "evaluation": {"every": 5, "micro_batch_size": 4},
    "checkpoint": {"every": 5},
}

text = st.text(max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6
)
PLAIN = {
    NoneType: st.none(),
    bool: st.booleans(),
    int: st.integers(0, 2**70),
    float: st.one_of(*[st.floats(0, 1)] * 4, st.floats(0, 1e300)),  # shares are many
    str: text,
    dict[str, Any]: st.dictionaries(text, trees, max_size=3),
}


def values_of(type_):
    """What a field of this type may hold."""
    origin, parts = get_origin(type_), get_args(type_)
    if dataclasses.is_dataclass(type_):
        hints = get_type_hints(type_, include_extras=True)
        fields = st.fixed_dictionaries({name: values_of(hint) for name, hint in hints.items()})
        return accepted(type_, fields).map(lambda values: type_(**values))
    if origin is Annotated:
        return accepted(type_, values_of(parts[0]))
    if origin is Literal:
        return st.sampled_from(parts)
    if origin in (Union, UnionType):
        return st.one_of(map(values_of, parts))
    if origin is dict and type_ not in PLAIN:
        return st.dictionaries(*map(values_of, parts), max_size=3)
    if origin is tuple and parts[1:] == (...,):
        return st.lists(values_of(parts[0]), max_size=3).map(tuple)
    return st.tuples(*map(values_of, parts)) if origin is tuple else PLAIN[type_]


def accepted(type_, values):
    """Those of `values` that keep within the bounds of `type_`."""
    adapter = TypeAdapter(type_)

    def is_valid(value):
        try:
            adapter.validate_python(value)
        except ValidationError:
            return False
        return True

    return values.filter(is_valid)


configs = values_of(RunConfig)


def write_and_load(path, *overrides, recipe=MINIMAL):
    """The run of a recipe, text or mapping, written to `path`."""
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    return load_run_config(["--recipe", str(path), *overrides])


@pytest.fixture
def load(tmp_path):
    """load(*overrides, recipe=text or mapping): the run of a recipe written to a file."""
    return functools.partial(write_and_load, tmp_path / "recipe.yaml")


@pytest.fixture(scope="module")
def load_any(tmp_path_factory):
    """As `load`, for many examples after one another."""
    return functools.partial(write_and_load, tmp_path_factory.mktemp("any") / "recipe.yaml")


def faults_of(load, *overrides, recipe=MINIMAL):
    with pytest.raises(ConfigError) as raised:
        load(*overrides, recipe=recipe)
    return raised.value.faults


def test_recipe_then_overrides_then_defaults(load):
    config = load("--training.total_steps", "100", "--seed=3", "--model.overrides.hidden_size", "64", "--name", "2024")
    assert config.training == dataclasses.replace(load().training, total_steps=100)
    assert (config.seed, config.name) == (3, "2024")
    assert config.model.overrides == {"hidden_size": 64}
    assert config.optimizer.betas == (0.9, 0.999)
    assert config.model.neuron.num_timesteps == 4


@pytest.mark.parametrize("argument", [["--local_rank=1"], ["--local_rank", "1"]])
def test_the_launchers_argument_is_ignored(load, argument):
    assert load(*argument) == load()


def test_values_are_written_as_in_yaml(load):
    config = load(
        "--optimizer.learning_rate", "1e-3", "--optimizer.betas", "[0.8, 0.9]", "--logging.progress", "false",
        "--training.stop_after_step", "null", "--model.neuron", "{kind: lif, num_timesteps: 2}",
        "--objective.static_masking",
    )  # fmt: skip
    assert config.optimizer.learning_rate == 1e-3
    assert config.optimizer.betas == (0.8, 0.9)
    assert (config.logging.progress, config.objective.static_masking) == (False, True)
    assert config.training.stop_after_step is None
    assert (config.model.neuron.kind, config.model.neuron.leak) == ("lif", 0.5)


@pytest.mark.parametrize("preset", ["decoder", "released"])
def test_the_neurons_of_a_preset_may_be_of_another_kind(load, preset):
    whole = settings_to_dict(load("--model.neuron.preset", preset))["model"]["neuron"]
    for neuron in ({"preset": preset}, {**whole, "leak": None}):
        assert load("--model.neuron", json.dumps({**neuron, "kind": "lif"})).model.neuron.kind == "lif"
    assert "reset" in faults_of(load, "--model.neuron", "{preset: decoder, reset: released, kind: lif}")[0]


def test_all_faults_are_told_at_once(load, tmp_path):
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 0}, "train_batch_size": 4, "zero_optimisation": 1})
    )
    recipe = """
name: a/b
sede: 1
name: a/b
data: {shards: 5}
model: {preset: encoder-tinny, overrides: {hidden_sise: 3}, neuron: {kind: elastic, leak: 2}}
optimizer: {learning_rate: -1, betas: [0.9]}
schedule: {warmup_steps: 20, decay_steps: 15, kind: cosin}
engine: {ds_config: TMP/ds.json, precision: fp16}
training: {total_steps: 10, global_batch_size: 7, micro_batch_size: 2, stop_after_step: yes}
evaluation: {every: 1.5, micro_batch_size: 4}
""".replace("TMP", str(tmp_path))
    faults = faults_of(load, "--trainig.total_steps", "5", "stray", "--threads", recipe=recipe)
    expected = [
        ("stray", "set by --field VALUE"),
        ("threads", "write --threads VALUE"),
        ("name", "line 2 and again in line 4"),
        ("sede", "did you mean seed?"),
        ("trainig", "did you mean training?"),
        ("data.shards", "5 should be a valid string"),
        ("model.neuron", "leak is 2"),
        ("optimizer.learning_rate", "-1 should be greater than 0"),
        ("optimizer.betas", "missing"),
        ("schedule.kind", "'cosin' should be 'linear' or 'cosine'"),
        ("engine.precision", "'fp16' should be 'fp32' or 'bf16'"),
        ("training.stop_after_step", "True should be a valid integer"),
        ("evaluation.every", "1.5 should be a valid integer"),
        ("checkpoint.every", "--checkpoint.every VALUE"),
        ("name", "'a/b' cannot name a folder"),
        ("model.preset", "did you mean encoder-tiny?"),
        ("model.overrides.hidden_sise", "did you mean hidden_size?"),
        ("engine.ds_config", "train_batch_size to 4, which training.global_batch_size decides"),
        ("engine.ds_config", "unknown key zero_optimisation: did you mean zero_optimization?"),
        ("engine.ds_config", "stage 0"),
        ("training.global_batch_size", "7 is not divisible by training.micro_batch_size 2"),
        ("schedule.decay_steps", "15 does not lie between schedule.warmup_steps 20 and training.total_steps 10"),
        ("schedule.warmup_steps", "20 is more than training.total_steps 10"),
    ]
    for name, text in expected:
        assert any(fault.startswith(name) and text in fault for fault in faults), (name, text, faults)
    assert len(faults) == len(expected), faults
    assert all("\n" not in fault for fault in faults)


FAULTS = [
    (["--schedule.final_ratio", "1.5"], "schedule.final_ratio: 1.5 should be less than or equal to 1"),
    (["--training.total_steps", "0"], "training.total_steps: 0 should be greater than 0"),
    (["--training.total_steps", "'9'"], "training.total_steps: '9' should be a valid integer"),
    (["--objective.static_masking", "1"], "objective.static_masking: 1 should be a valid boolean"),
    (["--optimizer.learning_rate", ".nan"], "optimizer.learning_rate: nan should be a finite number"),
    (["--optimizer.learning_rate", "1e999"], "should be a finite number"),
    (["--model", "null"], "model: None is not a section"),
    (["--model.neuron", "{kind: none, num_timesteps: 4}"], "model.neuron: neuron.num_timesteps is 4"),
    (["--model.overrides.hidden_size", "big"], "model.overrides.hidden_size: 'big' should be a valid integer"),
    (["--model.overrides.hidden_size", "63"], "model.overrides: hidden_size 63 is no multiple"),
    (["--model.overrides.neuron", "{}"], "model.overrides.neuron: unknown field"),
    (["--model.overrides", "{null: 1}"], "model.overrides.null: unknown field"),
    (["--model.warm_start", "!!binary aGk="], "model.warm_start: \"b'hi'\" holds no model.safetensors"),
    (["--model.warm_start", "nowhere"], "model.warm_start: 'nowhere' holds no model.safetensors"),
    (["--data.shuffle_run", "64"], "data.shuffle_run: 64 has no effect"),
    (["--engine.ds_config", "nowhere.json"], "engine.ds_config: 'nowhere.json' cannot be read: No such file"),
    (
        ["--engine.checkpointing_timesteps", "2"],
        "engine.checkpointing_timesteps: 2 has no effect with engine.checkpointing none: set that to timestep",
    ),
    (
        ["--model.neuron.kind", "lif", "--engine.spike_backend", "torch"],
        "engine.spike_backend: 'torch' has no effect with model.neuron.kind lif",
    ),
    (
        ["--model.neuron.kind", "none", "--engine.recompute_hidden", "true"],
        "engine.recompute_hidden: True has no effect with model.neuron.kind none",
    ),
    (
        ["--model.neuron", "{kind: lif, frequency: 2.0, momentum: 0.99}"],
        "model.neuron.frequency: 2.0 has no effect with model.neuron.kind lif",
    ),
    (["--model.neuron", "{kind: none, momentum: 0.5}"], "model.neuron.momentum: 0.5 has no effect with model.neuron"),
    (["--engine.spike_backend", "cuda"], "engine.spike_backend: 'cuda' should be 'auto', 'torch', 'cpp' or 'triton'"),
    (["--training.stop_after_step", "11"], "training.stop_after_step: 11 comes after"),
    (["--resume", "nowhere"], "resume: 'nowhere' is neither auto nor never"),
    (["--resume", ""], "resume: '' is neither auto nor never"),
    (["--name", ".."], "name: '..' cannot name a folder"),
    (["--name", "a" * 256], "name: 'aaa"),
    (["--name", "a\0b"], r"name: 'a\x00b' cannot name a folder"),
    (["--data.shards", "a" * 256], "data.shards: 'aaa"),
    (["--logging.evry", "1"], "logging.evry: unknown field, with value 1: did you mean logging.every?"),
    (
        ["--logging.colour", "1"],
        "logging.colour: unknown field, with value 1: logging has every, tensorboard, progress",
    ),
    (["--name.first", "x"], "name: {'first': 'x'} should be a valid string"),
]


@pytest.mark.parametrize(("overrides", "expected"), FAULTS)
def test_each_fault_names_field_value_and_remedy(load, overrides, expected):
    (fault,) = faults_of(load, *overrides)
    assert expected in fault


def test_shards_are_where_their_recipe_builds_them():
    demo = ["--recipe", "launch/recipes/demo.yaml"]
    assert load_run_config(demo).data.shards == "data/demo"
    with pytest.raises(ConfigError, match="data.shards: 'data/my', but data.shards_recipe .* builds 'data/demo'"):
        load_run_config([*demo, "--data.shards", "data/my"])
    none = ["--data.shards_recipe", "null", "--data.tokenizer_recipe", "null"]
    assert load_run_config([*demo, "--data.shards", "data/my", *none]).data.shards == "data/my"


def test_fields_of_masking_are_refused_for_a_decoder():
    tiny = ["--recipe", "tests/distributed/tiny.yaml", "--model.preset", "decoder-tiny"]
    assert is_decoder(load_run_config([*tiny, "--objective.next_sentence", "true"]).model)  # as a saved recipe has it
    with pytest.raises(ConfigError, match=r"objective\.mask_probability: 0\.3 has no effect on decoder-tiny"):
        load_run_config([*tiny, "--objective.mask_probability", "0.3"])


@pytest.mark.parametrize("field", ["resume", "model.warm_start", "data.shards_recipe"])
def test_a_name_too_long_for_a_file_is_a_fault(load, field):
    (fault,) = faults_of(load, f"--{field}={'a' * 300}")
    assert fault.startswith(f"{field}: ")


@pytest.mark.parametrize("depth", [*range(194, 204), 300])
def test_overrides_nested_too_deep_name_their_field(load, depth):
    (fault,) = faults_of(load, f"--model.overrides.a={'[' * depth}{']' * depth}")
    assert fault.startswith("model.overrides") and "total_steps" not in fault


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [", "is not YAML: "),
        ("- name", "holds list, not fields"),
        ("name: \x00", "is not YAML: "),
    ],
)
def test_broken_files(load, text, expected):
    assert any(expected in fault for fault in faults_of(load, recipe=text))


def test_missing_file():
    with pytest.raises(ConfigError, match="recipe: nowhere.yaml cannot be read: No such file or directory"):
        load_run_config(["--recipe", "nowhere.yaml"])


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as exit_:
        load_run_config(["--recipe", "x", "--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in known_fields(RunConfig).values():
        assert field.doc.endswith((".", ")")), f"{field.name} has no explanation"
        assert field.doc in text
        assert field.is_section or f"--{field.name} VALUE" in text
    assert "(int; required)" in text and '(linear | cosine; default: "linear")' in text


def test_saved_recipes_load_as_equal(load, tmp_path):
    config = load("--optimizer.eps", "1e-8", "--model.overrides.hidden_act", "relu", "--threads", "2")
    assert settings_from_dict(RunConfig, settings_to_dict(config)) == config
    path = tmp_path / "saved.yaml"
    save_settings(config, path)
    assert load_run_config(["--recipe", str(path)]) == config
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@settings(max_examples=30)
@given(config=configs)
def test_any_config_survives_dict_and_json_and_file(tmp_path_factory, config):
    tree = settings_to_dict(config)
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    save_settings(config, path)
    for saved in (tree, json.loads(json.dumps(tree)), yaml.safe_load(path.read_text())):
        assert settings_from_dict(RunConfig, saved) == config
    assert differences(config, settings_from_dict(RunConfig, tree)) == []


@settings(max_examples=30)
@given(config=configs)
def test_any_config_can_be_given_by_arguments_alone(config):
    arguments = []
    for field in known_fields(RunConfig).values():
        if not field.is_section:
            value = functools.reduce(getattr, field.name.split("."), config)
            for part in map(dataclasses.asdict, value) if field.is_repeated else [value]:
                arguments.append(f"--{field.name}={part if field.type is str else json.dumps(part)}")
    assert load_settings(RunConfig, arguments, "pretrain") == config


@settings(max_examples=150)
@given(name=st.sampled_from(list(known_fields(RunConfig))), value=trees)
def test_any_value_of_a_field_is_taken_or_every_fault_names_the_field(load_any, name, value):
    recipe = copy.deepcopy(MINIMAL)
    *sections, last = name.split(".")
    functools.reduce(lambda tree, section: tree.setdefault(section, {}), sections, recipe)[last] = value
    try:
        load_any(recipe=recipe)
    except ConfigError as error:
        assert error.faults
        assert all(name.removeprefix("model.") in fault and "\n" not in fault for fault in error.faults)


INDEPENDENT = {
    "name": "..",
    "seed": "-1",
    "resume": "nowhere",
    "colour": "red",
    "model.preset": "encoder-tinny",
    "model.overrides": "[]",
    "model.neuron": "{leak: 2}",
    "model.warm_start": "nowhere",
    "data.shards": "",
    "data.shuffle_run": "64",
    "objective.mask_probability": "0",
    "optimizer.betas": "0.9",
    "schedule.warmup_steps": "11",
    "engine.ds_config": "nowhere.json",
    "engine.precision": "fp16",
    "training.global_batch_size": "7",
    "training.stop_after_step": "0",
    "evaluation.every": "1.5",
    "checkpoint.keep": "two",
    "logging.progress": "1",
}
"""For each of these fields a value that is a fault whatever the other fields hold."""


@settings(max_examples=60)
@given(names=st.lists(st.sampled_from(list(INDEPENDENT)), unique=True, min_size=1))
def test_as_many_faults_are_told_as_there_are(load_any, names):
    faults = faults_of(load_any, *[f"--{name}={INDEPENDENT[name]}" for name in names])
    told = [name for name in INDEPENDENT for fault in faults if fault.startswith(f"{name}: ")]
    assert sorted(told) == sorted(names) and len(faults) == len(names), faults


def test_saved_settings_of_another_version_are_refused():
    with pytest.raises(ConfigError, match="seeds: unknown field, with value 1"):
        settings_from_dict(RunConfig, {**MINIMAL, "seeds": 1})


def test_differences_name_what_decides_training(load):
    old = load()
    new = load(
        "--optimizer.learning_rate", "1e-3", "--model.overrides.hidden_size", "64", "--seed", "1",
        "--training.total_steps", "20", "--data.sample_length", "8",
        "--engine.precision", "bf16", "--objective.next_sentence", "false", "--schedule.kind", "cosine",
    )  # fmt: skip
    assert differences(old, old) == []
    assert [line.split(":")[0] for line in differences(old, new)] == [
        "seed", "data.sample_length", "objective.next_sentence", "optimizer.learning_rate",
        "schedule.kind", "engine.precision", "training.total_steps", "model.overrides.hidden_size",
    ]  # fmt: skip
    assert "optimizer.learning_rate: 0.0002 in the run, 0.001 now" in differences(old, new)
    assert "model.overrides.hidden_size: 'not set' in the run, 64 now" in differences(old, new)


def test_what_may_change_on_resumption(load):
    new = load(
        "--name", "other", "--output", "elsewhere", "--resume", "never", "--threads", "1", "--data.num_workers", "2",
        "--data.shards", "moved", "--training.stop_after_step", "4", "--training.micro_batch_size", "4",
        "--logging.every", "1", "--evaluation.every", "0", "--checkpoint.keep", "9", "--data.order", "nfs",
        "--engine.checkpointing", "timestep", "--engine.checkpointing_timesteps", "2",
        "--engine.recompute_hidden", "true", "--engine.spike_backend", "torch", "--engine.logits_at_once", "0",
    )  # fmt: skip
    assert differences(load(), new) == []


def test_accumulation_by_world_size(load):
    config = load()
    assert [accumulation_steps(config, world) for world in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(ValueError, match="8 is not divisible by .* 2 x 3 processes = 6: use a global batch of 6 or 12"):
        accumulation_steps(config, 3)
    with pytest.raises(ValueError, match="2 x 5 processes = 10: use a global batch of 10,"):
        accumulation_steps(config, 5)


@pytest.mark.parametrize("recipe", sorted((ROOT / "launch/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load_run_config(["--recipe", str(recipe)]).name == recipe.stem


def test_the_twin_of_the_demo_differs_in_its_layers_only(monkeypatch):
    monkeypatch.chdir(ROOT)
    demo, twin = (load_run_config(["--recipe", f"launch/recipes/{name}.yaml"]) for name in ("demo", "demo-nolayers"))
    assert dataclasses.replace(twin, name=demo.name, model=demo.model) == demo
    assert twin.model.overrides == {**demo.model.overrides, "num_hidden_layers": 0}
