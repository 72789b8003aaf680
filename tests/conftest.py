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

import drjit  # noqa: E402, F401  before TensorFlow: loaded after it, the process aborts when it ends
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from scipy.spatial.transform import Rotation  # noqa: E402

import xwing_utils as xu  # noqa: E402


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
