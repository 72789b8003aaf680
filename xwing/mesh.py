"""Triangles: how a target's shape is read from a file, and how it looks from a camera.

Everything that needs the target's shape goes through one exact rasteriser. It says which triangle
shows at the centre of each pixel, and how far away that triangle is. OpenCV does the drawing. We
add two things: any camera matrix, which is applied to the vertices, and the cut at the near plane,
which OpenCV gets wrong. trimesh reads the files. We add materials in the order of the file, exact
colours, and errors for what trimesh would misread. A mesh of too many triangles is simplified when
it is read, because each frame draws all of them.
"""

import dataclasses
import functools
import io
import re
import warnings
from pathlib import Path

import cv2
import fast_simplification
import numpy as np
import trimesh
from PIL import Image
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

import xwing_utils as xu

KINDS = "obj", "ply", "stl", "off", "glb"  # suffixes of the files that `load_mesh` reads
OBJ_CORNERS = "i", "i/i", "i//i", "i/i/i"  # corners of an OBJ face, with an i for each index
GREY = (0.6, 0.6, 0.6)  # of a material without a colour
MAX_TRIANGLES = 200_000  # a mesh of more is simplified when it is read
NEAR = 0.021285  # diameters: what is nearer to the camera's plane is not drawn
MAX_CONTINUED = 4.0  # sides of a triangle by which its texture coordinates are continued
CENTRED = 1.0  # diameters: further outside of its box the origin is not the middle of pictures
FAR = 212.8407286  # diameters, 100 X-wing units: a camera this far away sees nearly in parallel
NO_AREA = 1e-12  # a triangle has no area below this fraction of its longest edge squared
SPECKS = 0.0005  # fraction of the surface at either end of an axis that may be loose pieces
LARGE_PART = 0.5  # diameters: where the rest of the surface is smaller, there is a warning
MANY_WITHOUT_AREA = 0.01  # fraction; caps of revolved shapes have some, a damaged export has many


@dataclasses.dataclass(frozen=True, eq=False)
class Mesh:
    """Triangles grouped by material, in the order in which the file first uses the materials."""

    names: list  # M names of the materials, all different
    colours: np.ndarray  # (M, 3) sRGB in [0, 1]
    vertices: np.ndarray  # (V, 3) model units
    faces: np.ndarray  # (F, 3) rows of `vertices`
    face_materials: np.ndarray  # (F,) rows of `colours`
    # (F, 3, 2) of each corner, or None where no material has a texture. (0, 0) is the lower left
    # corner of the texture, (1, 1) the upper right one. Zeros where a face has no coordinates.
    texture_coordinates: np.ndarray | None = None
    textures: list | None = None  # M pictures (h, w, 3) uint8 sRGB, or None in the place of each

    @property
    def triangles(self) -> np.ndarray:
        """(F, 3, 3) corners in model units."""
        return self.vertices[self.faces]

    @functools.cached_property
    def diameter(self) -> float:
        """The diagonal of the bounding box of the triangles, in model units."""
        return diagonal(self.triangles)

    @property
    def near(self) -> float:
        """The near plane for pictures of this mesh, in model units: see `rasterise`."""
        return NEAR * self.diameter


def diagonal(points: np.ndarray) -> float:
    """The diagonal of the bounding box of points (..., 3), in their units; 0 for no points."""
    points = np.reshape(points, (-1, 3))
    if len(points) == 0:
        return 0.0
    return float(np.linalg.norm([np.ptp(axis) for axis in points.T]))  # faster than ptp of all axes


# ---------------------------------------------------------------- reading


