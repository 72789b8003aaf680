"""Scenes, models and results in the format of BOP, the Benchmark for 6D Object Pose Estimation.

    DATASET/models/obj_000005.ply, models_info.json       meshes in millimetres, symmetries
    DATASET/test/000002/rgb/000017.png                    pictures of scene 2
    DATASET/test/000002/scene_camera.json, scene_gt.json  their cameras, and the true poses

BOP's camera matrices have the origin in the middle of the first pixel, as OpenCV has; ours have it
at its corner. Where the cameras of a scene differ, its pictures are drawn as the first camera would
show them, so that a scene has one camera, as a clip has.

Source: Hodan et al., BOP: Benchmark for 6D Object Pose Estimation, ECCV 2018; the format is that of
bop_toolkit, docs/bop_datasets_format.md.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np

import xwing_utils as xu
from xwing.mesh import load_mesh

MILLIMETRE = 0.001  # metres
HEADER = "scene_id,im_id,obj_id,score,R,t,time"
PICTURES = "rgb", "gray"  # folders of a scene, the first that is there counts
MIN_VISIBLE = 0.1  # fraction of an object's silhouette; BOP does not count what shows less
SAME_BOX = 0.01  # diameters, by which the boxes of one object in two files may differ


# ------------------------------------------------------------ scenes


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """The N pictures of a scene, in the order of their numbers."""

    folder: Path
    numbers: list  # N, im_id
    paths: list  # N
    K: np.ndarray  # (3, 3) of all pictures that `in_one_camera` returns, our convention
    cameras: np.ndarray  # (N, 3, 3) of the files, BOP's convention

    def in_one_camera(self, image: np.ndarray, index: int) -> np.ndarray:
        """Draw the index-th picture (H, W, 3) as the first camera would show it."""
        first, own = self.cameras[0], self.cameras[index]
        if np.array_equal(first, own):
            return image
        size = image.shape[1::-1]
        return cv2.warpPerspective(image, first @ np.linalg.inv(own), size)


def number_of(path: str | Path) -> int:
    """The number at the end of the name of a folder, a model or a picture, 0 where it has none."""
    digits = re.search(r"\d+$", Path(path).absolute().stem)
    return int(digits[0]) if digits else 0


def is_scene(folder: str | Path) -> bool:
    """Whether a folder holds a scene of BOP."""
    return (Path(folder) / "scene_camera.json").is_file()


def load_scene(folder: str | Path) -> Scene:
    """Read which pictures a scene has, and their cameras.

    Raises:
        FileNotFoundError: there are no pictures, or no `scene_camera.json`.
        ValueError: a camera is none, and which.
    """
    folder = Path(folder)
    file = folder / "scene_camera.json"
    cameras = _by_number(file)
    numbers = sorted(cameras)
    matrices = [_camera(cameras[number], f"{file}, image {number}") for number in numbers]
    pictures = next((folder / name for name in PICTURES if (folder / name).is_dir()), None)
    if pictures is None or not numbers:
        raise FileNotFoundError(f"{folder}: expected pictures in rgb/ or gray/, found none")

    found = {int(path.stem): path for path in pictures.iterdir() if path.stem.isdecimal()}
    paths = [found.get(number, pictures / f"{number:06d}.png") for number in numbers]
    K = xu.crop_camera(matrices[0], -0.5, -0.5)
    return Scene(folder, numbers, paths, K, np.array(matrices))


def _by_number(file):
    """The content of one of a scene's files: {im_id: entry}."""
    content = xu.read_json(file)
    if not isinstance(content, dict) or not all(key.isdecimal() for key in content):
        raise ValueError(f'{file}: expected {{"0": ..., "1": ...}}, by the numbers of the pictures')
    return {int(key): entry for key, entry in content.items()}


def _camera(entry, name):
    try:
        return xu.check_camera_matrix(np.reshape(entry["cam_K"], (3, 3)))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: expected cam_K, 9 numbers of a camera matrix ({error})"
        ) from None


# ------------------------------------------------------------ what is true


def object_numbers(folder: str | Path) -> list[int]:
    """The numbers (obj_id) of the objects whose poses are known in a scene."""
    entries = _instances(Path(folder)).values()
    return sorted({one["obj_id"] for entry in entries for one in entry})


def _instances(folder):
    """What `scene_gt.json` holds: {im_id: list of instances}."""
    file = folder / "scene_gt.json"
    known = _by_number(file)
    for number, entry in known.items():
        is_list = isinstance(entry, list) and all(isinstance(one, dict) for one in entry)
        if not (is_list and all(isinstance(one.get("obj_id"), int) for one in entry)):
            raise ValueError(f"{file}, image {number}: expected a list of objects with obj_id")
    return known


def true_poses(scene: Scene, number: int) -> tuple[list, np.ndarray]:
    """Read the true poses of an object in the pictures of a scene.

    Of several instances, the one that shows most counts.

    Args:
        scene: with N pictures.
        number: obj_id.

    Returns:
        N poses (4, 4), model -> OpenCV camera, millimetres; None where less than MIN_VISIBLE of the
        object shows. And the visible fraction of its silhouette (N,); 1 where the scene does not
        say, 0 where the object is not there.

    Raises:
        FileNotFoundError: there is no `scene_gt.json`.
        ValueError: a pose is none, and which; or the two files name other numbers of objects.
    """
    file = scene.folder / "scene_gt.json"
    known = _instances(scene.folder)
    info_file = scene.folder / "scene_gt_info.json"
    info = _by_number(info_file) if info_file.is_file() else {}

    poses = []
    visible = []
    for picture in scene.numbers:
        instances = known.get(picture, [])
        facts = info.get(picture, [{}] * len(instances))
        if len(facts) != len(instances):
            raise ValueError(
                f"{info_file}, image {picture}: expected {len(instances)} objects, as in {file}, "
                f"got {len(facts)}"
            )
        fraction, instance = _most_visible(instances, facts, number)
        is_counted = fraction >= MIN_VISIBLE
        name = f"{file}, image {picture}, object {number}"
        poses.append(_pose(instance, name) if is_counted else None)
        visible.append(fraction)
    return poses, np.array(visible)


