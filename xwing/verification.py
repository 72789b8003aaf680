"""Rival poses, evidence, and the probability that a pose is right.

A pose that has been refined may still be the wrong one, because a target may look nearly alike from
two sides. So the poses that it is ambiguous with are refined as well, and all of them are drawn
over the same pixels, as if the target could be painted in any way. The one that explains these
pixels best wins. Five kinds of evidence then say whether the winner is right: how well its edges
agree with those of the frame, how much worse its rivals explain the pixels, how many of the
network's estimates agree with it, what fraction of the contrast it explains, and in what fraction
of the target the frame looks like the drawing. Edges alone would do for a target in a frame, but
clutter such as a fractal has edges everywhere. A logistic model, the same for all targets, turns
the evidence into a probability.
"""

import dataclasses
import functools

import cv2
import joblib
import numpy as np
from scipy.special import expit

import xwing_utils as xu
from xwing.appearance import near_target, smooth_sky, surroundings
from xwing.lookalikes import with_lookalikes
from xwing.refinement import Refined, Refiner, robust_cost

# The explained contrast and the local agreement from which more makes a pose no more probable.
ENOUGH_CONTRAST = 0.3
ENOUGH_AGREEMENT = 0.7

SAME_POSE = 30.0  # degrees: poses that differ by less are no rivals

# Of poses that differ by fewer degrees, only the best is refined further, after the coarse picture
# and after the first drawing of the fine one.
SIMILAR_COARSE = 10.0
SIMILAR_FINE = 3.0


@dataclasses.dataclass(frozen=True)
class VerificationSettings:
    """What decides which poses are tried for a frame, and whether the best one is accepted.

    What it costs to explain the pixels by a smooth sky alone is called their contrast. A pose
    explains the fraction of it that its drawing saves.
    """

    # Which poses are tried.
    min_explained_contrast: float = 0.42  # fraction that a pose must explain at least
    well_explained: float = 0.65  # fraction from which no other pose or picture is tried
    usual_ratio: float = 0.9  # a track that explains less of its usual tries a coarse picture
    min_contrast: float = 45.0  # log-likelihood: less contrast counts as this much
    confident_margin: float = 10.0  # log-likelihood: min_explained_contrast is enough from there on
    nearby_angles: tuple = (12.0, 25.0)  # degrees, of further starts where too little is explained
    ruled_out_margin: float = 30.0  # log-likelihood: rivals that are worse by this are dropped

    # What makes a pose probable.
    strong_edge: float = 60.0  # slope (Sobel, grey levels) from which drawn edges count fully
    min_edge: float = 12.0  # slope below which a frame has no edge
    # Log-odds of `evidence`, by tools/fit_evidence.py.
    evidence_weights: tuple = (-23.05, 21.74, 1.01, 0.43, 2.42)
    min_probability: float = 0.55  # from which the pose of a single frame is accepted
    confident_probability: float = 0.8  # below which the network also sees the frame rotated


# ============================================================ evidence


def evidence(
    agreement: float, margin: float, votes: list, explained: float, local: float
) -> np.ndarray:
    """Return the features of the logistic model for a pose.

    Args:
        agreement: 0 to 1, see `edge_agreement`.
        margin: log-likelihood by which its best rival explains the pixels worse.
        votes: bool for each estimate of the network, whether it agrees with the pose.
        explained: fraction of the contrast that the pose explains.
        local: 0 to 1, see `Refined.local_agreement`.

    Returns:
        (5,): one, the agreement, the logarithm of the margin, votes for less votes against, and the
        likeness, 0 to 1. That is the lower of explained contrast and local agreement, as fractions
        of what is enough: clutter may reach one of them by chance, but rarely both.
    """
    log_margin = np.log1p(np.clip(margin, 0, 100))
    difference = 2 * sum(votes) - len(votes)
    likeness = np.clip(min(explained / ENOUGH_CONTRAST, local / ENOUGH_AGREEMENT), 0, 1)
    return np.array([1, agreement, log_margin, difference, likeness])


