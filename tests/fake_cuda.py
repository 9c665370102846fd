"""A CUDA runtime without a GPU that holds its callers to the rules.

Work is done when a stream is synchronised, and not before; memory is checked when it is used.
"""

from __future__ import annotations

import ctypes
import time
from enum import IntEnum
from types import ModuleType, SimpleNamespace


class Violation(AssertionError):
    """A call that the documentation forbids."""


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


class cudaDeviceAttr(IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


OK = cudaError_t.cudaSuccess


class Stream:
    """Work in order, done or captured later."""

    def __init__(self, number):
        self.number, self.queue, self.captured = number, [], None

    def __int__(self):
        return self.number

    def add(self, work):
        (self.queue if self.captured is None else self.captured).append(work)


class Graph:
    def __init__(self, work):
        self.work = work


class FakeCuda:
    """One device; ``module`` is what ``cuda.bindings.runtime`` is."""

    def __init__(self, *, devices=1, capability=(8, 6), memory_bytes=1 << 30):
        self.devices, self.capability, self.memory_bytes = devices, capability, memory_bytes
        self.memory, self.streams, self.events, self.graphs = {}, {}, [], []
        self.uncapturable = False
        self.module = ModuleType("cuda.bindings.runtime")
        for kind in (cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode, cudaDeviceAttr):
            setattr(self.module, kind.__name__, kind)
        for name in dir(self):
            if name.startswith("cuda"):
                setattr(self.module, name, getattr(self, name))
        self.module.fake = self

    def held(self):
        """Everything that was not given back."""
        return [*self.memory, *self.streams, *self.events, *self.graphs]

    def room(self, address, size):
        """See that memory is there, and as large."""
        if address not in self.memory:
            raise Violation(f"{address} is no memory of the device")
        if len(self.memory[address]) < size:
            raise Violation(f"{size} bytes in memory of {len(self.memory[address])}")

    def stream(self, stream):
        """A stream by itself or its number."""
        if int(stream) not in self.streams:
            raise Violation("no such stream")
        return self.streams[int(stream)]

    def cudaGetErrorName(self, error):
        return OK, error.name.encode()

    def cudaGetErrorString(self, error):
        return OK, b"what it means"

    def cudaGetDeviceCount(self):
        return (OK, self.devices) if self.devices else (cudaError_t.cudaErrorNoDevice, None)

    def cudaGetDeviceProperties(self, device):
        return OK, SimpleNamespace(name=b"Fake GPU")

    def cudaDeviceGetAttribute(self, attr, device):
        if not isinstance(attr, cudaDeviceAttr):
            raise Violation("an attribute is a cudaDeviceAttr")
        return OK, self.capability[attr - cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor]

    def cudaDriverGetVersion(self):
        return OK, 13000

    def cudaRuntimeGetVersion(self):
        return OK, 12060

    def cudaMalloc(self, size):
        if size <= 0:
            raise Violation("no bytes are no memory")
        if sum(map(len, self.memory.values())) + size > self.memory_bytes:
            return cudaError_t.cudaErrorMemoryAllocation, None
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return OK, ctypes.addressof(buffer)

    def cudaFree(self, devPtr):
        if self.memory.pop(devPtr, None) is None:
            raise Violation("memory given back twice, or never taken")
        return (OK,)

    def cudaMemcpyAsync(self, dst, src, count, kind, stream):
        if kind is cudaMemcpyKind.cudaMemcpyHostToDevice:
            self.room(dst, count)
        elif kind is cudaMemcpyKind.cudaMemcpyDeviceToHost:
            self.room(src, count)
        else:
            raise Violation("copies go from host to device or back")

        def work():
            self.room(dst if kind is cudaMemcpyKind.cudaMemcpyHostToDevice else src, count)
            ctypes.memmove(dst, src, count)

        self.stream(stream).add(work)
        return (OK,)

    def cudaStreamCreate(self):
        stream = Stream(1000 + len(self.streams))
        self.streams[stream.number] = stream
        return OK, stream

    def cudaStreamSynchronize(self, stream):
        found = self.stream(stream)
        if found.captured is not None:
            raise Violation("a stream that is captured cannot be waited for")
        while found.queue:
            found.queue.pop(0)()
        return (OK,)

    def cudaStreamDestroy(self, stream):
        del self.streams[self.stream(stream).number]
        return (OK,)

    def cudaEventCreate(self):
        self.events.append(SimpleNamespace(ms=None))
        return OK, self.events[-1]

    def cudaEventRecord(self, event, stream):
        event.ms = None
        self.stream(stream).add(lambda: setattr(event, "ms", time.perf_counter_ns() / 1e6))
        return (OK,)

    def cudaEventElapsedTime(self, start, end):
        if start.ms is None or end.ms is None:
            raise Violation("an event that has not happened has no time: synchronise first")
        return OK, end.ms - start.ms

    def cudaEventDestroy(self, event):
        self.events.remove(event)
        return (OK,)

    def cudaStreamBeginCapture(self, stream, mode):
        if not isinstance(mode, cudaStreamCaptureMode):
            raise Violation("a mode is a cudaStreamCaptureMode")
        self.stream(stream).captured = []
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        found = self.stream(stream)
        if found.captured is None:
            raise Violation("nothing is captured")
        work, found.captured = found.captured, None
        if self.uncapturable:
            return cudaError_t.cudaErrorStreamCaptureInvalidated, None
        self.graphs.append(Graph(work))
        return OK, self.graphs[-1]

    def cudaGraphInstantiate(self, graph, flags):
        self.graphs.append(Graph(graph.work))
        return OK, self.graphs[-1]

    def cudaGraphLaunch(self, graphExec, stream):
        if graphExec not in self.graphs:
            raise Violation("the graph was given back")
        for work in graphExec.work:
            self.stream(stream).add(work)
        return (OK,)

    def cudaGraphDestroy(self, graph):
        self.graphs.remove(graph)
        return (OK,)

    def cudaGraphExecDestroy(self, graphExec):
        self.graphs.remove(graphExec)
        return (OK,)
