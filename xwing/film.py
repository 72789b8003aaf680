"""The shot: laser bolts, overlays, and the pictures written as GIF or MP4.

Every bolt keeps the course on which it was fired, whatever the ship does next. It is drawn as a tapered light
in perspective, hidden where the mesh lies before it; all that this needs of a frame is the ship's pose.
`animate` draws a finished track; `film` tracks, draws and writes in one pass, with constant memory.
"""

import collections
import dataclasses
import errno
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

import xwing_utils as xu
from xwing.footage import Clip, Frame, frames_at
from xwing.lasers import Lasers, _check_positive, _with_bolts

ENCODING, CLOCK = (
    {"preset": "veryfast", "crf": "17"},
    Fraction(1, 90_000),
)  # of x264; seconds that MP4s count
NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO


def animate(frames, poses, K, path, fps=25, source_fps=30, lasers=None, mesh=None, progress=False):
    """Write a clip with laser bolts, in real time: frames are left out or shown twice where rates differ.

    Args:
        frames: a `Clip`, or N images (H, W, 3) uint8 or paths. What cannot be read repeats the frame before.
        poses: N (4, 4) or None; a frame without a pose fires no bolts. K: (3, 3) camera matrix.
        path: `.gif` or `.mp4`; replaced only when the whole clip is made.
        fps: frames a second of the file; source_fps: of the frames, where they have no time stamps.
        lasers: `Lasers`, or None for the usual ones; mesh: `Mesh` or None, the hull that hides bolts.
    Raises:
        ValueError: numbers, a rate (in a GIF at most 100), a suffix or a first frame that will not do.
    """
    path, fps = _check_target(path, fps)
    _check_positive("source_fps", source_fps)
    K, frames = xu.check_camera_matrix(K), frames if isinstance(frames, Clip) else list(frames)
    count = frames.count if isinstance(frames, Clip) else len(frames)
    if count != len(poses) or not count:
        raise ValueError(
            f"expected a pose or None for each frame, got {count} frames and {len(poses)} poses"
        )
    poses = [
        p if p is None else xu.check_array(p, (4, 4), f"pose of frame {i}")
        for i, p in enumerate(poses)
    ]
    seconds = (
        frames.seconds if isinstance(frames, Clip) and frames.fps else np.arange(count) / source_fps
    )
    indices = frames_in_real_time(seconds, fps)
    shots = _shots(frames, poses, K, seconds, indices, lasers or Lasers(), mesh)
    write_clip(tqdm(shots, path.name, len(indices), unit="frame", disable=not progress), path, fps)


def frames_in_real_time(seconds, fps):
    """(T,) numbers of the frames, taken at `seconds` (N,), that a file of `fps` frames a second shows."""
    step = np.median(np.diff(seconds)) if len(seconds) > 1 else 1 / fps
    ticks = np.arange(
        0, seconds[-1] + step - 1e-9, 1 / fps
    )  # and some files tell the time in milliseconds
    return np.searchsorted(seconds, ticks + min(6e-4, step / 4), side="right") - 1


def _shots(frames, poses, K, seconds, indices, lasers, mesh):
    """Yield the chosen frames with their bolts; those that are left out count for the shot too."""
    shot, done, bolts = lasers.shot(), 0, None
    for i, image in zip(indices, frames_at(frames, indices)):
        for pose, moment in zip(poses[done : i + 1], seconds[done : i + 1]):
            bolts, done = shot.step(pose, moment), i + 1
        yield _with_bolts(image, bolts, lasers, mesh, poses[i], K)


def write_clip(pictures, path, fps=25):
    """Write pictures (H, W, 3) uint8 of one size as a `.gif` or `.mp4`, as `animate` does."""
    path, fps = _check_target(path, fps)
    with xu.part_files(path) as (part,):
        if path.suffix == ".gif":
            _write_gif(pictures, part, fps)
        else:
            _write_mp4(((picture, None) for picture in pictures), part, fps)


def _check_target(path, fps, suffixes=(".gif", ".mp4")):
    """The path of a clip to write and its true rate, or the error that would come in the end."""
    path = Path(path)
    if path.suffix not in suffixes:
        raise ValueError(f"{path}: expected a {' or '.join(suffixes)} file")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; give the name of a file to write")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path.parent}: no such folder to write {path.name} to; make it first"
        )
    if not 0 < fps < np.inf or (path.suffix == ".gif" and fps > 100):
        raise ValueError(
            f"fps: expected a positive rate, in a GIF at most 100 frames a second, got {fps}"
        )
    return path, 100 / round(100 / fps) if path.suffix == ".gif" else fps  # a GIF counts hundredths


