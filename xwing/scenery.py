"""Random backgrounds behind a target, and the faults of a camera: blur, noise, flares.

Nothing here depends on the target. A network that never sees the same background or the same camera
twice cannot learn them, so it has to look at the target itself. The photographs come with
scikit-image.
"""

import functools
from pathlib import Path

import cv2
import numpy as np

import xwing_utils as xu
from xwing import appearance

# The photographs behind data/shifted are not among them: that set shows what training has not seen.
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
)


# ============================================================ behind the target


def random_background(
    width: int, height: int, rng: np.random.Generator, tame: bool = False
) -> np.ndarray:
    """Draw a background: a night sky, clouds, shapes, rubble, a photograph, or a gradient.

    Args:
        width: pixels.
        height: pixels.
        rng: its state decides everything that is random.
        tame: draw a night sky as in the rendered sets.

    Returns:
        (height, width, 3) uint8.
    """
    if tame:
        image = _night_sky(width, height, rng)
    else:
        kinds = _night_sky, _clouds, _shapes, _rubble, _picture, _gradient
        kind = rng.choice(kinds, p=(0.25, 0.12, 0.15, 0.22, 0.2, 0.06))
        image = kind(width, height, rng)

    if rng.random() < (0.02 if tame else 0.12):
        image = _add_planet(image, rng)

    blur = 0.0 if tame else np.exp(rng.uniform(-1.5, 1))  # pixels
    return cv2.GaussianBlur(image, (0, 0), blur) if blur > 0.4 else image