def edge_agreement(
    seen: np.ndarray,
    drawn: np.ndarray,
    coverage: np.ndarray,
    settings: VerificationSettings | None = None,
) -> float:
    """Measure how many of a drawing's edges a frame has too, however strong they are there.

    It is the weighted mean of the cosine between the gradients of both. Patterns of the paint,
    shadows and other light add edges to a frame, but take few away.

    Args:
        seen: (h, w, 3) float32 grey levels of the frame.
        drawn: (h, w, 3) float32 grey levels of the drawing.
        coverage: (h, w) float32, fraction of each pixel that the drawing covers. Only edges there,
            and a few pixels around, count.
        settings: `VerificationSettings`; None: the defaults.

    Returns:
        0 to 1.

    Source: Steger, ISPRS Archives 34(3A), 2002; Hinterstoisser et al., IEEE TPAMI 34(5), 2012.
    """
    settings = settings or VerificationSettings()
    seen = _steepest_slopes(seen)
    drawn = _steepest_slopes(drawn)
    seen_strength = np.linalg.norm(seen, axis=0)
    drawn_strength = np.linalg.norm(drawn, axis=0)

    around = cv2.dilate(coverage, np.ones((7, 7))) > 0.01
    weight = np.minimum(drawn_strength, settings.strong_edge) * around
    cosine = np.abs((drawn * seen).sum(0)) / (drawn_strength * seen_strength + 1e-3)
    agreement = (weight * cosine * (seen_strength > settings.min_edge)).sum()
    return float(agreement / (weight.sum() + 1e-3))


def _steepest_slopes(image):
    """(2, h, w) slopes to the right and down, in each pixel's channel with the steepest."""
    smooth = cv2.GaussianBlur(image, (0, 0), 0.7)
    slopes = np.stack([cv2.Sobel(smooth, -1, 1, 0), cv2.Sobel(smooth, -1, 0, 1)])
    steepest = np.square(slopes).sum(0).argmax(-1)
    return np.take_along_axis(slopes, steepest[None, ..., None], axis=3)[..., 0]


@dataclasses.dataclass(frozen=True)
class Judgement:
    """The best pose for a frame, and the evidence for it."""

    best: Refined
    runner_up: np.ndarray | None  # (4, 4) the best different pose
    margin: float  # log-likelihood by which the runner-up explains the pixels worse
    edge_agreement: float  # 0 to 1, see `edge_agreement`
    votes: list  # bool for each estimate, whether it agrees with the best pose
    explained_contrast: float  # fraction of the contrast that the best pose explains

    @property
    def evidence(self) -> np.ndarray:
        """(5,), see `evidence`."""
        return evidence(
            self.edge_agreement,
            self.margin,
            self.votes,
            self.explained_contrast,
            self.best.local_agreement,
        )


# ============================================================ rival poses


