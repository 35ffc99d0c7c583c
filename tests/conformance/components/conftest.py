"""The planted targets are no tests, and are not imported here."""

collect_ignore_glob = ["targets/*"]
