"""The constants behind `TrackedPose.probability`: `python tools/calibrate_probability.py FOLDER`.

Random flights are rendered into the folder (those that are there are kept), in the clip's look, in the looks
of the training frames, and repainted. The tracker follows each at frame steps 1 to 4: live, smoothed, without
the network after the first pose, without the pixels, with frames missing or black, and from starts that are
wrong on purpose, so that there are wrong poses to learn from. For each kind of frame a logistic model is
fitted to whether the pose is right, and judged on flights left out in turn: log losses are printed. No frame
of the repository takes part.
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
from xwing import metrics, motion, tracking  # noqa: E402
from xwing.alignment import Aligner  # noqa: E402
from xwing.footage import Detector  # noqa: E402
from xwing.mesh import load_mesh  # noqa: E402
from xwing.synthesis import Randomiser  # noqa: E402

FLIGHTS, FRAMES, FPS = 10, 120, 30.0
LOOKS = "clip", "random", "repainted"
SEED = 900
SHIP = xu.ROOT / "data" / "xwing.obj"
FEATURES = "constant", "contrast", "rotation", "translation"  # of `tracking.trust_features`
RIDGE = 0.5  # penalty on the coefficients, so that none runs away


def random_flight(rng):
    """A `render.Flight` over points of the frame at intervals of 0.8 to 2.2 seconds."""
    seconds = np.concatenate([[0], np.cumsum(rng.uniform(0.8, 2.2, 30))])
    points = np.column_stack(
        [seconds, rng.uniform(-0.75, 0.75, (31, 2)), rng.uniform(0.75, 1.8, 31)]
    )
    rolls = np.column_stack([seconds, rng.uniform(0, 360) + np.cumsum(rng.uniform(-120, 120, 31))])
    smoothing, sky = rng.uniform(1.4, 2.4), rng.choice(list(render.SKIES))
    light, sky_turn = rng.normal(size=3), rng.normal(0, 0.08, 3)
    return render.Flight(points, rolls, smoothing, sky, sky_turn, light / np.linalg.norm(light))


def flight_frame(number, index):
    """Frame `index` of a flight in its look: (256, 256, 3) RGB, matrix, JPEG quality."""
    flight, look = random_flight(np.random.default_rng([SEED, number])), LOOKS[number % len(LOOKS)]
    if look != "random":
        return render.flight_frame(SEED + number, index, flight=flight)
    ship, rng = render.renderer(), np.random.default_rng([SEED, number, 1])
    look, matrix = render.random_look(rng, ship.materials), render.flight_poses(flight)[index]
    look.sky_rotation = Rotation.from_rotvec(np.array(flight.sky_turn) * index / FPS).as_matrix()
    look.seed += index
    return ship.frame(matrix, look), matrix, look.quality


def render_frame(folder, number, index):
    if not (folder / f"{index:03d}_mat.json").exists():
        image, matrix, quality = flight_frame(number, index)
        cv2.imwrite(
            str(folder / f"{index:03d}.jpg"), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality]
        )
        (folder / f"{index:03d}_mat.json").write_text(json.dumps(matrix.tolist()))


def load_flight(folder, number, workers):
    """Images and true poses of one flight, rendered if they are not there, and the camera matrix."""
    folder = folder / f"{number:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "camera_info.json").write_text(json.dumps(render.CAMERA))
    jobs = (joblib.delayed(render_frame)(folder, number, index) for index in range(FRAMES))
    joblib.Parallel(n_jobs=workers)(jobs)
    (paths, matrices), (view, projection) = xu.load_dataset(folder), xu.load_camera(folder)
    K = xu.camera_matrix(projection, xu.FRAME_SIZE, xu.FRAME_SIZE)
    images, poses = (
        [xu.read_image(p) for p in paths],
        [xu.pose_in_camera(view, m) for m in matrices],
    )
    if LOOKS[number % len(LOOKS)] == "repainted":
        randomise, pairs = Randomiser(load_mesh(SHIP)), zip(images, poses)
        images = [randomise(*pair, K, np.random.default_rng([SEED, number, 2])) for pair in pairs]
    return images, poses, K


def wrong_pose(pose, rng):
    """A pose that the true one is taken for, or one a bit off."""
    if rng.random() < 0.5:
        return xu.ambiguous_poses(pose)[rng.integers(1, 4)]
    return xu.move_pose(
        pose, rng.normal(0, 1, 6) * np.repeat([np.radians(rng.uniform(3, 25)), 0.02], 3)
    )


def plays(images, truth, K, detector, aligner, rng):
    """Yield what the tracker says of a flight: how it was played, tracked poses and true ones."""
    for step in (1, 2, 3, 4):
        shown, true = images[::step], truth[::step]
        gone = (
            np.convolve(rng.random(len(shown)) < 0.06, np.ones(6))[: len(shown)] > 0
        )  # six in a row
        for name in ("live", "network off", "gaps", "no pixels"):
            pixels = None if name == "no pixels" else aligner
            tracker, track = tracking.Tracker(K, FPS / step, detector, pixels, keep=True), []
            for image, missing in zip(shown, gone):
                if name == "gaps" and missing:
                    image = None if step % 2 else np.zeros_like(image)
                track.append(tracker.update(image))
                if name == "network off" and track[-1].pose is not None:
                    tracker.detector = None
            yield f"{name}, {step}", track, true
            if name in ("live", "no pixels"):
                yield f"{name}, smoothed, {step}", motion.smooth(tracker.steps), true
        for start in range(0, len(shown) - 8, 24):
            tracker, wrong = (
                tracking.Tracker(K, FPS / step, None, aligner),
                wrong_pose(true[start], rng),
            )
            tracker.update_pose(
                xu.PoseEstimate(wrong, np.eye(6) * 1e-4, True, explained_contrast=0.6)
            )
            after = slice(start + 1, start + 8)
            yield (
                f"wrong start, {step}",
                [tracker.update(image) for image in shown[after]],
                true[after],
            )


def measure(folder, workers):
    """What was said of every frame that shows four corners or more and has a pose: a DataFrame."""
    rows, detector = [], Detector(xu.ROOT / "weights" / "xwing.weights.h5")
    aligner = Aligner(load_mesh(SHIP))
    for number in tqdm(range(FLIGHTS), unit="flight"):
        images, truth, K = load_flight(folder, number, workers)
        rng = np.random.default_rng([SEED, number, 3])
        for play, track, true in plays(images, truth, K, detector, aligner, rng):
            right = metrics.within([t.pose for t in track], true)
            for t, pose, hit in zip(track, true, right):
                if (
                    t.pose is None
                    or xu.in_frame(xu.project_pose(xu.BOUNDING_BOX, pose, K)).sum() < 4
                ):
                    continue
                step, contrast = xu.pose_step(pose, t.pose), t.explained_contrast
                features = dict(zip(FEATURES, tracking.trust_features(t.covariance, contrast)))
                rows.append(
                    {
                        "flight": number,
                        "play": play,
                        "kind": f"{t.status}, {np.isfinite(contrast)}",
                        "square": step @ np.linalg.solve(t.covariance, step),
                        "right": hit,
                        **features,
                    }
                )
        pd.DataFrame(rows).to_csv(folder / "rows.csv")
    return pd.DataFrame(rows)


def fit(rows, features):
    """The coefficients (4,) of a logistic model of some features; 0 for the others."""
    used = np.isin(FEATURES, ["constant", *features])
    x, right = rows[list(FEATURES)].to_numpy()[:, used], rows["right"].to_numpy(float)

    def loss(w):
        z = x @ w
        return np.logaddexp(0, z).sum() - right @ z + RIDGE * w @ w, x.T @ (
            expit(z) - right
        ) + 2 * RIDGE * w

    coefficients = np.zeros(len(FEATURES))
    coefficients[used] = minimize(loss, np.zeros(used.sum()), jac=True).x
    return coefficients


def log_loss(rows, coefficients):
    """(N,) negative log-likelihood of whether the poses are right."""
    z = rows[list(FEATURES)].to_numpy() @ coefficients
    return np.logaddexp(0, z) - rows["right"] * z


def report(rows):
    """Print the loss of each choice of features on flights left out in turn, and all coefficients."""
    print(rows.groupby("play")["right"].agg(frames="size", right="mean").round(3).to_string())
    for kind, group in rows.groupby("kind"):
        print(f"\n{kind}: {len(group)} frames, {(~group['right']).sum()} wrong")
        names = [name for name in FEATURES[1:] if group[name].any()]
        for count in range(len(names) + 1):
            for features in itertools.combinations(names, count):
                losses = [
                    log_loss(out, fit(group[group["flight"] != flight], features))
                    for flight, out in group.groupby("flight")
                ]
                found = ", ".join(f"{value:.2f}" for value in fit(group, features))
                print(f"  {pd.concat(losses).mean():.4f}  ({found})  {' '.join(features)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--workers", type=int, default=-1, help="processes that render; -1 is one a core"
    )
    a = parser.parse_args()
    report(measure(a.folder, a.workers))
