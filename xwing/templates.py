"""Where a target may be in one frame, from a box that the user drags, without a network.

The edges of the target are drawn from all sides (`edges`). Each drawing is a template, a grid of
cells with an amount of edge in each direction. In the frame, the cells around the box are compared
with all templates at once. A plain correlation would prefer clutter, which has edges everywhere. So
the templates are whitened with the statistics of cells of photographs, as in linear discriminant
analysis, and projected to a few numbers. One product of matrices then compares all templates with
all places. How well the outline of a template fills the box counts as well.

The best templates are poses that are roughly right. Each is polished, and the best of these are
refined on edges. No score says whether the best one is right, so the user chooses.

Source: Hariharan, Malik and Ramanan, Discriminative Decorrelation for Clustering and
    Classification, ECCV 2012 (whitening); Hinterstoisser et al., Model Based Training, Detection
    and Pose Estimation, ACCV 2012 (templates of a mesh from all sides).
"""

import dataclasses
import functools

import cv2
import numpy as np
import scipy.linalg
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing.edges import (
    DIRECTIONS,
    MAX_STRENGTH,
    EdgeField,
    EdgeMatcher,
    Start,
    pose_at,
    strongest_slope,
)
from xwing.mesh import Mesh
from xwing.scenery import photographs

# Templates.
VIEWS = 642  # directions from which the target is drawn
ROLLS = 24  # turns of each drawing in the picture
CELL = 4  # pixels, width of a cell
WINDOW = 13  # cells, width of a template
TEMPLATE_SIZE = 48  # pixels that the target's diagonal spans in a template
DRAWN_SIZE = 96  # pixels that it spans where it is drawn
DRAWN_MARGIN = 0.08  # diagonals around the target where it is drawn
DRAWN_STRENGTH = 0.08  # of an edge that counts
DISTANCE = 2.6  # diameters from the camera to the target in the drawings
NUMBERS = 192  # of a template after whitening
INSIDE_WEIGHT = 0.5  # how much fewer edges than elsewhere a surface is to have where none are drawn
RIDGE = 0.1  # of the mean variance of a cell, added to each

# Cells.
CELL_BLUR = 0.6  # pixels, before the slopes are taken
USUAL_SLOPE = 6.0  # grey levels per pixel: the slope of half an edge
DIRECTION_BLUR = 1.2  # pixels, of the amounts of edge
NORMALISED_ENERGY = 0.15  # of the cells around: with more, the amounts are relative
FULL_CELL = 0.5  # sum of the amounts of a cell that is full of edges
PHOTOGRAPH_WIDTHS = 256, 128, 64  # pixels

# Search.
MIN_BOX = 12  # pixels, width and height
SIZES = np.geomspace(0.95, 2.0, 9)  # of the target's diagonal, in greater sides of the box
MAX_OFFSET = 0.2  # greater sides of the box from its middle to that of the target
PADDING = 0.35  # greater sides of the box that are searched around it
FIELD_SIZE = 125  # pixels that the greater side of the box spans where edges are compared, at most
MAX_POLISHED = 110  # templates that are polished
TEMPLATE_ANGLE = 13.0  # degrees between two of them
MAX_REFINED = 16  # polished poses that are refined
POLISHED_ANGLE = 12.0  # degrees between two of them

# What counts beside the edge agreement of a pose, as long as it is one of many.
OVERLAP_WEIGHT = 10.0  # of the overlap of outline and box, against the score of a template
SCORE_WEIGHT = 0.02  # of both, against the agreement of a polished pose
POLISHED_OVERLAP_WEIGHT = 0.5  # of the overlap of a polished pose
REFINED_OVERLAP_WEIGHT = 0.2  # of the overlap of a refined pose


# ============================================================ cells of a frame


def _cells(picture):
    """The amount of edge in each cell and direction of a picture (h, w, 3) uint8.

    Returns (h // CELL, w // CELL, DIRECTIONS) float32. The amount saturates with the contrast.
    """
    picture = cv2.GaussianBlur(np.float32(picture), (0, 0), CELL_BLUR)
    strength, angle = strongest_slope(picture)
    amount = strength / (strength + USUAL_SLOPE)
    first, second, part = _two_directions(angle)

    height, width = amount.shape
    row, column = np.indices(amount.shape)
    planes = np.zeros((height, width, DIRECTIONS), np.float32)
    planes[row, column, first] = amount * (1 - part)
    planes[row, column, second] += amount * part

    rows, columns = height // CELL, width // CELL
    planes = cv2.GaussianBlur(planes, (0, 0), DIRECTION_BLUR)[: rows * CELL, : columns * CELL]
    cells = cv2.resize(planes, (columns, rows), interpolation=cv2.INTER_AREA)
    return _normalised(cells)


