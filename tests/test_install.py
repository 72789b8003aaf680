"""Where the project stands: installed with few packages, copied, moved, beside other projects."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import nbformat
import pytest

import xwing_utils as xu

BARE = """
import sys
for name in BLOCKED:
    sys.modules[name] = None  # importing it fails
import xwing_utils as xu
from xwing import detector, tracking
assert xu.XWING.mesh == xu.ROOT / "xwing" / "data" / "xwing.obj" and xu.XWING.mesh.is_file()
tracking.main(ARGUMENTS)
points, confidence, _ = detector.Detector(WEIGHTS)(xu.read_image(FRAME))
print("found", int((confidence[:8] > xu.MIN_CONFIDENCE).sum()))
"""


@pytest.fixture(scope="module")
def packages(root):
    """The packages that pyproject.toml asks for: {"base", "track", "full": names}."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {"base": project["dependencies"], **project["optional-dependencies"]}
    return {part: [re.match(r"[\w-]+", name)[0] for name in asked[part]] for part in asked}


@pytest.fixture
def installed(root, tmp_path):
    """A folder as `pip install .` fills it: modules, and what pyproject.toml adds to them."""
    setup = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    setup = setup["setuptools"]
    folder = tmp_path / "site"
    for module in setup["py-modules"]:
        folder.mkdir(exist_ok=True)
        shutil.copy(root / f"{module}.py", folder)
    for package in setup["packages"]:
        source = root / setup["package-dir"].get(package, package)
        target = folder / package.replace(".", "/")
        target.mkdir(parents=True)
        for file in [*source.glob("*.py")] + [
            source / name for name in setup.get("package-data", {}).get(package, [])
        ]:
            shutil.copy(file, target)
    return folder


def test_everything_is_pinned_and_both_opencv_are_one_version(root, packages):
    text = (root / "requirements.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.M))
    assert {name for names in packages.values() for name in names} <= set(pinned)
    assert pinned["opencv-python"] == pinned["opencv-python-headless"]


def test_an_object_is_tracked_where_only_the_packages_for_that_are(
    root, packages, installed, footage, tmp_path
):
    """The project is installed, and none of the packages for training and notebooks is."""
    from xwing.film import write_clip

    write_clip(footage.images[:6], tmp_path / "box.mp4", 30)
    start = {"frame": 0, "pose": footage.poses[0].tolist()}
    (tmp_path / "start.json").write_text(json.dumps(start), encoding="utf-8")
    arguments = [tmp_path / "box.mp4", "--target", footage.mesh, "--focal", 50]
    arguments += ["--start", tmp_path / "start.json", "--out", tmp_path / "out"]

    names = {"scikit-image": "skimage", "pip-tools": "piptools", "dask[distributed]": "dask"}
    blocked = [names.get(name, name).replace("-", "_") for name in packages["full"]]
    blocked = [name for name in blocked if name != "opencv_python"]
    code = BARE.replace("BLOCKED", repr(blocked))
    code = code.replace("WEIGHTS", repr(str(root / "weights" / "xwing.weights.h5")))
    code = code.replace("FRAME", repr(str(root / "data" / "frames" / "060.jpg")))
    code = code.replace("ARGUMENTS", repr([str(argument) for argument in arguments]))
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "6 frames: 6 tracked" in done.stdout
    assert "found 8" in done.stdout
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"track.csv", "overlay.mp4"}


def programs(root):
    """The project's own code: {path: text}, also that of the notebooks."""
    files = [root / "xwing_utils.py", root / "tests" / "run_notebook.py"]
    files += [path for name in ("xwing", "data", "tools") for path in (root / name).glob("*.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    for path in (root / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        texts[path] = re.sub("^ *[%!].*", "", code, flags=re.M)  # for IPython, not for Python
    return texts


@pytest.fixture(scope="module")
def trees(root):
    """The nodes of each program: {path: list of ast nodes}."""
    return {path: list(ast.walk(ast.parse(text))) for path, text in programs(root).items()}


def test_another_package_may_be_called_data(trees):
    """What lies in data/ is imported by file."""
    for path, nodes in trees.items():
        names = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        names += [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
        assert "data" not in [name.partition(".")[0] for name in names if name], path


def test_no_program_needs_its_docstrings(trees):
    """Python run with -OO has none."""
    for path, nodes in trees.items():
        assert "__doc__" not in [node.id for node in nodes if isinstance(node, ast.Name)], path


# ------------------------------------------------------------ copies


@pytest.mark.parametrize("stamp, sets_up", [("here", False), ("/elsewhere", True), ("", True)])
def test_make_sets_up_a_copied_or_moved_folder_anew(root, tmp_path, stamp, sets_up):
    for name in ("Makefile", "pyproject.toml", "requirements.txt"):
        shutil.copy(root / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    stamp = str(tmp_path.resolve()) if stamp == "here" else stamp
    (tmp_path / ".venv" / "installed").write_text(f"{stamp}\n", encoding="utf-8")
    command = ["make", "--dry-run", "animation"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("-m venv .venv" in done.stdout) == sets_up
    assert "notebooks/pnp.ipynb" in done.stdout


def test_a_copy_does_not_use_the_code_of_the_original(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "xwing_utils.py").touch()
    for folder in (tmp_path, tmp_path / "notebooks"):
        with pytest.raises(ImportError, match="another copy of this project .* run make in it"):
            xu._check_copy(folder)
    xu._check_copy(xu.ROOT / "notebooks")
    xu._check_copy(tmp_path.parent)


# ------------------------------------------------------------ what stands in the environment


def test_python_without_docstrings_is_refused_before_keras_fails(monkeypatch):
    monkeypatch.setattr(xu.sys, "flags", SimpleNamespace(optimize=2))
    with pytest.raises(ImportError, match="unset PYTHONOPTIMIZE"):
        xu.import_keras()


@pytest.mark.parametrize("backend", ["theano", "openvino", "numpy"])
def test_a_backend_that_cannot_be_used_is_refused(monkeypatch, backend):
    monkeypatch.setenv("KERAS_BACKEND", backend)
    with pytest.raises(ImportError, match=f"KERAS_BACKEND: expected one of .* got '{backend}'"):
        xu.import_keras()


def opens_text(node):
    """Whether a node is a call that reads or writes a text file in the encoding of the locale."""
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    named = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in ("read_text", "write_text"):
        return "encoding" not in named
    module = getattr(getattr(node.func, "value", None), "id", "")
    if name not in ("open", "TemporaryFile", "NamedTemporaryFile") or module in ("Image", "av"):
        return False
    if name != "open" and "mode" not in named and not node.args:
        return False  # temporary files are binary, if nothing else is said
    words = [getattr(value, "value", "") for value in [*node.args, *named.values()]]
    binary = any(
        isinstance(word, str) and re.fullmatch("[rwax+]*b[rwax+]*", word) for word in words
    )
    return not binary and "encoding" not in named


def test_the_encoding_of_the_locale_is_never_used(trees):
    """Every text file that the project reads or writes is UTF-8."""
    bad = 'open("a"); p.open("w"); p.read_text(); p.write_text("x"); open("a", "r+")'
    good = 'open("a", "rb"); p.open(mode="wb"); p.read_text(encoding="utf-8"); Image.open("a")'
    assert sum(map(opens_text, ast.walk(ast.parse(bad)))) == 5
    assert not any(map(opens_text, ast.walk(ast.parse(good))))
    for path, nodes in trees.items():
        lines = [node.lineno for node in nodes if opens_text(node)]
        assert not lines, (path, lines)
