"""Weights in files: the same graph, wherever its weights are."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgetube import export
from edgetube.calibration import calibrate, graphs, storage
from edgetube.export import canonical, integer, quantize
from edgetube.export.canonical import Graph
from edgetube.runtimes.onnxruntime import optimise
from tests.calibration.models import noise, outputs, traced


@pytest.fixture
def in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the weights of graphs, which are all large ones in the test."""
    monkeypatch.setattr(storage, "LIMIT", 0)
    monkeypatch.setattr(storage, "SMALL", 1024)
    folder = tmp_path / "weights"
    folder.mkdir()
    return folder


def moved(graph: Graph, folder: Path) -> Graph:
    """The graph with its weights in files."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    tensors = [storage.make(t.name, numpy_helper.to_array(t), folder) for t in graph.model.graph.initializer]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
    return Graph(model, graph.spec, graph.contract, graph.batch, graph.lowering, graph.roles, graph.labels)


def answers(path: Path) -> npt.NDArray[np.float32]:
    """The logits of a file for a clip of noise."""
    import onnxruntime as ort

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits: npt.NDArray[np.float32] = session.run(None, {"frames": noise(1, 0, "a").frames[0][None]})[0]
    return logits


class TestTensors:
    def test_a_file_has_the_name_of_its_content_and_is_written_once(self, in_files: Path) -> None:
        values = np.arange(1024, dtype=np.float32).reshape(32, 32)
        one, other = storage.make("a", values, in_files), storage.make("b", values.T, in_files)
        assert storage.make("c", values.copy(), in_files).external_data == one.external_data
        files = {hashlib.sha256(np.ascontiguousarray(part).tobytes()).hexdigest() for part in (values, values.T)}
        assert {path.name for path in in_files.iterdir()} == files
        np.testing.assert_array_equal(storage.read(other), values.T)
        assert storage.size(one) == 4096
        assert storage.digest(one) == storage.digest(numpy_helper.from_array(values, "a"))

    def test_small_ones_stay_in_memory(self, in_files: Path) -> None:
        tensor = storage.make("shape", np.array([1, 2, 3]), in_files)
        assert tensor == numpy_helper.from_array(np.array([1, 2, 3]), "shape")
        assert not list(in_files.iterdir())

    def test_weights_are_read_when_they_are_asked_for(self, in_files: Path) -> None:
        graph = moved(traced(), in_files)
        weights = storage.Weights(graph.model)
        for path in in_files.iterdir():
            path.unlink()
        assert weights.shape("blocks.0.mlp.fc1.weight") == (16, 64)
        assert len(weights) == len(graph.model.graph.initializer)
        with pytest.raises(FileNotFoundError):
            weights["blocks.0.mlp.fc1.weight"]


class TestFiles:
    def test_written_tensor_by_tensor_it_is_what_protobuf_writes(self, in_files: Path, tmp_path: Path) -> None:
        graph = traced()
        typed = helper.make_tensor("typed", TensorProto.INT64, [2], [3, 4])  # not raw bytes
        model = onnx.ModelProto()
        model.CopyFrom(graph.model)
        model.graph.initializer.append(typed)
        expected = model.SerializeToString()
        storage.write(model, tmp_path / "memory.onnx")
        assert (tmp_path / "memory.onnx").read_bytes() == expected
        files = moved(graph, in_files).model
        files.graph.initializer.append(typed)
        storage.write(files, tmp_path / "files.onnx")
        assert (tmp_path / "files.onnx").read_bytes() == expected

    @pytest.mark.parametrize("apart", [False, True])
    def test_an_artifact_answers_the_same(
        self, in_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool
    ) -> None:
        monkeypatch.setattr(canonical, "MAX_ONE_FILE", 1000 if apart else 1 << 30)
        canonical.save(moved(traced(), in_files).model, tmp_path / "model.onnx")
        names = {path.name for path in tmp_path.iterdir() if path.is_file()}
        assert names == {"model.onnx", *(["model.onnx.data"] if apart else [])}
        onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
        whole = onnx.load(tmp_path / "model.onnx")
        for tensor in traced().model.graph.initializer:
            (found,) = (other for other in whole.graph.initializer if other.name == tensor.name)
            np.testing.assert_array_equal(numpy_helper.to_array(found), numpy_helper.to_array(tensor))
        np.testing.assert_array_equal(
            answers(tmp_path / "model.onnx"), outputs(traced().model, noise(1, 0, "a").frames)
        )

    def test_a_damaged_graph_is_seen_without_its_weights(self, in_files: Path) -> None:
        model = moved(traced(), in_files).model
        next(node for node in model.graph.node if node.op_type == "MatMul").input[1] = "blocks.0.mlp.fc2.bias"
        with pytest.raises(Exception, match=r"(?i)incompatible|mismatch|shape"):
            storage.check(model, shapes=True)


class TestCalibration:
    """One calibration, with the weights in memory and in files."""

    @pytest.fixture
    def both(self, in_files: Path) -> tuple[Graph, Graph]:
        return traced(), moved(traced(), in_files)

    def test_table_values_and_artifacts_are_the_same(
        self, both: tuple[Graph, Graph], tmp_path: Path, in_files: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found, written = [], []
        for place, graph in zip(("memory", "files"), both, strict=True):
            (tmp_path / place).mkdir()
            calibrated = calibrate(
                graph.model,
                graph.roles,
                noise(4, 1, "a"),
                noise(4, 2, "b"),
                export.evaluator(),
                activations="uint8",
                workspace=tmp_path / place,
            )
            plain, table = quantize.apply(calibrated, graph)
            models = {
                "float": plain.model,
                "qdq": quantize.qdq(plain.model, table),
                "integer": integer.to_integer_kernels(plain.model, table),
            }
            for name, model in models.items():
                assert (storage.folder_of(model) is None) == (place == "memory")
                canonical.save(model, tmp_path / place / f"{name}.onnx")
            found.append(table.save(tmp_path / place / "table.json").read_bytes())
            written.append({name: (tmp_path / place / f"{name}.onnx").read_bytes() for name in models})
        assert found[0] == found[1]
        assert written[0] == written[1]
        monkeypatch.setattr(canonical, "MAX_ONE_FILE", 1000)
        canonical.save(models["integer"], tmp_path / "apart.onnx")
        np.testing.assert_array_equal(answers(tmp_path / "apart.onnx"), answers(tmp_path / "memory" / "integer.onnx"))
        optimise(tmp_path / "apart.onnx", tmp_path / "optimised.onnx")  # the artifact's integers are counted in this

    def test_it_is_the_same_graph(self, both: tuple[Graph, Graph]) -> None:
        assert graphs.digest(both[0].model) == graphs.digest(both[1].model)
        clip = noise(1, 3, "a").frames
        np.testing.assert_array_equal(outputs(both[0].model, clip), outputs(both[1].model, clip))
