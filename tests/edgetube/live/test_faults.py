"""Servers that are killed, stall, stutter, jump, refuse and lie: what a live source makes of it."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import re
import signal
import threading
import traceback
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from edgetube import decoding, hwdecode
from edgetube.bench.studies.rtsp import filming
from edgetube.bench.studies.servers import (
    MJPEG,
    PACKET,
    Connection,
    Script,
    cut,
    film,
    grey,
    jpeg,
    part,
    serving,
    spliced,
    starts_frame,
)
from edgetube.errors import InputError
from edgetube.live import source as live_source
from edgetube.live.frame import Frame, State
from edgetube.live.source import Ended, FrameSource
from tests.edgetube.live.test_source import PATIENCE_S, drain, picture


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg waits for servers here until they are killed, which is after the source is closed."""
    monkeypatch.setattr(live_source, "JOIN_S", 0.1)


SECRETS = ("hunter2", "sesame", "me:")
FPS = 25


def take(source: FrameSource, count: int) -> list[Frame]:
    found: list[Frame] = []
    while len(found) < count:
        frame = source.read(PATIENCE_S)
        assert frame is not None, f"{source} gave {len(found)} frames, then none: {source.error}"
        found.append(frame)
    return found


def mjpeg(connection: Connection) -> None:
    """A camera without a clock: greys 0, 1, 2, ... for ever."""
    connection.begin(MJPEG)
    for i in range(10_000):
        connection.send(part(jpeg(i % 250)))
        connection.pause(0.01)


def mjpeg_of(count: int) -> Script:
    def script(connection: Connection) -> None:
        connection.begin(MJPEG)
        for i in range(count):
            connection.send(part(jpeg(i)))

    return script


def picture_of(value: int) -> Script:
    def script(connection: Connection) -> None:
        connection.begin("image/jpeg", len(jpeg(value)))
        connection.send(jpeg(value))

    return script


def paced(data: bytes, burst_s: float = 0.1) -> Script:
    """A camera that sends MPEG-TS of `FPS` key frames a second, several at once; then it says nothing more."""

    def script(connection: Connection) -> None:
        connection.begin("video/mp2t")
        pieces, step = cut(data), max(1, round(burst_s * FPS))
        for i in range(0, len(pieces), step):
            connection.send(b"".join(pieces[i : i + step]))
            connection.pause(burst_s / 10)  # faster than it was filmed
        connection.pause(PATIENCE_S)

    return script


def times(count: int, begin: float = 10.0) -> list[float]:
    return [begin + i / FPS for i in range(count)]


def reasons(frames: list[Frame]) -> list[str]:
    return [frame.restarted for frame in frames if frame.restarted]


# ------------------------------------------------------------------------------------------------------- lost and found


def test_a_server_that_is_killed_and_started_again_is_found_again() -> None:
    told: list[str] = []
    with serving(mjpeg) as server, FrameSource(server.url()) as source:
        lost = threading.Event()

        def tell(state: State, why: str) -> None:
            told.append(state)
            if state == "lost":
                lost.set()

        source.subscribe(tell)
        assert source.is_live
        assert source.policy == "latest"
        take(source, 5)
        server.kill()
        assert lost.wait(PATIENCE_S)
        assert "127.0.0.1" in str(source.error)
        while source.read(0):
            pass
        server.start()
        first = take(source, 1)[0]
        assert first.restarted == "a new connection"
        assert source.error is None
        after = take(source, 5)
        assert "a new connection" not in reasons(after)
        assert [frame.number for frame in after] == [first.number + 1 + i for i in range(5)]
    assert [state for state in told if state != "stalled"][-4:] == ["live", "lost", "live", "closed"]


def test_a_live_server_that_ends_politely_is_lost_and_not_at_its_end() -> None:
    with serving(mjpeg_of(4)) as server, FrameSource(server.url()) as source:
        frames = take(source, 8)
        assert reasons(frames) == ["a new connection"]
        assert server.requests >= 2


