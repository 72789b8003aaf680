"""What is known of a frame, drawn over it.

A tracked frame shows the box of the target at its pose, the uncertainty of the box's corners as
ellipses, the axes of the model, and where the target is heading. The heatmaps of the network can be
shown beside it. In a notebook, `viewer` lets a slider choose among such pictures.
"""

from collections.abc import Iterable, Iterator, Sequence

import cv2
import numpy as np

import xwing_utils as xu
from xwing.appearance import TextureAlbedo, to_grey, to_light
from xwing.detector import Detector, letterbox
from xwing.footage import Clip, frames_at
from xwing.mesh import Mesh, rasterise, triangle_normals

GREEN = (90, 255, 90)
YELLOW = (255, 220, 60)
BLUE = (120, 200, 255)
PINK = (255, 160, 255)

NEAR = 0.10643  # diameters: the path ahead is drawn no closer to the camera's plane
AXES_LENGTH = 0.31928  # diameters
DAYLIGHT = np.array([0.25, 0.4, -0.88])  # from where it comes, in camera axes: above the camera
CREASE_COSINE = 0.9  # of the angle between two surfaces, below which their edge is drawn
DEPTH_JUMP = 0.05  # diameters between neighbouring pixels, from which an edge is drawn
SECONDS_AHEAD = 0.5  # of the path that is drawn
ELLIPSE_SIGMAS = 2  # standard deviations that an ellipse shows


def draw_tracked(
    image: np.ndarray, tracked, K: np.ndarray, target: xu.Target = xu.XWING
) -> np.ndarray:
    """Draw what a `TrackedPose` says of a frame.

    The target's box is green if it is tracked and yellow if it is predicted. Ellipses show two
    standard deviations of its corners, and a line shows the target's path in the next half second.
    The model's axes are drawn, too.

    Args:
        image: (H, W, 3) uint8.
        tracked: `TrackedPose` of this frame.
        K: (3, 3) camera matrix.
        target: whose box is drawn.
    Returns:
        (H, W, 3) uint8, a copy.
    """
    image = np.array(image, order="C")
    pose = tracked.pose
    if pose is None:
        return image

    corners = xu.project_pose(target.box, pose, K)
    image = xu.draw_box(image, corners, GREEN if tracked.status == "tracked" else YELLOW)
    image = xu.draw_axes(image, pose, K, AXES_LENGTH * target.diameter)

    if tracked.covariance is not None:
        covariances = corner_covariance(pose, tracked.covariance, K, target)
        for corner, covariance in zip(corners, covariances):
            _draw_ellipse(image, corner, covariance)

    if tracked.velocity is not None:
        _draw_path(image, pose[:3, 3], tracked.velocity[3:], K, NEAR * target.diameter)
    return image


