"""Poses refined on the pixels: against true poses, flips, and frames without the ship."""

import dataclasses
import sys

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from scipy.special import expit

import xwing_utils as xu
from xwing import verification
from xwing.alignment import Aligner, VerificationSettings, verify_frames
from xwing.refinement import Refiner
from xwing.verification import Verifier, edge_agreement, evidence

sys.path.insert(0, str(xu.ROOT / "tools"))
import fit_evidence  # noqa: E402


@pytest.fixture(scope="module")
def aligner():
    return Aligner(xu.XWING)


def with_settings(aligner, **changes):
    """An aligner for the same mesh whose `VerificationSettings` differ from the defaults."""
    return Aligner(aligner.mesh, verification=VerificationSettings(**changes))


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
    """Tilt and roll the ship in its place; its long axis keeps its direction in the picture."""
    centre = pose[:3, :3] @ xu.BOUNDING_BOX.mean(0) + pose[:3, 3]
    across = np.cross(pose[:3, 1], centre)
    turn = Rotation.from_rotvec(np.radians(tilt) * across / np.linalg.norm(across)).as_matrix()
    wrong = pose.copy()
    wrong[:3, :3] = turn @ pose[:3, :3] @ Rotation.from_euler("y", roll, degrees=True).as_matrix()
    wrong[:3, 3] = centre - wrong[:3, :3] @ xu.BOUNDING_BOX.mean(0)
    return wrong


# ------------------------------------------------------------ refining


def test_poses_that_are_pixels_off_end_within_half_a_pixel(aligner, frames, K):
    before = []
    after = []
    claims = []
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
    """If pixels were mixed in grey levels, a bright ship before a dark sky would seem nearer."""
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
        least = aligner.verifier.settings.min_explained_contrast
        assert found.accepted and found.explained_contrast > least
        assert xu.rotation_error(found.pose, truth) < 2 and found.covariance.shape == (6, 6)


@pytest.mark.parametrize("ratio,tried", [(1.0, False), (1.2, True)])
def test_a_coarse_picture_is_tried_where_less_is_explained_than_usual(
    aligner, frames, K, monkeypatch, ratio, tried
):
    image = frames[0][0]
    truth = frames[1][0]
    strict = with_settings(aligner, well_explained=0.99)
    explained = strict.track(image, truth, K).explained_contrast
    levels = []
    refine = Refiner.refine

    def watched(self, *arguments, coarse=False, **options):
        levels.append("coarse" if coarse else "fine")
        return refine(self, *arguments, coarse=coarse, **options)

    monkeypatch.setattr(Refiner, "refine", watched)
    strict.track(image, truth, K, usual=ratio * explained)
    assert levels == ["fine"] + tried * ["coarse", "fine"]


@pytest.mark.parametrize("width,height,scale", [(1024, 1024, 4), (600, 300, 1)])
def test_a_frame_of_another_size_gives_the_same_pose(aligner, frames, K, width, height, scale):
    image = frames[0][1]
    truth = frames[1][1]
    canvas = np.zeros((height, width, 3), np.uint8)
    large = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    canvas[: large.shape[0], : large.shape[1]] = large
    pose, _ = aligner.align(canvas, moved(truth, 3, 0.01, 1), K * [[scale], [scale], [1]])
    assert box_error(pose, truth, K) < 0.6


def test_the_arguments_are_left_alone(aligner, frames, K):
    image = frames[0][0].copy()
    truth = frames[1][0].copy()
    aligner.verify(image, estimate(truth), K)
    np.testing.assert_array_equal(image, frames[0][0])
    np.testing.assert_array_equal(truth, frames[1][0])


def test_a_precise_start_is_kept_where_the_pixels_say_nothing(aligner, frames, K):
    truth = frames[1][0]
    flat = np.full((256, 256, 3), 40, np.uint8)
    found = aligner.align(flat, truth, K, np.diag([1e-6] * 3 + [1e-8] * 3))
    assert found is None or xu.rotation_error(found[0], truth) < 0.1


@pytest.mark.parametrize(
    "shift", [(2.0, 0, 0), (0, 0, -2.0)], ids=["beside the frame", "behind the camera"]
)
def test_a_ship_out_of_sight_cannot_be_aligned(aligner, frames, K, shift):
    image = frames[0][0]
    gone = frames[1][0].copy()
    gone[:3, 3] += shift
    assert aligner.align(image, gone, K) is None
    assert not aligner.track(image, gone, K).accepted
    assert not aligner.verify(image, estimate(gone), K).accepted
    assert aligner.picture(image, gone, K) is None


