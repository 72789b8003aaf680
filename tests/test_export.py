"""Files for other programs: tables with what they were made of, and stages of USD."""

import dataclasses
import json
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
from scipy.spatial.transform import Rotation, Slerp

import xwing_utils as xu
from xwing.export import blender_settings, export_track
from xwing.footage import Clip
from xwing.mesh import load_mesh
from xwing.tracking import TrackedPose

pxr = pytest.importorskip("pxr")
from pxr import Gf, Sdf, Usd, UsdGeom, UsdRender, UsdShade  # noqa: E402

K = np.array([[500.0, 0, 140], [0, 480, 110], [0, 0, 1]])
SIZE = 320, 240
LOST = 4, 5


def spinning(count=12):
    """A track that turns by 50 degrees a frame about a slanted axis, and is lost in LOST."""
    track = []
    for i in range(count):
        pose = np.eye(4)
        turn = np.radians(50 * i) * np.array([0.6, 0.0, 0.8])
        pose[:3, :3] = Rotation.from_rotvec(turn).as_matrix()
        pose[:3, 3] = 0.01 * i, -0.05, 1 + 0.02 * i
        tracked = TrackedPose("tracked", i / 24, pose, probability=0.5 + i / 50)
        track.append(TrackedPose("lost", i / 24, reason="gone") if i in LOST else tracked)
    return track


@pytest.fixture
def clip(tmp_path):
    """What `export_track` asks of a clip: every second picture of a sequence from 1001 on."""
    numbers = list(range(1001, 1041, 2))
    return SimpleNamespace(source=tmp_path / "shot", fps=12.0, step=2, numbers=numbers)


def usd_stage(folder, clip, target=xu.XWING, suffix="usdc", track=None):
    path = folder / f"track.{suffix}"
    export_track(path, track or spinning(), K, *SIZE, target, clip)
    return Usd.Stage.Open(str(path))


def to_camera(stage, path, time):
    """(4, 4) from a prim to the camera in OpenCV's axes, as USD computes it."""
    cache = UsdGeom.XformCache(time)
    world = np.array(cache.GetLocalToWorldTransform(stage.GetPrimAtPath(path))).T
    camera = np.array(cache.GetLocalToWorldTransform(stage.GetPrimAtPath("/shot/camera"))).T
    return np.diag([1, -1, -1, 1]) @ np.linalg.inv(camera) @ world


# ------------------------------------------------------------ tables


def test_the_tables_say_what_the_track_was_made_of(tmp_path, clip):
    for suffix in ("csv", "json"):
        export_track(tmp_path / f"track.{suffix}", spinning(), K, *SIZE, clip=clip)
    record = json.loads((tmp_path / "track.json").read_text())
    table = pd.read_csv(tmp_path / "track.csv")
    assert record["schema"] == 2 and record["fps"] == 24
    assert record["camera"]["focal_length"] == pytest.approx(36 * 500 / 320)
    assert record["source"] == (tmp_path / "shot").as_posix()
    numbers = [row["number"] for row in record["frames"]]
    assert numbers[:3] == [1001, 1003, 1005] == table["number"][:3].tolist()
    assert (table["fps"] == 24).all() and (table["focal_length"] == 36 * 500 / 320).all()
    assert (table["source"] == record["source"]).all()


def test_a_source_in_the_project_is_written_relative_to_the_file(tmp_path, monkeypatch, clip):
    monkeypatch.setattr(xu, "ROOT", tmp_path)
    (tmp_path / "images").mkdir()
    export_track(tmp_path / "images" / "a.json", spinning(), K, *SIZE, clip=clip)
    assert json.loads((tmp_path / "images" / "a.json").read_text())["source"] == "../shot"


def test_bytes_of_names_that_are_not_utf_8_are_written_as_marks(tmp_path, clip):
    clip.source = tmp_path / "caf\udce9"
    track = [TrackedPose("lost", 0.0, reason="caf\udce9/1.jpg: damaged")]
    for suffix in ("csv", "json", "usda"):
        export_track(tmp_path / f"a.{suffix}", track, K, *SIZE, xu.XWING, clip)
    row = pd.read_csv(tmp_path / "a.csv").loc[0]
    record = json.loads((tmp_path / "a.json").read_text())
    stage = Usd.Stage.Open(str(tmp_path / "a.usda"))
    for source in (row["source"], record["source"], stage.GetRootLayer().customLayerData["source"]):
        assert source.endswith("caf\N{REPLACEMENT CHARACTER}")
    assert (
        row["reason"]
        == record["frames"][0]["reason"]
        == "caf\N{REPLACEMENT CHARACTER}/1.jpg: damaged"
    )


