"""LMHead.from_model on every family of transformers: the model's own logits, or a refusal with its reason."""

from __future__ import annotations

import re

import pytest
import torch

from eopd_kernels import LMHead
from eopd_kernels.heads.from_model import INEXPRESSIBLE, PLAIN, TRANSFORMS, VERIFIED
from tests.conftest import relative_error
from tests.heads.tiny_models import built, logits_of, seen

transformers = pytest.importorskip("transformers")

INSIDE = r"has its output layer inside a \w+, which may change the hidden states first"
NOT_LINEAR = r"has a \w+ as its output layer, which is not nn.Linear"
NO_EMBEDDINGS = "has no output embeddings"
REFUSED = {
    **{name: re.escape(why) for name, why in INEXPRESSIBLE.items()},
    "BertGenerationDecoder": INSIDE,
    "BertLMHeadModel": INSIDE,
    "BigBirdForCausalLM": INSIDE,
    "BlipForConditionalGeneration": NO_EMBEDDINGS,
    "CamembertForCausalLM": INSIDE,
    "Data2VecTextForCausalLM": INSIDE,
    "DoryForCausalLM": NOT_LINEAR,
    "ErnieForCausalLM": INSIDE,
    "IdeficsForVisionText2Text": NOT_LINEAR,
    "MegatronBertForCausalLM": INSIDE,
    "MusicgenForCausalLM": NOT_LINEAR,
    "MusicgenMelodyForCausalLM": NOT_LINEAR,
    "ReformerModelWithLMHead": INSIDE,
    "RemBertForCausalLM": INSIDE,
    "RoCBertForCausalLM": INSIDE,
    "RoFormerForCausalLM": INSIDE,
    "RobertaForCausalLM": INSIDE,
    "RobertaPreLayerNormForCausalLM": INSIDE,
    "XLMRobertaForCausalLM": INSIDE,
    "XLMRobertaXLForCausalLM": INSIDE,
    "XLMWithLMHeadModel": INSIDE,
    "XmodForCausalLM": INSIDE,
}
NEEDS_IMAGES = "its forward takes no text alone"
NEEDS_TIMM = "its images need timm"
TOO_LARGE = "parts of it cannot be made small"
CHECKED_SIZES = "its parts check their sizes against each other"
SKIPPED = {
    "Apertus1p5ForConditionalGeneration": CHECKED_SIZES,
    "Blip2ForConditionalGeneration": NEEDS_IMAGES,
    "DeepseekOcr2ForConditionalGeneration": CHECKED_SIZES,
    "DiffusionGemmaForBlockDiffusion": "it predicts blocks, not the next token",
    "Dots3NoteForConditionalGeneration": CHECKED_SIZES,
    "FastVlmForConditionalGeneration": NEEDS_TIMM,
    "Florence2ForConditionalGeneration": CHECKED_SIZES,
    "FunAsrNanoForConditionalGeneration": CHECKED_SIZES,
    "Glm5NextForConditionalGeneration": CHECKED_SIZES,
    "InstructBlipForConditionalGeneration": NEEDS_IMAGES,
    "InstructBlipVideoForConditionalGeneration": NEEDS_IMAGES,
    "JanusForConditionalGeneration": TOO_LARGE,
    "Kosmos2ForConditionalGeneration": NEEDS_IMAGES,
    "KyutaiSpeechToTextForConditionalGeneration": TOO_LARGE,
    "Llama4ForConditionalGeneration": NEEDS_IMAGES,
    "Molmo2ForConditionalGeneration": CHECKED_SIZES,
    "Nemotron3_5TranscribeForConditionalGeneration": CHECKED_SIZES,
    "NemotronH_Omni_Reasoning_V3": CHECKED_SIZES,
    "PI0ForConditionalGeneration": "it predicts actions, not tokens",
    "PerceptionLMForConditionalGeneration": NEEDS_TIMM,
    "Qwen2_5OmniForConditionalGeneration": TOO_LARGE,
    "Qwen3OmniMoeForConditionalGeneration": TOO_LARGE,
    "VibeVoiceAsrForConditionalGeneration": TOO_LARGE,
    "VoxtralRealtimeForConditionalGeneration": NEEDS_IMAGES,
}
# Their hidden_states hold several predictions each, of which last_hidden_state is made.
SEVERAL_PREDICTIONS = ("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration")


def families() -> list[str]:
    """Every class that is listed, and in the transformers that was read all that predict the next token."""
    names = {*TRANSFORMS, *INEXPRESSIBLE}
    if transformers.__version__.startswith(f"{VERIFIED}."):
        auto = transformers.models.auto.modeling_auto
        for task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
            for classes in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values():
                names.update([classes] if isinstance(classes, str) else classes)
    return sorted(names)


@pytest.fixture(autouse=True)
def unpoisoned(poisoned_memory: None) -> None:
    """Models fill their own parameters; under the deterministic mode some of their operations would be refused."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", families())
def test_the_logits_are_the_models_own_or_it_is_refused(name: str) -> None:
    if name in SKIPPED:
        pytest.skip(SKIPPED[name])
    try:
        model = built(name)
    except ValueError as error:
        if transformers.__version__.startswith(f"{VERIFIED}."):
            raise
        pytest.skip(f"cannot be made small in transformers {transformers.__version__}: {error}")
    says = "is an encoder-decoder" if model.config.is_encoder_decoder else REFUSED.get(name)
    if says is not None:
        with pytest.raises(ValueError, match=f"{name}: it {says}"):
            LMHead.from_model(model)
        return
    head = LMHead.from_model(model)
    last, listed, logits = seen(model)
    assert logits.isfinite().all()
    if name in SEVERAL_PREDICTIONS:
        assert listed.dim() == 4
    else:
        assert relative_error(logits_of(listed, head), logits) < 1e-5
    assert relative_error(logits_of(last, head), logits) < 1e-5
    if TRANSFORMS.get(name, PLAIN) != PLAIN:
        rows = model.get_output_embeddings().weight[: len(head.weight)]
        assert relative_error(logits_of(last, LMHead(rows, head.bias)), logits) > 0.05


def test_a_listed_class_is_never_skipped() -> None:
    assert not SKIPPED.keys() & {*TRANSFORMS, *INEXPRESSIBLE}
    assert not SKIPPED.keys() & REFUSED.keys()
    assert len(SKIPPED) <= 24
