"""Constants, projection, poses and the mirror, against OpenCV, the format's formula and cases worked out by hand."""

from pathlib import Path

import cv2
import make_xwing
import numpy as np
import pytest
import render
import trimesh
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation

import xwing_utils as xu

BOX = xu.to_homogeneous(xu.BOUNDING_BOX)
SIZES = [(256, 256), (640, 360), (200, 333)]  # width, height


def rigid(rng):
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = Rotation.random(rng=rng).as_matrix(), rng.normal(0, 0.2, 3)
    return matrix


# ------------------------------------------------------------ constants


def test_bounding_box_has_the_documented_corners_in_order():
    assert xu.BOUNDING_BOX.tolist() == [
        [-0.156, -0.182, -0.032], [0.156, -0.182, -0.032], [-0.156, 0.163, -0.032], [0.156, 0.163, -0.032],
        [-0.156, -0.182, 0.034], [0.156, -0.182, 0.034], [-0.156, 0.163, 0.034], [0.156, 0.163, 0.034]]


def test_edges_are_the_twelve_of_a_box():
    assert len({tuple(sorted(edge)) for edge in xu.BOX_EDGES.tolist()}) == 12
    difference = xu.BOUNDING_BOX[xu.BOX_EDGES[:, 0]] != xu.BOUNDING_BOX[xu.BOX_EDGES[:, 1]]
    assert (difference.sum(1) == 1).all()


def test_lasers_are_the_four_documented_lines():
    assert {tuple(map(tuple, laser)) for laser in xu.LASERS.tolist()} == {
        ((x, -0.1, z), (x, -0.3, z)) for x in (-0.145, 0.145) for z in (-0.01, 0.01)}


def test_mirror_is_an_involution():
    assert sorted(xu.MIRROR) == list(range(8))
    assert (xu.MIRROR[xu.MIRROR] == np.arange(8)).all()


def test_mirror_turns_x_round():
    np.testing.assert_array_equal(xu.BOUNDING_BOX[xu.MIRROR], xu.BOUNDING_BOX * [-1, 1, 1])


@pytest.mark.parametrize("name,flip", [("identity", [1, 1, 1]), ("left-right", [-1, 1, 1]), ("top-bottom", [1, 1, -1]),
                                       ("both", [-1, 1, -1]), ("nose-tail", [1, -1, 1])])
def test_namings_turn_their_axes_round(name, flip):
    np.testing.assert_array_equal(np.sign(xu.BOUNDING_BOX[xu.NAMINGS[name]]), np.sign(xu.BOUNDING_BOX) * flip)


# ------------------------------------------------------------ projection


@pytest.mark.parametrize("width,height", SIZES)
def test_projection_agrees_with_opencv(camera, matrices, width, height):
    view, projection = camera
    K = xu.camera_matrix(projection, width, height)
    for matrix in matrices:
        pose = xu.pose_in_camera(view, matrix)
        vector = Rotation.from_matrix(pose[:3, :3]).as_rotvec()
        expected = cv2.projectPoints(xu.BOUNDING_BOX, vector, pose[:3, 3], K, None)[0][:, 0]
        got = xu.project_points(np.empty((height, width, 3)), BOX, view, projection, matrix)
        assert np.abs(got - expected).max() < 1e-6


def test_projection_agrees_with_opencv_for_a_turned_camera_and_an_off_centre_lens(camera, matrices):
    projection = camera[1].copy()
    projection[0, 2], projection[1, 2], projection[1, 1] = 0.13, -0.07, 2.5
    view = camera[0] @ np.block([[Rotation.from_euler("xyz", (4, -6, 30), degrees=True).as_matrix(), np.zeros((3, 1))], [np.eye(4)[3]]])
    K = xu.camera_matrix(projection, 320, 240)
    for matrix in matrices:
        pose = xu.pose_in_camera(view, matrix)
        vector = Rotation.from_matrix(pose[:3, :3]).as_rotvec()
        expected = cv2.projectPoints(xu.BOUNDING_BOX, vector, pose[:3, 3], K, None)[0][:, 0]
        got = xu.project_points(np.empty((240, 320)), BOX, view, projection, matrix)
        assert np.abs(got - expected).max() < 1e-6


