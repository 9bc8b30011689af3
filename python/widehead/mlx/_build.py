"""Builds the primitive on the user's machine, for the MLX that is installed there.

MLX promises no binary interface: a primitive fits the version, the Python and the nanobind that it
was compiled for. So it is compiled where these are known, once, and kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import mlx.core as mx

MLX_VERSION: str = mx.__version__  # type: ignore[attr-defined]
_PACKAGE = Path(__file__).parents[1]
_SOURCES = Path(__file__).parent / "src"
_LIBRARY = next(_PACKAGE.glob("libwidehead.so.*"))
# Its wheel is the first whose CUDA backend can be built against.
_OLDEST_MLX = (0, 32, 4)


class CannotBuild(Exception):
    """What keeps the primitive from being built here, and what would change that."""


def load(*, retry: bool = False) -> ModuleType:
    """The extension module, built where the cache does not have it. Raises CannotBuild; what the
    compiler refused once is tried again when asked to."""
    if tuple(int(part) for part in MLX_VERSION.split(".")[:3] if part.isdigit()) < _OLDEST_MLX:
        oldest = ".".join(map(str, _OLDEST_MLX))
        raise CannotBuild(f"MLX is {MLX_VERSION}; the primitive needs {oldest} or later")
    recipe = Recipe(Path(mx.__file__).parent)
    file = recipe.file()
    if not file.exists():
        refused = file.with_name("refused")
        if refused.exists() and not retry:
            raise CannotBuild(f"{refused.read_text()} (`python -m widehead.mlx` tries again)")
        with _lock(file):
            if not file.exists():  # another process may have built it meanwhile
                print(
                    f"widehead.mlx: building its primitive for MLX {MLX_VERSION}, once, into "
                    f"{file.parent}",
                    file=sys.stderr,
                )
                recipe.build(file)
    return _import(recipe.module, file)


class Recipe:
    """The compiler's command line for the MLX in a folder."""

    module = "_widehead_mlx"

    def __init__(self, mlx: Path) -> None:
        named = os.environ.get("CXX")
        self._compiler = shlex.split(named) if named else ["c++"]
        if shutil.which(self._compiler[0]) is None:
            raise CannotBuild(
                f"there is no C++ compiler ({self._compiler[0]}): install g++ (12 or later), or "
                "name one in CXX"
            )
        python = Path(sysconfig.get_path("include"))
        if not (python / "Python.h").exists():
            raise CannotBuild(f"there is no {python}/Python.h: install Python's headers (python3-dev)")
        if importlib.util.find_spec("nanobind") is None:
            raise CannotBuild("nanobind is not installed: pip install 'widehead[mlx]'")
        import nanobind

        self._nanobind = Path(nanobind.__file__).parent
        self._mlx = mlx
        library = self._mlx / "lib" / "libmlx.so"
        if not library.exists():
            raise CannotBuild(f"there is no {library}: pip install 'mlx[cpu]' or 'mlx[cuda13]'")
        # Its CUDA wheel carries what its kernels include when they are compiled at run time.
        self.has_cuda = (mlx / "include" / "cccl").exists()
        self._version = {
            "widehead": hashlib.sha256(
                b"".join(file.read_bytes() for file in sorted(_SOURCES.iterdir()))
            ).hexdigest(),
            "libraries": [
                [str(file), file.stat().st_size, file.stat().st_mtime]
                for file in (library, _LIBRARY)
            ],
            "nanobind": nanobind.__version__,
            "python": sys.version,
            "command": self._command(),
        }

    def file(self) -> Path:
        key = hashlib.sha256(json.dumps(self._version).encode()).hexdigest()[:16]
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        return Path(cache) / "widehead" / f"mlx-{MLX_VERSION}-{key}" / f"{self.module}{suffix}"

    def build(self, file: Path) -> None:
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            built = Path(scratch) / file.name
            done = subprocess.run(
                [*self._command(), "-o", str(built)], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                lines = done.stderr.splitlines() or ["no message"]
                first = next((line for line in lines if "error" in line), lines[-1])
                message = f"{self._compiler[0]} failed: {first}"
                if "fmt/" in first:
                    message += " (MLX's headers for CUDA include fmt's: install libfmt-dev)"
                file.with_name("refused").write_text(message)
                raise CannotBuild(message)
            os.replace(built, file)

    def _cuda_headers(self) -> list[Path]:
        """CUDA's, which MLX's headers include: of the wheel that its own needs, or of a toolkit."""
        if not self.has_cuda:
            return []
        found = importlib.util.find_spec("nvidia")
        folders = [
            Path(root) / "cu13" / "include"
            for root in (found.submodule_search_locations or [] if found else [])
        ]
        folders += [
            Path(root) / "include"
            for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
            if root is not None
        ]
        # nvidia-cuda-runtime alone, which MLX's wheel brings, includes what it does not hold.
        needed = ("cuda_runtime.h", "crt/host_config.h")
        for folder in folders:
            if all((folder / header).exists() for header in needed):
                return [folder]
        raise CannotBuild(
            f"no folder has {' and '.join(needed)}: install the packages nvidia-cuda-runtime and "
            "nvidia-cuda-crt, or a CUDA toolkit whose folder CUDA_HOME names"
        )

    def _command(self) -> list[str]:
        include = [
            sysconfig.get_path("include"),
            self._nanobind / "include",
            self._nanobind / "ext" / "robin_map" / "include",
            self._mlx / "include",
            _PACKAGE / "include",
            *self._cuda_headers(),
        ]
        gpu = "eval_cuda.cpp" if self.has_cuda else "eval_no_cuda.cpp"
        names = ("attention.cpp", "gradients.cpp", "eval_cpu.cpp", gpu, "module.cpp")
        sources = [_SOURCES / name for name in names]
        return [
            *self._compiler,
            *"-std=c++20 -O2 -fPIC -shared -fvisibility=hidden -DNDEBUG".split(),
            # Arrays are shared with MLX's module alone under its domain.
            *("-DNB_DOMAIN=mlx", f"-DWIDEHEAD_MLX_MODULE={self.module}"),
            *(f"-I{folder}" for folder in include),
            *map(str, sources),
            str(self._nanobind / "src" / "nb_combined.cpp"),
            *(f"-L{self._mlx}/lib", "-lmlx", f"-L{_PACKAGE}", f"-l:{_LIBRARY.name}"),
            f"-Wl,-rpath,{self._mlx}/lib:{_PACKAGE}",
        ]


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise CannotBuild(f"{file.parent} cannot be written: {error}") from error


def _import(name: str, file: Path) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise CannotBuild(f"{file} does not load: {error}") from error
    try:
        module.handle(mx.array(0.0))
    except TypeError as error:
        import nanobind

        # Two modules share types when their nanobinds are of one layout.
        raise CannotBuild(
            f"nanobind {nanobind.__version__} is not of the layout that MLX {MLX_VERSION} was "
            "built with: install another version of nanobind (3.0 or later for MLX 0.32)"
        ) from error
    sys.modules[name] = module
    return module
