"""A track as a USD stage: what Blender, Houdini, Maya or Nuke need to go on with a shot.

The stage holds the camera at rest, and the target's mesh with its animated motion in front of it.
The world is Z-up: the camera stands at the origin, looks along +y, and the upper edge of the frame
is towards +z. One unit of the stage is one unit of the mesh; `metersPerUnit` says how long that is.
Time is counted in the source's own frame numbers. Rotations are quaternions whose signs do not
jump, because programs interpolate them between two frames, for motion blur.

    /shot               the default prim
    /shot/camera        with the focal length, the apertures and their offsets
    /shot/target        the animated frame of the mesh, its visibility and its probability
    /shot/target/mesh   one mesh, one subset of faces a material
    /shot/materials     a UsdPreviewSurface each
    /render/settings    the resolution
"""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import trimesh
from scipy.spatial.transform import Rotation

import xwing_utils as xu
from xwing.mesh import NEAR, Mesh, load_mesh

try:
    from pxr import Gf, Sdf, Tf, Usd, UsdGeom, UsdRender, UsdShade, Vt
except ImportError:  # the rest of the project works without it
    Usd = None

FAR = 1000.0  # diameters: the end of what the camera shows, or twice the farthest distance
ROUGHNESS = 0.5  # of all materials
INSTANT = 0.01  # frames: half of the time in which the target vanishes or comes back

# Where the camera stands: OpenCV's axes (x right, y down, z forward) in the world, and OpenGL's.
CAMERA_TO_WORLD = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
GL_CAMERA_TO_WORLD = CAMERA_TO_WORLD @ np.diag([1.0, -1, -1, 1])


@dataclasses.dataclass(frozen=True)
class Shot:
    """What is known of the footage that a track belongs to."""

    K: np.ndarray  # (3, 3) pixels
    width: int  # of the frames, pixels
    height: int
    numbers: Sequence[int]  # of the frames in the source, ascending
    fps: float  # frames a second of the source, when all of its frames are counted
    source: str  # its path; empty where it is not known


def usd_files(
    path: str | Path, track: Sequence, shot: Shot, target: xu.Target
) -> dict[Path, bytes]:
    """The files of a track's USD stage: {path: content}, for `xwing_utils.write_files`.

    Args:
        path: a `.usda` (text) or `.usdc` (binary) file.
        track: N `TrackedPose`.
        shot: of N frames.
        target: whose mesh is handed over, whole and with its textures. They are PNG files beside
            the stage, NAME_texture0.png and so on.
    Raises:
        ModuleNotFoundError: usd-core is not installed.
    """
    if Usd is None:
        raise ModuleNotFoundError(f"{path}: USD needs a package; run: pip install usd-core")
    path = Path(path)
    mesh = load_mesh(target.mesh, max_triangles=None)
    pictures = _texture_files(path, mesh)

    stage = Usd.Stage.CreateInMemory()
    _describe_stage(stage, shot, target)
    root = UsdGeom.Xform.Define(stage, "/shot")
    stage.SetDefaultPrim(root.GetPrim())
    _add_camera(stage, track, shot, target)
    _add_motion(stage, track, shot, target)
    _add_mesh(stage, mesh, target, pictures)
    _add_render_settings(stage, shot)

    files = {path: _stage_bytes(stage, path.suffix.lower())}
    return files | {path.with_name(name): content for name, content in pictures.values()}


def _stage_bytes(stage, suffix):
    """A stage as the content of a file of a kind."""
    if suffix == ".usda":
        return stage.GetRootLayer().ExportToString().encode()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"stage{suffix}"
        stage.GetRootLayer().Export(os.fspath(file))
        return file.read_bytes()


def _describe_stage(stage, shot, target):
    """Axes, units, time and the source."""
    UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.z)
    UsdGeom.SetStageMetersPerUnit(stage, target.unit or 1.0)
    stage.SetTimeCodesPerSecond(shot.fps)
    stage.SetFramesPerSecond(shot.fps)
    stage.SetStartTimeCode(shot.numbers[0])
    stage.SetEndTimeCode(shot.numbers[-1])
    stage.GetRootLayer().customLayerData = {
        "source": shot.source,
        "width": int(shot.width),
        "height": int(shot.height),
        "unitIsKnown": target.unit is not None,
    }


# ------------------------------------------------------------ camera


