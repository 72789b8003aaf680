"""Learnt albedo, and finding again, on a box that the tests print and draw themselves."""

import dataclasses
import pickle

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing import keyframes
from xwing.alignment import Aligner
from xwing.mesh import load_mesh, rasterise


@pytest.fixture(scope="module")
def box_aligner(footage):
    return Aligner(xu.load_target(footage.mesh))


@pytest.fixture
def aligner(box_aligner):
    """An `Aligner` of the box that has learnt nothing yet."""
    box_aligner.forget()
    return box_aligner


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


def test_an_albedo_of_one_is_the_plain_mesh(aligner, footage, monkeypatch):
    image, pose = footage.images[2], footage.poses[2]
    plain, _ = aligner.align(image, pose, footage.K)

    def ones(drawing, K):
        return np.ones((*drawing.depth.shape, 3), np.float32)

    # Nothing is taken to be hidden: the plain mesh does not look like the printed box.
    whole = dataclasses.replace(aligner.refiner.settings, partly_hidden=0.0)
    monkeypatch.setattr(aligner.refiner, "settings", whole)
    monkeypatch.setattr(aligner.refiner, "albedo", ones)
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


# ---------------------------------------------------------------- finding it again


def moved(footage, rotation, shift):
    """The first pose of the footage, turned (3,) degrees about its middle and shifted (3,)."""
    pose = footage.poses[0].copy()
    middle = pose[:3, :3] @ footage.CORNERS / 2 + pose[:3, 3]
    turn = Rotation.from_rotvec(rotation, degrees=True).as_matrix()
    pose[:3, :3] = turn @ pose[:3, :3]
    pose[:3, 3] = middle + shift - pose[:3, :3] @ footage.CORNERS / 2
    return pose


def draw_plain(footage, pose):
    """A frame (S, S, 3) uint8 of the box, all in one red, in front of a grey that is uneven."""
    size = footage.SIZE
    triangles = load_mesh(footage.mesh).triangles
    ids, _ = rasterise(triangles, pose, footage.K, size, size)
    grey = np.random.default_rng(1).normal(100, 5, (size, size, 3))
    return np.uint8(np.where(ids[..., None] >= 0, [180, 40, 30], grey))


def surface_distance(points, corners):
    """How far points (N, 3) are from the surface of a box from the origin to its corner (3,)."""
    outside = np.linalg.norm(points - points.clip(0, corners), axis=1)
    inside = np.minimum(points, corners - points).min(1).clip(0)
    return np.maximum(outside, inside)


@pytest.mark.parametrize(
    ("rotation", "shift"),
    [((0, 0, 0), (0, 0, 0)), ((0, 15, 0), (0.3, 0.2, 0.4)), ((9, -9, 8), (-0.3, -0.4, -0.3))],
)
def test_landmarks_find_a_printed_box_again(aligner, footage, rotation, shift):
    pose = moved(footage, rotation, shift)
    aligner.learn(footage.images[0], footage.poses[0], footage.K)
    image = footage.draw(pose, np.random.default_rng(1))
    found = aligner.find(image, footage.K)
    assert xu.rotation_error(found[0], pose) < 3
    assert np.linalg.norm(found[0][:3, 3] - pose[:3, 3]) < 0.05


def test_a_silhouette_finds_a_plain_box_again(aligner, footage):
    aligner.learn(draw_plain(footage, footage.poses[0]), footage.poses[0], footage.K)
    assert len(aligner.key_frames.frames[0].landmarks) < keyframes.MIN_INLIERS
    pose = moved(footage, (8, -9, 70), (-0.5, 0.4, 0.5))
    found = aligner.find(draw_plain(footage, pose), footage.K)
    assert min(xu.rotation_error(one, pose) for one in found[:3]) < 30
    middles = [one[:3, :3] @ footage.CORNERS / 2 + one[:3, 3] for one in found]
    truth = pose[:3, :3] @ footage.CORNERS / 2 + pose[:3, 3]
    assert min(np.linalg.norm(middle - truth) for middle in middles) < 0.2


