"""What runs of the recipe import, for the process that tests fork: see tests/processes.py."""

import accelerate.accelerator
import datasets
import distill
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.trainer

IMPORTED = accelerate, datasets, distill, transformers
