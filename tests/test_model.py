"""The network: building, a step of training, files, prediction. It is a tiny one, for speed."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import resource
import shutil

import h5py
import keras
import numpy as np
import openvino
import pytest

import xwing_utils as xu
from xwing import encoders, training
from xwing.network import read_network

TINY = {"backbone": "mobilenetv2", "size": 64, "decoder_filters": (16, 16, 8, 8, 8)}


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return xu.build_model(**TINY)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)


@pytest.fixture
def batches(sample, camera):
    return xu.make_dataset(
        sample[0][:8], sample[1][:8], *camera, size=64, batch_size=4, augmented=False
    )


# ------------------------------------------------------------ imports, settings


def test_the_core_works_without_a_learning_framework_until_a_model_is_asked_for(run_python):
    heavy = ("tensorflow", "keras", "torch", "jax", "segmentation_models", "albumentations", "h5py")
    output = run_python(f"""
import sys, numpy as np, xwing_utils as xu
paths, matrices = xu.load_dataset("data/sample")
view, projection = xu.load_camera("data/sample")
corners = xu.keypoints_of(matrices[:1], view, projection)[0]
xu.decode_heatmaps(xu.gaussian_heatmaps(corners, 256))
assert xu.solve_pose(corners, xu.camera_matrix(projection, 256, 256)) is not None
print([name for name in {heavy} if name in sys.modules])
""")
    assert output.strip() == "[]"


@pytest.mark.parametrize(
    "text,default,expected",
    [
        ("5", 3, 5),
        ("0.5", 1.0, 0.5),
        ("35", 35.0, 35.0),
        ("a", "b", "a"),
        ("", 3, 3),
        ("(1, 2)", (3, 4), (1, 2)),
        ("{5: (1, 2)}", {}, {5: (1, 2)}),
    ],
)
def test_settings_come_from_the_environment_and_say_so(
    monkeypatch, capsys, text, default, expected
):
    monkeypatch.setenv("XWING_THING", text)
    value = xu.setting("THING", default)
    assert value == expected and type(value) is type(default)
    assert ("XWING_THING" in capsys.readouterr().out) == bool(text)


@pytest.mark.parametrize(
    "text,default,message",
    [
        ("35mm", 35.0, "expected a number such as 35, got '35mm'"),
        ("nan", 35.0, "expected a number"),
        ("inf", 1e-3, "such as 0.001"),
        ("many", 3, "expected a number such as 3"),
        ("1.5", 3, "such as 3"),
        ("7", (1, 2), r"expected a value such as \(1, 2\), got '7'"),
        ("{1: ", {}, "expected a value such as {}"),
    ],
)
def test_a_setting_of_another_type_is_named(monkeypatch, text, default, message):
    """Defect 21."""
    monkeypatch.setenv("XWING_FOCAL", text)
    with pytest.raises(ValueError, match=f"XWING_FOCAL: .*{message}"):
        xu.setting("FOCAL", default)


# ------------------------------------------------------------ building


@pytest.mark.parametrize(
    "change,message",
    [
        ({"backbone": "resnet1000"}, "resnet1000"),
        ({"head": "sigmoid"}, "sigmoid"),
        ({"size": 100}, "100"),
        ({"size": 0}, "32"),
        ({"size": -64}, "32"),
        ({"stride": 4}, "stride"),
        ({"sigma": float("nan")}, "sigma"),
        ({"sigma": -1.0}, "sigma"),
        ({"decoder_filters": (10**6, 16, 8, 8, 8)}, "filters"),
        ({"keypoints": 10**9}, "keypoints"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        xu.build_model(**{**TINY, **change})


def test_the_network_s_shape_and_settings(model):
    assert model.output_shape == (None, 32, 32, 36)
    assert model.settings == {
        **TINY,
        "decoder_filters": [16, 16, 8, 8, 8],
        "keypoints": 36,
        "stride": 2,
        "sigma": xu.SIGMA,
        "head": "softmax",
    }


def openvino_maps(path, images):
    """What OpenVINO finds in images with the network of some weights."""
    network = read_network(path)
    network.reshape(images.shape)
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino.compile_model(network, "CPU", options)(images.astype(np.float32))[0]


def test_a_network_with_maps_of_the_frame_s_size_and_a_linear_head(images, tmp_path):
    scaling = {"scale": [0.01, 0.02, 0.03], "offset": [-1, -2, -3]}
    arguments = {**TINY, "backbone": "resnet34", "preprocessing": scaling}
    linear = xu.build_model(**arguments, keypoints=8, head="linear", stride=1)
    training.save_model(linear, tmp_path / "a.weights.h5")
    linear.load_weights(tmp_path / "a.weights.h5")  # kernels are stored as float16
    maps = linear.predict_on_batch(images)
    assert maps.shape == (5, 64, 64, 8) and maps.dtype == np.float32
    assert (maps < 0).any()
    off = np.abs(openvino_maps(tmp_path / "a.weights.h5", images) - maps).max()
    assert off < 1e-4 * np.abs(maps).max()


def test_maps_of_the_softmax_head_hold_at_most_a_gaussian_s_mass(model, images):
    maps = model.predict_on_batch(images)
    mass = 2 * np.pi * (xu.SIGMA / 2) ** 2
    assert (maps >= 0).all() and (maps.sum((1, 2)) <= mass * 1.0001).all()


def test_the_backbones_are_those_that_keras_builds():
    sm = xu.import_segmentation_models()
    assert set(sm.get_available_backbone_names()) - set(xu.BACKBONES) == {
        "densenet121",
        "densenet169",
        "densenet201",
        "senet154",
    }
    with pytest.raises(ValueError, match="/"):
        sm.Unet("densenet121", input_shape=(64, 64, 3), encoder_weights=None)


# ------------------------------------------------------------ weights of others

RESNET = {**TINY, "backbone": "resnet18"}


def other_target():
    """A target whose keypoints are not those of the X-wing."""
    keypoints = xu.XWING.keypoints * [1, 0.5, 1]
    return dataclasses.replace(xu.XWING, name="probe", keypoints=keypoints, box=keypoints[:8])


def encoder_of(network):
    """The encoder of a network as Keras model, for [0, 255]."""
    unet = network.layers[2]
    return keras.Model(unet.input, unet.get_layer("relu1").output)


@pytest.fixture(scope="module")
def plain():
    keras.utils.set_random_seed(1)
    return xu.build_model(**RESNET, target=other_target())


@pytest.fixture(scope="module")
def pretrained(plain, tmp_path_factory):
    """A network whose encoder's weights are those of a file, and its own file."""
    folder = tmp_path_factory.mktemp("encoder")
    encoder_of(plain).save(folder / "encoder.h5")
    network = encoders.build_pretrained(**RESNET, encoder_weights=folder / "encoder.h5")
    training.save_model(network, folder / "a.weights.h5")
    return network, folder / "a.weights.h5"


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_a_pretrained_encoder_sees_the_frames_that_it_was_trained_on(plain, pretrained, images):
    """The ResNets of classification_models were trained on [0, 255]."""
    network, path = pretrained
    expected = {"scale": [1.0, 1.0, 1.0], "offset": [0.0, 0.0, 0.0]}
    assert network.settings["preprocessing"] == expected
    assert xu.weights_settings(path)["model"] == network.settings
    features = keras.Model(network.input, network.layers[1].output)(images)
    np.testing.assert_array_equal(features, images)
    for ours, theirs in zip(encoder_of(network).get_weights(), encoder_of(plain).get_weights()):
        np.testing.assert_array_equal(ours, theirs)


