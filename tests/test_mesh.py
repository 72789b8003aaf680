"""Reading: what is accepted and refused. Drawing: what the rasteriser shows, against cast rays."""

import dataclasses
import hashlib
import json
import warnings

import cv2
import numpy as np
import pytest
import trimesh
from PIL import Image
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation

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
    """How far along a ray, in multiples of its direction, it hits triangles, and which it hits.

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
    """The triangle (or -1) and depth (or inf) that rays through pixels' centres (N, 2) meet."""
    seen = triangles @ pose[:3, :3].T + pose[:3, 3]
    near = mesh.NEAR * np.linalg.norm(np.ptp(triangles.reshape(-1, 3), axis=0))
    ids = []
    depths = []
    for pixel in pixels:
        z, which = hits(seen, np.zeros(3), np.linalg.solve(K, [*(pixel + 0.5), 1]))
        which = which[z >= near]
        z = z[z >= near]
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
    vertices = [line.split()[1:] for line in lines if line.startswith("v ")]
    assert np.array_equal(ship.vertices, np.array(vertices, float))
    assert (np.diff(ship.face_materials) >= 0).all()
    assert ship.triangles.shape == (len(ship.faces), 3, 3)


def test_the_supplied_mesh_is_the_one_that_the_committed_sets_were_rendered_from(root, ship):
    parts = [
        ship.triangles.astype("<f8"),
        ship.face_materials.astype("<i8"),
        ship.colours.astype("<f8"),
    ]
    text = json.dumps(ship.names).encode() + b"".join(part.tobytes() for part in parts)
    info = json.loads((root / "data" / "test" / "render_info.json").read_text())
    assert hashlib.sha256(text).hexdigest()[:16] == info["mesh_digest"]


def test_the_supplied_mesh_loads_without_a_warning_and_without_a_texture(root):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ship = mesh.load_mesh(root / "data" / "xwing.obj")
    assert ship.textures is None and ship.texture_coordinates is None


def test_the_supplied_mesh_fills_the_bounding_box_and_is_symmetric_material_by_material(ship):
    np.testing.assert_allclose(ship.vertices.min(0), xu.BOUNDING_BOX[0], atol=1e-3)
    np.testing.assert_allclose(ship.vertices.max(0), xu.BOUNDING_BOX[7], atol=1e-3)
    for material, name in enumerate(ship.names):
        corners = ship.vertices[np.unique(ship.faces[ship.face_materials == material])]
        assert KDTree(corners).query(corners * [-1, 1, 1])[0].max() < 1e-5, name


def test_the_diameter_is_the_diagonal_of_the_box_of_what_is_drawn(ship):
    low = xu.BOUNDING_BOX[0]
    high = xu.BOUNDING_BOX[7]
    assert abs(ship.diameter - np.linalg.norm(high - low)) < 1e-3
    assert abs(ship.near - 0.01) < 1e-6  # model units, as before lengths were in diameters
    stray = dataclasses.replace(ship, vertices=np.concatenate([ship.vertices, [[9, 9, 9]]]))
    assert stray.diameter == ship.diameter
    assert mesh.diagonal(np.zeros((0, 3, 3))) == 0


def test_what_an_obj_may_hold(tmp_path):
    write(tmp_path, "newmtl red paint\nNs 10\nillum 2\nKd 0.9 0.123456 0\n", "a.mtl")
    byte_order_mark = b"\xef\xbb\xbf"
    text = byte_order_mark + SQUARE.encode()
    text += b"# caf\xe9 in Latin-1\nmtllib a.mtl\nvn 0 0 1\nf 1//1 2//1 3//1 4//1\n"
    text += b"usemtl  red paint\nf 1 2 3\nusemtl none\nf 1 3 4\nusemtl red paint\nf 2\t3 4\r\n"
    found = mesh.load_mesh(write(tmp_path, text))
    assert found.names == ["default", "red paint"]
    assert np.array_equal(found.colours, [mesh.GREY, [0.9, 0.123456, 0]])
    assert found.face_materials.tolist() == [0, 0, 0, 1, 1]
    square = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], float)
    red = square[[[0, 1, 2], [1, 2, 3]]]
    assert np.array_equal(found.triangles[found.face_materials == 1], red)
    others = found.triangles[found.face_materials == 0]
    assert areas(others).tolist() == [0.5] * 3 and set(others.sum((1, 2))) == {3.0}


def test_faces_of_every_kind_are_read_side_by_side(tmp_path):
    text = SQUARE + "vt 0 0\nvt 1 1\nvn 0 0 1\nv 0 0 1\nv 1 0 1\n"
    text += "f 1/1 2/2 3/1\nf 1//1 2//1 3//1\nf 1/1/1 2/2/1 3/1/1\nf 1 2 3 5 6\nf 1 2 3\n"
    found = mesh.load_mesh(write(tmp_path, text)).triangles
    points = np.array([line.split()[1:] for line in text.splitlines() if line[:2] == "v "], float)
    wanted = 3 * [[0, 1, 2]] + [[0, 1, 2], [0, 2, 4], [0, 4, 5], [0, 1, 2]]
    assert np.array_equal(found, points[wanted])


