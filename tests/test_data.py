"""Sets on disk, good and bad; pictures of all kinds; the batches of `make_dataset`."""

import itertools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import albumentations as A
import numpy as np
import pytest
from PIL import Image

import xwing_utils as xu

# Albumentations warns about pipelines without a transform that moves keypoints.
pytestmark = pytest.mark.filterwarnings("ignore:Got processor for keypoints")
KEYPOINT_PARAMS = A.KeypointParams(format="xy", remove_invisible=False)
IDENTITY = np.eye(4).tolist()


@pytest.fixture
def folder(root, tmp_path):
    """A copy of the first four frames of data/sample."""
    frames = [f"{i}{end}" for i in range(4) for end in (".jpg", "_mat.json")]
    for name in ("camera_info.json", *frames):
        shutil.copy(root / "data" / "sample" / name, tmp_path / name)
    return tmp_path


# ------------------------------------------------------------ sets on disk


@pytest.mark.parametrize(
    "name,count",
    [("sample", 512), ("test", 512), ("shifted", 256), ("looks", 256), ("frames", 300)],
)
def test_committed_sets_load(root, name, count):
    paths, matrices = xu.load_dataset(root / "data" / name)
    assert len(paths) == count and matrices.shape == (count, 4, 4)
    assert [int(path.stem) for path in paths] == list(range(count))
    assert xu.read_image(paths[-1], (256, 256)).dtype == np.uint8


def test_committed_data_stay_below_45_mb(root):
    folders = [root / "data" / name for name in ("sample", "test", "shifted", "looks", "frames")]
    assert sum(file.stat().st_size for file in folders[3].iterdir()) < 5e6
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) < 45e6


@pytest.mark.parametrize("name", ["sample", "test", "shifted", "looks"])
def test_poses_of_the_committed_sets_follow_the_documented_distribution(root, name, camera):
    matrices = xu.load_dataset(root / "data" / name)[1]
    z = matrices[:, 2, 3]
    assert 0.4 < (z == 0).mean() < 0.6 and z.min() >= -0.4 and z.max() <= 0.3
    inside = xu.in_frame(xu.keypoints_of(matrices, *camera)).sum(1)
    assert 0.4 < (inside == 8).mean() < 0.6  # as data/README.md says
    assert 0.78 < (inside >= 6).mean() < 0.9


def test_committed_sets_share_no_frame(root):
    names = ("sample", "test", "shifted", "looks")
    sets = [xu.load_dataset(root / "data" / name)[1] for name in names]
    for first, second in itertools.combinations(sets, 2):
        assert np.abs(first[:, None] - second[None]).max((2, 3)).min() > 1e-3


def test_frames_come_in_the_order_of_their_numbers(folder):
    for name in ("10", "11"):
        shutil.copy(folder / "0.jpg", folder / f"{name}.jpg")
        (folder / f"{name}_mat.json").write_text(json.dumps(IDENTITY))
    paths, matrices = xu.load_dataset(folder)
    assert [path.name for path in paths] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "10.jpg", "11.jpg"]
    np.testing.assert_array_equal(matrices[3], json.loads((folder / "3_mat.json").read_text()))
    np.testing.assert_array_equal(matrices[4], np.eye(4))


@pytest.mark.parametrize("name", ["notes.txt", "cover.jpg", "._0.jpg", ".0.jpg"])
def test_other_files_in_the_folder_are_left_alone(folder, name):
    (folder / name).write_text("hello")
    assert len(xu.load_dataset(folder)[0]) == 4


def test_a_missing_or_empty_folder_is_named(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=folder.name):
            xu.load_dataset(folder)


def test_a_frame_without_its_matrix_is_named(folder):
    (folder / "2_mat.json").unlink()
    with pytest.raises(FileNotFoundError, match="2_mat.json"):
        xu.load_dataset(folder)


