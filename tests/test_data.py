"""Sets on disk, good and bad; the batches of `make_dataset`; the renderer."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import albumentations as A
import cv2
import numpy as np
import pytest
import render
from PIL import Image
from scipy import stats

import xwing_utils as xu

pytestmark = pytest.mark.filterwarnings("ignore:Got processor for keypoints")  # pipelines of one transform
KEYPOINT_PARAMS = A.KeypointParams(format="xy", remove_invisible=False)
# The same motion every time: turn by 37 degrees, shrink, and shift.
MOTION = A.Affine(rotate=(37, 37), scale=(0.9, 0.9), translate_px={"x": (7, 7), "y": (-4, -4)}, p=1)


@pytest.fixture
def folder(root, tmp_path):
    """A copy of the first four frames of data/sample."""
    for name in ["camera_info.json", *(f"{i}.jpg" for i in range(4)), *(f"{i}_mat.json" for i in range(4))]:
        shutil.copy(root / "data" / "sample" / name, tmp_path / name)
    return tmp_path


def write_matrix(folder, value):
    (folder / "2_mat.json").write_text(value if isinstance(value, str) else json.dumps(value))


# ------------------------------------------------------------ sets on disk


@pytest.mark.parametrize("name,count", [("sample", 512), ("test", 512), ("frames", 300)])
def test_committed_sets_load(root, name, count):
    paths, matrices = xu.load_dataset(root / "data" / name)
    assert len(paths) == count and matrices.shape == (count, 4, 4)
    assert [int(p.stem) for p in paths] == list(range(count))
    assert xu.read_image(paths[-1], (256, 256)).dtype == np.uint8


def test_committed_data_stay_below_40_mb(root):
    folders = [root / "data" / name for name in ("sample", "test", "frames")]
    assert sum(f.stat().st_size for folder in folders for f in folder.iterdir()) < 40e6


@pytest.mark.parametrize("name", ["sample", "test"])
def test_poses_of_the_committed_sets_follow_the_documented_distribution(root, name):
    z = xu.load_dataset(root / "data" / name)[1][:, 2, 3]
    assert 0.4 < (z == 0).mean() < 0.6
    assert z.min() >= -0.4 and z.max() <= 0.3


def test_sample_and_test_share_no_frame(root):
    first, second = (xu.load_dataset(root / "data" / name)[1] for name in ("sample", "test"))
    assert np.abs(first[:, None] - second[None]).max((2, 3)).min() > 1e-3


def test_frames_come_in_the_order_of_their_numbers(folder):
    for i in (0, 1):
        shutil.copy(folder / f"{i}.jpg", folder / f"{10 + i}.jpg")
        shutil.copy(folder / f"{i}_mat.json", folder / f"{10 + i}_mat.json")
    assert [p.name for p in xu.load_dataset(folder)[0]] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "10.jpg", "11.jpg"]


def test_other_files_in_the_folder_are_left_alone(folder):
    (folder / "notes.txt").write_text("hello")
    shutil.copy(folder / "0.jpg", folder / "cover.jpg")
    assert len(xu.load_dataset(folder)[0]) == 4


def test_matrices_are_those_of_their_frames(folder):
    _, matrices = xu.load_dataset(folder)
    np.testing.assert_array_equal(matrices[3], json.loads((folder / "3_mat.json").read_text()))


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        xu.load_dataset(tmp_path / "nowhere")


def test_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        xu.load_dataset(tmp_path)


def test_frame_without_its_matrix(folder):
    (folder / "2_mat.json").unlink()
    with pytest.raises(FileNotFoundError, match="2_mat.json"):
        xu.load_dataset(folder)


IDENTITY = np.eye(4).tolist()


@pytest.mark.parametrize("value,message", [
    (np.diag([np.nan, 1, 1, 1]).tolist(), "NaN"),
    (np.diag([np.inf, 1, 1, 1]).tolist(), "NaN or infinite"),
    (np.eye(3).tolist(), "shape"),
    ([1, 2, 3], "shape"),
    ([[1, 2], [3]], "4x4"),
    ({"matrix": IDENTITY}, "4x4"),
    (np.diag([-1.0, 1, 1, 1]).tolist(), "mirrors"),
    (np.diag([2.0, 2, 2, 1]).tolist(), "rigid"),
    (np.diag([1.0, 1, 1, 2]).tolist(), "rigid"),
    (np.ones((4, 4)).tolist(), "rigid"),
    ([*IDENTITY[:3], [0.1, 0.2, 0.3, 1]], "rigid"),
    ("[[1, 0, 0", "JSON"),
    ("", "JSON"),
], ids=["nan", "infinite", "3x3", "flat", "ragged", "dict", "reflected", "scaled", "last-row", "singular", "transposed", "cut-off", "empty"])
def test_bad_matrix(folder, value, message):
    write_matrix(folder, value)
    with pytest.raises(ValueError, match=f"2_mat.json.*{message}"):
        xu.load_dataset(folder)


def test_camera_file_or_its_folder(root, camera):
    view, projection = xu.load_camera(root / "data" / "test" / "camera_info.json")
    np.testing.assert_array_equal([view, projection], camera)
    np.testing.assert_allclose(view, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, -1], [0, 0, 0, 1]])
    assert projection[0, 0] == projection[1, 1] == 1.9444442987442017


def test_missing_camera(tmp_path):
    with pytest.raises(FileNotFoundError, match="camera_info.json"):
        xu.load_camera(tmp_path)


@pytest.mark.parametrize("change,message", [
    ({"projection_matrix": None}, "projection_matrix"),
    ({"projection_matrix": IDENTITY}, "perspective"),
    ({"model_view_matrix": np.diag([1, -1, 1, 1]).tolist()}, "model_view_matrix.*mirrors"),
    ({"model_view_matrix": np.full((4, 4), np.nan).tolist()}, "model_view_matrix.*NaN"),
])
def test_bad_camera(folder, change, message):
    info = json.loads((folder / "camera_info.json").read_text())
    (folder / "camera_info.json").write_text(json.dumps({**info, **change}))
    with pytest.raises(ValueError, match=f"camera_info.json.*{message}"):
        xu.load_camera(folder)


@pytest.mark.parametrize("text,message", [("{}", "missing"), ("[]", "missing"), ("not json", "JSON")])
def test_camera_file_of_something_else(tmp_path, text, message):
    (tmp_path / "camera_info.json").write_text(text)
    with pytest.raises(ValueError, match=f"camera_info.json.*{message}"):
        xu.load_camera(tmp_path)


# ------------------------------------------------------------ pictures


def test_picture_is_read_as_rgb(tmp_path):
    Image.new("RGB", (32, 16), (250, 100, 10)).save(tmp_path / "0.png")
    image = xu.read_image(tmp_path / "0.png", (32, 16))
    assert image.shape == (16, 32, 3) and image.dtype == np.uint8
    assert image[0, 0].tolist() == [250, 100, 10]


def test_missing_picture(tmp_path):
    with pytest.raises(FileNotFoundError, match="7.jpg"):
        xu.read_image(tmp_path / "7.jpg")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95])
def test_truncated_jpeg(folder, share):
    data = (folder / "0.jpg").read_bytes()
    (folder / "0.jpg").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="0.jpg.*cut off"):
        xu.read_image(folder / "0.jpg")


def test_file_that_is_no_picture(tmp_path):
    (tmp_path / "0.jpg").write_text("hello")
    with pytest.raises(ValueError, match="0.jpg"):
        xu.read_image(tmp_path / "0.jpg")


@pytest.mark.parametrize("mode,name", [("L", "0.jpg"), ("CMYK", "0.jpg"), ("RGBA", "0.png"), ("P", "0.png"), ("1", "0.png")])
def test_picture_that_is_not_rgb(tmp_path, mode, name):
    Image.new(mode, (256, 256)).save(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}.*RGB.*{mode}"):
        xu.read_image(tmp_path / name)


def test_picture_of_another_size(folder):
    with pytest.raises(ValueError, match="0.jpg.*128x64.*256x256"):
        xu.read_image(folder / "0.jpg", (128, 64))


# ------------------------------------------------------------ batches


def dataset_of(sample, camera, count=8, **arguments):
    paths, matrices = sample
    return xu.make_dataset(paths[:count], matrices[:count], *camera, **{"batch_size": 4, **arguments})


@pytest.fixture
def mirror_only(monkeypatch):
    """Leaves the mirror as the only augmentation."""
    monkeypatch.setattr(xu, "augmentation", lambda seed: A.Compose([], keypoint_params=KEYPOINT_PARAMS, seed=seed))


def test_shapes_and_types_of_a_batch(sample, camera):
    dataset = dataset_of(sample, camera, count=10)
    images, keypoints = dataset[0]
    assert len(dataset) == 3 and len(dataset[2][0]) == 2
    assert images.shape == (4, 256, 256, 3) and images.dtype == np.uint8
    assert keypoints.shape == (4, xu.CHANNELS, 3) and keypoints.dtype == np.float32
    assert set(np.unique(keypoints[..., 2])) == {0, 1}


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
    assert 0.05 < outside.mean() < 0.5
    np.testing.assert_array_equal(keypoints[..., 2], ~outside)
    assert np.abs(keypoints[..., :2]).max() < 500


def test_points_that_face_away_are_put_far_outside(sample, camera):
    paths, matrices = sample
    keypoints = dataset_of(sample, camera, augmented=False)[0][1]
    hidden = ~xu.facing(matrices[:4], camera[0])
    assert hidden[:, 8:].any() and not hidden[:, 8:].all()
    np.testing.assert_array_equal((keypoints[..., :2] == -1e4).all(-1), hidden)
    assert not keypoints[hidden][:, 2].any()


def test_batches_depend_on_the_seed_and_not_on_the_order(sample, camera):
    forwards, backwards = dataset_of(sample, camera, seed=5), dataset_of(sample, camera, seed=5)
    first, second = forwards[0], forwards[1]
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
    number = {f.tobytes(): i for i, frame in enumerate(frames) for f in (frame, np.ascontiguousarray(frame[:, ::-1]))}
    orders = []
    for _ in range(3):
        orders.append([number[image.tobytes()] for b in range(3) for image in dataset[b][0]])
        dataset.on_epoch_begin()
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != list(range(10))


def test_the_next_epoch_is_another_one(sample, camera):
    dataset = dataset_of(sample, camera)
    before = dataset[0][1]
    dataset.on_epoch_begin()
    assert not np.array_equal(dataset[0][1], before)


def test_validation_frames_come_in_order_in_every_epoch(sample, camera):
    dataset = dataset_of(sample, camera, augmented=False)
    before = dataset[0]
    dataset.on_epoch_begin()
    np.testing.assert_array_equal(dataset[0][0], before[0])


def test_keypoints_are_never_dropped(sample, camera):
    for index in range(4):
        keypoints = dataset_of(sample, camera, count=32, batch_size=8)[index][1]
        assert keypoints.shape == (8, xu.CHANNELS, 3) and np.isfinite(keypoints).all()


def test_steps_shorten_an_epoch(sample, camera):
    assert len(dataset_of(sample, camera, count=8, batch_size=2, steps=3)) == 3


def test_more_steps_than_frames_are_refused_or_served(sample, camera):
    try:
        dataset = dataset_of(sample, camera, count=4, batch_size=2, steps=3)
    except ValueError as error:
        assert "steps" in str(error)
    else:
        assert len(dataset[2][0]) == 2


def test_half_the_frames_are_mirrored_with_names_swapped(sample, camera, mirror_only):
    images, keypoints = dataset_of(sample, camera, count=32, batch_size=32, shuffle=False)[0]
    plain, positions = dataset_of(sample, camera, count=32, batch_size=32, augmented=False)[0]
    mirrored = np.array([np.array_equal(a, b[:, ::-1]) for a, b in zip(images, plain)])
    assert 8 <= mirrored.sum() <= 24
    np.testing.assert_array_equal(images[~mirrored], plain[~mirrored])
    np.testing.assert_allclose(keypoints[~mirrored], positions[~mirrored], atol=1e-4)
    matrices = [xu.mirror_transformation(m) for m in sample[1][:32][mirrored]]
    np.testing.assert_allclose(keypoints[mirrored][:, :8, :2], xu.keypoints_of(matrices, *camera), atol=1e-3)
    np.testing.assert_array_equal(keypoints[mirrored][..., 0] == -1e4, ~xu.facing(matrices, camera[0]))


def test_frames_and_keypoints_at_half_the_size(sample, camera):
    whole, positions = dataset_of(sample, camera, augmented=False)[0]
    images, keypoints = dataset_of(sample, camera, augmented=False, size=128)[0]
    assert images.shape == (4, 128, 128, 3)
    np.testing.assert_allclose(keypoints[:, :8, :2], positions[:, :8, :2] / 2, atol=1e-4)
    np.testing.assert_array_equal(keypoints[..., 2], positions[..., 2])
    means = whole.reshape(4, 128, 2, 128, 2, 3).mean((2, 4))
    assert np.abs(images - means).max() <= 1


def test_squares_cut_round_the_ship(sample, camera):
    whole, positions = dataset_of(sample, camera, count=16, batch_size=16, augmented=False)[0]
    images, keypoints = dataset_of(sample, camera, count=16, batch_size=16, augmented=False, size=96, crop=True)[0]
    assert images.shape == (16, 96, 96, 3)
    for frame, square, before, after in zip(whole, images, positions, keypoints):
        left, top = np.round(before[0, :2] - after[0, :2]).astype(int)
        assert -xu.MARGIN <= left <= 160 + xu.MARGIN and -xu.MARGIN <= top <= 160 + xu.MARGIN
        wide = np.pad(frame, ((xu.MARGIN, xu.MARGIN), (xu.MARGIN, xu.MARGIN), (0, 0)))  # half of the squares may reach into black
        np.testing.assert_array_equal(square, wide[top + xu.MARGIN :, left + xu.MARGIN :][:96, :96])
        shown = before[:, 0] != -1e4
        np.testing.assert_allclose(after[shown, :2], before[shown, :2] - [left, top], atol=1e-4)
        np.testing.assert_array_equal(after[:, 2], xu.in_frame(after[:, :2], 96, 96))


def test_squares_hold_the_ship(sample, camera):
    keypoints = dataset_of(sample, camera, count=64, batch_size=64, size=128, crop=True)[0][1]
    positions = dataset_of(sample, camera, count=64, batch_size=64)[0][1]
    in_sight = xu.in_frame(positions[:, :8, :2].mean(1), 256, 256)
    held = xu.in_frame(keypoints[in_sight, :8, :2].mean(1), 128, 128)
    assert held.mean() > 0.95  # a ship at the edge of its frame may be moved out by a few pixels


def test_squares_larger_than_the_frame_are_refused(sample, camera):
    with pytest.raises(ValueError, match="size"):
        dataset_of(sample, camera, size=512, crop=True)[0]


def test_any_points_after_the_corners(sample, camera):
    points = np.concatenate([xu.BOUNDING_BOX, [[0, 0, 0]], [[0.1, 0, 0]], [[-0.1, 0, 0]]])
    keypoints = dataset_of(sample, camera, augmented=False, points=points)[0][1]
    np.testing.assert_allclose(keypoints[..., :2], xu.keypoints_of(sample[1][:4], *camera, points=points), atol=1e-4)


@pytest.mark.parametrize("points,message", [
    (np.concatenate([xu.BOUNDING_BOX, [[0.1, 0, 0]]]), "mirror image"), (xu.BOUNDING_BOX[::-1], "corners"), (np.zeros((8, 2)), "shape")])
def test_points_that_cannot_be_used(sample, camera, points, message):
    with pytest.raises(ValueError, match=message):
        dataset_of(sample, camera, points=points)


def test_a_set_without_frames(camera):
    with pytest.raises(ValueError, match="0 frames"):
        xu.make_dataset([], [], *camera)


def test_more_frames_than_matrices(sample, camera):
    with pytest.raises(ValueError, match="3 frames and 2 matrices"):
        xu.make_dataset(sample[0][:3], sample[1][:2], *camera)


def test_a_bad_frame_in_a_batch_is_named(folder, camera):
    Image.new("L", (256, 256)).save(folder / "1.jpg")
    Image.new("RGB", (200, 256)).save(folder / "2.jpg")
    dataset = xu.make_dataset(*xu.load_dataset(folder), *camera, batch_size=1, augmented=False)
    for index, message in ((1, "1.jpg.*RGB"), (2, "2.jpg.*256x256")):
        with pytest.raises(ValueError, match=message):
            dataset[index]


# ------------------------------------------------------------ augmentation


def dot(x, y, size=256):
    """A frame with a bright spot at a continuous position."""
    spot = xu.gaussian_heatmaps([[x, y]], size, 3.0) * 255
    return np.repeat(np.round(spot), 3, -1).astype(np.uint8)


def centroid(image):
    """Continuous (x, y) of the brightness."""
    weight = image[..., 0].astype(float)
    y, x = np.indices(weight.shape) + 0.5
    return np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()


@pytest.mark.parametrize("transform", [
    A.Affine(rotate=(90, 90), p=1), A.Affine(rotate=(180, 180), p=1), A.Affine(rotate=(-33, -33), p=1), A.Affine(scale=(0.8, 0.8), p=1),
    A.Affine(scale=(1.25, 1.25), p=1), A.Affine(translate_px={"x": (10, 10), "y": (-7, -7)}, p=1), MOTION,
], ids=["quarter", "half", "turn", "shrink", "grow", "shift", "all"])
@pytest.mark.parametrize("position", [(100.5, 140.5), (88.3, 171.9)])
def test_keypoints_move_with_the_picture(transform, position):
    pipeline = A.Compose([transform], keypoint_params=KEYPOINT_PARAMS, seed=0)
    image, keypoints = xu.augment(dot(*position), [position], pipeline)
    assert np.abs(centroid(image) - keypoints[0]).max() < 0.1
    assert np.abs(keypoints[0] - position).max() > 1


def test_keypoints_move_with_the_picture_under_the_project_s_own_motion():
    moved = 0
    for seed in range(20):
        transform = A.Compose(xu.augmentation().transforms[:1], keypoint_params=KEYPOINT_PARAMS, seed=seed)
        image, keypoints = xu.augment(dot(120.3, 140.8), [(120.3, 140.8)], transform)
        assert np.abs(centroid(image) - keypoints[0]).max() < 0.15
        moved += np.abs(keypoints[0] - (120.3, 140.8)).max() > 1
    assert 6 <= moved <= 18


def test_a_turn_is_about_the_frame_s_centre():
    pipeline = A.Compose([A.Affine(rotate=(180, 180), p=1)], keypoint_params=KEYPOINT_PARAMS)
    _, keypoints = xu.augment(dot(100, 100), [(100.0, 90.0), (128.0, 128.0)], pipeline)
    np.testing.assert_allclose(keypoints, [(156, 166), (128, 128)], atol=1e-3)


def test_keypoints_moved_out_of_the_frame_are_kept():
    pipeline = A.Compose([A.Affine(translate_px={"x": (200, 200), "y": (0, 0)}, p=1)], keypoint_params=KEYPOINT_PARAMS)
    _, keypoints = xu.augment(dot(100, 100), [(-500.0, 90.0), (100.0, 100.0)], pipeline)
    np.testing.assert_allclose(keypoints, [(-300, 90), (300, 100)], atol=1e-3)


def test_colours_blur_noise_and_compression_leave_keypoints_alone():
    transform = A.Compose(xu.augmentation().transforms[1:], keypoint_params=KEYPOINT_PARAMS, seed=3)
    for _ in range(10):
        _, keypoints = xu.augment(dot(90, 90), [(90.25, 80.5), (-40, 300)], transform)
        np.testing.assert_allclose(keypoints, [(90.25, 80.5), (-40, 300)], atol=1e-4)


def test_a_mirrored_dot_is_at_its_mirrored_keypoint():
    keypoints = xu.mirror_keypoints(np.array([[88.3, 171.9]]), 256, [0])
    assert np.abs(centroid(dot(88.3, 171.9)[:, ::-1]) - keypoints[0]).max() < 0.01


# ------------------------------------------------------------ renderer


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Two frames of seed 7, from one process."""
    folder = tmp_path_factory.mktemp("rendered")
    assert render.render_set(folder, 2, 7, workers=1, progress=False) == 2
    return folder


