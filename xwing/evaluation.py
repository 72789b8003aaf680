"""Measure pose estimation on a folder of frames whose poses are known, and print the figures.

Each frame of a folder is taken on its own, as if no other had been seen. The network finds the
keypoints, PnP makes a pose of them, and the pixels refine it and accept or reject it. An
`Evaluation` keeps what was found and what is true. `xwing.metrics` computes figures from it, and
this file puts them into tables: for the screen, for the README, and as JSON for scripts.

A `KnownClip` is a clip whose true poses are known. `follow` tracks its target live from the first
of them, without a network, and `track_figures` says how well a track does.

    python -m xwing.evaluation data/test --json panel.json
    python -m xwing.evaluation lmo/test/000002 --weights runs/cat/best.weights.h5  # a scene of BOP
"""

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

import xwing_utils as xu
from xwing import bop
from xwing.alignment import Aligner
from xwing.detector import Detector
from xwing.footage import Clip
from xwing.metrics import (
    MIN_CORNERS,
    corner_report,
    frame_claims,
    frame_errors,
    heatmap_errors,
    keypoint_calibration,
    normalised_squared_error,
    quantile_coverage,
    recalled,
    summarise,
)
from xwing.tracker import TrackedPose, Tracker
from xwing.verification import verify_frames

# ------------------------------------------------------------ tables and files

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
    "adds_0.1": ("ADD-S within 0.1 diameters", "{:.1%}"),
    "average_recall_mssd": ("average recall of MSSD (BOP)", "{:.1%}"),
    "average_recall_mspd": ("average recall of MSPD (BOP)", "{:.1%}"),
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
JSON_KEYS = (  # the figures that scripts of others read
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


def results_table(
    figures: Mapping, intervals: Mapping | None = None, keys: Sequence[str] = tuple(_PANEL)
) -> pd.DataFrame:
    """The panel as a table of text: one row a figure, one column a set.

    Args:
        figures: dict set -> `summarise`.
        intervals: dict set -> `bootstrap`, shown in brackets; or None.
        keys: the figures to show; those that no set has are left out.
    """
    intervals = intervals or {}
    keys = [key for key in keys if any(key in measured for measured in figures.values())]
    columns = {}
    for name, measured in figures.items():
        bounds = intervals.get(name, {})
        columns[name] = [_cell(key, measured.get(key), bounds.get(key)) for key in keys]
    titles = [_PANEL[key][0] for key in keys]
    return pd.DataFrame(columns, index=titles)


def _cell(key, figure, interval):
    """A figure as text, followed by its interval in brackets where there is one."""
    if figure is None or np.isnan(figure):
        return "–"
    form = _PANEL[key][1]
    text = form.format(figure)
    if interval is None:
        return text
    bounds = [form.format(bound).split()[0].rstrip("%°") for bound in interval]
    return f"{text} ({'–'.join(bounds)})"


# permutation of the corners -> title in tables
_SWAP_TITLES = {
    "identity": "frames that fit best as they are",
    "left-right": "... with left and right swapped",
    "top-bottom": "... with top and bottom swapped",
    "both": "... with both swapped",
    "nose-tail": "... with nose and tail swapped",
}


def swaps_table(reports: Mapping) -> pd.DataFrame:
    """How well corners are found and told from each other, as a table of text.

    Args:
        reports: dict set -> `metrics.corner_report`.
    """
    columns = {}
    for name, report in reports.items():
        columns[name] = {
            "corner error, median": f"{report['corner_px']:.2f} px",
            "... after each frame's best swap": f"{report['best_permutation_px']:.2f} px",
            "corners within 2 px": f"{report['within_2px']:.0%}",
            "corners within 5 px": f"{report['within_5px']:.0%}",
        }
        for permutation, title in _SWAP_TITLES.items():
            columns[name][title] = str(report["permutations"][permutation])
    return pd.DataFrame(columns)


def groups_table(groups: Mapping) -> pd.DataFrame:
    """The recall of groups of frames as a table of text: one row a group, three columns a set.

    Args:
        groups: dict by what the frames are split -> dict set -> `metrics.recall_by_group`.
    """
    tables = {}
    for key, sets in groups.items():
        columns = {}
        for name, table in sets.items():
            columns[name, "frames"] = table["frames"].map("{:d}".format)
            columns[name, "right"] = table["right"].map(_percent)
            columns[name, "rotation error"] = table["rotation_deg"].map(_degrees)
        tables[key] = pd.DataFrame(columns).rename(index=lambda group: f"up to {group.right:g}")
    return pd.concat(tables)


def risk_table(claims: Mapping, squares: Mapping) -> pd.DataFrame:
    """How often poses of single frames are wrong, the most confident first, as a table of text.

    Args:
        claims: dict set -> `metrics.frame_claims`.
        squares: dict set -> `metrics.normalised_squared_error` of its accepted poses.
    """
    columns = {}
    for name, rows in claims.items():
        wrong = {}
        for percent in (50, 80, 100):
            kept = percent * len(rows) // 100
            wrong[f"wrong, of the most confident {percent} %"] = rows["risk"].iloc[kept - 1]
        wrong["wrong, of the accepted"] = rows.loc[rows["accepted"], "wrong"].mean()
        wrong["wrong, of the rejected"] = rows.loc[~rows["accepted"], "wrong"].mean()
        columns[name] = {title: _percent(fraction) for title, fraction in wrong.items()}
        median = f"{np.median(squares[name]):.1f}"
        columns[name]["normalised squared error, median (5.35 is honest)"] = median
    return pd.DataFrame(columns)


def status_table(track: Sequence, truth: Sequence, errors: Mapping) -> pd.DataFrame:
    """What the frames of a track are called, and how many of each kind are right, as text.

    Args:
        track: N `TrackedPose`.
        truth: (N, 4, 4).
        errors: `metrics.frame_errors` of the track.
    """
    frames = pd.DataFrame({"status": [tracked.status for tracked in track]})
    frames["sight"] = errors["corners"] >= MIN_CORNERS
    frames["right"] = recalled([tracked.pose for tracked in track], truth)
    frames["claimed"] = [_claimed_degrees(tracked) for tracked in track]
    frames["true"] = errors["rotation"]
    groups = frames.groupby("status")
    return pd.DataFrame(
        {
            "frames": groups.size().astype(str),
            "with four corners in sight": groups["sight"].sum().astype(str),
            "right": groups["right"].mean().map("{:.1%}".format),
            "claimed rotation error": groups["claimed"].median().map(_degrees),
            "true rotation error": groups["true"].median().map(_degrees),
        }
    )


def _claimed_degrees(tracked):
    """The standard deviation of a tracked pose's rotation, degrees; NaN without a pose."""
    if tracked.pose is None:
        return np.nan
    return np.degrees(np.sqrt(np.trace(tracked.covariance[:3, :3])))


def _percent(value):
    return "–" if np.isnan(value) else f"{value:.1%}"


def _degrees(value):
    return "–" if np.isnan(value) else f"{value:.2f}°"


def probability_table(groups: Mapping) -> pd.DataFrame:
    """How far the probability and the covariance of tracked poses come true, as a table of text.

    Args:
        groups: dict title -> rows of `metrics.track_claims` that have a pose.
    """
    levels = (0.5, 0.9, 0.99)
    columns = {}
    for name, rows in groups.items():
        right = rows["right"].astype(bool)
        squares = rows.loc[right, "square"]
        columns[name] = {
            "frames with a pose": str(len(rows)),
            "... of which wrong": str((~right).sum()),
            "mean probability": f"{rows['probability'].mean():.1%}",
            "fraction of right poses": f"{right.mean():.1%}",
            "normalised squared error, median (5.35 is honest)": f"{squares.median():.1f}",
        }
        for level, fraction in zip(levels, quantile_coverage(squares, levels)):
            columns[name][f"within the {level:.0%} quantile"] = f"{fraction:.1%}"
    return pd.DataFrame(columns)


def readme_rows(figures: Mapping, intervals: Mapping | None = None) -> str:
    """The README's table as Markdown: the six HEADLINES of the README_SETS."""
    chosen = {name: figures[name] for name in README_SETS}
    table = results_table(chosen, intervals, HEADLINES)
    title = ("figure", *README_SETS)
    rule = ("---",) * len(title)
    return "\n".join(f"| {' | '.join(line)} |" for line in (title, rule, *table.itertuples()))


def write_results(
    folder: Path, figures: Mapping, intervals: Mapping, readme: Path | None = None
) -> None:
    """Write `weights/xwing_eval.json`, and the rows between the markers of a README.

    Args:
        folder: of the project, or another one that holds a folder `weights`.
        figures: dict set -> `summarise`.
        intervals: dict set -> `bootstrap`.
        readme: file with the markers, or None.

    Raises:
        ValueError: a README without the markers; nothing is written then.
    """
    content = {
        "figures": {name: _for_json(measured) for name, measured in figures.items()},
        "intervals_95": {name: _for_json(measured) for name, measured in intervals.items()},
    }
    files = {Path(folder) / "weights" / "xwing_eval.json": json.dumps(content, indent=1) + "\n"}
    if readme is not None:
        files[readme] = _updated_readme(readme, readme_rows(figures, intervals))
    xu.write_files(files)


def _updated_readme(readme, rows):
    """The text of a README with other rows between its markers."""
    marked = f"<!-- results -->\n{rows}\n<!-- /results -->"
    pattern = re.compile("<!-- results -->.*<!-- /results -->", re.DOTALL)
    text, count = pattern.subn(lambda _: marked, Path(readme).read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(
            f"{readme}: expected the markers <!-- results --> and <!-- /results --> once"
        )
    return text


def _for_json(figures):
    """The figures that JSON_KEYS names, with None in place of NaN, which JSON cannot hold."""
    chosen = {}
    for key in JSON_KEYS:
        if key in figures:
            missing = np.isnan(figures[key]).any()
            chosen[key] = None if missing else figures[key]
    return chosen


# ------------------------------------------------------------ a folder, frame by frame


@dataclass(frozen=True)
class Evaluation:
    """What was found in N frames, each taken on its own, and what is true."""

    target: xu.Target
    paths: list  # N files
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
    seconds_per_frame: float  # of reading, network, heatmap error, PnP and alignment

    @property
    def poses(self) -> list:
        """The accepted poses: N (4, 4) or None."""
        return [estimate.pose if estimate.accepted else None for estimate in self.estimates]

    def errors(self, poses: Sequence | None = None) -> dict:
        """`frame_errors` and "heatmap_mse" of the accepted poses, or of others.

        Args:
            poses: N (4, 4) or None of the same frames; None takes the accepted ones.

        Raises:
            ValueError: another number of poses.
        """
        poses = self.poses if poses is None else poses
        if len(poses) != len(self.paths):
            raise ValueError(f"poses: expected {len(self.paths)}, one a frame, got {len(poses)}")

        errors = frame_errors(
            self.keypoints[:, :8],
            poses,
            self.true_keypoints[:, :8],
            self.true_poses,
            self.K,
            self.size,
            self.target,
        )
        return errors | {"heatmap_mse": self.heatmap_mse}

    def corner_report(self) -> dict:
        """`metrics.corner_report` of the corners in the heatmaps."""
        return corner_report(self.keypoints[:, :8], self.true_keypoints[:, :8], self.size)

    def claims(self) -> pd.DataFrame:
        """`metrics.frame_claims` of the estimates, accepted or not."""
        corners = xu.in_frame(self.true_keypoints[:, :8], self.size, self.size).sum(1)
        return frame_claims(self.estimates, self.true_poses, corners)

    def keypoint_claims(self, edges: Sequence[float]) -> pd.DataFrame:
        """`metrics.keypoint_calibration` of the confident keypoints in the frame.

        Args:
            edges: of groups of claims, pixels.
        """
        inside = xu.in_frame(self.true_keypoints, self.size, self.size)
        known = inside & (self.confidence >= xu.MIN_CONFIDENCE)
        distance = np.linalg.norm(self.keypoints - self.true_keypoints, axis=-1)
        return keypoint_calibration(self.sigma[known], distance[known], edges)

    def moves(self) -> np.ndarray:
        """By how much the pixels have turned each pose, (N,) degrees; -1 where there was none."""
        pairs = zip(self.from_points, self.estimates)
        return np.array(
            [
                -1 if start.pose is None else xu.rotation_error(end.pose, start.pose)
                for start, end in pairs
            ]
        )

    def squares(self) -> np.ndarray:
        """`metrics.normalised_squared_error` of the accepted poses."""
        pairs = zip(self.estimates, self.true_poses)
        accepted = [(estimate, true) for estimate, true in pairs if estimate.accepted]
        return np.array([normalised_squared_error(e.pose, t, e.covariance) for e, t in accepted])


def evaluate_folder(
    folder: Path,
    model,
    aligner: Aligner | None = None,
    limit: int | None = None,
    step: int = 1,
    batch_size: int = 16,
    progress: bool = True,
    target: xu.Target = xu.XWING,
) -> Evaluation:
    """Find the target in the frames of a folder whose true poses are known.

    Frames in which the target has passed the camera are left out, see `xu.skip_behind_camera`.

    Args:
        folder: in the data format; its frames have the network's size.
        model: from `load_model`.
        aligner: refines and verifies the poses; None takes those from the keypoints alone.
        limit: largest number of frames, or None.
        step: every `step`-th frame is taken.
        batch_size: number of frames that are in memory, and go through the network, at a time.
        progress: whether to show a progress bar.
        target: that the frames show.

    Raises:
        FileNotFoundError: what `load_dataset` and `read_image` raise.
        ValueError: the same, and where the model or the aligner is of another target.
    """
    xu.check_same_target(model.target, target, "the model's weights")
    if aligner is not None:
        xu.check_same_target(aligner.target, target, "the aligner's settings")

    paths, matrices = xu.load_dataset(folder)
    paths = paths[::step][:limit]
    matrices = matrices[::step][:limit]

    view, projection = xu.load_camera(folder)
    paths, matrices = xu.skip_behind_camera(paths, matrices, view, target.keypoints)
    size = model.settings["size"]
    K = xu.camera_matrix(projection, size, size)

    points = target.keypoints[: model.settings["keypoints"]]
    true_keypoints = xu.keypoints_of(matrices, view, projection, size, size, points)
    true_poses = np.array([xu.pose_in_camera(view, matrix) for matrix in matrices])

    # The first call compiles the network, which is not part of the time for a frame.
    xu.predict_heatmaps(model, np.zeros((1, size, size, 3), np.uint8), batch_size)

    found = []
    started = time.perf_counter()
    for start in tqdm(range(0, len(paths), batch_size), unit="batch", disable=not progress):
        batch = slice(start, start + batch_size)
        images = np.stack([xu.read_image(path, (size, size)) for path in paths[batch]])
        heatmaps = xu.predict_heatmaps(model, images, batch_size, len(points))
        true_corners = true_keypoints[batch, :8]
        found.append(_evaluate_batch(images, heatmaps, true_corners, K, model, aligner, target))
    seconds = time.perf_counter() - started

    joined = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    return Evaluation(
        target=target,
        paths=paths,
        K=K,
        size=size,
        true_keypoints=true_keypoints,
        true_poses=true_poses,
        seconds_per_frame=seconds / len(paths),
        **joined,
    )


def _evaluate_batch(images, heatmaps, true_corners, K, model, aligner, target):
    """What is found in a batch of images: fields of `Evaluation`, by name."""
    keypoints, confidence, sigma = xu.read_keypoints(heatmaps, model.settings)

    from_points = [
        xu.estimate_pose(points, K, certainty, spread, target=target)
        for points, certainty, spread in zip(keypoints, confidence, sigma)
    ]
    estimates = from_points
    if aligner is not None:
        estimates = verify_frames(aligner, images, from_points, K, model)

    return {
        "keypoints": keypoints,
        "confidence": confidence,
        "sigma": sigma,
        "from_points": from_points,
        "estimates": estimates,
        "heatmap_mse": heatmap_errors(heatmaps, true_corners, model.settings),
    }


# ------------------------------------------------------------ squares that are drawn

NEAR = 20.0  # degrees: from there the alignment still finds the pose


@dataclass(frozen=True)
class DrawnSquares:
    """N squares that a `Synthesiser` has drawn, and what is true in them."""

    images: np.ndarray  # (N, S, S, 3) uint8
    poses: np.ndarray  # (N, 4, 4) model -> OpenCV camera
    cameras: np.ndarray  # (N, 3, 3) camera matrices, pixels
    targets: list  # N `Target`


def draw_squares(
    synthesise, target: xu.Target, count: int, size: int, seed: int | np.random.Generator
) -> DrawnSquares:
    """Draw squares that show at least MIN_CORNERS corners of a target's box.

    Args:
        synthesise: see `xwing_utils.make_dataset`.
        target: what it draws, where it does not say.
        count: N.
        size: S, pixels.
        seed: of the random numbers, or a generator whose state decides everything.
    """
    rng = np.random.default_rng(seed)
    squares = []
    while len(squares) < count:
        image, pose, K, *drawn = synthesise(size, rng)
        shape = drawn[0] if drawn else target
        if xu.in_frame(xu.project_pose(shape.box, pose, K), size, size).sum() >= MIN_CORNERS:
            squares.append((image, pose, K, shape))
    images, poses, cameras, targets = zip(*squares)
    return DrawnSquares(np.array(images), np.array(poses), np.array(cameras), list(targets))


def estimate_drawn(model, squares: DrawnSquares) -> list[xu.PoseEstimate]:
    """Estimate the poses in drawn squares from the keypoints alone: N `PoseEstimate`.

    Args:
        model: from `load_model`, for squares of that size.
        squares: `DrawnSquares`.
    """
    channels = model.settings["keypoints"]
    maps = xu.predict_heatmaps(model, squares.images, channels=channels)
    found = zip(squares.cameras, *xu.read_keypoints(maps, model.settings))
    return [
        xu.estimate_pose(keypoints, K, confidence, sigma, target=model.target)
        for K, keypoints, confidence, sigma in found
    ]


def drawn_figures(estimates: Sequence, squares: DrawnSquares) -> dict:
    """Compare estimates with the truth; turns after which a target looks the same are no errors.

    Args:
        estimates: N `PoseEstimate`.
        squares: N `DrawnSquares`.

    Returns:
        "squares": N; "near": the fraction with a pose within NEAR degrees; "accepted": the fraction
        with an accepted pose; "wrong": the fraction of these that are not near; and
        "rotation_deg_median" of all poses.
    """
    degrees = []
    for estimate, true, target in zip(estimates, squares.poses, squares.targets):
        if estimate.pose is None:
            degrees.append(np.inf)
            continue
        degrees.append(xu.rotation_error(estimate.pose, true, target))
    near = np.array(degrees) < NEAR
    accepted = np.array([estimate.accepted for estimate in estimates])
    return {
        "squares": len(near),
        "near": float(near.mean()),
        "accepted": float(accepted.mean()),
        "wrong": float((accepted & ~near).sum() / max(accepted.sum(), 1)),
        "rotation_deg_median": float(np.median(degrees)),
    }


# ------------------------------------------------------------ a rendered flight


def load_flight(path: Path) -> tuple[Path, list, np.ndarray]:
    """Read what is known about a rendered flight.

    Args:
        path: a file like data/wild.json.

    Returns:
        The path of its video, its N true poses (4, 4), and K (3, 3).
    """
    info = xu.read_json(path)
    view, projection = xu.load_camera(path)
    K = xu.camera_matrix(projection, info["width"], info["height"])
    poses = [xu.pose_in_camera(view, np.array(matrix)) for matrix in info["matrices"]]
    return Path(path).with_name(info["video"]), poses, K


# ------------------------------------------------------------ a clip whose poses are known

VISIBLE = 0.5  # a target is visible in a frame that shows at least this fraction of it


@dataclass(frozen=True)
class KnownClip:
    """A clip of a target, and what is true in its N frames."""

    clip: Clip
    target: xu.Target
    K: np.ndarray  # (3, 3) pixels
    poses: list  # N (4, 4), or None where the target is out of sight
    visible: np.ndarray  # (N,) fraction of the target that shows, 0 to 1
    fps: float  # frames a second


def load_object(path: Path, step: int = 1) -> KnownClip:
    """Read a clip of another object.

    Args:
        path: a file like data/objects/carton.json; the video is beside it.
        step: every step-th frame is taken.

    Returns:
        its `KnownClip`. What is visible is the fraction of the object's silhouette.

    Raises:
        ValueError: the object is not in sight in the first frame, where a track has to begin.
    """
    path = Path(path)
    info = xu.read_json(path)
    poses = [None if pose is None else np.array(pose) for pose in info["poses"]]
    if poses[0] is None:
        raise ValueError(f"{path}: expected a pose of the first frame, got null")
    return KnownClip(
        clip=Clip(path.with_suffix(".mp4"), step),
        target=xu.load_target(path.with_name(info["target"])),
        K=np.array(info["K"]),
        poses=poses[::step],
        visible=np.array(info["visible"])[::step],
        fps=info["fps"] / step,
    )


def load_xwing_clip(path: Path, step: int = 1, fps: float = 30.0) -> KnownClip:
    """Read a clip of the X-wing.

    Args:
        path: a folder of frames like data/frames, or the file of a flight, see `load_flight`.
        step: every step-th frame is taken.
        fps: frames a second of the folder or the video.

    Returns:
        its `KnownClip`. What is visible is the fraction of the eight corners of the ship's bounding
        box that lie in the frame.
    """
    path = Path(path)
    if path.is_dir():
        video = path
        view, projection = xu.load_camera(path)
        K = xu.camera_matrix(projection, xu.FRAME_SIZE, xu.FRAME_SIZE)
        poses = [xu.pose_in_camera(view, matrix) for matrix in xu.load_dataset(path)[1]]
    else:
        video, poses, K = load_flight(path)

    clip = Clip(video, step)
    poses = poses[::step]
    corners = np.array([xu.project_pose(xu.BOUNDING_BOX, pose, K) for pose in poses])
    visible = xu.in_frame(corners, clip.width, clip.height).mean(1)
    return KnownClip(clip, xu.XWING, K, poses, visible, fps / step)


def true_poses(clip: Clip) -> list[np.ndarray]:
    """Read the true poses of a folder of rendered pictures.

    Beside each picture NAME.jpg or NAME.png lies its model matrix NAME_mat.json, and beside them
    the camera, `camera_info.json`.

    Args:
        clip: of a folder.

    Returns:
        one pose (4, 4) a frame, model -> OpenCV camera. A target may be behind the camera.

    Raises:
        FileNotFoundError: the clip is no folder, or a file is missing; the message names it.
        ValueError: a file holds something else; the message names it.
    """
    if clip.paths is None:
        raise FileNotFoundError(f"{clip.source}: is no folder of pictures with matrices")
    files = [path.with_name(f"{path.stem}_mat.json") for path in clip.paths[:: clip.step]]
    matrices = [xu.rigid_matrix(xu.read_json(file), str(file)) for file in files]
    view, _ = xu.load_camera(clip.source)
    return [xu.pose_in_camera(view, matrix) for matrix in matrices]


def load_bop(folder: Path, target: xu.Target, step: int = 1, fps: float = 30.0) -> KnownClip:
    """Read a scene of BOP.

    Args:
        folder: of the scene, see `xwing.bop`.
        target: one of its objects, in any unit; `bop.load_model` reads it from the scene's models.
        step: every step-th picture is taken.
        fps: pictures a second.

    Returns:
        its `KnownClip`, in the target's units. What is visible is the fraction of its silhouette.

    Raises:
        FileNotFoundError, ValueError: the scene is not complete, or has no such object.
    """
    number, millimetres = bop.find_object(folder, target)
    clip = Clip(folder, step)
    poses, visible = bop.true_poses(bop.load_scene(folder), number)
    poses = [None if pose is None else xu.scale_pose(pose, 1 / millimetres) for pose in poses]
    return KnownClip(clip, target, clip.K, poses[::step], visible[::step], fps / step)


def evaluate_bop(
    known: KnownClip, detector: Detector, aligner: Aligner | None = None, limit: int | None = None
) -> tuple[dict, list[TrackedPose]]:
    """Find the target of a scene of BOP in each picture alone.

    Args:
        known: from `load_bop`; the pictures in which it has no pose do not count.
        detector: `Detector` for its target; pictures may have any size.
        aligner: refines and verifies the poses; None takes those from the keypoints alone.
        limit: largest number of pictures, or None.

    Returns:
        the errors, see `frame_errors`, of the pictures that count; and a `TrackedPose` of every
        picture, for `bop.result_rows`.
    """
    found = []
    results = []
    pairs = zip(known.clip, known.poses)
    for frame, true in itertools.islice(pairs, limit):
        if frame.image is None or true is None:
            results.append(TrackedPose("lost", reason=frame.fault))
            continue
        keypoints, confidence, sigma = detector(frame.image)
        estimate = xu.estimate_pose(keypoints, known.K, confidence, sigma, target=known.target)
        if aligner is not None:
            estimate = aligner.verify(frame.image, estimate, known.K)
        pose = estimate.pose if estimate.accepted else None
        found.append((keypoints[:8], pose, _corners_in_frame(known, true), true))
        status = "lost" if pose is None else "tracked"
        probability = float(np.nan_to_num(estimate.probability))
        results.append(TrackedPose(status, pose=pose, probability=probability))
    if not found:
        raise ValueError(f"{known.clip.source}: in none of the pictures the target is in sight")

    keypoints, poses, corners, truth = zip(*found)
    errors = frame_errors(keypoints, poses, corners, truth, known.K, known.clip.width, known.target)
    return errors, results


def _corners_in_frame(known, pose):
    """(8, 2) pixels of the box's corners, NaN outside the frame, which need not be square."""
    corners = xu.project_pose(known.target.box, pose, known.K)
    inside = xu.in_frame(corners, known.clip.width, known.clip.height)
    return np.where(inside[:, None], corners, np.nan)


def follow(known: KnownClip, limit: int | None = None) -> list[TrackedPose]:
    """Follow the target of a clip live from its first true pose, without a network.

    Args:
        known: the clip.
        limit: largest number of frames, or None.

    Returns:
        one `TrackedPose` a frame, from what is known up to that frame.
    """
    tracker = Tracker(known.K, known.fps, aligner=Aligner(known.target))
    frames = itertools.islice(known.clip, limit)
    track = [tracker.start(next(frames).image, known.poses[0])]
    return track + [tracker.update(frame.image, fault=frame.fault) for frame in frames]


def track_live(
    images: Sequence, K: np.ndarray, fps: float, detector, aligner=None, until_found: bool = False
) -> list[TrackedPose]:
    """Track the target of a clip live, one frame after the other.

    Args:
        images: N frames (H, W, 3) uint8 RGB.
        K: (3, 3), pixels.
        fps: frames a second.
        detector: `Detector` for the target.
        aligner: `Aligner` of the target; None tracks with the network alone.
        until_found: use the network until the first pose only.

    Returns:
        one `TrackedPose` a frame, from what is known up to that frame.
    """
    tracker = Tracker(K, fps, detector, aligner)
    track = []
    for image in images:
        track.append(tracker.update(image))
        if until_found and track[-1].pose is not None:
            tracker.detector = None
    return track


def find_alone(known: KnownClip, detector, aligner: Aligner | None = None) -> list[TrackedPose]:
    """Find the target of a clip in each frame alone, as if no other had been seen.

    Args:
        known: the clip.
        detector: `Detector` for its target.
        aligner: verifies the poses; None takes those from the keypoints alone.

    Returns:
        a `TrackedPose` for each frame: "tracked" where the pose was accepted, else "lost". A pose
        that was not accepted is kept.
    """
    tracker = Tracker(known.K, known.fps, detector, aligner)  # takes no frame
    found = []
    for frame in known.clip:
        estimate = tracker.detect(frame.image)
        status = "tracked" if estimate.accepted else "lost"
        probability = float(np.nan_to_num(estimate.probability))
        found.append(TrackedPose(status, frame.seconds, estimate.pose, probability=probability))
    return found


def track_figures(known: KnownClip, track: Sequence[TrackedPose]) -> dict:
    """Compare a track with the truth. Symmetries and axes of the target count as no error.

    A pose is right if it is "tracked" and within 5 degrees and 0.106 diameters of the true one.

    Args:
        known: the clip.
        track: `TrackedPose` of its first N frames, or of all.

    Returns:
        "visible": the number of frames in which the target is visible (see VISIBLE). Of these:
        "right", the fraction with a right pose, and "rotation_deg_median" of the tracked poses, NaN
        without one. Of all frames: "wrong", the number of poses that are called tracked and are not
        right, and "wrong_in_a_row", the most of them in a row. "found_again" is a list with, for
        each time that the target becomes visible again, the number of frames until its pose is
        right; None where this never happens.
    """
    visible = known.visible[: len(track)] >= VISIBLE
    tracked = np.array([frame.status == "tracked" for frame in track])
    close, degrees = _compare_poses(known, track)
    right = tracked & close
    wrong = tracked & ~close
    return {
        "visible": int(visible.sum()),
        "right": float(right[visible].mean()),
        "rotation_deg_median": float(pd.Series(degrees[tracked & visible]).median()),
        "wrong": int(wrong.sum()),
        "wrong_in_a_row": _longest_run(wrong),
        "found_again": _frames_until_found(visible, right),
    }


# figure of `track_figures` -> title in tables
_TRACK_TITLES = {
    "visible": "visible frames",
    "right": "right",
    "rotation_deg_median": "rotation error, median",
    "wrong": "wrong but tracked",
    "wrong_in_a_row": "... in a row",
    "found_again": "frames until found again",
}


def tracks_table(figures: Mapping) -> pd.DataFrame:
    """The figures of several tracks as a table of text: one row a track, one column a figure.

    Args:
        figures: dict name of the track -> `track_figures`.
    """
    rows = []
    for measured in figures.values():
        text = {key: str(value) for key, value in measured.items()}
        text["right"] = f"{measured['right']:.1%}"
        text["rotation_deg_median"] = f"{measured['rotation_deg_median']:.2f}°"
        waits = ["never" if wait is None else str(wait) for wait in measured["found_again"]]
        text["found_again"] = ", ".join(waits) or "–"
        rows.append([text[key] for key in _TRACK_TITLES])
    return pd.DataFrame(rows, index=list(figures), columns=list(_TRACK_TITLES.values()))


def _compare_poses(known, track):
    """Which poses of a track are close to the truth (N,), and rotation errors (N,) or NaN."""
    poses = []
    nearest = []
    for tracked, true in zip(track, known.poses):
        is_comparable = tracked.pose is not None and true is not None
        poses.append(tracked.pose if is_comparable else None)
        same = xu.nearest_equivalent(true, tracked.pose, known.target) if is_comparable else None
        nearest.append(same)

    close = recalled(poses, nearest, target=known.target)
    degrees = [
        np.nan if pose is None else xu.rotation_error(pose, true)
        for pose, true in zip(poses, nearest)
    ]
    return close, np.array(degrees)


def _longest_run(flags):
    """The greatest number of flags in a row that are set."""
    return max(sum(run) for _, run in itertools.groupby(map(int, flags)))


def _frames_until_found(visible, right):
    """For each frame in which a target becomes visible again, how long until it is right."""
    waits = []
    for back in np.flatnonzero(visible[1:] & ~visible[:-1]) + 1:
        found = np.flatnonzero(right[back:])
        waits.append(int(found[0]) if len(found) else None)
    return waits


# ------------------------------------------------------------ the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error ends it with one line on the error stream.

    Args:
        arguments: words after the command, or None for those of the shell.
    """
    options = _parse(arguments)
    try:
        figures = _measure(options)
    except (OSError, ValueError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    print(results_table({options.folder.resolve().name: figures}).to_string())


def _parse(arguments):
    parser = argparse.ArgumentParser(
        "python -m xwing.evaluation", description="Measure the tracker."
    )
    weights = xu.ROOT / "weights" / "xwing.weights.h5"
    parser.add_argument(
        "folder", type=Path, help="camera_info.json, 0.jpg, 0_mat.json, ...; or a scene of BOP"
    )
    parser.add_argument(
        "--weights", type=Path, default=weights, metavar="FILE", help="weights of another network"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N frames")
    parser.add_argument("--no-align", action="store_true", help="poses from the keypoints alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    return parser.parse_args(arguments)


def _measure(options):
    """The figures that the command line asks for; they are also written to its --json file."""
    _check_options(options)
    figures = _scene_figures(options) if bop.is_scene(options.folder) else _set_figures(options)
    if options.json:
        xu.write_files({options.json: json.dumps(_for_json(figures), indent=1) + "\n"})
    return figures


def _scene_figures(options):
    """The figures of a scene of BOP."""
    detector = Detector(options.weights)
    known = load_bop(options.folder, detector.target)
    aligner = None if options.no_align else Aligner(detector.target)
    started = time.perf_counter()
    errors, _ = evaluate_bop(known, detector, aligner, options.limit)
    seconds = time.perf_counter() - started
    return summarise(errors) | {"seconds_per_frame": seconds / len(errors["solved"])}


def _set_figures(options):
    """The figures of a folder in the data format."""
    model = xu.load_model(options.weights)
    target = model.target
    aligner = None if options.no_align else Aligner(target)

    result = evaluate_folder(options.folder, model, aligner, options.limit, target=target)
    return summarise(result.errors()) | {"seconds_per_frame": result.seconds_per_frame}


def _check_options(options):
    """Raise what is wrong before the network is loaded, which takes seconds."""
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit: expected a positive number of frames, got {options.limit}")
    file = options.json
    if file and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise FileNotFoundError(f"--json: expected a file in a folder that exists, got {file}")
    if bop.is_scene(options.folder):
        bop.load_scene(options.folder)
    else:
        xu.load_dataset(options.folder)


if __name__ == "__main__":
    main()
