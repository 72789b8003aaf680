"""Poses from corners, and the measures of their errors."""

import json

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.transform import Rotation

import xwing_utils as xu

FACES = [(0, 1, 2, 3), (4, 5, 6, 7), (0, 1, 4, 5), (2, 3, 6, 7), (0, 2, 4, 6), (1, 3, 5, 7)]


def turned(degrees, axis=(1, 2, 3), shift=(0, 0, 0), start=None):
    """A pose turned by an angle about an axis, and moved."""
    pose = np.eye(4) if start is None else start.copy()
    axis = np.array(axis) / np.linalg.norm(axis)
    pose[:3, :3] = Rotation.from_rotvec(axis * np.radians(degrees)).as_matrix() @ pose[:3, :3]
    pose[:3, 3] += shift
    return pose


def corners(pose, K):
    return xu.project_pose(xu.BOUNDING_BOX, pose, K)


def assert_same_pose(got, expected):
    assert got is not None
    assert xu.rotation_error(got, expected) < 0.01 and xu.translation_error(got, expected) < 1e-4


# ------------------------------------------------------------ solving


def test_exact_corners_give_the_pose_back(poses, K):
    for pose in poses:
        assert_same_pose(xu.solve_pose(corners(pose, K), K), pose)


def test_exact_corners_give_the_pose_back_in_a_non_square_frame(camera, poses):
    K = xu.camera_matrix(camera[1], 640, 360)
    for pose in poses[:10]:
        assert_same_pose(xu.solve_pose(corners(pose, K), K), pose)


def test_the_pose_s_matrix_is_rigid(poses, K):
    got = xu.solve_pose(corners(poses[0], K) + np.random.default_rng(0).normal(0, 0.5, (8, 2)), K)
    np.testing.assert_allclose(got[:3, :3] @ got[:3, :3].T, np.eye(3), atol=1e-9)
    assert np.linalg.det(got[:3, :3]) == pytest.approx(1) and got[3].tolist() == [0, 0, 0, 1]


def test_noisy_corners_give_nearly_the_pose(poses, K):
    rng = np.random.default_rng(0)
    errors = [xu.rotation_error(xu.solve_pose(corners(p, K) + rng.normal(0, 0.3, (8, 2)), K), p) for p in poses]
    assert np.median(errors) < 1


@pytest.mark.parametrize("wild", range(8))
def test_one_wild_corner_among_eight_does_no_harm(poses, K, wild):
    for pose in poses[:5]:
        keypoints = corners(pose, K)
        keypoints[wild] += [60, -45]
        assert_same_pose(xu.solve_pose(keypoints, K), pose)


def test_all_keypoints_give_the_pose_back_and_survive_wild_ones(poses, K):
    for pose in poses[:10]:
        keypoints = xu.project_pose(xu.KEYPOINTS, pose, K)
        keypoints[[0, 5, 9, 12]] += [[60, -45], [-50, 70], [40, 40], [0, -80]]
        assert_same_pose(xu.solve_pose(keypoints, K, points=xu.KEYPOINTS), pose)


def test_the_same_corners_give_the_same_pose_again(poses, K):
    keypoints = corners(poses[0], K) + np.random.default_rng(0).normal(0, 2, (8, 2))
    keypoints[3] += 90
    np.testing.assert_array_equal(xu.solve_pose(keypoints, K), xu.solve_pose(keypoints, K))


def test_two_wild_corners_among_eight_do_no_harm(poses, K):
    for pose in poses[:5]:
        keypoints = corners(pose, K)
        keypoints[[1, 6]] += [[60, -45], [-50, 70]]
        assert_same_pose(xu.solve_pose(keypoints, K), pose)


def test_four_wild_corners_among_eight_leave_no_pose(poses, K):
    for pose in poses[:10]:
        keypoints = corners(pose, K)
        keypoints[:4] += [[80, -65], [-70, 90], [100, 40], [-60, -80]]
        assert xu.solve_pose(keypoints, K) is None


