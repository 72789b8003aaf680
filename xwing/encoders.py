"""Encoders that begin with weights that were trained to classify photographs.

segmentation_models offers ImageNet weights for its encoders. Each family of encoders was trained on
frames that were scaled in its own way, so the network's first layer has to scale them like that.
The scaling is part of a network's settings, and a network that is loaded again does the same.
"""

import functools
from pathlib import Path

import numpy as np

import xwing_utils as xu

keras = xu.import_keras()


def build_pretrained(
    backbone: str, encoder_weights: str | Path, **arguments: object
) -> keras.Model:
    """Build a network whose encoder has been trained to classify photographs.

    Args:
        backbone: an encoder of segmentation_models, see `xwing_utils.build_model`.
        encoder_weights: "imagenet" for those that segmentation_models downloads, or an .h5 file of
            the encoder alone, as classification_models offers it (NAME_imagenet_1000_no_top.h5).
        arguments: further ones of `build_model`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: arguments that do not fit, or weights that cannot be downloaded or read.
    """
    if encoder_weights != "imagenet" and not Path(encoder_weights).is_file():
        raise FileNotFoundError(f"encoder_weights: no such file: {encoder_weights}")
    return xu.build_model(
        backbone,
        preprocessing=find_preprocessing(backbone),
        unet=functools.partial(_make_unet, str(encoder_weights)),
        **arguments,
    )


def find_preprocessing(backbone: str) -> dict | None:
    """Find how frames are scaled for a trained encoder: `build_model`'s "preprocessing".

    It is read from two pixels that the library's own function prepares. None: the usual [-1, 1].
    """
    prepare = xu.import_segmentation_models().get_preprocessing(backbone)
    black, white = (
        np.asarray(prepare(np.full((1, 1, 1, 3), value, np.float32)), float).ravel()
        for value in (0, 255)
    )
    if reads_bgr(backbone):
        black, white = black[::-1], white[::-1]
    scale = (white - black) / 255
    usual = xu.PREPROCESSING["scale"], xu.PREPROCESSING["offset"]
    if np.allclose(np.stack([scale, black], 1), usual, rtol=1e-5):
        return None
    return {"scale": scale.tolist(), "offset": black.tolist()}


def reads_bgr(backbone: str) -> bool:
    """Tell whether a trained encoder expects blue as its first channel."""
    prepare = xu.import_segmentation_models().get_preprocessing(backbone)
    red = np.zeros((1, 1, 1, 3), np.float32)
    red[..., 0] = 255
    change = np.abs(prepare(red.copy()) - prepare(np.zeros_like(red))).ravel()
    return bool(change.argmax() == 2)


def _make_unet(weights, backbone, **arguments):
    """segmentation_models' U-Net with these weights of the encoder, for frames in RGB."""
    arguments["encoder_weights"] = weights
    try:
        unet = xu.import_segmentation_models().Unet(backbone, **arguments)
    except Exception as error:  # Keras raises a plain one where a download fails
        raise _encoder_error(backbone, weights, error) from None
    if reads_bgr(backbone):
        first = next(layer for layer in unet.layers if layer.weights)
        kernel, *rest = first.get_weights()
        first.set_weights([kernel[:, :, ::-1], *rest])
    return unet


def _encoder_error(backbone, weights, error):
    """The ValueError that says why encoder weights cannot be had, and what to do."""
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    if weights == "imagenet":
        text = f"the ImageNet weights of {backbone} cannot be downloaded ({reason})"
        advice = "give a local .h5 file of them, or begin with weights of this project (INIT)"
    else:
        text = f"{weights} does not hold the encoder {backbone} ({reason})"
        advice = "give an .h5 file of the encoder alone, without its last layers"
    return ValueError(f"encoder_weights: {text}; {advice}")
