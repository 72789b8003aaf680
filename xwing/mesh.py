"""Triangles: how a target's shape is read from a file, and how it looks from a camera.

Everything that needs the target's shape goes through one exact rasteriser. It says which triangle
shows at the centre of each pixel, and how far away that triangle is. OpenCV does the drawing. We
add two things: any camera matrix, which is applied to the vertices, and the cut at the near plane,
which OpenCV gets wrong. trimesh reads the files. We add what it leaves out: materials in the order
of the file, exact colours, and errors that say which file is damaged and how. A mesh of too many
triangles is simplified when it is read, because each frame draws all of them.
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
from scipy.spatial.transform import Rotation

import xwing_utils as xu

SUFFIXES = ".obj", ".ply", ".stl", ".off", ".glb"  # of files that `load_mesh` reads
PICTURES = ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".tga", ".webp"  # suffixes of textures
GREY = (0.6, 0.6, 0.6)  # of a material without a colour
MAX_TRIANGLES = 200_000  # a mesh of more is simplified when it is read
NEAR = 0.021285  # diameters: what is nearer to the camera's plane is not drawn
FAR = 212.8407286  # diameters, 100 X-wing units: a camera there stands for one infinitely far away
NO_AREA = 1e-12  # a triangle has no area below this fraction of its longest edge squared
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
    without materials has the mean of its vertex or face colours. What has no colour at all is GREY.

    Textures are kept as pictures with their coordinates. The parts of a GLB file are moved to their
    places in the scene and merged. Polygons are split into triangles. Faces without area stay in
    the mesh, but `visibility` says that they never show. A warning counts them where they are more
    than 1 in 100.

    Args:
        path: File to read. Other files that it names are read only from its own folder.
        max_triangles: A mesh of more triangles is simplified to this number, material by material,
            with a warning. It is then good for drawing. A textured mesh keeps its triangles. None
            simplifies no mesh.
    Returns:
        Mesh.
    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is of another kind, is damaged, names a file outside its folder, or has
            a vertex that is not finite, a face whose index is out of range, or fewer than two faces
            with an area.
    Source: Garland and Heckbert, Surface Simplification Using Quadric Error Metrics, SIGGRAPH 1997.
    """
    path = Path(path)
    mesh = _merge(_read_parts(path))

    if not np.isfinite(mesh.vertices).all():
        bad = np.flatnonzero(~np.isfinite(mesh.vertices).all(1))
        raise ValueError(
            f"{path}: {len(bad):,} of {len(mesh.vertices):,} vertices are not finite, "
            f"the first {mesh.vertices[bad[0]].tolist()}; export the mesh again"
        )
    _check_area(path, mesh)

    if max_triangles is None or len(mesh.faces) <= max_triangles:
        return mesh
    if mesh.textures is not None:
        warnings.warn(
            f"{path}: {len(mesh.faces):,} triangles; a textured mesh is not simplified, so drawing "
            f"it is slow; export it with at most {max_triangles:,}",
            stacklevel=2,
        )
        return mesh

    simple = _simplify(mesh, max_triangles)
    warnings.warn(
        f"{path}: {len(mesh.faces):,} triangles, simplified to {len(simple.faces):,} for drawing; "
        "max_triangles=None keeps them all",
        stacklevel=2,
    )
    return simple


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """The triangles of one material in one place, as a file has them."""

    name: str
    colour: np.ndarray  # (3,) sRGB in [0, 1]
    texture: np.ndarray | None  # (h, w, 3) uint8
    vertices: np.ndarray  # (V, 3) model units
    faces: np.ndarray  # (F, 3)
    coordinates: np.ndarray | None  # (V, 2) texture coordinates


