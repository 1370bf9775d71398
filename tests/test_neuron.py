"""The neurons as pure functions: equations, gradients, chunks of time, dtypes, and what must stay visible."""

import math

import pytest
import torch

from models.neuron import AMPLITUDE_FLOOR, run_lif, run_memoryless, run_neuron

LEAK = 0.3  # no power of two, so that rounding shows the order of the products
ALPHA = torch.tensor([1.3, 0.8, 2.1, 0.05])
RESETS = ("released", "normalized")


def elastic(reset):
    """The neuron with ALPHA, as a function of the input alone; `start` is the first of its timesteps."""

    def run(x, start=0, carry=None):
        return run_neuron(x, ALPHA[start : start + len(x)], leak=LEAK, reset=reset, carry=carry)

    return run


def lif(x, start=0, carry=None):
    return run_lif(x, carry=carry)


def memoryless_elastic(x):
    return run_memoryless(x, ALPHA[: len(x)]), None


def memoryless_lif(x):
    return run_lif(x, memoryless=True)


WITH_MEMBRANE = {"released": elastic("released"), "normalized": elastic("normalized"), "lif": lif}
ALL_NEURONS = {**WITH_MEMBRANE, "memoryless": memoryless_elastic, "memoryless lif": memoryless_lif}


def random_input(T=4, shape=(2, 3, 5), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, *shape, generator=generator, dtype=torch.float64).to(dtype)


def output_and_gradient(neuron, x, g):
    x = x.clone().requires_grad_()
    o = neuron(x)[0]
    o.backward(g)
    return o.detach(), x.grad


def central_differences(function, x, h=1e-6):
    gradient = torch.zeros_like(x)
    for index in range(x.numel()):
        shift = torch.zeros_like(x)
        shift.view(-1)[index] = h
        gradient.view(-1)[index] = (function(x + shift) - function(x - shift)) / (2 * h)
    return gradient


