"""A bundle: a folder with an artifact, all that is needed to run it, and the measured proof of its accuracy.

::

    demo.onnx-fp32/
        edgetube.json     manifest: model, input, labels, target, files with sha256, versions, parity
        model.onnx        the raw artifact, as the vendor's own tools open it
        calibration.json  the table of an INT8 artifact: ranges, scales, what stayed float and why
        golden.npz        clips (frames, K x T x H x W x 3 uint8) and the reference's answers (logits, K x classes)

A bundle is written to a temporary folder beside its destination and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt

from edgetube import arrays, strict
from edgetube.contract import InputContract
from edgetube.errors import BundleError, FormatError, SpecError
from edgetube.files import PREFIX, atomic_write, exchange, sync_folder, sync_tree
from edgetube.precision import PRECISIONS, Precision
from edgetube.spec import MOST_CLASSES, ModelSpec
from edgetube.targets import Status, need
from edgetube.video import Frames

SCHEMA = 2
"""Of the manifests written; 1 (readers know it, too) had `mlp_ratio` and `pool` in the model's spec."""

MANIFEST = "edgetube.json"
GOLDEN = "golden.npz"
CALIBRATION = "calibration.json"
CALIBRATION_CLIPS = "calibration.npy"
SHA256 = "[0-9a-f]{64}"


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 of one file of a bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """A parsed manifest. The module docstring describes the folder, `docs/bundle.md` the format.

    Attributes:
        path: the folder.
        name: `<checkpoint>.<target>`.
        target, precision, backend: what the artifact is built for, what it computes in, which backend opens it.
        spec, contract, labels: the model, its input, and the class names in the order of the logits.
        batch: clips per call of the artifact; static.
        artifact: file or folder name of the raw artifact.
        status: how the artifact was verified at export.
        checkpoint: {"name", "source", "sha256"} of the weights.
        build: choices and measurements of the exporter.
        parity: measurements of the proof against the reference.
        versions: of the tools at export.
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
        return sum(self.files[name].bytes for name in self.runtime_files)

    @property
    def runtime_files(self) -> tuple[str, ...]:
        """The entries of `files` that a runtime may open: the artifact, weights beside it, an engine."""
        return tuple(name for name in self.files if name not in (GOLDEN, CALIBRATION, CALIBRATION_CLIPS))

    @property
    def artifact_files(self) -> tuple[str, ...]:
        """The entries of `files` that belong to the artifact."""
        return tuple(name for name in self.files if name == self.artifact or name.startswith(f"{self.artifact}/"))

    @property
    def sha256(self) -> str:
        """Hex digest of the names and digests of all files: that of other bundles differs."""
        listed = sorted((name, record.sha256) for name, record in self.files.items())
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists, and that `verify` therefore hashes; any file during an export.

        Raises:
            BundleError: the manifest does not list it.
        """
        if self.files and name not in self.files:
            raise BundleError(
                f"{self.path}: {name!r} is not among the files of the manifest; export or copy the bundle again"
            )
        return self.path / name

    def golden(self) -> tuple[Frames, npt.NDArray[np.float32]]:
        """The golden clips (K, T, H, W, 3) uint8 and the reference's logits for them (K, classes) float32.

        Bundles of older versions have one clip and no digest of the manifest that it belongs to.

        Raises:
            BundleError: the file is missing, does not fit the manifest, or was made for another input, other labels or
                another model than the manifest states.
        """
        path = self.file(GOLDEN)
        stated = self.parity.get("golden")
        count = () if stated is None else (int(stated["clips"]),)
        wanted: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {
            "frames": ((*count, *self.contract.shape), np.uint8),
            "logits": ((*count, len(self.labels)), np.float32),
        }
        if stated is not None:
            wanted["contract"] = (32,), np.uint8
        try:
            found = arrays.read_arrays(path, wanted)
        except (OSError, FormatError) as error:
            raise BundleError(f"{path} cannot be read ({error}); export the bundle again") from error
        if not np.isfinite(found["logits"]).all():
            raise BundleError(f"{path} holds logits that are not finite; export the bundle again")
        if stated is None:
            return found["frames"][None], found["logits"][None]
        if found["contract"].tobytes() != self.contract_digest():
            raise BundleError(
                f"{self.path}: the manifest's target, input, labels, model or checkpoint are not those that were "
                "proven: somebody has edited it; export or copy the bundle again"
            )
        return found["frames"], found["logits"]

    def contract_digest(self) -> bytes:
        """sha256 (32 bytes) of what the manifest states about artifact and input; the golden clips carry it, too."""
        stated = {
            "target": self.target,
            "precision": str(self.precision),
            "backend": self.backend,
            "batch": self.batch,
            "labels": list(self.labels),
            "input": self.contract.to_json(),
            "model": self.spec.to_json(),
            "checkpoint": self.checkpoint.get("sha256"),
        }
        return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).digest()

    def verify(self) -> None:
        """Hash every file and compare with the manifest.

        Raises:
            BundleError: a file is missing, or was changed since the export.
        """
        for found in self.path.glob(f"{self.artifact}*"):  # the artifact, what lies beside it, what lies in it
            for part in found.rglob("*") if found.is_dir() else [found]:
                name = part.relative_to(self.path).as_posix()
                if part.is_file() and name not in self.files and not part.name.startswith("."):
                    raise BundleError(
                        f"{self.path}: {name!r} is not among the files of the manifest; remove it, or export or copy "
                        "the bundle again"
                    )
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
            "precision": str(self.precision),
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


