"""A track as a file that other programs read: CSV or JSON.

Each frame is one row. It says when the frame was taken, whether the target was tracked in it, and
where the target is, as a translation with a quaternion and again as a matrix, because readers
prefer one or the other.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation

import xwing_utils as xu

SCHEMA = 2  # of the JSON file; keys are only added to it
POSE_COLUMNS = (
    *(f"t{axis}" for axis in "xyz"),
    *(f"q{axis}" for axis in "wxyz"),
    *(f"m{row}{column}" for row in range(4) for column in range(4)),
)


def export_track(path: str | Path, track: Sequence, K: np.ndarray, width: int, height: int) -> None:
    """Write the poses of a track to a file.

    A CSV file has one row a frame: frame (from 0), seconds, status ("tracked", "predicted",
    "lost"), probability that the pose is right, translation tx ty tz (model units), unit quaternion
    qw qx qy qz, matrix m00 ... m33 by rows, reason. The pose leads from the model to the camera (x
    right, y down, z forward). It is empty where the target is lost.

    A JSON file holds {"schema": 2, "camera": {K, width, height}, "frames": [...]}. Each frame has
    the same values, with translation, quaternion and matrix (four rows) as lists, null where the
    target is lost.

    A file that exists is replaced only once the new one is complete.

    Args:
        path: a `.csv` or a `.json` file.
        track: one `TrackedPose` a frame.
        K: (3, 3) camera matrix, pixels.
        width: of the frames, pixels.
        height: of the frames, pixels.
    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix == ".json":
        camera = {"K": np.asarray(K).tolist(), "width": int(width), "height": int(height)}
        text = _json_text(track, camera)
    elif path.suffix == ".csv":
        text = _csv_text(track)
    else:
        raise ValueError(f"{path}: expected a .csv or .json file")
    xu.write_files({path: text})


def _json_text(track, camera):
    frames = []
    for index, tracked in enumerate(track):
        frame = {"frame": index, **_state(tracked), **_pose_forms(tracked.pose)}
        frames.append({**frame, "reason": tracked.reason})
    return json.dumps({"schema": SCHEMA, "camera": camera, "frames": frames}, indent=1)


def _csv_text(track):
    rows = []
    for tracked in track:
        if tracked.pose is None:
            numbers = [None] * len(POSE_COLUMNS)
        else:
            forms = _pose_forms(tracked.pose).values()
            numbers = np.concatenate([np.ravel(form) for form in forms])
        rows.append([*_state(tracked).values(), *numbers, tracked.reason])

    columns = ["seconds", "status", "probability", *POSE_COLUMNS, "reason"]
    return pd.DataFrame(rows, columns=columns).to_csv(index_label="frame")


def _state(tracked):
    """Time, status and probability of a `TrackedPose`."""
    return {
        "seconds": round(tracked.seconds, 6),
        "status": tracked.status,
        "probability": round(tracked.probability, 4),
    }


def _pose_forms(pose):
    """A pose (4, 4), or None, as translation, quaternion (w first, not negative) and matrix."""
    if pose is None:
        return {"translation": None, "quaternion": None, "matrix": None}
    quaternion = Rotation.from_matrix(pose[:3, :3]).as_quat(canonical=True, scalar_first=True)
    return {
        "translation": pose[:3, 3].tolist(),
        "quaternion": quaternion.tolist(),
        "matrix": pose.tolist(),
    }
