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
TEMPLATE_SIDE = 56  # pixels, width of a template before it is cut into cells
ENLARGEMENT = 2  # of the drawing
FINE_DIRECTIONS = 24  # of the drawing's edges, over 180 degrees
DRAWN_STRENGTH = 0.08  # of an edge that counts
DISTANCE = 2.6  # diameters from the camera to the target in the drawings
NUMBERS = 192  # of a template after whitening
INSIDE_WEIGHT = 0.5  # how much fewer edges than elsewhere a surface is to have where none are drawn
RIDGE = 0.1  # of the mean variance of a cell, added to each

# Cells.
CELL_BLUR = 0.6  # pixels, before the slopes are taken
USUAL_SLOPE = 6.0  # grey levels per pixel: the slope of half an edge
DIRECTION_BLUR = 1.2  # pixels, of the amounts of edge
CELL_AVERAGE = 1.66  # pixels, standard deviation of this blur and the average over a cell
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
MAX_OVERLAP = 0.8  # of outline and box that counts
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

        What lies outside the frame is left out. Boxes are dragged by hand, so more than MAX_OVERLAP
        is no better.
        """
        low = low.clip(0, self.frame_size)
        high = high.clip(0, self.frame_size)
        common = np.minimum(high, self.box[2:]) - np.maximum(low, self.box[:2])
        common = common.clip(0).prod(-1)
        union = (high - low).prod(-1) + (self.box[2:] - self.box[:2]).prod() - common
        return np.float32(np.minimum(common / union, MAX_OVERLAP))


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

    To prepare the templates takes 4 to 6 seconds, and a search 2 to 4 seconds.

    Args:
        target: `Target`, or the `Mesh` of one without symmetries.

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
            start = self._refine(field, pose)
            if start is not None:
                overlap = REFINED_OVERLAP_WEIGHT * self._overlap(region, start.pose)
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

    def _refine(self, field, pose):
        """The `Start` at a polished pose after refinement; None where too little shows.

        Where the refinement ends in a local minimum, polishing once more often leaves it.
        """
        found = []
        refined = self.matcher.refine(field, pose)
        if refined is not None:
            found.append(refined)
            polished = self.matcher.polish(field, refined)
            if polished is not None:
                found.append(self.matcher.refine(field, polished[0]))
        starts = [Start(p, self.matcher.agreement(field, p)) for p in found if p is not None]
        return max(starts, key=lambda start: start.edge_agreement, default=None)

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


@dataclasses.dataclass(frozen=True, eq=False)
class _Rolls:
    """What turns a drawing in the picture by R angles, ROLLS of them."""

    matrices: np.ndarray  # (R, 3, 3) rotations about the camera's axis
    row: np.ndarray  # (R, WINDOW, WINDOW) which pixel of the drawing is in the middle of each cell
    column: np.ndarray  # (R, WINDOW, WINDOW)
    directions: np.ndarray  # (R, FINE_DIRECTIONS, DIRECTIONS) what fine directions are after it

    def cells(self, planes):
        """The cells (R, WINDOW, WINDOW, ...) of a drawing (h, w, ...) at all rolls."""
        return planes[self.row, self.column]


def _make_rolls():
    """The `_Rolls` for drawings of TEMPLATE_SIDE pixels."""
    angles = np.arange(ROLLS) * 2 * np.pi / ROLLS
    matrices = Rotation.from_rotvec(angles[:, None] * [0, 0, 1]).as_matrix()

    steps = (np.arange(WINDOW) - WINDOW // 2) * CELL
    places = np.stack(np.meshgrid(steps, steps), -1)  # from the middle
    sources = np.einsum("yxj,rjk->ryxk", places, matrices[:, :2, :2])  # turned back
    pixels = np.floor(sources + TEMPLATE_SIDE / 2).clip(0, TEMPLATE_SIDE - 1).astype(int)

    fine = np.arange(FINE_DIRECTIONS) * np.pi / FINE_DIRECTIONS
    first, second, part = _two_directions(fine + angles[:, None])
    every = np.eye(DIRECTIONS, dtype=np.float32)
    directions = every[first] * (1 - part[..., None]) + every[second] * part[..., None]
    return _Rolls(matrices, pixels[..., 1], pixels[..., 0], directions)


def _draw_templates(model):
    """Draw the target from VIEWS sides, each at ROLLS rolls; T = VIEWS * ROLLS templates.

    Returns the edges (T, WINDOW, WINDOW, DIRECTIONS), the coverage (T, WINDOW, WINDOW), the extents
    (T, 4) of the drawings around the middle (x0, y0, x1, y1), in diagonals, and the rotations
    (T, 3, 3) that a camera sees which looks straight at the target.
    """
    rolls = _make_rolls()
    parts = []
    for direction in xu.fibonacci_sphere(VIEWS):
        facing = Rotation.align_vectors([0, 0, -1], direction)[0].as_matrix()
        drawn = _draw_view(model, facing)
        planes = rolls.cells(_direction_planes(drawn)).reshape(ROLLS, -1, FINE_DIRECTIONS)
        edges = (planes @ rolls.directions).reshape(ROLLS, WINDOW, WINDOW, DIRECTIONS)
        coverage = rolls.cells(_averaged(np.float32(drawn.covered)))
        extents = _extents(drawn.covered, rolls.matrices)
        parts.append((edges, coverage, extents, rolls.matrices @ facing))
    return [np.concatenate(arrays) for arrays in zip(*parts)]


def _draw_view(model, facing):
    """The `Drawn` edges that a camera sees which looks straight at the target."""
    side = ENLARGEMENT * TEMPLATE_SIDE
    focal = ENLARGEMENT * TEMPLATE_SIZE * DISTANCE
    K = np.array([[focal, 0, side / 2], [0, focal, side / 2], [0, 0, 1]])
    pose = np.eye(4)
    pose[:3, :3] = facing
    pose[2, 3] = DISTANCE
    return model.draw(pose, K, side, side)


def _direction_planes(drawn):
    """The amounts of edge of a drawing, averaged over a cell around each pixel of a template.

    Returns (TEMPLATE_SIDE, TEMPLATE_SIDE, FINE_DIRECTIONS) float32.
    """
    row, column = np.nonzero(drawn.strength > DRAWN_STRENGTH)
    amount = np.minimum(drawn.strength[row, column] / MAX_STRENGTH, 1)
    angle = drawn.angle[row, column] % np.pi
    direction = np.rint(angle / np.pi * FINE_DIRECTIONS).astype(int) % FINE_DIRECTIONS
    pixel = row // ENLARGEMENT * TEMPLATE_SIDE + column // ENLARGEMENT

    shape = TEMPLATE_SIDE, TEMPLATE_SIDE, FINE_DIRECTIONS
    index = pixel * FINE_DIRECTIONS + direction
    # An edge is as many pixels wide in the drawing as in a frame.
    planes = np.bincount(index, amount / ENLARGEMENT, minlength=np.prod(shape)).reshape(shape)
    return cv2.GaussianBlur(np.float32(planes), (0, 0), CELL_AVERAGE)


def _averaged(covered):
    """The coverage of a cell around each pixel of a template."""
    size = (TEMPLATE_SIDE, TEMPLATE_SIDE)
    small = cv2.resize(covered, size, interpolation=cv2.INTER_AREA)
    return cv2.blur(small, (CELL, CELL))


def _extents(covered, rotations):
    """The extents (R, 4) of a drawing after some rotations (R, 3, 3), in diagonals."""
    pixels = np.argwhere(covered)
    if len(pixels) == 0:  # a flat target, seen from its edge
        return np.zeros((len(rotations), 4))
    outline = cv2.convexHull(np.int32(pixels[:, ::-1]))[:, 0] + 0.5  # x, y
    places = (outline - covered.shape[0] / 2) / (ENLARGEMENT * TEMPLATE_SIZE)
    rolled = places @ rotations[:, :2, :2].swapaxes(1, 2)
    return np.concatenate([rolled.min(1), rolled.max(1)], 1)


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
    white /= np.linalg.norm(white, axis=0).clip(1e-6)
    size = len(root)
    chosen = [size - NUMBERS, size - 1]  # the greatest eigenvalues
    _, axes = scipy.linalg.eigh(white @ white.T, subset_by_index=chosen)
    projection = scipy.linalg.solve_triangular(root, axes, lower=True, trans="T")
    return np.ascontiguousarray(projection), axes.T @ white
