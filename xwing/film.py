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
import cv2
import numpy as np
from PIL import Image
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

import xwing_utils as xu
from xwing.footage import Clip, Frame, frames_at, letterbox
from xwing.mesh import rasterise

NEAR = 0.05  # model units: bolts are cut this close to the camera's plane
GREEN, YELLOW, BLUE, PINK = (90, 255, 90), (255, 220, 60), (120, 200, 255), (255, 160, 255)
WHITE_HOT = 255, 215, 190  # of a bolt's core
ENCODING, CLOCK = (
    {"preset": "veryfast", "crf": "17"},
    Fraction(1, 90_000),
)  # of x264; seconds that MP4s count
NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO


@dataclasses.dataclass(frozen=True)
class Lasers:
    """Settings of the four cannons: two fire at a time, in turn. ValueError where one cannot be."""

    rate: float = 5.0  # volleys a second
    speed: float = 2.0  # model units a second
    length: float = 0.16  # of a bolt, model units
    reach: float = 3.0  # of its flight, model units
    jitter: float = 0.0  # how much the time between two volleys varies, as a share of it, in [0, 1)
    seed: int = 0  # of the jitter
    colour: tuple = (255, 60, 40)  # of the glow, RGB
    radius: float = 0.0032  # of a bolt, model units

    def __post_init__(self):
        for name in ("rate", "speed", "length", "reach", "radius"):
            _check_positive(name, getattr(self, name))
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter: expected a share in [0, 1), got {self.jitter}")

    def shot(self, fps=30.0):
        """A new `Shot`, whose frames come `fps` times a second."""
        return Shot(self, fps)


class Shot:
    """The bolts of one shot. The camera stands still, so that its frame serves as the world's.

    shot = Lasers(rate=5).shot(fps=30)
    pictures = [draw_bolts(frame, shot.step(pose), K) for frame, pose in zip(frames, poses)]
    """

    def __init__(self, lasers, fps):
        _check_positive("fps", fps)
        self._lasers, self._interval, self._random = (
            lasers,
            1 / fps,
            np.random.default_rng(lasers.seed),
        )
        self._now, self._due, self._volley = -self._interval, 0.0, 0
        self._fired = np.zeros((0, 7))  # second, muzzle, direction of each bolt in flight

    def step(self, pose, seconds=None):
        """Go on by one frame: (B, 2, 3) tail and head of its bolts in the camera's frame, model units.

        pose: (4, 4) of the ship, or None: then nothing is fired, and what has been fired flies on.
        seconds: of this frame; None: one frame's time after the one before.
        """
        lasers = self._lasers
        self._now = max(self._now + self._interval if seconds is None else seconds, self._now)
        self._due = max(
            self._due, self._now - (lasers.reach + lasers.length) / lasers.speed
        )  # over by now
        while self._due <= self._now + 1e-9:
            if pose is not None:
                cannons = (
                    xu.LASERS[[0, 3] if self._volley % 2 else [1, 2]] @ pose[:3, :3].T + pose[:3, 3]
                )
                muzzle, aim = cannons[:, 0], cannons[:, 1] - cannons[:, 0]
                course = aim / np.linalg.norm(aim, axis=1, keepdims=True)
                self._fired = np.vstack(
                    [self._fired, np.column_stack([[self._due] * 2, muzzle, course])]
                )
            self._volley += 1
            self._due += (1 + lasers.jitter * self._random.uniform(-1, 1)) / lasers.rate
        flown = (self._now - self._fired[:, 0]) * lasers.speed
        self._fired, flown = (
            array[flown - lasers.length < lasers.reach] for array in (self._fired, flown)
        )
        ends = np.stack([np.maximum(flown - lasers.length, 0), flown], 1)[flown > 1e-9]
        flying = self._fired[flown > 1e-9]
        return flying[:, None, 1:4] + ends[..., None] * flying[:, None, 4:]


def _check_positive(name, value):
    if not 0 < value < np.inf:
        raise ValueError(f"{name}: expected a positive number, got {value}")


