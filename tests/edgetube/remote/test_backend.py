"""Whose answers are whose: what a device says of itself, by two folders in the place of two devices."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edgetube.bench import machine
from edgetube.bundle import Bundle
from edgetube.remote import bootstrap, far
from edgetube.remote.backend import RemoteArtifact
from edgetube.remote.device import Device
from edgetube.remote.stage import Store

BUNDLE = cast(Bundle, SimpleNamespace(files={}, backend="onnxruntime", build={}))


def identity(folder: Path, name: str = "adb://") -> Mapping[str, Any]:
    """Of an artifact on this machine as a device with a folder."""
    device = SimpleNamespace(
        name=name, facts=far.facts(Store(folder, "")), send=lambda _: "", ask=lambda do, path: "executed"
    )
    return RemoteArtifact(BUNDLE, cast(Device, device)).identity()


def test_two_phones_of_one_kind_are_two(tmp_path: Path) -> None:
    """`adb://` is whatever is plugged in, and all that the two say of their processors and packages is the same."""
    one, two = identity(tmp_path / "one"), identity(tmp_path / "two")
    assert one != two
    assert identity(tmp_path / "one") == one
    assert identity(tmp_path / "one", "adb://R58") != one


def test_another_python_or_edgetube_there_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = identity(tmp_path)
    others = {
        "python": (sys, "executable", "/home/pi/venv/bin/python3"),
        "code": (bootstrap, "modules", lambda: {"edgetube/wire.py": b"another"}),
        "versions": (machine, "versions", lambda: {"edgetube": "0.1.0", "onnxruntime": "9.9"}),
        "processor": (machine, "processor", lambda: "another"),
    }
    for key, (module, name, value) in others.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            found = identity(tmp_path)
        assert [part for part in first["on"] if found["on"][part] != first["on"][part]] == [key]
    assert identity(tmp_path) == first


def test_cores_that_sleep_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A phone switches cores off, and Python counts those that are on."""
    first = identity(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 97)
    assert "97 cores" in machine.describe()
    assert identity(tmp_path) == first
