"""Track a known X-wing: from frames to heatmaps, from heatmaps to corners, from corners to a 6-DoF pose.

    model = load_model("weights/xwing.weights.h5")
    aligner = Aligner(load_mesh("data/xwing.obj"))
    keypoints, confidence, poses = track_frames(model, paths, K, aligner=aligner)  # (N, 8, 2) pixels, (N, 8), (4, 4) model -> camera or None
    animate(paths, poses, K, "anim.gif")

Conventions, everywhere in this module:

* Points are (x, y), arrays are [row, column]. Pixel coordinates are continuous: the origin is the top-left *corner* of the
  frame, so pixel [r, c] has its centre at (c + 0.5, r + 0.5). Only whole pixels read by an argmax are indices.
* The letters: N frames or points, K keypoints, H height, W width. Channels come last.
* The model frame has x across the wings, -y towards the nose, +z up, in model units (the ship is 0.345 long).
  A model matrix (model -> world) and the camera files follow OpenGL: the camera looks down -z, y points up.
  A *pose* is (4, 4), model -> OpenCV camera: x right, y down, z forward.
* Angles are in degrees unless a name says radians.

Nothing here imports TensorFlow or Keras until a model, a loss or a batch is asked for.
"""

import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import queue
import re
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import cv2
import joblib
import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation
from tqdm.auto import tqdm

# ============================================================ constants

FRAME_SIZE = 256  # pixels, width and height of the frames
SIGMA = 4.0  # pixels of the frame, standard deviation of the heatmaps' Gaussians

# (8, 3) model units: the corners of the ship's bounding box; the 8 keypoints, in this order.
BOUNDING_BOX = np.array([(x, y, z) for z in (-0.032, 0.034) for y in (-0.182, 0.163) for x in (-0.156, 0.156)])
# (12, 2) pairs of corners that share an edge.
BOX_EDGES = np.array([(0, 1), (2, 3), (4, 5), (6, 7), (0, 2), (1, 3), (4, 6), (5, 7), (0, 4), (1, 5), (2, 6), (3, 7)])
# (4, 2, 3) model units: each cannon's muzzle and a second point on its line of fire.
LASERS = np.array([[(x, -0.1, z), (x, -0.3, z)] for z in (-0.01, 0.01) for x in (-0.145, 0.145)])
# (8,) the corner that each corner turns into in a left-right mirror image.
MIRROR = np.array([1, 0, 3, 2, 5, 4, 7, 6])
# The wrong names that a symmetric-looking box invites: (8,) permutations, the true one first.
NAMINGS = {
    "identity": np.arange(8),
    "left-right": MIRROR,
    "top-bottom": np.array([4, 5, 6, 7, 0, 1, 2, 3]),
    "both": np.array([5, 4, 7, 6, 1, 0, 3, 2]),
    "nose-tail": np.array([2, 3, 0, 1, 6, 7, 4, 5]),
}
DIAMETER = float(np.linalg.norm(BOUNDING_BOX[7] - BOUNDING_BOX[0]))  # model units

# Points on the hull. Each has the outward normal of its surface: it counts as visible only where that faces the camera (a zero normal
# always does). They say which side is seen, and with it what the corners are called; and they are easier to see than the corners, which
# float in empty space. So the network learns both, and the pose uses both.
_SURFACE = np.array([  # x, y, z, normal x, y, z
    (0.000, 0.000, 0.0330, 0, 0, 1), (0.000, 0.050, 0.0340, 0, 0, 1),  # canopy, droid
    (0.000, 0.020, -0.0205, 0, 0, -1), (0.000, 0.095, -0.0255, 0, 0, -1),  # gear bay, belly
    (0.000, -0.182, 0.0000, 0, 0, 0), (0.000, 0.130, 0.0000, 0, 1, 0),  # nose, tail
    *((x, -0.100, 0.0000, np.sign(x), 0, 0) for x in (-0.0125, 0.0125)),  # stripes along the nose
    *((x, 0.070, z, 0, 0, np.sign(z)) for z in (-0.010, 0.010) for x in (-0.090, 0.090)),  # wings, from below and above
    *((x, -0.085, z, 0, 0, 0) for z in (-0.010, 0.010) for x in (-0.149, 0.149)),  # muzzles
    *((x, 0.110, z, 0, 0, 0) for z in (-0.010, 0.010) for x in (-0.149, 0.149)),  # rear ends of the cannons
    *((x, 0.040, z, 0, -1, 0) for z in (-0.0185, 0.0185) for x in (-0.042, 0.042)),  # intakes
    *((x, 0.163, z, 0, 1, 0) for z in (-0.0185, 0.0185) for x in (-0.042, 0.042))])  # nozzles
SURFACE_POINTS, SURFACE_NORMALS = _SURFACE[:, :3], _SURFACE[:, 3:]
KEYPOINTS = np.concatenate([BOUNDING_BOX, SURFACE_POINTS])  # (36, 3) what the shipped network predicts
NORMALS = np.concatenate([np.zeros((8, 3)), SURFACE_NORMALS])  # (36, 3)

CHANNELS = len(KEYPOINTS)  # 36
BACKBONE = "resnet18"  # encoder of the U-Net; any backbone of segmentation_models
DECODER_FILTERS = (128, 64, 32, 32, 16)
MARGIN = 48  # pixels round the frame in which keypoints can still be found
STRIDE = 2  # frame pixels for one heatmap pixel of the shipped network
MIN_DEVIATION = 0.7  # pixels of what the network is shown: it claims no more than that of a keypoint
_FAR = -1e4  # pixels; where a keypoint that must not show is put

# ============================================================ files


def _read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; every set needs it (see the README, Data)") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of 5,000 digits, 100,000 brackets
        raise ValueError(f"{path}: not readable as JSON ({error}); write it again") from None


def _as_matrix(value, name):
    """(4, 4) float64 with finite entries, or a ValueError that starts with `name`."""
    try:
        matrix = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}: expected a 4x4 matrix of numbers, got {str(value)[:80]}") from None
    if matrix.shape != (4, 4):
        raise ValueError(f"{name}: expected a 4x4 matrix, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name}: the matrix has NaN or infinite entries; render the frame again or remove it")
    return matrix


def _as_rigid(value, name, tolerance=1e-4):
    """(4, 4) float64 rotation and translation, or a ValueError that starts with `name`."""
    matrix = _as_matrix(value, name)
    rotation = matrix[:3, :3]
    if np.abs(matrix[3] - [0, 0, 0, 1]).max() > tolerance or np.abs(rotation @ rotation.T - np.eye(3)).max() > tolerance:
        raise ValueError(f"{name}: not a rigid motion (rotation and translation, no scale); got\n{matrix}")
    if np.linalg.det(rotation) < 0:
        raise ValueError(f"{name}: the matrix mirrors (determinant -1); a pose must be a rotation")
    return matrix


def load_camera(path):
    """Read a camera file.

    Args:
        path: `camera_info.json`, or the folder that holds it.
    Returns:
        model_view_matrix, projection_matrix: (4, 4) float64 each, OpenGL conventions.
    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON, a matrix is missing or is no finite 4x4.
    """
    path = Path(path)
    path = path / "camera_info.json" if path.is_dir() else path
    info = _read_json(path)
    missing = [k for k in ("model_view_matrix", "projection_matrix") if not isinstance(info, dict) or k not in info]
    if missing:
        raise ValueError(f"{path}: {' and '.join(missing)} missing; expected the camera file of the data set")
    projection = _as_matrix(info["projection_matrix"], f"{path}, projection_matrix")
    if projection[0, 0] <= 0 or projection[1, 1] <= 0 or not np.allclose(projection[3], [0, 0, -1, 0]):
        raise ValueError(f"{path}, projection_matrix: not an OpenGL perspective projection; got\n{projection}")
    return _as_rigid(info["model_view_matrix"], f"{path}, model_view_matrix"), projection


def list_frames(folder):
    """The numbered JPEG files of a folder in the order of their numbers.

    Returns a list of Path. Raises FileNotFoundError for a missing folder or one without numbered frames.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give a folder of frames 0.jpg, 1.jpg, ... or run `make data`")
    paths = [p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg") and re.fullmatch(r"\d+", p.stem)]
    if not paths:
        raise FileNotFoundError(f"{folder}: holds no frames named 0.jpg, 1.jpg, ...")
    return sorted(paths, key=lambda p: (int(p.stem), p.stem))


def load_dataset(folder):
    """List the frames of a set and read their model matrices.

    Returns:
        paths: list of N Path, in the order of their numbers.
        matrices: (N, 4, 4) float64 model -> world.
    Raises:
        FileNotFoundError: the folder or a frame's matrix is missing, or the folder holds no frames.
        ValueError: a matrix is not a rigid 4x4; the message names the file.
    """
    paths = list_frames(folder)
    matrices = []
    for path in paths:
        file = path.with_name(f"{path.stem}_mat.json")
        if not file.exists():
            raise FileNotFoundError(f"{file}: missing; the frame {path.name} needs its matrix, or must be removed")
        matrices.append(_as_rigid(_read_json(file), str(file)))
    return paths, np.array(matrices)


def load_mesh(path):
    """Read an OBJ mesh and its colours: a dict material -> (vertices (V, 3), faces (F, 3), colour (3,)).

    Faces of more than three corners are split into fans; texture and normal indices are ignored. Raises FileNotFoundError, or ValueError for a file
    without faces.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such mesh; write the supplied one with python data/make_xwing.py")
    vertices, faces, colours, material = [], {}, {}, "default"
    for line in path.read_text().splitlines():
        word, *rest = line.split() or [""]
        if word == "v":
            vertices.append([float(v) for v in rest[:3]])
        elif word == "usemtl":
            material = rest[0]
        elif word == "mtllib" and (path.parent / rest[0]).is_file():
            colours.update(_read_mtl(path.parent / rest[0]))
        elif word == "f":
            corners = [int(v.split("/")[0]) for v in rest]
            corners = [c - 1 if c > 0 else len(vertices) + c for c in corners]
            faces.setdefault(material, []).extend([corners[0], a, b] for a, b in zip(corners[1:], corners[2:]))
    if not faces:
        raise ValueError(f"{path}: no faces found; expected a Wavefront OBJ mesh")
    grey = np.array([0.6, 0.6, 0.6])
    return {name: (np.array(vertices), np.array(f), colours.get(name, grey)) for name, f in faces.items()}


def _read_mtl(path):
    colours, name = {}, None
    for line in path.read_text().splitlines():
        word, *rest = line.split() or [""]
        if word == "newmtl":
            name = rest[0]
        elif word == "Kd":
            colours[name] = np.array([float(v) for v in rest[:3]])
    return colours


def read_image(path, size=None):
    """Read one frame as (H, W, 3) uint8 RGB.

    Args:
        path: a JPEG (or other) picture.
        size: None, or the (width, height) in pixels that the frame must have.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not a picture, cut off, not RGB, or of another size.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such frame") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as a picture ({error}); it may be cut off: render or copy it again") from None
    if image.mode != "RGB":
        raise ValueError(f"{path}: expected an RGB picture, got mode {image.mode}; convert it, e.g. with PIL's convert('RGB')")
    if size is not None and image.size != tuple(size):
        raise ValueError(f"{path}: expected {size[0]}x{size[1]} pixels, got {image.size[0]}x{image.size[1]}; resize the whole set first")
    return np.array(image)


# ============================================================ camera and projection


def _check_array(value, shape, name):
    """float64 array of `shape` (None: any length); ValueError tells what came instead."""
    array = np.asarray(value, dtype=np.float64)
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape)):
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}".replace("None", "N"))
    return array


def to_homogeneous(points):
    """(N, 3) points -> (N, 4), with a last column of ones."""
    points = _check_array(points, (None, 3), "points")
    return np.concatenate([points, np.ones((len(points), 1))], axis=1)


def project_points(image, points, model_view_matrix, projection_matrix, transformation_mat=None):
    """Project homogeneous model points to continuous pixel coordinates.

    Args:
        image: (H, W, ...) array; only its size is used.
        points: (N, 4) homogeneous, model units.
        model_view_matrix: (4, 4) world -> OpenGL camera.
        projection_matrix: (4, 4) OpenGL camera -> clip space.
        transformation_mat: (4, 4) model -> world; None is the identity.
    Returns:
        (N, 2) float64 (x, y) pixels, origin at the top-left corner of the frame, not clipped.
    Raises:
        ValueError: a wrong shape, or a point at or behind the camera.
    Source: OpenGL 4.6 core specification, section 13.8 (coordinate transformations), with y turned to point down.
    """
    points = _check_array(points, (None, 4), "points")
    matrix = _check_array(projection_matrix, (4, 4), "projection_matrix") @ _check_array(model_view_matrix, (4, 4), "model_view_matrix")
    if transformation_mat is not None:
        matrix = matrix @ _check_array(transformation_mat, (4, 4), "transformation_mat")
    clip = points @ matrix.T
    if not (clip[:, 3] > 0).all():
        raise ValueError(f"{(~(clip[:, 3] > 0)).sum()} of {len(points)} points are at or behind the camera (or NaN) and have no projection")
    if np.ndim(image) < 2:
        raise ValueError(f"image: expected an array (H, W, ...), got shape {np.shape(image)}; give the frame, or np.empty((height, width))")
    height, width = np.shape(image)[:2]
    ndc = clip[:, :2] / clip[:, 3:]
    return (ndc * [1, -1] + 1) / 2 * [width, height]


def camera_matrix(projection_matrix, width, height):
    """The OpenCV intrinsic matrix K, (3, 3) in pixels, of an OpenGL projection drawn at width x height pixels.

    Source: Hartley and Zisserman, Multiple View Geometry, 2nd ed., section 6.1, equation 6.9, and the projection above.
    """
    p = _check_array(projection_matrix, (4, 4), "projection_matrix")
    return np.array([[p[0, 0] * width / 2, 0.0 - p[0, 1] * width / 2, (1 - p[0, 2]) * width / 2],
                     [0, p[1, 1] * height / 2, (1 + p[1, 2]) * height / 2], [0, 0, 1]])


def pose_in_camera(model_view_matrix, transformation_mat):
    """The pose (4, 4), model -> OpenCV camera (x right, y down, z forward), of a model matrix."""
    view = _check_array(model_view_matrix, (4, 4), "model_view_matrix")
    return np.diag([1.0, -1.0, -1.0, 1.0]) @ view @ _check_array(transformation_mat, (4, 4), "transformation_mat")


def transformation_from_pose(model_view_matrix, pose):
    """The model matrix (4, 4), model -> world, of a pose; the inverse of `pose_in_camera`."""
    view = _check_array(model_view_matrix, (4, 4), "model_view_matrix")
    return np.linalg.inv(view) @ np.diag([1.0, -1.0, -1.0, 1.0]) @ _check_array(pose, (4, 4), "pose")


def project_pose(points, pose, K):
    """Project (N, 3) model points under a pose (4, 4) and K (3, 3) to (N, 2) pixels; NaN at or behind the camera."""
    camera = np.asarray(points, float) @ pose[:3, :3].T + pose[:3, 3]
    depth = np.where(camera[:, 2:] > 1e-9, camera[:, 2:], np.nan)
    return (camera / depth) @ K[:2].T


def keypoints_of(matrices, model_view_matrix, projection_matrix, width=FRAME_SIZE, height=FRAME_SIZE, points=BOUNDING_BOX):
    """Project model points (K, 3) under every model matrix (N, 4, 4); returns (N, K, 2) pixels. The errors of `project_points` name the matrix."""
    frame, points, found = np.empty((height, width)), to_homogeneous(points), np.empty((len(matrices), len(points), 2))
    for i, matrix in enumerate(matrices):
        try:
            found[i] = project_points(frame, points, model_view_matrix, projection_matrix, matrix)
        except ValueError as error:
            raise ValueError(f"matrix {i} of {len(matrices)}: {error}") from None
    return found


def in_frame(keypoints, width=FRAME_SIZE, height=FRAME_SIZE):
    """(..., K) bool: which of the (..., K, 2) pixel positions lie inside the frame."""
    keypoints = np.asarray(keypoints)
    return ((keypoints >= 0) & (keypoints < [width, height])).all(-1)


def facing(matrices, model_view_matrix, points=KEYPOINTS, normals=NORMALS):
    """Which surface points turn their outward normal to the camera: (N, K) bool for model matrices (N, 4, 4) and points and normals (K, 3).

    A zero normal always does. Nothing is said of other parts of the ship in between."""
    poses = np.array([pose_in_camera(model_view_matrix, m) for m in matrices])
    position = np.einsum("nij,kj->nki", poses[:, :3, :3], points) + poses[:, None, :3, 3]
    direction = np.einsum("nij,kj->nki", poses[:, :3, :3], normals)
    return (np.einsum("nki,nki->nk", position, direction) < 0) | (np.abs(normals).sum(-1) == 0)


def mesh_triangles(mesh):
    """All triangles of a mesh from `load_mesh`, material by material: (T, 3, 3) corners in model units."""
    return np.concatenate([vertices[faces] for vertices, faces, _ in mesh.values()])


def occluder(mesh, share=0.9):
    """The largest triangles of a mesh, (T, 3, 3), that make up this share of its surface: enough to hide what lies behind, three times faster."""
    triangles = mesh_triangles(mesh)
    return triangles[_largest(triangles, share)]


def _largest(triangles, share):
    """The numbers of the largest triangles that make up this share of the surface."""
    area = np.linalg.norm(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1)
    order = np.argsort(-area)
    return order[: np.searchsorted(area[order].cumsum(), share * area.sum()) + 1]


def triangle_map(triangles, pose, K, width, height, near=1e-3):
    """Which triangle shows at the centre of each pixel: (height, width) int32, -1 where none does.

    triangles is (T, 3, 3) in model units; those that reach nearer than `near` to the camera's plane are left out.
    Source: the painter's algorithm, Newell, Newell and Sancha 1972: drawn from far to near by the distance of their middles, which
    is wrong only where long triangles cross in depth.
    """
    seen = triangles @ pose[:3, :3].T + pose[:3, 3]
    order = np.argsort(-np.linalg.norm(seen.mean(1), axis=1))
    order = order[(seen[order, :, 2] > near).all(1)]
    pixels = seen[order] @ K.T
    pixels = np.round((pixels[..., :2] / pixels[..., 2:] - 0.5) * 16).clip(-(2**24), 2**24).astype(np.int32)  # OpenCV's whole pixels are centres
    canvas = np.full((height, width), -1, np.int32)
    for index, corners in zip(order.tolist(), pixels):
        cv2.fillConvexPoly(canvas, corners, index, shift=4)
    return canvas


def mesh_depth(triangles, pose, K, width, height):
    """Depth along the camera's axis of the nearest surface at each pixel's centre: (height, width) model units, inf where there is none."""
    shown = triangle_map(triangles, pose, K, width, height)
    depth = np.full(shown.shape, np.inf)
    depth[shown >= 0] = _surface(shown, triangles, pose, K)[:, 2]
    return depth


def _surface(shown, triangles, pose, K):
    """The points (P, 3) of the surface, in the camera frame, at the centres of the pixels in which a `triangle_map` shows any, row by row."""
    row, column = np.nonzero(shown >= 0)
    rays = np.column_stack([column + 0.5, row + 0.5, np.ones(len(row))]) @ np.linalg.inv(K).T  # (P, 3), z = 1
    seen = (triangles @ pose[:3, :3].T + pose[:3, 3])[shown[row, column]]
    normals = np.cross(seen[:, 1] - seen[:, 0], seen[:, 2] - seen[:, 0])
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (normals * seen[:, 0]).sum(1) / (normals * rays).sum(1)
    return rays * np.fmax(np.fmin(z, seen[..., 2].max(1)), seen[..., 2].min(1))[:, None]  # seen edge-on, a plane's depth is anything


def in_the_sun(triangles, points, sun, distance=100.0, size=256, bias=0.004):
    """Which points on a mesh a far sun shines on, that is, which no other part shadows: (P,) bool.

    Args:
        triangles: (T, 3, 3); points: (P, 3), on their surface; in model units.
        sun: (3,) unit vector towards the sun, in model axes.
        distance: of the camera that takes the sun's place, model units; its picture of the mesh is about `size` pixels wide.
        bias: model units by which a point may lie behind what that camera sees; rounding must not put a surface in its own shadow.
    Source: the shadow map, Williams, Casting Curved Shadows on Curved Surfaces, SIGGRAPH 1978.
    """
    turn = Rotation.align_vectors([0, 0, -1], sun)[0].as_matrix()
    pose, reach = np.eye(4), 1.05 * np.linalg.norm(triangles, axis=-1).max()
    pose[:3, :3], pose[2, 3] = turn, distance
    K = np.array([[distance * size / 2 / reach, 0, size / 2], [0, distance * size / 2 / reach, size / 2], [0, 0, 1]])
    depth = cv2.dilate(mesh_depth(triangles, pose, K, size, size), np.ones((3, 3)))  # a pixel of tolerance on slopes and edges
    column, row = project_pose(points, pose, K).astype(int).clip(0, size - 1).T
    return (points @ turn.T)[:, 2] + distance < depth[row, column] + bias


# ============================================================ heatmaps


def _size(size):
    """(height, width) of an int (square) or a (height, width) pair."""
    return (size, size) if np.isscalar(size) else tuple(size)


def gaussian_heatmaps(keypoints, size, sigma=SIGMA):
    """Draw one Gaussian a keypoint.

    Args:
        keypoints: (K, 2) continuous pixels.
        size: int for a square, or (height, width) in pixels.
        sigma: standard deviation in pixels.
    Returns:
        (H, W, K) float32: the value at each pixel centre, 1 at the continuous position; the tail of a keypoint just outside the
        frame, zeros for one far outside.
    Raises:
        ValueError: a wrong shape, NaN, or a sigma that is not positive.
    Source: Tompson et al., Joint Training of a Convolutional Network and a Graphical Model for Human Pose Estimation, 2014.
    """
    keypoints = _check_array(keypoints, (None, 2), "keypoints")
    if np.isnan(keypoints).any():
        raise ValueError(f"keypoints: NaN in {np.isnan(keypoints).any(-1).sum()} of {len(keypoints)}; leave them out or put them far outside")
    if not sigma > 0:
        raise ValueError(f"sigma: expected a positive number of pixels, got {sigma}")
    height, width = _size(size)
    gx = np.exp(-((np.arange(width)[:, None] + 0.5 - keypoints[:, 0]) ** 2) / (2 * sigma**2))
    gy = np.exp(-((np.arange(height)[:, None] + 0.5 - keypoints[:, 1]) ** 2) / (2 * sigma**2))
    return (gy[:, None] * gx[None]).astype(np.float32)


def heatmap2argmax(heatmaps, scale=False):
    """Read the brightest pixel of each heatmap.

    Args:
        heatmaps: (..., H, W, K).
        scale: False for pixel indices (x, y); True for 2 * index / size - 1, in [-1, 1).
    Returns:
        (..., K, 2) int64 indices, or float64 with `scale`.
    Raises:
        ValueError: fewer than three dimensions.
    """
    heatmaps = np.asarray(heatmaps)
    if heatmaps.ndim < 3:
        raise ValueError(f"heatmaps: expected shape (..., H, W, K), got {heatmaps.shape}")
    *lead, height, width, count = heatmaps.shape
    flat = heatmaps.reshape(*lead, height * width, count).argmax(-2)
    indices = np.stack([flat % width, flat // width], -1)
    return 2 * indices / [width, height] - 1 if scale else indices


def decode_heatmaps(heatmaps, sigma=SIGMA, method="gaussian"):
    """Read sub-pixel keypoints from heatmaps.

    Args:
        heatmaps: (..., H, W, K), peaks of 1.
        sigma: standard deviation of the Gaussians in pixels; scales the windows.
        method: how to read between the pixels, from the brightest one on. "gaussian": least squares for log h = a + b x + c y + d (x^2 + y^2) in a
            window of 1.5 sigma, weighted by h^2, the exact answer for any Gaussian, also one that the frame's border cuts. "argmax": its centre.
            "quarter": a quarter pixel towards the brighter neighbour. "taylor": a Newton step on the logarithm of the smoothed map. "centroid": the
            centre of mass within 2 sigma.
    Returns:
        keypoints: (..., K, 2) float64 continuous pixels (x, y); NaN where a heatmap is zero or not finite.
        confidence: (..., K) float64 in [0, 1]: the share of a full Gaussian's mass found within 3 sigma of the peak.
    Raises:
        ValueError: an unknown method, or fewer than three dimensions.
    Source: Guo, A Simple Algorithm for Fitting a Gaussian Function, IEEE Signal Processing Magazine 28(5), 2011; for "quarter" Newell et al., Stacked
        Hourglass Networks, ECCV 2016; for "taylor" Zhang et al., Distribution-Aware Coordinate Representation (DARK), CVPR 2020.
    """
    if method not in DECODERS:
        raise ValueError(f"method: expected one of {', '.join(DECODERS)}, got {method!r}")
    heatmaps = np.asarray(heatmaps)
    peaks = heatmap2argmax(heatmaps)
    *lead, height, width, count = heatmaps.shape
    maps = np.moveaxis(heatmaps, -1, -3).reshape(-1, height, width)
    column, row = peaks.reshape(-1, 2).T
    keypoints = DECODERS[method](maps, column, row, sigma) + np.stack([column, row], -1) + 0.5
    window, x, y = _windows(maps, column, row, int(np.ceil(3 * sigma)))
    keypoints[~(np.nan_to_num(window).max((1, 2)) > 0)] = np.nan
    expected = np.exp(-((x + column[:, None, None] + 0.5 - keypoints[:, 0, None, None]) ** 2
                        + (y + row[:, None, None] + 0.5 - keypoints[:, 1, None, None]) ** 2) / (2 * sigma**2))
    expected = np.where(np.isnan(window), 0, expected).sum((1, 2))
    confidence = np.nansum(np.clip(window, 0, None), (1, 2)) / np.maximum(expected, 0.1 * 2 * np.pi * sigma**2)
    confidence = np.where(np.isnan(keypoints).any(-1), 0.0, np.clip(confidence, 0, 1))
    return keypoints.reshape(*lead, count, 2), confidence.reshape(*lead, count)


def heatmap_covariance(heatmaps, keypoints, sigma=SIGMA, reach=10.0):
    """How uncertain each keypoint is: the spread of its heatmap about it, less the spread that a sure answer has.

    A softmax heatmap is the network's belief in every position, widened by the target's Gaussian. Its second moments, taken under a Gaussian
    window of `reach` about the keypoint, minus sigma^2, are the belief's covariance; the window's narrowing is undone.

    Args:
        heatmaps: (..., H, W, K), peaks of 1.
        keypoints: (..., K, 2) their keypoints in pixels of the maps; rows of NaN give infinite variances.
        sigma, reach: pixels of the maps.
    Returns:
        (..., K, 2, 2) float64, square pixels of the maps.
    """
    heatmaps, keypoints = np.asarray(heatmaps), np.asarray(keypoints)
    found = np.isfinite(keypoints).all(-1)
    centre = np.where(found[..., None], keypoints, 0.0)
    height, width = heatmaps.shape[-3:-1]
    x, y = (np.arange(n)[:, None] + 0.5 - centre[..., None, :, i] for n, i in ((width, 0), (height, 1)))  # (..., W, K), (..., H, K)
    wx, wy = (np.exp(-(d**2) / (2 * reach**2)) for d in (x, y))
    rows = [np.einsum("...hwk,...wk->...hk", heatmaps, (wx * x**power).astype(heatmaps.dtype)) for power in range(3)]
    moments = [[(rows[i] * wy * y**j).sum(-2) for j in range(3)] for i in range(3)]
    with np.errstate(divide="ignore", invalid="ignore"):
        (_, my, myy), (mx, mxy, _), (mxx, _, _) = [[m / moments[0][0] for m in line] for line in moments]
    spread = np.stack([np.stack([mxx - mx**2, mxy - mx * my], -1), np.stack([mxy - mx * my, myy - my**2], -1)], -1)
    usable = found & np.isfinite(spread).all((-1, -2))
    values, vectors = np.linalg.eigh(np.where(usable[..., None, None], spread, np.eye(2)))
    values = 1 / np.maximum(1 / np.maximum(values, 1e-9) - 1 / reach**2, 1e-4) - sigma**2
    covariance = (vectors * np.maximum(values, 1e-3)[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    return np.where(usable[..., None, None], covariance, np.diag([np.inf, np.inf]))


def point_deviation(covariance, least=MIN_DEVIATION):
    """(...,) standard deviation along one axis, in pixels, of covariances (..., 2, 2): the root of their mean variance, or `least` pixels."""
    return np.maximum(np.sqrt(np.trace(covariance, axis1=-2, axis2=-1) / 2), least)


def _windows(maps, column, row, radius):
    """Cut (M, 2r+1, 2r+1) windows round pixels; NaN outside the frame. Returns the values and their x and y offsets."""
    height, width = maps.shape[1:]
    offsets = np.arange(-radius, radius + 1)
    x, y = np.broadcast_to(offsets, (2 * radius + 1,) * 2), np.broadcast_to(offsets[:, None], (2 * radius + 1,) * 2)
    c, r = column[:, None, None] + x, row[:, None, None] + y
    inside = (c >= 0) & (c < width) & (r >= 0) & (r < height)
    values = maps[np.arange(len(maps))[:, None, None], np.clip(r, 0, height - 1), np.clip(c, 0, width - 1)]
    return np.where(inside, values, np.nan).astype(np.float64), x, y


def _gaussian_offset(maps, column, row, sigma):
    """(M, 2) offsets (x, y) of the peaks of log-fitted Gaussians from the brightest pixels' centres."""
    window, x, y = _windows(maps, column, row, max(1, round(1.5 * sigma)))
    usable = np.isfinite(window) & (window > 1e-6)
    weight = np.where(usable, window, 0) ** 2
    logs = np.log(np.where(usable, window, 1))
    basis = np.stack([np.ones_like(x), x, y, x**2 + y**2], -1).reshape(-1, 4) / [1, sigma, sigma, sigma**2]
    weight, logs = weight.reshape(len(weight), -1), logs.reshape(len(logs), -1)
    normal = np.einsum("mp,pi,pj->mij", weight, basis, basis, optimize=True)
    right = np.einsum("mp,mp,pi->mi", weight, logs, basis, optimize=True)
    scale = np.trace(normal, axis1=1, axis2=2)[:, None, None] + 1e-300
    a, b, c, d = np.linalg.solve(normal / scale + 1e-12 * np.eye(4), (right / scale[..., 0])[..., None])[..., 0].T
    with np.errstate(divide="ignore", invalid="ignore"):
        offset = np.stack([b, c], -1) / (-2 * d[:, None]) * sigma
    offset = np.where((d[:, None] < -1e-3) & np.isfinite(offset), np.clip(offset, -1.5 * sigma, 1.5 * sigma), 0.0)
    return offset


