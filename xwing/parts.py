"""Parts of a track: each grows from one frame of a clip, forwards and backwards.

A part begins at a pose that the user gives, or at a detection of the network, the most probable one
first. A live `Tracker` follows the target from there on the pixels alone. A part of a detection
ends where the target is lost, and the next best detection that it does not reach, or that
contradicts it, starts another part. Where no part leads, the network looks again. Each frame
belongs to the part that is founded best there: that of the nearest start, or else the one that most
detections around the frame agree with.
"""

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
from tqdm.auto import tqdm

import xwing_utils as xu
from xwing.detections import (
    Detection,
    TrackSupport,
    detect,
    detection_interval,
    difference,
    ranked,
)
from xwing.footage import Clock, Frame
from xwing.tracker import CONFIDENT_AGREEMENT, MAX_GAP_SECONDS, Tracker

# Bytes of the frames of a clip that are kept at a time.
KEPT_BYTES = 2e8

# Where no part leads, the network looks at frames that are so many seconds apart at last.
CLOSEST = 0.1

# The median contrast that the detections of a clip explain, from which nothing is learnt where a
# part begins. Detections are made where the target shows well, so a live track needs less.
EXPLAINS_ENOUGH = 0.77

# A part counts if at least one of the detections that agree with it is right with this probability.
# If not, the network looks at so many more of its frames.
MIN_FOUNDED = 0.95
MORE_LOOKS = 5

# Where no part counts, tracks are tried from so many detections that are at least this probable.
# The best one counts if so many detections agree with it, and half of those in its frames.
DOUBTFUL_TRIED = 3
MIN_DOUBTFUL = 0.3
MIN_AGREEING = 3


def frames_with_bar(
    frames: Iterable, words: str, count: int | None, progress: bool, leave: bool = True
) -> Iterator:
    """Yield frames, with a progress bar.

    Args:
        frames: of a clip.
        words: what is done.
        count: how many frames there are, if that is known.
        progress: whether the bar shows.
        leave: whether it stays at the end.
    """
    bar = tqdm(None, words, count, leave, unit="frame", disable=not progress)
    try:
        for frame in frames:
            yield frame
            bar.update()
    except GeneratorExit:
        bar.update((bar.total or bar.n) - bar.n)  # a track that ends early is finished, too
        raise
    finally:
        bar.refresh()  # the last frames may have come too fast to be drawn
        bar.close()


# ------------------------------------------------------------ the frames


@dataclasses.dataclass(frozen=True)
class Film:
    """The frames of a clip, which are read again as often as a track needs them."""

    clip: Iterable
    width: int  # pixels
    height: int
    seconds: list  # of each frame
    faults: list  # of each frame, why it cannot be read
    live: Tracker  # has K, fps, detector and aligner; it takes no frame
    progress: bool
    looked: set  # numbers of the frames that the network has seen

    def forwards(self, first: int, last: int) -> Iterator[tuple[int, Frame]]:
        """Yield numbers and frames, from the first to the last."""
        frames = enumerate(itertools.islice(self.clip, first, last + 1), first)
        return frames_with_bar(frames, "forwards", last + 1 - first, self.progress, leave=False)

    def backwards(self, first: int, last: int) -> Iterator[tuple[int, Frame]]:
        """Yield numbers and frames, from the last to the first."""
        frames = _reversed_frames(self.clip, first, last)
        return frames_with_bar(frames, "backwards", last + 1 - first, self.progress, leave=False)

    def new_tracker(self) -> Tracker:
        """Return a `Tracker` that follows the target on the pixels alone."""
        return Tracker(self.live.K, self.live.fps, None, self.live.aligner)


def readable_again(clip: Iterable) -> tuple[Iterable, int]:
    """Return a clip that can be read more than once, a list if it is short, and its length."""
    is_read_once = iter(clip) is clip or not hasattr(clip, "count")
    if isinstance(clip, list) or is_read_once or _bytes(clip) <= KEPT_BYTES:
        clip = list(clip)
        return clip, len(clip)
    return clip, clip.count


def _bytes(clip):
    """The size of all frames of a `Clip`; infinite where it does not say."""
    return 3 * clip.count * getattr(clip, "width", np.inf) * getattr(clip, "height", np.inf)


