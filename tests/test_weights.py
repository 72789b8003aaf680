"""The weights that come with the project: they load, and find corners and poses in frames that they were not trained on."""

import json
import re

import numpy as np
import pytest

import xwing_utils as xu

FRAMES = 64  # of data/test


@pytest.fixture(scope="module")
def weights(root):
    path = root / "weights" / "xwing.weights.h5"
    for file in (path, path.with_name("xwing.json"), path.with_name("xwing_eval.json")):
        if not file.exists():
            pytest.fail(f"{file} is missing; train with notebooks/train.ipynb, or restore it with git checkout weights", pytrace=False)
    return path


@pytest.fixture(scope="module")
def measured(weights):
    """What was measured when the weights were shipped, over all of data/test."""
    return json.loads(weights.with_name("xwing_eval.json").read_text())["figures"]


@pytest.fixture(scope="module")
def found(weights, root):
    """The figures of the first frames of data/test."""
    folder = root / "data" / "test"
    paths, matrices = xu.load_dataset(folder)
    view, projection = xu.load_camera(folder)
    K = xu.camera_matrix(projection, 256, 256)
    aligner = xu.Aligner(xu.load_mesh(root / "data" / "xwing.obj"))
    keypoints, _, poses = xu.track_frames(xu.load_model(weights), paths[:FRAMES], K, progress=False, aligner=aligner)
    truth = [xu.pose_in_camera(view, m) for m in matrices[:FRAMES]]
    return xu.evaluate(keypoints, poses, xu.keypoints_of(matrices[:FRAMES], view, projection), np.array(truth))


def test_shipped_weights_are_small(weights):
    assert weights.stat().st_size < 40e6


def test_shipped_weights_find_the_corners(found, measured):
    assert found["corner_px_median"] < measured["test"]["corner_px_median"] * 1.5


def test_shipped_weights_find_poses_in_most_frames(found, measured):
    assert found["poses_found"] > 0.9
    assert found["rotation_deg_median"] < measured["test"]["rotation_deg_median"] * 2


def test_readme_shows_the_measured_figures(root):
    info = json.loads((root / "weights" / "xwing_eval.json").read_text())
    assert xu.results_table(info["figures"], info["intervals_95"]) in (root / "README.md").read_text()


def track_table(root):
    """The rows of pnp.ipynb's comparison, as the README shows them."""
    cells = json.loads((root / "notebooks" / "pnp.ipynb").read_text())["cells"]
    printed = "".join("".join(o.get("text", [])) for c in cells for o in c.get("outputs", []) if "compare_tracks" in "".join(c["source"]))
    rows = re.findall(r"^(frame by frame|live filter|both sides, \w+) +(.*)$", printed, re.M)
    assert len(rows) == 4
    for way, values in rows:
        poses, turn, most, move, flips, shake, tremble, muzzles = map(float, values.split())
        yield (f"| {way} | {poses:.0f} | {turn:.2f}° | {most:.1f}° | {move:.4f} | {flips:.0f} | {shake:.0f} | {tremble:.2f} | {muzzles:.1%} |")


def test_readme_shows_the_track_that_the_notebook_prints(root):
    assert "\n".join(track_table(root)) in (root / "README.md").read_text()
