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
import numpy as np
from scipy.spatial import ConvexHull

import xwing_utils as xu
from xwing import appearance, mesh
from xwing.appearance import (
    EFFECTIVE_SAMPLE_RATIO,
    NOISE,
    LinearShader,
    _mean_square,
    _robust_cost,
    _smooth_sky_cost,
    _surroundings,
    _weight,
)
from xwing.refinement import MAX_DRAWINGS, _descend, _Prior, _Template, _View, pixel_flow
from xwing.verification import (
    EVIDENCE,
    MIN_PROBABILITY,
    _evidence,
    _suppress_similar,
    edge_agreement,
    verify_frames,  # noqa: F401  also found here
)

WORKING_SIZE = 150  # pixels: a ship that spans more is aligned on a smaller picture
FINE, COARSE = 1, 2  # levels: by how much more the picture is shrunk
COARSE_BLUR = 1.0  # pixels, by which the coarse picture is blurred besides
MIN_PIXELS = 50  # of the ship, in the picture that is worked on
PRIOR_STD_SCALE = 2.0  # factor on the standard deviations that a start comes with
MAX_SHIFT = 0.3  # pixels, root mean square: a pose that has moved further is drawn anew
RULED_OUT = 30.0  # log-likelihood by which a rival is worse that is not refined further
MIN_EXPLAINED_CONTRAST = 0.42  # share of a frame's contrast that a drawing must explain, 0 to 1
WELL_EXPLAINED = 0.65  # share from which neither other poses nor a coarse picture are tried
USUAL_RATIO = (
    0.9  # of that share to what a track explained lately, from which a coarse picture is not either
)
SURE_MARGIN = (
    10.0  # log-likelihood margin of keypoints from which MIN_EXPLAINED_CONTRAST is enough for that
)
NEARBY = 12.0, 25.0  # degrees by which starts are turned where the best pose explains too little
MIN_CONTRAST = 45.0  # log-likelihood: with less there is nothing to explain


class Aligner:
    """Refines poses on the pixels of a frame, and decides between rival ones.

        aligner = Aligner(load_mesh("data/xwing.obj"))
        pose, covariance = aligner.align(image, pose, K)

    ship: `Mesh`; blur: pixels, sigma of the filter that frames were taken through beside the pixel's square.

    Source: Lucas and Kanade, IJCAI 1981; Baker and Matthews, IJCV 56(3), 2004 (Gauss-Newton on brightness);
        Golub and Pereyra, SIAM J. Numer. Anal. 10(2), 1973 (colours and light are eliminated).
    """

    def __init__(self, ship, blur=0.4):
        self.ship, self.blur = LinearShader(ship), blur
        self.outline = ship.vertices[ConvexHull(ship.vertices).vertices]
        weights = [0.1] * len(ship.names) + [1.0] * LinearShader.HARMONICS
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
        agreement = edge_agreement(*drawn) if (drawn := self._painted(image, best.pose, K)) else 0.0
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
            image[top:bottom, left:right], appearance.to_light(np.arange(256, dtype=np.float32))
        )
        light = cv2.resize(light, (high - low).tolist(), interpolation=cv2.INTER_AREA)
        blur = self.blur / shrink
        if level == COARSE:  # further off, so that more is pulled near
            light, blur = (
                cv2.GaussianBlur(light, (0, 0), COARSE_BLUR),
                float(np.hypot(blur, COARSE_BLUR)),
            )
        K = K / [[shrink], [shrink], [1]] - [[0, 0, low[0]], [0, 0, low[1]], [0, 0, 0]]
        return _View(appearance.to_grey(light), light, K, blur)

    def _draw(self, view, pose, true_paint=True):
        """The `Drawing` of a pose, or None where fewer than MIN_PIXELS show, or some are too near."""
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
        unit = np.square(appearance.grey_slope(view.light.reshape(-1, 3)[covered]))
        weight = unit
        for _ in range(3):  # iteratively reweighted least squares
            weighted = basis.T * weight
            colours = np.linalg.solve(weighted @ basis + self.stiffness, weighted @ target)
            painted = basis @ colours
            squared = _mean_square(target - painted) * unit
            spread = max(NOISE, 1.4826 * float(np.sqrt(np.median(squared))))
            weight = unit / (1 + squared / np.float32(xu.CAUCHY * spread) ** 2)
        picture.reshape(-1, 3)[covered] += painted
        return appearance.to_grey(picture), spread

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
        points, flow_x, flow_y = pixel_flow(pixels, depth, view.K, np.float32(drawing.pose[:3, 3]))
        ahead, here = np.float32([-0.5, 0, 0.5]), np.float32([1])
        slope_x = cv2.sepFilter2D(picture, -1, ahead, here).reshape(-1, 3)[pixels].T
        slope_y = cv2.sepFilter2D(picture, -1, here, ahead).reshape(-1, 3)[pixels].T
        jacobian = -(slope_x * flow_x[:, None] + slope_y * flow_y[:, None]).reshape(18, len(pixels))
        slope = appearance.grey_slope(appearance.to_light(colours.clip(0)))
        basis = drawing.basis.reshape(depth.size, -1)[pixels] * slope[:, None]
        weighted = basis.T * weight
        stiffness = self.stiffness * np.float32(EFFECTIVE_SAMPLE_RATIO / spread**2)
        jacobian -= np.linalg.solve(weighted @ basis + stiffness, weighted @ jacobian.T).T @ basis.T
        return _Template(
            view, drawing.pose, pixels, points, colours, jacobian.reshape(6, -1), spread
        )


def _explained_contrast(refined):
    """Share of the contrast about the ship, against a smooth sky, that a refined pose or None explains."""
    if refined is None:
        return 0.0
    sky = _smooth_sky_cost(refined.template.view.image, refined.template.pixels)
    return (sky - _robust_cost(refined.residual, 2 * NOISE)) / max(sky, MIN_CONTRAST)
