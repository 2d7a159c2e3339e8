"""Bytes per logit and flops per token of the loss and of its peers, counted in Triton's interpreter, without a GPU."""
