"""Recipes: a YAML file and command-line overrides into frozen dataclasses, with every fault told at once.

The dataclasses are the only description of what a recipe holds: their annotations are what pydantic checks, their
attribute docstrings and defaults are what --help prints. Values are written as in YAML, in file and command line alike;
on the command line a field that holds any number of values is repeated, and a flag may stand alone.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config

from data_prep.files import atomic_file, is_path

Settings = TypeVar("Settings")
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


def _folder_name(name: str) -> str:
    if not is_path(name):
        raise ValueError(f"{name!r} cannot name a folder: a part of it is too long, or it holds NUL: use another")
    return name


FolderName = Annotated[str, Field(min_length=1), AfterValidator(_folder_name)]  # Path("") would be the working folder

strict = with_config(ConfigDict(extra="forbid", allow_inf_nan=False))
"""Decorates the dataclass of a whole recipe, whose sections inherit it: unknown fields are faults, and so is nan."""


class ConfigError(ValueError):
    """A recipe that cannot be run; `faults` has one line each, fit to be shown: the field, its value, what to do."""

    def __init__(self, faults: Iterable[str], source: str) -> None:
        self.faults = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in fault) for fault in faults]
        count = f"{len(self.faults)} fault{'s' if len(self.faults) > 1 else ''}"
        super().__init__("\n  ".join([f"{count} in {source}:", *self.faults]))


@dataclass(frozen=True)
class Rule:
    """A check that a field's type cannot make, or that needs several fields; skipped where one of them is at fault."""

    fields: tuple[str, ...]
    """Dotted names of the fields whose values `faults` is called with."""

    faults: Callable[..., Iterable[str]]
    """Yields one line per fault."""


@dataclass(frozen=True)
class RecipeField:
    """One field of a tree of dataclasses, or one of its sections."""

    name: str  # dotted
    type: Any
    default: Any  # MISSING where the recipe must give a value
    doc: str

    @property
    def is_section(self) -> bool:
        return is_dataclass(self.type)

    @property
    def is_repeated(self) -> bool:
        """Whether the command line names it once for each of its values, of which there may be any number."""
        return get_origin(self.type) is tuple and get_args(self.type)[1:] == (...,)

    def parse(self, text: str) -> Any:
        """What `text` on the command line stands for. Text is taken as it is: a run may be called 123, or null."""
        if (get_args(self.type)[0] if self.is_repeated else self.type) is str:
            return text
        try:
            return yaml.load(text, RecipeLoader)
        except yaml.YAMLError:
            return text  # the field's type says what is wrong with it


RECIPE = RecipeField("recipe", str, None, "YAML file of the fields below, sections nested.")
UNKNOWN = RecipeField("", Any, MISSING, "")

BAD_INPUT = 2
"""Exit code of a command that cannot work with its input."""

_adapter = cache(TypeAdapter)


