"""Steps between reading and tokenising: what each changes, leaves and leaves out, and why."""

import json
from collections import Counter
from dataclasses import fields, replace

import pytest

from data_prep.filters import QualityRules, Steps, StepSettings, mend_mojibake, normalize, quality_fault
from data_prep.near_duplicates import NearDuplicateSettings
from data_prep.ngrams import hash_ngrams, hash_words, words_of
from data_prep.recipes import ConfigError, load_settings

LOOSE = QualityRules(
    min_words=0,
    min_mean_word_length=0,
    min_alphabetic_share=0,
    min_stop_words=0,
    max_symbol_share=1,
    max_bullet_line_share=1,
    max_ellipsis_line_share=1,
    max_duplicate_line_share=1,
    max_duplicate_line_characters=1,
    max_top_ngram_characters=(1, 1, 1),
    max_duplicate_ngram_characters=(1, 1, 1, 1, 1, 1),
    allow_lorem_ipsum=True,
)
"""Rules that everything keeps, to be tightened one at a time."""


def words(count, start=0):
    return " ".join(f"word{number}" for number in range(start, start + count))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("  a \t b\u00a0\u2009c  \r\n d\rnext\r\n\r\n\r\n\r\nlast ", "a b c\nd\nnext\n\nlast"),
        ("e\u0301te\u0301 \u212b", "\u00e9t\u00e9 \u00c5"),
        ("nul\x00 bell\x07 del\x7f c1\x9f soft\u00adhyphen \ufeffbom \ufffd\uffff", "nul bell del c1 softhyphen bom"),
        ("tab\tform\x0cfeed", "tab form\nfeed"),
        ("line\u2028line\u2029paragraph\x85line", "line\nline\n\nparagraph\nline"),
        (
            "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
            "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        ),
    ],
)
def test_normalisation(text, expected):
    assert normalize(text) == expected
    assert normalize(expected) == expected


@pytest.mark.parametrize("text", ["café – “quoted” naïve…", "Ångström 日本語 ж", "line é\nother “line”"])
@pytest.mark.parametrize("misread", ["cp1252", "latin-1"])
def test_mojibake_is_mended(text, misread):
    raw = text.encode()
    # What Windows-1252 has no character for comes out as the byte's own code point, as browsers have it.
    spoiled = "".join(bytes([byte]).decode(misread, "ignore") or chr(byte) for byte in raw)
    assert spoiled != text
    assert mend_mojibake(spoiled) == text


@pytest.mark.parametrize("text", ["plain", "«SOCIÉTÉ» à la carte", "MAÇÃ» é", "Ã alone", "日本語 Ã©", "€Ã"])
def test_text_that_only_looks_like_mojibake_stays(text):
    assert mend_mojibake(text) == text


@pytest.mark.parametrize(
    ("rules", "at_limit", "beyond"),
    [
        ({"min_words": 5}, words(5), words(4)),
        ({"max_words": 5}, words(5), words(6)),
        ({"min_mean_word_length": 3.0}, "abc abc", "abc ab"),
        ({"max_mean_word_length": 4.0}, "abcd abcd", "abcd abcde"),
        ({"max_symbol_share": 0.1}, words(9) + " #x", words(8) + " #x"),
        ({"max_symbol_share": 0.1}, words(10) + "…", words(8) + "... …"),
        ({"max_bullet_line_share": 0.5}, "- a\nb", "- a\n  • b\nc"),
        ({"max_ellipsis_line_share": 0.5}, "a...\nb", "a...\nb…\nc"),
        ({"min_alphabetic_share": 0.8}, "a b c d 1", "a b c 1 2"),
        ({"min_stop_words": 2}, "The dog and cats", "A dog and cats"),
        ({"max_duplicate_line_share": 0.5}, "a\nb\na\nb", "a\nb\na\nc\na\na\na"),
        ({"max_duplicate_line_share": 0.3}, "a\nb\n\na\nc", "a\nb\n\na\nb"),
        ({"max_duplicate_line_characters": 0.4}, "aaaa\nbb\nbb\ncccc", "bbbb\ncc\ncc\nbbbb"),
        ({"max_top_ngram_characters": (0.5, 1, 1)}, "aa bb aa bb cccc dddd", "aa bb aa bb ccc dddd"),
        ({"max_top_ngram_characters": (1, 1, 0.5)}, f"a b c d a b c d {'e' * 8}", f"a b c d a b c d {'e' * 7}"),
        ({"max_duplicate_ngram_characters": (0.5, 1, 1, 1, 1, 1)}, "a b c d e a b c d e", "a b c d e a b c d e a"),
        (
            {"max_duplicate_ngram_characters": (1, 1, 1, 1, 1, 0.4)},
            words(10) + " x " + words(9),
            words(10) + " x " + words(10),
        ),
        ({"allow_lorem_ipsum": False}, "lorem and ipsum", "Lorem ipsum"),
    ],
)
def test_a_rule_leaves_out_what_is_beyond_its_limit(rules, at_limit, beyond):
    (name,) = rules
    assert quality_fault(at_limit, replace(LOOSE, **rules)) is None
    assert quality_fault(beyond, LOOSE) is None
    assert quality_fault(beyond, replace(LOOSE, **rules)) == name


