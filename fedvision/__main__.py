"""``python -m fedvision``, and the ``fedvision`` command."""

import sys
from importlib import import_module
from pathlib import Path


def main() -> None:
    """Run the command line of this project's own ``benchmarks`` package.

    Another distribution (opacus 1.6) installs a top-level package of that name too; the one beside this
    package comes first. The current folder comes last, so that experiments may name a user's own modules.
    """
    home = str(Path(__file__).resolve().parent.parent)
    if sys.path[0] != home:
        sys.path.insert(0, home)
    sys.path.append(str(Path.cwd()))
    import_module("benchmarks.cli").main()


if __name__ == "__main__":
    main()
