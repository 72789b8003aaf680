"""Constants, projection, poses and the mirror, against OpenCV, OpenGL's formula and by hand."""

import dataclasses

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import xwing_utils as xu

BOX = xu.to_homogeneous(xu.BOUNDING_BOX)
SIZES = [(256, 256), (640, 360), (200, 333)]  # width, height


def rigid(rng):
    """A random rotation and translation (4, 4)."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.random(rng=rng).as_matrix()
    matrix[:3, 3] = rng.normal(0, 0.2, 3)
    return matrix


# ------------------------------------------------------------ rigid motions


@pytest.mark.parametrize("decimals,limit", [(3, 0.06), (4, 0.006)])
def test_matrices_with_few_decimals_become_the_nearest_rotation(decimals, limit):
    rng = np.random.default_rng(0)
    for exact in [rigid(rng) for _ in range(200)]:
        matrix = xu.rigid_matrix(exact.round(decimals).tolist(), "pose")
        linear = matrix[:3, :3]
        assert np.abs(linear @ linear.T - np.eye(3)).max() <= xu.EXACT
        assert xu.rotation_error(matrix, exact) < limit  # degrees


def test_a_scale_or_two_decimals_are_no_rounding():
    exact = rigid(np.random.default_rng(1))
    np.testing.assert_array_equal(xu.rigid_matrix(exact, "pose"), exact)
    scaled = exact.copy()
    scaled[:3, :3] *= 1.01
    with pytest.raises(ValueError, match="axes have the lengths 1.01, 1.01, 1.01"):
        xu.rigid_matrix(scaled, "pose")
    with pytest.raises(ValueError, match="three decimals at least"):
        xu.rigid_matrix(exact.round(1), "pose")


# ------------------------------------------------------------ constants


def test_bounding_box_has_the_documented_corners_in_order():
    assert xu.BOUNDING_BOX.tolist() == [
        [-0.156, -0.182, -0.032],
        [0.156, -0.182, -0.032],
        [-0.156, 0.163, -0.032],
        [0.156, 0.163, -0.032],
        [-0.156, -0.182, 0.034],
        [0.156, -0.182, 0.034],
        [-0.156, 0.163, 0.034],
        [0.156, 0.163, 0.034],
    ]
    np.testing.assert_array_equal(xu.KEYPOINTS[:8], xu.BOUNDING_BOX)
    assert xu.DIAMETER == pytest.approx(np.sqrt(0.312**2 + 0.345**2 + 0.066**2))


def test_edges_are_the_twelve_of_a_box():
    assert len({tuple(sorted(edge)) for edge in xu.BOX_EDGES.tolist()}) == 12
    difference = xu.BOUNDING_BOX[xu.BOX_EDGES[:, 0]] != xu.BOUNDING_BOX[xu.BOX_EDGES[:, 1]]
    assert (difference.sum(1) == 1).all()


def test_lasers_are_the_four_documented_lines():
    assert {tuple(map(tuple, laser)) for laser in xu.LASERS.tolist()} == {
        ((x, -0.1, z), (x, -0.3, z)) for x in (-0.145, 0.145) for z in (-0.01, 0.01)
    }


@pytest.mark.parametrize(
    "name,flip",
    [
        ("identity", [1, 1, 1]),
        ("left-right", [-1, 1, 1]),
        ("top-bottom", [1, 1, -1]),
        ("both", [-1, 1, -1]),
        ("nose-tail", [1, -1, 1]),
    ],
)
def test_permutations_reverse_their_axes(name, flip):
    permuted = xu.BOUNDING_BOX[xu.CORNER_PERMUTATIONS[name]]
    np.testing.assert_array_equal(np.sign(permuted), np.sign(xu.BOUNDING_BOX) * flip)


def test_keypoints_are_named_and_mirror_symmetric_with_their_normals():
    assert len(xu.KEYPOINT_NAMES) == len(set(xu.KEYPOINT_NAMES)) == 36
    permutation = xu.mirror_permutation(xu.KEYPOINTS)
    np.testing.assert_array_equal(permutation[:8], xu.MIRROR)
    np.testing.assert_allclose(xu.KEYPOINTS[permutation], xu.KEYPOINTS * [-1, 1, 1])
    np.testing.assert_allclose(xu.NORMALS[permutation], xu.NORMALS * [-1, 1, 1])
    swapped = [
        name.replace("left", "L").replace("right", "left").replace("L", "right")
        for name in xu.KEYPOINT_NAMES[8:]
    ]
    assert swapped == [xu.KEYPOINT_NAMES[k] for k in permutation[8:]]


# ------------------------------------------------------------ projection


def assert_like_opencv(view, projection, matrices, width, height):
    K = xu.camera_matrix(projection, width, height)
    for matrix in matrices:
        pose = xu.pose_in_camera(view, matrix)
        vector = Rotation.from_matrix(pose[:3, :3]).as_rotvec()
        expected = cv2.projectPoints(xu.BOUNDING_BOX, vector, pose[:3, 3], K, None)[0][:, 0]
        got = xu.project_points(np.empty((height, width, 3)), BOX, view, projection, matrix)
        assert np.abs(got - expected).max() < 1e-6
        np.testing.assert_allclose(xu.project_pose(xu.BOUNDING_BOX, pose, K), got, atol=1e-9)


@pytest.mark.parametrize("width,height", SIZES)
def test_projection_agrees_with_opencv(camera, matrices, width, height):
    assert_like_opencv(*camera, matrices, width, height)


def test_projection_agrees_with_opencv_for_a_turned_camera_and_an_off_centre_lens(camera, matrices):
    projection = camera[1].copy()
    view = np.eye(4)
    projection[0, 2] = 0.13
    projection[1, 2] = -0.07
    projection[1, 1] = 2.5
    view[:3, :3] = Rotation.from_euler("xyz", (4, -6, 30), degrees=True).as_matrix()
    assert_like_opencv(camera[0] @ view, projection, matrices, 320, 240)


@pytest.mark.parametrize("width,height", SIZES)
def test_projection_follows_the_formula_of_opengl(camera, matrices, width, height):
    view, projection = camera
    for matrix in matrices[:5]:
        got = xu.project_points(np.empty((height, width)), BOX, view, projection, matrix)
        for point, (x, y) in zip(BOX, got):
            clip = projection @ (view @ (matrix @ point))
            assert x == pytest.approx((clip[0] / clip[3] + 1) / 2 * width, abs=1e-9)
            assert y == pytest.approx((-clip[1] / clip[3] + 1) / 2 * height, abs=1e-9)


def test_projection_of_points_worked_out_by_hand(camera):
    points = [[0, 0, 0, 1], [0.1, 0, 0, 1], [0, 0.1, 0, 1], [0.1, 0, -1, 1]]
    expected = [[128, 128], [152.88889, 128], [128, 103.11111], [140.444444, 128]]
    for image in (np.zeros((256, 256, 3), np.uint8), np.ones((256, 256))):  # only its size counts
        got = xu.project_points(image, points, *camera)
        np.testing.assert_allclose(got, expected, atol=1e-4)
        np.testing.assert_array_equal(xu.project_points(image, points, *camera, np.eye(4)), got)


@pytest.mark.parametrize(
    "place,value,message",
    [
        (0, np.zeros(3), "image: expected a frame"),
        (1, xu.BOUNDING_BOX, "points: expected shape"),
        (1, [0, 0, 0, 1], "points: expected shape"),
        (2, np.eye(3), "model_view_matrix: expected shape"),
        (3, np.eye(3), "projection_matrix: expected shape"),
        (4, "nothing", "transformation_mat: expected numbers"),
        (1, [[0, 0, 0, 1], [0, 0, 1.0, 1]], "1 of 2 points lie at or behind"),
        (1, [[0, 0, 0, 1], [0, 0, 3.0, 1]], "1 of 2 points lie at or behind"),
        (1, [[0, np.nan, 0, 1]], "NaN"),
    ],
)
def test_projection_refuses(camera, place, value, message):
    arguments = [np.empty((256, 256)), BOX, *camera, np.eye(4)]
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        xu.project_points(*arguments)


def test_project_pose_has_no_position_behind_the_camera(K):
    got = xu.project_pose(np.array([[0, 0, 1.0], [0, 0, -1.0], [1.0, 1.0, 0]]), np.eye(4), K)
    np.testing.assert_array_equal(np.isnan(got).all(1), [False, True, True])


def test_camera_matrices_worked_out_by_hand(camera):
    expected = [[248.8889, 0, 128], [0, 248.8889, 128], [0, 0, 1]]
    np.testing.assert_allclose(xu.camera_matrix(camera[1], 256, 256), expected, atol=1e-4)
    expected = [[1.9444443 * 320, 0, 320], [0, 1.9444443 * 180, 180], [0, 0, 1]]
    np.testing.assert_allclose(xu.camera_matrix(camera[1], 640, 360), expected, atol=1e-4)


def test_lenses_worked_out_by_hand(camera):
    np.testing.assert_allclose(
        xu.lens_camera(256, 256), xu.camera_matrix(camera[1], 256, 256), atol=1e-3
    )
    expected = [[1920 * 50 / 36, 0, 540], [0, 1920 * 50 / 36, 960], [0, 0, 1]]
    np.testing.assert_allclose(xu.lens_camera(1080, 1920, focal=50), expected)
    np.testing.assert_allclose(
        xu.lens_camera(200, 100, view=90), [[100, 0, 100], [0, 100, 50], [0, 0, 1]]
    )
    view = 2 * np.degrees(np.arctan(18 / 35))
    np.testing.assert_allclose(xu.lens_camera(256, 144, view=view), xu.lens_camera(256, 144, 35))


@pytest.mark.parametrize(
    "name,value",
    [
        ("width", 0),
        ("height", np.inf),
        ("focal", -1),
        ("sensor", np.nan),
        ("view", 0),
        ("view", 180),
    ],
)
def test_the_bad_argument_of_a_lens_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a positive number"):
        xu.lens_camera(**{"width": 256, "height": 256, name: value})


@pytest.mark.parametrize(
    "change",
    [
        [[np.nan, 0, 128], [0, 249, 128], [0, 0, 1]],
        [[249, 0, np.inf], [0, 249, 128], [0, 0, 1]],
        [[-249, 0, 128], [0, 249, 128], [0, 0, 1]],
        [[249, 0, 128], [0, 0, 128], [0, 0, 1]],
        [[249, 5, 128], [0, 249, 128], [0, 0, 1]],
        [[249, 0, 128], [0.1, 249, 128], [0, 0, 1]],
        [[249, 0, 0], [0, 249, 0], [128, 128, 1]],
        [[249, 0, 128], [0, 249, 128], [0, 0, 2]],
        np.zeros((3, 3)),
        np.eye(4),
        "lens",
    ],
)
def test_a_matrix_that_is_no_camera_is_refused(change):
    with pytest.raises(ValueError, match="K: expected"):
        xu.check_camera_matrix(change)


def test_a_camera_matrix_comes_back_as_floats():
    K = xu.check_camera_matrix([[249, 1e-12, 128], [0, 250, 99], [0, 0, 1]])
    assert K.dtype == np.float64 and K[1].tolist() == [0, 250, 99]


def test_pose_in_camera_reverses_y_and_z(camera):
    expected = [[1, 0, 0, 0.1], [0, -1, 0, -0.2], [0, 0, -1, 0.7], [0, 0, 0, 1]]
    matrix = np.eye(4)
    matrix[:3, 3] = 0.1, 0.2, 0.3
    np.testing.assert_allclose(xu.pose_in_camera(camera[0], matrix), expected, atol=1e-12)


def test_transformation_from_pose_is_the_inverse_of_pose_in_camera():
    rng = np.random.default_rng(3)
    for _ in range(20):
        view = rigid(rng)
        matrix = rigid(rng)
        got = xu.transformation_from_pose(view, xu.pose_in_camera(view, matrix))
        np.testing.assert_allclose(got, matrix, atol=1e-12)


def test_the_frame_includes_its_left_and_top_border_only():
    positions = [[0, 0], [319.99, 239.99], [320, 10], [10, 240], [-0.01, 10], [np.nan, 10]]
    assert xu.in_frame(positions, 320, 240).tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("degrees", [0, 1e-6, 1e-3, 0.5, 30, 90, 179, 179.999, 180])
def test_rotation_error_agrees_with_scipy(degrees):
    start = Rotation.from_rotvec([1.2, -0.4, 0.8])
    turn = Rotation.from_rotvec([0.6 * degrees, 0, 0.8 * degrees], degrees=True)
    got = xu.rotation_error((turn * start).as_matrix(), start.as_matrix())
    assert got == pytest.approx(degrees, abs=1e-5 if degrees > 179 else 1e-9)


def test_symmetries_and_axes_of_revolution_are_no_error():
    turn = Rotation.from_rotvec(np.radians([20, -50, 70])).as_matrix()
    half = Rotation.from_euler("z", 180, degrees=True).as_matrix()
    slight = Rotation.from_euler("x", 7, degrees=True).as_matrix()
    symmetries = np.array([np.eye(4), np.eye(4)])
    symmetries[1, :3, :3] = half
    twofold = dataclasses.replace(xu.XWING, symmetries=symmetries)
    assert xu.rotation_error(turn @ half, turn) == pytest.approx(180)
    assert xu.rotation_error(turn @ half @ slight, turn, twofold) == pytest.approx(7)
    assert xu.rotation_error(turn @ half, turn, xu.XWING) == pytest.approx(180)

    axis = np.array([[(3, 0, 0), (0, 0, 1)]], float)
    revolved = dataclasses.replace(xu.XWING, axes=axis)
    about = Rotation.from_euler("z", 33, degrees=True).as_matrix()
    assert xu.rotation_error(turn @ slight @ about, turn, revolved) == pytest.approx(7)
    upside_down = Rotation.from_euler("x", 180, degrees=True).as_matrix()
    assert xu.rotation_error(turn @ upside_down, turn, revolved) == pytest.approx(180)
    symmetries[1, :3, :3] = upside_down
    both = dataclasses.replace(revolved, symmetries=symmetries)
    assert xu.rotation_error(turn @ slight @ upside_down @ about, turn, both) == pytest.approx(7)
    ball = dataclasses.replace(xu.XWING, axes=np.tile(axis, (3, 1, 1)))
    assert xu.rotation_error(turn, slight, ball) == 0


# ------------------------------------------------------------ mirror


def test_mirror_is_its_own_inverse_and_leaves_its_argument_alone(camera, matrices):
    keypoints = xu.keypoints_of(matrices, *camera)
    before = keypoints.copy()
    mirrored = xu.mirror_keypoints(keypoints, 256)
    np.testing.assert_array_equal(keypoints, before)
    assert not np.allclose(mirrored, keypoints)
    assert np.abs(xu.mirror_keypoints(mirrored, 256) - keypoints).max() < 1e-6


def test_further_columns_stay_with_a_mirrored_keypoint():
    keypoints = np.column_stack([np.arange(8) * 10.0, np.zeros(8), np.arange(8)])
    mirrored = xu.mirror_keypoints(keypoints, 100)
    np.testing.assert_array_equal(mirrored[:, 2], xu.MIRROR)
    np.testing.assert_array_equal(mirrored[:, 0], 100 - 10 * mirrored[:, 2])


def test_swapped_corners_of_a_mirrored_frame_are_the_corners_of_the_mirrored_pose(camera, matrices):
    swapped = xu.mirror_keypoints(xu.keypoints_of(matrices, *camera, 320, 240), 320)
    mirrored = np.array([xu.mirror_transformation(m) for m in matrices])
    assert np.abs(swapped - xu.keypoints_of(mirrored, *camera, 320, 240)).max() < 1e-6
    np.testing.assert_allclose(np.linalg.det(mirrored[:, :3, :3]), 1)


def test_a_point_without_mirror_image_has_no_permutation():
    with pytest.raises(ValueError, match="mirror image"):
        xu.mirror_permutation([[0.1, 0, 0], [-0.1, 0, 0], [0.2, 0, 0]])


# ------------------------------------------------------------ facing the camera


def test_normals_that_face_the_camera_from_above_and_from_below(camera):
    points = np.zeros((3, 3))
    normals = [[0, 0, 1], [0, 0, -1], [0, 0, 0]]
    got = xu.front_facing([np.eye(4), np.diag([-1.0, 1.0, -1.0, 1.0])], camera[0], points, normals)
    assert got.tolist() == [[True, False, True], [False, True, True]]


def test_facing_depends_on_the_line_of_sight_and_not_on_the_camera_s_axis(camera):
    matrix = np.eye(4)
    matrix[0, 3] = 0.4  # right of the camera, which sees the ship's left side
    got = xu.front_facing([matrix], camera[0], np.zeros((2, 3)), [[-1, 0, 0], [1, 0, 0]])
    assert got.tolist() == [[True, False]]


def test_corners_always_face_the_camera(camera, matrices):
    facing = xu.front_facing(matrices, camera[0])
    assert facing[:, :8].all() and 0.3 < facing[:, 8:].mean() < 0.9
