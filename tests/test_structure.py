"""The shape of the project: which room imports which, and what the README claims."""

import ast
import importlib
import json
import re

import pytest

from xwing import evaluation

ROOMS = {  # file -> the project's own modules that it imports, no more and no fewer
    "xwing_utils": set(),
    "xwing/__init__": set(),
    "xwing/mesh": {"xwing_utils"},
    "xwing/appearance": {"xwing_utils", "xwing/mesh"},
    "xwing/contour": {"xwing_utils"},
    "xwing/refinement": {"xwing_utils", "xwing/mesh", "xwing/appearance", "xwing/contour"},
    "xwing/lookalikes": {"xwing_utils", "xwing/mesh"},
    "xwing/verification": {
        "xwing_utils",
        "xwing/appearance",
        "xwing/refinement",
        "xwing/lookalikes",
    },
    "xwing/keyframes": {"xwing_utils", "xwing/mesh", "xwing/appearance"},
    "xwing/edges": {"xwing_utils", "xwing/mesh", "xwing/appearance", "xwing/metrics"},
    "xwing/templates": {"xwing_utils", "xwing/mesh", "xwing/edges", "xwing/scenery"},
    "xwing/alignment": {
        "xwing_utils",
        "xwing/mesh",
        "xwing/refinement",
        "xwing/keyframes",
        "xwing/verification",
    },
    "xwing/starts": {"xwing_utils", "xwing/edges"},
    "xwing/picking": {"xwing_utils", "xwing/mesh", "xwing/overlay"},
    "xwing/motion": {"xwing_utils"},
    "xwing/network": {"xwing_utils"},
    "xwing/sighting": {"xwing_utils"},
    "xwing/detector": {"xwing_utils", "xwing/lookalikes", "xwing/network", "xwing/sighting"},
    "xwing/bop": {"xwing_utils", "xwing/mesh"},
    "xwing/footage": {"xwing_utils", "xwing/detector", "xwing/bop"},
    "xwing/lens": {"xwing_utils", "xwing/footage"},
    "xwing/lasers": {"xwing_utils", "xwing/mesh"},
    "xwing/overlay": {
        "xwing_utils",
        "xwing/appearance",
        "xwing/detector",
        "xwing/footage",
        "xwing/mesh",
    },
    "xwing/pose_figures": {"xwing_utils"},
    "xwing/usd": {"xwing_utils", "xwing/mesh"},
    "xwing/export": {"xwing_utils", "xwing/usd"},
    "xwing/film": {"xwing_utils", "xwing/mesh", "xwing/footage", "xwing/lasers"},
    "xwing/tracker": {"xwing_utils", "xwing/motion", "xwing/footage"},
    "xwing/detections": {
        "xwing_utils",
        "xwing/footage",
        "xwing/templates",
        "xwing/tracker",
    },
    "xwing/parts": {"xwing_utils", "xwing/detections", "xwing/footage", "xwing/tracker"},
    "xwing/tracking": {
        "xwing_utils",
        "xwing/bop",
        "xwing/tracker",
        "xwing/detections",
        "xwing/parts",
        "xwing/lens",
        "xwing/footage",
        "xwing/detector",
        "xwing/alignment",
        "xwing/export",
        "xwing/overlay",
        "xwing/starts",
        "xwing/film",
    },
    "xwing/scenery": {"xwing_utils", "xwing/appearance"},
    "xwing/synthesis": {"xwing_utils", "xwing/mesh", "xwing/appearance", "xwing/scenery"},
    "xwing/figures": {"xwing_utils", "xwing/metrics", "xwing/overlay"},
    "xwing/metrics": {"xwing_utils", "xwing/mesh"},
    "xwing/evaluation": {
        "xwing_utils",
        "xwing/metrics",
        "xwing/bop",
        "xwing/detector",
        "xwing/footage",
        "xwing/tracker",
        "xwing/alignment",
        "xwing/verification",
    },
    "xwing/training": {"xwing_utils", "xwing/metrics"},
    "xwing/encoders": {"xwing_utils"},
    "xwing/learnability": {"xwing_utils", "xwing/mesh"},
    "data/looks": set(),
    # data/render imports itself in its worker processes.
    "data/render": {"xwing_utils", "xwing/mesh", "xwing/film", "data/looks", "data/render"},
    "data/make_xwing": set(),
    "data/make_objects": set(),
    "data/render_objects": {"xwing_utils", "xwing/mesh", "data/render"},
}
OUTSIDERS = {  # module that is imported without its package -> file or folder
    "render": "data/render",
    "looks": "data/looks",
    "make_xwing": "data/make_xwing",
    "make_objects": "data/make_objects",
    "render_objects": "data/render_objects",
    "conftest": "tests",
    "bench": "tests",
}
PACKAGES = ("xwing", "data")


def from_imports(node):
    """The modules that `from ... import ...` reads; a relative import is one within xwing."""
    module = "." * node.level + (node.module or "")
    if module == ".":
        module = "xwing"
    module = re.sub(r"^\.", "xwing.", module)
    if module in PACKAGES:
        return {f"{module}.{alias.name}" for alias in node.names}
    return {module}


def imported(source):
    """The project's own files that a Python text imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= from_imports(node)

    own = set()
    for name in names:
        first, *rest = name.split(".")
        if first in PACKAGES:
            own.add(f"{first}/{rest[0]}" if rest else f"{first}/__init__")
        elif first == "xwing_utils" or first in OUTSIDERS or first in ("notebooks", "tests"):
            own.add(OUTSIDERS.get(first, first))
    return own


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


def test_every_file_is_a_room_of_the_plan(root):
    files = {f"{path.parent.name}/{path.stem}" for path in root.glob("xwing/*.py")}
    files |= {f"{path.parent.name}/{path.stem}" for path in root.glob("data/*.py")}
    assert files | {"xwing_utils"} == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_what_the_plan_says(root, name):
    assert imported((root / f"{name}.py").read_text()) == ROOMS[name]


def test_no_circles():
    left = {name: needs - {name} for name, needs in ROOMS.items()}
    while ready := [name for name, needs in left.items() if not needs & set(left)]:
        for name in ready:
            del left[name]
    assert not left


def test_the_readme_shows_the_measured_figures(root):
    """Each figure and interval is that of weights/xwing_eval.json, to the last digit."""
    measured = json.loads((root / "weights" / "xwing_eval.json").read_text())
    readme = (root / "README.md").read_text()
    table = re.search("<!-- results -->\n(.*)<!-- /results -->", readme, re.DOTALL)[1]
    cells = [row.strip("|").split("|") for row in table.splitlines()]
    head, _, *rows = [[cell.strip() for cell in row] for row in cells]
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
