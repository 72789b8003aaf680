"""Frames that are drawn or repainted while batches are made: what they show, and their seeds."""

import dataclasses
import time
from pathlib import Path

import cv2
import make_xwing
import numpy as np
import pytest
import skimage

import xwing_utils as xu
from xwing import mesh as meshes
from xwing import scenery, synthesis

PLAIN = synthesis.Light(
    np.array([0.0, 0, 1]), 1.0, strength=0.0, shadows=False, shine=0.0, exponent=1.0
)


@pytest.fixture(scope="module")
def ship(root):
    return meshes.load_mesh(root / "data" / "xwing.obj")


@pytest.fixture(scope="module")
def randomiser(ship):
    return synthesis.Randomiser(ship)


@pytest.fixture(scope="module")
def synthesiser(ship):
    return synthesis.Synthesiser(ship)


@pytest.fixture(scope="module")
def frames(sample, camera):
    """Eight frames of data/sample: images and poses."""
    return [
        (xu.read_image(path), xu.pose_in_camera(camera[0], matrix)) for path, matrix in zip(*sample)
    ][:8]


@pytest.fixture
def fixed(monkeypatch):
    """A function that fixes the light and the paint (9, 3): only the background stays random."""

    def fix(light=PLAIN, paint=1.0):
        monkeypatch.setattr(synthesis, "random_light", lambda rng: light)
        monkeypatch.setattr(synthesis, "random_paint", lambda n, rng: np.ones((n, 3)) * paint)

    return fix


def samples(ship, pose, K, width=256, height=256):
    """The triangles seen in the four quarters of each pixel (H, W, 4), -1 where there is none."""
    large = xu.crop_camera(K, scale=2)
    ids, _ = meshes.rasterise(ship.triangles, pose, large, 2 * width, 2 * height)
    return ids.reshape(height, 2, width, 2).swapaxes(1, 2).reshape(height, width, 4)


def test_the_state_of_the_generator_decides_the_frame(randomiser, frames, K):
    for k, (image, pose) in enumerate(frames):
        seeds = k, k, k + 100
        first, again, other = (
            randomiser(image, pose, K, np.random.default_rng(seed)) for seed in seeds
        )
        assert first.shape == image.shape and first.dtype == np.uint8
        np.testing.assert_array_equal(first, again)
        assert (first != other).mean() > 0.5


def test_plain_light_and_true_paint_leave_the_ship_as_it_is(randomiser, frames, ship, K, fixed):
    fixed()
    for image, pose in frames[:4]:
        changed = randomiser(image, pose, K, np.random.default_rng(1))
        ids = samples(ship, pose, K)
        kept = (ids >= 0).all(-1)
        gone = (ids < 0).all(-1)
        same = np.abs(changed[kept].astype(int) - image[kept]).max(1) <= 1
        assert kept.sum() > 200
        assert same.mean() > 0.998  # triangles that hardly ever show are not drawn
        assert np.abs(changed[gone].astype(int) - image[gone]).mean() > 10


def test_paint_multiplies_the_pixels_of_its_material(randomiser, frames, ship, K, fixed):
    hull = ship.names.index("hull")
    paint = np.ones((len(ship.names), 3))
    paint[hull] = (0.5, 0.25, 0.0)
    fixed(paint=paint)
    for _, pose in frames[:4]:
        image = np.full((256, 256, 3), 200, np.uint8)
        changed = randomiser(image, pose, K, np.random.default_rng(1))
        ids = samples(ship, pose, K)
        painted = (ship.face_materials[ids] == hull) & (ids >= 0)
        whole = painted.all(-1)
        none = (~painted & (ids >= 0)).all(-1)
        assert whole.sum() > 10 and none.sum() > 10
        assert np.abs(changed[whole] - [100.0, 50, 0]).max() <= 1
        assert np.abs(changed[none] - 200.0).max() <= 1


