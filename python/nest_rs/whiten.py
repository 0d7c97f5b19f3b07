"""Train the deltas in coordinates in which their inputs have unit variance.

A delta reads the residual stream, and the stream's variance lies in a few directions: in raw coordinates a gradient
step learns those first, and the directions that tell one request from another last. So the optimizer moves V, with
U = V A and A = (M + damping * mean eigenvalue)^(-1/2), M being the second moment of the layer's inputs over the
prompts' own tokens. What is trained, stored and folded is still U. The paper steps in raw coordinates (section 3.5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from nest_rs.prefix import shared_prefix
from nest_rs.reading import read_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nest_rs.sites import Site


def whitenings(
    model: PreTrainedModel,
    sites: Sequence[Site],
    ids: Sequence[list[int]],
    *,
    damping: float,
    pad: int,
    batch_tokens: int = 4096,
) -> dict[str, torch.Tensor]:
    """Run the prompts through the base and whiten the inputs of its sites.

    Args:
        model: The base, in eval mode.
        sites: Where deltas will be.
        ids: Token ids of each prompt. The opening that all share is left out of the moments.
        damping: Added to the eigenvalues, in units of their mean: directions below it count as noise.
        pad: Padding token.
        batch_tokens: Tokens a batch may hold, padding included.

    Returns:
        For each site's module, A [d_in, d_in] float32 on the model's device; the sites of a layer share one tensor.
    """
    layers = {site.module: site.layer for site in sites}
    first = {site.layer: site.module for site in reversed(sites)}  # the sites of a layer read the same input
    moments: dict[int, torch.Tensor] = {}

    def add(module: str, inputs: torch.Tensor, mask: torch.Tensor, _: list[int]) -> None:
        tokens, layer = inputs[mask].float(), layers[module]
        moment = tokens.T @ tokens
        moments[layer] = moments[layer] + moment if layer in moments else moment

    read_inputs(model, list(first.values()), ids, add, pad=pad, batch_tokens=batch_tokens)
    prefix = shared_prefix(ids)
    own = sum(len(row) - len(prefix) for row in ids)
    roots = {layer: _inverse_root(moment / own, damping) for layer, moment in moments.items()}
    return {site.module: roots[site.layer] for site in sites}


def _inverse_root(moment: torch.Tensor, damping: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(moment.double())
    # The mean leaves out the largest: one direction often holds most of the stream and says nothing of the rest.
    damped = values.clamp(min=0) + damping * values[:-1].mean()
    root: torch.Tensor = (vectors * damped.rsqrt()) @ vectors.T
    return root.float()


class WhitenedAdamW(torch.optim.AdamW):
    """AdamW on V for parameters U = V A, and on other parameters as they are.

    Args:
        params: As for `torch.optim.AdamW`.
        whitened: Those parameters U [k, d] that have an A [d, d], symmetric and positive definite.
        kwargs: As for `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        whitened: Mapping[torch.nn.Parameter, torch.Tensor],
        **kwargs: Any,
    ) -> None:
        super().__init__(params, **kwargs)
        self._whitening = dict(whitened)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step. V is part of the state, so that a resumed run repeats an unbroken one to the bit."""
        loss = closure() if closure else None
        moving = [(u, a) for u, a in self._whitening.items() if u.grad is not None]
        for u, a in moving:
            rows, gradient = _own_rows(u), _own_rows(u.grad)  # type: ignore[arg-type]
            gradient.copy_(gradient @ a)  # dL/dV
            rows.copy_(self.state[u].get("whitened") if u in self.state else torch.linalg.solve(a, rows.T).T)
        super().step()
        for u, a in moving:
            rows = _own_rows(u)
            self.state[u]["whitened"] = rows.detach().clone()
            rows.copy_(rows @ a)
        return loss


def _own_rows(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that FSDP2 may have sharded by rows; A works on each row alone."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
