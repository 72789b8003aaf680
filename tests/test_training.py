"""Training runs: what they write, and that they resume after being stopped or killed.

The network is one convolution.
"""

import csv
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

import xwing_utils as xu
from xwing import training


def build(seed=0, channels=36, graph=False, sigma=4.0, target=xu.XWING):
    """A network of one convolution, compiled."""
    keras.utils.set_random_seed(seed)
    frames = keras.Input((64, 64, 3))
    bright = keras.layers.Rescaling(1 / 255)(frames)
    maps = keras.layers.Conv2D(channels, 3, strides=2, padding="same")(bright)
    small = keras.Model(frames, xu.spatial_softmax(maps, 2.0))
    small.settings = {
        "backbone": "resnet18",
        "keypoints": channels,
        "sigma": sigma,
        "head": "softmax",
        "decoder_filters": [16, 16, 8, 8, 8],
        "size": 64,
        "stride": 2,
    }
    small.target = target
    xu.compile_model(small)
    small.run_eagerly = not graph  # training one convolution is faster than tracing its graph
    return small


def make_batches(count=8, **arguments):
    """A data set of 64-pixel frames, four a batch."""
    paths, matrices = xu.load_dataset(xu.ROOT / "data" / "sample")
    camera = xu.load_camera(xu.ROOT / "data" / "sample")
    return xu.make_dataset(
        paths[:count], matrices[:count], *camera, batch_size=4, size=64, **arguments
    )


def start(folder, epochs, seed=0, epoch_size=None, network=None, **arguments):
    """Train up to an epoch with a fresh network, as a new process would.

    Returns:
        the network and the run.
    """
    keras.utils.clear_session()
    model = build(seed, **(network or {}))
    run = training.TrainingRun(folder, *make_batches(4, augmented=False)[0], **arguments)
    run.fit(model, make_batches(epoch_size=epoch_size), epochs)
    return model, run


def another_target():
    """The X-wing with other points on its hull."""
    keypoints = xu.XWING.keypoints.copy()
    keypoints[8:] *= 0.5
    return dataclasses.replace(xu.XWING, name="probe", keypoints=keypoints)


def rows_of(path):
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def columns(rows, *names):
    return [tuple(row[name] for name in names) for row in rows]


def facts_of(folder, name="best"):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def fixed_error(monkeypatch):
    """A function that sets the validation error of the epochs to come."""

    def fix(*errors):
        left = list(errors)
        monkeypatch.setattr(
            training.TrainingRun, "_validate", lambda run: {"val_corner_px": left.pop(0)}
        )

    return fix


# ------------------------------------------------------------ what a run writes


def test_a_run_writes_its_log_and_its_best_weights(folder):
    _, run = start(folder, 2, facts={"data": "sample"})
    rows = rows_of(folder / "log.csv")
    assert columns(rows, "stage", "epoch", "samples_seen") == [("1", "0", "8"), ("1", "1", "16")]
    names = {"loss", "nmae_argmax", "learning_rate", "val_corner_px", "val_permutation_identity"}
    assert names <= {*rows[0]}
    errors = [row["val_corner_px"] for row in run.record["rows"]]
    assert errors == pytest.approx([float(row["val_corner_px"]) for row in rows])
    best = facts_of(folder)
    assert best["validation"]["corner_px"] == min(errors)
    stage = {"data": "sample", "best_epoch": int(np.argmin(errors)) + 1}
    assert best["training"]["stages"] == [stage]
    assert xu.weights_settings(folder / "best.weights.h5")["model"]["size"] == 64


def test_the_best_weights_remember_their_target(folder):
    target = another_target()
    start(folder, 1, network={"target": target})
    found = xu.weights_target(folder / "best.weights.h5")
    xu.check_same_target(found, target, "the weights")
    assert found.name == "probe"
    start(folder, 2, network={"target": target})  # and can go on with it


def test_the_error_is_given_in_pixels_of_the_original_frames(folder, tmp_path):
    small, large = (
        start(tmp_path / str(scale), 1, scale=scale)[1].record["rows"][0] for scale in (1.0, 4.0)
    )
    assert large["val_corner_px"] == pytest.approx(4 * small["val_corner_px"], rel=1e-3)


