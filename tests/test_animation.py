"""Laser bolts, clips, and the tracking of a clip with a broken frame."""

from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import psutil
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

import xwing_utils as xu

STEP = 14  # frames into the shot: bolts of several volleys are in flight


def pose_of(angles, position=(0, 0, 1.0)):
    """Model axes turned by Euler angles in degrees, in the OpenCV camera's."""
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix(), position
    return pose


ACROSS = pose_of((0, 0, 90))  # the nose, and so the bolts, to the right
SHOTS = {  # name -> pose; every bolt in sight in long, flat lines
    "up": pose_of((0, 0, 0)), "right": ACROSS, "left": pose_of((0, 0, -90)), "slanted": pose_of((0, 0, 50)),
    "away": pose_of((-40, 0, 20)), "towards": pose_of((40, 0, 20), (0, 0, 1.3)), "from the side": pose_of((0, 90, 30)),
}


def flying(pose, step=STEP, **arguments):
    """The bolts of a ship that stands still, after so many frames."""
    lasers = xu.Lasers(30, **arguments)
    return [lasers.step(pose) for _ in range(step + 1)][-1]


def one_bolt(pose, cannon, start, end):
    """A bolt from `start` to `end` in front of the muzzle of `cannon`, (1, 2, 3)."""
    muzzle, aim = xu.LASERS[cannon]
    direction = (aim - muzzle) / np.linalg.norm(aim - muzzle)
    return ((muzzle + np.array([[start], [end]]) * direction) @ pose[:3, :3].T + pose[:3, 3])[None]


def core(bolts, K, size=256, **arguments):
    """Positions (M, 2) and brightness (M,) of the pixels of the bolts, without their glow."""
    image = xu.draw_bolts(np.zeros((size, size, 3), np.uint8), bolts, K, colour=(0, 0, 0), **arguments)[..., 1].astype(float)
    rows, columns = np.nonzero(image > 20)
    return np.stack([columns, rows], -1) + 0.5, image[rows, columns]


def distances(points, pose, K, cannon):
    """Signed distances (M,) in pixels from the projected line of fire, and how far along it the points lie."""
    muzzle, aim = xu.project_pose(xu.LASERS[cannon], pose, K)
    along = (aim - muzzle) / np.linalg.norm(aim - muzzle)
    offset = points - muzzle
    return offset @ [-along[1], along[0]], offset @ along


def frames_of(count, size=32):
    """Frames that all differ."""
    rng = np.random.default_rng(0)
    return [np.full((size, size, 3), 5 * i, np.uint8) + rng.integers(0, 3, (size, size, 3), dtype=np.uint8) for i in range(count)]


# ------------------------------------------------------------ bolts


def test_a_missing_pose_fires_nothing_and_what_was_fired_flies_on(K):
    image, lasers = frames_of(1, 64)[0], xu.Lasers(30)
    assert all(lasers.step(None).shape == (0, 2, 3) for _ in range(10))
    drawn = xu.draw_bolts(image, np.zeros((0, 2, 3)), K)
    np.testing.assert_array_equal(drawn, image)
    assert not np.shares_memory(drawn, image)
    before = [lasers.step(ACROSS) for _ in range(5)][-1]
    after = [lasers.step(None) for _ in range(3)][-1]
    assert len(before) == len(after) == 2
    np.testing.assert_allclose(after[:, 1, 0] - before[:, 1, 0], 2.0 * 3 / 30)


def test_bolts_keep_their_course_when_the_ship_turns():
    lasers = xu.Lasers(30, rate=1.0)
    first = [lasers.step(ACROSS) for _ in range(10)][-1]
    course = (first[:, 1] - first[:, 0]) / np.linalg.norm(first[:, 1] - first[:, 0], axis=1, keepdims=True)
    for turn in range(10, 100, 10):
        bolts = lasers.step(pose_of((0, turn, 90 + turn), (0.3, 0.1, 1.2)))
        step = bolts[:, 1] - first[:, 1]
        np.testing.assert_allclose(np.linalg.norm(np.cross(step, course), axis=1), 0, atol=1e-12)
        assert ((step * course).sum(1) > 0).all()


