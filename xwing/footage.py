"""Clips of any kind: folders of numbered pictures, videos, GIFs and scenes of BOP.

A `Clip` gives its frames one at a time, so that a long clip needs no more memory than a short one.
Footage is often damaged, and a track needs to know which frame is which. So every frame keeps its
true number: a frame that cannot be read comes as a `Frame` without an image, which says what is
wrong, in its proper place. For a video this takes two passes. The first reads only the compressed
packets, whose time stamps tell which frames there should be and when each is shown. The second
decodes them, and puts each frame where its time stamp belongs.

A `Clock` makes rising times of any time stamps. `run_folder` gives each source a folder of its own
for what is made of it.
"""

import contextlib
import dataclasses
import itertools
import os
import re
import struct
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
import trimesh
from PIL import Image

import xwing_utils as xu
from xwing import bop
from xwing.detector import Detector, letterbox  # noqa: F401  scripts import them from here

EXPECTED = "expected a folder of frames 0.jpg, 1.jpg, ..., a video or a GIF"
PICTURES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".exr")  # suffixes of the frames of a folder
DISTORTION_COEFFICIENTS = (4, 5, 8, 12, 14)  # how many numbers OpenCV's models of distortion have
READ_ERRORS = (av.FFmpegError, OSError)  # what reading a damaged video raises
PILLOW_ERRORS = (  # what reading a damaged GIF raises
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)

DEFAULT_FPS = 25.0  # frames a second of a video that states no rate
MAX_MISSING = 100_000  # missing frames; a damaged header may promise any number
MAX_DAMAGE = 10.0  # seconds of frames that damage swallows; longer gaps are pauses
MIN_INTERVAL = 1e-3  # seconds between frames: two time stamps may be equal
STEADY_TOLERANCE = 0.1  # by which a regular interval may be off, as a fraction of 1 / rate
STEADY_FRACTION = 0.8  # of the intervals; a video in which fewer are regular has a varying rate
SAME_TIME = 1e-6  # seconds; time stamps that differ by less, through rounding, are equal


@dataclasses.dataclass(frozen=True)
class Frame:
    """One frame of a clip.

    Attributes:
        image: (H, W, 3) uint8 RGB, made by `xu.rgb_image` of what is given; None where the frame
            cannot be read.
        seconds: time since the clip's first frame; None where the source does not say.
        fault: why the frame cannot be read; empty where it can. It can be printed and written, also
            where it holds the name of a file that is no UTF-8.
    """

    image: np.ndarray | None
    seconds: float | None = None
    fault: str = ""

    def __post_init__(self):
        object.__setattr__(self, "fault", xu.printable(self.fault))
        if self.image is not None:
            object.__setattr__(self, "image", xu.rgb_image(self.image))


