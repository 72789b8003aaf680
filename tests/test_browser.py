"""`make browser`: notebooks run in JupyterLab in a real browser, and nothing in them is broken.

Skipped without the package playwright or Debian's Chromium. The server shows a copy of the tracked
files, so that no run changes them. Screenshots of each notebook go to a temporary folder."""

import json
import os
import re
import secrets
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import numpy as np
import pytest

import xwing_utils as xu
from xwing import picking, starts
from xwing.mesh import load_mesh

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is missing")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells are in the page at once
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
LIMIT = 600_000  # ms that a notebook may take
ERRORS = ", ".join(
    f"[data-mime-type='application/vnd.jupyter.{kind}']" for kind in ("error", "stderr")
)
# TensorFlow's start-up log is no error.
FAULTS = """errors => [...document.querySelectorAll(errors)].map(output => output.innerText)
    .filter(text => !text.includes('absl::InitializeLog()'))"""
FINISHED = f"""errors => ({FAULTS})(errors).length ||
    [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]
        .every(p => /[0-9]/.test(p.innerText))"""
LOADED = """() => [...document.querySelectorAll('.jp-Notebook img')].every(i => i.complete) &&
    [...document.querySelectorAll('.jp-Notebook video')].every(v => v.error || v.readyState > 0)"""
BROKEN = """() => [...document.querySelectorAll('.jp-Notebook img, .jp-Notebook video')]
    .filter(p => !(p.naturalWidth || p.videoWidth)).map(p => p.src.slice(0, 80))"""


@pytest.fixture(scope="module")
def copy(root, tmp_path_factory):
    """A folder with the tracked files; its notebooks have no outputs."""
    folder = tmp_path_factory.mktemp("lab") / "xwing"
    folder.mkdir()
    subprocess.run(
        f"git ls-files -z | xargs -0 cp --parents -t '{folder}'", shell=True, cwd=root, check=True
    )
    clear = [sys.executable, "-m", "jupyter", "nbconvert", "--clear-output", "--inplace"]
    subprocess.run([*clear, *folder.glob("notebooks/*.ipynb")], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def address(copy):
    """The address of JupyterLab, started in the copy as `make lab` does, and its token."""
    for name, values in SETTINGS.items():
        path = copy.parent / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    command = re.search(r"/jupyter (lab .*)", (copy / "Makefile").read_text())[1].split()
    command += ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0"]
    token = secrets.token_hex()
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "XWING_SMOKE": "1",
        "XWING_CHOICE": "0",  # own.ipynb starts from pins
        "JUPYTER_TOKEN": token,
        "JUPYTER_CONFIG_DIR": str(copy.parent),
        "JUPYTER_RUNTIME_DIR": str(copy.parent),
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyter", *command],
        cwd=copy,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in server.stderr)
    address = next(match[0] for match in found if match)
    threading.Thread(target=server.stderr.read, daemon=True).start()
    yield address, token
    server.terminate()
    server.wait()