def test_a_face_that_trimesh_would_lose_is_noticed(tmp_path):
    head = SQUARE + "v 0 0 1\nv 1 0 1\nvt 0 0\n"
    for faces in ("f 1 2 3 4 5 6\nf 1/1 2/1 3/1", "f 1/1 2/1 3/1\nf 1 2 3 4 5 6"):
        with pytest.raises(ValueError, match=r"a.obj: .*trimesh finds \d of 5 triangles"):
            mesh.load_mesh(write(tmp_path, f"{head}{faces}\n"))
    with pytest.raises(ValueError, match="a.obj: .*trimesh finds 2 of 3 triangles"):
        mesh.load_mesh(write(tmp_path, SQUARE + "f 1 2 3\n f 1 3 4\nf 1 2 4\n"))


def test_polygons_become_triangles_that_cover_them(tmp_path):
    angle = np.arange(5) * 2 * np.pi / 5
    corners = "".join(f"v {x} {y} 0\n" for x, y in np.column_stack([np.cos(angle), np.sin(angle)]))
    pentagon = mesh.load_mesh(write(tmp_path, corners + "f 1 2 3 4 5"))
    assert len(pentagon.faces) == 3
    assert abs(areas(pentagon.triangles).sum() - 2.5 * np.sin(2 * np.pi / 5)) < 1e-12


@pytest.mark.parametrize(
    "text,message",
    [
        ("f 1 2 5", "index 4 is out of bounds"),
        ("f 1/1 2/1 7/1\nvt 0 0", "out of bounds"),
        ("f -4 -3 -2 -1", "'f -4 -3 -2 -1' is not a face .* absolute indices, as Blender"),
        ("f 1 2 3\nf 1/1 2/1 3/-1\nvt 0 0", "'f 1/1 2/1 3/-1' is not a face"),
        ("f 1 2 0", "'f 1 2 0' is not a face"),
        ("f 0/1/1 2/1/1 3/1/1", "is not a face"),
        ("vn 0 0 1\nf 1//1 2 3\nf 1 2//1 3", "'f 1//1 2 3' is not a face .* of one kind"),
        ("f 1 2 x", "may be damaged"),
        ("f 1 2 3\nf x 2 3", "may be damaged"),
        ("f 1 2", "'f 1 2' is not a face of three or more corners"),
        ("f 1 2 3\nf 1 2 4\nf 1", "'f 1' is not a face"),
        ("v 0 nan 0\nf 1 2 5\nf 1 2 3", "1 of 4 vertices are not finite"),
        ("v 0 inf 0\nf 1 2 3\nf 1 2 5", "not finite"),
        ("v a b c\nf 1 2 3", "may be damaged"),
        ("f 1 2 3\nf 1 2 4\nv 0 1", "a vertex has 2 coordinates"),
        ("# nothing", "no faces"),
        ("f 1 2 3", "1 of 1 faces have an area"),
        ("f 1 2 3\nf 1 1 2", "1 of 2 faces have an area"),
        ("f 1 1 2\nf 3 3 3", "0 of 2 faces have an area"),
    ],
)
def test_what_a_mesh_may_not_hold_is_named_with_its_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        mesh.load_mesh(write(tmp_path, SQUARE + text))
    assert str(tmp_path / "a.obj") in str(error.value)


def test_a_missing_mesh_and_a_file_of_another_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.obj"):
        mesh.load_mesh(tmp_path / "nothing.obj")
    with pytest.raises(FileNotFoundError, match="no such mesh"):
        mesh.load_mesh(tmp_path)
    with pytest.raises(ValueError, match=r"a.fbx: '.fbx' files are not read; export.*\.glb"):
        mesh.load_mesh(write(tmp_path, "x", "a.fbx"))


@pytest.mark.parametrize("colour", ["0.1 nan 0", "0.1 x 0", "0.1 0.2", "0.1"])
def test_a_colour_that_cannot_be_read_is_grey(tmp_path, colour):
    write(tmp_path, f"newmtl b\nKd {colour}\n", "a.mtl")
    found = mesh.load_mesh(write(tmp_path, SQUARE + "mtllib a.mtl\nusemtl b\nf 1 2 3 4"))
    assert np.array_equal(found.colours, [mesh.GREY])


@pytest.mark.parametrize("corners", ["1 2 3 4", "1/1 2/1 3/1 4/1"])
def test_a_missing_material_library_leaves_grey(tmp_path, corners):
    text = SQUARE + f"vt 0 0\nmtllib gone.mtl\nusemtl a\nf {corners}"
    with pytest.warns(UserWarning, match="a.obj: 'gone.mtl' is not in the mesh's folder"):
        found = mesh.load_mesh(write(tmp_path, text))
    assert len(found.faces) == 2 and found.textures is None
    assert np.ptp(found.colours) == 0 and 0.3 < found.colours.min() < 0.7


