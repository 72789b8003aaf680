"""The target as data: its JSON file, what is derived from a mesh alone, and the file's errors."""

import dataclasses
import json
import re

import numpy as np
import pytest
import trimesh
from PIL import Image
from scipy.spatial.distance import cdist

import xwing_utils as xu


@pytest.fixture
def block(tmp_path):
    """A block of 1 x 2 x 3 units away from the origin, with a smaller one hidden inside."""
    outer = trimesh.creation.box((1, 2, 3))
    inner = trimesh.creation.box((0.5, 0.5, 0.5))
    mesh = trimesh.util.concatenate([outer, inner])
    mesh.apply_translation((10, 0, -4))
    path = tmp_path / "block.ply"
    mesh.export(path)
    return path


@pytest.fixture
def record(root, tmp_path):
    """What data/xwing.json holds, beside a copy of its mesh."""
    (tmp_path / "xwing.obj").write_bytes((root / "data" / "xwing.obj").read_bytes())
    return json.loads((root / "data" / "xwing.json").read_text())


def load(folder, record):
    path = folder / "target.json"
    path.write_text(json.dumps(record))
    return xu.load_target(path)


# ------------------------------------------------------------ the X-wing


def test_the_names_that_others_script_against_are_those_of_the_x_wing():
    box = [(x, y, z) for z in (-0.032, 0.034) for y in (-0.182, 0.163) for x in (-0.156, 0.156)]
    np.testing.assert_array_equal(xu.BOUNDING_BOX, box)
    assert xu.KEYPOINTS.shape == xu.NORMALS.shape == (36, 3)
    assert len(xu.KEYPOINT_NAMES) == len(set(xu.KEYPOINT_NAMES)) == 36
    assert xu.MIRROR.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert xu.LASERS.shape == (4, 2, 3)
    assert xu.DIAMETER == pytest.approx(np.sqrt(0.312**2 + 0.345**2 + 0.066**2))


def test_the_mirror_swaps_right_and_left():
    names = xu.KEYPOINT_NAMES[8:]
    permutation = xu.XWING.mirror_permutation
    for name, image in zip(names, permutation[8:]):
        swapped = {"right": "left", "left": "right"}
        words = [swapped.get(word, word) for word in name.split()]
        assert xu.KEYPOINT_NAMES[image] == " ".join(words)


def test_a_target_is_the_same_after_its_record_was_read_again():
    again = xu.target_from_record(xu.target_record(xu.XWING), "a test", xu.ROOT)
    for field in dataclasses.fields(xu.Target):
        value = getattr(again, field.name)
        expected = getattr(xu.XWING, field.name)
        np.testing.assert_array_equal(value, expected, err_msg=field.name)


# ------------------------------------------------------------ a mesh alone


def test_box_and_diameter_of_a_mesh(block):
    target = xu.load_target(block)
    np.testing.assert_allclose(target.box[[0, 7]], [[9.5, -1, -5.5], [10.5, 1, -2.5]])
    assert target.diameter == pytest.approx(np.sqrt(14))
    assert target.name == "block" and target.mesh == block and target.lasers is None
    np.testing.assert_array_equal(target.symmetries, [np.eye(4)])


def test_keypoints_lie_on_the_visible_surface_far_apart_with_outward_normals(block):
    target = xu.load_target(block)
    assert target.keypoints.shape == (8 + xu.SURFACE_POINTS, 3)
    points = target.keypoints[8:]
    normals = target.normals[8:]
    local = (points - [10, 0, -4]) / [0.5, 1, 1.5]
    np.testing.assert_allclose(np.abs(local).max(1), 1, atol=1e-6)  # none on the block inside
    faces = np.abs(local).argmax(1)
    expected = np.eye(3)[faces] * np.sign(local[np.arange(len(local)), faces])[:, None]
    edge = (np.abs(local) > 0.99).sum(1) > 1  # where either normal is right
    np.testing.assert_allclose(normals[~edge], expected[~edge], atol=1e-6)

    apart = cdist(points, points) + 10 * np.eye(len(points))
    assert apart.min() > 0.1 * target.diameter


