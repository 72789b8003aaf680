"""Render the clips of `data/objects/`: objects that a hand turns before a camera, with exact poses.

    python data/render_objects.py [NAME ...] --frames FOLDER

Mitsuba ray-traces the object, and a hand where one passes in front of it, in a room with a window
and a lamp. The result is laid, in linear light, over a picture that comes with scikit-image and
that drifts a little. Then the frame gets the faults of a camera: a soft lens, an exposure that
wanders, noise, and the loss of H.264.

Each frame is a function of the clip and its number. Frames are kept in the folder, so a run that
was killed continues when it is started again. The pose of a frame is that of the middle of its
exposure, in OpenCV's camera axes and the units of the mesh.
"""

import argparse
import dataclasses
import functools
import json
import sys
import zlib
from pathlib import Path

import cv2
import joblib
import numpy as np
import trimesh
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation, RotationSpline

import xwing_utils as xu
from xwing.mesh import Mesh, load_mesh, rasterise

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # by file: another package may be called `data`
import render  # noqa: E402

OBJECTS = HERE / "objects"
WIDTH, HEIGHT, FPS = 640, 480, 30
K = np.array([[610.0, 0, 326], [0, 610, 236], [0, 0, 1]])  # the centre is not the frame's
SHUTTER = 1 / 100  # seconds
INSTANTS = 3  # of each exposure
SAMPLES = 4  # rays a pixel and instant
CRF = 18  # of x264


@dataclasses.dataclass(frozen=True)
class Film:
    """A clip: an object, how it moves, what is around it."""

    mesh: str  # a file of data/objects
    # Rows of second, centre in the frame (x, y in pixels), diameter in pixels, and degrees by which
    # the object is turned about x, y and z of the camera.
    path: tuple
    first_turn: tuple  # degrees about x, y, z, before those of the path
    surface: dict  # name of a material, or "" for all others -> Mitsuba's properties
    picture: str  # a file of skimage.data, behind the object
    window: tuple = (1.4, 0.5)  # where it is: angle about y in units of pi, height from -1 to 1
    target: str | None = None  # the target's file where that is not the mesh
    picture_mesh: str | None = None  # what is rendered, where the mesh of the target has no print
    hand: tuple = ()  # rows of second, x, y in pixels: where the middle of a hand is
    seconds: float = 3.3  # its length
    upright: float = 90  # degrees about x from the camera's axes (y down) to a model whose z is up
    smooth: bool = False  # shade the mesh as a curved surface


PAPER = {"type": "roughplastic", "alpha": 0.3, "nonlinear": True}
CLAY = {"type": "roughplastic", "alpha": 0.35, "nonlinear": True}
BRICK = {"type": "roughplastic", "alpha": 0.12, "nonlinear": True}
LACQUER = {"type": "roughplastic", "alpha": 0.08, "nonlinear": True}
BARE_METAL = {"type": "roughconductor", "alpha": 0.18}
STEEL = {"type": "principled", "roughness": 0.4, "metallic": 0.5}  # galvanised

