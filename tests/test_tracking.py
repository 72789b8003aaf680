"""The tracker on flights whose truth is known, and against batch least squares."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import xwing_utils as xu

FPS = 30
NOISE = 1.0  # pixels


def flight(count=120, turn=(0.3, 0.8, 0.5), start=(-0.1, 0.05, 1.0), speed=(0.1, -0.05, 0.1)):
    """(count, 4, 4) poses of a ship at constant velocity: radians and model units a second."""
    time = np.arange(count)[:, None] / FPS
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = (Rotation.from_rotvec(time * turn) * Rotation.from_euler("xyz", [50, 20, 10], degrees=True)).as_matrix()
    poses[:, :3, 3] = np.asarray(start) + time * speed
    return poses


def seen(poses, K, seed=0, noise=NOISE):
    """Keypoints (N, C, 2) with noise, confidence (N, C) and deviation (N, C); points that face away are not found."""
    rng = np.random.default_rng(seed)
    points = np.stack([xu.project_pose(xu.KEYPOINTS, p, K) for p in poses])
    toward = [((xu.NORMALS @ p[:3, :3].T) * (xu.KEYPOINTS @ p[:3, :3].T + p[:3, 3])).sum(1) <= 0 for p in poses]
    return points + rng.normal(0, noise, points.shape), np.array(toward) * 0.9, np.full(points.shape[:2], noise)


def follow(frames, K, **arguments):
    tracker = xu.Tracker(K, FPS, **arguments)
    return tracker, [tracker.update(*frame) for frame in zip(*frames)]


def rotation_errors(track, truth):
    return np.array([np.nan if t.pose is None else xu.rotation_error(t.pose, p) for t, p in zip(track, truth)])


@pytest.fixture
def K():
    return np.array([[248.889, 0, 128], [0, 248.889, 128], [0, 0, 1]])


def test_filter_and_smoother_are_steadier_than_single_frames_and_no_worse(K):
    truth = flight()
    frames = seen(truth, K)
    tracker, live = follow(frames, K, keep=True)
    single = [xu.estimate_frame(k, K, c, d).pose for k, c, d in zip(*frames)]
    ways = {"single": single, "live": [t.pose for t in live], "smooth": [t.pose for t in xu.smooth(tracker)]}
    assert all(t.status == "tracked" for t in live)
    shake = {way: np.array(xu.jitter(poses, truth, FPS)) for way, poses in ways.items()}
    error = {way: np.median([xu.rotation_error(p, t) for p, t in zip(poses[15:], truth[15:])]) for way, poses in ways.items()}
    assert (shake["smooth"] < shake["live"] / 2).all() and (shake["live"] < shake["single"] / 2).all()
    assert (shake["smooth"] < shake["single"] / 10).all()
    assert error["smooth"] < error["live"] < error["single"]


def test_smoothing_a_straight_flight_is_batch_least_squares(K):
    """Without rotation the model is linear: all positions and velocities solved for at once give the same."""
    rng = np.random.default_rng(3)
    tracker = xu.Tracker(K, FPS, keep=True)
    measured, spread = [], []
    for position in flight(12, turn=(0, 0, 0))[:, :3, 3]:
        pose = np.eye(4)
        pose[:3, 3] = position + rng.normal(0, 0.01, 3)
        covariance = np.diag(np.concatenate([[1e-4] * 3, rng.uniform(0.5, 2, 3) * 1e-4]))
        tracker.take(xu.PoseEstimate(pose, covariance / xu.MEASURED**2, True))
        measured.append(pose[:3, 3])
        spread.append(np.diag(covariance)[3:])
    smoothed = np.array([t.pose[:3, 3] for t in xu.smooth(tracker)])
    h, count = 1 / FPS, len(measured)
    noise = np.linalg.cholesky(np.linalg.inv(xu.AGILITY[1] ** 2 * np.array([[h**3 / 3, h**2 / 2], [h**2 / 2, h]]))).T
    for axis in range(3):
        rows, right = [np.eye(2 * count)[1] / 0.5], [0.0]  # the first velocity is zero but for 0.5 units a second
        for i in range(count):
            rows.append(np.eye(2 * count)[2 * i] / np.sqrt(spread[i][axis]))
            right.append(measured[i][axis] / np.sqrt(spread[i][axis]))
        for i in range(count - 1):
            step = np.zeros((2, 2 * count))
            step[:, 2 * i : 2 * i + 2], step[:, 2 * i + 2 : 2 * i + 4] = -np.array([[1, h], [0, 1]]), np.eye(2)
            rows += list(noise @ step)
            right += [0.0, 0.0]
        solved = np.linalg.lstsq(np.array(rows), np.array(right), rcond=None)[0]
        np.testing.assert_allclose(smoothed[:, axis], solved[::2], atol=1e-7)


def test_claimed_covariance_is_honest(K):
    truth = flight(60)
    distance = []
    for seed in range(6):
        tracker, _ = follow(seen(truth, K, seed), K, keep=True)
        for t, pose in list(zip(xu.smooth(tracker), truth))[10:50:5]:
            step = np.concatenate([Rotation.from_matrix(pose[:3, :3] @ t.pose[:3, :3].T).as_rotvec(), pose[:3, 3] - t.pose[:3, 3]])
            distance.append(step @ np.linalg.solve(t.covariance, step))
    assert 6 / (2 * xu.MEASURED**2) < np.mean(distance) < 6 * 1.5  # 6 if MEASURED were 1; it is cautious


def test_a_gap_of_half_a_second_is_bridged(K):
    truth = flight()
    keypoints, confidence, deviation = seen(truth, K)
    confidence[50:65] = 0
    _, live = follow((keypoints, confidence, deviation), K)
    assert [t.status for t in live] == ["tracked"] * 50 + ["predicted"] * 15 + ["tracked"] * 55
    assert np.nanmax(rotation_errors(live, truth)) < 15 and all(t.reason for t in live[50:65])
    track = xu.track_clip(keypoints, confidence, deviation, K, FPS)
    assert [t.status for t in track] == [t.status for t in live]
    assert np.nanmax(rotation_errors(track, truth)) < 4


def test_a_longer_gap_and_an_absent_ship_have_no_pose(K):
    truth = flight()
    keypoints, confidence, deviation = seen(truth, K)
    confidence[50:80] = 0
    confidence[:5] = 0
    confidence[110:] = 0
    _, live = follow((keypoints, confidence, deviation), K)
    assert [t.pose is None for t in live[65:80]] == [True] * 15 and live[70].status == "lost" and live[90].status == "tracked"
    track = xu.track_clip(keypoints, confidence, deviation, K, FPS)
    assert [t.status for t in track] == ["lost"] * 5 + ["tracked"] * 45 + ["lost"] * 30 + ["tracked"] * 30 + ["lost"] * 10
    assert all((t.pose is None) == (t.status == "lost") for t in track)
    absent = xu.track_clip(keypoints, confidence * 0, deviation, K, FPS)
    assert all(t.status == "lost" and t.pose is None for t in absent)


def test_the_frames_before_settle_a_flip(K):
    """Frames 40 to 59 show the corners with top and bottom exchanged: alone they give a rolled ship."""
    truth = flight()
    keypoints, confidence, deviation = seen(truth, K, noise=0.8)
    rolled = xu.MIRROR[[6, 7, 4, 5, 2, 3, 0, 1]]  # both left-right and top-bottom
    keypoints, confidence, deviation = keypoints[:, :8], np.full((120, 8), 0.9), deviation[:, :8]
    keypoints[40:60:2] = keypoints[40:60:2, rolled]
    alone = [xu.estimate_frame(k, K, c, d).pose for k, c, d in zip(keypoints, confidence, deviation)]
    assert sum(xu.rotation_error(p, t) > 90 for p, t in zip(alone, truth)) >= 10
    _, live = follow((keypoints, confidence, deviation), K)
    assert np.nanmax(rotation_errors(live, truth)) < 20 and all(t.status == "predicted" for t in live[40:60:2])


def test_a_wild_pose_is_not_believed(K):
    truth = flight()
    keypoints, confidence, deviation = seen(truth, K)
    keypoints[70] += 40
    _, live = follow((keypoints, confidence, deviation), K)
    assert live[70].status == "predicted" and "too far" in live[70].reason
    assert np.nanmax(rotation_errors(live, truth)[10:]) < 10


def test_memory_does_not_grow_unless_asked(K):
    tracker, live = follow(seen(flight(20), K), K)
    assert tracker.frames is None and len(live) == 20
    with pytest.raises(ValueError, match="keep=True"):
        xu.smooth(tracker)


@pytest.mark.parametrize("fps", [0, -30, float("nan")])
def test_a_rate_that_is_none(K, fps):
    with pytest.raises(ValueError, match="fps: expected"):
        xu.Tracker(K, fps)


def test_jitter_is_the_acceleration_error(K):
    truth = flight(50)
    assert xu.jitter(truth, truth, FPS) == pytest.approx((0, 0), abs=1e-6)
    moved = truth.copy()
    moved[:, 0, 3] += 0.5 * 2.0 * (np.arange(50) / FPS) ** 2  # an acceleration of 2 units/s^2
    assert xu.jitter(moved, truth, FPS)[1] == pytest.approx(2.0)
    assert np.isnan(xu.jitter([None] * 50, truth, FPS)).all()


def test_tracks_are_compared_over_the_frames_that_all_have(K):
    """Two ways by hand: one is turned by 2 degrees, but for a flip and a gap; the other is moved by 0.01."""
    truth = flight(10)
    turned = [pose.copy() for pose in truth]
    for pose in turned:
        pose[:3, :3] = Rotation.from_rotvec([0, 0, np.radians(2)]).as_matrix() @ pose[:3, :3]
    turned[3], turned[7] = turned[3] @ xu.HALF_ROLL, None
    moved = truth.copy()
    moved[:, 0, 3] += 0.01
    seen = np.arange(10) != 9
    rows = xu.compare_tracks({"turned": turned, "moved": list(moved)}, truth, seen, K, FPS)
    assert rows["turned"]["poses"] == 8 and rows["moved"]["poses"] == 9
    assert rows["turned"]["flips"] == 1 and rows["moved"]["flips"] == 0
    assert rows["turned"]["rotation, deg"] == pytest.approx(2) and rows["moved"]["rotation, deg"] == pytest.approx(0, abs=1e-6)
    assert rows["turned"]["95 %"] == pytest.approx(np.percentile([2] * 7 + [xu.rotation_error(turned[3], truth[3])], 95))
    assert rows["moved"]["translation"] == pytest.approx(0.01) and rows["turned"]["translation"] == pytest.approx(0)
    assert rows["moved"]["jitter, deg/s2"] == pytest.approx(0, abs=1e-3) and rows["turned"]["jitter, deg/s2"] > 1000
    inside = [xu.muzzle_error(moved[i], truth[i], K) <= 3 for i in range(9)]
    assert rows["moved"]["muzzles within 3 px"] == np.mean(inside)
    lost = xu.compare_tracks({"moved": list(moved), "lost": [None] * 10}, truth, seen, K, FPS)
    assert lost["lost"]["poses"] == 0 and np.isnan(lost["moved"]["rotation, deg"]) and lost["moved"]["poses"] == 9


def test_a_track_that_began_the_wrong_way_round_is_given_up(K):
    truth = flight(90)
    keypoints, confidence, deviation = seen(truth, K)
    tracker = xu.Tracker(K, FPS)
    tracker.update(*(part[0] for part in (keypoints, confidence, deviation)))
    wrong = truth[0] @ xu.HALF_ROLL
    tracker.motion.rotation = Rotation.from_matrix(wrong[:3, :3])  # as if it had been taken up like this
    confidence[:, 8:] *= np.random.default_rng(1).random((len(truth), 28)) < 0.25  # points of the hull are rare: flips are possible
    track = [tracker.update(*frame) for frame in zip(keypoints[1:], confidence[1:], deviation[1:])]
    errors = rotation_errors(track, truth[1:])
    assert (errors[-45:] < 30).mean() > 0.95


def test_the_best_sequence_takes_the_second_pose_where_the_frames_around_ask_for_it():
    truth, rng = flight(40), np.random.default_rng(0)
    covariance = np.diag([1e-4] * 6)
    estimates = []
    for i, pose in enumerate(truth):
        flipped, wrong = pose @ xu.HALF_ROLL, rng.random() < 0.35 or 10 <= i < 14
        first, second = (flipped, pose) if wrong else (pose, flipped)
        estimates.append(xu.PoseEstimate(first, covariance, True, second=second, second_covariance=covariance, margin=2.0))
    estimates[20] = xu.PoseEstimate(None, reason="nothing is found")
    estimates[30] = xu.PoseEstimate(truth[0] @ xu.HALF_ROLL, covariance, True, margin=50.0)  # sure, alone and wrong
    chosen = xu._best_sequence(estimates, FPS)
    assert not chosen[20].accepted and chosen[20].reason == "nothing is found"
    assert not chosen[30].accepted and "suit" in chosen[30].reason
    assert all(xu.rotation_error(e.pose, p) < 1 for e, p in zip(chosen, truth) if e.accepted)
    assert sum(e.accepted for e in chosen) == 38


def test_the_best_sequence_of_nothing():
    assert xu._best_sequence([], FPS) == []
    assert [e.accepted for e in xu._best_sequence([xu.PoseEstimate(None)] * 3, FPS)] == [False] * 3


@pytest.mark.parametrize("before,gone,after", [(15, 63, 30), (15, 64, 30), (30, 100, 40)])
def test_a_long_absence_throws_nothing_away(K, before, gone, after):
    truth = flight(before + gone + after)
    points, sure, deviation = seen(truth, K, noise=0.5)
    sure[before : before + gone] = 0
    track = xu.track_clip(points, sure, deviation, K, FPS)
    assert [t.status for t in track] == ["tracked"] * before + ["lost"] * gone + ["tracked"] * after
    assert np.nanmax(rotation_errors(track, truth)) < 5


def test_a_clip_of_no_frames_has_no_track(K):
    assert xu.track_clip(np.zeros((0, 36, 2)), np.zeros((0, 36)), np.zeros((0, 36)), K, FPS) == []


@pytest.mark.parametrize("fps", [None, 0, -1])
def test_a_rate_that_is_none_is_said_before_the_work(K, fps, monkeypatch):
    monkeypatch.setattr(xu, "estimate_frame", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="fps: expected a positive number"):
        xu.track_clip(*seen(flight(3), K), K, fps)


def test_doubt_ends_with_the_track(K):
    tracker, _ = follow([part[:10] for part in seen(flight(10), K)], K)
    tracker.doubt = 5.9
    for _ in range(20):
        tracker.update(np.full((36, 2), np.nan), np.zeros(36))
    assert tracker.motion is None and tracker.doubt == 0
