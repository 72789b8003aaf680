"""Clips of any kind and size, the exported network, films, poses in files, and input that is bad."""

import csv
import json
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import cv2
import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation

import xwing_utils as xu

ROOT = Path(xu.__file__).parent
WEIGHTS = ROOT / "weights" / "xwing.weights.h5"


@pytest.fixture(scope="module")
def detector():
    return xu.Detector(WEIGHTS)


@pytest.fixture(scope="module")
def flight():
    """30 frames of the clip, from second 2 on, where the ship is well in sight."""
    return [xu.read_image(path) for path in xu.list_frames(ROOT / "data" / "frames")[60:90]]


@pytest.fixture(scope="module")
def flight_K():
    return xu.lens_camera(256, 256)


def folder_of(path, frames):
    path.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{i}.jpg", quality=95)
    return path


def film_of(path, frames, fps=30):
    writer = imageio_ffmpeg.write_frames(str(path), frames[0].shape[1::-1], fps=fps, macro_block_size=2, ffmpeg_log_level="error")
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    return path


# ------------------------------------------------------------ camera and letterbox


def test_the_usual_lens_is_that_of_the_data():
    np.testing.assert_allclose(xu.lens_camera(256, 256), xu.camera_matrix(xu.load_camera(ROOT / "data" / "frames")[1], 256, 256), atol=1e-3)
    K = xu.lens_camera(1080, 1920, focal=50)
    np.testing.assert_allclose(K, [[1920 * 50 / 36, 0, 540], [0, 1920 * 50 / 36, 960], [0, 0, 1]])


def test_a_lens_from_its_field_of_view():
    np.testing.assert_allclose(xu.lens_camera(256, 144, view=2 * np.degrees(np.arctan(18 / 35))), xu.lens_camera(256, 144, 35))
    np.testing.assert_allclose(xu.lens_camera(200, 100, view=90), [[100, 0, 100], [0, 100, 50], [0, 0, 1]])


@pytest.mark.parametrize("change", [{"width": 0}, {"focal": -1}, {"sensor": float("nan")}, {"view": 0}, {"view": 180}])
def test_a_lens_that_cannot_be(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}: expected"):
        xu.lens_camera(**{"width": 256, "height": 256, **change})


