from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.packing import CausalLayout, PairLayout, join_sentences, pack_sentence_pairs

CLS, SEP, PAD = 2, 3, 0

row_lengths = st.integers(8, 40)  # 8 is the least that build_shards takes
pools = st.lists(st.lists(st.integers(0, 40), max_size=6), min_size=1, max_size=5)
shares = st.sampled_from([0.0, 0.1, 0.5, 1.0])
seeds = st.integers(0, 2**40).map(str)


def layout(row_length=16, **probabilities):
    return PairLayout(row_length, cls_id=CLS, sep_id=SEP, pad_id=PAD, ids_dtype="uint16", **probabilities)


def pool_of(sentence_lengths, row_layout):
    """Documents whose token at position p of document d is 1000 * (d + 1) + p; sentence_lengths: a list for each."""
    documents = []
    for number, lengths in enumerate(sentence_lengths):
        tokens = iter(range(1000 * (number + 1), 1000 * (number + 2)))
        sentences = [[next(tokens) for _ in range(length)] for length in lengths]
        documents.append(join_sentences(sentences, row_layout.longest_sentence))
    return documents


def segments(rows):
    """(A, B, label) of each row, after a check of the special tokens and the padding."""
    fields = (rows["ids"], rows["length"], rows["first_length"], rows["next_sentence_label"])
    for ids, length, first_length, label in zip(*(field.tolist() for field in fields), strict=True):
        assert ids[0] == CLS and ids[first_length - 1] == SEP and ids[length - 1] == SEP
        assert set(ids[length:]) <= {PAD}
        yield ids[1 : first_length - 1], ids[first_length : length - 1], label


def random_pool(num_documents, row_layout, seed=0):
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(1, 30, rng.integers(1, 12)).tolist() for _ in range(num_documents)]
    return pool_of(lengths, row_layout)


def test_one_row_by_hand():
    row_layout = layout(12, random_next_probability=0, short_row_probability=0)
    rows = pack_sentence_pairs(pool_of([[3, 4]], row_layout), row_layout, "seed")
    assert rows["ids"].tolist() == [[CLS, 1000, 1001, 1002, SEP, 1003, 1004, 1005, 1006, SEP, PAD, PAD]]
    assert (rows["length"].tolist(), rows["first_length"].tolist()) == ([10], [5])
    assert rows["next_sentence_label"].tolist() == [0]
    assert [rows[name].dtype for name in rows] == ["uint16", "uint16", "uint16", "uint8"]


@settings(max_examples=100)
@given(sentence_lengths=pools, row_length=row_lengths, random_next=shares, short_row=shares, seed=seeds)
def test_every_token_stands_once_and_in_order(sentence_lengths, row_length, random_next, short_row, seed):
    row_layout = layout(row_length, random_next_probability=random_next, short_row_probability=short_row)
    pool = pool_of(sentence_lengths, row_layout)
    rows = pack_sentence_pairs(pool, row_layout, seed)
    assert rows["ids"].shape[1] == row_length
    stream = []
    for first, second, label in segments(rows):
        assert first and second
        stream += first if label else first + second
    assert stream == [token for document in pool for token in document.ids.tolist()]


@settings(max_examples=100)
@given(sentence_lengths=pools, row_length=row_lengths, random_next=shares, seed=seeds)
def test_each_segment_comes_from_where_its_label_says(sentence_lengths, row_length, random_next, seed):
    row_layout = layout(row_length, random_next_probability=random_next, short_row_probability=0)
    pool = pool_of(sentence_lengths, row_layout)
    for first, second, label in segments(pack_sentence_pairs(pool, row_layout, seed)):
        number, position = divmod(first[0] - 1000, 1000)
        ids, ends = pool[number]
        stop = min(position + row_layout.longest_pair, len(ids))
        boundaries = [end for end in ends if position < end < stop]
        middle = position + len(first)
        assert middle in boundaries if boundaries else label == 1 and stop == len(ids)
        if random_next in (0, 1):
            assert label == (random_next if boundaries else 1)
        if label == 0:
            assert second == ids[middle:stop].tolist()
        else:
            other, start = divmod(second[0] - 1000, 1000)
            assert other != number or sum(map(any, sentence_lengths)) == 1
            assert start in [0, *pool[other].sentence_ends]
            assert second == pool[other].ids[start : start + row_layout.longest_pair - len(first)].tolist()


