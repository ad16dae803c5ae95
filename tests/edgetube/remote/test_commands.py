"""The commands on a device, through a real sshd: they say there what they say here."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgetube import bundle as bundles
from edgetube import demo
from edgetube.bench import latency, layers, machine, model_set, parity
from edgetube.bench.latency import Options
from edgetube.bench.model_set import Artifact
from edgetube.datasets import ClipSet, built_in
from edgetube.errors import InputError
from edgetube.remote import commands, proof
from edgetube.remote.backend import RemoteArtifact, RemoteBackend
from edgetube.remote.device import Device
from edgetube.runtime import Runtime
from edgetube.runtimes.base import Logits
from edgetube.video import Frames
from tests.edgetube.remote.conftest import Sshd

Cli = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.slow

LOCAL = f"local://?python={sys.executable}"

BRIEFLY = ("--seconds", "0.2", "--starts", "1", "--threads", "1")


def test_parity_with_layers_is_that_of_this_machine(sshd: Sshd, tiny_bundle: Path) -> None:
    """The same processor and the same runtime: the same logits and layers, bit for bit."""
    found, source = bundles.load(tiny_bundle), built_in(9, bundles.load(tiny_bundle).labels)
    here = parity.measure([found], source), layers.curves([found], source.sample(1))
    with Device(sshd.address()) as device:
        make = commands.Place(device).artifact
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
        models = model_set.of_bundles([found], found, artifact=commands.Place(device).artifact).models
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
        code, out, err = edgetube_cli("bench", tiny_bundle, "--on", listed, "--on", LOCAL, *BRIEFLY, "--json")
        assert code == 1
        first, second, third = json.loads(out)["devices"]
        assert [one["device"]["name"] for one in (first, third)] == ["ssh://device", "local://"]
        assert all(one["bundles"][0]["p50_ms"] > 0 for one in (first, third))
        assert second["device"] == {"name": "ssh://off"}
        assert "ssh://off: it cannot be reached" in err

    def test_two_addresses_of_one_device(
        self, sshd: Sshd, tiny_bundle: Path, edgetube_cli: Cli, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(commands, "_timed", None)
        given = ("--on", sshd.address(), "--on", sshd.address(host="twin"))
        code, out, err = edgetube_cli("bench", tiny_bundle, *given, *BRIEFLY, "--json")
        assert (code, out) == (2, "")
        assert "error: ssh://device and ssh://twin are one device; a device times in turns" in err

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


class Swept:
    """Runs a sweep of two points of the tiny model on devices."""

    def __init__(self, cli: Cli, checkpoint: Path, out: Path) -> None:
        self.cli, self.out = cli, out
        self.args = (
            "sweep", "--target", "onnx-fp32", "--checkpoint", checkpoint, "--keep-tokens", "6", "--pareto", "--head",
            "motion", "--clips", 9, "--seconds", 0.05, "--lowering", "gather", "--out", out, "--threads", 1, "--json",
        )  # fmt: skip

    def __call__(self, *more: object) -> tuple[int, str, str]:
        return self.cli(*self.args, *more)

    def bundles(self) -> list[bundles.Bundle]:
        """Those of the points."""
        return [bundles.load(path) for path in sorted(self.out.glob(".sweep/*/*.onnx-fp32"))]


@pytest.fixture
def swept(edgetube_cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> Swept:
    return Swept(edgetube_cli, tiny_checkpoint, tmp_path / "out")


class Counted:
    """Counts the clips that devices answered; may end the far side before a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clips, self.before = 0, lambda backend: None
        usual = RemoteBackend.infer

        def infer(backend: RemoteBackend, clips: Frames) -> Logits:
            self.before(backend)
            logits = usual(backend, clips)
            self.clips += len(clips)
            return logits

        monkeypatch.setattr(RemoteBackend, "infer", infer)


