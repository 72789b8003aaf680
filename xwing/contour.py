"""The outline as evidence: colour statistics inside and outside, lines across it.

Where a target and its background have different colours, the outline can be seen even where the
surface says nothing. Histograms remember which colours were seen lately just inside and just
outside the outline. They give the probability that a pixel belongs to the target (`posterior`).
Short lines across the outline of a drawing then say how far the outline must move along each of
them: a drawing whose target has moved by that much agrees with the colours best. Each line is one
measurement of a distance in the picture, with its variance. Together they form a least-squares
system for a step of the pose (`ContourLines.system`), which refinement adds to that of the pixels.

Longer lines see an outline that is further off, but less exactly. `Outline.seek` moves a pose by
the outline alone, from long lines to short ones.

The lines start from a drawing that was made anyway, so there is no table of views. They read the
frame itself, not the view, so the view needs no wider margin. Lines that the edge of the frame cuts
are not used: there the outline of what shows is not that of the target.

Source: Prisacariu and Reid, PWP3D, IJCV 98, 2012 (colours inside and outside, pixel-wise
    posterior); Stoiber, Pfanne, Strobl, Triebel and Albu-Schaeffer, SRT3D, IJCV 130, 2022 (sparse
    lines, smoothed step function); Stoiber, Sundermeyer and Triebel, M3T, CVPR 2022.
"""

import dataclasses

import cv2
import numpy as np
from scipy.spatial import ConvexHull
from scipy.special import expit

import xwing_utils as xu
from xwing.mesh import Mesh, rasterise

# ---- colours
BITS = 4  # of each channel that count
LEARNING_RATE = 0.1  # weight of a new frame in the histograms
LEARNING_SPAN = 100  # pixels that the target spans in the drawing from which colours are learnt
RING = 0.01, 0.12  # distances from the outline where colours are learnt, in those spans
MIN_RING = 100  # pixels, on each side: with fewer nothing is learnt
POSTERIOR_RANGE = 0.02, 0.98  # no colour is certain

# ---- lines
COUNT = 160  # lines on one outline, about
MIN_COUNT = 12  # lines: fewer do not determine a pose
MIN_CONTOUR = 12  # pixels: the shorter outlines of specks are not used
STEPS = 19  # segments of a line, of `scale` pixels each
FREE_STEPS = 3  # segments on each side of the outline that no other outline may cross
STEP_WIDTH = 8  # segments over which the step function is compared with the colours
STEP_AMPLITUDE = 0.43  # of the step function: the rest is noise of the colours
STEP_SLOPE = 0.5  # segments, half the width of the step function
MIN_VARIANCE = 0.5  # squared segments
CAUCHY = 2.0  # deviations from which a line loses its weight

# ---- seeking
SEEKING_SPAN = 160  # pixels that the target spans in the drawing whose outline is sought
MAX_ZOOM = 2.0  # a smaller target is enlarged by at most this much
MIN_SPAN = 6  # pixels: a smaller target has no outline
SCALES = (5, 3, 2, 1)  # pixels of a segment, the longest lines first
MAX_SCALE = 0.04  # spans of the target: longer segments reach across it
SEEKING_STEPS = 2  # of Gauss-Newton at each scale
SEEKING_PENALTY = 20.0, 4.0  # information about a step, per squared radian and squared diameter
MAX_TURN = 0.6  # radians about one axis: a larger step is rejected


# ============================================================ colours


