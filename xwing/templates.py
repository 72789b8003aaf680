"""Where a target may be in one frame, from a box that the user drags, without a network.

The edges of the target are drawn from all sides: its outline, its creases, jumps of its depth, and
where its colours change. Each drawing is a template, a grid of cells with an amount of edge in each
direction. In the frame, the cells around the box are compared with all templates at once. A plain
correlation would prefer clutter, which has edges everywhere. So the templates are whitened with
the statistics of cells of photographs, as in linear discriminant analysis. They are then projected
to a few numbers, and all of them are compared by a product of matrices.

The best templates are poses that are roughly right. Each is moved in the picture until its edges
are nearest to edges of the frame in the same direction (directional chamfer matching). The best of
these are refined in all six unknowns by Gauss-Newton on the same distances. How near the edges are
then is the edge agreement of a pose. It ranks poses of one frame well. It does not say whether the
best one is right, so the user chooses.

Inside, the target's bounding box has its middle at the origin and a diagonal of 1, so nothing
depends on the unit of the mesh.

Source: Hariharan, Malik and Ramanan, Discriminative Decorrelation for Clustering and
    Classification, ECCV 2012 (whitened templates); Liu, Tuzel, Veeraraghavan and Chellappa, Fast
    Directional Chamfer Matching, CVPR 2010; Hinterstoisser et al., ACCV 2012 (templates of a mesh).
"""

import dataclasses
import functools

import cv2
import numpy as np
import scipy.linalg
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing.mesh import NEAR, Mesh, load_mesh, rasterise, triangle_normals
from xwing.metrics import mssd_error, symmetry_transforms
from xwing.scenery import photographs

DIRECTIONS = 8  # of edges, over 180 degrees

# Edges of a drawing. A step of 1 in a layer is an edge of strength 0.5.
NORMAL_WEIGHT = 0.5  # of the layers of the surface's normal, against that of the outline
COLOUR_WEIGHT = 0.7  # of the layers of the materials' colours
MAX_STRENGTH = 0.4  # of an edge: the outline's and a sharp crease's
MIN_STRENGTH = 0.12  # of an edge that counts
MIN_DEPTH_JUMP = 0.03  # diameters between neighbouring pixels
MIN_EDGE_POINTS = 20  # of a drawing that says anything
EXTREMES = 200  # directions in which the furthest point bounds a drawing

# Templates.
VIEWS = 642  # directions from which the target is drawn
ROLLS = 24  # turns of each drawing in the picture
CELL = 4  # pixels, width of a cell
WINDOW = 13  # cells, width of a template
TEMPLATE_SIZE = 48  # pixels that the target's diagonal spans in a template
DRAWN_SIZE = 96  # pixels that it spans where it is drawn
DISTANCE = 2.6  # diameters from the camera to the target in the drawings
NUMBERS = 192  # of a template after whitening
INSIDE_WEIGHT = 0.5  # how much fewer edges than elsewhere a surface without edges is to have
RIDGE = 0.1  # fraction of the mean variance of a number of a cell that is added to each

# Search.
MIN_BOX = 12  # pixels, width and height
SIZES = np.geomspace(0.95, 2.0, 9)  # of the diagonal, in greater sides of the box
MAX_OFFSET = 0.2  # greater sides of the box between its middle and that of the target
PADDING = 0.35  # greater sides of the box that are searched around it
BOX_WEIGHT = 10.0  # of the overlap of drawing and box, against the score of a template
REFINED_BOX_WEIGHT = 0.2  # the same, against the edge agreement
MAX_POLISHED = 110  # templates that are polished
TEMPLATE_ANGLE = 13.0  # degrees between two templates that are polished
MAX_REFINED = 12  # polished poses that are refined
POLISHED_ANGLE = 12.0  # degrees between two of them

# Distances to edges.
FIELD_SIZE = 150  # pixels that the target's diagonal spans where distances are measured, at most
FIELD_MARGIN = 0.4  # diagonals of the target around it
MAX_EDGE_DISTANCE = 10.0  # pixels: an edge further away is none
DIRECTION_COST = 2.5  # pixels that an edge in the next direction counts as further away
CAUCHY_DISTANCE = 2.5  # pixels, of the robust cost
MAX_POINTS = 250  # of a drawing that are compared with a frame
MAX_STEPS = 15  # of Gauss-Newton
STEPS_PER_DRAWING = 3

# Equal poses.
SAME_DISTANCE = 0.12  # diameters that points of the surface are apart at most under one pose
SYMMETRY_DISTANCE = 0.04  # diameters by which a symmetry may miss the surface
SYMMETRY_STEPS = 10  # of the search for a symmetry
SURFACE_POINTS = 6000
COMPARED_POINTS = 300


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """A pose that a track may start from, and what the frame says about it."""

    pose: np.ndarray  # (4, 4) model -> OpenCV camera
    edge_agreement: float  # 0 to 1: how near the drawing's edges are to those of the frame
    explained_contrast: float = np.nan  # fraction, see `Aligner.track`; NaN: not measured


# ============================================================ edges of a drawing


@dataclasses.dataclass(frozen=True, eq=False)
class _Edges:
    """The edges of a drawing as points, each with the direction in which the picture changes."""

    points: np.ndarray  # (P, 3) on the surface, model axes
    angles: np.ndarray  # (P,) radians, from x towards y
    weights: np.ndarray  # (P,)

    @property
    def directions(self):
        """(P,) the nearest of the DIRECTIONS."""
        return _nearest_direction(self.angles)

    def thinned(self, count):
        """At most `count` of the points, evenly chosen."""
        if len(self.angles) <= count:
            return self
        kept = np.linspace(0, len(self.angles) - 1, count).astype(int)
        return _Edges(self.points[kept], self.angles[kept], self.weights[kept])


