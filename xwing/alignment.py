"""The pose moved until drawing and frame agree, and rival poses judged by what they explain of the frame.

The ship's shape is known, so a pose says which pixel shows which surface. Paint and light need not be known:
one colour per material, and light that varies smoothly with a surface's direction, enter the picture
linearly and are solved for; what the ship does not cover is guessed from the pixels around it. What then
differs between drawing and frame says how the pose must move (Gauss-Newton). Drawing costs most, so each
drawing serves several steps: its pixels are points of the surface, looked up elsewhere in the frame where the
pose moves. Pixels that cannot be explained (shadows, stars) lose their weight. Rival poses are judged as if
the ship were repainted. All of this is in linear light; only differences are measured in grey levels.
"""

import dataclasses

import cv2
import joblib
import numpy as np
from scipy.spatial import ConvexHull

import xwing_utils as xu
from xwing import mesh

NOISE = 4.0  # grey levels: no pixel is trusted further than that
WORKING_SIZE = 150  # pixels: a ship that spans more is aligned on a smaller picture
FINE, COARSE = 1, 2  # levels: by how much more the picture is shrunk
COARSE_BLUR = 1.0  # pixels, by which the coarse picture is blurred besides
MIN_PIXELS = 50  # of the ship, in the picture that is worked on
EFFECTIVE_SAMPLE_RATIO = 0.09  # share of the pixels whose errors count as independent of each other
PRIOR_STD_SCALE = 2.0  # factor on the standard deviations that a start comes with
MAX_DRAWINGS, MAX_STEPS = 4, 6  # on one level; of Gauss-Newton on one drawing
MAX_SHIFT = 0.3  # pixels, root mean square: a pose that has moved further is drawn anew
NEGLIGIBLE_GAIN = 0.02  # log-likelihood that is not worth another step
RULED_OUT = 30.0  # log-likelihood by which a rival is worse that is not refined further
MIN_EXPLAINED_CONTRAST = 0.42  # share of a frame's contrast that a drawing must explain, 0 to 1
EVIDENCE = np.array(
    [-25.39, 26.88, 1.45, 0.47]
)  # log-odds for each of `_evidence`: tests/fit_evidence.py
MIN_PROBABILITY = 0.8  # of being right, from which a single frame's pose is accepted
SURE_PROBABILITY = 0.95  # below which a frame is worth more looks
WELL_EXPLAINED = 0.65  # share from which neither other poses nor a coarse picture are tried
USUAL_RATIO = (
    0.9  # of that share to what a track explained lately, from which a coarse picture is not either
)
SURE_MARGIN = (
    10.0  # log-likelihood margin of keypoints from which MIN_EXPLAINED_CONTRAST is enough for that
)
NEARBY = 12.0, 25.0  # degrees by which starts are turned where the best pose explains too little
MIN_CONTRAST = 45.0  # log-likelihood: with less there is nothing to explain


@dataclasses.dataclass(frozen=True)
class _View:
    """The part of a frame about the ship, shrunk."""

    image: np.ndarray  # (h, w, 3) float32 grey levels
    light: np.ndarray  # (h, w, 3) float32
    K: np.ndarray  # (3, 3) of that part
    blur: float  # pixels of the view, standard deviation of the Gaussian filter through which it was taken