@pytest.mark.parametrize("width,height", [(256, 256), (640, 360), (360, 640), (3840, 2160), (100, 37), (1, 1)])
def test_a_letterbox_keeps_proportions_and_positions(width, height):
    image = np.zeros((height, width, 3), np.uint8)
    row, column = height * 2 // 3, width // 3
    image[max(row - height // 20, 0) : row + height // 20 + 1, max(column - width // 20, 0) : column + width // 20 + 1] = 255
    square, scale, offset = xu.letterbox(image, 256)
    assert square.shape == (256, 256, 3) and scale == 256 / max(width, height)
    rows, columns = np.nonzero(square[..., 0] > 127)
    found = np.array([columns.mean(), rows.mean()]) + 0.5
    np.testing.assert_allclose((found - offset) / scale, [column + 0.5, row + 0.5], atol=1.5 / scale)


@pytest.mark.parametrize("width,height", [(1280, 718), (640, 351), (852, 480), (480, 852), (1000, 10)])
def test_a_letterbox_has_one_scale(width, height):
    """A bright line along the last row or column of the frame is found where the scale and the offset say."""
    image = np.zeros((height, width, 3), np.uint8)
    across = 0 if width > height else 1
    image[np.s_[-8:, :] if across == 0 else np.s_[:, -8:]] = 255
    square, scale, offset = xu.letterbox(image, 256)
    profile = square[..., 0].mean(1 - across)
    centre = ((np.arange(256) + 0.5) * profile).sum() / profile.sum()
    assert (centre - offset[1 - across]) / scale == pytest.approx((height if across == 0 else width) - 4, abs=0.15)


# ------------------------------------------------------------ the exported network


def test_the_exported_network_finds_what_the_keras_model_finds(flight):
    model, detector = xu.load_model(WEIGHTS, 256), xu.Detector(WEIGHTS, windows=(), search=256)
    keypoints, confidence = xu.predict_keypoints(model, np.stack(flight[:8]), channels=xu.CHANNELS)
    for i, frame in enumerate(flight[:8]):
        found, sure, deviation = detector(frame)
        np.testing.assert_allclose(sure, confidence[i], atol=1e-3)
        good = confidence[i] >= xu.MIN_CONFIDENCE
        assert good.sum() > 8 and np.isfinite(deviation[good]).all()
        assert np.linalg.norm(found - keypoints[i], axis=1)[good].max() < 0.1  # pixels


def test_a_close_look_finds_what_the_whole_frame_shows(detector, flight):
    off = []
    for frame in flight[::5]:
        whole, sure, _ = detector(frame)
        good = (sure > 0.5) & (np.arange(len(sure)) >= 8)
        box = np.stack([whole[good].min(0) - 8, whole[good].max(0) + 8])
        close, again, _ = detector(frame, box)
        off.append(np.linalg.norm(close - whole, axis=1)[good & (again > 0.5)])
    assert np.median(np.concatenate(off)) < 0.5 and len(np.concatenate(off)) > 40


@pytest.fixture(scope="module")
def alone_and_together():
    return xu.Detector(WEIGHTS, windows=(128,)), xu.Detector(WEIGHTS, windows=(128,), batch=4)


@pytest.mark.parametrize("count,boxed", [(1, True), (3, True), (4, False), (7, True), (5, "one")])
def test_several_frames_at_once_show_what_each_shows_alone(alone_and_together, flight, count, boxed):
    detector, together = alone_and_together
    boxes = [np.array([[60.0, 60.0], [60.0 + 90, 60.0 + 100]]) + 3 * i if boxed is True or (boxed and i == 1) else None for i in range(count)]
    found = together.look(flight[:count], boxes)
    assert len(found) == count
    for i, (points, sure, deviation) in enumerate(found):
        single = detector(flight[i], boxes[i])
        np.testing.assert_allclose(sure, single[1], atol=1e-3)
        good = single[1] > xu.MIN_CONFIDENCE
        assert good.sum() > 8
        np.testing.assert_allclose(points[good], single[0][good], atol=0.02)
        np.testing.assert_allclose(deviation[good], single[2][good], rtol=0.05)


def test_a_ship_that_is_small_in_a_large_frame_shows_its_detail(detector):
    """Frames of 768 pixels, the ship three units away: shrunk as a whole it spans 30 pixels, cut out it spans 90."""
    import render

    ship, coarse, K = render.renderer(), xu.Detector(WEIGHTS, windows=(), search=256), xu.lens_camera(768, 768)
    errors = {"cut out": [], "shrunk": []}
    for i in range(8):
        rng = np.random.default_rng([20, i])
        matrix = np.eye(4)
        matrix[:3, :3] = Rotation.from_euler("xyz", [30 + 20 * i, 10 * i - 40, 35 * i], degrees=True).as_matrix()
        matrix[:3, 3] = [*rng.uniform(-0.8, 0.8, 2), -2.0]
        look = render.random_look(rng, ship.materials)
        image, truth = ship.frame(matrix, look, 768, 768), xu.pose_in_camera(np.array(render.CAMERA["model_view_matrix"], float), matrix)
        for name, looking in (("cut out", detector), ("shrunk", coarse)):
            keypoints, confidence, deviation = looking(image)
            found = xu.estimate_frame(keypoints, K, confidence, deviation).pose
            errors[name].append(180.0 if found is None else xu.rotation_error(found, truth))
    assert np.median(errors["cut out"]) < 5 and np.median(errors["cut out"]) < np.median(errors["shrunk"]) / 2


@pytest.mark.parametrize("windows", [(), (96,), (96, 128)])
@pytest.mark.parametrize("width,height", [(256, 256), (1024, 512), (120, 250), (60, 40)])
def test_a_close_look_holds_the_ship_and_shows_more_than_the_search(windows, width, height, monkeypatch):
    """Boxes of all sizes, also far beyond the frame: squares never outgrow the frame, hold what is in sight of the box, and show it larger."""
    detector, seen = xu.Detector(WEIGHTS, windows=windows, search=64), []
    nothing = [(np.full((36, 2), np.nan), np.zeros(36), np.full(36, np.inf))]
    monkeypatch.setattr(detector, "_see", lambda images, squares, size: seen.append((squares[0], size)) or nothing)
    close = 0
    for left, top, extent in ((10, 20, 30), (80, 60, 87), (0, 100, 90), (20, 0, 230), (-40, -30, 100), (-1e6, -1e6, 3e6), (2000, 0, 50), (5, 5, 0)):
        seen.clear()
        box = [[left, top], [left + extent, top + extent / 2]]  # a list will do
        detector(np.zeros((height, width, 3), np.uint8), box)
        ((x, y, side), size), *more = seen
        assert not more  # nothing was found, so that nothing else is looked at
        whole, inside = max(width, height), np.clip(box, 0, [width, height])
        if size == 64 and side == whole:
            assert not windows or extent == 0 or left == 2000 or top >= height or 1.1 * np.ptp(inside, axis=0).max() >= windows[-1] * whole / 64
            continue
        close += 1
        assert size in windows and size / side > 64 / whole and side <= max(whole, 1.1 * extent + 1)
        assert x <= inside[0, 0] and y <= inside[0, 1] and x + side >= inside[1, 0] and y + side >= inside[1, 1]
        assert side > min(width, height) or (x >= 0 and y >= 0 and x + side <= width and y + side <= height)
        assert size / side <= max(256 / whole, 1) + 0.02
    assert close >= 2 if windows else close == 0


def test_a_close_look_that_cuts_the_ship_off_does_not_count(flight, monkeypatch):
    """The search finds 10 points; a close look that finds 7 of them is thrown away, one that finds 8 is taken."""
    detector = xu.Detector(WEIGHTS)

    def found(count, size):
        return np.full((36, 2), 100.0) + np.arange(36)[:, None], np.where(np.arange(36) < count, 0.9, 0.0), np.full(36, float(size))

    for count in (3, 7, 8, 20):
        monkeypatch.setattr(detector, "_see", lambda images, squares, size, n=count: [found(10 if size == 192 else n, size)])
        assert detector(flight[0])[2][0] == (192 if count < 8 else 96)
    monkeypatch.setattr(detector, "_see", lambda images, squares, size: [found(0, size)])
    assert detector(flight[0], [[90, 90], [150, 150]])[2][0] == 96  # asked for at once, there is nothing else


@pytest.mark.parametrize("side", [96, 128, 192])
def test_squares_of_every_size_show_what_the_keras_model_sees(detector, flight, side):
    """The shapes that are used, in float32: keypoints within a tenth of a pixel."""
    model, stride = xu.load_model(WEIGHTS, side), 2
    squares = np.stack([xu.crop(frame, (128 - side // 2, 128 - side // 2), side) for frame in flight[::8]])
    keras, sure = xu.predict_keypoints(model, squares, channels=36)
    for square, keypoints, confidence in zip(squares, keras, sure):
        exported = xu.decode_heatmaps(detector.heatmaps(square[None])[0], detector.settings["sigma"] / stride)[0] * stride
        good = confidence >= xu.MIN_CONFIDENCE
        assert good.sum() > 8 and np.linalg.norm(exported - keypoints, axis=1)[good].max() < 0.1


def test_a_batch_of_no_frames():
    with pytest.raises(ValueError, match="batch: expected at least 1 frame, got 0"):
        xu.Detector(WEIGHTS, batch=0)


@pytest.mark.parametrize("shape,scale", [((1024, 1024), 4), ((2160, 3840), 15), ((640, 360), 360 / 256)], ids=["large", "4K", "portrait"])
def test_frames_of_any_size_give_the_same_pose(detector, flight, flight_K, shape, scale):
    """The frame is enlarged and set into a wider or taller one; with K from the true size the pose is what it was."""
    height, width = shape
    square = min(shape) if scale != 15 else 3840
    truth = xu.solve_frame(*[part for part in (detector(flight[0])[0], flight_K, *detector(flight[0])[1:])])
    large = np.asarray(Image.fromarray(flight[0]).resize((square, square), Image.BICUBIC))
    image = np.zeros((height, width, 3), np.uint8)
    top, left = (height - square) // 2, (width - square) // 2
    image[max(top, 0) : max(top, 0) + min(square, height), left : left + square] = large[max(-top, 0) : max(-top, 0) + height]
    K = flight_K * [[square / 256]] * 1.0
    K = np.array([[K[0, 0], 0, width / 2], [0, K[0, 0], height / 2], [0, 0, 1]])
    keypoints, confidence, deviation = detector(image)
    pose = xu.solve_frame(keypoints, K, confidence, deviation)
    assert truth is not None and pose is not None
    limit = 5
    assert xu.rotation_error(pose, truth) < limit and xu.translation_error(pose, truth) < 0.1


# ------------------------------------------------------------ clips


@pytest.mark.parametrize("kind", ["folder", "pictures", "mp4", "gif"])
def test_every_kind_of_clip(flight, tmp_path, kind):
    frames = flight[:10]
    if kind == "folder":
        source = folder_of(tmp_path / "frames", frames)
    elif kind == "pictures":
        source = tmp_path / "frames"
        source.mkdir()
        for i, frame in enumerate(frames):
            Image.fromarray(frame).save(source / f"shot_{i + 95:d}.png")
        (source / "notes 1.txt").write_text("not a frame")
    elif kind == "mp4":
        source = film_of(tmp_path / "a.mp4", frames, 24)
    else:
        source = tmp_path / "a.gif"
        imageio.mimsave(source, frames, duration=50, loop=0)
    clip = xu.Clip(source)
    read = list(clip)
    assert len(read) == clip.count == 10 and (clip.width, clip.height) == (256, 256)
    assert clip.fps == {"folder": None, "pictures": None, "mp4": 24, "gif": 20}[kind]
    assert all(fault == "" and np.abs(frame.astype(int) - true).mean() < 8 for (frame, fault), true in zip(read, frames))
    assert len(list(clip)) == 10  # can be read again
    assert len(list(xu.Clip(source, step=3))) == xu.Clip(source, step=3).count == 4


def test_a_clip_of_one_frame(flight, tmp_path):
    assert len(list(xu.Clip(film_of(tmp_path / "a.mp4", flight[:1])))) == 1
    assert len(list(xu.Clip(folder_of(tmp_path / "one", flight[:1])))) == 1


def test_a_broken_frame_and_a_change_of_size_are_named_and_passed_over(flight, tmp_path):
    folder = folder_of(tmp_path, flight[:6])
    (folder / "2.jpg").write_bytes(b"broken")
    for i in (4, 5):
        Image.fromarray(flight[i][:128]).save(folder / f"{i}.jpg")
    read = list(xu.Clip(folder))
    assert [frame is None for frame, _ in read] == [False, False, True, False, True, True]
    assert "2.jpg" in read[2][1] and "expected 256x256" in read[4][1] and "256x128" in read[5][1]


@pytest.mark.parametrize("name,content,error", [
    ("nothing", None, FileNotFoundError), ("a.mp4", b"", ValueError), ("a.mp4", b"no video at all" * 100, ValueError),
    ("a.gif", b"GIF89a", ValueError), ("a.txt", b"hello", ValueError)])
def test_what_is_no_clip(tmp_path, name, content, error):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=f"{name}: .*expected a folder|{name}: no such"):
        xu.Clip(tmp_path / name)


def test_a_folder_without_frames(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no number in its name")
    with pytest.raises(ValueError, match="holds no frame that can be read; expected a folder of frames"):
        xu.Clip(tmp_path)


def test_a_video_that_breaks_off_is_read_as_far_as_it_goes_and_says_so(flight, tmp_path):
    whole = film_of(tmp_path / "whole.mkv", flight * 4)
    (tmp_path / "cut.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    *good, (last, fault) = xu.Clip(tmp_path / "cut.mkv")
    assert 5 < len(good) < 115 and all(frame is not None for frame, _ in good)
    assert last is None and "cut.mkv: breaks off after" in fault


@pytest.mark.parametrize("size", [4, 40, 400])
def test_a_video_with_damage_in_the_middle_never_stops_without_a_word(flight, tmp_path, size):
    data = bytearray(film_of(tmp_path / "whole.mkv", flight * 2).read_bytes())
    middle = len(data) // 2
    data[middle : middle + size] = np.random.default_rng(0).integers(0, 255, size, np.uint8).tobytes()
    (tmp_path / "hurt.mkv").write_bytes(data)
    read = list(xu.Clip(tmp_path / "hurt.mkv"))
    good = [frame for frame, _ in read if frame is not None]
    assert len(good) > 20 and (len(good) >= 56 or "breaks off" in read[-1][1])


def test_a_video_that_changes_its_size_says_so_for_each_frame(flight, flight_K, detector, tmp_path):
    """Two transport streams one after the other: ffmpeg scales the second to the size of the first, which would be another camera."""
    film_of(tmp_path / "a.ts", flight[:9])
    film_of(tmp_path / "b.ts", [frame[:128] for frame in flight[9:14]])
    (tmp_path / "c.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    clip = xu.Clip(tmp_path / "c.ts")
    assert [frame is not None for frame, _ in clip] == [True] * 9 + [False] * 5
    assert {fault for _, fault in clip} == {"", "expected 256x256 pixels like the first frame, got 256x128"}
    track = xu.film(clip, detector, xu.Tracker(flight_K), tmp_path / "film.mp4", progress=False)
    assert [t.status for t in track[-5:]] == ["predicted"] * 5 and sum(t.status == "tracked" for t in track[:9]) >= 7
    assert xu.Clip(tmp_path / "a.ts")._steady


def test_a_distorted_clip_is_straightened(flight, tmp_path):
    """A grid seen through a barrel lens comes out straight."""
    K, coefficients = xu.lens_camera(256, 256), [-0.3, 0.1, 0, 0]
    rows, columns = np.mgrid[:256, :256] + 0.5
    rays = cv2.undistortPoints(np.stack([columns, rows], -1).reshape(-1, 1, 2).astype(np.float64), K, np.array(coefficients)).reshape(256, 256, 2)
    seen = (127 + 120 * np.sin(40 * rays)).astype(np.uint8)
    clip = xu.Clip(folder_of(tmp_path, [np.dstack([seen, seen[..., :1]])]))
    clip.undistort(K, coefficients)
    (straight, _), = clip
    expected = 127 + 120 * np.sin(40 * ((np.stack([columns, rows], -1) - 128) / K[0, 0]))
    inner = np.s_[40:216, 40:216]
    assert np.abs(straight[..., :2].astype(float) - expected)[inner].mean() < 8 < np.abs(seen.astype(float) - expected)[inner].mean()
    with pytest.raises(ValueError, match="coefficients: expected OpenCV's"):
        clip.undistort(K, [0.1])


def ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *arguments], check=True)


def test_a_video_of_varying_rate_gives_every_picture_once(tmp_path):
    picture = "testsrc=duration=2:rate=30:size=64x64"
    ffmpeg("-f", "lavfi", "-i", picture, "-vf", "select='lt(n,20)+not(mod(n,2))'", "-fps_mode", "vfr", str(tmp_path / "a.mp4"))
    clip = xu.Clip(tmp_path / "a.mp4")
    read = [frame for frame, fault in clip if not fault]
    assert len(read) == clip.count == 40 and clip.fps == pytest.approx(40 / 2, rel=0.15)
    assert all(np.abs(a.astype(int) - b).max() > 0 for a, b in zip(read, read[1:]))


def test_a_video_with_a_longer_sound_is_whole(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "testsrc=duration=1:rate=30:size=64x64", "-f", "lavfi", "-i", "sine=duration=3", str(tmp_path / "a.mp4"))
    clip = xu.Clip(tmp_path / "a.mp4")
    assert clip.count == 30 and [fault for _, fault in clip] == [""] * 30


@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_what_ended_a_clip_is_said_whatever_the_step(flight, tmp_path, step):
    whole = film_of(tmp_path / "whole.mkv", flight * 4)
    (tmp_path / "cut.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    *good, (last, fault) = xu.Clip(tmp_path / "cut.mkv", step)
    assert last is None and "breaks off" in fault and all(f == "" for _, f in good)


def test_a_gif_s_rate_is_that_of_all_its_frames(flight, tmp_path):
    pictures = [Image.fromarray(frame) for frame in flight[:10]]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=[500] + [50] * 9)
    for step in (1, 2):
        clip = xu.Clip(tmp_path / "a.gif", step)
        assert clip.fps == pytest.approx(10 / 0.95 / step) and clip.count == 10 // step
        assert len(list(clip)) == clip.count == 10 // step  # reading it changes nothing


def test_a_gif_that_breaks_off_is_read_as_far_as_it_goes_and_says_so(flight, tmp_path):
    imageio.mimsave(tmp_path / "whole.gif", flight[:6], duration=50)
    whole = (tmp_path / "whole.gif").read_bytes()
    for cut in np.linspace(len(whole) // 3, len(whole) - 1, 25).astype(int):
        (tmp_path / "cut.gif").write_bytes(whole[:cut])
        *good, (last, fault) = xu.Clip(tmp_path / "cut.gif")
        assert good and last is None and "cut.gif" in fault


# ------------------------------------------------------------ tracking footage


def statuses(frames, detector, K):
    return [tracked for _, tracked, _ in xu.follow(((frame, "") for frame in frames), detector, xu.Tracker(K), progress=False)]


def blank(kind):
    rng = np.random.default_rng(0)
    return {"black": lambda: np.zeros((256, 256, 3), np.uint8), "white": lambda: np.full((256, 256, 3), 255, np.uint8),
            "noise": lambda: rng.integers(0, 256, (256, 256, 3), dtype=np.uint8),
            "stars": lambda: np.where(rng.random((256, 256, 1)) > 0.998, 255, 5).astype(np.uint8).repeat(3, 2)}[kind]


@pytest.mark.parametrize("kind", ["black", "white", "noise", "stars"])
def test_frames_without_a_ship_have_no_pose(detector, flight_K, kind):
    make = blank(kind)
    track = statuses([make() for _ in range(8)], detector, flight_K)
    assert [t.status for t in track] == ["lost"] * 8 and all(t.pose is None and t.reason for t in track)


def test_a_ship_is_followed_and_let_go(detector, flight, flight_K):
    make = blank("black")
    track = statuses([*flight, *[make() for _ in range(25)]], detector, flight_K)
    assert sum(t.status == "tracked" for t in track[:30]) >= 25
    assert {t.status for t in track[45:]} == {"lost"} and track[31].status == "predicted"


def test_a_ship_is_followed_in_groups_of_frames(flight, flight_K):
    """30 frames, one of them broken, in groups of 4: as many poses as frame by frame, and the right ones."""
    frames = [(frame, "") for frame in flight]
    frames[9] = None, "9.jpg: broken"
    alone, together = ([(t, f[0]) for _, t, f in xu.follow(frames, xu.Detector(WEIGHTS, batch=batch), xu.Tracker(flight_K), progress=False)]
                       for batch in (1, 4))
    assert len(together) == 30 and together[9][0].reason == "9.jpg: broken" and np.isnan(together[9][1]).all()
    assert abs(sum(t.status == "tracked" for t, _ in together) - sum(t.status == "tracked" for t, _ in alone)) <= 2
    angles = [xu.rotation_error(a.pose, b.pose) for (a, _), (b, _) in zip(alone, together) if a.pose is not None and b.pose is not None]
    assert len(angles) >= 25 and np.median(angles) < 1


@pytest.mark.parametrize("lead,batch", [(1, 1), (2, 1), (1, 4), (3, 4)])
def test_the_network_may_run_ahead_of_the_tracking(flight, flight_K, lead, batch):
    """Every frame comes out once and in order, boxes come from the last group that was tracked, and the network runs in a thread of its own."""
    boxes, threads = [], set()

    class Watched:
        def __init__(self):
            self.batch = batch

        def look(self, images, near):
            boxes.extend(near)
            threads.add(threading.get_ident())
            return [seen[int(image[0, 0, 0])] for image in images]

    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = Rotation.from_euler("xyz", [60, 20, 10], degrees=True).as_matrix(), [0, 0, 1.0]
    seen = []
    for i in range(30):
        pose[0, 3] = -0.1 + 0.01 * i
        toward = ((xu.NORMALS @ pose[:3, :3].T) * (xu.KEYPOINTS @ pose[:3, :3].T + pose[:3, 3])).sum(1) <= 0
        seen.append((xu.project_pose(xu.KEYPOINTS, pose, flight_K), toward * 0.9, np.full(36, 1.0)))
    frames = [(np.full((8, 8, 3), i, np.uint8), "") for i in range(30)]
    out = list(xu.follow(frames, Watched(), xu.Tracker(flight_K), progress=False, lead=lead))
    assert [int(frame[0, 0, 0]) for frame, _, _ in out] == list(range(30))
    assert all(tracked.status == "tracked" for _, tracked, _ in out) and all(found is seen[i] for i, (_, _, found) in enumerate(out))
    blind = batch * (lead + 1)
    assert all(box is None for box in boxes[:blind]) and all(box is not None for box in boxes[blind:]) and len(boxes) == 30
    for box, (keypoints, _, _) in list(zip(boxes, seen))[max(blind, 15) :]:  # the velocity is known by then
        np.testing.assert_allclose(box, [keypoints[:8].min(0), keypoints[:8].max(0)], atol=1.5)
    assert len(threads) == 1 and threading.get_ident() not in threads


@pytest.mark.parametrize("lead,batch", [(0, 1), (1, 1), (0, 4), (1, 4), (3, 4)])
def test_what_was_read_before_an_error_is_tracked(flight, flight_K, tmp_path, lead, batch):
    def failing(count):
        yield from ((frame, "") for frame in flight[:count])
        raise OSError("the tape is torn")

    def look(images, boxes):
        return [(np.full((36, 2), np.nan), np.zeros(36), np.full(36, np.inf)) for _ in images]

    detector, out = type("Detector", (), {"batch": batch, "look": staticmethod(look)})(), []
    with pytest.raises(OSError, match="the tape is torn"):
        out.extend(frame for frame, _, _ in xu.follow(failing(10), detector, xu.Tracker(flight_K), progress=False, lead=lead))
    track = xu.film(failing(10), detector, xu.Tracker(flight_K), tmp_path / "a.mp4", progress=False, lead=lead)
    assert len(track) == 11 and "the tape is torn" in track[-1].reason
    with imageio.get_reader(tmp_path / "a.mp4") as video:
        assert video.count_frames() == 11
    frames, taken = ((frame, "") for frame in [*flight, None]), []
    for frame, _, _ in xu.follow(frames, detector, xu.Tracker(flight_K), progress=False, lead=lead):
        taken.append(frame)
    assert len(taken) == 31 and taken[-1] is None


def test_two_ships_never_crash_and_every_frame_has_a_status(detector, flight, flight_K):
    double = [np.maximum(frame, frame[:, ::-1]) for frame in flight[:12]]
    track = statuses(double, detector, flight_K)
    assert len(track) == 12 and all(t.status in ("tracked", "predicted", "lost") for t in track)
    assert all(t.reason for t in track if t.status != "tracked")


def test_a_film_is_made_in_one_pass_and_broken_frames_do_not_stop_it(detector, flight, flight_K, tmp_path):
    folder = folder_of(tmp_path / "frames", flight[:12])
    (folder / "5.jpg").write_bytes(b"broken")
    mesh = xu.load_mesh(ROOT / "data" / "xwing.obj")
    track = xu.film(xu.Clip(folder), detector, xu.Tracker(flight_K), tmp_path / "a.mp4", mesh=mesh, progress=False)
    assert len(track) == 12 and track[5].status == "predicted" and "5.jpg" in track[5].reason
    with imageio.get_reader(tmp_path / "a.mp4") as video:
        assert video.count_frames() == 12 and video.get_data(0).shape == (256, 256, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "frames"]


@pytest.mark.parametrize("width,height,count", [(3840, 2160, 5), (360, 640, 8), (256, 256, 1)], ids=["4K", "portrait", "one frame"])
def test_clips_of_any_size_and_length_go_through_the_whole_chain(detector, flight, tmp_path, width, height, count):
    """Read, tracked, filmed and exported; the ship spans a third of the frame's shorter side."""
    side, frames = min(width, height), []
    for frame in flight[:count]:
        image = np.zeros((height, width, 3), np.uint8)
        top, left = (height - side) // 2, (width - side) // 2
        image[top : top + side, left : left + side] = cv2.resize(frame, (side, side), interpolation=cv2.INTER_CUBIC)
        frames.append(image)
    clip = xu.Clip(folder_of(tmp_path / "frames", frames))
    K = xu.lens_camera(width, height, 35.0 * side / max(width, height))  # as the square in the middle was taken
    track = xu.film(clip, detector, xu.Tracker(K), tmp_path / "a.mp4", mesh=xu.load_mesh(ROOT / "data" / "xwing.obj"), progress=False)
    xu.export_track(tmp_path / "a.csv", track, K, 30, width, height)
    assert [t.status for t in track] == ["tracked"] * count
    with imageio.get_reader(tmp_path / "a.mp4") as video:
        assert video.count_frames() == count and video.get_data(0).shape == (height, width, 3)
    assert len((tmp_path / "a.csv").read_text().splitlines()) == count + 1


def test_a_film_begins_with_the_first_frame_that_can_be_read(detector, flight, flight_K, tmp_path):
    clip = [(None, "broken"), (None, "broken"), *((frame, "") for frame in flight[:4])]
    track = xu.film(clip, detector, xu.Tracker(flight_K), tmp_path / "a.mp4", progress=False)
    with imageio.get_reader(tmp_path / "a.mp4") as video:
        assert video.count_frames() == len(track) == 6


def test_a_film_of_nothing_says_that_it_was_not_written(flight_K, tmp_path):
    with pytest.warns(UserWarning, match="a.mp4: not written"):
        xu.film([(None, "broken")] * 3, lambda *_: None, xu.Tracker(flight_K), tmp_path / "a.mp4", progress=False)
    with pytest.raises(FileNotFoundError, match="no such folder to write a.mp4"):
        xu.film([(None, "broken")] * 3, lambda *_: None, xu.Tracker(flight_K), tmp_path / "none" / "a.mp4", progress=False)


def test_a_film_that_is_not_written_whole_is_an_error_and_keeps_the_old_one(flight, tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"the old one")
    monkeypatch.setattr(imageio_ffmpeg, "count_frames_and_secs", lambda path: (3, 0.1))  # the disk was full
    with pytest.raises(xu.FilmError, match="only 3 of 5 frames could be written"):
        xu.animate(flight[:5], [None] * 5, xu.lens_camera(256, 256), tmp_path / "a.mp4", fps=30)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == b"the old one"


def test_a_disk_that_is_full_loses_no_poses(tmp_path):
    """The file may grow to 20 kB, then writing fails."""
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, xwing_utils as xu
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
found = np.full((36, 2), np.nan), np.zeros(36), np.full(36, np.inf)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
rng = np.random.default_rng(0)
frames = [(rng.integers(0, 255, (256, 256, 3), dtype=np.uint8), "") for _ in range(60)]
track = xu.film(frames, lambda *_: found, xu.Tracker(xu.lens_camera(256, 256)), {str(tmp_path / "a.mp4")!r}, progress=False)
print(len(track))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "60", done.stderr[-2000:]
    assert "a.mp4: not written: " in done.stderr and not list(tmp_path.iterdir())


def test_an_interrupted_film_leaves_no_thread(flight, flight_K, tmp_path):
    class Interrupted(xu.Lasers):
        def step(self, pose):
            raise KeyboardInterrupt

    nothing, before = (np.full((36, 2), np.nan), np.zeros(36), np.full(36, np.inf)), threading.active_count()
    with pytest.raises(KeyboardInterrupt) as held:
        frames = [(frame, "") for frame in flight] * 3
        xu.film(frames, lambda *_: nothing, xu.Tracker(flight_K), tmp_path / "a.mp4", lasers=Interrupted(), progress=False)
    assert held.value is not None and threading.active_count() == before and not list(tmp_path.iterdir())


def test_a_failure_of_the_network_leaves_no_film_and_no_thread(flight, flight_K, tmp_path):
    def failing(frame, box):
        raise RuntimeError("the network failed")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="the network failed"):
        xu.film(((frame, "") for frame in flight), failing, xu.Tracker(flight_K), tmp_path / "a.mp4", progress=False)
    assert not list(tmp_path.iterdir()) and threading.active_count() == before
    with pytest.raises(ValueError, match="expected an .mp4"):
        xu.film([], failing, xu.Tracker(flight_K), tmp_path / "a.gif")


def test_reading_ahead_stays_a_few_items_ahead_and_can_be_left():
    taken = []

    def items():
        for i in range(1000):
            taken.append(i)
            yield i

    ahead = xu._ahead(items(), 4)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    ahead.close()
    assert len(taken) < 12


def test_memory_of_a_film_does_not_grow(tmp_path):
    program = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, xwing_utils as xu
K, found = xu.lens_camera(256, 256), (np.full((36, 2), np.nan), np.zeros(36), np.full(36, np.inf))
for count in (100, 1500):
    frames = ((np.zeros((256, 256, 3), np.uint8), "") for _ in range(count))
    xu.film(frames, lambda *_: found, xu.Tracker(K), {str(tmp_path / "a.mp4")!r}, progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    short, long = map(float, printed.split())
    assert long - short < 40  # MB; 1,400 frames would be 275


# ------------------------------------------------------------ poses in files


@pytest.fixture
def track():
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = Rotation.from_rotvec([0.3, -1.2, 2.0]).as_matrix(), [0.1, -0.2, 1.3]
    predicted = xu.TrackedPose("predicted", pose, reason="a, b")
    return [xu.TrackedPose("tracked", pose, reprojection=0.7), predicted, xu.TrackedPose("lost", reason="no ship")]


def test_poses_come_back_from_csv(track, tmp_path):
    xu.export_track(tmp_path / "a.csv", track, xu.lens_camera(256, 256), 30, 256, 256)
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["status"] for row in rows] == ["tracked", "predicted", "lost"] and rows[1]["reason"] == "a, b"
    assert float(rows[1]["seconds"]) == pytest.approx(1 / 30, abs=1e-6) and float(rows[0]["reprojection"]) == 0.7 and rows[1]["reprojection"] == ""
    np.testing.assert_allclose([[float(rows[0][f"m{r}{c}"]) for c in range(4)] for r in range(4)], track[0].pose)
    w, x, y, z = (float(rows[0][f"q{a}"]) for a in "wxyz")
    np.testing.assert_allclose(Rotation.from_quat([x, y, z, w]).as_matrix(), track[0].pose[:3, :3], atol=1e-12)
    assert [float(rows[0][f"t{a}"]) for a in "xyz"] == track[0].pose[:3, 3].tolist()
    assert all(rows[2][key] == "" for key in ("tx", "qw", "m00", "m33"))


def test_poses_come_back_from_json(track, tmp_path):
    K = xu.lens_camera(640, 360)
    xu.export_track(tmp_path / "a.json", track, K, 25, 640, 360)
    info = json.loads((tmp_path / "a.json").read_text())
    assert info["schema"] == 1 and info["camera"] == {"K": K.tolist(), "width": 640, "height": 360, "fps": 25}
    np.testing.assert_array_equal(info["frames"][1]["matrix"], track[1].pose)
    assert info["frames"][2]["matrix"] is None and info["frames"][2]["reason"] == "no ship"


def test_numbers_of_numpy_are_written_too(track, tmp_path):
    xu.export_track(tmp_path / "a.json", track, xu.lens_camera(256, 256), np.float32(30), np.int64(256), np.int64(256))
    assert json.loads((tmp_path / "a.json").read_text())["camera"]["fps"] == 30


def test_a_file_of_another_kind_is_refused(track, tmp_path):
    with pytest.raises(ValueError, match="expected a .csv or .json"):
        xu.export_track(tmp_path / "a.txt", track, np.eye(3), 30, 1, 1)


def test_the_summary_counts(track):
    assert xu.summary(track) == "3 frames: 1 tracked, 1 predicted, 1 lost; mean reprojection error 0.70 px"
    assert xu.summary(track[2:]) == "1 frames: 0 tracked, 0 predicted, 1 lost"


# ------------------------------------------------------------ fuzz: one clear error, never another

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KEYS = st.sampled_from(["model_view_matrix", "projection_matrix", "x"])
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                      lambda v: st.lists(v, max_size=4) | st.dictionaries(KEYS, v, max_size=3), max_leaves=20)
NUMBERS = st.floats() | st.integers() | st.sampled_from([0, 1, -1, 10**400])
MATRICES = st.lists(st.lists(NUMBERS, min_size=4, max_size=4), min_size=4, max_size=4) | VALUES


def only_clear_errors(read, path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return read(path)
    except (ValueError, FileNotFoundError) as error:
        assert path.name in str(error) and len(str(error)) < 1000
        return None


@FUZZ
@given(st.dictionaries(st.sampled_from(["model_view_matrix", "projection_matrix"]), MATRICES) | VALUES)
def test_fuzzed_camera_files(tmp_path, content):
    path = tmp_path / "camera_info.json"
    path.write_text(json.dumps(content))
    only_clear_errors(xu.load_camera, path)


@FUZZ
@given(MATRICES)
def test_fuzzed_matrices(tmp_path, content):
    for name in ("0.jpg", "0_mat.json"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "0_mat.json").write_text(json.dumps(content))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, matrices = xu.load_dataset(tmp_path)
            assert np.isfinite(matrices).all()
    except ValueError as error:
        assert "0_mat.json" in str(error) and len(str(error)) < 1000


@FUZZ
@given(st.binary(max_size=300) | st.just(b"[" * 100_000), st.booleans())
def test_fuzzed_bytes(tmp_path, content, as_picture):
    path = tmp_path / ("0.jpg" if as_picture else "camera_info.json")
    path.write_bytes(content)
    only_clear_errors(xu.read_image if as_picture else xu.load_camera, path)


@FUZZ
@given(st.data())
def test_fuzzed_pictures(tmp_path, data):
    """A real JPEG with bytes changed, cut out or cut off."""
    whole = bytearray((ROOT / "data" / "frames" / "060.jpg").read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "0.jpg"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    image = only_clear_errors(xu.read_image, path)
    assert image is None or (image.ndim == 3 and image.dtype == np.uint8)
