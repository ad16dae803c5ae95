"""Labels of checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetube.errors import CheckpointError
from edgetube.formats.reading.files import ReadOptions
from edgetube.formats.reading.said import labels

NO_OPTIONS = ReadOptions()


def test_a_name_of_several_classes_gets_their_numbers() -> None:
    """ImageNet has two cranes, the bird and the machine, so the labels of most published classifiers have them too."""
    found = labels(Path("m"), NO_OPTIONS, {"1": "maillot", "0": "crane", "2": "crane", "3": "crate"}, 4)
    assert found == ("crane (0)", "maillot", "crane (2)", "crate")


def test_names_of_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("crane\ncrate\ncrane\n")
    options = ReadOptions(labels=str(tmp_path / "names.txt"))
    assert labels(Path("m"), options, {"0": "x"}, 3) == ("crane (0)", "crate", "crane (2)")


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({"0": "a", "2": "b"}, "no name for class 1"),
        ({"1": "a", "2": "b"}, "no name for class 0"),
        ({"0": "a"}, "2 classes and 1 labels"),
        ({"0": "a", "x": "b"}, "numbers of its labels are not integers"),
        ({"0": "a", "1": 3}, "a label is 3; expected text"),
        ({"0": "", "1": ""}, "a label has '' more than once"),
    ],
)
def test_labels_that_do_not_fit(found: dict[str, str], why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        labels(Path("m"), NO_OPTIONS, found, 2)
