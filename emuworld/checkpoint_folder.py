"""A checkpoint folder of our own: found by name, checked, opened part by part, and named by a fingerprint.

Folders in the layout of the Emu3.5 release are opened in `emuworld.published`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from emuworld import parallel
from emuworld.cache_pool import CachedModel
from emuworld.decoding.dida import Painter
from emuworld.manifest import FILE_NAME, Manifest
from emuworld.model import checkpoint, fp8, lora_folder
from emuworld.model.adapter import FILE_NAME as ADAPTER_FILE
from emuworld.model.adapter import adapter_base, load_adapter, merge_adapter
from emuworld.model.exact import exact
from emuworld.model.fused import CACHES, WEIGHTS, FusedTransformer, fused
from emuworld.model.transformer import Transformer
from emuworld.state import FINGERPRINT_BYTES
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.vision import VisionTokenizer
from emuworld.tokens.vocabulary import Vocabulary

BUILTIN = {"small": Path(__file__).parent / "weights" / "small"}
FILES = ("config.json", "model.safetensors", "vision.json", "vision.safetensors", "text.tiktoken", FILE_NAME)
DETECTOR_FILE = "detector.safetensors"  # may lie beside them: the judge of the suites, no part of the model
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
    painter: Painter | None = None  # of pictures drawn at once; None where that was not learnt

    def __post_init__(self) -> None:
        vocabulary = self.manifest.vocabulary
        if self.vision.num_codes != vocabulary.num_visual_tokens:
            raise ValueError(
                f"the vision tokenizer has {self.vision.num_codes} codes, the vocabulary "
                f"{vocabulary.num_visual_tokens} visual tokens; both must come from one checkpoint"
            )

    @property
    def manifest_here(self) -> Manifest:
        """With the sampling of the device. A GPU's own is for pictures drawn at once: not where what draws
        them is left out, as beside a LoRA.
        """
        return self.manifest.for_device("cpu" if self.painter is None else self.transformer.device.type)

    def with_cache(self, cache: str) -> Parts:
        """The same with keys and values as for `load`, which `check_weights` has allowed."""
        if cache == "bf16":
            return self
        assert isinstance(self.transformer, FusedTransformer)
        return replace(self, transformer=self.transformer.variant(cache=cache))


@dataclass(frozen=True, kw_only=True)
class Located:
    """A checkpoint that is there, in one folder of ours or in three published ones."""

    names: tuple[str, str | None, str | None, str | None]
    """Model, vision, text and adapter, for `locate` to find it again."""
    files: tuple[Path, ...]
    open: Callable[[torch.device, str], Parts] = field(compare=False)  # device, and weights as for `load`


def locate(
    model: str | os.PathLike[str],
    *,
    vision: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Located:
    """A built-in name, a folder of our training, or a published folder or hub id; with `adapter` a folder in
    PEFT's layout whose LoRA is added to it. An adapter's folder alone is its model with it. ValueError where
    there is none."""
    if adapter is None and lora_folder.is_adapter(Path(model)):
        return _located_by(Path(model), vision=vision, text=text)
    lora = None if adapter is None else _adapter_folder(adapter)
    more = () if lora is None else tuple(lora / name for name in lora_folder.FILES)
    lora_name = None if lora is None else str(lora)
    folder = Path(model)
    is_own = str(model) in BUILTIN or (folder / FILE_NAME).is_file()
    if not is_own and ((folder / checkpoint.CONFIG_FILE).is_file() if folder.is_dir() else "/" in str(model)):
        from emuworld import published  # the small model must not wait for what the published ones need

        source = published.find(model, vision=vision, text=text)
        return Located(
            names=(str(source.model), str(source.vision), str(source.text), lora_name),
            files=(*(path for _, path in source.files), *more),
            open=lambda device, weights: published.open_parts(
                source, device=device, weights=weights, adapter=lora
            ),
        )
    folder = find(model)
    if vision is not None or text is not None:
        raise ValueError(f"{str(model)!r} brings its own tokenizers; leave vision and text out")
    # Not a relative name: a child may work in another directory.
    name = str(model) if str(model) in BUILTIN else str(folder)
    return Located(
        names=(name, None, None, lora_name),
        files=(*(folder / file for file in present_files(folder)), *more),
        open=lambda device, weights: open_parts(folder, device=device, weights=weights, adapter=lora),
    )


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


def _located_by(
    adapter: Path, *, vision: str | os.PathLike[str] | None, text: str | os.PathLike[str] | None
) -> Located:
    """The model that an adapter says it belongs to, with that adapter."""
    base = lora_folder.base(adapter)
    try:
        if not base:
            raise ValueError("its adapter_config.json names none")
        return locate(base, vision=vision, text=text, adapter=adapter)
    except ValueError as error:
        raise ValueError(
            f"{adapter} is an adapter, and its model {base!r} cannot be opened: {error}. Give both: "
            f"emuworld.load(MODEL, adapter={str(adapter)!r})"
        ) from error


def _adapter_folder(adapter: str | os.PathLike[str]) -> Path:
    folder = Path(adapter).resolve()
    missing = [name for name in lora_folder.FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"adapter {str(adapter)!r} has no {' and no '.join(missing)}; give a folder that 'emuworld train "
            "stage=tune' or PEFT wrote"
        )
    return folder


def open_parts(
    folder: Path, *, device: torch.device, weights: str = "bf16", adapter: Path | None = None
) -> Parts:
    """Read a folder that `find` gave. On the CPU the transformer is made exact, on CUDA it is bf16 or fp8;
    vision is fp32.

    Raises:
        ValueError: a file is damaged or does not fit the others.
    """
    manifest = Manifest.load(folder)
    try:
        tokenizer = TextTokenizer.builtin(folder / "text.tiktoken", vocabulary=manifest.vocabulary)
    except ValueError as error:
        raise ValueError(f"{folder / 'text.tiktoken'} does not fit {FILE_NAME}: {error}") from error
    vision = VisionTokenizer.load(folder, device=device)
    # A tenth less time on a CPU, on a GPU what its kernels take; the encoder, whose codes are kept, stays.
    vision.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs
    transformer = open_transformer(folder, device=device, weights=weights, adapter=adapter)
    painter = None
    if manifest.dida and adapter is None:  # what draws at once was not tuned
        painter = open_painter(folder, transformer, vision=vision, manifest=manifest, weights=weights)
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
        fingerprint=fingerprint(
            manifest.vocabulary,
            [(name, folder / name) for name in present_files(folder) if name != FILE_NAME]
            + adapter_files(adapter),
        ),
        painter=painter,
    )


def adapter_files(adapter: Path | None) -> list[tuple[str, Path]]:
    """An adapter's files, and the names that they go by in a fingerprint."""
    return [] if adapter is None else [(f"adapter/{name}", adapter / name) for name in lora_folder.FILES]


