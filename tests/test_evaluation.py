"""Tables of figures, the evaluation of a folder, the command, and rendered flights."""

import dataclasses
import json
import shutil
import types

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import xwing_utils as xu
from xwing import evaluation, metrics
from xwing.film import write_clip
from xwing.footage import Clip
from xwing.mesh import load_mesh, rasterise
from xwing.tracker import TrackedPose


@pytest.fixture
def corners(poses, K):
    """(50, 8, 2) true corners of the poses."""
    return np.array([xu.project_pose(xu.BOUNDING_BOX, pose, K) for pose in poses])


# ------------------------------------------------------------ tables and files


@pytest.fixture
def figures(corners, poses, K):
    """dict set -> the figures of a perfect prediction, the same for all sets of the README."""
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


def test_tables_write_every_figure_in_its_own_form():
    report = {"corner_px": 1.5, "best_permutation_px": 1, "within_2px": 0.631, "within_5px": 0.9}
    swaps = dict.fromkeys(xu.CORNER_PERMUTATIONS, 0) | {"identity": 503}
    table = evaluation.swaps_table({"test": report | {"permutations": swaps}})
    assert table["test"].tolist()[:5] == ["1.50 px", "1.00 px", "63%", "90%", "503"]

    groups = pd.DataFrame(
        {"frames": [41, 0], "right": [0.5, np.nan], "rotation_deg": [0.123, np.nan]},
        index=pd.CategoricalIndex(pd.IntervalIndex.from_breaks([0, 0.9, 1.05])),
    )
    table = evaluation.groups_table({"distance": {"test": groups}})
    assert table.index.tolist() == [("distance", "up to 0.9"), ("distance", "up to 1.05")]
    assert table.values.tolist() == [["41", "50.0%", "0.12°"], ["0", "–", "–"]]


def test_the_table_of_risks_is_of_the_most_confident_frames():
    rows = pd.DataFrame({"accepted": [True] * 8 + [False] * 2, "wrong": [0] * 7 + [1, 0, 1]})
    rows["risk"], _ = metrics.risk_coverage(rows["wrong"])
    table = evaluation.risk_table({"test": rows}, {"test": [5.0, 5.35, 9.0]})["test"]
    assert table.tolist() == ["0.0%", "12.5%", "20.0%", "12.5%", "50.0%", "5.3"]


def test_the_table_of_a_track_s_states(poses, corners, K):
    track = [TrackedPose("tracked", pose=pose, covariance=1e-4 * np.eye(6)) for pose in poses]
    track[3:5] = [TrackedPose("lost")] * 2
    found = [tracked.pose for tracked in track]
    errors = metrics.frame_errors(corners, found, corners, poses, K)
    table = evaluation.status_table(track, poses, errors)
    assert table.loc["lost"].tolist()[2:] == ["0.0%", "–", "–"]
    # 0.01 radians about each of three axes
    assert table.loc["tracked"].tolist()[2:] == ["100.0%", "0.99°", "0.00°"]
    assert table["frames"].tolist() == ["2", "48"]


def test_the_table_of_probabilities_has_whole_numbers_of_frames():
    rows = pd.DataFrame(
        {"right": [True] * 3 + [False], "probability": [0.9] * 4, "square": [1.0, 5.0, 50, 1]}
    )
    table = evaluation.probability_table({"clip": rows})["clip"]
    assert table.tolist() == ["4", "1", "90.0%", "75.0%", "5.0", "66.7%", "66.7%", "66.7%"]


