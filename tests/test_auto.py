"""transformers' conventions: Auto classes, the classification head, the arguments and the fields that it expects."""

import inspect

import pytest
import torch
import transformers
from tiny import CONFIG, make_batch, make_model
from transformers import AutoConfig, Trainer, TrainingArguments

from models.amplitudes import calibrate_amplitudes
from models.auto import auto_class_name, register_auto_classes
from models.config import SpikeLMConfig
from models.modeling import (
    AUTO_CLASSES,
    SpikeLMForCausalLM,
    SpikeLMForMaskedLM,
    SpikeLMForPreTraining,
    SpikeLMForSequenceClassification,
    SpikeLMModel,
)

COLUMNS = ("input_ids", "attention_mask", "token_type_ids")
CASES = [(*each, "llama" if each[1] is SpikeLMForCausalLM else "bert") for each in AUTO_CLASSES.items()]
each_auto_class = pytest.mark.parametrize(
    ("name", "model_class", "family"),
    [*CASES, ("AutoModel", SpikeLMModel, "llama")],
    ids=lambda value: value if isinstance(value, str) else "",
)


def inputs(family="bert"):
    """Decoders have no segments."""
    columns = COLUMNS if family == "bert" else COLUMNS[:2]
    return {name: tensor for name, tensor in make_batch().items() if name in columns}


def ready(model_class=SpikeLMForSequenceClassification, family="bert", **overrides):
    model = make_model(model_class=model_class, family=family, **overrides)
    calibrate_amplitudes(model, inputs(family))
    return model.eval()


@each_auto_class
def test_an_auto_class_makes_saves_and_opens_our_model(tmp_path, name, model_class, family):
    auto_class = getattr(transformers, name)
    model = auto_class.from_config(SpikeLMConfig(**CONFIG, family=family))
    assert type(model) is model_class and auto_class_name(model, AUTO_CLASSES) == name
    model = ready(model_class, family)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is SpikeLMConfig
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    ours, theirs = model(**inputs(family)).to_tuple(), loaded(**inputs(family)).to_tuple()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_registering_again_changes_nothing_and_a_copy_of_the_code_registers_nothing():
    register_auto_classes(SpikeLMConfig, AUTO_CLASSES)
    copy = type("SpikeLMConfig", (SpikeLMConfig,), {"__module__": "transformers_modules.folder.config"})
    register_auto_classes(copy, AUTO_CLASSES)
    assert type(AutoConfig.for_model("spikelm")) is SpikeLMConfig


@each_auto_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_dtype_is_kept_and_the_amplitudes_are_exact(tmp_path, name, model_class, family, dtype):
    model = ready(model_class, family)
    base = getattr(model, "model", model)
    exact = base.stack.amplitudes.clone()
    assert not torch.equal(exact, exact.to(torch.bfloat16).float())
    model.to(dtype).save_pretrained(tmp_path)
    loaded = getattr(transformers, name).from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    for one in (loaded, getattr(transformers, name).from_pretrained(tmp_path, dtype=torch.bfloat16)):
        stack = getattr(one, "model", one).stack
        assert stack.amplitudes.dtype == torch.float32 and torch.equal(stack.amplitudes, exact)
        assert stack.calibrated


CLASSES, REGRESSION = torch.tensor([2, 0, 1]), torch.tensor([0.5, -1.0, 2.0])
SEVERAL = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "labels", "expected"),
    [
        (3, None, CLASSES, lambda logits: torch.nn.functional.cross_entropy(logits, CLASSES)),
        (3, "single_label_classification", CLASSES, lambda z: torch.nn.functional.cross_entropy(z, CLASSES)),
        (1, None, REGRESSION, lambda logits: (logits[:, 0] - REGRESSION).square().mean()),
        (3, "regression", SEVERAL, lambda logits: (logits - SEVERAL).square().mean()),
        (3, None, SEVERAL, lambda z: torch.nn.functional.binary_cross_entropy_with_logits(z, SEVERAL)),
    ],
    ids=["classes", "classes named", "regression", "several values", "several labels"],
)
def test_the_loss_is_that_of_the_problem(num_labels, problem_type, labels, expected):
    model = ready(num_labels=num_labels, problem_type=problem_type)
    output = model(**inputs(), labels=labels)
    pooled = model.model(**inputs()).pooler_output
    assert torch.equal(output.logits, model.classifier(pooled)) and output.logits.shape == (3, num_labels)
    torch.testing.assert_close(output.loss, expected(output.logits))
    assert model(**inputs()).loss is None
    output.loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(("own", "rate"), [(None, 0.0), (0.5, 0.5), (0.0, 0.0)])
