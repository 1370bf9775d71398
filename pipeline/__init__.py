"""Pretraining, evaluation and reports: recipes, sample order, loader, engine, trainer, checkpoints."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def _refuse_strangers() -> None:
    """End the program where another package of the name of ours comes first: `models` is what many projects have."""
    for name in ("models", "data_prep"):
        spec = find_spec(name)
        found = [Path(place).resolve() for place in (spec.submodule_search_locations if spec else None) or ()]
        if found[:1] != [_ROOT / name]:
            if (os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0") == "0":
                print(
                    f"error: Python finds the package {name} in {', '.join(map(str, found)) or 'no folder'}, not in "
                    f"{_ROOT / name}: work in another folder, or put {_ROOT} first in PYTHONPATH like launch/env.sh",
                    file=sys.stderr,
                )
            raise SystemExit(2)


_refuse_strangers()
# Of what torch's C++ has to say errors alone: about a process that is lost it warns in pages of addresses.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
