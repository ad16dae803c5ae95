"""`edgetube.Runtime` as a camera app uses it."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import edgetube
from edgetube import bundle as bundles
from edgetube import preprocess, processes, video
from edgetube.bench import latency
from edgetube.errors import BackendError, BundleError, InputError, ParityError
from edgetube.export import pipeline
from edgetube.model import checkpoints
from edgetube.model.checkpoints import Checkpoint
from edgetube.runtimes.torch import normalise


@pytest.fixture(scope="module")
def rt(tiny_bundle: Path) -> Iterator[edgetube.Runtime]:
    with edgetube.Runtime(tiny_bundle) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Checkpoint:
    return checkpoints.load(tiny_checkpoint)


@pytest.fixture
def clips(rng: np.random.Generator, rt: edgetube.Runtime) -> npt.NDArray[np.uint8]:
    return rng.integers(0, 256, (3, *rt.contract.shape), np.uint8)


def reference(model: Checkpoint, clips: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The definition, written out: PyTorch on normalised pixels."""
    with torch.no_grad():
        return model.model(normalise(torch.from_numpy(np.ascontiguousarray(clips)), model.contract)).numpy()


def test_logits_are_pytorchs(rt: edgetube.Runtime, model: Checkpoint, clips: npt.NDArray[np.uint8]) -> None:
    np.testing.assert_allclose(rt(clips), reference(model, clips), atol=1e-5)
    assert rt(clips).dtype == np.float32


@pytest.mark.parametrize("view", ["reversed", "transposed", "strided"])
def test_any_strides(rt: edgetube.Runtime, model: Checkpoint, clips: npt.NDArray[np.uint8], view: str) -> None:
    if view == "reversed":
        odd = clips[:, ::-1, :, ::-1]
    elif view == "transposed":
        odd = np.ascontiguousarray(clips.transpose(0, 1, 4, 2, 3)).transpose(0, 1, 3, 4, 2)
    else:
        odd = clips.repeat(2, axis=2)[:, :, ::2]
    assert not odd.flags.c_contiguous
    np.testing.assert_allclose(rt(odd), reference(model, odd), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:, :4], r"\(3, 4, 32, 48, 3\); expected .*\(8, 32, 48, 3\)"),
        (lambda c: c.astype(np.float32), "float32"),
        (lambda c: c[0, 0], "expected"),
        (lambda c: c[..., :2], "expected"),
    ],
)
def test_wrong_shape_or_dtype_says_given_and_expected(
    rt: edgetube.Runtime, clips: npt.NDArray[np.uint8], change: Callable[..., Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        rt(change(clips))


def test_prediction_is_the_softmax_of_the_logits(
    rt: edgetube.Runtime, model: Checkpoint, clips: npt.NDArray[np.uint8]
) -> None:
    prediction = rt.predict(clips[0], top_k=3)
    expected = torch.from_numpy(reference(model, clips[:1])[0]).softmax(0)
    best = expected.argsort(descending=True)[:3]
    assert list(prediction.scores) == [rt.labels[i] for i in best]
    assert prediction.label == rt.labels[best[0]]
    np.testing.assert_allclose(list(prediction.scores.values()), expected[best], atol=1e-5)
    assert len(prediction.logits) == len(rt.labels)
    assert prediction.latency_ms > 0


def test_predict_preprocesses_frames_of_any_size(rt: edgetube.Runtime, rng: np.random.Generator) -> None:
    frames = rng.integers(0, 256, (20, 90, 70, 3), np.uint8)
    prepared = preprocess.prepare(frames, rt.contract, 30.0)
    assert rt.predict(frames, fps=30.0).logits == pytest.approx(rt(prepared[None])[0].tolist(), abs=1e-6)


def test_a_stream_that_is_refused_leaves_nothing_running(tiny_bundle: Path) -> None:
    before = set(threading.enumerate())
    picture = np.zeros((16, 16, 3), np.uint8)
    with edgetube.Runtime(tiny_bundle) as rt:
        for options in ({"skip_still": 0}, {"skip_still": "4"}, {"fps": 0}, {"fps": "30"}, {"hop": 0}):
            with pytest.raises(InputError):
                rt.stream(iter([picture]), **options)
        with edgetube.FrameSource([picture]) as source, pytest.raises(InputError, match="its own clock"):
            rt.stream(source, fps=5)
    assert set(threading.enumerate()) <= before


def test_a_model_of_segments_takes_whole_files_and_no_stream(tiny_bundle: Path, tmp_path: Path) -> None:
    found = bundles.load(tiny_bundle)
    segments = replace(found, contract=replace(found.contract, fps=None, sampling="segments"))
    path = video.write(tmp_path / "a.mp4", (np.full((40, 60, 3), 5 * i, np.uint8) for i in range(48)), 20.0)
    with edgetube.Runtime(segments, threads=1) as rt:
        assert rt.predict(path).start == pytest.approx(3 / 20)
        for source in (0, path, "rtsp://camera", [np.zeros((40, 60, 3), np.uint8)]):
            with pytest.raises(InputError, match="samples 8 segments of a whole video; no window of a stream"):
                rt.stream(source)
        with pytest.raises(InputError, match="leave start out"):
            rt.predict(path, start=1.0)
        with pytest.raises(InputError, match="no window of a stream"):
            latency.measure([segments], latency.Options(camera_fps=30.0))


def test_a_hop_of_a_strided_model_counts_its_own_frames(tiny_bundle: Path, tmp_path: Path) -> None:
    found = bundles.load(tiny_bundle)
    strided = replace(found, contract=replace(found.contract, fps=None, sampling="stride", stride=3))
    path = video.write(tmp_path / "a.mp4", (np.full((40, 60, 3), 4 * i, np.uint8) for i in range(60)), 20.0)
    with edgetube.Runtime(strided, threads=1) as rt:
        starts = [p.start for p in rt.stream(path, hop=4)]
        assert starts == pytest.approx([0.0, 0.6, 1.2, 1.8])
        again = [rt.predict(path, start=start).logits for start in starts]
        np.testing.assert_array_equal([p.logits for p in rt.stream(path, hop=4)], again)


def test_file_and_array_answer_the_same(rt: edgetube.Runtime, tmp_path: Path, rng: np.random.Generator) -> None:
    still = rng.integers(0, 256, (6, 8, 3), np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    frames = [np.roll(still, 3 * i, axis=1) for i in range(24)]
    path = video.write(tmp_path / "clip.mp4", iter(frames), 20.0)
    clip = video.load(path, rt.contract)
    prediction = rt.predict(path)
    assert prediction.logits == pytest.approx(rt(clip.frames[None])[0].tolist(), abs=1e-6)
    assert prediction.start is not None
    assert prediction.end is not None
    assert rt.contract.fps is not None
    assert prediction.end - prediction.start == pytest.approx(rt.contract.frames / rt.contract.fps, abs=0.1)


def test_threads_share_one_runtime(rt: edgetube.Runtime, clips: npt.NDArray[np.uint8]) -> None:
    expected = rt(clips)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: rt(clips), range(16)):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("threads", "calls"), [(None, 1), (2, 4), (3, 2), (16, 1)])
def test_calls_at_once_share_the_cores(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, threads: int | None, calls: int
) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 8)
    with edgetube.Runtime(tiny_bundle, threads=threads) as runtime:
        assert runtime.parallel_calls == calls


