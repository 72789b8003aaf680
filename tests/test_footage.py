"""Clips of any kind, whole and damaged, and the network on their frames."""

import contextlib
import dataclasses
import http.server
import os
import shutil
import threading
import warnings
import zlib
from fractions import Fraction

import av
import cv2
import imageio.v3 as iio
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import xwing_utils as xu
from xwing.footage import Clip, Clock, Detector, Frame, frames_at, letterbox, run_folder
from xwing.lens import picture_area
from xwing.sighting import Sighting


@pytest.fixture(scope="module")
def weights(root):
    return root / "weights" / "xwing.weights.h5"


@pytest.fixture(scope="module")
def detector(weights):
    return Detector(weights)


@pytest.fixture(scope="module")
def flight(root):
    """60 frames of the clip, from second 2 on, where the ship is well in sight."""
    return [xu.read_image(path) for path in xu.list_frames(root / "data" / "frames")[60:120]]


def sighting(keypoints, confidence, sigma):
    """A `Sighting` without maps."""
    return Sighting(keypoints, confidence, sigma, None, np.zeros(2), 1.0)


def folder_of(path, frames, name="{}.jpg"):
    """Write frames as the pictures of a folder; return its path."""
    path.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(path / name.format(i), quality=95)
    return path


def video_of(path, frames, fps=30, seconds=None, sound=0.0, rotation=None, aspect=None, **options):
    """Write frames as a video; return its path.

    Args:
        path: its suffix says which kind of file.
        frames: (H, W, 3) uint8.
        fps: frames a second.
        seconds: when each frame is shown; None for a steady rate.
        sound: seconds of silence to add as a sound track.
        rotation: degrees by which a player shall turn the picture.
        aspect: width of a pixel over its height.
        options: muxer, coder: dicts for FFmpeg.
    """
    kind = {"mp4": "mp4", "mkv": "matroska", "ts": "mpegts", "avi": "avi"}[path.suffix[1:]]
    muxer = options.get("muxer", {})
    with (
        path.open("w+b") as file,
        av.open(file, "w", format=kind, container_options=muxer) as container,
    ):
        coder = {"crf": "12", "preset": "veryfast", **options.get("coder", {})}
        stream = container.add_stream("libx264", fps, coder)
        stream.height, stream.width = frames[0].shape[:2]
        tick = Fraction(1, 90_000) if seconds else 1 / Fraction(fps)
        stream.codec_context.time_base = tick
        if rotation:
            stream.set_display_rotation(rotation)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        silence = container.add_stream("aac", 48_000) if sound else None
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image))
            frame.time_base, frame.pts = tick, round(seconds[i] / tick) if seconds else i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for i in range(round(sound * 48_000 / 1024)):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 48_000, 1024 * i
            container.mux(silence.encode(frame))
        if sound:
            container.mux(silence.encode())
    return path


@pytest.fixture(scope="module")
def whole_video(flight, tmp_path_factory):
    """A function: kind, options of `video_of` -> a video of the flight, encoded once."""
    folder = tmp_path_factory.mktemp("whole")

    def video(kind, **options):
        path = folder / f"{zlib.crc32(repr(options).encode())}.{kind}"
        return path if path.exists() else video_of(path, flight, **options)

    return video


def same(image, truth, limit=4):
    """Whether an image is there and its pixels differ by less than a limit of 255, on average."""
    return image is not None and np.abs(image.astype(int) - truth).mean() < limit


def garbage(path, source, start, size, seed=0):
    """Copy a file, with `size` random bytes that begin at the fraction `start` of its length."""
    data = bytearray(source.read_bytes())
    at = int(len(data) * start)
    data[at : at + size] = np.random.default_rng(seed).integers(0, 255, size, np.uint8).tobytes()
    path.write_bytes(data)
    return path


def cut(path, source, fraction):
    """Copy the first bytes of a file, a fraction of them; return the copy's path."""
    path.write_bytes(source.read_bytes()[: int(source.stat().st_size * fraction)])
    return path


def faults(frames):
    """Numbers of the frames that cannot be read."""
    return [i for i, frame in enumerate(frames) if frame.image is None]


# ------------------------------------------------------------ folders


@pytest.mark.parametrize("kind", ["folder", "pictures", "mp4", "mkv", "avi", "gif"])
def test_every_kind_of_clip(flight, tmp_path, kind):
    frames = flight[:10]
    rate = {"mp4": 24, "mkv": 30, "avi": 30, "gif": 20}.get(kind)
    if kind in ("folder", "pictures"):
        name = "{}.jpg" if kind == "folder" else "shot_{:03}.png"
        source = folder_of(tmp_path / "frames", frames, name)
        (source / "notes 1.txt").write_text("not a frame")
    elif kind == "gif":
        source = tmp_path / "a.gif"
        iio.imwrite(source, frames, duration=50, loop=0)
    else:
        source = video_of(tmp_path / f"a.{kind}", frames, rate)
    clip = Clip(source)
    assert (clip.width, clip.height, clip.fps, clip.count) == (256, 256, rate, 10)
    for _ in range(2):
        read = list(clip)
        assert len(read) == 10 and all(frame.fault == "" for frame in read)
        assert all(same(frame.image, truth, 8) for frame, truth in zip(read, frames))
    seconds = [frame.seconds for frame in read]
    assert seconds == clip.seconds
    if rate:
        np.testing.assert_allclose(seconds, np.arange(10) / rate, atol=1e-3)
    else:
        assert seconds == [None] * 10
    thirds = Clip(source, step=3)
    assert [f.seconds for f in thirds] == seconds[::3] and thirds.count == 4
    assert thirds.fps == (rate and pytest.approx(rate / 3, rel=1e-5))


