"""Compiles the C++ sources of this folder for the processor at hand, once, into the user's cache."""

from __future__ import annotations

import hashlib
import logging
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dsla.errors import KernelError
from dsla.hub import cache_dir
from dsla.storage import write_atomically

_FOLDER = Path(__file__).parent
# -fopenmp only to compile: the OpenMP calls are resolved to the runtime that PyTorch has loaded, so that both share threads.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-c")
_SECONDS = 120
_INSTRUCTIONS = {
    "AVX2": ("__AVX2__",),
    "AVX-512": ("__AVX512F__",),
    "AVX-512 VNNI": ("__AVX512VNNI__", "__AVX512BW__"),
    "AVX-512 BF16": ("__AVX512BF16__",),
    "AMX": ("__AMX_TILE__", "__AMX_BF16__", "__AVX512BF16__"),
}
"""What the sources tell apart -> macros that the compiler must define for it."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        path: where it is.
        macros: what it defines for the processor at hand, and its version.
    """

    path: str
    macros: str

    @property
    def instructions(self) -> tuple[str, ...]:
        """Sets of instructions that kernels compiled by it may use on the processor at hand, narrowest first."""
        defined = {line.split()[1] for line in self.macros.splitlines() if line.startswith("#define ")}
        return tuple(name for name, macros in _INSTRUCTIONS.items() if defined.issuperset(macros))


def find_compiler() -> Compiler:
    """The C++ compiler that the kernels are compiled with.

    Raises:
        KernelError: if there is none, or it fails.
    """
    path = shutil.which("g++") or shutil.which("clang++")
    if path is None:
        raise KernelError("no C++ compiler (g++ or clang++) was found: install one for the fast CPU kernels")
    return Compiler(path, _run([path, "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"]))


def library() -> Path:
    """The compiled kernels, compiled now if this machine has not done so yet.

    Raises:
        KernelError: if there is no C++ compiler, or it fails.
    """
    compiler = find_compiler()
    digest = hashlib.sha256("\0".join((compiler.path, compiler.macros, platform.platform(), *_FLAGS)).encode())
    for file in sorted([*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h")]):
        digest.update(file.read_bytes())
    built = cache_dir() / "kernels" / f"{digest.hexdigest()[:16]}.so"
    if not built.is_file():
        _log.info("compiling the CPU kernels, once for this machine")
        built.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(built, lambda path: _compile(compiler.path, path))
    return built


def _compile(compiler: str, out: Path) -> None:
    sources = sorted(_FOLDER.glob("*.cpp"))
    objects = [out.with_name(f"{out.name}.{file.name}.o") for file in sources]
    commands = [[compiler, *_FLAGS, str(file), "-o", str(path)] for file, path in zip(sources, objects, strict=True)]
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, commands))
        _run([compiler, "-shared", *map(str, objects), "-o", str(out)])
    finally:
        for path in objects:
            path.unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"the C++ compiler did not finish: {error}") from None
    if done.returncode:
        raise KernelError(f"the C++ compiler failed: {' '.join(command)}\n{done.stderr.strip()[-2000:]}")
    return done.stdout