class Verifier:
    """Finds the best pose for a frame, starting from its estimates, and judges it.

    Args:
        refiner: `Refiner` of the target's mesh.
        target: `Target`. Poses that differ by its symmetries are one pose. Its lookalikes are the
            rivals of a pose; where none are declared, those that its mesh shows.
        settings: `VerificationSettings`; None: the defaults.
        scale: units of the refiner's mesh for one unit of the target.
    """

    def __init__(
        self,
        refiner: Refiner,
        target: xu.Target = xu.XWING,
        settings: VerificationSettings | None = None,
        scale: float = 1.0,
    ):
        self.refiner = refiner
        self.target = target
        self.scale = scale
        self.settings = settings or VerificationSettings()

    @functools.cached_property
    def rivals(self) -> xu.Target:
        """The target with its lookalikes, which are found when they are first needed."""
        return with_lookalikes(self.target)

    def verify(
        self, image: np.ndarray, estimate: xu.PoseEstimate, K: np.ndarray, others: tuple = ()
    ) -> xu.PoseEstimate:
        """Refine and judge the estimate for a single frame on its pixels.

        Args:
            image: (H, W, 3) uint8.
            estimate: `PoseEstimate` from the keypoints.
            K: (3, 3) camera matrix.
            others: further `PoseEstimate` for the same frame, such as those of `rotated_views`.

        Returns:
            PoseEstimate of the best pose, accepted if it is probably right.
        """
        estimates = [one for one in (estimate, *others) if one.pose is not None]
        judgement = self.judge(image, estimates, K)
        if judgement is None:
            reason = estimate.reason or "too little of the target is in sight"
            return dataclasses.replace(estimate, accepted=False, reason=reason)

        probability = float(expit(judgement.evidence @ self.settings.evidence_weights))
        accepted = probability >= self.settings.min_probability
        edges = f"{judgement.edge_agreement:.0%} of its edges are in the frame"
        reason = "" if accepted else f"right with a probability of {probability:.2f}: {edges}"

        return dataclasses.replace(
            estimate,
            pose=judgement.best.pose,
            covariance=judgement.best.covariance,
            accepted=accepted,
            reason=reason,
            reprojection=estimate.reprojection if judgement.votes[0] else np.nan,
            log_likelihood_margin=judgement.margin,
            explained_contrast=judgement.explained_contrast,
            probability=probability,
            runner_up=judgement.runner_up,
        )

    def judge(self, image: np.ndarray, estimates: list, K: np.ndarray) -> Judgement | None:
        """Find the best pose for a frame and collect the evidence for it.

        Args:
            image: (H, W, 3) uint8.
            estimates: `PoseEstimate` with poses, all for this frame; the first is the most trusted.
            K: (3, 3) camera matrix.

        Returns:
            Judgement, or None where there are no estimates or too little of the target shows.
        """
        found = self._candidates(image, estimates, K) if estimates else []
        if not found:
            return None

        leader = self._rank(image, found, K)[0][0]
        found += self._refine_rivals(image, leader, K)
        ranked, explained = self._rank(image, found, K)
        best, *rivals = self._drop_similar(ranked, SAME_POSE)

        # Without a rival on the pixels, runner-up and margin are those of the keypoints.
        runner_up = rivals[0].pose if rivals else estimates[0].runner_up
        margin = rivals[0].cost - best.cost if rivals else estimates[0].log_likelihood_margin

        votes = [self._turn(best.pose, one.pose) < SAME_POSE for one in estimates]
        agreement = self._edge_agreement(image, best.pose, K)
        return Judgement(best, runner_up, margin, agreement, votes, explained)

    def explained_contrast(self, refined: Refined | None) -> float:
        """Return the fraction of the contrast that a refined pose explains; 0 for None."""
        if refined is None:
            return 0.0
        template = refined.template
        thinning = template.sample_ratio / self.refiner.settings.effective_sample_ratio
        sky = thinning * self._sky_cost(template.view.image, template.pixels)
        cost = thinning * self._cost(refined.residual)
        return (sky - cost) / max(sky, self.settings.min_contrast)

    def photometric_costs(
        self, image: np.ndarray, poses: list, K: np.ndarray, coarse: bool = False
    ) -> tuple[np.ndarray, float]:
        """Measure how badly some poses, and a smooth sky, explain a frame.

        Args:
            image: (H, W, 3) uint8.
            poses: N (4, 4), model -> OpenCV camera.
            K: (3, 3) camera matrix.
            coarse: whether the coarse picture is used.

        Returns:
            costs (N,), infinite where the target does not show, and the cost of the sky. They are
            negative log-likelihoods over the same pixels, except for a constant.
        """
        costs = np.full(len(poses), np.inf)
        view = self.refiner.view(image, poses, K, coarse)
        if view is None:
            return costs, 0.0

        drawings = [self.refiner.draw(view, pose, true_paint=False) for pose in poses]
        shown = [i for i, drawing in enumerate(drawings) if drawing is not None]
        if not shown:
            return costs, 0.0

        coverage = np.max([drawings[i].coverage for i in shown], axis=0)
        behind = surroundings(view.light, coverage)
        pixels = np.flatnonzero(near_target(coverage))
        seen = view.image.reshape(-1, 3)[pixels]
        for i in shown:
            painting = self.refiner.paint(view, drawings[i], behind)
            costs[i] = self._cost(seen - painting.picture.reshape(-1, 3)[pixels])
        return costs, self._sky_cost(view.image, pixels)

    def _candidates(self, image, estimates, K):
        """`Refined` poses, among them the best one for the frame if the search succeeds.

        A single estimate that explains the frame is enough. Otherwise all estimates and their
        runners-up are tried, and what these are ambiguous with. Where the best of them explains too
        little, poses nearby are tried as well.
        """
        first = self.refiner.align(image, estimates[0].pose, K, estimates[0].covariance)
        if len(estimates) == 1 and self._explains_enough(first, estimates[0]):
            return [first]

        poses = [pose for one in estimates for pose in (one.pose, one.runner_up)]
        starts = self._ambiguous([pose for pose in poses if pose is not None])
        found = self._search(image, starts, K, 2 * len(estimates))
        if first is not None:
            found.append(first)

        ranked, explained = self._rank(image, found, K)
        if ranked and explained < self.settings.min_explained_contrast:
            found += self._search_nearby(image, found, ranked[0].pose, K)
        return found

    def _explains_enough(self, refined, estimate):
        """Whether a refined pose explains the frame; less is enough for confident keypoints."""
        enough = self.settings.min_explained_contrast
        if estimate.log_likelihood_margin < self.settings.confident_margin:
            enough = self.settings.well_explained
        return refined is not None and self.explained_contrast(refined) >= enough

    def _ambiguous(self, poses):
        """Some poses, each followed by those that it is ambiguous with."""
        groups = [xu.ambiguous_poses(pose, self.rivals, self.scale) for pose in poses]
        return [pose for group in groups for pose in group]

    def _search(self, image, starts, K, count, drawings=None):
        """The best few of what some poses lead to, on a coarse picture and then on the fine one."""
        found = self._refine_all(image, starts, K, coarse=True, drawings=drawings)
        ranked, _ = self._rank(image, found, K, coarse=True)
        best = self._drop_similar(ranked, SIMILAR_COARSE)[:count]
        return self._refine_all(image, [candidate.pose for candidate in best], K)

    def _search_nearby(self, image, found, pose, K):
        """What poses turned against a pose lead to, and what the best of all is ambiguous with."""
        axes = np.hstack([pose[:3, :3].T, np.zeros((3, 3))])  # of the target, as steps of a pose
        steps = [
            angle * axis
            for angle in np.radians(self.settings.nearby_angles)
            for axis in (*axes, *-axes)
        ]
        turned = [xu.move_pose(pose, step) for step in steps]
        nearby = self._search(image, turned, K, 2, drawings=2)

        best = self._rank(image, found + nearby, K)[0][0]
        return nearby + self._search(image, self._ambiguous([best.pose])[1:], K, 2)

    def _refine_rivals(self, image, leader, K):
        """What the leader is ambiguous with, refined fully where it may still win."""
        once = self._refine_all(image, self._ambiguous([leader.pose])[1:], K, drawings=1)
        ranked, _ = self._rank(image, [leader, *once], K)

        limit = ranked[0].cost + self.settings.ruled_out_margin
        close = [one.pose for one in self._drop_similar(ranked, SIMILAR_FINE) if one.cost < limit]
        return once + self._refine_all(image, close, K)

    def _refine_all(self, image, poses, K, coarse=False, drawings=None):
        """`Refined` of those poses that can be refined on one level."""
        refined = [
            self.refiner.refine(image, pose, K, coarse=coarse, drawings=drawings) for pose in poses
        ]
        return [one for one in refined if one is not None]

    def _rank(self, image, candidates, K, coarse=False):
        """`Refined` with their costs, best first, and the fraction that the best explains."""
        if not candidates:
            return [], 0.0

        poses = [candidate.pose for candidate in candidates]
        costs, sky = self.photometric_costs(image, poses, K, coarse)
        explained = float((sky - costs.min()) / max(sky, self.settings.min_contrast))
        ranked = [dataclasses.replace(c, cost=cost) for cost, c in zip(costs.tolist(), candidates)]
        return sorted(ranked, key=lambda candidate: candidate.cost), explained

    def _edge_agreement(self, image, pose, K):
        """The `edge_agreement` of a pose; 0 where too little of it shows."""
        painting = self.refiner.paint_pose(image, pose, K)
        if painting is None:
            return 0.0
        coverage = painting.drawing.coverage
        return edge_agreement(painting.view.image, painting.picture, coverage, self.settings)

    def _drop_similar(self, ranked, degrees):
        """`Refined`, best first, without those within some degrees of a better one that is kept."""
        kept = []
        for candidate in ranked:
            errors = [self._turn(candidate.pose, better.pose) for better in kept]
            if all(error > degrees for error in errors):
                kept.append(candidate)
        return kept

    def _turn(self, one, other):
        """The angle in degrees between two poses, up to the symmetries of the target."""
        return xu.rotation_error(one, other, self.target)

    def _sky_cost(self, image, pixels):
        """The cost of a smooth sky at flat indices of pixels (P,)."""
        seen = image.reshape(-1, 3)[pixels]
        return self._cost(seen - smooth_sky(image, pixels))

    def _cost(self, residual):
        """The cost of differences (P, 3), with a spread that is the same for all poses."""
        settings = self.refiner.settings
        return robust_cost(residual, 2 * settings.noise, settings.effective_sample_ratio)


