"""pipeline/pretrain.py with elastic neurons as models.neuron writes them: no packed codes, all by plain autograd."""

import sys

from models.amplitudes import BlockNeurons
from pipeline.pretrain import main
from tests.tiny import fire_and_count, project_by_fire

if __name__ == "__main__":
    BlockNeurons.project, BlockNeurons.fire = project_by_fire, fire_and_count
    sys.exit(main(sys.argv[1:]))
