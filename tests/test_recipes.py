from dataclasses import dataclass
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.build_shards import BuildSettings
from data_prep.recipes import (
    ConfigError,
    FolderName,
    Share,
    known_fields,
    load_settings,
    run_command,
    save_settings,
    strict,
)


@strict
@dataclass(frozen=True)
class Settings:
    """Sort things."""

    input: tuple[str, ...]
    """Names of things."""

    sizes: tuple[int, ...] = (1, 2)
    """Sizes in metres."""

    corner: tuple[int, int] = (0, 0)
    """Where to begin."""

    share: Share = 0.5
    """How much of it."""

    fast: bool = False
    """Hurry up."""

    place: FolderName = "here"
    """Where to put them."""


def load(*argv):
    return load_settings(Settings, argv, "sort")


RECIPE = b"input: [a, b]\nsizes: [3]\nfast: true\n"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(RECIPE)
    return f"--recipe={path}"


def test_a_field_of_any_number_of_values_is_repeated_and_replaces_the_recipes(recipe):
    assert load(recipe).input == ("a", "b")
    settings = load("--input", "null", recipe, "--input=[3]", "--sizes", "7", "--input", "-x")
    assert (settings.input, settings.sizes) == (("null", "[3]", "-x"), (7,))
    assert load(recipe, "--corner", "[0, 1]", "--corner", "[2, 3]").corner == (2, 3)


NAMES = (*known_fields(Settings), "recipe")
# What an argument can be: neither nul nor half a surrogate pair.
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
names = st.sampled_from(NAMES) | st.text(st.characters(categories=["L"]), max_size=8)
trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.dates() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
arguments = st.one_of(
    st.sampled_from(NAMES).map("--{}".format),
    st.builds("--{}={}".format, names, texts | trees.map(yaml.safe_dump)),
    texts | trees.map(yaml.safe_dump),
).filter(lambda argument: argument not in ("-h", "--help"))


def faults_of(*argv):
    """Every fault that `argv` has; none where it gives settings."""
    try:
        assert isinstance(load(*argv), Settings)
    except ConfigError as error:
        assert error.faults
        assert all(fault.isprintable() for fault in error.faults)
        return error.faults
    return []


def shown(names):
    """`names` as they stand in faults."""
    return ConfigError(names, "any").faults


@settings(max_examples=200)
@given(argv=st.lists(arguments, max_size=5))
def test_any_command_line_gives_settings_or_named_faults(argv):
    sections = [argument.removeprefix("--").partition("=")[0].partition(".")[0] for argument in argv]
    assert all(fault.startswith((*NAMES, *shown(argv), *shown(sections))) for fault in faults_of(*argv))


