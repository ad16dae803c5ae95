"""INT8 in the pipeline: calibrated on real clips only, measured against float, and published only within the budget."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgetube import bundle as bundles
from edgetube import export, runtimes
from edgetube.calibration import numeric, storage
from edgetube.calibration.clips import Clips
from edgetube.calibration.search import AccuracyBudget, Verdict
from edgetube.calibration.table import CalibrationTable
from edgetube.contract import InputContract
from edgetube.errors import InputError, ParityError
from edgetube.export import canonical, int8, integer, pipeline
from edgetube.model import checkpoints
from edgetube.precision import Precision
from edgetube.progress import silent
from edgetube.spec import ModelSpec

GATHER = pipeline.Options(lowering="gather")


@pytest.fixture(autouse=True)
def few_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "CALIBRATION_CLIPS", 9)
    monkeypatch.setattr(int8, "JUDGING_CLIPS", 36)


@pytest.fixture
def arrays(tiny_checkpoint: Path, tmp_path: Path, rng: np.random.Generator) -> Path:
    """Clips of a user's own."""
    contract = checkpoints.load(tiny_checkpoint).contract
    path = tmp_path / "mine.npz"
    np.savez(path, clips=rng.integers(0, 256, (6, *contract.shape), np.uint8))
    return path


def test_the_bundle_says_whether_it_was_worth_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = pipeline.export_model("onnx-int8", tiny_checkpoint, tmp_path, GATHER)
    report = bundle.build["int8"]
    assert report["against"] == "onnx-fp32"
    assert report["accuracy"]["clips"] == report["judged"]["clips"] == 36
    assert report["clips"]["count"] == 9
    assert report["speedup"] == pytest.approx(report["float_p50_ms"] / report["p50_ms"])
    assert ("faster than onnx-fp32" if report["speedup"] >= 1 else "SLOWER") in report["summary"]
    json.dumps(bundle.to_json())
    table = CalibrationTable.load(bundle.path / bundles.CALIBRATION)
    assert table.clips["sha256"] == report["clips"]["sha256"]
    assert {plan.name for plan in table.linears if plan.precision == "float"} == set(report["fallbacks"])
    assert {plan.precision for plan in table.linears if plan.name.startswith("blocks")} == {"int8"}
    assert bundle.artifact_bytes == (bundle.path / "model.onnx").stat().st_size


@pytest.mark.slow
def test_a_second_export_uses_the_calibration_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    stages = []
    for _ in range(2):
        bundle = pipeline.export_model("onnx-int8", tiny_checkpoint, tmp_path, GATHER, lambda *s: stages.append(s[0]))
    assert bundle.build["int8"]["cached"] is True
    assert stages[len(stages) - stages[::-1].index("load checkpoint") :].count("calibrate") == 0
    assert stages.count("calibrate") > 0


