"""Edges as evidence: those of a drawing against those of a frame.

The edges of a drawing are its outline, its creases, jumps of its depth, and the places where its
colours change. They need neither light nor a learnt surface, so a pose can be refined and judged on
them before anything is known of a target but its mesh. An `EdgeField` says how far each pixel of a
frame is from the nearest edge in a direction. The mean of these distances along the edges of a
drawing is the edge agreement of its pose. It ranks the poses of one frame well. It does not say
whether the best one is right.

A pose that is roughly right is first moved in the picture, over a grid of shifts, sizes and rolls
(`EdgeMatcher.polish`). All six unknowns are then refined by Gauss-Newton on the same distances
(`EdgeMatcher.refine`).

Inside, the target's bounding box has its middle at the origin and a diagonal of 1, so nothing
depends on the unit of the mesh.

Source: Liu, Tuzel, Veeraraghavan and Chellappa, Fast Directional Chamfer Matching, CVPR 2010;
    Drummond and Cipolla, Real-Time Visual Tracking of Complex Structures, PAMI 24(7), 2002.
"""

import dataclasses

import cv2
import numpy as np
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing.mesh import NEAR, Mesh, load_mesh, rasterise, triangle_normals
from xwing.metrics import mssd_error, symmetry_transforms

DIRECTIONS = 8  # of edges, over 180 degrees

# Edges of a drawing. A step of 1 in a layer is an edge of strength 0.5.
NORMAL_WEIGHT = 0.5  # of the layers of the surface's normal, against that of the outline
COLOUR_WEIGHT = 0.7  # of the layers of the materials' colours
MAX_STRENGTH = 0.4  # of an edge: the outline's and a sharp crease's
MIN_STRENGTH = 0.12  # of an edge that counts
MIN_DEPTH_JUMP = 0.03  # diameters between neighbouring pixels
MIN_POINTS = 20  # of a drawing that says anything
EXTREMES = 200  # directions in which the furthest point bounds a drawing
WINDOW_MARGIN = 0.12  # diagonals of the target around it in a drawing

# Edges of a frame.
MIN_SLOPE = 2.0  # grey levels per pixel
CLEAR_SLOPE = 0.6  # of the mean slope around: an edge with less is none
MAX_DISTANCE = 10.0  # pixels: an edge further away is none
DIRECTION_COST = 2.5  # pixels by which an edge in the next direction counts as further away
FIELD_SIZE = 150  # pixels that the target's diagonal spans in a field, at most
MIN_FIELD_SIZE = 40  # pixels that it spans in a drawing, at least
FIELD_MARGIN = 0.4  # diagonals of the target around it

# Poses moved in the picture.
POLISH_SIZE = 90  # pixels that the diagonal spans in the drawing
POLISH_POINTS = 110  # of the drawing, at most
POLISH_REACHES = 1.0, 0.4  # of the steps, one grid after the other
ROLL_STEPS = np.radians([-8, -4, 0, 4, 8])
SIZE_STEPS = np.linspace(-0.14, 0.14, 5)  # of the logarithm of the size
SHIFT_STEPS = np.linspace(-0.1, 0.1, 5)  # diagonals

# Gauss-Newton.
CAUCHY_DISTANCE = 2.5  # pixels, of the robust cost
REFINE_POINTS = 250  # of a drawing, at most
MAX_STEPS = 15
STEPS_PER_DRAWING = 3
MAX_TURN = 0.3  # radians about one axis: a larger step is rejected
MIN_DEPTH = 0.5 + NEAR  # diameters to the middle of a target that lies in front of the camera

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
class Drawn:
    """The edges of a drawing, pixel by pixel."""

    covered: np.ndarray  # (h, w) bool
    depth: np.ndarray  # (h, w) diameters, inf where nothing shows
    strength: np.ndarray  # (h, w) of the edge at each pixel
    angle: np.ndarray  # (h, w) radians from x towards y, in which the picture changes there