def test_the_head_has_a_dropout_of_its_own(own, rate):
    assert make_model(model_class=SpikeLMForSequenceClassification, classifier_dropout=own).dropout.p == rate


def test_a_pretrained_encoder_gets_a_new_head_of_the_width_asked_for(tmp_path):
    pretrained = ready(SpikeLMForPreTraining)
    pretrained.save_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert model(**inputs()).logits.shape == (3, 5)
    expected = pretrained.model(**inputs()).pooler_output
    assert torch.equal(model.model(**inputs()).pooler_output, expected)


@each_auto_class
def test_an_argument_that_no_model_knows_is_an_error(name, model_class, family):
    batch = inputs(family)
    with pytest.raises(TypeError, match="unexpected keyword argument 'attention_masks'"):
        ready(model_class, family)(batch["input_ids"], attention_masks=batch["attention_mask"])


@each_auto_class
def test_hidden_states_are_means_over_time_of_each_layer(name, model_class, family):
    model, batch = ready(model_class, family), inputs(family)
    states = model(**batch, output_hidden_states=True).hidden_states
    base = getattr(model, "model", model)
    assert len(states) == CONFIG["num_hidden_layers"] + 1
    assert torch.equal(states[0], base.embeddings(batch["input_ids"], batch.get("token_type_ids")))
    assert torch.equal(states[-1], base(**batch).last_hidden_state)
    assert not torch.equal(states[1], states[2]) and states[1].shape == states[0].shape
    assert model(**batch).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == 3
    assert model(**batch, output_hidden_states=False).hidden_states is None


@each_auto_class
def test_attention_weights_are_refused(name, model_class, family):
    with pytest.raises(ValueError, match="output_attentions is True: SpikeLM never forms attention weights"):
        ready(model_class, family)(**inputs(family), output_attentions=True)
    ready(model_class, family)(**inputs(family), output_attentions=False)


@each_auto_class
def test_fields_and_columns_are_those_of_transformers(name, model_class, family):
    output = ready(model_class, family)(**inputs(family))
    pooled = ["pooler_output"] if family == "bert" else []
    standard = {"AutoModel": ["last_hidden_state", *pooled]}.get(name, ["logits"])
    assert list(output)[: len(standard)] == standard
    # transformers' Trainer drops the columns of a data set that the signature does not name.
    named = list(inspect.signature(model_class.forward).parameters)
    columns = ["input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"]
    if model_class is SpikeLMForCausalLM:
        columns.remove("token_type_ids")
    assert named[1 : len(columns) + 1] == columns
    assert ready(model_class, family)(*inputs(family).values())[0].equal(output[0])


def test_a_masked_lm_loss_can_be_divided_by_the_count_of_the_whole_step():
    model, batch = ready(SpikeLMForMaskedLM), make_batch()
    del batch["next_sentence_label"]
    output = model(**batch, num_items_in_batch=torch.tensor(40))
    torch.testing.assert_close(output.loss, output.masked_lm_loss_sum / 40)
    for model_class in (SpikeLMModel, SpikeLMForPreTraining, SpikeLMForSequenceClassification):
        assert not model_class.accepts_loss_kwargs  # the Trainer does not pass it
        with pytest.raises(TypeError, match="num_items_in_batch"):
            ready(model_class)(**inputs(), num_items_in_batch=40)


@pytest.mark.parametrize(
    "model_class", [SpikeLMForMaskedLM, SpikeLMForPreTraining, SpikeLMForSequenceClassification, SpikeLMForCausalLM]
)
def test_transformers_trainer_sees_the_mean_over_the_whole_step(tmp_path, model_class):
    batch, family = make_batch(), "bert"
    if model_class is not SpikeLMForPreTraining:
        del batch["next_sentence_label"]
    if model_class is SpikeLMForSequenceClassification:
        batch["labels"] = torch.tensor([0, 1, 1])
    elif model_class is SpikeLMForCausalLM:
        family = "llama"
        del batch["token_type_ids"]
        batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)  # 9 and 6 count
    else:
        batch["labels"][:] = torch.where(torch.arange(10) < 3, batch["input_ids"], -100)  # as many in every row
    rows = [{name: tensor[row] for name, tensor in batch.items()} for row in (0, 1)]
    model = ready(model_class, family)
    expected = model(**{name: tensor[:2] for name, tensor in batch.items()}).loss.item()
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    assert Trainer(model, arguments, train_dataset=rows).train().training_loss == pytest.approx(expected, rel=1e-5)
