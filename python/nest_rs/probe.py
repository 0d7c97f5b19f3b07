"""Read the feed-forward neurons while the model reads the prompts (paper section 3.2).

One forward pass a prompt in its chat form; each site's raw projection output, before the activation function, is
max-pooled over the prompt's own tokens, padding left out, and kept in a memory-mapped store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from nest_rs.errors import NestError
from nest_rs.files import replacing
from nest_rs.numeric import ActivationStore, pooled_stats
from nest_rs.prefix import behind_prefix, budgeted, prefix_cache, repeated, shared_prefix
from nest_rs.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nest_rs.sites import Site

_STORE_DTYPES: dict[torch.dtype, Literal["f32", "f16", "bf16"]] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}


def max_pool(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Maximum over the tokens that the mask keeps: [n, tokens, d], bool [n, tokens] -> [n, d], same dtype.

    On a CPU the Rust core streams through the tensor once; elsewhere torch does it on the device.
    """
    if values.device.type == "cpu":
        pooled = pooled_stats(values, mask).pooled
        # torch takes no bfloat16 from NumPy, only its bits
        bits = pooled.view(np.int16) if values.dtype == torch.bfloat16 else pooled
        return torch.from_numpy(bits).view(values.dtype)
    return values.masked_fill(~mask[..., None], float("-inf")).amax(dim=1)


def collect_activations(
    model: PreTrainedModel,
    sites: Sequence[Site],
    ids: Sequence[list[int]],
    path: Path,
    *,
    pad: int,
    batch_tokens: int = 4096,
) -> None:
    """Run the prompts through the model and write their pooled activations to `path`.

    Args:
        model: The base, in eval mode.
        sites: Where to read.
        ids: Token ids of each prompt; the store keeps this order. Sorted by length, batches waste the least.
        path: The store: one tensor [prompts, d_out] a site, in the model's dtype.
        pad: Padding token.
        batch_tokens: Tokens a batch may hold, padding included.

    Raises:
        NestError: a site's activations are not finite.
    """
    modules = dict(model.named_modules())
    mask = torch.empty(0)
    pooled: dict[str, torch.Tensor] = {}
    opening: dict[str, torch.Tensor] = {}
    prefix = shared_prefix(ids)

    def reader(module: str) -> Callable[..., None]:
        def read(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            try:
                seen = max_pool(output, mask)
            except ValueError as error:  # from the core; elsewhere _check_finite sees it
                raise _not_finite(module) from error
            pooled[module] = torch.maximum(seen, opening[module]) if module in opening else seen

        return read

    handles = [modules[site.module].register_forward_hook(reader(site.module)) for site in sites]
    widths = {site.module: site.d_out for site in sites}
    try:
        with (
            ActivationStore.create(path, widths, len(ids), dtype=_STORE_DTYPES[model.dtype]) as store,
            track("probe", total=len(ids), unit="prompts") as advance,
            torch.inference_mode(),
        ):
            first = torch.tensor([prefix], device=model.device)
            mask = torch.ones_like(first, dtype=torch.bool)
            cache = prefix_cache(model, first)
            opening.update(pooled)
            start = 0
            for batch in budgeted(ids, batch_tokens):
                tokens, mask, attended = behind_prefix(batch, prefix, pad, model.device)
                inputs = {"input_ids": tokens, "attention_mask": attended}
                model(**inputs, past_key_values=repeated(cache, len(batch)), logits_to_keep=1)
                for module, values in pooled.items():
                    _check_finite(module, values)
                    store.write(module, start, values.cpu())
                start += len(batch)
                advance(len(batch))
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(module: str, values: torch.Tensor) -> None:
    if not torch.isfinite(values).all():
        raise _not_finite(module)


def _not_finite(module: str) -> NestError:
    return NestError(f"the activations of `{module}` are not finite", mend="check the weights, or use --dtype float32")


def fit_probes(
    store: ActivationStore, harmful: NDArray[np.bool_], *, c: float, threads: int | None
) -> tuple[dict[str, NDArray[np.float64]], dict[str, float]]:
    """Fit one L2 logistic probe a site, to its optimum.

    Returns:
        Coefficients, float64 [d_out], and the accuracy on the probing prompts, by site.

    Raises:
        NestError: one class only, or activations that are not finite.
    """
    try:
        fitted = store.fit_probes(harmful, C=c, n_threads=threads)
    except ValueError as error:
        raise NestError(str(error)) from error
    coefs = {site: probe[0] for site, probe in fitted.items()}
    accuracy = {
        site: float(((store.read(site) @ coef + intercept > 0) == harmful).mean())
        for site, (coef, intercept) in fitted.items()
    }
    return coefs, accuracy


def save_probes(coefs: dict[str, NDArray[np.float64]], path: Path) -> None:
    """Write the coefficients, one float64 vector a site."""
    with replacing(path) as scratch:
        save_file(coefs, scratch)


def load_probes(path: Path, sites: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Read the coefficients in site order."""
    if not path.is_file():
        raise NestError(f"no probes at `{path}`", mend="run the probe stage first")
    coefs = load_file(path)
    return {site: coefs[site] for site in sites}
