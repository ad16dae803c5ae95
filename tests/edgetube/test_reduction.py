"""How many tokens are left: schedules, what users state, and what models refuse."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetube import spec as specs
from edgetube.errors import InputError, SpecError
from edgetube.reduction import Kind, Reduction, evenly, parse
from edgetube.spec import ModelSpec

SPEC = specs.named("tubevit-ti")


@given(st.integers(2, 4000), st.integers(1, 48), st.data())
def test_even_schedules_end_at_what_is_kept_and_differ_by_one_at_most(n: int, depth: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, n - 1))
    found = evenly("drop", n, depth, keep).keep
    leaving = [a - b for a, b in zip((n, *found[:-1]), found, strict=True)]
    assert found[-1] == keep
    assert max(leaving) - min(leaving) <= 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("155", (507, 475, 443, 411, 379, 347, 315, 283, 251, 219, 187, 155)),
        ("50%", evenly("merge", 539, 12, 270).keep),
        ("0.5", evenly("merge", 539, 12, 270).keep),
        ("539,539,400,400,400,400,400,400,400,400,400,300", (539, 539, *[400] * 9, 300)),
        (" 400 , 0.5" + ",270" * 10, (400, *[270] * 11)),
    ],
)
def test_what_a_user_states(text: str, expected: tuple[int, ...]) -> None:
    assert parse(text, "merge", 539, 12) == Reduction("merge", expected)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("much", "'much'; give a number of tokens \\(1 to 539\\), a share"),
        ("0", "--keep-tokens 0"),
        ("-3", "'-3'"),
        ("1.5", "'1.5'"),
        ("nan", "'nan'"),
        ("539", "keeps all 539: leave it out"),
        ("600", "600|left behind block"),
        ("300,200", "states 2 blocks; the model has 12"),
        (",".join(["200"] * 12), "block 0 gets 539 tokens and can merge 270 of them into others; 200 cannot be left"),
    ],
)
def test_what_is_refused(text: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        parse(text, "merge", 539, 12)


@pytest.mark.parametrize("kind", ["merge", "drop"])
@given(st.integers(2, 600), st.integers(1, 600), st.data())
def test_the_same_shares_of_another_clip_are_possible_there(kind: Kind, n: int, new: int, data: st.DataObject) -> None:
    depth = data.draw(st.integers(1, 6))
    keep, before = [], n
    for _ in range(depth):
        before = data.draw(st.integers(max(1, before // 2), before))
        keep.append(before)
    found = Reduction(kind, tuple(keep)).scaled(n, new)
    if found is not None:
        found.check(new, depth)


def test_a_spec_with_a_reduction_survives_json_and_one_without_is_written_as_before() -> None:
    reduced = replace(SPEC, reduction=evenly("merge", SPEC.tokens, SPEC.depth, 155))
    assert ModelSpec.from_json(json.loads(json.dumps(reduced.to_json()))) == reduced
    assert "reduction" not in SPEC.to_json()
    assert reduced.entering[:2] == (539, 507)
    assert reduced.left == 155


def test_another_clip_and_an_image_keep_the_same_share() -> None:
    reduced = replace(SPEC, reduction=evenly("merge", SPEC.tokens, SPEC.depth, SPEC.tokens // 2))
    image, longer = reduced.with_clip(frames=1), reduced.with_clip(frames=64)
    assert abs(image.left / image.tokens - 0.5) < 0.01
    assert abs(longer.left / longer.tokens - 0.5) < 0.01


@pytest.mark.parametrize("keep", [(539,) * 12, (600,) * 12, (500,) * 11, (0,) * 12, (500, 501, *[400] * 10)])
def test_a_spec_refuses_what_cannot_be(keep: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match="tokens"):
        replace(SPEC, reduction=Reduction("drop", keep))
