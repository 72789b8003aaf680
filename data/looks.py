"""Scenes for the frames that are looked at once: a painted ship between things, in a place, before a camera.

The other sets show a ship cut out and laid over a sky. Here one ray-traced scene holds everything: the
ship with textured paint (camouflage, stripes, rust, checks, panels) on plastic, metal, primer or lacquer; a
desert, a hangar, a cloudy sky, a studio or a field of rocks round it; coloured spots, suns and lamps; things
behind it and now and then one before it; a lens that defocuses, a shutter that stays open, exposure, noise
and a vignette. Nothing but the mesh and the way poses are drawn is shared with the other sets.
"""

import colorsys

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

SAMPLES = 12  # rays a pixel
TEXELS = 128  # side of a paint's texture
CAMERA = np.array([0, 0, 1.0])  # the eye in world axes; it looks down -z


# ---------------------------------------------------------------- paint


def noise(rng, size, cells=4, octaves=5, roughness=0.55):
    """Fractal noise in [0, 1], (size, size): random grids, each twice as fine as the one before, added up."""
    total = sum(
        roughness**k
        * cv2.resize(
            rng.random((cells * 2**k, cells * 2**k)), (size, size), interpolation=cv2.INTER_CUBIC
        )
        for k in range(octaves)
    )
    return (total - total.min()) / np.ptp(total)


def colour(rng, saturation=(0.3, 0.95), value=(0.15, 0.85), hue=(0, 1)):
    """A random linear RGB colour, (3,)."""
    hsv = [rng.uniform(*limits) for limits in (hue, saturation, value)]
    return np.array(colorsys.hsv_to_rgb(*hsv)) ** 2.2


def base_colours(rng, true):
    """(M, 3) linear colours for the materials whose own are `true`."""
    count = len(true)
    scheme = rng.choice(["true", "primer", "one", "toy", "each"], p=[0.3, 0.2, 0.15, 0.2, 0.15])
    if scheme == "true":
        return true * np.exp(rng.normal(0, 0.12, (count, 1)))
    if scheme == "primer":
        return np.repeat(rng.uniform(0.08, 0.7) * np.exp(rng.normal(0, 0.15, (count, 1))), 3, 1)
    if scheme == "one":
        return colour(rng) * np.exp(rng.normal(0, 0.2, (count, 1)))
    if scheme == "toy":  # a few bright plastics
        palette = np.array(
            [colour(rng, (0.6, 1.0), (0.5, 1.0)) for _ in range(3)] + [[0.8, 0.8, 0.8]]
        )
        return palette[rng.integers(0, 4, count)]
    return np.array([colour(rng, (0, 0.9), (0.1, 1.0)) for _ in true])


def masks(rng, pattern):
    """Where a pattern's first and second colour lie: two (TEXELS, TEXELS) arrays in [0, 1]."""
    y, x = np.mgrid[:TEXELS, :TEXELS] / TEXELS
    if pattern == "camouflage":
        return [
            np.clip((noise(rng, TEXELS, 5, 3) - rng.uniform(0.5, 0.6)) * 40, 0, 1) for _ in "ab"
        ]
    if pattern == "stripes":
        angle, bands = rng.uniform(0, np.pi), rng.integers(3, 12)
        wave = np.sin(2 * np.pi * bands * (x * np.cos(angle) + y * np.sin(angle)))
        return [np.clip(wave * 8 - 4, 0, 1), np.zeros_like(x)]
    if pattern == "checks":
        cells = rng.integers(4, 14)
        return [((x * cells).astype(int) + (y * cells).astype(int)) % 2.0, np.zeros_like(x)]
    if pattern == "rust":
        stain = noise(rng, TEXELS, 4, 6, 0.7)
        return [
            np.clip((stain - rng.uniform(0.45, 0.65)) * 6, 0, 1),
            noise(rng, TEXELS, 24, 3) ** 6,
        ]
    if pattern == "panels":
        plates = cv2.resize(rng.random((20, 20)), (TEXELS, TEXELS), interpolation=cv2.INTER_NEAREST)
        return [plates * 0.7, np.maximum(x * 10 % 1 > 0.94, y * 10 % 1 > 0.94) * 0.6]
    return [
        np.zeros_like(x),
        noise(rng, TEXELS, 8, 5) * rng.uniform(0, 0.3),
    ]  # plain, a little dirty