class _FolderResolver(trimesh.resolvers.FilePathResolver):
    """Reads the files that a mesh names from the mesh's folder, and remembers what went wrong.

    A path that leads elsewhere, such as an absolute one from another computer, is replaced by the
    file of the same name in the folder. trimesh continues silently without a file that it could
    not read, so `_check_names` looks here afterwards.
    """

    def __init__(self, path):
        super().__init__(str(path))
        self.files = {}  # name: content, of files that exist in memory only
        self.outside = []
        self.missing = []
        self.damaged = []

    def get(self, name):
        if name in self.files:
            return self.files[name]
        try:
            content = super().get(name.replace("\\", "/"))
        except FileNotFoundError:
            self.missing.append(name)
            raise
        except ValueError:
            self.outside.append(name)
            raise

        if name.lower().endswith(PICTURES) and not _is_picture(content):
            self.damaged.append(name)
        return content


def _is_picture(content):
    try:
        Image.open(io.BytesIO(content)).load()
    except (OSError, SyntaxError):  # as Pillow says that a picture is damaged
        return False
    return True


def _read_parts(path):
    """The parts of a mesh file as a list of `_Part`, each index in range."""
    suffix = path.suffix.lower()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such mesh; data/make_xwing.py writes the supplied one")
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: '{suffix}' files are not read; export the mesh as {', '.join(SUFFIXES)}"
        )

    content = path.read_bytes()
    resolver = _FolderResolver(path)
    try:
        if suffix == ".obj":
            parts = _read_obj(content, resolver)
        else:
            parts = _read_scene(content, suffix[1:], resolver)
    except Exception as error:
        _check_names(path, resolver)
        raise ValueError(
            f"{path}: not a readable {suffix[1:].upper()} mesh, it may be damaged ({error}); "
            "export it again"
        ) from error

    _check_names(path, resolver)
    if not parts:
        raise ValueError(f"{path}: no faces found; it may be damaged, or hold points only")
    return parts


def _check_names(path, resolver):
    """Refuse a mesh that names a damaged file or one outside its folder; warn of a missing one."""
    if resolver.outside:
        raise ValueError(
            f"{path}: '{resolver.outside[0]}' is not in the mesh's folder; "
            "put that file beside the mesh and name it without a folder"
        )
    if resolver.damaged:
        raise ValueError(f"{path}: its texture '{resolver.damaged[0]}' is damaged; export it again")
    for name in dict.fromkeys(resolver.missing):
        warnings.warn(f"{path}: there is no '{name}', so its colours are missing", stacklevel=4)


def _read_obj(content, resolver):
    """The parts of a Wavefront OBJ file, in the order in which it first uses their materials.

    trimesh reads one material library only, drops the names of materials that the library does not
    define, and misreads faces whose corners are of different kinds. So we give it a tidy text with
    triangles only, and one library that defines every material.
    """
    lines = _tidy(content)
    names = _values(lines, "usemtl")
    library = [f"newmtl {name}" for name in names]  # without a colour where no library says one
    for name in _values(lines, "mtllib"):
        try:
            found = _tidy(resolver.get(name))
            library += [line for line in found if line.startswith(("newmtl ", "Kd ", "map_Kd "))]
        except (FileNotFoundError, ValueError):
            pass  # `_check_names` says so
    _check_colours(library)
    resolver.files["all libraries"] = "\n".join(library)

    text = "\n".join(["mtllib all libraries", *_with_plain_faces(lines)])
    parts = _read_scene(text.encode(), "obj", resolver)
    return sorted(parts, key=lambda part: names.index(part.name) if part.name in names else -1)


def _tidy(content):
    """The lines of an OBJ or MTL file without comments and with single spaces between words."""
    text = content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    lines = text.replace("\\\n", " ").splitlines()
    return [" ".join(line.partition("#")[0].split()) for line in lines]


def _values(lines, word):
    """What follows a word at the start of lines, each once."""
    return list(
        dict.fromkeys(line.partition(" ")[2] for line in lines if line.startswith(f"{word} "))
    )


def _with_plain_faces(lines):
    """The lines of an OBJ file with triangles only, whose indices count from the first vertex."""
    plain = []
    vertices = coordinates = 0  # so far: negative indices count back from here
    for line in lines:
        word = line.partition(" ")[0]
        vertices += word == "v"
        coordinates += word == "vt"
        if word == "f":
            corners = _plain_corners(line, vertices, coordinates)
            fan = zip(corners[1:], corners[2:])
            plain += [f"f {corners[0]} {second} {third}" for second, third in fan]
        elif word != "mtllib":
            plain.append(line)
    return plain


