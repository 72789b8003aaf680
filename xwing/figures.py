"""Figures of the notebooks that explain the frames, the training and the evaluation.

A notebook computes, and a function here draws what it has computed. So a reader of the notebook
sees the idea, and a reader of this file sees how it is drawn. Nothing is measured here. All
functions draw with matplotlib; `xwing.overlay` draws over frames of any clip without it.
"""

import textwrap
from collections.abc import Mapping, Sequence

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from mpl_toolkits.mplot3d.art3d import Line3DCollection, Poly3DCollection

import xwing_utils as xu
from xwing.metrics import BAD_TURN, quantile_coverage, reliability, roc
from xwing.overlay import encode_jpeg

RED = (230, 60, 60)
_PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind words on pictures

# ------------------------------------------------------------ pictures side by side


def sheet(pictures: Sequence, columns: int):
    """Put pictures (H, W, 3) uint8 of one size edge to edge; return them as one shown JPEG.

    Args:
        pictures: rows times `columns` of them.
        columns: number of pictures in a row.
    """
    from IPython.display import Image

    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    return Image(encode_jpeg(np.vstack([np.hstack(list(row)) for row in rows])))


def boxed_frames(result, frames: Sequence) -> tuple[list, list]:
    """Frames with the box at the true pose (red) and at the one that was found (green).

    Args:
        result: `Evaluation`.
        frames: numbers of frames.

    Returns:
        pictures (H, W, 3) uint8, and a title for each: how far the pose is off, or why there is
        none.
    """
    pictures = []
    titles = []
    for i in frames:
        picture = xu.draw_box(xu.read_image(result.paths[i]), result.true_keypoints[i, :8], RED)
        pose = result.poses[i]
        if pose is None:
            titles.append(textwrap.fill(f"rejected: {result.estimates[i].reason}", 36))
        else:
            picture = xu.draw_box(picture, xu.project_pose(result.target.box, pose, result.K))
            turn = xu.rotation_error(pose, result.true_poses[i])
            titles.append(f"rotation {turn:.1f}° off")
        pictures.append(picture)
    return pictures, titles


def alignment_steps(result, frames: Sequence, aligner) -> tuple[list, list]:
    """Frames beside the drawing at the pose from the keypoints, and at the aligned pose.

    The drawing's paint and light are solved for, too. The last picture of each row is what remains
    between frame and drawing, three times amplified.

    Args:
        result: `Evaluation` with that aligner.
        frames: numbers of frames.
        aligner: `Aligner` of the target.

    Returns:
        four pictures (H, W, 3) uint8 a frame, and a title for each.
    """
    pictures = []
    titles = []
    for i in frames:
        image = xu.read_image(result.paths[i])
        start = result.from_points[i].pose
        end = result.estimates[i].pose
        _, before = aligner.picture(image, start, result.K)
        frame, after = aligner.picture(image, end, result.K)
        remains = np.clip(128 + 3 * (frame.astype(int) - after), 0, 255).astype(np.uint8)
        pictures += [frame, before, after, remains]
        off = [xu.rotation_error(pose, result.true_poses[i]) for pose in (start, end)]
        titles += ["frame", f"keypoints: {off[0]:.1f}° off", f"aligned: {off[1]:.1f}° off"]
        titles.append("what remains, x 3")
    return pictures, titles


# ------------------------------------------------------------ the camera, and points of the model

_SYSTEMS_LENGTH = 0.22  # world units, of the axes that are drawn
_SCREEN_DISTANCE = 0.35  # world units from the camera to the picture that is drawn


