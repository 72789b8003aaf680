"""The shot: frames with their laser bolts, written as GIF or MP4.

Bolts need nothing but the target's pose in each frame. `animate` takes the poses of a finished
track, draws the bolts and writes a file that plays in real time, whatever its frame rate. `film`
tracks, draws and writes in one pass: reading, tracking, drawing and encoding run at the same time,
each in a thread of its own. A thread works a frame or two ahead of the next one, so that memory
stays constant however long the clip is. A file is replaced only when it is whole.
"""

import collections
import dataclasses
import errno
import warnings
from collections.abc import Iterable, Sequence
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
from xwing.lasers import Lasers, check_positive, draw_shot
from xwing.mesh import Mesh

ENCODING = {"preset": "veryfast", "crf": "17"}  # of x264
CLOCK = Fraction(1, 90_000)  # seconds, the unit in which an MP4 file counts time
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

PALETTE_PICTURES = 24  # so many pictures of a GIF, about, are sampled for its palette


# ------------------------------------------------------------ a finished track


def animate(
    frames: Clip | Iterable,
    poses: Sequence,
    K: np.ndarray,
    path: str | Path,
    fps: float = 25,
    source_fps: float = 30,
    lasers: Lasers | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
    target: xu.Target = xu.XWING,
) -> None:
    """Write a clip with laser bolts, in real time.

    Where the rates of the frames and of the file differ, frames are left out or shown twice.

    Args:
        frames: a `Clip`, or N images (H, W, 3) uint8 or paths. A frame that cannot be read is
            replaced by the frame before it.
        poses: N poses (4, 4), model -> OpenCV camera, or None; a frame without a pose fires no
            bolts.
        K: (3, 3) camera matrix.
        path: `.gif` or `.mp4`; replaced only when the whole clip is made.
        fps: frames a second of the file.
        source_fps: frames a second of `frames`, where they have no time stamps.
        lasers: settings of the bolts, or None for the usual ones.
        mesh: the hull that hides bolts, or None.
        progress: show a progress bar.
        target: whose cannons fire; a target without lasers fires none.
    Raises:
        ValueError: a rate is not positive, that of a GIF is above 100, the suffix is another, the
            numbers of frames and poses differ, or no frame can be read.
        OSError: the path is a folder, its folder is missing, or there is no room.
    """
    path, fps = _check_output(path, fps)
    check_positive("source_fps", source_fps)
    K = xu.check_camera_matrix(K)

    if not isinstance(frames, Clip):
        frames = list(frames)
    count = frames.count if isinstance(frames, Clip) else len(frames)
    poses = _check_poses(poses, count)

    has_times = isinstance(frames, Clip) and frames.fps
    seconds = frames.seconds if has_times else np.arange(count) / source_fps
    indices = frames_in_real_time(seconds, fps)

    lasers = lasers or Lasers()
    shot = lasers.shot(target=target)
    pictures = (
        draw_shot(image, bolts, lasers, mesh, pose, K, target)
        for image, bolts, pose in _shown_frames(frames, poses, seconds, indices, shot)
    )
    write_clip(pictures, path, fps, progress, len(indices))


def _check_poses(poses, count):
    """A list of poses (4, 4) or None; raise ValueError if they do not fit the frames."""
    if count != len(poses) or not count:
        raise ValueError(
            f"expected a pose or None for each frame, got {count} frames and {len(poses)} poses"
        )
    return [
        pose if pose is None else xu.check_array(pose, (4, 4), f"pose of frame {i}")
        for i, pose in enumerate(poses)
    ]


def frames_in_real_time(seconds: Sequence[float], fps: float) -> np.ndarray:
    """Choose the frames that a file shows at its own rate.

    Args:
        seconds: (N,) when each frame was taken, rising.
        fps: frames a second of the file.
    Returns:
        (T,) numbers of the frames. The last frame is shown for the median time between two frames.
    """
    step = np.median(np.diff(seconds)) if len(seconds) > 1 else 1 / fps
    ticks = np.arange(0, seconds[-1] + step - 1e-9, 1 / fps)

    # Some files round their time stamps to milliseconds, which may make a frame 0.5 ms late.
    tolerance = min(6e-4, step / 4)
    return np.searchsorted(seconds, ticks + tolerance, side="right") - 1


def _shown_frames(frames, poses, seconds, indices, shot):
    """Yield image, bolts and pose of each chosen frame; the shot steps through all frames."""
    due = 0  # number of the frame to which the shot has to step next
    bolts = None
    for i, image in zip(indices, frames_at(frames, indices)):
        while due <= i:
            bolts = shot.step(poses[due], seconds[due])
            due += 1
        yield image, bolts, poses[i]


