"""The parity harness: right on answers worked out by hand, and not to be fooled by a broken artifact."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgetube import bundle as bundles
from edgetube import datasets
from edgetube.bench import parity
from edgetube.datasets import ClipSet, Item
from edgetube.errors import CheckpointError, InputError, ParityError
from edgetube.video import Clip


def answers(logits, labels, names="abcd"):
    return parity.Answers(np.array(logits, np.float32), np.array(labels), tuple(names), "executed")


REFERENCE = answers([[2, 0], [2, 0], [0, 2], [0, 4]], [0, 1, 1, -1])


def test_numbers_worked_out_by_hand():
    got = parity.compare(REFERENCE, answers([[2, 0], [0, 1], [0, 2], [0, 4]], [0, 1, 1, -1]))
    assert (got.clips, got.labelled) == (4, 3)
    assert got.agreement == 0.75
    assert got.top1 == 1.0
    assert got.top1_reference == pytest.approx(2 / 3)
    assert got.max_abs_error == 2.0
    assert got.relative_error == 0.5
    assert got.cosine == 0.0


def test_equal_answers_are_perfect():
    got = parity.compare(REFERENCE, REFERENCE)
    assert (got.agreement, got.kl, got.max_abs_error) == (1.0, 0.0, 0.0)
    assert got.cosine == pytest.approx(1.0)


def test_unlabelled_clips_have_no_accuracy():
    unlabelled = replace(REFERENCE, labels=np.full(4, -1))
    assert parity.compare(unlabelled, unlabelled).top1 is None


def test_other_clips_or_nan_are_refused():
    with pytest.raises(InputError, match="not about the same clips"):
        parity.compare(REFERENCE, replace(REFERENCE, names=("x",) * 4))
    with pytest.raises(ParityError, match="NaN or infinite logits on 1 of 4 clips"):
        parity.compare(REFERENCE, answers([[2, 0], [2, np.nan], [0, 2], [0, 4]], [0, 1, 1, -1]))


def test_no_clips_and_unknown_labels_are_refused(tiny_bundle):
    with pytest.raises(InputError, match="no clips"):
        parity.measure([bundles.load(tiny_bundle)], ClipSet("empty", ()))
    odd = Item("odd", "moonwalk", lambda _: Clip("odd", np.zeros((8, 32, 48, 3), np.uint8), "moonwalk"))
    with pytest.raises(InputError, match="odd is labelled 'moonwalk'"):
        parity.measure([bundles.load(tiny_bundle)], ClipSet("odd", (odd,)))


def test_a_good_bundle_passes_and_a_broken_one_is_caught(tiny_bundle, tmp_path):
    good = bundles.load(tiny_bundle)
    model = onnx.load(good.artifact_path)
    bias = next(w for w in model.graph.initializer if w.name.startswith("classifiers.") and w.name.endswith("bias"))
    values = onnx.numpy_helper.to_array(bias).copy()
    values[0] += 5
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, tmp_path / "model.onnx")
    broken = replace(good, path=tmp_path, name="broken")
    clips = datasets.built_in(18, good.labels)
    right, wrong = (one.parity for one in parity.measure([good, broken], clips).measured)
    assert right.agreement == 1.0
    assert right.clips == right.labelled == 18
    assert wrong.max_abs_error == pytest.approx(5.0, abs=1e-4)
    assert wrong.agreement < 0.5


def test_bundles_of_different_checkpoints_are_not_mixed(tiny_bundle):
    good = bundles.load(tiny_bundle)
    other = replace(good, path=Path("other"), checkpoint={**good.checkpoint, "sha256": "0" * 64})
    with pytest.raises(InputError, match="different checkpoints"):
        parity.measure([good, other], datasets.built_in(1, good.labels))
    with pytest.raises(CheckpointError, match="was made from other weights"):
        parity.measure([other], datasets.built_in(1, good.labels))
