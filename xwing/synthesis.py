"""Domain randomisation: the ship of a frame in another paint and light, before another background.

A network that has seen one paint in soft light learns the paint; it should learn the shape. So a share of the
frames is changed while batches are made. The mesh, rasterised at the frame's true pose, tells which part of
the ship each pixel shows; that part is multiplied by a random paint and a random light, and all that is not
ship is replaced. Labels stay right, and the ship keeps the details of its picture.

Source: Tobin et al. 2017, Domain Randomization for Transferring Deep Neural Networks.
"""

import dataclasses

import cv2
import numpy as np

import xwing_utils as xu
from xwing import mesh as meshes


@dataclasses.dataclass(frozen=True)
class Light:
    """Ambient light, a sun, and the highlights that it makes."""

    sun: np.ndarray  # (3,) unit vector towards it, camera axes
    ambient: float
    strength: float
    shadows: bool
    shine: float  # grey levels of the brightest highlight
    exponent: float  # the larger, the smaller the highlights


def random_light(rng):
    """Draw a `Light`: for half of the frames a hard sun with shadows, for half of them highlights."""
    sun, hard = rng.normal(size=3), rng.random() < 0.5
    ambient, strength = rng.uniform((0.15, 0.5), (0.6, 1.8)) if hard else rng.uniform((0.25, 0), (1.1, 1.3))
    shine = rng.uniform(0, 150) * (rng.random() < 0.5)
    return Light(sun / np.linalg.norm(sun), ambient, strength, hard, shine, np.exp(rng.uniform(1, 5)))


def random_paint(materials, rng):
    """Draw a factor on the red, green and blue of each material: (materials, 3)."""
    return np.exp(rng.normal(0, 0.3, (materials, 1)) + rng.normal(0, rng.uniform(0, 0.3), (materials, 3)))


def random_background(width, height, rng):
    """Draw a (height, width, 3) uint8 background: noise on all scales, or flat shapes one over another."""
    colour = rng.uniform(0, 255, 3 if rng.random() < 0.5 else 1)
    draw = _clouds if rng.random() < 0.6 else _shapes
    return cv2.GaussianBlur(draw(width, height, colour, rng), (0, 0), np.exp(rng.uniform(-1, 1)))


