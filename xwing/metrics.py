"""Errors against known poses, figures of merit and their intervals."""

import cv2
import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation

import xwing_utils as xu


def translation_error(estimate, truth):
    """Distance between two positions, model units. Source: e_TE of Hodan et al., ECCV Workshops 2016."""
    return float(np.linalg.norm(np.asarray(estimate)[:3, 3] - np.asarray(truth)[:3, 3]))


def add_error(estimate, truth, points=xu.BOUNDING_BOX):
    """ADD, the average distance of model points (K, 3), model units. Source: Hinterstoisser, ACCV 2012."""
    difference = np.asarray(estimate)[:3] - np.asarray(truth)[:3]
    return float(np.linalg.norm(xu.to_homogeneous(points) @ difference.T, axis=1).mean())


def speed_score(estimate, truth):
    """Rotation error in radians plus position error relative to the true distance; 0 is perfect.

    Source: Kisantal et al., Satellite Pose Estimation Challenge, IEEE TAES 56(5), 2020, equations 3 to 5.
    """
    relative = translation_error(estimate, truth) / np.linalg.norm(np.asarray(truth)[:3, 3])
    return float(np.radians(xu.rotation_error(estimate, truth)) + relative)


def within(poses, truth, degrees=5.0, distance=0.05):
    """(N,) bool: which of N poses or None are right. Source: Shotton et al., CVPR 2013 (5 degrees, 5 cm)."""
    return np.array(
        [
            p is not None
            and xu.rotation_error(p, true) <= degrees
            and translation_error(p, true) <= distance
            for p, true in zip(poses, truth)
        ],
        bool,
    )


def muzzle_error(estimate, truth, K):
    """Largest distance in pixels from a true muzzle to the nearest estimated one; infinite behind the camera.

    It is what a viewer sees of a wrong pose: bolts that leave beside a cannon. A swap of cannons is no error.
    Source: one-sided Hausdorff distance of Huttenlocher et al., IEEE TPAMI 15(9), 1993.
    """
    found, wanted = (xu.project_pose(xu.LASERS[:, 0], pose, K) for pose in (estimate, truth))
    distance = np.linalg.norm(wanted[:, None] - found[None], axis=-1)
    return float(np.nan_to_num(distance.min(1).max(), nan=np.inf))


def _distances(keypoints, truth):
    """Distances (..., K) in pixels; very far where a keypoint is NaN."""
    return np.linalg.norm(np.nan_to_num(keypoints, nan=-1e4) - truth, axis=-1)


def corner_report(keypoints, truth, size=xu.FRAME_SIZE, scale=1.0):
    """Errors of the corners in the frame, split into finding a corner and telling which one it is.

    Args:
        keypoints, truth: (N, 8, 2) pixels; a corner that is NaN counts as far off.
        size: width and height of the frames, pixels; scale: distances are multiplied by it.
    Returns:
        dict: the medians corner_px and best_permutation_px (under each frame's best permutation of corners),
        shares within_2px and within_5px, and permutations: dict name -> number of frames that it fits best.
    Source: the shares as PCK of Andriluka et al., 2D Human Pose Estimation, CVPR 2014, with limits in pixels;
        the split as the inversions of Ronchi and Perona, Benchmarking and Error Diagnosis, ICCV 2017.
    """
    inside = xu.in_frame(truth, size, size)
    permuted = (
        np.stack([_distances(keypoints[:, p], truth) for p in xu.CORNER_PERMUTATIONS.values()])
        * scale
    )
    best = (
        (np.minimum(permuted, 60) * inside).sum(-1).argmin(0)
    )  # 60 px: one wild corner must not decide
    corner, counts = permuted[0][inside], np.bincount(best[inside.any(1)], minlength=len(permuted))
    return {
        "corner_px": float(np.median(corner)),
        "best_permutation_px": float(np.median(permuted[best, np.arange(len(best))][inside])),
        "within_2px": float((corner <= 2).mean()),
        "within_5px": float((corner <= 5).mean()),
        "permutations": dict(zip(xu.CORNER_PERMUTATIONS, counts.tolist())),
    }