def _two_directions(angles):
    """The two directions that angles lie between, and how much of the second they are."""
    place = angles % np.pi / np.pi * DIRECTIONS
    first = np.floor(place).astype(int)
    return first % DIRECTIONS, (first + 1) % DIRECTIONS, np.float32(place - first)


def _normalised(cells):
    """Cells (h, w, DIRECTIONS) relative to the amount of edge around each."""
    energy = np.square(cells).sum(-1)
    energy = cv2.GaussianBlur(energy, (0, 0), 1.0, borderType=cv2.BORDER_REFLECT)
    return np.minimum(cells / np.sqrt(energy + NORMALISED_ENERGY)[..., None], 1)


@dataclasses.dataclass(frozen=True, eq=False)
class _Background:
    """The statistics of cells of photographs, which do not depend on the place in a picture."""

    mean: np.ndarray  # (DIRECTIONS,) float32
    root: np.ndarray  # (C, C) Cholesky factor of the covariance of a window's cells, float32


@functools.lru_cache
def _background():
    """The `_Background` of the photographs, at several sizes."""
    maps = [_cells(_with_width(picture, w)) for picture in photographs() for w in PHOTOGRAPH_WIDTHS]
    mean = np.concatenate([cells.reshape(-1, DIRECTIONS) for cells in maps]).mean(0)
    products, counts = map(sum, zip(*[_autocorrelation(cells - mean) for cells in maps]))

    row, column = np.divmod(np.arange(WINDOW**2), WINDOW)
    down = row - row[:, None] + WINDOW - 1
    right = column - column[:, None] + WINDOW - 1
    covariance = (products / counts[..., None, None])[down, right]
    size = WINDOW**2 * DIRECTIONS
    covariance = covariance.transpose(0, 2, 1, 3).reshape(size, size)
    covariance = (covariance + covariance.T) / 2
    covariance += RIDGE * np.trace(covariance) / size * np.eye(size)
    return _Background(np.float32(mean), np.float32(np.linalg.cholesky(covariance)))


def _with_width(picture, width):
    """A picture shrunk or enlarged to a width in pixels."""
    height = round(width * picture.shape[0] / picture.shape[1])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def _autocorrelation(cells):
    """Sums of products of cells, and their numbers, for all distances within a WINDOW.

    Returns (2 WINDOW - 1, 2 WINDOW - 1, DIRECTIONS, DIRECTIONS) and the first two axes alone: the
    distance in rows, that in columns, the direction of the first cell and of the second.
    """
    reach = WINDOW - 1
    shape = cells.shape[0] + reach, cells.shape[1] + reach
    spectrum = np.fft.rfft2(cells, shape, axes=(0, 1))
    ones = np.fft.rfft2(np.ones(cells.shape[:2]), shape)
    rows = np.arange(-reach, reach + 1)[:, None]
    columns = np.arange(-reach, reach + 1)
    inside = (np.abs(rows) < cells.shape[0]) & (np.abs(columns) < cells.shape[1])

    counts = np.fft.irfft2(ones.conj() * ones, shape)[rows, columns] * inside
    products = np.empty((*inside.shape, DIRECTIONS, DIRECTIONS))
    for direction in range(DIRECTIONS):
        cross = spectrum[..., direction, None].conj() * spectrum
        products[:, :, direction] = np.fft.irfft2(cross, shape, axes=(0, 1))[rows, columns]
    return products * inside[..., None, None], counts


# ============================================================ search


