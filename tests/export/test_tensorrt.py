"""Export for TensorRT: the graph means the same, a real parser takes it, and a real builder makes engines of it.

TensorRT for RTX needs no GPU to parse and to build, so nothing here is a double.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto

from edgetube import bundle as bundles
from edgetube import demo, export
from edgetube.bundle import Bundle
from edgetube.calibration import graphs
from edgetube.calibration.table import CalibrationTable, LinearPlan, Range
from edgetube.contract import InputContract
from edgetube.errors import BackendError, InputError
from edgetube.export import canonical, pipeline, proof, quantize, rewrite, static, tokenizer
from edgetube.export import tensorrt as exporter
from edgetube.export.base import BuildContext
from edgetube.export.canonical import Graph
from edgetube.export.float16 import convert_to_fp16
from edgetube.model import checkpoints
from edgetube.model.checkpoints import Checkpoint
from edgetube.model.transformer import VideoTransformer
from edgetube.runtimes.tensorrt.build import LEGACY, Settings, parse
from edgetube.runtimes.tensorrt.build import build as build_engine
from edgetube.runtimes.tensorrt.layers import summarize_engine_layers
from edgetube.runtimes.tensorrt.sdk import load_sdk
from edgetube.spec import ModelSpec, TubeSpec, named
from edgetube.targets import Target, installed
from tests.export import models
from tests.export.test_torchgraph import table_of

GATHER = pipeline.Options(lowering="gather")
needs_rtx = pytest.mark.skipif(not installed("tensorrt_rtx"), reason="needs tensorrt_rtx: pip install 'edgetube[rtx]'")


def with_settings(name: str, **settings: str) -> Target:
    return export.target(name).choose({k.replace("_", "-"): v for k, v in settings.items()})


@pytest.fixture(scope="module", params=tokenizer.LOWERINGS)
def graph(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> Graph:
    checkpoint = checkpoints.load(tiny_checkpoint)
    module = static.StaticTransformer(checkpoint.model, checkpoint.contract, request.param, batch=2)
    return canonical.trace(module, checkpoint.spec, checkpoint.contract, 2)


class TestCastFirst:
    """Moving and casting commute."""

    @pytest.mark.slow
    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_the_answers_are_the_same_to_the_last_bit(
        self, graph: Graph, precision: str, rng: np.random.Generator
    ) -> None:
        model = graph.model if precision == "fp32" else convert_to_fp16(graph.model)
        clips = rng.integers(0, 256, (2, *graph.contract.shape), np.uint8)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        before, after = (
            ort.InferenceSession(m.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
                None, {"frames": clips}
            )[0]
            for m in (model, rewrite.cast_first(model))
        )
        np.testing.assert_array_equal(before, after)

    def test_uint8_reaches_one_cast_and_nothing_else(self, graph: Graph) -> None:
        moved = rewrite.cast_first(convert_to_fp16(graph.model)).graph
        assert [n.op_type for n in moved.node if "frames" in n.input] == ["Cast"]
        kinds = {v.name: v.type.tensor_type.elem_type for v in [*moved.input, *moved.value_info, *moved.output]}
        assert [name for name, kind in kinds.items() if kind == TensorProto.UINT8] == ["frames"]

    def test_it_leaves_the_given_graph_alone(self, graph: Graph) -> None:
        before = graph.model.SerializeToString(deterministic=True)
        rewrite.cast_first(graph.model)
        assert graph.model.SerializeToString(deterministic=True) == before


class TestSettings:
    @pytest.mark.parametrize(
        ("target", "settings", "words"),
        [
            ("trt-fp16", {}, "--stronglyTyped --noTF32 --profilingVerbosity=detailed"),
            ("trt-fp16", {"workspace": "512"}, "--memPoolSize=workspace:512"),
            ("trt-fp32", {"version_compatible": "yes"}, "--versionCompatible"),
            ("trt-fp16", {"hardware_compatible": "ampere"}, "--hardwareCompatibilityLevel=ampere+"),
            ("trt-fp16", {"hardware_compatible": "same"}, "--hardwareCompatibilityLevel=sameComputeCapability"),
            ("rtx-fp16", {}, "--computeCapabilities=86,89,120"),
            ("rtx-fp16", {"capabilities": "75"}, "--computeCapabilities=75"),
            ("trt-fp32", {"legacy": "yes"}, "--noTF32 --profilingVerbosity=detailed --skipInference"),
            ("trt-fp16", {"legacy": "yes"}, "--fp16"),
            ("trt-int8", {"legacy": "yes"}, "--fp16 --int8 --calib=calibration.cache"),
        ],
    )
    def test_each_is_in_the_line_of_the_vendor_s_tool(self, target: str, settings: dict[str, Any], words: str) -> None:
        chosen = exporter.parse_settings(with_settings(target, **settings))
        line = exporter.command(target[:3], chosen)
        tool = {"trt": "trtexec", "rtx": "tensorrt_rtx"}[target[:3]]
        graph = "legacy" if "legacy" in settings else "model"
        assert line.startswith(f"{tool} --onnx={graph}.onnx --saveEngine=model.engine ")
        assert f" {words} " in f"{line} "
        assert Settings.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen

    @pytest.mark.parametrize(
        ("target", "settings", "message"),
        [
            ("trt-fp16", {"dla": "0"}, "dla cannot be set: the DLA has no LayerNorm"),
            ("trt-fp16", {"capabilities": "86"}, "trt-fp16 has no setting 'capabilities'"),
            (
                "rtx-fp16",
                {"timing_cache": "x"},
                "rtx-fp16 has no setting 'timing-cache'; it has workspace, capabilities, dla",
            ),
            ("trt-fp16", {"workspace": "2G"}, "workspace is '2G'; expected MiB"),
            ("trt-fp16", {"workspace": "0"}, "workspace is '0'"),
            ("trt-fp16", {"version_compatible": "maybe"}, "version-compatible is 'maybe'; expected one of no, yes"),
            ("trt-fp16", {"hardware_compatible": "turing"}, "expected one of no, ampere, same"),
            ("rtx-fp16", {"capabilities": "8.6"}, r"capabilities is '8\.6'"),
            ("rtx-fp16", {"attention": "int8"}, "rtx-fp16 has no setting 'attention'"),
            ("rtx-int8", {"attention": "fp8"}, "attention is 'fp8'; expected one of fp16, int8"),
            ("rtx-int8", {"legacy": "yes"}, "rtx-int8 has no setting 'legacy'"),
        ],
    )
    def test_impossible_ones_are_refused(self, target: str, settings: dict[str, str], message: str) -> None:
        with pytest.raises(InputError, match=message):
            exporter.parse_settings(with_settings(target, **settings))


@pytest.mark.parametrize("name", ["trt-fp32", "trt-fp16"])
def test_without_a_gpu_the_bundle_is_whole_but_for_the_engine(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = export.target(name)
    if not target.missing(target.run_needs):
        pytest.skip("this machine can build the engine")
    bundle = pipeline.export_model(name, tiny_checkpoint, tmp_path, GATHER)
    assert bundle.status == "deferred"
    assert set(bundle.files) == {"model.onnx", "golden.npz"}
    assert bundle.parity["status"] == "emulated"
    assert bundle.parity["clips"] == proof.PROOF_CLIPS
    assert bundle.parity["max_abs_error"] <= target.tolerance * max(1, bundle.parity["max_abs_logit"])
    assert bundle.build["command"].startswith("trtexec --onnx=model.onnx")
    if installed("tensorrt_rtx"):
        assert bundle.build["parsed_by"].startswith("TensorRT for RTX 1.")


class TestAttention:
    """Attention in int8 is one kernel up to 512 tokens and for heads of 16, 32 or 64 channels."""

    def test_at_539_tokens_it_is_refused_and_the_shorter_clip_is_named_with_its_cost(self) -> None:
        spec = named("tubevit-b")
        refusal = exporter.attention_refusal(spec)
        assert "needs at most 512 tokens, this clip gives 539" in refusal
        assert "--frames 20 --set attention=int8 (392 tokens)" in refusal
        share = named("tubevit-b", frames=20).macs() / spec.macs()
        assert 0.6 < share < 0.8
        assert f"sees 20 of 32 frames and does {share:.0%} of the multiplications" in refusal
        assert exporter.attention_refusal(spec.with_clip(20)) == ""

    def test_the_export_says_so_without_being_asked(self) -> None:
        note = exporter.attention_note(named("tubevit-ti"))
        assert note.startswith("attention stays in fp16: in int8 it is one kernel up to 512 tokens only")
        assert "--frames 20" in note
        assert exporter.attention_note(named("tubevit-ti", frames=20)) == ""

    def test_where_no_shorter_clip_helps_none_is_proposed(self) -> None:
        stored = replace(named("tubevit-b"), positions="stored")
        assert "--frames" not in exporter.attention_refusal(stored)
        assert exporter.attention_note(stored) == ""

    def test_other_head_sizes_are_refused(self, tiny_checkpoint: Path) -> None:
        graph = traced(checkpoints.load(tiny_checkpoint))
        with pytest.raises(InputError, match="needs heads of 16, 32, 64 channels, this model's have 12"):
            exporter.calibration_request(graph, with_settings("rtx-int8", attention="int8"))

    def test_operands_are_queries_keys_softmax_and_values_of_every_block(self) -> None:
        graph = traced(small_checkpoint())
        request = exporter.calibration_request(graph, with_settings("trt-int8", attention="int8")).tensors
        names = ("q", "k", "softmax", "v")
        assert sorted(request) == sorted(f"blocks.{i}.attn.{name}" for i in range(2) for name in names)
        assert exporter.calibration_request(graph, export.target("trt-int8")).tensors == ()

    def test_an_export_quantises_both_products_and_still_answers(self, tmp_path: Path, few_clips: Path) -> None:
        options = replace(GATHER, settings={"attention": "int8"}, calib=few_clips, max_drop=100.0)
        bundle = pipeline.export_model("trt-int8", small_checkpoint(), tmp_path, options)
        model = onnx.load(bundle.artifact_path)
        makers = {name: node.op_type for node in model.graph.node for name in node.output}
        products = [n for n in model.graph.node if n.name.endswith((".scores", ".context"))]
        assert len(products) == 4
        assert {makers[name] for node in products for name in node.input} == {"DequantizeLinear"}
        table = CalibrationTable.load(bundle.path / bundles.CALIBRATION)
        softmax = table.ranges["blocks.0.attn.softmax"]  # 0 to 1, as far as 127 steps of a float16 scale reach
        assert (softmax.low, softmax.method) == (0.0, "softmax")
        assert softmax.high == pytest.approx(127 * float(np.float16(1 / 127)), rel=1e-6)
        ranges = CalibrationTable.from_cache((bundle.path / exporter.CACHE).read_text())
        assert ranges["blocks.1.attn.q"].symmetric == table.ranges["blocks.1.attn.q"].symmetric
        assert bundle.parity["max_abs_error"] < 0.1 * max(1, bundle.parity["max_abs_logit"])
        if installed("tensorrt_rtx"):
            sdk = load_sdk("rtx")
            build_engine(sdk, bundle.artifact_path, Settings(capabilities=("89",)))
            assert summarize_engine_layers(sdk.layers)["attention"] == {"int8": 2}


class TestLegacy:
    """For TensorRT 8.6 to 10: nothing here can run it; what is written is checked by other readers."""

    def test_the_graph_is_of_2023_and_means_the_same(self, graph: Graph, rng: np.random.Generator) -> None:
        old = rewrite.opset_17(rewrite.cast_first(graph.model))
        assert [entry.version for entry in old.opset_import] == [17]
        assert "Gelu" not in {node.op_type for node in old.graph.node}
        clips = rng.integers(0, 256, (2, *graph.contract.shape), np.uint8)
        before, after = (export.evaluator()(m)({"frames": clips})[0] for m in (graph.model, old))
        np.testing.assert_allclose(after, before, atol=1e-5)

    @pytest.mark.parametrize("name", ["mean", *models.OTHERS])
    def test_other_transformers_mean_the_same_too(self, name: str) -> None:
        """Tanh GELU, and means, whose axes were an attribute."""
        old = rewrite.opset_17(rewrite.cast_first(models.trace(name).model))
        assert "Gelu" not in {node.op_type for node in old.graph.node}
        frames = models.noise(name)
        np.testing.assert_allclose(models.run(old, frames), models.reference(name, frames), atol=1e-5)

    @pytest.mark.parametrize("approximate", ["none", "tanh"])
    def test_the_steps_of_a_gelu_are_a_gelu(self, approximate: Literal["none", "tanh"]) -> None:
        """In float16 too, where the square of 300 is none: weakly typed networks compute in it."""
        steps = rewrite._gelu_steps(onnx.helper.make_node("Gelu", ["x"], ["y"], approximate=approximate))
        for dtype, tolerance in ((np.float32, 2e-6), (np.float16, 2e-3)):
            values: dict[str, Any] = {name: np.array(v, dtype) for name, v in rewrite.GELU_NUMBERS.items()}
            values["x"] = np.array([-30000, -300, -4, -1, -0.1, 0, 0.1, 1, 4, 300, 30000], dtype)
            known: dict[str, Any] = {"Add": torch.add, "Mul": torch.mul, "Tanh": torch.tanh, "Erf": torch.erf}
            for step in steps:
                given = [torch.from_numpy(values[name]) for name in step.input]
                values[step.name] = known[step.op_type](*given).numpy()
            expected = torch.nn.functional.gelu(torch.tensor(values["x"]).double(), approximate=approximate)
            np.testing.assert_allclose(values["y"], expected, rtol=tolerance, atol=tolerance)

    def test_the_bundle_carries_graph_clips_and_ranges(self, legacy_bundle: Bundle) -> None:
        clips = np.load(legacy_bundle.path / bundles.CALIBRATION_CLIPS)
        assert clips.shape == (12, *legacy_bundle.contract.shape)  # all there are
        assert clips.dtype == np.uint8
        assert {LEGACY, exporter.CACHE, bundles.CALIBRATION_CLIPS} <= set(legacy_bundle.files)
        assert any(
            note.startswith("legacy: the proof is of the typed graph") for note in legacy_bundle.build["int8"]["notes"]
        )
        settings = Settings.from_json(legacy_bundle.build["settings"])
        assert (settings.legacy, settings.source) == ("int8", "legacy.onnx")

    def test_layer_norm_and_softmax_are_fp32_the_linears_int8_and_the_rest_fp16(self, legacy_bundle: Bundle) -> None:
        layers = dict(Settings.from_json(legacy_bundle.build["settings"]).layers)
        old = onnx.load(legacy_bundle.path / LEGACY)
        assert set(layers) - {"*"} <= {node.name for node in old.graph.node}
        assert layers["*"] == "fp16"
        assert layers["blocks.0.norm1"] == layers["blocks.1.attn.softmax"] == "fp32"
        assert layers["blocks.1.mlp.fc2.matmul"] == "int8"
        assert "blocks.0.attn.scores" not in layers
        assert (
            f"--layerPrecisions=*:fp16,{','.join(f'{k}:{v}' for k, v in layers.items() if k != '*')}"
            in (legacy_bundle.build["command"])
        )

    def test_a_real_parser_takes_it(self, legacy_bundle: Bundle) -> None:
        pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx: pip install 'edgetube[rtx]'")
        _, network, parser = parse(load_sdk("rtx"), legacy_bundle.path / LEGACY)
        names = {network.get_layer(i).name for i in range(network.num_layers)}
        assert set(dict(legacy_bundle.build["settings"]["layers"])) - {"*"} <= names
        del parser

    def test_an_sdk_without_calibrators_says_what_to_do(self, legacy_bundle: Bundle) -> None:
        pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx: pip install 'edgetube[rtx]'")
        with pytest.raises(BackendError, match=r"knows typed networks only; .*legacy=yes.*export without it"):
            build_engine(load_sdk("rtx"), legacy_bundle.path / LEGACY, Settings(legacy="int8"))


@pytest.fixture(scope="module")
def few_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clips.npy"
    np.save(path, np.stack([clip.frames for clip in demo.evaluation(small_checkpoint().contract, 12)]))
    return path


@pytest.fixture(scope="module")
def legacy_bundle(tmp_path_factory: pytest.TempPathFactory, few_clips: Path) -> Bundle:
    options = replace(GATHER, settings={"legacy": "yes"}, calib=few_clips, max_drop=100.0)
    return pipeline.export_model("trt-int8", small_checkpoint(), tmp_path_factory.mktemp("legacy"), options)


def small_checkpoint() -> Checkpoint:
    """Random weights with heads of 16 channels; its labels are the built-in ones."""
    tubes = (TubeSpec((4, 8, 8), (4, 16, 16)), TubeSpec((1, 16, 16), (8, 16, 16)))
    spec = ModelSpec(tubes, 8, (32, 32), 32, 2, 2, (("motion", len(demo.LABELS)),))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = VideoTransformer(spec).eval()
    return checkpoints.Checkpoint("small", model, InputContract(8, 32, 32, fps=10.0), demo.LABELS, "", {})


def traced(checkpoint: Any) -> Any:
    module = static.StaticTransformer(checkpoint.model, checkpoint.contract, "gather")
    return canonical.trace(module, checkpoint.spec, checkpoint.contract)


@pytest.mark.parametrize("name", models.REDUCED)
def test_what_decides_which_tokens_leave_is_outside_of_the_integers(name: str, tmp_path: Path) -> None:
    """Q/DQ is around linears alone: no index, and nothing that a choice compares, passes through 8 bits."""
    graph, frames = models.trace(name), models.noise(name)
    table = table_of(graph.model, "int8")
    built = exporter.build(BuildContext(graph, with_settings("trt-int8"), tmp_path, table))
    model = onnx.load(tmp_path / built.artifact)
    made = {output: node for node in model.graph.node for output in node.output}
    readers = {node.input[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    rounded = {made_by.input[0] for made_by in model.graph.node if made_by.op_type == "QuantizeLinear"}
    assert len(readers) > len(rounded) > 0
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    assert {types[name] for name in rounded} <= {TensorProto.FLOAT, TensorProto.FLOAT16}
    parts = tuple(f"{decision.rpartition('.')[0]}." for decision in graph.roles.decisions)
    inside = [node for node in model.graph.node if node.name.startswith(parts)]
    assert inside
    assert not [node for node in inside if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    floats = {TensorProto.FLOAT, TensorProto.FLOAT16}
    for decision in graph.roles.decisions:
        assert types[decision] == TensorProto.INT32
    assert {node.op_type for node in inside if types[node.output[0]] not in floats} <= {
        "And", "Cast", "Equal", "Gather", "Greater", "Less", "Or", "ReduceMin", "ReduceSum", "Reshape", "Slice", "Sub",
        "Unsqueeze", "Where",
    }  # fmt: skip
    assert made[graph.roles.decisions[0]].op_type == "ReduceSum"
    assert (
        models.simulated_sqnr(name, frames, model)
        > models.simulated_sqnr(name, frames, quantize.qdq(graph.model, table)) - 1
    )


@needs_rtx
class TestForReal:
    """The vendor's parser and builder."""

    def test_the_parser_takes_every_lowering_in_both_precisions(self, graph: Graph, tmp_path: Path) -> None:
        sdk = load_sdk("rtx")
        for model in (graph.model, convert_to_fp16(graph.model)):
            canonical.save(rewrite.cast_first(model), tmp_path / "model.onnx")
            _, network, parser = parse(sdk, tmp_path / "model.onnx")
            assert network.num_layers > 100
            assert [network.get_input(i).dtype for i in range(network.num_inputs)] == [cast(Any, sdk.api).uint8]
            assert network.get_output(0).dtype == sdk.api.float32
            del parser

    @pytest.mark.parametrize("name", models.OTHERS)
    def test_other_transformers_become_engines_with_fused_attention(self, name: str, tmp_path: Path) -> None:
        sdk = load_sdk("rtx")
        canonical.save(rewrite.opset_17(rewrite.cast_first(models.trace(name).model)), tmp_path / LEGACY)
        parse(sdk, tmp_path / LEGACY)
        canonical.save(rewrite.cast_first(convert_to_fp16(models.trace(name).model)), tmp_path / "model.onnx")
        build_engine(sdk, tmp_path / "model.onnx", Settings(capabilities=("86",)))
        layers = summarize_engine_layers(sdk.layers)
        assert layers["attention"] == {"fp16": len(models.trace(name).roles.attention)}
        assert set(layers["gemms"]) == {"fp16"}

    @pytest.mark.parametrize("name", models.REDUCED)
    @pytest.mark.parametrize("precision", ["fp16", "int8"])
    def test_what_leaves_tokens_out_becomes_an_engine_with_its_products_in_the_stated_type(
        self, name: str, precision: str, tmp_path: Path
    ) -> None:
        graph, target = models.trace(name), with_settings(f"rtx-{precision}", capabilities="86")
        table = table_of(graph.model, "int8") if target.precision.quantises_activations else None
        built = exporter.build(BuildContext(graph, target, tmp_path, table))
        assert built.details["engine"]["file"] == "model.engine"
        assert built.details["layers"]["gemms"].get(precision, 0) >= len(graph.roles.linears)
        assert not built.details["layers"].get("fell_back")
        target = with_settings(f"trt-{precision}", legacy="yes")  # of which the parser reads the graph in opset 17
        assert exporter.build(BuildContext(graph, target, tmp_path, table)).details["parsed_by"]

    def test_rotary_positions_and_divided_attention_leave_attention_fused(self, tmp_path: Path) -> None:
        found = []
        for kind in ("plain", "rotary", "divided"):
            canonical.save(rewrite.cast_first(convert_to_fp16(models.trace_vit(kind).model)), tmp_path / "model.onnx")
            sdk = load_sdk("rtx")
            build_engine(sdk, tmp_path / "model.onnx", Settings(capabilities=("86",)))
            found.append(summarize_engine_layers(sdk.layers))
        plain, turned, divided = found
        assert plain["attention"] == turned["attention"] == {"fp16": 2}
        assert divided["attention"] == {"fp16": 4}
        assert turned["kernels"] <= 1.5 * plain["kernels"]
        assert divided["kernels"] <= 2 * plain["kernels"]

    def test_the_cast_has_to_come_first(self, graph: Graph, tmp_path: Path) -> None:
        """Why `cast_first` is there; when this fails, a newer parser can do without it."""
        canonical.save(graph.model, tmp_path / "model.onnx")
        with pytest.raises(BackendError, match=r"the parser refuses model\.onnx at tubes\.\S+ \(Reshape\): .*UInt8"):
            build_engine(load_sdk("rtx"), tmp_path / "model.onnx", Settings(capabilities=("86",)))

    def test_engines_of_three_generations_and_what_is_in_them(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        bundle = pipeline.export_model("rtx-fp16", tiny_checkpoint, tmp_path, GATHER)
        assert bundle.status in ("emulated", "executed")
        assert bundle.build["engine"]["capabilities"] == ["86", "89", "120"]
        assert bundle.build["engine"]["version"] == load_sdk("rtx").version
        assert set(bundle.files) == {"model.onnx", "model.engine", "golden.npz"}
        assert (bundle.path / "model.engine").read_bytes().startswith(b"vtrt")
        layers = bundle.build["layers"]
        assert layers["attention"] == {"fp16": bundle.spec.depth}
        assert set(layers["gemms"]) == {"fp16"}
        bundles.load(bundle.path)

    def test_a_gpu_that_the_sdk_does_not_know_lists_those_it_does(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        options = replace(GATHER, settings={"capabilities": "90"})
        with pytest.raises(BackendError, match=r"does not know SM90; it builds for .*86.*120"):
            pipeline.export_model("rtx-fp16", tiny_checkpoint, tmp_path, options)
        assert not list(tmp_path.iterdir())

    def test_a_broken_file_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(b"not a model")
        with pytest.raises(BackendError, match=r"TensorRT for RTX 1\..*: the parser refuses model\.onnx") as caught:
            parse(load_sdk("rtx"), tmp_path / "model.onnx")
        assert "\n" not in str(caught.value)

    @pytest.mark.long
    @pytest.mark.parametrize("capability", ["86", "89", "120"])
    @pytest.mark.parametrize("precision", ["fp16", "int8"])
    @pytest.mark.parametrize("checkpoint", ["demo", "random:tubevit-ti"])
    def test_real_models_for_each_generation(
        self, checkpoint: str, precision: str, capability: str, real_graphs: Callable[..., Any]
    ) -> None:
        real = real_graphs(checkpoint, precision)
        sdk = load_sdk("rtx")
        plan = build_engine(sdk, real.path, Settings(capabilities=(capability,)))
        assert plan.startswith(b"vtrt")
        assert len(plan) > real.path.stat().st_size * 0.9
        layers = summarize_engine_layers(sdk.layers)
        assert layers["attention"] == {"fp16": real.depth}
        if precision == "fp16":
            assert set(layers["gemms"]) == {"fp16"}
            assert layers["gemms"]["fp16"] >= 4 * real.depth
        else:
            assert layers["gemms"]["int8"] >= 4 * real.depth
            assert exporter.fell_back(layers, real.table) == []

    @pytest.mark.long
    @pytest.mark.parametrize(("frames", "tokens"), [(20, 392), (32, 539)])
    def test_why_attention_in_int8_ends_at_512_tokens(
        self, frames: int, tokens: int, real_graphs: Callable[..., Any]
    ) -> None:
        """When the longer one becomes one kernel too, a newer builder can do without the rule."""
        real = real_graphs("random:tubevit-ti", "int8", frames, attention=True)
        sdk = load_sdk("rtx")
        build_engine(sdk, real.path, Settings(capabilities=("89",)))
        assert real.tokens == tokens
        assert summarize_engine_layers(sdk.layers)["attention"] == ({"int8": real.depth} if tokens <= 512 else {})


@pytest.fixture(scope="module")
def real_graphs(tmp_path_factory: pytest.TempPathFactory, rng_of_module: np.random.Generator) -> Callable[..., Any]:
    """The typed graph of a checkpoint on disk, made once; int8 with the extremes of one clip of noise as ranges."""
    made: dict[Any, Any] = {}

    def make(name: Any, precision: Any, frames: Any = None, attention: bool = False) -> Any:
        key = name, precision, frames, attention
        if key in made:
            return made[key]
        checkpoint = checkpoints.load(name).with_clip(frames, None)
        graph, table = traced(checkpoint), None
        model = graph.model
        if precision == "int8":
            clip = rng_of_module.integers(0, 256, (1, *checkpoint.contract.shape), np.uint8)
            table = extremes(graph, clip, attention)
            model = rewrite.separate_projections(quantize.qdq(model, table))
        path = tmp_path_factory.mktemp("real") / "model.onnx"
        canonical.save(rewrite.cast_first(convert_to_fp16(model)), path)
        made[key] = SimpleNamespace(path=path, depth=checkpoint.spec.depth, tokens=checkpoint.spec.tokens, table=table)
        return made[key]

    return make


@pytest.fixture(scope="module")
def rng_of_module() -> np.random.Generator:
    return np.random.default_rng(0)


def extremes(graph: Any, clip: Any, attention: Any) -> Any:
    """A table of every linear: builders only look at where the scales are, not at what they are."""
    model = graph.model
    linears, weights = graphs.linears(model), graphs.initializers(model)
    names = dict.fromkeys(linear.activation for linear in linears)
    if attention:
        names |= dict.fromkeys(graphs.attention_operands(model, graph.roles))
    values = export.evaluator()(graphs.extract_subgraph(model, list(names)))({"frames": clip})
    ranges = {
        name: Range(min(0.0, float(v.min())), max(0.0, float(v.max())), "extremes")
        for name, v in zip(names, values, strict=True)
    }
    plans = tuple(
        LinearPlan(
            linear.name, linear.activation, linear.weight, tuple(np.abs(weights[linear.weight]).max(0) / 127), "int8"
        )
        for linear in linears
    )
    return CalibrationTable(graphs.digest(model), {}, "int8", ranges, plans)


def test_the_graph_keeps_layer_norm_and_softmax_in_fp32(graph: Graph) -> None:
    model = rewrite.cast_first(convert_to_fp16(graph.model))
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    wide = [n for n in model.graph.node if n.op_type in ("LayerNormalization", "Softmax")]
    assert wide
    assert {kinds[n.input[0]] for n in wide} == {onnx.TensorProto.FLOAT}
    products = [n for n in model.graph.node if n.op_type in ("MatMul", "Conv")]
    assert {kinds[n.input[0]] for n in products} == {onnx.TensorProto.FLOAT16}