@pytest.mark.parametrize(
    "value,message",
    [
        ("[[1, 0, 0", "JSON"),
        ("", "JSON"),
        (np.eye(3).tolist(), "shape"),
        ([1, 2, 3], "shape"),
        ([[1, 2], [3]], "shape"),
        ({"matrix": IDENTITY}, "shape"),
        (np.diag([np.nan, 1, 1, 1]).tolist(), "NaN"),
        (np.diag([np.inf, 1, 1, 1]).tolist(), "infinite"),
        (np.diag([-1.0, 1, 1, 1]).tolist(), "mirrors"),
        (np.diag([2.0, 2, 2, 1]).tolist(), "rigid"),
        ([*IDENTITY[:3], [0.1, 0.2, 0.3, 1]], "rigid"),
    ],
)
def test_a_bad_matrix_is_named(folder, value, message):
    (folder / "2_mat.json").write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(ValueError, match=f"(?s)2_mat.json.*{message}"):
        xu.load_dataset(folder)


def test_the_camera_comes_from_its_file_or_folder(root, camera):
    view, projection = xu.load_camera(root / "data" / "test" / "camera_info.json")
    np.testing.assert_array_equal([view, projection], camera)
    np.testing.assert_allclose(view, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, -1], [0, 0, 0, 1]])
    assert projection[0, 0] == projection[1, 1] == 1.9444442987442017


@pytest.mark.parametrize(
    "change,message",
    [
        ({"projection_matrix": None}, "projection_matrix"),
        ({"projection_matrix": IDENTITY}, "perspective"),
        ({"model_view_matrix": np.diag([1, -1, 1, 1]).tolist()}, "model_view_matrix.*mirrors"),
        ({"model_view_matrix": np.full((4, 4), np.nan).tolist()}, "model_view_matrix.*NaN"),
        ("{}", "missing"),
        ("[]", "missing"),
        ("not json", "JSON"),
    ],
)
def test_a_bad_camera_is_named(folder, change, message):
    path = folder / "camera_info.json"
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change)
    path.write_text(change)
    with pytest.raises(ValueError, match=f"camera_info.json.*{message}"):
        xu.load_camera(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="camera_info.json"):
        xu.load_camera(folder)


# ------------------------------------------------------------ pictures


def saved(tmp_path, image, name="0.png", **arguments):
    image.save(tmp_path / name, **arguments)
    return xu.read_image(tmp_path / name, (32, 16))


@pytest.mark.parametrize(
    "mode,colour,name,expected",
    [
        ("RGB", (250, 100, 10), "0.png", (250, 100, 10)),
        ("RGB", (250, 100, 10), "0.bmp", (250, 100, 10)),
        ("RGBA", (250, 100, 10, 255), "0.png", (250, 100, 10)),
        ("RGBA", (250, 100, 10, 51), "0.png", (50, 20, 2)),
        ("LA", (200, 255), "0.png", (200, 200, 200)),
        ("L", 77, "0.png", (77, 77, 77)),
        ("L", 77, "0.jpg", (77, 77, 77)),
        ("1", 1, "0.png", (255, 255, 255)),
        ("I;16", 257 * 77, "0.png", (77, 77, 77)),
        ("I;16", 65535, "0.png", (255, 255, 255)),
        ("I;16", 0, "0.tif", (0, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "0.jpg", (254, 0, 0)),
    ],
)
def test_pictures_of_all_modes_become_rgb(tmp_path, mode, colour, name, expected):
    pixels = saved(tmp_path, Image.new(mode, (32, 16), colour), name)
    assert pixels.shape == (16, 32, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_palettes_become_the_colours_they_stand_for(tmp_path, sample):
    frame = Image.open(sample[0][12]).resize((32, 16))
    expected = np.array(frame.quantize(64).convert("RGB"))
    np.testing.assert_array_equal(saved(tmp_path, frame.quantize(64)), expected)


def test_16_bits_are_scaled_and_not_cut(tmp_path):
    ramp = np.linspace(0, 65535, 512).reshape(16, 32).astype(np.uint16)
    pixels = saved(tmp_path, Image.fromarray(ramp))
    assert np.abs(pixels - (ramp / 257)[..., None]).max() <= 0.51


@pytest.mark.parametrize("name", ["0.jpg", "0.png"])
@pytest.mark.parametrize(
    "orientation,stored_as",
    [
        (1, lambda p: p),
        (2, lambda p: p[:, ::-1]),
        (3, lambda p: np.rot90(p, 2)),
        (6, np.rot90),
        (8, lambda p: np.rot90(p, -1)),
    ],
)
def test_pictures_are_turned_as_their_exif_tag_says(tmp_path, name, orientation, stored_as):
    upright = np.zeros((16, 32, 3), np.uint8)
    exif = Image.Exif()
    upright[:8, :16] = 250  # the top left is bright
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(stored_as(upright)))
    pixels = saved(tmp_path, stored, name, exif=exif)
    assert pixels[:7, :15].min() > 230 and pixels[9:].max() < 20 and pixels[:7, 17:].max() < 20


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="7.jpg"):
        xu.read_image(tmp_path / "7.jpg")


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.95])
def test_a_cut_off_jpeg_is_named(folder, fraction):
    data = (folder / "0.jpg").read_bytes()
    (folder / "0.jpg").write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(ValueError, match="0.jpg.*picture"):
        xu.read_image(folder / "0.jpg")


