"""A mesh with a texture is drawn with it: a printed cube that the tests draw themselves."""

import dataclasses

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing.alignment import Aligner
from xwing.mesh import load_mesh, rasterise
from xwing.synthesis import Synthesiser

WIDTH, HEIGHT = 160, 120
K = xu.lens_camera(WIDTH, HEIGHT, 50)
SIDE = 0.2  # of the cube, whose lowest corner is the origin
TILE = 40  # texels of a side of it in the texture, two rows of three sides
# Each side of the cube: its axis, whether it is the far one, and the axes of its print.
SIDES = [(axis, far, (axis + 1) % 3, (axis + 2) % 3) for far in (0, 1) for axis in range(3)]


def write_cube(folder, texture):
    """Write a cube as OBJ, with a texture (2 TILE, 3 TILE, 3) uint8, or None; return its path."""
    lines = ["mtllib cube.mtl", "usemtl print"]
    for number, (axis, far, across, up) in enumerate(SIDES):
        column, row = number % 3, number // 3
        for a, b in ((0, 0), (1, 0), (1, 1), (0, 1)):
            corner = np.zeros(3)
            corner[[axis, across, up]] = SIDE * far, SIDE * a, SIDE * b
            lines.append("v {} {} {}".format(*corner))
            lines.append(f"vt {(column + a) / 3} {(row + b) / 2}")
        lines.append("f " + " ".join(f"{i}/{i}" for i in range(4 * number + 1, 4 * number + 5)))

    path = folder / "cube.obj"
    path.write_text("\n".join(lines))
    library = "newmtl print\nKd 0.5 0.5 0.5\n"
    if texture is not None:
        Image.fromarray(texture).save(folder / "print.png")
        library += "map_Kd print.png\n"
    (folder / "cube.mtl").write_text(library)
    return path


