"""What models learn to predict: rows of token ids into training batches, and what of a model's output counts.

Batches are made by pure functions, seeded by sample id and epoch alone: what a sample looks like in an epoch does not
depend on ranks, loader workers, or the other samples of its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_prep.tokenization import document_frame, vocabulary_size
from pipeline.config import ObjectiveSettings, RunConfig, is_decoder
from pipeline.mixing import Choice, mix

IGNORED = -100
"""The label of a position or row that does not count, as torch's cross_entropy has it; of numbers it is NaN."""


Rows = Mapping[str, np.ndarray]
"""Rows of shards: one array [B, ...] per field."""

LABELS = {
    "masked_lm": "labels",
    "next_sentence": "next_sentence_label",
    "causal_lm": "labels",
    "classification": "labels",
    "regression": "labels",
}
"""Where a batch has the targets of a loss. Models give its sum over counted targets as `<name>_loss_sum`."""


class Objective(Protocol):
    """What a run predicts. Picklable: loader workers make the batches."""

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of LABELS; each loss is a mean of its own. The first is that of tokens."""
        ...

    def make_batch(self, rows: Rows, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, Tensor]:
        """Tensors for the model, row by row."""
        ...


@dataclass(frozen=True)
class MaskedTokens:
    """Masked tokens and, where the settings ask for it, next sentences: encoders."""

    seed: int
    settings: ObjectiveSettings
    tokens: SpecialTokens

    @property
    def losses(self) -> tuple[str, ...]:
        return ("masked_lm", "next_sentence") if self.settings.next_sentence else ("masked_lm",)

    def make_batch(self, rows: Rows, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, Tensor]:
        return pretraining_batch(rows, sample_ids, epochs, seed=self.seed, settings=self.settings, tokens=self.tokens)


@dataclass(frozen=True)
class NextTokens:
    """Every token from those before it in its document: decoders."""

    end_id: int
    """Of the end of text, which ends every document."""

    losses = ("causal_lm",)

    def make_batch(self, rows: Rows, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, Tensor]:
        return causal_batch(rows, end_id=self.end_id)


def build_objective(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Objective:
    """The objective of the recipe's model: decoders predict next tokens, encoders masked ones.

    Raises ValueError where the tokenizer lacks a special token that it needs.
    """
    if is_decoder(config.model):
        return NextTokens(document_frame(tokenizer)[1])
    return MaskedTokens(config.seed, config.objective, SpecialTokens.of(tokenizer))


@dataclass(frozen=True)
class SpecialTokens:
    """What masking has to know of a tokenizer."""

    mask: int
    """Id of the mask token."""

    special: tuple[int, ...]
    """Ids that are never masked and never put in a masked token's place, the mask and padding among them."""

    vocab_size: int
    """The largest id and one."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
        """Raises ValueError where the tokenizer has no mask token."""
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no mask token, which masked-token pretraining needs: "
                "train one with data_prep.train_tokenizer, or name another"
            )
        return cls(tokenizer.mask_token_id, tuple(sorted(tokenizer.all_special_ids)), vocabulary_size(tokenizer))

    @cached_property
    def is_ordinary(self) -> np.ndarray:
        """Whether an id may be masked, bool [V]."""
        ordinary = np.ones(self.vocab_size, bool)
        ordinary[list(self.special)] = False
        return ordinary

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """The ids that may be masked, int64."""
        return np.flatnonzero(self.is_ordinary)


def pretraining_batch(
    rows: Rows,
    sample_ids: np.ndarray,
    epochs: np.ndarray,
    *,
    seed: int,
    settings: ObjectiveSettings,
    tokens: SpecialTokens,
) -> dict[str, Tensor]:
    """Sentence pairs with masked tokens, as BERT is pretrained on (Devlin et al. 2019, section 3.1 and appendix A).

    Args:
        rows: `ids` [B, L] padded sequences `[CLS] A [SEP] B [SEP]`; `length` [B] tokens without padding; `first_length`
            [B] tokens of `[CLS] A [SEP]`; `next_sentence_label` [B], 0 where B follows A in its document, 1 where it
            is random.
        sample_ids, epochs: which samples these are, in which epoch, [B]; with `seed` they decide all random choices.

    Returns int64 tensors: `input_ids`, `attention_mask`, `token_type_ids` and `labels` [B, L], and, where the settings
    ask for it, `next_sentence_label` [B]. Labels are IGNORED but at masked positions.
    """
    ids = rows["ids"].astype(np.int64)
    position = np.arange(ids.shape[1])
    is_token = position < rows["length"][:, None]
    is_second = is_token & (position >= rows["first_length"][:, None])
    if settings.static_masking:
        epochs = np.zeros_like(epochs)
    bits = mix(seed, Choice.MASKED_POSITIONS, epochs[:, None], sample_ids[:, None], position)
    is_masked = _choose(bits, is_token & tokens.is_ordinary[ids], settings.mask_probability)
    batch = {
        "input_ids": np.copy(ids),
        "attention_mask": is_token.astype(np.int64),
        "token_type_ids": is_second.astype(np.int64),
        "labels": np.where(is_masked, ids, IGNORED),
    }
    batch["input_ids"][is_masked] = _corrupt(ids[is_masked], bits[is_masked], tokens)
    if settings.next_sentence:
        batch["next_sentence_label"] = rows["next_sentence_label"].astype(np.int64)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def causal_batch(rows: Rows, *, end_id: int) -> dict[str, Tensor]:
    """Packed documents, of which every token is to be predicted that has one before it in its document and its row.

    Args:
        rows: `ids` [B, L], documents that end with `end_id`, then padding; `length` [B] tokens without padding.

    Returns int64 tensors [B, L]: `input_ids`, `attention_mask`, `position_ids`, which count from 0 within each
    document, and `labels`, which are the ids themselves (the model shifts them), IGNORED where nothing is to be
    predicted. A document that the row before has begun counts as one that begins here.
    """
    ids = rows["ids"].astype(np.int64)
    position = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    is_token = position < rows["length"][:, None]
    is_first = np.concatenate([np.ones_like(ids[:, :1], bool), ids[:, :-1] == end_id], axis=1)
    start = np.maximum.accumulate(np.where(is_first, position, 0), axis=1)
    batch = {
        "input_ids": ids,
        "attention_mask": is_token.astype(np.int64),
        "position_ids": position - start,
        "labels": np.where(is_token & ~is_first, ids, IGNORED),
    }
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def count_targets(batch: Mapping[str, Tensor], losses: Sequence[str]) -> Tensor:
    """How many targets of each of `losses` count in `batch`, int64 [losses]."""
    return torch.stack([is_counted(batch[LABELS[name]]).sum() for name in losses])


def is_counted(labels: Tensor) -> Tensor:
    """Which labels count, of any shape."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORED


