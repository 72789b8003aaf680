"""Learnt albedo on a box that the tests print and draw themselves."""

import dataclasses
import pickle

import numpy as np
import pytest

import xwing_utils as xu
from xwing import keyframes
from xwing.alignment import Aligner


@pytest.fixture
def aligner(footage):
    return Aligner(xu.load_target(footage.mesh))


def unexplained(aligner, image, pose, K):
    """Mean difference in grey levels between a frame and what a pose explains of it."""
    seen, painted = aligner.picture(image, pose, K)
    return np.abs(np.float32(seen) - painted).mean()


def shifted(pose, shift):
    """A pose (4, 4) whose target is moved by a shift (3,) in camera axes."""
    moved = pose.copy()
    moved[:3, 3] += shift
    return moved


def turned(pose, degrees, centre=(0.4, 0.3, 0.25)):
    """A pose (4, 4) whose target is turned about its middle, around its own vertical axis."""
    angle = np.radians(degrees)
    turn = np.eye(4)
    turn[:3, :3] = [
        [np.cos(angle), 0, np.sin(angle)],
        [0, 1, 0],
        [-np.sin(angle), 0, np.cos(angle)],
    ]
    turn[:3, 3] = centre - turn[:3, :3] @ centre
    return pose @ turn


def test_what_was_seen_explains_later_frames(aligner, footage):
    first, later = footage.images[0], footage.images[4]
    plain = unexplained(aligner, later, footage.poses[4], footage.K)
    aligner.learn(first, footage.poses[0], footage.K)
    assert unexplained(aligner, later, footage.poses[4], footage.K) < 0.5 * plain


def test_a_pose_is_refined_on_the_learnt_albedo(aligner, footage):
    off = xu.move_pose(footage.poses[4], np.array([0.03, -0.05, 0.04, 0.01, -0.01, 0.03]))
    plain = aligner.align(footage.images[4], off, footage.K)
    aligner.learn(footage.images[0], footage.poses[0], footage.K)
    learnt, _ = aligner.align(footage.images[4], off, footage.K)
    assert xu.rotation_error(learnt, footage.poses[4]) < 0.5
    assert np.linalg.norm(learnt[:3, 3] - footage.poses[4][:3, 3]) < 0.02
    assert plain is None or xu.rotation_error(plain[0], footage.poses[4]) > 1


def test_the_unit_of_the_mesh_changes_nothing(aligner, footage):
    """In a unit that is smaller by a power of two, the albedo is the same, bit for bit."""
    factor = 1024.0
    mesh = dataclasses.replace(aligner.mesh, vertices=factor * aligner.mesh.vertices)
    large = Aligner(mesh)
    for one, scale in ((aligner, 1.0), (large, factor)):
        one.learn(footage.images[0], xu.scale_pose(footage.poses[0], scale), footage.K)
    found, _ = aligner.align(footage.images[3], footage.poses[3], footage.K)
    start = xu.scale_pose(footage.poses[3], factor)
    found_large, _ = large.align(footage.images[3], start, footage.K)
    assert (xu.scale_pose(found_large, 1 / factor) == found).all()


def test_forgetting_leaves_no_trace(aligner, footage):
    """Without key frames an aligner is that of the mesh alone, bit for bit."""
    untouched = Aligner(aligner.target)
    aligner.learn(footage.images[0], footage.poses[0], footage.K)
    aligner.forget()
    image, pose = footage.images[2], footage.poses[2]
    one = aligner.track(image, pose, footage.K, np.eye(6) * 1e-3)
    other = untouched.track(image, pose, footage.K, np.eye(6) * 1e-3)
    assert (one.pose == other.pose).all()
    assert one.explained_contrast == other.explained_contrast


def test_an_albedo_of_one_is_the_plain_mesh(aligner, footage):
    image, pose = footage.images[2], footage.poses[2]
    plain, _ = aligner.align(image, pose, footage.K)
    aligner.refiner.albedo = lambda drawing, K: np.ones((*drawing.depth.shape, 3), np.float32)
    again, _ = aligner.align(image, pose, footage.K)
    np.testing.assert_allclose(again, plain, atol=1e-4)


def test_a_key_frame_is_new_where_the_view_is(aligner, footage):
    """From 20 degrees on, or from half as far again; a turn about the line of sight is none."""
    pose = footage.poses[0]
    image = footage.images[0]
    aligner.learn(image, pose, footage.K)
    kept = aligner.key_frames.frames[0]

    away = pose[:3, :3] @ [0.4, 0.3, 0.25] + pose[:3, 3]
    nearer = shifted(pose, -0.2 * away)
    rolled = pose.copy()
    rolled[:3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]] @ pose[:3]
    for same in (pose, turned(pose, 15), turned(pose, -15), nearer, rolled):
        aligner.learn(image, same, footage.K)
    assert len(aligner.key_frames.frames) == 1 and aligner.key_frames.frames[0] is kept

    further = shifted(pose, 0.6 * away)
    for new in (turned(pose, 40), turned(pose, -40), further):
        aligner.learn(image, new, footage.K)
    assert len(aligner.key_frames.frames) == 4 and aligner.key_frames.frames[0] is kept


def test_the_number_of_key_frames_is_bounded(aligner, footage, monkeypatch):
    monkeypatch.setattr(keyframes, "MAX_KEY_FRAMES", 3)
    for degrees in range(0, 180, 30):
        aligner.learn(footage.images[0], turned(footage.poses[0], degrees), footage.K)
    assert len(aligner.key_frames.frames) == 3


def test_a_side_that_was_not_seen_has_no_albedo(aligner, footage):
    """What lies behind a surface is not looked up on it."""
    aligner.learn(footage.images[0], footage.poses[0], footage.K)
    pose = xu.scale_pose(footage.poses[0], aligner.scale)
    middle = aligner.key_frames.centre
    rays = np.float32(-pose[:3, :3].T @ pose[:3, 3] - middle)
    front, behind = middle + [[0.4], [-0.4]] * rays / np.linalg.norm(rays) * 0.5
    frame = aligner.key_frames.frames[0]
    surface = frame.depth[np.isfinite(frame.depth)]
    assert np.linalg.norm(pose[:3, :3] @ middle + pose[:3, 3]) > surface.min()
    _, known = frame.look_up(np.float32([behind, middle]), 0.012 * aligner.key_frames.diameter)
    assert not known.any()

    behind_camera = np.float32(-pose[:3, :3].T @ (pose[:3, 3] + [0, 0, 1]))
    _, known = frame.look_up(behind_camera[None], 0.01)
    assert not known.any()


def test_too_little_of_the_target_teaches_nothing(aligner, footage):
    beside = shifted(footage.poses[0], [9, 0, 0])
    aligner.learn(footage.images[0], beside, footage.K)
    assert aligner.key_frames.frames == []


def test_key_frames_travel_to_other_processes(aligner, footage):
    aligner.learn(footage.images[0], footage.poses[0], footage.K)
    copy = pickle.loads(pickle.dumps(aligner))
    one, _ = aligner.align(footage.images[2], footage.poses[2], footage.K)
    other, _ = copy.align(footage.images[2], footage.poses[2], footage.K)
    assert (one == other).all()