def test_keypoints_are_closed_under_a_mirror_where_there_is_one(block):
    target = xu.load_target(block)
    mirrored = target.keypoints @ target.mirror[:3, :3].T + target.mirror[:3, 3]
    np.testing.assert_allclose(mirrored, target.keypoints[target.mirror_permutation], atol=1e-5)
    assert np.linalg.det(target.mirror[:3, :3]) < 0


def test_a_skew_solid_has_no_mirror(tmp_path):
    rng = np.random.default_rng(3)
    solid = trimesh.convex.convex_hull(rng.normal(size=(30, 3)))
    solid.export(tmp_path / "rock.stl")
    assert xu.load_target(tmp_path / "rock.stl").mirror is None


def test_a_textured_mesh_has_no_mirror(tmp_path):
    """A texture is rarely its own mirror image."""
    box = trimesh.creation.box((1, 2, 3))
    picture = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    coordinates = np.random.default_rng(1).random((len(box.vertices), 2))
    box.visual = trimesh.visual.TextureVisuals(coordinates, image=Image.fromarray(picture))
    box.export(tmp_path / "textured.glb")
    assert xu.load_target(tmp_path / "textured.glb").mirror is None


def test_a_mesh_in_millimetres_gives_the_same_keypoints(block, tmp_path):
    mesh = trimesh.load_mesh(block)
    mesh.apply_scale(1000)
    mesh.export(tmp_path / "large.ply")
    small = xu.load_target(block)
    large = xu.load_target(tmp_path / "large.ply")
    assert large.diameter == pytest.approx(1000 * small.diameter)
    np.testing.assert_allclose(large.keypoints, 1000 * small.keypoints, atol=1e-3)


def test_nothing_is_written(block):
    before = sorted(block.parent.iterdir())
    xu.load_target(block)
    assert sorted(block.parent.iterdir()) == before


def test_a_json_file_may_leave_box_and_keypoints_to_the_mesh(block):
    target = load(block.parent, {"mesh": "block.ply", "name": "a block", "unit": 0.001})
    assert target.name == "a block" and target.unit == 0.001
    np.testing.assert_array_equal(target.keypoints, xu.load_target(block).keypoints)


# ------------------------------------------------------------ bad files


