"""A start from a box, on a block that the tests draw themselves in front of clutter."""

import dataclasses

import numpy as np
import pytest
import trimesh
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing import templates
from xwing.edges import EdgeMatcher, EdgeModel, pose_at
from xwing.mesh import Mesh, rasterise, triangle_normals
from xwing.scenery import photographs
from xwing.templates import Templates

K = np.array([[400.0, 0, 160], [0, 400, 120], [0, 0, 1]])
WIDTH, HEIGHT = 320, 240


def plain_mesh(*parts):
    """A `Mesh` in one colour."""
    solid = trimesh.util.concatenate(parts)
    materials = np.zeros(len(solid.faces), int)
    return Mesh(["grey"], np.full((1, 3), 0.6), solid.vertices, solid.faces, materials)


@pytest.fixture(scope="module")
def block():
    """An L-shaped block that looks different from all sides, far from the origin."""
    long = trimesh.creation.box((1.0, 0.35, 0.25))
    short = trimesh.creation.box((0.3, 0.6, 0.5))
    return plain_mesh(long.apply_translation([5, 0, 0]), short.apply_translation([5.4, 0.4, 0.1]))


@pytest.fixture(scope="module")
def matcher(block):
    return EdgeMatcher(block)


def pose_of(matcher, pixel, distance, seed):
    """A pose (4, 4) turned at random, whose middle is at a pixel and some diameters away."""
    facing = Rotation.random(rng=np.random.default_rng(seed)).as_matrix()
    return matcher.model.to_model(pose_at(np.array(pixel), distance, facing, K))


def frame(mesh, pose):
    """A picture (HEIGHT, WIDTH, 3) of a mesh, lit from a side, in front of a photograph."""
    ids, _ = rasterise(mesh.triangles, pose, K, WIDTH, HEIGHT)
    normals = triangle_normals(mesh.triangles)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    light = 130 + 90 * normals @ pose[:3, :3].T @ [0.3, -0.6, -0.7]
    behind = photographs()[6][:HEIGHT, :WIDTH]
    return np.where(ids[..., None] >= 0, light[ids][..., None], behind).astype(np.uint8)


def box_of(mesh, pose):
    """The box (4,) around a mesh in the frame."""
    pixels = xu.project_pose(mesh.vertices, pose, K)
    return np.concatenate([pixels.min(0), pixels.max(0)])


def is_right(mesh, found, pose):
    """Whether a pose is within 5 degrees and a tenth of the diameter."""
    middle = (mesh.vertices.min(0) + mesh.vertices.max(0)) / 2
    shift = (found - pose)[:3] @ [*middle, 1]
    return xu.rotation_error(found, pose) < 5 and np.linalg.norm(shift) < 0.1 * mesh.diameter


# ============================================================ edges


@pytest.mark.parametrize("turn", [0.12, -0.12])
def test_a_pose_is_refined_on_edges(block, matcher, turn):
    pose = pose_of(matcher, (130, 110), 2.6, seed=1)
    image = frame(block, pose)
    working = xu.move_pose(matcher.model.to_working(pose), np.array([turn, turn, 0, 0.03, 0, 0.1]))
    start = matcher.model.to_model(working)
    field = matcher.field(image, start, K)
    refined = matcher.refine(field, start)
    assert xu.rotation_error(start, pose) > 9
    assert xu.rotation_error(refined, pose) < 1
    assert matcher.agreement(field, refined) > matcher.agreement(field, start) + 0.1


def test_a_pose_is_polished_in_the_picture(block, matcher):
    pose = pose_of(matcher, (130, 110), 2.6, seed=1)
    image = frame(block, pose)
    x, y = 130, 110
    facing = Rotation.from_rotvec([0, 0, 0.12]) * Rotation.random(rng=np.random.default_rng(1))
    start = matcher.model.to_model(pose_at([x + 10, y - 8], 2.9, facing.as_matrix(), K))
    field = matcher.field(image, start, K)
    polished, agreement = matcher.polish(field, start)
    assert is_right(block, polished, pose) and not is_right(block, start, pose)
    assert agreement > matcher.agreement(field, start) + 0.1


def test_the_unit_of_the_mesh_changes_nothing(block, matcher):
    pose = pose_of(matcher, (130, 110), 2.6, seed=2)
    image = frame(block, pose)
    start = xu.move_pose(pose, np.array([0, 0, 0.05, 0, 0, 0]))
    large = EdgeMatcher(dataclasses.replace(block, vertices=1000 * block.vertices))
    found = []
    for one, unit in ((matcher, 1), (large, 1000)):
        scaled = xu.scale_pose(start, unit)
        refined = one.refine(one.field(image, scaled, K), scaled)
        found.append(xu.scale_pose(refined, 1 / unit))
    np.testing.assert_allclose(*found, atol=1e-6)


def test_too_little_in_sight_agrees_with_nothing(block, matcher):
    pose = pose_of(matcher, (130, 110), 2.6, seed=1)
    field = matcher.field(frame(block, pose), pose, K)
    behind = pose.copy()
    behind[2, 3] -= 10
    assert matcher.agreement(field, behind) == 0
    assert matcher.refine(field, behind) is None and matcher.polish(field, behind) is None
    with pytest.raises(ValueError, match="behind the camera"):
        matcher.field(frame(block, pose), behind, K)