FILMS = {
    "carton": Film(
        upright=180,  # y is up
        mesh="carton.obj",
        path=(
            (0, 300, 250, 215, 0, 0, 0),
            (0.8, 330, 230, 225, 14, 30, 4),
            (1.6, 360, 240, 240, 24, 62, -8),
            (2.4, 310, 262, 210, 0, 20, -20),
            (3.2, 270, 235, 190, -22, -24, -6),
            (3.9, 320, 240, 220, -6, -58, 10),
        ),
        first_turn=(20, -25, 4),
        surface={"": PAPER},
        picture="coffee.png",
    ),
    "figure": Film(
        mesh="figure.obj",
        path=(
            (0, 330, 240, 235, 0, 0, 0),
            (0.9, 300, 220, 250, 10, -40, 6),
            (1.7, 270, 240, 265, -12, -74, 14),
            (2.5, 320, 255, 225, -18, -30, -4),
            (3.2, 380, 240, 215, 4, 14, -18),
            (3.9, 350, 230, 240, 16, 50, -4),
        ),
        first_turn=(8, 60, -4),
        surface={"": CLAY},
        picture="motorcycle_left.png",
        smooth=True,
    ),
    "can": Film(
        mesh="can.obj",
        path=(
            (0, 310, 235, 220, 0, 0, 0),
            (0.8, 340, 250, 235, 18, 35, 12),
            (1.6, 300, 245, 250, 34, 84, 30),
            (2.4, 280, 225, 225, 6, 120, 8),
            (3.2, 330, 240, 200, -22, 80, -24),
            (3.9, 360, 255, 215, -8, 30, -40),
        ),
        first_turn=(14, 20, -6),
        surface={"label": LACQUER, "metal": BARE_METAL},
        picture="astronaut.png",
        window=(1.62, 0.45),
    ),
    "toy": Film(
        mesh="toy.obj",
        path=(
            (0, 320, 250, 235, 0, 0, 0),
            (0.8, 350, 235, 245, 8, 34, -8),
            (1.6, 320, 225, 255, 22, 76, -4),
            (2.4, 280, 245, 230, 30, 30, 14),
            (3.2, 300, 260, 205, 4, -20, 20),
            (3.9, 350, 240, 225, -8, -62, 6),
        ),
        first_turn=(22, 30, 0),
        surface={"": BRICK},
        picture="rocket.jpg",
    ),
    "bolt": Film(
        mesh="bolt.obj",
        target="bolt_target.json",
        path=(
            (0, 320, 240, 205, 0, 0, 0),
            (0.8, 300, 225, 220, -12, 20, 30),
            (1.6, 330, 240, 240, 8, 44, 70),
            (2.4, 360, 255, 220, 30, 6, 96),
            (3.2, 320, 235, 190, 10, -44, 60),
            (3.9, 290, 245, 200, -20, -30, 10),
        ),
        first_turn=(30, 20, 60),
        surface={"": STEEL},
        picture="motorcycle_right.png",
        window=(1.38, 0.5),
    ),
    "carton_hand": Film(
        upright=180,  # y is up
        seconds=3.9,
        mesh="carton_grey.obj",
        picture_mesh="carton.obj",
        path=(
            (0, 340, 230, 220, 0, 0, 0),
            (0.9, 320, 245, 230, -12, -24, 10),
            (1.8, 300, 240, 225, -20, -48, 4),
            (2.7, 320, 225, 210, 4, -14, -14),
            (3.9, 350, 240, 230, 20, 36, -4),
        ),
        first_turn=(16, 24, -3),
        surface={"": PAPER},
        picture="chelsea.png",
        hand=(
            (0, 760, 600),
            (0.6, 700, 560),
            (1.2, 420, 330),
            (1.6, 318, 288),
            (1.9, 290, 282),
            (2.4, 150, 330),
            (2.9, -140, 480),
            (3.9, -300, 560),
        ),
    ),
    "toy_away": Film(
        seconds=3.9,
        mesh="toy.obj",
        path=(
            (0, 300, 240, 215, 0, 0, 0),
            (0.8, 340, 230, 230, -10, -30, 6),
            (1.4, 480, 220, 235, -14, -56, 10),
            (1.8, 720, 215, 235, -10, -64, 6),
            (2.2, 860, 240, 225, 0, -54, 0),
            (2.6, 690, 265, 215, 6, -36, -4),
            (3.1, 420, 260, 215, 4, -10, -8),
            (3.9, 300, 235, 230, -10, 30, 4),
        ),
        first_turn=(20, 150, 0),
        surface={"": BRICK},
        picture="coffee.png",
        window=(1.6, 0.5),
    ),
    "figure_away": Film(
        seconds=3.9,
        mesh="figure.obj",
        path=(
            (0, 330, 250, 220, 0, 0, 0),
            (0.8, 300, 235, 235, 8, 32, -8),
            (1.4, 160, 240, 235, 10, 56, -10),
            (1.8, -80, 260, 230, 4, 60, -4),
            (2.2, -190, 250, 225, -4, 46, 2),
            (2.6, -60, 230, 220, -6, 30, 6),
            (3.1, 200, 235, 225, 0, 4, 10),
            (3.9, 340, 250, 235, 14, -36, 2),
        ),
        first_turn=(10, -30, 3),
        surface={"": CLAY},
        picture="rocket.jpg",
        smooth=True,
    ),
}


# ---------------------------------------------------------------- motion