def weights_of(network, head):
    """The weights of the last layer, or all the others."""
    return [
        keras.ops.convert_to_numpy(variable)
        for variable in network.weights
        if ("maps" in variable.path) == head
    ]


def same(first, second):
    return all(np.allclose(a, b, atol=1e-3) for a, b in zip(first, second, strict=True))


def test_another_target_begins_from_encoder_and_decoder(plain, pretrained, monkeypatch, capsys):
    network, path = pretrained
    monkeypatch.setattr(xu, "load_model", lambda weights: network)  # to build one network less
    begun = training.begin_from(plain, path)
    said = capsys.readouterr().out
    assert said.startswith("begins with encoder and decoder of a.weights.h5 (X-wing, 0 samples)")
    assert said.endswith("; the last layer anew for probe\n")
    assert begun.target.name == "probe" and begun.settings == network.settings
    assert same(weights_of(begun, head=False), weights_of(network, head=False))
    assert not same(weights_of(begun, head=True), weights_of(network, head=True))

    begun.target = xu.XWING
    again = training.begin_from(begun, path)
    assert again is begun and "the last layer, too" in capsys.readouterr().out
    assert same(again.get_weights(), network.get_weights())


def test_weights_of_another_network_are_no_beginning(model, plain, pretrained):
    _, path = pretrained
    with pytest.raises(ValueError, match="network has backbone 'resnet18', this one 'mobilen"):
        training.begin_from(model, path)
    with pytest.raises(FileNotFoundError, match="nothing.weights.h5"):
        training.begin_from(model, path.with_name("nothing.weights.h5"))