@dataclasses.dataclass(frozen=True, eq=False)
class Edges:
    """The edges of a drawing as points of the surface."""

    points: np.ndarray  # (P, 3) model axes, diameters
    angles: np.ndarray  # (P,) radians from x towards y, in which the picture changes there
    weights: np.ndarray  # (P,)

    def thinned(self, count):
        """At most `count` of the points, evenly chosen."""
        if len(self.angles) <= count:
            return self
        kept = np.linspace(0, len(self.angles) - 1, count).astype(int)
        return Edges(self.points[kept], self.angles[kept], self.weights[kept])


class EdgeModel:
    """A mesh whose edges are drawn; the middle of its bounding box is at 0, its diagonal is 1.

    Args:
        mesh: `Mesh`, in any unit.

    Attributes:
        centre: (3,) the middle of the bounding box, units of the mesh.
        diameter: the diagonal of the bounding box, units of the mesh.
        extremes: (E, 3) points that bound a drawing, diameters.
    """

    def __init__(self, mesh: Mesh):
        corners = mesh.vertices[np.unique(mesh.faces)]
        self.centre = (corners.min(0) + corners.max(0)) / 2
        self.diameter = mesh.diameter
        furthest = (corners @ xu.fibonacci_sphere(EXTREMES).T).argmax(0)
        self.extremes = (corners[np.unique(furthest)] - self.centre) / self.diameter

        triangles = (mesh.triangles - self.centre) / self.diameter
        normals = triangle_normals(triangles)
        length = np.linalg.norm(normals, axis=1)
        has_area = length > 0
        self._triangles = np.float32(triangles[has_area])
        self._normals = np.float32(normals[has_area] / length[has_area, None])
        self._offsets = (self._normals * self._triangles[:, 0]).sum(1)  # of their planes
        materials = mesh.face_materials[has_area]
        self._colours = np.float32(mesh.colours[materials]) if len(mesh.colours) > 1 else None

    def to_working(self, pose: np.ndarray) -> np.ndarray:
        """Return a pose (4, 4) of the mesh as one of this model."""
        moved = pose.copy()
        moved[:3, 3] += pose[:3, :3] @ self.centre
        return xu.scale_pose(moved, 1 / self.diameter)

    def to_model(self, pose: np.ndarray) -> np.ndarray:
        """Return the pose (4, 4) of the mesh for one of this model: inverts `to_working`."""
        moved = xu.scale_pose(pose, self.diameter)
        moved[:3, 3] -= pose[:3, :3] @ self.centre
        return moved

    def draw(self, pose: np.ndarray, K: np.ndarray, width: int, height: int) -> Drawn:
        """Draw the edges at a pose of this model.

        Args:
            pose: (4, 4) model -> OpenCV camera, diameters.
            K: (3, 3) pixels.
            width: of the drawing, pixels.
            height: of the drawing, pixels.
        """
        ids, depth = rasterise(self._triangles, pose, K, width, height, NEAR)
        covered = ids >= 0
        strength, angle = strongest_slope(self._layers(ids, covered, pose))
        jump_strength, jump_angle = _depth_jumps(depth, covered)
        is_jump = jump_strength > strength
        strength = np.where(is_jump, jump_strength, strength)
        return Drawn(covered, depth, strength, np.where(is_jump, jump_angle, angle))

    def _layers(self, ids, covered, pose):
        """What may change at an edge, (h, w, C): coverage, normals and colours.

        Outside the target, normals and colours are continued. Otherwise the outline would be
        stronger where they are large.
        """
        eye = -pose[:3, :3].T @ pose[:3, 3]
        away = np.float32(self._normals @ eye) < self._offsets
        normals = np.where(away[:, None], -self._normals, self._normals)
        values = [NORMAL_WEIGHT * normals[ids]]
        if self._colours is not None:
            values.append(COLOUR_WEIGHT * self._colours[ids])

        coverage = np.float32(covered)[..., None]
        inner = np.concatenate(values, -1) * coverage
        nearby = cv2.blur(inner, (5, 5))
        nearby /= np.maximum(cv2.blur(coverage, (5, 5)), 1e-6)[..., None]
        return np.concatenate([coverage, np.where(coverage > 0, inner, nearby)], -1)

    def edges(self, pose: np.ndarray, K: np.ndarray, size: float) -> Edges | None:
        """The `Edges` of a drawing in which the diagonal spans `size` pixels.

        None where too little shows or the target is not in front of the camera.
        """
        if not pose[2, 3] > MIN_DEPTH:
            return None
        window, width = _window(pose, K, size)
        drawn = self.draw(pose, window, width, width)
        row, column = _thin_edges(drawn.strength, drawn.angle, MIN_STRENGTH)

        # An edge belongs to the nearer of the surfaces on its sides.
        border = cv2.BORDER_REPLICATE
        z = cv2.erode(drawn.depth, np.ones((3, 3)), borderType=border)[row, column]
        known = np.isfinite(z)
        row, column, z = row[known], column[known], z[known]
        if len(z) < MIN_POINTS:
            return None

        pixels = np.column_stack([column + 0.5, row + 0.5, np.ones(len(z))])
        in_camera = z[:, None] * (pixels @ np.linalg.inv(window).T)
        points = (in_camera - pose[:3, 3]) @ pose[:3, :3]
        weights = np.minimum(drawn.strength[row, column], MAX_STRENGTH)
        return Edges(points, drawn.angle[row, column], weights)


