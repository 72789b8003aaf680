"""A pose moved until drawing and frame agree (Gauss-Newton).

The difference between the drawing of a pose and the frame says how the pose must move. Each pixel
of the drawing is a point of the surface. How this point moves in the picture with the pose is
known, and the slopes of the picture say how the colour changes along the way. Drawing takes most of
the time, so each drawing serves several steps, as a `Template`: when the pose moves, the points of
the template are looked up at their new places in the frame. Pixels that cannot be explained
(shadows, stars) lose their weight. A pose that is further off is refined on a coarse picture first.

A step of a pose is a rotation in radians and a translation in model units. MAX_CONDITION compares
their precisions, so `alignment` scales every mesh to the size of the X-wing.

Source: Lucas and Kanade, IJCAI 1981; Baker and Matthews, IJCV 56(3), 2004 (Gauss-Newton on
    brightness); Golub and Pereyra, SIAM J. Numer. Anal. 10(2), 1973 (colours and light are
    eliminated).
"""

import copy
import dataclasses
import functools
from collections.abc import Callable

import cv2
import numpy as np
from scipy.spatial import ConvexHull

import xwing_utils as xu
from xwing.appearance import (
    Drawing,
    LinearShader,
    Painting,
    View,
    camera_points,
    cut_view,
    grey_slope,
    mean_square,
    near_target,
    sample_picture,
    solve_channels,
    solve_coefficients,
    to_light,
)
from xwing.contour import ContourLines, Outline
from xwing.mesh import NEAR, Mesh

MAX_DISTANCE = 21285.0  # diameters: with a point further away the pose has diverged
MAX_STEP_TURN = 0.5  # radians about one axis: a larger step of Gauss-Newton is rejected
MAX_CONDITION = 1e12  # of an information matrix: with a larger one the pose is not determined

# Windows in which a frame is compared with a drawing.
WINDOW = 9  # pixels of the view, width and height
WINDOW_NOISE = 4.0  # grey levels: a window with less contrast agrees with nothing
MAX_WINDOW_CONTRAST = 30.0  # grey levels from which a window counts fully
MIN_CORRELATION = 0.6  # from which a window agrees


@dataclasses.dataclass(frozen=True)
class RefinementSettings:
    """What decides how a pose is refined; the defaults were chosen on validation frames."""

    noise: float = 4.0  # grey levels, lower limit of the spread of the differences
    effective_sample_ratio: float = 0.09  # fraction of the pixels that count as independent
    learnt_pixels: int = 4000  # of a drawing with a learnt albedo that are used, about
    working_size: int = 150  # pixels: a target that spans more is refined on a smaller picture
    min_pixels: int = 50  # of the target, in the picture that is worked on
    coarse_factor: int = 2  # by how much more the coarse picture is shrunk
    coarse_blur: float = 1.0  # pixels: its additional blur, so that poses further off converge
    prior_std_scale: float = 2.0  # factor on the standard deviations of the expected pose
    max_drawings: int = 4  # on one level
    max_steps: int = 6  # of Gauss-Newton on one drawing
    max_shift: float = 0.3  # pixels, root mean square: a pose that moved further is drawn again
    negligible_gain: float = 0.02  # log-likelihood that is not worth another step
    partly_hidden: float = 0.65  # local agreement: with less, only windows that agree are refined
    outline_weight: float = 0.2  # of what the lines across the outline say


# ============================================================ robust costs


def robust_weight(residual: np.ndarray, spread: float, effective_sample_ratio: float) -> np.ndarray:
    """Return the information (P,) of pixels whose errors have a Cauchy distribution.

    Args:
        residual: (P, 3) differences in grey levels.
        spread: grey levels, standard deviation without the outliers.
        effective_sample_ratio: fraction of the pixels that count as independent of each other.

    Returns:
        (P,) float32, per squared grey level.
    """
    squared = mean_square(residual) / np.float32(xu.CAUCHY * spread) ** 2
    return np.float32(effective_sample_ratio / spread**2) / (1 + squared)


def robust_cost(residual: np.ndarray, spread: float, effective_sample_ratio: float) -> float:
    """Return the negative log-likelihood of differences, except for a constant.

    The arguments are those of `robust_weight`.
    """
    squared = mean_square(residual) / np.float32(xu.CAUCHY * spread) ** 2
    total = float(np.log1p(squared).sum(dtype=float))
    return 1.5 * effective_sample_ratio * xu.CAUCHY**2 * total


