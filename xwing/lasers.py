"""Laser bolts: where they fly, what hides them, how they glow."""

import dataclasses

import cv2
import numpy as np

import xwing_utils as xu
from xwing.mesh import rasterise

NEAR = 0.05  # model units: bolts are cut this close to the camera's plane


WHITE_HOT = 255, 215, 190  # of a bolt's core


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