def draw_systems(image: np.ndarray, matrix: np.ndarray, pose: np.ndarray, K: np.ndarray, mesh):
    """Draw the four coordinate systems in space: model, world, camera, and the picture.

    Rays of light run from the corners of the box to the camera, through the picture.

    Args:
        image: (H, W, 3) uint8, a square frame of the X-wing.
        matrix: (4, 4) model -> world.
        pose: (4, 4) model -> OpenCV camera.
        K: (3, 3), pixels.
        mesh: `Mesh` of the X-wing.
    """
    camera = matrix @ np.linalg.inv(pose)  # OpenCV's camera axes, in the world
    screen = _screen(image, camera, K)
    box = xu.to_homogeneous(xu.BOUNDING_BOX) @ matrix[:3].T
    hull = mesh.triangles @ matrix[:3, :3].T + matrix[:3, 3]
    small = cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA) / 255

    figure = plt.figure(figsize=(9, 8))
    axis = figure.add_axes([0, 0, 1, 1], projection="3d", computed_zorder=False)
    axis.add_collection3d(Poly3DCollection(hull, facecolors=mesh.colours[mesh.face_materials]))
    screen_options = dict(facecolors=small, shade=False, rcount=128, ccount=128)
    axis.plot_surface(*screen.transpose(2, 0, 1), **screen_options)
    lines = [*box[xu.BOX_EDGES], *((camera[:3, 3], corner) for corner in box)]
    axis.add_collection3d(Line3DCollection(lines, colors="orange", linewidths=1))
    for name, system in {"model": matrix, "world": np.eye(4), "camera": camera}.items():
        _draw_system(axis, name, system[:3, 3], _SYSTEMS_LENGTH * system[:3, :3].T)
    _draw_system(axis, "picture", screen[0, 0], screen[[0, 64], [64, 0]] - screen[0, 0])

    axis.set(xlim=(-0.3, 0.5), ylim=(-0.3, 0.65), zlim=(0, 1.1))
    axis.set_box_aspect((0.8, 0.95, 1.1), zoom=1.3)
    axis.view_init(elev=25, azim=-55, vertical_axis="y")
    axis.set_axis_off()
    return figure


def _screen(image, camera, K):
    """Where a grid of the picture's pixels lies in the world (129, 129, 3), before the camera."""
    height, width = image.shape[:2]
    u, v = np.meshgrid(np.linspace(0, width, 129), np.linspace(0, height, 129))
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(K).T
    return _SCREEN_DISTANCE * rays @ camera[:3, :3].T + camera[:3, 3]


def _draw_system(axis, name, origin, directions):
    """Draw the axes (n, 3) of a coordinate system with their letters, and its name."""
    for letter, colour, direction in zip("xyz", ["red", "green", "blue"], directions):
        axis.quiver(*origin, *direction, color=colour, lw=2)
        tip = origin + 1.15 * direction
        axis.text(*tip, letter, color=colour, ha="center", va="center", size=14, bbox=_PAPER)
    axis.text(*origin - [0.04, 0.07, 0], name, ha="right", size=14, weight="bold", bbox=_PAPER)


def draw_corners(image: np.ndarray, corners: np.ndarray):
    """Draw a frame with axes in pixels, and beside it the part around its box, with numbers.

    Args:
        image: (H, W, 3) uint8.
        corners: (8, 2) pixels.
    """
    height, width = image.shape[:2]
    low = corners.min(0) - 12
    high = corners.max(0) + 12
    figure, axes = plt.subplots(1, 2, figsize=(14, 7), layout="constrained")
    for axis, picture in zip(axes, (image, xu.draw_box(image, corners))):
        axis.imshow(picture, extent=(0, width, height, 0))
        axis.set(xlabel="x, pixels", ylabel="y, pixels", xlim=(0, width), ylim=(height, 0))
    for k, (x, y) in enumerate(corners):
        axes[1].text(x, y, k, ha="center", va="center", fontsize=15, bbox=_PAPER)
    axes[0].set_title("the frame")
    axes[1].set(title="closer: its box, corners 0 to 7")
    axes[1].set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), facecolor="black")
    return figure


def draw_named_points(views: Mapping):
    """Draw views of the target, with a line from each point to its name at the side.

    Args:
        views: dict title -> picture (H, W, 3), points (K, 2) in its pixels, and names: dict number
            of a point -> what it is called.
    """
    figure, axes = plt.subplots(1, len(views), figsize=(15, 6.6), layout="constrained")
    for axis, (title, (picture, points, names)) in zip(axes, views.items()):
        height, width = picture.shape[:2]
        axis.imshow(picture, extent=(0, width, height, 0))
        numbers = np.array(list(names))
        axis.plot(*points[numbers].T, "o", color="crimson", markersize=4)
        is_left = points[numbers, 0] < np.median(points[numbers, 0])
        _name_points(axis, points, numbers[is_left], names, -10, "right", height)
        _name_points(axis, points, numbers[~is_left], names, width + 10, "left", height)
        margin = 0.3 * width
        axis.set(title=title, xlim=(-margin, width + margin), ylim=(0.97 * height, 0.06 * height))
        axis.axis("off")
    return figure


