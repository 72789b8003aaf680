"""Laser bolts: where they fly, what hides them, how they glow.

The cannons fire volleys at a steady rate. A bolt keeps the course on which it was fired, whatever
the ship does next. The camera stands still, so a bolt is a segment that moves along a straight line
in the camera's frame. It is drawn as a tapered polygon in perspective, hidden where the depth map
of the hull is nearer to the camera, and blurred into a glow. All lengths of the settings are in
diameters of the target, so that the same settings suit a target of any size.
"""

import dataclasses

import cv2
import numpy as np

import xwing_utils as xu
from xwing.mesh import Mesh, rasterise

NEAR = 0.10643  # diameters: bolts are cut this close to the camera's plane
DEPTH_TOLERANCE = 0.0085140  # diameters by which a bolt may lie behind the hull and still show
JUST_FIRED = 1e-9  # diameters: a bolt that has flown no further does not show yet
SAME_TIME = 1e-9  # seconds; a volley that is due so soon, through rounding, is due now

WHITE_HOT = (255, 215, 190)  # RGB of a bolt's core
TAIL_WIDTH = 0.35  # of a bolt, as a fraction of its width at the head
MIN_RADIUS = 0.33  # pixels: a bolt far away is drawn no thinner
GLOW_REACH = 20  # pixels of a frame of the usual size, to which the glow reaches
MASK_SAMPLES = 4  # in a row and in a column of each pixel of a mask
MASK_ROWS = 256  # of a mask that are drawn at a time
HULL_EDGE = 4  # pixels about a bolt's line in which the depth of the hull is needed


@dataclasses.dataclass(frozen=True)
class Lasers:
    """Settings of a target's cannons. One half of them fires in a volley, the other in the next.

    Raises:
        ValueError: a setting is out of range.
    """

    rate: float = 5.0  # volleys a second
    speed: float = 4.2570  # of the bolts, diameters a second
    length: float = 0.34056  # of a bolt, diameters
    reach: float = 6.3856  # of a bolt's flight, diameters
    jitter: float = 0.0  # how much the time between two volleys varies, as a fraction in [0, 1)
    seed: int = 0  # of the jitter
    colour: tuple = (255, 60, 40)  # of the glow, RGB
    radius: float = 0.0068113  # of a bolt, diameters

    def __post_init__(self):
        for name in ("rate", "speed", "length", "reach", "radius"):
            xu.check_positive(name, getattr(self, name))

        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter: expected a fraction in [0, 1), got {self.jitter}")

    def shot(self, fps: float = 30.0, target: xu.Target = xu.XWING) -> "Shot":
        """Start a new shot.

        Args:
            fps: frames a second of the shot, where `Shot.step` is not given the time of a frame.
            target: whose cannons fire; a target without lasers fires none.
        Returns:
            Shot.
        """
        return Shot(self, fps, target)


class Shot:
    """The bolts of one shot. The camera stands still, so that its frame serves as the world's.

    shot = Lasers(rate=5).shot(fps=30)
    pictures = [draw_bolts(frame, shot.step(pose), K) for frame, pose in zip(frames, poses)]
    """

    def __init__(self, lasers: Lasers, fps: float, target: xu.Target):
        xu.check_positive("fps", fps)
        self._lasers = lasers
        self._target = target
        self._interval = 1 / fps
        self._random = np.random.default_rng(lasers.seed)

        self._now = -self._interval
        self._due = 0.0  # second of the next volley
        self._volley = 0  # number of the next volley
        self._fired = np.zeros((0, 7))  # of each bolt in flight: second (1), muzzle (3), aim (3)

    def step(self, pose: np.ndarray | None, seconds: float | None = None) -> np.ndarray:
        """Go on by one frame.

        Args:
            pose: (4, 4) model -> OpenCV camera. None: nothing is fired, and earlier bolts fly on.
            seconds: time of this frame. None: one frame later than the last one.
        Returns:
            (B, 2, 3) tail and head of each bolt in the camera's frame, model units.
        """
        now = self._now + self._interval if seconds is None else seconds
        self._now = max(now, self._now)  # a clock that runs backwards stands still
        self._fire_volleys(pose)
        return self._bolts_in_flight()

    def _fire_volleys(self, pose):
        """Fire all volleys that are due by now."""
        lasers = self._lasers

        # After a long gap in the time stamps, volleys whose bolts are out of reach are not fired.
        flight_time = (lasers.reach + lasers.length) / lasers.speed
        self._due = max(self._due, self._now - flight_time)

        while self._due <= self._now + SAME_TIME:
            if pose is not None and self._target.lasers is not None:
                self._fire(pose)
            self._volley += 1
            self._due += (1 + lasers.jitter * self._random.uniform(-1, 1)) / lasers.rate

    def _fire(self, pose):
        """Fire the cannons whose turn it is, at the second that is due."""
        lines = self._target.lasers
        lines = lines[_cannons_of_volley(len(lines), self._volley)]
        lines = lines @ pose[:3, :3].T + pose[:3, 3]

        muzzles = lines[:, 0]
        aims = lines[:, 1] - muzzles
        directions = aims / np.linalg.norm(aims, axis=1, keepdims=True)

        seconds = np.full((len(lines), 1), self._due)
        self._fired = np.vstack([self._fired, np.hstack([seconds, muzzles, directions])])

    def _bolts_in_flight(self):
        """(B, 2, 3) tails and heads; forget the bolts that are out of reach."""
        lasers = self._lasers
        flown = (self._now - self._fired[:, 0]) * lasers.speed
        in_reach = flown - lasers.length < lasers.reach
        self._fired = self._fired[in_reach]
        flown = flown[in_reach]

        shows = flown > JUST_FIRED
        heads = flown[shows]
        tails = np.maximum(heads - lasers.length, 0)
        distances = np.stack([tails, heads], axis=1)[..., None] * self._target.diameter

        muzzles = self._fired[shows, None, 1:4]
        directions = self._fired[shows, None, 4:]
        return muzzles + distances * directions


