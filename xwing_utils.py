"""Track a known X-wing: from frames to heatmaps, from heatmaps to corners, from corners to a 6-DoF pose.

    model = load_model("weights/xwing.weights.h5")
    keypoints, confidence = predict_keypoints(model, images)  # (N, 8, 2) pixels, (N, 8)
    pose = solve_pose(keypoints[0], K, confidence[0])         # (4, 4) model -> camera, or None

Read it from top to bottom: the ship, files, camera, heatmaps, batches, network, pose, drawing. What goes
beyond (the mesh, alignment on the pixels, tracking, footage, films) is in the package `xwing`. Conventions:

* Points are (x, y), arrays are [row, column]. Pixel coordinates are continuous: the origin is the top-left
  *corner* of the frame, so pixel [r, c] has its centre at (c + 0.5, r + 0.5). Only an argmax reads indices.
* The letters: N frames or points, K keypoints (or the camera matrix), H height, W width. Channels come last.
* The model frame has x across the wings, -y towards the nose, +z up, in model units (the ship is 0.345 long).
  A model matrix (model -> world) and the camera files follow OpenGL: the camera looks down -z, y points up.
  A *pose* is (4, 4), model -> OpenCV camera: x right, y down, z forward. Angles are in degrees.
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import json
import os
import re
import sys
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import psutil
from PIL import Image, ImageOps

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no greetings
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no look for newer versions on the network
ROOT = Path(__file__).resolve().parent  # of the repository

# ============================================================ the ship

FRAME_SIZE = 256  # pixels, width and height of the frames of a set
# (8, 3) model units: the corners of the ship's bounding box, the first 8 keypoints. The bits of a corner's
# number say where it is: 1 left of the pilot, 2 at the tail, 4 on top.
BOUNDING_BOX = np.array(
    [(x, y, z) for z in (-0.032, 0.034) for y in (-0.182, 0.163) for x in (-0.156, 0.156)]
)
BOX_EDGES = np.array(
    [(k, k ^ bit) for bit in (1, 2, 4) for k in range(8) if not k & bit]
)  # (12, 2) corners
DIAMETER = float(np.linalg.norm(BOUNDING_BOX[7] - BOUNDING_BOX[0]))  # model units
# (4, 2, 3) model units: each cannon's muzzle and a second point on its line of fire.
LASERS = np.array([[(x, -0.1, z), (x, -0.3, z)] for z in (-0.01, 0.01) for x in (-0.145, 0.145)])
# What the corners of a symmetric-looking box are taken for: (8,) permutations, the true one first.
CORNER_PERMUTATIONS = {
    name: np.arange(8) ^ bits
    for name, bits in (
        ("identity", 0),
        ("left-right", 1),
        ("top-bottom", 4),
        ("both", 5),
        ("nose-tail", 2),
    )
}
MIRROR = CORNER_PERMUTATIONS["left-right"]  # (8,) what each corner turns into in a mirror image

# Points on the hull: they say which side is seen, and are easier to see than corners in empty space. Visible
# where the outward normal faces the camera (zero: always). Those at x < 0 come with their mirror images.
_HULL = [  # name, x, y, z, normal x, y, z
    ("canopy", 0, 0.000, 0.0330, 0, 0, 1),
    ("droid", 0, 0.050, 0.0340, 0, 0, 1),
    ("gear bay", 0, 0.020, -0.0205, 0, 0, -1),
    ("belly", 0, 0.095, -0.0255, 0, 0, -1),
    ("nose", 0, -0.182, 0.0000, 0, 0, 0),
    ("tail", 0, 0.130, 0.0000, 0, 1, 0),
    ("stripe", -0.0125, -0.100, 0.0000, -1, 0, 0),
    ("lower wing", -0.090, 0.070, -0.0100, 0, 0, -1),
    ("upper wing", -0.090, 0.070, 0.0100, 0, 0, 1),
    ("lower muzzle", -0.149, -0.085, -0.0100, 0, 0, 0),
    ("upper muzzle", -0.149, -0.085, 0.0100, 0, 0, 0),
    ("lower cannon", -0.149, 0.110, -0.0100, 0, 0, 0),
    ("upper cannon", -0.149, 0.110, 0.0100, 0, 0, 0),
    ("lower intake", -0.042, 0.040, -0.0185, 0, -1, 0),
    ("upper intake", -0.042, 0.040, 0.0185, 0, -1, 0),
    ("lower nozzle", -0.042, 0.163, -0.0185, 0, 1, 0),
    ("upper nozzle", -0.042, 0.163, 0.0185, 0, 1, 0),
]
_SIDES = [
    side
    for name, x, y, z, nx, ny, nz in _HULL
    for side in (
        [(name, x, y, z, nx, ny, nz)]
        if x == 0
        else [(f"right {name}", x, y, z, nx, ny, nz), (f"left {name}", -x, y, z, -nx, ny, nz)]
    )
]  # the pilot's right
KEYPOINT_NAMES = [*(f"corner {k}" for k in range(8)), *(point[0] for point in _SIDES)]
KEYPOINTS = np.concatenate(
    [BOUNDING_BOX, [point[1:4] for point in _SIDES]]
)  # (36, 3) for the network
NORMALS = np.concatenate(
    [np.zeros((8, 3)), [point[4:] for point in _SIDES]]
)  # (36, 3) outward, or zero

# ============================================================ files


def read_json(path):
    """The content of a JSON file. FileNotFoundError, or ValueError for what is no JSON, names the file."""
    try:
        return json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); write it again") from None


@contextlib.contextmanager
def part_files(*paths):
    """Paths to write to, which replace `paths` together if all goes well; sweeps what killed runs left."""
    parts = {
        Path(p): Path(p).with_name(f".{Path(p).name}.{os.getpid()}-{id(paths)}.part") for p in paths
    }
    for path in parts:
        for old in path.parent.glob(f".{glob.escape(path.name)}.[0-9]*.part"):
            if not psutil.pid_exists(int(old.name.split(".")[-2].split("-")[0])):
                old.unlink(missing_ok=True)
    try:
        yield list(parts.values())
        for path, part in parts.items():
            os.replace(part, path)
    except OSError as error:  # named by the file that was asked for, where it is about that
        own = error.errno and str(error.filename) in ("None", *map(str, parts.values()))
        raise (
            OSError(error.errno, error.strerror, str(next(iter(parts)))) if own else error
        ) from None
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def write_files(contents):
    """Write {path: text or bytes}, all whole or none; OSError where there is no room or no permission."""
    with part_files(*contents) as parts:
        for part, content in zip(parts, contents.values()):
            part.write_bytes(content.encode() if isinstance(content, str) else content)


def setting(name, default):
    """A notebook's constant, or the environment variable XWING_<name>, which beats it, as of its type."""
    text = os.environ.get(f"XWING_{name}", "")
    if not text:
        return default
    try:
        value = type(default)(text)
        if isinstance(value, float) and not np.isfinite(value):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"XWING_{name}: expected a number such as {default:g}, got {text!r}"
        ) from None
    print(f"{name} = {value!r}, from the environment variable XWING_{name}")
    return value


