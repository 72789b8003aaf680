"""Training frames drawn while batches are made: a target in any paint, light and surroundings.

A network that has seen only one paint in soft light learns the paint; it should learn the shape.
The `Synthesiser` draws squares with their true poses, any number of them, in a few milliseconds
each. It shades the target's mesh triangle by triangle in linear light, adds other things, and
passes the result through a camera with faults. The `Randomiser` changes an existing frame. It
multiplies the target's pixels by another paint and light and replaces the background, so the target
keeps the details of its picture. Both know nothing of the target but its mesh. A
`ShapeSynthesiser` draws the target in other shapes too, each with its own keypoints.

Source: Tobin et al. 2017, Domain Randomization for Transferring Deep Neural Networks.
"""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import trimesh
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing import appearance, scenery
from xwing import mesh as meshes

SUPERSAMPLING = 2  # samples per pixel and direction
MIN_DETAIL = 0.1  # samples: triangles whose visible area is smaller from everywhere are not drawn
SHADOW_SIZE = 160  # pixels, width of the shadow map
SHADOW_BIAS = 0.012771  # diameters: see `mesh.sunlit`
# Tame squares are like the rendered frames: true paint, soft light and a night sky.
TAME_FRACTION = 0.3
DISTANCE = 2.1285  # diameters from the camera to the target in the rendered frames
DISTANCES = 1.4900, 2.9799  # diameters, range in most of the squares
FOCAL = 35.0  # mm on a sensor of 36 mm: the lens of the rendered frames


# ============================================================ light and paint


@dataclasses.dataclass(frozen=True)
class Light:
    """Ambient light, a sun with highlights, a second lamp and a bright rim.

    Directions are in the axes of the OpenCV camera.
    """

    sun: np.ndarray  # (3,) unit vector towards it
    ambient: float
    strength: float  # of the sun
    shadows: bool
    shine: float  # grey levels of the brightest highlight
    exponent: float  # the larger it is, the smaller are the highlights
    # (3,) direction of the second lamp times its brightness
    lamp: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3))
    rim: float = 0.0  # brightness of surfaces that are seen edge-on
    # (2, 3) colours of the sun and of all other light
    tints: np.ndarray = dataclasses.field(default_factory=lambda: np.ones((2, 3)))


def random_light(rng: np.random.Generator, tame: bool = False) -> Light:
    """Draw a `Light`: soft where it is tame, otherwise soft or hard with shadows, equally often."""
    sun = _unit(rng.normal(size=3))
    hard = not tame and rng.random() < 0.5
    if tame:
        low, high = (0.75, 0.1), (1.25, 0.5)  # ambient light, sun
    elif hard:
        low, high = (0.15, 0.5), (0.6, 1.8)
    else:
        low, high = (0.25, 0), (1.1, 1.3)
    ambient, strength = rng.uniform(low, high)

    shine = rng.uniform(0, 30 if tame else 150) * (rng.random() < 0.5)
    lamp = rng.normal(size=3) * rng.uniform(0, 0.6) * (not tame and rng.random() < 0.4)
    rim = rng.uniform(0, 1) * (not tame and rng.random() < 0.2)
    tints = np.exp(rng.normal(0, 0.05 if tame else 0.15, (2, 3)))
    exponent = np.exp(rng.uniform(1, 5))
    return Light(sun, ambient, strength, hard, shine, exponent, lamp, rim, tints)


