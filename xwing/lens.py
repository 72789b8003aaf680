"""What footage says about the lens that it was taken through.

A pose is only as accurate as the camera matrix K. Black bars, a crop or a zoom change the focal
length, and no file says so. But the shape of the target is known, and its perspective in the frames
depends on the focal length: seen from near, its front is large compared with its back.
`compare_focal_lengths` tries several focal lengths and returns the one with which the target
explains the frames best. `picture_area` finds black bars.
"""

import numpy as np

from xwing.footage import Clip, frames_at

BAR_FRAMES = 12  # frames to examine; a scene may be dark in one of them, but hardly in all
BAR_BRIGHTNESS = 16  # of 255; compression leaves bars not quite black
BAR_ASYMMETRY = 2  # pixels by which the widths of opposite bars may differ
FOCAL_FACTORS = np.geomspace(0.5, 2, 13)  # to try, on the focal length of K; the middle one is 1


def picture_area(clip: Clip) -> tuple[int, int, int, int]:
    """Find where the picture lies between black bars.

    Bars are dark in every frame examined, and equally wide on both sides. `xu.lens_camera` takes
    the longer side of the frame, bars included, for that of the sensor. If bars cover a part of it,
    multiply the focal length by the fraction that remains.

    Args:
        clip: see `xwing.footage.Clip`.

    Returns:
        left, top, width, height in pixels; those of the whole frame where there are no bars.
    """
    numbers = np.linspace(0, clip.count - 1, min(clip.count, BAR_FRAMES)).astype(int)
    brightest = np.max([image.max(-1) for image in frames_at(clip, numbers)], axis=0)
    left, width = _lit_span(brightest.max(0))
    top, height = _lit_span(brightest.max(1))
    return left, top, width, height


def _lit_span(brightness):
    """Start and length of the picture along an axis, from the brightest pixel at each place."""
    size = len(brightness)
    lit = np.flatnonzero(brightness > BAR_BRIGHTNESS)
    if len(lit) == 0:
        return 0, size

    before = int(lit[0])
    after = int(size - 1 - lit[-1])
    if abs(before - after) > BAR_ASYMMETRY:  # a dark part of the scene
        return 0, size
    return before, size - before - after


def compare_focal_lengths(
    images: list[np.ndarray], poses: np.ndarray, K: np.ndarray, aligner
) -> tuple[float, np.ndarray, np.ndarray]:
    """Find the focal length that explains some frames best.

    With a wrong focal length the target's perspective is wrong at any distance, and no pose
    explains the frames as well.

    Args:
        images: N frames (H, W, 3) uint8 that show the whole target; a dozen are plenty.
        poses: N (4, 4), as they were tracked with K.
        K: (3, 3) camera matrix in pixels.
        aligner: the target's `xwing.alignment.Aligner`. It forgets what it has learnt, because
            that was seen through the lens K.

    Returns:
        The best factor on fx and fy of K; the factors (F,) that were tried; and the fraction of a
        frame's contrast that the target explains with each of them (F,), the mean over all frames.
    """
    aligner.forget()
    middle = len(FOCAL_FACTORS) // 2
    upwards = range(middle, len(FOCAL_FACTORS))
    downwards = range(middle, -1, -1)
    explained = np.zeros(len(FOCAL_FACTORS))
    for order in (upwards, downwards):
        explained[order] = _explained_contrasts(images, poses, K, aligner, FOCAL_FACTORS[order])
    return _peak(FOCAL_FACTORS, explained), FOCAL_FACTORS, explained


def _explained_contrasts(images, poses, K, aligner, factors):
    """The mean explained contrast with each factor on the focal length.

    Alignment with one factor starts from the poses that were found with the factor before.
    """
    poses = np.array(poses)
    explained = []
    last_factor = 1.0
    for factor in factors:
        scaled_K = K * [[factor, 1, 1], [1, factor, 1], [1, 1, 1]]
        poses[:, 2, 3] *= factor / last_factor  # so that the target stays as large in the picture
        estimates = [aligner.track(image, pose, scaled_K) for image, pose in zip(images, poses)]
        explained.append(np.nan_to_num([each.explained_contrast for each in estimates]).mean())
        poses = np.array([estimate.pose for estimate in estimates])
        last_factor = factor
    return explained


def _peak(factors, explained):
    """The factor at the peak of a parabola through the best one and its neighbours.

    The parabola is over the logarithm of the factor.
    """
    best = int(np.clip(explained.argmax(), 1, len(factors) - 2))
    near = slice(best - 1, best + 2)
    curvature, slope, _ = np.polyfit(np.log(factors[near]), explained[near], 2)
    curvature = min(curvature, -1e-9)  # a parabola without a peak leads to an end of the range
    peak = -slope / (2 * curvature)
    return float(np.exp(np.clip(peak, *np.log(factors[[0, -1]]))))
