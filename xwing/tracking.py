"""One ship followed in time: predicted, aligned on the pixels, judged, filtered; and the whole clip smoothed.

From frame to frame a ship moves little, so the pose expected from the last frames is near enough for the
alignment to finish on the pixels alone, in a few milliseconds. A Kalman filter on SE(3) makes the prediction.
The network is asked where there is no track, where the alignment explains less of the frame than it did
lately, and now and then as an independent witness: what it finds must beat the track on the pixels before it
replaces it. A finished clip goes through the same chain, backwards too where the ship was in sight before the
network was sure of it, and is then smoothed with what is known from both sides.
"""

import collections
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from scipy.special import expit
from tqdm.auto import tqdm

import xwing_utils as xu
from xwing.export import export_track  # noqa: F401  also found here
from xwing.motion import Motion, smooth

MAX_GAP_SECONDS = 0.5  # without a measurement that are bridged by the prediction
START_MARGIN = 3.0  # log-likelihood margin over the runner-up from which a track may start
START_FRAMES = (
    6  # of a new track, after which its velocity is known well enough to go back from its start
)
GATE = 22.5  # chi square of 6 degrees of freedom, 99.9 %: what a pose may differ from the predicted one
MAX_TURN = 25.0  # degrees from the prediction that an alignment may find; beyond it has found something else
MIN_CONTRAST_RATIO = (
    0.7  # of the explained contrast to what it was lately; with less the network is asked
)
WITNESS_SECONDS = (
    1.0  # between two looks of the network at a ship that is followed; sooner at a new track
)
WITNESS_DELAY = 0.3  # seconds for a look in the background, after which it is heard
MIN_COST_GAIN = (
    20.0  # log-likelihood by which a witness's pose must explain the frame better than the track
)
TRACK_DROP_EVIDENCE = (
    3  # witnesses in a row against a track, where no pixels decide, at which it is dropped
)
PROBABILITY = {  # status, whether pixels were compared -> weights of `trust_features`; logistic models fitted
    # by tools/calibrate_probability.py to 12,790 poses, 1,782 of them wrong, of ten flights rendered for it
    ("tracked", True): (-4.69, 5.06, -2.50, 0.0),
    ("tracked", False): (-6.85, 0.0, -6.96, 0.0),
    ("predicted", True): (-4.86, 0.0, 0.0, -2.61),
    ("predicted", False): (-4.16, 0.0, 0.0, -2.58),
}


@dataclasses.dataclass(frozen=True)
class TrackedPose:
    """One frame of a track."""

    status: str  # "tracked": measured in this frame; "predicted": from the frames around it; "lost": no pose
    seconds: float = np.nan  # time of the frame
    pose: np.ndarray | None = None  # (4, 4) model -> OpenCV camera
    covariance: np.ndarray | None = (
        None  # (6, 6): rotation vector in camera axes (radians), then translation
    )
    velocity: np.ndarray | None = (
        None  # (6,) rotation in camera axes, rad/s, then translation, model units/s
    )
    explained_contrast: float = (
        np.nan
    )  # share of the frame's contrast that the ship explains, 0 to 1
    reason: str = ""  # why it was not measured
    probability: float = (
        0.0  # that the pose is within 5 degrees and 0.05 model units of the true one
    )
    another: np.ndarray | None = (
        None  # (4, 4) pose of a second ship, where the network saw one lately
    )


@dataclasses.dataclass(frozen=True)
class _Step:
    """What one frame did to the filter."""

    seconds: float
    estimate: xu.PoseEstimate  # what was measured, accepted or not
    predicted: Motion | None
    transition: np.ndarray | None  # (12, 12) from the frame before
    motion: Motion | None  # after the measurement
    started: bool  # a new track
    reason: str
    another: np.ndarray | None  # (4, 4) of a second ship

    def tracked(self, motion=None):
        """The `TrackedPose` of this step, or of another motion in its place."""
        motion = self.motion if motion is None else motion
        if motion is None:
            return TrackedPose("lost", self.seconds, reason=self.reason, another=self.another)
        status = "predicted" if self.reason else "tracked"
        covariance, contrast = motion.covariance[:6, :6], self.estimate.explained_contrast
        return TrackedPose(
            status,
            self.seconds,
            motion.pose,
            covariance,
            motion.velocity,
            contrast,
            self.reason,
            _probability(status, covariance, contrast),
            self.another,
        )


