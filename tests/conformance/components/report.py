"""The verdicts as text, JSON and HTML."""

import json
from html import escape
from typing import Any

from tests.conformance.components.contracts import CONTRACTS
from tests.conformance.components.examine import BROKEN, HOLDS, NOT_APPLICABLE

MAX_LINES = 12
MARKS = {HOLDS: "holds", BROKEN: "BROKEN", NOT_APPLICABLE: "n/a"}


def counts(result: dict[str, Any]) -> dict[str, int]:
    verdicts = [verdict["verdict"] for verdict in result["verdicts"].values()]
    return {kind: verdicts.count(kind) for kind in MARKS}


def exit_code(result: dict[str, Any]) -> int:
    """0: nothing broken; 1: something is; 2: not one contract could be checked."""
    number = counts(result)
    return 1 if number[BROKEN] else 0 if number[HOLDS] else 2


def as_text(result: dict[str, Any]) -> str:
    lines = [f"{result['target']}: {summary(result)}", *_notes(result), ""]
    said: dict[str, str] = {}
    for name, verdict in result["verdicts"].items():
        contract = CONTRACTS[name]
        lines.append(f"{name} {MARKS[verdict['verdict']]:6}  {contract.rule}")
        if verdict["verdict"] == NOT_APPLICABLE:
            first = said.setdefault(verdict["reason"], name)
            reason = verdict["reason"] if first == name else f"as {first}"
            lines.append(f"            not applicable: {reason}")
        if verdict["verdict"] == BROKEN:
            lines += [f"            {verdict['message']}", f"            users see: {contract.users_see}"]
            lines += [f"            from: {contract.report}", "            the smallest scenario that was found:", ""]
            text = f"{verdict['script']}\n{short(verdict['picture'])}".rstrip()
            lines += [f"                {line}".rstrip() for line in text.splitlines()]
            lines.append("")
    if counts(result)[BROKEN]:
        lines.append("Run a scenario with python from the root of the checkout that has tests/conformance.")
    return "\n".join(lines)


def short(picture: str) -> str:
    """The first MAX_LINES of its blocks, and of its requests, and how many there are more."""
    lines = picture.splitlines()
    blocks = [line for line in lines if line.startswith("block ")]
    parts = (("blocks", blocks), ("requests", lines[len(blocks) :]))
    shown = []
    for name, part in parts:
        left_out = len(part) - MAX_LINES
        shown += part if left_out < 2 else [*part[:MAX_LINES], f"({left_out} more {name})"]
    return "".join(f"{line}\n" for line in shown)


def summary(result: dict[str, Any]) -> str:
    number = counts(result)
    return f"{number[HOLDS]} contracts hold, {number[BROKEN]} are broken, {number[NOT_APPLICABLE]} are not applicable"


def _notes(result: dict[str, Any]) -> list[str]:
    lines = [f"seed {result['seed']}, {result['num_scenarios']} scenarios, package {result.get('package', '?')}"]
    if result.get("stand_ins"):
        lines.append(f"not installed, replaced by stand-ins: {', '.join(result['stand_ins'])}")
    lines += [f"{role} is not loaded: {reason}" for role, reason in result.get("reasons", {}).items()]
    lines += [f"not checked: {note}" for note in result.get("notes", [])]
    return lines


def as_json(results: list[dict[str, Any]]) -> str:
    """{"targets": [{"target", "seed", "num_scenarios", "contracts": [{"id", "rule", "verdict", ...}]}]}"""
    targets = []
    for result in results:
        rows = [
            {"id": name, "rule": CONTRACTS[name].rule, "users_see": CONTRACTS[name].users_see} | verdict
            for name, verdict in result["verdicts"].items()
        ]
        rest = {key: value for key, value in result.items() if key != "verdicts"}
        targets.append(rest | {"exit_code": exit_code(result), "contracts": rows})
    return json.dumps({"targets": targets}, indent=1)


_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100% } td { border-top: 1px solid #ddd; padding: .4rem; vertical-align: top }
.holds { color: #17692c } .broken { color: #b3261e; font-weight: 600 } .not { color: #666 }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; font-size: 13px }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #ddd } pre { background: #222 }
 .holds { color: #6fcf87 } .broken { color: #ff8a80 } td { border-color: #333 } }
"""


def as_html(results: list[dict[str, Any]]) -> str:
    """One page, without scripts and without links to other machines' files."""
    parts = [f"<title>Conformance</title><style>{_STYLE}</style>"]
    for result in results:
        parts.append(f"<h1>{escape(result['target'])}</h1><p>{escape(summary(result))}</p>")
        parts += [f"<p>{escape(note)}</p>" for note in _notes(result)]
        parts.append("<table>")
        for name, verdict in result["verdicts"].items():
            kind = verdict["verdict"]
            cell = f"<b>{escape(CONTRACTS[name].rule)}</b>"
            if kind == NOT_APPLICABLE:
                cell += f"<br>{escape(verdict['reason'])}"
            if kind == BROKEN:
                cell += f"<br>{escape(verdict['message'])}<br>Users see: {escape(CONTRACTS[name].users_see)}"
                cell += f"<pre>{escape(verdict['script'])}</pre><pre>{escape(short(verdict['picture']))}</pre>"
            parts.append(f"<tr><td>{name}</td><td class='{kind.split()[0]}'>{kind}</td><td>{cell}</td></tr>")
        parts.append("</table>")
    return "<!doctype html><html lang='en'><meta charset='utf-8'>" + "\n".join(parts) + "</html>\n"
