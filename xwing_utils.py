"""Track a known rigid object: frames to heatmaps, heatmaps to keypoints, keypoints to a 6-DoF pose.

    model = load_model("weights/xwing.weights.h5")
    keypoints, confidence = predict_keypoints(model, images)  # (N, 8, 2) pixels, (N, 8)
    pose = solve_pose(keypoints[0], K, confidence[0])         # (4, 4) model -> camera, or None

Read it from top to bottom: files, target, camera, heatmaps, batches, network, pose, drawing. The
package `xwing` holds what goes beyond: meshes, alignment on the pixels, tracking, footage, films.

Conventions:

* Points are (x, y), arrays are [row, column]. Pixel coordinates are continuous. The origin is the
  top-left *corner* of the frame, so pixel [r, c] has its centre at (c + 0.5, r + 0.5). Only an
  argmax reads indices.
* The letters: N frames or points, K keypoints (or the camera matrix), H height, W width. Channels
  come last.
* Lengths are in model units, the units of the target's mesh. Thresholds on lengths are fractions
  of the target's diameter, so that a mesh in millimetres works like one in metres.
* The X-wing's model frame has x across the wings, -y towards the nose, +z up; it is 0.345 long.
* A model matrix (model -> world) and the camera files follow OpenGL: the camera looks down -z,
  y points up. A *pose* is (4, 4), model -> OpenCV camera: x right, y down, z forward.
* Angles are in degrees; the entries of rotation vectors, of steps and of covariances in radians.
"""

import ast
import contextlib
import dataclasses
import functools
import glob
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import psutil
from PIL import Image, ImageOps

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow logs errors only
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # albumentations asks no server for updates

# Keras keeps its settings here, apart from those that other projects have in its usual folder.
_KERAS_HOME = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser()
if _KERAS_HOME.name != "xwing":
    os.environ["KERAS_HOME"] = str(_KERAS_HOME / "xwing")

ROOT = Path(__file__).resolve().parent  # of the repository


def _check_copy(here):
    """Raise ImportError if a folder lies in another copy of the repository than this one.

    Else that copy would use the code of this one, and write into its folders.
    """
    copies = (folder for folder in (here, *here.parents) if (folder / "xwing_utils.py").is_file())
    copy = next(copies, ROOT)
    if copy != ROOT and (ROOT / "pyproject.toml").is_file():
        raise ImportError(
            f"{copy} is another copy of this project than the one that Python imports, {ROOT}; "
            "run make in it, which sets up its own environment"
        )


_check_copy(Path.cwd())

# ============================================================ files


def load_dataset(folder: str | Path) -> tuple[list[Path], np.ndarray]:
    """Read a set: its N frames in the order of their numbers, and their model matrices (N, 4, 4).

    Raises:
        FileNotFoundError, ValueError: there is no frame, a matrix is missing or is not rigid.
    """
    paths = list_frames(folder)
    files = [path.with_name(f"{path.stem}_mat.json") for path in paths]
    matrices = [rigid_matrix(read_json(file), str(file)) for file in files]
    return paths, np.array(matrices)


def list_frames(folder: str | Path) -> list[Path]:
    """List the numbered JPEG files of a folder in the order of their numbers.

    Raises:
        FileNotFoundError: there is none.
    """
    files = Path(folder).glob("*")
    paths = [path for path in files if re.fullmatch(r"\d+\.jpe?g", path.name.lower())]
    if not paths:
        expected = "expected a folder with frames 0.jpg, 1.jpg, ..., found none"
        raise FileNotFoundError(f"{folder}: {expected}")
    return sorted(paths, key=lambda path: (int(path.stem), path.stem))


def load_camera(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the camera of a set.

    Args:
        path: a camera file, or the folder that holds `camera_info.json`.

    Returns:
        the model-view matrix (4, 4), world -> OpenGL camera, and the projection matrix (4, 4),
        OpenGL camera -> clip space.

    Raises:
        FileNotFoundError, ValueError: no such file, or not a camera; the message names the file.
    """
    if Path(path).is_dir():
        path = Path(path) / "camera_info.json"

    info = read_json(path)
    names = {"model_view_matrix", "projection_matrix"}
    missing = names.difference(info if isinstance(info, dict) else ())
    if missing:
        text = f"{' and '.join(sorted(missing))} missing; expected a set's camera file"
        raise ValueError(f"{path}: {text}")

    name = f"{path}, projection_matrix"
    projection = _finite_matrix(info["projection_matrix"], name)
    perspective = np.allclose(projection[3], [0, 0, -1, 0])
    if projection[0, 0] <= 0 or projection[1, 1] <= 0 or not perspective:
        raise ValueError(f"{name}: no OpenGL perspective projection; got\n{projection}")

    view = rigid_matrix(info["model_view_matrix"], f"{path}, model_view_matrix")
    return view, projection


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a picture of any kind as (H, W, 3) uint8 RGB, upright.

    Args:
        path: of the file.
        size: (width, height) in pixels that the picture must have; None takes any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, no picture, or of another size.
    """
    try:
        with Image.open(path) as image:
            pixels = _upright_rgb(image)
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow raises many kinds, struct.error for damaged EXIF among them
        text = f"cannot be read as a picture ({error}); copy or render it again"
        raise ValueError(f"{printable(path)}: {text}") from None

    if size is not None and pixels.shape[1::-1] != tuple(size):
        expected = f"{size[0]}x{size[1]} pixels"
        got = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise ValueError(f"{path}: expected {expected}, got {got}; resize the whole set")
    return pixels


def _upright_rgb(image):
    """Return a Pillow image as (H, W, 3) uint8, turned as its EXIF header says."""
    upright = ImageOps.exif_transpose(_with_eight_bits(image))
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
    elif upright.mode != "L":
        upright = upright.convert("RGB")
    return rgb_image(np.array(upright))


def _with_eight_bits(image):
    """A Pillow image with at most 8 bits a channel; see `rgb_image` for the rule.

    Pillow holds 16 bits of grey only: it would cut colours down, and grey off at 255.
    """
    is_grey = image.mode.startswith(("I", "F"))
    is_deep = any(";16" in str(tile.args) for tile in image.tile)
    if not is_grey and not is_deep:
        return image

    if is_grey:
        pixels = np.asarray(image)
        if pixels.dtype == np.int32:  # Pillow's way to hold 16 bits of some formats
            pixels = pixels.clip(0, 65535).astype(np.uint16)
    else:
        pixels = cv2.imdecode(np.fromfile(image.filename, np.uint8), cv2.IMREAD_UNCHANGED)
        has_alpha = pixels.shape[2] == 4
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA if has_alpha else cv2.COLOR_BGR2RGB)
    reduced = Image.fromarray(_eight_bits(pixels))
    reduced.getexif().update(image.getexif())
    return reduced


def rgb_image(image: np.ndarray) -> np.ndarray:
    """Return a picture as a contiguous array (H, W, 3) uint8 RGB; one that is so stays as it is.

    Grey is repeated in all channels, and RGBA is set on black. Of 16 bits (uint16) 65535 is white,
    of floating-point numbers 1.0 is. Nothing tells RGB from BGR, which OpenCV reads: turn that with
    `image[..., ::-1]`.

    Args:
        image: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); uint8, uint16 or floats in [0, 1].

    Raises:
        ValueError: it is something else; the message says what was received.
    """
    if not isinstance(image, np.ndarray):
        got = type(image).__name__
        raise ValueError(f"image: expected an array (H, W, 3) uint8 RGB, got {got}")
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.ndim not in (2, 3) or channels not in (1, 3, 4) or not image.size:
        raise ValueError(f"image: expected the shape (H, W, 3), RGB, got {image.shape}")

    pixels = _eight_bits(image)
    if channels == 1:
        pixels = np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)
    elif channels == 4:
        colour, alpha = pixels[..., :3].astype(np.uint16), pixels[..., 3:]
        pixels = ((colour * alpha + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(pixels)


def _eight_bits(image):
    """The values of a picture as uint8, or the ValueError of `rgb_image`."""
    if image.dtype == np.uint8:
        return image
    if image.dtype == np.uint16:
        return np.round(image / np.float32(257)).astype(np.uint8)
    if image.dtype.kind != "f":
        raise ValueError(f"image: expected uint8, uint16 or floats in [0, 1], got {image.dtype}")

    low, high = image.min(), image.max()
    if not (low >= 0 and high <= 1):  # also NaN
        raise ValueError(
            f"image: expected floats in [0, 1], got {low:g} to {high:g}; scale them, or use uint8"
        )
    return np.round(image * np.float32(255)).astype(np.uint8)


def printable(path: str | Path) -> str:
    """Return a path as text that can be printed and written; marks stand for bytes beyond UTF-8."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", str(path))


def read_json(path: str | Path) -> object:
    """Read a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); write it again") from None


def check_positive(name: str, value: float) -> None:
    """Raise a ValueError that names the setting if a value is not a positive, finite number."""
    if not 0 < value < np.inf:
        raise ValueError(f"{name}: expected a positive number, got {value}")


def check_array(value: object, shape: Sequence[int | None], name: str) -> np.ndarray:
    """Return `value` as a float64 array of `shape`, where None stands for any length.

    Raises:
        ValueError: the value is not numeric or has another shape; the message says what it is.
    """
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        got = str(value)[:80]
        raise ValueError(f"{name}: expected numbers of shape {shape}, got {got}") from None

    same_rank = array.ndim == len(shape)
    same_lengths = all(want in (None, got) for want, got in zip(shape, array.shape))
    if not (same_rank and same_lengths):
        text = f"{name}: expected shape {shape}, got {array.shape}"
        raise ValueError(text.replace("None", "N"))
    return array


def _finite_matrix(value, name):
    """Return (4, 4) float64, or raise ValueError."""
    matrix = check_array(value, (4, 4), name)
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name}: the matrix has NaN or infinite entries")
    return matrix


def rigid_matrix(value: object, name: str) -> np.ndarray:
    """Return `value` as a rigid motion (4, 4) float64: a rotation and a translation.

    Numbers with three decimals are enough: where rounding shows, the nearest rotation is taken.

    Raises:
        ValueError: it is something else; the message says what, and names `name`.
    """
    matrix = _isometry(_finite_matrix(value, name), name)
    if np.linalg.det(matrix[:3, :3]) < 0:
        text = "the matrix mirrors (determinant -1); a pose must be a rotation"
        raise ValueError(f"{name}: {text}")
    return matrix


EXACT = 1e-4  # greatest error of R R^T at which a matrix is taken as it is
ROUNDED = 2e-3  # and at which it is a rotation with numbers of three decimals


def _isometry(matrix, name):
    """Return a matrix (4, 4) that keeps all distances; without rounding errors, if it has any.

    Source: Schonemann, Psychometrika 31(1), 1966 (the nearest orthogonal matrix).
    """
    linear = matrix[:3, :3]
    error = np.abs(linear @ linear.T - np.eye(3)).max()
    last_row_error = np.abs(matrix[3] - [0, 0, 0, 1]).max()
    if error > ROUNDED or last_row_error > EXACT:
        lengths = ", ".join(f"{length:.4g}" for length in np.linalg.norm(linear, axis=0))
        text = "not a rigid motion (rotation and translation, no scale, three decimals at least)"
        raise ValueError(f"{name}: {text}; its axes have the lengths {lengths}; got\n{matrix}")
    if error <= EXACT:
        return matrix

    matrix = matrix.copy()
    left, _, right = np.linalg.svd(linear)
    matrix[:3, :3] = left @ right
    return matrix


def write_files(contents: dict[Path, str | bytes]) -> None:
    """Write {path: text or bytes}, either all of them or none.

    Raises:
        OSError: there is no room or no permission.
    """
    with part_files(*contents) as parts:
        for part, content in zip(parts, contents.values()):
            part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def part_files(*paths: str | Path) -> Iterator[list[Path]]:
    """Yield temporary paths beside `paths`, which replace them together at the end.

    An exception inside the block leaves all of `paths` as they were. Leftovers of killed runs are
    removed first.

    Raises:
        OSError: there is no room or no permission; the error names the first of `paths`.
    """
    suffix = f"{os.getpid()}-{id(paths)}.part"
    parts = {Path(path): Path(path).with_name(f".{Path(path).name}.{suffix}") for path in paths}
    for path in parts:
        _remove_leftovers(path)

    try:
        yield list(parts.values())
        for path, part in parts.items():
            os.replace(part, path)
    except OSError as error:
        # An error of the disk names no file or a temporary one. Any other is the block's own.
        temporary = {str(part) for part in parts.values()}
        from_writing = error.filename is None or str(error.filename) in temporary
        if error.errno and from_writing:
            raise OSError(error.errno, error.strerror, str(next(iter(parts)))) from None
        raise
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _remove_leftovers(path):
    """Remove the temporary files of `path` whose processes have ended."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.[0-9]*.part"):
        process = int(old.name.split(".")[-2].split("-")[0])  # .NAME.PROCESS-ID.part
        if not psutil.pid_exists(process):
            old.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold a lock on a file; the system releases it however this process ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    with Path(path).open("wb") as file:
        if os.name == "nt":
            _lock_on_windows(file)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _lock_on_windows(file):
    import msvcrt

    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        raise BlockingIOError(error.errno, error.strerror) from None


def setting(name: str, default: object) -> object:
    """Return a notebook's constant; the environment variable XWING_<name> overrides it.

    Args:
        name: of the constant.
        default: the value where the variable is not set; the result has its type. Tuples and
            dictionaries are written as in Python.

    Raises:
        ValueError: the variable cannot be read as the default's type, or is not finite.
    """
    text = os.environ.get(f"XWING_{name}", "")
    if not text:
        return default

    try:
        if isinstance(default, tuple | dict):
            value = ast.literal_eval(text)
        else:
            value = type(default)(text)
        wrong_type = not isinstance(value, type(default))
        if wrong_type or (isinstance(value, float) and not np.isfinite(value)):
            raise ValueError
    except (ValueError, SyntaxError):
        is_number = isinstance(default, int | float)
        example = f"a number such as {default:g}" if is_number else f"a value such as {default}"
        raise ValueError(f"XWING_{name}: expected {example}, got {text!r}") from None

    print(f"{name} = {value!r}, from the environment variable XWING_{name}")
    return value


# ============================================================ target

MAX_ORIGIN = 30.0  # diameters by which the origin may lie outside of a target's box
MAX_OUTSIDE = 0.1  # diameters by which a target's box, mesh and keypoints may differ
SURFACE_POINTS = 28  # keypoints on a target's surface, beside the 8 corners of its box
MIRROR_IN_X = np.diag([-1.0, 1.0, 1.0, 1.0])  # (4, 4)
# (12, 2) pairs of corners; their numbers differ in one bit, see `box_corners`.
BOX_EDGES = np.array([(k, k ^ bit) for bit in (1, 2, 4) for k in range(8) if not k & bit])
# A box looks symmetric, so a network confuses its corners in these ways: (8,) permutations.
CORNER_PERMUTATIONS = {
    "identity": np.arange(8),
    "left-right": np.arange(8) ^ 1,
    "top-bottom": np.arange(8) ^ 4,
    "both": np.arange(8) ^ 5,
    "nose-tail": np.arange(8) ^ 2,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A rigid object whose shape is known, and what is known of it.

    `load_target` reads one from a JSON file, or derives it from a mesh. All points are in the
    mesh's axes and units.
    """

    name: str
    mesh: Path  # OBJ, PLY, STL, OFF or GLB
    unit: float | None  # metres per mesh unit, where known
    up: np.ndarray  # (3,) for exports and displays
    box: np.ndarray  # (8, 3) corners of the bounding box, see `box_corners`
    diameter: float  # the box's diagonal
    keypoints: np.ndarray  # (K, 3) for the network: the 8 corners, then points of the surface
    normals: np.ndarray  # (K, 3) outward; zero: the point is visible from all sides
    names: list  # (K,) of the keypoints
    mirror: np.ndarray | None  # (4, 4) reflection that maps the target onto itself
    symmetries: np.ndarray  # (S, 4, 4) motions after which it looks the same, with the identity
    axes: np.ndarray  # (A, 2, 3) a point and a unit direction of each axis of revolution
    lookalikes: np.ndarray  # (L, 4, 4) motions after which it looks nearly the same: errors
    flat_axis: np.ndarray | None  # (3,) of a flat target, ambiguous with its mirror image in depth
    lasers: np.ndarray | None  # (M, 2, 3) muzzles and second points on their lines of fire

    @functools.cached_property
    def mirror_permutation(self) -> np.ndarray | None:
        """(K,) the index of each keypoint's mirror image; None without a mirror."""
        return None if self.mirror is None else mirror_permutation(self.keypoints, self.mirror)


