"""Poses from exact, noisy, wrong and too few keypoints; what an estimate says; bad arguments."""

import itertools

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import xwing_utils as xu

FACES = [(0, 1, 2, 3), (4, 5, 6, 7), (0, 1, 4, 5), (2, 3, 6, 7), (0, 2, 4, 6), (1, 3, 5, 7)]
WILD = np.array([[60, -45], [-50, 70], [100, 40], [-60, -80]])  # pixels


def turned(degrees, axis=(1, 2, 3), shift=(0, 0, 0)):
    """A pose turned by an angle about an axis, and moved."""
    pose = np.eye(4)
    vector = degrees * np.array(axis) / np.linalg.norm(axis)
    pose[:3, :3] = Rotation.from_rotvec(vector, degrees=True).as_matrix()
    pose[:3, 3] = shift
    return pose


def corners(pose, K):
    return xu.project_pose(xu.BOUNDING_BOX, pose, K)


def all_keypoints(pose, K):
    return xu.project_pose(xu.KEYPOINTS, pose, K)


def assert_same_pose(got, expected, degrees=0.01, distance=1e-4):
    assert got is not None
    assert xu.rotation_error(got, expected) < degrees
    assert np.linalg.norm(got[:3, 3] - expected[:3, 3]) < distance


def assert_nearly_the_same_pose(got, expected):
    """Wild points move a pose a little, because the robust cost never ignores them entirely."""
    assert_same_pose(got, expected, 0.5, 5e-3)


# ------------------------------------------------------------ solving


def test_exact_corners_give_the_pose_back_in_any_frame(camera, poses, K):
    for pose in poses:
        assert_same_pose(xu.solve_pose(corners(pose, K), K), pose)
    wide = xu.camera_matrix(camera[1], 640, 360)
    for pose in poses[:10]:
        got = xu.solve_pose(corners(pose, wide), wide)
        assert_same_pose(got, pose)
        np.testing.assert_allclose(got[:3, :3] @ got[:3, :3].T, np.eye(3), atol=1e-9)
        assert np.linalg.det(got[:3, :3]) == pytest.approx(1) and got[3].tolist() == [0, 0, 0, 1]


def test_noisy_corners_give_nearly_the_pose_and_always_the_same(poses, K):
    rng = np.random.default_rng(0)
    errors = []
    for pose in poses:
        keypoints = corners(pose, K) + rng.normal(0, 0.3, (8, 2))
        got = xu.solve_pose(keypoints, K)
        errors.append(xu.rotation_error(got, pose))
        np.testing.assert_array_equal(xu.solve_pose(keypoints, K), got)
    assert np.median(errors) < 1


def test_corners_as_uncertain_as_a_network_s_give_a_pose_in_nearly_every_frame(poses, K):
    """Defect 12: errors were taken to be 1 pixel, so only 71 % of the frames got a pose."""
    rng = np.random.default_rng(0)
    found = []
    errors = []
    for pose in np.repeat(poses, 4, axis=0):
        certain = rng.random(8) < 0.65
        confidence = np.where(certain, rng.uniform(0.9, 1, 8), rng.uniform(0.2, 0.9, 8))
        noise = rng.standard_t(5, (8, 2)) * (1 + 8 * (1 - confidence))[:, None]
        got = xu.solve_pose(corners(pose, K) + noise, K, confidence)
        found.append(got is not None)
        if got is not None:
            errors.append(xu.rotation_error(got, pose))
    assert np.mean(found) >= 0.95 and np.median(errors) < 3


@pytest.mark.parametrize("wild", [(k,) for k in range(8)] + [(1, 6), (0, 3)])
def test_one_or_two_wild_corners_among_eight_do_no_harm(poses, K, wild):
    for pose in poses[:5]:
        keypoints = corners(pose, K)
        keypoints[list(wild)] += WILD[: len(wild)]
        assert_nearly_the_same_pose(xu.solve_pose(keypoints, K), pose)


