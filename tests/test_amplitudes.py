"""The amplitude table: calibration, tracking, persistence, equality over ranks, and the statistics behind it."""

import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_batch, make_model, rows_of, run_ranks
from torch.nn.functional import gelu, layer_norm, linear

from models.amplitudes import BlockNeurons, SpikeStats, calibrate_amplitudes, spiking_stack, update_amplitudes
from models.layers import SITES
from models.modeling import SpikeLMForPreTraining

FROZEN = {"amplitude": "frozen"}


def calibrated_model(neuron=None, batch=None, **overrides):
    model = make_model(neuron, **overrides)
    calibrate_amplitudes(model, batch or make_batch())
    return model


class BruteForce:
    """The forward written out once more in fp64, tokens that count picked one by one.

    alphas None: calibrate. Afterwards `alphas` and `sums` hold the table and the statistics, site after site.
    """

    def __init__(self, model, batch, alphas=None, count_padding=False):
        self.config = model.config.neuron
        self.given = alphas
        self.visible = batch["attention_mask"].bool()
        self.counted = torch.ones_like(self.visible) if count_padding else self.visible
        self.alphas, self.sums = [], []
        base = model.model.double()
        embedded = base.embeddings(batch["input_ids"], batch["token_type_ids"])
        x = [embedded] * self.config.num_timesteps
        for layer in base.stack.layers:
            x = self._layer(layer, x)

    def _layer(self, layer, x):
        heads = layer.attention.num_heads
        qkv = [linear(o, layer.attention.qkv.weight, layer.attention.qkv.bias) for o in self._fire(x)]
        q, k, v = zip(*(values.chunk(3, dim=-1) for values in qkv), strict=True)
        k, v = self._fire(k, memoryless=True), self._fire(v, memoryless=True)
        context = [self._attend(*values, heads) for values in zip(q, k, v, strict=True)]
        x = self._add(x, self._fire(context), layer.attention.output, layer.attention_norm)
        hidden = [gelu(linear(o, layer.mlp.up.weight, layer.mlp.up.bias)) for o in self._fire(x)]
        return self._add(x, self._fire(hidden), layer.mlp.down, layer.mlp_norm)

    def _add(self, x, outputs, dense, norm):
        sums = [x_t + linear(o, dense.weight, dense.bias) for x_t, o in zip(x, outputs, strict=True)]
        return [layer_norm(y, y.shape[-1:], norm.weight, norm.bias, norm.eps) for y in sums]

    def _attend(self, q, k, v, heads):
        q, k, v = (values.unflatten(-1, (heads, -1)).transpose(1, 2) for values in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~self.visible[:, None, None, :], -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def _fire(self, x, memoryless=False):
        site, carry, outputs, alphas, sums = len(self.alphas), 0.0, [], [], []
        for t, x_t in enumerate(x):
            m = x_t if memoryless else carry + x_t
            elements = m[self.counted]
            k = self.config.frequency_of(SITES[site % len(SITES)])
            alpha = k * elements.abs().mean() if self.given is None else self.given[site, t].double()
            s = (m / alpha).round().clamp(-1, 1)
            carry = m * 0.25 * (alpha - s * alpha if self.config.reset == "released" else 1 - s.abs())
            spikes = s[self.counted]
            counts = [elements.numel(), (spikes == 1).sum(), (spikes == -1).sum(), (elements.abs() > alpha).sum()]
            sums.append(torch.tensor([elements.abs().sum(), *counts], dtype=torch.float64))
            alphas.append(alpha)
            outputs.append(s * alpha)
        self.alphas.append(torch.stack(alphas))
        self.sums.append(torch.stack(sums))
        return outputs


@pytest.mark.parametrize("reset", ["released", "normalized"])
@pytest.mark.parametrize("count_padding", [False, True])
def test_calibration_in_the_order_of_the_flow_equals_brute_force(reset, count_padding):
    batch = make_batch()
    model = calibrated_model({"reset": reset, "count_padding": count_padding}, batch)
    with torch.no_grad():
        expected = torch.stack(BruteForce(model, batch, count_padding=count_padding).alphas)
    assert expected.shape == (2 * len(SITES), 4)
    torch.testing.assert_close(model.model.stack.amplitudes.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("reset", ["released", "normalized"])
@pytest.mark.parametrize("count_padding", [False, True])
def test_statistics_equal_brute_force_counts(reset, count_padding):
    batch, other = make_batch(), make_batch(seed=5)
    model = calibrated_model({"reset": reset, "count_padding": count_padding}, batch)
    with torch.no_grad():
        stats = SpikeStats(model(**other).spike_stats)
        brute = BruteForce(model, other, model.model.stack.amplitudes, count_padding)
    expected = torch.stack(brute.sums)
    assert torch.equal(stats.sums[..., 1:], expected[..., 1:])
    torch.testing.assert_close(stats.sums[..., 0], expected[..., 0], rtol=2e-6, atol=0)
    count = expected[..., 1]
    assert (count[0] == (30 if count_padding else 21) * model.config.hidden_size).all()
    assert torch.equal(stats.firing_rate, (expected[..., 2] + expected[..., 3]) / count)
    assert torch.equal(stats.saturated_share, expected[..., 4] / count)
    tokens = expected[0, 0, 1] / model.config.hidden_size
    assert stats.spikes_per_token(model.config.hidden_size) == pytest.approx(float(expected[..., 2:4].sum() / tokens))
    assert torch.equal(stats.mean_membrane, stats.sums[..., 0] / count)
    assert 0.2 < stats.firing_rate.mean() < 0.6 and 0 < stats.saturated_share.mean() < stats.firing_rate.mean()


def test_lif_statistics_count_its_spikes(monkeypatch):
    model, batch, fire, fired = make_model({"kind": "lif"}), make_batch(), BlockNeurons.fire, []

    def fire_and_remember(*args, **options):
        fired.append(fire(*args, **options))
        return fired[-1]

    monkeypatch.setattr(BlockNeurons, "fire", fire_and_remember)
    stats = SpikeStats(model(**batch).spike_stats)
    for site, spikes in enumerate(fired):
        assert spikes.shape[1:3] == (1, batch["attention_mask"].sum()), "padding fires"
        rate = spikes.double().mean((1, 2, 3))
        torch.testing.assert_close(stats.firing_rate[site], rate, rtol=1e-12, atol=0)
    assert stats.firing_rate[0].min() > 0 and stats.firing_rate.max() < 1
    assert stats.sums[..., 3:].sum() == 0, "a binary neuron neither spikes negatively nor saturates"


def test_calibration_is_without_dropout_and_restores_modes_and_generator():
    dropout = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    model = make_model(**dropout).train()
    model.model.stack.layers[1].eval()
    modes, generator = [module.training for module in model.modules()], torch.get_rng_state()
    calibrate_amplitudes(model, make_batch())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(model.model.stack.amplitudes, calibrated_model(**dropout).eval().model.stack.amplitudes)
    assert torch.equal(model.model.stack.amplitudes, calibrated_model().model.stack.amplitudes)


def test_calibration_may_be_repeated():
    model = calibrated_model()
    first = model.model.stack.amplitudes.clone()
    calibrate_amplitudes(model, make_batch(seed=7))
    assert not torch.equal(model.model.stack.amplitudes, first)
    calibrate_amplitudes(model, make_batch())
    assert torch.equal(model.model.stack.amplitudes, first)


@pytest.mark.parametrize("count_padding", [False, True])
def test_padding_counts_only_where_asked(count_padding):
    batch = make_batch()
    refilled = {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 17)}
    first, second = (calibrated_model({"count_padding": count_padding}, b) for b in (batch, refilled))
    equal = torch.allclose(first.model.stack.amplitudes, second.model.stack.amplitudes, rtol=1e-6, atol=0)
    assert equal == (not count_padding)


def test_calibration_without_counted_tokens_or_with_broken_weights_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="not padding"):
        calibrate_amplitudes(model, make_batch(row_lengths=(0, 0)))
    assert not model.model.stack.calibrated
    with torch.no_grad():
        model.model.stack.layers[1].mlp.up.bias[3] = math.inf
    with pytest.raises(ValueError, match="finite"):
        calibrate_amplitudes(model, make_batch())