def box_corners(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the corners (8, 3) of a box between two opposite ones.

    The bits of a corner's number say where it is: bit 1 is set at the high end of x, bit 2 of y,
    bit 4 of z. On the X-wing these are the pilot's left, the tail and the top.

    Args:
        low: (3,) the corner with the smallest coordinates.
        high: (3,) the corner with the largest coordinates.
    """
    xs, ys, zs = zip(low, high)
    return np.array([(x, y, z) for z in zs for y in ys for x in xs], dtype=float)


def mirror_permutation(points: np.ndarray, mirror: np.ndarray = MIRROR_IN_X) -> np.ndarray:
    """Return (K,) the index of each model point's mirror image among the points.

    Args:
        points: (K, 3) model units.
        mirror: (4, 4) reflection, by default in x.

    Raises:
        ValueError: a point has no mirror image among them.
    """
    points = check_array(points, (None, 3), "points")
    images = points @ mirror[:3, :3].T + mirror[:3, 3]
    distance = np.linalg.norm(images[:, None] - points[None], axis=-1)
    tolerance = 2e-6 * np.linalg.norm(np.ptp(points, axis=0))
    nearest = distance.min(1)
    if (nearest > tolerance).any():
        unpaired = points[nearest.argmax()]
        raise ValueError(f"points: {unpaired} has no mirror image among them; add it")
    return distance.argmin(1)


def load_target(path: str | Path) -> Target:
    """Read a target from its JSON file, or derive it from a mesh alone. Nothing is written.

    A JSON file holds "mesh", a path relative to its folder, and what is known of the target:
    "name", "unit" (metres), "up" (3,), "box" (two opposite corners), "keypoints" (a list of
    {"name", "point", "normal"}), "mirror" (4, 4), "symmetries" and "lookalikes" (lists of (4, 4)),
    "axes" (pairs of point and direction), "flat_axis" (3,), "lasers" (pairs of points). What is not
    given is derived: the box is that of the mesh, and the keypoints are spread over the visible
    surface, in pairs where it has a mirror. A "mirror" of null says that it has none.

    Where box or keypoints are derived and neither "symmetries" nor "axes" is given, the turns after
    which the mesh looks the same are found, see `_find_symmetries`. A real object may be printed
    where its mesh has one colour: "symmetries": [] says that it has none.

    Args:
        path: of the JSON file, or of a mesh that trimesh reads.

    Raises:
        FileNotFoundError: there is no such file, or no such mesh.
        ValueError: an unknown key, a value that does not fit, a mesh that cannot be read, or one
            whose origin lies more than MAX_ORIGIN diameters outside of it. The message names the
            file and the key.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        target = _derive_target(path)
    else:
        target = target_from_record(read_json(path), path, path.parent)
        _check_mesh_is_there(target.mesh, path)
    _check_origin(target, path)
    return target


def target_from_record(record: object, source: str | Path, folder: str | Path) -> Target:
    """Make a target from the content of a JSON file, see `load_target`.

    Args:
        record: what the file holds.
        source: named in errors.
        folder: the mesh's path is relative to it.

    Raises:
        ValueError: as `load_target`.
    """
    values = _read_fields(record, source)
    mesh = Path(folder) / record["mesh"]
    box = values.pop("box", None)
    keypoints = values.pop("keypoints", None)
    if box is None or keypoints is None:
        _check_mesh_is_there(mesh, source)
        base = _derive_target(
            mesh,
            box,
            keypoints,
            values.get("mirror"),
            find_mirror="mirror" not in record,  # null says that there is none
            find_symmetries=not {"symmetries", "axes"} & set(record),
            source=source,
        )
    else:
        base = _plain_target(mesh, box, *keypoints)
    _check_keypoints(base, f"{source}, keypoints")

    target = dataclasses.replace(base, **values)
    try:
        _ = target.mirror_permutation
    except ValueError as error:
        text = f"does not map the keypoints on each other; {error}"
        raise ValueError(f"{source}, mirror: {text}") from None
    return target


def _check_mesh_is_there(mesh, source):
    """Raise FileNotFoundError where the mesh of a target's JSON file is missing."""
    if not mesh.is_file():
        raise FileNotFoundError(f"{source}: its mesh {mesh} is not there; correct 'mesh'")


def _check_origin(target, source):
    """Raise ValueError where the origin lies far outside of the target's box.

    A small turn about a distant point moves the target far, so no pose would be precise.
    """
    low, high = target.box[[0, 7]]
    outside = np.linalg.norm(np.maximum(0, np.maximum(low, -high))) / target.diameter
    if outside > MAX_ORIGIN:
        middle = ", ".join(f"{value:.6g}" for value in (low + high) / 2)
        text = f"its origin lies {outside:,.0f} diameters outside of it (its middle is at {middle})"
        raise ValueError(f"{source}: {text}; move the mesh to its origin and export it again")


def _check_box(box, mesh, name):
    """Raise ValueError where a box (8, 3) that was given is not that of the mesh."""
    low, high = mesh.bounds
    if np.abs(box[[0, 7]] - mesh.bounds).max() > MAX_OUTSIDE * np.linalg.norm(mesh.extents):
        text = f"expected about that of the mesh, {low} to {high}, got {box[0]} to {box[7]}"
        raise ValueError(f"{name}: {text}; give it in mesh units, or leave it out")


def _check_keypoints(target, name):
    """Raise ValueError where a keypoint lies outside of the target's box."""
    low, high = target.box[[0, 7]]
    outside = np.maximum(low - target.keypoints, target.keypoints - high).max(1)
    worst = outside.argmax()
    if outside[worst] > MAX_OUTSIDE * target.diameter:
        point = target.keypoints[worst]
        text = f"{target.names[worst]!r} at {point} lies outside of the box from {low} to {high}"
        raise ValueError(f"{name}: {text}; give both in mesh units")


def _read_fields(record, source):
    """Return what a target's JSON file says, {key: converted value}; without the mesh."""
    if not isinstance(record, dict) or not isinstance(record.get("mesh"), str):
        raise ValueError(f"{source}: no target; expected an object with 'mesh', the name of a file")
    known = {"mesh", *_FIELDS}
    unknown = sorted(set(record) - known)
    if unknown:
        names = ", ".join(sorted(known))
        raise ValueError(f"{source}: unknown {', '.join(unknown)}; expected some of {names}")

    values = {}
    for key, read in _FIELDS.items():
        if record.get(key) is not None:
            values[key] = read(record[key], f"{source}, {key}")
    return values


def target_record(target: Target) -> dict:
    """Return what `target_from_record` reads, for a JSON file.

    The mesh's path is relative to the repository where it lies inside, else absolute.
    """
    mesh = target.mesh.resolve()
    root = SHIP.parents[1]
    inside = mesh.is_relative_to(root)
    keypoints = [
        {"name": name, "point": point.tolist(), "normal": normal.tolist()}
        for name, point, normal in zip(target.names, target.keypoints, target.normals)
    ]
    record = {
        "name": target.name,
        "mesh": mesh.relative_to(root).as_posix() if inside else str(mesh),
        "unit": target.unit,
        "up": target.up.tolist(),
        "box": target.box[[0, 7]].tolist(),
        "keypoints": keypoints[8:],  # the corners follow from the box
        "symmetries": target.symmetries.tolist(),
        "axes": target.axes.tolist(),
        "lookalikes": target.lookalikes.tolist(),
    }
    for key in ("mirror", "flat_axis", "lasers"):
        value = getattr(target, key)
        record[key] = None if value is None else value.tolist()
    return record


def check_same_target(first: Target, second: Target, what: str) -> None:
    """Raise ValueError where two targets have different keypoints.

    Args:
        first: the target that `what` were made for.
        second: the target that is asked for.
        what: the subject of the message, e.g. "the weights".
    """
    if has_same_keypoints(first, second):
        return
    text = f"{what} belong to the target {first.name!r}, not to {second.name!r}"
    if first.name == second.name:
        text = f"{what} belong to {first.name!r} as it was: its keypoints are others now"
    raise ValueError(f"{text}; take those of this target, or train some")


def has_symmetries(target: Target) -> bool:
    """Tell whether a target looks the same after some turn."""
    return len(target.symmetries) > 1 or len(target.axes) > 0


def has_same_keypoints(first: Target, second: Target) -> bool:
    """Tell whether two targets have the same keypoints, so that one network serves both."""
    tolerance = 1e-6 * first.diameter
    same_shape = first.keypoints.shape == second.keypoints.shape
    return same_shape and np.allclose(first.keypoints, second.keypoints, rtol=0, atol=tolerance)


def _plain_target(mesh, box, keypoints, normals, names):
    """A target of which only box (8, 3) and surface keypoints (K, 3) are known."""
    return Target(
        name=Path(mesh).stem,
        mesh=Path(mesh),
        unit=None,
        up=np.array([0.0, 0.0, 1.0]),
        box=box,
        diameter=float(np.linalg.norm(box[7] - box[0])),
        keypoints=np.concatenate([box, keypoints]),
        normals=np.concatenate([np.zeros((8, 3)), normals]),
        names=[*(f"corner {k}" for k in range(8)), *names],
        mirror=None,
        symmetries=np.eye(4)[None],
        axes=np.zeros((0, 2, 3)),
        lookalikes=np.zeros((0, 4, 4)),
        flat_axis=None,
        lasers=None,
    )


# Each of these checks and converts the value of a key; `name` is the subject of its errors.


def _read_name(value, name):
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}: expected a name, got {value!r}")
    return value


def _read_numbers(value, name, shape):
    array = check_array(value, shape, name)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got {value}")
    return array


def _read_unit(value, name):
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and 0 < value < np.inf):
        expected = "expected metres per mesh unit, a positive number"
        raise ValueError(f"{name}: {expected}, got {value!r}")
    return float(value)


def _read_box(value, name):
    low, high = _read_numbers(value, name, (2, 3))
    if not (low < high).all():
        raise ValueError(f"{name}: expected the low and the high corner, got {value}")
    return box_corners(low, high)


