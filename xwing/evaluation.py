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

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

import xwing_utils as xu
from xwing import alignment
from xwing.metrics import frame_errors, heatmap_errors, summarise

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
