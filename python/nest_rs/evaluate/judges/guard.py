"""A guard model as a judge."""

from __future__ import annotations

from collections.abc import Sequence

from nest_rs.evaluate.generate import complete
from nest_rs.evaluate.judges import Verdict
from nest_rs.evaluate.judges.families import family_of
from nest_rs.models import load_model, load_tokenizer, pick_device, pick_dtype, resolve


class GuardJudge:
    """Asks a guard model of a known family about each answer, greedily.

    Args:
        model: A hub id or folder whose name tells the family.
        device: As for any model.
        dtype: As for any model.
        batch_size: Answers judged together.

    Raises:
        NestError: the name tells no family, or the model cannot be had.
    """

    def __init__(self, model: str, *, device: str, dtype: str, batch_size: int) -> None:
        self.name = f"guard:{model}"
        self.family = family_of(model)
        self.base = resolve(model)
        self.tokenizer = load_tokenizer(self.base.folder, chat=self.family.chat)
        self._device, self._dtype, self._batch_size = pick_device(device), dtype, batch_size

    def judge(self, asked: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """A verdict for each answer; unknown where the guard cannot be understood or the answer is too long for it."""
        texts = [
            self.family.texts(self.tokenizer, request, answer) for request, answer in zip(asked, answers, strict=True)
        ]
        model = load_model(self.base.folder, device=self._device, dtype=pick_dtype(self._dtype, self._device))
        said = iter(
            complete(
                model,
                self.tokenizer,
                [text for parts in texts for text in parts],
                max_new_tokens=self.family.max_new_tokens,
                batch_size=self._batch_size,
                label=self.family.name,
            )
        )
        return [self.family.read([next(said) or "" for _ in parts]) for parts in texts]
