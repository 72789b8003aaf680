"""What was seen of the target at confident poses: the albedo of its surface.

A mesh has one colour for each material, but a real object is printed, painted or worn. How it looks
is learnt from the frames in which its pose is known: there each pixel shows a point of the surface,
and the ratio between the light that was seen and the light that the plain materials would send is
the albedo of that point. Such a picture of ratios, with its depth, is a key frame. A later drawing
looks up what its pixels show in the key frames that saw the target from nearly the same place. Key
frames are never replaced by newer ones, so errors do not add up while the target stays in view.

Key frames also find a target again that was lost. Points of its surface are recognised by their
surroundings (`Landmarks`), and where they are in a frame fixes a pose. A surface without a pattern
has too few of them. Then the silhouettes that the target has in the key frames are moved over a
picture that says how probable it is, by its colour, that a pixel shows the target (`Silhouette`).
"""

import dataclasses
from collections.abc import Callable

import cv2
import numpy as np

import xwing_utils as xu
from xwing.appearance import Drawing, Painting, camera_points, fill_gaps, sample_picture, to_light
from xwing.mesh import Mesh, rasterise

NEW_ANGLE = 20.0  # degrees by which a view is turned against all key frames, to be a new one
NEW_SCALE = 1.5  # ratio of its distance to that of all others, to be a new one
MAX_KEY_FRAMES = 100  # about as many as are 20 degrees apart, all around; 43 MB at most
LOOKED_UP = 2  # key frames that are asked for the albedo of one drawing

DARK_LIGHT = 0.01  # is added to both sides of a ratio, which is not defined for black
ALBEDO_RANGE = 0.1, 8.0  # ratios beyond are noise or reflections
FULL_COVERAGE = 0.98  # fraction of a pixel: with less it also shows the background
SURFACE_COVERAGE = 0.3  # fraction of a pixel from which it is looked up
MAX_DEPTH_STEP = 0.08  # diameters between neighbours: beyond there is a rim, which mixes surfaces
DEPTH_TOLERANCE = 0.012  # diameters by which two depths of the same surface may differ
DEPTH_TOLERANCE_PIXELS = 1.5  # widths of a pixel by which they may differ in addition
MAX_LEFT = 0.03  # fraction of the pixels that may stay unknown before another key frame is asked

SEARCHED = 30  # key frames at most that are compared with one frame; so a search takes below 60 ms
CLEAR_INLIERS = 20  # with so many matches that agree, no silhouettes are searched

LANDMARKS = 300  # of one key frame, at most
FRAME_LANDMARKS = 1000  # of the frame that is searched, at most
SEARCHED_PIXELS = 160_000  # of the frame that is searched, which is scaled: SIFT takes 30 ms
SMALL_TARGET = 150  # pixels: a key frame that is smaller is enlarged before landmarks are found
WEAKEST_LANDMARK = 0.02  # contrast, of the range of the grey levels
MATCH_RATIO = 0.8  # the best match is nearer than the second best by this factor
RANSAC_ITERATIONS = 300
MAX_REPROJECTION = 4.0  # pixels of the frame that is searched, for a match that agrees with a pose
MIN_INLIERS = 8  # matches that agree with a pose
MAX_TRIES = 3  # key frames whose matches are tried, those with the most

AHEAD = np.array([0, 0, 1.0])  # the direction in which a camera looks
ROLLS = 24  # turns about it at which a silhouette is searched
SILHOUETTE_SIZE = 30  # pixels of its picture
SILHOUETTE_SPAN = 24  # pixels of its picture that the diameter spans
DISTANCE_STEP = 1.15  # ratio of two distances at which a silhouette is searched
DISTANCE_RANGE = 1.33  # the target may be nearer and further than in all key frames by this factor
RARE = -1.0  # log odds that a pixel shows the target, before its colour is known
MAX_SEARCHED_SIZE = 240  # pixels of the picture in which silhouettes are searched
PLACES = 100  # in it, where they are compared
MAX_SILHOUETTES = 4  # poses that silhouettes propose
SAME_TURN = 20.0  # degrees, and
SAME_SHIFT = 0.2  # diameters: poses that are nearer are proposed once


# ============================================================ landmarks


