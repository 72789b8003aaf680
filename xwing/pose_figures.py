"""Figures that explain poses and tracks; the notebooks show them.

Each function takes arrays or a track and returns a matplotlib figure. What is drawn into the pixels
of a frame is in `xwing.overlay`.
"""

from collections.abc import Sequence

import cv2
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from scipy.spatial.transform import Rotation

import xwing_utils as xu

STYLES = (("tab:green", "-"), ("tab:red", "--"), ("tab:blue", "-"))  # of one box after another
GLOW = np.array([1.0, 0.85, 0.3])  # colour of a heatmap's spot
GAP_COLOURS = {"predicted": "gold", "lost": "lightgrey"}
ARROWS = 30  # of the target's direction along a flight
AXES_3D = [0, 2, 1]  # camera axes as matplotlib draws them: y, which points down, is its third


def show_heatmaps(image: np.ndarray, heatmaps: np.ndarray) -> Figure:
    """Show the heatmaps of a box's corners over the part of the frame around them.

    Args:
        image: (S, S, 3) uint8, the square that the network saw.
        heatmaps: (h, h, 8) in [0, 1].
    """
    size = len(image)
    peaks = (xu.heatmap2argmax(heatmaps) + 0.5) * size / len(heatmaps)
    centre = peaks.mean(0)
    reach = 0.6 * np.ptp(peaks, axis=0).max() + 10
    figure, axes = plt.subplots(2, 4, figsize=(14, 7.4), dpi=72, layout="constrained")
    for k, axis in enumerate(axes.flat):
        spot = cv2.resize(heatmaps[..., k], (size, size))[..., None].clip(0, 1)
        lit = 0.6 * image + 250 * spot * GLOW
        axis.imshow(lit.clip(0, 255).astype(np.uint8), extent=(0, size, size, 0))
        axis.set(title=f"corner {k}, brightest {heatmaps[..., k].max():.2f}", xticks=[], yticks=[])
        axis.set(xlim=centre[0] + [-reach, reach], ylim=centre[1] + [reach, -reach])
    return figure


def show_boxes(
    panels: dict[str, dict], image: np.ndarray | None = None, found: np.ndarray | None = None
) -> Figure:
    """Draw projected boxes side by side, over a frame or alone.

    Args:
        panels: {title: {label: (8, 2) pixels of the corners}}.
        image: (H, W, 3) uint8 below all of them, or None.
        found: (N, 2) pixels that are marked in all of them, or None.
    """
    count = len(panels)
    figure, axes = plt.subplots(
        1, count, figsize=(14, 14 / max(count, 2)), dpi=70, squeeze=False, layout="constrained"
    )
    for axis, (title, boxes) in zip(axes[0], panels.items()):
        for (colour, line), (label, box) in zip(STYLES, boxes.items()):
            _draw_edges(axis, box, label, color=colour, ls=line)
        if found is not None:
            axis.scatter(*np.transpose(found), c="yellow", marker="+", s=90, label="found")
        _set_frame(axis, image)
        axis.set_title(title)
        axis.legend()
    return figure


def _draw_edges(axis, corners, label, **style):
    """Draw the edges of a box whose corners are (8, 2) or (8, 3)."""
    for a, b in xu.BOX_EDGES:
        axis.plot(*corners[[a, b]].T, label=label, **style)
        label = None  # one entry of the legend is enough


def _set_frame(axis, image):
    """Make the axes those of a picture, with y down; the picture is below all else."""
    axis.set_aspect("equal")
    if image is None:
        axis.invert_yaxis()
        return
    height, width = image.shape[:2]
    axis.imshow(image, extent=(0, width, height, 0))
    axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))


def show_rays(pixels: np.ndarray, pose: np.ndarray, K: np.ndarray, target: xu.Target) -> Figure:
    """Show what PnP looks for: the pose at which each corner lies on the ray of its pixel.

    Args:
        pixels: (8, 2) where the corners of the target's box were found.
        pose: (4, 4) model -> OpenCV camera.
        K: (3, 3) camera matrix, pixels.
        target: whose box it is.
    """
    corners = target.box @ pose[:3, :3].T + pose[:3, 3]
    directions = np.column_stack([pixels, np.ones(8)]) @ np.linalg.inv(K).T
    ends = directions * 1.15 * corners[:, 2].max()
    on_plane = directions * 0.4 * corners[:, 2].min()

    axis = _axes_in_space()
    for end in ends:
        axis.plot(*_in_space([np.zeros(3), end]), c="0.6", lw=0.8)
    _draw_edges(axis, corners[:, AXES_3D], "box at the pose", color="tab:green")
    axis.scatter(*_in_space(on_plane), c="tab:orange", s=20, label="pixels, on the image plane")
    _draw_camera(axis, K, 2 * K[:2, 2], 0.4 * corners[:, 2].min())
    axis.legend()
    return axis.figure