def _cannons_of_volley(count, volley):
    """Numbers of the cannons that fire: of four, 1 and 2 in the first volley, then 0 and 3."""
    if count == 1:
        return np.array([0])

    half = (np.arange(count) + 1) // 2 % 2  # 0, 1, 1, 0, and so on
    return np.flatnonzero(half != volley % 2)


# ------------------------------------------------------------ drawing


def draw_shot(
    image: np.ndarray,
    bolts: np.ndarray,
    lasers: Lasers,
    mesh: Mesh | None,
    pose: np.ndarray | None,
    K: np.ndarray,
    target: xu.Target = xu.XWING,
) -> np.ndarray:
    """Draw the bolts of one frame of a shot, hidden where the hull lies before them.

    Args:
        image: (H, W, 3) uint8.
        bolts: (B, 2, 3) from `Shot.step`, model units.
        lasers: the settings with which they were fired.
        mesh: the hull that hides bolts; None: nothing is hidden.
        pose: (4, 4) of the hull in this frame; None: nothing is hidden.
        K: (3, 3) camera matrix.
        target: whose diameter is the unit of the settings.
    Returns:
        (H, W, 3) uint8, a copy.
    """
    depth = None
    if mesh is not None and pose is not None:
        depth = hull_depth(mesh, bolts, pose, K, image.shape, target)

    radius = lasers.radius * target.diameter
    return draw_bolts(image, bolts, K, depth, radius, lasers.colour, target)


def draw_bolts(
    image: np.ndarray,
    bolts: np.ndarray,
    K: np.ndarray,
    depth: np.ndarray | None = None,
    radius: float | None = None,
    colour: tuple = Lasers.colour,
    target: xu.Target = xu.XWING,
) -> np.ndarray:
    """Draw bolts as glowing light.

    Args:
        image: (H, W, 3) uint8.
        bolts: (B, 2, 3) tails and heads in the camera's frame, model units, see `Shot.step`.
        K: (3, 3) camera matrix.
        depth: (H, W) of what may hide bolts, model units, see `mesh.rasterise`; or None.
        radius: of a bolt at its head, model units; it tapers towards the tail and narrows with the
            distance. None: that of the usual `Lasers` on the target.
        colour: of the glow, RGB.
        target: whose diameter scales the usual radius, the near plane and the tolerance in depth.
    Returns:
        (H, W, 3) uint8, a copy.
    """
    image = np.array(image, order="C")
    if radius is None:
        radius = Lasers.radius * target.diameter

    core = np.zeros(image.shape[:2], np.uint8)
    segments = cut_at_near(bolts, NEAR * target.diameter)
    _fill_bolts(core, segments, radius, K, depth, DEPTH_TOLERANCE * target.diameter)

    left, top, width, height = cv2.boundingRect(core)
    if not width:
        return image

    scale = max(core.shape) / xu.FRAME_SIZE
    reach = int(np.ceil(GLOW_REACH * scale))
    rows = slice(max(top - reach, 0), top + height + reach)
    columns = slice(max(left - reach, 0), left + width + reach)
    light = glow(core[rows, columns], colour, scale)
    image[rows, columns] = cv2.add(image[rows, columns], light, dtype=cv2.CV_8U)
    return image