def test_a_nose_that_nearly_touches_the_camera_cannot_be_aligned(aligner, frames, K):
    """It is drawn, but a step of the pose would put it behind the camera."""
    near = np.eye(4)
    near[:3, :3] = [[1, 0, 0], [0, 0, -1], [0, 1, 0]]  # nose on
    near[2, 3] = 0.006 - (aligner.mesh.triangles.reshape(-1, 3) @ near[2, :3]).min()
    assert not aligner.track(frames[0][0], near, K).accepted
    assert not aligner.verify(frames[0][0], estimate(near), K).accepted


# ------------------------------------------------------------ judging


def test_the_true_pose_explains_more_than_what_it_is_ambiguous_with(aligner, frames, K):
    for image, truth in zip(*frames):
        costs, sky = aligner.photometric_costs(image, xu.ambiguous_poses(truth), K)
        assert costs.argmin() == 0 and costs[0] < sky


def test_a_flipped_estimate_is_put_right(aligner, frames, K):
    right = 0
    for image, truth in zip(*frames):
        flipped = truth @ xu.XWING.lookalikes[0]
        found = aligner.verify(image, estimate(flipped, 2.0, truth), K)
        right += found.accepted and xu.rotation_error(found.pose, truth) < 2
    assert right >= 9


def test_what_a_pose_is_ambiguous_with_is_known_from_the_target(aligner, frames, K):
    """A target that is like itself only has no rivals, so its flipped poses stay as they are."""
    assert aligner.target is xu.XWING and Aligner(aligner.mesh).target is xu.XWING
    plain = dataclasses.replace(xu.XWING, lookalikes=np.eye(4)[None], flat_axis=None)
    alone = Verifier(aligner.refiner, plain)
    for image, truth in zip(*(part[:3] for part in frames)):
        flipped = estimate(truth @ xu.XWING.lookalikes[0], 20.0)
        assert xu.rotation_error(alone.verify(image, flipped, K).pose, truth) > 90


def test_poses_that_differ_by_a_symmetry_are_one(aligner, frames, K):
    """Neither is a rival of the other, and an estimate of one agrees with the other."""
    half_roll = xu.XWING.lookalikes[0]
    symmetric = dataclasses.replace(
        xu.XWING, symmetries=np.array([np.eye(4), half_roll]), lookalikes=np.eye(4)[None]
    )
    verifier = Verifier(aligner.refiner, symmetric)
    image = frames[0][0]
    truth = frames[1][0]
    poses = [truth, truth @ half_roll, tilted(truth, 0, 90)]
    judgement = verifier.judge(image, [estimate(pose) for pose in poses], K)
    assert judgement.votes == [True, True, False]
    assert xu.rotation_error(judgement.runner_up, judgement.best.pose, symmetric) > 30


def test_rivals_are_found_once_and_only_where_none_are_declared(aligner, monkeypatch):
    found = dataclasses.replace(xu.XWING, lookalikes=np.tile(np.eye(4), (2, 1, 1)))
    monkeypatch.setattr(verification, "with_lookalikes", lambda target: found)
    verifier = Verifier(aligner.refiner, xu.XWING)
    assert verifier.rivals is found and verifier.rivals is found and verifier.target is xu.XWING


def test_an_estimate_that_is_far_off_is_put_right_from_nearby(aligner, frames, K):
    def right(aligner):
        starts = [estimate(tilted(truth, 0, 35), 2.0) for truth in frames[1]]
        found = [aligner.verify(image, start, K) for image, start in zip(frames[0], starts)]
        pairs = zip(found, frames[1])
        return sum(one.accepted and xu.rotation_error(one.pose, true) < 2 for one, true in pairs)

    assert right(aligner) >= 9
    assert right(with_settings(aligner, nearby_angles=())) < 8


@pytest.mark.parametrize("margin,turn", [(2.0, 0), (0.0, 0), (0.0, 180)])
def test_confident_pixels_overrule_keypoints_that_say_nothing(aligner, frames, K, margin, turn):
    start = tilted(frames[1][0], 0, turn)
    found = aligner.verify(frames[0][0], estimate(start, margin, frames[1][0]), K)
    assert found.accepted and xu.rotation_error(found.pose, frames[1][0]) < 2


def test_a_pose_is_accepted_by_what_speaks_for_it(aligner, frames, K):
    image = frames[0][0]
    truth = frames[1][0]
    found = aligner.verify(image, estimate(truth, 2.0), K)
    least = aligner.verifier.settings.min_probability
    assert found.accepted and least <= found.probability <= 1 and not found.reason

    against = with_settings(aligner, evidence_weights=(-1.0,) * 5)
    rejected = against.verify(image, estimate(truth, 2.0), K)
    assert not rejected.accepted and rejected.probability < 0.1
    assert "of its edges are in the frame" in rejected.reason