def _read_keypoints(value, name):
    """Return points (K, 3), normals (K, 3) and K names of the keypoints of the surface."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name}: expected a list of keypoints, got {str(value)[:80]}")

    points = []
    normals = []
    names = []
    for i, entry in enumerate(value):
        if not isinstance(entry, dict) or set(entry) != {"name", "point", "normal"}:
            expected = "expected an object with 'name', 'point' and 'normal'"
            raise ValueError(f"{name}, entry {i}: {expected}, got {str(entry)[:80]}")
        points.append(_read_numbers(entry["point"], f"{name}, entry {i}, point", (3,)))
        normals.append(_read_numbers(entry["normal"], f"{name}, entry {i}, normal", (3,)))
        names.append(_read_name(entry["name"], f"{name}, entry {i}, name"))
    return np.array(points), np.array(normals), names


def _read_mirror(value, name):
    matrix = _isometry(_read_numbers(value, name, (4, 4)), name)
    if np.linalg.det(matrix[:3, :3]) > 0:
        raise ValueError(f"{name}: expected a reflection (determinant -1), got a rotation")
    return matrix


def _read_direction(value, name):
    direction = _read_numbers(value, name, (3,))
    if not direction.any():
        raise ValueError(f"{name}: expected a direction, got zeros")
    return direction


def _read_list(value, name, shape):
    """Return the arrays (N, *shape) of a list, which may be empty."""
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, got {str(value)[:80]}")
    return _read_numbers(value, name, (None, *shape)) if value else np.zeros((0, *shape))


def _read_motions(value, name):
    motions = _read_list(value, name, (4, 4))
    for i, motion in enumerate(motions):
        rigid_matrix(motion, f"{name} {i}")
    return motions


def _read_symmetries(value, name):
    motions = _read_motions(value, name)
    if not any(np.array_equal(motion, np.eye(4)) for motion in motions):
        motions = np.concatenate([np.eye(4)[None], motions])
    return motions


def _read_axes(value, name):
    axes = _read_list(value, name, (2, 3))
    lengths = np.linalg.norm(axes[:, 1], axis=1)
    if (np.abs(lengths - 1) > 1e-4).any():
        raise ValueError(f"{name}: expected unit directions, got lengths {lengths}")
    return axes


_FIELDS = {  # key of a target's JSON file -> its reader
    "name": _read_name,
    "unit": _read_unit,
    "up": _read_direction,
    "box": _read_box,
    "keypoints": _read_keypoints,
    "mirror": _read_mirror,
    "symmetries": _read_symmetries,
    "axes": _read_axes,
    "lookalikes": _read_motions,
    "flat_axis": _read_direction,
    "lasers": functools.partial(_read_list, shape=(2, 3)),
}


def _derive_target(
    path,
    box=None,
    keypoints=None,
    mirror=None,
    find_mirror=True,
    find_symmetries=True,
    source=None,
):
    """Make a target from a mesh; only what is not given is derived."""
    mesh, colours = _read_mesh(path)
    if box is None:
        box = box_corners(*mesh.bounds)
    else:
        _check_box(box, mesh, f"{source}, box")
    diameter = float(np.linalg.norm(box[7] - box[0]))

    # trimesh takes small triangles for empty ones, so the mesh is about as large as 1 meanwhile. A
    # power of two changes no digit.
    unit = 2.0 ** np.round(np.log2(np.linalg.norm(mesh.extents)))
    mesh.apply_scale(1 / unit)
    points, normals, faces = _visible_surface(mesh, diameter / unit)
    symmetries = np.eye(4)[None]
    axes = np.zeros((0, 2, 3))
    if find_symmetries and colours is not None:  # a print looks the same after no turn
        surface = _Surface(points, normals, colours[faces])
        symmetries, axes = _find_symmetries(mesh, surface)
        symmetries[:, :3, 3] *= unit
        axes[:, 0] *= unit

    points *= unit
    if keypoints is None:
        if mirror is None and find_mirror and colours is not None:
            mirror = _find_mirror(points, box, diameter)
        points, normals = _spread_points(points, normals, mirror, diameter)
        names = [f"surface {i}" for i in range(len(points))]
        keypoints = (points, normals, names)
    target = _plain_target(path, box, *keypoints)
    return dataclasses.replace(target, mirror=mirror, symmetries=symmetries, axes=axes)


def _read_mesh(path):
    """Read all triangles of a mesh file as one `trimesh.Trimesh`.

    Returns it and the colours (F, 3) of its triangles, 0 to 255, or None where it has a texture.
    """
    import trimesh

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such mesh; give an OBJ, PLY, STL, OFF or GLB file")
    _check_obj_indices(path)
    try:
        scene = trimesh.load_scene(path, process=False)
        textured = any(_has_texture(part) for part in scene.geometry.values())
        parts = [part for part in scene.dump() if isinstance(part, trimesh.Trimesh)]
        colours = None if textured else np.concatenate([_face_colours(part) for part in parts])
        mesh = scene.to_mesh()
        extent = np.ptp(mesh.vertices[mesh.faces.ravel()], axis=0) if len(mesh.faces) else 0
        solid = np.all(extent > 0) and np.isfinite(mesh.vertices).all()
    except Exception as error:  # trimesh raises whatever its parsers stumble over
        raise ValueError(f"{path}: cannot be read as a mesh ({error}); export it again") from None

    if not solid:
        got = f"{len(mesh.faces)} triangles with an extent of {extent}"
        expected = "expected a solid with finite vertices"
        raise ValueError(f"{path}: {expected}, got {got}; export it again")
    mesh.remove_unreferenced_vertices()
    return mesh, colours


def _check_obj_indices(path):
    """Raise ValueError where an OBJ file counts vertices backwards; trimesh reads others then."""
    if path.suffix.lower() != ".obj":
        return
    relative = re.search(rb"(?m)^[ \t]*f[ \t][^\r\n]*-\d[^\r\n]*", path.read_bytes())
    if relative:
        line = relative[0].decode(errors="replace").strip()
        text = f"{line[:60]!r} has relative (negative) indices, which are not read"
        raise ValueError(f"{path}: {text}; export it with absolute ones, as Blender does")


def _face_colours(part):
    """Return the colours (F, 3) of a part's triangles, 0 to 255: its own or its material's."""
    if part.visual.kind in ("vertex", "face"):
        return np.asarray(part.visual.face_colors, float)[:, :3]
    colour = getattr(part.visual, "material", part.visual).main_color
    return np.tile(np.asarray(colour, float)[:3], (len(part.faces), 1))


def _has_texture(part):
    """Tell whether a part of a trimesh scene has a picture, from OBJ's or glTF's material."""
    material = getattr(part.visual, "material", None)
    pictures = [getattr(material, name, None) for name in ("image", "baseColorTexture")]
    return any(picture is not None for picture in pictures)


def _visible_surface(mesh, diameter, count=40_000, views=60):
    """Return points (P, 3) of the surface that show from outside, with normals and triangles.

    The points are seen from `views` directions. A normal (P, 3) points outwards, and is zero where
    both sides of the surface show. The triangles (P,) are the rows of the mesh.
    """
    import trimesh

    points, faces = trimesh.sample.sample_surface(mesh, count, seed=0)
    normals = mesh.face_normals[faces]
    front_views = np.zeros(len(points))
    back_views = np.zeros(len(points))
    for direction in fibonacci_sphere(views):
        shown = _nearest_in_cells(points, direction, diameter)
        cosine = normals @ direction
        front_views += shown & (cosine > 0.3)  # a steeper surface spans too much depth in a cell
        back_views += shown & (cosine < -0.3)

    visible = front_views + back_views >= 3  # fewer may be gaps between the samples
    side = np.sign(front_views - back_views)
    more = np.maximum(front_views, back_views)
    less = np.minimum(front_views, back_views)
    side[less > 0.3 * more] = 0
    return points[visible], (normals * side[:, None])[visible], faces[visible]


def _nearest_in_cells(points, direction, diameter, grid=96):
    """Return (P,) bool: no other point lies clearly nearer to a viewer in the same cell.

    The viewer is far away in a direction (3,). The diameter spans `grid` cells of the picture.
    """
    across = np.linalg.svd(direction[None])[2][1:]  # (2, 3) axes of the picture
    place = points @ across.T
    column, row = ((place - place.min(0)) * grid / diameter).astype(int).T
    cell = row * (column.max() + 1) + column

    depth = -points @ direction
    nearest = np.full(cell.max() + 1, np.inf)
    np.minimum.at(nearest, cell, depth)
    return depth < nearest[cell] + 1.5 * diameter / grid


def fibonacci_sphere(count: int) -> np.ndarray:
    """Return (count, 3) unit vectors that are spread evenly over the sphere.

    Source: Gonzalez, Measurement of Areas on a Sphere Using Fibonacci and Latitude-Longitude
        Lattices, Mathematical Geosciences 42, 2010.
    """
    number = np.arange(count)
    height = 1 - (2 * number + 1) / count
    radius = np.sqrt(1 - height**2)
    longitude = np.pi * (1 + 5**0.5) * number  # the golden ratio spreads them evenly
    return np.column_stack([radius * np.cos(longitude), radius * np.sin(longitude), height])


SYMMETRY_TOLERANCE = 0.01  # diameters by which a surface may differ from itself after a turn
SYMMETRY_EXCEPTIONS = 0.005  # fraction of the surface that may differ by more
SAME_COLOUR = 20  # of 255, in each channel
REVOLUTION_TURNS = 0.5, 1.3, 2.2  # radians: what looks the same after these, does after any
MAX_FOLD = 12  # how often a turn may be repeated until it is a full one


class _Surface:
    """Points of a visible surface, and whether it is the same after a turn."""

    def __init__(self, points, normals, colours):
        from scipy.spatial import cKDTree

        order = np.random.default_rng(0).permutation(len(points))
        self.points = points[order]
        self.normals = normals[order]
        self.colours = colours[order]
        self.diameter = np.linalg.norm(np.ptp(points, axis=0))
        self.tree = cKDTree(self.points)
        self.spacing = np.quantile(self.tree.query(self.points[:2000], k=2)[0][:, 1], 0.99)

    def difference(self, turn, centre):
        """How much a turn (3, 3) about a centre (3,) changes the surface: a mean distance.

        It is infinite where the surface is not the same after it. Few points show most of these
        cases.
        """
        for count, leniency in ((40, 10), (400, 3), (4000, 1)):
            apart = self._distances(turn, centre, count)
            same = apart < SYMMETRY_TOLERANCE * self.diameter
            if 1 - same.mean() > leniency * SYMMETRY_EXCEPTIONS:
                return np.inf
        return apart[same].mean()

    def _distances(self, turn, centre, count):
        """The distances of some turned points from the planes of those there, of their colour."""
        moved = (self.points[:count] - centre) @ turn.T + centre
        distance, near = self.tree.query(moved, k=6)
        between = moved[:, None] - self.points[near]
        apart = np.abs((between * self.normals[near]).sum(2))
        colour = np.abs(self.colours[near] - self.colours[:count, None]).max(2)
        fits = (distance < 3 * self.spacing) & (colour < SAME_COLOUR)
        return np.where(fits, apart, np.inf).min(1)


def _find_symmetries(mesh, surface):
    """Find the turns after which a mesh looks the same, but for small details.

    Its axes go through the centre of its convex hull. They are looked for among the hull's axes of
    inertia, normals and corners.

    Args:
        mesh: `trimesh.Trimesh`.
        surface: `_Surface` of it.

    Returns:
        symmetries (S, 4, 4) with the identity, and axes of revolution (A, 2, 3): one, or three that
        are perpendicular for a ball.
    """
    hull = mesh.convex_hull
    centre = hull.center_mass
    turns = []
    axes = []
    for direction in _possible_axes(hull, centre):
        revolved = (_turn(direction, angle) for angle in REVOLUTION_TURNS)
        if all(np.isfinite(surface.difference(turn, centre)) for turn in revolved):
            axes.append(direction)
        if len(axes) > 1:  # a ball has all the others
            break
        if axes:
            continue

        repeated = [_turn(direction, 2 * np.pi / fold) for fold in range(MAX_FOLD, 1, -1)]
        differences = np.array([surface.difference(turn, centre) for turn in repeated])
        best = differences.min()
        if np.isfinite(best):
            equal = differences < 1.5 * best + 0.1 * SYMMETRY_TOLERANCE * surface.diameter
            turns.append(repeated[equal.argmax()])  # the smallest turn

    turns, axes = _reduce_symmetries(turns, axes, surface, centre)
    symmetries = turn_about(np.array(turns), centre)
    return symmetries, np.array([(centre, axis) for axis in axes]).reshape(-1, 2, 3)


def _turn(direction, angle):
    """The rotation (3, 3) by an angle in radians about a unit vector (3,)."""
    return cv2.Rodrigues(np.asarray(direction, float) * angle)[0]


def _possible_axes(hull, centre, count=30):
    """Return unit vectors (N, 3) along which a convex hull may have axes, the likeliest first."""
    moments = hull.principal_inertia_components  # ascending
    inertia = hull.principal_inertia_vectors
    if (np.diff(moments) > 0.02 * moments[2]).all():
        return inertia  # every axis of a symmetry is one of inertia

    flat = np.zeros((0, 3))
    if len(hull.facets):
        flat = hull.facets_normal[np.argsort(-hull.facets_area)][:count]
    slopes = hull.face_normals[np.argsort(-hull.area_faces)][:count]
    corners = hull.vertices - centre
    corners = corners[np.argsort(-np.linalg.norm(corners, axis=1))][:count]

    chosen = []
    for direction in np.concatenate([inertia, flat, slopes, corners]):
        direction = direction / np.linalg.norm(direction)
        if all(abs(direction @ other) < 0.9998 for other in chosen):  # 1 degree
            chosen.append(direction)
    return np.array(chosen)


def _reduce_symmetries(turns, axes, surface, centre):
    """Return the smallest list of turns, with the identity, and of axes that say the same."""
    if len(axes) > 1:  # of a ball
        return [np.eye(3)], list(np.eye(3))
    if len(axes) == 1:  # beside it, only a turn upside down is another symmetry
        across = np.linalg.svd(axes[0][None])[2][1]
        flip = _turn(across, np.pi)
        flips = [flip] if np.isfinite(surface.difference(flip, centre)) else []
        return [np.eye(3), *flips], axes

    group = [np.eye(3)]
    for one in group:  # grows meanwhile
        for turn in turns:
            product = turn @ one
            if len(group) < 60 and all(np.trace(product @ g.T) < 2.99 for g in group):  # 6 degrees
                group.append(product)
    return group, axes


def _find_mirror(points, box, diameter):
    """Return the reflection (4, 4) along an axis of the box that maps points (P, 3) on each other.

    It is None where no axis has one.
    """
    from scipy.spatial import cKDTree

    tree = cKDTree(points)
    centre = box.mean(0)
    sample = points[:: max(1, len(points) // 2000)]  # enough, and fast
    for axis in range(3):
        mirror = np.eye(4)
        mirror[axis, axis] = -1
        mirror[axis, 3] = 2 * centre[axis]
        distance, _ = tree.query(sample @ mirror[:3, :3].T + mirror[:3, 3])
        if np.quantile(distance, 0.99) < 0.02 * diameter:
            return mirror
    return None


def _spread_points(points, normals, mirror, diameter):
    """Choose SURFACE_POINTS of points (P, 3) far apart, in pairs where there is a mirror.

    Returns them and their normals, (SURFACE_POINTS, 3) each.

    Source: Eldar et al., The Farthest Point Strategy for Progressive Image Sampling, IEEE TIP 6(9),
        1997.
    """
    chosen = []
    outward = []
    distance = np.linalg.norm(points - points.mean(0), axis=1)  # starts with the outermost point
    while len(chosen) < SURFACE_POINTS and (distance >= 0).any():
        best = distance.argmax()
        found, found_normals = _with_mirror_image(points[best], normals[best], mirror, diameter)
        if len(chosen) + len(found) > SURFACE_POINTS:
            distance[best] = -1  # there is no room for a pair: look for a point on the plane
            continue

        if not chosen:
            distance = np.full(len(points), np.inf)  # from here on: to the nearest chosen point
        for point in found:
            distance = np.minimum(distance, np.linalg.norm(points - point, axis=1))
        chosen += found
        outward += found_normals
    return np.array(chosen), np.array(outward)


def _with_mirror_image(point, normal, mirror, diameter):
    """Return a list of a point (3,) and its mirror image, and a list of their normals.

    A point near the mirror's plane is moved onto it and is its own image.
    """
    if mirror is None:
        return [point], [normal]
    image = mirror[:3, :3] @ point + mirror[:3, 3]
    image_normal = mirror[:3, :3] @ normal
    if np.linalg.norm(image - point) < 0.02 * diameter:
        return [(image + point) / 2], [(normal + image_normal) / 2]
    return [point, image], [normal, image_normal]


SHIP = ROOT / "data" / "xwing.json"
if not SHIP.is_file():  # the project is installed: the ship is a part of the package
    SHIP = ROOT / "xwing" / "data" / "xwing.json"
XWING = load_target(SHIP)
BOUNDING_BOX = XWING.box  # (8, 3) model units
DIAMETER = XWING.diameter  # model units
KEYPOINTS = XWING.keypoints  # (36, 3) model units
KEYPOINT_NAMES = XWING.names  # (36,)
NORMALS = XWING.normals  # (36, 3)
LASERS = XWING.lasers  # (4, 2, 3) model units
MIRROR = mirror_permutation(BOUNDING_BOX)  # (8,) the index of each corner's mirror image

# ============================================================ camera and projection

FRAME_SIZE = 256  # pixels, width and height of the frames of a set
OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])  # OpenGL camera -> OpenCV camera, and back


def to_homogeneous(points: np.ndarray) -> np.ndarray:
    """Append a column of ones: (N, 3) points -> (N, 4)."""
    points = check_array(points, (None, 3), "points")
    return np.concatenate([points, np.ones((len(points), 1))], axis=1)


def project_points(
    image: np.ndarray,
    points: np.ndarray,
    model_view_matrix: np.ndarray,
    projection_matrix: np.ndarray,
    transformation_mat: np.ndarray | None = None,
) -> np.ndarray:
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

    Source: OpenGL 4.6 core specification, section 13.8; y is turned to point down.
    """
    points = check_array(points, (None, 4), "points")
    matrix = check_array(projection_matrix, (4, 4), "projection_matrix")
    matrix = matrix @ check_array(model_view_matrix, (4, 4), "model_view_matrix")
    if transformation_mat is not None:
        matrix = matrix @ check_array(transformation_mat, (4, 4), "transformation_mat")
    if np.ndim(image) < 2:
        expected = "expected a frame or np.empty((height, width))"
        raise ValueError(f"image: {expected}, got shape {np.shape(image)}")

    clip = points @ matrix.T
    behind = ~(clip[:, 3] > 0)  # True for NaN
    if behind.any():
        count = f"{behind.sum()} of {len(points)} points"
        raise ValueError(f"{count} lie at or behind the camera (or are NaN)")

    normalised = clip[:, :2] / clip[:, 3:] * [1, -1]
    return (normalised + 1) / 2 * np.shape(image)[1::-1]


def camera_matrix(projection_matrix: np.ndarray, width: float, height: float) -> np.ndarray:
    """Return the OpenCV camera matrix K (3, 3) in pixels of an OpenGL projection.

    Args:
        projection_matrix: (4, 4) OpenGL.
        width: of the frames, pixels.
        height: of the frames, pixels.
    """
    p = check_array(projection_matrix, (4, 4), "projection_matrix")
    skew = 0.0 - p[0, 1] * width / 2  # 0.0 and not -0.0 without skew
    return np.array(
        [
            [p[0, 0] * width / 2, skew, (1 - p[0, 2]) * width / 2],
            [0, p[1, 1] * height / 2, (1 + p[1, 2]) * height / 2],
            [0, 0, 1],
        ]
    )


SENSOR = 36.0  # mm, the longer side of the frame; a focal length means nothing without one


