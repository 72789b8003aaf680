"""The network: building, training, files, prediction. A tiny one, so that everything runs in seconds."""

import csv
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time

import h5py
import keras
import numpy as np
import pytest

import xwing_utils as xu

pytestmark = pytest.mark.filterwarnings("ignore:Skipping nested container")  # Keras, before it refuses a foreign file
TINY = {"backbone": "mobilenetv2", "size": 64, "decoder_filters": (16, 16, 8, 8, 8)}


def run_python(code, **environment):
    """Run code in a fresh Python in the repository; its output."""
    clean = {k: v for k, v in os.environ.items() if k not in ("KERAS_BACKEND", "SM_FRAMEWORK")}
    done = subprocess.run([sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, timeout=600,
                          cwd=os.path.dirname(xu.__file__))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return xu.build_model(**TINY)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)


@pytest.fixture
def small_model():
    """A function that builds one convolution and a softmax; enough for callbacks."""
    def build(seed=0):
        keras.utils.set_random_seed(seed)
        frames = keras.Input((64, 64, 3))
        maps = keras.layers.Conv2D(xu.CHANNELS, 3, strides=2, padding="same")(keras.layers.Rescaling(1 / 255)(frames))
        small = keras.Model(frames, xu.spatial_softmax(maps, 2.0))
        small.settings = {"keypoints": xu.CHANNELS, "sigma": 4.0, "head": "softmax", "size": 64, "stride": 2}
        return xu.compile_model(small)
    return build


@pytest.fixture
def batches(sample, camera):
    """A function that makes a data set of 64-pixel frames."""
    return lambda count=8, **arguments: xu.make_dataset(sample[0][:count], sample[1][:count], *camera, size=64, batch_size=4, **arguments)


# ------------------------------------------------------------ imports


def test_the_module_works_without_tensorflow_until_a_model_is_asked_for():
    heavy = ("tensorflow", "keras", "torch", "jax", "segmentation_models", "albumentations")
    output = run_python(f"""
import sys, numpy as np, xwing_utils as xu
paths, matrices = xu.load_dataset("data/sample")
view, projection = xu.load_camera("data/sample")
K = xu.camera_matrix(projection, 256, 256)
corners = xu.keypoints_of(matrices[:1], view, projection)[0]
xu.decode_heatmaps(xu.gaussian_heatmaps(corners, 256))
assert xu.solve_pose(corners, K) is not None
xu.draw_bolts(xu.read_image(paths[0]), xu.Lasers().step(xu.pose_in_camera(view, matrices[0])), K)
print([name for name in {heavy} if name in sys.modules])
""")
    assert output.strip() == "[]"


# ------------------------------------------------------------ building


@pytest.mark.parametrize("change,message", [
    ({"backbone": "resnet1000"}, "resnet1000"), ({"head": "sigmoid"}, "sigmoid"), ({"size": 100}, "100"), ({"size": 0}, "32"),
    ({"size": -64}, "32"), ({"stride": 4}, "stride 4")])
def test_arguments_that_cannot_be_built(change, message):
    with pytest.raises(ValueError, match=message):
        xu.build_model(**{**TINY, **change})


def test_the_network_s_shape_and_settings(model):
    assert model.output_shape == (None, 32, 32, xu.CHANNELS)
    assert model.settings == {"backbone": "mobilenetv2", "keypoints": xu.CHANNELS, "sigma": xu.SIGMA, "head": "softmax",
                              "decoder_filters": [16, 16, 8, 8, 8], "size": 64, "stride": 2}


def test_a_network_with_maps_of_the_frame_s_size_and_a_linear_head(images):
    linear = xu.build_model(**TINY, keypoints=8, head="linear", stride=1)
    maps = linear.predict_on_batch(images)
    assert maps.shape == (5, 64, 64, 8) and maps.dtype == np.float32
    assert (maps < 0).any()


def test_maps_of_the_softmax_head_hold_at_most_a_gaussian_s_mass(model, images):
    maps = model.predict_on_batch(images)
    assert (maps >= 0).all() and (maps.sum((1, 2)) <= 2 * np.pi * (xu.SIGMA / 2) ** 2 * 1.0001).all()


# ------------------------------------------------------------ training