def _window(pose, K, size):
    """K of a square picture of the target in which its diagonal spans `size`, and its width."""
    width = round(size * (1 + 2 * WINDOW_MARGIN))
    scale = size * pose[2, 3] / K[0, 0]
    x, y = _project(pose[:3, 3], K)
    reach = width / 2 / scale
    return xu.crop_camera(K, x - reach, y - reach, scale), width


def _project(points, K):
    """The pixels (..., 2) of points (..., 3) in camera axes."""
    return points @ K[:2].T / points[..., 2:]


def _slopes(picture):
    """The derivatives of a picture by x and y, per pixel."""
    return cv2.Sobel(picture, -1, 1, 0) / 8, cv2.Sobel(picture, -1, 0, 1) / 8


def strongest_slope(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the length and the angle (h, w) of the steepest slope among the layers (h, w, C)."""
    x, y = _slopes(picture)
    steepest = (x * x + y * y).argmax(-1)[..., None]
    x = np.take_along_axis(x, steepest, -1)[..., 0]
    y = np.take_along_axis(y, steepest, -1)[..., 0]
    return np.hypot(x, y), np.arctan2(y, x)


def _depth_jumps(depth, covered):
    """The strength and the angle (h, w) of edges at which one part of the target hides another.

    The second derivative tells them from a surface that is seen at a flat angle.
    """
    furthest = depth[covered].max() if covered.any() else 0
    filled = np.where(covered, depth, np.float32(furthest))
    x, y = _slopes(filled)
    inside = cv2.erode(np.uint8(covered), np.ones((3, 3)), borderValue=0) > 0
    jumps = inside & (np.abs(cv2.Laplacian(filled, -1)) > MIN_DEPTH_JUMP)
    return np.where(jumps, np.float32(MAX_STRENGTH), 0), np.arctan2(y, x)


def _thin_edges(strength, angle, minimum):
    """Rows and columns of the pixels at which the strength is greatest across the edge.

    Source: Canny, A Computational Approach to Edge Detection, PAMI 8(6), 1986.
    """
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


# ============================================================ edges of a frame


class EdgeField:
    """How far the edges of a frame are from each pixel, for each direction, in a part of it.

    Args:
        image: (H, W, 3) uint8.
        K: (3, 3) pixels.
        box: (x0, y0, x1, y1) pixels, the part of the frame.
        scale: pixels of the field for one pixel of the frame, at most 1.

    Attributes:
        K: (3, 3) camera matrix of the field.
        distance: (DIRECTIONS, h, w) float32 pixels, at most MAX_DISTANCE.
        unknown: pixels, the distance that is taken where the field ends.
    """

    def __init__(self, image: np.ndarray, K: np.ndarray, box: np.ndarray, scale: float):
        size = np.array(image.shape[1::-1])
        low = np.floor(box[:2]).clip(0, size - 1).astype(int)
        high = np.ceil(box[2:]).clip(low + 1, size).astype(int)
        part = image[low[1] : high[1], low[0] : high[0]]
        shape = np.maximum(np.rint(min(scale, 1) * (high - low)), 2)
        part = cv2.resize(part, shape.astype(int).tolist(), interpolation=cv2.INTER_AREA)

        self.K = np.diag([*(shape / (high - low)), 1]) @ xu.crop_camera(K, *low)
        self.distance = _directed_distances(part)
        self.unknown = float(self.distance.mean())


def _directed_distances(picture):
    """`EdgeField.distance` of a picture (h, w, 3) uint8."""
    strength, angle = strongest_slope(cv2.GaussianBlur(np.float32(picture), (0, 0), 1.0))
    row, column = _thin_edges(strength, angle, MIN_SLOPE)
    around = cv2.blur(strength, (31, 31))
    clear = strength[row, column] > CLEAR_SLOPE * around[row, column]
    row, column = row[clear], column[clear]

    free = np.full((DIRECTIONS, *strength.shape), 255, np.uint8)
    free[_nearest_direction(angle[row, column]), row, column] = 0
    distance = np.stack([cv2.distanceTransform(plane, cv2.DIST_L2, 5) for plane in free])
    distance = np.minimum(distance, np.float32(MAX_DISTANCE))
    for _ in range(2):
        beside = np.minimum(np.roll(distance, 1, 0), np.roll(distance, -1, 0))
        distance = np.minimum(distance, beside + np.float32(DIRECTION_COST))
    return distance


class EdgeMatcher:
    """Refines and judges poses of a target on the edges of a frame.

        field = matcher.field(image, pose, K)
        refined = matcher.refine(field, pose)
        agreement = matcher.agreement(field, refined)

    Args:
        target: `Target`, or the `Mesh` of one without declared symmetries.

    Attributes:
        model: `EdgeModel`.
    """

    def __init__(self, target: xu.Target | Mesh):
        mesh = target if isinstance(target, Mesh) else load_mesh(target.mesh)
        self.model = EdgeModel(mesh)
        self._surface = _Surface(mesh, None if target is mesh else target)

    def field(self, image: np.ndarray, pose: np.ndarray, K: np.ndarray) -> EdgeField:
        """Find the edges of a frame around a pose; other poses near it can share them.

        Args:
            image: (H, W, 3) uint8.
            pose: (4, 4) model -> OpenCV camera.
            K: (3, 3) pixels.

        Raises:
            ValueError: the target is not in front of the camera.
        """
        working = self.model.to_working(pose)
        if not working[2, 3] > 0:
            raise ValueError("the pose lies behind the camera; give one in front of it")
        diagonal = K[0, 0] / working[2, 3]
        middle = _project(working[:3, 3], K)
        reach = (0.5 + FIELD_MARGIN) * diagonal
        box = np.concatenate([middle - reach, middle + reach])
        return EdgeField(image, K, box, FIELD_SIZE / diagonal)

    def agreement(self, field: EdgeField, pose: np.ndarray) -> float:
        """Return how near the edges of a drawing are to those of the frame, from 0 to 1.

        It is 0 where too little of the target shows.

        Args:
            field: `EdgeField`.
            pose: (4, 4) model -> OpenCV camera.
        """
        pose = self.model.to_working(pose)
        edges = self.model.edges(pose, field.K, _drawn_size(field, pose))
        if edges is None:
            return 0.0
        pixels = _project(edges.points @ pose[:3, :3].T + pose[:3, 3], field.K)
        return float(_agreements(field, pixels, edges.angles, edges.weights))

    def polish(self, field: EdgeField, pose: np.ndarray) -> tuple[np.ndarray, float] | None:
        """Move, scale and roll the drawing of a pose until its edges agree best with the frame.

        Args:
            field: `EdgeField`.
            pose: (4, 4) model -> OpenCV camera, off by a tenth of the diameter and 10 degrees.

        Returns:
            pose (4, 4) and its edge agreement, or None where too little of the target shows.
        """
        pose = self.model.to_working(pose)
        for reach in POLISH_REACHES:
            edges = self.model.edges(pose, field.K, POLISH_SIZE)
            if edges is None:
                return None
            pose, agreement = _best_neighbour(field, edges.thinned(POLISH_POINTS), pose, reach)
        return self.model.to_model(pose), agreement

    def refine(self, field: EdgeField, pose: np.ndarray) -> np.ndarray | None:
        """Move a pose until its edges are nearest to those of the frame.

        Args:
            field: `EdgeField`.
            pose: (4, 4) model -> OpenCV camera.

        Returns:
            pose (4, 4), or None where too little of the target shows.
        """
        pose = self.model.to_working(pose)
        moved = True
        for number in range(MAX_STEPS):
            if number % STEPS_PER_DRAWING == 0:
                edges = self.model.edges(pose, field.K, _drawn_size(field, pose))
                if edges is None:
                    return None
                if not moved:  # the last drawing was at this pose, too
                    break
                edges = edges.thinned(REFINE_POINTS)
                damping = 1e-2
                moved = False
            step = _step(field, edges, pose, damping)
            if step is not None:
                pose, damping = step
                moved = True
        return self.model.to_model(pose)

    def is_same(self, pose: np.ndarray, other: np.ndarray) -> bool:
        """Return whether two poses (4, 4) are about the same, up to a symmetry of the target.

        Symmetries of a plain mesh are found, too. Those of a textured one must be declared.
        """
        return self._surface.is_same(pose, other)


def _drawn_size(field, pose):
    """Pixels that the target's diagonal spans in the drawing that is compared with a field."""
    return float(np.clip(field.K[0, 0] / pose[2, 3], MIN_FIELD_SIZE, FIELD_SIZE))


def _agreements(field, pixels, angles, weights):
    """Edge agreements (...,) of edges at pixels (..., P, 2) with angles (P,) and weights (P,)."""
    _, height, width = field.distance.shape
    x = pixels[..., 0].astype(np.int32)
    y = pixels[..., 1].astype(np.int32)
    inside = (pixels >= 0).all(-1) & (x < width) & (y < height)
    planes = np.int32(_nearest_direction(angles) * (height * width))
    index = np.where(inside, planes + y * np.int32(width) + x, 0)
    distance = np.where(inside, field.distance.ravel().take(index), np.float32(field.unknown))
    return 1 - distance @ np.float32(weights / weights.sum()) / MAX_DISTANCE


# ============================================================ Gauss-Newton


def _step(field, edges, pose, damping):
    """The pose (4, 4) after a step, and the next damping; None where no step is better.

    Source: Marquardt, SIAM J. Appl. Math. 11(2), 1963.
    """
    information, gradient, cost = _normal_equations(field, edges, pose)
    for _ in range(4):
        damped = information + damping * np.diag(np.diag(information) + 1e-6)
        step = np.linalg.solve(damped, -gradient)
        moved = xu.move_pose(pose, step)
        if np.abs(step[:3]).max() < MAX_TURN and moved[2, 3] > MIN_DEPTH:
            distance, *_ = _look_up(field, edges, moved)
            if _robust_cost(distance, edges.weights) < cost:
                return moved, max(damping / 5, 1e-4)
        damping *= 10
    return None


def _normal_equations(field, edges, pose):
    """The information (6, 6), the gradient (6,) and the cost of a pose's distances to edges."""
    distance, slope, points = _look_up(field, edges, pose)
    z = points[:, 2]
    x_slope, y_slope = (slope * np.diag(field.K)[:2] / z[:, None]).T
    z_slope = -(x_slope * points[:, 0] + y_slope * points[:, 1]) / z
    shift = np.column_stack([x_slope, y_slope, z_slope])
    jacobian = np.concatenate([np.cross(points - pose[:3, 3], shift), shift], 1)

    weighted = jacobian.T * (edges.weights / (1 + (distance / CAUCHY_DISTANCE) ** 2))
    return weighted @ jacobian, weighted @ distance, _robust_cost(distance, edges.weights)


def _robust_cost(distance, weights):
    """Half the sum of Cauchy's costs of distances (P,), in units of CAUCHY_DISTANCE squared."""
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
    x, y = (pixels - np.column_stack([column, row])).T

    flat = field.distance.ravel()
    index = (_nearest_direction(edges.angles) * height + row) * width + column
    above = flat[index], flat[index + 1]
    below = flat[index + width], flat[index + width + 1]
    upper = above[0] * (1 - x) + above[1] * x
    lower = below[0] * (1 - x) + below[1] * x
    x_slope = (above[1] - above[0]) * (1 - y) + (below[1] - below[0]) * y

    distance = np.where(inside, upper * (1 - y) + lower * y, field.unknown)
    slope = np.column_stack([x_slope, lower - upper]) * inside[:, None]
    return distance, slope, points


# ============================================================ poses moved in the picture


def _best_neighbour(field, edges, pose, reach):
    """The best pose whose drawing is rolled, scaled and shifted, and its edge agreement."""
    rolls = reach * ROLL_STEPS
    scales = np.exp(reach * SIZE_STEPS)
    steps = reach * SHIFT_STEPS * field.K[0, 0] / pose[2, 3]
    shifts = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)

    middle = _project(pose[:3, 3], field.K)
    around = _project(edges.points @ pose[:3, :3].T + pose[:3, 3], field.K) - middle
    agreements = []
    for roll in rolls:
        scaled = scales[:, None, None] * (around @ _roll(roll)[:2, :2].T)
        pixels = np.float32(scaled[:, None] + (middle + shifts)[:, None])
        agreements.append(_agreements(field, pixels, edges.angles + roll, edges.weights))

    agreements = np.array(agreements)
    best = np.unravel_index(agreements.argmax(), agreements.shape)
    roll, scale, shift = (steps[i] for steps, i in zip((rolls, scales, shifts), best))
    facing = _roll(roll) @ _towards(pose[:3, 3]).T @ pose[:3, :3]
    best_pose = pose_at(middle + shift, pose[2, 3] / scale, facing, field.K)
    return best_pose, float(agreements.max())