# ============================================================ many frames


def rotated_views(
    model, images: np.ndarray, K: np.ndarray, target: xu.Target = xu.XWING
) -> list[list]:
    """Estimate poses in frames that are rotated by one, two and three quarters of a turn.

    This is test-time augmentation: the network makes other errors in a rotated frame.

    Args:
        model: from `load_model`.
        images: (N, S, S, 3) uint8.
        K: (3, 3) camera matrix, or (N, 3, 3).
        target: `Target` that the model was trained for.

    Returns:
        N lists of three `PoseEstimate`, in the axes of the frames before they are rotated.
    """
    quarters = (1, 2, 3)
    rotated = np.concatenate([np.rot90(images, turns, axes=(1, 2)) for turns in quarters])
    heatmaps = xu.predict_heatmaps(model, rotated, channels=len(target.keypoints))
    heatmaps = [
        np.rot90(part, -turns, axes=(1, 2))
        for turns, part in zip(quarters, np.split(heatmaps, len(quarters)))
    ]

    keypoints = xu.read_keypoints(np.concatenate(heatmaps), model.settings)
    cameras = np.resize(K, (len(rotated), 3, 3))
    estimates = [
        xu.estimate_pose(points, camera, confidence, sigma, target=target)
        for camera, points, confidence, sigma in zip(cameras, *keypoints)
    ]
    return [estimates[i :: len(images)] for i in range(len(images))]


