"""A start: the pose of a target in one frame, as a person gives it.

A target without a network is followed from a pose that somebody knows. It can be found by pins:
points of the mesh that the user also finds in the frame. Clicks are off by several pixels, and a
start that is wrong by a few degrees is learnt and then followed with confidence. So a start is
refined from several poses around it, and the one whose edges agree best with those of the frame
wins. How much contrast a pose explains is no good judge as long as nobody knows what is printed on
the target: a plain drawing that is turned a little too far explains nearly as much. It is the
better judge where the mesh has a texture. In a file, starts belong to frames of a clip.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np

import xwing_utils as xu
from xwing.templates import EdgeMatcher, Start

MIN_PINS = 4  # three pins leave up to four poses
FLAT = 0.02  # ratio of two extents of the pins, below which the smaller one is none
SAME_POINT = 1e-3  # fraction of the pins' extent: points that are nearer to each other are one
SAME_PIXEL = 1.0  # pixels that are nearer to each other are one

# The largest residual of a pin that fits, as a fraction of how far the pins reach in the frame.
MAX_RESIDUAL = 0.25
USUAL_RESIDUAL = 0.05  # of a hasty click, likewise

TURN = 10.0  # degrees by which the starts around a pose are turned
FIXED = 1e-4  # radians, and diameters: the standard deviations of a pose that is only judged


# ============================================================ pins


def points_shown(target: xu.Target) -> np.ndarray:
    """Return the points of a target that pins are put on; a point's number is its row.

    Args:
        target: `Target`.

    Returns:
        (P, 3) model units, spread over the surface. The first ones are at its ends.
    """
    return target.keypoints[8:]  # most corners of the box are not on the surface


def solve_pins(
    points: np.ndarray, pixels: np.ndarray, K: np.ndarray, target: xu.Target | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find the pose at which some points of a target show at some pixels.

    Where there are six pins or more, one that is clearly worse than the others counts little.

    Args:
        points: (P, 3) model units, P at least 4; six are better.
        pixels: (P, 2) as (x, y), origin at the top-left corner of the frame.
        K: (3, 3) camera matrix, pixels.
        target: `Target`, whose `points_shown` errors name by their numbers. None: errors name a
            pin by its place in the list, from 0.

    Returns:
        pose (4, 4) model -> OpenCV camera, and how far each pin is from its point (P,), pixels.

    Raises:
        ValueError: fewer than four pins, two on one point or pixel, all on one line, pins that fit
            no pose, or only one behind the camera.

    Source: Terzakis and Lourakis, ECCV 2020 (SQPnP); Collins and Bartoli, Infinitesimal Plane-Based
        Pose Estimation, IJCV 109, 2014 (for pins on one plane).
    """
    points = xu.check_array(points, (None, 3), "points of the pins")
    pixels = xu.check_array(pixels, (len(points), 2), "pixels of the pins")
    K = xu.check_camera_matrix(K)
    names = _pin_names(points, target)
    _check_pins(points, pixels, names)

    pose, residuals = _fit_pins(points, pixels, K)
    if _is_wrong(residuals, pixels):
        raise ValueError(_explain_misfit(points, pixels, K, residuals, names))
    return pose, residuals


def _pin_names(points, target):
    """What errors call each pin."""
    if target is None:
        return [f"pin {i}" for i in range(len(points))]
    shown = points_shown(target)
    numbers = [np.linalg.norm(shown - point, axis=1).argmin() for point in points]
    return [f"the pin on point {number}" for number in numbers]


def _check_pins(points, pixels, names):
    """Raise ValueError where pins cannot fix a pose, whatever their pixels are."""
    if len(points) < MIN_PINS:
        raise ValueError(f"got {len(points)} pins; give at least {MIN_PINS}, better six")
    if not (np.isfinite(points).all() and np.isfinite(pixels).all()):
        raise ValueError("a pin has coordinates that are NaN or infinite; give numbers")

    nearest = SAME_POINT * np.linalg.norm(np.ptp(points, axis=0))
    for i, j in itertools.combinations(range(len(points)), 2):
        pair = f"pins {i} and {j} in the list"
        if np.linalg.norm(points[i] - points[j]) <= nearest:
            raise ValueError(f"{pair} are on one point ({names[i]}); give each point one pixel")
        if np.linalg.norm(pixels[i] - pixels[j]) < SAME_PIXEL:
            raise ValueError(f"{names[i]} and {names[j]} are on one pixel; move one of them")

    for places, where in ((points, "of the target"), (pixels, "of the frame")):
        extents = np.linalg.svd(places - places.mean(0), compute_uv=False)
        if extents[1] < FLAT * extents[0]:
            raise ValueError(f"all {len(points)} pins are on one line {where}; add one beside it")


def _is_wrong(residuals, pixels):
    """Whether a pin is so far from its point that it is no slip of the mouse."""
    return not residuals.max() <= MAX_RESIDUAL * np.linalg.norm(np.ptp(pixels, axis=0))


