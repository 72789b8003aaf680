"""Write `xwing.obj` and `xwing.mtl`: a procedural X-wing with its S-foils locked (wings closed).

Model frame: x across the wings, -y towards the nose, +z up; the unit is the model unit of the pose matrices.
The mesh is a list of flat-shaded parts, one material each; its bounding box is the box whose corners are the
first eight keypoints. Run `python data/make_xwing.py` to write both files again.
"""

from pathlib import Path

import numpy as np
import trimesh

# Material name -> sRGB colour in [0, 1]. The underside is greyer and darker than the top, which tells the way
# up. Left and right are mirror images, so that a mirrored frame is a frame of the ship.
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

    def add(self, material, mesh):
        self.parts[material].append(mesh)

    def quads(self, material, quads):
        """Add quads given as an (N, 4, 3) array of corner points in cyclic order."""
        quads = np.asarray(quads, float).reshape(-1, 4, 3)
        start = 4 * np.arange(len(quads))[:, None]
        faces = np.concatenate([start + [0, 1, 2], start + [0, 2, 3]])
        self.add(material, trimesh.Trimesh(quads.reshape(-1, 3), faces, process=False))

    def box(self, material, low, high):
        self.add(material, trimesh.creation.box(bounds=[low, high]))

    def lathe(self, material, profile, x, z):
        """Revolve (radius, y) pairs about the axis through (x, z) that is parallel to y."""
        profile = np.asarray(profile, float)
        mesh = trimesh.creation.revolve(profile, sections=24)
        points = mesh.vertices[:, [0, 2, 1]] * [1, 1, -1] + [x, 0, z]
        self.add(material, trimesh.Trimesh(points, mesh.faces, process=False))


