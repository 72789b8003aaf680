"""What footage says about the lens that it was taken through.

A pose is only as accurate as the camera matrix K. Black bars, a crop or a zoom change the focal
length, and no file says so. But the shape of the target is known, and its perspective in the frames
depends on the focal length: seen from near, its front is large compared with its back.
`check_lens` finds the focal length with which the target explains the frames best.
`picture_area` finds black bars.
"""

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

import xwing_utils as xu
from xwing.footage import Clip, frames_at

BAR_FRAMES = 12  # frames to examine; a scene may be dark in one of them, but hardly in all
BAR_BRIGHTNESS = 16  # of 255; compression leaves bars not quite black
BAR_ASYMMETRY = 2  # pixels by which the widths of opposite bars may differ

FOCAL_STEP = 2 ** (1 / 3)  # ratio of two focal lengths that are tried one after the other
MAX_STEPS = 4  # of them, from K: factors of 0.4 to 2.5
MIN_FRAMES = 4  # fewer say nothing

# Of 16 clips with the right focal length the factor was found between 0.99 and 1.06. So a factor is
# wrong from 12 % on, if it is this many standard deviations from 1. Frames tell nothing where the
# target explains too little of them with any focal length, or they disagree.
MAX_FOCAL_ERROR = 0.12
SIGNIFICANT = 3.0
MIN_EXPLAINED = 0.1
MAX_DEVIATION = 0.08


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


@dataclasses.dataclass(frozen=True)
class LensCheck:
    """What frames say about the focal length of K.

    Attributes:
        factor: on fx and fy of K, with which the target explains the frames best; NaN where there
            are too few frames.
        deviation: standard deviation of its logarithm, from frame to frame.
        factors: (F,) that were tried.
        explained: (F,) fraction of a frame's contrast that the target explains with each of them,
            the mean over all frames.
        focal: the focal length with this factor, in mm for a sensor whose longer side is 36 mm.
        verdict: "confirmed", "wrong", or "unknown" where the frames cannot tell.
    """

    factor: float
    deviation: float
    factors: np.ndarray
    explained: np.ndarray
    focal: float

    @property
    def verdict(self) -> str:
        """Whether K has the right focal length."""
        off = abs(np.log(self.factor))
        if not (self.explained.max() >= MIN_EXPLAINED and self.deviation <= MAX_DEVIATION):
            return "unknown"  # also where they are NaN
        if off <= MAX_FOCAL_ERROR:
            return "confirmed"
        return "wrong" if off > SIGNIFICANT * self.deviation else "unknown"

    def __str__(self) -> str:
        if self.verdict == "wrong":
            return (
                f"the focal length is wrong: the target's perspective fits {self.factor:.2f} times "
                f"that of K, a lens of {self.focal:.1f} mm (36 mm sensor); set it and track again"
            )
        if self.verdict == "confirmed":
            return f"the frames confirm the focal length (factor {self.factor:.2f})"
        return "the frames cannot tell whether the focal length is right"


def check_lens(images: list[np.ndarray], poses: Sequence, K: np.ndarray, aligner) -> LensCheck:
    """Find out from some frames whether K has the right focal length.

    With a wrong focal length the target's perspective is wrong at any distance, and no pose
    explains the frames as well. From K on, the focal length is changed in steps as long as the
    frames are explained better.

    Args:
        images: N frames (H, W, 3) uint8 that show the whole target; eight are plenty.
        poses: N (4, 4), as they were found with K.
        K: (3, 3) camera matrix in pixels.
        aligner: the target's `xwing.alignment.Aligner`. It forgets what it has learnt, because
            that was seen through the lens K.
    """
    if len(images) < MIN_FRAMES:
        return LensCheck(np.nan, np.nan, np.array([1.0]), np.array([np.nan]), np.nan)

    aligner.forget()
    tried = {0: _align_all(images, poses, K, aligner)}  # step -> what `_align_all` returns
    best = 0
    for direction in (1, -1):
        while abs(best + direction) <= MAX_STEPS:
            following = best + direction
            if following not in tried:
                tried[following] = _align_again(images, tried[best], K, following, best, aligner)
            if tried[following][0].mean() <= tried[best][0].mean():
                break
            best = following

    steps = sorted(tried)
    explained = np.array([tried[step][0] for step in steps])
    centre = np.clip(steps.index(best), 1, len(steps) - 2)
    near = slice(centre - 1, centre + 2)
    logarithm, deviation = _peak(np.log(FOCAL_STEP) * np.array(steps[near]), explained[near])
    factor = float(np.exp(logarithm))
    focal = factor * xu.focal_length(K, *images[0].shape[1::-1])
    return LensCheck(
        factor, deviation, FOCAL_STEP ** np.array(steps, float), explained.mean(1), focal
    )


def _align_all(images, poses, K, aligner):
    """The explained contrasts (N,) of frames with a K, and the aligned poses."""
    found = [aligner.track(image, pose, K) for image, pose in zip(images, poses)]
    explained = np.nan_to_num([one.explained_contrast for one in found])
    return explained, [one.pose for one in found]


def _align_again(images, known, K, step, known_step, aligner):
    """What `_align_all` finds with another focal length, from what it found with a known one."""
    old_K = _scale_focal(K, FOCAL_STEP**known_step)
    new_K = _scale_focal(K, FOCAL_STEP**step)
    box = aligner.target.box
    poses = [_pose_through(box, pose, old_K, new_K) for pose in known[1]]
    return _align_all(images, poses, new_K, aligner)


def _scale_focal(K, factor):
    """K (3, 3) with another focal length."""
    return K * [[factor, 1, 1], [1, factor, 1], [1, 1, 1]]


def _pose_through(box, pose, K, new_K):
    """The pose with which a box (8, 3) looks most alike through another camera matrix.

    The target stays about as large in the picture, and turns a little.
    """
    seen = xu.project_pose(box, pose, K)
    start = pose.copy()
    start[2, 3] *= new_K[0, 0] / K[0, 0]
    if not np.isfinite(seen).all():
        return start
    rotation, translation = cv2.Rodrigues(start[:3, :3])[0], start[:3, 3:].copy()
    found = cv2.solvePnPRefineLM(box, seen, new_K, None, rotation, translation)
    return xu.move_pose(np.eye(4), np.concatenate(found).ravel())


def _peak(places, explained):
    """Where a parabola through the means of explained contrasts (3, N) has its peak.

    Its standard deviation is that of the jackknife, which leaves out one frame at a time.

    Source: Efron, The Jackknife, the Bootstrap and Other Resampling Plans, SIAM 1982, chapter 3.
    """
    count = explained.shape[1]
    without = [
        _peak_of(places, np.delete(explained, left_out, axis=1).mean(1))
        for left_out in range(count)
    ]
    deviation = np.std(without) * np.sqrt(count - 1)
    return _peak_of(places, explained.mean(1)), float(deviation)


def _peak_of(places, values):
    """The peak of the parabola through three values; at most half a step beyond their places."""
    curvature, slope, _ = np.polyfit(places, values, 2)
    curvature = min(curvature, -1e-9)  # a parabola without a peak leads to an end
    beyond = np.log(FOCAL_STEP) / 2
    return float(np.clip(-slope / (2 * curvature), places[0] - beyond, places[-1] + beyond))