@pytest.fixture
def project(tmp_path):
    """A folder with what `write_results` needs of a project."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "README.md").write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    return tmp_path


def test_results_go_into_the_json_file_and_between_the_readme_s_markers(figures, project):
    evaluation.write_results(project, figures, INTERVALS, project / "README.md")
    text = (project / "README.md").read_text()
    written = json.loads((project / "weights" / "xwing_eval.json").read_text())
    table = evaluation.readme_rows(written["figures"], written["intervals_95"])
    assert text == f"before\n<!-- results -->\n{table}\n<!-- /results -->\nafter\n"
    assert len(table.splitlines()) == 8
    assert "| rotation error, median | 0.00° (0.50–1.25) |" in table
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
    assert (project / "README.md").read_text() == "nothing\n"
    assert not any((project / "weights").iterdir())


# ------------------------------------------------------------ a folder


@pytest.fixture
def folder(root, camera, matrices, oracle_frames, tmp_path):
    """A folder of six frames in the data format, whose keypoints the oracle knows."""
    folder = tmp_path / "set"
    folder.mkdir()
    shutil.copy(root / "data" / "sample" / "camera_info.json", folder)
    for i, frame in enumerate(oracle_frames(6)):
        Image.fromarray(frame).save(folder / f"{i}.jpg", quality=95)
        (folder / f"{i}_mat.json").write_text(json.dumps(matrices[i].tolist()))
    return folder


@pytest.fixture
def model(oracle, camera, matrices):
    """A stand-in for a network, which finds every keypoint of the frames in `folder`."""
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
    assert found.corner_report()["permutations"]["identity"] == 6
    assert not found.claims()["wrong"].any() and found.moves().max() == 0
    assert found.squares().shape == (6,) and (found.squares() >= 0).all()
    assert len(found.keypoint_claims([0, 1e3])) == 1
    assert all(a is b for a, b in zip(found.estimates, found.from_points))
    assert np.nanmax(errors["rotation"]) < 1
    figures = metrics.summarise(errors)
    assert figures["corner_px_median"] < 0.1 and figures["heatmap_mse_sigma10"] < 1e-5
    assert np.isnan(found.errors([None] * 6)["rotation"]).all()


def test_a_frame_whose_ship_has_passed_the_camera_costs_no_other_frame(
    folder, model, camera, matrices, capsys
):
    passed = xu.transformation_from_pose(camera[0], np.eye(4))  # the ship sits in the camera
    (folder / "5_mat.json").write_text(json.dumps(passed.tolist()), encoding="utf-8")
    found = evaluation.evaluate_folder(folder, model, step=5, progress=False)
    assert [path.name for path in found.paths] == ["0.jpg"]
    assert "5.jpg: skipped" in capsys.readouterr().err
    assert metrics.summarise(found.errors())["frames"] == 1
    with pytest.raises(ValueError, match="expected 1, one a frame, got 2"):
        found.errors([None] * 2)


def test_frames_are_read_as_they_are_needed(folder, model, monkeypatch):
    """A large set does not fit into memory at once."""
    order = []  # "read" for each frame that is read, a number for each batch that is predicted
    read = xu.read_image
    predict = xu.predict_heatmaps

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


def test_a_model_or_an_aligner_of_another_target_is_refused(folder, model):
    other = dataclasses.replace(xu.XWING, name="cube", keypoints=xu.KEYPOINTS * 2)
    with pytest.raises(ValueError, match="the model's weights belong to the target 'X-wing'"):
        evaluation.evaluate_folder(folder, model, progress=False, target=other)
    aligner = types.SimpleNamespace(target=other)
    with pytest.raises(ValueError, match="the aligner's settings belong to the target 'cube'"):
        evaluation.evaluate_folder(folder, model, aligner, progress=False)


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
    assert tuple(written) == evaluation.JSON_KEYS
    assert written["frames"] == 4 and written["flips"] == 0
    assert written["rotation_deg_median"] < 1 and written["seconds_per_frame"] > 0
    printed = capsys.readouterr().out
    assert "rotation error, median" in printed and printed.splitlines()[0].strip() == "set"


def fails(capsys, *arguments):
    """Run the command, which has to end with one line that says what is wrong; return it."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main([*map(str, arguments), "--no-align"])
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message and capsys.readouterr().out == ""
    return message


def test_the_command_line_names_what_is_missing(folder, tmp_path, capsys):
    assert "nowhere" in fails(capsys, tmp_path / "nowhere")
    weights = tmp_path / "nothing.weights.h5"
    assert f"{weights.name}: no such file" in fails(capsys, folder, "--weights", weights)
    message = fails(capsys, folder, "--limit", 0)
    assert "--limit: expected a positive number of frames, got 0" in message
    for path in (tmp_path / "missing" / "panel.json", tmp_path):
        message = fails(capsys, folder, "--json", path)
        assert "--json: expected a file in a folder that exists" in message


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


# ------------------------------------------------------------ flights


@pytest.mark.parametrize("name,width,height", [("wild", 256, 256), ("flight_hd", 1280, 720)])
def test_flights_show_the_ship_where_their_matrices_say(root, name, width, height):
    """The ship's pixels are brighter than the sky around them, in frames all along the video."""
    video, truth, K = evaluation.load_flight(root / "data" / f"{name}.json")
    clip = Clip(video)
    assert len(truth) == clip.count == 300
    assert clip.fps == 30 and (clip.width, clip.height) == (width, height)
    assert video.stat().st_size < 6e6
    ship = load_mesh(root / "data" / "xwing.obj")
    for i, frame in enumerate(clip):
        if i % 50 == 20:
            covered = rasterise(ship.triangles, truth[i], K, width, height)[0] >= 0
            near = cv2.dilate(np.uint8(covered), np.ones((15, 15))) > 0
            sky = frame.image[near & ~covered].min(1).mean()
            assert frame.image[covered].min(1).mean() > 2 * sky + 20


# ------------------------------------------------------------ clips whose poses are known


def write_object(footage, folder, **changes):
    """Write the first eight frames of the drawn box like a clip of data/objects/."""
    shutil.copy(footage.mesh, folder)
    write_clip(footage.images[:8], folder / "box.mp4", 30)
    poses = footage.poses[:8].tolist()
    known = {"target": "box.obj", "K": footage.K.tolist(), "fps": 30}
    known |= {"poses": poses, "visible": [1.0] * 8} | changes
    path = folder / "box.json"
    path.write_text(json.dumps(known))
    return path


