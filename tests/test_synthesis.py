"""Domain randomisation: what is changed, what stays, and what decides it."""

import numpy as np
import pytest

import xwing_utils as xu
from xwing import mesh as meshes
from xwing import scenery, synthesis

PLAIN = synthesis.Light(np.array([0.0, 0, 1]), 1.0, strength=0.0, shadows=False, shine=0.0, exponent=1.0)


@pytest.fixture(scope="module")
def ship(root):
    return meshes.load_mesh(root / "data" / "xwing.obj")


@pytest.fixture(scope="module")
def randomiser(ship):
    return synthesis.Randomiser(ship)


@pytest.fixture(scope="module")
def frames(sample, camera):
    """Eight frames of data/sample: images and poses."""
    return [(xu.read_image(path), xu.pose_in_camera(camera[0], matrix)) for path, matrix in zip(*sample)][:8]


@pytest.fixture
def fixed(monkeypatch):
    """A function: light, paint (9, 3) -> nothing is random any more but the background."""
    def fix(light=PLAIN, paint=1.0):
        monkeypatch.setattr(synthesis, "random_light", lambda rng: light)
        monkeypatch.setattr(synthesis, "random_paint", lambda n, rng: np.ones((n, 3)) * paint)
    return fix


def samples(ship, pose, K, width=256, height=256):
    """(H, W, 4) the triangles that show in the four quarters of each pixel, -1 where none does."""
    ids, _ = meshes.rasterise(ship.triangles, pose, K * [[2], [2], [1]], 2 * width, 2 * height)
    return ids.reshape(height, 2, width, 2).swapaxes(1, 2).reshape(height, width, 4)


def test_the_state_of_the_generator_decides_the_frame(randomiser, frames, K):
    for k, (image, pose) in enumerate(frames):
        first, again, other = (randomiser(image, pose, K, np.random.default_rng(s)) for s in (k, k, k + 100))
        assert first.shape == image.shape and first.dtype == np.uint8
        np.testing.assert_array_equal(first, again)
        assert (first != other).mean() > 0.5


def test_plain_light_and_true_paint_leave_the_ship_as_it_is(randomiser, frames, ship, K, fixed):
    fixed()
    for image, pose in frames[:4]:
        changed, ids = randomiser(image, pose, K, np.random.default_rng(1)), samples(ship, pose, K)
        kept, gone = (ids >= 0).all(-1), (ids < 0).all(-1)
        same = np.abs(changed[kept].astype(int) - image[kept]).max(1) <= 1
        assert kept.sum() > 200 and same.mean() > 0.998  # slivers that hardly ever show are left out
        assert np.abs(changed[gone].astype(int) - image[gone]).mean() > 10


def test_paint_multiplies_the_pixels_of_its_material(randomiser, frames, ship, K, fixed):
    hull, paint = ship.names.index("hull"), np.ones((len(ship.names), 3))
    paint[hull] = (0.5, 0.25, 0.0)
    fixed(paint=paint)
    for _, pose in frames[:4]:
        changed = randomiser(np.full((256, 256, 3), 200, np.uint8), pose, K, np.random.default_rng(1))
        ids = samples(ship, pose, K)
        painted = (ship.face_materials[ids] == hull) & (ids >= 0)
        whole, none = painted.all(-1), (~painted & (ids >= 0)).all(-1)
        assert whole.sum() > 10 and none.sum() > 10
        assert np.abs(changed[whole] - [100.0, 50, 0]).max() <= 1
        assert np.abs(changed[none] - 200.0).max() <= 1


def test_light_falls_by_the_cosine(randomiser, frames, ship, K, fixed):
    """Every pixel's brightness is that of its triangle's angle to the sun."""
    sun = np.array([0.36, -0.48, -0.8])  # from behind the camera
    fixed(synthesis.Light(sun, 0.2, 0.6, shadows=False, shine=0.0, exponent=1.0))
    for _, pose in frames[:4]:
        changed = randomiser(np.full((256, 256, 3), 200, np.uint8), pose, K, np.random.default_rng(1))
        ids = samples(ship, pose, K)
        whole = (ids >= 0).all(-1) & (ids == ids[..., :1]).all(-1)
        a, b, c = np.moveaxis((ship.triangles @ pose[:3, :3].T + pose[:3, 3])[ids[whole][:, 0]], 1, 0)
        normals = np.cross(b - a, c - a)
        normals *= -np.sign((normals * a).sum(1, keepdims=True))  # towards the camera
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        expected = 200 * (0.2 + 0.6 * np.clip(normals @ sun, 0, None))
        assert whole.sum() > 30 and np.abs(changed[whole][:, 0] - expected).max() <= 1


