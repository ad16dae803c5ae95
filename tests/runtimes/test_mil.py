"""The evaluator of ML programs: every operation against PyTorch, from packages that the vendor's writer saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgetube import mlpackage
from edgetube.errors import BundleError, ParityError
from edgetube.runtimes import mil

ct = pytest.importorskip("coremltools")

SHAPES = {"a": (2, 6, 8), "b": (2, 8, 5), "c": (2, 6, 12, 10), "e": (2, 10, 12, 3), "s": (2, 6, 8)}
RNG = np.random.default_rng(0)
W = RNG.normal(size=(16, 8)).astype(np.float32)
K = RNG.normal(size=(7, 6, 4, 3)).astype(np.float32)
P = RNG.normal(size=(7, 6, 1, 1)).astype(np.float32)
BIAS = RNG.normal(size=16).astype(np.float32)
GAMMA, BETA = RNG.normal(size=(2, 8)).astype(np.float32)
INDEX = np.array([5, 0, 3, 3], np.int32)


def T(array: Any) -> Any:
    return torch.from_numpy(np.asarray(array)).float()


CASES = {
    "add": (lambda mb, v, _: mb.add(x=v["a"], y=v["s"]), lambda v: v["a"] + v["s"]),
    "sub": (lambda mb, v, _: mb.sub(x=v["a"], y=v["s"]), lambda v: v["a"] - v["s"]),
    "mul": (lambda mb, v, _: mb.mul(x=v["a"], y=v["s"]), lambda v: v["a"] * v["s"]),
    "matmul": (lambda mb, v, _: mb.matmul(x=v["a"], y=v["b"]), lambda v: v["a"] @ v["b"]),
    "matmul_transposed": (
        lambda mb, v, _: mb.matmul(x=v["b"], y=v["a"], transpose_x=True, transpose_y=True),
        lambda v: v["b"].mT @ v["a"].mT,
    ),
    "linear": (
        lambda mb, v, d: mb.linear(x=v["a"], weight=W.astype(d), bias=BIAS.astype(d)),
        lambda v: F.linear(v["a"], v["W"], v["BIAS"]),
    ),
    "conv": (
        lambda mb, v, d: mb.conv(x=v["c"], weight=K.astype(d), strides=[4, 2], pad_type="valid"),
        lambda v: F.conv2d(v["c"], v["K"], stride=(4, 2)),
    ),
    "conv_1x1": (
        lambda mb, v, d: mb.conv(x=v["c"], weight=P.astype(d), bias=BIAS[:7].astype(d), pad_type="valid"),
        lambda v: F.conv2d(v["c"], v["P"], v["BIAS"][:7]),
    ),
    "einsum": (
        lambda mb, v, _: mb.einsum(values=(v["c"], v["e"]), equation="nchw,nwhu->nchu"),
        lambda v: torch.einsum("nchw,nwhu->nchu", v["c"], v["e"]),
    ),
    "layer_norm": (
        lambda mb, v, d: mb.layer_norm(
            x=v["a"], axes=[-1], gamma=GAMMA.astype(d), beta=BETA.astype(d), epsilon=d(1e-3)
        ),
        lambda v: F.layer_norm(v["a"], (8,), v["GAMMA"], v["BETA"], float(v["d"](1e-3))),
    ),
    "layer_norm_columns": (
        lambda mb, v, d: mb.layer_norm(x=v["b"], axes=[1], gamma=GAMMA.astype(d), beta=BETA.astype(d), epsilon=d(1e-3)),
        lambda v: F.layer_norm(v["b"].mT, (8,), v["GAMMA"], v["BETA"], float(v["d"](1e-3))).mT,
    ),
    "softmax": (lambda mb, v, _: mb.softmax(x=v["a"], axis=1), lambda v: v["a"].softmax(1)),
    "gelu": (lambda mb, v, _: mb.gelu(x=v["a"], mode="EXACT"), lambda v: F.gelu(v["a"])),
    "gelu_tanh": (
        lambda mb, v, _: mb.gelu(x=v["a"], mode="TANH_APPROXIMATION"),
        lambda v: F.gelu(v["a"], approximate="tanh"),
    ),
    "sigmoid": (lambda mb, v, _: mb.sigmoid(x=v["a"]), lambda v: v["a"].sigmoid()),
    "silu": (lambda mb, v, _: mb.silu(x=v["a"]), lambda v: F.silu(v["a"])),
    "reduce_mean": (lambda mb, v, _: mb.reduce_mean(x=v["a"], axes=[1], keep_dims=False), lambda v: v["a"].mean(1)),
    "reshape": (lambda mb, v, _: mb.reshape(x=v["a"], shape=(4, 3, 8)), lambda v: v["a"].reshape(4, 3, 8)),
    "transpose": (lambda mb, v, _: mb.transpose(x=v["a"], perm=[2, 0, 1]), lambda v: v["a"].permute(2, 0, 1)),
    "expand_dims": (lambda mb, v, _: mb.expand_dims(x=v["a"], axes=[2]), lambda v: v["a"].unsqueeze(2)),
    "squeeze": (lambda mb, v, _: mb.squeeze(x=mb.expand_dims(x=v["a"], axes=[0]), axes=[0]), lambda v: v["a"]),
    "concat": (lambda mb, v, _: mb.concat(values=[v["a"], v["s"]], axis=1), lambda v: torch.cat([v["a"], v["s"]], 1)),
    "split": (
        lambda mb, v, _: mb.sub(**dict(zip("xy", mb.split(x=v["a"], num_splits=2, axis=2), strict=True))),
        lambda v: v["a"][..., :4] - v["a"][..., 4:],
    ),
    "slice_by_index": (
        lambda mb, v, _: mb.slice_by_index(x=v["a"], begin=[0, 1, 0], end=[2, 6, 7], stride=[1, 2, 3]),
        lambda v: v["a"][:, 1:6:2, 0:7:3],
    ),
    "gather": (lambda mb, v, _: mb.gather(x=v["a"], indices=INDEX, axis=1), lambda v: v["a"][:, INDEX.astype(int)]),
    "split_sizes": (
        lambda mb, v, _: mb.concat(values=mb.split(x=v["a"], split_sizes=[5, 3], axis=2)[::-1], axis=2),
        lambda v: torch.cat([v["a"][..., 5:], v["a"][..., :5]], 2),
    ),
    "real_div": (
        lambda mb, v, d: mb.real_div(x=v["a"], y=GAMMA.astype(d)),
        lambda v: v["a"] / v["GAMMA"],
    ),
    "log": (
        lambda mb, v, d: mb.log(x=mb.mul(x=v["a"], y=v["a"]), epsilon=d(0.25)),
        lambda v: ((v["a"] * v["a"]).to(v["type"]).float() + 0.25).log(),
    ),
    "reduce_max": (lambda mb, v, _: mb.reduce_max(x=v["a"], axes=[1], keep_dims=True), lambda v: v["a"].amax(1, True)),
    "reduce_min": (lambda mb, v, _: mb.reduce_min(x=v["a"], axes=[2], keep_dims=False), lambda v: v["a"].amin(2)),
    "reduce_sum": (lambda mb, v, _: mb.reduce_sum(x=v["a"], axes=[2], keep_dims=False), lambda v: v["a"].sum(2)),
    "equal_greater_less": (
        lambda mb, v, d: mb.cast(
            x=mb.logical_or(
                x=mb.logical_and(x=mb.greater(x=v["a"], y=d(0)), y=mb.less(x=v["s"], y=d(0))),
                y=mb.equal(x=v["a"], y=mb.reduce_max(x=v["a"], axes=[2], keep_dims=True)),
            ),
            dtype="fp16" if d is np.float16 else "fp32",
        ),
        lambda v: (((v["a"] > 0) & (v["s"] < 0)) | (v["a"] == v["a"].amax(2, True))).float(),
    ),
    "select": (
        lambda mb, v, d: mb.select(cond=mb.less(x=v["a"], y=v["s"]), a=v["a"], b=v["s"]),
        lambda v: torch.minimum(v["a"], v["s"]),
    ),
    "quantize_dequantize": (
        lambda mb, v, d: mb.dequantize(
            input=mb.quantize(input=v["a"], scale=d(0.0625), output_dtype="int8"), scale=d(0.0625)
        ),
        lambda v: torch.fake_quantize_per_tensor_affine(v["a"], 0.0625, 0, -128, 127),
    ),
    "quantize_channels": (
        lambda mb, v, d: mb.dequantize(
            input=mb.quantize(
                input=v["a"],
                scale=np.full(6, 0.0625, d),
                zero_point=np.arange(6, dtype=np.uint8) * 40,
                axis=1,
                output_dtype="uint8",
            ),
            scale=np.full(6, 0.0625, d),
            zero_point=np.arange(6, dtype=np.uint8) * 40,
            axis=1,
        ),
        lambda v: torch.fake_quantize_per_channel_affine(
            v["a"], torch.full((6,), 0.0625), torch.arange(6, dtype=torch.int32) * 40, 1, 0, 255
        ),
    ),
}


def save(path: Any, build: Any, dtype: Any, target: str = "iOS17", names: Any = "as") -> Any:
    """A package of one function whose outputs are what `build` makes, by name."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, types

    from edgetube.export import coreml

    kind = types.fp16 if dtype is np.float16 else types.fp32
    program = Program()
    inputs = {name: mb.placeholder(shape=shape, dtype=kind) for name, shape in SHAPES.items() if name in names}
    with Function(inputs, opset_version=getattr(ct.target, target)) as function:
        function.set_outputs(list(build(mb, dict(function.inputs), dtype).values()))
    program.add_function("main", function)
    with coreml._quiet():
        ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=getattr(ct.target, target),
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        ).save(str(path))
    return mlpackage.load(path)