def loss_sums(output: object, losses: Sequence[str]) -> Tensor:
    """The sums of `losses` over counted targets that a model gives, [losses] with gradient."""
    return torch.stack([getattr(output, f"{name}_loss_sum") for name in losses])


def count_correct(output: object, batch: Mapping[str, Tensor], losses: Sequence[str]) -> Tensor:
    """How many counted targets of each of `losses` the model's output predicts right, [losses]."""
    labels = batch["labels"]
    correct = [(output.logits.argmax(-1) == labels[labels != IGNORED]).sum()]
    if "next_sentence" in losses:
        correct.append((output.next_sentence_logits.argmax(-1) == batch["next_sentence_label"]).sum())
    return torch.stack(correct)


def without_targets(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of `batch` that counts for nothing: no targets, and one token a row, so that attention stays defined."""
    mask = torch.zeros_like(batch["attention_mask"])
    mask[:, 0] = 1
    names = batch.keys() & set(LABELS.values())
    labels = {name: torch.full_like(batch[name], _ignored_like(batch[name])) for name in names}
    return {**batch, **labels, "attention_mask": mask}


def _ignored_like(labels: Tensor) -> float:
    return float("nan") if labels.is_floating_point() else IGNORED


def _choose(bits: np.ndarray, candidates: np.ndarray, probability: float) -> np.ndarray:
    """Where to mask, bool [B, L]: of a row's n candidates those round(p * n) with the lowest bits, at least one.

    BERT rounds alike but counts [CLS] and [SEP] among the n. A row without candidates gets no mask.
    """
    available = candidates.sum(axis=1)
    wanted = np.minimum(np.maximum(np.rint(probability * available), 1), available).astype(np.int64)
    ranked = np.sort(np.where(candidates, bits, np.iinfo(np.uint64).max), axis=1)
    # The bits of a row are all different (mix is a bijection of the position), so exactly `wanted` lie up to this one.
    highest = np.take_along_axis(ranked, np.maximum(wanted - 1, 0)[:, None], axis=1)
    return candidates & (bits <= highest)


def _corrupt(ids: np.ndarray, bits: np.ndarray, tokens: SpecialTokens) -> np.ndarray:
    """What stands in place of masked `ids` [n]: the mask token (80 %), a random ordinary token (10 %), or the id."""
    action = mix(Choice.MASK_ACTION, bits) % np.uint64(10)
    replacement = tokens.ordinary_ids[mix(Choice.MASK_REPLACEMENT, bits) % np.uint64(len(tokens.ordinary_ids))]
    return np.select([action < 8, action == 8], [np.int64(tokens.mask), replacement], ids)
