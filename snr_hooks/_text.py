"""Plain-text tables and name suggestions, for everything in the package that is printed."""

import difflib
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out rows in left-aligned columns under an underlined header."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def dimensions(shape: Iterable[int]) -> str:
    """Write a shape as ``64 x 3 x 7 x 7``."""
    return " x ".join(map(str, shape))


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Name up to three candidates that look like ``name``, to end an error message."""
    matches = difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.3)
    return f"nearest: {', '.join(map(repr, matches))}" if matches else "none is similar"