def _write_gif(pictures, path, fps):
    """One palette for the whole clip, so that its colours do not flicker; it loops for ever."""
    pictures = list(pictures)
    if not pictures:
        raise ValueError("expected at least one picture, got none")
    sample = pictures[:: max(1, len(pictures) // 24)]
    palette = _clip_palette(np.concatenate([picture.reshape(-1, 3) for picture in sample]))
    first, *more = (
        Image.fromarray(p).quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures
    )
    first.save(
        path,
        "GIF",
        save_all=True,
        append_images=more,
        duration=round(1000 / fps),
        loop=0,
        disposal=1,
    )


def _clip_palette(pixels):
    """A PIL image with 256 colours for (N, 3) uint8 pixels: half for the few of ship and bolts."""
    warm = (pixels.max(1) > 130) | (pixels[:, 0] > pixels[:, 2].astype(int) + 8)
    strips = [Image.fromarray(part[None]) for part in (pixels[warm], pixels[~warm]) if len(part)]
    halves = [
        strip.quantize(128, Image.Quantize.MEDIANCUT).getpalette()[: 3 * 128] for strip in strips
    ]
    palette = Image.new("P", (1, 1))
    palette.putpalette(sum(halves, []))
    return palette


def _write_mp4(pictures, path, fps):
    """H.264 of pairs: a picture and the second from which it is seen, or None for the usual time."""
    now, shape = 0.0, None
    try:  # FFmpeg gets an open file, so that no name is a protocol
        with path.open("w+b") as file, av.open(file, "w", format="mp4") as container:
            stream = container.add_stream(
                "libx264", Fraction(fps).limit_denominator(10_000), ENCODING
            )
            stream.codec_context.time_base, stream.codec_context.thread_count = CLOCK, 2
            for picture, seconds in pictures:
                odd = [(0, side % 2) for side in picture.shape[:2]]  # H.264 takes even sizes only
                frame = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(np.pad(picture, [*odd, (0, 0)]))
                )
                if shape is None:
                    shape, stream.width, stream.height = picture.shape, frame.width, frame.height
                elif picture.shape != shape:
                    raise ValueError(
                        f"expected pictures of one size, got {shape} and then {picture.shape}"
                    )
                else:
                    now = now + 1 / fps if seconds is None else max(seconds, now + 1e-4)
                frame.pts, frame.time_base = round(now / CLOCK), CLOCK
                container.mux(stream.encode(frame))
            if shape is None:
                raise ValueError("expected at least one picture, got none")
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise error.__context__ or error from None  # what the file said


def film(clip, tracker, path, lasers=None, mesh=None, progress=True):
    """Track a clip and write it with its bolts as it is read: one pass, constant memory, clips of any length.

    Args:
        clip: `Clip`, or an iterable of `Frame`. Where reading it fails the film ends, and the track says why.
        tracker: has `K`, `fps` and `update(image, seconds)`, see `Tracker`.
        path: `.mp4`, replaced only when whole, its frames at their own times; lasers, mesh: see `animate`.
    Returns:
        list of `TrackedPose` without covariance and velocity; a warning where there is no room for the film.
    Raises:
        ValueError: another suffix, or no frame can be read. OSError: no such folder, not a file.
    """
    track, (path, fps) = (
        [],
        _check_target(path, getattr(clip, "fps", None) or tracker.fps, (".mp4",)),
    )
    bar = dict(
        desc="tracking", total=getattr(clip, "count", None), unit="frame", disable=not progress
    )
    pictures = iter(
        tqdm(_prefetch(_filmed(clip, tracker, fps, lasers or Lasers(), mesh, track)), **bar)
    )
    with threadpool_limits(
        1, "blas"
    ):  # frames are read, tracked, drawn and written at the same time
        try:
            with xu.part_files(path) as (part,):
                _write_mp4(pictures, part, fps)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            warnings.warn(f"not written: {error}", stacklevel=2)
            collections.deque(pictures, 0)  # the track is worth having without the film
    return track


def _filmed(clip, tracker, fps, lasers, mesh, track):
    """Yield each picture and its seconds, and put each `TrackedPose` on `track`."""
    shot, unread = lasers.shot(fps), []
    for image, seconds, tracked in _prefetch(
        _followed(_prefetch(_to_the_fault(clip)), tracker, fps)
    ):
        track.append(tracked)
        bolts, unread = shot.step(tracked.pose, seconds), [*unread, seconds]
        if image is not None:  # what could not be read at the start shows the first frame
            picture = _with_bolts(image, bolts, lasers, mesh, tracked.pose, tracker.K)
            yield from ((picture, moment) for moment in unread)
            unread = []


def _followed(frames, tracker, fps):
    """Yield the image of each frame, or the last one that could be read, its seconds and `TrackedPose`."""
    image = None
    for number, frame in enumerate(frames):
        if image is not None and frame.image is not None and frame.image.shape != image.shape:
            frame = Frame(
                None, frame.seconds, f"its shape is {frame.image.shape}, not {image.shape}"
            )
        seconds = number / fps if frame.seconds is None else frame.seconds
        tracked = tracker.update(frame.image, seconds)
        known = {"covariance": None, "velocity": None, "reason": frame.fault or tracked.reason}
        image = image if frame.image is None else frame.image
        yield image, seconds, dataclasses.replace(tracked, **known)


def _prefetch(items, ahead=2):
    """Yield what an iterable gives, made by a thread of its own while the one before is used."""
    items, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming = collections.deque(thread.submit(next, items, end) for _ in range(ahead))
        while (item := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, items, end))
            yield item


def _to_the_fault(clip):
    """The frames of a clip; an error while it is read becomes the fault of its last frame."""
    try:
        yield from clip
    except (OSError, ValueError, RuntimeError) as error:
        yield Frame(None, fault=f"the clip could not be read further: {error}")