@pytest.fixture(scope="module", params=[np.float16, np.float32])
def evaluated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All cases in one program, evaluated on the same inputs: name -> array, and the inputs."""
    order: list[Any] = []

    def build(mb: Any, values: Any, dtype: Any) -> Any:
        made = {name: make(mb, values, dtype) for name, (make, _) in CASES.items()}
        order.extend(value.name for value in made.values())
        return made

    dtype = request.param
    package = save(tmp_path_factory.mktemp("ops") / "ops.mlpackage", build, dtype, names=SHAPES)
    rng = np.random.default_rng(1)
    inputs = {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}
    answers = mil.Program(package)({k: v.astype(np.float32) for k, v in inputs.items()})
    return dtype, inputs, dict(zip(CASES, (answers[name] for name in order), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_an_operation_is_pytorchs(evaluated: Any, case: str) -> None:
    dtype, inputs, answers = evaluated
    constants = {"W": W, "K": K, "P": P, "BIAS": BIAS, "GAMMA": GAMMA, "BETA": BETA}
    values = {k: T(v.astype(dtype)) for k, v in {**inputs, **constants}.items()} | {
        "d": dtype,
        "type": torch.float16 if dtype is np.float16 else torch.float32,
    }
    expected = CASES[case][1](values).numpy()
    got = answers[case]
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    if dtype is np.float16:
        np.testing.assert_array_equal(got, got.astype(np.float16), "every number is a float16")
        ulp = np.spacing(np.abs(expected).astype(np.float16)).astype(np.float32)
        # The result is rounded once; a sum in another order may land on the neighbour.
        assert (np.abs(got - expected) <= ulp * 1.01).all()
    else:
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=4e-6)


def test_every_operation_has_a_case() -> None:
    tested = set(CASES)
    for variant in ("_1x1", "_columns", "_transposed", "_tanh", "_greater_less", "_sizes"):
        tested = {case.removesuffix(variant) for case in tested}
    tested |= {"quantize", "dequantize", "greater", "less", "logical_and", "logical_or"}
    compressed = {name for name in mil.OPERATIONS if name.startswith("constexpr_")}
    assert set(mil.OPERATIONS) - tested == compressed | {"cast", "classify"}


@pytest.mark.parametrize("target", ["iOS17", "iOS18"])
def test_compressed_weights_are_what_their_formulas_say(tmp_path: Path, target: str, rng: np.random.Generator) -> None:
    data = rng.integers(-127, 128, (16, 8)).astype(np.int8)
    scale = rng.uniform(0.01, 0.02, 16).astype(np.float16)
    zero = rng.integers(-5, 5, 16).astype(np.int8)
    indices = rng.integers(0, 16, (16, 8)).astype(np.uint8)

    def old(mb: Any, _: Any) -> Any:
        lut = np.linspace(-1, 1, 16).astype(np.float16)
        packed = (indices.reshape(-1, 2) @ np.array([1, 16])).astype(np.uint8)
        return lut[indices], (
            mb.constexpr_affine_dequantize(
                quantized_data=data, scale=scale, zero_point=zero, axis=np.int32(0), name="integers"
            ),
            mb.constexpr_lut_to_dense(lut=lut, indices=packed, shape=np.array((16, 8), np.uint32), name="palette"),
        )

    def new(mb: Any, types: Any) -> Any:
        lut = rng.normal(size=(4, 2, 16, 1)).astype(np.float16)
        blocks = lut[np.arange(16)[:, None] // 4, np.arange(8) // 4, indices, 0]
        return blocks, (
            mb.constexpr_blockwise_shift_scale(data=data, scale=scale[:, None], offset=zero[:, None], name="integers"),
            mb.constexpr_lut_to_dense(lut=lut, indices=indices.astype(types.np_uint4_dtype), name="palette"),
        )

    from coremltools.converters.mil.mil import types

    expected = {}

    def build(mb: Any, values: Any, _: Any) -> Any:
        expected["palette"], (integers, palette) = new(mb, types) if target == "iOS18" else old(mb, types)
        return {
            "one": mb.linear(x=values["a"], weight=integers, name="one"),
            "two": mb.linear(x=values["a"], weight=palette, name="two"),
        }

    program = mil.Program(save(tmp_path / "w.mlpackage", build, np.float16, target, "a"))
    exact = (data.astype(np.float32) - zero[:, None]) * scale[:, None].astype(np.float32)
    np.testing.assert_array_equal(program.constants["integers"], exact.astype(np.float16))
    np.testing.assert_array_equal(program.constants["palette"], expected["palette"].astype(np.float32))


def test_a_linear_layer_rounds_once() -> None:
    """The sum is wide, the result is a float16: 2048 + 1 + 1 would stay 2048 in float16 arithmetic."""
    x, weight = np.ones((1, 3), np.float32), np.array([[2048, 1, 1]], np.float32)
    np.testing.assert_array_equal(mil.round_to_fp16(mil.OPERATIONS["linear"]({"x": x, "weight": weight})), [[2050]])


def test_rounding_is_that_of_a_cast(rng: np.random.Generator) -> None:
    """Random bit patterns of float32, every float16, and the numbers half way between neighbours."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = np.sort(halves[np.isfinite(halves)])
    between = (halves[1:] + halves[:-1]) / 2
    patterns = rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
    patterns = patterns[np.isfinite(patterns) & (np.abs(patterns) < 65500)]
    for numbers in (halves, between, np.nextafter(between, np.float32(np.inf)), patterns):
        np.testing.assert_array_equal(mil.round_to_fp16(numbers), numbers.astype(np.float16).astype(np.float32))
    assert np.isinf(mil.round_to_fp16(np.array([65520, 1], np.float32))).tolist() == [True, False]
    assert np.isnan(mil.round_to_fp16(np.array([np.nan, 1], np.float32))).tolist() == [True, False]
    assert mil.round_to_fp16(np.array([65519], np.float32)) == 65504


