"""Pictures in which a person picks a box or pins, with events of a mouse that the tests make up."""

import re

import numpy as np
import pytest
import trimesh

import xwing_utils as xu
from xwing import overlay, picking
from xwing.mesh import load_mesh

FRAME = np.full((90, 120, 3), 128, np.uint8)


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    path = tmp_path_factory.mktemp("cube") / "cube.obj"
    trimesh.creation.box(bounds=[[4, 4, 4], [6, 6, 6]]).export(path)
    return load_mesh(path)


@pytest.fixture(scope="module")
def views(cube):
    return picking.numbered_views(cube, xu.box_corners(*np.float64([[4] * 3, [6] * 3])), size=200)


def mouse(kind, x, y, image=FRAME, scale=0.5, buttons=1):
    """An event as ipyevents sends it, on a picture that is shown smaller or larger."""
    height, width = image.shape[:2]
    return {
        "type": kind,
        "relativeX": scale * x,
        "relativeY": scale * y,
        "boundingRectWidth": scale * width,
        "boundingRectHeight": scale * height,
        "buttons": buttons,
    }


def send(picker, *events):
    """Send (number of the picker's listener, event) pairs to it."""
    for listener, event in events:
        picker._events[listener]._dom_handlers(event)


def test_each_view_shows_three_sides_and_hides_the_others(views):
    assert len(views) == 6
    shown = np.array([np.isfinite(view.pixels).all(1) for view in views])
    assert (shown.sum(1) == 7).all()  # a cube hides one of its eight corners
    assert (shown.sum(0) >= 3).all()
    for view in views:
        drawn = (view.picture != picking.BACKGROUND).any(2)
        row, column = np.nonzero(drawn)
        assert 150 < max(np.ptp(row), np.ptp(column)) < 199
        pixels = view.pixels[np.isfinite(view.pixels).all(1)].round().astype(int)
        assert drawn[pixels[:, 1], pixels[:, 0]].all()


def test_the_nearest_number_of_a_view(views):
    view = views[0]
    number = int(np.flatnonzero(np.isfinite(view.pixels).all(1))[2])
    assert view.nearest(*view.pixels[number] + 3) == number
    assert view.nearest(0, 0) is None


def test_a_box_is_dragged_in_any_direction():
    picker = picking.BoxPicker(FRAME, (1, 2, 30, 40))
    assert picker.box == (1, 2, 30, 40)
    send(picker, (0, mouse("mousedown", 80, 60)), (1, mouse("mousemove", 40, 30)))
    assert picker.box == (40, 30, 80, 60)
    before = bytes(picker.children[0].value)
    send(picker, (1, mouse("mousemove", 20, 10)), (0, mouse("mouseup", 22, 12)))
    assert picker.box == (22, 12, 80, 60)
    assert picker.children[1].value == "BOX = (22, 12, 80, 60)"
    assert bytes(picker.children[0].value) != before


def test_a_click_or_a_mouse_that_moves_by_leaves_the_box():
    picker = picking.BoxPicker(FRAME, (1, 2, 30, 40))
    send(picker, (1, mouse("mousemove", 40, 30)), (0, mouse("mousedown", 50, 50)))
    send(picker, (0, mouse("mouseup", 51, 51)), (1, mouse("mousemove", 90, 80)))
    send(picker, (0, mouse("mousedown", 50, 50)), (1, mouse("mousemove", 90, 80, buttons=0)))
    assert picker.box == (1, 2, 30, 40)


def test_pins_are_put_where_the_frame_is_clicked(views):
    picker = picking.PinPicker(FRAME, views, {5: (10, 20)})
    view = views[2]
    number = int(np.flatnonzero(np.isfinite(view.pixels).all(1))[-1])
    send(picker, (3, mouse("click", *view.pixels[number], view.picture)))
    send(picker, (0, mouse("click", 60, 44)))
    assert picker.pins == {5: (10, 20), number: (60.0, 44.0)}
    assert re.fullmatch(r"PINS = \{5: \(10, 20\), \d: \(60.0, 44.0\)\}", picker.children[-1].value)
    send(picker, (3, mouse("click", 0, 0, view.picture)), (0, mouse("click", 61, 45)))
    assert picker.pins[number] == (61.0, 45.0)
    picker.children[1].children[1].click()
    assert picker.pins == {5: (10, 20)}


def test_the_outline_lies_on_the_rim_and_the_creases(cube):
    pose = np.eye(4)
    pose[:3, 3] = [-5, -5, 1]
    K = xu.lens_camera(120, 90, 35)
    drawn = overlay.draw_outline(FRAME, cube, pose, K, (255, 0, 0))
    red = drawn[..., 0].astype(int) - drawn[..., 1] > 100
    half = K[0, 0] / 5  # pixels, of the near side, which hides the others
    row, column = np.nonzero(red)
    offset = np.maximum(np.abs(column + 0.5 - 60), np.abs(row + 0.5 - 45))
    assert red.sum() > 4 * half and np.abs(offset - half).max() < 3

    filled = overlay.draw_outline(FRAME, cube, pose, K, (255, 0, 0), opacity=0.5)
    assert not np.array_equal(filled[45, 60], FRAME[45, 60])
    assert np.array_equal(filled[5, 5], FRAME[5, 5])


def test_a_texture_is_drawn(root):
    mesh = load_mesh(root / "data" / "objects" / "carton.obj")
    view = picking.numbered_views(mesh, mesh.vertices[:8], size=160)[4]
    drawn = view.picture[(view.picture != picking.BACKGROUND).any(2)]
    assert drawn.std(0).min() > 25  # one colour in daylight would be nearly even


def test_the_part_around_a_box_stays_in_the_picture():
    assert overlay.part_around(FRAME, (50, 40, 70, 60), 0.5).shape == (40, 40, 3)
    assert overlay.part_around(FRAME, (0, 0, 20, 10), 0.5).shape == (20, 30, 3)
