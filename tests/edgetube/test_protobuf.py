"""The wire format of protobuf, against the vendor's own writer and reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetube import protobuf


@given(st.lists(st.text(max_size=300), max_size=4), st.integers(0, 2**63 - 1))
def test_fields_are_those_that_were_written(names: Any, version: Any) -> None:
    model = onnx.ModelProto(ir_version=version, graph=onnx.GraphProto(node=[onnx.NodeProto(output=names)]))
    fields = protobuf.parse(memoryview(model.SerializeToString()))
    assert fields[1] == [version]
    node = protobuf.parse(protobuf.parse(fields[7][0])[1][0])
    assert [bytes(value).decode() for value in node.get(2, [])] == names


@given(st.binary(max_size=400), st.integers(1, 100))
def test_a_field_that_is_written_is_read(content: Any, number: Any) -> None:
    assert protobuf.parse(memoryview(protobuf.field(number, content))) == {number: [content]}


def test_messages_one_behind_the_other_are_one(tmp_path: Path) -> None:
    """What adding outputs to a file builds on."""
    graph = onnx.GraphProto(name="g", output=[onnx.ValueInfoProto(name="first")])
    added = protobuf.field(7, protobuf.field(12, protobuf.field(1, b"second")))
    read = onnx.ModelProto.FromString(onnx.ModelProto(graph=graph).SerializeToString() + added)
    assert [value.name for value in read.graph.output] == ["first", "second"]
    assert read.graph.name == "g"


def test_what_is_cut_off_or_no_message_is_refused() -> None:
    with pytest.raises(ValueError, match="cut off"):
        protobuf.parse(memoryview(protobuf.field(1, b"abc")[:-1]))
    with pytest.raises(ValueError, match="wire type 3"):
        protobuf.parse(memoryview(b"\x0b"))
    with pytest.raises(ValueError, match="a number where a message was expected"):
        protobuf.message(3)


def test_text() -> None:
    (value,) = protobuf.parse(memoryview(protobuf.text_field(3, "größe")))[3]
    assert protobuf.text(value) == "größe"
    with pytest.raises(ValueError, match="a number where a message was expected"):
        protobuf.text(3)
