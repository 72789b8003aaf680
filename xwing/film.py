"""The shot: frames with their laser bolts, written as GIF or MP4.

Bolts need nothing but the target's pose in each frame. `animate` takes the poses of a finished
track, draws the bolts and writes a file that plays in real time, whatever its frame rate. `film`
tracks, draws and writes in one pass: reading, tracking, drawing and encoding run at the same time,
each in a thread of its own. A thread works a frame or two ahead of the next one. A file is replaced
only when it is whole. However long the clip is, only a few pictures are in memory: those of a GIF,
whose palette is known only after the last one, wait on the disk in a video without losses.

`write_passes` writes the bolts and the mask of the hull on their own, for other programs.
"""

import collections
import contextlib
import dataclasses
import errno
import itertools
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from PIL import Image
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

import xwing_utils as xu
from xwing.footage import Clip, Clock, Frame, frames_at
from xwing.lasers import Lasers, draw_shot, hull_mask
from xwing.mesh import Mesh

ENCODING = {"preset": "veryfast", "crf": "17"}  # of x264
LOSSLESS = {"preset": "ultrafast", "qp": "0"}  # of x264, for RGB
CLOCK = Fraction(1, 90_000)  # seconds, the unit in which an MP4 file counts time
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

PALETTE_PICTURES = 24  # so many pictures of a GIF, about, are sampled for its palette
PALETTE_PIXELS = 2**23  # of these pictures, at most, are sampled
MAX_PAUSE = 1.0  # seconds for which a pause in the footage is shown


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

    Where the rates of the frames and of the file differ, frames are left out or shown twice. A
    pause between two frames of more than MAX_PAUSE seconds is shown for so long.

    Args:
        frames: a `Clip`, or N images (H, W, 3) uint8 or paths. A frame that cannot be read is
            replaced by the frame before it. One whose bolts cannot be drawn comes without them,
            with a warning.
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
    K, frames, poses, seconds = _checked(K, frames, poses, source_fps)
    indices = frames_in_real_time(seconds, fps)
    lasers = lasers or Lasers()
    shot = lasers.shot(target=target)
    pictures = (
        _draw(index, image, bolts, lasers, mesh, pose, K, target)
        for index, image, bolts, pose in _shown_frames(frames, poses, seconds, indices, shot)
    )
    write_clip(pictures, path, fps, progress, len(indices))


def _checked(K, frames, poses, source_fps):
    """K, frames, their poses and their times, once they are checked; pauses are shortened."""
    xu.check_positive("source_fps", source_fps)
    K = xu.check_camera_matrix(K)
    if not isinstance(frames, Clip):
        frames = list(frames)
    count = frames.count if isinstance(frames, Clip) else len(frames)
    poses = _check_poses(poses, count)

    has_times = isinstance(frames, Clip) and frames.fps
    seconds = frames.seconds if has_times else np.arange(count) / source_fps
    pauses = np.sum(np.diff(seconds) > MAX_PAUSE)
    if pauses:
        warnings.warn(
            f"the footage has pauses ({pauses}); each is shown for {MAX_PAUSE:g} s", stacklevel=3
        )
    return K, frames, poses, without_pauses(seconds)


def _draw(number, image, bolts, *others):
    """A frame with its bolts, see `draw_shot`, or without them if they cannot be drawn."""
    try:
        return draw_shot(image, bolts, *others)
    except (ValueError, ArithmeticError, cv2.error) as error:
        warnings.warn(f"frame {number} is shown without bolts: {error}", stacklevel=2)
        return image


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


def without_pauses(seconds: Sequence[float]) -> np.ndarray:
    """Shorten the pauses between frames to MAX_PAUSE.

    Args:
        seconds: (N,) when each frame was taken, rising.
    Returns:
        (N,) when each frame is shown.
    """
    excess = np.maximum(np.diff(seconds) - MAX_PAUSE, 0)
    return np.asarray(seconds, float) - np.concatenate([[0], excess.cumsum()])