def film_poses(film: Film, seconds: np.ndarray) -> np.ndarray:
    """Return poses (N, 4, 4), model -> OpenCV camera, at N seconds: smooth, with a hand's tremor.

    The point that the path leads is the centre of the mesh's bounding box.
    """
    mesh = _mesh(film.mesh)
    path = np.array(film.path, float)
    x, y, size = CubicSpline(path[:, 0], path[:, 1:4])(seconds).T
    depth = K[0, 0] * mesh.diameter / size
    centre = np.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], np.ones_like(x)], 1)

    turns = Rotation.from_euler("yxz", path[:, [5, 4, 6]], degrees=True)
    upright = Rotation.from_euler("x", film.upright, degrees=True)
    first = Rotation.from_euler("xyz", film.first_turn, degrees=True) * upright
    shift, tremor = _tremor(film, seconds)
    rotations = tremor * RotationSpline(path[:, 0], turns)(seconds) * first

    low, high = mesh.triangles.min((0, 1)), mesh.triangles.max((0, 1))
    poses = np.tile(np.eye(4), (len(seconds), 1, 1))
    poses[:, :3, :3] = rotations.as_matrix()
    poses[:, :3, 3] = centre * depth[:, None] + shift * mesh.diameter
    poses[:, :3, 3] -= poses[:, :3, :3] @ ((low + high) / 2)
    return poses


def _tremor(film, seconds):
    """Shifts (N, 3) in diameters and rotations of a hand that is not quite still."""
    rng = np.random.default_rng([_seed(film), 1])
    waves = rng.uniform(2.5, 7, 6)  # a second
    phases = rng.uniform(0, 2 * np.pi, 6)
    wave = np.sin(2 * np.pi * seconds[:, None] * waves + phases)
    return 0.0018 * wave[:, :3], Rotation.from_rotvec(0.22 * wave[:, 3:], degrees=True)


def _seed(film):
    return zlib.crc32(repr(film.path).encode())


def seconds_of(film: Film) -> np.ndarray:
    """The times (N,) of a film's frames."""
    return np.arange(round(film.seconds * FPS) + 1) / FPS


def hand_at(film: Film, second: float, pose: np.ndarray) -> trimesh.Trimesh | None:
    """The hand that passes in front of an object, in camera axes; None where the film has none."""
    if not film.hand:
        return None
    path = np.array(film.hand, float)
    x, y = CubicSpline(path[:, 0], path[:, 1:])(second)
    diameter = _mesh(film.mesh).diameter
    depth = pose[2, 3] - 0.72 * diameter
    hand = _hand().copy()
    hand.apply_scale(diameter)
    hand.apply_translation(np.linalg.inv(K) @ (x, y, 1) * depth)
    return hand


@functools.lru_cache
def _hand():
    """A hand of capsules that comes from below, as high as an object is long; y is down."""
    fingers = [  # first end, second end, radius
        ((-0.27, 0.05, 0), (-0.34, -0.34, 0.02), 0.074),
        ((-0.1, 0.0, -0.02), (-0.12, -0.46, 0.0), 0.078),
        ((0.07, 0.02, -0.02), (0.09, -0.42, 0.0), 0.076),
        ((0.22, 0.08, 0), (0.29, -0.26, 0.03), 0.068),
        ((-0.26, 0.36, 0), (-0.5, 0.1, -0.02), 0.085),  # the thumb
        ((-0.18, 0.1, 0.02), (-0.12, 0.44, 0.02), 0.13),  # the palm
        ((0.0, 0.08, 0.02), (0.02, 0.46, 0.02), 0.135),
        ((0.14, 0.12, 0.02), (0.12, 0.44, 0.02), 0.12),
        ((0.02, 0.5, 0.03), (0.1, 1.9, 0.03), 0.17),  # the arm
    ]
    capsules = []
    for first, second, radius in fingers:
        first, second = np.array(first), np.array(second)
        axis = second - first
        length = np.linalg.norm(axis)
        capsule = trimesh.creation.capsule(length, radius, count=[16, 16])
        capsule.apply_transform(trimesh.geometry.align_vectors((0, 0, 1), axis / length))
        capsules.append(capsule.apply_translation(first))
    return trimesh.util.concatenate(capsules)


# ---------------------------------------------------------------- scene


@functools.lru_cache
def _mesh(name) -> Mesh:
    return load_mesh(OBJECTS / name)


@functools.lru_cache
def _mitsuba():
    import drjit
    import mitsuba as mi

    drjit.set_thread_count(1)
    mi.set_variant("scalar_rgb")
    return mi


@functools.lru_cache
def _normals(name):
    """(F, 3, 3) unit normals at the corners of a curved surface, model axes."""
    mesh = _mesh(name)
    merged = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    merged.merge_vertices(merge_tex=True, merge_norm=True)
    return merged.vertex_normals[merged.faces]


