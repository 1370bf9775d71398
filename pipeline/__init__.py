"""Pretraining, evaluation and reports: recipes, sample order, loader, engine, trainer, checkpoints."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from pipeline.launched import leave_code, tell_once

_ROOT = Path(__file__).resolve().parent.parent


def _stranger() -> str | None:
    """What to say where another package of the name of ours comes first: `models` is what many projects have."""
    for name in ("models", "data_prep"):
        spec = find_spec(name)
        found = [Path(place).resolve() for place in (spec.submodule_search_locations if spec else None) or ()]
        if found[:1] != [_ROOT / name]:
            return (
                f"error: Python finds the package {name} in {', '.join(map(str, found)) or 'no folder'}, not in "
                f"{_ROOT / name}: work in another folder, or put {_ROOT} first in PYTHONPATH like launch/env.sh"
            )
    return None


if message := _stranger():
    tell_once(lambda: print(message, file=sys.stderr, flush=True))
    leave_code(2)
    raise SystemExit(2)
# Of what torch's C++ has to say errors alone: about a process that is lost it warns in pages of addresses.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
