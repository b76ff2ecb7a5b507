"""Run the notebooks of this folder and keep their outputs, without what changes from one machine or run to the next.

    python notebooks/execute.py [NOTEBOOK ...]     default: all of them

A notebook that raises, or prints to stderr, is an error and is left as it was. `pytest --nbmake notebooks` runs them
and changes nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository's folder, where `experiments` is

from experiments.files import write_atomically

FOLDER = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False).execute(cwd=str(path.parent))
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = nbformat.from_dict({})
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise ValueError(f"{path.name}, cell {number} printed to stderr:\n{output.text}")
            output.pop("transient", None)
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
    nbformat.validate(notebook)
    write_atomically(path, nbformat.writes(notebook).removesuffix("\n") + "\n")


def main(names: list[str]) -> None:
    for path in [Path(name) for name in names] or sorted(FOLDER.glob("*.ipynb")):
        execute(path)
        print(f"executed {path.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