def frames_in_real_time(seconds: Sequence[float], fps: float) -> np.ndarray:
    """Choose the frames that a file shows at its own rate, with pauses shortened to MAX_PAUSE.

    Args:
        seconds: (N,) when each frame was taken, rising from 0.
        fps: frames a second of the file.
    Returns:
        (T,) numbers of the frames. The last frame is shown for the median time between two frames.
    """
    seconds = without_pauses(seconds)
    step = np.median(np.diff(seconds)) if len(seconds) > 1 else 0
    step = step or 1 / fps  # of one frame, or where most frames have the same time
    ticks = np.arange(0, seconds[-1] + step - 1e-9, 1 / fps)

    # Some files round their time stamps to milliseconds, which may make a frame 0.5 ms late.
    tolerance = min(6e-4, step / 4)
    return np.searchsorted(seconds, ticks + tolerance, side="right") - 1


def _shown_frames(frames, poses, seconds, indices, shot):
    """Yield number, image, bolts and pose of each chosen frame; the shot steps through all."""
    due = 0  # number of the frame to which the shot has to step next
    bolts = None
    for i, image in zip(indices, frames_at(frames, indices)):
        while due <= i:
            bolts = shot.step(poses[due], seconds[due])
            due += 1
        yield i, image, bolts, poses[i]


# ------------------------------------------------------------ files


