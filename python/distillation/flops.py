"""What the matrix products of a training step cost, counted: to judge the time that the loss takes beside the models.

Counted is the least there is to do for dense models: attention at its causal half, nothing that is element-wise.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

FORWARD, OF_INPUTS, OF_WEIGHTS = 2, 2, 2  # per weight and token: a multiplication and an addition each


class StepFlops:
    """Counts of one process over the micro-batches of an optimizer step."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, vocab_size: int) -> None:
        self.student = student
        self.teacher = teacher
        self.vocab_size = vocab_size
        self.models = 0.0

    def add(self, sequences: int, length: int) -> None:
        """A micro-batch of ``sequences`` of ``length`` tokens each, padding included: the teacher forward, the student
        forward and backward, both up to the last hidden state."""
        tokens, half_squares = sequences * length, sequences * length * length / 2
        for model in (self.teacher, self.student):
            forward = FORWARD * weights(model) * tokens + 4 * attention_width(model) * half_squares
            self.models += forward
        checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in self.student.modules())
        recomputed = forward if checkpointed else 0.0
        of_weights = OF_WEIGHTS * weights(self.student, trainable=True) * tokens
        of_attention = 8 * attention_width(self.student) * half_squares
        self.models += recomputed + OF_INPUTS * weights(self.student) * tokens + of_weights + of_attention

    def loss(self, tokens: float) -> float:
        """Of the loss over so many valid tokens: both heads, and the gradients of the student's side."""
        student, teacher = (model.get_output_embeddings().weight for model in (self.student, self.teacher))
        of_weight = OF_WEIGHTS * student.shape[1] if student.requires_grad else 0
        widths = FORWARD * teacher.shape[1] + (FORWARD + OF_INPUTS) * student.shape[1] + of_weight
        return tokens * self.vocab_size * widths

    def loss_share(self, tokens: float) -> float | None:
        """The loss's part of it all; None for a model whose products are not those of dense matrices."""
        if not self.models or any(map(has_stacks, (self.student, self.teacher))):
            return None
        loss = self.loss(tokens)
        return loss / (loss + self.models)


def weights(model: PreTrainedModel, trainable: bool = False) -> int:
    """Entries of the matrices that every token is multiplied with, the embedding and the head aside."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables.add(id(model.get_output_embeddings().weight))
    matrices = (p for p in model.parameters() if p.dim() == 2 and id(p) not in tables)
    return sum(p.numel() for p in matrices if p.requires_grad or not trainable)


def attention_width(model: PreTrainedModel) -> int:
    """Layers × heads × head dimension: a query meets a key, and a weight a value, over so many numbers. 0: no heads."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    if not heads:
        return 0
    return config.num_hidden_layers * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def has_stacks(model: PreTrainedModel) -> bool:
    """Whether there are experts, of which a token meets a few, or convolutions."""
    return any(p.dim() > 2 for p in model.parameters())
