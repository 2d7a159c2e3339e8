"""What can be chosen, in four groups of our own beside the training arguments of transformers."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import yaml
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from eopd_kernels import Sampled, TopK

from .errors import UsageError
from .objectives import objectives

# Without --teacher: the demonstration.
DEMO: dict[str, Any] = {
    "objective": "both",
    "max_steps": 120,
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-3,
    "warmup_steps": 5,
    "max_new_tokens": 14,
    "eval_prompts": 200,
    "eval_samples": 16,
    "evaluation_batch_size": 400,
    "use_cpu": True,
}


EVAL_SETS = (
    "more prompts to evaluate with: files or data sets as --prompts takes them, NAME=SOURCE, or by name from the hub "
    "MATH-500, AIME-2024, AIME-2025, AMC23 (none of which has been tried)"
)


def option(default: Any, meaning: str) -> Any:
    """A field of that default, which ``--help`` explains."""
    return field(default=default, metadata={"help": meaning})


def require(allowed: bool, option: str, value: Any, meaning: str) -> None:
    if not allowed:
        raise UsageError(f"--{option.replace('_', '-')}", f"{value!r} is not {meaning}")


def require_at_least(options: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        require(value is None or value >= least, name, value, f"an integer of at least {least}")


@dataclass
class ModelOptions:
    """Own models (give both, with --prompts)."""

    teacher: str | None = option(
        None, "a folder or a hub name; code from the hub is never run. Several: {NAME: it, NAME: it}, --teacher-column"
    )
    teacher_url: str | None = option(
        None, "in its place: a vLLM or SGLang server that hands out its top k, http://..., or several such"
    )
    teacher_timeout: float = option(300.0, "seconds for which the server is asked again before the run ends")
    student: str | None = option(None, "a folder or a hub name; the model that is trained")
    teacher_dtype: Literal["float32", "bfloat16", "auto"] = option("float32", "of the teacher; 'auto': as saved")
    student_dtype: Literal["float32", "bfloat16", "auto"] = option(
        "float32", "of the student's weights, in which AdamW works: bfloat16 rounds small updates to nothing"
    )
    attn_implementation: str | None = option(None, "of both models, as transformers names them")
    lora_r: int | None = option(None, "train a LoRA adapter of this rank on the student's linear layers, with peft")
    teacher_quantization: Literal["bitsandbytes-4bit", "bitsandbytes-8bit", "torchao-int8"] | None = option(
        None, "of the teacher's linear layers as it is loaded, where that library is installed"
    )

    @property
    def teachers(self) -> dict[str, str]:
        """Folders, hub names or addresses, by the names that --teacher-column has; of a single one by ''."""
        given = self.teacher or self.teacher_url or ""
        if not given.startswith("{"):
            return {"": given}
        try:
            found = yaml.safe_load(given)
        except yaml.YAMLError as error:
            raise UsageError("--teacher", f"{given!r} is no block of names: {' '.join(str(error).split())}") from error
        return {str(name): str(source) for name, source in found.items()}

    def __post_init__(self) -> None:
        require_at_least(self, 1, "lora_r")
        quantization = self.teacher_quantization
        for name, value, library in (
            ("lora_r", self.lora_r, "peft"),
            ("teacher_quantization", quantization, (quantization or "").split("-")[0]),
        ):
            there = value is None or importlib.util.find_spec(library) is not None
            require(there, name, value, f"possible: {library} is not installed")


@dataclass
class PromptOptions:
    """Prompts and answers."""

    prompts: str | None = option(
        None,
        ".txt (a prompt a line), .jsonl or .parquet (each row with 'prompt' or 'messages'), or a data set as "
        "'name' or 'name:configuration'",
    )
    prompts_split: str = option("train", "of a data set")
    prompt_column: str | None = option(None, "where the prompt is, if not in 'prompt' or 'messages'")
    prompt_suffix: str = option("", "is appended to prompts that are texts")
    eval_prompt_suffix: str | None = option(None, "in its place to held-out ones")
    chat: bool = option(False, "a prompt that is a text is a user's turn, through the chat template")
    enable_thinking: bool | None = option(None, "handed to the chat template where given")
    chat_template_kwargs: str | None = option(None, "more of what the chat template takes, as a JSON object")
    answer_column: str = option("answer", "where the right answer is, if there is one")
    answer_check: Literal["mathematics", "exact"] = option("mathematics", "1/2 is 0.5 (math-verify), or to the letter")
    teacher_column: str | None = option(None, "where the name of the prompt's teacher is, of several")
    completion_column: str | None = option(None, "learn from the completions in this column: the student samples none")
    max_prompt_tokens: int | None = option(None, "longer prompts are left out")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "max_prompt_tokens")
        self.template_arguments()

    def template_arguments(self) -> dict[str, Any]:
        """What goes to the chat template."""
        try:
            found = json.loads(self.chat_template_kwargs or "{}")
        except json.JSONDecodeError:
            found = None
        require(isinstance(found, dict), "chat_template_kwargs", self.chat_template_kwargs, "a JSON object")
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return {**found, **thinking}


@dataclass
class LossOptions:
    """The loss."""

    objective: str = option(
        "entropy-aware",
        "reverse KL plus forward KL where the teacher is uncertain; or 'paper', as its Alg. 1 trains it; 'both': "
        "reverse-kl, then entropy-aware; another preset (reverse-kl, forward-kl, jeffreys, gkd, ...); or a block "
        "{preset: jsd, beta: 0.1}, {forward: {k: 8, teacher: raw, tail: true}, gate: {quantile: 0.9}}",
    )
    tau: float = option(0.8, "the gate opens above this teacher entropy, nats")
    alpha: float = option(1.0, "weight of the forward KL where the gate is open")
    combine: Literal["add", "switch"] = option("add", "where the gate is open keep reverse KL (add) or replace it")
    temperature: float = option(1.0, "of both distributions in the loss; sampling is always at 1")

    def __post_init__(self) -> None:
        require(math.isfinite(self.tau), "tau", self.tau, "a finite number")
        require(0 <= self.alpha < math.inf, "alpha", self.alpha, "a number of at least 0")
        require(0 < self.temperature < math.inf, "temperature", self.temperature, "a number above 0")
        self.objectives = objectives(
            self.objective, tau=self.tau, alpha=self.alpha, combine=self.combine, temperature=self.temperature
        )
        for name, one in self.objectives.items():
            meaning = f"1, at which completions are sampled and the objective {name!r} weighs them"
            require(not self.samples or one.temperatures[0] == 1, "temperature", one.temperatures[0], meaning)

    @property
    def samples(self) -> bool:
        """Whether an objective weighs the sampled tokens."""
        return any(isinstance(one.reverse, Sampled) for one in self.objectives.values())


@dataclass
class RolloutOptions:
    """Completions."""

    max_new_tokens: int = option(256, "longest completion")
    rollout_prompts: int | None = option(None, "answered at once, for as many optimizer steps; by default for one")
    generation_batch_size: int | None = option(None, "completions sampled at a time on a process; by default all")
    rollout_engine: Literal["generate", "vllm"] = option("generate", "samples for the student; vllm must be installed")
    vllm_memory: float = option(0.3, "share of a GPU's memory that vllm may take")
    off_policy_fraction: float = option(0.0, "share of the prompts that the teacher answers")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "max_new_tokens", "generation_batch_size")
        require(0 < self.vllm_memory < 1, "vllm_memory", self.vllm_memory, "a number between 0 and 1")
        share = self.off_policy_fraction
        require(0 <= share <= 1, "off_policy_fraction", share, "a number from 0 to 1")


@dataclass
class RunOptions:
    """Evaluation and logs."""

    eval_prompts: int = option(32, "prompts held out; 0: none, with --eval-sets")
    eval_sets: list[str] | None = field(default=None, metadata={"help": EVAL_SETS})
    eval_samples: int = option(1, "completions per held-out prompt")
    eval_top_p: float = option(1.0, "they are drawn from the likeliest tokens that have this share of the probability")
    eval_max_new_tokens: int | None = option(None, "longest of them; by default as in training")
    evaluation_batch_size: int = option(16, "completions sampled at a time in the evaluation")
    plan: int | None = field(
        default=None,
        metadata={
            "help": "print what each of N processes (as many as are started) needs of its device's memory, from these "
            "options and the models' configs, and stop",
            "nargs": "?",
            "const": 0,
        },
    )
    histogram_steps: int = option(10, "entropy histograms every so many steps")
    logged_completions: int = option(3, "completions kept per logged step")
    teacher_steps: int = option(400, "demonstration: supervised steps of the teacher")
    student_steps: int = option(280, "demonstration: supervised steps of the student's start")

    def __post_init__(self) -> None:
        names = ("eval_samples", "eval_max_new_tokens", "evaluation_batch_size", "histogram_steps")
        require_at_least(self, 1, *names, "teacher_steps", "student_steps")
        require(0 < self.eval_top_p <= 1, "eval_top_p", self.eval_top_p, "a number above 0, at most 1")
        require_at_least(self, 0, "logged_completions")
        require_at_least(self, 0 if self.eval_sets else 1, "eval_prompts")


@dataclass
class TrainingOptions(TrainingArguments):
    """Training, as transformers.TrainingArguments has it; what this program would not honour is refused."""

    max_steps: int = option(100, "optimizer steps; -1: as many as --num-train-epochs needs")
    per_device_train_batch_size: int = option(4, "completions per forward and backward pass of a process")
    gradient_accumulation_steps: int = option(8, "such passes per optimizer step")
    learning_rate: float = option(1e-5, "of AdamW, after the warm-up")
    warmup_steps: float = option(10, "steps of linear warm-up")
    logging_steps: float = option(1, "steps between two records of --report-to; metrics.jsonl has every step")
    save_steps: float = option(500, "steps between two checkpoints")
    eval_steps: float | None = option(None, "steps between two evaluations in training; by default there are none")
    report_to: str | None = option("none", "loggers beside metrics.jsonl: tensorboard, wandb, trackio, ...")
    bf16: bool = option(False, "mixed precision: products in bfloat16")
    use_cpu: bool = option(False, "the CPU, also where there is an accelerator")
    save_total_limit: int | None = option(2, "checkpoints kept")
    seed: int = option(0, "of everything that is drawn")
    use_cache: bool = option(True, "kept in the student's config")
    ddp_find_unused_parameters: bool | None = option(False, "all parameters of a language model are used")
    # Fixed: the stream is shuffled already, its items are not tensors, and a loss that is not finite ends the run.
    train_sampling_strategy: str = option("sequential", "fixed")
    remove_unused_columns: bool = option(False, "fixed")
    logging_nan_inf_filter: bool = option(False, "fixed")

    FIXED = ("train_sampling_strategy", "remove_unused_columns", "logging_nan_inf_filter")
    REFUSED = (
        *("auto_find_batch_size", "load_best_model_at_end", "push_to_hub", "torch_compile", "label_smoothing_factor"),
        *("neftune_noise_alpha", "save_only_model", "ignore_data_skip", "resume_from_checkpoint", "parallelism_config"),
        "eval_on_start",
    )

    def __post_init__(self) -> None:
        require_at_least(self, 1, "per_device_train_batch_size", "gradient_accumulation_steps")
        require(self.max_steps == -1 or self.max_steps >= 1, "max_steps", self.max_steps, "an integer of at least 1")
        rate = self.learning_rate
        require(0 < rate < math.inf, "learning_rate", rate, "a number above 0")
        require(0 <= self.max_grad_norm < math.inf, "max_grad_norm", self.max_grad_norm, "a number of at least 0")
        require(self.average_tokens_across_devices, "average_tokens_across_devices", False, "possible here")
        fields = self.__dataclass_fields__
        for name in (*self.FIXED, *self.REFUSED):
            value = getattr(self, name)
            default = fields[name].default
            require(value == default, name, value, f"supported by this program: leave it {default!r}")
        require(str(self.eval_strategy) in ("no", "IntervalStrategy.NO"), "eval_strategy", self.eval_strategy, "'no'")
        require_at_least(self, 1, "eval_steps")
        if self.eval_steps is not None:
            self.eval_strategy = "steps"
        try:
            super().__post_init__()
            _ = self.device  # starts the process group
        except (ValueError, RuntimeError, ImportError) as error:
            raise UsageError("of transformers.TrainingArguments", " ".join(str(error).split())) from error
        try:
            for logger in get_reporting_integration_callbacks(self.report_to):
                logger()  # refuses where its library is missing
        except (ValueError, RuntimeError, ImportError) as error:
            raise UsageError("--report-to", " ".join(str(error).split())) from error
        try:
            if self.optim_target_modules is None:  # else it takes the model
                Trainer.get_optimizer_cls_and_kwargs(self)
        except (ValueError, RuntimeError, ImportError) as error:
            raise UsageError("--optim", " ".join(str(error).split())) from error
        if self.fsdp and self.device.type == "cpu":
            raise UsageError("--fsdp", "accelerate shards nothing on a CPU, and says nothing: leave it out there")
        if self.n_gpu > 1:
            raise UsageError(
                "CUDA_VISIBLE_DEVICES",
                f"{torch.cuda.device_count()} GPUs are visible to one process; start one per GPU (torchrun "
                "--nproc-per-node N python/distill.py ...) or make one visible",
            )

    @property
    def prompts_per_step(self) -> int:
        """Of all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size


