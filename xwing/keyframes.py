"""What was seen of the target at confident poses: the albedo of its surface.

A mesh has one colour for each material, but a real object is printed, painted or worn. How it looks
is learnt from the frames in which its pose is known: there each pixel shows a point of the surface,
and the ratio between the light that was seen and the light that the plain materials would send is
the albedo of that point. Such a picture of ratios, with its depth, is a key frame. A later drawing
looks up what its pixels show in the key frames that saw the target from nearly the same place. Key
frames are never replaced by newer ones, so errors do not add up while the target stays in view.
"""

import dataclasses

import cv2
import numpy as np

from xwing.appearance import Drawing, Painting, camera_points, fill_gaps, sample_picture, to_light
from xwing.mesh import Mesh

NEW_ANGLE = 20.0  # degrees by which a view is turned against all key frames, to be a new one
NEW_SCALE = 1.5  # ratio of its distance to that of all others, to be a new one
MAX_KEY_FRAMES = 100  # about as many as are 20 degrees apart, all around; 36 MB at most
LOOKED_UP = 2  # key frames that are asked for the albedo of one drawing

DARK_LIGHT = 0.01  # is added to both sides of a ratio, which is not defined for black
ALBEDO_RANGE = 0.1, 8.0  # ratios beyond are noise or reflections
FULL_COVERAGE = 0.98  # fraction of a pixel: with less it also shows the background
SURFACE_COVERAGE = 0.3  # fraction of a pixel from which it is looked up
MAX_DEPTH_STEP = 0.08  # diameters between neighbours: beyond there is a rim, which mixes surfaces
DEPTH_TOLERANCE = 0.012  # diameters by which two depths of the same surface may differ
DEPTH_TOLERANCE_PIXELS = 1.5  # widths of a pixel by which they may differ in addition
MAX_LEFT = 0.03  # fraction of the pixels that may stay unknown before another key frame is asked


