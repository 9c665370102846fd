"""Write docs/reference/families.md: what is found in every model of the zoo.

::

    python -m tools.families
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from corp_onnx.blocks import Attention, Axis, Catalog, Mlp, axes_of, find_blocks
from corp_onnx.blocks.blockers import HINT
from corp_onnx.graph.model import from_proto
from tests import zoo_models

PAGE = Path(__file__).parent.parent / "docs/reference/families.md"
AXES: tuple[Axis, ...] = ("mlp", "qk", "vo")
TITLE = """\
# Families

What `inspect` finds in small models of every family below, drawn with random weights and written by
real exporters. *2 of 2* means that two blocks have the axis and both offer it; behind a `+` stands
how many more do with `--rotary`. Where one does not, the reason follows. `tools/families.py` writes
this page, and a test holds it to what is found.

Forms: `ts` is the TorchScript exporter and `dynamo` the newer one, each with its opset; behind a
`+` stands what was done to the file afterwards: fused by ONNX Runtime's transformer optimiser
(`fused`, `mha`), optimised by ONNX Runtime itself (`ort`), its weights rounded to four bits by
ONNX Runtime's quantiser (`nbits`), simplified by onnxslim (`slim`), brought to float16 (`fp16`), or
converted to another opset.

The same is found in what onnxslim and onnxsim make of these files, with dynamic and with fixed
sizes, in what ONNX Runtime saves at the levels `basic` and `extended`, and after conversion to
opset 24; `tests/converted.py` names the few exceptions, each with what the tool changed.

| model | forms | MLP | query-key | value-output | what is refused, and why |
|---|---|---|---|---|---|
"""


def page(catalog_of: Callable[[str, bool], Catalog]) -> str:
    """The whole page, from the catalog of every model by name, without and with ``--rotary``."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name in zoo_models.NAMES:
        module, _, form = name.partition(".")
        found = _cells(catalog_of(name, False), catalog_of(name, True))
        rows.setdefault((module, found), []).append(form)
    lines = [
        f"| {module.replace('_', ' ')} | {', '.join(sorted(forms))} | {cells} |"
        for (module, cells), forms in sorted(rows.items())
    ]
    return TITLE + "\n".join(lines) + "\n"


def _cells(catalog: Catalog, rotary: Catalog) -> str:
    shares = (_share(catalog, rotary, axis) for axis in AXES)
    return " | ".join([*shares, "; ".join(_reasons(catalog))])


def _share(catalog: Catalog, rotary: Catalog, axis: Axis) -> str:
    """How many of the blocks that might offer an axis do, and how many more if asked."""
    kind = Mlp if axis == "mlp" else Attention
    blocks, asked = (
        [block for block in each.blocks if isinstance(block, kind)] for each in (catalog, rotary)
    )
    offered, more = (sum(axis in axes_of(block) for block in each) for each in (blocks, asked))
    extra = f" + {more - offered}" if more > offered else ""
    return f"{offered}{extra} of {len(blocks)}" if blocks else "-"


def _reasons(catalog: Catalog) -> Iterable[str]:
    """Every reason once; of linear layers only where there is no MLP."""
    said = [
        f"{axis}: {_general(reason)}"
        for block in catalog.blocks
        for axis, reason in block.refused.items()
    ]
    has_mlp = any(isinstance(block, Mlp) for block in catalog.blocks)
    said += [
        f"{refusal.op}: {_general(refusal.reason)}"
        for refusal in catalog.refusals
        if refusal.op == "Softmax" or not (has_mlp or catalog.blocks)
    ]
    return dict.fromkeys(said)


def _general(reason: str) -> str:
    """A reason without the names of nodes and tensors, up to what is said of their sizes."""
    reason = reason.partition(", and its ")[0].removesuffix(HINT)
    return re.sub(r"'[^']*'", "a tensor of it", re.sub(r" ?\([^()]*\)", "", reason))


def main() -> None:
    """Look at every model and write the page."""

    def catalog(name: str, rotary: bool) -> Catalog:
        return find_blocks(from_proto(zoo_models.load(name)), rotary=rotary)

    text = page(catalog)
    PAGE.write_text(text, encoding="utf-8")
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
