"""How fast the tracker is, stage by stage and end to end: `python tests/bench.py [--json FILE]`.

Every run is a process of its own on two cores, so that its peak memory is its own. The plain way that it is
compared with does the same job with the tools that come first to hand: Keras `predict` frame by frame,
whole-pixel argmax in Python, cv2.solvePnP, matplotlib figures, a GIF; it neither filters nor hides bolts.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without installation too

import xwing_utils as xu  # noqa: E402
from xwing import film, lasers  # noqa: E402
from xwing.alignment import Aligner  # noqa: E402
from xwing.footage import Clip, Detector, Frame, letterbox  # noqa: E402
from xwing.mesh import load_mesh, rasterise  # noqa: E402
from xwing.tracking import Tracker  # noqa: E402

WEIGHTS = Path(os.environ.get("XWING_WEIGHTS") or xu.ROOT / "weights" / "xwing.weights.h5")
FRAMES, SHIP = xu.ROOT / "data" / "frames", xu.ROOT / "data" / "xwing.obj"


def lap():
    """Paths and true poses of the clip, forwards and backwards, and its camera matrix."""
    (paths, matrices), (model_view, projection) = xu.load_dataset(FRAMES), xu.load_camera(FRAMES)
    poses = [xu.pose_in_camera(model_view, matrix) for matrix in matrices]
    K = xu.camera_matrix(projection, xu.FRAME_SIZE, xu.FRAME_SIZE)
    return paths + paths[-2:0:-1], poses + poses[-2:0:-1], K


def timed_film(frames, K):
    """The track of some frames, and the seconds that it took to track and film them."""
    mesh = load_mesh(SHIP)
    tracker = Tracker(K, 30.0, Detector(WEIGHTS), Aligner(mesh))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        track = film.film(frames, tracker, Path(folder) / "a.mp4", mesh=mesh, progress=False)
        return track, time.perf_counter() - start


def live(count):
    """The clip, over and over; errors count where four corners or more are in sight."""
    paths, truth, K = lap()
    paths, truth = ([items[i % len(items)] for i in range(count)] for items in (paths, truth))
    track, seconds = timed_film((Frame(xu.read_image(path)) for path in paths), K)
    seen = [xu.in_frame(xu.project_pose(xu.BOUNDING_BOX, pose, K)).sum() >= 4 for pose in truth]
    found = [
        (t.pose, pose) for t, pose, shown in zip(track, truth, seen) if shown and t.pose is not None
    ]
    off = np.array([xu.rotation_error(*pair) for pair in found])
    middle, most = np.quantile(off, [0.5, 0.95])
    return {
        "fps": count / seconds,
        "rotation_deg_median": middle,
        "rotation_deg_95": most,
        "flips": int((off > 90).sum()),
        "lost": int(sum(seen)) - len(off),
    }


def large(count, width, height):
    """The clip's flight drawn from the mesh at the size of a large frame, as a video; that is not timed."""
    _, poses, K = lap()
    K[:2] *= height / xu.FRAME_SIZE
    K[0, 2] = width / 2
    sky = cv2.GaussianBlur(
        np.random.default_rng(0).normal(0, 1, (height, width, 3)), (0, 0), height / 20
    )
    sky = np.float32([10, 15, 50]) * np.exp(0.4 * np.float32(sky / sky.std()))
    with tempfile.TemporaryDirectory() as folder:
        drawn, ship = poses[60 : 60 + count], load_mesh(SHIP)
        film.write_clip((draw(ship, pose, K, sky) for pose in drawn), Path(folder) / "a.mp4", 30)
        track, seconds = timed_film(Clip(Path(folder) / "a.mp4"), K)
    off = [np.inf if t.pose is None else xu.rotation_error(t.pose, p) for t, p in zip(track, drawn)]
    return {
        "fps": count / seconds,
        "rotation_deg_median": np.median(off),
        "tracked": sum(t.status == "tracked" for t in track),
    }


def draw(ship, pose, K, sky):
    """(H, W, 3) uint8: the ship under one light before a sky (H, W, 3), four samples a pixel."""
    height, width = sky.shape[:2]
    a, b, c = np.moveaxis(ship.triangles @ pose[:3, :3].T + pose[:3, 3], 1, 0)
    normals = np.cross(b - a, c - a)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
    normals *= -np.sign((normals * a).sum(1, keepdims=True))  # towards the camera
    light = 0.45 + 0.55 * (normals @ [0.3, -0.8, -0.5]).clip(0)
    colours = 255 * ship.colours[ship.face_materials] * light[:, None]
    ids, _ = rasterise(ship.triangles, pose, K * [[2], [2], [1]], 2 * width, 2 * height)
    colours = np.vstack([colours, [[np.nan] * 3]]).astype(np.float32)[ids]
    behind = cv2.resize(sky, (2 * width, 2 * height))
    return (
        cv2.resize(
            np.where(np.isnan(colours), behind, colours),
            (width, height),
            interpolation=cv2.INTER_AREA,
        )
        .clip(0, 255)
        .astype(np.uint8)
    )


