"""What a run needs of each device's memory, from its options and its models' configs: nothing is loaded.

The models are made of meta tensors, which have shapes and no memory. What the student's forward keeps for backward is
counted on a few short sequences and taken to be a + b·L + c·L² for longer ones; with activation checkpointing one layer
at a time is whole. It is an estimate: what CUDA and its libraries hold is not in it, nor fragmentation, nor the passing
tensors of single operations.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from eopd_kernels.schedules.workspace import usual_workspace

from .errors import UsageError
from .models import base_of, first_line, hidden_states, with_adapter, without_dropout
from .options import Options
from .report import say, table, warn
from .rollouts import without_wrapper

PROMPT_TOKENS = 512  # where nothing bounds them
LENGTHS = (32, 64, 128)  # tokens of the sequences on which activations are counted
GIB = 2**30
# Numbers per parameter, by the beginning of an optimizer's name; AdamW and its kin have two.
STATES = {"adafactor": 0, "sgd": 0, "adagrad": 1, "lion": 1, "paged_lion": 1, "rmsprop": 1, "ademamix": 3}
WIDTHS = {"8bit": 1 + 4 / 256, "4bit": 1 / 2 + 4 / 64, "int8": 1.0}  # bytes of a number and its part of a block's scale
DRAWING = 32  # bytes per entry of the vocabulary while a token is drawn: logits, probabilities, their sums, scores
PHASES = ("step", "rollout", "evaluation")

Rows = list[tuple[str, dict[str, float]]]


def planned(options: Options, device: torch.device, processes: int, prompt_tokens: int) -> Rows:
    """The parts of what a process needs, GiB in each phase of the run; the last row is their sum."""
    given, models, rollouts, training = options.given, options.models, options.rollouts, options.training
    low, batch = bool(given["bf16"] or given["fp16"]), training.per_device_train_batch_size
    tokens = prompt_tokens + rollouts.max_new_tokens
    student = hollow("--student", str(models.student), models.student_dtype, options)
    served = models.teacher_url is not None  # there is nothing of it here
    sources = [] if served else dict.fromkeys(models.teachers.values())
    teachers = [hollow("--teacher", name, models.teacher_dtype, options) for name in sources]
    of_teacher = sum(quantized_bytes(teacher, models.teacher_quantization) for teacher in teachers)
    copies, kept, layer = activations(student, batch, tokens, low, bool(given["activation_checkpointing"]))
    weights, learnt = nbytes(student.parameters()), [p for p in student.parameters() if p.requires_grad]
    head = student.get_output_embeddings().weight
    widest = max([teacher.get_output_embeddings().weight.shape[1] for teacher in teachers] or [0])
    stage = shared_out(given) if processes > 1 else 0
    over = [processes if stage >= least else 1 for least in (1, 2, 3)]  # optimizer states, gradients, weights
    if stage == 3:  # gathered in turn: the embeddings, and two layers
        each = (weights - head.nbytes) / student.config.get_text_config().num_hidden_layers
        copies = (head.nbytes + 2 * each) * (2 / head.itemsize if low else 1)
    buckets = nbytes(learnt) if processes > 1 and not stage else 0

    scored, per_token = batch * rollouts.max_new_tokens, len(head) * (8 + 2 * (low and device.type != "cpu"))
    budget, least = usual_workspace(device)
    blocks = per_token * min(scored, max(budget // per_token, least))
    hidden = 4 * scored * (2 * head.shape[1] + widest)  # of both, and the student's gradient
    head_gradient = 4 * head.numel() * head.requires_grad

    drawn = (rollouts.rollout_prompts or processes * batch * training.gradient_accumulation_steps) // processes
    drawn = min(drawn, rollouts.generation_batch_size or drawn)
    of_theirs = max(map(cache, teachers), default=0)
    writers = [cache(student), of_theirs * (rollouts.off_policy_fraction > 0)]
    judged = options.run.evaluation_batch_size
    longest = prompt_tokens + (options.run.eval_max_new_tokens or rollouts.max_new_tokens)
    parts: list[tuple[str, tuple[float, ...]]] = [  # step, rollout, evaluation
        ("teacher", (of_teacher,) * 3),
        ("student", (weights / over[2], weights / over[2], weights)),
        ("optimizer", (states(str(given["optim"]), learnt) / over[0],) * 2 + (0,)),
        ("gradients", (nbytes(learnt) / over[1] + buckets, buckets, 0)),  # DDP's buckets are a copy of them
        ("weights as products take them", (copies, copies, 0)),
        ("activations", (kept, 0, 0)),
        ("blocks of logits, or a layer again", (max(blocks, layer), 0, blocks)),
        ("loss", (hidden + head_gradient, 0, hidden)),
        ("keys and values", (0, drawn * tokens * max(writers), judged * longest * max(cache(student), of_theirs))),
        ("drawing a token", (0, drawn * len(head) * DRAWING, judged * len(head) * DRAWING)),
    ]
    parts.append(("together", tuple(map(sum, zip(*(of for _, of in parts), strict=True)))))
    return [(name, {phase: n / GIB for phase, n in zip(PHASES, of, strict=True)}) for name, of in parts]


def hollow(argument: str, name: str, dtype: str, options: Options) -> PreTrainedModel:
    """A model of a folder's or the hub's config, of meta tensors; an adapter counts as one on all layers."""
    base, rank, attention = base_of(argument, name), options.models.lora_r, options.models.attn_implementation
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(argument, f"cannot read the config of {base!r}: {first_line(error)}") from error
    if base != name:
        rank = json.loads(Path(name, "adapter_config.json").read_text(encoding="utf-8"))["r"]
    wanted = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted, attn_implementation=attention)
        return model.requires_grad_(False) if argument == "--teacher" else with_adapter(model, None, rank)


def activations(
    student: PreTrainedModel, rows: int, tokens: int, low: bool, checkpointing: bool
) -> tuple[float, float, float]:
    """Bytes of the weights' copies in 16 bits under autocast, of what a forward of [rows, tokens] keeps, and of what a
    layer keeps that is run again in backward. ``student`` is of meta tensors, and of fake ones afterwards."""
    without_dropout(student)
    student.train()

    def kept(length: int) -> int:
        found: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage()._cdata] = tensor
            return tensor

        ids = torch.ones(1, length, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", enabled=low):
            hidden_states(student, ids, ids)
        return sum(tensor.untyped_storage().nbytes() for key, tensor in found.items() if key not in own)

    with FakeTensorMode(allow_non_fake_inputs=True):  # a meta tensor has no autocast
        student.to_empty(device="cpu")
        without_wrapper(student).tie_weights()
        own = {p.untyped_storage()._cdata for p in student.parameters()}
        square, linear, copies = np.polyfit(LENGTHS, [kept(length) for length in LENGTHS], 2)
        whole = float(rows * (linear * tokens + square * tokens**2))
        if not checkpointing:
            return float(copies), whole, 0
        student.activation_checkpointing_enable()
        borders = rows * tokens * kept(LENGTHS[-1]) / LENGTHS[-1]
    return float(copies), borders, (whole - borders) / student.config.get_text_config().num_hidden_layers


def nbytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def quantized_bytes(teacher: PreTrainedModel, quantization: str | None) -> float:
    """Of the weights, the linear layers but the head in the width that the name says."""
    head, whole = teacher.get_output_embeddings(), nbytes(teacher.parameters())
    if quantization is None:
        return whole
    layers = [m.weight for m in teacher.modules() if isinstance(m, nn.Linear) and m is not head]
    return whole - nbytes(layers) + WIDTHS[quantization.split("-")[1]] * sum(weight.numel() for weight in layers)


def states(name: str, learnt: list[Any]) -> float:
    """Of an optimizer as transformers names it."""
    count = next((count for start, count in STATES.items() if name.startswith(start)), 2)
    width = next((width for end, width in WIDTHS.items() if end in name), None)
    return count * (nbytes(learnt) if width is None else width * sum(p.numel() for p in learnt))


def shared_out(given: dict[str, Any]) -> int:
    """1: optimizer states, 2: and gradients, 3: and weights are spread over the processes, as ZeRO counts; 0: none."""
    if given["fsdp"] or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return 3
    if (found := given["deepspeed"]) is None:
        return 0
    found = json.loads(Path(found).read_text(encoding="utf-8")) if isinstance(found, str) else found
    return int(found.get("zero_optimization", {}).get("stage", 0))


def cache(model: PreTrainedModel) -> int:
    """Bytes of keys and values per token; under autocast they are no larger."""
    of = model.config.get_text_config()
    heads = getattr(of, "num_key_value_heads", None) or of.num_attention_heads
    size = getattr(of, "head_dim", None) or of.hidden_size // of.num_attention_heads
    return 2 * of.num_hidden_layers * heads * size * model.dtype.itemsize


def room(device: torch.device, processes: int, options: Options) -> float | None:
    """GiB that each process may use there, None where there is no such device here; a CPU's are all on one machine."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
        return free and free * (1 - options.rollouts.vllm_memory * (options.rollouts.rollout_engine == "vllm")) / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB / processes


