"""The shape of the repository: who imports whom, how long files and functions are, docstrings."""
import ast
import builtins
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = {"train": 1040, "model": 602, "loss": 317, "data": 903, "schedule": 290, "evaluate": 675,
         "draw": 592, "people": 183, "predict": 157, "export": 286}
MAY_IMPORT = {"train": set(LINES) - {"train"}, "predict": {"evaluate", "model", "data", "draw"},
              "export": {"evaluate", "model", "data", "draw"},
              "evaluate": {"model", "data", "draw"}}
PACKAGES = {"torch", "torchvision", "numpy", "PIL", "pycocotools"}
FILES = {path.stem: ast.parse(path.read_text()) for path in ROOT.glob("*.py")}


def imported(tree: ast.Module, deep: bool = True) -> set[str]:
    nodes = list(ast.walk(tree)) if deep else tree.body
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_form_a_tree_of_known_packages(name):
    import sys
    found = imported(FILES[name])
    assert found & set(LINES) <= MAY_IMPORT.get(name, set())
    optional = {"onnx", "onnxruntime"} if name == "export" else set()  # imported where used
    assert found - set(LINES) - set(sys.stdlib_module_names) <= PACKAGES | optional
    assert not imported(FILES[name], deep=False) & optional


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_and_functions_can_be_read(name):
    text = (ROOT / f"{name}.py").read_text().splitlines()
    long = [number for number, line in enumerate(text, 1) if len(line) > 100]
    assert long == [], "lines of more than 100 columns"
    for node in ast.walk(FILES[name]):
        if isinstance(node, ast.FunctionDef):
            longest = {"main": 120, "parse_args": 180}.get(node.name, 60)
            assert node.end_lineno - node.lineno < longest, node.name


def test_files_are_no_longer_than_said():
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in FILES}
    assert lines.keys() == LINES.keys(), "a new file goes into LINES, its imports into MAY_IMPORT"
    assert {n: lines[n] for n in lines if lines[n] > LINES[n]} == {}, "if it must be, raise LINES"


@pytest.mark.parametrize("name", sorted(FILES))
def test_public_things_have_a_docstring(name):
    assert ast.get_docstring(FILES[name])
    for node in FILES[name].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main":
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/*.py")), ids=lambda path: path.stem)
def test_lines_of_tests_fit_a_screen(path):
    assert max(map(len, path.read_text().splitlines())) <= 100


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]),
                         ids=lambda path: path.name)
def test_every_name_comes_from_somewhere_and_every_import_is_used(path):
    """Also in tests/bench.py and others that no test runs."""
    tree = list(ast.walk(ast.parse(path.read_text())))
    imports = {(alias.asname or alias.name).split(".")[0] for node in tree
               if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    made = {node.name for node in tree
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)) and node.name}
    made |= {node.arg for node in tree if isinstance(node, ast.arg)}
    made |= {node.id for node in tree
             if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    used = {node.id for node in tree if isinstance(node, ast.Name)}
    assert not used - made - imports - {"__file__", "__name__", "__doc__", *dir(builtins)}
    assert not imports - used


def test_fixtures_stay_small():
    assert sum(path.stat().st_size for path in ROOT.glob("tests/*.npz")) <= 500_000
