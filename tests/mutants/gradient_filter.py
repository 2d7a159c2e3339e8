"""What is broken of the products that leave columns out."""

from __future__ import annotations

from .mutant import Mutant

MUTANTS = [
    Mutant(
        "filter: negative gradients are small",
        "significant_columns",
        "(gradient.amax(0) < threshold) & (gradient.amin(0) > -threshold)",
        "gradient.amax(0) < threshold",
    ),
    Mutant(
        "filter: columns that hold a NaN are left out",
        "significant_columns",
        "(~below).nonzero()",
        "((gradient.amax(0) >= threshold) | (gradient.amin(0) <= -threshold)).nonzero()",
    ),
    Mutant(
        "filter: the slice starts at 0",
        "FilteredGradient.add",
        "ids, panel = columns.start + part,",
        "ids, panel = part,",
    ),
    Mutant(
        "filter: no estimate",
        "FilteredGradient.add",
        "self.chunk.addr_(row_sums.squeeze(1), left_out_weight / (gradient.shape[1] - len(kept)))",
        "pass",
    ),
    Mutant(
        "filter: the mean counts the columns that are kept",
        "FilteredGradient.add",
        "left_out_weight = left_out_weight - weight.sum(0, dtype=left_out_weight.dtype)",
        "pass",
    ),
    Mutant(
        "filter: the weight's gradient of the last chunk only",
        "FilteredGradient.add",
        "self.weight.index_add_(0, ids, of_panel)",
        "self.weight.index_copy_(0, ids, of_panel)",
    ),
    Mutant(
        "filter: the bias is forgotten",
        "FilteredGradient.add",
        "self.bias[columns] += gradient.sum(0, dtype=self.bias.dtype)",
        "pass",
    ),
    Mutant(
        "filter: epsilon is absolute",
        "student_gradient",
        "epsilon * weights.abs().max()",
        "epsilon + 0 * weights.abs().max()",
    ),
    Mutant("filter: weights below 0 count for nothing", "student_gradient", "weights.abs().max()", "weights.max()"),
]