def _most_visible(instances, facts, number):
    """The visible fraction of the instance of an object that shows most, and the instance."""
    found = [
        (float(fact.get("visib_fract", 1.0)), instance)
        for fact, instance in zip(facts, instances)
        if instance["obj_id"] == number
    ]
    return max(found, key=lambda pair: pair[0], default=(0.0, None))


def _pose(instance, name):
    pose = np.eye(4)
    try:
        pose[:3, :3] = np.reshape(instance["cam_R_m2c"], (3, 3))
        pose[:3, 3] = np.reshape(instance["cam_t_m2c"], 3)
    except (KeyError, TypeError, ValueError):
        expected = "expected cam_R_m2c (9 numbers) and cam_t_m2c (3)"
        raise ValueError(f"{name}: {expected}, got {instance}") from None
    return xu.rigid_matrix(pose, name)


# ------------------------------------------------------------ models


def model_path(folder: str | Path, number: int) -> Path:
    """The mesh of an object, for a scene's folder: DATASET/models/obj_000005.ply.

    Raises:
        FileNotFoundError: it is not there.
    """
    name = Path("models") / f"obj_{number:06d}.ply"
    folder = Path(folder).absolute()
    for dataset in (folder, *folder.parents[:2]):
        if (dataset / name).is_file():
            return dataset / name
    raise FileNotFoundError(f"{folder}: expected the model {name} in it or two folders up")


def is_model(path: str | Path) -> bool:
    """Whether a file is a model of BOP, of which `models_info.json` knows more."""
    path = Path(path)
    name = re.fullmatch(r"obj_\d+\.ply", path.name)
    return bool(name) and path.with_name("models_info.json").is_file()


def load_model(path: str | Path) -> xu.Target:
    """The `Target` of a model: in millimetres, z up, with the symmetries that BOP states.

    Args:
        path: obj_000005.ply, with `models_info.json` beside it.

    Raises:
        ValueError: `models_info.json` states a symmetry that is none.
    """
    path = Path(path)
    file = path.with_name("models_info.json")
    info = _by_number(file).get(number_of(path), {})
    record = {"name": path.stem, "mesh": path.name, "unit": MILLIMETRE, "up": [0, 0, 1]}
    try:
        motions = info.get("symmetries_discrete", [])
        record["symmetries"] = [np.reshape(motion, (4, 4)).tolist() for motion in motions]
        record["axes"] = []
        for axis in info.get("symmetries_continuous", []):
            direction = np.array(axis["axis"], float)
            unit_direction = (direction / np.linalg.norm(direction)).tolist()
            record["axes"].append([axis.get("offset", [0, 0, 0]), unit_direction])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}, object {number_of(path)}: expected symmetries_discrete (16 numbers each) and "
            f"symmetries_continuous (axis and offset, 3 numbers each) ({error})"
        ) from None
    return xu.target_from_record(record, file, path.parent)


def find_object(folder: str | Path, target: xu.Target) -> tuple[int, float]:
    """Find which object of a scene a target is, by the shape of its box.

    Args:
        folder: of the scene.
        target: in any unit, in the axes of BOP's model.

    Returns:
        obj_id, and millimetres in one unit of the target.

    Raises:
        ValueError: no object of the scene is this target, or several are.
    """
    found = {}
    for number in object_numbers(folder):
        vertices = load_mesh(model_path(folder, number), max_triangles=None).vertices
        box = xu.box_corners(vertices.min(0), vertices.max(0))
        scale = np.linalg.norm(box[7] - box[0]) / target.diameter
        if np.abs(box / scale - target.box).max() < SAME_BOX * target.diameter:
            found[number] = float(scale)
    if len(found) != 1:
        which = f"the objects {sorted(found)} are" if found else "none of its objects is"
        raise ValueError(f"{folder}: {which} the target '{target.name}', expected one")
    return next(iter(found.items()))


# ------------------------------------------------------------ results


def result_rows(
    scene: int,
    numbers: Sequence[int],
    obj_id: int,
    track: Iterable,
    millimetres: float = 1.0,
    seconds: float = -1.0,
) -> list[str]:
    """The rows of a results file, one for each frame that has a pose.

    Args:
        scene: scene_id, the number of its folder.
        numbers: im_id of the N frames.
        obj_id: of the target.
        track: N `TrackedPose`; their probabilities are the scores.
        millimetres: in one unit of the poses.
        seconds: that a picture took; -1: not measured.
    """
    rows = []
    for number, tracked in zip(numbers, track):
        if tracked.pose is None:
            continue
        turn = " ".join(repr(float(value)) for value in tracked.pose[:3, :3].ravel())
        place = " ".join(repr(float(value)) for value in tracked.pose[:3, 3] * millimetres)
        rows.append(f"{scene},{number},{obj_id},{tracked.probability:.6f},{turn},{place},{seconds}")
    return rows


def write_results(path: str | Path, rows: Iterable[str]) -> None:
    """Write a file of results, METHOD_DATASET-test.csv, as bop_toolkit reads it.

    Args:
        path: of the file.
        rows: from `result_rows`, of one scene or several.
    """
    xu.write_files({Path(path): "\n".join([HEADER, *rows]) + "\n"})