def transcribed(x, g, reset):
    """The closed form of forward and backward: output, gradient of x, membranes, reset factors."""
    alpha, carry = ALPHA.to(x.dtype), 0.0
    outputs, membranes, factors, gradients = [], [], [], []
    for t in range(len(x)):
        m = carry + x[t]
        s = (m / alpha[t]).round().clamp(-1, 1)
        factors.append(alpha[t] - s * alpha[t] if reset == "released" else 1 - s.abs())
        carry = (m * LEAK) * factors[t]
        outputs.append(s * alpha[t])
        membranes.append(m)
    d = torch.zeros_like(x[0])
    for t in reversed(range(len(x))):
        passes = (membranes[t] / alpha[t] >= -1) & (membranes[t] / alpha[t] <= 1)
        d = passes * g[t] + (d * factors[t]) * LEAK
        gradients.insert(0, d)
    return torch.stack(outputs), torch.stack(gradients), torch.stack(membranes), factors


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("T", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elastic_neuron_equals_the_closed_form(reset, T, dtype):
    x, g = random_input(T, dtype=dtype), random_input(T, seed=1, dtype=dtype)
    o, gradient = output_and_gradient(elastic(reset), x, g)
    expected_o, expected_gradient, *_ = transcribed(x, g, reset)
    assert torch.equal(o, expected_o)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("reset", RESETS)
def test_elastic_gradient_equals_finite_differences_of_the_straight_through_function(reset):
    """The smooth function is o = clip(m, -a, a), with the reset factors held where the spikes put them."""
    x, g = (random_input(shape=(1, 2, 3), seed=seed, dtype=torch.float64) for seed in (0, 1))
    _, _, membranes, factors = transcribed(x, g, reset)
    alpha = ALPHA.double()
    assert ((membranes.abs() - alpha.view(-1, 1, 1, 1)).abs() > 1e-4).all(), "the input lies on a corner: reseed"

    def smooth_loss(x):
        carry, loss = 0.0, 0.0
        for t in range(len(x)):
            m = carry + x[t]
            loss += (g[t] * m.clamp(-alpha[t], alpha[t])).sum()
            carry = m * LEAK * factors[t]
        return loss

    _, gradient = output_and_gradient(elastic(reset), x, g)
    torch.testing.assert_close(gradient, central_differences(smooth_loss, x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("a", [1.0, 0.7316, 3.3, 1e-5])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("form", ["membrane", "memoryless"])
def test_ties_and_their_neighbours(a, sign, form):
    """Half an amplitude is silent (it rounds to even), its neighbour spikes; the gradient passes up to |m| = a."""
    alpha = torch.tensor([a])
    points = alpha * torch.tensor([0.5, 1.0, 1.5, 2.0])
    below, above = torch.nextafter(points, torch.zeros(4)), torch.nextafter(points, torch.full((4,), math.inf))
    x = sign * torch.stack([below, points, above]).view(1, 1, 3, 4)
    run = {"membrane": lambda v: run_neuron(v, alpha), "memoryless": lambda v: (run_memoryless(v, alpha),)}[form]
    o, gradient = output_and_gradient(run, x, torch.ones_like(x))
    assert (o[0, 0] / alpha * sign).int().tolist() == [[0, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]
    assert gradient[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]


def test_the_floor_holds_for_the_spike_and_not_for_the_carry():
    x, alpha = torch.full((2, 1, 1, 1), 0.6e-5), torch.tensor([1e-6, 1e-6])
    floor, membranes = torch.tensor(AMPLITUDE_FLOOR), []
    o, _ = run_neuron(x, alpha, leak=LEAK, observe=lambda t, m: membranes.append(m))
    assert o[0].item() == floor.item()
    assert torch.equal(membranes[1], (x[0] * LEAK) * (alpha[0] - floor) + x[1])
    assert run_memoryless(x, alpha)[0].item() == floor.item()


@pytest.mark.parametrize("name", WITH_MEMBRANE)
@pytest.mark.parametrize("sizes", [(1, 3), (2, 2), (3, 1), (1, 1, 1, 1)], ids=str)
def test_time_in_chunks_equals_one_pass(name, sizes):
    neuron, x, g = WITH_MEMBRANE[name], random_input(), random_input(seed=1)

    def in_chunks(x):
        outputs, carry, start = [], None, 0
        for chunk in x.split(sizes):
            o, carry = neuron(chunk, start, carry)
            outputs.append(o)
            start += len(chunk)
        return torch.cat(outputs), carry

    whole, chunked = output_and_gradient(neuron, x, g), output_and_gradient(in_chunks, x, g)
    assert torch.equal(chunked[0], whole[0])
    assert torch.equal(chunked[1], whole[1])
    forgetful = torch.cat([neuron(x[t : t + 1], t)[0] for t in range(4)])
    assert not torch.equal(forgetful, whole[0])


@pytest.mark.parametrize("name", ALL_NEURONS)
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(name, fault):
    x = random_input()
    x[1, 0, 0, 0] = fault
    o, _ = ALL_NEURONS[name](x)
    visible = o.isnan()
    assert visible[1, 0, 0, 0]
    if name in WITH_MEMBRANE:
        assert visible[1:, 0, 0, 0].all(), "later timesteps have the membrane of this one"
    assert visible.sum() == visible[1:, 0, 0, 0].sum(), "no other element is touched"


@pytest.mark.parametrize("reset", RESETS)
def test_an_amplitude_that_is_not_a_number_stays_visible(reset):
    x, alpha = random_input(T=2), torch.tensor([math.nan, 1.0])
    assert run_neuron(x, alpha, reset=reset)[0][0].isnan().all()
    assert run_memoryless(x, alpha)[0].isnan().all()


def test_normalized_reset_is_free_of_scale_and_released_is_not():
    x, g = random_input(), random_input(seed=1)
    for exponent in (-8, 3, 10):
        scale = 2.0**exponent
        o, gradient = output_and_gradient(lambda v: run_neuron(v, ALPHA, reset="normalized"), x, g)
        scaled = output_and_gradient(lambda v, s=scale: run_neuron(v, ALPHA * s, reset="normalized"), x * scale, g)
        assert torch.equal(scaled[0], o * scale)
        assert torch.equal(scaled[1], gradient)
    o, scaled = run_neuron(x, ALPHA)[0], run_neuron(x * 8, ALPHA * 8)[0]
    assert not torch.equal(scaled, o * 8)


def calibrated_on_repeated_gaussian(T, reset):
    """alpha_t = 2 * mean|m_t| of N(0, 1) repeated over t, and the firing rate at each t."""
    x, alpha = random_input(1, shape=(8, 32, 64)).expand(T, -1, -1, -1), torch.full((T,), math.nan)

    def measure(t, m):
        alpha[t] = 2 * m.abs().mean()

    o, _ = run_neuron(x, alpha, reset=reset, observe=measure)
    return alpha, (o != 0).float().mean(dim=(1, 2, 3))


def test_normalized_reset_is_usable_at_16_timesteps():
    alpha, firing_rate = calibrated_on_repeated_gaussian(16, "normalized")
    assert alpha.min() > 1.5 and alpha.max() < 2.5
    assert firing_rate.min() > 0.35 and firing_rate.max() < 0.5


def test_released_amplitudes_explode_with_time():
    """A known property of the released equations (their carry is multiplied by alpha), which parity needs."""
    alpha, _ = calibrated_on_repeated_gaussian(12, "released")
    torch.testing.assert_close(alpha[:6], torch.tensor([1.6, 2.3, 3.2, 5.4, 13.6, 82.0]), rtol=0.15, atol=0)
    assert alpha[7] > 1e6 and not alpha[-1].isfinite()


def test_only_the_released_reset_ignores_a_negative_spike():
    """Released: nothing is left after +1, but 2 * leak * alpha of the membrane after -1."""
    x, alpha = torch.tensor([1.0, -1.0, 0.25]).view(1, 1, 1, 3), torch.tensor([1.0])
    left = {reset: run_neuron(x, alpha, leak=0.25, reset=reset)[1].flatten().tolist() for reset in RESETS}
    assert left["released"] == [0.0, -0.5, 0.0625]
    assert left["normalized"] == [0.0, 0.0, 0.0625]


@pytest.mark.parametrize("name", ALL_NEURONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_fp32_and_rounded_once(name, dtype):
    x, g, seen = random_input(shape=(4, 8, 16), dtype=dtype), random_input(shape=(4, 8, 16), seed=1, dtype=dtype), []
    narrow = output_and_gradient(ALL_NEURONS[name], x, g)
    exact = output_and_gradient(ALL_NEURONS[name], x.float(), g.float())
    for ours, fp32 in zip(narrow, exact, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, fp32.to(dtype))
    _, carry = ALL_NEURONS[name](x)
    assert carry is None or carry.dtype == torch.float32
    run_neuron(x, ALPHA, observe=lambda t, m: seen.append(m.dtype))
    run_memoryless(x, ALPHA, observe=lambda t, m: seen.append(m.dtype))
    run_lif(x, observe=lambda t, m: seen.append(m.dtype))
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("name", ALL_NEURONS)
def test_float64_stays_float64(name):
    """Just above the threshold in float64 and on it in fp32."""
    half = 1.0 if "lif" in name else 0.5 * ALPHA[:1].double().item()
    x = torch.tensor([half * (1 - 1e-12), half * (1 + 1e-12)], dtype=torch.float64).view(1, 1, 1, 2)
    o, _ = ALL_NEURONS[name](x)
    assert o.dtype == torch.float64
    assert (o != 0).flatten().tolist() == [False, True]


def test_amplitudes_get_no_gradient():
    x, alpha = random_input().requires_grad_(), ALPHA.clone().requires_grad_()
    (run_neuron(x, alpha)[0].sum() + run_memoryless(x, alpha).sum()).backward()
    assert alpha.grad is None


def test_memoryless_equals_a_neuron_that_starts_anew_at_every_timestep():
    x, g = random_input(), random_input(seed=1)
    o, gradient = output_and_gradient(memoryless_elastic, x, g)
    for t in range(4):
        alone = output_and_gradient(lambda v, t=t: run_neuron(v, ALPHA[t : t + 1]), x[t : t + 1], g[t : t + 1])
        assert torch.equal(o[t : t + 1], alone[0])
        assert torch.equal(gradient[t : t + 1], alone[1])


def test_lif_equals_its_equations():
    x, g = random_input() + 0.5, random_input(seed=1)
    v, spikes, membranes = torch.zeros_like(x[0]), [], []
    for x_t in x:
        m = 0.5 * v + x_t
        s = (m >= 1).float()
        v = m * (1 - s)
        spikes.append(s)
        membranes.append(m)
    d, gradients = torch.zeros_like(x[0]), []
    for m, s, g_t in zip(reversed(membranes), reversed(spikes), reversed(g), strict=True):
        d = g_t / (1 + (math.pi * (m - 1)) ** 2) + 0.5 * d * (1 - s)
        gradients.insert(0, d)
    o, gradient = output_and_gradient(lif, x, g)
    assert 0.1 < o.mean() < 0.9
    assert torch.equal(o, torch.stack(spikes))
    torch.testing.assert_close(gradient, torch.stack(gradients), rtol=1e-6, atol=1e-7)


def test_lif_fires_at_its_threshold():
    x = torch.tensor([1.0, 1.0 - 2**-24]).view(1, 1, 1, 2)
    assert run_lif(x)[0].flatten().tolist() == [1.0, 0.0]


def test_lif_gradient_equals_finite_differences_of_the_arctangent():
    """The smooth function is s = atan(pi * (m - 1)) / pi + 1/2, with the resets held where the spikes put them."""
    x, g = (random_input(shape=(1, 2, 3), seed=seed, dtype=torch.float64) + 0.5 for seed in (0, 1))
    spikes, _ = run_lif(x)

    def smooth_loss(x):
        carry, loss = 0.0, 0.0
        for t in range(len(x)):
            m = carry + x[t]
            loss += (g[t] * (torch.atan(math.pi * (m - 1)) / math.pi + 0.5)).sum()
            carry = 0.5 * m * (1 - spikes[t])
        return loss

    _, gradient = output_and_gradient(lif, x, g)
    torch.testing.assert_close(gradient, central_differences(smooth_loss, x), rtol=1e-7, atol=1e-9)


def test_memoryless_lif_sees_each_timestep_alone():
    x = random_input() + 0.5
    s, carry = memoryless_lif(x)
    assert carry is None
    assert torch.equal(s, (x >= 1).float())
    assert not torch.equal(s, lif(x)[0])
