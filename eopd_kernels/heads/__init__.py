"""Language-model heads: hidden states to a block of logits, and the products back."""
