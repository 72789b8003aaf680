"""How fast the tracker is, stage by stage and end to end: `python tests/bench.py [--json FILE]`.

Every run is a process of its own on two cores, so that its peak memory is its own. The tracker is
compared with a plain program, which does the same job with common tools: Keras `predict` frame by
frame, whole-pixel argmax in Python, cv2.solvePnP, matplotlib figures, and a GIF. The plain program
neither filters poses nor hides bolts.
"""

import argparse
import itertools
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
from xwing import film, lasers, metrics  # noqa: E402
from xwing.alignment import Aligner  # noqa: E402
from xwing.detector import Detector, letterbox  # noqa: E402
from xwing.footage import Clip, Frame  # noqa: E402
from xwing.mesh import load_mesh, rasterise  # noqa: E402
from xwing.tracking import Tracker  # noqa: E402

WEIGHTS = Path(os.environ.get("XWING_WEIGHTS") or xu.ROOT / "weights" / "xwing.weights.h5")
FRAMES = xu.ROOT / "data" / "frames"
SHIP = xu.ROOT / "data" / "xwing.obj"


def lap():
    """Paths and true poses (4, 4) of the clip, forwards and backwards, and its K (3, 3)."""
    paths, matrices = xu.load_dataset(FRAMES)
    model_view, projection = xu.load_camera(FRAMES)
    poses = [xu.pose_in_camera(model_view, matrix) for matrix in matrices]
    K = xu.camera_matrix(projection, xu.FRAME_SIZE, xu.FRAME_SIZE)
    return paths + paths[-2:0:-1], poses + poses[-2:0:-1], K


def timed_film(frames, K):
    """Track and film some frames; return the track, and the seconds that it took."""
    mesh = load_mesh(SHIP)
    tracker = Tracker(K, 30.0, Detector(WEIGHTS), Aligner(mesh))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        track = film.film(frames, tracker, Path(folder) / "a.mp4", mesh=mesh, progress=False)
        return track, time.perf_counter() - start


def live(count):
    """Track and film `count` frames of the clip, which is repeated.

    Errors count in the frames that show at least four corners of the box.
    """
    paths, truth, K = lap()
    paths = [paths[i % len(paths)] for i in range(count)]
    truth = [truth[i % len(truth)] for i in range(count)]
    track, seconds = timed_film((Frame(xu.read_image(path)) for path in paths), K)

    shown = [xu.in_frame(xu.project_pose(xu.BOUNDING_BOX, pose, K)).sum() >= 4 for pose in truth]
    errors = np.array(
        [
            xu.rotation_error(tracked.pose, pose)
            for tracked, pose, shows in zip(track, truth, shown)
            if shows and tracked.pose is not None
        ]
    )
    median, high = np.quantile(errors, [0.5, 0.95])
    return {
        "fps": count / seconds,
        "rotation_deg_median": median,
        "rotation_deg_95": high,
        "flips": int((errors > 90).sum()),
        "lost": int(sum(shown)) - len(errors),
    }


def large(count, width, height):
    """Track and film a large video, drawn from the mesh; drawing is not timed."""
    _, poses, K = lap()
    poses = poses[60 : 60 + count]
    K = xu.crop_camera(K, scale=height / xu.FRAME_SIZE)
    K[0, 2] = width / 2

    ship = load_mesh(SHIP)
    sky = night_sky(width, height)
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "a.mp4"
        film.write_clip((draw(ship, pose, K, sky) for pose in poses), video, 30)
        track, seconds = timed_film(Clip(video), K)

    errors = [
        np.inf if tracked.pose is None else xu.rotation_error(tracked.pose, pose)
        for tracked, pose in zip(track, poses)
    ]
    return {
        "fps": count / seconds,
        "rotation_deg_median": np.median(errors),
        "tracked": sum(tracked.status == "tracked" for tracked in track),
    }


