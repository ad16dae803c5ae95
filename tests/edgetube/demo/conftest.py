from types import ModuleType

import pytest

from tests.edgetube.demo import oracle as independent


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """An estimate of camera motion that shares nothing with the renderer."""
    return independent
