"""The tracker on flights whose truth is known.

The smoother is held against batch least squares, and the whole chain against the clip's pixels.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing import metrics, parts, tracking
from xwing import tracker as tracker_module
from xwing.alignment import Aligner
from xwing.detections import Detection
from xwing.footage import Clip, Frame
from xwing.lens import LensCheck, check_lens
from xwing.mesh import load_mesh, rasterise
from xwing.tracking import Tracker, track_clip

FPS = 30


def flight(count=120, turn=(0.3, 0.8, 0.5), start=(-0.1, 0.05, 1.0), speed=(0.1, -0.05, 0.1)):
    """(count, 4, 4) poses of a ship at constant velocity, in radians and model units a second."""
    time = np.arange(count)[:, None] / FPS
    poses = np.tile(np.eye(4), (count, 1, 1))
    start_rotation = Rotation.from_euler("xyz", [50, 20, 10], degrees=True)
    poses[:, :3, :3] = (Rotation.from_rotvec(time * turn) * start_rotation).as_matrix()
    poses[:, :3, 3] = np.asarray(start) + time * speed
    return poses


def facing(pose):
    """(36,) bool: the keypoints whose surface faces the camera."""
    points = xu.KEYPOINTS @ pose[:3, :3].T + pose[:3, 3]
    normals = xu.NORMALS @ pose[:3, :3].T
    return (points * normals).sum(1) <= 0


class Oracle:
    """A detector that gives keypoints of known poses, with noise; an image is a frame number."""

    def __init__(self, poses, K, noise=1.0, corners_only=False):
        rng = np.random.default_rng(0)
        count = 8 if corners_only else 36
        self.keypoints = np.stack([xu.project_pose(xu.KEYPOINTS[:count], p, K) for p in poses])
        self.keypoints += rng.normal(0, noise, self.keypoints.shape)
        self.confidence = np.array([facing(p) for p in poses])[:, :count] * 0.9
        self.sigma = np.full(count, noise)
        self.asked = 0

    def __call__(self, image, box=None):
        self.asked += 1
        i = int(image[0, 0, 0])
        return self.keypoints[i], self.confidence[i], self.sigma

    def frames(self):
        numbers = range(len(self.keypoints))
        return [Frame(np.full((4, 4, 3), i, np.uint8), i / FPS, "") for i in numbers]


def errors(track, truth):
    """(N,) rotation errors in degrees, NaN where a frame is lost."""
    found = [
        np.nan if tracked.pose is None else xu.rotation_error(tracked.pose, true)
        for tracked, true in zip(track, truth)
    ]
    return np.array(found)


def statuses(*runs):
    """The status of every frame, from runs such as ("tracked", 50)."""
    return [status for status, count in runs for _ in range(count)]


def follow(oracle, K, tracker=None):
    """The live track of an oracle's frames."""
    tracker = tracker or Tracker(K, FPS, oracle)
    return [tracker.update(frame.image, frame.seconds) for frame in oracle.frames()]


# ------------------------------------------------------------ filter and smoother


def test_filter_and_smoother_are_better_than_single_frames(K):
    truth = flight()
    oracle = Oracle(truth, K)
    tracker = Tracker(K, FPS, oracle, keep=True)
    live = follow(oracle, K, tracker)
    estimates = [
        xu.estimate_pose(keypoints, K, confidence, oracle.sigma)
        for keypoints, confidence in zip(oracle.keypoints, oracle.confidence)
    ]
    alone = errors(estimates, truth)
    assert all(t.status == "tracked" for t in live)
    smoothed = np.median(errors(tracker.smoothed(), truth))
    assert smoothed < np.median(errors(live, truth)) < np.median(alone)


def test_smoothing_a_straight_flight_is_batch_least_squares(K):
    """Without rotation the model is linear, and one least-squares problem gives all positions."""
    rng = np.random.default_rng(3)
    tracker = Tracker(K, FPS, keep=True)
    measured = []
    spread = []
    for position in flight(12, turn=(0, 0, 0))[:, :3, 3]:
        pose = np.eye(4)
        pose[:3, 3] = position + rng.normal(0, 0.01, 3)
        covariance = np.diag(np.concatenate([[1e-4] * 3, rng.uniform(0.5, 2, 3) * 1e-4]))
        tracker.update_pose(xu.PoseEstimate(pose, covariance, True))
        measured.append(pose[:3, 3])
        spread.append(np.diag(covariance)[3:])
    smoothed = np.array([t.pose[:3, 3] for t in tracker.smoothed()])

    h = 1 / FPS
    count = len(measured)
    density = (tracker.model.translation_acceleration * xu.XWING.diameter) ** 2
    start_velocity = tracker.model.translation_velocity * xu.XWING.diameter
    noise = density * np.array([[h**3 / 3, h**2 / 2], [h**2 / 2, h]])
    whitening = np.linalg.cholesky(np.linalg.inv(noise)).T
    for axis in range(3):
        rows = [np.eye(2 * count)[1] / start_velocity]
        right = [0.0]
        for i in range(count):
            rows.append(np.eye(2 * count)[2 * i] / np.sqrt(spread[i][axis]))
            right.append(measured[i][axis] / np.sqrt(spread[i][axis]))
        for i in range(count - 1):
            step = np.zeros((2, 2 * count))
            step[:, 2 * i : 2 * i + 4] = np.hstack([-np.array([[1, h], [0, 1]]), np.eye(2)])
            rows += list(whitening @ step)
            right += [0.0, 0.0]
        solved = np.linalg.lstsq(np.array(rows), np.array(right), rcond=None)[0]
        np.testing.assert_allclose(smoothed[:, axis], solved[::2], atol=1e-7)


def test_claimed_covariance_is_honest(K):
    truth = flight(60)
    oracle = Oracle(truth, K)
    tracker = Tracker(K, FPS, oracle, keep=True)
    follow(oracle, K, tracker)
    distances = []
    for t, pose in list(zip(tracker.smoothed(), truth))[10:50]:
        step = xu.pose_step(pose, t.pose)
        distances.append(step @ np.linalg.solve(t.covariance, step))
    assert 6 / 1.5 < np.mean(distances) < 6 * 1.5


def test_frames_may_come_at_any_time(K):
    """Every third frame is left out, and the time stamps say so. The prediction still fits."""
    truth = flight()
    oracle = Oracle(truth, K, noise=0.3)
    tracker = Tracker(K, FPS, oracle)
    frames = [f for i, f in enumerate(oracle.frames()) if i % 3]
    live = [tracker.update(f.image, f.seconds) for f in frames]
    assert all(t.status == "tracked" for t in live)
    assert np.allclose([t.seconds for t in live], [f.seconds for f in frames])
    velocity = np.mean([t.velocity for t in live[-40:]], axis=0)
    np.testing.assert_allclose(velocity[:3], (0.3, 0.8, 0.5), atol=0.1)
    np.testing.assert_allclose(velocity[3:], (0.1, -0.05, 0.1), atol=0.03)