@pytest.mark.parametrize("width,height", SIZES)
def test_projection_follows_the_format_s_formula(camera, matrices, width, height):
    view, projection = camera
    for matrix in matrices[:5]:
        got = xu.project_points(np.empty((height, width)), BOX, view, projection, matrix)
        for point, (x, y) in zip(BOX, got):
            clip = projection @ (view @ (matrix @ point))
            assert x == pytest.approx((clip[0] / clip[3] + 1) / 2 * width, abs=1e-9)
            assert y == pytest.approx((-clip[1] / clip[3] + 1) / 2 * height, abs=1e-9)


def test_projection_of_points_worked_out_by_hand(camera):
    got = xu.project_points(np.empty((256, 256, 3)), [[0, 0, 0, 1], [0.1, 0, 0, 1], [0, 0.1, 0, 1], [0.1, 0, -1, 1]], *camera)
    np.testing.assert_allclose(got, [[128, 128], [152.88889, 128], [128, 103.11111], [140.444444, 128]], atol=1e-4)


def test_no_transformation_is_the_identity(camera):
    frame = np.empty((256, 256))
    np.testing.assert_array_equal(xu.project_points(frame, BOX, *camera), xu.project_points(frame, BOX, *camera, np.eye(4)))


def test_only_the_size_of_the_image_counts(camera):
    zeros, noise = np.zeros((40, 70, 3), np.uint8), np.random.default_rng(0).random((40, 70))
    np.testing.assert_array_equal(xu.project_points(zeros, BOX, *camera), xu.project_points(noise, BOX, *camera))


@pytest.mark.parametrize("points", [xu.BOUNDING_BOX, [0, 0, 0, 1], np.ones((2, 2, 4))])
def test_points_of_a_wrong_shape(camera, points):
    with pytest.raises(ValueError, match="points"):
        xu.project_points(np.empty((256, 256)), points, *camera)


@pytest.mark.parametrize("place,name", [(0, "model_view_matrix"), (1, "projection_matrix"), (2, "transformation_mat")])
def test_matrices_of_a_wrong_shape(camera, place, name):
    matrices = [*camera, np.eye(4)]
    matrices[place] = np.eye(3)
    with pytest.raises(ValueError, match=name):
        xu.project_points(np.empty((256, 256)), BOX, *matrices)


@pytest.mark.parametrize("z", [1.0, 1.01, 3.0])
def test_points_at_or_behind_the_camera(camera, z):
    with pytest.raises(ValueError, match="1 of 2 points are at or behind"):
        xu.project_points(np.empty((256, 256)), [[0, 0, 0, 1], [0, 0, z, 1]], *camera)


def test_points_with_nan(camera):
    with pytest.raises(ValueError, match="NaN"):
        xu.project_points(np.empty((256, 256)), [[0, np.nan, 0, 1]], *camera)


def test_project_pose_is_the_same_projection(camera, K, matrices):
    expected = xu.keypoints_of(matrices, *camera)
    got = [xu.project_pose(xu.BOUNDING_BOX, xu.pose_in_camera(camera[0], m), K) for m in matrices]
    np.testing.assert_allclose(got, expected, atol=1e-9)


def test_project_pose_has_no_position_behind_the_camera(K):
    got = xu.project_pose(np.array([[0, 0, 1.0], [0, 0, -1.0], [1.0, 1.0, 0]]), np.eye(4), K)
    np.testing.assert_array_equal(np.isnan(got).all(1), [False, True, True])


def test_camera_matrix_at_256_pixels(camera):
    expected = [[248.8889, 0, 128], [0, 248.8889, 128], [0, 0, 1]]
    np.testing.assert_allclose(xu.camera_matrix(camera[1], 256, 256), expected, atol=1e-4)