def test_every_rule_is_tried_and_prose_keeps_them_all():
    cases = test_a_rule_leaves_out_what_is_beyond_its_limit.pytestmark[0].args[1]
    assert {name for rules, *_ in cases for name in rules} == {rule.name for rule in fields(QualityRules)}
    paragraph = (
        "The river rises in the hills to the north and flows through three old towns before it meets the sea. Its "
        "upper course is steep and stony, while the lower valley is broad; farmers have grown barley there for "
        "centuries. In the year of the great flood, a bridge that had stood for two hundred winters was carried away."
    )
    assert quality_fault(paragraph, QualityRules()) is None
    assert quality_fault("", QualityRules()) == "min_words"


def shares_of_repeated_runs(text, size):
    """Shares of characters in the most frequent run of words, and in words of runs that stood before."""
    tokens = text.split()
    runs = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    total, counts = sum(map(len, tokens)), Counter(runs)
    most = max(counts.values(), default=0)
    top = max((sum(map(len, run)) * most for run, count in counts.items() if count == most > 1), default=0)
    covered = {place for start, run in enumerate(runs) if run in runs[:start] for place in range(start, start + size)}
    return top / total, sum(len(tokens[place]) for place in covered) / total


@pytest.mark.parametrize("size", range(2, 11))
def test_shares_of_repeated_runs_equal_plain_loops(prose, size):
    name, place, count = ("top", size - 2, 3) if size < 5 else ("duplicate", size - 5, 6)
    rule = f"max_{name}_ngram_characters"
    repeating = [" ".join([text, text[:90], text[20:]]) for text in prose(4)]
    for text in [*prose(8), *repeating, "a b a b a b c a b"]:
        share = shares_of_repeated_runs(text, size)[0 if size < 5 else 1]
        for limit in (share - 1e-9, share + 1e-9):
            if 0 <= limit <= 1:
                limits = tuple(limit if number == place else 1.0 for number in range(count))
                found = quality_fault(text, replace(LOOSE, **{rule: limits}))
                assert found == (rule if limit < share else None)


def evaluation(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_documents_with_evaluation_data_in_them_are_left_out(tmp_path):
    first = evaluation(tmp_path / "first.jsonl", [words(40), "too short to tell"])
    second = evaluation(tmp_path / "second.jsonl", [words(9, start=100)])
    steps = Steps(StepSettings(decontaminate=(first, second)))
    for start in (0, 27):
        text = f"Before. {words(13, start).upper().replace(' ', ', ')}. After."
        assert steps.apply(text) == (None, "in evaluation data first.jsonl")
    assert steps.apply(f"x {words(9, start=100)} y") == (None, "in evaluation data second.jsonl")
    for clean in (words(12), words(12, start=28), words(8, start=100), "too short to tell", "", words(13, start=500)):
        assert steps.apply(clean) == (clean, None)


def test_decontamination_equals_a_search_by_sets(tmp_path, prose):
    known, texts = prose(20), prose(60, seed=1)
    mixed = [text if number % 3 else text[:200] + " " + known[number % 20][50:180] for number, text in enumerate(texts)]
    steps = Steps(StepSettings(decontaminate=(evaluation(tmp_path / "a.jsonl", known),), ngram_words=6))

    def runs(text):
        tokens = words_of(text)
        return {tuple(tokens[start : start + 6]) for start in range(len(tokens) - 5)}

    expected = [bool(runs(text) & set.union(*map(runs, known))) for text in mixed]
    assert [steps.apply(text)[0] is None for text in mixed] == expected
    assert any(expected) and not all(expected)


def test_evaluation_data_without_long_texts_is_refused(tmp_path):
    name = evaluation(tmp_path / "a.jsonl", ["short"])
    with pytest.raises(ValueError, match=r"decontaminate: .*a\.jsonl' has no text of 8 words: leave it out"):
        Steps(StepSettings(decontaminate=(name,)))


def test_steps_are_taken_in_order_and_only_if_asked_for():
    text = "caf\u00c3\u00a9\x00  and more"
    assert Steps(StepSettings()).apply(text) == (text, None)
    assert Steps(StepSettings(mend_mojibake=True, normalize=True)).apply(text) == ("café and more", None)
    assert Steps(StepSettings(check_quality=True)).apply(text) == (None, "min_words")
    assert Steps(StepSettings(normalize=True, check_quality=True)).apply("  ") == (None, "min_words")


def test_hashes_of_runs_are_those_of_their_words():
    hashes = hash_words(list("abcabcd"))
    runs = hash_ngrams(hashes, 3)
    assert len(runs) == 5 and runs[0] == runs[3] and len(set(runs.tolist())) == 4
    assert len(hash_ngrams(hashes, 8)) == 0 and hash_ngrams(hashes, 1).tolist() == hashes.tolist()
    assert hash_words(["a"])[0] == 0xE6C632B61E964E1F  # xxh3 of "a": the same on every machine


def test_settings_are_those_of_a_recipe(tmp_path):
    name = evaluation(tmp_path / "a.jsonl", [words(20)])
    limits = "--quality.max_top_ngram_characters=[0.3, 0.2, 0.1]"
    given = ["--normalize", "--decontaminate", name, "--quality.min_words=7", limits]
    quality = QualityRules(min_words=7, max_top_ngram_characters=(0.3, 0.2, 0.1))
    expected = StepSettings(normalize=True, decontaminate=(name,), quality=quality)
    assert load_settings(StepSettings, given, "command") == expected
    assert load_settings(NearDuplicateSettings, ["--bands=20"], "command") == NearDuplicateSettings(bands=20)
    with pytest.raises(ConfigError, match="none.jsonl does not exist"):
        load_settings(StepSettings, ["--decontaminate", "none.jsonl"], "command")
