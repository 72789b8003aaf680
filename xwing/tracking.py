"""A finished clip: tracked from where it is most certain, and smoothed; from a shell, too.

First the network looks at frames spread over the clip. Where the pixels confirm none of its poses,
edges decide. The clearest frames say whether the focal length is right. From the most probable
detection, or from the starts that the user gives, a track grows forwards and backwards
(`xwing.parts`). In the end it is smoothed.

    python -m xwing.tracking CLIP --target MESH --start START --out DIR
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

import xwing_utils as xu
from xwing import bop
from xwing.alignment import Aligner
from xwing.detections import detect_by_edges, ranked
from xwing.detector import Detector
from xwing.export import blender_settings, export_track
from xwing.film import write_clip
from xwing.footage import Clip, frames_at
from xwing.lens import LensCheck, check_lens
from xwing.overlay import draw_tracked
from xwing.parts import (
    choose_part,
    frames_with_bar,
    grow_from_detections,
    grow_from_start,
    look_through,
    readable_again,
)
from xwing.starts import read_starts
from xwing.tracker import MAX_GAP_SECONDS, TrackedPose, Tracker, trust_features

__all__ = [
    "Track",
    "TrackedPose",
    "Tracker",
    "blender_settings",
    "export_track",
    "read_camera",
    "read_starts",
    "summary",
    "track_clip",
    "trust_features",
]

# The lens is checked in so many frames: those of the clearest detections, or some that are tracked
# within so many seconds of a start.
LENS_FRAMES = 8
LENS_SECONDS = 1.0

DEFAULT_FOCAL = 35.0  # mm of a 36 mm sensor, where the command line and the source do not say

# The probability of a pose falls by these factors. With a focal length that is wrong by 12 % or
# more, the distance of a target is wrong by more than a right pose may be.
LENS_PROBABILITY = {"confirmed": 1.0, "unknown": 0.7, "wrong": 0.05}


class Track(list):
    """The `TrackedPose` of each frame of a clip.

    Attributes:
        lens: `LensCheck` of the camera matrix; None where the pixels were not compared.
    """

    lens: LensCheck | None = None


def track_clip(
    clip: Iterable,
    K: np.ndarray,
    detector=None,
    aligner=None,
    fps: float | None = None,
    progress: bool = True,
    starts: dict | None = None,
) -> Track:
    """Track a finished clip; the track is forward-backward smoothed.

    Before that the focal length of K is checked in frames that show the target clearly. Where it is
    wrong, a warning says so, and the poses are improbable. A target without texture that the pixels
    confirm in no frame is looked for by its edges; a warning says in which frames it was found.

    Args:
        clip: `Clip`, or another iterable of `Frame`; it is read more than once where there is an
            aligner, and kept in memory where that is not possible.
        K: (3, 3) camera matrix, pixels.
        detector: see `Tracker`; None: there are starts.
        aligner: see `Tracker`. None: every frame is measured by the network.
        fps: frames a second where the clip does not say.
        progress: show a bar.
        starts: {number of a frame: pose (4, 4)} that the user knows. The target is followed from
            each one forwards and backwards. Between two starts, the nearer one counts. Where the
            tracks from both differ, `reason` says so, and the probability is at most one half. The
            network is used in the frames that no start leads to.

    Returns:
        `Track`, a list of N `TrackedPose`. Frames in gaps of up to MAX_GAP_SECONDS between tracked
        frames are "predicted". Frames in longer gaps, before the first and after the last tracked
        frame are "lost" and have no pose.

    Raises:
        ValueError: a wrong K, fps that are not positive, a detector and an aligner of different
            targets, neither a detector nor starts, or a start where no track can begin.
    """
    starts = _check_starts(starts or {}, detector, aligner)
    fps = getattr(clip, "fps", None) or fps
    tracker = Tracker(K, fps, detector, aligner, keep=True)
    if aligner is None:
        count = len(clip) if isinstance(clip, list) else getattr(clip, "count", None)
        for frame in frames_with_bar(clip, "tracking", count, progress):
            tracker.update(frame.image, frame.seconds, frame.fault)
        return Track(_without_open_gaps(tracker.smoothed(), fps))

    clip, count = readable_again(clip)
    _check_frame_numbers(starts, count)
    film, detections = look_through(clip, count, tracker, progress)
    if not starts and not any(one.estimate.accepted for one in detections):
        detections += _look_by_edges(film, detections)
    lens = _check_lens(film, detections, starts)
    if lens.verdict == "wrong":
        warnings.warn(str(lens), stacklevel=2)

    parts = [grow_from_start(film, starts, start) for start in sorted(starts)]
    parts, detections = grow_from_detections(film, detections, parts)
    return _finish(film, parts, detections, lens)


def _check_starts(starts, detector, aligner):
    """The starts {number of a frame: pose (4, 4) float64}, or a ValueError."""
    if detector is None and not starts:
        raise ValueError(
            "nothing finds the target: give a detector (trained weights), or starts, "
            "{number of a frame: pose (4, 4)}"
        )
    if aligner is None and starts:
        raise ValueError("starts are followed on the pixels: give an aligner too")
    return {
        index: xu.rigid_matrix(pose, f"starts, frame {index}") for index, pose in starts.items()
    }


def _check_frame_numbers(starts, count):
    """Raise ValueError where a start is in none of the clip's frames."""
    outside = [index for index in starts if index not in range(count)]
    if outside:
        raise ValueError(f"starts, frame {outside[0]}: the clip has the frames 0 to {count - 1}")


