"""Training, as a run that lives in a folder.

A run can be killed at any moment. After each epoch one file, `backup.weights.h5`, is replaced as a whole:
weights, optimizer and log in one, so they cannot disagree. `log.csv` and the best weights follow from it;
where the kill came in between, the next start writes them. Only the epoch under way is lost. What the run
began from (the stages of earlier training and their log) is in that file too, as it was at the start: so
published weights tell of their whole training, and publishing twice is the same as publishing once.

Several accelerators of a machine and, with JAX, several machines share each batch by means of Keras.
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
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

import xwing_utils as xu

keras = xu.import_keras()
if (
    keras.backend.backend() == "jax"
    and int(os.environ.get("KERAS_DISTRIBUTION_NUM_PROCESSES") or 1) > 1
):
    keras.distribution.initialize()  # as one of several workers, before JAX computes anything
BACKUP = "backup.weights.h5"


class Interrupted(KeyboardInterrupt):
    """Training was stopped by hand; a notebook shows this one line instead of a traceback."""

    def _render_traceback_(self):
        return [str(self)]


class TrainingRun(keras.callbacks.Callback):
    """A run in a folder; `fit` trains a model, from the last whole epoch on where the run was begun before.

    After each epoch the corners of the validation frames are read back. The weights whose median error is
    least are kept, as `best.weights.h5`; where that error stands still for two epochs, the learning rate
    falls to 0.3 of itself.

    Args:
        folder: of the run (each of several workers has its own in it, see `run_folder`).
        images: (N, size, size, 3) uint8 validation frames.
        keypoints: (N, K, 3) as `make_dataset` yields them.
        scale: pixels of the original frames for one pixel of these; reported errors are multiplied by it.
        plateau: False leaves the learning rate to the optimizer's own schedule.
        facts: dict for JSON, how the model is trained; kept with the weights, as it was at the first start.
            Its "init" names the weights that the model begins with, relative to the repository.
    Raises:
        ValueError, FileNotFoundError: "init" names weights of this very run, damaged ones, or none.
    """

    def __init__(self, folder, images, keypoints, scale=1.0, plateau=True, facts=None):
        super().__init__()
        self.folder, self.images, self.scale = run_folder(folder), images, scale
        self.truth = keypoints[:, :8, :2]
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
        self.record = {**_ancestry(init), "rows": []}
        self.record["stages"].append(facts)

    def fit(self, model, dataset, epochs):
        """Train up to `epochs`, those of earlier starts included. Returns the log, a dict for each epoch.

        Raises:
            BlockingIOError: another process trains in this folder.
            ValueError: the folder holds the run of another network, or one without a backup.
            Interrupted: stopped by hand; start again to go on.
        """
        from tqdm.keras import TqdmCallback  # imports Keras, which `import_keras` does silently

        with self._lock():
            self._read_backup()
            done = len(self.record["rows"])
            dataset.epoch, self.dataset = done, dataset
            if done >= epochs:
                print(f"already finished: {done} of {epochs} epochs")
            elif done:
                print(f"resuming after epoch {done} of {epochs}")
            callbacks = [self] if done >= epochs else [self, TqdmCallback()]
            try:  # the dataset shuffles its frames itself
                model.fit(
                    dataset,
                    epochs=epochs,
                    initial_epoch=done,
                    callbacks=callbacks,
                    verbose=0,
                    shuffle=False,
                )
            except KeyboardInterrupt:
                raise Interrupted(
                    f"interrupted after epoch {len(self.record['rows'])} of {epochs}; "
                    "run this again to go on"
                ) from None
        return self.record["rows"]

    def on_train_begin(self, logs=None):
        """Bring plateau, model and optimizer to where the last whole epoch left them."""
        if self.plateau:
            self.plateau.set_model(self.model)
            self.plateau.on_train_begin()
            for row in self.record["rows"]:
                self.plateau.on_epoch_end(row["epoch"], dict(row))
        if self.record["rows"]:
            if not self.model.optimizer.built:
                self.model.optimizer.build(self.model.trainable_variables)
            try:
                if self.record.get("model", self.model.settings) != self.model.settings:
                    raise ValueError(f"its settings are {self.record['model']}")
                self.model.load_weights(self.folder / BACKUP)
            except (KeyError, OSError, ValueError) as error:
                reason = str(error).splitlines()[0][:200]
                raise ValueError(
                    f"{self.folder}: holds a run of another network ({reason}); "
                    "give this run another name"
                ) from None
            self._write_results()

    def on_epoch_begin(self, epoch, logs=None):
        """Start the clock: what is left to do from here on until a batch is there is waiting."""
        self.begun = self.idle_since = time.perf_counter()
        self.waited = 0.0

    def on_train_batch_end(self, batch, logs=None):
        """Add for how long this batch was not there when the network was free to take it."""
        finished = self.dataset.finished.pop((self.dataset.epoch, batch), self.idle_since)
        self.waited += max(finished - self.idle_since, 0.0)
        self.idle_since = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Measure, then write: the backup first, as all else follows from it."""
        rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        seconds, samples, rows = (
            self.idle_since - self.begun,
            self.dataset.epoch_size,
            self.record["rows"],
        )
        row = {
            "stage": len(self.record["stages"]),
            "epoch": epoch,
            "learning_rate": rate,
            "samples_seen": (rows[-1]["samples_seen"] if rows else self.record["samples"])
            + samples,
            "samples_per_second": samples / seconds,
            "waiting_share": self.waited / seconds,
            **{name: float(value) for name, value in logs.items()},
            **self._validate(),
        }
        if self.plateau:
            self.plateau.on_epoch_end(epoch, dict(row))
        record = {**self.record, "rows": [*rows, row], "model": self.model.settings}
        self._write_backup(record)
        self.record = record
        self._write_results()
        print(
            f"epoch {epoch + 1}: loss {row['loss']:.3f}, median corner error {row['val_corner_px']:.2f} px",
            f"| {samples / seconds:.1f} samples/s, {row['waiting_share']:.1%} of the time waiting for them",
        )

    def _validate(self):
        from xwing.metrics import corner_report

        with single_device_copy(self.model) as model:
            found = xu.predict_keypoints(model, self.images)[0]
        report = corner_report(found, self.truth, self.model.settings["size"], self.scale)
        report.update(
            {f"permutation_{name}": count for name, count in report.pop("permutations").items()}
        )
        return {f"val_{name}": value for name, value in report.items()}

    def _write_backup(self, record):
        state = WeightsInMemory()
        self.model.save_weights(state)
        with h5py.File(state, "a") as file:
            file["run"] = json.dumps(record)
        xu.write_files({self.folder / BACKUP: state.getvalue()})

    def _read_backup(self):
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
        if worker()[1] > 1:  # killed at different epochs they would wait for each other for ever
            from jax.experimental import multihost_utils

            message = f"{self.folder}: the workers' backups differ; copy the first one's to all their folders"
            multihost_utils.assert_equal(np.array(len(self.record["rows"])), message)

    def _write_results(self):
        """Write the log and, where the last epoch is the best one, its weights."""
        stages, rows = self.record["stages"], self.record["rows"]
        xu.write_files({self.folder / "log.csv": _log_text(self.record["earlier_rows"] + rows)})
        errors = np.nan_to_num([row["val_corner_px"] for row in rows], nan=np.inf)
        if errors.argmin() == len(errors) - 1:
            stages = [*stages[:-1], {**stages[-1], "best_epoch": len(errors)}]
            save_model(
                self.model,
                self.folder / "best.weights.h5",
                training={"samples_seen": rows[-1]["samples_seen"], "stages": stages},
                validation={key[4:]: value for key, value in rows[-1].items() if key[:4] == "val_"},
            )

    @contextlib.contextmanager
    def _lock(self):
        """Hold the folder; the system lets go of it when this process ends, however it does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(
                    f"{self.folder}: another training is under way in this folder; "
                    "wait for it, or give this run another name"
                ) from None
            for part in self.folder.glob(".*.part"):  # of a start that was killed while it wrote
                part.unlink()
            yield


class WeightsInMemory(io.BytesIO):
    """An HDF5 file in memory, under a name that Keras takes for weights: HDF5 crashes on a full disk."""

    def __str__(self):
        return "memory.weights.h5"


def save_model(model, path, **facts):
    """Write `NAME.weights.h5`, kernels as float16, and `NAME.json` with settings, digest and any `facts`."""
    path, settings_path = xu.weights_files(path)
    settings = {**model.settings, "size": getattr(model, "trained_size", model.settings["size"])}
    if settings["keypoints"] <= len(xu.KEYPOINTS):
        settings["points"] = xu.KEYPOINTS[: settings["keypoints"]].tolist()
    full, slim = WeightsInMemory(), io.BytesIO()
    model.save_weights(full)
    with h5py.File(full) as source, h5py.File(slim, "w") as target:
        source.visititems(functools.partial(_copy_slim, target))
    info = {"model": settings, "sha256": hashlib.sha256(slim.getvalue()).hexdigest(), **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    xu.write_files({path: slim.getvalue(), settings_path: json.dumps(info, indent=1) + "\n"})


def _copy_slim(target, name, item):
    """Copy a tensor of the network into an HDF5 file; kernels (two or more dimensions) as packed float16."""
    if hasattr(item, "shape") and not name.startswith("optimizer"):
        packed = dict(dtype=np.float16, compression="gzip", shuffle=True) if item.ndim >= 2 else {}
        target.create_dataset(name, data=item[()], **packed)


def publish_weights(run, folder):
    """Copy a run's best weights to `folder`: `xwing.weights.h5`, `xwing.json` and `xwing_log.csv`.

    Weights trained on squares cut from the frames are published for whole frames: the network is
    convolutional. Raises FileNotFoundError where the run has not finished an epoch, ValueError for
    damaged weights.
    """
    run, folder = Path(run), Path(folder)
    xu.weights_settings(run / "best.weights.h5")
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


def _ancestry(weights):
    """How weights (or None) came about: facts of each stage, samples seen, the rows of the log up to them."""
    if weights is None:
        return {"stages": [], "samples": 0, "earlier_rows": []}
    training = xu.weights_settings(weights).get("training", {})
    stages, samples = training.get("stages", []), training.get("samples_seen", 0)
    published = weights.with_name(weights.name.replace(".weights.h5", "_log.csv"))
    rows = _read_log(published if published.exists() else weights.with_name("log.csv"))
    return {
        "stages": stages,
        "samples": samples,
        "earlier_rows": [row for row in rows if int(row.get("samples_seen") or 0) <= samples],
    }


def _read_log(path):
    """The rows of a log, dicts of text; a row that was not written to its end is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return [row for row in rows if None not in row and None not in row.values()]