def load_mesh(path: str | Path, max_triangles: int | None = MAX_TRIANGLES) -> Mesh:
    """Read a mesh from an OBJ, PLY, STL, OFF or GLB file, with one colour per material.

    A material with a texture has the texture's mean colour. Without a texture it has the Kd of an
    OBJ file, exactly as written there, or the base colour of a GLB file, converted to sRGB. A mesh
    without materials has the mean of its vertex or face colours. What has no valid colour is GREY.

    trimesh reads the first material library of an OBJ file only. Faces whose material it does not
    define are grey.

    Textures are kept as pictures with their coordinates. The parts of a GLB file are moved to their
    places in the scene. Polygons are split into triangles. A face that is the other side of an
    earlier one, in the same material, is left out, because both sides are drawn anyway. Normals are
    not read: which side of a face is outside follows from where it shows. Faces without area stay
    in the mesh, but `visibility` says that they never show. A warning counts them where they are
    more than 1 in 100, and another one names loose pieces that are far from the rest.

    Args:
        path: File to read. Material libraries and textures that it names are read only from its own
            folder. A warning names those that are not there or are damaged.
        max_triangles: A mesh of more triangles is simplified to this number, material by material,
            with a warning. It is then good for drawing. None simplifies no mesh.
    Returns:
        Mesh.
    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is of another kind, is damaged, or has a vertex that is not finite, a
            face whose index is out of range or relative (negative, in an OBJ file), or fewer than
            two faces with an area.
    Source: Garland and Heckbert, Surface Simplification Using Quadric Error Metrics, SIGGRAPH 1997.
    """
    path = Path(path)
    mesh = _read(path)
    _check_finite(path, mesh)
    _check_area(path, mesh)
    _check_specks(path, mesh)
    mesh = _without_doubles(mesh)

    if max_triangles is None or len(mesh.faces) <= max_triangles:
        return mesh
    simple = _simplify(mesh, max_triangles)
    warnings.warn(
        f"{path}: {len(mesh.faces):,} triangles, simplified to {len(simple.faces):,} for drawing; "
        "max_triangles=None keeps them all",
        stacklevel=2,
    )
    return simple


class _FolderResolver(trimesh.resolvers.FilePathResolver):
    """Reads the files that a mesh names, from its folder only.

    It remembers which it could not read, because trimesh continues without them and says nothing.
    """

    def __init__(self, path):
        super().__init__(str(path))
        self.failed = []

    def get(self, name):
        try:
            content = super().get(name.replace("\\", "/"))
            if Path(name).suffix.lower() in Image.registered_extensions():
                Image.open(io.BytesIO(content)).load()  # fails where the picture is damaged
        except Exception:
            self.failed.append(name)
            raise
        return content


def _read(path):
    """A mesh file as a `Mesh` whose indices are in range; its vertices are not checked."""
    kind = path.suffix[1:].lower()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such mesh; data/make_xwing.py writes the supplied one")
    if kind not in KINDS:
        raise ValueError(
            f"{path}: '.{kind}' files are not read; export the mesh as .{', .'.join(KINDS)}"
        )

    resolver = _FolderResolver(path)
    try:
        parts = _read_parts(path.read_bytes(), kind, resolver)
        mesh = _merge(parts) if parts else None
    except Exception as error:  # trimesh raises whatever its parsers stumble over
        raise ValueError(
            f"{path}: not a readable {kind.upper()} mesh, it may be damaged ({error}); "
            "export it again"
        ) from error

    if mesh is None:
        raise ValueError(f"{path}: no faces found; it may be damaged, or hold points only")
    for name in dict.fromkeys(resolver.failed):
        warnings.warn(
            f"{path}: '{name}' is not in the mesh's folder or is damaged, so its colours are "
            "missing",
            stacklevel=3,
        )
    return mesh


def _read_parts(content, kind, resolver):
    """The parts of a file's content (bytes) in their places, as a list of `trimesh.Trimesh`."""
    if kind == "obj":
        return _read_obj(content.decode("utf-8-sig", errors="replace"), resolver)
    if kind == "off":
        _check_off_is_whole(content.decode(errors="replace"))
    return _load_parts(content, kind, resolver)


def _read_obj(text, resolver):
    """The parts of an OBJ file in the order in which it first uses their materials.

    trimesh reads some faces wrongly and leaves out others, and does not say so. Such files are
    refused.
    """
    triangles = sum(_count_triangles(line) for line in re.findall(r"(?m)^[ \t]*f[ \t].*", text))
    parts = _load_parts(text, "obj", resolver)

    found = sum(len(part.faces) for part in parts)
    if found != triangles:
        raise ValueError(f"trimesh finds {found:,} of {triangles:,} triangles")

    names = re.findall(r"(?m)^usemtl[ \t]+(.*?)\s*$", text)
    rows = {name: row for row, name in enumerate(dict.fromkeys(names))}
    return sorted(parts, key=lambda part: rows.get(_material_name(part), -1))


