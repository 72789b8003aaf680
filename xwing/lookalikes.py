"""What a target is easily taken for: the turns after which its own drawings look nearly the same.

A pose that has been refined may be the wrong one of two that look nearly alike, and only a target's
JSON file or its mesh can say which these are. So the mesh is drawn from all sides as a surface of
one colour. A turn is tried on some of these views: how much of the drawing before it does the
drawing after it explain, whatever the light is? A turn by which a view changes less than by a small
turn is hard to tell there. The turns that are hardest to tell over all views are the lookalikes,
and so is the mirror image in depth of a target that is thin.

Symmetries and turns about axes of revolution change nothing, so they are no lookalikes. Colours and
prints are left out: the real ones may differ from the mesh's, and the pixels decide on them later.

Source: Manhardt et al., Explaining the Ambiguity of Object Detection and 6D Pose from Visual Data,
    ICCV 2019 (views that look alike); Schweighofer and Pinz, TPAMI 28(12), 2006 (images in depth).
"""

import dataclasses
import glob
import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing.mesh import largest_triangles, load_mesh, rasterise, triangle_normals

# Drawings.
VIEWS = 642  # directions from which the target is drawn, 8 degrees apart
ROLLS = 48  # turns of each drawing in the picture
SIZE = 20  # pixels, width of a drawing
SAMPLES = 2  # of a pixel, in each direction
BLUR = 0.8  # pixels, so that a turn between two of the views still shows
DISTANCE = 3.0  # diameters from the camera to the target
SURFACE = 0.98  # of the mesh that is drawn, its largest triangles
# Directions in which light falls on the drawing that is to be explained, and how much comes from
# all round.
LIGHTS = np.array([(-0.5, -0.7, -0.5), (0.6, -0.3, -0.75)])
AMBIENT = 0.35

# Turns.
TURNS = 1500  # about 20 degrees apart, beside those about the axes of the box
BOX_TURNS = 60, 90, 120, 180, 240, 270, 300  # degrees
SMALL_TURN = 15.0  # degrees: a lookalike is as hard to tell as such a turn
MIN_ANGLE = 40.0  # degrees: what is nearer is found by refining a pose
APART = 30.0  # degrees between two lookalikes
FEW_VIEWS = 12  # on which all turns are tried
MANY_VIEWS = 48  # on which the best of them are tried
FINALISTS = 60  # turns
MAX_LOOKALIKES = 3  # each costs time in every frame
MIN_ALIKE = 0.6  # of the views in which an image in depth is as hard to tell as a small turn


def with_lookalikes(target: xu.Target, weights: str | Path | None = None) -> xu.Target:
    """Return a target with what it is easily taken for, found from its mesh where none is declared.

    It takes seconds, once in a process. A file in `.lookalikes/` beside the weights keeps what was
    found; where that cannot be written, it is found again.

    Args:
        target: `Target`. With lookalikes or a flat axis of its own it is returned as it is.
        weights: `NAME.weights.h5`, or None where there are none.

    Raises:
        FileNotFoundError, ValueError: the mesh cannot be read.
    """
    if len(target.lookalikes) or target.flat_axis is not None:
        return target
    digest = _digest(target)
    file = _file_beside(weights, digest)
    kept = _read(file)
    found = kept or _FOUND.get(digest)
    if found is None:
        drawings = Drawings(load_mesh(target.mesh))
        found = find_lookalikes(target, drawings), find_flat_axis(target, drawings)
    _FOUND[digest] = found
    if file is not None and kept is None:
        _write(file, *found)
    lookalikes, flat_axis = found
    return dataclasses.replace(target, lookalikes=lookalikes, flat_axis=flat_axis)


_FOUND = {}  # digest of a target -> its lookalikes and flat axis


def _digest(target):
    """A number for all that lookalikes depend on; the mesh's file stands for its shape."""
    content = [target.mesh.read_bytes(), target.symmetries.tobytes(), target.axes.tobytes()]
    settings = VIEWS, ROLLS, SIZE, TURNS, FEW_VIEWS, MANY_VIEWS, MAX_LOOKALIKES
    return hashlib.sha256(b"".join([*content, str(settings).encode()])).hexdigest()[:12]


def _file_beside(weights, digest):
    """The file that keeps what was found; None without weights."""
    if weights is None:
        return None
    path, _ = xu.weights_files(weights)
    name = path.name.removesuffix(".weights.h5")
    return path.parent / ".lookalikes" / f"{name}-{digest}.json"


def _read(file):
    """Lookalikes (L, 4, 4) and flat axis (3,) or None; None where there is no sound file."""
    if file is None:
        return None
    try:
        record = xu.read_json(file)
        lookalikes = xu.check_array(record["lookalikes"], (None, 4, 4), "lookalikes")
        axis = record["flat_axis"]
        return lookalikes, None if axis is None else xu.check_array(axis, (3,), "flat_axis")
    except (OSError, TypeError, KeyError, ValueError):
        return None


