"""Which tests cannot fail: found by following, through the tests' own helpers, what each test names to an assertion."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.source_tree import ROOT, parse, python_files

# Of pytest; names that begin with "assert" and are nobody's here are taken to be torch.testing's, numpy's or a mock's.
ASSERTING = {"raises", "warns", "fail", "deprecated_call"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Module:
    """A file of tests: its definitions, the methods of its classes, and what it imports of tests/."""

    def __init__(self, path: Path) -> None:
        self.tree = parse(path)
        self.definitions: dict[str, list[ast.AST]] = {}
        self.methods: dict[str, list[ast.AST]] = {}
        for node in self.tree.body:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                self.definitions.setdefault(node.name, []).append(node)
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                for target in ast.walk(node):
                    if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                        self.definitions.setdefault(target.id, []).append(node)
            if isinstance(node, ast.ClassDef):
                for method in (item for item in node.body if isinstance(item, FUNCTIONS)):
                    self.methods.setdefault(method.name, []).append(method)
        self.imported: dict[str, tuple[Path, str]] = {}  # local name -> file, name there; "" if it is the file itself
        for node in (node for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom)):
            for alias in node.names:
                as_module, as_name = _file(f"{node.module}.{alias.name}"), _file(f"{node.module}")
                if as_module is not None:
                    self.imported[alias.asname or alias.name] = (as_module, "")
                elif as_name is not None:
                    self.imported[alias.asname or alias.name] = (as_name, alias.name)


def _file(module: str) -> Path | None:
    path = ROOT / f"{module.replace('.', '/')}.py"
    return path if module.startswith("tests.") and path.exists() else None


read = cache(Module)


def collected_tests(path: Path) -> dict[str, ast.AST]:
    """Name -> node of every test that pytest collects from the file."""
    module, tests = read(path), {}
    for name, nodes in module.definitions.items():
        for node in nodes:
            if name.startswith("test") and isinstance(node, FUNCTIONS):
                tests[name] = node
            elif name.startswith("Test") and isinstance(node, ast.ClassDef):
                tests |= {f"{name}::{method.name}": method for method in _test_methods(node)}
            elif name.startswith("Test") and isinstance(node, ast.Assign):
                tests[name] = node  # TestMachine = Machine.TestCase
    return tests


def _test_methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name.startswith("test")]


def misplaced_tests(path: Path) -> list[str]:
    """Functions named test_* that pytest does not collect: in a file of another name, in a function, or hidden."""
    collected = {id(node) for node in collected_tests(path).values()} if path.name.startswith("test_") else set()
    functions = [node for node in ast.walk(read(path).tree) if isinstance(node, FUNCTIONS)]
    return [node.name for node in functions if node.name.startswith("test_") and id(node) not in collected]


def can_fail(path: Path, test: ast.AST) -> bool:
    """Whether the test asserts, or names something of tests/ that does; what is named there is followed too."""
    seen: set[int] = set()
    waiting = [(path, test)]
    while waiting:
        file, node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if any(_asserts(child) for child in ast.walk(node)):
            return True
        for name, attributes in _names(node):
            found = list(_resolved(file, name, attributes))
            last = attributes[-1] if attributes else name
            if not found and (last.startswith("assert") or (name == "pytest" and last in ASSERTING)):
                return True
            waiting += found
    return False


def _asserts(node: ast.AST) -> bool:
    return isinstance(node, ast.Assert) or (isinstance(node, ast.Raise) and "AssertionError" in ast.dump(node))


def _names(node: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Each name in `node` with the attributes taken of it: cases.CHECKS[x].run is ("cases", ["CHECKS", "run"])."""
    inner: set[int] = set()
    for child in ast.walk(node):  # outer expressions come before those within them
        attributes: list[str] = []
        while isinstance(child, ast.Attribute | ast.Call | ast.Subscript):
            if id(child) in inner:
                break
            inner.add(id(child))
            if isinstance(child, ast.Attribute):
                attributes.insert(0, child.attr)
            child = child.func if isinstance(child, ast.Call) else child.value
        if isinstance(child, ast.Name) and (attributes or id(child) not in inner):
            inner.add(id(child))
            yield child.id, attributes
        elif attributes:
            yield "", attributes


def _resolved(file: Path, name: str, attributes: list[str]) -> Iterator[tuple[Path, ast.AST]]:
    """What of tests/ it stands for: a function, a value, a method; of a class, what runs without being called."""
    module = read(file)
    if name in module.imported:
        other, imported = module.imported[name]
        yield from _defined(other, imported or (attributes[0] if attributes else ""))
    else:
        yield from _defined(file, name)
    for source in {file, *(path for path, _ in module.imported.values())}:
        for attribute in attributes:
            yield from ((source, method) for method in read(source).methods.get(attribute, []))


def _defined(file: Path, name: str) -> Iterator[tuple[Path, ast.AST]]:
    for node in read(file).definitions.get(name, []):
        if isinstance(node, ast.ClassDef):
            methods = (item for item in node.body if isinstance(item, FUNCTIONS))
            yield from ((file, item) for item in methods if item.name.startswith("__") or item.decorator_list)
            yield from ((file, base) for base in node.bases)
        else:
            yield file, node


def files_of_tests() -> list[Path]:
    return [path for path in python_files("tests") if path.name.startswith("test_")]
