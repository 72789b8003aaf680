"""What a person picks in a notebook: a box around the target, and pins on its points.

A box is dragged over a frame. For pins, the mesh is drawn from six sides with numbered points; the
user chooses a number, by a click on it or from a list, and clicks where the point shows in the
frame. Each picker says what to type into the notebook's settings to get the same again.
"""

import dataclasses

import cv2
import ipyevents
import ipywidgets
import numpy as np

import xwing_utils as xu
from xwing.mesh import Mesh
from xwing.overlay import draw_mesh, encode_jpeg

YELLOW = (255, 220, 60)
BLACK = (0, 0, 0)

SIDES = ("+x", "+y", "+z", "-x", "-y", "-z")
TILT = np.array([1.0, 0.45, 0.3])  # a view along an axis is turned a little, to show three sides
DISTANCE = 4.0  # diameters from the camera to the target in these views
FILLED = 0.85  # fraction of a view that the target spans
BACKGROUND = 235  # grey level
HIDDEN = 0.02  # diameters by which a point lies behind what is seen, where it is hidden
MOVE_INTERVAL = 50  # milliseconds between two positions of a moving mouse
REACH = 25.0  # pixels of a view within which a click picks a number
MIN_SIDE = 4.0  # pixels of the frame: a smaller box is a click


# ============================================================ the mesh from six sides


@dataclasses.dataclass(frozen=True, eq=False)
class NumberedView:
    """A drawing of a mesh with numbered points."""

    title: str  # from which side it is seen
    picture: np.ndarray  # (S, S, 3) uint8
    pixels: np.ndarray  # (P, 2) of all points; NaN where a point is hidden

    def nearest(self, x: float, y: float) -> int | None:
        """Return the number of the visible point at a pixel, or None where there is none."""
        distance = np.linalg.norm(self.pixels - [x, y], axis=1)
        distance[np.isnan(distance)] = np.inf
        return int(distance.argmin()) if distance.min() < REACH else None


def numbered_views(
    mesh: Mesh, points: np.ndarray, up: np.ndarray = (0, 0, 1), size: int = 420
) -> list[NumberedView]:
    """Draw a mesh from six sides, with its numbered points.

    Args:
        mesh: `Mesh` of the target; a texture is drawn, too.
        points: (P, 3) of its surface; the number of a point is its row.
        up: (3,) direction that points up in the pictures.
        size: pixels, width and height of each picture.

    Returns:
        Six `NumberedView`.
    """
    views = []
    for axis, title in enumerate(SIDES):
        direction = np.roll(TILT, axis % 3) * (1 if axis < 3 else -1)
        pose, K = _camera(mesh, direction, np.asarray(up, float), size)
        picture, depth = draw_mesh(mesh, pose, K, size, size)
        picture[~np.isfinite(depth)] = BACKGROUND
        pixels = _visible_pixels(points, pose, K, depth, HIDDEN * mesh.diameter)
        views.append(NumberedView(f"from {title}", _numbered(picture, pixels), pixels))
    return views


def _camera(mesh, direction, up, size):
    """The pose (4, 4) of a mesh seen from a direction, and K (3, 3) of a square picture of it."""
    z = -direction / np.linalg.norm(direction)
    if np.linalg.norm(np.cross(z, up)) < 0.2 * np.linalg.norm(up):
        up = np.roll(up, 1)
    x = np.cross(z, up)
    x /= np.linalg.norm(x)
    pose = np.eye(4)
    pose[:3, :3] = [x, np.cross(z, x), z]
    corners = mesh.triangles.reshape(-1, 3)
    centre = (corners.min(0) + corners.max(0)) / 2
    pose[:3, 3] = [0, 0, DISTANCE * mesh.diameter] - pose[:3, :3] @ centre
    reach = np.abs(xu.project_pose(corners, pose, np.eye(3))).max()
    focal = FILLED * size / 2 / reach
    return pose, np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])


def _visible_pixels(points, pose, K, depth, tolerance):
    """Where points show (P, 2); NaN where something is in front of them."""
    pixels = xu.project_pose(points, pose, K)
    nearest = cv2.erode(depth, np.ones((3, 3)))
    column, row = pixels.astype(int).clip(0, len(depth) - 1).T
    away = points @ pose[2, :3] + pose[2, 3]
    shows = away < cv2.dilate(nearest, np.ones((3, 3)))[row, column] + tolerance
    return np.where(shows[:, None], pixels, np.nan)


def _numbered(picture, pixels):
    """A copy of a picture with a dot and a number at each pixel that is not NaN."""
    picture = picture.copy()
    for number in np.flatnonzero(np.isfinite(pixels).all(1)):
        _draw_pin(picture, pixels[number], number)
    return picture


def _draw_pin(picture, pixel, number):
    """Draw a dot and its number into a picture, in place."""
    place = xu.cv_point(pixel)
    cv2.circle(picture, place, 4 << xu.CV_SHIFT, BLACK, -1, cv2.LINE_AA, xu.CV_SHIFT)
    cv2.circle(picture, place, 3 << xu.CV_SHIFT, YELLOW, -1, cv2.LINE_AA, xu.CV_SHIFT)
    beside = int(pixel[0]) + 6, int(pixel[1]) - 5
    for colour, thickness in ((BLACK, 3), (YELLOW, 1)):
        font = cv2.FONT_HERSHEY_SIMPLEX
        cv2.putText(picture, str(number), beside, font, 0.6, colour, thickness, cv2.LINE_AA)


