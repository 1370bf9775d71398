"""SpikeLM models with transformers' interface: the bare encoder or decoder, and the heads that stand on them.

Arguments that a forward does not know are a TypeError. Those that only the bare model knows pass through the heads.

Legend: B batch, L tokens, D width, V vocabulary, N positions that count (label other than -100).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils.generic import can_return_tuple

from .amplitudes import firing_sum
from .auto import register_auto_classes
from .cache import SpikeCache
from .config import FAMILIES, SpikeLMConfig
from .layers import SpikeBlock
from .loss import TokenHead
from .outputs import (
    SpikeLMCausalLMOutput,
    SpikeLMModelOutput,
    SpikeLMPreTrainingOutput,
    SpikeLMSequenceClassifierOutput,
)
from .positions import sinusoids
from .stack import PositionEmbeddings, SpikeStack, build_embeddings

IGNORED_LABEL = -100


class SpikeLMPreTrainedModel(PreTrainedModel):
    """What all our models share: configuration, initialisation, checkpointing.

    Raises ValueError where the configuration's family has not the kind of stack that the class needs.
    """

    config_class = SpikeLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # losses are means over the batch given: transformers' Trainer averages them itself
    _supports_sdpa = True
    _no_split_modules = ["SpikeBlock"]
    _needs_causal: bool | None = None  # None: stands on both kinds of stack

    logits_at_once: int = 0
    """Positions of which training makes logits at a time; where more of them count, it gives none out. 0: all."""

    def __init__(self, config: SpikeLMConfig) -> None:
        if not self.fits(config):
            kinds = {False: "an encoder", True: "a decoder"}
            fitting = [name for name, family in FAMILIES.items() if family.causal == self._needs_causal]
            raise ValueError(
                f"{type(self).__name__} needs {kinds[self._needs_causal]}, but family is {config.family!r}, "
                f"{kinds[config.traits.causal]}: use another head, or family {' or '.join(fitting)}"
            )
        super().__init__(config)

    @classmethod
    def fits(cls, config: SpikeLMConfig) -> bool:
        """Whether this class can be made of the configuration: whether encoders have it, or decoders."""
        return cls._needs_causal in (None, config.traits.causal)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, PositionEmbeddings) and self.config.position_init == "sinusoidal":
            init.copy_(module.weight, 2 * std * sinusoids(*module.weight.shape))
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.padding_idx is not None:
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, SpikeStack):
            module.reset_amplitudes()

    def _predict_tokens(
        self, head: nn.Module, hidden_BLD: Tensor, targets_BL: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of the counted positions [N, V] and their summed loss; of all positions where no targets are given."""
        if targets_BL is None:
            return head(hidden_BLD), None
        counted_BL = targets_BL != IGNORED_LABEL
        hidden_ND, labels_N = hidden_BLD[counted_BL], targets_BL[counted_BL]
        if self.training and torch.is_grad_enabled() and 0 < self.logits_at_once < len(labels_N):
            return None, head(hidden_ND, labels_N, self.logits_at_once)
        logits_NV = head(hidden_ND)
        return logits_NV, _loss_sum(logits_NV, labels_N)