@pytest.mark.parametrize("pause,least,most", [(0.0, 0.0, 0.9), (1.0, 0.5, 1.0)])
def test_the_log_tells_the_speed_and_the_time_spent_waiting(
    folder, monkeypatch, capsys, pause, least, most
):
    def slow_example(*_):
        time.sleep(pause / 4)
        return np.zeros((64, 64, 3), np.uint8), np.zeros((36, 3), np.float32)

    batches = make_batches(16)
    monkeypatch.setattr(type(batches.frames), "_sample", slow_example)
    run = training.TrainingRun(folder, *make_batches(4, augmented=False)[0])
    begun = time.perf_counter()
    run.fit(build(0, 36), batches, 1)
    row = rows_of(folder / "log.csv")[0]
    assert least <= float(row["waiting_share"]) <= most
    assert 16 / (time.perf_counter() - begun) < float(row["samples_per_second"])
    assert "samples/s" in capsys.readouterr().out


def test_only_better_weights_are_kept(folder, fixed_error):
    fixed_error(5.0, 6.0, float("nan"), 4.0)
    start(folder, 1)
    first = (folder / "best.weights.h5").read_bytes()
    start(folder, 3)
    assert (folder / "best.weights.h5").read_bytes() == first
    start(folder, 4)
    assert (folder / "best.weights.h5").read_bytes() != first
    assert facts_of(folder)["training"]["stages"][0]["best_epoch"] == 4


def test_the_learning_rate_falls_on_a_plateau_also_of_a_resumed_run(folder, tmp_path, fixed_error):
    fixed_error(*[50.0] * 7)
    model, _ = start(folder, 2)  # the best epoch, and one without progress
    assert float(model.optimizer.learning_rate) == pytest.approx(1e-3)
    model, run = start(folder, 3)  # the second without progress
    assert float(model.optimizer.learning_rate) == pytest.approx(0.3e-3)
    assert [row["learning_rate"] for row in run.record["rows"]] == pytest.approx([1e-3] * 3)
    model, _ = start(tmp_path / "other", 4, plateau=False)
    assert float(model.optimizer.learning_rate) == pytest.approx(1e-3)


# ------------------------------------------------------------ resuming


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(folder, tmp_path, capsys):
    whole, _ = start(tmp_path / "whole", 3)
    start(folder, 1)
    capsys.readouterr()
    resumed, _ = start(folder, 3, seed=1)
    line = "resuming after epoch 1 of 3: learning rate 0.001, least median corner error "
    assert re.match(line + r"[\d.]+ px .epoch 1.\n", capsys.readouterr().out)
    assert resumed.optimizer.iterations == 6
    for ours, theirs in zip(resumed.get_weights(), whole.get_weights()):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert [row["epoch"] for row in rows_of(folder / "log.csv")] == ["0", "1", "2"]


def test_a_finished_run_is_left_alone(folder, capsys):
    first, _ = start(folder, 2)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    second, _ = start(folder, 2, seed=1)
    assert "already finished: 2 of 2 epochs" in capsys.readouterr().out
    for ours, theirs in zip(second.get_weights(), first.get_weights()):
        np.testing.assert_array_equal(ours, theirs)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