# ------------------------------------------------------------ gaps and doubts


def test_time_stamps_that_begin_again_start_the_filter_anew(K):
    """A clip of 40 frames is played twice: the ship jumps back, and is found there at once."""
    truth = flight(40)
    oracle = Oracle(truth, K, noise=0.3)
    tracker = Tracker(K, FPS, oracle)
    first = follow(oracle, K, tracker)
    with pytest.warns(UserWarning, match="time stamps begin again; the target is looked for anew"):
        again = follow(oracle, K, tracker)
    assert [t.status for t in again] == [t.status for t in first]
    assert np.max(errors(again, truth)) < 5
    np.testing.assert_allclose([t.seconds for t in first + again], np.arange(80) / FPS)


def test_a_jump_ahead_in_time_ends_the_track(K):
    """What moved for ten minutes is not predicted; the ship that is seen then starts a track."""
    truth = flight(60)
    oracle = Oracle(truth, K, noise=0.3)
    tracker = Tracker(K, FPS, oracle)
    seconds = np.arange(60) / FPS + 600 * (np.arange(60) >= 30)
    live = [tracker.update(f.image, t) for f, t in zip(oracle.frames(), seconds)]
    assert live[30].status == "tracked" and tracker.age == 30
    assert np.max(errors(live, truth)) < 5

    slow = Tracker(K, 1.0, oracle)  # a camera that takes one frame a second has no jumps
    for frame in oracle.frames()[::10]:
        slow.update(frame.image)
    assert slow.age == 6


def test_time_stamps_that_stand_still_change_no_track(K):
    truth = flight(60)
    oracle = Oracle(truth, K, noise=0.3)
    usual = follow(oracle, K)
    tracker = Tracker(K, FPS, oracle)
    still = [tracker.update(frame.image, 0.0) for frame in oracle.frames()]
    assert [t.status for t in still] == [t.status for t in usual]
    np.testing.assert_allclose(np.diff([t.seconds for t in still])[1:], 1 / FPS)
    assert np.max(errors(still, truth)) < 5


@pytest.mark.parametrize("kind", ["grey", "rgba", "float", "16 bit", "view"])
def test_the_tracker_takes_pictures_of_any_kind(K, kind):
    truth = flight(5)
    oracle = Oracle(truth, K, noise=0.3)
    images = {
        "grey": lambda image: image[..., 0],
        "rgba": lambda image: np.dstack([image, np.full((4, 4), 255, np.uint8)]),
        "float": lambda image: image / 255,
        "16 bit": lambda image: image * np.uint16(257),
        "view": lambda image: image[::-1, ::-1, ::-1],
    }
    tracker = Tracker(K, FPS, oracle)
    live = [tracker.update(images[kind](f.image), f.seconds) for f in oracle.frames()]
    for tracked, usual in zip(live, follow(oracle, K)):
        np.testing.assert_array_equal(tracked.pose, usual.pose)

    with pytest.raises(ValueError, match=r"image: expected the shape \(H, W, 3\)"):
        tracker.update(np.zeros((3, 8, 8), np.uint8))
    assert tracker.seconds == pytest.approx(4 / FPS) and tracker.motion is not None


def test_a_gap_of_half_a_second_is_bridged(K):
    truth = flight()
    oracle = Oracle(truth, K)
    oracle.confidence[50:65] = 0
    live = follow(oracle, K)
    runs = statuses(("tracked", 50), ("predicted", 15), ("tracked", 55))
    assert [t.status for t in live] == runs
    assert np.nanmax(errors(live, truth)) < 15
    assert all(t.reason for t in live[50:65])
    track = track_clip(oracle.frames(), K, oracle, fps=FPS, progress=False)
    assert [t.status for t in track] == [t.status for t in live]
    assert np.nanmax(errors(track, truth)) < 4


def test_a_longer_gap_and_an_absent_ship_have_no_pose(K):
    truth = flight()
    oracle = Oracle(truth, K)
    for hidden in (slice(0, 5), slice(50, 80), slice(110, 120)):
        oracle.confidence[hidden] = 0
    live = follow(oracle, K)
    assert live[64].status == "predicted"
    assert live[70].status == "lost"
    assert live[90].status == "tracked"

    track = track_clip(oracle.frames(), K, oracle, fps=FPS, progress=False)
    runs = statuses(("lost", 5), ("tracked", 45), ("lost", 30), ("tracked", 30), ("lost", 10))
    assert [t.status for t in track] == runs
    assert all((t.pose is None) == (t.status == "lost") for t in track)

    oracle.confidence[:] = 0
    track = track_clip(oracle.frames(), K, oracle, fps=FPS, progress=False)
    assert all(t.status == "lost" for t in track)


@pytest.mark.parametrize("before,gone,after", [(15, 63, 30), (30, 100, 40)])
def test_a_long_absence_throws_nothing_away(K, before, gone, after):
    truth = flight(before + gone + after)
    oracle = Oracle(truth, K, noise=0.5)
    oracle.confidence[before : before + gone] = 0
    track = track_clip(oracle.frames(), K, oracle, fps=FPS, progress=False)
    runs = statuses(("tracked", before), ("lost", gone), ("tracked", after))
    assert [t.status for t in track] == runs
    assert np.nanmax(errors(track, truth)) < 5


def test_the_frames_before_settle_a_flip(K):
    """In every second frame from 40 to 59 the corners of top and bottom are exchanged.

    Alone, such a frame shows a rolled ship.
    """
    truth = flight()
    oracle = Oracle(truth, K, noise=0.8, corners_only=True)
    oracle.confidence[:] = 0.9
    rolled = xu.MIRROR[[6, 7, 4, 5, 2, 3, 0, 1]]
    oracle.keypoints[40:60:2] = oracle.keypoints[40:60:2, rolled]
    alone = [
        xu.estimate_pose(keypoints, K, confidence, oracle.sigma)
        for keypoints, confidence in zip(oracle.keypoints, oracle.confidence)
    ]
    assert sum(errors(alone, truth) > 90) >= 8

    live = follow(oracle, K)
    assert np.nanmax(errors(live, truth)) < 20
    assert all(t.status == "predicted" for t in live[40:60:2])


def test_a_wild_pose_is_not_believed(K):
    truth = flight()
    oracle = Oracle(truth, K)
    oracle.keypoints[70] += 40
    live = follow(oracle, K)
    assert live[70].status == "predicted"
    assert "too far" in live[70].reason
    assert np.nanmax(errors(live, truth)[10:]) < 10


