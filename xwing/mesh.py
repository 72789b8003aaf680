"""The ship as triangles: read from an OBJ file, and drawn as the camera sees it.

Everything that needs the ship's shape goes through one exact rasteriser: which triangle shows at the centre
of each pixel, and how far away it is. OpenCV does the drawing; what is added here is any camera matrix (it
goes into the vertices) and the cut at the near plane, which OpenCV gets wrong. The OBJ reader is small and
strict: trimesh reverses the order of materials, rounds their colours to 8 bits and lets faulty indices pass.
"""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

import xwing_utils as xu

GREY = (0.6, 0.6, 0.6)  # of a material without a colour
NEAR = 0.01  # model units: what is nearer to the camera's plane is not drawn


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Triangles grouped by material, in the order in which the OBJ file first uses the materials."""

    names: list  # M names of the materials
    colours: np.ndarray  # (M, 3) in [0, 1]
    vertices: np.ndarray  # (V, 3) model units
    faces: np.ndarray  # (F, 3) rows of `vertices`
    face_materials: np.ndarray  # (F,) rows of `colours`

    @property
    def triangles(self):
        """(F, 3, 3) corners in model units."""
        return self.vertices[self.faces]


def load_mesh(path):
    """Read a Wavefront OBJ mesh with one colour (Kd) per material.

    Faces of more than three corners are split into fans; texture and normal indices are ignored.

    Returns:
        Mesh.
    Raises:
        FileNotFoundError: no such file.
        ValueError: no faces, a line that cannot be read, a vertex that is not finite, a face whose index
            is out of range, or a material library outside the mesh's folder; says the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such mesh; data/make_xwing.py writes the supplied one")
    colours, vertices, faces, material = {}, [], {}, "default"
    for line, word, values in _statements(path):
        if word == "v":
            vertices.append(_three_numbers(values[:3], line))
        elif word == "f":
            corners = [_vertex_index(corner, len(vertices), line) for corner in values]
            _expect(len(corners) >= 3, line, "three corners or more", values)
            fan = zip(corners[1:], corners[2:])
            faces.setdefault(material, []).extend(
                (corners[0], second, third) for second, third in fan
            )
        elif word in ("usemtl", "mtllib"):
            _expect(values, line, "a name", values)
            material = " ".join(values) if word == "usemtl" else material
            colours.update(
                _read_colours(path.parent, " ".join(values), line) if word == "mtllib" else {}
            )
    if not faces:
        raise ValueError(f"{path}: no faces found; expected a Wavefront OBJ mesh")
    return Mesh(
        list(faces),
        np.array([colours.get(name, GREY) for name in faces], float),
        np.array(vertices),
        np.concatenate([np.array(group) for group in faces.values()]),
        np.repeat(np.arange(len(faces)), [len(group) for group in faces.values()]),
    )


def _statements(path):
    """(place, keyword, values) of each statement of an OBJ or MTL file, continued lines joined."""
    held = ""
    for number, line in enumerate(
        path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1
    ):
        line = held + line.split("#")[0].rstrip()
        held = line[:-1] + " " if line.endswith("\\") else ""
        word, *values = line.split() or [""]
        if word and not held:
            yield f"{path}, line {number}", word, values


def _expect(condition, line, what, values):
    if not condition:
        raise ValueError(f"{line}: expected {what}, got '{' '.join(values)[:60]}'")


def _three_numbers(values, line):
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = []
    _expect(len(numbers) == 3 and np.isfinite(numbers).all(), line, "three finite numbers", values)
    return numbers


def _vertex_index(corner, count, line):
    """The row of a vertex, from a face's corner such as 3/1/2; -1 is the last of `count` vertices so far."""
    try:
        number = int(corner.split("/")[0])
    except ValueError:
        number = 0
    _expect(
        1 <= abs(number) <= count, line, f"an index of one of the {count} vertices so far", [corner]
    )
    return number - 1 if number > 0 else count + number


