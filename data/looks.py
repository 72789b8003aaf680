"""Scenes of the set `data/looks/`: a painted ship in a place among other things.

In the other sets the ship is rendered alone and laid over a sky. Here one ray-traced scene holds
everything. The ship has textured paint (camouflage, stripes, rust, checks, panels) on plastic,
metal, primer or lacquer. Around it is a desert, a hangar, a cloudy sky, a studio or a field of
rocks, with coloured spotlights, suns and lamps. Things are behind the ship and now and then one is
in front of it. The picture can be out of focus or blurred by motion, and it has noise, a vignette
and its own exposure. The other sets share only the mesh and the distribution of the poses.

A scene is a function of one random generator, so the order of the draws is part of the committed
set: a draw that is moved, added or left out changes every frame.
"""

import colorsys
import copy
import functools
from collections.abc import Callable

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

SAMPLES = 12  # rays a pixel
TEXELS = 128  # side of a paint's texture
UV_LENGTH = 0.345  # model units over which a texture repeats once: the length of the ship
CAMERA = np.array([0, 0, 1.0])  # the camera's position in world axes; it looks down -z


# ---------------------------------------------------------------- paint


def noise(
    rng: np.random.Generator,
    size: int,
    cells: int = 4,
    octaves: int = 5,
    roughness: float = 0.55,
) -> np.ndarray:
    """Draw fractal noise in [0, 1], (size, size).

    It is the sum of random grids, each twice as fine as the one before.

    Args:
        rng: the scene's random generator.
        size: width and height of the result.
        cells: width and height of the coarsest grid.
        octaves: number of grids.
        roughness: weight of a grid relative to the one before.
    """
    total = 0
    for octave in range(octaves):
        side = cells * 2**octave
        grid = cv2.resize(rng.random((side, side)), (size, size), interpolation=cv2.INTER_CUBIC)
        total = total + roughness**octave * grid
    return (total - total.min()) / np.ptp(total)


def colour(
    rng: np.random.Generator,
    saturation: tuple = (0.3, 0.95),
    value: tuple = (0.15, 0.85),
    hue: tuple = (0, 1),
) -> np.ndarray:
    """Draw a linear RGB colour (3,) whose hue, saturation and value are between (low, high)."""
    hsv = [rng.uniform(*limits) for limits in (hue, saturation, value)]
    return np.array(colorsys.hsv_to_rgb(*hsv)) ** 2.2


def base_colours(rng: np.random.Generator, true: np.ndarray) -> np.ndarray:
    """Draw (M, 3) linear colours for the materials whose own colours are `true`."""
    count = len(true)
    scheme = rng.choice(["true", "primer", "one", "toy", "each"], p=[0.3, 0.2, 0.15, 0.2, 0.15])

    if scheme == "true":
        return true * np.exp(rng.normal(0, 0.12, (count, 1)))

    if scheme == "primer":
        greys = rng.uniform(0.08, 0.7) * np.exp(rng.normal(0, 0.15, (count, 1)))
        return np.repeat(greys, 3, 1)

    if scheme == "one":
        return colour(rng) * np.exp(rng.normal(0, 0.2, (count, 1)))

    if scheme == "toy":  # a few bright plastics
        bright = [colour(rng, (0.6, 1.0), (0.5, 1.0)) for _ in range(3)]
        palette = np.array([*bright, [0.8, 0.8, 0.8]])
        return palette[rng.integers(0, 4, count)]

    return np.array([colour(rng, (0, 0.9), (0.1, 1.0)) for _ in true])


PATTERNS = {  # name -> probability
    "plain": 0.32,
    "camouflage": 0.16,
    "stripes": 0.12,
    "checks": 0.08,
    "rust": 0.16,
    "panels": 0.16,
}


