"""The outline as evidence, on a box and a ball that the tests draw in two colours themselves."""

import dataclasses

import cv2
import numpy as np
import pytest
import trimesh

import xwing_utils as xu
from xwing import contour
from xwing.alignment import Aligner
from xwing.mesh import Mesh, rasterise

K = np.array([[300.0, 0, 120], [0, 300.0, 100], [0, 0, 1]])
SIZE = 240, 200  # width, height
INSIDE, OUTSIDE = (200, 60, 40), (40, 70, 130)


def mesh_of(shape):
    faces = np.asarray(shape.faces)
    materials = np.zeros(len(faces), int)
    colours = np.array([INSIDE]) / 255
    return Mesh(["paint"], colours, np.asarray(shape.vertices, float), faces, materials)


def box():
    return mesh_of(trimesh.creation.box((0.5, 0.3, 0.2)))


def pose_at(turn=(0.5, 0.4, 0.1), position=(0.0, 0.0, 1.5)):
    pose = np.eye(4)
    pose[:3, :3] = cv2.Rodrigues(np.array(turn))[0]
    pose[:3, 3] = position
    return pose


def photograph(mesh, pose):
    """A frame (H, W, 3) uint8: the mesh in one colour before another, with some noise."""
    double = xu.crop_camera(K, scale=4)
    ids, _ = rasterise(mesh.triangles, pose, double, 4 * SIZE[0], 4 * SIZE[1])
    picture = np.where(ids[..., None] >= 0, np.float32(INSIDE), np.float32(OUTSIDE))
    picture = cv2.resize(picture, SIZE, interpolation=cv2.INTER_AREA)
    noise = np.random.default_rng(0).normal(0, 6, picture.shape)
    return (picture + noise).clip(0, 255).astype(np.uint8)


def outline_of(mesh):
    """An `Outline` of a mesh that `rasterise` draws."""

    def draw_depth(pose, K, width, height):
        return rasterise(mesh.triangles, pose, K, width, height)[1]

    return contour.Outline(mesh.vertices, mesh.diameter, draw_depth)


def lines_at(outline, image, pose, scale=1):
    """The `ContourLines` of a drawing of the whole frame."""
    depth = outline.draw_depth(pose, K, *SIZE)
    return outline.lines(image, K, pose, K, np.float32(np.isfinite(depth)), depth, scale)


@pytest.fixture(scope="module")
def known_aligner():
    return Aligner(box())


@pytest.fixture
def aligner(known_aligner):
    """An `Aligner` of the box that has learnt nothing yet."""
    known_aligner.forget()
    return known_aligner


@pytest.fixture(scope="module")
def scene():
    """An outline that has learnt a box, its frame, and its pose."""
    mesh = box()
    outline = outline_of(mesh)
    image = photograph(mesh, pose_at())
    outline.learn(image, pose_at(), K)
    return outline, image, pose_at()


# ------------------------------------------------------------ colours


def test_the_posterior_tells_the_colours_apart(scene):
    outline, image, pose = scene
    target = np.isfinite(outline.draw_depth(pose, K, *SIZE))
    posterior = outline.colours.posterior(image)
    assert posterior.shape == target.shape and posterior.dtype == np.float32
    assert posterior[target].mean() > 0.9 and posterior[~target].mean() < 0.1
    unseen = np.uint8([[0, 255, 0]])
    assert outline.colours.posterior(unseen) == pytest.approx([0.5])


def test_colours_are_learnt_slowly_after_the_first_frame():
    colours = contour.ColourStatistics()
    red, blue = np.uint8([[255, 0, 0]] * 4), np.uint8([[0, 0, 255]] * 4)
    colours.learn(red, blue)
    assert colours.inside[0xF00] == 1 and colours.outside[0x00F] == 1
    colours.learn(blue, blue)
    assert colours.inside[0xF00] == pytest.approx(1 - contour.LEARNING_RATE)
    assert colours.inside[0x00F] == pytest.approx(contour.LEARNING_RATE)


def test_a_drawing_that_was_made_teaches_the_same_as_a_new_one(scene):
    outline, image, pose = scene
    again = outline_of(box())
    again.learn_from_lines(image, K, lines_at(outline, image, pose))
    for one, other in (("inside", "inside"), ("outside", "outside")):
        difference = getattr(again.colours, one) - getattr(outline.colours, other)
        assert np.abs(difference).sum() < 0.4


# ------------------------------------------------------------ lines


@pytest.mark.parametrize("scale", [1, 3])
def test_the_system_is_the_derivative_of_the_cost(scene, scale):
    outline, image, pose = scene
    drawn = xu.move_pose(pose, np.array([0.02, -0.03, 0.02, 0.01, -0.01, 0.02]))
    lines = lines_at(outline, image, drawn, scale)
    information, gradient, _ = lines.system(drawn)
    steps = 1e-5 * np.eye(6)
    slopes = [
        (lines.system(xu.move_pose(drawn, step))[2] - lines.system(xu.move_pose(drawn, -step))[2])
        / 2e-5
        for step in steps
    ]
    np.testing.assert_allclose(gradient, -np.array(slopes), rtol=1e-4, atol=1e-3)
    moved = [lines.distances(xu.move_pose(drawn, step)) for step in steps]
    expected = (np.array(moved) - lines.distances(drawn)) / 1e-5
    np.testing.assert_allclose(lines.jacobian, expected, rtol=1e-3, atol=0.05)
    assert np.linalg.eigvalsh(information).min() > -1e-9


