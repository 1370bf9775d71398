"""The cache of generation: keys and values of the tokens so far, as packed ternary codes.

Attention sees spikes: keys when they have been rotated, and values. No membrane crosses from one token to the next, so
these spikes are all that a decoder keeps of its past, in 2 bits for each timestep of an element, whatever its dtype:

    code 0 silent, 1 a spike of +1, 2 a spike of -1, 3 NaN (as neurons give it where a membrane is not finite)

A byte holds the codes of four neighbouring elements of one timestep, the first of them in its lowest bits. A code times
its amplitude is the neuron's output to the bit, but for the sign of zeros, on which no score and no spike depends.
Neurons of kind none keep their real keys and values.

Legend: T spike timesteps (first), B batch, L new tokens, S all tokens so far, D width, N bytes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .config import SpikeLMConfig

GROWTH = 64
"""Tokens by which storage grows at least. Every step reads the whole cache: one copy in so many is lost in that."""


def pack(spikes_TBLD: Tensor) -> Tensor:
    """The codes of spikes, whatever they are worth, as bytes [T, B, L, ceil(D / 4)] (uint8)."""
    x = spikes_TBLD
    codes = x.gt(0).to(torch.uint8).add_(x.lt(0), alpha=2).add_(x.isnan(), alpha=3)
    first, second, third, fourth = F.pad(codes, (0, -codes.shape[-1] % 4)).unflatten(-1, (-1, 4)).unbind(-1)
    return first | second << 2 | third << 4 | fourth << 6


def unpack(codes_TBLN: Tensor, amplitude_T: Tensor, width: int) -> Tensor:
    """What was packed, with spikes worth `amplitude_T`, in its dtype: [T, B, L, width]."""
    none = torch.zeros_like(amplitude_T)
    levels_T4 = torch.stack([none, amplitude_T, -amplitude_T, none + torch.nan], dim=1)
    # One look-up a byte, in a table of all bytes at every timestep, gives four elements.
    byte = torch.arange(256, device=codes_TBLN.device)
    table = levels_T4[:, torch.stack([byte & 3, byte >> 2 & 3, byte >> 4 & 3, byte >> 6], dim=1)].flatten(0, 1)
    first_T = 256 * torch.arange(len(levels_T4), dtype=torch.int32, device=codes_TBLN.device)
    return F.embedding(codes_TBLN + first_T.view(-1, 1, 1, 1), table).flatten(-2)[..., :width]


class SpikeCacheLayer(CacheLayerMixin):
    """Keys and values of one layer. The storage of each, [T, B, at least S, N], is packed, or real for kind none."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Storage for no token yet, of what the first update is going to keep."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        key_amplitude_T: Tensor | None = None,
        value_amplitude_T: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Keep what attention sees of the new tokens, [T, B, L, D] each; returns that of all tokens, [T, B, S, D].

        The amplitudes say what a spike is worth; None: keys and values are real. What is kept carries no gradient.
        """
        amplitudes, states = (key_amplitude_T, value_amplitude_T), (key_states, value_states)
        new = [x.detach() if a is None else pack(x) for x, a in zip(states, amplitudes, strict=True)]
        if not self.is_initialized:
            self.lazy_initialization(*new)
        self.keys, self.values = (
            _append(held, each, self.num_tokens) for held, each in zip((self.keys, self.values), new, strict=True)
        )
        first, self.num_tokens = self.num_tokens == 0, self.num_tokens + key_states.shape[2]
        if first:
            return states
        held = (each[:, :, : self.num_tokens] for each in (self.keys, self.values))
        return tuple(
            each if a is None else unpack(each, a, x.shape[-1])
            for each, a, x in zip(held, amplitudes, states, strict=True)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, that for tokens to come included."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_max_length(self) -> int:
        return -1  # none

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.num_tokens = False, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: as many as `tokens_to_remove`, which is 0 or negative, says."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}: give minus the number of tokens to forget")
        self.num_tokens = max(0, self.num_tokens + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._over_batch(lambda held: held.index_select(1, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._over_batch(lambda held: held.repeat_interleave(repeats, dim=1))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._over_batch(lambda held: held[:, indices])

    def _over_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)


class SpikeCache(Cache):
    """What a decoder keeps of the tokens that it has seen. Made by `generate`, or by a forward with use_cache=True.

    documents: the number within its row of each token's document, [B, S], -1 for padding; None before the first token.
    Raises ValueError for the configuration of an encoder.
    """

    def __init__(self, config: SpikeLMConfig) -> None:
        if not config.traits.causal:
            raise ValueError(f"family {config.family} is an encoder, which keeps nothing: leave the cache out")
        super().__init__(layers=[SpikeCacheLayer() for _ in range(config.num_hidden_layers)])
        self.documents: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all storage."""
        return sum(layer.nbytes for layer in self.layers) + (0 if self.documents is None else self.documents.nbytes)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, of each row, padding included: in every layer the same."""
        return 0 if self.documents is None else self.documents.shape[1]

    def reset(self) -> None:
        super().reset()
        self.documents = None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        kept = max(0, self.get_seq_length() + tokens_to_remove)
        self.documents = self.documents[:, :kept] if kept else None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._over_batch(lambda documents: documents.index_select(0, beam_idx.to(documents.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._over_batch(lambda documents: documents.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._over_batch(lambda documents: documents[indices])

    def _over_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.documents is not None:
            self.documents = change(self.documents)


def _append(held: Tensor, new: Tensor, length: int) -> Tensor:
    """Storage with `new` behind its first `length` tokens: `held` itself, or a larger copy where that is full."""
    needed = length + new.shape[2]
    # What was made in inference mode must not be written to outside of it.
    if held.shape[2] < needed or held.is_inference() != torch.is_inference_mode_enabled():
        T, B, _, N = new.shape
        grown = new.new_empty(T, B, needed + -needed % GROWTH, N)
        grown[:, :, :length] = held[:, :, :length]
        held = grown
    held[:, :, length:needed] = new
    return held