def draw(triangles, texture, pose, samples=4):
    """The frame (H, W, 3) uint8 of the cube at a pose, in light that falls from the camera."""
    width, height = samples * WIDTH, samples * HEIGHT
    large = xu.crop_camera(K, scale=samples)
    ids, depth = rasterise(triangles, pose, large, width, height)
    row, column = np.nonzero(ids >= 0)
    rays = np.column_stack([column + 0.5, row + 0.5, np.ones(len(row))]) @ np.linalg.inv(large).T
    points = (rays * depth[row, column, None] - pose[:3, 3]) @ pose[:3, :3] / SIDE

    frame = np.float32(cv2.resize(skimage.data.astronaut(), (width, height)))
    axes = np.abs(points - 0.5).argmax(1)
    ends = points[np.arange(len(points)), axes] > 0.5
    for number, (axis, far, across, up) in enumerate(SIDES):
        own = (axes == axis) & (ends == far)
        texel = (points[own][:, [across, up]] * TILE).astype(int).clip(0, TILE - 1)
        lines = 2 * TILE - 1 - (number // 3 * TILE + texel[:, 1])  # the last line is the lowest
        brightness = 0.3 + 0.5 * abs(pose[2, axis])
        printed = texture[lines, number % 3 * TILE + texel[:, 0]]
        frame[row[own], column[own]] = brightness * printed
    frame = cv2.resize(frame, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    noise = np.random.default_rng(0).normal(0, 2, frame.shape)
    return np.uint8((frame + noise).clip(0, 255))


@pytest.fixture(scope="module")
def texture():
    blots = np.random.default_rng(0).integers(30, 256, (16, 24, 3), np.uint8)
    return cv2.resize(blots, (3 * TILE, 2 * TILE), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def textured(tmp_path_factory, texture):
    return Aligner(xu.load_target(write_cube(tmp_path_factory.mktemp("textured"), texture)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Aligner(xu.load_target(write_cube(tmp_path_factory.mktemp("plain"), None)))


@pytest.fixture(scope="module")
def pose():
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("xyz", [35, 30, 10], degrees=True).as_matrix()
    pose[:3, 3] = [-0.01, 0.02, 0.9] - pose[:3, :3] @ np.full(3, SIDE / 2)
    return pose


def turned(pose, *degrees):
    """A pose (4, 4) turned about the middle of the cube, by a rotation vector in camera axes."""
    middle = pose[:3, :3] @ np.full(3, SIDE / 2) + pose[:3, 3]
    moved = pose.copy()
    moved[:3, :3] = Rotation.from_rotvec(degrees, degrees=True).as_matrix() @ pose[:3, :3]
    moved[:3, 3] = middle - moved[:3, :3] @ np.full(3, SIDE / 2)
    return moved


def unexplained(aligner, image, pose):
    """Median difference in grey levels between a frame and what a pose explains of it."""
    seen, painted = aligner.picture(image, pose, K)
    return np.median(np.abs(np.float32(seen) - painted))


def test_a_textured_mesh_is_aligned_from_the_mesh_alone(textured, plain, texture, pose):
    """In a frame that shows the texture; the plain mesh is aligned worse."""
    image = draw(textured.mesh.triangles, texture, pose)
    errors = {}
    for name, aligner in (("textured", textured), ("plain", plain)):
        found = [aligner.align(image, turned(pose, *off), K) for off in ((3, -4, 2), (-4, 2, -3))]
        errors[name] = [90.0 if one is None else xu.rotation_error(one[0], pose) for one in found]
    assert max(errors["textured"]) < 0.5
    assert min(errors["plain"]) > 1


def test_the_texture_is_drawn_where_it_is_printed(textured, plain, texture, pose):
    """What is explained of the frame is the frame, on every side of the cube."""
    for turn in ((0, 0, 0), (0, 180, 0), (0, 0, 100), (120, 0, 0)):
        there = turned(pose, *turn)
        image = draw(textured.mesh.triangles, texture, there)
        assert unexplained(textured, image, there) < 4 < unexplained(plain, image, there)


def test_what_is_learnt_refines_the_texture(textured, texture, pose):
    """A second label is learnt on top; what was not seen stays as the texture says."""
    changed = texture.copy()
    changed[:, ::2] //= 2
    image = draw(textured.mesh.triangles, changed, pose)
    before = unexplained(textured, image, pose)
    textured.learn(image, pose, K)
    after = unexplained(textured, image, pose)
    behind = turned(pose, 0, 180, 0)
    unseen = unexplained(textured, draw(textured.mesh.triangles, texture, behind), behind)
    textured.forget()
    assert after < 0.5 * before and unseen < 4


def test_a_repeated_texture_goes_on_beyond_its_edge(tmp_path, texture, textured, pose):
    """Coordinates beyond 0 to 1 show the texture again."""
    mesh = load_mesh(write_cube(tmp_path, texture))
    moved = dataclasses.replace(mesh, texture_coordinates=mesh.texture_coordinates + [3, -2])
    image = draw(mesh.triangles, texture, pose)
    expected = np.float32(textured.picture(image, pose, K)[1])
    found = np.float32(Aligner(moved).picture(image, pose, K)[1])
    assert np.abs(found - expected).mean() < 1


def test_drawn_squares_show_the_print(tmp_path):
    """A cube that is red on one side only: drawn from there it is red, else it is not."""
    texture = np.full((2 * TILE, 3 * TILE, 3), 90, np.uint8)
    texture[:TILE, :TILE] = 200, 10, 10  # side 3, at the far end of axis 0
    path = write_cube(tmp_path, texture)
    synthesiser = Synthesiser(load_mesh(path))
    redness = {True: [], False: []}
    rng = np.random.default_rng(1)
    for _ in range(60):
        image, pose, camera = synthesiser(64, rng, 128)
        centre = np.array([SIDE, SIDE / 2, SIDE / 2])
        pixel = xu.project_pose([centre], pose, camera)[0]
        if not xu.in_frame(pixel, 64, 64):
            continue
        sight = pose[:3, :3] @ centre + pose[:3, 3]
        facing = -(pose[:3, 0] @ sight) / np.linalg.norm(sight)
        if abs(facing) > 0.4:
            red, green, blue = image[int(pixel[1]), int(pixel[0])].astype(int)
            redness[bool(facing > 0)].append(abs(red - green) + abs(red - blue))
    assert len(redness[True]) > 8 and len(redness[False]) > 8
    assert np.median(redness[True]) > 3 * np.median(redness[False])
