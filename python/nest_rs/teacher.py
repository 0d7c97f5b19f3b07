"""A small classifier on the base's own states as the teacher of the answer's first token.

Whether an answer refuses hangs on its first token, and each request is seen about once: labels alone teach a network
less than they teach a classifier that sees all requests many times, which then says of each how harmful it looks. The
deltas learn that number, a distillation, instead of the side alone; the paper has nothing like it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from nest_rs.errors import NestError
from nest_rs.reading import read_inputs
from nest_rs.sites import Site, find_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The shares of the model's layers at which the teacher reads, where topics are told apart best; its columns are
# standardised.
_DEPTHS = (1 / 3, 1 / 2, 2 / 3, 5 / 6)
# The classifiers, whose scores are averaged, and how each is trained.
_MEMBERS = 3
_HIDDEN = 128
_DROPOUT = (0.2, 0.5)  # of what is read, of the hidden layer
_EPOCHS = 12
_BATCH = 128
_RATE = 1e-3
_DECAY = 0.05
# Logits by which a typical request is to be decided, and beyond which a student may go.
_TYPICAL = 6.0
_LARGEST = 8.0


def harm_scores(
    model: PreTrainedModel, ids: Sequence[list[int]], harmful: Sequence[bool], *, pad: int
) -> NDArray[np.float32]:
    """How harmful each request looks to a classifier on the base's states, trained on these very requests.

    It reads the mean over a request's own tokens of what enters the feed-forward blocks at four depths, from a third to
    five sixths of the way up, and has one hidden layer: topics that are harmless in one frame and not in another are no
    half-spaces.

    Args:
        model: The base, in eval mode.
        ids: Token ids of the requests [n] in their chat form.
        harmful: Which of them are to be refused, [n], both kinds.
        pad: Padding token.

    Returns:
        Log-odds, float32 [n], scaled so that their mean size is that of a clear decision between two tokens (6 logits).

    Raises:
        NestError: what is read is not finite, or there is one kind of request only.
    """
    sites = _reading_points(model)
    means = {site.module: torch.empty(len(ids), site.d_in) for site in sites}

    def visit(module: str, states: torch.Tensor, mask: torch.Tensor, rows: list[int]) -> None:
        kept = mask[..., None].float()
        means[module][rows] = ((states.float() * kept).sum(dim=1) / kept.sum(dim=1)).cpu()

    read_inputs(model, list(means), ids, visit, pad=pad)
    features = torch.cat(list(means.values()), dim=1)
    if len(set(harmful)) < 2 or not features.isfinite().all():
        told = "are not finite" if len(set(harmful)) == 2 else "come from one kind of request"
        mend = "check the weights, or use --dtype float32" if "finite" in told else "give requests of both kinds"
        raise NestError(f"the inputs of `{sites[-1].module}` teach nothing (they {told})", mend=mend)
    spread, centre = torch.std_mean(features, dim=0, correction=0)
    scores = _classified((features - centre) / spread.clamp(min=1e-6), torch.tensor(harmful, dtype=torch.float32))
    scaled: NDArray[np.float32] = (scores * (_TYPICAL / scores.abs().mean())).numpy()
    return scaled


def _classified(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Log-odds of the rows of x [n, d] by classifiers trained on them and their labels y [n]; the seed is fixed."""
    scores = torch.zeros(len(x))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        for _ in range(_MEMBERS):
            hidden = nn.Linear(x.shape[1], _HIDDEN)
            net = nn.Sequential(
                nn.Dropout(_DROPOUT[0]),
                hidden,
                nn.GELU(),
                nn.Dropout(_DROPOUT[1]),
                nn.Linear(_HIDDEN, 1),
                nn.Flatten(0),
            )
            optimizer = torch.optim.AdamW(net.parameters(), lr=_RATE, weight_decay=_DECAY)
            count = _EPOCHS * -(-len(x) // _BATCH)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=count)
            for _ in range(_EPOCHS):
                for rows in torch.split(torch.randperm(len(x)), _BATCH):
                    optimizer.zero_grad()
                    loss = functional.binary_cross_entropy_with_logits(net(x[rows]), y[rows])
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    schedule.step()
            with torch.no_grad():
                scores += net.eval()(x) / _MEMBERS
    return scores


def _reading_points(model: PreTrainedModel) -> list[Site]:
    """A site at each depth; all sites of a layer read what enters its feed-forward block."""
    sites = find_sites(model)
    bottom, top = sites[0].layer, sites[-1].layer + 1
    nearest = (min(sites, key=lambda site: abs(site.layer - bottom - depth * (top - bottom))) for depth in _DEPTHS)
    return list({site.module: site for site in nearest}.values())


def refusal_odds(openings: torch.Tensor, refusing: torch.Tensor) -> torch.Tensor:
    """By how much a refusal wins: a greedy answer refuses where its first token has the largest logit of all.

    Args:
        openings: Logits of the first answer tokens, [n, vocabulary].
        refusing: Tokens with which refusals begin, int64 [r].

    Returns:
        logsumexp(refusing logits) - max(other logits), float32 [n].
    """
    openings = openings.float()
    return openings[:, refusing].logsumexp(dim=1) - openings.index_fill(1, refusing, -torch.inf).amax(dim=1)


def shortfall(odds: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """What is missing from the odds to the teacher's scores, in logits, [n].

    To be surer than a score of 8 on the right side is nothing missing.
    """
    wanted = scores.clamp(-_LARGEST, _LARGEST)
    beyond = ((wanted == _LARGEST) & (odds > wanted)) | ((wanted == -_LARGEST) & (odds < wanted))
    return torch.where(beyond, 0.0, wanted - odds)


def teacher_loss(openings: torch.Tensor, scores: torch.Tensor, refusing: torch.Tensor) -> torch.Tensor:
    """How far a model's own decision to refuse is from what the teacher says.

    Args:
        openings: Logits of the first answer tokens, [n, vocabulary].
        scores: The teacher's, in logits, float32 [n].
        refusing: Tokens with which refusals begin, int64 [r].

    Returns:
        Mean smooth L1 of the `shortfall` of the `refusal_odds`, float32.
    """
    missing = shortfall(refusal_odds(openings, refusing), scores)
    return functional.smooth_l1_loss(missing, torch.zeros_like(missing))