def _add_camera(stage, track, shot, target):
    """The camera at rest; lengths of its lens are in tenths of a unit, as USD has them."""
    camera = UsdGeom.Camera.Define(stage, "/shot/camera")
    camera.AddTransformOp().Set(Gf.Matrix4d(GL_CAMERA_TO_WORLD.T.tolist()))

    mm = 0.01 / (target.unit or 1.0)  # one millimetre in tenths of a unit
    (fx, _, cx), (_, fy, cy), _ = xu.check_camera_matrix(shot.K)
    focal = xu.focal_length(shot.K, shot.width, shot.height) * mm
    across = shot.width * focal / fx
    down = shot.height * focal / fy
    camera.CreateFocalLengthAttr(focal)
    camera.CreateHorizontalApertureAttr(across)
    camera.CreateVerticalApertureAttr(down)
    camera.CreateHorizontalApertureOffsetAttr((0.5 - cx / shot.width) * across)
    camera.CreateVerticalApertureOffsetAttr((cy / shot.height - 0.5) * down)

    distances = [tracked.pose[2, 3] for tracked in track if tracked.pose is not None]
    far = max([FAR * target.diameter, *(2 * distance for distance in distances)])
    camera.CreateClippingRangeAttr(Gf.Vec2f(NEAR * target.diameter, far))


def _add_render_settings(stage, shot):
    """The resolution, where programs look for it."""
    settings = UsdRender.Settings.Define(stage, "/render/settings")
    settings.CreateResolutionAttr(Gf.Vec2i(int(shot.width), int(shot.height)))
    settings.CreateCameraRel().SetTargets([Sdf.Path("/shot/camera")])
    stage.SetMetadata("renderSettingsPrimPath", "/render/settings")


# ------------------------------------------------------------ motion


def _add_motion(stage, track, shot, target):
    """The animated frame of the target: no pose where it is lost, but a gap in its visibility."""
    node = UsdGeom.Xform.Define(stage, "/shot/target")
    translate = node.AddTranslateOp(UsdGeom.XformOp.PrecisionDouble)
    orient = node.AddOrientOp(UsdGeom.XformOp.PrecisionDouble)
    visibility = node.GetVisibilityAttr()
    probability = _custom(node, "probability", Sdf.ValueTypeNames.Float)
    status = _custom(node, "status", Sdf.ValueTypeNames.Token)

    for number, tracked in zip(shot.numbers, track):
        is_lost = tracked.pose is None
        visibility.Set(UsdGeom.Tokens.invisible if is_lost else UsdGeom.Tokens.inherited, number)
        probability.Set(float(tracked.probability), number)
        status.Set(tracked.status, number)
    for number, place, quaternion in _motion(track, shot, target):
        translate.Set(Gf.Vec3d(*place.tolist()), number)
        orient.Set(Gf.Quatd(*quaternion.tolist()), number)
    _vanish_where_lost(node, track, shot)


def _custom(node, name, kind):
    """An attribute of our own; Blender shows those of this namespace as custom properties."""
    return node.GetPrim().CreateAttribute(f"userProperties:{name}", kind)


def _motion(track, shot, target):
    """Yield number, place (3,) and quaternion (w first) of each frame that has a pose.

    A quaternion and its negative are the same rotation. The sign is the one that is closer to the
    quaternion before, so that nothing turns the long way round between two frames.
    """
    from_upright = np.linalg.inv(_upright(target))
    before = np.zeros(4)
    for number, tracked in zip(shot.numbers, track):
        if tracked.pose is None:
            continue
        matrix = CAMERA_TO_WORLD @ tracked.pose @ from_upright
        quaternion = Rotation.from_matrix(matrix[:3, :3]).as_quat(scalar_first=True)
        if quaternion @ before < 0:
            quaternion = -quaternion
        before = quaternion
        yield number, matrix[:3, 3], quaternion


def _vanish_where_lost(node, track, shot):
    """Scale the target to nothing in frames without a pose, because Blender ignores visibility.

    The scale changes half-way between two frames at once, which leaves the motion blur of the
    frames with a pose as it is.
    """
    sizes = [0.0 if tracked.pose is None else 1.0 for tracked in track]
    if all(sizes):
        return
    scale = node.AddScaleOp(UsdGeom.XformOp.PrecisionFloat)
    scale.Set(Gf.Vec3f(sizes[0]), shot.numbers[0])
    for (first, second), (old, new) in zip(pairwise(shot.numbers), pairwise(sizes)):
        if old != new:
            middle = (first + second) / 2
            scale.Set(Gf.Vec3f(old), middle - INSTANT)
            scale.Set(Gf.Vec3f(new), middle + INSTANT)


def _upright(target):
    """(4, 4) shortest turn from the axes of the mesh to axes in which the target stands up (+z)."""
    up = np.asarray(target.up, float) / np.linalg.norm(target.up)
    matrix = np.eye(4)
    axis = np.cross(up, [0, 0, 1])
    if np.linalg.norm(axis) < 1e-9:  # up is z already, or upside down
        axis = [1.0, 0, 0]
    angle = np.arccos(np.clip(up[2], -1, 1))
    matrix[:3, :3] = Rotation.from_rotvec(angle * np.array(axis) / np.linalg.norm(axis)).as_matrix()
    return matrix


# ------------------------------------------------------------ mesh


