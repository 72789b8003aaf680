"""How good is the tracker: errors against known poses, figures of merit, the panel of a folder.

Every frame of a set has a matrix, so its true pose is known. What was found is compared with it by the
measures of the field, one number a frame or a corner; a figure of merit is the mean or a percentile of these
numbers. A frame that could not be solved is a miss wherever a share is given, and frames that show fewer than
four corners of the box count in no share. The bootstrap says how far a figure moves with other frames.

    python -m xwing.evaluation data/test --json panel.json

Estimates come before the truth in every signature. Poses are (4, 4), model to OpenCV camera; N counts frames.
"""

import argparse
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation
from tqdm.auto import tqdm

import xwing_utils as xu
from xwing import alignment

# figure -> (title in tables, format); the README shows the first six
_PANEL = {
    "poses_found": ("frames with a pose", "{:.1%}"),
    "flips": ("flips (rotation error over 90°)", "{:.1%}"),
    "rotation_deg_median": ("rotation error, median", "{:.2f}°"),
    "rotation_deg_95": ("rotation error, 95th percentile", "{:.1f}°"),
    "add_0.1": ("ADD within 0.1 diameters", "{:.1%}"),
    "box_corner_px_median": ("box corner error, median", "{:.2f} px"),
    "frames": ("frames", "{:d}"),
    "frames_with_4_corners": ("... with at least four corners in sight", "{:d}"),
    "add_0.02": ("ADD within 0.02 diameters", "{:.1%}"),
    "translation_median": ("translation error, median (model units)", "{:.4f}"),
    "speed_score": ("SPEED score", "{:.4f}"),
    "muzzles_within_3px": ("muzzles within 3 px", "{:.1%}"),
    "box_corners_within_5px": ("corners of the solved box within 5 px", "{:.1%}"),
    "corner_px_median": ("corners in the heatmaps, median error", "{:.2f} px"),
    "corners_within_5px": ("corners in the heatmaps within 5 px", "{:.1%}"),
    "nmae": ("NMAE of the corners in the heatmaps", "{:.2%}"),
    "heatmap_mse_sigma10": ("heatmap MSE at sigma 10 px", "{:.5f}"),
    "seconds_per_frame": ("seconds a frame", "{:.3f}"),
}
HEADLINES = tuple(_PANEL)[:6]
README_SETS = ("test", "shifted", "looks", "clip, tracked")
JSON_KEYS = (
    "frames",
    "poses_found",
    "flips",
    "rotation_deg_median",
    "rotation_deg_95",
    "translation_median",
    "add_0.1",
    "add_0.02",
    "box_corner_px_median",
    "speed_score",
    "seconds_per_frame",
)


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


def _cell(key, figure, interval):
    """A figure as text, its interval in brackets behind it."""
    if figure is None or np.isnan(figure):
        return "–"
    text, *bounds = (_PANEL[key][1].format(value) for value in (figure, *(interval or ())))
    low_high = "–".join(bound.split()[0].rstrip("%°") for bound in bounds)
    return f"{text} ({low_high})" if low_high else text


def results_table(figures, intervals=None, keys=tuple(_PANEL)):
    """The panel as a DataFrame of text: one row a figure (of `keys`, what was measured), one column a set.

    figures: dict set -> `summarise`; intervals: dict set -> `bootstrap`, in brackets where given.
    """
    keys = [key for key in keys if any(key in measured for measured in figures.values())]
    columns = {
        name: [
            _cell(key, measured.get(key), (intervals or {}).get(name, {}).get(key)) for key in keys
        ]
        for name, measured in figures.items()
    }
    return pd.DataFrame(columns, index=[_PANEL[key][0] for key in keys])


