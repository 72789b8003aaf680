"""How fast the tracker is, stage by stage and end to end: `make bench`.

Every run is a process of its own on two cores, so that its peak memory is its own. The plain way that it is compared with does the same job with the
tools that come first to hand: Keras `predict` frame by frame, whole-pixel argmax in Python, cv2.solvePnP, matplotlib figures, a GIF; it neither
filters nor hides bolts.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("SM_FRAMEWORK", "tf.keras")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np  # noqa: E402

import xwing_utils as xu  # noqa: E402

WEIGHTS = Path(os.environ.get("XWING_WEIGHTS") or ROOT / "weights" / "xwing.weights.h5")
FRAMES = ROOT / "data" / "frames"


def repeated(count):
    """The clip, forwards and backwards and forwards, until there are so many frames."""
    paths = xu.list_frames(FRAMES)
    lap = paths + paths[-2:0:-1]
    for i in range(count):
        try:
            yield xu.read_image(lap[i % len(lap)]), ""
        except ValueError as error:
            yield None, str(error)


def camera():
    return xu.camera_matrix(xu.load_camera(FRAMES)[1], xu.FRAME_SIZE, xu.FRAME_SIZE)


def streaming(count, precision="f32", batch=1):
    detector, mesh = xu.Detector(WEIGHTS, precision=precision, batch=batch), xu.load_mesh(ROOT / "data" / "xwing.obj")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        track = xu.film(repeated(count), detector, xu.Tracker(camera()), Path(folder) / "a.mp4", mesh=mesh, progress=False)
        return {"seconds": time.perf_counter() - start, "tracked": sum(t.status == "tracked" for t in track)}


def plain(count):
    import cv2
    import imageio.v2 as imageio
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    model, K, mapped = xu.load_model(WEIGHTS, xu.FRAME_SIZE), camera(), 0
    model.predict(np.zeros((1, 256, 256, 3), np.uint8), verbose=0)  # the first call builds the graph
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        pictures, stride = [], model.settings["stride"]
        for image, _ in repeated(count):
            heatmaps = model.predict(image[None], verbose=0)[0]
            found = []
            for k in range(8):
                best = max((heatmaps[row, column, k], row, column) for row in range(heatmaps.shape[0]) for column in range(heatmaps.shape[1]))
                found.append(((best[2] + 0.5) * stride, (best[1] + 0.5) * stride, best[0]))
            good = [i for i in range(8) if found[i][2] > 0.1]
            figure = plt.figure(figsize=(2.56, 2.56), dpi=100)
            axis = figure.add_axes((0, 0, 1, 1))
            axis.imshow(image), axis.axis("off")
            if len(good) >= 6:
                _, turn, move = cv2.solvePnP(xu.BOUNDING_BOX[good], np.array(found)[good, :2].copy(), K, None)
                mapped += 1
                for muzzle, aim in xu.LASERS:
                    line = cv2.projectPoints(np.array([muzzle, aim]), turn, move, K, None)[0][:, 0]
                    axis.plot(*line.T, color="red")
            axis.set(xlim=(0, 256), ylim=(256, 0))
            figure.savefig(Path(folder) / "frame.png")
            plt.close(figure)
            pictures.append(imageio.imread(Path(folder) / "frame.png")[..., :3])
        imageio.mimsave(Path(folder) / "a.gif", pictures, duration=40)
        return {"seconds": time.perf_counter() - start, "tracked": mapped}


def stages(count):
    """Milliseconds a frame of each stage on its own, one after another."""
    detector, K, mesh = xu.Detector(WEIGHTS), camera(), xu.load_mesh(ROOT / "data" / "xwing.obj")
    triangles, tracker, lasers, aligner = xu.occluder(mesh), xu.Tracker(K), xu.Lasers(), xu.Aligner(mesh)
    spent, frames, drawn = {}, [], []

    def timed(name, work, *arguments):
        start = time.perf_counter()
        result = work(*arguments)
        spent[name] = spent.get(name, 0.0) + (time.perf_counter() - start) * 1000 / count
        return result

    paths, stride, sigma = xu.list_frames(FRAMES)[:count], detector.settings["stride"], detector.settings["sigma"]
    search, window = f"network, search ({detector.search} px)", detector.windows[-1]
    tracked = None
    for path in paths:
        frames.append(timed("read the JPEG", xu.read_image, path))
        timed(search, detector.heatmaps, xu.letterbox(frames[-1], detector.search)[0][None])
        close = timed(f"network, close look ({window} px)", detector.heatmaps, xu.crop(frames[-1], (64, 64), window)[None])[0]
        timed("corners, close look", lambda m: xu.heatmap_covariance(m, xu.decode_heatmaps(m, sigma / stride)[0], sigma / stride, 20 / stride), close)
        tracked = timed("pose and filter", tracker.update, *detector(frames[-1]))
        if tracked.pose is not None:
            timed("align one pose on the pixels (finished clips only)", aligner, frames[-1], tracked.pose, K, tracked.covariance)
        bolts = lasers.step(tracked.pose)
        depth = timed("depth of the hull", xu._depth_about, bolts, triangles, tracked.pose, K, 256, 256)
        drawn.append(timed("draw", xu.draw_bolts, frames[-1], bolts, K, depth))
    with tempfile.TemporaryDirectory() as folder:
        timed("write MP4", xu._write_mp4, drawn, Path(folder) / "a.mp4", 30)
    return spent


RUNS = {"streaming": streaming, "batches of 4": lambda count: streaming(count, batch=4), "streaming, bf16": lambda count: streaming(count, "bf16"),
        "batches of 4, bf16": lambda count: streaming(count, "bf16", 4), "plain": plain, "stages": stages}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", choices=RUNS)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--long", type=int, default=3000, help="frames of the long run")
    arguments = parser.parse_args()
    if arguments.run:
        result = RUNS[arguments.run](arguments.count)
        print(json.dumps({"result": result, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    cores = sorted(os.sched_getaffinity(0))[:2]
    xu.export_model(WEIGHTS)

    def run(name, count):
        done = subprocess.run([sys.executable, __file__, "--run", name, "--count", str(count)], check=True, capture_output=True, text=True,
                              preexec_fn=lambda: os.sched_setaffinity(0, cores))
        return json.loads(done.stdout.strip().splitlines()[-1])

    print(f"on {len(cores)} cores\n\n| stage, one after another | ms a frame |\n|---|---|")
    for stage, ms in run("stages", min(arguments.count, 200))["result"].items():
        print(f"| {stage} | {ms:.1f} |", flush=True)
    print("\n| end to end | frames | frames a second | measured | peak memory, MB |\n|---|---|---|---|---|")
    speed = {}
    short, long = arguments.count, arguments.long
    for name, count in (("streaming", short), ("streaming", long), ("batches of 4", short), ("batches of 4", long), ("streaming, bf16", short),
                        ("batches of 4, bf16", short), ("plain", min(short, 60))):
        done = run(name, count)
        speed.setdefault(name, count / done["result"]["seconds"])
        rate, tracked, peak = count / done["result"]["seconds"], done["result"]["tracked"], done["peak_mb"]
        print(f"| {name} | {count} | {rate:.1f} | {tracked} | {peak:.0f} |", flush=True)
    print(f"\nstreaming is {speed['streaming'] / speed['plain']:.1f} times faster than the plain way")


if __name__ == "__main__":
    main()
