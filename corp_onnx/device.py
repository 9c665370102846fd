"""Where sums and systems are computed: with NumPy on the host, or with CuPy on a CUDA device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
from array_api_compat import array_namespace, is_cupy_array, is_numpy_namespace
from array_api_compat import device as place_of
from array_api_compat import numpy as numpy_namespace

from corp_onnx.errors import BackendUnavailable

Array = Any
"""An array of any namespace of the array API standard; mypy knows no type for these."""

DeviceName = Literal["cpu", "cuda"]
DEVICES: tuple[DeviceName, ...] = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Device:
    """A place to compute, known by the namespace of its arrays.

    Records between stages hold NumPy arrays. What is heavy takes them to the device once, computes
    in the namespace that it finds in its arrays, and brings the result back once.

    Attributes:
        name: As ``--device`` names it.
        xp: Array namespace, by the array API standard.
    """

    name: str
    xp: ModuleType

    @property
    def is_host(self) -> bool:
        """Whether its arrays are NumPy's."""
        return bool(is_numpy_namespace(self.xp))

    @property
    def workers(self) -> int:
        """How many systems to solve side by side: on a device one fills it, and its memory."""
        return (os.cpu_count() or 1) if self.is_host else 1

    def asarray(self, values: np.ndarray) -> Array:
        """An array of the host on this device; on the host, the array itself."""
        return self.xp.asarray(values)


HOST = Device("cpu", numpy_namespace)


def device_of(name: DeviceName) -> Device:
    """The device that ``--device`` names.

    Raises:
        BackendUnavailable: If CuPy or a CUDA device is missing.
    """
    return HOST if name == "cpu" else Device(name, _cupy())


def to_host(array: Array) -> np.ndarray:
    """A NumPy array of what a device holds; of a NumPy array, the array itself."""
    values: np.ndarray = array.get() if is_cupy_array(array) else np.asarray(array)
    return values


def beside(values: np.ndarray, other: Array) -> Array:
    """An array of the host in the namespace, and on the device, of another array."""
    if isinstance(other, np.ndarray):
        return values
    return array_namespace(other).asarray(values, device=place_of(other))


def _cupy() -> ModuleType:
    """CuPy as a namespace of the standard, or an error that says how to get it, or a device."""
    try:
        import cupy
        from array_api_compat import cupy as namespace
    except ImportError as error:
        raise BackendUnavailable(
            "--device cuda needs CuPy; install it with `pip uninstall -y onnxruntime`, then "
            "`pip install 'corp_onnx[gpu]'`"
        ) from error
    if not cupy.cuda.is_available():
        raise BackendUnavailable(
            f"CuPy {cupy.__version__} finds no CUDA device that it can use; `nvidia-smi` says "
            "whether there is one and what CUDA its driver supports (the gpu extra needs 13); "
            "without one leave out --device cuda"
        )
    return namespace