def _read_colours(folder, name, line):
    """{material: (3,) colour} of a material library; empty where there is no such file."""
    path = (folder / name).resolve()
    _expect(
        path.is_relative_to(folder.resolve()),
        line,
        "a material library in the mesh's folder",
        [name],
    )
    colours, material = {}, None
    for line, word, values in _statements(path) if path.is_file() else ():
        material = " ".join(values) if word == "newmtl" else material
        if word == "Kd":
            colours[material] = _three_numbers(values, line)
    return colours


def rasterise(triangles, pose, K, width, height):
    """Which triangle shows at the centre of each pixel, and how far away it is.

    Args:
        triangles: (F, 3, 3) corners in model units; both sides of each are drawn.
        pose: (4, 4) model -> OpenCV camera.
        K: (3, 3) camera matrix in pixels; principal point and skew may be anything.
        width, height: of the picture, pixels.
    Returns:
        ids (height, width) int32, -1 where nothing shows, and depth along the camera's axis (height, width)
        float32 in model units, inf where nothing shows.
    """
    corners = np.asarray(triangles) @ pose[:3, :3].T + pose[:3, 3]
    ahead = corners[..., 2] >= NEAR
    kept = np.flatnonzero(ahead.all(1))
    cut = np.flatnonzero(ahead.any(1) & ~ahead.all(1))
    pieces = [(i, piece) for i in cut for piece in _beyond_near(corners[i])]
    ids = np.concatenate([kept, [i for i, _ in pieces]]).astype(np.float32)
    corners = np.concatenate([corners[kept], *(piece[None] for _, piece in pieces)])
    picture, depth = draw_triangles(corners, ids[:, None], K, width, height)
    return picture[..., 0].astype(np.int32), depth


def _beyond_near(triangle):
    """The part of a triangle (3, 3), camera frame, that lies beyond NEAR: a list of triangles.

    Source: Sutherland and Hodgman, Reentrant Polygon Clipping, CACM 17(1), 1974.
    """
    polygon = []
    for a, b in zip(triangle, np.roll(triangle, -1, axis=0)):
        if a[2] >= NEAR:
            polygon.append(a)
        if (a[2] >= NEAR) != (b[2] >= NEAR):
            polygon.append(a + (NEAR - a[2]) / (b[2] - a[2]) * (b - a))
    return [np.array([polygon[0], *pair]) for pair in zip(polygon[1:], polygon[2:])]


def draw_triangles(corners, values, K, width, height):
    """Draw triangles, each in one value.

    Args:
        corners: (F, 3, 3) in the OpenCV camera frame, all in front of the camera.
        values: (F, 1) or (F, 3).
    Returns:
        picture (height, width, 3) float32, -1 where nothing shows, and depth as in `rasterise`.
    """
    picture = np.full((height, width, 3), -1, np.float32)
    depth = np.full((height, width), np.inf, np.float32)
    if len(corners) == 0:
        return picture, depth
    half = height / 2  # OpenCV's camera here: 90 degrees from top to bottom, y up, z backwards
    to_opengl = np.array(
        [[K[0, 0], K[0, 1], K[0, 2] - width / 2], [0, -K[1, 1], half - K[1, 2]], [0, 0, -half]]
    )
    vertices = corners.reshape(-1, 3) @ (to_opengl.T / half).astype(corners.dtype)
    vertices = vertices.astype(np.float32, copy=False)[:, None]
    indices = np.arange(len(vertices), dtype=np.int32).reshape(-1, 1, 3)
    colours = np.broadcast_to(np.asarray(values, np.float32), (len(corners), 3)).repeat(3, axis=0)[
        :, None
    ]
    settings = cv2.TriangleRasterizeSettings()
    settings.setShadingType(cv2.RASTERIZE_SHADING_FLAT)
    settings.setCullingMode(cv2.RASTERIZE_CULLING_NONE)
    near, far = (
        0.999 * corners[..., 2].min(),
        1.001 * corners[..., 2].max(),
    )  # the nearer, the more exact
    depth[:] = far
    view = np.eye(4), np.pi / 2, near, far
    cv2.triangleRasterize(vertices, indices, colours, picture, depth, *view, settings)
    depth[picture[..., 0] == -1] = np.inf
    return picture, depth


