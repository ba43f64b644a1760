"""Executes the notebooks, and keeps their outputs with --write.

    python tools/notebooks.py [--write] [NAME ...]

A notebook whose cell raises is an error, and so is one that takes longer than `SECONDS`. Those that
load the demo need `runs/demo`, or the folder that EMU_JAX_DEMO names.
"""

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SECONDS = 300
# Metadata of a cell that differs from run to run.
VOLATILE = ("execution",)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 2_convert (default: all)")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the files")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit for each notebook")
    args = parser.parse_args()
    paths = sorted(
        path
        for path in NOTEBOOKS.glob("*.ipynb")
        if not args.names or any(path.stem.startswith(name) for name in args.names)
    )
    if not paths:
        parser.error(f"no notebook is called {', '.join(args.names)}")
    failed = 0
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(
            notebook,
            timeout=args.seconds,
            kernel_name="python3",
            resources={"metadata": {"path": str(NOTEBOOKS)}},
        )
        start = time.monotonic()
        try:
            client.execute()
            problem = ""
        except (CellExecutionError, CellTimeoutError) as error:
            problem = str(error)
        seconds = time.monotonic() - start
        if not problem and seconds > args.seconds:
            problem = f"took longer than {args.seconds:.0f} s"
        failed += bool(problem)
        print(f"{path.name}: {seconds:.0f} s {problem or 'ok'}", flush=True)
        if args.write and not problem:
            for cell in notebook.cells:
                for key in VOLATILE:
                    cell.metadata.pop(key, None)
                if cell.cell_type == "code":
                    cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            nbformat.write(notebook, path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