def present_files(folder: Path) -> list[str]:
    """The names of the files that a checkpoint in this folder is made of."""
    return [*FILES, *(name for name in (ADAPTER_FILE,) if (folder / name).is_file())]


def open_painter(
    folder: Path, transformer: CachedModel, *, vision: VisionTokenizer, manifest: Manifest, weights: str
) -> Painter:
    """What draws pictures at once: the transformer itself, or its weights with the folder's adapter."""
    assert manifest.dida is not None
    painting, caution = transformer, ""
    if (folder / ADAPTER_FILE).is_file():
        if adapter_base(folder) not in ("", weights_name(folder)):
            caution = (
                f"{folder / ADAPTER_FILE} was trained on other weights than {checkpoint.WEIGHTS_FILE} beside "
                "it: pictures drawn at once (passes=...) are worse than need be; train stage=dida anew"
            )
        adapted = checkpoint.load(folder, dtype=torch.float32)
        merge_adapter(adapted, load_adapter(folder, adapted))
        if parallel.tensor_group() is not None:
            painting = _split(adapted, device=transformer.device, weights=weights)
        elif transformer.device.type == "cpu":
            painting = exact(adapted)
        elif weights == "fp8":
            painting = FusedTransformer(adapted, weights=weights, device=transformer.device)
        else:
            painting = fused(adapted.to(transformer.device, transformer.dtype))
    return Painter(
        painting,
        vocabulary=manifest.vocabulary,
        noise=manifest.dida,
        codebook_KE=vision.quantize.embedding.weight.detach(),
        caution=caution,
    )