class TestSweep:
    def test_times_and_answers_are_the_device_s(self, swept: Swept, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is timed here, and no artifact answers here; a sweep that goes on asks for nothing again."""

        def refuse(*_: object) -> None:
            raise AssertionError("this machine times or answers")

        before = list[int]()
        with monkeypatch.context() as patch:
            patch.setattr(latency, "measure", refuse)
            patch.setattr(Artifact, "open", refuse)
            patch.setattr(proof, "CLIPS", 9)
            counted, prove = Counted(patch), proof.prove_chosen
            patch.setattr(proof, "prove_chosen", lambda *given: (before.append(counted.clips), prove(*given))[1])
            code, text, err = swept("--on", LOCAL)
        assert code == 0, err
        document = json.loads(text)
        assert document == json.loads((swept.out / "sweep.json").read_text("utf-8"))
        assert document["device"]["name"] == "local://"
        assert (document["machine"], document["versions"]) == (machine.describe(), machine.versions())
        assert document["conditions"]["throttled"] is not None or document["conditions"]["before"]
        assert [row["name"] for row in document["points"]] == ["onnx-fp32", "onnx-fp32 keep6"]
        assert all(row["p50_ms"] > 0 for row in document["points"])
        assert before == [sum(row["clips"] for row in document["points"])]
        assert counted.clips >= before[0] + 9 * len(document["kept"])
        source = built_in(9, demo.LABELS)
        for row in document["points"]:
            if row["clips"] == 9:
                assert row["accuracy"] == pytest.approx(share_here(bundles.load(row["bundle"]), source))
        kept = [bundles.load(path) for path in document["kept"]]
        (whole,) = [bundle for bundle in kept if bundle.spec.reduction is None]
        assert whole.parity["device"]["name"] == "local://"
        for bundle in kept:
            assert "device" in bundle.parity or "the bundle stays executed" in err

        monkeypatch.setattr("edgetube.export.points.ExportSession", refuse)
        monkeypatch.setattr(proof, "prove_chosen", lambda *_: [])
        again = Counted(monkeypatch)
        code, text, err = swept("--on", LOCAL)
        assert code == 0, err
        assert json.loads(text)["device"]["name"] == "local://"
        pairs = zip(document["points"], json.loads(text)["points"], strict=True)
        assert again.clips == sum(max(0, after["clips"] - before["clips"]) for before, after in pairs)

    @pytest.mark.long
    def test_what_another_machine_answered_is_not_taken(
        self, swept: Swept, sshd: Sshd, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither this machine's answers, nor those of another address; the exports are."""
        monkeypatch.setattr(proof, "prove_chosen", lambda *_: [])
        counted, answered = Counted(monkeypatch), 0
        assert swept()[0] == 0
        assert counted.clips == 0
        monkeypatch.setattr("edgetube.export.points.ExportSession", None)
        for address in (LOCAL, sshd.address()):
            code, text, err = swept("--on", address)
            assert code == 0, err
            answered += sum(row["clips"] for row in json.loads(text)["points"])
            assert counted.clips == answered
        assert answered >= 4 * 9 / 4

    @pytest.mark.long
    def test_a_line_that_is_cut_keeps_what_was_measured(self, swept: Swept, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(proof, "prove_chosen", lambda *_: [])
        counted = Counted(monkeypatch)

        def cut(backend: RemoteBackend) -> None:
            if counted.clips >= 6:  # both points have answered the first three clips
                shell = backend._device._process
                assert shell is not None
                (there,) = Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
                os.kill(int(there), signal.SIGKILL)

        counted.before = cut
        code, text, err = swept("--on", LOCAL)
        assert (code, text) == (2, "")
        (said,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert said.startswith("error: local://: edgetube was ended there by signal 9")
        assert re.search(r"it was asked for an answer of tiny(-keep6)?\.onnx-fp32$", said)
        assert not (swept.out / "sweep.json").exists()
        assert len(swept.bundles()) == 2
        monkeypatch.setattr("edgetube.export.points.ExportSession", None)
        counted.clips, counted.before = 0, lambda backend: None
        code, text, err = swept("--on", LOCAL)
        assert code == 0, err
        assert counted.clips == sum(row["clips"] for row in json.loads(text)["points"]) - 6

    def test_a_device_that_is_off_is_known_before_the_exports(self, swept: Swept, sshd: Sshd) -> None:
        code, text, err = swept("--on", "ssh://off")
        assert (code, text) == (2, "")
        assert "ssh://off: it cannot be reached" in err
        assert not swept.out.exists()

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--on", "local://", "--on", "ssh://pi"), "--on names 2 devices; a sweep finds the point of one"),
            (("--on", "local://", "--workers", 2), "leave out --workers and --ray"),
            (("--on", "pi@pi"), "the device is '***@pi'; expected ssh://user@host"),
        ],
    )
    def test_what_is_refused(self, swept: Swept, more: tuple[object, ...], said: str) -> None:
        code, text, err = swept(*more)
        assert (code, text) == (2, "")
        assert said in err
        assert not swept.out.exists()


def share_here(bundle: bundles.Bundle, source: ClipSet) -> float:
    """Accuracy of a bundle on this machine."""
    with Artifact(bundle).open(1) as backend:
        answers = [int(backend(item.read(bundle.contract).frames[None]).argmax()) for item in source.items]
    right = [bundle.labels[answer] == item.label for answer, item in zip(answers, source.items, strict=True)]
    return sum(right) / len(right)


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
