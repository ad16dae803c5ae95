"""Licences of model cards, and what is said about them."""

from __future__ import annotations

import pytest

from edgetube.formats.reading import licence


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model\n", "apache-2.0"),
        ('---\r\ntags:\r\n- video\r\nlicense: "cc-by-nc-4.0"  # of the authors\r\n---\r\n', "cc-by-nc-4.0"),
        ("\ufeff---\nlicense:\n- mit\n- apache-2.0\nlanguage: en\n---\n", "mit, apache-2.0"),
        ("---\nlicense: other\nlicense_name: dinov3-license\nlicense_link: LICENSE\n---\n", "other (dinov3-license)"),
        ("---\nwidget:\n  license: inner\n" + "- a: b\n" * 2000 + "license: mit\n---\n", "mit"),
        ("---\nlanguage: en\n---\nlicense: mit\n", ""),
        ("# A model\nlicense: mit\n---\n", ""),
        ("license: mit\n", ""),
        ("", ""),
    ],
)
def test_what_a_card_states(card: str, found: str) -> None:
    assert licence.stated(card) == found


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ("apache-2.0", ()),
        ("mit, apache-2.0", ()),
        ("", ()),
        ("ncsa", ()),
        ("cc-by-4.0", ()),
        ("cc-by-nc-4.0", ("its licence, cc-by-nc-4.0, forbids commercial use",)),
        ("CC-BY-NC-SA-4.0", ("its licence, CC-BY-NC-SA-4.0, forbids commercial use",)),
        ("fair-noncommercial", ("its licence, fair-noncommercial, forbids commercial use",)),
        ("other", ("its licence is other: read its terms before you use the model",)),
        ("other (dinov3-license)", ("its licence is other (dinov3-license): read its terms before you use the model",)),
        ("intel-research", ("its licence is intel-research: read its terms before you use the model",)),
    ],
)
def test_what_is_said_about_it(stated: str, said: tuple[str, ...]) -> None:
    assert licence.notes(stated) == said