def test_a_track_that_began_the_wrong_way_round_is_given_up(K):
    truth = flight(90)
    oracle = Oracle(truth, K)
    tracker = Tracker(K, FPS, oracle)
    wrong = xu.PoseEstimate(truth[0] @ xu.XWING.lookalikes[0], np.eye(6) * 1e-4, True)
    tracker.update_pose(wrong, 0.0)
    live = [tracker.update(frame.image, frame.seconds) for frame in oracle.frames()[1:]]
    found = errors(live, truth[1:])
    assert found[0] > 90
    assert np.nanmax(found[-45:]) < 10


def test_what_is_given_up_live_is_given_up_in_the_finished_track(K):
    truth = flight(90)
    oracle = Oracle([truth[0] @ xu.XWING.lookalikes[0], *truth[1:]], K)
    frames = oracle.frames()
    live = follow(oracle, K, Tracker(K, FPS, oracle))
    track = track_clip(frames, K, oracle, fps=FPS, progress=False)
    right = errors(live, truth) < 10
    assert errors(live, truth)[0] > 90
    assert right[-45:].all()
    assert (errors(track, truth)[right] < 10).all()


def test_a_missing_frame_is_predicted(K):
    truth = flight(40)
    oracle = Oracle(truth, K)
    tracker = Tracker(K, FPS, oracle)
    images = [frame.image for frame in oracle.frames()]
    images[20] = None
    live = [tracker.update(image) for image in images]
    assert live[20].status == "predicted"
    assert live[20].reason == "the frame is missing"
    assert errors(live, truth)[20] < 5
    assert live[21].status == "tracked"


def test_memory_does_not_grow_unless_asked(K):
    oracle = Oracle(flight(20), K)
    tracker = Tracker(K, FPS, oracle)
    follow(oracle, K, tracker)
    assert len(tracker.steps) == 1


@pytest.mark.parametrize("fps", [None, 0, -30, float("nan")])
def test_a_wrong_rate_is_refused_before_the_work(K, fps):
    oracle = Oracle(flight(3), K)
    with pytest.raises(ValueError, match="fps: expected a positive number"):
        track_clip(oracle.frames(), K, oracle, fps=fps, progress=False)
    assert oracle.asked == 0


def test_a_clip_of_no_frames_has_no_track(K):
    oracle = Oracle(flight(1), K)
    assert track_clip([], K, oracle, fps=FPS, progress=False) == []


# ------------------------------------------------------------ on the pixels


@pytest.fixture(scope="module")
def aligner(root):
    return Aligner(load_mesh(root / "data" / "xwing.obj"))


@pytest.fixture(scope="module")
def clip_frames(root):
    """The clip's images and true poses."""
    paths, matrices = xu.load_dataset(root / "data" / "frames")
    model_view, _ = xu.load_camera(root / "data" / "frames")
    images = [xu.read_image(path) for path in paths]
    poses = [xu.pose_in_camera(model_view, matrix) for matrix in matrices]
    return images, poses


def flat_picture(ship, pose, K):
    """A picture (256, 256, 3) uint8 in which each triangle has one colour and one shade."""
    triangles = ship.triangles
    ids, _ = rasterise(triangles, pose, K, 256, 256)
    a, b, c = np.moveaxis(triangles, 1, 0)
    sides = np.cross(b - a, c - a) @ pose[:3, :3].T
    shade = 0.5 + 0.4 * sides @ [0.3, -0.8, -0.5] / (np.linalg.norm(sides, axis=1) + 1e-12)
    colours = 255 * np.float32(ship.colours)[ship.face_materials] * shade[:, None]
    sky = [[12, 14, 30]]  # the last one, where there is no triangle (-1)
    picture = np.vstack([colours, sky])[ids]
    return picture.clip(0, 255).astype(np.uint8)


class NoNetwork:
    """A detector that gives the keypoints of a true pose when asked, and counts how often.

    `elsewhere` is the pose of a second ship. It is seen in whole frames where the first is painted
    over.
    """

    def __init__(self, K):
        self.K = K
        self.asked = 0
        self.pose = None
        self.elsewhere = None

    def __call__(self, image, box=None):
        self.asked += 1
        pose = self.pose
        if pose is not None and box is None and self.is_painted_over(image, pose):
            pose = self.elsewhere
        if pose is None:
            return np.full((36, 2), np.nan), np.zeros(36), np.full(36, np.inf)
        return xu.project_pose(xu.KEYPOINTS, pose, self.K), facing(pose) * 0.9, np.ones(36)

    def is_painted_over(self, image, pose):
        x, y = xu.project_pose(np.zeros((1, 3)), pose, self.K)[0].astype(int)
        middle = image[y - 2 : y + 3, x - 2 : x + 3].astype(int)
        return not np.ptp(middle, axis=(0, 1)).any()


def play(images, poses, K, aligner, known=lambda i: True):
    """Track images; the detector knows the true pose of the frames that `known` names."""
    detector = NoNetwork(K)
    tracker = Tracker(K, FPS, detector, aligner)
    live = []
    for i, (image, pose) in enumerate(zip(images, poses)):
        detector.pose = pose if known(i) else None
        live.append(tracker.update(image))
    return live, detector


def test_the_pixels_follow_the_ship_without_the_network(K, clip_frames, aligner):
    images, truth = (part[60:100] for part in clip_frames)
    live, detector = play(images, truth, K, aligner, known=lambda i: i == 0)
    assert all(t.status == "tracked" for t in live)
    # The network is used at the start, after 1, 2, 4, 8, 16 and 32 frames, and for a second ship.
    assert detector.asked == 8
    assert np.median(errors(live, truth)) < 0.3 and errors(live, truth).max() < 1


@pytest.mark.parametrize("step", [2, 4])
def test_faster_motion_is_followed(K, clip_frames, aligner, step):
    images, truth = (part[40:200:step] for part in clip_frames)
    live, _ = play(images, truth, K, aligner)
    right = errors(live, truth) < 5
    assert np.mean(right) > 0.97


def test_a_cut_to_another_scene_starts_a_new_track(K, clip_frames, aligner):
    images, truth = ([*part[60:75], *part[150:165]] for part in clip_frames)
    live, _ = play(images, truth, K, aligner)
    assert all(t.status == "tracked" for t in live) and errors(live, truth).max() < 2


def test_a_second_of_black_is_bridged_then_lost_then_found(K, clip_frames, aligner):
    images, truth = (list(part[60:120]) for part in clip_frames)
    for i in range(10, 40):
        images[i] = np.zeros_like(images[i])
    live, _ = play(images, truth, K, aligner, known=lambda i: not 10 <= i < 40)
    runs = statuses(("tracked", 10), ("predicted", 15), ("lost", 15), ("tracked", 20))
    assert [t.status for t in live] == runs
    assert np.nanmax(errors(live, truth)[40:]) < 2


