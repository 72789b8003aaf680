"""The network on frames of any size.

The network takes square frames and finds the target best where it fills a good part of them. The
`Detector` therefore looks at a frame twice. It first searches the whole frame, scaled down and set
into a black square (the letterbox). If it finds nothing there, it searches overlapping parts of the
frame, in which a small target is larger. Then it cuts a square around the keypoints that it found
out of the frame itself, where the target has more pixels and its keypoints are more precise. A
caller that knows where the target is, such as the tracker, passes a box, and the search is skipped.

OpenVINO runs the network, because it is faster than Keras on a processor.
"""

import dataclasses
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import openvino

import xwing_utils as xu
from xwing.lookalikes import with_lookalikes
from xwing.network import read_network
from xwing.sighting import Sighting

MIN_FOUND = 4  # confident keypoints; fewer are not worth the time that verifying their pose takes
MIN_RETAINED = 0.8  # of the search's confident keypoints; a close square with fewer cuts them off
PART_SIDE = 0.5  # of the frame's longer side: squares that are searched where nothing is found
PART_MARGIN = 0.06  # of a part's side: a target that comes nearer to its border may be cut off
PART_STEP = 2 / 3  # of that side, at most, from one square to the next
CLOSE_MARGIN = 1.1  # side of the close square over the longer side of the keypoints' bounding box


class _Square(NamedTuple):
    """A square of a frame, and the size to which it is scaled, in pixels.

    The square may reach beyond the frame.
    """

    left: int
    top: int
    side: int
    size: int

    def cut_from(self, image):
        """The pixels of the square, (size, size, 3) uint8, black beyond the frame.

        They are cut out at whole pixels and scaled afterwards, so that the scale is exact.
        """
        square = image
        if (self.left, self.top) != (0, 0) or image.shape[:2] != (self.side, self.side):
            square = xu.crop_image(image, (self.left, self.top), self.side)

        if self.side == self.size:
            return square
        interpolation = cv2.INTER_AREA if self.size < self.side else cv2.INTER_LINEAR
        return cv2.resize(square, (self.size, self.size), interpolation=interpolation)

    def lengths_in_frame(self, lengths):
        """Convert lengths in the scaled square to pixels of the frame."""
        return lengths * self.side / self.size