def own_object(count):
    """Follow the printed carton of data/objects/ from its first pose, without a network."""
    path = xu.ROOT / "data" / "objects" / "carton.json"
    known = xu.read_json(path)
    truth = np.array(known["poses"][:count])
    target = xu.load_target(path.with_name(known["target"]))
    tracker = Tracker(known["K"], known["fps"], aligner=Aligner(target))

    frames = itertools.islice(Clip(path.with_suffix(".mp4")), len(truth))
    start = time.perf_counter()
    track = [tracker.start(next(frames).image, truth[0])]
    track += [tracker.update(frame.image) for frame in frames]
    seconds = time.perf_counter() - start

    poses = [tracked.pose for tracked in track]
    errors = [np.inf if p is None else xu.rotation_error(p, t) for p, t in zip(poses, truth)]
    return {
        "fps": len(truth) / seconds,
        "rotation_deg_median": np.median(errors),
        "right": int(metrics.recalled(poses, truth, target=target).sum()),
    }


def night_sky(width, height):
    """A dark, cloudy sky (H, W, 3) float32."""
    noise = np.random.default_rng(0).normal(0, 1, (height, width, 3))
    clouds = cv2.GaussianBlur(noise, (0, 0), height / 20)
    return np.float32([10, 15, 50]) * np.exp(0.4 * np.float32(clouds / clouds.std()))


def draw(ship, pose, K, sky):
    """(H, W, 3) uint8: the ship under one light before a sky (H, W, 3), four samples a pixel."""
    height, width = sky.shape[:2]
    a, b, c = np.moveaxis(ship.triangles @ pose[:3, :3].T + pose[:3, 3], 1, 0)
    normals = np.cross(b - a, c - a)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
    normals *= -np.sign((normals * a).sum(1, keepdims=True))  # towards the camera

    light = 0.45 + 0.55 * (normals @ [0.3, -0.8, -0.5]).clip(0)
    colours = 255 * ship.colours[ship.face_materials] * light[:, None]
    # The last row is for id -1, of the pixels where no triangle shows.
    colours = np.vstack([colours, [[np.nan] * 3]]).astype(np.float32)

    double = xu.crop_camera(K, scale=2)
    ids, _ = rasterise(ship.triangles, pose, double, 2 * width, 2 * height)
    picture = colours[ids]
    behind = cv2.resize(sky, (2 * width, 2 * height))
    picture = np.where(np.isnan(picture), behind, picture)

    small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    return small.clip(0, 255).astype(np.uint8)


def plain(count):
    """Find poses and draw the clip with common tools; loading the network is not timed."""
    import imageio.v2 as imageio
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    model = xu.load_model(WEIGHTS, xu.FRAME_SIZE)
    paths, _, K = lap()
    model.predict(np.zeros((1, 256, 256, 3), np.uint8), verbose=0)  # builds the graph

    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "frame.png"
        start = time.perf_counter()
        pictures = []
        for path in paths[:count]:
            image = xu.read_image(path)
            heatmaps = model.predict(image[None], verbose=0)[0]
            found = plain_argmax(heatmaps, model.settings["stride"])
            plain_figure(plt, image, found, K, picture)
            pictures.append(imageio.imread(picture)[..., :3])
        imageio.mimsave(Path(folder) / "a.gif", pictures, duration=40)
        return {"fps": count / (time.perf_counter() - start)}


def plain_argmax(heatmaps, stride):
    """The brightest pixel (x, y, value) of each corner's heatmap (H, W, K), by Python loops."""
    found = []
    for k in range(8):
        best = max(
            (heatmaps[row, column, k], row, column)
            for row in range(heatmaps.shape[0])
            for column in range(heatmaps.shape[1])
        )
        found.append(((best[2] + 0.5) * stride, (best[1] + 0.5) * stride, best[0]))
    return found