class Stop(keras.callbacks.Callback):
    """Interrupts the training, as Ctrl-C does, at the end of batch `step`."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        self.step -= 1
        if not self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step,done", [(1, 0), (2, 0), (3, 1)])
def test_an_interruption_says_one_line_and_the_run_goes_on(folder, monkeypatch, capsys, step, done):
    """Once a run could not be started again after an interruption in its first epoch."""
    model, data = build(), make_batches()
    run = training.TrainingRun(folder, *make_batches(4, augmented=False)[0])
    monkeypatch.setattr(training, "TqdmCallback", lambda: Stop(step))
    with pytest.raises(KeyboardInterrupt) as stopped:
        run.fit(model, data, 2)
    line = f"interrupted after epoch {done} of 2; run this again to go on"
    assert stopped.value._render_traceback_() == [line]
    monkeypatch.undo()
    run.fit(model, data, 2)  # the same objects, as when a notebook's cell is run again
    assert [row["epoch"] for row in rows_of(folder / "log.csv")] == ["0", "1"]
    assert ("resuming" in capsys.readouterr().out) == (done > 0)
    assert model.optimizer.iterations >= 4


def test_a_second_training_in_the_same_folder_is_refused(folder):
    start(folder, 1)
    before = (folder / "log.csv").read_bytes()
    with xu.locked(folder / "lock"):
        with pytest.raises(BlockingIOError, match="run: another training is under way"):
            start(folder, 2)
    assert (folder / "log.csv").read_bytes() == before
    start(folder, 2)


@pytest.mark.parametrize("rest", ["1,0.001,8", "9,0.001,8,1,1.0,1.0,0.0000000001"])
def test_a_half_written_row_of_the_log_changes_nothing(folder, rest):
    """Once it broke resuming, or its truncated number became the least error for ever."""
    start(folder, 1)
    whole = (folder / "log.csv").read_text()
    (folder / "log.csv").write_text(whole + rest)
    start(folder, 1)
    assert (folder / "log.csv").read_text() == whole
    (folder / "log.csv").write_text(whole[:-4])
    _, run = start(folder, 2)
    assert (folder / "log.csv").read_text().startswith(whole) and len(run.record["rows"]) == 2


def test_epochs_of_another_length_are_counted_as_they_were(folder):
    for epochs, size in ((1, 8), (2, 4), (3, 12)):
        start(folder, epochs, epoch_size=size)
    assert columns(rows_of(folder / "log.csv"), "samples_seen") == [("8",), ("12",), ("24",)]


def test_an_empty_log_is_no_obstacle(folder):
    folder.mkdir()
    (folder / "log.csv").touch()
    assert len(start(folder, 1)[1].record["rows"]) == 1


def changed_targets(folder):
    """The X-wing with something changed, and what a run says that began without the change."""
    half_turn = np.diag([-1.0, -1.0, 1.0, 1.0])
    changes = {
        "symmetries": np.stack([np.eye(4), half_turn]),
        "mirror": None,
        "mesh": folder / "other.obj",
    }
    (folder / "other.obj").write_text("another mesh")
    for name, value in changes.items():
        changed = dataclasses.replace(xu.XWING, **{name: value})
        yield changed, f"the target 'X-wing' has changed since it began: {name}"
    yield another_target(), "to the target 'X-wing', not to 'probe'"
    yield dataclasses.replace(another_target(), name="X-wing"), "'X-wing' as it was: its keypoints"


def test_changed_settings_are_refused(folder, fixed_error):
    """Once another learning rate was ignored, and another data set was mixed in without a note."""
    fixed_error(5.0)
    facts = {"learning_rate": 1e-3, "data": "a", "shares": (0.0, 1.0), "epochs": 1, "shapes": "x"}
    model, _ = start(folder, 1, facts=facts)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    frames = make_batches(4, augmented=False)[0]
    for name, value in {"learning_rate": 1e-4, "data": "b", "shapes": ""}.items():
        run = training.TrainingRun(folder, *frames, facts={**facts, name: value})
        message = f"run: {name} was {facts[name]!r} when this run began, and is {value!r} now; set"
        for epochs in (1, 2):  # also when the run is finished
            with pytest.raises(ValueError, match=message):
                run.fit(model, [], epochs)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_changes_of_where_and_how_long_a_run_goes_on_are_noted(folder, fixed_error, capsys):
    fixed_error(5.0, 4.0)
    facts = {"shares": (0.0, 1.0), "epochs": 1, "precision": "mixed_bfloat16"}
    start(folder, 1, facts=facts)
    now = {**facts, "epochs": 2, "precision": "float32"}
    start(folder, 2, facts=now)
    assert "changed after epoch 1: epochs 2, precision float32\n" in capsys.readouterr().out
    [stage] = facts_of(folder)["training"]["stages"]
    assert stage["epochs"] == 1 and stage["shares"] == [0, 1]
    assert stage["changes"] == [{"after_epoch": 1, "epochs": 2, "precision": "float32"}]
    assert training._facts_in_force(stage) == {**now, "shares": [0, 1], "best_epoch": 2}


def test_an_error_that_counts_for_missing_corners_is_said_to_be_one(folder, fixed_error, capsys):
    fixed_error(4 * 64 * np.sqrt(2))
    start(folder, 1, scale=4.0)
    assert "median corner error 362.04 px, most corners not found" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Skipping nested container")  # by Keras
def test_runs_that_cannot_go_on_are_refused_and_left_alone(folder):
    start(folder, 1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="run: holds a run of another network"):
        start(folder, 2, network={"channels": 8})
    with pytest.raises(ValueError, match="run: holds a run of another network .its settings are"):
        start(folder, 2, network={"sigma": 2.0})
    with pytest.raises(ValueError, match="run: holds a run of another network .its settings are"):
        start(folder, 1, network={"sigma": 2.0})  # also when the run is finished
    model = build()
    run = training.TrainingRun(folder, *make_batches(4, augmented=False)[0])
    for model.target, message in changed_targets(folder.parent):
        with pytest.raises(ValueError, match=f"run: holds a run of another network .*{message}"):
            run.fit(model, make_batches(), 2)
    (folder / training.BACKUP).write_bytes(before[training.BACKUP][:3000])
    with pytest.raises(ValueError, match="backup.weights.h5: no run's backup"):
        start(folder, 2)
    (folder / training.BACKUP).unlink()
    with pytest.raises(ValueError, match="run: holds a log, but no backup.weights.h5"):
        start(folder, 2)
    del before[training.BACKUP]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_full_disk_ends_training_with_an_error_and_loses_one_epoch(folder):
    start(folder, 1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
    try:
        with pytest.raises(OSError):
            start(folder, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert len(start(folder, 2)[1].record["rows"]) == 2


# ------------------------------------------------------------ killed with -9


def train_and_die(folder, moment, count):
    """Train three epochs in a process that kills itself at the `count`-th time of a moment."""
    left = [count]

    def die_in_time(*_, **__):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_half(path, content, write=Path.write_bytes):
        if left[0] == 1:
            write(path, content[: len(content) // 2])
        die_in_time()
        return write(path, content)

    def replace(source, target, rename=os.replace):
        rename(source, target)
        die_in_time()

    if moment == "batch":
        training.TrainingRun.on_train_batch_end = die_in_time
    elif moment == "write":
        Path.write_bytes = write_half
    elif moment == "replace":
        os.replace = replace
    training.TrainingRun._validate = lambda run: {
        "val_corner_px": 100 - int(run.model.optimizer.iterations)
    }
    start(folder, 3)


# (when a process kills itself, at which of these moments, how many whole epochs must be left)
MOMENTS = [
    ("batch", 1, 0),  # in the first epoch
    ("write", 1, 0),  # in the middle of the first backup
    ("replace", 1, 1),  # between the first backup and its log
    # The next start writes what is missing, and is killed between the weights and their facts.
    ("replace", 2, 1),
    # It writes log, weights and facts once more, and is killed in the second epoch's backup.
    ("write", 4, 1),
    ("replace", 5, 2),  # between the second epoch's log and its weights
]


def epochs_in(backup):
    if not backup.exists():
        return 0
    with h5py.File(backup) as file:
        return len(json.loads(file["run"][()])["rows"])


def test_killing_a_run_at_any_moment_loses_at_most_one_epoch(folder):
    """Once a killed run could not go on, or its log and facts disagreed."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["xwing.training"])
    for moment, count, epochs in MOMENTS:
        process = processes.Process(target=train_and_die, args=(folder, moment, count))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, (moment, count)
        assert epochs_in(folder / training.BACKUP) == epochs, (moment, count)
    model, run = start(folder, 3)  # the validation error of this process is a true one
    assert [row["epoch"] for row in rows_of(folder / "log.csv")] == ["0", "1", "2"]
    assert model.optimizer.iterations == 6  # two an epoch, those of killed processes included
    errors = [float(row["val_corner_px"]) for row in run.record["rows"]]
    assert facts_of(folder)["training"]["stages"][0]["best_epoch"] == np.argmin(errors) + 1
    xu.weights_settings(folder / "best.weights.h5")  # the digest fits
    assert not [path for path in folder.iterdir() if path.suffix == ".part"]


