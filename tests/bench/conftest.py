from types import ModuleType

import pytest

from tests.bench import browser as chromium
from tests.bench import example as documents


@pytest.fixture(scope="session")
def example() -> ModuleType:
    """Documents of parity and bench that nobody measured."""
    return documents


@pytest.fixture(scope="session")
def browser() -> ModuleType:
    """A real browser; where there is none, the test is skipped and says so."""
    if chromium.COMMAND is None:
        pytest.skip("no chromium here; on Debian: apt-get install chromium")
    return chromium
