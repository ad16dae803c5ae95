"""The commands on a device, through a real sshd: they say there what they say here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgetube import bundle as bundles
from edgetube import demo
from edgetube.bench import latency, layers, model_set, parity
from edgetube.bench.latency import Options
from edgetube.bench.model_set import Artifact
from edgetube.datasets import built_in
from edgetube.errors import InputError
from edgetube.remote import commands
from edgetube.remote.backend import RemoteArtifact, RemoteBackend
from edgetube.remote.device import Device
from edgetube.runtime import Runtime
from tests.edgetube.remote.conftest import Sshd

Cli = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.slow

BRIEFLY = ("--seconds", "0.2", "--starts", "1", "--threads", "1")


def test_parity_with_layers_is_that_of_this_machine(sshd: Sshd, tiny_bundle: Path) -> None:
    """The same processor and the same runtime: the same logits and layers, bit for bit."""
    found, source = bundles.load(tiny_bundle), built_in(9, bundles.load(tiny_bundle).labels)
    here = parity.measure([found], source), layers.curves([found], source.sample(1))
    with Device(sshd.address()) as device:
        make = commands.Artifacts(device)
        there = parity.measure([found], source, artifact=make), layers.curves([found], source.sample(1), artifact=make)
    assert there[0].measured[0].to_json() == here[0].measured[0].to_json()
    assert there[1] == here[1]
    assert len(there[1][0].curve) > 10


def test_the_answers_of_a_device_are_kept_apart(sshd: Sshd, tiny_bundle: Path) -> None:
    found = bundles.load(tiny_bundle)
    with Device(sshd.address()) as device:
        own, far = Artifact(found), RemoteArtifact(found, device)
        assert own.identity() != far.identity()
        assert far.status == own.status == "executed"
        with far.open(1) as backend:
            assert isinstance(backend, RemoteBackend)
            assert backend.describe()["on"] == "ssh://device"
            frames = found.golden()[0]
            with own.open(1) as here:
                assert (backend(frames) == here(frames)).all()
            backend.only_tap()
            assert backend.layers(["logits", "nothing"]) == ("logits",)
            tap = backend.tap(["logits"])
            assert (tap(frames[:1])["logits"] == here_logits(found)).all()


def here_logits(found: bundles.Bundle) -> object:
    with Artifact(found).open(1) as here:
        return here(found.golden()[0][:1])


def test_a_set_of_models_takes_a_factory(sshd: Sshd, tiny_bundle: Path) -> None:
    found = bundles.load(tiny_bundle)
    with Device(sshd.address()) as device:
        models = model_set.of_bundles([found], found, artifact=commands.Artifacts(device)).models
    assert [type(model) for model in models] == [Artifact, RemoteArtifact]


class TestCommandLine:
    def test_bench(self, sshd: Sshd, tiny_bundle: Path, edgetube_cli: Cli) -> None:
        code, out, err = edgetube_cli("bench", tiny_bundle, "--on", sshd.address(), *BRIEFLY, "--json")
        assert code == 0, err
        document = json.loads(out)
        (row,) = document["bundles"]
        assert row["p50_ms"] > 0
        assert row["path"] == str(tiny_bundle)
        assert document["device"]["name"] == "ssh://device"
        assert document["versions"] == document["device"]["versions"]

    def test_a_fleet_of_which_one_is_off(
        self, sshd: Sshd, tiny_bundle: Path, edgetube_cli: Cli, tmp_path: Path
    ) -> None:
        listed = tmp_path / "devices.toml"
        listed.write_text(f'[one]\naddress = "{sshd.address()}"\n[off]\naddress = "ssh://off"\n')
        code, out, err = edgetube_cli("bench", tiny_bundle, "--on", listed, *BRIEFLY, "--json")
        assert code == 1
        first, second = json.loads(out)["devices"]
        assert first["bundles"][0]["p50_ms"] > 0
        assert second["device"] == {"name": "ssh://off"}
        assert "ssh://off: it cannot be reached" in err

    def test_parity_and_agree(self, sshd: Sshd, tiny_bundle: Path, edgetube_cli: Cli) -> None:
        code, out, err = edgetube_cli("parity", tiny_bundle, "--clips", 9, "--on", sshd.address(), "--json")
        assert code == 0, err
        document = json.loads(out)
        assert document["device"]["name"] == "ssh://device"
        assert document["bundles"][0]["status"] == "executed"
        code, out, err = edgetube_cli("agree", tiny_bundle, "demo", "--on", sshd.address(), "--json")
        assert code == 0, err
        assert json.loads(out)["rows"][1]["runtime"]["on"] == "ssh://device"

    def test_doctor(self, sshd: Sshd, tiny_bundle: Path, edgetube_cli: Cli) -> None:
        code, out, err = edgetube_cli("doctor", tiny_bundle, "--on", sshd.address(), "--json")
        assert code == 0, err
        assert [check["name"] for check in json.loads(out)] == ["device", "manifest", "files", "opens", "golden clip"]
        code, out, _ = edgetube_cli("doctor", tiny_bundle, "--on", "ssh://off", "--json")
        assert code == 1
        assert json.loads(out)[0]["name"] == "device"

    def test_run(self, sshd: Sshd, tiny_bundle: Path, edgetube_cli: Cli) -> None:
        clip = demo.videos()["pan-left"]
        code, out, err = edgetube_cli("run", tiny_bundle, clip, "--on", sshd.address(), "--json")
        assert code == 0, err
        with Runtime(tiny_bundle) as rt:
            expected = rt.predict(clip, top_k=3)
        found = json.loads(out)
        assert found["source"] == str(clip)
        assert tuple(found["logits"]) == expected.logits
        code, out, err = edgetube_cli(
            "run", tiny_bundle, clip, "--stream", "--limit", 2, "--on", sshd.address(), "--json"
        )
        assert code == 0, err
        assert len(out.splitlines()) == 2

    def test_options_that_a_device_cannot_take(self, tiny_bundle: Path, edgetube_cli: Cli) -> None:
        code, _, err = edgetube_cli("bench", tiny_bundle, "--on", "local://", "--reference")
        assert (code, "--reference times PyTorch on this machine" in err) == (2, True)
        code, _, err = edgetube_cli("parity", tiny_bundle, "--on", "local://", "--workers", 2)
        assert (code, "leave out --workers" in err) == (2, True)
        again = "local://?python=/usr/bin/python3"
        code, _, err = edgetube_cli("bench", tiny_bundle, "--on", "local://", "--on", again)
        assert (code, "--on names local:// twice" in err) == (2, True)


def test_all_addresses_are_read_before_anything_is_done(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "device_of", None)
    for wrong in ("ftp://x", "ssh://pi:secret@host", "ssh://pi:secret@host/x.toml"):
        with pytest.raises(InputError, match=r"^the device .*") as caught:
            commands.bench(["local://", wrong], [bundles.load(tiny_bundle)], Options())
        assert "secret" not in str(caught.value)


def test_where_an_export_is_proven_is_read_before_it_is_made(edgetube_cli: Cli, tmp_path: Path) -> None:
    code, _, err = edgetube_cli("export", "--target", "onnx-fp32", "--out", tmp_path / "out", "--prove-on", "pi@pi")
    assert (code, "the device is '***@pi'; expected ssh://user@host" in err) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "x = 1", '[pi]\nhost = "x"', "["])
def test_what_lists_no_devices(text: str, tmp_path: Path) -> None:
    listed = tmp_path / "devices.toml"
    listed.write_text(text)
    with pytest.raises(InputError, match=r"devices\.toml (lists no devices|is no TOML)"):
        commands.addresses([str(listed)])


def test_the_device_makes_the_document_itself(tiny_bundle: Path) -> None:
    """Of the same bundle, it is what the command makes without a line, and says where it was made."""
    made, options = [bundles.load(tiny_bundle)], Options((1,), seconds=0.2, starts=1)
    address = f"local://?python={sys.executable}"
    document, here = commands.bench([address], made, options), latency.measure(made, options)
    assert document["device"]["name"] == "local://"
    assert document.keys() - here.keys() == {"device"}
    (row,), (expected,) = document["bundles"], here["bundles"]
    assert row.keys() == expected.keys()
    assert row["runs"] >= latency.TURNS * latency.BLOCK
