"""Check the exported USD in real Blender: the ship's committed track, and a textured can.

It writes two stages and what is true of them, lets Blender's own Python (`.venv-blender`) import
and measure them (`in_blender.py`), and puts what Blender renders over the frames into
images/blender.jpg. `make blender` runs it where `.venv-blender` holds bpy.
"""

import dataclasses
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation, Slerp

import xwing_utils as xu
from xwing.alignment import Aligner
from xwing.footage import Clip, frames_at
from xwing.mesh import load_mesh
from xwing.tracking import TrackedPose, export_track, track_clip

HERE = Path(__file__).resolve().parent
BLENDER = xu.ROOT / ".venv-blender" / "bin" / "python"
CHECKED = 20  # frames
POINTS = 300  # of the mesh
HEIGHT = 420  # of the picture, pixels


def main() -> None:
    """Write, let Blender measure, and draw; ends with Blender's exit code."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_case(folder / "ship", *ship())
        write_case(folder / "can", *can())
        done = subprocess.run([BLENDER, HERE / "in_blender.py", folder / "ship", folder / "can"])
        if done.returncode == 0:
            draw([folder / "ship", folder / "can"], xu.ROOT / "images" / "blender.jpg")
    sys.exit(done.returncode)


def ship() -> tuple:
    """The X-wing as its committed track has it, with a unit that is not Blender's."""
    record = xu.read_json(xu.ROOT / "images" / "track.json")
    track = []
    for row in record["frames"]:
        pose = None if row["matrix"] is None else np.array(row["matrix"])
        track.append(TrackedPose(row["status"], row["seconds"], pose, probability=0.9))
    clip = Clip(xu.ROOT / "data" / "frames")
    return clip, track, np.array(record["camera"]["K"]), xu.XWING, 84


def can() -> tuple:
    """A textured can, tracked over its first 24 frames; two of them count as lost."""
    info = xu.read_json(xu.ROOT / "data" / "objects" / "can.json")
    target = xu.load_target(xu.ROOT / "data" / "objects" / info["target"])
    target = dataclasses.replace(target, unit=0.001)
    clip = Clip(xu.ROOT / "data" / "objects" / "can.mp4")
    K = np.array(info["K"])
    start = {info["start"]["frame"]: np.array(info["start"]["pose"])}
    frames = list(itertools.islice(clip, CHECKED + 4))
    track = track_clip(
        frames, K, aligner=Aligner(target), fps=clip.fps, progress=False, starts=start
    )
    for index in (11, 12):
        track[index] = TrackedPose("lost", track[index].seconds)
    return clip, track, K, target, 5


def write_case(folder: Path, clip, track, K, target, shown: int) -> None:
    """Write a stage, and what Blender has to find in it.

    Args:
        folder: a new folder.
        clip: `Clip`.
        track: `TrackedPose` of its first frames.
        K: (3, 3), pixels.
        target: `Target`.
        shown: number of the frame that is rendered.
    """
    folder.mkdir()
    export_track(folder / "track.usdc", track, K, clip.width, clip.height, target, clip, 30.0)
    vertices = load_mesh(target.mesh, max_triangles=None).vertices
    points = vertices[:: max(1, len(vertices) // POINTS)]
    some = np.linspace(0, len(track) - 1, CHECKED).round().astype(int)
    known = [i for i in some if track[i].pose is not None]
    pairs = [i for i in known if i + 1 < len(track) and track[i + 1].pose is not None]
    np.savez(
        folder / "true.npz",
        size=(clip.width, clip.height),
        fps=30.0,
        K=K,
        frames=(0, len(track) - 1),
        points=points,
        known=known,
        pixels=[xu.project_pose(points, track[i].pose, K) for i in known],
        pairs=pairs,
        middles=[_half_way(track[i].pose, track[i + 1].pose) for i in pairs],
        lost=[i for i, tracked in enumerate(track) if tracked.pose is None],
        shown=shown,
    )
    Image.fromarray(next(frames_at(clip, [shown]))).save(folder / "frame.png")


def _half_way(first, second):
    """(4, 4) pose half-way between two: on the great arc, and on the line."""
    middle = (first + second) / 2
    turns = Rotation.from_matrix([first[:3, :3], second[:3, :3]])
    middle[:3, :3] = Slerp([0, 1], turns)(0.5).as_matrix()
    return middle


def draw(folders: list[Path], path: Path) -> None:
    """Each frame beside what Blender renders over it, in one picture."""
    pictures = []
    for folder in folders:
        frame = Image.open(folder / "frame.png").convert("RGBA")
        drawn = Image.open(folder / "drawn.png").convert("RGBA")
        over = Image.alpha_composite(frame.resize(drawn.size, Image.Resampling.BICUBIC), drawn)
        for picture in (frame, over):
            width = round(picture.width * HEIGHT / picture.height)
            pictures.append(
                picture.convert("RGB").resize((width, HEIGHT), Image.Resampling.BICUBIC)
            )
    Image.fromarray(np.hstack([np.array(picture) for picture in pictures])).save(path, quality=85)


if __name__ == "__main__":
    main()