@dataclasses.dataclass(frozen=True)
class _Template:
    """A painted drawing as P points of the surface, and how their colours change with the pose; float32."""

    view: _View
    pose: np.ndarray  # (4, 4)
    pixels: np.ndarray  # (P,) flat
    points: np.ndarray  # (P, 3) camera axes, from the ship's position
    colours: np.ndarray  # (P, 3) grey levels
    jacobian: np.ndarray  # (6, 3 P) for a step of `xu.move_pose`, colours and light following
    spread: float  # grey levels, of what the drawing leaves unexplained

    def positions(self, pose):
        """Where in the view the points lie at another pose, (P, 2) pixels; None if one lies behind."""
        turn = np.float32(pose[:3, :3] @ self.pose[:3, :3].T)
        points = self.points @ turn.T + np.float32(pose[:3, 3])
        if not (points[:, 2].min() > mesh.NEAR and points[:, 2].max() < 1e4):  # so for NaN
            return None
        return points @ np.float32(self.view.K[:2].T) / points[:, 2:]

    def residual(self, positions):
        """(P, 3) grey levels: the frame at those positions less the colours."""
        rows = -(-len(positions) // 1024)  # OpenCV takes no row longer than 32767
        centres = np.resize(
            positions - np.float32(0.5), (rows, 1024, 2)
        )  # its whole pixels are centres
        seen = cv2.remap(
            self.view.image, centres, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
        )
        return seen.reshape(-1, 3)[: len(positions)] - self.colours


@dataclasses.dataclass(frozen=True)
class _Prior:
    """Where a pose is expected, and how surely."""

    pose: np.ndarray  # (4, 4)
    information: np.ndarray  # (6, 6)

    def slope(self, pose):
        return self.information @ xu.pose_step(pose, self.pose)

    def cost(self, pose):
        return 0.5 * xu.pose_step(pose, self.pose) @ self.slope(pose)


@dataclasses.dataclass(frozen=True)
class _Refined:
    """Where the steps on one level ended."""

    pose: np.ndarray  # (4, 4)
    information: np.ndarray  # (6, 6), the inverse of its covariance
    template: _Template  # of the last drawing
    residual: np.ndarray  # (P, 3) grey levels that the template leaves there
    shift: float  # pixels, root mean square, from where the template was drawn
    cost: float = (
        np.inf
    )  # negative log-likelihood but for a constant, where it was compared with others


class Aligner:
    """Refines poses on the pixels of a frame, and decides between rival ones.

        aligner = Aligner(load_mesh("data/xwing.obj"))
        pose, covariance = aligner.align(image, pose, K)

    ship: `Mesh`; blur: pixels, sigma of the filter that frames were taken through beside the pixel's square.

    Source: Lucas and Kanade, IJCAI 1981; Baker and Matthews, IJCV 56(3), 2004 (Gauss-Newton on brightness);
        Golub and Pereyra, SIAM J. Numer. Anal. 10(2), 1973 (colours and light are eliminated).
    """

    def __init__(self, ship, blur=0.4):
        self.ship, self.blur = mesh.UnpaintedMesh(ship), blur
        self.outline = ship.vertices[ConvexHull(ship.vertices).vertices]
        weights = [0.1] * len(ship.names) + [1.0] * mesh.UnpaintedMesh.HARMONICS
        self.stiffness = np.diag(np.float32(weights)) * 255**2  # draws colours and light towards 0

    def align(self, image, pose, K, covariance=None):
        """Refine a pose that is off by a few pixels, on a coarse picture first.

        Args:
            image: (H, W, 3) uint8; pose: (4, 4) model -> OpenCV camera; K: (3, 3) pixels.
            covariance: (6, 6) of the pose, or None; with it, what the pixels leave open stays as it is.
        Returns:
            pose (4, 4) and covariance (6, 6), or None where too little of the ship shows or it runs away.
        """
        refined = self._align(image, pose, K, covariance)
        return None if refined is None else (refined.pose, np.linalg.inv(refined.information))

    def track(self, image, pose, K, covariance=None, usual=1.0):
        """Refine a pose predicted from the frames before, within a few milliseconds: a `PoseEstimate`,
        accepted if it explains MIN_EXPLAINED_CONTRAST of what is seen. Arguments as for `align`. Where it
        explains less than is `usual` the steps begin again on a coarse picture."""
        refined = self._refine(image, pose, K, FINE, covariance, drawings=2)
        explained = _explained_contrast(refined)
        if explained < min(WELL_EXPLAINED, USUAL_RATIO * usual):
            again = self._align(image, pose, K, covariance)
            if (more := _explained_contrast(again)) > explained:
                refined, explained = again, more
        if refined is None:
            return xu.PoseEstimate(pose, covariance, False, "too little of the ship is in sight")
        enough, covariance = explained >= MIN_EXPLAINED_CONTRAST, np.linalg.inv(refined.information)
        reason = "" if enough else f"the pose explains only {explained:.0%} of what is seen"
        return xu.PoseEstimate(
            refined.pose, covariance, not reason, reason, explained_contrast=explained
        )

    def verify(self, image, estimate, K, others=()):
        """Refine and judge a single frame's estimate on its pixels: a `PoseEstimate`.

        Poses that a flat ship is easily taken for are rivals always. The best is accepted if its edges are
        the frame's, its rivals explain the pixels worse and the keypoints agree: see `_evidence`. `others`
        are estimates from more looks at the same frame, such as `turned_looks`.
        """
        looks = [look for look in (estimate, *others) if look.pose is not None]
        if not looks or not (found := self._candidates(image, looks, K)):
            reason = estimate.reason or "too little of the ship is in sight"
            return dataclasses.replace(estimate, accepted=False, reason=reason)
        found += self._rivals(image, self._rank(image, found, K)[0][0], K)
        ranked, explained = self._rank(image, found, K)
        best, *rivals = _suppress_similar(ranked, 30)
        margin = rivals[0].cost - best.cost if rivals else looks[0].log_likelihood_margin
        same = [xu.rotation_error(best.pose, look.pose) < 30 for look in looks]
        agreement = (
            mesh.edge_agreement(*drawn) if (drawn := self._painted(image, best.pose, K)) else 0.0
        )
        probability = float(1 / (1 + np.exp(-EVIDENCE @ _evidence(agreement, margin, same))))
        reason = (
            ""
            if probability >= MIN_PROBABILITY
            else (
                f"right with a probability of {probability:.2f}: {agreement:.0%} of its edges are in the frame"
            )
        )
        return dataclasses.replace(
            estimate,
            pose=best.pose,
            covariance=np.linalg.inv(best.information),
            accepted=not reason,
            reason=reason,
            reprojection=estimate.reprojection if same[0] else np.nan,
            log_likelihood_margin=margin,
            explained_contrast=explained,
            probability=probability,
            runner_up=rivals[0].pose if rivals else looks[0].runner_up,
        )

    def picture(self, image, pose, K):
        """The frame about the ship and what the pose explains of it, (h, w, 3) uint8 each, or None."""
        painted = self._painted(image, pose, K)
        return painted and tuple(p.clip(0, 255).astype(np.uint8) for p in painted[:2])

    def photometric_costs(self, image, poses, K, level=FINE):
        """How badly N poses explain a frame, and a smooth sky: costs (N,), infinite where no ship shows, and
        one; negative log-likelihoods over the same pixels, but for a constant."""
        view = self._view(image, poses, K, level)
        drawings = [
            None if view is None else self._draw(view, pose, true_paint=False) for pose in poses
        ]
        if not any(drawings):
            return np.full(len(poses), np.inf), 0.0
        cover = np.max([drawing.cover for drawing in drawings if drawing], axis=0)
        ship, costs = (
            np.flatnonzero(cv2.dilate(cover, np.ones((3, 3))) > 0.02),
            np.full(len(poses), np.inf),
        )
        seen, behind = view.image.reshape(-1, 3)[ship], _surroundings(view.light, cover)
        for i, drawing in enumerate(drawings):
            if drawing is not None:
                painted, _ = self._paint(view, drawing, behind)
                costs[i] = _robust_cost(seen - painted.reshape(-1, 3)[ship], 2 * NOISE)
        return costs, _smooth_sky_cost(view.image, ship)

    def _candidates(self, image, looks, K):
        """What some estimates may be, refined: the only one where it explains enough, or also what all and
        their runners-up are easily taken for and, where that explains too little, what is NEARBY the best."""
        first = self._align(image, looks[0].pose, K, looks[0].covariance)
        enough = (
            WELL_EXPLAINED
            if looks[0].log_likelihood_margin < SURE_MARGIN
            else MIN_EXPLAINED_CONTRAST
        )
        if len(looks) == 1 and _explained_contrast(first) >= enough:
            return [first]
        likely = [
            pose for look in looks for pose in (look.pose, look.runner_up) if pose is not None
        ]
        starts = [start for pose in likely for start in xu.ambiguous_poses(pose)]
        found = self._search(image, starts, K, 2 * len(looks)) + ([] if first is None else [first])
        ranked, explained = self._rank(image, found, K)
        if ranked and explained < MIN_EXPLAINED_CONTRAST:
            best, axes = ranked[0].pose, np.hstack([ranked[0].pose[:3, :3].T, np.zeros((3, 3))])
            turns = [turn * axis for turn in np.radians(NEARBY) for axis in (*axes, *-axes)]
            found += self._search(
                image, [xu.move_pose(best, turn) for turn in turns], K, 2, drawings=2
            )
            best = self._rank(image, found, K)[0][0].pose
            found += self._search(image, xu.ambiguous_poses(best)[1:], K, 2)
        return found

    def _search(self, image, starts, K, count, drawings=MAX_DRAWINGS):
        """The best few of what some poses lead to from a coarse picture on."""
        found = self._refine_all(image, starts, K, COARSE, drawings=drawings)
        best = _suppress_similar(self._rank(image, found, K, COARSE)[0], 10)[:count]
        return self._refine_all(image, [candidate.pose for candidate in best], K)

    def _rivals(self, image, best, K):
        """The best pose and what it is easily taken for, refined as far as they compete."""
        once = self._refine_all(image, xu.ambiguous_poses(best.pose)[1:], K, drawings=1)
        ranked, _ = self._rank(image, [best, *once], K)
        near = [r.pose for r in _suppress_similar(ranked, 3) if r.cost < ranked[0].cost + RULED_OUT]
        return once + self._refine_all(image, near, K)

    def _refine_all(self, image, poses, K, level=FINE, drawings=MAX_DRAWINGS):
        """Those of some poses that can be refined on one level, as `_Refined`."""
        return [
            r for pose in poses if (r := self._refine(image, pose, K, level, drawings=drawings))
        ]

    def _rank(self, image, candidates, K, level=FINE):
        """`_Refined` with their costs, best first, and the share of the contrast that the best explains."""
        if not candidates:
            return [], 0.0
        costs, sky = self.photometric_costs(
            image, [candidate.pose for candidate in candidates], K, level
        )
        ranked = [dataclasses.replace(c, cost=cost) for cost, c in zip(costs.tolist(), candidates)]
        return sorted(ranked, key=lambda c: c.cost), float(
            (sky - costs.min()) / max(sky, MIN_CONTRAST)
        )

    def _view(self, image, poses, K, level=FINE, margin=6):
        """The part of the frame about the ship at some poses, shrunk to WORKING_SIZE; None for too little."""
        size = np.array(image.shape[1::-1])
        pixels = np.array(
            [xu.project_pose(self.outline, pose, K) for pose in np.reshape(poses, (-1, 4, 4))]
        )
        if not np.isfinite(pixels).all():
            return None
        span = np.ptp(pixels.clip(0, size), axis=1).max()
        shrink = level * max(1, int(np.ceil(span / WORKING_SIZE)))
        pixels, size = pixels.reshape(-1, 2) / shrink, size // shrink
        low = np.floor(pixels.min(0) - margin).clip(0, size).astype(int)
        high = np.ceil(pixels.max(0) + margin).clip(0, size).astype(int)
        if (high - low < 8).any():
            return None
        (left, top), (right, bottom) = low * shrink, high * shrink
        light = cv2.LUT(
            image[top:bottom, left:right], mesh.to_light(np.arange(256, dtype=np.float32))
        )
        light = cv2.resize(light, (high - low).tolist(), interpolation=cv2.INTER_AREA)
        blur = self.blur / shrink
        if level == COARSE:  # further off, so that more is pulled near
            light, blur = (
                cv2.GaussianBlur(light, (0, 0), COARSE_BLUR),
                float(np.hypot(blur, COARSE_BLUR)),
            )
        K = K / [[shrink], [shrink], [1]] - [[0, 0, low[0]], [0, 0, low[1]], [0, 0, 0]]
        return _View(mesh.to_grey(light), light, K, blur)

    def _draw(self, view, pose, true_paint=True):
        """The `mesh.Drawing` of a pose, or None where fewer than MIN_PIXELS show, or some are too near."""
        seen = self.ship.draw(pose, view.K, *view.image.shape[1::-1], view.blur, true_paint)
        return (
            seen
            if np.count_nonzero(seen.cover) >= MIN_PIXELS and seen.depth.min() > mesh.NEAR
            else None
        )

    def _paint(self, view, drawing, behind=None):
        """Solve for colours and light: picture (h, w, 3) and the spread of what remains, grey levels."""
        covered = np.flatnonzero(drawing.cover > 0.01)
        behind = _surroundings(view.light, drawing.cover) if behind is None else behind
        picture = (1 - drawing.cover[..., None]) * behind
        basis = drawing.basis.reshape(drawing.cover.size, -1)[covered]
        target = (view.light - picture).reshape(-1, 3)[covered]
        unit = np.square(mesh.grey_slope(view.light.reshape(-1, 3)[covered]))
        weight = unit
        for _ in range(3):  # iteratively reweighted least squares
            weighted = basis.T * weight
            colours = np.linalg.solve(weighted @ basis + self.stiffness, weighted @ target)
            painted = basis @ colours
            squared = _mean_square(target - painted) * unit
            spread = max(NOISE, 1.4826 * float(np.sqrt(np.median(squared))))
            weight = unit / (1 + squared / np.float32(xu.CAUCHY * spread) ** 2)
        picture.reshape(-1, 3)[covered] += painted
        return mesh.to_grey(picture), spread

    def _painted(self, image, pose, K):
        """The frame about the ship, and the ship drawn there at a pose, (h, w, 3), its cover; or None."""
        view = self._view(image, pose, K)
        drawing = view and self._draw(view, pose, true_paint=False)
        return drawing and (view.image, self._paint(view, drawing)[0], drawing.cover)

    def _align(self, image, pose, K, covariance):
        """`_refine` on a coarse picture, then on a fine one."""
        rough = self._refine(image, pose, K, COARSE, covariance)
        start = pose if rough is None else rough.pose  # a small ship is seen on the fine level only
        return self._refine(image, start, K, FINE, covariance, pose)

    def _refine(self, image, pose, K, level, covariance=None, expected=None, drawings=MAX_DRAWINGS):
        """Move a pose on one level: `_Refined`, or None where too little of the ship shows."""
        known = 0 if covariance is None else np.linalg.inv(covariance) / PRIOR_STD_SCALE**2
        prior = _Prior(pose if expected is None else expected, np.zeros((6, 6)) + known)
        for _ in range(drawings):
            view = self._view(image, pose, K, level)
            if view is None or (drawing := self._draw(view, pose)) is None:
                return None
            refined = _descend(self._template(view, drawing), prior)
            pose = refined.pose
            if refined.shift < MAX_SHIFT:
                break
        return refined if np.linalg.cond(refined.information) < 1e12 else None

    def _template(self, view, drawing):
        """The `_Template` of a drawing. The pixels beside the ship count too: it may move there."""
        picture, spread = self._paint(view, drawing)
        near = cv2.erode(drawing.depth, np.ones((3, 3)), borderType=cv2.BORDER_REPLICATE)
        wide = cv2.erode(near, np.ones((3, 3)), borderType=cv2.BORDER_REPLICATE)
        depth = np.where(np.isfinite(near), near, wide)  # a rim moves as its nearer side
        pixels = np.flatnonzero(
            (cv2.dilate(drawing.cover, np.ones((3, 3))) > 0.02) & np.isfinite(depth)
        )
        colours = picture.reshape(-1, 3)[pixels]
        weight = _weight(view.image.reshape(-1, 3)[pixels] - colours, spread)
        points, flow_x, flow_y = mesh.pixel_flow(
            pixels, depth, view.K, np.float32(drawing.pose[:3, 3])
        )
        ahead, here = np.float32([-0.5, 0, 0.5]), np.float32([1])
        slope_x = cv2.sepFilter2D(picture, -1, ahead, here).reshape(-1, 3)[pixels].T
        slope_y = cv2.sepFilter2D(picture, -1, here, ahead).reshape(-1, 3)[pixels].T
        jacobian = -(slope_x * flow_x[:, None] + slope_y * flow_y[:, None]).reshape(18, len(pixels))
        slope = mesh.grey_slope(mesh.to_light(colours.clip(0)))
        basis = drawing.basis.reshape(depth.size, -1)[pixels] * slope[:, None]
        weighted = basis.T * weight
        stiffness = self.stiffness * np.float32(EFFECTIVE_SAMPLE_RATIO / spread**2)
        jacobian -= np.linalg.solve(weighted @ basis + stiffness, weighted @ jacobian.T).T @ basis.T
        return _Template(
            view, drawing.pose, pixels, points, colours, jacobian.reshape(6, -1), spread
        )


def _descend(template, prior):
    """Levenberg-Marquardt on one template: `_Refined`."""
    pose, damping = template.pose, 1e-3
    first = positions = template.positions(pose)
    residual = template.residual(first)
    cost = _robust_cost(residual, template.spread) + prior.cost(pose)
    for _ in range(MAX_STEPS):
        weighted, moved = template.jacobian * np.tile(_weight(residual, template.spread), 3), False
        information = np.float64(weighted @ template.jacobian.T) + prior.information
        gradient = weighted @ residual.T.ravel() - prior.slope(pose)
        while damping < 10 and not moved:
            step = np.linalg.solve(
                information + damping * np.diag(np.diag(information) + 1e-9), gradient
            )
            if gradient @ step < 2 * NEGLIGIBLE_GAIN:
                break
            trial = xu.move_pose(pose, step)
            there = template.positions(trial) if np.abs(step[:3]).max() < 0.5 else None
            if there is not None:
                left = template.residual(there)
                trial_cost = _robust_cost(left, template.spread) + prior.cost(trial)
                moved = trial_cost < cost
            damping = damping / 10 if moved else damping * 100
        if not moved:
            break
        pose, positions, residual, cost = trial, there, left, trial_cost
    shift = np.sqrt(np.square(positions - first).sum(1).mean())
    return _Refined(pose, (information + information.T) / 2, template, residual, float(shift))


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


def _evidence(agreement, margin, same):
    """What speaks for a pose, (4,): one; how far its edges are the frame's; by how much its rivals explain
    the pixels worse; how many looks found it less those that found another."""
    return np.array([1, agreement, np.log1p(np.clip(margin, 0, 100)), 2 * sum(same) - len(same)])


def _explained_contrast(refined):
    """Share of the contrast about the ship, against a smooth sky, that a refined pose or None explains."""
    if refined is None:
        return 0.0
    sky = _smooth_sky_cost(refined.template.view.image, refined.template.pixels)
    return (sky - _robust_cost(refined.residual, 2 * NOISE)) / max(sky, MIN_CONTRAST)


def _suppress_similar(ranked, degrees):
    """Of `_Refined`, best first, those that are turned by more than an angle against every better one."""
    kept = []
    for candidate in ranked:
        apart = all(xu.rotation_error(candidate.pose, better.pose) > degrees for better in kept)
        kept += [candidate] if apart else []
    return kept


def turned_looks(model, images, K):
    """What a network finds in images (N, S, S, 3) uint8 turned by a quarter, a half and three quarters: three
    `PoseEstimate` for each, in its own axes, of other errors. K: (3, 3), or (N, 3, 3)."""
    turned = np.concatenate([np.rot90(images, turns, (1, 2)) for turns in (1, 2, 3)])
    maps = np.split(xu.predict_heatmaps(model, turned, channels=len(xu.KEYPOINTS)), 3)
    maps = np.concatenate([np.rot90(part, -turns, (1, 2)) for turns, part in enumerate(maps, 1)])
    found = zip(np.resize(K, (len(maps), 3, 3)), *xu.read_keypoints(maps, model.settings))
    looks = [xu.estimate_pose(points, camera, *sureness) for camera, points, *sureness in found]
    return [looks[i :: len(images)] for i in range(len(images))]


def verify_frames(aligner, images, estimates, K, model):
    """`Aligner.verify` on all cores for images (N, S, S, 3) uint8 and N estimates, with `turned_looks` by the
    model where the pose is not sure without: a list."""

    def verify(*arguments):
        cv2.setNumThreads(1)  # the frames are what is shared out
        return aligner.verify(*arguments)

    def verify_rows(rows, others):
        tasks = (
            joblib.delayed(verify)(images[i], estimates[i], K, o) for i, o in zip(rows, others)
        )
        return zip(rows, joblib.Parallel(n_jobs=-1, max_nbytes=None)(tasks))  # none on disk

    found = dict(verify_rows(range(len(images)), [()] * len(images)))
    unsure = [i for i in found if not found[i].probability >= SURE_PROBABILITY]
    found |= verify_rows(unsure, turned_looks(model, images[unsure], K)) if unsure else {}
    return list(found.values())
