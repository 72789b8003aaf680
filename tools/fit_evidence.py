"""Fit the weights of the evidence in `Aligner.verify`: `python tools/fit_evidence.py [FILE ...]`.

A FILE is a network, NAME.weights.h5, or a clip with its truth, such as data/objects/can.json.
Without any, they are the X-wing's network and five objects of data/objects/. A network gives its
own estimates: of drawn squares, of data/shifted where it knows the X-wing, and of frames without
the target. Where there is no network, estimates are simulated: most are a few degrees off, the
others are turned as a lookalike is, or anyhow. They are judged on drawn squares, on the clip, and
on frames without the target. These hold fractals, noise, drawn scenes, other targets of the list,
and a part of the target itself.

Frames of a network are judged twice: by the frame as it is, and by four views of it (the frame and
three rotated ones). One logistic model is fitted to whether the best pose is right (within RIGHT
degrees of the true one or of its equals) for all targets together, each with the same weight. For
each limit on the probability the tool prints how many right and wrong poses `verify_frames` would
accept. No frame of data/test or data/looks is used, and no photograph but those of scikit-image.
"""

import argparse
import itertools
import pickle
from pathlib import Path

import cv2
import joblib
import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation
from scipy.special import expit

import xwing_utils as xu
from xwing import evaluation, metrics, scenery
from xwing import mesh as meshes
from xwing.alignment import Aligner
from xwing.synthesis import Synthesiser
from xwing.verification import VerificationSettings, rotated_views

SHIPPED = xu.ROOT / "weights" / "xwing.weights.h5"
OBJECTS = xu.ROOT / "data" / "objects"
CLIPS = [OBJECTS / f"{name}.json" for name in ("carton", "can", "figure", "toy", "bolt")]
FRAMES = 96  # drawn for each target, and as many without it; half as many of a clip
SEED = 777
RIGHT = 8.0  # degrees
LIMITS = 0.4, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9  # on the probability
RIDGE = 0.1  # penalty on the coefficients of standardised evidence

# Simulated estimates: how often one is right, is turned as a lookalike is, or is anything else.
KINDS = 0.65, 0.2, 0.15
ERROR = 6.0, 0.03  # degrees and diameters, standard deviations of one that is right


# ============================================================ frames with and without a target


class EmptySynthesiser(Synthesiser):
    """Draws everything except the target."""

    def __init__(self, mesh):
        super().__init__(mesh)
        self.exterior.visible_sides = lambda pose, scale: np.zeros(0, int)


def part_of(mesh: meshes.Mesh, rng: np.random.Generator) -> meshes.Mesh:
    """Cut a third of a mesh's triangles off along a random plane, such as a wing."""
    triangles = mesh.triangles
    normals = meshes.triangle_normals(triangles)
    heights = triangles.mean(1) @ rng.normal(size=3)
    order = np.argsort(heights)
    area = np.linalg.norm(normals, axis=1)[order].cumsum()
    kept = order[area < area[-1] / 3]
    if len(kept) < 2:
        return mesh
    vertices = mesh.vertices - mesh.vertices[mesh.faces[kept]].mean((0, 1))
    coordinates = None if mesh.texture_coordinates is None else mesh.texture_coordinates[kept]
    return meshes.Mesh(
        mesh.names,
        mesh.colours,
        vertices,
        mesh.faces[kept],
        mesh.face_materials[kept],
        coordinates,
        mesh.textures,
    )