def paint(rng, true):
    """(M, TEXELS, TEXELS, 3) linear textures, one a material."""
    pattern = rng.choice(
        ["plain", "camouflage", "stripes", "checks", "rust", "panels"],
        p=[0.32, 0.16, 0.12, 0.08, 0.16, 0.16],
    )
    first, second = masks(rng, pattern)
    brown = np.array([0.22, 0.07, 0.02]) * rng.uniform(0.5, 1.6)
    inks = {
        "rust": (brown, brown * 0.2),
        "panels": (np.full(3, 0.05), np.full(3, 0.01)),
        "plain": (np.zeros(3), np.full(3, 0.03)),
    }.get(pattern, (colour(rng), colour(rng)))
    textures = np.tile(base_colours(rng, true)[:, None, None], (1, TEXELS, TEXELS, 1))
    for mask, ink in zip((first, second), inks):
        textures += mask[..., None] * (ink - textures)
    return np.clip(textures, 0.004, 0.9)


def texture(mi, image, scale=1.0):
    """A Mitsuba texture of linear values, (H, W, 3), repeated `scale` times over a unit of uv."""
    return {
        "type": "bitmap",
        "bitmap": mi.Bitmap(np.ascontiguousarray(image, np.float32)),
        "raw": True,
        "to_uv": mi.ScalarTransform4f().scale(float(scale)),
    }


def surface(rng):
    """One finish for all of a ship's paints: a function from a texture to a Mitsuba material."""
    kind = rng.choice(
        ["primer", "plastic", "lacquer", "satin", "metal"], p=[0.2, 0.3, 0.2, 0.15, 0.15]
    )
    rough = float(rng.uniform(0.05, 0.4))
    finish = {
        "primer": lambda t: {"type": "diffuse", "reflectance": t},
        "plastic": lambda t: {
            "type": "roughplastic",
            "alpha": rough,
            "diffuse_reflectance": t,
            "nonlinear": True,
        },
        "lacquer": lambda t: {
            "type": "principled",
            "base_color": t,
            "roughness": 0.3 + rough,
            "clearcoat": 1.0,
            "clearcoat_gloss": 1 - rough,
        },
        "satin": lambda t: {
            "type": "principled",
            "base_color": t,
            "roughness": 0.3 + rough,
            "sheen": 0.8,
            "metallic": 0.4,
        },
        "metal": lambda t: {
            "type": "roughconductor",
            "alpha": 0.15 + rough,
            "specular_reflectance": t,
        },
    }[kind]
    return lambda t: {"type": "twosided", "bsdf": finish(t)}


def ship(mi, mesh, matrix, textures, finish, scale):
    """The mesh at its pose, (4, 4): a Mitsuba mesh a material, its uv taken along the flattest model axis."""
    shapes = {}
    for material, name in enumerate(mesh.names):
        triangles = mesh.triangles[mesh.face_materials == material]  # (T, 3, 3)
        normals = np.abs(
            np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
        )
        axes = np.array([[1, 2], [0, 2], [0, 1]])[normals.argmax(1)]
        uv = np.take_along_axis(triangles, np.repeat(axes[:, None], 3, 1), 2) / 0.345
        properties = mi.Properties()
        properties["bsdf"] = mi.load_dict(finish(texture(mi, textures[material], scale)))
        properties["face_normals"] = True
        shape = mi.Mesh(
            name, 3 * len(triangles), len(triangles), has_vertex_texcoords=True, props=properties
        )
        parameters = mi.traverse(shape)
        parameters["vertex_positions"] = (
            triangles.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3]
        ).ravel()
        parameters["vertex_texcoords"] = uv.ravel()
        parameters["faces"] = np.arange(3 * len(triangles), dtype=np.uint32)
        parameters.update()
        shapes[f"ship_{name}"] = shape
    return shapes


