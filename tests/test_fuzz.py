"""Files that somebody damaged, or made to do damage: each is read as it is or refused in one line, and that is all.

Hypothesis draws the same damages in every run; HYPOTHESIS_PROFILE=explore draws others, and many more. A reader may
take at most 20 s and a gigabyte, and write nothing beside what it was given.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetube import arrays, datasets, errors, health, mlpackage, terminal
from edgetube import bundle as bundles
from edgetube.calibration import cache
from edgetube.calibration.layerwise import CalibrationState
from edgetube.calibration.table import CalibrationTable, LinearPlan, Range
from edgetube.contract import InputContract
from edgetube.errors import EdgetubeError
from edgetube.model import checkpoints
from edgetube.runtime import Runtime
from edgetube.targets import installed

SECONDS, BYTES = 20, 1 << 30

TIMES = max(1, settings().max_examples // 50)
"""How many times more damages another profile draws."""

# --------------------------------------------------------------------------------------------------------------- damage

NUMBERS = (0, -1, 1, 2, 7, 0.5, 1.0, 255, 256, 1 << 31, 1 << 40, 10**9, 10**18, -(1 << 62), 1e308, True, False)
TEXTS = (
    "", "x", "é影", "../../etc/passwd", "/etc/passwd", "C:\\x", "a:b", "nul", "\x1b[2J", "a\nb", "\u202e", "\ud800",
    "x" * 5000, "1", "NaN", "int8", "onnxruntime", "openvino", "torch", "mil",
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None,
    [],
    {},
    [[]],
    [1, 2, 3],
    [0, 0, 0],
    {"a": {"b": {}}},
    [[[[[[1]]]]]],
    math.nan,
    math.inf,
)
VALUES = st.sampled_from([*NUMBERS, *TEXTS, *OTHERS]).map(copy.deepcopy)


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a document."""
    yield path
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in inner:
        yield from places(value, (*path, key))


@st.composite
def damaged_json(draw: st.DrawFn, document: Any) -> str:
    """The document with one to three values replaced, removed, renamed or added."""
    found = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(found))))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                found = draw(VALUES)
            continue
        parent = found
        for key in path[:-1]:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if how == "replace":
            parent[path[-1]] = draw(VALUES)
        elif how == "remove":
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(["extra", "frames", "", "../x", "\x1b", "bytes"]))] = draw(VALUES)
        else:
            parent.append(draw(VALUES))
    text = json.dumps(found)
    if draw(st.integers(0, 4)) == 0:
        return draw(damaged_text(text))
    return text


@st.composite
def damaged_text(draw: st.DrawFn, text: str) -> str:
    """The text with pieces cut, doubled or exchanged, and numbers made huge."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(text) - 1)))
        end = min(len(text), at + draw(st.integers(0, 40)))
        how = draw(st.sampled_from(["cut", "double", "digits", "junk", "nest", "end"]))
        if how == "cut":
            text = text[:at] + text[end:]
        elif how == "double":
            text = text[:end] + text[at:]
        elif how == "digits":
            huge = draw(st.sampled_from([*map(str, NUMBERS), "9" * 30, "9" * 400, "1e999", "NaN"]))
            text = text[:at] + re.sub(r"\d+", huge, text[at:], count=1)
        elif how == "junk":
            text = (
                text[:at] + draw(st.sampled_from(["\x00", '"', "{", "]", "'", ",", "\\", "\r\n", *TEXTS])) + text[end:]
            )
        elif how == "nest":
            text = text[:at] + draw(st.sampled_from(["[", '{"a":', "("])) * 100_000 + text[at:]
        else:
            text = text[:at]
    return text


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with some flipped, cut, doubled or overwritten, most often near the beginning or the end."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if not found:
            break
        where = draw(st.sampled_from(["anywhere", "first", "last"]))
        low = max(0, len(found) - 200) if where == "last" else 0
        high = min(len(found), 200) - 1 if where == "first" else len(found) - 1
        at = draw(st.integers(min(low, high), high))
        size = draw(st.sampled_from([1, 2, 4, 8, 40]))
        how = draw(st.sampled_from(["flip", "fill", "cut", "double", "random", "end", "number"]))
        if how == "flip":
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "fill":
            found[at : at + size] = bytes([draw(st.sampled_from([0, 255]))]) * size
        elif how == "cut":
            del found[at : at + size]
        elif how == "double":
            found[at:at] = found[at : at + size]
        elif how == "random":
            found[at : at + size] = draw(st.binary(min_size=size, max_size=size))
        elif how == "number":
            found[at : at + 8] = struct.pack("<q", draw(st.sampled_from([0, -1, 1 << 31, 1 << 40, 1 << 62])))
        else:
            del found[at:]
    return bytes(found)


# ---------------------------------------------------------------------------------------------------------------- judge


@contextmanager
def judged(folder: Path) -> Iterator[None]:
    """What is raised is one of our errors, one harmless line; in time, in memory, and nothing is written."""
    before = sorted(p.relative_to(folder) for p in folder.rglob("*"))
    peak = _peak()
    with _alarm():
        try:
            yield
        except EdgetubeError as error:
            text = str(error)
            assert errors.printable(text) == text, text[:200]
            assert 10 < len(text) < 2000, text[:200]
    assert _peak() - peak < BYTES
    assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == before


@contextmanager
def _alarm() -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return

    def stop(*_: object) -> None:
        raise AssertionError(f"it took more than {SECONDS} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def _peak() -> int:
    """Most memory of this process so far, in bytes."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -------------------------------------------------------------------------------------------------------------- targets


