"""Render X-wing frames with known model matrices.

    python data/render.py FOLDER --count 512 --seed 1

Every image is a function of (seed, index) alone. It does not depend on the count, on the order or
on the number of workers. (One thing varies between runs: the ray tracer's noise in a hangar with
several lamps, see `looks.exposures`.) Mitsuba 3 ray-traces the ship on the CPU, without a display.
The sky behind it is 3-D noise and stars, evaluated along the viewing direction of each pixel, so it
has no seams and no poles.

A folder holds `camera_info.json`, the pairs `I.jpg` and `I_mat.json`, and `render_info.json`, which
says how it was made. Files appear atomically and complete pairs are kept, so a run that was killed
is resumed by starting it again.

Random draws come from one generator for each image. Their order is part of every committed set: a
draw that is moved, added or left out changes the pictures.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import cv2
import joblib
import numpy as np
from scipy.interpolate import CubicSpline
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation
from tqdm.auto import tqdm

import xwing_utils as xu
from xwing.mesh import Mesh, load_mesh

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # by file: another package may be called `data`
import looks  # noqa: E402

SHIP = HERE / "xwing.obj"
COMMITTED = "sample", "test", "shifted", "looks", "frames"  # sets that come with the project
CLIPS = "flight_looks1", "flight_looks2", "flight_looks3"  # the same, as videos
SIZE = 256  # pixels, width and height of a frame
SAMPLES = 16  # rays a pixel
# OpenGL conventions; a 35 mm lens on a 36 mm sensor, at (0, 0, 1), looking down -z, y up.
CAMERA = {
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
# Model units that a mesh may reach from its origin. Less is below 25 pixels in a frame; more would
# touch the camera, which comes as near as 0.6 units.
MIN_REACH, MAX_REACH = 0.05, 0.5
SHIP_REACH = 0.19  # the X-wing's


# ---------------------------------------------------------------- poses


def random_pose(rng: np.random.Generator) -> np.ndarray:
    """Draw a (4, 4) model matrix.

    The rotation is uniform on SO(3). The projected centre is uniform over the middle 87.5 % of the
    frame in x and y. z is exactly 0 for half of the frames, and uniform in [-0.4, 0.3] model units
    for the others.

    Source: Shoemake, Uniform Random Rotations, Graphics Gems III (scipy's Rotation.random).
    """
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.random(rng=rng).as_matrix()

    centre = rng.uniform(-0.875, 0.875, 2)
    z = 0.0 if rng.random() < 0.5 else rng.uniform(-0.4, 0.3)
    matrix[:2, 3] = centre * (1 - z) / FOCAL
    matrix[2, 3] = z
    return matrix


@dataclasses.dataclass(frozen=True)
class Flight:
    """A clip of 10 seconds: where the ship flies and rolls, before which sky and in which light."""

    # Rows of second, centre in the frame (x, y in [-1, 1], y up), distance in model units.
    waypoints: tuple
    rolls: tuple  # rows of second, degrees about the heading
    smoothing: float  # seconds over which the nose follows the path
    sky: str  # one of SKIES
    sky_turn: tuple  # rotation vector, radians a second
    light: tuple  # direction towards the light, world axes
    width: int = SIZE  # pixels of its frames
    height: int = SIZE
    samples: int = SAMPLES  # rays a pixel


# It banks, makes one full barrel roll and leaves the frame once.
CALM = Flight(
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
# Two to three times as fast as CALM, closer and farther, with rolls either way; it leaves the frame
# once.
WILD = Flight(
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
# As CALM, in 16:9.
WIDE = dataclasses.replace(
    CALM,
    waypoints=tuple((t, x, y * 9 / 16, z) for t, x, y, z in CALM.waypoints),
    width=1280,
    height=720,
    samples=36,
)


def random_flight(rng: np.random.Generator) -> Flight:
    """Draw a flight that stays in the frame, about as fast as CALM; it has no sky of its own."""
    seconds = np.arange(11.0)
    angle = rng.uniform(0, 2 * np.pi) + rng.choice([-1, 1]) * 0.9 * seconds  # about the frame
    centres = np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(0.3, 0.6, (11, 1))
    distances = 1.05 + 0.3 * np.sin(rng.uniform(0, 2 * np.pi) + rng.uniform(0.5, 1.2) * seconds)
    rolls = np.cumsum(rng.normal(0, 50, 11))
    return dataclasses.replace(
        CALM,
        waypoints=tuple(map(tuple, np.column_stack([seconds, centres, distances]))),
        rolls=tuple(map(tuple, np.column_stack([seconds, rolls]))),
    )


def flight_poses(flight: Flight = CALM, count: int = 300, fps: float = 30) -> np.ndarray:
    """Return the (count, 4, 4) model matrices of a smooth flight.

    The nose follows the path's tangent, smoothed over time, and always points a little away from
    the camera. The roll follows a spline of its own.

    Args:
        flight: the path and the rolls.
        count: number of frames.
        fps: frames a second.
    """
    waypoints = np.array(flight.waypoints)
    rolls = np.array(flight.rolls)
    seconds = np.arange(count) / fps

    path = CubicSpline(waypoints[:, 0], waypoints[:, 1:])
    heading = _smoothed_heading(path, seconds, flight.smoothing)
    roll = CubicSpline(rolls[:, 0], rolls[:, 1])(seconds)
    rolled = Rotation.from_euler("y", -roll[:, None], degrees=True).as_matrix()

    matrices = np.tile(np.eye(4), (count, 1, 1))
    matrices[:, :3, :3] = _axes_along(heading) @ rolled
    matrices[:, :3, 3] = _positions(path, seconds)
    return matrices


def _positions(path, seconds):
    """(N, 3) world positions of a path of (x, y, distance), where x and y are in the frame."""
    x, y, distance = path(seconds).T
    return np.stack([x * distance / FOCAL, y * distance / FOCAL, 1 - distance], -1)


def _smoothed_heading(path, seconds, smoothing):
    """(N, 3) unit vectors: the path's tangents under a Hann window of `smoothing` seconds."""
    window = np.linspace(-smoothing / 2, smoothing / 2, 33)
    around = np.clip(seconds[:, None] + window, 0, 10).ravel()
    differences = _positions(path, around + 0.02) - _positions(path, around - 0.02)
    tangents = differences.reshape(len(seconds), -1, 3)

    away_from_the_camera = [0, 0, -0.12]
    heading = np.einsum("w,nwc->nc", np.hanning(35)[1:-1], tangents) + away_from_the_camera
    return heading / np.linalg.norm(heading, axis=1, keepdims=True)


def _axes_along(heading):
    """(N, 3, 3) rotations, without roll, that point the nose (-y in the model) along (N, 3)."""
    right = np.cross(heading, [0, 1, 0])
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    return np.stack([-right, -heading, np.cross(right, heading)], -1)  # x is the pilot's left


# ---------------------------------------------------------------- sky


def view_rays(width: int, height: int) -> np.ndarray:
    """Return unit vectors (height, width, 3) through pixel centres: x right, y up, -z forward."""
    x = ((np.arange(width) + 0.5) / width * 2 - 1) / FOCAL
    y = -((np.arange(height) + 0.5) / height * 2 - 1) / FOCAL * height / width
    rays = np.stack(np.broadcast_arrays(x[None, :], y[:, None], -1.0), -1)
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class SkyKind:
    """How often a kind of sky is drawn, and the limits of its properties."""

    probability: float
    brightness: tuple  # of the brightest clouds
    contrast: tuple
    filaments: tuple  # fraction of the clouds that are thin threads


SKIES = {
    "void": SkyKind(0.20, (0.00, 0.06), (0.8, 2.0), (0.0, 0.5)),
    "deep": SkyKind(0.35, (0.20, 0.55), (0.7, 1.8), (0.0, 0.5)),
    "bright": SkyKind(0.25, (0.45, 1.00), (0.6, 1.6), (0.0, 0.6)),
    "sharp": SkyKind(0.20, (0.30, 0.90), (1.2, 3.0), (0.5, 1.0)),
}


class Sky:
    """A sky on the whole sphere: coloured nebula clouds and stars."""

    def __init__(self, rng: np.random.Generator, kind: str | None = None):
        """Draw a sky; kind: one of SKIES, or None to draw that too."""
        if kind is None:
            kind = rng.choice(list(SKIES), p=[sky.probability for sky in SKIES.values()])
        self._choose_clouds(rng, kind)
        self._choose_colours(rng)
        self._choose_stars(rng)

    def _choose_clouds(self, rng, kind):
        limits = SKIES[kind]
        self.lattice = rng.random((24, 24, 24), dtype=np.float32)
        self.offsets = rng.uniform(0, 24, (64, 3))  # a row for each octave of each channel of noise
        self.brightness = rng.uniform(*limits.brightness)
        self.contrast = rng.uniform(*limits.contrast)
        self.filaments = rng.uniform(*limits.filaments)
        self.base = rng.uniform(1.2, 3.0)  # clouds a radian, the coarsest octave
        self.roughness = rng.uniform(0.45, 0.72) if kind == "sharp" else rng.uniform(0.35, 0.6)
        self.clear = rng.uniform(0.35, 0.6)  # below this density the sky is dark

    def _choose_colours(self, rng):
        blue = rng.uniform(0.58, 0.72)
        violet = rng.uniform(0.66, 0.80)
        hues = rng.choice([blue, violet]) + rng.normal(0, 0.035, 3)
        if rng.random() < 0.12:  # now and then another colour
            hues = rng.uniform(0, 1) + rng.normal(0, 0.08, 3)

        saturation = rng.uniform(0.5, 0.95, 3)
        value = rng.uniform(0.6, 1.0, 3)
        hsv = np.stack([hues % 1 * 360, saturation, value], -1)
        self.colours = cv2.cvtColor(hsv[None].astype(np.float32), cv2.COLOR_HSV2RGB)[0]
        self.floor = np.array([0.006, 0.012, 0.05]) * rng.uniform(0, 2.5)

    def _choose_stars(self, rng):
        count = int(10 ** rng.uniform(2.0, 4.0))
        stars = rng.normal(size=(count, 3))
        self.stars = stars / np.linalg.norm(stars, axis=1, keepdims=True)

        light = np.minimum(0.15 * (rng.pareto(1.3, count) + 0.3), 4.0)  # few are bright
        self.star_light = light * rng.uniform(0.4, 1.2)
        sizes = rng.uniform(0.4, 0.75, count)
        # Standard deviations in pixels of a frame that is 256 wide.
        self.star_size = sizes * (1 + 0.25 * np.log1p(self.star_light))

        warmth = np.clip(rng.normal(0.25, 0.22, (count, 1)), 0, 1)
        self.star_colour = (1 - warmth) * [0.70, 0.84, 1.0] + warmth * [1.0, 0.93, 0.82]

    def noise(
        self,
        channel: int,
        width: int,
        height: int,
        rotation: np.ndarray,
        octaves: int,
        warp: np.ndarray | None = None,
    ) -> np.ndarray:
        """Evaluate fractal noise in [0, 1], (height, width).

        Each octave is sampled only as densely as its detail needs.

        Args:
            channel: which of eight independent noises.
            width: of the frame in pixels.
            height: of the frame in pixels.
            rotation: (3, 3) from camera axes to the sky's.
            octaves: number of octaves, each twice as fine as the one before.
            warp: (height, width, 3) displacements that bend the noise, or None.
        """
        total = 0.0
        total_weight = 0.0
        for octave in range(octaves):
            w, h = (max(16, min(side, side // 16 * 2**octave)) for side in (width, height))
            points = view_rays(w, h) @ rotation.T * self.base
            if warp is not None:
                points = points + cv2.resize(warp, (w, h), interpolation=cv2.INTER_LINEAR)
            points = points * 2**octave + self.offsets[channel * 8 + octave]

            layer = map_coordinates(
                self.lattice, points.reshape(-1, 3).T, order=2, mode="grid-wrap", prefilter=False
            )
            layer = cv2.resize(layer.reshape(h, w), (width, height), interpolation=cv2.INTER_CUBIC)
            weight = self.roughness**octave
            total = total + weight * layer
            total_weight += weight
        return np.clip((total / total_weight - 0.5) * 1.9 + 0.5, 0, 1).astype(np.float32)

    def draw(self, width: int, height: int, rotation: np.ndarray) -> np.ndarray:
        """Draw display values (height, width, 3) in [0, 1].

        Args:
            width: pixels.
            height: pixels.
            rotation: (3, 3) from camera axes to the sky's.
        """
        view = width, height, rotation
        warp = np.stack([self.noise(channel, *view, 2) for channel in (0, 1, 2)], -1) * 0.9
        clouds = self.noise(3, *view, 6, warp)
        ridges = 1 - np.abs(2 * self.noise(4, *view, 6, warp) - 1)
        density = (1 - self.filaments) * clouds + self.filaments * clouds * ridges**3 * 1.6
        density = np.clip((density - self.clear) / (1 - self.clear) + 0.25, 0, 1) ** self.contrast

        mix = np.stack([self.noise(channel, *view, 3) for channel in (5, 6, 7)], -1) ** 3 + 1e-3
        colour = (mix / mix.sum(-1, keepdims=True)) @ self.colours
        nebula = self.floor + self.brightness * density[..., None] * colour
        return np.clip(nebula + self._draw_stars(width, height, rotation), 0, 1)

    def _draw_stars(self, width, height, rotation):
        """(height, width, 3): small Gaussian spots at sub-pixel positions, added up."""
        scale = (width / SIZE) ** 0.5  # a large frame is sharper
        reach = int(np.ceil(3 * scale))
        x, y, z = (self.stars @ rotation).T
        depth = np.where(z < -0.1, -z, np.nan)
        column = (FOCAL * x / depth + 1) / 2 * width
        row = (height - FOCAL * y / depth * width) / 2
        column_near = (column > -reach) & (column < width + reach)
        row_near = (row > -reach) & (row < height + reach)

        border = 2 * reach  # so that a spot at the edge fits onto the canvas
        canvas = np.zeros((height + 2 * border, width + 2 * border, 3))
        sizes = self.star_size * scale
        light = self.star_light[:, None] * self.star_colour
        grid = np.arange(2 * reach + 1) + 0.5
        for k in np.flatnonzero(column_near & row_near):
            left = int(column[k]) - reach
            top = int(row[k]) - reach
            squared = (grid[None] + left - column[k]) ** 2 + (grid[:, None] + top - row[k]) ** 2
            spot = np.exp(-squared / (2 * sizes[k] ** 2))[..., None] * light[k]
            rows = slice(top + border, top + border + len(grid))
            columns = slice(left + border, left + border + len(grid))
            canvas[rows, columns] += spot
        return canvas[border : border + height, border : border + width]


class PictureSky:
    """A real picture as the sky: Hubble Deep Field, Moon or gravel, turned, scaled and tinted."""

    def __init__(self, rng: np.random.Generator):
        import skimage.data  # its wheel brings these three pictures along

        name = rng.choice(["hubble_deep_field", "moon", "gravel"], p=[0.6, 0.25, 0.15])
        picture = getattr(skimage.data, name)()
        self.picture = np.repeat(picture[..., None], 3, -1) if picture.ndim == 2 else picture
        self.centre = rng.uniform(0.2, 0.8, 2) * self.picture.shape[1::-1]
        self.angle = rng.uniform(0, 2 * np.pi)
        self.zoom = rng.uniform(0.6, 2.5)
        self.gain = rng.uniform(0.4, 1.1) * np.exp(rng.normal(0, 0.25, 3))

    def draw(self, width: int, height: int, rotation: np.ndarray) -> np.ndarray:
        """Draw as `Sky.draw` does; a picture is flat, so `rotation` is not used."""
        cosine = np.cos(self.angle)
        sine = np.sin(self.angle)
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

    sky: Sky | PictureSky
    sky_rotation: np.ndarray  # (3, 3), camera axes -> sky
    light_direction: np.ndarray  # (3,), towards the light
    light_strength: float
    light_focus: float  # exponent of the lobe: 1 a soft half-sphere, 60 nearly a sun, inf a sun
    ambient: float
    tint: np.ndarray  # (3,) multiplies the ship's colour
    paint: np.ndarray  # (M, 3) multiplies each material's colour
    roughness: float
    quality: int  # JPEG
    seed: int


def random_look(rng: np.random.Generator, materials: list) -> Look:
    """Draw a `Look`.

    Three of four have soft light, nearly without shadows; the others have stronger light from one
    side.

    Args:
        rng: the frame's random generator.
        materials: the mesh's materials.
    """
    soft = rng.random() < 0.75
    direction = rng.normal(size=3)
    ambient = rng.uniform(0.75, 1.25) if soft else rng.uniform(0.10, 0.45)
    exposure = np.exp(rng.normal(0, 0.22))
    return Look(  # Python evaluates the arguments, and so draws, in this order
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


def shifted_look(rng: np.random.Generator, materials: list) -> Look:
    """Draw a `Look` unlike those of `random_look`: a picture behind, a hard sun, other paint."""
    direction = rng.normal(size=3)
    grey = rng.uniform(0.5, 1.2)
    return Look(  # Python evaluates the arguments, and so draws, in this order
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


@dataclasses.dataclass(frozen=True)
class Surface:
    """A Mitsuba material, and the names of the two parameters that a look sets."""

    bsdf: dict
    colour: str
    roughness: str


GREY = {"type": "rgb", "value": 0.5}
SURFACES = {
    "principled": Surface(
        {"type": "principled", "roughness": 0.5, "specular": 0.4, "base_color": GREY},
        "base_color.value",
        "roughness.value",
    ),
    "plastic": Surface(
        {"type": "roughplastic", "alpha": 0.1, "diffuse_reflectance": GREY},
        "diffuse_reflectance.value",
        "alpha",
    ),
}


def srgb_to_linear(x: np.ndarray) -> np.ndarray:
    """Convert display values in [0, 1] to linear light, after IEC 61966-2-1."""
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(x: np.ndarray) -> np.ndarray:
    """Convert linear light, clipped to [0, 1], to display values, after IEC 61966-2-1."""
    x = np.clip(x, 0, 1)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


class Renderer:
    """Renders one mesh, frame after frame; `renderer` keeps one in each process."""

    def __init__(self, mesh_path: str | Path = SHIP, surface: str = "principled"):
        """Load a mesh; surface: one of SURFACES."""
        # drjit is imported before TensorFlow where a program uses both: else it aborts at its end.
        import drjit
        import mitsuba as mi

        drjit.set_thread_count(1)  # joblib spreads the frames over the cores
        mi.set_variant("scalar_rgb")
        self.mi = mi
        self.surface = SURFACES[surface]
        self.mesh = load_mesh(mesh_path)
        self.materials = self.mesh.names
        self.shapes = [self._shape(material) for material in range(len(self.materials))]

    def ship(
        self,
        matrix: np.ndarray,
        look: Look,
        width: int = SIZE,
        height: int = SIZE,
        samples: int = SAMPLES,
    ) -> np.ndarray:
        """Ray-trace the ship alone.

        Args:
            matrix: (4, 4) model matrix.
            look: its paint and light.
            width: pixels.
            height: pixels.
            samples: rays a pixel.

        Returns:
            (height, width, 4) float: linear RGB, premultiplied by the coverage, and the coverage.

        Raises:
            ValueError: the ship is too near the camera.
        """
        canvas = np.zeros((height, width, 4))
        crop = self._crop(matrix, width, height)
        if crop is None:
            return canvas

        left, top, right, bottom = crop
        self._paint(look)
        shapes = {name: shape for name, (shape, _) in zip(self.materials, self.shapes)}
        scene = self.mi.load_dict(
            {
                "type": "scene",
                "integrator": {"type": "direct", "hide_emitters": True},
                "sensor": self._sensor(matrix, width, height, crop, samples),
                **self._lights(matrix, look),
                **shapes,
            }
        )
        rendered = self.mi.render(scene, spp=samples, seed=look.seed)
        canvas[top:bottom, left:right] = np.array(rendered, dtype=float)
        return canvas

    def frame(
        self,
        matrix: np.ndarray,
        look: Look,
        width: int = SIZE,
        height: int = SIZE,
        samples: int = SAMPLES,
    ) -> np.ndarray:
        """Ray-trace the ship over its sky: (height, width, 3) uint8 RGB; arguments as of `ship`."""
        ship = self.ship(matrix, look, width, height, samples)
        sky = srgb_to_linear(look.sky.draw(width, height, look.sky_rotation))
        linear = ship[..., :3] * look.tint + (1 - ship[..., 3:]) * sky
        return np.round(linear_to_srgb(linear) * 255).astype(np.uint8)

    def _shape(self, material):
        """One material's triangles as a Mitsuba mesh, and the parameters that a look changes."""
        mi = self.mi
        of_material = self.mesh.faces[self.mesh.face_materials == material]
        used, faces = np.unique(of_material, return_inverse=True)

        properties = mi.Properties()
        properties["bsdf"] = mi.load_dict({"type": "twosided", "bsdf": self.surface.bsdf})
        properties["face_normals"] = True
        shape = mi.Mesh(
            self.materials[material],
            len(used),
            faces.size // 3,
            has_vertex_normals=False,
            props=properties,
        )
        parameters = mi.traverse(shape)
        parameters["vertex_positions"] = self.mesh.vertices[used].astype(np.float32).ravel()
        parameters["faces"] = faces.astype(np.uint32).ravel()
        parameters.update()
        return shape, parameters

    def _paint(self, look):
        """Give every material the colour and roughness of this look."""
        colours = np.clip(srgb_to_linear(self.mesh.colours) * look.paint, 0, 0.95)
        for (_, parameters), colour in zip(self.shapes, colours):
            parameters[f"bsdf.brdf_0.{self.surface.colour}"] = self.mi.ScalarColor3f(colour)
            parameters[f"bsdf.brdf_0.{self.surface.roughness}"] = look.roughness
            parameters.update()

    def _lights(self, matrix, look):
        """The lights in model axes: a sun and a constant sky, or a map with a cosine lobe."""
        direction = matrix[:3, :3].T @ look.light_direction
        if np.isinf(look.light_focus):
            sun = {
                "type": "directional",
                "direction": list(-direction),
                "irradiance": look.light_strength,
            }
            return {"sun": sun, "light": {"type": "constant", "radiance": look.ambient}}

        towards = _environment_directions(width=32) @ direction
        lobe = np.clip(towards, 0, 1) ** look.light_focus * (look.light_focus + 1) / 2
        radiance = look.ambient + look.light_strength * lobe
        bitmap = self.mi.Bitmap(np.repeat(radiance[..., None], 3, -1).astype(np.float32))
        return {"light": {"type": "envmap", "bitmap": bitmap}}

    def _crop(self, matrix, width, height):
        """The ship's rectangle (left, top, right, bottom) in pixels; None outside the frame."""
        x, y, z = (self.mesh.vertices @ matrix[:3, :3].T + matrix[:3, 3] - [0, 0, 1]).T
        if z.max() > -0.05:
            raise ValueError(
                f"the ship is {-z.max():.3f} model units from the camera; keep it 0.05 away"
            )

        column = (1 - FOCAL * x / z) / 2 * width
        row = (height + FOCAL * y / z * width) / 2
        left = max(int(column.min()) - 1, 0)
        right = min(int(column.max()) + 2, width)
        top = max(int(row.min()) - 1, 0)
        bottom = min(int(row.max()) + 2, height)
        return (left, top, right, bottom) if left < right and top < bottom else None

    def _sensor(self, matrix, width, height, crop, samples):
        """Mitsuba's camera for a rectangle of the frame; its axes are x to the left, z forward."""
        left, top, right, bottom = crop
        to_world = [[-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 1], [0, 0, 0, 1]]
        to_model = np.linalg.inv(matrix) @ to_world  # the mesh stands still and the camera moves
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
        return {
            "type": "perspective",
            "fov": float(np.degrees(2 * np.arctan(1 / FOCAL))),
            "fov_axis": "x",
            "near_clip": 0.01,
            "to_world": self.mi.ScalarTransform4f(to_model),
            "film": film,
            "sampler": {"type": "multijitter", "sample_count": samples},
        }


def _environment_directions(width):
    """(width / 2, width, 3) directions of the pixels of a Mitsuba environment map.

    Up is +y; the angle of a column runs from -z over -x.
    """
    theta = ((np.arange(width // 2) + 0.5) / (width // 2) * np.pi)[:, None]
    phi = ((np.arange(width) + 0.5) / width * 2 * np.pi)[None]
    x = np.sin(phi) * np.sin(theta)
    y = np.cos(theta)
    z = -np.cos(phi) * np.sin(theta)
    return np.stack(np.broadcast_arrays(x, y, z), -1)


@functools.lru_cache(maxsize=2)
def renderer(mesh_path: str | Path = SHIP, surface: str = "principled") -> Renderer:
    """Return this process's `Renderer` of a mesh."""
    return Renderer(mesh_path, surface)


# ---------------------------------------------------------------- frames


# What a maker of frames returns: image (H, W, 3) uint8 RGB, model matrix (4, 4), JPEG quality.
Frame = tuple[np.ndarray, np.ndarray, int]


def random_frame(seed: int, index: int, mesh_path: str | Path = SHIP) -> Frame:
    """Render image `index` of set `seed`."""
    ship = renderer(mesh_path)
    rng = np.random.default_rng([seed, index])
    matrix = random_pose(rng)
    look = random_look(rng, ship.materials)
    return ship.frame(matrix, look), matrix, look.quality


def shifted_frame(seed: int, index: int, mesh_path: str | Path = SHIP) -> Frame:
    """Render as `random_frame` does, in a look that no training frame has.

    The frame is rendered at twice the size and scaled down.
    """
    ship = renderer(mesh_path, "plastic")
    rng = np.random.default_rng([seed, index])
    matrix = random_pose(rng)
    look = shifted_look(rng, ship.materials)
    large = ship.frame(matrix, look, 2 * SIZE, 2 * SIZE)
    return cv2.resize(large, (SIZE, SIZE), interpolation=cv2.INTER_AREA), matrix, look.quality


def looks_frame(seed: int, index: int, mesh_path: str | Path = SHIP) -> Frame:
    """Render as `random_frame` does, but with everything in one ray-traced scene, see looks.py."""
    ship = renderer(mesh_path)
    rng = np.random.default_rng([seed, index])
    matrix = random_pose(rng)
    image, quality = looks.looks_image(ship.mi, ship.mesh, matrix, rng, SIZE, FOCAL)
    return image, matrix, quality


def flight_frame(
    seed: int, index: int, mesh_path: str | Path = SHIP, flight: Flight = CALM
) -> Frame:
    """Render frame `index` of a flight; the sky, from `seed`, turns slowly behind it."""
    ship = renderer(mesh_path)
    # Only its roughness and its seed are used as they are drawn.
    look = random_look(np.random.default_rng([seed]), ship.materials)
    look = dataclasses.replace(
        look,
        sky=Sky(np.random.default_rng([seed, 1]), flight.sky),
        sky_rotation=Rotation.from_rotvec(np.array(flight.sky_turn) * index / 30).as_matrix(),
        light_direction=np.array(flight.light),
        light_strength=0.45,
        light_focus=2.0,
        ambient=0.75,
        tint=np.full(3, 1.05),
        paint=np.ones((len(ship.materials), 3)),
        quality=92,
        seed=look.seed + index,
    )
    matrix = flight_poses(flight)[index]
    image = ship.frame(matrix, look, flight.width, flight.height, flight.samples)
    return image, matrix, look.quality


@functools.lru_cache(maxsize=1)
def _stage(seed, mesh_path):
    ship = renderer(mesh_path)
    return looks.Stage(ship.mi, ship.mesh, seed, SIZE, FOCAL)


def staged_frame(seed: int, index: int, mesh_path: str | Path = SHIP) -> Frame:
    """Render frame `index` of a flight in a scene; the seed draws scene, paint and path."""
    flight = random_flight(np.random.default_rng([seed, 1]))
    matrix = flight_poses(flight)[index]
    return _stage(seed, mesh_path).image(matrix, index), matrix, 95


FLIGHTS = {"flight": CALM, "wild": WILD, "wide": WIDE}
PATHS = *FLIGHTS, "staged"  # kinds whose frames are those of a clip
MAKERS = {
    "random": random_frame,
    "shifted": shifted_frame,
    "looks": looks_frame,
    "staged": staged_frame,
    **{name: functools.partial(flight_frame, flight=flight) for name, flight in FLIGHTS.items()},
}


# ---------------------------------------------------------------- sets on disk


def render_set(
    folder: str | Path,
    count: int,
    seed: int,
    kind: str = "random",
    mesh_path: str | Path = SHIP,
    workers: int = -1,
    progress: bool = True,
    dask: str | None = None,
) -> int:
    """Render frames 0 to count - 1 into a folder, except the complete pairs that are there already.

    Args:
        folder: where to write; it is made if it does not exist.
        count: number of frames, at most 300 of a flight.
        seed: 0 or more; with the index it determines a frame.
        kind: one of MAKERS.
        mesh_path: the mesh to render.
        workers: processes of this machine; -1 is one a core.
        progress: whether to show a progress bar.
        dask: address of the scheduler of a Dask cluster, whose workers render in place of this
            machine's. They need this project at the same path and see the same folder.

    Returns:
        The number of frames that were rendered.

    Raises:
        ValueError: an unknown kind, a count or seed out of range, a mesh too large or too small for
            the camera, a folder with frames of another seed, kind or mesh, or one into which
            another process renders.
        OSError: the folder cannot be written; the frames that are complete stay.
    """
    _check_request(kind, seed, count)
    folder = Path(folder)
    mesh = load_mesh(mesh_path)
    _check_reach(mesh, mesh_path)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _claim(folder, kind, seed, mesh_path, mesh)
        names = [f"{i:03d}" if kind in PATHS else str(i) for i in range(count)]
        missing = [i for i, name in enumerate(names) if not _is_complete(folder, name)]
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


def encode(pictures: Iterable[np.ndarray], path: Path, fps: int, quality: int):
    """Write an H.264 video that is smaller than those of `xwing.film`.

    Args:
        pictures: (H, W, 3) uint8 RGB of one size, which is even.
        path: of the MP4 file.
        fps: frames a second.
        quality: x264's crf; more is smaller and worse.
    """
    from xwing.film import write_clip  # the processes that render do without it

    write_clip(pictures, path, fps, encoding={"preset": "slow", "crf": str(quality)})


def write_video(folder: str | Path, fps: int = 30):
    """Write a folder's frames as FOLDER.mp4, and what is known of them as FOLDER.json.

    `xwing.evaluation.load_flight` reads both.
    """
    folder = Path(folder)
    paths, matrices = xu.load_dataset(folder)
    encode((xu.read_image(path) for path in paths), folder.with_suffix(".mp4"), fps, quality=22)

    info = xu.read_json(folder / "render_info.json")
    height, width = xu.read_image(paths[0]).shape[:2]
    options = f"--kind {info['kind']} --count {len(paths)} --seed {info['seed']} --video"
    record = {
        "video": f"{folder.name}.mp4",
        "fps": fps,
        "width": width,
        "height": height,
        "seed": info["seed"],
        "kind": info["kind"],
        "command": f"python data/render.py data/{folder.name} {options}",
        **xu.read_json(folder / "camera_info.json"),
    }
    lines = [f' "{key}": {json.dumps(value)}' for key, value in record.items()]
    rows = ",\n  ".join(json.dumps(matrix.round(12).tolist()) for matrix in matrices)
    lines.append(f' "matrices": [\n  {rows}\n ]')
    xu.write_files({folder.with_suffix(".json"): "{\n" + ",\n".join(lines) + "\n}\n"})


def mesh_digest(mesh: Mesh) -> str:
    """Return 16 hexadecimal digits that change with a mesh's triangles, materials or colours."""
    digest = hashlib.sha256(json.dumps(mesh.names).encode())
    digest.update(mesh.triangles.astype("<f8").tobytes())
    digest.update(mesh.face_materials.astype("<i8").tobytes())
    digest.update(mesh.colours.astype("<f8").tobytes())
    return digest.hexdigest()[:16]


def _check_request(kind, seed, count):
    if kind not in MAKERS:
        raise ValueError(f"kind: expected one of {', '.join(MAKERS)}, got {kind!r}")
    if seed < 0 or count < 1 or (kind in PATHS and count > 300):
        raise ValueError(
            f"expected seed >= 0 and count >= 1, <= 300 in a flight; got {seed} and {count}"
        )


def _check_reach(mesh, mesh_path):
    """Raise ValueError where a mesh is too large or too small for the camera."""
    vertices = mesh.triangles.reshape(-1, 3)
    reach = np.linalg.norm(vertices, axis=1).max()
    if MIN_REACH <= reach <= MAX_REACH:
        return

    low, high = vertices.min(0), vertices.max(0)
    radius = np.linalg.norm(high - low) / 2
    advice = f"scale it by {SHIP_REACH / reach:.3g}"
    if reach > 2 * radius:  # it lies beside its origin
        middle = ", ".join(f"{value:.4g}" for value in (low + high) / 2)
        advice = (
            f"move its middle ({middle}) to the origin and scale it by {SHIP_REACH / radius:.3g}"
        )
    expected = f"expected {MIN_REACH} to {MAX_REACH}, because the camera is one unit away"
    text = f"reaches {reach:.3g} model units from its origin, {expected}"
    raise ValueError(f"{mesh_path}: {text}; {advice}")


def _refuse_committed(folder, seed, kind):
    """Raise ValueError if another folder, of a committed set, has these frames."""
    for name in COMMITTED + CLIPS:
        path = HERE / name / "render_info.json"
        if name in CLIPS:
            path = HERE / f"{name}.json"
        if not path.exists() or folder.resolve() == HERE / name:
            continue
        info = xu.read_json(path)
        if (info.get("seed"), info.get("kind")) == (seed, kind):
            raise ValueError(
                f"seed {seed}: data/{name} has these frames, and a network that was trained on "
                "them cannot be measured with them; expected another --seed"
            )


@contextlib.contextmanager
def _locked(folder):
    """Keep other renderers out of `folder`; the lock ends with this process, however that ends."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(xu.locked(folder / ".render.lock"))
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another process renders into it; give another folder"
            ) from None
        yield


def _claim(folder, kind, seed, mesh_path, mesh):
    """Write `render_info.json` and the camera; ValueError if the folder holds other frames.

    Where an earlier run has left no frame, its `render_info.json` is replaced. Other leftovers of
    killed runs are removed.
    """
    frame = FLIGHTS.get(kind, CALM)  # for its size and samples
    info = {
        "seed": seed,
        "kind": kind,
        "mesh": Path(mesh_path).name,
        "samples": looks.SAMPLES if kind in ("looks", "staged") else frame.samples,
        "size": frame.width,
        "mesh_digest": mesh_digest(mesh),
    }
    path = folder / "render_info.json"
    if path.exists() and any(folder.glob("*.jpg")):
        known = xu.read_json(path)
        # Older sets have no digest of the mesh: what they do not say is taken to agree.
        if not isinstance(known, dict) or {**info, **known} != info:
            raise ValueError(f"{folder}: made with {known}, asked for {info}; give another folder")
    elif not path.exists() and _holds_frames(folder):
        raise ValueError(
            f"{folder} holds frames that this program did not render; give another folder"
        )
    else:
        xu.write_files({path: json.dumps(info)})

    _write_camera(folder / "camera_info.json", aspect=frame.width / frame.height)
    for leftover in folder.glob(".*.part"):
        leftover.unlink()


def _holds_frames(folder):
    """Whether there are files as of a set, in a folder that this program did not claim."""
    ends = ("*.json", "*.jpg", "*.jpeg", "*.png")
    return any(file for end in ends for file in folder.glob(end))


def _write_camera(path, aspect):
    """Write the camera of frames that are `aspect` times as wide as high."""
    projection = np.array(CAMERA["projection_matrix"]) * [[1], [aspect], [1], [1]]
    camera = CAMERA | {"projection_matrix": projection.tolist()}
    xu.write_files({path: json.dumps(camera, indent=1)})


def _is_complete(folder, name):
    return (folder / f"{name}.jpg").exists() and (folder / f"{name}_mat.json").exists()


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
    """Run joblib's `jobs` on the cores of this machine or on a Dask cluster."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(bar)
        if dask is not None:
            from distributed import Client

            client = stack.enter_context(Client(dask))
            # So that the workers find this file and the project.
            client.run(sys.path.extend, [str(HERE), str(HERE.parent)])
            stack.enter_context(joblib.parallel_config("dask", wait_for_workers_timeout=60))
        for _ in joblib.Parallel(n_jobs=workers, return_as="generator_unordered")(jobs):
            bar.update()


# ---------------------------------------------------------------- command line

KINDS = (
    "random: random poses; shifted: the same poses in another look; looks: the same poses in "
    "scenes; flight: the clip; wild: a faster flight; wide: the clip's flight in 1280x720; staged: "
    "a flight in one of the scenes"
)


def main(arguments: list[str] | None = None):
    """Render the set that the command line asks for."""
    parser = argparse.ArgumentParser(description="Render X-wing frames with known model matrices.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=MAKERS, default="random", help=KINDS)
    parser.add_argument(
        "--mesh", type=Path, default=SHIP, help="a mesh about as large as the X-wing's"
    )
    parser.add_argument("--workers", type=int, default=-1, help="processes; -1 is one a core")
    parser.add_argument(
        "--dask", metavar="ADDRESS", help="use a Dask cluster, e.g. tcp://scheduler:8786"
    )
    parser.add_argument(
        "--video", action="store_true", help="also write FOLDER.mp4 and FOLDER.json, of a flight"
    )
    options = parser.parse_args(arguments)
    try:
        _refuse_committed(options.folder, options.seed, options.kind)
        rendered = render_set(
            options.folder,
            options.count,
            options.seed,
            options.kind,
            options.mesh,
            options.workers,
            dask=options.dask,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"{options.folder}: interrupted; start again to go on\n")
    if options.video:
        write_video(options.folder)
    print(f"{options.folder}: {rendered} frames rendered, {options.count - rendered} kept")


if __name__ == "__main__":
    import render  # by name, so that the worker processes can import what they run

    render.main()
