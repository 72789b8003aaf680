"""Track the flight in 1280x720 and fire its lasers: `make hero` writes images/hero.mp4 and hero.gif."""

import cv2
import numpy as np

import xwing_utils as xu
from xwing import evaluation, film, metrics, tracking
from xwing.alignment import Aligner
from xwing.footage import Clip, Detector
from xwing.mesh import load_mesh

GIF_SIZE, GIF_STEP, GIF_FPS = (640, 360), 3, 10


def main():
    video, truth, K = evaluation.load_flight(xu.ROOT / "data" / "flight_hd.json")
    clip, mesh = Clip(video), load_mesh(xu.ROOT / "data" / "xwing.obj")
    detector, aligner = Detector(xu.ROOT / "weights" / "xwing.weights.h5"), Aligner(mesh)
    track = tracking.track_clip(clip, K, detector, aligner)
    corners = np.array([xu.project_pose(xu.BOUNDING_BOX, pose, K) for pose in truth])
    seen = xu.in_frame(corners, clip.width, clip.height).sum(1) >= 4
    poses = [tracked.pose for tracked in track]
    table = metrics.compare_tracks(
        {"1280x720, both sides": poses}, np.array(truth), seen, K, clip.fps
    )
    print(tracking.summary(track), f"of {seen.sum()} that show four corners", sep=", ")
    print(table.T.round(4).to_string())
    mp4, gif = (xu.ROOT / "images" / f"hero.{suffix}" for suffix in ("mp4", "gif"))
    film.animate(clip, poses, K, mp4, clip.fps, mesh=mesh, progress=True)
    frames = Clip(mp4, GIF_STEP)
    small = (cv2.resize(frame.image, GIF_SIZE, interpolation=cv2.INTER_AREA) for frame in frames)
    film.write_clip(small, gif, GIF_FPS)
    print(*(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB" for path in (mp4, gif)), sep=", ")


if __name__ == "__main__":
    main()