def test_a_frame_is_solved_from_its_hull_where_the_corners_are_wild(poses, K):
    for pose in poses[:10]:
        keypoints = xu.project_pose(xu.KEYPOINTS, pose, K)
        keypoints[:8] = 128 + 5 * np.arange(16).reshape(8, 2)
        assert_same_pose(xu.solve_frame(keypoints, K, np.ones(len(keypoints))), pose)


def test_a_frame_is_solved_from_its_corners_where_the_hull_is_not_found(poses, K):
    for pose in poses[:10]:
        keypoints, confidence = xu.project_pose(xu.KEYPOINTS, pose, K), np.ones(len(xu.KEYPOINTS))
        keypoints[8:], confidence[8:] = 30.0, 0.0
        assert_same_pose(xu.solve_frame(keypoints, K, confidence), pose)


def test_a_frame_of_corners_alone_is_solved(poses, K):
    for pose in poses[:10]:
        assert_same_pose(xu.solve_frame(corners(pose, K), K, np.ones(8)), pose)


def test_a_frame_without_confidence_has_no_pose(poses, K):
    assert xu.solve_frame(xu.project_pose(xu.KEYPOINTS, poses[0], K), K, np.zeros(len(xu.KEYPOINTS))) is None


def test_a_frame_with_four_hull_points_is_solved_with_the_corners_help(poses, K):
    nozzles, rng, errors = np.flatnonzero((xu.KEYPOINTS[:, 1] == 0.163) & (np.abs(xu.KEYPOINTS[:, 0]) < 0.1)), np.random.default_rng(0), []
    assert len(nozzles) == 4
    for pose in poses:
        keypoints = xu.project_pose(xu.KEYPOINTS, pose, K) + rng.normal(0, 0.7, xu.KEYPOINTS[:, :2].shape)
        confidence = np.isin(np.arange(len(keypoints)), [*range(8), *nozzles]).astype(float)
        found = xu.solve_frame(keypoints, K, confidence)
        errors.append(np.inf if found is None else xu.rotation_error(found, pose))
    assert np.mean(np.array(errors) > 20) < 0.05


def test_half_of_all_keypoints_wild_leave_no_pose(poses, K):
    rng = np.random.default_rng(0)
    for pose in poses[:10]:
        keypoints = xu.project_pose(xu.KEYPOINTS, pose, K)
        keypoints[1::2] = rng.uniform(0, 256, keypoints[1::2].shape)
        assert xu.solve_pose(keypoints, K, points=xu.KEYPOINTS) is None


def test_random_corners_leave_no_pose(K):
    rng = np.random.default_rng(0)
    found = [xu.solve_pose(rng.uniform(0, 256, (8, 2)), K) is not None for _ in range(60)]
    assert np.mean(found) < 0.05


@pytest.mark.parametrize("face", FACES)
def test_four_corners_in_one_plane_are_enough(poses, K, face):
    accepted = 0
    for pose in poses[:5]:
        keypoints = np.full((8, 2), np.nan)
        keypoints[list(face)] = corners(pose, K)[list(face)]
        estimate = xu.estimate_pose(keypoints, K)
        assert_same_pose(estimate.pose, pose)
        assert estimate.accepted or "turned by more than 30 degrees" in estimate.reason  # four points in a plane can leave two poses
        accepted += estimate.accepted
    assert accepted >= 3


@pytest.mark.parametrize("count", range(4))
def test_fewer_than_four_corners_leave_no_pose(poses, K, count):
    keypoints = corners(poses[0], K)
    keypoints[count:] = np.nan
    assert xu.solve_pose(keypoints, K) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_corners_that_are_not_finite_are_not_used(poses, K, bad):
    for pose in poses[:5]:
        keypoints = corners(pose, K)
        keypoints[2], keypoints[5, 1] = bad, bad
        assert_same_pose(xu.solve_pose(keypoints, K), pose)


def test_corners_without_confidence_are_not_used(poses, K):
    for pose in poses[:5]:
        keypoints, confidence = corners(pose, K), np.ones(8)
        keypoints[[0, 3, 7]], confidence[[0, 3, 7]] = 20.0, [0.0, xu.MIN_CONFIDENCE - 0.01, np.nan]
        assert_same_pose(xu.solve_pose(keypoints, K, confidence), pose)