def test_where_colours_change_there_is_an_edge(matcher):
    cube = plain_mesh(trimesh.creation.box((1, 1, 1)))
    painted = dataclasses.replace(
        cube,
        names=["grey", "red"],
        colours=np.array([[0.6, 0.6, 0.6], [0.8, 0.1, 0.1]]),
        face_materials=np.arange(12) // 2 % 2,  # the triangles of a side differ
    )
    working = matcher.model.to_working(pose_of(matcher, (130, 110), 2.6, seed=3))
    plain, coloured = (EdgeModel(mesh).draw(working, K, WIDTH, HEIGHT) for mesh in (cube, painted))
    assert (coloured.strength > 0.1).sum() > 1.1 * (plain.strength > 0.1).sum()


# ============================================================ equal poses


def turned(pose, turn):
    """A pose (4, 4) of a target that is turned about its origin, and off by some degrees."""
    motion = np.eye(4)
    motion[:3, :3] = (turn * Rotation.from_euler("xyz", [4, -3, 2], degrees=True)).as_matrix()
    return pose @ motion


def test_turns_of_a_cube_are_one_pose():
    cube = plain_mesh(trimesh.creation.box((1, 1, 1)))
    matcher = EdgeMatcher(cube)
    pose = pose_of(matcher, (130, 110), 2.6, seed=1)
    assert all(matcher.is_same(turned(pose, turn), pose) for turn in Rotation.create_group("O"))
    assert not matcher.is_same(turned(pose, Rotation.from_euler("z", 45, degrees=True)), pose)


def test_turns_of_a_painted_cube_are_several_poses():
    cube = plain_mesh(trimesh.creation.box((1, 1, 1)))
    normals = np.rint(triangle_normals(cube.triangles)).astype(int)
    painted = dataclasses.replace(
        cube,
        names=[f"side {i}" for i in range(7)],
        colours=np.linspace(0, 1, 7)[:, None] * np.ones(3),
        face_materials=normals @ [1, 2, 3] + 3,
    )
    matcher = EdgeMatcher(painted)
    pose = pose_of(matcher, (130, 110), 2.6, seed=1)
    assert matcher.is_same(turned(pose, Rotation.identity()), pose)
    for axis in "xyz":
        quarter = Rotation.from_euler(axis, 90, degrees=True)
        assert not matcher.is_same(turned(pose, quarter), pose)


def test_a_declared_symmetry_counts_and_a_lookalike_does_not():
    matcher = EdgeMatcher(xu.XWING)
    pose = np.eye(4)
    assert not matcher.is_same(pose @ xu.XWING.lookalikes[0], pose)
    symmetries = np.concatenate([np.eye(4)[None], xu.XWING.lookalikes])
    symmetric = EdgeMatcher(dataclasses.replace(xu.XWING, symmetries=symmetries))
    assert symmetric.is_same(pose @ xu.XWING.lookalikes[0], pose)


# ============================================================ a box


@pytest.fixture(scope="module")
def prepared(block):
    """Templates from few sides, which are prepared within a second or two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "VIEWS", 100)
        return Templates(block)


def test_a_target_is_found_in_a_box(block, prepared, monkeypatch):
    monkeypatch.setattr(templates, "MAX_POLISHED", 40)
    pose = pose_of(prepared.matcher, (130, 110), 2.6, seed=0)
    box = box_of(block, pose) + [3, -2, 2, 3]
    starts = prepared.find(frame(block, pose), K, box)
    assert 2 <= len(starts) <= 5
    assert is_right(block, starts[0].pose, pose)
    assert starts[0].edge_agreement > max(start.edge_agreement for start in starts[1:])
    assert np.isnan(starts[0].explained_contrast)
    for i, start in enumerate(starts):
        assert not any(prepared.matcher.is_same(start.pose, one.pose) for one in starts[:i])


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((100, 50, 40, 90), "x0 < x1"),
        ((100, 50, 100, 90), "x0 < x1"),
        ((100, 50, 108, 90), "at least 12 by 12"),
        ((400, 50, 500, 90), "in the frame of 320x240"),
        ((-90, 50, 5, 90), "in the frame of 320x240"),
        ((100, 50, np.nan, 90), "got .*nan"),
        ((100, 50, 90), "got .*90"),
    ],
)
def test_a_box_that_is_none_is_refused(prepared, box, message):
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    with pytest.raises(ValueError, match=f"box: expected .*{message}"):
        prepared.find(image, K, box)


def test_nothing_to_see_gives_poses_that_fill_the_box(prepared, monkeypatch):
    """An empty frame is no error: the user sees that none of the poses fits."""
    monkeypatch.setattr(templates, "MAX_POLISHED", 5)
    starts = prepared.find(np.full((HEIGHT, WIDTH, 3), 90, np.uint8), K, (100, 60, 200, 140))
    assert all(start.edge_agreement < 0.1 for start in starts)
