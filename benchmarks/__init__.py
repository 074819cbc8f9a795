"""The instrument: running experiments, comparing them, and the command line."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.runs import Run, run

__all__ = ["Run", "run"]


def __getattr__(name: str) -> Any:
    """Import what takes seconds to import only when it is asked for."""
    if name in __all__:
        from benchmarks import runs

        return getattr(runs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