def test_a_camera_that_shows_one_picture_while_it_starts_again_is_still_live() -> None:
    answers = iter([mjpeg_of(4), picture_of(9), mjpeg_of(4)])

    def script(connection: Connection) -> None:
        next(answers, mjpeg)(connection)

    with serving(script) as server, FrameSource(server.url()) as source:
        assert [grey(frame.pixels) for frame in take(source, 9)] == [0, 1, 2, 3, 9, 0, 1, 2, 3]
        assert source.is_live


def test_without_reconnecting_a_lost_source_is_an_error() -> None:
    with serving(mjpeg_of(4)) as server, FrameSource(server.url(), reconnect=False) as source:
        take(source, 4)
        with pytest.raises(InputError, match="cannot be reached: is it on"):
            source.read(PATIENCE_S)
        assert server.requests == 1


def test_a_stall_is_told_and_nothing_is_made_up() -> None:
    data, stalled = film(times(40)), threading.Event()
    half = next(at for at in range(len(data) // 2 // PACKET * PACKET, len(data), PACKET) if starts_frame(data[at:]))

    def script(connection: Connection) -> None:
        connection.begin("video/mp2t")
        connection.send(data[:half])
        if not stalled.wait(PATIENCE_S):
            raise OSError("nobody noticed")
        connection.send(data[half:])
        connection.pause(PATIENCE_S)

    with serving(script) as server, FrameSource(server.url(), stall_after=0.2) as source:
        source.subscribe(lambda state, why: stalled.set() if state == "stalled" else None)
        frames = take(source, 38)
        assert [grey(frame.pixels) for frame in frames] == pytest.approx([16 + i for i in range(38)], abs=2)
        assert not reasons(frames)  # the camera's own clock went on without a gap
        assert source.ledger.account().dropped == {}


def test_a_server_that_stays_silent_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "TIMEOUT", 0.3)

    def script(connection: Connection) -> None:
        connection.begin(MJPEG)
        for i in range(4):
            connection.send(part(jpeg(i)))
        connection.pause(PATIENCE_S)

    with serving(script) as server, FrameSource(server.url(), stall_after=0.1) as source:
        told: list[str] = []
        source.subscribe(lambda state, why: told.append(f"{state}: {why}"))
        assert reasons(take(source, 9)) == ["a new connection"] * 2
        assert "stalled: no frame for 0.1 s" in told
        assert [line for line in told if line.startswith("lost: ") and "did not answer within 0.3 s" in line]


@pytest.mark.parametrize("burst_s", [0.04, 0.45])
def test_bursts_are_not_gaps(burst_s: float) -> None:
    with serving(paced(film(times(60)), burst_s)) as server, FrameSource(server.url(), capacity=100) as source:
        frames = take(source, 58)
        assert not reasons(frames)
        assert [frame.seconds for frame in frames] == pytest.approx([i / FPS for i in range(58)], abs=1e-3)


def test_a_clock_that_jumps_and_a_change_of_size() -> None:
    data = spliced(
        film(times(20, 4000.0)),
        film(times(20, 4000.8 + 3600)),
        film(times(20, 4001.6), first=40),
        film(times(20, 4002.4), size=(96, 64)),
    )
    with serving(paced(data)) as server, FrameSource(server.url(), capacity=100) as source:
        frames = take(source, 70)
        found = reasons(frames)
        assert [re.sub(r" by .*", "", why) for why in found] == [
            "its clock jumped ahead",
            "its clock jumped back",
            "its size changed from 64x48 to 96x64",
        ]
        assert all(0 <= b.seconds - a.seconds < 2 for a, b in itertools.pairwise(frames))


def test_a_clock_of_33_bits_begins_again_without_a_word() -> None:
    begin = (2**33 - 40 * 3600) / 90000  # 40 frames before it does
    with serving(paced(film(times(80, begin)))) as server, FrameSource(server.url(), capacity=100) as source:
        frames = take(source, 76)
        assert not reasons(frames)
        assert [frame.seconds for frame in frames] == pytest.approx([i / FPS for i in range(76)], abs=1e-3)


@pytest.mark.parametrize("before", [2**33 - 3600, 5 * 2**33 - 1, 100])
@pytest.mark.parametrize("step", [3600, -3600, 90_000 * 3600, -90_000 * 3600])
def test_the_ticks_of_a_broadcast_go_on_after_33_bits(before: int, step: int) -> None:
    wrapped = (before + step) % 2**33
    for form, expected in (("mpegts", before + step), ("mpeg", before + step), ("rtsp", wrapped)):
        reader = cast(decoding.Reader, SimpleNamespace(form=form))
        assert decoding.Reader._unwrapped(reader, wrapped, before) == expected
        assert decoding.Reader._unwrapped(reader, wrapped, None) == wrapped


def test_pictures_that_are_cut_off_are_counted_and_not_filled_with_grey() -> None:
    def script(connection: Connection) -> None:
        connection.begin(MJPEG)
        for i in range(1000):
            whole = jpeg(100, (320, 240))
            connection.send(part(whole[: len(whole) // 2] if i % 4 == 2 else whole))
            connection.pause(0.01)

    with serving(script) as server, FrameSource(server.url()) as source:
        frames = take(source, 20)
        assert {int(frame.pixels.min()) for frame in frames} == {int(frame.pixels.max()) for frame in frames}
        assert source.ledger.account().dropped["damaged"] >= 4


@pytest.mark.parametrize("hours", [1, -1])
def test_a_camera_of_rtsp_jumps_is_killed_and_comes_back(hours: float) -> None:
    with (
        filming("me:hunter2", jump=(20, 3600 * hours)) as camera,
        FrameSource(camera.url("me:hunter2@"), capacity=500) as source,
    ):
        found = reasons(take(source, 40))
        assert len(found) == 1
        # RTP counts 32 bits: FFmpeg takes a clock that was set back for one that is about to begin again.
        assert found[0].startswith("its clock jumped ahead by")
        camera.kill()
        camera.jump = None
        camera.start()
        while (frame := take(source, 1)[0]).restarted is None:
            pass
        assert frame.restarted == "a new connection"
        after = take(source, 20)
        assert not reasons(after)
        assert [b.seconds - a.seconds for a, b in pairwise(after[2:])] == pytest.approx([1 / FPS] * 17)


def test_segments_that_a_server_adds_to_are_live_and_those_of_a_whole_film_are_finite() -> None:
    segments = [film(times(FPS, 10.0 + k)) for k in range(4)]

    def script(connection: Connection) -> None:
        if connection.path.endswith(".ts"):
            data = segments[int(connection.path[1:-3])]
        else:
            listed = "".join(f"#EXTINF:1.0,\n{k}.ts\n" for k in range(4))
            end = "#EXT-X-ENDLIST\n" * connection.path.startswith("/whole")
            data = f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n{listed}{end}".encode()
        connection.begin("video/any", len(data))
        connection.send(data)

    with serving(script) as server:
        with FrameSource(server.url("whole.m3u8")) as source:
            frames = drain(source)
            assert len(frames) == 4 * FPS
            assert not source.is_live
        with FrameSource(server.url("growing.m3u8"), capacity=200) as source:
            frames = take(source, FPS)
            assert not reasons(frames)
            assert source.is_live


def test_a_camera_whose_frames_are_never_whole_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "UNDECODABLE", 0.2)

    def script(connection: Connection) -> None:
        connection.begin(MJPEG)
        connection.send(part(jpeg(5, (320, 240))))
        for _ in range(1000):
            connection.send(part(jpeg(5, (320, 240))[:-200]))
            connection.pause(0.01)

    with serving(script) as server, FrameSource(server.url(), reconnect=False) as source:
        take(source, 1)
        for _ in range(3):
            with pytest.raises(InputError, match=r"gave no frame that can be decoded for 0.2 s") as caught:
                source.read(PATIENCE_S)
        assert len(traceback.extract_tb(caught.value.__traceback__)) <= 3  # of this call, not of all calls
        assert caught.value.__context__ is None
        assert source.ledger.account().dropped["damaged"] >= 2


# --------------------------------------------------------------------------------------------------- finite and refused


@pytest.mark.parametrize("form", ["mpegts", "mp4"])
def test_a_finite_file_of_a_server_ends_like_a_file(form: str) -> None:
    data = film(times(50), form=form)

    def script(connection: Connection) -> None:
        connection.begin("video/any", len(data))
        connection.send(data)

    with serving(script) as server, FrameSource(server.url(), capacity=2) as source:
        frames = drain(source)
        assert len(frames) == 50
        assert not source.is_live
        assert source.policy == "all"
        assert source.ledger.account().dropped == {}


def test_a_finite_file_that_breaks_off_is_an_error() -> None:
    data = film(times(50))

    def script(connection: Connection) -> None:
        connection.begin("video/any", len(data))
        connection.send(data[: len(data) // 2])

    with serving(script) as server, FrameSource(server.url()) as source:
        with pytest.raises(InputError, match="cannot be reached"):
            drain(source)
        assert server.requests == 1


def test_a_wrong_password_is_one_clear_error_without_it() -> None:
    def script(connection: Connection) -> None:
        connection.begin("text/plain", 0, 401, WWW_Authenticate='Basic realm="camera"')

    with serving(script) as server:
        told: list[str] = []
        with FrameSource(server.url("live?key=sesame", user="me:hunter2@"), open_within=None) as source:
            source.subscribe(lambda state, why: told.append(why))
            with pytest.raises(
                InputError, match=r"refuses access .*401.*check the user name and the password"
            ) as caught:
                source.read(PATIENCE_S)
        asked = server.requests
        said = "".join(traceback.format_exception(caught.value)) + repr(source) + str(source.error) + " ".join(told)
        assert not [secret for secret in SECRETS if secret in said]
        assert caught.value.__context__ is None
        assert asked <= 2  # FFmpeg asks without a password first


def test_a_wrong_password_of_rtsp() -> None:
    with filming("me:sesame") as camera:
        with FrameSource(camera.url("me:hunter2@"), open_within=None) as source:
            with pytest.raises(InputError, match=r"127.0.0.1:\d+/live refuses access") as caught:
                source.read(PATIENCE_S)
            assert camera.requests <= 3
        assert not [secret for secret in SECRETS if secret in "".join(traceback.format_exception(caught.value))]


def test_a_protocol_that_is_unknown_is_an_error_at_once() -> None:
    said = r"smoke://\*\*\*@hill/signal cannot be used: this FFmpeg does not know"
    with FrameSource("smoke://me:hunter2@hill/signal") as source, pytest.raises(InputError, match=said):
        source.read(PATIENCE_S)


@pytest.mark.parametrize("url", ["rtsp://me:hunter2@127.0.0.1:9/s?key=sesame", "http://me:hunter2@127.0.0.1:9/v"])
def test_a_source_that_never_opens_is_given_up(url: str) -> None:
    with FrameSource(url, open_within=0) as source:
        with pytest.raises(InputError, match=r"127\.0\.0\.1:9/.* cannot be used: Connection refused") as caught:
            source.read(PATIENCE_S)
        said = "".join(traceback.format_exception(caught.value)) + source.name
        assert not [secret for secret in SECRETS if secret in said]


def test_a_source_that_is_not_there_yet_is_awaited() -> None:
    with serving(mjpeg) as server:
        server.kill()
        with FrameSource(server.url(), open_within=None) as source:
            while source.error is None:
                assert source.read(0.01) is None
            assert source.state == "connecting"
            server.start()
            assert take(source, 2)[0].restarted is None


# -------------------------------------------------------------------------------------------------------------- closing


def silent(connection: Connection) -> None:
    connection.pause(PATIENCE_S)


def half_open(connection: Connection) -> None:
    connection.begin("video/mp2t")
    connection.send(film(times(1))[:PACKET])
    connection.pause(PATIENCE_S)


@pytest.mark.parametrize("script", [silent, half_open, mjpeg])
@pytest.mark.parametrize("delay_s", [0.0, 0.1])
def test_it_can_be_closed_at_any_moment(script: Script, delay_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "TIMEOUT", 0.3)
    with serving(script) as server:
        source = FrameSource(server.url())
        threading.Event().wait(delay_s)
        closing = [threading.Thread(target=source.close) for _ in range(3)]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(PATIENCE_S)
        assert source.state == "closed"
        with pytest.raises(Ended):
            source.read(PATIENCE_S)
        for thread in source._threads:
            thread.join(PATIENCE_S)  # FFmpeg's time limit ends it
            assert not thread.is_alive()
        account = source.ledger.account()
        assert account.waiting == 0


def test_a_reader_that_waits_is_woken() -> None:
    with FrameSource.pushed("porch") as source:
        woken = threading.Event()

        def read() -> None:
            with pytest.raises(Ended):
                source.read()
            woken.set()

        thread = threading.Thread(target=read)
        thread.start()
        source.close()
        assert woken.wait(PATIENCE_S)
        thread.join()


def test_a_subscriber_may_close_the_source_and_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: raised.append(args.exc_value))
    with serving(mjpeg) as server, FrameSource(server.url()) as source:
        ended, inside = threading.Event(), list[str]()

        def rash(state: str, why: str) -> None:
            assert not inside  # else it is called within its own call
            inside.append(state)
            if state == "live":
                source.close()
            if state == "closed":
                ended.set()
            inside.clear()
            raise RuntimeError(state)

        source.subscribe(rash)
        if source.state == "live":  # it was there before its subscriber
            source.close()
        assert ended.wait(PATIENCE_S)
    assert {type(error) for error in raised} == {RuntimeError}


# ------------------------------------------------------------------------------------------------------------ processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_to_make_its_own() -> None:
    with FrameSource.pushed("porch") as source:
        source.push(picture())
        reading, writing = os.pipe()
        if not (child := os.fork()):  # pragma: no cover - another process
            said = []
            for call in (lambda: source.read(0), lambda: source.push(picture()), lambda: source.subscribe(print)):
                try:
                    call()
                except InputError as error:
                    said.append(str(error))
            source.close()
            os.write(writing, "\n".join(said).encode())
            os._exit(0)
        os.waitpid(child, 0)
        said = os.read(reading, 10_000).decode().split("\n")
        os.close(reading)
        os.close(writing)
        assert len(said) == 3
        assert {re.sub(".*forked and ", "", line)[:30] for line in said} == {"cannot be used in the child; m"}
        assert source.read(0) is not None


def count(source: FrameSource, answer: multiprocessing.SimpleQueue[int]) -> None:
    with source:
        answer.put(len(drain(source)))


@pytest.mark.slow
def test_a_spawned_process_opens_it_again(tmp_path: Path) -> None:
    path = tmp_path / "film.ts"
    path.write_bytes(film(times(20)))
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    with FrameSource(path, name="gate", fps=None) as source:
        process = context.Process(target=count, args=(source, answer))
        process.start()
        process.join()
        assert answer.get() == 20


def test_frames_of_this_process_are_not_sent_to_another() -> None:
    for source in (FrameSource.pushed("porch"), FrameSource([picture()])):
        with source, pytest.raises(InputError, match="cannot be sent to another: make it there"):
            pickle.dumps(source)


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for number in (1, 2, 9, 10, 11, 100):
        (tmp_path / f"f{number}.jpg").write_bytes(jpeg(number))
    with FrameSource(tmp_path, fps=10) as source:
        frames = drain(source)
        assert [grey(frame.pixels) for frame in frames] == pytest.approx([1, 2, 9, 10, 11, 100], abs=1)
        assert [frame.seconds for frame in frames] == pytest.approx([i / 10 for i in range(6)])
        assert not source.is_live


def test_a_picture_of_a_folder_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(7))
    (tmp_path / "b.jpg").write_bytes(jpeg(7, (320, 240))[:900])
    with FrameSource(tmp_path) as source:
        take(source, 1)
        with pytest.raises(InputError, match=r"b\.jpg is cut off or damaged"):
            source.read(PATIENCE_S)


def test_a_file_that_holds_a_picture_for_seconds_has_no_gap(tmp_path: Path) -> None:
    path = tmp_path / "held.mp4"
    path.write_bytes(film([0, 0.04, 5.0, 5.04, 9.0], form="mp4"))
    with FrameSource(path) as source:
        frames = drain(source)
        assert not reasons(frames)
        assert [frame.seconds for frame in frames] == pytest.approx([0, 0.04, 5.0, 5.04, 9.0], abs=1e-3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.mp4", "nowhere.mp4 is not a file"),
        (Path("nowhere.mp4"), "nowhere.mp4 is not a file"),
    ],
)
def test_what_cannot_be_opened_is_for_the_reader(source: str | Path, message: str) -> None:
    with FrameSource(source) as found, pytest.raises(InputError, match=message):
        found.read(PATIENCE_S)


@pytest.mark.parametrize("source", [None, True, 2.5, b"film.mp4"])
def test_what_is_no_source_is_refused_at_once(source: object) -> None:
    with pytest.raises(InputError, match="the source is"):
        FrameSource(source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "newest"}, "policy is 'newest'; expected latest or all"),
        ({"name": 5}, "name is 5; expected text"),
        ({"capacity": 0}, "capacity is 0; expected a whole number of frames >= 1"),
        ({"capacity": True}, "capacity is True"),
        ({"stall_after": 0}, "stall_after is 0; expected seconds > 0"),
        ({"stall_after": float("nan")}, "stall_after is nan"),
        ({"open_within": "soon"}, "open_within is 'soon'"),
        ({"decoder": "gpu"}, "decoder is 'gpu'; expected one of auto, cpu, nvdec, vaapi"),
        ({"fps": -1}, "fps is -1"),
    ],
)
def test_options_that_cannot_be_used_are_refused_at_once(options: dict[str, object], message: str) -> None:
    before = threading.active_count()
    with pytest.raises(InputError, match=re.escape(message)):
        FrameSource([picture()], **options)  # type: ignore[arg-type]
    assert threading.active_count() == before