class ColourStatistics:
    """Which colours were seen lately just inside and just outside the outline.

    Attributes:
        inside, outside: (4096,) float32, frequencies of the colours; None where nothing is known.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget all colours."""
        self.inside = None
        self.outside = None
        self._posterior = None

    @property
    def known(self) -> bool:
        """Whether colours have been learnt."""
        return self.inside is not None

    def learn(self, inside: np.ndarray, outside: np.ndarray) -> None:
        """Learn from the colours (P, 3) and (Q, 3) uint8 of pixels on both sides of an outline."""
        seen = _histogram(inside), _histogram(outside)
        if not self.known:
            self.inside, self.outside = seen
        self.inside = self.inside + LEARNING_RATE * (seen[0] - self.inside)
        self.outside = self.outside + LEARNING_RATE * (seen[1] - self.outside)

        total = self.inside + self.outside
        fraction = np.where(total > 0, self.inside / np.maximum(total, np.float32(1e-12)), 0.5)
        low, high = POSTERIOR_RANGE
        self._posterior = np.float32(low + (high - low) * fraction)

    def posterior(self, image: np.ndarray) -> np.ndarray:
        """Return the probability that pixels belong to the target, by their colours alone.

        Args:
            image: (..., 3) uint8, colours RGB.

        Returns:
            (...) float32; 0.5 for colours that were never seen.
        """
        return self._posterior[_colour_index(image)]


def _colour_index(image):
    """The row (...) of the histograms for colours (..., 3) uint8."""
    red, green, blue = np.moveaxis(image >> (8 - BITS), -1, 0).astype(np.uint16)
    return (red << (2 * BITS)) | (green << BITS) | blue


def _histogram(colours):
    """Frequencies (4096,) float32 of colours (P, 3) uint8."""
    counts = np.bincount(_colour_index(colours), minlength=1 << (3 * BITS))
    return np.float32(counts / max(len(colours), 1))


# ============================================================ lines


