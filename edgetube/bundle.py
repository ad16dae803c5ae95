"""A bundle: one folder with an artifact, all that is needed to run it, and the proof that it answers right.

::

    demo.onnx-fp32/
        edgetube.json     manifest: model, input, labels, target, files with sha256, versions, parity
        model.onnx        the raw artifact, as the vendor's own tools open it
        calibration.json  the table of an INT8 artifact: ranges, scales, what stayed float and why
        golden.npz        one clip (frames, T x H x W x 3 uint8) and the reference's answer (logits, float32)

A bundle appears under its name only when it is complete: it is written to a folder beside, then renamed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt

from edgetube.errors import BundleError, SpecError
from edgetube.spec import InputContract, ModelSpec
from edgetube.targets import Precision, Status
from edgetube.video import Frames

SCHEMA = 1
MANIFEST = "edgetube.json"
GOLDEN = "golden.npz"
CALIBRATION = "calibration.json"
CLIPS = "calibration.npy"


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 of one file of a bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """What the manifest says. See the module's text for the folder, `docs/bundle.md` for the format.

    Attributes:
        path: the folder.
        name: `<checkpoint>.<target>`.
        target, precision, backend: what it is made for, what it computes in, and which runtime opens it.
        spec, contract, labels: the model, its input, and the class names in the order of the logits.
        batch: clips per call of the artifact; static.
        artifact: file or folder name of the raw artifact.
        status: how far the artifact was proven where it was made.
        checkpoint: {"name", "source", "sha256"} of the weights.
        build: what the exporter chose and measured.
        parity: what the proof measured against the reference.
        versions: of the tools that made it.
        files: relative POSIX path -> size and hash.
    """

    path: Path
    name: str
    target: str
    precision: Precision
    backend: str
    spec: ModelSpec
    contract: InputContract
    labels: tuple[str, ...]
    batch: int
    artifact: str
    status: Status = "built"
    checkpoint: Mapping[str, str] = field(default_factory=dict)
    build: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    @property
    def artifact_path(self) -> Path:
        """The raw artifact."""
        return self.path / self.artifact

    @property
    def artifact_bytes(self) -> int:
        """Size of the raw artifact on disk, external weight files included."""
        return sum(record.bytes for name, record in self.files.items() if name not in (GOLDEN, CALIBRATION, CLIPS))

    def golden(self) -> tuple[Frames, npt.NDArray[np.float32]]:
        """The golden clip (T, H, W, 3) uint8 and the reference's logits for it (classes,) float32.

        Raises:
            BundleError: the file is missing or does not fit the manifest.
        """
        path = self.path / GOLDEN
        try:
            with np.load(path, allow_pickle=False) as data:
                frames, logits = data["frames"], data["logits"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise BundleError(f"{path} cannot be read ({error}); export the bundle again") from error
        if frames.shape != self.contract.shape or logits.shape != (len(self.labels),):
            raise BundleError(
                f"{path} holds a clip {frames.shape} and {logits.shape} logits; "
                f"the manifest says {self.contract.shape} and ({len(self.labels)},)"
            )
        return frames, logits

    def verify(self) -> None:
        """Hash every file.

        Raises:
            BundleError: a file is missing, or is not the one that was proven.
        """
        for name, record in self.files.items():
            path = self.path / name
            if not path.is_file():
                raise BundleError(f"{self.path} is incomplete: {name} is missing; export or copy it again")
            if path.stat().st_size != record.bytes or sha256(path) != record.sha256:
                raise BundleError(
                    f"{self.path}: {name} is not the file that was proven (its sha256 differs from the "
                    "manifest); export or copy the bundle again"
                )

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "name": self.name,
            "target": self.target,
            "precision": self.precision,
            "backend": self.backend,
            "status": self.status,
            "artifact": self.artifact,
            "batch": self.batch,
            "labels": list(self.labels),
            "input": self.contract.to_json(),
            "model": self.spec.to_json(),
            "checkpoint": dict(self.checkpoint),
            "build": dict(self.build),
            "parity": dict(self.parity),
            "versions": dict(self.versions),
            "files": {name: {"bytes": f.bytes, "sha256": f.sha256} for name, f in self.files.items()},
        }


def load(path: str | Path, verify: bool = True) -> Bundle:
    """Read a bundle's manifest and, unless `verify` is false, hash its files.

    Raises:
        BundleError: no bundle there, a newer schema, a damaged manifest, or files that differ from it.
    """
    path = Path(path)
    manifest = path / MANIFEST
    if not manifest.is_file():
        found = "no such folder" if not path.exists() else f"it has no {MANIFEST}"
        raise BundleError(f"{path} is not a bundle: {found}; make one with: edgetube export --target onnx-fp32")
    try:
        data = json.loads(manifest.read_text("utf-8"))
        schema = data["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{manifest} is damaged ({error}); export or copy the bundle again") from error
    if schema != SCHEMA:
        raise BundleError(
            f"{path} has bundle schema {schema}; this edgetube reads schema {SCHEMA}: upgrade edgetube or export again"
        )
    try:
        bundle = _parse(path, data)
    except (KeyError, TypeError, ValueError, AttributeError, SpecError) as error:
        raise BundleError(f"{manifest} is damaged ({error}); export or copy the bundle again") from error
    if verify:
        bundle.verify()
    return bundle


def _parse(path: Path, data: dict[str, Any]) -> Bundle:
    for name in (*data["files"], data["artifact"]):
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise BundleError(f"{path}: the manifest names {name!r}, which is outside the bundle")
    for key, allowed in (("precision", get_args(Precision)), ("status", get_args(Status))):
        if data[key] not in allowed:
            raise ValueError(f"{key} is {data[key]!r}, expected one of {', '.join(allowed)}")
    return Bundle(
        path=path,
        name=str(data["name"]),
        target=str(data["target"]),
        precision=cast(Precision, data["precision"]),
        backend=str(data["backend"]),
        spec=ModelSpec.from_json(data["model"]),
        contract=InputContract.from_json(data["input"]),
        labels=tuple(map(str, data["labels"])),
        batch=int(data["batch"]),
        artifact=str(data["artifact"]),
        status=cast(Status, data["status"]),
        checkpoint=data["checkpoint"],
        build=data["build"],
        parity=data["parity"],
        versions=data["versions"],
        files={name: FileRecord(int(f["bytes"]), str(f["sha256"])) for name, f in data["files"].items()},
    )


def seal(bundle: Bundle) -> Bundle:
    """Record every file in the folder and write the manifest; returns the bundle with its `files`."""
    from dataclasses import replace

    found = sorted(p for p in bundle.path.rglob("*") if p.is_file() and p.name != MANIFEST)
    files = {p.relative_to(bundle.path).as_posix(): FileRecord(p.stat().st_size, sha256(p)) for p in found}
    bundle = replace(bundle, files=files)
    (bundle.path / MANIFEST).write_text(json.dumps(bundle.to_json(), indent=2) + "\n", "utf-8")
    return bundle


def save_golden(folder: Path, frames: Frames, logits: npt.NDArray[np.float32]) -> None:
    """Write the golden clip (T, H, W, 3) uint8 and its reference logits (classes,)."""
    np.savez_compressed(folder / GOLDEN, frames=frames, logits=logits)


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write a bundle in; it becomes `out` when the block ends well, else it vanishes.

    An older bundle at `out` is replaced only then; a folder that is no bundle is never touched.

    Raises:
        BundleError: `out` exists and is not a bundle, or the disk refuses.
    """
    if out.exists() and not (out / MANIFEST).is_file():
        raise BundleError(f"{out} exists and is not a bundle; choose another --out or move it away")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise BundleError(f"cannot write to {out.parent}: {error.strerror}") from error
    try:
        yield folder
        _publish(folder, out)
    except OSError as error:
        raise BundleError(f"cannot write {out}: {error.strerror or error}; nothing was changed") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, out: Path) -> None:
    folder.chmod(0o755)
    if not out.exists():
        folder.rename(out)
        return
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.old.", dir=out.parent) as old:
        out.rename(Path(old) / "bundle")
        folder.rename(out)


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