def lens_camera(
    width: float,
    height: float,
    focal: float = 35.0,
    sensor: float = SENSOR,
    view: float | None = None,
) -> np.ndarray:
    """Return K (3, 3) in pixels of a lens whose axis meets the middle of the frame.

    Args:
        width: of the frames, pixels.
        height: of the frames, pixels.
        focal: focal length, in the unit of `sensor`.
        sensor: length of the sensor's longer side, e.g. in millimetres.
        view: angle of view along the longer side in degrees; overrides focal and sensor.

    Raises:
        ValueError: a number that is not positive, or a view of 180 degrees or more.
    """
    given = {"width": width, "height": height, "focal": focal, "sensor": sensor, "view": view}
    for name, value in given.items():
        limit = 180 if name == "view" else np.inf
        if value is not None and not 0 < value < limit:
            expected = "expected a positive number, a view of less than 180"
            raise ValueError(f"{name}: {expected}, got {value}")

    ratio = focal / sensor if view is None else 0.5 / np.tan(np.radians(view / 2))
    pixels = max(width, height) * ratio
    return np.array([[pixels, 0, width / 2], [0, pixels, height / 2], [0, 0, 1]])


def focal_length(K: np.ndarray, width: float, height: float) -> float:
    """Return the focal length of K (3, 3), pixels, in mm of a sensor whose longer side has SENSOR.

    Args:
        K: (3, 3) camera matrix, pixels.
        width: of the frames, pixels.
        height: of the frames, pixels.
    """
    return SENSOR * float(K[0, 0]) / max(width, height)


def crop_camera(
    K: np.ndarray, left: float = 0.0, top: float = 0.0, scale: float = 1.0
) -> np.ndarray:
    """Return K (3, 3) of frames that are cropped and then scaled.

    Args:
        K: (3, 3) camera matrix of the whole frame, pixels.
        left: x of the crop's left edge, pixels of the frame; may lie outside it.
        top: y of the crop's top edge, pixels of the frame; may lie outside it.
        scale: pixels of the result for one pixel of the frame.
    """
    cropped = K - np.array([[0, 0, left], [0, 0, top], [0, 0, 0]])
    return cropped * np.array([[scale], [scale], [1]])


def check_camera_matrix(K: np.ndarray) -> np.ndarray:
    """Return K as float64.

    Raises:
        ValueError: K is not [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with positive fx and fy.
    """
    K = check_array(K, (3, 3), "K")
    pinhole = np.array([[K[0, 0], 0, K[0, 2]], [0, K[1, 1], K[1, 2]], [0, 0, 1]])
    positive = min(K[0, 0], K[1, 1]) > 0
    if not (np.isfinite(K).all() and positive and np.abs(K - pinhole).max() < 1e-5):
        expected = "expected a camera matrix [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]"
        raise ValueError(f"K: {expected}, got\n{K}")
    return K


def pose_in_camera(model_view_matrix: np.ndarray, transformation_mat: np.ndarray) -> np.ndarray:
    """Return the pose (4, 4), model -> OpenCV camera, of a model matrix.

    Args:
        model_view_matrix: (4, 4) world -> OpenGL camera.
        transformation_mat: (4, 4) model -> world.
    """
    view = check_array(model_view_matrix, (4, 4), "model_view_matrix")
    return OPENCV @ view @ check_array(transformation_mat, (4, 4), "transformation_mat")


