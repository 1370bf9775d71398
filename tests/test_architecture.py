"""The rules of the house as tests: who imports whom, what is never used, names, sizes, what an installation holds.

Each rule is a function from sources to a list of faults, so that it is itself tried out on small sources that break it.
"""

import ast
import configparser
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "pipeline", "data_prep")
MAX_LINES = 500

# Inside pipeline: commands import running parts, which import foundations. A new module takes its place here.
RUNNING_PARTS = {
    *("trainer", "engine", "checkpoint", "run_folder", "model", "model_card", "model_folder", "corpus", "loader"),
    *("metrics", "documents", "evaluation", "options", "world", "command", "ending", "launched", "stopping"),
    *("build_locks", "footprint", "tracing", "read_ahead", "remote", "shard_cache", "spike_check"),
    *("file_locks",),
    *("glue", "own_rows", "task_data", "task_files", "task_metrics"),
    *("task_corpus", "task_evaluation", "task_model", "task_results", "task_trainer"),
}
FOUNDATIONS = {"order", "mixing", "mixture", "objectives", "config", "rules", "phases", "places"} | {
    "tasks",
    "finetune_config",
}
SHARED_BY_DATA_PREP = {
    f"data_prep.{name}" for name in ("files", "manifest", "recipes", "shards", "sources", "tokenization")
}
DEEPSPEED_MODULES = {"pipeline.engine", "pipeline.checkpoint"}
MPI_MODULES = {"data_prep.ranks"}
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
REQUIRED_BY_OTHERS = {"ninja", "protobuf"}  # DeepSpeed's operators, sentencepiece's models
HEAVY_MODULES = ("deepspeed", "triton", "mpi4py", "datasets")


def our_sources():
    """The text of every module of ours by its dotted name."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return dict(zip(names, (path.read_text() for path in paths), strict=True))


def imported_names(source, importer):
    """Dotted names that the module imports, anywhere in it: `from a import b` counts as a.b."""
    package = importer.split(".")[0]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, [package if node.level else "", node.module]))
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def is_command(source):
    return any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in ast.parse(source).body)


def dependencies(sources):
    """For each module of ours, the modules of ours that it imports."""

    def resolve(name):
        while name and name not in sources:
            name = name.rpartition(".")[0]
        return name

    return {
        importer: {resolve(name) for name in imported_names(source, importer)} - {"", importer}
        for importer, source in sources.items()
    }


def direction_faults(sources):
    """Imports among our modules that run against the arrows, and circles of them."""
    commands = {name for name, source in sources.items() if is_command(source)}
    faults = []
    for importer, imported in dependencies(sources).items():
        faults += [f"{importer} imports the command {name}" for name in imported & commands]
        faults += [f"{importer} imports {name}" for name in imported - commands if not _allowed(importer, name)]
    try:
        tuple(graphlib.TopologicalSorter(dependencies(sources)).static_order())
    except graphlib.CycleError as error:
        faults.append(f"a circle of imports: {' -> '.join(error.args[1])}")
    return faults


def _allowed(importer, imported):
    package, imported_package = importer.split(".")[0], imported.split(".")[0]
    if package != "pipeline" or imported_package == "models":
        return package == imported_package or package == "pipeline"
    if imported_package == "data_prep":
        return imported in SHARED_BY_DATA_PREP
    return importer.split(".")[-1] not in FOUNDATIONS or imported.split(".")[-1] in FOUNDATIONS


def place_faults(sources):
    """Modules that stand in no layer of pipeline, folders inside models, relative imports in the wrong place."""
    faults = []
    for name, source in sources.items():
        package, _, module = name.partition(".")
        known = RUNNING_PARTS | FOUNDATIONS | {""}
        if package == "pipeline" and module not in known and not is_command(source):
            faults.append(f"{name} has no layer: add it to RUNNING_PARTS or FOUNDATIONS")
        if package == "models" and "." in module:
            faults.append(f"{name}: models is flat")
        levels = {node.level for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
        if package != "models" and levels - {0}:
            faults.append(f"{name} imports relatively: outside models write the full path")
        absolute = re.search(r"^\s*(from|import) models\b", source, re.MULTILINE)
        if package == "models" and (levels - {0, 1} or absolute):
            faults.append(f"{name} imports a sibling otherwise than by `from .name import ...`")
    return faults


def outside_faults(sources):
    """Imports of other people's modules where they have no business."""
    faults = []
    for importer, source in sources.items():
        tops = {name.split(".")[0] for name in imported_names(source, importer)}
        if "deepspeed" in tops and importer not in DEEPSPEED_MODULES:
            faults.append(f"{importer} imports deepspeed")
        if "mpi4py" in tops and importer not in MPI_MODULES:
            faults.append(f"{importer} imports mpi4py")
        faults += [f"{importer} imports {name}" for name in sorted(tops & UNSAFE_MODULES)]
    return faults


