"""What is nearly right is refused in one line, and what is right comes back as it is."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetube import strict
from edgetube.errors import FormatError, printable

texts = st.text(st.characters(codec="utf-8")).filter(lambda text: printable(text) == text)
documents = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


class TestJson:
    @given(documents)
    def test_what_json_writes_comes_back(self, document: Any) -> None:
        assert strict.parse_json(json.dumps(document), "x") == document
        assert strict.parse_json(json.dumps(document, ensure_ascii=False).encode(), "x") == document

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b"", "x is not JSON: Expecting value"),
            (b'{"a": 1} 2', "Extra data"),
            (b"\xff", "x is not JSON: 'utf-8'"),
            (b"\xef\xbb\xbf{}", "x is not JSON"),
            (b'{"a": NaN}', "x: NaN is not a number of JSON"),
            (b"[Infinity]", "Infinity is not a number of JSON"),
            (b"[-Infinity]", "-Infinity is not a number of JSON"),
            (b"[1e999]", "the number 1e999 is too large"),
            (b"1" * 5000, "the integer 11111111111111111111... has 5000 digits"),
            (b"123456789012345678901", "has 21 digits"),
            (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' stands twice in an object"),
            (b"[" * 200_000 + b"]" * 200_000, "nested deeper than 32 levels"),
            (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested deeper than 32 levels"),
            (b"[" * 32 + b"1" + b"]" * 32, "nested deeper than 32 levels"),
            (rb'["\u001b[2J"]', r"x: '\\x1b\[2J' has control characters"),
            (rb'{"a\u0007": 1}', "has control characters"),
            (rb'["\ud800"]', "has control characters"),
            (rb'["\u202e"]', "has control characters"),
            (rb'["a\nb"]', "has control characters"),
        ],
    )
    def test_what_is_nearly_json_is_refused(self, text: bytes, message: str) -> None:
        with pytest.raises(FormatError, match=message) as caught:
            strict.parse_json(text, "x")
        assert len(str(caught.value)) < 200
        assert str(caught.value).isprintable()

    def test_the_deepest_document(self) -> None:
        assert strict.parse_json(b"[" * 31 + b"1" + b"]" * 31, "x")

    def test_twenty_characters_of_an_integer(self) -> None:
        assert strict.parse_json(b"-1234567890123456789", "x") == -1234567890123456789

    def test_many_different_keys_are_no_work(self) -> None:
        many = {str(i): i for i in range(200_000)}
        text = json.dumps(many)[:-1] + ', "7": 1}'
        with pytest.raises(FormatError, match="the key '7' stands twice"):
            strict.parse_json(text, "x")

    def test_a_file_of_the_largest_size(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text("[1, 2]")
        assert strict.read_json(tmp_path / "a.json", most=6) == [1, 2]
        with pytest.raises(FormatError, match=r"a\.json is larger than 5 bytes"):
            strict.read_json(tmp_path / "a.json", most=5)
        with pytest.raises(OSError, match=r"b\.json"):
            strict.read_json(tmp_path / "b.json")


class TestRecord:
    def test_the_fields(self) -> None:
        data = {"a": 1, "b": 2}
        assert strict.record(data, "x", ["a"]) is data
        assert strict.record(data, "x", ["a"], ["b", "c"]) is data
        assert strict.record({}, "x", (), ()) == {}

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ([], r"x is \[\]; expected an object"),
            (None, "x is None; expected an object"),
            ({}, "x lacks the field a, b"),
            ({"a": 1}, "x lacks the field b"),
            ({"a": 1, "b": 2, "d": 3}, "x has no field d; it has a, b, c"),
        ],
    )
    def test_refusals(self, value: Any, message: str) -> None:
        with pytest.raises(FormatError, match=message):
            strict.record(value, "x", ["a", "b"], ["c"])


class TestItems:
    def test_a_list_in_its_bounds(self) -> None:
        assert strict.items([1, 2], "x", 2, 2) == [1, 2]
        assert strict.items((1,), "x", 1, 5) == [1]
        assert strict.items([], "x") == []

    @pytest.mark.parametrize(
        ("value", "least", "most", "message"),
        [
            ("ab", 0, 5, "x is 'ab'; expected a list"),
            ({"a": 1}, 0, 5, "expected a list"),
            ([1], 2, 2, "x has 1 entries; expected 2"),
            ([1] * 6, 0, 5, "x has 6 entries; expected 0 to 5"),
        ],
    )
    def test_refusals(self, value: Any, least: int, most: int, message: str) -> None:
        with pytest.raises(FormatError, match=message):
            strict.items(value, "x", least, most)


class TestNumbers:
    @pytest.mark.parametrize("value", [1, 5, np.int64(3), np.uint8(1)])
    def test_an_integer_in_its_bounds(self, value: Any) -> None:
        found = strict.integer(value, "x", 1, 5)
        assert (found, type(found)) == (int(value), int)

    @pytest.mark.parametrize("value", [0, 6, True, False, 2.0, "2", None, [2], math.nan, 10**30])
    def test_no_integer(self, value: Any) -> None:
        with pytest.raises(FormatError, match=r"x is .*; expected an integer, 1 to 5"):
            strict.integer(value, "x", 1, 5)

    @pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.25), 1.0])
    def test_a_number_in_its_bounds(self, value: Any) -> None:
        found = strict.number(value, "x", 0, 1)
        assert (found, type(found)) == (float(value), float)

    @pytest.mark.parametrize("value", [-0.1, 1.1, True, "0.5", b"1", None, [], math.nan, math.inf, 10**400])
    def test_no_number(self, value: Any) -> None:
        with pytest.raises(FormatError, match=r"x is .*; expected a finite number, 0 to 1$"):
            strict.number(value, "x", 0, 1)
        if value not in (-0.1, 1.1):
            with pytest.raises(FormatError, match=r"expected a finite number$"):
                strict.number(value, "x")


class TestTexts:
    @pytest.mark.parametrize("value", ["", "a b", "ünï 影 😀", "نمی‌خواهم"])
    def test_text(self, value: str) -> None:
        assert strict.text(value, "x") == value

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (3, "x is 3; expected text of at most 5 characters"),
            (b"a", "expected text"),
            ("abcdef", "x is 'abcdef'; expected text of at most 5 characters"),
            ("a\tb", r"x: 'a\\tb' has control characters"),
            ("ab!", r"x is 'ab!'; expected \\w\+"),
        ],
    )
    def test_refusals(self, value: Any, message: str) -> None:
        with pytest.raises(FormatError, match=message):
            strict.text(value, "x", r"\w+", most=5)

    def test_one_of_some(self) -> None:
        assert strict.choice("a", "x", ("a", "b")) == "a"
        for value in ("c", 3, None, ["a"]):
            with pytest.raises(FormatError, match=r"x is .*; expected one of a, b"):
                strict.choice(value, "x", ("a", "b"))

    def test_a_wrong_value_is_shown_in_part(self) -> None:
        for value in ("x" * 10**6, list(range(10**5)), ["y" * 10**5], {str(i): i for i in range(9)}, b"z" * 1000):
            with pytest.raises(FormatError) as caught:
                strict.integer(value, "x", 0, 1)
            assert len(str(caught.value)) < 120


class TestPath:
    @pytest.mark.parametrize(
        "value",
        ["model.onnx", "model.onnx.data", "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin", "a-b_c.1", ".x",
         "..a", "console.txt", "com10", "x" * 255],
    )  # fmt: skip
    def test_inside(self, value: str) -> None:
        assert strict.path(value, "x") == value

    @pytest.mark.parametrize(
        "value",
        ["", "/", "/etc/passwd", "a/", "a//b", "..", "../a", "a/../b", ".", "./a", "a/..", "C:/x", "C:x", "a:b",
         "a\\b", "..\\a", "\\\\host\\x", "a b", "~/x", "$x", "%x%", "a*", "con", "CON.txt", "a/nul", "Aux.onnx",
         "COM1", "lpt9.bin", "com¹", "a.", "a. ", "a./b", "a\x00b", "x" * 256, "a/" * 600 + "a", 3, None],
    )  # fmt: skip
    def test_outside(self, value: Any) -> None:
        with pytest.raises(FormatError, match=r"x is |x: ") as caught:
            strict.path(value, "x")
        assert str(caught.value).isprintable()
