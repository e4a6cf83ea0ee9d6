"""A tiny template language: choices in square brackets, fields in braces.

`[One day|One morning], {hero} found {a thing}.` picks one choice and fills the fields. Choices nest and may be empty.
A field whose first letter is a capital is filled with its value capitalised. "a" becomes "an" before a vowel.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias

Node: TypeAlias = "str | Field | tuple[tuple[Node, ...], ...]"  # text, a field, or a choice between sequences


class Field(str):
    """The name of a value to fill in."""

    __slots__ = ()


_TOKEN = re.compile(r"[\[\]|]|\{\w+\}|[^\[\]|{}]+")
_ARTICLE = re.compile(r"\b([Aa]) (?=(?!one\b|useful|usual)[aeiouAEIOU]|honest|hour)")
_SPACES = re.compile(r" {2,}")


def expand(template: str, chooser: random.Random, values: Mapping[str, str | Sequence[str]]) -> str:
    """The template with every choice made; a field that names a list takes a fresh pick each time."""
    out: list[str] = []
    _write(_parse(template), chooser, values, out)
    return tidy("".join(out))


def tidy(text: str) -> str:
    return _SPACES.sub(" ", _ARTICLE.sub(r"\1n ", text)).strip()


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


@cache
def read_sections(file_name: str) -> Mapping[str, str]:
    """A file of templates beside this one: each "== name" with the text below it."""
    text = (Path(__file__).parent / file_name).read_text(encoding="utf-8")
    sections = (section.split("\n", 1) for section in text.split("\n== ")[1:])
    return {name: body.strip() for name, body in sections}


def _write(
    nodes: Sequence[Node], chooser: random.Random, values: Mapping[str, str | Sequence[str]], out: list[str]
) -> None:
    for node in nodes:
        if isinstance(node, Field):
            value = values[node.lower()]
            text = value if isinstance(value, str) else chooser.choice(value)
            out.append(capitalised(text) if node[0].isupper() else text)
        elif isinstance(node, str):
            out.append(node)
        else:
            _write(chooser.choice(node), chooser, values, out)


@cache
def _parse(template: str) -> tuple[Node, ...]:
    tokens = _TOKEN.findall(template)
    if "".join(tokens) != template:
        raise ValueError(f"unbalanced braces in {template!r}")
    nodes, rest = _parse_sequence(tokens, 0)
    if rest != len(tokens):
        raise ValueError(f"unbalanced brackets in {template!r}")
    return nodes


def _parse_sequence(tokens: Sequence[str], at: int) -> tuple[tuple[Node, ...], int]:
    nodes: list[Node] = []
    while at < len(tokens) and tokens[at] not in ("]", "|"):
        if tokens[at] == "[":
            choice, at = _parse_choice(tokens, at + 1)
            nodes.append(choice)
        else:
            token = tokens[at]
            nodes.append(Field(token[1:-1]) if token[0] == "{" else token)
            at += 1
    return tuple(nodes), at


def _parse_choice(tokens: Sequence[str], at: int) -> tuple[tuple[tuple[Node, ...], ...], int]:
    branches: list[tuple[Node, ...]] = []
    while True:
        branch, at = _parse_sequence(tokens, at)
        branches.append(branch)
        if at == len(tokens):
            raise ValueError("a choice is not closed")
        at += 1
        if tokens[at - 1] == "]":
            return tuple(branches), at