def noise(
    width: int, height: int, channels: int, slope: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw fractal noise about 0: six octaves, each twice as fine as the one before and fainter.

    Args:
        width: pixels.
        height: pixels.
        channels: number of independent channels.
        slope: each octave has 2**-slope times the amplitude of the one before.
        rng: numpy Generator.

    Returns:
        (height, width, channels) float32.
    """
    image = np.zeros((1, 1, channels), np.float32)
    for cells in (2, 4, 8, 16, 32, 64):
        amplitude = np.float32((2 / cells) ** slope)
        octave = rng.standard_normal((cells, cells, channels), np.float32) * amplitude
        coarser = cv2.resize(image, (cells, cells), interpolation=cv2.INTER_CUBIC)
        image = coarser.reshape(cells, cells, channels) + octave

    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    return image.reshape(height, width, channels)


def rotation_2d(angle: float) -> np.ndarray:
    """The matrix (2, 2) that rotates row vectors (x, y) by an angle in radians: `rows @ matrix`."""
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _to_pixels(values):
    """Grey levels as uint8, clipped to 0 ... 255."""
    return np.clip(values, 0, 255).astype(np.uint8)


def _clouds(width, height, rng):
    """Coloured noise on all scales."""
    colour = rng.uniform(0, 255, 3 if rng.random() < 0.5 else 1)
    waves = 45 * noise(width, height, 4, rng.uniform(0.3, 1.2), rng)
    brightness = waves[..., :1]
    tint = rng.uniform(0, 0.7) * waves[..., 1:]
    return _to_pixels(colour + brightness + tint)


def _night_sky(width, height, rng):
    """Clouds of gas of related hues, and stars; mostly blue to violet, sometimes nearly black."""
    waves = noise(width, height, 3, rng.uniform(0.5, 1.1), rng)
    first, second = _gas_colours(rng)

    density = np.clip(waves[..., :1] / 2 + rng.uniform(-0.3, 0.5), 0, 1.5) ** rng.uniform(0.7, 2)
    if rng.random() < 0.3:
        density *= np.exp(-np.abs(waves[..., 2:]) * 2)  # filaments

    mix = np.clip(waves[..., 1:2] / 2 + 0.5, 0, 1)
    glow = rng.uniform(0.0, 0.1) if rng.random() < 0.2 else rng.uniform(0.15, 0.9)
    gas = glow * density * (mix * first + (1 - mix) * second)
    black = rng.uniform(0, 2.5) * np.array([1.5, 3, 12])  # a night sky is slightly blue
    return _to_pixels(gas + black + _stars(width, height, rng))


def _gas_colours(rng):
    """Two colours (2, 3) of similar hue, 0 to 255."""
    blue_to_violet = rng.uniform(210, 280)  # degrees of hue
    hue = blue_to_violet if rng.random() < 0.8 else rng.uniform(0, 360)
    hues = hue + rng.normal(0, 15, 2)
    hsv = [[hue % 360, rng.uniform(0.5, 0.95), rng.uniform(0.6, 1)] for hue in hues]
    return 255 * cv2.cvtColor(np.float32([hsv]), cv2.COLOR_HSV2RGB)[0]


def _stars(width, height, rng):
    """Grey levels (height, width, 3) of stars, a few of them bright and most of them faint."""
    count = int(10 ** rng.uniform(0.5, 2.3) * width * height / 2**14) + 1
    brightness = np.minimum(150 * (rng.pareto(1.3, (count, 1)) + 0.3), 3000)
    colours = brightness * rng.uniform(0.7, 1, (count, 3))

    stars = np.zeros((height, width, 3), np.float32)
    rows = rng.integers(height, size=count)
    columns = rng.integers(width, size=count)
    stars[rows, columns] = colours
    return cv2.GaussianBlur(stars, (0, 0), rng.uniform(0.4, 0.8))


def _shapes(width, height, rng):
    """Up to 39 convex shapes of all sizes."""
    ground = rng.uniform(0, 255, 3 if rng.random() < 0.5 else 1)
    image = np.full((height, width, 3), ground, np.uint8)
    for _ in range(rng.integers(1, 40)):
        middle = rng.uniform(0, (width, height))
        reach = np.exp(rng.uniform(0, 5))  # pixels
        corners = middle + rng.normal(size=(rng.integers(3, 7), 2)) * reach
        outline = cv2.convexHull(corners.astype(np.int32))
        cv2.fillConvexPoly(image, outline, rng.uniform(0, 255, 3))
    return image


def _rubble(width, height, rng):
    """Adjoining cells, each in its own shade and lit from one side, like stones, leaves or tiles.

    Source: Worley, A Cellular Texture Basis Function, SIGGRAPH 1996.
    """
    size = np.exp(rng.uniform(0.7, 3.2))  # pixels from cell to cell
    distance, cells = _nearest_seed(_jittered_grid(width, height, size, rng), width, height)

    count = cells.max() + 1
    shades = np.exp(rng.normal(0, rng.uniform(0.05, 0.5), (count, 1)))
    tints = np.exp(rng.normal(0, rng.choice([0, 0.1, 0.4]), (count, 3)))

    light = rng.normal(0, rng.uniform(0, 0.5), 2)
    slope_x = cv2.Sobel(distance, cv2.CV_32F, 1, 0) / 8
    slope_y = cv2.Sobel(distance, cv2.CV_32F, 0, 1) / 8
    hollow = rng.uniform(0, 0.8) * np.minimum(distance / size, 1) ** 2
    relief = 1 - hollow + light[0] * slope_x + light[1] * slope_y

    colour = rng.uniform(20, 200) * np.exp(rng.normal(0, 0.3, 3))
    return _to_pixels(colour * shades[cells] * tints[cells] * relief[..., None])


def _jittered_grid(width, height, size, rng):
    """Points (P, 2) on a grid of `size` pixels, each moved at random by up to one cell."""
    grid = np.meshgrid(np.arange(0, width, size), np.arange(0, height, size))
    points = np.stack(grid, -1).reshape(-1, 2)
    jitter = rng.choice([0.05, 0.5, 1.0]) * size
    return points + rng.uniform(0, jitter, points.shape)


def _nearest_seed(seeds, width, height):
    """The distance in pixels from each pixel to the nearest of points (P, 2), and its label."""
    column, row = seeds.astype(int).clip(0, [width - 1, height - 1]).T
    free = np.ones((height, width), np.uint8)
    free[row, column] = 0
    return cv2.distanceTransformWithLabels(free, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)


@functools.lru_cache
def photographs() -> list[np.ndarray]:
    """The photographs that come with scikit-image, each (h, w, 3) uint8."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    return [xu.read_image(folder / name) for name in PICTURES]


def _picture(width, height, rng):
    """A part of a photograph, rotated, scaled, mirrored at its borders, and in another light."""
    pictures = photographs()
    picture = pictures[rng.integers(len(pictures))]

    scale = np.exp(rng.uniform(-1.2, 0.8))
    angle = rng.uniform(0, 2 * np.pi) * (rng.random() < 0.5)
    turn = scale * rotation_2d(angle)
    centre = rng.uniform(0, 1, 2) * picture.shape[1::-1]
    matrix = np.column_stack([turn, centre - turn @ [width / 2, height / 2]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    image = cv2.warpAffine(
        picture, matrix, (width, height), borderMode=cv2.BORDER_REFLECT, flags=flags
    )

    gain = rng.uniform(0.4, 1.2) * np.exp(rng.normal(0, 0.15, 3))
    return _to_pixels(image * gain.astype(np.float32))


def _gradient(width, height, rng):
    """From one colour to another, or one colour alone."""
    ends = rng.uniform(0, 255, (2, 3))
    if rng.random() < 0.4:
        ends = np.repeat(ends[:, :1], 3, axis=1)  # grey

    direction = rng.normal(size=2) * (rng.random() < 0.7)
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    position = np.stack([x, y], -1) @ direction
    mix = np.clip(position / 2 + 0.5, 0, 1)[..., None]
    return (mix * ends[0] + (1 - mix) * ends[1]).astype(np.uint8)


def _add_planet(image, rng):
    """The picture (H, W, 3) uint8 with a planet that is lit from a side."""
    height, width = image.shape[:2]
    radius = np.exp(rng.uniform(1.5, 5))  # pixels
    middle = rng.uniform(-0.2, 1.2, 2) * (width, height)
    x, y = np.meshgrid(
        (np.arange(width) - middle[0]) / radius, (np.arange(height) - middle[1]) / radius
    )
    z = np.sqrt(np.clip(1 - x * x - y * y, 0, None))

    sun = rng.normal(size=3)
    cosine = np.stack([x, y, z], -1) @ (sun / np.linalg.norm(sun))
    light = np.clip(cosine, 0.02, None) ** 0.5
    colour = rng.uniform(30, 255, 3)
    ground = colour + 25 * noise(width, height, 1, rng.uniform(0.3, 1), rng)
    planet = np.clip(light[..., None] * ground, 0, 255)
    return np.where(z[..., None] > 0, planet, image).astype(np.uint8)


# ============================================================ the camera


def expose(light: np.ndarray, rng: np.random.Generator, tame: bool = False) -> np.ndarray:
    """Take a picture with a camera that has faults.

    Args:
        light: (H, W, 3) float32 linear light, 1 is white.
        rng: its state decides everything that is random.
        tame: rarer and smaller faults, like those of the camera in the rendered sets.

    Returns:
        (H, W, 3) uint8.
    """
    frequency = 0.3 if tame else 1.0  # factor on the probability of most faults
    light = _lens_faults(light, rng, frequency, tame)

    # Each camera has its own tone curve: `to_grey` with another exponent than 1 / 2.4, which is the
    # same as a power of the light before it.
    contrast = np.exp(-rng.normal(0, 0.03 if tame else 0.15))
    image = appearance.to_grey(cv2.pow(np.clip(light, 0, 1), contrast))

    image = _sensor_faults(image, rng, frequency)
    return _file_faults(image, rng, frequency, tame)


def _lens_faults(light, rng, frequency, tame):
    """Linear light (H, W, 3) after blur, flare, inexact exposure and white balance, a vignette."""
    height, width = light.shape[:2]
    if rng.random() < 0.35 * frequency:
        light = _blur(light, rng)
    if rng.random() < 0.12 * frequency:
        light = light + _flare(height, width, rng)

    exposure = np.exp(rng.normal(0, 0.15 if tame else 0.4))
    white_balance = np.exp(rng.normal(0, 0.05 if tame else 0.12, 3))
    light = light * (exposure * white_balance).astype(np.float32)

    if rng.random() < 0.25 * frequency:
        light = light * _vignette(height, width, rng)
    return light


def _sensor_faults(image, rng, frequency):
    """Grey levels (H, W, 3) uint8 of a camera that may be noisy, or black and white."""
    if rng.random() < 0.06 * frequency:
        image = np.repeat(image.mean(-1, keepdims=True), 3, axis=-1)
    if rng.random() < 0.5 * frequency:
        channels = 1 if rng.random() < 0.4 else 3
        grain = rng.standard_normal((*image.shape[:2], channels), np.float32)
        image = image + np.float32(np.exp(rng.uniform(0, 2.8))) * grain
    return _to_pixels(image)


def _file_faults(image, rng, frequency, tame):
    """The picture (H, W, 3) uint8 after JPEG compression, and with the black bars of a film."""
    if rng.random() < (0.9 if tame else 0.5):
        quality = int(rng.integers(80 if tame else 20, 98))
        file = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        image = cv2.imdecode(file, cv2.IMREAD_COLOR)
    if rng.random() < 0.08 * frequency:
        height = len(image)
        bar = int(rng.uniform(0.03, 0.2) * height)
        image[:bar] = 0
        image[height - bar :] = 0
    return image


def _blur(light, rng):
    """Light (H, W, 3) that is out of focus or blurred by motion."""
    if rng.random() < 0.5:
        return cv2.GaussianBlur(light, (0, 0), rng.uniform(0.4, 1.8))

    half_length = rng.uniform(1, 5)  # pixels
    step = half_length * rotation_2d(rng.uniform(0, np.pi))[0]
    kernel = np.zeros((11, 11), np.float32)
    start = xu.cv_point(5.5 - step)
    end = xu.cv_point(5.5 + step)
    cv2.line(kernel, start, end, 1.0, 1, cv2.LINE_AA, xu.CV_SHIFT)
    return cv2.filter2D(light, -1, kernel / kernel.sum())


def _flare(height, width, rng):
    """Linear light (height, width, 3) of a lamp and its ghosts, which lie on a line through it."""
    size = width, height
    lamp = rng.uniform(0, 1, 2)  # in sizes of the picture
    direction = rng.normal(0, 1, 2)

    flare = np.zeros((height, width, 3), np.float32)
    for place in rng.uniform(-1, 1, rng.integers(1, 6)):
        centre = ((lamp + place * direction) * size).astype(int).tolist()
        radius = int(width * np.exp(rng.uniform(-4, -1.5)))
        colour = rng.uniform(0, 0.3, 3).tolist()
        cv2.circle(flare, centre, radius, colour, -1, cv2.LINE_AA)

    centre = (lamp * size).astype(int).tolist()
    cv2.circle(flare, centre, width // 20, [3.0] * 3, -1, cv2.LINE_AA)
    return cv2.GaussianBlur(flare, (0, 0), width * np.exp(rng.uniform(-4, -2.5)))


def _vignette(height, width, rng):
    """Factors (height, width, 1) float32 that darken the corners."""
    x = np.linspace(-1, 1, width, dtype=np.float32)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    return 1 - np.float32(rng.uniform(0.1, 0.4)) * (x * x + y * y)[..., None]