def _count_triangles(line):
    """How many triangles the face in a line gives; ValueError where trimesh would misread it."""
    corners = re.sub(r"[1-9]\d*", "i", line).split()[1:]  # "f 1//3 2//3 4//3": three times "i//i"
    if len(corners) < 3 or len(set(corners)) > 1 or corners[0] not in OBJ_CORNERS:
        raise ValueError(
            f"'{line.strip()}' is not a face of three or more corners of one kind with absolute "
            "indices, as Blender and MeshLab write them"
        )
    return len(corners) - 2


def _check_off_is_whole(text):
    """ValueError where an OFF file ends early; trimesh would take the faces that are left."""
    content = trimesh.util.comment_strip(text).partition("OFF")[2]
    counts, *rows = [line for line in content.splitlines() if line.strip()]
    vertices, faces = (int(number) for number in counts.split()[:2])
    if len(rows) < vertices + faces:
        raise ValueError(f"{vertices} vertices and {faces} faces announced, {len(rows)} found")


def _load_parts(content, kind, resolver):
    """The parts of a file's content as trimesh reads them, without merging vertices."""
    stream = trimesh.util.wrap_as_stream(content)
    scene = trimesh.load_scene(stream, file_type=kind, resolver=resolver, process=False)

    parts = []
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        geometry = scene.geometry[name]
        if len(getattr(geometry, "faces", ())) == 0:  # points and lines have none
            continue
        _check_part(geometry)
        part = trimesh.Trimesh(geometry.vertices, geometry.faces, process=False)
        part.apply_transform(transform)
        part.visual = geometry.visual  # not a copy, so parts can share a material
        parts.append(part)
    return parts


def _check_part(part):
    """ValueError where vertices do not have three coordinates or an index is out of range."""
    count, dimensions = part.vertices.shape
    if dimensions != 3:
        raise ValueError(f"a vertex has {dimensions} coordinates instead of 3")
    wrong = part.faces[(part.faces < 0) | (part.faces >= count)]
    if len(wrong) > 0:
        raise ValueError(f"a face names vertex {wrong[0]}, counted from 0, of {count:,}")


def _merge(parts):
    """One `Mesh` of several `trimesh.Trimesh`, grouped by material."""
    groups = list(_group_by_material(parts).values())
    parts = [part for group in groups for part in group]
    vertices, faces = trimesh.util.append_faces(
        [np.asarray(part.vertices) for part in parts], [np.asarray(part.faces) for part in parts]
    )
    counts = [sum(len(part.faces) for part in group) for group in groups]
    face_materials = np.repeat(np.arange(len(groups)), counts)

    names = []
    for first, *_ in groups:
        names.append(trimesh.util.unique_name(_material_name(first), names))
    colours = np.array([_colour(first) for first, *_ in groups])
    textures = [_texture(first) for first, *_ in groups]

    coordinates = None
    if all(texture is None for texture in textures):
        textures = None
    else:
        coordinates = np.concatenate([_corner_coordinates(part) for part in parts])
    return Mesh(names, colours, vertices, faces, face_materials, coordinates, textures)


def _group_by_material(parts):
    """Lists of the parts that share a material or, where they have none, a colour; as a dict."""
    groups = {}
    for part in parts:
        material = _material(part)
        key = tuple(_colour(part)) if material is None else id(material)
        groups.setdefault(key, []).append(part)
    return groups


def _material(part):
    return getattr(part.visual, "material", None)


def _material_name(part):
    material = _material(part)
    return "default" if material is None else material.name


def _picture(part):
    """The picture (h, w, 3) uint8 of a part's material, or None."""
    material = _material(part)
    image = getattr(material, "image", None)  # of an OBJ's or PLY's
    if image is None:
        image = getattr(material, "baseColorTexture", None)  # of a GLB's
    return None if image is None else np.asarray(image.convert("RGB"))


def _texture(part):
    """The picture of a part's material, or None where it has one colour or no coordinates.

    trimesh gives a picture of one colour to parts that have coordinates and no material.
    """
    picture = _picture(part)
    if picture is None or getattr(part.visual, "uv", None) is None:
        return None
    return picture if np.ptp(picture, axis=(0, 1)).any() else None


def _corner_coordinates(part):
    """(F, 3, 2) texture coordinates of the corners of a part's faces; zeros where it has none."""
    coordinates = getattr(part.visual, "uv", None)
    if coordinates is None:
        return np.zeros((len(part.faces), 3, 2))
    return np.asarray(coordinates, float)[part.faces]


