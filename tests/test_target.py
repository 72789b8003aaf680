"""The target as data: its JSON file, what is derived from a mesh alone, and the file's errors."""

import dataclasses
import json
import re

import numpy as np
import pytest
import trimesh
from PIL import Image
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing.alignment import Aligner

POINT = {"name": "a", "point": [10, 0, -4], "normal": [0, 0, 1]}
RELATIVE = b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf -3 -2 -1\nv 0 0 1\nf -4 -3 -1\n"


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
    for name in ("xwing.obj", "xwing.mtl"):
        (tmp_path / name).write_bytes((root / "data" / name).read_bytes())
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
    assert target.symmetries[0].tolist() == np.eye(4).tolist()


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


def test_a_very_small_unit_is_a_unit_like_others(block, tmp_path):
    mesh = trimesh.load_mesh(block)
    mesh.apply_scale(2.0**-24)
    mesh.export(tmp_path / "tiny.ply")
    tiny = xu.load_target(tmp_path / "tiny.ply")
    expected = xu.load_target(block).keypoints * 2.0**-24
    np.testing.assert_allclose(tiny.keypoints, expected, atol=1e-6 * tiny.diameter)


def test_size_and_distance_are_said_in_the_units_of_the_mesh(block):
    target = load(block.parent, {"mesh": "block.ply", "name": "a block", "symmetries": []})
    pose = np.eye(4)
    pose[:3, 3] = [-10, 0, 24]
    said = xu.describe_target(target, pose)
    assert said.startswith("a block is 3.742 mesh units across and 20 mesh units away; how long")
    in_metres = xu.describe_target(dataclasses.replace(target, unit=0.001), pose)
    assert in_metres == (
        "a block is 3.742 mesh units (0.003742 m) across and 20 mesh units (0.02 m) away."
    )


# ------------------------------------------------------------ symmetries


def solid(name):
    """A `trimesh.Trimesh` that is symmetric in a known way, turned and away from the origin."""
    make = trimesh.creation
    if name == "cylinder":
        mesh = make.cylinder(0.1, 0.3, sections=48)
    elif name == "cone":
        mesh = make.cone(0.1, 0.3, sections=48)
    elif name == "ball":
        mesh = make.icosphere(radius=0.1)
    elif name == "octagon":
        mesh = make.cylinder(0.1, 0.1, sections=8)
    elif name == "box with a knob":
        knob = make.box((0.03, 0.03, 0.03)).apply_translation([0.05, 0.05, 0.1])
        mesh = trimesh.util.concatenate([make.box((0.1, 0.2, 0.3)), knob])
    else:
        mesh = make.box((0.2, 0.2, 0.2))
    motion = trimesh.transformations.rotation_matrix(0.7, [1, 2, 3])
    motion[:3, 3] = [0.3, 0.1, -0.2]
    return mesh.apply_transform(motion)


@pytest.mark.parametrize(
    "name,symmetries,axes",
    [
        ("cube", 24, 0),
        ("octagon", 16, 0),
        ("cylinder", 2, 1),
        ("cone", 1, 1),
        ("ball", 1, 3),
        ("box with a knob", 1, 0),
    ],
)
def test_turns_that_no_frame_can_tell_are_found(tmp_path, name, symmetries, axes):
    mesh = solid(name)
    mesh.export(tmp_path / "a.ply")
    target = xu.load_target(tmp_path / "a.ply")
    assert (len(target.symmetries), len(target.axes)) == (symmetries, axes)
    assert target.symmetries[0].tolist() == np.eye(4).tolist()

    # They map the solid onto itself: distances between vertices, or from its round side.
    tolerance = 0.01 * target.diameter
    for motion in target.symmetries[: 4 if axes == 0 else 2]:
        xu.rigid_matrix(motion, name)
        moved = mesh.vertices @ motion[:3, :3].T + motion[:3, 3]
        assert cdist(moved, mesh.vertices).min(1).max() < (1 if axes == 0 else 4) * tolerance
    said = xu.describe_target(target)
    assert ("no frame tells these poses apart" in said) == (symmetries > 1 or axes > 0)


