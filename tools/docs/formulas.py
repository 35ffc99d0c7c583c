"""The formulas of reference/'s docstrings in LaTeX, as tools/docs/formula.py reads it."""

# File of reference/ -> for each indented block of its docstring, in order: the lines, or () to leave it as plain text.
# A test holds the names in the lines against those of the block.
FORMULAS: dict[str, tuple[tuple[str, ...], ...]] = {}
