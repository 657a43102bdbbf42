r"""Formats: how words stand in a line so that no word can pretend to be anything else.

Every line of every format is one line of text: a front before each column, its word, and a
fixed terminator. Words are escaped where they hold what a format uses, so a line can be read
back: a table's, Markdown's and a sentence's with a backslash (`\n` a line feed, `\e` a word of
no letters, `\0` a list of no words), the others' by their own rules.
"""

import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["FORMATS", "Format", "FormatName", "Heads"]

FormatName = Literal["table", "json", "yaml", "html", "markdown", "sentence"]
Heads = Sequence[tuple[str | None, Sequence[str]]]  # (type's label where there are several, labels)


@dataclass(frozen=True, slots=True)
class Format:
    """How lines are put together. Numbers and the `null` of a missing value are written bare."""

    word: Callable[[str], str]
    words: Callable[[Sequence[str]], str]  # of a list
    null: str
    front: Callable[[str, int, bool], str]  # (label, position, a type's label stands at 0)
    terminator: str
    header: Callable[[str, Heads], str]  # (schema's name, heads)
    separators: str  # regular expression: where a tokenizer of our own may split
    keyed: bool  # labels stand in every line


def _backslashed(signs: str, *, empty: str) -> Callable[[str], str]:
    escapes = str.maketrans({"\n": "\\n", "\r": "\\r"} | {sign: f"\\{sign}" for sign in signs})
    return lambda text: text.translate(escapes) if text else empty


def _joined(
    item: Callable[[str], str], *, plus: str, empty: str, nothing: str
) -> Callable[[Sequence[str]], str]:
    """Write a list as words with a plus between them; a plus within a word is escaped."""

    def words(items: Sequence[str]) -> str:
        if not items:
            return nothing
        return " + ".join(item(one).replace("+", plus) if one else empty for one in items)

    return words


def _bracketed(word: Callable[[str], str]) -> Callable[[Sequence[str]], str]:
    return lambda items: f"[{', '.join(word(item) for item in items)}]"


def _labels_between(opening: str, between: str) -> Callable[[str, int, bool], str]:
    return lambda _label, position, _typed: between if position else opening


def _with_labels(word: Callable[[str], str], opening: str) -> Callable[[str, int, bool], str]:
    return lambda label, position, _typed: f"{', ' if position else opening}{word(label)}: "


# A table: the paper's.
_table_word = _backslashed("\\,|", empty="")


def _table_header(_name: str, heads: Heads) -> str:
    return "".join(
        f"{'' if kind is None else f'{_table_word(kind)}: '}{'|'.join(map(_table_word, labels))}\n"
        for kind, labels in heads
    )


# JSON: a line is an object.
def _json_word(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# YAML: a line is a flow mapping in a list. What YAML 1.1 could take for anything but text, and
# what it does not allow to stand as it is, is quoted as JSON quotes it.
_PLAIN = re.compile(r"[A-Za-z](?:[\w ()./+-]*[\w).+-])?", re.ASCII)
_NO_TEXT = {"y", "n", "yes", "no", "true", "false", "on", "off", "null"}
_UNPRINTABLE = re.compile(
    "[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)


def _yaml_word(text: str) -> str:
    if _PLAIN.fullmatch(text) and text.lower() not in _NO_TEXT:
        return text
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", _json_word(text))


# HTML: a line is a row.
def _html_word(text: str) -> str:
    if not text:
        return "<i></i>"
    return html.escape(text, quote=False).replace("\n", "&#10;").replace("\r", "&#13;")


def _html_header(_name: str, heads: Heads) -> str:
    rows = (
        "</th><th>".join(map(_html_word, labels if kind is None else (kind, *labels)))
        for kind, labels in heads
    )
    return "<table>\n" + "".join(f"<tr><th>{row}</th></tr>\n" for row in rows)


# Markdown: a line is a row.
_markdown_word = _backslashed("\\|", empty="\\e")


def _markdown_header(_name: str, heads: Heads) -> str:
    rows = [
        [_markdown_word(cell) for cell in (labels if kind is None else (kind, *labels))]
        for kind, labels in heads
    ]
    return "".join(f"| {' | '.join(row)} |\n|{'---|' * len(row)}\n" for row in rows)


# A sentence: plain words.
_sentence_word = _backslashed("\\;", empty="\\e")


def _sentence_front(label: str, position: int, typed: bool) -> str:  # noqa: FBT001 - of a Format
    if typed and position == 0:
        return ""
    opening = ": " if typed and position == 1 else "; " if position else ""
    return f"{opening}{_sentence_word(label)} is "


FORMATS: Mapping[FormatName, Format] = {
    "table": Format(
        word=_table_word,
        words=_joined(_table_word, plus="\\+", empty="\\e", nothing=""),
        null="",
        front=_labels_between("", ", "),
        terminator="\n",
        header=_table_header,
        separators=r"(?<!\\), |(?<!\\)\|",
        keyed=False,
    ),
    "json": Format(
        word=_json_word,
        words=_bracketed(_json_word),
        null="null",
        front=_with_labels(_json_word, "{"),
        terminator="}\n",
        header=lambda name, _: f'{{"log": {_json_word(name)}}}\n',
        separators=r', "(?=(?:[^"\\]|\\.)*": )',
        keyed=True,
    ),
    "yaml": Format(
        word=_yaml_word,
        words=_bracketed(_yaml_word),
        null="null",
        front=_with_labels(_yaml_word, "- {"),
        terminator="}\n",
        header=lambda name, _: f"{_yaml_word(name)}:\n",
        separators=r', (?=(?:"(?:[^"\\]|\\.)*"|[A-Za-z][\w ()./+-]*): )',
        keyed=True,
    ),
    "html": Format(
        word=_html_word,
        words=_joined(_html_word, plus="&#43;", empty="<i></i>", nothing="<ul></ul>"),
        null="",
        front=_labels_between("<tr><td>", "</td><td>"),
        terminator="</td></tr>\n",
        header=_html_header,
        separators=r"</td><td>|</th><th>",
        keyed=False,
    ),
    "markdown": Format(
        word=_markdown_word,
        words=_joined(_markdown_word, plus="\\+", empty="\\e", nothing="\\0"),
        null="",
        front=_labels_between("| ", " | "),
        terminator=" |\n",
        header=_markdown_header,
        separators=r" \| ",
        keyed=False,
    ),
    "sentence": Format(
        word=_sentence_word,
        words=_joined(_sentence_word, plus="\\+", empty="\\e", nothing="\\0"),
        null="",
        front=_sentence_front,
        terminator=".\n",
        header=lambda name, _: f"{_sentence_word(name)}, one event a line, oldest first:\n",
        separators=r"(?<!\\); |: ",
        keyed=True,
    ),
}