class Clip:
    """The frames of a folder of numbered pictures (0.jpg, shot_0017.png), a video or a GIF.

        clip = Clip("flight.mp4")
        for frame in clip:  # as often as you like
            show(frame.image, frame.seconds)

    Frames come upright and with square pixels. A frame that is missing, damaged or of another size
    than the first has a fault and no image. A source is a local file even if its name looks like a
    URL.

    Attributes:
        source: path of the folder or file.
        step: every step-th frame of the source is taken.
        width, height: size of the frames in pixels.
        fps: frames a second, the mean where the rate varies; None where the source does not say.
        seconds: a list with the time of each frame, see `Frame`.
        count: how many frames there are, faults included.
        paths: paths of all pictures of a folder, whatever the step; None for a video or a GIF.
        numbers: a list with the source's own number of each frame: 1001 for shot.1001.jpg; the
            frames of a video or a GIF count from 0.
        K: (3, 3) camera matrix in pixels of a scene of BOP, see `xwing.bop`; None for the others.
    """

    def __init__(self, source: str | Path, step: int = 1):
        """Open a source and find out which frames it has.

        Args:
            source: path of a folder or file.
            step: take every step-th frame.

        Raises:
            FileNotFoundError: there is no such folder or file.
            ValueError: no frame can be read, and why; or `step` is less than 1.
        """
        if step < 1:
            raise ValueError(f"step: expected at least 1, got {step}")
        self.source = Path(source)
        self.step = step
        self._reader = _open_reader(self.source)
        self._undistortion_maps = None

        self.paths = self._reader.paths if isinstance(self._reader, _Folder) else None
        self.seconds = self._reader.seconds[::step]
        numbers = map(bop.number_of, self.paths) if self.paths else range(len(self._reader.seconds))
        self.numbers = list(numbers)[::step]
        self.K = self._reader.scene.K if isinstance(self._reader, _Scene) else None
        self.count = len(self.seconds)
        self.fps = round(self._reader.fps / step, 6) if self._reader.fps else None
        self.height, self.width = self._first_image().shape[:2]

    def _first_image(self):
        """The first image that can be read."""
        first_fault = None
        for frame in self._reader.frames():
            if frame.image is not None:
                return frame.image
            first_fault = first_fault or frame.fault

        why = first_fault or "there is none"
        source = xu.printable(self.source)
        raise ValueError(f"{source}: holds no frame that can be read ({why}); {EXPECTED}")

    def __iter__(self) -> Iterator[Frame]:
        frames = itertools.islice(self._reader.frames(), 0, None, self.step)
        for frame, seconds in zip(frames, self.seconds):
            yield self._prepare(frame, seconds)

    def _prepare(self, frame, seconds):
        """Check the size of a reader's frame, set its time and remove the lens's distortion."""
        image = frame.image
        if image is None:
            return Frame(None, seconds, frame.fault)

        if image.shape != (self.height, self.width, 3):
            fault = (
                f"expected {self.width}x{self.height} pixels like the first frame, "
                f"got {image.shape[1]}x{image.shape[0]}"
            )
            return Frame(None, seconds, fault)

        if self._undistortion_maps is not None:
            image = cv2.remap(image, *self._undistortion_maps, cv2.INTER_LINEAR)
        return Frame(image, seconds)

    def undistort(self, K: np.ndarray, coefficients: list | np.ndarray) -> None:
        """Remove a lens's distortion from all frames that are read from now on.

        They come as a lens without distortion and with the same K would show them.

        Args:
            K: (3, 3) camera matrix in pixels.
            coefficients: OpenCV's k1 k2 p1 p2 [k3 ...]: 4, 5, 8, 12 or 14 numbers.

        Raises:
            ValueError: other coefficients, or no camera matrix.
        """
        numbers = np.asarray(coefficients, float)
        known_model = numbers.ndim == 1 and len(numbers) in DISTORTION_COEFFICIENTS
        if not known_model or not np.isfinite(numbers).all():
            raise ValueError(
                f"coefficients: expected OpenCV's k1 k2 p1 p2 [k3 ...], got {numbers.tolist()}"
            )

        # OpenCV's origin is the middle of the first pixel, ours is its corner.
        K = xu.crop_camera(xu.check_camera_matrix(K), 0.5, 0.5)
        size = (self.width, self.height)
        self._undistortion_maps = cv2.initUndistortRectifyMap(
            K, numbers, None, K, size, cv2.CV_16SC2
        )


def _open_reader(source):
    """The reader for a source.

    A reader has `seconds` (a list, one entry for each frame), `fps` (or None), and `frames()`,
    which yields that many `Frame`s.
    """
    if source.is_dir():
        return _Scene(source) if bop.is_scene(source) else _Folder(source)
    if not source.is_file():  # also a pipe, from which reading could take for ever
        path = xu.printable(source)
        raise FileNotFoundError(f"{path}: no such folder or file; {EXPECTED}")
    if source.suffix.lower() == ".gif":
        return _Gif(source)
    return _Video(source)


# ------------------------------------------------------------ folders


class _Folder:
    """A folder of numbered pictures. Nothing tells when they were taken."""

    def __init__(self, folder):
        self.paths = _numbered_pictures(folder)
        self.seconds = [None] * len(self.paths)
        self.fps = None

    def frames(self):
        return map(_as_frame, self.paths)


