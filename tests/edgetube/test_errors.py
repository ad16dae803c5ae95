from __future__ import annotations

import os

import pytest

from edgetube import errors

CODES = {
    "EdgetubeError": 2,
    "InputError": 2,
    "BundleError": 2,
    "FormatError": 2,
    "SpecError": 2,
    "CheckpointError": 2,
    "MissingPackageError": 2,
    "BackendError": 2,
    "DeviceError": 2,
    "ParityError": 1,
}


def test_the_tree_is_the_one_that_the_module_draws() -> None:
    tree = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    tree -= {one.__name__ for one in errors.WARNINGS}
    assert tree == set(CODES)
    assert all(name in errors.__doc__ for name in CODES)


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_every_error_is_caught_as_one_and_carries_its_exit_code(name: str, code: int) -> None:
    cls = getattr(errors, name)
    assert issubclass(cls, errors.EdgetubeError)
    with pytest.raises(errors.EdgetubeError, match=r"^what is wrong$") as caught:
        raise cls("what is wrong")
    assert caught.value.exit_code == code


def test_callers_who_know_only_the_standard_library_catch_the_usual_types() -> None:
    assert issubclass(errors.SpecError, ValueError)
    assert issubclass(errors.MissingPackageError, ImportError)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("clip.mp4", "clip.mp4"),
        ("Ünï cödé 影 😀 👨‍👩‍👧 نمی‌خواهم", "Ünï cödé 影 😀 👨‍👩‍👧 نمی‌خواهم"),
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("a\r\nb\tc\x9b\x7f", r"a\r\nb\tc\x9b\x7f"),
        ("gpj\u202eexe", r"gpj\u202eexe"),
        ("a\u2028b\u2029", r"a\u2028b\u2029"),
        (os.fsdecode(b"caf\xe9.mp4"), r"caf\xe9.mp4"),
        ("\ud800", r"\ud800"),
        (OSError("a\x00b"), r"a\x00b"),
    ],
)
def test_text_from_elsewhere_is_one_harmless_line(given: object, shown: str) -> None:
    assert errors.printable(given) == shown
    assert errors.printable(shown) == shown