class _EdgeModel:
    """A mesh whose edges are drawn; the middle of its bounding box is at 0, its diagonal is 1."""

    def __init__(self, mesh):
        corners = mesh.vertices[np.unique(mesh.faces)]
        self.centre = (corners.min(0) + corners.max(0)) / 2
        self.diameter = mesh.diameter
        furthest = (corners @ xu.fibonacci_sphere(EXTREMES).T).argmax(0)
        self.extremes = (corners[np.unique(furthest)] - self.centre) / self.diameter

        normals = triangle_normals(mesh.triangles)
        length = np.linalg.norm(normals, axis=1)
        has_area = length > 0
        self.normals = np.float32(normals[has_area] / length[has_area, None])
        self.triangles = np.float32((mesh.triangles[has_area] - self.centre) / self.diameter)
        self.offsets = (self.normals * self.triangles[:, 0]).sum(1)  # of their planes
        materials = mesh.face_materials[has_area]
        self.colours = np.float32(mesh.colours[materials]) if len(mesh.colours) > 1 else None

    def to_working(self, pose):
        """A pose (4, 4) in model units as one of this model."""
        moved = pose.copy()
        moved[:3, 3] += pose[:3, :3] @ self.centre
        return xu.scale_pose(moved, 1 / self.diameter)

    def to_model(self, pose):
        """The inverse of `to_working`."""
        moved = xu.scale_pose(pose, self.diameter)
        moved[:3, 3] -= pose[:3, :3] @ self.centre
        return moved

    def draw(self, pose, K, width, height):
        """Draw the edges at a pose.

        Returns the coverage (h, w) bool, the depth (h, w), and the strength and the angle of the
        edge (h, w) at each pixel.
        """
        ids, depth = rasterise(self.triangles, pose, K, width, height, NEAR)
        covered = ids >= 0
        layers = self._layers(ids, covered, pose)
        strength, angle = _strongest_slope(layers)

        jump_strength, jump_angle = _depth_jumps(depth, covered)
        is_jump = jump_strength > strength
        strength = np.where(is_jump, jump_strength, strength)
        return covered, depth, strength, np.where(is_jump, jump_angle, angle)

    def _layers(self, ids, covered, pose):
        """What may change at an edge, (h, w, C): coverage, normals and colours.

        Outside the target, normals and colours are continued. Otherwise the outline would be
        stronger where they are large.
        """
        eye = -pose[:3, :3].T @ pose[:3, 3]
        away = np.float32(self.normals @ eye) < self.offsets
        signs = np.where(away, np.float32(-1), np.float32(1))[ids]
        values = [NORMAL_WEIGHT * signs[..., None] * self.normals[ids]]
        if self.colours is not None:
            values.append(COLOUR_WEIGHT * self.colours[ids])

        coverage = np.float32(covered)
        inner = np.concatenate(values, -1) * coverage[..., None]
        nearby = cv2.blur(inner, (5, 5)) / np.maximum(cv2.blur(coverage, (5, 5)), 1e-6)[..., None]
        filled = np.where(covered[..., None], inner, nearby)
        return np.concatenate([coverage[..., None], filled], -1)

    def edges(self, pose, K, size):
        """The `_Edges` of a drawing in which the diagonal spans `size` pixels.

        None where too little shows or the target is not in front of the camera.
        """
        if not pose[2, 3] > 0.5 + NEAR:
            return None
        window, width = _window(pose, K, size)
        _, depth, strength, angle = self.draw(pose, window, width, width)
        row, column = _thin_edges(strength, angle)

        # An edge belongs to the nearer of the surfaces on its sides.
        depth = cv2.erode(depth, np.ones((3, 3)), borderType=cv2.BORDER_REPLICATE)
        z = depth[row, column]
        known = np.isfinite(z)
        row, column, z = row[known], column[known], z[known]
        if len(z) < MIN_EDGE_POINTS:
            return None

        rays = np.column_stack([column + 0.5, row + 0.5, np.ones(len(z))]) @ np.linalg.inv(window).T
        points = (rays * z[:, None] - pose[:3, 3]) @ pose[:3, :3]
        weights = np.minimum(strength[row, column], MAX_STRENGTH)
        return _Edges(points, angle[row, column], weights)


def _window(pose, K, size, margin=0.12):
    """K of a square picture of the target, in which its diagonal spans `size`, and its width."""
    width = round(size * (1 + 2 * margin))
    scale = size * pose[2, 3] / K[0, 0]
    x, y = _project(pose[None, :3, 3], K)[0]
    half = width / 2 / scale
    return xu.crop_camera(K, x - half, y - half, scale), width


def _project(points, K):
    """Points (..., 3) in camera axes as pixels (..., 2)."""
    return points @ K[:2].T / points[..., 2:]


def _slopes(picture):
    """The derivatives of a picture by x and y, per pixel."""
    return cv2.Sobel(picture, -1, 1, 0) / 8, cv2.Sobel(picture, -1, 0, 1) / 8


def _strongest_slope(picture):
    """The length and the angle (h, w) of the steepest slope among the layers (h, w, C)."""
    x, y = _slopes(picture)
    steepest = (x * x + y * y).argmax(-1)[..., None]
    x = np.take_along_axis(x, steepest, -1)[..., 0]
    y = np.take_along_axis(y, steepest, -1)[..., 0]
    return np.hypot(x, y), np.arctan2(y, x)


