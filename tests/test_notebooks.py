"""Notebooks without a browser: none of them hangs, and their runner names the cell that failed."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import nbformat
import numpy as np
import pytest
import run_notebook
from PIL import Image

import xwing_utils as xu
from xwing.evaluation import true_poses
from xwing.film import write_clip
from xwing.footage import Clip
from xwing.overlay import viewer

NAMES = ("reference", "train", "eval", "eval_tracks", "pnp", "own")
VIEWER = """import numpy as np
from xwing.overlay import viewer

pictures = (np.full((256, 256, 3), 25 * i, np.uint8) for i in range(10))
viewer(pictures, start=3)"""


def notebook(path, *cells):
    """Write a notebook of code cells; return its path."""
    cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def move_slider(widget, frame):
    """Move the viewer's slider to a frame; return the JPEG that shows, and the seconds it took."""
    image, controls = widget.children
    start = time.perf_counter()
    controls.children[1].value = frame
    return bytes(image.value), time.perf_counter() - start


@pytest.mark.parametrize("name", NAMES)
def test_no_notebook_uses_a_widget_that_captures_output(root, name):
    cells = json.loads((root / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    widgets = r"\b(interact|interactive|interact_manual|interactive_output|Output)\b"
    assert not re.search(widgets, code)


@pytest.mark.parametrize("name", NAMES)
def test_execution_counts_run_from_one(root, name):
    cells = json.loads((root / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))


BAR = """import os
from tqdm.auto import tqdm
for _ in tqdm(range(7), "steps"):
    pass
print(os.environ["MPLBACKEND"])"""


def test_the_terminal_shows_what_a_notebook_prints(tmp_path, capfd, monkeypatch):
    """Nothing of what a kernel or TensorFlow says when it starts; figures are drawn inline."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    warn = "import sys\nprint('{}', file=sys.stderr)"
    log = warn.format("messages before absl::InitializeLog() are written to STDERR")
    cells = (
        log,
        warn.format("this is meant"),
        "print('fine')",
        BAR,
        f"RUN = {str(tmp_path)!r} + '/run'",
    )
    path = notebook(tmp_path / "log.ipynb", *cells)
    content = nbformat.read(path, as_version=4)
    content.cells.insert(2, nbformat.v4.new_markdown_cell("## Results\n\nThey are here."))
    nbformat.write(content, path)
    assert run_notebook.run_notebook(path, "RUN", limit=60) == ""

    said = capfd.readouterr()
    inline = "module://matplotlib_inline.backend_inline"
    bar = "steps: 100%|████████████████████| 7/7 ["
    start, shown, end = said.out.partition(bar)
    assert start == "  this is meant\nResults\n  fine\n  " and said.err == ""
    assert shown and re.match(rf"[^\n]*it/s\]\n  {inline}\n", end)
    cells = nbformat.read(tmp_path / "run" / "log.ipynb", as_version=4).cells
    texts = [[o.get("text", "").strip() for o in cell.get("outputs", [])] for cell in cells]
    assert texts == [[], ["this is meant"], [], ["fine"], ["", inline], []]
    assert cells[4].outputs[0].data["text/plain"].startswith(bar)


def test_viewer_runs_ten_times_without_a_browser(root, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(root))
    path = notebook(tmp_path / "viewer.ipynb", *VIEWER.split("\n\n"))
    for _ in range(10):
        assert run_notebook.run_notebook(path, tmp_path / "out.ipynb", limit=60) == ""
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert "application/vnd.jupyter.widget-view+json" in executed.cells[-1].outputs[0].data


def test_viewer_shows_each_picture_within_50_ms():
    widget = viewer((np.full((720, 1280, 3), 20 * i, np.uint8) for i in range(12)), start=4)
    image, controls = widget.children
    assert controls.children[1].value == 4
    assert controls.layout.width == image.layout.width == "640px"
    assert controls.children[1].layout.flex.startswith("1 ")  # the slider fills the rest
    jpegs = {}
    for frame in (11, 0, 5, 4):
        jpegs[frame], seconds = move_slider(widget, frame)
        assert seconds < 0.05
    assert len(set(jpegs.values())) == 4
    assert all(jpeg.startswith(b"\xff\xd8") for jpeg in jpegs.values())


@pytest.mark.parametrize(
    "cell, limit, said",
    [
        ("import time\ntime.sleep(60)", "4", r"cell \[2\] took longer than 4 s.*: import time$"),
        ("\n1 / 0", "60", r"cell \[2\] failed.*: 1 / 0$"),
    ],
)
def test_runner_names_the_cell_that_ended_it(tmp_path, monkeypatch, cell, limit, said):
    path = notebook(tmp_path / "stops.ipynb", "x = 1", cell, "y = 2")
    before = path.read_bytes()
    monkeypatch.setattr(sys, "argv", ["run_notebook.py", "--limit", limit, "--inplace", str(path)])
    with pytest.raises(SystemExit, match=said) as ended:
        run_notebook.main()
    assert str(path) in ended.value.code
    assert path.read_bytes() == before


def test_runner_waits_for_no_kernel_for_ever(tmp_path, monkeypatch):
    folder = tmp_path / "kernels" / "silent"
    folder.mkdir(parents=True)
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    kernel = {"argv": sleeps, "display_name": "silent", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setattr(run_notebook, "KERNEL_SECONDS", 1)
    path = notebook(tmp_path / "silent.ipynb", "x = 1")
    content = nbformat.read(path, as_version=4)
    content.metadata["kernelspec"] = {"name": "silent", "display_name": "silent"}
    nbformat.write(content, path)
    fault = run_notebook.run_notebook(path, tmp_path / "out.ipynb", limit=5)
    assert "the kernel did not start" in fault


@pytest.fixture(scope="module")
def clips(root, tmp_path_factory):
    """A folder with a flight as a video, a part of it as PNGs with matrices, and a black video."""
    folder = tmp_path_factory.mktemp("clips")
    paths = xu.list_frames(root / "data" / "frames")[60:120]
    frames = [xu.read_image(path) for path in paths]
    write_clip(frames, folder / "flight.mp4", 30)
    write_clip([0 * frame for frame in frames[:20]], folder / "black.mp4", 30)
    matrices = [xu.read_json(path.with_name(f"{path.stem}_mat.json")) for path in paths[:30]]
    matrices[-5][2][3] += 3  # the ship has passed the camera
    camera = (root / "data" / "frames" / "camera_info.json").read_text(encoding="utf-8")
    write_set(folder / "rendered", frames[:30], matrices, camera)
    return folder


def write_set(folder, frames, matrices, camera):
    """Write frames as shot_0001.png, ..., each with its matrix beside it, and the camera's file."""
    folder.mkdir()
    for number, (frame, matrix) in enumerate(zip(frames, matrices), 1):
        Image.fromarray(frame).save(folder / f"shot_{number:04}.png")
        text = json.dumps(matrix)
        (folder / f"shot_{number:04}_mat.json").write_text(text, encoding="utf-8")
    (folder / "camera_info.json").write_text(camera, encoding="utf-8")


CLAIM = "no frame is flipped"
UNKNOWN = "the true poses are not known"


@pytest.mark.parametrize(
    "settings, says, says_not",
    [
        ({"SOURCE": "flight.mp4", "ALIGN": "0"}, ["12 frames: 12 tracked", UNKNOWN], CLAIM),
        ({"SOURCE": "rendered", "VIEW": "54.432"}, ["6 frames: 6 tracked", f"{CLAIM}: "], UNKNOWN),
        ({"SOURCE": "black.mp4"}, ["no frame shows the target clearly", UNKNOWN], CLAIM),
    ],
    ids=["keypoints", "matrices and view", "no ship"],
)
def test_pnp_runs_with_other_settings(root, clips, tmp_path, settings, says, says_not):
    settings = {**settings, "SOURCE": str(clips / settings["SOURCE"]), "SMOKE": "1"}
    environment = {**os.environ, **{f"XWING_{name}": value for name, value in settings.items()}}
    runner = [sys.executable, "tests/run_notebook.py", "--limit", "300"]
    command = [*runner, "--output-dir", str(tmp_path), "notebooks/pnp.ipynb"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = nbformat.read(tmp_path / "pnp.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    assert all(text in printed for text in says) and says_not not in printed
    *_, last = (cell.outputs for cell in cells if cell.get("outputs"))
    assert "tracked" in last[0].text and "anim.mp4: " in last[0].text


def test_true_poses_are_those_of_the_matrices_also_behind_the_camera(root, clips):
    poses = true_poses(Clip(clips / "rendered", 5))
    view, _ = xu.load_camera(root / "data" / "frames")
    matrix = xu.read_json(root / "data" / "frames" / "065_mat.json")
    assert len(poses) == 6 and np.allclose(poses[1], xu.pose_in_camera(view, matrix))
    assert poses[5][2, 3] < 0 < poses[4][2, 3]


@pytest.mark.parametrize("missing", ["shot_0007_mat.json", "camera_info.json"])
def test_what_is_missing_of_the_truth_is_named(clips, tmp_path, missing):
    folder = shutil.copytree(clips / "rendered", tmp_path / "copy")
    clip = Clip(folder)
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"copy/{missing}"):
        true_poses(clip)
    (folder / missing).write_text("[[1, 2], [3, 4]]", encoding="utf-8")
    with pytest.raises(ValueError, match=f"copy/{missing}"):
        true_poses(clip)


def test_a_video_has_no_true_poses(clips):
    with pytest.raises(FileNotFoundError, match="flight.mp4: is no folder"):
        true_poses(Clip(clips / "flight.mp4"))