def _name_points(axis, points, numbers, names, x, align, height):
    """Write the names of points below each other at x, in the order of their heights."""
    line = dict(arrowstyle="-", color="crimson", lw=0.7, relpos=(align == "right", 0.5))
    heights = np.linspace(0.11, 0.92, len(numbers)) * height
    for k, y in zip(numbers[np.argsort(points[numbers, 1])], heights):
        text = f"{names[k]} ({k})"
        axis.annotate(text, points[k], (x, y), ha=align, va="center", arrowprops=line)


def draw_poses(centres: np.ndarray, noses: np.ndarray, inside: np.ndarray):
    """Draw where the ships of a set are, where they point, and how many corners are in the frame.

    Args:
        centres: (N, 2) pixels in frames of 256 px.
        noses: (N,) 1: the nose points to the camera, -1: away from it.
        inside: (N,) number of corners in the frame.
    """
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    axes[0].scatter(*centres.T, s=6)
    axes[0].set(title="projected centres, pixels", xlim=(0, 256), ylim=(256, 0), aspect="equal")
    axes[1].hist(noses, 20)
    axes[1].set(title="nose towards the camera (+1) or away (-1)", ylabel="frames")
    axes[2].hist(inside, np.arange(10) - 0.5, rwidth=0.8)
    axes[2].set(title="corners in the frame", ylabel="frames")
    return figure


# ------------------------------------------------------------ training


def draw_batch(images: np.ndarray, keypoints: np.ndarray, count: int = 8):
    """Draw the first samples of a batch with their box, and the points that face the camera.

    Args:
        images: (B, S, S, 3) uint8.
        keypoints: (B, K, 3): x, y in pixels, and visibility.
        count: number of samples.
    """
    size = images.shape[1]
    figure, axes = plt.subplots(2, count // 2, figsize=(14, 7.2), dpi=60, layout="tight")
    for axis, image, points in zip(axes.flat, images, keypoints):
        seen = points[8:][points[8:, 2] > 0]
        axis.imshow(xu.draw_box(image, points[:8, :2]), extent=(0, size, size, 0))
        axis.scatter(seen[:, 0], seen[:, 1], s=14, c="gold")
    for axis in axes.flat:
        axis.axis("off")
    return figure


def draw_glow(image: np.ndarray, maps: np.ndarray, names: Sequence, low: Sequence, high: Sequence):
    """Draw heatmaps over the grey frame that they belong to, one a picture.

    Args:
        image: (S, S, 3) uint8.
        maps: (S, S, 8) in [0, 1].
        names: of the maps.
        low: (2,) pixels, where the part begins that is shown.
        high: (2,) pixels, where it ends.
    """
    size = image.shape[0]
    grey = image.mean(-1) / 400
    figure, axes = plt.subplots(2, 4, figsize=(14, 7.2), dpi=60, layout="tight")
    for k, axis in enumerate(axes.flat):
        glow = np.dstack([grey + maps[..., k], grey + 0.6 * maps[..., k], grey])
        axis.imshow(glow.clip(0, 1), extent=(0, size, size, 0))
        axis.set(title=names[k], xlim=(low[0], high[0]), ylim=(high[1], low[1]))
        axis.axis("off")
    return figure


def draw_log(log: pd.DataFrame):
    """Draw the loss and the two corner errors of a run over its epochs.

    Args:
        log: from `TrainingRun.fit`.
    """
    errors = log[["val_corner_px", "val_best_permutation_px"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 4), layout="tight")
    left.plot(log.epoch + 1, log.loss, "o-", label="training loss")
    right.plot(log.epoch + 1, errors, "o-", label=["own corner", "best permutation"])
    left.set(xlabel="epoch")
    right.set(xlabel="epoch", ylabel="median error, px")
    left.legend()
    right.legend()
    return figure


def draw_stages(log: pd.DataFrame, right_way: pd.Series):
    """Draw the error and the confusions of all training stages over the samples seen.

    Args:
        log: as weights/xwing_log.csv.
        right_way: fraction of frames whose corners are not swapped, for each row of the log.
    """
    samples = log.samples_seen / 1000
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 4.5), layout="tight")
    left.plot(samples, log.val_corner_px, ".-")
    right.plot(samples, 100 * right_way, ".-")
    left.set(yscale="log", xlabel="thousand samples", ylabel="median corner error, px")
    left.set_yticks([2, 5, 10, 20], [2, 5, 10, 20])
    left.minorticks_off()
    right.set(xlabel="thousand samples", ylabel="the right way round, % of frames")
    for end in samples.groupby(log.stage).max()[:-1]:
        left.axvline(end, color="0.7", linestyle="--", linewidth=1)
        right.axvline(end, color="0.7", linestyle="--", linewidth=1)
    return figure