def test_volleys_vary_with_the_seed_and_only_with_it():
    def times(**arguments):
        lasers = xu.Lasers(100, rate=5.0, reach=100.0, **arguments)
        return np.flatnonzero(np.diff([len(lasers.step(ACROSS)) for _ in range(400)]))

    assert len(times()) == pytest.approx(20, abs=1) and np.ptp(np.diff(times())) <= 2
    np.testing.assert_array_equal(times(jitter=0.5, seed=1), times(jitter=0.5, seed=1))
    assert not np.array_equal(times(jitter=0.5, seed=1)[:15], times(jitter=0.5, seed=2)[:15])


@pytest.mark.parametrize("arguments", [{"fps": 0}, {"rate": -1}, {"speed": 0}, {"length": float("nan")}, {"reach": 0}, {"jitter": 1}, {"radius": 0}])
def test_lasers_that_cannot_be(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}: expected"):
        xu.Lasers(**arguments)


@pytest.mark.parametrize("draw", [lambda i, K: xu.draw_bolts(i, flying(ACROSS), K), lambda i, K: xu.draw_axes(i, ACROSS, K),
                                  lambda i, K: xu.draw_box(i, xu.project_pose(xu.BOUNDING_BOX, ACROSS, K))], ids=["bolts", "axes", "box"])
def test_drawing_leaves_the_frame_alone(K, draw):
    image = np.full((256, 256, 3), 30, np.uint8)
    drawn = draw(image, K)
    assert (image == 30).all() and (drawn != 30).any()
    assert drawn.shape == image.shape and drawn.dtype == np.uint8


@pytest.mark.parametrize("name", SHOTS)
@pytest.mark.parametrize("cannon", range(4))
def test_the_middle_of_a_bolt_is_the_projected_line_of_fire(K, name, cannon):
    points, brightness = core(one_bolt(SHOTS[name], cannon, 0.03, 0.19), K)
    off, along = distances(points, SHOTS[name], K, cannon)
    assert np.abs(off).max() < 2.5 and abs(np.average(off, weights=brightness)) < 0.2
    assert along.min() > 0 and np.ptp(along) > 10


def test_a_bolt_is_as_long_as_it_is(K):
    _, along = distances(core(one_bolt(ACROSS, 2, 0.03, 0.19), K)[0], ACROSS, K, 2)
    depth = (ACROSS @ [*xu.LASERS[2, 0], 1])[2]
    np.testing.assert_allclose([along.min(), along.max()], K[0, 0] / depth * np.array([0.03, 0.19]), atol=2.5)  # its head is rounded


def test_all_bolts_lie_on_lines_of_fire(K):
    points, _ = core(flying(ACROSS), K)
    off, along = np.array([distances(points, ACROSS, K, cannon) for cannon in range(4)]).transpose(1, 0, 2)
    assert len(points) > 100 and ((np.abs(off) < 2.5) & (along > -2)).any(0).all()


def test_both_pairs_of_cannons_fire_in_turn():
    first, second = flying(ACROSS, 1, reach=0.01), flying(ACROSS, 7, reach=0.01, length=0.16)
    assert len(first) == len(second) == 2
    sides = [{int(np.argmin(np.linalg.norm(np.cross(bolt[1] - muzzles[:, 0], muzzles[:, 1] - muzzles[:, 0]), axis=1))) for bolt in bolts}
             for bolts in (first, second) for muzzles in [xu.LASERS @ ACROSS[:3, :3].T + ACROSS[:3, 3]]]
    assert sorted(sides[0] | sides[1]) == [0, 1, 2, 3]


@pytest.mark.parametrize("step", [0, 1, 5, 9, 51, 299])
def test_bolts_are_in_front_of_the_muzzle_and_in_reach(step):
    bolts = flying(np.eye(4), step, length=0.16, reach=3.0)
    start, end = -0.1 - bolts[..., 1].T  # distances from the muzzle plane y = -0.1, along -y
    assert (start >= -1e-9).all() and (end > start).all() and (end <= start + 0.16 + 1e-9).all() and (start < 3.0).all()
    assert len(bolts) == 0 if step == 0 else len(bolts) > 0