def glow(core: np.ndarray, colour: tuple, scale: float) -> np.ndarray:
    """Compute the light of bolts and of the glow about them.

    Args:
        core: (h, w) uint8, the bolts' coverage of the pixels.
        colour: of the glow, RGB.
        scale: size of the frame over the usual one, by which the glow is wider.
    Returns:
        (h, w, 3) float32, to be added to a picture.
    """
    shrink = max(int(scale / 2), 1)  # the glow is smooth, so that fewer pixels will do
    size = [max(side // shrink, 1) for side in core.shape[::-1]]
    small = cv2.resize(core, size, interpolation=cv2.INTER_AREA).astype(np.float32) / 255

    narrow = cv2.GaussianBlur(small, (0, 0), 2.2 * scale / shrink)
    wide = cv2.GaussianBlur(small, (0, 0), 5.0 * scale / shrink)
    halo = (1.1 * narrow + 0.7 * wide)[..., None] * np.float32(colour)
    light = cv2.resize(halo, core.shape[::-1])

    lit = np.nonzero(core)
    light[lit] += core[lit][:, None] * (np.float32(WHITE_HOT) / 255)
    return light


def cut_at_near(bolts: np.ndarray, near: float) -> np.ndarray:
    """Cut bolts at a plane in front of the camera.

    Args:
        bolts: (B, 2, 3) tails and heads in the camera's frame.
        near: distance of the plane from the camera, in the units of the bolts.
    Returns:
        (C, 2, 3) what lies beyond the plane; bolts without such a part are left out.
    """
    segments = np.array(bolts, float).reshape(-1, 2, 3)
    segments = segments[(segments[..., 2] > near).any(1)]

    for here, there in ((0, 1), (1, 0)):
        cut = segments[:, here, 2] < near
        start = segments[cut, here]
        way = segments[cut, there] - start
        segments[cut, here] = start + way * ((near - start[:, 2:]) / way[:, 2:])
    return segments


def _fill_bolts(canvas, segments, radius, K, depth, tolerance):
    """Draw bolts (B, 2, 3) into a canvas (H, W) uint8, where nothing hides them."""
    ends = (segments / segments[..., 2:]) @ K[:2].T
    outlines = _bolt_outlines(segments, ends, radius, K)

    # OpenCV's fixed-point indices, as in `xu.cv_point`.
    indices = outlines.clip(-(2**20), 2**20) - 0.5
    polygons = np.round(indices * 2**xu.CV_SHIFT).astype(np.int32)

    boxes = np.stack([np.floor(outlines.min(1)) - 2, np.ceil(outlines.max(1)) + 2], axis=1)
    boxes = boxes.clip(0, canvas.shape[::-1]).astype(int)

    for segment, line, polygon, (low, high) in zip(segments, ends, polygons, boxes):
        box = np.s_[low[1] : high[1], low[0] : high[0]]
        if depth is None or not np.isfinite(depth[box]).any():  # nothing can hide this bolt
            cv2.fillConvexPoly(canvas, polygon, 255, cv2.LINE_AA, xu.CV_SHIFT)
            continue

        bolt = np.zeros(depth[box].shape, np.uint8)
        moved = polygon - np.int32(low << xu.CV_SHIFT)
        cv2.fillConvexPoly(bolt, moved, 255, cv2.LINE_AA, xu.CV_SHIFT)

        hidden = _depth_along(segment, line, low, high) >= depth[box] + tolerance
        bolt[hidden] = 0
        np.maximum(canvas[box], bolt, out=canvas[box])


def _bolt_outlines(segments, ends, radius, K):
    """(B, 5, 2) pixels: polygons with a pointed head, whose width follows the perspective."""
    depths = segments[..., 2]
    thin = np.maximum(TAIL_WIDTH * K[0, 0] * radius / depths[:, :1], MIN_RADIUS)
    thick = np.maximum(K[0, 0] * radius / depths[:, 1:], MIN_RADIUS)

    tail = ends[:, 0]
    head = ends[:, 1]
    way = head - tail
    along = way / np.maximum(np.linalg.norm(way, axis=1, keepdims=True), 1e-9)
    across = along[:, ::-1] * [-1, 1]

    corners = [
        tail + across * thin,
        head + across * thick,
        head + along * thick,
        head - across * thick,
        tail - across * thin,
    ]
    return np.stack(corners, axis=1)


def _depth_along(segment, line, low, high):
    """Depth (h, w) of a bolt at a box's pixels, from its ends (2, 3) and their pixels (2, 2)."""
    x = np.arange(low[0], high[0]) + 0.5 - line[0, 0]
    y = np.arange(low[1], high[1])[:, None] + 0.5 - line[0, 1]
    way = line[1] - line[0]
    fraction = np.clip((x * way[0] + y * way[1]) / max(way @ way, 1e-18), 0, 1)

    # 1 / depth, not depth, is linear in the picture.
    return 1 / ((1 - fraction) / segment[0, 2] + fraction / segment[1, 2])


def hull_depth(
    mesh: Mesh,
    bolts: np.ndarray,
    pose: np.ndarray,
    K: np.ndarray,
    shape: tuple,
    target: xu.Target = xu.XWING,
) -> np.ndarray | None:
    """Compute the depth of the hull, only where bolts may cross it in the picture.

    Args:
        mesh: of the hull.
        bolts: (B, 2, 3) tails and heads in the camera's frame, model units.
        pose: (4, 4) of the hull, model -> OpenCV camera.
        K: (3, 3) camera matrix.
        shape: (H, W, ...) of the picture.
        target: whose diameter scales the near plane of the bolts.
    Returns:
        (H, W) float32 model units, inf where nothing was drawn; None where no bolt can cross the
        hull.
    """
    corners = xu.project_pose(mesh.vertices, pose, K)
    box = _crossed_box(corners, cut_at_near(bolts, NEAR * target.diameter), K, shape)
    if box is None:
        return None

    left, top, right, bottom = box
    depth = np.full(shape[:2], np.inf, np.float32)
    if left >= right or top >= bottom:
        return depth

    # A triangle whose corners all lie beyond one side of the box cannot show in it (the outcodes of
    # Cohen and Sutherland). A corner behind the camera is NaN and lies beyond no side, so that its
    # triangle is kept.
    codes = (corners < [left, top]) @ [1, 2] + (corners > [right, bottom]) @ [4, 8]
    inside = np.bitwise_and.reduce(codes[mesh.faces], axis=1) == 0
    triangles = mesh.vertices[mesh.faces[inside]]

    moved = xu.crop_camera(K, left, top)
    _, part = rasterise(triangles, pose, moved, right - left, bottom - top, near=mesh.near)
    depth[top:bottom, left:right] = part
    return depth


def _crossed_box(corners, segments, K, shape):
    """The pixels (left, top, right, bottom) where bolts may cross the hull; None where none does.

    A bolt and the hull, whose vertices project to `corners` (V, 2), can cross only where their
    bounding boxes overlap. If a vertex is behind the camera (NaN), the hull's box is unknown, and
    the bolt's box is taken.
    """
    ends = (segments / segments[..., 2:]) @ K[:2].T
    axes = np.ascontiguousarray(corners.T)  # (2, V): a minimum along contiguous rows is faster
    low = np.fmax(ends.min(1) - HULL_EDGE, axes.min(1))
    high = np.fmin(ends.max(1) + HULL_EDGE, axes.max(1))

    crossing = (low < high).all(1)
    if not crossing.any():
        return None

    left, top = np.maximum(low[crossing].min(0), 0).astype(int)
    highest = np.ceil(high[crossing].max(0))
    right, bottom = np.minimum(highest, shape[1::-1]).astype(int)
    return left, top, right, bottom


def hull_mask(
    mesh: Mesh, pose: np.ndarray | None, K: np.ndarray, width: int, height: int
) -> np.ndarray:
    """Draw how much of each pixel the hull covers.

    Args:
        mesh: of the hull.
        pose: (4, 4) of the hull, model -> OpenCV camera; None where it is not known.
        K: (3, 3) camera matrix.
        width: of the picture, pixels.
        height: of the picture, pixels.
    Returns:
        (height, width) uint8, of 255; black without a pose.
    """
    mask = np.zeros((height, width), np.uint8)
    if pose is None:
        return mask
    for top in range(0, height, MASK_ROWS):  # in bands, so that large frames need little memory
        rows = min(MASK_ROWS, height - top)
        fine = xu.crop_camera(K, 0, top, MASK_SAMPLES)
        size = MASK_SAMPLES * width, MASK_SAMPLES * rows
        ids, _ = rasterise(mesh.triangles, pose, fine, *size, near=mesh.near)
        covered = np.float32(ids >= 0)
        mask[top : top + rows] = np.round(
            255 * cv2.resize(covered, (width, rows), interpolation=cv2.INTER_AREA)
        )
    return mask
