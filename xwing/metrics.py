"""How far an estimate is from the truth, and what many such errors add up to.

Every frame of a set has a matrix, so its true pose is known. An *error* is one number for a frame
or for a corner of the bounding box: a rotation in degrees, a distance in pixels. A *figure of
merit* is the mean or a percentile of an error, or its *recall*: the fraction of the frames in which
the error stays within a limit. A frame without a pose is a miss in every recall, and frames that
show fewer than four corners of the box do not count there. The bootstrap says how much a figure
would change with other frames.

Estimates come before the truth in every signature. Poses are (4, 4), model to OpenCV camera; N
counts frames.
"""

import functools
import warnings
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import pandas as pd
from scipy import stats
from scipy.spatial import ConvexHull, QhullError, cKDTree
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing.mesh import load_mesh

# ------------------------------------------------------------ one pose


def translation_error(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Distance between the positions of two poses (4, 4), in model units.

    Source: e_TE of Hodan et al., ECCV Workshops 2016.
    """
    return float(np.linalg.norm(np.asarray(estimate)[:3, 3] - np.asarray(truth)[:3, 3]))


def add_error(estimate: np.ndarray, truth: np.ndarray, points: np.ndarray) -> float:
    """ADD: average distance of model points (P, 3) under two poses (4, 4), in model units.

    Source: Hinterstoisser et al., ACCV 2012.
    """
    difference = np.asarray(estimate)[:3] - np.asarray(truth)[:3]
    return float(np.linalg.norm(xu.to_homogeneous(points) @ difference.T, axis=1).mean())


def adds_error(estimate: np.ndarray, truth: np.ndarray, points: np.ndarray) -> float:
    """ADD-S: average distance from each true model point to the nearest estimated one.

    Args:
        estimate: (4, 4).
        truth: (4, 4).
        points: (P, 3) model units.

    Returns:
        Model units. It needs no symmetries, but it is small for many wrong poses, too.

    Source: Hinterstoisser et al., ACCV 2012; e_ADI of Hodan et al., ECCV Workshops 2016.
    """
    homogeneous = xu.to_homogeneous(points)
    estimated = homogeneous @ np.asarray(estimate)[:3].T
    true = homogeneous @ np.asarray(truth)[:3].T
    distance, _ = cKDTree(estimated).query(true)
    return float(distance.mean())


def mssd_error(
    estimate: np.ndarray, truth: np.ndarray, points: np.ndarray, symmetries: np.ndarray
) -> float:
    """Maximum symmetry-aware surface distance (MSSD).

    The largest distance of a model point under the two poses, for the symmetry of the target under
    which it is smallest.

    Args:
        estimate: (4, 4).
        truth: (4, 4).
        points: (P, 3) model units.
        symmetries: (S, 4, 4), see `symmetry_transforms`.

    Returns:
        Model units.

    Source: Hodan et al., BOP Challenge 2020, ECCV Workshops 2020, section 2.
    """
    differences = np.asarray(estimate) - np.asarray(truth) @ symmetries  # (S, 4, 4)
    moved = xu.to_homogeneous(points) @ differences[:, :3].swapaxes(1, 2)  # (S, P, 3)
    return float(np.linalg.norm(moved, axis=-1).max(1).min())


def mspd_error(
    estimate: np.ndarray,
    truth: np.ndarray,
    points: np.ndarray,
    symmetries: np.ndarray,
    K: np.ndarray,
) -> float:
    """Maximum symmetry-aware projection distance (MSPD).

    As MSSD, but between the projections of the points: what a viewer sees of the error.

    Args:
        estimate: (4, 4).
        truth: (4, 4).
        points: (P, 3) model units.
        symmetries: (S, 4, 4), see `symmetry_transforms`.
        K: (3, 3), pixels.

    Returns:
        Pixels, infinite where a point is behind the camera.

    Source: Hodan et al., BOP Challenge 2020, ECCV Workshops 2020, section 2.
    """
    estimated = xu.project_pose(points, estimate, K)
    largest = []
    for symmetry in symmetries:
        true = xu.project_pose(points, truth @ symmetry, K)
        distance = np.linalg.norm(estimated - true, axis=1)
        largest.append(np.nan_to_num(distance, nan=np.inf).max())
    return float(min(largest))


def speed_score(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Rotation error in radians plus position error relative to the true distance; 0 is perfect.

    Source: Kisantal et al., Satellite Pose Estimation Challenge, IEEE TAES 56(5), 2020, equations 3
        to 5.
    """
    relative = translation_error(estimate, truth) / np.linalg.norm(np.asarray(truth)[:3, 3])
    return float(np.radians(xu.rotation_error(estimate, truth)) + relative)


def muzzle_error(
    estimate: np.ndarray, truth: np.ndarray, K: np.ndarray, target: xu.Target = xu.XWING
) -> float:
    """Largest distance in pixels from a true muzzle to the nearest estimated one.

    It measures what a viewer sees of a wrong pose: bolts that leave beside a cannon. Cannons that
    are swapped are no error.

    Args:
        estimate: (4, 4).
        truth: (4, 4).
        K: (3, 3), pixels.
        target: one with lasers.

    Returns:
        The distance, infinite where a muzzle is behind the camera.

    Source: one-sided Hausdorff distance of Huttenlocher et al., IEEE TPAMI 15(9), 1993.
    """
    muzzles = target.lasers[:, 0]
    estimated = xu.project_pose(muzzles, estimate, K)
    true = xu.project_pose(muzzles, truth, K)

    distance = np.linalg.norm(true[:, None] - estimated[None], axis=-1)
    return float(np.nan_to_num(distance.min(1).max(), nan=np.inf))


def recalled(
    poses: Sequence,
    truth: Sequence,
    degrees: float = 5.0,
    distance: float = 0.10643,
    target: xu.Target = xu.XWING,
) -> np.ndarray:
    """Tell which of N poses are right: within a rotation and a distance of the truth.

    Args:
        poses: N (4, 4) or None; None is not right.
        truth: (N, 4, 4).
        degrees: largest rotation error of a right pose.
        distance: largest translation error of a right pose, diameters of the target.
        target: whose poses these are.

    Returns:
        (N,) bool.

    Source: Shotton et al., CVPR 2013 (5 degrees, 5 cm).
    """
    limit = distance * target.diameter
    right = [
        pose is not None
        and xu.rotation_error(pose, true) <= degrees
        and translation_error(pose, true) <= limit
        for pose, true in zip(poses, truth)
    ]
    return np.array(right, bool)


# ------------------------------------------------------------ the shape that errors are taken over

MAX_POINTS = 10_000  # vertices; of a mesh with more, a sample of this size is used
SYMMETRY_STEP = 0.01  # diameters that the surface may move between two rotations about an axis


@functools.lru_cache(maxsize=8)
def surface_points(target: xu.Target) -> np.ndarray:
    """The points over which ADD, ADD-S, MSSD and MSPD are taken (P, 3), in model units.

    They are the vertices of the target's mesh, each position once: 3,714 for the X-wing. A mesh of
    more than MAX_POINTS vertices is represented by a random sample of them, always the same one. A
    sample hardly changes ADD, MSSD and MSPD, but it makes ADD-S too large, because the nearest of
    fewer points is farther away.
    """
    vertices = _vertices(target)
    if len(vertices) <= MAX_POINTS:
        return vertices
    return np.random.default_rng(0).choice(vertices, MAX_POINTS, replace=False)


@functools.lru_cache(maxsize=8)
def surface_diameter(target: xu.Target) -> float:
    """The greatest distance between two vertices of the target's mesh, in model units.

    BOP divides errors by it. It is smaller than `target.diameter`, the diagonal of the bounding
    box, which all other fractions of a diameter in this project refer to.

    Source: Hodan et al., BOP: Benchmark for 6D Object Pose Estimation, ECCV 2018.
    """
    vertices = _vertices(target)
    try:
        # The two vertices farthest apart are corners of the convex hull.
        vertices = vertices[ConvexHull(vertices).vertices]
    except QhullError:
        pass  # the mesh is flat and has no hull in space
    return float(max(np.linalg.norm(vertices - vertex, axis=1).max() for vertex in vertices))


def _vertices(target):
    """(V, 3) the vertices that triangles of the target's mesh use, each position once."""
    triangles = load_mesh(target.mesh).triangles
    return np.unique(triangles.reshape(-1, 3), axis=0)


def symmetry_transforms(target: xu.Target) -> np.ndarray:
    """All motions (S, 4, 4) that count as symmetries of a target, the identity among them.

    Each discrete symmetry is followed by each rotation about an axis of revolution. The rotations
    are so close that the surface moves by no more than SYMMETRY_STEP diameters between two of them.

    Source: Hodan et al., BOP Challenge 2020, ECCV Workshops 2020, section 2.
    """
    if len(target.axes) == 0:
        return target.symmetries

    steps = int(np.ceil(np.pi / SYMMETRY_STEP))
    angles = np.arange(steps) * 2 * np.pi / steps
    transforms = []
    for point, direction in target.axes:
        turns = Rotation.from_rotvec(angles[:, None] * direction).as_matrix()
        rotations = xu.turn_about(turns, point)
        transforms += [rotations @ symmetry for symmetry in target.symmetries]
    return np.concatenate(transforms)


# ------------------------------------------------------------ corners and heatmaps

MAX_CORNER_ERROR = 60  # pixels that count at most, so that no single corner decides a permutation


def corner_report(
    keypoints: np.ndarray, truth: np.ndarray, size: int = xu.FRAME_SIZE, scale: float = 1.0
) -> dict:
    """Measure how well corners are found, and how well they are told from each other.

    Args:
        keypoints: (N, 8, 2) pixels; a corner that is NaN counts as one frame's diagonal off, which
            no error exceeds.
        truth: (N, 8, 2) pixels.
        size: width and height of the frames, pixels.
        scale: factor on the distances.

    Returns:
        dict of figures that count the corners in the frame only:
            corner_px: median distance.
            best_permutation_px: the same under each frame's best permutation of its corners.
            within_2px, within_5px: recalls.
            permutations: dict name -> number of frames in which this permutation fits best; a frame
                in which no corner is found counts for none.

    Source: the recalls as PCK of Andriluka et al., 2D Human Pose Estimation, CVPR 2014, with limits
        in pixels; the split as the inversions of Ronchi and Perona, Benchmarking and Error
        Diagnosis, ICCV 2017.
    """
    inside = xu.in_frame(truth, size, size)
    permutations = xu.CORNER_PERMUTATIONS
    permuted = [_distances(keypoints[:, order], truth) for order in permutations.values()]
    # (permutations, N, 8); the first is the identity
    permuted = np.minimum(np.stack(permuted), np.sqrt(2) * size) * scale

    limited = np.minimum(permuted, MAX_CORNER_ERROR)
    best = (limited * inside).sum(-1).argmin(0)
    judged = inside.any(1) & np.isfinite(keypoints).all(-1).any(1)
    counts = np.bincount(best[judged], minlength=len(permutations))

    corner = permuted[0][inside]
    best_permutation = permuted[best, np.arange(len(best))][inside]
    return {
        "corner_px": float(np.median(corner)),
        "best_permutation_px": float(np.median(best_permutation)),
        "within_2px": float((corner <= 2).mean()),
        "within_5px": float((corner <= 5).mean()),
        "permutations": dict(zip(permutations, counts.tolist())),
    }


def _distances(keypoints, truth):
    """Distances (..., K) in pixels; very large where a keypoint is NaN."""
    return np.linalg.norm(np.nan_to_num(keypoints, nan=-1e4) - truth, axis=-1)


def heatmap_errors(
    heatmaps: np.ndarray, truth: np.ndarray, settings: Mapping, sigma: float = 10.0
) -> np.ndarray:
    """Mean squared error of each corner's heatmap, measured at another sigma than the network's.

    A Gaussian blur widens the maps to that sigma, so that networks of different sigma can be
    compared. The error of an empty map is pi sigma^2 / size^2: 0.0048 for sigma 10 in frames of 256
    px.

    Args:
        heatmaps: (N, H/stride, W/stride, 8 or more) of a network with these settings.
        truth: (N, 8, 2) pixels, or more keypoints.
        settings: the network's sigma (pixels), stride and size.
        sigma: pixels, not below the network's own.

    Returns:
        (N, 8), NaN for corners outside the frame.

    Raises:
        ValueError: a sigma below the network's own.

    Source: the loss of Tompson et al., Joint Training of a Convolutional Network, NIPS 2014, as a
        measure.
    """
    own = settings["sigma"]
    stride = settings["stride"]
    size = settings["size"]
    if not sigma >= own:
        raise ValueError(f"sigma: expected at least the network's own {own} pixels, got {sigma}")

    blur = np.sqrt(sigma**2 - own**2) + 1e-3  # OpenCV wants a positive sigma
    gain = (sigma / own) ** 2  # undoes the factor by which the blur lowers a peak

    errors = np.full((len(heatmaps), 8), np.nan)
    for i, maps in enumerate(heatmaps):
        wide = cv2.resize(maps[..., :8], None, fx=stride, fy=stride, interpolation=cv2.INTER_CUBIC)
        wide = cv2.GaussianBlur(wide, (0, 0), blur, borderType=cv2.BORDER_CONSTANT)
        squares = (wide * gain - xu.gaussian_heatmaps(truth[i], size, sigma)) ** 2
        errors[i] = np.where(xu.in_frame(truth[i], size, size), squares.mean((0, 1)), np.nan)
    return errors


# ------------------------------------------------------------ a set of frames

BOP_WIDTH = 640  # pixels: BOP's limits on MSPD are for frames of this width


def frame_errors(
    keypoints: np.ndarray,
    poses: Sequence,
    true_keypoints: np.ndarray,
    true_poses: np.ndarray,
    K: np.ndarray,
    size: int = xu.FRAME_SIZE,
    target: xu.Target = xu.XWING,
) -> dict:
    """Every error of every frame, for `summarise` and `bootstrap`.

    Args:
        keypoints: (N, 8, 2) pixels, the corners that were found.
        poses: N (4, 4) or None.
        true_keypoints: (N, 8, 2) pixels.
        true_poses: (N, 4, 4).
        K: (3, 3), pixels.
        size: width and height of the frames, pixels.
        target: that the frames show.

    Returns:
        dict of arrays.

        For each corner (N, 8), NaN outside the frame:
            corner: distance of the keypoint, pixels.
            box: distance of the projected corner of the estimated box, pixels; of the keypoint in
                a frame without a pose.
            nmae: mean of |dx| and |dy| between whole pixels, as a fraction of the frame's width.

        For each frame (N,), NaN without a pose:
            rotation: degrees.
            translation: model units.
            add, adds, mssd: fractions of `surface_diameter`.
            mspd: pixels of a frame BOP_WIDTH wide.
            speed: see `speed_score`.
            muzzle: pixels; only for a target with lasers.

        For each frame (N,):
            solved: bool, whether there is a pose.
            corners: number of true corners in the frame.
            distance: true distance from the camera to the target, model units.
            elevation: true angle of the camera above the target, degrees; 90 in its direction `up`.
    """
    keypoints = np.asarray(keypoints)
    true_keypoints = np.asarray(true_keypoints)
    true_poses = np.asarray(true_poses)

    inside = xu.in_frame(true_keypoints, size, size)
    box = [
        corners if pose is None else xu.project_pose(target.box, pose, K)
        for corners, pose in zip(keypoints, poses)
    ]
    whole_pixels = np.abs(np.floor(np.nan_to_num(keypoints)) - np.floor(true_keypoints))

    distance = np.linalg.norm(true_poses[:, :3, 3], axis=1)
    up = true_poses[:, :3, :3] @ (target.up / np.linalg.norm(target.up))  # in camera axes
    above = -(up * true_poses[:, :3, 3]).sum(1)  # by how much the camera is above the target

    return {
        "corner": np.where(inside, _distances(keypoints, true_keypoints), np.nan),
        "box": np.where(inside, _distances(np.array(box), true_keypoints), np.nan),
        "nmae": np.where(inside, whole_pixels.mean(-1) / size, np.nan),
        **_pose_errors(poses, true_poses, K, target),
        **_surface_errors(poses, true_poses, K, size, target),
        "solved": np.array([pose is not None for pose in poses]),
        "corners": inside.sum(1),
        "distance": distance,
        "elevation": np.degrees(np.arcsin(above / distance)),
    }


def _pose_errors(poses, truth, K, target):
    """dict error -> (N,), NaN without a pose; units as in `frame_errors`."""
    measures = {
        "rotation": xu.rotation_error,
        "translation": translation_error,
        "speed": speed_score,
    }
    if target.lasers is not None:
        measures["muzzle"] = lambda pose, true: muzzle_error(pose, true, K, target)
    return _measured(measures, poses, truth)


def _surface_errors(poses, truth, K, size, target):
    """The errors that are taken over `surface_points`, in the form of `_pose_errors`."""
    points = surface_points(target)
    diameter = surface_diameter(target)
    symmetries = symmetry_transforms(target)
    K = xu.crop_camera(K, scale=BOP_WIDTH / size)
    measures = {
        "add": lambda pose, true: add_error(pose, true, points) / diameter,
        "adds": lambda pose, true: adds_error(pose, true, points) / diameter,
        "mssd": lambda pose, true: mssd_error(pose, true, points, symmetries) / diameter,
        "mspd": lambda pose, true: mspd_error(pose, true, points, symmetries, K),
    }
    return _measured(measures, poses, truth)


def _measured(measures, poses, truth):
    """Apply functions of an estimated and a true pose, dict name -> function, to N frames.

    Returns a dict name -> (N,), NaN without a pose.
    """
    errors = {}
    for name, measure in measures.items():
        values = [
            np.nan if pose is None else measure(pose, true) for pose, true in zip(poses, truth)
        ]
        errors[name] = np.array(values)
    return errors


# ------------------------------------------------------------ figures of merit

FLIP = 90  # degrees: a larger rotation error is a flip
MIN_CORNERS = 4  # frames that show fewer corners of the box do not count in recalls

# figure -> the error and the largest value of it that counts as a hit
_RECALLS = {
    "add_0.1": ("add", 0.1),
    "add_0.02": ("add", 0.02),
    "adds_0.1": ("adds", 0.1),
    "muzzles_within_3px": ("muzzle", 3),
    "box_corners_within_5px": ("box", 5),
    "corners_within_5px": ("corner", 5),
}
# figure -> the error and the limits over which BOP averages the recall
_AVERAGE_RECALLS = {
    "average_recall_mssd": ("mssd", np.linspace(0.05, 0.5, 10)),
    "average_recall_mspd": ("mspd", np.linspace(5, 50, 10)),
}
# figure -> the error of which it is the mean, or the percentile if it is in _PERCENTILES too
_AVERAGES = {
    "rotation_deg_median": "rotation",
    "rotation_deg_95": "rotation",
    "nmae": "nmae",
    "translation_median": "translation",
    "speed_score": "speed",
    "box_corner_px_median": "box",
    "corner_px_median": "corner",
    "heatmap_mse_sigma10": "heatmap_mse",
}
_PERCENTILES = {
    "rotation_deg_median": 50,
    "rotation_deg_95": 95,
    "translation_median": 50,
    "box_corner_px_median": 50,
    "corner_px_median": 50,
}


def summarise(errors: Mapping) -> dict:
    """Compute the figures of merit of a set from the errors of its frames.

    Figures of corners count the corners in the frame. Rotation, translation and SPEED count the
    frames with a pose. All others count the frames with at least MIN_CORNERS corners in sight:
    poses found, flips, the recalls of ADD, ADD-S and muzzles, and BOP's average recalls of MSSD and
    MSPD. A missing pose is a miss in every recall, but no flip.

    Args:
        errors: from `frame_errors`, or from `Evaluation.errors` of `xwing.evaluation`.

    Returns:
        dict of numbers, NaN where nothing counts.
    """
    counts = {
        "frames": len(errors["solved"]),
        "frames_with_4_corners": int((errors["corners"] >= MIN_CORNERS).sum()),
    }
    figures = {name: _figure(name, values) for name, values in _figure_values(errors).items()}
    return counts | figures


def bootstrap(
    errors: Mapping, repeats: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of the figures of merit: frames are drawn with replacement.

    Args:
        errors: as for `summarise`.
        repeats: number of sets of frames that are drawn.
        level: fraction of these sets whose figures the interval holds.
        seed: of the draws, which are the same for every figure.

    Returns:
        dict figure -> (low, high), without the figures that are NaN in every drawn set. It is empty
        for fewer than two frames.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile
        interval).
    """
    if len(errors["solved"]) < 2:
        return {}  # one frame says nothing about others

    tails = [50 - 50 * level, 50 + 50 * level]
    intervals = {}
    for name, values in _figure_values(errors).items():
        figures = _resampled_figures(name, values, repeats, seed)
        if len(figures):
            intervals[name] = tuple(np.percentile(figures, tails).tolist())
    return intervals


def _resampled_figures(name, values, repeats, seed):
    """A figure of drawn sets of frames (R,), without the sets where it is NaN.

    `scipy.stats.bootstrap` would give no interval because of those, so that only its draws are
    used. It draws the numbers of the frames, which keeps the corners of a frame together.
    """
    frames = np.arange(len(values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # of NaN in a drawn set
        resampled = stats.bootstrap(
            (frames,),
            lambda drawn: _figure(name, values[drawn]),
            n_resamples=repeats,
            method="percentile",
            vectorized=False,
            rng=np.random.default_rng(seed),
        )
    figures = resampled.bootstrap_distribution
    return figures[~np.isnan(figures)]


def _figure_values(errors):
    """dict figure -> its values (N,) or (N, 8), NaN where a frame or a corner does not count."""
    enough = errors["corners"] >= MIN_CORNERS
    values = {
        "poses_found": np.where(enough, errors["solved"], np.nan),
        "flips": np.where(enough, errors["rotation"] > FLIP, np.nan),
    }
    for figure, (error, limit) in _RECALLS.items():
        if error in errors:
            of_corners = errors[error].ndim > 1
            counts = ~np.isnan(errors[error]) if of_corners else enough
            values[figure] = np.where(counts, errors[error] <= limit, np.nan)
    for figure, (error, limits) in _AVERAGE_RECALLS.items():
        hits = (errors[error][:, None] < limits).mean(1)
        values[figure] = np.where(enough, hits, np.nan)
    for figure, error in _AVERAGES.items():
        if error in errors:
            values[figure] = errors[error]
    return values


def _figure(name, values):
    """A figure of merit: the mean or a percentile of its values; NaN where none of them counts."""
    if name in _PERCENTILES:
        return _percentile(values, _PERCENTILES[name])
    return _mean(values)


def _mean(values):
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else np.nan


def _percentile(values, percent):
    values = values[~np.isnan(values)]
    return float(np.percentile(values, percent)) if len(values) else np.nan


def recall_interval(
    hits: float | np.ndarray | pd.DataFrame,
    count: float | np.ndarray | pd.DataFrame,
    level: float = 0.95,
) -> tuple:
    """Confidence interval of a recall that was measured on independent frames.

    Args:
        hits: number of frames in which the error stays within the limit.
        count: number of all frames.
        level: probability that the interval holds the recall.

    Returns:
        low and high, of the same kind as `hits`. With few hits or few misses they may lie outside 0
        to 1.

    Source: Agresti and Coull, Approximate Is Better than "Exact", The American Statistician 52(2),
        1998.
    """
    squared = stats.norm.ppf((1 + level) / 2) ** 2
    centre = (hits + squared / 2) / (count + squared)
    spread = np.sqrt(squared * centre * (1 - centre) / (count + squared))
    return centre - spread, centre + spread


def rank_frames(errors: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """Order frames from the best to the worst, by the median error of the solved box's corners.

    Args:
        errors: from `frame_errors`.

    Returns:
        numbers of the M frames that show at least MIN_CORNERS corners (M,), and their errors (M,)
        in pixels, in rising order.
    """
    counted = np.flatnonzero(errors["corners"] >= MIN_CORNERS)
    pixels = np.nanmedian(errors["box"][counted], axis=1)
    order = np.argsort(pixels)
    return counted[order], pixels[order]


def recall_by_group(
    errors: Mapping, key: str, edges: Sequence[float], limit: float = 0.1
) -> pd.DataFrame:
    """Split the frames of a set into groups, and count the right poses in each.

    A pose is right if its ADD is within a limit. Only frames that show at least MIN_CORNERS corners
    count.

    Args:
        errors: from `frame_errors`.
        key: by what the frames are split: "distance", "corners" or "elevation".
        edges: (G + 1,) of the groups. A group holds its upper edge, but not its lower one.
        limit: largest ADD of a right pose, as a fraction of `surface_diameter`.

    Returns:
        G rows, in the order of the edges, with the columns "frames" (their number), "poses" (the
        fraction with a pose), "right" (the recall), "low" and "high" (its 95 % interval) and
        "rotation_deg" (the median). A group without a frame has NaN.
    """
    counted = errors["corners"] >= MIN_CORNERS
    frames = pd.DataFrame(
        {
            "solved": errors["solved"][counted],
            "right": errors["add"][counted] <= limit,
            "rotation": errors["rotation"][counted],
        }
    )
    groups = frames.groupby(pd.cut(errors[key][counted], edges), observed=False)
    count = groups.size()
    low, high = recall_interval(groups["right"].sum(), count)
    table = {
        "frames": count,
        "poses": groups["solved"].mean(),
        "right": groups["right"].mean(),
        "low": low.where(count > 0),
        "high": high.where(count > 0),
        "rotation_deg": groups["rotation"].median(),
    }
    return pd.DataFrame(table)


# ------------------------------------------------------------ claims: probabilities and covariances


def reliability(probability: np.ndarray, right: np.ndarray, count: int = 10) -> pd.DataFrame:
    """Compare claimed probabilities with how often they come true.

    Args:
        probability: (N,) in [0, 1], of being right.
        right: (N,) bool.
        count: number of bins of equal width between 0 and 1.

    Returns:
        One row for each bin that is not empty: the means of the claimed probability and of being
        right, and the number of frames.

    Source: DeGroot and Fienberg, The Statistician 32, 1983.
    """
    claims = pd.DataFrame({"claimed": probability, "right": right, "frames": 1})
    bins = pd.cut(claims["claimed"], np.linspace(0, 1, count + 1), include_lowest=True)
    return claims.groupby(bins, observed=True).agg(
        {"claimed": "mean", "right": "mean", "frames": "sum"}
    )


def roc(score: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Receiver operating characteristic of a score that should be high where something is true.

    Args:
        score: (N,).
        true: (N,) bool.

    Returns:
        False positive rate (T,) and true positive rate (T,) as the threshold falls, and the area
        below.

    Source: Fawcett, An Introduction to ROC Analysis, Pattern Recognition Letters 27, 2006.
    """
    thresholds = np.append(np.inf, np.unique(score)[::-1])
    false_positives = (score[~true, None] >= thresholds).mean(0)
    true_positives = (score[true, None] >= thresholds).mean(0)
    area = float(np.trapezoid(true_positives, false_positives))
    return false_positives, true_positives, area


def risk_coverage(wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Risk and coverage as more frames are kept, the most confident first.

    Args:
        wrong: (N,) bool, in the order of falling confidence.

    Returns:
        risk (N,), the fraction of wrong poses among the first 1 to N frames; coverage (N,), the
        fraction of the frames that these are.

    Source: El-Yaniv and Wiener, Journal of Machine Learning Research 11, 2010.
    """
    kept = np.arange(1, len(wrong) + 1)
    return np.cumsum(wrong) / kept, kept / len(wrong)


RAYLEIGH_MEDIAN = np.sqrt(2 * np.log(2))  # of distances, where x and y have a deviation of 1
BAD_TURN = 10.0  # degrees: a pose of a single frame with a larger rotation error is wrong


def keypoint_calibration(
    sigma: np.ndarray, distance: np.ndarray, edges: Sequence[float], least: int = 20
) -> pd.DataFrame:
    """Compare the standard deviations that keypoints claim with those of their errors.

    Args:
        sigma: (N,) claimed standard deviation of x and of y, pixels.
        distance: (N,) of the keypoint from the true one, pixels.
        edges: of groups of keypoints with similar claims, pixels.
        least: groups with no more keypoints than this are left out.

    Returns:
        One row a group: the median claim; "true", the standard deviation that follows from the
        median distance (see RAYLEIGH_MEDIAN), which outliers hardly change; and the number of
        keypoints.
    """
    points = pd.DataFrame({"claimed": sigma, "true": distance / RAYLEIGH_MEDIAN, "keypoints": 1})
    groups = points.groupby(pd.cut(points["claimed"], edges), observed=True)
    table = groups.agg({"claimed": "median", "true": "median", "keypoints": "sum"})
    return table[table["keypoints"] > least]


def frame_claims(
    estimates: Sequence, true_poses: np.ndarray, corners: np.ndarray, degrees: float = BAD_TURN
) -> pd.DataFrame:
    """What the poses of single frames claim, beside the truth, the most confident frame first.

    Accepted poses come before rejected ones. Within both, the frames are in the order of the
    rotation error that they claim.

    Args:
        estimates: N `xu.PoseEstimate`.
        true_poses: (N, 4, 4).
        corners: (N,) number of true corners in the frame; frames with fewer than MIN_CORNERS do not
            count.
        degrees: a pose with a larger rotation error is wrong, and so is a missing pose.

    Returns:
        One row a frame: "claimed" and "true" rotation error in degrees; "accepted" and "wrong";
        "risk" and "coverage" if this frame and all before it are kept, see `risk_coverage`.
    """
    true = [
        np.nan if estimate.pose is None else xu.rotation_error(estimate.pose, pose)
        for estimate, pose in zip(estimates, true_poses)
    ]
    rows = pd.DataFrame({"true": true})
    rows["claimed"] = [estimate.rotation_sigma for estimate in estimates]
    rows["accepted"] = [bool(estimate.accepted) for estimate in estimates]
    rows["wrong"] = ~(rows["true"] <= degrees)

    rows = rows[np.asarray(corners) >= MIN_CORNERS]
    rows = rows.sort_values(["accepted", "claimed"], ascending=[False, True])
    rows["risk"], rows["coverage"] = risk_coverage(rows["wrong"])
    return rows


def track_claims(
    track: Sequence,
    truth: Sequence,
    K: np.ndarray,
    size: int = xu.FRAME_SIZE,
    target: xu.Target = xu.XWING,
) -> pd.DataFrame:
    """What the frames of a track claim, beside the truth.

    Args:
        track: N `TrackedPose`.
        truth: (N, 4, 4); frames that show fewer than MIN_CORNERS corners do not count.
        K: (3, 3), pixels.
        size: width and height of the frames, pixels.
        target: that the frames show.

    Returns:
        One row a frame: its "status"; "right", see `recalled`; "probability"; and "square", the
        `normalised_squared_error`, NaN without a pose.
    """
    right = recalled([tracked.pose for tracked in track], truth, target=target)
    rows = []
    for tracked, true, is_right in zip(track, truth, right, strict=True):
        corners = xu.project_pose(target.box, true, K)
        if xu.in_frame(corners, size, size).sum() < MIN_CORNERS:
            continue
        square = np.nan
        if tracked.pose is not None:
            square = normalised_squared_error(tracked.pose, true, tracked.covariance)
        rows.append([tracked.status, is_right, tracked.probability, square])
    return pd.DataFrame(rows, columns=["status", "right", "probability", "square"])


def normalised_squared_error(
    estimate: np.ndarray, truth: np.ndarray, covariance: np.ndarray
) -> float:
    """Squared error of a pose (4, 4), weighted by the inverse of its covariance (6, 6).

    If the covariance is right, the result follows a chi-square distribution with six degrees of
    freedom, whose median is 5.35.

    Source: the normalised estimation error squared (NEES) of Bar-Shalom, Li and Kirubarajan,
        Estimation with Applications to Tracking and Navigation, 2001, section 5.4.
    """
    step = xu.pose_step(estimate, truth)
    return float(step @ np.linalg.solve(covariance, step))


def quantile_coverage(squares: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """Fraction of normalised squared errors that lie within quantiles of their distribution.

    Args:
        squares: (N,), from `normalised_squared_error`.
        levels: (L,) of the quantiles, in [0, 1].

    Returns:
        (L,). Right covariances give the levels themselves; smaller fractions mean that the errors
        are larger than the covariances claim.
    """
    limits = stats.chi2.ppf(levels, 6)
    return (np.asarray(squares)[:, None] <= limits).mean(0)


# ------------------------------------------------------------ tracks


def jitter(poses: Sequence, truth: np.ndarray, fps: float = 30.0) -> tuple[float, float]:
    """Root mean square of the acceleration error, of rotation and of translation.

    Args:
        poses: N (4, 4) or None.
        truth: (N, 4, 4).
        fps: frames a second.

    Returns:
        Rotation (degrees/s^2) and translation (model units/s^2), NaN where no three frames in a row
        have poses.

    Source: the acceleration error of Kanazawa et al., Learning 3D Human Dynamics from Video, CVPR
        2019.
    """
    rotation = np.full((len(poses), 3), np.nan)
    translation = np.full((len(poses), 3), np.nan)
    for i, (pose, true) in enumerate(zip(poses, truth)):
        if pose is not None:
            turn = Rotation.from_matrix(pose[:3, :3] @ true[:3, :3].T)
            rotation[i] = turn.as_rotvec(degrees=True)
            translation[i] = pose[:3, 3] - true[:3, 3]
    return _acceleration(rotation, fps), _acceleration(translation, fps)


def _acceleration(errors, fps):
    """Root mean square of the second derivative of errors (N, 3), in their units / s^2."""
    squares = (np.diff(errors, 2, axis=0) ** 2).sum(-1) * fps**4
    return _mean(squares) ** 0.5


def compare_tracks(
    ways: Mapping[str, Sequence],
    truth: np.ndarray,
    seen: np.ndarray,
    K: np.ndarray,
    fps: float = 30.0,
    target: xu.Target = xu.XWING,
) -> pd.DataFrame:
    """Compare several ways of tracking a clip, one row for each.

    Args:
        ways: dict name -> the N poses (4, 4) or None that it found.
        truth: (N, 4, 4).
        seen: (N,) bool, the frames that show enough of the target.
        K: (3, 3), pixels.
        fps: frames a second.
        target: that the clip shows.

    Returns:
        Columns, of the frames seen: the number of poses, and the fraction with muzzles within 3 px.
        Of the frames seen that have a pose in every way: median and 95th percentile of the rotation
        error, median translation error. Of all frames: the number of flips, and `jitter`.
    """
    solved = np.array([[pose is not None for pose in poses] for poses in ways.values()])
    common = solved.all(0) & seen

    rows = []
    for poses in ways.values():
        errors = _pose_errors(poses, truth, K, target)
        rotation = errors["rotation"]
        rotation_jitter, translation_jitter = jitter(poses, truth, fps)
        row = {
            "poses": int(np.isfinite(rotation[seen]).sum()),
            "rotation, deg": _percentile(rotation[common], 50),
            "95 %": _percentile(rotation[common], 95),
            "translation": _percentile(errors["translation"][common], 50),
            "flips": int((rotation > FLIP).sum()),
            "jitter, deg/s2": rotation_jitter,
            "jitter, units/s2": translation_jitter,
        }
        if "muzzle" in errors:
            row["muzzles within 3 px"] = float((errors["muzzle"][seen] <= 3).mean())
        rows.append(row)
    return pd.DataFrame(rows, index=list(ways))