def check_array(value, shape, name):
    """A float64 array of `shape` (None: any length); the ValueError tells what came instead."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{name}: expected numbers of shape {shape}, got {str(value)[:80]}"
        ) from None
    if array.ndim != len(shape) or any(
        want not in (None, got) for want, got in zip(shape, array.shape)
    ):
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}".replace("None", "N"))
    return array


def _check_matrix(value, name, rigid=True):
    """(4, 4) float64 with finite entries, rotation and translation if `rigid`; the ValueError names it."""
    matrix = check_array(value, (4, 4), name)
    if not np.isfinite(matrix).all():
        raise ValueError(
            f"{name}: the matrix has NaN or infinite entries; render or remove the frame"
        )
    rotation = matrix[:3, :3]
    error = max(
        np.abs(rotation @ rotation.T - np.eye(3)).max(), np.abs(matrix[3] - [0, 0, 0, 1]).max()
    )
    if rigid and error > 1e-4:
        raise ValueError(
            f"{name}: not a rigid motion (rotation and translation, no scale); got\n{matrix}"
        )
    if rigid and np.linalg.det(rotation) < 0:
        raise ValueError(f"{name}: the matrix mirrors (determinant -1); a pose must be a rotation")
    return matrix


def load_camera(path):
    """The model-view and projection matrices (4, 4), OpenGL, of a camera file or of the folder with it."""
    path = Path(path) / "camera_info.json" if Path(path).is_dir() else path
    info = read_json(path)
    missing = {"model_view_matrix", "projection_matrix"}.difference(
        info if isinstance(info, dict) else ()
    )
    if missing:
        raise ValueError(
            f"{path}: {' and '.join(sorted(missing))} missing; expected a set's camera file"
        )
    projection = _check_matrix(info["projection_matrix"], f"{path}, projection_matrix", rigid=False)
    if (
        projection[0, 0] <= 0
        or projection[1, 1] <= 0
        or not np.allclose(projection[3], [0, 0, -1, 0])
    ):
        raise ValueError(
            f"{path}, projection_matrix: no OpenGL perspective projection; got\n{projection}"
        )
    return _check_matrix(info["model_view_matrix"], f"{path}, model_view_matrix"), projection


def list_frames(folder):
    """The numbered JPEG files of a folder in the order of their numbers; FileNotFoundError if none."""
    paths = [p for p in Path(folder).glob("*") if re.fullmatch(r"\d+\.jpe?g", p.name.lower())]
    if not paths:
        raise FileNotFoundError(
            f"{folder}: expected a folder with frames 0.jpg, 1.jpg, ..., found none"
        )
    return sorted(paths, key=lambda p: (int(p.stem), p.stem))


def load_dataset(folder):
    """The frames of a set, N Path in the order of their numbers, and their model matrices (N, 4, 4)."""
    paths = list_frames(folder)
    files = [path.with_name(f"{path.stem}_mat.json") for path in paths]
    return paths, np.array([_check_matrix(read_json(file), str(file)) for file in files])


def read_image(path, size=None):
    """Any kind of picture as (H, W, 3) uint8 RGB, upright; ValueError unless whole and of `size` (W, H)."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits, grey
                image = Image.fromarray(
                    (np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8)
                )
            elif image.has_transparency_data:  # on black
                image = Image.alpha_composite(
                    Image.new("RGBA", image.size, "black"), image.convert("RGBA")
                )
            pixels = np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow has many, struct.error for a damaged EXIF header among them
        raise ValueError(
            f"{path}: cannot be read as a picture ({error}); copy or render it again"
        ) from None
    if size is not None and pixels.shape[1::-1] != tuple(size):
        got = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise ValueError(
            f"{path}: expected {size[0]}x{size[1]} pixels, got {got}; resize the whole set"
        )
    return pixels


# ============================================================ camera and projection

OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])  # OpenGL camera -> OpenCV camera, and back


def to_homogeneous(points):
    """(N, 3) points -> (N, 4), with a last column of ones."""
    points = check_array(points, (None, 3), "points")
    return np.concatenate([points, np.ones((len(points), 1))], axis=1)


def project_points(image, points, model_view_matrix, projection_matrix, transformation_mat=None):
    """Project homogeneous model points to continuous pixel coordinates.

    Args:
        image: (H, W, ...) array; only its size is used.
        points: (N, 4) homogeneous, model units.
        model_view_matrix, projection_matrix: (4, 4) world -> OpenGL camera -> clip space.
        transformation_mat: (4, 4) model -> world; None is the identity.
    Returns:
        (N, 2) float64 (x, y) pixels, origin at the top-left corner of the frame, not clipped.
    Raises:
        ValueError: a wrong shape, or a point at or behind the camera.
    Source: OpenGL 4.6 core specification, section 13.8; y is turned to point down.
    """
    points = check_array(points, (None, 4), "points")
    matrix = check_array(projection_matrix, (4, 4), "projection_matrix")
    matrix = matrix @ check_array(model_view_matrix, (4, 4), "model_view_matrix")
    if transformation_mat is not None:
        matrix = matrix @ check_array(transformation_mat, (4, 4), "transformation_mat")
    if np.ndim(image) < 2:
        raise ValueError(
            f"image: expected a frame or np.empty((height, width)), got shape {np.shape(image)}"
        )
    clip = points @ matrix.T
    behind = ~(clip[:, 3] > 0)
    if behind.any():
        raise ValueError(
            f"{behind.sum()} of {len(points)} points lie at or behind the camera (or are NaN)"
        )
    return (clip[:, :2] / clip[:, 3:] * [1, -1] + 1) / 2 * np.shape(image)[1::-1]


def camera_matrix(projection_matrix, width, height):
    """The OpenCV intrinsic matrix K, (3, 3) in pixels, of an OpenGL projection to width x height pixels."""
    p = check_array(projection_matrix, (4, 4), "projection_matrix")
    return np.array(
        [
            [p[0, 0] * width / 2, 0.0 - p[0, 1] * width / 2, (1 - p[0, 2]) * width / 2],
            [0, p[1, 1] * height / 2, (1 + p[1, 2]) * height / 2],
            [0, 0, 1],
        ]
    )


def lens_camera(width, height, focal=35.0, sensor=36.0, view=None):
    """K (3, 3) in pixels of a lens: `focal` and `sensor` (longer side) in one unit, or `view` in degrees."""
    given = {"width": width, "height": height, "focal": focal, "sensor": sensor, "view": view}
    for name, value in given.items():
        if value is not None and not 0 < value < (180 if name == "view" else np.inf):
            raise ValueError(
                f"{name}: expected a positive number, a view of less than 180, got {value}"
            )
    pixels = max(width, height) * (
        focal / sensor if view is None else 0.5 / np.tan(np.radians(view / 2))
    )
    return np.array([[pixels, 0, width / 2], [0, pixels, height / 2], [0, 0, 1]])


def check_camera_matrix(K):
    """K as float64; ValueError unless [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with positive fx and fy."""
    K = check_array(K, (3, 3), "K")
    plain = np.array([[K[0, 0], 0, K[0, 2]], [0, K[1, 1], K[1, 2]], [0, 0, 1]])
    if not (np.isfinite(K).all() and min(K[0, 0], K[1, 1]) > 0 and np.abs(K - plain).max() < 1e-5):
        raise ValueError(
            f"K: expected a camera matrix [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], got\n{K}"
        )
    return K


def pose_in_camera(model_view_matrix, transformation_mat):
    """The pose (4, 4), model -> OpenCV camera (x right, y down, z forward), of a model matrix."""
    view = check_array(model_view_matrix, (4, 4), "model_view_matrix")
    return OPENCV @ view @ check_array(transformation_mat, (4, 4), "transformation_mat")


def transformation_from_pose(model_view_matrix, pose):
    """The model matrix (4, 4), model -> world, of a pose; the inverse of `pose_in_camera`."""
    view = check_array(model_view_matrix, (4, 4), "model_view_matrix")
    return np.linalg.inv(view) @ OPENCV @ check_array(pose, (4, 4), "pose")


def project_pose(points, pose, K):
    """The pixels (N, 2) of model points (N, 3) under a pose (4, 4) and K (3, 3); NaN behind the camera."""
    camera = np.asarray(points, float) @ pose[:3, :3].T + pose[:3, 3]
    depth = np.where(camera[:, 2:] > 1e-9, camera[:, 2:], np.nan)
    return (camera / depth) @ K[:2].T


def keypoints_of(
    matrices,
    model_view_matrix,
    projection_matrix,
    width=FRAME_SIZE,
    height=FRAME_SIZE,
    points=BOUNDING_BOX,
):
    """The pixels (N, K, 2) of model points (K, 3) under model matrices (N, 4, 4). Errors name the matrix."""
    frame, points, keypoints = np.empty((height, width)), to_homogeneous(points), []
    for i, matrix in enumerate(matrices):
        try:
            keypoints.append(
                project_points(frame, points, model_view_matrix, projection_matrix, matrix)
            )
        except ValueError as error:
            raise ValueError(f"matrix {i} of {len(matrices)}: {error}") from None
    return np.array(keypoints).reshape(-1, len(points), 2)


