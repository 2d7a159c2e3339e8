"""The order in which blocks of logits are visited, from a checked call to its loss and gradients."""
