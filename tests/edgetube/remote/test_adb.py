"""Android's line: what is "there" runs on this machine, and no Android has a part in these tests.

In the place of adb's client is a script that says what AOSP's sources say; where the real client is installed, it is
tried, too, with `adbd.py` in the place of a device.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from edgetube import __version__, demo, wire
from edgetube.errors import DeviceError, InputError
from edgetube.remote import adb, portable, stage, store, transport
from edgetube.remote.adb import Adb
from edgetube.remote.device import PATIENCE_S, Device
from tests.edgetube.remote.adbd import Adbd
from tests.edgetube.remote.conftest import SLACK_S, Network, all_end, below, free_port, is_running

SCRIPTED = Path(__file__).with_name("scripted_adb.py")
PYTHON = f"?python={sys.executable}"
ROOT = Path(__file__).parents[3]

Phones = Callable[..., Path]


@pytest.fixture
def phones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Phones:
    """Makes `EDGETUBE_ADB` a scripted adb that sees devices; their shells are this machine's."""

    def see(**states: str | dict[str, Any]) -> Path:
        usual = {"state": "device", "shell": ["sh", "-c"], "root": str(tmp_path)}
        found = {name: usual | ({"state": it} if isinstance(it, str) else it) for name, it in states.items()}
        path = tmp_path / "phones.json"
        path.write_text(json.dumps(found))
        monkeypatch.setenv("EDGETUBE_ADB", shlex.join([sys.executable, str(SCRIPTED), str(path)]))
        monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path / "cache"))
        return path

    return see