def test_light_falls_by_the_cosine(randomiser, frames, ship, K, fixed):
    """The angle of a triangle to the sun gives the brightness of its pixels."""
    sun = np.array([0.36, -0.48, -0.8])  # from behind the camera
    fixed(synthesis.Light(sun, 0.2, 0.6, shadows=False, shine=0.0, exponent=1.0))
    for _, pose in frames[:4]:
        image = np.full((256, 256, 3), 200, np.uint8)
        changed = randomiser(image, pose, K, np.random.default_rng(1))
        ids = samples(ship, pose, K)
        whole = (ids >= 0).all(-1) & (ids == ids[..., :1]).all(-1)
        triangles = ship.triangles @ pose[:3, :3].T + pose[:3, 3]
        a, b, c = np.moveaxis(triangles[ids[whole][:, 0]], 1, 0)
        normals = np.cross(b - a, c - a)
        normals *= -np.sign((normals * a).sum(1, keepdims=True))  # towards the camera
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        expected = 200 * (0.2 + 0.6 * np.clip(normals @ sun, 0, None))
        assert whole.sum() > 30 and np.abs(changed[whole][:, 0] - expected).max() <= 1


def test_a_sun_s_shadows_only_darken(randomiser, frames, K, fixed):
    shaded = 0
    for _, pose in frames:
        image = np.full((256, 256, 3), 100, np.uint8)
        pictures = []
        for shadows in (False, True):
            fixed(synthesis.Light(np.array([0.6, 0, -0.8]), 0.3, 1.0, shadows, 0.0, 1.0))
            pictures.append(randomiser(image, pose, K, np.random.default_rng(1)).astype(int))
        assert (pictures[1] <= pictures[0]).all()
        shaded += (pictures[1] < pictures[0] - 20).any(-1).sum()
    assert shaded > 50


def test_highlights_only_brighten(randomiser, frames, K, fixed):
    shining = 0
    for _, pose in frames:
        image = np.full((256, 256, 3), 50, np.uint8)
        pictures = []
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
    image = np.full((256, 256, 3), 128, np.uint8)
    changed = randomiser(image, np.eye(4), K, np.random.default_rng(0))
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
    drawn = [
        scenery.random_background(width, height, np.random.default_rng(seed)) for seed in range(40)
    ]
    assert {picture.shape for picture in drawn} == {(height, width, 3)}
    assert {picture.dtype for picture in drawn} == {np.dtype(np.uint8)}
    means = np.array([picture.mean((0, 1)) for picture in drawn])
    saturation = np.ptp(means, axis=1)
    assert means.min() < 40 and means.max() > 215  # dark ones and bright ones
    assert saturation.max() > 60 and saturation.min() < 20  # coloured ones and grey ones


def test_batches_keep_their_labels(sample, camera, ship, monkeypatch):
    """Randomised frames keep the keypoints of the original frames."""
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
    dataset = xu.make_dataset(
        paths[:4],
        matrices[:4],
        *camera,
        batch_size=4,
        augmented=False,
        randomise=synthesis.Randomiser(ship),
        shares=(1, 0),
    )
    np.testing.assert_array_equal(dataset[0][0], [xu.read_image(path) for path in paths[:4]])


# ------------------------------------------------------------ synthetic squares


def draw(synthesiser, seed, size=128, frame=256):
    return synthesiser(size, np.random.default_rng([0, seed]), frame)


def test_the_state_of_the_generator_decides_the_square(synthesiser):
    for seed in range(8):
        image, pose, K = draw(synthesiser, seed)
        assert image.shape == (128, 128, 3) and image.dtype == np.uint8
        for first, again in zip((image, pose, K), draw(synthesiser, seed)):
            np.testing.assert_array_equal(first, again)
        other_image, other_pose, _ = draw(synthesiser, seed + 100)
        assert (image != other_image).mean() > 0.1 and np.abs(pose - other_pose).max() > 0.01
        xu.check_camera_matrix(K)
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-9)


def test_a_mesh_in_other_units_gives_the_same_squares(ship, synthesiser):
    """All lengths are in diameters. A factor of 1,024 is exact in floating point."""
    scaled = dataclasses.replace(ship, vertices=1024 * ship.vertices)
    other = synthesis.Synthesiser(scaled)
    for seed in range(16):
        image, pose, K = draw(synthesiser, seed)
        other_image, other_pose, other_K = draw(other, seed)
        np.testing.assert_array_equal(image, other_image)
        np.testing.assert_array_equal(xu.scale_pose(pose, 1024), other_pose)
        np.testing.assert_array_equal(K, other_K)


