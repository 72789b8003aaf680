"""Errors of poses and keypoints, figures with their intervals, tables, and the panel of a folder."""

import json
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import stats
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing import evaluation, metrics
from xwing.footage import Clip
from xwing.mesh import load_mesh, rasterise


def turned(degrees, axis=(1, 2, 3), shift=(0, 0, 0), start=None):
    """A pose turned about an axis through its origin, and moved."""
    pose = np.eye(4) if start is None else start.copy()
    axis = np.array(axis) / np.linalg.norm(axis)
    pose[:3, :3] = Rotation.from_rotvec(np.radians(degrees) * axis).as_matrix() @ pose[:3, :3]
    pose[:3, 3] += shift
    return pose


@pytest.fixture
def corners(poses, K):
    """(50, 8, 2) true corners of the poses."""
    return np.array([xu.project_pose(xu.BOUNDING_BOX, pose, K) for pose in poses])


@pytest.fixture
def grid():
    """(10, 8, 2) corners, well inside a 256 px frame and apart from each other."""
    corners = np.array([(60 + 40 * (k % 4), 80 + 90 * (k // 4)) for k in range(8)], float)
    return corners + np.random.default_rng(0).uniform(-10, 10, (10, 1, 2))


# ------------------------------------------------------------ one pose


def test_a_pose_is_right_within_both_bounds():
    found = [
        turned(4.9),
        turned(5.1),
        turned(0, shift=(0, 0, 0.049)),
        turned(0, shift=(0, 0, 0.051)),
        None,
    ]
    assert metrics.within(found, [np.eye(4)] * 5).tolist() == [True, False, True, False, False]
    assert metrics.within([], []).dtype == bool


def test_translation_error():
    assert metrics.translation_error(turned(50, shift=(0.3, 0.4, 0)), np.eye(4)) == pytest.approx(
        0.5
    )


def test_add_error_is_the_mean_over_the_corners(poses):
    moved = [
        np.linalg.norm(poses[0] @ p - poses[1] @ p) for p in xu.to_homogeneous(xu.BOUNDING_BOX)
    ]
    assert metrics.add_error(poses[0], poses[1]) == pytest.approx(np.mean(moved))
    assert metrics.add_error(turned(0, shift=(0.03, 0, 0.04)), np.eye(4)) == pytest.approx(0.05)


def test_speed_score_adds_radians_and_relative_distance():
    truth = turned(20, shift=(0, 0, 2.0))
    estimate = turned(90, shift=(0.1, 0, 0), start=truth)
    assert metrics.speed_score(estimate, truth) == pytest.approx(np.pi / 2 + 0.05)
    assert metrics.speed_score(truth, truth) == 0


def test_muzzle_error_is_blind_to_a_roll_that_swaps_the_cannons(poses, K):
    assert metrics.muzzle_error(poses[0] @ xu.HALF_ROLL, poses[0], K) < 1e-9
    assert metrics.muzzle_error(turned(10, start=poses[0]), poses[0], K) > 1


def test_muzzles_behind_the_camera_are_infinitely_far_off(poses, K):
    assert metrics.muzzle_error(turned(0, shift=(0, 0, -2.0)), poses[0], K) == np.inf


# ------------------------------------------------------------ corners and heatmaps


@pytest.mark.parametrize("name", list(xu.CORNER_PERMUTATIONS))
def test_report_of_corners_that_are_taken_for_others(grid, name):
    report = metrics.corner_report(grid[:, xu.CORNER_PERMUTATIONS[name]], grid)
    assert report["best_permutation_px"] == 0 and report["permutations"][name] == 10
    assert sum(report["permutations"].values()) == 10
    assert (report["corner_px"] > 30) == (name != "identity")


def test_report_of_errors_worked_out_by_hand(grid):
    estimate = grid + np.array([0, 1, 1, 1, 3, 4, 10, 10])[:, None] * [0.6, 0.8]
    report = metrics.corner_report(estimate, grid)
    assert report["corner_px"] == pytest.approx(2)
    assert (report["within_2px"], report["within_5px"]) == (0.5, 0.75)
    assert metrics.corner_report(estimate / 2, grid / 2, 128, scale=2)[
        "corner_px"
    ] == pytest.approx(2)


def test_report_counts_corners_in_the_frame_only(grid):
    outside, estimate = grid.copy(), grid.copy()
    outside[:, 0] = estimate[:, 0] = [-5, 20]
    estimate[:, 0] += 500
    assert metrics.corner_report(estimate, outside)["within_2px"] == 1


def test_report_counts_a_missing_corner_as_far_off(grid):
    estimate = grid.copy()
    estimate[:, :2] = np.nan
    assert metrics.corner_report(estimate, grid)["within_5px"] == 0.75


@pytest.mark.parametrize("sigma,stride", [(4.0, 2), (10.0, 1)])
def test_heatmap_errors_of_a_perfect_and_of_an_empty_network(sigma, stride):
    truth = np.random.default_rng(0).uniform(60, 196, (3, 8, 2))
    settings = dict(sigma=sigma, stride=stride, size=256)
    truth[1, 4] = [-20, 100]
    maps = np.stack(
        [xu.gaussian_heatmaps(c / stride, 256 // stride, sigma / stride) for c in truth]
    )
    errors = metrics.heatmap_errors(maps, truth, settings)
    assert np.isnan(errors[1, 4]) and np.isnan(errors).sum() == 1 and np.nanmax(errors) < 1e-5
    nothing = metrics.heatmap_errors(np.zeros_like(maps), truth, settings)
    assert np.nanmean(nothing) == pytest.approx(np.pi * 10**2 / 256**2, rel=1e-3)  # 0.0048


def test_heatmap_errors_refuse_a_sigma_below_the_network_s():
    with pytest.raises(
        ValueError, match="sigma: expected at least the network's own 4.0 pixels, got 2.0"
    ):
        metrics.heatmap_errors(
            [], np.zeros((0, 8, 2)), dict(sigma=4.0, stride=2, size=256), sigma=2.0
        )


# ------------------------------------------------------------ a set: errors, figures, intervals


def test_figures_of_a_perfect_prediction(corners, poses, K):
    figures = metrics.summarise(metrics.frame_errors(corners, list(poses), corners, poses, K))
    shares = (
        "poses_found",
        "add_0.1",
        "add_0.02",
        "muzzles_within_3px",
        "corners_within_5px",
        "box_corners_within_5px",
    )
    counts = {"frames": 50, "frames_with_4_corners": int((xu.in_frame(corners).sum(1) >= 4).sum())}
    assert {name: figures.pop(name) for name in counts} == counts
    assert figures == pytest.approx({name: float(name in shares) for name in figures}, abs=1e-9)


def test_box_is_measured_where_it_was_solved_and_else_the_keypoints(corners, poses, K):
    errors = metrics.frame_errors(corners + 3, [None, *poses[1:]], corners, poses, K)
    inside = xu.in_frame(corners)
    np.testing.assert_array_equal(np.isfinite(errors["corner"]), inside)
    np.testing.assert_allclose(errors["corner"][inside], np.sqrt(18))
    np.testing.assert_allclose(errors["box"][0][inside[0]], np.sqrt(18))
    assert np.nanmax(errors["box"][1:]) < 1e-9
    assert (
        np.isnan(errors["rotation"][0]) and not errors["solved"][0] and errors["solved"][1:].all()
    )


def test_true_distance_and_elevation_are_those_of_the_camera_seen_from_the_ship(corners, poses, K):
    errors = metrics.frame_errors(corners, list(poses), corners, poses, K)
    camera = np.array([np.linalg.inv(pose)[:3, 3] for pose in poses])  # in model axes
    np.testing.assert_allclose(errors["distance"], np.linalg.norm(camera, axis=1))
    np.testing.assert_allclose(
        np.sin(np.radians(errors["elevation"])), camera[:, 2] / errors["distance"]
    )


def test_a_missing_pose_is_a_miss_and_no_flip(corners, poses, K):
    enough = xu.in_frame(corners).sum(1) >= 4
    found = [pose if i % 2 else None for i, pose in enumerate(poses)]
    figures = metrics.summarise(metrics.frame_errors(corners, found, corners, poses, K))
    expected = (np.arange(50) % 2)[enough].mean()
    shares = ("poses_found", "add_0.02", "muzzles_within_3px")
    assert [figures[name] for name in shares] == pytest.approx([expected] * 3)
    assert figures["rotation_deg_median"] == figures["flips"] == 0


def test_flips_count_in_frames_with_four_corners_only(corners, poses, K):
    enough = xu.in_frame(corners).sum(1) >= 4
    wrong = [*np.flatnonzero(enough)[:3], *np.flatnonzero(~enough)[:1]]
    found = [pose @ xu.HALF_ROLL if i in wrong else pose for i, pose in enumerate(poses)]
    figures = metrics.summarise(metrics.frame_errors(corners, found, corners, poses, K))
    assert len(wrong) == 4 and figures["flips"] == pytest.approx(3 / enough.sum())


def test_a_set_without_any_pose(corners, poses, K):
    errors = metrics.frame_errors(np.full_like(corners, np.nan), [None] * 50, corners, poses, K)
    figures = metrics.summarise(errors)
    zero = ("poses_found", "add_0.1", "corners_within_5px", "flips")
    assert [figures[name] for name in zero] == [0] * len(zero)
    assert np.isnan(figures["rotation_deg_median"])
    assert "rotation_deg_median" not in metrics.bootstrap(errors, repeats=9)


def test_a_set_without_a_countable_frame_has_no_figures(K):
    away = np.array([turned(0, shift=(50, 0, 1.0))])
    corners = np.array([xu.project_pose(xu.BOUNDING_BOX, away[0], K)])
    figures = metrics.summarise(metrics.frame_errors(corners, [None], corners, away, K))
    assert np.isnan(figures["corner_px_median"]) and np.isnan(figures["poses_found"])
    assert figures["frames"] == 1 and figures["frames_with_4_corners"] == 0


def test_bootstrap_agrees_with_scipy(grid, K):
    angles = np.random.default_rng(0).uniform(0, 10, 80)
    truth, poses = np.tile(grid, (8, 1, 1)), np.tile(turned(0, shift=(0, 0, 1)), (80, 1, 1))
    found = [turned(angle, start=pose) for angle, pose in zip(angles, poses)]
    intervals = metrics.bootstrap(metrics.frame_errors(truth, found, truth, poses, K))
    low, high = intervals["rotation_deg_median"]
    expected = stats.bootstrap(
        (angles,), np.median, method="percentile", rng=np.random.default_rng(1)
    )
    np.testing.assert_allclose([low, high], expected.confidence_interval, atol=0.5)
    assert low < np.median(angles) < high


def test_intervals_of_smaller_frames_hold_their_figures(grid, poses, K):
    """The bootstrap took all frames to be 256 px wide, so that NMAE lay outside its own interval."""
    truth = np.floor(grid / 2)
    errors = metrics.frame_errors(truth + 1, [None] * 10, truth, poses[:10], K, size=128)
    assert metrics.summarise(errors)["nmae"] == pytest.approx(1 / 128)
    assert metrics.bootstrap(errors, repeats=20)["nmae"] == pytest.approx((1 / 128, 1 / 128))


# ------------------------------------------------------------ tracks


FPS = 30.0


def flight(count):
    """(N, 4, 4) a smooth flight before the camera."""
    seconds = np.arange(count) / FPS
    return np.array(
        [turned(40 * t, (0.2, 1, 0.1), (0.2 * t - 0.1, 0.05 * t, 1 + 0.1 * t)) for t in seconds]
    )


def test_jitter_is_the_acceleration_error():
    truth = flight(50)
    assert metrics.jitter(truth, truth, FPS) == pytest.approx((0, 0), abs=1e-6)
    moved = truth.copy()
    moved[:, 0, 3] += 0.5 * 2.0 * (np.arange(50) / FPS) ** 2  # an acceleration of 2 units/s^2
    assert metrics.jitter(moved, truth, FPS)[1] == pytest.approx(2.0)
    assert np.isnan(metrics.jitter([None] * 50, truth, FPS)).all()


def test_tracks_are_compared_over_the_frames_that_all_have(K):
    """Two ways by hand: one is turned by 2 degrees, but for a flip and a gap; the other is moved by 0.01."""
    truth, seen = flight(10), np.arange(10) != 9
    off = [turned(2, (0, 0, 1), start=pose) for pose in truth]
    off[3], off[7] = off[3] @ xu.HALF_ROLL, None
    moved = truth.copy()
    moved[:, 0, 3] += 0.01
    table = metrics.compare_tracks({"turned": off, "moved": list(moved)}, truth, seen, K, FPS)
    assert table["poses"].tolist() == [8, 9] and table["flips"].tolist() == [1, 0]
    assert table["rotation, deg"].tolist() == pytest.approx([2, 0], abs=1e-6)
    flip = xu.rotation_error(off[3], truth[3])
    assert table.loc["turned", "95 %"] == pytest.approx(np.percentile([2] * 7 + [flip], 95))
    assert table["translation"].tolist() == pytest.approx([0, 0.01])
    assert table.loc["moved", "jitter, deg/s2"] == pytest.approx(0, abs=1e-3)
    assert table.loc["turned", "jitter, deg/s2"] > 1000
    inside = [metrics.muzzle_error(moved[i], truth[i], K) <= 3 for i in range(9)]
    assert table.loc["moved", "muzzles within 3 px"] == np.mean(inside)


def test_a_way_that_found_nothing_leaves_nothing_to_compare(K):
    truth = flight(10)
    ways = {"all": list(truth), "none": [None] * 10}
    table = metrics.compare_tracks(ways, truth, np.ones(10, bool), K, FPS)
    assert table["poses"].tolist() == [10, 0] and table["rotation, deg"].isna().all()


# ------------------------------------------------------------ tables and files


@pytest.fixture
def figures(corners, poses, K):
    errors = metrics.frame_errors(corners, list(poses), corners, poses, K)
    return dict.fromkeys(evaluation.README_SETS, metrics.summarise(errors))


INTERVALS = dict.fromkeys(evaluation.README_SETS, {"rotation_deg_median": (0.5, 1.25)})


def test_the_panel_has_a_row_a_figure_and_a_column_a_set(figures):
    table = evaluation.results_table(figures, INTERVALS)
    assert table.columns.tolist() == ["test", "shifted", "looks", "clip, tracked"]
    assert table.loc["rotation error, median", "test"] == "0.00° (0.50–1.25)"
    assert table.loc["frames", "test"] == "50" and "heatmap MSE at sigma 10 px" not in table.index


def test_what_was_not_measured_or_cannot_be_is_a_dash(figures):
    other = {"frames": 3, "heatmap_mse_sigma10": 0.001}
    table = evaluation.results_table(
        {"test": figures["test"] | {"speed_score": np.nan}, "other": other}
    )
    assert table.loc["SPEED score"].tolist() == ["–", "–"]
    assert table.loc["heatmap MSE at sigma 10 px"].tolist() == ["–", "0.00100"]


@pytest.fixture
def project(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "README.md").write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    return tmp_path


def test_results_go_into_the_json_file_and_between_the_readme_s_markers(figures, project):
    evaluation.write_results(project, figures, INTERVALS, project / "README.md")
    text = (project / "README.md").read_text()
    written = json.loads((project / "weights" / "xwing_eval.json").read_text())
    table = evaluation.readme_rows(written["figures"], written["intervals_95"])
    assert text == f"before\n<!-- results -->\n{table}\n<!-- /results -->\nafter\n"
    assert (
        len(table.splitlines()) == 8 and "| rotation error, median | 0.00° (0.50–1.25) |" in table
    )
    assert written["figures"]["test"]["frames"] == 50
    assert set(written["figures"]["test"]) <= set(evaluation.JSON_KEYS)


def test_a_figure_that_does_not_exist_is_null(figures, project):
    figures = {name: f | {"speed_score": np.nan} for name, f in figures.items()}
    evaluation.write_results(project, figures, {})
    written = json.loads((project / "weights" / "xwing_eval.json").read_text())
    assert written["figures"]["test"]["speed_score"] is None
    assert "old" in (project / "README.md").read_text()


def test_results_need_the_readme_s_markers_and_write_nothing_without(figures, project):
    (project / "README.md").write_text("nothing\n")
    with pytest.raises(ValueError, match="README.md: expected the markers"):
        evaluation.write_results(project, figures, INTERVALS, project / "README.md")
    assert (project / "README.md").read_text() == "nothing\n" and not any(
        (project / "weights").iterdir()
    )


# ------------------------------------------------------------ a folder


@pytest.fixture
def folder(root, camera, matrices, oracle_frames, tmp_path):
    """Six frames in the data format that an oracle knows."""
    folder = tmp_path / "set"
    folder.mkdir()
    shutil.copy(root / "data" / "sample" / "camera_info.json", folder)
    for i, frame in enumerate(oracle_frames(6)):
        Image.fromarray(frame).save(folder / f"{i}.jpg", quality=95)
        (folder / f"{i}_mat.json").write_text(json.dumps(matrices[i].tolist()))
    return folder


@pytest.fixture
def model(oracle, camera, matrices):
    """A network that finds every point of those frames."""
    return oracle(xu.keypoints_of(matrices[:6], *camera, points=xu.KEYPOINTS))


def test_a_folder_is_evaluated_frame_by_frame(folder, model, camera, matrices, K):
    found = evaluation.evaluate_folder(folder, model, batch_size=4, progress=False)
    assert [path.name for path in found.paths] == [f"{i}.jpg" for i in range(6)]
    assert found.keypoints.shape == found.true_keypoints.shape == (6, 36, 2)
    assert found.confidence.shape == found.sigma.shape == (6, 36)
    np.testing.assert_array_equal(
        found.true_poses, [xu.pose_in_camera(camera[0], m) for m in matrices[:6]]
    )
    np.testing.assert_array_equal(found.K, K)
    errors = found.errors()
    assert all(a is b for a, b in zip(found.estimates, found.from_points))
    assert np.nanmax(errors["rotation"]) < 1
    figures = metrics.summarise(errors)
    assert figures["corner_px_median"] < 0.1 and figures["heatmap_mse_sigma10"] < 1e-5
    assert np.isnan(found.errors([None] * 6)["rotation"]).all()


def test_frames_are_read_as_they_are_needed(folder, model, monkeypatch):
    """Not all at once: a large set has to fit too."""
    order, read, predict = [], xu.read_image, xu.predict_heatmaps

    def reading(*arguments):
        order.append("read")
        return read(*arguments)

    def predicting(model, images, *arguments, **options):
        order.append(len(images))
        return predict(model, images, *arguments, **options)

    monkeypatch.setattr(xu, "read_image", reading)
    monkeypatch.setattr(xu, "predict_heatmaps", predicting)
    evaluation.evaluate_folder(folder, model, batch_size=2, progress=False)
    assert order == [1, *["read", "read", 2] * 3]


@pytest.mark.parametrize(
    "arguments,numbers",
    [
        ({"limit": 2}, [0, 1]),
        ({"step": 4}, [0, 4]),
        ({"step": 2, "limit": 2}, [0, 2]),
        ({"limit": 9}, range(6)),
    ],
)
def test_a_part_of_a_folder(folder, model, arguments, numbers):
    found = evaluation.evaluate_folder(folder, model, progress=False, **arguments)
    assert [int(path.stem) for path in found.paths] == list(numbers)
    assert len(found.estimates) == len(found.true_poses) == len(numbers)


def test_the_command_line_prints_the_panel_and_writes_it(
    folder, model, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(xu, "load_model", lambda path: model)
    path = tmp_path / "panel.json"
    evaluation.main([str(folder), "--no-align", "--limit", "4", "--json", str(path)])
    written = json.loads(path.read_text())
    assert (
        tuple(written) == evaluation.JSON_KEYS and written["frames"] == 4 and written["flips"] == 0
    )
    assert written["rotation_deg_median"] < 1 and written["seconds_per_frame"] > 0
    printed = capsys.readouterr().out
    assert "rotation error, median" in printed and printed.splitlines()[0].strip() == "set"


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        evaluation.main([*map(str, arguments), "--no-align"])
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message and capsys.readouterr().out == ""
    return message


def test_the_command_line_names_what_is_missing(folder, tmp_path, capsys):
    assert "nowhere" in fails(capsys, tmp_path / "nowhere")
    weights = tmp_path / "nothing.weights.h5"
    assert f"{weights.name}: no such file" in fails(capsys, folder, "--weights", weights)
    assert "--limit: expected a positive number of frames, got 0" in fails(
        capsys, folder, "--limit", 0
    )
    for path in (tmp_path / "missing" / "panel.json", tmp_path):
        assert "--json: expected a file in a folder that exists" in fails(
            capsys, folder, "--json", path
        )


def test_the_command_line_names_the_bad_frame(folder, model, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(xu, "load_model", lambda path: model)
    Image.new("RGB", (64, 48)).save(folder / "4.jpg")
    json_file = tmp_path / "panel.json"
    assert "4.jpg: expected 256x256 pixels, got 64x48" in fails(capsys, folder, "--json", json_file)
    (folder / "4_mat.json").unlink()
    assert "4_mat.json" in fails(capsys, folder, "--json", json_file)
    (folder / "camera_info.json").unlink()
    (folder / "4_mat.json").write_text("[[1]]")
    assert "4_mat.json" in fails(capsys, folder, "--json", json_file)
    assert not json_file.exists()


# ------------------------------------------------------------ probabilities, and a flight


def test_reliability_counts_and_averages():
    table = metrics.reliability([0.0, 0.08, 0.95, 0.97, 1.0], [False, True, True, True, False])
    assert table["frames"].tolist() == [2, 3]
    np.testing.assert_allclose(
        table[["claimed", "right"]], [[0.04, 0.5], [0.97333, 2 / 3]], atol=1e-4
    )


def test_the_roc_s_area_is_the_chance_that_a_wrong_pose_scores_higher():
    rng = np.random.default_rng(0)
    wrong = rng.random(200) < 0.3
    score = np.round(rng.normal(wrong, 1.0), 1)  # with ties
    false, hits, area = metrics.roc(score, wrong)
    assert false[0] == hits[0] == 0 and false[-1] == hits[-1] == 1
    pairs = score[wrong][:, None] - score[~wrong]
    assert area == pytest.approx((pairs > 0).mean() + (pairs == 0).mean() / 2)
    assert metrics.roc(np.array([3.0, 2, 1]), np.array([True, True, False]))[2] == 1


@pytest.mark.parametrize("name,width,height", [("wild", 256, 256), ("flight_hd", 1280, 720)])
def test_flights_show_the_ship_where_their_matrices_say(root, name, width, height):
    """The ship's pixels are brighter than the sky around them, in frames all along the video."""
    video, truth, K = evaluation.load_flight(root / "data" / f"{name}.json")
    clip = Clip(video)
    assert (
        len(truth) == clip.count == 300
        and clip.fps == 30
        and (clip.width, clip.height) == (width, height)
    )
    assert video.stat().st_size < 6e6
    ship = load_mesh(root / "data" / "xwing.obj")
    for i, frame in enumerate(clip):
        if i % 50 == 20:
            cover = rasterise(ship.triangles, truth[i], K, width, height)[0] >= 0
            near = cv2.dilate(np.uint8(cover), np.ones((15, 15))) > 0
            assert (
                frame.image[cover].min(1).mean() > 2 * frame.image[near & ~cover].min(1).mean() + 20
            )
