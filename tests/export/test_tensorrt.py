"""Export for TensorRT: the graph means the same, a real parser takes it, and a real builder makes engines of it.

TensorRT for RTX needs no GPU to parse and to build, so nothing here is a double.
"""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from edgetube import bundle as bundles
from edgetube import export
from edgetube.errors import BackendError, InputError
from edgetube.export import graph as graphs
from edgetube.export import pipeline, rewrite, static
from edgetube.export import tensorrt as exporter
from edgetube.model import checkpoints
from edgetube.runtimes import tensorrt as runtime
from edgetube.targets import installed

GATHER = pipeline.Options(lowering="gather")
needs_rtx = pytest.mark.skipif(not installed("tensorrt_rtx"), reason="needs tensorrt_rtx: pip install 'edgetube[rtx]'")


def with_settings(name, **settings):
    return export.target(name).choose({k.replace("_", "-"): v for k, v in settings.items()})


@pytest.fixture(scope="module", params=static.LOWERINGS)
def graph(request, tiny_checkpoint):
    checkpoint = checkpoints.load(tiny_checkpoint)
    module = static.StaticTubeViT(checkpoint.model, checkpoint.contract, request.param, batch=2)
    return graphs.trace(module, checkpoint.spec, checkpoint.contract, 2)


class TestCastFirst:
    """Moving and casting commute."""

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_the_answers_are_the_same_to_the_last_bit(self, graph, precision, rng):
        model = graph.model if precision == "fp32" else graphs.half(graph.model)
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

    def test_uint8_reaches_one_cast_and_nothing_else(self, graph):
        moved = rewrite.cast_first(graphs.half(graph.model)).graph
        assert [n.op_type for n in moved.node if "frames" in n.input] == ["Cast"]
        kinds = {v.name: v.type.tensor_type.elem_type for v in [*moved.input, *moved.value_info, *moved.output]}
        assert [name for name, kind in kinds.items() if kind == TensorProto.UINT8] == ["frames"]

    def test_it_leaves_the_given_graph_alone(self, graph):
        before = graph.model.SerializeToString(deterministic=True)
        rewrite.cast_first(graph.model)
        assert graph.model.SerializeToString(deterministic=True) == before


class TestSettings:
    @pytest.mark.parametrize(
        ("target", "settings", "words"),
        [
            ("trt-fp16", {}, "--stronglyTyped --noTF32 --profilingVerbosity=detailed"),
            ("trt-fp16", {"workspace": "512"}, "--memPoolSize=workspace:512"),
            ("trt-fp16", {"timing_cache": "t.cache"}, "--timingCacheFile=t.cache"),
            ("trt-fp32", {"version_compatible": "yes"}, "--versionCompatible"),
            ("trt-fp16", {"hardware_compatible": "ampere"}, "--hardwareCompatibilityLevel=ampere+"),
            ("trt-fp16", {"hardware_compatible": "same"}, "--hardwareCompatibilityLevel=sameComputeCapability"),
            ("rtx-fp16", {}, "--computeCapabilities=86,89,120"),
            ("rtx-fp16", {"capabilities": "75"}, "--computeCapabilities=75"),
        ],
    )
    def test_each_is_in_the_line_of_the_vendor_s_tool(self, target, settings, words):
        chosen = exporter.parse_settings(with_settings(target, **settings))
        line = exporter.command(target[:3], chosen)
        tool = {"trt": "trtexec", "rtx": "tensorrt_rtx"}[target[:3]]
        assert line.startswith(f"{tool} --onnx=model.onnx --saveEngine=model.engine ")
        assert f" {words} " in f"{line} "
        assert runtime.Settings.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen

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
        ],
    )
    def test_impossible_ones_are_refused(self, target, settings, message):
        with pytest.raises(InputError, match=message):
            exporter.parse_settings(with_settings(target, **settings))


@pytest.mark.parametrize("name", ["trt-fp32", "trt-fp16"])
def test_without_a_gpu_the_bundle_is_whole_but_for_the_engine(name, tiny_checkpoint, tmp_path):
    target = export.target(name)
    if not target.missing(target.run_needs):
        pytest.skip("this machine can build the engine")
    bundle = pipeline.export_model(name, tiny_checkpoint, tmp_path, GATHER)
    assert bundle.status == "deferred"
    assert set(bundle.files) == {"model.onnx", "golden.npz"}
    assert bundle.parity["status"] == "emulated"
    assert bundle.parity["clips"] == pipeline.PROOF_CLIPS
    assert bundle.parity["max_abs_error"] <= target.tolerance * max(1, bundle.parity["max_abs_logit"])
    assert bundle.build["command"].startswith("trtexec --onnx=model.onnx")
    if installed("tensorrt_rtx"):
        assert bundle.build["parsed_by"].startswith("TensorRT for RTX 1.")


