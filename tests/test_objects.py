"""The rendered clips of other objects, and the flights in scenes: what their files say is true."""

import dataclasses
import itertools

import av
import cv2
import make_objects
import numpy as np
import pytest
import render
import render_objects
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing import detections, evaluation, tracking
from xwing.alignment import Aligner
from xwing.mesh import load_mesh, rasterise

CLIPS = sorted(render_objects.FILMS)
MESHES = "bolt", "can", "carton", "carton_grey", "figure", "toy"


@pytest.fixture(scope="module")
def folder(root):
    return root / "data" / "objects"


def first_frame(path):
    """The number of frames, their rate and the first of them."""
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        image = next(video.decode(stream)).to_ndarray(format="rgb24")
        return stream.frames, stream.average_rate, image


def outline(target, pose, K, image):
    """Pixels (N, 2), row and column, along the outside of a target's silhouette."""
    height, width = image.shape[:2]
    ids, _ = rasterise(load_mesh(target.mesh).triangles, pose, K, width, height)
    inside = (ids >= 0).astype(np.uint8)
    return np.argwhere(cv2.dilate(inside, np.ones((3, 3))) - inside)


# ------------------------------------------------------------ clips


def test_every_clip_has_its_files(folder):
    names = {path.stem for path in folder.glob("*.mp4")}
    assert names == set(CLIPS)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_and_its_json_agree(folder, name):
    clip = xu.read_json(folder / f"{name}.json")
    count, fps, image = first_frame(folder / f"{name}.mp4")
    assert count == len(clip["poses"]) == len(clip["visible"])
    assert fps == clip["fps"]
    assert image.shape == (clip["height"], clip["width"], 3)

    visible = np.array(clip["visible"])
    assert visible.min() >= 0 and visible.max() == 1
    assert [pose is None for pose in clip["poses"]] == (visible == 0).tolist()
    for pose in clip["poses"]:
        if pose is not None:
            xu.rigid_matrix(pose, name)  # raises where it is not rigid
    assert clip["start"]["pose"] == clip["poses"][clip["start"]["frame"]]


@pytest.mark.parametrize("name", CLIPS)
def test_the_outline_at_the_pose_is_where_the_frame_has_edges(folder, name):
    clip = xu.read_json(folder / f"{name}.json")
    _, _, image = first_frame(folder / f"{name}.mp4")
    target = xu.load_target(folder / clip["target"])
    pixels = outline(target, np.array(clip["poses"][0]), np.array(clip["K"]), image)

    smooth = cv2.GaussianBlur(image, (0, 0), 1.0).astype(np.float32)
    steps = cv2.Scharr(smooth, -1, 1, 0) ** 2 + cv2.Scharr(smooth, -1, 0, 1) ** 2
    edges = np.sqrt(steps.sum(2))
    shifts = np.array([(y, x) for y in range(-4, 5) for x in range(-4, 5)])
    strength = [edges[tuple((pixels + shift).T)].mean() for shift in shifts]
    assert np.abs(shifts[np.argmax(strength)]).max() <= 1


@pytest.mark.parametrize("name", ["toy_away", "carton_hand"])
def test_poses_and_visible_fractions_follow_from_the_film(folder, name):
    film = render_objects.FILMS[name]
    clip = xu.read_json(folder / f"{name}.json")
    seconds = render_objects.seconds_of(film)
    poses = render_objects.film_poses(film, seconds)
    for index in (0, 52, len(seconds) - 1):
        if clip["poses"][index] is not None:
            np.testing.assert_allclose(poses[index], clip["poses"][index], atol=1e-6)
        fraction = render_objects.visible_fraction(film, seconds[index])
        assert fraction == pytest.approx(clip["visible"][index], abs=2e-3)


def test_a_hand_hides_the_carton_and_two_objects_leave_and_come_back(folder):
    hidden = xu.read_json(folder / "carton_hand.json")["visible"]
    assert 0.1 < min(hidden) < 0.3 and hidden[-1] == 1
    for name in ("toy_away", "figure_away"):
        visible = np.array(xu.read_json(folder / f"{name}.json")["visible"])
        assert 15 < (visible == 0).sum() < 40
        assert (visible[-15:] > 0.9).all()


def test_a_committed_frame_can_be_rendered_again(folder):
    _, _, image = first_frame(folder / "figure.mp4")
    again = render_objects.frame("figure", 0)
    difference = cv2.GaussianBlur(again.astype(np.float32) - image, (0, 0), 2)
    assert np.abs(difference).mean() < 1.5  # of 255: what the codec lost