@dataclasses.dataclass(frozen=True, eq=False)
class _Region:
    """A frame, and the box in which the target is."""

    image: np.ndarray  # (H, W, 3) uint8
    K: np.ndarray  # (3, 3) pixels
    box: np.ndarray  # (4,) x0, y0, x1, y1 in pixels, within the frame

    @property
    def frame_size(self):
        """(2,) width and height of the frame."""
        return np.array(self.image.shape[1::-1])

    @property
    def side(self):
        """The greater side of the box, pixels."""
        return max(self.box[2:] - self.box[:2])

    @property
    def padded(self):
        """The box with a margin; it may reach beyond the frame."""
        return self.box + PADDING * self.side * np.array([-1, -1, 1, 1])

    def windows(self, size):
        """Cells around the middle of the box where the target's diagonal spans `size` pixels.

        Returns the middles (P, 2) of windows, in pixels of the frame, and their cells (P, C).
        """
        low = np.floor(self.padded[:2]).clip(0, self.frame_size).astype(int)
        high = np.ceil(self.padded[2:]).clip(0, self.frame_size).astype(int)
        part = self.image[low[1] : high[1], low[0] : high[0]]
        shape = np.maximum(np.rint((high - low) * TEMPLATE_SIZE / size).astype(int), 2 * CELL)
        factors = (high - low) / shape
        kind = cv2.INTER_AREA if factors.max() > 1 else cv2.INTER_LINEAR
        cells = _cells(cv2.resize(part, shape.tolist(), interpolation=kind))

        row, column = np.indices(cells.shape[:2]).reshape(2, -1)
        middles = (np.column_stack([column, row]) + 0.5) * CELL * factors + low
        offset = np.abs(middles - (self.box[:2] + self.box[2:]) / 2).max(1)
        near = offset < max(MAX_OFFSET * self.side, CELL * factors.max())
        return middles[near], _windows_of(cells, row[near], column[near])

    def overlaps(self, low, high):
        """Intersection over union (...,) of the box and others with corners (..., 2) each.

        What lies outside the frame is left out.
        """
        low = low.clip(0, self.frame_size)
        high = high.clip(0, self.frame_size)
        common = np.minimum(high, self.box[2:]) - np.maximum(low, self.box[:2])
        common = common.clip(0).prod(-1)
        union = (high - low).prod(-1) + (self.box[2:] - self.box[:2]).prod() - common
        return np.float32(common / union)


