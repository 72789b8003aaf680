"""The shape of the project: who may import whom, how long files may be, what the README claims."""

import ast
import importlib
import json
import re

import pytest

from xwing import evaluation

ARROWS = {  # file -> the project's own modules that it may import
    "xwing_utils": set(),
    "xwing/__init__": set(),
    "xwing/mesh": {"xwing_utils"},
    "xwing/scenery": {"xwing_utils"},
    "xwing/synthesis": {"xwing_utils", "xwing/mesh", "xwing/scenery"},
    "xwing/alignment": {"xwing_utils", "xwing/mesh"},
    "xwing/tracking": {"xwing_utils", "xwing/alignment"},
    "xwing/footage": {"xwing_utils"},
    "xwing/lens": {"xwing/footage"},
    "xwing/film": {"xwing_utils", "xwing/mesh", "xwing/footage", "xwing/tracking"},
    "xwing/evaluation": {"xwing_utils", "xwing/alignment"},
    "xwing/training": {"xwing_utils", "xwing/evaluation"},
    "data/looks": set(),
    "data/render": {
        "xwing_utils",
        "xwing/mesh",
        "data/looks",
        "data/render",
    },  # itself, for its workers
    "data/make_xwing": set(),
}
OUTSIDERS = {
    "render": "data/render",
    "looks": "data/looks",
    "make_xwing": "data/make_xwing",
    "conftest": "tests",
    "bench": "tests",
}
PACKAGES = "xwing", "data"
CORE_LINES, FILE_LINES, ALL_LINES = 1100, 450, 4635
COLUMNS = 110
FUNCTION_LINES, PARAMETERS = 40, 8
MANY_PARAMETERS = {"animate", "make_dataset"}  # others script against these names


def imported(source):
    """The project's own modules that a Python text imports anywhere, also inside functions, as in ARROWS."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            module = {".": "xwing"}.get(module, re.sub(r"^\.", "xwing.", module))
            names |= (
                {f"{module}.{alias.name}" for alias in node.names}
                if module in PACKAGES
                else {module}
            )
    own = set()
    for name in names:
        first, *rest = name.split(".")
        if first in PACKAGES:
            own.add(f"{first}/{rest[0]}" if rest else f"{first}/__init__")
        elif first == "xwing_utils" or first in OUTSIDERS or first in ("notebooks", "tests"):
            own.add(OUTSIDERS.get(first, first))
    return own


def lines(path):
    return path.read_text().splitlines()


def package(root):
    return sorted((root / "xwing").glob("*.py"))


def test_every_form_of_import_is_seen():
    imports = (
        "import xwing_utils as xu",
        "from xwing import mesh, film as f",
        "import xwing.footage",
        "from xwing.tracking import Tracker",
        "from .training import worker",
        "from . import synthesis",
        "import render, numpy, xwings",
        "from data import looks",
    )
    names = ("mesh", "film", "tracking", "footage", "training", "synthesis")
    late = "def late():\n    " + "\n    ".join(imports)
    own = {f"xwing/{name}" for name in names}
    assert imported(late) == {"xwing_utils", "data/render", "data/looks", *own}


def test_every_file_of_the_package_has_its_arrows(root):
    files = {f"{path.parent.name}/{path.stem}" for path in package(root)}
    assert files == {name for name in ARROWS if name.startswith("xwing/")}


@pytest.mark.parametrize("name", ARROWS)
def test_arrows(root, name):
    assert imported((root / f"{name}.py").read_text()) <= ARROWS[name]


def test_no_circles():
    left = {name: needs - {name} for name, needs in ARROWS.items()}
    while ready := [name for name, needs in left.items() if not needs & set(left)]:
        for name in ready:
            del left[name]
    assert not left


def test_the_core_is_short(root):
    assert len(lines(root / "xwing_utils.py")) <= CORE_LINES


def test_the_package_is_short(root):
    long = {path.name: len(lines(path)) for path in package(root) if len(lines(path)) > FILE_LINES}
    assert not long
    assert sum(len(lines(path)) for path in [root / "xwing_utils.py", *package(root)]) <= ALL_LINES


def test_no_line_is_wide(root):
    files = [
        root / "xwing_utils.py",
        *package(root),
        *root.glob("data/*.py"),
        *root.glob("tests/*.py"),
        root / "README.md",
        root / "Makefile",
        root / "requirements.in",
    ]
    wide = [
        f"{path.relative_to(root)}:{number}"
        for path in files
        for number, line in enumerate(lines(path), 1)
        if len(line) > COLUMNS and not (path.suffix == ".md" and line.startswith("| "))
    ]  # a table's row
    assert not wide


def test_no_line_of_a_notebook_is_wide(root):
    for path in root.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        assert not [line for line in code.splitlines() if len(line) > 100], path.name


def test_functions_are_short_and_take_few_parameters(root):
    wrong = []
    for path in [root / "xwing_utils.py", *package(root)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                names = {argument.arg for argument in node.args.args + node.args.kwonlyargs} - {
                    "self"
                }
                length = (
                    node.end_lineno
                    - node.lineno
                    + 1
                    - len((ast.get_docstring(node) or "").splitlines())
                )
                if (
                    length > FUNCTION_LINES
                    or len(names) > PARAMETERS
                    and node.name not in MANY_PARAMETERS
                ):
                    wrong.append(
                        f"{path.name}: {node.name}: {len(names)} parameters, {length} lines"
                    )
    assert not wrong


def test_the_readme_shows_the_measured_figures(root):
    """Six rows, a column a set: each figure and interval as in weights/xwing_eval.json, to the last digit."""
    measured = json.loads((root / "weights" / "xwing_eval.json").read_text())
    readme = (root / "README.md").read_text()
    table = re.search("<!-- results -->\n(.*)<!-- /results -->", readme, re.DOTALL)[1]
    head, _, *rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()
    ]
    assert head[1:] == list(evaluation.README_SETS) and len(rows) == 6
    for key, (_, *cells) in zip(evaluation.HEADLINES, rows, strict=True):
        for name, cell in zip(head[1:], cells, strict=True):
            wanted = [measured["figures"][name][key], *measured["intervals_95"][name].get(key, ())]
            scale = 100 if "%" in cell else 1
            for number, value in zip(re.findall(r"[\d.]+", cell), wanted, strict=True):
                half_a_digit = 0.501 * 10.0 ** -len(number.partition(".")[2])
                assert abs(float(number) - scale * value) <= half_a_digit, (key, name, cell)


def test_the_readme_s_example_imports_what_there_is(root):
    readme = (root / "README.md").read_text()
    example = re.search("```python\n(import xwing_utils.*?)```", readme, re.DOTALL)[1]
    imports = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        module = importlib.import_module(node.module)
        assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_readme_s_links_lead_somewhere(root):
    text = (root / "README.md").read_text()
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (root / link).exists(), link