def _plain_corners(line, vertices, coordinates):
    """The corners of a face as words: each "vertex/coordinates", or each "vertex"; no normals."""
    corners = [corner.split("/") for corner in line.split()[1:]]
    if len(corners) < 3:
        raise ValueError(f"fewer than three corners in '{line}'")

    words = [_from_first(corner[0], vertices, line) for corner in corners]
    if all(len(corner) > 1 and corner[1] for corner in corners):
        seconds = [_from_first(corner[1], coordinates, line) for corner in corners]
        words = [f"{first}/{second}" for first, second in zip(words, seconds)]
    return words


def _from_first(index, count, line):
    """An index that counts from 1; a negative one counts back from the last of `count`."""
    number = int(index)
    if number < 0:
        number += count + 1
    if number < 1:
        raise ValueError(f"index {index} in '{line}', where the first is 1 and {count} are above")
    return number


def _check_colours(library):
    """ValueError where a colour of tidy MTL lines cannot be read: trimesh takes grey instead."""
    for text in _values(library, "Kd"):
        try:
            numbers = [float(number) for number in text.split()]
        except ValueError:
            numbers = []
        if len(numbers) != 3 or not np.isfinite(numbers).all():
            raise ValueError(f"expected three finite numbers, got 'Kd {text}'")


def _read_scene(content, kind, resolver):
    """The parts of a file's content (bytes), as trimesh reads them without merging vertices."""
    if kind == "off":
        _check_counts(content)

    stream = trimesh.util.wrap_as_stream(content)
    scene = trimesh.load_scene(stream, file_type=kind, resolver=resolver, process=False)

    parts = []
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        geometry = scene.geometry[name]
        if len(getattr(geometry, "faces", ())) > 0:  # points and lines have none
            parts.append(_part(geometry, transform, linear=kind == "glb"))
    return parts


def _check_counts(content):
    """ValueError where an OFF file ends early; trimesh would take the faces that are left."""
    text = re.sub("#.*", "", content.decode("utf-8", errors="replace"))
    lines = [line for line in text.partition("OFF")[2].splitlines() if line.strip()]
    vertices, faces = (int(number) for number in lines[0].split()[:2])
    if len(lines) - 1 < vertices + faces:
        raise ValueError(f"{vertices} vertices and {faces} faces announced, {len(lines) - 1} found")


def _part(geometry, transform, linear):
    """One geometry of a scene as a `_Part` in its place; linear: its colours are not sRGB yet."""
    faces = np.asarray(geometry.faces)
    count = len(geometry.vertices)
    if faces.min() < 0 or faces.max() >= count:
        wrong = faces[(faces < 0) | (faces >= count)][0]
        raise ValueError(f"a face names vertex {wrong}, counted from 0, of {count:,}")

    vertices = np.asarray(geometry.vertices, float)
    if not np.array_equal(transform, np.eye(4)):
        vertices = vertices @ transform[:3, :3].T + transform[:3, 3]
    if np.linalg.det(transform[:3, :3]) < 0:  # a mirrored part is wound the other way round
        faces = faces[:, ::-1]

    material = getattr(geometry.visual, "material", None)
    texture = _texture(material)
    colour = _colour(geometry.visual, material, texture, linear)
    coordinates = getattr(geometry.visual, "uv", None)
    if coordinates is None:
        texture = None  # there is no saying where it belongs
    name = "default" if material is None else material.name
    return _Part(name, colour, texture, vertices, faces, coordinates)


def _texture(material):
    """The picture (h, w, 3) uint8 of a trimesh material, or None."""
    image = getattr(material, "image", None)  # of an OBJ's or PLY's
    if image is None:
        image = getattr(material, "baseColorTexture", None)  # of a GLB's
    return None if image is None else np.asarray(image.convert("RGB"))