def test_camera_matrix_of_a_non_square_frame(camera):
    expected = [[1.9444443 * 320, 0, 320], [0, 1.9444443 * 180, 180], [0, 0, 1]]
    np.testing.assert_allclose(xu.camera_matrix(camera[1], 640, 360), expected, atol=1e-4)


def test_pose_in_camera_turns_y_and_z_round(camera):
    expected = [[1, 0, 0, 0.1], [0, -1, 0, -0.2], [0, 0, -1, 0.7], [0, 0, 0, 1]]
    matrix = np.eye(4)
    matrix[:3, 3] = 0.1, 0.2, 0.3
    np.testing.assert_allclose(xu.pose_in_camera(camera[0], matrix), expected, atol=1e-12)


def test_transformation_from_pose_is_the_inverse_of_pose_in_camera():
    rng = np.random.default_rng(3)
    for _ in range(20):
        view, matrix = rigid(rng), rigid(rng)
        np.testing.assert_allclose(xu.transformation_from_pose(view, xu.pose_in_camera(view, matrix)), matrix, atol=1e-12)


def test_in_frame_holds_the_left_and_top_border_only():
    inside = xu.in_frame([[0, 0], [319.99, 239.99], [320, 10], [10, 240], [-0.01, 10], [np.nan, 10]], 320, 240)
    assert inside.tolist() == [True, True, False, False, False, False]


# ------------------------------------------------------------ mirror


def test_mirror_of_mirror_is_the_identity(camera, matrices):
    keypoints = xu.keypoints_of(matrices, *camera)
    twice = xu.mirror_keypoints(xu.mirror_keypoints(keypoints, 256), 256)
    assert np.abs(twice - keypoints).max() < 1e-6
    assert not np.allclose(xu.mirror_keypoints(keypoints, 256), keypoints)


def test_mirroring_leaves_its_argument_alone():
    keypoints = np.random.default_rng(0).uniform(0, 256, (8, 2))
    before = keypoints.copy()
    xu.mirror_keypoints(keypoints, 256)
    np.testing.assert_array_equal(keypoints, before)


def test_further_columns_travel_with_a_mirrored_keypoint():
    keypoints = np.column_stack([np.arange(8) * 10.0, np.zeros(8), np.arange(8)])
    mirrored = xu.mirror_keypoints(keypoints, 100)
    np.testing.assert_array_equal(mirrored[:, 2], xu.MIRROR)
    np.testing.assert_array_equal(mirrored[:, 0], 100 - 10 * mirrored[:, 2])


def test_swapped_corners_of_a_mirrored_frame_are_the_corners_of_the_mirrored_pose(camera, matrices):
    swapped = xu.mirror_keypoints(xu.keypoints_of(matrices, *camera, 320, 240), 320)
    mirrored = xu.keypoints_of([xu.mirror_transformation(m) for m in matrices], *camera, 320, 240)
    assert np.abs(swapped - mirrored).max() < 1e-6


