"""The CUDA driver for the ray renderer: its source compiled for the GPU at hand, buffers, launches.

Compiled with NVRTC and launched through the driver API (`cuda.bindings`, which comes with torch), so that no
compiler, no torch and no OpenGL is needed in a process that renders. Holds the primary context, which torch
uses too; nothing is kept on disk.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emuworld.envs.rendering import rays
from emuworld.envs.rendering.cuda_scene import MAX_GEOMS, MAX_LEVELS
from emuworld.envs.rendering.lighting import MAX_LIGHTS

PARTS = ("shapes", "textures", "light", "kernels")
TILE = 8  # pixels a side that a block of threads draws
_CONSTANTS = {
    "TILE": TILE,
    "MAX_GEOMS": MAX_GEOMS,
    "MAX_LIGHTS": MAX_LIGHTS,
    "MAX_LEVELS": MAX_LEVELS,
    "PARTS": rays.PARTS,
}
# Division and roots to 2 units in the last place: no picture shows the difference.
OPTIONS = ("--std=c++17", "--prec-div=false", "--prec-sqrt=false", "--ftz=true")
_REMEDY = "use renderer=rays (any machine) or renderer=gl (OpenGL)"


def source() -> str:
    """The CUDA C++ source: constants, then all parts."""
    folder = Path(__file__).parent
    defined = "".join(f"#define {name} {value}\n" for name, value in _CONSTANTS.items())
    return defined + "".join((folder / f"cuda_{part}.cu").read_text(encoding="utf-8") for part in PARTS)


def compile_cubin(architecture: str) -> bytes:
    """Machine code for an architecture such as "sm_90". Needs NVRTC, but no GPU."""
    nvrtc = _bindings("nvrtc")
    try:
        made = nvrtc.nvrtcCreateProgram(source().encode(), b"emuworld_rays.cu", 0, [], [])
    except RuntimeError as error:  # there is no such library
        raise ValueError(
            f"renderer=cuda needs NVRTC (pip install nvidia-cuda-nvrtc; torch for CUDA brings it): {error}"
        ) from error
    program = _checked(nvrtc, made)
    options = [option.encode() for option in (*OPTIONS, f"--gpu-architecture={architecture}")]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(status):
        log = bytearray(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC could not compile the cuda renderer for {architecture}: {log.decode()}")
    cubin = bytearray(_checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
    _checked(nvrtc, nvrtc.nvrtcDestroyProgram(program))
    return bytes(cubin)


def _bindings(name: str) -> Any:
    """A module of cuda.bindings: imported here, for a machine without a GPU need not have it."""
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise ValueError(
            f"renderer=cuda needs the package cuda-bindings (pip install cuda-bindings; torch for CUDA "
            f"brings it along), and importing cuda.bindings.{name} failed: {error}. Else {_REMEDY}"
        ) from error


def _checked(module: ModuleType, answer: tuple[Any, ...]) -> Any:
    """What a driver or NVRTC call gave, without its status; raises where that is an error."""
    status, *values = answer
    if int(status):
        text = status.name
        if text.startswith("CUDA"):
            _, message = module.cuGetErrorString(status)
            text += f" ({message.decode() if message else 'no description'})"
        raise RuntimeError(f"the cuda renderer got {text} from the CUDA driver")
    return values[0] if len(values) == 1 else tuple(values)


class Program:
    """Kernels on one GPU, one stream, and what was allocated. Not for use by several threads at a time."""

    def __init__(self, names: Sequence[str], *, device: int = 0) -> None:
        self._driver = _bindings("driver")
        try:
            self._call("cuInit", 0)
            self._device = self._call("cuDeviceGet", device)
        except RuntimeError as error:  # without a driver the bindings raise a subclass of it
            raise ValueError(f"renderer=cuda found no usable NVIDIA GPU: {error} Else {_REMEDY}") from error
        attributes = self._driver.CUdevice_attribute
        major, minor = (
            self._call("cuDeviceGetAttribute", which, self._device)
            for which in (
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        cubin = compile_cubin(f"sm_{major}{minor}")
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._buffers: set[int] = set()
        self._pinned: set[int] = set()
        self._is_open = True
        self.enter()
        self._module = self._call("cuModuleLoadData", cubin)
        self._functions = {
            name: self._call("cuModuleGetFunction", self._module, name.encode()) for name in names
        }
        self._stream = self._call("cuStreamCreate", self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        # Waiting leaves the processor to others: many processes render beside one that trains.
        flags = self._driver.CUevent_flags
        self._event = self._call(
            "cuEventCreate", flags.CU_EVENT_BLOCKING_SYNC.value | flags.CU_EVENT_DISABLE_TIMING.value
        )

    def _call(self, name: str, *arguments: Any) -> Any:
        return _checked(self._driver, getattr(self._driver, name)(*arguments))

    def enter(self) -> None:
        """Make the context this thread's current one: another library may have changed it."""
        if not self._is_open:
            raise RuntimeError("this cuda renderer was closed; make a new one")
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, num_bytes: int) -> int:
        """Device memory; its address."""
        address = int(self._call("cuMemAlloc", max(num_bytes, 4)))
        self._buffers.add(address)
        return address

    def free(self, address: int) -> None:
        self._buffers.remove(address)
        self._call("cuMemFree", address)

    def pinned(self, num_bytes: int) -> NDArray[np.uint8]:
        """Host memory [num_bytes] that the GPU copies from and to by itself; zeros. Lives until `close`."""
        address = int(self._call("cuMemAllocHost", num_bytes))
        self._pinned.add(address)
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        array = np.frombuffer(memoryview(memory), np.uint8)
        array[:] = 0
        return array

    def free_pinned(self, array: NDArray[np.uint8]) -> None:
        """Free what `pinned` gave; the array must not be used any more."""
        self._pinned.remove(array.ctypes.data)
        self._call("cuMemFreeHost", array.ctypes.data)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy a contiguous array to the device, and wait."""
        assert array.flags.c_contiguous
        if array.nbytes:
            # On our stream: it does not wait for the default one, where a copy may be under way on return.
            self._call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, self._stream)
            self.wait()

    def send(self, address: int, pinned: NDArray[np.uint8], num_bytes: int) -> None:
        """Begin to copy the start of pinned memory to the device."""
        self._call("cuMemcpyHtoDAsync", address, pinned.ctypes.data, num_bytes, self._stream)

    def fetch(self, pinned: NDArray[np.uint8], address: int, num_bytes: int) -> None:
        """Begin to copy to the start of pinned memory."""
        self._call("cuMemcpyDtoHAsync", pinned.ctypes.data, address, num_bytes, self._stream)

    def launch(self, name: str, grid: tuple[int, int], block: tuple[int, int], arguments: Arguments) -> None:
        self._call(
            "cuLaunchKernel",
            self._functions[name],
            *grid,
            1,
            *block,
            1,
            0,
            self._stream,
            arguments.address,
            0,
        )

    def wait(self) -> None:
        """Until all that was begun is done."""
        self._call("cuEventRecord", self._event, self._stream)
        self._call("cuEventSynchronize", self._event)

    def close(self) -> None:
        """Free everything. Further calls do nothing."""
        if not self._is_open:
            return
        self.enter()
        self._is_open = False
        self._call("cuStreamSynchronize", self._stream)
        for address in self._buffers:
            self._call("cuMemFree", address)
        for address in self._pinned:
            self._call("cuMemFreeHost", address)
        self._call("cuEventDestroy", self._event)
        self._call("cuStreamDestroy", self._stream)
        self._call("cuModuleUnload", self._module)
        self._call("cuDevicePrimaryCtxRelease", self._device)


class Arguments:
    """A kernel's arguments, all of them addresses, in the form that the driver takes."""

    def __init__(self, addresses: Sequence[int]) -> None:
        self._values = (ctypes.c_void_p * len(addresses))(*addresses)
        first, step = ctypes.addressof(self._values), ctypes.sizeof(ctypes.c_void_p)
        self._pointers = (ctypes.c_void_p * len(addresses))(
            *(first + step * i for i in range(len(addresses)))
        )
        self.address = ctypes.addressof(self._pointers)