@pytest.mark.slow
def test_a_budget_that_does_not_hold_leaves_the_good_artifact(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = pipeline.export_model("onnx-int8", tiny_checkpoint, tmp_path, GATHER)
    before = (good.path / "model.onnx").read_bytes()
    verdict = Verdict(36, True, 0.1, 0.9, 0.2, 1.0, 80.0, 2.8)
    monkeypatch.setattr("edgetube.calibration.search.AccuracyBudget.verdict", lambda *_: verdict)
    with pytest.raises(ParityError, match=r"loses 80\.00 points of top-1 on 36 clips, 2\.80 allowed; nothing was writ"):
        pipeline.export_model("onnx-int8", tiny_checkpoint, tmp_path, GATHER)
    assert (good.path / "model.onnx").read_bytes() == before
    bundles.load(good.path)


@pytest.mark.slow
def test_own_clips_are_used_and_named(tiny_checkpoint: Path, tmp_path: Path, arrays: Path) -> None:
    options = pipeline.Options(lowering="gather", calib=arrays, max_drop=100.0)
    bundle = pipeline.export_model("onnx-int8", tiny_checkpoint, tmp_path / "out", options)
    report = bundle.build["int8"]
    assert report["clips"]["name"] == str(arrays)
    assert report["accuracy"]["top1"] is None
    assert report["accuracy"]["clips"] == 6


@pytest.mark.long
@pytest.mark.parametrize("target", ["onnx-int8", "openvino-int8"])
def test_a_large_model_gives_the_same_bundle(
    target: str, tiny_checkpoint: Path, tmp_path: Path, arrays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in files from the trace to the artifact, as of a model beyond one protobuf message."""
    options = pipeline.Options(lowering="gather", calib=arrays, max_drop=100.0)
    small = pipeline.export_model(target, tiny_checkpoint, tmp_path / "small", options)
    monkeypatch.setattr(storage, "LIMIT", 0)
    monkeypatch.setattr(storage, "SMALL", 1024)
    monkeypatch.setattr(canonical, "MAX_ONE_FILE", 1000)
    large = pipeline.export_model(target, tiny_checkpoint, tmp_path / "large", options)
    assert (large.path / "calibration.json").read_bytes() == (small.path / "calibration.json").read_bytes()
    assert ("model.onnx.data" in large.files) == (target == "onnx-int8")
    with runtimes.open_bundle(small) as one, runtimes.open_bundle(large) as other:
        clips = np.load(arrays)["clips"][:2]
        np.testing.assert_array_equal(one(clips), other(clips))


def test_a_model_of_something_else_needs_clips(tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = checkpoints.load(tiny_checkpoint).select("other")
    with pytest.raises(InputError, match="INT8 needs clips of what tiny is for, 128 or more; give --calib"):
        pipeline.export_model("onnx-int8", other, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_clips_of_other_labels_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    contract = checkpoints.load(tiny_checkpoint).contract
    np.savez(tmp_path / "x.npz", clips=np.zeros((1, *contract.shape), np.uint8), labels=np.array(["jump"]))
    with pytest.raises(InputError, match="which the model does not know"):
        pipeline.export_model("onnx-int8", tiny_checkpoint, tmp_path, pipeline.Options(calib=tmp_path / "x.npz"))


@pytest.mark.parametrize("drop", [-1, 101])
def test_impossible_budgets_are_refused(drop: int) -> None:
    with pytest.raises(InputError, match="expected percentage points"):
        pipeline.Options(max_drop=drop)


def quick_targets() -> list[str]:
    """INT8 targets that can be built here. Vendors' simulators take seconds a clip; their targets have own tests."""
    found = (t for t in export.targets().values() if t.precision.quantises_activations)
    return [t.name for t in found if not t.missing(t.build_needs) and not runtimes.simulated(t.backend)]


@pytest.mark.long
def test_two_targets_of_one_scheme_share_a_calibration(tiny_checkpoint: Path, tmp_path: Path) -> None:
    stages = []
    names = quick_targets()
    list(pipeline.export_models(names, tiny_checkpoint, tmp_path, GATHER, lambda *s: stages.append(s)))
    schemes = {int8.activation_scheme(export.target(name)) for name in names}
    assert sum(s == ("calibrate", 0, 4) for s in stages) == len(schemes)


def work_by_hand(spec: ModelSpec, classes: int) -> dict[str, int]:
    """Multiply-accumulates of every linear in one clip, from the model's geometry."""
    tokens, width = sum(tube.tokens(spec.clip) for tube in spec.tubes), spec.width
    found = {
        f"tubes.{i}": tube.tokens(spec.clip) * math.prod(tube.kernel) * 3 * width for i, tube in enumerate(spec.tubes)
    }
    for i in range(spec.depth):
        for name, size in (("attn.qkv", 3), ("attn.proj", 1), ("mlp.fc1", 4), ("mlp.fc2", 4)):
            found[f"blocks.{i}.{name}"] = tokens * width * width * size
    return {**found, "head": width * classes}


@pytest.mark.long
@pytest.mark.parametrize(("lowering", "batch"), [("gather", 2), ("conv2d", 1)])
def test_the_share_of_integer_work_is_counted_in_the_artifact(
    tiny_checkpoint: Path, tmp_path: Path, lowering: str, batch: int
) -> None:
    """Tubes that a lowering makes convolutions stay float, whatever the table says."""
    names = quick_targets()
    options = pipeline.Options(lowering=lowering, batch=batch, max_drop=100.0)
    assert names
    for bundle in pipeline.export_models(names, tiny_checkpoint, tmp_path, options):
        report = bundle.build["int8"]
        work = work_by_hand(bundle.spec, len(bundle.labels))
        floats = {"head" if not name.startswith(("tubes", "blocks")) else name for name in report["fallbacks"]}
        floats |= {name for name in work if name.startswith("tubes")} if lowering == "conv2d" else set()
        floats |= {"head"} if any(" in float: " in note for note in report["notes"]) else set()  # of one runtime
        expected = 1 - sum(work[name] for name in floats) / sum(work.values())
        assert report["macs_share"] == pytest.approx(expected, rel=1e-9), bundle.target
        assert f"{expected:.0%} of the linear work in int8" in report["summary"]
        assert (expected < 0.9) == (lowering == "conv2d")


@pytest.mark.slow
def test_batches_of_two(tiny_checkpoint: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    options = pipeline.Options(lowering="gather", batch=2)
    bundle = pipeline.export_model("onnx-int8", tiny_checkpoint, tmp_path, options)
    frames = rng.integers(0, 256, (3, *bundle.contract.shape), np.uint8)
    with runtimes.open_bundle(bundle) as backend:
        assert backend(frames).shape == (3, len(bundle.labels))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cpu", "activations", "weights"), [("x86", "UINT8", "UINT8"), ("arm", "INT8", "INT8"), ("any", "UINT8", "INT8")]
)
def test_the_form_for_a_processor_is_asked_for(
    tiny_checkpoint: Path, tmp_path: Path, cpu: str, activations: str, weights: str
) -> None:
    options = pipeline.Options(lowering="gather", settings={"cpu": cpu})
    bundle = pipeline.export_model("onnx-int8", tiny_checkpoint, tmp_path, options)
    assert bundle.build["integers"]["cpu"] == cpu
    graph = onnx.load(bundle.artifact_path).graph
    kinds = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    (kernel,) = (
        n for n in graph.node if n.op_type == "MatMulIntegerToFloat" and n.input[1].startswith("blocks.0.mlp.fc1")
    )
    assert (kinds[kernel.input[4]], kinds[kernel.input[1]]) == (activations, weights)


def onnx_weights(path: Path) -> dict[str, npt.NDArray[np.int8]]:
    graph = onnx.load(path).graph
    return {
        t.name: numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and t.dims
    }


def ir_weights(path: Path) -> dict[str, npt.NDArray[np.int8]]:
    from edgetube.runtimes.openvino import core

    constants = [op for op in core().read_model(path).get_ops() if op.get_type_name() == "Constant"]
    return {op.get_friendly_name(): op.data for op in constants if op.data.dtype == np.int8 and op.data.ndim == 2}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "read"), [("onnx-int8", onnx_weights), ("openvino-int8", ir_weights)])