def fuselage(ship):
    """A chamfered box that widens from the nose, lofted through stations along y."""
    #          y     half-width  half-height
    stations = [
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
    outline = np.array(
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
    rings = [
        np.stack([outline[:, 0] * w, np.full(12, y), outline[:, 1] * h], 1) for y, w, h in stations
    ]
    for k, (front, back) in enumerate(zip(rings, rings[1:])):
        for j in range(12):
            i = (j + 1) % 12
            material = "hull"
            if j in (2, 8) and k in (1, 2):
                material = "red"  # the stripe along each side of the nose
            elif j in (0, 10, 11):
                material = "belly"
            elif j in (4, 5, 6) and k == 0:
                material = "grey"  # the sensor cap on the nose
            ship.quads(material, [front[j], front[i], back[i], back[j]])
    for ring, material in ((rings[0], "grey"), (rings[-1], "dark")):
        centre = ring.mean(0)
        ship.quads(material, [[centre, ring[j], ring[(j + 1) % 12], centre] for j in range(12)])


def fuselage_details(ship):
    """The spine behind the droid, and what hangs under the belly."""
    ship.box("grey", (-0.0135, 0.068, 0.019), (0.0135, 0.125, 0.0255))  # the spine
    ship.box("red", (-0.006, 0.074, 0.0255), (0.006, 0.12, 0.0275))
    for x in (-0.01, 0.01):
        ship.box("yellow", (x - 0.0023, 0.08, 0.0255), (x + 0.0023, 0.1, 0.027))
    ship.box(
        "dark", (-0.008, -0.02, -0.0205), (0.008, 0.055, -0.016)
    )  # the gear bay under the belly
    ship.box("metal", (-0.011, 0.07, -0.0255), (0.011, 0.12, -0.021))
    ship.box("metal", (-0.004, -0.13, -0.0125), (0.004, -0.06, -0.0085))


def canopy(ship):
    """The dark cockpit with light frame ribs, and the droid behind it."""
    #          y     half-width  top
    stations = [
        (-0.045, 0.009, 0.0148),
        (-0.012, 0.0115, 0.031),
        (0.012, 0.012, 0.033),
        (0.032, 0.010, 0.0215),
    ]
    base = [0.0135, 0.0155, 0.0185, 0.0195]

    def section(k, grow=0.0):
        y, width, top = stations[k]
        return np.array(
            [
                (width * 1.25 + grow, y, base[k] - 0.003),
                (width * 0.72 + grow, y, top + grow),
                (-width * 0.72 - grow, y, top + grow),
                (-width * 1.25 - grow, y, base[k] - 0.003),
            ]
        )

    for k in range(3):
        front, back = section(k), section(k + 1)
        ship.quads("canopy", [[front[j], front[j + 1], back[j + 1], back[j]] for j in range(3)])
    for k in (1, 2):  # ribs
        front, back = section(k, 0.0004), section(k, 0.0004)
        front[:, 1] -= 0.0012
        back[:, 1] += 0.0012
        ship.quads("hull", [[front[j], front[j + 1], back[j + 1], back[j]] for j in range(3)])
    dome = trimesh.creation.icosphere(subdivisions=2, radius=0.009)
    dome.apply_translation((0, 0.05, 0.025))
    ship.add("droid", dome)
    eye = [(0, 0.0385), (0.0035, 0.0385), (0.0035, 0.0415), (0, 0.0415)]  # of the droid
    ship.lathe("hull", eye, 0, 0.028)


def wing(ship, side, level):
    """One thin tapered wing; `side` is +-1 in x, `level` +-1 in z."""
    xs = np.array([0.02, 0.034, 0.058, 0.074, 0.106, 0.126, 0.132, 0.152])
    chord = np.array([0.0, 0.14, 0.42, 0.8, 1.0])
    t = (xs - 0.02) / (0.152 - 0.02)
    front, back = 0.035 + t * 0.010, 0.125 - t * 0.025
    ys = front[:, None] + (back - front)[:, None] * chord
    half = 0.0028 - 0.0010 * t[:, None] - 0.0012 * (chord == 0) - 0.0012 * (chord == 1)
    x = np.broadcast_to(side * xs[:, None], ys.shape)
    top = np.stack([x, ys, level * 0.0075 + half], -1)
    bottom = np.stack([x, ys, level * 0.0075 - half], -1)
    for surface, up in ((top, True), (bottom, False)):
        for i in range(len(xs) - 1):
            for j in range(len(chord) - 1):
                material = "hull" if up else "belly"
                if i == 4:
                    material = "red"  # the bar near the tip
                elif i == 2 and j in (1, 2) and up:
                    material = "yellow"
                elif i == 2 and j == 2 and not up:
                    material = "metal"
                elif i == 0 or (i == 6 and j == 0):
                    material = "grey"
                ship.quads(material, surface[[i, i + 1, i + 1, i], [j, j, j + 1, j + 1]])
    rim = [(top[:, 0], bottom[:, 0]), (top[:, -1], bottom[:, -1]), (top[-1], bottom[-1])]
    for upper, lower in rim:
        ship.quads(
            "grey",
            [[upper[k], upper[k + 1], lower[k + 1], lower[k]] for k in range(len(upper) - 1)],
        )


def engine(ship, side, level):
    """One of the four engines: cowling, intake, pipe and nozzle."""
    x, z = side * 0.042, level * 0.0185
    cowling = [(0.0105, 0.04), (0.0135, 0.044), (0.0135, 0.084), (0.0100, 0.090)]
    ship.lathe("hull" if level > 0 else "belly", cowling, x, z)
    ship.lathe("dark", [(0, 0.052), (0.0098, 0.05), (0.0105, 0.04)], x, z)  # the intake
    ship.lathe("red" if level > 0 else "metal", [(0.01365, 0.058), (0.01365, 0.066)], x, z)
    ship.lathe("metal", [(0.0100, 0.088), (0.0100, 0.128), (0.0085, 0.132), (0.0085, 0.145)], x, z)
    ship.lathe("grey", [(0.0085, 0.143), (0.0100, 0.148), (0.0092, 0.163), (0.0078, 0.163)], x, z)
    ship.lathe("dark", [(0.0078, 0.163), (0.0070, 0.150), (0, 0.150)], x, z)  # the nozzle


def cannon(ship, side, level):
    """One of the four cannons at the wing tips: a thick rear and a thin barrel."""
    x, z = side * 0.149, level * 0.010
    ship.lathe("grey", [(0, 0.038), (0.006, 0.04), (0.006, 0.11), (0.003, 0.114), (0, 0.114)], x, z)
    ship.lathe("metal", [(0.006, 0.062), (0.007, 0.064), (0.007, 0.084), (0.006, 0.086)], x, z)
    ship.lathe("hull", [(0.0038, 0.04), (0.0032, 0.0)], x, z)
    ship.lathe("metal", [(0.0025, 0.04), (0.0025, -0.085), (0, -0.085)], x, z)
    ring = [
        (0.0025, -0.068),
        (0.0052, -0.066),
        (0.0052, -0.060),
        (0.0025, -0.058),
    ]  # near the muzzle
    ship.lathe("grey", ring, x, z)


def build():
    """Return the ship as a dict: material name -> trimesh.Trimesh."""
    ship = ShipBuilder()
    fuselage(ship)
    fuselage_details(ship)
    canopy(ship)
    for side in (-1, 1):
        for level in (-1, 1):
            for part in (wing, engine, cannon):
                part(ship, side, level)
    return {name: trimesh.util.concatenate(meshes) for name, meshes in ship.parts.items() if meshes}


def write(folder):
    """Write xwing.obj and xwing.mtl into `folder`."""
    folder = Path(folder)
    lines, offset = ["# X-wing, S-foils locked; written by make_xwing.py", "mtllib xwing.mtl"], 1
    for name, mesh in build().items():
        lines += [f"o {name}", f"usemtl {name}"]
        lines += ["v {:.6f} {:.6f} {:.6f}".format(*v) for v in mesh.vertices]
        lines += ["f {} {} {}".format(*(f + offset)) for f in mesh.faces]
        offset += len(mesh.vertices)
    (folder / "xwing.obj").write_text("\n".join(lines) + "\n")
    materials = [
        f"newmtl {name}\nKd {r:.4f} {g:.4f} {b:.4f}\n" for name, (r, g, b) in COLOURS.items()
    ]
    (folder / "xwing.mtl").write_text("\n".join(materials))


if __name__ == "__main__":
    write(Path(__file__).parent)