def test_every_piece_of_evidence_counts():
    one, *rest = evidence(0.5, 3.0, [True], 0.15, 0.9)
    assert one == 1 and rest == pytest.approx([0.5, np.log1p(3), 1, 0.5])
    votes = [True, False, False, False]
    assert evidence(0.5, 1e9, votes, -2, 0.9)[2:] == pytest.approx([np.log1p(100), -2, 0])
    assert evidence(0.5, 3.0, [], 0.9, 0.35)[4] == pytest.approx(0.5)  # the lower of both counts
    assert evidence(0.5, 3.0, [], 0.9, 0.9)[4] == 1
    constant, *weights = VerificationSettings().evidence_weights
    assert min(weights) > 0 and constant < 0


@pytest.mark.parametrize(
    "agreement,margin,votes,explained,local",
    [
        pytest.param(0.85, 18.7, [True], -0.05, 0.64, id="hull without wings"),
        pytest.param(0.76, 157, [True], 0.10, 0.16, id="hull without wings, cut"),
        pytest.param(0.75, 114, [False], 0.10, 0.41, id="photograph"),
        pytest.param(0.80, 37, [False], 0.0, 0.14, id="fractal"),
    ],
)
def test_edges_alone_are_no_evidence(agreement, margin, votes, explained, local):
    """What was measured in frames without the ship; the first two were accepted once."""
    settings = VerificationSettings()
    features = evidence(agreement, margin, votes, explained, local)
    assert expit(features @ settings.evidence_weights) < settings.min_probability - 0.1


def test_other_views_put_a_frame_right_and_make_it_more_probable(aligner, frames, K):
    for image, truth in zip(*(part[:4] for part in frames)):
        wrong = estimate(tilted(truth, 50, 100), 0.5)
        good = estimate(moved(truth, 3, 0.005, 1))
        found = [aligner.verify(image, wrong, K, others) for others in ([], [good], [good] * 3)]
        assert xu.rotation_error(found[1].pose, truth) < 2
        assert found[2].accepted and found[1].probability < found[2].probability
        nothing = xu.PoseEstimate(None, reason="3 points fix no pose; 4 are needed")
        found = aligner.verify(image, nothing, K, [good])
        assert found.accepted and xu.rotation_error(found.pose, truth) < 2


def edges_that_agree(aligner, image, pose, K):
    painting = aligner.refiner.paint_pose(image, pose, K)
    return edge_agreement(painting.view.image, painting.picture, painting.drawing.coverage)


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
            edges_that_agree(aligner, changed, moved(truth, turn, 0, 0), K) for turn in (0, 25)
        )
        assert 0 <= beside < right - 0.05 and right > 0.5


def test_no_edges_agree_where_there_are_none(aligner, frames, K):
    flat = np.full((256, 256, 3), 90, np.uint8)
    assert edges_that_agree(aligner, flat, frames[1][0], K) == 0


@pytest.mark.parametrize(
    "well,least,margin,searched",
    [
        (0.1, 0.1, 2.0, False),
        (0.99, 0.1, 2.0, True),
        (0.99, 0.1, 20.0, False),
        (0.99, 0.98, 20.0, True),
    ],
)
def test_confident_keypoints_are_searched_around_only_where_they_explain_too_little(
    aligner, frames, K, monkeypatch, well, least, margin, searched
):
    calls = []
    monkeypatch.setattr(
        Verifier, "_search", lambda *arguments, **options: calls.append(arguments) or []
    )
    changed = with_settings(aligner, well_explained=well, min_explained_contrast=least)
    changed.verify(frames[0][0], estimate(frames[1][0], margin), K)
    assert bool(calls) == searched


def test_an_estimate_that_is_all_wrong_is_not_accepted(aligner, frames, K):
    for tilt, roll in ((50, 0), (-35, -80), (0, 100)):
        for image, truth in zip(*(part[:4] for part in frames)):
            found = aligner.verify(image, estimate(tilted(truth, tilt, roll), 2.0), K)
            assert not found.accepted or xu.rotation_error(found.pose, truth) < 3


@pytest.mark.parametrize("draw", [fit_evidence.fractal, fit_evidence.noise])
def test_a_frame_without_the_ship_is_rejected(aligner, frames, K, draw):
    rng = np.random.default_rng(0)
    for pose in frames[1][:2]:
        found = aligner.verify(draw(256, 256, rng), estimate(pose), K)
        assert not found.accepted and found.reason


