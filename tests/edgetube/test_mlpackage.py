"""The reader of packages against the vendor's own protobuf, and against damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetube import mlpackage
from edgetube.errors import BundleError

ct = pytest.importorskip("coremltools")


def save(path: Any, build: Any) -> Any:
    """A package of one function that makes `y` of `x` (2, 64) float16."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, types

    from edgetube.export import coreml

    program = Program()
    with Function({"x": mb.placeholder(shape=(2, 64), dtype=types.fp16)}, opset_version=ct.target.iOS18) as function:
        function.set_outputs([build(mb, function.inputs["x"])])
    program.add_function("main", function)
    with coreml._quiet():
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
        model.short_description = "a linear layer"
        model.save(str(path))
    return path


def linear(mb: Any, x: Any) -> Any:
    rng = np.random.default_rng(0)
    data = rng.integers(-127, 127, (32, 64)).astype(np.int8)
    weight = mb.constexpr_blockwise_shift_scale(data=data, scale=np.full((32, 1), 0.01, np.float16))
    y = mb.linear(x=x, weight=weight, bias=rng.normal(size=32).astype(np.float16))
    return mb.cast(x=mb.reshape(x=y, shape=(2, 4, 8)), dtype="fp32", name="y")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved package with weights of several types; nobody may write in it."""
    return save(tmp_path_factory.mktemp("package") / "model.mlpackage", linear)


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    return shutil.copytree(package, tmp_path / "model.mlpackage")


def weights(path: Path) -> Path:
    return path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"


def test_it_finds_what_the_vendors_protobuf_says(package: Path) -> None:
    found = mlpackage.load(package)
    spec = ct.models.MLModel(str(package), skip_model_load=True).get_spec()
    assert found.version == spec.specificationVersion
    assert found.metadata["description"] == "a linear layer"
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    function = found.functions[found.default]
    assert [o.kind for o in function.operations] == [o.type for o in block.operations]
    for ours, theirs in zip(function.operations, block.operations, strict=True):
        assert [name for name, _ in ours.outputs] == [o.name for o in theirs.outputs]
        assert set(ours.inputs) == set(theirs.inputs) | set(theirs.attributes) - {"name"}
        for (_, kind), output in zip(ours.outputs, theirs.outputs, strict=True):
            dims = output.type.tensorType.dimensions
            assert kind.shape == tuple(d.constant.size for d in dims)
    assert function.outputs == tuple(block.outputs) == ("y",)
    assert function.inputs == {"x": mlpackage.TensorType("fp16", (2, 64))}


def test_constants_are_those_that_were_written(package: Path) -> None:
    function = mlpackage.load(package).functions["main"]
    rng = np.random.default_rng(0)
    (quantised,) = (o for o in function.operations if o.kind.startswith("constexpr_"))
    np.testing.assert_array_equal(quantised.inputs["data"][0], rng.integers(-127, 127, (32, 64)))
    constants = {o.outputs[0][0]: o.inputs["val"][0] for o in function.operations if o.kind == "const"}
    bias = next(value for name, value in constants.items() if "bias" in name)
    assert bias.dtype == np.float16
    np.testing.assert_array_equal(bias, rng.normal(size=32).astype(np.float16))
    shape = next(value for name, value in constants.items() if "shape" in name)
    assert list(shape) == [2, 4, 8]


def test_a_weight_file_that_is_cut_off_is_refused(copy: Path) -> None:
    with weights(copy).open("r+b") as file:
        file.truncate(weights(copy).stat().st_size - 64)
    with pytest.raises(BundleError, match="damaged"):
        mlpackage.load(copy)


def test_a_record_that_is_no_record_is_refused(copy: Path) -> None:
    data = bytearray(weights(copy).read_bytes())
    data[64] ^= 1
    weights(copy).write_bytes(data)
    with pytest.raises(BundleError, match="byte 64 makes no sense; export it again"):
        mlpackage.load(copy)


def test_a_record_of_another_size_is_refused(copy: Path) -> None:
    data = bytearray(weights(copy).read_bytes())
    data[72] ^= 2
    weights(copy).write_bytes(data)
    with pytest.raises(BundleError, match="expected "):
        mlpackage.load(copy)


def test_a_missing_weight_file_is_named(copy: Path) -> None:
    weights(copy).unlink()
    with pytest.raises(BundleError, match=r"weight\.bin is missing"):
        mlpackage.load(copy)


def test_no_package_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not an ML program package"):
        mlpackage.load(tmp_path)
    (tmp_path / "Manifest.json").write_text(json.dumps({"itemInfoEntries": {}}))
    with pytest.raises(BundleError, match="rootModelIdentifier"):
        mlpackage.load(tmp_path)


def test_names_that_are_given_twice_are_refused(tmp_path: Path) -> None:
    """The vendor's writer does not notice."""
    path = save(
        tmp_path / "twice.mlpackage", lambda mb, x: mb.cast(x=mb.add(x=x, y=x, name="y"), dtype="fp32", name="y")
    )
    with pytest.raises(BundleError, match=r"given twice: \['y'\]"):
        mlpackage.load(path)


def test_damage_anywhere_in_the_program_is_an_error_of_ours_or_none(copy: Path) -> None:
    (model,) = copy.rglob("*.mlmodel")
    data = model.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.integers(0, len(data), 300):
        broken = bytearray(data)
        broken[position] ^= int(rng.integers(1, 256))
        model.write_bytes(broken)
        try:
            mlpackage.load(copy)
        except BundleError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(("bits", "signed"), [(1, False), (2, False), (3, False), (4, False), (4, True), (6, False)])
def test_packed_numbers(bits: int, signed: bool, rng: np.random.Generator) -> None:
    low, high = (-(1 << bits - 1), (1 << bits - 1)) if signed else (0, 1 << bits)
    numbers = rng.integers(low, high, 37)
    stream = sum((int(n) % (1 << bits)) << (i * bits) for i, n in enumerate(numbers))
    raw = np.frombuffer(stream.to_bytes(-(-37 * bits // 8), "little"), np.uint8)
    np.testing.assert_array_equal(mlpackage.unpack(raw, bits, 37, signed), numbers)
