"""The mesh: what the reader accepts and refuses; what the rasteriser shows, against casting rays."""

import cv2
import numpy as np
import pytest
from scipy.spatial import KDTree

import xwing_utils as xu
from xwing import mesh

SQUARE = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\n"


@pytest.fixture(scope="module")
def ship(root):
    return mesh.load_mesh(root / "data" / "xwing.obj")


@pytest.fixture(scope="module")
def poses(sample, camera):
    return [xu.pose_in_camera(camera[0], matrix) for matrix in sample[1][:8]]


def write(folder, text, name="a.obj"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def hits(triangles, start, direction):
    """How far along a ray each triangle is that it hits, in multiples of its direction, and which those are.

    Cramer's rule: first + u (second - first) + v (third - first) = start + t direction.
    """
    first, second, third = np.moveaxis(triangles, 1, 0)
    columns = np.stack(
        [second - first, third - first, np.broadcast_to(-direction, first.shape)], -1
    )
    columns[np.abs(np.linalg.det(columns)) < 1e-12] = np.eye(3) * 1e9
    u, v, t = np.linalg.solve(columns, (start - first)[..., None])[..., 0].T
    hit = (u >= 0) & (v >= 0) & (u + v <= 1)
    return t[hit], np.flatnonzero(hit)


def areas(triangles):
    first, second, third = np.moveaxis(triangles, 1, 0)
    return np.linalg.norm(np.cross(second - first, third - first), axis=1) / 2


def cast(triangles, pose, K, pixels):
    """The triangle (or -1) and the depth (or inf) that rays through the centres of pixels (N, 2) meet."""
    seen = triangles @ pose[:3, :3].T + pose[:3, 3]
    ids, depths = [], []
    for pixel in pixels:
        z, which = hits(seen, np.zeros(3), np.linalg.solve(K, [*(pixel + 0.5), 1]))
        z, which = z[z >= mesh.NEAR], which[z >= mesh.NEAR]
        ids.append(which[z.argmin()] if len(z) else -1)
        depths.append(z.min(initial=np.inf))
    return np.array(ids), np.array(depths)


# ------------------------------------------------------------ reading


def test_the_supplied_mesh_keeps_the_order_and_the_colours_of_its_file(root, ship):
    lines = (root / "data" / "xwing.obj").read_text().splitlines()
    assert ship.names == [line.split()[1] for line in lines if line.startswith("usemtl")]
    library = (root / "data" / "xwing.mtl").read_text().splitlines()
    colours = [line.split()[1:] for line in library if line.startswith("Kd")]
    assert np.array_equal(ship.colours, np.array(colours, float))
    faces = [line.split()[1:] for line in lines if line.startswith("f ")]
    assert np.array_equal(
        ship.faces, np.array([[int(v.split("/")[0]) - 1 for v in face] for face in faces])
    )
    assert (np.diff(ship.face_materials) >= 0).all() and ship.triangles.shape == (
        len(ship.faces),
        3,
        3,
    )


def test_the_supplied_mesh_fills_the_bounding_box_and_is_symmetric_material_by_material(ship):
    np.testing.assert_allclose(ship.vertices.min(0), xu.BOUNDING_BOX[0], atol=1e-3)
    np.testing.assert_allclose(ship.vertices.max(0), xu.BOUNDING_BOX[7], atol=1e-3)
    for material, name in enumerate(ship.names):
        corners = ship.vertices[np.unique(ship.faces[ship.face_materials == material])]
        assert KDTree(corners).query(corners * [-1, 1, 1])[0].max() < 1e-5, name


def test_what_an_obj_may_hold(tmp_path):
    write(tmp_path, "newmtl red paint\nKd 0.9 0.123456 0\n", "a.mtl")
    path = write(
        tmp_path,
        b"\xef\xbb\xbf"
        + SQUARE.encode()  # with a byte order mark
        + b"# caf\xe9 in Latin-1\nmtllib a.mtl\nf 1/1/1 2//2 \\\n3 4\n"
        b"usemtl red paint\nvn 0 0 1\nf -4 -3 -2 # behind\nusemtl none\nf 1 3 4\n"
        b"usemtl red paint\nf 2 3 4\n",
    )
    found = mesh.load_mesh(path)
    assert found.names == ["default", "red paint", "none"]
    assert np.array_equal(found.colours, [mesh.GREY, [0.9, 0.123456, 0], mesh.GREY])
    assert found.faces.tolist() == [
        [0, 1, 2],
        [0, 2, 3],
        [0, 1, 2],
        [1, 2, 3],
        [0, 2, 3],
    ]  # by material
    assert found.face_materials.tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    "text,message",
    [
        ("f 1 2 5", "line 5: .*one of the 4 vertices"),
        ("f 1 2 -9", "line 5: .*one of the 4 vertices"),
        ("f 1 2 0", "line 5"),
        ("f 1 2 x", "line 5"),
        ("f 1 2", "line 5: .*three corners"),
        ("usemtl", "line 5: .*a name"),
        ("mtllib", "line 5: .*a name"),
        ("v 0 nan 0", "line 5: .*three finite"),
        ("v 1 2", "line 5"),
        ("v a b c", "line 5"),
        ("v 0 inf 0\nf 1 2 3", "line 5"),
        ("mtllib ../a.mtl", "line 5: .*in the mesh's folder"),
        ("mtllib /etc/passwd", "in the mesh's folder"),
        ("mtllib b.mtl", "b.mtl, line 2: .*three finite numbers"),
        ("# nothing", "no faces"),
    ],
)
def test_what_an_obj_may_not_hold_is_named_with_its_file_and_line(tmp_path, text, message):
    write(tmp_path, "newmtl a\nKd 0.1 x 0\n", "b.mtl")
    with pytest.raises(ValueError, match=message) as error:
        mesh.load_mesh(write(tmp_path, SQUARE + text))
    assert str(tmp_path) in str(error.value)


