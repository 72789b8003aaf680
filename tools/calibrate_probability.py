"""Fit the constants behind `TrackedPose.probability`.

    python tools/calibrate_probability.py FOLDER

Random flights are rendered into the folder; frames that are there already are kept. They have the
look of the clip, the looks of the training frames, or other paint and light (`Randomiser`). The
tracker follows each flight at frame steps 1 to 4 in several ways: live, smoothed, without the
network after the first pose, without the pixels, with frames that are missing or black, and from
starts that are wrong on purpose, because the model needs wrong poses to learn from.

For each kind of frame a logistic model is fitted to whether the pose is right. It is judged by its
log loss on flights that are left out in turn. No frame of the repository is used.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import cv2
import joblib
import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation
from scipy.special import expit
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import render  # noqa: E402  before TensorFlow

import xwing_utils as xu  # noqa: E402
from xwing import metrics, tracking  # noqa: E402
from xwing.alignment import Aligner  # noqa: E402
from xwing.detector import Detector  # noqa: E402
from xwing.mesh import load_mesh  # noqa: E402
from xwing.synthesis import Randomiser  # noqa: E402

FLIGHTS = 10
FRAMES = 120  # of each flight
FPS = 30.0
LOOKS = ("clip", "random", "repainted")
SEED = 900
FEATURES = ("constant", "contrast", "rotation", "translation")  # of `tracking.trust_features`
RIDGE = 0.5  # penalty on the coefficients, so that none grows without bound

MISSING_PROBABILITY = 0.06  # that a gap begins in a frame
GAP_FRAMES = 6
WRONG_DEGREES = (3, 25)  # range of the standard deviation of a start that is slightly wrong
WRONG_DISTANCE = 0.042570  # diameters, standard deviation of its position
WRONG_START_FRAMES = 8  # tracked from each wrong start
WRONG_START_STEP = 24  # frames between two wrong starts


# ------------------------------------------------------------ flights


def random_flight(rng):
    """A `render.Flight` through points of the frame at intervals of 0.8 to 2.2 seconds."""
    seconds = np.concatenate([[0], np.cumsum(rng.uniform(0.8, 2.2, 30))])
    across = rng.uniform(-0.75, 0.75, (31, 2))
    distance = rng.uniform(0.75, 1.8, 31)
    points = np.column_stack([seconds, across, distance])

    first_roll = rng.uniform(0, 360)
    rolls = np.column_stack([seconds, first_roll + np.cumsum(rng.uniform(-120, 120, 31))])

    smoothing = rng.uniform(1.4, 2.4)
    sky = rng.choice(list(render.SKIES))
    light = rng.normal(size=3)
    sky_turn = rng.normal(0, 0.08, 3)
    return render.Flight(points, rolls, smoothing, sky, sky_turn, light / np.linalg.norm(light))


def look_of(number):
    """The look in which a flight is shown."""
    return LOOKS[number % len(LOOKS)]


def flight_frame(number, index):
    """Frame `index` of a flight in its look: (256, 256, 3) RGB, matrix, JPEG quality."""
    flight = random_flight(np.random.default_rng([SEED, number]))
    if look_of(number) != "random":
        return render.flight_frame(SEED + number, index, flight=flight)

    ship = render.renderer()
    rng = np.random.default_rng([SEED, number, 1])
    look = render.random_look(rng, ship.materials)
    turn = np.array(flight.sky_turn) * index / FPS
    look.sky_rotation = Rotation.from_rotvec(turn).as_matrix()
    look.seed += index

    matrix = render.flight_poses(flight)[index]
    return ship.frame(matrix, look), matrix, look.quality


def render_frame(folder, number, index):
    """Write a frame and its matrix, unless they are there."""
    matrix_path = folder / f"{index:03d}_mat.json"
    if matrix_path.exists():
        return
    image, matrix, quality = flight_frame(number, index)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    cv2.imwrite(str(folder / f"{index:03d}.jpg"), image[..., ::-1], options)
    matrix_path.write_text(json.dumps(matrix.tolist()), encoding="utf-8")


def load_flight(folder, number, workers):
    """Images and true poses of a flight, rendered if they are not there, and the camera matrix."""
    folder = folder / f"{number:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "camera_info.json").write_text(json.dumps(render.CAMERA), encoding="utf-8")
    jobs = (joblib.delayed(render_frame)(folder, number, index) for index in range(FRAMES))
    joblib.Parallel(n_jobs=workers)(jobs)

    paths, matrices = xu.load_dataset(folder)
    view, projection = xu.load_camera(folder)
    K = xu.camera_matrix(projection, xu.FRAME_SIZE, xu.FRAME_SIZE)
    images = [xu.read_image(path) for path in paths]
    poses = [xu.pose_in_camera(view, matrix) for matrix in matrices]

    if look_of(number) == "repainted":
        randomise = Randomiser(load_mesh(xu.XWING.mesh))
        images = [
            randomise(image, pose, K, np.random.default_rng([SEED, number, 2]))
            for image, pose in zip(images, poses)
        ]
    return images, poses, K


# ------------------------------------------------------------ tracks


def wrong_pose(pose, rng):
    """A pose that is ambiguous with the true one, or slightly wrong."""
    if rng.random() < 0.5:
        return xu.ambiguous_poses(pose)[rng.integers(1, 4)]
    unit_step = rng.normal(0, 1, 6)
    degrees = rng.uniform(*WRONG_DEGREES)
    deviations = [np.radians(degrees), WRONG_DISTANCE * xu.XWING.diameter]
    return xu.move_pose(pose, unit_step * np.repeat(deviations, 3))


def all_tracks(images, truth, K, detector, aligner, rng):
    """Track a flight in all ways: yield the name of the way, the tracked poses, the true ones."""
    for step in (1, 2, 3, 4):
        shown = images[::step]
        true = truth[::step]
        gaps = np.convolve(rng.random(len(shown)) < MISSING_PROBABILITY, np.ones(GAP_FRAMES))
        missing = gaps[: len(shown)] > 0

        for name in ("live", "network off", "gaps", "no pixels"):
            pixels = None if name == "no pixels" else aligner
            tracker = tracking.Tracker(K, FPS / step, detector, pixels, keep=True)
            frames = with_gaps(shown, missing, step) if name == "gaps" else shown
            yield f"{name}, {step}", track_frames(tracker, frames, name == "network off"), true
            if name in ("live", "no pixels"):
                yield f"{name}, smoothed, {step}", tracker.smoothed(), true

        for start in range(0, len(shown) - WRONG_START_FRAMES, WRONG_START_STEP):
            tracker = tracking.Tracker(K, FPS / step, None, aligner)
            wrong = wrong_pose(true[start], rng)
            covariance = np.eye(6) * 1e-4
            estimate = xu.PoseEstimate(wrong, covariance, True, explained_contrast=0.6)
            tracker.update_pose(estimate)

            after = slice(start + 1, start + WRONG_START_FRAMES)
            yield f"wrong start, {step}", track_frames(tracker, shown[after]), true[after]


def with_gaps(images, missing, step):
    """The images, black where they are missing, or None at odd steps."""
    images = list(images)
    for index in np.flatnonzero(missing):
        images[index] = None if step % 2 else np.zeros_like(images[index])
    return images


def track_frames(tracker, images, network_off=False):
    """The `TrackedPose` of each image; the network can be switched off after the first pose."""
    track = []
    for image in images:
        tracked = tracker.update(image)
        track.append(tracked)
        if network_off and tracked.pose is not None:
            tracker.detector = None
    return track


def measure(folder, workers):
    """A DataFrame with a row for every tracked pose of a frame that shows four corners."""
    rows = []
    detector = Detector(xu.ROOT / "weights" / "xwing.weights.h5")
    aligner = Aligner(xu.XWING)
    for number in tqdm(range(FLIGHTS), unit="flight"):
        images, truth, K = load_flight(folder, number, workers)
        rng = np.random.default_rng([SEED, number, 3])
        for name, track, true in all_tracks(images, truth, K, detector, aligner, rng):
            right = metrics.recalled([tracked.pose for tracked in track], true)
            for tracked, pose, is_right in zip(track, true, right):
                corners = xu.project_pose(xu.XWING.box, pose, K)
                if tracked.pose is not None and xu.in_frame(corners).sum() >= 4:
                    row = {"flight": number, "way": name, **measured(tracked, pose)}
                    rows.append({**row, "right": is_right})
        pd.DataFrame(rows).to_csv(folder / "rows.csv")
    return pd.DataFrame(rows)


def measured(tracked, pose):
    """The kind of a tracked pose, its squared Mahalanobis distance to the truth, its features."""
    contrast = tracked.explained_contrast
    step = xu.pose_step(pose, tracked.pose)
    features = tracking.trust_features(tracked.covariance, contrast, xu.XWING.diameter)
    return {
        "kind": f"{tracked.status}, {np.isfinite(contrast)}",
        "square": step @ np.linalg.solve(tracked.covariance, step),
        **dict(zip(FEATURES, features)),
    }


# ------------------------------------------------------------ logistic models


def fit(rows, features):
    """The coefficients (4,) of a logistic model of some features; 0 for the others."""
    used = np.isin(FEATURES, ["constant", *features])
    x = rows[list(FEATURES)].to_numpy()[:, used]
    right = rows["right"].to_numpy(float)

    def loss(w):
        z = x @ w
        value = np.logaddexp(0, z).sum() - right @ z + RIDGE * w @ w
        gradient = x.T @ (expit(z) - right) + 2 * RIDGE * w
        return value, gradient

    coefficients = np.zeros(len(FEATURES))
    coefficients[used] = minimize(loss, np.zeros(used.sum()), jac=True).x
    return coefficients


def log_loss(rows, coefficients):
    """(N,) negative log-likelihood of whether the poses are right."""
    z = rows[list(FEATURES)].to_numpy() @ coefficients
    return np.logaddexp(0, z) - rows["right"] * z


def left_out_loss(rows, features):
    """The mean log loss of a model on flights that were left out in turn."""
    losses = []
    for number, left_out in rows.groupby("flight"):
        others = rows[rows["flight"] != number]
        losses.append(log_loss(left_out, fit(others, features)))
    return pd.concat(losses).mean()


def report(rows):
    """Print, for each choice of features, the loss on flights left out and the coefficients."""
    print(rows.groupby("way")["right"].agg(frames="size", right="mean").round(3).to_string())
    for kind, group in rows.groupby("kind"):
        print(f"\n{kind}: {len(group)} frames, {(~group['right']).sum()} wrong")
        names = [name for name in FEATURES[1:] if group[name].any()]
        choices = (itertools.combinations(names, count) for count in range(len(names) + 1))
        for features in itertools.chain.from_iterable(choices):
            coefficients = ", ".join(f"{value:.2f}" for value in fit(group, features))
            print(f"  {left_out_loss(group, features):.4f}  ({coefficients})  {' '.join(features)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Fit the constants behind TrackedPose.probability."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--workers", type=int, default=-1, help="processes that render; -1 is one a core"
    )
    options = parser.parse_args()
    report(measure(options.folder, options.workers))