class _Scene(_Folder):
    """A scene of BOP: its pictures as one camera would show them."""

    def __init__(self, folder):
        self.scene = bop.load_scene(folder)
        self.paths = self.scene.paths
        self.seconds = [None] * len(self.paths)
        self.fps = None

    def frames(self):
        for index, frame in enumerate(super().frames()):
            image = frame.image
            if image is not None:
                image = self.scene.in_one_camera(image, index)
            yield Frame(image, fault=frame.fault)


class _Picture(NamedTuple):
    number: int
    path: Path
    series: str  # its name before the number


def _numbered_pictures(folder):
    """Paths of the pictures whose names end in a number, in its order.

    Warns where the numbers or names suggest that the pictures are not one clip.
    """
    pictures = []
    for path in folder.iterdir():
        name = re.fullmatch(r"(.*?)(\d+)", path.stem)
        hidden = path.name.startswith(".")  # macOS keeps notes of its own in ._0.jpg
        if name and not hidden and path.suffix.lower() in PICTURES:
            pictures.append(_Picture(int(name[2]), path, name[1]))
    pictures.sort()

    oddities = _oddities(pictures)
    if oddities:
        warnings.warn(
            f"{xu.printable(folder)}: found {'; '.join(oddities)}; taken as one clip, by number",
            stacklevel=5,
        )
    return [picture.path for picture in pictures]


def _oddities(pictures):
    """Texts that say why pictures, ordered by number, may not be one clip, each with an example."""
    gaps = []
    repeated = []
    for before, after in itertools.pairwise(pictures):
        pair = f"{before.path.name}, {after.path.name}"
        if after.number > before.number + 1:
            gaps.append(pair)
        if after.number == before.number:
            repeated.append(pair)

    oddities = []
    if gaps:
        oddities.append(f"{len(gaps)} gaps ({gaps[0]})")
    if repeated:
        oddities.append(f"{len(repeated)} numbers twice ({repeated[0]})")
    series = sorted({picture.series for picture in pictures})
    if len(series) > 1:
        oddities.append(f"{len(series)} series ({', '.join(series[:4])})")
    return oddities


def _as_frame(item):
    """A `Frame` from a `Frame`, an image or the path of one."""
    if isinstance(item, Frame):
        return item
    if isinstance(item, np.ndarray):
        return Frame(item)
    try:
        is_exr = Path(item).suffix.lower() == ".exr"
        return Frame(_read_exr(Path(item)) if is_exr else xu.read_image(item))
    except (ValueError, FileNotFoundError) as error:
        return Frame(None, fault=str(error))


