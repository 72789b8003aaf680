"""Write `xwing.obj` and `xwing.mtl`: a procedural X-wing with its S-foils locked (wings closed).

The model frame has x across the wings, -y towards the nose and +z up; lengths are in the model
unit of the pose matrices. The mesh is a list of flat-shaded parts with one material each. The
corners of its bounding box are the first eight keypoints. `python data/make_xwing.py` writes both
files again.

A `Shape` moves and stretches the parts, because ships of other renderings differ in their
proportions. `python data/make_xwing.py FOLDER --wing-span 1.1 --s-foils 13` writes such a ship, and
its target in `xwing.json`. `--count 64` writes as many random ones, for training. A ship of another
shape has the same vertices in the same order, and its keypoints are the same points of the surface,
moved with their part; only the eight corners are those of its own box. The model frame does not
move: the pose of a ship of any shape is the pose of its hull. Left and right stay mirror images.
"""

import argparse
import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import trimesh

# Material name -> sRGB colour in [0, 1]. The underside is greyer and darker than the top, so that
# the two can be told apart. Left and right are mirror images, so a mirrored frame is valid too.
COLOURS = {
    "hull": (0.84, 0.81, 0.75),
    "belly": (0.50, 0.50, 0.51),
    "red": (0.74, 0.20, 0.11),
    "yellow": (0.84, 0.62, 0.20),
    "grey": (0.45, 0.46, 0.48),
    "metal": (0.34, 0.34, 0.36),
    "dark": (0.06, 0.06, 0.07),
    "canopy": (0.05, 0.06, 0.09),
    "droid": (0.28, 0.42, 0.70),
}


HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------- shape

WING_ROOT = 0.02  # x where a wing begins
WING_MIDDLE = 0.08  # y, between the front edge and the rear edge
ENGINE = np.array([0.042, 0.09, 0.0185])  # a point on the axis of the left upper engine
CANNON = np.array([0.149, 0.07, 0.010])  # a point on the axis of the left upper cannon
NOSE_END = -0.05  # y: what lies before it is the nose
NOSE_TIP = -0.182  # y
CANOPY_BASE = 0.0165  # z
MAX_S_FOILS = 13.0  # degrees


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a ship differs from the film's: factors on lengths, a shift and an angle."""

    wing_shift: float = 0.0  # model units by which wings, engines and cannons lie nearer the tail
    wing_span: float = 1.0  # from the root to the tip, with the cannons
    wing_chord: float = 1.0  # from the front edge to the rear edge
    cannon_length: float = 1.0
    cannon_radius: float = 1.0
    engine_length: float = 1.0
    engine_radius: float = 1.0
    nose_length: float = 1.0
    nose_width: float = 1.0  # and height, at the tip
    canopy: float = 1.0  # in all directions
    s_foils: float = 0.0  # degrees by which each wing is opened, with its engine and its cannon

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            low, high = LIMITS.get(name, FACTORS)
            if not low <= value <= high:
                raise ValueError(f"{name}: expected {low:g} to {high:g}, got {value:g}")


FACTORS = 0.25, 4.0  # limits of every factor
LIMITS = {"wing_shift": (-0.1, 0.1), "s_foils": (0.0, MAX_S_FOILS)}
FILM = Shape()  # the ship of data/xwing.obj
RANDOM = {  # argument of a Shape -> range of `random_shape`
    "wing_shift": (-0.02, 0.02),
    "wing_span": (0.85, 1.2),
    "wing_chord": (0.8, 1.25),
    "cannon_length": (0.85, 1.4),
    "cannon_radius": (0.5, 1.1),
    "engine_length": (0.8, 1.3),
    "engine_radius": (0.75, 1.3),
    "nose_length": (0.85, 1.2),
    "nose_width": (0.8, 1.4),
    "canopy": (0.8, 1.2),
    "s_foils": (0.0, MAX_S_FOILS),
}


