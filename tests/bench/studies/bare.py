"""A Python that has PyTorch, numpy and what they require, and nothing else: not edgetube, onnx or ONNX Runtime."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path


def python(folder: Path) -> Path:
    """The interpreter of a new environment in `folder`, with links to the packages that are installed here."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in _required(["torch", "numpy"]):
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder / "bin" / "python"


def _required(names: list[str]) -> list[metadata.Distribution]:
    found: dict[str, metadata.Distribution] = {}
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another system
            continue
        if name not in found:
            found[name] = distribution
            plain = [r for r in distribution.requires or [] if "extra ==" not in r]
            names += [re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in plain]
    return list(found.values())
