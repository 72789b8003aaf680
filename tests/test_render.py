"""The renderer: frames as functions of (seed, index), sets on disk, poses, flights, the mesh."""

import errno
import json
import shutil
import subprocess
import sys

import cv2
import looks
import make_xwing
import numpy as np
import pytest
import render
import trimesh
from scipy import stats
from scipy.spatial import KDTree

import xwing_utils as xu
from xwing import mesh as meshes


def render_set(folder, count=2, seed=7, **arguments):
    return render.render_set(folder, count, seed, workers=1, progress=False, **arguments)


def files(folder):
    """{name: bytes} of a set, without the lock."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != ".render.lock"}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Two frames of seed 7."""
    folder = tmp_path_factory.mktemp("rendered")
    assert render_set(folder) == 2
    return folder


@pytest.fixture
def copy(rendered, tmp_path):
    return shutil.copytree(rendered, tmp_path / "copy")


# ------------------------------------------------------------ sets


def test_a_rendered_set_has_the_format(rendered, camera):
    paths, matrices = xu.load_dataset(rendered)
    assert sorted(files(rendered)) == [
        "0.jpg",
        "0_mat.json",
        "1.jpg",
        "1_mat.json",
        "camera_info.json",
        "render_info.json",
    ]
    assert len(paths) == len(matrices) == 2
    assert xu.read_image(paths[0], (256, 256)).std() > 1
    assert not np.array_equal(xu.read_image(paths[0]), xu.read_image(paths[1]))
    np.testing.assert_array_equal(xu.load_camera(rendered), camera)


def test_two_workers_render_the_same_files(rendered, tmp_path):
    render.render_set(tmp_path, 2, 7, workers=2, progress=False)
    assert files(tmp_path) == files(rendered)


def test_a_dask_cluster_renders_the_same_files(rendered, tmp_path):
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        assert render_set(tmp_path / "set", dask=cluster.scheduler_address) == 2
    assert files(tmp_path / "set") == files(rendered)


@pytest.mark.parametrize("name,index", [("test", 2), ("shifted", 1), ("looks", 1), ("frames", 1)])
def test_committed_frames_can_be_rendered_again(root, name, index):
    info = xu.read_json(root / "data" / name / "render_info.json")
    image, matrix, quality = render.MAKERS[info["kind"]](info["seed"], index)
    path = xu.load_dataset(root / "data" / name)[0][index]
    np.testing.assert_allclose(
        matrix, xu.read_json(path.with_name(f"{path.stem}_mat.json")), atol=1e-12
    )
    jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    again = cv2.imdecode(jpeg, cv2.IMREAD_COLOR)[..., ::-1].astype(int)
    # Another processor rounds differently now and then.
    assert np.abs(again - xu.read_image(path)).mean() < 0.1


def test_rendering_again_makes_only_what_is_missing(rendered, copy):
    (copy / "1.jpg").unlink()
    (copy / "0.jpg").write_bytes(b"kept")
    (copy / ".1.jpg.123.part").write_bytes(b"half, of a killed run")
    assert render_set(copy) == 1
    assert files(copy) == {**files(rendered), "0.jpg": b"kept"}


@pytest.mark.parametrize("arguments", [{"seed": 8}, {"kind": "flight"}])
def test_a_folder_of_another_set_is_refused(rendered, arguments):
    before = files(rendered)
    with pytest.raises(ValueError, match="give another folder"):
        render_set(rendered, **arguments)
    assert files(rendered) == before


def test_a_folder_of_another_mesh_of_the_same_name_is_refused(tmp_path):
    """The digest distinguishes meshes, not the name; triangles and colours both count."""
    obj = (render.HERE / "xwing.obj").read_text()
    mtl = (render.HERE / "xwing.mtl").read_text()
    for name, obj_text, mtl_text in (
        ("a", obj, mtl),
        ("b", obj.replace("v 0.0", "v 0.00"), mtl),
        ("c", obj, mtl.replace("Kd 0.8400", "Kd 0.1000")),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "xwing.obj").write_text(obj_text)
        (tmp_path / name / "xwing.mtl").write_text(mtl_text)
    assert render_set(tmp_path / "set", 1, mesh_path=tmp_path / "a" / "xwing.obj") == 1
    assert render_set(tmp_path / "set", 1) == 0  # the same mesh elsewhere
    for name in "bc":
        with pytest.raises(ValueError, match="give another folder"):
            render_set(tmp_path / "set", 2, mesh_path=tmp_path / name / "xwing.obj")


