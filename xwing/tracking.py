"""A finished clip: tracked forwards and backwards, and smoothed; from a shell, too.

A clip goes through a live `Tracker`. Where a track starts, it is also followed backwards, to the
frames that showed the target before the network was confident, or before the start that the user
gave. In the end the whole track is smoothed.

    python -m xwing.tracking CLIP --target MESH --start START --out DIR
"""

import argparse
import collections
import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

import xwing_utils as xu
from xwing.alignment import Aligner
from xwing.detector import Detector
from xwing.export import export_track
from xwing.film import write_clip
from xwing.footage import Clip
from xwing.motion import smooth
from xwing.overlay import draw_tracked
from xwing.starts import read_starts
from xwing.tracker import MAX_GAP_SECONDS, START_FRAMES, TrackedPose, Tracker, trust_features

__all__ = [
    "TrackedPose",
    "Tracker",
    "export_track",
    "read_camera",
    "read_starts",
    "summary",
    "track_clip",
    "trust_features",
]

# Bytes of the frames that are kept at a time where a clip is read backwards.
BACKWARD_BYTES = 2e8

# Two poses of one frame that are right, within 5 degrees and 0.106 diameters each, differ by no
# more than this: degrees, and diameters.
MAX_DISAGREEMENT_TURN = 10.0
MAX_DISAGREEMENT_SHIFT = 0.21285


def track_clip(
    clip: Iterable,
    K: np.ndarray,
    detector=None,
    aligner=None,
    fps: float | None = None,
    progress: bool = True,
    starts: dict | None = None,
) -> list[TrackedPose]:
    """Track a finished clip; the track is forward-backward smoothed.

    Args:
        clip: `Clip`, or another iterable of `Frame`; with starts it is read more than once.
        K: (3, 3) camera matrix, pixels.
        detector: see `Tracker`; None: there are starts.
        aligner: see `Tracker`.
        fps: frames a second where the clip does not say.
        progress: show a bar.
        starts: {number of a frame: pose (4, 4)} that the user knows. The target is followed from
            each one forwards and backwards. Between two starts, the nearer one counts. Where the
            tracks from both differ, `reason` says so, and the probability is at most one half.

    Returns:
        list of N `TrackedPose`. Frames in gaps of up to MAX_GAP_SECONDS between tracked frames are
        "predicted". Frames in longer gaps, before the first and after the last tracked frame are
        "lost" and have no pose.

    Raises:
        ValueError: a wrong K, fps that are not positive, a detector and an aligner of different
            targets, neither a detector nor starts, or a start where no track can begin.
    """
    starts = _check_starts(starts or {}, detector, aligner)
    fps = getattr(clip, "fps", None) or fps
    tracker = Tracker(K, fps, detector, aligner, keep=True)
    estimates = []
    recent_images = collections.deque(maxlen=round(MAX_GAP_SECONDS * fps) + START_FRAMES)
    if starts and iter(clip) is clip:
        clip = list(clip)  # it can be read only once

    count = len(clip) if isinstance(clip, list) else getattr(clip, "count", None)
    if count is not None:
        _check_frame_numbers(starts, count)
    for frame in tqdm(clip, "tracking", count, unit="frame", disable=not progress):
        index = len(estimates)
        if index in starts:
            tracked = _start(tracker, frame, index, starts[index])
        else:
            tracked = tracker.update(frame.image, frame.seconds, frame.fault)
        estimates.append(tracker.steps[-1].estimate)
        recent_images.append(frame.image)
        has_settled = tracked.status != "lost" and tracker.age == START_FRAMES
        is_found = index + 1 - START_FRAMES not in starts
        if has_settled and is_found and aligner is not None:
            _track_backwards(tracker, recent_images, estimates)

    _check_frame_numbers(starts, len(estimates))
    doubts = {}
    for index in sorted(starts):
        doubts |= _follow_backwards(tracker, clip, starts, index, estimates, progress)

    # With an aligner, estimates may have been replaced, so the filter runs again. Without one, none
    # was replaced, and only the live filter knows which tracks were dropped.
    if aligner is not None:
        tracker = _filter_again(tracker, estimates)
    track = _without_open_gaps(tracker.smoothed(), fps)
    return [_doubted(tracked, doubts.get(index)) for index, tracked in enumerate(track)]


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


def _start(tracker, frame, index, pose):
    """The `TrackedPose` of a frame in which the user gives the pose."""
    try:
        return tracker.start(frame.image, pose, frame.seconds)
    except ValueError as error:
        raise ValueError(f"starts, frame {index}: {error}") from None


def _follow_backwards(live, clip, starts, start, estimates, progress):
    """Follow a target back from a start to the one before, or to the clip's first frame.

    A second live tracker takes the frames in reverse order. Its estimates replace those that are
    missing, and those of frames that are nearer to this start than to the one before.

    Returns:
        {number of a frame: how the tracks from both starts differ there}, where they do.
    """
    before = max((index for index in starts if index < start), default=None)
    first = 0 if before is None else before + 1
    if first == start:
        return {}

    doubts = {}
    tracker = Tracker(live.K, live.fps, None, live.aligner)
    frames = _reversed_frames(clip, first, start)
    for index, frame in tqdm(
        frames, "backwards", start - first + 1, unit="frame", disable=not progress
    ):
        seconds = live.steps[start].seconds - live.steps[index].seconds
        if index == start:
            tracker.start(frame.image, starts[start], seconds)
            continue

        tracker.update(frame.image, seconds, frame.fault)
        found = tracker.steps[-1].estimate
        known = estimates[index]
        if not found.accepted:
            continue

        if before is not None and known.accepted:
            difference = _difference(known.pose, found.pose, live.target)
            if difference:
                doubts[index] = f"the tracks from frames {before} and {start} {difference}"
        is_nearer = before is None or start - index < index - before
        if is_nearer or not known.accepted:
            estimates[index] = found

    return doubts


