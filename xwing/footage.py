"""Anyone's footage, and the network that looks at it.

A clip is a folder of numbered pictures, a video or a GIF. Its frames come one at a time, each with its own
time stamp, and what cannot be read comes as a fault in its place, so that every frame keeps its true number:
the packets of a video tell, before any is decoded, which frames there should be. The network finds the ship
in the whole frame, then looks again at a square about it, cut out of the frame itself.
"""

import contextlib
import dataclasses
import itertools
import re
import struct
import warnings
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image

import xwing_utils as xu
from xwing.detector import Detector, letterbox  # noqa: F401  also found here

EXPECTED = "expected a folder of frames 0.jpg, 1.jpg, ..., a video or a GIF"
MAX_MISSING = 100_000  # frames beyond those that are there, which a video's header may promise
READ_ERRORS = av.FFmpegError, OSError
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)


@dataclasses.dataclass(frozen=True)
class Frame:
    """One frame of a clip."""

    image: np.ndarray | None  # (H, W, 3) uint8 RGB; None where it cannot be read
    seconds: float | None = None  # since the clip's first frame; None where the source does not say
    fault: str = ""  # why it cannot be read


class Clip:
    """The frames of a folder of numbered pictures (0.jpg, shot_0017.png), a video or a GIF, one at a time.

        clip = Clip("flight.mp4")
        for frame in clip:  # again and again
            show(frame.image, frame.seconds)

    Frames come upright and with square pixels. One that is missing, damaged or of another size than the first
    has a fault and no image. Sources are local files, whatever their names look like. Attributes: width and
    height (pixels); fps (frames a second, the mean where it varies; None where the source does not say);
    seconds (a list, see `Frame`); count (with the faults); source; paths (of a folder).
    """

    def __init__(self, source, step=1):
        """`step` takes every nth frame. FileNotFoundError, ValueError: no frame can be read; says why."""
        if step < 1:
            raise ValueError(f"step: expected at least 1, got {step}")
        self.source, self.step, self.paths, self._maps = Path(source), step, None, None
        self._frames, seconds, rate = self._open()
        first = next((frame for frame in self._frames() if frame.image is not None), None)
        if first is None:
            fault = next((frame.fault for frame in self._frames()), "there is none")
            raise ValueError(f"{source}: holds no frame that can be read ({fault}); {EXPECTED}")
        self.height, self.width = first.image.shape[:2]
        self.fps, self.seconds = rate and round(rate / step, 6), list(seconds)[::step]
        self.count = len(self.seconds)

    def _open(self):
        """A function that gives every frame in turn, the seconds and the rate of all."""
        if self.source.is_dir():
            self.paths = _numbered_pictures(self.source)
            return lambda: map(_as_frame, self.paths), [None] * len(self.paths), None
        if not self.source.is_file():  # a pipe could make us wait for ever
            raise FileNotFoundError(f"{self.source}: no such folder or file; {EXPECTED}")
        if self.source.suffix.lower() == ".gif":
            seconds = [frame.seconds for frame in _gif_frames(self.source)]
            rate = (len(seconds) - 1) / seconds[-1] if seconds[-1] else None
            return (
                lambda: _gif_frames(self.source),
                seconds if rate else [None] * len(seconds),
                rate,
            )
        video = _Video(self.source)
        return video.frames, video.seconds.tolist(), video.fps

    def __iter__(self):
        for frame, seconds in zip(
            itertools.islice(self._frames(), 0, None, self.step), self.seconds
        ):
            image, fault = frame.image, frame.fault
            if image is not None and image.shape != (self.height, self.width, 3):
                size, first = f"{image.shape[1]}x{image.shape[0]}", f"{self.width}x{self.height}"
                image, fault = None, f"expected {first} pixels like the first frame, got {size}"
            if image is not None and self._maps is not None:
                image = cv2.remap(image, *self._maps, cv2.INTER_LINEAR)
            yield Frame(image, seconds, fault)

    def undistort(self, K, coefficients):
        """From now on frames come as a lens without distortion and with the same K would show them.

        coefficients: OpenCV's k1 k2 p1 p2 [k3 ...]: 4, 5, 8, 12 or 14 numbers; ValueError otherwise.
        """
        numbers = np.asarray(coefficients, float)
        if (
            numbers.ndim != 1
            or len(numbers) not in (4, 5, 8, 12, 14)
            or not np.isfinite(numbers).all()
        ):
            raise ValueError(
                f"coefficients: expected OpenCV's k1 k2 p1 p2 [k3 ...], got {numbers.tolist()}"
            )
        K = xu.check_camera_matrix(K) - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]  # to OpenCV's origin
        self._maps = cv2.initUndistortRectifyMap(
            K, numbers, None, K, (self.width, self.height), cv2.CV_16SC2
        )


