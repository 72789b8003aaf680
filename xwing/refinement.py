"""A pose moved until drawing and frame agree (Gauss-Newton)."""

import dataclasses

import cv2
import numpy as np

import xwing_utils as xu
from xwing import mesh
from xwing.appearance import _robust_cost, _weight

MAX_DRAWINGS, MAX_STEPS = 4, 6  # on one level; of Gauss-Newton on one drawing


NEGLIGIBLE_GAIN = 0.02  # log-likelihood that is not worth another step


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


def pixel_flow(pixels, depth, K, centre):
    """Points (P, 3) of the surface that flat pixels (P,) of a depth (h, w) show, from a centre (3,) in camera
    axes, and how they move in the picture: d column and d row by a step of `xu.move_pose`, (6, P) each."""
    row, column = np.float32(np.divmod(pixels, depth.shape[1]))
    z, (fx, fy, cx, cy) = depth.ravel()[pixels], np.float32(K[[0, 1, 0, 1], [0, 1, 2, 2]])
    x, y = (column + np.float32(0.5) - cx) * z / fx, (row + np.float32(0.5) - cy) * z / fy
    points, none = np.column_stack([x, y, z]) - centre, np.zeros_like(z)
    px, py, pz = points.T
    a, b, c, d = (
        fx / z,
        fy / z,
        -fx * x / z**2,
        -fy * y / z**2,
    )  # d / d point = (a, 0, c) and (0, b, d)
    return (
        points,
        np.stack([py * c, pz * a - px * c, -py * a, a, none, c]),
        np.stack([py * d - pz * b, -px * d, px * b, none, b, d]),
    )