def _fit_pins(points, pixels, K):
    """The best pose (4, 4) for all pins, or all but one, and the residuals (P,) of all of them."""
    everything = np.arange(len(points))
    choices = [everything]
    if len(points) > MIN_PINS + 1:
        choices += [np.delete(everything, i) for i in everything]
    poses = [pose for chosen in choices for pose in _poses(points[chosen], pixels[chosen], K)]
    if not poses:
        return np.eye(4), np.full(len(points), np.inf)

    residuals = np.array([_residuals(pose, points, pixels, K) for pose in poses])
    usual = USUAL_RESIDUAL * np.linalg.norm(np.ptp(pixels, axis=0))
    best = np.log1p((residuals / usual) ** 2).sum(1).argmin()
    return poses[best], residuals[best]


def _poses(points, pixels, K):
    """The poses (4, 4) at which pins fit best, in front of the camera."""
    centre = points.mean(0)
    extents = np.linalg.svd(points - centre, compute_uv=False)
    methods = [cv2.SOLVEPNP_SQPNP]
    if extents[2] < FLAT * extents[0]:
        methods.append(cv2.SOLVEPNP_IPPE)

    poses = []
    for method in methods:
        try:
            _, turns, shifts, _ = cv2.solvePnPGeneric(
                points - centre, pixels, K, None, flags=method
            )
        except cv2.error:  # pins that fix no pose
            continue
        for turn, shift in zip(turns, shifts):
            turn, shift = cv2.solvePnPRefineLM(points - centre, pixels, K, None, turn, shift)
            pose = xu.move_pose(np.eye(4), np.concatenate([turn, shift]).ravel())
            pose[:3, 3] -= pose[:3, :3] @ centre
            poses.append(pose)
    return [pose for pose in poses if np.isfinite(pose).all()]


def _residuals(pose, points, pixels, K):
    """How far the pins (P,) are from their points, pixels; infinite behind the camera."""
    depths = points @ pose[2, :3] + pose[2, 3]
    shown = xu.project_pose(points, pose, K)
    distances = np.linalg.norm(shown - pixels, axis=1)
    return np.where((depths > 0) & np.isfinite(distances), distances, np.inf)


def _explain_misfit(points, pixels, K, residuals, names):
    """The sentence that says why pins fit no pose, and what to do."""
    without = _worst_without(points, pixels, K)
    worst = residuals.argmax()
    if np.isfinite(without).any():
        worst = without.argmin()

    # What lies behind the camera shows like its mirror image in the camera's centre, in front.
    _, mirrored = _fit_pins(-points, pixels, K)
    if not _is_wrong(mirrored, pixels) and mirrored.max() < 0.5 * min(
        without.min(), residuals.max()
    ):
        return (
            "the pins fit only a pose behind the camera; correct left and right if they are "
            "swapped, and use a frame that is not mirrored"
        )
    distances = ", ".join(f"{distance:.0f}" for distance in residuals)
    return (
        f"the pins fit no pose: they are {distances} pixels from their points; correct or remove "
        f"{names[worst]}, without which the others fit best"
    )


def _worst_without(points, pixels, K):
    """The largest residual (P,) of the others without each pin; infinite where too few are left."""
    largest = np.full(len(points), np.inf)
    if len(points) > MIN_PINS:
        for i in range(len(points)):
            rest = np.arange(len(points)) != i
            largest[i] = _fit_pins(points[rest], pixels[rest], K)[1].max()
    return largest


# ============================================================ refinement


def refine_start(aligner, image: np.ndarray, pose: np.ndarray, K: np.ndarray) -> list[Start]:
    """Refine a pose that a person gave, from seven poses around it.

    Each is refined on the edges of the frame, then on its pixels, and on the pixels alone. The
    edges hold a plain target that the pixels would pull away, the pixels a printed one.

    Args:
        aligner: `Aligner` of the target.
        image: (H, W, 3) uint8.
        pose: (4, 4) model -> OpenCV camera, off by up to 15 degrees.
        K: (3, 3) camera matrix, pixels.

    Returns:
        `Start`, the best first, all different: by edge agreement, or by explained contrast where
        the mesh has a texture. It is empty where too little of the target is in sight.

    Raises:
        ValueError: the pose is no rigid motion.
    """
    pose = xu.rigid_matrix(pose, "start")
    matcher = EdgeMatcher(aligner.target)
    field = matcher.field(image, pose, K)
    around = _turned_poses(pose, aligner.target.box.mean(0))
    on_edges = _different([matcher.refine(field, turned) for turned in around], matcher)
    found = on_edges + _align_all(aligner, image, around + on_edges, K)
    judged = [_judge(aligner, matcher, field, image, one, K) for one in found]
    return _ranked(judged, aligner, matcher)


