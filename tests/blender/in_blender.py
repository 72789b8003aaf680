"""Runs in Blender's own Python: imports stages of USD and measures them (see `check.py`)."""

import sys
from pathlib import Path

import bpy
import numpy as np
from bpy_extras.object_utils import world_to_camera_view
from mathutils import Vector

MAX_PIXELS = 0.1  # by which points of the mesh may be off
MAX_DEGREES = 1.0  # by which the rotation half a frame between two keys may be off


def check(folder: Path) -> bool:
    """Import the stage of a folder, measure it, print what was found, and render one frame."""
    true = np.load(folder / "true.npz")
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.ops.wm.usd_import(filepath=str(folder / "track.usdc"))
    scene = bpy.context.scene
    mesh = next(thing for thing in bpy.data.objects if thing.type == "MESH")
    set_up(scene, true)

    start, end = (int(number) for number in true["frames"])
    off = max(pixels_off(scene, mesh, true, *pair) for pair in zip(true["known"], true["pixels"]))
    turned = max(turn_off(scene, mesh, *pair) for pair in zip(true["pairs"], true["middles"]))
    gone = [size(scene, mesh, number) for number in true["lost"]]
    there = [size(scene, mesh, number) for number in true["known"]]
    passed = {
        f"frames {scene.frame_start} to {scene.frame_end}": (scene.frame_start, scene.frame_end)
        == (start, end),
        f"{len(true['points'])} points in {len(true['known'])} frames: {off:.4f} px off": off
        < MAX_PIXELS,
        f"half-way between two frames: {turned:.4f} degrees off": turned < MAX_DEGREES,
        f"{len(gone)} lost frames show nothing": not any(gone) and min(there) > 0,
        f"{len(mesh.material_slots)} materials, {len(bpy.data.images)} textures": True,
    }
    for text, is_right in passed.items():
        print(f"{folder.name}: {'ok' if is_right else 'WRONG'}: {text}")
    render(scene, int(true["shown"]), folder / "drawn.png")
    return all(passed.values())


def set_up(scene, true):
    """What the user does after the import: camera, resolution, frame rate."""
    scene.camera = next(thing for thing in bpy.data.objects if thing.type == "CAMERA")
    scene.render.resolution_x, scene.render.resolution_y = (int(side) for side in true["size"])
    scene.render.fps = int(true["fps"])


def pixels_off(scene, mesh, true, number, pixels):
    """The largest distance of a projected point from where it should be."""
    scene.frame_set(int(number))
    width, height = true["size"]
    largest = 0.0
    for point, (x, y) in zip(true["points"], pixels):
        seen = world_to_camera_view(scene, scene.camera, mesh.matrix_world @ Vector(point))
        largest = max(largest, np.hypot(width * seen.x - x, height * (1 - seen.y) - y))
    return largest


def turn_off(scene, mesh, number, middle):
    """Degrees between Blender's rotation half a frame after a key and the one that is expected."""
    scene.frame_set(int(number), subframe=0.5)
    to_camera = scene.camera.matrix_world.inverted() @ mesh.matrix_world
    found = np.diag([1, -1, -1]) @ np.array(to_camera.to_quaternion().to_matrix())
    return np.degrees(2 * np.arcsin(min(1, np.linalg.norm(found - middle[:3, :3]) / 8**0.5)))


def size(scene, mesh, number):
    """How large the mesh is drawn in a frame; 0 where it is not shown."""
    scene.frame_set(int(number))
    return mesh.matrix_world.to_scale().length


def render(scene, number, path):
    """Render a frame with a transparent background."""
    scene.frame_set(number)
    sun = bpy.data.objects.new("sun", bpy.data.lights.new("sun", "SUN"))
    sun.data.energy, sun.rotation_euler = 2.5, (0.9, 0.3, 0)
    scene.collection.objects.link(sun)
    scene.world = bpy.data.worlds.new("world")
    scene.world.color = (0.4, 0.4, 0.4)
    scene.render.engine, scene.cycles.samples = "CYCLES", 32
    scene.view_settings.view_transform = "Standard"
    scene.render.film_transparent = True
    scene.render.resolution_percentage = round(100 * 480 / scene.render.resolution_y)
    scene.render.filepath = str(path)
    bpy.ops.render.render(write_still=True)


if __name__ == "__main__":
    results = [check(Path(folder)) for folder in sys.argv[1:]]
    sys.exit(0 if all(results) else 1)
