"""The bytes of a safetensors file with two tensors: the length of the JSON header, the header, and the values.

data_offsets count from the end of the header. The values shown are those that read_safetensors() returns.
"""

import json
import struct

from reference.checkpoint import read_safetensors
from tools.docs.svg import Drawing

ENTRIES = {
    "embed": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
    "norm": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
}
VALUES = [1.5, 2.5, 3.0]


def draw() -> Drawing:
    header = json.dumps(ENTRIES).encode()
    data = struct.pack("<Q", len(header)) + header + struct.pack("<3f", *VALUES)
    tensors = read_safetensors(data)
    drawing = Drawing(372, 216, "The layout of a safetensors file")
    drawing.box(8, 10, 62, 34, "a", f"{len(header)}")
    drawing.text(39, 58, "8 bytes", "faint small")
    drawing.box(70, 10, 166, 34, "b", "JSON")
    drawing.text(153, 58, f"{len(header)} bytes", "faint small")
    for index, value in enumerate(VALUES):
        drawing.box(236 + 42 * index, 10, 42, 34, "c" if index < 2 else "d", f"{value:g}")
    drawing.text(299, 58, f"{4 * len(VALUES)} bytes", "faint small")
    for row, (name, entry) in enumerate(ENTRIES.items()):
        y, style = 96 + 56 * row, "cd"[row]
        drawing.text(8, y, f'"{name}"', f"{style} bold", "start")
        described = f"dtype {entry['dtype']}, shape {entry['shape']}, data_offsets {entry['data_offsets']}"
        drawing.text(8, y + 17, described, "small", "start")
        drawing.text(8, y + 34, f"is read as {tensors[name].flatten().tolist()}", "faint small", "start")
    return drawing
