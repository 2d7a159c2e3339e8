"""On-policy distillation in one file: the student samples, the teacher is asked about every token, the loss compares.

    python python/train_minimal.py                                           # two tiny random models, offline
    python python/train_minimal.py --teacher A --student B --prompts prompts.txt --output trained

Resume, several processes, chats, evaluation and a report: distill.py.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin slow small products down
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader, RandomSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from eopd_kernels import EntropyAwareKLLoss, EntropyGate, LMHead, Objective, global_num_items

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEEN = ("reverse_kl", "forward_kl", "teacher_entropy", "gate")


def train_step(
    student: Any, teacher: Any, loss: Any, optimizer: Any, prompts: Any, sampling: GenerationConfig, micro_batch: int
) -> list[float]:
    """One optimizer step on a completion per prompt: the loss, the mean of each of SEEN, and the number of tokens."""
    figures = torch.zeros(1 + len(SEEN), device=DEVICE)
    ids = student.generate(**prompts, generation_config=sampling)  # [B, T]: padding, prompt, completion, padding
    ended = torch.isin(ids[:, prompts["input_ids"].shape[1] :], ids.new_tensor(sampling.eos_token_id)).long()
    kind = torch.cat([prompts["attention_mask"], 2 * (ended.cumsum(1) == ended)], 1)  # 0 padding, 1 prompt, 2 answer
    order = (kind > 0).int().argsort(dim=1, descending=True, stable=True)  # padding to the right: positions start at 0
    ids, kind = ids.gather(1, order), kind.gather(1, order)
    num_items = global_num_items(kind == 2)  # the step's denominator, whatever the micro-batches
    optimizer.zero_grad()
    for part, of in zip(ids.split(micro_batch), kind.split(micro_batch), strict=True):
        with torch.no_grad():
            taught = teacher.base_model(part, attention_mask=(of > 0).long(), use_cache=False).last_hidden_state[:, :-1]
        hidden = student.base_model(part, attention_mask=(of > 0).long(), use_cache=False).last_hidden_state[:, :-1]
        heads = {"student_head": LMHead.from_model(student), "teacher_head": LMHead.from_model(teacher)}
        out = loss(hidden, taught, **heads, mask=of[:, 1:] == 2, num_items=num_items)  # t is about token t + 1
        out.loss.backward()
        figures += torch.stack([out.loss.detach(), *(getattr(out, name).sum() / num_items for name in SEEN)])
    optimizer.step()
    return [*figures.tolist(), int(num_items)]


def tiny() -> tuple[Any, Any, Any, Any]:
    """A teacher and a student of random weights, a tokenizer with a token for each letter, and prompts."""
    names = {token: i for i, token in enumerate(["<pad>", "<unk>", "<eos>", *"abcdefghijklmnopqrstuvwxyz"])}
    letters = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>")
    shape: dict[str, Any] = {"vocab_size": len(names), "intermediate_size": 64, "num_hidden_layers": 1}
    sizes = ({"hidden_size": 128, "initializer_range": 0.25}, {"hidden_size": 64})
    teacher, student = (AutoModelForCausalLM.from_config(LlamaConfig(**shape, **size)) for size in sizes)
    return teacher, student, tokenizer, [word for word in str(__doc__).lower().split() if word.isalpha()]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="train_minimal.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--teacher", help="a folder or hub name")
    parser.add_argument("--student", help="a folder or hub name; trained in float32")
    parser.add_argument("--prompts", type=Path, help="a text file with a prompt a line")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=32, help="completions per step")
    parser.add_argument("--micro-batch", type=int, default=16, help="completions at a time")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="longest completion")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of AdamW")
    parser.add_argument("--tau", type=float, default=0.8, help="teacher entropy that opens the gate, nats")
    parser.add_argument("--output", type=Path, help="where the trained student is saved")
    args = parser.parse_args(words)
    given = [args.teacher, args.student, args.prompts]
    if any(given) and None in given:
        parser.error("--teacher, --student and --prompts go together")
    torch.manual_seed(0)
    teacher, student, tokenizer, texts = tiny()
    if any(given):
        tokenizer, other = (AutoTokenizer.from_pretrained(name) for name in (args.student, args.teacher))
        ours, theirs = tokenizer.get_vocab(), other.get_vocab()
        if differing := [token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]]:
            parser.error(f"the tokenizers give {len(differing)} tokens different ids, {differing[0]!r} among them")
        teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype="auto")
        student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
        texts = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    teacher, student = teacher.to(DEVICE).eval().requires_grad_(False), student.to(DEVICE).eval()  # no dropout
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    rows = [len(model.get_output_embeddings().weight) for model in (student, teacher)]  # beyond the fewer: never drawn
    ends = [tokenizer.eos_token_id, *(model.generation_config.eos_token_id for model in (student, teacher))]
    sampling = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=args.max_new_tokens)
    sampling.eos_token_id = sorted({i for end in ends for i in (end if isinstance(end, list) else [end])} - {None})
    sampling.pad_token_id, sampling.suppress_tokens = tokenizer.pad_token_id, list(range(min(rows), rows[0])) or None
    kept, student.generation_config = student.generation_config, sampling  # generate() fills gaps from the model's own
    loss = EntropyAwareKLLoss(Objective(gate=EntropyGate(args.tau)), vocab_size=min(rows))
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate)
    drawn = RandomSampler(texts, num_samples=args.steps * args.batch_size)
    for number, batch in enumerate(DataLoader(texts, args.batch_size, sampler=drawn), 1):
        started = time.perf_counter()
        prompts = tokenizer(batch, return_tensors="pt", padding=True, return_token_type_ids=False).to(DEVICE)
        *seen, tokens = train_step(student, teacher, loss, optimizer, prompts, sampling, args.micro_batch)
        text = "loss {:.4f}, reverse KL {:.4f}, forward KL {:.4f}, H_t {:.3f} nats, gate {:.0%}, ".format(*seen)
        mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if os.uname().sysname == "Darwin" else 10)
        if DEVICE.type == "cuda":
            mib = torch.cuda.max_memory_allocated() >> 20
        speed = tokens / (time.perf_counter() - started)
        print(f"step {number}: {text}{speed:.0f} tokens/s, peak memory {mib} MiB", flush=True)
    if args.output:
        student.generation_config = kept
        student.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