def _log_text(rows):
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")


# ============================================================ several devices and machines


def worker():
    """Which worker this is, and of how many: (0, 1) unless several processes train one model with JAX."""
    if keras.backend.backend() != "jax":
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def run_folder(folder):
    """Where this process keeps its run: `folder`, or a part of it for all workers but the first."""
    index, _ = worker()
    return Path(folder) / (f"worker{index}" if index else "")


def distribute(devices=None):
    """The scope in which a model is built and compiled so that each batch is shared out among all devices.

    With JAX also over several machines, started with Keras' variables KERAS_DISTRIBUTION_NUM_PROCESSES,
    _PROCESS_ID and _JOB_ADDRESSES. One device, or PyTorch: nothing. `devices` are names such as "GPU:0"; None
    is every accelerator. Raises NotImplementedError for several machines with TensorFlow.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        if (
            len(
                json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster", {}).get("worker", [])
            )
            > 1
        ):
            raise NotImplementedError(
                "TF_CONFIG names several workers, which Keras 3 cannot train on (see "
                "github.com/keras-team/keras/issues/20585); use KERAS_BACKEND=jax"
            )
        devices = devices or [device.name for device in tf.config.list_logical_devices("GPU")]
        if len(devices) > 1:
            return tf.distribute.MirroredStrategy(devices).scope()
    elif backend == "jax":
        devices = devices or keras.distribution.list_devices()
        if len(devices) > 1:  # make_dataset gives every worker its part; Keras need not
            shared = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
            keras.distribution.set_distribution(shared)
    return contextlib.nullcontext()


@contextlib.contextmanager
def single_device_copy(model):
    """The model or, where workers share it, a copy for this one: Keras cannot fetch what the others hold."""
    if worker()[1] == 1:
        yield model
        return
    shared = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        copy = keras.Model.from_config(model.get_config())
        copy.set_weights(model.get_weights())
        copy.settings = model.settings
        yield copy
    finally:
        keras.distribution.set_distribution(shared)