def front_facing_triangles(triangles, pose):
    """(F,) bool: whether the corners of each triangle (F, 3, 3) run counter-clockwise seen from the camera.

    The outer sides do so only where the mesh is wound that way. The supplied one is not: see `visibility`.
    """
    eye = -pose[:3, :3].T @ pose[:3, 3]
    return ((eye - triangles[:, 0]) * _normals(triangles)).sum(1) > 0


def largest_triangles(triangles, share=0.9):
    """Rows of the largest of some triangles (F, 3, 3), which together make up this share of their surface."""
    area = np.linalg.norm(_normals(triangles), axis=1)
    order = np.argsort(-area)
    return order[: np.searchsorted(area[order].cumsum(), share * area.sum()) + 1]


def _normals(triangles):
    return np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])


def visibility(triangles, size=384, views=60):
    """How much of each triangle shows from outside, on its front (corners counter-clockwise) and on its back.

    Returns:
        area (F, 2): square model units, the most that shows in any of `views` pictures of `size` pixels from
        all round; openness (F, 2) in [0, 1]: the share of light from all round that no other part keeps away.
    Source: ambient occlusion, Zhukov, Iones and Kronin, An Ambient Light Illumination Model, EGWR 1998.
    """
    height, turn = 1 - (2 * np.arange(views) + 1) / views, np.pi * (1 + 5**0.5) * np.arange(views)
    radius, normals = (
        np.sqrt(1 - height**2),
        _normals(triangles) / 2,
    )  # as long as the triangles are large
    rows, zeros = np.arange(len(triangles)), np.zeros((len(triangles), 2))
    largest, seen, facing = zeros.copy(), zeros.copy(), zeros.copy()
    directions = np.column_stack(
        [radius * np.cos(turn), radius * np.sin(turn), height]
    )  # a Fibonacci sphere
    for direction in directions:
        pose, K = _far_camera(triangles, direction, size)
        ids, _ = rasterise(triangles, pose, K, size, size)
        area = np.bincount(ids[ids >= 0], minlength=len(triangles)) * (pose[2, 3] / K[0, 0]) ** 2
        projected = normals @ direction
        side = (projected < 0).astype(int)
        largest[rows, side] = np.maximum(largest[rows, side], area)
        seen[rows, side] += area
        facing[rows, side] += np.abs(projected)
    return largest, np.clip(seen / np.maximum(facing, 1e-15), 0, 1)


def _far_camera(triangles, direction, size, distance=100.0):
    """(pose, K) of a camera far away in a direction (3,) of the model; the mesh fills its `size` pixels."""
    pose, reach = np.eye(4), 1.05 * np.linalg.norm(triangles, axis=-1).max()
    pose[:3, :3], pose[2, 3] = (
        Rotation.align_vectors([0, 0, -1], direction)[0].as_matrix(),
        distance,
    )
    focal = distance * size / 2 / reach
    return pose, np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])


def sunlit(triangles, points, sun, size=256, bias=0.004):
    """Which points on a mesh a far sun shines on, that is, which no other part shadows: (P,) bool.

    Args:
        triangles: (F, 3, 3) model units.
        points: (P, 3) on their surface, model units.
        sun: (3,) unit vector towards the sun, in model axes.
        size: pixels, of the picture of the mesh as the sun sees it.
        bias: model units by which a point may lie behind what the sun sees: rounding must shadow nothing.
    Source: the shadow map, Williams, Casting Curved Shadows on Curved Surfaces, SIGGRAPH 1978.
    """
    pose, K = _far_camera(triangles, sun, size)
    _, depth = rasterise(triangles, pose, K, size, size)
    depth = cv2.dilate(depth, np.ones((3, 3)))  # a pixel of tolerance on slopes and edges
    column, row = xu.project_pose(points, pose, K).astype(int).clip(0, size - 1).T
    return points @ pose[2, :3] + pose[2, 3] < depth[row, column] + bias
