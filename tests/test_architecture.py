"""Imports go one way, the core needs torch alone, and its documentation runs."""

import ast
import doctest
import importlib
import sys
from pathlib import Path

import pytest

import snr_hooks

PACKAGE = Path(snr_hooks.__file__).parent
ALLOWED = {
    "_names": set(),
    "_text": set(),
    "products": set(),
    "ritz": set(),
    "rows": set(),
    "subspace": {"ritz", "rows"},
    "sharding": {"_names"},
    "penalties": {"_text"},
    "observation": set(),
    "views": {"_text", "observation", "products", "sharding"},
    "blocks": {"_text", "products", "views"},
    "operators": {"_text", "observation", "products", "views"},
    "choices": {"_text", "penalties", "views"},
    "layouts": {"_text", "blocks"},
    "effective": {"products", "views"},
    "modules": {"layouts"},
    "viewing": {
        "_names",
        "choices",
        "effective",
        "layouts",
        "modules",
        "observation",
        "operators",
        "sharding",
        "views",
    },
    "discovery": {"_text", "choices", "modules", "penalties", "viewing", "views"},
    "estimators": {"discovery", "products", "sharding", "subspace", "views"},
    "hooks": {"discovery"},
    "checks": {"choices", "discovery", "sharding"},
    "term": {"checks", "choices", "discovery", "estimators", "penalties", "sharding", "views"},
    "optimizer": {
        "_names",
        "checks",
        "choices",
        "discovery",
        "estimators",
        "hooks",
        "modules",
        "sharding",
        "term",
    },
    "diagnostics": {"_text", "choices", "discovery", "estimators"},
    "lipschitz": {"checks", "diagnostics", "discovery", "layouts", "operators", "viewing"},
    "__init__": {"choices", "diagnostics", "discovery", "lipschitz", "optimizer", "penalties"},
}


def imports(path):
    """Yield the full name of every module that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            yield node.module


def test_every_module_is_listed():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ALLOWED)


@pytest.mark.parametrize("module", ALLOWED)
def test_imports_go_one_way(module):
    for name in imports(PACKAGE / f"{module}.py"):
        package, _, inner = name.partition(".")
        if package == "snr_hooks":
            assert inner in ALLOWED[module], f"{module} imports {name}"
        else:
            assert package == "torch" or package in sys.stdlib_module_names, name


def test_recipes_use_public_names_only():
    for path in (PACKAGE.parent / "recipes").rglob("*.py"):
        for name in imports(path):
            assert not name.startswith("snr_hooks."), f"{path} imports {name}"


@pytest.mark.parametrize("module", ALLOWED)
def test_docstring_examples_run(module):
    name = "snr_hooks" if module == "__init__" else f"snr_hooks.{module}"
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_public_names_exist():
    assert all(hasattr(snr_hooks, name) for name in snr_hooks.__all__)
    assert {"SNROptimizer", "discover", "audit"} <= set(snr_hooks.__all__)