def run_command(run: Callable[[], int | None]) -> int:
    """The exit status that `run` gives, or 0; for input that cannot work 2, with the error on stderr, no traceback."""
    try:
        return run() or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def load_settings(
    settings_type: type[Settings], argv: Sequence[str] | None, command: str, rules: Sequence[Rule] = ()
) -> Settings:
    """The settings that `--recipe FILE` and the overrides `--field VALUE` in `argv`, or sys.argv, describe.

    --help prints the fields of `command` and exits. Raises ConfigError with all faults of file, command line, fields
    and rules together.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(_help_text(settings_type, command))
        sys.exit(0)
    faults: list[str] = []
    known = known_fields(settings_type)
    overrides = _read_arguments(argv, known, faults)
    recipe = overrides.pop(RECIPE.name, None)
    tree = _read_yaml(Path(recipe), faults) if recipe is not None else {}
    if tree is None:
        raise ConfigError(faults, recipe)
    for name, value in overrides.items():
        _assign(tree, name.split("."), value)
    settings, at_fault = _validate(settings_type, tree)
    faults.extend(at_fault.values())
    for rule in rules:
        if not any(_overlap(name, other) for name in rule.fields for other in at_fault):
            values = json.dumps([_value(tree, known[name]) for name in rule.fields], default=str)
            faults.extend(rule.faults(*json.loads(values)))  # in the types that were checked
    if faults:
        sources = [recipe] if recipe else []
        raise ConfigError(faults, " and ".join([*sources, *(["the command line"] if overrides or not recipe else [])]))
    return settings


def settings_to_dict(settings: Any) -> dict[str, Any]:
    """`settings` in the types of YAML and JSON, sections nested."""
    return _adapter(type(settings)).dump_python(settings, mode="json")


def settings_from_dict(settings_type: type[Settings], tree: Mapping[str, Any]) -> Settings:
    """What `settings_to_dict` was given. Raises ConfigError; rules are not checked: files may have moved since."""
    settings, faults = _validate(settings_type, dict(tree))
    if faults:
        raise ConfigError(faults.values(), "the saved settings")
    return settings


def save_settings(settings: Any, path: Path) -> None:
    """Write `settings` as a recipe that loads as equal; `path` holds the old or the new one whole, never a part."""
    with atomic_file(path) as file:
        file.write(yaml.dump(settings_to_dict(settings), Dumper=RecipeDumper, sort_keys=False).encode())


def _help_text(settings_type: type, command: str) -> str:
    """Every field with its meaning, type and default, section by section."""
    usage = f"{command} [--recipe FILE] [--field VALUE ...]"
    notes = "Values are written as in YAML. A bool may stand alone; tuple[T, ...] is given one T at a time, repeated."
    parser = argparse.ArgumentParser(usage=usage, description=settings_type.__doc__, epilog=notes, add_help=False)
    group = parser.add_argument_group("arguments")
    group.add_argument(f"--{RECIPE.name}", metavar="FILE", help=RECIPE.doc)
    for field in known_fields(settings_type).values():
        if field.is_section:
            group = parser.add_argument_group(field.name, field.doc)
            continue
        default = "required" if field.default is MISSING else f"default: {json.dumps(field.default)}"
        text = f"{field.doc} ({_type_name(field.type)}; {default})".replace("%", "%%")
        group.add_argument(f"--{field.name}", metavar="VALUE", help=text)
    return parser.format_help()


@cache
def known_fields(settings_type: type) -> dict[str, RecipeField]:
    """All fields by dotted name, depth first: plain fields before sections, a section before its fields."""
    types = get_type_hints(settings_type)
    docs = _attribute_docs(settings_type)
    known = {}
    for field in sorted(fields(settings_type), key=lambda field: is_dataclass(types[field.name])):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        doc = docs.get(field.name) or types[field.name].__doc__.partition("\n")[0]
        known[field.name] = RecipeField(field.name, types[field.name], default, doc)
        if known[field.name].is_section:
            for inner in known_fields(types[field.name]).values():
                name = f"{field.name}.{inner.name}"
                known[name] = replace(inner, name=name)
    return known


def _attribute_docs(settings_type: type) -> dict[str, str]:
    """The docstring beneath each field that has one; a section may rely on its type's."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(settings_type))).body
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)
    }


def _type_name(type_: Any) -> str:
    origin, names = get_origin(type_), [_type_name(part) for part in get_args(type_)]
    if origin in (Literal, Union, UnionType):
        return " | ".join(names)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(names)}]"
    return {NoneType: "null", ...: "..."}.get(type_) or getattr(type_, "__name__", str(type_))


def _read_arguments(argv: Sequence[str], known: Mapping[str, RecipeField], faults: list[str]) -> dict[str, Any]:
    """Values by name, the recipe's path among them, the latest last; the launcher's --local_rank is left out."""
    given: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.removeprefix("--").partition("=")
        field = RECIPE if name == RECIPE.name else known.get(name, UNKNOWN)
        if not argument.startswith("--"):
            faults.append(f"{argument}: what is this the value of? Fields are set by --field VALUE")
        elif equals or (rest and not rest[0].startswith("--")):
            value, before = field.parse(text if equals else rest.pop(0)), given.pop(name, ())
            given[name] = (*before, value) if field.is_repeated else value
        elif field.type is bool:
            given[name] = True
        else:
            faults.append(f"{name}: has no value: write --{name} VALUE")
    given.pop("local_rank", None)
    return given


def _read_yaml(path: Path, faults: list[str]) -> dict[str, Any] | None:
    """What a recipe holds; None, with a fault, where it cannot be read."""
    try:
        loader = RecipeLoader(path.read_text(encoding="utf-8"))
        tree = loader.get_single_data()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        faults.append(f"recipe: {path} cannot be read: {reason}: name a recipe that exists")
    except yaml.YAMLError as error:
        faults.append(f"recipe: {path} is not YAML: {' '.join(str(error).split())}: mend it")
    else:
        faults.extend(loader.duplicates)
        if isinstance(tree, Mapping | None):
            return tree or {}
        faults.append(f"recipe: {path} holds {type(tree).__name__}, not fields: write `field: value` lines")
    return None


