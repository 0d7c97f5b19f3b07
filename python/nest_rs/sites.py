"""Where a model keeps its feed-forward neurons.

A site is one projection matrix whose output rows are neurons (paper section 3.2: the gate and up projections). A new
model family is one more line in `FAMILIES`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nest_rs.errors import NestError

if TYPE_CHECKING:
    from torch import nn

# Module paths, from the decoder layer down. The named groups are the layer number and the projection.
FAMILIES: dict[str, str] = {
    # Llama, Mistral, Qwen2/2.5/3, Gemma 1-3, SmolLM, OLMo, Granite, Cohere, StableLM, ...
    "gated": r"layers\.(?P<layer>\d+)\.mlp\.(?P<projection>gate_proj|up_proj)$",
    # Phi-3/4, GLM-4: one matrix, gate rows first, then up rows
    "fused": r"layers\.(?P<layer>\d+)\.mlp\.(?P<projection>gate_up_proj)$",
}


@dataclass(frozen=True, order=True)
class Site:
    """One feed-forward projection.

    Attributes:
        layer: Decoder layer, from 0.
        projection: `gate_proj`, `up_proj` or the fused `gate_up_proj`.
        module: Full module path; the checkpoint tensor is `<module>.weight`.
        d_out: Number of neurons (rows).
        d_in: Width of a row (the model's hidden size).
    """

    layer: int
    projection: str
    module: str
    d_out: int
    d_in: int

    @property
    def tensor(self) -> str:
        """The checkpoint tensor that holds the rows."""
        return f"{self.module}.weight"


def find_sites(
    model: nn.Module, projections: tuple[str, ...] = ("gate", "up"), depth: tuple[float, float] = (0.0, 1.0)
) -> list[Site]:
    """List a model's sites in layer order.

    Args:
        model: A transformers causal language model.
        projections: Which of `gate` and `up` to use; a fused matrix holds both.
        depth: Between which shares of the layers to look, from 0 (the first) to 1.

    Raises:
        NestError: no module of the model has a known feed-forward name, or none lies within `depth`.
    """
    from torch import nn

    patterns = [re.compile(pattern) for pattern in FAMILIES.values()]
    found = []
    for name, module in model.named_modules():
        match = next((match for pattern in patterns if (match := pattern.search(name))), None)
        if match is None or not isinstance(module, nn.Linear):
            continue
        projection = match["projection"]
        if projection != "gate_up_proj" and projection.removesuffix("_proj") not in projections:
            continue
        found.append(Site(int(match["layer"]), projection, name, module.out_features, module.in_features))
    if not found:
        raise NestError(
            f"no feed-forward sites in a model of class `{type(model).__name__}`",
            mend=f"known layouts are {', '.join(FAMILIES)} (see nest_rs.sites.FAMILIES)",
        )
    layers = 1 + max(site.layer for site in found)
    within = [site for site in sorted(found) if depth[0] <= site.layer / layers < depth[1]]
    if not within:
        raise NestError(f"no layer of {layers} lies between `{depth[0]}` and `{depth[1]}`", mend="widen --depth")
    return within