def test_lines_see_the_outline_where_it_is(scene):
    """A drawing that is two pixels too far left must move to the right by two pixels."""
    outline, image, pose = scene
    left = pose.copy()
    left[0, 3] -= 2 / K[0, 0] * pose[2, 3]
    lines = lines_at(outline, image, left)
    assert 100 < len(lines.mean) < 250
    expected = 2 * lines.normals[:, 0]
    assert np.median(np.abs(lines.mean - expected)) < 0.6
    assert np.abs(np.mean(lines.mean - expected)) < 0.15
    assert np.abs(np.mean(lines_at(outline, image, pose).mean)) < 0.15


def separation(lines):
    """How much more the inner halves of lines look like the target than the outer halves."""
    middle = contour.STEPS // 2
    return lines.posterior[:, :middle].mean() - lines.posterior[:, middle + 1 :].mean()


def test_colours_are_separate_at_the_truth_and_not_beside_it(scene):
    outline, image, pose = scene
    assert separation(lines_at(outline, image, pose)) > 0.7
    beside = xu.move_pose(pose, np.array([0, 0, 0, 0.25, 0, 0]))
    assert separation(lines_at(outline, image, beside)) < 0.4


def test_no_line_is_cut_by_the_frame(scene):
    outline, _, pose = scene
    for x, y in ((0.5, 0), (-0.5, 0), (0, 0.45), (0, -0.45), (0.5, 0.4)):
        cut = pose.copy()
        cut[:2, 3] = x, y
        image = photograph(box(), cut)
        lines = lines_at(outline, image, cut)
        ends = lines.centres[:, None] + np.array([[-9], [9]]) * lines.normals[:, None]
        assert (ends >= 0).all() and (ends <= SIZE).all()
        assert separation(lines) > 0.7
        moved = xu.move_pose(cut, np.array([0, 0, 0, 0.01, 0.01, 0]))
        found = outline.seek(image, moved, K)
        assert np.linalg.norm((found - cut)[:2, 3]) < 0.008


def test_a_target_that_fills_the_frame_has_no_lines(scene):
    outline, _, pose = scene
    near = pose.copy()
    near[2, 3] = 0.4
    image = photograph(box(), near)
    assert lines_at(outline, image, near) is None
    assert np.array_equal(outline.seek(image, near, K), near)
    fresh = outline_of(box())
    fresh.learn(image, near, K)
    assert not fresh.colours.known


def test_nothing_is_said_where_the_target_is_out_of_sight(scene):
    outline, image, pose = scene
    for position in ((9.0, 0, 1.5), (0, 0, -1.5)):
        gone = pose_at(position=position)
        assert np.array_equal(outline.seek(image, gone, K), gone)
        fresh = outline_of(box())
        fresh.learn(image, gone, K)
        assert not fresh.colours.known


# ------------------------------------------------------------ the basin


def test_the_outline_alone_finds_a_box_from_ten_degrees_off(scene):
    outline, image, pose = scene
    right = 0
    for seed in range(8):
        axis, shift = np.random.default_rng(seed).normal(size=(2, 3))
        turn = np.radians(10) * axis / np.linalg.norm(axis)
        start = xu.move_pose(pose, np.concatenate([turn, 0.05 * shift / np.linalg.norm(shift)]))
        found = outline.seek(image, start, K)
        right += xu.rotation_error(found, pose) < 4
    assert right >= 7


def test_a_ball_is_found_from_beside_it():
    mesh = mesh_of(trimesh.creation.icosphere(3, 0.2))
    outline = outline_of(mesh)
    pose = pose_at()
    image = photograph(mesh, pose)
    outline.learn(image, pose, K)
    start = xu.move_pose(pose, np.array([0, 0, 0, 0.1, -0.06, 0.1]))
    found = outline.seek(image, start, K)
    assert np.linalg.norm(found[:3, 3] - pose[:3, 3]) < 0.02


# ------------------------------------------------------------ the aligner


def test_the_outline_widens_the_basin_of_the_aligner(aligner):
    """From 14 degrees off, the pixels alone do not lead back; with the outline they do."""
    pose = pose_at()
    image = photograph(box(), pose)
    start = xu.move_pose(pose, np.array([0.14, -0.16, 0.12, 0.06, 0.05, 0.05]))
    plain = aligner.track(image, start, K)
    assert np.isnan(plain.local_agreement)
    assert plain.pose is None or xu.rotation_error(plain.pose, pose) > 3

    aligner.learn(image, pose, K)
    found = aligner.track(image, start, K)
    assert xu.rotation_error(found.pose, pose) < 2 and found.local_agreement > 0.4
    aligned, _ = aligner.align(image, start, K)
    assert xu.rotation_error(aligned, pose) < 2

    aligner.forget()
    again = aligner.track(image, start, K)
    assert np.isnan(again.local_agreement)
    assert np.array_equal(again.pose, plain.pose)


def test_every_confident_frame_adds_to_the_colours_but_not_to_the_key_frames(aligner):
    pose = pose_at()
    image = photograph(box(), pose)
    aligner.learn(image, pose, K)
    before = aligner.outline.colours.outside
    aligner.track(image, pose, K)
    aligner.learn(255 - image, pose, K)
    assert len(aligner.key_frames.frames) == 1
    assert np.abs(aligner.outline.colours.outside - before).sum() > contour.LEARNING_RATE


def test_the_unit_of_the_mesh_does_not_matter(aligner):
    pose = pose_at()
    image = photograph(box(), pose)
    start = xu.move_pose(pose, np.array([0.1, -0.1, 0.1, 0.05, 0.03, 0.05]))
    found = []
    large = dataclasses.replace(box(), vertices=1024 * box().vertices)
    for one, factor in ((aligner, 1.0), (Aligner(large), 1024.0)):
        one.learn(image, xu.scale_pose(pose, factor), K)
        tracked = one.track(image, xu.scale_pose(start, factor), K)
        found.append((xu.scale_pose(tracked.pose, 1 / factor), tracked.local_agreement))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-6)
