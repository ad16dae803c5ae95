"""What the package promises as a whole: its public names, a light import, closed packages, and what is in the wheel."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import edgetube
from edgetube import export, runtimes

ROOT = Path(__file__).parents[1]
PACKAGES = ("edgetube", "export", "runtimes", "calibration", "bench")

PUBLIC = [
    "BackendError",
    "BundleError",
    "Cameras",
    "CheckpointError",
    "EdgetubeError",
    "FrameSource",
    "InputContract",
    "InputError",
    "InputWarning",
    "MissingPackageError",
    "ModelSpec",
    "ParityError",
    "Prediction",
    "Runtime",
    "SpecError",
    "TubeSpec",
    "Window",
    "__version__",
    "export_model",
]

HEAVY = {
    "ai_edge_litert",
    "coremltools",
    "executorch",
    "matplotlib",
    "onnx",
    "onnxscript",
    "openvino",
    "rich",
    "safetensors",
    "tensorrt",
    "torch",
    "typer",
}

VENDORS = {"onnxruntime", "openvino", "tensorrt", "coreml", "coreai", "executorch", "litert", "qnn"}
"""What a backend's file or folder is called; the vendor's packages have names that begin with it."""

MODULES = re.compile(r"blocks\\?\.|\battn\b|qkv|\bmlp\b|\bfc[12]\b|\bnorm[12]\b|\bproj\b")
"""Names of the static model's modules, and so of the graph's tensors, or regular expressions of them."""

NAMES_MODULES = {"edgetube/roles.py", "export/static.py", "edgetube/model", "edgetube/formats"}
"""The files and folders that may: those that make the modules or read their weights. Passes over the graph ask
`edgetube.roles`."""

NOT_SOURCE = (".git", ".venv", "build", "dist", "out", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")


def run(code: str) -> str:
    """Standard output of `code` in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/").stdout


def sources() -> list[Path]:
    """The modules that are installed, as they lie in the repository: all but `bench/studies/`."""
    studies = ROOT / "bench" / "studies"
    return [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if studies not in path.parents]


class TestNames:
    def test_the_public_names(self) -> None:
        assert sorted(edgetube.__all__) == sorted(PUBLIC)
        assert dir(edgetube) == edgetube.__all__

    @pytest.mark.parametrize("name", PUBLIC)
    def test_each_is_there(self, name: str) -> None:
        value = getattr(edgetube, name)
        assert isinstance(value, str) if name == "__version__" else callable(value)

    def test_a_name_that_is_not_there(self) -> None:
        with pytest.raises(AttributeError, match="module 'edgetube' has no attribute 'Runtimes'"):
            edgetube.Runtimes  # noqa: B018

    def test_the_verb_does_not_hide_the_package(self) -> None:
        edgetube.export_model  # noqa: B018
        assert edgetube.export is export

    def test_the_version_is_the_distribution_s(self) -> None:
        assert edgetube.__version__ == metadata.version("edgetube")


class TestLightness:
    @pytest.mark.parametrize(
        "code",
        [
            "import edgetube",
            "import edgetube; edgetube.Runtime",
            "import edgetube.runtimes.onnxruntime",
            "from edgetube import export; export.targets()",
        ],
    )
    def test_a_device_loads_nothing_heavy(self, code: str) -> None:
        loaded = json.loads(run(f"{code}; import sys, json; print(json.dumps(sorted(sys.modules)))"))
        assert "edgetube" in loaded
        assert not HEAVY & {name.partition(".")[0] for name in loaded}

    def test_the_bare_package_loads_no_arrays_and_no_video(self) -> None:
        loaded = json.loads(run("import edgetube, sys, json; print(json.dumps(sorted(sys.modules)))"))
        assert not {"numpy", "av", "onnxruntime"} & set(loaded)

    def test_the_names_that_would_be_caught_are_real(self) -> None:
        """The check above sees what is loaded: the exporter does load torch."""
        loaded = json.loads(
            run("import edgetube; edgetube.export_model; import sys, json; print(json.dumps([*sys.modules]))")
        )
        assert {"torch", "onnx"} <= set(loaded)


def words_of(path: Path) -> set[str]:
    """Identifiers, imported modules and strings of a source file; comments and docstrings are prose and stay out."""
    tree = ast.parse(path.read_text("utf-8"))
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in prose:
                found.add(text)
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                found.add(name)
            case ast.ImportFrom(module=str(name)):
                found.add(name)
    return found


def backends_named_in(path: Path) -> set[str]:
    text = "\n".join(words_of(path)).lower()
    return {vendor for vendor in VENDORS if vendor in text}


def modules_named_in(path: Path) -> set[str]:
    """Words that name a module of the static model; what has a space is a text for the user, not a name."""
    return {text for text in words_of(path) if " " not in text and MODULES.search(text)}


FORMATS = {path.stem for path in (ROOT / "edgetube" / "formats").glob("*.py")} - {"__init__"}