def draw_bolts(image, bolts, K, depth=None, radius=Lasers.radius, colour=Lasers.colour):
    """Return a copy of the frame (H, W, 3) uint8 with bolts (B, 2, 3), see `Shot.step`, as glowing light.

    depth: (H, W) model units or None, of what may hide bolts, see `mesh.rasterise`; radius: of a bolt, model
    units, it tapers towards the tail and narrows with the distance; colour: of the glow.
    """
    image, core = np.array(image, order="C"), np.zeros(image.shape[:2], np.uint8)
    _fill_bolts(core, _before_the_camera(bolts), radius, K, depth)
    left, top, width, height = cv2.boundingRect(core)
    if width:
        scale = max(core.shape) / xu.FRAME_SIZE
        reach = int(np.ceil(20 * scale))  # of the glow
        part = np.s_[
            max(top - reach, 0) : top + height + reach, max(left - reach, 0) : left + width + reach
        ]
        image[part] = cv2.add(image[part], _glow(core[part], colour, scale), dtype=cv2.CV_8U)
    return image


def _glow(core, colour, scale):
    """Light (h, w, 3) float32 of bolts' cores (h, w) uint8 and about them; its width grows with `scale`."""
    lit, shrink = np.nonzero(core), max(int(scale / 2), 1)  # smooth: fewer pixels will do
    size = [max(side // shrink, 1) for side in core.shape[::-1]]
    small = cv2.resize(core, size, interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    near, far = (cv2.GaussianBlur(small, (0, 0), sigma * scale / shrink) for sigma in (2.2, 5.0))
    halo = (1.1 * near + 0.7 * far)[..., None] * np.float32(colour)
    glow = cv2.resize(halo, core.shape[::-1])
    glow[lit] += core[lit][:, None] * (np.float32(WHITE_HOT) / 255)
    return glow


def _before_the_camera(bolts):
    """(B, 2, 3) segments of the bolts, cut at NEAR; those wholly behind it are left out."""
    segments = np.array(bolts, float).reshape(-1, 2, 3)
    segments = segments[(segments[..., 2] > NEAR).any(1)]
    for here, there in ((0, 1), (1, 0)):
        cut = segments[:, here, 2] < NEAR
        start, way = segments[cut, here], segments[cut, there] - segments[cut, here]
        segments[cut, here] = start + way * ((NEAR - start[:, 2:]) / way[:, 2:])
    return segments


def _fill_bolts(canvas, segments, radius, K, depth=None):
    """Draw bolts where nothing hides them: polygons of perspective width, at least a third of a pixel."""
    ends = (segments / segments[..., 2:]) @ K[:2].T
    thin, thick = np.maximum(K[0, 0] * radius / segments[..., 2].T * [[0.35], [1.0]], 0.33)[
        ..., None
    ]
    (tail, head), way = ends.swapaxes(0, 1), ends[:, 1] - ends[:, 0]
    along = way / np.maximum(np.linalg.norm(way, axis=1, keepdims=True), 1e-9)
    across = along[:, ::-1] * [-1, 1]
    outlines = np.stack(
        [
            tail + across * thin,
            head + across * thick,
            head + along * thick,
            head - across * thick,
            tail - across * thin,
        ],
        axis=1,
    )
    fixed = np.round((outlines.clip(-(2**20), 2**20) - 0.5) * 2**xu.CV_SHIFT).astype(np.int32)
    boxes = np.stack([np.floor(outlines.min(1)) - 2, np.ceil(outlines.max(1)) + 2], axis=1)
    boxes = boxes.clip(0, canvas.shape[::-1]).astype(int)
    for segment, line, outline, (low, high) in zip(segments, ends, fixed, boxes):
        box = np.s_[low[1] : high[1], low[0] : high[0]]
        if depth is None or not np.isfinite(depth[box]).any():
            cv2.fillConvexPoly(canvas, outline, 255, cv2.LINE_AA, xu.CV_SHIFT)
            continue
        bolt = np.zeros(depth[box].shape, np.uint8)
        cv2.fillConvexPoly(
            bolt, outline - np.int32(low << xu.CV_SHIFT), 255, cv2.LINE_AA, xu.CV_SHIFT
        )
        bolt[_depth_along(segment, line, low, high) >= depth[box] + 0.004] = 0
        np.maximum(canvas[box], bolt, out=canvas[box])


def _depth_along(segment, line, low, high):
    """Depth (h, w) of a bolt at the pixels of a box, from its ends (2, 3) and where they show (2, 2)."""
    x, y = np.arange(low[0], high[0]) - line[0, 0], np.arange(low[1], high[1])[:, None] - line[0, 1]
    x, y, way = x + 0.5, y + 0.5, line[1] - line[0]
    share = np.clip((x * way[0] + y * way[1]) / max(way @ way, 1e-18), 0, 1)
    return 1 / (
        (1 - share) / segment[0, 2] + share / segment[1, 2]
    )  # 1 / depth is linear in the picture


def _with_bolts(image, bolts, lasers, mesh, pose, K):
    depth = None if mesh is None or pose is None else _hull_depth(mesh, bolts, pose, K, image.shape)
    return draw_bolts(image, bolts, K, depth, lasers.radius, lasers.colour)


def _hull_depth(mesh, bolts, pose, K, shape, edge=4):
    """Depth (H, W) of the ship where bolts cross it in the picture, inf elsewhere; None where none does."""
    segments, seen = _before_the_camera(bolts), xu.project_pose(mesh.vertices, pose, K)
    ends, ship = (segments / segments[..., 2:]) @ K[:2].T, np.ascontiguousarray(seen.T)
    low, high = np.fmax(ends.min(1) - edge, ship.min(1)), np.fmin(ends.max(1) + edge, ship.max(1))
    crossing = (low < high).all(1)
    if not crossing.any():
        return None
    left, top = np.maximum(low[crossing].min(0), 0).astype(int)
    right, bottom = np.minimum(np.ceil(high[crossing].max(0)), shape[1::-1]).astype(int)
    depth = np.full(shape[:2], np.inf, np.float32)
    if left < right and top < bottom:
        codes = (seen < [left, top]) @ [1, 2] + (seen > [right, bottom]) @ [
            4,
            8,
        ]  # as Cohen and Sutherland
        near = np.bitwise_and.reduce(codes[mesh.faces], axis=1) == 0
        triangles, moved = (
            mesh.vertices[mesh.faces[near]],
            K - [[0, 0, left], [0, 0, top], [0, 0, 0]],
        )
        depth[top:bottom, left:right] = rasterise(
            triangles, pose, moved, right - left, bottom - top
        )[1]
    return depth


def draw_tracked(image, tracked, K):
    """Return a copy of the frame with what a `TrackedPose` says: its box, green where tracked, yellow where
    predicted, with two standard deviations of the corners, its axes, and its way in the next half second."""
    image, pose = np.array(image, order="C"), tracked.pose
    if pose is None:
        return image
    corners = xu.project_pose(xu.BOUNDING_BOX, pose, K)
    image = xu.draw_box(image, corners, GREEN if tracked.status == "tracked" else YELLOW)
    image = xu.draw_axes(image, pose, K)
    if tracked.covariance is not None:
        for corner, covariance in zip(corners, corner_covariance(pose, tracked.covariance, K)):
            _draw_ellipse(image, corner, covariance)
    if tracked.velocity is not None:
        ahead = pose[:3, 3] + np.linspace(0, 0.5, 9)[:, None] * tracked.velocity[3:]
        ahead = ahead[ahead[:, 2] > NEAR]
        points = np.array(
            [xu.cv_point(point) for point in (ahead / ahead[:, 2:]) @ K[:2].T], np.int32
        )
        cv2.polylines(image, [points.reshape(-1, 1, 2)], False, PINK, 1, cv2.LINE_AA, xu.CV_SHIFT)
    return image


def _draw_ellipse(image, centre, covariance):
    """Draw two standard deviations of a covariance (2, 2), unless they are larger than the frame."""
    if np.isfinite(centre).all() and 2 * np.sqrt(np.trace(covariance)) < image.shape[1]:
        values, vectors = np.linalg.eigh(covariance)
        angle = float(np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])))
        axes = (
            np.round(2 * np.sqrt(np.maximum(values[::-1], 0)) * 2**xu.CV_SHIFT).astype(int).tolist()
        )
        cv2.ellipse(
            image, xu.cv_point(centre), axes, angle, 0, 360, BLUE, 1, cv2.LINE_AA, xu.CV_SHIFT
        )


