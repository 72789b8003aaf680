"""What is known of a frame, drawn over it."""

import cv2
import numpy as np

import xwing_utils as xu
from xwing.detector import letterbox
from xwing.footage import frames_at

GREEN, YELLOW, BLUE, PINK = (90, 255, 90), (255, 220, 60), (120, 200, 255), (255, 160, 255)


def draw_tracked(image, tracked, K):
    """Return a copy of the frame with what a `TrackedPose` says: its box, green where tracked, yellow where
    predicted, with two standard deviations of the corners, its axes, and its way in the next half second."""
    image, pose = np.array(image, order="C"), tracked.pose
    if pose is None:
        return image
    corners = xu.project_pose(xu.BOUNDING_BOX, pose, K)
    image = xu.draw_box(image, corners, GREEN if tracked.status == "tracked" else YELLOW)
    image = xu.draw_axes(image, pose, K)
    if tracked.covariance is not None:
        for corner, covariance in zip(corners, corner_covariance(pose, tracked.covariance, K)):
            _draw_ellipse(image, corner, covariance)
    if tracked.velocity is not None:
        ahead = pose[:3, 3] + np.linspace(0, 0.5, 9)[:, None] * tracked.velocity[3:]
        ahead = ahead[ahead[:, 2] > 0.05]
        points = np.array(
            [xu.cv_point(point) for point in (ahead / ahead[:, 2:]) @ K[:2].T], np.int32
        )
        cv2.polylines(image, [points.reshape(-1, 1, 2)], False, PINK, 1, cv2.LINE_AA, xu.CV_SHIFT)
    return image


def _draw_ellipse(image, centre, covariance):
    """Draw two standard deviations of a covariance (2, 2), unless they are larger than the frame."""
    if np.isfinite(centre).all() and 2 * np.sqrt(np.trace(covariance)) < image.shape[1]:
        values, vectors = np.linalg.eigh(covariance)
        angle = float(np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])))
        axes = (
            np.round(2 * np.sqrt(np.maximum(values[::-1], 0)) * 2**xu.CV_SHIFT).astype(int).tolist()
        )
        cv2.ellipse(
            image, xu.cv_point(centre), axes, angle, 0, 360, BLUE, 1, cv2.LINE_AA, xu.CV_SHIFT
        )


def corner_covariance(pose, covariance, K):
    """(8, 2, 2) square pixels: how far a pose's covariance (6, 6) moves the box's corners, to first order."""
    turned = xu.BOUNDING_BOX @ pose[:3, :3].T
    jacobian = cv2.projectPoints(turned, np.zeros(3), pose[:3, 3], K, None)[1][:, :6].reshape(
        -1, 2, 6
    )
    return jacobian @ covariance @ np.swapaxes(jacobian, 1, 2)


def draw_heatmaps(heatmaps, size):
    """One picture (size, size, 3) uint8 of all heatmaps (H, W, K) of a frame, each in its own colour."""
    heatmaps, hues = (
        np.asarray(heatmaps, np.float32),
        np.full((1, np.shape(heatmaps)[-1], 3), 255, np.uint8),
    )
    hues[0, :, 0] = np.arange(hues.shape[1]) * 180 // hues.shape[1]
    brightest = cv2.cvtColor(hues, cv2.COLOR_HSV2RGB)[0][heatmaps.argmax(-1)]
    picture = (brightest * heatmaps.max(-1, keepdims=True).clip(0, 1)).astype(np.uint8)
    return cv2.resize(picture, (size, size), interpolation=cv2.INTER_LINEAR)


def tracked_pictures(clip, track, K, detector, indices, size=xu.FRAME_SIZE):
    """Yield frames of a clip (see `frames_at`), (size, 2 size, 3): `draw_tracked` beside `draw_heatmaps`."""
    for i, frame in zip(indices, frames_at(clip, indices)):
        square, scale, offset = letterbox(frame, size)
        moved = np.diag([scale, scale, 1]) @ K + [[0, 0, offset[0]], [0, 0, offset[1]], [0, 0, 0]]
        heatmaps = detector.heatmaps(square[None])[0, ..., :8]
        yield np.hstack([draw_tracked(square, track[i], moved), draw_heatmaps(heatmaps, size)])


def viewer(pictures, start=0, step=1, fps=12.5, width=640):
    """A widget for a notebook: pictures (H, W, 3) uint8 at the move of a slider, or played as a film.

    The i-th picture shows frame i * step of a clip, that of frame `start` shows first. All are drawn before
    any shows, `width` pixels wide. Widgets that capture output can hang without a browser (nbclient 312).
    """
    import ipywidgets

    jpegs = []
    for picture in pictures:
        scale = min(width / picture.shape[1], 1.0)
        small = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        jpegs.append(
            cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
        )
    if not jpegs:
        raise ValueError("expected at least one picture, got none")
    last, start = (len(jpegs) - 1) * step, start // step * step
    image = ipywidgets.Image(
        value=jpegs[start // step], format="jpeg", layout={"width": f"{width}px"}
    )
    slider = ipywidgets.IntSlider(start, 0, last, step, description="frame")
    play = ipywidgets.Play(value=start, min=0, max=last, step=step, interval=round(1000 / fps))
    ipywidgets.jslink((play, "value"), (slider, "value"))
    slider.observe(lambda change: setattr(image, "value", jpegs[change["new"] // step]), "value")
    return ipywidgets.VBox([image, ipywidgets.HBox([play, slider])])