def _depth_jumps(depth, covered):
    """The strength and the angle (h, w) of edges at which a surface hides one of the target.

    The second derivative tells them from surfaces that are seen at a flat angle.
    """
    background = depth[covered].max() if covered.any() else 0
    filled = np.where(covered, depth, np.float32(background))
    x, y = _slopes(filled)
    inside = cv2.erode(np.uint8(covered), np.ones((3, 3)), borderValue=0) > 0
    jumps = inside & (np.abs(cv2.Laplacian(filled, -1)) > MIN_DEPTH_JUMP)
    return np.where(jumps, np.float32(MAX_STRENGTH), 0), np.arctan2(y, x)


def _thin_edges(strength, angle, minimum=MIN_STRENGTH):
    """Rows and columns of the pixels at which the strength is greatest across the edge."""
    height, width = strength.shape
    row, column = np.nonzero(strength > minimum)
    inside = (row > 0) & (column > 0) & (row < height - 1) & (column < width - 1)
    row, column = row[inside], column[inside]

    dx = np.rint(np.cos(angle[row, column])).astype(int)
    dy = np.rint(np.sin(angle[row, column])).astype(int)
    here = strength[row, column]
    peak = here >= strength[row + dy, column + dx]
    peak &= here > strength[row - dy, column - dx]
    return row[peak], column[peak]


def _nearest_direction(angles):
    """The nearest of the DIRECTIONS to some angles; an angle and its opposite are the same."""
    return np.rint(angles % np.pi / np.pi * DIRECTIONS).astype(int) % DIRECTIONS


def _two_directions(angles):
    """The two directions that angles lie between, and how much of the second they are."""
    place = angles % np.pi / np.pi * DIRECTIONS
    first = np.floor(place).astype(int)
    return first % DIRECTIONS, (first + 1) % DIRECTIONS, np.float32(place - first)


# ============================================================ cells of a frame


def _cells(picture):
    """The amount of edge in each cell and direction of a picture (h, w, 3) uint8.

    Returns (h // CELL, w // CELL, DIRECTIONS) float32. The amount saturates with the contrast.
    """
    picture = cv2.GaussianBlur(np.float32(picture), (0, 0), 0.6)
    strength, angle = _strongest_slope(picture)
    amount = strength / (strength + 6)  # grey levels per pixel: less is noise
    first, second, part = _two_directions(angle)

    height, width = amount.shape
    row, column = np.indices(amount.shape)
    planes = np.zeros((height, width, DIRECTIONS), np.float32)
    planes[row, column, first] = amount * (1 - part)
    planes[row, column, second] += amount * part

    rows, columns = height // CELL, width // CELL
    planes = cv2.GaussianBlur(planes, (0, 0), 1.2)[: rows * CELL, : columns * CELL]
    cells = cv2.resize(planes, (columns, rows), interpolation=cv2.INTER_AREA)
    return _normalised(cells)


def _normalised(cells):
    """Cells (h, w, DIRECTIONS) relative to the amount of edge around each."""
    energy = np.square(cells).sum(-1)
    energy = cv2.GaussianBlur(energy, (0, 0), 1.0, borderType=cv2.BORDER_REFLECT)
    return np.minimum(cells / np.sqrt(energy + 0.15)[..., None], 1)


@dataclasses.dataclass(frozen=True, eq=False)
class _Background:
    """The statistics of cells of photographs, which do not depend on the place in a picture."""

    mean: np.ndarray  # (DIRECTIONS,) float32
    cholesky: np.ndarray  # (C, C) lower triangle: the root of the covariance of a window's cells


@functools.lru_cache
def _background():
    """The `_Background` of the photographs, at several sizes."""
    maps = [_cells(_with_width(picture, w)) for picture in photographs() for w in (256, 128, 64)]
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


# ============================================================ distances to edges


class EdgeField:
    """How far the edges of a frame are from each pixel, for each direction, in a part of it.

    Args:
        image: (H, W, 3) uint8.
        K: (3, 3) pixels.
        box: (x0, y0, x1, y1) pixels, the part of the frame.
        scale: pixels of the field for one pixel of the frame, at most 1.

    Attributes:
        K: (3, 3) camera matrix of the field.
        distance: (DIRECTIONS, h, w) float32, 0 at an edge, 1 where there is none around.
    """

    def __init__(self, image: np.ndarray, K: np.ndarray, box: np.ndarray, scale: float):
        size = np.array(image.shape[1::-1])
        low = np.floor(box[:2]).clip(0, size - 1).astype(int)
        high = np.ceil(box[2:]).clip(low + 1, size).astype(int)
        part = image[low[1] : high[1], low[0] : high[0]]
        shape = np.maximum(np.rint(min(scale, 1) * (high - low)), 1)
        part = cv2.resize(part, shape.astype(int).tolist(), interpolation=cv2.INTER_AREA)

        factors = np.diag([*(shape / (high - low)), 1])
        self.K = factors @ xu.crop_camera(K, *low)
        self.distance = _directed_distances(part)
        self.unknown = float(self.distance.mean())  # taken for what lies outside