def open_transformer(
    folder: Path,
    *,
    device: torch.device,
    weights: str = "bf16",
    adapter: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CachedModel:
    """The transformer in the form for a device: int8 and exact on the CPU, bf16 or fp8 on CUDA.

    On the CPU the int8 form is also the smallest: half the bytes of a 16-bit checkpoint. Its weights come
    from the mapped files tensor by tensor. `on_progress` is called with what is done and what there is.
    Where several processes have joined (`emuworld.parallel`), it is this one's part: fp32 on the CPU.
    """
    if parallel.tensor_group() is not None:
        return _split(_adapted(checkpoint.load(folder), adapter), device=device, weights=weights)
    if device.type == "cpu":
        limit_threads()
        return exact(_adapted(checkpoint.load(folder), adapter), on_layer=on_progress)
    if weights == "fp8":  # from the mapped files as well: the device never holds a layer but the one at hand
        whole = _adapted(checkpoint.load(folder), adapter)
        return FusedTransformer(whole, weights=weights, device=device, on_layer=on_progress)
    model = checkpoint.load(folder, device=device, dtype=torch.bfloat16, on_bytes=on_progress)
    return fused(_adapted(model, adapter))


def _split(whole: Transformer, *, device: torch.device, weights: str) -> parallel.SplitTransformer:
    """This process's part of it, among those that have joined."""
    return parallel.SplitTransformer(
        whole.config,
        whole.state_dict().items(),
        group=parallel.tensor_group(),
        device=device,
        dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        weights=weights,
    )


def _adapted(model: Transformer, adapter: Path | None) -> Transformer:
    if adapter is not None:
        lora_folder.merge(adapter, model)
    return model


def signature(files: Iterable[Path]) -> tuple[tuple[int, int], ...]:
    """Changes when one of the files is written again; costs no reading."""
    status = [file.stat() for file in files]
    return tuple((file.st_mtime_ns, file.st_size) for file in status)


def weights_name(folder: Path) -> str:
    """What an adapter says of the weights that it belongs to."""
    return _digest(b"", [(checkpoint.WEIGHTS_FILE, folder / checkpoint.WEIGHTS_FILE)]).hex()


def fingerprint(vocabulary: Vocabulary, files: Iterable[tuple[str, Path]]) -> bytes:
    """16 bytes that change with ids and with the named files (weights, tokenizers), not with sampling
    defaults."""
    return _digest(json.dumps(vocabulary.to_json(), sort_keys=True).encode(), files)


def _digest(first: bytes, files: Iterable[tuple[str, Path]]) -> bytes:
    digest = hashlib.sha256(first)
    for name, path in files:
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
        raise ValueError(f"device {name!r} is unknown; give auto, cpu, cuda or cuda:N") from error
    here = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= here:
        raise ValueError(f"device {name!r} is not on this machine; give auto, cpu, cuda or cuda:N")
    return device


def check_weights(weights: str, device: torch.device, *, cache: str = "bf16") -> None:
    """ValueError for weights or a cache that `load` does not know, or that the device does not take."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be {' or '.join(map(repr, WEIGHTS))}, got {weights!r}")
    if weights == "fp8" and not fp8.supports(device):
        raise ValueError(
            f"weights='fp8' needs a GPU of compute capability 8.9 or more (Ada, Hopper), got {device}; "
            "leave weights out (the CPU computes with 8-bit integers anyway)"
        )
    if cache not in CACHES:
        raise ValueError(f"cache must be {' or '.join(map(repr, CACHES))}, got {cache!r}")
    if cache == "int8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise ValueError(
            f"cache='int8' needs a GPU of compute capability 8.0 or more, got {device}; leave cache out"
        )
    if cache == "int8" and parallel.tensor_group() is not None:
        raise ValueError("cache='int8' is not there where several processes share a model; leave cache out")


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