@settings(max_examples=200)
@given(tree=st.dictionaries(names, trees, max_size=5))
def test_any_fields_of_a_recipe_give_settings_or_named_faults(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert all(fault.startswith((*NAMES, *shown(tree))) for fault in faults_of(f"--recipe={path}"))


@settings(max_examples=100)
@given(content=st.binary() | texts.map(str.encode), place=st.integers(0, len(RECIPE)), cut=st.booleans())
def test_any_bytes_for_a_recipe_give_settings_or_named_faults(tmp_path_factory, content, place, cut):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    for broken in (content, RECIPE[:place] + content + RECIPE[len(RECIPE) if cut else place :]):
        path.write_bytes(broken)
        faults = faults_of(f"--recipe={path}")
        assert not faults or any(name in fault for name in NAMES for fault in faults)


@settings(max_examples=60)
@given(values=st.lists(texts | trees.map(str), min_size=1))
def test_text_is_taken_as_it_is(values):
    assert load(*[f"--input={value}" for value in values]).input == tuple(values)


ODD_YAML = [
    "0x_", "-0x_", "0b_", "1" * 5000, "0x" + "f" * 5000, "1" + ":0" * 200 + ".", "[" * 2000, "!!int x", "!!int ''",
    "!!float x", "!!bool x", "!!map ab", "!!map [a]", "!!set ab", "&a [*a]", "{!!binary aGk=: 1}", '"\\ud800"',
    "[" * 250 + "]" * 250,
]  # fmt: skip


@pytest.mark.parametrize("text", ODD_YAML, ids=lambda text: text[:12])
def test_what_yaml_cannot_make_a_value_of_is_a_fault_of_its_field(tmp_path, text):
    (fault,) = faults_of("--input=a", f"--sizes={text}")
    assert fault.startswith("sizes")
    (tmp_path / "odd.yaml").write_text(f"input: [a]\nsizes: {text}\n")
    (fault,) = faults_of(f"--recipe={tmp_path / 'odd.yaml'}")
    assert fault.startswith(("recipe: ", "sizes"))


def test_a_value_that_no_json_holds_hides_no_other_fault(tmp_path):
    (tmp_path / "odd.yaml").write_text("sizes: &a [*a]\nshare: 2\n")
    faults = faults_of(f"--recipe={tmp_path / 'odd.yaml'}")
    assert sorted(fault.partition(":")[0] for fault in faults) == ["input", "share", "sizes"]


def test_an_unknown_key_is_named_itself_and_so_is_all_that_was_read(recipe):
    @strict
    @dataclass(frozen=True)
    class Weighed:
        weights: dict[Literal["left", "right"], float]
        """Of each side."""

    with pytest.raises(ConfigError) as error:
        load_settings(Weighed, ["--weights.rihgt", "2"], "weigh")
    assert str(error.value) == "1 fault in the command line:\n  weights.rihgt: 'rihgt' should be 'left' or 'right'"
    with pytest.raises(ConfigError, match="faults in .*recipe.yaml and the command line:"):
        load(recipe, "--share", "2", "--sizes", "a")
    with pytest.raises(ConfigError, match="faults in .*recipe.yaml:"):
        load_settings(Weighed, [recipe], "weigh")


def test_bytes_that_are_no_text_are_a_fault_of_their_argument():
    (fault,) = faults_of("--input=caf\udce9")
    assert fault.startswith("input: no JSON can hold its value")


@pytest.mark.parametrize("argv", [["a\nb"], ["--a\nb=1"], ["--a\u2028b"]])
def test_each_fault_is_one_line(argv):
    (fault,) = faults_of("--input=a", *argv)
    assert fault.isprintable()


@pytest.mark.parametrize("name", ["a" * 256, "a/" + "é" * 128, "a\0b", ""])
def test_what_can_name_no_folder_is_a_fault(tmp_path, name):
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump({"input": ["a"], "place": name}))
    (fault,) = faults_of(f"--recipe={tmp_path / 'odd.yaml'}")
    assert fault.startswith("place: ")


@pytest.mark.parametrize("name", ["a" * 300, "package://yaml/" + "a" * 300])
def test_an_input_that_cannot_be_looked_for_is_a_fault(name):
    with pytest.raises(ConfigError) as caught:
        load_settings(BuildSettings, [f"--input={name}", "--tokenizer=.", "--output=b"], "build")
    (fault,) = caught.value.faults
    assert "a" * 300 in fault and fault.endswith("File name too long: name another")


def test_a_path_may_be_longer_than_its_parts():
    assert load("--input=a", f"--place={'a' * 255}/{'é' * 127}").place.endswith("é")


@pytest.mark.parametrize("name", ["2e-4", "1e5", "+1E5", ".5e3", "2001-01-01", "null"])
def test_saved_text_that_looks_like_another_value_stays_text(tmp_path, name):
    save_settings(Settings((name,)), tmp_path / "saved.yaml")
    assert load(f"--recipe={tmp_path / 'saved.yaml'}") == Settings((name,))


def test_a_flag_may_stand_alone(recipe):
    assert load("--input=a", "--fast") == load("--fast", "--input=a") == Settings(("a",), fast=True)
    assert load(recipe, "--fast", "false").fast is False
    with pytest.raises(ConfigError, match="fast: 'a' should be a valid boolean"):
        load(recipe, "--fast", "a")


def test_a_second_value_without_its_name_is_a_fault(recipe):
    with pytest.raises(ConfigError, match="c: what is this the value of[?] Fields are set by --field VALUE"):
        load("--input", "a", "c")


def test_the_process_gives_the_arguments_by_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["sort", "--input", "a"])
    assert load_settings(Settings, None, "sort") == Settings(("a",))


def test_help_tells_type_and_default(capsys):
    with pytest.raises(SystemExit) as exit_:
        load("--input", "-h")
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: sort [--recipe FILE] [--field VALUE ...] Sort things.")
    assert "--input VALUE Names of things. (tuple[str, ...]; required)" in text
    assert "--sizes VALUE Sizes in metres. (tuple[int, ...]; default: [1, 2])" in text


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (1, 1)])
def test_a_command_ends_with_what_it_gives(result, status):
    assert run_command(lambda: result) == status


@pytest.mark.parametrize("error", [ValueError("no such thing"), OSError("no such thing"), ConfigError(["a"], "b")])
def test_a_users_fault_ends_a_command_without_a_traceback(capsys, error):
    def fail():
        raise error

    assert run_command(fail) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_fault_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)
