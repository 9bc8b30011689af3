"""``python -m widehead.mlx``: builds the primitive, or says what is missing. Exit code 1 then."""

from __future__ import annotations

import sys

from widehead.mlx import _build


def main() -> int:
    try:
        module = _build.load(retry=True)
    except _build.CannotBuild as error:
        print(f"widehead.mlx: through DLPack, without a primitive: {error}")
        return 1
    print(f"widehead.mlx: a primitive for MLX {_build.MLX_VERSION}, {module.__file__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