def _colour(visual, material, texture, linear):
    """The colour (3,) sRGB of a geometry: see `load_mesh`. trimesh rounds most to 8 bits."""
    if texture is not None:
        return texture.mean((0, 1)) / 255
    if material is None and visual.kind is None:
        return np.array(GREY)

    if material is None:
        colour = visual.face_colors[:, :3].mean(0) / 255
    elif "kd" in getattr(material, "kwargs", {}):
        return np.array(material.kwargs["kd"])  # of an OBJ's, not rounded
    elif getattr(material, "baseColorFactor", None) is not None:
        colour = material.baseColorFactor[:3] / 255
    else:
        return np.array(GREY)
    return _linear_to_srgb(colour) if linear else colour


def _linear_to_srgb(light):
    """Convert linear light in [0, 1], which GLB files hold (glTF 2.0, section 3.9.2), to sRGB.

    Source: IEC 61966-2-1.
    """
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def _merge(parts):
    """One `Mesh` of several `_Part`, grouped by material."""
    materials = {}  # what tells materials apart: name, colour and texture
    rows = []
    for part in parts:
        picture = None if part.texture is None else part.texture.tobytes()
        key = part.name, tuple(part.colour), picture
        rows.append(materials.setdefault(key, len(materials)))

    names = []
    for name, _, _ in materials:
        names.append(trimesh.util.unique_name(name, names))
    firsts = [parts[rows.index(row)] for row in range(len(materials))]

    starts = np.cumsum([0] + [len(part.vertices) for part in parts])
    faces = np.concatenate([part.faces + start for part, start in zip(parts, starts)])
    face_materials = np.repeat(rows, [len(part.faces) for part in parts])
    order = np.argsort(face_materials, kind="stable")

    coordinates = textures = None
    if any(part.texture is not None for part in parts):
        textures = [part.texture for part in firsts]
        coordinates = np.concatenate([_corner_coordinates(part) for part in parts])[order]
    return Mesh(
        names,
        np.array([part.colour for part in firsts]),
        np.concatenate([part.vertices for part in parts]),
        faces[order],
        face_materials[order],
        coordinates,
        textures,
    )


def _corner_coordinates(part):
    """(F, 3, 2) texture coordinates of the corners of a part's faces; zeros where it has none."""
    if part.coordinates is None:
        return np.zeros((len(part.faces), 3, 2))
    return np.asarray(part.coordinates, float)[part.faces]


def _check_area(path, mesh):
    """Refuse a mesh of fewer than two triangles that have an area; warn where many have none."""
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


def _has_area(triangles):
    """(F,) bool: whether the corners of triangles (F, 3, 3) do not lie on one line."""
    edges = triangles - np.roll(triangles, 1, axis=1)
    longest = np.square(edges).sum(2).max(1)
    return np.linalg.norm(triangle_normals(triangles), axis=1) > NO_AREA * longest


# ---------------------------------------------------------------- simplifying


def _simplify(mesh, count):
    """A `Mesh` without textures in at most `count` triangles, where that is possible.

    Each material is simplified alone, so it keeps its colour. Its border stays as it is, so it
    still fits its neighbours. Only where this leaves too many triangles may the borders move: loose
    triangles have nothing but borders. Lengths are in diameters meanwhile, because the library's
    thresholds are absolute.
    """
    vertices = mesh.vertices / mesh.diameter
    shown = _has_area(mesh.triangles)
    groups = [mesh.faces[shown & (mesh.face_materials == row)] for row in range(len(mesh.names))]
    limit = _fair_limit([len(group) for group in groups], count)

    for keep_border in (True, False):
        pieces = [_simplify_faces(vertices, group, limit, keep_border) for group in groups]
        counts = [len(faces) for _, faces in pieces]
        if sum(counts) <= count:
            break

    starts = np.cumsum([0] + [len(points) for points, _ in pieces])
    return Mesh(
        mesh.names,
        mesh.colours,
        np.concatenate([points for points, _ in pieces]) * mesh.diameter,
        np.concatenate([faces + start for (_, faces), start in zip(pieces, starts)]),
        np.repeat(np.arange(len(pieces)), counts),
    )