def test_a_bolt_moves_with_its_speed():
    bolts = flying(np.eye(4), 3, rate=1.0, speed=2.0, length=0.16)  # fired 0.1 seconds ago
    np.testing.assert_allclose(-0.1 - bolts[..., 1], [[0.04, 0.20]] * 2, atol=1e-9)


HEAD_ON = pose_of((80, 0, 0), (0.05, 0.08, 0.9))  # the bolts fly past the camera


@pytest.mark.parametrize("pose", [HEAD_ON, pose_of((90, 0, 0), (0, 0.05, 1.0)), pose_of((100, 10, 0), (0, 0, 0.6))])
def test_bolts_are_never_behind_the_camera(K, pose, monkeypatch):
    fill, drawn, seen, lasers = xu._fill_bolt, [], 0, xu.Lasers(20)
    monkeypatch.setattr(xu, "_fill_bolt", lambda canvas, segment, *rest: (drawn.append(segment), fill(canvas, segment, *rest)))
    for _ in range(30):
        bolts, before = lasers.step(pose), len(drawn)
        xu.draw_bolts(np.zeros((256, 256, 3), np.uint8), bolts, K)
        seen += len(drawn) - before < len(bolts)
    depth = np.array(drawn)[..., 2]
    assert depth.min() == pytest.approx(0.05)  # cut at the near plane
    assert seen > 5  # some bolts had passed it


def test_bolts_wholly_behind_the_camera_are_not_drawn(K):
    behind = pose_of((0, 0, 0), (0, 0, -1.0))
    assert not xu.draw_bolts(np.zeros((64, 64, 3), np.uint8), flying(behind), K).any()


@pytest.mark.parametrize("end", [0.5, 0.75, 0.8, 0.84, 0.87, 0.9, 1.5])
@pytest.mark.parametrize("cannon", range(4))
def test_a_bolt_past_the_camera_stays_on_its_line(K, cannon, end):
    points, brightness = core(one_bolt(HEAD_ON, cannon, 0.2, end), K)
    off, along = distances(points, HEAD_ON, K, cannon)
    assert len(points) and along.min() > 0
    assert abs(np.average(off, weights=brightness)) < 0.5


def test_what_lies_before_a_bolt_hides_it(K):
    bolt = one_bolt(pose_of((-40, 0, 20)), 1, 0.03, 0.3)  # flies away from the camera
    near, far = bolt[0, :, 2].min(), bolt[0, :, 2].max()
    whole = len(core(bolt, K)[0])
    def seen(z):
        return len(core(bolt, K, depth=np.full((256, 256), z))[0])
    assert seen(np.inf) == seen(far + 0.1) == whole > 30
    assert seen(near - 0.1) == 0
    assert 0.2 * whole < seen((near + far) / 2) < 0.9 * whole


def test_the_hull_hides_the_bolts_behind_it(K):
    mesh, pose = xu.load_mesh(Path(xu.__file__).parent / "data" / "xwing.obj"), pose_of((0, 90, 10))  # seen from the side
    triangles = xu.occluder(mesh)
    depth = xu.mesh_depth(triangles, pose, K, 256, 256)
    hidden = xu.mesh_depth(xu.mesh_triangles(mesh), pose, K, 256, 256)
    assert len(triangles) < 0.5 * len(xu.mesh_triangles(mesh)) and np.isfinite(depth).sum() > 0.95 * np.isfinite(hidden).sum()
    behind = [c for c in range(4) if (pose @ [*xu.LASERS[c, 0], 1])[2] > 1.1]  # the cannons of the far wing
    assert len(behind) == 2
    bolts = np.concatenate([one_bolt(pose, c, 0.0, 0.08) for c in behind])  # beside the nose
    assert len(core(bolts, K, depth=depth)[0]) < 0.5 * len(core(bolts, K)[0])
    before = np.concatenate([one_bolt(pose, c, 0.0, 0.08) for c in range(4) if c not in behind])
    assert len(core(before, K, depth=depth)[0]) > 0.95 * len(core(before, K)[0])


