"""Heatmaps, the loss and the metric, against plain numpy and cases worked out by hand."""

import keras
import numpy as np
import pytest

import xwing_utils as xu

KINDS = ("softmax", "mse", "weighted")


def to_numpy(x):
    return keras.ops.convert_to_numpy(x)


# ------------------------------------------------------------ drawing


def test_values_are_those_of_the_gaussian_at_the_pixel_centres():
    # At a pixel's centre, between centres, just outside.
    keypoints = np.array([[10.5, 20.5], [10.2, 20.9], [-2.0, 16.5]])
    maps = xu.gaussian_heatmaps(keypoints, (40, 30), 3.0)
    assert maps.shape == (40, 30, 3) and maps.dtype == np.float32
    assert maps[20, 10, 0] == 1.0 == maps.max()
    for k, (x, y) in enumerate(keypoints):
        for row, column in ((20, 10), (25, 3), (0, 0), (16, 0)):
            squared = (column + 0.5 - x) ** 2 + (row + 0.5 - y) ** 2
            assert maps[row, column, k] == pytest.approx(np.exp(-squared / 18), abs=1e-7)


def test_each_keypoint_has_one_peak_in_its_own_channel():
    keypoints = np.random.default_rng(0).uniform(5, 45, (8, 2))
    maps = xu.gaussian_heatmaps(keypoints, (50, 60), 2.0)
    for k, (x, y) in enumerate(keypoints):
        m = np.pad(maps[..., k], 1, constant_values=-1)
        steps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dx or dy]
        neighbours = [m[1 + dy : 51 + dy, 1 + dx : 61 + dx] for dy, dx in steps]
        peaks = np.argwhere((m[1:-1, 1:-1] > np.max(neighbours, 0)) & (m[1:-1, 1:-1] > 1e-6))
        assert peaks.tolist() == [[int(y), int(x)]]


def test_a_keypoint_far_outside_leaves_zeros_and_an_int_is_the_size_of_a_square():
    maps = xu.gaussian_heatmaps([[-1e4, -1e4], [300, 20], [20, -250]], 64, 4.0)
    assert maps.shape == (64, 64, 3) and not maps.any()


@pytest.mark.parametrize(
    "keypoints,sigma,message",
    [
        ([[1, np.nan]], 4.0, "NaN"),
        ([1, 2], 4.0, "shape"),
        ([[1, 2, 3]], 4.0, "shape"),
        ([[1, 2]], 0, "sigma"),
        ([[1, 2]], -1, "sigma"),
        ([[1, 2]], np.nan, "sigma"),
    ],
)
def test_drawing_refuses(keypoints, sigma, message):
    with pytest.raises(ValueError, match=message):
        xu.gaussian_heatmaps(keypoints, 32, sigma)


# ------------------------------------------------------------ reading


def test_argmax_is_x_then_y_and_keeps_leading_dimensions():
    maps = np.random.default_rng(0).random((2, 3, 6, 9, 4))
    got = xu.heatmap2argmax(maps)
    assert got.shape == (2, 3, 4, 2) and got.dtype == np.int64
    for b, c, k in np.ndindex(2, 3, 4):
        row, column = np.unravel_index(maps[b, c, :, :, k].argmax(), (6, 9))
        assert got[b, c, k].tolist() == [column, row]


def test_scaled_argmax_is_two_p_over_size_minus_one():
    maps = np.zeros((4, 8, 3))
    maps[0, 0, 0] = maps[2, 4, 1] = maps[3, 6, 2] = 1
    np.testing.assert_allclose(xu.heatmap2argmax(maps, scale=True), [[-1, -1], [0, 0], [0.5, 0.5]])


@pytest.mark.parametrize("read", [xu.heatmap2argmax, xu.decode_heatmaps])
def test_reading_needs_three_dimensions(read):
    with pytest.raises(ValueError, match="heatmaps: expected shape"):
        read(np.zeros((4, 8)))


