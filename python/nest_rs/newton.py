"""A Gauss-Newton step after the gradient steps: the decision on many requests, fitted at once.

The deltas are so few numbers that every request's own gradient can be kept: a row of the Jacobian J each. The least
change of the deltas that brings the odds of refusing where they should be is then a ridge regression, solved in its
dual form by one n x n matrix. Gradient descent needs several times the passes for as much. The paper has nothing like
it; LoRA's J would be fifteen times as wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from nest_rs.memory import halving
from nest_rs.packing import is_packed
from nest_rs.prefix import budgeted
from nest_rs.teacher import CLEAR, refusal_odds
from nest_rs.train import Example, Steps, answer_logits, collate, on, training_attention
from nest_rs.tuner import NestLinear

if TYPE_CHECKING:
    from peft import PeftModel

# Windows of plain text that tell how much the base's predictions hang on each cluster, and the least such share: of no
# cluster is it known to be none.
_WINDOWS = 16
_LEAST = 0.05


@dataclass(frozen=True)
class _Layer:
    """A layer with deltas: the rows they move, which of them moves which row, and their coordinates.

    Attributes:
        module: The layer.
        delta: U, [k, d].
        rows: int64 [n].
        tie: T float32 [n, k], held as it is.
        whitening: A of `nest_rs.whiten`, [d, d]; the step is the least one in V, with U = V A.
    """

    module: NestLinear
    delta: torch.nn.Parameter
    rows: torch.Tensor
    tie: torch.Tensor
    whitening: torch.Tensor | None


def newton_step(
    model: PeftModel,
    steps: Steps,
    requests: Sequence[tuple[list[int], bool]],
    *,
    damping: float,
    bias: float = 0.0,
    whitening: Mapping[str, torch.Tensor] | None = None,
    batch_tokens: int = 2048,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Move the deltas of a model once, in place.

    A delta may move the less, the more the model's predictions of plain text hang on it: its coordinates are scaled by
    the Fisher information of its cluster.

    Args:
        model: A PEFT model with a `NestConfig` adapter, trained so far that it refuses by the steps' refusals.
        steps: What it was trained on.
        requests: Token ids in their chat form, and whether to refuse. Odds of 6 logits on the right side are wanted, of
            the first token and, where harmless answers may open with it too and the request is to be refused, of the
            others that all refusals begin with.
        damping: The ridge, in units of the mean squared length of J's rows.
        bias: Logits added to the odds that are wanted.
        whitening: As for `train_deltas`.
        batch_tokens: Tokens a batch may hold, padding included; fewer where memory runs out.
        progress: Called with the number of requests read.
    """
    refusals, kept = ([item.answer for part in steps.steps for item in part[kind]] for kind in ("harmful", "benign"))
    refusing = torch.unique(torch.tensor([answer[0] for answer in refusals])).to(model.device)
    # Zipping ends with the shortest, so those cut to their first token say nothing here; refusals that begin in several
    # ways open with any of them.
    whole = [answer for answer in refusals if len(answer) > 1]
    shared = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*whole, strict=False))
    opening = [tokens[0] for tokens in shared] or refusals[0][:1]
    layers = list(_layers(model, whitening))
    model.eval()
    with training_attention(model, steps):
        scale = _scale(model, layers, steps) if steps.texts else torch.ones(sum(map(_size, layers)))
        # A request is refused where the first token is. Where harmless answers open with it too, what follows has to
        # be "'m sorry" and not "'m glad to"; elsewhere one row a request tells all.
        aims = [(Example(ids, opening[:1]), refuse) for ids, refuse in requests]
        if opening[1:] and not {answer[0] for answer in kept}.isdisjoint(refusing.tolist()):
            aims += [(Example(ids, opening), refuse) for ids, refuse in requests if refuse]
        aims.sort(key=lambda aim: len(aim[0].prompt))

        def read(size: int) -> tuple[torch.Tensor, torch.Tensor]:
            some = aims[: len(next(budgeted([item.prompt + item.answer for item, _ in aims], size)))]
            answers = [item.answer for item, _ in some]
            batch = on(collate([item for item, _ in some], steps.pad, steps.prefix), model.device)
            value = partial(opening_odds, answers=answers, refusing=refusing)
            gradients, odds = _gradients(model, layers, batch, value)
            return gradients, _missing(odds, torch.tensor([refuse for _, refuse in some]), bias)

        # Filled in place: two of it would be the peak of the whole run.
        jacobian, missing = torch.empty(len(aims), len(scale)), torch.empty(len(aims))
        done = 0
        while aims:
            (gradients, lacking), batch_tokens = halving(read, batch_tokens, "tokens at a time")
            jacobian[done : done + len(lacking)], missing[done : done + len(lacking)] = gradients, lacking
            done += len(lacking)
            read_now, aims = aims[: len(lacking)], aims[len(lacking) :]
            progress(sum(len(item.answer) == 1 for item, _ in read_now))
    change = _ridge(jacobian.mul_(scale), missing, damping) * scale
    for layer, part in zip(layers, torch.split(change, [_size(layer) for layer in layers]), strict=True):
        moved = part.view(layer.delta.shape).to(layer.delta.device)
        layer.delta.data += moved if layer.whitening is None else moved @ layer.whitening


