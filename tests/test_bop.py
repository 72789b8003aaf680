"""Scenes, models and results in the format of BOP."""

import dataclasses
import json

import cv2
import numpy as np
import pytest
import trimesh
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing import bop, evaluation
from xwing.footage import Clip
from xwing.tracking import TrackedPose

SIZE = 160, 120
OURS = np.array([[300.0, 0, 80], [0, 310, 60], [0, 0, 1]])
TURN = np.diag([-1.0, -1, 1, 1])  # half a turn about z


def pose_of(number):
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_rotvec([0.1 * number, 0.5, 0]).as_matrix()
    pose[:3, 3] = 5 * number, -10, 900
    return pose


def entry(obj_id, pose):
    turn, place = pose[:3, :3].ravel().tolist(), pose[:3, 3].tolist()
    return {"obj_id": obj_id, "cam_R_m2c": turn, "cam_t_m2c": place}


def write_json(path, content):
    path.write_text(json.dumps(content))


def write_models(folder):
    """Two boxes, 1 and 5, and the symmetries of the second."""
    folder.mkdir(parents=True)
    for number, sides in ((1, [100, 80, 60]), (5, [120, 50, 70])):
        trimesh.creation.box(sides).export(folder / f"obj_{number:06d}.ply")
    symmetries = {"symmetries_discrete": [TURN.ravel().tolist()]}
    symmetries["symmetries_continuous"] = [{"axis": [0, 0, 2], "offset": [1, 2, 3]}]
    write_json(folder / "models_info.json", {"1": {"diameter": 141}, "5": symmetries})


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """The `Target` of object 5."""
    folder = tmp_path_factory.mktemp("set") / "models"
    write_models(folder)
    return bop.load_model(folder / "obj_000005.ply")


@pytest.fixture
def scene(tmp_path):
    """A scene of three pictures, 3, 7 and 20, of two boxes, 1 and 5; the 20th has another camera.

    The pictures show a spot on the axis of the camera. Of object 5, there are two in picture 7, and
    next to nothing shows in picture 20.
    """
    folder = tmp_path / "set" / "test" / "000002"
    (folder / "rgb").mkdir(parents=True)
    write_models(tmp_path / "set" / "models")

    cameras = {}
    for number, centre in ((3, [79.5, 59.5]), (7, [79.5, 59.5]), (20, [89.5, 49.5])):
        K = OURS.copy()
        K[:2, 2] = centre
        cameras[str(number)] = {"cam_K": K.ravel().tolist(), "depth_scale": 1.0}
        image = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
        row, column = np.floor(centre[::-1]).astype(int)
        image[row : row + 2, column : column + 2] = 255
        cv2.imwrite(str(folder / "rgb" / f"{number:06d}.png"), image)
    write_json(folder / "scene_camera.json", cameras)

    known = {str(number): [entry(5, pose_of(number))] for number in (3, 7, 20)}
    known["7"] = [entry(5, pose_of(1)), entry(1, pose_of(2)), entry(5, pose_of(7))]
    write_json(folder / "scene_gt.json", known)
    shows = {"3": [1.0], "7": [0.3, 1.0, 0.8], "20": [0.05]}
    info = {key: [{"visib_fract": part} for part in parts] for key, parts in shows.items()}
    write_json(folder / "scene_gt_info.json", info)
    return folder


def test_a_scene_is_a_clip_of_one_camera(scene):
    clip = Clip(scene)
    assert (clip.width, clip.height, clip.count, clip.numbers) == (*SIZE, 3, [3, 7, 20])
    np.testing.assert_allclose(clip.K, OURS)  # half a pixel from BOP's origin
    for frame in clip:
        rows, columns = np.nonzero(frame.image[..., 0] > 127)
        assert [columns.mean() + 0.5, rows.mean() + 0.5] == [80, 60]
    assert Clip(scene, step=2).numbers == [3, 20]


def test_a_missing_picture_is_a_fault_in_its_place(scene):
    (scene / "rgb" / "000007.png").unlink()
    frames = list(Clip(scene))
    assert [bool(frame.fault) for frame in frames] == [False, True, False]
    assert "000007.png" in frames[1].fault


def test_true_poses_are_those_of_the_instance_that_shows_most(scene):
    assert bop.object_numbers(scene) == [1, 5]
    poses, visible = bop.true_poses(bop.load_scene(scene), 5)
    np.testing.assert_allclose(poses[:2], [pose_of(3), pose_of(7)], atol=1e-12)
    assert poses[2] is None  # a twentieth of it shows
    assert visible.tolist() == [1.0, 0.8, 0.05]
    poses, visible = bop.true_poses(bop.load_scene(scene), 1)
    assert poses[0] is None and visible.tolist() == [0, 1, 0]


def test_a_model_is_a_target_in_millimetres_with_the_symmetries_of_bop(scene, target):
    path = bop.model_path(scene, 5)
    assert path == scene.parents[1] / "models" / "obj_000005.ply"
    assert bop.is_model(path) and not bop.is_model(xu.XWING.mesh)
    assert target.unit == 0.001
    np.testing.assert_allclose(np.ptp(target.box, axis=0), [120, 50, 70])
    np.testing.assert_allclose(target.symmetries, [np.eye(4), TURN])
    np.testing.assert_allclose(target.axes, [[[1, 2, 3], [0, 0, 1]]])


