"""Filter and smoother on SE(3)."""

import dataclasses

import cv2
import numpy as np

import xwing_utils as xu

ACCELERATION_DENSITY = (
    3.0,
    0.7,
)  # rotation, rad/s^2 per root Hz; translation, model units/s^2 per root Hz


START_VELOCITY_STD = 1.5, 0.5  # rotation, rad/s; translation, model units/s


@dataclasses.dataclass(frozen=True)
class Motion:
    """A pose with its velocity, a point of SE(3) and its tangent, and the covariance (12, 12) of both."""

    pose: np.ndarray
    velocity: np.ndarray
    covariance: np.ndarray

    @classmethod
    def standing(cls, pose, covariance):
        """A motion of unknown velocity."""
        spread = np.repeat(np.square(START_VELOCITY_STD), 3)
        whole = np.block([[covariance, np.zeros((6, 6))], [np.zeros((6, 6)), np.diag(spread)]])
        return cls(pose, np.zeros(6), whole)

    def minus(self, other):
        """(12,) the step from another motion to this one."""
        return np.concatenate([xu.pose_step(self.pose, other.pose), self.velocity - other.velocity])

    def plus(self, step, covariance):
        return Motion(xu.move_pose(self.pose, step[:6]), self.velocity + step[6:], covariance)

    def after(self, seconds):
        """The motion a while later or earlier at constant velocity, and its errors' transition (12, 12)."""
        step, transition = self.velocity * seconds, np.eye(12)
        transition[:3, :3] = cv2.Rodrigues(step[:3])[0]
        transition[:6, 6:] = np.eye(6) * seconds
        t, density = abs(seconds), np.diag(np.repeat(np.square(ACCELERATION_DENSITY), 3))
        mixed = np.sign(seconds) * t**2 / 2
        noise = np.kron([[t**3 / 3, mixed], [mixed, t]], density)
        covariance = transition @ self.covariance @ transition.T + noise
        return Motion(xu.move_pose(self.pose, step), self.velocity, covariance), transition

    def distance(self, pose, covariance):
        """The squared Mahalanobis distance of a pose with its covariance from this motion."""
        step = xu.pose_step(pose, self.pose)
        return float(step @ np.linalg.solve(self.covariance[:6, :6] + covariance, step))

    def updated(self, pose, covariance):
        """The motion once a pose has been measured."""
        gain = np.linalg.solve(self.covariance[:6, :6] + covariance, self.covariance[:6]).T
        kept = np.eye(12) - np.pad(gain, ((0, 0), (0, 6)))
        spread = kept @ self.covariance @ kept.T + gain @ covariance @ gain.T
        return self.plus(gain @ xu.pose_step(pose, self.pose), spread)


def smooth(steps):
    """A list of `TrackedPose`, each with what is known from before and after it, of a tracker's `steps`.

    Frames predicted after the ship was last seen stay as they are.
    Source: Rauch, Tung, Striebel, AIAA Journal 3(8), 1965.
    """
    steps, smoothed, later = list(steps), [], None
    for step, following in zip(reversed(steps), [None, *reversed(steps)]):
        motion = step.motion
        if motion is not None and later is not None and not following.started:
            gain = np.linalg.solve(
                following.predicted.covariance, following.transition @ motion.covariance
            ).T
            change = gain @ later.minus(following.predicted)
            spread = (
                motion.covariance
                + gain @ (later.covariance - following.predicted.covariance) @ gain.T
            )
            motion = motion.plus(change, spread)
        later = motion
        smoothed.append(step.tracked(motion))
    return smoothed[::-1]
