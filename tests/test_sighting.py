"""The pose that all heatmaps of a network together say."""

import dataclasses

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing.sighting import Sighting

SIDE = 64  # pixels of a map
SCALE = 5.0  # pixels of the frame for one of a map
CORNER = np.array([40.0, 20.0])
K = xu.lens_camera(480, 400, 35)


@pytest.fixture(scope="module")
def pose():
    turn = Rotation.from_rotvec([0.6, -0.4, 0.9]).as_matrix()
    return np.vstack([np.column_stack([turn, [-0.03, 0.02, 0.8]]), [0, 0, 0, 1]])


def seen(pose, spread, noise=0.0):
    """A `Sighting` of the X-wing: Gaussians of a spread, and keypoints with noise, map pixels."""
    places = (xu.project_pose(xu.KEYPOINTS, pose, K) - CORNER) / SCALE
    row, column = np.mgrid[:SIDE, :SIDE][..., None] + 0.5
    squared = (column - places[:, 0]) ** 2 + (row - places[:, 1]) ** 2
    sigma = np.full(len(places), spread * SCALE)
    maps = np.exp(-squared / (2 * spread**2)).astype(np.float32)
    places = places + noise * np.random.default_rng(1).normal(size=places.shape)
    return Sighting(places * SCALE + CORNER, np.ones(len(places)), sigma, maps, CORNER, SCALE)


def turned(pose, degrees):
    """An estimate that is off by some degrees, with a covariance."""
    step = np.radians(degrees) * np.array([0.48, -0.6, 0.64, 0, 0, 0])
    return xu.PoseEstimate(xu.move_pose(pose, step), np.eye(6), accepted=True)


def test_a_pose_climbs_to_where_all_maps_are_bright(pose):
    found = seen(pose, 5.0).refine(turned(pose, 25), K, xu.XWING)
    assert xu.rotation_error(found.pose, pose) < 1
    assert np.abs(found.pose[:3, 3] - pose[:3, 3]).max() < 0.03 * xu.XWING.diameter
    assert found.accepted and np.linalg.eigvalsh(found.covariance).min() > 0


def test_broad_maps_say_more_than_their_brightest_pixels(pose):
    sighting = seen(pose, 4.0, noise=8.0)
    estimate = xu.estimate_pose(sighting.keypoints, K)
    found = sighting.refine(estimate, K, xu.XWING)
    before, after = (xu.rotation_error(one.pose, pose) for one in (estimate, found))
    assert after < 2 and before > 10


def test_a_pose_that_is_far_off_becomes_the_runner_up(pose):
    estimate = dataclasses.replace(turned(pose, 45), log_likelihood_margin=100.0)
    found = seen(pose, 5.0).refine(estimate, K, xu.XWING)
    assert found.runner_up is estimate.pose and not found.accepted
    assert 5 < found.log_likelihood_margin < 100
    assert seen(pose, 5.0).refine(turned(pose, 15), K, xu.XWING).runner_up is None


def test_the_covariance_grows_with_the_spread_of_the_maps(pose):
    narrow, wide = (seen(pose, spread).refine(turned(pose, 20), K, xu.XWING) for spread in (4, 8))
    assert 1.3 < wide.rotation_sigma / narrow.rotation_sigma < 4


def test_the_pose_of_sharp_maps_stays(pose):
    estimate = turned(pose, 5)
    assert seen(pose, 0.8).refine(estimate, K, xu.XWING) is estimate


def test_a_pose_that_gains_nothing_stays(pose):
    estimate = turned(pose, 0)
    assert seen(pose, 5.0).refine(estimate, K, xu.XWING) is estimate


def test_without_maps_or_a_pose_nothing_is_refined(pose):
    sighting = seen(pose, 5.0)
    nothing = xu.PoseEstimate(None)
    assert sighting.refine(nothing, K, xu.XWING) is nothing
    blind = dataclasses.replace(sighting, heatmaps=None)
    estimate = turned(pose, 30)
    assert blind.refine(estimate, K, xu.XWING) is estimate


def test_a_pose_behind_the_camera_is_left(pose):
    behind = pose.copy()
    behind[2, 3] = -0.8
    estimate = xu.PoseEstimate(behind, np.eye(6))
    assert seen(pose, 5.0).refine(estimate, K, xu.XWING) is estimate
