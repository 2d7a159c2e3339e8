"""A drafter for speculative decoding: three steps ahead, over half of the target's vocabulary, in one loss call."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from eopd_kernels import LMHead, Objective, entropy_aware_kl

VOCAB_SIZE, DRAFT_VOCAB_SIZE, HIDDEN_SIZE, STEPS = 64, 32, 32, 20
DRAFT_STEPS, DECAY = 3, 0.8


class Drafter(nn.Module):
    """Guesses the target's next hidden state from the last one and the token after it, and goes on from its guess."""

    def __init__(self, lm_head: Tensor) -> None:
        super().__init__()
        self.merge = nn.Sequential(
            nn.Linear(2 * HIDDEN_SIZE, 4 * HIDDEN_SIZE), nn.SiLU(), nn.Linear(4 * HIDDEN_SIZE, HIDDEN_SIZE)
        )
        self.lm_head = nn.Linear(HIDDEN_SIZE, len(lm_head), bias=False)
        self.lm_head.weight.data.copy_(lm_head)  # [V_draft, D]

    def forward(self, state: Tensor, embeddings: Tensor) -> Tensor:
        return self.merge(torch.cat([state, embeddings], -1))


def drafter_loss(drafter: Drafter, features: Tensor, embeddings: Tensor, mask: Tensor, target_head: LMHead) -> Tensor:
    """The forward KL of all draft steps, that of step k weighted with DECAY**k.

    Args:
        features: ``[B, T, D]``, the target's last hidden states: position t is about token t + 1.
        embeddings: ``[B, T, D]`` of the tokens.
        mask: ``[B, T]``, 1 at the positions of the target that count.
        target_head: the target's head on the draft vocabulary.
    """
    state, states, taught, weights = features, [], [], []
    for step in range(DRAFT_STEPS):
        ahead = slice(step + 1, None)  # the state of position t has read the tokens to t + 1 + step
        state = drafter(state[:, :-1], embeddings[:, ahead])
        states.append(state)
        taught.append(features[:, ahead])
        weights.append(DECAY**step * mask[:, ahead])
    return entropy_aware_kl(
        torch.cat(states, 1),
        torch.cat(taught, 1),
        student_head=LMHead(drafter.lm_head.weight),
        teacher_head=target_head,
        mask=torch.cat(weights, 1),
        objective=Objective.forward_kl(),
    ).loss


def main() -> list[float]:
    torch.manual_seed(0)
    shape = {"hidden_size": HIDDEN_SIZE, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    target = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, initializer_range=0.3, **shape)).requires_grad_(False)
    d2t = torch.arange(DRAFT_VOCAB_SIZE)  # the offset of an entry's id, as EAGLE-3 stores it: here every second entry
    ids = torch.arange(DRAFT_VOCAB_SIZE) + d2t
    target_head = LMHead.from_model(target).select(ids)  # once: the target is a constant
    drafter = Drafter(target_head.weight)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-2)
    tokens = torch.randint(VOCAB_SIZE, (8, 16))  # of the target, in earnest; its hidden states are stored once
    features, embeddings = target.model(tokens).last_hidden_state, target.model.embed_tokens(tokens)
    losses = []
    for _ in range(STEPS):
        loss = drafter_loss(drafter, features, embeddings, torch.ones(8, 16), target_head)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token in {len(losses)} steps")
