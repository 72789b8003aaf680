"""Measure what a training step costs and what encoders, losses and augmentations do for the result.

It prints the tables of weights/EXPERIMENTS.md. Networks are trained from scratch with Adam at 1e-3,
on squares of 128 pixels that are cut from the frames of data/train/ (or of data/sample/, where that
folder is missing). Errors are medians in pixels over 128 frames that are not trained on. They are
measured with batch statistics, because the moving averages of the batch normalisation lag for the
first few hundred steps. The table of the augmentations differs: it continues from the shipped
weights and measures data/shifted/.
"""

import argparse
import dataclasses
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

keras = xu.import_keras()
SIZE = 128  # pixels, width and height of the squares
BATCH = 16
KEPT = 128  # frames that are not trained on
SIGMA = 4.0  # pixels, of the heatmaps' Gaussians
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
    """Batches of augmented frames from the training part, and the frames kept to measure."""

    def __init__(self):
        train = xu.ROOT / "data" / "train"
        folder = train if train.exists() else xu.ROOT / "data" / "sample"
        paths, matrices = xu.load_dataset(folder)
        camera = xu.load_camera(folder)
        self.name = folder.name
        self.count = len(paths) - KEPT

        options = dict(batch_size=BATCH, size=SIZE, crop=True)
        self.parts = paths[:-KEPT], matrices[:-KEPT], *camera
        randomise = Randomiser(load_mesh(xu.ROOT / "data" / "xwing.obj"))
        self.batches = xu.make_dataset(*self.parts, **options, randomise=randomise, shares=(0.3, 0))

        kept = paths[-KEPT:], matrices[-KEPT:], *camera
        held = xu.make_dataset(*kept, augmented=False, **options)
        images, truth = zip(*(held[i] for i in range(len(held))))
        self.images = np.concatenate(images)
        self.truth = np.concatenate(truth)

    def __iter__(self):
        """Endless batches, epoch after epoch, and the seconds that it took to make each."""
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
    """An untrained network, compiled with one of the losses."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(precision)
    head = "softmax" if kind == "softmax" else "linear"
    model = xu.build_model(backbone, sigma=sigma, size=SIZE, head=head, **arguments)
    return xu.compile_model(model, rate, xu.HeatmapLoss(sigma, kind, model.settings["stride"]))


@dataclasses.dataclass
class Timing:
    """Steps of a training, and the seconds of all but the first one, which traces the graph."""

    steps: int = 0
    network: float = 0.0  # seconds
    batches: float = 0.0  # seconds to make them

    @property
    def network_ms(self):
        """Milliseconds of the network in a step."""
        return 1e3 * self.network / (self.steps - 1)

    @property
    def batches_ms(self):
        """Milliseconds to make a batch."""
        return 1e3 * self.batches / (self.steps - 1)


def train(model, frames, seconds=np.inf, steps=np.inf):
    """Train for a number of seconds or of steps, whichever ends first; return the `Timing`."""
    timing = Timing()
    for (images, keypoints), made in frames:
        start = time.perf_counter()
        model.train_on_batch(images, keypoints)
        if timing.steps:
            timing.network += time.perf_counter() - start
            timing.batches += made
        timing.steps += 1
        if timing.network + timing.batches >= seconds or timing.steps >= steps:
            return timing


def judge(model, frames):
    """The corner report of the kept frames, and the MSE of the heatmaps and of empty ones."""
    stride = model.settings["stride"]
    size = SIZE // stride
    sigma = SIGMA / stride
    batches = np.split(frames.images, range(BATCH, KEPT, BATCH))
    maps = np.concatenate([np.asarray(model(batch, training=True)) for batch in batches])[..., :8]
    found, _ = xu.decode_heatmaps(maps, sigma)

    truth = frames.truth[:, :8, :2]
    true = np.stack([xu.gaussian_heatmaps(points / stride, size, sigma) for points in truth])
    seen = xu.in_frame(truth, SIZE, SIZE)
    errors = [np.square(guess - true).mean((1, 2))[seen].mean() for guess in (maps, 0)]
    return corner_report(found * stride, truth, SIZE), errors


def print_row(*cells):
    """Print a row of a table in Markdown, at once."""
    print("| " + " | ".join(cells) + " |", flush=True)


def print_head(*cells):
    """Print the head of a table in Markdown."""
    print()
    print_row(*cells)
    print("|" + "---|" * len(cells))


def profile(frames, steps):
    """Print what a step costs, from the plain network to the shipped one."""
    print_head("training step", "encoder", "ms in the network", "ms to make a batch (one thread)")
    for name, (precision, arguments) in STEPS.items():
        for backbone in (xu.BACKBONE, "efficientnetb0"):
            model = build(backbone, precision, **arguments)
            timing = train(model, frames, steps=steps)
            print_row(name, backbone, f"{timing.network_ms:.0f}", f"{timing.batches_ms:.0f}")


def encoders(frames, seconds):
    """Print what each encoder reaches in the same time."""
    print_head(
        f"encoder, {seconds:.0f} s", "steps", "ms a step", "corner error", "best permutation"
    )
    for backbone in ("resnet18", "mobilenetv2", "efficientnetb0"):
        model = build(backbone)
        timing = train(model, frames, seconds=seconds)
        report, _ = judge(model, frames)
        print_row(
            backbone,
            f"{timing.steps}",
            f"{timing.network_ms + timing.batches_ms:.0f}",
            f"{report['corner_px']:.1f} px",
            f"{report['best_permutation_px']:.1f} px",
        )


def losses(frames, steps):
    """Print what each loss reaches in the same number of steps."""
    print_head(
        f"loss, {steps} steps",
        "corner error",
        "best permutation",
        "MSE of the maps",
        "of empty maps",
    )
    for kind in ("softmax", "mse", "weighted"):
        model = build(kind=kind)
        train(model, frames, steps=steps)
        report, (error, empty) = judge(model, frames)
        print_row(
            kind,
            f"{report['corner_px']:.1f} px",
            f"{report['best_permutation_px']:.1f} px",
            f"{error:.5f}",
            f"{empty:.5f}",
        )


def augmentations(frames, steps):
    """Print the errors on data/shifted after more training of the shipped weights.

    For each row one augmentation is left out of that training.
    """
    shifted = xu.ROOT / "data" / "shifted"
    paths, matrices = xu.load_dataset(shifted)
    truth = xu.keypoints_of(matrices, *xu.load_camera(shifted))
    images = np.stack([xu.read_image(path) for path in paths])
    whole = xu.load_model(xu.ROOT / "weights" / "xwing.weights.h5")  # for whole frames
    shipped = whole.get_weights()

    print_head(
        f"left out for {steps} steps", "seed", "corner error", "within 5 px", "corners exchanged"
    )
    print_row("(before)", "0", *_shifted_errors(whole, images, truth))
    rows = [("nothing", 0), ("nothing", 1), *((name, 0) for name in AUGMENTATIONS)]
    for name, seed in rows:
        without = [name] if name in AUGMENTATIONS else []
        whole.set_weights(_train_on(shipped, whole.settings["sigma"], frames, steps, without, seed))
        print_row(name, f"{seed}", *_shifted_errors(whole, images, truth))


def _train_on(weights, sigma, frames, steps, without, seed):
    """The weights of a network after more training, without some augmentations."""
    rate = keras.optimizers.schedules.CosineDecay(
        2e-5, steps, 0.01, warmup_target=4e-4, warmup_steps=50
    )
    model = build(sigma=sigma, rate=rate)
    model.set_weights(weights)
    batches = xu.make_dataset(
        *frames.parts, BATCH, SIZE, True, without=without, seed=seed, epoch_size=BATCH * steps
    )
    model.fit(batches, verbose=0, shuffle=False)
    return model.get_weights()


def _shifted_errors(model, images, truth):
    """Cells of a row: median corner error, corners within 5 px, frames with exchanged corners."""
    found, _ = xu.predict_keypoints(model, images)
    report = corner_report(found, truth)
    permutations = report["permutations"]
    wrong = sum(permutations.values()) - permutations["identity"]
    return f"{report['corner_px']:.2f} px", f"{report['within_5px']:.1%}", f"{wrong}"


def recipes():
    """Measure the runs `classic` and `shipped` of train.ipynb on data/test/.

    Poses are those of the keypoints alone. The result goes to weights/recipes.csv; the row of a run
    that is not in runs/ stays as it is.

    Raises:
        FileNotFoundError: there is neither a run nor a row.
    """
    table = xu.ROOT / "weights" / "recipes.csv"
    rows = pd.read_csv(table, index_col="recipe").T.to_dict() if table.exists() else {}
    for name in ("classic", "shipped"):
        run = xu.ROOT / "runs" / name
        if run.exists():
            rows[name] = _recipe(run)
    if not rows:
        raise FileNotFoundError(
            "neither runs/classic/ nor runs/shipped/; see weights/EXPERIMENTS.md"
        )

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


def _recipe(run):
    """The row of a run: what its training took, and what its weights reach."""
    with tempfile.TemporaryDirectory() as folder:  # as published: for whole frames
        publish_weights(run, folder)
        model = xu.load_model(Path(folder) / "xwing.weights.h5")
    found = evaluate_folder(xu.ROOT / "data" / "test", model)

    log = pd.read_csv(run / "log.csv")
    samples = log.samples_seen.diff().fillna(log.samples_seen)  # of each epoch
    return {
        "samples": log.samples_seen.iloc[-1],
        "minutes": (samples / log.samples_per_second).sum() / 60,
        "loss": log.loss[log.val_corner_px.idxmin()],
        **summarise(found.errors()),
    }


def main():
    """Print the tables that the command line asks for."""
    parser = argparse.ArgumentParser(description="Measure training steps and recipes.")
    parser.add_argument("--seconds", type=float, default=90, help="of training for each encoder")
    parser.add_argument("--steps", type=int, default=120, help="of training for each loss")
    parser.add_argument("--left-out", type=int, default=500, help="steps without each augmentation")
    parser.add_argument("--profile", type=int, default=6, help="steps for each row of the profile")
    parser.add_argument(
        "--only",
        choices=["profile", "encoders", "losses", "augmentations", "recipes"],
        help="one table; recipes needs two runs of train.ipynb, see weights/EXPERIMENTS.md",
    )
    arguments = parser.parse_args()
    if arguments.only == "recipes":
        return recipes()

    frames = Frames()
    print(f"{frames.count} frames of data/{frames.name}/, batches of {BATCH} squares of {SIZE} px")
    tables = (
        ("profile", profile, arguments.profile),
        ("encoders", encoders, arguments.seconds),
        ("losses", losses, arguments.steps),
        ("augmentations", augmentations, arguments.left_out),
    )
    for name, show, amount in tables:
        if arguments.only in (None, name):
            show(frames, amount)


if __name__ == "__main__":
    main()
