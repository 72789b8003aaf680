"""What a training step costs, what encoders, losses and augmentations do: the tables of weights/README.md.

Training is on frames of data/train/ (else data/sample/), on squares of 128 pixels, from scratch with Adam at
1e-3 but for the augmentations. Errors are medians over 128 frames that are not trained on, in pixels, with
batch statistics: the moving averages of the batch normalisation lag for the first few hundred steps.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

import xwing_utils as xu
from xwing.evaluation import evaluate_folder
from xwing.mesh import load_mesh
from xwing.metrics import corner_report, summarise
from xwing.synthesis import Randomiser
from xwing.training import publish_weights

SIZE, BATCH, KEPT, SIGMA = 128, 16, 128, 4.0
AUGMENTATIONS = (
    "geometry",
    "flare",
    "light",
    "colour",
    "sharpness",
    "noise",
    "erasing",
    "compression",
)
FULL_DECODER = (256, 128, 64, 32, 16)  # segmentation_models' own
STEPS = {  # name -> (precision, arguments of build_model)
    "float32, decoder of segmentation_models, maps of the frame's size": (
        "float32",
        dict(decoder_filters=FULL_DECODER, stride=1),
    ),
    "the same in mixed_bfloat16": ("mixed_bfloat16", dict(decoder_filters=FULL_DECODER, stride=1)),
    "... and the smaller decoder": ("mixed_bfloat16", dict(stride=1)),
    "... and maps of half the size (as shipped)": ("mixed_bfloat16", {}),
}


class Frames:
    """Batches of augmented frames from the training part, and the frames that are kept to measure."""

    def __init__(self):
        train = xu.ROOT / "data" / "train"
        folder = train if train.exists() else xu.ROOT / "data" / "sample"
        paths, matrices = xu.load_dataset(folder)
        camera, options = xu.load_camera(folder), dict(batch_size=BATCH, size=SIZE, crop=True)
        randomise = Randomiser(load_mesh(xu.ROOT / "data" / "xwing.obj"))
        self.name, self.count = folder.name, len(paths) - KEPT
        trained, kept = slice(None, -KEPT), slice(-KEPT, None)
        self.parts = paths[trained], matrices[trained], *camera
        self.batches = xu.make_dataset(*self.parts, **options, randomise=randomise, shares=(0.3, 0))
        held = xu.make_dataset(paths[kept], matrices[kept], *camera, augmented=False, **options)
        self.images, self.truth = (
            np.concatenate(part) for part in zip(*(held[i] for i in range(len(held))))
        )

    def __iter__(self):
        """Endless batches, epoch after epoch, and the seconds that each took to make."""
        while True:
            for i in range(self.count // BATCH):
                start = time.perf_counter()
                batch = self.batches[i]
                yield batch, time.perf_counter() - start
            self.batches.on_epoch_end()


def build(
    backbone=xu.BACKBONE,
    precision="mixed_bfloat16",
    kind="softmax",
    sigma=SIGMA,
    rate=1e-3,
    **arguments,
):
    """A fresh network, compiled for one of the losses."""
    keras = xu.import_keras()
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(precision)
    head = "softmax" if kind == "softmax" else "linear"
    model = xu.build_model(backbone, sigma=sigma, size=SIZE, head=head, **arguments)
    return xu.compile_model(model, rate, xu.HeatmapLoss(sigma, kind, model.settings["stride"]))


def train(model, frames, seconds=np.inf, steps=np.inf):
    """Train until either is over; the steps done, and the seconds of the network and of making batches."""
    network, making, done = 0.0, 0.0, 0
    for (images, keypoints), made in frames:
        start = time.perf_counter()
        model.train_on_batch(images, keypoints)
        if done:  # the first step traces the graph
            network, making = network + time.perf_counter() - start, making + made
        done += 1
        if network + making >= seconds or done >= steps:
            return done, network, making


def judge(model, frames):
    """The corner report of the kept frames, and the mean squared errors of the maps and of empty ones."""
    stride, truth = model.settings["stride"], frames.truth[:, :8, :2]
    batches = np.split(frames.images, range(BATCH, KEPT, BATCH))
    maps = np.concatenate([np.asarray(model(batch, training=True)) for batch in batches])[..., :8]
    found, _ = xu.decode_heatmaps(maps, SIGMA / stride)
    size, sigma = SIZE // stride, SIGMA / stride
    true = np.stack([xu.gaussian_heatmaps(points / stride, size, sigma) for points in truth])
    seen = xu.in_frame(truth, SIZE, SIZE)
    errors = [np.square(guess - true).mean((1, 2))[seen].mean() for guess in (maps, 0)]
    return corner_report(found * stride, truth, SIZE), errors


def profile(frames, steps):
    """Print the cost of a step, from the plain network to the shipped one."""
    print("\n| training step | encoder | ms in the network | ms to make a batch (one thread) |")
    print("|---|---|---|---|")
    for name, (precision, arguments) in STEPS.items():
        for backbone in (xu.BACKBONE, "efficientnetb0"):
            done, network, making = train(
                build(backbone, precision, **arguments), frames, steps=steps
            )
            each = f"{1e3 * network / (done - 1):.0f} | {1e3 * making / (done - 1):.0f}"
            print(f"| {name} | {backbone} | {each} |", flush=True)


def encoders(frames, seconds):
    """Print what each encoder reaches in the same time."""
    print(f"\n| encoder, {seconds:.0f} s | steps | ms a step | corner error | best permutation |")
    print("|---|---|---|---|---|")
    for backbone in ("resnet18", "mobilenetv2", "efficientnetb0"):
        model = build(backbone)
        done, network, making = train(model, frames, seconds=seconds)
        (report, _), each = judge(model, frames), 1e3 * (network + making) / (done - 1)
        errors = f"{report['corner_px']:.1f} px | {report['best_permutation_px']:.1f} px"
        print(f"| {backbone} | {done} | {each:.0f} | {errors} |", flush=True)


def losses(frames, steps):
    """Print what each loss reaches in the same number of steps."""
    print(
        f"\n| loss, {steps} steps | corner error | best permutation | MSE of the maps | of empty maps |"
    )
    print("|---|---|---|---|---|")
    for kind in ("softmax", "mse", "weighted"):
        model = build(kind=kind)
        train(model, frames, steps=steps)
        report, (error, empty) = judge(model, frames)
        errors = f"{report['corner_px']:.1f} px | {report['best_permutation_px']:.1f} px"
        print(f"| {kind} | {errors} | {error:.5f} | {empty:.5f} |", flush=True)


def augmentations(frames, steps):
    """Print what the shipped weights know of other looks after more training without one augmentation."""
    shifted, weights = xu.ROOT / "data" / "shifted", xu.ROOT / "weights" / "xwing.weights.h5"
    paths, matrices = xu.load_dataset(shifted)
    truth = xu.keypoints_of(matrices, *xu.load_camera(shifted))
    images = np.stack([xu.read_image(path) for path in paths])
    keras, whole = xu.import_keras(), xu.load_model(weights)
    shipped, sigma = whole.get_weights(), whole.settings["sigma"]
    rate = keras.optimizers.schedules.CosineDecay(
        2e-5, steps, 0.01, warmup_target=4e-4, warmup_steps=50
    )
    print(f"\n| left out for {steps} steps | seed | corner error | within 5 px | wrong way round |")
    print("|---|---|---|---|---|")
    rows = [("(before)", 0), ("nothing", 0), ("nothing", 1), *((name, 0) for name in AUGMENTATIONS)]
    for name, seed in rows:
        if name != "(before)":
            model = build(sigma=sigma, rate=rate)
            model.set_weights(shipped)
            without = [name] if name in AUGMENTATIONS else []
            batches = xu.make_dataset(
                *frames.parts,
                BATCH,
                SIZE,
                True,
                without=without,
                seed=seed,
                epoch_size=BATCH * steps,
            )
            model.fit(batches, verbose=0, shuffle=False)
            whole.set_weights(model.get_weights())
        report = corner_report(xu.predict_keypoints(whole, images)[0], truth)
        wrong = sum(report["permutations"].values()) - report["permutations"]["identity"]
        print(
            f"| {name} | {seed} | {report['corner_px']:.2f} px | {report['within_5px']:.1%} | {wrong} |",
            flush=True,
        )


def recipes():
    """Write to weights/recipes.csv what the runs `classic` and `shipped` of train.ipynb reach on data/test/.

    Poses are those of the keypoints alone. The row of a run that is not in runs/ stays as it is.
    Raises FileNotFoundError where there is neither a run nor a row.
    """
    table = xu.ROOT / "weights" / "recipes.csv"
    rows = pd.read_csv(table, index_col="recipe").T.to_dict() if table.exists() else {}
    for name in ("classic", "shipped"):
        if not (run := xu.ROOT / "runs" / name).exists():
            continue
        with tempfile.TemporaryDirectory() as folder:  # as published: for whole frames
            publish_weights(run, folder)
            model = xu.load_model(Path(folder) / "xwing.weights.h5")
        log, found = pd.read_csv(run / "log.csv"), evaluate_folder(xu.ROOT / "data" / "test", model)
        samples = log.samples_seen.diff().fillna(log.samples_seen)  # of each epoch
        rows[name] = {
            "samples": log.samples_seen.iloc[-1],
            "minutes": (samples / log.samples_per_second).sum() / 60,
            "loss": log.loss[log.val_corner_px.idxmin()],
            **summarise(found.errors()),
        }
    if not rows:
        raise FileNotFoundError("neither runs/classic/ nor runs/shipped/; see weights/README.md")
    columns = [
        "samples",
        "minutes",
        "loss",
        "heatmap_mse_sigma10",
        "corner_px_median",
        "corners_within_5px",
        "poses_found",
        "flips",
        "rotation_deg_median",
    ]
    result = pd.DataFrame(rows).T[columns]
    text = result.to_csv(index_label="recipe", float_format="%.6g", lineterminator="\n")
    xu.write_files({table: text})
    print(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=90, help="of training for each encoder")
    parser.add_argument("--steps", type=int, default=120, help="of training for each loss")
    parser.add_argument("--left-out", type=int, default=500, help="steps without each augmentation")
    parser.add_argument("--profile", type=int, default=6, help="steps for each row of the profile")
    parser.add_argument(
        "--only",
        choices=["profile", "encoders", "losses", "augmentations", "recipes"],
        help="one table; recipes needs two runs of train.ipynb, see weights/README.md",
    )
    a = parser.parse_args()
    if a.only == "recipes":
        return recipes()
    frames = Frames()
    print(f"{frames.count} frames of data/{frames.name}/, batches of {BATCH} squares of {SIZE} px")
    for name, run, amount in (
        ("profile", profile, a.profile),
        ("encoders", encoders, a.seconds),
        ("losses", losses, a.steps),
        ("augmentations", augmentations, a.left_out),
    ):
        if a.only in (None, name):
            run(frames, amount)


if __name__ == "__main__":
    main()
