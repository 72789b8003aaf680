"""A finished clip: tracked from where it is most certain, and smoothed; from a shell, too.

The network looks at frames spread over the clip. From the most probable detection, or from the
starts that the user gives, a live `Tracker` follows the target on the pixels, forwards and
backwards. Where that part of the track ends, or where other detections contradict it, the next best
detection starts another part. Each frame belongs to the part that the detections around it support
best, and in the end the whole track is smoothed.

    python -m xwing.tracking CLIP --target MESH --start START --out DIR
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

import xwing_utils as xu
from xwing.alignment import Aligner
from xwing.detections import Witnesses, detect, detection_interval, difference, ranked
from xwing.detector import Detector
from xwing.export import export_track
from xwing.film import write_clip
from xwing.footage import Clip, frames_at
from xwing.lens import LensCheck, check_lens
from xwing.overlay import draw_tracked
from xwing.starts import read_starts
from xwing.tracker import (
    CONFIDENT_AGREEMENT,
    ENOUGH_CONTRAST,
    MAX_GAP_SECONDS,
    TrackedPose,
    Tracker,
    trust_features,
)

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

# Bytes of the frames of a clip that are kept at a time.
KEPT_BYTES = 2e8

# The lens is checked in so many frames: those of the clearest detections, or some near the starts.
LENS_FRAMES = 8
LENS_SECONDS = 0.5

# The probability of a pose falls by these factors. With a focal length that is wrong by 12 % or
# more, the distance of a target is wrong by more than a right pose may be.
LENS_PROBABILITY = {"confirmed": 1.0, "unknown": 0.7, "wrong": 0.05}

# Where no part leads, the network looks at frames that are so many seconds apart at last.
CLOSEST = 0.1

# Where no detection is probable enough alone, tracks are tried from so many of them, and one counts
# if so many detections agree with it.
DOUBTFUL_TRIED = 3
MIN_AGREEING = 3


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
    wrong, a warning says so, and the poses are improbable.

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
        for frame in _bar(clip, "tracking", getattr(clip, "count", None), progress):
            tracker.update(frame.image, frame.seconds, frame.fault)
        return Track(_without_open_gaps(tracker.smoothed(), fps))

    clip, count = _readable_again(clip)
    _check_frame_numbers(starts, count)
    film, detections = _look_through(clip, count, tracker, progress)
    lens = _check_lens(film, detections, starts)
    if lens.verdict == "wrong":
        warnings.warn(str(lens), stacklevel=2)

    parts = [_grow_from_start(film, starts, start) for start in sorted(starts)]
    parts, detections = _grow_from_detections(film, detections, parts)
    return _finish(film, parts, detections, lens)


def _bar(frames, words, count, progress):
    """The frames with a progress bar."""
    return tqdm(frames, words, count, unit="frame", disable=not progress)


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


# ------------------------------------------------------------ the frames


@dataclasses.dataclass(frozen=True)
class _Film:
    """The frames of a clip, which are read again as often as a track needs them."""

    clip: Iterable
    width: int  # pixels
    height: int
    seconds: list  # of each frame
    faults: list  # of each frame, why it cannot be read
    live: Tracker  # has K, fps, detector and aligner; it takes no frame
    progress: bool
    looked: set  # numbers of the frames that the network has seen

    def forwards(self, first, last):
        """Yield number and `Frame`, from the first to the last."""
        frames = itertools.islice(self.clip, first, last + 1)
        return enumerate(_bar(frames, "forwards", last + 1 - first, self.progress), first)

    def backwards(self, first, last):
        """Yield number and `Frame`, from the last to the first."""
        frames = _reversed_frames(self.clip, first, last)
        return _bar(frames, "backwards", last + 1 - first, self.progress)

    def new_tracker(self):
        """A `Tracker` that follows the target on the pixels alone."""
        return Tracker(self.live.K, self.live.fps, None, self.live.aligner)


def _readable_again(clip):
    """A clip that can be read more than once, a list where it is short; its number of frames."""
    is_read_once = iter(clip) is clip or not hasattr(clip, "count")
    if isinstance(clip, list) or is_read_once or _bytes(clip) <= KEPT_BYTES:
        clip = list(clip)
        return clip, len(clip)
    return clip, clip.count


def _bytes(clip):
    """The size of all frames of a `Clip`; infinite where it does not say."""
    return 3 * clip.count * getattr(clip, "width", np.inf) * getattr(clip, "height", np.inf)


def _look_through(clip, count, tracker, progress):
    """Read a clip once: its `_Film`, and the `Detection`s of every n-th frame."""
    interval = detection_interval(count, tracker.fps)
    wanted = range(interval // 2, count, interval) if tracker.detector is not None else ()
    seconds = []
    faults = []
    detections = []
    height, width = 0, 0
    for index, frame in enumerate(_bar(clip, "detecting", count, progress)):
        time = frame.seconds
        if time is None:
            time = seconds[-1] + 1 / tracker.fps if seconds else 0.0
        seconds.append(time)
        faults.append(frame.fault)
        if frame.image is not None:
            height, width = frame.image.shape[:2]
        if index in wanted and frame.image is not None:
            detections.append(detect(tracker, index, frame.image))
    film = _Film(clip, width, height, seconds, faults, tracker, progress, set(wanted))
    return film, detections


def _look_again(film, parts, interval):
    """The `Detection`s of every n-th frame in the long gaps between parts."""
    covered = {-1, len(film.seconds)}.union(*(part.poses for part in parts))
    longest = MAX_GAP_SECONDS * film.live.fps
    wanted = set()
    for before, after in itertools.pairwise(sorted(covered)):
        if after - before > longest:
            wanted.update(range(before + 1, after))
    wanted = {index for index in wanted if index % interval == 0} - film.looked
    film.looked.update(wanted)
    if not wanted:
        return []
    frames = film.forwards(min(wanted), max(wanted))
    return [
        detect(film.live, index, frame.image)
        for index, frame in frames
        if index in wanted and frame.image is not None
    ]


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
            count = max(1, int(KEPT_BYTES / image.nbytes))


# ------------------------------------------------------------ the lens


def _check_lens(film, detections, starts):
    """The `LensCheck` of the clearest detections, or else of what is tracked near the starts."""
    clear = ranked(one for one in detections if one is not None and one.probability > 0.5)
    poses = {one.index: one.estimate.pose for one in clear if _is_whole(film, one.estimate.pose)}
    poses = dict(itertools.islice(poses.items(), LENS_FRAMES))
    if len(poses) < LENS_FRAMES and starts:
        poses = _poses_near(film, starts)

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
        part = _grow_from_start(film, starts, start, max(start - reach, 0), last)
        poses |= {index: one for index, one in part.poses.items() if _is_whole(film, one)}
    numbers = sorted(poses)
    chosen = np.linspace(0, len(numbers) - 1, min(len(numbers), LENS_FRAMES)).round().astype(int)
    return {numbers[i]: poses[numbers[i]] for i in chosen}


def _is_whole(film, pose):
    """Whether the whole target is in sight at a pose."""
    corners = xu.project_pose(film.live.target.box, pose, film.live.K)
    return bool(xu.in_frame(corners, film.width, film.height).all())


# ------------------------------------------------------------ parts of a track


@dataclasses.dataclass
class _Part:
    """A track that grew from one frame in both directions."""

    start: int  # number of the frame
    is_given: bool  # whether the user knows the pose there
    estimates: dict  # {number of a frame: PoseEstimate}, accepted or not
    witnesses: Witnesses | None = None  # where the network found its start

    @functools.cached_property
    def poses(self):
        """{number of a frame: pose (4, 4)} of the accepted estimates."""
        return {index: one.pose for index, one in self.estimates.items() if one.accepted}

    @property
    def agreement(self):
        """The median local agreement of the accepted estimates; NaN where nothing was learnt."""
        accepted = [one.local_agreement for one in self.estimates.values() if one.accepted]
        return float(np.nanmedian(accepted)) if np.isfinite(accepted).any() else np.nan

    def rank(self, index):
        """How well it is founded near a frame, to compare: a start beats all detections."""
        if self.is_given:
            return 1, -abs(index - self.start)
        support, opposition = self.witnesses.support(index)
        return 0, support - opposition

    def is_founded(self, index):
        """Whether it has a pose in a frame that no more speaks against than for it."""
        return index in self.poses and (self.is_given or self.rank(index)[1] >= 0)

    def contests(self, other, index):
        """Whether it is founded at least half as well as another part of its kind in a frame."""
        if index not in self.poses or self.is_given != other.is_given:
            return False
        if self.is_given:
            return True
        return self.witnesses.support(index)[0] >= 0.5 * other.witnesses.support(index)[0]


def _grow(film, start, estimate, first, last, is_given):
    """The `_Part` that grows from an estimate in one frame, between two frames.

    One from a detection ends where the target is lost.
    """
    part = _Part(start, is_given, {})
    for frames in (film.forwards(start, last), film.backwards(first, start)):
        tracker = film.new_tracker()
        for index, frame in frames:
            seconds = abs(film.seconds[index] - film.seconds[start])
            if index == start:
                _begin(tracker, frame.image, estimate, seconds, is_given)
            elif tracker.update(frame.image, seconds, frame.fault).status == "lost":
                if not is_given:
                    break
            part.estimates[index] = tracker.steps[-1].estimate
    return part


def _begin(tracker, image, estimate, seconds, is_given):
    """Begin a track at an estimate. Where the mesh explains too little, the aligner learns."""
    if is_given or estimate.explained_contrast < ENOUGH_CONTRAST:
        tracker.start(image, estimate.pose, seconds)
    else:
        start = dataclasses.replace(estimate, accepted=True, log_likelihood_margin=np.inf)
        tracker.update_pose(start, seconds)


def _grow_from_start(film, starts, start, first=0, last=None):
    """The `_Part` of a start, up to the starts before and after it, or up to other frames."""
    last = len(film.seconds) - 1 if last is None else last
    first = max(first, *(index + 1 for index in starts if index < start), 0)
    last = min(last, *(index - 1 for index in starts if index > start), last)
    try:
        return _grow(film, start, xu.PoseEstimate(starts[start]), first, last, is_given=True)
    except ValueError as error:
        raise ValueError(f"starts, frame {start}: {error}") from None


def _grow_from_detections(film, detections, parts):
    """All parts, with those of detections where the given ones do not lead; all detections.

    The network looks again, and closer, where no part leads.
    """
    interval = detection_interval(len(film.seconds), film.live.fps)
    while True:
        detections = ranked(one for one in detections if one is not None)
        for part in parts:
            _hear_witnesses(film, part, detections)
        for detection in detections:
            is_open = not any(part.is_founded(detection.index) for part in parts)
            if detection.estimate.accepted and is_open:
                parts.append(_grow_from(film, detection, detections))

        interval //= 2
        if film.live.detector is None or interval < max(1, CLOSEST * film.live.fps):
            break
        detections += _look_again(film, parts, interval)

    if len(parts) == 0:
        parts += _grow_from_doubtful(film, detections)
    return parts, detections


def _grow_from(film, detection, detections):
    """The `_Part` that grows from a detection."""
    last = len(film.seconds) - 1
    part = _grow(film, detection.index, detection.estimate, 0, last, is_given=False)
    _hear_witnesses(film, part, detections)
    return part


def _hear_witnesses(film, part, detections):
    """Compare a part with the detections of the clip."""
    interval = detection_interval(len(film.seconds), film.live.fps)
    part.witnesses = Witnesses(detections, part.poses, film.live.target, interval)


def _grow_from_doubtful(film, detections):
    """The best `_Part` from detections of which none is probable enough alone, in a list.

    It counts only if it goes on looking like its first frame, and many detections agree with it.
    """
    parts = []
    for detection in detections:
        seen = any(_agrees(part, detection, film.live.target) for part in parts)
        if len(parts) < DOUBTFUL_TRIED and not seen:
            parts.append(_grow_from(film, detection, detections))
    confirmed = [part for part in parts if _is_confirmed(part)]
    best = max(confirmed, key=lambda part: len(part.poses) * part.agreement, default=None)
    return [] if best is None else [best]


def _agrees(part, detection, target):
    """Whether a part passes where a detection is."""
    pose = part.poses.get(detection.index)
    return pose is not None and not difference(pose, detection.estimate.pose, target)


def _is_confirmed(part):
    """Whether doubtful detections confirm one another by way of the track between them."""
    agree = part.witnesses.agree
    many = agree.sum() >= max(MIN_AGREEING, len(agree) / 2)
    return many and part.agreement > CONFIDENT_AGREEMENT


# ------------------------------------------------------------ the finished track


def _finish(film, parts, detections, lens):
    """The smoothed track that parts make together."""
    tracker = Tracker(film.live.K, film.live.fps, None, film.live.aligner, keep=True)
    seconds_targets = {one.index: one.second_target for one in detections}
    chosen = []
    doubts = []
    for index, seconds in enumerate(film.seconds):
        part, doubt = _choose(parts, index, film.live.target)
        chosen.append(part)
        doubts.append(doubt)
        tracker.second_target = seconds_targets.get(index, tracker.second_target)
        tracker.update_pose(_estimate(film, parts, part, index), seconds)

    track = _without_open_gaps(tracker.smoothed(), film.live.fps)
    track = Track(_doubted(*each, lens) for each in zip(track, chosen, doubts))
    track.lens = lens
    return track


def _choose(parts, index, target):
    """The `_Part` that is founded best in a frame, or None; and a doubt, or "".

    There is a doubt where another part that contests it differs.
    """
    founded = [part for part in parts if part.is_founded(index)]
    best = max(founded, key=lambda part: part.rank(index), default=None)
    for other in parts if best is not None else ():
        if other is best or not other.contests(best, index):
            continue
        differs = difference(best.poses[index], other.poses[index], target)
        if differs:
            first, second = sorted([best.start, other.start])
            return best, f"the tracks from frames {first} and {second} {differs}"
    return best, ""


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
        probability *= part.witnesses.probability
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