def heatmap_errors(heatmaps, truth, settings, sigma=10.0):
    """Mean squared error (N, 8) of each corner's heatmap at another sigma; NaN for corners outside the frame.

    The maps are widened to that sigma by a Gaussian blur, so that networks of different sigma compare. An
    empty map has pi sigma^2 / size^2: 0.0048 for sigma 10 in frames of 256 px.

    Args:
        heatmaps: (N, H/stride, W/stride, 8 or more) of a network with these settings.
        truth: (N, 8, 2) pixels, or more; sigma: pixels, not below the network's own.
    Source: the loss of Tompson et al., Joint Training of a Convolutional Network, NIPS 2014, as a measure.
    """
    own, stride, size = (settings[name] for name in ("sigma", "stride", "size"))
    if not sigma >= own:
        raise ValueError(f"sigma: expected at least the network's own {own} pixels, got {sigma}")
    errors, blur = np.full((len(heatmaps), 8), np.nan), np.sqrt(sigma**2 - own**2) + 1e-3
    for i, maps in enumerate(heatmaps):
        wide = cv2.resize(maps[..., :8], None, fx=stride, fy=stride, interpolation=cv2.INTER_CUBIC)
        wide = cv2.GaussianBlur(wide, (0, 0), blur, borderType=cv2.BORDER_CONSTANT)
        squares = (wide * (sigma / own) ** 2 - xu.gaussian_heatmaps(truth[i], size, sigma)) ** 2
        errors[i] = np.where(xu.in_frame(truth[i], size, size), squares.mean((0, 1)), np.nan)
    return errors


def _pose_errors(poses, truth, K):
    """dict error -> (N,), NaN without a pose; units as in `frame_errors`."""
    measures = {
        "rotation": xu.rotation_error,
        "translation": translation_error,
        "add": lambda pose, true: add_error(pose, true) / xu.DIAMETER,
        "speed": speed_score,
        "muzzle": lambda pose, true: muzzle_error(pose, true, K),
    }
    pairs = list(zip(poses, truth))
    return {
        name: np.array([np.nan if pose is None else measure(pose, true) for pose, true in pairs])
        for name, measure in measures.items()
    }


def frame_errors(keypoints, poses, true_keypoints, true_poses, K, size=xu.FRAME_SIZE):
    """Every error of every frame, to be summarised, drawn again by `bootstrap`, or sliced.

    Args:
        keypoints, true_keypoints: (N, 8, 2) pixels. poses: N (4, 4) or None; true_poses: (N, 4, 4).
        K: (3, 3); size: width and height of the frames, pixels.
    Returns:
        dict of arrays. For each corner (N, 8), NaN outside the frame: corner and box, distance in pixels of
        the keypoint and of the solved box's corner (without a pose, of the keypoint); nmae, mean |dx|, |dy|
        between whole pixels as a share of the frame. For each frame (N,): rotation (degrees), translation
        (model units), add (diameters), speed, muzzle (pixels), NaN without a pose; solved; corners in sight;
        distance (model units) and elevation (degrees above the wings) from which the ship is truly seen.
    """
    keypoints, true_keypoints, true_poses = map(np.asarray, (keypoints, true_keypoints, true_poses))
    inside = xu.in_frame(true_keypoints, size, size)
    box = np.array(
        [
            corners if pose is None else xu.project_pose(xu.BOUNDING_BOX, pose, K)
            for corners, pose in zip(keypoints, poses)
        ]
    )
    cells = np.abs(np.floor(np.nan_to_num(keypoints)) - np.floor(true_keypoints)).mean(-1)
    distance = np.linalg.norm(true_poses[:, :3, 3], axis=1)
    above = -(true_poses[:, :3, 2] * true_poses[:, :3, 3]).sum(1)  # the camera's z in model axes
    return {
        "corner": np.where(inside, _distances(keypoints, true_keypoints), np.nan),
        "box": np.where(inside, _distances(box, true_keypoints), np.nan),
        "nmae": np.where(inside, cells / size, np.nan),
        **_pose_errors(poses, true_poses, K),
        "solved": np.array([pose is not None for pose in poses]),
        "corners": inside.sum(1),
        "distance": distance,
        "elevation": np.degrees(np.arcsin(above / distance)),
    }


def _countable(errors):
    """dict figure -> what it is the mean or a percentile of, frames first; NaN where nothing counts."""
    enough = errors["corners"] >= 4
    shares = {
        "poses_found": errors["solved"],
        "flips": errors["rotation"] > 90,
        "add_0.1": errors["add"] <= 0.1,
        "add_0.02": errors["add"] <= 0.02,
        "muzzles_within_3px": errors["muzzle"] <= 3,
    }
    values = {
        "rotation_deg_median": "rotation",
        "rotation_deg_95": "rotation",
        "nmae": "nmae",
        "translation_median": "translation",
        "speed_score": "speed",
        "box_corner_px_median": "box",
        "corner_px_median": "corner",
        "heatmap_mse_sigma10": "heatmap_mse",
    }
    near = {"box_corners_within_5px": errors["box"], "corners_within_5px": errors["corner"]}
    return {
        **{name: np.where(enough, hits, np.nan) for name, hits in shares.items()},
        **{name: errors[error] for name, error in values.items() if error in errors},
        **{
            name: np.where(np.isnan(distance), np.nan, distance <= 5)
            for name, distance in near.items()
        },
    }


