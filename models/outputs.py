"""What our models give: transformers' outputs, and the sums that they lack.

Legend: B batch, L tokens, D width, V vocabulary, N positions that count, S sites, T spike timesteps.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutput,
)

from .cache import SpikeCache


@dataclass
class SpikeLMModelOutput(BaseModelOutputWithPooling):
    """What the bare model gives.

    last_hidden_state: [B, L, D], the mean over timesteps. pooler_output: [B, D], or None; decoders have none.
    hidden_states: where asked for, the embeddings and what each layer gives, means over timesteps, [B, L, D] each; the
    last one is last_hidden_state.
    past_key_values: what later tokens need of these and of those before, where asked for.
    spike_stats: sums of SpikeStats over the neurons, [S, T, 5], on this forward's tokens alone.
    firing_sum: the mean firing rate of all sites and timesteps, summed over them (see SpikeStack.train_firing_rate).
    """

    past_key_values: SpikeCache | None = None
    spike_stats: Tensor | None = None
    firing_sum: Tensor | None = None


@dataclass
class SpikeLMPreTrainingOutput(MaskedLMOutput):
    """Losses and logits of the pretraining heads.

    loss: mean over this batch's counted targets, summed over the objectives, as transformers has it.
    logits: [N, V] where labels were given, else [B, L, V]. next_sentence_logits: [B, 2].
    masked_lm_loss_sum, next_sentence_loss_sum: sums over counted targets in nats, to be divided by a count that may
    span more than this batch.
    hidden_states, spike_stats, firing_sum: as in SpikeLMModelOutput.
    """

    next_sentence_logits: Tensor | None = None
    masked_lm_loss_sum: Tensor | None = None
    next_sentence_loss_sum: Tensor | None = None
    spike_stats: Tensor | None = None
    firing_sum: Tensor | None = None


@dataclass
class SpikeLMCausalLMOutput(CausalLMOutputWithPast):
    """Loss and logits of the causal head.

    loss: mean over this batch's counted targets. logits: [N, V] of the positions before the counted targets where
    labels were given, else [B, L, V], or of those positions that logits_to_keep names.
    causal_lm_loss_sum: the sum over counted targets in nats; causal_lm_count: how many those are.
    past_key_values, hidden_states, spike_stats, firing_sum: as in SpikeLMModelOutput.
    """

    causal_lm_loss_sum: Tensor | None = None
    causal_lm_count: Tensor | None = None
    spike_stats: Tensor | None = None
    firing_sum: Tensor | None = None


@dataclass
class SpikeLMSequenceClassifierOutput(SequenceClassifierOutput):
    """loss (a mean), logits [B, num_labels]; hidden_states, spike_stats and firing_sum as in SpikeLMModelOutput.

    classification_loss_sum (nats, one class a row), regression_loss_sum (squared errors): the sum over counted rows,
    where there are labels of that kind.
    """

    classification_loss_sum: Tensor | None = None
    regression_loss_sum: Tensor | None = None
    spike_stats: Tensor | None = None
    firing_sum: Tensor | None = None