def _no_offset(maps, column, row, sigma):
    return np.zeros((len(maps), 2))


def _quarter_offset(maps, column, row, sigma):
    window = np.nan_to_num(_windows(maps, column, row, 1)[0])
    return 0.25 * np.sign(np.stack([window[:, 1, 2] - window[:, 1, 0], window[:, 2, 1] - window[:, 0, 1]], -1))


def _taylor_offset(maps, column, row, sigma):
    """Newton's step; the map is smoothed first, by half its own sigma."""
    smooth = np.stack([cv2.GaussianBlur(np.ascontiguousarray(m, np.float32), (0, 0), max(0.5 * sigma, 0.3)) for m in np.nan_to_num(maps)])
    w = np.log(np.maximum(np.nan_to_num(_windows(smooth, column, row, 1)[0]), 1e-10))
    gradient = np.stack([w[:, 1, 2] - w[:, 1, 0], w[:, 2, 1] - w[:, 0, 1]], -1) / 2
    xx, yy = w[:, 1, 2] - 2 * w[:, 1, 1] + w[:, 1, 0], w[:, 2, 1] - 2 * w[:, 1, 1] + w[:, 0, 1]
    xy = (w[:, 2, 2] - w[:, 2, 0] - w[:, 0, 2] + w[:, 0, 0]) / 4
    determinant = xx * yy - xy**2
    step = np.stack([xy * gradient[:, 1] - yy * gradient[:, 0], xy * gradient[:, 0] - xx * gradient[:, 1]], -1)
    step = step / np.where(determinant > 1e-9, determinant, np.inf)[:, None]
    return np.clip(step, -1, 1)


def _centroid_offset(maps, column, row, sigma):
    window, x, y = _windows(maps, column, row, max(1, round(2 * sigma)))
    window = np.clip(np.nan_to_num(window), 0, None)
    total = np.maximum(window.sum((1, 2)), 1e-30)
    return np.stack([(window * x).sum((1, 2)) / total, (window * y).sum((1, 2)) / total], -1)


DECODERS = {"argmax": _no_offset, "quarter": _quarter_offset, "taylor": _taylor_offset, "centroid": _centroid_offset, "gaussian": _gaussian_offset}


# ============================================================ data pipeline


def mirror_keypoints(keypoints, width, permutation=MIRROR):
    """Keypoints (..., K, 2+) of the left-right mirrored frame, under their new names.

    The k-th returned row is the mirrored position of row permutation[k]; further columns travel along. Its own inverse.
    """
    mirrored = np.array(keypoints)[..., permutation, :]
    mirrored[..., 0] = width - mirrored[..., 0]
    return mirrored


def mirror_transformation(matrix):
    """The model matrix (4, 4) of the left-right mirrored frame, for a camera that looks along its z axis from x = 0."""
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    return flip @ _check_array(matrix, (4, 4), "matrix") @ flip


def mirror_permutation(points):
    """For model points (K, 3), the index of each point's mirror image in x. ValueError if one has none."""
    points = _check_array(points, (None, 3), "points")
    distance = np.linalg.norm(points[:, None] * [-1, 1, 1] - points[None], axis=-1)
    if (distance.min(1) > 1e-6).any():
        raise ValueError(f"points: {points[distance.min(1).argmax()]} has no mirror image in the set; add it, so that frames can be mirrored")
    return distance.argmin(1)


def augmentation(seed=None):
    """The albumentations pipeline: geometry about the frame's centre, then colour, blur, noise and compression.

    The left-right mirror is not part of it: albumentations does not swap the names of keypoints, `make_dataset` does both.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations as A

    return A.Compose([
        A.Affine(rotate=(-180, 180), scale=(0.7, 1.3), keep_ratio=True, translate_percent=(-0.08, 0.08), p=0.6),
        A.OneOf([A.RandomBrightnessContrast((-0.15, 0.3), (-0.3, 0.4)), A.RandomGamma((65, 140)), A.RandomToneCurve(0.2)], p=0.6),
        A.OneOf([A.HueSaturationValue(20, 60, 20), A.RGBShift(25, 25, 25), A.ToGray()], p=0.5),
        A.OneOf([A.GaussianBlur(blur_limit=(3, 5), sigma_limit=(0.3, 1.2)), A.MotionBlur(blur_limit=(3, 5)),
                 A.Downscale(scale_range=(0.5, 0.9))], p=0.25),
        A.OneOf([A.GaussNoise(std_range=(0.01, 0.06)), A.ISONoise()], p=0.25),
        A.ImageCompression(quality_range=(55, 98), p=0.3),
    ], keypoint_params=A.KeypointParams(format="xy", remove_invisible=False), seed=seed)


def augment(image, keypoints, transform):
    """Apply an albumentations pipeline to a frame and its keypoints (K, 2); none is dropped.

    This is the one place where continuous coordinates become albumentations' pixel-index coordinates and come back.
    """
    result = transform(image=image, keypoints=np.asarray(keypoints) - 0.5)
    return result["image"], np.asarray(result["keypoints"], dtype=np.float64).reshape(-1, 2) + 0.5


def relight(image, pose, K, mesh, rng):
    """The frame with its ship in other paint and light, before another background: domain randomisation without a renderer.

    Each triangle of the mesh multiplies the pixels that it covers by a random paint of its material and a random light, at twice the size for
    smooth edges: ambient and one direction, diffuse, for half of the frames a hard sun with shadows, and for half of them with highlights. The
    ship's own light and details stay.

    Args:
        image: (H, W, 3) uint8.
        pose, K: the frame's truth.
        mesh: from `load_mesh`.
        rng: numpy Generator.
    Returns:
        (H, W, 3) uint8.
    Source: Tobin et al. 2017, Domain Randomization for Transferring Deep Neural Networks; the highlights are Blinn's, SIGGRAPH 1977.
    """
    height, width = image.shape[:2]
    triangles, large = mesh_triangles(mesh), K * [[2], [2], [1]]
    shown = triangle_map(triangles, pose, large, 2 * width, 2 * height)
    middles = triangles.mean(1) @ pose[:3, :3].T + pose[:3, 3]
    views = -middles / np.linalg.norm(middles, axis=1, keepdims=True)  # from each triangle to the camera
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]) @ pose[:3, :3].T
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
    normals *= np.sign((normals * views).sum(1, keepdims=True))  # towards the camera
    sun, hard = rng.normal(size=3), rng.random() < 0.5
    sun /= np.linalg.norm(sun)
    halfway = (views + sun) / (np.linalg.norm(views + sun, axis=1, keepdims=True) + 1e-12)
    ambient, strength = (rng.uniform(0.15, 0.6), rng.uniform(0.5, 1.8)) if hard else (rng.uniform(0.25, 1.1), rng.uniform(0, 1.3))
    shine = rng.uniform(0, 150) * (rng.random() < 0.5) * np.clip((normals * halfway).sum(1), 0, None) ** np.exp(rng.uniform(1, 5))
    paint = np.exp(rng.normal(0, 0.3, (len(mesh), 1)) + rng.normal(0, rng.uniform(0, 0.3), (len(mesh), 3)))
    paint = np.repeat(paint, [len(faces) for _, faces, _ in mesh.values()], axis=0)
    cover = shown >= 0
    chosen, lit = shown[cover], 1.0
    if hard:
        points = (_surface(shown, triangles, pose, large) - pose[:3, 3]) @ pose[:3, :3]
        lit = in_the_sun(occluder(mesh), points, sun @ pose[:3, :3])
    light = np.clip(normals @ sun, 0, None)[chosen] * lit
    gain = np.zeros((2 * height, 2 * width, 5), np.float32)  # red, green, blue, cover, highlight
    gain[cover] = np.column_stack([paint[chosen] * (ambient + strength * light)[:, None], np.ones(len(chosen)), shine[chosen] * (light > 0)])
    gain = cv2.resize(gain, (width, height), interpolation=cv2.INTER_AREA)
    cover = gain[..., 3:4]
    ship = (image * gain[..., :3] + gain[..., 4:]) / np.maximum(cover, 1e-3)
    threshold = rng.uniform(0, 0.5)  # how much of the ship's edge, which holds some of the old background, is cut away
    cover = np.clip((cover - threshold) / (1 - threshold), 0, 1)
    return np.clip(cover * ship + (1 - cover) * _background(height, width, rng), 0, 255).astype(np.uint8)


def _background(height, width, rng):
    """A random background, (H, W, 3) float32: coloured noise on all scales, or flat shapes one over another."""
    background = np.zeros((height, width, 3), np.float32) + rng.uniform(0, 255, 3 if rng.random() < 0.5 else 1)
    if rng.random() < 0.6:
        slope, colourful = rng.uniform(0.4, 1.2), rng.uniform(0, 0.6)
        for n in (2, 4, 8, 16, 32, 64, 128):
            noise = rng.normal(size=(n, n, 1)) + colourful * rng.normal(size=(n, n, 3))
            background += 50 * (2 / n) ** slope * cv2.resize(noise.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    else:
        for _ in range(rng.integers(1, 40)):
            colour, middle, reach = rng.uniform(0, 255, 3), rng.uniform(0, [width, height]), np.exp(rng.uniform(0, 5))
            polygon = middle + rng.normal(size=(rng.integers(3, 7), 2)) * reach
            cv2.fillConvexPoly(background, cv2.convexHull(polygon.astype(np.int32)), colour)
    return cv2.GaussianBlur(background, (0, 0), np.exp(rng.uniform(-1, 1)))


class _Batches:
    """The batches of `make_dataset`; a function of (seed, epoch, index) alone, so workers may take them in any order."""

    def __init__(self, paths, keypoints, shown, permutation, relit, batch_size, steps, size, crop, augmented, shuffle, seed, shard, **workers):
        super().__init__(**workers)
        self.shard, self.steps = shard, steps or -(-len(paths) // batch_size)
        self.paths, self.keypoints, self.shown, self.permutation, self.relit = list(paths), keypoints, shown, permutation, relit
        self.batch_size, self.size, self.crop, self.augmented, self.shuffle, self.seed = batch_size, size, crop, augmented, shuffle, seed
        self.epoch = -1
        self.on_epoch_begin()

    def __len__(self):
        return self.steps

    def on_epoch_begin(self):
        """Draw the order of the next epoch."""
        self.epoch += 1
        order = np.arange(len(self.paths))
        self.order = np.random.default_rng([self.seed, self.epoch]).permutation(order) if self.shuffle else order

    def __getitem__(self, index):
        part, parts = self.shard
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size][part::parts]
        rng = np.random.default_rng([self.seed, self.epoch, index, part])
        transform = augmentation(int(rng.integers(2**31))) if self.augmented else None
        images, targets = zip(*(self._example(i, rng, transform) for i in chosen))
        return np.stack(images), np.stack(targets)

    def _example(self, i, rng, transform):
        """One frame: (size, size, 3) uint8 and (K, 3) float32."""
        image = read_image(self.paths[i], (FRAME_SIZE, FRAME_SIZE))
        keypoints, shown = self.keypoints[i], self.shown[i]
        if self.relit is not None and rng.random() < self.relit[0]:
            image = self.relit[1](image, i, rng)
        if self.augmented and rng.random() < 0.5:
            image, keypoints, shown = image[:, ::-1], mirror_keypoints(keypoints, FRAME_SIZE, self.permutation), shown[self.permutation]
        if transform is not None:
            image, keypoints = augment(np.ascontiguousarray(image), keypoints, transform)
        if self.crop:
            image, keypoints = _crop_near(image, keypoints, self.size, rng)
        elif self.size != FRAME_SIZE:
            keypoints = keypoints * (self.size / FRAME_SIZE)
            image = cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_AREA)
        keypoints = np.where(shown[:, None], keypoints, _FAR)
        visible = in_frame(keypoints, self.size, self.size)
        return image, np.concatenate([keypoints, visible[:, None]], 1).astype(np.float32)


def _crop_near(image, keypoints, size, rng):
    """Cut a square of `size` pixels that holds the ship, more or less in its middle.

    Half of the squares lie within the frame; the others may reach up to `MARGIN` pixels beyond its edge into black, where keypoints that
    left the frame are still to be found.
    """
    margin = MARGIN if rng.random() < 0.5 else 0
    middle = keypoints[:8].mean(0) + rng.uniform(-size / 4, size / 4, 2)
    corner = np.clip(np.round(middle - size / 2), -margin, np.array(image.shape[1::-1]) - size + margin).astype(int)
    return crop(image, corner, size), keypoints - corner


def crop(image, corner, size):
    """The square of `size` pixels with its top-left at `corner` (left, top), whole pixels; black where it reaches beyond the frame."""
    left, top = corner
    square = np.zeros((size, size, *image.shape[2:]), image.dtype)
    x, y = max(left, 0), max(top, 0)
    part = image[y : max(top + size, 0), x : max(left + size, 0)]
    square[y - top : y - top + part.shape[0], x - left : x - left + part.shape[1]] = part
    return square


def make_dataset(paths, matrices, model_view_matrix, projection_matrix, batch_size=16, steps=None, size=FRAME_SIZE, crop=False, augmented=True,
                 shuffle=None, points=KEYPOINTS, normals=None, mesh=None, relit=0.3, seed=0, shard=None, workers=2):
    """A `keras.utils.PyDataset` that reads, augments and batches frames on `workers` threads.

    Args:
        paths, matrices: from `load_dataset`.
        model_view_matrix, projection_matrix: from `load_camera`.
        steps: batches an epoch; None is all of them. (Not `steps_per_epoch` of `fit`, which would not start a new epoch of this dataset.)
        size: width and height in pixels to which frames and keypoints are scaled after the augmentation.
        crop: cut a square of that size round the ship instead of scaling: all the detail at a part of the cost. Half of the squares may
            reach beyond the frame, into black.
        augmented: mirror (with the names swapped) and `augmentation`; False leaves the frames alone.
        shuffle: None does as `augmented`.
        points: (K, 3) model points, the 8 corners first.
        normals: (K, 3) outward normals; a point whose normal turns away counts as hidden. None takes this module's for its own
            `KEYPOINTS`, and zeros (never hidden) for other points.
        mesh: of the ship in the frames, from `load_mesh`; with it a share `relit` of the augmented frames goes through `relight`.
        shard: (index, count), to yield only one of so many parts of every batch; None is this worker's part of the batches to train on (see
            `worker`), and all of those that are not augmented.
    Yields:
        images (B, size, size, 3) uint8, and keypoints (B, K, 3) float32: x, y in pixels and visibility (1 in the frame and facing the
        camera, else 0). Off-frame points keep their positions; points that face away are put far outside.
    Raises:
        ValueError: no frames, lengths that differ, too many steps, too large a square, points that do not start with the corners
        or have no mirror image.
    """
    keras = import_keras()

    points = _check_array(points, (None, 3), "points")
    if len(paths) == 0 or len(paths) != len(matrices):
        raise ValueError(f"expected as many matrices as frames and at least one, got {len(paths)} frames and {len(matrices)} matrices")
    if size < 1 or (crop and size > FRAME_SIZE):
        raise ValueError(f"size: expected pixels, at most {FRAME_SIZE} for squares cut from the frames, got {size}")
    if steps is not None and not 1 <= steps <= -(-len(paths) // batch_size):
        raise ValueError(f"steps: {len(paths)} frames in batches of {batch_size} make {-(-len(paths) // batch_size)} steps, got {steps}")
    shard = shard or (worker() if augmented else (0, 1))
    if batch_size % shard[1]:
        raise ValueError(f"batch_size: expected a multiple of the {shard[1]} workers, got {batch_size}")
    if not np.allclose(points[:8], BOUNDING_BOX):
        raise ValueError("points: the first 8 must be the corners of BOUNDING_BOX, in its order")
    if normals is None:
        normals = NORMALS if points.shape == KEYPOINTS.shape and np.allclose(points, KEYPOINTS) else np.zeros_like(points)
    keypoints = keypoints_of(matrices, model_view_matrix, projection_matrix, points=points)
    if not np.isfinite(keypoints).all():
        raise ValueError("keypoints: NaN or infinite positions; check the matrices and the camera")
    shown = facing(matrices, model_view_matrix, points, normals)
    dataset = type("XwingDataset", (_Batches, keras.utils.PyDataset), {})
    look = None
    if mesh is not None and augmented:
        K = camera_matrix(projection_matrix, FRAME_SIZE, FRAME_SIZE)
        look = relit, lambda image, i, rng: relight(image, pose_in_camera(model_view_matrix, matrices[i]), K, mesh, rng)
    return dataset(paths, keypoints, shown, mirror_permutation(points), look, batch_size, steps, size, crop, augmented,
                   augmented if shuffle is None else shuffle, seed, shard, workers=workers, max_queue_size=8)


# ============================================================ model


class HeatmapLoss:
    """A Keras loss that draws the Gaussian heatmaps of a batch from its keypoints, on the device, within the step.

    Args:
        sigma: standard deviation in pixels of the frames.
        stride: frame pixels for one pixel of the network's maps.
        kind: "softmax", the cross-entropy between the Gaussian as a distribution over the pixels (its part outside the frame is one
            more class) and the predicted map read as one; "mse", the mean squared error; "weighted", the mean squared error with
            weight 1 + 50 h, so that the few bright pixels count.
    Called with y_true (B, K, 3) keypoints in pixels (see `make_dataset`) and y_pred (B, H, W, K) heatmaps; returns (B,).
    Source: for the softmax, Sun et al., Integral Human Pose Regression, ECCV 2018; for the class of absent points, DeTone et al.,
        SuperPoint, CVPRW 2018, section 3.2.
    """

    def __init__(self, sigma=SIGMA, kind="softmax", stride=1):
        if kind not in ("softmax", "mse", "weighted"):
            raise ValueError(f"kind: expected 'softmax', 'mse' or 'weighted', got {kind!r}")
        self.sigma, self.kind, self.stride = float(sigma), kind, stride
        self.__name__ = f"heatmap_{kind}"

    def __call__(self, y_true, y_pred):
        from keras import ops

        y_true, y_pred = ops.cast(y_true, "float32"), ops.cast(y_pred, "float32")
        height, width = y_pred.shape[1:3]
        gx, gy = self._profile(y_true[..., 0], width), self._profile(y_true[..., 1], height)  # (B, W, K), (B, H, K)
        if self.kind == "softmax":
            return self._cross_entropy(gx, gy, y_pred)
        target = gy[:, :, None] * gx[:, None]
        weight = 1.0 + 50.0 * target if self.kind == "weighted" else 1.0
        return ops.mean(weight * ops.square(target - y_pred), axis=(1, 2, 3))

    def _profile(self, position, length):
        from keras import ops

        centres = (ops.arange(length, dtype="float32") + 0.5) * self.stride
        return ops.exp(-ops.square(centres[None, :, None] - position[:, None]) / (2 * self.sigma**2))

    def _cross_entropy(self, gx, gy, y_pred):
        from keras import ops

        mass = 2 * np.pi * (self.sigma / self.stride) ** 2
        log_p = ops.log(y_pred + 1e-30) - float(np.log(mass))
        inside = ops.sum(gy * ops.sum(log_p * gx[:, None], axis=2), axis=1) / mass
        target_inside = ops.minimum(ops.sum(gx, axis=1) * ops.sum(gy, axis=1) / mass, 1.0)
        absent = 1.0 - ops.sum(y_pred, axis=(1, 2)) / mass
        outside = (1.0 - target_inside) * ops.log(ops.maximum(absent, 0.0) + 1e-6)
        return -ops.mean(inside + outside, axis=-1)


def spatial_softmax(logits, sigma):
    """Turn logits (B, H, W, K) into heatmaps: a softmax over the pixels of each channel and one class for "not in the frame".

    Scaled by 2 pi sigma^2, so that a softmax that equals a Gaussian of that sigma has a peak of 1.
    """
    from keras import ops

    height, width = logits.shape[1:3]
    logits = ops.cast(logits, "float32")
    largest = ops.stop_gradient(ops.maximum(ops.max(logits, axis=(1, 2), keepdims=True), 0.0))
    weights = ops.exp(logits - largest)
    absent = height * width * ops.exp(-largest)
    return weights * (2 * np.pi * sigma**2 / (ops.sum(weights, axis=(1, 2), keepdims=True) + absent))


def import_keras():
    """Import Keras with its backend, without the messages that TensorFlow writes to the console when it starts. Returns the module.

    With JAX, and Keras' own variables KERAS_DISTRIBUTION_NUM_PROCESSES, _PROCESS_ID and _JOB_ADDRESSES set, this process becomes one of several
    workers; that must be before JAX computes anything.
    """
    if "keras" not in sys.modules:
        sys.stderr.flush()
        console, silence = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 2)
        try:
            import keras
        finally:
            os.dup2(console, 2)
            os.close(console)
            os.close(silence)
    keras = sys.modules["keras"]
    if int(os.environ.get("KERAS_DISTRIBUTION_NUM_PROCESSES") or 1) > 1 and keras.backend.backend() == "jax":
        import jax

        if not jax.distributed.is_initialized():
            keras.distribution.initialize()
    return keras


def worker():
    """Which worker this process is, and of how many, when several train one model (see `distribute`): (0, 1) otherwise."""
    if import_keras().backend.backend() != "jax":
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def run_folder(folder):
    """The folder in which this process keeps its training run: `folder`, or a part of it for all but the first of several workers."""
    index, _ = worker()
    return Path(folder) / (f"worker{index}" if index else "")


def _segmentation_models():
    """Import segmentation_models for the Keras backend in use."""
    keras = import_keras()
    if keras.backend.backend() == "tensorflow":
        os.environ.setdefault("SM_FRAMEWORK", "tf.keras")
    else:  # names that Keras 3 moved and the package still asks for
        os.environ["SM_FRAMEWORK"] = "keras"
        keras.utils.generic_utils = keras.utils
        keras.backend.sigmoid = keras.ops.sigmoid
        keras.backend.int_shape = lambda x: tuple(x.shape)
    import segmentation_models

    return segmentation_models


def build_model(backbone=BACKBONE, keypoints=CHANNELS, sigma=SIGMA, head="softmax", decoder_filters=DECODER_FILTERS, size=FRAME_SIZE,
                stride=STRIDE):
    """Build the U-Net: (B, size, size, 3) frames of 0 to 255 -> (B, size/stride, size/stride, keypoints) heatmaps, untrained.

    Args:
        backbone: an encoder of segmentation_models, e.g. "efficientnetb0", "resnet18", "mobilenetv2".
        keypoints: number of output channels, the 8 corners first.
        sigma: standard deviation of the heatmaps' Gaussians in pixels at this size.
        head: "softmax" for `spatial_softmax`, "linear" for maps trained with a squared error.
        size: width and height in pixels, a multiple of 32; the weights do not depend on it.
        stride: 1 for maps of the frame's size, 2 to leave out the decoder's last and dearest stage (decoding is sub-pixel anyway).
    Returns:
        a keras.Model; its `settings` are these arguments.
    Raises:
        ValueError: an unknown backbone, head or stride, or a size that is not a multiple of 32.
    Source: Ronneberger et al., U-Net, MICCAI 2015; https://github.com/qubvel/segmentation_models.
    """
    keras = import_keras()

    sm = _segmentation_models()
    if backbone not in sm.get_available_backbone_names():
        raise ValueError(f"backbone: {backbone!r} is unknown; expected one of {', '.join(sm.get_available_backbone_names())}")
    if head not in ("softmax", "linear"):
        raise ValueError(f"head: expected 'softmax' or 'linear', got {head!r}")
    if size < 32 or size % 32 or stride not in (1, 2):
        raise ValueError(f"expected a size that is a multiple of 32 pixels and stride 1 or 2, got size {size} and stride {stride}")
    frames = keras.Input((size, size, 3), name="frames")
    unet = sm.Unet(backbone, input_shape=(size, size, 3), classes=keypoints, activation="linear", encoder_weights=None,
                   decoder_filters=tuple(decoder_filters))
    if stride == 2:
        features = unet.get_layer("decoder_stage3b_relu").output
        unet = keras.Model(unet.input, keras.layers.Conv2D(keypoints, 3, padding="same", name="maps")(features))
    maps = unet(keras.layers.Rescaling(1 / 127.5, -1.0)(frames))
    maps = spatial_softmax(maps, sigma / stride) if head == "softmax" else keras.ops.cast(maps, "float32")
    model = keras.Model(frames, maps, name="xwing")
    model.settings = dict(backbone=backbone, keypoints=keypoints, sigma=sigma, head=head, decoder_filters=list(decoder_filters), size=size,
                          stride=stride)
    return model


def save_model(model, path, **facts):
    """Write `NAME.weights.h5` and beside it `NAME.json` with the model's settings and any `facts`.

    Kernels are stored as float16, which halves the file; everything else stays float32. Both files are replaced at once or not at all.
    """
    import h5py

    path = _weights_path(path)
    settings = {key: value for key, value in model.settings.items() if key != "margin"}
    if settings["keypoints"] <= len(KEYPOINTS):
        settings["points"] = KEYPOINTS[: settings["keypoints"]].tolist()
    description = json.dumps({"model": settings, **facts}, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part-{os.getpid()}-{path.name}")
    slim = part.with_name(f"slim-{part.name}")
    try:
        model.save_weights(part)
        with h5py.File(part) as source, h5py.File(slim, "w") as target:
            _copy_slim(source, target)
        os.replace(slim, path)
    finally:
        part.unlink(missing_ok=True)
        slim.unlink(missing_ok=True)
    _write_atomically(path.with_name(_stem(path) + ".json"), description)


def _copy_slim(source, target):
    """Copy an HDF5 group, kernels (two dimensions or more) as compressed float16."""
    for key, value in source.attrs.items():
        target.attrs[key] = value
    for name, item in source.items():
        if name == "optimizer":  # Keras writes its state, twice the size of the weights, into the same file
            continue
        if hasattr(item, "items"):
            _copy_slim(item, target.create_group(name))
        elif item.ndim >= 2:
            target.create_dataset(name, data=item[()].astype(np.float16), compression="gzip", shuffle=True)
        else:
            target.create_dataset(name, data=item[()])


def _weights_path(path):
    path = Path(path)
    if not path.name.endswith(".weights.h5"):
        raise ValueError(f"{path}: expected a file name that ends in .weights.h5")
    return path


def _stem(path):
    return path.name.removesuffix(".weights.h5")


def _write_atomically(path, content):
    """Write text or bytes under a temporary name first, so that nothing half-written ever has the real one."""
    part = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.part")
    part.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(part, path)


def load_model(path, size=None, margin=0):
    """Rebuild a trained model from `NAME.weights.h5` and `NAME.json`; no pickles, no code in files.

    Args:
        path: the weights file.
        size: width and height in pixels of the frames to build for; None is the size it was trained at.
        margin: pixels of black border that the frames get before the network sees them, so that it can find keypoints outside the frame;
            twice the margin and the size must add up to a multiple of 32.
    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a foreign or damaged file, or weights for other model points than this module's `KEYPOINTS`.
    """
    path = _weights_path(path)
    settings_path = path.with_name(_stem(path) + ".json")
    for file in (path, settings_path):
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file; weights are two files, NAME.weights.h5 and NAME.json: "
                                    "run notebooks/train.ipynb, or restore weights/ with git checkout weights")
    info = _read_json(settings_path)
    try:
        settings = dict(info["model"])
        points = settings.pop("points", None)
        settings["size"] = (size or settings["size"]) + 2 * margin
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Keras names every layer that does not fit; one error is enough
            model = build_model(**settings)
            model.load_weights(path)
    except (KeyError, TypeError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not weights of this project's network ({str(error).splitlines()[0][:200]}); "
                         "restore weights/ with git checkout weights") from None
    if points is not None and not (np.shape(points) == KEYPOINTS[: len(points)].shape and np.allclose(points, KEYPOINTS[: len(points)])):
        raise ValueError(f"{path}: trained on {len(points)} model points that are not those of KEYPOINTS; train again")
    if margin:
        model.settings["margin"] = margin
    return model


def _on_cpu():
    """Whether the Keras backend computes on the CPU."""
    keras = import_keras()

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return not tf.config.list_physical_devices("GPU")
    if keras.backend.backend() == "torch":
        import torch

        return not torch.cuda.is_available()
    import jax

    return jax.default_backend() == "cpu"


def distribute(devices=None):
    """The scope (a context manager) in which a model is built and compiled to train on all local devices; `fit` needs nothing more.

    One batch is shared out, so the global batch stays what it is. With the TensorFlow backend this is `tf.distribute.MirroredStrategy`, with JAX
    `keras.distribution.DataParallel` (also over several machines, see `import_keras`); with one device, or PyTorch, nothing.

    Args:
        devices: names such as ["GPU:0", "GPU:1"]; None is every accelerator of this machine, with JAX every device of all workers.
    Raises:
        NotImplementedError: `TF_CONFIG` asks for several machines; Keras 3 cannot `fit` under MultiWorkerMirroredStrategy (keras issue 20585).
    """
    keras = import_keras()

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        if len(json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster", {}).get("worker", [])) > 1:
            raise NotImplementedError("TF_CONFIG names several workers, but Keras 3 cannot fit under MultiWorkerMirroredStrategy "
                                      "(https://github.com/keras-team/keras/issues/20585); unset it, or use KERAS_BACKEND=jax on several machines")
        devices = devices or [d.name for d in tf.config.list_logical_devices("GPU")]
        if len(devices) > 1:
            return tf.distribute.MirroredStrategy(devices).scope()
    elif backend == "jax":
        devices = devices or keras.distribution.list_devices()
        if len(devices) > 1:  # `make_dataset` gives every worker its part; Keras could divide a tf.data.Dataset only
            keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False))
    return contextlib.nullcontext()


def compile_model(model, learning_rate=1e-3, loss=None, run_eagerly=False):
    """Compile with Adam, a `HeatmapLoss` and `nmae_argmax`; XLA only on accelerators, as it slows the CPU's steps five times."""
    keras = import_keras()

    settings = model.settings
    loss = loss or HeatmapLoss(settings["sigma"], "softmax" if settings["head"] == "softmax" else "weighted", settings["stride"])
    nmae = functools.partial(nmae_argmax, stride=settings["stride"])
    nmae.__name__ = "nmae_argmax"
    jit = False if _on_cpu() or keras.backend.backend() == "torch" else "auto"
    model.compile(keras.optimizers.Adam(learning_rate, clipnorm=1.0), loss=loss, metrics=[nmae], jit_compile=jit, run_eagerly=run_eagerly)
    return model