def test_a_mesh_in_other_units_is_repainted_alike(ship, randomiser, frames, K):
    other = synthesis.Randomiser(dataclasses.replace(ship, vertices=1024 * ship.vertices))
    for seed, (image, pose) in enumerate(frames):
        changed = randomiser(image, pose, K, np.random.default_rng(seed))
        scaled = xu.scale_pose(pose, 1024)
        again = other(image, scaled, K, np.random.default_rng(seed))
        np.testing.assert_array_equal(changed, again)


@pytest.fixture
def silhouettes(monkeypatch):
    """Squares show a white ship in the dark."""
    monkeypatch.setattr(synthesis, "TAME_FRACTION", 1.0)
    monkeypatch.setattr(synthesis, "random_light", lambda rng, tame: PLAIN)
    monkeypatch.setattr(
        synthesis, "random_colours", lambda true, rng, tame: np.full(true.shape, 100.0)
    )
    monkeypatch.setattr(
        scenery, "random_background", lambda w, h, rng, tame: np.zeros((h, w, 3), np.uint8)
    )
    monkeypatch.setattr(
        scenery, "expose", lambda light, rng, tame: np.uint8(255 * light.clip(0, 1))
    )


@pytest.mark.parametrize("size,frame", [(128, 256), (64, 64), (256, 256)])
def test_the_truth_fits_the_drawing(synthesiser, ship, silhouettes, size, frame):
    """A ship covers exactly the pixels that the mesh covers at its pose."""
    whole = 0
    for seed in range(30):
        image, pose, K = draw(synthesiser, seed, size, frame)
        expected = (samples(ship, pose, K, size, size) >= 0).any(-1)
        near = cv2.dilate(expected.astype(np.uint8), np.ones((3, 3))).astype(bool)
        drawn = image[..., 0] > 0
        assert not (drawn & ~near).any()
        # The others are cut by the border of the frame, or outside it.
        whole += (drawn & expected).sum() > 0.93 * expected.sum() > 0
    assert whole > 15


def test_squares_show_the_ship_whole_or_cut_near_and_far(synthesiser):
    squares = [draw(synthesiser, seed) for seed in range(100)]
    corners = [xu.project_pose(xu.BOUNDING_BOX, pose, K) for _, pose, K in squares]
    inside = xu.in_frame(corners, 128, 128).sum(1)
    span = np.ptp(corners, axis=1).max(1)
    assert 20 < (inside == 8).sum() < 90 and (inside < 4).sum() >= 1 and (inside > 0).mean() > 0.9
    assert span.min() < 40 and span.max() > 120


def test_squares_come_fast(synthesiser):
    spent = []
    for seed in range(40):
        start = time.thread_time()
        draw(synthesiser, seed)
        spent.append(time.thread_time() - start)
    assert np.median(spent) < 0.04


def test_squares_are_dark_bright_and_coloured(synthesiser):
    images = np.stack([draw(synthesiser, seed)[0] for seed in range(60)]).astype(float)
    means = images.mean((1, 2))
    assert means.mean(1).min() < 15 and means.mean(1).max() > 120
    assert np.ptp(means, axis=1).max() > 40


def test_other_things_stand_before_and_behind_the_ship(synthesiser):
    rng = np.random.default_rng(0)
    depths = []
    _, pose, K = draw(synthesiser, 0)
    for _ in range(40):
        corners, colours, openness = synthesiser._thing(pose, K, 128, rng)
        assert len(corners) == len(colours) == len(openness) > 0 and colours.shape[1] == 3
        depths.append(corners[..., 2].mean() / pose[2, 3])
    assert min(depths) < 0.75 and max(depths) > 1.3


def test_solids_turn_their_outer_sides_outwards(synthesiser):
    for triangles, groups in synthesiser.solids:
        normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
        assert ((triangles.mean(1) - triangles.mean((0, 1))) * normals).sum(1).min() > -1e-9
        assert len(groups) == len(triangles)


def test_pictures_come_with_scikit_image_and_are_not_those_of_the_shifted_set():
    there = {path.name for path in (Path(skimage.__file__).parent / "data").iterdir()}
    assert set(scenery.PICTURES) <= there
    assert not {"hubble_deep_field.jpg", "moon.png", "gravel.png"} & set(scenery.PICTURES)


SHEET = "v 0 0 0\nv .1 0 0\nv 0 .1 0\nv .1 .1 .05\nf 1 2 3\nf 2 4 3\n"


