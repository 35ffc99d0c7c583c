"""Context: attention metadata of the running step."""

from types import SimpleNamespace

_context = SimpleNamespace()


def get_context():
    return _context


def set_context(is_prefill, **fields):
    global _context
    _context = SimpleNamespace(is_prefill=is_prefill, **fields)