def is_bundle(path: Path) -> bool:
    """Whether a folder has a bundle's manifest."""
    return (path / MANIFEST).is_file()


def load(path: str | Path, verify: bool = True) -> Bundle:
    """Read a bundle's manifest and, unless `verify` is false, hash its files.

    Raises:
        BundleError: no bundle there, a newer schema, a manifest that does not follow its format or contradicts itself,
            or files that differ from it.
    """
    path = Path(path).absolute()
    manifest = path / MANIFEST
    if not is_bundle(path):
        found = "no such folder" if not path.exists() else f"it has no {MANIFEST}"
        raise BundleError(f"{path} is not a bundle: {found}; make one with: edgetube export --target onnx-fp32")
    try:
        data = strict.record(strict.read_json(manifest), "the manifest", ["schema"])
        schema = strict.integer(data["schema"], "schema", 1, 1 << 31)
        if schema > SCHEMA:
            raise BundleError(
                f"{path} has bundle schema {schema}; this edgetube reads schemas up to {SCHEMA}: upgrade edgetube or "
                "export again"
            )
        bundle = _parse(path, data)
    except OSError as error:
        raise BundleError(f"{manifest} cannot be read: {error.strerror}") from error
    except (FormatError, SpecError) as error:
        raise BundleError(f"{manifest} is damaged ({error}); export or copy the bundle again") from error
    if verify:
        bundle.verify()
    return bundle


FIELDS = (
    "name", "target", "precision", "backend", "status", "artifact", "batch", "labels", "input", "model", "checkpoint",
    "build", "parity", "versions", "files",
)  # fmt: skip
"""Required fields of the manifest, besides its schema."""

NAME = r"\w[\w.-]*"
"""Valid names of bundles, targets and backends: they become file names."""

MOST_BATCH = 1 << 12
MOST_FILES, MOST_GOLDEN, MOST_NOTES = 1 << 16, 64, 1 << 10


def _parse(path: Path, data: dict[str, Any]) -> Bundle:
    """Parse a manifest; every field has its type and is within its bounds.

    Raises:
        FormatError, SpecError: it does not follow the format, or contradicts itself.
    """
    strict.record(data, "the manifest", ("schema", *FIELDS), ())
    bundle = Bundle(
        path=path,
        **{key: strict.text(data[key], key, NAME, most=200) for key in ("name", "target", "backend")},
        precision=PRECISIONS[strict.choice(data["precision"], "precision", PRECISIONS)],
        status=cast(Status, strict.choice(data["status"], "status", get_args(Status))),
        spec=ModelSpec.from_json(data["model"]),
        contract=InputContract.from_json(data["input"]),
        labels=parse_labels(data["labels"], "labels"),
        batch=strict.integer(data["batch"], "batch", 1, MOST_BATCH),
        artifact=strict.path(data["artifact"], "artifact"),
        checkpoint=_parse_checkpoint(data["checkpoint"]),
        build=_parse_build(data["build"]),
        parity=_parse_proof(data["parity"]),
        versions=_texts(data["versions"], "versions"),
        files=_parse_files(data["files"]),
    )
    _check_consistency(bundle)
    return bundle


def parse_labels(value: Any, where: str) -> tuple[str, ...]:
    """Parse class names: at least one, no duplicates.

    Raises:
        FormatError: the value is not such a list.
    """
    labels = tuple(strict.text(label, where, most=1000) for label in strict.items(value, where, 1, MOST_CLASSES))
    if len(set(labels)) < len(labels):
        twice, _ = Counter(labels).most_common(1)[0]
        raise FormatError(f"{where} has {twice!r} more than once")
    return labels