def _add_mesh(stage, mesh: Mesh, target, pictures):
    """The mesh in its own axes, turned upright, with a subset of faces for each material."""
    prim = UsdGeom.Mesh.Define(stage, "/shot/target/mesh")
    prim.AddTransformOp().Set(Gf.Matrix4d(_upright(target).T.tolist()))
    points = np.float32(mesh.vertices)
    prim.CreatePointsAttr(Vt.Vec3fArray.FromNumpy(points))
    prim.CreateFaceVertexCountsAttr(Vt.IntArray.FromNumpy(np.full(len(mesh.faces), 3, np.int32)))
    prim.CreateFaceVertexIndicesAttr(Vt.IntArray.FromNumpy(np.int32(mesh.faces).ravel()))
    prim.CreateExtentAttr([tuple(points.min(0).tolist()), tuple(points.max(0).tolist())])
    prim.CreateSubdivisionSchemeAttr(UsdGeom.Tokens.none)
    prim.CreateDoubleSidedAttr(True)  # a mesh need not say which side of a face is outside

    _add_surface(stage, prim, mesh, pictures)


def _add_surface(stage, prim, mesh, pictures):
    """Colours, texture coordinates, and a material for each subset of a mesh's faces."""
    linear = np.float32(trimesh.visual.color.srgb_to_linear(mesh.colours))
    colours = prim.CreateDisplayColorPrimvar(UsdGeom.Tokens.uniform)
    colours.Set(Vt.Vec3fArray.FromNumpy(linear[mesh.face_materials]))
    if mesh.texture_coordinates is not None:
        kind = Sdf.ValueTypeNames.TexCoord2fArray
        primvars = UsdGeom.PrimvarsAPI(prim)
        places = primvars.CreatePrimvar("st", kind, UsdGeom.Tokens.faceVarying)
        coordinates = np.float32(mesh.texture_coordinates).reshape(-1, 2)
        places.Set(Vt.Vec2fArray.FromNumpy(coordinates))

    binding = UsdShade.MaterialBindingAPI.Apply(prim.GetPrim())
    for row, name in enumerate(_identifiers(mesh.names)):
        material = _add_material(stage, name, linear[row], pictures.get(row))
        faces = np.int32(np.flatnonzero(mesh.face_materials == row))
        part = binding.CreateMaterialBindSubset(name, Vt.IntArray.FromNumpy(faces))
        UsdShade.MaterialBindingAPI.Apply(part.GetPrim()).Bind(material)


def _identifiers(names):
    """Names of materials as USD allows them, all different: Material_001 for Material.001."""
    identifiers = []
    for name in names:
        identifiers.append(trimesh.util.unique_name(Tf.MakeValidIdentifier(name), identifiers))
    return identifiers


def _add_material(stage, name, colour, picture):
    """A `UsdPreviewSurface` of one colour, or with a texture (name, content)."""
    path = f"/shot/materials/{name}"
    material = UsdShade.Material.Define(stage, path)
    surface = UsdShade.Shader.Define(stage, f"{path}/surface")
    surface.CreateIdAttr("UsdPreviewSurface")
    surface.CreateInput("roughness", Sdf.ValueTypeNames.Float).Set(ROUGHNESS)
    diffuse = surface.CreateInput("diffuseColor", Sdf.ValueTypeNames.Color3f)
    diffuse.Set(Gf.Vec3f(*colour.tolist()))
    if picture is not None:
        diffuse.ConnectToSource(_add_texture(stage, path, picture[0]))
    material.CreateSurfaceOutput().ConnectToSource(surface.ConnectableAPI(), "surface")
    return material


def _add_texture(stage, path, file):
    """A texture's colour output; the texture is a file beside the stage."""
    reader = UsdShade.Shader.Define(stage, f"{path}/coordinates")
    reader.CreateIdAttr("UsdPrimvarReader_float2")
    reader.CreateInput("varname", Sdf.ValueTypeNames.String).Set("st")
    texture = UsdShade.Shader.Define(stage, f"{path}/texture")
    texture.CreateIdAttr("UsdUVTexture")
    texture.CreateInput("file", Sdf.ValueTypeNames.Asset).Set(f"./{file}")
    texture.CreateInput("sourceColorSpace", Sdf.ValueTypeNames.Token).Set("sRGB")
    for side in ("wrapS", "wrapT"):
        texture.CreateInput(side, Sdf.ValueTypeNames.Token).Set("repeat")
    found = reader.CreateOutput("result", Sdf.ValueTypeNames.Float2)
    texture.CreateInput("st", Sdf.ValueTypeNames.Float2).ConnectToSource(found)
    return texture.CreateOutput("rgb", Sdf.ValueTypeNames.Float3)


def _texture_files(path, mesh):
    """{row of a material: (name of a file, PNG bytes)} of the materials that have a texture."""
    stem = path.stem.encode("utf-8", "ignore").decode()  # USD takes no other names
    files = {}
    for row, picture in enumerate(mesh.textures or []):
        if picture is not None:
            content = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
            files[row] = (f"{stem}_texture{row}.png", content)
    return files
