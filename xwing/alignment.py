"""The pose of a target, refined and judged on the pixels of a frame.

An `Aligner` combines four modules for one target. `appearance` says what each pixel should look
like at a pose. `keyframes` remembers how the surface looked at poses that were known. `refinement`
moves a pose until its drawing and the frame agree. `verification` compares rival poses and says how
probable it is that the best one is right. `align` refines a pose that is known roughly. `track`
refines a pose that is predicted from the frames before. `verify` decides on a frame alone. `learn`
remembers the surface in a frame whose pose is known, and `find` finds it again in a frame where it
was lost.

Inside, every mesh has the same size, so results do not depend on the unit of the target: limits
that compare radians with lengths mean the same, and single precision rounds in the same places.
Poses and covariances are converted here.
"""

import dataclasses

import numpy as np

import xwing_utils as xu
from xwing.keyframes import KeyFrames
from xwing.mesh import Mesh, load_mesh
from xwing.refinement import RefinementSettings, Refiner
from xwing.verification import Judgement, VerificationSettings, Verifier, verify_frames

__all__ = ["Aligner", "RefinementSettings", "VerificationSettings", "verify_frames"]

# The diameter of every mesh inside: that of the X-wing's mesh, whose numbers are thus left alone.
# PnP has a constant of its own, because it scales by the target's box, which is slightly smaller.
WORKING_DIAMETER = 0.4698348885512867

# A frame whose pose differs from the one that was tracked by less than this many radians and
# diameters is not drawn again when its colours are learnt.
SAME_TURN = 0.03
SAME_SHIFT = 0.01

# The local agreement from which a tracked pose is not sought again from further away.
WELL_AGREED = 0.65


