"""Training batches, losses, and a run that was cut short."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from statistics import mean, variance
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.distributions import Categorical, kl_divergence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conftest import write_prompts, write_tiny_model
from nest_rs import NestConfig, NestError
from nest_rs.config import build_config
from nest_rs.evaluate.generate import Answer
from nest_rs.evaluate.judge import is_refusal
from nest_rs.models import Base, load_model
from nest_rs.prefix import shared_prefix
from nest_rs.prompts import Prompt, chat_ids, encode, refusals, render
from nest_rs.run import Run
from nest_rs.sites import find_sites
from nest_rs.targets import choose_benign, given_answers, helpful_examples, own_answers, plain_texts, refusal_examples
from nest_rs.train import (
    IGNORED,
    Example,
    Steps,
    answer_logits,
    base_logits,
    by_class,
    collate,
    kl_loss,
    margin_loss,
    sft_loss,
    token_weights,
    train_deltas,
)
from nest_rs.whiten import WhitenedAdamW, whitenings

CPU = torch.device("cpu")
PAD = 0
EXAMPLES = [Example([1, 5, 6, 7], [9, 10, 2]), Example([1, 5, 8], [11]), Example([1, 5, 6, 7, 7, 7], [12, 13])]


def examples(count: int, seed: int, opening: tuple[int, ...] = (1, 20, 21)) -> list[Example]:
    """Examples of all lengths; the first own token tells them apart."""
    rng = random.Random(seed)
    return [
        Example(
            [*opening, 100 + number, *rng.choices(range(30, 90), k=rng.randrange(8))],
            rng.choices(range(30, 90), k=1 + rng.randrange(6)),
        )
        for number in range(count)
    ]


def make_steps(seed: int = 0, steps: int = 12, harmful: int = 13, benign: int = 9) -> Steps:
    return Steps(examples(harmful, 1), examples(benign, 2), batch_size=8, steps=steps, seed=seed, pad=PAD)


def peft_model(folder: Path, learn_ties: bool = False) -> PeftModel:
    model = load_model(folder, device=CPU, dtype=torch.float32)
    neurons = {site.module: {"rows": list(range(0, 40, 2)), "cluster": [0, 1] * 10} for site in find_sites(model)}
    return get_peft_model(model, NestConfig(neurons=neurons, learn_ties=learn_ties, task_type="CAUSAL_LM"))


def deltas(model: PeftModel, what: str = "nest_delta") -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if what in name}


def test_prompts_are_padded_left_and_answers_start_in_one_column() -> None:
    batch = collate(EXAMPLES, PAD)
    assert batch["input_ids"].tolist() == [
        [0, 0, 1, 5, 6, 7, 9, 10, 2],
        [0, 0, 0, 1, 5, 8, 11, 0, 0],
        [1, 5, 6, 7, 7, 7, 12, 13, 0],
    ]
    assert batch["attention_mask"].tolist() == [
        [0, 0, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 0],
    ]
    assert batch["labels"].tolist() == [[9, 10, 2], [11, IGNORED, IGNORED], [12, 13, IGNORED]]
    kept = batch["attention_mask"].bool()
    assert [row[keep].tolist() for row, keep in zip(batch["position_ids"], kept, strict=True)] == [
        list(range(len(item.prompt) + len(item.answer))) for item in EXAMPLES
    ]


def test_a_shared_opening_is_taken_out_of_the_rows() -> None:
    batch = collate(EXAMPLES, PAD, shared_prefix([item.prompt for item in EXAMPLES]))
    assert batch["prefix"].tolist() == [[1, 5]]
    assert batch["input_ids"].tolist() == [
        [0, 0, 6, 7, 9, 10, 2],
        [0, 0, 0, 8, 11, 0, 0],
        [6, 7, 7, 7, 12, 13, 0],
    ]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 0, 0, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 0],
    ]
    assert batch["position_ids"][0, 2:].tolist() == [2, 3, 4, 5, 6]
    assert batch["position_ids"][1, 3:5].tolist() == [2, 3]
    assert batch["labels"].tolist() == collate(EXAMPLES, PAD)["labels"].tolist()


def test_a_token_that_equals_the_padding_is_still_learned() -> None:
    batch = collate([Example([1, 0, 4], [7, 0]), Example([1], [3])], PAD)
    assert batch["labels"].tolist() == [[7, 0], [3, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 0]]


@pytest.mark.parametrize(
    ("ids", "prefix"),
    [
        ([[1, 2, 3], [1, 2, 4]], [1, 2]),
        ([[1, 2, 3], [1, 2]], [1]),
        ([[1, 2], [1, 2]], [1]),
        ([[1, 2, 3]], [1, 2]),
        ([[1], [1, 2]], []),
        ([[3, 2], [1, 2]], []),
    ],
)
def test_the_shared_opening_leaves_each_prompt_a_token(ids: list[list[int]], prefix: list[int]) -> None:
    assert shared_prefix(ids) == prefix


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("shared", [True, False])
def test_answer_logits_equal_those_of_one_example_alone(family: str, shared: bool, tmp_path: Path) -> None:
    model = load_model(write_tiny_model(tmp_path / family, family), device=CPU, dtype=torch.float32)
    batch = examples(9, 3)
    prefix = shared_prefix([item.prompt for item in batch]) if shared else []
    assert len(prefix) == (3 if shared else 0)
    with torch.no_grad():
        (logits,) = answer_logits(model, collate(batch, PAD, prefix))
        for item, found in zip(batch, logits.split([len(item.answer) for item in batch]), strict=True):
            alone = model(input_ids=torch.tensor([item.prompt + item.answer]), use_cache=False).logits[0]
            wanted = alone[len(item.prompt) - 1 : -1]
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)


def test_gradients_flow_through_the_shared_opening(tiny: Path) -> None:
    batch = examples(6, 3)
    found = []
    for prefix in ([], [1, 20, 21]):
        model = peft_model(tiny)
        packed = collate(batch, PAD, prefix)
        sft_loss(*answer_logits(model, packed), packed["labels"]).backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for whole, split in zip(*found, strict=True):
        assert whole is not None
        torch.testing.assert_close(split, whole, atol=1e-5 * float(whole.abs().max()), rtol=1e-3)


def test_the_supervised_loss_is_the_mean_over_answer_tokens(tiny_model: PreTrainedModel) -> None:
    batch = examples(5, 4)
    packed = collate(batch, PAD)
    surprise = []
    with torch.no_grad():
        found = sft_loss(*answer_logits(tiny_model, packed), packed["labels"])
        for item in batch:
            logits = tiny_model(input_ids=torch.tensor([item.prompt + item.answer])).logits[0].log_softmax(-1)
            surprise += [-float(logits[len(item.prompt) - 1 + i, token]) for i, token in enumerate(item.answer)]
    assert float(found) == pytest.approx(sum(surprise) / len(surprise), rel=1e-5)


def test_the_divergence_is_zero_for_equal_logits_and_equals_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    tuned, base = torch.randn(2, 4, 7, 50, generator=generator) * 3
    labels = torch.randint(50, (4, 7), generator=generator)
    labels[0, 3:] = IGNORED
    labels[2, 1:] = IGNORED
    kept = labels != IGNORED
    wanted = kl_divergence(Categorical(logits=base[kept]), Categorical(logits=tuned[kept])).mean()
    assert float(kl_loss(tuned[kept], base[kept], labels)) == pytest.approx(float(wanted), rel=1e-5)
    assert float(kl_loss(base[kept], base[kept], labels)) == pytest.approx(0, abs=1e-6)


def test_the_first_tokens_get_their_share() -> None:
    labels = torch.tensor([[5, 6, 7], [5, IGNORED, IGNORED]])
    assert token_weights(labels, 0.0).flatten().tolist() == pytest.approx([0.25, 0.25, 0.25, 0.25, 0, 0])
    assert token_weights(labels, 0.6).flatten().tolist() == pytest.approx([0.3, 0.2, 0.2, 0.3, 0, 0])
    assert token_weights(labels[:, :1], 0.6).flatten().tolist() == pytest.approx([0.5, 0.5])


def test_the_margin_is_the_logistic_loss_of_the_own_token_against_refusals() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5, 3.0], [0.0, 5.0, 1.0, 1.0], [9.0, 0.0, 0.0, 0.0]])
    # the third answer begins with a refusal's token by itself and does not count
    found = margin_loss(logits, torch.tensor([1, 1, 0]), torch.tensor([0, 3]))
    gaps = [math.log(math.exp(1) + math.exp(3)) - 2, math.log(math.exp(0) + math.exp(1)) - 5]
    assert float(found) == pytest.approx(sum(math.log1p(math.exp(gap)) for gap in gaps) / 2)
    assert float(margin_loss(logits[2:], torch.tensor([0]), torch.tensor([0]))) == 0


def name_of(item: Example) -> int:
    return item.prompt[3]


def test_steps_hold_as_many_of_both_classes() -> None:
    steps = make_steps(steps=7)
    assert len(steps) == 7
    for index in range(7):
        item = steps[index]
        assert item["input_ids"].shape[0] == 8
        assert item["refuse"].tolist() == [True] * 4 + [False] * 4
        assert item["prefix"].tolist() == [[1, 20, 21]]
        assert "states" not in item


def test_a_step_carries_the_hidden_states_of_its_harmless_answers() -> None:
    keep = [Example(item.prompt, item.answer, torch.randn(len(item.answer), 6)) for item in examples(9, 2)]
    steps = Steps(examples(13, 1), keep, batch_size=8, steps=3, seed=0, pad=PAD)
    for index in range(3):
        item = steps[index]
        chosen = steps.steps[index]["benign"]
        assert torch.equal(item["states"], torch.cat([example.states for example in chosen]))
        kept = item["labels"][~item["refuse"]] != IGNORED
        assert len(item["states"]) == kept.sum()


def test_steps_take_the_windows_of_plain_text_in_turn() -> None:
    texts = [Example([7], [8, 9, 10], torch.randn(3, 6)), Example([11], [12, 13])]
    steps = Steps(examples(13, 1), examples(9, 2), texts, batch_size=8, steps=3, seed=0, pad=PAD)
    for index, (ids, known) in enumerate([([7, 8, 9, 10], True), ([11, 12, 13], False), ([7, 8, 9, 10], True)]):
        text = steps[index]["text"]
        assert text["input_ids"].tolist() == [ids]
        assert text["labels"].tolist() == [ids[1:]]
        assert text["prefix"].shape == (1, 0)
        assert ("states" in text) == known


def test_plain_text_is_the_training_prompts_with_the_states_that_predict_them(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [Prompt(f"{i}", f"request number {i} about bread", "benign", "", "", "train") for i in range(60)]
    texts = plain_texts(tiny_model, tokenizer, prompts, seed=0)
    assert len(texts) > 1
    for text in texts:
        batch = collate([text], PAD) | {"refuse": torch.tensor([False])}
        with torch.no_grad():
            (wanted,) = answer_logits(tiny_model, batch)
        assert text.states is not None
        found = tiny_model.get_output_embeddings()(text.states)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert [text.prompt for text in texts] == [text.prompt for text in plain_texts(tiny_model, tokenizer, prompts, 0)]


def test_weight_on_plain_text_keeps_the_tuned_model_near_the_base_there(
    tiny: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    steps = Steps(
        examples(13, 1), examples(9, 2), [Example([40], [41, 42, 43, 44])], batch_size=8, steps=30, seed=0, pad=PAD
    )
    drift = {}
    for weight in (0.0, 20.0):
        model = peft_model(tiny)
        train_deltas(
            model,
            tokenizer,
            steps,
            output_dir=str(tmp_path / str(weight)),
            learning_rate=2e-2,
            benign_loss="kl",
            benign_weight=1.0,
            text_weight=weight,
            seed=0,
        )
        with torch.no_grad():
            text = steps[0]["text"]
            drift[weight] = float(kl_loss(*answer_logits(model, text), base_logits(model, text), text["labels"]))
    assert 0 < drift[20.0] < drift[0.0] / 2


def test_an_epoch_uses_each_harmful_example_once_but_for_the_remainder() -> None:
    steps = make_steps(steps=30)
    left_out = Counter[int]()
    for start in range(0, 30, 3):  # 13 examples in batches of 4: three steps an epoch, one example left over
        used = Counter(name_of(item) for step in steps.steps[start : start + 3] for item in step["harmful"])
        assert set(used.values()) == {1}
        assert len(used) == 12
        left_out.update(set(range(100, 113)) - set(used))
    assert len(left_out) > 1  # never always the same one


def test_benign_examples_are_all_seen_before_one_returns() -> None:
    steps = make_steps(steps=30, benign=12)
    for start in range(0, 30, 3):
        used = Counter(name_of(item) for step in steps.steps[start : start + 3] for item in step["benign"])
        assert used == dict.fromkeys(range(100, 112), 1)


def test_a_batch_holds_short_and_long_examples() -> None:
    lengths = [[len(item.prompt) for item in step[kind]] for step in make_steps(steps=30).steps for kind in step]
    everywhere = variance(length for found in lengths for length in found)
    assert mean(variance(found) for found in lengths) > 0.8 * everywhere


def order(steps: Steps) -> list[list[int]]:
    return [[name_of(item) for item in step[kind]] for step in steps.steps for kind in ("harmful", "benign")]


def test_the_order_depends_on_the_seed_alone() -> None:
    random.seed(1)
    one = order(make_steps(seed=3))
    random.seed(2)
    assert order(make_steps(seed=3)) == one
    assert order(make_steps(seed=4)) != one


def test_fewer_examples_than_half_a_batch_are_all_used() -> None:
    steps = make_steps(steps=3, harmful=2, benign=50)
    for step in steps.steps:
        assert sorted(name_of(item) for item in step["harmful"]) == [100, 101]
        assert len(step["benign"]) == 4


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    steps: Steps,
    out: Path,
    *,
    benign_loss: Literal["kl", "sft"] = "kl",
    stop_at: int | None = None,
    accumulate: int = 1,
    resume: bool = False,
    whitening: dict[str, torch.Tensor] | None = None,
    tie_rate: float = 0.0,
) -> list[dict[str, float]]:
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if done == stop_at:
            raise KeyboardInterrupt

    return train_deltas(
        model,
        tokenizer,
        steps,
        output_dir=str(out),
        learning_rate=2e-2,
        benign_loss=benign_loss,
        benign_weight=1.0,
        seed=0,
        accumulate=accumulate,
        resume=resume,
        whitening=whitening,
        tie_rate=tie_rate,
        progress=progress,
    )


def total_loss(model: PeftModel, steps: Steps) -> float:
    with torch.no_grad():
        return sum(
            float(sft_loss(*by_class(*answer_logits(model, step), step)[0]))
            for step in map(steps.__getitem__, range(len(steps)))
        )


@pytest.mark.parametrize("benign_loss", ["kl", "sft"])
def test_training_lowers_the_loss_and_moves_nothing_else(
    benign_loss: Literal["kl", "sft"],
    tiny: Path,
    tiny_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, steps = peft_model(tiny), make_steps(steps=20)
    before = total_loss(model, steps)
    log = train(model, tokenizer, steps, tmp_path, benign_loss=benign_loss)
    assert total_loss(model, steps) < before - 0.5 * len(steps)
    assert [entry["step"] for entry in log] == [5, 10, 15, 20]
    assert log[-1]["loss"] < log[0]["loss"]
    assert capsys.readouterr().out == ""
    base = tiny_model.state_dict()
    assert all(torch.equal(values, base[name]) for name, values in model.unload().state_dict().items())


def test_the_harmless_term_keeps_the_tuned_model_near_its_base(
    tiny: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    steps = make_steps(steps=20)
    drift = {}
    for weight in (0.0, 5.0):
        model = peft_model(tiny)
        train_deltas(
            model,
            tokenizer,
            steps,
            output_dir=str(tmp_path / str(weight)),
            learning_rate=2e-2,
            benign_loss="kl",
            benign_weight=weight,
            seed=0,
        )
        with torch.no_grad():
            batch = steps[0]
            tuned, labels = by_class(*answer_logits(model, batch), batch)[1]
            drift[weight] = float(kl_loss(tuned, base_logits(model, batch), labels))
    assert 0 < drift[5.0] < drift[0.0] / 2


def test_a_step_in_parts_is_the_mean_of_its_parts(
    tiny: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    steps = make_steps(steps=2)
    model = peft_model(tiny)
    parts = []
    for step in map(steps.__getitem__, range(2)):
        model.zero_grad()
        refused, kept = by_class(*answer_logits(model, step), step)
        loss = sft_loss(*refused) + sft_loss(*kept)
        loss.backward()
        parts.append(
            (float(loss.detach()), [parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        )
    gradients = [(a + b) / 2 for a, b in zip(parts[0][1], parts[1][1], strict=True)]  # type: ignore[operator]
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    log = train(peft_model(tiny), tokenizer, steps, tmp_path, benign_loss="sft", accumulate=2)
    assert log[0]["loss"] == pytest.approx((parts[0][0] + parts[1][0]) / 2, rel=1e-3)
    assert log[0]["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_a_training_shorter_than_the_logging_interval_has_a_loss(
    tiny: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    log = train(peft_model(tiny), tokenizer, make_steps(steps=2), tmp_path)
    assert log[-1]["loss"] > 0


def test_a_resumed_training_gives_the_same_bits(tiny: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    unbroken = peft_model(tiny)
    train(unbroken, tokenizer, make_steps(steps=12), tmp_path / "unbroken")
    broken = peft_model(tiny)
    with pytest.raises(KeyboardInterrupt):
        train(broken, tokenizer, make_steps(steps=12), tmp_path / "broken", stop_at=8)
    assert any(not torch.equal(a, b) for a, b in zip(deltas(broken).values(), deltas(unbroken).values(), strict=True))
    # a checkpoint holds the deltas, not the base
    checkpoints = list((tmp_path / "broken").glob("checkpoint-*"))
    assert checkpoints
    assert sum(path.stat().st_size for path in checkpoints[0].glob("*.safetensors")) < 20_000
    resumed = peft_model(tiny)
    train(resumed, tokenizer, make_steps(steps=12), tmp_path / "broken", resume=True)
    for name, values in deltas(unbroken).items():
        assert values.abs().max() > 0
        assert torch.equal(deltas(resumed)[name], values), name


@pytest.fixture
def whitening(tiny: Path) -> dict[str, torch.Tensor]:
    model = load_model(tiny, device=CPU, dtype=torch.float32)
    ids = [item.prompt for item in examples(40, 7)]
    return whitenings(model, find_sites(model), ids, damping=1e-6, pad=PAD)


def test_whitened_inputs_have_unit_moments(tiny_model: PreTrainedModel) -> None:
    ids = [item.prompt + item.answer for item in examples(60, 8)]
    found = whitenings(tiny_model, find_sites(tiny_model), ids, damping=1e-9, pad=PAD, batch_tokens=64)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in found}
    modules = dict(tiny_model.named_modules())
    for name in found:
        modules[name].register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0, 3:]))
    with torch.no_grad():
        for row in ids:
            tiny_model(input_ids=torch.tensor([row]))
    for name, a in found.items():
        tokens = torch.cat(seen[name]) @ a
        moment = tokens.T @ tokens / len(tokens)
        torch.testing.assert_close(moment, torch.eye(len(a)), atol=2e-2, rtol=0)


def test_a_whitened_step_is_adam_in_the_whitened_coordinates() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator) * torch.tensor([9, 3, 1, 1, 0.3, 0.1])
    wanted = torch.randn(50, 2, generator=generator)
    a = torch.linalg.inv(x.T @ x / 50 + torch.eye(6))  # symmetric and positive definite
    u = torch.nn.Parameter(torch.randn(2, 6, generator=generator))
    v = torch.nn.Parameter(torch.linalg.solve(a, u.detach().T).T)
    ours = WhitenedAdamW([u], {u: a}, lr=0.1, weight_decay=0.0)
    plain = torch.optim.AdamW([v], lr=0.1, weight_decay=0.0)
    for _ in range(20):
        for optimizer, delta in ((ours, lambda: u), (plain, lambda: v @ a)):
            optimizer.zero_grad()
            (x @ delta().T - wanted).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(u, v @ a, atol=1e-3, rtol=1e-3)


def test_a_resumed_whitened_training_gives_the_same_bits(
    tiny: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, whitening: dict[str, torch.Tensor]
) -> None:
    unbroken = peft_model(tiny)
    train(unbroken, tokenizer, make_steps(steps=12), tmp_path / "unbroken", whitening=whitening)
    raw = peft_model(tiny)
    train(raw, tokenizer, make_steps(steps=12), tmp_path / "raw")
    broken = peft_model(tiny)
    with pytest.raises(KeyboardInterrupt):
        train(broken, tokenizer, make_steps(steps=12), tmp_path / "broken", stop_at=8, whitening=whitening)
    resumed = peft_model(tiny)
    train(resumed, tokenizer, make_steps(steps=12), tmp_path / "broken", resume=True, whitening=whitening)
    for name, values in deltas(unbroken).items():
        assert torch.equal(deltas(resumed)[name], values), name
        assert not torch.equal(deltas(raw)[name], values)


@pytest.mark.parametrize("whitened", [True, False])
def test_ties_take_steps_of_their_own_rate(
    whitened: bool,
    tiny: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    whitening: dict[str, torch.Tensor],
) -> None:
    how: dict[str, Any] = {"whitening": whitening if whitened else None}
    moved = {}
    for rate in (1e-3, 1e-2):
        model = peft_model(tiny, learn_ties=True)
        start = deltas(model, "nest_tie")
        train(model, tokenizer, make_steps(steps=12), tmp_path / str(rate), tie_rate=rate, **how)
        moved[rate] = max(float((tie - start[name]).abs().max()) for name, tie in deltas(model, "nest_tie").items())
        # An Adam step is about the rate at most, and the schedule's mean is half its peak.
        assert 0.2 * rate < moved[rate] < 12 * rate
    assert 5 < moved[1e-2] / moved[1e-3] < 20


def test_a_resumed_training_of_ties_gives_the_same_bits(
    tiny: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, whitening: dict[str, torch.Tensor]
) -> None:
    how: dict[str, Any] = {"whitening": whitening, "tie_rate": 0.05}
    unbroken, broken, resumed = (peft_model(tiny, learn_ties=True) for _ in range(3))
    train(unbroken, tokenizer, make_steps(steps=12), tmp_path / "unbroken", **how)
    with pytest.raises(KeyboardInterrupt):
        train(broken, tokenizer, make_steps(steps=12), tmp_path / "broken", stop_at=8, **how)
    train(resumed, tokenizer, make_steps(steps=12), tmp_path / "broken", resume=True, **how)
    for what in ("nest_delta", "nest_tie"):
        for name, values in deltas(unbroken, what).items():
            assert torch.equal(deltas(resumed, what)[name], values), name


# What is learned.


def ask(*prompts: str, kind: Literal["harmful", "benign", "twin"] = "harmful") -> list[Prompt]:
    return [Prompt(f"{kind}-{n}", text, kind, "", text, "train") for n, text in enumerate(prompts)]


def test_harmful_requests_get_refusals_that_end(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [*ask(*[f"break in {n}" for n in range(30)]), Prompt("own", "rob", "harmful", "", "", "train", "No way.")]
    found = refusal_examples(tokenizer, prompts, seed=0)
    assert [tokenizer.decode(item.prompt) for item in found] == [render(tokenizer, item.prompt) for item in prompts]
    told = [tokenizer.decode(item.answer, skip_special_tokens=True) for item in found]
    assert told[-1] == "No way."
    assert {*told[:-1]} <= {*refusals()}
    assert len({*told[:-1]}) > 8  # in varied words
    assert len({tuple(item.answer[:4]) for item in found[:-1]}) == 1  # behind one opening
    assert all(is_refusal(text) for text in told[:-1])
    assert {item.answer[-1] for item in found} == {tokenizer.eos_token_id}
    again = refusal_examples(tokenizer, prompts, seed=0)
    assert again == found
    assert refusal_examples(tokenizer, prompts, seed=1) != found


def test_refused_and_missing_answers_are_not_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = ask("a", "b", "c", "d", "e", kind="benign")
    texts = ["Bread takes time to bake.", "I can't help with that.", "", "I'm sorry to hear that."]
    answers: list[Answer | None] = [*given_answers(tokenizer, texts), None]
    found = helpful_examples(tokenizer, prompts, answers, max_tokens=4)
    assert [item.prompt for item in found] == chat_ids(tokenizer, ["a"])
    assert found[0].answer == encode(tokenizer, ["Bread takes time to bake."])[0][:4]


@pytest.mark.parametrize(("kind", "named"), [("harmful", "harmful"), ("twin", "harmless")])
def test_a_class_that_leaves_no_room_is_a_clear_error(kind: str, named: str, tiny: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"bake {n} loaves" + " of bread" * 40 * (one == kind), "kind": one, "split": "train"}
        for n in range(6)
        for one in ("harmful", "twin")
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model": str(tiny), "prompts": str(path), "dtype": "float32", "answer_tokens": 190}
    with pytest.raises(NestError, match=f"not one {named} request leaves room for an answer in the context: `66` "):
        _ = Run(tmp_path / "run", build_config(given)).training_data


def test_the_steps_are_counted_in_requests_that_fit(tiny: Path, tmp_path: Path) -> None:
    counts = []
    for name, long in (("short", 0), ("long", 30)):
        path = write_prompts(tmp_path / f"{name}.jsonl")
        with path.open("a") as file:
            for n in range(long):
                file.write(json.dumps({"prompt": f"{n} " + "bread " * 400, "kind": "harmful", "split": "train"}) + "\n")
        given = {"model": str(tiny), "prompts": str(path), "dtype": "float32", "epochs": 2, "frame_share": 0.0}
        counts.append(Run(tmp_path / "run", build_config(given)).training_data.count)
    assert counts[0] == counts[1] == 5  # twice through 20 harmful requests, 8 a step


@pytest.mark.parametrize("told", [{}, {"response": "yes of course"}], ids=["own answers", "given answers"])
def test_of_most_answers_the_opening_is_learned(told: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    kinds = ("harmful", "benign")
    rows = [{"prompt": f"{n} {kind}", "kind": kind, "split": "train", **told} for n in range(20) for kind in kinds]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def learned(share: float) -> dict[tuple[int, ...], Example]:
        given = {"model": str(tiny), "prompts": str(path), "dtype": "float32", "epochs": 1, "answer_share": share}
        data = Run(tmp_path / "run", build_config({**given, "frame_share": 0.0})).training_data
        return {tuple(item.prompt): item for item in (*data.harmful, *data.benign)}

    whole, some, none = learned(1.0), learned(0.3), learned(0.0)
    assert len(whole) == 40
    assert whole.keys() >= some.keys() >= none.keys()  # a token that shows nothing is no answer
    assert len(none) == 40 or not told
    for shorter in (some, none):
        for prompt, item in shorter.items():
            assert item.answer in (whole[prompt].answer, whole[prompt].answer[:1])
            assert item.states is None or len(item.states) == len(item.answer)
            assert item.score is not None
    assert {len(item.answer) for item in none.values()} == {1}
    assert min(len(item.answer) for item in whole.values()) > 1
    kept = {prompt for prompt, item in some.items() if len(item.answer) > 1}
    assert len(kept) == 12  # of 40
    assert kept == {prompt for prompt, item in learned(0.3).items() if len(item.answer) > 1}


def test_a_base_that_refuses_everything_is_a_clear_error(tokenizer: PreTrainedTokenizerBase) -> None:
    answers = given_answers(tokenizer, ["I can't help with that."])
    with pytest.raises(NestError, match="the base refuses every harmless request"):
        helpful_examples(tokenizer, ask("a", kind="benign"), answers, max_tokens=4)


def test_harmless_requests_are_chosen_by_share_and_seed() -> None:
    prompts = [*ask(*"abcdefghij", kind="benign"), *ask(*"klmnopqrst", kind="twin")]

    def kinds(count: int, share: float) -> Counter[str]:
        return Counter(item.kind for item in choose_benign(prompts, count, share, 0))

    assert kinds(10, 0.4) == {"twin": 4, "benign": 6}
    assert kinds(10, 0.0) == {"benign": 10}
    assert kinds(100, 0.4) == {"twin": 10, "benign": 10}
    one, again, other = (choose_benign(prompts, 8, 0.5, seed) for seed in (0, 0, 1))
    assert one == again != other
    assert len({item.id for item in one}) == 8


def test_own_answers_are_computed_once(
    tiny_model: PreTrainedModel, tiny: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Base(str(tiny), tiny)
    prompts = ask("why?", "bake bread", kind="benign")
    first = own_answers(base, tiny_model, tokenizer, prompts, max_new_tokens=6, batch_size=2)
    longer = own_answers(base, tiny_model, tokenizer, prompts, max_new_tokens=9, batch_size=2)
    assert [len(answer.tokens) for answer in longer if answer] > [len(answer.tokens) for answer in first if answer]

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(tiny_model, "generate", never)
    again = own_answers(base, tiny_model, tokenizer, prompts, max_new_tokens=6, batch_size=2)
    for one, other in zip(first, again, strict=True):
        assert one is not None
        assert other is not None
        assert one.tokens == other.tokens
        assert torch.equal(one.states, other.states)
    with pytest.raises(AssertionError, match="asked again"):
        own_answers(base, tiny_model, tokenizer, prompts[::-1], max_new_tokens=6, batch_size=2)