@pytest.mark.parametrize("header", [b"II*\0", b"II+\0"], ids=["cut off", "one byte changed"])
def test_a_damaged_exif_header_is_named(tmp_path, header):
    Image.new("RGB", (32, 16)).save(tmp_path / "0.jpg", dpi=(72, 72), exif=b"Exif\0\0" + header)
    with pytest.raises(ValueError, match="0.jpg: cannot be read as a picture"):
        xu.read_image(tmp_path / "0.jpg")


def test_pictures_that_are_none_or_of_another_size_are_named(folder):
    with pytest.raises(ValueError, match="0.jpg.*128x64.*256x256"):
        xu.read_image(folder / "0.jpg", (128, 64))
    (folder / "0.jpg").write_text("hello")
    with pytest.raises(ValueError, match="0.jpg"):
        xu.read_image(folder / "0.jpg")


# ------------------------------------------------------------ batches


def dataset_of(sample, camera, count=8, **arguments):
    paths, matrices = sample
    return xu.make_dataset(
        paths[:count], matrices[:count], *camera, **{"batch_size": 4, **arguments}
    )


def next_epoch(dataset):
    """Call what Keras calls between two epochs."""
    dataset.on_epoch_end()
    dataset.on_epoch_begin()


@pytest.fixture
def mirror_only(monkeypatch):
    """Leave the mirror as the only augmentation."""
    nothing = A.Compose([], keypoint_params=KEYPOINT_PARAMS)
    monkeypatch.setattr(xu, "augmentation", lambda seed, without: nothing)


def test_shapes_and_types_of_a_batch(sample, camera):
    dataset = dataset_of(sample, camera, count=10)
    images, keypoints = dataset[0]
    assert len(dataset) == 3 and len(dataset[2][0]) == 2  # the last batch is short
    assert images.shape == (4, 256, 256, 3) and images.dtype == np.uint8
    assert keypoints.shape == (4, len(xu.KEYPOINTS), 3) and keypoints.dtype == np.float32
    assert set(np.unique(keypoints[..., 2])) == {0, 1} and np.isfinite(keypoints).all()


def test_frames_and_corners_without_augmentation(sample, camera):
    paths, matrices = sample
    images, keypoints = dataset_of(sample, camera, augmented=False)[1]
    np.testing.assert_array_equal(images, [xu.read_image(p) for p in paths[4:8]])
    corners = xu.keypoints_of(matrices[4:8], *camera)
    np.testing.assert_allclose(keypoints[:, :8, :2], corners, atol=1e-4)
    np.testing.assert_array_equal(keypoints[:, :8, 2], xu.in_frame(corners))


def test_corners_outside_the_frame_keep_their_positions_and_are_not_visible(sample, camera):
    keypoints = dataset_of(sample, camera, count=64, batch_size=64, augmented=False)[0][1][:, :8]
    outside = ((keypoints[..., :2] < 0) | (keypoints[..., :2] >= 256)).any(-1)
    assert 0.05 < outside.mean() < 0.5 and np.abs(keypoints[..., :2]).max() < 500
    np.testing.assert_array_equal(keypoints[..., 2], ~outside)


def test_points_that_face_away_are_put_far_outside(sample, camera):
    keypoints = dataset_of(sample, camera, augmented=False)[0][1]
    hidden = ~xu.front_facing(sample[1][:4], camera[0])
    assert hidden[:, 8:].any() and not hidden[:, 8:].all() and not hidden[:, :8].any()
    np.testing.assert_array_equal((keypoints[..., :2] == -1e4).all(-1), hidden)
    assert not keypoints[hidden][:, 2].any()