def test_closed_runtime_says_so(tiny_bundle: Path, clips: npt.NDArray[np.uint8]) -> None:
    runtime = edgetube.Runtime(tiny_bundle, threads=1)
    runtime.close()
    runtime.close()
    with pytest.raises(BackendError, match="closed"):
        runtime(clips)


def test_bad_options_are_refused(tiny_bundle: Path, rt: edgetube.Runtime, clips: npt.NDArray[np.uint8]) -> None:
    with pytest.raises(InputError, match="threads is 0"):
        edgetube.Runtime(tiny_bundle, threads=0)
    with pytest.raises(InputError, match="no device is called 'abacus'"):
        edgetube.Runtime(tiny_bundle, device="abacus")
    with pytest.raises(BackendError, match="not built for cuda"):
        edgetube.Runtime(tiny_bundle, device="cuda")
    with pytest.raises(InputError, match="top_k is 0"):
        rt.predict(clips[0], top_k=0)
    with pytest.raises(InputError, match=r"stream\(0\)"):
        rt.predict(0)


def test_a_tampered_bundle_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    data = bytearray((copy / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx is not the file that was proven"):
        edgetube.Runtime(copy)


def test_an_artifact_that_is_none_is_the_vendors_refusal_in_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    (copy / "model.onnx").write_bytes(b"this is no graph")
    with pytest.raises(BackendError, match=r"ONNX Runtime .*cannot open .*model\.onnx") as caught:
        edgetube.Runtime(copy, verify=False)
    assert "\n" not in str(caught.value)


def test_golden_clips(rt: edgetube.Runtime, tiny_bundle: Path, tmp_path: Path) -> None:
    """5e-4 off is more than float32 may be; older bundles keep their bound."""
    assert rt.check() < 1e-4
    frames, logits = rt.bundle.golden()
    assert len(frames) == 6
    assert rt.bundle.parity["golden"]["min_sqnr"] == 80.0
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    bundle = replace(rt.bundle, path=copy)
    bundles.save_golden(bundle, frames, logits * np.float32(1.0005))
    with edgetube.Runtime(copy, verify=False) as other, pytest.raises(ParityError, match=r"SQNR of 66\.\d dB here"):
        other.check()
    older = replace(bundle, parity={"max_abs_error": 1e-6})
    np.savez(copy / "golden.npz", frames=frames[0], logits=logits[0] + 0.1)
    bundles.seal(older)
    with edgetube.Runtime(copy, verify=False) as other, pytest.raises(ParityError, match=r"off by 0\.1 here"):
        other.check()


def test_stream_slides_a_window(rt: edgetube.Runtime, rng: np.random.Generator) -> None:
    frames = rng.integers(0, 256, (14, 32, 48, 3), np.uint8)
    found = list(rt.stream(iter(frames), hop=3))
    assert len(found) == 3
    for i, prediction in enumerate(found):
        assert prediction.logits == pytest.approx(rt(frames[None, 3 * i : 3 * i + 8])[0].tolist(), abs=1e-6)
        assert prediction.start == pytest.approx(0.3 * i)
        assert prediction.end == pytest.approx(0.3 * i + 0.8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps is 0; expected frames per second"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": True}, "fps is True"),
        ({"top_k": 0}, "top_k is 0; expected >= 1"),
        ({"top_k": 1.5}, "top_k is 1.5; expected a whole number"),
    ],
)
def test_stream_and_predict_refuse_the_same_options(
    rt: edgetube.Runtime, clips: np.ndarray, options: dict[str, Any], message: str
) -> None:
    """At the call: a stream that has begun is too late."""
    with pytest.raises(InputError, match=message):
        rt.predict(clips[0], **options)
    with pytest.raises(InputError, match=message):
        rt.stream(iter(clips[0]), **options)
    with pytest.raises(InputError, match="hop is 0"):
        rt.stream(iter(clips[0]), hop=0)


