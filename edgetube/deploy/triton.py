"""A model repository of the Triton Inference Server: https://github.com/triton-inference-server/server.

::

    models/                     what `tritonserver --model-repository` is given
        demo.onnx-int8/
            config.pbtxt        the model's configuration, a ModelConfig in protobuf's text format
            labels.txt          names of classes, for Triton's classification extension
            warmup/golden       a golden clip; Triton runs it before it says that the model is ready
            1/                  the first version: the artifact, or model.py and the bundle

The input is `frames` (B, T, H, W, 3) uint8 RGB, already preprocessed as the bundle's contract says, which the
configuration states as a parameter. The output is `logits` (B, classes) float32.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from edgetube import runtimes
from edgetube.bundle import Bundle, staging
from edgetube.deploy import model
from edgetube.errors import InputError
from edgetube.runtimes.base import Served

RunBy = Literal["triton", "edgetube"]
"""A backend of Triton for the artifact, or `edgetube.Runtime` in Triton's Python backend."""

CONFIG, LABELS, VERSION = "config.pbtxt", "labels.txt", "1"

WARMUP, CLIP = "warmup", "golden"
"""The folder that Triton looks for such files in, and the file of a golden clip."""

MOST_CLIPS = 64
"""Largest number of clips of a request, and of requests put together, where edgetube runs the bundle."""

FORBIDDEN = '/\\"\0'


@dataclass(frozen=True)
class Written:
    """A model in a repository: its name, the backend of Triton that runs it, and whose program that is."""

    name: str
    backend: str
    run_by: RunBy


def repository(bundle: Bundle, out: Path, *, name: str | None = None, run_by: str | None = None) -> Written:
    """Write a model to a repository; an older one of the same name is replaced.

    Args:
        bundle: a complete bundle.
        out: the repository; made if it is not there, and other models in it stay.
        name: of the model; the bundle's by default.
        run_by: a `RunBy`; None takes Triton's own backend where it has one.

    Raises:
        InputError: a name that is no name of a folder, or Triton has no backend for the artifact.
        BundleError: the bundle is damaged, or the disk refuses.
    """
    name = bundle.name if name is None else name
    if not name or name in (".", "..") or any(letter in FORBIDDEN for letter in name):
        raise InputError(f"the model's name is {name!r}; expected the name of a folder")
    if run_by not in (None, *get_args(RunBy)):
        raise InputError(f"--run-by is {run_by!r}; expected {' or '.join(get_args(RunBy))}")
    served = None if run_by == "edgetube" else runtimes.served(bundle)
    if served is None and run_by == "triton":
        raise InputError(
            f"Triton has no backend of its own for {bundle.path} (target {bundle.target}): leave out --run-by, and "
            "edgetube runs it in Triton's Python backend"
        )
    bundle.verify()
    clips = bundle.golden()[0][:1]
    with staging(out / name, holds=CONFIG, what="a model of Triton") as folder:
        for part in (VERSION, WARMUP):
            (folder / part).mkdir()
        if served is None:
            shutil.copytree(bundle.path, folder / VERSION / "bundle")
            shutil.copyfile(model.__file__, folder / VERSION / "model.py")
        else:
            for file, source in served.files.items():
                shutil.copyfile(source, folder / VERSION / file)
            clips = np.repeat(clips, bundle.batch, axis=0)
        (folder / CONFIG).write_text(_config(bundle, name, served), encoding="utf-8")
        (folder / LABELS).write_text("".join(f"{' '.join(label.split())}\n" for label in bundle.labels), "utf-8")
        (folder / WARMUP / CLIP).write_bytes(np.ascontiguousarray(clips).tobytes())
    return Written(name, "python", "edgetube") if served is None else Written(name, served.backend, "triton")


def _config(bundle: Bundle, name: str, served: Served | None) -> str:
    """The text of `config.pbtxt`. An artifact's batch is static: Triton adds no axis, and puts no requests together."""
    clip, classes = bundle.contract.shape, len(bundle.labels)
    batch = () if served is None else (bundle.batch,)
    lines = [
        f"name: {_quoted(name)}",
        f"backend: {_quoted('python' if served is None else served.backend)}",
        f"max_batch_size: {MOST_CLIPS if served is None else 0}",
        f'input [ {{ name: "frames" data_type: TYPE_UINT8 dims: {[*batch, *clip]} }} ]',
        f'output [ {{ name: "logits" data_type: TYPE_FP32 dims: {[*batch, classes]} label_filename: "{LABELS}" }} ]',
    ]
    if served is None:  # what it runs on is the bundle's to say, not Triton's
        lines += ["instance_group [ { kind: KIND_CPU count: 1 } ]"]
        if bundle.batch > 1:
            lines += [f"dynamic_batching {{ preferred_batch_size: [{bundle.batch}] }}"]
    lines += [
        f'model_warmup [ {{ name: "{CLIP}" batch_size: 1 inputs {{ key: "frames" value {{',
        f'  data_type: TYPE_UINT8 dims: {[*batch, *clip]} input_data_file: "{CLIP}" }} }} }} ]',
    ]
    stated = {"bundle": bundle.name, "input": json.dumps(bundle.contract.to_json(), sort_keys=True)}
    lines += [
        f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(text)} }} }}"
        for key, text in stated.items()
    ]
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    """A string of protobuf's text format, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)
