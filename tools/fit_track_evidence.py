"""Fit what judges the poses of a learnt target: MIN_AGREEMENT, LEARNT_PROBABILITY of `tracker`.

    python tools/fit_track_evidence.py CLIP.json ...

Each clip is one of data/objects/, or another in the same form. The aligner learns from the frames
before at the true poses. Then it refines poses that are off, as `Tracker.align` does. Some end at
the true pose and some elsewhere. A logistic model is fitted to whether a refined pose is right, on
all clips together, and judged on clips that are left out in turn.

For the probability the clips are followed live, from the true pose and from wrong ones of a target
that was learnt at the true one.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
from fit_evidence import fit
from tqdm.auto import tqdm

import xwing_utils as xu
from xwing import evaluation, metrics
from xwing.alignment import Aligner
from xwing.tracker import Tracker, trust_features

EVERY = 4  # frames between two of which poses are judged
STARTS = 4  # poses that are refined in each of these frames
NEAR = 5.0, 0.03  # degrees and diameters, standard deviations of a start that is nearly right
FAR = 40.0, 0.15  # of a start that is wrong
MIN_VISIBLE = 0.25  # fraction of the target: with less of it in sight no pose is judged
FEATURES = ["constant", "contrast", "agreement"]
TRUST_FEATURES = ["constant", "agreement", "rotation", "translation"]
STEPS = (1, 3)  # frames between two that are tracked
WRONG_EVERY = 24  # frames between two wrong poses
WRONG_FRAMES = 8  # tracked from each wrong pose
SEED = 27


def moved(pose, deviations, target, rng):
    """A pose (4, 4) that is off by degrees and diameters with these standard deviations."""
    degrees, diameters = deviations
    scale = np.repeat([np.radians(degrees), diameters * target.diameter], 3) / np.sqrt(3)
    return xu.move_pose(pose, rng.normal(0, scale))


def judged_poses(path):
    """A DataFrame of refined poses of a clip: features, and whether each is right."""
    known = evaluation.load_object(path)
    target = known.target
    aligner = Aligner(target)
    rng = np.random.default_rng(SEED)

    rows = []
    usual = 0.0
    bar = tqdm(known.clip, path.stem, known.clip.count, unit="frame")
    for index, (frame, pose, visible) in enumerate(zip(bar, known.poses, known.visible)):
        if pose is None or visible < MIN_VISIBLE:
            continue

        if usual and index % EVERY == 0:
            for i in range(STARTS):
                start = moved(pose, FAR if i % 2 else NEAR, target, rng)
                estimate = aligner.track(frame.image, start, known.K, usual=usual)
                right = is_right(estimate.pose, pose, target)
                rows.append([path.stem, *features(estimate), right])

        if visible > 0.9:
            aligner.learn(frame.image, pose, known.K)
            explained = aligner.track(frame.image, pose, known.K).explained_contrast
            usual = explained if not usual else 0.8 * usual + 0.2 * explained

    rows = pd.DataFrame(rows, columns=["clip", *FEATURES, "right"])
    return rows[np.isfinite(rows["agreement"])]


def is_right(pose, true, target):
    """Whether a pose is within 5 degrees and 0.106 diameters of the true one or its equal."""
    equivalent = true @ target.symmetries
    return bool(metrics.recalled([pose] * len(equivalent), equivalent, target=target).any())


def features(estimate):
    """One, the explained contrast, the local agreement."""
    return 1.0, estimate.explained_contrast, estimate.local_agreement


def tracked_poses(path):
    """A DataFrame of the tracked poses of a clip: their features, and whether each is right."""
    known = evaluation.load_object(path)
    target = known.target
    images = [frame.image for frame in known.clip]
    rng = np.random.default_rng(SEED)

    rows = []
    for step in STEPS:
        tracker = Tracker(known.K, known.fps / step, aligner=Aligner(target))
        numbers = np.arange(0, len(images), step)
        track = [tracker.start(images[0], known.poses[0])]
        track += [tracker.update(images[i]) for i in numbers[1:]]
        followed = list(zip(numbers, track))

        for begin in range(WRONG_EVERY, len(images) - WRONG_FRAMES * step, WRONG_EVERY):
            if known.visible[begin] < 0.9:
                continue
            true = known.poses[begin]
            tracker.start(images[begin], true)
            wrong = moved(true, (rng.uniform(3, 40), 0.05), target, rng)
            tracker.motion = None
            tracker.update_pose(xu.PoseEstimate(wrong, 1e-4 * np.eye(6), True))
            numbers = range(begin + step, begin + WRONG_FRAMES * step, step)
            followed += [(i, tracker.update(images[i])) for i in numbers]

        for i, tracked in followed:
            if tracked.status == "tracked" and known.visible[i] >= MIN_VISIBLE:
                right = is_right(tracked.pose, known.poses[i], target)
                measured = trust_features(
                    tracked.covariance, tracked.local_agreement, target.diameter
                )
                rows.append([path.stem, *measured, right])
    rows = pd.DataFrame(rows, columns=["clip", *TRUST_FEATURES, "right"])
    return rows[rows["agreement"] > 0]


def log_loss(rows, weights, used):
    """The mean negative log-likelihood of whether the poses are right."""
    logit = rows[used].to_numpy() @ weights
    return (np.logaddexp(0, logit) - rows["right"] * logit).mean()


def errors(rows, weights, used):
    """Fractions of the right poses that are refused, and of the wrong ones that are accepted."""
    accepted = rows[used].to_numpy() @ weights > 0
    right = rows["right"].to_numpy(bool)
    return (~accepted[right]).mean(), accepted[~right].mean()


def main():
    parser = argparse.ArgumentParser(description="Fit what judges the poses of a learnt target.")
    parser.add_argument("clips", type=Path, nargs="+")
    options = parser.parse_args()
    rows = pd.concat([judged_poses(path) for path in options.clips])
    print(
        rows.groupby(["clip", "right"])[FEATURES[1:]].describe(percentiles=[0.05, 0.95]).to_string()
    )

    for used, weights, table in fits(rows, FEATURES, errors):
        print("\n", used, weights.round(2).tolist())
        print(pd.DataFrame(table, ["right refused", "wrong accepted"]).T.round(3).to_string())

    rows = pd.concat([tracked_poses(path) for path in options.clips])
    print(rows.groupby("clip")["right"].agg(frames="size", right="mean").round(3).to_string())
    for used, weights, table in fits(rows, TRUST_FEATURES, log_loss):
        print(f"{np.mean(list(table.values())):.4f}", used, weights.round(2).tolist())


def fits(rows, names, measure):
    """Yield choices of features, their weights, and a measure of each clip that was left out."""
    choices = itertools.chain.from_iterable(
        itertools.combinations(names[1:], count) for count in range(1, len(names))
    )
    for chosen in choices:
        used = [names[0], *chosen]
        table = {}
        for clip, left_out in rows.groupby("clip"):
            others = rows[rows["clip"] != clip]
            weights = fit(others[used].to_numpy(), others["right"].to_numpy(float))
            table[clip] = measure(left_out, weights, used)
        yield used, fit(rows[used].to_numpy(), rows["right"].to_numpy(float)), table


if __name__ == "__main__":
    main()
