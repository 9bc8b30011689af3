"""``python -m widehead`` and ``widehead``: the command line, which the package carries."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    binary = Path(__file__).parent / "bin" / "widehead"
    os.execv(binary, [str(binary), *sys.argv[1:]])


if __name__ == "__main__":
    main()