def fractal(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a part of a Julia set in colours of its own, (height, width, 3) uint8."""
    angle = rng.uniform(0, 2 * np.pi)
    edge = np.exp(1j * angle) / 2 - np.exp(2j * angle) / 4  # of the Mandelbrot set's cardioid
    constant = edge * rng.uniform(0.98, 1.08)
    scale = np.exp(rng.uniform(-2.5, 1)) / width
    row, column = np.indices((height, width))
    z = (column - width / 2 + 1j * (row - height / 2)) * scale + rng.uniform(-0.5, 0.5)
    steps = np.zeros(z.shape)
    for _ in range(80):
        inside = np.abs(z) < 8
        z = np.where(inside, z * z + constant, z)
        steps += inside
    smooth = steps - np.log2(np.log(np.abs(z).clip(2)))
    colours = 0.5 + 0.5 * np.cos(smooth[..., None] * rng.uniform(0.05, 0.6) + rng.uniform(0, 6, 3))
    colours[steps == steps.max()] = 0
    return np.uint8(255 * colours)


def noise(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Draw noise of any spectrum, (height, width, 3) uint8."""
    channels = int(rng.choice([1, 3]))
    grey = scenery.noise(width, height, channels, rng.uniform(-0.3, 1.2), rng)
    grey = 128 + rng.uniform(20, 70) * grey / grey.std()
    return np.broadcast_to(grey, (height, width, 3)).clip(0, 255).astype(np.uint8)


def drawn_frames(mesh, target, rng, count):
    """Draw squares that show enough of a target: images, true poses, K."""
    squares = evaluation.draw_squares(Synthesiser(mesh), target, count, xu.FRAME_SIZE, rng)
    return list(zip(squares.images, squares.poses, squares.cameras))


def empty_frames(mesh, others, rng, count):
    """Draw frames without a target, (image, None, K) each.

    Args:
        mesh: of the target; a part of it may show.
        others: meshes of other targets.
        rng: its state decides everything.
        count: number of frames.
    """
    size = xu.FRAME_SIZE
    K = xu.lens_camera(size, size)
    scenes = EmptySynthesiser(mesh)
    solids = [Synthesiser(other) for other in others]
    frames = []
    while len(frames) < count:
        frames.append((fractal(size, size, rng), None, K))
        frames.append((noise(size, size, rng), None, K))
        solid = solids[len(frames) // 5 % len(solids)]
        for synthesiser in (scenes, solid, Synthesiser(part_of(mesh, rng))):
            image, _, camera = synthesiser(size, rng)
            frames.append((image, None, camera))
    return frames[:count]


def folder_frames(folder, count):
    """Read at most `count` frames of a folder in the data format: images, true poses and K."""
    paths, matrices = xu.load_dataset(folder)
    step = max(1, len(paths) // count)
    view, projection = xu.load_camera(folder)
    K = xu.camera_matrix(projection, xu.FRAME_SIZE, xu.FRAME_SIZE)
    pairs = list(zip(paths, matrices))[::step][:count]
    return [(xu.read_image(p), xu.pose_in_camera(view, m), K) for p, m in pairs]


def clip_frames(path, count):
    """Read at most `count` frames of a clip in which the target is in sight."""
    known = evaluation.load_object(path)
    step = max(1, len(known.poses) // count)
    frames = zip(known.clip, known.poses, known.visible)
    return [
        (frame.image, pose, known.K)
        for frame, pose, visible in itertools.islice(frames, 0, None, step)
        if pose is not None and visible > 0.6
    ]


# ============================================================ estimates


class Network:
    """The estimates of a network, of a frame as it is and of three rotated ones."""

    def __init__(self, path):
        self.model = xu.load_model(path)
        self.target = self.model.target

    def __call__(self, image, truth, K):
        """Four `PoseEstimate` for a square image."""
        images = image[None]
        heatmaps = xu.predict_heatmaps(self.model, images, channels=len(self.target.keypoints))
        points, confidence, sigma = xu.read_keypoints(heatmaps, self.model.settings)
        first = xu.estimate_pose(points[0], K, confidence[0], sigma[0], target=self.target)
        return [first, *rotated_views(self.model, images, K, self.target)[0]]


class Simulation:
    """Estimates that err as those of a network do."""

    def __init__(self, target, lookalikes, rng):
        self.target = target
        self.lookalikes = lookalikes
        self.rng = rng

    def __call__(self, image, truth, K):
        """One `PoseEstimate`; without a truth, it is random."""
        kind = 2 if truth is None else self.rng.choice(3, p=KINDS)
        pose = self._anywhere(image, K) if truth is None else truth.copy()
        if kind == 1 and len(self.lookalikes):
            pose = pose @ self.lookalikes[self.rng.integers(len(self.lookalikes))]
        if kind == 2:
            middle = pose @ [*self.target.box.mean(0), 1]
            pose[:3, :3] = Rotation.random(rng=self.rng).as_matrix()
            pose[:3, 3] = middle[:3] - pose[:3, :3] @ self.target.box.mean(0)

        degrees, diameters = ERROR
        scale = np.repeat([np.radians(degrees), diameters * self.target.diameter], 3) / np.sqrt(3)
        covariance = np.diag(scale**2)
        pose = xu.move_pose(pose, self.rng.normal(0, scale))
        margin = self.rng.exponential(4.0 if kind else 15.0)
        return [xu.PoseEstimate(pose, covariance, True, log_likelihood_margin=margin)]

    def _anywhere(self, image, K):
        """A pose (4, 4) somewhere in a frame."""
        height, width = image.shape[:2]
        pixel = self.rng.uniform(0.25, 0.75, 2) * [width, height]
        depth = self.target.diameter * K[0, 0] / (self.rng.uniform(0.3, 0.8) * min(width, height))
        pose = np.eye(4)
        pose[:3, 3] = np.linalg.solve(K, [*pixel, 1]) * depth
        return pose


# ============================================================ judging


def judge_frame(aligner, image, truth, K, views):
    """Judge a frame by the first view and, where there are more, by all views.

    Returns:
        two rows of features and the error of the best pose in degrees; None without a pose.
    """
    cv2.setNumThreads(1)  # each core has frames of its own
    rows = []
    for chosen in (views[:1], views)[: len(views)]:
        estimates = [view for view in chosen if view.pose is not None]
        judgement = aligner.judge(image, estimates, K)
        if judgement is None:
            rows.append(None)
            continue

        error = 180.0  # no pose is right where there is no target
        if truth is not None:
            error = xu.rotation_error(judgement.best.pose, truth, aligner.target)
        rows.append((judgement.evidence, error))
    return rows if len(rows) > 1 else 2 * rows


def judge_target(path, others, count):
    """Judge `count` frames of each kind: {name of a set: rows}, see `judge_frame`."""
    rng = np.random.default_rng(SEED)
    if path.name.endswith(".weights.h5"):
        estimates = Network(path)
        target = estimates.target
    else:
        target = evaluation.load_object(path).target
    aligner = Aligner(target)
    if not path.name.endswith(".weights.h5"):
        estimates = Simulation(target, aligner.verifier.rivals.lookalikes, rng)

    name = target.name
    sets = {
        f"{name}, drawn": drawn_frames(aligner.mesh, target, rng, count),
        f"{name}, empty": empty_frames(aligner.mesh, others, rng, count),
    }
    if path.suffix == ".json":
        sets[f"{name}, clip"] = clip_frames(path, count // 2)
    elif target.name == xu.XWING.name:
        sets[f"{name}, shifted"] = folder_frames(xu.ROOT / "data" / "shifted", 2 * count)
    return {key: _judge_frames(aligner, estimates, frames) for key, frames in sets.items()}


def _judge_frames(aligner, estimates, frames):
    """Judge all frames on all cores: a list of what `judge_frame` returns."""
    views = [estimates(*frame) for frame in frames]
    tasks = (joblib.delayed(judge_frame)(aligner, *frame, v) for frame, v in zip(frames, views))
    return joblib.Parallel(n_jobs=-1, max_nbytes=None)(tasks)


# ============================================================ fitting


def fit(evidence, right, importance=1.0):
    """Fit the log-odds (D,) of a logistic model to evidence (N, D), whose first column is one."""
    deviation = evidence.std(0)
    varies = deviation > 0
    scale = np.where(varies, deviation, 1)
    mean = evidence.mean(0) * varies
    standardised = (evidence - mean) / scale
    importance = np.broadcast_to(importance, len(right))

    def loss(weights):
        logit = standardised @ weights
        error = importance * (expit(logit) - right)
        gradient = standardised.T @ error + 2 * RIDGE * varies * weights
        penalty = RIDGE * varies @ weights**2
        return importance @ (np.logaddexp(0, logit) - right * logit) + penalty, gradient

    weights = minimize(loss, np.zeros(evidence.shape[1]), jac=True).x / scale
    weights[0] -= weights @ mean
    return weights


def fit_rows(rows):
    """Fit the weights to {name of a set: rows}; all targets together count alike."""
    targets = [name.split(",")[0] for name in rows]
    counts = {target: 0 for target in targets}
    fitted = []
    for target, pairs in zip(targets, rows.values()):
        found = [(target, *one) for pair in pairs for one in pair if one]
        counts[target] += len(found)
        fitted += found
    evidence = np.array([features for _, features, _ in fitted])
    right = np.array([error < RIGHT for *_, error in fitted], float)
    importance = np.array([1 / counts[target] for target, *_ in fitted])
    return fit(evidence, right, importance * len(fitted) / len(counts))


def accepted(rows, weights, limit):
    """Count the right, the wrong and the flipped poses that would be accepted, as text."""
    confident = VerificationSettings().confident_probability
    errors = []
    for first, all_together in rows:
        enough = first is not None and expit(weights @ first[0]) >= confident
        last = first if enough else all_together
        if last is not None and expit(weights @ last[0]) >= limit:
            errors.append(last[1])

    errors = np.array(errors)
    return f"{(errors < RIGHT).sum()} + {(errors >= RIGHT).sum()} ({(errors > 90).sum()})"


def print_quality(name, pairs, weights):
    """Print how often the best pose is right, and how well the evidence separates right ones."""
    for k, kind in enumerate(("first view", "all views")):
        found = [pair[k] for pair in pairs if pair[k]]
        right = np.array([error < RIGHT for _, error in found])
        score = np.array([weights @ features for features, _ in found])
        mixed = right.any() and not right.all()
        area = metrics.roc(score, right)[2] if mixed else np.nan
        counts = f"best pose right in {right.sum()} of {len(pairs)}"
        print(f"{name}, {kind}: {counts}, ROC area {area:.3f}")


def main():
    parser = argparse.ArgumentParser(
        description="Fit the weights of the evidence in Aligner.verify."
    )
    parser.add_argument("files", type=Path, nargs="*", default=[SHIPPED, *CLIPS])
    parser.add_argument("--rows", type=Path, help="file that keeps what was judged, to go on from")
    parser.add_argument("--frames", type=int, default=FRAMES, help="drawn for each target")
    options = parser.parse_args()

    targets = [evaluation.load_object(path).target for path in CLIPS]
    others = {target.name: meshes.load_mesh(target.mesh) for target in targets}
    rows = {}
    if options.rows and options.rows.is_file():
        rows = pickle.loads(options.rows.read_bytes())  # written by this tool
    for path in options.files:
        own = path.name.split(".")[0]
        if any(name.split(",")[0].lower().replace("-", "") == own for name in rows):
            continue
        other_meshes = [mesh for name, mesh in others.items() if name != own]
        rows |= judge_target(path, other_meshes, options.frames)
        if options.rows:
            options.rows.write_bytes(pickle.dumps(rows))

    weights = fit_rows(rows)
    print("evidence_weights =", weights.round(2).tolist())
    for name, pairs in rows.items():
        print_quality(name, pairs, weights)
    table = {
        name: [accepted(pairs, weights, limit) for limit in LIMITS] for name, pairs in rows.items()
    }
    print(pd.DataFrame(table, LIMITS).T.to_string())


if __name__ == "__main__":
    main()