def test_batches_depend_on_the_seed_and_not_on_the_order(sample, camera):
    forwards = dataset_of(sample, camera, seed=5)
    backwards = dataset_of(sample, camera, seed=5)
    first = forwards[0]
    second = forwards[1]
    for got, expected in ((backwards[1], second), (backwards[0], first)):
        np.testing.assert_array_equal(got[0], expected[0])
        np.testing.assert_array_equal(got[1], expected[1])
    assert not np.array_equal(dataset_of(sample, camera, seed=6)[0][1], first[1])


def test_batches_are_the_same_from_many_threads(sample, camera):
    dataset = dataset_of(sample, camera, count=32)
    serial = [dataset[i] for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(dataset.__getitem__, range(8)))
    for (images, keypoints), (other_images, other_keypoints) in zip(serial, parallel):
        np.testing.assert_array_equal(images, other_images)
        np.testing.assert_array_equal(keypoints, other_keypoints)


def test_an_epoch_has_every_frame_once_in_an_order_of_its_own(sample, camera, mirror_only):
    dataset = dataset_of(sample, camera, count=10)
    frames = [xu.read_image(p) for p in sample[0][:10]]
    number = {}
    for i, frame in enumerate(frames):
        number[frame.tobytes()] = i
        number[frame[:, ::-1].tobytes()] = i  # mirrored
    orders = []
    for _ in range(3):
        orders.append([number[image.tobytes()] for b in range(3) for image in dataset[b][0]])
        next_epoch(dataset)
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != list(range(10))


def test_only_augmented_frames_differ_from_epoch_to_epoch(sample, camera):
    for augmented in (True, False):
        dataset = dataset_of(sample, camera, augmented=augmented)
        before = dataset[0]
        next_epoch(dataset)
        assert np.array_equal(dataset[0][0], before[0]) is not augmented
        assert np.array_equal(dataset[0][1], before[1]) is not augmented


def test_workers_share_a_batch_without_overlap(sample, camera):
    whole = dataset_of(sample, camera, augmented=False)[1][0]
    parts = [dataset_of(sample, camera, augmented=False, shard=(k, 2))[1][0] for k in (0, 1)]
    np.testing.assert_array_equal(parts[0], whole[0::2])
    np.testing.assert_array_equal(parts[1], whole[1::2])


def test_frames_and_keypoints_at_half_the_size(sample, camera):
    whole, positions = dataset_of(sample, camera, augmented=False)[0]
    images, keypoints = dataset_of(sample, camera, augmented=False, size=128)[0]
    assert images.shape == (4, 128, 128, 3)
    np.testing.assert_allclose(keypoints[:, :8, :2], positions[:, :8, :2] / 2, atol=1e-4)
    np.testing.assert_array_equal(keypoints[..., 2], positions[..., 2])
    assert np.abs(images - whole.reshape(4, 128, 2, 128, 2, 3).mean((2, 4))).max() <= 1


def test_squares_cut_around_the_ship(sample, camera):
    """Each square is a part of its frame and of the black around it; keypoints move with it."""
    plain = {"count": 64, "batch_size": 64, "augmented": False}
    whole, positions = dataset_of(sample, camera, **plain)[0]
    squares, keypoints = dataset_of(sample, camera, **plain, size=96, crop=True)[0]
    assert squares.shape == (64, 96, 96, 3)
    beyond = 0
    for frame, square, before, after in zip(whole, squares, positions, keypoints):
        left, top = np.round(before[0, :2] - after[0, :2]).astype(int)
        beyond += min(left, top, 160 - left, 160 - top) < 0
        assert -48 <= left <= 208 and -48 <= top <= 208
        wide = np.pad(frame, ((48, 48), (48, 48), (0, 0)))
        np.testing.assert_array_equal(square, wide[top + 48 :, left + 48 :][:96, :96])
        shown = before[:, 0] != -1e4
        np.testing.assert_allclose(after[shown, :2], before[shown, :2] - [left, top], atol=1e-4)
        np.testing.assert_array_equal(after[:, 2], xu.in_frame(after[:, :2], 96, 96))
    assert 5 < beyond < 45
    held = xu.in_frame(keypoints[:, :8, :2].mean(1), 96, 96)
    assert held.mean() > 0.95


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"size": 512, "crop": True}, "size"),
        ({"size": 0}, "size"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 3, "shard": (0, 2)}, "batch_size"),
        ({"count": 0}, "0 frames"),
    ],
)
def test_bad_arguments_are_refused(sample, camera, arguments, message):
    with pytest.raises(ValueError, match=message):
        dataset_of(sample, camera, **arguments)


