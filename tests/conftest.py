"""Paths, environment and fixtures that several test files share."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("SM_FRAMEWORK", "tf.keras")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import cv2  # noqa: E402
import drjit  # noqa: E402, F401  before TensorFlow: loaded after it, the process aborts when it ends
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import skimage.data  # noqa: E402
import trimesh  # noqa: E402
from scipy.spatial.transform import Rotation  # noqa: E402

import xwing_utils as xu  # noqa: E402
from xwing.mesh import load_mesh, rasterise, triangle_normals  # noqa: E402


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def camera():
    """The model-view and the projection matrix of the committed sets, (4, 4) each."""
    return xu.load_camera(ROOT / "data" / "sample")


@pytest.fixture(scope="session")
def K(camera):
    return xu.camera_matrix(camera[1], 256, 256)


@pytest.fixture(scope="session")
def sample():
    """The 512 paths and model matrices (512, 4, 4) of data/sample."""
    return xu.load_dataset(ROOT / "data" / "sample")


@pytest.fixture(scope="session")
def matrices():
    """(50, 4, 4) model matrices with random rotations, the whole ship in front of the camera."""
    rng = np.random.default_rng(0)
    result = np.tile(np.eye(4), (50, 1, 1))
    result[:, :3, :3] = Rotation.random(50, rng=rng).as_matrix()
    result[:, :3, 3] = rng.uniform([-0.4, -0.4, -0.4], [0.4, 0.4, 0.3], (50, 3))
    return result


@pytest.fixture(scope="session")
def poses(camera, matrices):
    """(50, 4, 4) poses of `matrices`, model -> OpenCV camera."""
    return np.array([xu.pose_in_camera(camera[0], m) for m in matrices])


class OracleModel:
    """Replaces a network with one that knows the answer.

    In the i-th of `oracle_frames` it finds keypoints[i] (K, 2). The frames are brighter on the
    left. A frame that is brighter on the right is a mirrored one; there it finds the mirrored
    keypoints.
    """

    def __init__(self, keypoints, size=256, sigma=4.0, stride=2):
        count = keypoints.shape[1]
        self.keypoints = keypoints
        self.map_size = size // stride
        self.stride = stride
        self.target = xu.XWING
        self.settings = {"size": size, "sigma": sigma, "stride": stride, "keypoints": count}
        self.output_shape = (None, self.map_size, self.map_size, count)

    def predict_on_batch(self, images):
        numbers = np.round(images.mean((1, 2, 3)) / 20).astype(int)  # their brightness tells
        numbers = numbers.clip(max=len(self.keypoints) - 1)
        sigma = self.settings["sigma"] / self.stride
        middle = images.shape[2] // 2
        permutation = xu.heatmap_permutation(self.target, self.settings["keypoints"])
        drawn = []
        for i, image in zip(numbers, images):
            points = self.keypoints[i]
            if image[:, middle:].mean() > image[:, :middle].mean():
                points = xu.mirror_keypoints(points, self.settings["size"], permutation)
            drawn.append(xu.gaussian_heatmaps(points / self.stride, self.map_size, sigma))
        return np.stack(drawn)


@pytest.fixture
def oracle():
    """A function: keypoints (N, K, 2) -> a model that finds them in `oracle_frames`."""
    return OracleModel


@pytest.fixture
def oracle_frames():
    """A function: count, size -> frames (count, size, size, 3) uint8 for an oracle.

    The i-th has a brightness of 20 i, and 8 more in its left half.
    """

    def frames(count, size=256):
        left_half = np.repeat(np.uint8([8, 0]), size // 2)[:, None]
        plain = [np.full((size, size, 3), 20 * i, np.uint8) for i in range(count)]
        return np.stack([frame + left_half for frame in plain])

    return frames


@pytest.fixture(scope="session")
def run_python():
    """A function: code, environment variables -> the output of the code in a fresh Python."""

    def run(code, **environment):
        chosen = ("KERAS_BACKEND", "SM_FRAMEWORK")
        clean = {key: value for key, value in os.environ.items() if key not in chosen}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**clean, **environment},
            cwd=xu.ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


class Footage:
    """A clip of a textured box that the tests draw themselves, with its true poses.

    The box is one grey material to its mesh. In the frames it is printed with noise, and turns in
    front of a picture.
    """

    SIZE = 128
    CORNERS = np.array([0.8, 0.6, 0.5])  # of the box, from the origin: its middle is not there

    def __init__(self, folder, count=30):
        self.folder = folder
        self.mesh = folder / "box.obj"
        trimesh.creation.box(bounds=[np.zeros(3), self.CORNERS]).export(self.mesh)
        self.K = xu.lens_camera(self.SIZE, self.SIZE, 50)

        rng = np.random.default_rng(0)
        noise = np.uint8(rng.uniform(0, 256, (14, 14, 3)))
        self.texture = cv2.resize(noise, (280, 280), interpolation=cv2.INTER_CUBIC)
        picture = cv2.cvtColor(skimage.data.camera(), cv2.COLOR_GRAY2RGB)
        self.background = cv2.resize(picture, (self.SIZE, self.SIZE), interpolation=cv2.INTER_AREA)

        turns = np.arange(count)[:, None] * [0.2, 1.8, 0.4]  # degrees
        first = Rotation.from_euler("xyz", [25, 30, 5], degrees=True)
        self.poses = np.tile(np.eye(4), (count, 1, 1))
        rotations = Rotation.from_rotvec(turns, degrees=True) * first
        self.poses[:, :3, :3] = rotations.as_matrix()
        middles = np.array([-0.1, 0.1, 2.9]) + np.arange(count)[:, None] * [0.01, -0.006, 0.01]
        self.poses[:, :3, 3] = middles - rotations.apply(self.CORNERS / 2)
        self.images = [self.draw(pose, rng) for pose in self.poses]

    def draw(self, pose, rng, samples=3):
        """The frame (S, S, 3) uint8 of a pose (4, 4), with the noise of a camera."""
        size = samples * self.SIZE
        K = xu.crop_camera(self.K, scale=samples)
        triangles = load_mesh(self.mesh).triangles
        ids, depth = rasterise(triangles, pose, K, size, size)
        row, column = np.nonzero(ids >= 0)
        rays = np.column_stack([column + 0.5, row + 0.5, np.ones(len(row))]) @ np.linalg.inv(K).T
        points = (rays * depth[row, column, None] - pose[:3, 3]) @ pose[:3, :3]

        normals = triangle_normals(triangles)[ids[row, column]]
        across = np.abs(normals).argmax(1)  # the axis that each side looks along
        sides = 2 * across + (normals[np.arange(len(across)), across] > 0)
        flat = np.where(
            across[:, None] == [0, 1, 2], 0, points + [0.31, 0.17, 0.53] * sides[:, None]
        )
        u = flat[:, 0] + 0.7 * flat[:, 1]
        v = flat[:, 2] + 0.7 * flat[:, 1]
        printed = self.texture[(280 * v).astype(int) % 280, (280 * u).astype(int) % 280]

        frame = np.float32(cv2.resize(self.background, (size, size)))
        frame[row, column] = printed * (0.6 + 0.2 * across[:, None])
        frame = cv2.resize(frame, (self.SIZE, self.SIZE), interpolation=cv2.INTER_AREA)
        return np.uint8((frame + rng.normal(0, 2, frame.shape)).clip(0, 255))


@pytest.fixture(scope="session")
def footage(tmp_path_factory):
    """A `Footage` of 30 frames."""
    return Footage(tmp_path_factory.mktemp("box"))
