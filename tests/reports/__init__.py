"""Faults that users of other libraries reported, each as a test that this package does not have it.

A docstring begins with where it was reported, repository and number, and says what was wrong there. What should have
been there is computed in fp64 by plain.py, or by hand. Reports that the suite holds already, elsewhere:

- huggingface/trl#4719, #6006, fla-org/flash-linear-attention#539: each micro-batch had its own count. See
  test_loss.py, micro-batches of unequal length.
- NVIDIA-NeMo/RL#3791, allenai/OLMo-core#452: the same over ranks; NaN on a rank without a token. See
  distributed/test_denominators.py.
- PrimeIntellect-ai/prime-rl#1961: a zero loss that was not attached to the graph. See test_loss.py, nothing valid.
- linkedin/Liger-Kernel#336: logits rounded under autocast. See test_function.py, autocast.
- pytorch/pytorch#195829: a common offset of all logits cost digits. See test_oracle.py, shifted logits.
- fla-org/flash-linear-attention#1248: a frozen head's gradient was computed. See test_function.py, only what is
  needed.
- fla-org/flash-linear-attention#874: a teacher that requires grad silently got none. See test_inputs.py.
- fla-org/flash-linear-attention#1220: the loss waited for the device. See test_no_sync.py.
- huggingface/trl#4612, #5676, marin-community/marin#6104: LoRA on the head was left out. See test_lora.py.
- huggingface/trl#6064, #6372, #6859: a head partitioned by ZeRO-3 or FSDP was read as it lay. See
  distributed/test_sharded_heads.py.
- unslothai/unsloth-zoo#610: a second backward met scaled gradients. See test_function.py, a retained graph.
- unslothai/unsloth#5002: the gradient overwrote logits that others needed. See test_function.py, in place.
- tensorflow/tensorflow#5876: a wrong second derivative instead of an error. See test_function.py, double backward.
- pytorch/pytorch#184113, huggingface/transformers#34615: compiled: another gradient, a broken graph. See
  test_compile.py.
- verl-project/verl#2953, OpenRLHF/OpenRLHF#1309: a sampled KL whose gradient is another's. See test_objectives.py,
  the sampled half.
- apple/ml-cross-entropy#59, NVIDIA/Model-Optimizer#2459: vocabulary over ranks: a padded entry, a wrong gradient. See
  distributed/test_tensor_parallel.py.
- NVIDIA/TransformerEngine#2476, linkedin/Liger-Kernel#1438: the expected value shared the fault. See
  test_oracle.py, whose third party is the truth in fp64.
"""