def test_more_frames_than_matrices(sample, camera):
    with pytest.raises(ValueError, match="3 frames, 2 matrices"):
        xu.make_dataset(sample[0][:3], sample[1][:2], *camera)


def test_a_frame_whose_ship_has_passed_the_camera_is_left_out_and_named(sample, camera, capsys):
    paths, matrices = sample[0][:3], np.array(sample[1][:3])
    matrices[1] = xu.transformation_from_pose(camera[0], np.eye(4))  # the ship sits in the camera
    kept, left = xu.skip_behind_camera(paths, matrices, camera[0])
    assert kept == [paths[0], paths[2]]
    np.testing.assert_array_equal(left, matrices[[0, 2]])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(str(paths[1])) and "skipped" in line

    assert len(xu.make_dataset(paths, matrices, *camera, batch_size=1)) == 2
    with pytest.raises(ValueError, match="in no frame is the target in front of the camera"):
        xu.skip_behind_camera(paths[1:2], matrices[1:2], camera[0])


def test_a_bad_frame_in_a_batch_is_named(folder, camera):
    (folder / "1.jpg").write_text("hello")
    Image.new("RGB", (200, 256)).save(folder / "2.jpg")
    dataset = xu.make_dataset(*xu.load_dataset(folder), *camera, batch_size=1, augmented=False)
    for index, message in ((1, "1.jpg"), (2, "2.jpg.*256x256")):
        with pytest.raises(ValueError, match=message):
            dataset[index]


# ------------------------------------------------------------ mirror


def test_half_the_frames_are_mirrored_with_identities_swapped(sample, camera, mirror_only):
    dataset = dataset_of(sample, camera, count=32, batch_size=32)
    frames = np.stack([xu.read_image(p) for p in sample[0][:32]])
    mirrored = 0
    for image, keypoints in zip(*dataset[0]):
        upright = (frames == image).all((1, 2, 3))
        turned = (frames[:, :, ::-1] == image).all((1, 2, 3))
        assert upright.sum() + turned.sum() == 1
        matrix = sample[1][np.argmax(upright | turned)]
        if turned.any():
            matrix = xu.mirror_transformation(matrix)
        corners = xu.keypoints_of([matrix], *camera)[0]
        np.testing.assert_allclose(keypoints[:8, :2], corners, atol=1e-3)
        shown = xu.front_facing([matrix], camera[0])[0]
        np.testing.assert_array_equal(keypoints[:, 0] == -1e4, ~shown)
        expected = xu.keypoints_of([matrix], *camera, points=xu.KEYPOINTS)[0]
        np.testing.assert_allclose(keypoints[shown, :2], expected[shown], atol=1e-3)
        mirrored += turned.any()
    assert 8 <= mirrored <= 24


def test_frames_are_randomised_as_they_are_on_disk(sample, camera, K):
    """That is before the augmentation, with their own poses and their own random numbers."""
    seen = []

    def randomise(image, pose, K, rng):
        seen.append((image.copy(), pose, K, rng.random()))
        return np.zeros_like(image)

    dataset = dataset_of(
        sample, camera, count=8, batch_size=8, seed=3, randomise=randomise, shares=(1, 0)
    )
    images, _ = dataset[0]
    frames = {xu.read_image(path).tobytes(): matrix for path, matrix in zip(*sample)}
    assert len(seen) == 8 and images.mean() < 40
    for image, pose, got, _ in seen:
        expected = xu.pose_in_camera(camera[0], frames[image.tobytes()])
        np.testing.assert_allclose(pose, expected, atol=1e-12)
        np.testing.assert_allclose(got, K)
    before = [random for *_, random in seen]
    dataset[0]
    assert before == [random for *_, random in seen[8:]] and len(set(before)) == 8


# ------------------------------------------------------------ augmentation


MOTION = A.Affine(rotate=(37, 37), scale=(0.9, 0.9), translate_px={"x": (7, 7), "y": (-4, -4)}, p=1)


