"""Where the engine does what a file of reference/ explains."""

# File of reference/ -> (path, function or class in it, what it is). An empty place is the whole file.
ENGINE: dict[str, tuple[tuple[str, str, str], ...]] = {}
