"""What a model makes of rows or documents that it was not trained on: losses, accuracies, firing rates, energy.

Legend: B batch, L tokens, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from models.amplitudes import SpikeStats, spiking_stack
from models.config import SpikeLMConfig
from models.energy import (
    EnergyTable,
    Operations,
    Passed,
    ordinary_operations,
    other_operations,
    spiking_operations,
)
from pipeline.objectives import IGNORED, count_correct, count_targets, loss_sums
from pipeline.world import World


@dataclass(frozen=True)
class Tally:
    """Sums over the counted targets of some batches, for some of pipeline.objectives.LABELS, those of tokens first.

    Attributes:
        losses: the names.
        sums: targets, nats, and targets that were predicted right, [3, losses] in fp64.
        occurrences: how often each token was a target, [V] in fp64.
        stats: what the neurons did.
    """

    losses: tuple[str, ...]
    sums: Tensor
    occurrences: Tensor
    stats: SpikeStats

    def summed(self, world: World) -> Self:
        """The tallies of all ranks together: every rank takes part."""
        sums, occurrences = world.sum(self.sums), world.sum(self.occurrences)
        return type(self)(self.losses, sums, occurrences, self.stats.all_reduced())

    def values(self) -> dict[str, float]:
        """Losses (nats per target), accuracies, and the unigram entropy of the tokens.

        That is the entropy of the targets' own distribution: what a model that knows only how often each token occurs
        would lose on them.
        """
        values = {}
        for name, count, loss, correct in zip(self.losses, *self.sums.tolist(), strict=True):
            if count > 0:
                values[f"{name}_loss"], values[f"{name}_accuracy"] = loss / count, correct / count
        share = self.occurrences / self.occurrences.sum().clamp(min=1)
        return values | {"unigram_entropy": float(-torch.xlogy(share, share).sum())}


@torch.no_grad()
def tally_batches(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], losses: Sequence[str]) -> Tally:
    """What `model`, or the engine around it, makes of batches with labels on its device."""
    stack = spiking_stack(model)
    device = stack.calibrated.device
    sums = torch.zeros(3, len(losses), dtype=torch.float64, device=device)
    occurrences = torch.zeros(stack.config.vocab_size, dtype=torch.float64, device=device)
    stats = SpikeStats.zeros(len(stack.site_names), stack.config.num_timesteps, device)
    for batch in batches:
        output = model(**batch)
        measured = count_targets(batch, losses), loss_sums(output, losses), count_correct(output, batch, losses)
        sums += torch.stack(measured)
        occurrences += torch.bincount(batch["labels"][batch["labels"] != IGNORED], minlength=len(occurrences))
        stats += SpikeStats(output.spike_stats)
    return Tally(tuple(losses), sums, occurrences, stats)


def firing_values(stack: nn.Module, stats: SpikeStats) -> dict[str, float | dict[str, float]]:
    """Firing rate (mean over the sites of `stack`), spikes per token, and each site's rate (mean over timesteps).

    Nothing where no neuron stands.
    """
    if not stack.site_names:
        return {}
    rates = dict(zip(stack.site_names, stats.firing_rate.mean(1).tolist(), strict=True))
    return {
        "firing_rate": sum(rates.values()) / len(rates),
        "spikes_per_token": stats.spikes_per_token(stack.config.hidden_size),
        "firing_rate_by_site": rates,
    }


def energy_values(
    config: SpikeLMConfig, stats: SpikeStats, passed: Passed, table: EnergyTable
) -> dict[str, float | dict[str, float]]:
    """Energy in microjoules for each token that has passed: of what the layers multiply, and of everything.

    Linear layers and attention are told by site, and beside them what they would be in an ordinary transformer.
    """
    by_site = spiking_operations(config, stats.firing_rate, passed)
    others = other_operations(config, passed)

    def each_token(operations: Iterable[Operations]) -> float:
        return 1e6 * sum(part.joules(table) for part in operations) / max(passed.tokens, 1)

    layers = each_token(by_site.values())
    return {
        "energy_of_layers": layers,
        "energy_of_ordinary_layers": each_token([ordinary_operations(config, passed)]),
        "energy": layers + each_token(others.values()),
        "energy_by_site": {site: each_token([operations]) for site, operations in by_site.items()},
        "energy_of_others": {name: each_token([operations]) for name, operations in others.items()},
    }


class Window(NamedTuple):
    """A part of a document: token ids, and the place in it from which on tokens are targets."""

    ids: np.ndarray
    first_target: int


def strided_windows(ids: np.ndarray, length: int, stride: int) -> Iterator[Window]:
    """The document cut into windows of `length` tokens, one every `stride`, in which each token is a target once.

    A target sees at least length - stride tokens before it, where the document has them. Its first token is none.
    Raises ValueError where that would be no token at all.
    """
    if not 1 <= stride < length:
        raise ValueError(f"a stride of {stride} and windows of {length}: use a stride from 1 to {length - 1}")
    end = 1
    for start in range(0, len(ids), stride):
        if end >= len(ids):
            return
        window = ids[start : start + length]
        yield Window(window, end - start)
        end = start + len(window)


def window_batches(windows: Iterable[Window], batch_size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Windows as batches [B, L], padded on the right."""
    windows = iter(windows)
    while rows := list(islice(windows, batch_size)):
        longest = max(len(row.ids) for row in rows)
        ids = np.zeros((len(rows), longest), np.int64)
        mask, labels = np.zeros_like(ids), np.full_like(ids, IGNORED)
        for number, (tokens, first) in enumerate(rows):
            ids[number, : len(tokens)], mask[number, : len(tokens)] = tokens, 1
            labels[number, first : len(tokens)] = tokens[first:]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        yield {name: torch.from_numpy(array).to(device) for name, array in batch.items()}


def perplexity(loss: float) -> float:
    """Of a loss in nats per token; no more than what fp64 holds."""
    return math.exp(min(loss, 700.0))


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Of text of so many bytes (UTF-8) that a model loses so many nats on.

    Where no begin of text stands before a document its first token is no target, and costs nothing here.
    """
    return nats / math.log(2) / num_bytes