def test_a_target_is_found_by_its_box_in_any_unit(scene, target):
    metres = {"box": target.box / 1000, "diameter": target.diameter / 1000}
    target = dataclasses.replace(target, **metres)
    number, millimetres = bop.find_object(scene, target)
    assert number == 5 and millimetres == pytest.approx(1000)
    with pytest.raises(ValueError, match="none of its objects is the target 'X-wing'"):
        bop.find_object(scene, xu.XWING)
    known = evaluation.load_bop(scene, target)
    np.testing.assert_allclose(known.poses[0][:3, 3], pose_of(3)[:3, 3] / 1000)


class Oracle:
    """A detector that knows the poses of the next pictures."""

    def __init__(self, target, poses):
        self.target = target
        self.poses = iter(poses)

    def __call__(self, image):
        keypoints = xu.project_pose(self.target.keypoints, next(self.poses), OURS)
        return keypoints, np.ones(len(keypoints)), np.full(len(keypoints), 0.1)


def test_the_pictures_of_a_scene_are_evaluated_one_by_one(scene, target):
    known = evaluation.load_bop(scene, target)
    detector = Oracle(target, [pose_of(3), pose_of(7)])
    errors, results = evaluation.evaluate_bop(known, detector)
    assert [result.status for result in results] == ["tracked", "tracked", "lost"]
    assert errors["rotation"].max() < 1e-3 and len(errors["rotation"]) == 2
    assert errors["corner"].shape == (2, 8) and np.nanmax(errors["corner"]) < 1e-6


def test_corners_beside_a_wide_picture_do_not_count(scene, target):
    known = evaluation.load_bop(scene, target)
    low = pose_of(3)
    low[1, 3] = 175  # the middle is at the lower edge, 120 pixels down; the width is 160
    known.poses[:] = [low, None, None]
    errors, _ = evaluation.evaluate_bop(known, Oracle(target, [low]))
    inside = xu.in_frame(xu.project_pose(target.box, low, OURS), *SIZE)
    assert 0 < inside.sum() < 8 and errors["corners"].tolist() == [inside.sum()]


def test_results_are_rows_of_bop(tmp_path):
    track = [TrackedPose("tracked", pose=pose_of(3), probability=0.75), TrackedPose("lost")]
    rows = bop.result_rows(2, [3, 7], 5, track, millimetres=10.0, seconds=0.5)
    bop.write_results(tmp_path / "method_set-test.csv", rows)
    header, row = (tmp_path / "method_set-test.csv").read_text().splitlines()
    assert header == "scene_id,im_id,obj_id,score,R,t,time"
    scene, image, number, score, turn, place, seconds = row.split(",")
    assert (scene, image, number) == ("2", "3", "5")
    assert (float(score), float(seconds)) == (0.75, 0.5)
    assert np.array_equal(np.array(turn.split(), float).reshape(3, 3), pose_of(3)[:3, :3])
    np.testing.assert_allclose(np.array(place.split(), float), [150, -100, 9000])


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("scene_camera.json", {"3": {"depth_scale": 1}}, "image 3: expected cam_K"),
        ("scene_camera.json", [1, 2], "by the numbers of the pictures"),
        ("scene_gt.json", {"3": [{"obj": 5}]}, "image 3: expected a list of objects with obj_id"),
        ("scene_gt.json", {"3": [{"obj_id": 5}]}, "image 3, object 5: expected cam_R_m2c"),
        (
            "scene_gt.json",
            {"3": [{"obj_id": 5, "cam_R_m2c": [1, 0, 0], "cam_t_m2c": [0, 0, 9]}]},
            "image 3, object 5: expected cam_R_m2c",
        ),
    ],
)
def test_a_damaged_scene_is_named(scene, file, content, error):
    write_json(scene / file, content)
    (scene / "scene_gt_info.json").unlink()
    with pytest.raises(ValueError, match=error):
        bop.true_poses(bop.load_scene(scene), 5)


def test_files_of_other_lengths_are_named(scene):
    write_json(scene / "scene_gt_info.json", {"3": [], "7": [{}, {}, {}], "20": [{}]})
    with pytest.raises(ValueError, match="scene_gt_info.json, image 3: expected 1 objects.*got 0"):
        bop.true_poses(bop.load_scene(scene), 5)


@pytest.mark.parametrize(
    "entry",
    [{"symmetries_discrete": [[1, 0, 0]]}, {"symmetries_continuous": [{"offset": [0, 0, 0]}]}, 7],
)
def test_a_symmetry_that_is_none_is_named(scene, entry):
    model = bop.model_path(scene, 5)
    write_json(model.with_name("models_info.json"), {"5": entry})
    with pytest.raises(ValueError, match="models_info.json, object 5: expected symmetries_discr"):
        bop.load_model(model)


def test_the_command_line_evaluates_a_scene(scene, target, tmp_path, monkeypatch, capsys):
    detector = Oracle(target, [pose_of(3), pose_of(7)])
    monkeypatch.setattr(evaluation, "Detector", lambda weights: detector)
    file = tmp_path / "figures.json"
    evaluation.main([str(scene), "--no-align", "--json", str(file)])
    figures = json.loads(file.read_text())
    assert figures["frames"] == 2 and figures["poses_found"] == 1
    assert figures["rotation_deg_median"] < 0.01
    assert "000002" in capsys.readouterr().out
