"""The folder of `gpu.py`: made where edgetube is installed, measured where only PyTorch and numpy are.

::

    run.py       starts the measurement
    plan.json    what is in the folder, and what could not be made
    python/      edgetube as its wheel installs it, and the studies of the GPU
    clips.npz    evaluation clips of the built-in model, PyTorch's answers in float32, and ONNX Runtime's on the graphs
    bundles/     of the built-in model; of models with random weights, without their large weights

Weights that are random anyway are not carried: `thin` takes them out, and `fill` puts others there, which depend on
nothing but their place, so that the bundle's hashes hold.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgetube import bundle as bundles
from edgetube import strict
from edgetube.bench import machine
from edgetube.bundle import Bundle
from edgetube.errors import EdgetubeError, InputError
from edgetube.files import atomic_write

if TYPE_CHECKING:
    from edgetube.contract import InputContract
    from edgetube.video import Frames

SCHEMA = 1
PLAN, CLIPS, PYTHON, BUNDLES, RUN = "plan.json", "clips.npz", "python", "bundles", "run.py"
LARGEST = 60_000_000
"""Bytes of a folder: machines that are lent take little more."""

CALIBRATION_COUNT = 8
"""Clips to calibrate random weights on, whose ranges do not matter."""

WEIGHTS = "model.onnx.data"
LARGE = 1 << 14
"""Bytes from which a tensor of floats or int8 is weights that need not be carried."""

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Weights:
    """A tensor that is made anew: `count` numbers of a type, at `offset` of the file; floats are within +-`scale`."""

    type: str
    count: int
    offset: int
    scale: float

    def values(self, index: int) -> npt.NDArray[Any]:
        """The same numbers on every machine and with every numpy."""
        raw = np.frombuffer(hashlib.shake_128(str(index).encode()).digest(self.count), np.int8)
        if self.type == "int8":
            return np.asarray(np.maximum(raw, np.int8(-127)))
        return np.asarray((raw.astype(np.float32) * np.float32(self.scale / 128)).astype(self.type))


@dataclass(frozen=True)
class Entry:
    """A bundle of the folder.

    Attributes:
        folder: in the folder, POSIX.
        model, target, batch: what was exported.
        parameters: of the model.
        weights: what `fill` makes; empty for a complete bundle.
    """

    folder: str
    model: str
    target: str
    batch: int
    parameters: int
    weights: tuple[Weights, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is in a folder.

    Attributes:
        made: the machine and the versions.
        not_made: why a bundle is missing, by model, batch and target.
    """

    made: str
    entries: tuple[Entry, ...]
    not_made: tuple[tuple[str, int, str, str], ...]

    def save(self, folder: Path) -> None:
        atomic_write(folder / PLAN, json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")


def read_plan(folder: Path) -> Plan:
    """Raises InputError when there is no plan, or one of another schema."""
    path = folder / PLAN
    if not path.is_file():
        raise InputError(f"{folder} has no {PLAN}; make such a folder with: gpu.py prepare --out {folder}")
    data = strict.record(strict.read_json(path), PLAN, ("schema", "made", "entries", "not_made"))
    if data["schema"] != SCHEMA:
        raise InputError(f"{path} has schema {data['schema']}, this gpu.py reads {SCHEMA}: prepare the folder again")
    entries = (Entry(**e | {"weights": tuple(Weights(**w) for w in e["weights"])}) for e in data["entries"])
    return Plan(data["made"], tuple(entries), tuple((m, b, t, why) for m, b, t, why in data["not_made"]))


def fill(folder: Path, entry: Entry, scratch: Path) -> Bundle:
    """A bundle of the folder, complete: in its place, or with its weights in `scratch`."""
    source = folder / entry.folder
    if not entry.weights:
        return bundles.load(source)
    out = scratch / source.name
    shutil.copytree(source, out)
    _write_weights(out, entry.weights)
    return bundles.load(out)


def without_engine(source: Bundle, out: Path) -> None:
    """Copy a bundle without its engine, which the SDK builds anew where it can: engines are large."""
    files = [name for name in source.files if name != source.build.get("engine", {}).get("file")]
    out.mkdir(parents=True)
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source.path / name, out / name)
    bundles.seal(replace(source, path=out, build=_without_engine(source.build)))


def _without_engine(build: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in build.items() if name not in ("engine", "layers")}


def thin(source: Bundle, out: Path) -> tuple[Weights, ...]:
    """Copy a bundle of random weights without them and without its engine; returns what `fill` needs.

    The golden clip becomes one that takes no room: such a bundle is for timing.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from edgetube.calibration import storage

    model = onnx.load(source.artifact_path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def carried_no_more(tensor: TensorProto) -> bool:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return storage.size(tensor) >= LARGE and dtype in (np.float16, np.float32, np.int8)

    out.mkdir(parents=True)
    storage.write_apart(model, out / source.artifact, out / WEIGHTS, carried_no_more)
    found: list[Weights] = []
    for tensor in onnx.load(out / source.artifact, load_external_data=False).graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            values = numpy_helper.to_array(tensors[tensor.name])
            (offset,) = (int(entry.value) for entry in tensor.external_data if entry.key == "offset")
            scale = math.sqrt(3) * float(values.astype(np.float64).std())
            found.append(Weights(str(values.dtype), values.size, offset, scale))
    _write_weights(out, found)
    golden = {**source.parity["golden"], "clips": 1}
    parity = {**source.parity, "golden": golden}
    copy = replace(source, path=out, build=_without_engine(source.build), parity=parity)
    bundles.save_golden(copy, ramp(source.contract)[None], np.zeros((1, len(source.labels)), np.float32))
    bundles.seal(copy)
    (out / WEIGHTS).unlink()
    return tuple(found)


def _write_weights(bundle: Path, weights: Iterable[Weights]) -> None:
    with (bundle / WEIGHTS).open("wb") as file:
        for index, tensor in enumerate(weights):
            file.seek(tensor.offset)
            file.write(tensor.values(index).tobytes())


def ramp(contract: InputContract) -> Frames:
    """A clip (T, H, W, C) uint8 that compresses to nothing: every pixel has another value than its neighbours."""
    axes = np.ogrid[tuple(slice(0, size) for size in contract.shape)]
    return np.asarray(sum(k * axis for k, axis in zip((3, 1, 2, 64), axes, strict=True)) % 256, np.uint8)


# ----------------------------------------------------------------------------------------------------------- making it

START = '''"""Measures this machine's GPU; needs Python 3.10 or newer, PyTorch and numpy. See docs/gpu.md."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "python"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE / "python"), os.environ.get("PYTHONPATH"))))

