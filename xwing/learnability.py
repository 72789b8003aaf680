"""Whether a network can learn the keypoints of a target.

Training takes half an hour or more, so what cannot succeed is refused before it begins.
"""

import numpy as np
from scipy.spatial import cKDTree

import xwing_utils as xu
from xwing.mesh import Mesh, visibility

SURFACE_SAMPLES = 20_000  # points of the visible surface
VIEWS = 60  # directions from which keypoints have to be in sight
MIN_IN_SIGHT = 4  # keypoints of the surface: fewer fix no pose
OFF_SURFACE = 0.05  # diameters: a keypoint further from the visible surface is seen from nowhere
OFF_MIRROR = 0.02  # diameters by which 1 % of the surface may differ from its mirror image


def check_target(target: xu.Target, mesh: Mesh) -> None:
    """Raise ValueError where a network cannot learn a target's keypoints.

    Each keypoint has to be in sight from somewhere, and enough of them from everywhere. A mirror
    has to map the mesh onto itself.

    Args:
        target: `Target`.
        mesh: of the target, from `load_mesh`.
    """
    _check_enough_in_sight(target)
    points = _visible_points(target, mesh)
    tree = cKDTree(points)
    _check_on_surface(target, tree)
    if target.mirror is None:
        return
    images = points @ target.mirror[:3, :3].T + target.mirror[:3, 3]
    apart = np.quantile(tree.query(images)[0], 0.99) / target.diameter
    if apart > OFF_MIRROR:
        raise ValueError(
            f"{target.name}: its mirror does not map the mesh onto itself: 1 % of the surface is "
            f"{apart:.2f} diameters or more from its mirror image; correct 'mirror', or set it to "
            "null"
        )


def _check_on_surface(target, tree):
    """Raise ValueError where a keypoint is far from the points of the visible surface in a tree."""
    distance = tree.query(target.keypoints[8:])[0] / target.diameter
    worst = distance.argmax()
    if distance[worst] > OFF_SURFACE:
        raise ValueError(
            f"{target.name}: no frame shows the keypoint {target.names[8 + worst]!r}, which lies "
            f"{distance[worst]:.2f} diameters from the surface that can be seen from outside; move "
            "it there, or leave 'keypoints' out"
        )


def _check_enough_in_sight(target):
    """Raise ValueError where too few keypoints of the surface face a viewer somewhere."""
    normals = target.normals[8:]
    directions = xu.fibonacci_sphere(VIEWS)
    # A flat target seen edge-on shows its keypoints just so.
    in_sight = ((normals @ directions.T > -0.2) | ~normals.any(1, keepdims=True)).sum(0)
    if in_sight.min() < MIN_IN_SIGHT:
        view = ", ".join(f"{value:.1f}" for value in directions[in_sight.argmin()])
        raise ValueError(
            f"{target.name}: from the direction ({view}) only {in_sight.min()} of the "
            f"{len(normals)} keypoints of its surface are in sight, and a pose needs "
            f"{MIN_IN_SIGHT}; spread them over all sides, or leave 'keypoints' out"
        )


def _visible_points(target, mesh):
    """Points (SURFACE_SAMPLES, 3) of the surface that shows from outside, spread evenly."""
    area, _ = visibility(mesh.triangles)
    if not area.any():
        raise ValueError(
            f"{target.mesh}: no triangle shows from outside, so there is nothing to learn; "
            "export the mesh with its faces"
        )
    area = area.max(1)
    rng = np.random.default_rng(0)
    faces = rng.choice(len(area), SURFACE_SAMPLES, p=area / area.sum())
    weights = rng.dirichlet((1, 1, 1), SURFACE_SAMPLES)  # even over a triangle
    return np.einsum("pi,pij->pj", weights, mesh.triangles[faces])
