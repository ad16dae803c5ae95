"""Tars of samples, as webdataset writes them: `key.mp4` with its label in `key.cls`, or as `label` in `key.json`."""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgetube.errors import InputError

SUFFIX = ".tar"
LABELS = (".cls", ".json")
MOST_LABEL = 1 << 20
"""Bytes of a label's file."""


@dataclass(frozen=True)
class Sample:
    """A video or image in a tar: its name, where its bytes are in the file, and its label."""

    name: str
    offset: int
    size: int
    label: str | None


def samples(path: Path, wanted: Collection[str]) -> list[Sample]:
    """The members of a tar with a wanted suffix, in their order.

    Raises:
        InputError: it is no tar without compression, is cut off, or a label cannot be read.
    """
    videos: list[tarfile.TarInfo] = []
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, suffix = _split(member.name)
                if not member.isfile() or member.name.rpartition("/")[2].startswith("."):
                    continue
                if suffix in wanted:
                    videos.append(member)
                elif suffix in LABELS and member.size <= MOST_LABEL and (file := tar.extractfile(member)):
                    found = _label(suffix, file.read())
                    labels |= {} if found is None else {key: found}
    except (tarfile.TarError, OSError, ValueError, EOFError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as a tar of samples: {error}") from error
    return [Sample(one.name, one.offset_data, one.size, labels.get(_split(one.name)[0])) for one in videos]


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member; the key ends at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    key, dot, suffix = file.partition(".")
    return f"{folder}{slash}{key}", f"{dot}{suffix}".lower()


def _label(suffix: str, data: bytes) -> str | None:
    text = data.decode("utf-8").strip()
    if suffix == ".cls":
        return text or None
    found = json.loads(text)
    label = found.get("label", found.get("cls")) if isinstance(found, dict) else None
    return None if label in (None, "") else str(label)


@contextmanager
def extracted(path: Path, sample: Sample) -> Iterator[Path]:
    """The video of a sample as a file, as long as the block lasts.

    Raises:
        OSError: the tar, or the temporary file, cannot be read or written.
    """
    with tempfile.TemporaryDirectory(prefix="edgetube-") as folder:
        file = Path(folder) / f"clip{_split(sample.name)[1]}"
        with path.open("rb") as tar:
            tar.seek(sample.offset)
            file.write_bytes(tar.read(sample.size))
        yield file
