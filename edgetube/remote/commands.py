"""The commands on devices: what `edgetube bench`, `sweep`, `doctor` and `run` do with `--on`."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from typing_extensions import Self

from edgetube import bundle as bundles
from edgetube.bench import latency
from edgetube.bundle import Bundle
from edgetube.contract import InputContract
from edgetube.errors import DeviceError, EdgetubeError, InputError
from edgetube.health import Check
from edgetube.progress import Progress, silent
from edgetube.remote import transport
from edgetube.remote.backend import RemoteArtifact
from edgetube.remote.device import Device
from edgetube.spec import Prediction

SCHEMA = 1

IN_TURNS = "a device times in turns, in one environment"
"""Why a device is named once."""


def device_of(address: str, found: Sequence[Bundle], progress: Progress = silent) -> Device:
    """A device with what the bundles need to run; a context manager."""
    return Device(address, [bundle.backend for bundle in found], progress)


def about(device: Device) -> dict[str, Any]:
    """`device` of a document: its address, and what it says of itself."""
    return {"name": device.name, **{key: device.facts[key] for key in ("machine", "versions")}}


# --------------------------------------------------------------------------------------------------------------- bench


def bench(
    given: Sequence[str], found: Sequence[Bundle], options: latency.Options, progress: Progress = silent
) -> dict[str, Any]:
    """The document of `edgetube bench` on one device, or of several at once: `{"schema", "devices": [document]}`.

    Of several devices, one that fails has its `device` and the `error` instead of measurements.

    Raises:
        InputError: an option that a device cannot take, no address of a device, or two of one device; nothing was timed
            then.
        DeviceError: the only device failed.
    """
    if options.reference:
        raise InputError("--reference times PyTorch on this machine; leave it out with --on")
    asked = addresses(given)
    names = [transport.parse(one).name for one in asked]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise InputError(f"--on names {', '.join(twice)} twice; {IN_TURNS}")
    if len(asked) == 1:
        with device_of(asked[0], found, progress) as device:
            return _timed(device, found, options, progress)
    return {"schema": SCHEMA, "devices": _each(dict(zip(names, asked, strict=True)), found, options, progress)}


def addresses(given: Sequence[str]) -> list[str]:
    """Addresses, where a file `NAME.toml` stands for those in it: tables with an `address`.

    Raises:
        InputError: the file is no such list.
        OSError: it cannot be read.
    """
    files = [text.endswith(".toml") and "://" not in text for text in given]
    return [one for text, file in zip(given, files, strict=True) for one in (_listed(Path(text)) if file else [text])]


def _listed(path: Path) -> list[str]:
    try:
        tables = _toml().loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no TOML: {error}") from error
    listed = [table.get("address") if isinstance(table, dict) else None for table in tables.values()]
    found = [one for one in listed if isinstance(one, str)]
    if not found or len(found) < len(listed):
        raise InputError(f'{path} lists no devices; expected tables like: [pi] with address = "ssh://pi@host"')
    return found


def _toml() -> ModuleType:
    """Python's reader of TOML.

    Raises:
        InputError: this Python has none.
    """
    try:
        return importlib.import_module("tomllib")
    except ModuleNotFoundError as error:
        raise InputError("a list of devices needs Python 3.11 or newer here; give --on for each device") from error


def _timed(device: Device, found: Sequence[Bundle], options: latency.Options, progress: Progress) -> dict[str, Any]:
    paths = [device.send(bundle, progress) for bundle in found]
    document: dict[str, Any] = device.ask("bench", progress=progress, paths=paths, options=asdict(options))
    here = {path: str(bundle.path) for path, bundle in zip(paths, found, strict=True)}
    for row in document["bundles"]:
        row["path"] = here[row["path"]]
    return {**document, "device": about(device)}


def _each(
    asked: Mapping[str, str], found: Sequence[Bundle], options: latency.Options, progress: Progress
) -> list[dict[str, Any]]:
    """The documents of several devices, name -> address, which are reached, and then time, at the same time.

    Raises:
        InputError: two addresses are of one device.
    """
    telling, lines = threading.Lock(), ExitStack()

    def teller(name: str) -> Progress:
        def tell(stage: str, done: int, total: int) -> None:
            with telling:
                progress(f"{name}: {stage}", done, total)

        return tell

    def opened(name: str) -> Device | str:
        try:
            return lines.enter_context(device_of(asked[name], found, teller(name)))
        except EdgetubeError as error:
            return str(error)

    def timed(name: str, device: Device | str) -> dict[str, Any]:
        try:
            if isinstance(device, str):
                raise DeviceError(device)
            with device:
                return _timed(device, found, options, teller(name))
        except EdgetubeError as error:
            return {"device": {"name": name}, "error": str(error)}

    with ThreadPoolExecutor(len(asked)) as pool, lines:  # lines are closed first, so that nobody waits for them
        devices = dict(zip(asked, pool.map(opened, asked), strict=True))
        _check_apart([device for device in devices.values() if isinstance(device, Device)])
        return list(pool.map(timed, devices.keys(), devices.values()))


def _check_apart(devices: Sequence[Device]) -> None:
    """Check that no two of them are one.

    Raises:
        InputError: two are.
    """
    known: dict[str, Device] = {}
    for device in devices:
        if (other := known.setdefault(device.facts["id"], device)) is not device:
            raise InputError(
                f"{other.name} and {device.name} are one device; {IN_TURNS}. Or the disk of one is a copy of the "
                "other's: then remove device/identity in edgetube's cache folder on one of them"
            )


def documents(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The documents of the devices that a document of `bench` has."""
    return list(document.get("devices", [document]))