@dataclasses.dataclass(frozen=True)
class Landmarks:
    """Points that are recognised by their surroundings (SIFT).

    Source: Lowe, Distinctive image features from scale-invariant keypoints, IJCV 60(2), 2004.
    """

    points: np.ndarray  # (N, 2) pixels of a frame, or (N, 3) of a surface in model axes; float32
    descriptors: np.ndarray  # (N, 128) uint8

    def __len__(self) -> int:
        return len(self.points)

    @classmethod
    def in_picture(cls, picture: np.ndarray) -> "Landmarks":
        """Find the most distinctive points (N, 2) of a picture (h, w) uint8, those first."""
        sift = cv2.SIFT_create(
            FRAME_LANDMARKS, contrastThreshold=WEAKEST_LANDMARK, enable_precise_upscale=True
        )
        found, descriptors = sift.detectAndCompute(picture, None)
        if descriptors is None:
            return cls(np.empty((0, 2), np.float32), np.empty((0, 128), np.uint8))
        order = np.argsort([-one.response for one in found], kind="stable")
        # For SIFT the centre of a pixel has whole coordinates.
        points = cv2.KeyPoint_convert(found) + np.float32(0.5)
        # OpenCV returns whole numbers, 0 to 255, as floats.
        return cls(points[order], np.uint8(descriptors[order]))

    def match(self, other: "Landmarks") -> tuple[np.ndarray, np.ndarray]:
        """Match each landmark with the other one that is clearly most like it.

        Returns:
            (M,) rows here and (M,) rows there, each of them once.
        """
        if len(self) == 0 or len(other) < 2:
            return np.empty(0, int), np.empty(0, int)
        one = np.float32(self.descriptors)
        two = np.float32(other.descriptors)
        squared = np.square(one).sum(1)[:, None] + np.square(two).sum(1) - 2 * one @ two.T

        row = np.arange(len(one))
        best = squared.argmin(1)
        best_squared = squared[row, best]
        squared[row, best] = np.inf
        clear = np.flatnonzero(best_squared < MATCH_RATIO**2 * squared.min(1))

        order = clear[np.argsort(best_squared[clear], kind="stable")]
        _, first = np.unique(best[order], return_index=True)
        return order[first], best[order[first]]


def surface_landmarks(
    image: np.ndarray, K: np.ndarray, depth: np.ndarray, view_K: np.ndarray, pose: np.ndarray
) -> Landmarks:
    """Find the landmarks (N, 3) of the surface that a view shows.

    Args:
        image: (H, W, 3) uint8, the whole frame.
        K: (3, 3) camera matrix of the frame.
        depth: (h, w) float32 of a view that was cut out of it; inf where there shall be no
            landmark, as near the outline: the background is a part of the surroundings there.
        view_K: (3, 3) camera matrix of the view.
        pose: (4, 4).
    """
    shrink = K[0, 0] / view_K[0, 0]
    left, top = np.round(K[:2, 2] - shrink * view_K[:2, 2]).astype(int)
    height, width = np.round(shrink * np.array(depth.shape)).astype(int)
    crop = cv2.cvtColor(image[top : top + height, left : left + width], cv2.COLOR_RGB2GRAY)
    crop, scale = _resize(crop, 2 if max(crop.shape) < SMALL_TARGET else 1)

    found = Landmarks.in_picture(crop)
    pixels = found.points / np.float32(scale * shrink)  # of the view
    known_depth = np.where(np.isfinite(depth), depth, np.float32(np.nan))
    centres = pixels[:, None] - np.float32(0.5)  # as in `sample_picture`
    z = cv2.remap(known_depth, centres, None, cv2.INTER_LINEAR, borderValue=np.nan).ravel()

    rays = np.column_stack([pixels, np.ones(len(z))]) @ np.linalg.inv(view_K).T
    points = (rays * z[:, None] - pose[:3, 3]) @ pose[:3, :3]
    kept = np.flatnonzero(np.isfinite(z))[:LANDMARKS]
    return Landmarks(np.float32(points[kept]), found.descriptors[kept])


def _resize(picture, scale):
    """A picture in another size, and the scales (2,) of x and y, which are rounded."""
    size = np.array(picture.shape[1::-1])
    new_size = np.maximum(np.round(size * scale), 1).astype(int)
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(picture, new_size.tolist(), interpolation=interpolation), new_size / size


@dataclasses.dataclass(frozen=True)
class LandmarkPose:
    """A pose and how many matches of landmarks agree with it."""

    pose: np.ndarray  # (4, 4)
    inliers: int