from edgetube.bench.studies import gpu  # noqa: E402

if __name__ == "__main__":
    sys.exit(gpu.main(["run", str(HERE), *sys.argv[1:]]))
'''


def prepare(
    out: Path, models: Sequence[str], batches: Sequence[int], targets: Sequence[str], clips: int, exports: Path
) -> Plan:
    """Make the folder.

    Args:
        models: what `edgetube export --checkpoint` takes; the built-in model is always there, at batch 1.
        clips: of the built-in model's evaluation set.
        exports: where bundles are exported to; those that are there are taken.

    Raises:
        InputError: `out` is there, or the folder is larger than `LARGEST`.
    """
    if out.exists():
        raise InputError(f"{out} exists; give another --out, or remove it")
    out.mkdir(parents=True)
    (out / RUN).write_text(START, "utf-8")
    install(out / PYTHON)
    entries: list[Entry] = []
    not_made: list[tuple[str, int, str, str]] = []
    built_in: list[Bundle] = []
    for model, batch in [("demo", 1), *((m, b) for m in models if m != "demo" for b in batches)]:
        parameters = _parameters(model)
        for target in targets:
            try:
                bundle = exported(model, batch, target, exports)
            except EdgetubeError as error:
                not_made.append((model, batch, target, str(error)))
                continue
            place = f"{BUNDLES}/{bundle.path.parent.name}/{bundle.name}"
            weights: tuple[Weights, ...] = ()
            if model == "demo":
                without_engine(bundle, out / place)
                built_in.append(bundle)
            else:
                weights = thin(bundle, out / place)
            entries.append(Entry(place, model, target, batch, parameters, weights))
    save_clips(out / CLIPS, built_in, clips)
    plan = Plan(machine.describe(), tuple(entries), tuple(not_made))
    plan.save(out)
    if (size := size_of(out)) > LARGEST:
        raise InputError(f"{out} has {size / 1e6:.0f} MB, more than {LARGEST / 1e6:.0f}; ask for fewer --clips")
    return plan


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _parameters(model: str) -> int:
    from edgetube.model import checkpoints

    return sum(tensor.numel() for tensor in checkpoints.load(model).model.parameters())


def exported(model: str, batch: int, target: str, exports: Path) -> Bundle:
    """A bundle of `model` in `exports`, made if it is not there."""
    from edgetube import demo
    from edgetube.export import pipeline
    from edgetube.model import checkpoints

    out = exports / f"{model.rpartition(':')[2]}.{batch}"
    for made in map(bundles.load, sorted(out.glob(f"*.{target}"))):
        return made
    out.mkdir(parents=True, exist_ok=True)
    options = pipeline.Options(batch=batch, lowering="gather", max_drop=100.0)
    if model.startswith("random:"):
        contract = checkpoints.load(model).contract
        path = out / "clips.npy"
        np.save(path, np.stack([clip.frames for clip in demo.scenes(contract, CALIBRATION_COUNT)]))
        options = replace(options, calib=path)
    return pipeline.export_model(target, model, out, options)


def save_clips(path: Path, found: Iterable[Bundle], count: int) -> None:
    """Save evaluation clips, their labels, the reference's answers, and the emulations' by target."""
    from edgetube import datasets, demo, runtimes
    from edgetube.model import checkpoints
    from edgetube.runtimes.torch import Reference

    checkpoint = checkpoints.load("demo")
    clips = list(datasets.built_in(count, demo.LABELS).clips(checkpoint.contract))
    frames = np.stack([clip.frames for clip in clips])
    arrays = {"frames": frames, "labels": np.array([checkpoint.labels.index(clip.label or "") for clip in clips])}
    with Reference(checkpoint.model, checkpoint.contract) as reference:
        arrays["reference"] = reference(frames)
    for bundle in found:
        if bundle.backend == "tensorrt":
            with runtimes.open_bundle(bundle, device=runtimes.EMULATED) as emulated:
                arrays[bundle.target] = emulated(frames)
    np.savez_compressed(path, allow_pickle=False, **arrays)


def install(python: Path) -> None:
    """Lay out edgetube as its wheel installs it, and the studies of the GPU."""
    with tempfile.TemporaryDirectory() as work:
        command = ["-c", "import setuptools; setuptools.setup()", "--quiet", "build", "--build-base", f"{work}/build"]
        wheel = ["egg_info", "--egg-base", work, "bdist_wheel", "--bdist-dir", f"{work}/layout", "--dist-dir", work]
        done = subprocess.run([sys.executable, *command, *wheel], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"no wheel of {ROOT} can be built: {(done.stderr.splitlines() or ['no reason'])[-1]}")
        (built,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(built) as archive:
            archive.extractall(python)
    studies = python / "edgetube" / "bench" / "studies"
    studies.mkdir()
    for path in Path(__file__).parent.glob("gpu*.py"):
        shutil.copy(path, studies)
