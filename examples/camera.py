"""One camera: print what the model sees, newest first, until Ctrl-C.

python examples/camera.py out/demo.onnx-fp32 0
python examples/camera.py out/demo.onnx-fp32 rtsp://camera/stream
python examples/camera.py out/demo.onnx-fp32 clip.mp4
"""

import argparse

import edgetube


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("source", help="a camera's index, a URL or a file")
    parser.add_argument("--hop", default="0.5s", help='frames, or seconds ("0.5s"), between two predictions')
    options = parser.parse_args()
    with edgetube.Runtime(options.bundle) as rt, rt.stream(options.source, hop=options.hop) as stream:
        for p in stream:
            if p.restarted:
                print(f"-- the window began again: {p.restarted}")
            print(f"{p.start:7.2f}-{p.end:.2f} s  {p.label:20} {p.score:.2f}  {p.age_ms:5.0f} ms old, {p.dropped} lost")
        print(stream.account)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
    except edgetube.EdgetubeError as error:
        raise SystemExit(f"error: {error}") from None