def test_a_flash_is_bridged(K, clip_frames, aligner):
    images, truth = (list(part[60:80]) for part in clip_frames)
    images[10] = np.full_like(images[10], 255)
    live, _ = play(images, truth, K, aligner, known=lambda i: i != 10)
    assert [t.status for t in live] == statuses(("tracked", 10), ("predicted", 1), ("tracked", 9))
    assert errors(live, truth).max() < 2


def test_a_ship_that_leaves_and_comes_back_elsewhere_is_found_there(K, clip_frames, aligner):
    order = [*range(60, 90), *[225] * 30, *range(150, 170)]  # frame 225 shows no ship
    images, truth = ([part[i] for i in order] for part in clip_frames)
    live, _ = play(images, truth, K, aligner, known=lambda i: not 30 <= i < 60)
    runs = statuses(("tracked", 30), ("predicted", 15), ("lost", 15), ("tracked", 20))
    assert [t.status for t in live] == runs
    assert errors(live, truth)[[*range(30), *range(60, 80)]].max() < 2


def test_a_second_ship_is_reported_and_the_first_one_followed(K, clip_frames, aligner):
    """It shows in frames 20 to 55. The network looks for one each second, for 0.3 seconds."""
    images, truth = (part[60:140] for part in clip_frames)
    second = clip_frames[1][150]
    detector = NoNetwork(K)
    tracker = Tracker(K, FPS, detector, aligner)
    live = []
    for i, (image, pose) in enumerate(zip(images, truth)):
        shown = 20 <= i < 56
        image = np.maximum(image, clip_frames[0][150]) if shown else image
        detector.pose = pose
        detector.elsewhere = second if shown else None
        live.append(tracker.update(image))
    assert all(t.status == "tracked" for t in live) and errors(live, truth).max() < 2
    reported = [t.second_target is not None for t in live]
    assert not any(reported[:20])
    assert all(reported[45:60])
    assert not any(reported[-7:])
    assert xu.rotation_error(live[50].second_target, second) < 2
    assert f"a second target in sight in {sum(reported)}" in tracking.summary(live)


def test_a_frame_that_repeats_is_a_pause(K, clip_frames, aligner):
    images, truth = (list(part[60:80]) for part in clip_frames)
    images.insert(10, images[9])
    truth.insert(10, truth[9])
    live, _ = play(images, truth, K, aligner)
    assert all(t.status == "tracked" for t in live) and errors(live, truth).max() < 2


def test_a_wrong_track_is_replaced_by_a_redetection_that_the_pixels_confirm(
    K, clip_frames, aligner
):
    images, truth = (part[60:110] for part in clip_frames)
    detector = NoNetwork(K)
    tracker = Tracker(K, FPS, detector, aligner)
    wrong = xu.PoseEstimate(
        truth[0] @ xu.XWING.lookalikes[0], np.eye(6) * 1e-4, True, explained_contrast=0.5
    )
    tracker.update_pose(wrong)
    live = []
    for image, pose in zip(images[1:], truth[1:]):
        detector.pose = pose
        live.append(tracker.update(image))
    assert errors(live, truth[1:])[-10:].max() < 2


def test_a_finished_clip_goes_back_to_where_the_network_was_uncertain(K, clip_frames, aligner):
    images, truth = (part[60:90] for part in clip_frames)
    detector = NoNetwork(K)

    class Clip:
        fps = FPS
        count = 30

        def __iter__(self):
            for i, image in enumerate(images):
                detector.pose = truth[i] if i >= 10 else None
                yield Frame(image, i / FPS, "")

    track = track_clip(Clip(), K, detector, aligner, progress=False)
    assert all(t.status == "tracked" for t in track)
    assert np.median(errors(track, truth)) < 0.3 and errors(track, truth).max() < 1


@pytest.mark.parametrize(
    "wrong, verdict", [(0.7, "wrong"), (1.0, "confirmed"), (1.3, "wrong"), (1.9, "wrong")]
)
def test_the_focal_length_can_be_told_from_the_frames(K, clip_frames, aligner, wrong, verdict):
    images, truth = (part[30:110:20] for part in clip_frames)
    scaled = K * [[wrong, 1, 1], [1, wrong, 1], [1, 1, 1]]
    started = np.array(truth)
    started[:, 2, 3] *= wrong  # the distance that is found with it
    lens = check_lens(images, started, scaled, aligner)
    assert lens.factor * wrong == pytest.approx(1, abs=0.05)
    assert lens.verdict == verdict
    assert lens.focal == pytest.approx(35, abs=2)
    assert lens.explained.shape == lens.factors.shape
    assert lens.factors[lens.explained.argmax()] == pytest.approx(lens.factor, rel=0.15)


def test_frames_without_the_target_say_nothing_about_the_lens(K, clip_frames, aligner):
    noise = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), np.uint8)
    poses = clip_frames[1][30:110:20]
    assert check_lens(list(noise), poses, K, aligner).verdict == "unknown"
    assert check_lens(list(noise[:3]), poses[:3], K, aligner).verdict == "unknown"


# ------------------------------------------------------------ how confident


def probability(live):
    return np.array([t.probability for t in live])


def test_a_probability_is_between_0_and_1_and_a_lost_frame_has_none(K, clip_frames, aligner):
    images, truth = (list(part[60:120]) for part in clip_frames)
    images[10:40] = [np.zeros_like(images[0])] * 30
    live, _ = play(images, truth, K, aligner, known=lambda i: not 10 <= i < 40)
    lost = np.array([t.status == "lost" for t in live])
    found = probability(live)
    assert lost.any() and (found[lost] == 0).all()
    assert ((found > 0) & (found < 1))[~lost].all()
    assert found[5:10].min() > 0.9 and found[45:].min() > 0.9
    # It falls while nothing is seen.
    assert (np.diff(found[11:25]) <= 0).all()
    assert found[24] < 0.5


@pytest.mark.parametrize("step", [1, 4])
def test_the_probability_is_about_the_fraction_of_right_poses(K, clip_frames, aligner, step):
    images, truth = (part[:180:step] for part in clip_frames)
    live, _ = play(images, truth, K, aligner, known=lambda i: i % 3)
    seen = [xu.in_frame(xu.project_pose(xu.BOUNDING_BOX, pose, K)).sum() >= 4 for pose in truth]
    right = metrics.recalled([t.pose for t in live], truth)[seen]
    found = probability(live)[seen]
    assert abs(found.mean() - right.mean()) < 0.05
    assert right[found > 0.9].mean() > 0.97