class SpikeLMModel(SpikeLMPreTrainedModel):
    """The bare model: embeddings, T timesteps of spiking layers, mean over time; encoders have BERT's pooler as well.

    In a decoder, position_ids that begin anew at 0 within a row begin a new document, which sees nothing of the ones
    before. Left out, every row is one document, whose tokens are counted from 0 beside padding on either side.
    """

    def __init__(self, config: SpikeLMConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = build_embeddings(config)
        self.stack = SpikeStack(config)
        pooled = add_pooling_layer and not config.traits.causal
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if pooled else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past_key_values: SpikeCache | None = None,
        use_cache: bool | None = None,
        calibrate: bool = False,
    ) -> SpikeLMModelOutput:
        """Inputs are [B, L] as in transformers. `calibrate` belongs to models.amplitudes.calibrate_amplitudes.

        past_key_values: the tokens before these, of a decoder, to which these are added; attention_mask then has
            columns for all of them. position_ids go on in the row's last document where they are left out.
        use_cache: begin such a cache. It is not begun where training runs layers again instead of keeping what they
            computed.

        Raises RuntimeError where the amplitudes are not calibrated, ValueError for attention weights, which are never
        formed, for token_type_ids or a cache where the family has none, and where not exactly one of input_ids and
        inputs_embeds is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if self._asked_for("output_attentions", output_attentions):
            raise ValueError("output_attentions is True: SpikeLM never forms attention weights; leave it out")
        cache = self._cache(past_key_values, use_cache)
        embedded_BLD = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        states = [embedded_BLD] if self._asked_for("output_hidden_states", output_hidden_states) else None
        observe = None if states is None else states.append
        hidden_BLD, stats = self.stack(embedded_BLD, attention_mask, calibrate, observe, position_ids, cache)
        if states is not None:
            states[-1] = hidden_BLD  # behind the last norm, as transformers has it
        return SpikeLMModelOutput(
            last_hidden_state=hidden_BLD,
            pooler_output=None if self.pooler is None else torch.tanh(self.pooler(hidden_BLD[:, 0])),
            hidden_states=None if states is None else tuple(states),
            past_key_values=cache,
            spike_stats=stats.detach(),
            firing_sum=firing_sum(stats, self.config.hidden_size),
        )

    def _cache(self, given: SpikeCache | None, use_cache: bool | None) -> SpikeCache | None:
        """The cache of this forward: the one given, else a new one where one is asked for and can be kept."""
        again = self.training and torch.is_grad_enabled()  # where layers may run again for the backward
        again = again and any(layer.gradient_checkpointing for layer in self.stack.layers)
        if given is None:
            return SpikeCache(self.config) if use_cache and not again else None
        if not isinstance(given, SpikeCache):
            raise ValueError(f"past_key_values is a {type(given).__name__}: pass a SpikeCache, or leave it out")
        if again:
            raise ValueError("past_key_values: with checkpointing a layer would add its tokens twice; leave it out")
        return given

    def _asked_for(self, name: str, value: bool | None) -> bool:
        return bool(getattr(self.config, name) if value is None else value)


class MaskedLMHead(nn.Module):
    """BERT's head for masked tokens: dense, activation, norm, and a decoder tied to the word embeddings."""

    def __init__(self, config: SpikeLMConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.mlm_head_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = TokenHead(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Tensor, labels_N: Tensor | None = None, positions_at_once: int = 1) -> Tensor:
        """As TokenHead."""
        return self.decoder(self.norm(self.activation(self.dense(hidden))), labels_N, positions_at_once)


class SpikeLMForMaskedLM(SpikeLMPreTrainedModel):
    """The encoder with a head for masked tokens."""

    accepts_loss_kwargs = True
    _needs_causal = False
    _tied_weights_keys = {"mlm_head.decoder.weight": "model.embeddings.word_embeddings.weight"}

    def __init__(self, config: SpikeLMConfig) -> None:
        super().__init__(config)
        self.model = SpikeLMModel(config, add_pooling_layer=self._needs_pooler())
        self.mlm_head = MaskedLMHead(config)
        self.post_init()

    @classmethod
    def _needs_pooler(cls) -> bool:
        return False

    def get_output_embeddings(self) -> nn.Module:
        return self.mlm_head.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.mlm_head.decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SpikeLMPreTrainingOutput:
        """Inputs as in SpikeLMModel; labels [B, L], -100 where a token does not count.

        num_items_in_batch: counted tokens of the whole step, to divide the loss by instead of this batch's own.
        """
        output = self.model(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits, loss_sum = self._predict_tokens(self.mlm_head, output.last_hidden_state, labels)
        return SpikeLMPreTrainingOutput(
            loss=_token_loss(loss_sum, labels, num_items_in_batch),
            logits=logits,
            hidden_states=output.hidden_states,
            masked_lm_loss_sum=loss_sum,
            spike_stats=output.spike_stats,
            firing_sum=output.firing_sum,
        )


class SpikeLMForPreTraining(SpikeLMForMaskedLM):
    """Masked tokens and next sentence, as BERT was pretrained; an objective counts only where labels are given."""

    accepts_loss_kwargs = False  # the Trainer counts one kind of targets only

    def __init__(self, config: SpikeLMConfig) -> None:
        super().__init__(config)
        self.next_sentence_head = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @classmethod
    def _needs_pooler(cls) -> bool:
        return True

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        **kwargs: Any,
    ) -> SpikeLMPreTrainingOutput:
        """Inputs as in SpikeLMModel; labels [B, L]; next_sentence_label [B]: 0 the second segment follows, 1 random."""
        output = self.model(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits, token_loss = self._predict_tokens(self.mlm_head, output.last_hidden_state, labels)
        sentence_logits = self.next_sentence_head(output.pooler_output)
        sentence_loss = None if next_sentence_label is None else _loss_sum(sentence_logits, next_sentence_label)
        return SpikeLMPreTrainingOutput(
            loss=_mean_loss([(token_loss, labels), (sentence_loss, next_sentence_label)]),
            logits=logits,
            hidden_states=output.hidden_states,
            next_sentence_logits=sentence_logits,
            masked_lm_loss_sum=token_loss,
            next_sentence_loss_sum=sentence_loss,
            spike_stats=output.spike_stats,
            firing_sum=output.firing_sum,
        )


class SpikeLMForCausalLM(SpikeLMPreTrainedModel, GenerationMixin):
    """The decoder with a linear head for the next token, tied to the word embeddings or not, as the config says.

    `generate` is transformers', on a SpikeCache of its own making.
    """

    accepts_loss_kwargs = True
    _needs_causal = True
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.word_embeddings.weight"}

    def __init__(self, config: SpikeLMConfig) -> None:
        super().__init__(config)
        self.model = SpikeLMModel(config)
        self.lm_head = TokenHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: SpikeCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> SpikeLMCausalLMOutput:
        """Inputs as in SpikeLMModel; labels [B, L]: the input_ids, with -100 where a token does not count as a target.

        Labels are shifted here: the first of a row never counts. That of a document packed behind another counts
        unless it is -100, as in transformers: what comes before it tells nothing about it.
        num_items_in_batch: counted tokens of the whole step, to divide the loss by instead of this batch's own.
        logits_to_keep: without labels, the last so many positions to give logits of (0: all), or their indices.
        Raises ValueError for labels together with past_key_values or logits_to_keep; with labels no cache is begun.
        """
        if labels is not None and (
            past_key_values is not None or not isinstance(logits_to_keep, int) or logits_to_keep
        ):
            raise ValueError("labels: the loss is that of whole rows; leave past_key_values and logits_to_keep out")
        output = self.model(
            input_ids,
            attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache and labels is None,
            **kwargs,
        )
        targets = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss_sum = self._predict_tokens(self.lm_head, output.last_hidden_state[:, kept], targets)
        return SpikeLMCausalLMOutput(
            loss=_token_loss(loss_sum, targets, num_items_in_batch),
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            causal_lm_loss_sum=loss_sum,
            causal_lm_count=None if targets is None else (targets != IGNORED_LABEL).sum(),
            spike_stats=output.spike_stats,
            firing_sum=output.firing_sum,
        )

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """What `generate` calls for its cache, where it is to use one and was given none: it gets one of ours."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation is {kind!r}: keys and values are packed as it is; leave it out")
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = SpikeCache(self.config)


class SpikeLMForSequenceClassification(SpikeLMPreTrainedModel):
    """The encoder with a linear head on the pooled [CLS], as BERT has it: classes, several labels, or regression."""

    _needs_causal = False

    def __init__(self, config: SpikeLMConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SpikeLMModel(config)
        own, shared = config.classifier_dropout, config.hidden_dropout_prob
        self.dropout = nn.Dropout(shared if own is None else own)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SpikeLMSequenceClassifierOutput:
        """Inputs as in SpikeLMModel; labels as config.problem_type wants them, which they decide where it is None.

        Regression (num_labels 1): [B] floats; one class: [B] integers; several labels: [B, num_labels] floats. In the
        sums over rows a class of -100, or NaN for a number, does not count.
        """
        output = self.model(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(output.pooler_output))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits.float(), config=self.config)
        return SpikeLMSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            spike_stats=output.spike_stats,
            firing_sum=output.firing_sum,
            **_row_loss_sum(logits, labels),
        )


def _token_loss(
    loss_sum: Tensor | None, targets: Tensor | None, num_items_in_batch: Tensor | int | None
) -> Tensor | None:
    """The mean over counted targets of the whole step, where their number is given, or of this batch."""
    if loss_sum is not None and num_items_in_batch is not None:
        return loss_sum / num_items_in_batch
    return _mean_loss([(loss_sum, targets)])


def _loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, summed in fp32 over the counted labels; 0 (with a gradient path) where none counts."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")


def _row_loss_sum(logits_BC: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """The loss of whole rows by its name in SpikeLMSequenceClassifierOutput; none for several labels a row."""
    if labels is None or labels.dim() > 1:
        return {}
    if logits_BC.shape[1] > 1:
        return {"classification_loss_sum": _loss_sum(logits_BC, labels)}
    errors_B = logits_BC[:, 0].float() - labels
    return {"regression_loss_sum": torch.where(labels.isnan(), 0.0, errors_B).square().sum()}


def _mean_loss(terms: list[tuple[Tensor | None, Tensor | None]]) -> Tensor | None:
    """The sum over objectives of each one's mean over its counted labels; None where no labels were given."""
    means = [
        loss_sum / (labels != IGNORED_LABEL).sum().clamp(min=1) for loss_sum, labels in terms if loss_sum is not None
    ]
    return torch.stack(means).sum() if means else None


AUTO_CLASSES: dict[str, type[SpikeLMPreTrainedModel]] = {
    "AutoModel": SpikeLMModel,
    "AutoModelForCausalLM": SpikeLMForCausalLM,
    "AutoModelForMaskedLM": SpikeLMForMaskedLM,
    "AutoModelForPreTraining": SpikeLMForPreTraining,
    "AutoModelForSequenceClassification": SpikeLMForSequenceClassification,
}
"""transformers' Auto classes and what each gives for a SpikeLMConfig."""

register_auto_classes(SpikeLMConfig, AUTO_CLASSES)

__all__ = [
    "SpikeBlock",
    "SpikeLMForCausalLM",
    "SpikeLMForMaskedLM",
    "SpikeLMForPreTraining",
    "SpikeLMForSequenceClassification",
    "SpikeLMModel",
    "SpikeLMPreTrainedModel",
]