@pytest.mark.parametrize("text", [SHEET, None], ids=["sheet", "grey"])
def test_any_mesh_is_drawn(tmp_path, root, text):
    """Two triangles, and the ship without its materials."""
    path = tmp_path / "a.obj"
    lines = (root / "data" / "xwing.obj").read_text().splitlines()
    path.write_text(text or "\n".join(line for line in lines if line[:2] in ("v ", "f ")))
    other = synthesis.Synthesiser(meshes.load_mesh(path))
    assert all(draw(other, seed)[0].std() > 0 for seed in range(10))


def test_meshes_that_cannot_be_drawn(ship, monkeypatch):
    many = dataclasses.replace(ship, faces=np.tile(ship.faces, (200, 1)))
    with pytest.raises(ValueError, match="at most 200,000 triangles.* got 1,208,400.*simplify"):
        synthesis.Synthesiser(many)
    vertices = ship.vertices.copy()
    vertices[7, 1] = np.nan
    with pytest.raises(ValueError, match="1 not finite"):
        synthesis.Randomiser(dataclasses.replace(ship, vertices=vertices))


# ------------------------------------------------------------ several shapes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """One ship with open wings and long cannons: a list of its mesh and target."""
    folder = tmp_path_factory.mktemp("shapes")
    shape = make_xwing.Shape(s_foils=13, cannon_length=1.4, wing_shift=0.02)
    make_xwing.write(folder, shape, "000")
    return synthesis.read_shapes(folder, xu.XWING)


@pytest.fixture(scope="module")
def varied(synthesiser, shapes):
    """Draws the other shape only."""
    return synthesis.ShapeSynthesiser(synthesiser, xu.XWING, shapes, 1.0)


def test_a_share_of_the_squares_shows_other_shapes(varied, shapes, monkeypatch):
    monkeypatch.setattr(varied, "share", 0.5)
    drawn = [draw(varied, seed, 32, 64)[3] for seed in range(60)]
    others = sum(target is shapes[0][1] for target in drawn)
    assert 15 < others < 45 and drawn.count(xu.XWING) == 60 - others


def test_without_other_shapes_the_squares_stay_the_same(synthesiser):
    same = synthesis.ShapeSynthesiser(synthesiser, xu.XWING, [], 0.0)
    for seed in range(4):
        *square, target = draw(same, seed)
        assert target is xu.XWING
        for first, again in zip(draw(synthesiser, seed), square):
            np.testing.assert_array_equal(first, again)


def test_another_shape_fits_its_drawing_and_its_keypoints(
    varied, shapes, ship, silhouettes, camera
):
    """Squares show the other mesh, and a batch has the keypoints of the other target."""
    ((mesh, target),) = shapes
    seen = []

    def recorded(*arguments):
        seen.append(varied(*arguments))
        return seen[-1]

    options = {"batch_size": 8, "size": 128, "crop": True, "epoch_size": 8, "shares": (0, 1)}
    dataset = xu.make_dataset([], [], *camera, synthesise=recorded, **options)
    _, batch = dataset[0]
    unlike_the_film_s = 0
    for (image, pose, K, drawn), keypoints in zip(seen, batch):
        assert drawn is target
        facing = xu.front_facing([pose], xu.OPENCV, target=target)[0]
        expected = xu.project_pose(target.keypoints, pose, K)
        np.testing.assert_allclose(keypoints[facing, :2], expected[facing], atol=1e-3)
        assert (keypoints[~facing, :2] < -1000).all()

        white = image[..., 0] > 0
        covered = [(samples(m, pose, K, 128, 128) >= 0).any(-1) for m in (mesh, ship)]
        near = [cv2.dilate(c.astype(np.uint8), np.ones((3, 3))).astype(bool) for c in covered]
        assert not (white & ~near[0]).any()
        unlike_the_film_s += (white & ~near[1]).any()
    assert unlike_the_film_s > 4


def test_shapes_that_cannot_be_drawn(synthesiser, shapes, tmp_path):
    for share, others in ((1.5, shapes), (float("nan"), shapes), (0.5, [])):
        with pytest.raises(ValueError, match="share: expected 0 to 1, and shapes"):
            synthesis.ShapeSynthesiser(synthesiser, xu.XWING, others, share)
    with pytest.raises(FileNotFoundError, match="no JSON files of shapes"):
        synthesis.read_shapes(tmp_path, xu.XWING)
    fewer = dataclasses.replace(xu.XWING, names=xu.XWING.names[:-1])
    with pytest.raises(ValueError, match="expected the 35 keypoints of X-wing, got 36"):
        synthesis.read_shapes(shapes[0][1].mesh.parent, fewer)


