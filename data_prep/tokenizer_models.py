"""Training of WordPiece, SentencePiece and byte-level BPE vocabularies; all become transformers tokenizers alike."""

import io
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, islice

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data_prep.sentences import split_sentences
from data_prep.tokenization import text_encoder

Texts = Callable[[], Iterator[str]]
"""Gives the training documents from the beginning, each time it is called."""

WORDPIECE_SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
SENTENCEPIECE_SPECIAL = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
BYTE_BPE_SPECIAL = SENTENCEPIECE_SPECIAL
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
SMALLEST_ALPHABET, LARGEST_ALPHABET = 64, 1000  # characters of WordPiece; each may take two entries of the vocabulary
CHECKED_SENTENCES = 1000


def train_wordpiece(texts: Texts, vocab_size: int, lowercase: bool) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer as BERT has it. Equal texts give equal vocabularies.

    Raises:
        ValueError: the texts do not yield `vocab_size` pieces.
    """
    special = list(WORDPIECE_SPECIAL.values())
    tokenizer = _bert_pipeline(models.WordPiece(unk_token="[UNK]"), lowercase)
    alphabet = _alphabet(texts, tokenizer.normalizer, min(max(vocab_size // 8, SMALLEST_ALPHABET), LARGEST_ALPHABET))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        # The trainer would number continuing characters as its hash tables come, so that ties between merges, and with
        # them the vocabulary, changed from run to run. Given as special tokens they have fixed numbers.
        special_tokens=special + [f"##{character}" for character in alphabet if _continues_words(tokenizer, character)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    vocabulary = tokenizer.get_vocab()
    _check_size(vocab_size, len(vocabulary))
    trained = _bert_pipeline(models.WordPiece(vocabulary, unk_token="[UNK]"), lowercase)
    return _transformers_tokenizer(trained, WORDPIECE_SPECIAL)


def _check_size(vocab_size: int, found: int) -> None:
    if found != vocab_size:
        few = f"only {found} pieces: give more text, or ask for fewer"
        many = f"{found} pieces at the least: ask for more"
        raise ValueError(f"vocab_size: {vocab_size}, but the texts yield {few if found < vocab_size else many}")


def _bert_pipeline(model: models.WordPiece, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _alphabet(texts: Texts, normalizer: normalizers.Normalizer, size: int) -> list[str]:
    """The most frequent characters; a word with any other one is unknown."""
    counts: Counter[str] = Counter()
    for text in texts():
        counts.update(normalizer.normalize_str(text))
    characters = (character for character in counts if not character.isspace())
    return sorted(characters, key=lambda character: (-counts[character], character))[:size]


def _continues_words(tokenizer: Tokenizer, character: str) -> bool:
    text = tokenizer.normalizer.normalize_str(f"a{character}")
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(text)) == 1


def train_byte_bpe(texts: Texts, vocab_size: int, lowercase: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2 has it: no text has an unknown token, and, but for case, decoding gives every text back.

    Equal texts give equal vocabularies. No space is put before a text: what a decoder writes can be decoded alone.

    Raises:
        ValueError: the texts do not yield `vocab_size` pieces, or it is less than the 256 bytes and special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase()] if lowercase else [])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(BYTE_BPE_SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    _check_size(vocab_size, tokenizer.get_vocab_size())
    return _transformers_tokenizer(tokenizer, BYTE_BPE_SPECIAL, bos_token="<s>", eos_token="</s>")


def train_sentencepiece(
    texts: Texts, vocab_size: int, lowercase: bool, *, prefix: bool = True
) -> tuple[PreTrainedTokenizerFast, bytes]:
    """A unigram SentencePiece tokenizer with byte fallback, and the .model file of the sentencepiece library.

    With `prefix` a space is put before every text that is encoded, and taken off what is decoded: the first word is
    the piece that it is elsewhere. Without, what a decoder writes can be decoded alone and put behind its prompt.

    Raises:
        ValueError: the texts do not yield `vocab_size` pieces, or need more.
    """
    names = SENTENCEPIECE_SPECIAL
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, lowercase),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            byte_fallback=True,
            pad_id=0,
            pad_piece=names["pad"],
            unk_id=1,
            unk_piece=names["unk"],
            bos_id=2,
            bos_piece=names["cls"],
            eos_id=3,
            eos_piece=names["sep"],
            control_symbols=[names["mask"]],
            # Text stays as it is, so that decoding gives it back and `tokenizers` needs no copy of the library's rules.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            # What special and byte pieces are spelled with, so that such a name in a text can always be spelled out.
            required_chars="".join(sorted(set("".join([*names.values(), *BYTE_PIECES])))),
            num_threads=1,  # sums differ with the number of threads, and so would the vocabulary
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"vocab_size: {vocab_size}: sentencepiece says: {error}") from None
    # Not by the trainer's option: it is given sentences, whose first words stand behind a space in their documents.
    proto = ModelProto.FromString(model.getvalue())
    proto.normalizer_spec.add_dummy_prefix = prefix
    serialized = proto.SerializeToString(deterministic=True)
    processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
    tokenizer = _from_sentencepiece(processor, lowercase, prefix)
    _check_equal(tokenizer, processor, list(islice(_sentences(texts, lowercase), CHECKED_SENTENCES)))
    return tokenizer, serialized


def _sentences(texts: Texts, lowercase: bool) -> Iterator[str]:
    sentences = chain.from_iterable(map(split_sentences, texts()))
    return map(normalizers.Lowercase().normalize_str, sentences) if lowercase else sentences


def _from_sentencepiece(
    processor: sentencepiece.SentencePieceProcessor, lowercase: bool, prefix: bool
) -> PreTrainedTokenizerFast:
    """The same segmentation by the `tokenizers` library."""
    # sentencepiece leaves special and byte pieces out of its search. `tokenizers` has no way to, but does not choose
    # a piece that is so improbable.
    size = processor.get_piece_size()
    excluded = [processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i) for i in range(size)]
    scores = [-1e6 if excluded[i] else processor.get_score(i) for i in range(size)]
    pieces = [(processor.id_to_piece(i), score) for i, score in enumerate(scores)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=True))
    steps = [normalizers.Lowercase()] if lowercase else []
    steps += [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return _transformers_tokenizer(tokenizer, SENTENCEPIECE_SPECIAL, bos_token="<s>", eos_token="</s>")


def _check_equal(
    tokenizer: PreTrainedTokenizerFast, processor: sentencepiece.SentencePieceProcessor, sentences: list[str]
) -> None:
    """RuntimeError where a sentence has other pieces by the two libraries, and not only in another order.

    Of segmentations that are equally good, as of a row of stars, each takes the one that its rounding of sums prefers.
    """
    ids = text_encoder(tokenizer)(sentences)
    for sentence, found, expected in zip(sentences, ids, processor.encode(sentences), strict=True):
        if found == expected:
            continue
        if sorted(found) != sorted(expected) or tokenizer.decode(found) != tokenizer.decode(expected):
            raise RuntimeError(f"tokenizers and sentencepiece disagree on {sentence!r}: {found}, {expected}")


def causal_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same pieces as decoders use them: a call adds the begin of text alone, and pads on the left."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    begin, end = tokenizer.cls_token, tokenizer.sep_token
    ids = [(begin, tokenizer.cls_token_id)]
    backend.post_processor = processors.TemplateProcessing(single=f"{begin} $A", pair=None, special_tokens=ids)
    special = {f"{role}_token": getattr(tokenizer, f"{role}_token") for role in ("pad", "unk")}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        bos_token=begin,
        eos_token=end,
        **special,
    )


def _transformers_tokenizer(tokenizer: Tokenizer, special: dict[str, str], **names: str) -> PreTrainedTokenizerFast:
    """With [CLS] A [SEP] B [SEP] as what a call adds, and the special tokens registered in all roles."""
    cls, sep = special["cls"], special["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    roles = {f"{role}_token": token for role, token in special.items()}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **roles, **names)
