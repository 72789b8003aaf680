"""Laser bolts, overlays, the viewer, GIF and MP4 files, and films in one pass."""

import dataclasses
import errno
import os
import subprocess
import sys
import time
import warnings
import weakref
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing import film as xfilm
from xwing import lasers as xlasers
from xwing import mesh as xmesh
from xwing import overlay
from xwing.film import animate, film, write_clip
from xwing.footage import Clip, Frame
from xwing.lasers import Lasers, draw_bolts, draw_shot
from xwing.overlay import draw_heatmaps, draw_tracked
from xwing.tracking import TrackedPose

STEP = 14  # frames into the shot: bolts of several volleys are in flight
UNIT = 1 / xu.DIAMETER  # diameters: the settings of `Lasers` for lengths in model units


def pose_of(angles, position=(0, 0, 1.0)):
    """A pose (4, 4) from Euler angles in degrees and a position, model -> OpenCV camera."""
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    pose[:3, 3] = position
    return pose


ACROSS = pose_of((0, 0, 90))  # the nose points to the right, and bolts fly to the right
HEAD_ON = pose_of((80, 0, 0), (0.05, 0.08, 0.9))  # the bolts fly past the camera
SHOTS = {  # name -> pose in which every bolt is in sight and at least 10 pixels long
    "up": pose_of((0, 0, 0)),
    "right": ACROSS,
    "left": pose_of((0, 0, -90)),
    "slanted": pose_of((0, 0, 50)),
    "away": pose_of((-40, 0, 20)),
    "towards": pose_of((40, 0, 20), (0, 0, 1.3)),
    "side": pose_of((0, 90, 30)),
}


@pytest.fixture(scope="module")
def mesh(root):
    return xmesh.load_mesh(root / "data" / "xwing.obj")


def scaled(target, factor):
    """The same target in other units of length."""
    return dataclasses.replace(
        target,
        box=target.box * factor,
        diameter=target.diameter * factor,
        lasers=target.lasers * factor,
    )


def moved_away(pose, factor):
    """The pose (4, 4) in other units of length."""
    pose = pose.copy()
    pose[:3, 3] *= factor
    return pose


def flying(pose, step=STEP, target=xu.XWING, **settings):
    """The bolts (B, 2, 3) of a ship that stands still, after `step` frames."""
    shot = Lasers(**settings).shot(30, target)
    return [shot.step(pose) for _ in range(step + 1)][-1]


def one_bolt(pose, cannon, start, end):
    """A bolt (1, 2, 3) that reaches from `start` to `end` units in front of a cannon's muzzle."""
    muzzle, aim = xu.LASERS[cannon]
    direction = (aim - muzzle) / np.linalg.norm(aim - muzzle)
    return ((muzzle + np.array([[start], [end]]) * direction) @ pose[:3, :3].T + pose[:3, 3])[None]


def core(bolts, K, size=256, **arguments):
    """Positions (M, 2) and brightness (M,) of the pixels of the bolts, without their glow."""
    black = np.zeros((size, size, 3), np.uint8)
    image = draw_bolts(black, bolts, K, colour=(0, 0, 0), **arguments)[..., 1].astype(float)
    rows, columns = np.nonzero(image > 20)
    return np.stack([columns, rows], -1) + 0.5, image[rows, columns]


def distances(points, pose, K, cannon):
    """Signed distances (M,) in pixels from a projected line of fire, and positions along it."""
    muzzle, aim = xu.project_pose(xu.LASERS[cannon], pose, K)
    along = (aim - muzzle) / np.linalg.norm(aim - muzzle)
    return (points - muzzle) @ [-along[1], along[0]], (points - muzzle) @ along


def frames_of(count, size=32):
    """`count` frames (size, size, 3) that all differ; frame i has a mean of 5 i + 1."""
    noise = np.random.default_rng(0).integers(0, 3, (count, size, size, 3), dtype=np.uint8)
    return [np.full((size, size, 3), 5 * i, np.uint8) + noise[i] for i in range(count)]


# ------------------------------------------------------------ bolts


def test_the_same_lasers_give_the_same_shot_every_time():
    lasers = Lasers(jitter=0.3)
    poses = [pose_of((0, 3 * i, 90)) for i in range(40)]
    shots = [[shot.step(pose) for pose in poses] for shot in (lasers.shot(), lasers.shot())]
    assert all(np.array_equal(a, b) for a, b in zip(*shots)) and len(shots[0][-1]) > 4

    with pytest.raises(dataclasses.FrozenInstanceError):
        lasers.rate = 3


def test_a_missing_pose_fires_nothing_and_what_was_fired_flies_on(K):
    image = frames_of(1, 64)[0]
    shot = Lasers().shot(30)
    assert all(shot.step(None).shape == (0, 2, 3) for _ in range(10))
    drawn = draw_bolts(image, np.zeros((0, 2, 3)), K)
    np.testing.assert_array_equal(drawn, image)
    assert not np.shares_memory(drawn, image)

    before = [shot.step(ACROSS) for _ in range(5)][-1]
    after = [shot.step(None) for _ in range(3)][-1]
    assert len(before) == len(after) == 2
    flown = after[:, 1, 0] - before[:, 1, 0]
    np.testing.assert_allclose(flown, 2.0 * 3 / 30, rtol=2e-5)  # the setting has five digits


def test_bolts_keep_their_course_when_the_ship_turns():
    shot = Lasers(rate=1.0).shot(30)
    first = [shot.step(ACROSS) for _ in range(10)][-1]
    way = first[:, 1] - first[:, 0]
    course = way / np.linalg.norm(way, axis=1, keepdims=True)
    for turn in range(10, 100, 10):
        step = shot.step(pose_of((0, turn, 90 + turn), (0.3, 0.1, 1.2)))[:, 1] - first[:, 1]
        np.testing.assert_allclose(np.linalg.norm(np.cross(step, course), axis=1), 0, atol=1e-12)
        assert ((step * course).sum(1) > 0).all()