def illuminate(
    triangles: np.ndarray, light: Light, openness: np.ndarray | float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute how much light triangles send to the camera.

    Args:
        triangles: (F, 3, 3) in the OpenCV camera frame, counter-clockwise as the camera sees them.
        light: see `Light`.
        openness: (F,) in [0, 1], the fraction of the ambient light that other parts do not block.

    Returns:
        two factors on the triangles' colours, (F, 3) for all light except the sun's and (F, 3) for
        the sun's; and the sun's highlights (F,) in grey levels.

    Source: Blinn, Models of Light Reflection for Computer Synthesized Pictures, SIGGRAPH 1977.
    """
    a, b, c = np.moveaxis(triangles, 1, 0)
    normals = _unit(np.cross(b - a, c - a))
    views = _unit(-a)
    sun = light.sun.astype(triangles.dtype)

    unoccluded = 1 - appearance.OCCLUSION * (1 - openness)
    facing = np.clip(_dot(normals, views), 0, 1)
    lamp = np.clip(normals @ light.lamp, 0, None)
    soft = light.ambient * unoccluded + lamp + light.rim * (1 - facing) ** 3

    direct = np.clip(normals @ sun, 0, None)
    halfway = _unit(views + sun)
    highlight = np.clip(_dot(normals, halfway), 0, None) ** light.exponent * (direct > 0)

    sunlight = light.strength * direct[:, None] * light.tints[0]
    return soft[:, None] * light.tints[1], sunlight, light.shine * highlight


def _dot(first, second):
    """(F,) dot products of vectors (F, 3)."""
    return np.einsum("fi,fi->f", first, second)


def _unit(vectors):
    """Vectors (..., 3) scaled to length 1; those of length 0 stay as they are."""
    length = np.sqrt(np.einsum("...i,...i->...", vectors, vectors))[..., None]
    return vectors / np.where(length > 0, length, 1)


def random_paint(materials: int, rng: np.random.Generator) -> np.ndarray:
    """Draw factors (materials, 3) on the red, green and blue of each material."""
    brightness = rng.normal(0, 0.3, (materials, 1))
    tint = rng.normal(0, rng.uniform(0, 0.3), (materials, 3))
    return np.exp(brightness + tint)


def random_colours(true: np.ndarray, rng: np.random.Generator, tame: bool = False) -> np.ndarray:
    """Draw colours of materials, from nearly the true ones to arbitrary ones.

    Args:
        true: (M, 3) sRGB colours, 0 to 1.
        rng: its state decides everything.
        tame: stay near the true colours.

    Returns:
        (M, 3) in linear light, 0 to 1.
    """
    count = len(true)
    linear = appearance.to_light(255 * true)
    if tame:
        brightness = rng.normal(0, 0.12, (count, 1))
        tint = rng.normal(0, 0.05, (count, 3))
        return linear * np.exp(brightness + tint)

    kind = rng.random()
    if kind < 0.35:  # the true colours, varied
        return linear * random_paint(count, rng)
    if kind < 0.5:
        return _random_greys(linear, rng)
    if kind < 0.65:  # one colour
        return random_colour(rng) * np.exp(rng.normal(0, rng.choice([0, 0.3]), (count, 1)))

    colours = np.array([random_colour(rng) for _ in range(count)])
    if kind < 0.8:  # each material has its own
        return colours
    return np.where(rng.random((count, 1)) < 0.4, colours, linear)  # some materials are repainted


def _random_greys(linear, rng):
    """Greys (M, 3): those of the colours (M, 3) in linear light, or any."""
    count = len(linear)
    if rng.random() < 0.5:
        grey = linear.mean(1, keepdims=True)
    else:
        grey = rng.uniform(0.02, 0.9, (count, 1))
    return np.repeat(grey * np.exp(rng.normal(0, 0.2, (count, 1))), 3, axis=1)


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """Draw one colour (3,), 0 to 1 in linear light, as often dark as bright."""
    colour = rng.uniform(0, 1) + rng.normal(0, rng.uniform(0, 0.4), 3)
    return appearance.to_light(255 * np.clip(colour, 0.02, 1))


def vary_print(
    ratios: np.ndarray, colours: np.ndarray, rng: np.random.Generator, tame: bool = False
) -> np.ndarray:
    """Vary contrast, saturation and hue of a printed surface.

    Args:
        ratios: (P, 3) float32 of the print's light to that of `colours`.
        colours: (P, 3) float32 in linear light.
        rng: its state decides everything.
        tame: stay near the true print.

    Returns:
        (P, 3) float32 in linear light.
    """
    spread = 0.3 if tame else 1.0
    contrast, saturation = np.exp(rng.normal(0, (0.3, 0.5)) * spread)
    hue = rng.normal(0, 0.4) * spread
    if not tame and rng.random() < 0.15:
        saturation = 0.0
    axis = np.full(3, 3**-0.5)  # of the greys
    grey = np.outer(axis, axis)
    turned = Rotation.from_rotvec(hue * axis).as_matrix() - grey
    light = colours * ratios ** np.float32(contrast)
    return np.maximum(light @ np.float32(grey + saturation * turned).T, 0)


def decorate(colours: np.ndarray, points: np.ndarray, rng: np.random.Generator) -> None:
    """Paint stripes, bands and patches over a surface, and weather it.

    Args:
        colours: (P, 3) float32 of the points; changed in place.
        points: (P, 3) float32 in diameters of the target.
        rng: its state decides everything.
    """
    for _ in range(rng.integers(1, 5)):
        inside = np.ones(len(points), bool)
        for _ in range(rng.integers(1, 3)):
            inside &= _stripes(points, rng)
        colours[inside] = random_colour(rng)

    if rng.random() < 0.5:
        stains = scenery.noise(64, 64, 1, rng.uniform(0.2, 1), rng)[..., 0]
        texture = points @ rng.normal(0, 150, (3, 2)).astype(np.float32)
        column, row = texture.astype(int).T % 64
        colours *= np.exp(rng.uniform(0.1, 0.8) * stains[row, column, None])


def _stripes(points, rng):
    """(P,) bool: which of the points (P, 3) lie in stripes across a random axis."""
    axis = np.eye(3)[rng.integers(3)] if rng.random() < 0.7 else _unit(rng.normal(size=3))
    period = np.exp(rng.uniform(-3.5, 0))
    phase = points @ (axis / period).astype(np.float32) + np.float32(rng.random())
    return phase % 1 < rng.uniform(0.1, 0.5)


# ============================================================ the target


class _Exterior:
    """What can be seen of a mesh from outside, and how light falls on it.

    A side is a triangle as seen from one direction. A triangle of a thin sheet, which is seen from
    both directions, has two `sides`; a triangle inside the mesh has none.

    Args:
        mesh: `xwing.mesh.Mesh`, about its own origin.

    Raises:
        ValueError: more than `mesh.MAX_TRIANGLES`, or vertices that are not finite.
    """

    def __init__(self, mesh):
        if len(mesh.faces) > meshes.MAX_TRIANGLES or not np.isfinite(mesh.vertices).all():
            raise ValueError(
                f"mesh: expected at most {meshes.MAX_TRIANGLES:,} triangles, all finite; got "
                f"{len(mesh.faces):,}, {(~np.isfinite(mesh.vertices)).any(1).sum()} not finite; "
                "simplify it, or export it again"
            )
        self.mesh = mesh
        area, openness = meshes.visibility(mesh.triangles)
        front = np.flatnonzero(area[:, 0])
        back = np.flatnonzero(area[:, 1])
        # For each of S sides: the visible area in square model units, the openness, the material.
        self.area = np.concatenate([area[front, 0], area[back, 1]])
        self.openness = np.concatenate([openness[front, 0], openness[back, 1]])
        self.materials = mesh.face_materials[np.concatenate([front, back])]

        # (S, 3, 3) float32 model units: the sides, counter-clockwise from outside.
        reversed_back = mesh.triangles[back][:, ::-1]
        self.sides = np.float32(np.concatenate([mesh.triangles[front], reversed_back]))
        a, b, c = np.moveaxis(self.sides, 1, 0)
        self.normals = np.cross(b - a, c - a)
        self.offsets = (self.normals * a).sum(1)
        self.middle = (self.sides.min((0, 1)) + self.sides.max((0, 1))) / 2

        self.print = None
        if mesh.textures is not None:
            self.print = appearance.TextureAlbedo(mesh, np.concatenate([front, back]))

        # Small triangles cost time in the shadow map and hardly change it.
        self.occluders = mesh.triangles[meshes.largest_triangles(mesh.triangles, 0.8)]

    def visible_sides(self, pose, scale=np.inf):
        """Rows of the sides that face the camera and are large at `scale` samples a model unit."""
        eye = (-pose[:3, :3].T @ pose[:3, 3]).astype(np.float32)
        facing = self.normals @ eye > self.offsets
        return np.flatnonzero(facing & (self.area * scale**2 > MIN_DETAIL))

    def cast(self, corners, count, light, pose, K, shape):
        """Cast a ray through each sample of a picture.

        Args:
            corners: (F, 3, 3) triangles in camera axes.
            count: the first `count` triangles are sides of this exterior; shadows fall on these
                only.
            light: see `Light`.
            pose: (4, 4) model -> OpenCV camera.
            K: (3, 3) of the picture.
            shape: (height, width) of the picture in samples.

        Returns:
            _Hits.
        """
        height, width = shape
        camera = np.eye(4, dtype=corners.dtype)
        ids, depth = meshes.rasterise(corners, camera, K, width, height, self.mesh.near)
        samples = np.flatnonzero(ids.ravel() >= 0)
        triangles = ids.ravel()[samples]

        row, column = np.divmod(samples, width)
        pixels = np.column_stack([column + 0.5, row + 0.5, np.ones(len(row))]).astype(np.float32)
        rays = pixels @ np.linalg.inv(K).T.astype(np.float32)
        points = rays * depth.ravel()[samples, None]
        points = (points - pose[:3, 3].astype(np.float32)) @ pose[:3, :3].astype(np.float32)

        lit = np.ones((len(samples), 1), bool)
        if light.shadows:
            own = triangles < count
            sun = light.sun @ pose[:3, :3]
            lit[own, 0] = meshes.sunlit(
                self.occluders, points[own], sun, SHADOW_SIZE, SHADOW_BIAS, self.mesh.diameter
            )
        return _Hits(samples, triangles, points, lit)


@dataclasses.dataclass(frozen=True)
class _Hits:
    """Where the P rays of a picture that meet a triangle meet it."""

    samples: np.ndarray  # (P,) index of each ray's sample, counted along the rows of the picture
    triangles: np.ndarray  # (P,) index of the triangle
    points: np.ndarray  # (P, 3) the point in model units
    lit: np.ndarray  # (P, 1) bool: whether the sun reaches that point


# ============================================================ frames that are drawn


class Synthesiser:
    """A function for `synthesise` of `xwing_utils.make_dataset`: draws squares with their poses.

    Args:
        mesh: `xwing.mesh.Mesh`, about its own origin.

    Raises:
        ValueError: more than `mesh.MAX_TRIANGLES`, or vertices that are not finite.
    """

    def __init__(self, mesh: meshes.Mesh):
        self.exterior = _Exterior(mesh)
        self.solids = _random_solids(np.random.default_rng(0))

    def __call__(
        self, size: int, rng: np.random.Generator, frame: int = xu.FRAME_SIZE
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw a square.

        Args:
            size: pixels, width and height.
            rng: its state decides everything.
            frame: pixels, width of the frame that the square is cut from; it may be black beyond.

        Returns:
            image (size, size, 3) uint8, pose (4, 4) model -> OpenCV camera, K (3, 3).
        """
        tame = rng.random() < TAME_FRACTION
        pose, K, outline = self._view(size, frame, rng)
        light = random_light(rng, tame)
        background = scenery.random_background(size, size, rng, tame)
        behind = appearance.to_light(np.arange(256))[background]

        scene = self._draw(pose, K, size, light, rng, tame)
        coverage = scene[..., 3:]
        image = scenery.expose(behind * (1 - coverage) + scene[..., :3], rng, tame)

        if rng.random() < 0.4:
            inside = np.zeros((size, size, 1), np.uint8)
            image *= cv2.fillConvexPoly(inside, outline.astype(np.int32), 1)
        return image, pose, K

    def _view(self, size, frame, rng):
        """Draw a pose, K and the outline (4, 2) of a frame that is zoomed, turned and cut."""
        zoom, turn = rng.uniform((0.7, 0), (1.3, 2 * np.pi)) if rng.random() < 0.6 else (1.0, 0.0)
        K = xu.lens_camera(frame, frame, focal=zoom * FOCAL)
        width = frame * zoom  # pixels, of the zoomed frame

        distance = self.exterior.mesh.diameter * _random_distance(rng)
        furthest = 0.6 if rng.random() < 0.2 else 0.4375  # beyond 0.5 the centre is outside
        offset = rng.uniform(-furthest, furthest, 2) * width  # pixels from the frame's middle
        pose = np.eye(4)
        pose[:3, :3] = Rotation.random(rng=rng).as_matrix()
        pose[:3, 3] = [*(offset / K[0, 0] * distance), distance]

        middle = xu.project_pose([self.exterior.middle], pose, K)[0]
        middle += rng.uniform(-size / 4, size / 4, 2)
        margin = xu.CROP_MARGIN if size < frame and rng.random() < 0.5 else 0
        corner = np.round(middle - size / 2).clip(-margin, max(frame - size, 0) + margin)
        K = xu.crop_camera(K, left=corner[0], top=corner[1])

        outline = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * width / 2
        return pose, K, outline @ scenery.rotation_2d(turn) + K[:2, 2]

    def _draw(self, pose, K, size, light, rng, tame):
        """The target and other things: (size, size, 4), their light times coverage, coverage."""
        exterior = self.exterior
        corners, colours, openness, shown = self._scene(pose, K, size, rng, tame)
        side = SUPERSAMPLING * size
        large = xu.crop_camera(K, scale=SUPERSAMPLING)
        hits = exterior.cast(corners, len(shown), light, pose, large, (side, side))
        colours = colours[hits.triangles]
        if exterior.print is not None:
            own = hits.triangles < len(shown)
            sides = shown[hits.triangles[own]]
            pixel = pose[2, 3] / K[0, 0] * np.exp(rng.uniform(-0.7, 1.5))  # blurred or sharp
            ratios = exterior.print.at(sides, hits.points[own], np.full(len(sides), pixel))
            colours[own] = vary_print(ratios, colours[own], rng, tame)
        elif not tame and rng.random() < 0.4:
            decorate(colours, hits.points / np.float32(exterior.mesh.diameter), rng)

        kinds_of_light = illuminate(corners, light, openness)
        soft, sun, highlight = (np.float32(kind)[hits.triangles] for kind in kinds_of_light)
        sunlight = colours * sun + highlight[:, None] / 255
        scene = np.zeros((side * side, 4), np.float32)
        scene[hits.samples, :3] = colours * soft + hits.lit * sunlight
        scene[hits.samples, 3] = 1
        return cv2.resize(scene.reshape(side, side, 4), (size, size), interpolation=cv2.INTER_AREA)

    def _scene(self, pose, K, size, rng, tame):
        """The target, then other things.

        Returns:
            triangles (F, 3, 3) in camera axes, colours (F, 3) in linear light, openness (F,), and
            the sides of the target that the first triangles are.
        """
        exterior = self.exterior
        shown = exterior.visible_sides(pose, SUPERSAMPLING * K[0, 0] / pose[2, 3])
        rotation = pose[:3, :3].astype(np.float32)
        corners = exterior.sides[shown] @ rotation.T + np.float32(pose[:3, 3])
        paint = self._paint(rng, tame).astype(np.float32)

        parts = [(corners, paint[exterior.materials[shown]], exterior.openness[shown])]
        if not tame and rng.random() < 0.6:
            parts += [self._thing(pose, K, size, rng) for _ in range(rng.integers(1, 7))]
        corners, colours, openness = (np.concatenate(part) for part in zip(*parts))
        return corners, colours, openness, shown

    def _paint(self, rng, tame):
        """Colours (M, 3) of the materials: any, or under a print the true ones, varied."""
        colours = self.exterior.mesh.colours
        if self.exterior.print is None:
            return random_colours(colours, rng, tame)
        return appearance.to_light(255 * colours) * random_paint(len(colours), rng)

    def _thing(self, pose, K, size, rng):
        """A solid or a part of the target, before or behind it, as triangles.

        Returns:
            corners (F, 3, 3) in camera axes, colours (F, 3) in linear light, openness (F,).
        """
        distance = pose[2, 3]
        radius = self.exterior.mesh.diameter / 2
        behind = rng.random() < 0.65
        scale = radius * np.exp(rng.uniform(-1.8, 0.6 if behind else -0.7))
        depth = distance + radius + scale * rng.uniform(1, 6)
        if not behind:
            depth = distance * rng.uniform(0.4, 0.7)

        solid = self.solids[rng.integers(len(self.solids))]
        triangles, groups = self._part(rng) if rng.random() < 0.35 else solid
        # Scaled by its depth, it looks as large as at the target's distance. It must not reach the
        # camera.
        largest = min(scale * depth / distance, 0.8 * depth)
        stretch = np.diag(np.exp(rng.uniform(-1, 0, 3)) * largest)
        pixel = rng.uniform(-0.2 * size, 1.2 * size, 2)
        centre = np.linalg.inv(K) @ [*pixel, 1] * depth
        corners = triangles @ stretch @ Rotation.random(rng=rng).as_matrix() + centre

        shown = meshes.front_facing_triangles(corners, np.eye(4))
        true = np.resize(self.exterior.mesh.colours, (groups.max() + 1, 3))
        paint = random_colours(true, rng)
        return np.float32(corners[shown]), np.float32(paint[groups[shown]]), np.ones(shown.sum())

    def _part(self, rng):
        """Up to a third of the target's sides: triangles in the unit ball, and their materials."""
        sides = self.exterior.sides
        first_corners = sides[:, 0]
        seed = first_corners[rng.integers(len(sides))]
        order = np.argsort(np.linalg.norm(first_corners - seed, axis=1))
        near = order[: int(len(sides) * rng.uniform(0.05, 0.33)) + 1]

        part = sides[near] - first_corners[near].mean(0)
        radius = np.linalg.norm(part, axis=-1).max()
        return part / max(radius, 1e-9 * self.exterior.mesh.diameter), self.exterior.materials[near]


class ShapeSynthesiser:
    """A function for `synthesise` of `make_dataset`: squares of a target in several shapes.

    Args:
        first: draws the target's own shape.
        target: the target.
        shapes: meshes and targets of the other shapes, see `read_shapes`.
        share: fraction of the squares that show another shape, each equally often. With 0 the
            squares are those of `first`.

    Raises:
        ValueError: a share outside [0, 1], or no shapes for it.
    """

    def __init__(
        self,
        first: Synthesiser,
        target: xu.Target,
        shapes: list[tuple[meshes.Mesh, xu.Target]],
        share: float,
    ):
        if not 0 <= share <= 1 or (share and not shapes):
            expected = "expected 0 to 1, and shapes to draw unless it is 0"
            raise ValueError(f"share: {expected}; got {share:g} and {len(shapes)} shapes")
        self.first = first, target
        self.others = [(Synthesiser(mesh), other) for mesh, other in shapes]
        self.share = share

    def __call__(
        self, size: int, rng: np.random.Generator, frame: int = xu.FRAME_SIZE
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, xu.Target]:
        """Draw a square.

        Args:
            size: pixels, width and height.
            rng: its state decides everything.
            frame: pixels, see `Synthesiser`.

        Returns:
            image (size, size, 3) uint8, pose (4, 4) model -> OpenCV camera, K (3, 3), and the
            target that is drawn, whose keypoints follow its shape.
        """
        synthesiser, target = self.first
        if self.share and rng.random() < self.share:
            synthesiser, target = self.others[rng.integers(len(self.others))]
        return *synthesiser(size, rng, frame), target


def read_shapes(folder: str | Path, target: xu.Target) -> list[tuple[meshes.Mesh, xu.Target]]:
    """Read a target's other shapes, such as those that `data/make_xwing.py` writes.

    Args:
        folder: holds a JSON file for each shape, as `xwing_utils.load_target` reads them.
        target: the shapes must have its keypoints, by name and in the same order.

    Returns:
        a list of meshes and targets, in the order of the files' names.

    Raises:
        FileNotFoundError: no JSON file in the folder.
        ValueError: a shape with other keypoints, and as `load_target`.
    """
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no JSON files of shapes; see data/make_xwing.py")
    shapes = [xu.load_target(path) for path in paths]
    for path, shape in zip(paths, shapes):
        if shape.names != target.names:
            expected = f"expected the {len(target.names)} keypoints of {target.name}"
            raise ValueError(f"{path}: {expected}, got {len(shape.names)} or others")
    return [(meshes.load_mesh(shape.mesh), shape) for shape in shapes]


def _random_distance(rng):
    """Draw the distance to the target in diameters, often that of the rendered frames."""
    distance = DISTANCE if rng.random() < 0.3 else rng.uniform(*DISTANCES)
    return distance * (rng.uniform(1.3, 3) if rng.random() < 0.12 else 1.0)


def _random_solids(rng):
    """Convex solids in the unit ball: the triangles (F, 3, 3) of each, and their groups (F,).

    Two solids are cubes, two are cylinders, one is nearly a ball and eight are irregular. Triangles
    of a group have the same colour.
    """
    cube = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    angles = np.arange(12) * np.pi / 6
    cylinder = np.array([(np.cos(a), np.sin(a), z) for a in angles for z in (-1, 1)])
    ball = _unit(rng.normal(size=(120, 3)))
    clouds = [cube, cube, cylinder, cylinder, ball]
    clouds += [rng.normal(size=(rng.integers(4, 14), 3)) for _ in range(8)]

    solids = []
    for cloud in clouds:
        points = cloud / np.linalg.norm(cloud, axis=1).max()
        # Qt: flat faces are cut into triangles. The triangles run counter-clockwise from outside.
        triangles = trimesh.convex.convex_hull(points, qhull_options="Qt").triangles
        solids.append((np.array(triangles), np.arange(len(triangles)) // 2 % 5))
    return solids


# ============================================================ frames that are changed


class Randomiser:
    """A function for `randomise` of `xwing_utils.make_dataset`: other paint, light, background.

    Args:
        mesh: `xwing.mesh.Mesh`, about its own origin.

    Raises:
        ValueError: more than `mesh.MAX_TRIANGLES`, or vertices that are not finite.
    """

    def __init__(self, mesh: meshes.Mesh):
        self.exterior = _Exterior(mesh)

    def __call__(
        self, image: np.ndarray, pose: np.ndarray, K: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Give the target in a frame another paint, light and background.

        Args:
            image: (H, W, 3) uint8.
            pose: (4, 4) model -> OpenCV camera, the frame's truth.
            K: (3, 3) of the frame.
            rng: its state decides everything that is random.

        Returns:
            (H, W, 3) uint8.
        """
        height, width = image.shape[:2]
        paint = random_paint(len(self.exterior.mesh.colours), rng)
        light = random_light(rng)
        result = scenery.random_background(width, height, rng)
        edge = rng.uniform(0, 0.5)

        left, top, right, bottom = self._window(pose, K, width, height)
        if left >= right or top >= bottom:
            return result

        window = slice(top, bottom), slice(left, right)
        K = xu.crop_camera(K, left, top, SUPERSAMPLING)
        size = right - left, bottom - top
        factors, coverage, highlight = self._factors(pose, K, size, paint, light)

        target = (image[window] * factors + highlight) / np.maximum(coverage, 1e-3)
        # Pixels at the edge hold some of the old background: little coverage counts as none.
        coverage = np.clip((coverage - edge) / (1 - edge), 0, 1)
        mixed = coverage * target + (1 - coverage) * result[window]
        result[window] = np.clip(mixed, 0, 255)
        return result

    def _window(self, pose, K, width, height):
        """left, top, right, bottom of the pixels that may show the target."""
        pixels = xu.project_pose(self.exterior.mesh.vertices, pose, K)
        if np.isnan(pixels).any():  # it reaches behind the camera
            return 0, 0, width, height
        left, top = np.floor(pixels.min(0)).clip(0).astype(int)
        right, bottom = np.ceil(pixels.max(0)).clip(None, (width, height)).astype(int)
        return left, top, right, bottom

    def _factors(self, pose, K, size, paint, light):
        """What turns a window's old pixels into new ones.

        Args:
            pose: (4, 4) model -> OpenCV camera.
            K: (3, 3) of the window, supersampled.
            size: (width, height) of the window in pixels.
            paint: (M, 3) factors on the colours of the materials.
            light: see `Light`.

        Returns:
            factors on red, green and blue times coverage (h, w, 3), coverage by the target
            (h, w, 1), and highlights to add (h, w, 1) in grey levels; float32.
        """
        width, height = size
        shape = SUPERSAMPLING * height, SUPERSAMPLING * width
        shown = self.exterior.visible_sides(pose)
        corners = self.exterior.sides[shown] @ pose[:3, :3].T + pose[:3, 3]
        hits = self.exterior.cast(corners, len(shown), light, pose, K, shape)

        soft, sun, highlight = illuminate(corners, light)
        paint = paint[self.exterior.materials[shown]]
        layers = np.zeros((shape[0] * shape[1], 5), np.float32)
        sunlight = hits.lit * (paint * sun)[hits.triangles]
        layers[hits.samples, :3] = (paint * soft)[hits.triangles] + sunlight
        layers[hits.samples, 3] = 1
        layers[hits.samples, 4] = hits.lit[:, 0] * highlight[hits.triangles]

        layers = cv2.resize(layers.reshape(*shape, 5), size, interpolation=cv2.INTER_AREA)
        return layers[..., :3], layers[..., 3:4], layers[..., 4:]