def masks(rng: np.random.Generator, pattern: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw where a pattern's first and second colour lie: two (TEXELS, TEXELS) arrays in [0, 1]."""
    y, x = np.mgrid[:TEXELS, :TEXELS] / TEXELS
    nowhere = np.zeros_like(x)

    if pattern == "camouflage":
        return _blotches(rng), _blotches(rng)

    if pattern == "stripes":
        angle = rng.uniform(0, np.pi)
        bands = rng.integers(3, 12)
        across = x * np.cos(angle) + y * np.sin(angle)
        wave = np.sin(2 * np.pi * bands * across)
        return np.clip(wave * 8 - 4, 0, 1), nowhere

    if pattern == "checks":
        cells = rng.integers(4, 14)
        return ((x * cells).astype(int) + (y * cells).astype(int)) % 2.0, nowhere

    if pattern == "rust":
        stain = noise(rng, TEXELS, 4, 6, 0.7)
        patches = np.clip((stain - rng.uniform(0.45, 0.65)) * 6, 0, 1)
        return patches, noise(rng, TEXELS, 24, 3) ** 6

    if pattern == "panels":
        plates = cv2.resize(rng.random((20, 20)), (TEXELS, TEXELS), interpolation=cv2.INTER_NEAREST)
        seams = np.maximum(x * 10 % 1 > 0.94, y * 10 % 1 > 0.94)
        return plates * 0.7, seams * 0.6

    dirt = noise(rng, TEXELS, 8, 5)  # plain paint is a little dirty
    return nowhere, dirt * rng.uniform(0, 0.3)


def _blotches(rng):
    """The mask (TEXELS, TEXELS) of one colour of a camouflage."""
    stain = noise(rng, TEXELS, 5, 3)
    return np.clip((stain - rng.uniform(0.5, 0.6)) * 40, 0, 1)


def paint(rng: np.random.Generator, true: np.ndarray) -> np.ndarray:
    """Draw linear textures (M, TEXELS, TEXELS, 3) for materials whose own colours are `true`."""
    pattern = rng.choice(list(PATTERNS), p=list(PATTERNS.values()))
    first, second = masks(rng, pattern)
    first_ink, second_ink = _inks(rng, pattern)

    textures = np.tile(base_colours(rng, true)[:, None, None], (1, TEXELS, TEXELS, 1))
    textures += first[..., None] * (first_ink - textures)
    textures += second[..., None] * (second_ink - textures)
    return np.clip(textures, 0.004, 0.9)


def _inks(rng, pattern):
    """The linear colours, (3,), of a pattern's two masks."""
    brown = np.array([0.22, 0.07, 0.02]) * rng.uniform(0.5, 1.6)
    # These are drawn for every pattern, also where they are not used.
    any_colour = colour(rng)
    any_other_colour = colour(rng)

    if pattern == "rust":
        return brown, brown * 0.2
    if pattern == "panels":
        return np.full(3, 0.05), np.full(3, 0.01)
    if pattern == "plain":
        return np.zeros(3), np.full(3, 0.03)
    return any_colour, any_other_colour


# ---------------------------------------------------------------- ship


def texture(mi, image: np.ndarray, scale: float = 1.0) -> dict:
    """Return a Mitsuba texture of linear values (H, W, 3), repeated `scale` times a unit of uv."""
    return {
        "type": "bitmap",
        "bitmap": mi.Bitmap(np.ascontiguousarray(image, np.float32)),
        "raw": True,
        "to_uv": mi.ScalarTransform4f().scale(float(scale)),
    }


FINISHES = {  # name -> probability
    "primer": 0.2,
    "plastic": 0.3,
    "lacquer": 0.2,
    "satin": 0.15,
    "metal": 0.15,
}


def surface(rng: np.random.Generator) -> Callable[[dict], dict]:
    """Draw one finish for a whole ship: a function from a texture to a Mitsuba material."""
    finish = rng.choice(list(FINISHES), p=list(FINISHES.values()))
    roughness = float(rng.uniform(0.05, 0.4))
    return functools.partial(_material, finish, roughness)


def _material(finish, roughness, paint):
    """The Mitsuba material of a finish, whose colour is the texture `paint`."""
    if finish == "primer":
        bsdf = {"type": "diffuse", "reflectance": paint}
    elif finish == "plastic":
        bsdf = {
            "type": "roughplastic",
            "alpha": roughness,
            "diffuse_reflectance": paint,
            "nonlinear": True,
        }
    elif finish == "lacquer":
        bsdf = {
            "type": "principled",
            "base_color": paint,
            "roughness": 0.3 + roughness,
            "clearcoat": 1.0,
            "clearcoat_gloss": 1 - roughness,
        }
    elif finish == "satin":
        bsdf = {
            "type": "principled",
            "base_color": paint,
            "roughness": 0.3 + roughness,
            "sheen": 0.8,
            "metallic": 0.4,
        }
    else:
        bsdf = {"type": "roughconductor", "alpha": 0.15 + roughness, "specular_reflectance": paint}
    return {"type": "twosided", "bsdf": bsdf}


def ship(mi, mesh, matrix: np.ndarray, textures: np.ndarray, finish, scale: float) -> dict:
    """Return the mesh at a pose as Mitsuba shapes, one for each material.

    Args:
        mi: Mitsuba with a variant set.
        mesh: the ship, an `xwing.mesh.Mesh`.
        matrix: (4, 4) model matrix.
        textures: (M, H, W, 3) linear, one for each material.
        finish: a function from a texture to a Mitsuba material, see `surface`.
        scale: how often the textures repeat over UV_LENGTH.
    """
    shapes = {}
    for material, name in enumerate(mesh.names):
        triangles = mesh.triangles[mesh.face_materials == material]  # (T, 3, 3)
        positions = triangles.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3]

        properties = mi.Properties()
        properties["bsdf"] = mi.load_dict(finish(texture(mi, textures[material], scale)))
        properties["face_normals"] = True
        shape = mi.Mesh(
            name, 3 * len(triangles), len(triangles), has_vertex_texcoords=True, props=properties
        )
        parameters = mi.traverse(shape)
        parameters["vertex_positions"] = positions.ravel()
        parameters["vertex_texcoords"] = _texture_coordinates(triangles).ravel()
        parameters["faces"] = np.arange(3 * len(triangles), dtype=np.uint32)
        parameters.update()
        shapes[f"ship_{name}"] = shape
    return shapes