def _windows_of(cells, row, column):
    """Windows (P, C) of cells about some places (P,), less the mean; 0 beyond the picture."""
    half = WINDOW // 2
    padded = np.pad(cells - _background().mean, ((half, half), (half, half), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (WINDOW, WINDOW), (0, 1))
    return windows[row, column].transpose(0, 2, 3, 1).reshape(len(row), -1)


def _check_box(box, image):
    """The box as an array (4,), cut at the frame's border; ValueError where it is none."""
    expected = "expected (x0, y0, x1, y1) in pixels"
    box = np.asarray(box, float)
    if box.shape != (4,) or not np.isfinite(box).all():
        raise ValueError(f"box: {expected}, got {box.tolist()}")
    if (box[2:] <= box[:2]).any():
        raise ValueError(f"box: {expected} with x0 < x1 and y0 < y1, got {box.tolist()}")

    height, width = image.shape[:2]
    inside = box.clip(0, [width, height, width, height])
    if (inside[2:] - inside[:2] < MIN_BOX).any():
        raise ValueError(
            f"box: {expected} with at least {MIN_BOX} by {MIN_BOX} of them in the frame of "
            f"{width}x{height}, got {box.tolist()}; drag it around the target"
        )
    return inside


class Templates:
    """Finds a target in a box of a frame, without a network.

        templates = Templates(target)
        starts = templates.find(image, K, box)

    To prepare the templates takes 6 to 10 seconds, and a search 1 to 4 seconds.

    Args:
        target: `Target`, or the `Mesh` of one without declared symmetries.

    Attributes:
        matcher: `EdgeMatcher` of the target.
    """

    def __init__(self, target: xu.Target | Mesh):
        self.matcher = EdgeMatcher(target)
        edges, coverage, self._extents, self._rotations = _draw_templates(self.matcher.model)
        self._projection, self._templates = _whiten(edges, coverage, _background())

    def find(
        self, image: np.ndarray, K: np.ndarray, box: np.ndarray, count: int = 5
    ) -> list[Start]:
        """Find poses at which the target may be in a box.

        Args:
            image: (H, W, 3) uint8.
            K: (3, 3) pixels.
            box: (x0, y0, x1, y1) pixels, around what shows of the target.
            count: how many poses are returned at most.

        Returns:
            `Start`s whose contrast is not measured. The first one has the best edge agreement and
            fills the box best. Poses that differ by a symmetry of the target count as one.

        Raises:
            ValueError: the box is reversed, too small, or outside the frame.
        """
        region = _Region(image, xu.check_camera_matrix(K), _check_box(box, image))
        field = EdgeField(image, region.K, region.padded, FIELD_SIZE / region.side)
        ranked = []
        for pose in self._polish(region, field, self._search(region)):
            pose = self.matcher.refine(field, pose)
            if pose is None:
                continue
            start = Start(pose, self.matcher.agreement(field, pose))
            overlap = REFINED_OVERLAP_WEIGHT * self._overlap(region, pose)
            ranked.append((start.edge_agreement + overlap, start))
        ranked.sort(key=lambda item: -item[0])
        return self._distinct([start for _, start in ranked], count)

    def _search(self, region):
        """(score, pose) of the templates that fit best, MAX_POLISHED at most, the best first."""
        scores = np.full(len(self._rotations), -np.inf, np.float32)
        places = np.zeros((len(scores), 3))  # x, y, and pixels that the diagonal spans
        for size in SIZES * region.side:
            middles, windows = region.windows(size)
            fits = windows @ self._projection @ self._templates
            low = middles[:, None] + size * self._extents[:, :2]
            high = middles[:, None] + size * self._extents[:, 2:]
            fits += OVERLAP_WEIGHT * region.overlaps(low, high)
            best = fits.argmax(0)
            fits = np.take_along_axis(fits, best[None], 0)[0]
            better = fits > scores
            scores[better] = fits[better]
            places[better, :2] = middles[best[better]]
            places[better, 2] = size

        return [(scores[i], self._pose(i, places[i], region.K)) for i in self._spread(scores)]

    def _pose(self, template, place, K):
        """The pose (4, 4) of a template at a place (3,): x, y, and the diagonal in pixels."""
        depth = K[0, 0] / place[2]
        pose = pose_at(place[:2], depth, self._rotations[template], K)
        return self.matcher.model.to_model(pose)

    def _spread(self, scores):
        """Rows of the best templates, none closer than TEMPLATE_ANGLE to a better one."""
        flat = self._rotations.reshape(-1, 9)
        limit = 1 + 2 * np.cos(np.radians(TEMPLATE_ANGLE))  # trace of a rotation by this angle
        left = scores.copy()
        rows = []
        while len(rows) < MAX_POLISHED and left.max() > -np.inf:
            rows.append(int(left.argmax()))
            left[flat @ flat[rows[-1]] > limit] = -np.inf
        return rows

    def _polish(self, region, field, candidates):
        """Polished poses, MAX_REFINED at most, the best first, none close to a better one."""
        polished = []
        for score, pose in candidates:
            found = self.matcher.polish(field, pose)
            if found is not None:
                pose, agreement = found
                overlap = POLISHED_OVERLAP_WEIGHT * self._overlap(region, pose)
                polished.append((agreement + overlap + SCORE_WEIGHT * score, pose))
        polished.sort(key=lambda item: -item[0])

        kept = []
        for _, pose in polished:
            if all(xu.rotation_error(pose, other) > POLISHED_ANGLE for other in kept):
                kept.append(pose)
        return kept[:MAX_REFINED]

    def _overlap(self, region, pose):
        """The overlap of a box and the outline at a pose."""
        working = self.matcher.model.to_working(pose)
        pixels = xu.project_pose(self.matcher.model.extremes, working, region.K)
        return float(region.overlaps(pixels.min(0), pixels.max(0)))

    def _distinct(self, starts, count):
        """The first starts, `count` at most, without those that are about the same as another."""
        kept = []
        for start in starts:
            if len(kept) == count:
                break
            if not any(self.matcher.is_same(start.pose, other.pose) for other in kept):
                kept.append(start)
        return kept


# ============================================================ templates


def _draw_templates(model):
    """Draw the target from VIEWS sides, each rolled by ROLLS turns; T = VIEWS * ROLLS templates.

    Returns the edges (T, WINDOW, WINDOW, DIRECTIONS), the coverage (T, WINDOW, WINDOW), the extents
    (T, 4) of the drawings around the middle (x0, y0, x1, y1), in diagonals, and the rotations
    (T, 3, 3) that a camera sees which looks straight at the target.
    """
    angles = np.arange(ROLLS) * 2 * np.pi / ROLLS
    rolls = Rotation.from_rotvec(angles[:, None] * [0, 0, 1]).as_matrix()
    parts = []
    for direction in xu.fibonacci_sphere(VIEWS):
        facing = Rotation.align_vectors([0, 0, -1], direction)[0].as_matrix()
        drawn = _draw_view(model, facing)
        coverage, extents = _rolled_coverage(drawn, angles)
        parts.append((_rolled_edges(drawn, angles), coverage, extents, rolls @ facing))
    return [np.concatenate(arrays) for arrays in zip(*parts)]


def _draw_view(model, facing):
    """The `Drawn` edges that a camera sees which looks straight at the target."""
    width = round((1 + 2 * DRAWN_MARGIN) * DRAWN_SIZE)
    focal = DRAWN_SIZE * DISTANCE
    K = np.array([[focal, 0, width / 2], [0, focal, width / 2], [0, 0, 1]])
    pose = np.eye(4)
    pose[:3, :3] = facing
    pose[2, 3] = DISTANCE
    return model.draw(pose, K, width, width)


def _rolled_edges(drawn, rolls):
    """The edges (R, WINDOW, WINDOW, DIRECTIONS) of a drawing at some rolls (R,), radians."""
    shown = drawn.strength > DRAWN_STRENGTH
    amounts = np.minimum(drawn.strength[shown] / MAX_STRENGTH, 1)
    cells = _rolled_cells(shown, rolls) - 0.5  # from the middle of the first one
    corner = np.floor(cells).astype(int)
    part = cells - corner
    first, second, share = _two_directions(drawn.angle[shown] + rolls[:, None])
    number = np.arange(len(rolls))[:, None]

    total = np.zeros(len(rolls) * WINDOW**2 * DIRECTIONS)
    for dy, dx in np.ndindex(2, 2):  # the four cells around
        x = corner[..., 0] + dx
        y = corner[..., 1] + dy
        weight = amounts * np.abs(1 - dx - part[..., 0]) * np.abs(1 - dy - part[..., 1])
        inside = (x >= 0) & (y >= 0) & (x < WINDOW) & (y < WINDOW)
        cell = ((number * WINDOW + y) * WINDOW + x) * DIRECTIONS
        for direction, weights in ((first, weight * (1 - share)), (second, weight * share)):
            index = (cell + direction)[inside]
            total += np.bincount(index, weights[inside], minlength=len(total))

    # An edge is as many pixels wide here as in a frame, where a pixel is a larger part of a cell.
    total *= 2 * TEMPLATE_SIZE / DRAWN_SIZE / CELL**2
    return np.float32(total.reshape(len(rolls), WINDOW, WINDOW, DIRECTIONS))


def _rolled_coverage(drawn, rolls):
    """The coverage (R, WINDOW, WINDOW) of a drawing at some rolls, and its extents (R, 4)."""
    middle = WINDOW / 2
    cells = _rolled_cells(drawn.covered, rolls)
    extents = np.concatenate([cells.min(1), cells.max(1)], 1) - middle
    x, y = cells.astype(int).clip(0, WINDOW - 1).transpose(2, 0, 1)
    index = (np.arange(len(rolls))[:, None] * WINDOW + y) * WINDOW + x
    counts = np.bincount(index.ravel(), minlength=len(rolls) * WINDOW**2)
    full = (CELL * DRAWN_SIZE / TEMPLATE_SIZE) ** 2  # pixels of a cell
    coverage = (counts / full).reshape(len(rolls), WINDOW, WINDOW).clip(0, 1)
    return np.float32(coverage), extents * CELL / TEMPLATE_SIZE


def _rolled_cells(shown, rolls):
    """Where the pixels that are shown (h, w) lie at some rolls: (R, P, 2) cells from the corner."""
    row, column = np.nonzero(shown)
    places = (np.column_stack([column, row]) + 0.5 - shown.shape[0] / 2) / DRAWN_SIZE
    cosine, sine = np.cos(rolls), np.sin(rolls)
    matrices = np.array([[cosine, sine], [-sine, cosine]]).transpose(2, 0, 1)  # for row vectors
    return places @ matrices * (TEMPLATE_SIZE / CELL) + WINDOW / 2


def _whiten(edges, coverage, background):
    """Make filters of templates that tell the target from clutter, in few numbers.

    Returns the projection (C, NUMBERS) of a window's cells less their mean, and the templates
    (NUMBERS, T). The product of window, projection and templates is the score.
    """
    edges = np.stack([_normalised(one) for one in edges])

    # What lies outside the target is unknown: clutter as usual. Inside there is less of it.
    amount = (edges.sum(-1, keepdims=True) / FULL_CELL).clip(0, 1)
    inside = np.maximum(coverage[..., None], amount)
    known = INSIDE_WEIGHT * inside + (1 - INSIDE_WEIGHT) * amount
    signal = (edges - known * background.mean).reshape(len(edges), -1)

    root = background.root
    white = scipy.linalg.solve_triangular(root, signal.T, lower=True)
    white /= np.linalg.norm(white, axis=0)
    size = len(root)
    chosen = [size - NUMBERS, size - 1]  # the greatest eigenvalues
    _, axes = scipy.linalg.eigh(white @ white.T, subset_by_index=chosen)
    projection = scipy.linalg.solve_triangular(root, axes, lower=True, trans="T")
    return np.ascontiguousarray(projection), axes.T @ white
