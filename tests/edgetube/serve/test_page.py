"""The page, in a real browser."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from edgetube.live.decisions import DecisionRule
from edgetube.runtime import Runtime
from edgetube.serve import app
from tests.bench import browser
from tests.edgetube.serve.doubles import film, running, until


def test_the_page_loads_nothing_from_elsewhere() -> None:
    text, policy = app.page()
    assert set(re.findall(r"[\w+.-]+://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"innerHTML|\bon\w+=|style=|eval\(", text)  # names of sources and labels are text
    assert policy.count("sha256-") == 2


@pytest.mark.slow
@pytest.mark.skipif(browser.COMMAND is None, reason="there is no chromium on this machine")
def test_the_page_in_a_browser(rt: Runtime, tmp_path: Path) -> None:
    watched = film(tmp_path / "<b>a & film.mp4", count=120)
    rule = DecisionRule(tau=0, enter=0.02, leave=0.01, minimum=0)
    with (
        running(rt, watched, hop=1, rule=rule, token="a-token-of-a-test") as found,
        browser.Browser(tmp_path / "profile") as chromium,
    ):

        def value(expression: str) -> Any:
            return until(lambda: chromium.evaluate(expression))

        for width, scheme in ((1280, "light"), (400, "dark")):
            chromium.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
            )
            chromium.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            chromium.call("Page.navigate", url=found.server.url)
            assert value("document.getElementById('link')?.textContent == 'connected'")
            assert value("document.querySelector('article h2')?.textContent") == "<b>a & film.mp4"
            assert value("document.querySelectorAll('polyline').length > 0")
            assert value("document.querySelector('img')?.naturalWidth") == 96
            assert value(
                "document.querySelector('.spans b')?.textContent || document.querySelector('tbody td')?.textContent"
            )
            assert chromium.evaluate("document.documentElement.scrollWidth") == width
            assert "token" not in chromium.evaluate("location.href")
        before = value("document.querySelector('dl').textContent")
        if found.ask("/api/sources", Authorization="Bearer a-token-of-a-test").json[0]["state"] == "live":
            assert until(lambda: chromium.evaluate("document.querySelector('dl').textContent") != before)
        send = (
            "fetch('/predict', {method: 'POST', body: new Blob(['no film'])}).then(a => a.json())"
            ".then(found => window.heard = found.error)"
        )
        chromium.evaluate(f"void {send}")
        assert "the file cannot be" in value("window.heard")
        assert value("getComputedStyle(document.body).backgroundColor") == "rgb(16, 19, 23)"
        time.sleep(0.5)
        chromium.evaluate("1")  # brings the events
        wrong = [e for e in chromium.events if e.get("method") == "Runtime.exceptionThrown"]
        logged = [e["params"]["entry"]["text"] for e in chromium.events if e.get("method") == "Log.entryAdded"]
        assert wrong == []
        assert [text for text in logged if "400" not in text] == []  # the file that was none
        asked = {
            e["params"]["request"]["url"] for e in chromium.events if e.get("method") == "Network.requestWillBeSent"
        }
        own = f"http://127.0.0.1:{found.port}/"
        assert {url for url in asked if not url.startswith((own, f"blob:{own}", "data:,"))} == set()