def random_shape(rng: np.random.Generator) -> Shape:
    """Draw a shape; two in five have closed wings."""
    drawn = {name: rng.uniform(*limits) for name, limits in RANDOM.items()}
    if rng.random() < 0.4:
        drawn["s_foils"] = 0.0
    return Shape(**drawn)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the ship that moves as a whole."""

    name: str  # "hull", "canopy", "wing", "engine" or "cannon"
    side: int = 0  # -1 right, 1 left; 0 for parts in the middle
    level: int = 0  # -1 lower, 1 upper; 0 for parts in the middle


HULL = Part("hull")


def move_points(points: np.ndarray, part: Part, shape: Shape) -> np.ndarray:
    """Return where points (N, 3) of a part of the film's ship are on a ship of another shape."""
    points = np.array(points, float)
    if shape == FILM:  # without a rounding error
        return points
    if part.name == "hull":
        return _move_hull(points, shape)
    if part.name == "canopy":
        return _stretch(points, [0, 0, CANOPY_BASE], [shape.canopy] * 3)

    position = [part.side, 1, part.level]
    if part.name == "wing":
        factors = [shape.wing_span, shape.wing_chord, 1]
        points = _stretch(points, [part.side * WING_ROOT, WING_MIDDLE, 0], factors)
    elif part.name == "engine":
        factors = [shape.engine_radius, shape.engine_length, shape.engine_radius]
        points = _stretch(points, ENGINE * position, factors)
    else:
        factors = [shape.cannon_radius, shape.cannon_length, shape.cannon_radius]
        points = _stretch(points, CANNON * position, factors)
        points[:, 0] += part.side * (CANNON[0] - WING_ROOT) * (shape.wing_span - 1)
    points[:, 1] += shape.wing_shift
    return turn_vectors(points, part, shape)


def turn_vectors(vectors: np.ndarray, part: Part, shape: Shape) -> np.ndarray:
    """Return the directions (N, 3) on a part after its wing was opened, about the y axis."""
    angle = np.deg2rad(shape.s_foils) * part.side * part.level
    cosine, sine = np.cos(angle), np.sin(angle)
    return vectors @ np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])


def _move_hull(points, shape):
    """Stretch the nose forwards, and widen it towards its tip."""
    ahead = np.clip(NOSE_END - points[:, 1], 0, None)
    widening = 1 + (shape.nose_width - 1) * ahead / (NOSE_END - NOSE_TIP)
    points[:, 1] -= (shape.nose_length - 1) * ahead
    points[:, [0, 2]] *= widening[:, None]
    return points


def _stretch(points, centre, factors):
    """Multiply the distances of points (N, 3) from a centre (3,) by factors (3,)."""
    return centre + (points - centre) * factors


# ---------------------------------------------------------------- triangles


class ShipBuilder:
    """Collects triangles by material; all that is added belongs to the latest `part`."""

    def __init__(self, shape: Shape = FILM):
        self.shape = shape
        self.part = HULL
        self.parts = {name: [] for name in COLOURS}

    def add(self, material: str, mesh: trimesh.Trimesh):
        """Add a piece of one material, given as it is on the film's ship."""
        if self.shape != FILM:
            moved = move_points(mesh.vertices, self.part, self.shape)
            mesh = trimesh.Trimesh(moved, mesh.faces, process=False)
        self.parts[material].append(mesh)

    def quads(self, material: str, quads):
        """Add quads given as an (N, 4, 3) array of corner points in cyclic order."""
        quads = np.asarray(quads, float).reshape(-1, 4, 3)
        first_corners = 4 * np.arange(len(quads))[:, None]
        faces = np.concatenate([first_corners + [0, 1, 2], first_corners + [0, 2, 3]])
        self.add(material, trimesh.Trimesh(quads.reshape(-1, 3), faces, process=False))

    def strip(self, material: str, first, second):
        """Add the quads between two polylines, (N, 3) each."""
        corners = zip(first, first[1:], second[1:], second)
        self.quads(material, [list(quad) for quad in corners])

    def box(self, material: str, low, high):
        """Add a box with edges along the axes, given by two opposite corners (3,)."""
        self.add(material, trimesh.creation.box(bounds=[low, high]))

    def lathe(self, material: str, profile, x: float, z: float):
        """Revolve (radius, y) pairs about the axis through (x, z) that is parallel to y."""
        profile = np.asarray(profile, float)
        mesh = trimesh.creation.revolve(profile, sections=24)
        # trimesh revolves about z; turn that axis into y.
        points = mesh.vertices[:, [0, 2, 1]] * [1, 1, -1] + [x, 0, z]
        self.add(material, trimesh.Trimesh(points, mesh.faces, process=False))