READ_OPTIONS = ("adapter", "classifier", "spec", "arch", "ema", "text_features", "labels", "pool_frames")
"""Keys of `checkpoint` that say how it was read, the options of `edgetube export` of the same names."""


def _parse_checkpoint(value: Any) -> dict[str, str]:
    required, others = ("name", "source", "sha256"), ("format", "licence", *READ_OPTIONS)
    found = _texts(strict.record(value, "checkpoint", required, others), "checkpoint")
    strict.text(found["sha256"], "checkpoint.sha256", f"({SHA256})?")  # a checkpoint made in memory has none
    return found


def _parse_build(value: Any) -> dict[str, Any]:
    """Parse the exporter's record: free-form, but fields that edgetube reads are type-checked."""
    build = strict.record(value, "build")
    for key in ("lowering", "graph", "int8", "integers", "layers", "settings", "engine"):
        if key in build:
            strict.record(build[key], f"build.{key}")
    if "lowering" in build:
        for key in ("chosen", "why"):
            strict.text(build["lowering"].get(key), f"build.lowering.{key}")
        for name, timing in strict.record(build["lowering"].get("timings", {}), "build.lowering.timings").items():
            record = strict.record(timing, f"build.lowering.timings.{name}", ["p50_ms"])
            strict.number(record["p50_ms"], f"build.lowering.timings.{name}.p50_ms", 0)
    for note in strict.items(build.get("notes", []), "build.notes", 0, MOST_NOTES):
        strict.text(note, "build.notes")
    if "int8" in build:
        strict.text(build["int8"].get("summary"), "build.int8.summary")
    if "command" in build:
        strict.text(build["command"], "build.command")
    for operator, count in strict.record(build.get("graph", {}).get("operators", {}), "build.graph.operators").items():
        strict.integer(count, f"build.graph.operators.{operator}", 0, 1 << 31)
    return build


def _parse_parity(value: Any, where: str) -> dict[str, Any]:
    """Parse the measurements of the proof: numbers, strings, null, and objects of these, by name."""
    for key, entry in strict.record(value, where).items():
        strict.text(key, f"a name in {where}", NAME)
        if isinstance(entry, dict):
            _parse_parity(entry, f"{where}.{key}")
        elif not (entry is None or isinstance(entry, str)):
            strict.number(entry, f"{where}.{key}", -1e30, 1e30)
    if (error := value.get("max_abs_error")) is not None:
        strict.number(error, f"{where}.max_abs_error", 0, 1e30)
    return dict(value)


def _parse_proof(value: Any) -> dict[str, Any]:
    """Parse `parity`."""
    proof = _parse_parity(value, "parity")
    if "golden" in proof:
        golden = strict.record(proof["golden"], "parity.golden", ("clips", "min_sqnr"))
        strict.integer(golden["clips"], "parity.golden.clips", 1, MOST_GOLDEN)
        strict.number(golden["min_sqnr"], "parity.golden.min_sqnr", -300, 300)
    return proof


def _texts(value: Any, where: str) -> dict[str, str]:
    return {key: strict.text(entry, f"{where}.{key}") for key, entry in strict.record(value, where).items()}


def _parse_files(value: Any) -> dict[str, FileRecord]:
    records = strict.record(value, "files")
    if len(records) > MOST_FILES:
        raise FormatError(f"files has {len(records)} entries; expected at most {MOST_FILES}")
    files = {}
    for name, record in records.items():
        record = strict.record(record, f"files.{name}", ("bytes", "sha256"), ())
        files[strict.path(name, "a name in files")] = FileRecord(
            strict.integer(record["bytes"], f"files.{name}.bytes", 0, 1 << 50),
            strict.text(record["sha256"], f"files.{name}.sha256", SHA256),
        )
    if MANIFEST in files:
        raise FormatError(f"files names {MANIFEST}, which cannot hold its own hash")
    if len({name.casefold() for name in files}) < len(files):
        raise FormatError("files has two names that differ in case alone")
    return files


def _check_consistency(bundle: Bundle) -> None:
    """Check that fields of the manifest agree with one another.

    Raises:
        FormatError: they do not.
    """
    name, classes = bundle.spec.classifiers[0]
    if len(bundle.labels) != classes:
        raise FormatError(f"there are {len(bundle.labels)} labels, but the classifier {name} has {classes} classes")
    if bundle.contract.shape != (clip := (*bundle.spec.clip, bundle.spec.channels)):
        raise FormatError(f"the input is {bundle.contract.shape}, but the model takes clips {clip}")
    if not bundle.precision.names(bundle.target.rpartition("-")[2]):
        raise FormatError(f"the target is {bundle.target}, but the precision is {bundle.precision}")
    if GOLDEN not in bundle.files:
        raise FormatError(f"{GOLDEN} is not in files")
    if not bundle.artifact_files:
        raise FormatError(f"the artifact {bundle.artifact} is not in files")