# ------------------------------------------------------------ evaluation


def draw_recalls(groups: Mapping, labels: Mapping):
    """Draw the recall of groups of frames with its intervals: a panel for each way to split them.

    Args:
        groups: dict by what the frames are split -> dict set -> `metrics.recall_by_group`.
        labels: dict by what the frames are split -> label of that axis.
    """
    size = (14, 4.6)
    figure, axes = plt.subplots(
        1, len(groups), figsize=size, dpi=70, sharey=True, layout="constrained"
    )
    for axis, (key, sets) in zip(axes, groups.items()):
        recall = pd.DataFrame({name: table["right"] for name, table in sets.items()})
        low = pd.DataFrame({name: table["low"] for name, table in sets.items()})
        high = pd.DataFrame({name: table["high"] for name, table in sets.items()})
        bars = np.stack([recall - low, high - recall]).clip(0).transpose(2, 0, 1)
        recall.index = [f"up to {group.right:g}" for group in recall.index]
        recall.plot.bar(ax=axis, yerr=bars, rot=0, capsize=3, legend=False)
        axis.set(xlabel=labels[key], ylabel="recall", ylim=(0, 1.05))
    figure.legend(list(sets), loc="outside upper right", ncols=len(sets))
    return figure


def draw_claims(points: pd.DataFrame, claims: Mapping):
    """Draw claimed against true errors of keypoints and poses, and risk against coverage.

    Args:
        points: `metrics.keypoint_calibration`.
        claims: dict set -> `metrics.frame_claims`.
    """
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), dpi=70, layout="constrained")
    axes[0].loglog(points["claimed"], points["true"], "o-")
    axes[0].set(xlabel="claimed, px", ylabel="true, px", title="standard deviation of keypoints")
    for name, rows in claims.items():
        axes[1].loglog(rows["claimed"], rows["true"], ".", ms=4, label=name)
        (line,) = axes[2].plot(rows["coverage"], rows["risk"], label=name)
        axes[2].axvline(rows["accepted"].mean(), c=line.get_color(), ls=":")
    axes[1].set(xlabel="claimed, degrees", ylabel="true, degrees", title="rotation error of poses")
    for axis, low, high in ((axes[0], 0.5, 15), (axes[1], 0.05, 90)):
        axis.plot([low, high], [low, high], "k:")
    axes[2].set(xlabel="coverage (dotted: accepted)", ylabel=f"risk, over {BAD_TURN:g}°")
    axes[2].set(title="risk and coverage")
    axes[2].legend()
    return figure


