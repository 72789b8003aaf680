"""Training, as a run that lives in a folder.

A run can be killed at any moment and loses no more than the epoch under way. After each epoch one
file, `backup.weights.h5`, is replaced as a whole. It holds weights, optimizer and log, so they
cannot disagree. `log.csv` and the best weights follow from it: if the run is killed before they are
written, the next start writes them. The backup also records what the run began from, the stages of
earlier training and their log, as it was at the start. So published weights describe their whole
training, and publishing a run twice gives the same files as publishing it once.

Keras shares each batch among several accelerators of a machine and, with JAX, among machines.
"""

import contextlib
import csv
import fcntl
import functools
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import keras
import numpy as np
import pandas as pd
from scipy.spatial import cKDTree
from tqdm.keras import TqdmCallback

import xwing_utils as xu
from xwing.mesh import Mesh, visibility
from xwing.metrics import corner_report

_PROCESSES = int(os.environ.get("KERAS_DISTRIBUTION_NUM_PROCESSES") or 1)
if keras.backend.backend() == "jax" and _PROCESSES > 1:
    keras.distribution.initialize()  # as one of several workers, before JAX computes anything

BACKUP = "backup.weights.h5"

RECIPES = {  # settings of a training, by the names that notebooks/train.ipynb gives them
    "shipped": {
        "BACKBONE": xu.BACKBONE,
        "SIGMA": xu.SIGMA,
        "STRIDE": xu.STRIDE,
        "LOSS": "softmax",
        "RANDOMISED_SHARE": 0.15,
        "SYNTHETIC_SHARE": 0.5,
        "WITHOUT": "",
    },
    "classic": {  # as earlier work trained
        "BACKBONE": "efficientnetb0",
        "SIGMA": 10.0,
        "STRIDE": 1,
        "LOSS": "mse",
        "RANDOMISED_SHARE": 0.0,
        "SYNTHETIC_SHARE": 0.0,
        "WITHOUT": "geometry flare light colour sharpness noise erasing compression",
    },
}


class Interrupted(KeyboardInterrupt):
    """Training was stopped by hand; a notebook shows this one line instead of a traceback."""

    def _render_traceback_(self):  # IPython asks for it
        return [str(self)]


# ============================================================ a target to train for

SURFACE_SAMPLES = 20_000  # points of the visible surface
VIEWS = 60  # directions from which keypoints have to be in sight
MIN_IN_SIGHT = 4  # keypoints of the surface: fewer fix no pose
OFF_SURFACE = 0.05  # diameters: a keypoint further from the visible surface is seen from nowhere
OFF_MIRROR = 0.02  # diameters by which 1 % of the surface may differ from its mirror image


def check_target(target: xu.Target, mesh: Mesh) -> None:
    """Raise ValueError where a network cannot learn a target's keypoints.

    Each keypoint has to be in sight from somewhere, and enough of them from everywhere. A mirror
    has to map the mesh onto itself.

    Args:
        target: `Target`.
        mesh: of the target, from `load_mesh`.
    """
    _check_enough_in_sight(target)
    points = _visible_points(target, mesh)
    tree = cKDTree(points)
    _check_on_surface(target, tree)
    if target.mirror is None:
        return
    images = points @ target.mirror[:3, :3].T + target.mirror[:3, 3]
    apart = np.quantile(tree.query(images)[0], 0.99) / target.diameter
    if apart > OFF_MIRROR:
        raise ValueError(
            f"{target.name}: its mirror does not map the mesh onto itself: 1 % of the surface is "
            f"{apart:.2f} diameters or more from its mirror image; correct 'mirror', or set it to "
            "null"
        )


def _check_on_surface(target, tree):
    """Raise ValueError where a keypoint is far from the points of the visible surface in a tree."""
    distance = tree.query(target.keypoints[8:])[0] / target.diameter
    worst = distance.argmax()
    if distance[worst] > OFF_SURFACE:
        raise ValueError(
            f"{target.name}: no frame shows the keypoint {target.names[8 + worst]!r}, which lies "
            f"{distance[worst]:.2f} diameters from the surface that can be seen from outside; move "
            "it there, or leave 'keypoints' out"
        )