def look_through(
    clip: Iterable, count: int, tracker: Tracker, progress: bool
) -> tuple[Film, list[Detection]]:
    """Read a clip once, and look for the target in every n-th frame.

    Args:
        clip: see `readable_again`.
        count: number of its frames.
        tracker: `Tracker` with the detector, or with none; it takes no frame.
        progress: whether bars show.

    Returns:
        the `Film`, and the `Detection`s.
    """
    interval = detection_interval(count, tracker.fps)
    wanted = range(interval // 2, count, interval) if tracker.detector is not None else ()
    seconds = []
    faults = []
    detections = []
    height, width = 0, 0
    clock = Clock(tracker.fps)
    for index, frame in enumerate(frames_with_bar(clip, "detecting", count, progress)):
        seconds.append(clock.tick(frame.seconds))
        if clock.restarted:
            warnings.warn("the time stamps of the clip begin again", stacklevel=3)
        faults.append(frame.fault)
        if frame.image is not None:
            height, width = frame.image.shape[:2]
        if index in wanted and frame.image is not None:
            detections += detect(tracker, index, frame.image)
    film = Film(clip, width, height, seconds, faults, tracker, progress, set(wanted))
    return film, detections


def _look_again(film, parts, interval):
    """The `Detection`s of every n-th frame in the long gaps between parts."""
    covered = {-1, len(film.seconds)}.union(*(part.poses for part in parts))
    longest = MAX_GAP_SECONDS * film.live.fps
    wanted = set()
    for before, after in itertools.pairwise(sorted(covered)):
        if after - before > longest:
            wanted.update(range(before + 1, after))
    return _look_at(film, (index for index in wanted if index % interval == 0))


def _look_at(film, wanted):
    """The `Detection`s of some frames that the network has not seen yet."""
    wanted = set(wanted) - film.looked
    film.looked.update(wanted)
    detections = []
    if wanted:
        for index, frame in film.forwards(min(wanted), max(wanted)):
            if index in wanted and frame.image is not None:
                detections += detect(film.live, index, frame.image)
    return detections


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


# ------------------------------------------------------------ parts of a track


@dataclasses.dataclass
class Part:
    """A track that grew from one frame in both directions."""

    start: int  # number of the frame
    is_given: bool  # whether the user knows the pose there
    estimates: dict  # {number of a frame: PoseEstimate}, accepted or not
    support: TrackSupport | None = None  # where the network found its start

    @functools.cached_property
    def poses(self) -> dict:
        """{number of a frame: pose (4, 4)} of the accepted estimates."""
        return {index: one.pose for index, one in self.estimates.items() if one.accepted}

    @property
    def agreement(self) -> float:
        """The median local agreement of the accepted estimates; NaN where nothing was learnt."""
        accepted = [one.local_agreement for one in self.estimates.values() if one.accepted]
        return float(np.nanmedian(accepted)) if np.isfinite(accepted).any() else np.nan

    def rank(self, index: int) -> tuple[int, float]:
        """How well it is founded near a frame, to compare: a start beats all detections."""
        if self.is_given:
            return 1, -abs(index - self.start)
        support, opposition = self.support.around(index)
        return 0, support - opposition

    def is_founded(self, index: int) -> bool:
        """Whether it has a pose in a frame that no more speaks against than for it."""
        return index in self.poses and (self.is_given or self.rank(index)[1] >= 0)

    def contests(self, other: "Part", index: int) -> bool:
        """Whether it is founded at least half as well as another part of its kind in a frame."""
        if index not in self.poses or self.is_given != other.is_given:
            return False
        if self.is_given:
            return True
        return self.support.around(index)[0] >= 0.5 * other.support.around(index)[0]


def _grow(film, start, estimate, first, last, is_given, learns=True):
    """The `Part` that grows from an estimate in one frame, between two frames.

    One from a detection ends where the target is lost. The target is learnt where it starts, or not
    before the track is old.
    """
    part = Part(start, is_given, {})
    for frames in (film.forwards(start, last), film.backwards(first, start)):
        tracker = film.new_tracker()
        for index, frame in frames:
            seconds = abs(film.seconds[index] - film.seconds[start])
            if index == start:
                _begin(tracker, frame.image, estimate, seconds, learns)
            elif tracker.update(frame.image, seconds, frame.fault).status == "lost":
                if not is_given:
                    break
            part.estimates[index] = tracker.steps[-1].estimate
    return part


def _begin(tracker, image, estimate, seconds, learns):
    """Begin a track at an estimate, from which the aligner learns or not."""
    if learns:
        tracker.start(image, estimate.pose, seconds)
    else:
        start = dataclasses.replace(estimate, accepted=True, log_likelihood_margin=np.inf)
        tracker.update_pose(start, seconds)


def grow_from_start(
    film: Film, starts: dict, start: int, first: int = 0, last: int | None = None
) -> Part:
    """Return the `Part` of a start, up to the starts before and after it, or up to other frames.

    Args:
        film: `Film`.
        starts: {number of a frame: pose (4, 4)}.
        start: the number of the frame in which the part begins.
        first: number of the first frame at most.
        last: number of the last frame at most; None: that of the clip.

    Raises:
        ValueError: no track can begin there.
    """
    last = len(film.seconds) - 1 if last is None else last
    first = max(first, *(index + 1 for index in starts if index < start), 0)
    last = min(last, *(index - 1 for index in starts if index > start), last)
    try:
        return _grow(film, start, xu.PoseEstimate(starts[start]), first, last, is_given=True)
    except ValueError as error:
        raise ValueError(f"starts, frame {start}: {error}") from None


def grow_from_detections(
    film: Film, detections: list[Detection], given: list[Part]
) -> tuple[list[Part], list[Detection]]:
    """Grow parts from detections where the given ones do not lead.

    Where no part leads the network looks again, and closer.

    Args:
        film: `Film`.
        detections: of its first look.
        given: `Part`s from starts.

    Returns:
        all `Part`s that count, and all detections.
    """
    parts = list(given)
    interval = detection_interval(len(film.seconds), film.live.fps)
    while True:
        for detection in ranked(detections):
            is_open = not any(part.is_founded(detection.index) for part in parts)
            if detection.estimate.accepted and is_open:
                parts.append(_grow_from(film, detection, detections))
                detections += _look_within(film, parts[-1])
                _find_support(film, parts, detections)

        interval //= 2
        if film.live.detector is None or interval < max(1, CLOSEST * film.live.fps):
            break
        detections += _look_again(film, parts, interval)
        _find_support(film, parts, detections)

    parts = [part for part in parts if part.is_given or part.support.probability >= MIN_FOUNDED]
    if not parts:
        parts = _grow_from_doubtful(film, detections)
    return parts, detections


def _grow_from(film, detection, detections):
    """The `Part` that grows from a detection; an empty one where no track can begin."""
    last = len(film.seconds) - 1
    learns = not _explains_enough(detections)
    try:
        part = _grow(film, detection.index, detection.estimate, 0, last, False, learns)
    except ValueError:
        part = Part(detection.index, False, {})
    _find_support(film, [part], detections)
    return part


def _explains_enough(detections):
    """Whether the plain mesh explains so much that key frames would only add their own errors."""
    explained = [one.estimate.explained_contrast for one in detections if one.estimate.accepted]
    return bool(explained) and np.median(explained) >= EXPLAINS_ENOUGH


def _look_within(film, part):
    """More `Detection`s in the frames of a part that too few detections agree with."""
    if part.support.probability >= MIN_FOUNDED or not part.poses:
        return []
    numbers = sorted(part.poses)
    places = np.linspace(0, len(numbers) - 1, MORE_LOOKS).round().astype(int)
    return _look_at(film, (numbers[place] for place in places))


def _find_support(film, parts, detections):
    """Compare parts with the detections of the clip."""
    interval = detection_interval(len(film.seconds), film.live.fps)
    for part in parts:
        part.support = TrackSupport(detections, part.poses, film.live.target, interval)


def _grow_from_doubtful(film, detections):
    """The best `Part` from detections of which none is probable enough alone, in a list.

    It counts only if it goes on looking like its first frame, and many detections agree with it.
    """
    parts = []
    for detection in ranked(detections):
        is_seen = any(_agrees(part, detection, film.live.target) for part in parts)
        is_possible = detection.probability >= MIN_DOUBTFUL and len(parts) < DOUBTFUL_TRIED
        if is_possible and not is_seen:
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
    agree = part.support.agree
    many = agree.sum() >= max(MIN_AGREEING, len(agree) / 2)
    return many and part.agreement > CONFIDENT_AGREEMENT


def choose_part(parts: list[Part], index: int, target: xu.Target) -> tuple[Part | None, str]:
    """Return the `Part` that is founded best in a frame, or None, and a doubt, or "".

    There is a doubt where another part that contests it differs.

    Args:
        parts: `Part`s of a clip.
        index: number of the frame.
        target: `Target`.
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
