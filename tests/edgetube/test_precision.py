"""Precisions: their names are those of manifests and targets, and they answer for their bits."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from edgetube import export
from edgetube.precision import PRECISIONS, Precision


def test_names_are_those_of_manifests() -> None:
    assert list(PRECISIONS) == ["fp32", "fp16", "int8", "w8a16", "w8", "w4"]
    assert all(precision is PRECISIONS[str(precision)] for precision in Precision)


@pytest.mark.parametrize("precision", Precision)
def test_it_is_written_as_its_name(precision: Precision) -> None:
    name = str(precision)
    assert type(name) is str
    assert f"{precision}" == f"{precision:s}" == "".join([precision]) == name
    assert json.loads(json.dumps({precision: precision}, indent=2)) == {name: name}


@pytest.mark.parametrize("precision", Precision)
def test_another_process_and_a_copy_have_the_same_one(precision: Precision) -> None:
    assert pickle.loads(pickle.dumps(precision)) is copy.deepcopy(precision) is precision


def test_questions() -> None:
    assert [p for p in Precision if p.quantises_activations] == [Precision.W8A8, Precision.W8A16]
    assert [p for p in Precision if p.quantises_weights] == [
        Precision.W8A8,
        Precision.W8A16,
        Precision.W8,
        Precision.W4,
    ]
    assert [p.weight_bits for p in Precision] == [32, 16, 8, 8, 8, 4]
    assert [p.activations for p in Precision] == ["float32", "float16", "int8", "int16", "float16", "float16"]


def test_targets_are_called_after_their_precision() -> None:
    for name, target in export.targets().items():
        assert target.precision.names(name.rpartition("-")[2])
        assert isinstance(target.precision, Precision)


def test_int8_is_also_called_after_its_bits() -> None:
    assert Precision.W8A8.names("int8")
    assert Precision.W8A8.names("w8a8")
    assert not Precision.W8A16.names("w8a8")
    assert not Precision.FP16.names("fp32")