def test_bolts_fly_by_the_frames_own_seconds():
    shot = Lasers(rate=1.0, speed=2.0 * UNIT, length=0.1 * UNIT, reach=100.0 * UNIT).shot(30)
    heads = [shot.step(np.eye(4), seconds)[0, 1, 1] for seconds in (0.1, 0.15, 0.65)]
    # Bolts fly 2 model units a second, along -y.
    np.testing.assert_allclose(np.subtract(-0.1, heads), [0.2, 0.3, 1.3])
    # At a broken time stamp only what can still fly is fired.
    assert len(shot.step(np.eye(4), 1e9)) < 200


def test_volleys_vary_with_the_seed_and_only_with_it():
    def times(**settings):
        shot = Lasers(rate=5.0, reach=100.0, **settings).shot(100)
        return np.flatnonzero(np.diff([len(shot.step(ACROSS)) for _ in range(400)]))

    assert len(times()) == pytest.approx(20, abs=1) and np.ptp(np.diff(times())) <= 2
    np.testing.assert_array_equal(times(jitter=0.5, seed=1), times(jitter=0.5, seed=1))
    assert not np.array_equal(times(jitter=0.5, seed=1)[:15], times(jitter=0.5, seed=2)[:15])


@pytest.mark.parametrize(
    "name,value",
    [
        ("rate", -1),
        ("speed", 0),
        ("length", np.nan),
        ("reach", np.inf),
        ("jitter", 1),
        ("radius", 0),
        ("fps", 0),
    ],
)
def test_settings_out_of_range_are_errors(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        Lasers().shot(value) if name == "fps" else Lasers(**{name: value})


@pytest.mark.parametrize(
    "draw",
    [
        lambda i, K: draw_bolts(i, flying(ACROSS), K),
        lambda i, K: draw_tracked(
            i, TrackedPose("tracked", 0, ACROSS, np.eye(6) * 1e-4, np.ones(6)), K
        ),
    ],
)
def test_drawing_leaves_the_frame_alone(K, draw):
    for image in (
        np.full((256, 256, 3), 30, np.uint8),
        np.rot90(np.full((200, 256, 3), 30, np.uint8)),
    ):
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
    expected = K[0, 0] / depth * np.array([0.03, 0.19])
    # The head of a bolt is rounded.
    np.testing.assert_allclose([along.min(), along.max()], expected, atol=2.5)


def test_both_pairs_of_cannons_fire_in_turn():
    first = flying(ACROSS, 1, reach=0.01 * UNIT)
    second = flying(ACROSS, 7, reach=0.01 * UNIT)
    muzzles = xu.LASERS @ ACROSS[:3, :3].T + ACROSS[:3, 3]
    aim = muzzles[:, 1] - muzzles[:, 0]
    course = aim / np.linalg.norm(aim, axis=1)[:, None]

    def cannon(bolt):
        return int(np.argmin(np.linalg.norm(np.cross(bolt[1] - muzzles[:, 0], course), axis=1)))

    assert [sorted(map(cannon, bolts)) for bolts in (first, second)] == [[1, 2], [0, 3]]


@pytest.mark.parametrize(
    "count,volleys",
    [(0, [0, 0]), (1, [1, 1]), (2, [1, 1]), (3, [2, 1]), (4, [2, 2]), (6, [3, 3])],
)
def test_a_target_may_have_any_number_of_cannons(count, volleys):
    """Half of the cannons fire in turn, a single one every time."""
    lasers = np.tile(xu.LASERS, (2, 1, 1))[:count] + np.arange(count)[:, None, None] * 0.01
    shot = Lasers(rate=10.0).shot(10, dataclasses.replace(xu.XWING, lasers=lasers))
    fired = [len(shot.step(ACROSS)) for _ in range(3)]  # bolts show one frame after they are fired
    assert np.diff(fired).tolist() == volleys


def test_a_target_without_lasers_fires_none(K, clip, tmp_path):
    unarmed = dataclasses.replace(xu.XWING, lasers=None)
    shot = Lasers().shot(30, unarmed)
    assert all(shot.step(ACROSS).shape == (0, 2, 3) for _ in range(20))

    frames, poses, K = clip
    K = xu.crop_camera(K, scale=32 / 256)  # the frames of the clip are small
    animate(frames, poses, K, tmp_path / "unarmed.gif", target=unarmed)
    animate(frames, [None] * len(frames), K, tmp_path / "no_pose.gif")
    animate(frames, poses, K, tmp_path / "armed.gif")
    unarmed, no_pose, armed = (
        (tmp_path / f"{name}.gif").read_bytes() for name in ("unarmed", "no_pose", "armed")
    )
    assert unarmed == no_pose != armed


def test_a_target_in_other_units_gives_the_same_pictures(K, mesh):
    """A power of two scales all numbers exactly, so that no length may be in absolute units."""
    factor = 1024.0
    large = scaled(xu.XWING, factor)
    large_mesh = dataclasses.replace(mesh, vertices=mesh.vertices * factor)
    lasers = Lasers()
    image = np.full((256, 256, 3), 20, np.uint8)

    for name, pose in {**SHOTS, "head on": HEAD_ON}.items():
        bolts = flying(pose)
        large_pose = moved_away(pose, factor)
        large_bolts = flying(large_pose, target=large)
        np.testing.assert_array_equal(large_bolts, bolts * factor, err_msg=name)

        drawn = draw_shot(image, bolts, lasers, mesh, pose, K)
        again = draw_shot(image, large_bolts, lasers, large_mesh, large_pose, K, large)
        np.testing.assert_array_equal(again, drawn, err_msg=name)
        plain = draw_bolts(image, bolts, K)
        np.testing.assert_array_equal(draw_bolts(image, large_bolts, K, target=large), plain)

        unit = np.repeat([1.0, factor], 3)
        covariance = np.diag(np.repeat([1e-4, 2e-4], 3))
        speed = (pose[2, 3] - 0.04) / overlay.SECONDS_AHEAD  # the path crosses the near plane
        velocity = np.array([0, 0, 0, 0.01, 0.01, -speed])
        shown = draw_tracked(image, TrackedPose("tracked", 0, pose, covariance, velocity), K)
        tracked = TrackedPose(
            "tracked", 0, large_pose, covariance * np.outer(unit, unit), velocity * unit
        )
        np.testing.assert_array_equal(draw_tracked(image, tracked, K, large), shown)


@pytest.mark.parametrize(
    "depth,shows",
    [(0.03, False), (0.3, True), (0.302, True), (0.31, False)],
    ids=["before the near plane", "free", "within the tolerance", "hidden"],
)
def test_near_plane_and_tolerance_follow_the_size_of_the_target(K, depth, shows):
    """A bolt at some depth (in model units) meets a hull at 0.3 units, in both units of length."""
    for factor in (1.0, 1024.0):
        bolt = factor * np.array([[[-0.02 * depth, 0, depth], [0.02 * depth, 0, depth]]])
        hull = np.full((256, 256), 0.3 * factor)
        image = np.zeros((256, 256, 3), np.uint8)
        drawn = draw_bolts(image, bolt, K, hull, target=scaled(xu.XWING, factor))
        assert drawn.any() == shows


@pytest.mark.parametrize("step", [0, 1, 5, 9, 51, 299])
def test_bolts_are_in_front_of_the_muzzle_and_in_reach(step):
    bolts = flying(np.eye(4), step, length=0.16 * UNIT, reach=3.0 * UNIT)
    start, end = -0.1 - bolts[..., 1].T  # distances from the muzzle plane y = -0.1, along -y
    assert (start >= -1e-9).all() and (end > start).all() and (end <= start + 0.16 + 1e-9).all()
    assert (start < 3.0).all() and bool(len(bolts)) == bool(step)


@pytest.mark.parametrize(
    "pose", [HEAD_ON, pose_of((90, 0, 0), (0, 0.05, 1.0)), pose_of((100, 10, 0), (0, 0, 0.6))]
)
def test_bolts_are_never_behind_the_camera(K, pose):
    drawn = []
    passed = 0
    shot = Lasers().shot(20)
    for _ in range(30):
        bolts = shot.step(pose)
        drawn.append(xlasers.cut_at_near(bolts, xlasers.NEAR * xu.DIAMETER))
        passed += len(drawn[-1]) < len(bolts)
        assert draw_bolts(np.zeros((256, 256, 3), np.uint8), bolts, K).any() <= bool(len(drawn[-1]))
    assert np.concatenate(drawn)[..., 2].min() == pytest.approx(0.05, rel=1e-4)  # five digits
    assert passed > 5

    behind = pose_of((0, 0, 0), (0, 0, -1.0))
    assert not draw_bolts(np.zeros((64, 64, 3), np.uint8), flying(behind), K).any()


@pytest.mark.parametrize("end", [0.5, 0.75, 0.8, 0.84, 0.87, 0.9, 1.5])
def test_a_bolt_past_the_camera_stays_on_its_line(K, end):
    for cannon in range(4):
        points, brightness = core(one_bolt(HEAD_ON, cannon, 0.2, end), K)
        off, along = distances(points, HEAD_ON, K, cannon)
        assert len(points) and along.min() > 0 and abs(np.average(off, weights=brightness)) < 0.5


def test_what_lies_before_a_bolt_hides_it(K):
    bolt = one_bolt(pose_of((-40, 0, 20)), 1, 0.03, 0.3)  # flies away from the camera
    near = bolt[0, :, 2].min()
    far = bolt[0, :, 2].max()
    whole = len(core(bolt, K)[0])

    def seen(z):
        return len(core(bolt, K, depth=np.full((256, 256), z))[0])

    assert seen(np.inf) == seen(far + 0.1) == whole > 30 and seen(near - 0.1) == 0
    assert 0.2 * whole < seen((near + far) / 2) < 0.9 * whole


def test_the_hull_hides_the_bolts_behind_it(K, mesh):
    pose = pose_of((0, 90, 10))  # seen from the side
    depths = [(pose @ [*muzzle, 1])[2] for muzzle in xu.LASERS[:, 0]]
    behind = [cannon for cannon in range(4) if depths[cannon] > 1.1]  # those of the far wing
    assert len(behind) == 2
    for cannon in range(4):
        bolts = one_bolt(pose, cannon, 0.0, 0.08)  # beside the nose
        depth = xlasers.hull_depth(mesh, bolts, pose, K, (256, 256))
        fraction = len(core(bolts, K, depth=depth)[0]) / len(core(bolts, K)[0])
        assert fraction < 0.5 if cannon in behind else fraction > 0.95


def test_the_depth_about_the_bolts_is_all_that_they_need(K, mesh):
    """For a ship that turns, the pictures are the same as with the whole depth map."""
    lasers = Lasers()
    shot = lasers.shot(30)
    part = 0
    for i in range(60):
        pose = pose_of((40 + 7 * i, 10, 5 * i), (-0.2 + 0.01 * i, 0.05, 0.9))
        bolts = shot.step(pose)
        image = np.full((256, 256, 3), 20, np.uint8)
        whole = xmesh.rasterise(mesh.triangles, pose, K, 256, 256)[1]
        drawn = draw_shot(image, bolts, lasers, mesh, pose, K)
        differs = (drawn != draw_bolts(image, bolts, K, whole)).any(-1)
        assert differs.mean() < 1e-4  # rounding at an edge
        near = xlasers.hull_depth(mesh, bolts, pose, K, (256, 256)) if len(bolts) else None
        part += near is None or np.isfinite(near).sum() < np.isfinite(whole).sum()
    assert part > 50
    for known in ((None, pose), (mesh, None)):
        drawn = draw_shot(image, bolts, lasers, *known, K)
        np.testing.assert_array_equal(drawn, draw_bolts(image, bolts, K))


def test_a_ship_that_passes_the_camera_still_hides_its_bolts(K, mesh):
    """A vertex behind the camera must not make all bolts visible."""
    pose = pose_of((90, 0, 0), (0.02, -0.03, 0.12))
    assert (mesh.vertices @ pose[2, :3] + pose[2, 3]).min() < 0
    bolts = np.array([[[-0.1, 0.0, 0.9], [0.1, 0.0, 0.9]]])  # behind the ship
    depth = xlasers.hull_depth(mesh, bolts, pose, K, (256, 256))
    whole = xmesh.rasterise(mesh.triangles, pose, K, 256, 256)[1]
    assert depth is not None and np.isfinite(whole[120:136, 110:146]).any()
    np.testing.assert_allclose(depth[124:132, 110:146], whole[124:132, 110:146], rtol=1e-5)


@pytest.mark.parametrize("scale", [2, 5, 15])
def test_the_glow_of_a_large_frame_is_a_gaussian_too(scale):
    """The glow is computed from fewer pixels, which must not be visible in it."""
    bolt = np.zeros((640, 900), np.uint8)
    cv2.line(bolt, (300, 200), (500, 400), 255, 2 * scale, cv2.LINE_AA)
    light = bolt.astype(np.float32) / 255
    near, far = (cv2.GaussianBlur(light, (0, 0), sigma * scale) for sigma in (2.2, 5.0))
    halo = (1.1 * near + 0.7 * far)[..., None] * [255, 60, 40]
    truth = halo + light[..., None] * xlasers.WHITE_HOT
    off = np.abs(xlasers.glow(bolt, (255, 60, 40), scale) - truth)
    assert off.max() < 5 and off.mean() < 0.2  # of 255


def test_colour_and_radius_of_the_bolts_are_settings(K):
    black = np.zeros((256, 256, 3), np.uint8)
    bolts = flying(ACROSS)
    red, green, thick = (
        draw_shot(black, bolts, lasers, None, None, K).astype(int)
        for lasers in (Lasers(), Lasers(colour=(40, 255, 60)), Lasers(radius=0.01 * UNIT))
    )
    lit = red.sum(-1) > 60
    assert lit.sum() > 50
    assert (red[lit, 0] >= red[lit, 1]).all() and (green[lit, 1] >= green[lit, 0]).all()
    # The glow is as broad as ever.
    assert (thick.max(-1) > 200).sum() > 1.5 * (red.max(-1) > 200).sum()


# ------------------------------------------------------------ overlays


def test_ellipses_are_those_of_poses_drawn_from_the_covariance(K):
    rng = np.random.default_rng(0)
    pose = pose_of((40, 10, 20))
    spread = rng.normal(size=(6, 6)) * 0.004
    covariance = spread @ spread.T
    drawn = []
    for step in rng.multivariate_normal(np.zeros(6), covariance, 4000):
        moved = pose.copy()
        moved[:3, :3] = Rotation.from_rotvec(step[:3]).as_matrix() @ pose[:3, :3]
        moved[:3, 3] += step[3:]
        drawn.append(xu.project_pose(xu.BOUNDING_BOX, moved, K))

    claims = overlay.corner_covariance(pose, covariance, K)
    for claimed, corner in zip(claims, np.moveaxis(drawn, 1, 0)):
        np.testing.assert_allclose(
            claimed, np.cov(corner.T), rtol=0.15, atol=0.05 * np.trace(claimed)
        )


def test_the_overlay_shows_all_that_is_known(K):
    image = np.zeros((256, 256, 3), np.uint8)
    covariance = np.eye(6) * 1e-4
    velocity = np.array([0, 0, 0, 0.3, 0.3, 0])
    everything = draw_tracked(image, TrackedPose("tracked", 0, ACROSS, covariance, velocity), K)
    for known in ((None, velocity), (covariance, None)):
        less = draw_tracked(image, TrackedPose("tracked", 0, ACROSS, *known), K)
        assert (less != everything).sum() > 10

    predicted = draw_tracked(image, TrackedPose("predicted", 0, ACROSS, covariance, velocity), K)
    assert (predicted != everything).any(-1).sum() > 100
    assert not draw_tracked(image, TrackedPose("lost"), K).any()


def test_tracked_pictures_show_overlay_and_heatmaps_side_by_side(K):
    """A wide clip is scaled into the square; the box and the heatmaps' spots lie on the corners."""
    corners = xu.project_pose(xu.BOUNDING_BOX, ACROSS, K)
    oracle = SimpleNamespace(
        target=xu.XWING,
        heatmaps=lambda squares: xu.gaussian_heatmaps(corners / 2, 128, 2.0)[None],
    )
    focal = 2 * K[0, 0]
    wide = np.array([[focal, 0, 256], [0, focal, 128], [0, 0, 1]])  # 512 x 256, half the scale
    track = [TrackedPose("lost"), TrackedPose("tracked", 0, ACROSS, np.eye(6) * 1e-6)]
    clip = [np.full((256, 512, 3), 40, np.uint8)] * 2

    lost, shown = overlay.tracked_pictures(clip, track, wide, oracle, [0, 1])
    assert lost.shape == shown.shape == (256, 512, 3)
    assert not np.ptp(lost[70:180, :256]) and not lost[:60, :256].any()
    changed = np.argwhere((shown[:, :256] != lost[:, :256]).any(-1))[:, ::-1] + 0.5
    assert np.linalg.norm(corners[:, None] - changed[None], axis=-1).min(1).max() < 1.5
    assert all(shown[int(y), 256 + int(x)].max() > 150 for x, y in corners)

    alone = list(overlay.tracked_pictures(clip, track, wide, None, [0, 1]))
    np.testing.assert_array_equal(alone, [lost[:, :256], shown[:, :256]])


def test_heatmaps_have_colours_of_their_own():
    maps = np.zeros((32, 32, 4), np.float32)
    for k in range(4):
        maps[8 * k + 3 : 8 * k + 6, 10:20, k] = 1
    picture = draw_heatmaps(maps, 64)
    spots = picture[[9, 25, 41, 57], 30]
    assert picture.shape == (64, 64, 3) and (spots.max(1) > 200).all()
    assert len({tuple(spot) for spot in spots}) == 4


def test_the_viewer_only_picks_what_was_drawn_before():
    pictures = [np.full((720, 1280, 3), 20 * i, np.uint8) for i in range(12)]
    widget = overlay.viewer(iter(pictures), start=4, step=3)
    image, controls = widget.children
    play, slider = controls.children
    assert slider.value == play.value == 3 and slider.max == play.max == 33
    for frame in (33, 0, 15, 3):
        start = time.perf_counter()
        slider.value = frame
        assert time.perf_counter() - start < 0.05
        shown = cv2.imdecode(np.frombuffer(image.value, np.uint8), cv2.IMREAD_COLOR)
        assert shown.shape == (360, 640, 3) and abs(shown.mean() - 20 * frame / 3) < 2
    with pytest.raises(ValueError, match="at least one picture"):
        overlay.viewer([])


# ------------------------------------------------------------ clips of a finished track


@pytest.fixture
def clip(K):
    """30 frames (one second), their poses, one missing, and K."""
    return frames_of(30), [None, *[ACROSS] * 29], K


def durations(path):
    with Image.open(path) as gif:
        return [gif.info["duration"] for i in range(gif.n_frames) if gif.seek(i) is None]


def test_files_of_one_second(clip, tmp_path):
    for name in ("a.gif", "a.mp4"):
        animate(*clip, tmp_path / name, fps=25, source_fps=30)
        written = Clip(tmp_path / name)
        assert (written.count, written.fps, written.width, written.height) == (25, 25, 32, 32)
        shown = [frame.image.mean() for frame in written]
        np.testing.assert_allclose(shown[0], 1, atol=3)
    assert durations(tmp_path / "a.gif") == [40] * 25
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["loop"] == 0
    with av.open(str(tmp_path / "a.mp4")) as video:
        assert video.streams.video[0].codec_context.name == "h264"


@pytest.mark.parametrize("fps", [10, 20, 24, 25, 29.97, 30, 50, 60])
def test_real_time_is_kept_by_leaving_out_or_repeating_frames(clip, tmp_path, fps):
    animate(clip[0], [None] * 30, clip[2], tmp_path / "a.mp4", fps=fps, source_fps=30)
    written = Clip(tmp_path / "a.mp4")
    assert written.count == int(np.ceil(fps - 1e-6)) and written.fps == pytest.approx(fps, rel=1e-3)
    if fps <= 50:
        animate(clip[0], [None] * 30, clip[2], tmp_path / "a.gif", fps=fps, source_fps=30)
        assert sum(durations(tmp_path / "a.gif")) == pytest.approx(1000, abs=40)


def test_frames_shown_are_the_ones_of_their_time(clip, tmp_path):
    animate(clip[0], [None] * 30, clip[2], tmp_path / "a.gif", fps=10, source_fps=30)
    shown = [frame.image.mean() for frame in Clip(tmp_path / "a.gif")]
    np.testing.assert_allclose(shown, [5 * i + 1 for i in range(0, 30, 3)], atol=2)
    numbers = xfilm.frames_in_real_time(np.arange(2700) / 30, 100 / 3)
    np.testing.assert_array_equal(numbers, np.arange(3000) * 9 // 10)


def test_a_varying_rate_is_shown_at_its_own_times(tmp_path, K):
    """Ten frames come in half a second, the next ten in two; each is shown when it was taken."""
    seconds = np.array([*np.arange(10) / 20, *0.5 + np.arange(10) / 5])
    indices = xfilm.frames_in_real_time(seconds, 10)
    ticks = np.arange(len(indices)) / 10
    expected = [np.flatnonzero(seconds <= tick + 1e-9)[-1] for tick in ticks]
    np.testing.assert_array_equal(indices, expected)

    milliseconds = np.round(np.arange(90) / 30, 3)  # as a Matroska file tells them
    np.testing.assert_array_equal(xfilm.frames_in_real_time(milliseconds, 30), np.arange(90))


def test_a_pause_makes_no_pictures(K, tmp_path):
    """Ten minutes, of a camera that records where something moves, are shown for a second."""
    seconds = np.arange(40) / 30 + 600 * (np.arange(40) >= 20)
    indices = xfilm.frames_in_real_time(seconds, 25)
    assert len(indices) == pytest.approx((40 / 30 + 1) * 25, abs=2)
    assert set(np.bincount(indices[indices != 19])) <= {0, 1}
    np.testing.assert_array_equal(xfilm.without_pauses(seconds)[:20], seconds[:20])

    # Time stamps that jump by a year, and frames of one time.
    assert len(xfilm.frames_in_real_time([0, 3e7], 25)) == 50
    np.testing.assert_array_equal(xfilm.frames_in_real_time([0, 0, 0, 0, 0.1], 10), [3, 4])


def test_a_film_says_that_pauses_are_shortened(K, tmp_path):
    seconds = [0, 0.1, 0.2, 60, 60.1]
    film(map(Frame, frames_of(5), seconds), StandIn(K), tmp_path / "a.mp4", progress=False)
    with pytest.warns(UserWarning, match=r"pauses \(1\); each is shown for 1 s"):
        animate(Clip(tmp_path / "a.mp4"), [None] * 5, K, tmp_path / "b.mp4", 10)
    shown = [round((frame.image.mean() - 1) / 5) for frame in Clip(tmp_path / "b.mp4")]
    assert shown == [0, 1, *[2] * 10, 3, 4]


def test_only_a_few_pictures_of_a_gif_are_held(tmp_path, monkeypatch):
    alive = set()
    most = []
    sampled = []

    def pictures():
        for i in range(40):
            picture = np.full((48, 64, 3), i, np.uint8)
            alive.add(i)
            weakref.finalize(picture, alive.discard, i)
            most.append(len(alive))
            yield picture
            del picture

    palette = xfilm._clip_palette
    monkeypatch.setattr(xfilm, "PALETTE_PIXELS", 1000)
    monkeypatch.setattr(
        xfilm, "_clip_palette", lambda pixels: sampled.append(pixels) or palette(pixels)
    )
    write_clip(pictures(), tmp_path / "a.gif")
    assert len(most) == 40 and max(most) <= 3
    assert len(sampled[0]) <= 1000 and np.unique(sampled[0]).tolist() == list(range(40))
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


def test_a_film_says_that_its_colours_are_those_of_bt709(tmp_path):
    colour = np.array([255, 60, 40])
    write_clip([np.full((32, 32, 3), colour, np.uint8)] * 3, tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as video:
        frame = next(video.decode(video=0))
        tags = (frame.color_range, frame.colorspace, frame.color_primaries, frame.color_trc)
        luma, blue, red = (np.frombuffer(plane, np.uint8)[0] for plane in frame.planes)
    assert tags == (1, 1, 1, 1)  # limited range, and BT.709 three times, see ITU-T H.273
    # ITU-R BT.709, section 3: luma from R, G, B, and its differences to B and to R.
    expected = np.array([0.2126, 0.7152, 0.0722]) @ colour / 255
    differences = (colour[[2, 0]] / 255 - expected) / [1.8556, 1.5748]
    assert luma == pytest.approx(16 + 219 * expected, abs=1)
    np.testing.assert_allclose([blue, red], 128 + 224 * differences, atol=1)
    assert np.abs(next(iter(Clip(tmp_path / "a.mp4"))).image[8, 8] - colour).max() <= 2


def test_a_picture_without_its_bolts_does_not_stop_a_film(clip, tmp_path, monkeypatch):
    def draw(image, bolts, *_):
        if image.max() > 50:
            raise ValueError("the hull is torn")
        return image

    monkeypatch.setattr(xfilm, "draw_shot", draw)
    with pytest.warns(UserWarning, match="frame 1[0-9] is shown without bolts: the hull is torn"):
        animate(clip[0][:12], clip[1][:12], clip[2], tmp_path / "a.mp4", 30)
    assert Clip(tmp_path / "a.mp4").count == 12


def test_pictures_of_any_kind_become_films(tmp_path):
    grey = np.full((32, 32), 120, np.uint8)
    images = [grey, np.dstack([grey] * 3) / 255, grey * np.uint16(257)]
    write_clip(images, tmp_path / "a.gif")
    assert [np.unique(frame.image).tolist() for frame in Clip(tmp_path / "a.gif")] == [[120]] * 3
    assert all((frame.image == 120).all() and frame.image.ndim == 3 for frame in map(Frame, images))


def test_colours_of_a_gif_do_not_flicker(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    frames = [image.copy() for _ in range(6)]
    for i, frame in enumerate(frames):
        frame[:4, :4] = 40 * i
    write_clip(frames, tmp_path / "a.gif", 25)
    pictures = [frame.image[4:] for frame in Clip(tmp_path / "a.gif")]
    assert len(pictures) == 6 and all((picture == pictures[0]).all() for picture in pictures)


def test_frames_can_be_paths_and_numbers_numpys(clip, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, frame in zip(paths, clip[0]):
        Image.fromarray(frame).save(path)
    poses, K = np.stack([ACROSS] * 5), clip[2].tolist()
    animate(paths, poses, K, tmp_path / "paths.gif", np.int64(25), np.float32(25))
    animate(clip[0][:5], poses, K, tmp_path / "arrays.gif", source_fps=25)
    assert (tmp_path / "paths.gif").read_bytes() == (tmp_path / "arrays.gif").read_bytes()


def test_what_cannot_be_read_repeats_the_frame_before(clip, tmp_path):
    frames = list(clip[0][:9])
    frames[2] = tmp_path / "2.jpg"
    frames[5] = np.zeros((48, 80, 3), np.uint8)
    frames[2].write_bytes(b"broken")
    with pytest.warns(UserWarning) as caught:
        animate(frames, [None] * 9, clip[2], tmp_path / "a.mp4", 30)
    assert [str(warning.message)[:8] for warning in caught] == ["frame 2 ", "frame 5 "]
    shown = [frame.image.mean() for frame in Clip(tmp_path / "a.mp4")]
    assert shown == pytest.approx([5 * i + 1 for i in (0, 1, 1, 3, 4, 4, 6, 7, 8)], abs=3)
    with pytest.raises(ValueError, match="frame 0 cannot be read: .*2.jpg"):
        animate(frames[2:3], [None], clip[2], tmp_path / "b.gif")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.jpg", "a.mp4"]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"frames": [], "poses": []}, "0 frames"),
        ({"poses": [None] * 3}, "30 frames and 3 poses"),
        ({"fps": 0}, "fps: expected"),
        ({"fps": -25}, "fps: expected"),
        ({"fps": float("nan")}, "fps: expected"),
        ({"source_fps": 0}, "source_fps: expected"),
        ({"fps": 200}, "GIF"),
        ({"poses": [np.eye(3)] * 30}, "pose of frame 0"),
        ({"path": "a.avi"}, "a.avi: expected a .gif or .mp4"),
        ({"path": "a.gif.txt"}, "a.gif.txt: expected a .gif or .mp4"),
    ],
)
def test_a_clip_that_cannot_be_made(clip, tmp_path, change, message):
    arguments = {"frames": clip[0], "poses": clip[1], "K": clip[2], "path": "a.gif", **change}
    with pytest.raises(ValueError, match=message):
        animate(**{**arguments, "path": tmp_path / arguments["path"]})
    assert not list(tmp_path.iterdir())


def test_odd_sizes_get_a_black_line(tmp_path):
    write_clip([np.full((33, 35, 3), 200, np.uint8)] * 3, tmp_path / "a.mp4", 30)
    written = next(iter(Clip(tmp_path / "a.mp4"))).image
    assert written.shape == (34, 36, 3)
    assert written[:32, :34].mean() > 190 and written[33, :34].mean() < 60

    different = [np.zeros((33, 35, 3), np.uint8), np.zeros((36, 36, 3), np.uint8)]
    with pytest.raises(ValueError, match="pictures of one size"):
        write_clip(different, tmp_path / "b.mp4")
    for name in ("c.gif", "c.mp4"):
        with pytest.raises(ValueError, match="at least one picture"):
            write_clip([], tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_progress_is_shown_where_it_takes_long_and_only_if_asked(clip, tmp_path, capsys):
    """A GIF has two bars: quantising its pictures takes as long as drawing them."""
    animate(*clip, tmp_path / "a.gif", progress=True)
    shown = capsys.readouterr().err
    assert "a.gif: 100%" in shown and "GIF colours: 100%" in shown and "25/25" in shown

    write_clip(clip[0], tmp_path / "a.mp4", progress=True)
    shown = capsys.readouterr().err
    assert "a.mp4: 100%" in shown and "30/30" in shown and "GIF" not in shown

    animate(*clip, tmp_path / "a.gif")
    write_clip(clip[0], tmp_path / "a.mp4")
    assert not capsys.readouterr().err


# ------------------------------------------------------------ files: whole or not at all


@pytest.mark.parametrize("name", ["a.gif", "a.mp4"])
def test_the_old_file_stays_until_the_new_one_is_whole(clip, tmp_path, name):
    def failing():
        yield from clip[0][:20]
        assert (tmp_path / name).read_bytes() == b"old"
        raise ZeroDivisionError

    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        write_clip(failing(), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"old"

    write_clip(clip[0], tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert Clip(tmp_path / name).count == 30


@pytest.mark.parametrize("name", ["a:b.mp4", "file:x.mp4", "pipe:1.mp4", "concat:a|b.mp4"])
def test_outputs_are_files_whatever_their_names(clip, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_clip(clip[0][:3], name)
    assert os.listdir() == [name] and Clip(name).count == 3


def test_a_path_that_cannot_be_written_is_said_before_the_pass(clip, tmp_path, K):
    (tmp_path / "a.mp4").mkdir()
    started = []
    tracker = SimpleNamespace(K=K, fps=30.0, target=xu.XWING, update=lambda *_: started.append(1))
    for path, error, message in (
        (tmp_path / "a.mp4", IsADirectoryError, "a.mp4: is a folder"),
        (tmp_path / "none" / "b.mp4", FileNotFoundError, "no such folder to write b.mp4"),
        (tmp_path / "c.gif", ValueError, "expected a .mp4 file"),
    ):
        with pytest.raises(error, match=message):
            film((Frame(image) for image in clip[0]), tracker, path, progress=False)
        if path.suffix == ".mp4":
            with pytest.raises(error, match=message):
                animate(*clip, path)
    assert not started and [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_leftovers_of_killed_runs_are_removed(clip, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".a.mp4.{gone.pid}.part").write_bytes(b"of a killed run")
    (tmp_path / f".a.mp4.{os.getppid()}.part").write_bytes(b"of a run that goes on")
    (tmp_path / ".a.mp4.notes.part").write_bytes(b"of somebody else")
    write_clip(clip[0][:3], tmp_path / "a.mp4")
    left = {".a.mp4.notes.part", f".a.mp4.{os.getppid()}.part", "a.mp4"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_a_full_disk_is_one_clear_error_and_loses_no_poses(tmp_path):
    """Files may grow to 20 kB, then writing fails."""
    program = f"""
import resource, signal, sys, warnings
sys.path.insert(0, {str(xu.ROOT)!r})
import numpy as np
from types import SimpleNamespace
import xwing_utils as xu
from xwing.film import film, write_clip
from xwing.footage import Frame
from xwing.tracker import TrackedPose
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
pictures = list(np.random.default_rng(0).integers(0, 255, (20, 96, 96, 3), dtype=np.uint8))
for name in ("b.gif", "b.mp4"):
    try:
        write_clip(pictures, {str(tmp_path)!r} + "/" + name)
    except OSError as error:
        print(error)
tracker = SimpleNamespace(K=np.eye(3), fps=30, target=xu.XWING)
tracker.update = lambda image, seconds: TrackedPose("lost", seconds)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    track = film(map(Frame, pictures), tracker, {str(tmp_path / "a.mp4")!r}, progress=False)
print(len(track), *[str(warning.message) for warning in caught])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 3, done.stderr[-2000:]
    for line, name in zip(lines, ("b.gif", "b.mp4", "a.mp4")):
        assert f"File too large: '{tmp_path / name}'" in line
    assert lines[2].startswith("20 not written: ") and not list(tmp_path.iterdir())


# ------------------------------------------------------------ films in one pass


class StandIn:
    """A tracker that knows the pose and remembers what it was given."""

    def __init__(self, K, pose=ACROSS):
        self.K = K
        self.fps = 30.0
        self.target = xu.XWING
        self.pose = pose
        self.seen = []

    def update(self, image, seconds=None):
        self.seen.append((None if image is None else image.shape, seconds))
        if image is None:
            return TrackedPose("predicted", seconds, self.pose, reason="the frame is missing")
        return TrackedPose("tracked", seconds, self.pose, np.eye(6), np.zeros(6))


def test_a_film_is_made_in_one_pass_and_broken_frames_do_not_stop_it(K, mesh, tmp_path):
    tracker = StandIn(K)
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(12):
        Image.fromarray(np.full((256, 256, 3), 10 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "5.png").write_bytes(b"broken")

    track = film(Clip(folder), tracker, tmp_path / "a.mp4", mesh=mesh, progress=False)
    assert [t.status for t in track] == ["tracked"] * 5 + ["predicted"] + ["tracked"] * 6
    assert "5.png" in track[5].reason and track[0].covariance is None and track[0].velocity is None
    np.testing.assert_allclose([seconds for _, seconds in tracker.seen], np.arange(12) / 30)
    written = Clip(tmp_path / "a.mp4")
    corners = [frame.image[:20, :20].mean() for frame in written]
    assert (written.count, written.fps) == (12, 30)
    assert corners == pytest.approx([10 * i for i in (0, 1, 2, 3, 4, 4, 6, 7, 8, 9, 10, 11)], abs=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "frames"]


def test_a_film_keeps_the_times_of_its_frames(K, tmp_path):
    seconds = [0, 0.1, 0.2, 0.7, 0.75, 0.8, 2.0]
    tracker = StandIn(K)
    track = film(map(Frame, frames_of(7), seconds), tracker, tmp_path / "a.mp4", progress=False)
    assert [s for _, s in tracker.seen] == [t.seconds for t in track] == seconds
    np.testing.assert_allclose(Clip(tmp_path / "a.mp4").seconds, seconds, atol=1e-4)
    odd = [0, 0.1, 0.1, 0.2, 0, 0.1]  # a time stamp twice, and a clip that begins again
    film(map(Frame, frames_of(6), odd), tracker, tmp_path / "b.mp4", progress=False)
    shown = [0, 0.1, 0.1 + 1 / 60, 0.2, 0.2 + 1 / 30, 0.3 + 1 / 30]
    np.testing.assert_allclose(Clip(tmp_path / "b.mp4").seconds, shown, atol=1e-4)
    assert [s for _, s in tracker.seen[7:]] == odd


def test_frames_that_change_their_size_lose_no_pose(K, tmp_path):
    images = [*frames_of(4), *frames_of(3, 48), *frames_of(4)]
    track = film(map(Frame, images), StandIn(K), tmp_path / "a.mp4", progress=False)
    assert [t.status for t in track] == ["tracked"] * 4 + ["predicted"] * 3 + ["tracked"] * 4
    assert "(48, 48, 3), not (32, 32, 3)" in track[4].reason
    assert Clip(tmp_path / "a.mp4").count == 11


def test_a_film_begins_with_the_first_frame_that_can_be_read(K, tmp_path):
    clip = [Frame(None, fault="broken")] * 2 + [Frame(image) for image in frames_of(4)]
    track = film(clip, StandIn(K), tmp_path / "a.mp4", progress=False)
    assert len(track) == Clip(tmp_path / "a.mp4").count == 6
    assert [t.reason for t in track[:2]] == ["broken"] * 2
    with pytest.raises(ValueError, match="at least one picture"):
        film([Frame(None, fault="broken")] * 3, StandIn(K), tmp_path / "b.mp4", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_what_was_read_before_an_error_is_filmed(K, tmp_path):
    def failing():
        yield from map(Frame, frames_of(10))
        raise OSError("the tape is torn")

    track = film(failing(), StandIn(K), tmp_path / "a.mp4", progress=False)
    assert len(track) == Clip(tmp_path / "a.mp4").count == 11
    assert "the tape is torn" in track[-1].reason


@pytest.mark.parametrize(
    "error", [RuntimeError("failed"), KeyboardInterrupt(), OSError(errno.EPERM, "no")]
)
def test_a_failure_of_the_tracker_leaves_no_film(K, tmp_path, error):
    class Failing(StandIn):
        def update(self, image, seconds=None):
            if len(self.seen) == 5:
                raise error
            return super().update(image, seconds)

    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(type(error)):
        film(map(Frame, frames_of(10)), Failing(K), tmp_path / "a.mp4", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"old"


@pytest.mark.parametrize("width,height", [(1920, 1080), (360, 640)])
def test_films_of_any_size(K, mesh, tmp_path, width, height):
    tracker = StandIn(np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1]]))
    frames = (Frame(np.zeros((height, width, 3), np.uint8)) for _ in range(8))
    film(frames, tracker, tmp_path / "a.mp4", mesh=mesh, progress=False)
    written = [frame.image for frame in Clip(tmp_path / "a.mp4")]
    assert len(written) == 8 and written[0].shape == (height, width, 3) and written[-1].max() > 200


def test_memory_of_a_film_does_not_grow(tmp_path):
    program = f"""
import resource, sys
sys.path.insert(0, {str(xu.ROOT)!r})
import numpy as np
from types import SimpleNamespace
import xwing_utils as xu
from xwing.film import film, write_clip
from xwing.footage import Frame
from xwing.tracker import TrackedPose
K = np.array([[200.0, 0, 128], [0, 200, 128], [0, 0, 1]])
tracker = SimpleNamespace(K=K, fps=30, target=xu.XWING)
tracker.update = lambda image, seconds: TrackedPose("lost", seconds)
def pictures(count):
    return (np.zeros((360, 640, 3), np.uint8) for _ in range(count))
for count in (20, 220):
    film(map(Frame, pictures(count)), tracker, {str(tmp_path / "a.mp4")!r}, progress=False)
    write_clip(pictures(count), {str(tmp_path / "a.gif")!r})
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    short, long = map(float, done.stdout.split())
    assert long - short < 40  # MB; 200 pictures would be 138, as indices of a palette 46


def test_no_warning_and_no_error_goes_unseen(K, mesh, tmp_path):
    frames = map(Frame, frames_of(5, 64))
    tracker = StandIn(K, HEAD_ON)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        film(frames, tracker, tmp_path / "a.mp4", mesh=mesh, progress=False)


# ------------------------------------------------------------ passes for compositing


def test_passes_over_the_frames_are_the_film(K, mesh, tmp_path):
    """What the passes hold and what `draw_shot` makes of the same frames differ by rounding."""
    poses = [pose_of((0, 90, 10 + i)) if i != 6 else None for i in range(8)]
    frames = [np.full((256, 256, 3), 30 * i, np.uint8) for i in range(8)]
    xfilm.write_passes(frames, poses, K, tmp_path / "passes", 20, Lasers(), mesh)
    names = [path.name for path in sorted((tmp_path / "passes" / "lasers").iterdir())]
    assert names == [f"00000{i}.png" for i in range(8)]
    assert {path.name for path in (tmp_path / "passes").iterdir()} == {"lasers", "holdout"}

    shot = Lasers().shot()
    lit = 0
    for i, (frame, pose) in enumerate(zip(frames, poses)):
        shown = draw_shot(frame, shot.step(pose, i / 20), Lasers(), mesh, pose, K)
        light = np.array(Image.open(tmp_path / "passes" / "lasers" / names[i]))
        composite = cv2.add(frame, np.ascontiguousarray(light[..., :3]))
        assert np.abs(composite.astype(int) - shown).max() <= 1
        np.testing.assert_array_equal(light[..., 3], light[..., :3].max(2))
        lit += (light[..., 3] > 100).sum()

        mask = np.array(Image.open(tmp_path / "passes" / "holdout" / names[i])) / 255
        if pose is None:
            assert not mask.any()
            continue
        ids, _ = xmesh.rasterise(mesh.triangles, pose, K, 256, 256)
        assert np.abs(mask - (ids >= 0)).mean() < 0.02
        assert mask[ids >= 0].mean() > 0.8 and ((0 < mask) & (mask < 1)).any()
    assert lit > 300


def test_a_mask_of_several_bands_is_that_of_one(K, mesh, monkeypatch):
    whole = xlasers.hull_mask(mesh, ACROSS, K, 256, 256)
    monkeypatch.setattr(xlasers, "MASK_ROWS", 60)
    np.testing.assert_array_equal(xlasers.hull_mask(mesh, ACROSS, K, 256, 256), whole)
    assert not xlasers.hull_mask(mesh, None, K, 20, 10).any()


def test_passes_replace_nothing_and_leave_nothing_half_written(K, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(xfilm, "draw_shot", lambda *_: 1 / None)
    with pytest.raises(TypeError):
        xfilm.write_passes(*clip, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "a" / "lasers").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="lasers: exists; remove it"):
        xfilm.write_passes(*clip, tmp_path / "a")
