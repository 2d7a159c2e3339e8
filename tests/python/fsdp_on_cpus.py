"""distill.py under FSDP2 on CPUs, as one process of several: for tests.

accelerate shards a model on accelerators only, and on a CPU falls back to DDP without a word. Here it is told to shard;
all else is its own code, down to PyTorch's ``fully_shard`` over gloo. distill.py refuses
``--fsdp`` there, except here.
"""

from __future__ import annotations

import sys
from typing import Any

import distill
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from distillation.errors import UsageError
from distillation.options import TrainingOptions


def shard_on_cpus() -> None:
    begin = AcceleratorState.__init__

    def begin_sharded(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **options)
        known = fsdp_plugin or self.__dict__.get("fsdp_plugin")  # there is one state, which is begun many times
        if known is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, known

    AcceleratorState.__init__ = begin_sharded
    check = TrainingOptions.__post_init__

    def checked(self: TrainingOptions) -> None:
        try:
            check(self)
        except UsageError as error:
            if error.argument != "--fsdp":
                raise

    TrainingOptions.__post_init__ = checked  # type: ignore[method-assign]


if __name__ == "__main__":
    shard_on_cpus()
    sys.exit(distill.main())
