"""Fit the weights of the evidence in `Aligner.verify`: `python tools/fit_evidence.py [FOLDER ...]`.

Each frame is judged twice: by the frame as it is, and by four views of it (the frame and three
rotated ones). The frames are drawn squares that show the ship, drawn scenes without it, and
data/shifted. A logistic model is fitted to whether the best pose is right (within RIGHT degrees),
given the evidence for it (`verification.evidence`). For each limit on the probability the tool
prints how many right and wrong poses `verify_frames` would accept, and in brackets how many are
flipped. Other folders in the data format are only measured. No frame of data/test or data/looks is
used.
"""

import sys
from pathlib import Path

import cv2
import joblib
import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import expit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import xwing_utils as xu  # noqa: E402
from xwing import metrics  # noqa: E402
from xwing.alignment import Aligner  # noqa: E402
from xwing.synthesis import Synthesiser  # noqa: E402
from xwing.verification import VerificationSettings, rotated_views  # noqa: E402

DRAWN = 256  # frames with the ship
EMPTY = 160  # frames without it
DRAWN_SEED = 777
EMPTY_SEED = 4242
RIGHT = 8.0  # degrees
LIMITS = 0.6, 0.7, 0.75, 0.8, 0.85, 0.9  # on the probability
RIDGE = 0.1  # penalty on the coefficients of standardised evidence


class EmptySynthesiser(Synthesiser):
    """Draws everything except the ship."""

    def __init__(self, mesh):
        super().__init__(mesh)
        self.exterior.visible_sides = lambda pose, scale: np.zeros(0, int)


def drawn_frames(synthesiser, seed, count, ship=True):
    """Draw squares that would show four corners or more: images, true poses or None, and K."""
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        image, pose, K = synthesiser(xu.FRAME_SIZE, rng)
        if xu.in_frame(xu.project_pose(xu.BOUNDING_BOX, pose, K)).sum() >= 4:
            found.append((image, pose if ship else None, K))
    return found


def folder_frames(folder):
    """Read a folder in the data format: images, true poses and K."""
    paths, matrices = xu.load_dataset(folder)
    view, projection = xu.load_camera(folder)
    K = xu.camera_matrix(projection, xu.FRAME_SIZE, xu.FRAME_SIZE)
    return [(xu.read_image(p), xu.pose_in_camera(view, m), K) for p, m in zip(paths, matrices)]


def all_views(model, images, cameras):
    """Four `PoseEstimate` for each of N images: of the frame as it is, and of the rotated ones."""
    heatmaps = xu.predict_heatmaps(model, images, channels=len(xu.KEYPOINTS))
    keypoints = xu.read_keypoints(heatmaps, model.settings)
    first = [
        xu.estimate_pose(points, K, confidence, sigma)
        for K, points, confidence, sigma in zip(cameras, *keypoints)
    ]
    rotated = rotated_views(model, images, cameras)
    return [[one, *others] for one, others in zip(first, rotated)]


def judge_frame(aligner, image, truth, K, views):
    """Judge a frame twice, by the first view and by all views.

    Returns:
        for each judgement (evidence, error of the best pose in degrees), or None without a pose.
    """
    cv2.setNumThreads(1)  # each core has frames of its own
    rows = []
    for chosen in (views[:1], views):
        estimates = [view for view in chosen if view.pose is not None]
        # The verifier's working unit is the model unit of the X-wing, so no pose is scaled.
        judgement = aligner.verifier.judge(image, estimates, K)
        if judgement is None:
            rows.append(None)
            continue

        wrong = truth is None  # no pose is right where there is no ship
        error = 180.0 if wrong else xu.rotation_error(judgement.best.pose, truth)
        rows.append((judgement.evidence, error))
    return rows


def judge_frames(aligner, model, frames):
    """Judge all frames on all cores: a list of what `judge_frame` returns."""
    images, truth, cameras = zip(*frames)
    views = []
    for i in range(0, len(images), 32):
        batch = slice(i, i + 32)
        views += all_views(model, np.array(images[batch]), np.array(cameras[batch]))

    tasks = (
        joblib.delayed(judge_frame)(aligner, *frame) for frame in zip(images, truth, cameras, views)
    )
    return joblib.Parallel(n_jobs=-1, max_nbytes=None)(tasks)


def fit(evidence, right):
    """Fit the log-odds (D,) of a logistic model to evidence (N, D), whose first column is one."""
    deviation = evidence.std(0)
    varies = deviation > 0
    scale = np.where(varies, deviation, 1)
    mean = evidence.mean(0) * varies
    standardised = (evidence - mean) / scale

    def loss(weights):
        logit = standardised @ weights
        gradient = standardised.T @ (expit(logit) - right) + 2 * RIDGE * varies * weights
        penalty = RIDGE * varies @ weights**2
        return np.logaddexp(0, logit).sum() - right @ logit + penalty, gradient

    weights = minimize(loss, np.zeros(evidence.shape[1]), jac=True).x / scale
    weights[0] -= weights @ mean
    return weights


def fit_rows(rows):
    """Fit the weights of the evidence to the rows of some sets of frames; see `judge_frame`."""
    fitted = [one for pairs in rows for pair in pairs for one in pair if one]
    evidence = np.array([features for features, _ in fitted])
    right = np.array([error < RIGHT for _, error in fitted], float)
    return fit(evidence, right)


def accepted(rows, weights, limit):
    """Count the right, the wrong and the flipped poses that would be accepted, as text."""
    confident = VerificationSettings().confident_probability
    errors = []
    for first, all_together in rows:
        enough = first is not None and expit(weights @ first[0]) >= confident
        last = first if enough else all_together
        if last is not None and expit(weights @ last[0]) >= limit:
            errors.append(last[1])

    errors = np.array(errors)
    return f"{(errors < RIGHT).sum()} + {(errors >= RIGHT).sum()} ({(errors > 90).sum()})"


def print_quality(name, pairs, weights):
    """Print how often the best pose is right, and how well the evidence separates right ones."""
    for k, kind in enumerate(("first view", "all views")):
        found = [pair[k] for pair in pairs if pair[k]]
        right = np.array([error < RIGHT for _, error in found])
        score = np.array([weights @ features for features, _ in found])
        area = metrics.roc(score, right)[2] if right.any() else np.nan
        counts = f"best pose right in {right.sum()} of {len(pairs)}"
        print(f"{name}, {kind}: {counts}, ROC area {area:.3f}")


def main():
    aligner = Aligner(xu.XWING)
    model = xu.load_model(ROOT / "weights" / "xwing.weights.h5")
    shifted = str(ROOT / "data" / "shifted")
    empty = EmptySynthesiser(aligner.mesh)
    sets = {
        "drawn": drawn_frames(Synthesiser(aligner.mesh), DRAWN_SEED, DRAWN),
        "without the ship": drawn_frames(empty, EMPTY_SEED, EMPTY, ship=False),
        shifted: folder_frames(shifted),
    }
    fitted = list(sets)
    sets |= {folder: folder_frames(folder) for folder in sys.argv[1:]}

    rows = {name: judge_frames(aligner, model, frames) for name, frames in sets.items()}
    weights = fit_rows([rows[name] for name in fitted])
    print("evidence_weights =", weights.round(2).tolist())
    for name, pairs in rows.items():
        print_quality(name, pairs, weights)

    table = {
        name: [accepted(pairs, weights, limit) for limit in LIMITS] for name, pairs in rows.items()
    }
    print(pd.DataFrame(table, LIMITS).T.to_string())


if __name__ == "__main__":
    main()