# ---------------------------------------------------------------- fuselage

FUSELAGE_STATIONS = [  # y, half-width, half-height
    (-0.182, 0.005, 0.006),
    (-0.165, 0.0075, 0.0075),
    (-0.12, 0.011, 0.010),
    (-0.05, 0.017, 0.0145),
    (0.0, 0.021, 0.018),
    (0.05, 0.024, 0.0205),
    (0.10, 0.026, 0.022),
    (0.13, 0.026, 0.022),
]
# The outline of a section, counter-clockwise from the lower right, in units of the half-sizes.
FUSELAGE_OUTLINE = np.array(
    [
        (0.55, -1),
        (1, -0.5),
        (1, -0.18),
        (1, 0.22),
        (1, 0.5),
        (0.55, 1),
        (-0.55, 1),
        (-1, 0.5),
        (-1, 0.22),
        (-1, -0.18),
        (-1, -0.5),
        (-0.55, -1),
    ]
)


def fuselage(ship: ShipBuilder):
    """Add a chamfered box that widens from the nose, lofted through stations along y."""
    sides = len(FUSELAGE_OUTLINE)
    rings = []
    for y, half_width, half_height in FUSELAGE_STATIONS:
        x = FUSELAGE_OUTLINE[:, 0] * half_width
        z = FUSELAGE_OUTLINE[:, 1] * half_height
        rings.append(np.stack([x, np.full(sides, y), z], 1))

    for section, (front, back) in enumerate(zip(rings, rings[1:])):
        for side in range(sides):
            following = (side + 1) % sides
            quad = [front[side], front[following], back[following], back[side]]
            ship.quads(_fuselage_material(section, side), [quad])

    for ring, material in ((rings[0], "grey"), (rings[-1], "dark")):
        centre = ring.mean(0)
        cap = [[centre, ring[k], ring[(k + 1) % sides], centre] for k in range(sides)]
        ship.quads(material, cap)


def _fuselage_material(section, side):
    """The material of one side of the outline between two stations."""
    if side in (2, 8) and section in (1, 2):
        return "red"  # the stripe along each side of the nose
    if side in (0, 10, 11):
        return "belly"
    if side in (4, 5, 6) and section == 0:
        return "grey"  # the sensor cap on the nose
    return "hull"


def fuselage_details(ship: ShipBuilder):
    """Add the spine behind the droid, and what hangs under the belly."""
    ship.box("grey", (-0.0135, 0.068, 0.019), (0.0135, 0.125, 0.0255))  # the spine
    ship.box("red", (-0.006, 0.074, 0.0255), (0.006, 0.12, 0.0275))
    for x in (-0.01, 0.01):
        ship.box("yellow", (x - 0.0023, 0.08, 0.0255), (x + 0.0023, 0.1, 0.027))

    ship.box("dark", (-0.008, -0.02, -0.0205), (0.008, 0.055, -0.016))  # the gear bay
    ship.box("metal", (-0.011, 0.07, -0.0255), (0.011, 0.12, -0.021))
    ship.box("metal", (-0.004, -0.13, -0.0125), (0.004, -0.06, -0.0085))


# ---------------------------------------------------------------- canopy

CANOPY_STATIONS = [  # y, half-width, top, base
    (-0.045, 0.009, 0.0148, 0.0135),
    (-0.012, 0.0115, 0.031, 0.0155),
    (0.012, 0.012, 0.033, 0.0185),
    (0.032, 0.010, 0.0215, 0.0195),
]


