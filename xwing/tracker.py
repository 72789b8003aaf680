"""One target followed frame by frame: its pose is predicted, aligned, judged and filtered.

From frame to frame a target moves little. A Kalman filter on SE(3) predicts its pose from the last
frames. The prediction is so close that the alignment can refine it on the pixels alone, in a few
milliseconds, and the filter takes the refined pose as its measurement. The network is slower, and
is used in three cases only: where there is no track; where the alignment explains less of the frame
than it did lately; and now and then to find the target again independently of the track
(redetection), because a track that began with a wrong pose would otherwise go on for ever. A
redetection replaces the track only if it explains the pixels better.

A target without a network is followed from a pose that the user gives (`Tracker.start`). Beyond the
colours of its mesh nobody knows then how it looks, so the aligner learns that at the start, and
later wherever the track is confident. From what was learnt the target is also found again. A track
of the network teaches the aligner too, after its first second, where the mesh explains too little.
"""

import collections
import dataclasses
import warnings
from concurrent.futures import Future, ThreadPoolExecutor

import cv2
import numpy as np
from scipy.special import expit

import xwing_utils as xu
from xwing.footage import Clock
from xwing.motion import FilteredMotion, Motion, MotionModel, smooth

# The longest gap in the measurements that the prediction bridges, seconds.
MAX_GAP_SECONDS = 0.5

# The log-likelihood margin over the runner-up that an estimate needs to start a track.
START_MARGIN = 3.0

# The largest squared Mahalanobis distance of a measured pose from the prediction: the 99.9 %
# quantile of chi square with 6 degrees of freedom.
GATE = 22.5

# An alignment that ends this many degrees or more from the prediction has found something else.
MAX_TURN = 25.0

# Two poses that differ by more than this many degrees contradict each other.
CONTRADICTION_TURN = 30.0

# The network is asked where the explained contrast falls below this fraction of its usual value.
MIN_CONTRAST_RATIO = 0.7

# The local agreement from which a track goes on. Of poses that were refined from anywhere near the
# target, most right ones have more than 0.55 and most wrong ones have less, and a logistic model
# gains nothing from the explained contrast and the colours at the outline beside it
# (tools/fit_track_evidence.py). A pose near the prediction is right far more often than those, and
# what hides a part of the target lowers the agreement. So less is enough.
MIN_AGREEMENT = 0.33

# The fraction of the target that has to be within the frame: anything may look like a corner of it.
MIN_IN_SIGHT = 0.15

# The local agreement from which the aligner learns from a frame, and from which a pose that was
# found again is used.
CONFIDENT_AGREEMENT = 0.6

# The explained contrast from which a track of the network needs no albedo. Where the mesh explains
# so much, key frames add their own errors: 0.16 instead of 0.10 degrees on data/flight_hd.mp4.
ENOUGH_CONTRAST = 0.72

# The probability from which a track of the network begins to teach the aligner.
CONFIDENT_PROBABILITY = 0.95

# A target that is lost is looked for in one frame of so many.
SEARCH_FRAMES = 5

# Poses of a search that are aligned and judged.
SEARCHED_POSES = 5

# Standard deviations of a pose that the user gives: radians, and diameters.
START_TURN = 0.03
START_SHIFT = 0.03

# The weight of a new frame in the usual explained contrast, a running mean.
CONTRAST_WEIGHT = 0.2

# Seconds between two redetections of a target that is followed. A new track has them sooner.
REDETECTION_SECONDS = 1.0

# Seconds after which the result of a redetection in the background is used. The delay is fixed, so
# that fast and slow machines give the same track.
REDETECTION_DELAY = 0.3

# A redetected pose replaces the track if it is better on the pixels by this log-likelihood.
MIN_COST_GAIN = 20.0

# Without an aligner, a track is dropped after this many redetections in a row that contradict it.
MAX_CONTRADICTIONS = 3

