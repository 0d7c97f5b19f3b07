"""EleutherAI's evaluation harness, for the many tasks that it knows (the extra `lm-eval`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nest_rs.errors import NestError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Harness:
    """Tasks of the harness, found and fetched.

    Args:
        tasks: Names, or .yaml files of one's own.

    Raises:
        NestError: `lm_eval` is not installed, knows no such task, or cannot fetch its data.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise NestError(
                "--lm-eval needs `lm_eval`, which is not installed", mend="pip install 'nest-rs[lm-eval]'"
            ) from error
        self.tasks = list(tasks)
        # The index of its own tasks takes seconds; files need none.
        self._manager = TaskManager(include_defaults=not all(task.endswith(".yaml") for task in self.tasks))
        try:
            self._manager.load(self.tasks)
        except Exception as error:  # unknown name, bad file, no network: each means that it cannot be run
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise NestError(
                f"lm-eval cannot load {listed(self.tasks)} ({reason})",
                mend="see `lm-eval ls tasks`; their data come from the hub or its cache",
            ) from error

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        limit: int | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Run the tasks on a loaded model.

        Returns:
            By task (and group) the harness's metrics, each with its `_stderr`, and `n`, the questions asked.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=self.tasks,
            task_manager=self._manager,
            limit=limit,
            log_samples=False,
        )
        assert found is not None  # only another rank of a distributed run gets nothing
        asked = found["n-samples"]
        return {
            task: {
                **({"n": asked[task]["effective"]} if task in asked else {}),
                # "acc,none" is the metric and the filter of the answers; "none" filters nothing
                **{
                    key.removesuffix(",none"): value
                    for key, value in metrics.items()
                    if isinstance(value, (int, float))
                },
            }
            for task, metrics in found["results"].items()
        }
