"""Which names of an SDK `runtimes/tensorrt/` uses: its sources are read, and types are followed through the bindings.

pybind11 states signatures in docstrings: `create_builder_config(self: ...Builder) -> ...IBuilderConfig`. So the type of
an expression is known from the annotations in the sources and from the bindings themselves, whatever stubs say.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgetube.runtimes import tensorrt

SOURCES = sorted(Path(tensorrt.__file__).parent.glob("*.py"))

LEGACY = {"_configure_legacy", "_moves_integers", "_without_types", "calibrator"}
"""Functions for TensorRT 8.6 to 10, whose names no later version has."""


class Uses:
    """The names of `api` that the sources use.

    Attributes:
        found: "ICudaEngine.num_io_tensors", "BuilderFlag.TF32", "OnnxParser".
        missing: those that are not there; a keyword that a function does not take is "Class.method(keyword=)".
    """

    def __init__(self, api: Any) -> None:
        self.api = api
        self.found: set[str] = set()
        self.missing: set[str] = set()
        for path in SOURCES:
            _Module(self, ast.parse(path.read_text("utf-8"))).read()


class _Module:
    """One source; types are names of classes of the SDK, and "type X" is the class X itself."""

    def __init__(self, uses: Uses, tree: ast.Module) -> None:
        self.uses, self.tree = uses, tree
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        self.returns = {f.name: kind for f in functions if (kind := _annotated(f.returns))}
        self.own: dict[str, str] = {}  # self.engine -> its type
        self.local: dict[str, str] = {}

    def read(self) -> None:
        for _ in range(2):  # a method may use what a later one assigns
            for function in self._functions(self.tree):
                self.local = {a.arg: kind for a in function.args.args if (kind := _annotated(a.annotation))}
                for node in self._inside(function):
                    if isinstance(node, ast.Assign):
                        self._assign(node)
                    if isinstance(node, ast.expr):
                        self.kind(node)

    def _functions(self, tree: ast.AST) -> Iterator[ast.FunctionDef]:
        for node in ast.iter_child_nodes(tree):
            if isinstance(node, ast.FunctionDef) and node.name not in LEGACY:
                yield node
            if not (isinstance(node, ast.FunctionDef) and node.name in LEGACY):
                yield from self._functions(node)

    def _inside(self, function: ast.AST) -> Iterator[ast.AST]:
        """The nodes of a function in the order of the source, without those of functions in it."""
        for node in ast.iter_child_nodes(function):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node
                yield from self._inside(node)

    def _assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Call):
                kinds = re.findall(r"\w+", self.kind(node.value) or "")  # of a function that returns several
                pairs: list[tuple[ast.expr, str | None]] = list(zip(target.elts, kinds, strict=False))
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = [(a, self.kind(b)) for a, b in zip(target.elts, node.value.elts, strict=True)]
            else:
                pairs = [(target, self.kind(node.value))]
            for place, kind in pairs:
                if kind and isinstance(place, ast.Name):
                    self.local[place.id] = kind
                elif kind and ast.unparse(place).startswith("self."):
                    self.own[ast.unparse(place)] = kind

    def kind(self, node: ast.expr) -> str | None:
        """The type of an expression; None for what is not the SDK's."""
        if isinstance(node, ast.Name):
            return self.local.get(node.id)
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if not isinstance(node, ast.Call):
            return None
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name == "cast":
            return _annotated(node.args[0]) or self.kind(node.args[1])
        if name in self.returns:
            return self.returns[name]
        called = self.kind(node.func)
        if called is None:
            return None
        if called.startswith("type "):
            return called.removeprefix("type ")
        self._check_keywords(node, called)
        return self._returned(self._doc(called))

    def _attribute(self, node: ast.Attribute) -> str | None:
        if ast.unparse(node) in self.own:
            return self.own[ast.unparse(node)]
        if ast.unparse(node.value) in ("api", "trt.api", "self.trt.api", "self.api", "cast(Any, trt.api)"):
            return self._look_up(node.attr, self.uses.api, node.attr)
        owner = self.kind(node.value)
        if owner is None or owner.startswith("method "):
            return None
        name = owner.removeprefix("type ")
        return self._look_up(f"{name}.{node.attr}", self._named(name), node.attr)

    def _look_up(self, full: str, owner: Any, name: str) -> str | None:
        if owner is None:  # the class is missing, and that was said where it was named
            return None
        self.uses.found.add(full)
        if not hasattr(owner, name):
            self.uses.missing.add(full)
            return None
        value = getattr(owner, name)
        if isinstance(value, type):
            return f"type {full}"
        if isinstance(value, property):
            return self._returned(value.fget.__doc__ or "")
        return f"method {full}" if callable(value) else None

    def _named(self, full: str) -> Any:
        """What has a name like "ILogger.Severity" in the SDK; None where it lacks it."""
        found = self.uses.api
        for name in full.split("."):
            found = getattr(found, name, None)
        return found

    def _doc(self, called: str) -> str:
        return self._named(called.removeprefix("method ")).__doc__ or ""

    def _returned(self, doc: str) -> str | None:
        """The class that a signature ends in: `(self: a.b.Builder) -> a.b.IBuilderConfig`."""
        if not (found := re.search(r"\) -> (?:\w+(?:\.|::))+(\w+)", doc)):
            return None
        # A class that the bindings name after its signature stands there as in C++, IParserError for ParserError.
        return found[1] if hasattr(self.uses.api, found[1]) else found[1].removeprefix("I")

    def _check_keywords(self, node: ast.Call, called: str) -> None:
        for keyword in node.keywords:
            if keyword.arg and not re.search(rf"\b{keyword.arg}\b *:", self._doc(called)):
                self.uses.missing.add(f"{called.removeprefix('method ')}({keyword.arg}=)")


def _annotated(annotation: ast.expr | None) -> str | None:
    """The SDK's class, or classes, in an annotation: `tensorrt.Runtime`, `"tensorrt.IHostMemory | None"`."""
    if annotation is None:
        return None
    found = re.findall(r"\btensorrt\.(\w+)", ast.unparse(annotation))
    return " ".join(found) or None
