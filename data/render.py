"""Render X-wing frames with known model matrices: `python data/render.py FOLDER --count 512 --seed 1`.

Every image is a pure function of (seed, index): the same whatever the count, the order or the number of
workers. Mitsuba 3 ray-traces the ship on the CPU, without a display; the sky behind it is 3-D noise and
stars, evaluated along each pixel's viewing direction, so it has no seams and no poles. A folder holds
`camera_info.json`, `I.jpg` and `I_mat.json`, and `render_info.json`, which says how it was made. Files appear
atomically and complete pairs are kept, so a run that was killed is resumed by starting it again.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import sys
from pathlib import Path

import cv2
import joblib
import numpy as np
from scipy.interpolate import CubicSpline
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation
from tqdm.auto import tqdm

import xwing_utils as xu
from data import looks
from xwing.mesh import load_mesh

HERE = Path(__file__).resolve().parent
SHIP = HERE / "xwing.obj"
COMMITTED = "sample", "test", "shifted", "looks", "frames"  # sets that come with the project
SIZE = 256  # pixels, width and height of a frame
SAMPLES = 16  # rays a pixel
CAMERA = {  # OpenGL conventions; a 35 mm lens on a 36 mm sensor, at (0, 0, 1), looking down -z, y up
    "camera_world_matrix": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]],
    "model_view_matrix": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, -1], [0, 0, 0, 1]],
    "projection_matrix": [
        [1.9444442987442017, 0, 0, 0],
        [0, 1.9444442987442017, 0, 0],
        [0, 0, -1.0020020008087158, -0.20020020008087158],
        [0, 0, -1, 0],
    ],
}
FOCAL = CAMERA["projection_matrix"][0][0]  # in half frame widths


# ---------------------------------------------------------------- poses


def random_pose(rng):
    """Draw a (4, 4) model matrix.

    Rotation uniform on SO(3); the projected centre uniform over the middle 87.5 % of the frame in x and y; z
    exactly 0 for half of the frames, uniform in [-0.4, 0.3] model units for the others.
    Source: Shoemake, Uniform Random Rotations, Graphics Gems III (scipy's Rotation.random).
    """
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.random(rng=rng).as_matrix()
    centre = rng.uniform(-0.875, 0.875, 2)
    z = 0.0 if rng.random() < 0.5 else rng.uniform(-0.4, 0.3)
    matrix[:3, 3] = [*(centre * (1 - z) / FOCAL), z]
    return matrix


@dataclasses.dataclass(frozen=True)
class Flight:
    """A clip of 10 seconds: where the ship flies and rolls, before which sky and in which light."""

    waypoints: tuple  # rows of second, centre in the frame (x, y in [-1, 1], y up), distance in model units
    rolls: tuple  # rows of second, degrees about the heading
    smoothing: float  # seconds over which the nose follows the path
    sky: str  # one of SKIES
    sky_turn: tuple  # rotation vector, radians a second
    light: tuple  # direction towards the light, world axes
    width: int = SIZE  # pixels of its frames
    height: int = SIZE
    samples: int = SAMPLES  # rays a pixel


CALM = Flight(  # banks, one full barrel roll, leaves the frame once
    waypoints=(
        (0, -0.55, 0.52, 1.37),
        (1.2, -0.25, 0.34, 1.22),
        (2.2, 0.18, 0.05, 0.98),
        (3, 0.55, -0.25, 0.8),
        (3.7, 0.82, -0.3, 0.76),
        (4.5, 0.62, 0.12, 0.9),
        (5.3, 0.12, 0.4, 1.08),
        (6.2, -0.4, 0.15, 1),
        (7, -1, -0.25, 0.92),
        (7.55, -1.33, -0.34, 0.95),
        (8.2, -0.95, -0.12, 1.05),
        (9, -0.25, 0.22, 1.18),
        (10, 0.42, 0.46, 1.38),
    ),
    rolls=(
        (0, 0),
        (1, 5),
        (1.8, 25),
        (2.6, 55),
        (3.6, 120),
        (4.6, 250),
        (5.6, 365),
        (6.4, 340),
        (7.2, 305),
        (8.2, 335),
        (9.2, 385),
        (10, 400),
    ),
    smoothing=1.6,
    sky="bright",
    sky_turn=(0.02, 0.06, 0.015),
    light=(-0.4, 0.8, 0.45),
)
WILD = Flight(  # two to three times as fast, closer and farther, rolls either way, leaves the frame once
    waypoints=(
        (0, 0.6, -0.45, 1.9),
        (0.7, 0.05, -0.05, 1.35),
        (1.3, -0.5, 0.35, 0.85),
        (1.8, -0.6, -0.05, 0.62),
        (2.3, -0.1, -0.42, 0.66),
        (2.9, 0.55, -0.2, 0.95),
        (3.4, 0.6, 0.35, 1.35),
        (4, 0.05, 0.55, 1.8),
        (4.6, -0.5, 0.15, 1.45),
        (5.1, -0.45, -0.4, 1),
        (5.6, 0.15, -0.45, 0.7),
        (6.1, 0.75, -0.05, 0.6),
        (6.55, 1.75, 0.5, 0.72),
        (7, 1.45, 0.75, 1),
        (7.5, 0.45, 0.5, 1.4),
        (8.1, -0.35, 0, 1.95),
        (8.7, -0.6, -0.5, 1.5),
        (9.3, 0, -0.3, 0.95),
        (10, 0.65, -0.1, 0.75),
    ),
    rolls=(
        (0, 0),
        (1, 20),
        (1.8, 110),
        (2.7, 270),
        (3.5, 360),
        (4.5, 310),
        (5.4, 170),
        (6.2, 60),
        (7, 80),
        (8, 200),
        (9, 330),
        (10, 380),
    ),
    smoothing=1.3,
    sky="sharp",
    sky_turn=(-0.10, 0.15, 0.06),
    light=(0.6, 0.5, 0.6),
)
WIDE = dataclasses.replace(  # as CALM, in 16:9
    CALM,
    waypoints=tuple((t, x, y * 9 / 16, z) for t, x, y, z in CALM.waypoints),
    width=1280,
    height=720,
    samples=36,
)


def flight_poses(flight=CALM, count=300, fps=30):
    """Return the (count, 4, 4) model matrices of a smooth flight.

    The nose follows the path's tangent, smoothed over time, and always points a little away from the camera;
    the roll follows a spline of its own.
    """
    path, rolls = np.array(flight.waypoints), np.array(flight.rolls)
    time = np.arange(count) / fps
    spline = CubicSpline(path[:, 0], path[:, 1:])

    def position(t):
        x, y, distance = spline(t).T
        return np.stack([x * distance / FOCAL, y * distance / FOCAL, 1 - distance], -1)

    window = np.linspace(-flight.smoothing / 2, flight.smoothing / 2, 33)
    around = np.clip(time[:, None] + window, 0, 10).ravel()
    tangents = (position(around + 0.02) - position(around - 0.02)).reshape(count, -1, 3)
    heading = np.einsum("w,nwc->nc", np.hanning(35)[1:-1], tangents) + [0, 0, -0.12]
    heading /= np.linalg.norm(heading, axis=1, keepdims=True)
    right = np.cross(heading, [0, 1, 0])
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    axes = np.stack(
        [-right, -heading, np.cross(right, heading)], -1
    )  # of the model: x is the pilot's left
    roll = CubicSpline(rolls[:, 0], rolls[:, 1])(time)
    matrices = np.tile(np.eye(4), (count, 1, 1))
    matrices[:, :3, :3] = axes @ Rotation.from_euler("y", -roll[:, None], degrees=True).as_matrix()
    matrices[:, :3, 3] = position(time)
    return matrices


# ---------------------------------------------------------------- sky


def view_rays(width, height):
    """(height, width, 3) unit vectors through the pixel centres, camera axes: x right, y up, -z forward."""
    x = ((np.arange(width) + 0.5) / width * 2 - 1) / FOCAL
    y = -((np.arange(height) + 0.5) / height * 2 - 1) / FOCAL * height / width
    rays = np.stack(np.broadcast_arrays(x[None, :], y[:, None], -1.0), -1)
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)


SKIES = {  # name -> (share, range of the peak brightness, of the contrast, of the share of filaments)
    "void": (0.20, (0.00, 0.06), (0.8, 2.0), (0.0, 0.5)),
    "deep": (0.35, (0.20, 0.55), (0.7, 1.8), (0.0, 0.5)),
    "bright": (0.25, (0.45, 1.00), (0.6, 1.6), (0.0, 0.6)),
    "sharp": (0.20, (0.30, 0.90), (1.2, 3.0), (0.5, 1.0)),
}


class Sky:
    """A sky on the whole sphere: coloured nebula clouds and stars, drawn from `rng`."""

    def __init__(self, rng, kind=None):
        kind = kind or rng.choice(list(SKIES), p=[s[0] for s in SKIES.values()])
        _, brightness, contrast, filaments = SKIES[kind]
        self.lattice = rng.random((24, 24, 24), dtype=np.float32)
        self.offsets = rng.uniform(0, 24, (64, 3))
        self.brightness, self.contrast = rng.uniform(*brightness), rng.uniform(*contrast)
        self.filaments = rng.uniform(*filaments)
        self.base = rng.uniform(1.2, 3.0)  # clouds a radian, the coarsest octave
        self.roughness = rng.uniform(0.45, 0.72) if kind == "sharp" else rng.uniform(0.35, 0.6)
        self.cover = rng.uniform(0.35, 0.6)
        blue_to_violet = rng.choice([rng.uniform(0.58, 0.72), rng.uniform(0.66, 0.80)])
        hues = blue_to_violet + rng.normal(0, 0.035, 3)
        if rng.random() < 0.12:
            hues = rng.uniform(0, 1) + rng.normal(0, 0.08, 3)  # now and then another colour
        hsv = np.stack([hues % 1 * 360, rng.uniform(0.5, 0.95, 3), rng.uniform(0.6, 1.0, 3)], -1)
        self.colours = cv2.cvtColor(hsv[None].astype(np.float32), cv2.COLOR_HSV2RGB)[0]
        self.floor = np.array([0.006, 0.012, 0.05]) * rng.uniform(0, 2.5)
        count = int(10 ** rng.uniform(2.0, 4.0))
        stars = rng.normal(size=(count, 3))
        self.stars = stars / np.linalg.norm(stars, axis=1, keepdims=True)
        self.star_light = np.minimum(0.15 * (rng.pareto(1.3, count) + 0.3), 4.0) * rng.uniform(
            0.4, 1.2
        )
        sizes = rng.uniform(0.4, 0.75, count)
        self.star_size = sizes * (
            1 + 0.25 * np.log1p(self.star_light)
        )  # sigma, pixels of a frame 256 wide
        warmth = np.clip(rng.normal(0.25, 0.22, (count, 1)), 0, 1)
        self.star_colour = (1 - warmth) * [0.70, 0.84, 1.0] + warmth * [1.0, 0.93, 0.82]

    def noise(self, channel, width, height, rotation, octaves, warp=None):
        """Fractal noise in [0, 1], (height, width): each octave is sampled as densely as its detail needs."""
        total, weight = 0.0, 0.0
        for octave in range(octaves):
            w, h = (max(16, min(side, side // 16 * 2**octave)) for side in (width, height))
            points = view_rays(w, h) @ rotation.T * self.base
            if warp is not None:
                points = points + cv2.resize(warp, (w, h), interpolation=cv2.INTER_LINEAR)
            points = (points * 2**octave + self.offsets[channel * 8 + octave]).reshape(-1, 3).T
            layer = map_coordinates(
                self.lattice, points, order=2, mode="grid-wrap", prefilter=False
            )
            layer = cv2.resize(layer.reshape(h, w), (width, height), interpolation=cv2.INTER_CUBIC)
            total = total + self.roughness**octave * layer
            weight += self.roughness**octave
        return np.clip((total / weight - 0.5) * 1.9 + 0.5, 0, 1).astype(np.float32)

    def draw(self, width, height, rotation):
        """(height, width, 3) display values in [0, 1]; `rotation` turns camera axes into the sky's."""
        warp = np.stack([self.noise(c, width, height, rotation, 2) for c in (0, 1, 2)], -1) * 0.9
        clouds = self.noise(3, width, height, rotation, 6, warp)
        ridges = 1 - np.abs(2 * self.noise(4, width, height, rotation, 6, warp) - 1)
        density = (1 - self.filaments) * clouds + self.filaments * clouds * ridges**3 * 1.6
        density = np.clip((density - self.cover) / (1 - self.cover) + 0.25, 0, 1) ** self.contrast
        mix = (
            np.stack([self.noise(c, width, height, rotation, 3) for c in (5, 6, 7)], -1) ** 3 + 1e-3
        )
        colour = (mix / mix.sum(-1, keepdims=True)) @ self.colours
        image = self.floor + self.brightness * density[..., None] * colour
        return np.clip(image + self._draw_stars(width, height, rotation), 0, 1)

    def _draw_stars(self, width, height, rotation):
        """Small Gaussian spots at sub-pixel positions, added up; (height, width, 3)."""
        scale = (width / SIZE) ** 0.5  # a large frame is sharper
        reach = int(np.ceil(3 * scale))
        x, y, z = (self.stars @ rotation).T
        depth = np.where(z < -0.1, -z, np.nan)
        column = (FOCAL * x / depth + 1) / 2 * width
        row = (height - FOCAL * y / depth * width) / 2
        seen = (
            (column > -reach) & (column < width + reach) & (row > -reach) & (row < height + reach)
        )
        canvas = np.zeros((height + 4 * reach, width + 4 * reach, 3))
        sizes, light = self.star_size * scale, self.star_light[:, None] * self.star_colour
        grid = np.arange(2 * reach + 1) + 0.5
        for k in np.flatnonzero(seen):
            left, top = int(column[k]) - reach, int(row[k]) - reach
            squared = (grid[None] + left - column[k]) ** 2 + (grid[:, None] + top - row[k]) ** 2
            spot = np.exp(-squared / (2 * sizes[k] ** 2))[..., None] * light[k]
            canvas[
                top + 2 * reach : top + 4 * reach + 1, left + 2 * reach : left + 4 * reach + 1
            ] += spot
        return canvas[2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]


class PictureSky:
    """A real picture as the sky: the Hubble Deep Field, the Moon or gravel, turned, scaled and tinted."""

    def __init__(self, rng):
        import skimage.data  # its wheel brings these three pictures along

        name = rng.choice(["hubble_deep_field", "moon", "gravel"], p=[0.6, 0.25, 0.15])
        picture = getattr(skimage.data, name)()
        self.picture = np.repeat(picture[..., None], 3, -1) if picture.ndim == 2 else picture
        self.centre = rng.uniform(0.2, 0.8, 2) * self.picture.shape[1::-1]
        self.angle, self.zoom = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 2.5)
        self.gain = rng.uniform(0.4, 1.1) * np.exp(rng.normal(0, 0.25, 3))

    def draw(self, width, height, rotation):
        """As `Sky.draw`; pictures are flat, so `rotation` is not used."""
        cosine, sine = np.cos(self.angle), np.sin(self.angle)
        turn = self.zoom * SIZE / width * np.array([[cosine, -sine], [sine, cosine]])
        matrix = np.column_stack([turn, self.centre - turn @ [width / 2, height / 2]])
        image = cv2.warpAffine(
            self.picture,
            matrix,
            (width, height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REFLECT,
        )
        return np.clip(image / 255.0 * self.gain, 0, 1)


# ---------------------------------------------------------------- ship


@dataclasses.dataclass
class Look:
    """Everything about a frame that is not its pose; light in world axes."""

    sky: Sky
    sky_rotation: np.ndarray  # (3, 3), camera axes -> sky
    light_direction: np.ndarray  # (3,), towards the light
    light_strength: float
    light_focus: (
        float  # exponent of the lobe: 1 is a soft half-sphere, 60 nearly a sun, infinity a sun
    )
    ambient: float
    tint: np.ndarray  # (3,) multiplies the ship's colour
    paint: np.ndarray  # (M, 3) multiplies each material's colour
    roughness: float
    quality: int  # JPEG
    seed: int


def random_look(rng, materials):
    """Draw a `Look`: soft, nearly shadowless light for three frames of four, else stronger from a side."""
    soft = rng.random() < 0.75
    direction = rng.normal(size=3)
    ambient = rng.uniform(0.75, 1.25) if soft else rng.uniform(0.10, 0.45)
    exposure = np.exp(rng.normal(0, 0.22))
    return Look(  # in this order: the numbers come from one generator
        sky=Sky(rng),
        sky_rotation=Rotation.random(rng=rng).as_matrix(),
        light_direction=direction / np.linalg.norm(direction),
        light_strength=rng.uniform(0.1, 0.5) if soft else rng.uniform(0.6, 1.6),
        light_focus=rng.uniform(1, 4) if soft else rng.uniform(3, 60),
        ambient=ambient,
        tint=exposure * np.exp(rng.normal(0, 0.07, 3)),
        paint=np.array([np.exp(rng.normal(0, 0.12) + rng.normal(0, 0.05, 3)) for _ in materials]),
        roughness=rng.uniform(0.3, 0.8),
        quality=int(rng.integers(80, 98)),
        seed=int(rng.integers(2**31)),
    )


def shifted_look(rng, materials):
    """Draw a `Look` unlike those of `random_look`: a picture behind, a hard sun with shadows, other paint."""
    direction = rng.normal(size=3)
    grey = rng.uniform(0.5, 1.2)
    return Look(  # in this order: the numbers come from one generator
        sky=PictureSky(rng),
        sky_rotation=np.eye(3),
        light_direction=direction / np.linalg.norm(direction),
        light_strength=rng.uniform(1.5, 3.5),
        light_focus=np.inf,
        ambient=rng.uniform(0.15, 0.5),
        tint=np.exp(rng.normal(0, 0.15, 3)),
        paint=np.array(
            [grey * np.exp(rng.normal(0, 0.25) + rng.normal(0, 0.3, 3)) for _ in materials]
        ),
        roughness=rng.uniform(0.05, 0.3),
        quality=int(rng.integers(60, 90)),
        seed=int(rng.integers(2**31)),
    )


GREY = {"type": "rgb", "value": 0.5}
SHADING = {  # name -> (Mitsuba's model, its colour, its roughness)
    "principled": (
        {"type": "principled", "roughness": 0.5, "specular": 0.4, "base_color": GREY},
        "base_color.value",
        "roughness.value",
    ),
    "plastic": (
        {"type": "roughplastic", "alpha": 0.1, "diffuse_reflectance": GREY},
        "diffuse_reflectance.value",
        "alpha",
    ),
}


def srgb_to_linear(x):
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(x):
    x = np.clip(x, 0, 1)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


class Renderer:
    """Renders one mesh; built once a process, then called for each frame."""

    def __init__(self, mesh_path=SHIP, shading="principled"):
        import drjit  # before TensorFlow where a program uses both: loaded after it, it aborts at the end
        import mitsuba as mi

        drjit.set_thread_count(1)  # joblib spreads the frames over the cores
        mi.set_variant("scalar_rgb")
        self.mi, self.shading = mi, SHADING[shading]
        self.mesh = load_mesh(mesh_path)
        self.materials = self.mesh.names
        self.shapes = [self._shape(material) for material in range(len(self.materials))]

    def _shape(self, material):
        """One material's triangles as a Mitsuba mesh, and its parameters, which a frame's look changes."""
        mi = self.mi
        used, faces = np.unique(
            self.mesh.faces[self.mesh.face_materials == material], return_inverse=True
        )
        properties = mi.Properties()
        properties["bsdf"] = mi.load_dict({"type": "twosided", "bsdf": self.shading[0]})
        properties["face_normals"] = True
        name = self.materials[material]
        shape = mi.Mesh(
            name, len(used), faces.size // 3, has_vertex_normals=False, props=properties
        )
        parameters = mi.traverse(shape)
        parameters["vertex_positions"] = self.mesh.vertices[used].astype(np.float32).ravel()
        parameters["faces"] = faces.astype(np.uint32).ravel()
        parameters.update()
        return shape, parameters

    def _paint(self, look):
        """Give every material the colour and roughness of this look."""
        _, colour, roughness = self.shading
        colours = np.clip(srgb_to_linear(self.mesh.colours) * look.paint, 0, 0.95)
        for (_, parameters), value in zip(self.shapes, colours):
            parameters[f"bsdf.brdf_0.{colour}"] = self.mi.ScalarColor3f(value)
            parameters[f"bsdf.brdf_0.{roughness}"] = look.roughness
            parameters.update()

    def _light(self, matrix, look, width=32):
        """The lights in model axes: a map of ambient light and a cosine lobe, or a sun and a constant sky."""
        direction = matrix[:3, :3].T @ look.light_direction
        if np.isinf(look.light_focus):
            sun = {
                "type": "directional",
                "direction": list(-direction),
                "irradiance": look.light_strength,
            }
            return {"sun": sun, "light": {"type": "constant", "radiance": look.ambient}}
        theta = ((np.arange(width // 2) + 0.5) / (width // 2) * np.pi)[:, None]
        phi = ((np.arange(width) + 0.5) / width * 2 * np.pi)[None]
        x, y, z = np.sin(phi) * np.sin(theta), np.cos(theta), -np.cos(phi) * np.sin(theta)
        # Mitsuba's environment map: up is +y; the column's angle runs from -z over -x.
        towards = np.stack(np.broadcast_arrays(x, y, z), -1) @ direction
        radiance = np.clip(towards, 0, 1) ** look.light_focus * (look.light_focus + 1) / 2
        radiance = look.ambient + look.light_strength * radiance
        bitmap = self.mi.Bitmap(np.repeat(radiance[..., None], 3, -1).astype(np.float32))
        return {"light": {"type": "envmap", "bitmap": bitmap}}

    def _crop(self, matrix, width, height):
        """The pixel rectangle (left, top, right, bottom) that holds the ship, or None outside the frame."""
        x, y, z = (self.mesh.vertices @ matrix[:3, :3].T + matrix[:3, 3] - [0, 0, 1]).T
        if z.max() > -0.05:
            raise ValueError(
                f"the ship is {-z.max():.3f} model units from the camera; keep it 0.05 away"
            )
        column, row = (1 - FOCAL * x / z) / 2 * width, (height + FOCAL * y / z * width) / 2
        left, right = max(int(column.min()) - 1, 0), min(int(column.max()) + 2, width)
        top, bottom = max(int(row.min()) - 1, 0), min(int(row.max()) + 2, height)
        return (left, top, right, bottom) if left < right and top < bottom else None

    def ship(self, matrix, look, width=SIZE, height=SIZE, samples=SAMPLES):
        """Linear RGB premultiplied by coverage, and coverage: (height, width, 4) float."""
        mi, canvas = self.mi, np.zeros((height, width, 4))
        crop = self._crop(matrix, width, height)
        if crop is None:
            return canvas
        left, top, right, bottom = crop
        self._paint(look)
        # The mesh stands still and the camera moves: to_world = inverse(model matrix) @ camera.
        camera = np.linalg.inv(matrix) @ [[-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 1], [0, 0, 0, 1]]
        film = {
            "type": "hdrfilm",
            "width": width,
            "height": height,
            "pixel_format": "rgba",
            "rfilter": {"type": "box"},
            "crop_offset_x": left,
            "crop_offset_y": top,
            "crop_width": right - left,
            "crop_height": bottom - top,
        }
        sensor = {
            "type": "perspective",
            "fov": float(np.degrees(2 * np.arctan(1 / FOCAL))),
            "fov_axis": "x",
            "near_clip": 0.01,
            "to_world": mi.ScalarTransform4f(camera),
            "film": film,
            "sampler": {"type": "multijitter", "sample_count": samples},
        }
        shapes = {name: shape for name, (shape, _) in zip(self.materials, self.shapes)}
        scene = mi.load_dict(
            {
                "type": "scene",
                "integrator": {"type": "direct", "hide_emitters": True},
                "sensor": sensor,
                **self._light(matrix, look),
                **shapes,
            }
        )
        canvas[top:bottom, left:right] = np.array(
            mi.render(scene, spp=samples, seed=look.seed), dtype=float
        )
        return canvas

    def frame(self, matrix, look, width=SIZE, height=SIZE, samples=SAMPLES):
        """(height, width, 3) uint8 RGB: the ship over its sky."""
        ship = self.ship(matrix, look, width, height, samples)
        sky = srgb_to_linear(look.sky.draw(width, height, look.sky_rotation))
        linear = ship[..., :3] * look.tint + (1 - ship[..., 3:]) * sky
        return np.round(linear_to_srgb(linear) * 255).astype(np.uint8)


@functools.lru_cache(maxsize=2)
def renderer(mesh_path=SHIP, shading="principled"):
    """This process's `Renderer` of a mesh."""
    return Renderer(mesh_path, shading)


# ---------------------------------------------------------------- sets of frames


def random_frame(seed, index, mesh_path=SHIP):
    """Image `index` of set `seed`: ((H, W, 3) uint8 RGB, (4, 4) matrix, JPEG quality)."""
    ship = renderer(mesh_path)
    rng = np.random.default_rng([seed, index])
    matrix = random_pose(rng)
    look = random_look(rng, ship.materials)
    return ship.frame(matrix, look), matrix, look.quality


def shifted_frame(seed, index, mesh_path=SHIP):
    """As `random_frame`, in a look that no training frame has; drawn at twice the size and scaled down."""
    ship = renderer(mesh_path, "plastic")
    rng = np.random.default_rng([seed, index])
    matrix = random_pose(rng)
    look = shifted_look(rng, ship.materials)
    large = ship.frame(matrix, look, 2 * SIZE, 2 * SIZE)
    return cv2.resize(large, (SIZE, SIZE), interpolation=cv2.INTER_AREA), matrix, look.quality


def looks_frame(seed, index, mesh_path=SHIP):
    """As `random_frame`, but everything is one ray-traced scene, as looks.py says."""
    ship = renderer(mesh_path)
    rng = np.random.default_rng([seed, index])
    matrix = random_pose(rng)
    image, quality = looks.looks_image(ship.mi, ship.mesh, matrix, rng, SIZE, FOCAL)
    return image, matrix, quality


def flight_frame(seed, index, mesh_path=SHIP, flight=CALM):
    """Frame `index` of a flight before the sky of `seed`, as `random_frame`; the sky turns slowly."""
    ship = renderer(mesh_path)
    look = random_look(np.random.default_rng([seed]), ship.materials)
    look.sky = Sky(np.random.default_rng([seed, 1]), flight.sky)
    look.sky_rotation = Rotation.from_rotvec(np.array(flight.sky_turn) * index / 30).as_matrix()
    look.light_direction = np.array(flight.light)
    look.ambient, look.light_strength, look.light_focus = 0.75, 0.45, 2.0
    look.tint, look.paint = np.full(3, 1.05), np.ones((len(ship.materials), 3))
    look.quality, look.seed = 92, look.seed + index
    matrix = flight_poses(flight)[index]
    image = ship.frame(matrix, look, flight.width, flight.height, flight.samples)
    return image, matrix, look.quality


FLIGHTS = {"flight": CALM, "wild": WILD, "wide": WIDE}
MAKERS = {
    "random": random_frame,
    "shifted": shifted_frame,
    "looks": looks_frame,
    **{name: functools.partial(flight_frame, flight=flight) for name, flight in FLIGHTS.items()},
}


def render_set(
    folder, count, seed, kind="random", mesh_path=SHIP, workers=-1, progress=True, dask=None
):
    """Render frames 0 to count-1 into `folder`, except the complete pairs that are there; return how many.

    `workers` processes of this machine do it (-1 is one a core), or with `dask` the workers of the Dask
    cluster whose scheduler has that address; they need this project at the same path and see the same folder.

    Raises:
        ValueError: an unknown kind, a count or seed out of range, a folder with frames of another seed, kind
            or mesh, or one into which another process renders.
        OSError: the folder cannot be written; the frames that are complete stay.
    """
    if kind not in MAKERS:
        raise ValueError(f"kind: expected one of {', '.join(MAKERS)}, got {kind!r}")
    if seed < 0 or count < 1 or (kind in FLIGHTS and count > 300):
        raise ValueError(
            f"expected seed >= 0 and count >= 1, <= 300 in a flight; got {seed} and {count}"
        )
    folder, digest = Path(folder), mesh_digest(load_mesh(mesh_path))
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder):
        frame = FLIGHTS.get(kind, CALM)
        samples = looks.SAMPLES if kind == "looks" else frame.samples
        _claim(
            folder,
            {
                "seed": seed,
                "kind": kind,
                "mesh": Path(mesh_path).name,
                "samples": samples,
                "size": frame.width,
                "mesh_digest": digest,
            },
            frame.width / frame.height,
        )
        names = [f"{i:03d}" if kind in FLIGHTS else str(i) for i in range(count)]
        missing = [
            i
            for i, name in enumerate(names)
            if not ((folder / f"{name}.jpg").exists() and (folder / f"{name}_mat.json").exists())
        ]
        jobs = [
            joblib.delayed(_render_pair)(kind, seed, i, folder / names[i], mesh_path)
            for i in missing
        ]
        bar = tqdm(total=len(jobs), desc=str(folder), unit="frame", disable=not progress)
        try:
            _run(jobs, workers, dask, bar)
        except OSError as error:
            raise OSError(
                f"{error}; the frames that are complete stay: make room and start again"
            ) from None
    return len(missing)


def _refuse_committed(folder, seed, kind):
    """ValueError where another folder, of a set that comes with the project, has these frames."""
    for path in (HERE / name / "render_info.json" for name in COMMITTED):
        taken = xu.read_json(path) if path.exists() else {}
        if (taken.get("seed"), taken.get("kind")) == (
            seed,
            kind,
        ) and folder.resolve() != path.parent:
            raise ValueError(
                f"seed {seed}: data/{path.parent.name}/ has these frames, and who trains on "
                "them cannot be measured with them; expected another --seed"
            )


def mesh_digest(mesh):
    """16 hexadecimal digits that change with a mesh's triangles, materials or colours."""
    parts = [
        mesh.triangles.astype("<f8"),
        mesh.face_materials.astype("<i8"),
        mesh.colours.astype("<f8"),
    ]
    text = json.dumps(mesh.names).encode() + b"".join(part.tobytes() for part in parts)
    return hashlib.sha256(text).hexdigest()[:16]


@contextlib.contextmanager
def _only_one(folder):
    """Keep other renderers out of `folder`; the lock ends with this process, however that ends."""
    with (folder / ".render.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another process renders into it; give another folder"
            ) from None
        yield


def _claim(folder, info, aspect):
    """Write `render_info.json` and the camera of frames that are `aspect` times as wide as high, unless the
    folder holds other frames: then ValueError.

    Sets made before meshes had a digest are taken to show the mesh of their name.
    """
    path = folder / "render_info.json"
    if path.exists():
        known = xu.read_json(path)
        if not isinstance(known, dict) or {**info, **known} != info:
            raise ValueError(f"{folder}: made with {known}, asked for {info}; give another folder")
    elif any(file for end in ("*.json", "*.jpg", "*.jpeg", "*.png") for file in folder.glob(end)):
        raise ValueError(
            f"{folder} holds frames that this program did not render; give another folder"
        )
    else:
        xu.write_files({path: json.dumps(info)})
    projection = (np.array(CAMERA["projection_matrix"]) * [[1], [aspect], [1], [1]]).tolist()
    camera = json.dumps(CAMERA | {"projection_matrix": projection}, indent=1)
    xu.write_files({folder / "camera_info.json": camera})
    for part in folder.glob(".*.part"):
        part.unlink()


def _render_pair(kind, seed, index, path, mesh_path):
    """Write `path`.jpg and `path`_mat.json."""
    image, matrix, quality = MAKERS[kind](seed, index, mesh_path)
    jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    xu.write_files(
        {
            path.with_name(f"{path.name}_mat.json"): json.dumps(matrix.tolist()),
            path.with_name(f"{path.name}.jpg"): jpeg.tobytes(),
        }
    )


def _run(jobs, workers, dask, bar):
    """Do joblib's `jobs` on the cores of this machine or on a Dask cluster."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(bar)
        if dask is not None:
            from distributed import Client

            client = stack.enter_context(Client(dask))
            client.run(
                sys.path.extend, [str(HERE), str(HERE.parent)]
            )  # where the workers find this file
            stack.enter_context(joblib.parallel_config("dask", wait_for_workers_timeout=60))
        for _ in joblib.Parallel(n_jobs=workers, return_as="generator_unordered")(jobs):
            bar.update()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kind",
        choices=MAKERS,
        default="random",
        help="random poses; in a shifted look; in scenes; the clip's flight; a wilder one; "
        "the clip's in 1280x720",
    )
    parser.add_argument(
        "--mesh", type=Path, default=SHIP, help="a Wavefront OBJ mesh in model units"
    )
    parser.add_argument("--workers", type=int, default=-1, help="processes; -1 is one a core")
    parser.add_argument(
        "--dask", metavar="ADDRESS", help="use a Dask cluster, e.g. tcp://scheduler:8786"
    )
    a = parser.parse_args(arguments)
    try:
        _refuse_committed(a.folder, a.seed, a.kind)
        made = render_set(a.folder, a.count, a.seed, a.kind, a.mesh, a.workers, dask=a.dask)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{a.folder}: {made} frames rendered, {a.count - made} kept")


if __name__ == "__main__":
    import render  # by name, so that the worker processes can import what they run

    render.main()