class Where:
    """A detector that sees where a target is, but not how it is turned."""

    def __init__(self, known):
        self.target = known.target
        self.K = known.K
        self.poses = {frame.image.tobytes(): pose for frame, pose in zip(known.clip, known.poses)}

    def __call__(self, image, box=None):
        pose = self.poses[image.tobytes()].copy()
        pose[:3, :3] = pose[:3, :3] @ Rotation.from_rotvec([0.5, 0.5, 0.5]).as_matrix()
        keypoints = xu.project_pose(self.target.keypoints, pose, self.K)
        return keypoints, np.ones(len(keypoints)), np.full(len(keypoints), 1.0)


class Unconvinced(Aligner):
    """An aligner to which the pixels of single frames say nothing."""

    def verify(self, image, estimate, K, others=()):
        return dataclasses.replace(estimate, accepted=False, probability=0.01)


def test_what_the_pixels_do_not_confirm_is_found_by_its_edges(folder, monkeypatch):
    monkeypatch.setattr(detections, "EDGE_FRAMES", 3)
    known = evaluation.load_object(folder / "carton_hand.json", step=4)
    frames = list(itertools.islice(known.clip, 12))
    clip = frames, known.K, Where(known), Unconvinced(known.target), known.fps, False
    with pytest.warns(UserWarning, match="carton_grey is found by its edges alone, in frames"):
        track = tracking.track_clip(*clip)
    figures = evaluation.track_figures(known, track)
    assert figures["right"] > 0.9 and figures["wrong"] == 0


# ------------------------------------------------------------ meshes


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects")
    make_objects.write(folder)
    return folder


@pytest.mark.parametrize("name", MESHES)
def test_the_meshes_are_those_that_the_program_writes(folder, written, name):
    committed, fresh = (load_mesh(place / f"{name}.obj") for place in (folder, written))
    np.testing.assert_allclose(committed.vertices, fresh.vertices, atol=1e-4 * fresh.diameter)
    np.testing.assert_array_equal(committed.faces, fresh.faces)
    np.testing.assert_array_equal(committed.colours, fresh.colours)
    for picture, other in zip(committed.textures or [], fresh.textures or []):
        np.testing.assert_array_equal(picture, other)


def test_the_bolt_is_the_same_after_each_turn_that_its_target_declares(folder):
    target = xu.load_target(folder / "bolt_target.json")
    assert len(target.symmetries) == 6
    vertices = load_mesh(target.mesh).vertices
    for motion in target.symmetries:
        moved = vertices @ motion[:3, :3].T + motion[:3, 3]
        distances = np.linalg.norm(moved[::40, None] - vertices, axis=2).min(1)
        assert distances.max() < 1e-3 * target.diameter


# ------------------------------------------------------------ flights in scenes


@pytest.mark.parametrize("name", render.CLIPS)
def test_the_flights_in_scenes_can_be_read(root, name):
    video, poses, K = evaluation.load_flight(root / "data" / f"{name}.json")
    count, fps, image = first_frame(video)
    assert (count, fps, image.shape) == (len(poses), 30, (256, 256, 3)) == (150, 30, (256, 256, 3))
    assert K[0, 0] == pytest.approx(248.8889, abs=1e-3)

    info = xu.read_json(root / "data" / f"{name}.json")
    flight = render.random_flight(np.random.default_rng([info["seed"], 1]))
    matrices = render.flight_poses(flight)[:150]
    np.testing.assert_allclose(matrices, info["matrices"], atol=1e-9)


def test_the_flights_in_scenes_stay_below_2_mb(root):
    files = [
        root / "data" / f"{name}{suffix}" for name in render.CLIPS for suffix in (".mp4", ".json")
    ]
    assert sum(file.stat().st_size for file in files) < 2e6


def test_a_flight_in_a_scene_is_not_rendered_elsewhere(root, tmp_path, capsys):
    seed = xu.read_json(root / "data" / f"{render.CLIPS[0]}.json")["seed"]
    with pytest.raises(SystemExit, match="2"):
        render.main([str(tmp_path / "train"), "--kind", "staged", "--seed", str(seed)])
    assert f"seed {seed}: data/{render.CLIPS[0]} has these frames" in capsys.readouterr().err
