"""A linear probe of the base as the teacher of the answer's first token.

Whether an answer refuses hangs on its first token, and each request is seen about once: labels alone teach a network
less than they teach a logistic regression on the base's own states, which then says of each request how harmful it
looks. The deltas learn that number, a distillation, instead of the side alone; the paper has nothing like it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from nest_rs.errors import NestError
from nest_rs.numeric import LogisticProbe
from nest_rs.reading import read_inputs
from nest_rs.sites import Site, find_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The shares of the model's layers at which the teacher reads, where topics are told apart best; its columns are
# standardised.
_DEPTHS = (1 / 3, 1 / 2, 2 / 3, 5 / 6)
_C = 0.01
# Logits by which a typical request is to be decided, and beyond which a student may go.
CLEAR = 6.0
_LARGEST = 8.0


def harm_scores(
    model: PreTrainedModel, ids: Sequence[list[int]], harmful: Sequence[bool], *, pad: int, threads: int | None = None
) -> NDArray[np.float32]:
    """How harmful each request looks to a logistic probe of the base, fitted to these very requests.

    The probe reads the mean over a request's own tokens of what enters the feed-forward blocks at four depths, from a
    third to five sixths of the way up.

    Args:
        model: The base, in eval mode.
        ids: Token ids of the requests [n] in their chat form.
        harmful: Which of them are to be refused, [n], both kinds.
        pad: Padding token.
        threads: Of the fit.

    Returns:
        Signed distances from the probe's boundary, float32 [n], scaled so that their mean size is that of a clear
        decision between two tokens (6 logits).

    Raises:
        NestError: what the probe reads is not finite, or there is one kind of request only.
    """
    sites = _reading_points(model)
    means = {site.module: torch.empty(len(ids), site.d_in) for site in sites}

    def visit(module: str, states: torch.Tensor, mask: torch.Tensor, rows: list[int]) -> None:
        kept = mask[..., None].float()
        means[module][rows] = ((states.float() * kept).sum(dim=1) / kept.sum(dim=1)).cpu()

    read_inputs(model, list(means), ids, visit, pad=pad)
    features = torch.cat(list(means.values()), dim=1)
    spread, centre = torch.std_mean(features, dim=0, correction=0)
    standard = ((features - centre) / spread.clamp(min=1e-6)).numpy()
    labels = np.asarray(harmful, dtype=bool)
    try:
        scores = LogisticProbe(C=_C, n_threads=threads).fit(standard, labels).decision_function(standard)
    except ValueError as error:
        mend = "check the weights, or use --dtype float32"
        raise NestError(f"the inputs of `{sites[-1].module}` teach nothing ({error})", mend=mend) from error
    scaled: NDArray[np.float32] = (scores * (CLEAR / np.abs(scores).mean())).astype(np.float32)
    return scaled


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


def teacher_loss(openings: torch.Tensor, scores: torch.Tensor, refusing: torch.Tensor) -> torch.Tensor:
    """How far a model's own decision to refuse is from what the teacher says.

    To be surer than a score of 8 on the right side costs nothing.

    Args:
        openings: Logits of the first answer tokens, [n, vocabulary].
        scores: The teacher's, in logits, float32 [n].
        refusing: Tokens with which refusals begin, int64 [r].

    Returns:
        Mean smooth L1 distance of the `refusal_odds` from the scores, float32.
    """
    odds = refusal_odds(openings, refusing)
    wanted = scores.clamp(-_LARGEST, _LARGEST)
    beyond = ((wanted == _LARGEST) & (odds > wanted)) | ((wanted == -_LARGEST) & (odds < wanted))
    return functional.smooth_l1_loss(torch.where(beyond, wanted, odds), wanted)