# ------------------------------------------------------------ publishing


def test_publishing_a_run_again_changes_nothing(folder, tmp_path):
    """Once a run published over its own first weights gained a stage and samples each time."""
    weights = tmp_path / "weights"
    start(folder, 1, facts={"seed": 1})
    training.publish_weights(folder, weights)
    names = {"xwing.json", "xwing.weights.h5", "xwing_log.csv"}
    assert {path.name for path in weights.iterdir()} == names
    assert (weights / "xwing.weights.h5").read_bytes() == (folder / "best.weights.h5").read_bytes()
    second = {"seed": 2, "init": str(weights / "xwing.weights.h5")}
    start(tmp_path / "second", 1, facts=second)
    training.publish_weights(tmp_path / "second", weights)
    once = {path.name: path.read_bytes() for path in weights.iterdir()}
    rows = columns(rows_of(weights / "xwing_log.csv"), "stage", "samples_seen")
    assert rows == [("1", "8"), ("2", "16")]
    stages = [{"seed": 1, "best_epoch": 1}, {**second, "best_epoch": 1}]
    assert facts_of(weights, "xwing")["training"] == {"samples_seen": 16, "stages": stages}
    # The run is finished, and by now the weights that it began from are its own.
    start(tmp_path / "second", 1, facts=second)
    training.publish_weights(tmp_path / "second", weights)
    assert {path.name: path.read_bytes() for path in weights.iterdir()} == once