def files(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_a_rendered_set_has_the_format(rendered):
    paths, matrices = xu.load_dataset(rendered)
    assert sorted(files(rendered)) == ["0.jpg", "0_mat.json", "1.jpg", "1_mat.json", "camera_info.json", "render_info.json"]
    assert len(paths) == len(matrices) == 2 and xu.read_image(paths[0], (256, 256)).std() > 1
    assert not np.array_equal(xu.read_image(paths[0]), xu.read_image(paths[1]))


def test_rendered_camera_is_the_committed_one(rendered, camera):
    np.testing.assert_array_equal(xu.load_camera(rendered), camera)


def test_two_workers_render_the_same_files(rendered, tmp_path):
    render.render_set(tmp_path, 2, 7, workers=2, progress=False)
    assert files(tmp_path) == files(rendered)


def test_an_image_alone_is_the_same(rendered, root, tmp_path):
    render._render_pair(render.random_frame, 7, 1, tmp_path, "1", root / "data" / "xwing.obj")
    assert files(tmp_path) == {name: data for name, data in files(rendered).items() if name in ("1.jpg", "1_mat.json")}


def test_frames_of_the_committed_set_can_be_rendered_again(root):
    image, matrix, _ = render.random_frame(2, 3)
    np.testing.assert_allclose(matrix, json.loads((root / "data" / "sample" / "3_mat.json").read_text()), atol=1e-9)
    committed = xu.read_image(root / "data" / "sample" / "3.jpg")
    assert np.abs(image.astype(int) - committed).mean() < 4  # JPEG


def test_the_ship_lies_where_its_corners_say(camera):
    ship = render.renderer()
    for seed in range(4):
        rng = np.random.default_rng(seed)
        matrix = render.random_pose(rng)
        matrix[:2, 3] *= 0.4  # whole ship in the frame
        coverage = ship.ship(matrix, render.random_look(rng, ship.materials))[..., 3]
        rows, columns = np.nonzero(coverage > 0)
        vertices = np.concatenate([v[np.unique(f)] for v, f, _ in ship.mesh.values()])
        positions = xu.keypoints_of([matrix], *camera, points=vertices)[0]
        low, high = positions.min(0), positions.max(0)
        assert np.abs([columns.min() - low[0], rows.min() - low[1], columns.max() + 1 - high[0], rows.max() + 1 - high[1]]).max() < 1.5


def test_rendering_again_makes_only_what_is_missing(rendered, tmp_path):
    shutil.copytree(rendered, tmp_path / "copy")
    (tmp_path / "copy" / "1.jpg").unlink()
    (tmp_path / "copy" / "0.jpg").write_bytes(b"kept")
    assert render.render_set(tmp_path / "copy", 2, 7, workers=1, progress=False) == 1
    assert files(tmp_path / "copy") == {**files(rendered), "0.jpg": b"kept"}


def test_leftovers_of_a_killed_run_are_removed(rendered, tmp_path):
    shutil.copytree(rendered, tmp_path / "copy")
    (tmp_path / "copy" / ".1.jpg.123.part").write_bytes(b"half")
    render.render_set(tmp_path / "copy", 2, 7, workers=1, progress=False)
    assert files(tmp_path / "copy") == files(rendered)


@pytest.mark.parametrize("arguments", [{"seed": 8}, {"seed": 7, "kind": "flight"}])
def test_a_folder_of_another_set_is_refused(rendered, arguments):
    before = files(rendered)
    with pytest.raises(ValueError, match="give another folder"):
        render.render_set(rendered, 2, workers=1, progress=False, **arguments)
    assert files(rendered) == before


def test_a_folder_of_foreign_frames_is_refused(folder):
    with pytest.raises(ValueError, match="give another folder"):
        render.render_set(folder, 4, 7, workers=1, progress=False)


@pytest.mark.parametrize("count,flight", [(0, False), (301, True)])
def test_a_count_out_of_range(tmp_path, count, flight):
    with pytest.raises(ValueError, match=str(count)):
        render.render_set(tmp_path, count, 1, kind="flight" if flight else "random")


def test_a_missing_mesh(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.obj"):
        render.render_set(tmp_path / "new", 1, 1, mesh_path=tmp_path / "nothing.obj")
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------ poses of the renderer


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    return np.array([render.random_pose(rng) for _ in range(4000)])


def test_half_of_the_random_poses_have_z_zero(drawn):
    z = drawn[:, 2, 3]
    assert 0.47 < (z == 0).mean() < 0.53
    assert stats.kstest(z[z != 0], stats.uniform(-0.4, 0.7).cdf).pvalue > 0.001


def test_projected_centres_are_uniform_over_the_middle_of_the_frame(drawn, camera):
    centres = xu.keypoints_of(drawn, *camera, points=np.zeros((1, 3)))[:, 0]
    for column in centres.T:
        assert stats.kstest(column, stats.uniform(16, 224).cdf).pvalue > 0.001


def test_random_rotations_are_uniform(drawn):
    rotations = drawn[:, :3, :3]
    np.testing.assert_allclose(np.linalg.det(rotations), 1)
    for i, j in np.ndindex(3, 3):  # each entry is uniform in [-1, 1]
        assert stats.kstest(rotations[:, i, j], stats.uniform(-1, 2).cdf).pvalue > 0.001
    angle = np.arccos(np.clip((np.trace(rotations, axis1=1, axis2=2) - 1) / 2, -1, 1))
    assert stats.kstest(angle, lambda a: (a - np.sin(a)) / np.pi).pvalue > 0.001


def test_flight_matrices_are_rigid():
    flight = render.flight_poses()
    rotations = flight[:, :3, :3]
    np.testing.assert_allclose(rotations @ rotations.transpose(0, 2, 1), np.tile(np.eye(3), (300, 1, 1)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(rotations), 1)
    np.testing.assert_array_equal(flight[:, 3], np.tile([0, 0, 0, 1], (300, 1)))


def test_flight_is_smooth():
    flight = render.flight_poses()
    steps = [xu.rotation_error(a, b) for a, b in zip(flight, flight[1:])]
    moves = np.linalg.norm(np.diff(flight[:, :3, 3], axis=0), axis=1)
    assert max(steps) < 8 and moves.max() < 0.05
    assert np.abs(np.diff(moves)).max() < 0.01


def test_committed_clip_is_the_flight(root):
    np.testing.assert_allclose(xu.load_dataset(root / "data" / "frames")[1], render.flight_poses(), atol=1e-9)


def test_flight_leaves_the_frame_partly_once_and_completely_once(camera):
    mesh = xu.load_mesh(render.HERE / "xwing.obj")
    vertices = np.concatenate([v[np.unique(f)] for v, f, _ in mesh.values()])
    inside = xu.in_frame(xu.keypoints_of(render.flight_poses(), *camera, points=vertices)).mean(1)
    truncated = np.flatnonzero(inside < 1)
    times = np.split(truncated, np.flatnonzero(np.diff(truncated) > 1) + 1)
    assert [(inside[t] == 0).sum() > 0 for t in times] == [False, True]
    assert 8 <= (inside == 0).sum() <= 15


def test_committed_frames_show_the_ship_at_its_corners(root, camera):
    """Inside the hull of the corners a frame is brighter than outside it."""
    paths, matrices = xu.load_dataset(root / "data" / "frames")
    for i in (0, 60, 150):
        hull = cv2.convexHull(xu.keypoints_of(matrices[i : i + 1], *camera)[0].astype(np.float32)).astype(np.int32)
        inside = cv2.fillConvexPoly(np.zeros((256, 256), np.uint8), hull, 1).astype(bool)
        image = xu.read_image(paths[i]).mean(-1)
        assert np.percentile(image[inside], 80) > np.percentile(image[~inside], 95) + 20


def test_a_dask_cluster_renders_the_same_frames(rendered, tmp_path):
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        assert render.render_set(tmp_path / "set", 2, 7, progress=False, dask=cluster.scheduler_address) == 2
    assert files(tmp_path / "set") == files(rendered)


def test_the_shifted_look_has_the_same_poses_and_other_pictures(rendered, tmp_path):
    render.render_set(tmp_path / "set", 1, 7, kind="shifted", workers=1, progress=False)
    assert (tmp_path / "set" / "0_mat.json").read_bytes() == (rendered / "0_mat.json").read_bytes()
    assert (tmp_path / "set" / "0.jpg").read_bytes() != (rendered / "0.jpg").read_bytes()
    first, again = render.shifted_frame(7, 0), render.shifted_frame(7, 0)
    assert first[0].shape == (256, 256, 3) and first[0].dtype == np.uint8 and first[0].std() > 5
    np.testing.assert_array_equal(first[0], again[0])


def test_an_unknown_kind_is_named(tmp_path):
    with pytest.raises(ValueError, match="'noon'"):
        render.render_set(tmp_path, 1, 1, kind="noon")


def test_a_folder_of_foreign_pictures_without_matrices_is_refused(tmp_path):
    (tmp_path / "0.jpg").write_bytes(b"someone's picture")
    with pytest.raises(ValueError, match="give another folder"):
        render.render_set(tmp_path, 1, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["0.jpg"]


def test_a_share_of_the_frames_is_relit_and_the_labels_stay(sample, camera):
    mesh = xu.load_mesh(render.HERE / "xwing.obj")
    plain, never, always = (dataset_of(sample, camera, shuffle=False, seed=5, **arguments)
                            for arguments in ({}, {"mesh": mesh, "relit": 0}, {"mesh": mesh, "relit": 1}))
    unchanged = dataset_of(sample, camera, augmented=False, mesh=mesh, relit=1)
    np.testing.assert_array_equal(unchanged[0][0], dataset_of(sample, camera, augmented=False)[0][0])
    assert (always[0][0] != never[0][0]).mean() > 0.5
    assert plain[0][1].shape == always[0][1].shape
