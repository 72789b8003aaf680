"""Starts that a person gives: pins, their refinement, and their file."""

import json

import numpy as np
import pytest
from conftest import Footage
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing import starts
from xwing.alignment import Aligner

K = xu.lens_camera(640, 480, 35)
POSE = np.eye(4)
POSE[:3, :3] = Rotation.from_euler("xyz", [130, 20, 40], degrees=True).as_matrix()
POSE[:3, 3] = [0.03, -0.02, 0.8]
CHOSEN = np.array([0, 3, 5, 8, 12, 17])  # numbers of pinned points of the X-wing


@pytest.fixture(scope="module")
def points():
    return starts.points_shown(xu.XWING)


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    """A frame of a box in one colour, with its true pose."""
    made = Footage(tmp_path_factory.mktemp("plain"), count=3)
    made.texture[:] = 190
    made.images = [made.draw(made.poses[0], np.random.default_rng(0))]
    return made


@pytest.fixture(scope="module")
def box(footage):
    return Aligner(xu.load_target(footage.mesh))


def pinned(points, pose=POSE, chosen=CHOSEN):
    """Points of the X-wing and where they show."""
    return points[chosen], xu.project_pose(points[chosen], pose, K)


def place(pose, target=xu.XWING):
    """Where the middle of a target's box is."""
    return pose[:3, :3] @ target.box.mean(0) + pose[:3, 3]


def test_the_points_shown_are_spread_over_the_surface(points):
    apart = np.linalg.norm(points[:, None] - points, axis=2) + np.eye(len(points))
    assert len(points) == 28
    assert apart.min() > 0.04 * xu.DIAMETER


@pytest.mark.parametrize("count", [4, 6])
def test_exact_pins_give_the_pose(points, count):
    pose, residuals = starts.solve_pins(*pinned(points, chosen=CHOSEN[:count]), K)
    assert np.allclose(pose, POSE, atol=1e-5)
    assert residuals.shape == (count,) and residuals.max() < 1e-2


def test_pins_on_one_plane_and_a_far_origin_give_the_pose():
    square = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0.3, 0.6, 0]]) * 0.3 + 1000
    pose = POSE.copy()
    pose[:3, 3] -= pose[:3, :3] @ square.mean(0)
    found, _ = starts.solve_pins(square, xu.project_pose(square, pose, K), K)
    assert xu.rotation_error(found, pose) < 0.01
    assert np.allclose(xu.project_pose(square, found, K), xu.project_pose(square, pose, K))


def test_hasty_clicks_leave_residuals_as_large(points):
    chosen, pixels = pinned(points)
    noise = np.random.default_rng(0).normal(0, 5, pixels.shape)
    pose, residuals = starts.solve_pins(chosen, pixels + noise, K)
    assert xu.rotation_error(pose, POSE) < 10
    assert 1 < residuals.mean() < 10


def test_one_bad_pin_of_eight_counts_little(points):
    chosen, pixels = pinned(points, chosen=[*CHOSEN, 20, 25])
    pixels[4] += [36, 28]
    pose, residuals = starts.solve_pins(chosen, pixels, K)
    assert xu.rotation_error(pose, POSE) < 0.1
    assert residuals[4] == pytest.approx(np.hypot(36, 28), abs=0.5)


def spoil(points, pixels, fault):
    """Pins with one fault."""
    points, pixels = points.copy(), pixels.copy()
    if fault == "three":
        return points[:3], pixels[:3]
    if fault == "nan":
        pixels[0, 0] = np.nan
    elif fault == "point":
        points[3] = points[1]
    elif fault == "pixel":
        pixels[2] = pixels[5] + 0.1
    elif fault == "line":
        points = np.linspace([0, 0, 0], [0.2, 0.1, 0.3], 6)
    elif fault == "row":
        pixels[:, 1] = 200
    elif fault == "number":
        pixels[4] = pixels[0] + [2, 0]
    return points, pixels