def trust_features(covariance, contrast):
    """(4,) what tells a right pose: 1, the explained contrast, log10 of both standard deviations (radians and
    model units), of a covariance (6, 6). A contrast that is not known is 0."""
    spread = [np.log10(np.trace(covariance[part, part])) / 2 for part in (slice(3), slice(3, 6))]
    return np.array([1.0, np.nan_to_num(contrast), *spread])


def _probability(status, covariance, contrast):
    """That a pose is right: a logistic model of its features, see PROBABILITY."""
    weights = PROBABILITY[status, bool(np.isfinite(contrast))]
    return float(expit(np.dot(weights, trust_features(covariance, contrast))))


class Tracker:
    """Follows one ship frame by frame with what is known up to then.

        tracker = Tracker(K, fps=30, detector=Detector("weights/xwing.weights.h5"), aligner=Aligner(mesh))
        for frame in clip:
            tracked = tracker.update(frame.image, frame.seconds)  # a TrackedPose

    Gaps of up to MAX_GAP_SECONDS are bridged by the prediction; then the ship is lost, until a frame shows it
    clearly. Without an aligner every frame is the network's. With `keep`, `steps` holds all, 4 kB a frame.

    Source: Bar-Shalom, Li, Kirubarajan, Estimation with Applications to Tracking and Navigation, 2001
        (white-noise acceleration, gating); Sola, Deray, Atchuthan, A micro Lie theory for state estimation in
        robotics, 2018 (errors as rotation vectors).
    """

    def __init__(self, K, fps=30.0, detector=None, aligner=None, keep=False):
        """K (3, 3) pixels; fps: frames a second. ValueError: a wrong K, or fps not positive."""
        if fps is None or not fps > 0:
            raise ValueError(
                f"fps: expected a positive number of frames a second, got {fps}; "
                "a folder of frames does not say: give the camera's"
            )
        self.K, self.fps, self.detector, self.aligner = (
            xu.check_camera_matrix(K),
            fps,
            detector,
            aligner,
        )
        self.steps = collections.deque(maxlen=None if keep else 1)
        self.motion, self.seconds, self.another = None, -1 / fps, None
        self.witness, self.thread = None, ThreadPoolExecutor(1)
        self.seen, self.asked, self.began, self.contrast, self.against, self.age = (
            0.0,
            0.0,
            0.0,
            0.0,
            0,
            0,
        )

    def update(self, image, seconds=None, fault=""):
        """Take the next frame, (H, W, 3) uint8: its `TrackedPose`.

        seconds: the frame's time, None is one frame later; fault: why the image is None.
        """
        seconds = self._time(seconds)
        if image is None:
            return self.update_pose(
                xu.PoseEstimate(None, reason=fault or "the frame is missing"), seconds
            )
        if self.motion is None:
            return self.update_pose(self._detect(image), seconds)
        predicted = self.motion.after(seconds - self.seconds)[0]
        if self.aligner is None:
            return self.update_pose(self._unaligned(image, predicted, seconds), seconds)
        estimate, sure = _aligned(self.aligner, image, self.K, predicted, self.contrast)
        if not sure:
            found, self.asked = self._detect(image, predicted), seconds
            reason = estimate.reason or "the pose explains less of the frame than it did"
            unsure = dataclasses.replace(estimate, accepted=False, reason=reason)
            estimate = found if found.accepted else unsure
        else:
            estimate = self._witnessed(image, estimate, seconds)
        return self.update_pose(estimate, seconds)

    def update_pose(self, estimate, seconds=None):
        """Take the next frame's `PoseEstimate`, for callers that have made it: its `TrackedPose`."""
        seconds = self._time(seconds)
        predicted = transition = None
        if self.motion is not None:
            predicted, transition = self.motion.after(seconds - self.seconds)
        motion, started, reason = self._filter(estimate, predicted)
        self.age = 1 if started else self.age + 1
        if motion is not None:
            self.seen, share = seconds, 1.0 if started else 0.2
            self.began, self.asked = (seconds, seconds) if started else (self.began, self.asked)
            if np.isfinite(estimate.explained_contrast):
                self.contrast += share * (estimate.explained_contrast - self.contrast)
        elif predicted is not None and seconds - self.seen <= MAX_GAP_SECONDS + 1e-9:
            motion = predicted if predicted.pose[2, 3] > 0 else None
        self.motion, self.seconds = motion, seconds
        self.another = None if motion is None else self.another
        self.witness = None if motion is None or started else self.witness
        self.steps.append(
            _Step(seconds, estimate, predicted, transition, motion, started, reason, self.another)
        )
        return self.steps[-1].tracked()

    def _time(self, seconds):
        """The time of the next frame, which is always later than that of the one before."""
        return max(self.seconds + 1 / self.fps if seconds is None else seconds, self.seconds + 1e-3)

    def _filter(self, estimate, predicted):
        """The motion with this frame's estimate, whether it starts a track, and why there is none."""
        if not estimate.accepted:
            return None, False, estimate.reason or "not measured"
        if predicted is not None:
            excess = predicted.distance(estimate.pose, estimate.covariance) / GATE
            aligned = np.isfinite(estimate.explained_contrast)
            if (
                excess > 1
                and aligned
                and xu.rotation_error(estimate.pose, predicted.pose) < MAX_TURN
            ):
                spread = predicted.covariance * excess  # a manoeuvre
                predicted, excess = dataclasses.replace(predicted, covariance=spread), 1
            if excess <= 1:
                return predicted.updated(estimate.pose, estimate.covariance), False, ""
            if not aligned:
                return None, False, "too far from where it should be"
        if estimate.log_likelihood_margin < START_MARGIN:
            return None, False, "not clear enough to start from"
        return Motion.standing(estimate.pose, estimate.covariance), True, ""

    def _detect(self, image, predicted=None, prior=True):
        """The network's `PoseEstimate` near a prediction, verified on the pixels if there is an aligner."""
        if self.detector is None:
            return xu.PoseEstimate(None, reason="there is no detector to find the ship with")
        pose = None if predicted is None else predicted.pose
        estimate = self._look(image, pose, pose if prior else None)
        return estimate if self.aligner is None else self.aligner.verify(image, estimate, self.K)

    def _look(self, image, near, prior=None):
        """The `PoseEstimate` from what the network finds in a frame, or near a pose."""
        keypoints, confidence, sigma = self.detector(
            image, None if near is None else self._box(near)
        )
        return xu.estimate_pose(keypoints, self.K, confidence, sigma, prior=prior)

    def _witness_is_due(self, seconds):
        """Whether the network should look again: after a second, or when a new track is twice as old."""
        interval = min(WITNESS_SECONDS, self.asked - self.began)
        return self.detector is not None and seconds - self.asked >= interval

    def _unaligned(self, image, predicted, seconds):
        """The network's estimate near the prediction; drops a track that frames alone speak against."""
        if self._witness_is_due(seconds):
            alone = self._detect(image, predicted, prior=False)
            against = alone.accepted and xu.rotation_error(alone.pose, predicted.pose) > 30
            self.against = self.against + 1 if against else 0
            if self.against >= TRACK_DROP_EVIDENCE:
                self.motion, self.against, self.asked = None, 0, seconds
                return alone
            self.asked = self.asked if against else seconds
        return self._detect(image, predicted)

    def _witnessed(self, image, tracked, seconds):
        """The track's estimate, or the network's where that explains the frame clearly better.

        At a new track the network looks at once, later in the background; what it saw then is heard now.
        """
        rival = None
        if self.witness is not None and seconds >= self.asked + WITNESS_DELAY:
            (rival, self.another), self.witness = self.witness.result(), None
            rival = rival and self._detect(image)
        elif self._witness_is_due(seconds):
            settled, self.asked = seconds - self.began >= WITNESS_SECONDS, seconds
            if settled:
                self.witness = self.thread.submit(self._look_round, image.copy(), tracked.pose)
            else:
                rival, self.another = self._rival(image, tracked.pose), None
        return rival if rival is not None and rival.accepted else tracked

    def _look_round(self, image, pose):
        return self._rival(image, pose), self._elsewhere(image, pose)

    def _rival(self, image, pose):
        """The network's estimate where that explains a frame clearly better than a pose does, or None."""
        other = self._look(image, pose)
        if not other.accepted or xu.rotation_error(other.pose, pose) < 30:
            return None
        other = self.aligner.verify(image, other, self.K)
        if not other.accepted or xu.rotation_error(other.pose, pose) < 30:
            return None
        costs, _ = self.aligner.photometric_costs(image, [pose, other.pose], self.K)
        return other if costs[1] + MIN_COST_GAIN < costs[0] else None

    def _elsewhere(self, image, pose):
        """The pose (4, 4) of a ship in the frame beside the one at a pose, or None."""
        corners = xu.project_pose(xu.BOUNDING_BOX, pose, self.K)
        if not np.isfinite(corners).all():
            return None
        hull = cv2.convexHull(corners.clip(-1e4, 1e4).round().astype(np.int32))
        rest = cv2.fillConvexPoly(image.copy(), hull, np.median(image, axis=(0, 1)))
        found = self._look(rest, None)
        found = self.aligner.verify(rest, found, self.K) if found.accepted else found
        return found.pose if found.accepted else None

    def _box(self, pose):
        """The box (2, 2), top left and bottom right, of the ship at a pose; None where it is not in front."""
        corners = xu.project_pose(xu.BOUNDING_BOX, pose, self.K)
        return np.stack([corners.min(0), corners.max(0)]) if np.isfinite(corners).all() else None


