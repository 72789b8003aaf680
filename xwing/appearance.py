"""What each pixel should look like at a pose: linear light, colours, light and background."""

import dataclasses

import cv2
import numpy as np

import xwing_utils as xu
from xwing.mesh import _normals, draw_triangles, visibility

SUPERSAMPLING = 2  # samples per pixel and direction


MIN_DETAIL = 0.25  # samples: triangles that show less wherever they are seen from are not drawn


OCCLUSION = 0.9  # share of the light that other parts of the ship keep away


def to_light(grey):
    """Linear light, 0 to 1, of grey levels, as float32 (sRGB, IEC 61966-2-1, but for its straight part)."""
    return ((np.float32(grey) + np.float32(14)) / np.float32(269)) ** np.float32(2.4)


def to_grey(light):
    """The inverse of `to_light`, for light (h, w, 3) float32."""
    return cv2.pow(cv2.max(light, 0.0), 1 / 2.4) * np.float32(269) - np.float32(14)


def grey_slope(light):
    """(P,) d grey / d light of colours (P, 3); where it is dark, that of grey 40: noise has no slope."""
    brightness = light @ np.full(3, 1 / 3, np.float32)
    return np.float32(269 / 2.4) * np.maximum(brightness, np.float32(0.027)) ** np.float32(
        1 / 2.4 - 1
    )


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What each pixel shows of a mesh whose colours and light are not known yet; float32."""

    pose: np.ndarray  # (4, 4)
    basis: (
        np.ndarray
    )  # (h, w, M + 8): what multiplies the colours of the materials and the light's harmonics
    cover: np.ndarray  # (h, w) share of the pixel
    depth: (
        np.ndarray
    )  # (h, w) model units, of the nearest surface in the pixel; inf where there is none


class LinearShader:
    """Draws a mesh as it looks in linear light, as a sum whose coefficients are its colours and the light.

    Each surface shows its material's colour under even light, plus light that varies smoothly with its
    direction, times its brightness where the paint is the true one; other parts keep some of both away.

    Source: Ramamoorthi and Hanrahan, SIGGRAPH 2001 (nine spherical harmonics hold diffuse light).
    """

    HARMONICS = 8  # of degree 1 and 2

    def __init__(self, mesh):
        area, openness = visibility(mesh.triangles)
        shown = area.any(1)
        self.area, self.triangles = area[shown], np.float32(mesh.triangles[shown])
        self.normals = _normals(self.triangles)
        self.normals /= np.linalg.norm(self.normals, axis=1, keepdims=True)
        self.offsets = (self.normals * self.triangles[:, 0]).sum(1)
        materials = np.eye(len(mesh.names))[
            np.tile(mesh.face_materials[shown], 2)
        ]  # fronts, then backs
        brightness = to_light(255 * mesh.colours.mean(1))[materials.argmax(1), None]
        x, y, z = np.concatenate([self.normals, -self.normals]).T
        harmonics = np.column_stack([x, y, z, x * y, y * z, x * z, x * x - y * y, 3 * z * z - 1])
        tables = np.stack([np.hstack([materials, harmonics * light]) for light in (1, brightness)])
        tables *= 1 - OCCLUSION * (1 - openness[shown].T.reshape(-1, 1))
        tables = np.pad(tables, ((0, 0), (0, 0), (0, 1)), constant_values=1)
        self.tables = np.float32(
            np.pad(tables, ((0, 0), (0, 1), (0, 0)))
        )  # in any paint, in the true one

    def draw(self, pose, K, width, height, blur, true_paint=True):
        """The `Drawing` at a pose (4, 4) through K (3, 3) and a Gaussian filter of so many pixels."""
        table = self.tables[int(true_paint)]
        s, rotation, translation = SUPERSAMPLING, np.float32(pose[:3, :3]), np.float32(pose[:3, 3])
        back = self.normals @ (-rotation.T @ translation) < self.offsets
        scale = s * K[0, 0] / translation[2]  # samples for one model unit
        chosen = np.flatnonzero(
            np.where(back, self.area[:, 1], self.area[:, 0]) * scale**2 > MIN_DETAIL
        )
        corners = self.triangles[chosen].reshape(-1, 3) @ rotation.T + translation
        rows = chosen + len(self.triangles) * back[chosen]
        corners, large = corners.reshape(-1, 3, 3), K * [[s], [s], [1]]
        shown, depth = draw_triangles(corners, rows[:, None], large, s * width, s * height)
        samples = [(slice(i, None, s), slice(j, None, s)) for i in range(s) for j in range(s)]
        rows = [shown[sample][..., 0].astype(np.int32).ravel() for sample in samples]
        covered = np.flatnonzero(np.max(rows, axis=0) >= 0)
        basis = np.zeros((height * width, table.shape[1]), np.float32)
        basis[covered] = sum(table[row[covered]] for row in rows) / np.float32(s * s)
        basis = cv2.GaussianBlur(basis.reshape(height, width, -1), (0, 0), max(blur, 0.01))
        depth = np.minimum.reduce([depth[sample] for sample in samples])
        return Drawing(pose, basis[..., :-1], basis[..., -1].copy(), depth)


NOISE = 4.0  # grey levels: no pixel is trusted further than that


EFFECTIVE_SAMPLE_RATIO = 0.09  # share of the pixels whose errors count as independent of each other


def _mean_square(colours):
    return np.einsum("pc,pc->p", colours, colours) / np.float32(
        3
    )  # numpy's own sums of three are slow


def _weight(residual, spread):
    """(P,) information of pixels that differ by so many grey levels (P, 3), under Cauchy errors."""
    forgiven = _mean_square(residual) / np.float32(xu.CAUCHY * spread) ** 2
    return np.float32(EFFECTIVE_SAMPLE_RATIO / spread**2) / (1 + forgiven)


def _robust_cost(residual, spread):
    """Negative log-likelihood, but for a constant, of differences (P, 3) in grey levels (Cauchy)."""
    forgiven = _mean_square(residual) / np.float32(xu.CAUCHY * spread) ** 2
    return 1.5 * EFFECTIVE_SAMPLE_RATIO * xu.CAUCHY**2 * float(np.log1p(forgiven).sum(dtype=float))


def _surroundings(light, cover):
    """The picture (h, w, 3) without the ship: each pixel from those about it that show none of it."""
    free = np.float32(cv2.dilate(cover, np.ones((5, 5))) < 0.01)[..., None]
    layers, total = np.concatenate([light * free, free], axis=2), np.float32([0, 0, 0, 1e-12])
    for reach in (3, 12, 48):
        size = 2 * reach + 1, 2 * reach + 1
        total = total + cv2.blur(layers, size, borderType=cv2.BORDER_REFLECT) * np.float32(
            reach**-6.0
        )
    return total[..., :3] / total[..., 3:]


def _smooth_sky_cost(image, pixels):
    """The cost of an image at some flat pixels if a smooth sky is all that there is: quadratic in x and y."""
    row, column = np.float32(np.divmod(pixels, image.shape[1])) / max(image.shape[:2])
    powers = (np.stack([x**0, x, x * x]) for x in (column - 0.5, row - 0.5))
    smooth, grey = np.einsum("ip,jp->ijp", *powers).reshape(9, -1), image.reshape(-1, 3)[pixels]
    fitted = smooth.T @ np.linalg.lstsq(smooth @ smooth.T, smooth @ grey, rcond=1e-6)[0]
    return _robust_cost(grey - fitted, 2 * NOISE)