def test_a_frame_without_the_target_shows_no_landmarks_of_it(aligner, footage):
    aligner.learn(footage.images[0], footage.poses[0], footage.K)
    landmarks = [aligner.key_frames.frames[0].landmarks]
    assert len(landmarks[0]) > keyframes.MIN_INLIERS
    for image in (footage.background, np.zeros_like(footage.background)):
        assert keyframes.find_landmarks(landmarks, image, footage.K) == []


def test_what_is_forgotten_is_not_found(aligner, footage):
    assert aligner.find(footage.images[0], footage.K) == []
    aligner.learn(footage.images[0], footage.poses[0], footage.K)
    assert aligner.find(footage.images[0], footage.K)
    aligner.forget()
    assert aligner.find(footage.images[0], footage.K) == []


def test_landmarks_lie_on_the_surface(aligner, footage, monkeypatch):
    aligner.learn(footage.images[0], footage.poses[0], footage.K)
    landmarks = aligner.key_frames.frames[0].landmarks
    distances = surface_distance(landmarks.points / aligner.scale, footage.CORNERS)
    assert distances.max() < 0.02

    monkeypatch.setattr(keyframes, "LANDMARKS", 5)
    aligner.forget()
    aligner.learn(footage.images[0], footage.poses[0], footage.K)
    assert len(aligner.key_frames.frames[0].landmarks) == 5


def test_matches_are_clear_and_used_once():
    rng = np.random.default_rng(0)
    descriptors = rng.integers(0, 100, (6, 128)).astype(np.uint8)
    near_first = descriptors[:1] + np.uint8(1)
    surface = keyframes.Landmarks(
        np.zeros((4, 3), np.float32), np.vstack([near_first, descriptors[[0, 1, 2]]])
    )
    twins = descriptors[[0, 1, 2, 2, 4]]
    seen = keyframes.Landmarks(np.zeros((5, 2), np.float32), twins)
    here, there = surface.match(seen)
    assert list(zip(here, there)) == [(1, 0), (2, 1)]  # the third has two equal matches


def test_of_many_key_frames_those_near_a_pose_are_searched(aligner, footage, monkeypatch):
    monkeypatch.setattr(keyframes, "SEARCHED", 1)
    other = turned(footage.poses[0], 80)
    aligner.learn(footage.images[0], footage.poses[0], footage.K)
    aligner.learn(footage.draw(other, np.random.default_rng(1)), other, footage.K)
    aligner.outline.colours.clear()  # then there are no silhouettes
    image = footage.images[0]
    assert aligner.find(image, footage.K) == []
    found = aligner.find(image, footage.K, near=turned(footage.poses[0], 10))
    assert xu.rotation_error(found[0], footage.poses[0]) < 3


def test_a_silhouette_shows_what_its_pose_shows(aligner, footage):
    """Drawn at the pose of a roll, the mesh covers the mask of that roll."""
    mesh = load_mesh(footage.mesh)
    K = np.array([[300, 0, 50], [0, 300, 80], [0, 0, 1.0]])
    silhouette = keyframes.Silhouette.at(mesh, footage.CORNERS / 2, footage.poses[0])
    span = K[0, 0] * mesh.diameter / silhouette.distance
    for roll, pixel in ((0, (60, 70)), (5, (50, 80)), (17, (45, 90))):
        pose = silhouette.pose(roll, silhouette.distance, pixel, K)
        scale = keyframes.SILHOUETTE_SPAN / span
        half = keyframes.SILHOUETTE_SIZE / 2 / scale
        small = xu.crop_camera(K, pixel[0] - half, pixel[1] - half, scale)
        size = keyframes.SILHOUETTE_SIZE
        ids, _ = rasterise(mesh.triangles, pose, small, size, size)
        mask = silhouette.masks[roll] / 255
        assert np.abs(mask - (ids >= 0)).sum() < 0.1 * mask.sum()
