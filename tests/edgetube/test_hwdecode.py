"""Which device decodes, and why not another, on machines that have them or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import av
import pytest
from av.codec import hwaccel

from edgetube import hwdecode
from edgetube.errors import InputError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretend to be a Linux machine with these kinds in its FFmpeg, and these nodes in /dev."""

    def pretend(kinds: list[str], nodes: tuple[str, ...] = (), fails: str | None = None) -> None:
        class Device:
            def __init__(self, kind: str, allow_software_fallback: bool = True) -> None:
                self.kind, self.allow_software_fallback = kind, allow_software_fallback

            def create(self, codec: object) -> None:
                if fails is not None:
                    raise av.ExternalError(1, fails)

        hwdecode.lacks.cache_clear()
        monkeypatch.setattr("sys.platform", "linux")
        monkeypatch.setattr(hwaccel, "hwdevices_available", lambda: kinds)
        monkeypatch.setattr(hwaccel, "HWAccel", Device)
        monkeypatch.setattr(Path, "glob", lambda _, pattern: iter(n for n in nodes if Path(n).match(pattern)))
        monkeypatch.setattr(Path, "exists", lambda _: False)

    yield pretend
    hwdecode.lacks.cache_clear()


def test_the_cpu_is_what_is_asked_for(machine: Callable[..., None]) -> None:
    machine(["cuda", "vaapi"], ("nvidia0", "dri/renderD128"))
    assert hwdecode.choose("cpu", live=True) == ("cpu", None, ())
    assert hwdecode.choose("auto", live=False) == ("cpu", None, ())


def test_the_first_device_that_is_here_decodes_what_is_live(machine: Callable[..., None]) -> None:
    machine(["cuda", "vaapi"], ("nvidia0", "dri/renderD128"))
    name, device, reasons = hwdecode.choose("auto", live=True)
    assert (name, device.kind if device else None, reasons) == ("nvdec", "cuda", ())  # type: ignore[attr-defined]
    machine(["cuda", "vaapi"], ("dri/renderD128",))
    name, device, reasons = hwdecode.choose("auto", live=True)
    assert name == "vaapi"
    assert reasons == ("nvdec: there is no NVIDIA GPU here (/dev/nvidia[0-9]*)",)


def test_each_device_that_is_not_taken_has_its_reason(machine: Callable[..., None]) -> None:
    machine(["cuda"], ("nvidia0",), fails="driver too old")
    name, device, reasons = hwdecode.choose("auto", live=True)
    assert (name, device) == ("cpu", None)
    assert reasons[0].startswith("nvdec: the NVIDIA GPU cannot be opened: ")
    assert "driver too old" in reasons[0]
    assert reasons[1] == "vaapi: the FFmpeg of this PyAV is built without vaapi"
    assert hwdecode.choose("vaapi", live=False)[2] == reasons[1:]


def test_an_unknown_decoder_is_refused() -> None:
    with pytest.raises(InputError, match="decoder is 'cuda'; expected one of auto, cpu, nvdec, vaapi"):
        hwdecode.check("cuda")