def _read_exr(path):
    """An OpenEXR picture as (H, W, 3) uint8 sRGB: FFmpeg reads it, other readers often cannot.

    Its linear light is cut at 0 and 1, and coded as sRGB (IEC 61966-2-1).
    """
    try:
        with path.open("rb") as file, av.open(file, format="exr_pipe") as container:
            light = _linear_light(next(container.decode(video=0)))
    except (*READ_ERRORS, StopIteration, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        text = f"cannot be read as an OpenEXR picture ({error}); save it as a 16-bit PNG or TIFF"
        raise ValueError(f"{path}: {text}") from None

    light = np.nan_to_num(light, nan=0.0).clip(0, 1)
    return xu.rgb_image(trimesh.visual.color.linear_to_srgb(light))


def _linear_light(decoded):
    """The numbers of a decoded picture of planes of floats, (H, W, 1 or 3) float32.

    FFmpeg's own conversion of half floats and of grey is not exact.
    """
    kind = re.fullmatch(r"(gbrp|gbrap|gray)f(16|32)le", decoded.format.name)
    if kind is None:
        raise ValueError(f"its numbers are of the kind {decoded.format.name}, not floats")
    order = [2, 0, 1] if kind[1].startswith("gbr") else [0]  # of the planes: green, blue, red
    number = np.dtype(f"<f{int(kind[2]) // 8}")
    planes = []
    for plane in (decoded.planes[i] for i in order):
        rows = np.frombuffer(plane, number).reshape(
            plane.height, plane.line_size // number.itemsize
        )
        planes.append(rows[:, : plane.width])
    return np.stack(planes, axis=2).astype(np.float32)


# ------------------------------------------------------------ GIFs


class _Gif:
    """A GIF, read by Pillow.

    FFmpeg would read a GIF without durations as a single frame, and would not report a frame that
    breaks off half-way.
    """

    def __init__(self, path):
        self._path = path
        self.seconds = [frame.seconds for frame in self.frames()]
        self.fps = None

        duration = self.seconds[-1]
        if duration:
            self.fps = (len(self.seconds) - 1) / duration
        else:  # without durations all frames would have the same time
            self.seconds = [None] * len(self.seconds)

    def frames(self):
        number = 0
        seconds = 0.0
        fault = "it breaks off"  # if it ends without an error of Pillow and without a trailer
        try:
            with Image.open(self._path) as gif:
                while True:
                    gif.seek(number)
                    mode = "RGBA" if gif.has_transparency_data else "RGB"
                    yield Frame(np.array(gif.convert(mode)), seconds)
                    seconds += gif.info.get("duration", 0) / 1000
                    number += 1
        except EOFError:
            if self._is_complete():
                return
        except PILLOW_ERRORS as error:
            fault = error

        why = f"{self._path}: no frame can be read after the first {number} ({fault})"
        yield Frame(None, seconds, why)

    def _is_complete(self):
        """Whether the file ends with a GIF's trailer; some programs pad it."""
        return self._path.read_bytes().rstrip(b"\0\r\n ").endswith(b";")


# ------------------------------------------------------------ videos


class _Video:
    """A video, read by FFmpeg through PyAV.

    It is decoded in one thread, because FFmpeg hides damage when it uses several. The packets give
    a `_Timeline`, and frames are numbered by their places on it. A decoded frame is put at the
    place of its time stamp. A place that stays empty is a fault.
    """

    def __init__(self, path):
        self._path = path
        with _open_video(path) as (container, stream):
            packets = _read_packets(container, stream)
            if not packets.times:
                raise _not_a_video(path, "it has no pictures")
            self._timeline = _lay_out(container, stream, packets)

        self.seconds = self._timeline.seconds.tolist()
        self.fps = self._timeline.fps
        if self._timeline.readable < len(self.seconds):
            warnings.warn(self._cut_off(), stacklevel=4)

    def frames(self):
        due = 0  # number of the next frame
        with _open_video(self._path) as (container, stream):
            for decoded in _decode(container, stream):
                place = self._place(decoded, stream, due)
                if place is None:
                    continue
                yield from map(self._missing_frame, range(due, place))
                yield self._frame_at(place, decoded, stream)
                due = place + 1

        yield from map(self._missing_frame, range(due, len(self.seconds)))

    def _place(self, decoded, stream, due):
        """Where on the timeline a decoded frame belongs; None for a frame that is left out.

        If time stamps cannot be trusted, each frame takes the place that is due, even if it could
        not be decoded. Otherwise its time stamp decides; of several frames with the same one, each
        takes the next place. Frames without a time stamp are left out, and so are frames that come
        a second time or after the last packet's time.
        """
        timeline = self._timeline
        place = due
        if timeline.stamped:
            time = None if decoded is None else _seconds(decoded.pts, stream)
            if time is None:
                return None
            since_start = time - timeline.start
            first = int(np.searchsorted(timeline.seconds, since_start - SAME_TIME))
            last = int(np.searchsorted(timeline.seconds, since_start + SAME_TIME, side="right")) - 1
            place = max(first, min(due, last))  # frames of one time follow each other
        return place if due <= place < timeline.readable else None

    def _frame_at(self, place, decoded, stream):
        if decoded is None or decoded.is_corrupt:
            return self._missing_frame(place)
        return Frame(_picture(decoded, stream))

    def _missing_frame(self, number):
        if number >= self._timeline.readable:
            return Frame(None, fault=self._cut_off())
        seconds = self.seconds[number]
        why = f"{self._path}: frame {number}, at {seconds:.3f} s, is damaged or missing"
        return Frame(None, fault=why)

    def _cut_off(self):
        """The fault of frames after the end of a file that breaks off."""
        readable = self._timeline.readable
        promised = len(self.seconds)
        path = xu.printable(self._path)
        return f"{path}: breaks off, only {readable} of {promised} frames are there"


@contextlib.contextmanager
def _open_video(path):
    """Open a video and give its container and its video stream.

    FFmpeg gets an open file and may use no protocol. So neither a file's name nor a playlist in it
    can make it open a URL.
    """
    try:
        with (
            path.open("rb") as file,
            av.open(file, options={"protocol_whitelist": "none"}) as container,
        ):
            if not container.streams.video:
                raise _not_a_video(path, "it has no pictures")
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            yield container, stream
    except READ_ERRORS as error:
        raise _not_a_video(path, error.strerror) from None


def _not_a_video(path, why):
    return ValueError(f"{xu.printable(path)}: cannot be read as a video ({why}); {EXPECTED}")


@dataclasses.dataclass(frozen=True)
class _Packets:
    """What the packets of a video tell before any is decoded."""

    times: list  # when the frame of each packet is shown, seconds; None where the file does not say
    stamped: bool  # whether the times can be trusted
    hidden: int  # number of packets whose frames an edit list hides; `times` lacks them
    end: float  # seconds at which the last frame ends
    damaged: bool


def _read_packets(container, stream):
    """Read all packets of a video; nothing is decoded."""
    times = []
    decoding_times = []
    hidden = 0
    end = 0.0
    corrupt = False
    with _ffmpeg_errors() as complaints, contextlib.suppress(*READ_ERRORS):
        for packet in container.demux(stream):
            if not packet.size:  # the empty packet with which PyAV ends a stream
                continue
            time = _seconds(packet.pts, stream)
            if packet.is_discard:
                hidden += 1
            else:
                times.append(time)
            decoding_times.append(packet.dts or 0)
            duration = _seconds(packet.duration or None, stream) or 1 / _rate(stream)
            end = max(end, (time or 0.0) + duration)
            corrupt = corrupt or packet.is_corrupt

    # AVI keeps no time stamps: those that FFmpeg gives follow the order of decoding, not that of
    # display. Where decoding times go backwards, files have been joined, each with its own times.
    in_order = decoding_times == sorted(decoding_times)
    stamped = container.format.name != "avi" and None not in times and in_order
    return _Packets(times, stamped, hidden, end, damaged=corrupt or bool(complaints))


def _rate(stream):
    """Frames a second that a video states, or DEFAULT_FPS."""
    return float(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)


def _seconds(ticks, stream):
    """A time or a duration in seconds; None for ticks that are None."""
    return None if ticks is None else float(ticks * stream.time_base)


@contextlib.contextmanager
def _ffmpeg_errors():
    """Collect the errors that FFmpeg logs, the only report of damage that it skips."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as complaints:
            yield complaints
    finally:
        av.logging.set_level(level)


@dataclasses.dataclass(frozen=True)
class _Timeline:
    """Which frames a video should have, and when each is shown."""

    seconds: np.ndarray  # (N,) of all frames, missing ones included, since the first
    readable: int  # number of frames before the file breaks off
    fps: float
    start: float  # time stamp of the first frame, seconds
    stamped: bool  # whether a decoded frame's time stamp tells its place


def _lay_out(container, stream, packets):
    """The timeline of a video: the frames of its packets, and those that damage has taken away."""
    rate = _rate(stream)
    if packets.stamped:
        times = np.array(sorted(packets.times))  # packets come in the order of decoding
    else:
        times = np.arange(len(packets.times)) / rate
    seconds = times - times[0]

    steady = _is_steady(seconds, rate)
    interval = 1 / rate if steady else max(np.median(np.diff(seconds)), MIN_INTERVAL)

    # Damage can swallow packets, which leaves gaps. In a video of varying rate a gap may as well be
    # a pause. A container with a table of its frames knows all packets and leaves no gaps.
    if packets.damaged and steady and not stream.frames:
        seconds = _fill_gaps(seconds, interval)

    readable = len(seconds)
    fps = rate if steady else (readable - 1) / max(float(seconds[-1]), MIN_INTERVAL)

    # Where the rate varies, the last frame may be shown for long; only a table tells the number.
    missing = 0
    if steady or stream.frames:
        missing = _missing_at_the_end(container, stream, packets, interval)
    seconds = np.append(seconds, seconds[-1] + interval * np.arange(1, missing + 1))

    return _Timeline(seconds, readable, fps, times[0], packets.stamped)


def _is_steady(seconds, rate):
    """Whether nearly all intervals between frames are what the rate says."""
    if len(seconds) < 2:
        return True
    regular = np.abs(np.diff(seconds) * rate - 1) < STEADY_TOLERANCE
    return regular.mean() > STEADY_FRACTION


def _fill_gaps(seconds, interval):
    """Add the times of frames that are missing between others."""
    gaps = np.diff(seconds)
    counts = np.where(gaps <= MAX_DAMAGE, np.maximum(np.round(gaps / interval), 1), 1)
    filled = [start + interval * np.arange(count) for start, count in zip(seconds, counts)]
    return np.concatenate([*filled, seconds[-1:]])


def _missing_at_the_end(container, stream, packets, interval):
    """How many frames the file promises after its last packet.

    The container's table of frames gives the exact number. A file without one (Matroska, MPEG-TS)
    may state the duration of the video stream, or else that of the whole file. The latter is used
    only if the file has no other stream, because the sound may last longer.
    """
    if stream.frames:
        missing = stream.frames - packets.hidden - len(packets.times)
        return int(np.clip(missing, 0, MAX_MISSING))

    duration = _stated_duration(stream)
    if duration is None and container.duration and len(container.streams) == 1:
        duration = container.duration / av.time_base
    if duration is None:
        return 0
    return int(np.clip(round((duration - packets.end) / interval), 0, MAX_MISSING))


def _stated_duration(stream):
    """The seconds in a stream's tag DURATION, "00:01:02.500" (Matroska); None without the tag."""
    clock = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if not clock:
        return None
    hours, minutes, seconds = (float(part) for part in clock.groups())
    return 3600 * hours + 60 * minutes + seconds


def _decode(container, stream):
    """Yield decoded frames in the order of display, and None for each packet that fails."""
    with contextlib.suppress(*READ_ERRORS):
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except READ_ERRORS:
                yield None


def _picture(decoded, stream):
    """A decoded frame as (H, W, 3) uint8 RGB, upright and with square pixels."""
    aspect = float(stream.sample_aspect_ratio or 1)  # width of a pixel over its height
    width = round(decoded.width * max(aspect, 1))
    height = round(decoded.height / min(aspect, 1))
    image = decoded.to_ndarray(format="rgb24", width=width, height=height)
    return np.ascontiguousarray(_as_displayed(image, decoded))


def _as_displayed(image, decoded):
    """An image (H, W, 3), mirrored and turned as the display matrix of its frame says.

    The matrix (3, 3) maps a row (x, y, 1) of the stored picture to one of the picture that is
    shown. Of the eight ways that leave the axes parallel, the nearest one is taken.
    """
    matrix = decoded.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image

    (x_to_x, x_to_y), (y_to_x, y_to_y) = np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2] / 1.0
    if abs(x_to_x) + abs(y_to_y) < abs(x_to_y) + abs(y_to_x):
        image = image.swapaxes(0, 1)  # the stored rows are shown as columns
        x_to_x, y_to_y = y_to_x, x_to_y
    if x_to_x < 0:
        image = image[:, ::-1]
    return image[::-1] if y_to_y < 0 else image


