"""A camera that OpenCV reads: BGR, and the same buffer for every frame. Needs `pip install opencv-python`.

    python examples/opencv.py out/demo.onnx-fp32 0
    python examples/opencv.py out/demo.onnx-fp32 clip.mp4

The app pushes frames; what the model cannot keep up with is left out and counted, and the loop never waits for it.
"""

import argparse
import time

import cv2

import edgetube


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("source", help="a camera's index or a file")
    options = parser.parse_args()
    live = options.source.isdecimal()
    capture = cv2.VideoCapture(int(options.source) if live else options.source)
    # A file is read as fast as the model answers, a camera as fast as it films.
    policy = "latest" if live else "all"
    with (
        edgetube.Runtime(options.bundle) as rt,
        edgetube.FrameSource.pushed("opencv", policy=policy) as source,
        edgetube.Cameras(rt, {"opencv": source}, on_prediction=told),
    ):
        bgr = rgb = None
        while True:
            ok, bgr = capture.read(bgr)  # into the same buffer again
            if not ok:
                break
            rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB, rgb)
            seconds = time.monotonic() if live else capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
            source.push(rgb, seconds)  # copied: both buffers may be used again
        while source.ledger.account().waiting > 1:  # the newest frame waits for the one after it
            time.sleep(0.01)
    capture.release()


def told(prediction: edgetube.Prediction) -> None:
    print(f"{prediction.start:7.2f}-{prediction.end:.2f} s  {prediction.label:20} {prediction.score:.2f}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
    except edgetube.EdgetubeError as error:
        raise SystemExit(f"error: {error}") from None
