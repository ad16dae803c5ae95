"""Names of tensors in the dialects of the transformers library: of version 5 in memory, and of its files."""

from __future__ import annotations

import re

_MODERN = (
    (re.compile(r"\bencoder\.layer\."), "layers."),
    (re.compile(r"\.attention\.attention\.(query|key|value)\."), r".attention.\1."),
    (
        re.compile(r"\.attention\.(q|k|v)_proj\."),
        lambda m: f".attention.{ {'q': 'query', 'k': 'key', 'v': 'value'}[m[1]] }.",
    ),
    (re.compile(r"\.attention\.attention\.q_bias$"), ".attention.query.bias"),
    (re.compile(r"\.attention\.attention\.v_bias$"), ".attention.value.bias"),
    (re.compile(r"\.attention\.output\.dense\."), ".attention.o_proj."),
    (re.compile(r"\.intermediate\.dense\."), ".mlp.fc1."),
    (re.compile(r"(layers\.\d+)\.output\.dense\."), r"\1.mlp.fc2."),
)


def one_dialect(name: str) -> str:
    """A tensor's name in one dialect, whether a folder has those of transformers 4 or 5.

    `encoder.layer.0.attention.attention.query.weight` and `layers.0.attention.q_proj.weight` become
    `layers.0.attention.query.weight`, and so on.
    """
    for pattern, new in _MODERN:
        name = pattern.sub(new, name)
    return name