def test_a_device_that_is_not_here_is_replaced_and_named() -> None:
    def frames() -> Iterator[np.ndarray]:
        yield picture()

    with serving(mjpeg) as server, FrameSource(server.url(), decoder="vaapi") as source:
        take(source, 1)
        if source.decoder == "cpu":
            assert len(source.fallbacks) == 1
            assert source.fallbacks[0].startswith("vaapi: ")
    with FrameSource(frames()) as source:
        assert source.decoder is None


def test_a_device_that_fails_while_it_decodes_is_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals = decoding.Reader.arrivals

    def choose(decoder: hwdecode.Decoder, live: bool) -> tuple[str, None, tuple[str, ...]]:
        return ("cpu", None, ()) if decoder == "cpu" else ("nvdec", None, ())

    def fail(reader: decoding.Reader) -> Iterator[Any]:
        if reader.decoder == "nvdec":
            raise decoding.DeviceFailed("nvdec: it failed (out of memory)")
        return arrivals(reader)

    monkeypatch.setattr(hwdecode, "choose", choose)
    monkeypatch.setattr(decoding.Reader, "arrivals", fail)
    with serving(mjpeg) as server, FrameSource(server.url(), open_within=0) as source:
        frames = take(source, 3)
        assert not reasons(frames)
        assert (source.decoder, source.fallbacks) == ("cpu", ("nvdec: it failed (out of memory)",))


@pytest.mark.parametrize("timeout", [float("nan"), "soon"])
def test_a_timeout_that_is_none_is_refused(timeout: Any) -> None:
    with FrameSource.pushed("porch") as source, pytest.raises(InputError, match="timeout is"):
        source.read(timeout)


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="this system has no SIGALRM")
def test_a_handler_of_a_signal_may_close_what_its_thread_reads() -> None:
    with FrameSource.pushed("porch") as source:
        before = signal.signal(signal.SIGALRM, lambda *_: source.close())
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Ended):
                source.read(PATIENCE_S)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
