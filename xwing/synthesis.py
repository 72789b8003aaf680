"""Frames made while batches are made: the ship in any paint and light, before and behind anything.

A network that has seen one paint in soft light learns the paint; it should learn the shape. The `Synthesiser`
draws squares with their truth, endlessly and in a few milliseconds: its mesh, shaded triangle by triangle in
linear light, among other things, through a camera with faults. The `Randomiser` does less to a frame that is
there: it multiplies the ship's pixels by another paint and light and replaces all that is not ship, so that
the ship keeps the details of its picture. Neither knows more of the ship than its mesh.

Source: Tobin et al. 2017, Domain Randomization for Transferring Deep Neural Networks.
"""

import dataclasses

import cv2
import numpy as np
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing import appearance, scenery
from xwing import mesh as meshes

SUPERSAMPLING = 2  # samples per pixel and direction
MIN_DETAIL = 0.1  # samples: triangles that show less wherever they are seen from are not drawn
SHADOW_SIZE, SHADOW_BIAS = 160, 0.006  # pixels of the shadow map, model units: see `sunlit`
MAX_TRIANGLES = 200_000  # of a mesh: more take too long for training
TAME_SHARE = 0.3  # of the synthetic squares: true paint, soft light and a night sky, like the rendered frames


# ============================================================ light and paint


@dataclasses.dataclass(frozen=True)
class Light:
    """Ambient light, a sun and its highlights, a second lamp, and a bright rim; directions in camera axes."""

    sun: np.ndarray  # (3,) unit vector towards it
    ambient: float
    strength: float
    shadows: bool
    shine: float  # grey levels of the brightest highlight
    exponent: float  # the larger, the smaller the highlights
    lamp: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros(3)
    )  # (3,) as long as it is bright
    rim: float = 0.0
    tints: np.ndarray = dataclasses.field(
        default_factory=lambda: np.ones((2, 3))
    )  # of the sun, of the rest


def random_light(rng, tame=False):
    """Draw a `Light`: soft, or (half of those that are not tame) hard with shadows; some have highlights."""
    sun, hard = rng.normal(size=3), not tame and rng.random() < 0.5
    limits = ((0.15, 0.5), (0.6, 1.8)) if hard else ((0.25, 0), (1.1, 1.3))
    ambient, strength = rng.uniform(*((0.75, 0.1), (1.25, 0.5)) if tame else limits)
    shine = rng.uniform(0, 30 if tame else 150) * (rng.random() < 0.5)
    lamp = rng.normal(size=3) * rng.uniform(0, 0.6) * (not tame and rng.random() < 0.4)
    rim = rng.uniform(0, 1) * (not tame and rng.random() < 0.2)
    tints = np.exp(rng.normal(0, 0.05 if tame else 0.15, (2, 3)))
    exponent = np.exp(rng.uniform(1, 5))
    return Light(_unit(sun), ambient, strength, hard, shine, exponent, lamp, rim, tints)


def illuminate(triangles, light, openness=1.0):
    """What reaches the camera from triangles (F, 3, 3) in its frame, counter-clockwise as it sees them.

    Returns:
        factors on their colours, (F, 3) of all but the sun and (F, 3) of the sun, and the sun's highlights
        (F,) in grey levels. Of the light from all round, `openness` (F,) in [0, 1] reaches them.
    Source: Blinn, Models of Light Reflection for Computer Synthesized Pictures, SIGGRAPH 1977.
    """
    a, b, c = np.moveaxis(triangles, 1, 0)
    normals, views = _unit(np.cross(b - a, c - a)), _unit(-a)
    halfway = _unit(views + light.sun.astype(a.dtype))
    direct = np.clip(normals @ light.sun.astype(a.dtype), 0, None)
    soft = light.ambient * (1 - appearance.OCCLUSION * (1 - openness)) + np.clip(
        normals @ light.lamp, 0, None
    )
    soft = soft + light.rim * (1 - np.clip(np.einsum("fi,fi->f", normals, views), 0, 1)) ** 3
    highlight = np.clip(np.einsum("fi,fi->f", normals, halfway), 0, None) ** light.exponent * (
        direct > 0
    )
    sun = light.strength * direct[:, None] * light.tints[0]
    return soft[:, None] * light.tints[1], sun, light.shine * highlight