# ============================================================ pickers


class BoxPicker(ipywidgets.VBox):
    """A frame on which the user drags a box around the target.

    Args:
        image: (H, W, 3) uint8.
        box: (x0, y0, x1, y1) pixels that shows first.
        width: pixels, at most, of the picture in the notebook.

    Attributes:
        box: (x0, y0, x1, y1) pixels of the frame, as it was dragged last.
    """

    def __init__(self, image: np.ndarray, box: tuple, width: int = 900):
        self.box = tuple(box)
        self._frame = image
        self._corner = None  # where the mouse was pressed
        self._picture = ipywidgets.Image(format="jpeg", layout=_layout(image, width))
        self._text = ipywidgets.Label()
        self._events = [
            _listen(self._picture, image, ["mousedown", "mouseup"], self._press),
            _listen(self._picture, image, ["mousemove"], self._move, MOVE_INTERVAL),
        ]
        super().__init__([self._picture, self._text])
        self._show()

    def _press(self, event, x, y):
        if event["type"] == "mousedown":
            self._corner = x, y
        else:
            self._drag_to(x, y)
            self._corner = None

    def _move(self, event, x, y):
        if not event["buttons"]:  # it was released outside the picture
            self._corner = None
        self._drag_to(x, y)

    def _drag_to(self, x, y):
        if self._corner is None:
            return
        low = np.minimum(self._corner, (x, y))
        high = np.maximum(self._corner, (x, y))
        if (high - low).min() >= MIN_SIDE:
            self.box = tuple(round(float(value)) for value in (*low, *high))
            self._show()

    def _show(self):
        picture = self._frame.copy()
        x0, y0, x1, y1 = (round(value) for value in self.box)
        for colour, thickness in ((BLACK, 4), (YELLOW, 2)):
            cv2.rectangle(picture, (x0, y0), (x1, y1), colour, thickness)
        self._picture.value = encode_jpeg(picture)
        self._text.value = f"BOX = {self.box}"


class PinPicker(ipywidgets.VBox):
    """A frame and numbered views of the mesh, with which the user puts pins on the target.

    A click on a number in a view chooses it, and a click in the frame puts its pin there.

    Args:
        image: (H, W, 3) uint8.
        views: of `numbered_views`.
        pins: {number of a point: (x, y)} that show first.
        width: pixels, at most, of the frame in the notebook.

    Attributes:
        pins: {number of a point: (x, y) in pixels of the frame}.
    """

    def __init__(self, image: np.ndarray, views: list, pins: dict | None = None, width: int = 900):
        self.pins = dict(pins or {})
        self._frame = image
        self._picture = ipywidgets.Image(format="jpeg", layout=_layout(image, width))
        self._number = ipywidgets.BoundedIntText(
            min=0, max=len(views[0].pixels) - 1, description="point"
        )
        remove = ipywidgets.Button(description="remove its pin")
        remove.on_click(self._remove)
        self._text = ipywidgets.Label()
        self._events = [_listen(self._picture, image, ["click"], self._put)]

        sides = []
        for view in views:
            side = ipywidgets.Image(value=encode_jpeg(view.picture), format="jpeg")
            side.layout = _layout(view.picture, width // 3 - 8)
            self._events.append(_listen(side, view.picture, ["click"], self._chooser(view)))
            sides.append(side)
        grid = ipywidgets.HBox(sides, layout={"flex_flow": "row wrap", "width": f"{width}px"})
        super().__init__([grid, ipywidgets.HBox([self._number, remove]), self._picture, self._text])
        self._show()

    def _chooser(self, view):
        """What happens at a click on a view: the number there is chosen."""

        def choose(event, x, y):
            number = view.nearest(x, y)
            if number is not None:
                self._number.value = number

        return choose

    def _put(self, event, x, y):
        self.pins[self._number.value] = (round(float(x), 1), round(float(y), 1))
        self._show()

    def _remove(self, button):
        self.pins.pop(self._number.value, None)
        self._show()

    def _show(self):
        picture = self._frame.copy()
        for number, pixel in self.pins.items():
            _draw_pin(picture, pixel, number)
        self._picture.value = encode_jpeg(picture)
        self._text.value = f"PINS = {self.pins}"


def _layout(image, width):
    """The layout of a picture that is shown at most `width` pixels wide."""
    return {"width": f"{min(width, image.shape[1])}px", "flex": "0 0 auto"}


def _listen(widget, image, events, handler, interval=0):
    """Call handler(event, x, y) for events of the mouse on a picture; x and y are its pixels."""

    def handle(event):
        x = event["relativeX"] / event["boundingRectWidth"] * image.shape[1]
        y = event["relativeY"] / event["boundingRectHeight"] * image.shape[0]
        handler(event, x, y)

    listener = ipyevents.Event(source=widget, watched_events=events, prevent_default_action=True)
    if interval:
        listener.wait = interval
    listener.on_dom_event(handle)
    return listener