def _directed_distances(picture):
    """`EdgeField.distance` of a picture (h, w, 3) uint8."""
    strength, angle = _strongest_slope(cv2.GaussianBlur(np.float32(picture), (0, 0), 1.0))
    row, column = _thin_edges(strength, angle, minimum=2)
    clear = strength[row, column] > 0.6 * cv2.blur(strength, (31, 31))[row, column]
    row, column = row[clear], column[clear]

    free = np.full((DIRECTIONS, *strength.shape), 255, np.uint8)
    free[_nearest_direction(angle[row, column]), row, column] = 0
    distance = [cv2.distanceTransform(plane, cv2.DIST_L2, 5) for plane in free]
    distance = np.minimum(distance, np.float32(MAX_EDGE_DISTANCE))
    for _ in range(2):
        beside = np.minimum(np.roll(distance, 1, 0), np.roll(distance, -1, 0))
        distance = np.minimum(distance, beside + np.float32(DIRECTION_COST))
    return distance / np.float32(MAX_EDGE_DISTANCE)


class EdgeMatcher:
    """Refines and judges poses of a target on the edges of a frame.

        field = matcher.field(image, pose, K)
        refined = matcher.refine(field, pose)
        agreement = matcher.agreement(field, refined)

    Args:
        target: `Target`, or the `Mesh` of one without known symmetries.
    """

    def __init__(self, target: xu.Target | Mesh):
        mesh = target if isinstance(target, Mesh) else load_mesh(target.mesh)
        self._model = _EdgeModel(mesh)
        self._surface = _Surface(mesh, None if target is mesh else target)

    def field(self, image: np.ndarray, pose: np.ndarray, K: np.ndarray) -> EdgeField:
        """The edges of a frame around a pose; poses near it can share the field.

        Args:
            image: (H, W, 3) uint8.
            pose: (4, 4) model -> OpenCV camera.
            K: (3, 3) pixels.
        """
        working = self._model.to_working(pose)
        diagonal = K[0, 0] / working[2, 3]
        middle = _project(working[None, :3, 3], K)[0]
        reach = (0.5 + FIELD_MARGIN) * diagonal
        box = np.concatenate([middle - reach, middle + reach])
        return EdgeField(image, K, box, FIELD_SIZE / diagonal)

    def agreement(self, field: EdgeField, pose: np.ndarray) -> float:
        """How near the edges of the drawing at a pose (4, 4) are to those of the frame.

        Returns a number from 0 to 1; 0 where too little of the target shows.
        """
        return _agreement(self._model, field, self._model.to_working(pose))

    def refine(self, field: EdgeField, pose: np.ndarray) -> np.ndarray | None:
        """Move a pose (4, 4) until its edges are nearest to those of the frame.

        Returns a pose (4, 4), or None where too little of the target shows.
        """
        refined = _refine(self._model, field, self._model.to_working(pose))
        return None if refined is None else self._model.to_model(refined)

    def is_same(self, pose: np.ndarray, other: np.ndarray) -> bool:
        """Whether two poses (4, 4) are about the same, up to a symmetry of the target."""
        return self._surface.is_same(pose, other)


def _agreement(model, field, pose):
    """`EdgeMatcher.agreement` of a working pose."""
    edges = model.edges(pose, field.K, _field_size(field, pose))
    if edges is None:
        return 0.0
    pixels = _project(edges.points @ pose[:3, :3].T + pose[:3, 3], field.K)
    return float(_scores(field, pixels, edges.directions, edges.weights))


def _field_size(field, pose):
    """Pixels that the target's diagonal spans in a field, within reason."""
    return float(np.clip(field.K[0, 0] / pose[2, 3], 40, FIELD_SIZE))


def _scores(field, pixels, directions, weights):
    """1 less the mean distance (...,) of pixels (..., P, 2) from edges in their directions (P,)."""
    _, height, width = field.distance.shape
    x = pixels[..., 0].astype(np.int32)
    y = pixels[..., 1].astype(np.int32)
    inside = (pixels >= 0).all(-1) & (x < width) & (y < height)
    index = np.where(inside, (directions * height + y) * width + x, 0)
    distance = np.where(inside, field.distance.ravel().take(index), np.float32(field.unknown))
    return 1 - distance @ np.float32(weights / weights.sum())


def _refine(model, field, pose):
    """Levenberg and Marquardt's steps of a working pose on the distances; None as `refine`."""
    damping = 1e-2
    for number in range(MAX_STEPS):
        if number % STEPS_PER_DRAWING == 0:
            edges = model.edges(pose, field.K, _field_size(field, pose))
            if edges is None:
                return None
            edges = edges.thinned(MAX_POINTS)
            damping = max(damping, 1e-2)
        moved, damping = _step(field, edges, pose, damping)
        if moved is None:  # no step is better: draw again, or end
            if number % STEPS_PER_DRAWING == 0:
                break
            continue
        pose = moved
    return pose


def _step(field, edges, pose, damping):
    """One step: the pose after it, or None where none is better, and the next damping."""
    information, gradient, cost = _normal_equations(field, edges, pose)
    for _ in range(4):
        damped = information + damping * np.diag(np.diag(information) + 1e-6)
        step = np.linalg.solve(damped, -gradient)
        moved = xu.move_pose(pose, step)
        if np.abs(step[:3]).max() < 0.3 and moved[2, 3] > 0.5 + NEAR:
            distance, *_ = _look_up(field, edges, moved)
            if _robust_cost(distance, edges.weights) < cost:
                return moved, max(damping / 5, 1e-4)
        damping *= 10
    return None, damping


