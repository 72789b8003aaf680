"""Poses refined on the pixels: against true poses, against flips, and where there is nothing to refine on."""

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing import alignment, verification
from xwing.alignment import MIN_EXPLAINED_CONTRAST, Aligner, verify_frames
from xwing.mesh import load_mesh
from xwing.verification import MIN_PROBABILITY, edge_agreement


@pytest.fixture(scope="module")
def aligner(root):
    return Aligner(load_mesh(root / "data" / "xwing.obj"))


@pytest.fixture(scope="module")
def frames(sample, camera):
    """Ten frames of data/sample/ with at least six corners in sight: images, true poses."""
    paths, matrices = sample
    chosen = np.flatnonzero(xu.in_frame(xu.keypoints_of(matrices, *camera)).sum(1) >= 6)[:10]
    images = [xu.read_image(paths[i]) for i in chosen]
    return images, [xu.pose_in_camera(camera[0], matrices[i]) for i in chosen]


def moved(pose, degrees, shift, seed):
    """The pose turned about a random axis, and shifted in a random direction, model units."""
    axis, direction = np.random.default_rng(seed).normal(size=(2, 3))
    turn = np.radians(degrees) * axis / np.linalg.norm(axis)
    return xu.move_pose(pose, np.concatenate([turn, shift * direction / np.linalg.norm(direction)]))


def box_error(pose, truth, K):
    corners = (xu.project_pose(xu.BOUNDING_BOX, p, K) for p in (pose, truth))
    return np.linalg.norm(np.subtract(*corners), axis=1).mean()


def estimate(pose, margin=20.0, runner_up=None):
    return xu.PoseEstimate(
        pose,
        np.diag([2e-3] * 3 + [1e-4] * 3),
        True,
        runner_up=runner_up,
        log_likelihood_margin=margin,
    )


def tilted(pose, tilt, roll):
    """The pose with the ship in its place and its long axis as in the picture, but tilted and rolled."""
    centre = pose[:3, :3] @ xu.BOUNDING_BOX.mean(0) + pose[:3, 3]
    across, wrong = np.cross(pose[:3, 1], centre), pose.copy()
    turn = Rotation.from_rotvec(np.radians(tilt) * across / np.linalg.norm(across)).as_matrix()
    wrong[:3, :3] = turn @ pose[:3, :3] @ Rotation.from_euler("y", roll, degrees=True).as_matrix()
    wrong[:3, 3] = centre - wrong[:3, :3] @ xu.BOUNDING_BOX.mean(0)
    return wrong


# ------------------------------------------------------------ refining


def test_poses_that_are_pixels_off_end_within_half_a_pixel(aligner, frames, K):
    before, after, claims = [], [], []
    for i, (image, truth) in enumerate(zip(*frames)):
        start = moved(truth, 4, 0.01, i)
        pose, covariance = aligner.align(image, start, K)
        before.append((xu.rotation_error(start, truth), box_error(start, truth, K)))
        after.append((xu.rotation_error(pose, truth), box_error(pose, truth, K)))
        error = xu.pose_step(pose, truth)
        claims.append(error @ np.linalg.solve(covariance, error))
    assert np.median(before, axis=0) == pytest.approx([4, 2.5], rel=0.4)
    assert (np.median(after, axis=0) < [0.4, 0.25]).all(), after
    assert 1 < np.median(claims) < 20  # 5.35 where the covariance is honest


def test_the_distance_is_not_biased(aligner, frames, K):
    """Mixed in grey levels instead of light, a bright ship before a dark sky looked nearer."""
    off = []
    for image, truth in zip(*frames):
        pose, _ = aligner.align(image, moved(truth, 1, 0.002, 0), K)
        off.append(pose[2, 3] / truth[2, 3] - 1)
    assert abs(np.median(off)) < 0.002


