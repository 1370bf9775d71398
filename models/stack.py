"""Embeddings, the axis of spike timesteps, and the stack of spiking blocks.

Legend: T spike timesteps (first), B batch, L tokens, D width, S sites of the whole stack.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .amplitudes import STATISTICS
from .cache import SpikeCache
from .config import SpikeLMConfig
from .layers import AttentionSpec, MLPSpec, NormSpec, SpikeBlock, block_sites, build_norm
from .positions import BatchLayout, TokenPlaces, causal_mask, place_tokens, rotary_angles
from .spike_ops import Backend, resolve_backend


class PositionEmbeddings(nn.Embedding):
    """Learned positions: a class of their own, since config.position_init says how they start."""


class SpikeEmbeddings(nn.Module):
    """Sum of word, position and token-type embeddings, normalised, as encoders have them."""

    def __init__(self, config: SpikeLMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = PositionEmbeddings(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids_BL: Tensor | None,
        token_type_ids_BL: Tensor | None = None,
        position_ids_BL: Tensor | None = None,
        inputs_embeds_BLD: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [B, L, D]. Raises ValueError for sequences longer than the model has positions."""
        words = self.word_embeddings(input_ids_BL) if inputs_embeds_BLD is None else inputs_embeds_BLD
        B, L, _ = words.shape
        if position_ids_BL is None:
            if self.position_embeddings.num_embeddings < L:
                raise ValueError(
                    f"sequences of {L} tokens, but max_position_embeddings is "
                    f"{self.position_embeddings.num_embeddings}: "
                    "shorten the rows or raise max_position_embeddings"
                )
            position_ids_BL = torch.arange(L, device=words.device).expand(B, L)
        if token_type_ids_BL is None:
            token_type_ids_BL = torch.zeros(B, L, dtype=torch.long, device=words.device)
        types = self.token_type_embeddings(token_type_ids_BL)
        return self.dropout(self.norm(words + types + self.position_embeddings(position_ids_BL)))


class WordEmbeddings(nn.Module):
    """The words alone, as decoders with rotary positions have them."""

    def __init__(self, config: SpikeLMConfig) -> None:
        super().__init__()
        # Padding has an ordinary row: nothing sees it, and many decoders pad with a token that they also use.
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids_BL: Tensor | None,
        token_type_ids_BL: Tensor | None = None,
        position_ids_BL: Tensor | None = None,
        inputs_embeds_BLD: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [B, L, D]; positions are the layers' business. Raises ValueError for segments."""
        if token_type_ids_BL is not None:
            raise ValueError("token_type_ids: this model has no segments; leave them out")
        return self.dropout(self.word_embeddings(input_ids_BL) if inputs_embeds_BLD is None else inputs_embeds_BLD)


def build_embeddings(config: SpikeLMConfig) -> SpikeEmbeddings | WordEmbeddings:
    """What stands before the stack in the configuration's family."""
    return (SpikeEmbeddings if config.traits.positions == "learned" else WordEmbeddings)(config)


def expand_time(x_BLD: Tensor, num_timesteps: int) -> Tensor:
    """[B, L, D] -> [T, B, L, D]: every timestep sees the same input (direct coding). No copy."""
    return x_BLD.expand(num_timesteps, *x_BLD.shape)


def collapse_time(x_TBLD: Tensor) -> Tensor:
    """[T, B, L, D] -> [B, L, D]: the mean over timesteps."""
    return x_TBLD.mean(0)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def norm_spec(config: SpikeLMConfig) -> NormSpec:
    """The configuration's norms."""
    traits = config.traits
    eps = config.layer_norm_eps if traits.norm == "layer" else config.rms_norm_eps
    return NormSpec(traits.norm, eps, first=traits.norm_first)


def build_block(config: SpikeLMConfig) -> SpikeBlock:
    """One layer of the configuration's shape and family."""
    traits, heads = config.traits, config.num_attention_heads
    attention = AttentionSpec(
        num_heads=heads,
        num_key_value_heads=config.num_key_value_heads or heads,
        causal=traits.causal,
        bias=traits.bias,
        dropout=config.attention_probs_dropout_prob,
    )
    mlp = MLPSpec(config.intermediate_size, config.hidden_act, gated=traits.gated_mlp, bias=traits.bias)
    return SpikeBlock(config.hidden_size, config.neuron, norm_spec(config), attention, mlp, config.hidden_dropout_prob)


