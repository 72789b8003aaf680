"""Errors of poses and keypoints, figures of merit, intervals, and what estimates claim."""

import dataclasses

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing import metrics


def turned(degrees, axis=(1, 2, 3), shift=(0, 0, 0), start=None):
    """A pose turned about an axis through its origin, and moved."""
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


@pytest.mark.parametrize("sigma,stride", [(4.0, 2), (10.0, 1)])
def test_heatmap_errors_of_a_perfect_and_of_an_empty_network(sigma, stride):
    truth = np.random.default_rng(0).uniform(60, 196, (3, 8, 2))
    settings = dict(sigma=sigma, stride=stride, size=256)
    truth[1, 4] = [-20, 100]
    maps = np.stack(
        [xu.gaussian_heatmaps(c / stride, 256 // stride, sigma / stride) for c in truth]
    )
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
    full |= {"corners_within_5px", "box_corners_within_5px"}
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


def test_errors_of_another_target(corners, poses, K):
    """The same set in millimetres, of a target without lasers and with another axis up."""
    scale = np.diag([1000, 1000, 1000, 1.0])
    large = dataclasses.replace(
        xu.XWING,
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
    for name in ("corner", "box", "rotation", "add", "speed"):
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


def test_bootstrap_agrees_with_scipy(grid, K):
    angles = np.random.default_rng(0).uniform(0, 10, 80)
    truth, poses = np.tile(grid, (8, 1, 1)), np.tile(turned(0, shift=(0, 0, 1)), (80, 1, 1))
    found = [turned(angle, start=pose) for angle, pose in zip(angles, poses)]
    intervals = metrics.bootstrap(metrics.frame_errors(truth, found, truth, poses, K))
    low, high = intervals["rotation_deg_median"]
    expected = stats.bootstrap(
        (angles,), np.median, method="percentile", rng=np.random.default_rng(1)
    )
    np.testing.assert_allclose([low, high], expected.confidence_interval, atol=0.5)
    assert low < np.median(angles) < high


def test_intervals_of_smaller_frames_hold_their_figures(grid, poses, K):
    """The bootstrap once took all frames to be 256 px wide; NMAE lay outside its own interval."""
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
    """Two ways by hand: one is turned by 2 degrees, with a flip and a gap; one is moved by 0.01."""
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
    """Poses are moved by steps that are drawn from the covariance that is claimed."""
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


def test_the_interval_of_a_recall_holds_it_as_often_as_it_says():
    """The exact probability, from the binomial distribution, that the interval holds the recall."""
    hits = np.arange(31)
    low, high = metrics.recall_interval(hits, 30)
    for recall in (0.1, 0.5, 0.8, 0.95):
        held = stats.binom.pmf(hits, 30, recall)[(low <= recall) & (recall <= high)].sum()
        assert 0.93 < held < 0.995
    assert low[15] + high[15] == pytest.approx(1)