def test_uncalibrated_use_raises(tmp_path):
    model = make_model()
    with pytest.raises(RuntimeError, match="calibrate_amplitudes"):
        model(**make_batch())
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="calibrate_amplitudes"):
        SpikeLMForPreTraining.from_pretrained(tmp_path)(**make_batch())


def test_calibration_survives_a_use_and_is_forgotten_on_reset():
    model = calibrated_model()
    model(**make_batch())
    model.model.stack.reset_amplitudes()
    with pytest.raises(RuntimeError, match="not calibrated"):
        model(**make_batch())


def test_an_amplitude_of_exactly_one_is_calibrated_after_a_load(tmp_path):
    model = calibrated_model()
    model.model.stack.amplitudes.fill_(1.0)
    model.save_pretrained(tmp_path)
    loaded = SpikeLMForPreTraining.from_pretrained(tmp_path)
    assert (loaded.model.stack.amplitudes == 1).all()
    assert torch.equal(loaded(**make_batch()).loss, model(**make_batch()).loss)


def test_the_table_is_saved_exactly(tmp_path):
    model = calibrated_model()
    table = model.model.stack.amplitudes
    model.save_pretrained(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["model.stack.amplitudes"], table)
    assert torch.equal(SpikeLMForPreTraining.from_pretrained(tmp_path).model.stack.amplitudes, table)
    other = make_model(seed=3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.model.stack.amplitudes, table)
    assert torch.equal(other(**make_batch()).loss, model(**make_batch()).loss)


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.double(),
        lambda model: model.to("cpu", torch.bfloat16).float(),
    ],
)
def test_casting_the_model_leaves_the_table_exact(cast):
    model = calibrated_model()
    table = model.model.stack.amplitudes.clone()
    weight_before = model.model.pooler.weight.dtype
    cast(model)
    assert model.model.stack.amplitudes.dtype == torch.float32
    assert torch.equal(model.model.stack.amplitudes, table)
    assert model.model.stack.calibrated.dtype == torch.bool
    assert weight_before == torch.float32