@pytest.fixture(scope="module")
def small(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny bundle, in a folder of its own."""
    return Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("fuzz") / "tiny.onnx-fp32"))


@pytest.fixture(scope="module")
def manifest(small: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((small / "edgetube.json").read_text("utf-8"))
    return found


def use(path: Path) -> None:
    """All that a user does with a bundle."""
    bundle = bundles.load(path)
    with terminal.out.capture():
        terminal.bundle(bundle)
    with Runtime(bundle, verify=False) as rt:
        rt.check()


@settings(max_examples=150 * TIMES)
@given(data=st.data())
def test_manifest(small: Path, manifest: dict[str, Any], data: st.DataObject) -> None:
    text = data.draw(damaged_json(manifest))
    (small / "edgetube.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with judged(small.parent):
        use(small)


@settings(max_examples=30 * TIMES)
@given(data=st.data())
def test_doctor(small: Path, manifest: dict[str, Any], data: st.DataObject) -> None:
    text = data.draw(damaged_json(manifest))
    (small / "edgetube.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with judged(small.parent), terminal.out.capture():
        terminal.checks(health.examine(small))


@settings(max_examples=150 * TIMES)
@given(data=st.data())
def test_golden_clip(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("golden") / "b"
    shutil.copytree(tiny_bundle, folder)
    whole = (folder / "golden.npz").read_bytes()
    (folder / "golden.npz").write_bytes(data.draw(damaged_bytes(whole)))
    bundle = bundles.seal(bundles.load(folder, verify=False))
    with judged(folder.parent):
        bundle.golden()


def resized(header: str, rest: bytes) -> bytes:
    return (
        struct.pack("<Q", len(header.encode("utf-8", "surrogatepass"))) + header.encode("utf-8", "surrogatepass") + rest
    )


@settings(max_examples=150 * TIMES)
@given(data=st.data())
def test_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = tiny_checkpoint.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header, rest = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    how = data.draw(st.sampled_from(["ours", "ours", "theirs", "bytes"]))
    if how == "ours":
        ours = json.loads(header["__metadata__"]["edgetube"])
        header["__metadata__"]["edgetube"] = data.draw(damaged_json(ours))
        damaged = resized(json.dumps(header), rest)
    elif how == "theirs":
        damaged = resized(data.draw(damaged_json(header)), rest)
    else:
        damaged = data.draw(damaged_bytes(whole[:4000])) + whole[4000:]
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "x.safetensors").write_bytes(damaged)
    with judged(folder):
        checkpoints.load(folder / "x.safetensors")


CONTRACT = InputContract(4, 16, 16, fps=8.0)


@settings(max_examples=150 * TIMES)
@given(data=st.data(), kind=st.sampled_from(["npy", "npz", "compressed", "labels"]))
def test_arrays_of_clips(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str) -> None:
    folder = tmp_path_factory.mktemp("arrays")
    clips = np.random.default_rng(0).integers(0, 256, (2, 4, 16, 16, 3), np.uint8)
    path = folder / ("a.npy" if kind == "npy" else "a.npz")
    match kind:
        case "npy":
            np.save(path, clips)
        case "npz":
            np.savez(path, frames=clips)
        case "compressed":
            np.savez_compressed(path, clips=clips)
        case _:
            np.savez(path, frames=clips, labels=np.array(["left", "right"]))
    path.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
    with judged(folder):
        for clip in datasets.load(path).clips(CONTRACT):
            assert clip.frames.shape == CONTRACT.shape
    with judged(folder):
        arrays.open_arrays(path)


CSV = "path,label,start\na.npy,left,\nb.npy,right,0\n" + "".join(f"c{i}.npy,left,{i}\n" for i in range(5))


@settings(max_examples=150 * TIMES)
@given(data=st.data())
def test_lists(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("list")
    clip = np.zeros((4, 16, 16, 3), np.uint8)
    for name in ("a", "b", *(f"c{i}" for i in range(5))):
        np.save(folder / f"{name}.npy", clip)
    text = CSV.encode() if data.draw(st.booleans()) else data.draw(damaged_text(CSV)).encode("utf-8", "surrogatepass")
    (folder / "clips.csv").write_bytes(data.draw(damaged_bytes(text)) if data.draw(st.booleans()) else text)
    with judged(folder):
        for read in datasets.load(folder / "clips.csv").clips(CONTRACT):
            assert read.frames.shape == CONTRACT.shape


def table() -> CalibrationTable:
    ranges = {"x": Range(-1.0, 2.0, "minmax"), "y": Range(0.0, 0.5, "kl")}
    linears = (LinearPlan("a", "x", "w", (0.5, 0.25), "int8"), LinearPlan("b", "y", "v", (), "float", "too costly"))
    return CalibrationTable("a" * 64, {"sha256": "b" * 64, "count": 3}, "uint8", ranges, linears, {"numpy": "2"})


@settings(max_examples=150 * TIMES)
@given(data=st.data())
def test_calibration_table(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("table")
    text = data.draw(damaged_json(table().to_json()))
    (folder / "table.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with judged(folder):
        read = CalibrationTable.load(folder / "table.json")
        assert read.to_json()


@settings(max_examples=150 * TIMES)
@given(data=st.data())
def test_calibration_cache_text_of_tensorrt(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    text = data.draw(damaged_text(table().to_cache()))
    with judged(tmp_path_factory.mktemp("text")):
        CalibrationTable.from_cache(text)


@settings(max_examples=100 * TIMES)
@given(data=st.data())
def test_calibration_cache(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A damaged cache is an empty one."""
    folder = tmp_path_factory.mktemp("cache") / "kept"
    key = {"graph": "a", "clips": "b", "judged clips": "c"}
    with cache.open_cache(folder, key) as kept:
        values = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
        kept.save_result(values, table(), {"notes": ["x"], "linears": {}})
        kept.save_state(CalibrationState(values=values))
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    whole = path.read_bytes()
    damaged = (
        data.draw(damaged_json(json.loads(whole))).encode("utf-8", "surrogatepass")
        if path.suffix == ".json"
        else (data.draw(damaged_bytes(whole)))
    )
    path.write_bytes(damaged)
    with _alarm(), cache.open_cache(folder, key) as kept:
        kept.state()
        kept.result()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    from edgetube.export import pipeline

    if not installed("coremltools"):
        pytest.skip("needs coremltools")
    options = pipeline.Options(lowering="gather")
    made = pipeline.export_model("coreml-fp16", tiny_checkpoint, tmp_path_factory.mktemp("ml"), options)
    return made.artifact_path


@pytest.mark.slow
@settings(max_examples=100 * TIMES)
@given(data=st.data())
def test_ml_program(package: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(package, folder / "m.mlpackage")
    path = data.draw(st.sampled_from(sorted(p for p in (folder / "m.mlpackage").rglob("*") if p.is_file())))
    whole = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(data.draw(damaged_json(json.loads(whole))).encode("utf-8", "surrogatepass"))
    else:
        path.write_bytes(data.draw(damaged_bytes(whole)))
    with judged(folder):
        mlpackage.load(folder / "m.mlpackage")


READERS: dict[str, Callable[[Path], Any]] = {
    "edgetube.json": lambda path: bundles.load(path.parent),
    "table.json": CalibrationTable.load,
    "a.npy": arrays.open_arrays,
    "a.npz": arrays.open_arrays,
    "a.csv": datasets.load,
    "a.safetensors": checkpoints.load,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 4096, b"\xff" * 4096, b"[" * 200_000, b'{"a":' * 200_000, b"\n" * 200_000, b"9" * 200_000,
     b"(" * 200_000, b"\xef\xbb\xbf{}", b"PK\x05\x06" + b"\0" * 18, b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 70_000,
     b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", b"\x10\x27\0\0\0\0\0\0" + b"{" * 20_000],
    ids=lambda content: str(content[:6]),
)  # fmt: skip
def test_what_is_nothing_at_all(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with judged(tmp_path):
        READERS[name](tmp_path / name)
