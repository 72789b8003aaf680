"""What each pixel should look like at a pose: linear light, colours, light and background.

The shape of the target is known, so a pose says which pixel shows which surface. How the target is
painted and lit is not known. In linear light, however, the picture is linear in both: in one
colour for each material, and in light that varies smoothly with the direction of the surface. A
pose is therefore drawn as a sum of terms with unknown coefficients (`LinearShader.draw`). Linear
least squares then gives the coefficients with which the drawing explains the frame best
(`LinearShader.paint`). What the target does not cover is guessed from the pixels around it.

Sums are formed in linear light, because a pixel that shows two surfaces mixes their light.
Differences are measured in grey levels, because the noise of a frame is about even there.
"""

import dataclasses

import cv2
import numpy as np

import xwing_utils as xu
from xwing.mesh import Mesh, draw_triangles, triangle_normals, visibility

SUPERSAMPLING = 2  # samples per pixel and direction
MIN_DETAIL = 0.25  # samples: a triangle that shows less from every side is not drawn
OCCLUSION = 0.9  # fraction of the light that other parts of the target keep away
FITTED_PIXELS = 4000  # that the colours of a learnt albedo are fitted to, about
VIEW_MARGIN = 6  # pixels of a view around the target
MIN_VIEW_SIZE = 8  # pixels: a view that is narrower or lower shows too little

# ============================================================ linear light


def to_light(grey: np.ndarray) -> np.ndarray:
    """Convert grey levels to linear light, 0 to 1, float32.

    Source: sRGB, IEC 61966-2-1, without its straight part near black.
    """
    return ((np.float32(grey) + np.float32(14)) / np.float32(269)) ** np.float32(2.4)


def to_grey(light: np.ndarray) -> np.ndarray:
    """Convert linear light (h, w, 3) float32 to grey levels; the inverse of `to_light`."""
    return cv2.pow(cv2.max(light, 0.0), 1 / 2.4) * np.float32(269) - np.float32(14)


def grey_slope(light: np.ndarray) -> np.ndarray:
    """Return d grey / d light (P,) at the brightness of colours (P, 3).

    Below grey level 40 the slope at grey level 40 is used, because dark pixels are mostly noise.
    """
    brightness = light @ np.full(3, 1 / 3, np.float32)
    brightness = np.maximum(brightness, np.float32(0.027))
    return np.float32(269 / 2.4) * brightness ** np.float32(1 / 2.4 - 1)


def mean_square(colours: np.ndarray) -> np.ndarray:
    """Return the mean square (P,) over the three channels of colours (P, 3)."""
    # np.mean is slow where it averages only three numbers.
    return np.einsum("pc,pc->p", colours, colours) / np.float32(3)


_LIGHT_OF_GREY = to_light(np.arange(256))


# ============================================================ the view of a frame


@dataclasses.dataclass(frozen=True)
class View:
    """The part of a frame around the target, shrunk."""

    image: np.ndarray  # (h, w, 3) float32 grey levels
    light: np.ndarray  # (h, w, 3) float32, the same in linear light
    K: np.ndarray  # (3, 3) camera matrix of this part
    blur: float  # pixels of the view, standard deviation of its Gaussian blur


