"""How a target moves: a Kalman filter and a smoother on SE(3).

A target's motion is its pose and its velocity, with the uncertainty of both. From one frame to the
next the pose moves on at that velocity, and the uncertainty grows, because the target may have
accelerated. The pose that is measured in the next frame then corrects the prediction. Both are
weighted by their covariances. Once a clip is finished, the smoother goes through it from the last
frame to the first, so that the frames after a frame improve its pose too. Poses do not form a
vector space, but small errors of a pose do: they are steps of `xwing_utils.move_pose`, a rotation
vector in camera axes and a translation.
"""

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

import xwing_utils as xu


@dataclasses.dataclass(frozen=True)
class Motion:
    """A pose with its velocity, and the covariance of both."""

    pose: np.ndarray  # (4, 4) model -> OpenCV camera
    velocity: np.ndarray  # (6,) rotation in camera axes, rad/s, then translation, model units/s
    covariance: np.ndarray  # (12, 12) of a step of the pose, then of the velocity

    def step_from(self, other: "Motion") -> np.ndarray:
        """Return the step (12,) of pose and velocity from another motion to this one."""
        pose_step = xu.pose_step(self.pose, other.pose)
        return np.concatenate([pose_step, self.velocity - other.velocity])

    def moved(self, step: np.ndarray, covariance: np.ndarray) -> "Motion":
        """Return the motion after a step (12,), with a new covariance (12, 12)."""
        pose = xu.move_pose(self.pose, step[:6])
        return Motion(pose, self.velocity + step[6:], covariance)

    def distance(self, pose: np.ndarray, covariance: np.ndarray) -> float:
        """Return the squared Mahalanobis distance of a pose (4, 4) with covariance (6, 6)."""
        step = xu.pose_step(pose, self.pose)
        return float(step @ np.linalg.solve(self.covariance[:6, :6] + covariance, step))

    def updated(self, pose: np.ndarray, covariance: np.ndarray) -> "Motion":
        """Return the motion once a pose (4, 4) with covariance (6, 6) has been measured."""
        innovation_covariance = self.covariance[:6, :6] + covariance
        gain = np.linalg.solve(innovation_covariance, self.covariance[:6]).T

        # Joseph's form of the update keeps the covariance symmetric and positive.
        kept = np.eye(12) - np.pad(gain, ((0, 0), (0, 6)))
        updated_covariance = kept @ self.covariance @ kept.T + gain @ covariance @ gain.T

        return self.moved(gain @ xu.pose_step(pose, self.pose), updated_covariance)


@dataclasses.dataclass(frozen=True)
class MotionModel:
    """Constant velocity that is disturbed by random accelerations (white noise).

    Lengths are in diameters of the target, so that the defaults suit a target of any size.

    Source: Bar-Shalom, Li, Kirubarajan, Estimation with Applications to Tracking and Navigation,
        2001 (white-noise acceleration, gating); Sola, Deray, Atchuthan, A micro Lie theory for
        state estimation in robotics, 2018 (errors as rotation vectors).
    """

    diameter: float  # of the target, model units
    rotation_acceleration: float = 3.0  # spectral density, rad/s^2 per root Hz
    translation_acceleration: float = 1.489951999232902  # the same, diameters/s^2 per root Hz
    rotation_velocity: float = 1.5  # standard deviation at a track's start, rad/s
    translation_velocity: float = 1.0642514280235016  # the same, diameters/s

    def start(self, pose: np.ndarray, covariance: np.ndarray) -> Motion:
        """Return a motion of unknown velocity at a pose (4, 4) with covariance (6, 6)."""
        joint = np.zeros((12, 12))
        joint[:6, :6] = covariance
        joint[6:, 6:] = self._variances(self.rotation_velocity, self.translation_velocity)
        return Motion(pose, np.zeros(6), joint)

    def predict(self, motion: Motion, seconds: float) -> tuple[Motion, np.ndarray]:
        """Predict a motion some seconds later, or earlier where they are negative.

        Args:
            motion: from which to predict.
            seconds: from the time of the motion to that of the prediction.

        Returns:
            the predicted motion, and the transition matrix (12, 12), which turns errors of the
            motion into errors of the prediction.
        """
        step = motion.velocity * seconds

        # Errors of the rotation are in camera axes, so they turn with the target.
        transition = np.eye(12)
        transition[:3, :3] = cv2.Rodrigues(step[:3])[0]
        transition[:6, 6:] = np.eye(6) * seconds

        # White noise in the acceleration, integrated over time. Backwards in time the errors of
        # pose and velocity have opposite signs.
        density = self._variances(self.rotation_acceleration, self.translation_acceleration)
        t = abs(seconds)
        cross = np.sign(seconds) * t**2 / 2
        noise = np.kron([[t**3 / 3, cross], [cross, t]], density)

        covariance = transition @ motion.covariance @ transition.T + noise
        predicted = Motion(xu.move_pose(motion.pose, step), motion.velocity, covariance)
        return predicted, transition

    def _variances(self, rotation, translation):
        """(6, 6) diagonal, radians and model units, of deviations in radians and diameters."""
        deviations = np.array([rotation, translation * self.diameter])
        return np.diag(np.repeat(np.square(deviations), 3))


@dataclasses.dataclass(frozen=True)
class FilteredMotion:
    """What the filter knew of one frame."""

    predicted: Motion | None  # before the frame's measurement; None where there was no track
    transition: np.ndarray | None  # (12, 12) with which it was predicted, see `MotionModel.predict`
    motion: Motion | None  # after the measurement; None where the target is lost
    started: bool  # whether a new track starts here, which the frames before say nothing about


def smooth(filtered: Sequence[FilteredMotion]) -> list[Motion | None]:
    """Estimate the motion in each frame from the frames before and after it.

    Frames that were predicted after the target was last seen stay as they are.

    Args:
        filtered: of successive frames.

    Returns:
        the motions, None where the target is lost.

    Source: Rauch, Tung, Striebel, AIAA Journal 3(8), 1965.
    """
    smoothed = []
    following = None
    for current in reversed(filtered):
        motion = current.motion
        later = smoothed[-1] if smoothed else None
        if motion is not None and later is not None and not following.started:
            motion = _smooth_step(motion, following, later)
        smoothed.append(motion)
        following = current
    return smoothed[::-1]


def _smooth_step(motion, following, later):
    """A filtered motion, corrected by the smoothed motion `later` of the `following` frame."""
    predicted = following.predicted
    gain = np.linalg.solve(predicted.covariance, following.transition @ motion.covariance).T
    step = gain @ later.step_from(predicted)
    change = gain @ (later.covariance - predicted.covariance) @ gain.T
    return motion.moved(step, motion.covariance + change)