def transformation_from_pose(model_view_matrix: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Return the model matrix (4, 4), model -> world, of a pose: inverts `pose_in_camera`.

    Args:
        model_view_matrix: (4, 4) world -> OpenGL camera.
        pose: (4, 4) model -> OpenCV camera.
    """
    view = check_array(model_view_matrix, (4, 4), "model_view_matrix")
    return np.linalg.inv(view) @ OPENCV @ check_array(pose, (4, 4), "pose")


def project_pose(points: np.ndarray, pose: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Project model points to pixels.

    Args:
        points: (N, 3) model units.
        pose: (4, 4) model -> OpenCV camera.
        K: (3, 3) camera matrix, pixels.

    Returns:
        (N, 2) pixels; NaN for points at or behind the camera.
    """
    camera = np.asarray(points, float) @ pose[:3, :3].T + pose[:3, 3]
    depth = np.where(camera[:, 2:] > 0, camera[:, 2:], np.nan)
    return (camera / depth) @ K[:2].T


def keypoints_of(
    matrices: np.ndarray,
    model_view_matrix: np.ndarray,
    projection_matrix: np.ndarray,
    width: int = FRAME_SIZE,
    height: int = FRAME_SIZE,
    points: np.ndarray = BOUNDING_BOX,
) -> np.ndarray:
    """Project model points under many model matrices.

    Args:
        matrices: (N, 4, 4) model -> world.
        model_view_matrix: (4, 4) world -> OpenGL camera.
        projection_matrix: (4, 4) OpenGL camera -> clip space.
        width: of the frames, pixels.
        height: of the frames, pixels.
        points: (K, 3) model units.

    Returns:
        (N, K, 2) pixels.

    Raises:
        ValueError: as `project_points`; the message says which matrix.
    """
    frame = np.empty((height, width))
    points = to_homogeneous(points)
    keypoints = []
    for i, matrix in enumerate(matrices):
        try:
            pixels = project_points(frame, points, model_view_matrix, projection_matrix, matrix)
        except ValueError as error:
            raise ValueError(f"matrix {i} of {len(matrices)}: {error}") from None
        keypoints.append(pixels)
    return np.array(keypoints).reshape(-1, len(points), 2)


def skip_behind_camera(
    paths: Sequence[Path],
    matrices: np.ndarray,
    model_view_matrix: np.ndarray,
    points: np.ndarray = BOUNDING_BOX,
) -> tuple[list[Path], np.ndarray]:
    """Leave out the frames of a set in which a part of the target has passed the camera.

    Such a frame cannot show the whole target, and its points have no pixels. A line on the error
    stream names each of these frames.

    Args:
        paths: N frames, from `load_dataset`.
        matrices: (N, 4, 4) model -> world, from `load_dataset`.
        model_view_matrix: (4, 4) world -> OpenGL camera.
        points: (K, 3) of the target, model units.

    Returns:
        paths and matrices of the frames that are left.

    Raises:
        ValueError: no frame is left.
    """
    kept = []
    for i, matrix in enumerate(matrices):
        camera = to_homogeneous(points) @ pose_in_camera(model_view_matrix, matrix).T
        if (camera[:, 2] > 0).all():
            kept.append(i)
        else:
            print(f"{paths[i]}: skipped, the target is at or behind the camera", file=sys.stderr)
    if not kept and len(paths):
        raise ValueError(f"{paths[0].parent}: in no frame is the target in front of the camera")
    return [paths[i] for i in kept], np.asarray(matrices)[kept]


def in_frame(
    keypoints: np.ndarray, width: float = FRAME_SIZE, height: float = FRAME_SIZE
) -> np.ndarray:
    """Return (..., K) bool: which of the pixel positions (..., K, 2) lie inside the frame."""
    keypoints = np.asarray(keypoints)
    return ((keypoints >= 0) & (keypoints < [width, height])).all(-1)


def front_facing(
    matrices: np.ndarray,
    model_view_matrix: np.ndarray,
    points: np.ndarray | None = None,
    normals: np.ndarray | None = None,
    target: Target = XWING,
) -> np.ndarray:
    """Tell which points' outward normals point towards the camera; a zero normal always counts.

    Args:
        matrices: (N, 4, 4) model -> world.
        model_view_matrix: (4, 4) world -> OpenGL camera.
        points: (K, 3) model units; None takes the target's keypoints.
        normals: (K, 3); None takes those of the target's keypoints.
        target: whose keypoints are meant.

    Returns:
        (N, K) bool.
    """
    points = target.keypoints if points is None else points
    normals = np.asarray(target.normals if normals is None else normals)
    poses = np.array([pose_in_camera(model_view_matrix, matrix) for matrix in matrices])
    poses = poses.reshape(-1, 4, 4)
    transposed = poses[:, :3, :3].swapaxes(1, 2)
    lines_of_sight = points @ transposed + poses[:, None, :3, 3]  # (N, K, 3), camera to point
    away = (lines_of_sight * (normals @ transposed)).sum(-1)
    return (away < 0) | ~normals.any(-1)


def rotation_error(estimate: np.ndarray, truth: np.ndarray, target: Target | None = None) -> float:
    """Return the angle in degrees between two rotations (3, 3) or poses (4, 4).

    The Frobenius norm of their difference is 2 sqrt(2) sin(angle / 2). That is precise for small
    angles, where the arc cosine of a trace is not.

    Args:
        estimate: a rotation or a pose.
        truth: another.
        target: the symmetries and axes of revolution of this target are no error. None: it has
            none.
    """
    estimate = np.asarray(estimate)[:3, :3]
    truth = np.asarray(truth)[:3, :3]
    if target is not None and len(target.axes) > 1:
        return 0.0  # a ball
    if target is not None and has_symmetries(target):
        truth = truth @ _nearest_symmetry(estimate.T @ truth, target)[:3, :3]
    sine = np.linalg.norm(estimate - truth) / (2 * np.sqrt(2))
    return float(np.degrees(2 * np.arcsin(min(sine, 1.0))))


def mirror_keypoints(
    keypoints: np.ndarray, width: float, permutation: np.ndarray = MIRROR
) -> np.ndarray:
    """Return the keypoints of the left-right mirrored frame.

    Args:
        keypoints: (..., K, 2+) pixels; what follows x and y is kept.
        width: of the frame, pixels.
        permutation: (K,), see `mirror_permutation`.

    Returns:
        (..., K, 2+): row k is row permutation[k], mirrored.
    """
    mirrored = np.array(keypoints)[..., permutation, :]
    mirrored[..., 0] = width - mirrored[..., 0]
    return mirrored


def mirror_transformation(matrix: np.ndarray, target: Target = XWING) -> np.ndarray:
    """Return the model matrix (4, 4) that shows the left-right mirrored frame.

    The camera must lie on the world's z axis and look along it.

    Args:
        matrix: (4, 4) model -> world.
        target: has a mirror.
    """
    return MIRROR_IN_X @ check_array(matrix, (4, 4), "matrix") @ target.mirror


# ============================================================ heatmaps

SIGMA = 4.0  # pixels of the frame, standard deviation of the heatmaps' Gaussians


def gaussian_heatmaps(
    keypoints: np.ndarray, size: int | tuple[int, int], sigma: float = SIGMA
) -> np.ndarray:
    """Draw one Gaussian for each keypoint.

    Args:
        keypoints: (K, 2) continuous pixels.
        size: int for a square, or (height, width) in pixels.
        sigma: standard deviation in pixels.

    Returns:
        (H, W, K) float32; the Gaussian is 1 at the keypoint's continuous position. Of a keypoint
        outside the frame, what reaches into the frame is drawn.

    Raises:
        ValueError: a wrong shape, NaN, or a sigma that is not positive.

    Source: Tompson et al., Joint Training of a Convolutional Network and a Graphical Model, NIPS
        2014.
    """
    keypoints = check_array(keypoints, (None, 2), "keypoints")
    if np.isnan(keypoints).any():
        raise ValueError("keypoints: some are NaN; leave them out or put them far outside")
    if not sigma > 0:
        raise ValueError(f"sigma: expected a positive number of pixels, got {sigma}")

    height, width = (size, size) if np.isscalar(size) else size
    x = np.arange(width)[:, None] + 0.5
    y = np.arange(height)[:, None] + 0.5
    gx = np.exp(-((x - keypoints[:, 0]) ** 2) / (2 * sigma**2))  # (W, K)
    gy = np.exp(-((y - keypoints[:, 1]) ** 2) / (2 * sigma**2))  # (H, K)
    return (gy[:, None] * gx[None]).astype(np.float32)


def heatmap2argmax(heatmaps: np.ndarray, scale: bool = False) -> np.ndarray:
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


def decode_heatmaps(heatmaps: np.ndarray, sigma: float = SIGMA) -> tuple[np.ndarray, np.ndarray]:
    """Read sub-pixel keypoints from heatmaps.

    A Gaussian is fitted around the brightest pixel of each, also at a border.

    Args:
        heatmaps: (..., H, W, K), peaks of 1.
        sigma: standard deviation of the Gaussians in pixels; the size of the windows follows it.

    Returns:
        keypoints (..., K, 2) float64, continuous pixels (x, y), NaN where a heatmap is zero or not
        finite; and confidence (..., K) float64 in [0, 1]: the heatmap's mass within 3 sigma of the
        peak as a fraction of a Gaussian's mass there.

    Source: Guo, A Simple Algorithm for Fitting a Gaussian Function, IEEE Signal Processing Magazine
        28(5), 2011.
    """
    heatmaps = np.asarray(heatmaps)
    peaks = heatmap2argmax(heatmaps)
    *lead, height, width, count = heatmaps.shape
    maps = np.moveaxis(heatmaps, -1, -3).reshape(-1, height, width)

    window, x, y = _windows(maps, peaks, int(np.ceil(3 * sigma)))
    brightest = window[:, len(x) // 2, len(x) // 2]
    found = (brightest > 0) & (brightest < np.inf)
    offset = _gaussian_offset(window, x, y, sigma)
    keypoints = np.where(found[:, None], peaks.reshape(-1, 2) + 0.5 + offset, np.nan)

    squared = (x - offset[:, :1, None]) ** 2 + (y - offset[:, 1:, None]) ** 2
    gaussian = np.where(np.isnan(window), 0, np.exp(-squared / (2 * sigma**2)))
    # At least a tenth of a whole Gaussian is expected: where one lies mostly outside the map, a
    # little noise must not be confident.
    expected_mass = np.maximum(gaussian.sum((1, 2)), 0.1 * 2 * np.pi * sigma**2)
    mass = np.nansum(np.clip(window, 0, None), (1, 2))
    confidence = np.where(found, np.clip(mass / expected_mass, 0, 1), 0.0)
    return keypoints.reshape(*lead, count, 2), confidence.reshape(*lead, count)


def _windows(maps, peaks, radius):
    """Cut a square around the peak of each of M maps (M, H, W).

    Returns the values (M, 2 radius + 1, 2 radius + 1), NaN outside the map, and the offsets x and y
    (2 radius + 1, 2 radius + 1) of a square's pixels from its middle.
    """
    height, width = maps.shape[1:]
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    positions = peaks.reshape(-1, 1, 1, 2) + np.stack([x, y], -1)
    columns = positions[..., 0].clip(0, width - 1)
    rows = positions[..., 1].clip(0, height - 1)
    values = maps[np.arange(len(maps))[:, None, None], rows, columns]
    return np.where(in_frame(positions, width, height), values, np.nan), x, y


def _gaussian_offset(window, x, y, sigma):
    """Return the offsets (M, 2) from the windows' middles to the peaks.

    log h = a + b x + c y + d (x^2 + y^2) is fitted by linear least squares. The weights h^2 make
    its solution that of the least squares of h, to first order.
    """
    near = np.maximum(abs(x), abs(y)) <= max(1, round(1.5 * sigma))
    usable = near & np.isfinite(window) & (window > 1e-6)
    values = np.where(usable, window, 1).reshape(len(window), x.size).astype(float)
    weight = values**2 * usable.reshape(values.shape)

    # x and y in sigmas, the matrix scaled to trace 1 and a little added to its diagonal: the
    # equations can be solved for an empty window too.
    scales = [1, sigma, sigma, sigma**2]
    basis = np.stack([np.ones_like(x), x, y, x**2 + y**2], -1).reshape(-1, 4) / scales
    matrix = np.einsum("mp,pi,pj->mij", weight, basis, basis, optimize=True)
    right = (weight * np.log(values)) @ basis
    trace = np.trace(matrix, axis1=1, axis2=2)[:, None] + 1e-300
    matrix = matrix / trace[..., None] + 1e-12 * np.eye(4)
    _, b, c, d = np.linalg.solve(matrix, (right / trace)[..., None])[..., 0].T

    with np.errstate(divide="ignore", invalid="ignore"):
        offset = np.stack([b, c], -1) / (-2 * d[:, None]) * sigma
    peaked = (d[:, None] < -1e-3) & np.isfinite(offset)
    return np.where(peaked, np.clip(offset, -1.5 * sigma, 1.5 * sigma), 0.0)


def keypoint_sigma(
    heatmaps: np.ndarray, keypoints: np.ndarray, sigma: float = SIGMA, reach: float = 10.0
) -> np.ndarray:
    """Estimate how uncertain each keypoint is from the width of its heatmap.

    A softmax heatmap is the network's probability of every position, convolved with the Gaussian
    that it was trained on. Its variance is measured in a Gaussian window. The effects of the window
    and of the training's Gaussian are then removed.

    Args:
        heatmaps: (..., H, W, K).
        keypoints: (..., K, 2) pixels of the maps.
        sigma: standard deviation of the training's Gaussian, pixels of the maps.
        reach: standard deviation of the window, pixels of the maps.

    Returns:
        (..., K) standard deviations along one axis, pixels of the maps; inf for a keypoint that is
        NaN.
    """
    heatmaps = np.asarray(heatmaps)
    keypoints = np.asarray(keypoints)
    height, width = heatmaps.shape[-3:-1]
    centre = np.nan_to_num(keypoints)[..., None, :, :]
    x = np.arange(width)[:, None] + 0.5 - centre[..., 0]
    y = np.arange(height)[:, None] + 0.5 - centre[..., 1]
    wx = np.exp(-(x**2) / (2 * reach**2))  # (..., W, K)
    wy = np.exp(-(y**2) / (2 * reach**2))  # (..., H, K)

    row_sums = []  # (..., H, K) sums along x for the powers 0 to 2 of x
    for power in range(3):
        weight = (wx * x**power).astype(heatmaps.dtype)
        row_sums.append(np.einsum("...hwk,...wk->...hk", heatmaps, weight))

    def moment(power_of_x, power_of_y):
        return (row_sums[power_of_x] * wy * y**power_of_y).sum(-2)

    with np.errstate(divide="ignore", invalid="ignore"):
        mass = moment(0, 0)
        mean_x = moment(1, 0) / mass
        mean_y = moment(0, 1) / mass
        xx = moment(2, 0) / mass - mean_x**2
        yy = moment(0, 2) / mass - mean_y**2
        xy = moment(1, 1) / mass - mean_x * mean_y
        half = np.hypot((xx - yy) / 2, xy)
        principal = (xx + yy) / 2 + np.stack([-half, half])  # (2, ..., K) variances along the axes
        # A product of Gaussians adds their precisions, a convolution their variances.
        precision = 1 / np.maximum(principal, 1e-9) - 1 / reach**2
        variance = 1 / np.maximum(precision, 1e-4) - sigma**2

    deviation = np.sqrt(np.maximum(variance, 1e-3).mean(0))
    known = np.isfinite(keypoints).all(-1) & np.isfinite(deviation)
    return np.where(known, deviation, np.inf)


# ============================================================ frames and batches

CROP_MARGIN = 48  # pixels by which a training square may reach beyond its frame
_FAR = -1e4  # pixels, the position given to a keypoint that faces away
_FRAME_CORNERS = [(0.0, 0.0), (float(FRAME_SIZE), 0.0), (0.0, float(FRAME_SIZE))]  # pixels


def make_dataset(
    paths: Sequence[Path],
    matrices: np.ndarray,
    model_view_matrix: np.ndarray,
    projection_matrix: np.ndarray,
    batch_size: int = 16,
    size: int = FRAME_SIZE,
    crop: bool = False,
    augmented: bool = True,
    randomise: Callable | None = None,
    synthesise: Callable | None = None,
    shares: tuple[float, float] = (0, 0),
    epoch_size: int | None = None,
    without: Sequence[str] = (),
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    workers: int = 2,
    target: Target = XWING,
) -> object:
    """Make a `keras.utils.PyDataset` that reads or draws frames and augments them.

    It yields images (B, size, size, 3) uint8, and keypoints (B, K, 3) float32: x, y in pixels and
    visibility, which is 1 in the frame and facing the camera, else 0. Points that face away are put
    far outside the frame.

    Args:
        paths: N frames, from `load_dataset`.
        matrices: (N, 4, 4), from `load_dataset`.
        model_view_matrix: (4, 4), from `load_camera`.
        projection_matrix: (4, 4), from `load_camera`.
        batch_size: samples of a batch, over all shards.
        size: width and height in pixels to which frames and keypoints are scaled after the
            augmentation.
        crop: cut a square of that size around the target instead. It keeps all the detail and costs
            less than the whole frame.
        augmented: shuffle, mirror (where the target has a mirror) and augment; False leaves the
            frames alone.
        randomise: a function (image, pose, K, rng) -> image that changes frames before they are
            augmented.
        synthesise: a function (size, rng, frame) -> image, pose, K that draws a square of a frame
            that is `frame` pixels wide. If it draws several shapes, it also returns the `Target`
            that is drawn, with as many keypoints.
        shares: which fraction of the samples is changed by `randomise`, and which is drawn by
            `synthesise` (and not augmented). The rest are plain frames.
        epoch_size: samples of an epoch; by default there are as many as frames.
        without: steps that are left out, see `augmentation`.
        seed: of all random numbers.
        shard: (index, count): this worker takes every count-th sample of each batch, from index on.
        workers: threads that make batches.
        target: whose keypoints are learnt.

    Raises:
        ValueError: arguments that do not fit together.
    """
    _check_dataset(paths, matrices, epoch_size, augmented, randomise, synthesise, shares)
    if size < 1 or (crop and size > FRAME_SIZE):
        expected = f"expected pixels, at most {FRAME_SIZE} for squares of a frame"
        raise ValueError(f"size: {expected}, got {size}")
    if batch_size < 1 or batch_size % shard[1]:
        expected = f"expected a multiple of the {shard[1]} workers"
        raise ValueError(f"batch_size: {expected}, got {batch_size}")

    paths, matrices = skip_behind_camera(paths, matrices, model_view_matrix, target.keypoints)
    frames = _Frames(
        paths=list(paths),
        poses=np.array([pose_in_camera(model_view_matrix, matrix) for matrix in matrices]),
        K=camera_matrix(projection_matrix, FRAME_SIZE, FRAME_SIZE),
        target=target,
        size=size,
        crop=bool(crop),
        augmented=augmented,
        randomise=randomise,
        synthesise=synthesise,
        shares=shares,
        without=without,
    )
    count = epoch_size or len(paths)
    return _dataset_class()(frames, batch_size, count, seed, shard, workers)


def _check_dataset(paths, matrices, epoch_size, augmented, randomise, synthesise, shares):
    """Raise ValueError unless there are samples, and functions for the shares of them."""
    all_drawn = augmented and shares[1] == 1
    count = epoch_size or len(paths)
    if len(paths) != len(matrices) or count < 1 or not (len(paths) or all_drawn):
        raise ValueError(
            f"got {len(paths)} frames, {len(matrices)} matrices and shares {shares}; expected a "
            "matrix for each frame (render some: make data), or an epoch_size and all samples drawn"
        )

    function_missing = (shares[0] and not randomise) or (shares[1] and not synthesise)
    are_fractions = min(shares) >= 0 and sum(shares) < 1 + 1e-9  # False for NaN
    if function_missing or not are_fractions:
        expected = "expected 0 or more, 1 or less together, and their functions"
        raise ValueError(f"shares: {expected}; got {shares}")


@functools.cache
def _dataset_class():
    """The class that `make_dataset` returns. It is defined late: importing Keras takes seconds."""
    keras = import_keras()

    class FrameDataset(keras.utils.PyDataset):
        """Batches that depend on (seed, epoch, index) alone: threads may make them in any order."""

        def __init__(self, frames, batch_size, epoch_size, seed, shard, workers):
            super().__init__(workers=workers, max_queue_size=8)
            self.frames = frames
            self.batch_size = batch_size
            self.epoch_size = epoch_size
            self.seed = seed
            self.shard = shard
            self.epoch = 0
            self.finished = {}  # (epoch, index) -> time at which the batch was made, seconds

        def __len__(self):
            return math.ceil(self.epoch_size / self.batch_size)

        def __getitem__(self, index):
            shard, shards = self.shard
            order = self.frames.order(np.random.default_rng([self.seed, self.epoch]))
            order = np.resize(order, self.epoch_size)  # frames repeat in a longer epoch
            first = index * self.batch_size
            batch = order[first : first + self.batch_size]

            rng = np.random.default_rng([self.seed, self.epoch, index, shard])
            samples = self.frames.samples(batch[shard::shards], rng)
            self.finished[self.epoch, index] = time.perf_counter()
            return samples

        def on_epoch_end(self):
            self.epoch += 1

    return FrameDataset


@dataclasses.dataclass(frozen=True, eq=False)
class _Frames:
    """The frames of a set, and how samples are made from them; see `make_dataset`."""

    paths: list  # N
    poses: np.ndarray  # (N, 4, 4)
    K: np.ndarray  # (3, 3) pixels
    target: Target
    size: int
    crop: bool
    augmented: bool
    randomise: Callable | None
    synthesise: Callable | None
    shares: tuple
    without: Sequence[str]

    def order(self, rng):
        """Return the numbers of the frames (N,), shuffled if they are augmented."""
        order = np.arange(len(self.paths))
        return rng.permutation(order) if self.augmented else order

    def samples(self, chosen, rng):
        """Return the samples of frames (B,): images (B, size, size, 3) and keypoints (B, K, 3)."""
        transform = None
        if self.augmented:
            transform = augmentation(int(rng.integers(2**31)), self.without)
        images, keypoints = zip(*(self._sample(i, rng, transform) for i in chosen))
        return np.stack(images), np.stack(keypoints)

    def _sample(self, i, rng, transform):
        """Return one sample: image (size, size, 3) uint8 and keypoints (K, 3) float32."""
        choice = rng.random() if self.augmented else 1.0  # 1: a plain frame
        if choice < self.shares[1]:
            return self._synthesised(rng)

        image = read_image(self.paths[i], (FRAME_SIZE, FRAME_SIZE))
        pose = self.poses[i]
        K = self.K
        if choice < sum(self.shares):
            image = self.randomise(image, pose, K, rng)

        motion = np.eye(2, 3)  # of the pixels
        if self.augmented:
            image, pose, K = self._mirrored(image, pose, K, rng)
            image, corners = augment(image, _FRAME_CORNERS, transform)
            motion = cv2.getAffineTransform(np.float32(_FRAME_CORNERS), np.float32(corners))
        image, motion = self._resized(image, pose, K, motion, rng)
        return image, self._label(self.target, pose, K, motion)

    def _synthesised(self, rng):
        """Return a sample that `synthesise` draws."""
        frame = FRAME_SIZE if self.crop else self.size
        image, pose, K, *drawn = self.synthesise(self.size, rng, frame)
        target = drawn[0] if drawn else self.target
        return image, self._label(target, pose, K)

    def _mirrored(self, image, pose, K, rng):
        """Mirror every second frame, where the target has a mirror: image, pose and K."""
        if rng.random() >= 0.5 or self.target.mirror is None:
            return image, pose, K
        image = np.ascontiguousarray(image[:, ::-1])
        K = K.copy()
        K[0, 2] = FRAME_SIZE - K[0, 2]
        return image, MIRROR_IN_X @ pose @ self.target.mirror, K

    def _resized(self, image, pose, K, motion, rng):
        """Return the image at `size`, and the motion (2, 3) of the pixels up to there.

        It is a square around the target or the scaled frame.
        """
        if self.crop:
            box = project_pose(self.target.box, pose, K)
            middle = cv2.transform(box[None], motion)[0].mean(0)
            return self._cropped(image, middle, motion, rng)
        if self.size == FRAME_SIZE:
            return image, motion

        size = (self.size, self.size)
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        return image, motion * (self.size / FRAME_SIZE)

    def _cropped(self, image, middle, motion, rng):
        """Cut a square around the target's middle (2,). Half of them may reach beyond the frame.

        It is black there, and the network learns to find keypoints beyond the frame's edge.
        """
        margin = CROP_MARGIN if rng.random() < 0.5 else 0
        middle = middle + rng.uniform(-self.size / 4, self.size / 4, 2)
        corner = np.round(middle - self.size / 2)
        corner = corner.clip(-margin, FRAME_SIZE - self.size + margin)
        motion = motion - np.column_stack([np.zeros((2, 2)), corner])
        return crop_image(image, corner, self.size), motion

    def _label(self, target, pose, K, motion=None):
        """Return the keypoints (K, 3) float32 of a target in pixels that were moved (2, 3).

        Of the poses that look the same, always the same one is meant.
        """
        motion = np.eye(2, 3) if motion is None else motion
        in_plane = np.eye(4)
        angle = np.arctan2(motion[1, 0] - motion[0, 1], motion[0, 0] + motion[1, 1])
        in_plane[:3, :3] = _turn((0, 0, 1), angle)
        pose = pose @ reference_symmetry(in_plane @ pose, target)

        facing = front_facing([pose], OPENCV, target=target)[0]
        keypoints = cv2.transform(project_pose(target.keypoints, pose, K)[None], motion)[0]
        keypoints = np.where(facing[:, None], keypoints, _FAR)
        visible = in_frame(keypoints, self.size, self.size)
        return np.concatenate([keypoints, visible[:, None]], 1).astype(np.float32)


def augmentation(seed: int | None = None, without: Sequence[str] = ()) -> object:
    """Return the albumentations pipeline.

    The mirror is not part of it, because mirrored keypoints must also be permuted.

    Args:
        seed: of the random numbers.
        without: names of the steps that are left out, e.g. "flare".

    Raises:
        ValueError: `without` names a step that does not exist.

    Source: Labbe et al., CosyPose, ECCV 2020 (strong colours); DeVries and Taylor, Improved
        Regularization of Convolutional Neural Networks with Cutout, 2017 (erasing).
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
    unknown = sorted(set(without) - set(steps))
    if unknown:
        names = ", ".join(steps)
        raise ValueError(f"without: expected some of {names}, got {', '.join(unknown)}")

    kept = [step for name, step in steps.items() if name not in without]
    parameters = A.KeypointParams(format="xy", remove_invisible=False)
    return A.Compose(kept, seed=seed, keypoint_params=parameters)


def augment(
    image: np.ndarray, keypoints: np.ndarray, transform: object
) -> tuple[np.ndarray, np.ndarray]:
    """Send a frame and its keypoints through an albumentations pipeline.

    Args:
        image: (H, W, 3) uint8.
        keypoints: (K, 2) continuous pixels; albumentations counts from pixel centres instead.
        transform: from `augmentation`.

    Returns:
        the changed image (H, W, 3) and keypoints (K, 2).
    """
    result = transform(image=image, keypoints=np.asarray(keypoints) - 0.5)
    moved = np.asarray(result["keypoints"], dtype=np.float64).reshape(-1, 2)
    return result["image"], moved + 0.5


def crop_image(image: np.ndarray, corner: Sequence[float], size: int) -> np.ndarray:
    """Cut a square out of a frame; it is black beyond the frame's edge.

    Args:
        image: (H, W, ...) uint8.
        corner: (left, top) whole pixels; may lie outside the frame.
        size: side of the square, pixels.
    """
    shift = np.array([[1, 0, -corner[0]], [0, 1, -corner[1]]], float)
    return cv2.warpAffine(image, shift, (size, size), flags=cv2.INTER_NEAREST)


# ============================================================ network

BACKBONE = "resnet18"  # encoder of the U-Net, one of BACKBONES
# Those of segmentation_models that Keras 3 is known to build, save and load. It refuses the layers'
# names of the DenseNets; senet154, with 115 million parameters, has not been tried.
BACKBONES = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50", "resnext101"),
    *("seresnet18", "seresnet34", "seresnet50", "seresnet101", "seresnet152"),
    *("seresnext50", "seresnext101", "vgg16", "vgg19", "mobilenet", "mobilenetv2"),
    *("inceptionv3", "inceptionresnetv2", *(f"efficientnetb{i}" for i in range(8))),
)
DECODER_FILTERS = (128, 64, 32, 32, 16)  # channels of the five stages of the decoder
STRIDE = 2  # frame pixels for one heatmap pixel of the shipped network
BACKENDS = "tensorflow", "jax", "torch"  # of Keras
_RESTORE = "restore weights/ with git checkout weights"
_MODEL_SETTINGS = {"backbone", "keypoints", "sigma", "head", "decoder_filters", "size", "stride"}
_OPTIONAL_SETTINGS = {"points", "preprocessing"}
PREPROCESSING = {"scale": 1 / 127.5, "offset": -1.0}  # [0, 255] to [-1, 1]


def build_model(
    backbone: str = BACKBONE,
    keypoints: int | None = None,
    sigma: float = SIGMA,
    head: str = "softmax",
    decoder_filters: Sequence[int] = DECODER_FILTERS,
    size: int = FRAME_SIZE,
    stride: int = STRIDE,
    preprocessing: dict | None = None,
    target: Target = XWING,
    unet: Callable | None = None,
) -> object:
    """Build an untrained U-Net.

    Its input is frames (B, size, size, 3) in [0, 255], its output heatmaps (B, size / stride,
    size / stride, keypoints).

    Args:
        backbone: an encoder of segmentation_models, one of BACKBONES.
        keypoints: number of output channels, the 8 corners first; None for all of the target's.
        sigma: standard deviation of the heatmaps' Gaussians in pixels at this size.
        head: "softmax" for `spatial_softmax`, "linear" for maps trained with a squared error.
        decoder_filters: channels of the five stages of the decoder.
        size: width and height in pixels, a multiple of 32; the weights do not depend on it.
        stride: 1 for maps of the frame's size, 2 to leave out the decoder's last, most expensive
            stage.
        preprocessing: {"scale": (3,), "offset": (3,)}, which the network's first layer applies to
            the channels of the frames. None maps [0, 255] to [-1, 1].
        target: whose keypoints the channels are.
        unet: makes the U-Net, with the arguments of segmentation_models.Unet; None is that. See
            `xwing.encoders`.

    Returns:
        a keras.Model; its `settings` hold these arguments, its `target` the target.
        "preprocessing" is one of the settings where it is not None.

    Raises:
        ValueError: arguments that do not fit.

    Source: Ronneberger et al., U-Net, MICCAI 2015.
    """
    keras = import_keras()

    keypoints = len(target.keypoints) if keypoints is None else keypoints
    settings = {
        "backbone": backbone,
        "keypoints": keypoints,
        "sigma": sigma,
        "head": head,
        "decoder_filters": list(decoder_filters),
        "size": size,
        "stride": stride,
    }
    _check_model_settings(settings)
    if preprocessing is not None:
        settings["preprocessing"] = _checked_preprocessing(preprocessing)

    frames = keras.Input((size, size, 3), name="frames")
    unet = (unet or import_segmentation_models().Unet)(
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

    rescaling = keras.layers.Rescaling(**settings.get("preprocessing", PREPROCESSING))
    maps = unet(rescaling(frames))
    if head == "softmax":
        maps = spatial_softmax(maps, sigma / stride)
    else:
        maps = keras.ops.cast(maps, "float32")
    model = keras.Model(frames, maps, name="xwing")
    model.settings = settings
    model.target = target
    return model


def import_keras() -> object:
    """Import Keras, whatever other projects have set up for it, and return the module.

    The variable KERAS_BACKEND chooses the backend; TensorFlow is the default. Other variables that
    change how Keras computes have no effect.

    Raises:
        ImportError: Keras or the backend is not installed, or the project cannot use the backend.
    """
    if sys.flags.optimize > 1:
        raise ImportError(
            "Keras' packages need docstrings; unset PYTHONOPTIMIZE, and leave out -OO"
        )
    backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if backend not in BACKENDS or importlib.util.find_spec(backend) is None:
        raise ImportError(
            f"KERAS_BACKEND: expected one of {', '.join(BACKENDS)} that is installed, got "
            f"{backend!r}; pip install -r requirements.txt installs TensorFlow, the default"
        )
    os.environ["TF_USE_LEGACY_KERAS"] = "0"
    import keras

    keras.config.set_max_epochs(None)
    keras.config.set_max_steps_per_epoch(None)
    return keras


def import_segmentation_models() -> object:
    """Import segmentation_models for the Keras backend in use, and return the module."""
    keras = import_keras()

    tensorflow = keras.backend.backend() == "tensorflow"
    os.environ["SM_FRAMEWORK"] = "tf.keras" if tensorflow else "keras"
    if not tensorflow:  # names that Keras 3 moved and the package still uses
        keras.utils.generic_utils = keras.utils
        keras.backend.sigmoid = keras.ops.sigmoid
        keras.backend.int_shape = lambda x: tuple(x.shape)
    with contextlib.redirect_stdout(None):  # it prints which framework it uses
        import segmentation_models

    return segmentation_models


def _checked_preprocessing(preprocessing):
    """A "preprocessing" of `build_model`, as lists of numbers for JSON."""
    if not isinstance(preprocessing, dict) or set(preprocessing) != {"scale", "offset"}:
        raise ValueError(f"preprocessing: expected scale and offset, got {preprocessing!r}")
    arrays = {name: check_array(preprocessing[name], (3,), name) for name in ("scale", "offset")}
    if not np.isfinite(list(arrays.values())).all():
        raise ValueError(f"preprocessing: expected finite numbers, got {preprocessing!r}")
    return {name: array.tolist() for name, array in arrays.items()}


def _check_model_settings(settings):
    """Raise ValueError for arguments of `build_model` that do not fit."""
    backbone = settings["backbone"]
    head = settings["head"]
    sigma = settings["sigma"]
    if backbone not in BACKBONES:
        raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, got {backbone!r}")
    if head not in ("softmax", "linear"):
        raise ValueError(f"head: expected 'softmax' or 'linear', got {head!r}")
    if not (np.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma: expected a positive number of pixels, got {sigma}")

    count = settings["keypoints"]
    filters = settings["decoder_filters"]
    if not all(1 <= number <= 4096 for number in (count, *filters)):
        raise ValueError(f"expected 1 to 4096 keypoints and filters, got {count} and {filters}")

    size = settings["size"]
    stride = settings["stride"]
    if size < 32 or size % 32 or stride not in (1, 2):
        expected = "expected a multiple of 32 as size and 1 or 2 as stride"
        raise ValueError(f"{expected}, got {size} and {stride}")


def spatial_softmax(logits: object, sigma: float) -> object:
    """Turn logits (B, H, W, K) into heatmaps.

    The softmax runs over a channel's pixels and one more class, "not in the frame", which has as
    much weight as H W pixels of logit 0. It is scaled by 2 pi sigma^2, so that a softmax that
    equals a Gaussian of that sigma has a peak of 1.

    Args:
        logits: (B, H, W, K) tensor.
        sigma: standard deviation of the Gaussians, pixels of the maps.

    Returns:
        (B, H, W, K) float32 tensor.
    """
    from keras import ops

    height, width = logits.shape[1:3]
    logits = ops.cast(logits, "float32")
    # The largest is subtracted from all logits, so that no exponential overflows.
    largest = ops.maximum(ops.max(logits, axis=(1, 2), keepdims=True), 0.0)
    largest = ops.stop_gradient(largest)
    weights = ops.exp(logits - largest)
    absent = height * width * ops.exp(-largest)
    total = ops.sum(weights, axis=(1, 2), keepdims=True) + absent
    return weights * (2 * np.pi * sigma**2 / total)


class HeatmapLoss:
    """A Keras loss that draws a batch's Gaussian heatmaps from its keypoints, on the device.

    It is called with y_true (B, K, 3) keypoints (see `make_dataset`) and y_pred (B, H, W, K), and
    returns (B,).

    Args:
        sigma: standard deviation in pixels of the frames.
        kind: "softmax", the cross-entropy of the predicted map against the Gaussian, both as
            distributions over the pixels and one more class for what lies outside the frame; "mse",
            the mean squared error; "weighted", the same with the weight 1 + 50 h at a pixel of
            value h, so that the few bright pixels count.
        stride: frame pixels for one pixel of the network's maps.

    Raises:
        ValueError: an unknown kind.

    Source: Sun et al., Integral Human Pose Regression, ECCV 2018 (softmax); DeTone et al.,
        SuperPoint, CVPRW 2018, section 3.2 (a class for absent points).
    """

    def __init__(self, sigma: float = SIGMA, kind: str = "softmax", stride: int = 1) -> None:
        if kind not in ("softmax", "mse", "weighted"):
            raise ValueError(f"kind: expected 'softmax', 'mse' or 'weighted', got {kind!r}")
        self.sigma = float(sigma)
        self.kind = kind
        self.stride = stride
        self.__name__ = f"heatmap_{kind}"

    def __call__(self, y_true, y_pred):
        """Return the loss (B,) of keypoints (B, K, 3) and maps (B, H, W, K)."""
        from keras import ops

        y_true = ops.cast(y_true, "float32")
        y_pred = ops.cast(y_pred, "float32")
        gx = self._profile(y_true[..., 0], y_pred.shape[2])  # (B, W, K)
        gy = self._profile(y_true[..., 1], y_pred.shape[1])  # (B, H, K)
        if self.kind == "softmax":
            return self._cross_entropy(gx, gy, y_pred)

        heatmaps = gy[:, :, None] * gx[:, None]
        weight = 1.0 + 50.0 * heatmaps if self.kind == "weighted" else 1.0
        return ops.mean(weight * ops.square(heatmaps - y_pred), axis=(1, 2, 3))

    def _profile(self, position, length):
        """Return Gaussians (B, length, K) along one axis, of positions (B, K) in frame pixels."""
        from keras import ops

        centres = (ops.arange(length, dtype="float32") + 0.5) * self.stride
        squared = ops.square(centres[None, :, None] - position[:, None])
        return ops.exp(-squared / (2 * self.sigma**2))

    def _cross_entropy(self, gx, gy, y_pred):
        """Return (B,) the cross-entropy of maps (B, H, W, K); gx (B, W, K) times gy (B, H, K)."""
        from keras import ops

        mass = 2 * np.pi * (self.sigma / self.stride) ** 2  # of a whole Gaussian
        log_p = ops.log(y_pred + 1e-30) - float(np.log(mass))
        inside = ops.sum(gy * ops.sum(log_p * gx[:, None], axis=2), axis=1) / mass

        true_inside = ops.minimum(ops.sum(gx, axis=1) * ops.sum(gy, axis=1) / mass, 1.0)
        predicted_outside = 1.0 - ops.sum(y_pred, axis=(1, 2)) / mass
        log_outside = ops.log(ops.maximum(predicted_outside, 0.0) + 1e-6)
        outside = (1.0 - true_inside) * log_outside
        return -ops.mean(inside + outside, axis=-1)


def nmae_argmax(y_true: object, y_pred: object, stride: int = 1) -> object:
    """Return the original exercise's metric: the mean absolute error of the corners' argmax.

    It is a fraction of the frame's width and height, averaged over the corners in the frame.

    Args:
        y_true: maps (B, H, W, K), in which a peak above 0.5 is a corner in the frame, or keypoints
            (B, K, 3), see `make_dataset`.
        y_pred: maps (B, H, W, K).
        stride: frame pixels for one pixel of the maps.
    """
    from keras import ops

    y_true = ops.convert_to_tensor(y_true)
    y_pred = ops.convert_to_tensor(y_pred)[..., :8]
    size = ops.convert_to_tensor(np.array(y_pred.shape[2:0:-1], np.float32))
    if len(y_true.shape) == 4:
        y_true = y_true[..., :8]
        true = _argmax(y_true)
        present = ops.cast(ops.max(y_true, axis=(1, 2)) > 0.5, "float32")
    else:
        y_true = ops.cast(y_true[:, :8], "float32")
        true = ops.floor(y_true[..., :2] / stride)
        present = y_true[..., 2]

    error = ops.mean(ops.abs(_argmax(y_pred) - true) / size, axis=-1)
    return ops.sum(error * present) / ops.maximum(ops.sum(present), 1.0)


def _argmax(maps):
    """Return (B, K, 2) float32 pixel indices (x, y): `heatmap2argmax` as Keras operations."""
    from keras import ops

    height, width, count = maps.shape[1:]
    flat = ops.argmax(ops.reshape(maps, (-1, height * width, count)), axis=1)
    return ops.cast(ops.stack([flat % width, flat // width], axis=-1), "float32")


def compile_model(
    model: object, learning_rate: float = 1e-3, loss: HeatmapLoss | None = None
) -> object:
    """Compile with Adam, a `HeatmapLoss` and `nmae_argmax`.

    XLA is not used on CPUs, where it is five times slower.

    Args:
        model: from `build_model`.
        learning_rate: of Adam.
        loss: None takes "softmax" for a softmax head, "mse" for a linear one.

    Returns:
        the model.
    """
    keras = import_keras()

    settings = model.settings
    stride = settings["stride"]
    if loss is None:
        kind = "softmax" if settings["head"] == "softmax" else "mse"
        loss = HeatmapLoss(settings["sigma"], kind, stride)
    nmae = functools.partial(nmae_argmax, stride=stride)
    nmae = functools.update_wrapper(nmae, nmae_argmax)  # Keras shows its name

    only_cpu = all("cpu" in device.lower() for device in keras.distribution.list_devices())
    jit = False if only_cpu or keras.backend.backend() == "torch" else "auto"
    optimizer = keras.optimizers.Adam(learning_rate, clipnorm=1.0)
    model.compile(optimizer, loss, metrics=[nmae], jit_compile=jit)
    return model


def weights_files(path: str | Path) -> tuple[Path, Path]:
    """Return the two files of weights: NAME.weights.h5 and NAME.json.

    Raises:
        ValueError: the name does not end in .weights.h5.
    """
    path = Path(path)
    if not path.name.endswith(".weights.h5"):
        raise ValueError(f"{path}: expected a file name that ends in .weights.h5")
    return path, path.with_name(path.name.removesuffix(".weights.h5") + ".json")


def weights_settings(path: str | Path) -> dict:
    """Read `NAME.json`, which describes `NAME.weights.h5`.

    Returns:
        a dict; "model" holds the arguments of `build_model`, "target" what `target_from_record`
        reads.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: the files are foreign, damaged, or do not belong together.
    """
    path, settings_path = weights_files(path)
    for file in (path, settings_path):
        if not file.is_file():
            text = f"no such file; run notebooks/train.ipynb, or {_RESTORE}"
            raise FileNotFoundError(f"{file}: {text}")

    info = read_json(settings_path)
    model = info.get("model") if isinstance(info, dict) else None
    if not isinstance(model, dict) or set(model) - _OPTIONAL_SETTINGS != _MODEL_SETTINGS:
        names = ", ".join(sorted(_MODEL_SETTINGS))
        raise ValueError(f"{settings_path}: no model with {names} in it; {_RESTORE}")
    if info.get("sha256") != hashlib.sha256(path.read_bytes()).hexdigest():
        text = f"not the weights of {settings_path.name}, or damaged"
        raise ValueError(f"{path}: {text}; {_RESTORE}")

    points = model.pop("points", [])  # older files hold these in place of a target
    if not isinstance(points, list) or points != KEYPOINTS[: len(points)].tolist():
        raise ValueError(f"{path}: trained on other model points than the X-wing's; train again")
    return info


def weights_target(path: str | Path) -> Target:
    """Return the target that weights were trained for; Keras is not needed.

    Raises:
        FileNotFoundError, ValueError: as `weights_settings`.
    """
    return _trained_target(weights_settings(path), path)


def _trained_target(info, path):
    """The target that settings of weights name; weights older than targets are the X-wing's."""
    if "target" not in info:
        return XWING
    return target_from_record(info["target"], weights_files(path)[1], SHIP.parents[1])


def load_model(path: str | Path, size: int | None = None, target: Target | None = None) -> object:
    """Rebuild a trained model from `NAME.weights.h5` and `NAME.json`.

    There are no pickles and no code in these files.

    Args:
        path: of the weights.
        size: width and height in pixels of the frames to build for, a multiple of 32; None takes
            the size of the training frames.
        target: what the weights must have been trained for; None takes any.

    Returns:
        a keras.Model; `settings` and `target` say what it was trained for.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: the files are foreign, damaged, do not belong together, or are those of another
            target.
    """
    info = weights_settings(path)
    settings = info["model"]
    trained_target = _trained_target(info, path)
    if target is not None:
        check_same_target(trained_target, target, f"{path}: these weights")
    if size and size % 32:
        raise ValueError(f"size: expected a multiple of 32, got {size}")

    try:
        arguments = {**settings, "size": size or settings["size"], "target": trained_target}
        model = build_model(**arguments)
        _check_shapes(path, model)
        with warnings.catch_warnings():
            # Keras warns of every layer that does not fit; the error below is enough.
            warnings.simplefilter("ignore", UserWarning)
            model.load_weights(path)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        text = f"not weights of this project's network ({reason})"
        raise ValueError(f"{path}: {text}; {_RESTORE}") from None
    model.trained_size = settings["size"]
    return model


def _check_shapes(path, model):
    """Raise ValueError unless a file holds tensors of the model's shapes.

    No tensor is read for that: a small file can hold a huge one.
    """
    import h5py

    shapes = []

    def add_shape(_, item):
        if hasattr(item, "shape"):
            shapes.append(item.shape)

    with h5py.File(path) as file:
        file.visititems(add_shape)
    expected = [tuple(variable.shape) for variable in model.weights]
    if sorted(shapes) != sorted(expected):
        raise ValueError(f"its {len(shapes)} tensors have other shapes than the network's")


def predict_heatmaps(
    model: object, images: np.ndarray, batch_size: int = 16, channels: int = 8
) -> np.ndarray:
    """Predict heatmaps, averaged with those of the mirrored frames where the target has a mirror.

    Args:
        model: from `load_model` or `build_model`.
        images: (N, H, W, 3) uint8 RGB, of the model's size.
        batch_size: frames that the network sees at a time.
        channels: how many of the network's keypoints to return, the 8 corners first.

    Returns:
        (N, H / stride, W / stride, channels) float32, up to 9 MB a frame.

    Raises:
        ValueError: images of another shape or type.
    """
    images = np.asarray(images)
    size = model.settings["size"]
    if images.ndim != 4 or images.shape[1:] != (size, size, 3) or images.dtype != np.uint8:
        got = f"{images.shape} {images.dtype}"
        raise ValueError(f"images: expected (N, {size}, {size}, 3) uint8, got {got}")

    channels = min(channels, model.output_shape[3])
    permutation = heatmap_permutation(model.target, model.settings["keypoints"])
    maps = np.empty((len(images), *model.output_shape[1:3], channels), np.float32)
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        batch = np.resize(part, (batch_size, size, size, 3))  # always the same shape: one graph
        predicted = average_mirrored(model.predict_on_batch, batch, permutation)
        maps[start : start + len(part)] = predicted[: len(part), ..., :channels]
    return maps


def heatmap_permutation(target: Target, keypoints: int) -> np.ndarray | None:
    """Return the permutation that a network's maps undergo in a mirrored frame.

    Args:
        target: that the network was trained for.
        keypoints: number of the network's maps; they are the first of the target's keypoints.

    Returns:
        (keypoints,) the index of each keypoint's mirror image; None for a target without a mirror.
    """
    if target.mirror is None:
        return None
    return mirror_permutation(target.keypoints[:keypoints], target.mirror)


def average_mirrored(
    network: Callable, images: np.ndarray, permutation: np.ndarray | None
) -> np.ndarray:
    """Return the geometric mean of a network's heatmaps in images and in their mirror images.

    Args:
        network: images (N, H, W, 3) -> maps (N, h, w, K).
        images: (N, H, W, 3).
        permutation: (K,), see `heatmap_permutation`; None: only the images themselves are used.

    Returns:
        (N, h, w, K), not negative. A peak stays where both have it.
    """
    maps = np.maximum(network(images), 0)
    if permutation is None:
        return maps
    mirrored = np.maximum(network(np.ascontiguousarray(images[:, :, ::-1])), 0)
    return np.sqrt(maps * mirrored[:, :, ::-1][..., permutation])


def read_keypoints(
    heatmaps: np.ndarray, settings: dict
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read keypoints from a network's heatmaps.

    Args:
        heatmaps: (N, h, w, K), from `predict_heatmaps`.
        settings: those of the model.

    Returns:
        keypoints (N, K, 2) in pixels of the frames, confidence (N, K) in [0, 1], and sigma (N, K)
        in pixels of the frames, see `keypoint_sigma`.
    """
    stride = settings["stride"]
    map_sigma = settings["sigma"] / stride
    keypoints, confidence = decode_heatmaps(heatmaps, map_sigma)
    sigma = keypoint_sigma(heatmaps, keypoints, map_sigma, 20 / stride) * stride
    return keypoints * stride, confidence, np.maximum(sigma, MIN_SIGMA)


def predict_keypoints(
    model: object, images: np.ndarray, batch_size: int = 16, channels: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Find the target's keypoints in frames, by default the corners of its box.

    Args:
        model: from `load_model` or `build_model`.
        images: (N, H, W, 3) uint8 RGB, of the model's size.
        batch_size: frames that the network sees at a time.
        channels: how many of the network's keypoints to return, the 8 corners first; the X-wing
            has 36.

    Returns:
        keypoints (N, channels, 2) in pixels and confidence (N, channels) in [0, 1].

    Raises:
        ValueError: images of another shape or type.
    """
    keypoints = []
    confidence = []
    for start in range(0, max(len(images), 1), batch_size):
        part = images[start : start + batch_size]
        maps = predict_heatmaps(model, part, batch_size, channels)
        part_keypoints, part_confidence, _ = read_keypoints(maps, model.settings)
        keypoints.append(part_keypoints)
        confidence.append(part_confidence)
    return np.concatenate(keypoints), np.concatenate(confidence)


# ============================================================ pose

MIN_CONFIDENCE = 0.2  # a keypoint from this confidence on is confident
MIN_CONFIDENT_POINTS = 8  # with fewer, keypoints from MIN_CONFIDENCE / 4 on are used too
MIN_SIGMA = 0.7  # pixels of the network's input: floor on the keypoints' sigma
INLIER_SIGMAS = 3.0  # a point further than that from its projection is an outlier
MIN_INLIER_RATIO = 0.7  # fraction of the points in use that must be inliers
MAX_RMS_NORMALISED_ERROR = 1.25  # root of chi square per degree of freedom of the inliers
CAUCHY = 1.5  # standard deviations, scale of the robust cost
MIN_MARGIN = 0.15  # log-likelihood by which a runner-up must fit worse
PRIOR_WEIGHT = 6.0  # greatest cost, as a log-likelihood, of a turn against the expected pose
MIN_SURFACE_POINTS = 6  # with as many, the less precise corners are left out
# PnP scales every target to this diameter, the X-wing's: solvers have absolute thresholds.
WORKING_DIAMETER = 0.46981379290097475


@dataclasses.dataclass(frozen=True)
class PoseEstimate:
    """What is known about the pose in one frame."""

    pose: np.ndarray | None  # (4, 4) model -> OpenCV camera; None: no four points were found
    covariance: np.ndarray | None = None  # (6, 6) rotation vector in camera axes, then translation
    accepted: bool = False
    reason: str = ""  # why it was not accepted
    reprojection: float = np.nan  # pixels, root mean square over the inliers
    rms_normalised_error: float = np.nan  # of the inliers, in sigmas; 1 is as expected
    inliers: np.ndarray | None = None  # (K,) bool, the points that the pose rests on
    runner_up: np.ndarray | None = None  # (4, 4) the best pose turned by over 30 degrees against it
    log_likelihood_margin: float = np.inf  # by how much the runner-up fits worse
    # The package `xwing` measures the last three on the frame's pixels.
    explained_contrast: float = np.nan  # fraction of the frame's contrast
    probability: float = np.nan  # of being right
    local_agreement: float = np.nan  # 0 to 1, fraction of the drawing that the frame looks like

    @property
    def rotation_sigma(self) -> float:
        """Expected rotation error in degrees: the root of the trace of the rotational block."""
        if self.covariance is None:
            return np.inf
        return float(np.degrees(np.sqrt(np.trace(self.covariance[:3, :3]))))


def solve_pose(
    keypoints: np.ndarray,
    K: np.ndarray,
    confidence: np.ndarray | None = None,
    points: np.ndarray | None = None,
    sigma: np.ndarray | None = None,
    target: Target = XWING,
) -> np.ndarray | None:
    """Return the pose (4, 4) of `estimate_pose`, or None where it is not accepted.

    Args:
        keypoints: (K, 2) pixels.
        K: (3, 3) camera matrix, pixels.
        confidence: (K,) in [0, 1] or None.
        points: (K, 3) model units or None.
        sigma: (K,) pixels or None.
        target: what the frame shows.

    Raises:
        ValueError: as `estimate_pose`, which explains the arguments.
    """
    estimate = estimate_pose(keypoints, K, confidence, sigma, points, target=target)
    return estimate.pose if estimate.accepted else None


def estimate_pose(
    keypoints: np.ndarray,
    K: np.ndarray,
    confidence: np.ndarray | None = None,
    sigma: np.ndarray | None = None,
    points: np.ndarray | None = None,
    prior: np.ndarray | None = None,
    target: Target = XWING,
) -> PoseEstimate:
    """Estimate a target's pose from its keypoints, and how far to trust it.

    RANSAC with SQPnP proposes a pose. It competes with the poses that it is ambiguous with, see
    `ambiguous_poses`. All are refined by a robust cost that weights each point by its precision.
    Where MIN_SURFACE_POINTS of the surface are found, the corners of the box are tried only if the
    surface gives no accepted pose: they are found less precisely.

    Args:
        keypoints: (K, 2) pixels; NaN rows are not used.
        K: (3, 3) camera matrix, pixels.
        confidence: (K,) in [0, 1]; None: all are 1. Points below MIN_CONFIDENCE are used where few
            are above it.
        sigma: (K,) pixels, each point's standard deviation along x and y. Points where it is not
            finite are not used. None takes what is typical of a corner of that confidence.
        points: (K, 3) model units; None takes the first of the target's keypoints.
        prior: (4, 4) or None, the pose expected from earlier frames. It does not move poses, but
            adds a cost to those that are turned against it, up to PRIOR_WEIGHT from 30 degrees on.
        target: what the frame shows.

    Returns:
        a `PoseEstimate`. It is not accepted with fewer than 4 confident points (without sigmas,
        every point in use is confident), with too few inliers, with an error above
        MAX_RMS_NORMALISED_ERROR or with a runner-up within MIN_MARGIN.

    Raises:
        ValueError: a wrong shape, a sigma that is not positive, or a K that is no camera matrix.

    Source: Terzakis and Lourakis, A Consistently Fast and Globally Optimal Solution to the
        Perspective-n-Point Problem, ECCV 2020 (SQPnP); Schweighofer and Pinz, Robust Pose
        Estimation from a Planar Target, TPAMI 28(12), 2006 (two poses of a plane); Hartley and
        Zisserman, Multiple View Geometry, 2004, section 5.2 (covariance).
    """
    keypoints = check_array(keypoints, (None, 2), "keypoints")
    K = check_camera_matrix(K)
    count = len(keypoints)
    points = target.keypoints[:count] if points is None else points
    points = check_array(points, (count, 3), "points")
    confidence = np.ones(count) if confidence is None else confidence
    confidence = check_array(confidence, (count,), "confidence")

    floor = MIN_CONFIDENCE / 4
    confident_from = MIN_CONFIDENCE
    if sigma is None:
        sigma = _typical_sigma(confidence, K)
        confident_from = floor  # an uncertain point has a large sigma already
    sigma = check_array(sigma, (count,), "sigma")
    usable = np.isfinite(keypoints).all(1) & np.isfinite(sigma) & (confidence >= floor)
    confident = usable & (confidence >= confident_from)
    if confident.sum() >= MIN_CONFIDENT_POINTS:
        usable = confident
    if (sigma[usable] <= 0).any():
        raise ValueError(f"sigma: expected positive numbers of pixels, got {sigma[usable].min()}")

    surface = usable & (np.arange(count) >= 8)
    choices = [surface, usable] if surface.sum() >= MIN_SURFACE_POINTS else [usable]
    for chosen in choices:
        correspondences = _Correspondences.of(
            points[chosen], keypoints[chosen], sigma[chosen], K, prior, target
        )
        estimate = correspondences.estimate()
        if estimate.accepted:
            break

    inliers = np.zeros(count, bool)
    inliers[chosen] = False if estimate.inliers is None else estimate.inliers
    estimate = dataclasses.replace(estimate, inliers=inliers)
    if confident.sum() >= 4:
        return estimate
    reason = estimate.reason or f"only {confident.sum()} points are confident"
    return dataclasses.replace(estimate, accepted=False, reason=reason, log_likelihood_margin=0.0)


def _typical_sigma(confidence, K):
    """Return typical standard deviations (K,) in pixels of corners with confidences (K,).

    They were measured on frames of FRAME_SIZE: 1.8 pixels at a confidence of 1, 18 more at 0. The
    principal point gives the size of other frames.
    """
    scale = 2 * max(K[0, 2], K[1, 2]) / FRAME_SIZE
    return (1.8 + 18 * (1 - confidence)) * scale


@dataclasses.dataclass(frozen=True, order=True)
class _Candidate:
    """A pose and its cost, the negative log-likelihood up to a constant."""

    cost: float
    pose: np.ndarray = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class _Correspondences:
    """The model points of one frame and where they were found.

    Inside this class points and poses are in working units, in which the target's diameter is
    WORKING_DIAMETER.
    """

    points: np.ndarray  # (K, 3) model, working units
    keypoints: np.ndarray  # (K, 2) pixels
    sigma: np.ndarray  # (K,) pixels
    K: np.ndarray
    prior: np.ndarray | None  # (4, 4)
    target: Target
    scale: float  # working units for one model unit

    @classmethod
    def of(cls, points, keypoints, sigma, K, prior, target):
        """Make correspondences from points and prior in model units."""
        scale = WORKING_DIAMETER / target.diameter
        if prior is not None:
            prior = scale_pose(prior, scale)
        return cls(scale * points, keypoints, sigma, K, prior, target, scale)

    def propose(self):
        """Return poses by RANSAC and SQPnP, those they are ambiguous with, and the prior.

        A pose behind the camera is left out.
        """
        poses = [] if self.prior is None else [self.prior]
        try:
            found, rotation, translation, _ = cv2.solvePnPRansac(
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
        if found and np.isfinite(rotation).all() and translation[2] > 0:
            pose = move_pose(np.eye(4), np.concatenate([rotation, translation]).ravel())
            poses += ambiguous_poses(pose, self.target, self.scale)
        return poses

    def linearise(self, pose):
        """Return residuals (K, 2) and the projection's Jacobian (2 K, 6), both in sigmas.

        The Jacobian is with respect to a step, see `move_pose`.
        """
        rotated = self.points @ pose[:3, :3].T
        projected, jacobian = cv2.projectPoints(rotated, np.zeros(3), pose[:3, 3], self.K, None)
        residuals = (self.keypoints - projected[:, 0]) / self.sigma[:, None]
        residuals[rotated[:, 2] + pose[2, 3] < 1e-6] = 1e6  # behind the camera
        return residuals, jacobian[:, :6] / self.sigma.repeat(2)[:, None]

    def refine(self, pose):
        """Return the best `_Candidate` among a pose and two Gauss-Newton steps from it."""
        candidates = []
        for remaining in (2, 1, 0):
            residuals, jacobian = self.linearise(pose)
            squared = np.einsum("ki,ki->k", residuals, residuals) / CAUCHY**2
            candidates.append(_Candidate(self._cost(squared, pose), pose))
            if remaining:
                weighted = jacobian.T / (1 + squared).repeat(2)
                right = weighted @ residuals.reshape(-1, 1)
                _, step = cv2.solve(weighted @ jacobian, right, flags=cv2.DECOMP_SVD)
                step *= min(1.0, 0.3 / max(cv2.norm(step[:3]), 1e-12))  # at most 0.3 radians
                pose = move_pose(pose, step.ravel())
        return min(candidates)

    def _cost(self, squared, pose):
        """Return the robust cost of a pose: that of its residuals and of its turn from the prior.

        `squared` (K,) are the squared residuals in units of CAUCHY sigmas.
        """
        turn = 0.0  # fraction of 30 degrees
        if self.prior is not None:
            turn = min(rotation_error(pose, self.prior, self.target) / 30, 1.0)
        return float(np.log1p(squared).sum() * CAUCHY**2 / 2 + PRIOR_WEIGHT * turn**2)

    def covariance(self, pose):
        """Return a pose's covariance (6, 6) from its inliers; None where they do not fix it."""
        residuals, jacobian = self.linearise(pose)
        inliers = (residuals**2).sum(1) < INLIER_SIGMAS**2
        jacobian = jacobian[inliers.repeat(2)]
        information = jacobian.T @ jacobian
        fixed = len(jacobian) >= 8 and np.linalg.cond(information) < 1e12
        return np.linalg.inv(information) if fixed else None

    def estimate(self):
        """Return the `PoseEstimate` from these points, in model units; inliers (K,) are of them."""
        candidates = []
        if len(self.points) >= 4:
            candidates = sorted(self.refine(pose) for pose in self.propose())
        if not candidates:
            return PoseEstimate(None, reason=f"{len(self.points)} points fix no pose; 4 are needed")

        best = candidates[0]
        turned = [
            one for one in candidates if rotation_error(one.pose, best.pose, self.target) > 30
        ]
        in_front = [one for one in turned if one.pose[2, 3] > 0]
        runner_up = in_front[0] if in_front else _Candidate(np.inf, None)
        margin = runner_up.cost - best.cost  # before the best one is refined further
        return self._judge(self.refine(best.pose).pose, runner_up.pose, margin)

    def _judge(self, pose, runner_up, margin):
        """Return the `PoseEstimate` that accepts a pose, or says why not."""
        squared = (self.linearise(pose)[0] ** 2).sum(1)
        covariance = self.covariance(pose)
        inliers = squared < INLIER_SIGMAS**2
        count = int(inliers.sum())
        degrees_of_freedom = max(2 * count - 6, 1)
        error = float(np.sqrt(squared[inliers].sum() / degrees_of_freedom))
        reprojection = np.inf
        if count:
            reprojection = float(np.sqrt((squared * self.sigma**2)[inliers].mean()))

        too_few = count < MIN_INLIER_RATIO * len(squared)
        behind = (self.points @ pose[2, :3] + pose[2, 3] <= 0).any()
        reason = ""
        if covariance is None or too_few:
            reason = f"{count} of {len(squared)} points agree with the pose"
        elif behind:
            reason = "the pose lies behind the camera"
        elif error > MAX_RMS_NORMALISED_ERROR:
            reason = f"the points fit {error:.1f} times worse than expected"
        elif margin < MIN_MARGIN:
            reason = "a pose turned by more than 30 degrees fits nearly as well"

        model_unit = 1 / self.scale  # model units for one working unit
        if covariance is not None:
            units = np.repeat([1.0, model_unit], 3)
            covariance = covariance * np.outer(units, units)
        return PoseEstimate(
            scale_pose(pose, model_unit),
            covariance,
            accepted=not reason,
            reason=reason,
            reprojection=reprojection,
            rms_normalised_error=error,
            inliers=inliers,
            runner_up=None if runner_up is None else scale_pose(runner_up, model_unit),
            log_likelihood_margin=margin,
        )


def move_pose(pose: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Return the pose (4, 4) after a step.

    Args:
        pose: (4, 4) model -> OpenCV camera.
        step: (6,) a rotation vector in camera axes (radians), then a translation (model units).
    """
    moved = pose.copy()
    moved[:3, :3] = cv2.Rodrigues(step[:3])[0] @ pose[:3, :3]
    moved[:3, 3] = pose[:3, 3] + step[3:]
    return moved


def pose_step(pose: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Return the step (6,) that leads from `start` to `pose`, (4, 4) each: inverts `move_pose`."""
    rotation = cv2.Rodrigues(pose[:3, :3] @ start[:3, :3].T)[0]
    return np.concatenate([rotation.ravel(), pose[:3, 3] - start[:3, 3]])


def turn_about(turn: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Return the motions (..., 4, 4) of turns (..., 3, 3) that leave a centre (3,) where it is."""
    motion = np.zeros((*turn.shape[:-2], 4, 4))
    motion[..., :3, :3] = turn
    motion[..., :3, 3] = centre - turn @ centre
    motion[..., 3, 3] = 1
    return motion


def scale_pose(pose: np.ndarray, factor: float) -> np.ndarray:
    """Return a pose (4, 4) in other units: its translation is multiplied by a factor."""
    scaled = pose.copy()
    scaled[:3, 3] *= factor
    return scaled


def ambiguous_poses(
    pose: np.ndarray, target: Target = XWING, scale: float = 1.0
) -> list[np.ndarray]:
    """Return the poses (4, 4) that a pose is ambiguous with, itself first.

    They are those of the target's lookalikes. Seen from afar, a flat target is also ambiguous with
    its mirror image in depth.

    Args:
        pose: (4, 4) model -> OpenCV camera.
        target: whose lookalikes and flat axis count.
        scale: units of the pose for one model unit.
    """
    poses = [pose]
    if target.flat_axis is not None:
        axis = target.flat_axis / np.linalg.norm(target.flat_axis)
        view = pose[:3, 3] / np.linalg.norm(pose[:3, 3])
        mirrored = pose.copy()
        mirrored[:3, :3] -= 2 * np.outer(view, view) @ pose[:3, :3]  # along the line of sight
        mirrored[:3, :3] @= np.eye(3) - 2 * np.outer(axis, axis)  # makes it a rotation again
        poses.append(mirrored)

    lookalikes = [scale_pose(motion, scale) for motion in target.lookalikes]
    ambiguous = []
    for one in poses:
        ambiguous.append(one)
        ambiguous += [one @ motion for motion in lookalikes]
    return ambiguous


def reference_symmetry(pose: np.ndarray, target: Target) -> np.ndarray:
    """Return the symmetry (4, 4) of a target that brings a pose nearest to a reference view.

    After its symmetries a target looks the same, so a network cannot know which of the equivalent
    poses is meant. `pose @ motion` is always the same one of them: the one whose rotation, as seen
    along the line of sight, is nearest to that of the target upright and from the front. Of a
    mirrored pose it is the mirrored one.

    Args:
        pose: (4, 4) model -> OpenCV camera.
        target: whose symmetries and axes of revolution count.

    Source: Pitteri et al., On Object Symmetries and 6D Pose Estimation from Images, 3DV 2019.
    """
    turn = _reference_view(target).T @ _along_line_of_sight(pose, target)
    return _nearest_symmetry(turn, target)


def nearest_equivalent(pose: np.ndarray, other: np.ndarray, target: Target) -> np.ndarray:
    """Return, of the poses at which a target looks like at `pose`, the one nearest to another.

    Args:
        pose: (4, 4).
        other: (4, 4).
        target: whose symmetries and axes of revolution count.
    """
    return pose @ _nearest_symmetry(other[:3, :3].T @ pose[:3, :3], target)


def _nearest_symmetry(turn, target):
    """The symmetry (4, 4) of a target after which a rotation (3, 3) is nearest to the identity."""
    if not has_symmetries(target):
        return np.eye(4)
    motions = list(target.symmetries)
    if len(target.axes):
        motions = [motion @ _best_turn(turn @ motion[:3, :3], target.axes) for motion in motions]
    nearness = [np.trace(turn @ motion[:3, :3]) for motion in motions]
    return motions[int(np.argmax(nearness))]


def _reference_view(target):
    """The rotation (3, 3), model -> OpenCV camera, of a target seen from the front.

    The mirror plane of the target, if it has one, is upright in the middle of that view. So the
    reference of a mirrored frame is the mirrored reference, as `average_mirrored` takes it.
    """
    if target.mirror is None:
        side = np.eye(3)[np.abs(target.up).argmin()]
        right = np.cross(side, target.up)
    else:
        right = np.linalg.svd(target.mirror[:3, :3] - np.eye(3))[2][0]  # normal of the plane
    right /= np.linalg.norm(right)

    up = target.up - (target.up @ right) * right
    if np.linalg.norm(up) < 0.1 * np.linalg.norm(target.up):  # the plane lies flat
        up = np.cross(right, np.eye(3)[np.abs(right).argmin()])
    up /= np.linalg.norm(up)
    return np.array([right, -up, np.cross(right, -up)])


def _along_line_of_sight(pose, target):
    """A pose's rotation (3, 3) in a camera that looks at the middle of the target's box."""
    x, y, z = pose[:3, :3] @ target.box.mean(0) + pose[:3, 3]
    # The smallest rotation that takes the line of sight to the camera's axis.
    axis = np.array([y, -x, 0.0])
    length = np.linalg.norm(axis)
    if length > 0:
        axis *= np.arctan2(length, z) / length
    return cv2.Rodrigues(axis)[0] @ pose[:3, :3]


def _best_turn(rotation, axes):
    """The motion (4, 4) about axes of revolution that brings a rotation nearest to the identity."""
    point, axis = axes[0]
    if len(axes) > 1:  # of a ball
        turn = rotation.T
    else:
        sine = (rotation * np.cross(axis, np.eye(3))).sum()
        along = axis @ rotation @ axis
        angle = np.arctan2(sine, np.trace(rotation) - along)
        turn = _turn(axis, angle)
    return turn_about(turn, point)


def describe_target(target: Target, pose: np.ndarray | None = None) -> str:
    """Say how large a target is, how far away it is at a pose, and what no frame can tell of it.

    Args:
        target: `Target`.
        pose: (4, 4) model -> OpenCV camera, or None.

    Returns:
        One or two sentences. Lengths are in mesh units, and in metres where the target's unit is
        known.
    """
    text = f"{target.name} is {_length(target.diameter, target.unit)} across"
    if pose is not None:
        middle = pose[:3, :3] @ target.box.mean(0) + pose[:3, 3]
        distance = float(np.linalg.norm(middle))
        text += f" and {_length(distance, target.unit)} away"
    if target.unit is None:
        text += "; how long a mesh unit is, only the 'unit' of a target's JSON file says"
    return f"{text}.{_describe_symmetries(target)}"


def _length(length, unit):
    """A length in mesh units, and in metres where the unit is known."""
    metres = "" if unit is None else f" ({length * unit:.4g} m)"
    return f"{length:.4g} mesh units{metres}"


def _describe_symmetries(target):
    """A sentence about the turns after which a target looks the same; empty if there are none."""
    what = [f"any turn about ({_numbers(direction)})" for _, direction in target.axes]
    for symmetry in target.symmetries:
        turn = cv2.Rodrigues(symmetry[:3, :3])[0].ravel()
        angle = np.linalg.norm(turn)
        if angle > 1e-6:
            what.append(f"{np.degrees(angle):.0f} degrees about ({_numbers(turn / angle)})")
    if not what:
        return ""
    if len(what) > 4:
        what = [*what[:3], f"{len(what) - 3} more"]
    same = f" Its mesh looks the same after turns of {', '.join(what)}"
    return f"{same}: no frame tells these poses apart, unless its surface shows more than the mesh."


def _numbers(vector):
    return ", ".join(f"{value:.2g}" for value in np.round(vector, 2) + 0.0)


# ============================================================ drawing

CV_SHIFT = 4  # fractional bits of OpenCV's fixed-point positions


def cv_point(point: np.ndarray) -> tuple[int, int]:
    """Convert continuous pixels (2,) to OpenCV's fixed-point indices with CV_SHIFT bits."""
    indices = np.clip(point, -(2**20), 2**20) - 0.5
    return tuple(int(value) for value in np.round(indices * 2**CV_SHIFT))


def draw_box(
    image: np.ndarray, keypoints: np.ndarray, colour: tuple[int, int, int] = (90, 255, 90)
) -> np.ndarray:
    """Return a copy of a frame with a bounding box drawn in; edges with a NaN end are left out.

    Args:
        image: (H, W, 3) uint8.
        keypoints: (8, 2) corners of the box, pixels.
        colour: RGB.
    """
    image = np.array(image, order="C")
    for a, b in BOX_EDGES:
        if np.isfinite(keypoints[[a, b]]).all():
            ends = (cv_point(keypoints[a]), cv_point(keypoints[b]))
            cv2.line(image, *ends, colour, 1, cv2.LINE_AA, CV_SHIFT)
    return image


def draw_axes(
    image: np.ndarray, pose: np.ndarray, K: np.ndarray, length: float = 0.31928 * DIAMETER
) -> np.ndarray:
    """Return a copy of a frame with the model's axes drawn in: x red, y green, z blue.

    Args:
        image: (H, W, 3) uint8.
        pose: (4, 4) model -> OpenCV camera.
        K: (3, 3) camera matrix, pixels.
        length: of the axes, model units.
    """
    image = np.array(image, order="C")
    tips = np.concatenate([np.zeros((1, 3)), np.eye(3) * length])
    origin, *ends = project_pose(tips, pose, K)
    colours = [(255, 70, 70), (80, 255, 80), (90, 140, 255)]
    for end, colour in zip(ends, colours):
        if np.isfinite([origin, end]).all():
            line = (cv_point(origin), cv_point(end))
            cv2.arrowedLine(image, *line, colour, 1, cv2.LINE_AA, CV_SHIFT, 0.15)
    return image