def _write(file, lookalikes, flat_axis):
    """Keep what was found in place of what older meshes had; nothing stops where that fails."""
    axis = None if flat_axis is None else flat_axis.tolist()
    text = json.dumps({"lookalikes": lookalikes.tolist(), "flat_axis": axis}, indent=1)
    prefix = file.stem.rpartition("-")[0]
    try:
        file.parent.mkdir(exist_ok=True)
        xu.write_files({file: text})
        for old in set(file.parent.glob(f"{glob.escape(prefix)}-*.json")) - {file}:
            old.unlink(missing_ok=True)
    except OSError:
        return


# ============================================================ what is found


def find_lookalikes(target: xu.Target, drawings: "Drawings | None" = None) -> np.ndarray:
    """Find the turns (L, 4, 4) after which a target looks most like itself, the hardest first.

    They are turns about the middle of the target's box, at least MIN_ANGLE from every symmetry. At
    least one is returned, and MAX_LOOKALIKES where so many are as hard to tell as a small turn.

    Args:
        target: `Target`.
        drawings: of its mesh; None draws them.
    """
    drawings = drawings or Drawings(load_mesh(target.mesh))
    turns = _turns()
    distant = [xu.rotation_error(turn, np.eye(3), target) > MIN_ANGLE for turn in turns]
    turns = turns[distant]
    if not len(turns):  # a ball looks the same after every turn
        return np.zeros((0, 4, 4))
    unlike = drawings.changes(turns, FEW_VIEWS)
    turns = turns[np.argsort(unlike)[:FINALISTS]]
    unlike = drawings.changes(turns, MANY_VIEWS)

    chosen = []
    for i in np.argsort(unlike):
        if len(chosen) >= MAX_LOOKALIKES or (chosen and unlike[i] > 1):
            break
        apart = [xu.rotation_error(turns[i], other, target) > APART for other in chosen]
        if all(apart):
            chosen.append(turns[i])
    return xu.turn_about(np.array(chosen), target.box.mean(0))


def find_flat_axis(target: xu.Target, drawings: "Drawings | None" = None) -> np.ndarray | None:
    """Find the axis (3,) of the box of a target whose mirror image in depth is hard to tell.

    It is None where no axis has images that are as hard to tell as a small turn in most views. The
    arguments are those of `find_lookalikes`.
    """
    drawings = drawings or Drawings(load_mesh(target.mesh))
    limit = drawings.small_change(MANY_VIEWS)
    alike = [_alike_in_depth(drawings, axis, target, limit) for axis in np.eye(3)]
    best = int(np.argmax(alike))
    return np.eye(3)[best] if alike[best] >= MIN_ALIKE else None


def _alike_in_depth(drawings, axis, target, limit):
    """The fraction of views that are hard to tell from their images in depth; 0 without any.

    These change by less than a limit (MANY_VIEWS,).
    """
    views = drawings.some(MANY_VIEWS)
    images = np.diag([1, 1, -1]) @ views @ (np.eye(3) - 2 * np.outer(axis, axis))
    angles = [xu.rotation_error(*pair, target) for pair in zip(images, views)]
    other = np.array(angles) > MIN_ANGLE
    if np.count_nonzero(other) < MANY_VIEWS / 2:
        return 0.0
    change = 1 - drawings.explained(views, images)
    return float((change < limit)[other].mean())


