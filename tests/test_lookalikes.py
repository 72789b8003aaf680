"""What a target is easily taken for, found from its mesh, and kept beside its weights."""

import dataclasses

import numpy as np
import pytest
import trimesh
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing import lookalikes
from xwing.lookalikes import find_flat_axis, find_lookalikes, with_lookalikes


@pytest.fixture(autouse=True)
def few_drawings(monkeypatch):
    """Fewer views and turns: enough for solids whose lookalikes are turns about their axes."""
    for name, value in {"VIEWS": 162, "TURNS": 100, "_FOUND": {}}.items():
        monkeypatch.setattr(lookalikes, name, value)


def target_of(mesh, folder, **changes):
    """A target without symmetries from a trimesh, as that of a printed one is."""
    path = folder / "solid.obj"
    mesh.export(path)
    known = xu.load_target(path)
    plain = {"symmetries": np.eye(4)[None], "axes": np.zeros((0, 2, 3))}
    return dataclasses.replace(known, **(plain | changes))


@pytest.fixture
def box(tmp_path):
    mesh = trimesh.creation.box((2.0, 3.0, 1.2))
    mesh.apply_translation((5.0, 0, 0))
    return target_of(mesh, tmp_path)


def angles(motions):
    return np.degrees(Rotation.from_matrix(motions[:, :3, :3]).magnitude())


def test_a_printed_box_is_easily_taken_for_a_turned_one(box):
    """Only its print tells one end from the other. The turns are about its middle."""
    found = find_lookalikes(box)
    assert angles(found) == pytest.approx([180] * 3)
    assert (found @ [5, 0, 0, 1])[:, :3] == pytest.approx(np.tile([5, 0, 0], (3, 1)))
    turned = np.abs(np.einsum("nii->ni", found[:, :3, :3]))
    assert turned == pytest.approx(np.ones((3, 3)))  # about the axes of the box


def test_symmetries_are_no_lookalikes(box):
    half_turns = np.array([np.eye(4), *find_lookalikes(box)])
    found = find_lookalikes(dataclasses.replace(box, symmetries=half_turns))
    assert len(found) == 1  # the most alike of all other turns
    assert min(xu.rotation_error(found[0], one) for one in half_turns) > lookalikes.MIN_ANGLE


def test_turns_about_an_axis_of_revolution_are_no_lookalikes(tmp_path):
    axis = np.array([[(0, 0, 0), (0, 0, 1)]], float)
    cylinder = trimesh.creation.cylinder(1.0, 3.0, sections=48)
    printed = target_of(cylinder, tmp_path)
    assert len(find_lookalikes(printed)) == lookalikes.MAX_LOOKALIKES
    found = find_lookalikes(dataclasses.replace(printed, axes=axis))
    assert abs(found[0, 2, 2]) == pytest.approx(1)  # upside down
    ball = dataclasses.replace(printed, axes=np.array([[np.zeros(3), one] for one in np.eye(3)]))
    assert find_lookalikes(ball).shape == (0, 4, 4)


def test_the_ship_is_easily_taken_for_its_half_roll():
    """It declares this, and the mesh says the same."""
    found = find_lookalikes(xu.XWING)
    assert xu.rotation_error(found[0], xu.XWING.lookalikes[0]) < 1e-6


def test_a_thin_target_is_easily_taken_for_its_image_in_depth(box, tmp_path):
    assert find_flat_axis(box) is None
    wedge = trimesh.creation.box((3.0, 2.0, 0.05))
    wedge.vertices[wedge.vertices[:, 0] > 0, 1] *= 0.2
    axis = find_flat_axis(target_of(wedge, tmp_path))
    assert axis[0] == 0  # its own plane and that of its mirror lead to the same poses


# ------------------------------------------------------------ what is declared, and the cache


def test_what_is_declared_counts(box, monkeypatch):
    monkeypatch.setattr(lookalikes, "find_lookalikes", None)  # is not called
    assert with_lookalikes(xu.XWING) is xu.XWING
    flat = dataclasses.replace(box, flat_axis=np.array([0, 0, 1.0]))
    assert with_lookalikes(flat) is flat


def test_what_was_found_is_kept_beside_the_weights(box, tmp_path, monkeypatch):
    """Only a change of the target makes it found anew; a damaged file is replaced."""
    calls = []

    def find(target, drawings):
        calls.append(target)
        return np.tile(np.eye(4), (2, 1, 1))

    monkeypatch.setattr(lookalikes, "find_lookalikes", find)
    monkeypatch.setattr(lookalikes, "find_flat_axis", lambda *_: np.array([0, 1.0, 0]))
    weights = tmp_path / "solid.weights.h5"

    def again(target=box):
        monkeypatch.setattr(lookalikes, "_FOUND", {})  # another process
        found = with_lookalikes(target, weights)
        assert found.lookalikes.shape == (2, 4, 4) and found.flat_axis[1] == 1
        return len(calls)

    assert again() == 1
    (file,) = (tmp_path / ".lookalikes").iterdir()
    assert again() == 1
    file.write_text("{")
    assert again() == 2
    assert again(dataclasses.replace(box, symmetries=np.tile(np.eye(4), (2, 1, 1)))) == 3
    assert with_lookalikes(box).lookalikes.shape == (2, 4, 4) and len(calls) == 4
    assert with_lookalikes(box).lookalikes.shape == (2, 4, 4) and len(calls) == 4  # in memory


def test_a_folder_that_cannot_be_written_stops_nothing(box, tmp_path, monkeypatch):
    (tmp_path / ".lookalikes").write_text("no folder")
    monkeypatch.setattr(lookalikes, "find_lookalikes", lambda *_: np.eye(4)[None])
    monkeypatch.setattr(lookalikes, "find_flat_axis", lambda *_: None)
    found = with_lookalikes(box, tmp_path / "solid.weights.h5")
    assert found.lookalikes.shape == (1, 4, 4)