def opening_odds(logits: torch.Tensor, answers: Sequence[Sequence[int]], refusing: torch.Tensor) -> torch.Tensor:
    """By how much an opening's first token wins, or the least sure of the tokens that follow it.

    Args:
        logits: Of the answers' tokens, answer after answer, [tokens, vocabulary].
        answers: Tokens of an opening each, n of them; of one token, it is asked about that.
        refusing: Tokens with which refusals begin, int64 [r]; any of them counts as the first.

    Returns:
        `refusal_odds` of the first token, or the least logit - max(other logits) of the others, float32 [n].
    """
    logits, sizes = logits.float(), [len(answer) for answer in answers]
    tokens = torch.tensor([token for answer in answers for token in answer], device=logits.device)[:, None]
    sure = logits.gather(1, tokens)[:, 0] - logits.scatter(1, tokens, -torch.inf).amax(dim=1)
    starts = torch.tensor([0, *sizes[:-1]], device=logits.device).cumsum(dim=0)
    first = refusal_odds(logits[starts], refusing)
    following = torch.split(sure, sizes)
    return torch.stack(
        [rest[1:].amin() if rest[1:].numel() else own for own, rest in zip(first, following, strict=True)]
    )


def _layers(model: PeftModel, whitening: Mapping[str, torch.Tensor] | None) -> Iterator[_Layer]:
    for name, module in model.named_modules():
        if isinstance(module, NestLinear):
            (adapter,) = module.active_adapters
            a = next((a for path, a in (whitening or {}).items() if f".{name}".endswith(f".{path}")), None)
            yield _Layer(module, module.nest_delta[adapter], module.nest_rows[adapter], module.tie(adapter).detach(), a)


def _size(layer: _Layer) -> int:
    return layer.delta.numel()


def _missing(odds: torch.Tensor, refuse: torch.Tensor, bias: float) -> torch.Tensor:
    """Logits from the odds to clear ones on the right side, [n]; 0 where they are clearer."""
    return torch.where(refuse, (bias + CLEAR - odds).clamp(min=0), (bias - CLEAR - odds).clamp(max=0))


def _ridge(rows: torch.Tensor, wanted: torch.Tensor, damping: float) -> torch.Tensor:
    """The x of |rows x - wanted|^2 + damping * mean squared row * |x|^2 at its least, float32 [columns]."""
    gram = (rows @ rows.T).double()
    gram.diagonal().add_(damping * gram.diagonal().mean())
    weights: torch.Tensor = torch.linalg.solve(gram, wanted.double())
    return rows.T @ weights.float()


def _scale(model: PeftModel, layers: Sequence[_Layer], steps: Steps) -> torch.Tensor:
    """How far each coordinate may move: (Fisher information of its cluster on plain text, in means)^(-1/2), [columns].

    The information is a mean of squared gradients of the log-likelihood of tokens drawn from the model itself, with
    random signs within a window: their products vanish in the mean.
    """
    generator = torch.Generator(model.device).manual_seed(0)

    def drawn(logits: torch.Tensor) -> torch.Tensor:
        likely = logits.float().log_softmax(dim=-1)
        tokens = torch.multinomial(likely.detach().exp(), 1, generator=generator)
        signs = torch.randint(0, 2, tokens.shape, generator=generator, device=tokens.device) * 2 - 1
        return (likely.gather(1, tokens) * signs).sum(dim=0)

    squares = torch.zeros(sum(map(_size, layers)))
    for text in steps.texts[:_WINDOWS]:
        gradients, _ = _gradients(model, layers, on(collate([text], steps.pad), model.device), drawn)
        squares += gradients[0].square()
    parts = torch.split(squares, [_size(layer) for layer in layers])
    clusters = [part.view(layer.delta.shape).mean(dim=1) for layer, part in zip(layers, parts, strict=True)]
    mean = torch.cat(clusters).mean()
    shares = [
        cluster.div(mean).add(_LEAST)[:, None].expand(layer.delta.shape).flatten()
        for layer, cluster in zip(layers, clusters, strict=True)
    ]
    return torch.cat(shares).rsqrt()


def _gradients(
    model: PeftModel, layers: Sequence[_Layer], batch: dict[str, Any], value: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of one number a sequence in all deltas, by one backward pass: no sequence reads another.

    What a delta does through the prefix, which all sequences share, is left out.

    Returns:
        dvalue/dV, float32 [n, columns], layer after layer, and the values, float32 [n], both on the CPU.
    """
    seen: dict[int, list[torch.Tensor]] = {}

    def record(index: int, _: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen[index] = [inputs[0].detach()]  # a prefix of its own comes before the batch
        output.register_hook(seen[index].append)  # type: ignore[no-untyped-call]

    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.callback(layer.module.register_forward_hook(partial(record, index)).remove)
        (logits,) = answer_logits(model, batch)
        values = value(logits)
        torch.autograd.grad(values.sum(), [layer.delta for layer in layers])
    prefix = batch["prefix"].shape[1]
    mask = batch["attention_mask"][:, prefix:].bool()
    packed, count = is_packed(model), int(mask.sum())
    blocks = []
    for index, layer in enumerate(layers):
        x, gradient = (
            tensor[0, prefix : prefix + count] if packed else tensor.reshape(*mask.shape, -1)[mask]
            for tensor in seen[index]
        )
        by_cluster = gradient[:, layer.rows].float() @ layer.tie
        # Back to places, where a sequence's tokens are one row of a batched product.
        spread = [tensor.new_zeros(*mask.shape, tensor.shape[1]) for tensor in (by_cluster, x.float())]
        spread[0][mask], spread[1][mask] = by_cluster, x.float()
        block = spread[0].transpose(1, 2) @ spread[1]
        blocks.append((block if layer.whitening is None else block @ layer.whitening).flatten(1).cpu())
    return torch.cat(blocks, dim=1), values.detach().float().cpu()