def _look_by_edges(film, detections):
    """What the edges of a plain mesh say where no detection of the network is accepted."""
    target, aligner = film.live.target, film.live.aligner
    if not detections or aligner.mesh.textures is not None:
        return []
    found = detect_by_edges(film.live, film.clip, detections)
    numbers = [str(one.index) for one in found if one.estimate.accepted]
    if numbers:
        message = f"{target.name} is found by its edges alone, in frames {', '.join(numbers)}"
        if xu.has_symmetries(target):
            message += "; its mesh looks the same after a turn, so the pose is one of several"
        warnings.warn(f"{message}; look at the overlay", stacklevel=3)
    return found


# ------------------------------------------------------------ the lens


def _check_lens(film, detections, starts):
    """The `LensCheck` of the clearest detections, or also of what is tracked near a start."""
    clear = ranked(one for one in detections if one.probability > 0.5)
    poses = {one.index: one.estimate.pose for one in clear if _is_whole(film, one.estimate.pose)}
    poses = dict(itertools.islice(poses.items(), LENS_FRAMES))
    if len(poses) < LENS_FRAMES:
        accepted = [one for one in clear if one.estimate.accepted]
        found = {one.index: one.estimate.pose for one in accepted[:1]}
        poses = _poses_near(film, starts or found) | poses

    numbers = sorted(poses)
    images = list(frames_at(film.clip, numbers))
    live = film.live
    return check_lens(images, [poses[index] for index in numbers], live.K, live.aligner)


def _poses_near(film, starts):
    """The poses of a few frames that are tracked near starts, {number of a frame: (4, 4)}."""
    poses = {}
    reach = round(LENS_SECONDS * film.live.fps)
    for start in starts:
        last = min(start + reach, len(film.seconds) - 1)
        with contextlib.suppress(ValueError):  # a wrong start is said later
            part = grow_from_start(film, starts, start, max(start - reach, 0), last)
            poses |= {index: one for index, one in part.poses.items() if _is_whole(film, one)}
    numbers = sorted(poses)
    chosen = np.linspace(0, len(numbers) - 1, min(len(numbers), LENS_FRAMES)).round().astype(int)
    return {numbers[i]: poses[numbers[i]] for i in chosen}


def _is_whole(film, pose):
    """Whether the whole target is in sight at a pose."""
    corners = xu.project_pose(film.live.target.box, pose, film.live.K)
    return bool(xu.in_frame(corners, film.width, film.height).all())


# ------------------------------------------------------------ the finished track