def _normal_equations(field, edges, pose):
    """The information (6, 6), the gradient (6,) and the cost of a pose's distances to edges."""
    distance, slope, points = _look_up(field, edges, pose)
    z = points[:, 2]
    x_slope, y_slope = (slope * np.diag(field.K)[:2] / z[:, None]).T
    z_slope = -(x_slope * points[:, 0] + y_slope * points[:, 1]) / z
    shift = np.column_stack([x_slope, y_slope, z_slope])
    jacobian = np.concatenate([np.cross(points - pose[:3, 3], shift), shift], 1)

    weights = edges.weights / (1 + (distance / CAUCHY_DISTANCE) ** 2)
    weighted = jacobian.T * weights
    cost = _robust_cost(distance, edges.weights)
    return weighted @ jacobian, weighted @ distance, cost


def _robust_cost(distance, weights):
    return weights @ np.log1p((distance / CAUCHY_DISTANCE) ** 2)


def _look_up(field, edges, pose):
    """How far each edge of a drawing is from those of a field.

    Returns the distances (P,) in pixels, their slopes (P, 2) in the field, and the edges' points
    (P, 3) in camera axes.
    """
    points = edges.points @ pose[:3, :3].T + pose[:3, 3]
    pixels = _project(points, field.K) - 0.5
    _, height, width = field.distance.shape
    inside = (pixels >= 0).all(1) & (pixels < (width - 1, height - 1)).all(1)
    pixels[~inside] = 0
    column, row = pixels.astype(int).T
    fx = pixels[:, 0] - column
    fy = pixels[:, 1] - row

    flat = MAX_EDGE_DISTANCE * field.distance.ravel()
    index = (edges.directions * height + row) * width + column
    index = np.where(inside, index, 0)
    left_top, right_top = flat[index], flat[index + 1]
    left_low, right_low = flat[index + width], flat[index + width + 1]
    top = left_top * (1 - fx) + right_top * fx
    low = left_low * (1 - fx) + right_low * fx
    x_slope = (right_top - left_top) * (1 - fy) + (right_low - left_low) * fy

    distance = np.where(inside, top * (1 - fy) + low * fy, MAX_EDGE_DISTANCE * field.unknown)
    slope = np.column_stack([x_slope, low - top]) * inside[:, None]
    return distance, slope, points


# ============================================================ a pose moved in the picture


def _polish(model, field, pose):
    """Move, scale and roll a drawing until its edges are nearest to those of the frame.

    Returns the pose, its score, and by how much the score is above that of poses around it; None
    where too little shows.
    """
    sharpness = None
    for reach in (1.0, 0.4):
        edges = model.edges(pose, field.K, 90)
        if edges is None:
            return None
        edges = edges.thinned(110)
        scores, rolls, scales, shifts = _neighbour_scores(field, edges, pose, reach)
        roll, scale, shift = np.unravel_index(scores.argmax(), scores.shape)
        if sharpness is None:
            usual = np.median(scores)
        pose = _moved_in_picture(pose, field.K, rolls[roll], scales[scale], shifts[shift])
        sharpness = scores.max() - usual
    return pose, float(scores.max()), float(sharpness)


def _neighbour_scores(field, edges, pose, reach):
    """Scores (5, 5, 25) of a drawing that is rolled, scaled and shifted; these motions as well."""
    rolls = reach * np.radians([-8, -4, 0, 4, 8])
    scales = np.exp(reach * np.linspace(-0.14, 0.14, 5))
    diagonal = field.K[0, 0] / pose[2, 3]
    steps = reach * diagonal * np.linspace(-0.1, 0.1, 5)
    shifts = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)

    middle = _project(pose[:3, 3], field.K)
    pixels = _project(edges.points @ pose[:3, :3].T + pose[:3, 3], field.K) - middle
    scores = []
    for roll in rolls:
        cosine, sine = np.cos(roll), np.sin(roll)
        rolled = pixels @ np.array([[cosine, sine], [-sine, cosine]])
        scaled = scales[:, None, None] * rolled
        moved = np.float32(scaled[:, None] + (middle + shifts)[:, None])
        directions = _nearest_direction(edges.angles + roll)
        scores.append(_scores(field, moved, directions, edges.weights))
    return np.array(scores), rolls, scales, shifts


def _moved_in_picture(pose, K, roll, scale, shift):
    """A pose whose drawing is rolled (radians), scaled, and shifted by (2,) pixels."""
    middle = _project(pose[:3, 3], K) + shift
    facing = _towards(pose[:3, 3]).T @ pose[:3, :3]
    rolled = Rotation.from_rotvec([0, 0, roll]).as_matrix() @ facing
    return _pose_at(middle, pose[2, 3] / scale, rolled, K)


def _pose_at(pixel, depth, facing, K):
    """The pose at which the target's middle lies at a pixel (2,) and a depth.

    `facing` (3, 3) is the rotation that a camera sees which looks straight at the target.
    """
    ray = np.linalg.solve(K, [*pixel, 1])
    pose = np.eye(4)
    pose[:3, :3] = _towards(ray) @ facing
    pose[:3, 3] = depth * ray
    return pose


def _towards(ray):
    """The smallest rotation (3, 3) of the camera's axis to a ray (3,)."""
    x, y, z = ray / np.linalg.norm(ray)
    axis = np.array([-y, x, 0])
    sine = np.hypot(x, y)
    return Rotation.from_rotvec(axis / max(sine, 1e-12) * np.arctan2(sine, z)).as_matrix()


# ============================================================ equal poses