def write_clip(
    pictures: Iterable[np.ndarray],
    path: str | Path,
    fps: float = 25,
    progress: bool = False,
    count: int | None = None,
    encoding: dict | None = None,
) -> None:
    """Write pictures as a GIF or MP4 file.

    Args:
        pictures: (H, W, 3) uint8 of one size, see `xu.rgb_image`.
        path: `.gif` or `.mp4`; replaced only when the whole clip is made. An MP4 file has the
            colours of BT.709, and says so.
        fps: frames a second of the file. In a GIF a frame lasts whole hundredths of a second.
        progress: show a progress bar.
        count: number of pictures, for the bar; None: their length, if they have one.
        encoding: options of x264 for an MP4 file; None: ENCODING.
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
            kind = _mp4_format()._replace(options=encoding or ENCODING)
            _write_video(_without_times(pictures), part, fps, kind)


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
    with tempfile.TemporaryFile(dir=path.parent) as spool:
        _encode_file(_without_times(pictures), spool, fps, _SPOOL)
        count = sum(1 for _ in _packets(spool))
        palette = _clip_palette(_sampled_pixels(spool, count))
        bar = tqdm(_decoded(spool), "GIF colours", count, unit="frame", disable=not progress)
        _write_video(_without_times(bar), path, fps, _gif_format(palette))


def _without_times(pictures):
    """Pairs for `_encode`, of pictures that follow each other at a steady rate."""
    return ((picture, None) for picture in pictures)


def _packets(file):
    """Yield the packets of a video in an open file, one for each picture."""
    file.seek(0)
    with av.open(file) as container:
        yield from (packet for packet in container.demux(video=0) if packet.size)


def _decoded(file):
    """Yield the pictures (H, W, 3) uint8 of a video in an open file."""
    file.seek(0)
    with av.open(file) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def _sampled_pixels(file, count):
    """Pixels (N, 3) of some pictures of a video of `count`, at most PALETTE_PIXELS."""
    interval = max(1, count // PALETTE_PICTURES)
    samples = []
    for picture in itertools.islice(_decoded(file), 0, None, interval):
        pixels = picture.shape[0] * picture.shape[1] * -(-count // interval)
        step = math.ceil(math.sqrt(pixels / PALETTE_PIXELS))
        samples.append(picture[::step, ::step].reshape(-1, 3))
    return np.concatenate(samples)


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


class _Format(NamedTuple):
    """How pictures are encoded."""

    muxer: str
    codec: str
    pixels: str
    options: dict  # of the codec
    frame: Callable  # makes a frame of PyAV of a picture (H, W, 3) uint8
    has_tags: bool = False  # whether it says that its colours are those of BT.709


def _rgb_frame(picture):
    """A picture as a frame of PyAV."""
    return av.VideoFrame.from_ndarray(picture)


_SPOOL = _Format("nut", "libx264rgb", "rgb24", LOSSLESS, _rgb_frame)


def _mp4_format():
    """The format of an MP4 file: H.264 in the colours of BT.709, as players expect of HD."""
    reformatter = VideoReformatter()  # keeps its tables from frame to frame

    def frame(picture):
        """A picture as YUV; a black line makes odd sizes even, for H.264."""
        height, width = picture.shape[:2]
        padded = np.pad(picture, [(0, height % 2), (0, width % 2), (0, 0)])
        return reformatter.reformat(
            _rgb_frame(padded),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
        )

    return _Format("mp4", "libx264", "yuv420p", ENCODING, frame, has_tags=True)


def _gif_format(palette):
    """The format of a GIF with the palette of a PIL image."""
    colours = np.reshape(palette.getpalette(), (-1, 3))
    table = np.zeros((256, 4), np.uint8)  # alpha and RGB; the encoder uses what is transparent
    table[: len(colours)] = np.insert(colours, 0, 255, axis=1)

    def frame(picture):
        """A picture as indices of the palette."""
        image = Image.fromarray(picture)
        indices = np.asarray(image.quantize(palette=palette, dither=Image.Dither.NONE))
        return av.VideoFrame.from_ndarray((indices, table), format="pal8")

    return _Format("gif", "gif", "pal8", {}, frame)


def _write_video(pictures, path, fps, kind):
    """Write a video of pairs, see `_encode`."""
    with path.open("w+b") as file:  # FFmpeg gets it open, so that it reads no name as a protocol
        _encode_file(pictures, file, fps, kind)


def _encode_file(pictures, file, fps, kind):
    """Encode pairs, see `_encode`, into an open file."""
    try:
        with av.open(file, "w", format=kind.muxer) as container:
            _encode(pictures, container, fps, kind)
    except av.FFmpegError as error:
        raise error.__context__ or error from None  # what the file system said, where it did


def _encode(pictures, container, fps, kind):
    """Encode pairs into an open file: a picture, and the second from which it is shown.

    In place of a second, None means one frame later than the last picture. The first picture is
    shown from the beginning, whatever its second.
    """
    rate = Fraction(fps).limit_denominator(10_000)
    stream = container.add_stream(kind.codec, rate, kind.options)
    stream.pix_fmt = kind.pixels
    stream.codec_context.time_base = CLOCK
    stream.codec_context.thread_count = 2
    if kind.has_tags:
        _tag_colours(stream.codec_context)

    shape = None
    now = 0.0
    for picture, seconds in pictures:
        picture = xu.rgb_image(picture)
        frame = kind.frame(picture)
        if shape is None:
            shape = picture.shape
            stream.width = frame.width
            stream.height = frame.height
        elif picture.shape != shape:
            raise ValueError(f"expected pictures of one size, got {shape} and then {picture.shape}")
        elif seconds is None:
            now += 1 / fps
        else:
            now = max(seconds, now + 1e-4)  # H.264 needs rising times

        frame.pts = round(now / CLOCK)
        frame.time_base = CLOCK
        container.mux(stream.encode(frame))

    if shape is None:
        raise ValueError("expected at least one picture, got none")
    container.mux(stream.encode())


def _tag_colours(context):
    """Let a codec's file say that its colours are those of BT.709, in the usual range."""
    context.color_range = ColorRange.MPEG
    context.colorspace = Colorspace.ITU709
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709


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
        path: `.mp4`; replaced only when it is whole. Each frame is shown at its own time, as
            `footage.Clock` makes it of the time stamps.
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
                _write_video(pictures, part, fps, _mp4_format())
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

        number = len(track) - 1
        others = (lasers, mesh, tracked.pose, tracker.K, tracker.target)
        picture = _draw(number, image, bolts, *others)
        for moment in waiting:
            yield picture, moment
        waiting = []


