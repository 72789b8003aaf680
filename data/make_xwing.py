"""Write `xwing.obj` and `xwing.mtl`: a procedural X-wing with its S-foils locked (wings closed).

The model frame has x across the wings, -y towards the nose and +z up; lengths are in the model
unit of the pose matrices. The mesh is a list of flat-shaded parts with one material each. The
corners of its bounding box are the first eight keypoints. `python data/make_xwing.py` writes both
files again.
"""

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


class ShipBuilder:
    """Collects triangles by material."""

    def __init__(self):
        self.parts = {name: [] for name in COLOURS}

    def add(self, material: str, mesh: trimesh.Trimesh):
        """Add a part of one material."""
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
    """Add the dark cockpit with light frame ribs, and the droid behind it."""
    for k in range(3):
        ship.strip("canopy", _canopy_section(k), _canopy_section(k + 1))

    for k in (1, 2):  # a rib lies over each inner station
        front = _canopy_section(k, grow=0.0004)
        front[:, 1] -= 0.0012
        back = _canopy_section(k, grow=0.0004)
        back[:, 1] += 0.0012
        ship.strip("hull", front, back)

    dome = trimesh.creation.icosphere(subdivisions=2, radius=0.009)
    dome.apply_translation((0, 0.05, 0.025))
    ship.add("droid", dome)
    eye = [(0, 0.0385), (0.0035, 0.0385), (0.0035, 0.0415), (0, 0.0415)]  # of the droid
    ship.lathe("hull", eye, 0, 0.028)


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


# ---------------------------------------------------------------- files


def build() -> dict[str, trimesh.Trimesh]:
    """Return the ship as a dictionary: material name -> mesh of all its parts."""
    ship = ShipBuilder()
    fuselage(ship)
    fuselage_details(ship)
    canopy(ship)
    for side in (-1, 1):
        for level in (-1, 1):
            wing(ship, side, level)
            engine(ship, side, level)
            cannon(ship, side, level)
    return {name: trimesh.util.concatenate(meshes) for name, meshes in ship.parts.items() if meshes}


def write(folder: str | Path):
    """Write xwing.obj and xwing.mtl into `folder`."""
    folder = Path(folder)
    lines = ["# X-wing, S-foils locked; written by make_xwing.py", "mtllib xwing.mtl"]
    first_vertex = 1  # OBJ files count from 1
    for name, mesh in build().items():
        lines += [f"o {name}", f"usemtl {name}"]
        lines += ["v {:.6f} {:.6f} {:.6f}".format(*vertex) for vertex in mesh.vertices]
        lines += ["f {} {} {}".format(*(face + first_vertex)) for face in mesh.faces]
        first_vertex += len(mesh.vertices)
    (folder / "xwing.obj").write_text("\n".join(lines) + "\n")

    materials = [
        f"newmtl {name}\nKd {red:.4f} {green:.4f} {blue:.4f}\n"
        for name, (red, green, blue) in COLOURS.items()
    ]
    (folder / "xwing.mtl").write_text("\n".join(materials))


if __name__ == "__main__":
    write(Path(__file__).parent)
