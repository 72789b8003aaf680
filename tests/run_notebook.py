"""Execute notebooks without a browser: `python tests/run_notebook.py --inplace NOTEBOOK ...`.

Every cell has a time limit. If a cell takes longer or fails, or the kernel does not start, the last
line names the notebook and the cell, and the exit status is 1. (`jupyter nbconvert` does not name
the cell.)
"""

import argparse
import atexit
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError

KERNEL_SECONDS = 120  # in which a kernel must have started
STARTUP_LOG = "absl::InitializeLog()"  # in what TensorFlow prints before it can be silenced


def run_notebook(path: Path, target: Path, limit: int) -> str:
    """Execute one notebook in its own folder and write it to another file, or the same.

    Args:
        path: of the notebook.
        target: path of the executed notebook, which is written only if all cells ran.
        limit: seconds that one cell may take.
    Returns:
        "", or one line that says what went wrong.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=limit,
        startup_timeout=KERNEL_SECONDS,
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        client.execute()
    except Exception as error:
        return f"{path}: {_fault(client, notebook, error, limit)}"

    _drop_startup_log(notebook)
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)
    return ""


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--limit", type=int, default=1800, help="seconds that one cell may take")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--inplace", action="store_true", help="write the outputs into the notebooks"
    )
    where.add_argument(
        "--output-dir", type=Path, help="write the executed notebooks into this folder"
    )
    options = parser.parse_args()

    for path in options.notebooks:
        print(f"running {path}", flush=True)
        target = path if options.inplace else options.output_dir / path.name
        fault = run_notebook(path, target, options.limit)
        if fault:
            sys.exit(fault)


if __name__ == "__main__":
    main()