def test_mirrored_pose_is_a_rotation(matrices):
    for matrix in matrices[:10]:
        rotation = xu.mirror_transformation(matrix)[:3, :3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(rotation) == pytest.approx(1)


def test_mirror_permutation_of_the_corners_is_mirror():
    np.testing.assert_array_equal(xu.mirror_permutation(xu.BOUNDING_BOX), xu.MIRROR)


def test_mirror_permutation_of_all_keypoints_turns_points_and_normals_round():
    permutation = xu.mirror_permutation(xu.KEYPOINTS)
    np.testing.assert_allclose(xu.KEYPOINTS[permutation], xu.KEYPOINTS * [-1, 1, 1])
    np.testing.assert_allclose(xu.NORMALS[permutation], xu.NORMALS * [-1, 1, 1])


def test_a_point_without_mirror_image_has_no_permutation():
    with pytest.raises(ValueError, match="mirror image"):
        xu.mirror_permutation([[0.1, 0, 0], [-0.1, 0, 0], [0.2, 0, 0]])


# ------------------------------------------------------------ facing


def test_facing_of_a_ship_seen_from_above_and_from_below(camera):
    points, normals = np.zeros((3, 3)), [[0, 0, 1], [0, 0, -1], [0, 0, 0]]
    upside_down = np.diag([-1.0, 1.0, -1.0, 1.0])
    got = xu.facing([np.eye(4), upside_down], camera[0], points, normals)
    assert got.tolist() == [[True, False, True], [False, True, True]]


def test_facing_counts_the_direction_to_the_point_and_not_the_camera_s_axis(camera):
    matrix = np.eye(4)
    matrix[0, 3] = 0.4  # right of the camera: it sees the left side of the ship
    got = xu.facing([matrix], camera[0], np.zeros((2, 3)), [[-1, 0, 0], [1, 0, 0]])
    assert got.tolist() == [[True, False]]


def test_corners_always_face_the_camera(camera, matrices):
    assert xu.facing(matrices, camera[0])[:, :8].all()


# ------------------------------------------------------------ the mesh


def test_bounding_box_of_the_mesh_is_the_eight_corners(root):
    lines = (root / "data" / "xwing.obj").read_text().splitlines()
    vertices = np.array([line.split()[1:4] for line in lines if line.startswith("v ")], float)
    np.testing.assert_allclose(vertices.min(0), xu.BOUNDING_BOX[0], atol=1e-3)
    np.testing.assert_allclose(vertices.max(0), xu.BOUNDING_BOX[7], atol=1e-3)


def test_mesh_is_mirror_symmetric_material_by_material(root):
    for name, (vertices, faces, _) in xu.load_mesh(root / "data" / "xwing.obj").items():
        centres = vertices[np.unique(faces)]
        distance, _ = KDTree(centres).query(centres * [-1, 1, 1])
        assert distance.max() < 1e-5, name


def test_surface_points_lie_on_the_mesh():
    mesh = trimesh.util.concatenate(list(make_xwing.build().values()))
    samples, _ = trimesh.sample.sample_surface(mesh, 50000, seed=0)
    distance, _ = KDTree(samples).query(xu.SURFACE_POINTS)
    assert distance.max() < 0.0105  # intakes and nozzles are hollow; an intake has that radius


def test_the_committed_mesh_is_what_the_script_writes(root, tmp_path):
    make_xwing.write(tmp_path)
    for name in ("xwing.obj", "xwing.mtl"):
        assert (tmp_path / name).read_text() == (root / "data" / name).read_text()


@pytest.fixture(scope="module")
def ship():
    root = Path(xu.__file__).parent
    matrices = xu.load_dataset(root / "data" / "sample")[1][:8]
    model_view, projection = xu.load_camera(root / "data" / "sample")
    poses = [xu.pose_in_camera(model_view, matrix) for matrix in matrices]
    return xu.load_mesh(root / "data" / "xwing.obj"), poses, xu.camera_matrix(projection, 256, 256)


def hits(triangles, start, direction):
    """How far along a ray each triangle is that it hits, in multiples of its direction.

    Cramer's rule: first + u (second - first) + v (third - first) = start + t direction.
    """
    first, second, third = np.moveaxis(triangles, 1, 0)
    columns = np.stack([second - first, third - first, np.broadcast_to(-direction, first.shape)], -1)
    columns[np.abs(np.linalg.det(columns)) < 1e-12] = np.eye(3) * 1e9
    u, v, t = np.linalg.solve(columns, (start - first)[..., None])[..., 0].T
    return t[(u >= 0) & (v >= 0) & (u + v <= 1)]


def test_depth_of_the_mesh_agrees_with_ray_casting(ship):
    mesh, poses, K = ship
    triangles = xu.mesh_triangles(mesh)
    depth = xu.mesh_depth(triangles, poses[0], K, 256, 256)
    row, column = np.nonzero(np.isfinite(depth))
    chosen = np.random.default_rng(0).choice(len(row), 200, replace=False)
    rays = np.column_stack([column + 0.5, row + 0.5, np.ones(len(row))])[chosen] @ np.linalg.inv(K).T
    seen, nearest = triangles @ poses[0][:3, :3].T + poses[0][:3, 3], np.full(200, np.inf)
    for i, ray in enumerate(rays):
        z = hits(seen, np.zeros(3), ray)
        nearest[i] = z[z > 0.1].min(initial=np.inf)
    error = np.abs(nearest - depth[row, column][chosen])
    inside = np.isfinite(nearest)  # the outermost pixels are drawn although their centre is just outside
    assert inside.mean() > 0.8 and (error[inside] < 0.002).mean() > 0.9 and np.median(error[inside]) < 1e-4


def test_triangle_map_covers_what_the_renderer_draws(ship):
    mesh, poses, K = ship
    camera = np.diag([1.0, -1, -1, 1]) @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, -1], [0, 0, 0, 1]])
    for pose in poses[:3]:
        shown = xu.triangle_map(xu.mesh_triangles(mesh), pose, K * [[8], [8], [1]], 2048, 2048)
        cover = (shown >= 0).reshape(256, 8, 256, 8).mean((1, 3))
        look = render.random_look(np.random.default_rng(0), list(mesh))
        truth = render.renderer().ship(np.linalg.inv(camera) @ pose, look, samples=64)[..., 3]
        assert np.abs(cover - truth).sum() < 0.06 * truth.sum()