# ------------------------------------------------------------ mixed batches


def mixed(sample, camera, shares, count=64, **arguments):
    """A dataset in which every pixel of a randomised frame is 1 and of a drawn square 2."""
    pose = xu.pose_in_camera(camera[0], sample[1][0])

    def randomise(image, pose, K, rng):
        return np.full_like(image, 1)

    def synthesise(size, rng, frame):
        return np.full((size, size, 3), 2, np.uint8), pose, xu.lens_camera(size, size)

    functions = {"randomise": randomise, "synthesise": synthesise}
    arguments = {**functions, **arguments}
    paths, matrices = sample[0][:count], sample[1][:count]
    return xu.make_dataset(paths, matrices, *camera, batch_size=16, shares=shares, **arguments)


@pytest.mark.parametrize("shares", [(0, 0), (0.25, 0.25), (0, 1), (1, 0), (0.5, 0.5)])
def test_batches_have_their_shares(sample, camera, monkeypatch, shares):
    monkeypatch.setattr(xu, "augmentation", lambda seed, without: None)
    monkeypatch.setattr(xu, "augment", lambda image, keypoints, transform: (image, keypoints))
    dataset = mixed(sample, camera, shares, epoch_size=160)
    assert len(dataset) == 10
    images = np.concatenate([dataset[i][0] for i in range(10)])
    found = [(images == value).all((1, 2, 3)).mean() for value in (1, 2)]
    random = 0 < sum(shares) and max(shares) < 1
    assert np.abs(np.subtract(found, shares)).max() < (0.1 if random else 1e-9)


def test_drawn_squares_have_the_targets_of_their_pose(sample, camera):
    dataset = mixed(sample, camera, (0, 1), count=0, epoch_size=20)
    assert len(dataset) == 2 and len(dataset[1][0]) == 4
    expected = xu.keypoints_of(sample[1][:1], *camera, points=xu.KEYPOINTS)[0]
    facing = xu.front_facing(sample[1][:1], camera[0])[0]
    for keypoints in dataset[0][1]:
        np.testing.assert_allclose(keypoints[facing, :2], expected[facing], atol=0.02)
        np.testing.assert_array_equal(keypoints[:, 2], facing & xu.in_frame(expected))
        assert (keypoints[~facing, :2] < -1000).all()


def test_drawn_batches_repeat_for_a_seed_and_never_otherwise(camera, synthesiser):
    def batch(seed, epoch, index):
        dataset = xu.make_dataset(
            [],
            [],
            *camera,
            batch_size=4,
            size=64,
            crop=True,
            synthesise=synthesiser,
            shares=(0, 1),
            epoch_size=8,
            seed=seed,
        )
        dataset.epoch = epoch
        return dataset[index][0]

    batches = [batch(*key) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    np.testing.assert_array_equal(batches[0], batch(0, 0, 0))
    assert len({image.tobytes() for images in batches for image in images}) == 16


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"shares": (0.6, 0.5)}, "shares.*1 or less together.*0.6, 0.5"),
        ({"shares": (-0.1, 0)}, "shares"),
        ({"shares": (float("nan"), 0)}, "shares"),
        ({"shares": (0, 1), "synthesise": None}, "functions"),
        ({"shares": (1, 0), "randomise": None}, "functions"),
        ({"shares": (0, 0.5), "count": 0, "epoch_size": 9}, "0 frames.*make data"),
        ({"shares": (0, 1), "count": 0}, "0 frames"),
        ({"shares": (0, 1), "count": 0, "epoch_size": 9, "augmented": False}, "0 frames"),
        ({"shares": (0, 1), "epoch_size": -1}, "epoch_size"),
    ],
)
def test_shares_that_cannot_be(sample, camera, arguments, message):
    with pytest.raises(ValueError, match=message):
        mixed(sample, camera, **arguments)


def test_augmentation_leaves_out_what_it_is_told_to():
    everything = len(xu.augmentation().transforms)
    assert len(xu.augmentation(without=["erasing", "flare"]).transforms) == everything - 2
    with pytest.raises(ValueError, match="erasing.*got rain"):
        xu.augmentation(without=["rain"])