def _check_enough_in_sight(target):
    """Raise ValueError where too few keypoints of the surface face a viewer somewhere."""
    normals = target.normals[8:]
    directions = xu.fibonacci_sphere(VIEWS)
    # A flat target seen edge-on shows its keypoints just so.
    in_sight = ((normals @ directions.T > -0.2) | ~normals.any(1, keepdims=True)).sum(0)
    if in_sight.min() < MIN_IN_SIGHT:
        view = ", ".join(f"{value:.1f}" for value in directions[in_sight.argmin()])
        raise ValueError(
            f"{target.name}: from the direction ({view}) only {in_sight.min()} of the "
            f"{len(normals)} keypoints of its surface are in sight, and a pose needs "
            f"{MIN_IN_SIGHT}; spread them over all sides, or leave 'keypoints' out"
        )


def _visible_points(target, mesh):
    """Points (SURFACE_SAMPLES, 3) of the surface that shows from outside, spread evenly."""
    area, _ = visibility(mesh.triangles)
    if not area.any():
        raise ValueError(
            f"{target.mesh}: no triangle shows from outside, so there is nothing to learn; "
            "export the mesh with its faces"
        )
    area = area.max(1)
    rng = np.random.default_rng(0)
    faces = rng.choice(len(area), SURFACE_SAMPLES, p=area / area.sum())
    weights = rng.dirichlet((1, 1, 1), SURFACE_SAMPLES)  # even over a triangle
    return np.einsum("pi,pij->pj", weights, mesh.triangles[faces])


# ============================================================ a run


