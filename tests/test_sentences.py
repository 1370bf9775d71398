import pytest

from data_prep.sentences import split_sentences


def test_marks_followed_by_a_new_beginning_end_sentences():
    text = 'It rains. "Does it?" she asked. (It did.) 12 people left! „Ja.“ Well… Yes.'
    assert split_sentences(text) == [
        "It rains.",
        '"Does it?" she asked.',
        "(It did.)",
        "12 people left!",
        "„Ja.“",
        "Well…",
        "Yes.",
    ]


@pytest.mark.parametrize(
    "sentence",
    [
        "Dr. Smith met J. R. R. Tolkien in the U.S. Senate.",
        "It cost 3.5 million, i.e. Much more than in Jan. 1990.",
        "See vol. 3, pp. 12 and No. 7 of the series.",
        "The firm Yahoo! is one, etc. and so on.",
        "He wrote to Gen. Lee, St. Louis, vs. Grant.",
    ],
)
def test_abbreviations_initials_and_decimals_end_nothing(sentence):
    assert split_sentences(sentence) == [sentence]


def test_blank_lines_end_sentences_and_single_breaks_do_not():
    assert split_sentences("A heading\n\nA line that\ngoes on.  Next one.\n \n\nLast") == [
        "A heading",
        "A line that goes on.",
        "Next one.",
        "Last",
    ]


def test_scripts_without_spaces_and_capitals():
    assert split_sentences("今日は雨。明日は？はい！") == ["今日は雨。", "明日は？", "はい！"]
    assert split_sentences("Это дом. Он стар.") == ["Это дом.", "Он стар."]


def test_nothing_is_lost():
    text = "One. Two? (three.) four... Five!\n\nSix: 6.5 e.g. Seven. "
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())
    assert split_sentences(" \n\n ") == []