@pytest.mark.parametrize(
    "change,message",
    [
        ({"colour": "red"}, "unknown colour; expected some of axes, box"),
        ({"mesh": None}, "no target; expected an object with 'mesh'"),
        ({"name": ""}, "name: expected a name, got ''"),
        ({"unit": -1}, "unit: expected metres per mesh unit, a positive number, got -1"),
        ({"up": [0, 1]}, r"up: expected shape \(3,\), got \(2,\)"),
        ({"up": "high"}, "up: expected numbers"),
        ({"box": [[1, 1, 1], [0, 0, 0]]}, "box: expected the low and the high corner"),
        ({"keypoints": []}, "keypoints: expected a list of keypoints"),
        ({"keypoints": [{"point": [0, 0, 0]}]}, "keypoints, entry 0: expected an object with"),
        ({"mirror": np.eye(4).tolist()}, "mirror: expected a reflection"),
        ({"mirror": np.diag([1, -1, 1, 1]).tolist()}, "mirror: does not map the keypoints"),
        ({"mirror": np.diag([-2, 1, 1, 1]).tolist()}, "mirror: not a rigid motion"),
        ({"symmetries": [np.diag([2, 1, 1, 1]).tolist()]}, "symmetries 0: not a rigid motion"),
        ({"lookalikes": [np.diag([-1, 1, 1, 1]).tolist()]}, "lookalikes 0: the matrix mirrors"),
        ({"axes": [[[0, 0, 0], [0, 0, 2]]]}, "axes: expected unit directions"),
        ({"symmetries": 3}, "symmetries: expected a list, got 3"),
        ({"axes": 0.5}, "axes: expected a list, got 0.5"),
        ({"lookalikes": "all"}, "lookalikes: expected a list, got all"),
        ({"flat_axis": [0, 0, 0]}, "flat_axis: expected a direction, got zeros"),
        ({"up": [0, 0, 0]}, "up: expected a direction, got zeros"),
        ({"lasers": [[[0, 0, 0]]]}, "lasers: expected shape"),
        ({"lasers": [[[0, 0, float("nan")], [0, 0, 1]]]}, "lasers: expected finite numbers"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_file(record, tmp_path, change, message):
    with pytest.raises(ValueError, match=f"target.json.*{message}"):
        load(tmp_path, record | change)


def test_a_target_without_its_mesh_is_an_error(record, tmp_path):
    with pytest.raises(FileNotFoundError, match="target.json: its mesh .*nothing.obj is not there"):
        load(tmp_path, record | {"mesh": "nothing.obj"})


@pytest.mark.parametrize("text", ["[]", "3", '"mesh"', "{}"])
def test_a_file_that_holds_no_target(tmp_path, text):
    (tmp_path / "target.json").write_text(text)
    with pytest.raises(ValueError, match="target.json: no target; expected an object with 'mesh'"):
        xu.load_target(tmp_path / "target.json")


@pytest.mark.parametrize(
    "name,content,error,message",
    [
        ("none.obj", None, FileNotFoundError, "no such mesh"),
        ("empty.obj", b"", ValueError, "cannot be read as a mesh|expected a solid"),
        ("text.ply", b"hello", ValueError, "cannot be read as a mesh"),
        ("nan.obj", b"v nan 0 0\nv 1 0 0\nv 0 1 1\nf 1 2 3\n", ValueError, "expected a solid"),
        ("flat.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", ValueError, "expected a solid"),
        ("mesh.docx", b"", ValueError, "cannot be read as a mesh"),
    ],
)
def test_a_mesh_that_cannot_be_read_is_named(tmp_path, name, content, error, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=f"{re.escape(str(path))}.*({message})"):
        xu.load_target(path)


# ------------------------------------------------------------ poses of another target


def test_a_scaled_target_gives_scaled_poses(poses, K):
    """The same object in other units: PnP, its covariance and its runner-up scale exactly."""
    factor = 1024.0
    large = dataclasses.replace(
        xu.XWING, keypoints=factor * xu.KEYPOINTS, diameter=factor * xu.DIAMETER
    )
    rng = np.random.default_rng(5)
    units = np.repeat([1, factor], 3)
    for pose in poses[:20]:
        seen = xu.project_pose(xu.KEYPOINTS, pose, K) + rng.normal(0, 0.5, (36, 2))
        small = xu.estimate_pose(seen, K, sigma=np.full(36, 0.5))
        found = xu.estimate_pose(seen, K, sigma=np.full(36, 0.5), target=large)
        np.testing.assert_array_equal(found.pose, xu.scale_pose(small.pose, factor))
        np.testing.assert_allclose(found.covariance, small.covariance * np.outer(units, units))
        assert found.accepted == small.accepted
        assert found.log_likelihood_margin == small.log_likelihood_margin


def test_ambiguous_poses_are_those_that_the_target_declares(poses):
    plain = dataclasses.replace(xu.XWING, lookalikes=np.zeros((0, 4, 4)), flat_axis=None)
    assert len(xu.ambiguous_poses(poses[0])) == 4
    (only,) = xu.ambiguous_poses(poses[0], plain)
    np.testing.assert_array_equal(only, poses[0])


def test_other_keypoints_are_another_target(block):
    xu.check_same_target(xu.XWING, dataclasses.replace(xu.XWING, name="a copy"), "the weights")
    with pytest.raises(ValueError, match="the weights belong to the target 'X-wing', not to 'blo"):
        xu.check_same_target(xu.XWING, xu.load_target(block), "the weights")


def test_a_set_of_another_target_has_its_keypoints_and_no_mirror(sample, camera, block):
    skew = dataclasses.replace(xu.load_target(block), mirror=None)
    skew = dataclasses.replace(skew, keypoints=(skew.keypoints - [10, 0, -4]) * 0.1)
    dataset = xu.make_dataset(
        sample[0][:4], sample[1][:4], *camera, batch_size=4, without=["geometry"], target=skew
    )
    _, found = dataset[0]
    order = np.random.default_rng([0, 0]).permutation(4)
    true = xu.keypoints_of(sample[1][order], *camera, points=skew.keypoints)
    visible = found[..., 2] > 0
    assert visible.any()
    np.testing.assert_allclose(found[visible][:, :2], true[visible], atol=0.01)