def _finish(film, parts, detections, lens):
    """The smoothed track that parts make together."""
    tracker = Tracker(film.live.K, film.live.fps, None, film.live.aligner, keep=True)
    second_targets = {one.index: one.second_target for one in detections}
    chosen = []
    doubts = []
    for index, seconds in enumerate(film.seconds):
        part, doubt = choose_part(parts, index, film.live.target)
        chosen.append(part)
        doubts.append(doubt)
        tracker.second_target = second_targets.get(index, tracker.second_target)
        tracker.update_pose(_estimate(film, parts, part, index), seconds)

    track = _without_open_gaps(tracker.smoothed(), film.live.fps)
    track = Track(_doubted(*each, lens) for each in zip(track, chosen, doubts))
    track.lens = lens
    return track


def _estimate(film, parts, part, index):
    """The `PoseEstimate` of a frame in a part, or one that says why there is none."""
    if part is not None:
        return part.estimates[index]
    for other in parts:
        missing = other.estimates.get(index)
        if missing is not None and not missing.accepted:
            return missing
    return xu.PoseEstimate(None, reason=film.faults[index] or "the target is not found")


def _doubted(tracked, part, doubt, lens):
    """A `TrackedPose` with what speaks against its part, or against the lens."""
    probability = tracked.probability * LENS_PROBABILITY[lens.verdict]
    if part is not None and not part.is_given:
        probability *= part.support.probability
    if doubt and tracked.pose is not None:
        probability = min(probability, 0.5)
        tracked = dataclasses.replace(tracked, reason=doubt)
    return dataclasses.replace(tracked, probability=probability)


def _without_open_gaps(track, fps):
    """The track with only those predictions that bridge a short gap between tracked frames."""
    is_tracked = [tracked.status == "tracked" for tracked in track]
    changes = np.flatnonzero(np.diff([True, *is_tracked, True]))  # gaps start and end there

    track = list(track)
    for start, end in zip(changes[::2], changes[1::2]):
        is_inside = start > 0 and end < len(track)
        longest = MAX_GAP_SECONDS + 1.5 / fps
        if is_inside and track[end].seconds - track[start - 1].seconds <= longest:
            continue
        for index in range(start, end):
            missing = track[index]
            track[index] = TrackedPose("lost", missing.seconds, reason=missing.reason)
    return track


def summary(track: Sequence[TrackedPose]) -> str:
    """Return a line that says how many frames of a track are tracked, predicted and lost.

    It also says in how many frames the starts disagree, and a second target was seen, if in any,
    and which focal length fits where that of K is wrong.

    Args:
        track: one `TrackedPose` a frame.
    """
    counts = collections.Counter(tracked.status for tracked in track)
    parts = [f"{counts[status]} {status}" for status in ("tracked", "predicted", "lost")]

    doubted = sum(tracked.status == "tracked" and bool(tracked.reason) for tracked in track)
    if doubted:
        parts.append(f"the starts disagree in {doubted}")

    with_second = sum(tracked.second_target is not None for tracked in track)
    if with_second:
        parts.append(f"a second target in sight in {with_second}")
    lens = getattr(track, "lens", None)
    if lens is not None and lens.verdict == "wrong":
        parts.append(f"the focal length fits {lens.focal:.1f} mm")
    return f"{len(track)} frames: {', '.join(parts)}"


