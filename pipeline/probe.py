"""Run by pipeline.model_folder in a process of its own: python -I probe.py FOLDER AUTO_CLASS SCRATCH THREADS

Opens the model in FOLDER as a stranger would and writes all it gives for SCRATCH/inputs.safetensors to
SCRATCH/outputs.safetensors. Exit status 1 where any module of this project was imported.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


def main(folder: str, auto_class: str, scratch: str, threads: str) -> int:
    """The exit status."""
    torch.set_num_threads(int(threads))
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        outputs = model(**load_file(Path(scratch) / "inputs.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, Path(scratch) / "outputs.safetensors")
    ours = sorted(name for name in sys.modules if name.partition(".")[0] in ("models", "pipeline", "data_prep"))
    if ours:
        print(f"the code in the folder imports {', '.join(ours)} from outside it", file=sys.stderr)
    return 1 if ours else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