@pytest.mark.parametrize("name", ["sample", "shifted", "frames"])
def test_committed_sets_without_a_digest_are_still_recognised(root, tmp_path, name):
    """Their render_info.json is older than the digest of the mesh."""
    info = xu.read_json(root / "data" / name / "render_info.json")
    for path in (root / "data" / name).glob("*0*"):
        shutil.copy(path, tmp_path)
    shutil.copy(root / "data" / name / "render_info.json", tmp_path)
    before = files(tmp_path)
    assert "mesh_digest" not in info
    assert render_set(tmp_path, 1, info["seed"], kind=info["kind"]) == 0
    assert files(tmp_path) == {**before, "camera_info.json": files(tmp_path)["camera_info.json"]}


def test_a_folder_is_rendered_into_by_one_process_at_a_time(copy):
    """A lock ends with its process, also with one that is killed."""
    code = """import pathlib, sys, time
sys.path[:0] = sys.argv[1:]
import render
with render._locked(pathlib.Path(".")):
    print(flush=True)
    time.sleep(60)"""
    command = [sys.executable, "-c", code, str(render.HERE), str(render.HERE.parent)]
    holder = subprocess.Popen(command, cwd=copy, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline()
        with pytest.raises(ValueError, match="another process renders"):
            render_set(copy)
    finally:
        holder.kill()
        holder.wait()
    assert render_set(copy) == 0


def test_two_seeds_started_at_once_do_not_mix(tmp_path, monkeypatch):
    """The second one starts just before the first one writes its render_info.json."""
    write = xu.write_files
    late = []

    def write_after_the_other(contents):
        if any(path.name == "render_info.json" for path in contents) and not late:
            with pytest.raises(ValueError, match="another process renders"):
                late.extend(contents)
                render_set(tmp_path / "set", 1, seed=8)
        write(contents)

    monkeypatch.setattr(xu, "write_files", write_after_the_other)
    assert render_set(tmp_path / "set", 1, seed=7) == 1
    assert late
    assert xu.read_json(tmp_path / "set" / "render_info.json")["seed"] == 7


def test_a_full_disk_is_one_clear_error(copy, monkeypatch, capsys):
    write = xu.write_files

    def write_or_fail(contents):
        picture = next((path for path in contents if path.suffix == ".jpg"), None)
        if picture:
            raise OSError(errno.ENOSPC, "No space left on device", str(picture))
        write(contents)

    monkeypatch.setattr(xu, "write_files", write_or_fail)
    before = files(copy)
    with pytest.raises(SystemExit, match="2"):
        render.main([str(copy), "--count", "3", "--seed", "7", "--workers", "1"])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(
        part in last for part in ("error: ", "No space left on device", "2.jpg", "start again")
    )
    assert files(copy) == before


@pytest.mark.parametrize("name", render.COMMITTED)
def test_frames_of_a_committed_set_are_not_rendered_elsewhere(
    root, tmp_path, name, capsys, monkeypatch
):
    """Otherwise training could use frames of the test set, which has happened."""
    monkeypatch.setattr(render, "render_set", lambda *arguments, **options: 0)
    info = xu.read_json(root / "data" / name / "render_info.json")
    chosen = "--count", "1", "--seed", str(info["seed"]), "--kind", info["kind"]
    with pytest.raises(SystemExit, match="2"):
        render.main([str(tmp_path / "train"), *chosen])
    assert f"seed {info['seed']}: data/{name} has these frames" in capsys.readouterr().err
    render.main([str(root / "data" / name), *chosen])
    assert ": 0 frames rendered, 1 kept" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["0.jpg", "0_mat.json", "clip.png"])