class TestAddresses:
    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("adb://", Adb("adb://")), ("adb://R58MA1", Adb("adb://R58MA1", "R58MA1")),
            ("adb://10.0.0.7:5555", Adb("adb://10.0.0.7:5555", "10.0.0.7:5555")),
            ("adb://[fe80::1]:5555", Adb("adb://[fe80::1]:5555", "[fe80::1]:5555")),
            ("adb://emulator-5554?python=/P", Adb("adb://emulator-5554", "emulator-5554", "/P")),
            ("adb://adb-R5-x%20(2)._adb-tls-connect._tcp",
             Adb("adb://adb-R5-x%20(2)._adb-tls-connect._tcp", "adb-R5-x (2)._adb-tls-connect._tcp")),
        ],
    )  # fmt: skip
    def test_a_serial_number_is_as_adb_writes_it(self, text: str, found: Adb) -> None:
        assert transport.parse(text) == found

    @pytest.mark.parametrize(
        "text", ["adb://R58/x", "adb://-e", "adb://R58?key=1", "adb://R58?python=python3", "adb://u@R58", "adb://a%0Ab"]
    )
    def test_what_is_no_address(self, text: str) -> None:
        with pytest.raises(InputError, match=r"^the device is .*expected .*adb://\[SERIAL\]"):
            transport.parse(text)

    def test_the_command_is_the_user_s_adb(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGETUBE_ADB", "/opt/adb -P '5038'")
        assert Adb("adb://R58", "R58").command == ["/opt/adb", "-P", "5038", "-s", "R58"]
        monkeypatch.delenv("EDGETUBE_ADB")
        assert Adb("adb://").command == ["adb"]

    @pytest.mark.parametrize("command", ["adb 'x", " ", "''"])
    def test_a_command_that_cannot_be_read(self, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGETUBE_ADB", command)
        with pytest.raises(InputError, match="EDGETUBE_ADB cannot be read"):
            Device("adb://")


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("error: device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set\n", "it does not trust this"),
        ("adb: device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set\n", "it does not trust this"),
        ("adb.exe: more than one device/emulator", "adb sees several devices: choose one by adb://SERIAL; `adb dev"),
        ("* daemon started successfully\nerror: no devices/emulators found", "adb sees no device: plug one in"),
        ("error: cannot connect to daemon", "adb's server on this machine does not answer: `adb kill-server`"),
        (
            "error: insufficient permissions for device: user in plugdev group; are your udev rules wrong?",
            "this user may not open its USB port",
        ),
        ("error: closed", "try by hand: `adb -s R58 shell` (adb says: closed)"),
    ],
)
def test_what_adb_says_becomes_advice(said: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGETUBE_ADB", raising=False)
    reason = Adb("adb://R58", "R58").explain(1, said, begun=False)
    assert reason is not None
    assert reason.startswith(advice)


def test_what_is_not_adb_s_own_failure() -> None:
    reached = Adb("adb://R58", "R58")
    assert reached.explain(1, "Traceback\nOSError: error: device offline", begun=False) is None
    assert reached.explain(137, "error: device offline", begun=False) is None
    assert reached.explain(1, "error: device offline", begun=True) is None
    assert reached.explain(-15, "", begun=True) == "adb was ended here by signal 15: run the command again"


@pytest.mark.parametrize("code", [0, 255])
@pytest.mark.parametrize("begun", [False, True])
def test_a_device_that_is_lost(code: int, begun: bool) -> None:
    """Older clients say that all went well, newer ones that they know of no end."""
    said = "error: what a program there said" if begun else "WARNING: linker: x"
    reason = Adb("adb://R58", "R58").explain(code, said, begun=begun)
    assert reason is not None
    assert reason.startswith("the line was cut: see that it is plugged in")
    before = Adb("adb://R58", "R58").explain(code, "error: device offline", begun=False)
    assert before is not None
    assert before.startswith("adb sees it, and it does not answer")


class TestUnreachable:
    def test_no_adb(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGETUBE_ADB", "/nowhere/adb")
        with pytest.raises(
            DeviceError, match=r"^adb://: /nowhere/adb cannot be started \(No such file.*install Android"
        ):
            Device("adb://")

    @pytest.mark.parametrize(
        ("seen", "address", "message"),
        [
            ({}, "adb://", r"^adb://: adb sees no device: plug one in .*\(adb says: no devices/emulators found\)$"),
            ({"A": "device", "B": "device"}, "adb://", r"^adb://: adb sees several devices: choose one by adb://SERI"),
            ({"A": "device"}, "adb://B", r"^adb://B: no device has that serial number: .*\(adb says: device 'B' not"),
            ({"A": "unauthorized"}, "adb://A", r"^adb://A: it does not trust this machine yet: unlock its screen"),
            ({"A": "authorizing"}, "adb://A", r"^adb://A: it does not trust this machine yet: .*still authorizing\)$"),
            ({"A": "offline"}, "adb://A", r"^adb://A: adb sees it, and it does not answer: .*device offline\)$"),
            ({"A": {"old": True}}, "adb://A", r"^adb://A: its adb hands no bytes through, which needs Android 7"),
        ],
    )
    def test_each_reason_is_one_line(self, phones: Phones, seen: dict[str, Any], address: str, message: str) -> None:
        phones(**seen)
        with pytest.raises(DeviceError, match=message) as caught:
            Device(address)
        assert "\n" not in str(caught.value)


@pytest.fixture
def bare(phones: Phones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A phone whose shell finds no Python, and the path where one may be pushed to."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "echo"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    phones(A={"shell": ["/usr/bin/env", f"PATH={tools}", str(tools / "sh"), "-c"]})
    pushed = tmp_path / "a folder" / "python3"
    pushed.parent.mkdir()
    monkeypatch.setattr(Adb, "pythons", (str(pushed),))
    return pushed


def test_a_phone_has_no_python(bare: Path) -> None:
    message = (
        r"^adb://A: there is no python3; edgetube needs Python 3\.10 or newer: Android has none; .*remote\.portable"
    )
    with pytest.raises(DeviceError, match=message):
        Device("adb://A")


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("#!/bin/sh\n", 0o644, "Permission denied"),  # as with a disk that starts no programs
        ("#!/nowhere/ld-linux-aarch64.so.1\n", 0o755, "(not found|No such file)"),  # made for another place
        ("#!/bin/sh\n[ $1 = -V ] && echo Python 3.11.2 && exit\necho No module named encodings >&2\nexit 1\n", 0o755,
         "Python 3\\.11\\.2 No module named encodings"),
    ],
)  # fmt: skip
def test_a_python_that_was_pushed_and_does_not_start(bare: Path, text: str, mode: int, said: str) -> None:
    bare.write_text(text)
    bare.chmod(mode)
    message = (
        rf"^adb://A: {re.escape(str(bare))} is there and does not start \(.*{said}.*\); edgetube needs Python 3\.10 or "
        r"newer: Android has none; make one"
    )
    with pytest.raises(DeviceError, match=message):
        Device("adb://A")
    with pytest.raises(DeviceError, match=message.replace("Android has none; make one", "give the path of one")):
        Device(f"adb://A?python={quote(str(bare))}")


def test_a_python_that_was_pushed_is_an_old_one(bare: Path) -> None:
    bare.write_text("#!/bin/sh\n[ $1 = -V ] && echo Python 3.9.2 && exit\nexit 1\n")
    bare.chmod(0o755)
    with pytest.raises(DeviceError, match=rf"^adb://A: its {re.escape(str(bare))} is Python 3\.9\.2; edgetube needs"):
        Device("adb://A")


def test_the_python_that_was_pushed_is_found(bare: Path) -> None:
    bare.write_text("""#!/bin/sh\n[ "$1" = -c ] || echo 'edgetube-hello {"error": "I am the one that was pushed"}'\n""")
    bare.chmod(0o755)
    with pytest.raises(DeviceError, match=r"^adb://A: I am the one that was pushed$"):
        Device("adb://A")


def test_a_folder_that_cannot_be_written_has_advice_for_android(
    phones: Phones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can set variables for its shell."""
    phones(A="device")
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        DeviceError, match=rf"^adb://A: no folder there .*; remove {adb.FOLDER}/device there: "
    ) as caught:
        Device(f"adb://A{PYTHON}")
    assert "EDGETUBE_CACHE" not in str(caught.value)


def test_what_a_program_there_says_is_not_taken_for_adb_s_words(phones: Phones, tmp_path: Path) -> None:
    about = {"own": {"version": __version__, "code": ""}, "executable": "/python3"}
    there = tmp_path / "there"
    there.write_text(f"echo '{stage.HELLO} {json.dumps(about)}'\necho 'error: device offline' >&2\nexit 1\n")
    phones(A={"shell": ["sh", str(there)]})
    with pytest.raises(DeviceError, match=r"^adb://A: edgetube ended there with exit code 1: error: device offline$"):
        Device("adb://A?python=/python3")


def test_files_are_in_the_folder_of_android_s_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The shell there has no home; what its environment says goes first."""
    monkeypatch.setenv("EDGETUBE_ADB", "sh -c 'eval \"$3\"' adb")
    monkeypatch.delenv("EDGETUBE_CACHE", raising=False)
    monkeypatch.setenv("TMPDIR", "/mine")
    with (tmp_path / "words").open("wb") as words:
        process = Adb("adb://").run('echo "$EDGETUBE_CACHE $TMPDIR"', words.fileno())
        out, _ = process.communicate(b"")
    assert out.decode().split() == [adb.FOLDER, "/mine"]


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The real adb, with a server and keys of its own."""
    if shutil.which("adb") is None:
        pytest.skip("no adb here; on Debian: apt-get install adb")
    command = ["adb", "-P", str(free_port())]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", command[-1])
    monkeypatch.setenv("EDGETUBE_ADB", shlex.join(command))
    monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path / "cache"))
    subprocess.run([*command, "start-server"], check=True, capture_output=True)
    yield command
    subprocess.run([*command, "kill-server"], check=True, capture_output=True)


@pytest.mark.slow
class TestRealClient:
    """adb's own client and server; the device's side is `adbd.py`."""

    def connect(self, client: list[str], *features: str) -> tuple[Adbd, str]:
        there = Adbd(*features)
        subprocess.run([*client, "connect", f"127.0.0.1:{there.port}"], check=True, capture_output=True)
        return there, f"adb://127.0.0.1:{there.port}"

    def test_doctor_and_run(
        self, client: list[str], tiny_bundle: Path, edgetube_cli: Callable[..., tuple[int, str, str]]
    ) -> None:
        there, address = self.connect(client)
        code, out, err = edgetube_cli("doctor", tiny_bundle, "--on", f"adb://{PYTHON}", "--json")
        assert (code, [check["name"] for check in json.loads(out) if not check["ok"]]) == (0, []), err
        clip = demo.videos()["pan-left"]
        code, out, err = edgetube_cli("run", tiny_bundle, clip, "--on", f"{address}{PYTHON}", "--json")
        assert code == 0, err
        assert json.loads(out)["label"] == json.loads(edgetube_cli("run", tiny_bundle, clip, "--json")[1])["label"]
        for shell in there.shells:
            assert shell.wait(20) == 0
        there.unplug()

    def test_a_device_that_is_unplugged(self, client: list[str]) -> None:
        there, address = self.connect(client)
        with Device(f"{address}{PYTHON}") as device:
            there.unplug()
            with pytest.raises(DeviceError, match=rf"^{re.escape(address)}: the line was cut: see that it is plugged"):
                device.ask("facts")
        (shell,) = there.shells
        assert shell.wait(60) != 0

    def test_a_program_that_dies_there(self, client: list[str]) -> None:
        there, address = self.connect(client)
        with Device(f"{address}{PYTHON}") as device:
            (edgetube,) = children(there.shells[0].pid)
            os.kill(edgetube, signal.SIGKILL)
            with pytest.raises(
                DeviceError, match=rf"^{re.escape(address)}: edgetube was ended there by signal 9, most"
            ):
                device.ask("facts")
        there.unplug()

    def test_a_folder_is_pushed_to_its_place(
        self, client: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By the lines that `edgetube.remote.portable` prints; a second time, too."""
        there, _ = self.connect(client)
        python = tmp_path / "made" / "python"
        (python / "bin").mkdir(parents=True)
        (python / "bin" / "python3").write_text("a program")
        (python / "bin" / "python3").chmod(0o755)
        (python / "text").write_bytes(os.urandom(200_000))
        prefix = tmp_path / "data" / "tmp" / "python"
        monkeypatch.setattr(adb, "PYTHON", str(prefix))
        for _ in range(2):
            subprocess.run(["sh", "-ec", "\n".join(portable.push(python))], check=True, capture_output=True)
            found = [path.relative_to(prefix).as_posix() for path in prefix.rglob("*") if path.is_file()]
            assert sorted(found) == ["bin/python3", "text"]
        assert (prefix / "text").read_bytes() == (python / "text").read_bytes()
        assert os.access(prefix / "bin" / "python3", os.X_OK)
        there.unplug()

    def test_what_it_says_of_devices(self, client: list[str]) -> None:
        with pytest.raises(DeviceError, match=r"^adb://: adb sees no device: "):
            Device("adb://")
        with pytest.raises(DeviceError, match=r"^adb://R58: no device has that serial number: "):
            Device("adb://R58")
        old, address = self.connect(client, "cmd")
        with pytest.raises(DeviceError, match=rf"^{re.escape(address)}: its adb hands no bytes through"):
            Device(address)
        new, _ = self.connect(client)
        with pytest.raises(DeviceError, match=r"^adb://: adb sees several devices: "):
            Device("adb://")
        old.unplug()
        new.unplug()


def is_candidate(process: int) -> bool:
    """Whether it is one that is timed."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return b"edgetube.bench.worker" in Path(f"/proc/{process}/cmdline").read_bytes()
    return False


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


class TestSilence:
    """A device in the network that is gone without a word: adb goes on to wait for it, and so does its shell."""

    @pytest.mark.slow
    def test_a_client_that_stops(self, phones: Phones, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("edgetube.remote.device.PATIENCE_S", 15.0)
        phones(A="device")
        with Device(f"adb://A{PYTHON}") as device:
            assert device._process is not None
            there = below(device._process.pid)
            assert there
            os.kill(device._process.pid, signal.SIGSTOP)
            began = time.monotonic()
            for _ in range(2):
                with pytest.raises(
                    DeviceError, match=r"^adb://A: the line was cut, nothing came from there for 15 s: "
                ):
                    device.ask("facts")
            assert 15.0 <= time.monotonic() - began < 15.0 + SLACK_S
            assert not is_running(device._process.pid)
            assert all_end(there, time.monotonic() + 20)

    @pytest.fixture
    def distant(self, client: list[str], network: Network) -> Iterator[tuple[int, str]]:
        """A device's process at the other end of a cable, and its serial number; adb is connected to it."""
        command = [*network.inside, sys.executable, "-m", "tests.edgetube.remote.adbd", network.there]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            serial = f"{network.there}:{int(process.stdout.readline())}"
            subprocess.run([*client, "connect", serial], check=True, capture_output=True)
            yield process.pid, serial
            process.stdin.close()

    def connect_again(self, client: list[str], serial: str) -> None:
        for order in ("disconnect", "connect"):
            subprocess.run([*client, order, serial], check=True, capture_output=True)

    @pytest.mark.long
    def test_while_files_are_sent_and_they_go_on(
        self, distant: tuple[int, str], client: list[str], network: Network, tmp_path: Path
    ) -> None:
        process, serial = distant
        file, cuts, there = tmp_path / "clip.bin", list[float](), list[int]()
        file.write_bytes(os.urandom(16 * store.PIECE))

        def after(stage: str, done: int, total: int) -> None:
            if done >= 8 and not cuts:
                there.extend(below(process))
                network.down()
                cuts.append(time.monotonic())

        with Device(f"adb://{serial}{PYTHON}") as device:
            with pytest.raises(DeviceError, match=self.cut(serial)):
                device.send_file(file, after)
            took = time.monotonic() - cuts[0]
        assert PATIENCE_S - wire.BEAT_S - SLACK_S < took < PATIENCE_S + SLACK_S
        assert there
        assert not any(map(is_running, there))
        network.up()
        self.connect_again(client, serial)
        seen = list[int]()
        with Device(f"adb://{serial}{PYTHON}") as device:
            place = device.send_file(file, lambda stage, done, total: seen.append(done))
        assert 0 < len(seen) <= 8
        assert Path(place).read_bytes() == file.read_bytes()

    @pytest.mark.long
    def test_while_a_bundle_is_timed(
        self, distant: tuple[int, str], client: list[str], network: Network, tiny_bundle: Path,
        edgetube_cli: Callable[..., tuple[int, str, str]],
    ) -> None:  # fmt: skip
        """The whole command; what runs there has ended long before this side knows."""
        process, serial = distant
        cuts, there = list[float](), list[bool]()

        def cut() -> None:
            end = time.monotonic() + 120
            while not any(map(is_candidate, running := below(process))) and time.monotonic() < end:
                time.sleep(0.1)
            network.pull()
            cuts.append(time.monotonic())
            there.extend([len(running) >= 3, all_end(running, cuts[0] + stage.PATIENCE_S + SLACK_S)])

        thread = threading.Thread(target=cut)
        thread.start()
        given = ("bench", tiny_bundle, "--on", f"adb://{serial}{PYTHON}", "--threads", 1, "--starts", 1, "--json")
        code, out, err = edgetube_cli(*given, "--seconds", 600)
        took = time.monotonic() - cuts[0]
        thread.join()
        assert (code, out) == (2, "")
        said = rf"^error: {self.cut(serial)[1:]}"
        assert [line for line in err.splitlines() if re.search(said, line)] == err.strip().splitlines()[-1:]
        assert PATIENCE_S - wire.BEAT_S < took < PATIENCE_S + SLACK_S
        assert there == [True, True]
        network.plug()
        self.connect_again(client, serial)
        code, out, err = edgetube_cli(*given, "--seconds", 0.2)
        assert code == 0, err
        assert json.loads(out)["bundles"][0]["p50_ms"] > 0

    def cut(self, serial: str) -> str:
        return (
            rf"^adb://{re.escape(serial)}: the line was cut, nothing came from there for 120 s: .*; one in the network "
            r"has to be connected again: `adb -P \d+ disconnect`, `adb -P \d+ connect HOST:PORT`; then run the command"
        )


@pytest.mark.slow
class TestLine:
    def test_doctor_and_run(
        self, phones: Phones, tiny_bundle: Path, edgetube_cli: Callable[..., tuple[int, str, str]]
    ) -> None:
        phones(A="device")
        code, out, err = edgetube_cli("doctor", tiny_bundle, "--on", f"adb://{PYTHON}", "--json")
        assert (code, [check["name"] for check in json.loads(out) if not check["ok"]]) == (0, []), err
        clip = demo.videos()["pan-left"]
        code, out, err = edgetube_cli("run", tiny_bundle, clip, "--on", f"adb://A{PYTHON}", "--json")
        assert code == 0, err
        assert json.loads(out)["label"] == json.loads(edgetube_cli("run", tiny_bundle, clip, "--json")[1])["label"]

    def test_an_error_of_a_command(
        self, phones: Phones, tiny_bundle: Path, edgetube_cli: Callable[..., tuple[int, str, str]]
    ) -> None:
        phones(A="offline")
        code, out, err = edgetube_cli("run", tiny_bundle, "x.mp4", "--on", "adb://A")
        assert (code, out) == (2, "")
        assert "adb://A: adb sees it, and it does not answer" in err

    @pytest.mark.parametrize(
        ("number", "code", "message"),
        [
            (signal.SIGUSR1, 0, "the line was cut: see that it is plugged in, and run the command again"),
            (signal.SIGUSR1, 255, "the line was cut: see that it is plugged in, and run the command again"),
            (signal.SIGKILL, 0, "adb was ended here by signal 9"),
        ],
    )
    def test_a_line_that_is_cut(self, phones: Phones, number: int, code: int, message: str) -> None:
        """By the device, as when it is unplugged, and by the client here; what ran there ends."""
        phones(A={"lost": code})
        with Device(f"adb://A{PYTHON}") as device:
            assert device._process is not None
            started = children(device._process.pid)
            assert started
            os.kill(device._process.pid, number)
            for _ in range(2):
                with pytest.raises(DeviceError, match=rf"^adb://A: {message}"):
                    device.ask("facts")
            assert all_end(started, time.monotonic() + 20)

    def test_a_program_that_dies_there(self, phones: Phones) -> None:
        phones(A="device")
        with Device(f"adb://A{PYTHON}") as device:
            assert device._process is not None
            (shell,) = children(device._process.pid)
            (edgetube,) = children(shell)
            os.kill(edgetube, signal.SIGKILL)
            with pytest.raises(DeviceError, match=r"^adb://A: edgetube was ended there by signal 9, mostly because"):
                device.ask("facts")