def seal(bundle: Bundle) -> Bundle:
    """Record every file in the folder and write the manifest; returns the bundle with its `files`.

    Raises:
        BundleError: `load` would refuse it.
    """
    found = sorted(p for p in bundle.path.rglob("*") if p.is_file() and p.name != MANIFEST)
    files = {p.relative_to(bundle.path).as_posix(): FileRecord(p.stat().st_size, sha256(p)) for p in found}
    bundle = replace(bundle, files=files)
    text = json.dumps(bundle.to_json(), indent=2) + "\n"
    try:
        _parse(bundle.path, strict.parse_json(text, MANIFEST))
    except (FormatError, SpecError) as error:
        raise BundleError(f"{bundle.name}: its manifest would be refused ({error}); nothing was written") from error
    atomic_write(bundle.path / MANIFEST, text)
    return bundle


def save_golden(bundle: Bundle, frames: Frames, logits: npt.NDArray[np.float32]) -> None:
    """Write the golden clips (K, T, H, W, 3) uint8 and their reference logits (K, classes) into a staged bundle.

    K is what the manifest says in `parity.golden.clips`.
    """
    digest = np.frombuffer(bundle.contract_digest(), np.uint8)
    np.savez_compressed(bundle.path / GOLDEN, frames=frames, logits=logits, contract=digest)


@contextmanager
def staging(out: Path, holds: str = MANIFEST, what: str = "a bundle") -> Iterator[Path]:
    """A temporary folder to write a bundle in; renamed to `out` on success, deleted on error.

    An older bundle at `out` is replaced only then, atomically where the system can; a folder that is not a bundle is
    never touched. Leftovers of killed exports beside `out` are cleaned up first. Needs the package filelock, which is
    part of `edgetube[export]`.

    Args:
        out: the folder.
        holds: the file that a folder of this kind has.
        what: the folder is, in the words of an error.

    Raises:
        BundleError: `out` exists and is something else, or the disk refuses.
        MissingPackageError: filelock is not installed.
    """
    out = out.resolve() if out.is_symlink() else out.absolute()
    if out.exists() and not (out / holds).is_file():
        raise BundleError(f"{out} exists and is not {what}; choose another --out or move it away")
    folder = out.parent / f"{PREFIX}{secrets.token_hex(6)}{STAGED}"
    lock: Any = need("filelock", "export").FileLock(folder.with_suffix(".lock"))
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            _sweep(out.parent)
            lock.acquire(blocking=False)  # before the folder is there: one without a lock is nobody's
            folder.mkdir()
        except OSError as error:
            raise BundleError(f"cannot write to {out.parent}: {error.strerror}") from error
        try:
            yield folder
            _publish(folder, out)
        except OSError as error:
            raise BundleError(f"cannot write {out}: {error.strerror or error}; nothing was changed") from error
    finally:  # of all of it: a signal may come between any two lines
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.with_suffix(".lock").unlink(missing_ok=True)
        lock.release()


STAGED, ASIDE = ".staging", ".old"
"""Suffixes of a bundle being written and of one being replaced; each has a locked `.lock` file beside it."""


def _publish(folder: Path, out: Path) -> None:
    sync_tree(folder)
    if not out.exists():
        folder.rename(out)
    elif not exchange(folder, out):
        aside = folder.with_suffix(ASIDE)
        out.rename(aside)
        try:
            folder.rename(out)
        finally:
            if not out.exists():
                aside.rename(out)
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(out.parent)


def _sweep(parent: Path) -> None:
    """Remove leftovers of killed exports from a folder; a bundle that one was about to replace gets its name back.

    The lock of an export tells whether it still runs: the system releases it when the process ends.
    """
    from filelock import FileLock, Timeout

    for folder in [*parent.glob(f"{PREFIX}*{STAGED}"), *parent.glob(f"{PREFIX}*{ASIDE}")]:
        lock = FileLock(folder.with_suffix(".lock"))
        try:
            lock.acquire(blocking=False)
        except (Timeout, OSError):
            continue
        if folder.suffix == ASIDE:
            with suppress(BundleError, OSError):
                if not (place := parent / load(folder, verify=False).name).exists():
                    folder.rename(place)
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".lock").unlink(missing_ok=True)
        lock.release()


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
