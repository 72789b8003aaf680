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
from collections.abc import Callable

import cv2
import numpy as np
from scipy.special import expit

import xwing_utils as xu

# ---- colours
BITS = 4  # of each channel that count
LEARNING_RATE = 0.1  # weight of a new frame in the histograms
LEARNING_SPAN = 80  # pixels that the target spans in the drawing from which colours are learnt
RING = 1.0, 10.0  # pixels of it, distances from the outline where colours are learnt
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
    """L lines across the outline of a drawing, and where the colours say that it should be.

    A distance is outward along a line, in segments from where the drawing has the outline.
    """

    pose: np.ndarray  # (4, 4) of the drawing
    K: np.ndarray  # (3, 3) camera matrix of the drawing
    coverage: np.ndarray  # (h, w) fraction of each pixel of the drawing that the target covers
    scale: int  # pixels of a segment
    points: np.ndarray  # (L, 3) of the outline, camera axes, from the position of the target
    centres: np.ndarray  # (L, 2) pixels of the drawing where the points lie
    normals: np.ndarray  # (L, 2) outward unit normals of the outline
    posterior: np.ndarray  # (L, STEPS) of the segments, from inside to outside
    mean: np.ndarray  # (L,) distance at which the outline should be
    variance: np.ndarray  # (L,) of this distance
    jacobian: np.ndarray  # (6, L) of the distances by a step of `xwing_utils.move_pose`

    def system(self, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Return the least-squares system for a step of `xwing_utils.move_pose` from a pose.

        Args:
            pose: (4, 4) model -> OpenCV camera, near that of the drawing.

        Returns:
            information (6, 6), gradient (6,) of the log-likelihood, and the negative log-likelihood
            except for a constant. It is robust: the distances have a Cauchy distribution.
        """
        error = self.mean - self.distances(pose)
        squared = error * error / (self.variance * CAUCHY**2)
        weighted = self.jacobian / (self.variance * (1 + squared))
        cost = 0.5 * CAUCHY**2 * float(np.log1p(squared).sum())
        return weighted @ self.jacobian.T, weighted @ error, cost

    def distances(self, pose: np.ndarray) -> np.ndarray:
        """Return the distances (L,) of the points at a pose (4, 4)."""
        turn = pose[:3, :3] @ self.pose[:3, :3].T
        points = self.points @ turn.T + pose[:3, 3]
        moved = points @ self.K[:2].T / points[:, 2:] - self.centres
        return np.einsum("lc,lc->l", moved, self.normals) / self.scale


def _interpolate(values, positions):
    """Values (L, STEPS) of lines at positions (L, N) along them, in segments from the first."""
    positions = positions.clip(0, STEPS - 1)
    left = np.minimum(positions.astype(int), STEPS - 2)
    part = positions - left
    lines = np.arange(len(left))[:, None]
    return (1 - part) * values[lines, left] + part * values[lines, left + 1]


def _find_outline(coverage):
    """Pixels (P, 2) that the outline of a coverage (h, w) passes, evenly spaced: column, row.

    Pixels at the edge of the drawing are left out, because the outline does not end there.
    """
    mask = np.uint8(coverage > 0.5)
    contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    contours = [contour[:, 0] for contour in contours if len(contour) >= MIN_CONTOUR]
    if not contours:
        return np.zeros((0, 2), int)

    count = sum(len(contour) for contour in contours)
    pixels = np.concatenate(contours)[:: max(1, count // COUNT)]
    last = np.array(coverage.shape[::-1]) - 1
    return pixels[(np.minimum(pixels, last - pixels) >= 2).all(1)]


def _slope_kernel():
    """(25, 2): the sum of 5 x 5 pixels times this is their slope to the right and down."""
    offsets = np.arange(-2, 3)
    smooth = np.exp(-(offsets**2) / 2.0)
    right = np.outer(smooth, offsets * smooth)
    return np.float32(np.stack([right.ravel(), right.T.ravel()], axis=1))


_SLOPE_KERNEL = _slope_kernel()


def _outward(coverage, pixels):
    """Unit normals (P, 2) of the outline of a coverage (h, w) at pixels (P, 2), outward."""
    width = coverage.shape[1]
    offsets = np.arange(-2, 3)
    patch = (width * offsets[:, None] + offsets).ravel()
    around = coverage.ravel()[(width * pixels[:, 1] + pixels[:, 0])[:, None] + patch]
    normals = -(around @ _SLOPE_KERNEL).astype(float)
    return normals / (np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9)


def _settle(coverage, pixels, normals, scale):
    """Find the outline of a coverage (h, w) near the centres of some pixels (P, 2).

    Returns how far outward along the normals it is (P,), in pixels, and whether the line there is
    free (P,): all inside on one side of the outline, and all outside on the other.
    """
    reach = FREE_STEPS * scale
    offsets = np.arange(-reach, reach + 1)
    covered = _look_up(coverage, pixels + 0.5, normals, offsets, cv2.INTER_LINEAR)
    inside = covered[:, : reach - 1].min(1) > 0.8
    outside = covered[:, reach + 2 :].max(1) < 0.2
    # The sum over a step from 1 to 0 says where the step is.
    return covered.sum(1) - (reach + 0.5), inside & outside


def _look_up(picture, centres, normals, offsets, interpolation):
    """A picture along lines: (L, N) or (L, N, C) at offsets (N,) pixels from centres (L, 2)."""
    positions = centres[:, None] + offsets[:, None] * normals[:, None]
    positions = np.float32(positions - 0.5)  # OpenCV counts from the centre of the first pixel
    return cv2.remap(picture, positions, None, interpolation, borderMode=cv2.BORDER_REPLICATE)


def _rounding(centres, normals, offsets):
    """How far outward (L, N) the centres of the pixels lie that `_look_up` takes as the nearest.

    In units of the normals (L, 2), which need not have length one.
    """
    positions = centres[:, None] + offsets[:, None] * normals[:, None]
    rounded = np.floor(positions) + 0.5 - positions
    squared = (normals * normals).sum(1)
    return np.einsum("lnc,lc->ln", rounded, normals / squared[:, None])


def _locate(posterior):
    """Where on lines (L, STEPS) the outline lies: mean and variance (L,) of its distance.

    Source: SRT3D, equations 5 to 9: the posterior of the distance, with a smoothed step function.
    """
    steps = np.arange(STEP_WIDTH) - (STEP_WIDTH - 1) / 2
    inside = 0.5 - STEP_AMPLITUDE * np.tanh(steps / (2 * STEP_SLOPE))
    count = STEPS - STEP_WIDTH + 1
    density = 1.0
    for i, probability in enumerate(inside):
        part = posterior[:, i : i + count]
        density = density * (1 - probability + (2 * probability - 1) * part)
    density /= density.sum(1, keepdims=True)

    distances = np.arange(count) - (count - 1) / 2
    mean = density @ distances
    variance = density @ np.square(distances) - np.square(mean)
    return mean, np.maximum(variance, MIN_VARIANCE)


def _distance_jacobian(points, position, K, directions):
    """The derivatives (6, L) of distances by a step of `xwing_utils.move_pose`.

    Args:
        points: (L, 3) camera axes, from the position (3,) of the target.
        position: (3,) camera axes.
        K: (3, 3) camera matrix.
        directions: (L, 2) derivatives of the distances by column and row.
    """
    x, y, z = (points + position).T
    across, down = directions.T * [[K[0, 0]], [K[1, 1]]] / z
    along = -(across * x + down * y) / z
    px, py, pz = points.T
    turns = [py * along - pz * down, pz * across - px * along, px * down - py * across]
    return np.stack([*turns, across, down, along])


# ============================================================ the outline of a target


class Outline:
    """What the outline of one target says about its pose.

    Args:
        hull: (V, 3) points around the target, model units.
        diameter: of the target, model units.
        draw_depth: callable, pose (4, 4), K (3, 3), width, height -> depth (height, width), inf
            where the target does not show, such as `LinearShader.draw_depth`.

    Attributes:
        colours: `ColourStatistics`; nothing is known to begin with.
    """

    def __init__(self, hull: np.ndarray, diameter: float, draw_depth: Callable):
        self.colours = ColourStatistics()
        self.hull = hull
        self.diameter = diameter
        self.draw_depth = draw_depth

    def learn(self, image: np.ndarray, pose: np.ndarray, K: np.ndarray) -> None:
        """Learn the colours on both sides of the outline, from a frame whose pose is known.

        Nothing is learnt where too little shows of the target, or of what is around it.

        Args:
            image: (H, W, 3) uint8.
            pose: (4, 4) model -> OpenCV camera.
            K: (3, 3) camera matrix.
        """
        drawn = self._draw(image, pose, K, LEARNING_SPAN, 0)
        if drawn is not None:
            depth, drawn_K = drawn
            self._learn(image, K, np.isfinite(depth), drawn_K)

    def learn_from_lines(self, image: np.ndarray, K: np.ndarray, lines: ContourLines) -> None:
        """Learn the colours on both sides of the outline, where it has been drawn already.

        Args:
            image: (H, W, 3) uint8.
            K: (3, 3) camera matrix.
            lines: `ContourLines` of a drawing at the pose of the frame.
        """
        step = max(1, round(max(lines.coverage.shape) / LEARNING_SPAN))
        target = lines.coverage[::step, ::step] > 0.5
        first = (1 - step) / 2  # the centres of its pixels are those of every few pixels
        self._learn(image, K, target, xu.crop_camera(lines.K, first, first, 1 / step))

    def _learn(self, image, K, target, drawn_K):
        """Learn the colours around a mask (h, w) of the target; drawn_K is its camera matrix."""
        margin = int(RING[1]) + 1
        target = cv2.copyMakeBorder(
            np.uint8(target), margin, margin, margin, margin, cv2.BORDER_CONSTANT
        )
        drawn_K = xu.crop_camera(drawn_K, -margin, -margin)
        sides = [_colours_near(image, K, side, drawn_K) for side in (target, 1 - target)]
        if min(len(colours) for colours in sides) >= MIN_RING:
            self.colours.learn(*sides)

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
        if len(pixels) < MIN_COUNT:
            return None

        normals = _outward(coverage, pixels)
        outward, used = _settle(coverage, pixels, normals, scale)
        centres = pixels + 0.5 + outward[:, None] * normals
        z = depth[pixels[:, 1], pixels[:, 0]].astype(float)

        to_drawing = np.linalg.inv(drawn_K)
        to_frame = K @ to_drawing
        in_frame = centres @ to_frame[:2, :2].T + to_frame[:2, 2]
        along = normals @ to_frame[:2, :2].T
        offsets = np.arange(STEPS * scale) - (STEPS * scale - 1) / 2
        margin = offsets[-1] * np.abs(along)
        used &= ((in_frame >= margin) & (in_frame + margin <= image.shape[1::-1])).all(1)
        used &= np.isfinite(z)
        if np.count_nonzero(used) < MIN_COUNT:
            return None

        in_frame, along = in_frame[used], along[used]
        colours = _look_up(image, in_frame, along, offsets, cv2.INTER_NEAREST)
        posterior = self._segments(colours, scale)
        mean, variance = _locate(posterior)
        rounded = _rounding(in_frame, along, offsets).reshape(-1, STEPS, scale).mean(-1) / scale
        mean = mean + _interpolate(rounded, STEPS // 2 + mean[:, None])[:, 0]
        centres = centres[used]
        normals = normals[used]
        rays = centres @ to_drawing[:, :2].T + to_drawing[:, 2]
        points = rays * z[used, None] - pose[:3, 3]
        return ContourLines(
            pose,
            drawn_K,
            coverage,
            scale,
            points,
            centres,
            normals,
            posterior,
            mean,
            variance,
            _distance_jacobian(points, pose[:3, 3], drawn_K, normals / scale),
        )

    def _segments(self, colours, scale):
        """The posterior (L, STEPS) of segments that have some colours (L, STEPS * scale, 3)."""
        posterior = self.colours.posterior(colours)
        if scale == 1:
            return posterior
        log_odds = np.log(posterior / (1 - posterior)).reshape(-1, STEPS, scale).sum(-1)
        return expit(log_odds)

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
        return self.draw_depth(pose, drawn_K, int(width), int(height)), drawn_K


def _colours_near(image, K, side, drawn_K):
    """Colours (P, 3) of the frame near the edge of one side of an outline, on that side.

    The side is a mask (h, w) of a drawing that has the camera matrix drawn_K.
    """
    distance = cv2.distanceTransform(side, cv2.DIST_L2, 3)
    row, column = np.nonzero((distance > RING[0]) & (distance < RING[1]))
    to_frame = K @ np.linalg.inv(drawn_K)
    pixels = np.stack([column + 0.5, row + 0.5], axis=1) @ to_frame[:2, :2].T + to_frame[:2, 2]
    inside = ((pixels >= 0) & (pixels < image.shape[1::-1])).all(1)
    column, row = pixels[inside].astype(int).T
    return image[row, column]
