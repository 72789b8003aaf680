"""Training, as a run that lives in a folder.

A run can be killed at any moment and loses no more than the epoch under way. After each epoch one
file, `backup.weights.h5`, is replaced as a whole. It holds weights, optimizer and log, so they
cannot disagree. `log.csv` and the best weights follow from it: if the run is killed before they are
written, the next start writes them. The backup also records what the run began from, the stages of
earlier training and their log, as it was at the start. So published weights describe their whole
training, and publishing a run twice gives the same files as publishing it once.

A run goes on as it began. Settings that say how long it takes or where it runs may change, which
the record notes; for any other change a new run begins from its weights (`begin_from`). Of weights
of another target only encoder and decoder are used: samples and log count from zero, and the record
names the weights.

Keras shares each batch among several accelerators of a machine and, with JAX, among machines.
"""

import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

import xwing_utils as xu
from xwing.metrics import corner_report

keras = xu.import_keras()
from tqdm.keras import TqdmCallback  # noqa: E402  it imports Keras

_PROCESSES = int(os.environ.get("KERAS_DISTRIBUTION_NUM_PROCESSES") or 1)
if keras.backend.backend() == "jax" and _PROCESSES > 1:
    keras.distribution.initialize()  # as one of several workers, before JAX computes anything

BACKUP = "backup.weights.h5"

_SHIPPED = {
    "BACKBONE": xu.BACKBONE,
    "SIGMA": xu.SIGMA,
    "STRIDE": xu.STRIDE,
    "LOSS": "softmax",
    "RANDOMISED_SHARE": 0.15,
    "SYNTHETIC_SHARE": 0.5,
    "WITHOUT": "",
    "SIZE": xu.FRAME_SIZE,
    "CROP": 0,
    "INIT": "",
    "EPOCHS": 15,
    "EPOCH_SIZE": 0,
    "SCHEDULE": "plateau",
}
RECIPES = {  # settings of a training, by the names that notebooks/train.ipynb gives them
    "shipped": _SHIPPED,
    "classic": _SHIPPED  # as earlier work trained
    | {
        "BACKBONE": "efficientnetb0",
        "SIGMA": 10.0,
        "STRIDE": 1,
        "LOSS": "mse",
        "RANDOMISED_SHARE": 0.0,
        "SYNTHETIC_SHARE": 0.0,
        "WITHOUT": "geometry flare light colour sharpness noise erasing compression",
    },
    "object": _SHIPPED  # another target, in half an hour of two cores
    | {
        "SIGMA": 2.0,
        "SIZE": 128,
        "CROP": 1,
        "INIT": "weights/xwing.weights.h5",
        "EPOCHS": 9,
        "EPOCH_SIZE": 8000,
        "SCHEDULE": "cosine",
    },
}


