"""Signatures of bundles in the format of minisign (Ed25519).

The manifest holds the hash of every other file, so that one signature, `edgetube.json.minisig`, covers all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from edgetube import bundle as bundles
from edgetube.bundle import MANIFEST
from edgetube.errors import BundleError, InputError
from edgetube.files import atomic_write
from edgetube.targets import need

SIGNATURE = f"{MANIFEST}.minisig"

MOST = 1 << 14
"""Largest file of a key or signature, in bytes."""


def sign(bundle: str | Path, key: str | Path, password: Callable[[], str]) -> Path:
    """Sign a bundle whose files match its manifest; returns the signature's path.

    Args:
        bundle: its folder.
        key: file with the secret key, as `minisign -G` makes it.
        password: asked for the key's password if it has one.

    Raises:
        MissingPackageError: the package py-minisign is not installed.
        BundleError: the bundle is damaged, or cannot be written to.
        InputError: the key cannot be read, or the password is wrong.
    """
    minisign = need("minisign", "sign")
    found = bundles.load(bundle)
    try:
        with minisign.SecretKey.from_bytes(_read(key, "secret key")) as secret:
            if secret.is_encrypted():
                secret.decrypt(password())
            comment = f"timestamp:{int(time.time())}\tfile:{MANIFEST}\thashed"
            signature = secret.sign((found.path / MANIFEST).read_bytes(), trusted_comment=comment)
    except minisign.Error as error:
        raise InputError(f"{key} cannot sign: {error}; expected a secret key of minisign and its password") from error
    try:
        return atomic_write(found.path / SIGNATURE, bytes(signature) + b"\n")
    except OSError as error:
        raise BundleError(f"cannot write {found.path / SIGNATURE}: {error.strerror}") from error


def check(bundle: str | Path, key: str | Path) -> str:
    """Check a manifest's signature against a public key; returns the key's id.

    This does not hash the other files: `edgetube.bundle.load` does.

    Args:
        bundle: its folder.
        key: file with the public key, as `minisign -G` makes it.

    Raises:
        MissingPackageError: the package py-minisign is not installed.
        BundleError: the bundle is not signed, or not by that key, or has changed since.
        InputError: the key cannot be read.
    """
    minisign, folder = need("minisign", "sign"), Path(bundle)
    try:
        public = minisign.PublicKey.from_bytes(_read(key, "public key"))
    except minisign.Error as error:
        raise InputError(f"{key} is not a public key of minisign: {error}") from error
    if not (folder / SIGNATURE).is_file():
        raise BundleError(f"{folder} is not signed: it has no {SIGNATURE}; use edgetube sign where it was made")
    try:
        signature = minisign.Signature.from_bytes(_read(folder / SIGNATURE, "signature"))
        public.verify(_read(folder / MANIFEST, "manifest", 64 << 20), signature)
    except minisign.Error as error:
        raise BundleError(
            f"{folder} is not signed by the owner of {key}, or was changed afterwards ({error}); do not use it"
        ) from error
    return f"key {public.untrusted_comment or 'without a comment'}"


def _read(path: str | Path, what: str, most: int = MOST) -> bytes:
    try:
        with Path(path).open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise InputError(f"the {what} {path} cannot be read: {error.strerror}") from error
    if len(data) > most:
        raise InputError(f"{path} is too large for a {what}; expected at most {most} bytes")
    return data