def _texture_coordinates(triangles):
    """The uv (T, 3, 2) of triangles (T, 3, 3), each projected along the axis that it faces most."""
    first, second, third = triangles.transpose(1, 0, 2)
    normals = np.abs(np.cross(second - first, third - first))
    axes = np.array([[1, 2], [0, 2], [0, 1]])[normals.argmax(1)]
    return np.take_along_axis(triangles, np.repeat(axes[:, None], 3, 1), 2) / UV_LENGTH


# ---------------------------------------------------------------- places

PLACES = {  # name -> probability; `Place` has a method of each name
    "desert": 0.25,
    "hangar": 0.2,
    "clouds": 0.18,
    "studio": 0.17,
    "rocks": 0.2,
}


class Place:
    """The surroundings of the ship, as `shapes` for Mitsuba.

    The origin of the place is the ship, and its y axis points up.
    """

    def __init__(self, mi, rng: np.random.Generator, position: np.ndarray, kind: str | None = None):
        """Draw the surroundings of a ship.

        Args:
            mi: Mitsuba with a variant set.
            rng: the scene's random generator.
            position: (3,) the ship's position in world axes.
            kind: one of PLACES; None draws it.
        """
        self.mi = mi
        self.rng = rng

        degrees = [rng.uniform(0, 360), rng.uniform(-10, 45), rng.normal(0, 20)]
        to_world = Rotation.from_euler("yxz", degrees, degrees=True).as_matrix()
        self.turn = to_world.T  # (3, 3) world axes -> the place's
        self.eye = self.turn @ (CAMERA - position)  # (3,) the camera, in the place
        self.world = np.eye(4)  # (4, 4) place -> world
        self.world[:3, :3] = to_world
        self.world[:3, 3] = position

        self.shapes = {}
        drawn = rng.choice(list(PLACES), p=list(PLACES.values()))  # also where a kind is given
        build = getattr(self, kind or drawn)  # the method of that name
        build()

    # ------------------------------------------------------------ the five places

    def desert(self):
        """Sand, or any floor, with dunes or boulders, under a sky and a sun."""
        rng = self.rng
        sand = self.coat(16, rng.uniform(4, 24))
        depth = self.ground(sand, rng.uniform(0.3, 1.0))

        for _ in range(rng.integers(0, 10)):
            x, z = rng.choice([-1, 1], 2) * rng.uniform(0.6, 5, 2)
            width = rng.uniform(0.2, 1.2)
            height = rng.uniform(0.05, 0.5)
            if rng.random() < 0.7:
                self._dune(x, z, width, height, depth)
            else:
                self._boulder(x, z, width, height, depth)

        self.surroundings(self.sky(rng.uniform(0, 0.7)))
        self.sun(1.0, 3.5)

    def _dune(self, x, z, width, height, depth):
        """Add the cap of a ball, unless it would come near the line from the camera to the ship."""
        radius = 2 * width
        centre = np.array([x, (height - radius) - depth, z])
        if segment_distance(centre, self.eye) > radius + 0.2:
            self.put("sphere", placed(radius, centre), self.coat(4))

    def _boulder(self, x, z, width, height, depth):
        """Add a box, unless it would come near the line from the camera to the ship."""
        centre = np.array([x, -depth, z])
        if segment_distance(centre, self.eye) > max(width, height) + 0.2:
            self.put("cube", placed([width / 2, height, width / 2], centre), self.coat(4))

    def hangar(self):
        """A box with beams and crates, lamps at its ceiling and spotlights."""
        rng = self.rng
        half = np.maximum(rng.uniform(0.8, 2.5, 3), np.abs(self.eye) + 0.2)
        self.put("cube", placed(half, np.zeros(3)), self.coat(6, rng.uniform(1, 5)))

        for _ in range(rng.integers(4, 16)):
            x, z = rng.choice([-1, 1], 2) * rng.uniform(0.3, 1, 2) * half[[0, 2]]
            if segment_distance(np.array([x, 0, z]), self.eye * [1, 0, 1]) < 0.45:
                continue
            if rng.random() < 0.5:
                self._beam(x, z, half[1])
            else:
                size = rng.uniform(0.08, 0.3, 3)  # of a crate on the floor
                self.put("cube", placed(size, [x, size[1] - half[1], z]), self.coat())

        for _ in range(rng.integers(1, 4)):
            self._lamp(half)
        self.spots(rng.integers(0, 3), 0.7 * half.min())

    def _beam(self, x, z, half_height):
        """Add a vertical cylinder from the floor to the ceiling."""
        bsdf = self.coat()
        radius = self.rng.uniform(0.04, 0.1)
        ends = {"p0": [x, -half_height, z], "p1": [x, half_height, z]}
        self.put("cylinder", np.eye(4), bsdf, **ends, radius=radius)

    def _lamp(self, half):
        """Add a glowing square under the ceiling of a hangar with the half-sizes (3,)."""
        x, z = self.rng.uniform(-0.7, 0.7, 2) * half[[0, 2]]
        size = self.rng.uniform(0.15, 0.5)
        radiance = colour(self.rng, (0, 0.4), (0.9, 1)) * self.rng.uniform(4, 12)
        facing_down = [[size, 0, 0, x], [0, 0, -1, half[1] - 0.02], [0, size, 0, z], [0, 0, 0, 1]]
        self.put("rectangle", facing_down, emitter={"type": "area", "radiance": rgb(radiance)})

    def clouds(self):
        """High up in an overcast or broken sky."""
        self.surroundings(self.sky(self.rng.uniform(0.4, 0.9)))
        self.sun(0.3, 3.0)

    def studio(self):
        """A table or a plain cloth, soft boxes around it and coloured spotlights."""
        rng = self.rng
        rows = 64
        room = np.full((rows, 2 * rows, 3), colour(rng, (0, 0.7), (0.3, 0.9)))
        for _ in range(rng.integers(1, 5)):
            top = rng.integers(2, rows // 2)
            left = rng.integers(0, 2 * rows - 20)
            bottom = top + rng.integers(4, 16)
            right = left + rng.integers(4, 20)
            glow = colour(rng, (0, 0.3), (0.9, 1)) * rng.uniform(3, 15)
            room[top:bottom, left:right] = glow
        self.surroundings(room)

        if rng.random() < 0.6:
            cloth = self.coat(3, rng.uniform(2, 30))
            self.ground(cloth, rng.uniform(0.25, 0.5))
        self.spots(rng.integers(0, 3), 1.5)

    def rocks(self):
        """Boulders and balls that drift in a coloured haze, and a hard sun."""
        rng = self.rng
        density = noise(rng, 128, 3, 6, 0.6)[..., None] ** 2
        haze = density * colour(rng, (0, 0.8), (0.4, 1)) * 0.8 + 0.05
        self.surroundings(mirrored(haze))

        for _ in range(rng.integers(4, 25)):
            centre = rng.normal(size=3) * 2.5
            size = rng.uniform(0.08, 0.5)
            clear_of_the_ship = np.linalg.norm(centre) > size + 0.45
            if clear_of_the_ship and segment_distance(centre, self.eye) > size + 0.3:
                self.thing(centre, size, ["sphere", "cube"])

        self.sun(1.0, 4.0)
        self.spots(rng.integers(0, 2), 1.5)

    # ------------------------------------------------------------ things

    def put(self, kind: str, transform, bsdf: dict | None = None, **more):
        """Add a primitive.

        Args:
            kind: Mitsuba's name of the primitive.
            transform: (4, 4) from the primitive's axes to the place's.
            bsdf: its material.
            **more: its other parameters.
        """
        material = {} if bsdf is None else {"bsdf": {"type": "twosided", "bsdf": bsdf}}
        self.shapes[f"thing_{len(self.shapes)}"] = {
            "type": kind,
            "to_world": self.mi.ScalarTransform4f(self.world @ transform),
            **material,
            **more,
        }

    def coat(self, cells: int = 8, scale: float = 1.0) -> dict:
        """Draw a material of two colours, mixed by noise (from a grid of `cells`) or by checks."""
        rng = self.rng
        first = colour(rng, (0, 0.6), (0.25, 0.9))
        second = colour(rng, (0, 0.6), (0.25, 0.9))
        if rng.random() < 0.25:
            mask, _ = masks(rng, "checks")
        else:
            mask = noise(rng, 256, cells, 5, 0.65)

        image = first + mask[..., None] * (second - first) * rng.uniform(0.3, 1)
        return {"type": "diffuse", "reflectance": texture(self.mi, image, scale)}

    def thing(self, centre: np.ndarray, size: float, kinds: list[str]):
        """Add a ball, box or rod at a point (3,), rotated at random.

        Args:
            centre: (3,) in the place.
            size: about its radius, model units.
            kinds: Mitsuba's names of the primitives to choose from.
        """
        rng = self.rng
        kind = rng.choice(kinds)
        scale = size if kind == "sphere" else size * rng.uniform(0.5, 1, 3)
        turned = placed(scale, centre)
        turned[:3, :3] = Rotation.random(rng=rng).as_matrix() @ turned[:3, :3]

        if kind == "cylinder":
            p0, p1 = centre + np.outer([-2, 2], turned[:3, 0])
            ends = {"p0": list(p0), "p1": list(p1)}
            self.put(kind, np.eye(4), self.coat(4), **ends, radius=0.5 * size)
        else:
            self.put(kind, turned, self.coat(4))

    def add_occluder(self, distance: float):
        """Now and then add a small thing between the camera and an edge of the ship.

        Args:
            distance: from the camera to the ship in model units.
        """
        rng = self.rng
        if rng.random() < 0.2:
            fraction = rng.uniform(0.4, 0.75)  # of the way from the camera to the ship
            angle = rng.uniform(0, 2 * np.pi)
            edge = self.turn @ [np.cos(angle), np.sin(angle), 0] * 0.12
            size = rng.uniform(0.01, 0.035) * distance
            centre = (1 - fraction) * self.eye + fraction * edge
            self.thing(centre, size, ["sphere", "cube", "cylinder"])

    def ground(self, bsdf: dict, depth: float) -> float:
        """Add a plane `depth` below the ship, or lower so that the camera is above it.

        Args:
            bsdf: its material.
            depth: model units.

        Returns:
            The depth at which it lies.
        """
        depth = max(depth, 0.15 - self.eye[1])
        flat = [[12, 0, 0, 0], [0, 0, 12, -depth], [0, -12, 0, 0], [0, 0, 0, 1]]
        self.put("rectangle", flat, bsdf)
        return depth

    # ------------------------------------------------------------ light and sky

    def sun(self, low: float, high: float):
        """Add a hard light from above, warm or cold, of a strength between the limits."""
        towards = self.rng.normal(size=3) * [1, 0.4, 1] + [0, 1, 0] + 0.5 * self.eye
        warmth = self.rng.normal(0, 0.12) * np.array([1, 0, -1])
        light = np.exp(warmth) * self.rng.uniform(low, high)
        self.shapes["sun"] = {
            "type": "directional",
            "direction": list(-self.turn.T @ towards),
            "irradiance": rgb(light),
        }

    def surroundings(self, image: np.ndarray):
        """Add an environment map (H, 2 H, 3), linear; its first row is the zenith."""
        self.shapes["around"] = {
            "type": "envmap",
            "bitmap": self.mi.Bitmap(np.ascontiguousarray(image, np.float32)),
            "to_world": self.mi.ScalarTransform4f(self.world),
        }

    def spots(self, count: int, reach: float):
        """Add coloured spotlights at the distance `reach` from the ship, aimed at it."""
        position = self.world[:3, 3]
        for k in range(count):
            direction = self.rng.normal(size=3) + 0.8 * self.eye / np.linalg.norm(self.eye)
            direction *= [1, np.sign(direction[1]) or 1, 1]
            origin = self.turn.T @ (direction / np.linalg.norm(direction) * reach) + position
            power = colour(self.rng, (0, 0.6), (0.9, 1.0)) * reach**2 * self.rng.uniform(2, 6)
            self.shapes[f"spot_{k}"] = {
                "type": "spot",
                "intensity": rgb(power),
                "cutoff_angle": float(self.rng.uniform(15, 40)),
                "to_world": self.mi.ScalarTransform4f().look_at(
                    origin=list(origin), target=list(position), up=[0.1, 1, 0.2]
                ),
            }

    def sky(self, coverage: float) -> np.ndarray:
        """Draw a sky, (256, 512, 3) linear.

        It is a gradient from horizon to zenith, with clouds over a fraction of about `coverage`.
        """
        rng = self.rng
        rows = 256
        height = np.linspace(1, -1, rows)[:, None, None]

        zenith_hue = (0.5, 0.7) if rng.random() < 0.7 else (0, 1)
        zenith = colour(rng, (0.2, 0.8), (0.3, 0.9), zenith_hue)
        horizon_hue = (0.02, 0.15) if rng.random() < 0.5 else (0.5, 0.65)
        horizon = colour(rng, (0, 0.4), (0.6, 1), horizon_hue)
        above = horizon + (zenith - horizon) * np.clip(height, 0, 1) ** 0.6
        below = horizon * rng.uniform(0.2, 0.9)
        clear = np.where(height > 0, above, below)

        clouds = np.clip((noise(rng, rows, 6, 6) - 1 + coverage) * 4, 0, 1)[..., None]
        brightness = rng.uniform(0.4, 1)
        puffs = brightness * (0.4 + 0.6 * noise(rng, rows, 12, 4))[..., None]
        return mirrored(clear * (1 - clouds) + puffs * clouds)


def mirrored(half: np.ndarray) -> np.ndarray:
    """Return half a panorama (H, W, 3) beside its mirror image, so that its ends meet."""
    return np.concatenate([half, half[:, ::-1]], 1)


def placed(scale, centre) -> np.ndarray:
    """Return the (4, 4) matrix that scales, by one number or (3,), then moves to `centre`."""
    matrix = np.diag([*np.broadcast_to(scale, 3), 1.0])
    matrix[:3, 3] = centre
    return matrix


def rgb(values) -> dict:
    """Return Mitsuba's description of a linear colour (3,)."""
    return {"type": "rgb", "value": [float(v) for v in values]}


def segment_distance(point: np.ndarray, end: np.ndarray) -> float:
    """Return the distance from a point to the segment from the origin to `end`."""
    nearest = np.clip(point @ end / (end @ end), 0, 1) * end
    return np.linalg.norm(point - nearest)


# ---------------------------------------------------------------- camera


def exposures(
    mi, mesh, matrix: np.ndarray, rng: np.random.Generator, size: int, fov: float
) -> np.ndarray:
    """Draw a scene and ray-trace it.

    Args:
        mi: Mitsuba with a variant set.
        mesh: the ship, an `xwing.mesh.Mesh`.
        matrix: (4, 4) model matrix of the ship at the middle of the exposure.
        rng: the scene's random generator.
        size: width and height in pixels.
        fov: horizontal field of view in degrees.

    Returns:
        (size, size, 3) linear light. Where things move it is the mean of several instants. In a
        hangar with several lamps Mitsuba's noise differs from run to run, even with one seed.
    """
    textures = paint(rng, np.clip(mesh.colours, 0, 1) ** 2.2)
    finish = surface(rng)
    scale = rng.uniform(1, 3)
    position = matrix[:3, 3]
    place = Place(mi, rng, position)
    distance = np.linalg.norm(CAMERA - position)
    place.add_occluder(distance)

    lens = _lens(rng, distance)
    instants = 6 if rng.random() < 0.25 else 1
    drift = rng.normal(size=3) * [0.012, 0.012, 0] * distance  # model units during the exposure
    spin = rng.normal(size=3) * 0.02  # radians during the exposure
    seed = int(rng.integers(2**31))

    sensor = _sensor(mi, lens, size, fov, SAMPLES // instants)
    total = 0
    times = (np.arange(instants) + 0.5) / instants - 0.5  # a single instant is time 0
    for k, time in enumerate(times):
        moved = matrix.copy()
        moved[:3, :3] = Rotation.from_rotvec(spin * time).as_matrix() @ matrix[:3, :3]
        moved[:3, 3] += drift * time
        scene = mi.load_dict(
            {
                "type": "scene",
                "integrator": {"type": "path", "max_depth": 3},
                "sensor": sensor,
                **place.shapes,
                **ship(mi, mesh, moved, textures, finish, scale),
            }
        )
        rendered = mi.render(scene, spp=SAMPLES // instants, seed=seed + k)
        total = total + np.array(rendered, dtype=float)
    return total / instants


def _lens(rng, distance):
    """Mitsuba's pinhole or, in 35 % of the scenes, a lens with a limited depth of field."""
    if rng.random() >= 0.35:
        return {"type": "perspective"}
    return {
        "type": "thinlens",
        "aperture_radius": rng.uniform(0.004, 0.02),
        "focus_distance": distance * rng.uniform(0.8, 1.25),
    }


def _sensor(mi, lens, size, fov, samples):
    """Mitsuba's camera at CAMERA; its own axes have x to the left and z forward."""
    to_world = mi.ScalarTransform4f([[-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 1], [0, 0, 0, 1]])
    return {
        **lens,
        "fov": fov,
        "fov_axis": "x",
        "near_clip": 0.01,
        "to_world": to_world,
        "film": {"type": "hdrfilm", "width": size, "height": size, "rfilter": {"type": "box"}},
        "sampler": {"type": "multijitter", "sample_count": samples},
    }


def develop(
    linear: np.ndarray,
    pixels: np.ndarray,
    rng: np.random.Generator,
    grain_rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Expose a frame for some of its pixels, then add the faults of a cheap camera.

    Args:
        linear: (H, H, 3) linear light.
        pixels: (N, 2) row, column of the pixels to expose for; none: all of them.
        rng: the scene's random generator.
        grain_rng: of the grain of this frame, where the scene has many; None takes `rng`.

    Returns:
        (H, H, 3) uint8 RGB.
    """
    size = len(linear)
    brightness = linear.mean(2)
    light = brightness[pixels[:, 0], pixels[:, 1]] if len(pixels) else brightness.ravel()
    for_the_pixels = rng.uniform(0.16, 0.36) / max(np.median(light), 1e-4)
    for_the_frame = 0.5 / max(linear.mean(), 1e-4)
    gain = min(for_the_pixels, for_the_frame)
    gain *= 2 ** rng.normal(0, 0.4)

    image = linear * gain * np.exp(rng.normal(0, 0.08, 3))  # white balance
    if rng.random() < 0.25:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.2))

    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    vignette = 1 - rng.uniform(0, 0.3) * (x**2 + y**2)[..., None]
    image = image * vignette

    grain_rng = rng if grain_rng is None else grain_rng
    colour_noise = grain_rng.normal(size=image.shape) * rng.uniform(0.2, 1)
    grain = colour_noise + grain_rng.normal(size=(size, size, 1))
    image = np.clip(image, 0, 1) ** (rng.uniform(0.85, 1.15) / 2.2)
    image = image + grain * rng.uniform(0, 0.025)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def looks_image(
    mi, mesh, matrix: np.ndarray, rng: np.random.Generator, size: int, focal: float
) -> tuple[np.ndarray, int]:
    """Draw a frame of the ship in a scene.

    Args:
        mi: Mitsuba with a variant set.
        mesh: the ship, an `xwing.mesh.Mesh`.
        matrix: (4, 4) model matrix.
        rng: the scene's random generator.
        size: width and height in pixels.
        focal: focal length in half frame widths.

    Returns:
        (size, size, 3) uint8 RGB, and the quality with which it is to be compressed as a JPEG.
    """
    fov = float(np.degrees(2 * np.arctan(1 / focal)))
    linear = exposures(mi, mesh, matrix, rng, size, fov)

    # The pixels [row, column] of the ship's vertices: the frame is exposed for them.
    x, y, z = (mesh.vertices @ matrix[:3, :3].T + matrix[:3, 3] - CAMERA).T
    rows = (1 + focal * y / z) / 2 * size
    columns = (1 - focal * x / z) / 2 * size
    pixels = np.stack([rows, columns], 1).astype(int)
    seen = pixels[((pixels >= 0) & (pixels < size)).all(1)]

    image = develop(linear, seen, rng)
    return image, int(rng.integers(60, 96))


# ---------------------------------------------------------------- flights


class Stage:
    """A place and a paint for a whole flight; the camera stands still.

    What is behind the ship is rendered once. A frame then needs rays only where the ship is, so the
    ship casts no shadow on its surroundings, but they light it and are mirrored in it.
    """

    def __init__(self, mi, mesh, seed: int, size: int, focal: float):
        """Draw the place and the paint.

        Args:
            mi: Mitsuba with a variant set.
            mesh: the ship, an `xwing.mesh.Mesh`.
            seed: of the scene's random generator.
            size: width and height in pixels.
            focal: focal length in half frame widths.
        """
        self.mi, self.mesh, self.seed, self.size, self.focal = mi, mesh, seed, size, focal
        rng = np.random.default_rng(seed)
        self.textures = paint(rng, np.clip(mesh.colours, 0, 1) ** 2.2)
        self.finish = surface(rng)
        self.scale = rng.uniform(1, 3)
        self.place = Place(mi, rng, np.zeros(3))
        self.camera = rng.spawn(1)[0]  # of the faults of the camera, the same in all frames
        self.behind = self._render({}, (0, 0, size, size), 99, seed)

    def image(self, matrix: np.ndarray, index: int) -> np.ndarray:
        """Return frame `index` of the flight, the ship at a pose: (size, size, 3) uint8 RGB."""
        linear = self.behind.copy()
        mask = self._silhouette(matrix)
        rows, columns = np.nonzero(mask)
        if len(rows):
            crop = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            shapes = ship(self.mi, self.mesh, matrix, self.textures, self.finish, self.scale)
            front = self._render(shapes, crop, SAMPLES, self.seed + index + 1)
            window = np.s_[crop[1] : crop[3], crop[0] : crop[2]]
            linear[window] = np.where(mask[window][..., None], front, linear[window])

        grain = np.random.default_rng([self.seed, index])
        whole_frame = np.zeros((0, 2), int)
        return develop(linear, whole_frame, copy.deepcopy(self.camera), grain)

    def _render(self, shapes, crop, samples, seed):
        """Ray-trace a rectangle (left, top, right, bottom) of the place and what is in it."""
        left, top, right, bottom = (int(edge) for edge in crop)
        fov = float(np.degrees(2 * np.arctan(1 / self.focal)))
        sensor = _sensor(self.mi, {"type": "perspective"}, self.size, fov, samples)
        sensor["film"] |= {
            "crop_offset_x": left,
            "crop_offset_y": top,
            "crop_width": right - left,
            "crop_height": bottom - top,
        }
        scene = self.mi.load_dict(
            {
                "type": "scene",
                "integrator": {"type": "path", "max_depth": 3},
                "sensor": sensor,
                **self.place.shapes,
                **shapes,
            }
        )
        return np.array(self.mi.render(scene, spp=samples, seed=seed), dtype=float)

    def _silhouette(self, matrix):
        """Whether the ship touches a pixel: (size, size), a pixel too many around it."""
        corners = self.mesh.triangles @ matrix[:3, :3].T + matrix[:3, 3] - CAMERA
        x, y, z = np.moveaxis(corners, -1, 0)
        pixels = np.stack([1 - self.focal * x / z, 1 + self.focal * y / z], -1) / 2 * self.size
        mask = np.zeros((self.size, self.size), np.uint8)
        for triangle in np.floor(pixels).astype(np.int32):
            cv2.fillConvexPoly(mask, triangle, 1)
        return cv2.dilate(mask, np.ones((3, 3))) > 0