class SpikeStack(nn.Module):
    """Spiking blocks one after another, and the amplitude table that they share.

    `amplitudes` [S, T] is always fp32, whatever the model is cast to, and NaN until it is calibrated (see
    `models.amplitudes.calibrate_amplitudes`) or loaded. It has no rows for neurons without amplitude.
    """

    def __init__(self, config: SpikeLMConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([build_block(config) for _ in range(config.num_hidden_layers)])
        # Layers whose norms come first leave the sum of their residuals as it is.
        norm = norm_spec(config)
        self.norm = build_norm(norm, config.hidden_size) if norm.first else nn.Identity()
        self.site_names = [
            f"layer{index}.{site}" for index in range(config.num_hidden_layers) for site in block_sites(config.neuron)
        ]
        rows = len(self.site_names) if config.neuron.kind == "elastic" else 0
        self.register_buffer("amplitudes", torch.empty(rows, config.num_timesteps, dtype=torch.float32))
        self.register_buffer("calibrated", torch.empty((), dtype=torch.bool))
        self._checked: tuple[int, int] | None = None
        self.reset_amplitudes()

    def reset_amplitudes(self) -> None:
        """Forget the amplitudes: the model must be calibrated before its next use."""
        nn.init.constant_(self.amplitudes, float("nan"))
        nn.init.constant_(self.calibrated, self.amplitudes.numel() == 0)

    def set_spike_backend(self, backend: Backend, device: torch.device) -> None:
        """What computes elastic neurons (models.spike_ops). ValueError where it cannot, on `device`."""
        resolve_backend(backend, device)
        for layer in self.layers:
            layer.spike_backend = backend

    def train_firing_rate(self, wanted: bool = True) -> None:
        """Whether the counts of spikes, and so firing_sum, have a gradient: elastic neurons alone can give one."""
        for layer in self.layers:
            layer.trains_rate = wanted

    def set_checkpointing(
        self,
        mode: Literal["none", "layer", "timestep"],
        timesteps_per_cell: int = 1,
        recompute_hidden: bool = False,
    ) -> None:
        """What training keeps for the backward: everything (none), or each layer's input, to run the layer again.

        "timestep" runs that layer again in cells of `timesteps_per_cell` timesteps, and each cell once more for its own
        backward: what is alive at once is one cell instead of one layer, for a third forward. T or more: as "layer".
        `recompute_hidden`: what the MLP's activation gets, the largest of what layers of elastic neurons keep, is made
        again by one more product; with other neurons it is kept. Raises ValueError for another mode and for cells
        without timesteps.
        """
        # Cells stand inside the layer's checkpoint: alone they keep the carries of all layers, 3D + F a boundary and
        # token, which is more than they save.
        if mode not in ("none", "layer", "timestep"):
            raise ValueError(f"checkpointing is {mode!r}: use none, layer or timestep")
        if timesteps_per_cell < 1:
            raise ValueError(f"timesteps_per_cell is {timesteps_per_cell}: a cell needs at least 1 timestep")
        for layer in self.layers:
            layer.gradient_checkpointing = mode != "none"
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            layer.timesteps_per_cell = timesteps_per_cell if mode == "timestep" else None
            layer.mlp.up.recompute = recompute_hidden

    def forward(
        self,
        x_BLD: Tensor,
        attention_mask_BL: Tensor | None = None,
        calibrate: bool = False,
        observe: Callable[[Tensor], None] | None = None,
        position_ids_BL: Tensor | None = None,
        cache: SpikeCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs T timesteps: returns the mean last hidden state [B, L, D] and the sums of SpikeStats [S, T, 5].

        Encoders compute nothing for padding, whose hidden states are 0, unless their neurons count it.
        `observe` is shown the hidden states behind each layer, as their mean over timesteps [B, L, D].
        `position_ids_BL` are for decoders: what they rotate by, and how they tell the documents of a row apart.
        `cache` holds the tokens before these, and takes these up; attention_mask_BL then has columns for all of them.
        """
        amplitudes = torch.full_like(self.amplitudes, float("nan")) if calibrate else self._calibrated_amplitudes()
        visible_BL = None if attention_mask_BL is None else attention_mask_BL.to(torch.bool)
        layout = self._layout(x_BLD, visible_BL, position_ids_BL, cache)
        pack, pad = (layout.places.pack, layout.places.pad) if layout.places else (_as_it_is, _as_it_is)
        x_TBLD = expand_time(pack(x_BLD), self.config.num_timesteps)
        sums = []
        held = [None] * len(self.layers) if cache is None else cache.layers
        for layer, rows, past in zip(self.layers, self._rows(amplitudes), held, strict=True):
            # A copy: the backward reads amplitudes once more, and by then the table may have moved on.
            own = rows if calibrate else rows.clone()
            x_TBLD, layer_sums = layer(x_TBLD, own, layout, calibrate, cache=past)
            sums.append(layer_sums.to(x_BLD.device))
            if observe:
                observe(pad(collapse_time(x_TBLD)))
        if calibrate:
            self.amplitudes.copy_(amplitudes)
            self.calibrated.fill_(True)
        none = torch.zeros(0, self.config.num_timesteps, len(STATISTICS), dtype=torch.float64, device=x_BLD.device)
        return pad(self.norm(collapse_time(x_TBLD))), torch.cat([none, *sums])

    def _layout(
        self, x_BLD: Tensor, visible_BL: Tensor | None, position_ids_BL: Tensor | None, cache: SpikeCache | None
    ) -> BatchLayout:
        """What all layers are told. Made once: every layer keeps its mask for the backward, all the same one."""
        traits = self.config.traits
        counted = visible_BL is not None and not self.config.neuron.count_padding
        counted_BL = visible_BL[:, -x_BLD.shape[1] :] if counted else None
        places = None
        if traits.causal:
            mask, position_ids_BL = self._place(x_BLD, visible_BL, position_ids_BL, cache)
        else:
            mask = None if visible_BL is None else visible_BL[:, None, None, :]
            places = TokenPlaces.of(visible_BL) if counted and len(self.layers) else None
            if places is not None and places.are_all:
                places = mask = None  # without a mask GPUs have faster kernels
        mask = None if mask is None else mask.repeat(self.config.num_timesteps, 1, 1, 1)
        rotary = rotary_angles(self.config, position_ids_BL) if traits.positions == "rotary" else None
        return BatchLayout(mask, None if places else counted_BL, rotary, places)

    def _place(
        self, x_BLD: Tensor, visible_BL: Tensor | None, position_ids_BL: Tensor | None, cache: SpikeCache | None
    ) -> tuple[Tensor | None, Tensor]:
        """The causal mask of a decoder's tokens, and their positions; the cache learns their documents."""
        B, L, _ = x_BLD.shape
        empty = cache is None or cache.documents is None
        cached_BP = torch.zeros(B, 0, dtype=torch.long, device=x_BLD.device) if empty else cache.documents
        # Where every row is one document, sdpa's own causal mask serves, which needs no memory.
        plain = empty and visible_BL is None and position_ids_BL is None
        position_ids_BL, documents_BS = place_tokens(L, visible_BL, position_ids_BL, cached_BP)
        if cache is not None:
            cache.documents = documents_BS
        return None if plain else causal_mask(documents_BS, L, x_BLD.dtype), position_ids_BL

    def _rows(self, amplitudes: Tensor) -> list[Tensor]:
        return list(amplitudes.view(len(self.layers), -1, self.config.num_timesteps)) if len(self.layers) else []

    def _calibrated_amplitudes(self) -> Tensor:
        # Reading the flag waits for the device, so it is read again only after the buffer has changed.
        # A tensor made in inference mode keeps no version.
        version = None if self.calibrated.is_inference() else (id(self.calibrated), self.calibrated._version)
        if version is None or version != self._checked:
            if not bool(self.calibrated):
                raise RuntimeError(
                    "the spike amplitudes are not calibrated: call "
                    "models.amplitudes.calibrate_amplitudes(model, batch) once, or load a trained checkpoint"
                )
            self._checked = version
        return self.amplitudes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SpikeStack":
        before: dict[str, Any] = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, exact in before.items():
            moved = self._buffers[name]
            if moved.dtype != exact.dtype:  # .to(dtype) moves weights only: amplitudes stay exact
                self._buffers[name] = exact.to(moved.device)
        return self