def test_a_clip_of_one_frame(flight, tmp_path):
    clip = Clip(video_of(tmp_path / "a.mp4", flight[:1], 25))
    assert [frame.seconds for frame in clip] == [0] and (clip.count, clip.fps) == (1, 25)
    assert [frame.seconds for frame in Clip(folder_of(tmp_path / "one", flight[:1]))] == [None]


def test_a_broken_frame_and_a_change_of_size_are_faults(flight, tmp_path):
    folder = folder_of(tmp_path, flight[:6])
    (folder / "2.jpg").write_bytes(b"broken")
    for i in (4, 5):
        Image.fromarray(flight[i][:128]).save(folder / f"{i}.jpg")
    read = list(Clip(folder))
    assert faults(read) == [2, 4, 5] and "2.jpg" in read[2].fault
    assert read[4].fault == "expected 256x256 pixels like the first frame, got 256x128"


def test_pictures_of_every_mode_are_frames(tmp_path):
    grey = Image.fromarray(np.full((48, 64), 200, np.uint8))
    deep = Image.fromarray(np.full((48, 64), 200 * 257, np.uint16))
    for i, picture in enumerate(
        [grey.convert("RGBA"), grey, grey.convert("P"), grey.convert("LA"), deep]
    ):
        picture.save(tmp_path / f"{i}.png")
    turned = Image.fromarray(np.full((64, 48, 3), 200, np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    turned.save(tmp_path / "5.jpg", exif=exif)
    read = list(Clip(tmp_path))
    assert len(read) == 6 and all(same(frame.image, np.full((48, 64, 3), 200), 2) for frame in read)


EXIF = {  # orientation -> how the stored picture is shown
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image.swapaxes(0, 1), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", EXIF)
def test_a_picture_comes_upright(tmp_path, orientation):
    stored = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "0.png", exif=exif)
    Image.fromarray(stored).save(tmp_path / "1.tif", exif=exif)
    Image.fromarray(np.uint16(257) * stored[..., 0]).save(tmp_path / "2.png", exif=exif)
    shown = EXIF[orientation](stored)
    for name in ("0.png", "1.tif"):
        np.testing.assert_array_equal(xu.read_image(tmp_path / name), shown)
    np.testing.assert_array_equal(xu.read_image(tmp_path / "2.png"), shown[..., [0, 0, 0]])


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff"])
def test_16_bits_are_divided_by_257_and_rounded(tmp_path, suffix):
    deep = np.random.default_rng(0).integers(0, 65536, (16, 24, 3), np.uint16)
    truth = np.round(deep / 257)
    cv2.imwrite(str(tmp_path / f"0.{suffix}"), deep[..., ::-1])
    cv2.imwrite(str(tmp_path / f"1.{suffix}"), deep[..., 0])
    colour, grey = (frame.image for frame in Clip(tmp_path))
    np.testing.assert_array_equal(colour, truth)
    np.testing.assert_array_equal(grey, truth[..., [0, 0, 0]])


@pytest.mark.parametrize("pixels", ["gbrpf32le", "gbrapf32le", "grayf32le"])
@pytest.mark.parametrize("number", ["float", "half"])
def test_linear_light_of_openexr_becomes_srgb(tmp_path, pixels, number):
    light = np.random.default_rng(0).uniform(-0.2, 1.5, (15, 22, 4)).astype(np.float32)
    stored = {"gbrpf32le": light[..., :3], "gbrapf32le": light, "grayf32le": light[..., 0]}[pixels]
    options = {"update": "1"}
    with av.open(str(tmp_path / "0.exr"), "w", format="image2", options=options) as container:
        stream = container.add_stream("exr", 1, {"format": number})
        stream.height, stream.width = stored.shape[:2]
        stream.pix_fmt = pixels
        for packet in stream.encode(av.VideoFrame.from_ndarray(stored, format=pixels)):
            container.mux(packet)

    (read,) = Clip(tmp_path)
    x = light[..., [0, 0, 0] if pixels == "grayf32le" else [0, 1, 2]].clip(0, 1).astype(float)
    srgb = np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
    assert np.abs(read.image - 255 * srgb).max() < (0.51 if number == "float" else 0.7)

    (tmp_path / "1.exr").write_bytes((tmp_path / "0.exr").read_bytes()[:90])
    assert "save it as a 16-bit PNG or TIFF" in list(Clip(tmp_path))[1].fault


PICTURE = np.random.default_rng(0).integers(0, 256, (6, 8, 4), np.uint8)
RGB = PICTURE[..., :3]
OPAQUE = np.dstack([RGB, np.full((6, 8), 255, np.uint8)])


@pytest.mark.parametrize(
    "image,truth",
    [
        (RGB, RGB),
        (PICTURE[::-1, ::2, 2::-1], RGB[::-1, ::2, ::-1]),
        (np.asfortranarray(RGB), RGB),
        (RGB[..., 0], RGB[..., [0, 0, 0]]),
        (RGB[..., :1], RGB[..., [0, 0, 0]]),
        (OPAQUE, RGB),
        (PICTURE, np.round(RGB * (PICTURE[..., 3:] / 255))),
        (RGB * np.uint16(257), RGB),
        (RGB / 255, RGB),
        (np.float32(RGB / 255), RGB),
        (np.float16(RGB[..., 0] / 255), RGB[..., [0, 0, 0]]),
    ],
)
def test_what_is_clearly_a_picture_becomes_rgb(image, truth):
    found = xu.rgb_image(image)
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, truth)


@pytest.mark.parametrize(
    "image,said",
    [
        (RGB.tolist(), r"expected an array .* got list"),
        (RGB[..., :2], r"the shape \(H, W, 3\), RGB, got \(6, 8, 2\)"),
        (RGB[None], r"got \(1, 6, 8, 3\)"),
        (RGB.transpose(2, 0, 1), r"got \(3, 6, 8\)"),
        (RGB[:0], r"got \(0, 8, 3\)"),
        (RGB > 9, "got bool"),
        (RGB.astype(int), "got int64"),
        (np.float32(RGB), r"floats in \[0, 1\], got 0 to 249"),
        (np.full((6, 8, 3), np.nan), "got nan to nan"),
        (RGB / -255, "got -0.976471 to -0"),
    ],
)
def test_what_may_be_anything_is_refused_in_one_sentence(image, said, detector):
    for take in (xu.rgb_image, detector):
        with pytest.raises(ValueError, match=f"image: .*{said}"):
            take(image)


def test_the_detector_takes_pictures_of_any_kind(detector, flight):
    expected = [np.nan_to_num(part) for part in detector(flight[0])]
    for image in (np.float64(flight[0] / 255), flight[0] * np.uint16(257), flight[0][::-1][::-1]):
        assert all(map(np.array_equal, map(np.nan_to_num, detector(image)), expected))
    with pytest.raises(ValueError, match=r"squares: expected .* got \(256, 256, 3\)"):
        detector.heatmaps(flight[0])


def test_a_fault_can_be_printed_whatever_the_file_is_called(flight, tmp_path):
    folder = folder_of(tmp_path / os.fsdecode(b"caf\xe9"), flight[:2])
    (folder / "1.jpg").write_bytes(b"broken")
    fault = list(Clip(folder))[1].fault
    assert "caf\ufffd/1.jpg" in fault and fault.encode()


# ------------------------------------------------------------ times, results


def test_times_that_rise_are_taken_as_they_are():
    clock = Clock(30)
    stamps = [5.0, 5.1, 5.9, 100.0, 100.01]
    assert [clock.tick(stamp) for stamp in stamps] == stamps
    assert clock.tick() == clock.tick(np.nan) - 1 / 30 == pytest.approx(100.01 + 1 / 30)
    assert Clock(30).tick() == 0


def test_a_time_stamp_that_is_repeated_shifts_no_other():
    clock = Clock(10)
    times = [clock.tick(stamp) for stamp in (0, 0.1, 0.1, 0.3, 0.25, 0.4)]
    np.testing.assert_allclose(times, [0, 0.1, 0.15, 0.3, 0.35, 0.4])
    assert not clock.restarted


def test_a_clock_that_stands_still_does_not_creep():
    clock = Clock(10)
    times = [clock.tick(stamp) for stamp in [0] * 50 + [0.1, 0.2]]
    np.testing.assert_allclose(np.diff(times), [0.05] + [0.1] * 50)
    assert not clock.restarted


def test_a_clock_that_begins_again_goes_on_at_once():
    clock = Clock(10)
    events = []
    times = []
    for stamp in [7.0, 7.1, 7.2, 0, 0.1, 0.3, 0, 0.1]:
        times.append(clock.tick(stamp))
        events.append(clock.restarted)
    np.testing.assert_allclose(times, np.array([0, 1, 2, 3, 4, 6, 7, 8]) / 10 + 7)
    assert np.flatnonzero(events).tolist() == [3, 6]


def test_each_source_has_a_folder_of_its_own(tmp_path):
    names = ["a/IMG_0001.mp4", "b/IMG_0001.mp4", "a/IMG_0001.gif", "a/shot.v1", "a/shot.v2"]
    runs = tmp_path / "runs"
    (runs / "shot.v1").mkdir(parents=True)  # somebody else's
    folders = [run_folder(tmp_path / name, runs) for name in names]
    assert [folder.name for folder in folders] == [
        "IMG_0001.mp4",
        "IMG_0001.mp4-2",
        "IMG_0001.gif",
        "shot.v1-2",
        "shot.v2",
    ]
    assert [run_folder(tmp_path / "b" / ".." / name, runs) for name in names] == folders
    shot = tmp_path / "a" / "shot.v2"
    targets = [run_folder(shot, runs, tmp_path / mesh) for mesh in ("a.obj", "b.obj", "a.obj")]
    assert [folder.name for folder in targets] == ["shot.v2-2", "shot.v2-3", "shot.v2-2"]


@pytest.mark.parametrize(
    "name,content,error,said",
    [
        ("nothing", None, FileNotFoundError, "no such folder or file"),
        ("a.mp4", b"", ValueError, "cannot be read as a video"),
        ("a.mp4", b"no video at all" * 100, ValueError, "cannot be read as a video"),
        ("a.gif", b"GIF89a", ValueError, "no frame can be read"),
        ("a.txt", b"hello", ValueError, "cannot be read as a video"),
    ],
)
def test_a_source_that_is_no_clip(tmp_path, name, content, error, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=f"{name}: .*{said}.*expected a folder of frames"):
        Clip(tmp_path / name)


def test_a_folder_says_why_its_first_frame_cannot_be_read(tmp_path):
    for i in (3, 4):
        (tmp_path / f"{i}.jpg").write_bytes(b"broken")
    with pytest.raises(
        ValueError, match=r"holds no frame that can be read \(.*3\.jpg: cannot be read as"
    ):
        Clip(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.jpg").write_bytes(b"no number in its name")
    with pytest.raises(ValueError, match=r"holds no frame that can be read \(there is none\)"):
        Clip(tmp_path / "empty")


def test_notes_of_macos_are_no_frames(flight, tmp_path):
    folder = folder_of(tmp_path, flight[:3])
    (folder / "._0.jpg").write_bytes(b"notes")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Clip(folder).count == 3


@pytest.mark.parametrize(
    "names,said",
    [
        (["1.jpg", "2.jpg", "5.jpg", "9.jpg"], r"2 gaps \(2.jpg, 5.jpg\)"),
        (["0001.jpg", "1.jpg", "2.jpg"], r"1 numbers twice \(0001.jpg, 1.jpg\)"),
        (["a_0.jpg", "b_1.jpg", "a_2.jpg", "b_3.jpg"], r"2 series \(a_, b_\)"),
    ],
)
def test_a_folder_that_is_no_series_gives_one_warning(flight, tmp_path, names, said):
    for frame, name in zip(flight, names):
        Image.fromarray(frame).save(tmp_path / name)
    with pytest.warns(UserWarning, match=f"found {said}") as caught:
        clip = Clip(tmp_path)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert [path.name for path in clip.paths] == names


# ------------------------------------------------------------ videos


def test_every_frame_of_a_varying_rate_has_its_own_seconds(flight, tmp_path):
    seconds = [i / 30 if i < 40 else 40 / 30 + (i - 40) / 7.5 for i in range(60)]
    for name in ("a.mp4", "a.mkv"):
        clip = Clip(video_of(tmp_path / name, flight, seconds=seconds))
        read = list(clip)
        np.testing.assert_allclose([frame.seconds for frame in read], seconds, atol=1e-3)
        assert clip.count == 60 and not faults(read)
        assert clip.fps == pytest.approx(59 / seconds[-1], rel=0.01)


def test_a_pause_in_a_whole_video_is_no_fault(flight, tmp_path):
    seconds = [i / 30 if i < 50 else i / 30 + 1 for i in range(60)]
    read = list(Clip(video_of(tmp_path / "a.mkv", flight, seconds=seconds)))
    assert len(read) == 60 and not faults(read)
    assert read[50].seconds == pytest.approx(80 / 30, abs=1e-3)


def test_a_long_pause_in_a_damaged_video_is_no_damage(flight, tmp_path):
    seconds = [i / 30 + 600 * (i >= 20) for i in range(40)]
    whole = video_of(tmp_path / "a.ts", flight[:40], seconds=seconds, coder={"g": "10"})
    clip = Clip(garbage(tmp_path / "b.ts", whole, 0.25, 300))
    assert 40 <= clip.count < 50 and 1 <= len(faults(clip)) < 12


def test_a_last_frame_that_is_shown_for_long_hides_no_others(flight, tmp_path):
    """A screen recorder writes a frame where the screen changes, and states how long it ran."""
    seconds = [0, 0.1, 0.15, 0.5, 0.6, 1.9, 2.0, 2.7]
    path = video_of(tmp_path / "a.mkv", flight[:8], seconds=seconds)
    content = bytearray(path.read_bytes())
    at = content.index(b"00:00:02.")  # of the tag DURATION
    content[at : at + 8] = b"00:09:59"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Clip(path).count == 8


@pytest.mark.parametrize(
    "kind,muxer",
    [("mp4", {"movflags": "faststart"}), ("mkv", {"cluster_time_limit": "300"}), ("ts", {})],
)
@pytest.mark.parametrize("size", [200, 2000, 8000])
def test_frames_about_damage_keep_their_numbers(flight, whole_video, tmp_path, kind, muxer, size):
    """Frames lost to garbage in the middle are faults, and later frames keep their numbers."""
    whole = whole_video(kind, muxer=muxer, coder={"g": "10"})
    clip = Clip(garbage(tmp_path / f"hurt.{kind}", whole, 0.5, size))
    read = list(clip)
    lost = faults(read)
    assert clip.count == len(read) == 60 and 1 <= len(lost) <= 25 and all(20 < i < 50 for i in lost)
    assert all(f"frame {i}, at " in read[i].fault for i in lost)
    np.testing.assert_allclose([frame.seconds for frame in read], np.arange(60) / 30, atol=2e-3)
    clear = [i for i in range(60) if i < lost[0] - 4 or i > lost[-1] + 10]
    assert len(clear) > 20 and all(same(read[i].image, flight[i]) for i in clear)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi"])
def test_a_video_that_is_cut_off_says_how_much_is_missing(flight, tmp_path, kind):
    muxer = {"movflags": "faststart"} if kind == "mp4" else {}
    whole = video_of(tmp_path / f"whole.{kind}", flight, muxer=muxer)
    for fraction in (0.97, 0.5):
        said = rf"{kind}: breaks off, only \d+ of 60 frames"
        with pytest.warns(UserWarning, match=said) as caught:
            clip = Clip(cut(tmp_path / f"cut.{kind}", whole, fraction))
        read = list(clip)
        lost = faults(read)
        assert len(caught) == 1 and caught[0].filename == __file__
        assert len(read) == clip.count == 60
        assert lost[-1] == 59 and len(lost) < 60 - 50 * fraction and "breaks off" in read[59].fault
        assert all(same(read[i].image, flight[i]) for i in range(lost[0]))
        with pytest.warns(UserWarning, match="breaks off"):
            assert Clip(tmp_path / f"cut.{kind}", step=7).count == 9


def test_a_video_with_a_longer_sound_is_whole(flight, tmp_path):
    for kind in ("mp4", "mkv"):
        clip = Clip(video_of(tmp_path / f"a.{kind}", flight[:30], sound=3.0))
        assert clip.count == 30 and not faults(clip) and clip.fps == 30


def test_frames_that_an_edit_list_hides_do_not_count(flight, tmp_path):
    """A clip that was trimmed on a telephone still holds the frames before its start, hidden."""
    seconds = [(i - 5) / 30 for i in range(20)]
    clip = Clip(video_of(tmp_path / "a.mp4", flight[:20], seconds=seconds))
    read = list(clip)
    assert clip.count == len(read) == 15 and not faults(read) and read[0].seconds == 0
    assert all(same(frame.image, truth) for frame, truth in zip(read, flight[5:20]))


def test_a_video_that_changes_its_size_says_so_for_each_frame(flight, tmp_path):
    first = video_of(tmp_path / "a.ts", flight[:9])
    second = video_of(tmp_path / "b.ts", [frame[:128] for frame in flight[9:14]])
    (tmp_path / "c.ts").write_bytes(first.read_bytes() + second.read_bytes())
    read = list(Clip(tmp_path / "c.ts"))
    other = "expected 256x256 pixels like the first frame, got 256x128"
    assert [frame.fault for frame in read] == [""] * 9 + [other] * 5


@pytest.mark.parametrize("angle", [90, 180, -90])
def test_a_video_comes_upright(flight, tmp_path, angle):
    clip = Clip(video_of(tmp_path / "a.mp4", [frame[:128] for frame in flight[:3]], rotation=angle))
    upright = np.rot90(flight[0][:128], angle // 90)  # counter-clockwise
    assert (clip.height, clip.width) == upright.shape[:2] and same(next(iter(clip)).image, upright)


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_all_display_matrices_are_obeyed(flight, tmp_path, signs, is_transposed):
    """A matrix maps a stored position, as a row (x, y), to the one at which it is shown."""
    matrix = np.diag(signs)[:: -1 if is_transposed else 1]
    stored = flight[0][:128]
    path = video_of(tmp_path / "a.mp4", [stored])
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    entries = [*matrix[0], 0, *matrix[1], 0, 0, 0, 2**14]
    content[at : at + 36] = (np.array(entries) * 2**16).astype(">i4").tobytes()
    path.write_bytes(content)

    row, column = np.indices(stored.shape[:2])
    x, y = np.moveaxis(np.stack([column + 0.5, row + 0.5], -1) @ matrix, -1, 0)
    height, width = stored.shape[1::-1] if is_transposed else stored.shape[:2]
    shown = np.empty((height, width, 3), np.uint8)
    shown[np.floor(y).astype(int) % height, np.floor(x).astype(int) % width] = stored
    clip = Clip(path)
    assert (clip.height, clip.width) == (height, width)
    assert same(next(iter(clip)).image, shown)


def test_frames_of_one_time_are_no_fault(flight, tmp_path):
    """A screen recorder gives two frames the same time stamp now and then."""
    steady = video_of(tmp_path / "a.mkv", flight[:12], coder={"bf": "0"})
    with (tmp_path / "b.mkv").open("w+b") as file, av.open(str(steady)) as source:
        with av.open(file, "w", format="matroska") as container:
            stream = container.add_stream_from_template(source.streams.video[0])
            for i, packet in enumerate(source.demux(video=0)):
                if packet.size:
                    packet.pts = packet.dts = round((i - (i in (4, 5, 8))) * 1000 / 30)
                    packet.stream = stream
                    container.mux(packet)
    clip = Clip(tmp_path / "b.mkv")
    read = list(clip)
    assert clip.count == 12 and not faults(read) and np.diff(clip.seconds).min() == 0
    assert all(same(frame.image, truth) for frame, truth in zip(read, flight, strict=False))


def test_a_file_without_durations_is_whole(flight, tmp_path):
    with (tmp_path / "a.asf").open("w+b") as file, av.open(file, "w", format="asf") as container:
        stream = container.add_stream("wmv2", 25)
        stream.height = stream.width = 256
        stream.pix_fmt = "yuv420p"
        for frame in flight[:6]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    clip = Clip(tmp_path / "a.asf")
    assert clip.count == 6 and not faults(clip)


@pytest.mark.parametrize(
    "aspect,width,height", [(Fraction(4, 3), 341, 256), (Fraction(1, 2), 256, 512)]
)
def test_pixels_become_square(flight, tmp_path, aspect, width, height):
    clip = Clip(video_of(tmp_path / "a.mp4", flight[:3], aspect=aspect))
    assert (clip.width, clip.height) == (width, height)
    expected = cv2.resize(flight[0], (width, height), interpolation=cv2.INTER_CUBIC)
    assert same(next(iter(clip)).image, expected)


def test_no_name_and_no_playlist_is_a_url(flight, tmp_path, monkeypatch):
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.chdir(tmp_path)
        folder = tmp_path / f"http:/127.0.0.1:{server.server_port}"
        folder.mkdir(parents=True)
        video = video_of(folder / "x.mp4", flight[:3])
        shutil.copy(video, "file:a|b.mp4")
        assert Clip(f"{url}/x.mp4").count == Clip("file:a|b.mp4").count == 3
        segments = "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4.0,\n{}\n#EXT-X-ENDLIST\n"
        for name, content in (
            ("a.m3u8", segments.format(f"{url}/x.ts")),
            ("b.m3u8", segments.format(video)),
            ("c.txt", f"ffconcat version 1.0\nfile '{video}'\n"),
        ):
            (tmp_path / name).write_text(content)
            with pytest.raises(ValueError, match=f"{name}: cannot be read as a video"):
                Clip(name)
        server.shutdown()
    assert asked == []


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(FileNotFoundError, match="a.mp4: no such folder or file"):
        Clip(tmp_path / "a.mp4")


def test_a_distorted_clip_is_straightened(tmp_path, K):
    """A grid seen through a barrel lens comes out straight."""
    coefficients = [-0.3, 0.1, 0, 0]
    centres = np.stack(np.meshgrid(np.arange(256), np.arange(256)), -1) + 0.5
    rays = cv2.undistortPoints(centres.reshape(-1, 1, 2), K, np.array(coefficients))
    rays = rays.reshape(256, 256, 2)
    seen = (127 + 120 * np.sin(40 * rays)).astype(np.uint8)
    clip = Clip(folder_of(tmp_path, [np.dstack([seen, seen[..., :1]])]))
    clip.undistort(K, coefficients)
    straight = next(iter(clip)).image[..., :2].astype(float)
    inner = np.s_[40:216, 40:216]
    truth = 127 + 120 * np.sin(40 * (centres - 128) / K[0, 0])
    assert np.abs(straight - truth)[inner].mean() < 8 < np.abs(seen - truth)[inner].mean()
    for wrong in ([0.1], [0, 0, 0, np.nan]):
        with pytest.raises(ValueError, match="coefficients: expected OpenCV's"):
            clip.undistort(K, wrong)


# ------------------------------------------------------------ GIFs


def test_a_gif_s_frames_have_their_own_seconds(flight, tmp_path):
    pictures = [Image.fromarray(frame) for frame in flight[:10]]
    durations = [500] + [50] * 9
    pictures[0].save(
        tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=durations
    )
    clip = Clip(tmp_path / "a.gif")
    np.testing.assert_allclose(
        [frame.seconds for frame in clip], np.cumsum([0, *durations[:-1]]) / 1000
    )
    assert clip.fps == pytest.approx(9 / 0.9) and Clip(tmp_path / "a.gif", step=2).count == 5


def test_a_gif_without_durations_has_all_its_frames(flight, tmp_path):
    iio.imwrite(tmp_path / "a.gif", flight[:6])
    clip = Clip(tmp_path / "a.gif")
    assert clip.count == 6 and clip.fps is None and not faults(clip)
    assert [frame.seconds for frame in clip] == [None] * 6


def test_what_a_gif_leaves_transparent_is_black(tmp_path):
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[2:4] = (250, 120, 10, 255)
    picture[4:] = (255, 255, 255, 0)
    Image.fromarray(picture).save(tmp_path / "a.gif")
    (read,) = Clip(tmp_path / "a.gif")
    assert not read.image[:2].any() and not read.image[4:].any()
    assert same(read.image[2:4], picture[2:4, :, :3])


def test_a_gif_that_breaks_off_is_read_as_far_as_it_goes_and_says_so(flight, tmp_path):
    iio.imwrite(tmp_path / "whole.gif", flight[:6], duration=50)
    for fraction in np.linspace(0.3, 0.9999, 12):
        clip = Clip(cut(tmp_path / "cut.gif", tmp_path / "whole.gif", fraction))
        *good, last = list(clip)
        assert good and not faults(good) and "cut.gif: no frame can be read after" in last.fault
        assert clip.count == len(good) + 1
        assert all(same(f.image, t, 8) for f, t in zip(good, flight))


# ------------------------------------------------------------ fuzz: one clear error, never another


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), kind=st.sampled_from(["mp4", "mkv", "ts", "gif"]))
def test_fuzzed_clips(flight, tmp_path, data, kind):
    """A damaged and truncated file gives a ValueError, or as many frames as it promises."""
    whole = tmp_path / f"whole.{kind}"
    if not whole.exists():
        small = [np.ascontiguousarray(frame[::4, ::4]) for frame in flight[:8]]
        iio.imwrite(whole, small, duration=50) if kind == "gif" else video_of(whole, small)
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"fuzzed.{kind}"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with warnings.catch_warnings(), contextlib.suppress(ValueError):
        warnings.simplefilter("ignore")
        clip = Clip(path)
        read = list(clip)
        assert len(read) == clip.count and any(frame.image is not None for frame in read)
        assert all((frame.image is None) == bool(frame.fault) for frame in read)


# ------------------------------------------------------------ frames by number, bars, squares


def test_frames_at_replaces_what_cannot_be_read(flight, tmp_path):
    broken = Frame(None, fault="broken")
    clip = [Frame(flight[0]), broken, Frame(flight[2][:128]), flight[3], tmp_path / "4.jpg"]
    Image.fromarray(flight[4]).save(tmp_path / "4.jpg", quality=95)
    with pytest.warns(UserWarning) as caught:
        images = list(frames_at(clip, [0, 1, 2, 3, 3, 4, 6]))
    repeated = [str(warning.message).split(":")[0] for warning in caught]
    assert repeated == [f"frame {i} is replaced by its neighbour" for i in (1, 2, 6)]
    assert "broken" in str(caught[0].message) and "the clip is shorter" in str(caught[2].message)
    truths = [flight[i] for i in (0, 0, 0, 3, 3, 4, 4)]
    assert all(same(image, truth) for image, truth in zip(images, truths))
    assert same(next(frames_at(Clip(folder_of(tmp_path / "f", flight[:5])), [3])), flight[3])
    with pytest.warns(UserWarning, match="frame 1 is replaced by its neighbour: broken"):
        images = list(frames_at([broken, broken, *flight[2:4]], [1, 2, 3]))
    assert all(same(image, flight[i]) for image, i in zip(images, (2, 2, 3)))
    with pytest.raises(ValueError, match="frame 0 cannot be read: broken"):
        next(frames_at([broken], [0]))


@pytest.mark.parametrize(
    "area", [(0, 0, 256, 256), (40, 0, 176, 256), (0, 32, 256, 192), (20, 12, 216, 232)]
)
def test_black_bars_are_found(flight, tmp_path, area):
    left, top, width, height = area
    frames = [np.zeros((256, 256, 3), np.uint8) for _ in range(8)]
    for frame, full in zip(frames, flight[::5]):
        frame[top : top + height, left : left + width] = cv2.resize(full, (width, height))
    found = picture_area(Clip(video_of(tmp_path / "a.mp4", frames)))
    np.testing.assert_allclose(found, area, atol=2)


def test_a_black_sky_is_no_bar(tmp_path):
    frame = np.zeros((100, 200, 3), np.uint8)
    frame[30:60, 120:180] = 200
    assert picture_area(Clip(folder_of(tmp_path / "a", [frame]))) == (0, 0, 200, 100)
    assert picture_area(Clip(folder_of(tmp_path / "b", [frame * 0]))) == (0, 0, 200, 100)


@pytest.mark.parametrize(
    "width,height", [(256, 256), (640, 360), (480, 852), (2160, 3840), (99, 37), (1, 1)]
)
def test_a_letterbox_keeps_proportions_and_positions(width, height):
    image = np.zeros((height, width, 3), np.uint8)
    row = height * 2 // 3
    column = width // 3
    reach = max(height, width) // 20
    image[max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1] = 255

    def middle(light):
        light = light[..., 0].astype(float)
        x = np.arange(light.shape[1]) + 0.5
        y = np.arange(light.shape[0]) + 0.5
        return np.array([light.sum(0) @ x, light.sum(1) @ y]) / light.sum()

    square, scale, offset = letterbox(image, 256)
    assert square.shape == (256, 256, 3) and scale == 256 / max(width, height)
    np.testing.assert_allclose((middle(square) - offset) / scale, middle(image), atol=0.1 / scale)


def test_the_camera_matrix_of_a_letterbox(K):
    """The K of the letterbox's docstring projects to where the letterbox puts the same position."""
    point = np.array([0.1, -0.2, 1.0])
    _, scale, offset = letterbox(np.zeros((180, 320, 3), np.uint8), 256)
    moved = xu.crop_camera(K, *(-offset / scale), scale)
    np.testing.assert_allclose((moved @ point)[:2], (K @ point)[:2] * scale + offset)


# ------------------------------------------------------------ the network in OpenVINO


def test_a_detector_knows_the_target_of_its_weights(detector):
    xu.check_same_target(detector.target, xu.XWING, "the weights")


def test_only_a_target_with_a_mirror_plane_is_averaged(weights, detector, flight, monkeypatch):
    symmetric = detector
    lopsided = dataclasses.replace(xu.XWING, mirror=None)
    monkeypatch.setattr(xu, "weights_target", lambda path: lopsided)
    detector = Detector(weights, crop_sizes=(), search_size=128)
    squares = flight[0][None, 64:192, 64:192]
    assert detector.target is lopsided
    once = detector.heatmaps(squares, averaged=False)
    np.testing.assert_array_equal(detector.heatmaps(squares), np.maximum(once, 0))
    assert np.abs(symmetric.heatmaps(squares) - once).max() > 0.01


def test_the_exported_network_sees_what_the_keras_model_sees(weights, detector, flight):
    middles = [np.nanmedian(detector(frame).keypoints, axis=0) for frame in flight[:40:8]]
    corners = [np.round(middle).astype(int) - 64 for middle in middles]
    squares = np.stack([xu.crop_image(frame, at, 128) for frame, at in zip(flight[:40:8], corners)])
    keras, confidences = xu.predict_keypoints(xu.load_model(weights, 128), squares, channels=36)
    stride, sigma = (detector.settings["model"][name] for name in ("stride", "sigma"))
    for keypoints, confidence, maps in zip(keras, confidences, detector.heatmaps(squares)):
        found, _ = xu.decode_heatmaps(maps, sigma / stride)
        good = confidence >= xu.MIN_CONFIDENCE
        off = np.linalg.norm(found * stride - keypoints, axis=1)[good]
        assert len(off) > 8 and off.max() < 0.1  # pixels


def test_a_close_square_finds_what_the_whole_frame_shows(weights, detector, flight):
    whole = Detector(weights, crop_sizes=(), search_size=256)
    off = []
    for frame in flight[:30:5]:
        keypoints, confidence, sigma = whole(frame)
        good = (confidence > 0.5) & (np.arange(36) >= 8)
        box = [keypoints[good].min(0) - 8, keypoints[good].max(0) + 8]
        close, again, spread = detector(frame, box)
        good &= again > 0.5
        off.append(np.linalg.norm(close - keypoints, axis=1)[good])
        assert np.isfinite(spread[good]).all() and (spread[good] > 0.3).all()
    assert np.median(np.concatenate(off)) < 0.5 and len(np.concatenate(off)) > 40


def test_a_small_target_in_a_large_frame_is_found_in_a_part_of_it(detector, flight, monkeypatch):
    large = np.zeros((1600, 2400, 3), np.uint8)
    large[800:1056, 1600:1856] = flight[10]
    found = detector(large).confidence
    monkeypatch.setattr(detector, "_parts", lambda image: [])
    assert (found >= xu.MIN_CONFIDENCE).sum() > 12
    assert not (detector(large).confidence >= xu.MIN_CONFIDENCE).sum() > 4


@pytest.mark.parametrize("place,found", [(40, True), (4, False), (500, False)])
def test_a_target_that_every_part_cuts_off_is_not_found(detector, monkeypatch, place, found):
    """One that comes near the border of a part, or of the frame, may go on beyond it."""

    def read(image, square, averaged=True):
        keypoints = np.full((36, 2), np.nan)
        confidence = np.zeros(36)
        if square.side == 512 and square.left == 0:  # one of the parts
            keypoints[:4] = [square.left + place, square.top + 200]
            confidence[:4] = 0.9
        return sighting(keypoints, confidence, np.ones(36))

    monkeypatch.setattr(detector, "_read", read)
    monkeypatch.setattr(detector, "_close_square", lambda image, points: None)
    keypoints, _, _ = detector(np.zeros((512, 1024, 3), np.uint8))
    assert np.isfinite(keypoints[:4]).all() == found


BOXES = [  # left, top and width; each is half as high as it is wide
    (10, 20, 30),
    (80, 60, 87),
    (0, 100, 90),
    (20, 0, 230),
    (-40, -30, 100),
    (-1e6, -1e6, 3e6),
    (2000, 0, 50),
    (5, 5, 0),
]


@pytest.mark.parametrize("crop_sizes", [(), (96,), (96, 128)])
@pytest.mark.parametrize("width,height", [(256, 256), (1024, 512), (120, 250), (60, 40)])
def test_the_close_square_holds_the_box_and_shows_more(
    weights, crop_sizes, width, height, monkeypatch
):
    """The square holds the part of a box in the frame, and enlarges it, whatever the box's size."""
    squares = []

    def nothing_found(image, square, averaged=True):
        squares.append(square)
        return sighting(np.full((36, 2), np.nan), np.zeros(36), np.full(36, np.inf))

    monkeypatch.setattr(Detector, "_compile", lambda self, size: None)
    detector = Detector(weights, crop_sizes, search_size=64)
    monkeypatch.setattr(detector, "_read", nothing_found)
    monkeypatch.setattr(detector, "_parts", lambda image: [])
    longest = max(width, height)
    image = np.zeros((height, width, 3), np.uint8)
    close = 0
    for left, top, extent in BOXES:
        squares.clear()
        box = [[left, top], [left + extent, top + extent / 2]]  # a list will do
        detector(image, box)
        ((x, y, side, size),) = squares  # nothing is found, so nothing else is examined
        inside = np.clip(box, 0, [width, height])
        if size == 64:
            needed = 1.1 * np.ptp(inside, axis=0).max()
            unseen = extent == 0 or left == 2000 or top >= height
            assert side == longest
            assert not crop_sizes or unseen or needed >= crop_sizes[-1] * longest / 64
            continue

        close += 1
        assert size in crop_sizes
        assert size / side > 64 / longest and side <= max(longest, 1.1 * extent + 1)
        assert (inside >= [x, y]).all() and (inside <= [x + side, y + side]).all()
        inside_frame = x >= 0 and y >= 0 and x + side <= width and y + side <= height
        assert inside_frame or side > min(width, height)
        assert size / side <= max(256 / longest, 1) + 0.02
    assert close >= 2 if crop_sizes else close == 0


@pytest.mark.parametrize(
    "close,whole,then",
    [
        (3, 10, [96, 192]),
        (7, 10, [96, 192]),
        (8, 10, [96]),
        (20, 10, [96]),
        (20, 3, []),
    ],
)
def test_a_close_square_that_cuts_the_ship_off_is_not_used(
    detector, flight, monkeypatch, close, whole, then
):
    """The search finds 10 points: a close square with 7 is thrown away, one with 8 is used.

    Only the search runs without the mirrored square.
    """
    counts = {96: close, 192: whole}
    examined = []

    def found(image, square, averaged=True):
        examined.append((square.size, averaged))
        keypoints = np.full((36, 2), 100.0) + np.arange(36)[:, None]
        confidence = np.where(np.arange(36) < counts[square.size], 0.9, 0.0)
        return sighting(keypoints, confidence, np.full(36, float(square.size)))

    monkeypatch.setattr(detector, "_read", found)
    assert detector(flight[0]).sigma[0] == ([192] + then)[-1]
    assert examined == [(192, False)] + [(size, True) for size in then]


@pytest.mark.parametrize(
    "width,height,side", [(1024, 1024, 1024), (3840, 2160, 2160), (360, 640, 360), (768, 600, 240)]
)
def test_frames_of_any_size_give_the_same_pose(detector, flight, K, width, height, side):
    """A frame is scaled and set into a larger one; with the K of the larger one its pose is the
    same."""

    def pose_of(image, K):
        keypoints, confidence, sigma = detector(image)
        return xu.solve_pose(keypoints, K, confidence, sigma=sigma)

    image = np.zeros((height, width, 3), np.uint8)
    left = (width - side) // 2
    top = (height - side) // 2
    interpolation = cv2.INTER_CUBIC if side > 256 else cv2.INTER_AREA
    resized = cv2.resize(flight[0], (side, side), interpolation=interpolation)
    image[top : top + side, left : left + side] = resized

    scale = side / 256
    moved = xu.crop_camera(K, -left / scale, -top / scale, scale)
    pose = pose_of(image, moved)
    truth = pose_of(flight[0], K)
    assert xu.rotation_error(pose, truth) < 5 and np.linalg.norm(pose[:3, 3] - truth[:3, 3]) < 0.1