def show_flight(track: Sequence, K: np.ndarray, size: Sequence, target: xu.Target) -> Figure:
    """Show the path of a target in space, and its direction along the path.

    Args:
        track: one `TrackedPose` a frame.
        K: (3, 3) camera matrix, pixels.
        size: width and height of the frames, pixels.
        target: the arrows point along its -y axis, which is the nose of a ship.
    """
    poses = [tracked.pose for tracked in track]
    axis = _axes_in_space()
    _draw_camera(axis, K, size, target.diameter)
    axis.plot(*_in_space([np.full(3, np.nan) if p is None else p[:3, 3] for p in poses]))
    arrow = [0, -target.diameter / 4, 0, 0]
    for pose in poses[:: max(1, len(poses) // ARROWS)]:
        if pose is not None:
            axis.quiver(*pose[AXES_3D, 3], *(pose @ arrow)[AXES_3D], color="tab:red", lw=1)
    return axis.figure


def _axes_in_space():
    """Axes in space, seen from beside the camera."""
    figure = plt.figure(figsize=(11, 7), dpi=70)
    axis = figure.add_axes([0, 0, 1, 1], projection="3d")
    axis.view_init(elev=20, azim=-35)
    axis.invert_zaxis()
    axis.set(xlabel="x", ylabel="z, away from the camera", zlabel="y, down")
    axis.set_box_aspect((1, 1.6, 0.7), zoom=1.25)
    return axis


def _in_space(points):
    """Points (N, 3) in camera axes as the three arguments of matplotlib's functions."""
    return np.array(points)[:, AXES_3D].T


def _draw_camera(axis, K, size, depth):
    """Draw a camera at the origin: its image plane at a depth, and lines to the corners of it."""
    width, height = size
    frame = np.array([[0, 0], [width, 0], [width, height], [0, height], [0, 0]])
    plane = depth * np.column_stack([(frame - K[:2, 2]) / K[0, 0], np.ones(5)])
    for corner in plane[:4]:
        axis.plot(*_in_space([np.zeros(3), corner]), c="k", lw=0.8)
    axis.plot(*_in_space(plane), c="k", lw=0.8)


def show_track(track: Sequence) -> Figure:
    """Show position and rotation of a target over the frames of a clip.

    The angles are unwrapped, so that a full turn makes no jump.

    Args:
        track: one `TrackedPose` a frame.
    """
    positions, angles = _curves(track)
    figure, axes = plt.subplots(2, 1, figsize=(14, 6), dpi=70, sharex=True, layout="constrained")
    axes[0].plot(positions, label=["x", "y", "z"])
    axes[1].plot(angles, label=["about y", "about x", "about z"])
    axes[0].set(ylabel="position, model units")
    axes[1].set(ylabel="rotation, degrees", xlabel="frame (yellow: predicted, grey: no pose)")
    for axis in axes:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        for i, tracked in enumerate(track):
            if tracked.status != "tracked":
                axis.axvspan(i - 0.5, i + 0.5, color=GAP_COLOURS[tracked.status], lw=0)
    return figure


def _curves(track):
    """Positions (N, 3) and unwrapped angles (N, 3) in degrees; NaN where there is no pose."""
    positions = np.full((len(track), 3), np.nan)
    angles = np.full((len(track), 3), np.nan)
    has_pose = np.array([tracked.pose is not None for tracked in track])
    if has_pose.any():
        poses = np.array([tracked.pose for tracked in track if tracked.pose is not None])
        turns = Rotation.from_matrix(poses[:, :3, :3]).as_euler("yxz")
        positions[has_pose] = poses[:, :3, 3]
        angles[has_pose] = np.degrees(np.unwrap(turns, axis=0))
    return positions, angles


def show_lens(check, K: np.ndarray, size: Sequence) -> Figure:
    """Show how well a target explains the frames with other focal lengths.

    Args:
        check: `lens.LensCheck`.
        K: (3, 3) camera matrix that was checked, pixels.
        size: width and height of the frames, pixels.
    """
    figure, axis = plt.subplots(figsize=(7, 3.6), dpi=70)
    axis.plot(xu.focal_length(K, *size) * check.factors, check.explained, "o-")
    axis.axvline(check.focal, color="0.6", ls="--", label=f"{check.focal:.1f} mm fit best")
    axis.set(xlabel="focal length, mm", ylabel="contrast explained")
    axis.legend()
    return figure
