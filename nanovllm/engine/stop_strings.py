"""StopStringSearch: incremental search for stop strings in a text."""

from collections.abc import Iterable, Mapping, Sequence


class StopStringSearch:
    """Searches one view of a request's text: the visible text, with the special tokens `shown` written out.

    stops: non-empty strings, each of which contains exactly these special tokens.
    shown: {token id: text}.
    Positions count characters of the visible text; a special token has the position of the character that follows it.
    """

    def __init__(self, stops: Sequence[str], shown: Mapping[int, str]) -> None:
        self.shown = shown
        self._stops = stops
        self._longest = max(map(len, stops))
        self._view = ""  # the last characters of the view: those that may begin a stop string
        self._positions: list[int] = []  # of each character of _view

    def add(self, text: str, positions: Iterable[int]) -> int | None:
        """Append `text` to the view. Returns the position of the first stop string that it completes, or None."""
        self._view += text
        self._positions += positions
        starts = [start for stop in self._stops if (start := self._view.find(stop)) >= 0]
        if starts:
            return self._positions[min(starts)]
        excess = max(0, len(self._view) - self._longest + 1)
        self._view, self._positions = self._view[excess:], self._positions[excess:]
        return None

    def first_undecided(self) -> int | None:
        """Position at which an incomplete stop string may begin, or None."""
        for start, position in enumerate(self._positions):
            end = self._view[start:]
            if any(stop.startswith(end) for stop in self._stops):
                return position
        return None


def stop_string_searches(stops: Sequence[str], special_tokens: Mapping[int, str]) -> list[StopStringSearch]:
    """One search for each set of special tokens that some stop string contains. There is rarely more than one."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for stop in stops:
        contained = tuple(token_id for token_id, text in special_tokens.items() if text and text in stop)
        groups.setdefault(contained, []).append(stop)
    return [StopStringSearch(group, {i: special_tokens[i] for i in shown}) for shown, group in groups.items()]