def test_colours_and_textures_break_symmetries(tmp_path):
    cube = trimesh.creation.box((1, 1, 1))
    colours = np.full((12, 4), 255, np.uint8)
    colours[np.abs(cube.face_normals[:, 2]) > 0.5, 1:3] = 0  # top and bottom are red
    cube.visual = trimesh.visual.ColorVisuals(cube, face_colors=colours)
    cube.export(tmp_path / "red.ply")
    assert len(xu.load_target(tmp_path / "red.ply").symmetries) == 8

    picture = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    coordinates = np.random.default_rng(1).random((len(cube.vertices), 2))
    cube.visual = trimesh.visual.TextureVisuals(coordinates, image=Image.fromarray(picture))
    cube.export(tmp_path / "printed.glb")
    assert len(xu.load_target(tmp_path / "printed.glb").symmetries) == 1


def test_what_a_json_file_declares_is_not_looked_for(block):
    assert len(xu.load_target(block).symmetries) == 4
    target = load(block.parent, {"mesh": "block.ply", "symmetries": []})
    assert len(target.symmetries) == 1 and len(target.axes) == 0


# ------------------------------------------------------------ bad files


@pytest.mark.parametrize(
    "change,message",
    [
        ({"colour": "red"}, "unknown colour; expected some of axes, box"),
        ({"mesh": None}, "no target; expected an object with 'mesh'"),
        ({"name": ""}, "name: expected a name, got ''"),
        ({"unit": -1}, "unit: expected metres per mesh unit, a positive number, got -1"),
        ({"unit": True}, "unit: expected metres per mesh unit, a positive number, got True"),
        ({"unit": "mm"}, "unit: expected metres per mesh unit, a positive number, got 'mm'"),
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


@pytest.mark.parametrize(
    "change,message",
    [
        (
            {"box": [[0, 0, 0], [1000, 2000, 3000]]},
            "box: expected about that of the mesh, .*got .* mesh units",
        ),
        ({"keypoints": POINT | {"point": [99, 0, 0]}}, "keypoints: 'a' at .* outside of the box"),
        ({"mesh": ""}, "its mesh .* is not there; correct 'mesh'"),
        ({"mesh": "."}, "its mesh .* is not there"),
        ({"mesh": "none.ply"}, "its mesh .*none.ply is not there"),
        ({"mesh": ["block.ply"]}, "no target; expected an object with 'mesh', the name of a file"),
    ],
)
def test_a_record_that_does_not_fit_its_mesh(block, change, message):
    if "keypoints" in change:
        change = {"keypoints": [change["keypoints"]]}
    with pytest.raises((ValueError, FileNotFoundError), match=f"target.json.*{message}"):
        load(block.parent, {"mesh": "block.ply"} | change)


def test_a_box_in_another_unit_than_its_mesh_is_refused(record, tmp_path):
    """Where box and keypoints are given, the mesh is read by the aligner only."""
    record["box"] = (10 * np.array(record["box"])).tolist()
    for keypoint in record["keypoints"]:
        keypoint["point"] = [10 * value for value in keypoint["point"]]
    record = {key: record[key] for key in ("mesh", "box", "keypoints")}
    with pytest.raises(ValueError, match="measures 4.698 .* its mesh 0.4698; give both in mesh"):
        Aligner(load(tmp_path, record))


@pytest.mark.parametrize("offset,refused", [(25, False), (35, True), (1e5, True)])
def test_an_origin_far_outside_of_the_mesh_is_refused(block, tmp_path, offset, refused):
    mesh = trimesh.load_mesh(block)
    mesh.apply_translation(np.array([0.6, 0, 0.8]) * offset * np.sqrt(14))
    mesh.export(tmp_path / "far.obj")
    if not refused:
        assert xu.load_target(tmp_path / "far.obj").box[7, 2] > 70
        return
    with pytest.raises(ValueError, match=r"far.obj: its origin lies .* diameters outside of it"):
        xu.load_target(tmp_path / "far.obj")


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
        ("backwards.obj", RELATIVE, ValueError, r"relative \(negative\) indices, which are not"),
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


def random_pose(rng, target):
    """A pose (4, 4) somewhere in front of the camera."""
    pose = np.eye(4)
    pose[:3, :3] = Rotation.random(rng=rng).as_matrix()
    pose[:3, 3] = target.diameter * (rng.uniform(-0.5, 0.5, 3) + [0, 0, 3])
    return pose


def turned_about(axis, angle):
    """The motion (4, 4) about an axis of revolution (2, 3)."""
    point, direction = axis
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_rotvec(angle * direction).as_matrix()
    turn[:3, 3] = point - turn[:3, :3] @ point
    return turn


@pytest.mark.parametrize("revolved", [False, True])
def test_of_equivalent_poses_always_the_same_one_is_meant(root, revolved):
    bolt = xu.load_target(root / "data" / "objects" / "bolt_target.json")
    axis = np.array([[0.0, 0.0, 0.3], [0.0, 0.0, 1.0]]) * [[bolt.diameter], [1]]
    if revolved:
        bolt = dataclasses.replace(bolt, symmetries=bolt.symmetries[:1], axes=axis[None])
    rng = np.random.default_rng(5)
    for _ in range(20):
        pose = random_pose(rng, bolt)
        symmetry = bolt.symmetries[rng.integers(len(bolt.symmetries))]
        if revolved:
            symmetry = turned_about(axis, rng.uniform(0, 6))
        other = pose @ symmetry
        one = pose @ xu.reference_symmetry(pose, bolt)
        np.testing.assert_allclose(
            other @ xu.reference_symmetry(other, bolt), one, atol=1e-6 * bolt.diameter
        )


def test_the_reference_view_is_upright_and_its_own_reference(root):
    bolt = xu.load_target(root / "data" / "objects" / "bolt_target.json")
    upright = np.eye(4)
    upright[:3, :3] = [[1, 0, 0], [0, 0, -1], [0, 1, 0]]
    upright[:3, 3] = [0, 0, 3 * bolt.diameter] - upright[:3, :3] @ bolt.box.mean(0)
    one = upright @ xu.reference_symmetry(upright, bolt)
    np.testing.assert_allclose(one[:3, :3] @ [0, 0, 1], [0, -1, 0], atol=1e-9)
    np.testing.assert_array_equal(xu.reference_symmetry(upright, xu.XWING), np.eye(4))


@pytest.mark.parametrize("up", [(0, 0, 1), (1, 0, 0), (0.3, -0.5, 0.8)])
def test_the_reference_of_a_mirrored_pose_is_the_mirrored_reference(root, up):
    """Else heatmaps of a frame could not be averaged with those of its mirror image."""
    bolt = xu.load_target(root / "data" / "objects" / "bolt_target.json")
    bolt = dataclasses.replace(bolt, up=np.array(up, float))
    flip = np.diag([-1.0, 1, 1, 1])
    rng = np.random.default_rng(7)
    for pose in [random_pose(rng, bolt) for _ in range(50)]:
        mirrored = flip @ pose @ bolt.mirror
        found = mirrored @ xu.reference_symmetry(mirrored, bolt)
        expected = flip @ pose @ xu.reference_symmetry(pose, bolt) @ bolt.mirror
        np.testing.assert_allclose(found, expected, atol=1e-6 * bolt.diameter)


def test_batches_of_a_symmetric_target_mean_one_pose(sample, camera, root):
    """The frames are turned, mirrored and cut, and the labels are those of one equivalent pose."""
    bolt = xu.load_target(root / "data" / "objects" / "bolt_target.json")
    shrink = np.diag([*np.full(3, 0.3 / bolt.diameter), 1])
    points = bolt.keypoints * 0.3 / bolt.diameter
    bolt = dataclasses.replace(bolt, keypoints=points, box=points[:8], diameter=0.3)
    motions = shrink @ bolt.symmetries @ np.linalg.inv(shrink)
    mirror = shrink @ bolt.mirror @ np.linalg.inv(shrink)
    bolt = dataclasses.replace(bolt, symmetries=motions, mirror=mirror)
    paths, matrices = sample[0][:8], sample[1][:8]
    labels = []
    for equivalent in (matrices, matrices @ bolt.symmetries[1]):
        dataset = xu.make_dataset(
            paths, equivalent, *camera, batch_size=8, size=128, crop=True, target=bolt
        )
        labels.append(dataset[0][1])
    np.testing.assert_allclose(labels[0], labels[1], atol=0.02)


def test_the_nearest_of_equivalent_poses(root):
    bolt = xu.load_target(root / "data" / "objects" / "bolt_target.json")
    rng = np.random.default_rng(6)
    for symmetry in bolt.symmetries:
        pose = random_pose(rng, bolt)
        nearly = xu.move_pose(pose, rng.normal(0, 0.05, 6))
        found = xu.nearest_equivalent(pose @ symmetry, nearly, bolt)
        np.testing.assert_allclose(found, pose, atol=1e-6 * bolt.diameter)
        assert xu.rotation_error(pose @ symmetry, nearly, bolt) < 10