class _Surface:
    """Points of a target's surface, which say whether two poses are the same."""

    def __init__(self, mesh, target):
        self.diameter = mesh.diameter
        self.symmetries = np.eye(4)[None] if target is None else symmetry_transforms(target)
        points, colours = _surface_points(mesh, SURFACE_POINTS)
        colours = self.diameter * colours  # other colours are far apart
        self.points = points[:COMPARED_POINTS]
        self.colours = colours[:COMPARED_POINTS]
        # A print is not known to be the same on all sides.
        textured = mesh.textures is not None
        self.tree = None if textured else KDTree(np.hstack([points, colours]))

    def is_same(self, pose, other):
        """Whether two poses (4, 4) differ by little, except for a symmetry."""
        symmetries = self.symmetries
        found = self._nearest_symmetry(np.linalg.inv(other) @ pose)
        if found is not None:
            symmetries = np.concatenate([symmetries, found[None]])
        limit = SAME_DISTANCE * self.diameter
        return mssd_error(pose, other, self.points, symmetries) < limit

    def _nearest_symmetry(self, motion):
        """The motion (4, 4) near another one that maps the surface onto itself; None without one.

        Source: Besl and McKay, A Method for Registration of 3-D Shapes, PAMI 14(2), 1992 (ICP).
        """
        if self.tree is None:
            return None
        for _ in range(SYMMETRY_STEPS):
            moved = self.points @ motion[:3, :3].T + motion[:3, 3]
            distance, nearest = self.tree.query(np.hstack([moved, self.colours]))
            motion = _rigid_motion(self.points, self.tree.data[nearest, :3])
        return motion if distance.max() < SYMMETRY_DISTANCE * self.diameter else None


def _rigid_motion(points, others):
    """The motion (4, 4) that brings points (P, 3) nearest to others (P, 3), row by row."""
    middle = points.mean(0)
    other_middle = others.mean(0)
    rotation, _ = Rotation.align_vectors(others - other_middle, points - middle)
    motion = np.eye(4)
    motion[:3, :3] = rotation.as_matrix()
    motion[:3, 3] = other_middle - motion[:3, :3] @ middle
    return motion


def _surface_points(mesh, count):
    """Points (count, 3) spread over the surface of a mesh, and their materials' colours."""
    rng = np.random.default_rng(0)
    area = np.linalg.norm(triangle_normals(mesh.triangles), axis=1)
    rows = rng.choice(len(area), count, p=area / area.sum())
    weights = rng.dirichlet([1, 1, 1], count)
    points = np.einsum("pc,pcx->px", weights, mesh.triangles[rows])
    return points, mesh.colours[mesh.face_materials[rows]]


# ============================================================ templates