def _unit(vectors):
    return vectors / (np.sqrt(np.einsum("...i,...i->...", vectors, vectors))[..., None] + 1e-12)


def random_paint(materials, rng):
    """Draw a factor on the red, green and blue of each material: (materials, 3)."""
    return np.exp(
        rng.normal(0, 0.3, (materials, 1)) + rng.normal(0, rng.uniform(0, 0.3), (materials, 3))
    )


def random_colours(true, rng, tame=False):
    """Draw the colours (M, 3) of materials, 0 to 1, in linear light: from their true ones to any."""
    count, kind = len(true), 0.0 if tame else rng.random()
    linear = appearance.to_light(255 * true)
    if tame:
        return linear * np.exp(rng.normal(0, 0.12, (count, 1)) + rng.normal(0, 0.05, (count, 3)))
    if kind < 0.35:  # the true colours varied
        return linear * random_paint(count, rng)
    if kind < 0.5:  # grey
        grey = (
            linear.mean(1, keepdims=True)
            if rng.random() < 0.5
            else rng.uniform(0.02, 0.9, (count, 1))
        )
        return np.repeat(grey * np.exp(rng.normal(0, 0.2, (count, 1))), 3, axis=1)
    if kind < 0.65:  # one colour
        return random_colour(rng) * np.exp(rng.normal(0, rng.choice([0, 0.3]), (count, 1)))
    colours = np.array([random_colour(rng) for _ in range(count)])
    if kind < 0.8:  # every material its own
        return colours
    return np.where(rng.random((count, 1)) < 0.4, colours, linear)  # some repainted


def random_colour(rng):
    """Draw one colour (3,), 0 to 1 in linear light, as often dark as bright."""
    return appearance.to_light(
        255 * np.clip(rng.uniform(0, 1) + rng.normal(0, rng.uniform(0, 0.4), 3), 0.02, 1)
    )


def decorate(colours, points, rng):
    """Paint stripes, bands and patches over colours (P, 3) at points (P, 3), and weather them; in place."""
    for _ in range(rng.integers(1, 5)):
        inside = np.ones(len(points), bool)
        for _ in range(rng.integers(1, 3)):
            axis = np.eye(3)[rng.integers(3)] if rng.random() < 0.7 else _unit(rng.normal(size=3))
            period = np.exp(rng.uniform(-3.5, 0))
            waves = points @ (axis / period).astype(np.float32) + np.float32(rng.random())
            inside &= waves % 1 < rng.uniform(0.1, 0.5)
        colours[inside] = random_colour(rng)
    if rng.random() < 0.5:
        noise = scenery.noise(64, 64, 1, rng.uniform(0.2, 1), rng)[..., 0]
        column, row = (points @ rng.normal(0, 150, (3, 2)).astype(np.float32)).astype(int).T % 64
        colours *= np.exp(rng.uniform(0.1, 0.8) * noise[row, column, None])


# ============================================================ the ship