def dot(x, y, size=256):
    """A frame with a bright spot at a continuous position."""
    spot = xu.gaussian_heatmaps([[x, y]], size, 3.0) * 255
    return np.repeat(np.round(spot), 3, -1).astype(np.uint8)


def centroid(image):
    """Continuous (x, y) of the brightness."""
    weight = image[..., 0].astype(float)
    y, x = np.indices(weight.shape) + 0.5
    return np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()


def moved(transform, *points, image=None):
    """The picture and the keypoints after `xu.augment` with one transform."""
    pipeline = A.Compose([transform], keypoint_params=KEYPOINT_PARAMS, seed=0)
    return xu.augment(dot(100, 100) if image is None else image, points, pipeline)


@pytest.mark.parametrize(
    "transform",
    [
        A.Affine(rotate=(90, 90), p=1),
        A.Affine(rotate=(180, 180), p=1),
        A.Affine(rotate=(-33, -33), p=1),
        A.Affine(scale=(0.8, 0.8), p=1),
        A.Affine(scale=(1.25, 1.25), p=1),
        A.Affine(translate_px={"x": (10, 10), "y": (-7, -7)}, p=1),
        MOTION,
    ],
    ids=["quarter", "half", "turn", "shrink", "grow", "shift", "all"],
)
@pytest.mark.parametrize("position", [(100.5, 140.5), (88.3, 171.9)])
def test_keypoints_move_with_the_picture(transform, position):
    image, keypoints = moved(transform, position, image=dot(*position))
    assert np.abs(centroid(image) - keypoints[0]).max() < 0.1
    assert np.abs(keypoints[0] - position).max() > 1


def test_keypoints_move_with_the_picture_under_the_project_s_own_motion():
    moves = 0
    for seed in range(20):
        motion = xu.augmentation().transforms[:1]
        transform = A.Compose(motion, keypoint_params=KEYPOINT_PARAMS, seed=seed)
        image, keypoints = xu.augment(dot(120.3, 140.8), [(120.3, 140.8)], transform)
        assert np.abs(centroid(image) - keypoints[0]).max() < 0.15
        moves += np.abs(keypoints[0] - (120.3, 140.8)).max() > 1
    assert 6 <= moves <= 18


def test_a_turn_is_about_the_frame_s_centre_and_drops_no_keypoint():
    _, keypoints = moved(A.Affine(rotate=(180, 180), p=1), (100.0, 90.0), (128.0, 128.0))
    np.testing.assert_allclose(keypoints, [(156, 166), (128, 128)], atol=1e-3)
    shift = A.Affine(translate_px={"x": (200, 200), "y": (0, 0)}, p=1)
    _, keypoints = moved(shift, (-500.0, 90.0), (100.0, 100.0))
    np.testing.assert_allclose(keypoints, [(-300, 90), (300, 100)], atol=1e-3)


def test_colours_blur_noise_and_compression_leave_keypoints_alone():
    transform = A.Compose(xu.augmentation().transforms[1:], keypoint_params=KEYPOINT_PARAMS, seed=3)
    for _ in range(10):
        _, keypoints = xu.augment(dot(90, 90), [(90.25, 80.5), (-40, 300)], transform)
        np.testing.assert_allclose(keypoints, [(90.25, 80.5), (-40, 300)], atol=1e-4)


def test_a_mirrored_dot_is_at_its_mirrored_keypoint():
    keypoints = xu.mirror_keypoints(np.array([[88.3, 171.9]]), 256, [0])
    assert np.abs(centroid(dot(88.3, 171.9)[:, ::-1]) - keypoints[0]).max() < 0.01


# ------------------------------------------------------------ writing files


def test_two_writers_of_one_file_in_one_process_have_temporary_files_of_their_own(tmp_path):
    path = tmp_path / "a.txt"
    with xu.part_files(path) as (first,), xu.part_files(path) as (second,):
        first.write_text("first")
        second.write_text("second")
    assert first != second and path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error", [OSError("the camera is gone"), FileNotFoundError(2, "No file", "7.jpg")]
)
def test_an_error_of_the_block_is_not_changed(tmp_path, error):
    with pytest.raises(type(error)) as caught, xu.part_files(tmp_path / "a.mp4"):
        raise error
    assert caught.value is error and not list(tmp_path.iterdir())