def _clouds(width, height, colour, rng):
    """Coloured noise: from octave to octave the grid is twice as fine and the contrast lower."""
    slope, colourful = rng.uniform(0.4, 1.2), rng.uniform(0, 0.6)
    image = np.full((1, 1, 3), colour, np.float32)
    for n in (2, 4, 8, 16, 32, 64, 128):
        noise = rng.standard_normal((n, n, 4), np.float32)
        noise = 50 * (2 / n) ** slope * (noise[..., :1] + colourful * noise[..., 1:])
        image = cv2.resize(image, (n, n), interpolation=cv2.INTER_CUBIC) + noise
    return cv2.resize(np.clip(image, 0, 255).astype(np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


def _shapes(width, height, colour, rng):
    """Up to 39 convex shapes of all sizes."""
    image = np.full((height, width, 3), colour, np.uint8)
    for _ in range(rng.integers(1, 40)):
        middle, reach = rng.uniform(0, (width, height)), np.exp(rng.uniform(0, 5))
        corners = middle + rng.normal(size=(rng.integers(3, 7), 2)) * reach
        cv2.fillConvexPoly(image, cv2.convexHull(corners.astype(np.int32)), rng.uniform(0, 255, 3))
    return image


class Randomiser:
    """A callable for `xwing_utils.make_dataset`: changes a share of the frames and returns the others.

    Args:
        mesh: `xwing.mesh.Mesh` of the ship in the frames.
        share: of the frames that are changed, 0 to 1.
    """

    def __init__(self, mesh, share=0.3):
        if not 0 <= share <= 1:
            raise ValueError(f"share: expected a share of the frames from 0 to 1, got {share}")
        self.share, self.vertices, self.material_count = share, mesh.vertices, len(mesh.names)
        front, back = (np.flatnonzero(side) for side in meshes.visible_area(mesh.triangles).T)
        # (S, 3, 3): what can be seen from outside, counter-clockwise from there; a thin sheet's both sides.
        self.sides = np.concatenate([mesh.triangles[front], mesh.triangles[back][:, ::-1]])
        self.materials = mesh.face_materials[np.concatenate([front, back])]
        self.occluders = mesh.triangles[meshes.largest_triangles(mesh.triangles)]

    def __call__(self, image, pose, K, rng):
        """The frame, or for a share of the frames what `randomise` makes of it: (H, W, 3) uint8."""
        return self.randomise(image, pose, K, rng) if rng.random() < self.share else image

    def randomise(self, image, pose, K, rng):
        """The frame with its ship in another paint and light, before another background: (H, W, 3) uint8.

        Args:
            image: (H, W, 3) uint8.
            pose: (4, 4) model -> OpenCV camera, and K: (3, 3), the frame's truth.
            rng: numpy Generator; its state decides everything that is random.
        """
        height, width = image.shape[:2]
        paint, light = random_paint(self.material_count, rng), random_light(rng)
        result, cut = random_background(width, height, rng), rng.uniform(0, 0.5)
        left, top, right, bottom = self._window(pose, K, width, height)
        if left >= right or top >= bottom:
            return result
        K = np.array([[2, 0, -2 * left], [0, 2, -2 * top], [0, 0, 1]]) @ K  # twice as large, for smooth edges
        factors = self._factors(pose, K, 2 * (right - left), 2 * (bottom - top), paint, light)
        factors = cv2.resize(factors, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
        cover = factors[..., 3:4]
        ship = (image[top:bottom, left:right] * factors[..., :3] + factors[..., 4:]) / np.maximum(cover, 1e-3)
        cover = np.clip((cover - cut) / (1 - cut), 0, 1)  # the edge, which holds some of the old background
        behind = result[top:bottom, left:right]
        behind[:] = np.clip(cover * ship + (1 - cover) * behind, 0, 255)
        return result

    def _window(self, pose, K, width, height):
        """left, top, right, bottom of the pixels that may show the ship."""
        pixels = xu.project_pose(self.vertices, pose, K)
        if np.isnan(pixels).any():  # it reaches behind the camera
            return 0, 0, width, height
        low, high = np.floor(pixels.min(0)).clip(0), np.ceil(pixels.max(0)).clip(None, (width, height))
        return *low.astype(int), *high.astype(int)

    def _factors(self, pose, K, width, height, paint, light):
        """(height, width, 5) float32: factors on red, green, blue; the ship's cover; a highlight to add."""
        shown = np.flatnonzero(meshes.front_facing_triangles(self.sides, pose))
        ids, depth = meshes.rasterise(self.sides[shown], pose, K, width, height)
        paint, (direct, highlight) = paint[self.materials[shown]], _sunlight(self.sides[shown], pose, light)
        shade = np.column_stack([paint * light.ambient, np.ones(len(shown)), np.zeros(len(shown))])
        sunshine = np.column_stack([paint * direct[:, None], np.zeros(len(shown)), highlight])
        # A row for each triangle, and the last one for -1, no triangle.
        shade, sunshine = (np.pad(rows, ((0, 1), (0, 0))).astype(np.float32) for rows in (shade, sunshine))
        if not light.shadows:
            return (shade + sunshine)[ids]
        row, column = np.nonzero(ids >= 0)
        rays = np.column_stack([column + 0.5, row + 0.5, np.ones(len(row))]) @ np.linalg.inv(K).T
        points = (rays * depth[row, column, None] - pose[:3, 3]) @ pose[:3, :3]
        lit = meshes.sunlit(self.occluders, points, light.sun @ pose[:3, :3])
        factors = shade[ids]
        factors[row[lit], column[lit]] += sunshine[ids[row[lit], column[lit]]]
        return factors


def _sunlight(triangles, pose, light):
    """The sun's light on each triangle, and its highlight in grey levels: (F,) and (F,); without shadows.

    Source: Blinn, Models of Light Reflection for Computer Synthesized Pictures, SIGGRAPH 1977.
    """
    a, b, c = np.moveaxis(triangles @ pose[:3, :3].T, 1, 0)
    normals, views = np.cross(b - a, c - a), -(a + pose[:3, 3])  # outwards, and towards the camera
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    halfway = views / np.linalg.norm(views, axis=1, keepdims=True) + light.sun
    halfway /= np.linalg.norm(halfway, axis=1, keepdims=True) + 1e-12
    diffuse = np.clip(normals @ light.sun, 0, None)
    highlight = np.clip((normals * halfway).sum(1), 0, None) ** light.exponent * (diffuse > 0)
    return light.strength * diffuse, light.shine * highlight
