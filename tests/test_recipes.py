from dataclasses import dataclass

import pytest

from data_prep.recipes import ConfigError, Share, load_settings, run_command, strict


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


def load(*argv):
    return load_settings(Settings, argv, "sort")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("input: [a, b]\nsizes: [3]\nfast: true\n")
    return f"--recipe={path}"


def test_a_field_of_any_number_of_values_is_repeated_and_replaces_the_recipes(recipe):
    assert load(recipe).input == ("a", "b")
    settings = load("--input", "null", recipe, "--input=[3]", "--sizes", "7", "--input", "-x")
    assert (settings.input, settings.sizes) == (("null", "[3]", "-x"), (7,))
    assert load(recipe, "--corner", "[0, 1]", "--corner", "[2, 3]").corner == (2, 3)


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