def corner_covariance(pose, covariance, K):
    """(8, 2, 2) square pixels: how far a pose's covariance (6, 6) moves the box's corners, to first order."""
    turned = xu.BOUNDING_BOX @ pose[:3, :3].T
    jacobian = cv2.projectPoints(turned, np.zeros(3), pose[:3, 3], K, None)[1][:, :6].reshape(
        -1, 2, 6
    )
    return jacobian @ covariance @ np.swapaxes(jacobian, 1, 2)


def draw_heatmaps(heatmaps, size):
    """One picture (size, size, 3) uint8 of all heatmaps (H, W, K) of a frame, each in its own colour."""
    heatmaps, hues = (
        np.asarray(heatmaps, np.float32),
        np.full((1, np.shape(heatmaps)[-1], 3), 255, np.uint8),
    )
    hues[0, :, 0] = np.arange(hues.shape[1]) * 180 // hues.shape[1]
    brightest = cv2.cvtColor(hues, cv2.COLOR_HSV2RGB)[0][heatmaps.argmax(-1)]
    picture = (brightest * heatmaps.max(-1, keepdims=True).clip(0, 1)).astype(np.uint8)
    return cv2.resize(picture, (size, size), interpolation=cv2.INTER_LINEAR)


def tracked_pictures(clip, track, K, detector, indices, size=xu.FRAME_SIZE):
    """Yield frames of a clip (see `frames_at`), (size, 2 size, 3): `draw_tracked` beside `draw_heatmaps`."""
    for i, frame in zip(indices, frames_at(clip, indices)):
        square, scale, offset = letterbox(frame, size)
        moved = np.diag([scale, scale, 1]) @ K + [[0, 0, offset[0]], [0, 0, offset[1]], [0, 0, 0]]
        heatmaps = detector.heatmaps(square[None])[0, ..., :8]
        yield np.hstack([draw_tracked(square, track[i], moved), draw_heatmaps(heatmaps, size)])


def viewer(pictures, start=0, step=1, fps=12.5, width=640):
    """A widget for a notebook: pictures (H, W, 3) uint8 at the move of a slider, or played as a film.

    The i-th picture shows frame i * step of a clip, that of frame `start` shows first. All are drawn before
    any shows, `width` pixels wide. Widgets that capture output can hang without a browser (nbclient 312).
    """
    import ipywidgets

    jpegs = []
    for picture in pictures:
        scale = min(width / picture.shape[1], 1.0)
        small = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        jpegs.append(
            cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
        )
    if not jpegs:
        raise ValueError("expected at least one picture, got none")
    last, start = (len(jpegs) - 1) * step, start // step * step
    image = ipywidgets.Image(
        value=jpegs[start // step], format="jpeg", layout={"width": f"{width}px"}
    )
    slider = ipywidgets.IntSlider(start, 0, last, step, description="frame")
    play = ipywidgets.Play(value=start, min=0, max=last, step=step, interval=round(1000 / fps))
    ipywidgets.jslink((play, "value"), (slider, "value"))
    slider.observe(lambda change: setattr(image, "value", jpegs[change["new"] // step]), "value")
    return ipywidgets.VBox([image, ipywidgets.HBox([play, slider])])


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
