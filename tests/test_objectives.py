import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import SpikeLMConfig
from models.modeling import SpikeLMForCausalLM
from pipeline.config import ObjectiveSettings
from pipeline.objectives import IGNORED, SpecialTokens, causal_batch, count_targets, pretraining_batch, without_targets

PAD, UNK, CLS, SEP, MASK = range(5)
LOSSES = ("masked_lm", "next_sentence")
DECODER = {"family": "llama", "vocab_size": 5, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENS = SpecialTokens(mask=MASK, special=(PAD, UNK, CLS, SEP, MASK), vocab_size=1000)


def make_batch(rows, ids, epochs=None, seed=0, tokens=TOKENS, **settings):
    epochs = np.zeros_like(ids) if epochs is None else epochs
    return pretraining_batch(rows, ids, epochs, seed=seed, settings=ObjectiveSettings(**settings), tokens=tokens)


@st.composite
def any_rows(draw):
    """Rows of any lengths, special tokens standing anywhere in them, their sample ids and epochs, and the tokens."""
    tokens = SpecialTokens(mask=MASK, special=TOKENS.special, vocab_size=draw(st.integers(5, 40)))
    num_rows, row_length = draw(st.integers(1, 6)), draw(st.integers(3, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    length = rng.integers(2, row_length + 1, num_rows)
    ids = rng.integers(0, tokens.vocab_size, (num_rows, row_length))
    rows = {
        "ids": np.where(np.arange(row_length) < length[:, None], ids, PAD).astype(np.uint16),
        "length": length.astype(np.uint16),
        "first_length": rng.integers(1, length).astype(np.uint16),
        "next_sentence_label": rng.integers(0, 2, num_rows).astype(np.uint8),
    }
    return rows, rng.integers(0, 2**53, num_rows), rng.integers(0, 2**40, num_rows), tokens


probabilities = st.floats(0, 1, exclude_min=True)
seeds = st.integers(0, 2**63)


@settings(max_examples=200)
@given(rows=any_rows(), probability=probabilities, seed=seeds, static=st.booleans())
def test_only_ordinary_tokens_are_masked_and_nothing_else_changes(rows, probability, seed, static):
    rows, ids, epochs, tokens = rows
    batch = make_batch(rows, ids, epochs, seed, tokens, mask_probability=probability, static_masking=static)
    inputs, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
    is_token = np.arange(inputs.shape[1]) < rows["length"][:, None]
    ordinary = is_token & (rows["ids"] > MASK)
    masked = labels != IGNORED
    assert not (masked & ~ordinary).any()
    counts = [n and max(1, round(probability * n)) for n in ordinary.sum(1).tolist()]
    assert masked.sum(1).tolist() == counts
    assert (labels[masked] == rows["ids"][masked]).all()
    assert (inputs[~masked] == rows["ids"][~masked]).all()
    assert (inputs[masked] >= MASK).all() and (inputs < tokens.vocab_size).all()
    assert (batch["attention_mask"].numpy() == is_token).all()
    second = is_token & (np.arange(inputs.shape[1]) >= rows["first_length"][:, None])
    assert (batch["token_type_ids"].numpy() == second).all()
    assert count_targets(batch, LOSSES).tolist() == [sum(counts), len(ids)]


@settings(max_examples=100)
@given(rows=any_rows(), probability=probabilities, seed=seeds, static=st.booleans(), data=st.data())
def test_neither_company_nor_order_nor_padding_changes_a_row(rows, probability, seed, static, data):
    rows, ids, epochs, tokens = rows
    chosen = data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1, max_size=6))
    padding = np.full((len(chosen), data.draw(st.integers(0, 9))), PAD, np.uint16)
    some = {name: array[chosen] for name, array in rows.items()}
    some["ids"] = np.concatenate([some["ids"], padding], axis=1)
    together, apart = (
        make_batch(*samples, seed, tokens, mask_probability=probability, static_masking=static)
        for samples in ((rows, ids, epochs), (some, ids[chosen], epochs[chosen]))
    )
    row_length = rows["ids"].shape[1]
    for name, tensor in together.items():
        found = apart[name] if tensor.ndim == 1 else apart[name][:, :row_length]
        assert torch.equal(found, tensor[chosen])
    assert (apart["labels"][:, row_length:] == IGNORED).all()


def test_shapes_and_derived_inputs(pair_rows):
    rows = pair_rows(6, 32)
    rows["length"][2], rows["first_length"][2] = 20, 9
    rows["ids"][2, 20:] = PAD
    batch = make_batch(rows, np.arange(6))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels", "next_sentence_label"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["attention_mask"][2].tolist() == [1] * 20 + [0] * 12
    assert batch["token_type_ids"][2].tolist() == [0] * 9 + [1] * 11 + [0] * 12
    assert batch["next_sentence_label"].tolist() == rows["next_sentence_label"].tolist()
    assert "next_sentence_label" not in make_batch(rows, np.arange(6), next_sentence=False)


@pytest.mark.parametrize("probability", [0.15, 0.5, 1.0])
def test_share_of_masked_tokens_is_exact(pair_rows, probability):
    rows = pair_rows(200, 64)
    batch = make_batch(rows, np.arange(200), mask_probability=probability)
    candidates = ~np.isin(rows["ids"], TOKENS.special)
    masked = (batch["labels"] != IGNORED).numpy()
    assert not (masked & ~candidates).any()
    assert masked.sum(1).tolist() == np.maximum(1, np.rint(probability * candidates.sum(1))).tolist()
    assert (batch["labels"].numpy()[masked] == rows["ids"][masked]).all()
    assert (batch["input_ids"].numpy()[~masked] == rows["ids"][~masked]).all()


def test_rows_with_hardly_any_token(pair_rows):
    rows = pair_rows(3, 16)
    rows["ids"][0] = [CLS, SEP, SEP] + [PAD] * 13
    rows["ids"][1] = [CLS, 77, SEP, SEP] + [PAD] * 12
    rows["length"][:2] = [3, 4]
    labels = make_batch(rows, np.arange(3))["labels"]
    assert (labels[0] == IGNORED).all()
    assert labels[1].tolist() == [IGNORED, 77] + [IGNORED] * 14


def test_eighty_ten_ten_and_every_position_alike(pair_rows):
    rows = pair_rows(4000, 64)
    batch = make_batch(rows, np.arange(4000))
    masked = (batch["labels"] != IGNORED).numpy()
    inputs, labels = batch["input_ids"].numpy()[masked], batch["labels"].numpy()[masked]
    shares = [(inputs == MASK).mean(), (inputs == labels).mean()]
    assert shares == pytest.approx([0.8, 0.1], abs=0.008)
    replaced = inputs[(inputs != MASK) & (inputs != labels)]
    assert not np.isin(replaced, TOKENS.special).any()
    assert replaced.min() < 30 and replaced.max() > 970 and len(np.unique(replaced)) > 900
    candidates = ~np.isin(rows["ids"], TOKENS.special)
    by_position = masked.sum(0)[1:] / np.maximum(candidates.sum(0)[1:], 1)
    by_position = by_position[candidates.sum(0)[1:] > 1000]
    assert abs(by_position - masked.sum() / candidates.sum()).max() < 0.03


def test_a_sample_is_masked_alike_in_any_company(pair_rows):
    rows = pair_rows(50, 32)
    epochs = np.arange(50) % 3
    together = make_batch(rows, np.arange(50), epochs)
    chosen = np.array([31, 4, 17])
    alone = make_batch({name: array[chosen] for name, array in rows.items()}, chosen, epochs[chosen])
    for name, tensor in alone.items():
        assert torch.equal(tensor, together[name][torch.from_numpy(chosen)])


def test_masks_change_with_epoch_seed_and_sample_unless_static(pair_rows):
    rows = {name: np.repeat(array[:1], 20, axis=0) for name, array in pair_rows(1, 64).items()}
    ids, epochs = np.arange(20), np.ones(20, np.int64)
    labels = make_batch(rows, ids)["labels"]
    assert len(labels.unique(dim=0)) == 20
    assert not torch.equal(labels, make_batch(rows, ids, epochs)["labels"])
    assert not torch.equal(labels, make_batch(rows, ids, seed=1)["labels"])
    assert torch.equal(labels, make_batch(rows, ids, epochs, static_masking=True)["labels"])


def test_masks_are_what_they_were():
    """Frozen: held-out losses stay comparable, and runs under way go on alike."""
    ids = np.array([[CLS, *range(10, 20), SEP, *range(20, 29), SEP]])
    rows = {"ids": ids, "length": np.array([22]), "first_length": np.array([12]), "next_sentence_label": np.array([0])}
    inputs = make_batch(rows, np.array([6]), seed=3, mask_probability=0.3)["input_ids"]
    assert inputs.tolist() == [
        [CLS, MASK, 11, 12, 13, 14, 15, MASK, 17, MASK, 19, SEP, 20, 21, 22, 23, 24, 394, 471, MASK, 28, SEP]
    ]


def test_count_targets_and_none_of_them(pair_rows):
    batch = make_batch(pair_rows(5, 32), np.arange(5))
    masked = int((batch["labels"] != IGNORED).sum())
    assert count_targets(batch, LOSSES).tolist() == [masked, 5]
    assert count_targets({"labels": batch["labels"]}, LOSSES[:1]).tolist() == [masked]
    cut = without_targets(batch)
    assert count_targets(cut, LOSSES).tolist() == [0, 0]
    assert cut["attention_mask"].sum(1).tolist() == [1] * 5
    assert torch.equal(cut["input_ids"], batch["input_ids"])
    assert count_targets(batch, LOSSES).tolist() == [masked, 5], "the batch itself must not change"


class FakeTokenizer:
    name_or_path = "toy"
    mask_token_id = MASK
    all_special_ids = [MASK, PAD, UNK, CLS, SEP]

    def get_vocab(self):
        return {f"piece{number}": number for number in range(12)}


def test_special_tokens_of_a_tokenizer():
    tokens = SpecialTokens.of(FakeTokenizer())
    assert tokens == SpecialTokens(MASK, (0, 1, 2, 3, 4), 12)
    assert tokens.ordinary_ids.tolist() == [5, 6, 7, 8, 9, 10, 11]


def test_a_tokenizer_without_mask_token_is_refused():
    tokenizer = FakeTokenizer()
    tokenizer.mask_token_id = None
    with pytest.raises(ValueError, match="toy.*no mask token"):
        SpecialTokens.of(tokenizer)


def test_targets_are_counted_on_the_device_of_the_batch():
    labels = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    assert count_targets({"labels": labels}, LOSSES[:1]).device.type == "meta"


def test_causal_batch_by_hand():
    end = 9
    ids = np.array([[5, 6, end, 1, 7, end, 8, 8], [6, end, 5, 5, 5, end, 0, 0]], np.uint16)
    batch = causal_batch({"ids": ids, "length": np.array([8, 6], np.uint16)}, end_id=end)
    ignored = IGNORED
    assert batch["input_ids"].tolist() == ids.tolist()
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 6 + [0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 3, 0, 1]]
    assert batch["labels"].tolist() == [
        [ignored, 6, end, ignored, 7, end, ignored, 8],
        [ignored, end, ignored, 5, 5, end, ignored, ignored],
    ]
    assert count_targets(batch, ("causal_lm",)).tolist() == [9]
    assert count_targets(without_targets(batch), ("causal_lm",)).tolist() == [0]


def test_a_model_counts_the_same_targets_as_the_objective():
    rng = np.random.default_rng(0)
    rows = {"ids": rng.integers(0, 5, (6, 12)), "length": np.array([12, 12, 9, 1, 0, 12])}
    batch = causal_batch(rows, end_id=4)
    torch.manual_seed(0)
    model = SpikeLMForCausalLM(SpikeLMConfig(**{**DECODER, "neuron": {"kind": "none"}}))
    output = model(**batch)
    assert output.causal_lm_count == count_targets(batch, ("causal_lm",))
    alone = [causal_batch({name: array[row : row + 1] for name, array in rows.items()}, end_id=4) for row in range(6)]
    sums = [float(model(**each).causal_lm_loss_sum.detach()) for each in alone]
    assert float(output.causal_lm_loss_sum.detach()) == pytest.approx(sum(sums), rel=1e-5)
