"""Run under the launcher: pretraining runs one after another in one process group; a JSON file has each one's argv."""

import json
import sys
from pathlib import Path

from pipeline.config import load_run_config
from pipeline.pretrain import pretrain
from pipeline.stopping import StopRequest
from pipeline.world import leave_world

if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[-1]).read_text()):
        pretrain(load_run_config(arguments), StopRequest())
    leave_world()  # an interpreter that ends with groups alive may abort in their threads
