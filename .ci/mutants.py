"""Mutation testing: how many small faults, planted at random in a module, do the quick tests of that module find?

    python .ci/mutants.py [--sample 10] [--seed 0] calibration bench/temporal.py edgetube/bundle.py

The faults are those of cosmic-ray (a swapped operator, another number, a condition negated, a loop that does not
run ...) and `min` for `max`. Sites are drawn evenly, then one fault at each. Annotations are left alone, and so are
the numbers of named constants: their values are choices, and a test that repeats a choice proves nothing.

The tests of `calibration/numeric.py` are `test_numeric.py`, then what else in `tests/calibration/` imports that module.
Each fault runs in a fork of one process that has loaded the large libraries, in a copy of the repository: nothing here
is touched.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import parso
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator

ROOT = Path(__file__).parents[1]
PACKAGES = ("export", "runtimes", "calibration", "bench")
"""Folders that are installed inside of `edgetube`."""

PRELOADED = ("numpy", "torch", "onnx", "onnxscript", "onnxruntime", "safetensors", "av")
OTHERS = {"min": "max", "max": "min", "argmin": "argmax", "argmax": "argmin", "amin": "amax", "amax": "amin"}


class MinMax(Operator):
    """Replaces `min` by `max`, and the reverse."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "name" and node.value in OTHERS:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return parso.python.tree.Name(OTHERS[node.value], node.start_pos, node.prefix)

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


@dataclass(frozen=True)
class Fault:
    """One mutant: a module's file, relative to the repository, and its text with the fault."""

    module: Path
    line: int
    text: str
    original: str

    def __str__(self) -> str:
        lines = difflib.unified_diff(self.original.splitlines(), self.text.splitlines(), lineterm="", n=0)
        changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        return "\n".join([f"{self.module}:{self.line}", *(f"    {line}" for line in changed)])


def operators() -> dict[str, Operator]:
    """All of cosmic-ray's that need no arguments, and ours."""
    named = [name for name in plugins.operator_names() if "Variable" not in name]
    return {name: plugins.get_operator(name)() for name in named} | {"min-max": MinMax()}


def sample(module: Path, count: int, seed: int) -> list[Fault]:
    """So many faults of a module, each at a site of its own; the same ones for the same seed and text."""
    source = (ROOT / module).read_text("utf-8")
    tree = get_ast(source)
    sites: dict[tuple[int, int], list[tuple[str, int]]] = defaultdict(list)
    known = operators()
    for name, operator in known.items():
        positions = (at for node in ast_nodes(tree) for at, _ in operator.mutation_positions(node))
        for occurrence, at in enumerate(positions):
            sites[at].append((name, occurrence))
    draw = random.Random(f"{seed} {module}")
    found: list[Fault] = []
    plain = _meaning(source)
    for at in draw.sample(sorted(sites), len(sites)):
        if len(found) == count:
            break
        name, occurrence = draw.choice(sites[at])
        text = mutate_code(source, known[name], occurrence)
        if text is not None and _meaning(text) not in (plain, None):
            found.append(Fault(module, at[0], text, source))
    return found


def _meaning(source: str) -> str | None:
    """The syntax tree without what does nothing when it runs; None where the text is no Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if getattr(node, name, None) is not None:
                setattr(node, name, ast.Constant(0))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]).isupper():
            statement.value = ast.Constant(0)
    return ast.dump(tree)


def tests_of(module: Path) -> list[str]:
    """The test files of a module: its own one first, then those beside it that import the module."""
    folder = ROOT / "tests" / module.parent
    own = folder / f"test_{module.stem}.py"
    name = module.parent.name if module.stem == "__init__" else module.stem
    imports = re.compile(rf"^\s*(from|import) .*\b{name}\b", re.MULTILINE)
    beside = [path for path in sorted(folder.glob("test_*.py")) if imports.search(path.read_text("utf-8"))]
    first = [own] if own.is_file() else []
    return [str(path.relative_to(ROOT)) for path in [*first, *(path for path in beside if path != own)]]


class Bench:
    """A copy of the repository as it is installed, where faults are planted and tests run."""

    def __init__(self, place: Path) -> None:
        self.place, self.library = place, place / "library"
        line = [sys.executable, "-c", "import setuptools; setuptools.setup()", "--quiet", "build_py"]
        subprocess.run([*line, "--build-lib", str(self.library)], cwd=ROOT, check=True)
        for name in ("tests", "bench"):
            shutil.copytree(ROOT / name, place / name)
        shutil.copy(ROOT / "pyproject.toml", place)
        shutil.copytree(ROOT / "bench", self.library / "edgetube" / "bench", dirs_exist_ok=True)

    def file(self, module: Path) -> Path:
        """Where a module of the repository is imported from."""
        return self.library / ("edgetube" if module.parts[0] in PACKAGES else "") / module

    def run(self, tests: Sequence[str], limit: float | None = None) -> bool:
        """Whether the tests pass; False when they take longer than `limit` seconds, too."""
        child = os.fork()
        if child == 0:
            self._child(tests)
        end = None if limit is None else time.monotonic() + limit
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status) == 0
            if end is not None and time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return False
            time.sleep(0.05)

    def _child(self, tests: Sequence[str]) -> None:
        import pytest

        os.setsid()
        os.chdir(self.place)
        with (self.place / "output.txt").open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        sys.path[:0] = [str(self.library), str(self.place)]
        os.environ["PYTHONPATH"] = str(self.library)
        code = 4
        try:
            code = pytest.main(
                ["-x", "-q", "-p", "no:cacheprovider", "-m", "not (slow or long or gpu or machines)", *tests]
            )
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(code))


def modules(given: Sequence[str]) -> list[Path]:
    """The files that are meant; a folder stands for its modules."""
    found: list[Path] = []
    for name in given:
        path = ROOT / name
        found += sorted(path.glob("*.py")) if path.is_dir() else [path]
    return [path.relative_to(ROOT) for path in found]


def main() -> int:
    """Plant, run, count; 1 when fewer than `--least` of the faults were found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", help="files or folders, relative to the repository")
    parser.add_argument("--sample", type=int, default=10, help="faults of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=0.0, help="share of the faults that has to be found")
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    for name in PRELOADED:
        __import__(name)
    killed = total = 0
    survivors: list[Fault] = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch))
        for module in modules(args.modules):
            tests = tests_of(module)
            faults = sample(module, args.sample, args.seed)
            if not tests:
                print(f"{module}: no tests, {len(faults)} faults survive", flush=True)
                survivors += faults
                total += len(faults)
                continue
            began = time.monotonic()
            if faults and not bench.run(tests):
                print((bench.place / "output.txt").read_text("utf-8")[-3000:])
                sys.exit(f"{module}: its tests fail as it is")
            limit = 60 + 3 * (time.monotonic() - began)
            alive = [fault for fault in faults if _survives(bench, fault, tests, limit)]
            survivors += alive
            total, killed = total + len(faults), killed + len(faults) - len(alive)
            print(f"{module}: {len(faults) - len(alive)} of {len(faults)} found by {', '.join(tests)}", flush=True)
            for fault in alive:
                print(fault, flush=True)
    share = killed / total if total else 1.0
    print(f"\n{killed} of {total} faults found ({share:.0%}), {len(survivors)} survive; seed {args.seed}")
    return int(share < args.least)


def _survives(bench: Bench, fault: Fault, tests: Sequence[str], limit: float) -> bool:
    place = bench.file(fault.module)
    place.write_text(fault.text, "utf-8")
    try:
        return bench.run(tests, limit)
    finally:
        place.write_text(fault.original, "utf-8")


if __name__ == "__main__":
    sys.exit(main())
