"""What the machine is, and what else it is doing, while engines are timed on it."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TypeVar

import psutil

Found = TypeVar("Found")

WATCHED_S = 0.5
BUSY = 0.1
"""Share of the processor that others may use before it is mentioned."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA device: what it is, clock, power and temperature; None where it does not tell."""

    name: str
    clock_mhz: float | None
    power_w: float | None
    temperature_c: float | None
    memory_bytes: float | None
    """In use, by all processes."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """A machine at one moment; None where it does not tell.

    Attributes:
        processor: As it names itself.
        cores: That this process may use.
        busy: Share of the processor that was in use while this process rested, if it did.
        clock_mhz: Of the processor.
        temperature_c: The highest that is told.
        gpus: NVIDIA devices, where `nvidia-ml-py` is installed.
    """

    processor: str
    cores: int
    busy: float | None
    clock_mhz: float | None
    temperature_c: float | None
    gpus: tuple[Gpu, ...]


def read() -> Conditions:
    """The machine now; takes half a second, in which this process rests."""
    busy = psutil.cpu_percent(WATCHED_S) / 100
    return replace(glance(), busy=busy)


def glance() -> Conditions:
    """The same at once, without what others do."""
    clock = psutil.cpu_freq()
    told = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    heat = [sensor.current for group in told.values() for sensor in group]
    return Conditions(
        processor(),
        cores(),
        None,
        clock.current if clock else None,
        max(heat, default=None),
        _gpus(),
    )


def devices() -> tuple[str, ...]:
    """The processor and the NVIDIA devices, as they name themselves."""
    return processor(), *(gpu.name for gpu in _gpus())


def processor() -> str:
    """The processor, as it names itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 (no file of ours)
            names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """How many this process may use."""
    process = psutil.Process()
    allowed = process.cpu_affinity() if hasattr(process, "cpu_affinity") else ()  # none on macOS
    return len(allowed) or os.cpu_count() or 1


def own_device_bytes() -> int | None:
    """What this process holds on all NVIDIA devices; None where nothing tells."""
    return _summed(_of_devices(_held_by_this_process))


def _gpus() -> tuple[Gpu, ...]:
    return _of_devices(_gpu)


def _of_devices(look: Callable[[ModuleType, object], Found]) -> tuple[Found, ...]:
    """What is found out of every NVIDIA device; nothing without library or driver."""
    nvml = _nvml()
    if nvml is None:
        return ()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return ()  # no driver
    found = []
    try:
        for at in range(nvml.nvmlDeviceGetCount()):
            with contextlib.suppress(nvml.NVMLError):  # a device that is lost, or another's
                found.append(look(nvml, nvml.nvmlDeviceGetHandleByIndex(at)))
    finally:
        nvml.nvmlShutdown()
    return tuple(found)


def _gpu(nvml: ModuleType, device: object) -> Gpu:
    def told(ask: Callable[[], float]) -> float | None:
        try:
            return ask()
        except nvml.NVMLError:
            return None

    return Gpu(
        str(nvml.nvmlDeviceGetName(device)),
        told(lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)),
        told(lambda: nvml.nvmlDeviceGetPowerUsage(device) / 1000),
        told(lambda: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)),
        told(lambda: nvml.nvmlDeviceGetMemoryInfo(device).used),
    )


def _held_by_this_process(nvml: ModuleType, device: object) -> int | None:
    """None on another device, and where processes are numbered otherwise, as in containers."""
    processes = nvml.nvmlDeviceGetComputeRunningProcesses(device)
    held = [each.usedGpuMemory for each in processes if each.pid == os.getpid()]
    return _summed(held)


def _summed(told: Iterable[int | None]) -> int | None:
    """Of what was told; None if nothing was."""
    known = [each for each in told if each is not None]
    return sum(known) if known else None


def _nvml() -> ModuleType | None:
    """NVIDIA's management library, where one of the extras for GPUs brought it."""
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml  # type: ignore[no-any-return]