@pytest.fixture(scope="module")
def known(footage, tmp_path_factory):
    """The `KnownClip` of `write_object`."""
    return evaluation.load_object(write_object(footage, tmp_path_factory.mktemp("object")))


def made_track(known, letters):
    """A track with a letter for each frame: right, turned too far, predicted or lost."""
    far = np.eye(4)
    far[:3, :3] = cv2.Rodrigues(np.radians([0.0, 6.0, 0.0]))[0]
    poses = [true @ far if letter == "t" else true for true, letter in zip(known.poses, letters)]
    made = {"r": "tracked", "t": "tracked", "p": "predicted", "l": "lost"}
    return [
        TrackedPose(made[letter], pose=None if letter == "l" else pose)
        for pose, letter in zip(poses, letters)
    ]


def test_an_object_is_followed_live_from_its_first_pose(known):
    track = evaluation.follow(known, limit=6)
    assert [tracked.status for tracked in track] == ["tracked"] * 6
    figures = evaluation.track_figures(known, track)
    assert figures["visible"] == 6 and figures["right"] == 1 and figures["wrong"] == 0
    assert 0 < figures["rotation_deg_median"] < 1


def test_a_clip_is_tracked_live_with_the_network_until_the_target_is_found(monkeypatch):
    asked = []

    class Finder:
        """A stand-in for a `Tracker` that finds the target in the second frame."""

        def __init__(self, K, fps, detector, aligner):
            self.detector = detector

        def update(self, image):
            asked.append(self.detector)
            found = image == 1
            return TrackedPose("tracked" if found else "lost", pose=np.eye(4) if found else None)

    monkeypatch.setattr(evaluation, "Tracker", Finder)
    track = evaluation.track_live([0, 1, 2, 3], np.eye(3), 30, "network", until_found=True)
    assert [tracked.status for tracked in track] == ["lost", "tracked", "lost", "lost"]
    assert asked == ["network", "network", None, None]


def test_the_figures_of_a_track(known):
    figures = evaluation.track_figures(known, made_track(known, "rttrtppl"))
    assert figures["visible"] == 8 and figures["right"] == 2 / 8
    assert figures["wrong"] == 3 and figures["wrong_in_a_row"] == 2
    assert figures["rotation_deg_median"] == pytest.approx(6)  # of 0, 6, 6, 0 and 6 degrees
    assert figures["found_again"] == []


def test_a_pose_of_a_target_out_of_sight_is_wrong_and_its_return_is_waited_for(known):
    track = made_track(known, "rrtllrlt")
    poses = [*known.poses[:2], None, *known.poses[3:]]
    visible = np.array([1, 0.5, 0, 0.5, 1, 1, 0.4, 0.6])
    figures = evaluation.track_figures(
        dataclasses.replace(known, poses=poses, visible=visible), track
    )
    assert figures["visible"] == 6 and figures["right"] == 3 / 6
    assert figures["wrong"] == 2 and figures["wrong_in_a_row"] == 1
    assert figures["found_again"] == [2, None]

    table = evaluation.tracks_table({"box": figures})
    assert table.loc["box"].tolist() == ["6", "50.0%", "0.00°", "2", "1", "2, never"]


def test_turns_that_nobody_can_see_are_no_error(known):
    turned = [true @ known.target.symmetries[-1] for true in known.poses]
    assert xu.rotation_error(turned[0], known.poses[0]) > 100
    track = [TrackedPose("tracked", pose=pose) for pose in turned]
    assert evaluation.track_figures(known, track)["right"] == 1
    symmetries = np.eye(4)[None]
    printed = dataclasses.replace(known.target, symmetries=symmetries)
    assert evaluation.track_figures(dataclasses.replace(known, target=printed), track)["right"] == 0


def test_a_track_without_a_pose_has_no_error(known):
    figures = evaluation.track_figures(known, made_track(known, "llllllll"))
    assert figures["right"] == 0 and np.isnan(figures["rotation_deg_median"])


def test_an_object_has_to_be_in_sight_at_first(footage, tmp_path):
    poses = [None, *footage.poses[1:8].tolist()]
    path = write_object(footage, tmp_path, poses=poses)
    with pytest.raises(ValueError, match="box.json: expected a pose of the first frame"):
        evaluation.load_object(path)


@pytest.mark.parametrize("name,count", [("frames", 75), ("wild.json", 75)])
def test_clips_of_the_x_wing_know_how_much_of_it_is_in_sight(root, name, count):
    known = evaluation.load_xwing_clip(root / "data" / name, step=4)
    assert known.clip.count == len(known.poses) == len(known.visible) == count
    assert known.fps == 7.5
    assert known.visible.min() == 0 and known.visible.max() == 1
    away = known.poses[known.visible.argmin()]
    middle = xu.project_pose(xu.BOUNDING_BOX, away, known.K).mean(0)
    assert not xu.in_frame(middle[None])[0]
