"""What `dsla doctor` advises: what would be better on a machine, from the facts alone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsla.cli.diagnosis import Facts
    from dsla.engine.threads import Bounds

_INSTALL_COMPILER = {
    "apt-get": "apt-get install g++",
    "dnf": "dnf install gcc-c++",
    "yum": "yum install gcc-c++",
    "zypper": "zypper install gcc-c++",
    "pacman": "pacman -S gcc",
    "apk": "apk add g++",
    "xcode-select": "xcode-select --install",
}
"""Program that is there -> command that brings a C++ compiler."""

_FEW_FILES = 4096


@dataclass(frozen=True)
class Advice:
    """Something that would be better otherwise.

    Attributes:
        about: the part of the facts it is about.
        found: what is so.
        do: what to do.
    """

    about: str
    found: str
    do: str


def advise(facts: Facts) -> list[Advice]:
    """What would be better on this machine; nothing where all is well."""
    return [
        *_about_kernels(facts),
        *_about_threads(facts.threads),
        *_about_memory(facts),
        *_about_files(facts.open_files),
        *_about_packages(facts),
    ]


def _about_kernels(facts: Facts) -> list[Advice]:
    kernels, model = facts.kernels, facts.model
    slow = "PyTorch computes instead, several times slower"
    if kernels.setting == "off":
        return [Advice("kernels", f"DSLA_KERNELS=off: {slow}", "unset DSLA_KERNELS")]
    if kernels.compiler is None:
        commands = [command for program, command in _INSTALL_COMPILER.items() if shutil.which(program)]
        how = commands[0] if commands else "install g++ or clang++"
        return [Advice("kernels", f"there is no C++ compiler: {slow}", how)]
    if not kernels.active:
        found = f"the kernels cannot be compiled or loaded: {slow}"
        return [Advice("kernels", found, f"see what {kernels.compiler} says: {kernels.reason}")]
    advice = []
    if kernels.tiles_refused:
        found = "the processor has AMX, but the system refuses its tile registers"
        do = "use Linux 5.16 or newer; in a sandbox or virtual machine, have it pass AMX on"
        advice.append(Advice("kernels", found, do))
    if kernels.setting == "vectors" and "AMX" in kernels.instructions:
        advice.append(Advice("kernels", "DSLA_KERNELS=vectors: AMX is not used", "unset DSLA_KERNELS"))
    if model is not None and not model.native:
        found = f"{model.name} is {model.dtype}, the kernels compute bfloat16: {slow}"
        advice.append(Advice("kernels", found, "serve it with --weights bf16"))
    return advice


def _about_threads(bounds: Bounds) -> list[Advice]:
    there = min(bound for bound in (bounds.logical, bounds.quota) if bound is not None)
    if bounds.variable is None or bounds.variable >= there:
        return []
    found = f"OMP_NUM_THREADS is {bounds.variable}, and {there} cores may be used"
    return [Advice("threads", found, "unset OMP_NUM_THREADS: the best number is measured")]


def _about_memory(facts: Facts) -> list[Advice]:
    advice = []
    if facts.free_bytes is None:
        advice.append(Advice("memory", "the system does not say how much memory is free", "give each command --memory"))
    if not facts.keeps_freed_memory and facts.system.startswith("Linux"):
        found = "this C library's malloc gives freed memory back at every step, which makes training slower"
        advice.append(Advice("malloc", found, "train on a system with glibc"))
    return advice


def _about_files(most: int | None) -> list[Advice]:
    if most is None or most >= _FEW_FILES:
        return []
    found = f"`dsla serve` may open {most:,} files, and each connection takes one: more wait until others close"
    return [Advice("files", found, f"raise the hard limit (`ulimit -Hn`, LimitNOFILE=) to {_FEW_FILES:,} or more")]


def _about_packages(facts: Facts) -> list[Advice]:
    return [
        Advice(
            "packages",
            f"{package.name} {package.version} is not among the versions tested, {package.tested}",
            f"pip install '{package.name}{package.tested}'",
        )
        for package in facts.packages
        if not package.within
    ]
