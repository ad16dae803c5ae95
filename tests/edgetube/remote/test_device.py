"""The line to a device: what is wrong with one is one clear error, and nothing stays running there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

import edgetube
from edgetube import bundle as bundles
from edgetube import demo
from edgetube.bench import machine
from edgetube.errors import BundleError, DeviceError, InputError
from edgetube.remote import commands, stage, store, transport
from edgetube.remote.device import Device
from edgetube.remote.ssh import Ssh
from tests.edgetube.remote.conftest import SLACK_S, Network, Sshd, all_end

LOCAL = f"local://?python={sys.executable}"


class TestAddresses:
    def test_the_parts_of_an_address(self) -> None:
        found = transport.parse("ssh://pi@camera.local:2222?python=/opt/venv/bin/python")
        assert found == Ssh("ssh://pi@camera.local:2222", "camera.local", "pi", 2222, "/opt/venv/bin/python")
        assert transport.parse("ssh://[::1]:22").name == "ssh://[::1]:22"
        assert transport.parse("ssh://[fe80::AB%25eth0]:22") == Ssh(
            "ssh://[fe80::AB%25eth0]:22", "fe80::AB%25eth0", port=22
        )
        assert transport.parse("local://").python is None

    def test_a_host_keeps_its_case(self) -> None:
        """`Host MyPi` of a configuration of ssh is another one than `mypi`."""
        assert transport.parse("ssh://Pi@MyPi:22") == Ssh("ssh://Pi@MyPi:22", "MyPi", "Pi", 22)
        assert transport.parse("ssh://MyPi?python=/P") == Ssh("ssh://MyPi", "MyPi", python="/P")

    @pytest.mark.parametrize(
        "text",
        [
            "pi@camera", "ssh://", "ssh://host/folder", "ssh://host?key=1", "ssh://host?python=python3", "ftp://host",
            "ssh://host:port", "ssh://-oProxyCommand=x", "ssh://-l@host", "ssh://a b", "local://host", "",
        ],
    )  # fmt: skip
    def test_what_is_no_address(self, text: str) -> None:
        with pytest.raises(InputError, match=r"^the device is .*expected ssh://user@host"):
            transport.parse(text)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("ssh://pi:secret@host", "has a password"), ("ssh://pi:secret@ho st/x", "has a password"),
            ("ssh://pi%3Asecret@host", "has a password"), ("ssh://pi:se@cret@host", "has a password"),
            ("local://pi:secret@", "has a password"), ("ssh://pi:secret/x@host", "expected ssh://"),
            ("ssh://pi:secret#x@host", "expected ssh://"), ("ssh://pi:secret?x@host", "expected ssh://"),
            ("ssh://pi:secret@[host", "expected ssh://"), ("pi:secret@host", "expected ssh://"),
        ],
    )  # fmt: skip
    def test_a_password_is_refused_and_not_shown(self, text: str, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            transport.parse(text)
        assert not re.search("se.?cret|se@|cret", str(caught.value))

    def test_the_command_is_the_user_s_ssh(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGETUBE_SSH", "/opt/ssh -F 'my config'")
        command = Ssh("ssh://pi@host:22", "host", "pi", 22).command
        assert command[:3] == ["/opt/ssh", "-F", "my config"]
        assert command[-6:] == ["-l", "pi", "-p", "22", "--", "host"]
        assert not any("StrictHostKeyChecking" in word for word in command)

    @pytest.mark.parametrize("command", ["ssh 'x", " ", "''"])
    def test_a_command_that_cannot_be_read(self, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGETUBE_SSH", command)
        with pytest.raises(InputError, match="EDGETUBE_SSH cannot be read"):
            Device("ssh://host")

    def test_no_ssh(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGETUBE_SSH", "/nowhere/ssh")
        with pytest.raises(DeviceError, match=r"^ssh://host: /nowhere/ssh cannot be started \(No such file"):
            Device("ssh://host")


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("ssh: Could not resolve hostname pii: Name or service not known", "no machine of that name"),
        ("ssh: connect to host pi port 22: Connection timed out", "it cannot be reached"),
        ("ssh: connect to host pi port 22: No route to host", "it cannot be reached"),
        ("@@@@\r\nWARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!\r\nHost key verification failed.", "its host key"),
        ("pi@pi: Permission denied (publickey,password).", "it refuses the login: `ssh -p 2222 pi@host` has to work"),
        ("Unable to negotiate with pi: no matching host key type found. Their offer: ssh-rsa", "its ssh server is too"),
        ("Timeout, server pi not responding.", "the line was cut"),
        ("client_loop: send disconnect: Broken pipe", "the line was cut"),
        (
            "jump: Permission denied (publickey).\nConnection refused\nTimeout, server pi not responding.",
            "the line was cut",
        ),
        (
            "Timeout, server pi not responding.\nkilled",
            "the line was cut: run the command again, what was already sent "
            "is kept there (ssh says: Timeout, server pi not responding.)",
        ),
        ("Bad configuration option: x", "try by hand: `ssh -p 2222 pi@host`"),
        ("", "try by hand"),
    ],
)
def test_what_ssh_says_becomes_advice(said: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGETUBE_SSH", raising=False)
    reason = Ssh("ssh://pi@host:2222", "host", "pi", 2222).explain(255, said, begun=True)
    assert reason is not None
    assert reason.startswith(advice)
    reached = Ssh("ssh://host", "host")
    assert reached.explain(1, said, begun=True) is None
    assert reached.explain(-15, said, begun=True) == "ssh was ended here by signal 15: run the command again"


class TestUnreachable:
    def test_nobody_listens(self, sshd: Sshd) -> None:
        with pytest.raises(DeviceError, match=r"^ssh://off: it cannot be reached: is it on, .*Connection refused"):
            Device("ssh://off")

    def test_a_host_key_that_is_not_known(self, sshd: Sshd) -> None:
        with pytest.raises(
            DeviceError, match=r"^ssh://unknown: its host key is not the one that is known here: connect"
        ):
            Device("ssh://unknown")

    def test_a_key_that_is_not_accepted(self, sshd: Sshd) -> None:
        with pytest.raises(DeviceError, match=r"^ssh://stranger: it refuses the login: .*Permission denied"):
            Device("ssh://stranger")


def _count(seen: list[int], stage: str, done: int, total: int) -> None:
    seen.append(done)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


ABOUT = {"own": {"version": edgetube.__version__, "code": ""}, "executable": "/python3"}
HELLOS = [f"{stage.HELLO} {json.dumps(found)}" for found in (ABOUT, {"protocol": stage.PROTOCOL})]
FRIENDLY = "".join(f"read -r line; echo '{text}'; " for text in (*HELLOS, '{"result": {}}'))
"""A script that answers until a line to it is open."""


class TestDeaf:
    """The other side neither answers nor closes the line; the client here is ended, which is no fault of its own."""

    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("edgetube.remote.device.GRACE_S", 0.2)

    def test_a_line_that_does_not_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGETUBE_SSH", str(script(tmp_path / "ssh", "exec >&-; exec sleep 60")))
        with pytest.raises(DeviceError, match=r"^ssh://pi: the line did not end within 0\.2 s, and was given up: run"):
            Device("ssh://pi")

    def test_closing_does_not_wait_for_what_cannot_be_sent(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EDGETUBE_SSH", str(script(tmp_path / "ssh", f"{FRIENDLY}exec sleep 60")))
        device = Device("ssh://pi?python=/python3")
        failed = list[str]()

        def put() -> None:
            try:
                device.ask("put", b"x" * (1 << 20))
            except DeviceError as error:
                failed.append(str(error))

        threads = [threading.Thread(target=put, daemon=True), threading.Thread(target=device.close, daemon=True)]
        try:
            for thread in threads:
                thread.start()
                time.sleep(0.2)  # until the pipe is full
            for thread in threads:
                thread.join(10)
            assert not any(thread.is_alive() for thread in threads)
        finally:
            assert device._process is not None
            device._process.kill()
        assert len(failed) == 1
        assert failed[0].startswith("ssh://pi: the line did not end")


class TestSilent:
    """Nothing comes any more, not even a sign, and nobody closes the line."""

    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Long enough for a shell to start on a busy machine."""
        monkeypatch.setattr("edgetube.remote.device.PATIENCE_S", 3.0)

    def end(self, device: Device) -> int:
        assert device._process is not None
        return device._process.wait(0)

    def test_from_the_beginning(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("edgetube.remote.device.PATIENCE_S", 0.5)
        monkeypatch.setenv("EDGETUBE_SSH", str(script(tmp_path / "ssh", "exec sleep 60")))
        with pytest.raises(
            DeviceError, match=r"^ssh://pi: it does not answer, nothing came from there for 0\.5 s: see"
        ):
            Device("ssh://pi")

    @pytest.mark.slow
    @pytest.mark.parametrize("size", [1, 1 << 20])
    def test_later(self, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It neither answers, nor takes what the pipe has no room for."""
        monkeypatch.setenv("EDGETUBE_SSH", str(script(tmp_path / "ssh", f"{FRIENDLY}exec sleep 60")))
        with Device("ssh://pi?python=/python3") as device:
            for _ in range(2):
                with pytest.raises(
                    DeviceError, match=r"^ssh://pi: the line was cut, nothing came from there for 3 s: see .*was sent"
                ):
                    device.ask("put", b"x" * size)
                assert self.end(device) == -signal.SIGKILL

    @pytest.mark.slow
    def test_a_sign_is_enough(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """For four times as long as the patience is, there are signs and nothing else."""
        signs = "for _ in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 1; echo; done"
        text = f"{FRIENDLY}read -r line; {signs}; echo '{{\"result\": 7}}'; exec sleep 60"
        monkeypatch.setenv("EDGETUBE_SSH", str(script(tmp_path / "ssh", text)))
        monkeypatch.setattr("edgetube.remote.device.GRACE_S", 0.2)
        with Device("ssh://pi?python=/python3") as device:
            assert device.ask("facts") == 7


SLOW_DISK = """
import importlib.abc, sys, time

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "edgetube.remote.far":
            time.sleep(50)

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.long
def test_a_device_that_imports_for_long_is_not_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For twice as long as the patience is, from a slow disk."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("edgetube.remote.device.PATIENCE_S", 25.0)
    began = time.monotonic()
    with Device(LOCAL) as device:
        assert time.monotonic() - began > 50.0
        assert device.facts["machine"] == machine.describe()


def test_two_workers_have_networks_of_their_own() -> None:
    networks = [Network(number) for number in (4711, 4712, 4713)]
    assert len({address for network in networks for address in (network.here, network.there)}) == 6
    subnets = [ip_network(f"{network.here}/30", strict=False) for network in networks]
    assert all(ip_address(network.there) in subnet for network, subnet in zip(networks, subnets, strict=True))
    assert len({*subnets}) == 3


@pytest.mark.slow
class TestPython:
    def test_an_old_one(self, sshd: Sshd, tmp_path: Path) -> None:
        old = script(tmp_path / "python3", 'case "$1" in -V) echo Python 3.9.2;; *) exit 1;; esac')
        with pytest.raises(
            DeviceError, match=rf"^ssh://device: {old} is Python 3\.9\.2; edgetube needs Python 3\.10 or"
        ):
            Device(sshd.address(str(old)))

    def test_none_at_the_given_place(self, sshd: Sshd) -> None:
        with pytest.raises(DeviceError, match=r"/nowhere/python3 is no Python; edgetube needs Python 3\.10 or newer"):
            Device(sshd.address("/nowhere/python3"))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, r"^local://: there is no python3; edgetube needs Python 3\.10 or newer: install it there"),
            (
                'case "$1" in -V) echo Python 3.8.10;; *) exit 1;; esac',
                r"its python3 is Python 3\.8\.10; edgetube needs",
            ),
        ],
    )
    def test_none_or_an_old_one_in_the_path(
        self, text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for tool in ("sh", "echo"):
            (tmp_path / tool).symlink_to(str(shutil.which(tool)))
        if text is not None:
            script(tmp_path / "python3", text)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(DeviceError, match=message):
            Device("local://")

    def test_one_without_edgetube(self, sshd: Sshd, tmp_path: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
        python = tmp_path / "venv" / "bin" / "python"
        with pytest.raises(
            DeviceError, match=rf"^ssh://device: {python} has no edgetube; `make wheel` here makes edget"
        ):
            Device(sshd.address(str(python)))

    def test_one_with_another_edgetube(self, sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("edgetube.remote.device.__version__", "9.9")
        with pytest.raises(
            DeviceError, match=r"has edgetube \d.*, here it is 9\.9; `make wheel` .* -m pip install; or leave out"
        ):
            Device(sshd.address())


@pytest.mark.slow
class TestLine:
    def test_a_device_says_what_it_is(self, sshd: Sshd, tiny_bundle: Path) -> None:
        with Device(sshd.address()) as device:
            assert device.facts["machine"] == machine.describe()
            assert device.facts["versions"]["edgetube"] == edgetube.__version__
            place = Path(device.send(bundles.load(tiny_bundle)))
            assert bundles.load(place).files == bundles.load(tiny_bundle).files
            assert sshd.cache in place.parents

    def test_what_is_there_is_not_sent_again(self, sshd: Sshd, tmp_path: Path) -> None:
        file = tmp_path / "clip.bin"
        file.write_bytes(os.urandom(3 * store.PIECE))
        counts = []
        for _ in range(2):
            seen = list[int]()
            with Device(sshd.address()) as device:
                device.send_file(file, partial(_count, seen))
            counts.append(len(seen))
        assert counts == [3, 0]

    def test_a_login_that_prints(self, sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a shell's start-up file prints comes before what edgetube says."""
        loud = script(tmp_path / "ssh", f'echo Welcome; echo; echo "{{}}"; exec {sshd.command} "$@"')
        monkeypatch.setenv("EDGETUBE_SSH", str(loud))
        with Device(sshd.address()) as device:
            assert device.facts["machine"]

    def test_an_error_there_leaves_the_line_open(self, sshd: Sshd) -> None:
        with Device(sshd.address()) as device:
            with pytest.raises(BundleError, match=r"^ssh://device: /nowhere is not a bundle"):
                device.ask("open", path="/nowhere", threads=None)
            assert device.ask("facts") == device.facts

    @pytest.mark.parametrize(
        ("number", "message"),
        [
            (signal.SIGKILL, r"was ended there by signal 9, mostly because its memory was full; .* \(.*Killed\)$"),
            (signal.SIGSEGV, r"was ended there by signal 11, a fault in compiled code, .* \(.*Segmentation fault.*\)$"),
            (signal.SIGTERM, r"ended there with exit code 143: .*Terminated$"),
        ],
    )
    def test_a_program_that_dies_there(self, sshd: Sshd, number: int, message: str) -> None:
        with Device(sshd.address()) as device:
            os.kill(sshd.processes()[-1], number)
            for _ in range(2):
                with pytest.raises(DeviceError, match=rf"^ssh://device: edgetube {message}"):
                    device.ask("facts")
            device.end([1])

    def test_ctrl_c_while_a_stream_is_read(self, tiny_bundle: Path) -> None:
        """What is closed behind it says nothing of the line, which ends with it."""
        clip = demo.videos()["pan-left"]

        def watch() -> None:
            with commands.RemoteRuntime(tiny_bundle, LOCAL) as rt, rt.stream(clip) as found:
                next(found)
                rt._device._asker._lost = True
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            watch()

    def test_another_protocol(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stage, "PROTOCOL", 99)
        with pytest.raises(
            DeviceError, match=r"^local://: edgetube there has protocol \d of --on, here it is 99; `make"
        ):
            Device(LOCAL)

    def test_a_device_without_a_folder_to_write(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path / "file"))
        with pytest.raises(
            DeviceError, match=r"^local://: no folder there can be written \(.*File exists\); set EDGETUBE_"
        ):
            Device(LOCAL)

    @pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can be mounted by root only")
    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        try:
            monkeypatch.setenv("EDGETUBE_CACHE", str(disk))
            file = tmp_path / "clip.bin"
            file.write_bytes(os.urandom(6 << 20))
            message = r"^local://: its disk is full: 6 MB more are needed, \d MB are free in .*disk/device; free some"
            with Device(LOCAL) as device, pytest.raises(DeviceError, match=message):
                device.send_file(file)
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


def cut_client(sshd: Sshd, device: Device) -> None:
    assert device._process is not None
    device._process.kill()


def cut_server(sshd: Sshd, device: Device) -> None:
    """The process of the login, whose connection is closed with it."""
    (login, *_) = sshd.processes()
    os.kill(login, signal.SIGKILL)


CUTS = pytest.mark.parametrize("cut", [cut_client, cut_server])


@CUTS
@pytest.mark.slow
class TestCut:
    """The line breaks: one error here, and nothing stays there."""

    def test_while_nothing_is_asked(self, sshd: Sshd, cut: Callable[[Sshd, Device], None]) -> None:
        with Device(sshd.address()) as device:
            cut(sshd, device)
            with pytest.raises(DeviceError, match=r"^ssh://device: "):
                device.ask("facts")
            sshd.wait_quiet()

    def test_while_files_are_sent_and_they_go_on(
        self, sshd: Sshd, cut: Callable[[Sshd, Device], None], tmp_path: Path
    ) -> None:
        file = tmp_path / "clip.bin"
        file.write_bytes(os.urandom(8 * store.PIECE))
        with Device(sshd.address()) as device:

            def after(stage: str, done: int, total: int) -> None:
                if done >= 4:
                    cut(sshd, device)

            with pytest.raises(DeviceError, match=r"^ssh://device: "):
                device.send_file(file, after)
        sshd.wait_quiet()
        seen = list[int]()
        with Device(sshd.address()) as device:
            place = device.send_file(file, partial(_count, seen))
        assert 0 < len(seen) <= 4
        assert Path(place).read_bytes() == file.read_bytes()

    def test_while_bundles_are_timed(self, sshd: Sshd, cut: Callable[[Sshd, Device], None], tiny_bundle: Path) -> None:
        """Its processes, the candidates', end as well."""
        with Device(sshd.address()) as device:
            path, failed = device.send(bundles.load(tiny_bundle)), list[str]()

            def bench() -> None:
                try:
                    device.ask("bench", paths=[path], options={"seconds": 600.0, "starts": 1})
                except DeviceError as error:
                    failed.append(str(error))

            thread = threading.Thread(target=bench)
            thread.start()
            end = time.monotonic() + 60
            while len(sshd.processes()) < 4 and time.monotonic() < end:  # login, its shell or edgetube, a candidate
                time.sleep(0.1)
            cut(sshd, device)
            thread.join(90)
            assert len(failed) == 1
            assert failed[0].startswith("ssh://device: ")
            sshd.wait_quiet()


SILENT_S = 20.0
"""Seconds after which ssh here takes a silent line for cut: `ServerAliveInterval` times `ServerAliveCountMax`."""


def switch_off(distant: Sshd) -> None:
    assert distant.network is not None
    distant.network.down()


def pull(distant: Sshd) -> None:
    assert distant.network is not None
    distant.network.pull()


def switch_on(distant: Sshd) -> None:
    assert distant.network is not None
    distant.network.up()


def plug(distant: Sshd) -> None:
    assert distant.network is not None
    distant.network.plug()


CUT = r"^(error: )?ssh://device: the line was cut: run the command again, .*Timeout, server .* not responding"


@pytest.mark.long
class TestSilence:
    """A network that disappears without a word: nobody closes the connection, on neither side."""

    def ends(self, there: Sequence[int], cut: float) -> None:
        """All that ran there ends in time, and not because the line here was closed."""
        assert all_end(there, cut + stage.PATIENCE_S + SLACK_S)

    @pytest.mark.parametrize(("off", "on"), [(switch_off, switch_on), (pull, plug)])
    def test_while_nothing_is_asked(
        self, distant: Sshd, off: Callable[[Sshd], None], on: Callable[[Sshd], None]
    ) -> None:
        with Device(distant.address()) as device:
            there = distant.programs()
            assert there
            off(distant)
            cut = time.monotonic()
            with pytest.raises(DeviceError, match=CUT):
                device.ask("facts")
            assert time.monotonic() - cut < SILENT_S + SLACK_S
            self.ends(there, cut)
        on(distant)
        with Device(distant.address()) as device:
            assert device.facts["machine"] == machine.describe()

    def test_while_files_are_sent_and_they_go_on(self, distant: Sshd, tmp_path: Path) -> None:
        file, cuts, there = tmp_path / "clip.bin", list[float](), list[int]()
        file.write_bytes(os.urandom(8 * store.PIECE))

        def after(stage: str, done: int, total: int) -> None:
            if done >= 4 and not cuts:
                there.extend(distant.programs())
                switch_off(distant)
                cuts.append(time.monotonic())

        with Device(distant.address()) as device:
            with pytest.raises(DeviceError, match=CUT):
                device.send_file(file, after)
            assert time.monotonic() - cuts[0] < SILENT_S + SLACK_S
            self.ends(there, cuts[0])
        switch_on(distant)
        seen = list[int]()
        with Device(distant.address()) as device:
            place = device.send_file(file, partial(_count, seen))
        assert 0 < len(seen) <= 4
        assert Path(place).read_bytes() == file.read_bytes()

    def test_while_a_bundle_is_timed(
        self, distant: Sshd, tiny_bundle: Path, edgetube_cli: Callable[..., tuple[int, str, str]]
    ) -> None:
        """The whole command; its candidates there end as well."""
        cuts, there = list[float](), list[int]()

        def cut() -> None:
            end = time.monotonic() + 120
            while len(distant.programs()) < 3 and time.monotonic() < end:  # a shell, edgetube, a candidate
                time.sleep(0.1)
            there.extend(distant.programs())
            switch_off(distant)
            cuts.append(time.monotonic())

        thread = threading.Thread(target=cut)
        thread.start()
        given = ("bench", tiny_bundle, "--on", distant.address(), "--threads", 1, "--starts", 1, "--json")
        code, out, err = edgetube_cli(*given, "--seconds", 600)
        took = time.monotonic() - cuts[0]
        thread.join()
        assert (code, out) == (2, "")
        assert [line for line in err.splitlines() if re.search(CUT, line)] == err.strip().splitlines()[-1:]
        assert took < SILENT_S + SLACK_S
        assert len(there) >= 3
        self.ends(there, cuts[0])
        switch_on(distant)
        code, out, err = edgetube_cli(*given, "--seconds", 0.2)
        assert code == 0, err
        assert json.loads(out)["bundles"][0]["p50_ms"] > 0


@pytest.mark.slow
def test_the_local_line_is_the_same() -> None:
    with Device(LOCAL) as device:
        assert device.name == "local://"
        assert commands.about(device)["versions"]["edgetube"] == edgetube.__version__