WORDS = {"clip", "native", "vit"}
"""Names of formats that are words of other meanings too: only imports of them are seen."""


def formats_imported_by(path: Path) -> set[str]:
    """Formats that a file imports."""
    tree = ast.parse(path.read_text("utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return {name for name in FORMATS if f"edgetube.formats.{name}" in imported}


def formats_named_in(path: Path) -> set[str]:
    """Formats that a file imports, or whose name is a word of its code."""
    return formats_imported_by(path) | (words_of(path) & (FORMATS - WORDS))


def is_a_backend_s(path: Path) -> bool:
    """Whether a file is, or lies in, a backend's own file or folder in `export/` or `runtimes/`."""
    folder, name = path.relative_to(ROOT).parts[:2]
    return folder in ("export", "runtimes") and name.removesuffix(".py") in VENDORS


def modules_in(folder: str) -> set[str]:
    """Names of the modules and packages that lie in a folder of the repository."""
    files = {path.stem for path in (ROOT / folder).glob("*.py")}
    return files | {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}


class TestPackages:
    def test_a_backend_is_named_by_its_own_files_only(self) -> None:
        """A backend's file may name another vendor, as ONNX Runtime names its execution providers."""
        others = [path for path in sources() if not is_a_backend_s(path)]
        named = {path.relative_to(ROOT).as_posix(): backends_named_in(path) for path in others}
        assert {path: sorted(vendors) for path, vendors in named.items() if vendors} == {}

    def test_a_stranger_would_be_seen(self, tmp_path: Path) -> None:
        for own in (ROOT / "export" / "onnxruntime.py", ROOT / "runtimes" / "onnxruntime.py"):
            assert "onnxruntime" in backends_named_in(own)
        for line in ("import coremltools as ct", "x = 'openvino.xml'", "from tensorrt import Builder", "x.onnxruntime"):
            (tmp_path / "stranger.py").write_text(f'"""Prose: TensorRT, OpenVINO."""\n{line}  # coreml\n')
            assert len(backends_named_in(tmp_path / "stranger.py")) == 1, line

    def test_modules_of_the_model_are_named_by_its_roles_only(self) -> None:
        paths = {path.relative_to(ROOT).as_posix(): path for path in sources()}
        others = {
            name: path for name, path in paths.items() if not any(name.startswith(known) for known in NAMES_MODULES)
        }
        assert {name: found for name, path in others.items() if (found := modules_named_in(path))} == {}
        assert modules_named_in(ROOT / "edgetube" / "roles.py")

    @pytest.mark.parametrize(
        "line",
        [
            'x = re.compile(r"blocks\\.(\\d+)")', 'x = f"blocks.{i}"', 'x = name.endswith(".attn.proj")', "x = '.qkv'",
            'x = ("mlp.fc1",)', 'x = ["norm1"]', 'x = name.removesuffix("proj")',
        ],
    )  # fmt: skip
    def test_a_module_s_name_would_be_seen(self, tmp_path: Path, line: str) -> None:
        text = f'"""Prose: blocks.3.attn.qkv."""\n{line}  # blocks.3\ny = "a text with blocks.3 for the user"\n'
        (tmp_path / "stranger.py").write_text(text)
        assert len(modules_named_in(tmp_path / "stranger.py")) == 1

    def test_the_folders_are_the_registry(self) -> None:
        exporters = modules_in("export")
        assert runtimes.names() == modules_in("runtimes") - {"__init__", "base"}
        assert {target.backend for target in export.targets().values()} == exporters & runtimes.names() != set()
        assert all(name == target.name for name, target in export.targets().items())

    def test_every_extra_is_explained(self) -> None:
        project = (ROOT / "pyproject.toml").read_text("utf-8")
        section = project.split("\n[project.optional-dependencies]\n")[1].split("\n[")[0]
        packaging = (ROOT / "docs" / "design.md").read_text("utf-8").split("\n## Packaging\n")[1]
        first = " ".join(line.split("|")[1] for line in packaging.splitlines() if line.startswith("| `"))
        assert sorted(re.findall(r"`([\w-]+)`", first)) == sorted(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))

    def test_a_format_is_named_by_its_own_module_only(self) -> None:
        """And none imports another: what they share is in `reading`. (Names of architectures have words of others.)"""
        own = ROOT / "edgetube" / "formats"
        for path in sources():
            named = formats_imported_by(path) if own in path.parents else formats_named_in(path)
            assert named == set(), path

    def test_a_stranger_to_a_format_would_be_seen(self, tmp_path: Path) -> None:
        assert formats_named_in(ROOT / "edgetube" / "formats" / "timm.py") >= {"timm"}
        for line in ("from edgetube.formats import vit", "import edgetube.formats.clip", "x = 'timm'", "x.openclip"):
            (tmp_path / "stranger.py").write_text(f'"""Prose: timm, VideoMAE."""\n{line}  # vivit\n')
            assert len(formats_named_in(tmp_path / "stranger.py")) == 1, line

    def test_modules_are_imported_by_their_installed_names(self) -> None:
        """`import export` would load a second copy of the package."""
        for path in [*sources(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
            roots = set()
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Import):
                    roots |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{path}: a relative import"
                    roots.add(str(node.module).partition(".")[0])
            assert not roots & set(PACKAGES[1:]), path


def installed(folder: Path, name: str, group: str, point: str, files: dict[str, str]) -> None:
    """Lay out a distribution with one entry point, as pip does."""
    for path, code in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{point}\n")


class TestThirdParties:
    """What others add by entry points, seen from fresh interpreters."""

    def test_a_format(self, tmp_path: Path) -> None:
        code = """
            from dataclasses import replace
            from edgetube.model import checkpoints
            NAME = "weights of a stranger"
            def detect(files):
                return files.path.suffix == ".stranger"
            def read(files, options):
                options.allow()
                return replace(checkpoints.load("demo"), name="theirs")
        """
        files = {"stranger.py": textwrap.dedent(code), "m.stranger": "x"}
        installed(tmp_path, "stranger", "edgetube.formats", "weights = stranger", files)
        said = run(
            f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from edgetube import formats; "
            f"found = formats.load({str(tmp_path / 'm.stranger')!r}); print(found.name, '|', found.format)"
        )
        assert said.strip() == "theirs | weights of a stranger"

    def test_a_target(self, tmp_path: Path) -> None:
        target = (
            "from edgetube.precision import Precision\nfrom edgetube.targets import Target\n"
            "TARGETS = (Target('odd-fp32', Precision.FP32, 'odd', 'a stranger', ('numpy',), ('numpy',)),)\n"
            "def build(context): ...\n"
        )
        session = "RUNS = ('odd',)\nclass Session:\n    def __init__(self, bundle, **how): raise SystemExit('opened')\n"
        files = {"oddly/__init__.py": "", "oddly/exporter.py": target, "oddly/runtime.py": session}
        installed(tmp_path, "oddly", "edgetube.targets", "odd = oddly", files)
        first = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from edgetube import export, runtimes; "
        said = run(
            f"{first}print(export.target('odd-fp32').summary, 'oddly.runtime' in sys.modules, len(export.targets()))"
        )
        assert said.split() == ["a", "stranger", "False", str(len(export.targets()) + 1)]
        opened = subprocess.run(
            [sys.executable, "-c", f"{first}from types import SimpleNamespace; "
             "runtimes.open_bundle(SimpleNamespace(backend='odd', target='odd-fp32', path='b'))"],
            capture_output=True, text=True, check=False, cwd="/",
        )  # fmt: skip
        assert opened.stderr.strip() == "opened"

    def test_a_built_in_backend_is_not_replaced(self, tmp_path: Path) -> None:
        installed(tmp_path, "oddly", "edgetube.targets", "onnxruntime = oddly", {"oddly/__init__.py": ""})
        said = run(
            f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from edgetube import runtimes; "
            "print(dict(runtimes.foreign()), runtimes.runtime('onnxruntime').__name__)"
        )
        assert said.strip() == "{} edgetube.runtimes.onnxruntime"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """Names in the wheel and in the sdist, built from a copy: a build leaves files in its source tree."""
    source, dist = tmp_path_factory.mktemp("build") / "source", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    return set(zipfile.ZipFile(wheel).namelist()), inside


@pytest.mark.slow
class TestDistributions:
    """What a stranger gets: everything that is needed to run is in the wheel, everything else in the sdist."""

    def test_the_wheel_has_every_module_under_its_installed_name(self, names: tuple[set[str], set[str]]) -> None:
        expected = set()
        for path in sources():
            relative = path.relative_to(ROOT).as_posix()
            expected.add(relative if relative.startswith("edgetube/") else f"edgetube/{relative}")
        modules = {name for name in names[0] if name.endswith(".py")}
        assert modules == expected
        assert "edgetube/bench/parity.py" in modules

    def test_the_wheel_has_the_built_in_model_and_clips(self, names: tuple[set[str], set[str]]) -> None:
        data = {p.relative_to(ROOT).as_posix() for p in (ROOT / "edgetube" / "demo").rglob("*") if p.is_file()}
        data = {name for name in data if "__pycache__" not in name and not name.endswith(".py")}
        assert data <= names[0]
        assert {"edgetube/py.typed"} <= names[0]
        assert any(name.startswith("edgetube/demo/photos/") for name in names[0])

    def test_the_sdist_has_tests_documents_and_scripts(self, names: tuple[set[str], set[str]]) -> None:
        folders = [*PACKAGES, "tests", "docs", ".ci"]
        files = [
            p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file() and p.parts[-2] != "__pycache__"
        ]
        top = {"CHANGELOG.md", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml"}
        expected = top | {".importlinter"} | {p.relative_to(ROOT).as_posix() for p in files}
        assert expected - names[1] == set()
        assert "tests/test_package.py" in expected
