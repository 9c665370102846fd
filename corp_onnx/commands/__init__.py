"""Every command as a record of its arguments; calling it does the work and gives the answer."""

from corp_onnx.commands.bench import Bench
from corp_onnx.commands.build import Build
from corp_onnx.commands.calibrate import Calibrate, Merge
from corp_onnx.commands.demo import Demo
from corp_onnx.commands.export import Export
from corp_onnx.commands.imported import Imported, are_times
from corp_onnx.commands.inspect import Inspect
from corp_onnx.commands.prune import Prune
from corp_onnx.commands.records import Answer, Progress, Source
from corp_onnx.commands.sweep import Sweep
from corp_onnx.commands.verify import Verify

__all__ = [
    "Answer",
    "Bench",
    "Build",
    "Calibrate",
    "Demo",
    "Export",
    "Imported",
    "Inspect",
    "Merge",
    "Progress",
    "Prune",
    "Source",
    "Sweep",
    "Verify",
    "are_times",
]