def test_a_folder_of_foreign_files_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"someone's")
    with pytest.raises(ValueError, match="give another folder"):
        render_set(tmp_path)
    assert files(tmp_path) == {name: b"someone's"}


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"count": 0}, "count"),
        ({"seed": -1}, "-1"),
        ({"kind": "noon"}, "'noon'"),
        ({"count": 301, "kind": "flight"}, "301"),
        ({"count": 301, "kind": "wild"}, "301"),
    ],
)
def test_arguments_out_of_range(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        render_set(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def box_mesh(path, extents, middle=(0, 0, 0)):
    box = trimesh.creation.box(extents)
    box.apply_translation(middle)
    box.export(path)
    return path


@pytest.mark.parametrize(
    "extents,middle,advice",
    [
        ((2, 1, 2), (0, 0, 0), "reaches 1.5 .*expected 0.05 to 0.5, .*; scale it by 0.127$"),
        ((0.02, 0.01, 0.02), (0, 0, 0), "scale it by 12.7$"),
        (
            (2, 1, 2),
            (0, 0, 9),
            r"move its middle \(0, 0, 9\) to the origin and scale it by 0.127$",
        ),
    ],
)
def test_a_mesh_that_does_not_suit_the_camera_is_refused_with_a_scale(
    tmp_path, extents, middle, advice
):
    """Once it left a folder that blocked the next run, with the mesh scaled."""
    mesh_path = box_mesh(tmp_path / "box.obj", extents, middle)
    with pytest.raises(ValueError, match=f"box.obj: .*{advice}"):
        render_set(tmp_path / "set", 1, mesh_path=mesh_path)
    assert not (tmp_path / "set").exists()


def test_a_rendering_that_failed_does_not_block_the_next(tmp_path, monkeypatch):
    mesh_path = box_mesh(tmp_path / "box.obj", (0.2, 0.1, 0.2))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(render, "_render_pair", interrupt)
    with pytest.raises(SystemExit, match="130"):
        render.main([str(tmp_path / "set"), "--mesh", str(mesh_path), "--workers", "1"])
    assert sorted(files(tmp_path / "set")) == ["camera_info.json", "render_info.json"]
    monkeypatch.undo()
    assert render_set(tmp_path / "set", 1) == 1
    assert xu.read_json(tmp_path / "set" / "render_info.json")["mesh"] == "xwing.obj"


def test_a_missing_mesh(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.obj"):
        render_set(tmp_path / "new", mesh_path=tmp_path / "nothing.obj")
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------ frames


def test_the_ship_lies_where_its_vertices_say(camera):
    ship = render.renderer()
    for seed in range(4):
        rng = np.random.default_rng(seed)
        matrix = render.random_pose(rng)
        matrix[:2, 3] *= 0.4  # the whole ship in the frame
        coverage = ship.ship(matrix, render.random_look(rng, ship.materials))[..., 3]
        rows, columns = np.nonzero(coverage > 0)
        positions = xu.keypoints_of([matrix], *camera, points=ship.mesh.vertices)[0]
        drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(drawn - np.concatenate([positions.min(0), positions.max(0)])).max() < 1.5


def test_the_ship_covers_what_the_rasteriser_covers(camera, K, matrices):
    ship = render.renderer()
    look = render.random_look(np.random.default_rng(0), ship.materials)
    for matrix in matrices[:3]:
        pose = xu.pose_in_camera(camera[0], matrix)
        ids, _ = meshes.rasterise(ship.mesh.triangles, pose, xu.crop_camera(K, scale=8), 2048, 2048)
        coverage = (ids >= 0).reshape(256, 8, 256, 8).mean((1, 3))
        truth = ship.ship(matrix, look, samples=64)[..., 3]
        assert truth.sum() > 300
        assert np.abs(coverage - truth).sum() < 0.05 * truth.sum()


def test_a_ship_too_near_the_camera_is_refused():
    ship = render.renderer()
    matrix = np.eye(4)
    matrix[2, 3] = 0.95
    with pytest.raises(ValueError, match="model units from the camera"):
        ship.frame(matrix, render.random_look(np.random.default_rng(0), ship.materials))


def test_the_shifted_look_has_the_same_poses_and_other_pictures(rendered, tmp_path):
    render_set(tmp_path / "set", 1, kind="shifted")
    assert (tmp_path / "set" / "0_mat.json").read_bytes() == (rendered / "0_mat.json").read_bytes()
    first = xu.read_image(tmp_path / "set" / "0.jpg").astype(int)
    second = xu.read_image(rendered / "0.jpg").astype(int)
    assert np.abs(first - second).mean() > 10


def test_scenes_have_the_same_poses_other_pictures_and_their_own_rays(rendered, tmp_path):
    render_set(tmp_path / "set", 1, kind="looks")
    again, _, quality = render.looks_frame(7, 0)
    jpeg = cv2.imencode(".jpg", again[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
    assert (tmp_path / "set" / "0.jpg").read_bytes() == jpeg
    assert 60 <= quality <= 95
    assert (tmp_path / "set" / "0_mat.json").read_bytes() == (rendered / "0_mat.json").read_bytes()
    assert np.abs(again.astype(int) - xu.read_image(rendered / "0.jpg")).mean() > 10
    assert xu.read_json(tmp_path / "set" / "render_info.json")["samples"] == looks.SAMPLES


class Fog:
    """A place without things: only the ship in white light from all round."""

    def __init__(self, mi, rng, position):
        self.shapes = {"light": {"type": "constant", "radiance": 1.0}}

    def add_occluder(self, distance):
        pass


def test_scenes_show_the_ship_at_its_pose(camera, K, matrices, monkeypatch):
    """Where the lens or motion blurs the ship, its outline is in the middle of the blur."""
    monkeypatch.setattr(looks, "Place", Fog)
    monkeypatch.setattr(looks, "SAMPLES", 6)
    ship = render.renderer()
    fov = float(np.degrees(2 * np.arctan(1 / render.FOCAL)))
    offsets = []
    for seed, matrix in enumerate(matrices[:6]):
        image = looks.exposures(ship.mi, ship.mesh, matrix, np.random.default_rng(seed), 256, fov)
        seen = np.abs(image.mean(2) - 1) > 0.04
        pose = xu.pose_in_camera(camera[0], matrix)
        wanted = meshes.rasterise(ship.mesh.triangles, pose, K, 256, 256)[0] >= 0
        near = cv2.dilate(wanted.astype(np.uint8), np.ones((9, 9))) > 0
        assert wanted.sum() > 300
        assert not (seen & ~near).any()
        assert (seen & wanted).sum() > 0.9 * wanted.sum()
        offsets.append(np.mean(np.nonzero(seen), 1) - np.mean(np.nonzero(wanted), 1))
    assert np.abs(np.mean(offsets, 0)).max() < 1  # a part as bright as the sky is not seen


@pytest.mark.parametrize("place", looks.PLACES)
def test_nothing_in_a_place_hides_the_ship(place):
    """Nothing is in front of the ship on the ray from the camera to its centre."""
    ship = render.renderer()
    for seed in range(10):
        rng = np.random.default_rng(seed)
        matrix = render.random_pose(rng)
        scene = looks.Place(ship.mi, rng, matrix[:3, 3], place)
        towards = ship.mi.ScalarVector3f(matrix[:3, 3] - [0, 0, 1])
        hit = ship.mi.load_dict({"type": "scene", **scene.shapes}).ray_intersect(
            ship.mi.Ray3f(ship.mi.ScalarPoint3f(0, 0, 1), towards)
        )
        assert not hit.is_valid() or hit.t > 1.1, (place, seed)


# ------------------------------------------------------------ poses


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    return np.array([render.random_pose(rng) for _ in range(4000)])


def test_half_of_the_random_poses_have_z_zero(drawn):
    z = drawn[:, 2, 3]
    assert 0.47 < (z == 0).mean() < 0.53
    assert stats.kstest(z[z != 0], stats.uniform(-0.4, 0.7).cdf).pvalue > 0.001


def test_projected_centres_are_uniform_over_the_middle_of_the_frame(drawn, camera):
    centres = xu.keypoints_of(drawn, *camera, points=np.zeros((1, 3)))[:, 0]
    for column in centres.T:
        assert stats.kstest(column, stats.uniform(16, 224).cdf).pvalue > 0.001


def test_random_rotations_are_uniform(drawn):
    rotations = drawn[:, :3, :3]
    np.testing.assert_allclose(np.linalg.det(rotations), 1)
    for i, j in np.ndindex(3, 3):  # each entry is uniform in [-1, 1]
        assert stats.kstest(rotations[:, i, j], stats.uniform(-1, 2).cdf).pvalue > 0.001
    angle = np.arccos(np.clip((np.trace(rotations, axis1=1, axis2=2) - 1) / 2, -1, 1))
    assert stats.kstest(angle, lambda a: (a - np.sin(a)) / np.pi).pvalue > 0.001


def steps(flight):
    """Degrees and model units from frame to frame."""
    turns = np.array([xu.rotation_error(a, b) for a, b in zip(flight, flight[1:])])
    return turns, np.linalg.norm(np.diff(flight[:, :3, 3], axis=0), axis=1)


@pytest.mark.parametrize("flight", [render.CALM, render.WILD])
def test_flights_are_rigid_and_smooth(flight):
    poses = render.flight_poses(flight)
    rotations = poses[:, :3, :3]
    squares = rotations @ rotations.transpose(0, 2, 1)
    np.testing.assert_allclose(squares, np.tile(np.eye(3), (300, 1, 1)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(rotations), 1)
    np.testing.assert_array_equal(poses[:, 3], np.tile([0, 0, 0, 1], (300, 1)))
    turns, moves = steps(poses)
    assert np.abs(np.diff(turns)).max() < 1.5
    assert np.abs(np.diff(moves)).max() < 0.003


def test_the_wild_flight_is_two_to_three_times_as_fast(camera):
    calm, wild = render.flight_poses(render.CALM), render.flight_poses(render.WILD)
    for slow, fast in zip(steps(calm), steps(wild)):
        assert 2 < np.median(fast) / np.median(slow) < 3
    calm_distance = 1 - calm[:, 2, 3]
    wild_distance = 1 - wild[:, 2, 3]
    assert wild_distance.min() < 0.85 * calm_distance.min()
    assert wild_distance.max() > 1.3 * calm_distance.max()


@pytest.mark.parametrize("flight,low,high", [(render.CALM, 8, 15), (render.WILD, 15, 25)])
def test_flights_leave_the_frame_completely_once(camera, flight, low, high):
    vertices = meshes.load_mesh(render.SHIP).vertices
    positions = xu.keypoints_of(render.flight_poses(flight), *camera, points=vertices)
    inside = xu.in_frame(positions).any(1)
    assert low <= (~inside).sum() <= high
    assert np.abs(np.diff(inside.astype(int))).sum() == 2


def test_the_committed_clip_is_the_calm_flight(root):
    _, matrices = xu.load_dataset(root / "data" / "frames")
    np.testing.assert_allclose(matrices, render.flight_poses(), atol=1e-9)


def test_frames_of_a_flight_have_three_digits_and_one_sky(tmp_path):
    render_set(tmp_path, 2, 5, kind="wild")
    paths, matrices = xu.load_dataset(tmp_path)
    assert [path.name for path in paths] == ["000.jpg", "001.jpg"]
    np.testing.assert_allclose(matrices, render.flight_poses(render.WILD)[:2], atol=1e-12)
    first, second = (xu.read_image(path)[:100, :100].astype(int) for path in paths)
    # Far from the ship hardly anything moves.
    assert np.abs(first - second).mean() < 0.1 * first.std()


# ------------------------------------------------------------ mesh


def test_the_committed_mesh_is_what_the_script_writes(root, tmp_path):
    make_xwing.write(tmp_path)
    for name in ("xwing.obj", "xwing.mtl"):
        assert (tmp_path / name).read_text() == (root / "data" / name).read_text()


def test_the_mesh_fills_the_bounding_box(root):
    vertices = meshes.load_mesh(root / "data" / "xwing.obj").vertices
    np.testing.assert_allclose(vertices.min(0), xu.BOUNDING_BOX[0], atol=1e-3)
    np.testing.assert_allclose(vertices.max(0), xu.BOUNDING_BOX[7], atol=1e-3)


def test_the_mesh_is_mirror_symmetric_material_by_material(root):
    mesh = meshes.load_mesh(root / "data" / "xwing.obj")
    assert mesh.names == list(make_xwing.COLOURS)
    for material, name in enumerate(mesh.names):
        points = mesh.vertices[np.unique(mesh.faces[mesh.face_materials == material])]
        assert KDTree(points).query(points * [-1, 1, 1])[0].max() < 1e-5, name


def test_hull_keypoints_lie_on_the_mesh():
    mesh = trimesh.util.concatenate(list(make_xwing.build().values()))
    samples, _ = trimesh.sample.sample_surface(mesh, 50000, seed=0)
    distance, _ = KDTree(samples).query(xu.KEYPOINTS[8:])
    assert distance.max() < 0.0105  # intakes and nozzles are hollow; an intake has that radius


STRETCHED = make_xwing.Shape(  # differs from the film's ship in everything
    wing_shift=0.02,
    wing_span=1.2,
    wing_chord=0.8,
    cannon_length=1.4,
    cannon_radius=0.5,
    engine_length=1.3,
    engine_radius=0.75,
    nose_length=1.2,
    nose_width=1.4,
    canopy=1.2,
    s_foils=13,
)


@pytest.fixture(scope="module")
def ships():
    """The film's ship and one of another shape: a trimesh each."""
    shapes = make_xwing.FILM, STRETCHED
    return [trimesh.util.concatenate(list(make_xwing.build(shape).values())) for shape in shapes]


@pytest.fixture(scope="module")
def stretched(tmp_path_factory):
    """The target that is written for the ship of another shape."""
    folder = tmp_path_factory.mktemp("stretched")
    make_xwing.write(folder, STRETCHED)
    return xu.load_target(folder / "xwing.json")


def test_the_film_s_shape_gives_the_film_s_target(tmp_path):
    make_xwing.main([str(tmp_path)])
    target = xu.load_target(tmp_path / "xwing.json")
    assert target.mesh.read_text() == xu.XWING.mesh.read_text()
    xu.check_same_target(target, xu.XWING, "the film's ship")
    np.testing.assert_array_equal(target.keypoints, xu.KEYPOINTS)
    np.testing.assert_array_equal(target.lasers, xu.LASERS)


def test_a_ship_of_another_shape_has_the_same_triangles_and_left_is_still_right(ships, stretched):
    film, other = ships
    np.testing.assert_array_equal(other.faces, film.faces)
    assert other.vertices.shape == film.vertices.shape
    assert KDTree(other.vertices).query(other.vertices * [-1, 1, 1])[0].max() < 1e-9
    np.testing.assert_array_equal(stretched.mirror_permutation, xu.XWING.mirror_permutation)
    np.testing.assert_allclose(stretched.box[[0, 7]], other.bounds, atol=1e-3)


def on_an_axis(name):
    """Whether a keypoint is the centre of a circle of vertices of a cannon or an engine."""
    return name.split()[-1] in ("muzzle", "cannon", "intake", "nozzle")


def test_keypoints_follow_the_surface(ships, stretched):
    """The surface point nearest to a keypoint moves with it."""
    film, other = ships
    corners = film.triangles
    for point, moved, name in zip(xu.KEYPOINTS[8:], stretched.keypoints[8:], xu.KEYPOINT_NAMES[8:]):
        if on_an_axis(name):
            continue
        nearest = trimesh.triangles.closest_point(corners, np.tile(point, (len(corners), 1)))
        distance = np.linalg.norm(nearest - point, axis=1)
        face = distance.argmin()
        weights = trimesh.triangles.points_to_barycentric(corners[[face]], nearest[[face]])[0]
        expected = weights @ other.triangles[face]
        assert np.linalg.norm(expected - moved) <= distance[face] + 4e-4, name


def test_keypoints_stay_in_the_middle_of_their_circles(ships, stretched):
    film, other = ships
    for point, moved, name in zip(xu.KEYPOINTS[8:], stretched.keypoints[8:], xu.KEYPOINT_NAMES[8:]):
        if not on_an_axis(name):
            continue
        offsets = np.abs(film.vertices - point)
        circle = other.vertices[(offsets[:, 1] < 1e-9) & (offsets.max(1) < 0.0106)]
        middle = (circle.min(0) + circle.max(0)) / 2
        assert len(circle) >= 24 and np.ptp(circle, axis=0).max() > 2e-3
        np.testing.assert_allclose(moved, middle, atol=2e-6, err_msg=name)


def test_open_wings_turn_about_the_hull(stretched):
    opened = make_xwing.target_record(make_xwing.Shape(s_foils=13))["keypoints"]
    points = np.array([entry["point"] for entry in opened])
    upward = np.array([entry["normal"] for entry in opened])
    film = xu.KEYPOINTS[8:]
    on_foils = [
        make_xwing.PART_NAMES[name.split()[-1]] in ("wing", "engine", "cannon")
        for name in xu.KEYPOINT_NAMES[8:]
    ]
    turned = np.where(on_foils, 13.0, 0.0) * np.sign(film[:, 0] * film[:, 2])
    angles = [np.rad2deg(np.arctan2(p[:, 2], np.abs(p[:, 0]))) for p in (points, film)]
    expected = turned * np.sign(film[:, 0])
    np.testing.assert_allclose(angles[0] - angles[1], expected, atol=1e-3)
    np.testing.assert_allclose(points[:, 1], film[:, 1])
    left_upper_wing = xu.KEYPOINT_NAMES[8:].index("left upper wing")
    sine, cosine = np.sin(np.deg2rad(13)), np.cos(np.deg2rad(13))
    np.testing.assert_allclose(upward[left_upper_wing], [-sine, 0, cosine], atol=1e-6)


def test_random_shapes_are_written_with_their_targets(tmp_path):
    make_xwing.main([str(tmp_path), "--count", "2", "--seed", "1"])
    targets = [xu.load_target(tmp_path / f"{i:03d}.json") for i in range(2)]
    assert np.abs(targets[0].keypoints - targets[1].keypoints).max() > 1e-3
    assert [target.mesh.name for target in targets] == ["000.obj", "001.obj"]
    rng = np.random.default_rng(0)
    angles = [make_xwing.random_shape(rng).s_foils for _ in range(50)]
    assert 10 < angles.count(0) < 30 and 0 <= min(angles) and 10 < max(angles) <= 13


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--s-foils", "14"], "s_foils: expected 0 to 13, got 14"),
        (["--canopy", "nan"], "canopy: expected 0.25 to 4, got nan"),
        (["--nose-width", "1.1"], "holds the film's ship"),
        (["--count", "2"], "holds the film's ship"),
        (["x", "--count", "2", "--canopy", "1.1"], "leave out the other arguments"),
    ],
)
def test_shapes_that_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        make_xwing.main(arguments)
    assert message in capsys.readouterr().err


def test_meshes_of_one_digest_are_the_same(root):
    mesh = meshes.load_mesh(root / "data" / "xwing.obj")
    other = meshes.Mesh(
        mesh.names, mesh.colours, mesh.vertices * 1.001, mesh.faces, mesh.face_materials
    )
    again = meshes.load_mesh(root / "data" / "xwing.obj")
    assert render.mesh_digest(mesh) == render.mesh_digest(again)
    assert render.mesh_digest(mesh) != render.mesh_digest(other)
    assert len(json.dumps(render.mesh_digest(mesh))) == 18