def unsafe_call_faults(sources):
    """Calls that run code found in data, run text in a shell, or change where modules are found."""
    faults = []
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and (reason := _why_unsafe(node)):
                faults.append(f"{name}, line {node.lineno}: {reason}")
    return faults


def _why_unsafe(call):
    function = ast.unparse(call.func)
    values = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    reasons = {
        "allow_pickle": values.get("allow_pickle", "False") != "False",
        "torch.load without weights_only=True": function == "torch.load" and values.get("weights_only") != "True",
        "weights_only=False": values.get("weights_only") == "False",
        "shell=True": values.get("shell", "False") != "False",
        "a change of sys.path": function.startswith("sys.path."),
    }
    return next((reason for reason, found in reasons.items() if found), None)


def name_faults(names, taken):
    """Modules of ours whose file would hide another module when its folder comes first on sys.path."""
    stems = {name: name.split(".")[-1] for name in names}
    return [f"{name} has the name of the module {stem}" for name, stem in stems.items() if stem in taken]


def names_taken():
    """Top-level modules of the standard library and of every installed distribution but ours."""
    installed = importlib.metadata.packages_distributions()
    return {name for name, owners in installed.items() if set(owners) != {"spikelm"}} | set(sys.stdlib_module_names)


RULES = [direction_faults, place_faults, outside_faults, unsafe_call_faults]


@pytest.mark.parametrize("rule", RULES)
def test_our_modules_keep(rule):
    assert rule(our_sources()) == []


COMMAND = 'if __name__ == "__main__":\n    pass\n'
BROKEN = [
    (direction_faults, {"models.a": "import pipeline.order", "pipeline.order": ""}, "models.a imports pipeline.order"),
    (direction_faults, {"data_prep.a": "from models import b", "models.b": ""}, "data_prep.a imports models.b"),
    (
        direction_faults,
        {"pipeline.loader": "from data_prep.packing import pack", "data_prep.packing": ""},
        "pipeline.loader imports data_prep.packing",
    ),
    (
        direction_faults,
        {"pipeline.order": "def f():\n    from pipeline import loader", "pipeline.loader": ""},
        "pipeline.order imports pipeline.loader",
    ),
    (
        direction_faults,
        {"pipeline.trainer": "from pipeline.report import draw", "pipeline.report": COMMAND},
        "pipeline.trainer imports the command pipeline.report",
    ),
    (direction_faults, {"models.a": "from .b import x", "models.b": "from .a import y"}, "a circle of imports"),
    (place_faults, {"pipeline.helpers": ""}, "pipeline.helpers has no layer"),
    (place_faults, {"models.sub.a": ""}, "models is flat"),
    (place_faults, {"pipeline.loader": "from .order import x"}, "pipeline.loader imports relatively"),
    (place_faults, {"models.a": "    from models.b import x".strip()}, "models.a imports a sibling otherwise"),
    (outside_faults, {"pipeline.trainer": "def f():\n    import deepspeed.comm"}, "pipeline.trainer imports deepspeed"),
    (outside_faults, {"data_prep.shards": "from mpi4py import MPI"}, "data_prep.shards imports mpi4py"),
    (
        outside_faults,
        {"data_prep.build_shards": "def f():\n    from mpi4py import MPI\n" + COMMAND},
        "data_prep.build_shards imports mpi4py",
    ),
    (outside_faults, {"pipeline.loader": "import pickle"}, "pipeline.loader imports pickle"),
    (unsafe_call_faults, {"a": "np.load(f, allow_pickle=True)"}, "a, line 1: allow_pickle"),
    (unsafe_call_faults, {"a": "torch.load(f)"}, "a, line 1: torch.load without weights_only=True"),
    (unsafe_call_faults, {"a": "\nload(f, weights_only=False)"}, "a, line 2: weights_only=False"),
    (unsafe_call_faults, {"a": "subprocess.run(c, shell=True)"}, "a, line 1: shell=True"),
    (unsafe_call_faults, {"a": "sys.path.insert(0, '.')"}, "a, line 1: a change of sys.path"),
]


