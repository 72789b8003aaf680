"""A track as CSV and JSON."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation

import xwing_utils as xu


def export_track(path, track, K, width, height):
    """Write poses to a `.csv` or `.json` file, replaced only when whole.

    One row a frame: frame (from 0), seconds, status ("tracked", "predicted", "lost"), probability that the
    pose is right, translation tx ty tz (model units), unit quaternion qw qx qy qz, matrix m00 ... m33 by
    rows, reason. Pose: model -> camera, x right, y down, z forward; empty (null) where lost. The JSON file
    holds {"schema": 2, "camera": {K, width, height}, "frames": [...]} with the matrix as four rows.
    ValueError: another suffix; OSError: no room.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"{path}: expected a .csv or .json file")
    if path.suffix == ".json":
        camera = {"K": np.asarray(K).tolist(), "width": int(width), "height": int(height)}
        rows = [
            {
                "frame": i,
                "seconds": round(t.seconds, 6),
                "status": t.status,
                "probability": round(t.probability, 4),
                **_numbers(t.pose),
                "reason": t.reason,
            }
            for i, t in enumerate(track)
        ]
        text = json.dumps({"schema": 2, "camera": camera, "frames": rows}, indent=1)
    else:
        rows = []
        for t in track:
            numbers = [np.ravel(value) for value in _numbers(t.pose).values()]
            numbers = [None] * 23 if t.pose is None else np.concatenate(numbers)
            rows.append(
                [round(t.seconds, 6), t.status, round(t.probability, 4), *numbers, t.reason]
            )
        names = [f"t{axis}" for axis in "xyz"] + [f"q{axis}" for axis in "wxyz"]
        names += [f"m{row}{column}" for row in range(4) for column in range(4)]
        table = pd.DataFrame(rows, columns=["seconds", "status", "probability", *names, "reason"])
        text = table.to_csv(index_label="frame")
    xu.write_files({path: text})


def _numbers(pose):
    if pose is None:
        return {"translation": None, "quaternion": None, "matrix": None}
    quaternion = np.roll(Rotation.from_matrix(pose[:3, :3]).as_quat(canonical=True), 1)
    return {
        "translation": pose[:3, 3].tolist(),
        "quaternion": quaternion.tolist(),
        "matrix": pose.tolist(),
    }