@pytest.fixture
def page():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=QUIET)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def run_all(page, address, name, folder):
    """Run all cells of a notebook and photograph them; return errors and pictures not shown."""
    page.goto(f"{address[0]}/lab/tree/{name}?token={address[1]}&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_selector("text=/Python 3 .*Idle/")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(FINISHED, arg=ERRORS, timeout=LIMIT)
    page.wait_for_function(LOADED)
    for i, cell in enumerate(page.locator(".jp-Notebook .jp-Cell").all()):
        cell.evaluate("cell => cell.scrollIntoView()")
        page.screenshot(path=folder / f"{i:02}.png")
    return page.evaluate(FAULTS, ERRORS), page.evaluate(BROKEN)


def test_reference_runs(page, address, tmp_path):
    assert run_all(page, address, "notebooks/reference.ipynb", tmp_path) == ([], [])


def test_pnp_runs_and_its_viewer_moves_and_plays(page, address, tmp_path):
    assert run_all(page, address, "notebooks/pnp.ipynb", tmp_path) == ([], [])
    assert page.locator(".jp-OutputArea video").count() == 1
    changed = "before => document.querySelector('img.widget-image').src != before"
    picture, readout = (
        page.locator("img.widget-image"),
        page.locator(".widget-slider .widget-readout"),
    )
    page.locator(".widget-slider .noUi-handle").press("Home")
    playwright.expect(readout).to_have_text("0")
    first = picture.get_attribute("src")
    page.locator(".widget-slider .noUi-handle").press("ArrowRight")
    page.wait_for_function(changed, arg=first)
    last, frame = picture.get_attribute("src"), readout.inner_text()
    page.locator(".widget-play button").first.click()
    page.wait_for_function(changed, arg=last)
    playwright.expect(readout).not_to_have_text(frame)
    page.screenshot(path=tmp_path / "played.png")
    assert page.evaluate(BROKEN) == []


def press(page, picture, image, pixels):
    """Press the mouse on a picture of an image (H, W, 3), move it along pixels and release it."""
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    scale = box["width"] / image.shape[1]
    for i, (x, y) in enumerate(pixels):
        page.mouse.move(box["x"] + scale * x, box["y"] + scale * y, steps=4)
        if i == 0:
            page.mouse.down()
    page.mouse.up()


def clicked_points(root):
    """Of the example of own.ipynb: the target's views, six points that show, and their pixels."""
    objects = root / "data" / "objects"
    record = xu.read_json(objects / "carton.json")
    target = xu.load_target(objects / "carton.obj")
    points = starts.points_shown(target)
    views = picking.numbered_views(load_mesh(target.mesh), points, target.up)
    chosen = [0, 1, 6, 7, 14, 18]
    pixels = xu.project_pose(points[chosen], np.array(record["poses"][0]), np.array(record["K"]))
    return views, dict(zip(chosen, pixels))


def test_own_runs_with_a_dragged_box_and_clicked_pins(page, address, root, tmp_path):
    assert run_all(page, address, "notebooks/own.ipynb", tmp_path) == ([], [])
    pictures = page.locator("img.widget-image")
    frame = np.zeros((480, 640, 3))
    press(page, pictures.nth(0), frame, [(190, 170), (300, 300), (415, 325)])
    dragged = re.compile(r"BOX = \((189|190), (169|170), 41[456], 32[456]\)")
    playwright.expect(page.locator(".widget-label", has_text="BOX = ")).to_have_text(dragged)
    page.screenshot(path=tmp_path / "box.png")

    views, pins = clicked_points(root)
    for number, pixel in pins.items():
        side = next(i for i, view in enumerate(views) if np.isfinite(view.pixels[number]).all())
        view = views[side]
        press(page, pictures.nth(1 + side), view.picture, [view.pixels[number]])
        playwright.expect(page.locator(".widget-text input").first).to_have_value(str(number))
        press(page, pictures.nth(7), frame, [pixel])
        page.wait_for_timeout(300)
    page.screenshot(path=tmp_path / "pins.png")
    text = page.locator(".widget-label", has_text="PINS = ").inner_text()
    found = np.reshape([float(number) for number in re.findall(r"[\d.]+", text)], (6, 3))
    assert sorted(found[:, 0]) == sorted(pins)
    assert all(np.allclose(row[1:], pins[int(row[0])], atol=1.5) for row in found)

    page.locator(".jp-CodeCell", has_text="starts.solve_pins").locator(".jp-InputArea").click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run Selected Cell and All Below", exact=True).click()
    page.wait_for_function(FINISHED, arg=ERRORS, timeout=LIMIT)
    assert page.evaluate(FAULTS, ERRORS) == []
    result = page.locator(".jp-CodeCell", has_text="no frame is off by five degrees")
    playwright.expect(result).to_contain_text("no frame is off by five degrees: True")
    page.screenshot(path=tmp_path / "own.png")


def test_an_error_and_a_broken_picture_are_found(page, address, copy, tmp_path):
    cells = [nbformat.v4.new_code_cell("1 / 0"), nbformat.v4.new_markdown_cell("![](none.gif)")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), copy / "faulty.ipynb")
    errors, broken = run_all(page, address, "faulty.ipynb", tmp_path)
    assert "ZeroDivisionError" in errors[0] and "none.gif" in broken[0]