@pytest.mark.parametrize("sun", [(0.6, 0, 0.8), (-0.48, 0.6, -0.64), (-0.36, -0.48, 0.8)])
def test_the_sun_shines_on_what_no_ray_towards_it_hits(ship, sun):
    mesh, sun = ship[0], np.array(sun, float)
    triangles = xu.mesh_triangles(mesh)
    area = np.linalg.norm(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1)
    points = triangles[np.random.default_rng(4).choice(len(triangles), 150, p=area / area.sum())].mean(1)
    depth = np.array([hits(triangles, point, sun).max(initial=0) for point in points])
    lit, clear = xu.in_the_sun(triangles, points, sun), (depth < 1e-4) | (depth > 0.02)  # thinner parts are within the tolerance
    assert clear.sum() > 80 and 0.2 < lit[clear].mean() < 0.8 and (lit == (depth < 0.02))[clear].mean() > 0.95


def test_relight_keeps_the_ship_and_replaces_the_rest(ship):
    mesh, poses, K = ship
    image = np.full((256, 256, 3), 128, np.uint8)
    for k, pose in enumerate(poses[:4]):
        first, again, other = (xu.relight(image, pose, K, mesh, np.random.default_rng(seed)) for seed in (k, k, k + 100))
        assert first.shape == image.shape and first.dtype == np.uint8
        np.testing.assert_array_equal(first, again)
        assert (first != other).mean() > 0.5
    black = xu.relight(image * 0, poses[0], K, mesh, np.random.default_rng(7))  # a black ship stays black under a light without highlights
    depth = xu.mesh_depth(xu.mesh_triangles(mesh), poses[0], K, 256, 256)
    inner = cv2.erode(np.isfinite(depth).astype(np.uint8), np.ones((5, 5))) > 0
    assert inner.sum() > 300 and (black[inner] == 0).mean() > 0.97 and black[~np.isfinite(depth)].mean() > 5


def test_a_ship_behind_the_camera_is_named_by_its_matrix(sample, camera):
    matrices = np.array(sample[1][:3])
    matrices[1] = xu.transformation_from_pose(camera[0], np.eye(4))  # the ship sits in the camera
    with pytest.raises(ValueError, match=r"matrix 1 of 3: \d of 8 points are at or behind the camera"):
        xu.keypoints_of(matrices, *camera)
