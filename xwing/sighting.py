"""What a network sees in a frame, and the pose that all its heatmaps together say.

A keypoint is read where its heatmap is brightest. That is precise where the map is sharp. But a
network that was trained for an hour only paints broad maps, and the brightest place of a broad map
says little. A pose from such keypoints may be off by 40 degrees. All maps together say more: at the
right pose every point lies where its map is bright. So the pose of the keypoints climbs to the
greatest product of the probabilities at its projected points. Where the maps are sharp, the pose
of the keypoints stays, because it is more precise.

Source: Chen et al., EPro-PnP: Generalized End-to-End Probabilistic Perspective-n-Points for
    Monocular Object Pose Estimation, CVPR 2022 (a pose's likelihood from what a network says of all
    points).
"""

import dataclasses
from collections.abc import Iterator

import cv2
import numpy as np
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

import xwing_utils as xu

BROAD = 0.07  # diameters: maps whose keypoints have this sigma, or more, in the median
FLOOR = 1e-5  # probability that is added to each pixel of a map: no point rules a pose out
BLUR = 1.0  # pixels of a map, of the logarithms
OUTSIDE_COST = 0.1  # log-likelihood for each pixel of a map by which a point lies outside
BEHIND_COST = 1e6  # log-likelihood of a pose with a point behind the camera

# A step of a climb: radians about the camera's axes, radians across, and the logarithm of the
# distance.
UNITS = np.array([0.1, 0.1, 0.1, 0.02, 0.02, 0.05])
DIFFERENCE = 0.1  # units between two poses whose likelihoods are compared
MAX_ITERATIONS = 25

MIN_GAIN = 5.0  # log-likelihood that a pose has to gain
RUNNER_UP_TURN = 30.0  # degrees between a pose and its runner-up

# The maps of a frame err together, so that they say as much as this fraction of them alone: with
# it, the errors of a box and a figure are as large as their covariances say.
INDEPENDENT = 0.3
COVARIANCE_STEP = 0.05, 0.01  # radians and diameters, of its differences
MIN_INFORMATION = 1e-2  # of a direction about which the maps say nothing, per step squared


@dataclasses.dataclass(frozen=True, eq=False)
class Sighting:
    """What the network says of K keypoints in a frame: (keypoints, confidence, sigma), and maps."""

    keypoints: np.ndarray  # (K, 2) pixels of the frame, NaN where none is found
    confidence: np.ndarray  # (K,) 0 to 1
    sigma: np.ndarray  # (K,) pixels of the frame
    heatmaps: np.ndarray | None  # (h, w, K); None where nothing is found
    corner: np.ndarray  # (2,) pixels of the frame, where the maps have their top-left corner
    scale: float  # pixels of the frame for one pixel of a map

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.keypoints, self.confidence, self.sigma))

    def refine(
        self, estimate: xu.PoseEstimate, K: np.ndarray, target: xu.Target
    ) -> xu.PoseEstimate:
        """Let the pose of the keypoints climb to where all heatmaps together are brightest.

        Args:
            estimate: `PoseEstimate` from the keypoints, and so are the others.
            K: (3, 3) camera matrix, pixels.
            target: `Target` of the network.

        Returns:
            PoseEstimate with the pose that is more probable, if the maps are BROAD and it gains
            MIN_GAIN, and its covariance. Where the pose of the keypoints contradicts it, that is
            the runner-up, and only the pixels can accept one of them.
        """
        if (
            self.heatmaps is None
            or estimate.pose is None
            or not self._is_broad(estimate, K, target)
        ):
            return estimate
        likelihood = _Likelihood(self, K, target)
        starts = [pose for pose in (estimate.pose, estimate.runner_up) if pose is not None]
        cost, pose = min((likelihood.climb(start) for start in starts), key=lambda found: found[0])
        gain = likelihood.costs(estimate.pose[None])[0] - cost
        if gain < MIN_GAIN:
            return estimate
        refined = dataclasses.replace(estimate, pose=pose, covariance=likelihood.covariance(pose))
        if xu.rotation_error(pose, estimate.pose, target) < RUNNER_UP_TURN:
            return refined
        return dataclasses.replace(
            refined,
            accepted=False,
            reason="the keypoints and the heatmaps contradict each other",
            runner_up=estimate.pose,
            log_likelihood_margin=float(min(gain, estimate.log_likelihood_margin)),
        )

    def _is_broad(self, estimate, K, target):
        """Whether the keypoints are uncertain by a part of the target at a pose."""
        distance = estimate.pose[2, :3] @ target.box.mean(0) + estimate.pose[2, 3]
        return np.nanmedian(self.sigma) * distance / K[0, 0] >= BROAD * target.diameter


