"""Where tokens stand and what they may see: documents in packed rows, causal masks, and positions.

A row may hold several documents one after another, as transformers' packed rows do: position_ids count from 0 within
each, and a token at position 0 begins a new one. A document sees only itself, and so does padding.

Legend: T spike timesteps, B batch, L tokens, D width, K width of a head.
"""

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .config import SpikeLMConfig

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the angles by which a token's queries and keys are rotated, [B, L, 1, K/2] each, in fp32."""


def sinusoids(num_positions: int, width: int) -> Tensor:
    """Sines and cosines of the position [num_positions, width], as positions to start from (Vaswani et al. 2017, 3.5).

    Wavelengths grow from 2 pi to about 2 pi num_positions, so that the slowest wave spans the table and none is wasted.
    """
    frequency = num_positions ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(num_positions)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width]


def count_positions(visible_BL: Tensor) -> Tensor:
    """Positions [B, L] of rows that hold one document each, beside padding on any side: its tokens counted from 0."""
    return (visible_BL.cumsum(-1) - 1).clamp(min=0)


def document_ids(position_ids_BL: Tensor, visible_BL: Tensor | None) -> Tensor:
    """The number within its row of each token's document [B, L]; -1 for padding."""
    begins_BL = position_ids_BL == 0
    if visible_BL is None:
        return begins_BL.cumsum(-1)
    return (begins_BL & visible_BL).cumsum(-1).masked_fill(~visible_BL, -1)


def causal_mask(documents_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores [B, 1, L, L]: 0 for tokens of the same document up to the query, else -inf."""
    L = documents_BL.shape[1]
    earlier_LL = torch.ones(L, L, dtype=torch.bool, device=documents_BL.device).tril()
    # Every token sees itself, padding too: a row of -inf alone would be NaN, and spoil all gradients.
    seen_BLL = earlier_LL & (documents_BL[:, :, None] == documents_BL[:, None, :])
    return torch.zeros(seen_BLL.shape, dtype=dtype, device=seen_BLL.device).masked_fill(~seen_BLL, -torch.inf)[:, None]


def rotary_angles(config: SpikeLMConfig, position_ids_BL: Tensor) -> Rotary:
    """The rotation at every position, in fp32: no buffer, which casting the model would round."""
    parameters, device = config.rope_parameters, position_ids_BL.device
    scaling = 1.0
    if parameters["rope_type"] == "default":
        K = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, K, 2, dtype=torch.float32, device=device) / K
        frequencies = 1.0 / parameters["rope_theta"] ** exponents
    else:
        frequencies, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device=device)
    angles = position_ids_BL[:, :, None, None].float() * frequencies
    return angles.cos() * scaling, angles.sin() * scaling


def rotate(x_TBLD: Tensor, rotary: Rotary) -> Tensor:
    """Queries or keys rotated head by head in at least fp32 (Su et al. 2021): component i pairs with i + K/2."""
    cos, sin = rotary  # fp32, and so are their products with anything narrower
    x1, x2 = x_TBLD.unflatten(-1, (-1, 2 * cos.shape[-1])).chunk(2, dim=-1)
    rotated = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
    return rotated.flatten(-2).to(x_TBLD.dtype)