# Weights of `trust_features`, by status and by whether the pose was compared with the pixels. These
# logistic models were fitted by tools/calibrate_probability.py to 12,790 poses, 1,782 of them
# wrong, from ten flights that were rendered for this purpose.
PROBABILITY = {
    ("tracked", True): (-4.69, 5.06, -2.50, 0.0),
    ("tracked", False): (-6.85, 0.0, -6.96, 0.0),
    ("predicted", True): (-4.0037, 0.0, 0.0, -2.61),
    ("predicted", False): (-3.3136, 0.0, 0.0, -2.58),
}

# The same for a tracked pose of a target whose looks were learnt. They were fitted by
# tools/fit_track_evidence.py to 1,870 poses, 48 of them wrong, of eight objects. Not all of their
# clips are kept here.
LEARNT_PROBABILITY = (-12.63, 11.32, 0.0, -3.02)


@dataclasses.dataclass(frozen=True)
class TrackedPose:
    """One frame of a track.

    Attributes:
        status: "tracked": measured in this frame; "predicted": from the frames around it; "lost":
            no pose.
        seconds: time of the frame, later than all before, see `footage.Clock`.
        pose: (4, 4) model -> OpenCV camera, or None.
        covariance: (6, 6) rotation vector in camera axes (radians), then translation (model units),
            or None.
        velocity: (6,) rotation in camera axes, rad/s, then translation, model units/s, or None.
        explained_contrast: fraction of the frame's contrast that the target explains, 0 to 1, or
            NaN.
        local_agreement: fraction of the drawn target that the frame looks like, 0 to 1; NaN where
            nobody knows yet how it looks.
        reason: why the pose was not measured, or what speaks against it.
        probability: that the pose is within 5 degrees and 0.106 diameters of the true one.
        second_target: (4, 4) pose of a second target, if the network saw one lately, or None. It is
            only reported, not followed.
    """

    status: str
    seconds: float = np.nan
    pose: np.ndarray | None = None
    covariance: np.ndarray | None = None
    velocity: np.ndarray | None = None
    explained_contrast: float = np.nan
    reason: str = ""
    probability: float = 0.0
    second_target: np.ndarray | None = None
    local_agreement: float = np.nan


def trust_features(covariance: np.ndarray, seen: float, diameter: float) -> np.ndarray:
    """Return the four features of the logistic models for the probability of a pose.

    Args:
        covariance: (6, 6) of the pose, radians and model units.
        seen: how well the frame agrees with the pose: the local agreement where it is known, else
            the fraction of the contrast that is explained; NaN counts as 0.
        diameter: of the target, model units.

    Returns:
        (4,): 1, how well the frame agrees, and log10 of both standard deviations, in radians and
        in diameters.
    """
    rotation_variance = np.trace(covariance[:3, :3])
    translation_variance = np.trace(covariance[3:, 3:]) / diameter**2
    deviations = np.log10([rotation_variance, translation_variance]) / 2
    return np.array([1.0, np.nan_to_num(seen), *deviations])


@dataclasses.dataclass(frozen=True)
class _Step:
    """What was measured in one frame, and what the filter made of it."""

    seconds: float
    estimate: xu.PoseEstimate  # what was measured, accepted or not
    filtered: FilteredMotion
    reason: str  # why the measurement was not used; empty where it was
    second_target: np.ndarray | None  # (4, 4)


