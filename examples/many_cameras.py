"""Several cameras, one model: each answer, each change of a camera's state, and every 10 s how they all do.

python examples/many_cameras.py out/demo.onnx-fp32 door=rtsp://door/stream yard=0 film=clip.mp4
"""

import argparse

import edgetube


def told(prediction: edgetube.Prediction) -> None:
    print(f"{prediction.source:8} {prediction.label:20} {prediction.score:.2f}  {prediction.age_ms:5.0f} ms old")


def changed(name: str, state: str, why: str) -> None:
    print(f"{name:8} is {state}: {why}")


def failed(name: str, error: BaseException) -> None:
    print(f"{name:8} failed: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("sources", nargs="+", metavar="NAME=SOURCE", help="a camera's index, a URL or a file")
    parser.add_argument(
        "--threads", type=int, default=1, help="processors for one call; as many calls as fit run at once"
    )
    options = parser.parse_args()
    sources = dict(source.split("=", 1) for source in options.sources)
    callbacks = {"on_prediction": told, "on_state": changed, "on_error": failed}
    with (
        edgetube.Runtime(options.bundle, threads=options.threads) as rt,
        edgetube.Cameras(rt, sources, hop="0.5s", **callbacks) as cameras,
    ):
        while not cameras.wait(10.0):
            report(cameras)
        report(cameras)


def report(cameras: edgetube.Cameras) -> None:
    for name, one in cameras.statistics().items():
        latency = "-" if one.latency_p99_ms is None else f"{one.latency_p50_ms:.0f} ms, p99 {one.latency_p99_ms:.0f} ms"
        print(f"{name:8} {one.state}, {one.fps or 0:.1f} fps, {one.predictions} answers, {latency}; {one.account}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
    except edgetube.EdgetubeError as error:
        raise SystemExit(f"error: {error}") from None
