"""Errors of poses and keypoints, figures of merit, intervals, and what estimates claim."""

import dataclasses
import types

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import pdist
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing import metrics
from xwing.mesh import load_mesh


def turned(degrees, axis=(1, 2, 3), shift=(0, 0, 0), start=None):
    """A pose (4, 4), the identity or `start`, turned about an axis through its origin and moved."""
    pose = np.eye(4) if start is None else start.copy()
    axis = np.array(axis) / np.linalg.norm(axis)
    pose[:3, :3] = Rotation.from_rotvec(np.radians(degrees) * axis).as_matrix() @ pose[:3, :3]
    pose[:3, 3] += shift
    return pose


@pytest.fixture
def corners(poses, K):
    """(50, 8, 2) true corners of the poses."""
    return np.array([xu.project_pose(xu.BOUNDING_BOX, pose, K) for pose in poses])


@pytest.fixture
def grid():
    """(10, 8, 2) corners, well inside a 256 px frame and apart from each other."""
    corners = np.array([(60 + 40 * (k % 4), 80 + 90 * (k // 4)) for k in range(8)], float)
    return corners + np.random.default_rng(0).uniform(-10, 10, (10, 1, 2))


# ------------------------------------------------------------ one pose


def test_a_pose_is_right_within_both_bounds():
    turns = [turned(4.9), turned(5.1)]
    shifts = [turned(0, shift=(0, 0, 0.049)), turned(0, shift=(0, 0, 0.051))]
    found = [*turns, *shifts, None]
    assert metrics.recalled(found, [np.eye(4)] * 5).tolist() == [True, False, True, False, False]
    assert metrics.recalled([], []).dtype == bool


def test_the_distance_of_a_right_pose_is_a_fraction_of_the_diameter():
    large = dataclasses.replace(xu.XWING, diameter=xu.DIAMETER * 1000)
    found = [turned(0, shift=(0, 0, 49.0)), turned(0, shift=(0, 0, 51.0))]
    truth = [np.eye(4)] * 2
    assert metrics.recalled(found, truth, target=large).tolist() == [True, False]
    assert metrics.recalled(found, truth).tolist() == [False, False]


def test_translation_error():
    moved = turned(50, shift=(0.3, 0.4, 0))
    assert metrics.translation_error(moved, np.eye(4)) == pytest.approx(0.5)


def test_add_error_is_the_mean_over_the_corners(poses):
    box = xu.BOUNDING_BOX
    moved = [np.linalg.norm(poses[0] @ p - poses[1] @ p) for p in xu.to_homogeneous(box)]
    assert metrics.add_error(poses[0], poses[1], box) == pytest.approx(np.mean(moved))
    shifted = turned(0, shift=(0.03, 0, 0.04))
    assert metrics.add_error(shifted, np.eye(4), box) == pytest.approx(0.05)


def test_add_error_of_a_rotation_and_of_points_at_hand():
    """A point moves by the chord of its circle about the axis."""
    points = np.array([[3.0, 4, 7], [0, 0, 5], [1, 0, -2]])
    chord = 2 * np.sin(np.radians(30) / 2)
    expected = chord * np.mean([5, 0, 1])
    assert metrics.add_error(turned(30, (0, 0, 1)), np.eye(4), points) == pytest.approx(expected)


def test_adds_error_is_the_mean_distance_to_the_nearest_estimated_point(poses):
    points = np.random.default_rng(0).normal(0, 0.1, (200, 3))
    for estimate, truth in zip(poses[:5], poses[5:]):
        found = [(estimate @ [*point, 1])[:3] for point in points]
        nearest = [
            min(np.linalg.norm((truth @ [*point, 1])[:3] - other) for other in found)
            for point in points
        ]
        assert metrics.adds_error(estimate, truth, points) == pytest.approx(np.mean(nearest))


SQUARE = np.array([(x, y, 0.0) for x in (-1, 1) for y in (-1, 1)])  # about the z axis
QUARTERS = np.array([turned(90 * k, (0, 0, 1)) for k in range(4)])


def test_a_symmetric_target_has_no_error_after_its_symmetries(K):
    truth = turned(50, shift=(0.5, 0.2, 9))
    for quarter in QUARTERS:
        assert metrics.adds_error(truth @ quarter, truth, SQUARE) < 1e-9
        assert metrics.mssd_error(truth @ quarter, truth, SQUARE, QUARTERS) < 1e-9
        assert metrics.mspd_error(truth @ quarter, truth, SQUARE, QUARTERS, K) < 1e-6
    quarter = truth @ QUARTERS[1]
    identity = np.eye(4)[None]
    assert metrics.add_error(quarter, truth, SQUARE) == pytest.approx(2)
    assert metrics.mssd_error(quarter, truth, SQUARE, identity) == pytest.approx(2)
    assert metrics.mspd_error(quarter, truth, SQUARE, identity, K) > 10


def test_mssd_of_half_a_quarter_turn_is_a_chord():
    """A turn of 45 degrees is equally far from two symmetries: the corners move by its chord."""
    chord = 2 * np.sqrt(2) * np.sin(np.radians(22.5))
    error = metrics.mssd_error(turned(45, (0, 0, 1)), np.eye(4), SQUARE, QUARTERS)
    assert error == pytest.approx(chord)
    farther = turned(70, (0, 0, 1))
    chord = 2 * np.sqrt(2) * np.sin(np.radians(10))
    assert metrics.mssd_error(farther, np.eye(4), SQUARE, QUARTERS) == pytest.approx(chord)


def test_mssd_and_mspd_of_all_points_and_symmetries_one_by_one(poses, K):
    """BOP's definitions, written as loops over rotation matrices and translations."""
    points = np.random.default_rng(0).normal(0, 0.1, (20, 3))
    symmetries = np.array([np.eye(4), turned(120, shift=(0.01, 0.02, 0.03)), turned(77)])

    def project(point):
        return (K @ point / point[2])[:2]

    for estimate, truth in zip(poses[:5], poses[5:]):
        R = estimate[:3, :3]
        t = estimate[:3, 3]
        R_true = truth[:3, :3]
        t_true = truth[:3, 3]
        surface = []
        projection = []
        for symmetry in symmetries:
            turn = symmetry[:3, :3]
            shift = symmetry[:3, 3]
            pairs = [(R @ x + t, R_true @ (turn @ x + shift) + t_true) for x in points]
            surface.append(max(np.linalg.norm(a - b) for a, b in pairs))
            projection.append(max(np.linalg.norm(project(a) - project(b)) for a, b in pairs))
        found = metrics.mssd_error(estimate, truth, points, symmetries)
        assert found == pytest.approx(min(surface))
        found = metrics.mspd_error(estimate, truth, points, symmetries, K)
        assert found == pytest.approx(min(projection))


def test_mspd_of_a_shift_is_that_of_the_nearest_point_and_infinite_behind_the_camera(K):
    points = np.array([[0, 0, 0], [0, 0, -0.5], [0.1, 0, 0.5]])
    truth = turned(0, shift=(0, 0, 2.0))
    identity = np.eye(4)[None]
    shifted = turned(0, shift=(0.03, 0.04, 0), start=truth)
    error = metrics.mspd_error(shifted, truth, points, identity, K)
    assert error == pytest.approx(K[0, 0] * 0.05 / 1.5)
    behind = turned(0, shift=(0, 0, 0.4))
    assert metrics.mspd_error(behind, truth, points, identity, K) == np.inf


def test_speed_score_adds_radians_and_relative_distance():
    truth = turned(20, shift=(0, 0, 2.0))
    estimate = turned(90, shift=(0.1, 0, 0), start=truth)
    assert metrics.speed_score(estimate, truth) == pytest.approx(np.pi / 2 + 0.05)
    assert metrics.speed_score(truth, truth) == 0


def test_muzzle_error_is_blind_to_a_roll_that_swaps_the_cannons(poses, K):
    assert metrics.muzzle_error(poses[0] @ xu.XWING.lookalikes[0], poses[0], K) < 1e-9
    assert metrics.muzzle_error(turned(10, start=poses[0]), poses[0], K) > 1


def test_muzzles_behind_the_camera_are_infinitely_far_off(poses, K):
    assert metrics.muzzle_error(turned(0, shift=(0, 0, -2.0)), poses[0], K) == np.inf


# ------------------------------------------------------------ the shape that errors are taken over


def write_mesh(path, vertices, faces):
    """Write an OBJ file of vertices (V, 3) and faces (F, 3), rows from 0."""
    lines = [f"v {' '.join(map(repr, vertex))}" for vertex in np.asarray(vertices, float).tolist()]
    lines += [f"f {' '.join(str(index + 1) for index in face)}" for face in faces]
    path.write_text("\n".join(lines) + "\n")


def with_mesh(path, vertices, faces):
    """The X-wing's target with another mesh, which is written to a file."""
    write_mesh(path, vertices, faces)
    return dataclasses.replace(xu.XWING, mesh=path)


def test_the_points_are_the_vertices_of_the_mesh_each_once(tmp_path):
    square = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (1, 0, 0), (0, 1, 0)]
    target = with_mesh(tmp_path / "square.obj", square, [(0, 1, 3), (4, 2, 5)])
    points = metrics.surface_points(target)
    expected = [list(map(float, vertex)) for vertex in square[:4]]
    assert sorted(points.tolist()) == sorted(expected)
    assert metrics.surface_diameter(target) == pytest.approx(np.sqrt(2))  # though it is flat


def test_all_vertices_of_the_x_wing_count():
    vertices = {tuple(vertex) for vertex in load_mesh(xu.XWING.mesh).vertices.tolist()}
    points = metrics.surface_points(xu.XWING)
    assert len(points) == len(vertices) == 3714
    assert {tuple(point) for point in points.tolist()} == vertices


def test_of_a_large_mesh_the_points_are_always_the_same_sample(tmp_path):
    grid = np.random.default_rng(0).random((101, 101, 3))
    grid[..., :2] += np.moveaxis(np.indices((101, 101)), 0, -1)
    numbers = np.arange(101 * 101).reshape(101, 101)
    corners = numbers[:-1, :-1], numbers[1:, :-1], numbers[:-1, 1:], numbers[1:, 1:]
    a, b, c, d = (corner.ravel() for corner in corners)
    faces = np.vstack([np.stack([a, b, c], axis=1), np.stack([b, d, c], axis=1)])
    target = with_mesh(tmp_path / "grid.obj", grid.reshape(-1, 3), faces)

    vertices = {tuple(vertex) for vertex in load_mesh(target.mesh).vertices.tolist()}
    points = metrics.surface_points(target)
    assert len(vertices) == 10_201
    assert len(points) == len(np.unique(points, axis=0)) == 10_000
    assert {tuple(point) for point in points.tolist()} <= vertices
    again = metrics.surface_points(dataclasses.replace(target))
    np.testing.assert_array_equal(again, points)


def test_the_diameter_is_the_greatest_distance_of_any_two_vertices():
    vertices = load_mesh(xu.XWING.mesh).vertices
    assert metrics.surface_diameter(xu.XWING) == pytest.approx(pdist(vertices).max())
    assert metrics.surface_diameter(xu.XWING) < xu.DIAMETER


def test_symmetries_of_a_target_of_revolution():
    """A cup's axis is off the origin; flipped by the discrete symmetry, it stays a cup."""
    point = np.array([0.3, 0.1, 0])
    direction = np.array([0, 0.6, 0.8])
    flip = turned(180, (1, 0, 0))
    flip[:3, 3] = point - flip[:3, :3] @ point
    cup = dataclasses.replace(
        xu.XWING,
        symmetries=np.array([np.eye(4), flip]),
        axes=np.array([[point, direction]]),
    )
    transforms = metrics.symmetry_transforms(cup)
    assert len(transforms) == 2 * 315  # pi / 0.01, as in BOP
    along = np.append(point + 0.7 * direction, 1)
    np.testing.assert_allclose(transforms[:315] @ along, np.tile(along, (315, 1)), atol=1e-12)

    offset = np.eye(4)
    offset[:3, 3] = point
    for degrees in (0.4, 100, 271.3):
        turn = offset @ turned(degrees, direction) @ np.linalg.inv(offset)
        for pose in (turn, turn @ flip):
            points = point + 0.5 * np.eye(3)
            assert metrics.mssd_error(pose, np.eye(4), points, transforms) <= 0.005


def test_symmetries_without_an_axis_are_those_of_the_target():
    np.testing.assert_array_equal(metrics.symmetry_transforms(xu.XWING), [np.eye(4)])


# ------------------------------------------------------------ corners and heatmaps


@pytest.mark.parametrize("name", list(xu.CORNER_PERMUTATIONS))
def test_report_of_corners_that_are_taken_for_others(grid, name):
    report = metrics.corner_report(grid[:, xu.CORNER_PERMUTATIONS[name]], grid)
    assert report["best_permutation_px"] == 0 and report["permutations"][name] == 10
    assert sum(report["permutations"].values()) == 10
    assert (report["corner_px"] > 30) == (name != "identity")


def test_report_of_errors_worked_out_by_hand(grid):
    estimate = grid + np.array([0, 1, 1, 1, 3, 4, 10, 10])[:, None] * [0.6, 0.8]
    report = metrics.corner_report(estimate, grid)
    assert report["corner_px"] == pytest.approx(2)
    assert (report["within_2px"], report["within_5px"]) == (0.5, 0.75)
    halved = metrics.corner_report(estimate / 2, grid / 2, 128, scale=2)
    assert halved["corner_px"] == pytest.approx(2)


def test_report_counts_corners_in_the_frame_only(grid):
    outside = grid.copy()
    outside[:, 0] = [-5, 20]
    estimate = outside.copy()
    estimate[:, 0] += 500
    assert metrics.corner_report(estimate, outside)["within_2px"] == 1


def test_report_counts_a_missing_corner_as_far_off(grid):
    estimate = grid.copy()
    estimate[:, :2] = np.nan
    assert metrics.corner_report(estimate, grid)["within_5px"] == 0.75


def test_no_error_of_a_report_exceeds_the_diagonal_of_the_frame(grid):
    """Once an untrained network had a median error of 56669.79 px."""
    nothing = np.full_like(grid, np.nan)
    report = metrics.corner_report(nothing / 4, grid / 4, 64, scale=4)
    assert report["corner_px"] == report["best_permutation_px"] == pytest.approx(256 * np.sqrt(2))
    assert not any(report["permutations"].values())  # nothing is the right way round
    found_in_one = nothing.copy()
    found_in_one[0, 3] = grid[0, 3]
    assert sum(metrics.corner_report(found_in_one, grid)["permutations"].values()) == 1


@pytest.mark.parametrize("sigma,stride", [(4.0, 2), (10.0, 1)])
def test_heatmap_errors_of_a_perfect_and_of_an_empty_network(sigma, stride):
    truth = np.random.default_rng(0).uniform(60, 196, (3, 8, 2))
    settings = dict(sigma=sigma, stride=stride, size=256)
    truth[1, 4] = [-20, 100]  # outside the frame
    maps = [
        xu.gaussian_heatmaps(corners / stride, 256 // stride, sigma / stride) for corners in truth
    ]
    maps = np.stack(maps)
    errors = metrics.heatmap_errors(maps, truth, settings)
    assert np.isnan(errors[1, 4]) and np.isnan(errors).sum() == 1 and np.nanmax(errors) < 1e-5
    nothing = metrics.heatmap_errors(np.zeros_like(maps), truth, settings)
    assert np.nanmean(nothing) == pytest.approx(np.pi * 10**2 / 256**2, rel=1e-3)  # 0.0048


def test_heatmap_errors_refuse_a_sigma_below_the_network_s():
    settings = dict(sigma=4.0, stride=2, size=256)
    message = "sigma: expected at least the network's own 4.0 pixels, got 2.0"
    with pytest.raises(ValueError, match=message):
        metrics.heatmap_errors([], np.zeros((0, 8, 2)), settings, sigma=2.0)


# ------------------------------------------------------------ a set: errors, figures, intervals


def test_figures_of_a_perfect_prediction(corners, poses, K):
    figures = metrics.summarise(metrics.frame_errors(corners, list(poses), corners, poses, K))
    full = {"poses_found", "add_0.1", "add_0.02", "muzzles_within_3px"}
    full |= {"corners_within_5px", "box_corners_within_5px", "adds_0.1"}
    full |= {"average_recall_mssd", "average_recall_mspd"}
    counts = {"frames": 50, "frames_with_4_corners": int((xu.in_frame(corners).sum(1) >= 4).sum())}
    assert {name: figures.pop(name) for name in counts} == counts
    assert figures == pytest.approx({name: float(name in full) for name in figures}, abs=1e-9)


def test_box_is_measured_where_it_was_solved_and_else_the_keypoints(corners, poses, K):
    errors = metrics.frame_errors(corners + 3, [None, *poses[1:]], corners, poses, K)
    inside = xu.in_frame(corners)
    np.testing.assert_array_equal(np.isfinite(errors["corner"]), inside)
    np.testing.assert_allclose(errors["corner"][inside], np.sqrt(18))
    np.testing.assert_allclose(errors["box"][0][inside[0]], np.sqrt(18))
    assert np.nanmax(errors["box"][1:]) < 1e-9
    assert (
        np.isnan(errors["rotation"][0]) and not errors["solved"][0] and errors["solved"][1:].all()
    )


def test_errors_of_another_target(corners, poses, K, tmp_path):
    """The same set in millimetres, of a target without lasers and with another axis up."""
    scale = np.diag([1000, 1000, 1000, 1.0])
    ship = load_mesh(xu.XWING.mesh)
    mesh = tmp_path / "large.obj"
    write_mesh(mesh, ship.vertices * 1000, ship.faces)
    large = dataclasses.replace(
        xu.XWING,
        mesh=mesh,
        box=xu.BOUNDING_BOX * 1000,
        diameter=xu.DIAMETER * 1000,
        up=np.array([0, -2.0, 0]),
        lasers=None,
    )
    found = [turned(3, shift=(0.01, 0, 0), start=pose) for pose in poses]
    plain = metrics.frame_errors(corners, found, corners, poses, K)
    large_poses = np.array([scale @ pose @ np.linalg.inv(scale) for pose in poses])
    large_found = [scale @ pose @ np.linalg.inv(scale) for pose in found]
    errors = metrics.frame_errors(corners, large_found, corners, large_poses, K, target=large)
    for name in ("corner", "box", "rotation", "add", "adds", "mssd", "mspd", "speed"):
        np.testing.assert_allclose(errors[name], plain[name], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(errors["translation"], plain["translation"] * 1000)
    camera = np.array([np.linalg.inv(pose)[:3, 3] for pose in poses])
    sines = -camera[:, 1] / np.linalg.norm(camera, axis=1)
    np.testing.assert_allclose(np.sin(np.radians(errors["elevation"])), sines)

    figures = metrics.summarise(errors)
    assert "muzzles_within_3px" not in figures and "muzzle" not in errors
    table = metrics.compare_tracks(
        {"one": large_found}, large_poses, np.ones(50, bool), K, target=large
    )
    assert "muzzles within 3 px" not in table


def test_true_distance_and_elevation_are_those_of_the_camera_seen_from_the_ship(corners, poses, K):
    errors = metrics.frame_errors(corners, list(poses), corners, poses, K)
    camera = np.array([np.linalg.inv(pose)[:3, 3] for pose in poses])  # in model axes
    np.testing.assert_allclose(errors["distance"], np.linalg.norm(camera, axis=1))
    np.testing.assert_allclose(
        np.sin(np.radians(errors["elevation"])), camera[:, 2] / errors["distance"]
    )


def test_a_missing_pose_is_a_miss_and_no_flip(corners, poses, K):
    enough = xu.in_frame(corners).sum(1) >= 4
    found = [pose if i % 2 else None for i, pose in enumerate(poses)]
    figures = metrics.summarise(metrics.frame_errors(corners, found, corners, poses, K))
    expected = (np.arange(50) % 2)[enough].mean()
    recalls = ("poses_found", "add_0.02", "muzzles_within_3px")
    assert [figures[name] for name in recalls] == pytest.approx([expected] * 3)
    assert figures["rotation_deg_median"] == figures["flips"] == 0


def test_flips_count_in_frames_with_four_corners_only(corners, poses, K):
    enough = xu.in_frame(corners).sum(1) >= 4
    wrong = [*np.flatnonzero(enough)[:3], *np.flatnonzero(~enough)[:1]]
    found = [pose @ xu.XWING.lookalikes[0] if i in wrong else pose for i, pose in enumerate(poses)]
    figures = metrics.summarise(metrics.frame_errors(corners, found, corners, poses, K))
    assert len(wrong) == 4 and figures["flips"] == pytest.approx(3 / enough.sum())


def test_figures_of_the_surface_s_errors_by_hand(corners, poses, K):
    """Moved by fractions of the diameter that lie between the limits; every third has no pose."""
    inside = np.flatnonzero(xu.in_frame(corners).sum(1) >= 4)[:30]
    truth = poses[inside]
    fractions = np.tile([0.015, 0.09, 0.32], 10)
    diameter = metrics.surface_diameter(xu.XWING)
    found = [turned(0, shift=(0, 0, f * diameter), start=p) for f, p in zip(fractions, truth)]
    found[::3] = [None] * 10
    errors = metrics.frame_errors(corners[inside], found, corners[inside], truth, K)
    posed = np.arange(30) % 3 > 0
    for name in ("add", "mssd"):
        np.testing.assert_allclose(errors[name][posed], fractions[posed])
        assert np.isnan(errors[name][~posed]).all()
    assert (errors["adds"][posed] <= errors["add"][posed]).all()
    figures = metrics.summarise(errors)
    assert figures["add_0.1"] == pytest.approx(1 / 3) and figures["add_0.02"] == 0
    assert figures["average_recall_mssd"] == pytest.approx((0 + 9 + 4) / 30)


def test_mspd_is_that_of_a_frame_640_pixels_wide(corners, poses, K):
    found = [turned(0, shift=(0.01, 0, 0), start=pose) for pose in poses]
    errors = metrics.frame_errors(corners, found, corners, poses, K)
    points = metrics.surface_points(xu.XWING)
    nearest = np.array([(points @ pose[2, :3] + pose[2, 3]).min() for pose in poses])
    np.testing.assert_allclose(errors["mspd"], K[0, 0] * 0.01 / nearest * 640 / 256)


def test_a_set_without_any_pose(corners, poses, K):
    errors = metrics.frame_errors(np.full_like(corners, np.nan), [None] * 50, corners, poses, K)
    figures = metrics.summarise(errors)
    zero = ("poses_found", "add_0.1", "corners_within_5px", "flips")
    assert [figures[name] for name in zero] == [0] * len(zero)
    assert np.isnan(figures["rotation_deg_median"])
    assert "rotation_deg_median" not in metrics.bootstrap(errors, repeats=9)


def test_a_set_without_a_countable_frame_has_no_figures(K):
    away = np.array([turned(0, shift=(50, 0, 1.0))])
    corners = np.array([xu.project_pose(xu.BOUNDING_BOX, away[0], K)])
    figures = metrics.summarise(metrics.frame_errors(corners, [None], corners, away, K))
    assert np.isnan(figures["corner_px_median"]) and np.isnan(figures["poses_found"])
    assert figures["frames"] == 1 and figures["frames_with_4_corners"] == 0


def test_bootstrap_agrees_with_resampling_by_hand(grid, K):
    rng = np.random.default_rng(0)
    angles = rng.uniform(0, 10, 80)
    truth = np.tile(grid, (8, 1, 1))
    poses = np.tile(turned(0, shift=(0, 0, 1)), (80, 1, 1))
    found = [turned(angle, start=pose) for angle, pose in zip(angles, poses)]
    intervals = metrics.bootstrap(metrics.frame_errors(truth, found, truth, poses, K))
    low, high = intervals["rotation_deg_median"]
    medians = [np.median(rng.choice(angles, 80)) for _ in range(4000)]
    np.testing.assert_allclose([low, high], np.percentile(medians, [2.5, 97.5]), atol=0.5)
    assert low < np.median(angles) < high


def test_the_bootstrap_of_a_recall_is_binomial(corners, poses, K):
    """How many of the drawn frames are hits follows a binomial distribution."""
    inside = xu.in_frame(corners).sum(1) >= 4
    chosen = np.tile(np.flatnonzero(inside)[:40], 3)  # 120 frames that all count
    truth = poses[chosen]
    found = [pose if i % 4 else None for i, pose in enumerate(truth)]
    errors = metrics.frame_errors(corners[chosen], found, corners[chosen], truth, K)
    low, high = metrics.bootstrap(errors, repeats=4000)["add_0.1"]
    expected = stats.binom.ppf([0.025, 0.975], 120, 0.75) / 120
    np.testing.assert_allclose([low, high], expected, atol=1.5 / 120)


def test_a_figure_that_many_drawn_sets_lack_has_the_interval_of_the_others(corners, poses, K):
    found = [None] * 50
    found[3] = turned(2, start=poses[3])
    errors = metrics.frame_errors(corners, found, corners, poses, K)
    assert metrics.bootstrap(errors, 50)["rotation_deg_median"] == pytest.approx((2, 2))


def test_a_single_frame_has_no_interval(corners, poses, K):
    errors = metrics.frame_errors(corners[:1], poses[:1], corners[:1], poses[:1], K)
    assert metrics.bootstrap(errors) == {}


def test_intervals_of_smaller_frames_hold_their_figures(grid, poses, K):
    """Once the bootstrap assumed frames of 256 px, and NMAE lay outside its own interval."""
    truth = np.floor(grid / 2)
    errors = metrics.frame_errors(truth + 1, [None] * 10, truth, poses[:10], K, size=128)
    assert metrics.summarise(errors)["nmae"] == pytest.approx(1 / 128)
    assert metrics.bootstrap(errors, repeats=20)["nmae"] == pytest.approx((1 / 128, 1 / 128))


# ------------------------------------------------------------ tracks


FPS = 30.0


def flight(count):
    """(N, 4, 4) a smooth flight before the camera."""
    seconds = np.arange(count) / FPS
    return np.array(
        [turned(40 * t, (0.2, 1, 0.1), (0.2 * t - 0.1, 0.05 * t, 1 + 0.1 * t)) for t in seconds]
    )


def test_jitter_is_the_acceleration_error():
    truth = flight(50)
    assert metrics.jitter(truth, truth, FPS) == pytest.approx((0, 0), abs=1e-6)
    moved = truth.copy()
    moved[:, 0, 3] += 0.5 * 2.0 * (np.arange(50) / FPS) ** 2  # an acceleration of 2 units/s^2
    assert metrics.jitter(moved, truth, FPS)[1] == pytest.approx(2.0)
    assert np.isnan(metrics.jitter([None] * 50, truth, FPS)).all()


def test_tracks_are_compared_over_the_frames_that_all_have(K):
    """One track is turned by 2 degrees, with a flip and a gap; the other is moved by 0.01 units."""
    truth = flight(10)
    seen = np.arange(10) != 9
    off = [turned(2, (0, 0, 1), start=pose) for pose in truth]
    off[3] = off[3] @ xu.XWING.lookalikes[0]
    off[7] = None
    moved = truth.copy()
    moved[:, 0, 3] += 0.01
    table = metrics.compare_tracks({"turned": off, "moved": list(moved)}, truth, seen, K, FPS)
    assert table["poses"].tolist() == [8, 9] and table["flips"].tolist() == [1, 0]
    assert table["rotation, deg"].tolist() == pytest.approx([2, 0], abs=1e-6)
    flip = xu.rotation_error(off[3], truth[3])
    assert table.loc["turned", "95 %"] == pytest.approx(np.percentile([2] * 7 + [flip], 95))
    assert table["translation"].tolist() == pytest.approx([0, 0.01])
    assert table.loc["moved", "jitter, deg/s2"] == pytest.approx(0, abs=1e-3)
    assert table.loc["turned", "jitter, deg/s2"] > 1000
    inside = [metrics.muzzle_error(moved[i], truth[i], K) <= 3 for i in range(9)]
    assert table.loc["moved", "muzzles within 3 px"] == np.mean(inside)


def test_a_way_that_found_nothing_leaves_nothing_to_compare(K):
    truth = flight(10)
    ways = {"all": list(truth), "none": [None] * 10}
    table = metrics.compare_tracks(ways, truth, np.ones(10, bool), K, FPS)
    assert table["poses"].tolist() == [10, 0] and table["rotation, deg"].isna().all()


# ------------------------------------------------------------ claims: probabilities and covariances


def test_reliability_counts_and_averages():
    table = metrics.reliability([0.0, 0.08, 0.95, 0.97, 1.0], [False, True, True, True, False])
    assert table["frames"].tolist() == [2, 3]
    np.testing.assert_allclose(
        table[["claimed", "right"]], [[0.04, 0.5], [0.97333, 2 / 3]], atol=1e-4
    )


def test_the_roc_s_area_is_the_chance_that_a_wrong_pose_scores_higher():
    rng = np.random.default_rng(0)
    wrong = rng.random(200) < 0.3
    score = np.round(rng.normal(wrong, 1.0), 1)  # with ties
    false, hits, area = metrics.roc(score, wrong)
    assert false[0] == hits[0] == 0 and false[-1] == hits[-1] == 1
    pairs = score[wrong][:, None] - score[~wrong]
    assert area == pytest.approx((pairs > 0).mean() + (pairs == 0).mean() / 2)
    assert metrics.roc(np.array([3.0, 2, 1]), np.array([True, True, False]))[2] == 1


def test_risk_is_that_of_the_most_confident_frames():
    risk, coverage = metrics.risk_coverage(np.array([False, False, True, False]))
    np.testing.assert_allclose(risk, [0, 0, 1 / 3, 1 / 4])
    np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1])


def test_squared_errors_of_an_honest_covariance_are_chi_square():
    """The poses are moved by steps that are drawn from the covariance claimed for them."""
    rng = np.random.default_rng(0)
    factor = rng.normal(0, 0.01, (6, 6))
    covariance = factor @ factor.T
    truth = turned(40, shift=(0.1, 0.2, 1.5))
    steps = rng.multivariate_normal(np.zeros(6), covariance, 2000)
    found = [xu.move_pose(truth, step) for step in steps]
    squares = [metrics.normalised_squared_error(pose, truth, covariance) for pose in found]
    assert stats.kstest(squares, "chi2", (6,)).pvalue > 0.01
    assert metrics.quantile_coverage(squares, [0.5, 0.9]) == pytest.approx([0.5, 0.9], abs=0.03)
    overconfident = np.array(squares) * 4
    assert (metrics.quantile_coverage(overconfident, [0.5, 0.9]) < [0.2, 0.5]).all()


def test_frames_are_ranked_by_the_median_error_of_their_box():
    box = np.array([[3.0, 3, np.nan], [1, 1, 9], [0, 0, 0], [2, 2, 2]])
    errors = {"corners": np.array([4, 8, 3, 5]), "box": box}
    order, pixels = metrics.rank_frames(errors)
    assert order.tolist() == [1, 3, 0]  # frame 2 shows three corners only
    assert pixels.tolist() == [1, 2, 3]


def test_groups_of_frames_count_their_right_poses():
    errors = {
        "corners": np.array([8, 8, 8, 8, 3]),
        "distance": np.array([0.5, 1.0, 1.5, 1.6, 0.5]),
        "solved": np.array([True, True, False, True, True]),
        "add": np.array([0.05, 0.2, np.nan, 0.1, 0.01]),
        "rotation": np.array([1.0, 40, np.nan, 2, 3]),
    }
    table = metrics.recall_by_group(errors, "distance", [0, 1, 2, 3])
    assert table["frames"].tolist() == [2, 2, 0]  # the upper edge belongs to a group
    assert table["right"].tolist()[:2] == [0.5, 0.5]
    assert table["poses"].tolist()[:2] == [1, 0.5]
    assert table["rotation_deg"].tolist()[:2] == [20.5, 2]
    assert (table["low"] < table["right"])[:2].all() and (table["right"] < table["high"])[:2].all()
    assert table.iloc[2][["right", "low", "high", "rotation_deg"]].isna().all()


def test_honest_keypoints_lie_on_the_line_and_small_groups_are_left_out():
    rng = np.random.default_rng(0)
    sigma = np.repeat([1.0, 3.0, 8.0], [4000, 4000, 10])
    distance = np.linalg.norm(rng.normal(0, sigma[:, None], (len(sigma), 2)), axis=1)
    table = metrics.keypoint_calibration(sigma, distance, [0, 2, 4, 10])
    assert table["claimed"].tolist() == [1, 3] and table["keypoints"].tolist() == [4000, 4000]
    np.testing.assert_allclose(table["true"], [1, 3], rtol=0.05)


def estimate(degrees, claimed, accepted):
    """A stand-in for a `PoseEstimate` that is some degrees off the identity; None has no pose."""
    pose = None if degrees is None else turned(degrees)
    return types.SimpleNamespace(pose=pose, rotation_sigma=claimed, accepted=accepted)


def test_claims_of_frames_are_in_the_order_of_confidence():
    estimates = [
        estimate(20, 0.5, False),
        estimate(1, 2.0, True),
        estimate(11, 1.0, True),
        estimate(None, np.nan, False),
        estimate(0, 0.1, True),
    ]
    rows = metrics.frame_claims(estimates, [np.eye(4)] * 5, [8, 4, 5, 8, 3])
    assert rows.index.tolist() == [2, 1, 0, 3]  # frame 4 shows three corners only
    assert rows["wrong"].tolist() == [True, False, True, True]
    assert rows["risk"].tolist() == pytest.approx([1, 1 / 2, 2 / 3, 3 / 4])
    assert rows["coverage"].tolist() == [0.25, 0.5, 0.75, 1]


def test_claims_of_a_track_count_frames_with_four_corners(K):
    seen = turned(0, shift=(0, 0, 1))
    away = turned(0, shift=(5, 0, 1))
    moved = turned(0, shift=(0, 0, 1.01))
    tracked = types.SimpleNamespace(
        status="tracked", pose=moved, probability=0.9, covariance=1e-4 * np.eye(6)
    )
    lost = types.SimpleNamespace(status="lost", pose=None, probability=0.0, covariance=None)
    rows = metrics.track_claims([tracked, lost, tracked], [seen, seen, away], K)
    assert rows["status"].tolist() == ["tracked", "lost"]
    assert rows["right"].tolist() == [True, False]
    assert rows["square"][0] == pytest.approx(1) and np.isnan(rows["square"][1])


def test_the_interval_of_a_recall_holds_it_as_often_as_it_says():
    """The exact probability, from the binomial distribution, that the interval holds the recall."""
    hits = np.arange(31)
    low, high = metrics.recall_interval(hits, 30)
    for recall in (0.1, 0.5, 0.8, 0.95):
        held = stats.binom.pmf(hits, 30, recall)[(low <= recall) & (recall <= high)].sum()
        assert 0.93 < held < 0.995
    assert low[15] + high[15] == pytest.approx(1)
