"""Wikitext to prose, in a few linear passes: whatever a page leaves unclosed costs its own brackets, never the page."""

import html
import re
from collections import defaultdict
from collections.abc import Callable, Iterator

# Elements whose content is no prose. <div> stays, since it may hold the page; <code>, since sentences use it.
_DROPPED = (
    "ref|math|gallery|timeline|table|score|syntaxhighlight|source|pre|imagemap|chem|ce|hiero|poem|templatestyles|nowiki"
)
# Both token patterns begin with a set of characters: `re` then skips plain text several times faster.
_ELEMENT = re.compile(
    rf"[<\n](?:(?<=<)(?:(?:{_DROPPED})\b[^<>]*/>|(?P<open>{_DROPPED})\b[^<>]*>|/(?P<close>{_DROPPED})\s*>)|(?<=\n)==)",
    re.I,
)
# Tables begin and end at the start of a line. `|}}` closes a template whose last argument is empty, `|}}}` a table and
# then a template.
_BRACES = re.compile(r"[{}\n](?:(?<=\{)\{|(?<=\})\}|(?<=\n)(?:[ \t:*#]*\{\||[ \t]*\|\}(?!\}(?!\}))|==))")
_BRACE_ROLES = {
    "{{": ("open", "template"),
    "}}": ("close", "template"),
    "{|": ("open", "table"),
    "|}": ("close", "table"),
    "==": ("heading", ""),
}
_PLAIN_LINK = re.compile(r"\[\[(?:[^\[\]|:\n]*\|)?([^\[\]|:\n]*)\]\]")
_LINK_TOKEN = re.compile(r"\[\[|\]\]|\n\n")
# Links that show no words: files and categories (in the names of several Wikipedias) and pages in other languages.
_WORDLESS_LINK = re.compile(
    r"\s*(?:file|image|media|category|datei|bild|kategorie|fichier|catégorie|archivo|categoría|immagine|categoria"
    r"|ficheiro|bestand|categorie|plik|kategoria|файл|картинка|категория|категорія|simple)\s*:"
    r"|\s*(?-i:[a-z]{2,3}(?:-[a-z]+)*):\S",
    re.I,
)

# Templates that stand inside sentences and carry words: without them "about {{convert|5|km}} north" has a hole.
_WORD_TEMPLATE = re.compile(
    r"\{\{\s*(?:nowrap|nobr|abbr|nihongo|lang\|[\w-]+|transl\|[\w-]+)\s*\|"
    r"((?:[^{}|=\[\]]|\[\[[^\[\]{}]*\]\])*)(?:\|[^{}\[\]]*)?\}\}",
    re.I,
)
_CONVERT = re.compile(r"\{\{\s*(?:convert|cvt)\s*\|\s*([^{}|]*)\|\s*([^{}|]*)[^{}]*\}\}", re.I)
_DASH = re.compile(r"\{\{\s*(?:ndash|snd|spnd|spaced ndash|dash|mdash|emdash)\s*\}\}", re.I)

_COMMENT = re.compile(r"<!--.*?-->", re.S)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<!--")
_EXTERNAL_LINK = re.compile(r"\[(?:(?:https?:|ftp:)?//|mailto:)[^\s\]]+\s*([^\[\]\n]*)\]")
_URL = re.compile(r"https?://\S+")
_MAGIC_WORD = re.compile(r"__[A-Z]{3,}__")
_LEFT_OVER = ("'''''", "'''", "''", "{{", "}}", "[[", "]]")

_LIST_MARK = re.compile(r"[*#:;]+\s*")
_SKIPPED_SECTIONS = re.compile(
    r"references|external links|see also|further reading|notes|bibliography|sources|citations|notes and references"
    r"|references and notes|footnotes|gallery|discography|filmography|works cited",
    re.I,
)
_SPACES = re.compile(r"  +")
_EMPTY_PARENTHESES = re.compile(r"\(\s*(?:[,;:\-–]\s*)*\)")
_PARENTHESIS_START = re.compile(r"\(\s*(?:[,;:]\s*)+|\( +")
_SENTENCE_END = (".", "!", "?", '."', '!"', '?"', ".”", "!”", "?”", ".)")
_SHORTEST_PARAGRAPH, _SHORTEST_LIST_ITEM = 20, 40  # characters


def clean_wikitext(wikitext: str) -> str:
    """The prose of a page: paragraphs separated by a blank line, without markup, headings, tables and apparatus.

    Sections of references and the like are left out, and so are list items that are no sentences.
    """
    text = _unescape_tags(_drop_comments("\n" + wikitext.replace("\r", "")))
    text = _cut_balanced(text, _ELEMENT, _element_role)
    text = _cut_balanced(_expand_word_templates(text), _BRACES, _brace_role)
    text = _resolve_links(_EXTERNAL_LINK.sub(r"\1", text))
    text = _TAG.sub("", html.unescape(_TAG.sub("", text)))
    return "\n\n".join(_paragraphs(_tidy(text)))


def _drop_comments(text: str) -> str:
    last = text.rfind("-->") + 3  # beyond it every <!-- is unclosed, and looking for its end would be quadratic
    return _COMMENT.sub("", text[:last]) + text[last:] if last > 2 else text