def nmae_argmax(y_true, y_pred, stride=1):
    """Keras metric: mean absolute difference between the argmax positions, in units of the frame.

    Args:
        y_true: (B, H, W, K) heatmaps, or (B, K, 3) keypoints as `make_dataset` yields them, in pixels of the heatmaps times `stride`.
        y_pred: (B, H, W, C) heatmaps with C >= K channels; the first 8 channels count.
        stride: frame pixels for one heatmap pixel.
    Returns:
        a scalar: the mean over x, y and the corners in the frame of |difference| / size; off-frame corners (no peak above 0.5) are masked.
    Source: the normalised mean absolute error by which the exercise that this project grew from judges its heatmaps.
    """
    from keras import ops

    y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)[..., :8]
    height, width = y_pred.shape[1:3]
    size = ops.convert_to_tensor(np.array([width, height], np.float32))
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
    from keras import ops

    height, width, count = maps.shape[1:]
    flat = ops.argmax(ops.reshape(maps, (-1, height * width, count)), axis=1)
    return ops.cast(ops.stack([flat % width, flat // width], axis=-1), "float32")


def predict_heatmaps(model, images, batch_size=16, channels=8):
    """Heatmaps (N, H/stride, W/stride, channels) float32 of frames (N, H, W, 3) uint8; up to 9 MB a frame, so give short stacks.

    A model that was loaded with a margin gets the frames inside a black border, and its maps show the border too.
    Raises ValueError for a wrong shape or type, or another size than the model's.
    """
    images = np.asarray(images)
    margin = model.settings.get("margin", 0)
    size = model.settings["size"] - 2 * margin
    if images.ndim != 4 or images.shape[1:] != (size, size, 3) or images.dtype != np.uint8:
        raise ValueError(f"images: expected (N, {size}, {size}, 3) uint8, got {images.shape} {images.dtype}")
    maps = np.empty((len(images), *model.output_shape[1:3], channels), np.float32)
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        padded = np.zeros((batch_size, size + 2 * margin, size + 2 * margin, 3), np.uint8)  # always the same shape: one graph
        padded[: len(batch), margin : margin + size, margin : margin + size] = batch
        maps[start : start + len(batch)] = np.asarray(model.predict_on_batch(padded))[: len(batch), ..., :channels]
    return maps


def predict_keypoints(model, images, batch_size=16, progress=False, channels=8, covariance=False):
    """Find the eight corners in frames.

    Args:
        model: from `load_model` or `build_model`.
        images: (N, H, W, 3) uint8 RGB.
        progress: show a bar.
        channels: how many of the network's keypoints to return; 36 gives all of `KEYPOINTS`, the corners first.
        covariance: return the third array too.
    Returns:
        keypoints (N, channels, 2) float64 pixels, confidence (N, channels) float64 in [0, 1], and if asked for (N, channels, 2, 2) square pixels, see
        `heatmap_covariance`.
    Raises:
        ValueError: as `predict_heatmaps`.
    """
    keypoints, confidence = np.full((len(images), channels, 2), np.nan), np.zeros((len(images), channels))
    spread = np.full((len(images), channels, 2, 2), np.nan)
    sigma, stride = model.settings["sigma"], model.settings["stride"]
    for start in tqdm(range(0, len(images), batch_size), desc="corners", unit="batch", disable=not progress):
        part = slice(start, start + batch_size)
        maps = predict_heatmaps(model, images[part], batch_size, channels)
        keypoints[part], confidence[part] = decode_heatmaps(maps, sigma / stride)
        if covariance:
            spread[part] = heatmap_covariance(maps, keypoints[part], sigma / stride, 20 / stride)
    keypoints = keypoints * stride - model.settings.get("margin", 0)
    return (keypoints, confidence, spread * stride**2) if covariance else (keypoints, confidence)


# ============================================================ training


def setting(name, default):
    """A notebook constant that the environment variable XWING_<name> overrides, read as the default's type."""
    value = os.environ.get(f"XWING_{name}", "")
    if not value:
        return default
    try:
        return type(default)(value) if default is not None else value
    except ValueError:
        raise ValueError(f"XWING_{name}: expected a {type(default).__name__}, got {value!r}") from None


def training_callbacks(folder, model, validation_images, validation_keypoints, scale=1.0, plateau=True, facts=None):
    """The callbacks of a training run that writes to `folder`.

    Resume after an interruption, the corner report, the best weights by median corner error, a lower learning rate on a plateau and a CSV log.

    Args:
        validation_images: (N, size, size, 3) uint8; validation_keypoints: (N, K, 3) as `make_dataset` yields them.
        scale: pixels of the original frames for one pixel of these; the reported errors are multiplied by it.
        plateau: lower the learning rate when the validation error stands still; leave it out when the rate follows a schedule.
        facts: dict that is kept beside the best weights: how they were trained.
    """
    keras = import_keras()

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    class CornerReport(keras.callbacks.Callback):
        """Adds the corner errors of the validation frames to the logs, split into finding and naming; saves the best weights."""

        def __init__(self):
            super().__init__()
            log = folder / "log.csv"
            rows = list(csv.DictReader(log.open())) if log.exists() else []
            self.best = min((float(r["val_corner_px"]) for r in rows), default=np.inf)
            self.trimmed = False

        def on_epoch_begin(self, epoch, logs=None):
            if not self.trimmed and (folder / "log.csv").exists():  # a run that was killed between log and backup repeats that epoch
                header, *rows = (folder / "log.csv").read_text().splitlines(keepends=True) or [""]
                kept = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) < epoch]
                with (folder / "log.csv").open("r+") as file:  # in place: the logger has it open
                    file.write(header + "".join(kept))
                    file.truncate()
            self.trimmed = True

        def on_epoch_end(self, epoch, logs=None):
            with _alone(self.model) as model:
                found, _ = predict_keypoints(model, validation_images)
            report = corner_report(found, validation_keypoints[:, :8, :2], self.model.settings["size"], scale)
            names = report.pop("namings")
            logs.update({f"val_{k}": v for k, v in report.items()}, **{f"val_named_{k}": v for k, v in names.items()})
            logs["learning_rate"] = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
            if report["corner_px"] < self.best:
                self.best = report["corner_px"]
                save_model(self.model, folder / "best.weights.h5", training={**(facts or {}), "best_epoch": epoch + 1},
                           validation={**report, "namings": names})

    class Plateau(keras.callbacks.ReduceLROnPlateau):
        """Goes on counting the epochs without progress where an interrupted run stopped."""

        def on_epoch_begin(self, epoch, logs=None):
            if self.best is None and (folder / "log.csv").exists():
                with (folder / "log.csv").open() as file:
                    for row in csv.DictReader(file):
                        error = float(row["val_corner_px"])
                        better = self.best is None or error < self.best - self.min_delta
                        self.best, self.wait = (error, 0) if better else (self.best, (self.wait + 1) % self.patience)

    return [CornerReport(),
            *([Plateau("val_corner_px", mode="min", factor=0.3, patience=2, min_lr=1e-5, verbose=1)] if plateau else []),
            keras.callbacks.CSVLogger(str(folder / "log.csv"), append=True),
            keras.callbacks.BackupAndRestore(str(folder / "backup"), double_checkpoint=True, delete_checkpoint=False)]


@contextlib.contextmanager
def _alone(model):
    """The model; where several workers share it, a copy that this one computes with alone, as Keras cannot fetch what the others hold."""
    if worker()[1] == 1:
        yield model
        return
    keras = import_keras()

    shared = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        copy = keras.Model.from_config(model.get_config())
        copy.set_weights(model.get_weights())
        copy.settings = model.settings
        yield copy
    finally:
        keras.distribution.set_distribution(shared)


def ship_weights(run, folder):
    """Copy a run's best weights to `folder` as `xwing.weights.h5`, with `xwing.json` and `xwing_log.csv`.

    A run that began from another run's weights brings that run's log and facts along, so that the log shows the whole training. A network
    trained on squares cut from the frames is shipped for whole frames: it is fully convolutional.
    """
    run, folder = Path(run), Path(folder)
    stages, rows = _history(run)
    info = _read_json(run / "best.json")
    if stages[-1].get("crop"):
        info["model"]["size"] = FRAME_SIZE
    info["training"] = {"samples_seen": rows[-1]["samples_seen"], "stages": stages}
    folder.mkdir(parents=True, exist_ok=True)
    _write_atomically(folder / "xwing.weights.h5", (run / "best.weights.h5").read_bytes())
    _write_atomically(folder / "xwing.json", json.dumps(info, indent=1) + "\n")
    fields = list(dict.fromkeys(key for row in rows for key in row))
    lines = [",".join(fields)] + [",".join(str(row.get(field, "")) for field in fields) for row in rows]
    _write_atomically(folder / "xwing_log.csv", "\n".join(lines) + "\n")


def _history(folder):
    """The stages of training that led to a run, or to shipped weights: a list of their facts, and the rows of their logs, the first ones first."""
    if (folder / "xwing_log.csv").exists():
        with (folder / "xwing_log.csv").open() as file:
            rows = [{**row, "samples_seen": int(row["samples_seen"])} for row in csv.DictReader(file)]
        return list(_read_json(folder / "xwing.json")["training"]["stages"]), rows
    missing = [name for name in ("best.weights.h5", "best.json", "log.csv") if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"{folder}: {', '.join(missing)} missing; finish at least one epoch of notebooks/train.ipynb first")
    facts = _read_json(folder / "best.json").get("training", {})
    earlier = (Path(__file__).parent / facts["init"]).parent if facts.get("init") else None
    known = earlier is not None and ((earlier / "log.csv").exists() or (earlier / "xwing_log.csv").exists())
    stages, rows = _history(earlier) if known else ([], [])
    samples = rows[-1]["samples_seen"] if rows else 0
    with (folder / "log.csv").open() as file:
        for row in csv.DictReader(file):
            samples += facts.get("steps", 0) * facts.get("batch", 0)
            rows.append({"stage": len(stages) + 1, "samples_seen": samples, **row})
    return [*stages, facts], rows


def corner_report(estimate, truth, size=FRAME_SIZE, scale=1.0):
    """Split corner errors into finding and naming.

    Args:
        estimate, truth: (N, 8, 2) pixels.
        size: width and height of the frame in pixels; only corners inside it count.
        scale: the distances are multiplied by it.
    Returns:
        dict: corner_px (median distance to the true corner), nearest_px (median distance to the nearest true corner), renamed_px (median
        distance under each frame's best naming), within_2px, within_5px (shares), namings (frames per best naming).
    Source: the shares are the PCK of Andriluka et al., 2D Human Pose Estimation, CVPR 2014, with limits in pixels; the split follows
        Ronchi and Perona, Benchmarking and Error Diagnosis in Multi-Instance Pose Estimation, ICCV 2017 (their inversions are wrong names).
    """
    inside = in_frame(truth, size, size)
    errors = {name: e if name == "naming" else e * scale for name, e in _naming_errors(estimate, truth, size).items()}
    return {
        "corner_px": float(np.median(errors["corner"][inside])),
        "nearest_px": float(np.median(errors["nearest"][inside])),
        "renamed_px": float(np.median(errors["renamed"][inside])),
        "within_2px": float((errors["corner"][inside] <= 2).mean()),
        "within_5px": float((errors["corner"][inside] <= 5).mean()),
        "namings": {name: int((errors["naming"] == i).sum()) for i, name in enumerate(NAMINGS)},
    }


def _naming_errors(estimate, truth, size):
    """(N, 8) distances to the own corner, to the nearest one, and to the own one under each frame's best naming; (N,) that naming, or -1."""
    inside = in_frame(truth, size, size)
    distance = np.linalg.norm(np.nan_to_num(estimate, nan=_FAR)[:, :, None] - truth[:, None], axis=-1)  # (N, estimate, truth)
    named = np.stack([distance[:, p, np.arange(8)] for p in NAMINGS.values()], 1)  # (N, namings, 8)
    cost = (np.minimum(named, 60 * size / FRAME_SIZE) * inside[:, None]).sum(-1)
    best = cost.argmin(1)
    renamed, naming = named[np.arange(len(named)), best], np.where(inside.any(1), best, -1)
    return {"corner": named[:, 0], "nearest": distance.min(1), "renamed": renamed, "naming": naming}


# ============================================================ pose

MIN_CONFIDENCE = 0.2  # points below it are not used for a pose
MAX_DEVIATIONS = 3.0  # a point further from its projection than so many of its standard deviations does not agree with a pose
MIN_AGREEING = 0.7  # share of the points in use that must agree with a pose
CAUCHY = 1.5  # standard deviations at which the robust cost begins to forgive
MIN_MARGIN = 1.0  # a second pose must fit worse by at least that much, in units of log-likelihood
PRIOR = 6.0  # what a turn against the expected pose costs at most, in units of log-likelihood
MAX_MISFIT = 1.25  # largest root of chi square per degree of freedom of the agreeing points
HALF_ROLL = np.diag([-1.0, 1.0, -1.0, 1.0])  # (4, 4) half a turn about the ship's long axis


@dataclasses.dataclass(frozen=True)
class PoseEstimate:
    """What `estimate_pose` knows about one frame."""

    pose: np.ndarray | None  # (4, 4) model -> OpenCV camera; None where not even four points were found
    covariance: np.ndarray | None = None  # (6, 6): rotation vector in camera axes (radians), then translation (model units)
    accepted: bool = False
    reason: str = ""  # why it was not accepted
    reprojection: float = np.inf  # pixels, root mean square over the agreeing points, before `settle`; NaN where the pixels chose another pose
    misfit: float = np.inf  # root of chi square per degree of freedom: 1 where errors are as large as expected
    agreeing: np.ndarray | None = None  # (K,) bool, the points that the pose rests on
    second: np.ndarray | None = None  # (4, 4) the best pose that is turned by more than 30 degrees against this one
    second_covariance: np.ndarray | None = None  # (6, 6)
    margin: float = np.inf  # how much worse the second fits (all points; once settled, pixels too): difference of costs in units of log-likelihood
    explained: float = np.nan  # share of the frame's contrast that the ship explains at this pose, once `Aligner.settle` has looked at the pixels

    @property
    def rotation_deviation(self):
        """Expected rotation error in degrees: the root of the covariance's rotational trace."""
        return np.inf if self.covariance is None else float(np.degrees(np.sqrt(np.trace(self.covariance[:3, :3]))))


def solve_pose(keypoints, K, confidence=None, points=BOUNDING_BOX):
    """The accepted pose of `estimate_pose`, (4, 4) model -> OpenCV camera, or None where no pose can be trusted. Same arguments, same errors."""
    estimate = estimate_pose(keypoints, K, confidence, None, points)
    return estimate.pose if estimate.accepted else None


def estimate_pose(keypoints, K, confidence=None, deviation=None, points=BOUNDING_BOX, prior=None):
    """Estimate the pose of the ship from its keypoints, and how far to trust it.

    SQPnP and, from 6 points on, RANSAC propose poses from the hull's points and from all; each is also turned by half a roll and mirrored in
    depth, the two ways in which a flat ship is mistaken for itself. The proposals compete by a robust cost (Cauchy) over all points, each
    weighted by its own uncertainty; the best are refined, and the winner is refined again by least squares on the points that agree with it.

    Args:
        keypoints: (K, 2) pixels; NaN rows are not used.
        K: (3, 3) camera matrix, pixels.
        confidence: (K,) in [0, 1] or None; points below MIN_CONFIDENCE are not used.
        deviation: (K,) pixels, standard deviation of each point along x and y, see `point_deviation`; points where it is not finite are not used.
            None is 1 pixel of a 256 px frame for all.
        points: (K, 3) model points of the keypoints; the 8 corners, or all of `KEYPOINTS`, whose rows from the 9th on are the hull's.
        prior: (4, 4) or None, where the ship should be, from the frames before. It settles which of several poses is meant (one turned against
            it by 30 degrees or more costs up to PRIOR), and has no say in the refinement.
    Returns:
        PoseEstimate. It is accepted unless there are fewer than 4 points, or fewer than 4 or MIN_AGREEING of them agree, or they fit worse
        than MAX_MISFIT, or a second pose comes within MIN_MARGIN.
    Raises:
        ValueError: a wrong shape, a deviation that is not positive, or a K that is no finite camera matrix.
    Source: Terzakis and Lourakis, A Consistently Fast and Globally Optimal Solution to the Perspective-n-Point Problem, ECCV 2020
        (cv2.SOLVEPNP_SQPNP); Fischler and Bolles, RANSAC, CACM 24(6), 1981 (cv2.solvePnPRansac); Schweighofer and Pinz, Robust Pose Estimation
        from a Planar Target, TPAMI 28(12), 2006 (two solutions); Hartley and Zisserman, Multiple View Geometry, 2004, section 5.2 (covariance).
    """
    points = _check_array(points, (None, 3), "points")
    keypoints = _check_array(keypoints, (len(points), 2), "keypoints")
    K = _check_camera_matrix(K)
    weight = np.ones(len(points)) if confidence is None else _check_array(confidence, (len(points),), "confidence")
    pixel = 2 * max(K[0, 2], K[1, 2]) / FRAME_SIZE  # one pixel of a 256 px frame, where the principal point is in the middle
    deviation = np.full(len(points), pixel) if deviation is None else _check_array(deviation, (len(points),), "deviation")
    usable = np.isfinite(keypoints).all(1) & np.isfinite(deviation) & (weight >= MIN_CONFIDENCE)
    if (deviation[usable] <= 0).any():
        raise ValueError(f"deviation: expected positive numbers of pixels, got {deviation[usable].min()}")
    if usable.sum() < 4:
        return PoseEstimate(None, reason=f"{usable.sum()} points are found, 4 are needed")
    problem = _Problem(points[usable], keypoints[usable], deviation[usable], K, prior)
    hull = np.flatnonzero(usable) >= 8
    proposals = problem.propose(hull) if hull.sum() >= 6 else []
    proposals += problem.propose(np.ones_like(hull)) if hull.sum() < 6 or not hull.all() else []
    ranked = sorted(((problem.cost(pose), i, pose) for i, pose in enumerate(proposals)), key=lambda p: p[:2])
    refined = []
    for _, _, pose in _distinct(ranked, 10)[:3]:
        pose = problem.refine(pose, robust=True)
        if pose is not None:
            refined.append((problem.cost(pose), len(refined), pose))
    if not refined:
        return PoseEstimate(None, reason="no pose puts the points in front of the camera")
    rivals = sorted(refined + [(cost, len(refined) + i, pose) for cost, i, pose in ranked], key=lambda p: p[:2])
    return problem.judge(_distinct(rivals, 30), usable)


def _check_camera_matrix(K):
    K = _check_array(K, (3, 3), "K")
    if not np.isfinite(K).all() or K[0, 0] <= 0 or K[1, 1] <= 0 or not np.allclose(K[[1, 2, 2, 2], [0, 0, 1, 2]], [0, 0, 0, 1]):
        raise ValueError(f"K: expected a finite camera matrix [[fx, s, cx], [0, fy, cy], [0, 0, 1]] with positive focal lengths, got\n{K}")
    return K


def _distinct(ranked, degrees):
    """Of (cost, index, pose), best first, those that are turned by more than an angle against every better one."""
    kept = []
    for item in ranked:
        if all(rotation_error(item[2], better[2]) > degrees for better in kept):
            kept.append(item)
    return kept


class _Problem:
    """One frame's points: proposes, scores, refines and judges poses."""

    def __init__(self, points, keypoints, deviation, K, prior=None):
        self.points, self.keypoints, self.deviation, self.K, self.prior = points, keypoints, deviation, K, prior

    def propose(self, chosen):
        """Poses from a subset (bool) of the points, and what they may be mistaken for."""
        points, keypoints = self.points[chosen], self.keypoints[chosen]
        limit = MAX_DEVIATIONS * float(np.median(self.deviation[chosen]))
        wild = self.prior if self.prior is not None else ransac(points, keypoints, self.K, limit)  # the prior is as blind to wild points, and quicker
        solved = [p for p in (sqpnp(points, keypoints, self.K), wild) if p is not None]
        return [other for pose in solved for other in _mistakable(pose)[:3]]

    def distances(self, pose):
        """(K,) reprojection errors in standard deviations."""
        return reprojection_errors(pose, self.keypoints, self.K, self.points) / self.deviation

    def cost(self, pose):
        """Negative log-likelihood of the points under Cauchy errors, but for a constant; more for a pose that is turned against the prior."""
        turned = 0.0 if self.prior is None else PRIOR * min(rotation_error(pose, self.prior) / 30, 1.0) ** 2
        return float(np.log1p(np.minimum(self.distances(pose), 1e6) ** 2 / CAUCHY**2).sum() * CAUCHY**2 / 2) + turned

    def refine(self, pose, robust=False, chosen=slice(None)):
        """The nearest pose with the least cost (`robust`) or the least sum of squares, by Levenberg-Marquardt; None if it lies behind the camera."""
        keypoints, deviation = self.keypoints[chosen], self.deviation[chosen, None]
        scale = CAUCHY**2 if robust else np.inf

        def linearise(pose):  # the cost, and the step's normal equations; a step turns the pose in camera axes, and moves it
            seen, jacobian = cv2.projectPoints(self.points[chosen] @ pose[:3, :3].T, np.zeros(3), pose[:3, 3], self.K, None)
            residual = (seen[:, 0] - keypoints) / deviation
            squared = (residual**2).sum(1)
            weight = np.repeat(1 / (1 + squared / scale), 2)
            jacobian = jacobian[:, :6] / np.repeat(deviation, 2, axis=0)
            cost = np.log1p(squared / scale).sum() * scale if robust else squared.sum()
            return cost, (jacobian.T * weight) @ jacobian, (jacobian.T * weight) @ residual.ravel()

        cost, information, gradient = linearise(pose)
        if not np.isfinite(cost):
            return None
        damping = 1e-3
        for _ in range(10 if robust else 30):
            try:
                step = -np.linalg.solve(information + damping * np.diag(np.diag(information)), gradient)
            except np.linalg.LinAlgError:
                break
            moved = _moved(pose, step)
            new = linearise(moved)
            if new[0] < cost:  # false for NaN
                done = cost - new[0] < 1e-5 * cost
                pose, (cost, information, gradient), damping = moved, new, damping / 10
                if done:
                    break
            elif damping > 1e6:
                break
            else:
                damping *= 10
        return _pose_ahead(self.points, cv2.Rodrigues(pose[:3, :3])[0], pose[:3, 3])

    def covariance(self, pose, chosen):
        """(6, 6) of the turn in camera axes and the translation, from the chosen points; None where they do not fix the pose."""
        turned = self.points[chosen] @ pose[:3, :3].T
        jacobian = cv2.projectPoints(turned, np.zeros(3), pose[:3, 3], self.K, None)[1][:, :6] / np.repeat(self.deviation[chosen], 2)[:, None]
        information = jacobian.T @ jacobian
        return np.linalg.inv(information) if np.linalg.cond(information) < 1e12 else None

    def judge(self, rivals, usable):
        """The `PoseEstimate` of the best of the (cost, index, pose), best first; the second best tells how clear that is."""
        (cost, _, pose), *others = rivals
        agreeing = self.distances(pose) < MAX_DEVIATIONS
        final = self.refine(pose, chosen=agreeing) if agreeing.sum() >= 4 else None
        pose = pose if final is None else final
        distances = self.distances(pose)
        agreeing &= distances < MAX_DEVIATIONS
        count = int(agreeing.sum())
        covariance = self.covariance(pose, agreeing) if count >= 4 else None
        misfit = float(np.sqrt((distances[agreeing] ** 2).sum() / max(2 * count - 6, 1))) if count >= 4 else np.inf
        margin = others[0][0] - cost if others else np.inf
        where = np.zeros(len(usable), bool)
        where[np.flatnonzero(usable)[agreeing]] = True
        if covariance is None:
            reason = f"only {count} of {len(distances)} points agree with one pose"
        elif count < MIN_AGREEING * len(distances):
            reason = f"{count} of {len(distances)} points agree with the pose"
        elif misfit > MAX_MISFIT:
            reason = f"the points fit {misfit:.1f} times worse than expected"
        elif margin < MIN_MARGIN:
            reason = "a pose turned by more than 30 degrees fits nearly as well"
        else:
            reason = ""
        errors = (distances * self.deviation)[agreeing]
        second = others[0][2] if others else None
        also = np.zeros(0, bool) if second is None else self.distances(second) < MAX_DEVIATIONS
        return PoseEstimate(pose, covariance, not reason, reason, float(np.sqrt((errors**2).mean())) if count else np.inf, misfit, where,
                            second, self.covariance(second, also) if also.sum() >= 4 else None, margin)


def _moved(pose, step):
    """The pose after a step (6,): a turn in camera axes (rotation vector, radians), and a shift."""
    moved = pose.copy()
    moved[:3, :3], moved[:3, 3] = cv2.Rodrigues(step[:3])[0] @ pose[:3, :3], pose[:3, 3] + step[3:]
    return moved


def _step_between(pose, start):
    """The step (6,) that leads from `start` to `pose`, see `_moved`."""
    return np.concatenate([cv2.Rodrigues(pose[:3, :3] @ start[:3, :3].T)[0].ravel(), pose[:3, 3] - start[:3, 3]])


def _mirrored_in_depth(pose):
    """The pose that looks nearly the same from afar: for a ship flat along its z axis, every depth about its centre changes sign."""
    view = pose[:3, 3] / np.linalg.norm(pose[:3, 3])
    other = pose.copy()
    other[:3, :3] = (np.eye(3) - 2 * np.outer(view, view)) @ pose[:3, :3] @ np.diag([1.0, 1.0, -1.0])
    return other


def _mistakable(pose):
    """The poses that a flat ship's pose is easily taken for: itself, half a roll, its mirror image in depth, and both."""
    return [pose, pose @ HALF_ROLL, _mirrored_in_depth(pose), _mirrored_in_depth(pose @ HALF_ROLL)]


def sqpnp(points, keypoints, K):
    """(4, 4) pose of (N, 3) points seen at (N, 2) pixels, N >= 3, by SQPnP (Terzakis and Lourakis, ECCV 2020).

    None where it fails or puts a point behind the camera.
    """
    try:
        found, rotation, translation = cv2.solvePnP(points, keypoints, K, None, flags=cv2.SOLVEPNP_SQPNP)
    except cv2.error:
        return None
    return _pose_ahead(points, rotation, translation) if found else None


def _pose_ahead(points, rotation, translation):
    """(4, 4) pose of OpenCV's vectors, or None if it is not finite or puts a point behind the camera."""
    pose = _pose_from_vectors(rotation, translation)
    return pose if np.isfinite(pose).all() and (points @ pose[2, :3] + pose[2, 3] > 0).all() else None


def ransac(points, keypoints, K, limit):
    """(4, 4) pose with which the most of (N, 3) points seen at (N, 2) pixels agree within `limit` pixels (Fischler and Bolles, CACM 24(6), 1981).

    None for fewer than 6 points, or where none is found.
    """
    if len(points) < 6:
        return None
    try:
        found, rotation, translation, _ = cv2.solvePnPRansac(points, keypoints, K, None, iterationsCount=300, reprojectionError=limit,
                                                             confidence=0.9999, flags=cv2.SOLVEPNP_SQPNP)
    except cv2.error:
        return None
    return _pose_ahead(points, rotation, translation) if found else None


def _pose_from_vectors(rotation, translation):
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = cv2.Rodrigues(rotation)[0], np.ravel(translation)
    return pose


def solve_frame(keypoints, K, confidence=None, deviation=None):
    """The accepted pose of `estimate_frame`, (4, 4), or None."""
    estimate = estimate_frame(keypoints, K, confidence, deviation)
    return estimate.pose if estimate.accepted else None


def estimate_frame(keypoints, K, confidence=None, deviation=None, prior=None):
    """`estimate_pose` from all that the network found: the first C of `KEYPOINTS`, keypoints (C, 2), confidence and deviation (C,).

    Where six or more points of the hull are found, the corners do not count: they float in empty space and are found three times less precisely.
    """
    keypoints = np.asarray(keypoints)
    confidence = np.ones(len(keypoints)) if confidence is None else np.array(confidence, float)
    if (confidence[8:] >= MIN_CONFIDENCE).sum() >= 6:
        hull = np.where(np.arange(len(keypoints)) < 8, 0.0, confidence)
        estimate = estimate_pose(keypoints, K, hull, deviation, KEYPOINTS[: len(keypoints)], prior)
        if estimate.accepted:
            return estimate
    return estimate_pose(keypoints, K, confidence, deviation, KEYPOINTS[: len(keypoints)], prior)


def detect_frames(model, paths, batch_size=16, progress=True):
    """Find all keypoints in every frame of a clip; memory does not grow with the network's maps.

    Args:
        model: from `load_model`.
        paths: frames in order. Those that cannot be read have no keypoints and are named in one warning, and the clip goes on.
    Returns:
        keypoints (N, C, 2) pixels, NaN where none; confidence (N, C); covariance (N, C, 2, 2) square pixels, see `heatmap_covariance`.
    """
    size, count = model.settings["size"] - 2 * model.settings.get("margin", 0), model.settings["keypoints"]
    keypoints, confidence = np.full((len(paths), count, 2), np.nan), np.zeros((len(paths), count))
    covariance = np.full((len(paths), count, 2, 2), np.nan)
    faults = []
    for start in tqdm(range(0, len(paths), batch_size), desc="tracking", unit="batch", disable=not progress):
        frames = {i: _read_or_none(paths[i], size, faults) for i in range(start, min(start + batch_size, len(paths)))}
        good = [i for i, frame in frames.items() if frame is not None]
        if good:
            images = np.stack([frames[i] for i in good])
            keypoints[good], confidence[good], covariance[good] = predict_keypoints(model, images, batch_size, channels=count, covariance=True)
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        warnings.warn(f"no pose for {len(faults)} of {len(paths)} frames: {'; '.join(faults[:3])}{more}", stacklevel=2)
    return keypoints, confidence, covariance


def track_frames(model, paths, K, batch_size=16, progress=True, aligner=None):
    """Find corners and pose in every frame of a clip, each on its own: `detect_frames`, `estimate_frame`, and with an aligner `Aligner.settle`.

    Args:
        model, paths: see `detect_frames`.
        K: (3, 3) camera matrix of the frames.
        aligner: `Aligner`, or None for poses from the keypoints alone.
    Returns:
        keypoints (N, 8, 2), confidence (N, 8), poses: list of N (4, 4) arrays or None.
    """
    K = _check_camera_matrix(K)
    keypoints, confidence, covariance = detect_frames(model, paths, batch_size, progress)
    estimates = [estimate_frame(*frame) for frame in zip(keypoints, [K] * len(paths), confidence, point_deviation(covariance))]
    if aligner is not None:  # what could not be read has no pose to be aligned
        frames = (None if e.pose is None else read_image(path) for path, e in zip(paths, estimates))
        estimates = settle_frames(aligner, frames, estimates, K, progress)
    return keypoints[:, :8], confidence[:, :8], [e.pose if e.accepted else None for e in estimates]


def _read_or_none(path, size, faults):
    try:
        return read_image(path, (size, size))
    except (ValueError, FileNotFoundError) as error:
        faults.append(str(error))
        return None


# ============================================================ pose from pixels

NOISE = 4.0  # grey levels: no pixel is trusted further than that
WORKING_SIZE = 110  # pixels: a ship that spans more is aligned on a smaller picture
INDEPENDENT = 0.06  # share of the pixels whose errors count as independent of each other
CLEAR = 8.0  # margin from which a pose is compared only with what it may be mistaken for, in units of log-likelihood; keypoints say no more than that
SETTLED = 20.0  # margin from which the pixels' choice needs no second witness
MIN_EXPLAINED = 0.42  # share of a frame's contrast that a rendering must explain, 0 to 1
FAINT = 30.0  # contrast, in units of log-likelihood, below which there is nothing to explain
WELL_EXPLAINED = 0.57  # share from which there is no wider search
TILTS, ROLLS = (-60, -30, 0, 30, 60), range(0, 360, 30)  # degrees: of the nose towards and away from the camera, and about it, in the widest search
ROUNDS = 8, 25  # steps on the coarse and on the fine level, at most
NEGLIGIBLE = 0.05  # gain in log-likelihood that is not worth another step
SUPERSAMPLING = 3  # per pixel and direction


class Aligner:
    """Refines poses on the pixels themselves: the mesh is rendered, and its pose moved until rendering and frame agree.

        align = Aligner(load_mesh("data/xwing.obj"))
        pose, covariance = align(image, pose, K)

    Neither paint nor light need be known: each step solves for one colour per material, and a light that varies smoothly with a
    surface's direction. What the ship does not cover is taken from the pixels around it. Pixels that cannot be explained (shadows, stars) lose their
    weight. A coarse picture first brings the pose near, then a finer one makes it exact: errors of several pixels are mended, but the pose must be
    known roughly (see `estimate_frame`).

    Source: Lucas and Kanade, IJCAI 1981, and Baker and Matthews, IJCV 56(3), 2004 (Gauss-Newton on brightness); Ramamoorthi and Hanrahan, SIGGRAPH
        2001 (nine spherical harmonics hold diffuse light); Golub and Pereyra, SIAM J. Numer. Anal. 10(2), 1973 (colours and light are eliminated).
    """

    def __init__(self, mesh):
        """mesh: from `load_mesh`."""
        triangles, counts = mesh_triangles(mesh), [len(faces) for _, faces, _ in mesh.values()]
        normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
        area = np.linalg.norm(normals, axis=1)
        solid = area > 1e-12
        self.triangles, self.normals = triangles[solid], normals[solid] / area[solid, None]
        self.middles, self.coarse = self.triangles.mean(1), _largest(self.triangles, 0.9)
        self.material = np.eye(len(mesh))[np.repeat(np.arange(len(mesh)), counts)[solid]]  # (T, M), one 1 a row
        self.albedo = np.repeat([colour.mean() for *_, colour in mesh.values()], counts)[solid, None]
        self.stiffness = np.diag(np.concatenate([np.full(len(mesh), 0.1), np.ones(8)]))  # pulls colours and light a little towards 0

    def __call__(self, image, pose, K, covariance=None):
        """Refine a pose.

        Args:
            image: (H, W, 3) uint8.
            pose: (4, 4) model -> OpenCV camera, off by a few pixels at most.
            K: (3, 3).
            covariance: (6, 6) of that pose, as in `PoseEstimate`, or None. With it, what the pixels leave open stays as it was.
        Returns:
            pose (4, 4) and covariance (6, 6), or None where too little of the ship is in the frame or the pose runs away.
        """
        K, prior = np.asarray(K, float), None if covariance is None else (pose, np.linalg.inv(covariance) / 4)
        rough = self._descend(image, pose, K, 2 * self._shrink(pose, K), True, prior)
        pose = pose if rough is None else rough[0]  # a small ship is seen on the fine level only
        fine = self._descend(image, pose, K, self._shrink(pose, K), False, prior)
        return None if fine is None else (fine[0], np.linalg.inv(fine[1]))

    def picture(self, image, pose, K):
        """The part of a frame about the ship and what the pose explains of it: two pictures (h, w, 3) uint8, or None where the ship is outside."""
        view = _View(image, K, project_pose(self.middles, pose, K), self._shrink(pose, K))
        if view.image is None:
            return None
        return tuple(part.clip(0, 255).astype(np.uint8) for part in (view.image, self._paint(view, self._render(pose, view))[0]))

    def settle(self, image, estimate, K):
        """The estimate of a frame, refined and judged anew on the pixels: a `PoseEstimate`.

        Where the keypoints leave a doubt, or the refined pose explains the frame badly, other poses are tried too, on the coarse level: the
        estimate's second, what both may be mistaken for, and turns of the best ones. What the best of all may be mistaken for is always looked at.
        Pixels and keypoints together decide. Accepted if at least MIN_EXPLAINED of what is seen is explained (half of that where the keypoints alone
        clearly gave the same pose, or all others are worse by SETTLED), and no pose turned by more than 30 degrees comes within MIN_MARGIN.

        image is (H, W, 3) uint8 and K (3, 3). An estimate without a pose comes back as it is; `misfit` and `agreeing` stay those of the keypoints.
        """
        if estimate.pose is None:
            return estimate
        K = np.asarray(K, float)

        def price(pose):  # what the keypoints say against a pose, in units of log-likelihood
            return 0.0 if rotation_error(pose, estimate.pose) < 30 else min(max(estimate.margin, 0.0), CLEAR)

        first = self(image, estimate.pose, K, estimate.covariance)
        found = [] if first is None else [first]
        sure = found and estimate.accepted and estimate.margin >= CLEAR
        ranked, explained = self._rank(image, found, K, price) if sure else ([], 0.0)
        if explained < WELL_EXPLAINED:
            found += self._search(image, estimate, K, price)
            if not found:
                return dataclasses.replace(estimate, accepted=False, reason=estimate.reason or "too little of the ship is in sight")
            ranked, explained = self._rank(image, found, K, price)
        if explained < WELL_EXPLAINED:
            found += self._all_round(image, ranked[0][2], K, price)
            ranked, _ = self._rank(image, found, K, price)
        found += self._mistaken(image, ranked[0][2], K, price)
        ranked, explained = self._rank(image, found, K, price)
        (cost, index, pose), *others = _distinct(ranked, 30)
        margin = others[0][0] - cost if others else estimate.margin
        same = rotation_error(pose, estimate.pose) < 30
        agreed = same and estimate.accepted and estimate.margin >= START  # two witnesses need less each
        if explained < (MIN_EXPLAINED / 2 if agreed or margin >= SETTLED else MIN_EXPLAINED):
            reason = f"the pose explains only {explained:.0%} of what is seen"
        elif margin < MIN_MARGIN:
            reason = "a pose turned by more than 30 degrees fits nearly as well"
        else:
            reason = ""
        second = found[others[0][1]] if others else (estimate.second, estimate.second_covariance)
        return dataclasses.replace(estimate, pose=pose, covariance=found[index][1], accepted=not reason, reason=reason, margin=margin,
                                   explained=explained, second=second[0], second_covariance=second[1],
                                   reprojection=estimate.reprojection if same else np.nan)

    def _search(self, image, estimate, K, price):
        """Refined poses that the frame may show besides the estimate's: a list of (pose, covariance)."""
        shrink = 2 * self._shrink(estimate.pose, K)
        starts = [pose for pose in (estimate.pose, estimate.second) if pose is not None]
        found, turned = self._refined(image, [other for pose in starts for other in _mistakable(pose)], K, shrink, True), []
        for _ in range(2 if found else 0):
            best = [pose for *_, pose in _distinct(self._rank(image, found, K, price, shrink)[0], 30)[:2]]
            fresh = [pose for pose in best if all(rotation_error(pose, other) > 3 for other in turned)]
            turned += fresh
            steps = np.radians(12) * np.concatenate([np.eye(3), -np.eye(3)])
            found += self._refined(image, [_moved(pose, np.append(step, np.zeros(3))) for pose in fresh for step in steps], K, shrink, True)
        return self._finished(image, found, K, price, shrink, 3, 4)

    def _all_round(self, image, best, K, price):
        """Refined poses of a ship that lies where the best pose has it, along the same line in the picture, tilted and rolled all round."""
        shrink, centre = 2 * self._shrink(best, K), best[:3, :3] @ BOUNDING_BOX.mean(0) + best[:3, 3]
        ray, axis = centre / np.linalg.norm(centre), best[:3, 1]
        flat = axis - (axis @ ray) * ray
        length = max(np.linalg.norm(flat), 1e-6)
        poses = []
        for tilt in np.radians(TILTS):
            turn = Rotation.align_vectors(np.cos(tilt) * flat / length + np.sin(tilt) * ray, axis)[0].as_matrix() @ best[:3, :3]
            nearer = np.clip(np.cos(tilt) / length, 0.6, 1.6)  # as long as before in the picture
            for roll in ROLLS:
                pose = np.eye(4)
                pose[:3, :3] = turn @ Rotation.from_euler("y", roll, degrees=True).as_matrix()
                pose[:3, 3] = centre * nearer - pose[:3, :3] @ BOUNDING_BOX.mean(0)
                poses.append((pose, None))
        starts = [pose for *_, pose in _distinct(self._rank(image, poses, K, price, shrink)[0], 20)[:6]]
        return self._finished(image, self._refined(image, starts, K, shrink, True), K, price, shrink, 10, 3)

    def _finished(self, image, found, K, price, shrink, degrees, count):
        """The best `count` of some coarsely refined poses that differ by so many degrees, refined finely: a list of (pose, covariance)."""
        best = _distinct(self._rank(image, found, K, price, shrink)[0], degrees)[:count] if found else []
        return self._refined(image, [pose for *_, pose in best], K, shrink // 2, False)

    def _mistaken(self, image, best, K, price):
        """What the best pose may be mistaken for and the coarse level does not rule out, refined: a list of (pose, covariance)."""
        shrink = self._shrink(best, K)
        others = [*self._refined(image, _mistakable(best)[1:], K, 2 * shrink, True), (best, None)]
        ranked = _distinct(self._rank(image, others, K, price)[0], 3)
        limit = next(cost for cost, index, _ in ranked if index == len(others) - 1) + CLEAR
        return self._refined(image, [pose for cost, index, pose in ranked if cost < limit and index < len(others) - 1], K, shrink, False)

    def _refined(self, image, poses, K, shrink, coarse):
        """Those of some poses that can be refined on one level: a list of (pose, covariance)."""
        ends = [self._descend(image, pose, K, shrink, coarse) for pose in poses]
        return [(end[0], np.linalg.inv(end[1])) for end in ends if end is not None]

    def _rank(self, image, found, K, price, shrink=None):
        """Some (pose, covariance) as (cost, index, pose), best first, and the share of the contrast that the best explains."""
        poses = [pose for pose, _ in found]
        costs, none = self.misfits(image, poses, K, shrink)
        costs = costs + [price(pose) for pose in poses]
        order = np.argsort(costs, kind="stable")
        return [(float(costs[i]), int(i), poses[i]) for i in order], float(none - costs[order[0]]) / max(none, FAINT)

    def misfits(self, image, poses, K, shrink=None):
        """How badly the frame is explained by each of some poses, (len(poses),), and by a smooth sky alone, a number: costs over the same pixels.

        They are negative log-likelihoods but for a constant, so that their differences compare poses. `shrink` is by how much the frame is shrunk,
        None for what the ship's size asks for; with it, the smallest triangles are left out.
        """
        pixels = np.concatenate([project_pose(self.middles, pose, K) for pose in poses])
        view = _View(image, K, pixels, shrink or max(self._shrink(pose, K) for pose in poses))
        if view.image is None:
            return np.zeros(len(poses)), 0.0
        rendered = [self._render(pose, view, coarse=shrink is not None) for pose in poses]
        ship = cv2.dilate(np.max([r.cover for r in rendered], axis=0), np.ones((5, 5))) > 0.01
        residuals = [(view.image - self._paint(view, r)[0])[ship] for r in rendered]
        row, column = (2 * part / max(ship.shape) - 1 for part in np.nonzero(ship))
        smooth = np.column_stack([row**i * column**j for i in range(4) for j in range(4 - i)])  # a sky that changes gently
        residuals.append(view.image[ship] - smooth @ np.linalg.lstsq(smooth, view.image[ship], rcond=None)[0])
        costs = np.array([_robust_cost(residual, 2 * NOISE) for residual in residuals])
        return costs[:-1], float(costs[-1])

    def _shrink(self, pose, K):
        span = np.ptp(project_pose(BOUNDING_BOX, pose, K), axis=0).max()
        return max(1, int(np.ceil(span / WORKING_SIZE))) if np.isfinite(span) else 1

    def _descend(self, image, pose, K, shrink, coarse, prior=None):
        """Levenberg-Marquardt on one level: the pose and its information (6, 6), or None."""
        damping, whole = 1e-3, None
        for _ in range(ROUNDS[0 if coarse else 1]):
            if whole is None or rotation_error(pose, whole) > 3:  # other triangles come into sight
                view, whole = _View(image, K, project_pose(self.middles, pose, K), shrink), pose
                if view.image is None:
                    return None
                drawn = self._draw(pose, view, coarse=coarse)
                if drawn is None:
                    return None
                _, rendering, picture, spread = drawn
            information, gradient = self._linearise(pose, view, rendering, picture, spread)
            if prior is not None:
                information, gradient = information + prior[1], gradient - prior[1] @ _step_between(pose, prior[0])
            cost, moved = _robust_cost(view.image - picture, spread, pose, prior), False
            while damping < 10:
                step = np.linalg.lstsq(information + damping * np.diag(np.diag(information)), gradient, rcond=1e-9)[0]
                if gradient @ step < 2 * NEGLIGIBLE:
                    break
                trial = self._draw(_moved(pose, step), view, rendering) if np.abs(step[:3]).max() < 0.5 else None
                if trial is not None and _robust_cost(view.image - trial[2], spread, trial[0], prior) < cost:
                    (pose, rendering, picture, spread), moved, damping = trial, True, damping / 10
                    break
                damping *= 100
            if not moved:
                break
        return (pose, information) if np.linalg.cond(information) < 1e12 else None

    def _draw(self, pose, view, last=None, coarse=False):
        """(pose, rendering, picture, spread) of a pose, or None where it shows too little or lies behind the camera."""
        if not (self.middles @ pose[2, :3] + pose[2, 3] > 1e-3).all():
            return None
        rendering = self._render(pose, view, last, coarse)
        return (pose, rendering, *self._paint(view, rendering)) if len(rendering.where) >= 50 else None

    def _render(self, pose, view, last=None, coarse=False):
        """What each pixel shows; with an earlier rendering of nearly the same pose only the triangles that showed there are drawn, much faster."""
        s, (height, width) = SUPERSAMPLING, view.image.shape[:2]
        chosen = last.chosen if last is not None else self.coarse if coarse else np.arange(len(self.triangles))
        shown = triangle_map(self.triangles[chosen], pose, view.K * [[s], [s], [1]], width * s, height * s)
        if last is None:
            kept, shown = np.unique(shown, return_inverse=True)
            shown = shown.reshape(height * s, width * s) - (kept[0] < 0)
            chosen = chosen[kept[kept >= 0]]
        seen, normals = self.middles[chosen] @ pose[:3, :3].T + pose[:3, 3], self.normals[chosen] @ pose[:3, :3].T
        normals *= -np.sign((normals * seen).sum(1, keepdims=True))  # towards the camera
        x, y, z = normals.T
        light = np.column_stack([x, y, z, x * y, y * z, x * z, x * x - y * y, 3 * z * z - 1])
        basis = np.column_stack([self.material[chosen], self.albedo[chosen] * light, np.ones(len(chosen))])
        basis = np.concatenate([basis, np.zeros((1, basis.shape[1]))]).astype(np.float32)  # the last row is for -1, no ship
        blocks = shown.reshape(height, s, width, s).swapaxes(1, 2).reshape(height * width, s * s)
        where = np.flatnonzero((blocks >= 0).any(1))
        basis = basis[blocks[where]].mean(1)
        cover, depth = np.zeros((height, width), np.float32), np.full((height, width), np.inf, np.float32)
        cover.flat[where] = basis[:, -1]
        depth.flat[where] = np.append(seen[:, 2], np.inf)[blocks[where]].min(1)
        return _Rendering(where, basis[:, :-1], cover, cv2.erode(depth, np.ones((3, 3))), chosen)  # at a rim, the nearer side is what moves

    def _paint(self, view, rendering):
        """Solve for colours and light: the picture (h, w, 3), and the spread of what remains, grey levels."""
        where, basis = rendering.where, rendering.basis
        picture = (1 - rendering.cover[..., None]) * _surroundings(view.image, rendering.cover)
        target = (view.image - picture).reshape(-1, 3)[where]
        weight = np.ones(len(where), np.float32)
        for _ in range(3):  # iteratively reweighted least squares
            weighted = basis.T * weight
            colours = np.linalg.solve(weighted @ basis + self.stiffness, weighted @ target)
            errors = np.sqrt(((target - basis @ colours) ** 2).mean(1))
            spread = max(NOISE, 1.4826 * float(np.median(errors)))
            weight = (1 / (1 + (errors / (CAUCHY * spread)) ** 2)).astype(np.float32)
        picture.reshape(-1, 3)[where] += basis @ colours
        return picture, spread

    def _linearise(self, pose, view, rendering, picture, spread):
        """Information (6, 6) and gradient (6,) for a step that turns the pose in camera axes, and moves it; colours and light go along with it."""
        height, width = rendering.cover.shape
        rim = np.isfinite(rendering.depth)
        rim.flat[rendering.where] = False
        pixels = np.concatenate([rendering.where, np.flatnonzero(rim)])
        basis = np.zeros((len(pixels), rendering.basis.shape[1]), np.float32)
        basis[: len(rendering.where)] = rendering.basis
        residual = (view.image - picture).reshape(-1, 3)[pixels]
        weight = INDEPENDENT / spread**2 / (1 + (residual**2).mean(1) / (CAUCHY * spread) ** 2)
        slope_y, slope_x = (slope.reshape(-1, 3)[pixels] for slope in np.gradient(picture, axis=(0, 1)))
        z = rendering.depth.ravel()[pixels]
        fx, fy = view.K[0, 0] / z, view.K[1, 1] / z
        x, y = (pixels % width + 0.5 - view.K[0, 2]) / fx, (pixels // width + 0.5 - view.K[1, 2]) / fy
        point = np.column_stack([x, y, z]) - pose[:3, 3]
        across, down = np.column_stack([fx, 0 * z, -fx * x / z]), np.column_stack([0 * z, fy, -fy * y / z])  # d pixel / d point
        flow = [np.column_stack([np.cross(point, d), d])[:, None] for d in (across, down)]  # d pixel / d step
        jacobian = -(slope_x[..., None] * flow[0] + slope_y[..., None] * flow[1])  # (P, 3, 6) of the residual's explanation
        weighted = basis.T * weight
        inner = np.linalg.inv(weighted @ basis + self.stiffness * INDEPENDENT / spread**2)
        information, gradient = np.zeros((6, 6)), np.zeros(6)
        for colour in range(3):
            j, r = jacobian[:, colour], residual[:, colour]
            mixed = weighted @ j
            information += (j.T * weight) @ j - mixed.T @ inner @ mixed
            gradient += (j.T * weight) @ r - mixed.T @ inner @ (weighted @ r)
        return information, gradient


def settle_frames(aligner, frames, estimates, K, progress=True):
    """`Aligner.settle` for many frames, on all cores.

    Args:
        aligner: `Aligner`.
        frames: iterable of (H, W, 3) uint8, read as they are needed; one that is None or missing keeps its estimate.
        estimates: list of N `PoseEstimate`.
        K: (3, 3).
    Returns:
        list of N `PoseEstimate`.
    """
    frames = itertools.chain(frames, itertools.repeat(None))
    tasks = (joblib.delayed(_settle)(aligner, frame, estimate, K) for estimate, frame in zip(estimates, frames))
    settled = joblib.Parallel(n_jobs=-1, return_as="generator", max_nbytes=None)(tasks)  # large frames must not pile up in shared memory
    return list(tqdm(settled, total=len(estimates), desc="aligning", unit="frame", disable=not progress))


def _settle(aligner, frame, estimate, K):
    cv2.setNumThreads(1)  # the frames are what is shared out
    return estimate if frame is None else aligner.settle(frame, estimate, K)


@dataclasses.dataclass
class _Rendering:
    where: np.ndarray  # (P,) the pixels, flat, that the ship covers at least in part
    basis: np.ndarray  # (P, M + 8) what multiplies the colours and the light's harmonics there
    cover: np.ndarray  # (h, w) share of each pixel
    depth: np.ndarray  # (h, w) of the nearest surface in each pixel or beside it
    chosen: np.ndarray  # (T,) the triangles that were drawn


class _View:
    """The part of a frame about some points, shrunk; its image is None where they lie outside."""

    def __init__(self, image, K, points, shrink, margin=8):
        self.image = None
        if not np.isfinite(points).all():
            return
        size = np.array(image.shape[1::-1])
        low = np.floor(points.min(0) / shrink - margin).clip(0, size // shrink).astype(int) * shrink
        high = np.ceil(points.max(0) / shrink + margin).clip(0, size // shrink).astype(int) * shrink
        if (high - low >= 8 * shrink).all():
            part = image[low[1] : high[1], low[0] : high[0]]
            self.image = cv2.resize(part, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA).astype(np.float32)
            self.K = (K - [[0, 0, low[0]], [0, 0, low[1]], [0, 0, 0]]) / [[shrink], [shrink], [1]]


def _robust_cost(residual, spread, pose=None, prior=None):
    """Negative log-likelihood of grey levels (h, w, 3), but for a constant, and of a pose."""
    squared = (residual**2).mean(-1) / (CAUCHY * spread) ** 2
    cost = 1.5 * INDEPENDENT * CAUCHY**2 * float(np.log1p(squared).sum(dtype=float))
    if prior is not None:
        step = _step_between(pose, prior[0])
        cost += 0.5 * step @ prior[1] @ step
    return cost


def _surroundings(image, cover):
    """The picture (h, w, 3) float32 without the ship: each pixel from those around it that are not covered."""
    free = (cv2.dilate(cover, np.ones((5, 5))) < 0.01).astype(np.float32)[..., None]
    total, weight = np.zeros_like(image), np.full_like(free, 1e-12)
    layers = np.concatenate([image * free, free], axis=2)
    for reach in (3, 12, 48):  # what is near counts most
        blurred = cv2.blur(layers, (2 * reach + 1, 2 * reach + 1), borderType=cv2.BORDER_REFLECT)
        total, weight = total + blurred[..., :3] / reach**6, weight + blurred[..., 3:] / reach**6
    return total / weight


# ============================================================ tracking in time

GATE = 22.5  # chi square of 6 degrees of freedom, 99.9 %: what a measured pose may differ from the predicted one
GAP = 0.5  # seconds without a measurement that are bridged
START = 3.0  # margin over a second pose from which keypoints alone are clear and a track may start, in units of log-likelihood
AGILITY = 3.0, 0.7  # spectral density of the acceleration: rotation, rad/s^2 per root Hz; translation, model units/s^2 per root Hz
SKIP, DOUBT, JUMP = 4.0, 2.0, 12.0  # cost of leaving a frame out of a sequence, of a rejected pose, of a leap; in units of log-likelihood
DESPAIR = 6.0  # sum of what frames say against a track, at most DOUBT each, at which it is given up
TURN = 180.0  # degrees a second that cost nothing in a sequence
COASTING = 0.05, 0.01  # standard deviation of a pose that is expected from the frame before: rotation, rad; translation, model units
MEASURED = 1.5  # factor on the claimed standard deviation of a measured pose: its errors last for several frames


@dataclasses.dataclass
class TrackedPose:
    """One frame of a track."""

    status: str  # "tracked": measured in this frame; "predicted": from the frames around it; "lost": no pose
    pose: np.ndarray | None = None  # (4, 4) model -> OpenCV camera
    covariance: np.ndarray | None = None  # (6, 6): rotation vector in camera axes (radians), then translation (model units)
    velocity: np.ndarray | None = None  # (6,) rotation in camera axes, radians a second, then translation, model units a second
    reprojection: float = np.nan  # pixels, of the pose from the keypoints; NaN where there was none
    reason: str = ""  # why it was not measured


class _Motion:
    """A pose with its velocity: a point of SE(3) and its tangent, and the covariance (12, 12) of both."""

    def __init__(self, rotation, translation, velocity, covariance):
        self.rotation, self.translation, self.velocity, self.covariance = rotation, translation, velocity, covariance

    @property
    def pose(self):
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = self.rotation.as_matrix(), self.translation
        return pose

    def minus(self, other):
        """(12,) the step from another motion to this one."""
        turn = (self.rotation * other.rotation.inv()).as_rotvec()
        return np.concatenate([turn, self.translation - other.translation, self.velocity - other.velocity])

    def plus(self, step, covariance):
        return _Motion(Rotation.from_rotvec(step[:3]) * self.rotation, self.translation + step[3:6], self.velocity + step[6:], covariance)

    def after(self, seconds):
        """The motion a while later at constant velocity, and the transition matrix (12, 12) of small errors."""
        turn = Rotation.from_rotvec(self.velocity[:3] * seconds)
        transition = np.eye(12)
        transition[:3, :3] = turn.as_matrix()
        transition[:6, 6:] = np.eye(6) * seconds
        density = np.repeat(np.square(AGILITY), 3)
        noise = np.kron([[seconds**3 / 3, seconds**2 / 2], [seconds**2 / 2, seconds]], np.diag(density))
        return _Motion(turn * self.rotation, self.translation + self.velocity[3:] * seconds, self.velocity,
                       transition @ self.covariance @ transition.T + noise), transition

    def updated(self, pose, covariance):
        """The motion once a pose has been measured, and the squared Mahalanobis distance between the two."""
        step = np.concatenate([(Rotation.from_matrix(pose[:3, :3]) * self.rotation.inv()).as_rotvec(), pose[:3, 3] - self.translation])
        spread = self.covariance[:6, :6] + covariance
        gain = np.linalg.solve(spread, self.covariance[:6]).T
        kept = np.eye(12) - np.pad(gain, ((0, 0), (0, 6)))
        return self.plus(gain @ step, kept @ self.covariance @ kept.T + gain @ covariance @ gain.T), float(step @ np.linalg.solve(spread, step))


class Tracker:
    """Follows one ship through a clip, frame by frame, with what is known up to then.

        tracker = Tracker(K, fps=30)
        for keypoints, confidence, deviation in frames:
            tracked = tracker.update(keypoints, confidence, deviation)  # a TrackedPose

    A Kalman filter on SE(3) with constant velocity. The predicted pose helps to choose among the poses that a frame allows; a measured pose
    further off than GATE is not believed. Gaps of up to GAP seconds are bridged by the prediction; then the ship is lost, until a frame
    shows it clearly (START). A track that the frames themselves speak against (a ship that was taken up the wrong way round) is given up.

    Source: Bar-Shalom, Li, Kirubarajan, Estimation with Applications to Tracking and Navigation, 2001 (white-noise acceleration, gating); Page,
    Continuous Inspection Schemes, Biometrika 41, 1954 (giving up: a sum of evidence that is not let below 0);
    Sola, Deray, Atchuthan, A micro Lie theory for state estimation in robotics, 2018 (errors as rotation vectors).
    """

    def __init__(self, K, fps=30.0, keep=False):
        """`fps`: frames a second; `keep`: remember every frame for `smooth` (about 3 kB each). ValueError: a wrong K, or fps not positive."""
        if fps is None or not fps > 0:
            raise ValueError(f"fps: expected a positive number of frames a second, got {fps}; a folder of frames does not say: give the camera's")
        self.K, self.seconds, self.frames = _check_camera_matrix(K), 1 / fps, [] if keep else None
        self.motion, self.unseen, self.doubt = None, 0.0, 0.0

    def update(self, keypoints, confidence, deviation=None):
        """Take the next frame's keypoints (C, 2), confidence (C,) and deviation (C,), see `detect_frames`, and return its `TrackedPose`."""
        expected = None if self.motion is None else self.motion.after(self.seconds)[0].pose
        estimate = estimate_frame(keypoints, self.K, confidence, deviation, expected)
        if expected is not None and estimate.pose is not None:
            in_favour = estimate.margin - PRIOR if rotation_error(estimate.pose, expected) < 30 else -estimate.margin  # what the frame alone says
            self.doubt = max(self.doubt - float(np.clip(in_favour, -DOUBT, DOUBT)), 0.0)
            if self.doubt > DESPAIR:
                self.motion, self.doubt = None, 0.0
                estimate = estimate_frame(keypoints, self.K, confidence, deviation)
        return self.take(estimate)

    def take(self, estimate):
        """Take the next frame's `PoseEstimate` and return its `TrackedPose`; `update` for who has made the estimate."""
        predicted, transition = (None, None) if self.motion is None else self.motion.after(self.seconds)
        motion, reason = self._correct(predicted, estimate)
        if motion is not None:
            self.unseen, tracked = 0.0, TrackedPose("tracked", reprojection=estimate.reprojection)
        else:
            self.unseen += self.seconds
            motion = predicted if self.unseen <= GAP + 1e-9 and predicted is not None and predicted.translation[2] > 0 else None
            tracked = TrackedPose("lost" if motion is None else "predicted", reason=reason)
        self.motion, self.doubt = motion, 0.0 if motion is None else self.doubt
        if self.frames is not None:
            self.frames.append((tracked, predicted, transition, motion, estimate))
        return _describe(tracked, motion)

    def _correct(self, predicted, estimate):
        """The motion with this frame's estimate, or None and the reason."""
        if not estimate.accepted:
            return None, estimate.reason or "too far from where it should be"
        covariance = estimate.covariance * MEASURED**2
        if predicted is None:
            if estimate.margin < START:
                return None, "not clear enough to start from"
            start = np.zeros((12, 12))
            start[:6, :6], start[6:, 6:] = covariance, np.diag([1.5**2] * 3 + [0.5**2] * 3)
            return _Motion(Rotation.from_matrix(estimate.pose[:3, :3]), estimate.pose[:3, 3], np.zeros(6), start), ""
        motion, distance = predicted.updated(estimate.pose, covariance)
        return (motion, "") if distance <= GATE else (None, "too far from where it should be")


def _describe(tracked, motion):
    if motion is None:
        return tracked
    return dataclasses.replace(tracked, pose=motion.pose, covariance=motion.covariance[:6, :6], velocity=motion.velocity)


def smooth(tracker):
    """The whole track, each frame with what is known from before and after it: a list of `TrackedPose`, for a `Tracker(keep=True)`.

    Frames that were predicted after the ship was last seen stay as they are. Source: Rauch, Tung, Striebel, AIAA Journal 3(8), 1965.
    """
    if tracker.frames is None:
        raise ValueError("the tracker has not kept its frames; make it with Tracker(K, fps, keep=True)")
    smoothed, later = [], None
    for (tracked, _, _, motion, _), following in zip(reversed(tracker.frames), [None, *reversed(tracker.frames)]):
        if motion is not None and later is not None and following[1] is not None:
            gain = np.linalg.solve(following[1].covariance, following[2] @ motion.covariance).T
            change = gain @ later.minus(following[1])
            motion = motion.plus(change, motion.covariance + gain @ (later.covariance - following[1].covariance) @ gain.T)
        later = motion
        smoothed.append(_describe(tracked, motion))
    return smoothed[::-1]


def track_clip(keypoints, confidence, deviation, K, fps=30.0, clip=None, aligner=None, progress=True):
    """Track a finished clip, every frame with what is known from both sides.

    Each frame proposes a pose and a second one (`estimate_frame`, and with the pixels `Aligner.settle`); the sequence that turns least against what
    the frames say is chosen for the whole clip at once, filtered and smoothed. With the pixels, frames that were left out try again from where
    the track expects the ship, and so do those in which it leaves the frame or comes in.

    Args:
        keypoints, confidence, deviation: (N, C, 2), (N, C), (N, C), see `detect_frames` and `point_deviation`.
        K, fps: see `Tracker`.
        clip, aligner: `Clip`, or another iterable of N (frame or None, fault) that can be read again and again, and `Aligner`; None leaves the
            pixels out.
        progress: show bars.
    Raises:
        ValueError: only one of clip and aligner, a wrong K, or fps not positive.
    Returns:
        list of N `TrackedPose`. Gaps of up to GAP seconds between tracked frames are "predicted"; longer ones, and what comes before the
        first or after the last tracked frame, are "lost" and have no pose.
    Source: Viterbi, IEEE Trans. Information Theory 13(2), 1967 (the best sequence).
    """
    if (clip is None) != (aligner is None):
        raise ValueError("clip and aligner: give both, to align poses on the clip's pixels, or neither")
    K = Tracker(K, fps).K  # what is wrong with them is said before the work
    estimates = [estimate_frame(k, K, c, d) for k, c, d in zip(keypoints, confidence, deviation)]
    if aligner is not None:
        estimates = settle_frames(aligner, (frame for frame, _ in clip), estimates, K, progress)
    chosen = _best_sequence(estimates, fps)
    track = _smoothed(chosen, K, fps)
    left_out = [i for i, t in enumerate(track) if t.status == "predicted"] if aligner is not None else []
    if left_out:
        again = settle_frames(aligner, (frame for i, (frame, _) in enumerate(clip) if i in left_out),
                              [PoseEstimate(track[i].pose, track[i].covariance, True, reprojection=np.nan) for i in left_out], K, progress)
        for i, estimate in zip(left_out, again):
            if estimate.accepted and np.isfinite(estimate.explained) and rotation_error(estimate.pose, track[i].pose) < 30:
                chosen[i] = dataclasses.replace(estimate, margin=np.inf)
    if aligner is not None:
        _extend(chosen, track, aligner, clip, K, fps)
        track = _smoothed(chosen, K, fps)
    return track


def _extend(estimates, track, aligner, clip, K, fps):
    """Follow the ship out of each stretch of a track, forwards and backwards for up to GAP seconds, as long as the pixels confirm it: where it leaves
    the frame or comes in, keypoints are few. Replaces the estimates of the frames that are won."""
    before = collections.deque(maxlen=round(GAP * fps))  # frames that were lost, the last ones
    spread = np.diag(np.square(COASTING).repeat(3))

    def attempt(i, frame, pose, velocity, seconds):
        if frame is None:
            return None
        expected = _Motion(Rotation.from_matrix(pose[:3, :3]), pose[:3, 3], velocity, np.zeros((12, 12))).after(seconds)[0].pose
        estimate = aligner.settle(frame, PoseEstimate(expected, spread, True, reprojection=np.nan), K)
        if not estimate.accepted or estimate.explained < MIN_EXPLAINED or rotation_error(estimate.pose, expected) > 15:
            return None
        estimates[i] = dataclasses.replace(estimate, margin=np.inf)
        return estimate.pose

    pose, velocity, start = None, None, 0
    for i, (tracked, (frame, _)) in enumerate(zip(track, clip)):
        if tracked.pose is None:
            before.append((i, frame))
            if pose is not None and i - start <= GAP * fps:
                pose = attempt(i, frame, pose, velocity, 1 / fps)
                if pose is not None:
                    before.pop()
            continue
        pose, velocity, start, back = tracked.pose, tracked.velocity, i, tracked.pose
        while before and back is not None:
            back = attempt(*before.pop(), back, velocity, -1 / fps)
        before.clear()


def _smoothed(estimates, K, fps):
    tracker = Tracker(K, fps, keep=True)
    for estimate in estimates:
        tracker.take(estimate)
    track = smooth(tracker)
    for start, end in _runs([t.status != "tracked" for t in track]):
        if start == 0 or end == len(track) or end - start > GAP * fps:
            track[start:end] = [TrackedPose("lost", reason=t.reason) for t in track[start:end]]
    return track


def _best_sequence(estimates, fps):
    """The estimates with each one's pose or second pose, or not accepted where neither suits: what costs and turns least over the clip."""
    nodes = []  # (frame, estimate, cost)
    for i, e in enumerate(estimates):
        if e.pose is not None and e.covariance is not None and (e.accepted or not e.explained < MIN_EXPLAINED):
            nodes.append((i, dataclasses.replace(e, accepted=True, reason="", margin=np.inf), 0.0 if e.accepted else DOUBT))
            if e.second is not None and e.second_covariance is not None:
                second = dataclasses.replace(nodes[-1][1], pose=e.second, covariance=e.second_covariance, reprojection=np.nan)
                nodes.append((i, second, max(e.margin, 0.0) + nodes[-1][2]))
    total, before, reach = [], [], int(GAP * fps + 1e-9) + 1
    for n, (i, estimate, cost) in enumerate(nodes):
        ways = [(SKIP * i, -1)]  # the first of all
        for m in range(n - 1, -1, -1):
            gap = i - nodes[m][0]
            if gap > 0:
                excess = max(rotation_error(estimate.pose, nodes[m][1].pose) - TURN * gap / fps, 0.0) if gap <= reach else np.inf
                ways.append((total[m] + SKIP * (gap - 1) + min((excess / 10) ** 2 / 2, JUMP), m))
            if gap > 4 * reach and m and nodes[m - 1][0] != nodes[m][0]:  # not between the two poses of a frame
                break
        best = min(ways)
        total.append(best[0] + cost), before.append(best[1])
    result = [dataclasses.replace(e, accepted=False, reason=e.reason or "does not suit the frames around it") for e in estimates]
    if nodes:
        n = int(np.argmin([t + SKIP * (len(estimates) - 1 - node[0]) for t, node in zip(total, nodes)]))
        while n >= 0:
            result[nodes[n][0]] = nodes[n][1]
            n = before[n]
    return result


def _runs(flags):
    """(start, end) of each stretch of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(flags, int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def jitter(poses, truth, fps=30.0):
    """RMS of the acceleration error: rotation in degrees/s^2 and translation in model units/s^2, over frames whose two neighbours have poses.

    poses: N (4, 4) or None; truth: (N, 4, 4). Both NaN where no three frames in a row have poses.
    Source: the acceleration error of Kanazawa et al., Learning 3D Human Dynamics from Video, CVPR 2019, for a rigid body.
    """
    turn, move = np.full((len(poses), 3), np.nan), np.full((len(poses), 3), np.nan)
    for i, (pose, true) in enumerate(zip(poses, truth)):
        if pose is not None:
            turn[i], move[i] = np.degrees(Rotation.from_matrix(pose[:3, :3] @ true[:3, :3].T).as_rotvec()), pose[:3, 3] - true[:3, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return tuple(float(np.sqrt(np.nanmean((np.diff(error, 2, axis=0) ** 2).sum(1)))) * fps**2 for error in (turn, move))


# ============================================================ anyone's footage


def lens_camera(width, height, focal=35.0, sensor=36.0, view=None):
    """The camera matrix K (3, 3) of a lens: `focal` and `sensor` (along the frame's longer side) in one unit; principal point in the middle.

    `view`, the field of view along the longer side in degrees, takes the place of both. Raises ValueError where one is not positive, or the
    view not below 180 degrees.
    """
    if view is not None:
        if not 0 < view < 180:
            raise ValueError(f"view: expected an angle between 0 and 180 degrees, got {view}")
        focal, sensor = 0.5 / np.tan(np.radians(view / 2)), 1.0
    for name, value in (("width", width), ("height", height), ("focal", focal), ("sensor", sensor)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a positive number, got {value}")
    pixels = max(width, height) * focal / sensor
    return np.array([[pixels, 0, width / 2], [0, pixels, height / 2], [0, 0, 1]])


class Clip:
    """The frames of a folder of numbered JPEGs or PNGs (0.jpg, shot_0017.png), a video file or a GIF, one at a time, never all at once.

        clip = Clip("flight.mp4")
        for frame, fault in clip:  # (H, W, 3) uint8 RGB and "", or None and what is wrong with this frame

    A frame that cannot be read, or of another size than the first, is passed over with its fault; where a video cannot be read on, it ends with one.

    Attributes: fps (None where the source does not say), width, height in pixels, count (frames; None where unknown).
    """

    def __init__(self, source, step=1):
        """`step` takes every so-manieth frame. Raises FileNotFoundError or ValueError where not even a first frame can be read."""
        self.source, self.step, self.fps, self.count = Path(source), step, None, None
        if step < 1:
            raise ValueError(f"step: expected at least 1, got {step}")
        if not self.source.exists():
            raise FileNotFoundError(f"{source}: no such folder or file; give a folder of frames 0.jpg, 1.jpg, ..., a video or a GIF")
        self.paths = _numbered_pictures(self.source) if self.source.is_dir() else None
        self._maps = None
        frames = self._frames()
        first = next((frame for frame, _ in frames if frame is not None), None)
        if first is not None and self.source.suffix.lower() == ".gif":
            collections.deque(frames, maxlen=0)  # a GIF tells its length and its rate only frame by frame
        if first is None:
            raise ValueError(f"{source}: holds no frame that can be read; expected a folder of frames 0.jpg, 1.jpg, ..., a video or a GIF")
        self.height, self.width = first.shape[:2]
        if self.paths is not None:
            self.count = len(self.paths)
        if self.count is not None:
            self.count = -(-self.count // step)
        if self.fps is not None:
            self.fps /= step

    def __iter__(self):
        fault = yield from self._chosen(self._frames())
        if fault:
            yield None, fault

    def _chosen(self, frames):
        """Every so-manieth frame, checked and straightened; returns what `frames` returns."""
        for i in itertools.count():
            try:
                frame, fault = next(frames)
            except StopIteration as end:
                return end.value
            if i % self.step == 0:
                if frame is not None and frame.shape != (self.height, self.width, 3):
                    frame, fault = None, f"expected {self.width}x{self.height} pixels like the first frame, got {frame.shape[1]}x{frame.shape[0]}"
                if frame is not None and self._maps is not None:
                    frame = cv2.remap(frame, *self._maps, cv2.INTER_LINEAR)
                yield frame, fault

    def undistort(self, K, coefficients):
        """From now on frames come as a lens without distortion and with the same K would show them: OpenCV's 4, 5, 8, 12 or 14 coefficients."""
        coefficients = np.asarray(coefficients, float)
        if coefficients.ndim != 1 or len(coefficients) not in (4, 5, 8, 12, 14) or not np.isfinite(coefficients).all():
            raise ValueError(f"coefficients: expected OpenCV's k1 k2 p1 p2 [k3 ...], 4, 5, 8, 12 or 14 numbers, got {coefficients.tolist()}")
        K = _check_camera_matrix(K) - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]  # OpenCV's whole numbers are the pixels' centres
        self._maps = cv2.initUndistortRectifyMap(K, coefficients, None, K, (self.width, self.height), cv2.CV_16SC2)

    def _frames(self):
        """Yields every (frame, fault), and returns what ended the clip before its time, if anything did."""
        if self.paths is not None:
            return self._from_folder()
        return self._from_gif() if self.source.suffix.lower() == ".gif" else self._from_video()

    def _from_folder(self):
        for path in self.paths:
            try:
                yield read_image(path), ""
            except (ValueError, FileNotFoundError) as error:
                yield None, str(error)

    def _from_gif(self):
        read, total = 0, 0
        try:
            with Image.open(self.source) as gif:
                while True:
                    gif.seek(read)
                    yield np.array(gif.convert("RGB")), ""
                    total += gif.info.get("duration", 0)
                    read += 1
        except EOFError:
            if self.count is None and read:
                self.count, self.fps = read, 1000 * read / total if total else None
            with self.source.open("rb") as file:
                file.seek(max(self.source.stat().st_size - 64, 0))
                return "" if file.read().rstrip(b"\0\r\n ").endswith(b";") else f"{self.source}: breaks off after {read} frames"
        except (OSError, SyntaxError, ValueError, IndexError, struct.error, Image.DecompressionBombError) as error:
            return f"{self.source}: cannot be read as a GIF from here on ({error})"

    def _from_video(self):
        import imageio_ffmpeg

        reader = imageio_ffmpeg.read_frames(str(self.source), pix_fmt="rgb24", output_params=["-fps_mode", "passthrough"])  # no frame twice
        try:
            facts = next(reader)
            width, height = facts["size"]
            self.fps = self.fps or facts["fps"] or None
            total, read = round(facts["duration"] * facts["fps"]), 0
            if self.count is None:
                self.count = imageio_ffmpeg.count_frames_and_secs(str(self.source))[0] or None
            sizes = [] if self._steady else self._sizes()
            for frame, size in zip(reader, itertools.chain(sizes, itertools.repeat((width, height)))):
                read += 1
                if size == (width, height):
                    yield np.frombuffer(frame, np.uint8).reshape(height, width, 3), ""
                else:  # ffmpeg has scaled it to the size of the first
                    yield None, f"expected {width}x{height} pixels like the first frame, got {size[0]}x{size[1]}"
            if read < 0.95 * total - 1 and self._damaged():  # else only the sound is longer
                return f"{self.source}: breaks off after {read} of about {total} frames"
        except (OSError, RuntimeError, ValueError, KeyError, StopIteration) as error:
            why = (str(error).strip().splitlines() or ["no frames"])[-1][:200]
            return f"{self.source}: cannot be read as a video from here on ({why})"
        finally:
            reader.close()

    def _ffmpeg(self, before=(), after=(), level="error"):
        """What ffmpeg says of a video's stream of pictures: its exit status and its messages."""
        import imageio_ffmpeg

        asked = [*before, "-i", str(self.source), "-map", "0:v:0", *after, "-f", "null", "-"]
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", level, "-nostats", *asked]
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, text=True, errors="replace")
        return done.returncode, done.stderr

    def _damaged(self):
        """Whether ffmpeg finds fault with a video's stream of pictures."""
        status, messages = self._ffmpeg(after=["-c", "copy"])
        return status != 0 or bool(messages.strip())

    def _sizes(self, before=()):
        """The (width, height) of each picture of a video, as it is stored: ffmpeg gives all of them the size of the first."""
        _, messages = self._ffmpeg(before, ["-fps_mode", "passthrough", "-vf", "showinfo"], "info")
        return [(int(w), int(h)) for w, h in re.findall(r"^\[Parsed_showinfo.* s:(\d+)x(\d+) ", messages, re.M)]

    @functools.cached_property
    def _steady(self):
        """Whether a video keeps its size; it can change only where a picture stands for itself, so that few need be looked at."""
        return len(set(self._sizes(["-skip_frame", "nokey"]))) < 2


def _numbered_pictures(folder):
    """The pictures of a folder whose names end in a number, in its order."""
    found = [(re.search(r"\d+$", path.stem), path) for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    return [path for _, _, path in sorted((int(number[0]), path.name, path) for number, path in found if number)]


def letterbox(image, size):
    """The frame in the middle of a black square of `size` pixels, with its scale and offset.

    Returns (size, size, 3) uint8; scale; (2,) pixels: a position p of the frame lies at p * scale + offset in the square.
    """
    left, top, side = _whole(image)
    return _square(image, left, top, side, size), size / side, np.array([-left, -top]) * size / side


def _whole(image):
    """The square (left, top, side), whole pixels, that holds a frame in its middle."""
    height, width = image.shape[:2]
    side = max(width, height)
    return -((side - width) // 2), -((side - height) // 2), side


def _square(image, left, top, side, size):
    """That square of a frame, black beyond its edge, scaled to `size` pixels; cut out before it is scaled, so that the scale is exact."""
    square = image if (left, top) == (0, 0) and image.shape[:2] == (side, side) else crop(image, (left, top), side)
    if side == size:
        return square
    return cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA if size < side else cv2.INTER_LINEAR)


def export_model(path, size=FRAME_SIZE):
    """Write the network for OpenVINO beside its weights, once for each version of them, and return the path of the `.xml` (and `.bin`) file.

    It lies in `.openvino/` and its name holds a digest of weights and settings; files of older versions are deleted.
    """
    path = _weights_path(path)
    settings = path.with_name(_stem(path) + ".json")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in (path, settings) if file.exists())).hexdigest()[:12]
    exported = path.parent / ".openvino" / f"{_stem(path)}-{size}-{digest}.xml"
    if not (exported.exists() and exported.with_suffix(".bin").exists()):
        model = load_model(path, size)
        exported.parent.mkdir(exist_ok=True)
        for old in exported.parent.glob(f"{_stem(path)}-{size}-*"):
            old.unlink(missing_ok=True)
        part = exported.with_name(f"part-{os.getpid()}-{exported.name}")
        model.export(str(part), format="openvino", verbose=False)
        os.replace(part.with_suffix(".bin"), exported.with_suffix(".bin"))
        os.replace(part, exported)
    return exported


KEPT = 0.8  # share of the points found by the search that a close look must find too


class Detector:
    """The network for footage: exported to OpenVINO, for frames of any size; it finds the ship in the whole frame, and then looks closely at it.

        detector = Detector("weights/xwing.weights.h5")
        keypoints, confidence, deviation = detector(image)          # the whole frame, then what was found there
        keypoints, confidence, deviation = detector(image, box)     # at once about a box [[left, top], [right, bottom]]; 3 times faster
        found = Detector("weights/xwing.weights.h5", batch=4).look(images, boxes)    # several frames at once

    Threads may share a detector; they take turns. The close look is cut from the frame itself, so that a ship which is small in a large frame shows
    all its detail. The first use of new weights takes a quarter of a minute, to export them.
    """

    def __init__(self, path, windows=(96, 128), search=192, precision="f32", threads=0, batch=1):
        """windows: sides of the squares for the close look in pixels, multiples of 32; () leaves it out.
        search: side in pixels to which the whole frame is scaled.
        precision: "f32", or "bf16", which is twice as fast and moves keypoints by a few hundredths of a pixel (one in a hundred by more than
        a pixel). threads: 0 takes all cores.
        batch: how many frames are looked at together; more are faster, but a live picture waits for the last of them."""
        import openvino

        if batch < 1:
            raise ValueError(f"batch: expected at least 1 frame, got {batch}")
        self.size, self.windows, self.search, self.batch, path = FRAME_SIZE, sorted(windows), search, batch, _weights_path(path)
        self.settings = _read_json(path.with_name(_stem(path) + ".json"))["model"]
        self._exported, self._core = export_model(path, self.size), openvino.Core()
        self._options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        self._options["ENABLE_CPU_PINNING"] = False  # two processes would be pinned to the same core
        self._options |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
        self._turn = threading.Lock()
        self._requests = {side: self._compile(side) for side in {search, *self.windows}}

    def _compile(self, side):
        model = self._core.read_model(self._exported)
        model.reshape([self.batch, side, side, 3])
        return self._core.compile_model(model, "CPU", self._options).create_infer_request()

    def heatmaps(self, squares):
        """Heatmaps (n, h, w, C) float32 of n squares (n, S, S, 3) uint8, at most `batch`; S is a multiple of 32."""
        side = squares.shape[1]
        full = np.zeros((self.batch, *squares.shape[1:]), np.float32)
        full[: len(squares)] = squares
        with self._turn:
            if side not in self._requests:
                self._requests[side] = self._compile(side)
            return self._requests[side].infer([full])[0][: len(squares)].copy()

    def __call__(self, image, box=None):
        """Keypoints (C, 2) pixels of the frame (NaN where none), confidence (C,), deviation (C,) pixels, of a frame (H, W, 3) uint8.

        `box` (2, 2) is where the ship is expected; what is looked at is a window's square, or a larger one scaled down to it, that holds the box
        and a tenth more. Where that shows no more detail than the search, the whole frame is searched.
        """
        return self.look([image], [box])[0]

    def look(self, images, boxes):
        """What each of several frames shows: a list of what `__call__` returns.

        images are n (H, W, 3) uint8, boxes n (2, 2) pixels or None. In each group of `batch` the ship that needs the largest window sets it for all.
        After a search the close look counts if it finds at least KEPT of the points: a square may have cut the ship off.
        """
        if len(images) > self.batch:
            return [*self.look(images[: self.batch], boxes[: self.batch]), *self.look(images[self.batch :], boxes[self.batch :])]
        found, looks = [None] * len(images), [self._close(image, box) for image, box in zip(images, boxes)]
        unknown = [i for i, look in enumerate(looks) if look is None]
        if unknown:
            for i, seen in zip(unknown, self._see([images[i] for i in unknown], [_whole(images[i]) for i in unknown], self.search)):
                found[i], sure = seen, seen[1] >= MIN_CONFIDENCE
                looks[i] = self._close(images[i], [seen[0][sure].min(0), seen[0][sure].max(0)] if sure.sum() >= 4 else None)
        near = [i for i, look in enumerate(looks) if look is not None]
        if near:
            window = max(looks[i][3] for i in near)
            sides = [max(round(window / looks[i][2]), int(np.ceil(looks[i][1]))) for i in near]
            squares = [(*_inside(np.round(looks[i][0] - side / 2), side, images[i]), side) for i, side in zip(near, sides)]
            for i, seen in zip(near, self._see([images[i] for i in near], squares, window)):
                if found[i] is None or (seen[1] >= MIN_CONFIDENCE).sum() >= KEPT * (found[i][1] >= MIN_CONFIDENCE).sum():
                    found[i] = seen
        return found

    def _close(self, image, box):
        """How to look closely at a box, or None where the search shows as much: its middle, the side that it needs and by how much it may be enlarged
        (no further than a small frame as a whole is), and the smallest window that will do."""
        size = np.array(image.shape[1::-1])
        low, high = np.full((2, 2), np.nan) if box is None else np.clip(np.asarray(box, float), 0, size)
        if not self.windows or not (high > low).all():
            return None
        need, enlarged = 1.1 * (high - low).max(), max(FRAME_SIZE / size.max(), 1.0)
        window = next((side for side in self.windows if side >= need * enlarged), self.windows[-1])
        shown = min(window / need, enlarged)  # pixels for one of the frame's
        return ((low + high) / 2, need, enlarged, window) if shown > self.search / size.max() else None

    def _see(self, images, squares, size):
        """Keypoints, confidence and deviation in one square (left, top, side) of each frame, scaled to `size` pixels."""
        maps = self.heatmaps(np.stack([_square(image, *square, size) for image, square in zip(images, squares)]))
        stride, sigma = self.settings["stride"], self.settings["sigma"]
        keypoints, confidence = decode_heatmaps(maps, sigma / stride)
        deviation = point_deviation(heatmap_covariance(maps, keypoints, sigma / stride, 20 / stride), MIN_DEVIATION / stride)
        return [(points * (stride * side / size) + [left, top], sure, spread * (stride * side / size))
                for points, sure, spread, (left, top, side) in zip(keypoints, confidence, deviation, squares)]


def _inside(corner, side, image):
    """The corner (left, top), whole pixels, of a square moved so that no more of it than needs be lies outside a frame."""
    room = np.array(image.shape[1::-1]) - side
    return np.clip(corner, np.minimum(room, 0), np.maximum(room, 0)).astype(int)


def follow(clip, detector, tracker, progress=True, lead=0):
    """Track a clip while it is read: yields (frame or None, TrackedPose, (keypoints, confidence, deviation)) for each frame. Memory does not grow.

    While the ship is followed, only the surroundings of where it should be are looked at; what does not show there is soon looked for in the whole
    frame.
    With `Detector(batch=n)` n frames are read and looked at together, where the last tracked one lets expect the ship, and then tracked: poses come
    up to n - 1 frames late.

    Args:
        clip: `Clip`, or an iterable of (frame, fault).
        detector: `Detector`, or a function that gives keypoints, confidence and deviation for (frame, box or None).
        tracker: `Tracker` for the camera matrix of these frames.
        lead: how many groups of frames the network is ahead, in a thread of its own: with 1 it looks at the next frames while these are tracked and
            drawn, so that neither waits for the other; poses come so many groups later. What is found does not depend on the threads' pace.
    """
    nothing = np.full((len(KEYPOINTS), 2), np.nan), np.zeros(len(KEYPOINTS)), np.full(len(KEYPOINTS), np.inf)
    look = getattr(detector, "look", lambda images, boxes: [detector(image, box) for image, box in zip(images, boxes)])

    def see(group, boxes):
        good = [i for i, (frame, _) in enumerate(group) if frame is not None]
        return dict(zip(good, look([group[i][0] for i in good], [boxes[i] for i in good]))) if good else {}

    faults = []

    def groups():
        group = []
        try:
            for item in tqdm(clip, total=getattr(clip, "count", None), desc="tracking", unit="frame", disable=not progress):
                group.append(item)
                if len(group) == getattr(detector, "batch", 1):
                    yield group
                    group = []
        except Exception as error:  # what was read before is tracked first
            faults.append(error)
        yield group
        yield from [[]] * lead  # let those that wait come out

    waiting, status = collections.deque(), "lost"
    with concurrent.futures.ThreadPoolExecutor(1) as network:
        for group in groups():
            first = 1 + sum(len(earlier) for earlier, _ in waiting)
            boxes = [_expected_box(tracker, first + i) if status == "tracked" else None for i in range(len(group))]
            waiting.append((group, network.submit(see, group, boxes)))
            if len(waiting) <= lead:
                continue
            group, seen = waiting.popleft()
            seen = seen.result()
            for i, (frame, fault) in enumerate(group):
                tracked = tracker.update(*seen.get(i, nothing))
                status = tracked.status
                yield frame, dataclasses.replace(tracked, reason=fault) if fault else tracked, seen.get(i, nothing)
    if faults:
        raise faults[0]


def _expected_box(tracker, ahead):
    """The box (2, 2), top left and bottom right, in which a tracker expects the ship so many frames later, or None."""
    corners = project_pose(BOUNDING_BOX, tracker.motion.after(ahead * tracker.seconds)[0].pose, tracker.K)
    return np.stack([corners.min(0), corners.max(0)]) if np.isfinite(corners).all() else None


def summary(track):
    """One line on a track: how many frames are tracked, predicted and lost, and the mean reprojection error in pixels."""
    counts = {status: sum(t.status == status for t in track) for status in ("tracked", "predicted", "lost")}
    errors = [t.reprojection for t in track if np.isfinite(t.reprojection)]
    mean = f"; mean reprojection error {np.mean(errors):.2f} px" if errors else ""
    return f"{len(track)} frames: " + ", ".join(f"{count} {status}" for status, count in counts.items()) + mean


def export_track(path, track, K, fps, width, height):
    """Write poses to a `.csv` or `.json` file, replaced only when whole.

    One row a frame: frame (from 0), seconds, status ("tracked", "predicted", "lost"), reprojection (pixels, of the pose from the keypoints, where
    there is one), translation tx ty tz (model units), unit quaternion qw qx qy qz, matrix m00 ... m33 by rows, reason. Pose: model -> camera, x
    right, y down, z forward; empty (null) where lost. The JSON file holds {"schema": 1, "camera": {K, width, height, fps}, "frames": [...]} with the
    matrix as four rows.

    Raises ValueError for another suffix.
    """
    path, fps, width, height = Path(path), float(fps), int(width), int(height)
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"{path}: expected a .csv or .json file")
    rows = []
    for i, t in enumerate(track):
        error = t.reprojection if np.isfinite(t.reprojection) else None
        row = {"frame": i, "seconds": round(i / fps, 6), "status": t.status, "reprojection": error}
        if t.pose is None:
            row |= {"translation": None, "quaternion": None, "matrix": None}
        else:
            quaternion = np.roll(Rotation.from_matrix(t.pose[:3, :3]).as_quat(canonical=True), 1)
            row |= {"translation": t.pose[:3, 3].tolist(), "quaternion": quaternion.tolist(), "matrix": t.pose.tolist()}
        rows.append(row | {"reason": t.reason})
    if path.suffix == ".json":
        camera = {"K": np.asarray(K).tolist(), "width": width, "height": height, "fps": fps}
        _write_atomically(path, json.dumps({"schema": 1, "camera": camera, "frames": rows}, indent=1))
        return
    numbers = [f"t{a}" for a in "xyz"] + [f"q{a}" for a in "wxyz"] + [f"m{r}{c}" for r in range(4) for c in range(4)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["frame", "seconds", "status", "reprojection", *numbers, "reason"])
    for row in rows:
        values = [""] * 23 if row["matrix"] is None else [*row["translation"], *row["quaternion"], *np.ravel(row["matrix"])]
        writer.writerow([row["frame"], row["seconds"], row["status"], row["reprojection"], *values, row["reason"]])
    _write_atomically(path, text.getvalue())


# ============================================================ errors (estimate before truth)


def reprojection_errors(pose, keypoints, K, points=BOUNDING_BOX):
    """(N,) distances in pixels between the projected points and the keypoints (N, 2); inf behind the camera."""
    return np.nan_to_num(np.linalg.norm(project_pose(points, pose, K) - keypoints, axis=-1), nan=np.inf)


def rotation_error(estimate, truth):
    """Angle in degrees between two rotations (3, 3) or poses (4, 4).

    From the Frobenius norm of the difference, which stays exact for small angles where the arc cosine of the trace does not.
    Source: Hartley et al., Rotation Averaging, IJCV 103, 2013, section 4 (chordal distance = 2 sqrt(2) sin(angle / 2)).
    """
    chord = np.linalg.norm(np.asarray(estimate)[:3, :3] - np.asarray(truth)[:3, :3])
    return float(np.degrees(2 * np.arcsin(min(chord / (2 * np.sqrt(2)), 1.0))))


def translation_error(estimate, truth):
    """Distance in model units between the positions of two poses (4, 4).

    Source: e_TE of Hodan et al., On Evaluation of 6D Object Pose Estimation, ECCV Workshops 2016.
    """
    return float(np.linalg.norm(np.asarray(estimate)[:3, 3] - np.asarray(truth)[:3, 3]))


def add_error(estimate, truth, points=BOUNDING_BOX):
    """Average distance in model units between the model points under two poses (4, 4).

    Source: Hinterstoisser et al., Model Based Training, Detection and Pose Estimation of Texture-Less 3D Objects, ACCV 2012.
    """
    estimate, truth = np.asarray(estimate), np.asarray(truth)
    moved = points @ (estimate[:3, :3] - truth[:3, :3]).T + (estimate[:3, 3] - truth[:3, 3])
    return float(np.linalg.norm(moved, axis=1).mean())


def speed_score(estimate, truth):
    """Rotation error in radians plus position error relative to the true distance; 0 is perfect.

    Source: Kisantal et al., Satellite Pose Estimation Challenge: Dataset, Competition Design and Results, IEEE TAES 56(5), 2020, eq. 3-5.
    """
    relative = translation_error(estimate, truth) / np.linalg.norm(np.asarray(truth)[:3, 3])
    return float(np.radians(rotation_error(estimate, truth)) + relative)


def heatmap_errors(model, images, keypoints, sigma=10.0, batch_size=16):
    """Mean squared error of every heatmap at another sigma, and that of an all-zero prediction.

    The network's maps are widened from their own sigma to the wanted one by a Gaussian blur of sqrt(sigma^2 - own^2).

    Args:
        images: (N, H, W, 3) uint8; keypoints: (N, 8, 2) true pixels.
    Returns:
        mse, mse_of_zero: (N, 8) each, NaN for corners outside the frame.
    Source: the loss of Tompson et al., Joint Training of a Convolutional Network and a Graphical Model, NIPS 2014, as a measure; two Gaussian
        blurs in a row are one whose variance is their sum.
    """
    own, stride, margin, (height, width) = model.settings["sigma"], model.settings["stride"], model.settings.get("margin", 0), images.shape[1:3]
    if not sigma > own:
        raise ValueError(f"sigma: expected more than the network's own {own} pixels, got {sigma}")
    error, zero = np.full((2, len(images), 8), np.nan)
    for start in range(0, len(images), batch_size):
        maps = predict_heatmaps(model, images[start : start + batch_size], batch_size)
        for i, heatmap in enumerate(maps, start):
            wide = cv2.resize(heatmap, None, fx=stride, fy=stride, interpolation=cv2.INTER_CUBIC) * (sigma / own) ** 2
            wide = cv2.GaussianBlur(wide, (0, 0), np.sqrt(sigma**2 - own**2), borderType=cv2.BORDER_CONSTANT)
            wide = wide[margin : margin + height, margin : margin + width]
            truth, seen = gaussian_heatmaps(keypoints[i], (height, width), sigma), in_frame(keypoints[i], width, height)
            error[i, seen] = ((wide - truth) ** 2).mean((0, 1))[seen]
            zero[i, seen] = (truth**2).mean((0, 1))[seen]
    return error, zero


def heatmap_mse(model, images, keypoints, sigma=10.0, batch_size=16):
    """The means (mse, mse_of_zero) of `heatmap_errors` over the corners in the frame. Same arguments."""
    return tuple(float(np.nanmean(errors)) for errors in heatmap_errors(model, images, keypoints, sigma, batch_size))


def drawn_heatmap_errors(keypoints, true_keypoints, sigma=10.0, size=FRAME_SIZE):
    """Mean squared error between the heatmaps that estimated and true corners would have.

    Args:
        keypoints, true_keypoints: (N, 8, 2) pixels; NaN has an empty map.
        sigma: pixels; size: of the frame.
    Returns:
        (N, 8), NaN for true corners outside the frame. The maps are those of `gaussian_heatmaps`; being separable, they need not be drawn.
    Source: `heatmap_errors` in closed form: a product of Gaussians is a product of its profiles along x and y.
    """
    centres = np.arange(size) + 0.5
    a, b = (np.exp(-((centres - np.nan_to_num(points, nan=_FAR)[..., None]) ** 2) / (2 * sigma**2)) for points in (keypoints, true_keypoints))
    aa, ab, bb = ((p * q).sum(-1).prod(-1) for p, q in ((a, a), (a, b), (b, b)))
    return np.where(in_frame(true_keypoints, size, size), (aa - 2 * ab + bb) / size**2, np.nan)


def frame_errors(keypoints, poses, true_keypoints, true_poses, K=None, size=FRAME_SIZE):
    """Every error of every frame, to be summarised by `summarise`, resampled by `bootstrap` or sliced.

    Args:
        keypoints, true_keypoints: (N, 8, 2) pixels.
        poses: list of N (4, 4) or None; true_poses: (N, 4, 4).
        K: (3, 3); if given, the corners of the solved box are measured too: those of the pose where there is one, else the heatmaps' corners.
    Returns:
        dict of arrays: inside (N, 8) bool; corner, box (N, 8), distances to the own corner from heatmaps and pose, pixels; cells, box_cells (N, 8),
        mean |dx|, |dy| between whole pixels; drawn (N, 8), `drawn_heatmap_errors` of the solved box; nearest, renamed (N, 8), see `corner_report`;
        naming (N,) index into `NAMINGS`, -1 without a corner in sight; solved (N,) bool; rotation (degrees), translation (model units), add
        (diameters), speed: (N,), NaN without a pose.
    """
    keypoints, true_keypoints = np.asarray(keypoints, float), np.asarray(true_keypoints, float)
    solved = np.array([p is not None for p in poses], bool)
    errors = {"inside": in_frame(true_keypoints, size, size), "solved": solved, **_naming_errors(keypoints, true_keypoints, size)}
    box = np.array([k if p is None else project_pose(BOUNDING_BOX, p, K) for k, p in zip(keypoints, poses)]) if K is not None else keypoints
    errors["box"] = np.linalg.norm(np.nan_to_num(box, nan=_FAR) - true_keypoints, axis=-1)
    errors["drawn"] = drawn_heatmap_errors(box, true_keypoints, size=size)
    for name, points in (("cells", keypoints), ("box_cells", box)):
        errors[name] = np.abs(np.floor(np.nan_to_num(points, nan=0.0)) - np.floor(true_keypoints)).mean(-1)
    measures = {"rotation": rotation_error, "translation": translation_error, "add": lambda p, t: add_error(p, t) / DIAMETER, "speed": speed_score}
    for name, measure in measures.items():
        errors[name] = np.array([np.nan if p is None else measure(p, t) for p, t in zip(poses, true_poses)])
    return errors


def summarise(errors, size=FRAME_SIZE):
    """The figures of merit of `frame_errors`: a dict of numbers.

    Corner figures count corners in the frame; rotation, translation and SPEED are over frames with a pose; the share of poses, flips
    (over 90 degrees) and ADD count every frame with at least 4 corners in the frame, a missing pose as a miss.
    """
    inside, solved = errors["inside"], errors["solved"]
    enough = inside.sum(1) >= 4

    def over(name, reduce, chosen):
        return float(reduce(errors[name][chosen])) if chosen.any() else float("nan")

    def share(condition):
        return float(condition[enough].mean()) if enough.any() else float("nan")

    figures = {"frames": len(solved), "frames_with_4_corners": int(enough.sum())}
    for key, name in (("corner", "corner"), ("box_corner", "box")):
        figures |= {f"{key}_px_median": over(name, np.median, inside), f"{key}s_within_2px": over(name, lambda e: (e <= 2).mean(), inside),
                    f"{key}s_within_5px": over(name, lambda e: (e <= 5).mean(), inside)}
    with np.errstate(invalid="ignore"):
        return figures | {
            "nearest_corner_px_median": over("nearest", np.median, inside), "best_naming_px_median": over("renamed", np.median, inside),
            "namings": {name: int((errors["naming"] == i).sum()) for i, name in enumerate(NAMINGS)},
            "nmae": over("cells", np.mean, inside) / size, "box_nmae": over("box_cells", np.mean, inside) / size,
            "box_heatmap_mse_sigma10": over("drawn", np.mean, inside),
            "poses_found": share(solved), "rotation_deg_median": over("rotation", np.median, solved),
            "rotation_deg_95": over("rotation", lambda e: np.percentile(e, 95), solved),
            "translation_median": over("translation", np.median, solved), "flips": share(errors["rotation"] > 90),
            "add_0.1": share(errors["add"] <= 0.1), "add_0.02": share(errors["add"] <= 0.02), "speed_score": over("speed", np.mean, solved),
            **{key: float(np.nanmean(errors[key])) for key in ("heatmap_mse_sigma10", "heatmap_mse_sigma10_all_zero") if key in errors}}


def evaluate(keypoints, poses, true_keypoints, true_poses, K=None, size=FRAME_SIZE):
    """`summarise` of `frame_errors`; same arguments."""
    return summarise(frame_errors(keypoints, poses, true_keypoints, true_poses, K, size), size)


def bootstrap(errors, repeats=1000, level=0.95, seed=0):
    """Intervals of the figures of `summarise`, by drawing whole frames again with replacement.

    Returns a dict figure -> (low, high), the percentiles that hold `level` of the draws; figures without a spread (counts) are left out.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
    """
    rng, count = np.random.default_rng(seed), len(errors["solved"])
    draws = [summarise({k: v[chosen] for k, v in errors.items()}) for chosen in rng.integers(0, count, (repeats, count))]
    names = [k for k, v in draws[0].items() if isinstance(v, float)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a figure that is NaN in every draw stays NaN
        return {k: tuple(np.nanpercentile([d[k] for d in draws], [50 - 50 * level, 50 + 50 * level]).tolist()) for k in names}


def compare_tracks(ways, truth, seen, K, fps=30.0):
    """What several ways of tracking a clip achieve against its true poses.

    Args:
        ways: dict name -> N (4, 4) or None; truth: (N, 4, 4); seen: (N,) bool, the frames that show enough of the ship.
        K: (3, 3); fps: frames a second.
    Returns:
        dict name -> dict: poses and muzzles within 3 px (see `muzzle_error`) over the frames seen; median and 95th percentile of the rotation error
        (degrees) and the median translation error (model units) over those that have a pose in every way (NaN if none has); flips over all; `jitter`.
    """
    common = [i for i in np.flatnonzero(seen) if all(poses[i] is not None for poses in ways.values())]
    rows = {}
    for way, poses in ways.items():
        turn = np.array([np.inf if p is None else rotation_error(p, t) for p, t in zip(poses, truth)])
        move = np.array([np.inf if p is None else translation_error(p, t) for p, t in zip(poses, truth)])
        muzzle = np.array([np.inf if p is None else muzzle_error(p, t, K) for p, t in zip(poses, truth)])
        shake = jitter(poses, truth, fps)
        middle, most = np.percentile(turn[common], [50, 95]) if common else (np.nan, np.nan)
        rows[way] = {"poses": np.isfinite(turn[seen]).sum(), "rotation, deg": middle, "95 %": most,
                     "translation": np.median(move[common]) if common else np.nan, "flips": (np.isfinite(turn) & (turn > 90)).sum(),
                     "jitter, deg/s2": shake[0], "jitter, units/s2": shake[1], "muzzles within 3 px": (muzzle[seen] <= 3).mean()}
    return rows


def muzzle_error(estimate, truth, K):
    """Largest distance in pixels from a true muzzle to the nearest estimated one; blind to rolls that swap the cannons, as bolts are.

    estimate, truth: (4, 4) poses; K: (3, 3). Infinite where a muzzle lies behind the camera.
    Source: the one-sided Hausdorff distance (Huttenlocher et al., IEEE TPAMI 15(9), 1993) of the projected muzzles; for the nearest instead of the
        own point, ADD-S of Hinterstoisser et al., ACCV 2012.
    """
    drawn, wanted = (project_pose(LASERS[:, 0], pose, K) for pose in (estimate, truth))
    return float(np.nan_to_num(np.linalg.norm(wanted[:, None] - drawn[None], axis=-1).min(1).max(), nan=np.inf))


_PANEL = {  # figure -> (name in tables, format, what this project wants to reach)
    "frames": ("frames", "{:d}", ""),
    "heatmap_mse_sigma10": ("heatmap MSE at sigma 10", "{:.5f}", "≤ 0.00020"),
    "heatmap_mse_sigma10_all_zero": ("... of an all-zero prediction", "{:.5f}", ""),
    "box_heatmap_mse_sigma10": ("... of Gaussians at the solved box's corners", "{:.5f}", "≤ 0.00020"),
    "corner_px_median": ("corner error in the heatmaps, median", "{:.2f} px", "≤ 0.5 px"),
    "nearest_corner_px_median": ("... to the nearest corner", "{:.2f} px", ""),
    "corners_within_2px": ("... within 2 px", "{:.1%}", "≥ 95%"),
    "corners_within_5px": ("... within 5 px", "{:.1%}", "≥ 99%"),
    "box_corner_px_median": ("corner error of the solved box, median", "{:.2f} px", "≤ 0.5 px"),
    "box_corners_within_2px": ("... within 2 px", "{:.1%}", "≥ 95%"),
    "box_corners_within_5px": ("... within 5 px", "{:.1%}", "≥ 99%"),
    "nmae": ("NMAE (whole pixels)", "{:.2%}", "≤ 0.5%"),
    "box_nmae": ("... of the solved box", "{:.2%}", "≤ 0.5%"),
    "poses_found": ("frames with a pose, of those with 4 corners in sight", "{:.1%}", "≥ 99%"),
    "rotation_deg_median": ("rotation error, median", "{:.2f}°", "≤ 1°"),
    "rotation_deg_95": ("rotation error, 95th percentile", "{:.1f}°", "≤ 6°"),
    "flips": ("flips (over 90°)", "{:.1%}", "≤ 0.5%"),
    "translation_median": ("translation error, median", "{:.4f}", ""),
    "add_0.1": ("ADD within 0.1 diameters", "{:.1%}", "≥ 97.4%"),
    "add_0.02": ("ADD within 0.02 diameters", "{:.1%}", "≥ 50%"),
    "speed_score": ("SPEED score", "{:.4f}", "≤ 0.03"),
}


def results_table(figures, intervals=None):
    """The panel as a Markdown table: one column for each set in `figures`, a dict name -> `evaluate(...)`, with `bootstrap`'s intervals if given."""
    intervals = intervals or {}

    def cell(name, key, form):
        text = form.format(figures[name][key])
        low, high = intervals.get(name, {}).get(key, (None, None))
        return text if low is None else f"{text} ({form.format(low).split()[0].rstrip('%°')} – {form.format(high).split()[0].rstrip('%°')})"

    lines = ["| figure | target | " + " | ".join(figures) + " |", "|---|---|" + "---|" * len(figures)]
    for key, (title, form, target) in _PANEL.items():
        if not all(key in f for f in figures.values()):  # not measured
            continue
        lines.append(f"| {title} | {target} | " + " | ".join(cell(name, key, form) for name in figures) + " |")
    return "\n".join(lines)


def write_results(folder, figures, readme=None, intervals=None):
    """Write `weights/xwing_eval.json` under `folder` and, if given, the table between the README's two result markers."""
    rounded = {name: {k: round(v, 9) if isinstance(v, float) else v for k, v in f.items()} for name, f in figures.items()}
    bounds = {name: {k: [round(v, 9) for v in pair] for k, pair in f.items()} for name, f in (intervals or {}).items()}
    _write_atomically(Path(folder) / "weights" / "xwing_eval.json", json.dumps({"figures": rounded, "intervals_95": bounds}, indent=1) + "\n")
    if readme is not None:
        text = Path(readme).read_text()
        table = f"<!-- results -->\n{results_table(rounded, bounds)}\n<!-- /results -->"
        if not re.search("<!-- results -->.*<!-- /results -->", text, re.S):
            raise ValueError(f"{readme}: the markers <!-- results --> and <!-- /results --> are missing")
        _write_atomically(readme, re.sub("<!-- results -->.*<!-- /results -->", lambda _: table, text, flags=re.S))


# ============================================================ drawing and animation

_SHIFT = 4  # fractional bits of OpenCV's drawing functions


def _cv_point(point):
    """Continuous (x, y) pixels -> OpenCV's fixed-point pixel-index coordinates."""
    return tuple(int(v) for v in np.round((np.clip(point, -(2**20), 2**20) - 0.5) * 2**_SHIFT))


def draw_box(image, keypoints, colour=(90, 255, 90)):
    """Return a copy of the frame (H, W, 3) uint8 with the edges of the box of (8, 2) corners; edges with a NaN end are left out."""
    image = np.array(image, order="C")
    for a, b in BOX_EDGES:
        if np.isfinite(keypoints[[a, b]]).all():
            cv2.line(image, _cv_point(keypoints[a]), _cv_point(keypoints[b]), colour, 1, cv2.LINE_AA, _SHIFT)
    return image


def draw_axes(image, pose, K, length=0.15):
    """Return a copy of the frame with the model axes drawn from the model's origin: x red, y green, z blue; `length` in model units."""
    image = np.array(image, order="C")
    origin, *ends = project_pose(np.concatenate([np.zeros((1, 3)), np.eye(3) * length]), pose, K)
    for end, colour in zip(ends, ((255, 70, 70), (80, 255, 80), (90, 140, 255))):
        if np.isfinite([origin, end]).all():
            cv2.arrowedLine(image, _cv_point(origin), _cv_point(end), colour, 1, cv2.LINE_AA, _SHIFT, 0.15)
    return image


def corner_covariance(pose, covariance, K, points=BOUNDING_BOX):
    """(N, 2, 2) square pixels: how far a pose's covariance (6, 6) moves the projections of model points (N, 3), to first order."""
    jacobian = cv2.projectPoints(np.asarray(points) @ pose[:3, :3].T, np.zeros(3), pose[:3, 3], K, None)[1][:, :6].reshape(-1, 2, 6)
    return jacobian @ covariance @ np.swapaxes(jacobian, 1, 2)


def draw_tracked(image, tracked, K, box=True, axes=True, ellipses=True, path=0.5):
    """Return a copy of the frame with what a `TrackedPose` says; each overlay can be left out.

    box: green where tracked, yellow where predicted; axes: see `draw_axes`; ellipses: the corners' two standard deviations; path: where the
    ship's middle will be for so many seconds at its present velocity.
    """
    image = np.array(image, order="C")
    if tracked.pose is None:
        return image
    corners = project_pose(BOUNDING_BOX, tracked.pose, K)
    colour = (90, 255, 90) if tracked.status == "tracked" else (255, 220, 60)
    if box:
        image = draw_box(image, corners, colour)
    if ellipses and tracked.covariance is not None:
        for corner, spread in zip(corners, corner_covariance(tracked.pose, tracked.covariance, K)):
            values, vectors = np.linalg.eigh(spread)
            size = 2 * np.sqrt(np.maximum(values, 0))
            if np.isfinite(corner).all() and size.max() < image.shape[1]:
                angle = float(np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])))
                axes_px = tuple(int(round(s * 2**_SHIFT)) for s in size[::-1])
                cv2.ellipse(image, _cv_point(corner), axes_px, angle, 0, 360, (120, 200, 255), 1, cv2.LINE_AA, _SHIFT)
    if axes:
        image = draw_axes(image, tracked.pose, K)
    if path and tracked.velocity is not None:
        ahead = tracked.pose[:3, 3] + np.linspace(0, path, 9)[:, None] * tracked.velocity[3:]
        points = [_cv_point(p) for p in (ahead[ahead[:, 2] > 0.05] / ahead[ahead[:, 2] > 0.05, 2:]) @ K[:2].T]
        for start, end in zip(points, points[1:]):
            cv2.line(image, start, end, (255, 160, 255), 1, cv2.LINE_AA, _SHIFT)
    return image


