"""A track as a file that other programs read: CSV, JSON or USD.

Each frame is one row. It says when the frame was taken, whether the target was tracked in it, and
where the target is, as a translation with a quaternion and again as a matrix, because readers
prefer one or the other. A stage of USD (`xwing.usd`) holds the mesh and the camera too.

A file also says what it was made of: the source with its own frame numbers and rate, and the lens.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing.usd import Shot, usd_files

KINDS = (".csv", ".json", ".usda", ".usdc")
SCHEMA = 2  # of the JSON file; keys are only added to it
DEFAULT_FPS = 30.0  # where neither the clip, nor the caller, nor the track says
POSE_COLUMNS = (
    *(f"t{axis}" for axis in "xyz"),
    *(f"q{axis}" for axis in "wxyz"),
    *(f"m{row}{column}" for row in range(4) for column in range(4)),
)


def export_track(
    path: str | Path,
    track: Sequence,
    K: np.ndarray,
    width: int,
    height: int,
    target: xu.Target | None = None,
    clip=None,
    fps: float | None = None,
) -> None:
    """Write the poses of a track to a file.

    A CSV file has one row a frame: frame (from 0), seconds, status ("tracked", "predicted",
    "lost"), probability that the pose is right, translation tx ty tz (model units), unit quaternion
    qw qx qy qz, matrix m00 ... m33 by rows, reason. The pose leads from the model to the camera (x
    right, y down, z forward). It is empty where the target is lost. Then come number (of the frame
    in the source), and, the same in all rows, fps, focal_length and source.

    A JSON file holds {"schema": 2, "camera": {K, width, height, focal_length, sensor}, "fps",
    "source", "frames": [...]}. Each frame has the same values, with translation, quaternion and
    matrix (four rows) as lists, null where the target is lost.

    A `.usda` or `.usdc` file is a stage of USD, see `xwing.usd`. Textures are written beside it.

    `number` is the source's own: 1001 for shot.1001.jpg; frames of a video or GIF count from 0.
    `fps` counts all frames of the source, even if the clip takes only every n-th. `focal_length` is
    in mm, of a sensor whose longer side has 36. `source` is relative to the folder of the file
    where both are in the project; marks stand for bytes of a name that are not UTF-8. A file that
    exists is replaced only once the new one is complete.

    Args:
        path: a `.csv`, `.json`, `.usda` or `.usdc` file.
        track: one `TrackedPose` a frame.
        K: (3, 3) camera matrix, pixels.
        width: of the frames, pixels.
        height: of the frames, pixels.
        target: `Target` that was tracked; USD needs its mesh.
        clip: `Clip` that was tracked, or None; its first frames if the track is shorter.
        fps: frames a second of the clip, where it does not say; None: the track's times tell.
    Raises:
        ValueError: another suffix, no frames, more frames than the clip has, a rate that is not
            positive, or USD without a target.
        ModuleNotFoundError: USD without the package usd-core.
        OSError: the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise ValueError(f"{path}: expected a .csv or .json file, or .usda or .usdc for USD")
    shot = _shot(track, K, width, height, clip, fps, _source(clip, path.parent))
    if kind == ".json":
        files = {path: _json_text(track, shot)}
    elif kind == ".csv":
        files = {path: _csv_text(track, shot)}
    elif target is None:
        raise ValueError(f"{path}: a stage of USD holds the mesh; give the target, too")
    else:
        files = usd_files(path, track, shot, target)
    xu.write_files(files)


def blender_settings(
    track: Sequence, K: np.ndarray, width: int, height: int, clip=None, fps: float | None = None
) -> str:
    """What Blender does not take from a stage of USD, as text: resolution and frame rate.

    Args:
        track: as for `export_track`, and so are the others.
        K: (3, 3) camera matrix, pixels.
        width: of the frames, pixels.
        height: of the frames, pixels.
        clip: `Clip` that was tracked, or None.
        fps: frames a second of the clip, where it does not say.
    """
    shot = _shot(track, K, width, height, clip, fps)
    frames = f"frames {shot.numbers[0]} to {shot.numbers[-1]}"
    text = f"{width} x {height} pixels, {shot.fps:g} frames a second, {frames}"
    ratio = K[0][0] / K[1][1]
    if abs(ratio - 1) * max(width, height) < 0.1:  # pixels
        return text
    across, down = max(1 / ratio, 1), max(ratio, 1)  # Blender's are at least 1
    return f"{text}, pixel aspect X {across:.6f}, Y {down:.6f}"


# ------------------------------------------------------------ what is known of the footage


def _shot(track, K, width, height, clip, fps, source=""):
    """The `Shot` of a track."""
    numbers = _frame_numbers(track, clip)
    if fps is not None:
        xu.check_positive("fps", fps)
    rate = getattr(clip, "fps", None) or fps or _rate(track)
    rate = round(float(rate) * getattr(clip, "step", 1), 6)
    return Shot(np.asarray(K, float), int(width), int(height), numbers, rate, source)


def _frame_numbers(track, clip):
    """The source's own number of each frame; from 0 where it has none, or the same one twice."""
    count = len(track)
    if count == 0:
        raise ValueError("track: expected at least one frame, got none")
    numbers = getattr(clip, "numbers", None)
    if numbers is None:
        return list(range(count))
    if len(numbers) < count:
        raise ValueError(f"track: has {count} frames, but the clip {len(numbers)}")
    numbers = list(numbers[:count])
    ascending = all(np.diff(numbers) > 0)
    return numbers if ascending else [index * getattr(clip, "step", 1) for index in range(count)]


def _rate(track):
    """Frames a second, from the times in a track."""
    duration = track[-1].seconds - track[0].seconds
    return (len(track) - 1) / duration if duration > 0 else DEFAULT_FPS


def _source(clip, folder):
    """The path of a clip's source, relative to a folder where both are in the project."""
    source = getattr(clip, "source", None)
    if source is None:
        return ""
    source = Path(source).absolute()
    folder = Path(folder).absolute()
    if source.is_relative_to(xu.ROOT) and folder.is_relative_to(xu.ROOT):
        source = Path(os.path.relpath(source, folder))
    return xu.printable(source.as_posix())


def _focal_length(shot):
    """Millimetres, rounded for files."""
    return round(xu.focal_length(shot.K, shot.width, shot.height), 6)


# ------------------------------------------------------------ files


def _json_text(track, shot):
    camera = {"K": shot.K.tolist(), "width": shot.width, "height": shot.height}
    camera |= {"focal_length": _focal_length(shot), "sensor": xu.SENSOR}
    frames = []
    for index, (number, tracked) in enumerate(zip(shot.numbers, track)):
        frame = {"frame": index, **_state(tracked), **_pose_forms(tracked.pose)}
        frames.append({**frame, "reason": xu.printable(tracked.reason), "number": number})
    head = {"schema": SCHEMA, "camera": camera, "fps": shot.fps, "source": shot.source}
    return json.dumps(head | {"frames": frames}, indent=1)


def _csv_text(track, shot):
    same = [shot.fps, _focal_length(shot), shot.source]
    rows = []
    for number, tracked in zip(shot.numbers, track):
        if tracked.pose is None:
            numbers = [None] * len(POSE_COLUMNS)
        else:
            forms = _pose_forms(tracked.pose).values()
            numbers = np.concatenate([np.ravel(form) for form in forms])
        rows.append(
            [*_state(tracked).values(), *numbers, xu.printable(tracked.reason), number, *same]
        )

    columns = ["seconds", "status", "probability", *POSE_COLUMNS, "reason"]
    columns += ["number", "fps", "focal_length", "source"]
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