@dataclasses.dataclass(frozen=True)
class ContourLines:
    """L lines across the outline of a drawing, and where the colours say that it should be."""

    pose: np.ndarray  # (4, 4) of the drawing
    K: np.ndarray  # (3, 3) camera matrix of the drawing
    points: np.ndarray  # (L, 3) of the outline, camera axes, from the position of the target
    centres: np.ndarray  # (L, 2) pixels of the drawing: where they lie there
    normals: np.ndarray  # (L, 2) outward unit normals of the outline
    scale: int  # pixels of a segment
    posterior: np.ndarray  # (L, STEPS) of the segments, from inside to outside
    mean: np.ndarray  # (L,) segments outward from the centre: where the outline should be
    variance: np.ndarray  # (L,) squared segments

    def system(self, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Return the least-squares system for a step of `xwing_utils.move_pose` from a pose.

        Args:
            pose: (4, 4) model -> OpenCV camera, near that of the drawing.

        Returns:
            information (6, 6), gradient (6,) of the log-likelihood, and the negative log-likelihood
            except for a constant. It is robust: the distances have a Cauchy distribution.
        """
        points = self._turned(pose)
        x, y, z = (points + pose[:3, 3]).T
        error = self.mean - self._distance(x, y, z)
        squared = np.square(error) / (self.variance * CAUCHY**2)
        weight = 1 / (self.variance * (1 + squared))

        # How the distance changes with the point, and the point with the step.
        across, down = (self.normals * np.diag(self.K)[:2] / self.scale).T
        slope = np.stack([across, down, -(across * x + down * y) / z], axis=1) / z[:, None]
        jacobian = np.hstack([np.cross(points, slope), slope])

        weighted = jacobian.T * weight
        cost = 0.5 * CAUCHY**2 * float(np.log1p(squared).sum())
        return weighted @ jacobian, weighted @ error, cost

    def separation(self, pose: np.ndarray) -> float:
        """Return how differently the colours on both sides of the outline look at a pose (4, 4).

        Returns:
            -1 to 1, the mean posterior just inside less that just outside: about 0 for a wrong
            pose, and below 1 for a right one where target and background share colours.
        """
        moved = self._distance(*(self._turned(pose) + pose[:3, 3]).T)
        reach = np.arange(1, FREE_STEPS + 1)
        middle = STEPS // 2 + moved[:, None]
        return float(self._at(middle - reach).mean() - self._at(middle + reach).mean())

    def _turned(self, pose):
        """The points (L, 3) at a pose, from the position of the target."""
        return self.points @ (pose[:3, :3] @ self.pose[:3, :3].T).T

    def _distance(self, x, y, z):
        """Segments (L,) by which points in camera axes lie outward from the centres."""
        (fx, skew, cx), (_, fy, cy) = self.K[:2]
        column = (fx * x + skew * y) / z + cx - self.centres[:, 0]
        row = fy * y / z + cy - self.centres[:, 1]
        return (column * self.normals[:, 0] + row * self.normals[:, 1]) / self.scale

    def _at(self, positions):
        """The posterior at positions (L, N) along the lines, in segments from their inner ends."""
        positions = positions.clip(0, STEPS - 1)
        left = np.minimum(positions.astype(int), STEPS - 2)
        part = positions - left
        lines = np.arange(len(left))[:, None]
        return (1 - part) * self.posterior[lines, left] + part * self.posterior[lines, left + 1]


def _find_outline(coverage):
    """Pixels (P, 2) that the outline of a coverage (h, w) passes, evenly spaced: column, row."""
    mask = np.uint8(coverage > 0.5)
    contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    contours = [contour[:, 0] for contour in contours if len(contour) >= MIN_CONTOUR]
    if not contours:
        return np.zeros((0, 2), int)
    return np.concatenate(contours)[:: max(1, sum(map(len, contours)) // COUNT)]


def _outward(coverage, pixels):
    """Unit normals (P, 2) of the outline of a coverage (h, w) at pixels (P, 2), outward."""
    smooth = cv2.GaussianBlur(coverage, (5, 5), 1.0)
    column, row = pixels.T
    slopes = [cv2.Sobel(smooth, cv2.CV_32F, *axis)[row, column] for axis in ((1, 0), (0, 1))]
    normals = -np.stack(slopes, axis=1).astype(float)
    return normals / (np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9)


def _settle(coverage, centres, normals, scale):
    """Move points (P, 2) near the outline onto it, along its normals.

    Returns where they lie then (P, 2), and whether the line through each is free (P,): all inside
    on one side, and all outside on the other.
    """
    reach = FREE_STEPS * scale
    offsets = np.arange(-reach, reach + 1)
    covered = _look_up(coverage, centres, normals, offsets, cv2.INTER_LINEAR)
    inside = covered[:, : reach - 1].min(1) > 0.8
    outside = covered[:, reach + 2 :].max(1) < 0.2

    # The sum over a step from 1 to 0 says where the step is.
    moved = covered.sum(1) - (reach + 0.5)
    return centres + moved[:, None] * normals, inside & outside


def _look_up(picture, centres, normals, offsets, interpolation):
    """A picture along lines: (L, N) or (L, N, C) at offsets (N,) pixels from centres (L, 2)."""
    positions = centres[:, None] + offsets[:, None] * normals[:, None]
    positions = np.float32(positions - 0.5)  # OpenCV counts from the centre of the first pixel
    return cv2.remap(picture, positions, None, interpolation, borderMode=cv2.BORDER_REPLICATE)


def _locate(posterior):
    """Where on lines (L, STEPS) the outline lies: mean and variance (L,), segments, squared ones.

    Source: SRT3D, equations 5 to 9: the posterior of the distance, with a smoothed step function.
    """
    steps = np.arange(STEP_WIDTH) - (STEP_WIDTH - 1) / 2
    inside = np.float32(0.5 - STEP_AMPLITUDE * np.tanh(steps / (2 * STEP_SLOPE)))
    windows = np.lib.stride_tricks.sliding_window_view(posterior, STEP_WIDTH, axis=1)
    likelihood = (1 - inside) + windows * (2 * inside - 1)
    log_likelihood = np.log(likelihood).sum(-1)

    density = np.exp(log_likelihood - log_likelihood.max(1, keepdims=True))
    density /= density.sum(1, keepdims=True)
    distances = np.arange(density.shape[1]) - (density.shape[1] - 1) / 2
    mean = density @ distances
    variance = density @ np.square(distances) - np.square(mean)
    return mean, np.maximum(variance, MIN_VARIANCE)


# ============================================================ the outline of a target


class Outline:
    """What the outline of one target says about its pose.

    Args:
        mesh: `Mesh` of the target.

    Attributes:
        colours: `ColourStatistics`; nothing is known to begin with.
    """

    def __init__(self, mesh: Mesh):
        self.colours = ColourStatistics()
        self.triangles = np.float32(mesh.triangles)
        self.hull = mesh.vertices[ConvexHull(mesh.vertices).vertices]
        self.diameter = mesh.diameter
        self.near = mesh.near

    def learn(self, image: np.ndarray, pose: np.ndarray, K: np.ndarray) -> None:
        """Learn the colours on both sides of the outline, from a frame whose pose is known.

        Nothing is learnt where too little shows of the target, or of what is around it.

        Args:
            image: (H, W, 3) uint8.
            pose: (4, 4) model -> OpenCV camera.
            K: (3, 3) camera matrix.
        """
        drawn = self._draw(image, pose, K, LEARNING_SPAN, RING[1] * LEARNING_SPAN)
        if drawn is None:
            return
        depth, drawn_K = drawn
        low, high = np.array(RING) * LEARNING_SPAN
        target = np.uint8(np.isfinite(depth))
        sides = []
        for side in (target, 1 - target):
            distance = cv2.distanceTransform(side, cv2.DIST_L2, 3)
            sides.append((distance > low) & (distance < high))

        if min(map(np.count_nonzero, sides)) < MIN_RING:
            return
        self.colours.learn(*(_colours_of(image, K, side, drawn_K) for side in sides))

    def lines(
        self,
        image: np.ndarray,
        K: np.ndarray,
        pose: np.ndarray,
        drawn_K: np.ndarray,
        coverage: np.ndarray,
        depth: np.ndarray,
        scale: int = 1,
    ) -> ContourLines | None:
        """Look across the outline of a drawing.

        Args:
            image: (H, W, 3) uint8, the frame.
            K: (3, 3) camera matrix of the frame.
            pose: (4, 4) of the drawing.
            drawn_K: (3, 3) camera matrix of the drawing, which shows a part of the frame.
            coverage: (h, w) float32, fraction of each pixel that the target covers.
            depth: (h, w) float32 model units; inf where there is no target.
            scale: pixels of the drawing that a segment of a line has.

        Returns:
            ContourLines, or None where no colours are known or too few lines are in the frame.
        """
        if not self.colours.known:
            return None
        pixels = _find_outline(coverage)
        column, row = pixels.T
        height, width = coverage.shape
        within = (column > 1) & (row > 1) & (column < width - 2) & (row < height - 2)
        pixels = pixels[within & np.isfinite(depth[row, column])]
        if len(pixels) < MIN_COUNT:
            return None

        normals = _outward(coverage, pixels)
        centres, used = _settle(coverage, pixels + 0.5, normals, scale)

        to_frame = K @ np.linalg.inv(drawn_K)
        offsets = np.arange(STEPS * scale) - (STEPS * scale - 1) / 2
        used &= _in_frame(image, centres, normals, offsets[-1], to_frame)
        if np.count_nonzero(used) < MIN_COUNT:
            return None

        centres, normals, pixels = centres[used], normals[used], pixels[used]
        in_frame = centres @ to_frame[:2, :2].T + to_frame[:2, 2]
        along = normals @ to_frame[:2, :2].T
        colours = _look_up(image, in_frame, along, offsets, cv2.INTER_NEAREST)
        posterior = self.colours.posterior(colours)
        if scale > 1:
            odds = np.log(posterior / (1 - posterior)).reshape(-1, STEPS, scale)
            posterior = expit(odds.sum(-1))

        z = depth[pixels[:, 1], pixels[:, 0]].astype(float)
        rays = np.column_stack([centres, np.ones(len(z))]) @ np.linalg.inv(drawn_K).T
        points = rays * z[:, None] - pose[:3, 3]
        located = _locate(posterior)
        return ContourLines(pose, drawn_K, points, centres, normals, scale, posterior, *located)

    def seek(self, image: np.ndarray, pose: np.ndarray, K: np.ndarray) -> np.ndarray:
        """Move a pose by the outline alone, by up to about a third of the target.

        Args:
            image: (H, W, 3) uint8.
            pose: (4, 4) model -> OpenCV camera.
            K: (3, 3) camera matrix.

        Returns:
            (4, 4); the same pose where the outline cannot be seen.
        """
        if not self.colours.known:
            return pose
        for scale in SCALES:
            margin = (FREE_STEPS + 1) * scale
            drawn = self._draw(image, pose, K, SEEKING_SPAN, margin)
            if drawn is None:
                break
            depth, drawn_K = drawn
            coverage = np.float32(np.isfinite(depth))
            lines = self.lines(image, K, pose, drawn_K, coverage, depth, scale)
            if lines is not None:
                pose = self._step(lines, pose)
        return pose

    def _step(self, lines, pose):
        """A pose after some steps of Gauss-Newton on lines alone, drawn back to where it was."""
        start = pose
        turn, shift = SEEKING_PENALTY
        penalty = np.repeat([turn, shift / self.diameter**2], 3)
        for _ in range(SEEKING_STEPS):
            information, gradient, cost = lines.system(pose)
            gradient = gradient - penalty * xu.pose_step(pose, start)
            step = np.linalg.solve(information + np.diag(penalty), gradient)
            if np.abs(step[:3]).max() > MAX_TURN:
                break
            trial = xu.move_pose(pose, step)
            if lines.system(trial)[2] > cost:
                break
            pose = trial
        return pose

    def _draw(self, image, pose, K, span, margin):
        """The depth (h, w) of a drawing in which the visible target spans some pixels, and its K.

        It lies within the frame and has a margin of some of its pixels. None where too little of
        the target is in the frame, or a part of it behind the camera.
        """
        pixels = xu.project_pose(self.hull, pose, K)
        if not np.isfinite(pixels).all():
            return None
        size = np.array(image.shape[1::-1])
        low = pixels.min(0).clip(0, size)
        high = pixels.max(0).clip(0, size)
        visible = (high - low).max()
        if visible < MIN_SPAN or (high - low).min() < MIN_SPAN / 2:
            return None

        zoom = min(span / visible, MAX_ZOOM)
        low = np.floor(low - margin / zoom).clip(0, size)
        high = np.ceil(high + margin / zoom).clip(0, size)
        width, height = np.int32((high - low) * zoom)
        drawn_K = xu.crop_camera(K, *low, zoom)
        _, depth = rasterise(self.triangles, pose, drawn_K, int(width), int(height), self.near)
        return depth, drawn_K


def _colours_of(image, K, mask, drawn_K):
    """Colours (P, 3) of a frame where the pixels of a mask (h, w), in another camera, lie."""
    row, column = np.nonzero(mask)
    to_frame = K @ np.linalg.inv(drawn_K)
    pixels = np.stack([column + 0.5, row + 0.5], axis=1) @ to_frame[:2, :2].T + to_frame[:2, 2]
    column, row = pixels.astype(int).T
    height, width = image.shape[:2]
    return image[row.clip(0, height - 1), column.clip(0, width - 1)]


def _in_frame(image, centres, normals, reach, to_frame):
    """Whether both ends (L,) of lines, at some pixels from their centres, lie in the frame."""
    size = np.array(image.shape[1::-1])
    inside = np.ones(len(centres), bool)
    for side in (-reach, reach):
        ends = (centres + side * normals) @ to_frame[:2, :2].T + to_frame[:2, 2]
        inside &= (ends >= 0).all(1) & (ends <= size).all(1)
    return inside