def _figure(name, values):
    """The mean of the values, or the percentile that the figure's name ends with; NaN where there is none."""
    values = values[~np.isnan(values)]
    percent = {"median": 50, "95": 95}.get(name.rsplit("_", 1)[-1])
    if not len(values):
        return float("nan")
    return float(values.mean() if percent is None else np.percentile(values, percent))


def summarise(errors):
    """The figures of merit of `Evaluation.errors`: dict of numbers.

    Corner figures count the corners in the frame; rotation, translation and SPEED the frames with a pose;
    poses, flips, ADD and muzzles are shares of the frames with at least four corners in sight, where a
    missing pose is a miss but no flip. NaN where nothing counts.
    """
    counts = {
        "frames": len(errors["solved"]),
        "frames_with_4_corners": int((errors["corners"] >= 4).sum()),
    }
    return counts | {name: _figure(name, values) for name, values in _countable(errors).items()}


def bootstrap(errors, repeats=1000, level=0.95, seed=0):
    """dict figure -> (low, high): where the middle `level` of so many sets of frames, drawn again, have it.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
    """
    count, tails, intervals = len(errors["solved"]), [50 - 50 * level, 50 + 50 * level], {}
    draws = np.random.default_rng(seed).integers(0, count, (repeats, count))
    for name, values in _countable(errors).items():
        figures = np.array([_figure(name, values[chosen]) for chosen in draws])
        if np.isfinite(figures).any():
            intervals[name] = tuple(np.nanpercentile(figures, tails).tolist())
    return intervals


def jitter(poses, truth, fps=30.0):
    """Root mean square of the acceleration error: rotation, degrees/s^2, and translation, model units/s^2.

    poses: N (4, 4) or None; truth: (N, 4, 4). Both NaN where no three frames in a row have poses.
    Source: the acceleration error of Kanazawa et al., Learning 3D Human Dynamics from Video, CVPR 2019.
    """
    errors = np.full((2, len(poses), 3), np.nan)
    for i, (pose, true) in enumerate(zip(poses, truth)):
        if pose is not None:
            turn = Rotation.from_matrix(pose[:3, :3] @ true[:3, :3].T).as_rotvec(degrees=True)
            errors[:, i] = turn, pose[:3, 3] - true[:3, 3]
    squares = (np.diff(errors, 2, axis=1) ** 2).sum(-1) * fps**4
    return tuple(_figure("mean", kind) ** 0.5 for kind in squares)


def reliability(probability, right, count=10):
    """Bins of a probability (N,), a DataFrame. Source: DeGroot and Fienberg, The Statistician 32, 1983."""
    claims = pd.DataFrame({"claimed": probability, "right": right, "frames": 1})
    bins = pd.cut(claims["claimed"], np.linspace(0, 1, count + 1), include_lowest=True)
    return claims.groupby(bins, observed=True).agg(
        {"claimed": "mean", "right": "mean", "frames": "sum"}
    )


def roc(score, true):
    """Shares (T,) of false and of true alarms as a limit on a score (N,) falls, and the area below.

    Source: Fawcett, An Introduction to ROC Analysis, Pattern Recognition Letters 27, 2006.
    """
    limits = np.append(np.inf, np.unique(score)[::-1])
    false, hits = ((score[kind, None] >= limits).mean(0) for kind in (~true, true))
    return false, hits, float(np.trapezoid(hits, false))


def compare_tracks(ways, truth, seen, K, fps=30.0):
    """What several ways of tracking a clip achieve: a DataFrame, one row a way.

    Args:
        ways: dict name -> N (4, 4) or None; truth: (N, 4, 4).
        seen: (N,) bool, the frames that show enough of the ship; K: (3, 3); fps: frames a second.
    Returns:
        columns: poses and muzzles within 3 px of the frames seen; rotation error (median and 95th percentile)
        and median translation error of those solved in every way; flips of all frames; `jitter`.
    """
    common = (
        np.array([[pose is not None for pose in poses] for poses in ways.values()]).all(0) & seen
    )
    rows = []
    for poses in ways.values():
        errors, (turning, moving) = _pose_errors(poses, truth, K), jitter(poses, truth, fps)
        rotation = errors["rotation"]
        rows.append(
            {
                "poses": int(np.isfinite(rotation[seen]).sum()),
                "rotation, deg": _figure("median", rotation[common]),
                "95 %": _figure("95", rotation[common]),
                "translation": _figure("median", errors["translation"][common]),
                "flips": int((rotation > 90).sum()),
                "jitter, deg/s2": turning,
                "jitter, units/s2": moving,
                "muzzles within 3 px": float((errors["muzzle"][seen] <= 3).mean()),
            }
        )
    return pd.DataFrame(rows, index=list(ways))