@needs_rtx
class TestForReal:
    """The vendor's parser and builder."""

    def test_the_parser_takes_every_lowering_in_both_precisions(self, graph, tmp_path):
        kit = runtime.sdk("rtx")
        for model in (graph.model, graphs.half(graph.model)):
            graphs.save(rewrite.cast_first(model), tmp_path / "model.onnx")
            _, network, parser = runtime.parse(kit, tmp_path / "model.onnx")
            assert network.num_layers > 100
            assert [network.get_input(i).dtype for i in range(network.num_inputs)] == [kit.trt.uint8]
            assert network.get_output(0).dtype == kit.trt.float32
            del parser

    def test_the_cast_has_to_come_first(self, graph, tmp_path):
        """Why `cast_first` is there; when this fails, a newer parser can do without it."""
        graphs.save(graph.model, tmp_path / "model.onnx")
        with pytest.raises(BackendError, match=r"the parser refuses model\.onnx at tubes\.\S+ \(Reshape\): .*UInt8"):
            runtime.build(runtime.sdk("rtx"), tmp_path / "model.onnx", runtime.Settings(capabilities=("86",)))

    def test_engines_of_three_generations_and_what_is_in_them(self, tiny_checkpoint, tmp_path):
        bundle = pipeline.export_model("rtx-fp16", tiny_checkpoint, tmp_path, GATHER)
        assert bundle.status in ("emulated", "executed")
        assert bundle.build["engine"]["capabilities"] == ["86", "89", "120"]
        assert bundle.build["engine"]["version"] == runtime.sdk("rtx").version
        assert set(bundle.files) == {"model.onnx", "model.engine", "golden.npz"}
        assert (bundle.path / "model.engine").read_bytes().startswith(b"vtrt")
        layers = bundle.build["layers"]
        assert layers["attention"] == {"fp16": bundle.spec.depth}
        assert set(layers["gemms"]) == {"fp16"}
        bundles.load(bundle.path)

    def test_a_gpu_that_the_sdk_does_not_know_lists_those_it_does(self, tiny_checkpoint, tmp_path):
        options = replace(GATHER, settings={"capabilities": "90"})
        with pytest.raises(BackendError, match=r"does not know SM90; it builds for .*86.*120"):
            pipeline.export_model("rtx-fp16", tiny_checkpoint, tmp_path, options)
        assert not list(tmp_path.iterdir())

    def test_a_broken_file_is_one_line(self, tmp_path):
        (tmp_path / "model.onnx").write_bytes(b"not a model")
        with pytest.raises(BackendError, match=r"TensorRT for RTX 1\..*: the parser refuses model\.onnx") as caught:
            runtime.parse(runtime.sdk("rtx"), tmp_path / "model.onnx")
        assert "\n" not in str(caught.value)

    @pytest.mark.slow
    @pytest.mark.parametrize("checkpoint", ["demo", "random:tubevit-ti"])
    @pytest.mark.parametrize("capability", ["86", "89", "120"])
    def test_real_models_for_each_generation(self, checkpoint, capability, tmp_path, real_graphs):
        path, depth = real_graphs(checkpoint)
        kit = runtime.sdk("rtx")
        plan = runtime.build(kit, path, runtime.Settings(capabilities=(capability,)))
        assert len(plan) > path.stat().st_size * 0.9
        truth = runtime.layer_truth(kit.layers)
        assert truth["attention"] == depth
        assert set(truth["gemms"]) == {"fp16"}
        assert sum(truth["gemms"].values()) >= 4 * depth


@pytest.fixture(scope="module")
def real_graphs(tmp_path_factory):
    """The typed fp16 graph of a checkpoint on disk, made once, and the model's depth."""
    made = {}

    def make(name):
        if name not in made:
            checkpoint = checkpoints.load(name)
            module = static.StaticTubeViT(checkpoint.model, checkpoint.contract, "gather")
            traced = graphs.trace(module, checkpoint.spec, checkpoint.contract)
            path = tmp_path_factory.mktemp("real") / "model.onnx"
            graphs.save(rewrite.cast_first(graphs.half(traced.model)), path)
            made[name] = path, checkpoint.spec.depth
        return made[name]

    return make


def test_the_graph_keeps_layer_norm_and_softmax_in_fp32(graph):
    model = rewrite.cast_first(graphs.half(graph.model))
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    wide = [n for n in model.graph.node if n.op_type in ("LayerNormalization", "Softmax")]
    assert wide
    assert {kinds[n.input[0]] for n in wide} == {onnx.TensorProto.FLOAT}
    products = [n for n in model.graph.node if n.op_type in ("MatMul", "Conv")]
    assert {kinds[n.input[0]] for n in products} == {onnx.TensorProto.FLOAT16}