def cut_view(
    image: np.ndarray,
    pixels: np.ndarray,
    K: np.ndarray,
    shrink: int,
    blur: float,
    extra_blur: float = 0.0,
) -> View | None:
    """Cut out the part of a frame around some pixels, and shrink it.

    Args:
        image: (H, W, 3) uint8.
        pixels: (P, 2) positions in the frame that the view should contain, with a margin.
        K: (3, 3) camera matrix of the frame.
        shrink: factor by which the view is smaller than the frame.
        blur: pixels of the frame, standard deviation of the Gaussian blur that it has.
        extra_blur: pixels of the view, standard deviation of a Gaussian filter to apply.

    Returns:
        View, or None where the part inside the frame would be narrower or lower than MIN_VIEW_SIZE.
    """
    size = np.array(image.shape[1::-1]) // shrink
    pixels = pixels / shrink
    low = np.floor(pixels.min(0) - VIEW_MARGIN).clip(0, size).astype(int)
    high = np.ceil(pixels.max(0) + VIEW_MARGIN).clip(0, size).astype(int)
    if (high - low < MIN_VIEW_SIZE).any():
        return None

    left, top = low * shrink
    right, bottom = high * shrink
    light = cv2.LUT(image[top:bottom, left:right], _LIGHT_OF_GREY)
    light = cv2.resize(light, (high - low).tolist(), interpolation=cv2.INTER_AREA)

    blur = blur / shrink
    if extra_blur:
        light = cv2.GaussianBlur(light, (0, 0), extra_blur)
        blur = float(np.hypot(blur, extra_blur))

    return View(to_grey(light), light, xu.crop_camera(K, left, top, 1 / shrink), blur)


