"""A teacher behind a server of vLLM or SGLang, which scores the tokens it is given, and samples."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from eopd_kernels import TopKTeacher

from .draws import seed_of
from .errors import RunError, UsageError
from .report import say
from .rollouts import Completion, Rollouts, end_of_sequence_ids
from .stream import Draw

PAUSES = (0.25, 30.0)  # seconds between two tries: the first, doubled each time, and the longest
PLAIN = {"temperature": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}  # whatever the model's config says


class ServedTeacher(nn.Module):
    """Asks the server at ``url`` for the ``k`` likeliest entries of each completion token; a module without weights.

    A RunError says that nothing answers in ``timeout`` seconds of trying, or something else than was asked for.
    """

    def __init__(self, url: str, k: int, timeout: float, device: torch.device) -> None:
        super().__init__()
        self.url, self.k, self.device = url.rstrip("/").removesuffix("/v1"), k, device
        self.pool = ThreadPoolExecutor(32)  # requests at once, of which a server makes batches
        self.asked: dict[tuple[int, ...], Future[list[Tensor]]] = {}
        self.vocab_size, self.eos_ids = 2**31, list[int]()  # until the student's are known
        self.timeout = min(timeout, 10.0)  # for a first look
        listed = self.answer("/v1/models")
        self.timeout = timeout
        first = [*((listed.get("data") if isinstance(listed, dict) else None) or []), {}][0]
        self.name, self.engine, positions = (first.get(key) for key in ("id", "owned_by", "max_model_len"))
        self.config = LlamaConfig(max_position_embeddings=(positions or 2**31) - 1)  # it adds a token
        if self.engine not in ("vllm", "sglang"):
            raise self.error(f"is no server of vLLM or SGLang: /v1/models says {json.dumps(listed)[:100]}")

    def error(self, problem: str) -> RunError:
        for one in self.asked.values():
            one.cancel()  # what waits behind it, which would hold up the end
        return RunError(f"--teacher-url {self.url}: {problem}")

    def answer(self, path: str, **content: Any) -> Any:
        """The JSON that is answered to ``content``, which is sent again after longer and longer pauses."""
        request = Request(self.url + path, json.dumps(content).encode() if content else None)
        request.add_header("Content-Type", "application/json")
        until, pause = time.monotonic() + self.timeout, PAUSES[0]
        while True:
            try:
                with urlopen(request, timeout=self.timeout / 3) as answered:
                    return json.load(answered)
            except HTTPError as error:
                why = f"{error.code}, {' '.join(error.read(500).decode(errors='replace').split())}"
                if error.code < 500 and error.code != 429:
                    more = f"; vLLM needs --max-logprobs {self.k}" if "logprobs" in why else ""
                    raise self.error(f"{path} refuses: {why}{more}") from error
            except (OSError, HTTPException) as error:
                why = str(getattr(error, "reason", error)) or type(error).__name__
            except ValueError as error:
                raise self.error(f"{path} does not answer in JSON") from error
            if time.monotonic() + pause > until:
                raise self.error(f"{path} does not answer: {why}; asked for {self.timeout:g} s (--teacher-timeout)")
            time.sleep(pause)
            pause = min(2 * pause, PAUSES[1])

    def written(self, ids: list[int], most: int, sampling: dict[str, Any], **more: Any) -> Any:
        if self.engine == "vllm":
            sampling = {"max_tokens": most, "return_token_ids": True, **sampling, **more}
            return self.answer("/v1/completions", model=self.name, prompt=ids, **sampling)["choices"][0]
        return self.answer("/generate", input_ids=ids, sampling_params={"max_new_tokens": most, **sampling}, **more)

    def rows(self, ids: list[int], start: int) -> list[tuple[float, list[Any]]]:
        """Of each place from ``start`` ≥ 1 on: log q of its token, and the k likeliest entries, (log q, id, text)."""
        wanted = {"return_logprob": True, "top_logprobs_num": self.k, "return_text_in_logprobs": True}
        try:
            if self.engine == "vllm":
                served = self.written(ids, 1, {}, prompt_logprobs=self.k)["prompt_logprobs"][start:]
                rows = [{int(i): (e["logprob"], int(i), e["decoded_token"]) for i, e in row.items()} for row in served]
            else:  # from logprob_start_len on, the first None again
                meta = self.written(ids, 1, {}, logprob_start_len=start - 1, **wanted)["meta_info"]
                both = zip(meta["input_top_logprobs"][1:], meta["input_token_logprobs"][1:], strict=True)
                rows = [{entry[1]: tuple(entry) for entry in [*top, own]} for top, own in both]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise self.error(f"its answer has no log-probabilities of the prompt as {self.engine} has them") from error
        own = list(zip(ids[start:], rows, strict=False))
        if len(rows) != len(ids) - start or not all(i in row and max(row.values())[0] < 0.125 for i, row in own):
            raise self.error("its rows are no log-probabilities about the tokens of the prompt, one row about each")
        if (least := min(map(len, rows))) < self.k:
            raise self.error(f"it hands out {least} entries of a token, fewer than the {self.k} that were asked for")
        return [(row[i][0], sorted(row.values(), key=lambda entry: -entry[0])[: self.k]) for i, row in own]

    def scored(self, ids: list[int], start: int) -> list[Tensor]:
        """The same as tensors, a tenth in size: log q of the tokens, [n]; log q and ids of the entries, [n, k]."""
        columns = [(own, *list(zip(*top, strict=True))[:2]) for own, top in self.rows(ids, start)]
        return [torch.tensor(column) for column in zip(*columns, strict=True)]

    def ask(self, completions: list[Completion]) -> None:
        """Has the server begin with what :meth:`forward` will be called for."""
        starts = {(*one.prompt, *one.ids): len(one.prompt) for one in completions}
        self.asked = {ids: self.pool.submit(self.scored, list(ids), start) for ids, start in starts.items()}

    def forward(self, rollouts: Rollouts) -> TopKTeacher:
        """The entries of each completion token, [B, C, k], and log q of the token itself, [B, C]."""
        completions = rollouts.sequences([])
        sequences = [(*one.prompt, *one.ids) for one in completions]
        if not self.asked.keys() >= set(sequences):
            self.ask(completions)
        answers = [self.asked[ids].result() for ids in sequences]
        width = rollouts.completion_mask.shape[1]  # of other teachers' sequences too
        blank = [of.new_zeros(width, *of.shape[1:]) for of in answers[0]]
        parts = zip(blank, *answers, strict=True)
        tokens, log_probs, ids = (pad_sequence(list(of), batch_first=True)[1:].to(self.device) for of in parts)
        return TopKTeacher(ids.where(ids < self.vocab_size, -1), log_probs, token_log_probs=tokens)

    def sample(
        self, draws: Sequence[Draw], *, seed: int | str, max_new_tokens: int, vocab_size: int, top_p: float
    ) -> list[Completion]:
        """A completion of each draw by the server, with a seed of its own."""
        chance: dict[str, Any] = {**PLAIN, "top_p": top_p, "stop_token_ids": self.eos_ids}
        by, key = ("seed", "token_ids") if self.engine == "vllm" else ("sampling_seed", "output_ids")

        def answer(draw: Draw) -> Completion:
            of_draw = {by: seed_of("tokens", seed, draw.number) >> 32}
            found = self.written(draw.prompt.ids, max_new_tokens, {**chance, **of_draw}).get(key)
            if not found or max(found) >= vocab_size:
                raise self.error(f"it answers a prompt with {'ids that the student lacks' if found else 'no ids'}")
            return Completion(draw.prompt.ids, found, found[-1] in self.eos_ids, writer="teacher")

        return list(self.pool.map(answer, draws))

    def share_vocabulary(self, student: PreTrainedModel, tokenizer: Tokenizer, prompts: list[list[int]]) -> int:
        """How many ids the student has, after making sure that the entries of a few prompts have the same text for the
        server; an id that the student's tokenizer does not name is a padding row, or an unused special token."""
        self.vocab_size = vocab_size = len(student.get_output_embeddings().weight)
        self.k, self.eos_ids = min(self.k, vocab_size), end_of_sequence_ids(student, tokenizer)
        probe = [i for ids in prompts[:256] for i in ids][: min(256, self.config.max_position_embeddings)]
        theirs = {i: text for _, top in self.rows(probe, 1) for _, i, text in top if text}
        compared = set(tokenizer.get_vocab().values()) | {i for i in theirs if i >= vocab_size}
        texts = {i: (str(tokenizer.decode([i])), text) for i, text in theirs.items() if i in compared}
        texts = {i: both for i, both in texts.items() if "\ufffd" not in "".join(both)}  # of a part of a character
        if differing := sorted(i for i, (ours, text) in texts.items() if ours.strip() != text.strip()):
            said = "{!r} for the student, {!r} for the server".format(*texts[differing[0]])
            many = f"{len(differing)} of {len(texts)} ids that were compared, first id {differing[0]}"
            raise UsageError("--teacher-url", f"the tokenizers disagree on {many}: {said}")
        say(f"{self.engine} at {self.url} has the same text for {len(texts)} ids")
        return vocab_size
