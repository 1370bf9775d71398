"""Cross-entropy behind a linear head, some positions at a time: all their logits are never in memory at once.

Gradients of a sum of losses need nothing but the logits, so they are made in the forward, chunk by chunk, with the same
products that a backward would need; the backward only scales them.

Legend: N positions that count, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, FunctionCtx

from .spike_linear import product_dtype


class TokenHead(nn.Linear):
    """A linear layer from hidden states to logits, or, where labels are given, to the sum of their losses."""

    def forward(self, hidden: Tensor, labels_N: Tensor | None = None, positions_at_once: int = 1) -> Tensor:
        """Logits [..., V] of hidden states [..., D]; with labels [N] for hidden states [N, D] the summed loss in nats.

        `positions_at_once`, at least 1, says of how many positions logits exist at a time. The loss has a first
        derivative only.
        """
        if labels_N is None:
            return super().forward(hidden)
        return _LinearCrossEntropy.apply(hidden, self.weight, self.bias, labels_N, positions_at_once)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, at_once: int
    ) -> Tensor:
        dtype = product_dtype(hidden_ND)
        weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        wanted = ctx.needs_input_grad[:3]
        # In fp32 at least: sums over chunks as wide as one product's over all positions, scaled once in the backward.
        wide = torch.promote_types(dtype, torch.float32)
        grad_hidden, grad_weight, grad_bias = (
            torch.zeros_like(each, dtype=wide) if is_wanted else None
            for each, is_wanted in zip((hidden_ND, weight_VD, bias_V), wanted, strict=True)
        )
        total = torch.zeros((), dtype=wide, device=hidden_ND.device)
        for begin in range(0, len(labels_N), at_once):
            chunk = slice(begin, begin + at_once)
            hidden, labels = hidden_ND[chunk].to(dtype), labels_N[chunk, None]
            logits_nV = F.linear(hidden, weight, bias).to(wide)
            total += logits_nV.logsumexp(-1).sum() - logits_nV.gather(1, labels).sum()
            if not any(wanted):
                continue
            grad = logits_nV.softmax(-1)
            del logits_nV
            grad = grad.scatter_add_(1, labels, torch.full_like(labels, -1.0, dtype=grad.dtype)).to(dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype, weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this loss has no second derivative: its gradient was made in the forward; call backward or "
                "autograd.grad without create_graph, or set logits_at_once to 0"
            )
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if each is None else (each * grad).to(dtype) for each, dtype in pairs), None, None