def test_the_frame_rate_comes_from_the_clip_or_the_caller_or_the_times(clip):
    clip.fps = None
    text = blender_settings(spinning(), np.diag([500.0, 500, 1]), *SIZE, clip, 15)
    assert text == "320 x 240 pixels, 30 frames a second, frames 1001 to 1023"
    text = blender_settings(spinning(), K, *SIZE)
    assert "24 frames a second, frames 0 to 11, pixel aspect X 1.000000, Y 1.041667" in text
    with pytest.raises(ValueError, match="fps: expected a positive number, got -1"):
        blender_settings(spinning(), K, *SIZE, fps=-1)


def test_a_clip_knows_the_numbers_of_its_pictures(tmp_path):
    for number in (1001, 1002, 1003):
        cv2.imwrite(str(tmp_path / f"shot.{number}.png"), np.zeros((8, 8, 3), np.uint8))
    assert Clip(tmp_path).numbers == [1001, 1002, 1003]
    assert Clip(tmp_path, step=2).numbers == [1001, 1003]


# ------------------------------------------------------------ USD


@pytest.mark.parametrize(("suffix", "unit"), [("usda", None), ("usdc", 36.2)])
def test_points_of_the_stage_project_to_our_pixels(tmp_path, clip, suffix, unit):
    target = dataclasses.replace(xu.XWING, unit=unit)
    stage = usd_stage(tmp_path, clip, target, suffix)
    points = np.array(UsdGeom.Mesh.Get(stage, "/shot/target/mesh").GetPointsAttr().Get(), float)
    np.testing.assert_allclose(points, load_mesh(target.mesh).vertices, atol=1e-7)
    for number, tracked in zip(clip.numbers, spinning()):
        if tracked.pose is None:
            continue
        np.testing.assert_allclose(
            to_camera(stage, "/shot/target/mesh", number), tracked.pose, atol=1e-12
        )
        camera = UsdGeom.Camera.Get(stage, "/shot/camera").GetCamera(number)
        projection = np.array(camera.frustum.ComputeProjectionMatrix()).T
        seen = xu.to_homogeneous(points) @ (projection @ np.diag([1, -1, -1, 1]) @ tracked.pose).T
        pixels = (seen[:, :2] / seen[:, 3:] * [1, -1] + 1) / 2 * SIZE
        # USD keeps the lens in 32 bits.
        np.testing.assert_allclose(pixels, xu.project_pose(points, tracked.pose, K), atol=1e-4)
    assert UsdGeom.GetStageMetersPerUnit(stage) == (unit or 1)
    camera = UsdGeom.Camera.Get(stage, "/shot/camera")
    millimetres = camera.GetFocalLengthAttr().Get() * 100 * (unit or 1)
    assert millimetres == pytest.approx(36 * 500 / 320)


def test_half_a_frame_between_two_keys_is_half_the_way(tmp_path, clip):
    stage = usd_stage(tmp_path, clip)
    track = spinning()
    for i in (0, 1, 2, 6, 7, 8, 9, 10):
        first, second = track[i].pose, track[i + 1].pose
        turns = Rotation.from_matrix([first[:3, :3], second[:3, :3]])
        middle = to_camera(stage, "/shot/target/mesh", clip.numbers[i] + 1)
        np.testing.assert_allclose(middle[:3, 3], (first + second)[:3, 3] / 2, atol=1e-12)
        expected = Slerp([0, 1], turns)(0.5).as_matrix()
        np.testing.assert_allclose(middle[:3, :3], expected, atol=1e-9)


def test_lost_frames_are_gaps(tmp_path, clip):
    stage = usd_stage(tmp_path, clip)
    node = stage.GetPrimAtPath("/shot/target")
    visibility = UsdGeom.Imageable(node).GetVisibilityAttr()
    keys = node.GetAttribute("xformOp:orient").GetTimeSamples()
    for i, (number, tracked) in enumerate(zip(clip.numbers, spinning())):
        shown = "invisible" if i in LOST else "inherited"
        assert visibility.Get(number) == shown
        assert (number in keys) == (i not in LOST)
        probability = node.GetAttribute("userProperties:probability").Get(number)
        assert probability == pytest.approx(tracked.probability)
        # Blender ignores visibility; there the scale makes the target vanish, also a little later.
        for time in (number - 0.5, number, number + 0.5):
            scale = np.linalg.norm(to_camera(stage, "/shot/target/mesh", time)[:3, 0])
            assert scale == pytest.approx(0 if i in LOST else 1)