def test_a_run_counts_the_samples_that_its_first_weights_have_seen(folder, tmp_path, fixed_error):
    fixed_error(5.0, 6.0, 4.0)
    start(folder, 2)
    start(tmp_path / "second", 1, facts={"init": str(folder / "best.weights.h5")})
    log = rows_of(tmp_path / "second" / "log.csv")
    rows = columns(log, "stage", "samples_seen", "val_corner_px")
    # The first run was best in its first epoch.
    assert rows == [("1", "8", "5.0"), ("2", "16", "4.0")]


def test_weights_of_another_target_are_no_stage_of_this_one(folder, tmp_path, fixed_error):
    """But they are named, with their target and its samples."""
    fixed_error(5.0, 4.0)
    start(folder, 1, network={"target": another_target()})
    facts = {"init": str(folder / "best.weights.h5")}
    start(tmp_path / "second", 1, facts=facts)
    log = rows_of(tmp_path / "second" / "log.csv")
    assert columns(log, "stage", "samples_seen", "val_corner_px") == [("1", "8", "4.0")]
    stage = {**facts, "init_target": "probe", "init_samples": 8, "best_epoch": 1}
    recorded = facts_of(tmp_path / "second")["training"]
    assert recorded == {"samples_seen": 8, "stages": [stage]}
    weights = tmp_path / "weights"
    training.publish_weights(folder, weights)
    training.publish_weights(tmp_path / "second", weights)
    for name, target in (("probe", another_target()), ("xwing", xu.XWING)):
        xu.check_same_target(xu.weights_target(weights / f"{name}.weights.h5"), target, name)
    info = facts_of(folder)
    info["target"]["name"] = "X-wing"
    (folder / "best.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="xwing.weights.h5: these weights belong to 'X-wing' as"):
        training.publish_weights(folder, weights)


@pytest.mark.parametrize("crop,size", [(0, 64), (1, 256)])
def test_weights_trained_on_squares_are_published_for_whole_frames(folder, tmp_path, crop, size):
    """`load_model` and `save_model` are tested in test_model.py."""
    start(folder, 1, facts={"crop": crop})
    training.publish_weights(folder, tmp_path / "weights")
    assert xu.weights_settings(tmp_path / "weights" / "xwing.weights.h5")["model"]["size"] == size


def test_an_unfinished_run_cannot_be_published(tmp_path):
    with pytest.raises(FileNotFoundError, match="best.weights.h5"):
        training.publish_weights(tmp_path, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_a_run_that_names_its_own_weights_as_its_start_is_refused(folder):
    """Once it recursed for ever."""
    start(folder, 1)
    with pytest.raises(ValueError, match="init: .*best.weights.h5 are weights of this run itself"):
        start(folder, 2, facts={"init": str(folder / "best.weights.h5")})


def test_a_run_that_names_no_weights_as_its_start_is_refused(folder):
    with pytest.raises(FileNotFoundError, match="nothing.weights.h5"):
        start(folder, 1, facts={"init": "weights/nothing.weights.h5"})
    assert not folder.exists()


# ------------------------------------------------------------ several devices and machines


@pytest.mark.parametrize(
    "flags,expected",
    [("fpu avx512_bf16 sse", "mixed_bfloat16"), ("avx512f", "float32"), (None, "float32")],
)
def test_the_precision_is_that_in_which_the_processor_computes(
    monkeypatch, tmp_path, flags, expected
):
    description = tmp_path / "cpuinfo"
    if flags:
        description.write_text(f"processor : 0\nflags : {flags}\n")
    monkeypatch.setattr(training, "CPU_DESCRIPTION", description)
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["cpu:0"])
    assert training.choose_precision() == expected
    assert training.choose_precision("float64") == "float64"
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["cpu:0", "gpu:0"])
    assert training.choose_precision() == "mixed_bfloat16"


