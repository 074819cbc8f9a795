"""Third-party packages that only the discovery of objects needs: an optional extra."""

import importlib
from typing import Any

from fedvision.errors import ExperimentError

PACKAGES = {"infomap": "infomap", "cv2": "opencv-python-headless"}
"""What is imported, and what it is called where it is installed from."""


def required(module: str) -> Any:
    """A module of the extra ``parts``.

    Raises:
        ExperimentError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = "pip install 'fedvision[parts]', or in a checkout pip install -e '.[parts]'"
        raise ExperimentError(f"objects are discovered with the package {PACKAGES[module]}, which is not installed; {install}") from error