@pytest.mark.parametrize("turned", [1, 2, 3])
def test_a_wrong_track_is_not_trusted(K, root, turned):
    """A ship in flat colours; its track begins with a pose that is ambiguous with the true one."""
    ship = load_mesh(root / "data" / "xwing.obj")
    aligner = Aligner(ship)
    truth = flight(12)
    images = [flat_picture(ship, pose, K) for pose in truth]
    wrong = xu.ambiguous_poses(truth[0])[turned]
    for start, right in ((truth[0], True), (wrong, False)):
        tracker = Tracker(K, FPS, None, aligner)
        tracker.update_pose(xu.PoseEstimate(start, np.eye(6) * 1e-4, True, explained_contrast=0.6))
        live = [tracker.update(image) for image in images[1:]]
        assert (errors(live, truth[1:])[-1] < 5) == right
        found = probability(live)
        assert found.min() > 0.8 if right else found.max() < 0.3


def test_a_smoothed_track_is_as_confident(K):
    truth = flight(60)
    oracle = Oracle(truth, K)
    oracle.confidence[20:24] = 0
    oracle.confidence[50:] = 0
    track = track_clip(oracle.frames(), K, oracle, fps=FPS, progress=False)
    found = probability(track)
    assert ((found > 0) & (found < 1))[:50].all() and (found[50:] == 0).all()
    assert found[21:23].max() < np.median(found[:20])


# ------------------------------------------------------------ files


def test_an_exported_track_holds_the_poses(K, tmp_path):
    poses = flight(3)
    track = [
        tracking.TrackedPose("tracked", i * 0.04, pose, probability=0.75)
        for i, pose in enumerate(poses)
    ]
    track.append(tracking.TrackedPose("lost", 0.12, reason="0 points are found, 4 are needed"))
    tracking.export_track(tmp_path / "a.json", track, K, 256, 256)
    tracking.export_track(tmp_path / "a.csv", track, K, 256, 256)
    rows = json.loads((tmp_path / "a.json").read_text())["frames"]
    table = pd.read_csv(tmp_path / "a.csv", index_col="frame")
    assert [row["probability"] for row in rows] == [0.75, 0.75, 0.75, 0]
    assert table["probability"].tolist() == [0.75, 0.75, 0.75, 0]
    for row, (_, line), pose in zip(rows, table.iterrows(), poses):
        np.testing.assert_allclose(row["matrix"], pose, atol=1e-12)
        w, x, y, z = row["quaternion"]
        rotation = Rotation.from_quat([x, y, z, w]).as_matrix()
        np.testing.assert_allclose(rotation, pose[:3, :3], atol=1e-9)
        assert line["seconds"] == row["seconds"] and line["tx"] == pytest.approx(pose[0, 3])
        assert line["m12"] == pytest.approx(pose[1, 2])
    assert rows[3]["matrix"] is None
    assert rows[3]["seconds"] == 0.12
    assert "4 are needed" in rows[3]["reason"]


def test_another_suffix_is_refused(K, tmp_path):
    with pytest.raises(ValueError, match="expected a .csv or .json file"):
        tracking.export_track(tmp_path / "a.txt", [], K, 256, 256)


# ------------------------------------------------------------ targets and units


def scaled_target(factor, folder):
    """The X-wing in units that are smaller by a factor, with its mesh in a folder."""
    source = xu.XWING.mesh
    lines = []
    for line in source.read_text().splitlines():
        if line.startswith("v "):
            point = np.array(line.split()[1:], float) * factor
            line = " ".join(["v", *map(repr, point.tolist())])
        lines.append(line)
    mesh = folder / source.name
    mesh.write_text("\n".join(lines))
    shutil.copy(source.with_suffix(".mtl"), folder)

    def in_new_units(motions):
        return np.array([xu.scale_pose(motion, factor) for motion in motions])

    return dataclasses.replace(
        xu.XWING,
        name=f"X-wing times {factor}",
        mesh=mesh,
        box=xu.XWING.box * factor,
        diameter=xu.XWING.diameter * factor,
        keypoints=xu.XWING.keypoints * factor,
        mirror=xu.scale_pose(xu.XWING.mirror, factor),
        symmetries=in_new_units(xu.XWING.symmetries),
        lookalikes=in_new_units(xu.XWING.lookalikes),
        lasers=xu.XWING.lasers * factor,
    )


def assert_same_track(scaled, track, factor, radians):
    """Two tracks are the same to some radians and diameters, though their units differ."""
    assert [t.status for t in scaled] == [t.status for t in track]
    diameter = xu.XWING.diameter
    for found, wanted in zip(scaled, track):
        assert found.probability == pytest.approx(wanted.probability, abs=radians)
        if wanted.pose is None:
            continue
        assert np.radians(xu.rotation_error(found.pose, wanted.pose)) < radians
        shift = found.pose[:3, 3] / factor - wanted.pose[:3, 3]
        assert np.linalg.norm(shift) / diameter < radians
        speed = found.velocity[3:] / factor - wanted.velocity[3:]
        assert np.linalg.norm(speed) / diameter < 30 * radians


# A power of two scales every number exactly; 1,000 is a mesh in millimetres.
FACTORS = pytest.mark.parametrize("factor, radians", [(1024, 1e-6), (1000, np.radians(0.01))])


@FACTORS
def test_a_track_of_keypoints_does_not_depend_on_the_unit(K, tmp_path, factor, radians):
    truth = flight(60)
    tracks = []
    for target in (xu.XWING, scaled_target(factor, tmp_path)):
        oracle = Oracle(truth, K)
        oracle.target = target
        oracle.confidence[30:36] = 0
        oracle.keypoints[50] += 40
        live = follow(oracle, K)
        track = track_clip(oracle.frames(), K, oracle, fps=FPS, progress=False)
        tracks.append(live + track)
    seen = {t.status for t in tracks[0]}
    assert {"predicted", "tracked"} <= seen
    assert_same_track(*tracks[::-1], factor, radians)


@FACTORS
def test_a_track_on_the_pixels_does_not_depend_on_the_unit(
    K, clip_frames, tmp_path, factor, radians
):
    images, truth = (part[60:100] for part in clip_frames)
    tracks = []
    for target in (xu.XWING, scaled_target(factor, tmp_path)):
        live, _ = play(images, truth, K, Aligner(target), known=lambda i: i % 2 == 0)
        tracks.append(live)
    assert all(t.status == "tracked" for t in tracks[0])
    assert_same_track(*tracks[::-1], factor, radians)


def test_the_probability_of_a_pose_does_not_depend_on_the_unit():
    """The translation counts in diameters."""
    covariance = np.diag([1e-4, 2e-4, 1e-4, 1e-3, 2e-3, 1e-3])
    diameter = xu.XWING.diameter
    features = tracking.trust_features(covariance, np.nan, diameter)
    wanted = [1, 0, np.log10(np.sqrt(4e-4)), np.log10(np.sqrt(4e-3) / diameter)]
    np.testing.assert_allclose(features, wanted, rtol=1e-12)