@pytest.mark.parametrize(("rule", "sources", "fault"), BROKEN)
def test_a_rule_sees_what_breaks_it(rule, sources, fault):
    assert any(found.startswith(fault) or fault in found for found in rule(sources))


def test_the_rules_let_the_architecture_pass():
    sources = {
        "models.layers": "from .neuron import f\nimport torch",
        "models.neuron": "",
        "data_prep.shards": "import numpy",
        "data_prep.ranks": "def f():\n    from mpi4py import MPI",
        "data_prep.build_shards": "from data_prep.ranks import r\nfrom data_prep.shards import w\n" + COMMAND,
        "pipeline.order": "",
        "pipeline.loader": "from data_prep.shards import r\nfrom pipeline.order import o",
        "pipeline.engine": "import deepspeed\nfrom models.layers import b",
        "pipeline.pretrain": "from pipeline.loader import l\nfrom pipeline.engine import e\n" + COMMAND,
        "pipeline.checkpoint": "torch.load(f, weights_only=True)\nnp.load(f, allow_pickle=False)",
    }
    assert [fault for rule in RULES for fault in rule(sources)] == []


def test_no_module_of_ours_hides_another():
    assert name_faults(our_sources(), names_taken()) == []
    assert name_faults(["pipeline.logging", "data_prep.tokenizers", "models.neuron"], names_taken()) == [
        "pipeline.logging has the name of the module logging",
        "data_prep.tokenizers has the name of the module tokenizers",
    ]


def test_files_stay_short():
    folders = [ROOT / folder for folder in (*PACKAGES, "tests", "launch", ".ci")]
    paths = [path for folder in folders for path in folder.rglob("*") if path.suffix in {".py", ".sh", ".yaml", ""}]
    texts = [path for path in [*paths, *ROOT.glob("*.md"), ROOT / "Makefile"] if path.is_file()]
    assert len(texts) > 10
    long = {path.name: lines for path in texts if (lines := len(path.read_text().splitlines())) > MAX_LINES}
    assert long == {}


def test_importing_the_models_is_light():
    script = (
        "import sys, torch, transformers.modeling_utils\n"
        "before = set(sys.modules)\n"
        "import models.modeling\n"
        "print(*set(sys.modules) - before)"
    )
    output = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    added = {name.split(".")[0] for name in output.stdout.split()}
    assert "models" in added
    assert added.isdisjoint(HEAVY_MODULES)


@pytest.mark.parametrize("program", ["pretrain", "finetune"])
def test_what_launchers_start_imports_the_package_pipeline_first(program):
    tree = ast.parse((ROOT / "pipeline" / f"{program}.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    others = [name for name in names if name.partition(".")[0] not in sys.stdlib_module_names]
    assert others[0].partition(".")[0] == "pipeline"


def test_an_installation_holds_our_packages_and_no_tests():
    assert tuple(_setup()["options"]["packages"].split()) == PACKAGES


def test_every_requirement_is_pinned_within_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    setup = _setup()
    demanded = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    requirements = [requirement for text in demanded for requirement in _requirements(text)]
    unmet = [str(each) for each in requirements if not each.specifier.contains(pins.get(each.name, "0"))]
    assert unmet == []
    assert "+" not in pins["torch"]


OPTIONAL = {"triton", "mpi4py"}
"""What torch brings with it where there is a GPU, and what several processes build shards by; nothing needs either."""


def test_what_is_imported_is_required_and_what_is_required_is_imported():
    owners = importlib.metadata.packages_distributions()
    names = {name for module, source in our_sources().items() for name in imported_names(source, module)}
    tops = {name.split(".")[0] for name in names} - set(PACKAGES) - set(sys.stdlib_module_names)
    imported = {canonicalize_name(owner) for top in tops for owner in owners.get(top, [top])}
    setup = _setup()
    required = {each.name for each in _requirements(setup["options"]["install_requires"])}
    demo = {each.name for each in _requirements(setup["options.extras_require"]["demo"])}
    assert imported - demo - required == OPTIONAL
    assert required - imported == REQUIRED_BY_OTHERS


def _setup():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup


def _requirements(text):
    requirements = [Requirement(line) for line in text.split("\n") if line]
    for requirement in requirements:
        requirement.name = canonicalize_name(requirement.name)
    return requirements
