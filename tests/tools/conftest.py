"""The tools are scripts beside the package, so their folder is where they look for each other."""

import sys
from pathlib import Path

for name in ("scenes", "base"):
    sys.path.append(str(Path(__file__).parents[2] / "tools" / name))