def test_no_sum_of_products_overflows_16_bits(
    tiny_checkpoint: Path, tmp_path: Path, name: str, read: Callable[[Path], dict[str, npt.NDArray[np.int8]]]
) -> None:
    """What x86 without VNNI adds up in 16 bits is exact, so that answers do not depend on the processor."""
    if absent := export.target(name).missing(export.target(name).build_needs):
        pytest.skip(f"{name} needs {', '.join(absent)}")
    bundle = pipeline.export_model(name, tiny_checkpoint, tmp_path, GATHER)
    weights = read(bundle.artifact_path)
    assert len(weights) >= bundle.build["integers"]["asked"] > 0
    assert max(int(np.abs(weight.astype(int)).max()) for weight in weights.values()) > 64  # not merely seven bits
    assert {name: numeric.overflowing_pairs(weight) for name, weight in weights.items()} == dict.fromkeys(weights, 0)
    assert bundle.build["integers"]["saturates"] is False
    assert bundles.load(bundle.path).build["integers"]["saturates"] is False


def test_weights_that_overflow_are_counted_for_the_manifest() -> None:
    def stated(weights: list[list[int]]) -> bool:
        tensors = [numpy_helper.from_array(np.array(weights, np.int8), "w"), numpy_helper.from_array(np.int8(0), "z")]
        found: bool = integer.coverage(onnx.ModelProto(graph={"initializer": tensors}), 1, 1, {})["saturates"]
        return found

    assert stated([[127], [127]])
    assert not stated([[127], [1], [127], [1]])