def plain_figure(plt, image, found, K, path):
    """Write a matplotlib figure of a frame, with its lines of fire if six corners are found."""
    figure = plt.figure(figsize=(2.56, 2.56), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(image)
    axis.axis("off")

    good = [i for i in range(8) if found[i][2] > 0.1]
    if len(good) >= 6:
        pixels = np.array(found)[good, :2].copy()
        _, turn, move = cv2.solvePnP(xu.BOUNDING_BOX[good], pixels, K, None)
        for line in xu.LASERS:
            axis.plot(*cv2.projectPoints(line, turn, move, K, None)[0][:, 0].T, color="red")

    axis.set(xlim=(0, 256), ylim=(256, 0))
    figure.savefig(path)
    plt.close(figure)


def stages(count):
    """Milliseconds a frame that each stage takes on its own, one after another."""
    paths, _, K = lap()
    mesh = load_mesh(SHIP)
    detector = Detector(WEIGHTS)
    aligner = Aligner(mesh)
    tracker = Tracker(K, 30.0, detector, aligner)
    shot = lasers.Lasers().shot(30)
    spent = {}
    drawn = []

    def timed(name, work, *arguments):
        start = time.perf_counter()
        result = work(*arguments)
        spent.setdefault(name, []).append((time.perf_counter() - start) * 1000)
        return result

    for path in paths[30 : 30 + count]:
        image = timed("read_jpeg", xu.read_image, path)
        square = letterbox(image, detector.search_size)[0]
        close = xu.crop_image(image, (64, 64), 128)
        timed("network_192_px", detector.heatmaps, square[None])
        timed("network_128_px", detector.heatmaps, close[None])

        keypoints, confidence, sigma = timed("detector", detector, image)
        estimate = timed("pnp", xu.estimate_pose, keypoints, K, confidence, sigma)
        tracked = timed("track", tracker.update, image)
        if tracked.pose is not None:
            timed("align_step", aligner.track, image, tracked.pose, K, tracked.covariance)
        if estimate.pose is not None and len(drawn) % 8 == 0:
            timed("verify", aligner.verify, image, estimate, K)

        bolts = shot.step(tracked.pose)
        arguments = image, bolts, lasers.Lasers(), mesh, tracked.pose, K
        drawn.append(timed("draw", lasers.draw_shot, *arguments))

    with tempfile.TemporaryDirectory() as folder:
        timed("write_mp4", film.write_clip, drawn, Path(folder) / "a.mp4", 30)
    spent["write_mp4"] = [spent["write_mp4"][0] / count]
    return {name: float(np.mean(values)) for name, values in spent.items()}


def run(work, *arguments):
    """Run a function of RUNS in a process of its own; return its result and its peak memory."""
    command = [sys.executable, __file__, "--run", work.__name__, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description="Measure how fast the tracker is.")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument(
        "--count", type=int, default=300, help="frames of the short run; the long: ten times"
    )
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

    if options.run:
        name, *arguments = options.run
        result = RUNS[name](*map(int, arguments))
        result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result))
        return

    figures = print_stages(min(options.count, 150)) | print_runs(options.count)
    ratio = figures["live.fps"] / figures["plain.fps"]
    print(f"\nlive is {ratio:.1f} times as fast as the plain program")
    if options.json:
        xu.write_files({options.json: json.dumps(figures, indent=1) + "\n"})


def print_stages(count):
    """Run the stages and print their table; return the figures of the JSON file."""
    figures = {}
    print("| stage, one after another | ms a frame |\n|---|---|")
    for name, value in run(stages, count).items():
        if name != "peak_mb":
            figures[f"stage.{name}"] = value
            print(f"| {name} | {value:.2f} |")
    return figures


def print_runs(count):
    """Run tracker and plain program end to end and print their table; return the JSON figures."""
    figures = {}
    print("\n| end to end | frames | frames a second | peak memory, MB | |\n|---|---|---|---|---|")
    for name, work, *arguments in (
        ("live", live, count),
        ("long", live, 10 * count),
        ("object", own_object, min(count, 100)),
        ("plain", plain, count // 5),
        ("1280x720", large, count // 3, 1280, 720),
        ("3840x2160", large, count // 6, 3840, 2160),
    ):
        result = run(work, *arguments)
        figures |= {f"{name}.{key}": value for key, value in result.items()}
        fps = result.pop("fps")
        peak = result.pop("peak_mb")
        more = ", ".join(f"{key} {value:.3g}" for key, value in result.items())
        print(f"| {name} | {arguments[0]} | {fps:.1f} | {peak:.0f} | {more} |", flush=True)
    return figures


RUNS = {work.__name__: work for work in (stages, live, own_object, plain, large)}

if __name__ == "__main__":
    main()