class _Likelihood:
    """How improbable the heatmaps of a `Sighting` make poses of a target."""

    def __init__(self, sighting, K, target):
        maps = np.clip(sighting.heatmaps, 0, None).astype(np.float32)
        maps /= np.maximum(maps.sum((0, 1)), 1e-12)
        self.maps = cv2.GaussianBlur(np.log(maps + np.float32(FLOOR)), (0, 0), BLUR)
        self.K = xu.crop_camera(K, *sighting.corner, 1 / sighting.scale)
        self.points = target.keypoints[: maps.shape[2]]
        self.centre = target.box.mean(0)
        self.diameter = target.diameter

    def costs(self, poses):
        """The negative log-likelihoods (M,) of poses (M, 4, 4), except for a constant."""
        points = self.points @ poses[:, :3, :3].swapaxes(1, 2) + poses[:, None, :3, 3]
        depth = points[..., 2:]
        with np.errstate(divide="ignore", invalid="ignore"):
            pixels = (points @ self.K.T)[..., :2] / depth - 0.5
        in_front = (depth > 0).all((1, 2)) & np.isfinite(pixels).all((1, 2))
        return np.where(in_front, self._costs_at(np.nan_to_num(pixels)), BEHIND_COST)

    def _costs_at(self, pixels):
        """The costs (M,) of points at pixels (M, K, 2) of the maps."""
        last = np.array(self.maps.shape[1::-1]) - 1
        outside = np.maximum(0, np.maximum(-pixels, pixels - last)).sum((1, 2))
        column, row = np.moveaxis(pixels.clip(0, last - 1e-3), -1, 0)
        left, top = column.astype(int), row.astype(int)
        x, y = column - left, row - top
        number = np.arange(len(self.points))
        above = self.maps[top, left, number] * (1 - x) + self.maps[top, left + 1, number] * x
        below = self.maps[top + 1, left, number] * (1 - x)
        below += self.maps[top + 1, left + 1, number] * x
        return OUTSIDE_COST * outside - (above * (1 - y) + below * y).sum(1)

    def climb(self, start):
        """The least cost near a pose (4, 4), and the pose there.

        Source: Nocedal and Wright, Numerical Optimization, 2006, chapter 6 (BFGS).
        """
        differences = DIFFERENCE * np.concatenate([np.zeros((1, 6)), np.eye(6), -np.eye(6)])

        def cost_and_slope(step):
            costs = self.costs(self._moved(start, step + differences))
            return costs[0], (costs[1:7] - costs[7:]) / (2 * DIFFERENCE)

        options = {"maxiter": MAX_ITERATIONS}
        found = minimize(cost_and_slope, np.zeros(6), jac=True, method="BFGS", options=options)
        return found.fun, self._moved(start, found.x[None])[0]

    def covariance(self, pose):
        """The covariance (6, 6) of the step from a pose (4, 4), see `xu.move_pose`."""
        turn, shift = COVARIANCE_STEP
        units = np.repeat([turn, shift * self.diameter], 3)
        signs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
        information = np.zeros((6, 6))
        for i in range(6):
            for j in range(6):
                steps = units * (signs[:, :1] * np.eye(6)[i] + signs[:, 1:] * np.eye(6)[j]) / 2
                costs = self.costs(np.array([xu.move_pose(pose, step) for step in steps]))
                information[i, j] = costs @ signs.prod(1)
        scales, axes = np.linalg.eigh(INDEPENDENT * information)
        scales = np.maximum(scales, MIN_INFORMATION)
        return (axes / scales) @ axes.T * np.outer(units, units)

    def _moved(self, pose, steps):
        """The poses (M, 4, 4) after steps (M, 6), in UNITS, about the middle of the target."""
        steps = steps * UNITS
        middle = pose[:3, :3] @ self.centre + pose[:3, 3]
        across = middle[2] * np.pad(steps[:, 3:5], ((0, 0), (0, 1)))
        moved = np.tile(np.eye(4), (len(steps), 1, 1))
        moved[:, :3, :3] = Rotation.from_rotvec(steps[:, :3]).as_matrix() @ pose[:3, :3]
        middles = middle * np.exp(steps[:, 5:]) + across
        moved[:, :3, 3] = middles - moved[:, :3, :3] @ self.centre
        return moved
