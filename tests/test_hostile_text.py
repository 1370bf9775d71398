"""Tokenizers on Wikipedia and on a megabyte of hostile Unicode: ids as the library has them, text given back."""

import json
import math
from random import Random

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep.sources import plan_units, read_unit
from data_prep.tokenization import load_tokenizer, text_encoder
from data_prep.tokenizer_models import (
    _check_equal,
    causal_tokenizer,
    train_byte_bpe,
    train_sentencepiece,
    train_wordpiece,
)
from data_prep.word_encoder import LONGEST_WORD, word_rules
from tests.conftest import WIKIPEDIA

NUM_BYTES = 1 << 20
SPECIAL = ["<s>", "</s>", "<pad>", "<unk>", "<mask>", "<0x41>", "<0xFF>", "[SEP]", "▁", "▁▁ ▁"]


def hostile_texts(seed=0):
    """Texts of one to four hundred parts: anything that is Unicode, in the worst company."""
    random = Random(seed)

    def anything():  # every plane, unassigned and private, without surrogates, which are no text
        code = random.randrange(0x110000 - 0x800)
        return chr(code if code < 0xD800 else code + 0x800)

    parts = [
        anything,
        lambda: "e" + "".join(chr(random.randrange(0x300, 0x370)) for _ in range(random.randrange(20))),
        lambda: chr(random.randrange(0x20)),
        lambda: random.choice(" \t\n\r\x7f\x85\xa0\u2003\u2028\u2029\u3000") * random.randrange(1, 4),
        lambda: random.choice("\u200b\u200c\u200d\u2060\ufeff\u00ad\u202e\u202c\ufffd\ufffe\U0010ffff"),
        lambda: chr(random.randrange(0x590, 0x700)),
        lambda: random.choice("a.\u0301 \U0001f600#") * random.randrange(1, 300),
        lambda: random.choice(SPECIAL),
        lambda: random.choice(
            ["The old house", "ﬁ", "Ｆｕｌｌ", "ß", "İ", "日本語", "\U0001f468\u200d\U0001f469", "1/2", "½"]
        ),
    ]
    size = 0
    while size < NUM_BYTES:
        text = "".join(random.choice(parts)() for _ in range(random.randrange(1, 400)))
        size += len(text.encode())
        yield text


@pytest.fixture(scope="module")
def hostile():
    return list(hostile_texts())


@pytest.fixture(scope="module")
def articles():
    return [document.text for unit in plan_units([WIKIPEDIA]) for document in read_unit(unit)]


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no prefix"])
def unigram(request, articles):
    """A tokenizer and its model in the sentencepiece library; 1,000 pieces of a tenth of the articles."""
    return train_sentencepiece(lambda: iter(articles[::10]), 1000, lowercase=False, prefix=request.param)


@pytest.fixture(scope="module")
def byte_bpe(articles):
    return train_byte_bpe(lambda: iter(articles[::10]), 1000, lowercase=False)


@pytest.fixture(scope="module")
def wordpiece(articles):
    return train_wordpiece(lambda: iter(articles[::10]), 1000, lowercase=True)


@pytest.fixture(params=["wordpiece", "byte_bpe", "unigram"])
def any_tokenizer(request, wordpiece, byte_bpe, unigram):
    return {"wordpiece": wordpiece, "byte_bpe": byte_bpe, "unigram": unigram[0]}[request.param]


def test_words_and_their_parts_that_are_too_long_are_not_kept(any_tokenizer):
    encode = text_encoder(any_tokenizer)
    letters, known = "ab" * 5000, "data:image/png"
    assert encode([f"see {known},{letters} (C) {letters}.{letters}"] * 2)[1]
    assert max(map(len, encode._ids)) <= LONGEST_WORD
    assert any("see" in word for word in encode._ids)


def test_words_one_by_one_have_the_ids_that_they_have_in_a_text(any_tokenizer, articles, hostile):
    backend = Tokenizer.from_str(any_tokenizer.backend_tokenizer.to_str())
    assert word_rules(json.loads(backend.to_str())) is not None
    backend.encode_special_tokens = True
    encode = text_encoder(any_tokenizer)
    spaces = ["", " ", "  ", "a", " a", "a ", "a  b", "\n a\n \nb", "00000 ..... 0000000"]
    for texts in (articles[1::2], hostile, [*spaces, *(text.replace(" ", "  ") for text in articles[::8])]):
        whole = backend.encode_batch_fast(texts, add_special_tokens=False)
        assert encode(texts) == encode(texts[::-1])[::-1] == [encoding.ids for encoding in whole]


