"""tests/RELIABILITY.md names tests that exist, and says which of them are slow."""

import ast
import functools
import pathlib
import re

import pytest

HERE = pathlib.Path(__file__).parent
TEXT = (HERE / "RELIABILITY.md").read_text()
ROWS = [
    line.split("|")[1:-1]
    for line in TEXT.splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| Fault"))
]
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`( \((?:slow|parity)\))?")


@functools.cache
def marks(file: str) -> dict[str, set[str]]:
    """Test -> the marks above it; of one that is slow for some parameters, none."""
    tree = ast.parse((HERE / file).read_text())
    return {
        node.name: {
            part.attr
            for decorator in node.decorator_list
            for part in [
                decorator.func if isinstance(decorator, ast.Call) else decorator
            ]
            if isinstance(part, ast.Attribute)
        }
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip()[:40])
def test_each_promise_has_a_test(row):
    fault, promise, tests, _ = row
    found = NAMED.findall(tests)
    assert fault.strip() and promise.strip()
    assert found or "`make chaos`" in tests
    for file, name, mark in found:
        assert name in marks(file), f"{file}::{name}"
        assert ("slow" in marks(file)[name]) == (mark == " (slow)"), name
    assert not NAMED.sub("", tests).replace("`make chaos`", "").strip(", "), tests


def test_the_target_is_there():
    makefile = (HERE.parent / "Makefile").read_text()
    assert re.search(r"^chaos:.*\n\t.*tests\.chaos$", makefile, re.MULTILINE)
