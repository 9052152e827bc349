"""As much GraphQL as a stand-in server needs: read a document, and take from plain values the fields it asks for.

No schema: a field that a value does not have is null, which every client must bear from an older server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

TOKEN = re.compile(
    r'"""(?:.|\n)*?"""|"(?:\\.|[^"\\])*"|\.\.\.|[_A-Za-z]\w*|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|[{}()\[\]:=!|$@&]|#[^\n]*'
)


@dataclass
class Field:
    name: str
    alias: str
    arguments: dict[str, Any] = field(default_factory=dict)
    selection: list[Field | Fragment] = field(default_factory=list)
    wanted: bool = True  # by @include and @skip


@dataclass
class Fragment:
    """``...Name``, or ``... on Type {…}`` with its own selection."""

    name: str | None
    selection: list[Field | Fragment] = field(default_factory=list)


def execute(document: str, variables: Mapping[str, Any], root: Mapping[str, Any]) -> dict[str, Any]:
    """The data that answers a document with one operation.

    Args:
        root: values by field. A dict is an object, a list a list of values; a function of the field's arguments (one
            dict, without those that are null) gives the value.
    """
    reader = _Reader(document, variables)
    return _select(root, reader.operation, reader.fragments)


def _select(value: Any, selection: list[Field | Fragment], fragments: dict[str, list[Field | Fragment]]) -> Any:
    if isinstance(value, list):
        return [_select(item, selection, fragments) for item in value]
    if value is None or not selection:
        return value
    found: dict[str, Any] = {}
    for part in selection:
        if isinstance(part, Fragment):
            inner = part.selection if part.name is None else fragments[part.name]
            found |= _select(value, inner, fragments)
        elif part.wanted:
            item = value.get(part.name)
            if callable(item):
                item = item(part.arguments)
            found[part.alias] = _select(item, part.selection, fragments)
    return found


class _Reader:
    """Recursive descent over the tokens; variables are put in while reading."""

    def __init__(self, document: str, variables: Mapping[str, Any]) -> None:
        self.tokens: Iterator[str] = (t for t in TOKEN.findall(document) if not t.startswith("#"))
        self.variables = dict(variables)
        self.fragments: dict[str, list[Field | Fragment]] = {}
        self.operation: list[Field | Fragment] = []
        self.next = ""
        self.take()
        while self.next:
            self.definition()

    def take(self, expected: str | None = None) -> str:
        token, self.next = self.next, next(self.tokens, "")
        if expected is not None and token != expected:
            raise ValueError(f"expected {expected!r} in the GraphQL document, found {token!r}")
        return token

    def definition(self) -> None:
        if self.next != "{" and self.take() == "fragment":
            name = self.take()
            self.take("on")
            self.take()
            self.fragments[name] = self.selection()
            return
        while self.next not in ("(", "{"):
            self.take()
        if self.next == "(":
            self.declarations()
        self.operation = self.selection()

    def declarations(self) -> None:
        """``($entity: String!, $perPage: Int = 50)``: only the defaults matter."""
        self.take("(")
        while self.next != ")":
            self.take("$")
            name = self.take()
            while self.next not in ("$", "=", ")"):
                self.take()
            if self.next == "=":
                self.take()
                self.variables.setdefault(name, self.value())
        self.take(")")

    def selection(self) -> list[Field | Fragment]:
        parts: list[Field | Fragment] = []
        self.take("{")
        while self.next != "}":
            parts.append(self.fragment() if self.next == "..." else self.field())
        self.take("}")
        return parts

    def fragment(self) -> Fragment:
        self.take("...")
        if self.next not in ("on", "{"):
            return Fragment(self.take())
        if self.next == "on":
            self.take()
            self.take()
        return Fragment(None, self.selection())

    def field(self) -> Field:
        name = alias = self.take()
        if self.next == ":":
            self.take()
            name = self.take()
        found = Field(name, alias)
        if self.next == "(":
            found.arguments = self.arguments()
        while self.next == "@":
            self.take()
            directive = self.take()
            found.wanted = bool(self.arguments().get("if")) == (directive == "include")
        if self.next == "{":
            found.selection = self.selection()
        return found

    def arguments(self) -> dict[str, Any]:
        return self.object("(", ")")

    def object(self, opening: str, closing: str) -> dict[str, Any]:
        found = {}
        self.take(opening)
        while self.next != closing:
            name = self.take()
            self.take(":")
            found[name] = self.value()
        self.take(closing)
        return {name: value for name, value in found.items() if value is not None}

    def value(self) -> Any:
        if self.next == "{":
            return self.object("{", "}")
        token = self.take()
        if token == "$":
            return self.variables.get(self.take())
        if token == "[":
            items = []
            while self.next != "]":
                items.append(self.value())
            self.take("]")
            return items
        if token[0] in '"-0123456789' or token in ("true", "false", "null"):
            return json.loads(token)
        return token  # a value of an enumeration
