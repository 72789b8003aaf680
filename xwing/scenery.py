"""What stands behind the ship, and what the camera makes of it: skies, pictures, blur, noise, flares.

Everything here is random and has nothing to do with the ship: a network that sees it all behind and over its
ship, and never twice the same, has to look at the ship. The real pictures come with scikit-image.
"""

import functools
from pathlib import Path

import cv2
import numpy as np

import xwing_utils as xu

PICTURES = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)  # not those behind the ships of data/shifted


# ============================================================ behind the ship


def random_background(width, height, rng, tame=False):
    """Draw a (height, width, 3) uint8 background: sky, clouds, shapes, rubble, a picture, or a gradient."""
    kinds = _nebula, _clouds, _shapes, _rubble, _picture, _gradient
    kind = _nebula if tame else rng.choice(kinds, p=(0.25, 0.12, 0.15, 0.22, 0.2, 0.06))
    image = kind(width, height, rng)
    if rng.random() < (0.02 if tame else 0.12):
        image = _planet(image, rng)
    blur = 0.0 if tame else np.exp(rng.uniform(-1.5, 1))
    return cv2.GaussianBlur(image, (0, 0), blur) if blur > 0.4 else image


def noise(width, height, channels, slope, rng):
    """(height, width, channels) float32 about 0: from octave to octave twice as fine and fainter."""
    image = np.zeros((1, 1, channels), np.float32)
    for n in (2, 4, 8, 16, 32, 64):
        finer = rng.standard_normal((n, n, channels), np.float32) * np.float32((2 / n) ** slope)
        image = (
            cv2.resize(image, (n, n), interpolation=cv2.INTER_CUBIC).reshape(n, n, channels) + finer
        )
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    return image.reshape(height, width, channels)


def _clouds(width, height, rng):
    """Coloured noise on all scales."""
    colour = rng.uniform(0, 255, 3 if rng.random() < 0.5 else 1)
    waves = 45 * noise(width, height, 4, rng.uniform(0.3, 1.2), rng)
    return np.clip(colour + waves[..., :1] + rng.uniform(0, 0.7) * waves[..., 1:], 0, 255).astype(
        np.uint8
    )


def _nebula(width, height, rng):
    """Clouds of gas of related hues, and stars; blue to violet for the most part, or nearly black."""
    waves, hue = noise(width, height, 3, rng.uniform(0.5, 1.1), rng), rng.uniform(210, 280)
    hues = (hue if rng.random() < 0.8 else rng.uniform(0, 360)) + rng.normal(0, 15, 2)
    hsv = np.float32([[(h % 360, rng.uniform(0.5, 0.95), rng.uniform(0.6, 1)) for h in hues]])
    first, second = 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0]
    density = np.clip(waves[..., :1] / 2 + rng.uniform(-0.3, 0.5), 0, 1.5) ** rng.uniform(0.7, 2)
    if rng.random() < 0.3:
        density *= np.exp(-np.abs(waves[..., 2:]) * 2)  # filaments
    mix = np.clip(waves[..., 1:2] / 2 + 0.5, 0, 1)
    glow = rng.uniform(0.0, 0.1) if rng.random() < 0.2 else rng.uniform(0.15, 0.9)
    image = glow * density * (mix * first + (1 - mix) * second) + rng.uniform(0, 2.5) * np.array(
        [1.5, 3, 12]
    )
    count = int(10 ** rng.uniform(0.5, 2.3) * width * height / 2**14) + 1
    stars = np.zeros((height, width, 3), np.float32)
    light = np.minimum(150 * (rng.pareto(1.3, (count, 1)) + 0.3), 3000) * rng.uniform(
        0.7, 1, (count, 3)
    )
    stars[rng.integers(height, size=count), rng.integers(width, size=count)] = light
    stars = cv2.GaussianBlur(stars, (0, 0), rng.uniform(0.4, 0.8))
    return np.clip(image + stars, 0, 255).astype(np.uint8)


