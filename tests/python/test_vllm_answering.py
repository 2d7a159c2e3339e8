"""What vLLM is asked for, and what becomes of its answers. The engine is a stand-in where vLLM is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distillation.errors import RunError, UsageError
from distillation.prompts import Prompt
from distillation.stream import Draw
from distillation.vllm_answering import SampledByVLLM, engine_of, log_probs_of

from .conftest import EOS, VOCABULARY, tiny_model, tiny_tokenizer, tiny_words

DRAWS = [Draw(i, Prompt([3 + i], "")) for i in range(6)]


class Engine:
    """vllm.LLM as far as it is used, by vLLM 0.32's names: an answer is the prompt, its seed's remainder, the end."""

    stale: tuple[str, ...] = ()  # weights that a reload forgets

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.model = tiny_model("llama")  # its head is not tied
        self.loads = 0

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        assert method == "reload_weights"
        given = dict(kwargs["weights_iterator"])
        own = self.model.state_dict()
        assert given.keys() == own.keys()
        kept = self.stale if self.loads else ()
        self.model.load_state_dict({name: own[name] if name in kept else given[name] for name in own})
        self.loads += 1

    def generate(self, prompts: Sequence[Any], parameters: Sequence[Any], use_tqdm: bool) -> list[Any]:
        self.asked = list(parameters)
        answers = []
        for prompt, asked in zip(prompts, parameters, strict=True):
            before = prompt["prompt_token_ids"]
            ids = [*before, 3 + asked.seed % 30, EOS][: asked.max_tokens]
            with torch.no_grad():
                log_probs = self.model(torch.tensor([before + ids])).logits[0].log_softmax(-1)
            of_ids = [{i: SimpleNamespace(logprob=float(log_probs[len(before) - 1 + k, i]))} for k, i in enumerate(ids)]
            answers.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids), logprobs=of_ids)]))
        return answers


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace, __version__="0.0")
    monkeypatch.setitem(sys.modules, "vllm", module)
    yield
    engine_of.cache_clear()


def answering(tied: bool = False, **options: Any) -> SampledByVLLM:
    student, teacher = tiny_model("llama", tie_word_embeddings=tied), tiny_model("gpt2")
    given = {"max_new_tokens": 3, "vocab_size": VOCABULARY, "start": "folder", "eos_ids": [EOS], "longest": 9}
    return SampledByVLLM(student, teacher, tiny_tokenizer(tiny_words()), seed=0, memory=0.25, **{**given, **options})


def changed(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("tied", [False, True])
def test_each_step_is_sampled_from_the_weights_of_its_beginning(tied: bool) -> None:
    answer = answering(tied)
    for _ in range(2):
        [completion, *_] = answer(DRAWS)
        assert completion.log_probs is not None
        assert completion.log_probs == pytest.approx(log_probs_of(answer.student, completion).tolist(), abs=1e-4)
        logits = answer.student(torch.tensor([completion.prompt + completion.ids])).logits[0].log_softmax(-1)
        last = len(completion.prompt) + len(completion.ids) - 2
        assert completion.log_probs[-1] == pytest.approx(float(logits[last, completion.ids[-1]].detach()), abs=1e-4)
        changed(answer.student)
    options = answer.engine.options
    assert options["enable_prefix_caching"] is False and options["model"] == "folder"
    assert options["gpu_memory_utilization"] == 0.25 and options["dtype"] == "float32"


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("stale", ["lm_head.weight", "model.layers.0.mlp.down_proj.weight"])
def test_an_engine_that_keeps_old_weights_is_refused(stale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "stale", (stale,))
    answer = answering()
    answer(DRAWS)
    changed(answer.student)
    with pytest.raises(RunError, match=r"vllm 0.0 does not sample from the student's weights.*nats away"):
        answer(DRAWS)


@pytest.mark.usefixtures("stand_in")
def test_the_students_of_two_objectives_share_an_engine() -> None:
    first, second = answering(), answering()
    assert first.engine is second.engine
    changed(second.student)
    for answer in (first, second, first):
        found = answer(DRAWS)[0]
        assert found.log_probs == pytest.approx(log_probs_of(answer.student, found).tolist(), abs=1e-4)


@pytest.mark.usefixtures("stand_in")
def test_completions_belong_to_their_draws() -> None:
    answer = answering()
    found = answer(DRAWS)
    assert [completion.prompt for completion in found] == [draw.prompt.ids for draw in DRAWS]
    assert all(completion.ended and completion.ids[-1] == EOS for completion in found)
    asked = answer.engine.asked
    assert len({parameters.seed for parameters in asked}) == len(DRAWS)
    assert {(p.temperature, p.top_p, p.top_k, p.max_tokens) for p in asked} == {(1.0, 1.0, 0, 3)}
    assert asked[0].stop_token_ids == [EOS] and asked[0].allowed_token_ids is None
    again = [completion for start in (0, 3) for completion in answer(DRAWS[start : start + 3])]
    assert again == found
    cut = answering(max_new_tokens=2, vocab_size=VOCABULARY - 1)
    assert not any(completion.ended for completion in cut(DRAWS))
    assert cut.engine.asked[0].allowed_token_ids == list(range(VOCABULARY - 1))


@pytest.mark.usefixtures("stand_in")
def test_the_teacher_answers_its_share_by_generate() -> None:
    answer = answering(off_policy_fraction=0.5)
    by_teacher = [answer.for_teacher(draw) for draw in DRAWS]
    assert 0 < sum(by_teacher) < len(DRAWS)
    found = answer(DRAWS)
    assert len(answer.engine.asked) == len(DRAWS) - sum(by_teacher)
    assert [completion.prompt for completion in found] == [draw.prompt.ids for draw in DRAWS]


def test_without_vllm_the_option_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match=r"--rollout-engine.*vllm cannot be imported here.*leave it 'generate'"):
        answering()