@dataclasses.dataclass
class _Redetection:
    """When the network looks again for a target that is followed.

    A track is most often wrong when it is new. So the network looks again whenever the track is
    twice as old as it was the last time, but not less often than every REDETECTION_SECONDS. Once a
    track is older than that, its frames do not wait: the network works in the background.
    """

    track_started: float = 0.0  # time in seconds
    last: float = 0.0  # time in seconds when the network looked last
    contradictions: int = 0  # redetections in a row that contradict the track
    pending: Future | None = None  # the result of the redetection in the background

    def start_track(self, seconds):
        """Begin again with a new track."""
        self.track_started = seconds
        self.last = seconds
        self.pending = None

    def is_due(self, seconds):
        """Whether the network should look again."""
        interval = min(REDETECTION_SECONDS, self.last - self.track_started)
        return seconds - self.last >= interval

    def runs_in_background(self, seconds):
        """Whether the track is so old that its frames do not wait for the network."""
        return seconds - self.track_started >= REDETECTION_SECONDS

    def has_result(self, seconds):
        """Whether a result from the background is to be used now."""
        return self.pending is not None and seconds >= self.last + REDETECTION_DELAY

    def take_result(self):
        """The result from the background; waits until it is there."""
        result = self.pending.result()
        self.pending = None
        return result


