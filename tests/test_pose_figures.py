"""Figures for the notebooks: what they draw is where it should be."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

import xwing_utils as xu
from xwing import pose_figures
from xwing.tracker import TrackedPose

K = xu.lens_camera(256, 256)
POSE = xu.move_pose(np.eye(4), np.array([2.0, 0.4, 0.3, 0.05, -0.1, 1.1]))


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    matplotlib.use("Agg")
    yield
    plt.close("all")


def tracked(pose, status="tracked"):
    return TrackedPose(status, 0.0, pose, probability=1.0)


def test_each_heatmap_is_centred_on_its_pixels():
    """A spot in a corner of the map is drawn in the same corner of the frame."""
    heatmaps = np.zeros((32, 32, 8), np.float32)
    heatmaps[4, 20] = np.linspace(0.3, 1, 8)
    figure = pose_figures.show_heatmaps(np.zeros((64, 64, 3), np.uint8), heatmaps)
    assert [axis.get_title()[:8] for axis in figure.axes] == [f"corner {k}" for k in range(8)]
    picture = figure.axes[7].images[0]
    row, column = np.unravel_index(picture.get_array().sum(-1).argmax(), (64, 64))
    assert (column // 2, row // 2) == (20, 4)
    assert np.mean(figure.axes[7].get_xlim()) == 41 and np.mean(figure.axes[7].get_ylim()) == 9


def test_boxes_are_drawn_edge_by_edge_with_one_entry_in_the_legend():
    box = xu.project_pose(xu.BOUNDING_BOX, POSE, K)
    panels = {"one": {"true": box, "flipped": box + 1}, "two": {"true": box}}
    image = np.zeros((256, 300, 3), np.uint8)
    figure = pose_figures.show_boxes(panels, image, found=box)
    first, second = figure.axes
    assert (len(first.lines), len(second.lines)) == (24, 12)
    assert [text.get_text() for text in first.get_legend().get_texts()] == [
        "true",
        "flipped",
        "found",
    ]
    ends = np.concatenate([line.get_xydata() for line in second.lines])
    assert {tuple(end) for end in ends} == {tuple(corner) for corner in box}
    assert second.get_xlim() == (0, 300) and second.get_ylim() == (256, 0)


def test_each_ray_of_pnp_leads_from_the_camera_through_its_pixel_and_its_corner():
    pixels = xu.project_pose(xu.BOUNDING_BOX, POSE, K)
    axis = pose_figures.show_rays(pixels, POSE, K, xu.XWING).axes[0]
    corners = xu.BOUNDING_BOX @ POSE[:3, :3].T + POSE[:3, 3]
    for corner, line in zip(corners, axis.lines):
        begin, end = np.transpose(line.get_data_3d())
        assert np.allclose(begin, 0)
        assert np.allclose(np.cross(end, corner[[0, 2, 1]]), 0) and end @ corner[[0, 2, 1]] > 0
        assert end[1] > corner[2]


def test_curves_are_unwrapped_and_have_gaps_where_there_is_no_pose():
    turns = [xu.move_pose(np.eye(4), np.array([0, 0.5 * i, 0, 0, 0, 0.1 * i])) for i in range(20)]
    track = [tracked(pose) for pose in turns]
    track[7] = tracked(None, "lost")
    places, angles = pose_figures.show_track(track).axes
    z = places.lines[2].get_ydata()
    assert np.isnan(z[7]) and np.isclose(z[8] - z[6], 0.2)
    about_y = angles.lines[0].get_ydata()
    assert np.allclose(np.diff(about_y[8:]), np.degrees(0.5)) and about_y[-1] > 360
    assert len(places.patches) == 1 and places.patches[0].get_x() == 6.5


def test_a_track_without_any_pose_has_a_figure():
    track = [tracked(None, "lost")] * 3
    pose_figures.show_track(track)
    pose_figures.show_flight(track, K, (256, 256), xu.XWING)