def test_all_keypoints_survive_wild_ones(poses, K):
    for pose in poses[:10]:
        keypoints = all_keypoints(pose, K)
        assert_same_pose(xu.solve_pose(keypoints, K), pose)
        keypoints[[0, 9, 12, 20]] += WILD
        assert_nearly_the_same_pose(xu.solve_pose(keypoints, K), pose)


def test_too_many_wild_points_leave_no_pose(poses, K):
    rng = np.random.default_rng(0)
    for pose in poses[:10]:
        keypoints = corners(pose, K)
        keypoints[:4] += 1.3 * WILD
        assert xu.solve_pose(keypoints, K) is None
        keypoints = all_keypoints(pose, K)
        keypoints[1::2] = rng.uniform(0, 256, keypoints[1::2].shape)
        assert xu.solve_pose(keypoints, K) is None
    random = [xu.solve_pose(rng.uniform(0, 256, (8, 2)), K) for _ in range(60)]
    assert np.mean([pose is not None for pose in random]) < 0.05


def test_where_the_surface_is_found_wild_corners_do_not_count(poses, K):
    for pose in poses[:10]:
        keypoints = all_keypoints(pose, K)
        keypoints[:8] = 128 + 5 * np.arange(16).reshape(8, 2)
        estimate = xu.estimate_pose(keypoints, K, np.ones(36))
        assert_same_pose(estimate.pose, pose)
        assert estimate.accepted and estimate.inliers.tolist() == [False] * 8 + [True] * 28


def test_where_the_surface_is_not_found_the_corners_count(poses, K):
    for pose in poses[:10]:
        keypoints = all_keypoints(pose, K)
        confidence = np.ones(36)
        keypoints[8:] = 30.0
        confidence[8:] = 0.0
        assert_same_pose(xu.solve_pose(keypoints, K, confidence), pose)


def test_where_the_surface_gives_no_accepted_pose_the_corners_help(poses, K):
    """Six points of the surface do not fit, and the eight corners do."""
    for pose in poses[:10]:
        keypoints = all_keypoints(pose, K)
        confidence = np.ones(36)
        confidence[14:] = 0
        keypoints[8:14] = np.random.default_rng(1).uniform(0, 256, (6, 2))
        estimate = xu.estimate_pose(keypoints, K, confidence)
        assert not estimate.accepted and "of 14 points agree" in estimate.reason
        keypoints[8:11] = all_keypoints(pose, K)[8:11]
        assert_nearly_the_same_pose(xu.solve_pose(keypoints, K, confidence), pose)


def test_four_surface_points_are_solved_with_the_help_of_the_corners(poses, K):
    nozzles = [k for k, name in enumerate(xu.KEYPOINT_NAMES) if "nozzle" in name]
    rng = np.random.default_rng(0)
    errors = []
    for pose in poses:
        confidence = np.isin(np.arange(36), [*range(8), *nozzles]).astype(float)
        found = xu.solve_pose(all_keypoints(pose, K) + rng.normal(0, 0.7, (36, 2)), K, confidence)
        errors.append(np.inf if found is None else xu.rotation_error(found, pose))
    assert len(nozzles) == 4 and np.mean(np.array(errors) > 20) < 0.05


@pytest.mark.parametrize("face", FACES)
def test_four_corners_in_one_plane_are_enough(poses, K, face):
    accepted = 0
    for pose in poses[:5]:
        keypoints = np.full((8, 2), np.nan)
        keypoints[list(face)] = corners(pose, K)[list(face)]
        estimate = xu.estimate_pose(keypoints, K)
        assert_same_pose(estimate.pose, pose)
        accepted += estimate.accepted  # they can leave two poses
    assert accepted >= 3


@pytest.mark.parametrize("count", range(4))
def test_fewer_than_four_corners_leave_no_pose_and_say_so(poses, K, count):
    keypoints = corners(poses[0], K)
    keypoints[count:] = np.nan
    estimate = xu.estimate_pose(keypoints, K, prior=poses[0])
    assert estimate.pose is None and not estimate.accepted and f"{count} points" in estimate.reason
    assert estimate.inliers.tolist() == [False] * 8 and np.isinf(estimate.rotation_sigma)


