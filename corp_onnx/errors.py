"""Every error that corp_onnx raises on purpose.

::

    CorpError                    the user's business: shown without a traceback
    ├── GraphError               the model itself is not usable
    │   └── QuantisedModel       it is quantised already; prune first
    ├── DataError                the inputs do not fit the model, or are not usable
    │   └── TooFewSamples        fewer tokens than channels
    ├── PlanError                the request does not fit the model
    │   └── NothingPrunable      no block can be cut (exit status 3)
    ├── SolveError               the numbers do not support an answer
    │   └── IllConditioned
    ├── SurgeryError             an edit cannot be carried out on this graph
    ├── VerificationError        the result is not what was promised
    ├── OutputError              the result cannot be written
    └── BackendUnavailable       an optional runtime or package is missing

Anything else that escapes is our bug and keeps its traceback.
"""

from __future__ import annotations


class CorpError(Exception):
    """The root of every error raised on purpose: what was found, where, and what to do."""


class GraphError(CorpError):
    """The model file is not usable."""


class QuantisedModel(GraphError):
    """The model is quantised already."""


class DataError(CorpError):
    """The inputs do not fit the model, or hold nothing usable."""


class TooFewSamples(DataError):
    """The calibration set has fewer tokens than an axis has channels."""


class PlanError(CorpError):
    """The request does not fit the model."""


class NothingPrunable(PlanError):
    """No block of the model can be cut as asked."""


class SolveError(CorpError):
    """The statistics do not support an answer."""


class IllConditioned(SolveError):
    """A linear system is too close to singular."""


class SurgeryError(CorpError):
    """An edit cannot be carried out on this graph."""


class VerificationError(CorpError):
    """The result is not what was promised."""


class OutputError(CorpError):
    """The result cannot be written."""


class BackendUnavailable(CorpError):
    """An optional runtime or package is missing."""