def _aligned(aligner, image, K, predicted, contrast):
    """The alignment from a predicted motion, and whether it is believed; contrast: explained before."""
    estimate = aligner.track(image, predicted.pose, K, predicted.covariance[:6, :6], contrast)
    return estimate, (
        estimate.accepted
        and estimate.explained_contrast >= MIN_CONTRAST_RATIO * contrast
        and xu.rotation_error(estimate.pose, predicted.pose) < MAX_TURN
    )


def track_clip(clip, K, detector, aligner=None, fps=None, progress=True):
    """Track a finished clip, every frame with what is known from both sides.

    Args:
        clip: `Clip`, or another iterable of `Frame`.
        K, detector, aligner: see `Tracker`.
        fps: frames a second where the clip does not say.
        progress: show a bar.
    Returns:
        list of N `TrackedPose`. Gaps of up to MAX_GAP_SECONDS between tracked frames are "predicted"; longer
        ones, and what comes before the first or after the last tracked frame, are "lost" and have no pose.
    Raises:
        ValueError: a wrong K, or fps not positive.
    """
    fps = getattr(clip, "fps", None) or fps
    tracker, estimates = Tracker(K, fps, detector, aligner, keep=True), []
    recent = collections.deque(maxlen=round(MAX_GAP_SECONDS * fps) + START_FRAMES)
    for frame in tqdm(
        clip, "tracking", getattr(clip, "count", None), unit="frame", disable=not progress
    ):
        tracked = tracker.update(frame.image, frame.seconds, frame.fault)
        estimates.append(tracker.steps[-1].estimate)
        recent.append((len(estimates) - 1, tracked.seconds, frame.image))
        if aligner is not None and tracked.status != "lost" and tracker.age == START_FRAMES:
            _go_back(tracker, recent, estimates)
    return _smoothed(estimates, tracker, fps)


