"""Which packages fit a device, and how they are collected for it."""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from edgetube.errors import DeviceError, DeviceWarning
from edgetube.progress import silent
from edgetube.remote import bootstrap
from edgetube.remote.device import Device

PI: dict[str, Any] = {
    "python": "3.11.2", "platform": "linux-aarch64", "machine": "aarch64", "system": "Linux", "pointer": 64,
    "libc": ["glibc", "2.36"], "macos": "",
}  # fmt: skip

PIP = """#!/bin/sh
echo "$@" >> {log}
while [ $# -gt 0 ]; do [ "$1" = --dest ] && dest=$2; shift; done
touch "$dest/numpy-2.0-cp311-cp311-manylinux_2_28_aarch64.whl" "$dest/{own}"
"""
"""In the place of Python: `pip download` that notes its options and finds one package."""


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of that program."""
    log, program = tmp_path / "log", tmp_path / "python"
    program.write_text(PIP.format(log=log, own=bootstrap.WHEEL))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(bootstrap, "_left_out", {})
    monkeypatch.setenv("EDGETUBE_CACHE", str(tmp_path / "cache"))
    return log


def refuse(extra: str) -> None:
    """Let that program find nothing for an extra."""
    program = Path(sys.executable)
    error = f"ERROR: No matching distribution found for {extra}"
    case = f'case "$*" in *{extra}*) echo "{error}" >&2; exit 1;; esac\n'
    program.write_text(program.read_text().replace("while", f"{case}while"))


def asked(log: Path) -> list[str]:
    """The extras of each call of that program."""
    return [line.rpartition(bootstrap.WHEEL)[2] for line in log.read_text().splitlines()]


def collect(device: dict[str, Any], extras: list[str]) -> dict[str, Path]:
    """Wheels of all that is asked for."""
    found = bootstrap.collect(device, extras, silent)
    assert found is not None
    assert bootstrap.left_out(device, extras) == {}
    return found


def test_tags_of_platforms() -> None:
    tags = bootstrap.platforms(PI)
    assert tags[0] == "manylinux_2_36_aarch64"
    assert {"manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"} <= set(tags)
    assert "manylinux_2_37_aarch64" not in tags
    assert bootstrap.platforms({**PI, "libc": ["", ""]})[0] == "musllinux_1_2_aarch64"
    mac = {**PI, "system": "Darwin", "machine": "arm64", "platform": "macosx-11.0-arm64", "macos": "14.5"}
    assert bootstrap.platforms(mac) == ["macosx_14_0_arm64"]
    intel = {**mac, "machine": "x86_64", "platform": "macosx-10.9-x86_64"}
    assert bootstrap.platforms({**intel, "macos": "10.15.7"}) == ["macosx_10_15_x86_64"]
    assert bootstrap.platforms({**intel, "macos": "10.16"}) == ["macosx_11_0_x86_64"]
    assert bootstrap.platforms({**intel, "macos": "26"}) == ["macosx_26_0_x86_64"]


@pytest.mark.parametrize("other", [{"pointer": 32}, {"system": "FreeBSD"}])
def test_machines_without_packages(other: dict[str, Any]) -> None:
    with pytest.raises(DeviceError, match=r"cannot be collected here; install edgetube there and give \?python="):
        bootstrap.platforms({**PI, **other})


def test_packages_are_collected_once(pip: Path) -> None:
    first = collect(PI, ["openvino"])
    assert list(first) == [bootstrap.WHEEL, "numpy-2.0-cp311-cp311-manylinux_2_28_aarch64.whl"]
    assert all(path.is_file() for path in first.values())
    assert first[bootstrap.WHEEL].read_bytes() == bootstrap.wheel()
    assert collect(PI, ["openvino"]) == first
    (options,) = pip.read_text().splitlines()
    assert "--python-version 3.11 " in options
    assert "--platform manylinux_2_28_aarch64" in options
    assert options.endswith(f"{bootstrap.WHEEL}[openvino]")
    collect({**PI, "python": "3.12.1"}, ["openvino"])
    assert len(pip.read_text().splitlines()) == 2


def test_a_package_that_is_gone_is_collected_again(pip: Path) -> None:
    found = collect(PI, [])
    found["numpy-2.0-cp311-cp311-manylinux_2_28_aarch64.whl"].unlink()
    assert collect(PI, []) == found
    assert all(path.is_file() for path in found.values())
    assert len(pip.read_text().splitlines()) == 2


def test_an_extra_that_cannot_be_had_has_a_reason(pip: Path) -> None:
    refuse("openvino")
    assert bootstrap.collect(PI, ["openvino"], silent) is None
    assert asked(pip) == ["[openvino]"]
    (reason,) = bootstrap.left_out(PI, ["litert", "openvino"]).values()
    assert "(Python 3.11, manylinux_2_36_aarch64) cannot be collected here: ERROR: No matching distribution" in reason
    assert bootstrap.left_out({**PI, "python": "3.12.1"}, ["openvino"]) == {}


def test_one_extra_that_cannot_be_had_leaves_the_others(pip: Path) -> None:
    refuse("coreai")
    assert bootstrap.collect(PI, ["coreai", "litert", "openvino"], silent) is None
    assert list(bootstrap.left_out(PI, ["coreai", "litert", "openvino"])) == ["coreai"]
    assert len(collect(PI, ["litert", "openvino"])) == 2
    assert asked(pip) == ["[coreai,litert,openvino]", "[coreai]", "[litert]", "[openvino]", "[litert,openvino]"]


def test_extras_that_cannot_be_had_together_are_all_left_out(pip: Path) -> None:
    refuse("litert,openvino")
    assert bootstrap.collect(PI, ["litert", "openvino"], silent) is None
    reasons = bootstrap.left_out(PI, ["litert", "openvino"])
    assert list(reasons) == ["litert", "openvino"]
    assert all("No matching distribution found for litert,openvino" in reason for reason in reasons.values())


def test_what_cannot_be_had_is_said_once_and_asked_for_once(pip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep opens three lines: the device has the environment without it, and is asked for that alone."""
    refuse("openvino")
    without, orders = bootstrap.environment(PI, []), list[str]()

    def ask(_: Device, do: str, key: str) -> str | None:
        assert do == "environment"
        orders.append(key)
        return "/environment/bin/python" if key == without else None

    monkeypatch.setattr(Device, "ask", ask)
    device = Device.__new__(Device)
    device.name, device._about = "ssh://pi", PI
    with pytest.warns(DeviceWarning, match=r"^ssh://pi: openvino is left out: its packages .*No matching distribution"):
        assert device._environment(["openvino"], silent) == "/environment/bin/python"
    assert orders == [bootstrap.environment(PI, ["openvino"]), without]
    for _ in range(2):
        assert device._environment(["openvino"], silent) == "/environment/bin/python"
    assert orders[2:] == [without, without]
    assert asked(pip) == ["[openvino]"]


