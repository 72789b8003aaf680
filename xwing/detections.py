"""Where a clip shows its target: what the network detects in frames spread over it.

A finished clip need not begin where its first frame does. The network looks at every n-th frame,
and each detection is verified on the pixels of its frame alone. The most probable detection is the
best start for a track, and the others judge it: a track that is right passes where they are.
A track that they contradict began wrong or went astray. How much a detection says is its evidence,
-log(1 - p) of its probability p. So the sum of the evidence of several detections is that of the
probability that at least one of them is right.

Pixels convince only where the mesh has the target's colours. Of a box whose print the mesh does not
know, no detection is accepted. But the network still says where it is, and there its edges are
compared with templates from all sides, in seconds a frame.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.special import expit

import xwing_utils as xu
from xwing.footage import Clip, frames_at
from xwing.templates import Templates
from xwing.tracker import Tracker

# The network looks at about so many frames of a clip, some tenths of a second to a second apart; a
# look takes as long as tracking ten frames.
DETECTIONS = 32
INTERVALS = 0.4, 1.0  # seconds
MIN_DETECTIONS = 6

# A detection speaks for the frames around it: its weight falls to 1/e in so many intervals.
REACH = 5.0

# Two poses of one frame that are right, within 5 degrees and 0.106 diameters each, differ by no
# more than this: degrees, and diameters.
MAX_DISAGREEMENT_TURN = 10.0
MAX_DISAGREEMENT_SHIFT = 0.21285

MAX_PROBABILITY = 0.98  # of a detection: a single one does not outweigh many others

# Edges are compared in so many frames. Log-odds that the best pose is right: one, its edge
# agreement, and by how much that of the next one is lower, up to a limit. They were fitted on 168
# boxes: around six objects in their clips, 6 % of a side beside the true place, and in pictures
# without them. At least two frames have to agree, because those of one clip err alike.
EDGE_FRAMES = 6
EDGE_EVIDENCE = -23.5, 27.6, 34.5
MAX_EDGE_LEAD = 0.2
MAX_EDGE_PROBABILITY = 0.8


@dataclasses.dataclass(frozen=True)
class Detection:
    """What the network found in one frame."""

    index: int  # of the frame
    estimate: xu.PoseEstimate  # verified on the pixels; it has a pose, but may not be accepted
    second_target: np.ndarray | None = None  # (4, 4) pose

    @property
    def probability(self) -> float:
        """That its pose is right, 0 to 1."""
        return float(np.nan_to_num(self.estimate.probability))

    @property
    def evidence(self) -> float:
        """How much it says, see above."""
        return -float(np.log1p(-min(self.probability, MAX_PROBABILITY)))


def detection_interval(count: int, fps: float) -> int:
    """Return the n of every n-th frame at which the network looks first.

    Args:
        count: number of frames.
        fps: frames a second.
    """
    seconds = np.clip(count / fps / DETECTIONS, *INTERVALS)
    return max(1, min(round(seconds * fps), count // MIN_DETECTIONS))


def detect(tracker: Tracker, index: int, image: np.ndarray) -> list[Detection]:
    """Look for the target in a frame, and for a second one where it is found.

    Args:
        tracker: `Tracker` whose detector and aligner are used; it does not take the frame.
        index: number of the frame.
        image: (H, W, 3) uint8 RGB.

    Returns:
        a `Detection`, or none where no pose was found.
    """
    estimate = tracker.detect(image)
    if estimate.pose is None:
        return []
    second = tracker.detect_second(image, estimate.pose) if estimate.accepted else None
    return [Detection(index, estimate, second)]


def detect_by_edges(
    tracker: Tracker, clip: Clip | Iterable, detections: Sequence[Detection]
) -> list[Detection]:
    """Look for a plain target by its edges, where the network saw it in some frames of a clip.

    Args:
        tracker: `Tracker` whose detector and target are used; it takes no frame.
        clip: see `frames_at`.
        detections: of the network, from which frames are chosen.

    Returns:
        a `Detection` for each of up to EDGE_FRAMES frames.
    """
    places = np.linspace(0, len(detections) - 1, min(EDGE_FRAMES, len(detections)))
    numbers = [detections[place].index for place in places.round().astype(int)]
    templates = Templates(tracker.target)
    keypoints_alone = Tracker(tracker.K, tracker.fps, tracker.detector)
    found = []
    for index, image in zip(numbers, frames_at(clip, numbers), strict=True):
        around = keypoints_alone.detect(image).pose
        if around is not None:
            found += _fit_edges(templates, tracker, index, image, around)
    return found


def _fit_edges(templates, tracker, index, image, around):
    """A `Detection` at the pose whose edges fit best in the box of another pose, or none."""
    corners = xu.project_pose(tracker.target.box, around, tracker.K)
    try:
        box = np.concatenate([corners.min(0), corners.max(0)])
        starts = templates.find(image, tracker.K, box)
    except ValueError:  # the box is behind the camera, or hardly in the frame
        return []
    if not starts:
        return []
    best, *others = starts
    lead = best.edge_agreement - max((one.edge_agreement for one in others), default=0.0)
    evidence = np.dot(EDGE_EVIDENCE, [1, best.edge_agreement, min(lead, MAX_EDGE_LEAD)])
    probability = min(float(expit(evidence)), MAX_EDGE_PROBABILITY)
    accepted = probability >= tracker.aligner.verifier.settings.min_probability
    reason = "" if accepted else f"{best.edge_agreement:.0%} of its edges are in the frame"
    estimate = xu.PoseEstimate(best.pose, accepted=accepted, reason=reason, probability=probability)
    return [Detection(index, estimate)]


def ranked(detections: Iterable[Detection]) -> list[Detection]:
    """Return detections, the most probable one first."""
    return sorted(detections, key=lambda one: one.probability, reverse=True)


def difference(one: np.ndarray, other: np.ndarray, target: xu.Target) -> str:
    """Say how two poses (4, 4) of one frame differ; empty where both may be right.

    Symmetries and axes of revolution of the target count as no difference.
    """
    nearest = xu.nearest_equivalent(other, one, target)
    turn = xu.rotation_error(one, nearest)
    centre = np.append(target.box.mean(0), 1)
    shift = np.linalg.norm((one - nearest)[:3] @ centre) / target.diameter
    if turn <= MAX_DISAGREEMENT_TURN and shift <= MAX_DISAGREEMENT_SHIFT:
        return ""
    return f"differ by {turn:.0f} degrees and {shift:.2f} diameters"


class TrackSupport:
    """The detections in the frames of one track: which of them agree with it.

    Args:
        detections: `Detection` of the clip.
        poses: {number of a frame: pose (4, 4)} of the track.
        target: `Target`.
        interval: frames between two detections.
    """

    def __init__(
        self, detections: Sequence[Detection], poses: dict, target: xu.Target, interval: int
    ):
        within = [one for one in detections if one.index in poses]
        self.indices = np.array([one.index for one in within], int)
        self.evidence = np.array([one.evidence for one in within])
        agree = [not difference(poses[one.index], one.estimate.pose, target) for one in within]
        self.agree = np.array(agree, bool)
        self.interval = interval

    @property
    def probability(self) -> float:
        """That at least one of the detections that agree with the track is right."""
        return float(-np.expm1(-self.evidence[self.agree].sum()))

    def around(self, index: int) -> tuple[float, float]:
        """Return the evidence around a frame for the track, and against it."""
        reach = REACH * self.interval
        weighted = self.evidence * np.exp(-np.abs(self.indices - index) / reach)
        return float(weighted[self.agree].sum()), float(weighted[~self.agree].sum())