class Tracker:
    """Follows one target frame by frame, with what is known up to each frame.

        tracker = Tracker(K, 30, Detector("weights/xwing.weights.h5"), Aligner(xu.XWING))
        for frame in clip:
            tracked = tracker.update(frame.image, frame.seconds)  # a TrackedPose

    The prediction bridges gaps of up to MAX_GAP_SECONDS. Then the target is lost, until a frame
    shows it clearly. It is lost at once where time stamps jump ahead by more than that, or begin
    again (a loop, a camera that has reconnected), of which a warning tells. `footage.Clock` says
    how frames are timed whose time stamps do not rise. Without an aligner every frame is measured
    by the network. A tracker that keeps its steps needs 4 kB a frame.

    Without a detector, `start` begins a track at a pose that is known:

        tracker = Tracker(K, 30, aligner=Aligner(xu.load_target("box.obj")))
        tracked = tracker.start(first_image, pose)

    Attributes:
        K, fps, detector, aligner: as they were given; the last two may be replaced between frames.
        target: the `Target` that is followed.
        model: the `MotionModel` that predicts it.
        motion: its `Motion` in the last frame, or None where it is lost.
        second_target: (4, 4) pose of a second target that the network saw lately, or None.
        learns: whether the aligner knows how the target looks and learns more of it.
        steps: measurement and filter state of the last frame, or of all frames if they are kept.
        age: number of frames of the track so far.
    """

    def __init__(
        self,
        K: np.ndarray,
        fps: float = 30.0,
        detector=None,
        aligner=None,
        keep: bool = False,
    ):
        """Make a tracker that has not seen a frame yet.

        Args:
            K: (3, 3) camera matrix, pixels.
            fps: frames a second, where frames come without a time.
            detector: `Detector`, or another callable like it; None: `start` or `update_pose` has to
                start the track.
            aligner: `Aligner`, or None.
            keep: keep the steps of all frames, for `smoothed`.

        Raises:
            ValueError: a wrong K, fps that are not positive, or a detector and an aligner of
                different targets.
        """
        if fps is None or not fps > 0:
            raise ValueError(
                f"fps: expected a positive number of frames a second, got {fps}; "
                "a folder of frames does not say: give the camera's"
            )

        self.K = xu.check_camera_matrix(K)
        self.fps = fps
        self.detector = detector
        self.aligner = aligner
        self.target = _common_target(aligner, detector)
        self.model = MotionModel(self.target.diameter)

        self.motion = None
        self.seconds = -1 / fps  # time of the last frame
        self._clock = Clock(fps)
        self._last_step = 0.0  # seconds between the last two frames
        self.measured_seconds = 0.0  # time of the last frame with a measurement
        self.usual_contrast = 0.0  # running mean of the fraction of the contrast that is explained
        self.age = 0
        self.learns = False
        self.second_target = None
        self._last_pose = None  # (4, 4) of the last frame with a pose
        self._searches = 0  # frames without a pose in which the key frames could be asked
        self.steps = collections.deque(maxlen=None if keep else 1)

        self._redetection = _Redetection()
        self._background = ThreadPoolExecutor(1)

    def update(
        self, image: np.ndarray | None, seconds: float | None = None, fault: str = ""
    ) -> TrackedPose:
        """Take the next frame.

        Args:
            image: (H, W, 3) uint8 RGB, or what `xu.rgb_image` makes that of; None where the frame
                cannot be read.
            seconds: the frame's time; None is one frame later than the last one.
            fault: why the image is None.

        Returns:
            the frame's `TrackedPose`.

        Raises:
            ValueError: the image is of a kind that is not clear. The tracker stays as it was.
        """
        image = None if image is None else xu.rgb_image(image)
        seconds = self._next_time(seconds)
        if image is None:
            estimate = xu.PoseEstimate(None, reason=fault or "the frame is missing")
        elif self.motion is None:
            estimate = self._find(image)
        elif self.aligner is None:
            estimate = self._measure_without_pixels(image, seconds)
        else:
            estimate = self._measure_on_pixels(image, seconds)
        tracked = self._take(estimate, seconds)
        if tracked.status == "tracked" and self._is_confident(tracked):
            pose = self.steps[-1].estimate.pose
            self.aligner.learn(image, pose, self.K, outline=self.detector is None)
            self.learns = True
        return tracked

    def start(
        self, image: np.ndarray, pose: np.ndarray, seconds: float | None = None
    ) -> TrackedPose:
        """Take the next frame at a pose that the user gives: a new track begins there.

        What the aligner has learnt before is forgotten. It learns how the target looks at this
        pose, so a wrong pose is followed like a right one.

        Args:
            image: as in `update`.
            pose: (4, 4) model -> OpenCV camera.
            seconds: the frame's time; None is one frame later than the last one.

        Returns:
            the frame's `TrackedPose`, at this pose.

        Raises:
            ValueError: there is no aligner or no clear image, the pose is no rigid motion, or too
                little of the target is in sight there. The tracker stays as it was.
        """
        pose = xu.rigid_matrix(pose, "start")
        image = None if image is None else xu.rgb_image(image)
        self._check_start(image, pose)
        self.aligner.forget()
        self.aligner.learn(image, pose, self.K)
        self.learns = True

        deviations = np.repeat([START_TURN, START_SHIFT * self.target.diameter], 3)
        covariance = np.diag(np.square(deviations))
        aligned = self.aligner.track(image, pose, self.K, covariance)
        estimate = dataclasses.replace(
            aligned, pose=pose, covariance=covariance, accepted=True, reason=""
        )
        self.motion = None
        return self.update_pose(estimate, seconds)

    def update_pose(self, estimate: xu.PoseEstimate, seconds: float | None = None) -> TrackedPose:
        """Take the next frame's `PoseEstimate`, for callers that have made it themselves.

        Args:
            estimate: what was measured in the frame, accepted or not.
            seconds: the frame's time; None is one frame later than the last one.

        Returns:
            the frame's `TrackedPose`.
        """
        return self._take(estimate, self._next_time(seconds))

    def _take(self, estimate, seconds):
        """The `TrackedPose` of a frame at a time of the clock, of its `PoseEstimate`."""
        predicted = None
        transition = None
        if self.motion is not None:
            predicted, transition = self.model.predict(self.motion, seconds - self.seconds)

        motion, started, reason = self._filter(estimate, predicted)
        if started:
            self._forget_if_untaught(estimate)
        self.age = 1 if started else self.age + 1
        if motion is not None:
            self._remember_measurement(estimate, seconds, started)
        elif predicted is not None and self._is_bridged(predicted, seconds):
            motion = predicted

        self.motion = motion
        self.seconds = seconds
        if motion is not None:
            self._last_pose = motion.pose
        else:
            self.second_target = None
            self._redetection.pending = None

        filtered = FilteredMotion(predicted, transition, motion, started)
        step = _Step(seconds, estimate, filtered, reason, self.second_target)
        self.steps.append(step)
        return self._tracked(step, motion)

    def align(self, image: np.ndarray, predicted: Motion, usual_contrast: float) -> xu.PoseEstimate:
        """Refine a predicted pose on the pixels.

        Args:
            image: (H, W, 3) uint8 RGB.
            predicted: `Motion` that is expected in this frame.
            usual_contrast: fraction of the contrast that the track explained lately.

        Returns:
            PoseEstimate, accepted only if it is near the prediction and explains the frame about as
            well as usual.
        """
        covariance = predicted.covariance[:6, :6]
        estimate = self.aligner.track(image, predicted.pose, self.K, covariance, usual_contrast)
        if self.learns:
            in_sight = self._in_sight(image, estimate.pose)
            # Where there is a network, it is asked rather than that a doubtful track goes on.
            enough = MIN_AGREEMENT if self.detector is None else CONFIDENT_AGREEMENT
            accepted = estimate.local_agreement > enough and in_sight > MIN_IN_SIGHT
        else:
            enough = MIN_CONTRAST_RATIO * usual_contrast
            accepted = estimate.accepted and estimate.explained_contrast >= enough

        if accepted and _is_near(estimate, predicted):
            return dataclasses.replace(estimate, accepted=True, reason="")
        reason = estimate.reason or "the pose explains less of the frame than it did"
        return dataclasses.replace(estimate, accepted=False, reason=reason)

    def smoothed(self) -> list[TrackedPose]:
        """Return the forward-backward smoothed track of all frames whose steps are kept.

        Frames that were predicted after the target was last seen stay as they are.
        """
        motions = smooth([step.filtered for step in self.steps])
        return [self._tracked(step, motion) for step, motion in zip(self.steps, motions)]

    # ---------------------------------------------------------------- start

    def _check_start(self, image, pose):
        """Raise ValueError where no track can start."""
        if self.aligner is None:
            raise ValueError("start: a track starts on pixels; give the tracker an aligner")
        if image is None:
            raise ValueError("start: the frame cannot be read; start in another one")
        if self.aligner.picture(image, pose, self.K) is None:
            raise ValueError(
                "start: too little of the target is in sight at this pose; "
                "is it in mesh units, model to OpenCV camera, and is K that of the clip?"
            )

    def _is_confident(self, tracked):
        """Whether a frame shows beyond doubt how the target looks.

        A track of the network has to outlive the redetections of its first second before it
        teaches the aligner.
        """
        if self.learns:
            return self.steps[-1].estimate.local_agreement > CONFIDENT_AGREEMENT
        if self.aligner is None or self.usual_contrast >= ENOUGH_CONTRAST:
            return False
        is_old = self._redetection.runs_in_background(tracked.seconds)
        return is_old and tracked.probability >= CONFIDENT_PROBABILITY

    def _forget_if_untaught(self, estimate):
        """Forget what was learnt in another clip, or before the network has found the target anew.

        What was learnt may have been wrong then. And the light may have changed.
        """
        if self.aligner is not None and (_is_verified(estimate) or not self.learns):
            self.aligner.forget()
            self.learns = False

    # ---------------------------------------------------------------- filter

    def _next_time(self, stamp):
        """The time of the next frame. Where the clock begins again or jumps, the track ends."""
        seconds = self._clock.tick(stamp)
        if self._clock.restarted:
            warnings.warn(
                "the time stamps begin again; the target is looked for anew", stacklevel=3
            )
        step = seconds - self.seconds
        longest = MAX_GAP_SECONDS + 1.5 * max(self._last_step, 1 / self.fps)
        if self._clock.restarted or step > longest:
            self.motion = None
            self._searches = -1  # the next frame is searched
        self._last_step = step
        return seconds

    def _filter(self, estimate, predicted):
        """The filter's motion after an estimate, whether that starts a track, and a reason.

        Where the estimate is not used, the motion is None and the reason says why.
        """
        if not estimate.accepted:
            return None, False, estimate.reason or "not measured"

        if predicted is not None:
            motion = _continued(estimate, predicted)
            if motion is not None:
                return motion, False, ""
            if not _is_aligned(estimate):
                return None, False, "too far from where it should be"

        if estimate.log_likelihood_margin < START_MARGIN:
            return None, False, "not clear enough to start from"
        return self.model.start(estimate.pose, estimate.covariance), True, ""

    def _remember_measurement(self, estimate, seconds, started):
        """Note when and how well the target was measured."""
        self.measured_seconds = seconds
        if started:
            self._redetection.start_track(seconds)
        if _is_aligned(estimate):
            weight = 1.0 if started else CONTRAST_WEIGHT
            self.usual_contrast += weight * (estimate.explained_contrast - self.usual_contrast)

    def _is_bridged(self, predicted, seconds):
        """Whether a prediction stands in for the measurement that a frame lacks."""
        gap = seconds - self.measured_seconds
        return gap <= MAX_GAP_SECONDS + 1e-9 and predicted.pose[2, 3] > 0

    def _tracked(self, step, motion):
        """The `TrackedPose` of a step, with its filtered or its smoothed motion."""
        if motion is None:
            return TrackedPose(
                "lost", step.seconds, reason=step.reason, second_target=step.second_target
            )

        status = "predicted" if step.reason else "tracked"
        covariance = motion.covariance[:6, :6]
        contrast = step.estimate.explained_contrast
        return TrackedPose(
            status,
            step.seconds,
            motion.pose,
            covariance,
            motion.velocity,
            contrast,
            step.reason,
            _probability(status, covariance, step.estimate, self.target.diameter),
            step.second_target,
            step.estimate.local_agreement,
        )

    # ---------------------------------------------------------------- measurement

    def _predict(self, seconds):
        """The motion that is expected at a time."""
        predicted, _ = self.model.predict(self.motion, seconds - self.seconds)
        return predicted

    def _measure_on_pixels(self, image, seconds):
        """The alignment's `PoseEstimate` near the prediction, or the network's if needed."""
        predicted = self._predict(seconds)
        aligned = self.align(image, predicted, self.usual_contrast)
        if aligned.accepted:
            return self._check_by_redetection(image, aligned, seconds)

        self._redetection.last = seconds
        found = self._find(image, near=predicted.pose, prior=predicted.pose)
        return found if found.accepted else aligned

    def _find(self, image, near=None, prior=None):
        """The `PoseEstimate` of a target without a track, by the network or by the key frames."""
        if self.detector is not None or not self.learns:
            return self.detect(image, near, prior)

        self._searches += 1
        found = None
        if self._searches % SEARCH_FRAMES == 0:
            found = self._find_by_key_frames(image)
        return found or xu.PoseEstimate(None, reason="the target is not seen as it was before")

    def _find_by_key_frames(self, image):
        """The most probable `PoseEstimate` to which the key frames lead, or None.

        The poses that the best one is ambiguous with are its rivals.
        """
        poses = self.aligner.find(image, self.K, self._last_pose)[:SEARCHED_POSES]
        best = self._best_aligned(image, poses)
        if best is None or best.local_agreement < CONFIDENT_AGREEMENT:
            return None
        rival = self._best_aligned(image, xu.ambiguous_poses(best.pose, self.target)[1:])
        if rival is not None and rival.local_agreement > best.local_agreement:
            best = rival
        return dataclasses.replace(best, accepted=True, reason="")

    def _best_aligned(self, image, poses):
        """The aligned `PoseEstimate` with the highest agreement to which poses lead, or None."""
        aligned = [self.aligner.track(image, pose, self.K) for pose in poses]
        aligned = [one for one in aligned if np.isfinite(one.local_agreement)]
        return max(aligned, key=lambda one: one.local_agreement, default=None)

    def _measure_without_pixels(self, image, seconds):
        """The network's `PoseEstimate` near the prediction.

        The prediction is a prior of the estimate, which would keep a wrong track alive. So now and
        then the pose is estimated without it. A track is dropped when several such estimates in a
        row contradict it.
        """
        predicted = self._predict(seconds)
        if self._is_redetection_due(seconds):
            redetected = self.detect(image, near=predicted.pose)
            if redetected.accepted and self._contradict(redetected.pose, predicted.pose):
                self._redetection.contradictions += 1  # a redetection remains due in the next frame
            else:
                self._redetection.contradictions = 0
                self._redetection.last = seconds

            if self._redetection.contradictions >= MAX_CONTRADICTIONS:
                self._redetection.contradictions = 0
                self._redetection.last = seconds
                self.motion = None
                return redetected

        return self.detect(image, near=predicted.pose, prior=predicted.pose)

    def _in_sight(self, image, pose):
        """The fraction of the target's box in the picture that lies within the frame."""
        corners = self._box_corners(pose)
        if corners is None:
            return 0.0
        size = np.ptp(corners, axis=0)
        inside = np.ptp(corners.clip(0, image.shape[1::-1]), axis=0)
        return float(np.prod(inside / size))

    def detect(
        self, image: np.ndarray, near: np.ndarray | None = None, prior: np.ndarray | None = None
    ) -> xu.PoseEstimate:
        """Return the network's estimate, verified on the pixels where there is an aligner.

        Args:
            image: as in `update`.
            near: (4, 4) pose around which the network looks, and of the poses at which the target
                looks the same, the nearest one is returned; None: in the whole frame.
            prior: (4, 4) pose that is a prior of the estimate, or None.
        """
        if self.detector is None:
            return xu.PoseEstimate(None, reason="there is no detector to find the target with")
        image = xu.rgb_image(image)
        estimate = self._estimate(image, near, prior)
        if self.aligner is not None:
            estimate = self.aligner.verify(image, estimate, self.K)
        if near is None or estimate.pose is None:
            return estimate
        pose = xu.nearest_equivalent(estimate.pose, near, self.target)
        return dataclasses.replace(estimate, pose=pose)

    def _contradict(self, one, other):
        """Whether two poses cannot both be right."""
        return xu.rotation_error(one, other, self.target) > CONTRADICTION_TURN

    def _estimate(self, image, near=None, prior=None):
        """The `PoseEstimate` from the network's keypoints, in the whole frame or near a pose."""
        box = None
        corners = None if near is None else self._box_corners(near)
        if corners is not None:
            box = np.stack([corners.min(0), corners.max(0)])

        seen = self.detector(image, box)
        keypoints, confidence, sigma = seen
        estimate = xu.estimate_pose(
            keypoints, self.K, confidence, sigma, prior=prior, target=self.target
        )
        # Without pixels, nothing would decide between this pose and that of the heatmaps.
        if self.aligner is None or not hasattr(seen, "refine"):
            return estimate
        return seen.refine(estimate, self.K, self.target)

    def _box_corners(self, pose):
        """The target's box at a pose, (8, 2) pixels; None if a corner is behind the camera."""
        corners = xu.project_pose(self.target.box, pose, self.K)
        return corners if np.isfinite(corners).all() else None

    # ---------------------------------------------------------------- redetection

    def _is_redetection_due(self, seconds):
        """Whether the network should look again for the target that is followed."""
        return self.detector is not None and self._redetection.is_due(seconds)

    def _check_by_redetection(self, image, aligned, seconds):
        """The aligned estimate of a track, or the network's if that explains the frame better.

        While a track is new, its frames wait for the network. Later the network works in the
        background. A better pose that it finds there is of an older frame, so the target is then
        detected again in the current one.
        """
        better = None
        if self._redetection.has_result(seconds):
            better, self.second_target = self._redetection.take_result()
            if better is not None:
                better = self.detect(image)
        elif self._is_redetection_due(seconds):
            self._redetection.last = seconds
            if self._redetection.runs_in_background(seconds):
                self._redetection.pending = self._background.submit(
                    self._redetect_all, image.copy(), aligned.pose
                )
            else:
                self.second_target = None
                better = self._redetect(image, aligned.pose)

        return better if better is not None and better.accepted else aligned

    def _redetect_all(self, image, pose):
        """A better estimate of the target than a pose, and the pose of a second target."""
        return self._redetect(image, pose), self.detect_second(image, pose)

    def _redetect(self, image, pose):
        """The network's `PoseEstimate` if it explains a frame better than a pose, or None."""
        other = self._estimate(image, near=pose)
        if not other.accepted or not self._contradict(other.pose, pose):
            return None  # verifying it would take time

        other = self.aligner.verify(image, other, self.K)
        if not other.accepted or not self._contradict(other.pose, pose):
            return None

        costs, _ = self.aligner.photometric_costs(image, [pose, other.pose], self.K)
        return other if costs[1] + MIN_COST_GAIN < costs[0] else None

    def detect_second(self, image: np.ndarray, pose: np.ndarray) -> np.ndarray | None:
        """Return the pose (4, 4) of a second target in a frame, or None.

        Args:
            image: (H, W, 3) uint8 RGB.
            pose: (4, 4) of the first target.
        """
        corners = self._box_corners(pose)
        if corners is None:
            return None

        # The first target is painted over in the median colour of the frame.
        hull = cv2.convexHull(corners.clip(-1e4, 1e4).round().astype(np.int32))
        painted_over = cv2.fillConvexPoly(image.copy(), hull, np.median(image, axis=(0, 1)))
        found = self._estimate(painted_over)
        if found.accepted:
            found = self.aligner.verify(painted_over, found, self.K)
        return found.pose if found.accepted else None


