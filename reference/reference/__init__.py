"""What `python reference/packing.py` imports as reference, for Python looks for it in the folder of the script: it puts
the checkout on the path in front of that folder, and the real package in its own place.
"""

import sys
from pathlib import Path

if __name__ == "reference":  # not reference.reference, which only a tool that imports every file imports
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    del sys.modules["reference"]
    __import__("reference")