def _tracked_frames(frames, tracker, fps):
    """Yield the image of each frame, its second and its `TrackedPose`.

    In place of a frame that cannot be read, or has another size, comes the last image before it;
    None before the first.
    """
    image = None
    clock = Clock(fps)
    for frame in frames:
        readable = frame.image is not None
        if readable and image is not None and frame.image.shape != image.shape:
            fault = f"its shape is {frame.image.shape}, not {image.shape}"
            frame = Frame(None, frame.seconds, fault)

        seconds = clock.tick(frame.seconds)
        stamp = seconds if frame.seconds is None else frame.seconds
        tracked = tracker.update(frame.image, stamp)
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


# ------------------------------------------------------------ passes for compositing


def write_passes(
    frames: Clip | Iterable,
    poses: Sequence,
    K: np.ndarray,
    folder: str | Path,
    source_fps: float = 30,
    lasers: Lasers | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
    target: xu.Target = xu.XWING,
) -> None:
    """Write the bolts and a mask of the hull as pictures of their own, for compositing.

    `lasers/000000.png` and so on have one picture for each frame, RGBA with 8 bits. RGB is light,
    coded like the frames (sRGB), and is premultiplied: it is what the bolts *add* to a frame. So

        frame + RGB, at most 255  is the frame of `animate`, but for rounding by 1

    which compositors call Add or Plus, of the coded values and not of linear light. Where bolts lie
    behind the hull they are left out. Alpha is the largest of R, G and B, for programs that need
    one: RGB + (1 - alpha) frame is the same on black, and a little darker on bright frames. A
    program that takes the pictures for straight alpha, as PNG has it, shows bolts too dark: tell it
    that they are premultiplied.

    `holdout/000000.png` and so on are grey, 8 bits: how much of each pixel the hull covers, of 255;
    all black where the pose is not known. What other programs draw is behind the hull where it is
    multiplied by 1 - mask / 255.

    Args:
        frames: see `animate`; their times count, pauses shortened, and one picture is written for
            each frame. `000000.png` is the first one.
        poses: N poses (4, 4), model -> OpenCV camera, or None.
        K: (3, 3) camera matrix.
        folder: is made, with `lasers` and, if there is a mesh, `holdout` in it. These two must not
            exist before.
        source_fps: frames a second of `frames`, where they have no time stamps.
        lasers: settings of the bolts, or None for the usual ones.
        mesh: the hull that hides bolts, or None.
        progress: show a progress bar.
        target: whose cannons fire; a target without lasers fires none.
    Raises:
        ValueError: a rate is not positive, the numbers of frames and poses differ, or no frame can
            be read.
        FileExistsError: one of the folders exists; nothing in it is changed.
        OSError: there is no room. Nothing is left.
    """
    K, frames, poses, seconds = _checked(K, frames, poses, source_fps)
    first = next(frames_at(frames, [0]))
    black = np.zeros(first.shape, np.uint8)
    lasers = lasers or Lasers()
    shot = lasers.shot(target=target)

    with _new_folders(Path(folder), ["lasers", "holdout"] if mesh else ["lasers"]) as parts:
        bar = tqdm(poses, Path(folder).name, unit="frame", disable=not progress)
        for number, (pose, moment) in enumerate(zip(bar, seconds)):
            bolts = shot.step(pose, moment)
            light = _draw(number, black, bolts, lasers, mesh, pose, K, target)
            _write_png(np.dstack([light, light.max(2)]), parts[0], number)
            if mesh:
                covered = hull_mask(mesh, pose, K, *first.shape[1::-1])
                _write_png(covered, parts[1], number)


@contextlib.contextmanager
def _new_folders(folder, names):
    """Yield temporary folders, which get their names in `folder` when all is written."""
    for name in names:
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name}: exists; remove it, or choose another folder")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".passes-") as temporary:
            parts = [Path(temporary, name) for name in names]
            for part in parts:
                part.mkdir()
            yield parts
            for part in parts:
                part.rename(folder / part.name)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _write_png(picture, folder, number):
    """Write a picture (H, W) or (H, W, 4) uint8; compression is fast, because PNGs are many."""
    Image.fromarray(picture).save(folder / f"{number:06d}.png", compress_level=1)