def test_loading_in_bf16_leaves_the_table_exact(tmp_path):
    model = calibrated_model()
    model.save_pretrained(tmp_path)
    loaded = SpikeLMForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.pooler.weight.dtype == torch.bfloat16
    assert loaded.model.stack.amplitudes.dtype == torch.float32
    assert torch.equal(loaded.model.stack.amplitudes, model.model.stack.amplitudes)
    assert loaded(**make_batch()).loss.isfinite()


def test_a_tracked_amplitude_follows_its_formula():
    model = calibrated_model({"amplitude": "tracked", "momentum": 0.9, "frequency": 3.0})
    before = model.model.stack.amplitudes.clone().double()
    stats = SpikeStats(model(**make_batch(seed=5)).spike_stats)
    total = update_amplitudes(model, stats)
    expected = before + (1 - 0.9) * (3.0 * stats.sums[..., 0] / stats.sums[..., 1] - before)
    assert torch.equal(model.model.stack.amplitudes, expected.float())
    assert not torch.equal(model.model.stack.amplitudes, before.float())
    assert torch.equal(total.sums, stats.sums)


def test_sites_have_frequencies_of_their_own():
    """As measured and as tracked; the others keep theirs."""
    common = {"frequency": 1.4, "amplitude": "tracked", "momentum": 0.9}
    own = {"site_frequencies": {"value": 0.7, "mlp_down": 2.8}}
    plain, model = calibrated_model(common), calibrated_model(common | own)
    factors = torch.tensor([0.7 if "value" in name else 2.8 if "down" in name else 1.4 for name in SITES])
    first = slice(0, 3)  # the sites whose inputs no other amplitude has changed yet
    expected = plain.model.stack.amplitudes[first] * factors[first, None] / 1.4
    torch.testing.assert_close(model.model.stack.amplitudes[first], expected, rtol=1e-6, atol=0)
    before = model.model.stack.amplitudes.double()
    stats = SpikeStats(model(**make_batch(seed=5)).spike_stats)
    update_amplitudes(model, stats)
    target = factors.repeat(2)[:, None] * stats.mean_membrane
    torch.testing.assert_close(
        model.model.stack.amplitudes, (before + 0.1 * (target - before)).float(), rtol=1e-6, atol=0
    )


def test_a_tracked_amplitude_is_independent_of_accumulation():
    batch = make_batch(row_lengths=(10, 7, 4, 9))
    whole, split = calibrated_model({"momentum": 0.5}), calibrated_model({"momentum": 0.5})
    update_amplitudes(whole, SpikeStats(whole(**batch).spike_stats))
    stats = SpikeStats.zeros(*split.model.stack.amplitudes.shape)
    for row in range(4):
        stats += SpikeStats(split(**rows_of(batch, slice(row, row + 1))).spike_stats)
    update_amplitudes(split, stats)
    torch.testing.assert_close(split.model.stack.amplitudes, whole.model.stack.amplitudes, rtol=1e-6, atol=0)
    assert not torch.allclose(whole.model.stack.amplitudes, calibrated_model().model.stack.amplitudes, rtol=1e-3)