def draw_heatmaps_of(image: np.ndarray, maps: np.ndarray, corners: np.ndarray):
    """Draw a frame cut to its target, the heatmap of each corner, and those of all other points.

    Args:
        image: (S, S, 3) uint8.
        maps: (H, W, K) in [0, 1]; the first eight are the corners'.
        corners: (8, 2) pixels, around which the frame is cut.
    """
    size = image.shape[0]
    # A square around the target.
    around = corners.mean(0) + np.ptp(corners, axis=0).max() * np.array([[-0.7], [0.7]])
    pictures = [image, *maps[..., :8].transpose(2, 0, 1), maps[..., 8:].max(-1)]
    titles = ["frame", *(f"corner {k}" for k in range(8)), "points of the hull"]
    figure, axes = plt.subplots(2, 5, figsize=(14, 6.2), dpi=70, layout="constrained")
    for axis, picture, title in zip(axes.flat, pictures, titles):
        axis.imshow(picture, vmin=0, vmax=1, extent=(0, size, size, 0))
        axis.set(title=title, xlim=around[:, 0], ylim=around[::-1, 1], xticks=[], yticks=[])
        axis.set_facecolor("black")  # beyond the frame
    return figure


def draw_found_points(result, frames: Sequence):
    """Draw the keypoints that were found in some frames, and the true corners.

    Args:
        result: `Evaluation`.
        frames: numbers of frames.
    """
    size = result.size
    figure, axes = plt.subplots(1, len(frames), figsize=(14, 4.8), dpi=70, layout="constrained")
    ring = dict(s=70, facecolors="none", edgecolors="red")
    for axis, i in zip(axes, frames):
        confident = result.confidence[i] >= xu.MIN_CONFIDENCE
        corners = result.keypoints[i, :8][confident[:8]]
        hull = result.keypoints[i, 8:][confident[8:]]
        axis.imshow(xu.read_image(result.paths[i]), extent=(0, size, size, 0))
        axis.scatter(*result.true_keypoints[i, :8].T, label="true corners", **ring)
        axis.scatter(*corners.T, c="lime", marker="+", label="corners found")
        axis.scatter(*hull.T, c="gold", s=9, label="points of the hull")
        axis.set(xlim=(0, size), ylim=(size, 0), xticks=[], yticks=[])
    axes[0].legend(loc="lower right")
    return figure


# ------------------------------------------------------------ tracks


def draw_probabilities(groups: Mapping):
    """Draw how far probabilities and covariances of tracked poses come true.

    Args:
        groups: dict title -> rows of `metrics.track_claims` that have a pose.
    """
    levels = np.linspace(0.01, 0.99, 99)
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), dpi=70, layout="constrained")
    for name, rows in groups.items():
        right = rows["right"].to_numpy(bool)
        probability = rows["probability"].to_numpy()
        bins = reliability(probability, right)
        (line,) = axes[0].plot(bins["claimed"], bins["right"], label=name)
        colour = line.get_color()
        axes[0].scatter(bins["claimed"], bins["right"], bins["frames"] / 4, color=colour)
        axes[2].plot(levels, quantile_coverage(rows["square"][right], levels), c=colour)
        if not right.all():
            false, true, area = roc(1 - probability, ~right)
            axes[1].plot(false, true, c=colour, label=f"{name}: area {area:.3f}")
    axes[0].set(title="reliability", xlabel="probability", ylabel="fraction of right poses")
    axes[1].set(title='ROC of "lost"', xlabel="right called lost", ylabel="wrong called lost")
    axes[2].set(title="covariance", xlabel="chi-square quantile", ylabel="fraction within")
    for axis in axes[::2]:
        axis.plot([0, 1], [0, 1], "k:")
    axes[0].legend()
    if axes[1].lines:
        axes[1].legend()
    return figure


def draw_speeds(recall: pd.DataFrame):
    """Draw the recall of tracks in which frames were left out.

    Args:
        recall: one row for each (flight, way of tracking), one column a step between frames.
    """
    figure, axis = plt.subplots(figsize=(7, 4), dpi=80, layout="constrained")
    styles = {"network on": "o-", "network off": "o:", "no pixels": "o--"}
    colours = {name: f"C{i}" for i, name in enumerate(recall.index.unique(0))}
    for (name, way), values in recall.iterrows():
        axis.plot(values, styles[way], c=colours[name], label=f"{name}, {way}")
    axis.set(xlabel="every n-th frame", xticks=recall.columns)
    axis.set(ylabel="within 5° and 0.106 diameters", ylim=(0, 1.03))
    axis.legend(ncols=2)
    return figure