def _roll(angle):
    """The rotation (3, 3) about the camera's axis, radians."""
    return Rotation.from_rotvec([0, 0, angle]).as_matrix()


def pose_at(pixel: np.ndarray, depth: float, facing: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Return the pose (4, 4) of an `EdgeModel` whose middle lies at a pixel.

    Args:
        pixel: (2,) of the frame.
        depth: along the camera's axis, diameters.
        facing: (3, 3) the rotation that a camera sees which looks straight at the target.
        K: (3, 3) pixels.
    """
    ray = np.linalg.solve(K, [*pixel, 1])
    pose = np.eye(4)
    pose[:3, :3] = _towards(ray) @ facing
    pose[:3, 3] = depth * ray
    return pose


def _towards(ray):
    """The smallest rotation (3, 3) that turns the camera's axis to a ray (3,)."""
    x, y, z = ray
    sine = np.hypot(x, y)
    axis = np.array([-y, x, 0]) / max(sine, 1e-12)
    return Rotation.from_rotvec(axis * np.arctan2(sine, z)).as_matrix()


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
        # A print may differ between sides that have the same shape.
        textured = mesh.textures is not None
        self.tree = None if textured else KDTree(np.hstack([points, colours]))

    def is_same(self, pose, other):
        """Whether two poses (4, 4) differ by little, except for a symmetry."""
        symmetries = self.symmetries
        found = self._nearest_symmetry(np.linalg.inv(other) @ pose)
        if found is not None:
            symmetries = np.concatenate([symmetries, found[None]])
        limit = SAME_DISTANCE * self.diameter
        return bool(mssd_error(pose, other, self.points, symmetries) < limit)

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
