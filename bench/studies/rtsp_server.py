"""GStreamer's RTSP server with a moving test picture: what `soak_faults.py` starts as a camera.

    python3 rtsp_server.py PORT [USER PASSWORD]

For a Python that has PyGObject, GStreamer's RTSP server and x264enc. On Debian: `apt-get install
--no-install-recommends python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-base gstreamer1.0-plugins-good
gstreamer1.0-plugins-ugly`. Says "ready" once it listens, and runs until it is killed.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

LAUNCH = (
    "( videotestsrc is-live=true pattern=ball ! video/x-raw,width=320,height=240,framerate=25/1"
    " ! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=25 ! rtph264pay name=pay0 pt=96 )"
)


def serve(port: str, user: str | None = None, password: str | None = None) -> None:
    """Serve rtsp://127.0.0.1:PORT/live, to those who know the password if there is one."""
    gi: Any = importlib.import_module("gi")
    for name in ("Gst", "GstRtspServer"):
        gi.require_version(name, "1.0")
    gst, rtsp, glib = (_repository(name) for name in ("Gst", "GstRtspServer", "GLib"))
    gst.init(None)
    server, factory = rtsp.RTSPServer(), rtsp.RTSPMediaFactory()
    server.set_address("127.0.0.1")
    server.set_service(port)
    factory.set_launch(LAUNCH)
    factory.set_shared(True)
    if user is not None:
        auth, token = rtsp.RTSPAuth(), rtsp.RTSPToken()
        token.set_string("media.factory.role", "viewer")
        auth.add_basic(rtsp.RTSPAuth.make_basic(user, password), token)
        server.set_auth(auth)
        factory.add_role_from_structure(gst.Structure.from_string(ROLE)[0])
    server.get_mount_points().add_factory("/live", factory)
    server.attach(None)
    print("ready", flush=True)
    glib.MainLoop().run()


def _repository(name: str) -> Any:
    return importlib.import_module(f"gi.repository.{name}")


ROLE = "viewer, media.factory.access=(boolean)true, media.factory.construct=(boolean)true"

if __name__ == "__main__":
    serve(*sys.argv[1:])