@dataclasses.dataclass(frozen=True)
class KeyFrame:
    """The albedo that was seen at one pose; float32."""

    pose: np.ndarray  # (4, 4)
    K: np.ndarray  # (3, 3) camera matrix of this picture
    albedo: np.ndarray  # (h, w, 3) light that was seen / light of the plain materials
    depth: np.ndarray  # (h, w) model units; inf where the albedo is not known

    def look_up(self, points: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
        """Look up points of the surface.

        Args:
            points: (P, 3) model axes.
            tolerance: model units by which the depth of a point may differ, besides that of pixels.

        Returns:
            albedo (P, 3) and whether it is known (P,).
        """
        in_camera = points @ np.float32(self.pose[:3, :3].T) + np.float32(self.pose[:3, 3])
        z = in_camera[:, 2].clip(1e-6)
        pixels = in_camera @ np.float32(self.K[:2].T) / z[:, None]

        height, width = self.depth.shape
        inside = (pixels >= 0).all(1) & (pixels < (width, height)).all(1) & (in_camera[:, 2] > 1e-6)
        pixels[~inside] = 0
        column, row = pixels.astype(int).T

        tolerance = tolerance + DEPTH_TOLERANCE_PIXELS * z / np.float32(self.K[0, 0])
        known = inside & (np.abs(self.depth[row, column] - z) < tolerance)
        return sample_picture(self.albedo, np.float32(pixels)), known


class KeyFrames:
    """The key frames of one target, and the albedo that they say a drawing has.

    Args:
        mesh: `Mesh` of the target.
    """

    def __init__(self, mesh: Mesh):
        self.diameter = mesh.diameter
        corners = mesh.triangles.reshape(-1, 3)
        self.centre = (corners.min(0) + corners.max(0)) / 2
        self.frames = []

    def clear(self) -> None:
        """Forget all key frames."""
        self.frames = []

    def is_new(self, pose: np.ndarray) -> bool:
        """Return whether no key frame was seen from nearly the same place as a pose (4, 4)."""
        differences = self._differences(pose)
        return len(differences) < MAX_KEY_FRAMES and all(differences > 1)

    def add(self, painting: Painting) -> None:
        """Keep what a view shows as a key frame.

        Args:
            painting: `Painting` of the view at its pose, drawn without what was learnt.
        """
        view = painting.view
        drawing = painting.drawing
        plain = to_light(painting.picture.clip(0))
        albedo = (view.light + np.float32(DARK_LIGHT)) / (plain + np.float32(DARK_LIGHT))
        if drawing.albedo is not None:
            albedo = albedo * drawing.albedo  # of the texture, which was seen through this light
        depth = np.where(self._is_surface(drawing), drawing.depth, np.float32(np.inf))
        self.frames.append(KeyFrame(drawing.pose, view.K, albedo.clip(*ALBEDO_RANGE), depth))

    def albedo(self, drawing: Drawing, K: np.ndarray) -> np.ndarray | None:
        """Return the albedo that the key frames know for a drawing.

        Args:
            drawing: `Drawing`.
            K: (3, 3) camera matrix of its view.

        Returns:
            (h, w, 3) float32; where no key frame knows it, that of the mesh's texture, or guessed
            from the pixels around. None where there are no key frames.
        """
        if not self.frames:
            return None
        shows = np.isfinite(drawing.depth) & (drawing.coverage > SURFACE_COVERAGE)
        pixels = np.flatnonzero(shows)
        rotation = np.float32(drawing.pose[:3, :3])
        in_camera = np.column_stack(camera_points(pixels, drawing.depth, K))
        points = (in_camera - np.float32(drawing.pose[:3, 3])) @ rotation

        albedo = np.ones((*drawing.depth.shape, 3), np.float32)
        known = np.zeros(drawing.depth.shape, np.float32)
        left = np.arange(len(pixels))
        for frame in self._nearest(drawing.pose):
            if len(left) <= MAX_LEFT * len(pixels):
                break
            found, is_known = frame.look_up(points[left], DEPTH_TOLERANCE * self.diameter)
            seen = pixels[left[is_known]]
            albedo.reshape(-1, 3)[seen] = found[is_known]
            known.ravel()[seen] = 1
            left = left[~is_known]

        filled = drawing.albedo  # of the texture
        if filled is None:
            filled = fill_gaps(albedo, known, unknown=1.0)
        return np.where(known[..., None] > 0, albedo, filled).clip(*ALBEDO_RANGE)

    def _differences(self, pose):
        """How far the views of the key frames are from that of a pose: 1 from which it is new."""
        position = self._camera(pose)
        distance = np.linalg.norm(position)
        others = np.array([self._camera(frame.pose) for frame in self.frames]).reshape(-1, 3)
        distances = np.linalg.norm(others, axis=1)

        cosines = others @ position / (distances * distance)
        angles = np.degrees(np.arccos(cosines.clip(-1, 1)))
        scales = np.abs(np.log(distances / distance))
        return np.maximum(angles / NEW_ANGLE, scales / np.log(NEW_SCALE))

    def _camera(self, pose):
        """The position (3,) of the camera from the centre of the target, in model axes."""
        return -pose[:3, :3].T @ pose[:3, 3] - self.centre

    def _nearest(self, pose):
        """The key frames whose views are most like that of a pose, the nearest first."""
        order = np.argsort(self._differences(pose))[:LOOKED_UP]
        return [self.frames[i] for i in order]

    def _is_surface(self, drawing):
        """Which pixels (h, w) show one surface and nothing else."""
        window = np.ones((3, 3))
        full = np.uint8(drawing.coverage > FULL_COVERAGE)
        full = cv2.erode(full, window, borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0
        depth = np.where(np.isfinite(drawing.depth), drawing.depth, 0)
        step = cv2.dilate(depth, window) - cv2.erode(depth, window)
        return full & np.isfinite(drawing.depth) & (step < MAX_DEPTH_STEP * self.diameter)