def test_depth_about_the_bolts_is_all_that_they_need(K):
    """Two seconds of bolts about a ship that turns: the picture is that of the whole depth map, from a part of its triangles."""
    triangles, lasers, fewer = xu.occluder(xu.load_mesh(xu.Path(xu.__file__).parent / "data" / "xwing.obj")), xu.Lasers(), 0
    for i in range(0, 60):
        pose = pose_of((40 + 7 * i, 10, 5 * i), (-0.2 + 0.01 * i, 0.05, 0.9))
        bolts, image = lasers.step(pose), np.full((256, 256, 3), 20, np.uint8)
        near = xu._depth_about(bolts, triangles, pose, K, 256, 256)
        whole = xu.mesh_depth(triangles, pose, K, 256, 256)
        np.testing.assert_array_equal(xu.draw_bolts(image, bolts, K, near), xu.draw_bolts(image, bolts, K, whole))
        fewer += near is None or np.isfinite(near).sum() < np.isfinite(whole).sum()
    assert fewer > 50 and xu._depth_about(np.zeros((0, 2, 3)), triangles, pose, K, 256, 256) is None
    assert xu._depth_about(bolts, triangles, None, K, 256, 256) is None and xu._depth_about(bolts, None, pose, K, 256, 256) is None


# ------------------------------------------------------------ overlays


def test_ellipses_are_those_of_many_draws(K):
    rng, pose = np.random.default_rng(0), pose_of((40, 10, 20))
    spread = rng.normal(size=(6, 6)) * 0.004
    covariance = spread @ spread.T
    drawn = []
    for step in rng.multivariate_normal(np.zeros(6), covariance, 4000):
        moved = pose.copy()
        moved[:3, :3], moved[:3, 3] = Rotation.from_rotvec(step[:3]).as_matrix() @ pose[:3, :3], pose[:3, 3] + step[3:]
        drawn.append(xu.project_pose(xu.BOUNDING_BOX, moved, K))
    claimed = xu.corner_covariance(pose, covariance, K)
    for k in range(8):
        np.testing.assert_allclose(claimed[k], np.cov(np.array(drawn)[:, k].T), rtol=0.15, atol=0.05 * np.trace(claimed[k]))


def test_each_overlay_can_be_left_out(K):
    image = np.zeros((256, 256, 3), np.uint8)
    tracked = xu.TrackedPose("tracked", ACROSS, np.eye(6) * 1e-4, np.array([0, 0, 0, 0.3, 0.3, 0]))
    off = {"box": False, "axes": False, "ellipses": False, "path": 0}
    assert not xu.draw_tracked(image, tracked, K, **off).any() and not image.any()
    alone = {name: xu.draw_tracked(image, tracked, K, **(off | {name: 0.5 if name == "path" else True})).any(-1) for name in off}
    assert all(drawn.sum() > 10 for drawn in alone.values())
    everything = xu.draw_tracked(image, tracked, K).any(-1)
    assert (everything == np.any(list(alone.values()), axis=0)).mean() > 0.999
    assert not xu.draw_tracked(image, xu.TrackedPose("lost"), K).any()


def test_tracked_pictures_show_overlay_and_heatmaps_side_by_side(K):
    """A wide clip, whose picture is scaled into the square: the box lies where the pose's corners do, the heatmaps' spots too."""
    class Oracle:
        size = 256

        def heatmaps(self, squares):
            return xu.gaussian_heatmaps(xu.project_pose(xu.BOUNDING_BOX, ACROSS, K) / 2, 128, 2.0)[None]

    wide = np.array([[2 * K[0, 0], 0, 256], [0, 2 * K[0, 0], 128], [0, 0, 1]])  # 512 x 256: half the scale, 64 rows of black above and below
    track = [xu.TrackedPose("lost"), xu.TrackedPose("tracked", ACROSS, np.eye(6) * 1e-6)]
    clip = [np.full((256, 512, 3), 40, np.uint8)] * 2
    lost, shown = xu.tracked_pictures(clip, track, wide, Oracle(), [0, 1])
    assert lost.shape == shown.shape == (256, 512, 3) and not np.ptp(lost[70:180, :256]) and not lost[:60, :256].any()
    changed = np.argwhere((shown[:, :256] != lost[:, :256]).any(-1))[:, ::-1] + 0.5
    corners = xu.project_pose(xu.BOUNDING_BOX, ACROSS, K)
    assert np.linalg.norm(corners[:, None] - changed[None], axis=-1).min(1).max() < 1.5
    for x, y in corners:
        assert shown[int(y), 256 + int(x)].max() > 150