# ------------------------------------------------------------ times


class Clock:
    """Rising times, made of the time stamps of frames.

        clock = Clock(fps)
        times = [clock.tick(frame.seconds) for frame in frames]

    A time stamp is the frame's time, as long as time stamps rise. One that is repeated, or falls
    behind by a frame at most, counts half a frame after the last time. If it stands still for
    longer, frames are counted. One that falls behind by more, because a camera has reconnected or a
    clip is played again, begins again: its frame comes one frame after the last one, and all
    later times are moved along.

    Attributes:
        seconds: time of the last frame.
        restarted: whether its time stamp begins again.
    """

    def __init__(self, fps: float):
        """Make a clock that has not seen a frame yet.

        Args:
            fps: frames a second, of frames whose time stamp says nothing.
        """
        self._interval = 1 / fps
        self.seconds = -self._interval
        self.restarted = False
        self._last = -np.inf  # the time stamp of the last frame
        self._shift = 0.0  # seconds from a time stamp to its time
        self._stands = False  # whether the last time stamp was no later than the one before

    def tick(self, stamp: float | None = None) -> float:
        """Return the time of the next frame, in seconds, which is later than all before.

        Args:
            stamp: its time stamp in seconds. None, or no finite number: one frame after the last.
        """
        if stamp is None or not np.isfinite(stamp):
            stamp = self.seconds + self._interval - self._shift
        rises = stamp > self._last
        self.restarted = self._last - stamp > self._interval
        if rises and stamp + self._shift > self.seconds:
            self.seconds = stamp + self._shift
        else:
            self._pass(stamp, rises)
        self._last = stamp
        self._stands = not rises
        return self.seconds

    def _pass(self, stamp, rises):
        """Go on by a step of which the time stamp alone does not tell."""
        if rises:
            self.seconds += stamp - self._last
        elif self._stands or self.restarted:
            self.seconds += self._interval
        else:
            self.seconds += self._interval / 2
            return  # the next time stamp is right again
        self._shift = self.seconds - stamp


