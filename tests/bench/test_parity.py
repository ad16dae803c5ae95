"""The parity harness: right on answers worked out by hand, and not to be fooled by a broken artifact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgetube import bundle as bundles
from edgetube import datasets, resize, video
from edgetube.bench import compare, model_set, parity
from edgetube.contract import InputContract
from edgetube.datasets import ClipSet, Item
from edgetube.errors import CheckpointError, InputError, ParityError
from edgetube.runtime import Runtime
from edgetube.video import Clip
from edgetube.views import Views


def answers(logits: Any, labels: Any, names: Any = "abcd") -> parity.Answers:
    return parity.Answers(np.array(logits, np.float32), np.array(labels), tuple(names), "executed")


REFERENCE = answers([[2, 0], [2, 0], [0, 2], [0, 4]], [0, 1, 1, -1])


def test_numbers_worked_out_by_hand() -> None:
    got = parity.compare(REFERENCE, answers([[2, 0], [0, 1], [0, 2], [0, 4]], [0, 1, 1, -1]))
    assert (got.clips, got.labelled) == (4, 3)
    assert got.agreement == 0.75
    assert got.top1 == 1.0
    assert got.top1_reference == pytest.approx(2 / 3)
    assert got.max_abs_error == 2.0
    assert got.relative_error == 0.5
    assert got.cosine == 0.0


def test_equal_answers_are_perfect() -> None:
    got = parity.compare(REFERENCE, REFERENCE)
    assert (got.agreement, got.kl, got.max_abs_error) == (1.0, 0.0, 0.0)
    assert got.cosine == pytest.approx(1.0)


def test_unlabelled_clips_have_no_accuracy() -> None:
    unlabelled = replace(REFERENCE, labels=np.full(4, -1))
    assert parity.compare(unlabelled, unlabelled).top1 is None


def test_other_clips_or_nan_are_refused() -> None:
    with pytest.raises(InputError, match="not about the same clips"):
        parity.compare(REFERENCE, replace(REFERENCE, names=("x",) * 4))
    with pytest.raises(ParityError, match="NaN or infinite logits on 1 of 4 clips"):
        parity.compare(REFERENCE, answers([[2, 0], [2, np.nan], [0, 2], [0, 4]], [0, 1, 1, -1]))


def test_no_clips_and_unknown_labels_are_refused(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="no clips"):
        parity.measure([bundles.load(tiny_bundle)], ClipSet("empty", ()))
    odd = Item("odd", "moonwalk", lambda _: Clip("odd", np.zeros((8, 32, 48, 3), np.uint8), "moonwalk"))
    with pytest.raises(InputError, match="odd is labelled 'moonwalk'"):
        parity.measure([bundles.load(tiny_bundle)], ClipSet("odd", (odd,)))


def test_a_good_bundle_passes_and_a_broken_one_is_caught(tiny_bundle: Path, tmp_path: Path) -> None:
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


def test_bundles_of_different_checkpoints_are_not_mixed(tiny_bundle: Path) -> None:
    good = bundles.load(tiny_bundle)
    other = replace(good, path=Path("other"), checkpoint={**good.checkpoint, "sha256": "0" * 64})
    with pytest.raises(InputError, match="different checkpoints"):
        parity.measure([good, other], datasets.built_in(1, good.labels))
    with pytest.raises(CheckpointError, match="was made from other weights"):
        parity.measure([other], datasets.built_in(1, good.labels))


def test_gates_are_judged_by_their_own_number(tiny_bundle: Path) -> None:
    bundle = bundles.load(tiny_bundle)
    same = parity.measure([bundle], datasets.built_in(9, bundle.labels))
    worse = replace(same.measured[0].parity, agreement=0.9, cosine=0.5, drop=2.0, kl=0.1, sure_flips=0.2)
    rows = (compare.ClassRow("a", 4, 0.5, 0.75, 1.0, 25.0), compare.ClassRow("b", 4, 1.0, 1.0, 1.0, 0.0))
    found = parity.Probe(0.5, ("blocks.1", 9.0))
    changed = replace(same, measured=(replace(same.measured[0], parity=worse, classes=rows, probe=found),))
    newer = parity.Gates(min_sqnr=30.0, min_order_agreement=0.99, max_layer_jump=8.0)
    assert [(v.gate, v.value, v.passed, v.where) for v in newer.judge(changed)] == [
        ("min-sqnr", worse.sqnr, True, ""),
        ("min-order-agreement", 0.5, False, ""),
        ("max-layer-jump", 9.0, False, "blocks.1"),
    ]
    assert str(newer.judge(changed)[2]) == (
        f"{bundle.name}: layer jump at blocks.1 is 9, --max-layer-jump asks for at most 8"
    )
    blind = replace(changed, measured=(replace(changed.measured[0], probe=parity.Probe()),))
    assert [v.gate for v in newer.judge(blind)] == ["min-sqnr"]
    limits = {"min_agreement": 0.9, "min_cosine": 0.6, "max_drop": 1.5, "max_class_drop": 20.0, "max_kl": 0.05}
    verdicts = parity.Gates(**limits, max_sure_flips=0.1).judge(changed)
    assert {v.gate: (v.value, v.passed) for v in verdicts} == {
        "min-agreement": (0.9, True),
        "min-cosine": (0.5, False),
        "max-drop": (2.0, False),
        "max-class-drop": (25.0, False),
        "max-kl": (0.1, False),
        "max-sure-flips": (0.2, False),
    }
    assert all(verdict.passed for verdict in parity.Gates(0.99, 0.99, 0, 0, 0.01, 0.01, 0).judge(same))
    assert str(verdicts[2]) == f"{bundle.name}: drop is 2, --max-drop asks for at most 1.5"


def test_a_gate_on_accuracy_needs_labels(tiny_bundle: Path) -> None:
    unlabelled = datasets.built_in(2, ("x", "y"))
    with pytest.raises(InputError, match="--max-drop needs labelled clips, those of built-in have no labels"):
        parity.Gates(max_drop=1.0).check_data(unlabelled)
    parity.Gates(min_agreement=0.9).check_data(unlabelled)


def test_the_document_is_what_the_page_says(tiny_bundle: Path) -> None:
    """Every key that `docs/parity.md` lists, and plain JSON whatever the numbers are."""
    bundle = bundles.load(tiny_bundle)
    got = parity.measure([bundle, replace(bundle, name="second")], datasets.built_in(9, bundle.labels))
    document = json.loads(json.dumps(got.to_json(parity.Gates(0.99).judge(got)), allow_nan=False))
    assert set(document) == {
        "schema", "reference", "data", "machine", "versions", "bundles", "agreement", "gates", "layers", "video",
    }  # fmt: skip
    page = (Path(__file__).parents[2] / "docs" / "parity.md").read_text("utf-8")
    first = document["bundles"][0]
    for part in (document, first, first["flips"][0], first["classes"][0], first["worst"][0], document["gates"][0]):
        assert [key for key in part if key not in page] == []
    assert document["agreement"] == {"names": ["reference", bundle.name, "second"], "matrix": [[1.0] * 3] * 3}
    assert document["data"] == {"name": "built-in", "source": None, "clips": 9, "labelled": 9, "classes": 9,
                                "views": {"temporal": 1, "spatial": 1}}  # fmt: skip
    assert document["reference"]["runtime"] == "torch"


def test_a_bundle_may_be_the_reference(tiny_bundle: Path) -> None:
    bundle = bundles.load(tiny_bundle)
    got = parity.measure([replace(bundle, checkpoint={"sha256": "other"})], datasets.built_in(2, bundle.labels),
                         reference=bundle)  # fmt: skip
    assert got.measured[0].parity.max_abs_error == 0.0
    assert (got.reference["runtime"], got.reference["target"]) == (bundle.backend, "onnx-fp32")


def test_a_clip_is_made_once_however_many_models_see_it(tiny_bundle: Path) -> None:
    bundle = bundles.load(tiny_bundle)
    made = []
    source = datasets.built_in(3, bundle.labels)

    def counted(item: Item) -> Item:
        return replace(item, read=lambda contract: made.append(item.name) or item.read(contract))

    parity.measure([bundle] * 3, ClipSet("counted", tuple(map(counted, source.items))))
    names = [item.name for item in source.items]
    assert made[:3] == names
    assert sorted(made[3:]) == names  # once more, for the order of frames and the layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contract": {"fps": 30.0}}, r"manifest and its checkpoint differ in input: fps is 30.0, .* with 10.0"),
        ({"contract": {"mean": (0.4, 0.5, 0.5)}}, r"mean is \(0.4, 0.5, 0.5\), .* with \(0.4, 0.5, 0.6\)"),
        ({"contract": {"std": (0.2, 0.3, 0.2)}}, "std is"),
        ({"contract": {"resize": "stretch"}}, "resize is stretch, the model was trained with short-side"),
        ({"labels": True}, "differ in labels: labels is"),
        ({"spec": {"norm_eps": 1e-3}}, "differ in model: norm_eps is 0.001"),
    ],
)
def test_the_manifest_has_to_be_that_of_the_checkpoint(tiny_bundle: Path, change: dict[str, Any], message: str) -> None:
    bundle = bundles.load(tiny_bundle)
    edited: dict[str, Any] = {
        key: bundle.labels[::-1] if key == "labels" else replace(getattr(bundle, key), **value)
        for key, value in change.items()
    }
    with pytest.raises(CheckpointError, match=message):
        parity.measure([replace(bundle, **edited)], datasets.built_in(1, bundle.labels))


def test_frames_of_a_worst_clip_are_read_again(tiny_bundle: Path) -> None:
    bundle = bundles.load(tiny_bundle)
    source = datasets.built_in(9, bundle.labels)
    document = parity.measure([bundle], source).to_json()
    name = document["bundles"][0]["worst"][0]["name"]
    strip = parity.strip(parity.reopen(document, bundle.labels), name, bundle.contract, 3)
    whole = source.item(name).read(bundle.contract).frames
    np.testing.assert_array_equal(strip, whole[[0, 4, 7]])
    with pytest.raises(InputError, match="built-in has no clip 'nobody'"):
        parity.strip(source, "nobody", bundle.contract)


def test_infinite_logits_name_the_bundle(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundles.load(tiny_bundle)
    original = model_set.OpenedModels.show

    def show(self: Any, clips: Any, models: Any) -> Any:
        logits = original(self, clips, models)
        logits[1][0, 0] = np.nan
        return logits

    monkeypatch.setattr(model_set.OpenedModels, "show", show)
    with pytest.raises(ParityError, match=f"{bundle.name}: the artifact gave NaN .* near evaluation/astronaut/0000"):
        parity.measure([bundle], datasets.built_in(2, bundle.labels))


def moving(path: Path, shift: int) -> Path:
    """A video of 2 s at 20 frames per second, wider than the tiny model's input."""
    still = np.random.default_rng(shift).integers(0, 256, (6, 15, 3), np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    return video.write(path, (np.roll(still, shift * i, axis=1) for i in range(40)), 20.0)


def test_metrics_are_those_of_the_mean_over_the_views(tiny_bundle: Path, tmp_path: Path) -> None:
    """Each view is cut and answered here, one by one, from the decoded frames: 8 frames at 10 per second leave 1.2 s of
    2 s, and 96 x 240 becomes 32 x 80 before a crop of 48 columns."""
    bundle = bundles.load(tiny_bundle)
    files = [moving(tmp_path / f"{shift}.mp4", shift) for shift in (1, 3)]
    worse = replace(bundle, name="worse")
    got = parity.measure([bundle, worse], datasets.load(tmp_path, bundle.contract), views=Views(3, 3))
    assert got.data["views"] == {"temporal": 3, "spatial": 3}
    scores, whole = {}, InputContract(8, 32, 80)
    with Runtime(bundle) as runtime:
        for file in files:
            frames = np.stack([frame for _, frame in video.frames(file)])
            seen = []
            for first in (0, 12, 24):
                resized = resize.spatial(frames[first : first + 16 : 2], whole)
                seen += [runtime(resized[None, :, :, left : left + 48])[0] for left in (0, 16, 32)]
            powers = np.exp(np.array(seen, np.float64))
            mean = (powers / powers.sum(axis=1, keepdims=True)).mean(axis=0)
            scores[file.name] = (bundle.labels[mean.argmax()], mean.max())
    for one in got.measured:
        assert one.parity.agreement == 1.0
        assert {clip.name: clip.bundle[0] for clip in one.worst} == {name: label for name, (label, _) in scores.items()}
        for clip in one.worst:
            assert clip.bundle[1] == pytest.approx(scores[clip.name][1], abs=1e-5)
            assert clip.reference[1] == pytest.approx(scores[clip.name][1], abs=1e-4)


def test_one_view_changes_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = bundles.load(tiny_bundle)
    moving(tmp_path / "a.mp4", 2)
    source = datasets.load(tmp_path, bundle.contract)
    assert parity.measure([bundle], source, views=Views(1, 1)).to_json() == parity.measure([bundle], source).to_json()


def test_clips_with_one_view_are_refused_before_a_model_is_opened(tiny_bundle: Path) -> None:
    bundle = bundles.load(tiny_bundle)
    gone = replace(bundle, checkpoint={**bundle.checkpoint, "source": "gone"})
    with pytest.raises(InputError, match="built-in clips are made for the model's input and have one view, not 5x3"):
        parity.measure([gone], datasets.built_in(2, bundle.labels), views=Views(5, 3))