def _shapes(width, height, rng):
    """Up to 39 convex shapes of all sizes."""
    image = np.full(
        (height, width, 3), rng.uniform(0, 255, 3 if rng.random() < 0.5 else 1), np.uint8
    )
    for _ in range(rng.integers(1, 40)):
        middle, reach = rng.uniform(0, (width, height)), np.exp(rng.uniform(0, 5))
        corners = middle + rng.normal(size=(rng.integers(3, 7), 2)) * reach
        cv2.fillConvexPoly(image, cv2.convexHull(corners.astype(np.int32)), rng.uniform(0, 255, 3))
    return image


def _rubble(width, height, rng):
    """Cells close by one another, each in its own shade and lit from one side: stones, leaves, tiles, grain.

    Source: Worley, A Cellular Texture Basis Function, SIGGRAPH 1996.
    """
    cell = np.exp(rng.uniform(0.7, 3.2))  # pixels
    corners = np.stack(
        np.meshgrid(np.arange(0, width, cell), np.arange(0, height, cell)), -1
    ).reshape(-1, 2)
    corners += rng.uniform(0, rng.choice([0.05, 0.5, 1.0]) * cell, corners.shape)
    free = np.ones((height, width), np.uint8)
    free[tuple(corners.astype(int).clip(0, [width - 1, height - 1]).T[::-1])] = 0
    distance, cells = cv2.distanceTransformWithLabels(
        free, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    shades = np.exp(rng.normal(0, rng.uniform(0.05, 0.5), (cells.max() + 1, 1)))
    tints = np.exp(rng.normal(0, rng.choice([0, 0.1, 0.4]), (cells.max() + 1, 3)))
    light = rng.normal(0, rng.uniform(0, 0.5), 2)
    across, down = (cv2.Sobel(distance, cv2.CV_32F, *axis) / 8 for axis in ((1, 0), (0, 1)))
    hollow = rng.uniform(0, 0.8) * np.minimum(distance / cell, 1) ** 2
    relief = 1 - hollow + light[0] * across + light[1] * down
    image = rng.uniform(20, 200) * np.exp(rng.normal(0, 0.3, 3)) * shades[cells] * tints[cells]
    return np.clip(image * relief[..., None], 0, 255).astype(np.uint8)


def turn_by(angle):
    """(2, 2): what turns rows (x, y) by an angle in radians."""
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


@functools.lru_cache
def _pictures():
    """The real pictures that come with scikit-image."""
    import skimage

    return [xu.read_image(Path(skimage.__file__).parent / "data" / name) for name in PICTURES]


def _picture(width, height, rng):
    """A part of a real picture, turned, scaled, mirrored at its borders, and in another light."""
    pictures = _pictures()
    picture = pictures[rng.integers(len(pictures))]
    turn = np.exp(rng.uniform(-1.2, 0.8)) * turn_by(
        rng.uniform(0, 2 * np.pi) * (rng.random() < 0.5)
    )
    centre = rng.uniform(0, 1, 2) * picture.shape[1::-1]
    matrix = np.column_stack([turn, centre - turn @ [width / 2, height / 2]])
    image = cv2.warpAffine(
        picture,
        matrix,
        (width, height),
        borderMode=cv2.BORDER_REFLECT,
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
    )
    gain = rng.uniform(0.4, 1.2) * np.exp(rng.normal(0, 0.15, 3))
    return np.clip(image * gain.astype(np.float32), 0, 255).astype(np.uint8)


def _gradient(width, height, rng):
    """From one colour to another, or one alone."""
    ends, grey = rng.uniform(0, 255, (2, 3)), rng.random() < 0.4
    ends = np.repeat(ends[:, :1], 3, axis=1) if grey else ends
    way = np.stack(np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height)), -1)
    share = np.clip(way @ (rng.normal(size=2) * (rng.random() < 0.7)) / 2 + 0.5, 0, 1)[..., None]
    return (share * ends[0] + (1 - share) * ends[1]).astype(np.uint8)