def test_a_tracker_follows_the_target_of_its_parts(K, tmp_path):
    other = scaled_target(2, tmp_path)
    detector = NoNetwork(K)
    aligner = SimpleNamespace(target=other)
    assert Tracker(K, FPS).target is xu.XWING
    assert Tracker(K, FPS, detector).target is xu.XWING
    assert Tracker(K, FPS, detector, aligner).target is other

    detector.target = other
    assert Tracker(K, FPS, detector).target is other
    assert Tracker(K, FPS, detector, aligner).target is other

    detector.target = xu.XWING
    with pytest.raises(ValueError, match="the detector's weights belong to the target"):
        Tracker(K, FPS, detector, aligner)


# ------------------------------------------------------------ from a pose that the user gives


@pytest.fixture
def box_aligner(footage):
    """A fresh aligner of the box in the footage: tracks teach it."""
    return Aligner(xu.load_target(footage.mesh))


def shifted(pose, shift):
    """A pose (4, 4) whose target is moved by a shift (3,) in camera axes."""
    moved = pose.copy()
    moved[:3, 3] += shift
    return moved


def box_frames(footage):
    return [Frame(image, i / FPS, "") for i, image in enumerate(footage.images)]


def follow_box(footage, aligner):
    """The live track of the footage, started at the true pose of its first frame."""
    tracker = Tracker(footage.K, FPS, aligner=aligner)
    first = tracker.start(footage.images[0], footage.poses[0])
    return [first, *(tracker.update(image) for image in footage.images[1:])]


def test_a_mesh_alone_is_followed_from_a_start(footage, box_aligner):
    live = follow_box(footage, box_aligner)
    assert all(t.status == "tracked" for t in live)
    np.testing.assert_array_equal(live[0].pose, footage.poses[0])
    assert live[0].seconds == 0 and live[-1].seconds == pytest.approx(29 / FPS)
    assert np.median(errors(live, footage.poses)) < 0.5
    assert errors(live, footage.poses).max() < 2
    assert probability(live)[0] > 0.75  # as exact as a start is taken to be
    assert probability(live)[1:].min() > 0.9
    assert 2 <= len(box_aligner.key_frames.frames) <= 5


def test_without_learning_the_box_is_lost(footage, box_aligner, monkeypatch):
    monkeypatch.setattr(box_aligner, "learn", lambda *arguments: None)
    live = follow_box(footage, box_aligner)
    assert live[-1].status == "lost" or errors(live, footage.poses)[-1] > 10


def test_a_target_that_is_gone_is_lost(footage, box_aligner):
    tracker = Tracker(footage.K, FPS, aligner=box_aligner)
    for i, image in enumerate(footage.images[:6]):
        tracker.update(image) if i else tracker.start(image, footage.poses[0])
    live = [tracker.update(footage.background) for _ in range(20)]
    assert live[0].status == "predicted" and live[-1].status == "lost"
    assert len(box_aligner.key_frames.frames) == 1


def test_a_target_that_was_hidden_is_found_again(footage, box_aligner):
    """The key frames of its first frames lead back to it."""
    tracker = Tracker(footage.K, FPS, aligner=box_aligner)
    tracker.start(footage.images[0], footage.poses[0])
    for image in footage.images[1:10]:
        tracker.update(image)
    hidden = [tracker.update(footage.background) for _ in range(20)]
    assert hidden[-1].status == "lost"
    back = [tracker.update(image) for image in footage.images[10:20]]
    found = [t.status for t in back].index("tracked")
    assert found <= tracker_module.SEARCH_FRAMES
    assert errors(back[found:], footage.poses[10 + found : 20]).max() < 3


def test_an_occluder_does_not_drag_the_pose(footage, box_aligner):
    """A hand of one colour moves over half of the box, and with it."""
    tracker = Tracker(footage.K, FPS, aligner=box_aligner)
    tracker.start(footage.images[0], footage.poses[0])
    live = [tracker.update(image) for image in footage.images[1:6]]
    for i in range(6, 14):
        pixels = xu.project_pose(box_aligner.target.box, footage.poses[i], footage.K)
        low, high = pixels.min(0).astype(int), pixels.max(0).astype(int)
        image = footage.images[i].copy()
        reach = low[0] + (high[0] - low[0]) * min(i - 5, 4) // 8
        image[low[1] : high[1], low[0] : reach] = (190, 140, 120)
        live.append(tracker.update(image))
    assert [t.status for t in live] == ["tracked"] * 13
    assert errors(live, footage.poses[1:14]).max() < 4
    assert 0.35 < live[-1].local_agreement < 0.75 < live[0].local_agreement


def test_a_track_of_the_network_teaches_and_a_contradiction_unteaches(K, clip_frames, root):
    images, poses = clip_frames
    own = Aligner(load_mesh(root / "data" / "xwing.obj"))
    detector = NoNetwork(K)
    tracker = Tracker(K, FPS, detector, own)
    for image, detector.pose in zip(images[60:105], poses[60:105]):
        tracker.update(image)
    assert tracker.learns and own.key_frames.frames

    flipped = xu.ambiguous_poses(poses[105])[1]
    verified = xu.PoseEstimate(
        flipped, np.eye(6) * 1e-5, True, explained_contrast=0.9, probability=0.99
    )
    tracker.update_pose(verified)
    assert tracker.age == 1
    assert not tracker.learns and not own.key_frames.frames


def test_what_was_learnt_does_not_count_on_a_single_frame(K, clip_frames, root):
    images, poses = clip_frames
    own = Aligner(load_mesh(root / "data" / "xwing.obj"))
    estimate = xu.PoseEstimate(poses[60], np.eye(6) * 1e-5, True)
    before = own.verify(images[60], estimate, K)
    own.learn(255 - images[58], poses[58], K)
    after = own.verify(images[60], estimate, K)
    assert np.array_equal(before.pose, after.pose) and before.probability == after.probability


def test_a_second_start_begins_anew(footage, box_aligner):
    """The tracker forgets what it has learnt at a wrong pose."""
    wrong = shifted(footage.poses[0], [0.3, 0.3, 0])
    tracker = Tracker(footage.K, FPS, aligner=box_aligner)
    tracker.start(footage.images[0], wrong)
    tracker.update(footage.images[1])
    tracker.start(footage.images[2], footage.poses[2])
    assert tracker.age == 1
    live = [tracker.update(image) for image in footage.images[3:10]]
    assert errors(live, footage.poses[3:10]).max() < 1


