"""What a training step costs, and what encoders and losses reach in equal time or steps: `make compare` prints the tables of weights/README.md.

Everything starts from scratch on frames of data/train/ (else data/sample/), on squares of 128 pixels, with Adam 1e-3. Errors are medians over 128
frames that are not trained on, in pixels, with batch statistics: the moving averages of the batch normalisation lag for the first few hundred steps.
"""

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("SM_FRAMEWORK", "tf.keras")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np  # noqa: E402

import xwing_utils as xu  # noqa: E402

SIZE, BATCH, KEPT, SIGMA = 128, 16, 128, 4.0
FULL_DECODER = (256, 128, 64, 32, 16)  # segmentation_models' own
STEPS = {  # name -> (precision, arguments of build_model)
    "float32, decoder of segmentation_models, maps of the frame's size": ("float32", dict(decoder_filters=FULL_DECODER, stride=1)),
    "the same in mixed_bfloat16": ("mixed_bfloat16", dict(decoder_filters=FULL_DECODER, stride=1)),
    "... and the smaller decoder": ("mixed_bfloat16", dict(stride=1)),
    "... and maps of half the size (as shipped)": ("mixed_bfloat16", {}),
}


class Frames:
    """Batches of augmented frames from the training part, and the frames that are kept to measure."""

    def __init__(self):
        train = ROOT / "data" / "train"
        folder = train if train.exists() else ROOT / "data" / "sample"
        paths, matrices = xu.load_dataset(folder)
        camera, options = xu.load_camera(folder), dict(batch_size=BATCH, size=SIZE, crop=True)
        mesh = xu.load_mesh(ROOT / "data" / "xwing.obj")
        self.name, self.count = folder.name, len(paths) - KEPT
        self.batches = xu.make_dataset(paths[:-KEPT], matrices[:-KEPT], *camera, mesh=mesh, **options)
        held = xu.make_dataset(paths[-KEPT:], matrices[-KEPT:], *camera, augmented=False, **options)
        self.images, self.truth = (np.concatenate(part) for part in zip(*(held[i] for i in range(len(held)))))

    def __iter__(self):
        """Endless batches, epoch after epoch, and the seconds that each took to make."""
        while True:
            for i in range(self.count // BATCH):
                start = time.perf_counter()
                batch = self.batches[i]
                yield batch, time.perf_counter() - start
            self.batches.on_epoch_begin()


def build(backbone=xu.BACKBONE, precision="mixed_bfloat16", kind="softmax", **arguments):
    keras = xu.import_keras()
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(precision)
    model = xu.build_model(backbone, sigma=SIGMA, size=SIZE, head="softmax" if kind == "softmax" else "linear", **arguments)
    return xu.compile_model(model, 1e-3, xu.HeatmapLoss(SIGMA, kind, model.settings["stride"]))


def train(model, frames, seconds=np.inf, steps=np.inf):
    """Train until either is over: the number of steps, and the seconds of network and of batch making. The first step, which traces, is not timed."""
    network, making, done = 0.0, 0.0, 0
    for (images, keypoints), made in frames:
        start = time.perf_counter()
        model.train_on_batch(images, keypoints)
        if done:
            network, making = network + time.perf_counter() - start, making + made
        done += 1
        if network + making >= seconds or done >= steps:
            return done, network, making


def judge(model, frames):
    """The corner report of the kept frames, and the error of the maps and of empty ones."""
    maps = np.concatenate([np.asarray(model(frames.images[i : i + BATCH], training=True)) for i in range(0, KEPT, BATCH)])[..., :8]
    found, _ = xu.decode_heatmaps(maps, SIGMA / model.settings["stride"])
    truth, stride = frames.truth[:, :8, :2], model.settings["stride"]
    true_maps = np.stack([xu.gaussian_heatmaps(points / stride, SIZE // stride, SIGMA / stride) for points in truth])
    seen = xu.in_frame(truth, SIZE, SIZE)
    errors = [((np.moveaxis(m, -1, 1) - np.moveaxis(true_maps, -1, 1)) ** 2).mean((2, 3))[seen].mean() for m in (maps, 0 * maps)]
    return xu.corner_report(found * stride, truth, SIZE), errors


def profile(frames, steps):
    print("\n| training step | encoder | ms in the network | ms to make a batch (one thread) |\n|---|---|---|---|")
    for name, (precision, arguments) in STEPS.items():
        for backbone in (xu.BACKBONE, "efficientnetb0"):
            done, network, making = train(build(backbone, precision, **arguments), frames, steps=steps)
            print(f"| {name} | {backbone} | {1e3 * network / (done - 1):.0f} | {1e3 * making / (done - 1):.0f} |", flush=True)


def encoders(frames, seconds):
    print(f"\n| encoder, {seconds:.0f} s | steps | ms a step | corner error | to the nearest corner |\n|---|---|---|---|---|")
    for backbone in ("resnet18", "mobilenetv2", "efficientnetb0"):
        model = build(backbone)
        done, network, making = train(model, frames, seconds=seconds)
        (report, _), each = judge(model, frames), 1e3 * (network + making) / (done - 1)
        print(f"| {backbone} | {done} | {each:.0f} | {report['corner_px']:.1f} px | {report['nearest_px']:.1f} px |", flush=True)


def losses(frames, steps):
    print(f"\n| loss, {steps} steps | corner error | to the nearest corner | MSE of the maps | of empty maps |\n|---|---|---|---|---|")
    for kind in ("softmax", "mse", "weighted"):
        model = build(kind=kind)
        train(model, frames, steps=steps)
        report, (error, empty) = judge(model, frames)
        print(f"| {kind} | {report['corner_px']:.1f} px | {report['nearest_px']:.1f} px | {error:.5f} | {empty:.5f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=90, help="of training for each encoder")
    parser.add_argument("--steps", type=int, default=120, help="of training for each loss")
    parser.add_argument("--profile", type=int, default=6, help="steps for each row of the profile")
    parser.add_argument("--only", choices=["profile", "encoders", "losses"])
    a = parser.parse_args()
    frames = Frames()
    print(f"{frames.count} frames of data/{frames.name}/, batches of {BATCH} squares of {SIZE} px")
    for name, run, amount in (("profile", profile, a.profile), ("encoders", encoders, a.seconds), ("losses", losses, a.steps)):
        if a.only in (None, name):
            run(frames, amount)


if __name__ == "__main__":
    main()