def test_a_sun_s_shadows_only_darken(randomiser, frames, K, fixed):
    shaded = 0
    for _, pose in frames:
        image, pictures = np.full((256, 256, 3), 100, np.uint8), []
        for shadows in (False, True):
            fixed(synthesis.Light(np.array([0.6, 0, -0.8]), 0.3, 1.0, shadows, 0.0, 1.0))
            pictures.append(randomiser(image, pose, K, np.random.default_rng(1)).astype(int))
        assert (pictures[1] <= pictures[0]).all()
        shaded += (pictures[1] < pictures[0] - 20).any(-1).sum()
    assert shaded > 50


def test_highlights_only_brighten(randomiser, frames, K, fixed):
    shining = 0
    for _, pose in frames:
        image, pictures = np.full((256, 256, 3), 50, np.uint8), []
        for shine in (0.0, 150.0):
            fixed(synthesis.Light(np.array([0.0, 0, -1]), 1.0, 0.0, False, shine, 4.0))
            pictures.append(randomiser(image, pose, K, np.random.default_rng(1)).astype(int))
        assert (pictures[1] >= pictures[0]).all()
        shining += (pictures[1] > pictures[0] + 50).any(-1).sum()
    assert shining > 200


def test_a_ship_out_of_sight_leaves_a_background(randomiser, K):
    pose = np.eye(4)
    pose[:3, 3] = 5, 0, 1
    image = np.full((256, 256, 3), 7, np.uint8)
    assert (randomiser(image, pose, K, np.random.default_rng(0)) != 7).mean() > 0.5


def test_a_ship_round_the_camera_is_drawn(randomiser, K):
    image, pose = np.full((256, 256, 3), 128, np.uint8), np.eye(4)
    changed = randomiser(image, pose, K, np.random.default_rng(0))
    assert changed.shape == image.shape and changed.std() > 0


def test_frames_of_any_size_and_lens(randomiser, frames, ship, fixed):
    fixed()
    K = np.array([[300.0, 3, 170], [0, 280, 60], [0, 0, 1]])
    for _, pose in frames[:3]:
        image = np.random.default_rng(0).integers(0, 256, (150, 320, 3)).astype(np.uint8)
        changed = randomiser(image, pose, K, np.random.default_rng(1))
        kept = (samples(ship, pose, K, 320, 150) >= 0).all(-1)
        same = np.abs(changed[kept].astype(int) - image[kept]).max(1) <= 1
        assert kept.sum() > 50 and same.mean() > 0.998


@pytest.mark.parametrize("width,height", [(256, 256), (33, 70), (640, 360)])
def test_backgrounds_are_many(width, height):
    drawn = [scenery.random_background(width, height, np.random.default_rng(seed)) for seed in range(40)]
    assert all(picture.shape == (height, width, 3) and picture.dtype == np.uint8 for picture in drawn)
    means = np.array([picture.mean((0, 1)) for picture in drawn])
    assert means.min() < 40 and means.max() > 215  # dark ones and bright ones
    assert np.ptp(means, axis=1).max() > 60 and min(np.ptp(means, axis=1)) < 20  # coloured ones and grey ones


def test_batches_keep_their_labels(sample, camera, ship, monkeypatch):
    """Randomised frames come with the keypoints of the frames that they were."""
    paths, matrices = sample[0][:8], sample[1][:8]
    arguments = {"batch_size": 8, "randomise": synthesis.Randomiser(ship), "shares": (1, 0)}
    monkeypatch.setattr(xu, "augmentation", lambda seed, without: None)
    monkeypatch.setattr(xu, "augment", lambda image, keypoints, transform: (image, keypoints))
    images, keypoints = xu.make_dataset(paths, matrices, *camera, **arguments)[0]
    corners = xu.keypoints_of(matrices, *camera)
    mirrored = xu.mirror_keypoints(corners, 256)
    for image, got in zip(images, keypoints[:, :8, :2]):
        offsets = np.abs(np.concatenate([corners, mirrored]) - got).max((1, 2))
        k = offsets.argmin()
        original = xu.read_image(paths[k % 8])[:, :: 1 if k < 8 else -1]
        assert offsets[k] < 1e-3 and (image != original).mean() > 0.5


def test_frames_that_are_not_augmented_are_not_randomised(sample, camera, ship):
    paths, matrices = sample
    dataset = xu.make_dataset(paths[:4], matrices[:4], *camera, batch_size=4, augmented=False,
                              randomise=synthesis.Randomiser(ship), shares=(1, 0))
    np.testing.assert_array_equal(dataset[0][0], [xu.read_image(path) for path in paths[:4]])
