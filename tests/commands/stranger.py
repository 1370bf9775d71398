"""Run by test_export as python -I: uses exported folders where torch and transformers are installed, and this project
and what else it requires are not. Arguments: folder of exports, folder for results, threads, names of exports."""

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path

ABSENT = {"models", "pipeline", "data_prep", "tests"}  # this project
ABSENT |= {
    "deepspeed",
    "accelerate",
    "datasets",
    "webdataset",
    "mpi4py",
    "pydantic",
    "sentencepiece",
    "triton",
    "xxhash",
}


class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)


def forget_this_project():
    """An editable installation has a finder of its own among the finders."""
    standard = [each for each in sys.meta_path if getattr(each, "__module__", "").startswith("_frozen_importlib")]
    sys.meta_path[:] = [Finder if each is importlib.machinery.PathFinder else each for each in standard]
    found = sorted(name for name in ABSENT if importlib.util.find_spec(name))
    assert not found and ABSENT.isdisjoint(sys.modules), found


def explore(folder, results):
    """Facts about the export in `folder`, as JSON; its model's outputs for the probe batch are written."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    names = ("AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoModelForPreTraining")
    opened = {name: getattr(transformers, name).from_pretrained(folder, trust_remote_code=True) for name in names}
    with torch.no_grad():
        outputs = opened["AutoModelForPreTraining"](**load_file(results / "probe.safetensors"))
    save_file(dict(outputs), results / f"{folder.name}.safetensors")

    fill_mask = transformers.pipeline("fill-mask", model=str(folder), trust_remote_code=True)
    filled = fill_mask("The capital of France is [MASK].")

    torch.manual_seed(0)  # of the classifier's own weights
    auto_class = transformers.AutoModelForSequenceClassification
    classifier = auto_class.from_pretrained(folder, num_labels=2, dtype=torch.float32, trust_remote_code=True)
    batch = fill_mask.tokenizer(["one text", "another, longer text"], padding=True, return_tensors="pt")
    losses, optimizer = [], torch.optim.AdamW(classifier.parameters(), lr=1e-4)  # small: spikes flip
    for _ in range(2):
        loss = classifier(**batch, labels=torch.tensor([0, 1])).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    again = results / f"{folder.name}-classifier"
    classifier.save_pretrained(again)
    saved_again = auto_class.from_pretrained(again, trust_remote_code=True)

    opened["AutoModelForSequenceClassification"] = classifier
    return {
        "classes": {name: type(each).__name__ for name, each in opened.items()},
        "modules": sorted({type(each).__module__.partition(".")[0] for each in opened.values()}),
        "fill_mask": filled,
        "classification_losses": losses,
        "saved_again": type(saved_again).__name__,
    }


def main(exports, results, threads, *names):
    forget_this_project()
    import torch

    torch.set_num_threads(int(threads))
    for name in names:
        facts = explore(Path(exports) / name, Path(results))
        (Path(results) / f"{name}.json").write_text(json.dumps(facts))
    assert ABSENT.isdisjoint(name.partition(".")[0] for name in sys.modules)


if __name__ == "__main__":
    main(*sys.argv[1:])
