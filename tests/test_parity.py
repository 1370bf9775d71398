"""Our layers against the released SpikeLM (golden arrays) and against transformers' BERT."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import project_by_fire
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForPreTraining

from models.amplitudes import BlockNeurons, calibrate_amplitudes
from models.config import NeuronConfig, SpikeLMConfig
from models.layers import SITES
from models.modeling import SpikeLMForPreTraining, SpikeLMModel
from models.neuron import run_neuron
from models.positions import BatchLayout
from models.warm_start import bert_names, load_bert

GOLDEN = Path(__file__).parent / "golden"
RELEASED = {"preset": "released"}
NEURON = np.load(GOLDEN / "neuron.npz")


@pytest.mark.parametrize("case", [str(name) for name in NEURON["cases"]])
def test_neuron_is_bit_exact(case):
    x = torch.tensor(NEURON[f"{case}/x"], requires_grad=True)
    alpha = torch.tensor(NEURON[f"{case}/alpha"])
    membranes = []
    o, _ = run_neuron(x, alpha, observe=lambda t, m: membranes.append(m))
    o.backward(torch.tensor(NEURON[f"{case}/g"]))
    spikes = (o.detach() / alpha.clamp(min=1e-5).view(-1, 1, 1, 1)).round().to(torch.int8)
    assert torch.equal(torch.stack(membranes), torch.tensor(NEURON[f"{case}/mem"]))
    assert torch.equal(o.detach(), torch.tensor(NEURON[f"{case}/out"]))
    assert torch.equal(spikes, torch.tensor(NEURON[f"{case}/spike"]))
    assert torch.equal(x.grad, torch.tensor(NEURON[f"{case}/gx"]))
    if NEURON[f"{case}/calibrated"]:
        measured = torch.stack([2 * m.abs().double().mean() for m in membranes])
        torch.testing.assert_close(measured.float(), alpha, rtol=1e-6, atol=0)


def _arrays(archive, group):
    return {
        name[len(group) + 1 :]: torch.tensor(archive[name]) for name in archive.files if name.startswith(group + "/")
    }


def _relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(params=["layer.npz", "layer_T1.npz"])
def golden_layer(request):
    archive = np.load(GOLDEN / request.param)
    T, _, L, D, H, F = (int(n) for n in archive["meta/dims"])
    config = SpikeLMConfig(
        vocab_size=8,
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=H,
        intermediate_size=F,
        max_position_embeddings=L,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        neuron=NeuronConfig(**RELEASED, num_timesteps=T),
    )
    model = SpikeLMModel(config).eval()
    tensors = {f"bert.encoder.layer.0.{name}": value for name, value in _arrays(archive, "param").items()}
    report = load_bert(model.stack, tensors)
    assert not report.missing and not report.unused and not report.remarks
    return archive, model


def _run_layer(archive, model, calibrate):
    amplitudes = torch.full_like(model.stack.amplitudes, float("nan")) if calibrate else model.stack.amplitudes.clone()
    x = torch.tensor(archive["x"], requires_grad=True)
    mask = torch.tensor(archive["attention_mask"]).bool()[:, None, None, :].repeat(len(x), 1, 1, 1)
    y, _ = model.stack.layers[0](x, amplitudes, BatchLayout(mask), calibrate=calibrate)
    return x, y, amplitudes


def test_layer_equals_the_released_one(golden_layer):
    archive, model = golden_layer
    x, y, _ = _run_layer(archive, model, calibrate=False)
    y.backward(torch.tensor(archive["grad_out"]))
    torch.testing.assert_close(y.detach(), torch.tensor(archive["y"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.grad, torch.tensor(archive["grad_x"]), atol=2e-5, rtol=0)
    theirs = {f"bert.encoder.layer.0.{name}": grad for name, grad in _arrays(archive, "grad").items()}
    for name, (ours, golden) in _paired_gradients(model.stack.layers[0], "model.stack.layers.0.", theirs).items():
        assert _relative(ours, golden) < 1e-5, name


def test_layer_spikes_equal_the_released_ones(golden_layer, monkeypatch):
    archive, model = golden_layer
    fire, seen = BlockNeurons.fire, {}

    def fire_and_remember(neurons, site, x, **options):
        seen[SITES[site]] = fire(neurons, site, x, **options)
        return seen[SITES[site]]

    monkeypatch.setattr(BlockNeurons, "project", project_by_fire)
    monkeypatch.setattr(BlockNeurons, "fire", fire_and_remember)
    with torch.no_grad():
        _run_layer(archive, model, calibrate=False)
    assert tuple(seen) == SITES
    for site, name in zip(SITES, ("qkv", "K", "V", "attn_out", "intermediate", "output"), strict=True):
        assert torch.equal(seen[site].sign().to(torch.int8), torch.tensor(archive[f"spike/{name}"])), site


def test_layer_calibrates_to_the_released_amplitudes(golden_layer):
    archive, model = golden_layer
    with torch.no_grad():
        _, _, amplitudes = _run_layer(archive, model, calibrate=True)
    assert amplitudes.shape == (len(SITES), int(archive["meta/dims"][0]))
    torch.testing.assert_close(amplitudes, model.stack.amplitudes, rtol=2e-6, atol=0)


def _paired_gradients(module, prefix, theirs):
    """Our gradients beside the golden ones, matched by what load_bert would have copied into each parameter."""
    pairs = {}
    for name, parameter in module.named_parameters():
        sources = [theirs[source] for source in bert_names(prefix + name)]
        pairs[name] = (parameter.grad, torch.cat(sources))
    return pairs


@pytest.fixture(scope="module")
def golden_model():
    archive = np.load(GOLDEN / "model.npz")
    T, _, L, D, H, F, layers, V = (int(n) for n in archive["meta/dims"])
    config = SpikeLMConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=layers,
        num_attention_heads=H,
        intermediate_size=F,
        max_position_embeddings=L + 8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        mlm_head_act="relu",
        neuron=NeuronConfig(**RELEASED, num_timesteps=T),
    )
    model = SpikeLMForPreTraining(config)
    report = load_bert(model, _arrays(archive, "param"))
    assert not report.missing and not report.unused
    assert "not calibrated" in report.remarks[0] and not model.model.stack.calibrated
    return archive, model


def _batch(archive, index):
    names = ("input_ids", "attention_mask", "token_type_ids", "labels", "next_sentence_label")
    return {name: torch.tensor(archive[name][index]) for name in names}


def test_model_trains_like_the_released_one(golden_model):
    archive, model = golden_model
    learning_rate, weight_decay = (float(value) for value in archive["meta/lr_wd"])
    calibrate_amplitudes(model, _batch(archive, 0))
    golden = _arrays(archive, "alpha_after_step0")
    for row, name in ((0, "query.act_clip_val"), (1, "clip_key"), (2, "clip_value")):
        expected = torch.stack([golden[f"bert.encoder.layer.0.attention.self.{name}.{t}"] for t in range(4)])
        torch.testing.assert_close(model.model.stack.amplitudes[row], expected, rtol=2e-6, atol=0)

    with torch.no_grad():
        inputs = {k: v for k, v in _batch(archive, 0).items() if "label" not in k}
        output = model(**inputs)
        hidden = model.model(**inputs).last_hidden_state
    torch.testing.assert_close(output.logits, torch.tensor(archive["logits_step0"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        output.next_sentence_logits, torch.tensor(archive["nsp_logits_step0"]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(hidden, torch.tensor(archive["last_hidden_mean_step0"]), atol=1e-5, rtol=0)

    optimizer = torch.optim.AdamW(_decay_groups(model, weight_decay), lr=learning_rate)
    losses = []
    for step in range(3):
        loss = model(**_batch(archive, step)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            _check_gradients(model, _arrays(archive, "grad"))
        optimizer.step()
    losses.append(model(**_batch(archive, 0)).loss.item())
    assert losses[0] == pytest.approx(float(archive["losses"][0]), abs=1e-5)
    assert losses[1:] == pytest.approx(archive["losses"][1:].tolist(), abs=1e-3)


def _decay_groups(model, weight_decay):
    decays = {n: p for n, p in model.named_parameters() if "bias" not in n and "norm" not in n}
    others = [p for n, p in model.named_parameters() if n not in decays]
    return [{"params": list(decays.values()), "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _check_gradients(model, theirs):
    # A tie: their word embeddings' gradient holds both uses, as does ours.
    for name, (ours, golden) in _paired_gradients(model, "", theirs).items():
        assert _relative(ours, golden) < 1e-5, name


def test_kind_none_equals_bert():
    torch.manual_seed(0)
    shape = {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    bert = BertForPreTraining(BertConfig(**shape, initializer_range=0.2))
    ours = SpikeLMForPreTraining(SpikeLMConfig(**shape, neuron=NeuronConfig(kind="none")))
    report = load_bert(ours, bert.state_dict())
    assert not report.missing and not report.unused
    input_ids = torch.randint(1, 97, (4, 24))
    attention_mask = (torch.arange(24) < torch.tensor([24, 20, 9, 24])[:, None]).long()
    token_type_ids = (torch.arange(24) >= 7).long().expand(4, 24)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
    labels = torch.where((torch.rand(4, 24) < 0.3) & (attention_mask == 1), input_ids, -100)
    next_sentence_label = torch.tensor([0, 1, 1, 0])

    theirs = bert(**inputs)
    full = ours(**inputs)
    visible = attention_mask.bool()
    torch.testing.assert_close(full.logits[visible], theirs.prediction_logits[visible], atol=1e-5, rtol=0)
    torch.testing.assert_close(full.next_sentence_logits, theirs.seq_relationship_logits, atol=1e-5, rtol=0)

    their_loss = cross_entropy(theirs.prediction_logits.flatten(0, 1), labels.flatten()) + cross_entropy(
        theirs.seq_relationship_logits, next_sentence_label
    )
    their_loss.backward()
    loss = ours(**inputs, labels=labels, next_sentence_label=next_sentence_label).loss
    loss.backward()
    assert loss.item() == pytest.approx(their_loss.item(), abs=1e-5)
    gradients = {name: parameter.grad for name, parameter in bert.named_parameters()}
    for name, (our_gradient, golden) in _paired_gradients(ours, "", gradients).items():
        torch.testing.assert_close(our_gradient, golden, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