def test_too_little_confidence_leaves_no_pose(poses, K):
    assert xu.solve_pose(corners(poses[0], K), K, np.full(8, 0.1)) is None


def test_a_ship_behind_the_camera_is_never_found(poses, K):
    for pose in poses[:10]:
        behind = pose.copy()
        behind[2, 3] = -1.5
        camera = xu.BOUNDING_BOX @ behind[:3, :3].T + behind[:3, 3]
        got = xu.solve_pose((camera / camera[:, 2:]) @ K[:2].T, K)
        assert got is None or (xu.BOUNDING_BOX @ got[2, :3] + got[2, 3] > 0).all()


@pytest.mark.parametrize("bad", [np.full((3, 3), np.nan), np.eye(4), np.diag([-248.9, 248.9, 1]), np.diag([248.9, 0, 1])])
def test_a_bad_camera_matrix(poses, K, bad):
    with pytest.raises(ValueError, match="K"):
        xu.solve_pose(corners(poses[0], K), bad)


@pytest.mark.parametrize("keypoints,confidence,name", [(np.zeros((7, 2)), None, "keypoints"), (np.zeros((8, 3)), None, "keypoints"),
                                                       (np.zeros((8, 2)), np.ones(7), "confidence")])
def test_corners_of_a_wrong_shape(K, keypoints, confidence, name):
    with pytest.raises(ValueError, match=name):
        xu.solve_pose(keypoints, K, confidence)


def test_solving_leaves_its_arguments_alone(poses, K):
    keypoints, confidence = corners(poses[0], K), np.linspace(0, 1, 8)
    before = keypoints.copy(), K.copy(), confidence.copy()
    xu.solve_pose(keypoints, K, confidence)
    for now, then in zip((keypoints, K, confidence), before):
        np.testing.assert_array_equal(now, then)


# ------------------------------------------------------------ errors of a pose


@pytest.mark.parametrize("degrees", [0, 1e-6, 1e-3, 0.5, 30, 90, 179, 179.999, 180])
def test_rotation_error_agrees_with_scipy(degrees):
    start = turned(77, (3, -1, 2))
    estimate = turned(degrees, start=start)
    expected = np.degrees(Rotation.from_matrix(estimate[:3, :3] @ start[:3, :3].T).magnitude())
    assert xu.rotation_error(estimate, start) == pytest.approx(expected, abs=1e-5, rel=1e-4)
    assert xu.rotation_error(estimate, start) == pytest.approx(degrees, abs=1e-5 if degrees > 179 else 1e-9)


def test_translation_error():
    assert xu.translation_error(turned(50, shift=(0.3, 0.4, 0)), np.eye(4)) == pytest.approx(0.5)


def test_add_error_of_a_shift_is_its_length():
    assert xu.add_error(turned(0, shift=(0.03, 0, 0.04)), np.eye(4)) == pytest.approx(0.05)


def test_add_error_is_the_mean_over_the_corners(poses):
    expected = np.mean([np.linalg.norm(poses[0] @ p - poses[1] @ p) for p in xu.to_homogeneous(xu.BOUNDING_BOX)])
    assert xu.add_error(poses[0], poses[1]) == pytest.approx(expected)


def test_speed_score_adds_radians_and_relative_distance():
    truth = turned(20, shift=(0, 0, 2.0))
    assert xu.speed_score(turned(90, shift=(0.1, 0, 0), start=truth), truth) == pytest.approx(np.pi / 2 + 0.05)
    assert xu.speed_score(truth, truth) == 0


def test_reprojection_errors_are_pixel_distances(poses, K):
    keypoints = corners(poses[0], K)
    keypoints[3] += [3, -4]
    np.testing.assert_allclose(xu.reprojection_errors(poses[0], keypoints, K), [0, 0, 0, 5, 0, 0, 0, 0], atol=1e-9)