def _planet(image, rng):
    """The picture (H, W, 3) uint8 with a planet, lit from a side."""
    height, width = image.shape[:2]
    radius, middle = np.exp(rng.uniform(1.5, 5)), rng.uniform(-0.2, 1.2, 2) * (width, height)
    x, y = np.meshgrid(
        (np.arange(width) - middle[0]) / radius, (np.arange(height) - middle[1]) / radius
    )
    z = np.sqrt(np.clip(1 - x * x - y * y, 0, None))
    sun = rng.normal(size=3)
    light = np.clip(np.stack([x, y, z], -1) @ (sun / np.linalg.norm(sun)), 0.02, None) ** 0.5
    ground = rng.uniform(30, 255, 3) + 25 * noise(width, height, 1, rng.uniform(0.3, 1), rng)
    return np.where(z[..., None] > 0, np.clip(light[..., None] * ground, 0, 255), image).astype(
        np.uint8
    )


# ============================================================ the camera


def expose(light, rng, tame=False):
    """What a camera with faults makes of linear light (H, W, 3) float32: (H, W, 3) uint8."""
    often = 0.3 if tame else 1.0  # how often it does something
    if rng.random() < 0.35 * often:
        light = _blur(light, rng)
    if rng.random() < 0.12 * often:
        light = light + _flare(*light.shape[:2], rng)
    gain = np.exp(rng.normal(0, 0.15 if tame else 0.4)) * np.exp(
        rng.normal(0, 0.05 if tame else 0.12, 3)
    )
    light = light * gain.astype(np.float32)
    if rng.random() < 0.25 * often:
        light = light * _vignette(*light.shape[:2], rng)
    gamma = 2.4 * np.exp(rng.normal(0, 0.03 if tame else 0.15))
    image = 269 * np.clip(light, 0, 1) ** np.float32(1 / gamma) - 14
    if rng.random() < 0.06 * often:
        image = np.repeat(image.mean(-1, keepdims=True), 3, axis=-1)
    if rng.random() < 0.5 * often:
        channels = 1 if rng.random() < 0.4 else 3
        grain = rng.standard_normal((*image.shape[:2], channels), np.float32)
        image = image + np.float32(np.exp(rng.uniform(0, 2.8))) * grain
    image = np.clip(image, 0, 255).astype(np.uint8)
    if rng.random() < (0.9 if tame else 0.5):
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(80 if tame else 20, 98))]
        image = cv2.imdecode(cv2.imencode(".jpg", image, quality)[1], cv2.IMREAD_COLOR)
    if rng.random() < 0.08 * often:  # bars
        bar = int(rng.uniform(0.03, 0.2) * len(image))
        image[:bar], image[len(image) - bar :] = 0, 0
    return image


def _blur(light, rng):
    """Motion, or out of focus."""
    if rng.random() < 0.5:
        return cv2.GaussianBlur(light, (0, 0), rng.uniform(0.4, 1.8))
    kernel, reach = np.zeros((11, 11), np.float32), rng.uniform(1, 5)
    step = reach * turn_by(rng.uniform(0, np.pi))[0]
    cv2.line(
        kernel, xu.cv_point(5.5 - step), xu.cv_point(5.5 + step), 1.0, 1, cv2.LINE_AA, xu.CV_SHIFT
    )
    return cv2.filter2D(light, -1, kernel / kernel.sum())


def _flare(height, width, rng):
    """Ghosts of a bright lamp on a line through the picture, and its glow: (height, width, 3) float32."""
    flare, start, way = (
        np.zeros((height, width, 3), np.float32),
        rng.uniform(0, 1, 2),
        rng.normal(0, 1, 2),
    )
    for place in rng.uniform(-1, 1, rng.integers(1, 6)):
        centre = (start + place * way) * (width, height)
        radius = int(width * np.exp(rng.uniform(-4, -1.5)))
        colour = rng.uniform(0, 0.3, 3).tolist()
        cv2.circle(flare, centre.astype(int).tolist(), radius, colour, -1, cv2.LINE_AA)
    lamp = (start * (width, height)).astype(int).tolist()
    cv2.circle(flare, lamp, width // 20, [3.0] * 3, -1, cv2.LINE_AA)
    return cv2.GaussianBlur(flare, (0, 0), width * np.exp(rng.uniform(-4, -2.5)))


def _vignette(height, width, rng):
    x, y = (
        np.linspace(-1, 1, width, dtype=np.float32),
        np.linspace(-1, 1, height, dtype=np.float32)[:, None],
    )
    return 1 - np.float32(rng.uniform(0.1, 0.4)) * (x * x + y * y)[..., None]
