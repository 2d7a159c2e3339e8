"""What is counted on the tokens of an optimizer step: sums, so that micro-batches and processes add up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eopd_kernels import EntropyAwareKLOutput
from eopd_kernels.tensors import widest_dtype

FIGURES = ("reverse_kl", "forward_kl", "teacher_entropy", "student_entropy")
SPLITS = ("open", "closed")
BINS = 48
HISTOGRAMS = ("teacher_entropy", "student_entropy")


class StepTotals:
    """Sums over the valid tokens of this process, on its device in float64, or float32 where it has no other.

    A token is open where the teacher's entropy exceeds ``tau``, whatever the objective makes of it, so that runs with
    different objectives can be compared; ``gate_fraction`` is the objective's own gate.
    """

    def __init__(self, tau: float, vocab_size: int, device: torch.device) -> None:
        self.tau = tau
        names = ["sequences", "clipped", "clipped_by_ratio", "loss", "gate", *(f"tokens_{split}" for split in SPLITS)]
        names += [f"{figure}_{split}" for figure in FIGURES for split in SPLITS]
        self.places = {name: i for i, name in enumerate(names)}
        self.largest = math.log(vocab_size)  # nats: no entropy exceeds it
        self.sums = torch.zeros(len(names) + len(HISTOGRAMS) * BINS, dtype=widest_dtype(device), device=device)

    def add(self, name: str, value: Tensor | float) -> None:
        self.sums[self.places[name]] += value

    def add_tokens(self, seen: EntropyAwareKLOutput, loss: Tensor, valid: Tensor) -> None:
        """The figures of one micro-batch, where ``valid``; ``loss`` is its share of the step's loss."""
        opened = valid & (seen.teacher_entropy > self.tau)
        self.add("loss", loss.detach())
        self.add("gate", seen.gate.sum(dtype=self.sums.dtype))
        kl = "_half" if seen.teacher_entropy_is_lower_bound else "_kl"  # a served teacher's are not known
        figures = {figure: getattr(seen, figure.replace("_kl", kl)) for figure in FIGURES}  # each reading computes
        for split, where in zip(SPLITS, (opened, valid & ~opened), strict=True):
            self.add(f"tokens_{split}", where.sum())
            for figure, value in figures.items():
                self.add(f"{figure}_{split}", torch.where(where, value, 0.0).sum(dtype=self.sums.dtype))
        for i, figure in enumerate(HISTOGRAMS):
            values = getattr(seen, figure)[valid].float().clamp(0.0, self.largest)
            start = len(self.places) + i * BINS
            self.sums[start : start + BINS] += torch.histc(values, BINS, 0.0, self.largest)

    def metrics(self, sums: Tensor) -> dict[str, float | None]:
        """Means of ``sums`` that were added up over the processes; None where there was no token to take a mean of."""
        total = {name: sums[i].item() for name, i in self.places.items()}
        tokens = total["tokens_open"] + total["tokens_closed"]

        def mean(value: float, count: float) -> float | None:
            return value / count if count else None

        found: dict[str, float | None] = {"loss": total["loss"]}
        for figure in FIGURES:
            found[figure] = mean(sum(total[f"{figure}_{split}"] for split in SPLITS), tokens)
            for split in SPLITS:
                found[f"{figure}_{split}"] = mean(total[f"{figure}_{split}"], total[f"tokens_{split}"])
        found["gate_fraction"] = mean(total["gate"], tokens)
        found["completion_length"] = mean(tokens, total["sequences"])
        found["clipped_fraction"] = mean(total["clipped"], total["sequences"])
        found["clipped_by_ratio"] = mean(total["clipped_by_ratio"], tokens)
        found["tokens"] = int(tokens)
        return found

    def histograms(self, sums: Tensor) -> dict[str, list[float]]:
        """Counts of tokens per bin of entropy, and the bins' edges in nats."""
        counts = sums[len(self.places) :].view(len(HISTOGRAMS), BINS).tolist()
        edges = [self.largest * i / BINS for i in range(BINS + 1)]
        return {"edges": edges, **dict(zip(HISTOGRAMS, counts, strict=True))}