# ============================================================ what moves with a pose


def pixel_flow(
    pixels: np.ndarray, depth: np.ndarray, K: np.ndarray, centre: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the points of a surface that some pixels show, and how they move in the picture.

    Args:
        pixels: (P,) indices of pixels in the flattened picture.
        depth: (h, w) float32 model units.
        K: (3, 3) camera matrix of the picture.
        centre: (3,) float32 position of the target in camera axes, about which it is turned.

    Returns:
        points (P, 3) in camera axes, from the centre; the derivatives of their column (6, P) and
        row (6, P) in pixels by a step of `xwing_utils.move_pose`.
    """
    x, y, z = camera_points(pixels, depth, K)
    points = np.column_stack([x, y, z]) - centre

    # The derivatives of column and row by the point are (a, 0, c) and (0, b, d).
    fx, fy = np.float32(K[[0, 1], [0, 1]])
    a = fx / z
    b = fy / z
    c = -fx * x / z**2
    d = -fy * y / z**2

    # A turn moves a point p by its cross product with p, a shift moves all points alike.
    px, py, pz = points.T
    zero = np.zeros_like(z)
    column_flow = np.stack([py * c, pz * a - px * c, -py * a, a, zero, c])
    row_flow = np.stack([py * d - pz * b, -px * d, px * b, zero, b, d])
    return points, column_flow, row_flow


@dataclasses.dataclass(frozen=True)
class Template:
    """A painting as P points of the surface, and how their colours change with the pose.

    All arrays but the pose are float32. The painting itself is not kept: it is large.
    """

    view: View
    pose: np.ndarray  # (4, 4) at which it was painted
    spread: float  # grey levels, standard deviation of what the painting does not explain
    sample_ratio: float  # fraction of the P points that count as independent
    diameter: float  # model units, of the target
    pixels: np.ndarray  # (P,) indices of pixels in the flattened view
    points: np.ndarray  # (P, 3) camera axes, from the position of the target
    colours: np.ndarray  # (P, 3) grey levels
    jacobian: np.ndarray  # (6, 3 P) for a step of `move_pose`, after which it is painted again

    def positions(self, pose: np.ndarray) -> np.ndarray | None:
        """Return where in the view the points lie at another pose: (P, 2) pixels.

        None where a point lies behind the camera or extremely far away.
        """
        turn = np.float32(pose[:3, :3] @ self.pose[:3, :3].T)
        points = self.points @ turn.T + np.float32(pose[:3, 3])

        nearest = points[:, 2].min() / self.diameter
        furthest = points[:, 2].max() / self.diameter
        if not (nearest > NEAR and furthest < MAX_DISTANCE):  # true for NaN as well
            return None
        return points @ np.float32(self.view.K[:2].T) / points[:, 2:]

    def residual(self, positions: np.ndarray) -> np.ndarray:
        """Return the frame at some positions (P, 2) less the colours: (P, 3) grey levels."""
        return sample_picture(self.view.image, positions) - self.colours

    def part(self, chosen: np.ndarray) -> "Template":
        """Return the template of some of the points, chosen (P,) bool."""
        jacobian = self.jacobian.reshape(6, 3, -1)[..., chosen].reshape(6, -1)
        return dataclasses.replace(
            self,
            pixels=self.pixels[chosen],
            points=self.points[chosen],
            colours=self.colours[chosen],
            jacobian=jacobian,
        )


@dataclasses.dataclass(frozen=True)
class _Prior:
    """Where a pose is expected, and how precisely."""

    pose: np.ndarray  # (4, 4)
    information: np.ndarray  # (6, 6)

    def slope(self, pose):
        """The derivative (6,) of the cost by a step of the pose."""
        return self.information @ xu.pose_step(pose, self.pose)

    def cost(self, pose):
        """The negative log-likelihood of a pose, except for a constant."""
        return 0.5 * xu.pose_step(pose, self.pose) @ self.slope(pose)


@dataclasses.dataclass(frozen=True)
class Refined:
    """A pose after the steps on one level."""

    pose: np.ndarray  # (4, 4)
    information: np.ndarray  # (6, 6), the inverse of the covariance
    template: Template  # of the last drawing
    residual: np.ndarray  # (P, 3) grey levels, the frame less the template at this pose
    shift: float  # pixels, root mean square, from where the template was drawn
    lines: ContourLines | None = None  # across the outline of the last drawing
    cost: float = np.inf  # negative log-likelihood, once it is compared with that of other poses

    @property
    def covariance(self) -> np.ndarray:
        """(6, 6): rotation vector in camera axes (radians), then translation."""
        return np.linalg.inv(self.information)

    @functools.cached_property
    def local_agreement(self) -> float:
        """0 to 1, in how much of the drawing the frame looks like it, whatever hides the rest.

        In a small window about each pixel the brightness of the frame is compared with that of the
        drawing (normalised cross-correlation). Windows count by the contrast that they are drawn
        with. An occluder costs its own windows only, and a wrong pose agrees nearly nowhere.

        Source: Lewis, Fast Normalized Cross-Correlation, Vision Interface 1995.
        """
        agrees, weight = _compare_windows(self.template, self.residual)
        return float((weight * agrees).sum() / (weight.sum() + 1e-6))


# ============================================================ what is hidden


def _visible_part(template):
    """The part of a template that the frame looks like, at its pose; all if that is little."""
    residual = template.view.image.reshape(-1, 3)[template.pixels] - template.colours
    agrees, _ = _compare_windows(template, residual)
    return template.part(agrees) if np.count_nonzero(agrees) > agrees.size / 10 else template


def _compare_windows(template, residual):
    """Whether the window about each point agrees with a residual (P, 3), and its contrast (P,)."""
    drawn = template.colours.mean(1)
    seen = drawn + residual.mean(1)
    shape = template.view.image.shape[:2]
    layers = np.zeros((shape[0] * shape[1], 6), np.float32)
    layers[template.pixels] = np.stack(
        [np.ones_like(drawn), drawn, seen, drawn * drawn, seen * seen, drawn * seen], axis=1
    )
    sums = cv2.blur(layers.reshape(*shape, 6), (WINDOW, WINDOW), borderType=cv2.BORDER_CONSTANT)
    sums = sums.reshape(-1, 6)[template.pixels]
    drawn, seen, drawn_square, seen_square, product = (sums[:, 1:] / sums[:, :1]).T

    drawn_variance = np.maximum(drawn_square - drawn**2, 0)
    seen_variance = np.maximum(seen_square - seen**2, 0)
    scale = np.sqrt((drawn_variance + WINDOW_NOISE**2) * (seen_variance + WINDOW_NOISE**2))
    correlation = (product - drawn * seen) / scale
    weight = np.minimum(np.sqrt(drawn_variance), MAX_WINDOW_CONTRAST)
    return correlation > MIN_CORRELATION, weight


# ============================================================ steps on one template


@dataclasses.dataclass(frozen=True)
class _Fit:
    """How well a template fits the frame at one pose."""

    pose: np.ndarray  # (4, 4)
    positions: np.ndarray  # (P, 2) pixels of the view
    residual: np.ndarray  # (P, 3) grey levels
    outline: tuple  # information (6, 6), gradient (6,) and cost of the lines across the outline
    cost: float  # negative log-likelihood, except for a constant


class _Descent:
    """Levenberg-Marquardt: the steps of a pose on one template and its lines, under a prior."""

    def __init__(self, template, lines, prior, settings):
        self.template = template
        self.lines = lines
        self.prior = prior
        self.settings = settings
        self.damping = 1e-3

    def run(self):
        """Step until nothing is gained: `Refined`, or None where a point is behind the camera."""
        start = self._fit(self.template.pose)
        if start is None:
            return None
        fit = start

        for _ in range(self.settings.max_steps):
            information, gradient = self._normal_equations(fit)
            better = self._improve(fit, information, gradient)
            if better is None:
                break
            fit = better

        shift = np.sqrt(np.square(fit.positions - start.positions).sum(1).mean())
        information = (information + information.T) / 2
        return Refined(fit.pose, information, self.template, fit.residual, float(shift), self.lines)

    def _fit(self, pose):
        """The `_Fit` at a pose, or None where points would lie behind the camera."""
        positions = self.template.positions(pose)
        if positions is None:
            return None

        residual = self.template.residual(positions)
        cost = robust_cost(residual, self.template.spread, self.template.sample_ratio)
        cost += self.prior.cost(pose)
        outline = self._outline_system(pose)
        return _Fit(pose, positions, residual, outline, cost + outline[2])

    def _outline_system(self, pose):
        """What the lines say at a pose, with their weight; zeros where there are none."""
        if self.lines is None:
            return 0.0, 0.0, 0.0
        weight = self.settings.outline_weight
        return tuple(weight * part for part in self.lines.system(pose))

    def _normal_equations(self, fit):
        """Information (6, 6) about a step from a fit, and gradient (6,) of the log-likelihood."""
        weight = robust_weight(fit.residual, self.template.spread, self.template.sample_ratio)
        jacobian = self.template.jacobian
        weighted = jacobian * np.tile(weight, 3)

        information = np.float64(weighted @ jacobian.T) + self.prior.information
        gradient = weighted @ fit.residual.T.ravel() - self.prior.slope(fit.pose)
        outline_information, outline_gradient, _ = fit.outline
        return information + outline_information, gradient + outline_gradient

    def _improve(self, fit, information, gradient):
        """The `_Fit` after a step that lowers the cost, or None where no step gains enough.

        The damping rises until a step lowers the cost.
        """
        while self.damping < 10:
            damping = self.damping * np.diag(np.diag(information) + 1e-9)
            step = np.linalg.solve(information + damping, gradient)
            if gradient @ step < 2 * self.settings.negligible_gain:
                return None

            trial = None
            if np.abs(step[:3]).max() < MAX_STEP_TURN:
                trial = self._fit(xu.move_pose(fit.pose, step))
            if trial is not None and trial.cost < fit.cost:
                self.damping /= 10
                return trial

            self.damping *= 100

        return None


# ============================================================ refining


class Refiner:
    """Moves poses of one target until its drawing and the frame agree.

    Args:
        mesh: `Mesh` of the target.
        blur: pixels of a frame, standard deviation of its Gaussian blur, in addition to the
            averaging over each pixel's square.
        settings: `RefinementSettings`; None: the defaults.
        albedo: callable, drawing and K of its view -> albedo (h, w, 3) or None, such as
            `KeyFrames.albedo`; None where nothing is known but the mesh.

    Attributes:
        outline: `Outline` of the target, which joins in once it has learnt colours.
    """

    def __init__(
        self,
        mesh: Mesh,
        blur: float = 0.4,
        settings: RefinementSettings | None = None,
        albedo: Callable | None = None,
    ):
        self.shader = LinearShader(mesh)
        self.hull = mesh.vertices[ConvexHull(mesh.vertices).vertices]  # (V, 3), for `view`
        self.diameter = mesh.diameter
        self.blur = blur
        self.settings = settings or RefinementSettings()
        self.albedo = albedo
        self.outline = Outline(self.hull, self.diameter, self.shader.draw_depth)

    def plain(self) -> "Refiner":
        """Return a refiner of the same target that knows its mesh only, whatever is learnt."""
        plain = copy.copy(self)
        plain.albedo = None
        plain.outline = Outline(self.hull, self.diameter, self.shader.draw_depth)
        return plain

    def align(
        self,
        image: np.ndarray,
        pose: np.ndarray,
        K: np.ndarray,
        covariance: np.ndarray | None = None,
    ) -> Refined | None:
        """Refine a pose on a coarse picture, then on a fine one; see `refine` for the arguments."""
        coarse = self.refine(image, pose, K, covariance, coarse=True)
        start = pose if coarse is None else coarse.pose  # a small target shows only on the fine one
        return self.refine(image, start, K, covariance, expected=pose)

    def refine(
        self,
        image: np.ndarray,
        pose: np.ndarray,
        K: np.ndarray,
        covariance: np.ndarray | None = None,
        coarse: bool = False,
        expected: np.ndarray | None = None,
        drawings: int | None = None,
    ) -> Refined | None:
        """Move a pose on one level.

        Args:
            image: (H, W, 3) uint8.
            pose: (4, 4) model -> OpenCV camera, where the steps begin.
            K: (3, 3) camera matrix.
            covariance: (6, 6) of the expected pose; None: no pose is expected.
            coarse: whether the coarse picture is used instead of the fine one.
            expected: (4, 4) pose that has this covariance; None: `pose`.
            drawings: how often the target may be drawn; None: as the settings say.

        Returns:
            Refined, or None where too little of the target shows or the pose is not determined.
        """
        prior = self._prior(pose if expected is None else expected, covariance)
        is_hidden = False

        for _ in range(drawings or self.settings.max_drawings):
            view = self.view(image, pose, K, coarse)
            drawing = None if view is None else self.draw(view, pose)
            if drawing is None:
                return None

            template = self._template(self.paint(view, drawing))
            lines = self.outline.lines(image, K, pose, view.K, drawing.coverage, drawing.depth)
            part = _visible_part(template) if is_hidden else template
            refined = _Descent(part, lines, prior, self.settings).run()
            if refined is None:
                return None

            pose = refined.pose
            if part is not template:
                positions = template.positions(pose)
                if positions is None:
                    return None
                residual = template.residual(positions)
                refined = dataclasses.replace(refined, template=template, residual=residual)

            # Something may hide so much of the target that it would drag the pose along.
            was_hidden = is_hidden
            may_be_hidden = drawing.albedo is not None and not coarse
            is_hidden = may_be_hidden and refined.local_agreement < self.settings.partly_hidden
            if refined.shift < self.settings.max_shift and was_hidden == is_hidden:
                break

        return refined if np.linalg.cond(refined.information) < MAX_CONDITION else None

    def _prior(self, pose, covariance):
        information = np.zeros((6, 6))
        if covariance is not None:
            information += np.linalg.inv(covariance) / self.settings.prior_std_scale**2
        return _Prior(pose, information)

    def view(
        self, image: np.ndarray, poses: np.ndarray, K: np.ndarray, coarse: bool = False
    ) -> View | None:
        """Cut out the part of a frame around the target, and shrink it to the working size.

        Args:
            image: (H, W, 3) uint8.
            poses: (4, 4) or N (4, 4): the view contains the target at each of them.
            K: (3, 3) camera matrix.
            coarse: whether the view is shrunk and blurred further.

        Returns:
            View, or None where too little would show, or the target reaches behind the camera.
        """
        poses = np.reshape(poses, (-1, 4, 4))
        pixels = np.array([xu.project_pose(self.hull, pose, K) for pose in poses])
        if not np.isfinite(pixels).all():
            return None

        span = np.ptp(pixels.clip(0, image.shape[1::-1]), axis=1).max()
        shrink = max(1, int(np.ceil(span / self.settings.working_size)))
        extra_blur = 0.0
        if coarse:
            shrink *= self.settings.coarse_factor
            extra_blur = self.settings.coarse_blur
        return cut_view(image, pixels.reshape(-1, 2), K, shrink, self.blur, extra_blur)

    def draw(
        self, view: View, pose: np.ndarray, true_paint: bool = True, learnt: bool = True
    ) -> Drawing | None:
        """Draw a pose, with the albedo that was learnt or with that of the mesh's texture.

        See `LinearShader.draw`; None where too little shows or the target is too near.
        """
        drawing = self.shader.draw(view, pose, true_paint)
        enough = np.count_nonzero(drawing.coverage) >= self.settings.min_pixels
        far_enough = drawing.depth.min() > NEAR * self.diameter
        if not (enough and far_enough):
            return None

        albedo = None
        if learnt and self.albedo is not None:
            albedo = self.albedo(drawing, view.K)
        return drawing if albedo is None else dataclasses.replace(drawing, albedo=albedo)

    def paint(self, view: View, drawing: Drawing, behind: np.ndarray | None = None) -> Painting:
        """Solve for the colours and the light of a drawing; see `LinearShader.paint`."""
        return self.shader.paint(view, drawing, self.settings.noise, behind)

    def paint_pose(self, image: np.ndarray, pose: np.ndarray, K: np.ndarray) -> Painting | None:
        """Draw a pose in whatever paint explains the frame best; None where too little shows.

        Args:
            image: (H, W, 3) uint8.
            pose: (4, 4) model -> OpenCV camera.
            K: (3, 3) camera matrix.

        Returns:
            Painting or None.
        """
        view = self.view(image, pose, K)
        drawing = None if view is None else self.draw(view, pose, true_paint=False)
        return None if drawing is None else self.paint(view, drawing)

    def paint_plain(self, image: np.ndarray, pose: np.ndarray, K: np.ndarray) -> Painting | None:
        """Draw a pose as the mesh says, without the albedo that was learnt.

        The arguments and the result are those of `paint_pose`.
        """
        view = self.view(image, pose, K)
        drawing = None if view is None else self.draw(view, pose, learnt=False)
        return None if drawing is None else self.paint(view, drawing)

    def _template(self, painting):
        """The `Template` of a painting.

        It has the pixels beside the target too, because the target may move there.
        """
        view = painting.view
        drawing = painting.drawing
        depth = _depth_around(drawing.depth)
        pixels = np.flatnonzero(near_target(drawing.coverage) & np.isfinite(depth))
        pixels, sample_ratio = self._thinned(pixels, drawing)
        colours = painting.picture.reshape(-1, 3)[pixels]

        position = np.float32(drawing.pose[:3, 3])
        points, column_flow, row_flow = pixel_flow(pixels, depth, view.K, position)
        slope_x, slope_y = _slopes(painting.picture, pixels)
        jacobian = -(slope_x * column_flow[:, None] + slope_y * row_flow[:, None])
        jacobian = jacobian.reshape(18, len(pixels))  # rows: each component of a step, channel
        jacobian -= self._explained_by_colours(jacobian, colours, painting, pixels, sample_ratio)
        return Template(
            view,
            drawing.pose,
            painting.spread,
            sample_ratio,
            self.diameter,
            pixels,
            points,
            colours,
            jacobian.reshape(6, -1),
        )

    def _thinned(self, pixels, drawing):
        """Some of the pixels (P,), and the fraction of them that count as independent.

        A drawing with a learnt albedo explains so much that a part of its pixels is enough.
        """
        step = 1
        if drawing.albedo is not None:
            step = max(1, round(len(pixels) / self.settings.learnt_pixels))
        return pixels[::step], step * self.settings.effective_sample_ratio

    def _explained_by_colours(self, jacobian, colours, painting, pixels, sample_ratio):
        """The part of a jacobian (18, P) that other colours and another light explain as well.

        This part says nothing about the pose, because the colours and the light that fit best are
        found again at every pose (variable projection).
        """
        residual = painting.view.image.reshape(-1, 3)[pixels] - colours
        weight = robust_weight(residual, painting.spread, sample_ratio)

        slope = grey_slope(to_light(colours.clip(0)))
        basis = painting.drawing.shading_basis
        basis = basis.reshape(-1, basis.shape[-1])[pixels] * slope[:, None]
        ratio = np.float32(sample_ratio / painting.spread**2)
        regularisation = self.shader.regularisation * ratio

        albedo = painting.drawing.albedo
        if albedo is None:
            coefficients = solve_coefficients(jacobian.T, basis, weight, regularisation)
            return coefficients.T @ basis.T

        albedo = albedo.reshape(-1, 3)[pixels]
        slopes = jacobian.reshape(6, 3, -1).swapaxes(1, 2)  # (6, P, 3)
        coefficients = solve_channels(slopes, basis, albedo, weight, regularisation)
        explained = (basis @ coefficients) * albedo
        return explained.swapaxes(1, 2).reshape(18, -1)


def _depth_around(depth):
    """Depth (h, w) of a drawing and of two pixels beside it.

    Each pixel has the smallest depth around it, because an edge moves with its nearer side.
    """
    near = cv2.erode(depth, np.ones((3, 3)), borderType=cv2.BORDER_REPLICATE)
    wide = cv2.erode(near, np.ones((3, 3)), borderType=cv2.BORDER_REPLICATE)
    return np.where(np.isfinite(near), near, wide)


def _slopes(picture, pixels):
    """Slopes of a picture (h, w, 3) to the right and down at pixels (P,): (3, P) each."""
    difference = np.float32([-0.5, 0, 0.5])
    same = np.float32([1])
    right = cv2.sepFilter2D(picture, -1, difference, same)
    down = cv2.sepFilter2D(picture, -1, same, difference)
    return right.reshape(-1, 3)[pixels].T, down.reshape(-1, 3)[pixels].T
