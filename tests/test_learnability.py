"""Targets that a network cannot learn are refused before training."""

import dataclasses

import numpy as np
import pytest

import xwing_utils as xu
from xwing.learnability import check_target
from xwing.mesh import load_mesh


def without(keep):
    """The X-wing without the surface keypoints for which `keep` (28,) is False."""
    rows = np.concatenate([np.ones(8, bool), keep])
    return dataclasses.replace(
        xu.XWING,
        keypoints=xu.KEYPOINTS[rows],
        normals=xu.NORMALS[rows],
        names=[name for name, kept in zip(xu.KEYPOINT_NAMES, rows) if kept],
        mirror=None,
    )


def moved(keypoint, offset):
    """The X-wing with one of its keypoints elsewhere."""
    keypoints = xu.KEYPOINTS.copy()
    keypoints[keypoint] += offset
    return dataclasses.replace(xu.XWING, keypoints=keypoints, mirror=None)


TURNED_MIRROR = np.diag([1.0, -1.0, 1.0, 1.0])  # nose for tail


@pytest.mark.parametrize(
    "target,message",
    [
        (without(xu.NORMALS[8:, 2] > 0.2), "from the direction .* only 0 of the .* in sight"),
        (moved(20, [0, 0, 0.1]), f"no frame shows the keypoint '{xu.KEYPOINT_NAMES[20]}'"),
        (dataclasses.replace(xu.XWING, mirror=TURNED_MIRROR), "its mirror does not map the mesh"),
    ],
)
def test_targets_that_cannot_be_learnt(target, message):
    with pytest.raises(ValueError, match=message):
        check_target(target, load_mesh(target.mesh))


def test_targets_that_can_be_learnt():
    check_target(xu.XWING, load_mesh(xu.XWING.mesh))


def test_a_mesh_that_shows_no_surface():
    mesh = load_mesh(xu.XWING.mesh)
    line = mesh.vertices[:1] + np.linspace(0, 1, 3)[:, None] * [1, 1, 1]
    flat = dataclasses.replace(mesh, vertices=line, faces=np.array([[0, 1, 2]]))
    flat = dataclasses.replace(flat, face_materials=np.zeros(1, int))
    with pytest.raises(ValueError, match="no triangle shows from outside"):
        check_target(xu.XWING, flat)