def test_two_steps_of_training(batches):
    tiny = xu.compile_model(xu.build_model(**{**TINY, "backbone": xu.BACKBONE}))  # the shipped one, and the quickest to trace
    before = tiny.get_weights()
    history = tiny.fit(batches(), epochs=1, verbose=0).history
    assert np.isfinite(history["loss"]).all() and 0 <= history["nmae_argmax"][0] <= 1
    assert tiny.optimizer.iterations == 2
    assert max(np.abs(a - b).max() for a, b in zip(before, tiny.get_weights())) > 0


@pytest.mark.parametrize("kind", ["softmax", "mse", "weighted"])
def test_training_lowers_the_loss(small_model, batches, kind):
    small = small_model()
    xu.compile_model(small, 0.01, xu.HeatmapLoss(4.0, kind, 2))
    losses = small.fit(batches(augmented=False), epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_xla_is_off_on_the_cpu(small_model):
    assert small_model().jit_compile is False or not xu._on_cpu()


BACKEND_TRAINING = f"""
import numpy as np, keras, xwing_utils as xu
paths, matrices = xu.load_dataset("data/sample")
data = xu.make_dataset(paths[:8], matrices[:8], *xu.load_camera("data/sample"), size=64, batch_size=4, workers=1)
model = xu.compile_model(xu.build_model(**{TINY!r}))
history = model.fit(data, epochs=1, verbose=0).history
keypoints, confidence = xu.predict_keypoints(model, data[0][0], batch_size=4)
assert keypoints.shape == (4, 8, 2) and confidence.shape == (4, 8)
print(keras.backend.backend(), int(model.optimizer.iterations), bool(np.isfinite(history["loss"]).all()))
"""


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_two_steps_of_training_with_another_backend(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    assert run_python(BACKEND_TRAINING, KERAS_BACKEND=backend).split() == [backend, "2", "True"]


DISTRIBUTED = f"""
import sys, numpy as np, tensorflow as tf, xwing_utils as xu
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
keras = xu.import_keras()
paths, matrices = xu.load_dataset("data/sample")
half = [0, 1, 0, 1, 2, 3, 2, 3]  # each device gets the same two frames, as batch normalisation counts a device's own
data = xu.make_dataset([paths[i] for i in half], matrices[half], *xu.load_camera("data/sample"), size=64, batch_size=4, augmented=False)
for devices in (["CPU:0"], ["CPU:0", "CPU:1"]):
    keras.utils.set_random_seed(0)
    with xu.distribute(devices):
        model = xu.compile_model(xu.build_model(**{TINY!r}))
    print(model.distribute_strategy.num_replicas_in_sync if len(devices) > 1 else 1, *model.fit(data, epochs=2, verbose=0).history["loss"])
"""


def test_two_devices_train_as_one_does():
    one, two = (list(map(float, line.split())) for line in run_python(DISTRIBUTED).splitlines()[-2:])
    assert (one[0], two[0]) == (1, 2)
    np.testing.assert_allclose(two[1:], one[1:], rtol=5e-3)


JAX = importlib.util.find_spec("jax") is not None
WORKER = """
import sys, numpy as np, xwing_utils as xu
keras = xu.import_keras()
paths, matrices = xu.load_dataset("data/sample")
keras.utils.set_random_seed(0)
data = xu.make_dataset(paths[:8], matrices[:8], *xu.load_camera("data/sample"), size=64, batch_size=4, augmented=False, shuffle=True,
                       shard=xu.worker())
held = xu.make_dataset(paths[:4], matrices[:4], *xu.load_camera("data/sample"), size=64, batch_size=4, augmented=False)[0]
with xu.distribute():
    frames = keras.Input((64, 64, 3))
    maps = keras.layers.Conv2D(xu.CHANNELS, 3, strides=2, padding="same")(keras.layers.Rescaling(1 / 255)(frames))
    model = keras.Model(frames, xu.spatial_softmax(keras.layers.BatchNormalization()(maps), 2.0))
    model.settings = dict(keypoints=xu.CHANNELS, sigma=4.0, head="softmax", size=64, stride=2)
    xu.compile_model(model)
run = xu.run_folder(sys.argv[1])
for epochs in (1, 2):  # the second goes on where the first ended
    history = model.fit(data, epochs=epochs, callbacks=xu.training_callbacks(run, model, *held), verbose=0).history
    print("worker", *xu.worker(), len(data[0][0]), *history["loss"], *history["val_corner_px"])
"""


@pytest.mark.skipif(not JAX, reason="jax is not installed")
def test_two_workers_over_loopback_train_as_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    quiet = {k: v for k, v in os.environ.items() if k not in ("SM_FRAMEWORK", "XLA_FLAGS")} | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    several = {"KERAS_DISTRIBUTION_NUM_PROCESSES": "2", "KERAS_DISTRIBUTION_JOB_ADDRESSES": address, "NPROC": "8"}
    starts = [(tmp_path / "two", several | {"KERAS_DISTRIBUTION_PROCESS_ID": str(i)}) for i in (0, 1)] + [(tmp_path / "one", {})]
    running = [subprocess.Popen([sys.executable, "-c", WORKER, str(folder)], env=quiet | extra, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True, cwd=os.path.dirname(xu.__file__)) for folder, extra in starts]
    try:
        outputs = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    first, second, one = (np.array([line.split()[1:] for line in out.splitlines() if line.startswith("worker")], float) for out, _ in outputs)
    assert first.shape == second.shape == one.shape == (2, 5), outputs
    assert [row[:3].tolist() for row in (first[0], second[0], one[0])] == [[0, 2, 2], [1, 2, 2], [0, 1, 4]]
    np.testing.assert_allclose(second[:, 3:], first[:, 3:], rtol=1e-5)
    np.testing.assert_allclose(first[:, 3], one[:, 3], rtol=5e-3)
    assert len((tmp_path / "two" / "log.csv").read_text().splitlines()) == 3
    assert (tmp_path / "two" / "best.weights.h5").exists() and (tmp_path / "two" / "worker1" / "log.csv").exists()


def test_a_worker_s_part_of_a_batch(sample, camera):
    whole, *parts = (xu.make_dataset(sample[0][:8], sample[1][:8], *camera, size=64, batch_size=4, augmented=False, shuffle=True, shard=shard)
                     for shard in (None, (0, 2), (1, 2)))
    for i in range(2):
        for k in range(2):
            np.testing.assert_array_equal(parts[k][i][0], whole[i][0][k::2])
            np.testing.assert_array_equal(parts[k][i][1], whole[i][1][k::2])
    with pytest.raises(ValueError, match="3 workers, got 4"):
        xu.make_dataset(sample[0][:8], sample[1][:8], *camera, size=64, batch_size=4, shard=(0, 3))


def test_several_machines_are_refused_as_keras_cannot(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}))
    with pytest.raises(NotImplementedError, match="20585"):
        xu.distribute()