# ---------------------------------------------------------------- places


class Place:
    """What is round the ship: `shapes` for Mitsuba; the place's y is up, its origin is the ship."""

    def __init__(self, mi, rng, position, kind=None):
        self.mi, self.rng = mi, rng
        turn = Rotation.from_euler(
            "yxz", [rng.uniform(0, 360), rng.uniform(-10, 45), rng.normal(0, 20)], degrees=True
        )
        self.turn = turn.as_matrix().T  # camera axes -> the place's
        self.eye = self.turn @ (CAMERA - position)
        self.world = np.eye(4)  # place -> world
        self.world[:3, :3], self.world[:3, 3] = self.turn.T, position
        self.shapes = {}
        drawn = rng.choice(
            ["desert", "hangar", "clouds", "studio", "rocks"], p=[0.25, 0.2, 0.18, 0.17, 0.2]
        )
        getattr(self, kind or drawn)()

    def put(self, kind, transform, bsdf=None, **more):
        """Add a primitive; `transform` is (4, 4), the primitive's axes -> the place's."""
        bsdf = {} if bsdf is None else {"bsdf": {"type": "twosided", "bsdf": bsdf}}
        self.shapes[f"thing_{len(self.shapes)}"] = {
            "type": kind,
            "to_world": self.mi.ScalarTransform4f(self.world @ transform),
            **bsdf,
            **more,
        }

    def coat(self, cells=8, scale=1.0, saturation=(0, 0.6)):
        """A material of two colours mixed by noise, or of checks."""
        rng, pair = self.rng, [colour(self.rng, saturation, (0.25, 0.9)) for _ in "ab"]
        mask = masks(rng, "checks")[0] if rng.random() < 0.25 else noise(rng, 256, cells, 5, 0.65)
        image = pair[0] + mask[..., None] * (pair[1] - pair[0]) * rng.uniform(0.3, 1)
        return {"type": "diffuse", "reflectance": texture(self.mi, image, scale)}

    def sun(self, low, high):
        """A hard light from above, of a warm or cold colour."""
        towards = self.rng.normal(size=3) * [1, 0.4, 1] + [0, 1, 0] + 0.5 * self.eye
        tint = np.exp(self.rng.normal(0, 0.12) * np.array([1, 0, -1])) * self.rng.uniform(low, high)
        self.shapes["sun"] = {
            "type": "directional",
            "direction": list(-self.turn.T @ towards),
            "irradiance": rgb(tint),
        }

    def surroundings(self, image):
        """Light and picture from all round: a (H, 2 H, 3) map, the zenith in its first row."""
        self.shapes["around"] = {
            "type": "envmap",
            "bitmap": self.mi.Bitmap(np.ascontiguousarray(image, np.float32)),
            "to_world": self.mi.ScalarTransform4f(self.world),
        }

    def spots(self, count, reach):
        """Coloured spotlights at up to `reach` from the ship, aimed at it."""
        for k in range(count):
            direction = self.rng.normal(size=3) + 0.8 * self.eye / np.linalg.norm(self.eye)
            direction *= [1, np.sign(direction[1]) or 1, 1]
            origin = (
                self.turn.T @ (direction / np.linalg.norm(direction) * reach) + self.world[:3, 3]
            )
            power = colour(self.rng, (0, 0.6), (0.9, 1.0)) * reach**2 * self.rng.uniform(2, 6)
            self.shapes[f"spot_{k}"] = {
                "type": "spot",
                "intensity": rgb(power),
                "cutoff_angle": float(self.rng.uniform(15, 40)),
                "to_world": self.mi.ScalarTransform4f().look_at(
                    origin=list(origin), target=list(self.world[:3, 3]), up=[0.1, 1, 0.2]
                ),
            }

    def sky(self, cover, rows=256):
        """(rows, 2 rows, 3) linear: a gradient from horizon to zenith, with clouds over a share of it."""
        rng, height = self.rng, np.linspace(1, -1, rows)[:, None, None]
        zenith = colour(rng, (0.2, 0.8), (0.3, 0.9), (0.5, 0.7) if rng.random() < 0.7 else (0, 1))
        horizon = colour(
            rng, (0, 0.4), (0.6, 1), (0.02, 0.15) if rng.random() < 0.5 else (0.5, 0.65)
        )
        clear = np.where(
            height > 0,
            horizon + (zenith - horizon) * np.clip(height, 0, 1) ** 0.6,
            horizon * rng.uniform(0.2, 0.9),
        )
        clouds = np.clip((noise(rng, rows, 6, 6) - 1 + cover) * 4, 0, 1)[..., None]
        puffs = rng.uniform(0.4, 1) * (0.4 + 0.6 * noise(rng, rows, 12, 4))[..., None]
        half = clear * (1 - clouds) + puffs * clouds
        return np.concatenate([half, half[:, ::-1]], 1)  # mirrored, so that the edges meet

    def ground(self, bsdf, depth):
        """A plane `depth` below the ship, or lower where the eye would be under it."""
        depth = max(depth, 0.15 - self.eye[1])
        self.put(
            "rectangle", [[12, 0, 0, 0], [0, 0, 12, -depth], [0, -12, 0, 0], [0, 0, 0, 1]], bsdf
        )
        return depth

    def desert(self):
        """Sand, or any floor, with dunes or boulders, under a sky and a sun."""
        rng = self.rng
        depth = self.ground(self.coat(16, rng.uniform(4, 24)), rng.uniform(0.3, 1.0))
        for _ in range(rng.integers(0, 10)):
            x, z = rng.choice([-1, 1], 2) * rng.uniform(0.6, 5, 2)
            width, height = rng.uniform(0.2, 1.2), rng.uniform(0.05, 0.5)
            ball = rng.random() < 0.7  # a dune is the cap of a ball
            centre = np.array([x, (height - 2 * width if ball else 0) - depth, z])
            if (
                segment_distance(centre, self.eye)
                > (2 * width if ball else max(width, height)) + 0.2
            ):
                size = 2 * width if ball else [width / 2, height, width / 2]
                self.put("sphere" if ball else "cube", placed(size, centre), self.coat(4))
        self.surroundings(self.sky(rng.uniform(0, 0.7)))
        self.sun(1.0, 3.5)

    def hangar(self):
        """A box with beams and crates, lamps at its ceiling and spots."""
        rng = self.rng
        half = np.maximum(rng.uniform(0.8, 2.5, 3), np.abs(self.eye) + 0.2)
        self.put("cube", placed(half, np.zeros(3)), self.coat(6, rng.uniform(1, 5)))
        for _ in range(rng.integers(4, 16)):
            x, z = rng.choice([-1, 1], 2) * rng.uniform(0.3, 1, 2) * half[[0, 2]]
            if segment_distance(np.array([x, 0, z]), self.eye * [1, 0, 1]) < 0.45:
                continue
            if rng.random() < 0.5:
                self.put(
                    "cylinder",
                    np.eye(4),
                    self.coat(),
                    p0=[x, -half[1], z],
                    p1=[x, half[1], z],
                    radius=rng.uniform(0.04, 0.1),
                )
            else:
                size = rng.uniform(0.08, 0.3, 3)
                self.put("cube", placed(size, [x, size[1] - half[1], z]), self.coat())
        for _ in range(rng.integers(1, 4)):
            x, z = rng.uniform(-0.7, 0.7, 2) * half[[0, 2]]
            size, glow = (
                rng.uniform(0.15, 0.5),
                colour(rng, (0, 0.4), (0.9, 1)) * rng.uniform(4, 12),
            )
            lamp = [[size, 0, 0, x], [0, 0, -1, half[1] - 0.02], [0, size, 0, z], [0, 0, 0, 1]]
            self.put("rectangle", lamp, emitter={"type": "area", "radiance": rgb(glow)})
        self.spots(rng.integers(0, 3), 0.7 * half.min())

    def clouds(self):
        """High up in an overcast or broken sky."""
        self.surroundings(self.sky(self.rng.uniform(0.4, 0.9)))
        self.sun(0.3, 3.0)

    def studio(self):
        """A table or a plain cloth, soft boxes round it and coloured spots."""
        rng, rows = self.rng, 64
        room = np.full((rows, 2 * rows, 3), colour(rng, (0, 0.7), (0.3, 0.9)))
        for _ in range(rng.integers(1, 5)):
            top, left = rng.integers(2, rows // 2), rng.integers(0, 2 * rows - 20)
            box = slice(top, top + rng.integers(4, 16)), slice(left, left + rng.integers(4, 20))
            room[box] = colour(rng, (0, 0.3), (0.9, 1)) * rng.uniform(3, 15)
        self.surroundings(room)
        if rng.random() < 0.6:
            self.ground(self.coat(3, rng.uniform(2, 30)), rng.uniform(0.25, 0.5))
        self.spots(rng.integers(0, 3), 1.5)

    def rocks(self):
        """Boulders and balls drifting in a coloured haze, a hard sun."""
        rng = self.rng
        haze = (
            noise(rng, 128, 3, 6, 0.6)[..., None] ** 2 * colour(rng, (0, 0.8), (0.4, 1)) * 0.8
            + 0.05
        )
        self.surroundings(np.concatenate([haze, haze[:, ::-1]], 1))
        for _ in range(rng.integers(4, 25)):
            centre, size = rng.normal(size=3) * 2.5, rng.uniform(0.08, 0.5)
            if (
                np.linalg.norm(centre) > size + 0.45
                and segment_distance(centre, self.eye) > size + 0.3
            ):
                self.thing(centre, size, ["sphere", "cube"])
        self.sun(1.0, 4.0)
        self.spots(rng.integers(0, 2), 1.5)

    def thing(self, centre, size, kinds):
        """A ball, box or rod of about that radius, turned at random."""
        rng, kind = self.rng, self.rng.choice(kinds)
        turned = placed(size if kind == "sphere" else size * rng.uniform(0.5, 1, 3), centre)
        turned[:3, :3] = Rotation.random(rng=rng).as_matrix() @ turned[:3, :3]
        if kind == "cylinder":
            ends = centre + np.outer([-2, 2], turned[:3, 0])
            self.put(
                kind, np.eye(4), self.coat(4), p0=list(ends[0]), p1=list(ends[1]), radius=0.5 * size
            )
        else:
            self.put(kind, turned, self.coat(4))

    def before(self, distance):
        """Now and then a small thing between the eye and an edge of the ship."""
        if self.rng.random() < 0.2:
            share, angle = self.rng.uniform(0.4, 0.75), self.rng.uniform(0, 2 * np.pi)
            aside = self.turn @ [np.cos(angle), np.sin(angle), 0] * 0.12
            size = self.rng.uniform(0.01, 0.035) * distance
            self.thing((1 - share) * self.eye + share * aside, size, ["sphere", "cube", "cylinder"])


def placed(scale, centre):
    """(4, 4): scale, then move."""
    matrix = np.diag([*np.broadcast_to(scale, 3), 1.0])
    matrix[:3, 3] = centre
    return matrix


def rgb(values):
    return {"type": "rgb", "value": [float(v) for v in values]}


def segment_distance(point, end):
    """Distance from a point to the segment from the origin to `end`."""
    nearest = np.clip(point @ end / (end @ end), 0, 1) * end
    return np.linalg.norm(point - nearest)


# ---------------------------------------------------------------- camera


def exposures(mi, mesh, matrix, rng, size, fov):
    """Ray-trace the scene: (H, W, 3) linear, the mean of several instants where the ship or the eye moves."""
    textures, finish, scale = paint(rng, mesh_linear(mesh)), surface(rng), rng.uniform(1, 3)
    position = matrix[:3, 3]
    place = Place(mi, rng, position)
    distance = np.linalg.norm(CAMERA - position)
    place.before(distance)
    lens = {"type": "perspective"}
    if rng.random() < 0.35:
        lens = {
            "type": "thinlens",
            "aperture_radius": rng.uniform(0.004, 0.02),
            "focus_distance": distance * rng.uniform(0.8, 1.25),
        }
    instants = 6 if rng.random() < 0.25 else 1
    drift = rng.normal(size=3) * [0.012, 0.012, 0] * distance
    spin, seed = rng.normal(size=3) * 0.02, int(rng.integers(2**31))
    film = {"type": "hdrfilm", "width": size, "height": size, "rfilter": {"type": "box"}}
    view = mi.ScalarTransform4f([[-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 1], [0, 0, 0, 1]])
    sensor = {
        **lens,
        "fov": fov,
        "fov_axis": "x",
        "near_clip": 0.01,
        "to_world": view,
        "film": film,
        "sampler": {"type": "multijitter", "sample_count": SAMPLES // instants},
    }
    total = 0
    for k, time in enumerate((np.arange(instants) + 0.5) / instants - 0.5):  # one instant is time 0
        moved = matrix.copy()
        moved[:3, :3] = Rotation.from_rotvec(spin * time).as_matrix() @ matrix[:3, :3]
        moved[:3, 3] += drift * time
        things = {**place.shapes, **ship(mi, mesh, moved, textures, finish, scale)}
        scene = mi.load_dict(
            {
                "type": "scene",
                "integrator": {"type": "path", "max_depth": 3},
                "sensor": sensor,
                **things,
            }
        )
        total = total + np.array(
            mi.render(scene, spp=SAMPLES // instants, seed=seed + k), dtype=float
        )
    return total / instants


def mesh_linear(mesh):
    """(M, 3) linear colours of a mesh's materials."""
    return np.clip(mesh.colours, 0, 1) ** 2.2


def develop(linear, spots, rng):
    """(H, W, 3) uint8: exposed for the pixels `spots` (N, 2) row, column, then what a cheap camera does."""
    size = len(linear)
    light = linear[spots[:, 0], spots[:, 1]].mean(1) if len(spots) else linear.mean(2).ravel()
    gain = min(
        rng.uniform(0.16, 0.36) / max(np.median(light), 1e-4), 0.5 / max(linear.mean(), 1e-4)
    )
    gain *= 2 ** rng.normal(0, 0.4)
    image = linear * gain * np.exp(rng.normal(0, 0.08, 3))
    if rng.random() < 0.25:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.2))
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    image = image * (1 - rng.uniform(0, 0.3) * (x**2 + y**2)[..., None])
    grain = rng.normal(size=image.shape) * rng.uniform(0.2, 1) + rng.normal(size=(size, size, 1))
    image = np.clip(image, 0, 1) ** (rng.uniform(0.85, 1.15) / 2.2)
    image = image + grain * rng.uniform(0, 0.025)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def looks_image(mi, mesh, matrix, rng, size, focal):
    """A frame of the ship at `matrix` in a scene drawn from `rng`: ((size, size, 3) uint8 RGB, JPEG quality).

    `mi` is Mitsuba with a variant set; `focal` is the focal length in half frame widths.
    """
    linear = exposures(mi, mesh, matrix, rng, size, float(np.degrees(2 * np.arctan(1 / focal))))
    x, y, z = (mesh.vertices @ matrix[:3, :3].T + matrix[:3, 3] - CAMERA).T
    pixels = np.stack([(1 + focal * y / z) / 2 * size, (1 - focal * x / z) / 2 * size], 1).astype(
        int
    )
    seen = pixels[((pixels >= 0) & (pixels < size)).all(1)]
    return develop(linear, seen, rng), int(rng.integers(60, 96))