def test_a_start_of_nonsense_is_refused(footage, box_aligner):
    image, pose = footage.images[0], footage.poses[0]
    beside = shifted(pose, [9, 0, 0])
    behind = shifted(pose, [0, 0, -9])
    tracker = Tracker(footage.K, FPS, aligner=box_aligner)
    tracker.start(image, pose)
    for wrong, message in (
        (beside, "too little of the target is in sight"),
        (behind, "too little of the target is in sight"),
        (2 * pose, "not a rigid motion"),
        (np.full((4, 4), np.nan), "NaN"),
        (np.eye(3), r"expected shape \(4, 4\)"),
        (None, "expected"),
    ):
        with pytest.raises(ValueError, match=message):
            tracker.start(image, wrong)
    with pytest.raises(ValueError, match="cannot be read"):
        tracker.start(None, pose)
    assert tracker.update(footage.images[1]).status == "tracked"  # it goes on as before
    with pytest.raises(ValueError, match="give the tracker an aligner"):
        Tracker(footage.K, FPS).start(image, pose)


def test_a_clip_is_followed_from_its_middle_to_both_ends(footage, box_aligner):
    starts = {14: footage.poses[14].tolist()}
    frames = iter(box_frames(footage))  # it can be read only once
    track = track_clip(
        frames, footage.K, aligner=box_aligner, fps=FPS, progress=False, starts=starts
    )
    assert [t.status for t in track] == ["tracked"] * 30
    assert np.median(errors(track, footage.poses)) < 1
    assert errors(track, footage.poses).max() < 2
    np.testing.assert_allclose([t.seconds for t in track], np.arange(30) / FPS, atol=1e-9)


def test_between_two_starts_the_nearer_one_counts(footage, box_aligner):
    """The first start is wrong. The track is right wherever the second one is nearer."""
    wrong = shifted(footage.poses[0], [0.3, 0.3, 0])
    starts = {0: wrong, 20: footage.poses[20]}
    frames = box_frames(footage)
    track = track_clip(frames, footage.K, None, box_aligner, FPS, False, starts)
    assert errors(track[11:], footage.poses[11:]).max() < 2
    middle = [0.4, 0.3, 0.25]
    distance = [
        np.linalg.norm((t.pose - pose)[:3] @ [*middle, 1])
        for t, pose in zip(track[11:], footage.poses[11:])
    ]
    assert max(distance) < 0.1

    doubted = [t for t in track[1:20] if t.reason]
    assert len(doubted) >= 3 and all(t.status == "tracked" for t in doubted)
    assert all("from frames 0 and 20 differ by" in t.reason for t in doubted)
    assert max(t.probability for t in doubted) <= 0.5
    assert f"the starts disagree in {len(doubted)}" in tracking.summary(track)


def test_two_starts_that_are_right_agree(footage, box_aligner):
    """The later start may be given at a pose that looks the same."""
    half_turn = np.diag([-1.0, -1, 1, 1])
    half_turn[:3, 3] = 2 * box_aligner.target.box.mean(0) * [1, 1, 0]
    symmetries = np.stack([np.eye(4), half_turn])
    box_aligner.target = dataclasses.replace(box_aligner.target, symmetries=symmetries)
    for motion in np.eye(4), half_turn:
        starts = {0: footage.poses[0], 12: footage.poses[12] @ motion}
        frames = box_frames(footage)[:13]
        track = track_clip(frames, footage.K, None, box_aligner, FPS, False, starts)
        assert [t.reason for t in track] == [""] * 13


def test_starts_that_cannot_be_are_refused(footage, box_aligner):
    frames = box_frames(footage)[:4]
    pose = footage.poses[0]

    def track(starts, aligner=box_aligner, frames=frames):
        track_clip(frames, footage.K, None, aligner, FPS, False, starts)

    for starts in (None, {}):
        with pytest.raises(ValueError, match="give a detector .*, or starts"):
            track(starts)
    with pytest.raises(ValueError, match="starts, frame 4: the clip has the frames 0 to 3"):
        track({0: pose, 4: pose})
    with pytest.raises(ValueError, match="starts, frame 1: not a rigid motion"):
        track({1: 2 * pose})
    with pytest.raises(ValueError, match="frame 0: start: too little"):
        track({0: shifted(pose, [9, 0, 0])})
    with pytest.raises(ValueError, match="give an aligner too"):
        track({0: pose}, aligner=None)
    with pytest.raises(ValueError, match="frame 0: start: the frame cannot be read"):
        track({0: pose}, frames=[Frame(None, 0.0, "damaged"), *frames[1:]])


# ------------------------------------------------------------ from what a network detects


@pytest.fixture
def detected(monkeypatch, box_aligner):
    """A function: {number of a frame: (pose, probability)} -> a detector that finds these."""

    def make(found):
        def detect(tracker, index, image):
            pose, probability = found.get(index, (None, 0.0))
            estimate = xu.PoseEstimate(
                pose,
                np.eye(6) * 1e-4,
                probability > 0.8,
                "nothing is seen",
                explained_contrast=0.3,
                probability=probability,
            )
            return [] if pose is None else [Detection(index, estimate)]

        monkeypatch.setattr(parts, "detect", detect)
        return SimpleNamespace(target=box_aligner.target)

    return make


def track_box(footage, aligner, detector, count=16):
    frames = iter(box_frames(footage)[:count])  # it can be read only once
    return track_clip(frames, footage.K, detector, aligner, FPS, progress=False)


def test_a_clip_is_tracked_from_its_most_probable_detection(footage, box_aligner, detected):
    detector = detected({9: (footage.poses[9], 0.98), 5: (footage.poses[5], 0.9)})
    track = track_box(footage, box_aligner, detector)
    assert [t.status for t in track] == ["tracked"] * 16
    assert errors(track, footage.poses).max() < 2
    assert [t.reason for t in track] == [""] * 16
    assert min(probability(track)) > 0.6


def test_one_bad_detection_does_not_decide_a_clip(footage, box_aligner, detected):
    """The most probable one is turned by a quarter. Three others contradict it."""
    quarter = np.eye(4)
    quarter[:3, :3] = Rotation.from_euler("y", 90, degrees=True).as_matrix()
    found = {index: (footage.poses[index], 0.9) for index in (5, 7, 9)}
    found[3] = (footage.poses[3] @ quarter, 0.99)
    track = track_box(footage, box_aligner, detected(found), 12)
    assert [t.status for t in track] == ["tracked"] * 12
    assert errors(track, footage.poses).max() < 2


def test_detections_that_contradict_each_other_equally_are_said(footage, box_aligner, detected):
    beside = shifted(footage.poses[3], [0.3, 0.3, 0])
    detector = detected({3: (beside, 0.97), 9: (footage.poses[9], 0.97)})
    track = track_box(footage, box_aligner, detector, 12)
    assert errors(track[7:], footage.poses[7:]).max() < 2
    doubted = [t for t in track if t.reason]
    assert doubted and max(t.probability for t in doubted) <= 0.5
    assert all("from frames 3 and 9 differ by" in t.reason for t in doubted)