def _common_target(aligner, detector):
    """The target of an aligner and a detector; the X-wing where neither has one."""
    aligned = getattr(aligner, "target", None)
    detected = getattr(detector, "target", None)
    if aligned is not None and detected is not None:
        xu.check_same_target(detected, aligned, "the detector's weights")

    # The detector's has the lookalikes that its keypoints are confused with.
    known = [target for target in (detected, aligned) if target is not None]
    return known[0] if known else xu.XWING


def _probability(status, covariance, estimate, diameter):
    """The probability that a pose is right: a logistic model of its features, see PROBABILITY."""
    seen = estimate.explained_contrast
    weights = PROBABILITY[status, bool(np.isfinite(seen))]
    if status == "tracked" and np.isfinite(estimate.local_agreement):
        seen = estimate.local_agreement
        weights = LEARNT_PROBABILITY
    return float(expit(np.dot(weights, trust_features(covariance, seen, diameter))))


def _is_aligned(estimate):
    """Whether an estimate was compared with the pixels."""
    return bool(np.isfinite(estimate.explained_contrast))


def _is_verified(estimate):
    """Whether an estimate is the network's, judged on a single frame."""
    return bool(np.isfinite(estimate.probability))


def _continued(estimate, predicted):
    """A track's motion after an estimate; None where that is too far from the prediction."""
    excess = predicted.distance(estimate.pose, estimate.covariance) / GATE
    if excess > 1 and _is_aligned(estimate) and _is_near(estimate, predicted):
        # The pixels confirm a manoeuvre that the model did not expect.
        predicted = dataclasses.replace(predicted, covariance=predicted.covariance * excess)
        excess = 1.0
    return predicted.updated(estimate.pose, estimate.covariance) if excess <= 1 else None


def _is_near(estimate, predicted):
    """Whether an aligned estimate is turned little enough against the prediction."""
    return xu.rotation_error(estimate.pose, predicted.pose) < MAX_TURN
