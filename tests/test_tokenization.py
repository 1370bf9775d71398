import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep.tokenization import (
    document_frame,
    load_tokenizer,
    text_encoder,
    tokenizer_fingerprint,
    vocabulary_size,
)
from data_prep.tokenizer_models import causal_tokenizer, train_sentencepiece, train_wordpiece

STRANGE = [
    "",
    "  two  spaces ",
    "<s> </s> <mask> <pad> <unk> <0x41> [SEP][MASK]",
    "line\nbreak\tand tab",
    "😀 日本語 𝔘 ﬁ é \u200b",
    "nul\x00x",
    "a" * 500,
]


def test_the_size_of_a_vocabulary_counts_gaps_and_added_tokens(wordpiece):
    assert vocabulary_size(wordpiece) == len(wordpiece) == 256
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "far": 70_000}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert (vocabulary_size(tokenizer), len(tokenizer)) == (70_001, 2)
    wider = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend.to_str()), pad_token="<pad>")
    assert vocabulary_size(wider) == max(70_000, wider.pad_token_id) + 1


@pytest.fixture(scope="module")
def wordpiece(prose):
    return train_wordpiece(lambda: iter(prose(40)), 256, lowercase=True)


@pytest.fixture(scope="module")
def unigram(prose):
    return train_sentencepiece(lambda: iter(prose(40)), 400, lowercase=False)


def test_wordpiece_is_berts(wordpiece):
    assert len(wordpiece) == 256
    assert wordpiece.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    encoded = wordpiece("Thé House", "the house")
    tokens = wordpiece.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens == ["[CLS]", "the", "house", "[SEP]", "the", "house", "[SEP]"]
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert wordpiece.decode(encoded["input_ids"], skip_special_tokens=True) == "the house the house"


def test_wordpiece_training_is_deterministic(wordpiece, prose):
    again = train_wordpiece(lambda: iter(prose(40)), 256, lowercase=True)
    assert again.get_vocab() == wordpiece.get_vocab()
    cased = train_wordpiece(lambda: iter(prose(40)), 256, lowercase=False)
    assert cased.tokenize("The") != wordpiece.tokenize("The") == ["the"]


def test_sentencepiece_encodes_as_the_library_does(unigram, prose):
    tokenizer, model = unigram
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = [*prose(3, seed=1), *STRANGE]
    assert text_encoder(tokenizer)(texts) == processor.encode(texts)
    assert len(tokenizer) == processor.get_piece_size() == 400


def test_sentencepiece_training_is_deterministic(unigram, prose):
    assert train_sentencepiece(lambda: iter(prose(40)), 400, lowercase=False)[1] == unigram[1]


def test_sentencepiece_gives_text_back(unigram):
    tokenizer, _ = unigram
    for text in STRANGE:
        (ids,) = text_encoder(tokenizer)([text])
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    pair = tokenizer("the house", "the house")["input_ids"]
    assert [pair[0], pair[-1], pair.count(3)] == [2, 3, 2]


def test_lowercase_sentencepiece(prose):
    tokenizer, model = train_sentencepiece(lambda: iter(prose(40)), 400, lowercase=True)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert text_encoder(tokenizer)(["The HOUSE"]) == [processor.encode("the house")]


@pytest.mark.parametrize("train", [train_wordpiece, train_sentencepiece])
def test_a_vocabulary_that_the_text_does_not_yield_is_refused(train, prose):
    with pytest.raises(ValueError, match="vocab_size: 30000"):
        train(lambda: iter(prose(2)), 30_000, lowercase=True)


def test_special_tokens_in_a_text_are_text(wordpiece):
    (ids,) = text_encoder(wordpiece)(["the [SEP] house [MASK]"])
    assert not {3, 4} & set(ids)


def test_the_encoder_pads_and_cuts_nothing(wordpiece):
    texts = ["the", "the house " * 600]
    expected = text_encoder(wordpiece)(texts)
    wordpiece(texts, padding=True, truncation=True, max_length=8)
    assert text_encoder(wordpiece)(texts) == expected
    assert [len(ids) for ids in expected] == [1, 1200]


def test_the_fingerprint_outlives_saving_and_use_but_no_change(wordpiece, unigram, tmp_path):
    for number, tokenizer in enumerate((wordpiece, unigram[0])):
        before = tokenizer_fingerprint(tokenizer)
        tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
        tokenizer.save_pretrained(tmp_path / str(number))
        assert tokenizer_fingerprint(load_tokenizer(tmp_path / str(number))) == before
    changed = load_tokenizer(tmp_path / "0")
    changed.add_special_tokens({"additional_special_tokens": ["<new>"]})
    other_role = load_tokenizer(tmp_path / "0")
    other_role.bos_token = "[CLS]"
    fingerprints = {tokenizer_fingerprint(each) for each in (wordpiece, unigram[0], changed, other_role)}
    assert len(fingerprints) == 4


def test_tokenizers_of_others_load(tmp_path):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path / "other")
    assert text_encoder(load_tokenizer(tmp_path / "other"))(["a b a"]) == [[1, 0, 1]]


def test_folders_without_a_tokenizer_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none does not exist: train one by python -m data_prep\.train_tokenizer"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no tokenizer that transformers can load"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for content in ("{", '{"version": "1.0", "added_tokens": [], "model": {"type": "none"}}'):
        (tmp_path / "broken" / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="broken holds no tokenizer that transformers can load"):
            load_tokenizer(tmp_path / "broken")


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_a_causal_tokenizer_adds_the_begin_of_text_alone(kind, wordpiece, unigram, tmp_path):
    pairs = wordpiece if kind == "wordpiece" else unigram[0]
    causal_tokenizer(pairs).save_pretrained(tmp_path)
    causal = load_tokenizer(tmp_path)
    text = "the old house"
    (ids,) = text_encoder(pairs)([text])
    assert text_encoder(causal)([text]) == [ids]
    assert causal(text)["input_ids"] == [causal.bos_token_id, *ids]
    assert causal.decode(causal(text)["input_ids"], skip_special_tokens=True) == text
    assert set(causal(text)) == {"input_ids", "attention_mask"}
    assert causal([text, "the"], padding=True)["attention_mask"][1][0] == 0  # generation goes on at the right end
    assert document_frame(causal) == ((causal.bos_token_id,), causal.eos_token_id)


def test_without_a_prefix_what_follows_is_decoded_alone(prose, tmp_path):
    tokenizer, model = train_sentencepiece(lambda: iter(prose(40)), 400, lowercase=False, prefix=False)
    causal_tokenizer(tokenizer).save_pretrained(tmp_path)
    causal = load_tokenizer(tmp_path)
    text = "the old house, and the old river"
    ids = causal(text, add_special_tokens=False)["input_ids"]
    assert sentencepiece.SentencePieceProcessor(model_proto=model).encode(text) == ids
    for cut in range(len(ids) + 1):
        assert causal.decode(ids[:cut]) + causal.decode(ids[cut:]) == text
    assert causal.decode(causal(" house")["input_ids"], skip_special_tokens=True) == " house"


def test_a_tokenizer_for_pairs_frames_no_documents(wordpiece, unigram):
    with pytest.raises(ValueError, match=r"has no end of text \(eos_token\)"):
        document_frame(wordpiece)
    with pytest.raises(ValueError, match=r"adds <s> </s> to a text.*--template causal"):
        document_frame(unigram[0])


def test_a_tokenizer_that_adds_nothing_frames_documents_by_their_end():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "<end>": 2}, unk_token="<unk>"))
    assert document_frame(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")) == ((), 2)