@pytest.mark.parametrize("sigma", [1, 2, 3, 4, 6, 8, 10])
def test_encode_decode_round_trip(sigma):
    keypoints = np.random.default_rng(sigma).uniform(0, [96, 160], (64, 2))  # right to the border
    found, confidence = xu.decode_heatmaps(xu.gaussian_heatmaps(keypoints, (160, 96), sigma), sigma)
    assert np.abs(found - keypoints).max() < 0.02
    assert confidence.min() > 0.95


def test_decoding_survives_noise():
    rng = np.random.default_rng(0)
    keypoints = rng.uniform(20, 76, (64, 2))
    maps = xu.gaussian_heatmaps(keypoints, 96, 4.0) * 0.8 + rng.normal(0, 0.01, (96, 96, 64))
    error = np.linalg.norm(xu.decode_heatmaps(maps, 4.0)[0] - keypoints, axis=1)
    assert np.median(error) < 0.02 and error.max() < 0.05


def test_decoding_keeps_leading_dimensions():
    maps = xu.gaussian_heatmaps([[5.3, 8.1], [20.2, 3.3]], (24, 32), 2.0)
    found, confidence = xu.decode_heatmaps(np.stack([[maps, maps[..., ::-1]]] * 3), 2.0)
    assert found.shape == (3, 2, 2, 2) and confidence.shape == (3, 2, 2)
    np.testing.assert_allclose(found[1, 1], [[20.2, 3.3], [5.3, 8.1]], atol=0.02)


def test_confidence_is_the_fraction_of_a_gaussian_s_mass():
    maps = xu.gaussian_heatmaps([[20.3, 20.8]] * 3, 48, 3.0) * [1.0, 0.5, 0.1]
    np.testing.assert_allclose(xu.decode_heatmaps(maps, 3.0)[1], [1.0, 0.5, 0.1], atol=0.01)


def test_a_map_of_zeros_or_nan_has_no_keypoint_and_no_confidence():
    maps = xu.gaussian_heatmaps([[-1e4, -1e4], [12, 9], [20, 20]], 32, 3.0)
    maps[..., 2] = np.nan
    for value in (np.inf, np.nan):  # in one pixel of a good map
        damaged = maps.copy()
        damaged[5, 5, 1] = value
        found, confidence = xu.decode_heatmaps(damaged, 3.0)
        assert np.isnan(found).all() and not confidence.any()
    found, confidence = xu.decode_heatmaps(maps, 3.0)
    assert np.isnan(found[[0, 2]]).all() and confidence[[0, 2]].tolist() == [0, 0]
    np.testing.assert_allclose(found[1], [12, 9], atol=0.02)


def test_sigma_of_a_keypoint_is_what_its_map_is_wider_than_the_training_s_gaussian():
    keypoints = np.array([[30.3, 33.8], [40.0, 25.0]])
    narrow = xu.gaussian_heatmaps(keypoints, 64, 2.0)
    assert xu.keypoint_sigma(narrow, keypoints, 2.0).max() < 0.1
    x, y = np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5)
    belief = np.array([[4.0, 1.5], [1.5, 2.0]])  # covariance, without the training's Gaussian
    offset = np.stack([x - 30.3, y - 33.8], -1)
    squared = np.einsum("hwi,ij,hwj->hw", offset, np.linalg.inv(belief + 4 * np.eye(2)), offset)
    wide = np.exp(-squared / 2)[..., None]
    assert xu.keypoint_sigma(wide, keypoints[:1], 2.0)[0] == pytest.approx(np.sqrt(3), abs=0.02)
    both = xu.keypoint_sigma(np.stack([wide, narrow[..., :1]]), np.stack([keypoints[:1]] * 2), 2.0)
    assert both.shape == (2, 1) and both[0, 0] > 10 * both[1, 0]


def test_sigma_without_a_keypoint_is_infinite():
    assert np.isinf(xu.keypoint_sigma(np.zeros((16, 16, 1)), np.full((1, 2), np.nan), 2.0)).all()


# ------------------------------------------------------------ loss