class Templates:
    """Finds a target in a box of a frame, without a network.

        templates = Templates(target)
        starts = templates.find(image, K, box)

    To prepare the templates takes 6 to 8 seconds, and a search 1 to 4 seconds.

    Args:
        target: `Target`, or the `Mesh` of one without known symmetries.
    """

    def __init__(self, target: xu.Target | Mesh):
        mesh = target if isinstance(target, Mesh) else load_mesh(target.mesh)
        self._model = _EdgeModel(mesh)
        self._surface = _Surface(mesh, None if target is mesh else target)
        edges, coverage, self._extents, self._rotations = _draw_templates(self._model)
        self._projection, self._templates = _whiten(edges, coverage, _background())

    def find(
        self, image: np.ndarray, K: np.ndarray, box: np.ndarray, count: int = 5
    ) -> list[Start]:
        """Find poses at which the target may be in a box.

        Args:
            image: (H, W, 3) uint8.
            K: (3, 3) pixels.
            box: (x0, y0, x1, y1) pixels, around what is seen of the target.
            count: how many poses are returned at most.

        Returns:
            `Start`s without an explained contrast, the one with the best edge agreement first.
            Poses that differ by a symmetry of the target count as one.

        Raises:
            ValueError: the box is reversed, too small, or outside the frame.
        """
        K = xu.check_camera_matrix(K)
        box = _check_box(box, image)
        field = self._field(image, K, box)
        refined = []
        for pose in self._polish(field, self._search(image, K, box), box):
            pose = _refine(self._model, field, pose)
            if pose is not None:
                agreement = _agreement(self._model, field, pose)
                score = agreement + REFINED_BOX_WEIGHT * self._overlap(pose, K, box, image)
                refined.append((score, Start(self._model.to_model(pose), agreement)))
        refined.sort(key=lambda item: -item[0])
        return self._distinct([start for _, start in refined])[:count]

    def _field(self, image, K, box):
        """The `EdgeField` around a box."""
        side = max(box[2:] - box[:2])
        around = box + PADDING * side * np.array([-1, -1, 1, 1])
        return EdgeField(image, K, around, FIELD_SIZE / (1.2 * side))

    def _search(self, image, K, box):
        """Working poses whose templates fit best, at most MAX_POLISHED, the best first."""
        scores = np.full(len(self._rotations), -np.inf, np.float32)
        places = np.zeros((len(scores), 3))  # x, y, and pixels that the diagonal spans
        side = max(box[2:] - box[:2])
        for size in SIZES * side:
            centres, windows = self._windows(image, box, size)
            fits = windows @ self._projection @ self._templates
            fits += BOX_WEIGHT * self._overlaps(centres, size, box, image)
            best = fits.argmax(0)
            found = np.take_along_axis(fits, best[None], 0)[0]
            better = found > scores
            scores[better] = found[better]
            places[better] = np.column_stack([centres[best], np.full(len(best), size)])[better]

        kept = self._spread(scores)
        return [
            (_pose_at(places[i, :2], K[0, 0] / places[i, 2], self._rotations[i], K), scores[i])
            for i in kept
        ]

    def _windows(self, image, box, size):
        """The middles (P, 2) in pixels and the cells (P, C) of windows about that of a box.

        The target's diagonal spans `size` pixels of the frame in a window.
        """
        side = max(box[2:] - box[:2])
        shape = np.array(image.shape[1::-1])
        low = np.floor(box[:2] - PADDING * side).clip(0, shape).astype(int)
        high = np.ceil(box[2:] + PADDING * side).clip(0, shape).astype(int)
        part = image[low[1] : high[1], low[0] : high[0]]
        small = np.maximum(np.rint((high - low) * TEMPLATE_SIZE / size).astype(int), 2 * CELL)
        factors = (high - low) / small
        kind = cv2.INTER_AREA if factors.max() > 1 else cv2.INTER_LINEAR
        cells = _cells(cv2.resize(part, small.tolist(), interpolation=kind)) - _background().mean

        half = WINDOW // 2
        padded = np.pad(cells, ((half, half), (half, half), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (WINDOW, WINDOW), (0, 1))
        row, column = np.indices(cells.shape[:2]).reshape(2, -1)
        centres = (np.column_stack([column, row]) + 0.5) * CELL * factors + low
        offset = np.abs(centres - (box[:2] + box[2:]) / 2).max(1)
        near = offset < max(MAX_OFFSET * side, CELL * factors.max())
        chosen = windows[row[near], column[near]].transpose(0, 2, 3, 1)
        return centres[near], chosen.reshape(len(chosen), WINDOW**2 * DIRECTIONS)

    def _overlaps(self, centres, size, box, image):
        """The overlaps (P, T) of a box and the templates around some middles (P, 2)."""
        low = centres[:, None] + size * self._extents[:, :2]
        high = centres[:, None] + size * self._extents[:, 2:]
        return _overlaps(low, high, box, image)

    def _overlap(self, pose, K, box, image):
        """The overlap of a box and the drawing at a pose."""
        pixels = xu.project_pose(self._model.extremes, pose, K)
        return float(_overlaps(pixels.min(0), pixels.max(0), box, image))

    def _spread(self, scores):
        """Rows of the best templates, none closer than TEMPLATE_ANGLE to a better one."""
        flat = self._rotations.reshape(-1, 9)
        limit = 1 + 2 * np.cos(np.radians(TEMPLATE_ANGLE))
        left = scores.copy()
        rows = []
        while len(rows) < MAX_POLISHED and left.max() > -np.inf:
            rows.append(int(left.argmax()))
            left[flat @ flat[rows[-1]] > limit] = -np.inf
        return rows

    def _polish(self, field, candidates, box):
        """Polished poses, at most MAX_REFINED, the best first, none close to a better one."""
        polished = []
        for pose, score in candidates:
            found = _polish(self._model, field, pose)
            if found is not None:
                pose, agreement, sharpness = found
                polished.append((0.5 * score + 10 * agreement + 8 * sharpness, pose))
        polished.sort(key=lambda item: -item[0])

        kept = []
        for _, pose in polished:
            if all(xu.rotation_error(pose, other) > POLISHED_ANGLE for other in kept):
                kept.append(pose)
        return kept[:MAX_REFINED]

    def _distinct(self, starts):
        """The starts without those that are about the same as a better one."""
        kept = []
        for start in starts:
            if not any(self._surface.is_same(start.pose, other.pose) for other in kept):
                kept.append(start)
        return kept


def _check_box(box, image):
    """The box as an array (4,), clipped to the frame; ValueError where it is none."""
    expected = "expected (x0, y0, x1, y1) in pixels"
    box = np.asarray(box, float)
    if box.shape != (4,) or not np.isfinite(box).all():
        raise ValueError(f"box: {expected}, got {box.tolist()}")
    height, width = image.shape[:2]
    if (box[2:] <= box[:2]).any():
        raise ValueError(f"box: {expected} with x0 < x1 and y0 < y1, got {box.tolist()}")
    inside = box.clip(0, [width, height, width, height])
    if (inside[2:] - inside[:2] < MIN_BOX).any():
        raise ValueError(
            f"box: {expected}, at least {MIN_BOX} wide and high within the frame of "
            f"{width}x{height}, got {box.tolist()}; draw it around the target"
        )
    return inside


def _overlaps(low, high, box, image):
    """Intersection over union (...,) of boxes, whose corners are (..., 2) each, and another one.

    What lies outside the frame is left out.
    """
    shape = np.array(image.shape[1::-1])
    low = low.clip(0, shape)
    high = high.clip(0, shape)
    common = np.minimum(high, box[2:]) - np.maximum(low, box[:2])
    common = common.clip(0).prod(-1)
    union = (high - low).prod(-1) + (box[2:] - box[:2]).prod() - common
    return np.float32(common / union)


def _draw_templates(model):
    """Draw the target from VIEWS sides, each rolled by ROLLS turns; T = VIEWS * ROLLS templates.

    Returns the edges (T, WINDOW, WINDOW, DIRECTIONS), the coverage (T, WINDOW, WINDOW), the extents
    (T, 4) of the drawings around the middle (x0, y0, x1, y1), in diagonals, and the rotations
    (T, 3, 3) that a camera sees which looks straight at the target.
    """
    angles = np.arange(ROLLS) * 2 * np.pi / ROLLS
    rolls = Rotation.from_rotvec(angles[:, None] * [0, 0, 1]).as_matrix()
    edges, coverages, extents, rotations = [], [], [], []
    for direction in xu.fibonacci_sphere(VIEWS):
        facing = Rotation.align_vectors([0, 0, -1], direction)[0].as_matrix()
        drawing = _draw_view(model, facing)
        rotations.append(rolls @ facing)
        edges.append(_rolled_edges(*drawing[:3], angles))
        coverage, extent = _rolled_coverage(drawing[3], angles)
        coverages.append(coverage)
        extents.append(extent)
    return [np.concatenate(parts) for parts in (edges, coverages, extents, rotations)]


def _draw_view(model, facing):
    """Draw the target as a camera sees it that looks straight at it.

    Returns the places (P, 2) of edges from the middle, in diagonals, their angles (P,) and amounts
    (P,), and the places (Q, 2) of covered pixels.
    """
    width = round(1.16 * DRAWN_SIZE)
    focal = DRAWN_SIZE * DISTANCE
    K = np.array([[focal, 0, width / 2], [0, focal, width / 2], [0, 0, 1.0]])
    pose = np.eye(4)
    pose[:3, :3] = facing
    pose[2, 3] = DISTANCE
    covered, _, strength, angle = model.draw(pose, K, width, width)

    row, column = np.nonzero(strength > 0.08)
    amount = np.minimum(strength[row, column] / MAX_STRENGTH, 1)
    inside = np.argwhere(covered)[::9, ::-1]  # (column, row)
    places = (np.column_stack([column, row]) + 0.5 - width / 2) / DRAWN_SIZE
    return places, angle[row, column], amount, (inside + 0.5 - width / 2) / DRAWN_SIZE


def _rolled_edges(places, angles, amounts, rolls):
    """The edges (R, WINDOW, WINDOW, DIRECTIONS) of a drawing at some rolls (R,)."""
    cells = _rolled(places, rolls) * (TEMPLATE_SIZE / CELL) + (WINDOW - 1) / 2
    corner = np.floor(cells).astype(int)
    part = cells - corner
    first, second, share = _two_directions(angles + rolls[:, None])
    number = np.arange(len(rolls))[:, None]

    total = np.zeros(len(rolls) * WINDOW**2 * DIRECTIONS)
    for dy, dx in np.ndindex(2, 2):
        x, y = corner[..., 0] + dx, corner[..., 1] + dy
        weight = amounts * np.abs(1 - dx - part[..., 0]) * np.abs(1 - dy - part[..., 1])
        inside = (x >= 0) & (y >= 0) & (x < WINDOW) & (y < WINDOW)
        cell = ((number * WINDOW + y) * WINDOW + x) * DIRECTIONS
        for direction, weights in ((first, weight * (1 - share)), (second, weight * share)):
            index = (cell + direction)[inside]
            total += np.bincount(index, weights[inside], minlength=len(total))

    # As in a frame of TEMPLATE_SIZE: an edge is two pixels wide there and in the drawing.
    total *= 2 * TEMPLATE_SIZE / DRAWN_SIZE / CELL**2
    return np.float32(total.reshape(len(rolls), WINDOW, WINDOW, DIRECTIONS))


def _rolled_coverage(places, rolls):
    """The coverage (R, WINDOW, WINDOW) of a drawing at some rolls, and its extents (R, 4)."""
    rolled = _rolled(places, rolls)
    extents = np.concatenate([rolled.min(1), rolled.max(1)], 1)
    cells = np.floor(rolled * (TEMPLATE_SIZE / CELL) + WINDOW / 2).astype(int).clip(0, WINDOW - 1)
    number = np.arange(len(rolls))[:, None]
    index = (number * WINDOW + cells[..., 1]) * WINDOW + cells[..., 0]
    counts = np.bincount(index.ravel(), minlength=len(rolls) * WINDOW**2)
    full = (CELL * DRAWN_SIZE / TEMPLATE_SIZE) ** 2 / 9  # every ninth pixel is counted
    return (counts / full).reshape(len(rolls), WINDOW, WINDOW).clip(0, 1), extents


def _rolled(places, rolls):
    """Places (P, 2) in a picture, rolled about the middle: (R, P, 2)."""
    cosine, sine = np.cos(rolls), np.sin(rolls)
    matrices = np.array([[cosine, sine], [-sine, cosine]]).transpose(2, 0, 1)  # for row vectors
    return places @ matrices


def _whiten(edges, coverage, background):
    """Templates as filters that tell the target from clutter, in few numbers.

    Returns the projection (C, NUMBERS) of a window's cells less their mean, and the templates
    (NUMBERS, T): the product of all three is the score.
    """
    edges = np.stack([_normalised(one) for one in edges])

    # What lies outside the target is unknown: clutter as usual. Inside there is less of it.
    amount = (edges.sum(-1, keepdims=True) / 0.5).clip(0, 1)
    inside = np.maximum(coverage[..., None], amount)
    known = INSIDE_WEIGHT * inside + (1 - INSIDE_WEIGHT) * amount
    signal = edges - known * background.mean
    signal = np.float32(signal.reshape(len(signal), -1))

    root = background.cholesky
    white = scipy.linalg.solve_triangular(root, signal.T, lower=True)
    white /= np.linalg.norm(white, axis=0)
    size = len(root)
    chosen = [max(size - NUMBERS, 0), size - 1]
    _, axes = scipy.linalg.eigh(white @ white.T, subset_by_index=chosen)
    projection = scipy.linalg.solve_triangular(root, axes, lower=True, trans="T")
    return np.ascontiguousarray(projection), axes.T @ white