class _Ship:
    """What can be seen of a mesh from outside, and how light falls on it.

    Args:
        mesh: `xwing.mesh.Mesh`, about its own origin.
    Raises:
        ValueError: more than MAX_TRIANGLES, or vertices that are not finite.
    """

    def __init__(self, mesh):
        if len(mesh.faces) > MAX_TRIANGLES or not np.isfinite(mesh.vertices).all():
            raise ValueError(
                f"mesh: expected at most {MAX_TRIANGLES:,} triangles, all finite; got "
                f"{len(mesh.faces):,}, {(~np.isfinite(mesh.vertices)).any(1).sum()} not finite; "
                "simplify it, or export it again"
            )
        area, openness = meshes.visibility(mesh.triangles)
        front, back = (np.flatnonzero(side) for side in area.T)
        # (S, 3, 3): what shows, counter-clockwise from outside; a thin sheet's both sides.
        self.sides = np.float32(
            np.concatenate([mesh.triangles[front], mesh.triangles[back][:, ::-1]])
        )
        self.normals = np.cross(
            self.sides[:, 1] - self.sides[:, 0], self.sides[:, 2] - self.sides[:, 0]
        )
        self.offsets = (self.normals * self.sides[:, 0]).sum(1)
        self.vertices, self.colours = mesh.vertices, mesh.colours
        self.materials = mesh.face_materials[np.concatenate([front, back])]
        self.area, self.openness = (
            np.concatenate([t[front, 0], t[back, 1]]) for t in (area, openness)
        )
        self.occluders = mesh.triangles[meshes.largest_triangles(mesh.triangles, 0.8)]
        low, high = self.sides.min((0, 1)), self.sides.max((0, 1))
        self.middle, self.reach = (low + high) / 2, float(np.linalg.norm(high - low) / 2)

    def shown(self, pose, scale):
        """Rows of the sides that face the camera and are large enough, at `scale` samples a model unit."""
        faces = self.normals @ (-pose[:3, :3].T @ pose[:3, 3]).astype(np.float32) > self.offsets
        return np.flatnonzero(faces & (self.area * scale**2 > MIN_DETAIL))

    def cast(self, corners, count, light, pose, K, shape):
        """Cast rays at triangles (F, 3, 3) in camera axes, of which the first `count` are the ship's.

        Returns:
            samples (P,) that meet one, counted along the rows of a picture of `shape`; which they meet (P,);
            points (P, 3) in model units; whether the sun reaches them (P, 1): other things cast no shadows.
        """
        ids, depth = meshes.rasterise(
            corners, np.eye(4, dtype=corners.dtype), K, shape[1], shape[0]
        )
        samples = np.flatnonzero(ids.ravel() >= 0)
        ids, row, column = ids.ravel()[samples], samples // shape[1], samples % shape[1]
        rays = np.column_stack([column + 0.5, row + 0.5, np.ones(len(row))]).astype(np.float32)
        points = rays @ np.linalg.inv(K).T.astype(np.float32) * depth.ravel()[samples, None]
        points = (points - pose[:3, 3].astype(np.float32)) @ pose[:3, :3].astype(np.float32)
        lit = np.ones((len(samples), 1), bool)
        if light.shadows:
            ship, sun = ids < count, light.sun @ pose[:3, :3]
            lit[ship, 0] = meshes.sunlit(
                self.occluders, points[ship], sun, SHADOW_SIZE, SHADOW_BIAS
            )
        return samples, ids, points, lit