def _colour(part):
    """The colour (3,) sRGB of a part, as `load_mesh` says."""
    material = _material(part)
    if material is None and part.visual.kind is not None:
        return part.visual.face_colors[:, :3].mean(0) / 255

    picture = _picture(part)
    if picture is not None:
        return picture.mean((0, 1)) / 255

    # Of an OBJ's material. trimesh's own attribute for it is rounded to 8 bits.
    diffuse = getattr(material, "kwargs", {}).get("kd")
    if np.shape(diffuse) == (3,) and np.isfinite(diffuse).all():
        return np.array(diffuse)

    base = getattr(material, "baseColorFactor", None)  # of a GLB's, linear light
    if base is not None:
        return trimesh.visual.color.linear_to_srgb(base[:3] / 255)
    return np.array(GREY)


def _check_finite(path, mesh):
    """ValueError where a vertex is not finite."""
    bad = np.flatnonzero(~np.isfinite(mesh.vertices).all(1))
    if len(bad) > 0:
        raise ValueError(
            f"{path}: {len(bad):,} of {len(mesh.vertices):,} vertices are not finite, "
            f"the first {mesh.vertices[bad[0]].tolist()}; export the mesh again"
        )


def _check_area(path, mesh):
    """ValueError where fewer than two triangles have an area; a warning where many have none."""
    without = ~_has_area(mesh.triangles)
    left = len(mesh.faces) - np.count_nonzero(without)
    if left < 2:
        raise ValueError(
            f"{path}: {left} of {len(mesh.faces):,} faces have an area, and a target needs two "
            "or more; export it again"
        )
    if without.mean() > MANY_WITHOUT_AREA:
        warnings.warn(
            f"{path}: {np.count_nonzero(without):,} of {len(mesh.faces):,} faces have no area "
            "and are ignored",
            stacklevel=3,
        )


