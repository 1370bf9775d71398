"""Run under the launcher: pretraining runs one after another in one process group; a JSON file has each one's argv."""

import json
import sys
from pathlib import Path

from pipeline.config import load_run_config
from pipeline.engine import stop_world
from pipeline.pretrain import pretrain

if __name__ == "__main__":
    try:
        for arguments in json.loads(Path(sys.argv[-1]).read_text()):
            pretrain(load_run_config(arguments))
    finally:
        stop_world()  # an interpreter that ends with groups alive may abort in their threads
