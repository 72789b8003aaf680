"""The network on frames of any size (OpenVINO)."""

import contextlib
import hashlib
import io
import json
import tempfile
import threading
import zipfile
from pathlib import Path

import cv2
import numpy as np
import openvino

import xwing_utils as xu

MIN_RETAINED_SHARE = 0.8  # of the points that the search found: a close look must find as many


def letterbox(image, size):
    """The frame in the middle of a black square of `size` pixels, with its scale and offset.

    Returns (size, size, 3) uint8; scale; (2,) pixels: a position p of the frame lies at p * scale + offset.
    """
    left, top, side = _whole(image)
    return _square(image, left, top, side, size), size / side, np.array([-left, -top]) * size / side


def _whole(image):
    """The square (left, top, side), whole pixels, that holds a frame in its middle."""
    side = max(image.shape[:2])
    return -((side - image.shape[1]) // 2), -((side - image.shape[0]) // 2), side


def _square(image, left, top, side, size):
    """A square of the frame, black beyond its edge: cut out, and then scaled, so that the scale is exact."""
    whole = (left, top) == (0, 0) and image.shape[:2] == (side, side)
    square = image if whole else xu.crop(image, (left, top), side)
    if side == size:
        return square
    return cv2.resize(
        square, (size, size), interpolation=cv2.INTER_AREA if size < side else cv2.INTER_LINEAR
    )


def export_model(path, size=xu.FRAME_SIZE):
    """The `.xml` and the `.bin` file (bytes) of a network for OpenVINO, made once for each version of it.

    An archive in `.openvino/` beside the weights keeps them, with checksums; it is replaced as a whole, and
    those of older versions are removed. OSError where it cannot be written.
    """
    path, settings = Path(path), json.dumps(xu.weights_settings(path), sort_keys=True)
    digest = hashlib.sha256(path.read_bytes() + settings.encode()).hexdigest()[:12]
    name = f"{path.name.removesuffix('.weights.h5')}-{size}-"
    archive = path.parent / ".openvino" / f"{name}{digest}.zip"
    with (
        contextlib.suppress(OSError, zipfile.BadZipFile, KeyError),
        zipfile.ZipFile(archive) as files,
    ):
        return files.read("model.xml"), files.read("model.bin")
    contents, packed = _export(xu.load_model(path, size)), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as files:
        files.writestr("model.xml", contents[0])
        files.writestr("model.bin", contents[1])
    archive.parent.mkdir(exist_ok=True)
    xu.write_files({archive: packed.getvalue()})
    for old in set(archive.parent.glob(f"{name}*.zip")) - {archive}:
        old.unlink(missing_ok=True)
    return contents


def _export(model):
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.export(f"{folder}/model.xml", format="openvino", verbose=False)
            openvino.Core().read_model(f"{folder}/model.xml")  # fails where not all was written
        except RuntimeError as error:
            raise OSError(
                f"{folder}: the network cannot be exported ({error}); is the disk full?"
            ) from None
        return Path(folder, "model.xml").read_bytes(), Path(folder, "model.bin").read_bytes()


class Detector:
    """The network for footage: it finds the ship in a frame of any size, and looks at it closely.

        detector = Detector("weights/xwing.weights.h5")
        keypoints, confidence, sigma = detector(image)  # or (image, box): at once about a box, twice as fast

    It runs in OpenVINO; the first use of new weights takes a quarter of a minute. Threads may share it.
    Attribute: settings, the dict kept with the weights.
    """

    def __init__(self, weights, crop_sizes=(96, 128), search_size=192, precision="f32"):
        """crop_sizes: sides of the squares for the close look in pixels, multiples of 32; () leaves it out.
        search_size: side in pixels to which the whole frame is scaled.
        precision: "f32", or "bf16": faster, and keypoints move by some hundredths of a pixel."""
        self.settings = xu.weights_settings(weights)
        self.crop_sizes, self.search_size = sorted(crop_sizes), search_size
        self._core, self._turn = openvino.Core(), threading.Lock()
        self._model = self._core.read_model(*export_model(weights))
        self._options = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
        }  # two processes would be pinned to the same core
        self._requests = {side: self._compile(side) for side in {search_size, *self.crop_sizes}}

    def _compile(self, side):
        self._model.reshape([1, side, side, 3])
        return self._core.compile_model(self._model, "CPU", self._options).create_infer_request()

    def heatmaps(self, squares, averaged=True):
        """Heatmaps (n, h, w, 36) float32 of n squares (n, S, S, 3) uint8; S is a multiple of 32.

        Unless they are `averaged` with those of the mirrored squares they take half the time.
        """
        side = squares.shape[1]
        with self._turn:
            if side not in self._requests:
                self._requests[side] = self._compile(side)
            if not averaged:
                return self._infer(squares)
            return xu.average_mirrored(self._infer, squares, self.settings["model"]["keypoints"])

    def _infer(self, squares):
        infer = self._requests[squares.shape[1]].infer
        return np.concatenate([infer([square[None].astype(np.float32)])[0] for square in squares])

    def __call__(self, image, box=None):
        """Keypoints (36, 2), NaN where none, confidence (36,), sigma (36,) of a frame (H, W, 3), in pixels.

        Only a square about a `box` [[left, top], [right, bottom]] is looked at, where that shows more detail.
        """
        whole, sure, square = (*_whole(image), self.search_size), (), self._close_square(image, box)
        if square is None:
            found = self._look(image, *whole, averaged=False)  # to know where it is
            sure = found[0][found[1] >= xu.MIN_CONFIDENCE]
            if len(sure) < 4:  # unsure ones alone are not worth the time to verify a pose
                return np.full_like(found[0], np.nan), *found[1:]
            square = self._close_square(image, sure)
        if square is not None:
            close = self._look(image, *square)
            if (close[1] >= xu.MIN_CONFIDENCE).sum() >= MIN_RETAINED_SHARE * len(sure):
                return close  # else it cuts the ship off
        return self._look(image, *whole)

    def _close_square(self, image, points):
        """A square about some points (n, 2): left, top, side and the size to scale it to; None where the
        whole frame will do.

        It holds the box about them and a tenth more; a small frame is enlarged no further than as a whole.
        """
        frame = np.array(image.shape[1::-1])
        points = (
            np.full((1, 2), np.nan)
            if points is None
            else np.clip(np.asarray(points, float), 0, frame)
        )
        low, high = points.min(0), points.max(0)
        if not self.crop_sizes or not (high > low).all():
            return None
        needed, enlarged = 1.1 * (high - low).max(), max(xu.FRAME_SIZE / frame.max(), 1.0)
        size = next(
            (size for size in self.crop_sizes if size >= needed * enlarged), self.crop_sizes[-1]
        )
        scale = min(size / needed, enlarged)
        if scale <= self.search_size / frame.max():
            return None
        side = max(round(size / scale), int(np.ceil(needed)))
        room, corner = frame - side, np.round((low + high - side) / 2)
        left, top = np.clip(corner, np.minimum(room, 0), np.maximum(room, 0)).astype(int)
        return left, top, side, size

    def _look(self, image, left, top, side, size, averaged=True):
        """What is seen in a square of the frame, scaled to `size` pixels: see `__call__`."""
        maps = self.heatmaps(_square(image, left, top, side, size)[None], averaged)[0]
        keypoints, confidence, spread = xu.read_keypoints(maps, self.settings["model"])
        return keypoints * side / size + [left, top], confidence, spread * side / size