def _difference(one, other, target):
    """How two poses differ, in words; empty where both may be right."""
    equivalent = [other @ symmetry for symmetry in target.symmetries]
    turn = min(xu.rotation_error(one, pose) for pose in equivalent)
    centre = np.append(target.box.mean(0), 1)
    shift = np.linalg.norm((one - other)[:3] @ centre) / target.diameter
    if turn <= MAX_DISAGREEMENT_TURN and shift <= MAX_DISAGREEMENT_SHIFT:
        return ""
    return f"differ by {turn:.0f} degrees and {shift:.2f} diameters"


def _doubted(tracked, doubt):
    """A `TrackedPose` of which two starts disagree: at most one of them is right."""
    if doubt is None or tracked.pose is None:
        return tracked
    return dataclasses.replace(tracked, probability=min(tracked.probability, 0.5), reason=doubt)


def _reversed_frames(clip, first, last):
    """Yield number and `Frame`, from the last to the first; a clip is read forwards, in parts."""
    end = last + 1
    count = 1
    while end > first:
        begin = max(first, end - count)
        frames = list(itertools.islice(clip, begin, end))
        yield from zip(reversed(range(begin, end)), reversed(frames))

        end = begin
        image = frames[-1].image
        if image is not None:
            count = max(1, int(BACKWARD_BYTES / image.nbytes))


def _track_backwards(tracker, recent_images, estimates):
    """Follow a target back from where its track has started, while the pixels confirm it.

    Entries of `estimates` that were not accepted, or that explain less of their frames, are
    replaced. `recent_images` are those of the last frames, the START_FRAMES of the new track among
    them.
    """
    steps = list(tracker.steps)
    start = len(steps) - START_FRAMES
    smoothed = smooth([step.filtered for step in steps[start:]])[0]
    # The way back is a new track: it has the smoothed velocity, but the covariance of a start.
    motion = tracker.model.start(smoothed.pose, smoothed.covariance[:6, :6])
    motion = dataclasses.replace(motion, velocity=smoothed.velocity)

    seconds = steps[start].seconds
    usual_contrast = steps[start].estimate.explained_contrast
    first = len(steps) - len(recent_images)
    for index in reversed(range(first, start)):
        image = recent_images[index - first]
        if image is None:
            break

        earlier = steps[index].seconds
        predicted, _ = tracker.model.predict(motion, earlier - seconds)
        estimate = tracker.align(image, predicted, usual_contrast)
        if not (estimate.accepted and _is_better(estimate, estimates[index])):
            break

        motion = predicted.updated(estimate.pose, estimate.covariance)
        seconds = earlier
        estimates[index] = estimate


def _is_better(estimate, known):
    """Whether an accepted estimate should replace the known one."""
    return not known.accepted or estimate.explained_contrast > known.explained_contrast


def _filter_again(live, estimates):
    """A new tracker after a clip's final estimates, at the times of the live one's frames."""
    tracker = Tracker(live.K, live.fps, live.detector, live.aligner, keep=True)
    for estimate, step in zip(estimates, live.steps):
        tracker.second_target = step.second_target
        tracker.update_pose(estimate, step.seconds)
    return tracker


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

    It also says in how many frames the starts disagree, and a second target was seen, if in any.

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
    return f"{len(track)} frames: {', '.join(parts)}"


# ------------------------------------------------------------ the command


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; ends with one line on the error stream where something is wrong.

    Args:
        arguments: words of the command, or None for those of the shell.
    """
    options = _parse(arguments)
    try:
        track = _track_to_files(options)
    except (OSError, ValueError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    print(f"{options.out}: {summary(track)}")


def _parse(arguments):
    parser = argparse.ArgumentParser(
        "python -m xwing.tracking",
        description="Follow an object through a clip; writes track.csv, track.json, overlay.mp4.",
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
        "--focal", type=float, default=35.0, metavar="MM", help="of a 36 mm sensor (default: 35)"
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

    target = xu.load_target(options.target)
    starts = {} if options.start is None else read_starts(options.start)
    clip = Clip(options.source)
    if options.camera is None:
        K = xu.lens_camera(clip.width, clip.height, options.focal)
    else:
        K = read_camera(options.camera, clip)

    fps = clip.fps or options.fps
    detector = None if options.weights is None else Detector(options.weights)
    aligner = Aligner(target)
    print(xu.describe_target(target, next(iter(starts.values()), None)))
    options.out.mkdir(parents=True, exist_ok=True)
    track = track_clip(clip, K, detector, aligner, fps, starts=starts)

    for name in ("track.csv", "track.json"):
        export_track(options.out / name, track, K, clip.width, clip.height)
    pictures = _overlays(clip, track, K, target)
    write_clip(pictures, options.out / "overlay.mp4", fps, progress=True, count=clip.count)
    return track


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