class TrainingRun(keras.callbacks.Callback):
    """A run in a folder; `fit` trains a model, or resumes from the last whole epoch.

    After each epoch the corners of the validation frames are predicted. The weights with the least
    median error are kept as `best.weights.h5`. When that error has not improved for two epochs, the
    learning rate falls to 0.3 of its value.

    Args:
        folder: of the run; each of several workers has its own folder in it, see `run_folder`.
        images: (N, size, size, 3) uint8 validation frames.
        keypoints: (N, K, 3) as `make_dataset` yields them.
        scale: pixels of the original frames for one pixel of these; multiplies the reported errors.
        plateau: False leaves the learning rate to the optimizer's own schedule.
        facts: how the model is trained, a dict for JSON. It is kept with the weights as it was at
            the first start. Its "init" is the path of the weights that the model begins with,
            relative to the repository.

    Raises:
        ValueError: "init" names weights of this very run, or damaged ones.
        FileNotFoundError: "init" names weights that do not exist.
    """

    def __init__(
        self,
        folder: str | Path,
        images: np.ndarray,
        keypoints: np.ndarray,
        scale: float = 1.0,
        plateau: bool = True,
        facts: dict | None = None,
    ):
        super().__init__()
        self.folder = run_folder(folder)
        self.images = images
        self.truth = keypoints[:, :8, :2]
        self.scale = scale
        self.plateau = None
        if plateau:
            self.plateau = keras.callbacks.ReduceLROnPlateau(
                "val_corner_px", 0.3, 2, mode="min", min_lr=1e-5
            )

        facts = facts or {}
        init = xu.ROOT / facts["init"] if facts.get("init") else None
        if init and Path(folder).resolve() in init.resolve().parents:
            raise ValueError(
                f"init: {init} are weights of this run itself; leave init out to resume it, "
                "or give the new run another name"
            )
        self.record = {**_ancestry(init), "rows": []}  # what the backup holds beside the weights
        self.record["stages"].append(facts)

    def fit(self, model: keras.Model, dataset: keras.utils.PyDataset, epochs: int) -> list[dict]:
        """Train up to a number of epochs, those of earlier starts included.

        Args:
            model: from `build_model` or `load_model`, compiled.
            dataset: from `make_dataset`.
            epochs: how many epochs the run has when it is finished.

        Returns:
            the log, a dict for each epoch.

        Raises:
            BlockingIOError: another process trains in this folder.
            ValueError: the folder holds a run of another network or target, or no backup of it.
            Interrupted: stopped by hand; start again to go on.
        """
        with self._lock():
            self._read_backup()
            done = len(self.record["rows"])
            self.dataset = dataset
            dataset.epoch = done

            callbacks = [self]
            if done >= epochs:
                print(f"already finished: {done} of {epochs} epochs")
            else:
                callbacks.append(TqdmCallback())
                if done:
                    print(f"resuming after epoch {done} of {epochs}")
            try:
                model.fit(
                    dataset,
                    epochs=epochs,
                    initial_epoch=done,
                    callbacks=callbacks,
                    verbose=0,
                    shuffle=False,  # the dataset does it
                )
            except KeyboardInterrupt:
                raise Interrupted(
                    f"interrupted after epoch {len(self.record['rows'])} of {epochs}; "
                    "run this again to go on"
                ) from None
        return self.record["rows"]

    def on_train_begin(self, logs=None):
        """Restore the learning rate, the model and the optimizer of the last whole epoch."""
        rows = self.record["rows"]
        if self.plateau:  # its state is not saved; it follows from the log
            self.plateau.set_model(self.model)
            self.plateau.on_train_begin()
            for row in rows:
                self.plateau.on_epoch_end(row["epoch"], dict(row))
        if rows:
            self._load_backup()
            self._write_results()

    def on_epoch_begin(self, epoch, logs=None):
        """Start the clock, with the device idle until the first batch is ready."""
        self.begun = time.perf_counter()
        self.idle_since = self.begun
        self.waited = 0.0  # seconds in which the device waited for batches

    def on_train_batch_end(self, batch, logs=None):
        """Add the time for which the device waited for this batch."""
        ready = self.dataset.finished.pop((self.dataset.epoch, batch), self.idle_since)
        self.waited += max(ready - self.idle_since, 0.0)
        self.idle_since = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Validate, then write: the backup first, because all other files follow from it."""
        row = self._row(epoch, logs)
        if self.plateau:
            self.plateau.on_epoch_end(epoch, dict(row))

        rows = [*self.record["rows"], row]
        record = {
            **self.record,
            "rows": rows,
            "model": self.model.settings,
            "target": xu.target_record(self.model.target),
        }
        self._write_backup(record)
        self.record = record  # only now: an interruption while writing must not change it
        self._write_results()
        print(
            f"epoch {epoch + 1}: loss {row['loss']:.3f}, "
            f"median corner error {row['val_corner_px']:.2f} px",
            f"| {row['samples_per_second']:.1f} samples/s, "
            f"{row['waiting_share']:.1%} of the time waiting for them",
        )

    def _row(self, epoch, logs):
        """The log's entry of an epoch that has just ended."""
        rows = self.record["rows"]
        seconds = self.idle_since - self.begun
        samples = self.dataset.epoch_size
        seen_before = rows[-1]["samples_seen"] if rows else self.record["samples"]
        rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        return {
            "stage": len(self.record["stages"]),
            "epoch": epoch,
            "learning_rate": rate,
            "samples_seen": seen_before + samples,
            "samples_per_second": samples / seconds,
            "waiting_share": self.waited / seconds,
            **{name: float(value) for name, value in logs.items()},
            **self._validate(),
        }

    def _validate(self):
        """The errors of the corners in the validation frames, as entries of the log."""
        with single_device_copy(self.model) as model:
            found, _ = xu.predict_keypoints(model, self.images)
        report = corner_report(found, self.truth, self.model.settings["size"], self.scale)
        permutations = report.pop("permutations")
        report.update({f"permutation_{name}": count for name, count in permutations.items()})
        return {f"val_{name}": value for name, value in report.items()}

    def _write_backup(self, record):
        state = WeightsInMemory()
        self.model.save_weights(state)
        with h5py.File(state, "a") as file:
            file["run"] = json.dumps(record)
        xu.write_files({self.folder / BACKUP: state.getvalue()})

    def _read_backup(self):
        """Read the record of the backup, without the weights; that of a new run has no rows."""
        path = self.folder / BACKUP
        if path.exists():
            try:
                with h5py.File(path) as file:
                    self.record = json.loads(file["run"][()])
            except (KeyError, OSError, ValueError) as error:
                raise ValueError(
                    f"{path}: no run's backup ({error}); give this run another name"
                ) from None
        elif _read_log(self.folder / "log.csv"):
            raise ValueError(
                f"{self.folder}: holds a log, but no {BACKUP}; give this run another name"
            )
        else:
            self.record["rows"] = []
        self._check_workers_agree()

    def _check_workers_agree(self):
        """Raise AssertionError unless all workers resume after the same epoch.

        Otherwise they would wait for each other for ever.
        """
        if worker()[1] == 1:
            return
        from jax.experimental import multihost_utils

        done = np.array(len(self.record["rows"]))
        advice = "the workers' backups differ; copy the first one's to all their folders"
        multihost_utils.assert_equal(done, f"{self.folder}: {advice}")

    def _load_backup(self):
        """Read the weights and the optimizer's state; ValueError if they do not fit the model."""
        path = self.folder / BACKUP
        settings = self.record.get("model", self.model.settings)
        if settings != self.model.settings:
            raise self._other_network(f"its settings are {settings}")

        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        try:
            target = xu.XWING  # of old backups, which do not say so
            if "target" in self.record:
                target = xu.target_from_record(self.record["target"], path, xu.ROOT)
            xu.check_same_target(target, self.model.target, "its weights")
            self.model.load_weights(path)
        except (KeyError, OSError, ValueError) as error:
            raise self._other_network(error) from None

    def _other_network(self, reason):
        """The ValueError that says why a network cannot resume this run."""
        reason = str(reason).splitlines()[0][:200]
        return ValueError(
            f"{self.folder}: holds a run of another network ({reason}); give this run another name"
        )

    def _write_results(self):
        """Write the log and, if the last epoch is the best one, its weights."""
        rows = self.record["rows"]
        log = _log_text(self.record["earlier_rows"] + rows)
        xu.write_files({self.folder / "log.csv": log})

        errors = np.nan_to_num([row["val_corner_px"] for row in rows], nan=np.inf)
        if errors.argmin() != len(errors) - 1:
            return
        *earlier, stage = self.record["stages"]
        stages = [*earlier, {**stage, "best_epoch": len(errors)}]
        validation = {
            name.removeprefix("val_"): value
            for name, value in rows[-1].items()
            if name.startswith("val_")
        }
        save_model(
            self.model,
            self.folder / "best.weights.h5",
            training={"samples_seen": rows[-1]["samples_seen"], "stages": stages},
            validation=validation,
        )

    @contextlib.contextmanager
    def _lock(self):
        """Lock the folder; the system releases the lock however this process ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(
                    f"{self.folder}: another training is under way in this folder; "
                    "wait for it, or give this run another name"
                ) from None
            for part in self.folder.glob(".*.part"):  # left by a killed start
                part.unlink()
            yield


def _ancestry(weights):
    """What a run that begins from weights (or None) takes over from earlier training.

    Returns:
        dict: the "stages" (a dict of facts each), the "samples" seen, "earlier_rows" of the log.
    """
    if weights is None:
        return {"stages": [], "samples": 0, "earlier_rows": []}

    training = xu.weights_settings(weights).get("training", {})
    samples = training.get("samples_seen", 0)
    log = weights.with_name(weights.name.replace(".weights.h5", "_log.csv"))  # where published
    if not log.exists():
        log = weights.with_name("log.csv")
    rows = [row for row in _read_log(log) if int(row.get("samples_seen") or 0) <= samples]
    return {"stages": training.get("stages", []), "samples": samples, "earlier_rows": rows}


def _read_log(path):
    """The rows of a log, as dicts of text; an incomplete last row is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return [row for row in rows if None not in row and None not in row.values()]