class TestSources:
    """How many clips an export draws."""

    def drawn(self, monkeypatch: pytest.MonkeyPatch, model: str, macs: float = 1e9, tokens: int = 100) -> Any:
        """For a model of so many multiply-accumulates and tokens."""
        monkeypatch.setattr(int8, "CALIBRATION_CLIPS", 128)
        monkeypatch.setattr(int8, "JUDGING_CLIPS", 252)
        monkeypatch.setattr(ModelSpec, "macs", lambda _: int(macs))
        monkeypatch.setattr(ModelSpec, "sequence", tokens)
        checkpoint: Any = SimpleNamespace(
            name="x", source=model, labels=("a",), contract=None, spec=object.__new__(ModelSpec)
        )
        return int8.sources(checkpoint, None)

    @pytest.mark.parametrize(
        ("macs", "tokens", "count"),
        [
            (180e9, 1568, 128),
            (234e9, 9000, 128),
            (300e9, 9000, 100),
            (931e9, 2048, 32),
            (9e12, 9000, 32),
            (9e12, 1000, 66),
        ],
    )
    def test_much_work_calibrates_on_fewer_clips(
        self, monkeypatch: pytest.MonkeyPatch, macs: float, tokens: int, count: int
    ) -> None:
        """As many as take 3e13 multiply-accumulates, or have 65536 tokens, or 32."""
        seen, judged = self.drawn(monkeypatch, "random:x", macs, tokens)
        assert len(seen.items) == count
        assert not {item.name for item in seen.items} & {item.name for item in judged.items}
        assert any("clips calibrate, not 128" in note for note in seen.notes) == (count < 128)

    @pytest.mark.parametrize(("macs", "count"), [(238e9, 252), (400e9, 150), (931e9, 64), (9e12, 32)])
    def test_built_in_clips_judge_within_a_budget_of_work(
        self, monkeypatch: pytest.MonkeyPatch, macs: float, count: int
    ) -> None:
        seen, judged = self.drawn(monkeypatch, "random:x", macs)
        assert len(judged.items) == count
        assert any("judge the accuracy" in note for note in seen.notes) == (count < 252)

    def test_fewer_clips_are_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """None lost of 64: 4.6 % lost of all would show with 95 %, since 0.954 to the power of 64 is 0.05."""
        seen, _ = self.drawn(monkeypatch, "random:x", 931e9, 2048)
        assert seen.notes == (
            "at most 32 clips calibrate, not 128: one takes 931 GMAC and has 2048 tokens",
            "64 built-in clips judge the accuracy, not 252: each is 1.6 points, and none lost of 64 may be up to 4.6 of"
            " all (95 % confidence); --calib takes more",
        )

    def test_own_clips_all_judge(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        np.save(tmp_path / "mine.npy", np.random.default_rng(0).integers(0, 256, (90, 2, 4, 4, 3), np.uint8))
        monkeypatch.setattr(int8, "CALIBRATION_CLIPS", 128)
        monkeypatch.setattr(int8, "JUDGING_CLIPS", 252)
        monkeypatch.setattr(ModelSpec, "macs", lambda _: 10**13)
        monkeypatch.setattr(ModelSpec, "sequence", 4096)
        spec, contract = object.__new__(ModelSpec), InputContract(2, 4, 4)
        checkpoint: Any = SimpleNamespace(name="x", source="x", labels=("a",), contract=contract, spec=spec)
        seen, judged = int8.sources(checkpoint, tmp_path / "mine.npy")
        assert (len(seen.items), len(judged.items), len(seen.notes)) == (32, 58, 1)


def test_slower_is_called_slower() -> None:
    accuracy = {"clips": 10, "certain": 0, "agreement": 1.0, "top1": None, "top1_float": None}
    report = {"judged": accuracy, "fallbacks": {"a": "fell back: x"}, "macs_share": 0.9, "against": "x-fp32"}
    slow = int8.summary(report | {"speedup": 0.5, "size_ratio": 0.3})
    assert slow.startswith("SLOWER, 0.50x the speed of x-fp32, 0.30x its size")
    assert "1 linears fell back" in slow
    assert int8.summary(report | {"speedup": 2.0, "size_ratio": 0.3}).startswith("2.00x faster than x-fp32")
    assert int8.summary(report).startswith("not run here, speed unknown; 100.0% of 10 answers unchanged; 90% of the")
    accuracy["certain"] = 30
    assert "; 100.0% of 40 answers unchanged (30 certain by their margins); 90%" in int8.summary(report)


def test_what_is_expected_of_an_artifact_also_has_the_noise_of_its_float_part() -> None:
    """40 dB of integers and 40 of arithmetic, by hand: 1e-4 + 3e-4 is 34 dB."""
    assert int8.Simulation(40.0).with_noise(0.0) == int8.Simulation(40.0)
    assert int8.Simulation(40.0).with_noise(1e-4).sqnr == pytest.approx(33.98, abs=0.01)


@pytest.mark.parametrize("turned", [False, True])
def test_one_clip_that_points_elsewhere_is_an_error(turned: bool) -> None:
    """All answers unchanged and little noise in all, but the logits of one clip have a cosine below the least."""
    logits = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32) * 10
    logits[7] = [0.3, 0.1, 0.1, 0.1, 0.1]
    changed = logits.copy()
    if turned:
        changed[7] = [0.3, -0.1, -0.1, -0.1, -0.1]
    frames = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1, 1)
    clips = Clips("drawn", frames, np.full(40, -1), tuple(map(str, range(40))), "")
    report = {"judged": {"clips": 40}}
    calibrated: Any = SimpleNamespace(budget=AccuracyBudget(clips, logits, None), report=report)
    candidate: Any = SimpleNamespace(name="onnx-int8", backend=lambda clip: changed[int(clip.ravel()[0])][None])
    if not turned:
        assert (
            int8.check_accuracy(calibrated, int8.Simulation(20.0), candidate, "onnx-fp32", silent)["accuracy"]["cosine"]
            == 1.0
        )
        return
    with pytest.raises(
        ParityError, match=r"cosine of the logits on the worst of 40 clips is 0\.[0-9]+, at least 0\.98 is"
    ):
        int8.check_accuracy(calibrated, int8.Simulation(20.0), candidate, "onnx-fp32", silent)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx-int8", "trt-int8", "rtx-int8", "coreml-int8"])