def test_tokenizers_whose_words_may_depend_on_others_get_texts_whole(unigram, byte_bpe, wordpiece):
    def rules(tokenizer, change):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        change(state)
        return word_rules(state)

    def add_token(state):
        state["added_tokens"].append({**state["added_tokens"][0], "content": "New York", "special": False})

    for tokenizer in (unigram[0], byte_bpe, wordpiece):
        assert rules(tokenizer, lambda state: None)
        assert not rules(tokenizer, add_token)
        assert not rules(tokenizer, lambda state: state.update(normalizer={"type": "Strip"}))
        assert not rules(tokenizer, lambda state: state.update(pre_tokenizer={"type": "Metaspace"}))
    assert not rules(unigram[0], lambda state: state["model"]["vocab"].append(["▁New▁York", -3.0]))
    assert not rules(byte_bpe, lambda state: state["pre_tokenizer"].update(add_prefix_space=True))
    whole = Tokenizer.from_str(byte_bpe.backend_tokenizer.to_str())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert word_rules(json.loads(whole.to_str())) is None


def test_ids_equal_the_librarys(unigram, articles, hostile):
    tokenizer, model = unigram
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    paragraphs = [paragraph for text in articles for paragraph in text.split("\n\n")]
    for texts in (paragraphs, hostile):
        assert text_encoder(tokenizer)(texts) == library.encode(texts)


class Answers:
    """The library with answers of one's own."""

    def __init__(self, ids):
        self.ids = ids

    def encode(self, texts):
        return [self.ids]


def test_a_tokenizer_is_refused_where_it_is_not_the_librarys_but_for_the_order_of_equally_good_pieces():
    pieces = [("<unk>", 0.0), ("*", -3.0), ("**", -4.0), ("a", -3.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    (ids,) = text_encoder(tokenizer)(["***"])
    assert sorted(ids) == [1, 2]
    _check_equal(tokenizer, Answers(ids[::-1]), ["***"])
    for others in ([1, 1, 1], [1, 3], [2]):
        with pytest.raises(RuntimeError, match="disagree"):
            _check_equal(tokenizer, Answers(others), ["***"])
    with pytest.raises(RuntimeError, match="disagree"):
        _check_equal(tokenizer, Answers([3, 1]), ["*a"])


def test_where_a_long_text_has_other_ids_ours_are_no_worse(unigram, articles):
    """The library adds scores in single precision: of ten thousand pieces it sees no small differences any more. In
    double precision equally good segmentations of a word differ by rounding, far on in a text; ours are the word's."""
    tokenizer, model = unigram
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    text = " ".join(articles)[:1_000_000]
    (ours,), theirs = text_encoder(tokenizer)([text]), library.encode(text)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    best = math.fsum(map(library.get_score, ours))
    for other in (theirs, whole):
        assert len(set(other)) > 500 and tokenizer.decode(other) == tokenizer.decode(ours)
        assert best >= math.fsum(map(library.get_score, other))


def test_sentencepiece_gives_back_all_but_its_sign_for_a_space(unigram, articles, hostile):
    tokenizer, _ = unigram
    texts = [*articles[::4], *hostile]
    for text, ids in zip(texts, text_encoder(tokenizer)(texts), strict=True):
        assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert any("▁" in text for text in hostile) and not any("▁" in text for text in articles)


def test_byte_bpe_gives_every_text_back(byte_bpe, articles, hostile):
    texts = [*articles[::4], *hostile, "", " ", "\n"]
    encoded = text_encoder(byte_bpe)(texts)
    assert [byte_bpe.decode(ids) for ids in encoded] == texts
    assert not {0, 1, 2, 3, 4} & {id for ids in encoded for id in ids}  # special tokens in a text are text


def test_byte_bpe_is_deterministic_and_a_decoders(byte_bpe, articles, tmp_path):
    again = train_byte_bpe(lambda: iter(articles[::10]), 1000, lowercase=False)
    assert again.backend_tokenizer.to_str() == byte_bpe.backend_tokenizer.to_str()
    assert len(byte_bpe) == 1000
    assert byte_bpe.convert_ids_to_tokens(range(5)) == ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    pair = byte_bpe("the house", "the house")["input_ids"]
    assert [pair[0], pair[-1], pair.count(3)] == [2, 3, 2]
    causal_tokenizer(byte_bpe).save_pretrained(tmp_path)
    causal = load_tokenizer(tmp_path)
    text = "the old house, and the old river – naïve"
    ids = causal(text, add_special_tokens=False)["input_ids"]
    assert causal(text)["input_ids"] == [2, *ids]
    for cut in (1, 5, 9):
        assert causal.decode(ids[:cut]) + causal.decode(ids[cut:]) == text


def test_lowercase_byte_bpe_and_vocabularies_that_cannot_be(articles):
    small = train_byte_bpe(lambda: iter(articles[:1]), 300, lowercase=True)
    assert small.decode(text_encoder(small)(["The HOUSE É"])[0]) == "the house é"
    with pytest.raises(ValueError, match="vocab_size: 260, but the texts yield 261 pieces at the least: ask for more"):
        train_byte_bpe(lambda: iter(articles[:1]), 260, lowercase=True)
    with pytest.raises(
        ValueError, match="vocab_size: 30000, but the texts yield only .* give more text, or ask for fewer"
    ):
        train_byte_bpe(lambda: iter(["a small text"]), 30_000, lowercase=True)