@settings(max_examples=60)
@given(sentence_lengths=pools, row_length=row_lengths, seed=seeds, data=st.data())
def test_documents_without_a_token_change_nothing(sentence_lengths, row_length, seed, data):
    row_layout = layout(row_length)
    pool = pool_of(sentence_lengths, row_layout)
    more = list(pool)
    for place in data.draw(st.lists(st.integers(0, len(pool)), max_size=3)):
        more.insert(place, join_sentences(data.draw(st.sampled_from([[], [[]]])), row_layout.longest_sentence))
    rows, again = (pack_sentence_pairs(documents, row_layout, seed) for documents in (pool, more))
    assert all(np.array_equal(rows[name], again[name]) for name in rows)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 60), max_size=8), st.integers(1, 20))
def test_joined_sentences_end_where_they_did_or_in_between(lengths, longest_sentence):
    tokens = iter(range(sum(lengths)))
    document = join_sentences([[next(tokens) for _ in range(length)] for length in lengths], longest_sentence)
    assert document.ids.tolist() == list(range(sum(lengths)))
    parts = np.diff([0, *document.sentence_ends])
    assert ((parts >= 1) & (parts <= longest_sentence)).all()
    sentence_ends = [end for length, end in zip(lengths, accumulate(lengths), strict=True) if length]
    assert set(sentence_ends) <= set(document.sentence_ends)
    for start, end in pairwise([0, *sentence_ends]):
        inside = [part for part, stop in zip(parts, document.sentence_ends, strict=True) if start < stop <= end]
        assert max(inside) - min(inside) <= 1 and len(inside) == -(-(end - start) // longest_sentence)


def test_a_following_segment_begins_at_a_sentence():
    row_layout = layout(32)
    pool = random_pool(30, row_layout)
    starts = {int(document.ids[end]) for document in pool for end in [0, *document.sentence_ends[:-1]]}
    for first, second, label in segments(pack_sentence_pairs(pool, row_layout, "0")):
        assert second[0] in starts
        assert label or second[0] == first[-1] + 1


def test_random_segments_come_from_other_documents():
    row_layout = layout(32)
    rows = pack_sentence_pairs(random_pool(30, row_layout), row_layout, "0")
    labelled = [(first, second) for first, second, label in segments(rows) if label]
    assert len(labelled) > 50
    assert all(first[0] // 1000 != second[0] // 1000 for first, second in labelled)
    assert all(second == list(range(second[0], second[0] + len(second))) for _, second in labelled)


def test_half_the_rows_are_random_and_a_tenth_short():
    row_layout = layout(32)
    lengths = [[int(length) for length in np.random.default_rng(n).integers(4, 14, 80)] for n in range(40)]
    rows = pack_sentence_pairs(pool_of(lengths, row_layout), row_layout, "0")
    assert len(rows["ids"]) > 1000
    assert 0.45 < rows["next_sentence_label"].mean() < 0.6
    assert 0.07 < (rows["length"] < 32).mean() < 0.2
    none_short = pack_sentence_pairs(pool_of(lengths, row_layout), layout(32, short_row_probability=0), "0")
    assert (none_short["length"] == 32).mean() > 0.93


def test_rows_depend_on_pool_and_seed_alone():
    row_layout = layout(32)
    first, again, other = (
        pack_sentence_pairs(random_pool(20, row_layout), row_layout, seed) for seed in ("0", "0", "1")
    )
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert first["ids"].shape != other["ids"].shape or not np.array_equal(first["ids"], other["ids"])


def test_the_choices_are_the_same_on_every_machine():
    row_layout = layout(16)
    pool = pool_of([[5, 8, 3, 9, 4, 6, 7, 2], [12, 4, 4, 5], [6, 7, 8]], row_layout)
    rows = pack_sentence_pairs(pool, row_layout, "0/train-000000/0")
    assert rows["next_sentence_label"].tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1]
    assert rows["first_length"].tolist() == [11, 5, 7, 12, 6, 8, 5, 6, 7, 12, 6, 6]
    assert rows["ids"].sum(dtype=int) == 291337


def test_a_document_alone_is_paired_with_itself():
    row_layout = layout(16, random_next_probability=1)
    rows = pack_sentence_pairs(pool_of([[5, 5, 5]], row_layout), row_layout, "0")
    assert set(rows["next_sentence_label"].tolist()) == {1}
    assert all(second[0] // 1000 == 1 for _, second, _ in segments(rows))


def test_no_documents_give_no_rows():
    rows = pack_sentence_pairs([join_sentences([], 6)], layout(16), "0")
    assert rows["ids"].shape == (0, 16) and rows["length"].shape == (0,)


@pytest.mark.parametrize(
    ("lengths", "ends"), [([3, 0, 6], [3, 9]), ([7], [4, 7]), ([13], [5, 9, 13]), ([6, 12], [6, 12, 18])]
)
def test_long_sentences_count_as_several_of_equal_length(lengths, ends):
    assert join_sentences([[9] * length for length in lengths], 6).sentence_ends == ends


def test_ids_beyond_the_type_are_refused():
    row_layout = layout(12)
    pack_sentence_pairs([join_sentences([[1, 65_535]], 4)], row_layout, "0")
    with pytest.raises(ValueError, match="token id 65536 does not fit uint16"):
        pack_sentence_pairs([join_sentences([[1, 2]], 4), join_sentences([[65_536]], 4)], row_layout, "0")


def test_large_vocabularies_take_four_bytes():
    row_layout = PairLayout(12, cls_id=CLS, sep_id=SEP, pad_id=PAD, ids_dtype="uint32")
    rows = pack_sentence_pairs([join_sentences([[70_000, 70_001], [70_002]], 4)], row_layout, "0")
    assert rows["ids"].dtype == np.uint32 and rows["ids"].max() >= 70_001


BEGIN, END = 1, 9


def causal(row_length, begin_ids=(BEGIN,), ids_dtype="uint16"):
    return CausalLayout(row_length, begin_ids, END, PAD, ids_dtype)


def test_causal_rows_by_hand():
    rows = causal(4).pack([causal(4).join([[100, 101, 102]]), causal(4).join([[]]), causal(4).join([[200]])], "")
    assert rows["ids"].tolist() == [[BEGIN, 100, 101, 102], [END, BEGIN, 200, END]]
    assert rows["length"].tolist() == [4, 4]
    assert [rows[name].dtype for name in rows] == ["uint16", "uint16"]
    assert causal(4).pieces("One. Two.\n") == ["One. Two.\n"] and causal(4).pieces(" \n") == []


@settings(max_examples=100)
@given(lengths=st.lists(st.integers(0, 30), max_size=6), row_length=row_lengths, begins=st.booleans())
def test_causal_rows_give_the_documents_back(lengths, row_length, begins):
    row_layout = causal(row_length, (BEGIN,) if begins else ())
    pool = pool_of([[length] for length in lengths], layout(1000))
    rows = row_layout.pack(pool, "any seed")
    stream = [id for ids, length in zip(rows["ids"], rows["length"], strict=True) for id in ids[:length].tolist()]
    expected = [[*row_layout.begin_ids, *document.ids.tolist(), END] for document in pool if len(document.ids)]
    assert stream == [id for document in expected for id in document]
    assert (rows["length"][:-1] == row_length).all() and (rows["length"] > 0).all()
    assert all((ids[length:] == PAD).all() for ids, length in zip(rows["ids"], rows["length"], strict=True))


def test_causal_ids_beyond_the_type_are_refused():
    with pytest.raises(ValueError, match="token id 65536 does not fit uint16"):
        causal(8).pack([causal(8).join([[65_536]])], "")
    assert causal(8, ids_dtype="uint32").pack([causal(8).join([[65_536]])], "")["ids"][0, 1] == 65_536