def test_an_environment_is_known_by_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    first = bootstrap.environment(PI, [])
    assert bootstrap.environment({**PI, "executable": "/usr/bin/python3"}, []) == first
    others = [bootstrap.environment(PI, ["openvino"]), bootstrap.environment({**PI, "python": "3.12.1"}, [])]
    monkeypatch.setattr(bootstrap, "modules", lambda: {"edgetube/__init__.py": b""})
    assert len({first, *others, bootstrap.environment(PI, [])}) == 4


def test_the_wheel_has_its_metadata_where_a_package_was_built_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "edgetube.egg-info").mkdir()
    (folder / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: edgetube\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with zipfile.ZipFile(io.BytesIO(bootstrap.wheel())) as made:
        (name,) = (name for name in made.namelist() if name.endswith(".dist-info/METADATA"))
        assert made.read(name).decode() == (folder / "PKG-INFO").read_text()


def test_a_fault_of_pip_s_own_is_told(pip: Path) -> None:
    Path(sys.executable).write_text(
        "#!/bin/sh\nprintf 'ERROR: Exception:\\nTraceback\\nTypeError: no\\n' >&2; exit 2\n"
    )
    with pytest.raises(DeviceError, match=r"cannot be collected here: TypeError: no; connect"):
        bootstrap.collect(PI, [], silent)


def test_packages_that_cannot_be_had(pip: Path) -> None:
    Path(sys.executable).write_text("#!/bin/sh\necho 'ERROR: No matching distribution found for numpy' >&2; exit 1\n")
    with pytest.raises(DeviceError, match=r"\(Python 3\.11, manylinux_2_36_aarch64\) cannot be .*No matching distrib"):
        bootstrap.collect(PI, [], silent)


def test_extras_are_those_of_the_backends() -> None:
    assert bootstrap.extras_of(["openvino", "onnxruntime", "openvino"]) == ["openvino"]