GROUPS: tuple[Any, ...] = (ModelOptions, PromptOptions, LossOptions, RolloutOptions, RunOptions, TrainingOptions)


@dataclass
class Options:
    """A parsed and checked command line."""

    models: ModelOptions
    prompts: PromptOptions
    loss: LossOptions
    rollouts: RolloutOptions
    run: RunOptions
    training: TrainingOptions
    given: dict[str, Any]  # every value as it was parsed: what is echoed, and enough to start the same run again

    def __post_init__(self) -> None:
        local, url, limit = self.models.teacher, self.models.teacher_url, self.models.teacher_timeout
        sources = {"teacher": local or url, "student": self.models.student, "prompts": self.prompts.prompts}
        named = [name for name, value in sources.items() if value is not None]
        if named and len(named) < 3:
            missing = next(name for name, value in sources.items() if value is None)
            raise UsageError(f"--{missing}", f"missing; --{named[0]} needs --teacher, --student and --prompts together")
        if self.demo and self.run.eval_sets:
            raise UsageError("--eval-sets", "the demonstration has none; they are for models of one's own")
        if self.demo and self.run.plan is not None:
            raise UsageError("--plan", "needs --teacher, --student and --prompts")
        if self.demo and self.run.eval_samples < 8:
            raise UsageError(
                "--eval-samples", f"pass@8 needs at least 8 samples per prompt, got {self.run.eval_samples}"
            )
        if self.prompts.completion_column is not None and self.loss.samples:
            chosen = self.loss.objective
            raise UsageError("--objective", f"{chosen!r} needs completions that are sampled, not a --completion-column")
        if self.prompts.completion_column is not None and self.rollouts.off_policy_fraction > 0:
            raise UsageError("--off-policy-fraction", "has no meaning beside --completion-column: nothing is sampled")
        require(0 < limit < math.inf, "teacher_timeout", limit, "a number above 0")
        if url is not None:
            there = local is None and all(one.startswith("http") for one in self.models.teachers.values())
            require(there, "teacher_url", url, "http://host:port, without --teacher")
            share = self.rollouts.off_policy_fraction
            require(share == 0, "off_policy_fraction", share, "0, and --teacher-url answers no prompts")
            for name, one in self.loss.objectives.items():
                known = all(half == "none" or isinstance(half, Sampled | TopK) for half in (one.reverse, one.forward))
                known = known and one.temperatures[1] == 1 and "student" not in one.top_k
                require(known, "objective", name, "made of what --teacher-url hands out, at its temperature 1: 'paper'")
        column, many = self.prompts.teacher_column, "" not in self.models.teachers
        if (column is not None) is not many:
            wanted = (
                "missing; it says which of the teachers a prompt has" if many else "needs --teacher {NAME: it, ...}"
            )
            raise UsageError("--teacher-column", wanted)
        step, at_once = self.training.prompts_per_step, self.rollouts.rollout_prompts
        fits = at_once is None or (at_once >= step and at_once % step == 0)
        require(fits, "rollout_prompts", at_once, f"a multiple of the {step} prompts of an optimizer step")

    @property
    def demo(self) -> bool:
        return self.models.teacher is self.models.teacher_url is None