def test_a_stream_repeats_the_answer_to_a_still_picture(rt: edgetube.Runtime, rng: np.random.Generator) -> None:
    picture, other = rng.integers(0, 256, (2, 32, 48, 3), np.uint8)
    found = list(rt.stream([picture] * 14 + [other] * 4, hop=2, skip_still=True))
    # The tubes of this model read frames 0 to 5 of a clip: what is new in the last two changes no answer.
    assert [p.skipped for p in found] == [False, True, True, True, True, False]
    assert {p.logits for p in found[:5]} == {found[0].logits}
    np.testing.assert_array_equal(found[0].logits, rt(np.stack([picture] * 6 + [other] * 2)[None])[0])
    np.testing.assert_array_equal(found[5].logits, rt(np.stack([picture] * 4 + [other] * 4)[None])[0])
    assert not any(p.skipped for p in rt.stream([picture] * 14, hop=2))
    with pytest.raises(InputError, match="skip_still"):
        rt.stream([picture], skip_still=0.0)


def test_stream_copies_what_it_is_given(rt: edgetube.Runtime, rng: np.random.Generator) -> None:
    frames = rng.integers(0, 256, (20, 32, 48, 3), np.uint8)

    def camera() -> Iterator[np.ndarray]:
        buffer = np.empty_like(frames[0])
        for frame in frames:
            buffer[...] = frame
            yield buffer

    reused, fresh = list(rt.stream(camera())), list(rt.stream(iter(frames)))
    assert [p.logits for p in reused] == [p.logits for p in fresh]
    assert len({p.logits for p in fresh}) == len(fresh) == 7


def test_batches_of_another_size_run_in_pieces(
    tiny_checkpoint: Path, tmp_path: Path, clips: npt.NDArray[np.uint8], rt: edgetube.Runtime
) -> None:
    options = pipeline.Options(batch=2, lowering="gather")
    batched = pipeline.export_model("onnx-fp32", tiny_checkpoint, tmp_path, options)
    with edgetube.Runtime(batched) as two:
        np.testing.assert_allclose(two(clips), rt(clips), atol=1e-5)


def test_the_image_model_takes_images(
    tiny_checkpoint: Path, tmp_path: Path, rng: np.random.Generator, model: Checkpoint
) -> None:
    options = pipeline.Options(image=True, lowering="gather")
    bundle = pipeline.export_model("onnx-fp32", tiny_checkpoint, tmp_path, options)
    image = rng.integers(0, 256, (32, 48, 3), np.uint8)
    with edgetube.Runtime(bundle.path) as image_rt:
        assert image_rt.predict(image).logits == pytest.approx(
            reference(model, image[None, None])[0].tolist(), abs=1e-5
        )