class RecipeLoader(yaml.SafeLoader):
    """YAML without surprises: duplicate keys are noticed, 2e-4 is a number (as in YAML 1.2), a date is text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[str] = []

    def get_single_data(self) -> Any:
        try:
            return super().get_single_data()
        except RecursionError:
            raise yaml.YAMLError("it is nested too deeply") from None

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, LookupError, ValueError) as error:  # of a tag whose text is no value of its type
            tag = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"no {tag}: {error}", node.start_mark) from None

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                self.duplicates.append(f"{name}: given in line {seen[name]} and again in line {line}: keep one of them")
            seen[name] = line
        return super().construct_mapping(node, deep)


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
RecipeLoader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


class RecipeDumper(yaml.SafeDumper):
    """Quotes the text that RecipeLoader would take for something else."""

    yaml_implicit_resolvers = RecipeLoader.yaml_implicit_resolvers


def _assign(tree: dict[Any, Any], path: Sequence[Any], value: Any) -> None:
    for key in path[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[path[-1]] = value


def _value(tree: Mapping[str, Any], field: RecipeField) -> Any:
    """What the valid `tree` gives for `field`, or its default."""
    value: Any = tree
    for key in field.name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return field.default
        value = value[key]
    return value


def _overlap(name: str, other: str) -> bool:
    """Whether one of two dotted names is the other or lies within it."""
    return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")


def _validate(settings_type: type[Settings], tree: dict[str, Any]) -> tuple[Settings | None, dict[str, str]]:
    """The settings, or None, and the faults by dotted name."""
    known = known_fields(settings_type)
    faults: dict[str, str] = {}
    tree = _writable(tree, known, faults)
    for field in known.values():
        if field.is_section and "." not in field.name:
            tree.setdefault(field.name, {})  # so that its missing fields are named one by one
    try:
        # Strict JSON takes lists for tuples and mappings for dataclasses, yet no text for a number and no 1 for true.
        settings = _adapter(settings_type).validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        details = {_place(detail["loc"]): detail for detail in error.errors()}
        return None, {name: _describe(name, detail, known) for name, detail in details.items()} | faults
    except OSError as error:  # of a type that looks for its file; what else is wrong is told when this is mended
        name = next((name for name, value in tree.items() if str(error.filename) in str(value)), "recipe")
        raise ConfigError([f"{name}: {error.filename}: {error.strerror}: name another"], "the settings") from None
    return (None if faults else settings), faults


def _place(parts: Sequence[str | int]) -> str:
    """The dotted name; a key that is at fault is named itself, where pydantic adds a word."""
    return ".".join(str(part) for part in parts if part != "[key]")


def _writable(
    tree: Mapping[Any, Any], known: Mapping[str, RecipeField], faults: dict[str, str], place: tuple[Any, ...] = ()
) -> dict[Any, Any]:
    """`tree` without the fields that no JSON can hold, by which it is checked: cycles, bytes that are no text."""
    kept = {}
    for key, value in tree.items():
        path = (*place, key)
        name = ".".join(map(str, path))
        if isinstance(value, dict) and known.get(name, UNKNOWN).is_section:
            kept[key] = _writable(value, known, faults, path)
            continue
        alone: dict[Any, Any] = {}
        _assign(alone, path, value)
        try:
            _adapter(Any).validate_json(json.dumps(alone, default=str))
            kept[key] = value
        except (ValueError, TypeError, RecursionError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            faults[name] = f"{name}: no JSON can hold its value: {reason}: write another"
    return kept


def _describe(name: str, detail: Mapping[str, Any], known: Mapping[str, RecipeField]) -> str:
    """One line for the pydantic error of a field."""
    value = detail["input"]
    match detail["type"]:
        case "missing" if name not in known:
            return f"{name}: missing: write it beside the others of {name.rpartition('.')[0]}"
        case "missing":
            return f"{name}: missing: set it in the recipe, or by --{name} VALUE"
        case "unexpected_keyword_argument":
            return f"{name}: unknown field, with value {value!r}: {_suggest(name, known)}"
        case "dataclass_type":
            return f"{name}: {value!r} is not a section: write its fields beneath it, or leave it out"
        case "value_error":
            return f"{name}: {detail['ctx']['error']}"
    message = detail["msg"].replace("Input should", "should", 1)
    return f"{name}: {value!r} {message}" if message.startswith("should") else f"{name}: {value!r}: {message}"


def _suggest(name: str, known: Mapping[str, RecipeField]) -> str:
    """The field that was meant: of the same section, else of any, by the last part of its name."""
    section, _, last = name.rpartition(".")
    parts = [other.rpartition(".") for other in (*known, *_fields_of_item(section, known))]
    anywhere = {short: f"{place}{dot}{short}" for place, dot, short in parts}
    siblings = {short: f"{place}{dot}{short}" for place, dot, short in parts if place == section}
    for names in (siblings, anywhere):
        if close := difflib.get_close_matches(last, names, n=1):
            return f"did you mean {names[close[0]]}?"
    return f"{section or 'a recipe'} has {', '.join(siblings)}"


def _fields_of_item(place: str, known: Mapping[str, RecipeField]) -> list[str]:
    """The fields of an item of a list of mappings, by their names below `place`; none where no such item stands."""
    field = known.get(place.rpartition(".")[0], UNKNOWN)
    is_item = field.is_repeated and is_dataclass(get_args(field.type)[0])
    return [f"{place}.{each.name}" for each in fields(get_args(field.type)[0])] if is_item else []