def test_nothing_outside_the_folder_of_a_mesh_is_read(tmp_path):
    folder = tmp_path / "mesh"
    folder.mkdir()
    write(tmp_path, "newmtl a\nKd 0.1 0.2 0.3\n", "secret.mtl")
    Image.fromarray(PICTURE).save(tmp_path / "secret.png")
    (folder / "link.mtl").symlink_to(tmp_path / "secret.mtl")
    write(folder, "newmtl a\nmap_Kd ../secret.png\n", "a.mtl")
    for name in ("../secret.mtl", str(tmp_path / "secret.mtl"), "link.mtl", "a.mtl"):
        text = f"{SQUARE}vt 0 0\nmtllib {name}\nusemtl a\nf 1/1 2/1 3/1 4/1"
        with pytest.warns(UserWarning, match="is not in the mesh's folder"):
            found = mesh.load_mesh(write(folder, text))
        assert np.ptp(found.colours) == 0 and found.textures is None


def test_a_path_of_another_computer_leads_to_the_file_beside_the_mesh(tmp_path):
    write(tmp_path, "newmtl a\nKd 0.1 0.2 0.3\n", "a.mtl")
    for name in ("/home/somebody/a.mtl", r"C:\export\a.mtl"):
        found = mesh.load_mesh(write(tmp_path, f"{SQUARE}mtllib {name}\nusemtl a\nf 1 2 3 4"))
        assert found.colours.tolist() == [[0.1, 0.2, 0.3]]


@pytest.mark.parametrize("suffix", ["obj", "ply", "stl", "off", "glb"])
def test_every_format_gives_the_same_triangles(tmp_path, suffix):
    shape = trimesh.creation.icosphere(subdivisions=1)
    shape.apply_transform(np.diag([3, 2, 1, 1]))
    shape.export(tmp_path / f"a.{suffix}")
    found = mesh.load_mesh(
        write(tmp_path, (tmp_path / f"a.{suffix}").read_bytes(), "B." + suffix.upper())
    )
    np.testing.assert_allclose(found.triangles, shape.triangles, atol=1e-6)
    assert found.colours.shape == (1, 3) and (found.face_materials == 0).all()
    assert type(found.vertices) is type(found.faces) is np.ndarray  # trimesh's own are slower
    np.testing.assert_allclose(found.diameter, np.sqrt(36 + 16 + 4), rtol=0.05)


@pytest.mark.parametrize("suffix", ["ply", "stl", "off", "glb"])
@pytest.mark.parametrize("kept", [0, 0.02, 0.3, 0.6, 0.9, 0.99])
def test_a_file_that_was_cut_short_is_refused(tmp_path, suffix, kept):
    whole = tmp_path / f"whole.{suffix}"
    trimesh.creation.icosphere(subdivisions=2).export(whole)
    content = whole.read_bytes()
    with pytest.raises(ValueError, match=rf"cut.{suffix}: (not a readable|no faces)"):
        mesh.load_mesh(write(tmp_path, content[: int(kept * len(content))], f"cut.{suffix}"))


def test_an_index_out_of_range_and_points_without_faces_in_a_ply(tmp_path):
    head = "ply\nformat ascii 1.0\nelement vertex 4\n"
    head += "".join(f"property float {axis}\n" for axis in "xyz")
    points = "0 0 0\n1 0 0\n1 1 0\n0 1 0\n"
    faces = "element face 2\nproperty list uchar int vertex_indices\nend_header\n"
    with pytest.raises(ValueError, match="a.ply: .*a face names vertex 4, counted from 0, of 4"):
        mesh.load_mesh(write(tmp_path, head + faces + points + "3 0 1 2\n3 0 2 4\n", "a.ply"))
    with pytest.raises(ValueError, match="a.ply: .*a face names vertex -1"):
        mesh.load_mesh(write(tmp_path, head + faces + points + "3 0 1 2\n3 0 2 -1\n", "a.ply"))
    with pytest.raises(ValueError, match="a.ply: no faces found"):
        mesh.load_mesh(write(tmp_path, head + "end_header\n" + points, "a.ply"))


def test_many_faces_without_area_are_counted_in_a_warning(tmp_path):
    text = SQUARE + "v 2 2 0\n" + "f 1 2 3 4\nf 1 1 2\nf 1 3 5\n"  # a repeated corner; a line
    with pytest.warns(UserWarning, match="a.obj: 2 of 4 faces have no area and are ignored"):
        found = mesh.load_mesh(write(tmp_path, text))
    area, openness = mesh.visibility(found.triangles)
    assert area.any(1).tolist() == openness.any(1).tolist() == [True, True, False, False]


# ------------------------------------------------------------ colours, textures and scenes

PICTURE = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 51]]], np.uint8)
TEXTURED = SQUARE + "vt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\nmtllib a.mtl\nusemtl plain\nf 1 2 3\n"
TEXTURED += "usemtl picture\nf 1/1 2/2 3/3\nf 1/1 3/3 4/4\n"