KILLED = f"""
import sys, xwing_utils as xu
keras = xu.import_keras()
paths, matrices = xu.load_dataset("data/sample")
data = xu.make_dataset(paths[:8], matrices[:8], *xu.load_camera("data/sample"), size=64, batch_size=4)
model = xu.compile_model(xu.build_model(**{TINY!r}))
model.fit(data, epochs=int(sys.argv[2]), callbacks=xu.training_callbacks(sys.argv[1], model, *data[0]), verbose=0)
print(int(model.optimizer.iterations))
"""


def test_training_goes_on_after_being_killed(tmp_path):
    program, log = [sys.executable, "-c", KILLED, str(tmp_path)], tmp_path / "log.csv"
    running = subprocess.Popen([*program, "1000"], cwd=os.path.dirname(xu.__file__), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 240
        while not (log.exists() and log.read_text().count("\n") >= 4) and time.monotonic() < until and running.poll() is None:
            time.sleep(0.05)
    finally:
        running.kill()
        running.wait()
    done = log.read_text().count("\n") - 1
    assert done >= 3
    again = subprocess.run([*program, str(done + 2)], cwd=os.path.dirname(xu.__file__), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-2000:]
    with log.open() as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == list(range(done + 2))
    assert int(again.stdout.split()[-1]) == 2 * (done + 2)  # steps, the killed run's among them


# ------------------------------------------------------------ callbacks


def rows_of(folder):
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def train(batches, small_model, tmp_path):
    """A function: train up to an epoch into tmp_path / "run" with a fresh network, as a new process would."""
    def run(epochs, seed=0, **arguments):
        (images, keypoints), small = batches(augmented=False)[0], small_model(seed)
        callbacks = xu.training_callbacks(tmp_path / "run", small, images, keypoints, **arguments)
        small.fit(batches(), epochs=epochs, callbacks=callbacks, verbose=0)
        return small
    return run


def test_a_run_writes_its_log_and_its_best_weights(train, tmp_path):
    train(2, facts={"data": "sample"})
    rows = rows_of(tmp_path / "run")
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert {"loss", "nmae_argmax", "learning_rate", "val_corner_px", "val_nearest_px", "val_named_identity"} <= set(rows[0])
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    errors = [float(row["val_corner_px"]) for row in rows]
    assert best["validation"]["corner_px"] == pytest.approx(min(errors))
    assert best["training"] == {"data": "sample", "best_epoch": int(np.argmin(errors)) + 1}
    assert (tmp_path / "run" / "best.weights.h5").exists()


def test_an_interrupted_run_goes_on_after_its_last_epoch(train, tmp_path):
    first = train(2)
    second = train(3, seed=1)
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == ["0", "1", "2"]
    assert second.optimizer.iterations == 6  # two steps each, the first four restored
    assert first.optimizer.iterations == 4


def test_a_finished_run_is_left_alone(train, tmp_path):
    first, second = train(2), train(2, seed=1)
    assert len(rows_of(tmp_path / "run")) == 2
    for before, after in zip(first.get_weights(), second.get_weights()):
        np.testing.assert_array_equal(before, after)


def test_a_resumed_run_keeps_better_weights_of_before(train, tmp_path, monkeypatch):
    train(1)
    before = (tmp_path / "run" / "best.weights.h5").read_bytes()
    report = xu.corner_report
    monkeypatch.setattr(xu, "corner_report", lambda *a: {**report(*a), "corner_px": 1e6})
    train(2, seed=1)
    assert (tmp_path / "run" / "best.weights.h5").read_bytes() == before


def test_the_learning_rate_falls_on_a_plateau_and_not_without(train, tmp_path, monkeypatch):
    report = xu.corner_report
    monkeypatch.setattr(xu, "corner_report", lambda *a: {**report(*a), "corner_px": 50.0})
    assert float(train(4).optimizer.learning_rate) < 0.5e-3
    monkeypatch.setattr(xu, "training_callbacks", lambda folder, *a, _make=xu.training_callbacks, **k: _make(f"{folder}2", *a, **k))
    assert float(train(4, plateau=False).optimizer.learning_rate) == pytest.approx(1e-3)


def test_a_resumed_run_goes_on_counting_towards_its_plateau(train, tmp_path, monkeypatch):
    report = xu.corner_report
    monkeypatch.setattr(xu, "corner_report", lambda *a: {**report(*a), "corner_px": 50.0})
    train(2)  # the best epoch, and one without progress
    assert float(train(3).optimizer.learning_rate) == pytest.approx(0.3e-3)  # the second without progress


def test_shipped_weights_bring_their_log_and_facts(train, tmp_path):
    train(2, facts={"steps": 2, "batch": 4})
    xu.ship_weights(tmp_path / "run", tmp_path / "weights")
    assert sorted(p.name for p in (tmp_path / "weights").iterdir()) == ["xwing.json", "xwing.weights.h5", "xwing_log.csv"]
    assert (tmp_path / "weights" / "xwing.weights.h5").read_bytes() == (tmp_path / "run" / "best.weights.h5").read_bytes()
    with (tmp_path / "weights" / "xwing_log.csv").open() as file:
        assert [(row["stage"], row["samples_seen"]) for row in csv.DictReader(file)] == [("1", "8"), ("1", "16")]
    assert json.loads((tmp_path / "weights" / "xwing.json").read_text())["training"]["samples_seen"] == 16


def test_training_from_shipped_weights_keeps_their_log(train, tmp_path, monkeypatch):
    train(2, facts={"steps": 2, "batch": 4})
    xu.ship_weights(tmp_path / "run", tmp_path / "weights")
    (tmp_path / "run").rename(tmp_path / "first")
    train(1, facts={"steps": 2, "batch": 4, "init": str(tmp_path / "weights" / "xwing.weights.h5")})
    xu.ship_weights(tmp_path / "run", tmp_path / "weights")
    with (tmp_path / "weights" / "xwing_log.csv").open() as file:
        assert [(row["stage"], row["samples_seen"]) for row in csv.DictReader(file)] == [("1", "8"), ("1", "16"), ("2", "24")]
    assert len(json.loads((tmp_path / "weights" / "xwing.json").read_text())["training"]["stages"]) == 2


@pytest.mark.parametrize("crop,size", [(False, 64), (True, 256)])
def test_weights_trained_on_squares_are_shipped_for_whole_frames(train, tmp_path, crop, size):
    train(1, facts={"crop": crop})
    xu.ship_weights(tmp_path / "run", tmp_path / "weights")
    assert json.loads((tmp_path / "weights" / "xwing.json").read_text())["model"]["size"] == size


def test_shipped_weights_bring_the_log_of_the_run_they_began_from(train, tmp_path):
    train(2, facts={"steps": 2, "batch": 4})
    (tmp_path / "run").rename(tmp_path / "first")
    train(1, facts={"steps": 2, "batch": 4, "init": str(tmp_path / "first" / "best.weights.h5")})
    xu.ship_weights(tmp_path / "run", tmp_path / "weights")
    with (tmp_path / "weights" / "xwing_log.csv").open() as file:
        assert [(row["stage"], row["samples_seen"]) for row in csv.DictReader(file)] == [("1", "8"), ("1", "16"), ("2", "24")]
    stages = json.loads((tmp_path / "weights" / "xwing.json").read_text())["training"]["stages"]
    assert [stage.get("init") is None for stage in stages] == [True, False]


def test_an_unfinished_run_cannot_be_shipped(tmp_path):
    with pytest.raises(FileNotFoundError, match="best.weights.h5"):
        xu.ship_weights(tmp_path, tmp_path / "weights")


@pytest.mark.parametrize("text,default,expected", [("5", 3, 5), ("0.5", 1.0, 0.5), ("a", "b", "a"), ("", 3, 3)])
def test_settings_come_from_the_environment(monkeypatch, text, default, expected):
    monkeypatch.setenv("XWING_THING", text)
    assert xu.setting("THING", default) == expected and type(xu.setting("THING", default)) is type(default)


def test_a_setting_of_another_type(monkeypatch):
    monkeypatch.setenv("XWING_THING", "many")
    with pytest.raises(ValueError, match="XWING_THING.*int.*many"):
        xu.setting("THING", 3)


# ------------------------------------------------------------ files


@pytest.fixture
def saved(model, tmp_path):
    xu.save_model(model, tmp_path / "a.weights.h5", epochs=3)
    return tmp_path / "a.weights.h5"


def test_saved_and_loaded_weights_predict_the_same(model, saved, images):
    loaded = xu.load_model(saved)
    assert loaded.settings == model.settings
    np.testing.assert_allclose(loaded.predict_on_batch(images), model.predict_on_batch(images), atol=2e-3)


def test_files_of_a_saved_model(model, saved):
    assert sorted(p.name for p in saved.parent.iterdir()) == ["a.json", "a.weights.h5"]
    written = json.loads((saved.parent / "a.json").read_text())
    np.testing.assert_allclose(written["model"].pop("points"), xu.KEYPOINTS, atol=1e-6)
    assert written == {"model": model.settings, "epochs": 3}


def test_kernels_are_stored_as_float16_and_the_rest_as_float32(saved):
    types = set()
    with h5py.File(saved) as file:
        file.visititems(lambda _, item: types.add((item.ndim >= 2, item.dtype.name)) if isinstance(item, h5py.Dataset) else None)
    assert types == {(True, "float16"), (False, "float32")}


def test_the_optimizer_s_state_is_not_stored(small_model, batches, tmp_path):
    small = small_model()
    small.fit(batches(), epochs=1, verbose=0)
    xu.save_model(small, tmp_path / "a.weights.h5")
    with h5py.File(tmp_path / "a.weights.h5") as file:
        assert "optimizer" not in file


def test_a_model_can_be_loaded_for_another_size(saved, model):
    larger = xu.load_model(saved, size=96)
    assert larger.input_shape == (None, 96, 96, 3) and larger.settings == {**model.settings, "size": 96}


def test_missing_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.weights.h5.*train.ipynb"):
        xu.load_model(tmp_path / "nothing.weights.h5")


def test_weights_without_their_settings(saved):
    (saved.parent / "a.json").unlink()
    with pytest.raises(FileNotFoundError, match="a.json"):
        xu.load_model(saved)


@pytest.mark.parametrize("name", ["a.h5", "a.keras", "a.pkl"])
@pytest.mark.parametrize("action", [xu.load_model, lambda path: xu.save_model(None, path)], ids=["load", "save"])
def test_a_file_with_another_suffix(tmp_path, name, action):
    with pytest.raises(ValueError, match=f"{name}.*weights.h5"):
        action(tmp_path / name)


def test_truncated_weights(saved):
    saved.write_bytes(saved.read_bytes()[:5000])
    with pytest.raises(ValueError, match="a.weights.h5"):
        xu.load_model(saved)


def test_foreign_weights(saved):
    with h5py.File(saved, "w") as file:
        file["layer/kernel"] = np.zeros((3, 3))
    with pytest.raises(ValueError, match="a.weights.h5"):
        xu.load_model(saved)


def test_weights_that_lack_one_layer(saved):
    with h5py.File(saved, "r+") as file:
        del file["layers/functional/layers/batch_normalization_3/vars"]
    with pytest.raises(ValueError, match="a.weights.h5"):
        xu.load_model(saved)


def test_weights_of_another_network(saved):
    info = json.loads((saved.parent / "a.json").read_text())
    info["model"]["decoder_filters"] = [8, 8, 8, 8, 8]
    (saved.parent / "a.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="a.weights.h5"):
        xu.load_model(saved)


@pytest.mark.parametrize("text", ["{}", "[]", '{"model": 3}', '{"model": {"colour": 3}}', "not json"])
def test_settings_of_something_else(saved, text):
    (saved.parent / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.(json|weights.h5)"):
        xu.load_model(saved)


def test_facts_that_cannot_be_stored_leave_both_files_alone(saved, small_model):
    before = {p.name: p.read_bytes() for p in saved.parent.iterdir()}
    with pytest.raises(TypeError):
        xu.save_model(small_model(), saved, error=np.float32(1))
    assert {p.name: p.read_bytes() for p in saved.parent.iterdir()} == before


def test_a_failed_save_leaves_both_files_and_nothing_else(saved, small_model, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.parent.iterdir()}

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(xu, "_copy_slim", fail)
    with pytest.raises(OSError, match="space"):
        xu.save_model(small_model(), saved)
    assert {p.name: p.read_bytes() for p in saved.parent.iterdir()} == before


# ------------------------------------------------------------ prediction


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_predictions_of_any_number_of_frames(model, images, count):
    keypoints, confidence = xu.predict_keypoints(model, images[:count], batch_size=4)
    assert keypoints.shape == (count, 8, 2) and confidence.shape == (count, 8)
    assert ((confidence >= 0) & (confidence <= 1)).all()


def test_predictions_do_not_depend_on_the_batches(model, images):
    first, second = (xu.predict_heatmaps(model, images, batch_size=b) for b in (2, 5))
    assert first.shape == (5, 32, 32, 8)
    np.testing.assert_allclose(first, second, atol=1e-4)


def test_predictions_are_in_pixels_of_the_frame(oracle, oracle_frames):
    truth = np.random.default_rng(0).uniform(10, 246, (3, 8, 2))
    for stride in (1, 2):
        keypoints, confidence = xu.predict_keypoints(oracle(truth, stride=stride), oracle_frames(3), batch_size=2)
        np.testing.assert_allclose(keypoints, truth, atol=0.05)
        assert confidence.min() > 0.95


def test_predictions_of_all_keypoints(oracle, oracle_frames):
    truth = np.random.default_rng(0).uniform(10, 246, (2, xu.CHANNELS, 2))
    keypoints, confidence = xu.predict_keypoints(oracle(truth), oracle_frames(2), channels=xu.CHANNELS)
    np.testing.assert_allclose(keypoints, truth, atol=0.05)
    assert confidence.shape == (2, xu.CHANNELS)


@pytest.mark.parametrize("bad", [np.zeros((2, 64, 64, 3), np.float32), np.zeros((2, 32, 64, 3), np.uint8), np.zeros((64, 64, 3), np.uint8),
                                 np.zeros((2, 64, 64), np.uint8), np.zeros((2, 64, 64, 4), np.uint8)],
                         ids=["float", "size", "one", "grey", "rgba"])
def test_frames_of_a_wrong_kind(model, bad):
    with pytest.raises(ValueError, match="64, 64, 3"):
        xu.predict_keypoints(model, bad)