@pytest.mark.parametrize("mode", ["none", "layer", "timestep"])
def test_amplitudes_may_be_updated_before_the_backward(mode):
    """What the backward computes again fires as the forward did."""
    found = []
    for is_early in (True, False):
        model = calibrated_model({"momentum": 0.0}).train()
        spiking_stack(model).set_checkpointing(mode, recompute_hidden=True)
        output = model(**make_batch(seed=7))
        if is_early:
            update_amplitudes(model, SpikeStats(output.spike_stats))
        output.loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for early, late in zip(*found, strict=True):
        assert torch.equal(early, late)


def test_statistics_and_amplitudes_are_untouched_by_checkpointing():
    """The recompute in the backward measures again; what it measures must be thrown away."""
    results = []
    for mode in ("none", "layer"):
        model = calibrated_model({"momentum": 0.5}, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
        spiking_stack(model).set_checkpointing(mode)
        torch.manual_seed(4)
        total = SpikeStats.zeros(*model.model.stack.amplitudes.shape)
        for seed in (5, 6):
            output = model(**make_batch(seed=seed))
            output.loss.backward()
            total += SpikeStats(output.spike_stats)
        update_amplitudes(model, total)
        results.append((total.sums, model.model.stack.amplitudes))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("neuron", [FROZEN, {"kind": "lif"}, {"kind": "none"}], ids=str)
def test_an_amplitude_that_is_not_tracked_never_moves(neuron):
    model = calibrated_model(neuron)
    before = model.model.stack.amplitudes.clone()
    stats = SpikeStats(model(**make_batch(seed=5)).spike_stats)
    assert torch.equal(update_amplitudes(model, stats).sums, stats.sums)
    assert torch.equal(model.model.stack.amplitudes, before)


def test_a_site_where_nothing_was_counted_keeps_its_amplitude():
    model = calibrated_model()
    before = model.model.stack.amplitudes.clone()
    update_amplitudes(model, SpikeStats.zeros(*before.shape))
    assert torch.equal(model.model.stack.amplitudes, before)


def test_a_model_without_table_is_refused():
    with pytest.raises(ValueError, match="Linear has no spiking stack"):
        calibrate_amplitudes(torch.nn.Linear(2, 2), {})


SHARES = {
    "fewer tokens on rank 1": (slice(0, 3), slice(3, 4)),
    "rank 1 has nothing": (slice(0, 4), slice(4, 4)),
    "rank 0 has nothing": (slice(0, 0), slice(0, 4)),
}


def _calibrate_and_track(rank):
    """What one rank of two does, for every way to share the rows: amplitudes after calibration and after an update."""
    batch, tables = make_batch(row_lengths=(10, 7, 4, 2)), {}
    for name, shares in SHARES.items():
        share = rows_of(batch, shares[rank])
        model = calibrated_model({"momentum": 0.5}, share)
        calibrated = model.model.stack.amplitudes.clone()
        model.model.stack.amplitudes.mul_(1.5)
        update_amplitudes(model, SpikeStats(model(**share).spike_stats))
        tables[name] = [calibrated, model.model.stack.amplitudes]
    return tables


def test_two_ranks_calibrate_and_track_as_one(tmp_path):
    ours, theirs = run_ranks(tmp_path, _calibrate_and_track, 2)
    batch = make_batch(row_lengths=(10, 7, 4, 2))
    model = calibrated_model({"momentum": 0.5}, batch)
    expected = [model.model.stack.amplitudes.clone()]
    model.model.stack.amplitudes.mul_(1.5)
    update_amplitudes(model, SpikeStats(model(**batch).spike_stats))
    expected.append(model.model.stack.amplitudes)
    for name in SHARES:
        for on_rank0, on_rank1, alone in zip(ours[name], theirs[name], expected, strict=True):
            assert torch.equal(on_rank0, on_rank1), name
            torch.testing.assert_close(on_rank0, alone, rtol=1e-6, atol=0, msg=lambda text, n=name: f"{n}: {text}")
