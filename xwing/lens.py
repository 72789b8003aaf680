"""What footage says about the lens that it was taken through.

A pose is only as right as the camera matrix K. Bars, a crop or a zoom change the focal length, and nothing in
a file tells. But the shape of the ship is known, so its perspective in the frames does.
"""

import numpy as np

from xwing.footage import frames_at


def picture_area(clip):
    """Where the picture lies between black bars: (left, top, width, height); the whole frame without.

    Bars are equal on both sides, and no frame of a dozen is brighter there than 16. Where they take part
    of the longer side, `lens_camera` needs the focal length of the lens times the share that is left.
    """
    numbers = np.linspace(0, clip.count - 1, min(clip.count, 12)).astype(int)
    brightest = np.max([image.max(-1) for image in frames_at(clip, numbers)], axis=0)
    spans = []
    for axis, size in ((0, clip.width), (1, clip.height)):
        lit = np.flatnonzero(brightest.max(axis) > 16)
        low, high = (int(lit[0]), int(size - 1 - lit[-1])) if len(lit) else (0, 0)
        spans.append((low, size - low - high) if abs(low - high) <= 2 else (0, size))
    (left, width), (top, height) = spans
    return left, top, width, height


def compare_focal_lengths(images, poses, K, aligner):
    """Which focal length would explain some frames best: the factor on that of K, and what it rests on.

    A focal length that is wrong shows in the perspective of the ship: whatever the distance, no pose explains
    the frames as well. Bars, a crop or a zoom are the usual causes.

    Args:
        images: N frames (H, W, 3) uint8 that show the whole ship; a dozen are plenty.
        poses: N (4, 4), as they were tracked with K (3, 3); aligner: `Aligner`.
    Returns:
        best: factor by which to multiply fx and fy of K; factors (F,) that were tried; explained (F,), the
        mean share of the frames' contrast that the ship explains with each.
    """
    factors = np.geomspace(0.5, 2, 13)
    explained, middle = np.zeros(len(factors)), len(factors) // 2
    for side in (range(middle, len(factors)), range(middle, -1, -1)):  # from that of K outwards
        moved, before = np.array(poses), 1.0
        for i in side:
            scaled = K * [[factors[i], 1, 1], [1, factors[i], 1], [1, 1, 1]]
            moved[:, 2, 3] *= factors[i] / before  # as large in the picture as before
            found, before = (
                [aligner.track(*pair, scaled) for pair in zip(images, moved)],
                factors[i],
            )
            explained[i] = np.nan_to_num([estimate.explained_contrast for estimate in found]).mean()
            moved = np.array([estimate.pose for estimate in found])
    best = int(np.clip(explained.argmax(), 1, len(factors) - 2))
    near = slice(best - 1, best + 2)  # the peak of a parabola through the best and its neighbours
    a, b, _ = np.polyfit(np.log(factors[near]), explained[near], 2)
    peak = np.clip(-b / (2 * min(a, -1e-9)), *np.log(factors[[0, -1]]))
    return float(np.exp(peak)), factors, explained