def _turns():
    """Rotations (N, 3, 3), evenly spread, and turns about axes, edges and diagonals of the box.

    Source: Alexa, Super-Fibonacci Spirals, CVPR 2022.
    """
    number = np.arange(TURNS) + 0.5
    first = 2 * np.pi * number / np.sqrt(2)
    second = 2 * np.pi * number / 1.533751168755204
    short = np.sqrt(number / TURNS)
    long = np.sqrt(1 - number / TURNS)
    parts = [short * np.sin(first), short * np.cos(first)]
    quaternions = np.column_stack([*parts, long * np.sin(second), long * np.cos(second)])

    grid = np.array(list(np.ndindex(3, 3, 3))) - 1
    axes = grid[len(grid) // 2 + 1 :]  # one of each pair of opposite ones
    axes = axes / np.linalg.norm(axes, axis=1, keepdims=True)
    vectors = [np.radians(angle) * axis for axis in axes for angle in BOX_TURNS]
    spread = Rotation.from_quat(quaternions).as_matrix()
    return np.concatenate([Rotation.from_rotvec(vectors).as_matrix(), spread])


# ============================================================ drawings


class Drawings:
    """Small drawings of a mesh from all sides, each of normals and coverage.

    Args:
        mesh: `Mesh`.
    """

    def __init__(self, mesh):
        triangles = mesh.triangles
        triangles = triangles[largest_triangles(triangles, SURFACE)]
        corners = triangles.reshape(-1, 3)
        triangles = (triangles - (corners.min(0) + corners.max(0)) / 2) / mesh.diameter
        self.directions = xu.fibonacci_sphere(VIEWS)
        self.rotations = np.array([_seen_from(direction) for direction in self.directions])
        self.pictures = _draw(triangles, self.rotations)
        self._rolled = {}

    def some(self, count):
        """Rotations (count, 3, 3) of some of the views, spread over the sphere."""
        return self.rotations[np.linspace(0, VIEWS - 1, count).astype(int)]

    def changes(self, turns, count):
        """How much some views change by turns (N, 3, 3), as a multiple of a small turn: (N,)."""
        views = self.some(count)
        before = np.tile(views, (len(turns), 1, 1))
        after = (views @ turns[:, None]).reshape(-1, 3, 3)
        unexplained = 1 - self.explained(before, after)
        return unexplained.reshape(-1, count).mean(1) / self.small_change(count).mean()

    def small_change(self, count):
        """What of some views (count,) is not explained after a small turn, in the mean."""
        views = self.some(count)
        vectors = np.radians(SMALL_TURN) * np.concatenate([np.eye(3), -np.eye(3)])
        turns = Rotation.from_rotvec(vectors).as_matrix()
        return 1 - np.mean([self.explained(views, views @ turn) for turn in turns], axis=0)

    def explained(self, before, after):
        """The fractions (N,) of drawings of rotations (N, 3, 3) that other drawings explain.

        The light on the drawings that explain is the one that explains most.
        """
        explained = np.zeros(len(before))
        for start in range(0, len(before), 512):
            part = slice(start, start + 512)
            seen = self._lit(self._look(before[part]))
            basis = self._look(after[part])
            transposed = basis.swapaxes(1, 2)
            normal = transposed @ basis + 1e-3 * np.eye(4, dtype=np.float32)
            right = (transposed @ seen[..., None])[..., 0]
            light = np.linalg.solve(normal, right[..., None])[..., 0]
            explained[part] = (right * light).sum(1) / np.square(seen).sum(1)
        return explained

    def _lit(self, drawings):
        """Brightness (N, P) of drawings (N, P, 4), under light from above."""
        lights = LIGHTS / np.linalg.norm(LIGHTS, axis=1, keepdims=True)
        direct = (drawings[..., :3] @ np.float32(lights.T)).clip(0).mean(-1)
        return AMBIENT * drawings[..., 3] + (1 - AMBIENT) * direct

    def _look(self, rotations):
        """The drawings (N, P, 4) that are nearest to rotations (N, 3, 3)."""
        view = (-rotations[:, 2] @ self.directions.T).argmax(1)
        roll = rotations @ self.rotations[view].swapaxes(1, 2)
        angle = np.arctan2(roll[:, 1, 0] - roll[:, 0, 1], roll[:, 0, 0] + roll[:, 1, 1])
        step = np.rint(angle / (2 * np.pi) * ROLLS).astype(int) % ROLLS
        return np.stack([self._roll(*key) for key in zip(view.tolist(), step.tolist())])

    def _roll(self, view, step):
        """One drawing (P, 4) that is rolled by some steps; each is made once."""
        if (view, step) not in self._rolled:
            angle = 2 * np.pi * step / ROLLS
            turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
            middle = np.full(2, (SIZE - 1) / 2)  # in OpenCV the centre of a pixel is whole
            motion = np.column_stack([turn, middle - turn @ middle])
            rolled = cv2.warpAffine(self.pictures[view], motion, (SIZE, SIZE))
            rolled[..., :2] = rolled[..., :2] @ np.float32(turn.T)  # the normals turn as well
            self._rolled[view, step] = rolled.reshape(-1, 4)
        return self._rolled[view, step]


def _seen_from(direction):
    """A rotation (3, 3), model -> OpenCV camera, of a camera in a direction (3,)."""
    across = np.linalg.svd(direction[None])[2][1]
    return np.array([across, np.cross(-direction, across), -direction])


def _draw(triangles, rotations):
    """Normals in camera axes times coverage, and coverage: (N, SIZE, SIZE, 4) float32.

    The triangles (F, 3, 3) are in diameters, about the middle of pictures.
    """
    normals = triangle_normals(triangles)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
    reach = np.linalg.norm(triangles.reshape(-1, 3), axis=1).max()
    width = SAMPLES * SIZE
    focal = 0.95 * (DISTANCE - reach) * width / 2 / reach  # all of it is inside every picture
    K = np.array([(focal, 0, width / 2), (0, focal, width / 2), (0, 0, 1)])

    pictures = np.zeros((len(rotations), SIZE, SIZE, 4), np.float32)
    for picture, rotation in zip(pictures, rotations):
        pose = np.eye(4)
        pose[:3, :3] = rotation
        pose[2, 3] = DISTANCE
        ids, _ = rasterise(triangles, pose, K, width, width, 0.1)
        shown = ids >= 0
        facing = normals[ids[shown]] @ rotation.T
        samples = np.zeros((width, width, 4), np.float32)
        samples[shown, :3] = facing * -np.sign(facing[:, 2:])  # towards the camera
        samples[shown, 3] = 1
        smaller = cv2.resize(samples, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        picture[:] = cv2.GaussianBlur(smaller, (0, 0), BLUR)
    return pictures
