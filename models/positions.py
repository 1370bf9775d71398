"""Where tokens stand and what they may see: documents in packed rows, causal masks, and positions.

A row may hold several documents one after another, as transformers' packed rows do: position_ids count from 0 within
each, and a token at position 0 begins a new one. A document sees only itself, and so does padding.

Legend: T spike timesteps, B batch, L tokens, D width, K width of a head; with a cache P cached tokens and S = P + L.
N tokens of a batch that are no padding.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .config import SpikeLMConfig

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the angles by which a token's queries and keys are rotated, [B, L, 1, K/2] each, in fp32."""

PADDING = -1
"""The number of the document that padding stands in."""


@dataclass(frozen=True)
class TokenPlaces:
    """Where the tokens of a batch stand among its padding, so that layers may have them alone, as one row of N."""

    flat_N: Tensor
    """Each token's number among the B * L places."""

    num_rows: int
    length: int

    @classmethod
    def of(cls, visible_BL: Tensor) -> "TokenPlaces | None":
        """None where all is padding, or nobody can say. Waits for the device: shapes follow."""
        if visible_BL.device.type == "meta":
            return None
        flat_N = visible_BL.flatten().nonzero().squeeze(-1)
        return cls(flat_N, *visible_BL.shape) if len(flat_N) else None

    @property
    def are_all(self) -> bool:
        """Whether nothing is padding."""
        return len(self.flat_N) == self.num_rows * self.length

    def pack(self, x: Tensor) -> Tensor:
        """[..., B, L, D] -> [..., 1, N, D]."""
        return x.flatten(-3, -2).index_select(-2, self.flat_N).unsqueeze(-3)

    def pad(self, x: Tensor) -> Tensor:
        """[..., 1, N, D] -> [..., B, L, D], with zeros for padding."""
        *leading, _, _, D = x.shape
        padded = x.new_zeros(*leading, self.num_rows * self.length, D)
        return padded.index_copy(-2, self.flat_N, x.squeeze(-3)).unflatten(-2, (self.num_rows, self.length))


@dataclass(frozen=True)
class BatchLayout:
    """What layers have to know of a batch beside its hidden states."""

    mask: Tensor | None = None
    """For every timestep and row, [T * B, 1, 1 or L, L], or S columns with a cache, which then needs one: True where a
    token may be attended to, or what is added to the scores."""

    counted_BL: Tensor | None = None
    """True where a token counts in the statistics; None: all do."""

    rotary: Rotary | None = None
    """By which queries and keys are rotated."""

    places: TokenPlaces | None = None
    """Where the tokens stand in the rows that the mask is for; hidden states then have all of them in one row."""

    def of_timesteps(self, share: float) -> "BatchLayout":
        """For a part of the timesteps, which are all alike."""
        return self if self.mask is None else replace(self, mask=self.mask[: round(share * len(self.mask))])


WHOLE_ROWS = BatchLayout()
"""Of rows without padding, each a text of its own."""


def sinusoids(num_positions: int, width: int) -> Tensor:
    """Sines and cosines of the position [num_positions, width], as positions to start from (Vaswani et al. 2017, 3.5).

    Wavelengths grow from 2 pi to about 2 pi num_positions, so that the slowest wave spans the table and none is wasted.
    """
    frequency = num_positions ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(num_positions)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width]


def place_tokens(
    num_tokens: int, visible_BS: Tensor | None, position_ids_BL: Tensor | None, cached_BP: Tensor
) -> tuple[Tensor, Tensor]:
    """Positions [B, L] of new tokens, and the documents [B, S] of all tokens of their rows, P cached ones first.

    Args:
        num_tokens: L, of the new tokens.
        visible_BS: False for padding, of all tokens; None: no token is padding that the cache does not know as such.
        position_ids_BL: of the new tokens. None: they go on where the last document of their row ends, and padding on
            any side is not counted.
        cached_BP: documents of the cached tokens, with P = 0 where there are none.

    Raises ValueError where visible_BS has not a column for each token.
    """
    B, P = cached_BP.shape
    if visible_BS is None:
        visible_BL = torch.ones(B, num_tokens, dtype=torch.bool, device=cached_BP.device)
    elif visible_BS.shape[1] != P + num_tokens:
        raise ValueError(
            f"attention_mask has {visible_BS.shape[1]} columns, but there are {P} cached and {num_tokens} new tokens: "
            f"give it {P + num_tokens}, those of the cached tokens first"
        )
    else:
        visible_BL, cached_BP = visible_BS[:, P:], cached_BP.masked_fill(~visible_BS[:, :P], PADDING)
    last_B1 = F.pad(cached_BP, (1, 0)).amax(-1, keepdim=True)  # 0 where nothing is cached, or padding alone
    if position_ids_BL is None:
        position_ids_BL = (cached_BP == last_B1).sum(-1, keepdim=True) + count_positions(visible_BL)
    position_ids_BL = position_ids_BL.expand(B, num_tokens)
    return position_ids_BL, torch.cat([cached_BP, document_ids(position_ids_BL, visible_BL, last_B1)], dim=1)


def count_positions(visible_BL: Tensor) -> Tensor:
    """Positions [B, L] of rows that hold one document each, beside padding on any side: its tokens counted from 0."""
    return (visible_BL.cumsum(-1) - 1).clamp(min=0)


def document_ids(position_ids_BL: Tensor, visible_BL: Tensor, last_B1: Tensor | int = 0) -> Tensor:
    """The number within its row of each token's document [B, L], counted on from `last_B1`; -1 for padding."""
    begins_BL = (position_ids_BL == 0) & visible_BL
    return (last_B1 + begins_BL.cumsum(-1)).masked_fill(~visible_BL, PADDING)


def causal_mask(documents_BS: Tensor, num_queries: int, dtype: torch.dtype) -> Tensor:
    """What is added to the attention scores of a row's last L tokens [B, 1, L, S].

    0 for tokens of the same document up to the query, else -inf.
    """
    S = documents_BS.shape[1]
    earlier_LS = torch.ones(num_queries, S, dtype=torch.bool, device=documents_BS.device).tril(S - num_queries)
    # Every token sees itself, padding too: a row of -inf alone would be NaN, and spoil all gradients.
    seen_BLS = earlier_LS & (documents_BS[:, -num_queries:, None] == documents_BS[:, None, :])
    return torch.zeros(seen_BLS.shape, dtype=dtype, device=seen_BLS.device).masked_fill(~seen_BLS, -torch.inf)[:, None]


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