DISTRIBUTED = """
import sys, numpy as np, xwing_utils as xu
keras = xu.import_keras()
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
sys.path.insert(0, "tests")
from xwing.training import TrainingRun, distribute
from test_training import build, make_batches
print(keras.backend.backend(), keras.config.floatx(), keras.config.image_data_format())
for devices in (["CPU:0"], ["CPU:0", "CPU:1"]):
    with distribute(devices):
        model = build(graph=True)
    run = TrainingRun(sys.argv[1] + str(len(devices)), *make_batches(4, augmented=False)[0])
    for epochs in (1, 2):  # the second goes on where the first ended
        rows = run.fit(model, make_batches(8, augmented=False), epochs)
    print("devices", model.distribute_strategy.num_replicas_in_sync, *(row["loss"] for row in rows))
"""


def test_two_devices_train_as_one_does(run_python, tmp_path):
    """What other projects have set up for Keras changes nothing."""
    other = {"floatx": "float64", "epsilon": 0.1, "backend": "torch"}
    other["image_data_format"] = "channels_first"
    (tmp_path / "keras.json").write_text(json.dumps(other), encoding="utf-8")
    variables = {"KERAS_HOME": str(tmp_path), "TF_USE_LEGACY_KERAS": "1"}
    variables |= {"KERAS_MAX_EPOCHS": "1", "KERAS_MAX_STEPS_PER_EPOCH": "1"}
    script = DISTRIBUTED.replace("sys.argv[1]", repr(str(tmp_path / "run")))
    output = run_python(script, **variables)
    assert output.splitlines()[0] == "tensorflow float32 channels_last"
    lines = [line.split() for line in output.splitlines()]
    numbers = [[float(word) for word in words[1:]] for words in lines if words[:1] == ["devices"]]
    one, two = numbers
    assert (one[0], two[0]) == (1, 2)
    np.testing.assert_allclose(two[1:], one[1:], rtol=5e-3)


WORKER = """
import sys
sys.path.insert(0, "tests")
import xwing_utils as xu
from xwing.training import TrainingRun, distribute, worker
from test_training import build, make_batches
with distribute():
    model = build(graph=True)
run = TrainingRun(sys.argv[1], *make_batches(4, augmented=False)[0])
for epochs in (1, 2):  # the second goes on where the first ended
    rows = run.fit(model, make_batches(8, augmented=False, shard=worker()), epochs)
print("worker", *worker(), *(row[name] for name in ("loss", "val_corner_px") for row in rows))
"""


@pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="jax is not installed")
def test_two_workers_over_loopback_train_as_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    for name in ("SM_FRAMEWORK", "XLA_FLAGS"):
        environment.pop(name, None)
    prefix = "KERAS_DISTRIBUTION_"
    several = {f"{prefix}NUM_PROCESSES": "2", f"{prefix}JOB_ADDRESSES": address, "NPROC": "8"}
    starts = [("two", several | {f"{prefix}PROCESS_ID": str(i)}) for i in (0, 1)] + [("one", {})]

    running = []
    for name, extra in starts:
        command = [sys.executable, "-c", WORKER, str(tmp_path / name)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(subprocess.Popen(command, cwd=xu.ROOT, env=environment | extra, **pipes))
    try:
        outputs = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()

    printed = [line.split() for out, _ in outputs for line in out.splitlines()]
    lines = [words[1:] for words in printed if words[:1] == ["worker"]]
    assert len(lines) == 3, outputs
    first, second, one = np.array(lines, float)
    assert [row[:2].tolist() for row in (first, second, one)] == [[0, 2], [1, 2], [0, 1]]
    np.testing.assert_allclose(second[2:], first[2:], rtol=1e-5)
    np.testing.assert_allclose(first[2:], one[2:], rtol=5e-3)
    for folder in (tmp_path / "two", tmp_path / "two" / "worker1"):
        assert len(rows_of(folder / "log.csv")) == 2


def test_several_machines_with_tensorflow_are_refused(monkeypatch):
    cluster = {"worker": ["a:1", "b:1"]}
    config = {"cluster": cluster, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    with pytest.raises(NotImplementedError, match="20585"):
        training.distribute()