def _fair_limit(counts, total):
    """The largest limit for each of some counts with which their sum is at most `total`."""
    left = total
    counts = sorted(counts)
    for place, count in enumerate(counts):
        fair = left // (len(counts) - place)
        if count > fair:
            return fair
        left -= count
    return total


def _simplify_faces(vertices, faces, limit, keep_border):
    """(vertices, faces) of some faces alone, in at most `limit` triangles if that is possible."""
    used, rows = np.unique(faces, return_inverse=True)
    faces = rows.reshape(-1, 3)
    if len(faces) <= limit:
        return vertices[used], faces

    part = trimesh.Trimesh(vertices[used], faces, process=False)
    part.merge_vertices()  # corners in the same place become neighbours
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
    ids = np.concatenate([kept, [i for i, _ in pieces]]).astype(np.float32)
    corners = np.concatenate([corners[kept], *(piece[None] for _, piece in pieces)])
    picture, depth = draw_triangles(corners, ids[:, None], K, width, height)
    return picture[..., 0].astype(np.int32), depth


def _beyond_near(triangle, near):
    """A list of triangles: the part of a triangle (3, 3), camera frame, beyond the near plane.

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

    The outer sides look so only where the mesh is wound that way. Some meshes, such as the X-wing,
    are not: see `visibility`.

    Args:
        triangles: (F, 3, 3) corners in model units.
        pose: (4, 4) model -> OpenCV camera.
    """
    eye = -pose[:3, :3].T @ pose[:3, 3]
    return ((eye - triangles[:, 0]) * triangle_normals(triangles)).sum(1) > 0


def largest_triangles(triangles: np.ndarray, fraction: float = 0.9) -> np.ndarray:
    """Rows of the largest of triangles (F, 3, 3) that have this fraction of the whole surface."""
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
    areas = triangle_normals(triangles) / 2  # normals as long as the triangles are large
    largest = np.zeros((len(triangles), 2))
    seen = np.zeros((len(triangles), 2))
    facing = np.zeros((len(triangles), 2))

    for direction in xu.fibonacci_sphere(views):
        pose, K = _far_camera(triangles, direction, size, diameter)
        ids, _ = rasterise(triangles, pose, K, size, size, NEAR * diameter)
        pixel = (pose[2, 3] / K[0, 0]) ** 2  # square model units
        area = np.bincount(ids[ids >= 0], minlength=len(triangles)) * pixel

        projected = areas @ direction
        side = (projected < 0).astype(int)
        largest[rows, side] = np.maximum(largest[rows, side], area)
        seen[rows, side] += area
        facing[rows, side] += np.abs(projected)

    # OpenCV draws a triangle without area where the centre of a pixel is on its line.
    largest[~_has_area(triangles)] = 0
    openness = np.divide(seen, facing, out=np.zeros_like(seen), where=facing > 0)
    return largest, np.where(largest > 0, openness, 0).clip(0, 1)


def _far_camera(triangles, direction, size, diameter):
    """(pose, K) of a camera far away in a direction (3,); the mesh fills its `size` pixels."""
    reach = 1.05 * np.linalg.norm(triangles, axis=-1).max()
    distance = FAR * diameter
    pose = np.eye(4)
    pose[:3, :3] = Rotation.align_vectors([0, 0, -1], direction)[0].as_matrix()
    pose[2, 3] = distance
    focal = distance * size / 2 / reach
    return pose, np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])


def sunlit(
    triangles: np.ndarray,
    points: np.ndarray,
    sun: np.ndarray,
    size: int = 256,
    bias: float = 0.0085140,
    diameter: float | None = None,
) -> np.ndarray:
    """Which points on a mesh a far sun shines on, that is, which no other part shadows.

    Args:
        triangles: (F, 3, 3) model units.
        points: (P, 3) on their surface, model units.
        sun: (3,) unit vector towards the sun, in model axes.
        size: Pixels, of the picture of the mesh as the sun sees it.
        bias: How far a point may lie behind what the sun sees, as a fraction of the diameter, so
            that rounding shadows nothing.
        diameter: Of the whole mesh, model units. None takes the diagonal of the triangles' bounding
            box. Pass it where the triangles are only some of the mesh's, or for speed.
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