def notes(document: Mapping[str, Any]) -> list[str]:
    """The notes on each device."""
    timed = [one for one in documents(document) if "error" not in one]
    return [f"{one['device']['name']}: {note}" for one in timed for note in latency.notes(one)]


def failed(document: Mapping[str, Any]) -> dict[str, str]:
    """Devices that failed, and why."""
    return {one["device"]["name"]: one["error"] for one in documents(document) if "error" in one}


# --------------------------------------------------------------------------------------------------------------- sweep


@dataclass(frozen=True)
class Place:
    """A device that times bundles and answers clips, see `edgetube.bench.sweep.Place`."""

    device: Device

    def measure(self, bundles: Sequence[Bundle], options: latency.Options, progress: Progress) -> dict[str, Any]:
        """The document of `edgetube bench` there; the device takes the turns of its candidates itself."""
        return _timed(self.device, bundles, options, progress)

    def artifact(self, bundle: Bundle) -> RemoteArtifact:
        """The model of a bundle that answers there."""
        return RemoteArtifact(bundle, self.device)

    def about(self) -> dict[str, Any]:
        """See `about`."""
        return about(self.device)


Reach = Callable[[Progress], AbstractContextManager[Place]]
"""Opens a device as a place."""


def reach(address: str, backends: Sequence[str], progress: Progress = silent) -> Reach:
    """What opens a device for a sweep, see `edgetube.bench.sweep.Reach`.

    The device is reached now, and made ready, so that it fails before the exports. Its line is closed meanwhile: they
    may take hours, and keep this process from saying that it is there.

    Args:
        backends: of all points.

    Raises:
        InputError: no such address.
        DeviceError: it cannot be reached, or cannot run edgetube.
    """
    with Device(address, backends, progress):
        pass

    @contextmanager
    def opened(progress: Progress) -> Iterator[Place]:
        with Device(address, backends, progress) as device:
            yield Place(device)

    return opened


# -------------------------------------------------------------------------------------------------------------- doctor


def doctor(address: str, path: Path, device: str | None, key: Path | None, progress: Progress = silent) -> list[Check]:
    """The checks of `edgetube doctor` on a device, after one that it is reached and runs edgetube.

    Raises:
        BundleError: the bundle is damaged here, so it is not sent.
        InputError: no such address.
    """
    found = bundles.load(path)
    try:
        with device_of(address, [found], progress) as there:
            checks = [Check("device", True, there.facts["machine"])]
            sent = None if key is None else there.send_file(key, progress)
            answered = there.ask("doctor", path=there.send(found, progress), device=device, key=sent)
            return [*checks, *(Check(**check) for check in answered)]
    except DeviceError as error:
        return [Check("device", False, str(error))]


# ----------------------------------------------------------------------------------------------------------------- run


class RemoteRuntime:
    """A bundle that answers on a device, as `edgetube.Runtime` does here; a context manager.

    Files are sent there. Cameras and URLs are those that the device sees.
    """

    def __init__(
        self, path: Path, address: str, threads: int | None = None, device: str | None = None,
        progress: Progress = silent,
    ) -> None:  # fmt: skip
        self.bundle = bundles.load(path)
        self._device = device_of(address, [self.bundle], progress)
        try:
            sent = self._device.send(self.bundle, progress)
            self._of: int = self._device.ask("runtime", path=sent, threads=threads, device=device)
        except BaseException:
            self._device.close()
            raise

    @property
    def contract(self) -> InputContract:
        """The model's input."""
        return self.bundle.contract

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names, in the order of the logits."""
        return self.bundle.labels

    def predict(self, source: Path, *, top_k: int = 5) -> Prediction:
        """Classify one clip of a file, see `edgetube.Runtime.predict`."""
        sent = self._device.send_file(source)
        found = Prediction.from_json(self._device.ask("predict", of=self._of, source=sent, top_k=top_k))
        return _from(source, found)

    @contextmanager
    def stream(
        self, source: Path | str | int, *, hop: str | int | None = None, top_k: int = 5, skip_still: bool = False
    ) -> Iterator[Iterator[Prediction]]:
        """Slide a window over a file, or a camera or URL of the device; see `edgetube.Runtime.stream`."""
        sent = self._device.send_file(source) if isinstance(source, Path) else source
        number = self._device.ask("stream", of=self._of, source=sent, hop=hop, top_k=top_k, skip_still=skip_still)
        try:
            yield self._predictions(number, source)
        finally:
            self._device.end([number])

    def _predictions(self, number: int, source: Path | str | int) -> Iterator[Prediction]:
        while (found := self._device.ask("next", of=number)) is not None:
            yield _from(source, Prediction.from_json(found))

    def close(self) -> None:
        """Close the line."""
        self._device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _from(source: Path | str | int, found: Prediction) -> Prediction:
    """A prediction about a file has its path here."""
    return replace(found, source=str(source)) if isinstance(source, Path) else found
