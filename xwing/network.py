"""A trained network in OpenVINO's operations.

OpenVINO runs networks faster than Keras on a processor, and is a small package. `read_network`
builds the U-Net on a ResNet-18 or ResNet-34 from the weights file alone, so footage is tracked
without TensorFlow. Networks with other encoders are built and converted by Keras.

Source: He et al., Identity Mappings in Deep Residual Networks, ECCV 2016 (the encoder);
Ronneberger et al., U-Net, MICCAI 2015.
"""

import math
import tempfile
from pathlib import Path

import h5py
import numpy as np
import openvino
import openvino.opset13 as ops

import xwing_utils as xu

# Residual blocks of each of the four stages.
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
ENCODER_EPSILON = 2e-5  # added to variances, in classification_models
DECODER_EPSILON = 1e-3  # and in segmentation_models


def read_network(weights: str | Path) -> openvino.Model:
    """Return the network of some weights.

    It takes frames (B, H, W, 3) float32 in [0, 255], RGB, and returns heatmaps (B, H / stride,
    W / stride, K) float32. `reshape` sets another size of the frames.

    Args:
        weights: `NAME.weights.h5`, with `NAME.json` beside it.

    Raises:
        ImportError: the encoder is none of BLOCKS, and Keras is not installed.
        ValueError: the weights do not fit their settings.
    """
    path, _ = xu.weights_files(weights)
    settings = xu.weights_settings(path)["model"]
    if settings["backbone"] not in BLOCKS:
        return _convert(path)
    try:
        with h5py.File(path) as file:
            return _UNet(file["layers/functional/layers"], settings).build()
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not weights of this project's network ({error})") from None


class _UNet:
    """Builds a U-Net. It takes the layers of a file in the order in which Keras numbers them."""

    def __init__(self, layers, settings):
        self.layers = layers
        self.settings = settings
        self.taken = {"conv2d": 0, "batch_normalization": 0}

    def build(self):
        size = xu.FRAME_SIZE
        frames = ops.parameter([-1, size, size, 3], np.float32, "frames")
        preprocessing = self.settings.get("preprocessing", xu.PREPROCESSING)
        scale, offset = (np.float32(preprocessing[name]) for name in ("scale", "offset"))
        x = ops.add(ops.multiply(frames, scale), offset)
        x = ops.transpose(x, [0, 3, 1, 2])  # OpenVINO's convolutions have the channels first

        x = self._decode(*self._encode(x))
        logits = ops.transpose(x, [0, 2, 3, 1])
        maps = logits if self.settings["head"] == "linear" else self._softmax(logits)
        return openvino.Model([maps], [frames], "xwing")

    def _encode(self, x):
        """The deepest features, and those of the stages above, the deepest first."""
        x = self._normalise(x, ENCODER_EPSILON, scaled=False)
        x = self._convolve(x, stride=2)
        x = ops.relu(self._normalise(x, ENCODER_EPSILON))
        skips = [x]
        x = _pool(x)

        for stage, blocks in enumerate(BLOCKS[self.settings["backbone"]]):
            for block in range(blocks):
                first = block == 0
                x, activated = self._residual(x, 2 if first and stage > 0 else 1, first)
                if first and stage > 0:
                    skips.insert(0, activated)
        return ops.relu(self._normalise(x, ENCODER_EPSILON)), skips

    def _residual(self, x, stride, first):
        """Add what two convolutions make of some features; also return the features activated."""
        activated = ops.relu(self._normalise(x, ENCODER_EPSILON))
        y = self._convolve(activated, stride)
        y = ops.relu(self._normalise(y, ENCODER_EPSILON))
        y = self._convolve(y)
        shortcut = self._convolve(activated, stride) if first else x
        return ops.add(y, shortcut), activated

    def _decode(self, x, skips):
        stages = 4 if self.settings["stride"] == 2 else 5
        for stage in range(stages):
            x = _enlarge(x)
            if stage < len(skips):
                x = ops.concat([x, skips[stage]], 1)
            for _ in range(2):
                x = ops.relu(self._normalise(self._convolve(x), DECODER_EPSILON))
        return self._convolve(x)

    def _softmax(self, logits):
        """What `xwing_utils.spatial_softmax` computes in training, for frames of FRAME_SIZE."""
        stride = self.settings["stride"]
        largest = ops.maximum(ops.reduce_max(logits, [1, 2], keep_dims=True), np.float32(0))
        weights = ops.exp(ops.subtract(logits, largest))
        absent = ops.exp(ops.subtract(np.float32(2 * math.log(xu.FRAME_SIZE / stride)), largest))
        total = ops.add(ops.reduce_sum(weights, [1, 2], keep_dims=True), absent)
        peak = 2 * math.pi * (self.settings["sigma"] / stride) ** 2
        return ops.multiply(weights, ops.divide(np.float32(peak), total))

    def _take(self, kind):
        """The arrays of the next layer of a kind."""
        number = self.taken[kind]
        self.taken[kind] += 1
        group = self.layers[f"{kind}_{number}" if number else kind]["vars"]
        return [group[str(index)][()] for index in range(len(group))]

    def _convolve(self, x, stride=1):
        kernel, *bias = self._take("conv2d")
        kernel = ops.constant(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
        edge = [kernel.shape[2] // 2] * 2
        x = ops.convolution(x, ops.convert(kernel, "f32"), [stride] * 2, edge, edge, [1, 1])
        return ops.add(x, bias[0][:, None, None]) if bias else x

    def _normalise(self, x, epsilon, scaled=True):
        arrays = self._take("batch_normalization")
        gamma = arrays.pop(0) if scaled else 1.0
        beta, mean, variance = arrays
        scale = gamma / np.sqrt(variance + epsilon)
        offset = beta - mean * scale
        scaled_x = ops.multiply(x, np.float32(scale)[:, None, None])
        return ops.add(scaled_x, np.float32(offset)[:, None, None])


def _pool(x):
    """The largest of 3 x 3 values, at every second place."""
    return ops.max_pool(x, [2, 2], [1, 1], [1, 1], [1, 1], [3, 3]).output(0)


def _enlarge(x):
    """Repeat each value twice across and down."""
    nearest = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return ops.interpolate(x, np.float32([2, 2]), "nearest", "scales", axes=[2, 3], **nearest)


def _convert(path):
    """Build a network with Keras and convert it, which takes a quarter of a minute."""
    try:
        model = xu.load_model(path)
    except ImportError as error:
        encoders = " or ".join(BLOCKS)
        raise ImportError(
            f"{path}: a network whose encoder is not {encoders} needs Keras ({error}); "
            "pip install '.[full]'"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder, "model.xml")
        try:
            model.export(str(xml), format="openvino", verbose=False)
            content = xml.read_bytes(), xml.with_suffix(".bin").read_bytes()
            return openvino.Core().read_model(*content)
        except RuntimeError as error:
            raise OSError(
                f"{folder}: the network cannot be exported ({error}); is the disk full?"
            ) from None