# ------------------------------------------------------------ the command


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; ends with one line on the error stream where something is wrong.

    Args:
        arguments: words of the command, or None for those of the shell.
    """
    options = _parse(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            track = _track_to_files(options)
    except (OSError, ValueError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    print(f"{options.out}: {summary(track)}")


def _print_warning(message, *_, **__):
    """Print a warning as a line on the error stream."""
    print(f"warning: {message}", file=sys.stderr)


def _parse(arguments):
    parser = argparse.ArgumentParser(
        "python -m xwing.tracking",
        description="Follow an object through a clip; writes track.csv, track.json, track.usdc "
        "and overlay.mp4.",
    )
    parser.add_argument("source", type=Path, help="a video, a GIF or a folder of frames")
    parser.add_argument(
        "--target", type=Path, required=True, metavar="FILE", help="a mesh, or a target's JSON file"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="is made if missing")
    parser.add_argument(
        "--start",
        type=Path,
        metavar="FILE",
        help='{"frame": number from 0, "pose": 4 x 4, model to OpenCV camera}, or a list of them',
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of a network that finds it")
    parser.add_argument(
        "--fps", type=float, default=30.0, help="where the source does not say (default: 30)"
    )
    lens = parser.add_mutually_exclusive_group()
    lens.add_argument(
        "--focal",
        type=float,
        metavar="MM",
        help="of a 36 mm sensor (default: what a scene of BOP says, else 35)",
    )
    lens.add_argument(
        "--camera",
        type=Path,
        metavar="FILE",
        help='{"K": 3 x 3, "width", "height", optional "distortion": k1 k2 p1 p2 ...}',
    )
    return parser.parse_args(arguments)


def _track_to_files(options):
    """The track that the command line asks for, once its files are written."""
    if options.start is None and options.weights is None:
        raise ValueError(
            "nothing finds the target: give --start (a pose that you know), "
            "--weights (of a trained network), or both"
        )
    if options.out.exists() and not options.out.is_dir():
        raise FileExistsError(f"--out: expected a folder, got the file {options.out}")

    is_model = bop.is_model(options.target)
    target = bop.load_model(options.target) if is_model else xu.load_target(options.target)
    starts = {} if options.start is None else read_starts(options.start)
    clip = Clip(options.source)
    K = _camera(options, clip)
    fps = clip.fps or options.fps
    detector = None if options.weights is None else Detector(options.weights)
    aligner = Aligner(target)
    print(xu.describe_target(target, next(iter(starts.values()), None)))
    options.out.mkdir(parents=True, exist_ok=True)
    track = track_clip(clip, K, detector, aligner, fps, starts=starts)

    _write_track(options, clip, track, K, target, fps)
    pictures = _overlays(clip, track, K, target)
    write_clip(pictures, options.out / "overlay.mp4", fps, progress=True, count=clip.count)
    return track


def _camera(options, clip):
    """K (3, 3) of a clip, as the command line says, or a scene of BOP."""
    if options.camera is not None:
        return read_camera(options.camera, clip)
    if options.focal is None and clip.K is not None:
        return clip.K
    focal = DEFAULT_FOCAL if options.focal is None else options.focal
    return xu.lens_camera(clip.width, clip.height, focal)


def _write_track(options, clip, track, K, target, fps):
    """Write a track for other programs; a scene of BOP also gets its results."""
    for name in ("track.csv", "track.json", "track.usdc"):
        path = options.out / name
        try:
            export_track(path, track, K, clip.width, clip.height, target, clip, fps)
        except ModuleNotFoundError as error:  # the package that writes USD is optional
            warnings.warn(str(error), stacklevel=1)
    if bop.is_model(options.target) and bop.is_scene(options.source):
        scene, obj_id = (bop.number_of(path) for path in (options.source, options.target))
        rows = bop.result_rows(scene, clip.numbers, obj_id, track)
        bop.write_results(options.out / "bop.csv", rows)


def read_camera(path: str | Path, clip: Clip) -> np.ndarray:
    """Read the camera of a clip, and remove its distortion from the clip.

    Args:
        path: of a JSON file {"K": 3 x 3, "width", "height"}, and "distortion" (k1, k2, p1, p2, ...)
            if it is known. Other keys are ignored.
        clip: `Clip` that it has taken.

    Returns:
        K (3, 3), pixels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or is of frames of another size.
    """
    camera = xu.read_json(path)
    if not (isinstance(camera, dict) and {"K", "width", "height"} <= set(camera)):
        raise ValueError(f'{path}: expected {{"K": 3 x 3, "width": ..., "height": ...}}')

    if (camera["width"], camera["height"]) != (clip.width, clip.height):
        raise ValueError(
            f"{path}: is of frames of {camera['width']}x{camera['height']} pixels, "
            f"the clip has {clip.width}x{clip.height}; calibrate at this size"
        )
    try:
        K = xu.check_camera_matrix(camera["K"])
        if camera.get("distortion") is not None:
            clip.undistort(K, camera["distortion"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return K


def _overlays(clip, track, K, target) -> Iterator[np.ndarray]:
    """Yield each frame with its pose; one that cannot be read shows the last one before it."""
    image = np.zeros((clip.height, clip.width, 3), np.uint8)
    for frame, tracked in zip(clip, track):
        if frame.image is not None:
            image = frame.image
        yield draw_tracked(image, tracked, K, target)


if __name__ == "__main__":
    main()