def test_a_missing_mesh_and_a_missing_material_library(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.obj"):
        mesh.load_mesh(tmp_path / "nothing.obj")
    found = mesh.load_mesh(write(tmp_path, SQUARE + "mtllib gone.mtl\nusemtl a\nf 1 2 3"))
    assert np.array_equal(found.colours, [mesh.GREY])


# ------------------------------------------------------------ drawing

CAMERAS = {  # width, height, K: not square, off-centre, skewed, without the ship in the middle
    "square": (256, 256, [[248.9, 0, 128], [0, 248.9, 128], [0, 0, 1]]),
    "wide": (311, 173, [[260, 0, 120], [0, 230, 101], [0, 0, 1]]),
    "tall and skewed": (120, 301, [[300, 25, 20], [0, 310, 170], [0, 0, 1]]),
}


@pytest.mark.parametrize("name", CAMERAS)
def test_the_rasteriser_shows_what_rays_through_the_pixels_meet(ship, poses, name):
    width, height, K = CAMERAS[name]
    K, triangles, rng = np.array(K), ship.triangles, np.random.default_rng(0)
    for pose in poses[:3]:
        pose = pose.copy()
        pose[:2, 3] = 0
        ids, depth = mesh.rasterise(triangles, pose, K, width, height)
        assert ids.shape == depth.shape == (height, width)
        assert (ids.dtype, depth.dtype) == (np.int32, np.float32)
        assert np.array_equal(ids == -1, np.isinf(depth)) and (ids >= 0).sum() > 500
        about = np.argwhere(cv2.dilate((ids >= 0).astype(np.uint8), np.ones((5, 5))) > 0)
        row, column = about[rng.choice(len(about), 150, replace=False)].T
        true_ids, true_depth = cast(triangles, pose, K, np.column_stack([column, row]))
        assert np.array_equal(ids[row, column] >= 0, true_ids >= 0)
        seen = true_ids >= 0
        np.testing.assert_allclose(depth[row, column][seen], true_depth[seen], atol=1e-5)
        assert (ids[row, column] == true_ids).mean() > 0.98  # coplanar ones are the same surface


def test_triangles_that_cross_the_plane_of_the_camera_are_cut_there():
    rng, K = np.random.default_rng(1), np.array([[260, 0, 120], [0, 250, 101], [0, 0, 1.0]])
    triangles = rng.uniform([-1, -1, -1.5], [1, 1, 2.5], (40, 3, 3))
    assert ((triangles[..., 2] < 0).any(1) & (triangles[..., 2] > 0).any(1)).sum() > 10
    ids, depth = mesh.rasterise(triangles, np.eye(4), K, 301, 173)
    pixels = np.array([(x, y) for y in range(0, 173, 12) for x in range(0, 301, 12)])
    true_ids, true_depth = cast(triangles, np.eye(4), K, pixels)
    column, row = pixels.T
    assert (ids[row, column] == true_ids).mean() > 0.99 and (true_ids >= 0).mean() > 0.9
    seen = (true_ids >= 0) & (ids[row, column] == true_ids)
    np.testing.assert_allclose(depth[row, column][seen], true_depth[seen], rtol=1e-3)


def test_nothing_is_drawn_of_what_lies_behind_the_camera(ship, K):
    behind = np.eye(4)
    behind[2, 3] = -1
    ids, depth = mesh.rasterise(ship.triangles, behind, K, 64, 48)
    assert (ids == -1).all() and np.isinf(depth).all()


def test_front_facing_is_counter_clockwise_as_seen(K):
    triangle = np.array(
        [[[0, 0, 0], [1, 0, 0], [0, 1, 0]]], float
    )  # counter-clockwise seen from +z
    above, below = np.diag([1.0, -1, -1, 1]), np.eye(4)
    above[2, 3] = below[2, 3] = 5
    assert mesh.front_facing_triangles(triangle, above).tolist() == [True]
    assert mesh.front_facing_triangles(triangle, below).tolist() == [False]


def test_the_largest_triangles_make_up_the_share_of_the_surface(ship):
    triangles = ship.triangles
    area = areas(triangles)
    chosen = mesh.largest_triangles(triangles, 0.9)
    assert 0.9 <= area[chosen].sum() / area.sum() < 0.901 and len(chosen) < 0.5 * len(area)
    assert area[chosen].min() >= np.delete(area, chosen).max()


def test_what_never_shows_can_be_left_out_and_what_is_inside_is_dark(ship, poses, K):
    area, openness = mesh.visibility(ship.triangles)
    front = mesh.front_facing_triangles(ship.triangles, poses[0])
    kept = np.flatnonzero(area[np.arange(len(front)), 1 - front] > 0)
    large = K * [[4], [4], [1]]
    whole = mesh.rasterise(ship.triangles, poses[0], large, 1024, 1024)[1]
    part = mesh.rasterise(ship.triangles[kept], poses[0], large, 1024, 1024)[1]
    assert (
        len(kept) < 0.6 * len(front) and (np.isfinite(whole) == np.isfinite(part)).mean() > 0.9999
    )
    assert (openness >= 0).all() and (openness <= 1).all() and (openness[area == 0] == 0).all()
    box = np.array([[-1, 1, 0], [1, 1, 0], [1, -1, 0]], float)[
        None
    ]  # alone: wide open on both sides
    area, openness = mesh.visibility(box)
    assert openness.min() > 0.95 and (area > 0).all()
    roof = np.concatenate([box, 5 * box + [0, 0, 0.3]])
    assert mesh.visibility(roof)[1][0].min() < 0.4 < 0.9 < mesh.visibility(roof)[1][0].max()


@pytest.mark.parametrize("sun", [(0.6, 0, 0.8), (-0.48, 0.6, -0.64), (-0.36, -0.48, 0.8)])
def test_the_sun_shines_on_what_no_ray_towards_it_hits(ship, sun):
    triangles, sun = ship.triangles, np.array(sun)
    area = areas(triangles)
    points = triangles[
        np.random.default_rng(4).choice(len(triangles), 150, p=area / area.sum())
    ].mean(1)
    depth = np.array([hits(triangles, point, sun)[0].max(initial=0) for point in points])
    clear = (depth < 1e-4) | (depth > 0.02)  # thinner parts are within the tolerance
    lit = mesh.sunlit(triangles, points, sun)
    assert (
        clear.sum() > 80
        and 0.2 < lit[clear].mean() < 0.8
        and (lit == (depth < 0.02))[clear].mean() > 0.95
    )