def say_plan(options: Options) -> None:
    """``--plan``: the table, and whether it fits; of a device that need not be here."""
    found = torch.accelerator.current_accelerator() or torch.device("cuda")
    device = torch.device("cpu") if options.given["use_cpu"] else found
    processes = options.run.plan or options.training.world_size
    prompt_tokens = options.prompts.max_prompt_tokens or PROMPT_TOKENS
    rows = planned(options, device, processes, prompt_tokens)
    who = f"each of {processes} processes" if processes > 1 else "the process"
    say(f"GiB that {who} needs on its {device.type} device, with prompts of {prompt_tokens} tokens: an estimate\n")
    say(table(rows, [(phase, phase, ".2f") for phase in PHASES]))
    needed, phase = most(rows)
    has = room(device, processes, options)
    of_device = "there is no such device here" if has is None else f"{'fits' if needed < has else 'exceeds'} {has:.1f}"
    say(f"\nat most {needed:.1f} GiB, in the {phase}: {of_device}")


def most(rows: Rows) -> tuple[float, str]:
    """GiB, and in which phase."""
    return max((rows[-1][1][phase], phase) for phase in PHASES)


def warn_where_it_exceeds(options: Options, device: torch.device, prompt_tokens: int) -> None:
    """Before anything is loaded: a warning where the plan exceeds what the device has."""
    try:
        needed, phase = most(planned(options, device, options.training.world_size, prompt_tokens))
    except UsageError:
        return  # loading will say it
    except Exception as error:  # an estimate that fails is no reason to end a run
        return warn(f"the memory of this run cannot be estimated: {first_line(error)}")
    has = room(device, options.training.world_size, options)
    if has is not None and needed > has:
        warn(f"the {phase} needs some {needed:.1f} GiB of {device} by an estimate, which has {has:.1f}; see --plan")