def _check_specks(path, mesh):
    """A warning where a few small pieces far away make the mesh seem much larger than it is."""
    some = slice(None, None, max(1, len(mesh.faces) // 20_000))  # of a large mesh, for speed
    triangles = mesh.vertices[mesh.faces[some]]
    area = np.linalg.norm(triangle_normals(triangles), axis=1).repeat(3)
    lengths = []
    for places in triangles.reshape(-1, 3).T:
        order = np.argsort(places)
        cumulated = area[order].cumsum()
        low, high = np.searchsorted(cumulated, cumulated[-1] * np.array([SPECKS, 1 - SPECKS]))
        lengths.append(places[order[high]] - places[order[low]])
    if np.linalg.norm(lengths) < LARGE_PART * mesh.diameter:
        warnings.warn(
            f"{path}: is {mesh.diameter:.4g} units across, but all its surface except for "
            f"{2 * SPECKS:.1%} lies within {np.linalg.norm(lengths):.4g}; remove loose pieces that "
            "do not belong to the target, because all limits are fractions of its size",
            stacklevel=3,
        )


def _without_doubles(mesh):
    """A `Mesh` without the faces that are the other side of an earlier one of their material."""
    places = trimesh.grouping.unique_rows(mesh.vertices)[1]  # (V,) the same where vertices are
    corners = places[mesh.faces]
    order = np.argsort(corners, axis=1)
    clockwise = (order[:, 1] - order[:, 0]) % 3 == 2
    keys = np.column_stack([np.take_along_axis(corners, order, axis=1), mesh.face_materials])
    first, same = trimesh.grouping.unique_rows(keys)

    kept = clockwise == clockwise[first][same]
    if kept.all():
        return mesh
    return dataclasses.replace(
        mesh,
        faces=mesh.faces[kept],
        face_materials=mesh.face_materials[kept],
        texture_coordinates=_rows(mesh.texture_coordinates, kept),
    )


def _rows(array, rows):
    return None if array is None else array[rows]


def _has_area(triangles):
    """(F,) bool: whether the corners of triangles (F, 3, 3) do not lie on one line."""
    edges = triangles - np.roll(triangles, 1, axis=1)
    longest = np.square(edges).sum(2).max(1)
    return np.linalg.norm(triangle_normals(triangles), axis=1) > NO_AREA * longest


# ---------------------------------------------------------------- simplifying


def _simplify(mesh, count):
    """A `Mesh` in at most `count` triangles, where that is possible.

    Each material is simplified alone, so it keeps its colour. Its border stays as it is, so it
    still fits its neighbours. The borders may move only where too many triangles would be left:
    loose triangles have nothing but borders.
    """
    # The library's thresholds are absolute, so lengths are in diameters meanwhile.
    vertices = mesh.vertices / mesh.diameter
    shown = _has_area(mesh.triangles)
    groups = [mesh.faces[shown & (mesh.face_materials == row)] for row in range(len(mesh.names))]

    # All materials have the same limit: the largest that leaves at most `count` triangles in all.
    limits = np.arange(count + 1)
    totals = sum(np.minimum(len(group), limits) for group in groups)
    limit = np.searchsorted(totals, count, side="right") - 1

    for keep_border in (True, False):
        pieces = [_simplify_faces(vertices, group, limit, keep_border) for group in groups]
        counts = [len(faces) for _, faces in pieces]
        if sum(counts) <= count:
            break

    vertices, faces = trimesh.util.append_faces(*zip(*pieces))
    face_materials = np.repeat(np.arange(len(pieces)), counts)
    simple = Mesh(mesh.names, mesh.colours, mesh.diameter * vertices, faces, face_materials)
    if mesh.textures is None:
        return simple
    coordinates = np.concatenate(
        [_moved_coordinates(mesh, simple, row) for row in range(len(mesh.names))]
    )
    return dataclasses.replace(simple, texture_coordinates=coordinates, textures=mesh.textures)


def _moved_coordinates(mesh, simple, row):
    """Texture coordinates (N, 3, 2) for the triangles of one material of a simplified mesh.

    Each continues the coordinates of the nearest triangle of the mesh, so that none reaches over
    the seams of a texture.
    """
    own = (mesh.face_materials == row) & _has_area(mesh.triangles)
    triangles = mesh.triangles[own]
    corners = simple.triangles[simple.face_materials == row]
    _, near = cKDTree(triangles.mean(1)).query(corners.mean(1))

    weights = trimesh.triangles.points_to_barycentric(
        triangles[near].repeat(3, axis=0), corners.reshape(-1, 3)
    )
    weights = weights.reshape(-1, 3, 3).clip(-MAX_CONTINUED, MAX_CONTINUED)
    return weights @ mesh.texture_coordinates[own][near]


def _simplify_faces(vertices, faces, limit, keep_border):
    """(vertices, faces) of some faces alone, in at most `limit` triangles if that is possible."""
    part = trimesh.Trimesh(vertices, faces, process=False)
    part.merge_vertices()  # corners in the same place become neighbours
    if len(faces) <= limit:
        return part.vertices, part.faces
    return fast_simplification.simplify(
        part.vertices, part.faces, target_count=limit, preserve_border=keep_border
    )


# ---------------------------------------------------------------- drawing


def rasterise(
    triangles: np.ndarray,
    pose: np.ndarray,
    K: np.ndarray,
    width: int,
    height: int,
    near: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Which triangle shows at the centre of each pixel, and how far away it is.

    Args:
        triangles: (F, 3, 3) corners in model units; both sides of each are drawn.
        pose: (4, 4) model -> OpenCV camera.
        K: (3, 3) camera matrix in pixels; principal point and skew may be anything.
        width: Width of the picture, pixels.
        height: Height of the picture, pixels.
        near: What is nearer to the camera's plane is not drawn, model units. None takes NEAR times
            the diagonal of the triangles' bounding box, which costs time: callers that draw a mesh
            often pass `Mesh.near`.
    Returns:
        ids (height, width) int32, -1 where nothing shows, and depth along the camera's axis
        (height, width) float32 in model units, inf where nothing shows.
    """
    triangles = np.asarray(triangles)
    if near is None:
        near = NEAR * diagonal(triangles)

    corners = triangles @ pose[:3, :3].T + pose[:3, 3]
    ahead = corners[..., 2] >= near
    kept = np.flatnonzero(ahead.all(1))
    cut = np.flatnonzero(ahead.any(1) & ~ahead.all(1))

    pieces = [(i, piece) for i in cut for piece in _beyond_near(corners[i], near)]
    ids = np.concatenate([kept, [i for i, _ in pieces]]).astype(np.float32)  # drawn as colours
    corners = np.concatenate([corners[kept], *(piece[None] for _, piece in pieces)])
    picture, depth = draw_triangles(corners, ids[:, None], K, width, height)
    return picture[..., 0].astype(np.int32), depth


def _beyond_near(triangle, near):
    """The part of a triangle (3, 3), camera frame, beyond the near plane: a list of triangles.

    Source: Sutherland and Hodgman, Reentrant Polygon Clipping, CACM 17(1), 1974.
    """
    polygon = []
    for a, b in zip(triangle, np.roll(triangle, -1, axis=0)):
        if a[2] >= near:
            polygon.append(a)
        if (a[2] >= near) != (b[2] >= near):
            polygon.append(a + (near - a[2]) / (b[2] - a[2]) * (b - a))
    return [np.array([polygon[0], *pair]) for pair in zip(polygon[1:], polygon[2:])]


def draw_triangles(
    corners: np.ndarray, values: np.ndarray, K: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw triangles, each in one value.

    Args:
        corners: (F, 3, 3) in the OpenCV camera frame, all in front of the camera.
        values: (F, 1) or (F, 3).
        K: (3, 3) camera matrix in pixels.
        width: Width of the picture, pixels.
        height: Height of the picture, pixels.
    Returns:
        picture (height, width, 3) float32, -1 where nothing shows, and depth as in `rasterise`.
    """
    picture = np.full((height, width, 3), -1, np.float32)
    depth = np.full((height, width), np.inf, np.float32)
    if len(corners) == 0:
        return picture, depth

    # OpenCV's camera here looks along -z, y up, with 90 degrees from top to bottom.
    half = height / 2
    to_opengl = np.array(
        [[K[0, 0], K[0, 1], K[0, 2] - width / 2], [0, -K[1, 1], half - K[1, 2]], [0, 0, -half]]
    )
    vertices = corners.reshape(-1, 3) @ (to_opengl.T / half).astype(corners.dtype)
    vertices = vertices.astype(np.float32, copy=False)[:, None]
    indices = np.arange(len(vertices), dtype=np.int32).reshape(-1, 1, 3)
    colours = np.broadcast_to(np.asarray(values, np.float32), (len(corners), 3))
    colours = colours.repeat(3, axis=0)[:, None]

    settings = cv2.TriangleRasterizeSettings()
    settings.setShadingType(cv2.RASTERIZE_SHADING_FLAT)
    settings.setCullingMode(cv2.RASTERIZE_CULLING_NONE)
    near = 0.999 * corners[..., 2].min()  # the closer these two are, the more exact is the depth
    far = 1.001 * corners[..., 2].max()
    depth[:] = far
    view = np.eye(4), np.pi / 2, near, far
    cv2.triangleRasterize(vertices, indices, colours, picture, depth, *view, settings)
    depth[picture[..., 0] == -1] = np.inf
    return picture, depth


# ---------------------------------------------------------------- what shows from where


def triangle_normals(triangles: np.ndarray) -> np.ndarray:
    """(F, 3) right-handed normals of triangles (F, 3, 3), as long as twice their area."""
    return np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])


def front_facing_triangles(triangles: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """(F,) bool: whether the camera sees the corners of each triangle counter-clockwise.

    In most meshes these are the triangles whose outer side is seen. Not all triangles of the X-wing
    are wound that way: see `visibility`.

    Args:
        triangles: (F, 3, 3) corners in model units.
        pose: (4, 4) model -> OpenCV camera.
    """
    eye = -pose[:3, :3].T @ pose[:3, 3]
    return ((eye - triangles[:, 0]) * triangle_normals(triangles)).sum(1) > 0


def largest_triangles(triangles: np.ndarray, fraction: float = 0.9) -> np.ndarray:
    """Rows of the largest triangles (F, 3, 3), together this fraction of the whole surface."""
    area = np.linalg.norm(triangle_normals(triangles), axis=1)
    order = np.argsort(-area)
    return order[: np.searchsorted(area[order].cumsum(), fraction * area.sum()) + 1]


def visibility(
    triangles: np.ndarray, size: int = 384, views: int = 60
) -> tuple[np.ndarray, np.ndarray]:
    """How much of each triangle shows from outside, on its front and on its back.

    On the front the corners run counter-clockwise.

    Args:
        triangles: (F, 3, 3) model units.
        size: Width and height of the pictures that are drawn, pixels.
        views: Number of pictures, from all round.
    Returns:
        area (F, 2): square model units, the most that shows in any of the pictures; openness (F, 2)
        in [0, 1]: the fraction of light from all round that no other part keeps away. Both are 0
        for triangles without area.
    Source: ambient occlusion, Zhukov, Iones and Kronin, An Ambient Light Illumination Model, EGWR
        1998.
    """
    diameter = diagonal(triangles)
    rows = np.arange(len(triangles))
    vector_areas = triangle_normals(triangles) / 2  # (F, 3) normals as long as the area
    largest = np.zeros((len(triangles), 2))  # area that shows in a picture, front and back
    seen = np.zeros((len(triangles), 2))  # sum of the areas that show
    facing = np.zeros((len(triangles), 2))  # sum of the areas that would show without other parts

    for direction in xu.fibonacci_sphere(views):
        pose, K = _far_camera(triangles, direction, size, diameter)
        ids, _ = rasterise(triangles, pose, K, size, size, NEAR * diameter)
        pixel_area = (FAR * diameter / K[0, 0]) ** 2  # square model units
        area = np.bincount(ids[ids >= 0], minlength=len(triangles)) * pixel_area

        projected = vector_areas @ direction
        side = (projected < 0).astype(int)
        largest[rows, side] = np.maximum(largest[rows, side], area)
        seen[rows, side] += area
        facing[rows, side] += np.abs(projected)

    # OpenCV draws a triangle without area where the centre of a pixel is on its line.
    largest[~_has_area(triangles)] = 0
    openness = np.divide(seen, facing, out=np.zeros_like(seen), where=facing > 0)
    return largest, np.where(largest > 0, openness, 0).clip(0, 1)


def _far_camera(triangles, direction, size, diameter):
    """(pose, K) of a camera far away in a direction (3,) from the middle of a mesh.

    A mesh about this point fills its picture, which is `size` pixels wide and high.
    """
    middle = _middle(triangles, diameter)
    reach = 1.05 * np.linalg.norm(triangles - middle, axis=-1).max()
    distance = FAR * diameter
    pose = np.eye(4)
    pose[:3, :3] = Rotation.align_vectors([0, 0, -1], direction)[0].as_matrix()
    pose[:3, 3] = [0, 0, distance] - pose[:3, :3] @ middle
    focal = distance * size / 2 / reach
    return pose, np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])


