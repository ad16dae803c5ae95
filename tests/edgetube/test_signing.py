"""A signature is the owner's of a key, about the bytes of the manifest, in the format that minisign reads."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from edgetube import bundle as bundles
from edgetube import health, signing
from edgetube.errors import BundleError, InputError

minisign = pytest.importorskip("minisign", reason="needs py-minisign: pip install 'edgetube[sign]'")

OLD = Path(__file__).parent / "schema1" / "old.onnx-fp32"
PASSWORD = "open sesame"


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """Secret key without a password, and public key."""
    return write(tmp_path, "mine")


def write(folder: Path, name: str, password: str = "") -> tuple[Path, Path]:
    pair = minisign.KeyPair.generate()
    if password:
        pair.secret_key.encrypt(password, opslimit=1 << 15, memlimit=1 << 20)
    secret, public = folder / f"{name}.key", folder / f"{name}.pub"
    secret.write_bytes(bytes(pair.secret_key) + b"\n")
    public.write_bytes(bytes(pair.public_key) + b"\n")
    return secret, public


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "old.onnx-fp32"))


def no_password() -> str:
    raise AssertionError("nobody asked for a password")


def test_what_was_signed_is_told_from_what_was_not(bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    secret, public = keys
    with pytest.raises(BundleError, match=r"is not signed: it has no edgetube.json.minisig; use edgetube sign"):
        signing.check(bundle, public)
    assert signing.sign(bundle, secret, no_password) == bundle / "edgetube.json.minisig"
    assert signing.check(bundle, public).startswith("key minisign public key ")
    bundles.load(bundle)
    _, other = write(tmp_path, "other")
    with pytest.raises(BundleError, match=r"is not signed by the owner of .*other.pub"):
        signing.check(bundle, other)


def test_a_manifest_that_was_changed_afterwards(bundle: Path, keys: tuple[Path, Path]) -> None:
    signing.sign(bundle, keys[0], no_password)
    manifest = bundle / "edgetube.json"
    data = json.loads(manifest.read_text())
    data["input"]["mean"] = [0.45, 0.5, 0.6]
    manifest.write_text(json.dumps(data))
    bundles.load(bundle)  # which cannot know
    with pytest.raises(
        BundleError, match=r"or was changed afterwards \(signature verification failed\); do not use it"
    ):
        signing.check(bundle, keys[1])


def test_a_signature_that_was_changed(bundle: Path, keys: tuple[Path, Path]) -> None:
    path = signing.sign(bundle, keys[0], no_password)
    whole = path.read_text()
    for damaged in ("", "x", whole.replace("hashed", "hushed"), whole[:-20], whole * 200, whole.replace("\n", "\n\n")):
        path.write_text(damaged)
        with pytest.raises((BundleError, InputError), match=r"edgetube.json|is not signed by"):
            signing.check(bundle, keys[1])


def test_a_damaged_bundle_is_not_signed(bundle: Path, keys: tuple[Path, Path]) -> None:
    (bundle / "model.onnx").write_bytes(b"another model")
    with pytest.raises(BundleError, match="is not the file that was proven"):
        signing.sign(bundle, keys[0], no_password)
    assert not (bundle / "edgetube.json.minisig").exists()


def test_a_key_with_a_password(bundle: Path, tmp_path: Path) -> None:
    secret, public = write(tmp_path, "locked", PASSWORD)
    with pytest.raises(
        InputError, match=r"locked.key cannot sign: .*expected a secret key of minisign and its password"
    ):
        signing.sign(bundle, secret, lambda: "guess")
    signing.sign(bundle, secret, lambda: PASSWORD)
    assert signing.check(bundle, public)


@pytest.mark.parametrize("content", [b"", b"no key", b"\xff" * 200, b"untrusted comment: x\nRW==\n"])
def test_what_is_no_key(bundle: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(InputError, match="key cannot sign: "):
        signing.sign(bundle, tmp_path / "key", no_password)
    with pytest.raises(InputError, match="key is not a public key of minisign: "):
        signing.check(bundle, tmp_path / "key")
    with pytest.raises(InputError, match=r"the public key .*none cannot be read: No such file"):
        signing.check(bundle, tmp_path / "none")
    (tmp_path / "key").write_bytes(bytes((1 << 14) + 1))
    with pytest.raises(InputError, match="key is too large for a public key; expected at most 16384 bytes"):
        signing.check(bundle, tmp_path / "key")


def test_doctor_checks_the_signature_first(bundle: Path, keys: tuple[Path, Path]) -> None:
    found = health.examine(bundle, key=keys[1])
    assert [(check.name, check.ok) for check in found] == [("signature", False)]
    signing.sign(bundle, keys[0], no_password)
    found = health.examine(bundle, key=keys[1])
    assert (found[0].name, found[0].ok, found[1].name) == ("signature", True, "manifest")


def test_minisign_itself_reads_it(bundle: Path, keys: tuple[Path, Path]) -> None:
    tool = shutil.which("minisign")
    if tool is None:
        pytest.skip("needs the program minisign")
    path = signing.sign(bundle, keys[0], no_password)
    command = [tool, "-V", *("-p", str(keys[1])), *("-m", str(bundle / "edgetube.json")), *("-x", str(path))]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