def _log_text(rows):
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")


# ============================================================ weights


class WeightsInMemory(io.BytesIO):
    """An HDF5 file in memory, with a name that Keras accepts.

    Python then writes it to disk and raises an error when the disk is full, where HDF5 crashes.
    """

    def __str__(self):
        return "memory.weights.h5"


def save_model(model: keras.Model, path: str | Path, **facts) -> None:
    """Write `NAME.weights.h5`, kernels as float16, and `NAME.json`.

    Args:
        model: from `build_model` or `load_model`.
        path: ends in .weights.h5.
        **facts: more entries for the JSON file, beside the settings, the target and the digest of
            the weights.
    """
    path, settings_path = xu.weights_files(path)
    settings = {**model.settings, "size": getattr(model, "trained_size", model.settings["size"])}

    full = WeightsInMemory()
    model.save_weights(full)
    slim = io.BytesIO()
    with h5py.File(full) as source, h5py.File(slim, "w") as destination:
        source.visititems(functools.partial(_copy_slim, destination))

    info = {
        "model": settings,
        "target": xu.target_record(model.target),
        "sha256": hashlib.sha256(slim.getvalue()).hexdigest(),
        **facts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    xu.write_files({path: slim.getvalue(), settings_path: json.dumps(info, indent=1) + "\n"})


def _copy_slim(destination, name, item):
    """Copy a tensor of the network, not of the optimizer, into an HDF5 file; kernels as float16."""
    if not hasattr(item, "shape") or name.startswith("optimizer"):
        return
    kernel = item.ndim >= 2
    packed = dict(dtype=np.float16, compression="gzip", shuffle=True) if kernel else {}
    destination.create_dataset(name, data=item[()], **packed)


def publish_weights(run: str | Path, folder: str | Path) -> None:
    """Copy a run's best weights and log to `xwing.weights.h5`, `xwing.json` and `xwing_log.csv`.

    Weights that were trained on squares of the frames are published for whole frames: the network
    is convolutional.

    Args:
        run: folder of a `TrainingRun`.
        folder: where the files go.

    Raises:
        FileNotFoundError: the run has not finished an epoch.
        ValueError: its weights are damaged.
    """
    run = Path(run)
    folder = Path(folder)
    xu.weights_settings(run / "best.weights.h5")  # raises if they are missing or damaged
    info = xu.read_json(run / "best.json")
    if info["training"]["stages"][-1].get("crop"):
        info["model"]["size"] = xu.FRAME_SIZE

    folder.mkdir(parents=True, exist_ok=True)
    xu.write_files(
        {
            folder / "xwing.weights.h5": (run / "best.weights.h5").read_bytes(),
            folder / "xwing.json": json.dumps(info, indent=1) + "\n",
            folder / "xwing_log.csv": _log_text(_read_log(run / "log.csv")),
        }
    )


# ============================================================ several devices and machines


def worker() -> tuple[int, int]:
    """This worker's index and the number of workers, (0, 1) unless several train with JAX."""
    if keras.backend.backend() != "jax":
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def run_folder(folder: str | Path) -> Path:
    """Where this worker keeps its run: the first one in `folder`, the others in folders in it."""
    index, _ = worker()
    return Path(folder) / (f"worker{index}" if index else "")


def distribute(devices: list[str] | None = None) -> contextlib.AbstractContextManager:
    """The scope in which a model must be built and compiled to train on all devices.

    With JAX these may be of several machines, started with Keras' environment variables
    KERAS_DISTRIBUTION_NUM_PROCESSES, _PROCESS_ID and _JOB_ADDRESSES. With one device or with
    PyTorch the scope does nothing.

    Args:
        devices: names such as "GPU:0"; None is every accelerator.

    Returns:
        a context manager.

    Raises:
        NotImplementedError: several machines with TensorFlow.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return _distribute_tensorflow(devices)
    if backend == "jax":
        devices = devices or keras.distribution.list_devices()
        if len(devices) > 1:
            # make_dataset gives every worker its shard of each batch, so Keras must not.
            shared = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
            keras.distribution.set_distribution(shared)
    return contextlib.nullcontext()


def _distribute_tensorflow(devices):
    """`distribute` for TensorFlow, on the devices of one machine."""
    import tensorflow as tf

    cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster", {})
    if len(cluster.get("worker", [])) > 1:
        raise NotImplementedError(
            "TF_CONFIG names several workers, which Keras 3 cannot train on (see "
            "github.com/keras-team/keras/issues/20585); use KERAS_BACKEND=jax"
        )
    devices = devices or [device.name for device in tf.config.list_logical_devices("GPU")]
    if len(devices) > 1:
        return tf.distribute.MirroredStrategy(devices).scope()
    return contextlib.nullcontext()


@contextlib.contextmanager
def single_device_copy(model: keras.Model) -> Iterator[keras.Model]:
    """Yield the model or, if workers share it, a copy on this worker's devices only.

    Keras cannot fetch what a shared model computes on other machines.
    """
    if worker()[1] == 1:
        yield model
        return

    shared = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        copy = keras.Model.from_config(model.get_config())
        copy.set_weights(model.get_weights())
        copy.settings = model.settings
        copy.target = model.target
        yield copy
    finally:
        keras.distribution.set_distribution(shared)
