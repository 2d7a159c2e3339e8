"""distill.py under FSDP2 on CPUs, as one process of several: for tests.

accelerate shards a model on accelerators only, and on a CPU falls back to DDP without a word. Here it is told to shard;
all else is its own code, down to PyTorch's ``fully_shard`` over gloo.
"""

from __future__ import annotations

import sys
from typing import Any

import distill
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

# What `accelerate launch` hands on of its configuration.
ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def shard_on_cpus() -> None:
    begin = AcceleratorState.__init__

    def begin_sharded(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **options)
        known = fsdp_plugin or self.__dict__.get("fsdp_plugin")  # there is one state, which is begun many times
        if known is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, known

    AcceleratorState.__init__ = begin_sharded


if __name__ == "__main__":
    shard_on_cpus()
    sys.exit(distill.main())