def verify_frames(aligner, images: np.ndarray, estimates: list, K: np.ndarray, model) -> list:
    """Verify many frames on all cores.

    Frames that stay uncertain are verified again, with the estimates of `rotated_views` too.

    Args:
        aligner: `Aligner`.
        images: (N, S, S, 3) uint8.
        estimates: N `PoseEstimate` from the keypoints.
        K: (3, 3) camera matrix.
        model: from `load_model`.

    Returns:
        N `PoseEstimate`, as of `Aligner.verify`.
    """
    _ = aligner.verifier.rivals  # found once, and not in each process
    found = _verify_in_parallel(aligner, images, estimates, K, [()] * len(images))

    enough = aligner.verifier.settings.confident_probability
    uncertain = [i for i, one in enumerate(found) if not one.probability >= enough]  # also NaN
    if uncertain:
        views = rotated_views(model, images[uncertain], K, aligner.target)
        first = [estimates[i] for i in uncertain]
        again = _verify_in_parallel(aligner, images[uncertain], first, K, views)
        for i, one in zip(uncertain, again):
            found[i] = one

    return found


def _verify_in_parallel(aligner, images, estimates, K, others):
    tasks = (
        joblib.delayed(_verify)(aligner, *frame, K, views)
        for *frame, views in zip(images, estimates, others)
    )
    return joblib.Parallel(n_jobs=-1, max_nbytes=None)(tasks)  # None: no arrays on disk


def _verify(aligner, image, estimate, K, others):
    cv2.setNumThreads(1)  # in this process: each core already has frames of its own
    return aligner.verify(image, estimate, K, others)