# ------------------------------------------------------------ clips


def test_colour_and_radius_of_the_bolts_are_arguments(K):
    frames = [np.zeros((256, 256, 3), np.uint8)] * 9
    drawn = {}
    for name, given in (("red", {}), ("green", {"colour": (40, 255, 60)}), ("thick", {"radius": 0.01})):
        *_, drawn[name] = xu._drawn(frames, [ACROSS] * 9, K, range(9), xu.Lasers(**given), None, False)
    red, green = drawn["red"].astype(int), drawn["green"].astype(int)
    lit = red.sum(-1) > 60
    assert lit.sum() > 50 and (red[lit, 0] >= red[lit, 1]).all() and (green[lit, 1] >= green[lit, 0]).all()
    assert (drawn["thick"].max(-1) > 200).sum() > 1.5 * (drawn["red"].max(-1) > 200).sum()  # the glow about it is as broad as ever


@pytest.fixture
def clip(K):
    """30 frames (one second), their poses, one missing, and K."""
    return frames_of(30), [None, *[ACROSS] * 29], K


def durations(path):
    with Image.open(path) as gif:
        return [gif.info["duration"] for i in range(gif.n_frames) if gif.seek(i) is None]


def test_gif_of_one_second(clip, tmp_path):
    xu.animate(*clip, tmp_path / "a.gif", fps=25, source_fps=30)
    assert durations(tmp_path / "a.gif") == [40] * 25
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.size == (32, 32) and gif.info["loop"] == 0


def test_mp4_of_one_second(clip, tmp_path):
    xu.animate(*clip, tmp_path / "a.mp4", fps=25, source_fps=30)
    with imageio.get_reader(tmp_path / "a.mp4") as video:
        assert video.count_frames() == 25 and video.get_meta_data()["fps"] == 25
        assert video.get_data(0).shape == (32, 32, 3)


@pytest.mark.parametrize("fps,count", [(30, 30), (25, 25), (10, 10), (60, 60)])
def test_real_time_is_kept_by_leaving_out_or_repeating_frames(clip, tmp_path, fps, count):
    xu.animate(*clip, tmp_path / "a.mp4", fps=fps, source_fps=30)
    with imageio.get_reader(tmp_path / "a.mp4") as video:
        assert video.count_frames() == count


@pytest.mark.parametrize("fps", [20, 25, 50, 30])
def test_a_gif_lasts_as_long_as_its_source(clip, tmp_path, fps):
    xu.animate(*clip, tmp_path / "a.gif", fps=fps, source_fps=30)
    assert sum(durations(tmp_path / "a.gif")) == pytest.approx(1000, abs=40)


def test_frames_shown_are_the_ones_of_their_time(clip, tmp_path):
    xu.animate(clip[0], [None] * 30, clip[2], tmp_path / "a.gif", fps=10, source_fps=30)
    with Image.open(tmp_path / "a.gif") as gif:
        shown = [np.asarray(gif.convert("RGB")).mean() for i in range(10) if gif.seek(i) is None]
    np.testing.assert_allclose(shown, [5 * i + 1 for i in range(0, 30, 3)], atol=2)