def test_encoder_weights_that_cannot_be_had(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.h5"):
        encoders.build_pretrained(**RESNET, encoder_weights=tmp_path / "nothing.h5")
    (tmp_path / "foreign.h5").write_bytes(b"foreign")
    with pytest.raises(ValueError, match="foreign.h5 does not hold the encoder resnet18 .*file"):
        encoders.build_pretrained(**RESNET, encoder_weights=tmp_path / "foreign.h5")

    def fail(*_, **__):
        raise Exception("URL fetch failure on https://...: None -- Name or service not known")

    monkeypatch.setattr(xu.import_segmentation_models(), "Unet", fail)
    with pytest.raises(ValueError, match="cannot be downloaded .URL fetch.*local .h5 file"):
        encoders.build_pretrained(**RESNET, encoder_weights="imagenet")


def test_trained_encoders_see_what_their_library_prepares():
    """VGG reads BGR: its first layer is turned round instead of the frames."""
    sm = xu.import_segmentation_models()
    frame = np.random.default_rng(0).uniform(0, 255, (1, 2, 2, 3)).astype(np.float32)
    for backbone in ("mobilenetv2", "resnet18", "efficientnetb0", "seresnet50", "vgg16"):
        chosen = encoders.find_preprocessing(backbone) or {"scale": 1 / 127.5, "offset": -1.0}
        ours = frame * np.array(chosen["scale"]) + np.array(chosen["offset"])
        ours = ours[..., ::-1] if encoders.reads_bgr(backbone) else ours
        np.testing.assert_allclose(ours, sm.get_preprocessing(backbone)(frame.copy()), atol=1e-3)
        assert (backbone == "vgg16") == encoders.reads_bgr(backbone)


# ------------------------------------------------------------ training


def test_training_moves_the_shipped_kind_of_network(batches):
    network = xu.compile_model(xu.build_model(**{**TINY, "backbone": xu.BACKBONE}))
    network.run_eagerly = True  # two steps are over before their graph would be traced
    before = network.get_weights()
    history = network.fit(batches, epochs=1, verbose=0).history
    assert np.isfinite(history["loss"]).all() and 0 <= history["nmae_argmax"][0] <= 1
    assert network.optimizer.iterations == 2
    assert max(np.abs(a - b).max() for a, b in zip(before, network.get_weights())) > 0
    assert network.jit_compile is False or "GPU" in str(keras.distribution.list_devices()).upper()


@pytest.mark.parametrize("kind", ["softmax", "mse", "weighted"])
def test_training_lowers_each_loss(batches, kind):
    keras.utils.set_random_seed(0)
    frames = keras.Input((64, 64, 3))
    bright = keras.layers.Rescaling(1 / 255)(frames)
    maps = keras.layers.Conv2D(36, 3, strides=2, padding="same")(bright)
    small = keras.Model(frames, xu.spatial_softmax(maps, 2.0))
    small.settings = {"sigma": 4.0, "head": "softmax", "size": 64, "stride": 2}
    xu.compile_model(small, 0.01, xu.HeatmapLoss(4.0, kind, 2))
    losses = small.fit(batches, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


BACKEND_TRAINING = f"""
import numpy as np, keras, xwing_utils as xu
paths, matrices = xu.load_dataset("data/sample")
camera = xu.load_camera("data/sample")
data = xu.make_dataset(paths[:8], matrices[:8], *camera, size=64, batch_size=4, workers=1)
model = xu.compile_model(xu.build_model(**{TINY!r}))
history = model.fit(data, epochs=1, verbose=0).history
keypoints, confidence = xu.predict_keypoints(model, data[0][0], batch_size=4)
assert keypoints.shape == (4, 8, 2) and confidence.shape == (4, 8)
finite = bool(np.isfinite(history["loss"]).all())
print(keras.backend.backend(), int(model.optimizer.iterations), finite)
"""


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_two_steps_of_training_with_another_backend(run_python, backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    assert run_python(BACKEND_TRAINING, KERAS_BACKEND=backend).split() == [backend, "2", "True"]


# ------------------------------------------------------------ files


@pytest.fixture(scope="module")
def saved_once(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    training.save_model(model, folder / "a.weights.h5", epochs=3)
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    """Weights in a folder of their own, which a test may damage."""
    shutil.copytree(saved_once, tmp_path / "saved")
    return tmp_path / "saved" / "a.weights.h5"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saved_and_loaded_weights_predict_the_same(model, saved, images):
    loaded = xu.load_model(saved)
    assert loaded.settings == model.settings
    np.testing.assert_allclose(
        loaded.predict_on_batch(images), model.predict_on_batch(images), atol=2e-3
    )


def test_weights_are_two_files_that_describe_the_model_and_its_target(model, saved):
    assert sorted(contents(saved.parent)) == ["a.json", "a.weights.h5"]
    info = xu.weights_settings(saved)
    assert info["model"] == model.settings and info["epochs"] == 3
    target = xu.weights_target(saved)
    np.testing.assert_array_equal(target.keypoints, xu.KEYPOINTS)
    np.testing.assert_array_equal(target.mirror, xu.XWING.mirror)
    assert target.mesh == xu.XWING.mesh


def test_kernels_are_stored_as_float16_the_rest_as_float32_the_optimizer_not(saved, tmp_path):
    network = xu.compile_model(xu.load_model(saved))
    network.optimizer.build(network.trainable_variables)
    training.save_model(network, tmp_path / "b.weights.h5")
    items = []
    with h5py.File(tmp_path / "b.weights.h5") as file:
        assert "optimizer" not in file
        file.visititems(lambda _, item: items.append(item))
        types = {
            (item.ndim >= 2, item.dtype.name) for item in items if isinstance(item, h5py.Dataset)
        }
    assert types == {(True, "float16"), (False, "float32")}


def test_a_model_can_be_loaded_for_another_size_and_is_saved_for_its_own(saved, model, tmp_path):
    """Defect 11: a model that was loaded for larger frames was saved as one for larger frames."""
    larger = xu.load_model(saved, size=96)
    assert larger.input_shape == (None, 96, 96, 3)
    assert larger.settings == {**model.settings, "size": 96}
    training.save_model(larger, tmp_path / "b.weights.h5")
    assert xu.load_model(tmp_path / "b.weights.h5").settings == model.settings
    with pytest.raises(ValueError, match="^size: expected a multiple of 32, got 100"):
        xu.load_model(saved, size=100)


def test_the_weights_that_come_with_the_project_are_those_that_their_settings_describe(root):
    stored = json.loads((root / "weights" / "xwing.json").read_text())
    assert len(stored["sha256"]) == 64
    info = xu.weights_settings(root / "weights" / "xwing.weights.h5")
    assert info["training"]["samples_seen"] > 600_000


def test_missing_weights_are_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.weights.h5.*train.ipynb"):
        xu.load_model(tmp_path / "nothing.weights.h5")
    (saved.parent / "a.json").unlink()
    with pytest.raises(FileNotFoundError, match="a.json"):
        xu.load_model(saved)


@pytest.mark.parametrize("name", ["a.h5", "a.keras", "a.pkl"])
def test_a_file_with_another_suffix(model, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}.*weights.h5"):
        xu.load_model(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}.*weights.h5"):
        training.save_model(model, tmp_path / name)


def change_settings(path, digest=None, **changes):
    """Write other settings beside the weights, and the digest of the bytes `digest` if given."""
    settings = path.parent / "a.json"
    info = json.loads(settings.read_text())
    info["model"].update(changes)
    if digest:
        info["sha256"] = hashlib.sha256(digest).hexdigest()
    settings.write_text(json.dumps(info))


def damage(path, kind):
    """Damage the weights in one of several ways."""
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "garbage":
        path.write_bytes(b"garbage" * 1000)
    elif kind == "foreign":
        with h5py.File(path, "w") as file:
            file["layer/kernel"] = np.zeros((3, 3))
    elif kind == "without a layer":
        with h5py.File(path, "r+") as file:
            del file["layers/functional/layers/batch_normalization_3/vars"]
    elif kind == "with moved tensors":
        with h5py.File(path, "r+") as file:
            layers = file["layers/functional/layers"]
            for old, new in (("conv2d", "other"), ("conv2d_1", "conv2d"), ("other", "conv2d_1")):
                layers.move(old, new)


@pytest.mark.filterwarnings("ignore:Skipping nested container")
@pytest.mark.parametrize("crafted", [False, True])  # with a digest that fits the damaged file
@pytest.mark.parametrize(
    "kind", ["truncated", "garbage", "foreign", "without a layer", "with moved tensors"]
)
def test_damaged_and_foreign_weights_are_refused(saved, kind, crafted):
    damage(saved, kind)
    if crafted:
        change_settings(saved, saved.read_bytes())
    message = "not the weights of a.json, or damaged"
    if crafted:
        message = "not weights of this project's network"
    with pytest.raises(ValueError, match=f"a.weights.h5: {message}.*git checkout weights"):
        xu.load_model(saved)


def test_a_tensor_of_a_wrong_shape_is_refused_before_it_is_read(saved, monkeypatch):
    """Defect 14: a small file with a huge compressed tensor took 15 GB."""
    with h5py.File(saved, "r+") as file:
        variables = file["layers/functional/layers/conv2d/vars"]
        del variables["0"]
        variables.create_dataset(
            "0", (40_000, 100_000), "f4", chunks=(100, 100_000), compression="gzip"
        )
    assert saved.stat().st_size < 20e6
    change_settings(saved, saved.read_bytes())

    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(h5py.Dataset, "__getitem__", read)
    monkeypatch.setattr(h5py.Dataset, "__array__", read)
    with pytest.raises(ValueError, match="a.weights.h5: not weights.*shapes"):
        xu.load_model(saved)


def test_settings_of_another_network_are_refused(saved):
    change_settings(saved, decoder_filters=[8, 8, 8, 8, 8])
    with pytest.raises(ValueError, match="a.weights.h5"):
        xu.load_model(saved)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "3", '{"model": 3}', '{"model": []}', '{"model": {"colour": 3}}', "not json"],
)
def test_files_that_are_no_settings_are_refused(saved, text):
    """Defect 21: an empty file, and other files that are no settings."""
    (saved.parent / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json"):
        xu.load_model(saved)


@pytest.mark.parametrize(
    "name,value",
    [
        ("sigma", float("nan")),
        ("sigma", -2.0),
        ("sigma", "2"),
        ("keypoints", 36.5),
        ("keypoints", -1),
        ("size", "256"),
        ("size", 1e9),
        ("stride", []),
        ("decoder_filters", 3),
        ("decoder_filters", [10**6] * 5),
        ("backbone", 18),
        ("head", None),
        ("points", 3),
        ("points", [[0, 0]]),
        ("preprocessing", 3),
        ("preprocessing", {"scale": [1, 1, 1]}),
        ("preprocessing", {"scale": 1, "offset": [0, 0, 0]}),
    ],
)
def test_settings_with_a_bad_value_are_refused(saved, name, value):
    """Defect 21: NaN and a negative sigma were accepted."""
    change_settings(saved, **{name: value})
    with pytest.raises(ValueError, match="a.(json|weights.h5)"):
        xu.load_model(saved)


def test_facts_that_cannot_be_stored_leave_both_files_alone(saved, model):
    before = contents(saved.parent)
    with pytest.raises(TypeError):
        training.save_model(model, saved, error=np.float32(1))
    assert contents(saved.parent) == before


@pytest.mark.parametrize("room", [0, 100_000])
def test_a_full_disk_is_an_error_and_leaves_both_files_and_nothing_else(saved, model, room):
    """Defect 14: HDF5 ended the process with SIGSEGV and left temporary files."""
    before = contents(saved.parent)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, unlimited[1]))
    try:
        with pytest.raises(OSError, match="a.weights.h5"):
            training.save_model(model, saved, epochs=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert contents(saved.parent) == before


class Killed(BaseException):
    pass


def test_a_kill_between_weights_and_settings_is_noticed(saved, model, monkeypatch):
    """Defect 14: new weights under old settings were loaded as if they belonged together."""

    def replace(source, target, rename=os.replace):
        rename(source, target)
        raise Killed

    other = xu.build_model(**TINY)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        training.save_model(other, saved)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="a.weights.h5: not the weights of a.json"):
        xu.load_model(saved)
    training.save_model(other, saved)
    assert xu.load_model(saved).settings == other.settings


# ------------------------------------------------------------ prediction


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_predictions_of_any_number_of_frames(model, images, count):
    keypoints, confidence = xu.predict_keypoints(model, images[:count], 4)
    assert keypoints.shape == (count, 8, 2) and confidence.shape == (count, 8)
    assert ((confidence >= 0) & (confidence <= 1)).all()


def test_predictions_do_not_depend_on_the_batches(model, images):
    first, second = (xu.predict_heatmaps(model, images, batch_size=count) for count in (2, 5))
    assert first.shape == (5, 32, 32, 8)
    assert xu.predict_heatmaps(model, images, channels=99).shape[-1] == model.settings["keypoints"]
    np.testing.assert_allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_predictions_are_in_pixels_of_the_frame(oracle, oracle_frames, stride):
    truth = np.random.default_rng(0).uniform(10, 246, (3, 36, 2))
    network = oracle(truth, stride=stride)
    frames = oracle_frames(3)
    keypoints, confidence = xu.predict_keypoints(network, frames, 2, channels=36)
    maps = xu.predict_heatmaps(network, frames, 2, channels=36)
    again, again_confidence, sigma = xu.read_keypoints(maps, network.settings)
    np.testing.assert_allclose(keypoints, truth, atol=0.05)
    np.testing.assert_allclose(again, keypoints, atol=1e-5)
    np.testing.assert_allclose(again_confidence, confidence, atol=1e-5)
    assert confidence.min() > 0.95 and xu.MIN_SIGMA <= sigma.min() and sigma.max() < 2


def test_a_peak_that_the_mirror_image_does_not_have_is_dropped():
    """The network has two peaks in the frame, and only the weaker one in the mirrored frame."""
    right = xu.gaussian_heatmaps([(9.0, 12.0)], 32, 2.0)
    wrong = xu.gaussian_heatmaps([(20.0, 20.0)], 32, 2.0)
    upright = np.full((1, 32, 32, 8), -0.1, np.float32)
    upright[0, ..., 3] = np.maximum(0.9 * right, wrong)[..., 0]
    mirrored = np.zeros((1, 32, 32, 8), np.float32)
    mirrored[0, ..., xu.MIRROR[3]] = right[:, ::-1, 0]
    answers = [upright, mirrored]
    images = np.zeros((1, 32, 32, 3), np.uint8)
    maps = xu.average_mirrored(lambda images: answers.pop(0), images, xu.MIRROR)
    assert np.abs(xu.heatmap2argmax(maps)[0, 3] - [8.5, 11.5]).max() < 1
    assert maps[0, 20, 20, 3] < 1e-3 and not maps[..., :3].any()


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((2, 64, 64, 3), np.float32),
        np.zeros((2, 32, 64, 3), np.uint8),
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((2, 64, 64), np.uint8),
        np.zeros((2, 64, 64, 4), np.uint8),
    ],
)
def test_frames_of_a_wrong_kind(model, bad):
    with pytest.raises(ValueError, match="64, 64, 3"):
        xu.predict_keypoints(model, bad)