def test_a_prediction_is_refined_on_the_fine_level(aligner, frames, K):
    for i, (image, truth) in enumerate(zip(*frames)):
        found = aligner.track(
            image, moved(truth, 1.5, 0.003, i), K, np.diag([1e-3] * 3 + [1e-4] * 3)
        )
        assert found.accepted and found.explained_contrast > MIN_EXPLAINED_CONTRAST
        assert xu.rotation_error(found.pose, truth) < 2 and found.covariance.shape == (6, 6)


@pytest.mark.parametrize("share,tried", [(1.0, False), (1.2, True)])
def test_a_coarse_picture_is_tried_where_less_is_explained_than_usual(
    aligner, frames, K, monkeypatch, share, tried
):
    image, truth = frames[0][0], frames[1][0]
    monkeypatch.setattr(alignment, "WELL_EXPLAINED", 0.99)
    explained, levels, refine = (
        aligner.track(image, truth, K).explained_contrast,
        [],
        Aligner._refine,
    )

    def watched(self, image, pose, K, level, *arguments, **options):
        levels.append(level)
        return refine(self, image, pose, K, level, *arguments, **options)

    monkeypatch.setattr(Aligner, "_refine", watched)
    aligner.track(image, truth, K, usual=share * explained)
    assert levels == [alignment.FINE] + tried * [alignment.COARSE, alignment.FINE]


@pytest.mark.parametrize("width,height,scale", [(1024, 1024, 4), (600, 300, 1)])
def test_a_frame_of_another_size_gives_the_same_pose(aligner, frames, K, width, height, scale):
    image, truth = frames[0][1], frames[1][1]
    canvas = np.zeros((height, width, 3), np.uint8)
    large = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    canvas[: large.shape[0], : large.shape[1]] = large
    pose, _ = aligner.align(canvas, moved(truth, 3, 0.01, 1), K * [[scale], [scale], [1]])
    assert box_error(pose, truth, K) < 0.6


def test_the_arguments_are_left_alone(aligner, frames, K):
    image, truth = frames[0][0].copy(), frames[1][0].copy()
    aligner.verify(image, estimate(truth), K)
    np.testing.assert_array_equal(image, frames[0][0])
    np.testing.assert_array_equal(truth, frames[1][0])


def test_a_precise_start_is_kept_where_the_pixels_say_nothing(aligner, frames, K):
    truth, flat = frames[1][0], np.full((256, 256, 3), 40, np.uint8)
    found = aligner.align(flat, truth, K, np.diag([1e-6] * 3 + [1e-8] * 3))
    assert found is None or xu.rotation_error(found[0], truth) < 0.1


@pytest.mark.parametrize(
    "shift", [(2.0, 0, 0), (0, 0, -2.0)], ids=["beside the frame", "behind the camera"]
)
def test_a_ship_out_of_sight_cannot_be_aligned(aligner, frames, K, shift):
    image, gone = frames[0][0], frames[1][0].copy()
    gone[:3, 3] += shift
    assert aligner.align(image, gone, K) is None
    assert not aligner.track(image, gone, K).accepted
    assert not aligner.verify(image, estimate(gone), K).accepted
    assert aligner.picture(image, gone, K) is None


def test_a_nose_that_nearly_touches_the_camera_cannot_be_aligned(aligner, frames, K):
    """It is drawn, but a step of the pose would put it behind the camera."""
    near = np.eye(4)
    near[:3, :3] = [[1, 0, 0], [0, 0, -1], [0, 1, 0]]  # nose on
    near[2, 3] = 0.006 - (aligner.ship.triangles.reshape(-1, 3) @ near[2, :3]).min()
    assert not aligner.track(frames[0][0], near, K).accepted
    assert not aligner.verify(frames[0][0], estimate(near), K).accepted


# ------------------------------------------------------------ judging


def test_the_true_pose_explains_more_than_what_it_is_mistaken_for(aligner, frames, K):
    for image, truth in zip(*frames):
        costs, sky = aligner.photometric_costs(image, xu.ambiguous_poses(truth), K)
        assert costs.argmin() == 0 and costs[0] < sky