def test_colours_of_a_gif_do_not_flicker(K, tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    frames = [image.copy() for _ in range(6)]
    for i, frame in enumerate(frames):
        frame[:4, :4] = 40 * i
    xu.animate(frames, [None] * 6, K, tmp_path / "a.gif", fps=25, source_fps=25)
    with Image.open(tmp_path / "a.gif") as gif:
        pictures = [np.asarray(gif.convert("RGB"))[4:] for i in range(6) if gif.seek(i) is None]
    assert len(pictures) == 6 and all((p == pictures[0]).all() for p in pictures)


def test_frames_can_be_paths(clip, tmp_path):
    paths = []
    for i, frame in enumerate(clip[0][:5]):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(frame).save(paths[-1])
    xu.animate(paths, [None] * 5, clip[2], tmp_path / "paths.gif", source_fps=25)
    xu.animate(clip[0][:5], [None] * 5, clip[2], tmp_path / "arrays.gif", source_fps=25)
    assert (tmp_path / "paths.gif").read_bytes() == (tmp_path / "arrays.gif").read_bytes()


def test_a_broken_frame_repeats_the_one_before(clip, tmp_path):
    frames = list(clip[0][:5])
    frames[2] = tmp_path / "2.jpg"
    frames[2].write_bytes(b"broken")
    with pytest.warns(UserWarning, match="2.jpg"):
        xu.animate(frames, [None] * 5, clip[2], tmp_path / "a.gif", source_fps=25)
    assert sum(durations(tmp_path / "a.gif")) == 200


def test_a_broken_first_frame(clip, tmp_path):
    (tmp_path / "0.jpg").write_bytes(b"broken")
    with pytest.raises(ValueError, match="0.jpg"):
        xu.animate([tmp_path / "0.jpg", *clip[0][:2]], [None] * 3, clip[2], tmp_path / "a.gif")
    assert [p.name for p in tmp_path.iterdir()] == ["0.jpg"]


@pytest.mark.parametrize("change,message", [
    ({"frames": [], "poses": []}, "0 frames"), ({"poses": [None] * 3}, "30 frames and 3 poses"), ({"fps": 0}, "rates"),
    ({"fps": -25}, "rates"), ({"fps": float("nan")}, "rates"), ({"source_fps": 0}, "rates"), ({"fps": 200}, "GIF"),
    ({"poses": [np.eye(3)] * 30}, "pose of frame 0")])
def test_a_clip_that_cannot_be_made(clip, tmp_path, change, message):
    arguments = {"frames": clip[0], "poses": clip[1], "K": clip[2], "path": tmp_path / "a.gif", **change}
    with pytest.raises(ValueError, match=message):
        xu.animate(**arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.avi", "a", "a.gif.txt"])
def test_a_file_of_another_kind(clip, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: expected a .gif or .mp4"):
        xu.animate(*clip, tmp_path / name)


@pytest.mark.parametrize("name", ["a.gif", "a.mp4"])
def test_a_failure_leaves_the_old_file_and_nothing_else(clip, tmp_path, name):
    class Failing(xu.Lasers):
        def step(self, pose):
            return 1 / (20 - self.frame) and super().step(pose)

    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(ZeroDivisionError) as failure:
        xu.animate(*clip, tmp_path / name, lasers=Failing(30))
    assert failure.traceback  # keeps what the frames of the call hold, so that closing is not left to chance
    assert not [child for child in psutil.Process().children() if "ffmpeg" in child.name()]
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == b"old"


@pytest.mark.parametrize("name", ["a.gif", "a.mp4"])
def test_a_finished_clip_replaces_the_old_file_and_leaves_nothing_else(clip, tmp_path, name):
    (tmp_path / name).write_bytes(b"old")
    xu.animate(*clip, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name] and len((tmp_path / name).read_bytes()) > 100


# ------------------------------------------------------------ tracking


@pytest.fixture
def clip_folder(oracle, oracle_frames, poses, K, tmp_path):
    """Paths of five frames, a model that knows their corners, and the poses whose corners are all in the frame."""
    whole = [p for p in poses if xu.in_frame(xu.project_pose(xu.BOUNDING_BOX, p, K)).all()][:5]
    paths = [tmp_path / f"{i}.jpg" for i in range(5)]
    for path, frame in zip(paths, oracle_frames(5)):
        Image.fromarray(frame).save(path, quality=95)
    return paths, oracle(np.array([xu.project_pose(xu.BOUNDING_BOX, p, K) for p in whole])), whole


def test_every_frame_of_a_clip_gets_its_pose(clip_folder, K):
    paths, model, truth = clip_folder
    keypoints, confidence, found = xu.track_frames(model, paths, K, batch_size=2, progress=False)
    np.testing.assert_allclose(keypoints, model.keypoints, atol=0.05)
    assert confidence.shape == (5, 8) and confidence.min() > 0.95
    assert max(xu.rotation_error(f, t) for f, t in zip(found, truth)) < 0.5


def test_a_broken_frame_has_no_pose_and_a_warning_and_the_clip_goes_on(clip_folder, K):
    paths, model, truth = clip_folder
    paths[2].write_bytes(paths[2].read_bytes()[:200])
    with pytest.warns(UserWarning, match="2.jpg"):
        keypoints, confidence, found = xu.track_frames(model, paths, K, batch_size=2, progress=False)
    assert np.isnan(keypoints[2]).all() and not confidence[2].any()
    assert [p is None for p in found] == [False, False, True, False, False]
    assert max(xu.rotation_error(f, t) for f, t in zip(found, truth) if f is not None) < 0.5


@pytest.mark.parametrize("bad", [Image.new("L", (256, 256)), Image.new("RGB", (128, 256)), None], ids=["grey", "size", "missing"])
def test_a_frame_of_the_wrong_kind_has_no_pose_and_a_warning(clip_folder, K, bad):
    paths, model, _ = clip_folder
    paths[1].unlink() if bad is None else bad.save(paths[1])
    with pytest.warns(UserWarning, match="1.jpg"):
        _, _, found = xu.track_frames(model, paths, K, progress=False)
    assert [p is None for p in found] == [False, True, False, False, False]


# ------------------------------------------------------------ frames as they come


def test_frames_that_were_turned_can_be_drawn_on(K):
    turned = np.rot90(np.zeros((200, 256, 3), np.uint8))
    corners = xu.project_pose(xu.BOUNDING_BOX, pose_of((20, 30, 40)), K)
    tracked = xu.TrackedPose("tracked", pose_of((20, 30, 40)), np.eye(6) * 1e-4, np.zeros(6))
    for drawn in (xu.draw_box(turned, corners), xu.draw_axes(turned, pose_of((20, 30, 40)), K), xu.draw_tracked(turned, tracked, K)):
        assert drawn.shape == (256, 200, 3) and drawn.any()


def test_a_line_that_leaves_far_keeps_its_direction():
    corners = np.full((8, 2), np.nan)
    corners[:2] = [[833, 1000], [11021, -9000]]
    rows, columns = np.nonzero(xu.draw_box(np.zeros((1080, 1920, 3), np.uint8), corners).any(-1))
    line = 833 + (1000 - (rows + 0.5)) * (11021 - 833) / 10000
    assert len(rows) > 900 and np.abs(columns + 0.5 - line).max() < 2


def test_a_frame_of_another_size_repeats_the_one_before(K, tmp_path):
    frames = [np.full((64, 64, 3), 100, np.uint8)] * 3 + [np.full((48, 80, 3), 200, np.uint8)] * 2 + [np.full((64, 64, 3), 50, np.uint8)] * 4
    of_each = [pytest.warns(UserWarning, match=f"frame {i} repeats the one before: expected 64x64 pixels") for i in (3, 4)]
    with of_each[0], of_each[1]:
        xu.animate(frames, [None] * 9, K, tmp_path / "a.mp4", fps=30)
    with imageio.get_reader(tmp_path / "a.mp4") as video:
        read = [video.get_data(i).mean() for i in range(video.count_frames())]
    assert read == pytest.approx([100] * 5 + [50] * 4, abs=8)


def test_every_tick_of_a_gif_shows_the_frame_of_its_time(tmp_path):
    shown = []

    def draw(numbers):
        shown.extend(numbers)
        yield from [np.zeros((8, 8, 3), np.uint8)] * len(numbers)

    xu.write_clip(draw, 2700, tmp_path / "a.gif", 100 / 3, 30)
    assert shown == [i * 9 // 10 for i in range(3000)]


def test_poses_may_be_an_array_and_numbers_numpy_s(K, tmp_path):
    xu.animate(frames_of(5), np.stack([pose_of((20, 30, 40))] * 5), K.tolist(), tmp_path / "a.mp4", np.int64(30), np.float32(30))
    assert (tmp_path / "a.mp4").stat().st_size > 0
