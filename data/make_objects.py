"""Write the meshes of `data/objects/`: five objects that are unlike the X-wing.

The carton is a textured box, and `carton_grey.obj` is the same box without its print: what somebody
has who measured a box. The figure is smooth, has one colour and no symmetry. The can has a printed
label on a shape of revolution. The bolt looks the same after each sixth of a turn about its axis;
`bolt_target.json` says so. The toy is made of plain parts in several colours.

Lengths are in millimetres (carton, can, bolt) or in metres (figure, toy), because the units of a
mesh must not matter. `python data/make_objects.py` writes all files again.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import trimesh
from skimage.measure import marching_cubes

OBJECTS = Path(__file__).resolve().parent / "objects"
INK = (40, 36, 34)  # sRGB, of text


class Builder:
    """Collects the faces of an OBJ file by material."""

    def __init__(self, colours: dict, pictures: dict | None = None):
        """Begin a mesh.

        Args:
            colours: {material: sRGB colour (3,) in [0, 1]}.
            pictures: {material: texture (h, w, 3) uint8}, of those that have one.
        """
        self.colours = colours
        self.pictures = pictures or {}
        self.parts = []  # (material, vertices (V, 3), faces (F, 3), texture coordinates (V, 2))

    def add(self, material: str, vertices, faces, coordinates=None):
        """Add triangles (F, 3) of vertices (V, 3), with texture coordinates (V, 2) if any."""
        self.parts.append((material, np.asarray(vertices), np.asarray(faces), coordinates))

    def solid(self, material: str, mesh: trimesh.Trimesh):
        """Add a mesh of one material."""
        self.add(material, mesh.vertices, mesh.faces)

    def box(self, material: str, low, high):
        """Add a box with edges along the axes, given by two opposite corners (3,)."""
        self.solid(material, trimesh.creation.box(bounds=[low, high]))

    def lathe(self, material: str, profile, turn=None, sections: int = 36):
        """Revolve (radius, z) pairs, from below, about z; `turn` (4, 4) moves the result."""
        mesh = trimesh.creation.revolve(np.asarray(profile, float), sections=sections)
        self.solid(material, mesh if turn is None else mesh.apply_transform(turn))

    def write(self, name: str, folder: Path = OBJECTS):
        """Write NAME.obj, NAME.mtl and the textures."""
        lines = [f"# written by make_objects.py\nmtllib {name}.mtl"]
        vertex = 1  # OBJ files count from 1
        coordinate = 1
        for material, vertices, faces, coordinates in self.parts:
            lines.append(f"usemtl {material}")
            lines += ["v {:.6g} {:.6g} {:.6g}".format(*row) for row in vertices]
            if coordinates is None:
                lines += ["f {} {} {}".format(*row) for row in faces + vertex]
            else:
                lines += ["vt {:.5f} {:.5f}".format(*row) for row in coordinates]
                pairs = np.stack([faces + vertex, faces + coordinate], -1).reshape(-1, 6)
                lines += ["f {}/{} {}/{} {}/{}".format(*row) for row in pairs]
                coordinate += len(coordinates)
            vertex += len(vertices)

        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.obj").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._write_materials(name, folder)

    def _write_materials(self, name, folder):
        texts = []
        for material, colour in self.colours.items():
            text = "newmtl {}\nKd {:.4f} {:.4f} {:.4f}\n".format(material, *colour)
            if material in self.pictures:
                picture = self.pictures[material]
                cv2.imwrite(str(folder / f"{name}.png"), picture[..., ::-1])
                text += f"map_Kd {name}.png\n"
            texts.append(text)
        (folder / f"{name}.mtl").write_text("\n".join(texts), encoding="utf-8")


# ---------------------------------------------------------------- print


def words(picture: np.ndarray, text: str, corner, height: int, colour=INK, weight: int = 1):
    """Print a line of text whose lower left corner is at `corner` (x, y), `height` pixels high."""
    font = cv2.FONT_HERSHEY_DUPLEX
    cv2.putText(picture, text, corner, font, height / 22, colour, weight, cv2.LINE_AA)


def small_print(picture: np.ndarray, rng: np.random.Generator, low, high, step: int = 9):
    """Fill a rectangle with rows of strokes as long as words; low, high: its corners (x, y)."""
    for y in range(low[1] + step, high[1], step):
        x = low[0]
        while x < high[0] - 12:
            end = min(x + int(rng.integers(6, 34)), high[0])
            cv2.line(picture, (x, y), (end, y), INK, 3, cv2.LINE_AA)
            x = end + 7


def bar_code(picture: np.ndarray, rng: np.random.Generator, low, high):
    """Draw a white rectangle with black bars; low, high: its corners (x, y)."""
    cv2.rectangle(picture, low, high, (250, 250, 250), -1)
    x = low[0] + 5
    while x < high[0] - 8:
        width = int(rng.integers(1, 5))
        cv2.rectangle(picture, (x, low[1] + 5), (x + width, high[1] - 5), (15, 15, 15), -1)
        x += width + int(rng.integers(2, 6))


# ---------------------------------------------------------------- carton

CARTON = 170, 110, 60  # mm along x, y, z
SCALE = 2.4  # pixels of the print a millimetre


def carton(printed: bool = True) -> Builder:
    """A box of tea; without its print it is grey."""
    width, height, depth = CARTON
    sheet = np.array([2 * width + 2 * depth, 2 * depth + height])
    material = "print" if printed else "card"
    pictures = {"print": carton_print()} if printed else {}
    mesh = Builder({material: (0.62, 0.6, 0.56)}, pictures)
    for corner, right, down, place in _sides():
        start = np.array(corner) * CARTON / 2
        vertices = [start, start + down, start + down + right, start + right]
        size = np.array([abs(right).max(), abs(down).max()])
        on_sheet = place + size * [(0, 0), (0, 1), (1, 1), (1, 0)]
        coordinates = np.array([0, 1]) + [1, -1] * (on_sheet / sheet)
        mesh.add(material, vertices, [(0, 1, 2), (0, 2, 3)], coordinates if printed else None)
    return mesh


def _sides():
    """The six sides of the carton.

    Of each: the corner where its print begins, in half-sizes; the edges (3,) along which its print
    runs to the right and down; and where it lies on the unfolded box, millimetres from the upper
    left.
    """
    width, height, depth = CARTON
    x, y, z = np.diag(CARTON).astype(float)
    return [
        ((-1, 1, 1), x, -y, (0, depth)),  # front
        ((1, 1, 1), -z, -y, (width, depth)),  # right
        ((1, 1, -1), -x, -y, (width + depth, depth)),  # back
        ((-1, 1, -1), z, -y, (2 * width + depth, depth)),  # left
        ((-1, 1, -1), x, z, (0, 0)),  # top
        ((-1, -1, 1), x, -z, (0, depth + height)),  # bottom
    ]


def carton_print() -> np.ndarray:
    """Draw the unfolded box: (552, 1104, 3) uint8 sRGB."""
    rng = np.random.default_rng(27)
    width, height, depth = (round(side * SCALE) for side in CARTON)
    sheet = np.full((height + 2 * depth, 2 * (width + depth), 3), (214, 200, 168), np.uint8)

    _front(sheet[depth : depth + height, :width])
    _ingredients(sheet[depth : depth + height, width : width + depth], rng)
    _back(sheet[depth : depth + height, width + depth : 2 * width + depth], rng)
    _stripes(sheet[depth : depth + height, 2 * width + depth :])
    _lid(sheet[:depth, :width])
    _bottom(sheet[depth + height :, :width], rng)
    return sheet


def _front(panel):
    panel[:] = (32, 92, 74)
    cv2.circle(panel, (292, 128), 96, (226, 178, 62), -1, cv2.LINE_AA)
    for angle in range(0, 360, 45):  # leaves around a cup
        cv2.ellipse(panel, (292, 128), (88, 20), angle, 0, 60, (120, 158, 66), -1, cv2.LINE_AA)
    cv2.ellipse(panel, (288, 140), (50, 36), 0, 0, 180, (244, 240, 230), -1, cv2.LINE_AA)
    cv2.ellipse(panel, (288, 140), (50, 12), 0, 0, 360, (150, 70, 30), -1, cv2.LINE_AA)
    cv2.circle(panel, (344, 152), 14, (244, 240, 230), 6, cv2.LINE_AA)
    words(panel, "MERIDIAN", (18, 58), 34, (244, 236, 214), 3)
    words(panel, "black tea", (20, 98), 24, (226, 178, 62), 2)
    words(panel, "No. 27", (20, 150), 30, (244, 236, 214), 2)
    cv2.rectangle(panel, (0, 212), (panel.shape[1], 238), (178, 44, 36), -1)
    words(panel, "40 bags   80 g", (22, 233), 18, (250, 244, 230), 1)


def _back(panel, rng):
    panel[:] = (232, 224, 204)
    words(panel, "How to brew", (20, 40), 24, (32, 92, 74), 2)
    small_print(panel, rng, (20, 52), (220, 190))
    for row, (colour, share) in enumerate(
        [((178, 44, 36), 0.9), ((226, 178, 62), 0.6), ((60, 92, 150), 0.75), ((32, 92, 74), 0.4)]
    ):
        top = 62 + 32 * row
        cv2.rectangle(panel, (244, top), (244 + int(140 * share), top + 20), colour, -1)
    bar_code(panel, rng, (20, 204), (170, 252))
    words(panel, "27-0412", (250, 240), 20)


def _ingredients(panel, rng):
    panel[:] = (178, 44, 36)
    cv2.rectangle(panel, (10, 14), (134, 250), (238, 230, 212), -1)
    words(panel, "TEA", (24, 56), 32, (178, 44, 36), 2)
    small_print(panel, rng, (22, 66), (124, 236))


def _stripes(panel):
    panel[:] = (32, 92, 74)
    for start in range(-264, 150, 44):
        corners = [(start, 264), (start + 22, 264), (start + 286, 0), (start + 264, 0)]
        cv2.fillPoly(panel, [np.array(corners)], (226, 178, 62), cv2.LINE_AA)
    cv2.circle(panel, (72, 96), 44, (244, 236, 214), -1, cv2.LINE_AA)
    words(panel, "M", (52, 116), 46, (178, 44, 36), 4)


def _lid(panel):
    panel[:] = (46, 110, 90)
    words(panel, "open here", (26, 58), 26, (244, 236, 214), 2)
    cv2.arrowedLine(panel, (230, 48), (370, 48), (226, 178, 62), 10, cv2.LINE_AA, tipLength=0.3)
    cv2.rectangle(panel, (20, 96), (390, 122), (178, 44, 36), -1)


def _bottom(panel, rng):
    panel[:] = (206, 190, 158)
    small_print(panel, rng, (20, 20), (250, 120))
    cv2.circle(panel, (330, 72), 44, (60, 92, 150), 8, cv2.LINE_AA)


# ---------------------------------------------------------------- figure

# Balls and rods of the figure, metres; z is up and it looks along x. Each row: two ends and the
# radii there. Nothing is repeated on the other side.
LIMBS = [
    ((0.0, 0.0, 0.075), (0.008, 0.004, 0.15), 0.062, 0.05),  # body
    ((0.02, -0.006, 0.225), (0.045, -0.012, 0.23), 0.052, 0.044),  # head
    ((0.08, -0.02, 0.215), (0.1, -0.026, 0.205), 0.024, 0.018),  # snout
    ((0.0, 0.036, 0.262), (-0.03, 0.07, 0.325), 0.021, 0.012),  # an ear that stands
    ((0.0, -0.045, 0.258), (-0.02, -0.1, 0.25), 0.02, 0.014),  # an ear that hangs
    ((0.01, 0.05, 0.15), (0.05, 0.105, 0.2), 0.022, 0.019),  # an arm that is raised
    ((0.05, 0.105, 0.2), (0.062, 0.11, 0.225), 0.026, 0.022),  # its hand
    ((0.02, -0.05, 0.14), (0.08, -0.062, 0.1), 0.022, 0.024),  # the other arm
    ((0.02, 0.038, 0.04), (0.075, 0.05, 0.0), 0.036, 0.03),  # legs
    ((0.01, -0.04, 0.04), (0.03, -0.055, 0.0), 0.036, 0.034),
    ((-0.045, 0.012, 0.05), (-0.105, 0.045, 0.045), 0.022, 0.018),  # tail
    ((-0.105, 0.045, 0.045), (-0.125, 0.055, 0.1), 0.018, 0.012),
]
BLEND = 0.016  # metres over which neighbouring limbs melt together
CELL = 0.0088  # metres, of the grid on which the surface is found
FLOOR = -0.024  # metres: the feet are cut flat here


def figure() -> Builder:
    """A toy animal in one colour."""
    low = np.array([-0.16, -0.14, -0.04])
    high = np.array([0.14, 0.15, 0.36])
    axes = [np.arange(a, b, CELL) for a, b in zip(low, high)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    distance = _figure_distance(points)
    vertices, faces, _, _ = marching_cubes(distance, 0.0, spacing=(CELL,) * 3)

    mesh = trimesh.Trimesh(vertices + low, faces[:, ::-1])
    trimesh.smoothing.filter_taubin(mesh, iterations=4)
    trimesh.repair.fix_normals(mesh)
    result = Builder({"clay": (0.85, 0.66, 0.46)})
    result.solid("clay", mesh)
    return result


def _figure_distance(points):
    """About the signed distance (...) of points (..., 3) to the surface; negative inside.

    Source: Inigo Quilez, Smooth minimum (the exponential one), 2013.
    """
    near = 0.0
    for first, second, radius, end_radius in LIMBS:
        first, second = np.array(first), np.array(second)
        along = (points - first) @ (second - first) / np.sum((second - first) ** 2)
        along = along.clip(0, 1)
        centre = first + along[..., None] * (second - first)
        distance = np.linalg.norm(points - centre, axis=-1) - radius
        distance -= along * (end_radius - radius)
        near = near + np.exp(-distance / (BLEND / 2))
    melted = -np.log(near) * BLEND / 2
    return np.maximum(melted, FLOOR - points[..., 2])


# ---------------------------------------------------------------- can

CAN_RADIUS = 33.0  # mm
CAN_SECTIONS = 72  # around its axis
CAN_LABEL = 12.0, 104.0  # mm along z, of the printed wall


def can() -> Builder:
    """A can of 0.33 l: a printed wall, bare metal above and below, and an opener."""
    mesh = Builder({"label": (0.5, 0.5, 0.5), "metal": (0.78, 0.78, 0.8)}, {"label": can_print()})
    mesh.add("label", *_wall(CAN_SECTIONS))
    foot = [(0, 7), (20, 6), (23, 0), (26, 0), (30, 6), (33, 12)]
    neck = [(33, 104), (30, 111), (27, 115), (27.5, 117), (26, 117), (25, 113), (0, 113)]
    mesh.lathe("metal", foot, sections=CAN_SECTIONS)
    mesh.lathe("metal", neck, sections=CAN_SECTIONS)
    mesh.box("metal", (-4, -6, 113), (16, 6, 114.5))
    return mesh


def _wall(sections):
    """Vertices, faces and texture coordinates of the printed wall; the print goes once around."""
    across = np.linspace(0, 1, sections + 1)
    ring = np.stack([np.cos(2 * np.pi * across), np.sin(2 * np.pi * across)], 1) * CAN_RADIUS
    vertices = [np.column_stack([ring, np.full(sections + 1, z)]) for z in CAN_LABEL]
    coordinates = [np.column_stack([across, np.full(sections + 1, v)]) for v in (0, 1)]

    lower = np.arange(sections)
    upper = lower + sections + 1
    faces = [np.stack([lower, lower + 1, upper + 1], 1), np.stack([lower, upper + 1, upper], 1)]
    return np.concatenate(vertices), np.concatenate(faces), np.concatenate(coordinates)


def can_print() -> np.ndarray:
    """Draw the label, once around the can: (360, 808, 3) uint8 sRGB."""
    rng = np.random.default_rng(28)
    label = np.full((360, 808, 3), (30, 66, 140), np.uint8)
    x = np.arange(808)
    wave = (250 + 34 * np.sin(x / 808 * 2 * np.pi * 2)).astype(int)
    rows = np.arange(360)[:, None]
    label[rows > wave] = (226, 230, 236)
    label[abs(rows - wave) < 8] = (220, 60, 40)
    words(label, "POLAR", (60, 120), 66, (244, 244, 246), 6)
    words(label, "cola", (86, 190), 48, (240, 190, 60), 4)
    cv2.circle(label, (410, 110), 62, (240, 190, 60), -1, cv2.LINE_AA)
    for angle in np.arange(0, 2 * np.pi, np.pi / 6):
        direction = np.array([np.cos(angle), np.sin(angle)])
        first, second = ((410, 110) + reach * direction for reach in (70, 92))
        ends = first.astype(int).tolist(), second.astype(int).tolist()
        cv2.line(label, *ends, (240, 190, 60), 8, cv2.LINE_AA)
    small_print(label, rng, (540, 30), (700, 60), 10)
    cv2.rectangle(label, (530, 70), (720, 210), (226, 230, 236), -1)
    small_print(label, rng, (540, 74), (710, 200), 10)
    bar_code(label, rng, (560, 296), (690, 346))
    words(label, "330 ml", (100, 340), 30, (30, 66, 140), 2)
    return label


# ---------------------------------------------------------------- bolt


def bolt() -> Builder:
    """A bolt with a hexagonal head, along z; it has grooves, because a thread is not symmetric."""
    mesh = Builder({"steel": (0.56, 0.57, 0.6)})
    head = [(0, 12), (23, 12), (23, 28), (20, 30), (0, 30)]
    mesh.lathe("steel", head, sections=6)
    mesh.lathe("steel", [(0, 7), (27, 7), (29, 8.5), (29, 12), (0, 12)], sections=48)

    shaft = [(11, 7), (11, -12)]
    for z in np.arange(-14, -62, -6.0):
        shaft += [(11, z), (8.8, z - 1.5), (8.8, z - 3), (11, z - 4.5)]
    shaft += [(11, -64), (7.5, -69), (0, -69)]
    mesh.lathe("steel", shaft[::-1], sections=48)
    return mesh


def bolt_target() -> dict:
    """What the bolt's JSON file says: the turns after which it is the same."""
    turns = [
        trimesh.transformations.rotation_matrix(k * np.pi / 3, (0, 0, 1)).round(12).tolist()
        for k in range(6)
    ]
    return {"name": "bolt", "mesh": "bolt.obj", "unit": 0.001, "symmetries": turns}