def tracked_pictures(clip, track, K, detector, shown):
    """Yield the chosen frames of a tracked clip, `draw_tracked` on the left and `draw_heatmaps` of the corners on the right, (size, 2 size, 3) uint8.

    clip: `Clip`; track: list of `TrackedPose`; K: (3, 3); detector: `Detector`; shown: numbers of frames, never falling, see `write_clip`.
    """
    for i, frame in zip(shown, at_frames(clip, shown)):
        square, scale, offset = letterbox(frame, detector.size)
        small = np.diag([scale, scale, 1]) @ K + np.array([[0, 0, offset[0]], [0, 0, offset[1]], [0, 0, 0]])
        yield np.hstack([draw_tracked(square, track[i], small), draw_heatmaps(detector.heatmaps(square[None])[0, ..., :8], detector.size)])


def viewer(pictures, start=0, step=1, fps=12.5):
    """Return a widget that shows any of the pictures at a slider's move, or all of them as a film.

    The pictures are drawn and packed (JPEG, at most 640 px wide) before it is shown, so that a move of the slider only picks one. It needs neither
    `interact` nor an `Output` widget: a notebook with those can hang for ever where it is executed without a browser (jupyter/nbclient issue 312).

    Args:
        pictures: iterable of (H, W, 3) uint8 RGB; the i-th shows frame i * step.
        start: number of the frame that shows first.
        step: frames from one picture to the next.
        fps: pictures a second while it plays.
    """
    import ipywidgets

    packed = []
    for picture in pictures:
        scale = min(1.0, 640 / picture.shape[1])
        small = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else picture
        packed.append(cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes())
    if not packed:
        raise ValueError("pictures: expected at least one, got none")
    last, start = (len(packed) - 1) * step, start // step * step
    slider = ipywidgets.IntSlider(start, 0, last, step, description="frame")
    play = ipywidgets.Play(value=start, min=0, max=last, step=step, interval=round(1000 / fps))
    ipywidgets.jslink((play, "value"), (slider, "value"))
    image = ipywidgets.Image(value=packed[slider.value // step], format="jpeg")
    slider.observe(lambda change: image.set_trait("value", packed[change["new"] // step]), "value")
    return ipywidgets.VBox([image, ipywidgets.HBox([play, slider])])


def draw_heatmaps(heatmaps, size):
    """One picture (size, size, 3) uint8 of all the heatmaps (H, W, K) of a frame, each in a colour of its own, the brightest in front."""
    heatmaps = np.asarray(heatmaps, np.float32)
    hues = np.stack([np.arange(heatmaps.shape[-1]) * 180 // heatmaps.shape[-1], *[np.full(heatmaps.shape[-1], 255)] * 2], -1).astype(np.uint8)
    colours = cv2.cvtColor(hues[None], cv2.COLOR_HSV2RGB)[0]
    picture = colours[heatmaps.argmax(-1)] * np.clip(heatmaps.max(-1), 0, 1)[..., None]
    return cv2.resize(picture.astype(np.uint8), (size, size), interpolation=cv2.INTER_LINEAR)


class Lasers:
    """The four cannons through a shot: two fire at a time, in turn, and every bolt keeps the course on which it was fired.

        lasers = Lasers(fps=30)
        for frame, pose in zip(frames, poses):
            frame = draw_bolts(frame, lasers.step(pose), K)

    The camera stands still, so its frame serves as the world's. A frame without a pose fires nothing; what has been fired flies on.
    """

    def __init__(self, fps=30.0, rate=5.0, speed=2.0, length=0.16, reach=3.0, jitter=0.0, seed=0, colour=(255, 60, 40), radius=0.0032):
        """rate: volleys a second; speed: model units a second; length, reach: of a bolt and of its flight, model units; jitter: how much
        the time between two volleys varies, as a share of it, drawn with `seed`; colour and radius: see `draw_bolts`. ValueError where one is
        not positive (jitter: in [0, 1))."""
        for name, value in (("fps", fps), ("rate", rate), ("speed", speed), ("length", length), ("reach", reach), ("radius", radius)):
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter: expected a share in [0, 1), got {jitter}")
        self.seconds, self.rate, self.speed, self.length, self.reach, self.jitter = 1 / fps, rate, speed, length, reach, jitter
        self.colour, self.radius = tuple(colour), radius
        self.random, self.frame, self.volley, self.due = np.random.default_rng(seed), 0, 0, 0.0
        self.fired = np.zeros((0, 7))  # second, muzzle, direction of each bolt in flight

    def step(self, pose):
        """Go on by one frame, in which the ship has that pose (4, 4) or None, and return the bolts (B, 2, 3): tail and head in the camera's frame."""
        now = self.frame * self.seconds
        self.frame += 1
        while self.due <= now + 1e-9:
            if pose is not None:
                muzzle, aim = np.moveaxis(LASERS[[0, 3] if self.volley % 2 else [1, 2]] @ pose[:3, :3].T + pose[:3, 3], 1, 0)
                direction = (aim - muzzle) / np.linalg.norm(aim - muzzle, axis=1, keepdims=True)
                self.fired = np.concatenate([self.fired, np.column_stack([[self.due] * 2, muzzle, direction])])
            self.volley += 1
            self.due += (1 + self.jitter * self.random.uniform(-1, 1)) / self.rate
        head = (now - self.fired[:, 0]) * self.speed
        self.fired, head = self.fired[head - self.length < self.reach], head[head - self.length < self.reach]
        ends = np.stack([np.maximum(head - self.length, 0), head], 1)[head > 0]
        flying = self.fired[head > 0]
        return flying[:, None, 1:4] + ends[..., None] * flying[:, None, 4:]


def draw_bolts(image, bolts, K, depth=None, radius=0.0032, colour=(255, 60, 40), near=0.05):
    """Return a copy of the frame with laser bolts in perspective, glowing.

    Args:
        image: (H, W, 3) uint8; K: (3, 3).
        bolts: (B, 2, 3) tail and head in the camera's frame, model units, see `Lasers`.
        depth: (H, W) model units or None, of what may hide bolts, see `mesh_depth`.
        radius: of a bolt, in model units; it tapers towards the tail and narrows with the distance.
        near: bolts are cut this close to the camera, in model units.
    """
    image = np.array(image, order="C")
    core = np.zeros(image.shape[:2], np.uint8)
    for segment in np.asarray(bolts, float).reshape(-1, 2, 3):
        segment = _clip_near(segment, near)
        if segment is not None:
            _fill_bolt(core, segment, radius, K, depth)
    if not core.any():
        return image
    scale = max(core.shape) / FRAME_SIZE
    left, top, width, height = cv2.boundingRect(core)
    reach = int(np.ceil(20 * scale))  # of the glow; beyond it nothing changes
    part = np.s_[max(top - reach, 0) : top + height + reach, max(left - reach, 0) : left + width + reach]
    light = core[part].astype(np.float32) / 255
    halo = cv2.GaussianBlur(light, (0, 0), 2.2 * scale) * 1.1 + cv2.GaussianBlur(light, (0, 0), 5.0 * scale) * 0.7
    glow = halo[..., None] * np.array(colour, np.float32) + light[..., None] * np.array([255, 215, 190], np.float32)
    image[part] = np.clip(image[part] + glow, 0, 255).astype(np.uint8)
    return image


def _clip_near(segment, near):
    """Cut a camera-frame segment (2, 3) at depth `near`; None if it lies wholly before it."""
    depth = segment[:, 2]
    if (depth < near).all():
        return None
    segment = segment.copy()
    for i in np.flatnonzero(depth < near):
        t = (near - depth[i]) / (depth[1 - i] - depth[i])
        segment[i] = segment[i] + t * (segment[1 - i] - segment[i])
    return segment


def _fill_bolt(canvas, segment, radius, K, depth=None):
    """Draw one bolt, tail to head, as a filled quadrilateral of perspective width (at least a third of a pixel), where nothing hides it."""
    tail, head = (segment / segment[:, 2:]) @ K[:2].T
    widths = np.maximum(K[0, 0] * radius / segment[:, 2] * [0.35, 1.0], 0.33)
    length = max(np.linalg.norm(head - tail), 1e-9)
    along = (head - tail) / length
    across = np.array([-along[1], along[0]])
    outline = [tail + across * widths[0], head + across * widths[1], head + along * widths[1], head - across * widths[1], tail - across * widths[0]]
    low, high = np.floor(np.min(outline, 0)) - 2, np.ceil(np.max(outline, 0)) + 2
    (left, top), (right, bottom) = np.clip([low, high], 0, canvas.shape[::-1]).astype(int)
    if left >= right or top >= bottom:
        return
    box = np.s_[top:bottom, left:right]
    fresh = np.zeros((bottom - top, right - left), np.uint8)
    cv2.fillConvexPoly(fresh, np.array([_cv_point(p - [left, top]) for p in outline], np.int32), 255, cv2.LINE_AA, _SHIFT)
    if depth is not None and np.isfinite(depth[box]).any():
        x, y = np.arange(left, right) + 0.5 - tail[0], np.arange(top, bottom)[:, None] + 0.5 - tail[1]
        place = np.clip((x * along[0] + y * along[1]) / length, 0, 1)
        inverse = (1 - place) / segment[0, 2] + place / segment[1, 2]  # 1 / depth is linear in the picture
        fresh[1 / inverse >= depth[box] + 0.004] = 0
    np.maximum(canvas[box], fresh, out=canvas[box])


def _shot(image, bolts, lasers, triangles, pose, K):
    """The frame with the bolts of some `Lasers`, hidden by the hull's triangles at a pose where both are known."""
    depth = _depth_about(bolts, triangles, pose, K, *image.shape[1::-1], lasers.radius)
    return draw_bolts(image, bolts, K, depth, lasers.radius, lasers.colour)


def _depth_about(bolts, triangles, pose, K, width, height, radius=0.0032, near=0.05):
    """`mesh_depth` of the triangles that may hide bolts, those whose boxes in the picture meet a bolt's; None without triangles, pose or bolts."""
    segments = [_clip_near(segment, near) for segment in bolts]
    segments = np.array([segment for segment in segments if segment is not None])
    if triangles is None or pose is None or not len(segments):
        return None
    ends = (segments / segments[..., 2:]) @ K[:2].T
    widths = K[0, 0] * radius / segments[..., 2:] + 2  # and two pixels for smooth edges
    low, high = (ends - widths).min(1), (ends + widths).max(1)  # (B, 2)
    seen = triangles @ pose[:3, :3].T + pose[:3, 3]
    corners = seen / np.maximum(seen[..., 2:], 1e-6) @ K[:2].T  # `triangle_map` leaves out those that reach behind the camera
    meets = ((corners.min(1)[:, None] <= high) & (corners.max(1)[:, None] >= low)).all(-1).any(1)
    return mesh_depth(triangles[meets], pose, K, width, height) if meets.any() else None


def animate(frames, poses, K, path, fps=25, source_fps=30, lasers=None, mesh=None, progress=False):
    """Write a clip with laser bolts.

    Args:
        frames: N (H, W, 3) uint8 arrays or paths of pictures, or a `Clip`. What cannot be read repeats the frame before it, with a warning.
        poses: N (4, 4) or None; a frame without a pose fires no bolts.
        K: (3, 3) camera matrix.
        path: `.gif` or `.mp4`; replaced only when the whole clip is made.
        fps, source_fps: of the file and of the frames; real time is kept by leaving frames out or showing them twice.
        lasers: `Lasers` of the source's frame rate, or None for the usual ones.
        mesh: from `load_mesh`; with it the hull hides the bolts behind it.
    Raises:
        ValueError: no frames, numbers that differ, a rate that is not positive (or over 100 in a GIF), another suffix, a first frame that
        cannot be read.
        FilmError: the disk is full, or ffmpeg stopped. FileNotFoundError: no such folder.
    """
    frames = frames if isinstance(frames, Clip) else list(frames)
    if not len(poses) or (isinstance(frames, list) and len(frames) != len(poses)):
        raise ValueError(f"expected as many poses as frames and at least one, got {len(list(frames))} frames and {len(poses)} poses")
    K = _check_camera_matrix(K)
    poses = [None if pose is None else _check_array(pose, (4, 4), f"pose of frame {i}") for i, pose in enumerate(poses)]
    if not source_fps > 0:
        raise ValueError(f"expected positive rates, got source_fps {source_fps}")
    write_clip(lambda shown: _drawn(frames, poses, K, shown, lasers or Lasers(source_fps), mesh, progress), len(poses), path, fps, source_fps)


def write_clip(draw, count, path, fps=25, source_fps=30):
    """Write pictures as a `.gif` with one palette or an `.mp4`, replaced only when whole.

    Args:
        draw: a function of the numbers of the frames that are shown, in order; yields a picture (H, W, 3) uint8 for each.
        count: frames of the source; some are left out or shown twice where the rates (frames a second) differ.
    Raises:
        ValueError: a rate that is not positive (or over 100 in a GIF), another suffix.
    """
    path = Path(path)
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"{path}: expected a .gif or .mp4 file")
    if not (fps > 0 and source_fps > 0) or (path.suffix == ".gif" and fps > 100):
        raise ValueError(f"expected positive rates, and at most 100 frames a second in a GIF, got fps {fps} and source_fps {source_fps}")
    _check_folder(path)
    if path.suffix == ".gif":
        fps = 100 / round(100 / fps)  # a GIF counts in hundredths of a second
    pictures = draw((np.arange(0, count - 1e-9, source_fps / fps) + 1e-9).astype(int))
    part = path.with_name(f"part-{os.getpid()}-{path.name}")
    try:
        (_write_gif if path.suffix == ".gif" else _write_mp4)(pictures, part, fps)
        os.replace(part, path)
    finally:
        if hasattr(pictures, "close"):
            pictures.close()
        part.unlink(missing_ok=True)


def _drawn(frames, poses, K, shown, lasers, mesh, progress):
    """Yield the chosen frames with their bolts."""
    triangles = None if mesh is None else occluder(mesh)
    step = -1
    for i, image in zip(tqdm(shown, desc="drawing", unit="frame", disable=not progress), at_frames(frames, shown)):
        while step < i:  # frames that are left out count too
            step += 1
            bolts = lasers.step(poses[step])
        yield _shot(image, bolts, lasers, triangles, poses[i], K)


def at_frames(frames, shown):
    """Yield frames (H, W, 3) uint8 by their numbers, which must not fall; see `animate` for what frames can be."""
    image, last, rest = None, -1, iter(frames)
    for i in shown:
        while last < i:
            last += 1
            item = next(rest, (None, "the clip is shorter than the poses"))
            if last < i and not isinstance(item, tuple):
                continue  # arrays and paths that are not shown need not be read
            try:
                if isinstance(item, tuple) and item[0] is None:
                    raise ValueError(item[1])
                new = item[0] if isinstance(item, tuple) else item if isinstance(item, np.ndarray) else read_image(item)
                if image is not None and new.shape != image.shape:
                    raise ValueError(f"expected {image.shape[1]}x{image.shape[0]} pixels like the frames before, got {new.shape[1]}x{new.shape[0]}")
                image = new
            except (ValueError, FileNotFoundError) as error:
                if image is None and last == i:
                    raise
                warnings.warn(f"frame {last} repeats the one before: {error}", stacklevel=2)
        yield image


def _write_gif(pictures, path, fps):
    """One palette for the whole clip, taken from a mosaic of its frames, so that the colours do not flicker; loops for ever."""
    pictures = [Image.fromarray(p) for p in pictures]
    palette = _clip_palette(np.concatenate([np.asarray(p).reshape(-1, 3) for p in pictures[:: max(1, len(pictures) // 24)]]))
    indexed = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures]
    indexed[0].save(path, format="GIF", save_all=True, append_images=indexed[1:], duration=round(100 / fps) * 10, loop=0, disposal=1)


def _clip_palette(pixels):
    """A PIL image with a palette of 256 colours for (N, 3) uint8 pixels: half for the few that are bright or warm (ship, bolts), half for the sky."""
    warm = (pixels.max(1) > 130) | (pixels[:, 0] > pixels[:, 2].astype(int) + 8)
    colours = []
    for part in (pixels[warm], pixels[~warm]):
        if len(part):
            strip = Image.fromarray(part[None]).quantize(128, method=Image.Quantize.MEDIANCUT)
            colours += strip.getpalette()[: 3 * 128]
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours)
    return palette


def _write_mp4(pictures, path, fps):
    """H.264 by ffmpeg, picture by picture; odd sizes get a black line, which H.264 cannot do without. FilmError where not all of them arrive."""
    import imageio_ffmpeg

    writer, shape, sent = None, None, 0
    try:
        for picture in pictures:
            if picture.shape != (shape or picture.shape):
                raise ValueError(f"{path}: expected {shape[1]}x{shape[0]} pixels like the first picture, got {picture.shape[1]}x{picture.shape[0]}")
            shape, sent = picture.shape, sent + 1
            height, width = (side + side % 2 for side in picture.shape[:2])
            if writer is None:
                writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=float(fps), codec="libx264", quality=8, macro_block_size=2,
                                                     output_params=["-preset", "veryfast"], ffmpeg_log_level="error")
                writer.send(None)
            even = np.zeros((height, width, 3), np.uint8)
            even[: picture.shape[0], : picture.shape[1]] = picture
            try:
                writer.send(even)
            except OSError as error:
                raise FilmError(f"{path}: ffmpeg stopped after {sent - 1} frames; is the disk full?") from error
    finally:
        if writer is not None:
            writer.close()  # also after an error: ffmpeg would write on
    written = 0
    with contextlib.suppress(RuntimeError, OSError, ValueError):
        written = imageio_ffmpeg.count_frames_and_secs(str(path))[0] if sent else 0
    if written != sent:
        raise FilmError(f"{path}: only {written} of {sent} frames could be written; is the disk full?")


class FilmError(OSError):
    """A film could not be written whole."""


def _check_folder(path):
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder to write {path.name} to; make it first")


def _ahead(items, size=8):
    """Yield the items of an iterable that a thread of its own works off, at most `size` ahead; its errors arrive here."""
    pipe, end, stop, items = queue.Queue(size), object(), threading.Event(), iter(items)

    def put(item):
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return pipe.put(item, timeout=0.1)

    def work():
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((end, None))
        except BaseException as error:  # noqa: BLE001 (it is raised again by the thread that reads)
            put((end, error))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while True:
            item, error = pipe.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        worker.join()
        if hasattr(items, "close"):
            items.close()


def _to_the_fault(clip):
    """The frames of a clip; an error while it is read becomes the fault of its last frame."""
    try:
        yield from clip
    except (OSError, ValueError, RuntimeError) as error:
        yield None, f"the clip could not be read further: {error}"


def film(clip, detector, tracker, path, fps=30.0, lasers=None, mesh=None, progress=True, lead=1):
    """Track a clip and write it with its bolts as it is read, in one pass with constant memory: for long or live footage.

    Reading, the network, tracking, and drawing with writing run in threads side by side. Each pose rests on the frames up to its own; see
    `track_clip` and `animate` for steadier poses in two passes.

    Args:
        clip, detector, tracker, lead: see `follow`.
        path: `.mp4`, replaced only when whole. Where reading stops early it holds the frames before, and the track's last reason says why.
        fps: frames a second of clip and film.
        lasers, mesh: see `animate`.
    Returns:
        list of `TrackedPose` without covariance and velocity, as far as the clip could be read; with a warning where the film could not be written.
    Raises:
        ValueError: another suffix than `.mp4`. FileNotFoundError: no such folder.
    """
    path, track = Path(path), []
    if path.suffix != ".mp4":
        raise ValueError(f"{path}: expected an .mp4 file")
    _check_folder(path)
    lasers, triangles = lasers or Lasers(fps), None if mesh is None else occluder(mesh)

    def tracked():
        with contextlib.closing(_ahead(clip)) as frames:
            for frame, state, _ in follow(_to_the_fault(frames), detector, tracker, progress, lead):
                track.append(dataclasses.replace(state, covariance=None, velocity=None))
                yield frame, state.pose

    def drawn():
        last, unread = None, 0
        with contextlib.closing(_ahead(tracked())) as states:
            for frame, pose in states:
                bolts = lasers.step(pose)
                if frame is None and last is None:
                    unread += 1
                    continue
                last = last if frame is None else frame
                picture = _shot(last, bolts, lasers, triangles, pose, tracker.K)
                yield from [picture] * (unread + 1)  # what could not be read at the start shows the first frame
                unread = 0

    part, threads = path.with_name(f"part-{os.getpid()}-{path.name}"), cv2.getNumThreads()
    cv2.setNumThreads(1)  # the stages are the threads; pictures are too small to be shared out
    try:
        with contextlib.closing(drawn()) as pictures:
            try:
                _write_mp4(pictures, part, fps)
                fault = "" if part.exists() else "no frame could be read"
            except FilmError as error:
                fault = str(error)
                collections.deque(pictures, maxlen=0)  # the track is worth having without the film
        if fault:
            warnings.warn(f"{path}: not written: {fault}", stacklevel=2)
        else:
            os.replace(part, path)
    finally:
        cv2.setNumThreads(threads)
        part.unlink(missing_ok=True)
    return track