def plain(count):
    import imageio.v2 as imageio
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    model, (paths, _, K) = xu.load_model(WEIGHTS, xu.FRAME_SIZE), lap()
    model.predict(
        np.zeros((1, 256, 256, 3), np.uint8), verbose=0
    )  # the first call builds the graph
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        pictures, stride = [], model.settings["stride"]
        for path in paths[:count]:
            image = xu.read_image(path)
            heatmaps, found = model.predict(image[None], verbose=0)[0], []
            for k in range(8):
                best = max(
                    (heatmaps[row, column, k], row, column)
                    for row in range(heatmaps.shape[0])
                    for column in range(heatmaps.shape[1])
                )
                found.append(((best[2] + 0.5) * stride, (best[1] + 0.5) * stride, best[0]))
            good = [i for i in range(8) if found[i][2] > 0.1]
            figure = plt.figure(figsize=(2.56, 2.56), dpi=100)
            axis = figure.add_axes((0, 0, 1, 1))
            axis.imshow(image), axis.axis("off")
            if len(good) >= 6:
                _, turn, move = cv2.solvePnP(
                    xu.BOUNDING_BOX[good], np.array(found)[good, :2].copy(), K, None
                )
                for line in xu.LASERS:
                    axis.plot(*cv2.projectPoints(line, turn, move, K, None)[0][:, 0].T, color="red")
            axis.set(xlim=(0, 256), ylim=(256, 0))
            figure.savefig(Path(folder) / "frame.png")
            plt.close(figure)
            pictures.append(imageio.imread(Path(folder) / "frame.png")[..., :3])
        imageio.mimsave(Path(folder) / "a.gif", pictures, duration=40)
        return {"fps": count / (time.perf_counter() - start)}


def stages(count):
    """Milliseconds a frame of each stage on its own, one after another."""
    (paths, _, K), mesh, spent, drawn = lap(), load_mesh(SHIP), {}, []
    detector, aligner, shot = Detector(WEIGHTS), Aligner(mesh), lasers.Lasers().shot(30)
    tracker = Tracker(K, 30.0, detector, aligner)

    def timed(name, work, *arguments):
        start = time.perf_counter()
        result = work(*arguments)
        spent.setdefault(name, []).append((time.perf_counter() - start) * 1000)
        return result

    for path in paths[30 : 30 + count]:
        image = timed("read_jpeg", xu.read_image, path)
        square, close = letterbox(image, detector.search_size)[0], xu.crop(image, (64, 64), 128)
        timed("network_192_px", detector.heatmaps, square[None])
        timed("network_128_px", detector.heatmaps, close[None])
        keypoints, confidence, sigma = timed("detector", detector, image)
        estimate = timed("pnp", xu.estimate_pose, keypoints, K, confidence, sigma)
        tracked = timed("track", tracker.update, image)
        if tracked.pose is not None:
            timed("align_step", aligner.track, image, tracked.pose, K, tracked.covariance)
        if estimate.pose is not None and len(drawn) % 8 == 0:
            timed("verify", aligner.verify, image, estimate, K)
        shown = image, shot.step(tracked.pose), lasers.Lasers(), mesh, tracked.pose, K
        drawn.append(timed("draw", lasers._with_bolts, *shown))
    with tempfile.TemporaryDirectory() as folder:
        timed("write_mp4", film.write_clip, drawn, Path(folder) / "a.mp4", 30)
    spent["write_mp4"] = [spent["write_mp4"][0] / count]
    return {name: float(np.mean(values)) for name, values in spent.items()}


def run(work, *arguments):
    """The result of a run in a process of its own, with its peak memory."""
    command = [sys.executable, __file__, "--run", work.__name__, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument(
        "--count", type=int, default=300, help="frames of the short run; the long: ten times"
    )
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    if options.run:
        result = globals()[options.run[0]](*map(int, options.run[1:]))
        print(
            json.dumps(
                result | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
            )
        )
        return
    count, figures = options.count, {}
    print("| stage, one after another | ms a frame |\n|---|---|")
    for name, value in run(stages, min(count, 150)).items():
        if name != "peak_mb":
            figures[f"stage.{name}"] = value
            print(f"| {name} | {value:.2f} |")
    print("\n| end to end | frames | frames a second | peak memory, MB | |\n|---|---|---|---|---|")
    for name, work, *arguments in (
        ("live", live, count),
        ("long", live, 10 * count),
        ("plain", plain, count // 5),
        ("1280x720", large, count // 3, 1280, 720),
        ("3840x2160", large, count // 6, 3840, 2160),
    ):
        result = run(work, *arguments)
        figures |= {f"{name}.{key}": value for key, value in result.items()}
        fps, peak = result.pop("fps"), result.pop("peak_mb")
        more = ", ".join(f"{key} {value:.3g}" for key, value in result.items())
        print(f"| {name} | {arguments[0]} | {fps:.1f} | {peak:.0f} | {more} |", flush=True)
    print(
        f"\nlive is {figures['live.fps'] / figures['plain.fps']:.1f} times as fast as the plain way"
    )
    if options.json:
        xu.write_files({options.json: json.dumps(figures, indent=1) + "\n"})


if __name__ == "__main__":
    main()