@dataclasses.dataclass(frozen=True)
class _Matches:
    """Landmarks of the surface, and where a frame seems to show them."""

    points: np.ndarray  # (M, 3) model axes, float32
    pixels: np.ndarray  # (M, 2) float32
    K: np.ndarray  # (3, 3)

    @classmethod
    def of(cls, surface, seen, K):
        """Match the `Landmarks` of a surface with those of a frame."""
        here, there = surface.match(seen)
        return cls(surface.points[here], seen.points[there], K)

    def solve(self):
        """The pose (4, 4) that most matches agree with, or None."""
        if len(self.points) < MIN_INLIERS:
            return None
        found, rotation, translation, _ = cv2.solvePnPRansac(
            self.points,
            self.pixels,
            self.K,
            None,
            iterationsCount=RANSAC_ITERATIONS,
            confidence=0.999,
            reprojectionError=MAX_REPROJECTION,
            flags=cv2.SOLVEPNP_AP3P,
        )
        if not found or not np.isfinite(rotation).all():
            return None
        return xu.move_pose(np.eye(4), np.concatenate([rotation, translation]).ravel())

    def agree(self, pose):
        """Which matches (M,) agree with a pose (4, 4)."""
        in_camera = self.points @ pose[:3, :3].T + pose[:3, 3]
        z = in_camera[:, 2]
        projected = in_camera @ self.K[:2].T / z.clip(1e-6)[:, None]
        error = np.linalg.norm(projected - self.pixels, axis=1)
        return (error < MAX_REPROJECTION) & (z > 1e-6)

    def refine(self, pose):
        """The `LandmarkPose` after Levenberg-Marquardt on the matches that agree, or None."""
        agree = self.agree(pose)
        if agree.sum() < MIN_INLIERS:
            return None
        rotation = cv2.Rodrigues(pose[:3, :3])[0]
        translation = pose[:3, 3:].copy()
        points = self.points[agree]
        rotation, translation = cv2.solvePnPRefineLM(
            points, self.pixels[agree], self.K, None, rotation, translation
        )
        refined = xu.move_pose(np.eye(4), np.concatenate([rotation, translation]).ravel())
        return LandmarkPose(refined, int(self.agree(refined).sum()))


def find_landmarks(places: list, image: np.ndarray, K: np.ndarray) -> list:
    """Find poses at which the landmarks of a surface are where a frame shows them.

    The most similar of the places gives a pose, and the matches of all of them judge and refine it.

    Args:
        places: `Landmarks` of the surface, a list of those that were seen from one place.
        image: (H, W, 3) uint8.
        K: (3, 3) camera matrix.

    Returns:
        `LandmarkPose`, the one with the most inliers first; none where too few matches agree.
    """
    if not any(len(surface) for surface in places):
        return []
    scale = np.sqrt(SEARCHED_PIXELS / (image.shape[0] * image.shape[1]))
    picture, scales = _resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), scale)
    K = np.diag([*scales, 1]) @ K
    seen = Landmarks.in_picture(picture)

    matched = [_Matches.of(surface, seen, K) for surface in places]
    matched.sort(key=lambda one: len(one.points), reverse=True)
    points = np.concatenate([one.points for one in matched])
    pixels = np.concatenate([one.pixels for one in matched])
    together = _Matches(points, pixels, K)

    poses = [one.solve() for one in matched[:MAX_TRIES]]
    refined = [together.refine(pose) for pose in poses if pose is not None]
    found = [one for one in refined if one is not None]
    return sorted(found, key=lambda one: one.inliers, reverse=True)


# ============================================================ silhouettes


@dataclasses.dataclass(frozen=True)
class Silhouette:
    """What a target covers as seen from one place, in the middle of a picture, at all rolls."""

    rotation: np.ndarray  # (3, 3) model -> camera at the first roll
    centre: np.ndarray  # (3,) of the target, model axes
    distance: float  # model units, from the camera to the centre
    masks: np.ndarray  # (ROLLS, S, S) uint8, S = SILHOUETTE_SIZE; 255: the target

    @classmethod
    def at(cls, mesh: Mesh, centre: np.ndarray, pose: np.ndarray) -> "Silhouette":
        """Draw the silhouette of a mesh at a pose, with the camera turned to its centre.

        Args:
            mesh: `Mesh`.
            centre: (3,) of the mesh.
            pose: (4, 4).
        """
        middle = pose[:3, :3] @ centre + pose[:3, 3]
        distance = float(np.linalg.norm(middle))
        rotation = _turn(middle, AHEAD) @ pose[:3, :3]
        ahead = np.eye(4)
        ahead[:3, :3] = rotation
        ahead[:3, 3] = distance * AHEAD - rotation @ centre

        size = 2 * SILHOUETTE_SIZE
        focal = 2 * SILHOUETTE_SPAN * distance / mesh.diameter
        K = np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
        ids, _ = rasterise(mesh.triangles, ahead, K, size, size, mesh.near)
        mask = 255 * np.uint8(ids >= 0)
        return cls(rotation, centre, distance, np.stack([_roll(mask, i) for i in range(ROLLS)]))

    def pose(self, roll: int, distance: float, pixel: np.ndarray, K: np.ndarray) -> np.ndarray:
        """Return the pose (4, 4) at which it shows at a roll, around a pixel (2,) of a frame."""
        ray = np.linalg.solve(K, [*pixel, 1])
        ray /= np.linalg.norm(ray)
        rolled = cv2.Rodrigues(2 * np.pi * roll / ROLLS * AHEAD)[0] @ self.rotation
        pose = np.eye(4)
        pose[:3, :3] = _turn(AHEAD, ray) @ rolled
        pose[:3, 3] = distance * ray - pose[:3, :3] @ self.centre
        return pose


