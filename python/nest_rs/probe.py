"""Read the feed-forward neurons while the model reads the prompts (paper section 3.2).

One forward pass a prompt in its chat form; each site's raw projection output, before the activation function, is
max-pooled over the prompt's own tokens, padding left out, and kept in a memory-mapped store.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from nest_rs.errors import NestError
from nest_rs.files import replacing
from nest_rs.memory import halving
from nest_rs.numeric import ActivationStore, pooled_stats
from nest_rs.prefix import behind, behind_prefix, budgeted, prefix_cache, shared_prefix
from nest_rs.processes import is_main, share, wait
from nest_rs.progress import track
from nest_rs.reading import EnoughError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nest_rs.sites import Site

_STORE_DTYPES: dict[torch.dtype, Literal["f32", "f16", "bf16"]] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}


def max_pool(values: torch.Tensor, mask: torch.Tensor, whole: int = 0) -> torch.Tensor:
    """Maximum over the tokens that the mask keeps: [n, tokens, d], bool [n, tokens] -> [n, d], same dtype.

    On a CPU the Rust core streams through the tensor once; elsewhere it is `masked_max`.
    """
    if values.device.type == "cpu":
        pooled = pooled_stats(values, mask).pooled
        # torch takes no bfloat16 from NumPy, only its bits
        bits = pooled.view(np.int16) if values.dtype == torch.bfloat16 else pooled
        return torch.from_numpy(bits).view(values.dtype)
    return masked_max(values, mask, whole)


def masked_max(values: torch.Tensor, mask: torch.Tensor, whole: int = 0) -> torch.Tensor:
    """The same in torch, on any device.

    Args:
        values: What to pool.
        mask: Which tokens count.
        whole: Of how many first tokens it is known that all rows keep them; they are read once, without a mask.
    """
    parts = [values[:, :whole]] if whole else []
    if whole < values.shape[1]:
        parts.append(values[:, whole:].masked_fill(~mask[:, whole:, None], float("-inf")))
    return functools.reduce(torch.maximum, (part.amax(dim=1) for part in parts))


def collect_activations(
    model: PreTrainedModel,
    sites: Sequence[Site],
    ids: Sequence[list[int]],
    path: Path,
    *,
    pad: int,
    batch_tokens: int = 4096,
    base: str | None = None,
) -> None:
    """Run the prompts through the model and write their pooled activations to `path`.

    The layers run up to the last site and no further. Under `accelerate launch` the processes share the batches; as a
    batch is the same whoever runs it, so are the store's bits on like hardware.

    Args:
        model: The base, in eval mode.
        sites: Where to read.
        ids: Token ids of each prompt; the store keeps this order. Sorted by length, batches waste the least.
        path: The store: one tensor [prompts, d_out] a site, in the model's dtype.
        pad: Padding token.
        batch_tokens: Tokens a batch may hold, padding included; halved, with a warning, where memory runs out.
        base: Tells these weights from others. With it, an interrupted call's store is taken up where it stopped.

    Raises:
        NestError: a site's activations are not finite, or memory does not suffice for one prompt.
    """
    prefix = shared_prefix(ids)
    batches = list(budgeted(ids, batch_tokens))
    starts = list(accumulate(map(len, batches), initial=0))
    index, count = share()
    store, done = _take_up(path, sites, ids, model.dtype, f"{base} {batch_tokens}" if base else None)
    mine = [number for number in range(index, len(batches), count) if number not in done]
    with store, track("probe", total=sum(len(batches[number]) for number in mine), unit="prompts") as advance:

        def keep(number: int, arriving: Callable[[], dict[str, torch.Tensor]]) -> None:
            for module, values in arriving().items():
                try:
                    store.write(module, starts[number], values)
                except ValueError as error:
                    raise _not_finite(module) from error
            with _journal(path).open("a") as file:  # only now is the batch known to be read
                file.write(f"{number}\n")
            advance(len(batches[number]))

        # While an accelerator works on the next batch, a thread writes; a processor has no core to spare for one.
        with _Reader(model, sites, prefix, pad, batch_tokens) as reader, ThreadPoolExecutor(1) as writer:
            writing: Future[None] | None = None
            for number in mine:
                arriving = reader.read(batches[number])
                if model.device.type == "cpu":
                    keep(number, arriving)
                    continue
                if writing:
                    writing.result()
                writing = writer.submit(keep, number, arriving)
            if writing:
                writing.result()
        store.close()
    wait()
    if is_main():
        ActivationStore.resume(path).finish().close()
        _journal(path).unlink(missing_ok=True)
    wait()


def _journal(path: Path) -> Path:
    """Which batches an unfinished store holds: a number a line."""
    return path.with_name(f"{path.name}.batches")


def _take_up(
    path: Path, sites: Sequence[Site], ids: Sequence[list[int]], dtype: torch.dtype, base: str | None
) -> tuple[ActivationStore, set[int]]:
    """The unfinished store of the same work with the batches it holds, or a new one."""
    widths = {site.module: site.d_out for site in sites}
    work = hashlib.sha256(repr((base, widths, dtype, ids)).encode()).hexdigest()
    if is_main() and not (base and _is_unfinished(path, work)):
        _journal(path).write_text("")
        ActivationStore.create(path, widths, len(ids), dtype=_STORE_DTYPES[dtype], metadata={"work": work}).close()
    wait()
    whole_lines, _, _ = _journal(path).read_text().rpartition("\n")
    return ActivationStore.resume(path), {int(line) for line in whole_lines.split()}


def _is_unfinished(path: Path, work: str) -> bool:
    try:
        store = ActivationStore.resume(path)
    except (OSError, ValueError):
        return False
    try:
        return store.metadata.get("work") == work and _journal(path).is_file()
    finally:
        store.close()


class _Reader:
    """Hooks on the sites that pool what passes; a context manager, as they must come off again."""

    def __init__(
        self, model: PreTrainedModel, sites: Sequence[Site], prefix: Sequence[int], pad: int, batch_tokens: int
    ) -> None:
        self.model, self.prefix, self.pad, self.batch_tokens = model, prefix, pad, batch_tokens
        self.modules = {site.module: model.get_submodule(site.module) for site in sites}
        self.mask, self.whole = torch.ones(1, len(prefix), dtype=torch.bool, device=model.device), len(prefix)
        self.pooled: dict[str, torch.Tensor] = {}
        self.opening: dict[str, torch.Tensor] = {}
        self.enough = False
        self.cache: Any = None

    def __enter__(self) -> Self:
        self.handles = [
            module.register_forward_hook(partial(self._pool, name)) for name, module in self.modules.items()
        ]
        try:
            with torch.inference_mode():  # once, and to the end: all batches need the whole of its cache
                self.cache = prefix_cache(self.model, torch.tensor([self.prefix], device=self.model.device))
        except BaseException:
            self.__exit__()
            raise
        self.opening, self.enough = self.pooled, True
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _pool(self, name: str, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
        try:
            seen = max_pool(output, self.mask, self.whole)
        except ValueError as error:  # from the core; what an accelerator pools is looked at when it is stored
            raise _not_finite(name) from error
        self.pooled[name] = torch.maximum(seen, self.opening[name]) if name in self.opening else seen
        if self.enough and len(self.pooled) == len(self.modules):
            raise EnoughError

    def read(self, batch: Sequence[list[int]]) -> Callable[[], dict[str, torch.Tensor]]:
        """Start on a batch; what is returned waits for its pooled rows, one a prompt and site."""
        rows, self.batch_tokens = halving(partial(self._read, batch), self.batch_tokens, "tokens a batch")
        if self.model.device.type == "cpu":
            return partial(dict, rows)
        # One copy, into memory that the device can write by itself: from any other the host would wait for it.
        packed = torch.cat([values.flatten() for values in rows.values()])
        arriving = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True).copy_(packed, non_blocking=True)
        copied = torch.Event(self.model.device)
        copied.record()

        def arrived() -> dict[str, torch.Tensor]:
            copied.synchronize()
            parts = torch.split(arriving, [values.numel() for values in rows.values()])
            return {name: part.view(values.shape) for (name, values), part in zip(rows.items(), parts, strict=True)}

        return arrived

    @torch.inference_mode()
    def _read(self, batch: Sequence[list[int]], batch_tokens: int) -> dict[str, torch.Tensor]:
        parts = []
        for part in budgeted(batch, batch_tokens):
            tokens, self.mask, attended = behind_prefix(part, self.prefix, self.pad, self.model.device)
            self.whole = min(map(len, part)) - len(self.prefix)
            self.pooled = {}
            with suppress(EnoughError):
                self.model(
                    input_ids=tokens,
                    attention_mask=attended,
                    **behind(self.cache, len(part)),
                    use_cache=self.cache is not None,
                    logits_to_keep=1,
                )
            parts.append(self.pooled)
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts]) for name in self.modules}


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