# ------------------------------------------------------------ results


def run_folder(source: str | Path, runs: str | Path, *more: str | Path) -> Path:
    """Make the folder for what is made of a source, or find that of an earlier run.

    It has the whole name of the source, such as `runs/IMG_0001.mp4`. Another source of the same
    name gets `runs/IMG_0001.mp4-2`, and so does the same source with another target. The file
    `source.txt` in it says whose folder it is.

    Args:
        source: path of a clip.
        runs: folder of all runs.
        more: paths of other files whose results lie apart, such as the target's mesh.

    Returns:
        path of the source's folder, which exists.
    """
    path = Path(source).resolve()
    owner = b"".join(os.fsencode(Path(part).resolve()) + b"\n" for part in (source, *more))
    for number in itertools.count(1):
        folder = Path(runs, path.name if number == 1 else f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            (folder / "source.txt").write_bytes(owner)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if (folder / "source.txt").read_bytes() == owner:
                return folder


# ------------------------------------------------------------ frames by number


def frames_at(
    clip: Clip | Iterable[Frame | np.ndarray | str | Path], indices: Iterable[int]
) -> Iterator[np.ndarray]:
    """Yield the images (H, W, 3) uint8 of a clip by their numbers.

    A frame that cannot be read, or has another shape than the first, is replaced by the image
    before it, or else by the first after it, with a warning.

    Args:
        clip: a `Clip`, or an iterable of `Frame`s, images or paths of images.
        indices: numbers of frames from 0, in ascending order; numbers may be repeated.

    Raises:
        ValueError: there is no image that could replace a frame.
    """
    frames, ahead = itertools.tee(map(_as_frame, clip))
    image = next((frame.image for frame in ahead if not frame.fault), None)
    del ahead  # it would hold on to all frames

    number = -1
    fault = ""
    for index in indices:
        while number < index:
            number += 1
            frame = next(frames, Frame(None, fault="the clip is shorter"))
            fault = frame.fault or _wrong_shape(frame.image, image)
            if not fault:
                image = frame.image

        if image is None:
            raise ValueError(f"frame {index} cannot be read: {fault}")
        if fault:
            warnings.warn(f"frame {index} is replaced by its neighbour: {fault}", stacklevel=2)
        yield image


def _wrong_shape(image, example):
    """The fault of an image whose shape is not that of an example; empty where it is."""
    if image.shape == example.shape:
        return ""
    return f"its shape is {image.shape}, not {example.shape}"