def test_an_estimate_without_a_pose_comes_back(aligner, frames, K):
    nothing = xu.PoseEstimate(None, reason="3 points fix no pose; 4 are needed")
    found = aligner.verify(frames[0][0], nothing, K)
    assert found.pose is None and not found.accepted and found.reason == nothing.reason


def test_many_frames_are_verified_as_each_alone(aligner, frames, K, monkeypatch):
    """A frame whose pose is uncertain, here the second of three, is verified again."""
    images = np.array(frames[0][:3])
    poses = frames[1][:3]
    estimates = [estimate(moved(pose, 2, 0.005, i)) for i, pose in enumerate(poses)]
    estimates[1] = estimate(tilted(poses[1], 50, 100), 0.5)
    alone = [aligner.verify(image, one, K) for image, one in zip(images, estimates)]
    asked = []
    enough = aligner.verifier.settings.confident_probability
    assert [one.probability >= enough for one in alone] == [True, False, True]

    def rotated_views(model, images, K, target):
        asked.append((model, images, K))
        return [[estimate(poses[1])] * 3]

    monkeypatch.setattr(verification, "rotated_views", rotated_views)
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


# ------------------------------------------------------------ units


def results(aligner, factor, image, start, K):
    """What align, track and verify find for a mesh scaled by a factor, in the original units.

    Poses (3, 4, 4), standard deviations (3, 6) and the probability.
    """
    factors = np.repeat([1.0, factor], 3)
    units = np.outer(factors, factors)
    covariance = np.diag([2e-3] * 3 + [1e-4] * 3) * units
    pose = xu.scale_pose(start, factor)
    flipped = estimate(pose @ xu.XWING.lookalikes[0], 2.0)

    tracked = aligner.track(image, pose, K, covariance)
    judged = aligner.verify(image, dataclasses.replace(flipped, covariance=covariance), K)
    found = [aligner.align(image, pose, K), *((f.pose, f.covariance) for f in (tracked, judged))]

    poses = np.array([xu.scale_pose(pose, 1 / factor) for pose, _ in found])
    deviations = np.array([np.sqrt(np.diag(covariance / units)) for _, covariance in found])
    return poses, deviations, judged.probability


def differences(aligner, factor, frames, K):
    """How `results` for N frames differ where the mesh is scaled by a factor.

    Poses (N, 3, 6) in radians and diameters, the ratio of their standard deviations less one
    (N, 3, 6), and probabilities (N,).
    """
    vertices = factor * aligner.mesh.vertices
    scaled = Aligner(dataclasses.replace(aligner.mesh, vertices=vertices))
    diameters = np.repeat([1.0, 1 / aligner.mesh.diameter], 3)
    rows = []
    for i, (image, truth) in enumerate(zip(*frames)):
        start = moved(truth, 3, 0.008, i)
        poses, deviations, probability = results(aligner, 1.0, image, start, K)
        others, other_deviations, other_probability = results(scaled, factor, image, start, K)
        steps = [xu.pose_step(*pair) * diameters for pair in zip(others, poses)]
        rows.append((steps, other_deviations / deviations - 1, other_probability - probability))
    return [np.abs(np.array(part)) for part in zip(*rows)]


@pytest.mark.parametrize(
    "factor,tolerance", [(1024.0, 1e-6), (1 / 1024, 1e-6), (1000.0, np.radians(0.01))]
)
def test_the_unit_of_the_mesh_does_not_matter(aligner, frames, K, factor, tolerance):
    poses, deviations, probability = differences(aligner, factor, frames, K)
    assert poses.max() < tolerance and deviations.max() < tolerance
    assert probability.max() < tolerance


def test_lookalikes_are_in_the_units_of_the_mesh(aligner):
    """A lookalike that moves the target shifts its rivals by as many model units."""
    motion = xu.scale_pose(xu.XWING.lookalikes[0], 1.0)
    motion[:3, 3] = 0, 0.25, 0
    other = dataclasses.replace(xu.XWING, lookalikes=[motion], flat_axis=None)
    verifier = Verifier(aligner.refiner, other, scale=0.5)
    _, rival = verifier._ambiguous([np.eye(4)])
    assert rival[:3, 3] == pytest.approx([0, 0.125, 0])


def test_a_mesh_in_its_own_unit_is_kept(aligner):
    assert aligner.scale == pytest.approx(1, abs=1e-12)  # the X-wing's numbers stay as they are
    large = dataclasses.replace(aligner.mesh, vertices=1000 * aligner.mesh.vertices)
    other = Aligner(large)
    assert other.mesh is large
    assert other.refiner.diameter == pytest.approx(aligner.mesh.diameter)