@pytest.mark.parametrize(
    "fault, message",
    [
        ("three", "got 3 pins; give at least 4"),
        ("nan", "NaN or infinite"),
        ("point", "pins 1 and 3 in the list are on one point .the pin on point 3"),
        ("pixel", "the pin on point 5 and the pin on point 17 are on one pixel"),
        ("line", "all 6 pins are on one line of the target"),
        ("row", "all 6 pins are on one line of the frame"),
        ("number", r"fit no pose: they are (\d+, ){5}\d+ pixels .* the pin on point 12, without"),
    ],
)
def test_pins_that_fix_no_pose_are_refused(points, fault, message):
    chosen, pixels = spoil(*pinned(points), fault)
    with pytest.raises(ValueError, match=message) as caught:
        starts.solve_pins(chosen, pixels, K, xu.XWING)
    assert "\n" not in str(caught.value)


def test_pins_of_a_mirrored_frame_are_refused():
    corners = 0.5 * xu.box_corners(np.full(3, -0.5), np.full(3, 0.5))[[0, 1, 2, 4, 5, 6]]
    pixels = xu.project_pose(corners, POSE, K)
    pixels[:, 0] = 640 - pixels[:, 0]
    with pytest.raises(ValueError, match="fit only a pose behind the camera; .* left and right"):
        starts.solve_pins(corners, pixels, K)


def test_the_numbers_of_points_and_pixels_must_agree(points):
    with pytest.raises(ValueError, match=r"pixels of the pins: expected shape \(6, 2\)"):
        starts.solve_pins(points[:6], np.zeros((5, 2)), K)


@pytest.mark.parametrize("turn", [(9, 0, 0), (-5, 5, -5)])
def test_a_start_that_is_off_is_refined_to_the_right_one(footage, box, turn):
    truth = footage.poses[0]
    off = xu.move_pose(truth, np.array([*np.radians(turn), 0, 0, 0]))
    off[:3, 3] += place(truth, box.target) - place(off, box.target) + [0.02, -0.02, 0.05]

    found = starts.refine_start(box, footage.images[0], off, footage.K)
    assert xu.rotation_error(found[0].pose, truth) < 2
    assert np.linalg.norm(place(found[0].pose, box.target) - place(truth, box.target)) < 0.05
    agreements = [start.edge_agreement for start in found]
    assert agreements == sorted(agreements, reverse=True) and agreements[0] > 0.7
    assert np.isfinite([start.explained_contrast for start in found]).all()


def test_starts_are_all_different(footage, box):
    found = starts.refine_start(box, footage.images[0], footage.poses[0], footage.K)
    for i, start in enumerate(found):
        others = [other.pose for other in found[:i]]
        assert all(np.abs(start.pose - other).max() > 0.01 for other in others)


def test_a_target_out_of_sight_has_no_start(footage, box):
    pose = footage.poses[0].copy()
    pose[0, 3] += 30
    assert starts.refine_start(box, footage.images[0], pose, footage.K) == []


def test_a_start_must_be_a_pose(footage, box):
    with pytest.raises(ValueError, match="start: not a rigid motion"):
        starts.refine_start(box, footage.images[0], 2 * np.eye(4), footage.K)


@pytest.mark.parametrize("count", [1, 3])
def test_starts_are_read_as_they_were_written(footage, tmp_path, count):
    given = {int(7 * i): footage.poses[i] for i in range(count)}
    path = tmp_path / "new" / "start.json"
    starts.write_starts(path, given)
    read = starts.read_starts(path)
    assert list(read) == list(given)
    assert all(np.array_equal(read[index], given[index]) for index in given)
    assert [file.name for file in path.parent.iterdir()] == ["start.json"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({}, "expected at least one start"),
        ({-1: np.eye(4)}, "from 0, got -1"),
        ({True: np.eye(4)}, "from 0, got True"),
        ({0: np.eye(4), 2: np.eye(3)}, "starts, frame 2: expected shape"),
        ({0: np.diag([1, 1, -1, 1])}, "frame 0: the matrix mirrors"),
    ],
)
def test_wrong_starts_leave_the_old_file(tmp_path, wrong, message):
    path = tmp_path / "start.json"
    starts.write_starts(path, {4: np.eye(4)})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        starts.write_starts(path, wrong)
    assert path.read_bytes() == before and json.loads(before)["frame"] == 4