def canopy(ship: ShipBuilder):
    """Add the dark cockpit with light frame ribs."""
    for k in range(3):
        ship.strip("canopy", _canopy_section(k), _canopy_section(k + 1))

    for k in (1, 2):  # a rib lies over each inner station
        front = _canopy_section(k, grow=0.0004)
        front[:, 1] -= 0.0012
        back = _canopy_section(k, grow=0.0004)
        back[:, 1] += 0.0012
        ship.strip("hull", front, back)


def _canopy_section(k, grow=0.0):
    """(4, 3) points of the canopy's section at a station, from side to side over the top."""
    y, width, top, base = CANOPY_STATIONS[k]
    return np.array(
        [
            (width * 1.25 + grow, y, base - 0.003),
            (width * 0.72 + grow, y, top + grow),
            (-width * 0.72 - grow, y, top + grow),
            (-width * 1.25 - grow, y, base - 0.003),
        ]
    )


def droid(ship: ShipBuilder):
    """Add the droid behind the cockpit."""
    dome = trimesh.creation.icosphere(subdivisions=2, radius=0.009)
    dome.apply_translation((0, 0.05, 0.025))
    ship.add("droid", dome)
    eye = [(0, 0.0385), (0.0035, 0.0385), (0.0035, 0.0415), (0, 0.0415)]  # of the droid
    ship.lathe("hull", eye, 0, 0.028)


# ---------------------------------------------------------------- wings, engines, cannons

WING_STATIONS = np.array([0.02, 0.034, 0.058, 0.074, 0.106, 0.126, 0.132, 0.152])  # along x
WING_CHORD = np.array([0.0, 0.14, 0.42, 0.8, 1.0])  # from the front edge to the rear edge


def wing(ship: ShipBuilder, side: int, level: int):
    """Add one thin tapered wing; `side` is +-1 in x, `level` +-1 in z."""
    top, bottom = _wing_surfaces(side, level)
    for surface, is_top in ((top, True), (bottom, False)):
        for i in range(len(WING_STATIONS) - 1):
            for j in range(len(WING_CHORD) - 1):
                quad = surface[[i, i + 1, i + 1, i], [j, j, j + 1, j + 1]]
                ship.quads(_wing_material(i, j, is_top), quad)

    ship.strip("grey", top[:, 0], bottom[:, 0])
    ship.strip("grey", top[:, -1], bottom[:, -1])
    ship.strip("grey", top[-1], bottom[-1])


def _wing_surfaces(side, level):
    """The grids of points (stations, chord, 3) of a wing's upper and lower surface."""
    t = (WING_STATIONS - 0.02) / (0.152 - 0.02)  # 0 at the root, 1 at the tip
    front = 0.035 + t * 0.010
    back = 0.125 - t * 0.025

    x = side * WING_STATIONS[:, None]
    y = front[:, None] + (back - front)[:, None] * WING_CHORD
    x = np.broadcast_to(x, y.shape)
    at_an_edge = np.isin(WING_CHORD, (0, 1))
    half_thickness = 0.0028 - 0.0010 * t[:, None] - 0.0012 * at_an_edge

    top = np.stack([x, y, level * 0.0075 + half_thickness], -1)
    bottom = np.stack([x, y, level * 0.0075 - half_thickness], -1)
    return top, bottom


def _wing_material(i, j, is_top):
    """The material between the stations i and i + 1 along x, j and j + 1 along the chord."""
    if i == 4:
        return "red"  # the bar near the tip
    if i == 2 and j in (1, 2) and is_top:
        return "yellow"
    if i == 2 and j == 2:
        return "metal"
    if i == 0 or (i == 6 and j == 0):
        return "grey"
    return "hull" if is_top else "belly"