def test_a_texture_is_kept_with_the_coordinates_of_each_corner(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    library = "newmtl picture\nKd 0.8 0.8 0.8\nmap_Kd a.png\nnewmtl plain\nKd 0.1 0.2 0.3\n"
    write(tmp_path, library, "a.mtl")
    found = mesh.load_mesh(write(tmp_path, TEXTURED))
    assert found.names == ["plain", "picture"]
    assert found.textures[0] is None and np.array_equal(found.textures[1], PICTURE)
    np.testing.assert_allclose(found.colours, [[0.1, 0.2, 0.3], PICTURE.mean((0, 1)) / 255])
    assert found.texture_coordinates.shape == (3, 3, 2)
    drawn = found.face_materials == 1  # here a corner's coordinates are its place in the square
    assert np.array_equal(found.texture_coordinates[drawn], found.triangles[drawn, :, :2])


def test_a_scene_keeps_its_texture_the_same_way_up(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    write(tmp_path, "newmtl picture\nmap_Kd a.png\n", "a.mtl")
    path = write(tmp_path, TEXTURED)
    trimesh.load_scene(path).export(tmp_path / "a.glb")
    found = mesh.load_mesh(tmp_path / "a.glb")
    row = [texture is not None for texture in found.textures].index(True)
    assert np.array_equal(found.textures[row], PICTURE)
    drawn = found.face_materials == row
    assert np.array_equal(found.texture_coordinates[drawn], found.triangles[drawn, :, :2])


def test_a_texture_without_coordinates_gives_its_colour_only(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    write(tmp_path, "newmtl picture\nmap_Kd a.png\n", "a.mtl")
    text = SQUARE + "mtllib a.mtl\nusemtl picture\nf 1 2 3 4"
    found = mesh.load_mesh(write(tmp_path, text))
    assert found.textures is None and found.texture_coordinates is None
    np.testing.assert_allclose(found.colours, [PICTURE.mean((0, 1)) / 255])


def test_a_texture_of_one_colour_is_a_colour(tmp_path):
    Image.new("RGB", (4, 4), (255, 0, 51)).save(tmp_path / "a.png")
    write(tmp_path, "newmtl picture\nmap_Kd a.png\n", "a.mtl")
    found = mesh.load_mesh(write(tmp_path, TEXTURED))
    assert found.textures is None and found.texture_coordinates is None
    np.testing.assert_allclose(found.colours[found.names.index("picture")], [1, 0, 0.2])


@pytest.mark.parametrize("kept", [None, 0, 10, 2000])
def test_a_missing_or_damaged_texture_is_named_and_left_out(tmp_path, kept):
    write(tmp_path, "newmtl picture\nKd 0.1 0.2 0.3\nmap_Kd gone.png\n", "a.mtl")
    if kept is not None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "whole.png")
        write(tmp_path, (tmp_path / "whole.png").read_bytes()[:kept], "gone.png")
    with pytest.warns(UserWarning, match="a.obj: 'gone.png' is not .* or is damaged"):
        found = mesh.load_mesh(write(tmp_path, TEXTURED))
    assert found.textures is None and found.colours[1].tolist() == [0.1, 0.2, 0.3]


def test_the_parts_of_a_scene_stand_in_their_places_and_share_materials_by_name(tmp_path):
    red = trimesh.visual.material.PBRMaterial(name="red", baseColorFactor=[255, 0, 55, 255])
    bare = trimesh.visual.material.PBRMaterial(name="bare")
    box = trimesh.creation.box()
    box.visual = trimesh.visual.TextureVisuals(material=red)
    ball = trimesh.creation.icosphere(subdivisions=1)
    ball.visual = trimesh.visual.TextureVisuals(material=bare)
    moved = np.array([[0, -2, 0, 5], [2, 0, 0, 6], [0, 0, 2, 7], [0, 0, 0, 1.0]])
    mirrored = np.diag([-1.0, 1, 1, 1])
    scene = trimesh.Scene()
    scene.add_geometry(box, node_name="first", transform=moved)
    scene.add_geometry(ball, node_name="second", transform=mirrored)
    scene.add_geometry(box, node_name="third")
    scene.export(tmp_path / "a.glb")

    found = mesh.load_mesh(tmp_path / "a.glb")
    assert found.names == ["red", "bare"]
    blue = 1.055 * (55 / 255) ** (1 / 2.4) - 0.055  # colours of a GLB are linear: IEC 61966-2-1
    np.testing.assert_allclose(found.colours[0], [1, 0, blue], atol=1e-6)
    assert np.array_equal(found.colours[1], mesh.GREY)
    boxes = found.triangles[found.face_materials == 0]
    wanted = np.concatenate([box.triangles @ moved[:3, :3].T + moved[:3, 3], box.triangles])
    order, wanted_order = (np.argsort(t.mean((1, 2)), kind="stable") for t in (boxes, wanted))
    np.testing.assert_allclose(boxes[order], wanted[wanted_order], atol=1e-6)
    balls = found.triangles[found.face_materials == 1]
    assert (mesh.triangle_normals(balls) * balls.mean(1)).sum(1).min() > 0  # still wound outwards


def test_materials_of_the_same_name_but_other_colours_stay_apart(tmp_path):
    scene = trimesh.Scene()
    for x, level in enumerate((0, 255, 0)):
        part = trimesh.creation.box()
        paint = trimesh.visual.material.PBRMaterial(name="p", baseColorFactor=[level] * 3 + [255])
        part.visual = trimesh.visual.TextureVisuals(material=paint)
        part.apply_translation([2 * x, 0, 0])
        scene.add_geometry(part)
    scene.export(tmp_path / "a.glb")
    found = mesh.load_mesh(tmp_path / "a.glb")
    assert len(set(found.names)) == 2 and found.names[0] == "p"
    np.testing.assert_allclose(found.colours, [[0, 0, 0], [1, 1, 1]], atol=1e-12)
    places = found.triangles.mean(1)[:, 0].round()
    assert set(places[found.face_materials == 1]) == {2}
    assert (np.diff(found.face_materials) >= 0).all()


def test_a_mesh_with_colours_of_vertices_has_their_mean(tmp_path):
    box = trimesh.creation.box()
    box.visual.vertex_colors = np.tile([[255, 0, 51, 255], [0, 0, 51, 255]], (4, 1))
    box.export(tmp_path / "a.ply")
    found = mesh.load_mesh(tmp_path / "a.ply")
    np.testing.assert_allclose(found.colours, [[0.5, 0, 0.2]], atol=0.05)


# ------------------------------------------------------------ simplifying


def torus(steps):
    """Vertices and faces of a torus about z with radii 1 and 0.3, in 2 * steps**2 triangles."""
    turn = np.arange(steps) * 2 * np.pi / steps
    u, v = np.meshgrid(turn, turn, indexing="ij")
    from_axis = 1 + 0.3 * np.cos(v)
    vertices = np.stack([from_axis * np.cos(u), from_axis * np.sin(u), 0.3 * np.sin(v)], -1)
    rows = np.arange(steps**2).reshape(steps, steps)
    a = rows
    b = np.roll(rows, -1, 0)
    c = np.roll(b, -1, 1)
    d = np.roll(a, -1, 1)
    faces = np.concatenate([np.stack([a, b, c], -1), np.stack([a, c, d], -1)])
    return vertices.reshape(-1, 3), faces.reshape(-1, 3)


def from_torus(points):
    """Distance of points (N, 3) from the surface of `torus`."""
    from_circle = np.hypot(np.hypot(points[:, 0], points[:, 1]) - 1, points[:, 2])
    return np.abs(from_circle - 0.3)


def test_a_million_triangles_load_with_a_warning_and_are_simplified(tmp_path):
    vertices, faces = torus(708)
    assert len(faces) > 1_000_000
    trimesh.Trimesh(vertices, faces, process=False).export(tmp_path / "a.ply")
    with pytest.warns(UserWarning, match="a.ply: 1,002,528 triangles, simplified to 2") as said:
        found = mesh.load_mesh(tmp_path / "a.ply")
    assert len(said) == 1
    assert 0.99 * mesh.MAX_TRIANGLES < len(found.faces) <= mesh.MAX_TRIANGLES
    assert from_torus(found.vertices).max() < 1e-3
    assert abs(areas(found.triangles).sum() / (4 * np.pi**2 * 0.3) - 1) < 1e-3
    assert abs(found.diameter / np.linalg.norm([2.6, 2.6, 0.6]) - 1) < 1e-4


def test_materials_keep_their_colours_and_outlines_when_a_mesh_is_simplified(tmp_path):
    vertices, faces = torus(100)
    stripe = (vertices[faces].mean(1) @ [3.0, 2, 0] % 1 > 0.3).astype(int)
    lines = ["v {} {} {}".format(*vertex) for vertex in vertices]
    for number, name in enumerate(("dark", "light")):
        lines += [f"usemtl {name}"]
        lines += ["f {} {} {}".format(*face) for face in faces[stripe == number] + 1]
    path = write(tmp_path, "mtllib a.mtl\n" + "\n".join(lines))
    write(tmp_path, "newmtl light\nKd 0.9 0.8 0.7\nnewmtl dark\nKd 0.1 0.2 0.3\n", "a.mtl")

    whole = mesh.load_mesh(path, max_triangles=None)
    with pytest.warns(UserWarning, match="20,000 triangles, simplified"):
        simple = mesh.load_mesh(path, max_triangles=10_000)
    assert len(whole.faces) == 20_000 and len(simple.faces) <= 10_000
    assert simple.names == whole.names == ["dark", "light"]
    assert np.array_equal(simple.colours, whole.colours)
    for material in range(2):
        before = areas(whole.triangles[whole.face_materials == material]).sum()
        after = areas(simple.triangles[simple.face_materials == material]).sum()
        assert abs(after / before - 1) < 0.01

    pose = np.eye(4)
    K = np.array([[300.0, 0, 150], [0, 300, 150], [0, 0, 1]])
    pose[:3, :3] = Rotation.from_euler("x", 40, degrees=True).as_matrix()
    pose[2, 3] = 4
    pictures = []
    for drawn in (whole, simple):
        ids, _ = mesh.rasterise(drawn.triangles, pose, K, 300, 300)
        pictures.append(np.where(ids < 0, -1, drawn.face_materials[ids]))
    assert {*np.unique(pictures[0])} == {-1, 0, 1}
    assert (pictures[0] == pictures[1]).mean() > 0.995  # no cracks, no colour that has spread


def test_a_soup_of_triangles_is_welded_before_it_is_simplified(tmp_path):
    vertices, faces = torus(100)
    trimesh.Trimesh(vertices, faces, process=False).export(tmp_path / "a.stl")
    with pytest.warns(UserWarning, match="simplified to 5,000"):
        found = mesh.load_mesh(tmp_path / "a.stl", max_triangles=5000)
    assert from_torus(found.vertices).max() < 0.01
    closed = trimesh.Trimesh(found.vertices, found.faces, process=False)
    assert closed.is_watertight


def test_loose_triangles_and_many_materials_stay_within_the_limit(tmp_path):
    rng = np.random.default_rng(0)
    corners = rng.random((3000, 1, 3)) + 0.01 * rng.random((3000, 3, 3))
    soup = trimesh.Trimesh(corners.reshape(-1, 3), np.arange(9000).reshape(-1, 3), process=False)
    soup.export(tmp_path / "a.stl")
    with pytest.warns(UserWarning, match="simplified"):
        found = mesh.load_mesh(tmp_path / "a.stl", max_triangles=1000)
    assert 500 < len(found.faces) <= 1000


def test_faces_without_area_are_left_out_when_a_mesh_is_simplified(tmp_path):
    vertices, faces = torus(60)
    lines = np.random.default_rng(0).integers(0, len(vertices), (3000, 3))
    lines[:, 2] = lines[:, 0]
    whole = trimesh.Trimesh(vertices, np.concatenate([faces, lines]), process=False)
    whole.export(tmp_path / "a.ply")
    with pytest.warns(UserWarning) as said:
        found = mesh.load_mesh(tmp_path / "a.ply", max_triangles=1000)
    messages = [str(warning.message) for warning in said]
    assert len(messages) == 2
    assert "3,000 of 10,200 faces have no area" in messages[0] and "to 1,000" in messages[1]
    assert areas(found.triangles).min() > 1e-6 and from_torus(found.vertices).max() < 0.02


def test_small_materials_stay_whole_while_large_ones_are_simplified(tmp_path):
    vertices, faces = torus(60)
    ball = trimesh.Trimesh(vertices, faces, process=False)
    box = trimesh.creation.box()
    for part, name in ((ball, "large"), (box, "small")):
        paint = trimesh.visual.material.PBRMaterial(name=name)
        part.visual = trimesh.visual.TextureVisuals(material=paint)
    trimesh.Scene([ball, box]).export(tmp_path / "a.glb")
    with pytest.warns(UserWarning, match="simplified"):
        found = mesh.load_mesh(tmp_path / "a.glb", max_triangles=1000)
    counts = dict(zip(found.names, np.bincount(found.face_materials)))
    assert counts["small"] == 12 and 900 < counts["large"] <= 988


def test_the_simplified_mesh_does_not_depend_on_the_unit(tmp_path):
    vertices, faces = torus(60)
    found = []
    for unit in (1, 1024):
        path = tmp_path / f"{unit}.ply"
        trimesh.Trimesh(unit * vertices, faces, process=False).export(path)
        with pytest.warns(UserWarning, match="simplified"):
            found.append(mesh.load_mesh(path, max_triangles=1000))
    assert np.array_equal(found[0].faces, found[1].faces)
    assert np.array_equal(1024 * found[0].vertices, found[1].vertices)


def test_a_textured_mesh_keeps_its_coordinates_when_it_is_simplified(tmp_path):
    """Also beside the seams, where the texture ends and begins again."""
    steps = 60
    vertices, faces = torus(steps)
    u = faces // steps / steps
    u[(np.ptp(u, axis=1) > 0.5)[:, None] & (u < 0.5)] += 1  # beside the seam
    v = faces % steps / steps
    v[(np.ptp(v, axis=1) > 0.5)[:, None] & (v < 0.5)] += 1
    corners = vertices[faces].reshape(-1, 3)
    drawn = trimesh.Trimesh(corners, np.arange(len(corners)).reshape(-1, 3), process=False)
    coordinates = np.column_stack([u.ravel(), v.ravel()])
    picture = Image.fromarray(PICTURE)
    drawn.visual = trimesh.visual.TextureVisuals(coordinates, image=picture)
    drawn.export(tmp_path / "a.glb")

    with pytest.warns(UserWarning, match="7,200 triangles, simplified to 2,000"):
        found = mesh.load_mesh(tmp_path / "a.glb", max_triangles=2000)
    assert found.textures is not None and found.texture_coordinates.shape == (2000, 3, 2)
    x, y, z = np.moveaxis(found.triangles, -1, 0)
    expected = np.stack([np.arctan2(y, x), np.arctan2(z, np.hypot(x, y) - 1)], -1) / (2 * np.pi)
    errors = np.abs((found.texture_coordinates - expected + 0.5) % 1 - 0.5)
    assert np.quantile(errors, 0.99) < 0.04 and errors.max() < 0.1


# ------------------------------------------------------------ damaged surfaces


def test_the_other_side_of_a_face_is_left_out(tmp_path):
    """Programs write faces that show from both sides twice; a second colour is kept."""
    write(tmp_path, "newmtl a\nKd 1 0 0\nnewmtl b\nKd 0 0 1\n", "a.mtl")
    text = SQUARE + "mtllib a.mtl\nusemtl a\nf 1 2 3\nf 1 3 4\nf 3 2 1\nf 4 3 1\n"
    text += "usemtl b\nf 1 3 2\n"
    found = mesh.load_mesh(write(tmp_path, text))
    assert found.face_materials.tolist() == [0, 0, 1]
    assert (mesh.triangle_normals(found.triangles)[:, 2] > 0).tolist() == [True, True, False]


def test_a_loose_piece_far_away_is_warned_of(tmp_path, root):
    ball = trimesh.creation.icosphere(subdivisions=2)
    speck = trimesh.creation.icosphere(subdivisions=0, radius=0.005)
    speck.apply_translation([30, 0, 0])
    trimesh.util.concatenate([ball, speck]).export(tmp_path / "a.ply")
    with pytest.warns(UserWarning, match=r"is 3\d\.\d+ units across, but .* 0.1% lies within 3"):
        mesh.load_mesh(tmp_path / "a.ply")


@pytest.mark.parametrize("offset", [1.5, 100, 1e4])
def test_where_the_origin_is_changes_nothing_that_shows(offset):
    """As long as it lies outside: within, it is the middle of the pictures."""
    vertices, faces = torus(12)
    near = vertices[faces] + [8, 0, 0]
    far = near + [0, 0, offset * 4]
    area, openness = mesh.visibility(near, 128)
    other_area, other_openness = mesh.visibility(far, 128)
    assert (area.any(1) == other_area.any(1)).all() and area.any()
    np.testing.assert_allclose(other_openness, openness, atol=0.05)


# ------------------------------------------------------------ drawing

CAMERAS = {  # width, height, K: some are not square, some off-centre or skewed
    "square": (256, 256, [[248.9, 0, 128], [0, 248.9, 128], [0, 0, 1]]),
    "wide": (311, 173, [[260, 0, 120], [0, 230, 101], [0, 0, 1]]),
    "tall and skewed": (120, 301, [[300, 25, 20], [0, 310, 170], [0, 0, 1]]),
}


@pytest.mark.parametrize("name", CAMERAS)
def test_the_rasteriser_shows_what_rays_through_the_pixels_meet(ship, poses, name):
    width, height, K = CAMERAS[name]
    K = np.array(K)
    triangles = ship.triangles
    rng = np.random.default_rng(0)
    for pose in poses[:3]:
        pose = pose.copy()
        pose[:2, 3] = 0  # in front of the camera
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
    rng = np.random.default_rng(1)
    K = np.array([[260, 0, 120], [0, 250, 101], [0, 0, 1.0]])
    triangles = rng.uniform([-1, -1, -1.5], [1, 1, 2.5], (40, 3, 3))
    assert ((triangles[..., 2] < 0).any(1) & (triangles[..., 2] > 0).any(1)).sum() > 10
    ids, depth = mesh.rasterise(triangles, np.eye(4), K, 301, 173)
    pixels = np.array([(x, y) for y in range(0, 173, 12) for x in range(0, 301, 12)])
    true_ids, true_depth = cast(triangles, np.eye(4), K, pixels)
    column, row = pixels.T
    assert (ids[row, column] == true_ids).mean() > 0.99 and (true_ids >= 0).mean() > 0.9
    seen = (true_ids >= 0) & (ids[row, column] == true_ids)
    np.testing.assert_allclose(depth[row, column][seen], true_depth[seen], rtol=1e-3)


def test_nothing_is_drawn_nearer_than_the_near_plane(ship):
    K = np.array([[260, 0, 120], [0, 250, 101], [0, 0, 1.0]])
    pose = np.eye(4)
    pose[2, 3] = 0.1  # the ship reaches from -0.08 to 0.26 units ahead of the camera
    pose[:3, :3] = Rotation.from_euler("x", 90, degrees=True).as_matrix()
    nearest = {}
    for near in (None, ship.near, 0.05, 0.2):
        depth = mesh.rasterise(ship.triangles, pose, K, 240, 200, near)[1]
        nearest[near] = depth.min()
    assert nearest[None] == nearest[ship.near]
    assert ship.near <= nearest[ship.near] < 0.03 and 0.05 <= nearest[0.05] < 0.06
    assert 0.2 <= nearest[0.2] < 0.23


@pytest.mark.parametrize("unit", [1024, 1000])
def test_nothing_depends_on_the_unit_of_length(ship, poses, K, unit):
    triangles = ship.triangles
    pose = poses[0].copy()
    pose[:3, 3] = 0, 0, 0.15  # some parts are cut at the near plane
    scaled = pose.copy()
    scaled[:3, 3] *= unit
    ids, depth = mesh.rasterise(triangles, pose, K, 256, 256)
    large_ids, large_depth = mesh.rasterise(unit * triangles, scaled, K, 256, 256)
    points = triangles.mean(1)[::20]
    sun = np.array([0.6, 0, 0.8])
    lit = mesh.sunlit(triangles, points, sun)
    large_lit = mesh.sunlit(unit * triangles, unit * points, sun)
    area, openness = mesh.visibility(triangles, views=10)
    large_area, large_openness = mesh.visibility(unit * triangles, views=10)
    assert 0.2 < lit.mean() < 0.8 and (ids >= 0).mean() > 0.2
    if unit == 1024:  # a power of two only changes exponents
        assert np.array_equal(ids, large_ids) and np.array_equal(unit * depth, large_depth)
        assert np.array_equal(lit, large_lit) and np.array_equal(openness, large_openness)
        assert np.array_equal(unit**2 * area, large_area)
    else:
        assert (ids == large_ids).mean() > 0.999 and (lit == large_lit).mean() > 0.99
        assert abs(openness - large_openness).mean() < 1e-3
        np.testing.assert_allclose(large_area.sum(), unit**2 * area.sum(), rtol=1e-3)


def test_nothing_is_drawn_of_what_lies_behind_the_camera(ship, K):
    behind = np.eye(4)
    behind[2, 3] = -1
    ids, depth = mesh.rasterise(ship.triangles, behind, K, 64, 48)
    assert (ids == -1).all() and np.isinf(depth).all()


def test_normals_are_right_handed_and_as_long_as_twice_the_area():
    triangle = np.array([[[0, 0, 5], [4, 0, 5], [0, 3, 5]]], float)
    assert mesh.triangle_normals(triangle).tolist() == [[0, 0, 12]]


def test_front_facing_is_counter_clockwise_as_seen(K):
    # Counter-clockwise as seen from +z.
    triangle = np.array([[[0, 0, 0], [1, 0, 0], [0, 1, 0]]], float)
    above = np.diag([1.0, -1, -1, 1])
    below = np.eye(4)
    above[2, 3] = below[2, 3] = 5
    assert mesh.front_facing_triangles(triangle, above).tolist() == [True]
    assert mesh.front_facing_triangles(triangle, below).tolist() == [False]


def test_the_largest_triangles_make_up_the_fraction_of_the_surface(ship):
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
    assert len(kept) < 0.6 * len(front)
    assert (np.isfinite(whole) == np.isfinite(part)).mean() > 0.9999
    assert (openness >= 0).all() and (openness <= 1).all() and (openness[area == 0] == 0).all()

    sheet = np.array([[[-1, 1, 0], [1, 1, 0], [1, -1, 0]]], float)
    area, openness = mesh.visibility(sheet)  # alone: wide open on both sides
    assert openness.min() > 0.95 and (area > 0).all()
    under_a_roof = np.concatenate([sheet, 5 * sheet + [0, 0, 0.3]])
    openness = mesh.visibility(under_a_roof)[1][0]
    assert openness.min() < 0.4 < 0.9 < openness.max()


def test_a_triangle_without_area_never_shows():
    sheet = [[-1, 1, -0.5], [1, 1, -0.5], [1, -1, -0.5]]
    line = [[-1, -1, -1], [1, 1, 1], [0, 0, 0]]  # through the centre of the middle pixel
    area, openness = mesh.visibility(np.array([sheet, line], float), size=33)
    assert area.any(1).tolist() == openness.any(1).tolist() == [True, False]


@pytest.mark.parametrize("sun", [(0.6, 0, 0.8), (-0.48, 0.6, -0.64), (-0.36, -0.48, 0.8)])
def test_the_sun_shines_on_what_no_ray_towards_it_hits(ship, sun):
    triangles = ship.triangles
    sun = np.array(sun)
    area = areas(triangles)
    rng = np.random.default_rng(4)
    points = triangles[rng.choice(len(triangles), 150, p=area / area.sum())].mean(1)
    depth = np.array([hits(triangles, point, sun)[0].max(initial=0) for point in points])
    clear = (depth < 1e-4) | (depth > 0.02)  # thinner parts are within the tolerance
    lit = mesh.sunlit(triangles, points, sun)
    assert clear.sum() > 80 and 0.2 < lit[clear].mean() < 0.8
    assert (lit == (depth < 0.02))[clear].mean() > 0.95
