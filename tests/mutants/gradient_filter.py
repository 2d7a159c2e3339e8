"""What is broken of the products that leave columns out."""

from __future__ import annotations

from .mutant import Mutant

MUTANTS = [
    Mutant(
        "filter: negative gradients are small",
        "significant_columns",
        "torch.maximum(gradient.amax(0), -gradient.amin(0))",
        "gradient.amax(0)",
    ),
    Mutant(
        "filter: columns that hold a NaN are left out",
        "significant_columns",
        "(~below).nonzero()",
        "(size >= threshold).nonzero()",
    ),
    Mutant("filter: one threshold for both", "significant_columns", "HIDDEN_THRESHOLD * threshold", "threshold"),
    Mutant("filter: a column twice", "significant_columns", "(below & ~far_below)", "(~far_below)"),
    Mutant(
        "filter: the slice starts at 0",
        "FilteredGradient.add",
        "ids, panel = columns.start + part,",
        "ids, panel = part,",
    ),
    Mutant(
        "filter: the slice starts at 0 for the hidden states alone",
        "FilteredGradient.add",
        "columns_of(gradient, part), columns.start + part",
        "columns_of(gradient, part), part",
    ),
    Mutant(
        "filter: no estimate",
        "FilteredGradient.add",
        "self.chunk.addr_(row_sums.squeeze(1), mean)",
        "pass",
    ),
    Mutant(
        "filter: what the hidden states alone keep is estimated besides",
        "FilteredGradient.add",
        "torch.cat([of_both, of_hidden])",
        "of_both",
    ),
    Mutant(
        "filter: the mean is a sum",
        "FilteredGradient.add",
        "weight.sum(0, dtype=mean.dtype) / len(of_hidden)",
        "weight.sum(0, dtype=mean.dtype)",
    ),
    Mutant(
        "filter: the mean of no rows",
        "FilteredGradient.add",
        "self.hidden is None or len(of_hidden) == 0:",
        "self.hidden is None:",
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
