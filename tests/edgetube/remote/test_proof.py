"""The proof of an export on a device: its manifest says so, or stays as it was."""

from __future__ import annotations

import shutil
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgetube import bundle as bundles
from edgetube.errors import ParityError
from edgetube.progress import Progress
from edgetube.remote import commands, proof

LOCAL = f"local://?python={sys.executable}"

pytestmark = pytest.mark.slow


@pytest.fixture
def deferred(tiny_bundle: Path, tmp_path: Path) -> bundles.Bundle:
    """A bundle that was not executed where it was exported."""
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    return bundles.seal(replace(bundles.load(tmp_path / "bundle"), status="deferred"))


def test_what_a_device_executed(deferred: bundles.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "CLIPS", 9)
    (proven,) = proof.prove(LOCAL, [deferred])
    found = bundles.load(deferred.path)
    assert found.status == proven.status == "executed"
    assert found.parity["device"]["name"] == "local://"
    assert found.parity["device"]["clips"] == 9
    assert found.parity["device"]["agreement"] == 1.0
    assert found.parity["golden"] == deferred.parity["golden"]
    found.golden()  # they belong to the manifest as before


def test_where_nothing_was_kept_no_device_is_opened() -> None:
    def reach(_: Progress) -> AbstractContextManager[commands.Place]:
        raise AssertionError("a device is opened")

    assert proof.prove_chosen(reach, []) == []


def test_a_device_that_answers_otherwise(deferred: bundles.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "CLIPS", 9)
    wrong = np.random.default_rng(0)
    monkeypatch.setattr(
        "edgetube.remote.backend.RemoteBackend.infer",
        lambda self, clips: wrong.standard_normal((len(clips), len(deferred.labels))).astype(np.float32),
    )
    with pytest.raises(ParityError, match=r"^local://: .*the bundle stays deferred$"):
        proof.prove(LOCAL, [deferred])
    found = bundles.load(deferred.path)
    assert found.status == "deferred"
    assert "device" not in found.parity
