from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgetube import formats
from edgetube.errors import CheckpointError
from edgetube.formats.reading import onnx_files


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3, bias=False))
        self.table = nn.Parameter(torch.randn(1, 2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) + 2 * self.table[:, :1]


@pytest.mark.filterwarnings("ignore")
def test_the_state_dict_comes_back(tmp_path: Path) -> None:
    model, path = Net().eval(), tmp_path / "net.onnx"
    torch.onnx.export(model, (torch.zeros(2, 5, 4),), path, dynamo=False, input_names=["x"])
    source = onnx_files.open_source(path)
    wanted = {name: value for name, value in model.state_dict().items() if name != "table"}
    assert source.names() >= wanted.keys()
    for name, value in wanted.items():
        assert source.shapes[name] == tuple(value.shape)
        torch.testing.assert_close(source.load(name), value, rtol=0, atol=0)
    (computed,) = source.names() - wanted.keys()
    torch.testing.assert_close(source.load(computed), 2 * model.table.detach()[:, :1])
    assert source.facts["input"] == (2, 5, 4)


def test_what_is_no_onnx_file_or_not_all_of_one(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"\x93 no protobuf")
    with pytest.raises(CheckpointError, match="is not an ONNX file"):
        formats.load(path)
    tensor = onnx.numpy_helper.from_array(np.ones(2, np.float32), "w")
    onnx.external_data_helper.set_external_data(tensor, "weights.bin")
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    onnx.save(onnx.helper.make_model(graph), path)
    with pytest.raises(CheckpointError, match="keeps its weights in other files"):
        formats.load(path)