def object_shapes(film: Film, pose: np.ndarray) -> dict:
    """The object at a pose as Mitsuba shapes, one for each material, in camera axes."""
    mesh = _mesh(film.picture_mesh or film.mesh)
    corners = mesh.triangles @ pose[:3, :3].T + pose[:3, 3]
    normals = _normals(film.mesh) @ pose[:3, :3].T if film.smooth else None
    shapes = {}
    for material, name in enumerate(mesh.names):
        chosen = mesh.face_materials == material
        surface = film.surface.get(name, film.surface.get(""))
        bsdf = _bsdf(surface, mesh, material)
        uv = None if mesh.texture_coordinates is None else mesh.texture_coordinates[chosen]
        smooth = None if normals is None else normals[chosen]
        shapes[name] = _shape(name, corners[chosen], bsdf, uv, smooth)
    return shapes


def _bsdf(surface, mesh, material):
    """Mitsuba's material, with the mesh's colour or texture."""
    key = {
        "principled": "base_color",
        "roughplastic": "diffuse_reflectance",
        "roughconductor": "specular_reflectance",
    }[surface["type"]]
    texture = None if mesh.textures is None else mesh.textures[material]
    if texture is None:
        linear = render.srgb_to_linear(mesh.colours[material])
        colour = {"type": "rgb", "value": linear.tolist()}
    else:
        mi = _mitsuba()
        linear = render.srgb_to_linear(texture / 255).astype(np.float32)
        colour = {"type": "bitmap", "bitmap": mi.Bitmap(linear), "raw": True, "wrap_mode": "clamp"}
    return {"type": "twosided", "bsdf": {**surface, key: colour}}


def _shape(name, corners, bsdf, uv=None, normals=None):
    """Triangles (F, 3, 3) in camera axes as a Mitsuba mesh."""
    mi = _mitsuba()
    properties = mi.Properties()
    properties["bsdf"] = mi.load_dict(bsdf)
    properties["face_normals"] = normals is None
    shape = mi.Mesh(
        name,
        3 * len(corners),
        len(corners),
        has_vertex_normals=normals is not None,
        has_vertex_texcoords=uv is not None,
        props=properties,
    )
    parameters = mi.traverse(shape)
    parameters["vertex_positions"] = corners.astype(np.float32).ravel()
    parameters["faces"] = np.arange(3 * len(corners), dtype=np.uint32)
    if uv is not None:
        downwards = uv * [1, -1] + [0, 1]  # Mitsuba's v begins at the upper edge
        parameters["vertex_texcoords"] = downwards.astype(np.float32).ravel()
    if normals is not None:
        parameters["vertex_normals"] = normals.astype(np.float32).ravel()
    parameters.update()
    return shape


def room(film: Film) -> np.ndarray:
    """Light from all around, (64, 128, 3) linear: walls, a floor, a window and a lamp.

    The rows of Mitsuba's map go from its +y to its -y; `_scene` makes that the camera's -y, up.
    """
    rows, columns = 64, 128
    height = np.cos((np.arange(rows) + 0.5) / rows * np.pi)[:, None]
    around = ((np.arange(columns) + 0.5) / columns * 2)[None]  # units of pi
    wall = 0.65 + 0.3 * height
    light = np.clip(wall, 0.2, None)[..., None] * [1.0, 0.98, 0.94]
    light = np.broadcast_to(light, (rows, columns, 3)).copy()
    light[height[:, 0] < -0.3] *= [0.8, 0.66, 0.5]  # a wooden floor

    centre, rise = film.window
    across = np.abs((around - centre + 1) % 2 - 1)
    window = np.exp(-((across / 0.16) ** 4) - ((height - rise) / 0.28) ** 4)
    lamp = np.exp(-((((around - centre) % 2 - 1.1) / 0.1) ** 2) - ((height - 0.75) / 0.12) ** 2)
    light += window[..., None] * [4.4, 4.7, 5.2] + lamp[..., None] * [4.0, 3.4, 2.4]
    return light.astype(np.float32)