def engine(ship: ShipBuilder, side: int, level: int):
    """Add one of the four engines: cowling, intake, pipe and nozzle."""
    x = side * 0.042
    z = level * 0.0185
    cowling = [(0.0105, 0.04), (0.0135, 0.044), (0.0135, 0.084), (0.0100, 0.090)]
    intake = [(0, 0.052), (0.0098, 0.05), (0.0105, 0.04)]
    band = [(0.01365, 0.058), (0.01365, 0.066)]
    pipe = [(0.0100, 0.088), (0.0100, 0.128), (0.0085, 0.132), (0.0085, 0.145)]
    rim = [(0.0085, 0.143), (0.0100, 0.148), (0.0092, 0.163), (0.0078, 0.163)]
    nozzle = [(0.0078, 0.163), (0.0070, 0.150), (0, 0.150)]

    ship.lathe("hull" if level > 0 else "belly", cowling, x, z)
    ship.lathe("dark", intake, x, z)
    ship.lathe("red" if level > 0 else "metal", band, x, z)
    ship.lathe("metal", pipe, x, z)
    ship.lathe("grey", rim, x, z)
    ship.lathe("dark", nozzle, x, z)


def cannon(ship: ShipBuilder, side: int, level: int):
    """Add one of the four cannons at the wing tips: a thick rear and a thin barrel."""
    x = side * 0.149
    z = level * 0.010
    rear = [(0, 0.038), (0.006, 0.04), (0.006, 0.11), (0.003, 0.114), (0, 0.114)]
    band = [(0.006, 0.062), (0.007, 0.064), (0.007, 0.084), (0.006, 0.086)]
    sleeve = [(0.0038, 0.04), (0.0032, 0.0)]
    barrel = [(0.0025, 0.04), (0.0025, -0.085), (0, -0.085)]
    muzzle_ring = [(0.0025, -0.068), (0.0052, -0.066), (0.0052, -0.060), (0.0025, -0.058)]

    ship.lathe("grey", rear, x, z)
    ship.lathe("metal", band, x, z)
    ship.lathe("hull", sleeve, x, z)
    ship.lathe("metal", barrel, x, z)
    ship.lathe("grey", muzzle_ring, x, z)


# ---------------------------------------------------------------- ship


def build(shape: Shape = FILM) -> dict[str, trimesh.Trimesh]:
    """Return the ship as a dictionary: material name -> mesh of all its parts."""
    ship = ShipBuilder(shape)
    fuselage(ship)
    fuselage_details(ship)
    ship.part = Part("canopy")
    canopy(ship)
    ship.part = HULL
    droid(ship)
    for side in (-1, 1):
        for level in (-1, 1):
            for add in (wing, engine, cannon):
                ship.part = Part(add.__name__, side, level)
                add(ship, side, level)
    return {name: trimesh.util.concatenate(meshes) for name, meshes in ship.parts.items() if meshes}


PART_NAMES = {  # last word of a keypoint's name -> name of its part
    "canopy": "canopy",
    "droid": "hull",
    "bay": "hull",
    "belly": "hull",
    "nose": "hull",
    "tail": "hull",
    "stripe": "hull",
    "wing": "wing",
    "muzzle": "cannon",
    "cannon": "cannon",
    "intake": "engine",
    "nozzle": "engine",
}


def target_record(shape: Shape = FILM, name: str = "xwing") -> dict:
    """Return what the JSON file of a target holds for the ship of a shape in NAME.obj.

    Keypoints and lasers are those of `data/xwing.json`, moved with their parts. The box is changed
    by as much as the mesh's bounds.
    """
    record = json.loads((HERE / "xwing.json").read_text(encoding="utf-8"))
    record["mesh"] = f"{name}.obj"
    box = np.array(record["box"]) + _bounds(shape) - _bounds(FILM)
    record["box"] = box.round(6).tolist()
    record["keypoints"] = [_moved_keypoint(entry, shape) for entry in record["keypoints"]]
    record["lasers"] = [_moved_laser(line, shape) for line in record["lasers"]]
    return record