def test_reprojection_errors_behind_the_camera_are_infinite(K):
    assert np.isinf(xu.reprojection_errors(turned(0, shift=(0, 0, -2.0)), np.zeros((8, 2)), K)).all()


def test_muzzle_error_is_blind_to_a_roll_that_swaps_the_cannons(poses, K):
    half_roll = poses[0] @ np.diag([-1.0, 1.0, -1.0, 1.0])
    assert xu.muzzle_error(half_roll, poses[0], K) < 1e-9
    assert xu.muzzle_error(turned(10, start=poses[0]), poses[0], K) > 1


# ------------------------------------------------------------ reports


@pytest.fixture
def truth():
    """(10, 8, 2) corners, well inside a 256 px frame and apart from each other."""
    grid = np.array([(60 + 40 * (k % 4), 80 + 90 * (k // 4)) for k in range(8)], float)
    return grid + np.random.default_rng(0).uniform(-10, 10, (10, 1, 2))


def test_report_of_the_truth(truth):
    report = xu.corner_report(truth, truth)
    assert report.pop("namings") == {"identity": 10, "left-right": 0, "top-bottom": 0, "both": 0, "nose-tail": 0}
    assert report == {"corner_px": 0, "nearest_px": 0, "renamed_px": 0, "within_2px": 1, "within_5px": 1}


@pytest.mark.parametrize("name", ["left-right", "top-bottom", "both", "nose-tail"])
def test_report_of_corners_under_wrong_names(truth, name):
    report = xu.corner_report(truth[:, xu.NAMINGS[name]], truth)
    assert report["corner_px"] > 30 and report["nearest_px"] == report["renamed_px"] == 0
    assert report["namings"][name] == 10


def test_report_of_errors_worked_out_by_hand(truth):
    estimate = truth + np.array([0, 1, 1, 1, 3, 4, 10, 10])[:, None] * [0.6, 0.8]
    report = xu.corner_report(estimate, truth)
    assert report["corner_px"] == pytest.approx(2) and (report["within_2px"], report["within_5px"]) == (0.5, 0.75)


def test_report_counts_corners_in_the_frame_only(truth):
    outside, estimate = truth.copy(), truth.copy()
    outside[:, 0] = estimate[:, 0] = [-5, 20]
    estimate[:, 0] += 500
    assert xu.corner_report(estimate, outside)["within_2px"] == 1


def test_report_counts_a_missing_corner_as_far_off(truth):
    estimate = truth.copy()
    estimate[:, :2] = np.nan
    assert xu.corner_report(estimate, truth)["within_5px"] == 0.75


def test_report_of_frames_at_half_the_size_in_pixels_of_the_original(truth):
    assert xu.corner_report(truth / 2 + [0, 1], truth / 2, size=128, scale=2)["corner_px"] == pytest.approx(2)


def test_evaluate_a_perfect_prediction(poses, K):
    keypoints = np.array([corners(p, K) for p in poses])
    figures = xu.evaluate(keypoints, list(poses), keypoints, poses)
    zero = ["corner_px_median", "nearest_corner_px_median", "best_naming_px_median", "nmae", "rotation_deg_median", "rotation_deg_95",
            "translation_median", "flips", "speed_score"]
    one = ["corners_within_2px", "corners_within_5px", "poses_found", "add_0.1", "add_0.02"]
    assert [figures[k] for k in zero] == [0] * len(zero) and [figures[k] for k in one] == [1] * len(one)
    assert figures["frames"] == 50


def test_errors_of_drawn_heatmaps_are_those_of_the_maps(poses, K):
    rng, truth = np.random.default_rng(0), np.array([corners(p, K) for p in poses[:6]])
    found = truth + rng.normal(0, 4, truth.shape)
    found[1, 2] = np.nan
    errors = xu.drawn_heatmap_errors(found, truth, 10.0)
    inside = xu.in_frame(truth)
    assert np.array_equal(np.isfinite(errors), inside)
    for i, (a, b) in enumerate(zip(np.nan_to_num(found, nan=-1e4), truth)):
        maps = ((xu.gaussian_heatmaps(a, 256, 10.0).astype(float) - xu.gaussian_heatmaps(b, 256, 10.0)) ** 2).mean((0, 1))
        np.testing.assert_allclose(errors[i][inside[i]], maps[inside[i]], atol=1e-9)
    figures = xu.evaluate(found, [None] * 6, truth, poses[:6], K)
    assert figures["box_heatmap_mse_sigma10"] == pytest.approx(np.nanmean(errors)) and figures["box_nmae"] == figures["nmae"]
    assert xu.evaluate(found, list(poses[:6]), truth, poses[:6], K)["box_heatmap_mse_sigma10"] < 1e-12


def test_evaluate_counts_a_missing_pose_as_a_miss(poses, K):
    keypoints = np.array([corners(p, K) for p in poses])
    enough = xu.in_frame(keypoints).sum(1) >= 4
    found = [p if i % 2 else None for i, p in enumerate(poses)]
    figures = xu.evaluate(keypoints, found, keypoints, poses)
    expected = np.mean([p is not None for p, e in zip(found, enough) if e])
    assert figures["poses_found"] == figures["add_0.02"] == pytest.approx(expected)
    assert figures["rotation_deg_median"] == 0 and figures["frames_with_4_corners"] == enough.sum()


def test_evaluate_counts_flips(poses, K):
    keypoints = np.array([corners(p, K) for p in poses])
    enough = np.flatnonzero(xu.in_frame(keypoints).sum(1) >= 4)
    found = list(poses)
    for i in enough[:3]:
        found[i] = poses[i] @ np.diag([-1.0, 1.0, -1.0, 1.0])
    assert xu.evaluate(keypoints, found, keypoints, poses)["flips"] == pytest.approx(3 / len(enough))


def test_evaluate_counts_flips_in_frames_with_four_corners_only(poses, K):
    away = poses[0].copy()
    away[0, 3] += 5
    true = np.stack([poses[0], away])
    keypoints = np.array([corners(p, K) for p in true])
    found = [true[0], true[1] @ np.diag([-1.0, 1.0, -1.0, 1.0])]
    assert xu.evaluate(keypoints, found, keypoints, true)["flips"] == 0


def test_evaluate_without_any_pose(poses, K):
    keypoints = np.array([corners(p, K) for p in poses])
    figures = xu.evaluate(np.full_like(keypoints, np.nan), [None] * 50, keypoints, poses)
    assert figures["poses_found"] == figures["add_0.1"] == figures["corners_within_5px"] == figures["flips"] == 0
    assert np.isnan(figures["rotation_deg_median"])


def test_heatmap_mse_of_a_perfect_network(oracle, oracle_frames):
    keypoints = np.random.default_rng(0).uniform(60, 196, (3, 8, 2))
    mse, zero = xu.heatmap_mse(oracle(keypoints), oracle_frames(3), keypoints)
    assert mse < 1e-5
    assert zero == pytest.approx(np.pi * 100 / 256**2, rel=1e-3)  # 0.0048


def test_heatmap_mse_refuses_a_sigma_below_the_network_s(oracle, oracle_frames):
    with pytest.raises(ValueError, match="sigma"):
        xu.heatmap_mse(oracle(np.full((1, 8, 2), 128.0)), oracle_frames(1), np.full((1, 8, 2), 128.0), sigma=2.0)


@pytest.fixture
def figures(poses, K):
    keypoints = np.array([corners(p, K) for p in poses])
    return {"test": {**xu.evaluate(keypoints, list(poses), keypoints, poses), "heatmap_mse_sigma10": 0.001, "heatmap_mse_sigma10_all_zero": 0.0048}}


def test_results_go_between_the_readme_s_markers(figures, tmp_path):
    (tmp_path / "weights").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    xu.write_results(tmp_path, figures, readme)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| corner error in the heatmaps, median | ≤ 0.5 px | 0.00 px |" in text
    assert json.loads((tmp_path / "weights" / "xwing_eval.json").read_text())["figures"]["test"]["frames"] == 50


def test_results_need_the_readme_s_markers(figures, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "README.md").write_text("nothing\n")
    with pytest.raises(ValueError, match="README.md"):
        xu.write_results(tmp_path, figures, tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == "nothing\n"


# ------------------------------------------------------------ estimates


def test_an_estimate_s_covariance_is_that_of_many_draws(poses, K):
    pose, rng = poses[3], np.random.default_rng(0)
    points, exact = xu.KEYPOINTS, xu.project_pose(xu.KEYPOINTS, poses[3], K)
    deviation = np.where(np.arange(len(points)) % 2, 0.8, 2.0)
    drawn = []
    for _ in range(300):
        estimate = xu.estimate_pose(exact + rng.normal(0, 1, exact.shape) * deviation[:, None], K, None, deviation, points)
        turn = Rotation.from_matrix(estimate.pose[:3, :3] @ pose[:3, :3].T).as_rotvec()
        drawn.append([*turn, *(estimate.pose[:3, 3] - pose[:3, 3])])
    expected = np.sqrt(np.diag(xu.estimate_pose(exact, K, None, deviation, points).covariance))
    np.testing.assert_allclose(np.std(drawn, axis=0), expected, rtol=0.2)


def test_certain_points_count_more(poses, K):
    rng, errors = np.random.default_rng(1), {"weighted": [], "equal": []}
    deviation = np.where(np.arange(len(xu.KEYPOINTS)) % 2, 0.7, 4.0)
    for pose in poses:
        noisy = xu.project_pose(xu.KEYPOINTS, pose, K) + rng.normal(0, 1, (len(deviation), 2)) * deviation[:, None]
        for name, given in (("weighted", deviation), ("equal", np.full(len(deviation), 2.5))):
            errors[name].append(xu.rotation_error(xu.estimate_pose(noisy, K, None, given, xu.KEYPOINTS).pose, pose))
    assert np.median(errors["weighted"]) < 0.7 * np.median(errors["equal"])


@pytest.mark.parametrize("naming", ["left-right", "top-bottom", "nose-tail"])
def test_corners_under_mirrored_names_are_rarely_accepted(poses, K, naming):
    rng, accepted = np.random.default_rng(0), 0
    for pose in poses:
        noisy = corners(pose, K) + rng.normal(0, 0.3, (8, 2))
        estimate = xu.estimate_pose(noisy[xu.NAMINGS[naming]], K, deviation=np.full(8, 0.7))
        accepted += estimate.accepted
        assert estimate.accepted or estimate.reason
    assert accepted <= 0.1 * len(poses)


def test_a_flat_ship_seen_from_afar_has_a_second_pose(K):
    pose = turned(35, (1, 0, 0), shift=(0, 0, 6.0))
    noisy = xu.project_pose(xu.KEYPOINTS, pose, K) + np.random.default_rng(0).normal(0, 0.1, (36, 2))
    estimate = xu.estimate_pose(noisy, K, points=xu.KEYPOINTS)
    assert estimate.second is not None and xu.rotation_error(estimate.second, estimate.pose) > 30
    near = xu.estimate_pose(xu.project_pose(xu.KEYPOINTS, turned(35, (1, 0, 0), shift=(0, 0, 0.8)), K), K, points=xu.KEYPOINTS)
    assert near.margin > 3 * estimate.margin


def test_an_estimate_says_why_it_is_rejected(poses, K):
    few = xu.estimate_pose(corners(poses[0], K), K, np.array([1.0, 1, 1, 0, 0, 0, 0, 0]))
    assert not few.accepted and few.pose is None and "3 points" in few.reason
    wild = xu.estimate_pose(np.random.default_rng(0).uniform(0, 256, (8, 2)), K)
    assert not wild.accepted and wild.reason


@pytest.mark.parametrize("K", [np.zeros((3, 3)), np.diag([200.0, 200, 0]), np.array([[200.0, 0, 0], [0, 200, 0], [128, 128, 1]])])
def test_a_matrix_that_is_no_camera_is_refused(K):
    with pytest.raises(ValueError, match="K: expected a finite camera matrix"):
        xu.estimate_pose(np.zeros((8, 2)), K)


# ------------------------------------------------------------ per-frame errors and intervals


def test_frame_errors_measure_the_solved_box(poses, K):
    keypoints = np.array([corners(p, K) for p in poses])
    found = [None, *poses[1:]]
    errors = xu.frame_errors(keypoints + 3, found, keypoints, poses, K)
    np.testing.assert_allclose(errors["corner"], np.sqrt(18))
    np.testing.assert_allclose(errors["box"][0], np.sqrt(18))  # no pose: the heatmaps' corners
    np.testing.assert_allclose(errors["box"][1:], 0, atol=1e-9)
    assert np.isnan(errors["rotation"][0]) and not errors["solved"][0]


def test_bootstrap_agrees_with_scipy():
    rng = np.random.default_rng(0)
    truth = rng.uniform(60, 190, (80, 8, 2))
    estimate = truth + rng.normal(0, 2, truth.shape)
    poses = [np.eye(4)] * 80
    true_poses = np.array([turned(a, shift=(0, 0, 1)) for a in rng.uniform(0, 10, 80)])
    errors = xu.frame_errors(estimate, poses, truth, true_poses)
    found = xu.bootstrap(errors, repeats=1000)["rotation_deg_median"]
    expected = stats.bootstrap((errors["rotation"],), np.median, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    np.testing.assert_allclose(found, [expected.low, expected.high], atol=0.5)
    assert found[0] < np.median(errors["rotation"]) < found[1]


def test_a_set_without_a_countable_frame_has_no_figures(poses, K):
    away = np.array([turned(0, shift=(50, 0, 1.0))])
    keypoints = np.array([corners(p, K) for p in away])
    figures = xu.evaluate(keypoints, [None], keypoints, away)
    assert np.isnan(figures["corner_px_median"]) and np.isnan(figures["poses_found"]) and figures["frames_with_4_corners"] == 0


def test_intervals_stand_in_the_table(figures):
    table = xu.results_table(figures, {"test": {"rotation_deg_median": (0.5, 1.25)}})
    assert "0.00° (0.50 – 1.25)" in table and "| rotation error, median | ≤ 1° |" in table  # what is wanted stands beside what is reached


# ------------------------------------------------------------ other lenses


@pytest.mark.parametrize("focal", [14, 35, 85, 200])
def test_expected_errors_do_not_depend_on_the_lens(focal):
    """Full HD through different lenses, the ship as large in the picture and found as precisely."""
    K, rng, misfits, ratios = xu.lens_camera(1920, 1080, focal), np.random.default_rng(0), [], []
    for i in range(12):
        pose = turned(17 * i, shift=(0, 0, 0), start=np.eye(4))
        pose[:3, 3] = [0, 0, focal / 35]
        found = xu.project_pose(xu.KEYPOINTS, pose, K) + rng.normal(0, 0.7 * 7.5, (36, 2))
        estimate = xu.estimate_pose(found, K, None, np.full(36, 0.7 * 7.5), xu.KEYPOINTS)
        misfits.append(estimate.misfit)
        ratios.append(xu.rotation_error(estimate.pose, pose) / estimate.rotation_deviation)
    assert 0.8 < np.median(misfits) < 1.15 and 0.5 < np.median(ratios) < 1.5


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_a_deviation_that_cannot_be(poses, K, bad):
    deviation = np.ones(8)
    deviation[3] = bad
    with pytest.raises(ValueError, match="deviation: expected positive numbers of pixels, got " + str(bad)):
        xu.estimate_pose(xu.project_pose(xu.BOUNDING_BOX, poses[0], K), K, None, deviation)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_point_of_unknown_deviation_is_not_used(poses, K, bad):
    deviation = np.ones(36)
    deviation[9] = bad
    estimate = xu.estimate_pose(xu.project_pose(xu.KEYPOINTS, poses[0], K), K, None, deviation, xu.KEYPOINTS)
    assert estimate.accepted and not estimate.agreeing[9] and estimate.reprojection < 0.1
    assert_same_pose(estimate.pose, poses[0])