class Synthesiser(_Ship):
    """A callable for `xwing_utils.make_dataset`: squares that show the ship, and their truth."""

    def __init__(self, mesh):
        super().__init__(mesh)
        rng = np.random.default_rng(0)
        cube = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
        tube = [
            (np.cos(turn), np.sin(turn), z) for turn in np.arange(12) * np.pi / 6 for z in (-1, 1)
        ]
        clouds = [cube, cube, np.array(tube), np.array(tube), _unit(rng.normal(size=(120, 3)))]
        clouds += [rng.normal(size=(rng.integers(4, 14), 3)) for _ in range(8)]
        self.solids = [_hull(cloud / np.linalg.norm(cloud, axis=1).max()) for cloud in clouds]

    def __call__(self, size, rng, frame=xu.FRAME_SIZE):
        """Draw a square.

        Args:
            size: pixels, width and height.
            rng: numpy Generator; its state decides everything.
            frame: pixels, width of the frame that the square is cut from; it may be black beyond.
        Returns:
            image (size, size, 3) uint8, pose (4, 4) model -> OpenCV camera, K (3, 3).
        """
        tame = rng.random() < TAME_SHARE
        pose, K, outline = self._view(size, frame, rng)
        light = random_light(rng, tame)
        behind = appearance.to_light(np.arange(256))[
            scenery.random_background(size, size, rng, tame)
        ]
        scene = self._draw(pose, K, size, light, rng, tame)
        image = scenery.expose(behind * (1 - scene[..., 3:]) + scene[..., :3], rng, tame)
        if rng.random() < 0.4:
            image *= cv2.fillConvexPoly(
                np.zeros((size, size, 1), np.uint8), outline.astype(np.int32), 1
            )
        return image, pose, K

    def _view(self, size, frame, rng):
        """pose, K and the frame's outline (4, 2): as in the rendered sets, then scaled, turned and cut."""
        zoom, turn = rng.uniform((0.7, 0), (1.3, 2 * np.pi)) if rng.random() < 0.6 else (1.0, 0.0)
        distance = 1.0 if rng.random() < 0.3 else rng.uniform(0.7, 1.4)
        distance *= rng.uniform(1.3, 3) if rng.random() < 0.12 else 1.0
        K = xu.lens_camera(frame, frame) * [[zoom, 1, 1], [1, zoom, 1], [1, 1, 1]]
        beyond = 0.6 if rng.random() < 0.2 else 0.4375  # some enter or leave the frame
        centre = rng.uniform(-beyond, beyond, 2) * frame * zoom  # pixels, from the frame's middle
        pose = np.eye(4)
        pose[:3, :3] = Rotation.random(rng=rng).as_matrix()
        pose[:3, 3] = [*(centre / K[0, 0] * distance), distance]
        middle = xu.project_pose([self.middle], pose, K)[0] + rng.uniform(-size / 4, size / 4, 2)
        margin = xu.CROP_MARGIN if size < frame and rng.random() < 0.5 else 0
        corner = np.round(middle - size / 2).clip(-margin, max(frame - size, 0) + margin)
        K[:2, 2] -= corner
        outline = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * frame * zoom / 2
        return pose, K, outline @ scenery.turn_by(turn) + K[:2, 2]

    def _draw(self, pose, K, size, light, rng, tame):
        """The ship and other things in linear light times their cover, and the cover: (size, size, 4)."""
        large, side = K * [[SUPERSAMPLING], [SUPERSAMPLING], [1]], SUPERSAMPLING * size
        shown, rotation = (
            self.shown(pose, large[0, 0] / pose[2, 3]),
            pose[:3, :3].astype(np.float32),
        )
        corners = self.sides[shown] @ rotation.T + np.float32(pose[:3, 3])
        paint = random_colours(self.colours, rng, tame)
        parts = [(corners, paint[self.materials[shown]].astype(np.float32), self.openness[shown])]
        if not tame and rng.random() < 0.6:
            parts += [self._thing(pose, K, size, rng) for _ in range(rng.integers(1, 7))]
        corners, colours, openness = (np.concatenate(part) for part in zip(*parts))
        samples, ids, points, lit = self.cast(corners, len(shown), light, pose, large, (side, side))
        soft, sun, highlight = (
            part.astype(np.float32) for part in illuminate(corners, light, openness)
        )
        colours = colours[ids]
        if not tame and rng.random() < 0.4:
            decorate(colours, points / np.float32(2 * self.reach), rng)
        scene = np.zeros((side * side, 4), np.float32)
        sunshine = colours * sun[ids] + highlight[ids, None] / 255
        scene[samples, :3], scene[samples, 3] = colours * soft[ids] + lit * sunshine, 1
        return cv2.resize(scene.reshape(side, side, 4), (size, size), interpolation=cv2.INTER_AREA)

    def _thing(self, pose, K, size, rng):
        """A solid or a part of the ship, before or behind it: corners in camera axes, colours, openness."""
        distance, behind = pose[2, 3], rng.random() < 0.65
        scale = self.reach * np.exp(rng.uniform(-1.8, 0.6 if behind else -0.7))
        depth = distance + self.reach + scale * rng.uniform(1, 6)
        depth = depth if behind else distance * rng.uniform(0.4, 0.7)
        solid = self.solids[rng.integers(len(self.solids))]
        shape, groups = self._part(rng) if rng.random() < 0.35 else solid
        stretch = np.diag(
            np.exp(rng.uniform(-1, 0, 3)) * min(scale * depth / distance, 0.8 * depth)
        )
        centre = np.linalg.inv(K) @ [*rng.uniform(-0.2 * size, 1.2 * size, 2), 1] * depth
        corners = shape @ stretch @ Rotation.random(rng=rng).as_matrix() + centre
        shown = meshes.front_facing_triangles(corners, np.eye(4))
        paint = random_colours(np.resize(self.colours, (groups.max() + 1, 3)), rng)
        return np.float32(corners[shown]), np.float32(paint[groups[shown]]), np.ones(shown.sum())

    def _part(self, rng):
        """A part of the ship, at most a third of its sides, about its own middle: triangles, materials."""
        middles = self.sides[:, 0]
        distance = np.linalg.norm(middles - middles[rng.integers(len(middles))], axis=1)
        near = np.argsort(distance)[: int(len(middles) * rng.uniform(0.05, 0.33)) + 1]
        part = self.sides[near] - middles[near].mean(0)
        return part / max(np.linalg.norm(part, axis=-1).max(), 1e-9), self.materials[near]


