"""Files and folders of weights as people have them, and what is said about those that are none."""

from __future__ import annotations

import contextlib
import io
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from edgetube.errors import CheckpointError, EdgetubeError
from edgetube.formats.reading.tensors import State, open_source, weight_files

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def opened(path: Path, ema: bool | None = None) -> dict[str, Tensor]:
    source = open_source(weight_files(path), ema)
    return {name: source.load(name) for name in source.shapes}


def same(found: dict[str, Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state", "net", "target_encoder", "encoder"])
def test_nests(key: str, tmp_path: Path) -> None:
    torch.save({key: STATE, "epoch": 3}, tmp_path / "m.pth")
    assert same(opened(tmp_path / "m.pth"))


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.module.", "module.backbone.", "model._orig_mod."])
def test_prefixes_that_all_tensors_have(prefix: str, tmp_path: Path) -> None:
    torch.save(OrderedDict((prefix + name, value) for name, value in STATE.items()), tmp_path / "m.pt")
    assert same(opened(tmp_path / "m.pt"))


def test_an_averaged_model(tmp_path: Path) -> None:
    model = torch.nn.Sequential(OrderedDict(a=torch.nn.Linear(3, 2)))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.save(averaged.state_dict(), tmp_path / "swa.pt")
    assert "n_averaged" in averaged.state_dict()
    assert opened(tmp_path / "swa.pt").keys() == STATE.keys()


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema", "ema_state_dict"])
def test_the_moving_average_is_the_user_s_choice(key: str, tmp_path: Path) -> None:
    torch.save({"model": {name: value + 1 for name, value in STATE.items()}, key: STATE}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=f"holds model and {key}; choose with --no-ema or --ema"):
        opened(tmp_path / "m.pth")
    assert same(opened(tmp_path / "m.pth", ema=True))
    assert not same(opened(tmp_path / "m.pth", ema=False))
    torch.save({"model": STATE}, tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match="no moving average of the weights; it holds model"):
        opened(tmp_path / "plain.pth", ema=True)


def shards(folder: Path, placed: dict[str, str] | None = None) -> Path:
    folder.mkdir()
    files = {"a.weight": "model-1.safetensors", "a.bias": "model-2.safetensors"}
    for name, file in files.items():
        save_file({name: STATE[name]}, folder / file)
    index = {"metadata": {}, "weight_map": files if placed is None else placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards(tmp_path: Path) -> None:
    assert same(opened(shards(tmp_path / "m")))


def test_shards_that_are_not_all_there(tmp_path: Path) -> None:
    folder = shards(tmp_path / "m")
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 shards, model-2\.safetensors first"):
        opened(folder)


@pytest.mark.parametrize(
    ("placed", "message"),
    [
        ({"a.weight": "model-1.safetensors", "b": "model-2.safetensors"}, r"a\.bias is unexpected in model-2"),
        ({"a.weight": "model-1.safetensors"}, None),
        ({"a.weight": "model-2.safetensors", "a.bias": "model-1.safetensors"}, "is not in|is unexpected in"),
        ({"a.weight": "../model-1.safetensors"}, "damaged"),
        ({"a.weight": 3}, "damaged"),
    ],
)
def test_an_index_that_does_not_fit_its_shards(placed: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    folder = shards(tmp_path / "m", placed)
    if message is None:  # the other shard is of no concern to the index
        assert opened(folder).keys() == {"a.weight"}
        return
    with pytest.raises(CheckpointError, match=message):
        opened(folder)


def test_both_forms_of_one_model_in_a_folder(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "some_model.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "some_pytorch_model.bin")
    assert same(opened(tmp_path))
    torch.save({"x": torch.ones(1)}, tmp_path / "training_args.bin")
    torch.save({"x": torch.ones(1)}, tmp_path / "optimizer.pt")
    assert same(opened(tmp_path))


def test_folders_without_one_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was the download complete"):
        weight_files(tmp_path)
    (tmp_path / "checkpoint-500").mkdir()
    torch.save(STATE, tmp_path / "checkpoint-500" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="those below it have: give one of checkpoint-500"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors.incomplete").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.incomplete is half a download"):
        weight_files(tmp_path)
    torch.save(STATE, tmp_path / "best.pt")
    torch.save(STATE, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"several files of weights, best\.pt, last\.pt; give one of them"):
        opened(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
        (b"GGUF\x03\x00\x00\x00" + bytes(50), "GGUF"),
        (b"\x1f\x8b\x08\x00" + bytes(50), "gzip"),
        (b"\x93NUMPY\x01\x00" + bytes(50), "array of numpy"),
        (b'{"error": "not found"}', "JSON"),
        (b"garbage, quite long", "not a safetensors file|neither safetensors nor a file of torch"),
    ],
)
def test_files_that_hold_no_weights(content: bytes, message: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_source((path,))


def test_a_name_does_not_decide_what_a_file_is(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "m.pt")
    torch.save(STATE, tmp_path / "m.safetensors")
    assert same(opened(tmp_path / "m.pt"))
    assert same(opened(tmp_path / "m.safetensors"))


def test_a_header_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    """640 bytes are 80 02 in the file."""
    pad = next(n for n in range(600) if save({"a": torch.ones(1)}, {"pad": "x" * n})[:2] == b"\x80\x02")
    (tmp_path / "m.safetensors").write_bytes(save({"a": torch.ones(1)}, {"pad": "x" * pad}))
    assert opened(tmp_path / "m.safetensors").keys() == {"a"}


def test_only_plain_finite_floats_are_weights(tmp_path: Path) -> None:
    values = {
        "sparse": torch.eye(3).to_sparse(), "integer": torch.arange(3), "nan": torch.tensor([1.0, float("nan")]),
    }  # fmt: skip
    torch.save(values, tmp_path / "m.pt")
    state = State(tmp_path, open_source((tmp_path / "m.pt",)))
    for name, message in (("sparse", "sparse or quantised"), ("integer", "expected floating"), ("nan", "NaN or inf")):
        with pytest.raises(CheckpointError, match=message):
            state.take(name, "x")


def test_two_tensors_that_mean_the_same(tmp_path: Path) -> None:
    torch.save({"old.w": torch.ones(1), "new.w": torch.ones(1)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="two tensors mean the same"):
        State(tmp_path, open_source((tmp_path / "m.pt",)), lambda name: name.replace("old", "new"))


def files_of_one_model() -> dict[str, bytes]:
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": STATE, "epoch": 1}, zipped)
    torch.save({"state_dict": STATE, "epoch": 1}, legacy, _use_new_zipfile_serialization=False)
    return {"m.safetensors": save(STATE), "m.pt": zipped.getvalue(), "m.pth": legacy.getvalue()}


FILES = files_of_one_model()


@given(
    name=st.sampled_from(sorted(FILES)),
    place=st.integers(0, 1 << 20),
    change=st.integers(1, 255),
    cut=st.booleans(),
)
def test_a_damaged_file_is_read_or_refused_with_one_error(
    name: str, place: int, change: int, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A byte is changed, or the end is missing."""
    data = bytearray(FILES[name])
    place %= len(data)
    if cut:
        del data[place:]
    else:
        data[place] ^= change
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(bytes(data))
    with contextlib.suppress(EdgetubeError):
        source = open_source((path,))
        state = State(path, source)
        for tensor in source.shapes:
            state.take(tensor, "somewhere")
