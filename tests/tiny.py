"""Tiny models, a batch that fits them, and processes to run them in: what several test modules need."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from models.config import SpikeLMConfig
from models.modeling import SpikeLMForPreTraining
from models.neuron import AMPLITUDE_FLOOR, run_memoryless, run_neuron

CONFIG = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}


def make_model(neuron=None, model_class=SpikeLMForPreTraining, seed=0, **overrides):
    """A model with seeded weights and without dropout; `neuron` and `overrides` are fields of its configuration."""
    torch.manual_seed(seed)
    return model_class(SpikeLMConfig(**{**CONFIG, **overrides}, neuron=neuron))


def make_batch(row_lengths=(10, 7, 4), seed=1):
    """Rows of that many tokens, padded to 10, with both kinds of labels."""
    rows = len(row_lengths)
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, CONFIG["vocab_size"], (rows, 10), generator=generator)
    attention_mask = (torch.arange(10) < torch.tensor(row_lengths).view(-1, 1)).long()
    masked = (torch.rand(rows, 10, generator=generator) < 0.4) & (attention_mask == 1)
    return {
        "input_ids": input_ids * attention_mask,
        "attention_mask": attention_mask,
        "token_type_ids": (torch.arange(10) >= 3).long().expand(rows, 10),
        "labels": torch.where(masked, input_ids, -100),
        "next_sentence_label": torch.arange(rows) % 2,
    }


def activated(hidden, name, gated):
    """What a models.spike_linear.FusedActivation computes, by torch alone."""
    activation = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu}[name]
    if not gated:
        return activation(hidden)
    gate, hidden = hidden.chunk(2, dim=-1)
    return activation(gate) * hidden


def project_by_fire(neurons, site, x, weight, bias, activation=None, recompute=False, before=None):
    """BlockNeurons.project in two steps, to be put in its place: what each linear layer sees passes through `fire`."""
    x = x if before is None else activated(x, before.name, before.gated)
    product = F.linear(neurons.fire(site, x), weight, bias)
    return product if activation is None else activation(product)


def fire_plainly(neurons, site, x, *, memoryless=False, observe=None):
    """BlockNeurons.fire of elastic neurons by the pure ones and plain autograd, without statistics."""
    alpha, config = neurons.amplitudes[site], neurons.config
    if memoryless:
        return run_memoryless(x, alpha, observe=observe)
    return run_neuron(x, alpha, leak=config.leak, reset=config.reset, observe=observe)[0]


def fire_and_count(neurons, site, x, *, memoryless=False):
    """fire_plainly with the statistics of BlockNeurons, summed by torch."""
    membranes = []
    if neurons.calibrate:
        neurons._calibrate(site, x, memoryless)
    output = fire_plainly(neurons, site, x, memoryless=memoryless, observe=lambda t, m: membranes.append(m))
    spikes, m = output.detach(), torch.stack(membranes)
    beyond = m.abs() > neurons.amplitudes[site].clamp(min=AMPLITUDE_FLOOR).view(-1, 1, 1, 1)
    measured = [each.sum(-1) for each in (m.abs(), spikes > 0, spikes < 0, beyond)]
    neurons._count(torch.stack(measured), x.shape[-1])
    return output


def rows_of(batch, rows):
    """The rows of a batch that the slice names."""
    return {name: tensor[rows] for name, tensor in batch.items()}


def run_ranks(folder: Path, worker, world_size, *arguments):
    """Runs worker(rank, *arguments) in processes joined by gloo; returns what each returned, in the order of ranks.

    The worker is a function at the top of a module and returns tensors, in dicts or lists.
    """
    torch.multiprocessing.spawn(_run_rank, (worker, world_size, folder, arguments), nprocs=world_size)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def _run_rank(rank, worker, world_size, folder, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        torch.save(worker(rank, *arguments), folder / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


class OneProcess:
    """A pipeline.engine.World of one process, without a process group."""

    rank, size, is_main, device = 0, 1, True, torch.device("cpu")

    def sum(self, values):
        return values

    def reached(self, step):
        pass

    def agree(self, ok):
        return ok

    def gather(self, value):
        return [value]

    def on_main(self, action):
        return action()

    def barrier(self):
        pass