def test_a_flipped_estimate_is_put_right(aligner, frames, K):
    right = 0
    for image, truth in zip(*frames):
        found = aligner.verify(image, estimate(truth @ xu.HALF_ROLL, 2.0, truth), K)
        right += found.accepted and xu.rotation_error(found.pose, truth) < 2
    assert right >= 9


def test_an_estimate_that_is_far_off_is_put_right_from_nearby(aligner, frames, K, monkeypatch):
    def right():
        starts = [estimate(tilted(truth, 0, 35), 2.0) for truth in frames[1]]
        found = [aligner.verify(image, start, K) for image, start in zip(frames[0], starts)]
        return sum(
            f.accepted and xu.rotation_error(f.pose, true) < 2 for f, true in zip(found, frames[1])
        )

    assert right() >= 9
    monkeypatch.setattr(alignment, "NEARBY", ())
    assert right() < 8


@pytest.mark.parametrize("margin,turn", [(2.0, 0), (0.0, 0), (0.0, 180)])
def test_pixels_that_are_sure_of_a_pose_outvote_keypoints_that_say_nothing(
    aligner, frames, K, margin, turn
):
    start = tilted(frames[1][0], 0, turn)
    found = aligner.verify(frames[0][0], estimate(start, margin, frames[1][0]), K)
    assert found.accepted and xu.rotation_error(found.pose, frames[1][0]) < 2


def test_a_pose_is_accepted_by_what_speaks_for_it(aligner, frames, K, monkeypatch):
    image, truth = frames[0][0], frames[1][0]
    found = aligner.verify(image, estimate(truth, 2.0), K)
    assert found.accepted and MIN_PROBABILITY <= found.probability <= 1 and not found.reason
    monkeypatch.setattr(alignment, "EVIDENCE", np.full(4, -1.0))
    rejected = aligner.verify(image, estimate(truth, 2.0), K)
    assert not rejected.accepted and rejected.probability < 0.1
    assert "of its edges are in the frame" in rejected.reason


def test_every_piece_of_evidence_counts():
    one, *rest = verification._evidence(0.5, 3.0, [True])
    assert one == 1 and rest == pytest.approx([0.5, np.log1p(3), 1])
    votes = [True, False, False, False]
    assert verification._evidence(0.5, 1e9, votes)[2:] == pytest.approx([np.log1p(100), -2])
    assert (verification.EVIDENCE[1:] > 0).all() and verification.EVIDENCE[0] < 0


def test_other_looks_put_a_frame_right_and_make_it_surer(aligner, frames, K):
    for image, truth in zip(*(part[:4] for part in frames)):
        wrong, good = estimate(tilted(truth, 50, 100), 0.5), estimate(moved(truth, 3, 0.005, 1))
        found = [aligner.verify(image, wrong, K, others) for others in ([], [good], [good] * 3)]
        assert xu.rotation_error(found[1].pose, truth) < 2
        assert found[2].accepted and found[1].probability < found[2].probability
        nothing = xu.PoseEstimate(None, reason="3 points fix no pose; 4 are needed")
        found = aligner.verify(image, nothing, K, [good])
        assert found.accepted and xu.rotation_error(found.pose, truth) < 2


@pytest.mark.parametrize("pattern", ["plain", "stripes", "other paint"])
def test_edges_agree_in_any_paint_but_not_elsewhere(aligner, frames, K, pattern):
    """A pattern adds edges to a ship and takes none away; a pose beside it has other edges."""
    for image, truth in zip(*frames):
        stripes = np.arange(256) // 6 % 2 == 0
        changed = image.copy()
        if pattern == "stripes":
            changed[:, stripes] = np.clip(changed[:, stripes] * 1.4, 0, 255).astype(np.uint8)
        if pattern == "other paint":
            changed = np.ascontiguousarray(255 - image[..., ::-1])
        right, beside = (
            edge_agreement(*aligner._painted(changed, moved(truth, turn, 0, 0), K))
            for turn in (0, 25)
        )
        assert 0 <= beside < right - 0.05 and right > 0.5


