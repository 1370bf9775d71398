"""Tokenizers as everything downstream sees them: a transformers folder, a fingerprint, a function from texts to ids."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data_prep.files import hash_json
from data_prep.origin import Origin
from data_prep.word_encoder import WordEncoder, word_rules

TRAINING_RECORD = "training.json"  # beside a tokenizer of ours: what it was trained on


@dataclass(frozen=True)
class TrainingRecord:
    """What a tokenizer of ours was trained on, and its fingerprint."""

    origin: Origin
    fingerprint: str


TokenEncoder = Callable[[Sequence[str]], list[list[int]]]


def check_tokenizer_folder(path: str | Path) -> str | Path:
    """`path`, if it is a folder; ValueError otherwise."""
    if not Path(path).is_dir():
        raise ValueError(f"tokenizer folder {path} does not exist: train one by python -m data_prep.train_tokenizer")
    return path


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a transformers folder, ours or another's. Nothing is fetched and no code of the folder is run.

    Raises:
        ValueError: no folder, no tokenizer in it, or none that the `tokenizers` library can run.
    """
    check_tokenizer_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing more special
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} holds no tokenizer that transformers can load: {reason}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{path}: {type(tokenizer).__name__} is a slow tokenizer; save its fast form (tokenizer.json)")
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """xxh3-128 of all that decides ids: vocabulary, merges, normalizer, splitting, special tokens; not of padding."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    del state["padding"], state["truncation"]  # set by whoever called the tokenizer last
    return hash_json([state, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}])


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id and one: rows of an embedding table. len(tokenizer) is smaller where ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def document_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], int]:
    """What stands around each document in causal rows: the ids that a call puts before a text, and the end of text.

    Raises:
        ValueError: the tokenizer has no end of text, or adds one to every text: prompts would have it, too.
    """
    end_id = tokenizer.eos_token_id
    if end_id is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path} has no end of text (eos_token): train one for decoders "
            "(data_prep.train_tokenizer --kind sentencepiece --template causal), or add it and save again"
        )
    begin_ids = tuple(tokenizer("")["input_ids"])
    if len(begin_ids) > 1 or end_id in begin_ids:
        added = " ".join(tokenizer.convert_ids_to_tokens(begin_ids))
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path} adds {added} to a text, as encoders want it: decoders need one that "
            "adds a begin of text at most (data_prep.train_tokenizer --template causal)"
        )
    return begin_ids, end_id


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> TokenEncoder:
    """A function from texts to their ids, whole and without special tokens; "[SEP]" or "</s>" in a text is text.

    It works on a copy, so that padding or truncation set on `tokenizer` changes nothing. Where words are known to be
    independent they are encoded once each, which gives the same ids.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = word_rules(state)
    return _encoder_of(state) if rules is None else WordEncoder(_encoder_of(rules.state), rules)


def _encoder_of(state: dict[str, Any]) -> TokenEncoder:
    backend = Tokenizer.from_str(json.dumps(state))
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return encode