def test_every_half_precision_gelu() -> None:
    """All 63488 finite float16 numbers."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    numbers = numbers[np.isfinite(numbers)].astype(np.float32)
    expected = F.gelu(torch.from_numpy(numbers).double()).numpy()
    got = mil.OPERATIONS["gelu"]({"x": numbers})
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-30)
    assert len(numbers) == 63488


def test_sigmoids_saturate_without_a_warning() -> None:
    numbers = np.array([-65504, -100, 0, 100, 65504], np.float32)
    np.testing.assert_allclose(mil.OPERATIONS["sigmoid"]({"x": numbers}), [0, 0, 0.5, 1, 1], atol=1e-40)
    np.testing.assert_allclose(mil.OPERATIONS["silu"]({"x": numbers}), [0, 0, 0, 100, 65504], atol=1e-40)


def test_an_overflow_names_the_operation_and_the_remedy(tmp_path: Path) -> None:
    package = save(
        tmp_path / "o.mlpackage", lambda mb, v, _: {"y": mb.mul(x=v["a"], y=v["s"], name="blocks_1_norm")}, np.float16
    )
    inputs = {name: np.full(shape, 300, np.float32) for name, shape in SHAPES.items()}
    with pytest.raises(ParityError, match=r"mul blocks_1_norm overflows float16 .*9e\+04.*--set fp32=blocks\?1\?norm"):
        mil.Program(package)(inputs)


def test_an_unknown_operation_is_refused_by_name(tmp_path: Path) -> None:
    package = save(tmp_path / "u.mlpackage", lambda mb, v, _: {"y": mb.tanh(x=v["a"])}, np.float16, names="a")
    with pytest.raises(BundleError, match="has the operation tanh, which this edgetube cannot evaluate"):
        mil.Program(package)


def test_integers_are_cast_towards_zero() -> None:
    got = mil.OPERATIONS["cast"]({"x": np.array([1.9, -1.9], np.float32), "dtype": "int32"})
    assert got.dtype == np.int32
    assert list(got) == [1, -1]


def test_integers_stay_integers() -> None:
    """A float32 would lose the last digit of 2^24 + 1."""
    big = np.array([[(1 << 24) + 1, 2]], np.int32)
    operations: dict[str, tuple[dict[str, Any], list[list[int]] | list[int]]] = {
        "add": ({"x": big, "y": np.int32(2)}, [[(1 << 24) + 3, 4]]),
        "sub": ({"x": big, "y": np.int32(2)}, [[(1 << 24) - 1, 0]]),
        "mul": ({"x": big, "y": np.int32(3)}, [[3 * ((1 << 24) + 1), 6]]),
        "reduce_sum": ({"x": big, "axes": [1]}, [(1 << 24) + 3]),
        "reduce_min": ({"x": big, "axes": [1]}, [2]),
        "reduce_max": ({"x": big, "axes": [1]}, [(1 << 24) + 1]),
    }
    for name, (arguments, expected) in operations.items():
        got = mil.OPERATIONS[name](arguments)
        assert got.dtype == np.int32
        assert got.tolist() == expected


def test_classify_names_the_best() -> None:
    label, scores = mil.OPERATIONS["classify"]({"classes": ["a", "b"], "probabilities": np.array([[0.25, 0.75]])})
    assert (label, scores) == ("b", {"a": 0.25, "b": 0.75})