def test_corners_that_are_not_finite_or_without_confidence_are_not_used(poses, K):
    for pose, bad in itertools.product(poses[:5], (np.nan, np.inf)):
        keypoints = corners(pose, K)
        confidence = np.ones(8)
        keypoints[2] = bad
        keypoints[5, 1] = bad
        keypoints[[0, 7]] = 20.0
        confidence[[0, 7]] = [xu.MIN_CONFIDENCE / 4 - 0.01, np.nan]
        estimate = xu.estimate_pose(keypoints, K, confidence)
        assert_same_pose(estimate.pose, pose)
        assert not estimate.inliers[[0, 2, 5, 7]].any()
    assert xu.solve_pose(corners(poses[0], K), K, np.full(8, 0.04)) is None


@pytest.mark.parametrize("count", range(9))
def test_uncertain_points_are_used_where_few_are_confident_and_never_alone(poses, K, count):
    keypoints = all_keypoints(poses[0], K)
    sigma = np.full(36, 2.0)
    confidence = np.full(36, xu.MIN_CONFIDENCE / 2)
    confidence[8 : 8 + count] = 1.0
    confidence[30:] = xu.MIN_CONFIDENCE / 5
    keypoints[confidence < xu.MIN_CONFIDENCE / 4] = 20.0  # too uncertain to be used
    estimate = xu.estimate_pose(keypoints, K, confidence, sigma)
    assert_same_pose(estimate.pose, poses[0])
    assert estimate.accepted == (count >= 4) and not estimate.inliers[30:].any()
    assert estimate.inliers[8 + count : 30].any() == (count < xu.MIN_CONFIDENT_POINTS)
    if count < 4:
        assert estimate.reason == f"only {count} points are confident"
        assert estimate.log_likelihood_margin == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_point_of_unknown_sigma_is_not_used(poses, K, bad):
    sigma = np.ones(36)
    keypoints = all_keypoints(poses[0], K)
    sigma[9] = bad
    keypoints[9] = 0
    estimate = xu.estimate_pose(keypoints, K, None, sigma)
    assert estimate.accepted and not estimate.inliers[9] and estimate.reprojection < 0.1
    assert_same_pose(estimate.pose, poses[0])


def test_a_ship_behind_the_camera_is_never_found(poses, K):
    for pose in poses[:10]:
        behind = pose.copy()
        behind[2, 3] = -1.5
        camera = xu.BOUNDING_BOX @ behind[:3, :3].T + behind[:3, 3]
        got = xu.solve_pose((camera / camera[:, 2:]) @ K[:2].T, K)
        assert got is None or (xu.BOUNDING_BOX @ got[2, :3] + got[2, 3] > 0).all()


def test_points_on_a_line_or_in_one_place_leave_no_pose(K):
    line = np.column_stack([np.linspace(20, 200, 8), np.linspace(30, 90, 8)])
    for keypoints in (line, np.full((8, 2), 128.0)):
        assert xu.solve_pose(keypoints, K) is None


# ------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    "change,message",
    [
        # Defect 17: skew.
        ({"K": [[249, 3, 128], [0, 249, 128], [0, 0, 1]]}, "K: expected a camera matrix"),
        ({"K": np.zeros((3, 3))}, "K: expected a camera matrix"),
        ({"K": np.eye(4)}, "K: expected shape"),
        ({"keypoints": np.zeros((7, 2)), "points": xu.BOUNDING_BOX}, "points: expected shape"),
        ({"keypoints": np.zeros((8, 3))}, "keypoints: expected shape"),
        ({"confidence": np.ones(7)}, "confidence: expected shape"),
        ({"sigma": np.ones(7)}, "sigma: expected shape"),
        (
            {"sigma": np.array([1.0, 1, 1, 0, 1, 1, 1, 1])},
            "sigma: expected positive numbers of pixels, got 0.0",
        ),
        ({"sigma": -np.ones(8)}, "sigma: expected positive numbers of pixels, got -1.0"),
    ],
)
@pytest.mark.parametrize("solve", [xu.solve_pose, xu.estimate_pose])
def test_bad_arguments_are_refused(poses, K, solve, change, message):
    with pytest.raises(ValueError, match=message):
        solve(**{"keypoints": corners(poses[0], K), "K": K, **change})