def _numbered_pictures(folder):
    """The pictures of a folder whose names end in a number, by number; warns where that is no series."""
    found = []
    for path in folder.iterdir():
        name = re.fullmatch(
            r"(?!\.)(.*?)(\d+)", path.stem
        )  # macOS keeps notes of its own in ._0.jpg
        if name and path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            found.append((int(name[2]), path, name[1]))
    found.sort()
    steps = [(b[0] - a[0], f"{a[1].name}, {b[1].name}") for a, b in zip(found, found[1:])]
    series = sorted({name for _, _, name in found})
    odd = {
        "gaps": [pair for step, pair in steps if step > 1],
        "numbers twice": [pair for step, pair in steps if step == 0],
        "series": [", ".join(series[:4])] * len(series) if len(series) > 1 else [],
    }
    if any(odd.values()):
        what = "; ".join(
            f"{len(found)} {kind} ({found[0]})" for kind, found in odd.items() if found
        )
        warnings.warn(f"{folder}: found {what}; taken as one clip, by number", stacklevel=4)
    return [path for _, path, _ in found]


def _as_frame(item):
    """A `Frame` from one, from an image or from its path."""
    if isinstance(item, Frame):
        return item
    try:
        return Frame(item if isinstance(item, np.ndarray) else xu.read_image(item))
    except (ValueError, FileNotFoundError) as error:
        return Frame(None, fault=str(error))


def _gif_frames(path):
    """By Pillow: FFmpeg takes a GIF without durations for one frame, and half a frame for a whole one."""
    number, seconds, fault = 0, 0.0, "it breaks off"
    try:
        with Image.open(path) as gif:
            for number in itertools.count():
                gif.seek(number)
                yield Frame(np.array(gif.convert("RGB")), seconds)
                seconds += gif.info.get("duration", 0) / 1000
    except EOFError:
        if path.read_bytes().rstrip(b"\0\r\n ").endswith(b";"):
            return
    except PILLOW_ERRORS as error:
        fault = error
    yield Frame(None, seconds, f"{path}: no frame can be read after the first {number} ({fault})")


class _Video:
    """Read by FFmpeg through PyAV, in one thread: with more of them it hides damage."""

    def __init__(self, path):
        self._path = path
        with _open_video(path) as (container, stream):
            scan = _scan(container, stream)
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            times = (
                np.array(sorted(scan.times)) if scan.stamped else np.arange(len(scan.times)) / rate
            )
            self._stamped, self._start, seconds = scan.stamped, times[0], times - times[0]
            steady = len(seconds) < 2 or (np.abs(np.diff(seconds) * rate - 1) < 0.1).mean() > 0.8
            step = 1 / rate if steady else max(np.median(np.diff(seconds)), 1e-3)
            if scan.damaged and steady and not stream.frames:  # lost frames have left gaps
                counts = np.clip(np.round(np.diff(seconds) / step), 1, MAX_MISSING)
                runs = [start + step * np.arange(count) for start, count in zip(seconds, counts)]
                seconds = np.concatenate([*runs, seconds[-1:]])
            missing = _missing_at_the_end(container, stream, scan, step)
        self._readable = len(seconds)
        self.seconds = np.append(seconds, seconds[-1] + step * np.arange(1, missing + 1))
        self.fps = rate if steady else (len(seconds) - 1) / max(float(seconds[-1]), 1e-3)
        if missing:
            warnings.warn(self._missing(self._readable).fault, stacklevel=4)

    def _missing(self, number):
        fault = (
            f"{self._path}: frame {number}, at {self.seconds[number]:.3f} s, is damaged or missing"
        )
        if number >= self._readable:
            fault = f"{self._path}: breaks off, only {self._readable} of {len(self.seconds)} frames are there"
        return Frame(None, fault=fault)

    def frames(self):
        number = 0
        with _open_video(self._path) as (container, stream):
            for frame in _decoded(container, stream):
                place = number
                if self._stamped:
                    if frame is None or frame.pts is None:
                        continue
                    seconds = float(frame.pts * stream.time_base) - self._start
                    place = int(np.searchsorted(self.seconds, seconds - 1e-6))
                if not number <= place < self._readable:
                    continue  # it comes a second time, or no packet had its time
                yield from map(self._missing, range(number, place))
                number = place + 1
                good = frame is not None and not frame.is_corrupt
                yield Frame(_picture(frame, stream)) if good else self._missing(place)
        yield from map(self._missing, range(number, len(self.seconds)))


