"""The numbers behind `Aligner.verify`: `python tools/fit_evidence.py [FOLDER ...]`.

Single frames are judged once by what the network finds in them, and once more with what it finds in the
turned frames: squares drawn with the ship, drawn scenes without it, and data/shifted. A logistic model is
fitted to whether the best pose is right (within RIGHT degrees), given what speaks for it
(`verification._evidence`). For each limit on the probability the right and the wrong poses are counted that
`verify_frames` would accept, in brackets the flipped ones. Other folders in the data format are only
measured. No frame of data/test or data/looks takes part.
"""

import sys
from pathlib import Path
from unittest import mock

import cv2
import joblib
import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import expit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import xwing_utils as xu  # noqa: E402
from xwing import alignment, metrics, verification  # noqa: E402
from xwing.mesh import load_mesh  # noqa: E402
from xwing.synthesis import Synthesiser  # noqa: E402

DRAWN, EMPTY, SEEDS = 256, 160, (777, 4242)  # frames, and what they are drawn from
RIGHT = 8.0  # degrees
LIMITS = 0.6, 0.7, 0.75, 0.8, 0.85, 0.9
RIDGE = 0.1  # penalty on the coefficients of standardised evidence


class EmptySynthesiser(Synthesiser):
    """Draws all but the ship."""

    def shown(self, pose, scale):
        return super().shown(pose, scale)[:0]


def drawn_frames(synthesiser, seed, count, ship=True):
    """Images, true poses or None, and camera matrices of squares that would show four corners or more."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        image, pose, K = synthesiser(xu.FRAME_SIZE, rng)
        if xu.in_frame(xu.project_pose(xu.BOUNDING_BOX, pose, K)).sum() >= 4:
            found.append((image.clip(0, 255).astype(np.uint8), pose if ship else None, K))
    return found


def folder_frames(folder):
    (paths, matrices), (view, projection) = xu.load_dataset(folder), xu.load_camera(folder)
    K = xu.camera_matrix(projection, xu.FRAME_SIZE, xu.FRAME_SIZE)
    return [(xu.read_image(p), xu.pose_in_camera(view, m), K) for p, m in zip(paths, matrices)]


def all_looks(model, images, cameras):
    """Four `PoseEstimate` for each of N images: of the frame as it is, and turned."""
    found = xu.read_keypoints(
        xu.predict_heatmaps(model, images, channels=len(xu.KEYPOINTS)), model.settings
    )
    first = [
        xu.estimate_pose(points, K, *sureness) for K, points, *sureness in zip(cameras, *found)
    ]
    return [
        [one, *others]
        for one, others in zip(first, verification.turned_looks(model, images, cameras))
    ]


def judged(aligner, image, truth, K, looks):
    """What speaks for the best pose and its error, from the first look and from all; None without a pose."""
    cv2.setNumThreads(1)
    rows, measure = [], verification._evidence
    for others in ((), looks[1:]):
        with mock.patch.object(alignment, "_evidence", side_effect=measure) as watched:
            found = aligner.verify(image, looks[0], K, others)
        error = (
            180.0 if truth is None or found.pose is None else xu.rotation_error(found.pose, truth)
        )
        rows.append((measure(*watched.call_args.args), error) if watched.called else None)
    return rows


def fit(x, right):
    """Log-odds (D,) of a logistic model of evidence (N, D), the first of which is one."""
    mean, scale = x.mean(0) * (x.std(0) > 0), np.where(x.std(0) > 0, x.std(0), 1)
    z, penalised = (x - mean) / scale, x.std(0) > 0

    def loss(w):
        logit = z @ w
        gradient = z.T @ (expit(logit) - right) + 2 * RIDGE * penalised * w
        return np.logaddexp(0, logit).sum() - right @ logit + RIDGE * penalised @ w**2, gradient

    w = minimize(loss, np.zeros(x.shape[1]), jac=True).x / scale
    return w - np.eye(len(w))[0] * (w @ mean)


def accepted(rows, odds, limit):
    """Right, wrong and flipped poses that would be accepted, as text."""
    errors = []
    for first, all_together in rows:
        sure = first is not None and expit(odds @ first[0]) >= verification.SURE_PROBABILITY
        last = first if sure else all_together
        errors += [last[1]] if last is not None and expit(odds @ last[0]) >= limit else []
    errors = np.array(errors)
    return f"{(errors < RIGHT).sum()} + {(errors >= RIGHT).sum()} ({(errors > 90).sum()})"


def main():
    ship, model = (
        load_mesh(xu.ROOT / "data" / "xwing.obj"),
        xu.load_model(ROOT / "weights/xwing.weights.h5"),
    )
    aligner, shifted = alignment.Aligner(ship), str(ROOT / "data" / "shifted")
    sets = {
        "drawn": drawn_frames(Synthesiser(ship), SEEDS[0], DRAWN),
        "without the ship": drawn_frames(EmptySynthesiser(ship), SEEDS[1], EMPTY, ship=False),
    }
    sets |= {folder: folder_frames(folder) for folder in (shifted, *sys.argv[1:])}
    rows = {}
    for name, frames in sets.items():
        images, truth, cameras = zip(*frames)
        looks = [
            look
            for i in range(0, len(images), 32)
            for look in all_looks(
                model, np.array(images[i : i + 32]), np.array(cameras[i : i + 32])
            )
        ]
        tasks = (
            joblib.delayed(judged)(aligner, *frame) for frame in zip(images, truth, cameras, looks)
        )
        rows[name] = joblib.Parallel(n_jobs=-1, max_nbytes=None)(tasks)
    fitted = [one for name in list(sets)[:3] for pair in rows[name] for one in pair if one]
    odds = fit(
        np.array([one[0] for one in fitted]), np.array([one[1] < RIGHT for one in fitted], float)
    )
    print("EVIDENCE =", odds.round(2).tolist())
    for name, pairs in rows.items():
        for k, looks in enumerate(("first look", "all looks")):
            kind = [pair[k] for pair in pairs if pair[k]]
            right = np.array([one[1] < RIGHT for one in kind])
            score = np.array([odds @ one[0] for one in kind])
            area = metrics.roc(score, right)[2] if right.any() else np.nan
            print(
                f"{name}, {looks}: best pose right in {right.sum()} of {len(pairs)}, ROC area {area:.3f}"
            )
    table = {
        name: [accepted(pairs, odds, limit) for limit in LIMITS] for name, pairs in rows.items()
    }
    print(pd.DataFrame(table, LIMITS).T.to_string())


if __name__ == "__main__":
    main()
