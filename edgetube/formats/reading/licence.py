"""The licence that a model card states, and what a user has to know about it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile

FENCE = "---"
"""The lines around the metadata of a model card."""

FORBIDDING = re.compile(r"(?i)\bnc\b|non-?commercial")
"""In the name of a licence that forbids commercial use: `cc-by-nc-4.0`, `fair-noncommercial-research-license`."""

UNNAMED = re.compile(r"(?i)^(other|unknown)\b|research")
"""What says nothing about its terms, or allows research alone."""


def stated(card: str) -> str:
    """The licence in the metadata of a model card, several separated by commas; empty where it states none.

    That of one without a name of its own on the hub is `other (its name)`.
    """
    lines = card.lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != FENCE:
        return ""
    found: dict[str, list[str]] = {}
    for key, value in _entries(takewhile(lambda line: line.rstrip() != FENCE, lines[1:])):
        found.setdefault(key, []).append(value)
    licence = ", ".join(found.get("license", ()))
    name = ", ".join(found.get("license_name", ()))
    return f"{licence} ({name})" if licence and name else licence


def _entries(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Keys and values of YAML's outermost mapping, one for each item of a list; nested mappings are left out."""
    key = ""
    for line in lines:
        value = re.sub(r"(^|\s)#.*", "", line).rstrip()
        if not value.startswith((" ", "-")):
            key, _, value = value.partition(":")
        elif value.lstrip().startswith("- "):
            value = value.lstrip()[2:]
        else:
            continue
        if value := value.strip().strip("'\"[]"):
            yield key, value


def notes(licence: str) -> tuple[str, ...]:
    """What a user has to know about a licence; nothing about one whose name says that commercial use is allowed."""
    if FORBIDDING.search(licence):
        return (f"its licence, {licence}, forbids commercial use",)
    if UNNAMED.search(licence):
        return (f"its licence is {licence}: read its terms before you use the model",)
    return ()