def refine_proposals(
    aligner, image: np.ndarray, proposals: list[Start], K: np.ndarray, count: int = 5
) -> list[Start]:
    """Refine the poses that `Templates.find` proposes on the pixels, and rank them again.

    They were found by the edges of the mesh. A box whose sides are printed has the same edges from
    several sides, and only its texture says which is the right one.

    Args:
        aligner: `Aligner` of the target.
        image: (H, W, 3) uint8.
        proposals: `Start`s in this frame.
        K: (3, 3) camera matrix, pixels.
        count: how many are returned at most.

    Returns:
        `Start`, the best first, all different; ranked as by `refine_start`.
    """
    matcher = EdgeMatcher(aligner.target)
    judged = []
    for proposal in proposals:
        field = matcher.field(image, proposal.pose, K)
        poses = [proposal.pose, *_align_all(aligner, image, [proposal.pose], K)]
        judged += [_judge(aligner, matcher, field, image, pose, K) for pose in poses]
    return _ranked(judged, aligner, matcher)[:count]


def _turned_poses(pose, centre):
    """A pose (4, 4), and it turned both ways about the camera's axes through a point (3,)."""
    turns = np.radians(TURN) * np.concatenate([np.zeros((1, 3)), np.eye(3), -np.eye(3)])
    return [_turn_about(pose, centre, turn) for turn in turns]


def _turn_about(pose, centre, turn):
    """A pose (4, 4) after a rotation vector (3,) about a point (3,) of the model."""
    place = pose[:3, :3] @ centre + pose[:3, 3]
    turned = xu.move_pose(pose, np.concatenate([turn, np.zeros(3)]))
    turned[:3, 3] = place - turned[:3, :3] @ centre
    return turned


def _different(poses, matcher):
    """The poses, without None and without those that equal one before them."""
    kept = []
    for pose in poses:
        if pose is not None and not any(matcher.is_same(pose, other) for other in kept):
            kept.append(pose)
    return kept


def _align_all(aligner, image, poses, K):
    """What the pixels make of some poses, where they determine one."""
    aligned = [aligner.align(image, pose, K) for pose in poses]
    return [refined[0] for refined in aligned if refined is not None]


def _ranked(judged, aligner, matcher):
    """The different ones of some `Start`s, best first, without those out of sight."""
    by = "edge_agreement" if aligner.mesh.textures is None else "explained_contrast"
    seen = [start for start in judged if np.isfinite(start.explained_contrast)]
    seen.sort(key=lambda start: -getattr(start, by))
    kept = []
    for start in seen:
        if not any(matcher.is_same(start.pose, better.pose) for better in kept):
            kept.append(start)
    return kept


def _judge(aligner, matcher, field, image, pose, K):
    """The `Start` at a pose that is not moved any more; its contrast is NaN out of sight."""
    fixed = np.repeat([FIXED, FIXED * aligner.target.diameter], 3) ** 2
    seen = aligner.track(image, pose, K, np.diag(fixed))
    return Start(pose, matcher.agreement(field, pose), seen.explained_contrast)


# ============================================================ files


def read_starts(path: str | Path) -> dict[int, np.ndarray]:
    """Read the poses that a user knows of a clip, for `track_clip`.

    Args:
        path: of a JSON file: {"frame": number from 0, "pose": 4 x 4 model -> OpenCV camera}, or a
            list of them. Other keys are ignored.

    Returns:
        {number of the frame: pose (4, 4)}.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, no start, or two of one frame.
    """
    rows = xu.read_json(path)
    rows = rows if isinstance(rows, list) else [rows]
    starts = {}
    for row in rows:
        if not (isinstance(row, dict) and {"frame", "pose"} <= set(row)):
            raise ValueError(f'{path}: expected {{"frame": 0, "pose": 4 x 4}} or a list of them')
        index = row["frame"]
        if type(index) is not int or index < 0:
            raise ValueError(f"{path}: frame: expected a number from 0, got {index!r}")
        if index in starts:
            raise ValueError(f"{path}: there are two starts in frame {index}; keep one")
        starts[index] = xu.rigid_matrix(row["pose"], f"{path}, frame {index}")

    if not starts:
        raise ValueError(f"{path}: there is no start in it")
    return starts


def write_starts(path: str | Path, starts: Mapping[int, np.ndarray]) -> None:
    """Write starts to a file that `read_starts` reads; an old file is replaced at the end.

    Args:
        path: of a JSON file; its folder is made if it is missing.
        starts: {number of the frame: pose (4, 4) model -> OpenCV camera}, at least one.

    Raises:
        ValueError: there is no start, a number is not one from 0, or a pose is no rigid motion.
        OSError: there is no room or no permission.
    """
    if not starts:
        raise ValueError(f"{path}: expected at least one start, got none")
    rows = []
    for index, pose in sorted(starts.items()):
        is_number = isinstance(index, int | np.integer) and not isinstance(index, bool)
        if not is_number or index < 0:
            raise ValueError(f"starts: expected numbers of frames from 0, got {index!r}")
        pose = xu.rigid_matrix(pose, f"starts, frame {index}")
        rows.append({"frame": int(index), "pose": pose.tolist()})

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    xu.write_files({Path(path): json.dumps(rows if len(rows) > 1 else rows[0], indent=1)})