def find_recipe(name: str) -> dict:
    """Return one of the RECIPES.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in RECIPES:
        raise ValueError(f"RECIPE: expected {' or '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]


# Facts that may change when a run is resumed; the record notes it. For others a new run begins.
CHANGEABLE = {"epochs", "samples", "frames", "precision", "backend"}


class Interrupted(KeyboardInterrupt):
    """Training was stopped by hand; a notebook shows this one line instead of a traceback."""

    def _render_traceback_(self):  # IPython asks for it
        return [str(self)]


WARMUP = 200  # steps


def cosine_schedule(peak: float, steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """Return learning rates that rise to a peak in WARMUP steps and fall to 1 % of it as a cosine.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, ICLR 2017.
    """
    return keras.optimizers.schedules.CosineDecay(
        peak / 20, steps, alpha=0.01, warmup_target=peak, warmup_steps=WARMUP
    )


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
            the first start, with "changes" since then. Its "init" is the path of the weights that
            the model begins with, relative to the repository. Without facts nothing is compared
            with those of the first start.

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

        self.facts = json.loads(json.dumps(facts or {}))  # as the backup will hold them
        self.init = xu.ROOT / self.facts["init"] if self.facts.get("init") else None
        if self.init is None:
            return
        if Path(folder).resolve() in self.init.resolve().parents:
            raise ValueError(
                f"init: {self.init} are weights of this run itself; leave init out to resume it, "
                "or give the new run another name"
            )
        xu.weights_settings(self.init)  # raises if they are missing or damaged

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
            ValueError: the folder holds a run of another network, target or settings, or no backup
                of it.
            Interrupted: stopped by hand; start again to go on.
        """
        with self._lock():
            # What the backup holds beside the weights.
            self.record = _first_record(self.init, self.facts, model.target)
            self._read_backup()
            done = len(self.record["rows"])
            changed = self._changed_facts()
            self.dataset = dataset
            dataset.epoch = done

            callbacks = [self]
            if done >= epochs:
                print(f"already finished: {done} of {epochs} epochs")
            else:
                callbacks.append(TqdmCallback())
                self._note_changes(changed)
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
        if 0 < len(rows) < self.params["epochs"]:
            print(self._what_is_resumed())

    def _what_is_resumed(self):
        """One line: how far the run is, and what is in force."""
        rows = self.record["rows"]
        errors = _validation_errors(rows)
        return (
            f"resuming after epoch {len(rows)} of {self.params['epochs']}: "
            f"learning rate {_learning_rate(self.model):.3g}, "
            f"least median corner error {errors.min():.2f} px (epoch {errors.argmin() + 1})"
        )

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
            "mesh_sha256": _mesh_digest(self.model.target),
        }
        self._write_backup(record)
        self.record = record  # only now: an interruption while writing must not change it
        self._write_results()
        unfound = ", most corners not found" if self._finds_nothing(row) else ""
        print(
            f"epoch {epoch + 1}: loss {row['loss']:.3f}, "
            f"median corner error {row['val_corner_px']:.2f} px{unfound}",
            f"| {row['samples_per_second']:.1f} samples/s, "
            f"{row['waiting_share']:.1%} of the time waiting for them",
        )

    def _finds_nothing(self, row):
        """Whether the median error is the one that `corner_report` counts for missing corners."""
        diagonal = np.sqrt(2) * self.model.settings["size"] * self.scale
        return row["val_corner_px"] >= 0.999 * diagonal

    def _row(self, epoch, logs):
        """The log's entry of an epoch that has just ended."""
        rows = self.record["rows"]
        seconds = self.idle_since - self.begun
        samples = self.dataset.epoch_size
        seen_before = rows[-1]["samples_seen"] if rows else self.record["samples"]
        return {
            "stage": len(self.record["stages"]),
            "epoch": epoch,
            "learning_rate": _learning_rate(self.model),
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
        """Read the record of the backup, without the weights; a new run keeps its first one."""
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
        self._check_workers_agree()

    def _changed_facts(self):
        """How the facts differ from those in force until now, {name: value}.

        ValueError where they must not differ. A fact that no earlier start has named may be added.
        """
        before = _facts_in_force(self.record["stages"][-1])
        names = {**before, **self.facts} if self.facts else {}
        changed = {name: self.facts.get(name, "") for name in names}
        changed = {name: value for name, value in changed.items() if value != before.get(name, "")}
        for name in (set(changed) & set(before)) - CHANGEABLE:
            raise ValueError(
                f"{self.folder}: {name} was {before[name]!r} when this run began, and is "
                f"{changed[name]!r} now; set it back, or begin a run of another name from "
                f"best.weights.h5 of this one (init)"
            )
        return changed

    def _note_changes(self, changed):
        """Print and record which facts {name: value} differ from here on."""
        done = len(self.record["rows"])
        if not (done and changed):
            return
        *earlier, stage = self.record["stages"]
        changes = [*stage.get("changes", []), {"after_epoch": done, **changed}]
        self.record["stages"] = [*earlier, {**stage, "changes": changes}]
        values = ", ".join(f"{name} {value}" for name, value in changed.items())
        print(f"changed after epoch {done}: {values}")

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
            self._check_target(target)
            self.model.load_weights(path)
        except (KeyError, OSError, ValueError) as error:
            raise self._other_network(error) from None

    def _check_target(self, before):
        """Raise ValueError where the target of a resumed run is drawn or labelled otherwise now."""
        now = self.model.target
        digests = self.record.get("mesh_sha256"), _mesh_digest(now)
        same = {
            "normals": np.allclose(before.normals, now.normals, atol=1e-6),
            "mirror": _equal(before.mirror, now.mirror),
            "symmetries": _equal(before.symmetries, now.symmetries),
            "axes": _equal(before.axes, now.axes),
            "mesh": None in digests or digests[0] == digests[1],
        }
        changed = [name for name, unchanged in same.items() if not unchanged]
        if changed:
            names = " and ".join(changed)
            raise ValueError(f"the target {now.name!r} has changed since it began: {names}")

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

        errors = _validation_errors(rows)
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
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(xu.locked(self.folder / "lock"))
            except BlockingIOError:
                raise BlockingIOError(
                    f"{self.folder}: another training is under way in this folder; "
                    "wait for it, or give this run another name"
                ) from None
            for part in self.folder.glob(".*.part"):  # left by a killed start
                part.unlink()
            yield


def _first_record(weights, facts, target):
    """The record of a run that begins from weights (or None), before its first epoch.

    What weights of another target have seen is no training of this target: no stage, no sample and
    no row of their log is taken over, but the facts name their target and samples.

    Returns:
        dict: the "stages" (a dict of facts each), the "samples" seen, "earlier_rows" of the log,
            and no "rows" of its own.
    """
    record = {"stages": [facts], "samples": 0, "earlier_rows": [], "rows": []}
    if weights is None:
        return record

    trained_target = xu.weights_target(weights)
    if xu.has_same_keypoints(trained_target, target):
        earlier = _ancestry(weights)
        return {**record, **earlier, "stages": [*earlier["stages"], facts]}
    samples = xu.weights_settings(weights).get("training", {}).get("samples_seen", 0)
    origin = {"init_target": trained_target.name, "init_samples": samples}
    return {**record, "stages": [{**facts, **origin}]}


def _facts_in_force(stage):
    """The facts of a stage as they were last, {name: value}, without what the run has added."""
    added = ("init_target", "init_samples", "changes")
    facts = {name: value for name, value in stage.items() if name not in added}
    for change in stage.get("changes", []):
        facts |= {name: value for name, value in change.items() if name != "after_epoch"}
    return facts


def _ancestry(weights):
    """What a run takes over from the earlier training of its first weights.

    Returns:
        dict: the "stages" (a dict of facts each), the "samples" seen, "earlier_rows" of the log.
    """
    training = xu.weights_settings(weights).get("training", {})
    samples = training.get("samples_seen", 0)
    log = weights.with_name(weights.name.replace(".weights.h5", "_log.csv"))  # where published
    if not log.exists():
        log = weights.with_name("log.csv")
    rows = [row for row in _read_log(log) if int(row.get("samples_seen") or 0) <= samples]
    return {"stages": training.get("stages", []), "samples": samples, "earlier_rows": rows}


def _read_log(path):
    """The rows of a log, as dicts of text; an incomplete last row is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return [row for row in rows if None not in row and None not in row.values()]


def _log_text(rows):
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")


def _validation_errors(rows):
    """The median corner errors (E,) of the epochs in a log; inf where there is none."""
    return np.nan_to_num([row["val_corner_px"] for row in rows], nan=np.inf)


def _learning_rate(model):
    return float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))


def _mesh_digest(target):
    """The SHA-256 of the target's mesh file; None where it is not on this machine."""
    if not target.mesh.is_file():
        return None
    return hashlib.sha256(target.mesh.read_bytes()).hexdigest()


def _equal(first, second):
    """Whether two arrays, or None, are the same."""
    if first is None or second is None:
        return first is second
    return first.shape == second.shape and np.allclose(first, second, atol=1e-6)


# ============================================================ weights


HEADS = {"maps", "final_conv"}  # layers of which the maps come, with a stride of 2 and of 1


def begin_from(model: keras.Model, weights: str | Path) -> keras.Model:
    """Let a new network begin with the weights of another training, and say so in one line.

    Encoder and decoder are taken over, and how frames are scaled before them. The last layer is
    taken over where the weights belong to the same target; else it begins anew.

    Args:
        model: from `build_model`, not yet compiled.
        weights: `NAME.weights.h5` of a network with the same backbone and decoder.

    Returns:
        the model; a new one where frames are scaled otherwise.

    Raises:
        FileNotFoundError: there are no such weights.
        ValueError: the weights are damaged, or those of another backbone or decoder.
    """
    info = xu.weights_settings(weights)
    _check_same_network(info["model"], model.settings, weights)
    preprocessing = info["model"].get("preprocessing")
    if preprocessing != model.settings.get("preprocessing"):
        settings = {**model.settings, "preprocessing": preprocessing}
        model = xu.build_model(**settings, target=model.target)

    source = xu.load_model(weights)
    keeps_last = _take_over(model, source)
    last = "the last layer, too" if keeps_last else f"the last layer anew for {model.target.name}"
    samples = info.get("training", {}).get("samples_seen", 0)
    print(
        f"begins with encoder and decoder of {Path(weights).name} "
        f"({source.target.name}, {samples:,} samples); {last}"
    )
    return model


def _check_same_network(theirs, ours, weights):
    """Raise ValueError where the settings of two networks differ in encoder or decoder."""
    for name in ("backbone", "decoder_filters", "stride"):
        if theirs[name] != ours[name]:
            raise ValueError(
                f"{weights}: its network has {name} {theirs[name]!r}, this one {ours[name]!r}; "
                "set it to that of the weights, or begin without them"
            )


def _take_over(model, source):
    """Copy the weights of another network; return whether those of the last layer were, too."""
    same_target = xu.has_same_keypoints(source.target, model.target)
    keeps_last = same_target and source.output_shape[-1] == model.output_shape[-1]
    for ours, theirs in zip(model.weights, source.weights, strict=True):
        if keeps_last or ours.path.split("/")[-2] not in HEADS:
            ours.assign(keras.ops.convert_to_numpy(theirs))
    return keeps_last


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
    """Copy a run's best weights and log to `NAME.weights.h5`, `NAME.json` and `NAME_log.csv`.

    The name is the target's, in small letters and digits: `xwing` for the X-wing.

    Weights that were trained on squares of the frames are published for whole frames: the network
    is convolutional.

    Args:
        run: folder of a `TrainingRun`.
        folder: where the files go.

    Raises:
        FileNotFoundError: the run has not finished an epoch.
        ValueError: its weights are damaged, or the folder holds weights of another target by that
            name.
    """
    run = Path(run)
    folder = Path(folder)
    xu.weights_settings(run / "best.weights.h5")  # raises if they are missing or damaged
    info = xu.read_json(run / "best.json")
    if info["training"]["stages"][-1].get("crop"):
        info["model"]["size"] = xu.FRAME_SIZE

    target = xu.weights_target(run / "best.weights.h5")
    name = "".join(letter for letter in target.name.lower() if letter.isalnum()) or "target"
    published = folder / f"{name}.weights.h5"
    if published.exists():
        xu.check_same_target(xu.weights_target(published), target, f"{published}: these weights")

    folder.mkdir(parents=True, exist_ok=True)
    xu.write_files(
        {
            published: (run / "best.weights.h5").read_bytes(),
            folder / f"{name}.json": json.dumps(info, indent=1) + "\n",
            folder / f"{name}_log.csv": _log_text(_read_log(run / "log.csv")),
        }
    )


# ============================================================ several devices and machines


CPU_DESCRIPTION = Path("/proc/cpuinfo")  # by Linux
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}  # of processors that compute in bfloat16


def choose_precision(precision: str = "auto") -> str:
    """Return the dtype policy for training: "auto" is the faster one of two on this machine.

    That is "mixed_bfloat16" with an accelerator, or on a processor that computes in bfloat16. Other
    processors emulate it, and "float32" is faster there. Only Linux says which processor it is.

    Args:
        precision: "auto", or a policy, which is returned as it is.
    """
    if precision != "auto":
        return precision
    accelerated = any("cpu" not in name.lower() for name in keras.distribution.list_devices())
    return "mixed_bfloat16" if accelerated or _computes_in_bfloat16() else "float32"


def _computes_in_bfloat16():
    """Whether this machine's processor has instructions for bfloat16, as far as Linux says."""
    text = CPU_DESCRIPTION.read_text(encoding="utf-8") if CPU_DESCRIPTION.exists() else ""
    return not BFLOAT16_FLAGS.isdisjoint(text.split())


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