def _whole_frame(image, size):
    """The square that holds a frame in its middle, scaled to `size` pixels."""
    height, width = image.shape[:2]
    side = max(height, width)
    return _Square(-((side - width) // 2), -((side - height) // 2), side, size)


def _spread(length, side):
    """The first pixels of the fewest squares of a side that cover a length and overlap."""
    room = max(length - side, 0)
    count = math.ceil(room / (PART_STEP * side)) + 1
    return [round(place) for place in np.linspace(0, room, count)]


def _count_found(seen):
    """How many keypoints of a `Sighting` are confident."""
    return int((seen.confidence >= xu.MIN_CONFIDENCE).sum())


def _shows_whole(part, seen):
    """Whether a part shows the whole target, as far as the keypoints found in it say."""
    if _count_found(seen) < MIN_FOUND:
        return False
    found = seen.keypoints[seen.confidence >= xu.MIN_CONFIDENCE] - [part.left, part.top]
    margin = PART_MARGIN * part.side
    return bool(found.min() > margin and found.max() < part.side - margin)


def letterbox(image: np.ndarray, size: int) -> tuple[np.ndarray, float, np.ndarray]:
    """Set a frame into the middle of a black square.

    A position p of the frame lies at p * scale + offset in the square. The camera matrix of the
    square is `xu.crop_camera(K, *(-offset / scale), scale)`.

    Args:
        image: (H, W, 3) uint8.
        size: side of the square in pixels.

    Returns:
        square (size, size, 3) uint8; scale, pixels of the square for one pixel of the frame; and
        offset (2,), the place (x, y) of the frame's top-left corner in the square.
    """
    square = _whole_frame(image, size)
    scale = size / square.side
    offset = -np.array([square.left, square.top]) * size / square.side
    return square.cut_from(image), scale, offset


def _checked_squares(squares):
    """Squares (N, S, S, 3) as uint8 RGB, or a ValueError."""
    squares = np.asarray(squares)
    sides = squares.shape[1:3]
    if squares.ndim != 4 or sides[0] != sides[1] or sides[0] % 32 or not squares.size:
        raise ValueError(
            "squares: expected the shape (N, S, S, 3), where S is a multiple of 32, "
            f"got {squares.shape}"
        )
    return np.stack([xu.rgb_image(square) for square in squares])


def _known_target(weights):
    """The target of some weights, with its lookalikes where its mesh is still there."""
    target = xu.weights_target(weights)
    return with_lookalikes(target, weights) if target.mesh.is_file() else target


class Detector:
    """Finds the keypoints of the target in frames of any size.

        detector = Detector("weights/xwing.weights.h5")
        keypoints, confidence, sigma = detector(image)
        keypoints, confidence, sigma = detector(image, box)  # around a known box; twice as fast

    Several threads may share a detector.

    Attributes:
        settings: the dict that is kept with the weights.
        target: the `xwing_utils.Target` that the weights were trained for, with its lookalikes: see
            `lookalikes.with_lookalikes`.
    """

    def __init__(
        self,
        weights: str | Path,
        crop_sizes: Sequence[int] = (96, 128),
        search_size: int = 192,
        precision: str = "f32",
    ):
        """Load the network.

        Args:
            weights: `NAME.weights.h5`, with `NAME.json` beside it.
            crop_sizes: sizes in pixels, multiples of 32, to which the close square may be scaled.
                Without any, keypoints are always read from the whole frame.
            search_size: size in pixels, a multiple of 32, to which the whole frame is scaled.
            precision: "f32", or "bf16", which is faster and moves keypoints by some hundredths of a
                pixel.
        """
        self.settings = xu.weights_settings(weights)
        self.target = _known_target(weights)
        self.crop_sizes = sorted(crop_sizes)
        self.search_size = search_size

        keypoints = self.settings["model"]["keypoints"]
        self._permutation = xu.heatmap_permutation(self.target, keypoints)

        self._lock = threading.Lock()
        self._core = openvino.Core()
        self._model = read_network(weights)
        self._options = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # else two processes would be pinned to the same core
        }
        sizes = {search_size, *self.crop_sizes}
        self._requests = {size: self._compile(size) for size in sizes}

    def _compile(self, size):
        """Build the network for squares of one size: OpenVINO is fastest for a fixed size."""
        self._model.reshape([1, size, size, 3])
        return self._core.compile_model(self._model, "CPU", self._options).create_infer_request()

    def heatmaps(self, squares: np.ndarray, averaged: bool = True) -> np.ndarray:
        """Compute the network's heatmaps of squares.

        Args:
            squares: (N, S, S, 3) uint8 RGB; S is a multiple of 32.
            averaged: whether to average them with the heatmaps of the mirrored squares, if the
                target has a mirror plane. Averaging takes twice the time and is more accurate.

        Returns:
            (N, h, w, K) float32, one for each of the K keypoints.

        Raises:
            ValueError: the squares are something else.
        """
        squares = _checked_squares(squares)
        size = squares.shape[1]
        with self._lock:
            if size not in self._requests:
                self._requests[size] = self._compile(size)
            if not averaged:
                return self._infer(squares)
            return xu.average_mirrored(self._infer, squares, self._permutation)

    def _infer(self, squares):
        request = self._requests[squares.shape[1]]
        return np.concatenate(
            [request.infer([square[None].astype(np.float32)])[0] for square in squares]
        )

    def __call__(self, image: np.ndarray, box: np.ndarray | None = None) -> Sighting:
        """Find the keypoints in a frame.

        Args:
            image: (H, W, 3) uint8 RGB, or what `xu.rgb_image` makes that of.
            box: [[left, top], [right, bottom]] in pixels, where the target is known to be. Only a
                square around it is examined, if that shows more detail than the whole frame does.

        Returns:
            `Sighting`, as three arrays: keypoints (K, 2) in pixels of the frame, NaN where none is
            found; confidence (K,) in [0, 1]; and sigma (K,), the expected standard deviation of
            each keypoint, in pixels of the frame.

        Raises:
            ValueError: the image is of a kind that is not clear.
        """
        image = xu.rgb_image(image)
        square = None if box is None else self._close_square(image, box)
        if square is None:
            return self._search(image)
        return self._read(image, square)

    def _search(self, image):
        """Find the target in the whole frame or a part of it, then read its keypoints from close.

        The place where it was found is read again, and with more care, if a close square shows no
        more detail or cuts keypoints off.
        """
        square = _whole_frame(image, self.search_size)
        seen = self._read(image, square, averaged=False)
        if _count_found(seen) < MIN_FOUND:
            reads = [(part, self._read(image, part, averaged=False)) for part in self._parts(image)]
            whole = [read for read in reads if _shows_whole(*read)]
            if not whole:
                nowhere = np.full_like(seen.keypoints, np.nan)
                return dataclasses.replace(seen, keypoints=nowhere, heatmaps=None)
            square, seen = max(whole, key=lambda read: _count_found(read[1]))
        found = seen.keypoints[seen.confidence >= xu.MIN_CONFIDENCE]

        close_square = self._close_square(image, found)
        if close_square is not None:
            close = self._read(image, close_square)
            if _count_found(close) >= MIN_RETAINED * len(found):
                return close
        return self._read(image, square)

    def _parts(self, image):
        """Overlapping squares of a frame; none where they show no more detail than all of it."""
        height, width = image.shape[:2]
        side = round(PART_SIDE * max(height, width))
        if side < self.search_size:
            return []
        lefts, tops = (_spread(length, side) for length in (width, height))
        return [_Square(left, top, side, self.search_size) for top in tops for left in lefts]

    def _close_square(self, image, points):
        """The square around some points (N, 2); None where the whole frame shows as much detail."""
        frame = np.array(image.shape[1::-1])  # width, height
        points = np.clip(np.asarray(points, float), 0, frame)
        low = points.min(0)
        high = points.max(0)
        if not self.crop_sizes or not (high > low).all():
            return None

        # A small frame is enlarged no more than would make the whole of it FRAME_SIZE pixels long.
        max_scale = max(xu.FRAME_SIZE / frame.max(), 1.0)
        needed = CLOSE_MARGIN * (high - low).max()
        large_enough = [size for size in self.crop_sizes if size >= needed * max_scale]
        size = large_enough[0] if large_enough else self.crop_sizes[-1]
        scale = min(size / needed, max_scale)
        if scale <= self.search_size / frame.max():
            return None

        # The square is centred on the points, and then moved into the frame as far as it fits.
        side = max(round(size / scale), int(np.ceil(needed)))
        corner = np.round((low + high - side) / 2)
        room = frame - side
        left, top = np.clip(corner, np.minimum(room, 0), np.maximum(room, 0)).astype(int)
        return _Square(left, top, side, size)

    def _read(self, image, square, averaged=True):
        """The `Sighting` in one square."""
        maps = self.heatmaps(square.cut_from(image)[None], averaged)[0]
        keypoints, confidence, sigma = xu.read_keypoints(maps, self.settings["model"])
        corner = np.array([square.left, square.top])
        return Sighting(
            square.lengths_in_frame(keypoints) + corner,
            confidence,
            square.lengths_in_frame(sigma),
            maps,
            corner,
            square.side / maps.shape[1],
        )