class TestLifecycle:
    def test_it_does_not_move_with_the_current_folder(
        self, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clips: np.ndarray
    ) -> None:
        shutil.copytree(tiny_bundle, tmp_path / "b")
        monkeypatch.chdir(tmp_path)
        with edgetube.Runtime("b") as runtime:
            monkeypatch.chdir("/")
            assert runtime.check() < 1e-4
            assert runtime.bundle.path == tmp_path / "b"
            with pickle.loads(pickle.dumps(runtime)) as copy:
                np.testing.assert_array_equal(copy(clips), runtime(clips))

    def test_pickled_it_is_its_path_and_options(self, tiny_bundle: Path, clips: np.ndarray) -> None:
        with edgetube.Runtime(tiny_bundle, threads=1, device="cpu") as runtime:
            stored = pickle.dumps(runtime)
            assert len(stored) < 1000
            with pickle.loads(stored) as copy:
                assert copy.describe() == runtime.describe()
                assert copy.describe()["threads"] == 1
            np.testing.assert_array_equal(runtime(clips), runtime(clips))

    @pytest.mark.parametrize("safe", [True, False])
    def test_close_waits_for_the_calls_of_other_threads(
        self, tiny_bundle: Path, clips: np.ndarray, safe: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runtime = edgetube.Runtime(tiny_bundle)
        expected = runtime(clips[:1])
        backend: Any = runtime._backend
        monkeypatch.setattr(type(backend), "thread_safe", safe)
        inside, go_on, plain = threading.Semaphore(0), threading.Event(), backend.infer

        def slow(frames: np.ndarray) -> np.ndarray:
            inside.release()
            go_on.wait()
            return plain(frames)

        monkeypatch.setattr(backend, "infer", slow)
        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(runtime, clips[:1]) for _ in range(3)]
            try:
                inside.acquire()
                while len(backend._callers) < 3:
                    time.sleep(0.001)
                closing = [pool.submit(runtime.close) for _ in range(2)]
                while backend._open:
                    time.sleep(0.001)
                with pytest.raises(BackendError, match="this runtime is closed; open the bundle again"):
                    runtime(clips[:1])
                time.sleep(0.05)  # for the second thread that closes
                assert hasattr(backend, "session")
            finally:
                go_on.set()
            for call in calls:
                np.testing.assert_array_equal(call.result(), expected)
            for one in closing:
                one.result()
        assert not hasattr(backend, "session")

    def test_closing_amid_many_calls(self, tiny_bundle: Path, clips: np.ndarray) -> None:
        for _ in range(5):
            runtime = edgetube.Runtime(tiny_bundle, threads=1)
            expected = runtime(clips)

            def call(runtime: edgetube.Runtime = runtime, expected: np.ndarray = expected) -> str:
                try:
                    while True:
                        np.testing.assert_array_equal(runtime(clips), expected)
                except BackendError as error:
                    return str(error)

            with ThreadPoolExecutor(4) as pool:
                calls = [pool.submit(call) for _ in range(4)]
                time.sleep(0.02)
                runtime.close()
                assert {one.result() for one in calls} == {"this runtime is closed; open the bundle again"}

    def test_an_interrupted_call_does_not_keep_it_open(
        self, tiny_bundle: Path, clips: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runtime = edgetube.Runtime(tiny_bundle)

        def interrupted(_: np.ndarray) -> np.ndarray:
            raise KeyboardInterrupt

        monkeypatch.setattr(runtime._backend, "infer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runtime(clips)
        runtime.close()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
    def test_a_forked_process_is_told_to_open_its_own(self, tiny_bundle: Path) -> None:
        program = f"""
import os, sys, edgetube
runtime = edgetube.Runtime({str(tiny_bundle)!r}, threads=2)
clip = runtime.bundle.golden()[0][:1]
expected = runtime(clip)
if pid := os.fork():
    assert os.waitpid(pid, 0)[1] == 0
    assert (runtime(clip) == expected).all()
else:
    try:
        runtime(clip)
    except edgetube.BackendError as error:
        assert "before the process forked" in str(error), error
    runtime.close()
    with edgetube.Runtime({str(tiny_bundle)!r}, threads=2) as own:
        assert (own(clip) == expected).all()
    print("well", flush=True)
    os._exit(0)  # as multiprocessing does; at a normal exit ONNX Runtime waits for threads of the parent
"""
        done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
        assert done.stdout == "well\n"

    def test_a_spawned_process_opens_its_own(self, tiny_bundle: Path, clips: np.ndarray) -> None:
        with edgetube.Runtime(tiny_bundle) as runtime, ProcessPoolExecutor(1, get_context("spawn")) as pool:
            np.testing.assert_array_equal(pool.submit(runtime, clips).result(), runtime(clips))
