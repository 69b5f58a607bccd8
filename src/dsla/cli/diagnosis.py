"""What `dsla doctor` finds: facts about this machine, each from the code that acts on it."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsla.errors import KernelError

if TYPE_CHECKING:
    from dsla.engine.threads import Bounds
    from dsla.server.build import Service

_ASSUMED_BYTES = 1 << 30


@dataclass(frozen=True)
class Kernels:
    """The native CPU kernels.

    Attributes:
        active: whether they compute.
        reason: why not, where they do not.
        compiler: path of the C++ compiler, or None.
        instructions: sets of instructions they are compiled for.
        tiles: whether they multiply in AMX's tile registers.
        setting: `DSLA_KERNELS`, or None.
        pytorch: the widest instructions PyTorch uses, as `AVX512`.
    """

    active: bool
    reason: str | None
    compiler: str | None
    instructions: tuple[str, ...]
    tiles: bool
    setting: str | None
    pytorch: str

    @property
    def tiles_refused(self) -> bool:
        """Whether the system keeps AMX from kernels that are compiled for it and were not asked to do without."""
        return self.active and "AMX" in self.instructions and not self.tiles and self.setting != "vectors"


@dataclass(frozen=True)
class Gpus:
    """What there is beside the processor.

    Attributes:
        devices: names of CUDA devices.
        cuda: version of CUDA that this build of PyTorch is for, or None.
        triton: version of Triton, or None.
    """

    devices: tuple[str, ...]
    cuda: str | None
    triton: str | None


@dataclass(frozen=True)
class Package:
    """An installed package.

    Attributes:
        name: its name.
        version: the installed one.
        tested: the versions that are tested.
        within: whether it is one of them.
    """

    name: str
    version: str
    tested: str
    within: bool


@dataclass(frozen=True)
class Capacity:
    """What the default budget holds at a level.

    Attributes:
        level: the level.
        request_bytes: bytes that a request of the whole context keeps.
        tokens: tokens of such requests that the budget holds.
    """

    level: int
    request_bytes: int
    tokens: int


@dataclass(frozen=True)
class Model:
    """The model as `dsla serve` would run it.

    Attributes:
        name: its name.
        dtype: of its weights.
        native: whether the kernels, where there are any, compute it.
        context: tokens of its context.
        threads: threads it is computed with.
        budget_bytes: memory that `dsla serve` takes for requests unless it is told otherwise; 1 GiB where it must be told.
        capacity: what that holds at level 0 and at the highest.
    """

    name: str
    dtype: str
    native: bool
    context: int
    threads: int
    budget_bytes: int
    capacity: tuple[Capacity, ...]


@dataclass(frozen=True)
class Facts:
    """All that was found.

    Attributes:
        dsla: version of this package.
        python: version of Python.
        system: the operating system.
        processor: the processor.
        kernels: the native CPU kernels.
        gpus: what there is beside the processor.
        threads: what bounds the number of threads.
        free_bytes: memory that a new process can take; None = the system does not say.
        keeps_freed_memory: whether this system's malloc can be told to keep what training frees.
        open_files: files that `dsla serve` lets itself open, one for each connection; None = there is no such limit.
        packages: what this package needs, where it is installed.
        model: the model; None = it is not here.
        missing: why the model is not here.
    """

    dsla: str
    python: str
    system: str
    processor: str
    kernels: Kernels
    gpus: Gpus
    threads: Bounds
    free_bytes: int | None
    keeps_freed_memory: bool
    open_files: int | None
    packages: tuple[Package, ...]
    model: Model | None
    missing: str | None


def find_facts(model: str | None = None, adapter: str | None = None) -> Facts:
    """Looks at this machine, and builds the engine that `dsla serve` would. Fetches nothing.

    Args:
        model: folder or name of a model. Default: the default model.
        adapter: its adapter. Default: the shipped one.

    Raises:
        ModelError: the model cannot be read or is not supported.
        AdapterError: the adapter is damaged or belongs to another model.
    """
    from dsla import __version__
    from dsla.distill.allocator import keep_freed_memory
    from dsla.engine.remembered import processor
    from dsla.engine.threads import bounds
    from dsla.errors import ConfigError
    from dsla.hub import must_fetch
    from dsla.server.build import EngineSettings, build_engine, free_memory
    from dsla.server.files import WANTED_FILES, file_limits

    try:
        free = free_memory()
    except ConfigError:
        free = None
    kernels, gpus, missing = find_kernels(), _find_gpus(), must_fetch(model)
    settings = EngineSettings(model=model, adapter=adapter, memory_bytes=_ASSUMED_BYTES if free is None else None)
    files = file_limits()
    built = None if missing else _find_model(build_engine(settings))
    return Facts(
        dsla=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}",
        processor=processor(),
        kernels=kernels,
        gpus=gpus,
        threads=bounds(),
        free_bytes=free,
        keeps_freed_memory=keep_freed_memory(),
        open_files=None if files is None else max(files[0], min(files[1], WANTED_FILES)),
        packages=find_packages(),
        model=built,
        missing=missing,
    )


def find_kernels() -> Kernels:
    """The native kernels, compiled if this machine has not done so yet."""
    import torch

    from dsla.ops.cpu import find_compiler, kernels, load_kernels, setting

    pytorch, asked = torch.backends.cpu.get_cpu_capability(), setting()
    try:
        compiler = find_compiler()
    except KernelError as error:
        return Kernels(False, str(error), None, (), False, asked, pytorch)
    path, instructions, found = compiler.path, compiler.instructions, kernels()
    if found is not None:
        return Kernels(True, None, path, instructions, found.tiles, asked, pytorch)
    reason = f"DSLA_KERNELS={asked}"
    if asked != "off":
        try:
            load_kernels()
        except KernelError as error:
            reason = str(error)
    return Kernels(False, reason, path, instructions, False, asked, pytorch)


def _find_gpus() -> Gpus:
    import torch

    devices = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Gpus(devices, torch.version.cuda, _version("triton"))


def find_packages() -> tuple[Package, ...]:
    """Packages that this one needs and that are installed, with the versions it is tested with."""
    from packaging.requirements import Requirement

    try:
        required = importlib.metadata.requires("dsla") or []
    except importlib.metadata.PackageNotFoundError:
        return ()  # run from its sources, without having been installed
    found = []
    for requirement in map(Requirement, required):
        version = _version(requirement.name)
        if version is not None and requirement.name != "dsla":
            within = requirement.specifier.contains(version, prereleases=True)
            found.append(Package(requirement.name, version, str(requirement.specifier), within))
    return tuple(sorted(set(found), key=lambda package: package.name))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _find_model(service: Service) -> Model:
    import torch

    from dsla.ops.cpu import native

    decoder, arena = service.engine.decoder, service.engine.arena
    context = decoder.max_tokens

    def capacity(level: int) -> Capacity:
        units = (decoder.n_layers - level) * arena.page_count(context) + level * arena.slot_units
        return Capacity(level, units * arena.page_bytes, arena.n_units * context // units)

    return Model(
        name=service.model_name,
        dtype=str(decoder.dtype).removeprefix("torch."),
        native=decoder.dtype is torch.bfloat16 and native(decoder.weights.norm.weight) is not None,
        context=context,
        threads=torch.get_num_threads(),
        budget_bytes=arena.budget_bytes,
        capacity=tuple(capacity(level) for level in sorted({0, len(decoder.order)})),
    )