def readme_rows(figures, intervals=None):
    """The README's table as Markdown: the six HEADLINES of the README_SETS."""
    table = results_table({name: figures[name] for name in README_SETS}, intervals, HEADLINES)
    lines = [("figure", *README_SETS), ("---",) * (1 + len(README_SETS)), *table.itertuples()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _for_json(figures):
    """The figures that others script against, null where there is none."""
    present = {key: figures[key] for key in JSON_KEYS if key in figures}
    return {key: None if value != value else value for key, value in present.items()}


def write_results(folder, figures, intervals, readme=None):
    """Write `weights/xwing_eval.json` under the folder and, if given, the rows between the README's markers.

    Raises ValueError, and writes nothing, for a README without the markers.
    """
    chosen = {
        "figures": {name: _for_json(measured) for name, measured in figures.items()},
        "intervals_95": {name: _for_json(measured) for name, measured in intervals.items()},
    }
    files = {Path(folder) / "weights" / "xwing_eval.json": json.dumps(chosen, indent=1) + "\n"}
    if readme is not None:
        rows = f"<!-- results -->\n{readme_rows(figures, intervals)}\n<!-- /results -->"
        pattern = re.compile("<!-- results -->.*<!-- /results -->", re.DOTALL)
        files[readme], count = pattern.subn(lambda _: rows, Path(readme).read_text())
        if count != 1:
            raise ValueError(
                f"{readme}: expected the markers <!-- results --> and <!-- /results --> once"
            )
    xu.write_files(files)


def load_flight(path):
    """The video of a flight, its N true poses (4, 4), and K (3, 3), from a file like data/wild.json."""
    info, (view, projection) = xu.read_json(path), xu.load_camera(path)
    K, matrices = (
        xu.camera_matrix(projection, info["width"], info["height"]),
        np.array(info["matrices"]),
    )
    return Path(path).with_name(info["video"]), [xu.pose_in_camera(view, m) for m in matrices], K


@dataclass(frozen=True)
class Evaluation:
    """What was found in N frames, each taken on its own, and what is true."""

    paths: list
    K: np.ndarray  # (3, 3)
    size: int  # width and height of the frames, pixels
    keypoints: np.ndarray  # (N, C, 2) pixels, all that the network finds
    confidence: np.ndarray  # (N, C)
    sigma: np.ndarray  # (N, C) pixels
    from_points: np.ndarray  # N PoseEstimate, from the keypoints alone
    estimates: np.ndarray  # N PoseEstimate, verified on the pixels; without an aligner the same
    heatmap_mse: np.ndarray  # (N, 8), see `heatmap_errors`
    true_keypoints: np.ndarray  # (N, C, 2) pixels
    true_poses: np.ndarray  # (N, 4, 4)
    seconds_per_frame: float  # reading, network, its error, pose, pixels

    @property
    def poses(self):
        """The accepted poses: N (4, 4) or None."""
        return [estimate.pose if estimate.accepted else None for estimate in self.estimates]

    def errors(self, poses=None):
        """`frame_errors` of the accepted poses, or of other poses of the same frames, and "heatmap_mse"."""
        poses, corners = self.poses if poses is None else poses, self.true_keypoints[:, :8]
        errors = frame_errors(
            self.keypoints[:, :8], poses, corners, self.true_poses, self.K, self.size
        )
        return errors | {"heatmap_mse": self.heatmap_mse}


def evaluate_folder(folder, model, aligner=None, limit=None, step=1, batch_size=16, progress=True):
    """Find the ship in every `step`-th frame of a folder, in at most `limit` of them: an `Evaluation`.

    Args:
        folder: in the data format, its frames of the network's size, each held while it is needed only.
        model: from `load_model`.
        aligner: `Aligner`, or None for poses from the keypoints alone.
    Raises:
        FileNotFoundError, ValueError: what `load_dataset`, `load_camera` and `read_image` raise.
    """
    paths, matrices = (part[::step][:limit] for part in xu.load_dataset(folder))
    view, projection = xu.load_camera(folder)
    size, count = model.settings["size"], model.settings["keypoints"]
    K, found = xu.camera_matrix(projection, size, size), []
    truth = xu.keypoints_of(matrices, view, projection, size, size, xu.KEYPOINTS[:count])
    xu.predict_heatmaps(
        model, np.zeros((1, size, size, 3), np.uint8), batch_size
    )  # the first call compiles
    started = time.perf_counter()
    for start in tqdm(range(0, len(paths), batch_size), unit="batch", disable=not progress):
        images = np.stack(
            [xu.read_image(path, (size, size)) for path in paths[start : start + batch_size]]
        )
        maps = xu.predict_heatmaps(model, images, batch_size, count)
        seen = xu.read_keypoints(maps, model.settings)
        estimates = [xu.estimate_pose(k, K, c, s) for k, c, s in zip(*seen)]
        verified = (
            alignment.verify_frames(aligner, images, estimates, K, model) if aligner else estimates
        )
        found.append(
            (*seen, estimates, verified, heatmap_errors(maps, truth[start:, :8], model.settings))
        )
    found = [np.concatenate(part) for part in zip(*found)]
    seconds = (time.perf_counter() - started) / len(paths)
    poses = np.array([xu.pose_in_camera(view, matrix) for matrix in matrices])
    return Evaluation(paths, K, size, *found, truth, poses, seconds)


def main(arguments=None):
    """The command line; ends with one line on the error stream where something is wrong."""
    parser = argparse.ArgumentParser(
        "python -m xwing.evaluation", description="Measure the tracker."
    )
    weights = xu.ROOT / "weights" / "xwing.weights.h5"
    parser.add_argument("folder", type=Path, help="camera_info.json, 0.jpg, 0_mat.json, ...")
    parser.add_argument(
        "--weights", type=Path, default=weights, metavar="FILE", help="of another network"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N frames")
    parser.add_argument("--no-align", action="store_true", help="poses from the keypoints alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    options = parser.parse_args(arguments)
    try:
        print(results_table({options.folder.resolve().name: _measure(options)}).to_string())
    except (OSError, ValueError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


def _measure(options):
    """The figures that the command line asks for, dict of numbers; goes to its JSON file if it names one."""
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit: expected a positive number of frames, got {options.limit}")
    if options.json and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise FileNotFoundError(
            f"--json: expected a file in a folder that exists, got {options.json}"
        )
    xu.load_dataset(options.folder)  # fails at once, before the network is loaded
    obj = xu.ROOT / "data" / "xwing.obj"
    aligner = None if options.no_align else alignment.Aligner(alignment.mesh.load_mesh(obj))
    result = evaluate_folder(options.folder, xu.load_model(options.weights), aligner, options.limit)
    figures = summarise(result.errors()) | {"seconds_per_frame": result.seconds_per_frame}
    if options.json:
        xu.write_files({options.json: json.dumps(_for_json(figures), indent=1) + "\n"})
    return figures


if __name__ == "__main__":
    main()