def _turn(one, other):
    """The smallest rotation (3, 3) that turns one direction (3,) to another."""
    axis = np.cross(one, other)
    sine = np.linalg.norm(axis)
    angle = np.arctan2(sine, one @ other)
    return cv2.Rodrigues(axis * angle / max(sine, 1e-12))[0]


def _roll(mask, roll):
    """A mask (2 S, 2 S), turned about its middle and shrunk to (S, S)."""
    size = mask.shape[0]
    middle = size / 2 - 0.5, size / 2 - 0.5
    # OpenCV counts the angle from x towards the top, the camera's axes from x towards the bottom.
    turn = cv2.getRotationMatrix2D(middle, -360 * roll / ROLLS, 1)
    rolled = cv2.warpAffine(mask, turn, (size, size))
    return cv2.resize(rolled, (SILHOUETTE_SIZE, SILHOUETTE_SIZE), interpolation=cv2.INTER_AREA)


def find_silhouettes(
    silhouettes: list, probability: np.ndarray, K: np.ndarray, diameter: float
) -> list:
    """Find poses at which silhouettes cover what has the colours of the target.

    The log-likelihood of a silhouette is the sum of the log odds of the pixels that it covers. It
    is searched at all rolls, and at the sizes that the target had in the key frames, and some more.

    Args:
        silhouettes: `Silhouette`, seen from several places.
        probability: (H, W) float32 that a pixel shows the target, by its colour alone.
        K: (3, 3) camera matrix.
        diameter: of the target, model units.

    Returns:
        poses (4, 4), at most MAX_SILHOUETTES, the most probable one first.
    """
    if not silhouettes:
        return []
    kernels = np.concatenate([one.masks for one in silhouettes]) / np.float32(255)
    log_odds = np.log(probability / (1 - probability)) + np.float32(RARE)
    distances = _distances([one.distance for one in silhouettes])
    spans = K[0, 0] * diameter / distances
    placed = [_place(kernels, log_odds, span) for span in spans]
    likelihoods = np.concatenate([one for one, _ in placed])
    pixels = np.concatenate([one for _, one in placed])

    poses = []
    for best in np.argsort(-likelihoods, kind="stable"):
        if len(poses) == MAX_SILHOUETTES or likelihoods[best] == -np.inf:
            break
        at, row = divmod(best, len(kernels))
        silhouette = silhouettes[row // ROLLS]
        pose = silhouette.pose(row % ROLLS, distances[at], pixels[best], K)
        if not any(_is_same(pose, other, silhouette.centre, diameter) for other in poses):
            poses.append(pose)
    return poses


def _distances(seen):
    """The distances (D,) at which a target is searched that was seen at others."""
    nearest = min(seen) / DISTANCE_RANGE
    furthest = max(seen) * DISTANCE_RANGE
    steps = np.ceil(np.log(furthest / nearest) / np.log(DISTANCE_STEP))
    return np.geomspace(nearest, furthest, int(steps) + 1)


def _place(kernels, log_odds, span):
    """The best place of each silhouette in a frame where the diameter spans `span` pixels.

    Args:
        kernels: (T, S, S) float32, 1 inside.
        log_odds: (H, W) float32 of the frame.
        span: pixels.

    Returns:
        log-likelihoods (T,) and pixels (T, 2).
    """
    scale = SILHOUETTE_SPAN / span
    if scale * max(log_odds.shape) > MAX_SEARCHED_SIZE:  # so small that it has no shape
        return np.full(len(kernels), -np.inf), np.zeros((len(kernels), 2))
    small, scales = _resize(log_odds, scale)
    border = [SILHOUETTE_SIZE // 2] * 4
    small = cv2.copyMakeBorder(small, *border, cv2.BORDER_CONSTANT, value=RARE)

    # At most places no silhouette fits. The mean of all tells which these are.
    rough = cv2.matchTemplate(small, kernels.mean(0), cv2.TM_CCORR)
    count = min(PLACES, rough.size)
    places = np.argpartition(-rough.ravel(), count - 1)[:count]
    row, column = np.divmod(places, rough.shape[1])
    windows = np.lib.stride_tricks.sliding_window_view(small, kernels.shape[1:])[row, column]

    sums = kernels.reshape(len(kernels), -1) @ windows.reshape(count, -1).T
    pixels = np.column_stack([column, row])[sums.argmax(1)] / scales
    # A pixel of the small picture counts as several of the frame.
    return sums.max(1) / np.prod(scales), pixels


def _is_same(pose, other, centre, diameter):
    """Whether two poses (4, 4) are so near that refinement makes them one."""
    shift = (pose[:3, :3] - other[:3, :3]) @ centre + pose[:3, 3] - other[:3, 3]
    near = np.linalg.norm(shift) < SAME_SHIFT * diameter
    return near and xu.rotation_error(pose, other) < SAME_TURN


# ============================================================ key frames


@dataclasses.dataclass(frozen=True)
class KeyFrame:
    """What was seen at one pose; float32."""

    pose: np.ndarray  # (4, 4)
    K: np.ndarray  # (3, 3) camera matrix of this picture
    albedo: np.ndarray  # (h, w, 3) light that was seen / light of the plain materials
    depth: np.ndarray  # (h, w) model units; inf where the albedo is not known
    landmarks: Landmarks
    silhouette: Silhouette

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
    """The key frames of one target: the albedo of a drawing, and where the target may be.

    Args:
        mesh: `Mesh` of the target.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
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

    def add(self, painting: Painting, image: np.ndarray, K: np.ndarray) -> None:
        """Keep what a view shows as a key frame.

        Args:
            painting: `Painting` of the view at its pose, drawn without what was learnt.
            image: (H, W, 3) uint8, the frame that the view was cut out of.
            K: (3, 3) camera matrix of the frame.
        """
        view = painting.view
        drawing = painting.drawing
        plain = to_light(painting.picture.clip(0))
        albedo = (view.light + np.float32(DARK_LIGHT)) / (plain + np.float32(DARK_LIGHT))
        if drawing.albedo is not None:
            albedo = albedo * drawing.albedo  # of the texture, which was seen through this light
        depth = np.where(self._is_surface(drawing), drawing.depth, np.float32(np.inf))
        landmarks = surface_landmarks(image, K, depth, view.K, drawing.pose)
        silhouette = Silhouette.at(self.mesh, self.centre, drawing.pose)
        albedo = albedo.clip(*ALBEDO_RANGE)
        frame = KeyFrame(drawing.pose, view.K, albedo, depth, landmarks, silhouette)
        self.frames.append(frame)

    def find(
        self,
        image: np.ndarray,
        K: np.ndarray,
        posterior: Callable | None = None,
        near: np.ndarray | None = None,
    ) -> list:
        """Find where the target may be in a frame.

        Args:
            image: (H, W, 3) uint8.
            K: (3, 3) camera matrix.
            posterior: callable, image -> probability (H, W) that a pixel shows the target, by its
                colour alone; between 0 and 1. None: silhouettes are not searched.
            near: (4, 4) pose that the target had lately. Of more than SEARCHED key frames, those
                are used that saw it from near there. None: those that were added last.

        Returns:
            poses (4, 4), the most probable one first: those of landmarks before those of
            silhouettes.
        """
        frames = self._searched(near)
        found = find_landmarks([frame.landmarks for frame in frames], image, K)
        poses = [one.pose for one in found]
        is_clear = found and found[0].inliers >= CLEAR_INLIERS
        if posterior is None or is_clear:
            return poses
        silhouettes = [frame.silhouette for frame in frames]
        return poses + find_silhouettes(silhouettes, posterior(image), K, self.diameter)

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

    def _searched(self, near):
        """The key frames that are compared with a frame; see `find`."""
        if near is None:
            return self.frames[-SEARCHED:]
        order = np.argsort(self._differences(near), kind="stable")
        return [self.frames[i] for i in order[:SEARCHED]]

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
