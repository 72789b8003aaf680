"""Execute notebooks without a browser: `python tests/run_notebook.py --inplace NOTEBOOK ...`.

The terminal shows the notebook's headings, what its cells print, and their progress bars. Every
cell has a time limit. If a cell takes longer or fails, or the kernel does not start, the last line
names the notebook and the cell, and the exit status is 1. (`jupyter nbconvert` does none of this.)
"""

import argparse
import atexit
import html
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError

KERNEL_SECONDS = 120  # in which a kernel must have started
STARTUP_LOG = "absl::InitializeLog()"  # in what TensorFlow prints before it can be silenced
QUIET = ["--IPKernelApp.log_level=ERROR"]  # no warnings about how the kernel is connected
TQDM_PARTS = ["HTMLModel", "FloatProgressModel", "HTMLModel"]  # of one of its progress bars
BAR_WIDTH = 20  # characters


class Client(NotebookClient):
    """Executes a notebook, and shows in the terminal what it prints and how far it is."""

    heading = ""  # of a section that has not begun
    bar = ""  # the progress bar in the terminal's last line, if there is one

    def show_heading(self, cell, cell_index):
        """Print the heading of a section when its first cell begins."""
        first_line = cell.source.partition("\n")[0]
        if cell.cell_type == "markdown" and first_line.startswith("#"):
            self.heading = f"{first_line.strip('# ')}\n"
        elif cell.cell_type == "code":
            self._print(self.heading)
            self.heading = ""

    def process_message(self, msg, cell, cell_index):
        """Store a message of the kernel as usual, and show it in the terminal."""
        output = super().process_message(msg, cell, cell_index)
        content = msg["content"]
        if msg["msg_type"] == "stream" and STARTUP_LOG not in content["text"]:
            self._print("".join(f"  {line}" for line in content["text"].splitlines(True)))
        if msg["msg_type"] == "comm_msg":
            child = f"IPY_MODEL_{content['comm_id']}"
            for name, state in self.widget_state.items():
                if child in state.get("children", ()):
                    self._show_bar(progress_bar(self.widget_state, name))
        return output

    def _print(self, text):
        """Print a text below the progress bar, if there is one."""
        if not text:
            return
        print("\n" * bool(self.bar) + text, end="", flush=True)
        self.bar = ""

    def _show_bar(self, bar):
        """Replace the terminal's progress bar. Where there is no terminal, only the last counts."""
        text, ended = bar
        if text and (ended or sys.stdout.isatty()) and text != self.bar:
            erase = "\r\x1b[K" if self.bar else ""
            print(f"{erase}  {text}", end="\n" * ended, flush=True)
            self.bar = "" if ended else text


def progress_bar(widgets: dict, name: str) -> tuple[str, bool]:
    """Draw a progress bar of tqdm as text.

    Args:
        widgets: the states of all widgets, by name.
        name: of the widget that holds the bar.

    Returns:
        the text, "" where the widget is something else; and whether the bar has ended.
    """
    names = [child.removeprefix("IPY_MODEL_") for child in widgets[name].get("children", ())]
    parts = [widgets.get(child, {}) for child in names]
    if [part.get("_model_name") for part in parts] != TQDM_PARTS:
        return "", False
    left, bar, right = parts
    filled = round(BAR_WIDTH * bar["value"] / (bar["max"] or 1))
    blocks = "█" * filled + " " * (BAR_WIDTH - filled)
    text = html.unescape(f"{left['value']}|{blocks}|{right['value']}").replace("\u2007", " ")
    return text, bar["bar_style"] in ("success", "danger")


def run_notebook(path: Path, target: Path | str, limit: int) -> str:
    """Execute one notebook in its own folder and write it to another file, or the same.

    Args:
        path: of the notebook.
        target: path of the executed notebook, which is written only if all cells ran. A text is
            the name of a variable of the notebook, which holds the folder for it.
        limit: seconds that one cell may take.

    Returns:
        "", or one line that says what went wrong.
    """
    notebook = nbformat.read(path, as_version=4)
    if isinstance(target, str):
        notebook.cells.append(nbformat.v4.new_code_cell(f"print({target})"))
    client = Client(
        notebook,
        timeout=limit,
        startup_timeout=KERNEL_SECONDS,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=QUIET,
    )
    client.on_cell_start = client.show_heading
    # Figures belong into the notebook, whatever another program shall do with them.
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        try:
            client.execute(env=environment, stderr=log)
        except Exception as error:
            log.seek(0)
            print(log.read(), end="", file=sys.stderr)
            return f"{path}: {_fault(client, notebook, error, limit)}"

    if isinstance(target, str):
        target = Path(notebook.cells.pop().outputs[0].text.strip(), path.name)
    _drop_startup_log(notebook)
    _store_last_bars(notebook, client.widget_state)
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)
    return ""


def _store_last_bars(notebook, widgets):
    """Let the text of each progress bar say how it ended; tqdm stores how it began."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            view = data.get("application/vnd.jupyter.widget-view+json", {})
            text, _ = progress_bar(widgets, view["model_id"]) if view else ("", False)
            if text:
                data["text/plain"] = text


def _drop_startup_log(notebook):
    """Remove what TensorFlow prints when it starts: it says nothing of the notebook."""
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        cell_text = [output.get("text", "") for output in outputs]
        if any(STARTUP_LOG in text for text in cell_text):
            cell.outputs = [o for o, text in zip(outputs, cell_text) if STARTUP_LOG not in text]


def _fault(client, notebook, error, limit):
    """What ended the execution of a notebook, in one line."""
    number = client.code_cells_executed
    if number == 0:
        # At exit the client would only complain that there is no kernel.
        atexit.unregister(client._cleanup_kernel)
        return f"the kernel did not start: {error}"

    if isinstance(error, CellTimeoutError):
        fault = (
            f"took longer than {limit} s and was ended (--limit SECONDS, make ... LIMIT=SECONDS)"
        )
    else:
        print(error, file=sys.stderr)
        fault = "failed, see above"

    code = [cell.source.strip() for cell in notebook.cells if cell.cell_type == "code"]
    code = [source for source in code if source]  # empty cells are not executed
    first_line = code[number - 1].splitlines()[0]
    return f"cell [{number}] {fault}; its first line: {first_line}"


def main():
    parser = argparse.ArgumentParser(description="Execute notebooks without a browser.")
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--limit", type=int, default=1800, help="seconds that one cell may take")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--inplace", action="store_true", help="write the outputs into the notebooks"
    )
    where.add_argument(
        "--output-dir", type=Path, help="write the executed notebooks into this folder"
    )
    where.add_argument(
        "--keep-in", metavar="NAME", help="into the folder that this variable of theirs holds"
    )
    options = parser.parse_args()

    sys.stdout.reconfigure(errors="replace")  # not every terminal has all characters
    for path in options.notebooks:
        print(f"running {path}", flush=True)
        target = path if options.inplace else options.keep_in
        if options.output_dir:
            target = options.output_dir / path.name
        fault = run_notebook(path, target, options.limit)
        if fault:
            sys.exit(fault)


if __name__ == "__main__":
    main()