def test_a_track_without_gaps_is_never_scaled(tmp_path, clip):
    stage = usd_stage(tmp_path, clip, track=spinning(4))
    assert not stage.GetPrimAtPath("/shot/target").HasAttribute("xformOp:scale")


def test_the_stage_says_what_it_was_made_of(tmp_path, clip):
    stage = usd_stage(tmp_path, clip)
    assert (stage.GetStartTimeCode(), stage.GetEndTimeCode()) == (1001, 1023)
    assert stage.GetTimeCodesPerSecond() == stage.GetFramesPerSecond() == 24
    assert UsdGeom.GetStageUpAxis(stage) == "Z"
    assert stage.GetDefaultPrim().GetPath() == "/shot"
    settings = UsdRender.Settings(stage.GetPrimAtPath(stage.GetMetadata("renderSettingsPrimPath")))
    assert settings.GetResolutionAttr().Get() == Gf.Vec2i(*SIZE)
    assert settings.GetCameraRel().GetTargets() == [Sdf.Path("/shot/camera")]
    known = stage.GetRootLayer().customLayerData
    assert known["source"] == (tmp_path / "shot").as_posix()
    assert (known["width"], known["height"]) == SIZE


def test_the_animated_axes_stand_up_as_the_target_does(tmp_path, clip):
    target = dataclasses.replace(xu.XWING, up=np.array([0.0, 2, 0]))
    stage = usd_stage(tmp_path, clip, target)
    node = to_camera(stage, "/shot/target", 1003)
    pose = spinning()[1].pose
    np.testing.assert_allclose(node[:3, 2], pose[:3, 1], atol=1e-12)
    np.testing.assert_allclose(to_camera(stage, "/shot/target/mesh", 1003), pose, atol=1e-12)


def test_materials_and_textures_come_along(tmp_path, clip):
    picture = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "print.png"), picture)
    (tmp_path / "box.mtl").write_text(
        "newmtl Paper.001\nmap_Kd print.png\nnewmtl Paper_001\nKd 1 0.5 0\n"
    )
    (tmp_path / "box.obj").write_text(
        "mtllib box.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nvt 0 0\nvt 1 0\nvt 0.25 1\n"
        "usemtl Paper.001\nf 1/1 2/2 3/3\nusemtl Paper_001\nf 1/1 2/2 4/3\nf 1/1 3/2 4/3\n"
    )
    target = dataclasses.replace(xu.XWING, mesh=tmp_path / "box.obj")
    stage = usd_stage(tmp_path, clip, target)
    mesh = UsdGeom.Mesh.Get(stage, "/shot/target/mesh")
    parts = UsdShade.MaterialBindingAPI(mesh).GetMaterialBindSubsets()
    assert [list(part.GetIndicesAttr().Get()) for part in parts] == [[0], [1, 2]]
    bound = [
        UsdShade.MaterialBindingAPI(part).ComputeBoundMaterial()[0].GetPath() for part in parts
    ]
    assert len(set(bound)) == 2

    texture = UsdShade.Shader.Get(stage, bound[0].AppendChild("texture"))
    file = texture.GetInput("file").Get()
    np.testing.assert_array_equal(cv2.imread(file.resolvedPath), picture)
    places = UsdGeom.PrimvarsAPI(mesh).GetPrimvar("st")
    assert places.GetInterpolation() == "faceVarying"
    np.testing.assert_allclose(places.Get()[2], [0.25, 1])
    colour = UsdShade.Shader.Get(stage, bound[1].AppendChild("surface")).GetInput("diffuseColor")
    np.testing.assert_allclose(colour.Get(), [1, 0.21404, 0], atol=1e-5)  # linear light


def test_what_cannot_be_exported_is_said_and_nothing_is_written(tmp_path, clip):
    path = tmp_path / "a.usda"
    path.write_text("before")
    with pytest.raises(ValueError, match="give the target"):
        export_track(path, spinning(), K, *SIZE)
    gone = dataclasses.replace(xu.XWING, mesh=tmp_path / "gone.obj")
    with pytest.raises(FileNotFoundError, match="gone.obj"):
        export_track(path, spinning(), K, *SIZE, gone)
    with pytest.raises(ValueError, match="at least one frame"):
        export_track(path, [], K, *SIZE, xu.XWING)
    with pytest.raises(ValueError, match="has 30 frames, but the clip 20"):
        export_track(path, spinning(30), K, *SIZE, xu.XWING, clip)
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1
