"""Run under the launcher: fine-tunings one after another in one process group; a JSON file has each one's argv."""

import json
import sys
from pathlib import Path

from pipeline.finetune import finetune
from pipeline.finetune_config import load_finetune_config
from pipeline.stopping import StopRequest
from pipeline.world import leave_world

if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[-1]).read_text()):
        finetune(load_finetune_config(arguments), StopRequest())
    leave_world()  # an interpreter that ends with groups alive may abort in their threads