def test_channels_that_are_nearly_dead_are_exported(target: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Of weights of 1e-7 and 1e-5: float16 has no scale for the first, nor for half of the second."""
    if missing := export.target(target).missing(export.target(target).build_needs):
        pytest.skip(f"{target} needs {', '.join(missing)}")
    dead = checkpoints.load(tiny_checkpoint)
    first: Any = dead.model.blocks[1]
    with torch.no_grad():
        for row, size in ((5, 1e-7), (6, 1e-5)):
            first.mlp.fc1.weight[row] *= size
    bundle = pipeline.export_model(target, dead, tmp_path, GATHER)
    assert bundle.parity["agreement"] >= 0.9


class Double:
    """An artifact whose runtime shows no layers, or all, and answers better when it does."""

    def __init__(self, shown: bool = False, status: str = "executed") -> None:
        self.batch, self.shown, self.status = 1, shown, status

    def layers(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return names if self.shown else ()

    def __call__(self, clips: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return np.array([[1.0, 0.5]], np.float32)

    def tap(self, names: tuple[str, ...]) -> Callable[[npt.NDArray[np.uint8]], dict[str, npt.NDArray[np.float32]]]:
        return lambda clips: {"logits": np.array([[1.0, 0.01]], np.float32)}


@pytest.mark.parametrize(
    ("integers", "backend", "cause"),
    [
        ({"asked": 9, "executed": 7, "saturates": False}, Double(), "computes 2 of 9 linears in float"),
        ({"asked": 9, "executed": 9, "saturates": False}, Double(shown=True), "fuses operators wrongly: .* 3[34].. dB"),
        ({"asked": 9, "executed": 9, "saturates": True}, Double(), "sums of its 8-bit products may overflow"),
        ({"asked": 9, "executed": 9, "saturates": True}, Double(status="emulated"), "the cause cannot be told"),
        ({"asked": 9, "executed": 9, "saturates": False}, Double(), "the cause cannot be told"),
    ],
)
def test_the_cause_of_a_larger_error_is_named(
    integers: dict[str, Any], backend: Any, cause: str, tiny_bundle: Path
) -> None:
    """Answers (1, 0.5) where (1, 0) is right, and (1, 0.01) with every layer shown: 34 dB better, by hand."""
    made = replace(bundles.load(tiny_bundle), precision=Precision.W8A8, build={"integers": integers})
    clip = np.zeros(made.contract.shape, np.uint8)
    found = int8.diagnose(int8.Candidate(made, backend), clip, np.array([1.0, 0.0], np.float32))
    assert re.search(cause, found)
