"""The server as a client sees it: over real connections."""

from __future__ import annotations

import http.client
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")
client = pytest.importorskip("websockets.sync.client", reason="the extra serve is not installed")

from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402

from edgetube.errors import BackendError, InputError  # noqa: E402
from edgetube.live.decisions import DecisionRule, Event  # noqa: E402
from edgetube.runtime import Runtime  # noqa: E402
from edgetube.serve import uploads  # noqa: E402
from edgetube.serve.limits import Limits  # noqa: E402
from edgetube.serve.server import Server  # noqa: E402
from edgetube.serve.service import Service  # noqa: E402
from tests.edgetube.serve.doubles import PATIENCE_S, Running, jpeg, running, until  # noqa: E402

TOKEN = "a-token-of-a-test-0123456789"


@pytest.fixture
def idle(rt: Runtime) -> Iterator[Running]:
    """A server without a source, with small limits."""
    limits = Limits(upload_bytes=200_000, frame_pixels=200_000, frame_bytes=50_000, uploads=1, sockets=1)
    with running(rt, limits=limits) as found:
        yield found


class TestFiles:
    def test_the_answer_is_that_of_the_runtime(self, idle: Running, rt: Runtime, clip: Path) -> None:
        found = idle.ask("/predict", "POST", clip.read_bytes())
        expected = json.loads(json.dumps(rt.predict(clip).to_json()))
        assert found.status == 200
        assert {**found.json, "latency_ms": 0} == {**expected, "latency_ms": 0, "source": "the file"}

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            (b"", "is empty"),
            (b"no video at all\n" * 50, "cannot be (decoded|used)"),
            (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "cannot be"),
            (b"ffconcat version 1.0\nfile /etc/passwd\n", "cannot be used"),
            (b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\x02" + b"\0" * 30, "animated WebP"),
        ],
        ids=["nothing", "text", "playlist", "list of files", "animation"],
    )
    def test_what_is_no_video_is_a_line_that_says_so(self, idle: Running, body: bytes, words: str) -> None:
        found = idle.ask("/predict", "POST", body)
        assert found.status == 400
        assert list(found.json) == ["error"]
        assert re.search(words, found.json["error"])
        assert "/tmp" not in found.json["error"]
        assert "passwd" not in found.json["error"]

    def test_films_that_are_cut_off_or_damaged(self, rt: Runtime, clip: Path, rng: np.random.Generator) -> None:
        whole = clip.read_bytes()
        front = len(whole) - whole.rindex(b"moov") + 100  # bytes of the index, which is at its end
        cut = [whole[:-n] for n in (1, 100, front // 2, front, len(whole) - 40)]
        for _ in range(15):
            damaged = np.frombuffer(whole, np.uint8).copy()
            damaged[rng.integers(len(whole), size=20)] = rng.integers(256, size=20)
            damaged[-rng.integers(1, front, 5)] = rng.integers(256, size=5)
            cut.append(damaged.tobytes())
        with running(rt, limits=Limits(requests=1000)) as found:
            answers = [found.ask("/predict", "POST", body) for body in cut]
        assert {answer.status for answer in answers} <= {200, 400}
        assert 400 in {answer.status for answer in answers}
        assert all(list(answer.json) == ["error"] for answer in answers if answer.status == 400)

    def test_a_film_without_what_decodes_it(self, idle: Running, clip: Path) -> None:
        found = idle.ask("/predict", "POST", clip.read_bytes().replace(b"avc1", b"xxxx").replace(b"avcC", b"xxxx"))
        assert (found.status, list(found.json)) == (400, ["error"])

    def test_a_picture_for_a_model_of_clips(self, idle: Running) -> None:
        assert "is a still image" in idle.ask("/predict", "POST", jpeg(7)).json["error"]

    def test_a_picture_of_too_many_pixels(self, idle: Running) -> None:
        found = idle.ask("/predict", "POST", jpeg(7, (600, 400)))
        assert (found.status, "600x400; at most 200000 pixels" in found.json["error"]) == (400, True)

    def test_bytes_are_counted_whatever_the_header_says(self, idle: Running) -> None:
        """Sent in chunks, without a length; the server answers before all of it has come."""
        sent = 0

        def pieces() -> Iterator[bytes]:
            nonlocal sent
            for _ in range(400):
                sent += 10_000
                yield b"x" * 10_000

        try:
            found = idle.ask("/predict", "POST", pieces())
        except (BrokenPipeError, ConnectionResetError):  # it did not even wait for the rest
            return
        assert found.status == 413
        assert "more than 200000 bytes" in found.json["error"]

    def test_a_stated_length_is_refused_before_anything_comes(self, idle: Running) -> None:
        with socket.create_connection(("127.0.0.1", idle.port), PATIENCE_S) as raw:
            raw.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 413")

    def test_a_form_is_told_what_to_send(self, idle: Running) -> None:
        found = idle.ask("/predict", "POST", b"--x", Content_Type="multipart/form-data; boundary=x")
        assert (found.status, "--data-binary" in found.json["error"]) == (415, True)

    def test_so_many_at_once(self, idle: Running, clip: Path) -> None:
        slow = socket.create_connection(("127.0.0.1", idle.port), PATIENCE_S)
        with slow:
            slow.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nx")
            until(lambda: not idle.service.uploads.take() or idle.service.uploads.give())
            assert idle.ask("/predict", "POST", clip.read_bytes()).status == 429
        until(lambda: idle.ask("/predict", "POST", clip.read_bytes()).status == 200)

    def test_what_comes_too_slowly_is_given_up(self, rt: Runtime) -> None:
        with (
            running(rt, limits=Limits(upload_seconds=0.3)) as found,
            socket.create_connection(("127.0.0.1", found.port), PATIENCE_S) as slow,
        ):
            slow.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nx")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")

    def test_a_long_film_is_refused_before_it_is_decoded(self, rt: Runtime, clip: Path) -> None:
        with running(rt, limits=Limits(decoded_pixels=100_000)) as found:
            answer = found.ask("/predict", "POST", clip.read_bytes())
        assert answer.status == 400
        assert "40 frames of 96x64" in answer.json["error"]

    def test_a_film_that_takes_too_long_is_given_up(self, rt: Runtime, clip: Path) -> None:
        with running(rt, limits=Limits(decode_seconds=1e-6)) as found:
            answer = found.ask("/predict", "POST", clip.read_bytes())
        assert (answer.status, "was not decoded within" in answer.json["error"]) == (400, True)

    def test_decoding_does_not_hold_up_the_end(self, rt: Runtime, clip: Path) -> None:
        reading, go, answers = threading.Event(), threading.Event(), []
        rt_predict = rt.predict

        def slow(file: Any, *arguments: Any, **options: Any) -> Any:
            reading.set()
            assert go.wait(PATIENCE_S)
            return rt_predict(file, *arguments, **options)

        with running(rt) as found, pytest.MonkeyPatch.context() as patch:
            patch.setattr(rt, "predict", slow)
            asking = threading.Thread(target=lambda: answers.append(found.ask("/predict", "POST", clip.read_bytes())))
            asking.start()
            assert reading.wait(PATIENCE_S)
            found.server.stop()
            go.set()
            found.thread.join(PATIENCE_S)
            asking.join()
        assert (answers[0].status, answers[0].json["error"]) == (503, "the server ends; send it again later")

    def test_a_file_that_names_others_is_not_opened(self, clip: Path, tmp_path: Path) -> None:
        from edgetube import address, decoding

        (tmp_path / "film.mp4").write_bytes(clip.read_bytes())
        listed = tmp_path / "file"
        listed.write_text("ffconcat version 1.0\nfile film.mp4\n")
        with decoding.opened(address.of_file(listed)) as reader:
            assert len(list(reader.frames())) == 40
        stranger = address.of_file(listed, address.Untrusted("the file", uploads.FORMATS, 10_000))
        with pytest.raises(InputError, match="the file cannot be used"), decoding.opened(stranger):
            pass

    def test_frames_that_grow_are_not_decoded(self, rt: Runtime, clip: Path, tmp_path: Path) -> None:
        """The header is not believed: the decoder has the limit, too."""
        from edgetube import address, decoding

        grown = tmp_path / "film.h264"
        grown.write_bytes(_h264(96, 64) + _h264(640, 480))
        with decoding.opened(address.of_file(grown)) as reader:
            assert {(frame.width, frame.height) for _, frame in reader.frames()} == {(96, 64), (640, 480)}
        sizes = set()
        stranger = address.of_file(grown, address.Untrusted("x", uploads.FORMATS, 96 * 64))
        with decoding.opened(stranger) as reader, suppress(InputError):
            for _, frame in reader.frames():
                sizes.add((frame.width, frame.height))
        assert sizes <= {(96, 64)}

    def test_nothing_is_left_behind(self, idle: Running, clip: Path, tmp_path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tempfile.tempdir", str(tmp_path))
            for body in (clip.read_bytes(), b"x", b"x" * 300_000):
                idle.ask("/predict", "POST", body)
        assert list(tmp_path.iterdir()) == []

    def test_an_answer_that_is_not_finite_is_the_servers_fault(self, rt: Runtime, clip: Path) -> None:
        with running(rt) as found, pytest.MonkeyPatch.context() as patch:
            patch.setattr(Runtime, "__call__", lambda self, clips: np.full((1, len(self.labels)), np.nan, np.float32))
            answer = found.ask("/predict", "POST", clip.read_bytes())
        assert (answer.status, answer.json["error"]) == (500, "the model's answer to the file is not finite")


class TestAccess:
    def test_the_host_has_to_be_this_machine(self, idle: Running) -> None:
        for host in ("evil.example", "evil.example:80", "localhost.evil.example", "", "[::1", "10.0.0.1"):
            assert (host, idle.ask("/api/sources", Host=host).status) == (host, 400)
        for host in ("localhost", "localhost:1", "127.0.0.1:80", "[::1]:80", "LOCALHOST"):
            assert (host, idle.ask("/api/sources", Host=host).status) == (host, 200)

    def test_pages_of_other_servers_are_refused(self, idle: Running) -> None:
        own = f"127.0.0.1:{idle.port}"
        assert idle.ask("/predict", "POST", b"x", Origin="http://evil.example").status == 403
        assert idle.ask("/predict", "POST", b"x", Origin="null").status == 403
        assert idle.ask("/predict", "POST", b"x", Origin=f"http://{own}").status == 400  # its own: no video
        with pytest.raises(InvalidStatus, match="403"):
            client.connect(f"ws://{own}/ws/frames", origin="http://evil.example")

    def test_there_is_no_cors(self, idle: Running) -> None:
        headers = idle.ask("/healthz", Origin=f"http://127.0.0.1:{idle.port}").headers
        assert not [key for key in headers if key.startswith("access-control")]

    def test_headers(self, idle: Running) -> None:
        for path in ("/", "/api/sources", "/nothing", "/metrics"):
            headers = idle.ask(path).headers
            assert headers["content-security-policy"].startswith("default-src 'none'")
            assert "unsafe" not in headers["content-security-policy"]
            assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
            assert "server" not in headers

    def test_a_token(self, rt: Runtime) -> None:
        with running(rt, token=TOKEN) as found:
            assert found.ask("/healthz").status == 200
            for path in (
                "/",
                "/api/sources",
                "/metrics",
                "/?token=wrong",
                f"/api/sources?token={TOKEN}",
                "/openapi.json",
            ):
                assert (path, found.ask(path).status) == (path, 401)
            assert found.ask("/metrics", Authorization=f"Bearer {TOKEN}").status == 200
            assert found.ask("/metrics", Authorization=f"Bearer {TOKEN}x").status == 401
            entered = found.ask(f"/?token={TOKEN}")
            assert (entered.status, entered.headers["location"]) == (303, "/")
            cookie, *flags = entered.headers["set-cookie"].split("; ")
            assert {"HttpOnly", "SameSite=Strict"} <= set(flags)
            assert found.ask("/", Cookie=cookie).status == 200
            assert found.ask("/", Cookie=cookie + "x").status == 401
            assert found.ask("/", Cookie='"=;,').status == 401
            with pytest.raises(InvalidStatus, match="403"):
                client.connect(f"ws://127.0.0.1:{found.port}/ws/frames")

    def test_other_hosts_get_a_token(self, rt: Runtime) -> None:
        with running(rt, host="0.0.0.0") as one, running(rt, host="0.0.0.0") as other:
            assert len(one.server.token) >= 40
            assert one.server.token != other.server.token
            assert one.server.token in one.server.url
            assert one.ask("/", Host="any.example").status == 401
            assert one.ask("/metrics", Host="any.example", Authorization=f"Bearer {one.server.token}").status == 200

    @pytest.mark.parametrize("token", ["short", "", "with blank 0123456789", "ümlaut-0123456789-0123"])
    def test_a_token_that_is_none(self, rt: Runtime, token: str) -> None:
        with Service(rt) as service, pytest.raises(InputError, match="the token has"):
            Server(service, "127.0.0.1", 0, token)

    def test_a_port_that_is_taken(self, rt: Runtime, idle: Running) -> None:
        with Service(rt) as service, pytest.raises(InputError, match=f"port {idle.port}.*in use.*another --port"):
            Server(service, "127.0.0.1", idle.port)

    @pytest.mark.slow
    @pytest.mark.parametrize("said", [b"", b"GET / HT", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HT"])
    def test_who_says_nothing_is_not_waited_for(
        self, rt: Runtime, monkeypatch: pytest.MonkeyPatch, said: bytes
    ) -> None:
        monkeypatch.setattr("edgetube.serve.patience.SILENT_S", 0.1)
        with running(rt) as found, socket.create_connection(("127.0.0.1", found.port), PATIENCE_S) as silent:
            silent.sendall(said)
            while silent.recv(10_000):
                pass

    @pytest.mark.slow
    def test_who_is_busy_is_waited_for(self, rt: Runtime, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("edgetube.serve.patience.SILENT_S", 0.02)
        whole = clip.read_bytes()

        def pieces() -> Iterator[bytes]:
            for at in range(0, len(whole), len(whole) // 5):
                yield whole[at : at + len(whole) // 5]
                time.sleep(0.05)

        with running(rt) as found, client.connect(f"ws://127.0.0.1:{found.port}/ws/frames") as open_socket:
            assert found.ask("/predict", "POST", pieces()).status == 200
            open_socket.send(b"x")
            assert "no JPEG" in json.loads(open_socket.recv(PATIENCE_S))["error"]

    def test_what_is_no_number_is_a_line_that_says_so(self, idle: Running) -> None:
        for path in ("/api/sources/x/picture", "/api/sources/0/picture?after=x"):
            found = idle.ask(path)
            assert (found.status, list(found.json)) == (400, ["error"])
            assert "is 'x'; expected a whole number" in found.json["error"]

    def test_so_many_requests_a_second(self, rt: Runtime) -> None:
        with running(rt, limits=Limits(requests=5)) as found:
            statuses = [found.ask("/healthz").status for _ in range(30)]
        assert statuses[:10] == [200] * 10
        assert 429 in statuses


class TestFrames:
    def connect(self, found: Running) -> Any:
        return client.connect(f"ws://127.0.0.1:{found.port}/ws/frames", max_size=None)

    @pytest.mark.slow
    def test_frames_are_answered(self, rt: Runtime) -> None:
        with running(rt, hop=1) as found, self.connect(found) as socket:
            stop = threading.Event()

            def film() -> None:
                for i in range(1000):
                    socket.send(jpeg(i % 250))
                    if stop.wait(0.03):
                        return

            sending = threading.Thread(target=film)
            sending.start()
            try:
                answers = [json.loads(socket.recv(PATIENCE_S)) for _ in range(3)]
            finally:
                stop.set()
                sending.join()
            assert {answer["source"] for answer in answers} == {"client 1"}
            assert [answer["end"] for answer in answers] == sorted(answer["end"] for answer in answers)
            assert len(answers[0]["logits"]) == len(rt.labels)
            (source,) = found.ask("/api/sources").json
            assert (source["name"], source["state"]) == ("client 1", "live")
            assert found.ask(f"/api/sources/{source['id']}/picture").body[:2] == b"\xff\xd8"
            socket.close()
            until(lambda: found.ask("/api/sources").json == [])

    def test_what_is_no_frame(self, idle: Running) -> None:
        with self.connect(idle) as socket:
            for message, words in (
                ("hello", "expected a JPEG frame in a binary message"),
                (b"hello", "is no JPEG"),
                (b"", "is no JPEG"),
                (jpeg(3)[:-10], "is cut off"),
                (jpeg(3, (600, 400)), "more than 200000 pixels"),
            ):
                socket.send(message)
                assert words in json.loads(socket.recv(PATIENCE_S))["error"]

    def test_a_message_that_is_too_large_ends_it(self, idle: Running) -> None:
        with self.connect(idle) as socket:
            socket.send(b"\xff\xd8" + b"x" * 60_000)
            with pytest.raises(ConnectionClosed) as closed:
                socket.recv(PATIENCE_S)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1009

    def test_so_many_clients(self, idle: Running) -> None:
        with self.connect(idle), self.connect(idle) as second:
            with pytest.raises(ConnectionClosed) as closed:
                second.recv(PATIENCE_S)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1013
        until(lambda: idle.service.cameras.names == ())

    def test_so_many_frames_a_second(self, rt: Runtime) -> None:
        with running(rt, limits=Limits(frames=5)) as found, self.connect(found) as socket:
            for _ in range(40):
                socket.send(jpeg(1))
            assert "more than 5 frames a second" in json.loads(socket.recv(PATIENCE_S))["error"]
            until(lambda: sum(found.service.counts.values()) == 40)
            assert 10 <= found.service.counts["frame", "done"] <= 20
            assert (
                found.service.cameras.statistics()["client 1"].account.captured == found.service.counts["frame", "done"]
            )

    def test_who_sends_nothing_is_not_waited_for(self, rt: Runtime) -> None:
        with (
            running(rt, limits=Limits(idle_seconds=0.2)) as found,
            self.connect(found) as socket,
            pytest.raises(ConnectionClosed, match="no frame for"),
        ):
            socket.recv(PATIENCE_S)

    def test_who_sends_nothing_that_can_be_used_is_sent_away(self, rt: Runtime) -> None:
        with running(rt, limits=Limits(frames=1000)) as found, self.connect(found) as socket:
            for _ in range(100):
                socket.send(b"x")
                assert "is no JPEG" in json.loads(socket.recv(PATIENCE_S))["error"]
            with pytest.raises(ConnectionClosed, match="100 frames in a row"):
                socket.recv(PATIENCE_S)


class TestSources:
    @pytest.mark.slow
    def test_a_file_plays_at_its_own_pace(self, rt: Runtime, clip: Path) -> None:
        with rt.stream(clip, hop=1) as stream:
            expected = list(stream)
        began = time.monotonic()
        events: list[tuple[str, str]] = []
        rule = DecisionRule(tau=0, enter=0.01, leave=0.005, minimum=0)

        def heard(name: str, event: Event) -> None:
            events.append((name, event.kind))

        with running(rt, clip, rule=rule, hop=1, on_event=heard) as found:

            def over() -> Any:
                (one,) = found.ask("/api/sources").json
                return one if one["count"] == len(expected) and not one["open"] else None

            source = until(over)
            assert 1.8 <= time.monotonic() - began <= 10  # 40 frames at 20 a second
            assert source["prediction"]["label"] == expected[-1].label
            account = source["statistics"]["account"]
            assert (account["captured"], account["waiting"], source["state"]) == (40, 0, "closed")
            assert account["used"] + sum(account["dropped"].values()) == 40
            assert {name for name, _ in events} == {"a film.mp4"}
            assert [kind for _, kind in events].count("opened") == [kind for _, kind in events].count("closed") > 0
            assert found.ask(f"/api/sources/{source['id']}/picture?after=39").status == 204
            picture = found.ask(f"/api/sources/{source['id']}/picture")
            assert (picture.status, picture.headers["x-frame"]) == (200, "39")
            assert found.ask("/api/sources/77/picture").status == 404
            assert found.ask("/api/sources/../../etc/passwd/picture").status == 404

    @pytest.mark.slow
    def test_events_bring_what_is_new(self, rt: Runtime, clip: Path) -> None:
        with running(rt, clip, hop=1) as found:
            connection = http.client.HTTPConnection("127.0.0.1", found.port, timeout=PATIENCE_S)
            connection.request("GET", "/api/events")
            answer = connection.getresponse()
            points: list[Any] = []
            source: dict[str, Any] = {}
            while not points or (source["state"], source["count"]) != ("closed", len(points)):
                line = answer.readline()
                if line.startswith(b"data:"):
                    (source,) = json.loads(line[5:])
                    points += source["points"]
            assert [point[0] for point in points] == sorted({point[0] for point in points})
            connection.close()

    def test_passwords_are_nowhere(self, rt: Runtime) -> None:
        url = "rtsp://me:secret@127.0.0.1:9/stream?key=qwertz"
        with running(rt, url, url) as found:
            until(lambda: all(s["statistics"]["error"] for s in found.ask("/api/sources").json))
            everything = b"".join(found.ask(path).body for path in ("/api/sources", "/metrics", "/"))
            assert len(found.ask("/api/sources").json) == 2
        assert b"127.0.0.1:9/stream" in everything
        for word in (b"secret", b"qwertz", b"me:secret"):
            assert word not in everything

    @pytest.mark.slow
    def test_nothing_is_computed_while_nothing_changes(self, rt: Runtime, tmp_path: Path) -> None:
        from edgetube import video

        still = video.write(tmp_path / "still.mp4", [np.full((64, 96, 3), 90, np.uint8)] * 40, 20.0)
        with running(rt, still, hop=1, skip_still=True) as found:
            source = until(lambda: [s for s in found.ask("/api/sources").json if s["count"] >= 5])[0]
            assert source["skipped"] >= source["count"] - 2

    @pytest.mark.slow
    def test_answers_that_are_not_finite_are_told_and_harm_nothing(self, rt: Runtime, clip: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Runtime, "__call__", lambda self, clips: np.full((1, len(self.labels)), np.nan, np.float32))
            with running(rt, clip, hop=1) as found:
                (source,) = until(lambda: [s for s in found.ask("/api/sources").json if s["problem"]])
        assert "not all finite" in source["problem"]
        assert source["prediction"] is None

    def test_a_file_that_is_not_there(self, rt: Runtime, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="there is no file or folder"):
            Service(rt, [tmp_path / "nothing.mp4"])

    def test_a_model_of_whole_videos_takes_files(
        self, rt: Runtime, clip: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = replace(rt.contract, fps=None, sampling="segments")
        monkeypatch.setattr(Runtime, "contract", property(lambda self: whole))
        with pytest.raises(InputError, match="whole video"):
            Service(rt, [clip])
        with running(rt) as found:
            assert found.ask("/predict", "POST", clip.read_bytes()).status == 200
            with (
                client.connect(f"ws://127.0.0.1:{found.port}/ws/frames") as socket,
                pytest.raises(ConnectionClosed, match="whole files only"),
            ):
                socket.recv(PATIENCE_S)


class TestTheEnd:
    def test_streams_of_events_and_sockets_do_not_hold_it_up(self, rt: Runtime, clip: Path) -> None:
        with running(rt, clip) as found:
            connection = http.client.HTTPConnection("127.0.0.1", found.port, timeout=PATIENCE_S)
            connection.request("GET", "/api/events")
            answer = connection.getresponse()
            with client.connect(f"ws://127.0.0.1:{found.port}/ws/frames"):
                began = time.monotonic()
                found.server.stop()
                found.thread.join(PATIENCE_S)
            found.service.close()
            assert time.monotonic() - began < 4
            answer.close()
            connection.close()

    @pytest.mark.slow
    def test_a_model_that_always_fails_ends_it(self, rt: Runtime, clip: Path) -> None:
        def fail(self: Runtime, clips: object) -> None:
            raise BackendError("the device is gone")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Runtime, "__call__", fail)
            with running(rt, clip, hop=1) as found:
                found.thread.join(PATIENCE_S)
                assert isinstance(found.error, BackendError)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_command(tiny_bundle: Path, clip: Path, name: str, heard_signals: None) -> None:
    import signal
    import subprocess
    import sys

    number = getattr(signal, name)

    line = [sys.executable, "-m", "edgetube", "serve", str(tiny_bundle), str(clip), "--port", "0", "--threads", "1"]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_unbuffered()
    ) as process:
        assert process.stdout is not None
        url = next(text for text in iter(process.stdout.readline, "") if text.startswith("http://")).split()[0]
        port = int(url.rstrip("/").rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        connection.request("GET", "/api/events")
        answer = connection.getresponse()
        assert answer.readline().startswith(b"event")
        began = time.monotonic()
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE_S)
        assert time.monotonic() - began < 5
        assert (process.returncode, err.strip()) == (128 + number, "error: interrupted")
        answer.close()
        connection.close()


def _h264(width: int, height: int) -> bytes:
    """A film without a container."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 10 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def _unbuffered() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONUNBUFFERED": "1"}


def test_the_command_says_what_is_missing(
    edgetube_cli: Callable[..., tuple[int, str, str]], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith(("edgetube.serve", "uvicorn"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = edgetube_cli("serve", tiny_bundle)
    assert code == 2
    assert "uvicorn is not installed; install it with: pip install" in err
    assert "[serve]" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--port", "99999"), "--port is 99999"),
        (("--host", "no.such.host.invalid"), "cannot listen at no.such.host.invalid"),
        (("--token", "short"), "the token has 5 characters"),
        (("--decide", "enter=2"), "enter"),
        (("--hop", "x"), "hop is 'x'"),
        (("nothing.mp4",), "there is no file or folder nothing.mp4"),
    ],
)
def test_the_command_refuses(
    edgetube_cli: Callable[..., tuple[int, str, str]], tiny_bundle: Path, arguments: tuple[str, ...], words: str
) -> None:
    code, _, err = edgetube_cli("serve", tiny_bundle, "--port", "0", *arguments)
    assert (code, words in err, err.count("\n")) == (2, True, 1)
