"""A task that is learned in seconds: some words of a text tell its class. Its files, a tokenizer, an encoder for it."""

import json
from random import Random

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
TELLING = {"bad": ["awful", "dull"], "good": ["lovely", "great"]}
OTHERS = ["the", "film", "was", "very", "a", "story"]
SIZES = {"train": 64, "validation": 32, "test": 32}

ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def make_rows(count, seed):
    """Texts of 4 to 8 words, half of which tell the class; classes take turns."""
    random, rows = Random(seed), []
    for number in range(count):
        label = sorted(TELLING)[number % 2]
        half = random.randint(2, 4)
        words = random.choices(OTHERS, k=half) + random.choices(TELLING[label], k=half)
        random.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_task(folder):
    """The files of each split, and tokenizer/."""
    for seed, (split, count) in enumerate(SIZES.items()):
        lines = [json.dumps(row) + "\n" for row in make_rows(count, seed)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    make_tokenizer().save_pretrained(folder / "tokenizer")


def make_tokenizer():
    words = [*SPECIAL.values(), *OTHERS, *TELLING["bad"], *TELLING["good"]]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    frame = [(name, words.index(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def finetune_arguments(task, output, name, *more, seeds=(0,), epochs=3, **overrides):
    """The command line of a fine-tuning of 4 steps an epoch in <output>/<name>."""
    recipe = {
        "name": name,
        "output": str(output),
        "seeds": list(seeds),
        "model": {
            "preset": "encoder-tiny",
            "tokenizer": str(task / "tokenizer"),
            "overrides": {**ENCODER, **overrides},
        },
        "task": {split: str(task / f"{split}.jsonl") for split in SIZES},
        "optimizer": {"learning_rate": 5e-3},
        "training": {"epochs": epochs, "global_batch_size": 16, "micro_batch_size": 4},
        "checkpoint": {"every": 5, "keep": 1},
        "logging": {"every": 1, "progress": False, "tensorboard": False},
    }
    path = task / f"{name}.yaml"
    path.write_text(json.dumps(recipe))  # which is YAML
    return ["--recipe", str(path), *more]