def _unescape_tags(text: str) -> str:
    """Show doubly escaped tags (&amp;lt;ref&amp;gt; in the dump) to the passes that remove tags."""
    if "&lt;" in text or "&amp;lt;" in text:
        text = text.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    return text


def _expand_word_templates(text: str) -> str:
    text = _CONVERT.sub(r"\1 \2", text)
    return _DASH.sub(" – ", _WORD_TEMPLATE.sub(r"\1", text))


def _brace_role(token: re.Match[str]) -> tuple[str, str]:
    return _BRACE_ROLES[token[0][-2:]]


def _element_role(token: re.Match[str]) -> tuple[str, str]:
    role = token.lastgroup or ("heading" if token[0] == "\n==" else "self-closing")
    return role, (token["open"] or token["close"] or "").lower()


def _cut_balanced(text: str, tokens: re.Pattern[str], role_of: Callable[[re.Match[str]], tuple[str, str]]) -> str:
    """Cut every balanced span, nested ones with it; where one end is missing, cut only the other end's brackets.

    A closing token closes the nearest opening one of its kind, over unclosed ones of other kinds. No span reaches over
    a heading: one that would has lost its end, and the sections after it stay.
    """
    cuts: list[tuple[int, int]] = []  # disjoint, ascending
    unclosed: dict[str, list[int]] = defaultdict(list)  # of each kind, where in cuts its brackets stand
    for token in tokens.finditer(text):
        role, kind = role_of(token)
        if role == "heading":
            unclosed.clear()
            continue
        cuts.append(token.span())
        if role == "open":
            unclosed[kind].append(len(cuts) - 1)
        elif role == "close":
            _close(kind, unclosed, cuts)
    return _without(text, cuts)


def _close(kind: str, unclosed: dict[str, list[int]], cuts: list[tuple[int, int]]) -> None:
    if unclosed[kind]:
        first = unclosed[kind].pop()
        for inner in unclosed.values():
            while inner and inner[-1] > first:
                inner.pop()
        cuts[first:] = [(cuts[first][0], cuts[-1][1])]


def _without(text: str, cuts: list[tuple[int, int]]) -> str:
    kept, position = [], 0
    for start, stop in cuts:
        kept.append(text[position:start])
        position = stop + (text[start - 1 : start] == "\n" == text[stop : stop + 1])  # a line of its own goes whole
    kept.append(text[position:])
    return "".join(kept)


def _resolve_links(text: str) -> str:
    """[[target|label]] to label, from the inside out; files, categories and other languages go, captions with them."""
    text = _PLAIN_LINK.sub(r"\1", text)
    levels: list[list[str]] = [[]]
    position = 0
    for token in _LINK_TOKEN.finditer(text):
        levels[-1].append(text[position : token.start()])
        position = token.end()
        if token[0] == "[[":
            levels.append([])
        elif token[0] == "]]" and len(levels) > 1:
            link = "".join(levels.pop())
            levels[-1].append(_label(link))
        elif token[0] == "\n\n":  # no link reaches over a blank line: what is open here was never closed
            _keep_unclosed(levels)
            levels[0].append("\n\n")
    _keep_unclosed(levels)
    return "".join([*levels[0], text[position:]])


def _keep_unclosed(levels: list[list[str]]) -> None:
    for level in levels[1:]:
        levels[0] += level
    del levels[1:]


def _label(link: str) -> str:
    if _WORDLESS_LINK.match(link):
        return ""
    target, _, label = link.partition("|")
    return label or target.lstrip(":")


def _tidy(text: str) -> str:
    """Without quotes, addresses and magic words, and without the gaps that removed markup leaves before punctuation."""
    for token in _LEFT_OVER:
        text = text.replace(token, "")
    text = _MAGIC_WORD.sub("", _URL.sub("", text))
    text = _PARENTHESIS_START.sub("(", _EMPTY_PARENTHESES.sub("", text))
    text = _SPACES.sub(" ", text.replace("\xa0", " ").replace("\t", " "))
    for mark in ",.;:!?)":
        text = text.replace(" " + mark, mark)
    return text


def _paragraphs(text: str) -> Iterator[str]:
    """Blocks of lines between blank lines, and sentences from lists; nothing from the sections that are left out."""
    block: list[str] = []
    skipped_level = 0  # level of the heading whose section, subsections included, is left out; 0: none
    for line in [*map(str.strip, text.split("\n")), ""]:
        first = line[:1]
        if first and first not in "=*#:;":
            if not skipped_level and first not in "|!{}":
                block.append(line)
            continue
        if (paragraph := "\n".join(block)) and len(paragraph) >= _SHORTEST_PARAGRAPH:
            yield paragraph
        block.clear()
        if first == "=":
            skipped_level = _skipped_level(line, skipped_level)
        elif not skipped_level and _is_sentence(item := _LIST_MARK.sub("", line, count=1)):
            yield item


def _skipped_level(line: str, skipped_level: int) -> int:
    """The level after a heading line: a section that is left out ends at the next heading of its own level or above."""
    level = len(line) - len(line.lstrip("="))
    if not line.endswith("=") or 0 < skipped_level < level:
        return skipped_level
    return level if _SKIPPED_SECTIONS.fullmatch(line.strip("= ")) else 0


def _is_sentence(item: str) -> bool:
    return len(item) >= _SHORTEST_LIST_ITEM and item.endswith(_SENTENCE_END)