@dataclasses.dataclass(frozen=True)
class _Scan:
    times: list  # seconds at which each packet's frame is shown; None where the file does not say
    stamped: bool  # these can be trusted: every packet has one, and they do not begin anew
    hidden: int  # packets whose frames are not shown: cut away by an edit list
    end: float  # seconds at which the last frame ends
    damaged: bool


@contextlib.contextmanager
def _open_video(path):
    """(container, stream) of a video. FFmpeg gets an open file and no protocol, so that nothing is a URL."""
    try:
        with (
            path.open("rb") as file,
            av.open(file, options={"protocol_whitelist": "none"}) as container,
        ):
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            yield container, stream
    except (*READ_ERRORS, IndexError) as error:
        why = getattr(error, "strerror", "it has no pictures")
        raise ValueError(f"{path}: cannot be read as a video ({why}); {EXPECTED}") from None


def _scan(container, stream):
    """What the packets of a video tell; nothing is decoded."""
    times, order, hidden, end, damaged, level = [], [], 0, 0.0, False, av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as complaints, contextlib.suppress(*READ_ERRORS):
            for packet in container.demux(stream):
                if packet.size:
                    time = None if packet.pts is None else float(packet.pts * stream.time_base)
                    times += [] if packet.is_discard else [time]
                    order.append(packet.dts or 0)
                    hidden, damaged = hidden + packet.is_discard, damaged or packet.is_corrupt
                    end = max(end, (time or 0) + float((packet.duration or 0) * stream.time_base))
    finally:
        av.logging.set_level(level)
    stamped = container.format.name != "avi" and None not in times and order == sorted(order)
    return _Scan(times, stamped, hidden, end, damaged or bool(complaints))


def _missing_at_the_end(container, stream, scan, step):
    """How many frames the container's table, or else its duration, promises after the last one."""
    missing, clock = 0, re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
    if stream.frames:
        missing = stream.frames - scan.hidden - len(scan.times)
    elif clock:
        missing = round(
            (np.dot([3600, 60, 1], [float(part) for part in clock.groups()]) - scan.end) / step
        )
    elif (
        container.duration and len(container.streams) == 1
    ):  # else the sound may be what lasts longer
        missing = round((container.duration / av.time_base - scan.end) / step)
    return int(np.clip(missing, 0, MAX_MISSING))


def _decoded(container, stream):
    """What the decoder makes of the packets: frames in the order of their times, None where it failed."""
    with contextlib.suppress(*READ_ERRORS):
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except READ_ERRORS:
                yield None


def _picture(frame, stream):
    """A decoded frame as (H, W, 3) uint8 RGB, its pixels square, turned as its file says."""
    aspect = float(stream.sample_aspect_ratio or 1)
    width, height = round(frame.width * max(aspect, 1)), round(frame.height / min(aspect, 1))
    image = frame.to_ndarray(format="rgb24", width=width, height=height)
    return np.ascontiguousarray(np.rot90(image, frame.rotation // 90))


def frames_at(clip, indices):
    """Yield the images (H, W, 3) uint8 of a clip by their numbers, which must not fall.

    `clip` is a `Clip`, or an iterable of `Frame`s, images or paths. What cannot be read is replaced by the
    image before it, or else the first after it, with a warning; ValueError where there is none.
    """
    frames, ahead = itertools.tee(map(_as_frame, clip))
    image, number = next((frame.image for frame in ahead if not frame.fault), None), -1
    del ahead  # which would hold on to all frames
    for index in indices:
        while number < index:
            number, frame = number + 1, next(frames, Frame(None, fault="the clip is shorter"))
            fault = frame.fault
            if not fault and frame.image.shape != image.shape:
                fault = f"its shape is {frame.image.shape}, not {image.shape}"
            image = image if fault else frame.image
        if image is None:
            raise ValueError(f"frame {index} cannot be read: {fault}")
        if fault:
            warnings.warn(f"frame {index} is replaced by its neighbour: {fault}", stacklevel=2)
        yield image