def draw_mesh(
    mesh: Mesh, pose: np.ndarray, K: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a mesh in its colours and textures, in plain daylight.

    Args:
        mesh: `Mesh`.
        pose: (4, 4) model -> OpenCV camera.
        K: (3, 3) camera matrix.
        width: of the picture, pixels.
        height: of the picture, pixels.
    Returns:
        picture (height, width, 3) uint8, and depth (height, width) as of `mesh.rasterise`.
    """
    ids, depth = rasterise(mesh.triangles, pose, K, width, height, mesh.near)
    facing = np.abs(_unit_normals(mesh) @ pose[:3, :3].T @ DAYLIGHT)
    light = to_light(np.float32(255 * mesh.colours))[mesh.face_materials]
    light = (light * (0.3 + 0.8 * facing[:, None]))[ids]

    if mesh.textures is not None:
        texture = TextureAlbedo(mesh, np.arange(len(mesh.faces)))
        light = light * texture.draw(ids, depth, pose, K, blur=0.5)
    return np.uint8(to_grey(np.float32(light)).clip(0, 255)), depth


def draw_outline(
    image: np.ndarray,
    mesh: Mesh,
    pose: np.ndarray,
    K: np.ndarray,
    colour: tuple = GREEN,
    opacity: float = 0.0,
) -> np.ndarray:
    """Draw the outline and the creases of a mesh over a frame, and its surface if wanted.

    Args:
        image: (H, W, 3) uint8.
        mesh: `Mesh` of the target.
        pose: (4, 4) model -> OpenCV camera.
        K: (3, 3) camera matrix.
        colour: RGB.
        opacity: of the surface, 0 to 1.
    Returns:
        (H, W, 3) uint8, a copy.
    """
    height, width = image.shape[:2]
    image = np.float32(image)
    if opacity:
        surface, depth = draw_mesh(mesh, pose, K, width, height)
        image += opacity * np.isfinite(depth)[..., None] * (surface - image)
    lines = np.float32(_lines(mesh, pose, K, width, height))
    alpha = cv2.GaussianBlur(lines, (0, 0), 0.6)[..., None]
    return np.uint8(image + alpha * (np.float32(colour) - image))


def _lines(mesh, pose, K, width, height):
    """Where outline and creases of a mesh show: (height, width) uint8, 1 or 0."""
    ids, depth = rasterise(mesh.triangles, pose, K, width, height, mesh.near)
    covered = ids >= 0
    normals = np.where(covered[..., None], _unit_normals(mesh)[ids], 0)
    depth = np.where(covered, depth, 0)

    lines = np.zeros((height, width), bool)
    for axis in (0, 1):
        cosine = np.abs((normals * np.roll(normals, -1, axis)).sum(-1))
        jump = np.abs(depth - np.roll(depth, -1, axis)) > DEPTH_JUMP * mesh.diameter
        lines |= (covered | np.roll(covered, -1, axis)) & (jump | (cosine < CREASE_COSINE))
    return cv2.dilate(np.uint8(lines), np.ones((2, 2)))


def _unit_normals(mesh):
    """(F, 3) unit normals; zero where a triangle has no area."""
    normals = triangle_normals(mesh.triangles)
    return normals / np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-300)


def part_around(picture: np.ndarray, box: tuple, margin: float = 0.4) -> np.ndarray:
    """Return the part (h, w, 3) of a picture around a box.

    Args:
        picture: (H, W, 3).
        box: (x0, y0, x1, y1) pixels.
        margin: on each side, in greater sides of the box.
    """
    x0, y0, x1, y1 = box
    margin = margin * max(x1 - x0, y1 - y0)
    low = np.floor([y0 - margin, x0 - margin]).clip(0).astype(int)
    high = np.ceil([y1 + margin, x1 + margin]).astype(int)
    return picture[low[0] : high[0], low[1] : high[1]]


def contact_sheet(
    pictures: Iterable[np.ndarray], titles: Iterable[str], columns: int = 3, inches: float = 4.6
):
    """Return a matplotlib figure of some pictures side by side, with a title over each.

    Args:
        pictures: (H, W, 3) uint8 each, all of one size.
        titles: one for each.
        columns: number of pictures in a row.
        inches: width of a picture.
    """
    import matplotlib.pyplot as plt

    pictures = list(pictures)
    rows = -(-len(pictures) // columns)
    height, width = pictures[0].shape[:2]
    size = columns * inches, rows * (inches * height / width + 0.35)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, dpi=60, squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, title in zip(axes.flat, pictures, titles):
        axis.imshow(picture)
        axis.set_title(title)
    return figure


def _draw_ellipse(image, centre, covariance):
    """Draw the ellipse of a covariance (2, 2), unless it is larger than the frame."""
    radius = ELLIPSE_SIGMAS * np.sqrt(np.trace(covariance))
    if not np.isfinite(centre).all() or not radius < image.shape[1]:
        return

    values, vectors = np.linalg.eigh(covariance)
    angle = float(np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])))
    lengths = ELLIPSE_SIGMAS * np.sqrt(np.maximum(values[::-1], 0))
    axes = np.round(lengths * 2**xu.CV_SHIFT).astype(int).tolist()
    centre = xu.cv_point(centre)
    cv2.ellipse(image, centre, axes, angle, 0, 360, BLUE, 1, cv2.LINE_AA, xu.CV_SHIFT)


def _draw_path(image, position, velocity, K, near):
    """Draw the path of a point (3,) in the camera's frame at its velocity (3,), units a second."""
    ahead = position + np.linspace(0, SECONDS_AHEAD, 9)[:, None] * velocity
    ahead = ahead[ahead[:, 2] > near]
    pixels = (ahead / ahead[:, 2:]) @ K[:2].T
    points = np.array([xu.cv_point(pixel) for pixel in pixels], np.int32).reshape(-1, 1, 2)
    cv2.polylines(image, [points], False, PINK, 1, cv2.LINE_AA, xu.CV_SHIFT)


def corner_covariance(
    pose: np.ndarray, covariance: np.ndarray, K: np.ndarray, target: xu.Target = xu.XWING
) -> np.ndarray:
    """Propagate the covariance of a pose to the box's corners in the picture, to first order.

    Args:
        pose: (4, 4) model -> OpenCV camera.
        covariance: (6, 6) of a step as in `xu.move_pose`: radians and model units.
        K: (3, 3) camera matrix.
        target: whose box it is.
    Returns:
        (8, 2, 2) square pixels.
    """
    turned = target.box @ pose[:3, :3].T
    _, jacobian = cv2.projectPoints(turned, np.zeros(3), pose[:3, 3], K, None)
    jacobian = jacobian[:, :6].reshape(-1, 2, 6)  # of rotation and translation only
    return jacobian @ covariance @ np.swapaxes(jacobian, 1, 2)


def draw_heatmaps(heatmaps: np.ndarray, size: int) -> np.ndarray:
    """Draw all heatmaps of a frame in one picture, each in its own colour.

    Args:
        heatmaps: (H, W, K) in [0, 1].
        size: pixels, width and height of the picture.
    Returns:
        (size, size, 3) uint8.
    """
    heatmaps = np.asarray(heatmaps, np.float32)
    count = heatmaps.shape[-1]

    hues = np.full((1, count, 3), 255, np.uint8)
    hues[0, :, 0] = np.arange(count) * 180 // count  # OpenCV counts hues to 180
    colours = cv2.cvtColor(hues, cv2.COLOR_HSV2RGB)[0]

    brightest = colours[heatmaps.argmax(-1)]
    picture = (brightest * heatmaps.max(-1, keepdims=True).clip(0, 1)).astype(np.uint8)
    return cv2.resize(picture, (size, size), interpolation=cv2.INTER_LINEAR)


def tracked_pictures(
    clip: Clip | Iterable,
    track: Sequence,
    K: np.ndarray,
    detector: Detector | None,
    indices: Sequence[int],
    size: int = xu.FRAME_SIZE,
    target: xu.Target = xu.XWING,
) -> Iterator[np.ndarray]:
    """Yield frames of a clip with their overlay, beside the heatmaps of the network.

    Args:
        clip: see `footage.frames_at`.
        track: `TrackedPose` of each of its frames.
        K: (3, 3) camera matrix of its frames.
        detector: its network makes the heatmaps; None: there are none.
        indices: numbers of the frames, in ascending order.
        size: pixels, height of the pictures.
        target: whose box is drawn.
    Yields:
        (size, 2 size, 3) uint8: `draw_tracked` beside `draw_heatmaps` of the box's corners; without
        a detector (size, size, 3).
    """
    for i, frame in zip(indices, frames_at(clip, indices)):
        square, scale, (x, y) = letterbox(frame, size)
        moved = xu.crop_camera(K, -x / scale, -y / scale, scale)
        overlay = draw_tracked(square, track[i], moved, target)
        if detector is None:
            yield overlay
            continue

        heatmaps = detector.heatmaps(square[None])[0, ..., :8]
        yield np.hstack([overlay, draw_heatmaps(heatmaps, size)])


def viewer(
    pictures: Iterable[np.ndarray],
    start: int = 0,
    step: int = 1,
    fps: float = 12.5,
    width: int = 640,
):
    """Show pictures in a notebook: a slider chooses one, and a button plays them as a film.

    All pictures are drawn before any is shown, and the slider only exchanges finished images:
    widgets that capture output can hang without a browser (nbclient issue 312).

    Args:
        pictures: (H, W, 3) uint8 each.
        start: number of the frame that shows first.
        step: picture i shows frame i * step of a clip.
        fps: pictures a second while they are played.
        width: pixels; wider pictures are made smaller.
    Returns:
        A widget.
    Raises:
        ValueError: there is no picture.
    """
    import ipywidgets

    jpegs = [encode_jpeg(picture, width) for picture in pictures]
    if not jpegs:
        raise ValueError("expected at least one picture, got none")

    first = start // step
    last = (len(jpegs) - 1) * step
    image = ipywidgets.Image(value=jpegs[first], format="jpeg", layout={"width": f"{width}px"})
    slider = ipywidgets.IntSlider(
        first * step, 0, last, step, description="frame", layout={"flex": "1 1 auto"}
    )
    play = ipywidgets.Play(
        value=first * step, min=0, max=last, step=step, interval=round(1000 / fps)
    )
    ipywidgets.jslink((play, "value"), (slider, "value"))

    def show(change):
        image.value = jpegs[change["new"] // step]

    slider.observe(show, "value")
    controls = ipywidgets.HBox([play, slider], layout={"width": f"{width}px"})
    return ipywidgets.VBox([image, controls])


def encode_jpeg(picture: np.ndarray, width: int | None = None) -> bytes:
    """Return a picture (H, W, 3) uint8 as a JPEG, at most `width` pixels wide."""
    if width is not None and width < picture.shape[1]:
        scale = width / picture.shape[1]
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    _, jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    return jpeg.tobytes()