def _middle(triangles, diameter):
    """The point (3,) in the middle of pictures: the origin, where it lies in the mesh or near it.

    Otherwise it is the middle of the bounding box.
    """
    corners = triangles.reshape(-1, 3)
    low = corners.min(0)
    high = corners.max(0)
    outside = np.maximum(low, -high).max()  # how far the box keeps away from the origin
    return (low + high) / 2 if outside > CENTRED * diameter else np.zeros(3)


def sunlit(
    triangles: np.ndarray,
    points: np.ndarray,
    sun: np.ndarray,
    size: int = 256,
    bias: float = 0.0085140,
    diameter: float | None = None,
) -> np.ndarray:
    """Which points on a mesh a distant sun shines on, because no other part shadows them.

    Args:
        triangles: (F, 3, 3) model units.
        points: (P, 3) on their surface, model units.
        sun: (3,) unit vector towards the sun, in model axes.
        size: Width and height of the shadow map, pixels.
        bias: How far a point may lie behind what the sun sees, as a fraction of the diameter, so
            that rounding shadows nothing.
        diameter: Diameter of the whole mesh, model units. None takes the diagonal of the triangles'
            bounding box. Pass it where the triangles are only some of the mesh's, or for speed.
    Returns:
        (P,) bool.
    Source: the shadow map, Williams, Casting Curved Shadows on Curved Surfaces, SIGGRAPH 1978.
    """
    if diameter is None:
        diameter = diagonal(triangles)
    pose, K = _far_camera(triangles, sun, size, diameter)
    _, depth = rasterise(triangles, pose, K, size, size, NEAR * diameter)
    depth = cv2.dilate(depth, np.ones((3, 3)))  # a pixel of tolerance on slopes and edges

    column, row = xu.project_pose(points, pose, K).astype(int).clip(0, size - 1).T
    behind = points @ pose[2, :3] + pose[2, 3] - depth[row, column]
    return behind < bias * diameter
