import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def oracle():
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("oracle.py"))))