class Aligner:
    """Refines poses on the pixels of a frame, and decides between rival ones.

        aligner = Aligner(xu.XWING)
        pose, covariance = aligner.align(image, pose, K)

    Args:
        target: `Target`, or the `Mesh` of one with the lookalikes of the X-wing.
        blur: pixels of a frame, standard deviation of its Gaussian blur, in addition to the
            averaging over each pixel's square.
        refinement: `RefinementSettings`; None: the defaults.
        verification: `VerificationSettings`; None: the defaults.

    Attributes:
        target: `Target`; the X-wing where a mesh was given.
        mesh: `Mesh` of the target, in its own unit.
        scale: working units for one model unit.
        key_frames: `KeyFrames`, what was learnt, in working units; none to begin with.
        refiner: `Refiner`, in working units.
        outline: `Outline` of the refiner; it has learnt no colours to begin with.
        verifier: `Verifier`, in working units. It judges single frames, and nothing that was
            learnt counts there: what was learnt from a wrong pose would confirm it.
    """

    def __init__(
        self,
        target: xu.Target | Mesh,
        blur: float = 0.4,
        refinement: RefinementSettings | None = None,
        verification: VerificationSettings | None = None,
    ):
        is_mesh = isinstance(target, Mesh)
        self.target = xu.XWING if is_mesh else target
        self.mesh = target if is_mesh else load_mesh(target.mesh)
        if not is_mesh:
            _check_size(target, self.mesh)
        self.scale = WORKING_DIAMETER / self.mesh.diameter

        working_mesh = dataclasses.replace(self.mesh, vertices=self.scale * self.mesh.vertices)
        self.key_frames = KeyFrames(working_mesh)
        self.refiner = Refiner(working_mesh, blur, refinement, self.key_frames.albedo)
        self.outline = self.refiner.outline
        self.verifier = Verifier(self.refiner.plain(), self.target, verification, self.scale)
        self._tracked = None  # the last frame that was tracked, and its `Refined`

    def align(
        self,
        image: np.ndarray,
        pose: np.ndarray,
        K: np.ndarray,
        covariance: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Refine a pose that is off by a few pixels, on a coarse picture first.

        Args:
            image: (H, W, 3) uint8.
            pose: (4, 4) model -> OpenCV camera.
            K: (3, 3) pixels.
            covariance: (6, 6) of the pose, which is then a prior: what the pixels do not determine
                stays as it is. None: no prior.

        Returns:
            pose (4, 4) and covariance (6, 6), or None where too little of the target shows or the
            pose is not determined.
        """
        pose = xu.scale_pose(pose, self.scale)
        covariance = _scale_covariance(covariance, self.scale)
        refined = self.refiner.align(image, pose, K, covariance)
        if self.outline.colours.known:
            refined, _ = self._improve(image, pose, K, covariance, refined)
        if refined is None:
            return None

        pose = xu.scale_pose(refined.pose, 1 / self.scale)
        return pose, _scale_covariance(refined.covariance, 1 / self.scale)

    def track(
        self,
        image: np.ndarray,
        pose: np.ndarray,
        K: np.ndarray,
        covariance: np.ndarray | None = None,
        usual: float = 1.0,
    ) -> xu.PoseEstimate:
        """Refine a pose that is predicted from the frames before, within a few milliseconds.

        Args:
            image: (H, W, 3) uint8.
            pose: (4, 4) model -> OpenCV camera, the prediction.
            K: (3, 3) pixels.
            covariance: (6, 6) of the prediction, or None.
            usual: fraction of the contrast that the track explained lately. Where the refined pose
                explains clearly less, the prediction is refined on a coarse picture first.

        Returns:
            PoseEstimate, accepted if it explains enough of the contrast.
        """
        settings = self.verifier.settings
        start = xu.scale_pose(pose, self.scale)
        prior = _scale_covariance(covariance, self.scale)
        refined = self.refiner.refine(image, start, K, prior, drawings=2)
        explained = self.verifier.explained_contrast(refined)

        agreement = self._agreement(refined)
        enough = min(settings.well_explained, settings.usual_ratio * usual)
        if explained < enough and not agreement > WELL_AGREED:  # also where it is NaN
            refined, explained = self._improve(image, start, K, prior, refined)
            agreement = self._agreement(refined)

        if refined is None:
            return xu.PoseEstimate(pose, covariance, False, "too little of the target is in sight")

        enough = explained >= settings.min_explained_contrast
        reason = "" if enough else f"the pose explains only {explained:.0%} of what is seen"
        self._tracked = image, refined
        found = xu.PoseEstimate(
            refined.pose,
            refined.covariance,
            enough,
            reason,
            explained_contrast=explained,
            local_agreement=agreement,
        )
        return _scale_estimate(found, 1 / self.scale)

    def _agreement(self, refined):
        """The local agreement of a `Refined` pose; NaN where nobody knows how the target looks."""
        if refined is None or not self.key_frames.frames:
            return np.nan
        return refined.local_agreement

    def _improve(self, image, start, K, prior, refined):
        """The better of a `Refined` pose and of what the start leads to by way of the outline.

        Returns it with the fraction of the contrast that it explains. An occluder takes much from
        that, so where it is known how the target looks, the local agreement decides.
        """
        sought = self.outline.seek(image, start, K)
        coarse = self.refiner.refine(image, sought, K, prior, coarse=True, expected=start)
        if coarse is not None:
            sought = coarse.pose
        other = self.refiner.refine(image, sought, K, prior, expected=start)
        quality = self.verifier.explained_contrast
        if self.key_frames.frames:
            quality = self._agreement
        best = max((one for one in (refined, other) if one is not None), key=quality, default=None)
        return best, self.verifier.explained_contrast(best)

    def verify(
        self, image: np.ndarray, estimate: xu.PoseEstimate, K: np.ndarray, others: tuple = ()
    ) -> xu.PoseEstimate:
        """Refine and judge the estimate for a single frame; see `Verifier.verify`.

        Args:
            image: (H, W, 3) uint8.
            estimate: `PoseEstimate` from the keypoints.
            K: (3, 3) pixels.
            others: further `PoseEstimate` for the same frame.

        Returns:
            PoseEstimate of the best pose, accepted if it is probably right.
        """
        first, *others = [_scale_estimate(one, self.scale) for one in (estimate, *others)]
        found = self.verifier.verify(image, first, K, others)
        return _scale_estimate(found, 1 / self.scale)

    def judge(self, image: np.ndarray, estimates: list, K: np.ndarray) -> Judgement | None:
        """Find the best pose for a single frame and the evidence for it; see `Verifier.judge`.

        The poses of the `Judgement` are in working units.
        """
        estimates = [_scale_estimate(one, self.scale) for one in estimates]
        return self.verifier.judge(image, estimates, K)

    def learn(
        self, image: np.ndarray, pose: np.ndarray, K: np.ndarray, outline: bool = True
    ) -> None:
        """Learn how the target looks, from a frame whose pose is known.

        From then on the target is drawn with the albedo that was learnt, and its outline is sought
        between the colours that were seen on both sides of it. Every frame adds to these colours.
        The albedo is learnt only where the target was not seen from nearly the same place before.
        Where too little of it shows, nothing is learnt.

        Args:
            image: (H, W, 3) uint8.
            pose: (4, 4) model -> OpenCV camera.
            K: (3, 3) pixels.
            outline: whether the colours are learnt. A target that a network finds again can do
                without; the outline takes a third of the time of `track`.
        """
        pose = xu.scale_pose(pose, self.scale)
        if outline:
            self._learn_colours(image, pose, K)
        if not self.key_frames.is_new(pose):
            return
        painting = self.refiner.paint_plain(image, pose, K)
        if painting is not None:
            self.key_frames.add(painting, image, K)

    def find(self, image: np.ndarray, K: np.ndarray, near: np.ndarray | None = None) -> list:
        """Find where a target may be that was lost, from what was learnt; see `KeyFrames.find`.

        Args:
            image: (H, W, 3) uint8.
            K: (3, 3) pixels.
            near: (4, 4) pose that the target had lately, or None.

        Returns:
            poses (4, 4) model -> OpenCV camera, the most probable one first, neither refined nor
            judged; none where nothing was learnt.
        """
        near = None if near is None else xu.scale_pose(near, self.scale)
        colours = self.outline.colours
        posterior = colours.posterior if colours.known else None
        poses = self.key_frames.find(image, K, posterior, near)
        return [xu.scale_pose(pose, 1 / self.scale) for pose in poses]

    def _learn_colours(self, image, pose, K):
        """Learn the colours around the outline, without drawing it again where it was tracked."""
        tracked_image, refined = self._tracked or (None, None)
        if tracked_image is image and refined.lines is not None:
            turn, shift = np.linalg.norm(
                xu.pose_step(pose, refined.lines.pose).reshape(2, 3), axis=1
            )
            if turn < SAME_TURN and shift < SAME_SHIFT * WORKING_DIAMETER:
                self.outline.learn_from_lines(image, K, refined.lines)
                return
        self.outline.learn(image, pose, K)

    def forget(self) -> None:
        """Forget all that was learnt: the target is drawn as its mesh says again."""
        self.key_frames.clear()
        self.outline.colours.clear()

    def picture(
        self, image: np.ndarray, pose: np.ndarray, K: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Show the frame around the target, and what a pose explains of it.

        Args:
            image: (H, W, 3) uint8.
            pose: (4, 4) model -> OpenCV camera.
            K: (3, 3) pixels.

        Returns:
            Two pictures (h, w, 3) uint8 around the target, or None where too little shows.
        """
        painting = self.refiner.paint_pose(image, xu.scale_pose(pose, self.scale), K)
        if painting is None:
            return None
        pictures = painting.view.image, painting.picture
        return tuple(picture.clip(0, 255).astype(np.uint8) for picture in pictures)

    def photometric_costs(
        self, image: np.ndarray, poses: list, K: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """Measure how badly some poses, and a smooth sky, explain a frame.

        See `Verifier.photometric_costs`.

        Args:
            image: (H, W, 3) uint8.
            poses: N (4, 4), model -> OpenCV camera.
            K: (3, 3) pixels.

        Returns:
            costs (N,) and the cost of the sky, negative log-likelihoods except for a constant.
        """
        poses = [xu.scale_pose(pose, self.scale) for pose in poses]
        return self.verifier.photometric_costs(image, poses, K)


def _check_size(target, mesh):
    """Raise ValueError where a target's box is not that of its mesh, as in another unit."""
    if not 0.5 < target.diameter / mesh.diameter < 2:
        raise ValueError(
            f"{target.mesh}: the box of the target {target.name!r} measures {target.diameter:.4g} "
            f"from corner to corner, its mesh {mesh.diameter:.4g}; give both in mesh units"
        )


def _scale_covariance(covariance, factor):
    """The covariance (6, 6) of a pose in other units, or None."""
    if covariance is None:
        return None
    factors = np.repeat([1.0, factor], 3)
    return covariance * np.outer(factors, factors)


def _scale_estimate(estimate, factor):
    """A `PoseEstimate` in other units."""
    pose = estimate.pose
    runner_up = estimate.runner_up
    return dataclasses.replace(
        estimate,
        pose=None if pose is None else xu.scale_pose(pose, factor),
        covariance=_scale_covariance(estimate.covariance, factor),
        runner_up=None if runner_up is None else xu.scale_pose(runner_up, factor),
    )
