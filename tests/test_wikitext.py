import pytest

from data_prep.wikitext import clean_wikitext

REST = "The rest of the page is kept as it is."


def test_links_quotes_and_entities_become_words():
    text = (
        "'''Aardvark''' is a [[mammal]] of [[Africa|the south]]&nbsp;&ndash; [http://x.org its ''page''] http://y.org."
    )
    assert clean_wikitext(text) == "Aardvark is a mammal of the south – its page"


def test_paragraphs_are_blocks_of_lines():
    text = "First line of one paragraph\ncontinues here.\n\nSecond paragraph stands alone."
    assert clean_wikitext(text) == "First line of one paragraph\ncontinues here.\n\nSecond paragraph stands alone."


def test_headings_and_sections_of_apparatus_go():
    text = (
        f"{REST}\n== History ==\nIn the beginning there was a town.\n== References ==\nSmith, J. A book of some kind.\n"
        "=== Notes of mine ===\nThis belongs to the references too.\n== Economy ==\nThe town trades in salt and wool."
    )
    assert clean_wikitext(text).split("\n\n") == [
        REST,
        "In the beginning there was a town.",
        "The town trades in salt and wool.",
    ]


def test_lists_keep_only_sentences():
    whole = "This item is a whole sentence, and so it stays in."
    assert clean_wikitext(f"* Short.\n* An item that is long enough but has no end of a sentence\n# {whole}") == whole


@pytest.mark.parametrize(
    "markup",
    [
        "{{Infobox town|name={{lang|fr|Ville}}|area=5}}",
        "{{x|}}",
        "{{Infobox\n|area=5\n|}}",
        "{{outer|{{inner|}}}}",
        "\n{|class=x\n|-\n| cell {{t|}}\n|}\n",
        "\n:{| a\n|\n{| b\n|}\n|}\n",
        "{{box|\n{|\n| cell\n|}}}",
        "[[File:A.jpg|thumb|A [[nested|link]] and [[File:B.jpg|10px]] more]]",
        "[[Category:Towns]]",
        "[[de:Stadt]]",
        "[[Файл:A.jpg|мини|текст]]",
        '<ref name="x"/>',
        "<ref name=x />",
        "<ref>{{cite book|title=A}} p. 5</ref>",
        "<!-- a comment with {{ and [[ in it -->",
        "<math>\\frac{{a}}{{b}}</math>",
        "<nowiki>{{ [[ </nowiki>",
        "<gallery>\nFile:A.jpg|text\n</gallery>",
        "&lt;ref&gt;doubly escaped&lt;/ref&gt;",
        "&amp;lt;ref&amp;gt;thrice escaped&amp;lt;/ref&amp;gt;",
        "__NOTOC__",
        "<br/>",
    ],
)
def test_markup_leaves_nothing(markup):
    assert clean_wikitext(f"{markup}{REST}") == REST
    assert clean_wikitext(f"{REST}{markup}") == REST


@pytest.mark.parametrize(
    "opening", ["{{", "{{Infobox|a=", "\n{|", "[[", "[[File:A.jpg|thumb|", "<ref>", "<!--", "<math>"]
)
def test_what_is_unclosed_loses_no_page(opening):
    after = "\n\nAnother paragraph follows it [[here]].\n\n== Section ==\nAnd a last one {{note}} ends it."
    cleaned = clean_wikitext(f"{REST}\n{opening}{after}")
    assert cleaned.startswith(REST)
    assert "Another paragraph follows it here." in cleaned
    assert cleaned.endswith("And a last one ends it.")


@pytest.mark.parametrize("closing", ["}}", "\n|}\n", "]]", "</ref>", "-->"])
def test_a_stray_end_after_an_unclosed_beginning_takes_no_section(closing):
    opening = {"}}": "{{", "\n|}\n": "\n{|\n", "]]": "[[File:A.jpg|thumb|", "</ref>": "<ref>", "-->": ""}[closing]
    sections = "\n== Section ==\nThis paragraph is one more.\n\n", "\n== End ==\nHere it ends for good."
    cleaned = clean_wikitext(f"{opening}\n\n{REST}{sections[0]}{closing}{sections[1]}")
    assert REST in cleaned and "This paragraph is one more." in cleaned and "Here it ends for good." in cleaned


def test_an_unclosed_template_in_a_table_ends_with_the_table():
    assert clean_wikitext(f"{{|\n| cell {{{{broken\n|}}\n{REST}") == REST


def test_templates_that_carry_words_are_expanded():
    text = "It lies {{convert|5|km|mi}} north{{snd}}in {{nowrap|New York}}, called {{lang|fr|[[Paris|Ville]]}} there."
    assert clean_wikitext(text) == "It lies 5 km north – in New York, called Ville there."


def test_gaps_that_templates_leave_are_closed():
    text = "The town ({{IPA|x}}; born {{x}}, in {{y}} 1950) is big ({{x}}, {{y}}) and old {{z}}."
    assert clean_wikitext(text) == "The town (born, in 1950) is big and old."


def test_hostile_pages_take_linear_time():
    for piece in ("{{", "[[", "<ref>", "<!--", "{|\n", "[http://x ", "\n\n[[", "=", "("):
        assert clean_wikitext(piece * 50_000 + f"\n\n== A ==\n{REST}").endswith(REST)


def test_an_empty_page_is_empty():
    assert clean_wikitext("") == ""
    assert clean_wikitext("{{disambiguation}}\n* [[A]]\n* [[B]]") == ""