def batch(stride, height=24, width=32):
    """Keypoints (2, 5, 3): inside the frame, at its border, just outside, far outside, hidden."""
    inside = np.random.default_rng(0).uniform(6, 18, (2, 2))
    others = [[0.3, 11.0], [width + 2.0, 9.0], [width + 200.0, 9.0], [-1e4, -1e4]]
    xy = np.stack([[first, *others] for first in inside]) * stride
    return np.concatenate([xy, np.ones((2, 5, 1))], -1).astype(np.float32), height, width


def drawn(y_true, height, width, sigma, stride):
    """The maps (B, height, width, K) of keypoints (B, K, 3) and a sigma in pixels of the frame."""
    size = (height, width)
    map_sigma = sigma / stride
    return np.stack([xu.gaussian_heatmaps(k[:, :2] / stride, size, map_sigma) for k in y_true])


def loss_in_numpy(kind, sigma, stride, y_true, y_pred):
    """The documented loss, image by image and channel by channel."""
    target = drawn(y_true, *y_pred.shape[1:3], sigma, stride).astype(float)
    result = []
    for t, p in zip(target, y_pred.astype(float)):
        if kind == "mse":
            result.append(((t - p) ** 2).mean())
        elif kind == "weighted":
            result.append(((1 + 50 * t) * (t - p) ** 2).mean())
        else:
            mass = 2 * np.pi * (sigma / stride) ** 2
            channels = []
            for k in range(t.shape[-1]):
                expected = t[..., k] / mass
                absent = max(1 - p[..., k].sum() / mass, 0)
                outside = max(1 - expected.sum(), 0) * np.log(absent + 1e-6)
                channels.append((expected * np.log(p[..., k] / mass + 1e-35)).sum() + outside)
            result.append(-np.mean(channels))
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [1, 2])
def test_loss_agrees_with_numpy(kind, stride):
    y_true, height, width = batch(stride)
    logits = np.random.default_rng(1).normal(0, 2, (2, height, width, 5)).astype(np.float32)
    y_pred = to_numpy(xu.spatial_softmax(logits, 3.0))
    got = to_numpy(xu.HeatmapLoss(3.0 * stride, kind, stride)(y_true, y_pred))
    assert got.shape == (2,)
    np.testing.assert_allclose(
        got, loss_in_numpy(kind, 3.0 * stride, stride, y_true, y_pred), rtol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_perfect_prediction_has_the_lowest_loss(kind, stride):
    y_true, height, width = batch(stride)
    loss = xu.HeatmapLoss(3.0 * stride, kind, stride)
    perfect = to_numpy(loss(y_true, drawn(y_true, height, width, 3.0 * stride, stride)))
    for shift in ([0.5, 0, 0], [-0.5, 0, 0], [0, 0.5, 0], [0, -0.5, 0]):
        shifted = drawn(y_true + np.float32(shift) * stride, height, width, 3.0 * stride, stride)
        assert (to_numpy(loss(y_true, shifted)) > perfect).all()
    narrow = drawn(y_true, height, width, 2.5 * stride, stride) * (3 / 2.5) ** 2
    assert (to_numpy(loss(y_true, narrow)) > perfect).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_absent_keypoint_asks_for_an_empty_map(kind):
    absent = np.float32([[[-1e4, -1e4, 0]]])
    present = np.float32([[[12, 12, 1]]])
    spot = drawn(present, 24, 24, 3.0, 1)
    empty = np.zeros((1, 24, 24, 1), np.float32)
    loss = xu.HeatmapLoss(3.0, kind)
    assert to_numpy(loss(absent, empty)) < to_numpy(loss(absent, spot))
    assert to_numpy(loss(present, spot)) < to_numpy(loss(present, empty))


def test_squared_error_of_an_all_zero_prediction():
    y_true = np.float32([[[128, 128, 1]]])
    got = to_numpy(xu.HeatmapLoss(10.0, "mse")(y_true, np.zeros((1, 256, 256, 1), np.float32)))
    assert got[0] == pytest.approx(np.pi * 100 / 256**2, rel=1e-4)  # 0.0048


def test_unknown_loss():
    with pytest.raises(ValueError, match="huber"):
        xu.HeatmapLoss(kind="huber")


# ------------------------------------------------------------ softmax


def test_spatial_softmax_agrees_with_numpy():
    logits = np.random.default_rng(0).normal(0, 3, (2, 6, 10, 4)).astype(np.float32)
    weights = np.exp(logits.astype(float))
    expected = 2 * np.pi * 2.0**2 * weights / (weights.sum((1, 2), keepdims=True) + 60)
    np.testing.assert_allclose(to_numpy(xu.spatial_softmax(logits, 2.0)), expected, rtol=1e-4)


def test_spatial_softmax_sums_to_a_gaussian_s_mass_less_the_absent_fraction():
    logits = np.zeros((1, 8, 8, 3), np.float32)
    logits[0, 3, 3, 1] = 50
    logits[..., 2] = -50
    fraction = to_numpy(xu.spatial_softmax(logits, 2.0)).sum((1, 2))[0] / (8 * np.pi)
    np.testing.assert_allclose(fraction, [0.5, 1, 0], atol=1e-5)


def test_spatial_softmax_is_finite_for_large_logits():
    logits = np.random.default_rng(0).choice([-1e4, 1e4], (1, 8, 8, 3)).astype(np.float32)
    assert np.isfinite(to_numpy(xu.spatial_softmax(logits, 2.0))).all()


def test_a_softmax_that_equals_a_gaussian_has_a_peak_of_one():
    target = xu.gaussian_heatmaps([[16.5, 16.5]], 32, 2.0)
    logits = np.log(target + 1e-30)[None] + 20
    np.testing.assert_allclose(to_numpy(xu.spatial_softmax(logits, 2.0))[0], target, atol=1e-3)


# ------------------------------------------------------------ metric


def spots(positions, height=8, width=16):
    """(1, H, W, K) maps with one bright pixel each, at (x, y); None leaves a map empty."""
    maps = np.zeros((1, height, width, len(positions)), np.float32)
    for k, position in enumerate(positions):
        if position is not None:
            maps[0, position[1], position[0], k] = 1
    return maps


@pytest.mark.parametrize(
    "true,found,stride,expected",
    [
        (spots([(4, 2), (10, 5)]), spots([(6, 1), (10, 5)]), 1, (2 / 16 + 1 / 8) / 4),
        ([[8.9, 5.9, 1], [20.0, 10.0, 1]], spots([(6, 1), (10, 5)]), 2, (2 / 16 + 1 / 8) / 4),
        (spots([(4, 2), None]), spots([(6, 2), (15, 7)]), 1, 2 / 16 / 2),  # outside the frame
        ([[4, 2, 1], [40, 2, 0]], spots([(6, 2), (15, 7)]), 1, 2 / 16 / 2),
        (
            xu.gaussian_heatmaps([[-6, 4], [4.5, 4.5]], (8, 16), 4.0)[None],
            spots([(15, 7), (4, 4)]),
            1,
            0,
        ),
        ([[-1e4, -1e4, 0]], spots([(3, 3)]), 1, 0),  # none in the frame
        (spots([(1, 1)] * 12), spots([(1, 1)] * 8 + [(15, 7)] * 4), 1, 0),  # the eight corners only
        ([[1.5, 1.5, 1]] * 12, spots([(1, 1)] * 8 + [(15, 7)] * 4), 1, 0),
    ],
)
def test_nmae_worked_out_by_hand(true, found, stride, expected):
    true = np.float32([true]) if isinstance(true, list) else true
    assert float(xu.nmae_argmax(true, found, stride)) == pytest.approx(expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_nmae_of_the_heatmaps_of_the_keypoints_is_zero(stride):
    keypoints = np.random.default_rng(0).uniform(0, [32, 24], (3, 8, 2)).astype(np.float32) * stride
    true = np.concatenate([keypoints, np.ones((3, 8, 1), np.float32)], -1)
    assert float(xu.nmae_argmax(true, drawn(true, 24, 32, 2.0 * stride, stride), stride)) == 0