def _go_back(tracker, recent, estimates):
    """Follow the ship backwards from where a track has just started, as long as the pixels confirm it.

    recent: (index, seconds, image) of frames before the start, and of the START_FRAMES from it on. Replaces
    estimates that are missing or explain less of their frames.
    """
    start = smooth(list(tracker.steps)[-START_FRAMES:])[0]
    motion = dataclasses.replace(
        Motion.standing(start.pose, start.covariance), velocity=start.velocity
    )
    seconds, contrast = start.seconds, start.explained_contrast
    for index, moment, image in list(recent)[-START_FRAMES - 1 :: -1]:
        if image is None:
            break
        predicted = motion.after(moment - seconds)[0]
        estimate, sure = _aligned(tracker.aligner, image, tracker.K, predicted, contrast)
        known = estimates[index]
        better = not known.accepted or estimate.explained_contrast > known.explained_contrast
        if not (better and sure):
            break
        motion, seconds = predicted.updated(estimate.pose, estimate.covariance), moment
        estimates[index] = estimate


def _smoothed(estimates, live, fps):
    """The smoothed track of a clip's estimates; what is not between two tracked frames is lost."""
    tracker = Tracker(live.K, fps, keep=True)
    for estimate, step in zip(estimates, live.steps):
        tracker.another = step.another
        tracker.update_pose(estimate, step.seconds)
    track = smooth(
        (live if live.aligner is None else tracker).steps
    )  # nothing was replaced without
    gaps = np.flatnonzero(np.diff([1, *(t.status == "tracked" for t in track), 1]))
    for start, end in zip(gaps[::2], gaps[1::2]):
        inner = start > 0 and end < len(track)
        if not inner or track[end].seconds - track[start - 1].seconds > MAX_GAP_SECONDS + 1.5 / fps:
            track[start:end] = [
                TrackedPose("lost", t.seconds, reason=t.reason) for t in track[start:end]
            ]
    return track


def summary(track):
    """One line on a track: how many frames are tracked, predicted and lost."""
    counts, more = (
        collections.Counter(t.status for t in track),
        sum(t.another is not None for t in track),
    )
    found = [f"{counts[status]} {status}" for status in ("tracked", "predicted", "lost")]
    return f"{len(track)} frames: " + ", ".join(
        found + [f"another ship in sight in {more}"] * bool(more)
    )