def in_frame(keypoints, width=FRAME_SIZE, height=FRAME_SIZE):
    """(..., K) bool: which of the (..., K, 2) pixel positions lie inside the frame."""
    keypoints = np.asarray(keypoints)
    return ((keypoints >= 0) & (keypoints < [width, height])).all(-1)


def front_facing(matrices, model_view_matrix, points=KEYPOINTS, normals=NORMALS):
    """(N, K) bool: which points (K, 3) turn their normals (K, 3) to the camera; a zero normal always does."""
    poses = np.array([pose_in_camera(model_view_matrix, m) for m in matrices]).reshape(-1, 4, 4)
    turn, normals = poses[:, :3, :3].swapaxes(1, 2), np.asarray(normals)
    away = ((points @ turn + poses[:, None, :3, 3]) * (normals @ turn)).sum(-1)
    return (away < 0) | ~normals.any(-1)


def rotation_error(estimate, truth):
    """Angle in degrees between two rotations (3, 3) or poses (4, 4), by the chord: exact for small angles."""
    chord = np.linalg.norm(np.asarray(estimate)[:3, :3] - np.asarray(truth)[:3, :3])
    return float(np.degrees(2 * np.arcsin(min(chord / (2 * np.sqrt(2)), 1.0))))


# ============================================================ heatmaps

SIGMA = 4.0  # pixels of the frame, standard deviation of the heatmaps' Gaussians


def gaussian_heatmaps(keypoints, size, sigma=SIGMA):
    """Draw one Gaussian a keypoint.

    Args:
        keypoints: (K, 2) continuous pixels.
        size: int for a square, or (height, width) in pixels.
        sigma: standard deviation in pixels.
    Returns:
        (H, W, K) float32, 1 at the continuous position; a keypoint outside the frame leaves its tail.
    Raises:
        ValueError: a wrong shape, NaN, or a sigma that is not positive.
    Source: Tompson et al., Joint Training of a Convolutional Network and a Graphical Model, NIPS 2014.
    """
    keypoints = check_array(keypoints, (None, 2), "keypoints")
    if np.isnan(keypoints).any():
        raise ValueError("keypoints: some are NaN; leave them out or put them far outside")
    if not sigma > 0:
        raise ValueError(f"sigma: expected a positive number of pixels, got {sigma}")
    height, width = (size, size) if np.isscalar(size) else size
    gx = np.exp(-((np.arange(width)[:, None] + 0.5 - keypoints[:, 0]) ** 2) / (2 * sigma**2))
    gy = np.exp(-((np.arange(height)[:, None] + 0.5 - keypoints[:, 1]) ** 2) / (2 * sigma**2))
    return (gy[:, None] * gx[None]).astype(np.float32)