# ---------------------------------------------------------------- toy


def toy() -> Builder:
    """A locomotive of coloured bricks, along x, in metres; its left and right side differ."""
    mesh = Builder(
        {
            "red": (0.76, 0.14, 0.12),
            "blue": (0.14, 0.3, 0.66),
            "yellow": (0.92, 0.74, 0.16),
            "black": (0.09, 0.09, 0.1),
            "green": (0.16, 0.5, 0.24),
            "white": (0.88, 0.87, 0.84),
        }
    )
    mesh.box("black", (-0.1, -0.036, 0.016), (0.1, 0.036, 0.03))
    mesh.lathe("green", _tube(0.032, 0, 0.11), _lying(-0.02, 0.066, "x"))
    mesh.lathe("yellow", _tube(0.0335, 0, 0.008), _lying(0.066, 0.066, "x"))
    mesh.lathe("black", _tube(0.026, 0, 0.005), _lying(0.09, 0.066, "x"))
    chimney = [(0, 0.09), (0.011, 0.09), (0.011, 0.115), (0.018, 0.128), (0.018, 0.134), (0, 0.134)]
    mesh.lathe("red", chimney, trimesh.transformations.translation_matrix((0.062, 0, 0)))
    dome = trimesh.creation.icosphere(subdivisions=2, radius=0.017)
    mesh.solid("yellow", dome.apply_translation((0.015, 0, 0.098)))

    mesh.box("blue", (-0.094, -0.04, 0.03), (-0.022, 0.04, 0.1))
    for x in (-0.09, -0.034):
        for y in (-0.037, 0.027):
            mesh.box("white", (x, y, 0.1), (x + 0.01, y + 0.01, 0.128))
    mesh.box("red", (-0.104, -0.048, 0.128), (-0.012, 0.048, 0.137))
    mesh.box("yellow", (-0.078, 0.04, 0.05), (-0.05, 0.042, 0.085))  # a door on the left
    mesh.box("white", (-0.07, -0.043, 0.066), (-0.035, -0.04, 0.09))  # a window on the right
    mesh.lathe("white", _tube(0.008, -0.1, 0.06), _lying(0.04, 0.072, "x", -0.038))  # a pipe

    for x, radius in ((-0.06, 0.03), (0.015, 0.022), (0.068, 0.022)):
        for side in (-1, 1):
            wheel = _lying(x, radius, "y", side * 0.036, side)
            mesh.lathe("red", _tube(radius, 0, 0.012), wheel)
            mesh.lathe("white", _tube(radius * 0.35, 0.0, 0.015), wheel, sections=18)
    mesh.box("red", (0.1, -0.03, 0.012), (0.112, 0.03, 0.024))
    return mesh


def _tube(radius, start, end):
    """The profile of a closed cylinder."""
    return [(0, start), (radius, start), (radius, end), (0, end)]


def _lying(x, z, axis, y=0.0, side=1):
    """The motion (4, 4) that lays the axis z of a lathe along x or y, at (x, y, z)."""
    along = {"x": (0, 1, 0), "y": (-side, 0, 0)}[axis]
    turn = trimesh.transformations.rotation_matrix(np.pi / 2, along)
    turn[:3, 3] = x, y, z
    return turn


# ---------------------------------------------------------------- files


def write(folder: Path = OBJECTS):
    """Write all meshes, materials, textures and the bolt's target into `folder`."""
    carton().write("carton", folder)
    carton(printed=False).write("carton_grey", folder)
    figure().write("figure", folder)
    can().write("can", folder)
    bolt().write("bolt", folder)
    toy().write("toy", folder)
    text = json.dumps(bolt_target(), indent=1)
    (folder / "bolt_target.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