def test_solving_leaves_its_arguments_alone(poses, K):
    keypoints = corners(poses[0], K)
    confidence = np.linspace(0, 1, 8)
    before = keypoints.copy(), K.copy(), confidence.copy()
    xu.solve_pose(keypoints, K, confidence)
    for now, then in zip((keypoints, K, confidence), before):
        np.testing.assert_array_equal(now, then)


# ------------------------------------------------------------ what an estimate says of itself


def test_an_estimate_s_covariance_is_that_of_many_draws(poses, K):
    pose = poses[3]
    rng = np.random.default_rng(0)
    drawn = []
    exact = all_keypoints(pose, K)
    sigma = np.where(np.arange(36) % 2, 0.8, 2.0)
    for _ in range(300):
        noisy = exact + rng.normal(0, 1, exact.shape) * sigma[:, None]
        drawn.append(xu.pose_step(xu.estimate_pose(noisy, K, None, sigma).pose, pose))
    estimate = xu.estimate_pose(exact, K, None, sigma)
    np.testing.assert_allclose(
        np.std(drawn, axis=0), np.sqrt(np.diag(estimate.covariance)), rtol=0.2
    )
    turns = np.degrees(np.linalg.norm(np.array(drawn)[:, :3], axis=1))
    assert estimate.rotation_sigma == pytest.approx(np.sqrt((turns**2).mean()), rel=0.2)


@pytest.mark.parametrize("focal", [14, 35, 85, 200])
def test_expected_errors_do_not_depend_on_the_lens(focal):
    """Full HD through different lenses, with the same size of the ship in the picture and noise."""
    K = np.array([[focal / 36 * 1920, 0, 960], [0, focal / 36 * 1920, 540], [0, 0, 1]])
    rng = np.random.default_rng(0)
    sigma = np.full(36, 0.7 * 7.5)
    chi = []
    ratios = []
    for i in range(12):
        pose = turned(17 * i, shift=(0, 0, focal / 35))
        noisy = all_keypoints(pose, K) + rng.normal(0, sigma[0], (36, 2))
        estimate = xu.estimate_pose(noisy, K, None, sigma)
        chi.append(estimate.rms_normalised_error)
        ratios.append(xu.rotation_error(estimate.pose, pose) / estimate.rotation_sigma)
    assert 0.8 < np.median(chi) < 1.15 and 0.5 < np.median(ratios) < 1.5


def test_certain_points_count_more(poses, K):
    rng = np.random.default_rng(1)
    errors = {"weighted": [], "equal": []}
    sigma = np.where(np.arange(36) % 2, 0.7, 4.0)
    for pose in poses:
        noisy = all_keypoints(pose, K) + rng.normal(0, 1, (36, 2)) * sigma[:, None]
        for name, given in (("weighted", sigma), ("equal", np.full(36, 2.5))):
            estimate = xu.estimate_pose(noisy, K, None, given)
            errors[name].append(xu.rotation_error(estimate.pose, pose))
    assert np.median(errors["weighted"]) < 0.7 * np.median(errors["equal"])


def test_reprojection_and_chi_are_those_of_the_inliers(poses, K):
    rng = np.random.default_rng(2)
    sigma = np.full(36, 2.0)
    keypoints = all_keypoints(poses[1], K) + rng.normal(0, 2, (36, 2))
    keypoints[10] += 80
    estimate = xu.estimate_pose(keypoints, K, None, sigma)
    seen = xu.project_pose(xu.KEYPOINTS, estimate.pose, K)
    error = np.linalg.norm(seen - keypoints, axis=1)[estimate.inliers]
    assert not estimate.inliers[10] and estimate.inliers.sum() >= 20
    assert estimate.reprojection == pytest.approx(np.sqrt((error**2).mean()))
    assert estimate.rms_normalised_error == pytest.approx(
        np.sqrt((error**2 / 4).sum() / (2 * len(error) - 6))
    )


