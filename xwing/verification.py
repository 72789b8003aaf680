"""Rival poses, evidence, and the probability that a pose is right."""

import cv2
import joblib
import numpy as np

import xwing_utils as xu

EVIDENCE = np.array(
    [-25.39, 26.88, 1.45, 0.47]
)  # log-odds for each of `_evidence`: tools/fit_evidence.py


MIN_PROBABILITY = 0.8  # of being right, from which a single frame's pose is accepted


SURE_PROBABILITY = 0.95  # below which a frame is worth more looks


def _evidence(agreement, margin, same):
    """What speaks for a pose, (4,): one; how far its edges are the frame's; by how much its rivals explain
    the pixels worse; how many looks found it less those that found another."""
    return np.array([1, agreement, np.log1p(np.clip(margin, 0, 100)), 2 * sum(same) - len(same)])


def _suppress_similar(ranked, degrees):
    """Of `_Refined`, best first, those that are turned by more than an angle against every better one."""
    kept = []
    for candidate in ranked:
        apart = all(xu.rotation_error(candidate.pose, better.pose) > degrees for better in kept)
        kept += [candidate] if apart else []
    return kept


def turned_looks(model, images, K):
    """What a network finds in images (N, S, S, 3) uint8 turned by a quarter, a half and three quarters: three
    `PoseEstimate` for each, in its own axes, of other errors. K: (3, 3), or (N, 3, 3)."""
    turned = np.concatenate([np.rot90(images, turns, (1, 2)) for turns in (1, 2, 3)])
    maps = np.split(xu.predict_heatmaps(model, turned, channels=len(xu.KEYPOINTS)), 3)
    maps = np.concatenate([np.rot90(part, -turns, (1, 2)) for turns, part in enumerate(maps, 1)])
    found = zip(np.resize(K, (len(maps), 3, 3)), *xu.read_keypoints(maps, model.settings))
    looks = [xu.estimate_pose(points, camera, *sureness) for camera, points, *sureness in found]
    return [looks[i :: len(images)] for i in range(len(images))]


def verify_frames(aligner, images, estimates, K, model):
    """`Aligner.verify` on all cores for images (N, S, S, 3) uint8 and N estimates, with `turned_looks` by the
    model where the pose is not sure without: a list."""

    def verify(*arguments):
        cv2.setNumThreads(1)  # the frames are what is shared out
        return aligner.verify(*arguments)

    def verify_rows(rows, others):
        tasks = (
            joblib.delayed(verify)(images[i], estimates[i], K, o) for i, o in zip(rows, others)
        )
        return zip(rows, joblib.Parallel(n_jobs=-1, max_nbytes=None)(tasks))  # none on disk

    found = dict(verify_rows(range(len(images)), [()] * len(images)))
    unsure = [i for i in found if not found[i].probability >= SURE_PROBABILITY]
    found |= verify_rows(unsure, turned_looks(model, images[unsure], K)) if unsure else {}
    return list(found.values())


STRONG_EDGE, MIN_EDGE = (
    60.0,
    12.0,
)  # slopes (Sobel, grey levels): none counts more, none below is an edge


def edge_agreement(seen, drawn, cover):
    """How much of a drawing's edges (h, w, 3) a frame (h, w, 3) has too, however strong they are there: the
    mean cosine between their directions, 0 to 1, about what the drawing covers (h, w).

    Patterns of the paint, shadows and other light add edges to a frame, but take few away.
    Source: Steger, ISPRS Archives 34(3A), 2002; Hinterstoisser et al., IEEE TPAMI 34(5), 2012.
    """
    seen, drawn = _steepest_slopes(seen), _steepest_slopes(drawn)
    length, strength = np.linalg.norm(drawn, axis=0), np.linalg.norm(seen, axis=0)
    weight = np.minimum(length, STRONG_EDGE) * (cv2.dilate(cover, np.ones((7, 7))) > 0.01)
    cosine = np.abs((drawn * seen).sum(0)) / (length * strength + 1e-3)
    return float((weight * cosine * (strength > MIN_EDGE)).sum() / (weight.sum() + 1e-3))


def _steepest_slopes(image):
    """(2, h, w) slopes to the right and down, of each pixel's steepest colour."""
    smooth = cv2.GaussianBlur(image, (0, 0), 0.7)
    slopes = np.stack([cv2.Sobel(smooth, -1, 1, 0), cv2.Sobel(smooth, -1, 0, 1)])
    return np.take_along_axis(slopes, np.square(slopes).sum(0).argmax(-1)[None, ..., None], 3)[
        ..., 0
    ]
