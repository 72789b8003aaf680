"""Fit the constants that judge the poses of a track (`tracker.EVIDENCE`).

    python tools/fit_track_evidence.py CLIP.json ...

Each clip is one of data/objects/, or another in the same form. The aligner learns from the frames
before at the true poses. Then it refines poses that are off, as `Tracker.align` does. Some end at
the true pose and some elsewhere. A logistic model is fitted to whether a refined pose is right, on
all clips together, and judged on clips that are left out in turn.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from fit_evidence import fit
from tqdm.auto import tqdm

import xwing_utils as xu
from xwing import metrics
from xwing.alignment import Aligner
from xwing.footage import Clip

EVERY = 3  # frames between two of which poses are judged
STARTS = 6  # poses that are refined in each of these frames
NEAR = 5.0, 0.03  # degrees and diameters, standard deviations of a start that is nearly right
FAR = 40.0, 0.15  # of a start that is wrong
MIN_VISIBLE = 0.25  # fraction of the target: with less of it in sight no pose is judged
FEATURES = ["constant", "contrast", "separation", "relative"]
SEED = 27


def moved(pose, deviations, target, rng):
    """A pose (4, 4) that is off by degrees and diameters with these standard deviations."""
    degrees, diameters = deviations
    scale = np.repeat([np.radians(degrees), diameters * target.diameter], 3) / np.sqrt(3)
    return xu.move_pose(pose, rng.normal(0, scale))


def judged_poses(path):
    """A DataFrame of refined poses of a clip: features, and whether each is right."""
    clip = json.loads(path.read_text())
    K = np.array(clip["K"])
    target = xu.load_target(path.parent / clip["target"])
    aligner = Aligner(target)
    rng = np.random.default_rng(SEED)

    rows = []
    usual = 0.0
    frames = Clip(path.with_suffix(".mp4"))
    for index, frame in enumerate(tqdm(frames, path.stem, len(clip["poses"]), unit="frame")):
        pose = clip["poses"][index]
        if pose is None or clip["visible"][index] < MIN_VISIBLE:
            continue

        pose = np.array(pose)
        if usual and index % EVERY == 0:
            for i in range(STARTS):
                start = moved(pose, FAR if i % 2 else NEAR, target, rng)
                estimate = aligner.track(frame.image, start, K, usual=usual)
                right = metrics.recalled([estimate.pose], [pose], target=target)[0]
                rows.append([path.stem, *features(estimate, usual), right])

        if clip["visible"][index] > 0.9:
            aligner.learn(frame.image, pose, K)
            explained = aligner.track(frame.image, pose, K).explained_contrast
            usual = explained if not usual else 0.8 * usual + 0.2 * explained

    rows = pd.DataFrame(rows, columns=["clip", *FEATURES, "right"])
    return rows[np.isfinite(rows["contrast"])]


def features(estimate, usual):
    """One, the explained contrast, the separation of the colours, the contrast to the usual one."""
    contrast = estimate.explained_contrast
    return 1.0, contrast, estimate.colour_separation, contrast / usual


def errors(rows, weights, used):
    """Fractions of the right poses that are refused, and of the wrong ones that are accepted."""
    accepted = rows[used].to_numpy() @ weights > 0
    right = rows["right"].to_numpy(bool)
    return (~accepted[right]).mean(), accepted[~right].mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clips", type=Path, nargs="+")
    options = parser.parse_args()
    rows = pd.concat([judged_poses(path) for path in options.clips])
    print(
        rows.groupby(["clip", "right"])[FEATURES[1:]].describe(percentiles=[0.05, 0.95]).to_string()
    )

    for used in (FEATURES[:2], FEATURES[:3], FEATURES):
        table = {}
        for clip, left_out in rows.groupby("clip"):
            others = rows[rows["clip"] != clip]
            weights = fit(others[used].to_numpy(), others["right"].to_numpy(float))
            table[clip] = errors(left_out, weights, used)
        weights = fit(rows[used].to_numpy(), rows["right"].to_numpy(float))
        print("\n", used, weights.round(2).tolist())
        print(pd.DataFrame(table, ["right refused", "wrong accepted"]).T.round(3).to_string())


if __name__ == "__main__":
    main()