# ============================================================ drawing and painting


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What each pixel shows of a mesh whose colours and light are not known yet; float32."""

    pose: np.ndarray  # (4, 4)
    shading_basis: np.ndarray  # (h, w, M + 8): factors of the M materials' colours and of the light
    coverage: np.ndarray  # (h, w) fraction of the pixel that the target covers
    depth: np.ndarray  # (h, w) model units, of the nearest surface; inf where there is none
    # (h, w, 3) factors of the shading, from the mesh's texture or learnt; None: they are 1.
    albedo: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Painting:
    """A drawing in the colours and in the light that explain a view best."""

    view: View
    drawing: Drawing
    picture: np.ndarray  # (h, w, 3) float32 grey levels
    spread: float  # grey levels, standard deviation of what the picture does not explain


class LinearShader:
    """Draws a mesh in linear light, as a sum whose coefficients are its colours and the light.

    Each surface shows the colour of its material under even light, plus light that varies smoothly
    with the direction of the surface. Where the mesh is drawn in its true paint, this second light
    is multiplied by the brightness of the material. Other parts of the target keep some of both
    away (ambient occlusion).

    Source: Ramamoorthi and Hanrahan, SIGGRAPH 2001 (nine spherical harmonics hold diffuse light).
    """

    HARMONICS = 8  # those of degree 1 and 2

    def __init__(self, mesh: Mesh):
        area, openness = visibility(mesh.triangles)
        shown = area.any(1)
        self.area = area[shown]  # (F, 2) square model units that show at most, of front and back
        self.triangles = np.float32(mesh.triangles[shown])  # (F, 3, 3)

        self.normals = triangle_normals(self.triangles)
        self.normals /= np.linalg.norm(self.normals, axis=1, keepdims=True)
        self.offsets = (self.normals * self.triangles[:, 0]).sum(1)  # of the planes from the origin

        self.tables = self._shading_tables(mesh, mesh.face_materials[shown], openness[shown])
        self.texture = None if mesh.textures is None else TextureAlbedo(mesh, shown)

        # A weak penalty (ridge regression) draws the coefficients of the light towards zero, and
        # those of the colours even more weakly.
        penalty = [0.1] * len(mesh.names) + [1.0] * self.HARMONICS
        self.regularisation = np.diag(np.float32(penalty)) * 255**2

    def _shading_tables(self, mesh, materials, openness):
        """What a sample adds to a drawing, in any paint and in the true paint: (2, 2 F + 1, M + 9).

        The rows are the fronts of the triangles, their backs, and one of zeros for a sample that
        shows no triangle. The columns are those of the shading basis, then one for the coverage.
        """
        materials = np.tile(materials, 2)
        colours = np.eye(len(mesh.names))[materials]
        brightness = to_light(255 * mesh.colours.mean(1))[materials, None]

        x, y, z = np.concatenate([self.normals, -self.normals]).T
        harmonics = np.column_stack([x, y, z, x * y, y * z, x * z, x * x - y * y, 3 * z * z - 1])

        any_paint = np.hstack([colours, harmonics])
        true_paint = np.hstack([colours, harmonics * brightness])
        tables = np.stack([any_paint, true_paint])
        tables *= 1 - OCCLUSION * (1 - openness.T.reshape(-1, 1))

        tables = np.pad(tables, ((0, 0), (0, 0), (0, 1)), constant_values=1)
        return np.float32(np.pad(tables, ((0, 0), (0, 1), (0, 0))))

    def draw(self, view: View, pose: np.ndarray, true_paint: bool = True) -> Drawing:
        """Draw the mesh at a pose (4, 4) as it would appear in a view.

        Args:
            view: `View`; its size, camera matrix and blur are used.
            pose: (4, 4) model -> OpenCV camera.
            true_paint: whether the mesh is painted as its materials say, or in any other way.

        Returns:
            Drawing.
        """
        height, width = view.image.shape[:2]
        rows, depth = self._rasterise(view.K, pose, width, height, SUPERSAMPLING)
        rows = [part.astype(np.int32).ravel() for part in _samples_of_pixels(rows)]
        depths = _samples_of_pixels(depth)
        depth = np.minimum.reduce(depths)

        # A pixel is the mean of its samples. Row -1 of a table is zero: it is for a sample that
        # shows no triangle.
        table = self.tables[int(true_paint)]
        covered = np.flatnonzero(np.max(rows, axis=0) >= 0)
        basis = np.zeros((height * width, table.shape[1]), np.float32)
        basis[covered] = sum(table[row[covered]] for row in rows) / np.float32(len(rows))

        basis = basis.reshape(height, width, -1)
        blur = max(view.blur, 0.01)
        basis = cv2.GaussianBlur(basis, (0, 0), blur)

        albedo = None
        if self.texture is not None:
            nearest = np.choose(np.argmin(depths, axis=0).ravel(), rows)  # the row of that sample
            triangles = np.where(nearest < 0, -1, nearest % len(self.triangles))
            albedo = self.texture.draw(triangles.reshape(height, width), depth, pose, view.K, blur)
        return Drawing(pose, basis[..., :-1], basis[..., -1].copy(), depth, albedo)

    def draw_depth(self, pose: np.ndarray, K: np.ndarray, width: int, height: int) -> np.ndarray:
        """Draw how far away the mesh is at the centre of each pixel.

        Args:
            pose: (4, 4) model -> OpenCV camera, with the whole mesh in front of the camera.
            K: (3, 3) camera matrix of the picture.
            width: of the picture, pixels.
            height: of the picture, pixels.

        Returns:
            (height, width) float32 model units, inf where nothing shows.
        """
        return self._rasterise(K, pose, width, height, 1)[1]

    def _rasterise(self, K, pose, width, height, samples):
        """The row of a shading table for each sample, -1 for none, and their depth.

        There are some samples for each pixel of a picture (height, width) and direction.
        """
        rotation = np.float32(pose[:3, :3])
        translation = np.float32(pose[:3, 3])
        camera = -rotation.T @ translation  # in model axes
        back = self.normals @ camera < self.offsets  # (F,) whether the camera sees the back

        samples_per_unit = samples * K[0, 0] / translation[2]
        area = np.where(back, self.area[:, 1], self.area[:, 0]) * samples_per_unit**2
        chosen = np.flatnonzero(area > MIN_DETAIL)

        corners = self.triangles[chosen].reshape(-1, 3) @ rotation.T + translation
        corners = corners.reshape(-1, 3, 3)
        rows = chosen + len(self.triangles) * back[chosen]
        K = xu.crop_camera(K, scale=samples)
        size = samples * width, samples * height
        picture, depth = draw_triangles(corners, rows[:, None], K, *size)
        return picture[..., 0], depth

    def paint(
        self, view: View, drawing: Drawing, noise: float, behind: np.ndarray | None = None
    ) -> Painting:
        """Solve for the colours and the light with which a drawing explains a view best.

        Args:
            view: `View` that the drawing was made for.
            drawing: `Drawing`.
            noise: grey levels, lower limit of the spread of what remains unexplained.
            behind: (h, w, 3) linear light of the background; None guesses it around the drawing.

        Returns:
            Painting.
        """
        if behind is None:
            behind = surroundings(view.light, drawing.coverage)
        picture = (1 - drawing.coverage[..., None]) * behind

        covered = np.flatnonzero(drawing.coverage > 0.01)
        basis = drawing.shading_basis.reshape(drawing.coverage.size, -1)[covered]
        light = (view.light - picture).reshape(-1, 3)[covered]
        grey_per_light = grey_slope(view.light.reshape(-1, 3)[covered])

        albedo = None
        if drawing.albedo is not None:
            albedo = drawing.albedo.reshape(-1, 3)[covered]

        painted, spread = self._fit_coefficients(basis, light, grey_per_light, noise, albedo)
        picture.reshape(-1, 3)[covered] += painted
        return Painting(view, drawing, to_grey(picture), spread)

    def _fit_coefficients(self, basis, light, grey_per_light, noise, albedo):
        """Fit light (P, 3) by a basis (P, M + 8) in iteratively reweighted least squares.

        The albedo (P, 3), or None, multiplies the basis in each channel. Returns the fitted light
        (P, 3) and the spread of the rest in grey levels.
        """
        if albedo is not None:
            return self._fit_few_pixels(basis, light, grey_per_light, noise, albedo)
        to_grey_squared = np.square(grey_per_light)  # squares of light become squares of grey
        weight = to_grey_squared

        for _ in range(3):
            painted = basis @ solve_coefficients(light, basis, weight, self.regularisation)
            weight, spread = _reweight(light - painted, to_grey_squared, noise)

        return painted, spread

    def _fit_few_pixels(self, basis, light, grey_per_light, noise, albedo):
        """As `_fit_coefficients`, from FITTED_PIXELS pixels: there are few coefficients."""
        step = max(1, round(len(light) / FITTED_PIXELS))
        some_basis, some_albedo, some_light = basis[::step], albedo[::step], light[::step]
        to_grey_squared = np.square(grey_per_light[::step])
        weight = to_grey_squared

        for _ in range(3):
            coefficients = solve_channels(
                some_light, some_basis, some_albedo, weight, self.regularisation
            )
            rest = some_light - some_basis @ coefficients * some_albedo
            weight, spread = _reweight(rest, to_grey_squared, noise)

        return basis @ coefficients * albedo, spread


def _reweight(residual, to_grey_squared, noise):
    """New weights (P,) of differences in light (P, 3), and their spread in grey levels."""
    squared = mean_square(residual) * to_grey_squared
    deviation = 1.4826 * float(np.sqrt(np.median(squared)))  # of a normal distribution
    spread = max(noise, deviation)
    return to_grey_squared / (1 + squared / np.float32(xu.CAUCHY * spread) ** 2), spread


def solve_channels(
    values: np.ndarray,
    basis: np.ndarray,
    albedo: np.ndarray,
    weight: np.ndarray,
    regularisation: np.ndarray,
) -> np.ndarray:
    """Solve for the coefficients of each channel, where an albedo multiplies the basis.

    Args:
        values: (P, 3), or (N, P, 3) for N sets of coefficients.
        basis: (P, M + 8).
        albedo: (P, 3).
        weight: (P,) of the pixels.
        regularisation: (M + 8, M + 8), draws the coefficients towards zero.

    Returns:
        (M + 8, 3), or (N, M + 8, 3).
    """
    columns = np.ascontiguousarray(basis.T)
    projected = (values * (albedo * weight[:, None])).swapaxes(-1, -2) @ basis  # (..., 3, M + 8)
    solved = []
    for channel in range(3):
        weighted = columns * (weight * np.square(albedo[:, channel]))
        rows = projected[..., channel, :]
        solved.append(np.linalg.solve(weighted @ basis + regularisation, rows.T).T)
    return np.stack(solved, axis=-1)


class TextureAlbedo:
    """The textures of a mesh, as factors of the colours of its materials in linear light.

    Each triangle has an affine map from its points to its texture. Each texture is a pyramid of
    ever smaller pictures, so that a pixel sees the mean of what it covers.

    Args:
        mesh: `Mesh` with textures.
        rows: (N,) which of its triangles are drawn.

    Source: Williams, Pyramidal Parametrics, SIGGRAPH 1983.
    """

    DARK_LIGHT = 0.01  # is added to both sides of a ratio, which is not defined for black
    MIN_COSINE = 0.05  # of the angle of incidence; a surface seen more steeply is at the rim

    def __init__(self, mesh: Mesh, rows: np.ndarray):
        triangles = mesh.triangles[rows]
        coordinates = mesh.texture_coordinates[rows]
        normals = triangle_normals(triangles)
        area = np.linalg.norm(normals, axis=1) / 2
        normals = normals / (2 * area[:, None])
        self.normals = np.float32(normals)
        self.corners = np.float32(triangles[:, 0])
        self.materials = mesh.face_materials[rows]

        # Edges and normal are a basis of space: its inverse gives the two coordinates on the plane.
        edges = triangles[:, 1:] - triangles[:, :1]
        basis = np.concatenate([edges, normals[:, None]], axis=1).swapaxes(1, 2)
        texture_edges = coordinates[:, 1:] - coordinates[:, :1]  # (N, 2 edges, 2)
        self.origins = np.float32(coordinates[:, 0])
        maps = texture_edges.swapaxes(1, 2) @ np.linalg.inv(basis)[:, :2]
        self.maps = np.float32(maps)  # (N, 2, 3)

        self.pyramids = {}
        self.tiled = {}
        self.density = {}  # texels for one model unit
        for row, picture in enumerate(mesh.textures):
            own = self.materials == row
            if picture is None or not own.any():
                continue
            self.pyramids[row] = self._pyramid(picture, mesh.colours[row])
            self.tiled[row] = coordinates[own].min() < -1e-3 or coordinates[own].max() > 1 + 1e-3
            u, v = texture_edges[own].swapaxes(0, 1)
            texture_area = np.abs(u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]).sum() / 2
            texels = texture_area * picture.shape[0] * picture.shape[1]
            self.density[row] = np.sqrt(texels / area[own].sum())

    def draw(
        self, triangles: np.ndarray, depth: np.ndarray, pose: np.ndarray, K: np.ndarray, blur: float
    ) -> np.ndarray:
        """Draw the albedo of a view.

        Args:
            triangles: (h, w) which of the triangles each pixel shows, -1 for none.
            depth: (h, w) model units, near the centre of the pixel.
            pose: (4, 4) model -> OpenCV camera.
            K: (3, 3) camera matrix of the view.
            blur: pixels, standard deviation of a Gaussian filter that is applied.

        Returns:
            (h, w, 3) float32; 1 where a material has no texture.
        """
        pixels = np.flatnonzero(triangles >= 0)
        shown = triangles.ravel()[pixels]
        points = self._points(pixels, shown, depth, pose, K)
        albedo = np.ones((*depth.shape, 3), np.float32)
        size = depth.ravel()[pixels] / K[0, 0]  # model units that a pixel spans
        albedo.reshape(-1, 3)[pixels] = self.at(shown, points, size)

        # What shows no triangle must not mix with what does.
        layers = np.dstack([albedo, np.ones(depth.shape, np.float32)])
        layers[triangles < 0] = 0
        layers = cv2.GaussianBlur(layers, (0, 0), blur).reshape(-1, 4)[pixels]
        albedo.reshape(-1, 3)[pixels] = layers[:, :3] / layers[:, 3:]
        return albedo

    def at(self, triangles: np.ndarray, points: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Look the albedo up at points of the surface.

        Args:
            triangles: (P,) which of the triangles each point lies on.
            points: (P, 3) model units.
            size: (P,) model units that a pixel spans there. Each material is looked up in the
                picture that suits the median.

        Returns:
            (P, 3) float32; 1 where a material has no texture.
        """
        from_corner = points - self.corners[triangles]
        places = np.einsum("pij,pj->pi", self.maps[triangles], from_corner)
        places += self.origins[triangles]
        albedo = np.ones((len(points), 3), np.float32)
        for row in self.pyramids:
            own = self.materials[triangles] == row
            if own.any():
                albedo[own] = self._look_up(row, places[own], np.median(size[own]))
        return albedo

    def _pyramid(self, picture, colour):
        """The ratios of a picture's light to that of a colour (3,), in ever smaller pictures."""
        dark = np.float32(self.DARK_LIGHT)
        ratio = (_LIGHT_OF_GREY[picture] + dark) / (to_light(255 * colour) + dark)
        levels = [ratio]
        while min(levels[-1].shape[:2]) >= 2:
            size = (levels[-1].shape[1] // 2, levels[-1].shape[0] // 2)
            levels.append(cv2.resize(levels[-1], size, interpolation=cv2.INTER_AREA))
        return levels

    def _points(self, pixels, shown, depth, pose, K):
        """The points (P, 3), model axes, where rays through pixels' centres meet their triangles.

        The nearest sample of a pixel lies beside its centre, so its depth gives a point beside the
        ray. It is used where the triangle is seen so steeply that the ray may miss it by far.
        """
        rotation = np.float32(pose[:3, :3])
        camera = np.float32(-pose[:3, :3].T @ pose[:3, 3])
        samples = np.column_stack(camera_points(pixels, depth, K)) @ rotation  # from the camera
        normals = self.normals[shown]
        towards = np.einsum("pj,pj->p", normals, samples)
        to_plane = np.einsum("pj,pj->p", normals, self.corners[shown] - camera)
        steep = np.abs(towards) < self.MIN_COSINE * np.linalg.norm(samples, axis=1)
        factor = np.where(steep, 1, to_plane / np.where(steep, 1, towards))
        return camera + samples * factor[:, None]

    def _look_up(self, row, places, pixel):
        """The ratios (P, 3) of a material at texture coordinates (P, 2); a pixel's model units."""
        levels = self.pyramids[row]
        texels = max(self.density[row] * pixel, 1)
        picture = levels[min(int(np.log2(texels)), len(levels) - 1)]
        border = cv2.BORDER_REPLICATE
        if self.tiled[row]:
            places = places - np.floor(places)
            border = cv2.BORDER_WRAP
        height, width = picture.shape[:2]
        positions = np.column_stack([places[:, 0] * width, (1 - places[:, 1]) * height])
        return sample_picture(picture, np.float32(positions), border).clip(0)


def solve_coefficients(
    values: np.ndarray, basis: np.ndarray, weight: np.ndarray, regularisation: np.ndarray
) -> np.ndarray:
    """Solve for the coefficients with which a shading basis explains some values best.

    Args:
        values: (P, N), for N sets of coefficients.
        basis: (P, M + 8).
        weight: (P,) of the pixels.
        regularisation: (M + 8, M + 8), draws the coefficients towards zero.

    Returns:
        (M + 8, N).
    """
    weighted = basis.T * weight
    return np.linalg.solve(weighted @ basis + regularisation, weighted @ values)


def camera_points(
    pixels: np.ndarray, depth: np.ndarray, K: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the points x, y, z (P,) in camera axes that flat pixels (P,) of a depth (h, w) show.

    K (3, 3) is the camera matrix of the picture.
    """
    row, column = np.float32(np.divmod(pixels, depth.shape[1]))
    z = depth.ravel()[pixels]
    fx, fy, cx, cy = np.float32(K[[0, 1, 0, 1], [0, 1, 2, 2]])
    x = (column + np.float32(0.5) - cx) * z / fx
    y = (row + np.float32(0.5) - cy) * z / fy
    return x, y, z


def _samples_of_pixels(picture):
    """SUPERSAMPLING^2 pictures (h, w), each of one sample of every pixel."""
    steps = range(SUPERSAMPLING)
    return [picture[i::SUPERSAMPLING, j::SUPERSAMPLING] for i in steps for j in steps]


def sample_picture(
    picture: np.ndarray, positions: np.ndarray, border: int = cv2.BORDER_REPLICATE
) -> np.ndarray:
    """Return the colours (P, 3) of a picture between its pixels (bicubic).

    Args:
        picture: (h, w, 3) float32.
        positions: (P, 2) float32 pixels.
        border: what counts beyond the edge, in OpenCV's numbers; by default the nearest pixel.
    """
    # In OpenCV the centre of a pixel has whole coordinates. A map of positions must be narrower
    # than 32,768, so the points are looked up in rows of 1,024.
    rows = int(np.ceil(len(positions) / 1024))
    centres = np.resize(positions - np.float32(0.5), (rows, 1024, 2))
    found = cv2.remap(picture, centres, None, cv2.INTER_CUBIC, borderMode=border)
    return found.reshape(-1, 3)[: len(positions)]


def near_target(coverage: np.ndarray) -> np.ndarray:
    """Return a mask (h, w) of the pixels that show the target or touch one that does.

    Args:
        coverage: (h, w) float32, fraction of each pixel that the target covers.
    """
    return cv2.dilate(coverage, np.ones((3, 3))) > 0.02


# ============================================================ the background


def surroundings(light: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    """Guess the picture without the target, from the pixels around it.

    Args:
        light: (h, w, 3) float32, linear light.
        coverage: (h, w) float32, fraction of each pixel that the target covers.

    Returns:
        (h, w, 3) float32, linear light.
    """
    free = np.float32(cv2.dilate(coverage, np.ones((5, 5))) < 0.01)
    return fill_gaps(light, free)


def fill_gaps(picture: np.ndarray, known: np.ndarray, unknown: float = 0.0) -> np.ndarray:
    """Guess each pixel of a picture from those around it that are known.

    Args:
        picture: (h, w, 3) float32.
        known: (h, w) float32, 1 where a pixel is known, 0 where it is not.
        unknown: the value far from all known pixels.

    Returns:
        (h, w, 3) float32; known pixels are blurred too.
    """
    known = known[..., None]
    layers = np.concatenate([picture * known, known], axis=2)
    total = np.float32([unknown, unknown, unknown, 1]) * np.float32(1e-12)

    # The weights fall so steeply that distant pixels count only where there are no nearer ones.
    for reach in (3, 12, 48):
        size = 2 * reach + 1, 2 * reach + 1
        mean = cv2.blur(layers, size, borderType=cv2.BORDER_REFLECT)
        total = total + mean * np.float32(reach**-6.0)

    return total[..., :3] / total[..., 3:]


def smooth_sky(image: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Fit a smooth sky to some pixels: a polynomial that is quadratic in x and in y.

    Args:
        image: (h, w, 3) float32 grey levels.
        pixels: (P,) indices of pixels in the flattened image.

    Returns:
        (P, 3) grey levels of the sky at these pixels.
    """
    row, column = np.float32(np.divmod(pixels, image.shape[1])) / max(image.shape[:2])
    x = column - 0.5
    y = row - 0.5
    powers_of_x = np.stack([x**0, x, x * x])
    powers_of_y = np.stack([y**0, y, y * y])
    basis = np.einsum("ip,jp->ijp", powers_of_x, powers_of_y).reshape(9, -1)

    grey = image.reshape(-1, 3)[pixels]
    coefficients = np.linalg.lstsq(basis @ basis.T, basis @ grey, rcond=1e-6)[0]
    return basis.T @ coefficients