def exposure(film: Film, second: float, seed: int) -> np.ndarray:
    """Ray-trace object and hand: (HEIGHT, WIDTH, 4) linear, premultiplied by the coverage."""
    times = second + SHUTTER * ((np.arange(INSTANTS) + 0.5) / INSTANTS - 0.5)
    poses = film_poses(film, times)
    hands = [hand_at(film, time, pose) for time, pose in zip(times, poses)]
    canvas = np.zeros((HEIGHT, WIDTH, 4))
    crop = _crop(film, poses, hands)
    if crop is None:
        return canvas

    left, top, right, bottom = crop
    for k, (pose, hand) in enumerate(zip(poses, hands)):
        scene = _scene(film, pose, hand, crop)
        rendered = _mitsuba().render(scene, spp=SAMPLES, seed=seed + k)
        canvas[top:bottom, left:right] += np.array(rendered, float) / INSTANTS
    return canvas


def _crop(film, poses, hands):
    """The rectangle (left, top, right, bottom) of object and hand; None outside the frame."""
    vertices = _mesh(film.mesh).vertices
    points = [vertices @ pose[:3, :3].T + pose[:3, 3] for pose in poses]
    points += [hand.vertices for hand in hands if hand is not None]
    projected = np.concatenate(points) @ K.T
    pixels = projected[:, :2] / projected[:, 2:]
    left, top = np.maximum(pixels.min(0).astype(int) - 1, 0)
    right, bottom = np.minimum(pixels.max(0).astype(int) + 2, (WIDTH, HEIGHT))
    return (left, top, right, bottom) if left < right and top < bottom else None


def _scene(film, pose, hand, crop):
    mi = _mitsuba()
    shapes = object_shapes(film, pose)
    if hand is not None:
        skin = {**CLAY, "diffuse_reflectance": {"type": "rgb", "value": [0.72, 0.44, 0.32]}}
        normals = hand.vertex_normals[hand.faces]
        shapes["hand"] = _shape("hand", hand.triangles, skin, normals=normals)

    # Mitsuba's map has +y up and the camera's axes have y down: half a turn about x.
    upside = mi.ScalarTransform4f([[1, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]])
    around = {"type": "envmap", "bitmap": mi.Bitmap(room(film)), "to_world": upside}
    return mi.load_dict(
        {
            "type": "scene",
            "integrator": {"type": "direct", "hide_emitters": True},
            "sensor": _sensor(crop, 1e-2 * pose[2, 3]),
            "around": around,
            **shapes,
        }
    )


def _sensor(crop, near):
    """Mitsuba's camera at the origin for a rectangle of the frame.

    Its own axes have x to the left and y up, so half a turn about z makes them OpenCV's. The film
    is so large that K's centre is in its middle.
    """
    mi = _mitsuba()
    left, top, right, bottom = crop
    width, height = 2 * np.maximum(K[:2, 2], (WIDTH, HEIGHT) - K[:2, 2])
    shift_x, shift_y = (width / 2 - K[0, 2], height / 2 - K[1, 2])
    film = {
        "type": "hdrfilm",
        "width": int(width),
        "height": int(height),
        "pixel_format": "rgba",
        "rfilter": {"type": "box"},
        "crop_offset_x": int(left + shift_x),
        "crop_offset_y": int(top + shift_y),
        "crop_width": int(right - left),
        "crop_height": int(bottom - top),
    }
    return {
        "type": "perspective",
        "fov": float(np.degrees(2 * np.arctan(width / 2 / K[0, 0]))),
        "fov_axis": "x",
        "near_clip": float(near),
        "far_clip": float(1e4 * near),
        "to_world": mi.ScalarTransform4f(np.diag([-1.0, -1, 1, 1])),
        "film": film,
        "sampler": {"type": "multijitter", "sample_count": SAMPLES},
    }


# ---------------------------------------------------------------- camera


def background(film: Film, second: float) -> np.ndarray:
    """The picture behind the object, out of focus and drifting: (HEIGHT, WIDTH, 3) linear."""
    import skimage.data

    path = Path(skimage.data.__file__).with_name(film.picture)
    picture = cv2.imread(str(path))[..., ::-1]
    height, width = picture.shape[:2]
    scale = 1.12 * max(WIDTH / width, HEIGHT / height) * (1 + 0.012 * second)
    angle = np.radians(1.2 * np.sin(0.7 * second))
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    drift = np.array([9 * np.sin(0.9 * second), 6 * np.sin(0.6 * second + 1)])  # pixels
    shift = np.array([WIDTH, HEIGHT]) / 2 + drift - turn @ [width / 2, height / 2]
    matrix = np.column_stack([turn, shift])
    size = WIDTH, HEIGHT
    border = cv2.BORDER_REFLECT
    image = cv2.warpAffine(picture, matrix, size, flags=cv2.INTER_CUBIC, borderMode=border)
    return render.srgb_to_linear(cv2.GaussianBlur(image, (0, 0), 1.2) / 255)