def test_doubtful_detections_count_only_where_they_agree(
    footage, box_aligner, detected, monkeypatch
):
    """No detection is probable. Four on one track confirm one another, four at random do not."""
    monkeypatch.setattr(tracking, "detect_by_edges", lambda *_: [])
    right = {index: (footage.poses[index], 0.4) for index in (3, 5, 7, 9)}
    track = track_box(footage, box_aligner, detected(right), 12)
    assert [t.status for t in track] == ["tracked"] * 12
    assert errors(track, footage.poses).max() < 2

    turns = Rotation.random(4, rng=np.random.default_rng(1)).as_matrix()
    for index, turn in zip(right, turns):
        pose = footage.poses[index].copy()
        pose[:3, :3] = turn
        right[index] = pose, 0.4
    track = track_box(footage, box_aligner, detected(right), 12)
    assert {t.status for t in track} == {"lost"}
    assert all(t.reason == "the target is not found" and t.probability == 0 for t in track)


def test_a_wrong_lens_is_said_before_the_track(K, clip_frames, aligner, monkeypatch):
    """The clip is not even tracked here: a warning that ends it comes first."""
    images, truth = (part[30:110:8] for part in clip_frames)
    wide = K * [[0.6, 1, 1], [1, 0.6, 1], [1, 1, 1]]
    detector = SimpleNamespace(target=xu.XWING)

    def detect(tracker, index, image):
        pose = truth[index].copy()
        pose[2, 3] *= 0.6
        return [Detection(index, xu.PoseEstimate(pose, np.eye(6) * 1e-4, True, probability=0.9))]

    monkeypatch.setattr(parts, "detect", detect)
    monkeypatch.setattr(parts, "_grow", None)
    frames = [Frame(image, i / 2, "") for i, image in enumerate(images)]
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="a lens of 3[3-7].. mm"):
        warnings.simplefilter("error")
        track_clip(frames, wide, detector, aligner, 2, False)  # all are looked at


def test_poses_through_a_wrong_lens_are_improbable():
    wrong = LensCheck(1.6, 0.02, np.ones(3), np.full(3, 0.5), 56.0)
    unknown = dataclasses.replace(wrong, deviation=1.0)
    right = dataclasses.replace(wrong, factor=1.05)
    assert [each.verdict for each in (wrong, unknown, right)] == ["wrong", "unknown", "confirmed"]
    assert "1.60 times" in str(wrong) and "56.0 mm" in str(wrong)
    track = tracking.Track([tracking.TrackedPose("lost")])
    assert "focal" not in tracking.summary(track)
    track.lens = wrong
    assert "the focal length fits 56.0 mm" in tracking.summary(track)


# ------------------------------------------------------------ the command


@pytest.fixture
def box_clip(footage, tmp_path):
    """A folder with the first ten frames, and the words of a command that tracks them."""
    (tmp_path / "frames").mkdir()
    for i, image in enumerate(footage.images[:10]):
        Image.fromarray(image).save(tmp_path / "frames" / f"{i}.png")
    size = footage.SIZE
    camera = {"K": footage.K.tolist(), "width": size, "height": size, "distortion": [0, 0, 0, 0]}
    (tmp_path / "camera.json").write_text(json.dumps(camera))
    start = {"frame": 4, "pose": footage.poses[4].tolist()}
    (tmp_path / "start.json").write_text(json.dumps(start))
    words = ["frames", "--target", footage.mesh, "--start", "start.json"]
    words += ["--camera", "camera.json", "--out", "new/out"]
    return tmp_path, words


def command(folder, words, expect_error=""):
    """Run the command in a folder; it prints one line, or the expected one of an error."""
    done = subprocess.run(
        [sys.executable, "-m", "xwing.tracking", *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(xu.ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode != 0) == bool(expect_error), done.stderr
    return done


def test_the_command_tracks_a_clip(footage, box_clip):
    folder, words = box_clip
    done = command(folder, words)
    described, summary = done.stdout.splitlines()
    assert "mesh units across and" in described and "mesh units away" in described
    assert summary == "new/out: 10 frames: 10 tracked, 0 predicted, 0 lost"
    assert "10/10" in done.stderr  # of the progress bar

    out = folder / "new" / "out"
    files = {"track.csv", "track.json", "track.usdc", "overlay.mp4"}
    assert {path.name for path in out.iterdir()} == files
    written = json.loads((out / "track.json").read_text())
    assert written["camera"]["K"] == footage.K.tolist()
    assert written["fps"] == 30 and written["source"] == str(folder / "frames")
    for row, pose in zip(written["frames"], footage.poses, strict=False):
        assert xu.rotation_error(np.array(row["matrix"]), pose) < 1
    assert len(pd.read_csv(out / "track.csv")) == 10

    overlay = Clip(out / "overlay.mp4")
    assert (overlay.count, overlay.width, overlay.height) == (10, 128, 128)
    assert overlay.fps == 30


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("start.json", "[", "not readable as JSON"),
        ("start.json", "[]", "there is no start in it"),
        ("start.json", '{"pose": []}', 'expected {"frame": 0, "pose": 4 x 4}'),
        ("start.json", '{"frame": -1, "pose": []}', "expected a number from 0, got -1"),
        ("start.json", '{"frame": 0, "pose": [[1]]}', "frame 0: expected shape"),
        ("camera.json", "{}", 'expected {"K": 3 x 3'),
        ("camera.json", '{"K": [], "width": 64, "height": 48}', "is of frames of 64x48 pixels"),
        ("camera.json", '{"K": [], "width": 128, "height": 128}', "camera.json: K: expected"),
    ],
)
def test_the_command_says_what_is_wrong_with_a_file(box_clip, file, content, message, capsys):
    folder, words = box_clip
    (folder / file).write_text(content)
    absolute = [folder / word if (folder / str(word)).exists() else word for word in words]
    with pytest.raises(SystemExit) as caught:
        tracking.main([*map(str, absolute[:-1]), str(folder / "out")])
    assert message in str(caught.value) and str(caught.value).startswith("error: ")
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists()


def test_the_command_needs_something_that_finds_the_target(box_clip):
    folder, words = box_clip
    words = [word for word in words if word not in ("--start", "start.json")]
    done = command(folder, words, expect_error="--start")
    assert done.stderr.count("\n") == 1
    assert "--start" in done.stderr and "--weights" in done.stderr


def test_two_starts_of_one_frame_are_refused(footage, tmp_path):
    row = {"frame": 3, "pose": footage.poses[3].tolist(), "note": "by hand"}
    file = tmp_path / "start.json"
    file.write_text(json.dumps([row, {**row, "frame": 0}]))
    assert list(tracking.read_starts(file)) == [3, 0]
    file.write_text(json.dumps([row, row]))
    with pytest.raises(ValueError, match="two starts in frame 3"):
        tracking.read_starts(file)
