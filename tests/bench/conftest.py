import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def example():
    """Documents of parity and bench that nobody measured."""
    return SimpleNamespace(**runpy.run_path(str(HERE / "example.py")))


@pytest.fixture(scope="session")
def browser():
    """A real browser; where there is none, the test is skipped and says so."""
    module = SimpleNamespace(**runpy.run_path(str(HERE / "browser.py")))
    if module.COMMAND is None:
        pytest.skip("no chromium here; on Debian: apt-get install chromium")
    return module