def _hull(points):
    """The convex hull of points (P, 3): triangles (F, 3, 3), counter-clockwise from outside; five groups."""
    hull = ConvexHull(points)
    triangles = points[hull.simplices]
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    inwards = (normals * hull.equations[:, :3]).sum(1) < 0
    triangles[inwards] = triangles[inwards, ::-1]
    return triangles, np.arange(len(triangles)) // 2 % 5


class Randomiser(_Ship):
    """A callable for `xwing_utils.make_dataset`: a frame's ship in another paint and light."""

    def __call__(self, image, pose, K, rng):
        """The frame with its ship in another paint and light, before another background: (H, W, 3) uint8.

        Args:
            image: (H, W, 3) uint8.
            pose: (4, 4) model -> OpenCV camera, and K: (3, 3), the frame's truth.
            rng: numpy Generator; its state decides everything that is random.
        """
        height, width = image.shape[:2]
        paint, light = random_paint(len(self.colours), rng), random_light(rng)
        result, cut = scenery.random_background(width, height, rng), rng.uniform(0, 0.5)
        left, top, right, bottom = self._window(pose, K, width, height)
        if left >= right or top >= bottom:
            return result
        K = (
            np.array([[2, 0, -2 * left], [0, 2, -2 * top], [0, 0, 1]]) @ K
        )  # twice as large, for smooth edges
        factors = self._factors(pose, K, (2 * (bottom - top), 2 * (right - left)), paint, light)
        factors = cv2.resize(factors, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
        cover = factors[..., 3:4]
        ship = (image[top:bottom, left:right] * factors[..., :3] + factors[..., 4:]) / np.maximum(
            cover, 1e-3
        )
        cover = np.clip(
            (cover - cut) / (1 - cut), 0, 1
        )  # the edge, which holds some of the old background
        behind = result[top:bottom, left:right]
        behind[:] = np.clip(cover * ship + (1 - cover) * behind, 0, 255)
        return result

    def _window(self, pose, K, width, height):
        """left, top, right, bottom of the pixels that may show the ship."""
        pixels = xu.project_pose(self.vertices, pose, K)
        if np.isnan(pixels).any():  # it reaches behind the camera
            return 0, 0, width, height
        low, high = (
            np.floor(pixels.min(0)).clip(0),
            np.ceil(pixels.max(0)).clip(None, (width, height)),
        )
        return *low.astype(int), *high.astype(int)

    def _factors(self, pose, K, shape, paint, light):
        """(*shape, 5) float32: factors on red, green, blue; the ship's cover; a highlight to add."""
        shown = self.shown(pose, np.inf)
        corners = self.sides[shown] @ pose[:3, :3].T + pose[:3, 3]
        samples, ids, _, lit = self.cast(corners, len(shown), light, pose, K, shape)
        soft, sun, highlight = illuminate(corners, light)
        paint, factors = (
            paint[self.materials[shown]],
            np.zeros((shape[0] * shape[1], 5), np.float32),
        )
        factors[samples, :3] = (paint * soft)[ids] + lit * (paint * sun)[ids]
        factors[samples, 3], factors[samples, 4] = 1, lit[:, 0] * highlight[ids]
        return factors.reshape(*shape, 5)