def heatmap2argmax(heatmaps, scale=False):
    """Read the brightest pixel of each heatmap (..., H, W, K).

    Args:
        scale: False for pixel indices (x, y); True for 2 * index / size - 1, in [-1, 1).
    Returns:
        (..., K, 2) int64 indices, or float64 with `scale`; ValueError for fewer than three dimensions.
    """
    heatmaps = np.asarray(heatmaps)
    if heatmaps.ndim < 3:
        raise ValueError(f"heatmaps: expected shape (..., H, W, K), got {heatmaps.shape}")
    *lead, height, width, count = heatmaps.shape
    flat = heatmaps.reshape(*lead, height * width, count).argmax(-2)
    indices = np.stack([flat % width, flat // width], -1)
    return 2 * indices / [width, height] - 1 if scale else indices


def decode_heatmaps(heatmaps, sigma=SIGMA):
    """Read sub-pixel keypoints from heatmaps: fit a Gaussian about the brightest pixel, also at a border.

    Args:
        heatmaps: (..., H, W, K), peaks of 1.
        sigma: standard deviation of the Gaussians in pixels; scales the windows.
    Returns:
        keypoints: (..., K, 2) float64 continuous pixels (x, y); NaN where a heatmap is zero or not finite.
        confidence: (..., K) float64 in [0, 1]: the share of a Gaussian's mass within 3 sigma of the peak.
    Source: Guo, A Simple Algorithm for Fitting a Gaussian Function, IEEE Signal Processing Mag. 28(5), 2011.
    """
    heatmaps = np.asarray(heatmaps)
    peaks = heatmap2argmax(heatmaps)
    *lead, height, width, count = heatmaps.shape
    maps = np.moveaxis(heatmaps, -1, -3).reshape(-1, height, width)
    window, x, y = _windows(maps, peaks, int(np.ceil(3 * sigma)))
    offset = _gaussian_offset(window, x, y, sigma)
    found = ((window > 0) & (window < np.inf))[:, len(x) // 2, len(x) // 2]  # the brightest pixel
    squared = (x - offset[:, :1, None]) ** 2 + (y - offset[:, 1:, None]) ** 2
    expected = np.where(np.isnan(window), 0, np.exp(-squared / (2 * sigma**2))).sum((1, 2))
    mass = np.nansum(np.clip(window, 0, None), (1, 2)) / np.maximum(
        expected, 0.1 * 2 * np.pi * sigma**2
    )
    keypoints = np.where(found[:, None], peaks.reshape(-1, 2) + 0.5 + offset, np.nan)
    confidence = np.where(found, np.clip(mass, 0, 1), 0.0)
    return keypoints.reshape(*lead, count, 2), confidence.reshape(*lead, count)


def _windows(maps, peaks, radius):
    """(M, 2r+1, 2r+1) squares about one pixel of each map, NaN outside it; and their x and y offsets."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    positions = peaks.reshape(-1, 1, 1, 2) + np.stack([x, y], -1)
    size = np.array(maps.shape[:0:-1])
    columns, rows = np.moveaxis(positions.clip(0, size - 1), -1, 0)
    values = maps[np.arange(len(maps))[:, None, None], rows, columns]
    return np.where(in_frame(positions, *size), values, np.nan), x, y


def _gaussian_offset(window, x, y, sigma):
    """(M, 2) offsets from the windows' middles to the peaks where log h = a + b x + c y + d (x^2 + y^2)."""
    near = np.maximum(abs(x), abs(y)) <= max(1, round(1.5 * sigma))
    usable = near & np.isfinite(window) & (window > 1e-6)
    window = np.where(usable, window, 1).reshape(len(window), x.size).astype(float)
    weight = window**2 * usable.reshape(window.shape)  # least squares of h, not of its logarithm
    basis = np.stack([np.ones_like(x), x, y, x**2 + y**2], -1).reshape(-1, 4) / [
        1,
        sigma,
        sigma,
        sigma**2,
    ]
    normal = np.einsum("mp,pi,pj->mij", weight, basis, basis, optimize=True)
    right = (weight * np.log(window)) @ basis
    scale = np.trace(normal, axis1=1, axis2=2)[:, None] + 1e-300
    normal = normal / scale[..., None] + 1e-12 * np.eye(4)
    _, b, c, d = np.linalg.solve(normal, (right / scale)[..., None])[..., 0].T
    with np.errstate(divide="ignore", invalid="ignore"):
        offset = np.stack([b, c], -1) / (-2 * d[:, None]) * sigma
    peaked = (d[:, None] < -1e-3) & np.isfinite(offset)
    return np.where(peaked, np.clip(offset, -1.5 * sigma, 1.5 * sigma), 0.0)


def keypoint_sigma(heatmaps, keypoints, sigma=SIGMA, reach=10.0):
    """How uncertain each keypoint is: the width of its heatmap, less the width that a sure answer has.

    A softmax heatmap is the network's belief in every position, widened by the target's Gaussian: from its
    variance in a window of width `reach`, the window's narrowing and sigma^2 are taken off. Returns (..., K)
    standard deviations along one axis in pixels of the maps; inf for a keypoint (..., K, 2) that is NaN.
    """
    heatmaps, keypoints = np.asarray(heatmaps), np.asarray(keypoints)
    height, width = heatmaps.shape[-3:-1]
    centre = np.nan_to_num(keypoints)[..., None, :, :]
    x, y = (
        np.arange(width)[:, None] + 0.5 - centre[..., 0],
        np.arange(height)[:, None] + 0.5 - centre[..., 1],
    )
    wx, wy = (
        np.exp(-(x**2) / (2 * reach**2)),
        np.exp(-(y**2) / (2 * reach**2)),
    )  # (..., W, K), (..., H, K)
    rows = [
        np.einsum("...hwk,...wk->...hk", heatmaps, (wx * x**i).astype(heatmaps.dtype))
        for i in range(3)
    ]
    moment = {(i, j): (rows[i] * wy * y**j).sum(-2) for i in range(3) for j in range(3 - i)}
    with np.errstate(divide="ignore", invalid="ignore"):
        mx, my, mxx, mxy, myy = (
            moment[ij] / moment[0, 0] for ij in ((1, 0), (0, 1), (2, 0), (1, 1), (0, 2))
        )
        xx, xy, yy = mxx - mx**2, mxy - mx * my, myy - my**2
        half = np.hypot((xx - yy) / 2, xy)
        axes = (xx + yy) / 2 + np.stack([-half, half])  # variances along the spot's principal axes
        belief = 1 / np.maximum(1 / np.maximum(axes, 1e-9) - 1 / reach**2, 1e-4) - sigma**2
    spread = np.sqrt(np.maximum(belief, 1e-3).mean(0))
    return np.where(np.isfinite(keypoints).all(-1) & np.isfinite(spread), spread, np.inf)


# ============================================================ frames and batches

CROP_MARGIN = 48  # pixels by which a training square may reach beyond its frame
_FAR = -1e4  # pixels; where a keypoint that does not show is put


def mirror_keypoints(keypoints, width, permutation=MIRROR):
    """Keypoints (..., K, 2+) of the left-right mirrored frame: row k is row permutation[k] mirrored."""
    mirrored = np.array(keypoints)[..., permutation, :]
    mirrored[..., 0] = width - mirrored[..., 0]
    return mirrored


def mirror_transformation(matrix):
    """The model matrix (4, 4) of the mirrored frame, for a camera on the z axis that looks along it."""
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    return flip @ check_array(matrix, (4, 4), "matrix") @ flip


def mirror_permutation(points):
    """(K,) the index of each model point's (K, 3) mirror image in x. ValueError if one has none."""
    points = check_array(points, (None, 3), "points")
    distance = np.linalg.norm(points[:, None] * [-1, 1, 1] - points[None], axis=-1)
    if (distance.min(1) > 1e-6).any():
        raise ValueError(
            f"points: {points[distance.min(1).argmax()]} has no mirror image among them; add it"
        )
    return distance.argmin(1)


def augmentation(seed=None, without=()):
    """The albumentations pipeline but for the steps named in `without`; ValueError for names that are none.

    The mirror is not part of it: identities must be swapped with it.
    Source: Labbe et al., CosyPose, ECCV 2020 (strong colours); DeVries and Taylor, 2017 (erasing).
    """
    import albumentations as A

    steps = {
        "geometry": A.Affine((0.7, 1.3), (-0.08, 0.08), None, (-180, 180), keep_ratio=True, p=0.6),
        "flare": A.RandomSunFlare((0, 0, 1, 1), 60, num_flare_circles_range=(2, 6), p=0.1),
        "light": A.OneOf(
            [
                A.ColorJitter((0.3, 2.2), (0.3, 3), 0, 0),
                A.RandomBrightnessContrast(0.4, 0.4),
                A.RandomGamma((50, 170)),
                A.RandomToneCurve(0.3),
            ],
            p=0.7,
        ),
        "colour": A.OneOf(
            [
                A.ColorJitter(0, 0, (0, 5), 0),
                A.HueSaturationValue(30, 60, 20),
                A.RGBShift(30, 30, 30),
                A.ToGray(),
            ],
            p=0.5,
        ),
        "sharpness": A.OneOf(
            [
                A.Sharpen((0.3, 0.9)),
                A.GaussianBlur((3, 7), (0.3, 2)),
                A.MotionBlur((3, 7)),
                A.Downscale((0.4, 0.9)),
            ],
            p=0.4,
        ),
        "noise": A.OneOf([A.GaussNoise((0.01, 0.08)), A.ISONoise()], p=0.25),
        "erasing": A.CoarseDropout((1, 5), (0.04, 0.2), (0.04, 0.2), "random_uniform", p=0.3),
        "compression": A.ImageCompression(quality_range=(40, 98), p=0.3),
    }
    if unknown := set(without) - set(steps):
        raise ValueError(
            f"without: expected some of {', '.join(steps)}, got {', '.join(sorted(unknown))}"
        )
    return A.Compose(
        [step for name, step in steps.items() if name not in without],
        seed=seed,
        keypoint_params=A.KeypointParams(format="xy", remove_invisible=False),
    )


def augment(image, keypoints, transform):
    """A frame and its keypoints (K, 2) after an albumentations pipeline, which counts pixels from centres."""
    result = transform(image=image, keypoints=np.asarray(keypoints) - 0.5)
    return result["image"], np.asarray(result["keypoints"], dtype=np.float64).reshape(-1, 2) + 0.5


def crop(image, corner, size):
    """The square of `size` pixels with its top left at `corner` (left, top); black beyond the frame."""
    shift = np.array([[1, 0, -corner[0]], [0, 1, -corner[1]]], float)
    return cv2.warpAffine(image, shift, (size, size), flags=cv2.INTER_NEAREST)


def make_dataset(
    paths,
    matrices,
    model_view_matrix,
    projection_matrix,
    batch_size=16,
    size=FRAME_SIZE,
    crop=False,
    augmented=True,
    randomise=None,
    synthesise=None,
    shares=(0, 0),
    epoch_size=None,
    without=(),
    seed=0,
    shard=(0, 1),
    workers=2,
):
    """A `keras.utils.PyDataset` that reads or draws, augments and batches frames on `workers` threads.

    Args:
        paths, matrices: from `load_dataset`; model_view_matrix, projection_matrix: from `load_camera`.
        size: width and height in pixels to which frames and keypoints are scaled after the augmentation.
        crop: cut a square of that size round the ship instead: all the detail at a part of the cost.
        augmented: shuffle, mirror (identities swapped) and `augmentation`; False leaves the frames alone.
        randomise: a function (image, pose, K, rng) -> image that changes frames before they are augmented.
        synthesise: a function (size, rng, frame) -> image, pose, K that draws a square of a frame that wide.
        shares: how many samples are changed, how many drawn (and not augmented); the rest are plain frames.
        epoch_size: samples of an epoch, by default as many as frames. without: see `augmentation`.
        shard: (index, count), to yield only one of so many parts of every batch.
    Yields:
        images (B, size, size, 3) uint8, and keypoints (B, K, 3) float32: x, y in pixels and visibility (1 in
        the frame and facing the camera, else 0). Points that face away are put far outside.
    Raises:
        ValueError: arguments that do not fit.
    """
    keras, epoch_size = import_keras(), epoch_size or len(paths)
    if (
        len(paths) != len(matrices)
        or epoch_size < 1
        or not (len(paths) or augmented and shares[1] == 1)
    ):
        raise ValueError(
            f"got {len(paths)} frames, {len(matrices)} matrices and shares {shares}; expected a "
            "matrix a frame (render some: make data), or an epoch_size and all samples drawn"
        )
    missing = (shares[0] and not randomise) or (shares[1] and not synthesise)
    if missing or not (min(shares) >= 0 and sum(shares) < 1 + 1e-9):
        raise ValueError(
            f"shares: expected 0 or more, 1 or less together, and their functions; got {shares}"
        )
    if size < 1 or (crop and size > FRAME_SIZE):
        raise ValueError(
            f"size: expected pixels, at most {FRAME_SIZE} for squares of a frame, got {size}"
        )
    if batch_size < 1 or batch_size % shard[1]:
        raise ValueError(
            f"batch_size: expected a multiple of the {shard[1]} workers, got {batch_size}"
        )
    dataset = type("XwingDataset", (_Batches, keras.utils.PyDataset), {})(
        workers=workers, max_queue_size=8
    )
    vars(dataset).update(
        paths=list(paths),
        poses=np.array([pose_in_camera(model_view_matrix, m) for m in matrices]),
        K=camera_matrix(projection_matrix, FRAME_SIZE, FRAME_SIZE),
        permutation=mirror_permutation(KEYPOINTS),
        keypoints=keypoints_of(matrices, model_view_matrix, projection_matrix, points=KEYPOINTS),
        facing=front_facing(matrices, model_view_matrix),
        batch_size=batch_size,
        size=size,
        crop=crop,
        augmented=augmented,
        randomise=randomise,
        synthesise=synthesise,
        shares=shares,
        epoch_size=epoch_size,
        without=without,
        seed=seed,
        shard=shard,
        epoch=0,
        finished={},
    )
    return dataset


class _Batches:
    """The batches of `make_dataset`: functions of (seed, epoch, index) alone, for workers in any order."""

    def __len__(self):
        return -(-self.epoch_size // self.batch_size)

    def on_epoch_end(self):
        self.epoch += 1

    def __getitem__(self, index):
        order, (part, parts) = np.arange(len(self.paths)), self.shard
        if self.augmented:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        rng = np.random.default_rng([self.seed, self.epoch, index, part])
        transform = augmentation(int(rng.integers(2**31)), self.without) if self.augmented else None
        first = index * self.batch_size
        chosen = np.resize(order, self.epoch_size)[first : first + self.batch_size][part::parts]
        images, targets = zip(*(self._example(i, rng, transform) for i in chosen))
        self.finished[self.epoch, index] = time.perf_counter()  # for those who wait for it
        return np.stack(images), np.stack(targets)

    def _example(self, i, rng, transform):
        """One sample: (size, size, 3) uint8 and (K, 3) float32."""
        lot = rng.random() if self.augmented else 1.0
        if lot < self.shares[1]:
            image, pose, K = self.synthesise(self.size, rng, FRAME_SIZE if self.crop else self.size)
            facing = front_facing([pose], OPENCV)[0]
            return image, self._targets(project_pose(KEYPOINTS, pose, K), facing)
        image = read_image(self.paths[i], (FRAME_SIZE, FRAME_SIZE))
        keypoints, facing = self.keypoints[i], self.facing[i]
        if lot < sum(self.shares):
            image = self.randomise(image, self.poses[i], self.K, rng)
        if self.augmented and rng.random() < 0.5:
            image, facing = np.ascontiguousarray(image[:, ::-1]), facing[self.permutation]
            keypoints = mirror_keypoints(keypoints, FRAME_SIZE, self.permutation)
        if self.augmented:
            image, keypoints = augment(image, keypoints, transform)
        if self.crop:
            margin = (
                CROP_MARGIN if rng.random() < 0.5 else 0
            )  # in the black, where there are points to find
            middle = keypoints[:8].mean(0) + rng.uniform(-self.size / 4, self.size / 4, 2)
            corner = np.round(middle - self.size / 2).clip(-margin, FRAME_SIZE - self.size + margin)
            image, keypoints = crop(image, corner, self.size), keypoints - corner
        elif self.size != FRAME_SIZE:
            keypoints = keypoints * (self.size / FRAME_SIZE)
            image = cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_AREA)
        return image, self._targets(keypoints, facing)

    def _targets(self, keypoints, facing):
        """(K, 3) float32 of the keypoints (K, 2) of a square and whether they face the camera (K,)."""
        keypoints = np.where(facing[:, None], keypoints, _FAR)
        visible = in_frame(keypoints, self.size, self.size)
        return np.concatenate([keypoints, visible[:, None]], 1).astype(np.float32)


# ============================================================ network

BACKBONE = "resnet18"  # encoder of the U-Net; any backbone of segmentation_models
DECODER_FILTERS = (128, 64, 32, 32, 16)
STRIDE = 2  # frame pixels for one heatmap pixel of the shipped network
_RESTORE = "restore weights/ with git checkout weights"


def import_keras():
    """The Keras module, imported only where it is needed and without what TensorFlow says when it starts."""
    if "keras" not in sys.modules:
        console, silence = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 2)
        try:
            import keras  # noqa: F401
        finally:
            os.dup2(console, 2)
            os.close(console), os.close(silence)
    return sys.modules["keras"]


def _segmentation_models():
    """The module segmentation_models, for the Keras backend in use."""
    keras = import_keras()
    os.environ["SM_FRAMEWORK"] = "tf.keras" if keras.backend.backend() == "tensorflow" else "keras"
    if (
        keras.backend.backend() != "tensorflow"
    ):  # names that Keras 3 moved and the package still asks for
        keras.utils.generic_utils = keras.utils
        keras.backend.sigmoid = keras.ops.sigmoid
        keras.backend.int_shape = lambda x: tuple(x.shape)
    with contextlib.redirect_stdout(None):  # it says which framework it uses
        import segmentation_models

    return segmentation_models


class HeatmapLoss:
    """A Keras loss that draws the Gaussian heatmaps of a batch from its keypoints, on the device.

    Args:
        sigma: standard deviation in pixels of the frames.
        kind: "softmax", the cross-entropy between the Gaussian as a distribution over the pixels (its part
            outside the frame is one more class) and the predicted map read as one; "mse", the mean squared
            error; "weighted", the same with weight 1 + 50 h, so that the few bright pixels count.
        stride: frame pixels for one pixel of the network's maps.
    Called with y_true (B, K, 3) keypoints (see `make_dataset`) and y_pred (B, H, W, K); returns (B,).
    Source: Sun et al., ECCV 2018 (softmax); DeTone et al., SuperPoint, CVPRW 2018, 3.2 (absent points).
    """

    def __init__(self, sigma=SIGMA, kind="softmax", stride=1):
        if kind not in ("softmax", "mse", "weighted"):
            raise ValueError(f"kind: expected 'softmax', 'mse' or 'weighted', got {kind!r}")
        self.sigma, self.kind, self.stride = float(sigma), kind, stride
        self.__name__ = f"heatmap_{kind}"

    def __call__(self, y_true, y_pred):
        ops = import_keras().ops
        y_true, y_pred = ops.cast(y_true, "float32"), ops.cast(y_pred, "float32")
        gx, gy = (
            self._profile(y_true[..., i], y_pred.shape[2 - i]) for i in (0, 1)
        )  # (B, W, K), (B, H, K)
        if self.kind == "softmax":
            return self._cross_entropy(gx, gy, y_pred)
        target = gy[:, :, None] * gx[:, None]
        weight = 1.0 + 50.0 * target if self.kind == "weighted" else 1.0
        return ops.mean(weight * ops.square(target - y_pred), axis=(1, 2, 3))

    def _profile(self, position, length):
        ops = import_keras().ops
        centres = (ops.arange(length, dtype="float32") + 0.5) * self.stride
        return ops.exp(
            -ops.square(centres[None, :, None] - position[:, None]) / (2 * self.sigma**2)
        )

    def _cross_entropy(self, gx, gy, y_pred):
        ops, mass = import_keras().ops, 2 * np.pi * (self.sigma / self.stride) ** 2
        log_p = ops.log(y_pred + 1e-30) - float(np.log(mass))
        inside = ops.sum(gy * ops.sum(log_p * gx[:, None], axis=2), axis=1) / mass
        target_inside = ops.minimum(ops.sum(gx, axis=1) * ops.sum(gy, axis=1) / mass, 1.0)
        absent = 1.0 - ops.sum(y_pred, axis=(1, 2)) / mass
        outside = (1.0 - target_inside) * ops.log(ops.maximum(absent, 0.0) + 1e-6)
        return -ops.mean(inside + outside, axis=-1)


def spatial_softmax(logits, sigma):
    """Logits (B, H, W, K) -> heatmaps: a softmax over a channel's pixels and a class for "not in the frame".

    Scaled by 2 pi sigma^2, so that a softmax that equals a Gaussian of that sigma has a peak of 1.
    """
    ops, (height, width) = import_keras().ops, logits.shape[1:3]
    logits = ops.cast(logits, "float32")
    largest = ops.stop_gradient(ops.maximum(ops.max(logits, axis=(1, 2), keepdims=True), 0.0))
    weights, absent = ops.exp(logits - largest), height * width * ops.exp(-largest)
    return weights * (
        2 * np.pi * sigma**2 / (ops.sum(weights, axis=(1, 2), keepdims=True) + absent)
    )


def build_model(
    backbone=BACKBONE,
    keypoints=KEYPOINTS.shape[0],
    sigma=SIGMA,
    head="softmax",
    decoder_filters=DECODER_FILTERS,
    size=FRAME_SIZE,
    stride=STRIDE,
):
    """An untrained U-Net: frames (B, size, size, 3) in [0, 255] -> heatmaps (B, size/stride, ..., keypoints).

    Args:
        backbone: an encoder of segmentation_models, e.g. "efficientnetb0", "resnet18", "mobilenetv2".
        keypoints: number of output channels, the 8 corners first.
        sigma: standard deviation of the heatmaps' Gaussians in pixels at this size.
        head: "softmax" for `spatial_softmax`, "linear" for maps trained with a squared error.
        size: width and height in pixels, a multiple of 32; the weights do not depend on it.
        stride: 1 for maps of the frame's size, 2 to leave out the decoder's last, most expensive stage.
    Returns:
        a keras.Model; its `settings` are these arguments. ValueError for those that do not fit.
    Source: Ronneberger et al., U-Net, MICCAI 2015.
    """
    keras, sm = import_keras(), _segmentation_models()
    known = sm.get_available_backbone_names()
    if backbone not in known:
        raise ValueError(f"backbone: expected one of {', '.join(known)}, got {backbone!r}")
    if head not in ("softmax", "linear"):
        raise ValueError(f"head: expected 'softmax' or 'linear', got {head!r}")
    if not (np.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma: expected a positive number of pixels, got {sigma}")
    if not all(1 <= count <= 4096 for count in (keypoints, *decoder_filters)):
        raise ValueError(
            f"expected 1 to 4096 keypoints and filters, got {keypoints} and {decoder_filters}"
        )
    if size < 32 or size % 32 or stride not in (1, 2):
        raise ValueError(
            f"expected a multiple of 32 as size and 1 or 2 as stride, got {size} and {stride}"
        )
    frames = keras.Input((size, size, 3), name="frames")
    unet = sm.Unet(
        backbone,
        input_shape=(size, size, 3),
        classes=keypoints,
        activation="linear",
        encoder_weights=None,
        decoder_filters=tuple(decoder_filters),
    )
    if stride == 2:
        features = unet.get_layer("decoder_stage3b_relu").output
        maps = keras.layers.Conv2D(keypoints, 3, padding="same", name="maps")(features)
        unet = keras.Model(unet.input, maps)
    maps = unet(keras.layers.Rescaling(1 / 127.5, -1.0)(frames))
    maps = (
        spatial_softmax(maps, sigma / stride)
        if head == "softmax"
        else keras.ops.cast(maps, "float32")
    )
    model = keras.Model(frames, maps, name="xwing")
    model.settings = dict(
        backbone=backbone,
        keypoints=keypoints,
        sigma=sigma,
        head=head,
        decoder_filters=list(decoder_filters),
        size=size,
        stride=stride,
    )
    return model


def compile_model(model, learning_rate=1e-3, loss=None):
    """Compile with Adam, a `HeatmapLoss` and `nmae_argmax`; no XLA on CPUs, where it is five times slower."""
    keras, settings = import_keras(), model.settings
    kind = "softmax" if settings["head"] == "softmax" else "mse"
    loss = loss or HeatmapLoss(settings["sigma"], kind, settings["stride"])
    nmae = functools.update_wrapper(
        functools.partial(nmae_argmax, stride=settings["stride"]), nmae_argmax
    )
    cpu = all("cpu" in device.lower() for device in keras.distribution.list_devices())
    jit = False if cpu or keras.backend.backend() == "torch" else "auto"
    model.compile(
        keras.optimizers.Adam(learning_rate, clipnorm=1.0), loss, metrics=[nmae], jit_compile=jit
    )
    return model


def nmae_argmax(y_true, y_pred, stride=1):
    """The original exercise's metric: mean absolute error of the corners' argmax, in units of the frame.

    Of those in the frame: maps (B, H, W, K) with a peak above 0.5, or keypoints (B, K, 3), see `stride`.
    """
    ops = import_keras().ops
    y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)[..., :8]
    size = ops.convert_to_tensor(np.array(y_pred.shape[2:0:-1], np.float32))
    if len(y_true.shape) == 4:
        y_true = y_true[..., :8]
        true, present = _argmax(y_true), ops.cast(ops.max(y_true, axis=(1, 2)) > 0.5, "float32")
    else:
        y_true = ops.cast(y_true[:, :8], "float32")
        true, present = ops.floor(y_true[..., :2] / stride), y_true[..., 2]
    error = ops.mean(ops.abs(_argmax(y_pred) - true) / size, axis=-1)
    return ops.sum(error * present) / ops.maximum(ops.sum(present), 1.0)


def _argmax(maps):
    """(B, K, 2) float32 pixel indices (x, y) of the largest values; the Keras twin of `heatmap2argmax`."""
    ops, (height, width, count) = import_keras().ops, maps.shape[1:]
    flat = ops.argmax(ops.reshape(maps, (-1, height * width, count)), axis=1)
    return ops.cast(ops.stack([flat % width, flat // width], axis=-1), "float32")


def weights_files(path):
    """The two files of weights: NAME.weights.h5, NAME.json."""
    path = Path(path)
    if not path.name.endswith(".weights.h5"):
        raise ValueError(f"{path}: expected a file name that ends in .weights.h5")
    return path, path.with_name(path.name.removesuffix(".weights.h5") + ".json")


def weights_settings(path):
    """What `NAME.json` says of `NAME.weights.h5`: a dict, its "model" the arguments of `build_model`."""
    path, settings_path = weights_files(path)
    for file in (path, settings_path):
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no such file; run notebooks/train.ipynb, or {_RESTORE}"
            )
    info = read_json(settings_path)
    known = {"backbone", "keypoints", "sigma", "head", "decoder_filters", "size", "stride"}
    model = info.get("model") if isinstance(info, dict) else None
    if not isinstance(model, dict) or set(model) - {"points"} != known:
        raise ValueError(
            f"{settings_path}: no model with {', '.join(sorted(known))} in it; {_RESTORE}"
        )
    if info.get("sha256") != hashlib.sha256(path.read_bytes()).hexdigest():
        raise ValueError(f"{path}: not the weights of {settings_path.name}, or damaged; {_RESTORE}")
    points = model.pop("points", [])
    if not isinstance(points, list) or points != KEYPOINTS[: len(points)].tolist():
        raise ValueError(
            f"{path}: trained on other model points than those of KEYPOINTS; train again"
        )
    return info


def load_model(path, size=None):
    """Rebuild a trained model from `NAME.weights.h5` and `NAME.json`; no pickles, no code in files.

    `size` is the width and height in pixels of the frames to build for, by default those of the training.
    Raises FileNotFoundError, ValueError: files that are missing, foreign, damaged or of two models.
    """
    import h5py

    settings = weights_settings(path)["model"]
    if size and size % 32:
        raise ValueError(f"size: expected a multiple of 32, got {size}")
    try:
        model, shapes = build_model(**{**settings, "size": size or settings["size"]}), []
        with h5py.File(path) as file:  # shapes before any tensor: a small file can hold a huge one
            file.visititems(
                lambda _, item: shapes.append(item.shape) if hasattr(item, "shape") else None
            )
        if sorted(shapes) != sorted(tuple(variable.shape) for variable in model.weights):
            raise ValueError(f"its {len(shapes)} tensors have other shapes than the network's")
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # Keras names every layer that does not fit
            model.load_weights(path)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(
            f"{path}: not weights of this project's network ({reason}); {_RESTORE}"
        ) from None
    model.trained_size = settings["size"]
    return model


def predict_heatmaps(model, images, batch_size=16, channels=8):
    """Heatmaps (N, H/stride, W/stride, channels) float32 of frames (N, H, W, 3) uint8, up to 9 MB a frame."""
    images, size = np.asarray(images), model.settings["size"]
    if images.ndim != 4 or images.shape[1:] != (size, size, 3) or images.dtype != np.uint8:
        raise ValueError(
            f"images: expected (N, {size}, {size}, 3) uint8, got {images.shape} {images.dtype}"
        )
    maps = np.empty(
        (len(images), *model.output_shape[1:3], min(channels, model.output_shape[3])), np.float32
    )
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        batch = np.resize(part, (batch_size, size, size, 3))  # always the same shape: one graph
        found = average_mirrored(model.predict_on_batch, batch, model.settings["keypoints"])
        maps[start : start + len(part)] = found[: len(part), ..., :channels]
    return maps


def average_mirrored(network, images, keypoints):
    """The geometric mean of the heatmaps that a network sees in images (N, H, W, 3) and in their mirrors."""
    seen, mirrored = (
        np.maximum(network(x), 0) for x in (images, np.ascontiguousarray(images[:, :, ::-1]))
    )
    return np.sqrt(seen * mirrored[:, :, ::-1][..., mirror_permutation(KEYPOINTS[:keypoints])])


def read_keypoints(heatmaps, settings):
    """Keypoints (N, C, 2) in pixels, confidence and sigma (N, C), see `keypoint_sigma`, of heatmaps."""
    stride, sigma = settings["stride"], settings["sigma"] / settings["stride"]
    keypoints, confidence = decode_heatmaps(heatmaps, sigma)
    spread = keypoint_sigma(heatmaps, keypoints, sigma, 20 / stride) * stride
    return keypoints * stride, confidence, np.maximum(spread, MIN_SIGMA)


def predict_keypoints(model, images, batch_size=16, channels=8):
    """Find the eight corners in frames.

    Args:
        model: from `load_model` or `build_model`.
        images: (N, H, W, 3) uint8 RGB, of the model's size; ValueError otherwise.
        channels: how many of the network's keypoints to return; 36 gives all of `KEYPOINTS`.
    Returns:
        keypoints (N, channels, 2) in pixels and confidence (N, channels) in [0, 1].
    """
    starts = range(0, max(len(images), 1), batch_size)
    maps = (
        predict_heatmaps(model, images[i : i + batch_size], batch_size, channels) for i in starts
    )
    return tuple(
        map(np.concatenate, zip(*(read_keypoints(part, model.settings)[:2] for part in maps)))
    )


# ============================================================ pose

MIN_CONFIDENCE, MIN_SURE_POINTS = (
    0.2,
    8,
)  # where fewer are sure, unsure ones count too, down to a quarter
MIN_SIGMA = 0.7  # pixels of what the network is shown: it claims no more than that of a keypoint
INLIER_SIGMAS = (
    3.0  # a point further than so many standard deviations from its projection is an outlier
)
MIN_INLIER_RATIO = 0.7  # share of the points in use that must be inliers
MAX_REDUCED_CHI = 1.25  # root of chi square per degree of freedom of the inliers
CAUCHY = 1.5  # standard deviations at which the robust cost begins to forgive
MIN_MARGIN = 0.15  # a runner-up must fit worse by at least that much, in units of log-likelihood
PRIOR_WEIGHT = (
    6.0  # what a turn against the expected pose costs at most, in units of log-likelihood
)
HALF_ROLL = np.diag([-1.0, 1.0, -1.0, 1.0])  # (4, 4) half a turn about the ship's long axis


@dataclasses.dataclass(frozen=True)
class PoseEstimate:
    """What is known about the pose in one frame."""

    pose: (
        np.ndarray | None
    )  # (4, 4) model -> OpenCV camera; None where not even four points were found
    covariance: np.ndarray | None = (
        None  # (6, 6): rotation vector in camera axes (radians), then translation
    )
    accepted: bool = False
    reason: str = ""  # why it was not accepted
    reprojection: float = np.nan  # pixels, root mean square over the inliers
    reduced_chi: float = (
        np.nan
    )  # root of chi square per degree of freedom: 1 where errors are as expected
    inliers: np.ndarray | None = None  # (K,) bool, the points that the pose rests on
    runner_up: np.ndarray | None = (
        None  # (4, 4) the best pose that is turned by over 30 degrees against it
    )
    log_likelihood_margin: float = np.inf  # by how much the runner-up fits worse
    explained_contrast: float = (
        np.nan
    )  # share of the frame's contrast that the ship explains, once measured
    probability: float = np.nan  # of being right, once a single frame is judged on its pixels

    @property
    def rotation_sigma(self):
        """Expected rotation error in degrees: the root of the covariance's rotational trace."""
        unknown = self.covariance is None
        return np.inf if unknown else float(np.degrees(np.sqrt(np.trace(self.covariance[:3, :3]))))


def solve_pose(keypoints, K, confidence=None, points=None, sigma=None):
    """The pose (4, 4), model -> OpenCV camera, of `estimate_pose`, or None where it is not accepted."""
    estimate = estimate_pose(keypoints, K, confidence, sigma, points)
    return estimate.pose if estimate.accepted else None


def estimate_pose(keypoints, K, confidence=None, sigma=None, points=None, prior=None):
    """Estimate the ship's pose from its keypoints, and how far to trust it.

    RANSAC with SQPnP proposes a pose; with it compete the ways in which a flat ship is mistaken for it: half
    a roll, and mirrored in depth. All are refined by a robust cost in which each point has the weight of its
    precision. Where six points of the hull are found the corners do not count: they are found less precisely.

    Args:
        keypoints: (K, 2) pixels; NaN rows are not used. K: (3, 3) camera matrix, pixels.
        confidence: (K,) in [0, 1] or None; points below MIN_CONFIDENCE are used where few are above it.
        sigma: (K,) pixels, each point's standard deviation along x and y; points where it is not finite are
            not used. None takes what is typical of a corner found with that confidence.
        points: (K, 3) model points; None takes the first rows of `KEYPOINTS`.
        prior: (4, 4) or None, the pose expected from the frames before. It does not move poses, but costs
            those that are turned by 30 degrees or more against it PRIOR_WEIGHT.
    Returns:
        PoseEstimate; not accepted with fewer than 4 sure points (without sigmas all that are used), too few
        inliers, a fit that is worse than MAX_REDUCED_CHI or a runner-up within MIN_MARGIN.
    Raises:
        ValueError: a wrong shape, a sigma that is not positive, or a K that is no camera matrix.
    Source: Terzakis and Lourakis, ECCV 2020 (SQPnP); Schweighofer and Pinz, TPAMI 28(12), 2006 (two poses of
        a plane); Hartley and Zisserman, Multiple View Geometry, 2004, section 5.2 (covariance).
    """
    keypoints, K = check_array(keypoints, (None, 2), "keypoints"), check_camera_matrix(K)
    count = len(keypoints)
    points = check_array(KEYPOINTS[:count] if points is None else points, (count, 3), "points")
    confidence = (
        np.ones(count) if confidence is None else check_array(confidence, (count,), "confidence")
    )
    least = MIN_CONFIDENCE / (4 if sigma is None else 1)  # of a point that is sure
    if (
        sigma is None
    ):  # 1.8 pixels of a 256 px frame for a sure corner, 18 more for one without confidence
        sigma = (1.8 + 18 * (1 - confidence)) * 2 * max(K[0, 2], K[1, 2]) / FRAME_SIZE
    sigma = check_array(sigma, (count,), "sigma")
    usable = np.isfinite(keypoints).all(1) & np.isfinite(sigma) & (confidence >= MIN_CONFIDENCE / 4)
    sure = usable & (confidence >= least)
    usable = sure if sure.sum() >= MIN_SURE_POINTS else usable
    if (sigma[usable] <= 0).any():
        raise ValueError(f"sigma: expected positive numbers of pixels, got {sigma[usable].min()}")
    hull = usable & (np.arange(count) >= 8)
    for chosen in [hull, usable] if hull.sum() >= 6 else [usable]:
        found = _Correspondences(
            points[chosen], keypoints[chosen], sigma[chosen], K, prior
        ).estimate()
        if found.accepted:
            break
    inliers = np.zeros(count, bool)
    inliers[chosen] = False if found.inliers is None else found.inliers
    reason = found.reason or f"only {sure.sum()} points are sure"
    doubt = dict(accepted=False, reason=reason, log_likelihood_margin=0.0) if sure.sum() < 4 else {}
    return dataclasses.replace(found, inliers=inliers, **doubt)


@dataclasses.dataclass(frozen=True, order=True)
class _Candidate:
    """A pose and what it costs: its negative log-likelihood, but for a constant."""

    cost: float
    pose: np.ndarray = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class _Correspondences:
    """The model points of one frame and where they were found."""

    points: np.ndarray  # (K, 3) model
    keypoints: np.ndarray  # (K, 2) pixels
    sigma: np.ndarray  # (K,) pixels
    K: np.ndarray
    prior: np.ndarray | None  # (4, 4)

    def propose(self):
        """Poses by RANSAC and SQPnP, and what they may be mistaken for; none behind the camera."""
        poses = [] if self.prior is None else [self.prior]
        try:
            found, turn, shift, _ = cv2.solvePnPRansac(
                self.points,
                self.keypoints,
                self.K,
                None,
                iterationsCount=100,
                confidence=0.999,
                reprojectionError=INLIER_SIGMAS * float(np.median(self.sigma)),
                flags=cv2.SOLVEPNP_SQPNP,
            )
        except cv2.error:  # points that fix no pose
            return poses
        if found and np.isfinite(turn).all() and shift[2] > 0:
            poses += ambiguous_poses(move_pose(np.eye(4), np.concatenate([turn, shift]).ravel()))
        return poses

    def linearise(self, pose):
        """Errors (K, 2) and the projection's slopes (2 K, 6) with a step of `move_pose`, in sigmas."""
        turned = self.points @ pose[:3, :3].T
        projected, slopes = cv2.projectPoints(turned, np.zeros(3), pose[:3, 3], self.K, None)
        errors = (self.keypoints - projected[:, 0]) / self.sigma[:, None]
        errors[turned[:, 2] + pose[2, 3] < 1e-6] = 1e6  # behind the camera
        return errors, slopes[:, :6] / self.sigma.repeat(2)[:, None]

    def refine(self, pose):
        """The best `_Candidate` of a pose and two Gauss-Newton steps from it, under Cauchy errors."""
        visited = []
        for remaining in (2, 1, 0):
            errors, slopes = self.linearise(pose)
            squared = np.einsum("ki,ki->k", errors, errors) / CAUCHY**2
            turn = 0.0 if self.prior is None else min(rotation_error(pose, self.prior) / 30, 1.0)
            cost = np.log1p(squared).sum() * CAUCHY**2 / 2 + PRIOR_WEIGHT * turn**2
            visited.append(_Candidate(float(cost), pose))
            if remaining:
                weighted = slopes.T / (1 + squared).repeat(2)
                _, step = cv2.solve(
                    weighted @ slopes, weighted @ errors.reshape(-1, 1), flags=cv2.DECOMP_SVD
                )
                step *= min(
                    1.0, 0.3 / max(cv2.norm(step[:3]), 1e-12)
                )  # turns by at most 0.3 radians
                pose = move_pose(pose, step.ravel())
        return min(visited)

    def covariance(self, pose):
        """(6, 6) of a pose from its inliers; None where they do not fix it."""
        errors, slopes = self.linearise(pose)
        slopes = slopes[((errors**2).sum(1) < INLIER_SIGMAS**2).repeat(2)]
        information = slopes.T @ slopes
        fixed = len(slopes) >= 8 and np.linalg.cond(information) < 1e12
        return np.linalg.inv(information) if fixed else None

    def estimate(self):
        """The `PoseEstimate` from these points; its inliers are theirs."""
        found = (
            sorted(self.refine(pose) for pose in self.propose()) if len(self.points) >= 4 else []
        )
        if not found:
            return PoseEstimate(None, reason=f"{len(self.points)} points fix no pose; 4 are needed")
        turned = [other for other in found if rotation_error(other.pose, found[0].pose) > 30]
        runner_up = next(
            (other for other in turned if other.pose[2, 3] > 0), _Candidate(np.inf, None)
        )
        return self.judge(
            self.refine(found[0].pose).pose, runner_up.pose, runner_up.cost - found[0].cost
        )

    def judge(self, pose, runner_up, margin):
        """The `PoseEstimate` that accepts a pose, or says why not."""
        squared, covariance = (self.linearise(pose)[0] ** 2).sum(1), self.covariance(pose)
        inliers = squared < INLIER_SIGMAS**2
        count = int(inliers.sum())
        chi = float(np.sqrt(squared[inliers].sum() / max(2 * count - 6, 1)))
        faults = {
            f"{count} of {len(squared)} points agree with the pose": covariance is None
            or count < MIN_INLIER_RATIO * len(squared),
            "the pose lies behind the camera": (self.points @ pose[2, :3] + pose[2, 3] <= 0).any(),
            f"the points fit {chi:.1f} times worse than expected": chi > MAX_REDUCED_CHI,
            "a pose turned by more than 30 degrees fits nearly as well": margin < MIN_MARGIN,
        }
        reason = next((fault for fault, found in faults.items() if found), "")
        reprojection = (
            float(np.sqrt((squared * self.sigma**2)[inliers].mean())) if count else np.inf
        )
        return PoseEstimate(
            pose,
            covariance,
            accepted=not reason,
            reason=reason,
            reprojection=reprojection,
            reduced_chi=chi,
            inliers=inliers,
            runner_up=runner_up,
            log_likelihood_margin=margin,
        )


def move_pose(pose, step):
    """The pose (4, 4) after a step (6,): a turn in camera axes (rotation vector, radians), and a shift."""
    moved = pose.copy()
    moved[:3, :3], moved[:3, 3] = cv2.Rodrigues(step[:3])[0] @ pose[:3, :3], pose[:3, 3] + step[3:]
    return moved


def pose_step(pose, start):
    """The step (6,) that leads from `start` to `pose`; the inverse of `move_pose`."""
    turn = cv2.Rodrigues(pose[:3, :3] @ start[:3, :3].T)[0]
    return np.concatenate([turn.ravel(), pose[:3, 3] - start[:3, 3]])


def ambiguous_poses(pose):
    """What a flat ship's pose is taken for from afar: itself, half a roll, mirrored in depth, and both."""
    view, mirrored = pose[:3, 3] / np.linalg.norm(pose[:3, 3]), pose.copy()
    mirrored[:3, :3] -= 2 * np.outer(view, view) @ pose[:3, :3]
    mirrored[:3, 2] *= -1  # a rotation again
    return [pose, pose @ HALF_ROLL, mirrored, mirrored @ HALF_ROLL]


# ============================================================ drawing

CV_SHIFT = 4  # fractional bits of the positions that OpenCV draws at


def cv_point(point):
    """Continuous (x, y) pixels -> OpenCV's fixed-point pixel indices, with CV_SHIFT fractional bits."""
    return tuple(int(v) for v in np.round((np.clip(point, -(2**20), 2**20) - 0.5) * 2**CV_SHIFT))


def draw_box(image, keypoints, colour=(90, 255, 90)):
    """A copy of the frame (H, W, 3) uint8 with the box of (8, 2) corners; no edges with a NaN end."""
    image = np.array(image, order="C")
    for a, b in BOX_EDGES:
        if np.isfinite(keypoints[[a, b]]).all():
            cv2.line(
                image,
                cv_point(keypoints[a]),
                cv_point(keypoints[b]),
                colour,
                1,
                cv2.LINE_AA,
                CV_SHIFT,
            )
    return image


def draw_axes(image, pose, K, length=0.15):
    """A copy of the frame with the model's axes, `length` model units long: x red, y green, z blue."""
    image = np.array(image, order="C")
    origin, *ends = project_pose(np.concatenate([np.zeros((1, 3)), np.eye(3) * length]), pose, K)
    for end, colour in zip(ends, ((255, 70, 70), (80, 255, 80), (90, 140, 255))):
        if np.isfinite([origin, end]).all():
            cv2.arrowedLine(
                image, cv_point(origin), cv_point(end), colour, 1, cv2.LINE_AA, CV_SHIFT, 0.15
            )
    return image