# ------------------------------------------------------------ files


def write_clip(
    pictures: Iterable[np.ndarray],
    path: str | Path,
    fps: float = 25,
    progress: bool = False,
    count: int | None = None,
) -> None:
    """Write pictures as a GIF or MP4 file.

    Args:
        pictures: (H, W, 3) uint8 of one size.
        path: `.gif` or `.mp4`; replaced only when the whole clip is made.
        fps: frames a second of the file. In a GIF a frame lasts whole hundredths of a second.
        progress: show a progress bar.
        count: number of pictures, for the bar; None: their length, if they have one.
    Raises:
        ValueError: the suffix or the rate is not possible, there is no picture, or the sizes of
            pictures differ.
        OSError: the path is a folder, its folder is missing, or there is no room.
    """
    path, fps = _check_output(path, fps)
    pictures = tqdm(pictures, path.name, count, unit="frame", disable=not progress)
    with xu.part_files(path) as (part,):
        if path.suffix == ".gif":
            _write_gif(pictures, part, fps, progress)
        else:
            _write_mp4(((picture, None) for picture in pictures), part, fps)


def _check_output(path, fps, suffixes=(".gif", ".mp4")):
    """The path of a clip to write and the rate that its file can have.

    It raises, before any work, the errors that writing would end with.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise ValueError(f"{path}: expected a {' or '.join(suffixes)} file")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; give the name of a file to write")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path.parent}: no such folder to write {path.name} to; make it first"
        )

    gif = path.suffix == ".gif"
    if not 0 < fps < np.inf or (gif and fps > 100):
        raise ValueError(
            f"fps: expected a positive rate, in a GIF at most 100 frames a second, got {fps}"
        )
    if gif:
        fps = 100 / round(100 / fps)  # a frame lasts whole hundredths of a second
    return path, fps


def _write_gif(pictures, path, fps, progress):
    """Write a GIF that loops for ever; one palette for the whole clip avoids flicker."""
    pictures = list(pictures)
    if not pictures:
        raise ValueError("expected at least one picture, got none")

    sample = pictures[:: max(1, len(pictures) // PALETTE_PICTURES)]
    palette = _clip_palette(np.concatenate([picture.reshape(-1, 3) for picture in sample]))

    bar = tqdm(pictures, "GIF colours", unit="frame", disable=not progress)
    quantised = (
        Image.fromarray(picture).quantize(palette=palette, dither=Image.Dither.NONE)
        for picture in bar
    )
    first = next(quantised)
    first.save(
        path,
        "GIF",
        save_all=True,
        append_images=quantised,
        duration=round(1000 / fps),
        loop=0,
        disposal=1,
    )


def _clip_palette(pixels):
    """A PIL image with a palette of 256 colours for pixels (N, 3) uint8.

    The target and its bolts fill few pixels of most frames, and a common palette would leave few
    colours to them. So one half of the colours is for bright or reddish pixels, the other for all
    others.
    """
    warm = (pixels.max(1) > 130) | (pixels[:, 0] > pixels[:, 2].astype(int) + 8)

    colours = []
    for part in (pixels[warm], pixels[~warm]):
        if len(part):
            strip = Image.fromarray(part[None]).quantize(128, Image.Quantize.MEDIANCUT)
            colours += strip.getpalette()[: 3 * 128]

    palette = Image.new("P", (1, 1))
    palette.putpalette(colours)
    return palette


def _write_mp4(pictures, path, fps):
    """Write an H.264 file of pairs, see `_encode`."""
    try:
        # FFmpeg gets an open file, so that it cannot read the name as a protocol.
        with path.open("w+b") as file, av.open(file, "w", format="mp4") as container:
            _encode(pictures, container, fps)
    except av.FFmpegError as error:
        raise error.__context__ or error from None  # what the file system said, where it did


def _encode(pictures, container, fps):
    """Encode pairs into an open file: a picture, and the second from which it is shown.

    In place of a second, None means one frame later than the last picture. The first picture is
    shown from the beginning, whatever its second.
    """
    stream = container.add_stream("libx264", Fraction(fps).limit_denominator(10_000), ENCODING)
    stream.codec_context.time_base = CLOCK
    stream.codec_context.thread_count = 2

    shape = None
    now = 0.0
    for picture, seconds in pictures:
        frame = _even_frame(picture)
        if shape is None:
            shape = picture.shape
            stream.width = frame.width
            stream.height = frame.height
        elif picture.shape != shape:
            raise ValueError(f"expected pictures of one size, got {shape} and then {picture.shape}")
        elif seconds is None:
            now += 1 / fps
        else:
            now = max(seconds, now + 1e-4)  # H.264 needs rising times, also where a clock runs back

        frame.pts = round(now / CLOCK)
        frame.time_base = CLOCK
        container.mux(stream.encode(frame))

    if shape is None:
        raise ValueError("expected at least one picture, got none")
    container.mux(stream.encode())


def _even_frame(picture):
    """A picture (H, W, 3) as a frame of PyAV; a black line makes odd sizes even, for H.264."""
    height, width = picture.shape[:2]
    padded = np.pad(picture, [(0, height % 2), (0, width % 2), (0, 0)])
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(padded))


# ------------------------------------------------------------ one pass


def film(
    clip: Clip | Iterable[Frame],
    tracker,
    path: str | Path,
    lasers: Lasers | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> list:
    """Track a clip and write it with its bolts while it is read: one pass, constant memory.

    Args:
        clip: `Clip`, or an iterable of `Frame`. If reading it fails, the film ends there, and the
            last pose of the track gives the reason.
        tracker: has `K`, `fps`, `target` and `update(image, seconds)`, see `Tracker`.
        path: `.mp4`; replaced only when it is whole. Each frame is shown at its own time.
        lasers: settings of the bolts, or None for the usual ones.
        mesh: the hull that hides bolts, or None.
        progress: show a progress bar.
    Returns:
        list of `TrackedPose`, without covariance and velocity. If there is no room for the film, a
        warning says so, and the track is complete nevertheless.
    Raises:
        ValueError: the suffix is another, or no frame can be read.
        OSError: the path is a folder, or its folder is missing.
    """
    fps = getattr(clip, "fps", None) or tracker.fps
    path, fps = _check_output(path, fps, (".mp4",))

    track = []
    pictures = _prefetch(_film_pictures(clip, tracker, fps, lasers or Lasers(), mesh, track))
    count = getattr(clip, "count", None)
    pictures = iter(tqdm(pictures, "tracking", count, unit="frame", disable=not progress))

    # The stages of the pass run in threads of their own, with which those of BLAS would compete.
    with threadpool_limits(1, "blas"):
        try:
            with xu.part_files(path) as (part,):
                _write_mp4(pictures, part, fps)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            warnings.warn(f"not written: {error}", stacklevel=2)
            collections.deque(pictures, 0)  # runs to the end, for the track
    return track


def _film_pictures(clip, tracker, fps, lasers, mesh, track):
    """Yield each picture and its second, and append each `TrackedPose` to `track`."""
    shot = lasers.shot(fps, tracker.target)
    tracked_frames = _tracked_frames(_prefetch(_until_error(clip)), tracker, fps)

    waiting = []  # seconds at which the next picture is due; several before the first image
    for image, seconds, tracked in _prefetch(tracked_frames):
        track.append(tracked)
        bolts = shot.step(tracked.pose, seconds)
        waiting.append(seconds)
        if image is None:
            continue

        picture = draw_shot(image, bolts, lasers, mesh, tracked.pose, tracker.K, tracker.target)
        for moment in waiting:
            yield picture, moment
        waiting = []


def _tracked_frames(frames, tracker, fps):
    """Yield the image of each frame, its second and its `TrackedPose`.

    In place of a frame that cannot be read, or has another size, comes the last image before it;
    None before the first.
    """
    image = None
    for number, frame in enumerate(frames):
        readable = frame.image is not None
        if readable and image is not None and frame.image.shape != image.shape:
            fault = f"its shape is {frame.image.shape}, not {image.shape}"
            frame = Frame(None, frame.seconds, fault)

        seconds = number / fps if frame.seconds is None else frame.seconds
        tracked = tracker.update(frame.image, seconds)
        tracked = dataclasses.replace(
            tracked, covariance=None, velocity=None, reason=frame.fault or tracked.reason
        )

        image = image if frame.image is None else frame.image
        yield image, seconds, tracked


def _prefetch(items, ahead=2):
    """Yield the items of an iterable, which a thread of its own makes ahead of their use."""
    items = iter(items)
    end = object()
    with ThreadPoolExecutor(1) as thread:
        coming = collections.deque(thread.submit(next, items, end) for _ in range(ahead))
        while True:
            item = coming.popleft().result()
            if item is end:
                return
            coming.append(thread.submit(next, items, end))
            yield item


def _until_error(clip):
    """The frames of a clip; an error while it is read becomes the fault of its last frame."""
    try:
        yield from clip
    except (OSError, ValueError, RuntimeError) as error:
        yield Frame(None, fault=f"the clip could not be read further: {error}")