def _moved_keypoint(entry, shape):
    """The record of a keypoint on a ship of a shape."""
    part = _part_at(PART_NAMES[entry["name"].split()[-1]], entry["point"])
    point = move_points([entry["point"]], part, shape)[0]
    normal = turn_vectors(np.array([entry["normal"]]), part, shape)[0]
    return {**entry, "point": point.round(6).tolist(), "normal": normal.round(6).tolist()}


def _moved_laser(line, shape):
    """A laser's muzzle and second point (2, 3) on a ship of a shape."""
    return move_points(line, _part_at("cannon", line[0]), shape).round(6).tolist()


def _part_at(name, point):
    """The part of a name whose side and level are those of a point (3,)."""
    in_the_middle = name in ("hull", "canopy")
    return Part(name) if in_the_middle else Part(name, *np.sign([point[0], point[2]]).astype(int))


@functools.lru_cache(maxsize=2)
def _bounds(shape):
    """(2, 3) the lowest and the highest coordinates of the ship of a shape."""
    vertices = np.concatenate([mesh.vertices for mesh in build(shape).values()])
    return np.stack([vertices.min(0), vertices.max(0)])


# ---------------------------------------------------------------- files


def write(folder: str | Path, shape: Shape = FILM, name: str = "xwing"):
    """Write NAME.obj and xwing.mtl into `folder`, and the target in NAME.json except into data/.

    Raises:
        ValueError: another shape than the film's for data/, whose mesh is the one that all else is
            about.
    """
    folder = Path(folder).resolve()
    if folder == HERE and (shape, name) != (FILM, "xwing"):
        raise ValueError(f"{folder}: holds the film's ship; write other shapes into another folder")

    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.obj").write_text(_obj_text(shape), encoding="utf-8")
    (folder / "xwing.mtl").write_text(_mtl_text(), encoding="utf-8")
    if folder != HERE:
        (folder / f"{name}.json").write_text(
            json.dumps(target_record(shape, name)) + "\n", encoding="utf-8"
        )


def write_random(folder: str | Path, count: int, seed: int = 0):
    """Write ships of random shapes into `folder`: 000.obj with 000.json, 001.obj, ..."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        write(folder, random_shape(rng), f"{i:03d}")


def _obj_text(shape):
    lines = ["# X-wing, S-foils locked; written by make_xwing.py", "mtllib xwing.mtl"]
    if shape != FILM:
        lines[0] = f"# {shape}; written by make_xwing.py"
    first_vertex = 1  # OBJ files count from 1
    for name, mesh in build(shape).items():
        lines += [f"o {name}", f"usemtl {name}"]
        lines += ["v {:.6f} {:.6f} {:.6f}".format(*vertex) for vertex in mesh.vertices]
        lines += ["f {} {} {}".format(*(face + first_vertex)) for face in mesh.faces]
        first_vertex += len(mesh.vertices)
    return "\n".join(lines) + "\n"


def _mtl_text():
    return "\n".join(
        f"newmtl {name}\nKd {red:.4f} {green:.4f} {blue:.4f}\n"
        for name, (red, green, blue) in COLOURS.items()
    )


def main(arguments: list[str] | None = None):
    """Write the ship or the ships that the command line asks for."""
    parser = argparse.ArgumentParser(
        description="Write the X-wing's mesh, or ships of other shapes."
    )
    parser.add_argument("folder", type=Path, nargs="?", default=HERE)
    for field in dataclasses.fields(Shape):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=float, default=field.default, help="see Shape")
    parser.add_argument("--count", type=int, default=0, help="write as many random shapes instead")
    parser.add_argument("--seed", type=int, default=0, help="of the random shapes")
    options = vars(parser.parse_args(arguments))
    folder, count, seed = (options.pop(name) for name in ("folder", "count", "seed"))
    try:
        shape = Shape(**options)
        if count and shape != FILM:
            raise ValueError("--count: draws shapes at random; leave out the other arguments")
        write_random(folder, count, seed) if count else write(folder, shape)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
