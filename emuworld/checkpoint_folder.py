"""A checkpoint folder: found by name, checked, opened part by part, and named by a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from emuworld.cache_pool import CachedModel
from emuworld.manifest import FILE_NAME, Manifest
from emuworld.model import checkpoint
from emuworld.model.exact import exact
from emuworld.state import FINGERPRINT_BYTES
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.vision import VisionTokenizer

BUILTIN = {"small": Path(__file__).parent / "weights" / "small"}
FILES = ("config.json", "model.safetensors", "vision.json", "vision.safetensors", "text.tiktoken", FILE_NAME)
_HASHED_WHOLE_BYTES = 256 << 20  # 0.2 s; of larger files the fingerprint reads 16 pieces of 1 MiB


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """Everything that a checkpoint folder holds, on its device and in the form that inference wants."""

    folder: Path
    transformer: CachedModel
    vision: VisionTokenizer
    tokenizer: TextTokenizer
    manifest: Manifest
    fingerprint: bytes


def find(name: str | os.PathLike[str]) -> Path:
    """The folder of a built-in name or of a path. ValueError where there is none, or where a file is missing
    in it."""
    folder = BUILTIN.get(str(name), Path(name)).resolve()
    if not folder.is_dir():
        raise ValueError(
            f"{str(name)!r} is neither {' nor '.join(map(repr, BUILTIN))} nor a folder; give one of them"
        )
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"{folder} has no {', '.join(missing)}; expected the folder of a finished training run"
            + (" (for the built-in model: install the package again)" if str(name) in BUILTIN else "")
        )
    return folder


def open_parts(folder: Path, *, device: torch.device) -> Parts:
    """Read a folder that `find` gave. On the CPU the transformer is made exact, on CUDA it is bf16; vision is
    fp32.

    Raises:
        ValueError: a file is damaged or does not fit the others.
    """
    manifest = Manifest.load(folder)
    try:
        tokenizer = TextTokenizer.builtin(folder / "text.tiktoken", vocabulary=manifest.vocabulary)
    except ValueError as error:
        raise ValueError(f"{folder / 'text.tiktoken'} does not fit {FILE_NAME}: {error}") from error
    vision = VisionTokenizer.load(folder, device=device)
    transformer: CachedModel
    if device.type == "cpu":
        limit_threads()
        transformer = exact(checkpoint.load(folder, device="cpu", dtype=torch.float32))
    else:
        transformer = checkpoint.load(folder, device=device, dtype=torch.bfloat16)
    if transformer.config.vocab_size < manifest.vocabulary.size:
        raise ValueError(
            f"{folder}: config.json has {transformer.config.vocab_size} ids, {FILE_NAME} "
            f"{manifest.vocabulary.size}; the files come from different models"
        )
    return Parts(
        folder=folder,
        transformer=transformer,
        vision=vision,
        tokenizer=tokenizer,
        manifest=manifest,
        fingerprint=fingerprint(folder, manifest),
    )


def signature(folder: Path) -> tuple[tuple[int, int], ...]:
    """Changes when a file of the folder is written again; costs no reading."""
    status = [(folder / name).stat() for name in FILES]
    return tuple((file.st_mtime_ns, file.st_size) for file in status)


def fingerprint(folder: Path, manifest: Manifest) -> bytes:
    """16 bytes that change with weights, tokenizers and ids, not with sampling defaults."""
    digest = hashlib.sha256(json.dumps(manifest.vocabulary.to_json(), sort_keys=True).encode())
    for name in FILES:
        if name == FILE_NAME:
            continue
        path = folder / name
        size = path.stat().st_size
        digest.update(f"{name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _HASHED_WHOLE_BYTES:
                while piece := file.read(1 << 22):
                    digest.update(piece)
            else:
                for i in range(16):
                    file.seek(size * i // 16)
                    digest.update(file.read(1 << 20))
    return digest.digest()[:FINGERPRINT_BYTES]


def find_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda", "cuda:1" ... as a device that is there; ValueError otherwise."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is none; give auto, cpu, cuda or cuda:N") from error
    here = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= here:
        raise ValueError(f"device {name!r} is not on this machine; give auto, cpu, cuda or cuda:N")
    return device


def limit_threads() -> None:
    """At most one thread a physical core, unless OMP_NUM_THREADS says otherwise: hyperthreads share units."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), physical_cores()))


def physical_cores() -> int:
    """Physical cores that this process may use; where the system does not tell, its logical ones."""
    logical = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in logical:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text().strip())
        except OSError:
            return len(logical)
    return len(siblings)
