"""Track the flight in 1280x720 and fire its lasers: `make hero` writes images/hero.mp4 and .gif."""

import cv2
import numpy as np

import xwing_utils as xu
from xwing import evaluation, film, metrics, tracking
from xwing.alignment import Aligner
from xwing.detector import Detector
from xwing.footage import Clip
from xwing.mesh import load_mesh

GIF_SIZE = (640, 360)  # pixels, width and height
GIF_STEP = 3  # every third frame of the film
GIF_FPS = 10

MP4 = xu.ROOT / "images" / "hero.mp4"
GIF = xu.ROOT / "images" / "hero.gif"


def main():
    """Write both films, and print how well the flight was tracked."""
    video, truth, K = evaluation.load_flight(xu.ROOT / "data" / "flight_hd.json")
    clip = Clip(video)
    mesh = load_mesh(xu.XWING.mesh)
    detector = Detector(xu.ROOT / "weights" / "xwing.weights.h5")

    track = tracking.track_clip(clip, K, detector, Aligner(mesh))
    poses = [tracked.pose for tracked in track]
    print_errors(track, truth, K, clip)

    film.animate(clip, poses, K, MP4, clip.fps, mesh=mesh, progress=True)
    frames = Clip(MP4, GIF_STEP)
    small = (cv2.resize(frame.image, GIF_SIZE, interpolation=cv2.INTER_AREA) for frame in frames)
    film.write_clip(small, GIF, GIF_FPS, progress=True, count=frames.count)

    for path in (MP4, GIF):
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")


def print_errors(track, truth, K, clip):
    """Print how far the poses of a track are from the true ones, where four corners show."""
    poses = [tracked.pose for tracked in track]
    corners = np.array([xu.project_pose(xu.BOUNDING_BOX, pose, K) for pose in truth])
    shown = xu.in_frame(corners, clip.width, clip.height).sum(1) >= 4
    print(tracking.summary(track), f"of {shown.sum()} that show four corners", sep=", ")

    name = "1280x720, forward-backward smoothed"
    table = metrics.compare_tracks({name: poses}, np.array(truth), shown, K, clip.fps)
    print(table.T.round(4).to_string())


if __name__ == "__main__":
    main()