def frame(name: str, index: int) -> np.ndarray:
    """Return frame `index` of a film, (HEIGHT, WIDTH, 3) uint8 RGB, before it is encoded."""
    film = FILMS[name]
    second = index / FPS
    seed = int(np.random.default_rng([_seed(film), 2, index]).integers(2**31))
    front = exposure(film, second, seed)
    light = front[..., :3] + (1 - front[..., 3:]) * background(film, second)

    rng = np.random.default_rng([_seed(film), 3, index])
    light = light * (1 + 0.05 * np.sin(1.9 * second + 1))  # the exposure wanders
    light = cv2.GaussianBlur(light, (0, 0), 0.55)
    image = render.linear_to_srgb(light)
    grain = rng.normal(size=(HEIGHT, WIDTH, 1)) + 0.5 * rng.normal(size=image.shape)
    return np.round(np.clip(image + 0.006 * grain, 0, 1) * 255).astype(np.uint8)


def visible_fraction(film: Film, second: float) -> float:
    """The fraction of the object's silhouette that is in the frame and not behind the hand."""
    pose = film_poses(film, np.array([second]))[0]
    hand = hand_at(film, second, pose)
    margin = 320  # pixels around the frame, in which the object still fits
    wide = K.copy()
    wide[:2, 2] += margin
    size = WIDTH + 2 * margin, HEIGHT + 2 * margin

    mesh = _mesh(film.mesh)
    alone, _ = rasterise(mesh.triangles, pose, wide, *size)
    seen = alone >= 0
    if hand is not None:
        over, _ = rasterise(hand.triangles, np.eye(4), wide, *size, near=mesh.near)
        seen &= over < 0  # the hand is always in front
    inside = seen[margin : margin + HEIGHT, margin : margin + WIDTH]
    return float(inside.sum() / max((alone >= 0).sum(), 1))


# ---------------------------------------------------------------- files


def write_frames(name: str, folder: Path, workers: int = 1) -> list[Path]:
    """Render the frames of a film that are not there yet; return the files of all."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:03d}.png" for index in range(len(seconds_of(FILMS[name])))]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    jobs = [joblib.delayed(_write_frame)(name, index, paths[index]) for index in missing]
    joblib.Parallel(n_jobs=workers)(jobs)
    return paths


def _write_frame(name, index, path):
    png = cv2.imencode(".png", frame(name, index)[..., ::-1])[1]
    xu.write_files({path: png.tobytes()})


def record(name: str) -> dict:
    """What the JSON file of a clip says."""
    film = FILMS[name]
    seconds = seconds_of(film)
    poses = film_poses(film, seconds)
    visible = [round(visible_fraction(film, second), 4) for second in seconds]
    rounded = [_rounded(pose) for pose in poses]
    return {
        "target": film.target or film.mesh,
        "K": K.tolist(),
        "width": WIDTH,
        "height": HEIGHT,
        "fps": FPS,
        "command": f"python data/render_objects.py {name}",
        "start": {"frame": 0, "pose": rounded[0]},
        "visible": visible,
        "poses": [pose if part > 0 else None for pose, part in zip(rounded, visible)],
    }


def _rounded(pose):
    return pose.round(9).tolist()


def write_clip(name: str, frames: Path, workers: int = 1):
    """Render a film and write data/objects/NAME.mp4 and .json."""
    paths = write_frames(name, frames / name, workers)
    pictures = (xu.read_image(path) for path in paths)
    render.encode(pictures, OBJECTS / f"{name}.mp4", FPS, CRF)
    lines = [f" {json.dumps(key)}: {_text(value)}" for key, value in record(name).items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    xu.write_files({OBJECTS / f"{name}.json": text})


def _text(value):
    """JSON with one pose a line."""
    if isinstance(value, list) and len(value) > 3 and not isinstance(value[1], float):
        return "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
    return json.dumps(value)


def main(arguments: list[str] | None = None):
    """Render the clips that the command line names."""
    parser = argparse.ArgumentParser(description="Render the clips of data/objects/.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FILMS)}")
    parser.add_argument("--frames", type=Path, required=True, help="folder that keeps the frames")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(FILMS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(FILMS)}")
    for name in options.names or FILMS:
        write_clip(name, options.frames, options.workers)
        print(f"data/objects/{name}.mp4")


if __name__ == "__main__":
    main()
