"""Checks that a bundle is intact and accurate on this machine: `edgetube doctor`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgetube import bundle as bundles
from edgetube import signing
from edgetube.errors import EdgetubeError
from edgetube.runtime import Runtime


@dataclass(frozen=True)
class Check:
    """One check: its subject, whether it passed, and what was found (or the error)."""

    name: str
    ok: bool
    detail: str


def examine(path: str | Path, device: str | None = None, key: Path | None = None) -> list[Check]:
    """Check manifest, files, artifact and the golden clip's answer; stops at the first failure.

    Args:
        key: file with a public key of minisign; the manifest's signature is then checked before anything else.
    """
    checks: list[Check] = []

    def attempt(name: str, probe: Callable[[], str]) -> bool:
        try:
            checks.append(Check(name, True, probe()))
        except EdgetubeError as error:
            checks.append(Check(name, False, str(error)))
        return checks[-1].ok

    def signature() -> str:
        return signing.check(path, key) if key else ""

    def manifest() -> str:
        bundle = bundles.load(path, verify=False)
        made = ", ".join(f"{k} {v}" for k, v in bundle.versions.items())
        return f"{bundle.name} for {bundle.target}, made by {made}"

    def files() -> str:
        bundle = bundles.load(path)
        return f"{len(bundle.files)} files, {sum(f.bytes for f in bundle.files.values()) / 1e6:.1f} MB, hashes match"

    def opens() -> str:
        with Runtime(path, device=device, verify=False) as rt:
            return ", ".join(f"{k} {v}" for k, v in rt.describe().items())

    def golden() -> str:
        with Runtime(path, device=device, verify=False) as rt:
            return f"largest logit error against the reference {rt.check():.2e}"

    first = (("signature", signature),) if key else ()
    for name, probe in (*first, ("manifest", manifest), ("files", files), ("opens", opens), ("golden clip", golden)):
        if not attempt(name, probe):
            break
    return checks