@pytest.mark.parametrize("name", ["left-right", "top-bottom", "nose-tail"])
def test_permuted_corners_are_rarely_accepted(poses, K, name):
    rng = np.random.default_rng(0)
    accepted = 0
    for pose in poses:
        noisy = corners(pose, K) + rng.normal(0, 0.3, (8, 2))
        estimate = xu.estimate_pose(noisy[xu.CORNER_PERMUTATIONS[name]], K, sigma=np.full(8, 0.7))
        accepted += estimate.accepted
        assert estimate.accepted or estimate.reason
    assert accepted <= 0.1 * len(poses)


def test_a_flat_ship_seen_from_afar_has_a_runner_up(K):
    far = turned(35, (1, 0, 0), shift=(0, 0, 6.0))
    near = turned(35, (1, 0, 0), shift=(0, 0, 0.8))
    noisy = all_keypoints(far, K) + np.random.default_rng(0).normal(0, 0.1, (36, 2))
    estimate = xu.estimate_pose(noisy, K)
    assert xu.rotation_error(estimate.runner_up, estimate.pose) > 30
    clear = xu.estimate_pose(all_keypoints(near, K), K)
    assert clear.log_likelihood_margin > 3 * estimate.log_likelihood_margin


def test_the_prior_decides_between_two_poses_that_fit_alike_and_does_not_move_them(K):
    far = turned(35, (1, 0, 0), shift=(0, 0, 8.0))
    keypoints = all_keypoints(far, K) + np.random.default_rng(0).normal(0, 0.1, (36, 2))
    sigma = np.full(36, 1.0)
    other = xu.ambiguous_poses(far)[2]
    alone = xu.estimate_pose(keypoints, K, None, sigma)
    for expected in (far, other):
        prior = xu.move_pose(expected, np.full(6, 0.02))
        estimate = xu.estimate_pose(keypoints, K, None, sigma, prior=prior)
        assert estimate.accepted and xu.rotation_error(estimate.pose, expected) < 10
        gain = xu.PRIOR_WEIGHT + alone.log_likelihood_margin * (1 if expected is far else -1)
        assert estimate.log_likelihood_margin == pytest.approx(gain, abs=1)
    near = turned(20, shift=(0, 0, 1.0))
    wrong = turned(150, (0, 1, 0), shift=(0, 0, 1.0))
    assert_same_pose(xu.estimate_pose(all_keypoints(near, K), K, prior=wrong).pose, near)


def test_what_a_pose_is_ambiguous_with(K):
    pose = turned(35, (1, 1, 0), shift=(0.5, 0.2, 30.0))
    same, rolled, mirrored, both = xu.ambiguous_poses(pose)
    np.testing.assert_array_equal(same, pose)
    np.testing.assert_allclose(rolled, pose @ xu.XWING.lookalikes[0])
    np.testing.assert_allclose(both, mirrored @ xu.XWING.lookalikes[0])
    assert np.linalg.det(mirrored[:3, :3]) == pytest.approx(1)
    assert xu.rotation_error(mirrored, pose) > 30
    flat = xu.KEYPOINTS * [1, 1, 0]
    offset = xu.project_pose(flat, mirrored, K) - xu.project_pose(flat, pose, K)
    assert np.abs(offset).max() < 0.02 * np.ptp(xu.project_pose(flat, pose, K))


def test_a_step_leads_from_pose_to_pose(poses):
    for start, pose in zip(poses[:10], poses[10:20]):
        np.testing.assert_allclose(xu.move_pose(start, xu.pose_step(pose, start)), pose, atol=1e-9)
    step = np.array([0.1, -0.2, 0.3, 1, 2, 3])
    moved = xu.move_pose(poses[0], step)
    np.testing.assert_allclose(xu.pose_step(moved, poses[0]), step, atol=1e-9)
    quarter = xu.move_pose(np.eye(4), np.array([0, 0, np.pi / 2, 1, 0, 0]))
    np.testing.assert_allclose(quarter[:3, [0, 3]], [[0, 1], [1, 0], [0, 0]], atol=1e-12)