def test_no_edges_agree_where_there_are_none(aligner, frames, K):
    assert (
        edge_agreement(*aligner._painted(np.full((256, 256, 3), 90, np.uint8), frames[1][0], K))
        == 0
    )


@pytest.mark.parametrize(
    "well,least,margin,searched",
    [
        (0.1, 0.1, 2.0, False),
        (0.99, 0.1, 2.0, True),
        (0.99, 0.1, 20.0, False),
        (0.99, 0.98, 20.0, True),
    ],
)
def test_sure_keypoints_are_searched_around_only_where_they_explain_too_little(
    aligner, frames, K, monkeypatch, well, least, margin, searched
):
    calls = []
    monkeypatch.setattr(alignment, "WELL_EXPLAINED", well)
    monkeypatch.setattr(alignment, "MIN_EXPLAINED_CONTRAST", least)
    monkeypatch.setattr(
        Aligner, "_search", lambda *arguments, **options: calls.append(arguments) or []
    )
    aligner.verify(frames[0][0], estimate(frames[1][0], margin), K)
    assert bool(calls) == searched


def test_an_estimate_that_is_all_wrong_is_not_accepted(aligner, frames, K):
    for tilt, roll in ((50, 0), (-35, -80), (0, 100)):
        for image, truth in zip(*(part[:4] for part in frames)):
            found = aligner.verify(image, estimate(tilted(truth, tilt, roll), 2.0), K)
            assert not found.accepted or xu.rotation_error(found.pose, truth) < 3


def test_a_frame_without_the_ship_is_rejected(aligner, frames, K):
    rng = np.random.default_rng(0)
    noise = cv2.GaussianBlur(rng.integers(0, 255, (256, 256, 3), dtype=np.uint8), (0, 0), 3)
    found = aligner.verify(noise, estimate(frames[1][0]), K)
    assert not found.accepted and found.reason


def test_an_estimate_without_a_pose_comes_back(aligner, frames, K):
    nothing = xu.PoseEstimate(None, reason="3 points fix no pose; 4 are needed")
    found = aligner.verify(frames[0][0], nothing, K)
    assert found.pose is None and not found.accepted and found.reason == nothing.reason


def test_many_frames_are_verified_as_each_alone(aligner, frames, K, monkeypatch):
    """And looked at again where the pose is not sure: here the second of three."""
    images, poses = np.array(frames[0][:3]), frames[1][:3]
    estimates = [estimate(moved(pose, 2, 0.005, i)) for i, pose in enumerate(poses)]
    estimates[1] = estimate(tilted(poses[1], 50, 100), 0.5)
    alone, asked = [aligner.verify(image, one, K) for image, one in zip(images, estimates)], []
    assert [one.probability >= verification.SURE_PROBABILITY for one in alone] == [
        True,
        False,
        True,
    ]

    def turned_looks(model, images, K):
        asked.append((model, images, K))
        return [[estimate(poses[1])] * 3]

    monkeypatch.setattr(verification, "turned_looks", turned_looks)
    together = verify_frames(aligner, images, estimates, K, "model")
    assert len(asked) == 1 and asked[0][0] == "model" and np.array_equal(asked[0][1], images[1:2])
    alone[1] = aligner.verify(images[1], estimates[1], K, [estimate(poses[1])] * 3)
    for expected, found, truth in zip(alone, together, poses):
        np.testing.assert_allclose(found.pose, expected.pose, atol=1e-5)
        assert found.accepted and xu.rotation_error(found.pose, truth) < 2


def test_what_a_pose_explains_looks_like_the_frame(aligner, frames, K):
    seen, drawn = aligner.picture(frames[0][0], frames[1][0], K)
    assert seen.shape == drawn.shape and seen.dtype == drawn.dtype == np.uint8
    bright = seen.max(-1) > 100
    assert np.abs(seen[bright].astype(int) - drawn[bright]).mean() < 25
