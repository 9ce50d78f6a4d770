"""Training states on disk: what a killed run goes on from.

Two forms with one interface. `FileStore` is one file of one process. `ShardedStore` is a folder to which each
process writes its own part of weights and optimiser states (`torch.distributed.checkpoint`), and from which
any number of processes, one included, reads the parts that it needs. A state appears whole or not at all:
the old one goes when the new one is complete.

Nothing is unpickled but tensors and plain values: the index that PyTorch writes as a pickle is read by a
reader that knows the dozen types of such an index and no others.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from emuworld.files import written
from emuworld.training.ranks import Ranks

logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)  # it tells of every tensor
_VALUES_FILE = "values.json"
_INDEX_FILE = ".metadata"  # PyTorch's name; it writes it last and renames it
_TYPES = {  # what an index of tensors is made of
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
        "ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "pathlib": ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
    "collections": ("OrderedDict",),
}  # fmt: skip


class StateStore(Protocol):
    """Where a loop keeps the state of its stage."""

    @property
    def place(self) -> Path:
        """What is shown to users."""

    def load(self) -> Mapping[str, float] | None:
        """Put the newest state back; the values saved with it, or None where there is no state."""

    def save(self, values: Mapping[str, float]) -> None:
        """Write the state. Every process calls it."""


class FileStore:
    """One file, written beside and renamed; the first process writes."""

    def __init__(
        self,
        path: Path,
        *,
        get: Callable[[], Mapping[str, Any]],
        put: Callable[[Mapping[str, Any]], None],
        device: torch.device,
        first: bool = True,
    ) -> None:
        self.place = path
        self._get, self._put, self._device, self._first = get, put, device, first

    def load(self) -> Mapping[str, float] | None:
        if not self.place.exists():
            return None
        state = self._read()
        self._put(state.pop("stage"))
        return state

    def first_step(self) -> int:
        """The step that a resumed run does first; 0 without a state."""
        return int(self._read()["step"]) if self.place.exists() else 0

    def _read(self) -> dict[str, Any]:
        try:
            return torch.load(self.place, map_location=self._device, weights_only=True)
        except Exception as error:  # torch raises several unrelated types for a damaged file
            raise _unreadable(self.place, error) from error

    def save(self, values: Mapping[str, float]) -> None:
        if not self._first:
            return
        with written(self.place) as beside:
            try:
                torch.save({"stage": dict(self._get()), **values}, beside)
            except RuntimeError as error:
                if "inline_container" not in str(error):  # PyTorch's writer of archives
                    raise
                raise _unwritable(self.place, error) from error


class ShardedStore:
    """Folders `<name>.state-<step>` in `out`; of several the newest complete one counts.

    Args:
        module: its parameters and buffers are kept, DTensors or plain tensors.
        optimizers: their states are kept under the names of the parameters, not their groups' settings.
        ranks: those who save and load together.
    """

    def __init__(
        self,
        out: Path,
        name: str,
        *,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        ranks: Ranks,
    ) -> None:
        self._out, self._name, self._ranks = out, name, ranks
        self._module, self._optimizers = module, optimizers

    @property
    def place(self) -> Path:
        return newest(self._out, self._name) or self._out / f"{self._name}.state-0"

    def load(self) -> Mapping[str, float] | None:
        folder = newest(self._out, self._name)
        if folder is None:
            return None
        try:
            values = read_values(folder)
            reader = _Reader(folder)
            self._prepare(reader.read_metadata())
            with _one_process_is_meant():
                dcp.load(dict(self._tensors()), storage_reader=reader, no_dist=self._ranks.world == 1)
        except Exception as error:  # as above
            raise _unreadable(folder, error) from error
        return values

    def save(self, values: Mapping[str, float]) -> None:
        folder = self._out / f"{self._name}.state-{int(values['step'])}"
        if self._ranks.first:
            shutil.rmtree(folder, ignore_errors=True)  # what a killed writer left, or another run
            folder.mkdir(parents=True)
            (folder / _VALUES_FILE).write_text(json.dumps(dict(values)))
        self._ranks.highest(0.0)  # nobody writes before it is there
        writer = dcp.FileSystemWriter(folder, single_file_per_rank=True)
        try:
            with _one_process_is_meant():
                dcp.save(dict(self._tensors()), storage_writer=writer, no_dist=self._ranks.world == 1)
        except CheckpointException as error:
            raise _unwritable(folder, next(iter(error.failures.values()))[0]) from error
        if self._ranks.first:
            for old in self._out.glob(f"{self._name}.state-*"):
                if old != folder:
                    shutil.rmtree(old)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        names: dict[Tensor, str] = {}
        for name, tensor in self._module.state_dict().items():
            yield f"module.{name}", tensor
        for name, parameter in self._module.named_parameters():
            names[parameter] = name
        for number, optimizer in enumerate(self._optimizers):
            for moved, state in optimizer.state.items():
                for key, tensor in state.items():
                    yield f"optimizer.{number}.{names[moved]}.{key}", tensor

    def _prepare(self, index: Metadata) -> None:
        """Give the optimisers empty states of the saved shapes, for the saved ones to be read into."""
        parameters = dict(self._module.named_parameters())
        for path, stored in index.state_dict_metadata.items():
            kind, _, rest = path.partition(".")
            if kind != "optimizer" or not isinstance(stored, TensorStorageMetadata):
                continue
            number, _, rest = rest.partition(".")
            name, _, key = rest.rpartition(".")
            parameter, optimizer = parameters[name], self._optimizers[int(number)]
            if stored.size == parameter.shape:
                optimizer.state[parameter][key] = torch.zeros_like(parameter.detach())
            else:
                on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
                device = parameter.device if on_device else "cpu"
                scalar = torch.zeros(stored.size, dtype=stored.properties.dtype, device=device)
                optimizer.state[parameter][key] = scalar


def newest(out: Path, name: str) -> Path | None:
    """The complete state of the highest step."""
    complete = [path.parent for path in out.glob(f"{name}.state-*/{_INDEX_FILE}")]
    return max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def first_step(out: Path, name: str) -> int:
    """The step that a resumed run does first; 0 without a state."""
    folder = newest(out, name)
    return 0 if folder is None else int(read_values(folder)["step"])


def read_values(folder: Path) -> dict[str, float]:
    """What was saved beside the tensors."""
    try:
        values = json.loads((folder / _VALUES_FILE).read_text())
        return {str(key): float(value) for key, value in values.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _unreadable(folder, error) from error


class _Reader(dcp.FileSystemReader):
    """PyTorch's reader, which would unpickle its index whatever it holds."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with Path(self.path, _INDEX_FILE).open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{_INDEX_FILE} holds no index of tensors")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _TYPES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise ValueError(f"{_INDEX_FILE} asks for {module}.{name}, which no index of tensors needs")


def _member(enumeration: Any, name: str) -> enum.Enum:
    """A member of an enumeration, which Python 3.11.2 (Debian 12's) keeps as getattr(enumeration, name)."""
    if not (isinstance(enumeration, type) and issubclass(enumeration, enum.Enum)):
        raise ValueError(f"{_INDEX_FILE} asks for {name} of {enumeration}, which no index of tensors needs")
    return enumeration[name]


@contextlib.contextmanager
def _one_process_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _unwritable(place: Path, error: BaseException) -> OSError:
    """PyTorch's writers tell of a full disk in ways of their own."""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return OSError(f"the training state {place} cannot be written ({said}); is there room on the disk?")


def _unreadable(place: Path, error: Exception) -> ValueError:
    return ValueError(
        f"the training state {place} cannot be read ({error}); delete it, or start anew with "
        "loop.resume=false"
    )
