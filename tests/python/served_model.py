"""A model behind what a teacher needs of vLLM's or SGLang's protocol; ``python -m`` serves a folder's."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class ServedModel(ThreadingHTTPServer):
    """Answers as ``engine`` does; ``changed`` may make another answer of one, or raise its HTTP status instead."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self, model: Any, tokenizer: Any, engine: str = "vllm", max_logprobs: int = 20) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer, self.engine, self.max_logprobs = model, tokenizer, engine, max_logprobs
        self.changed: Callable[[str, dict[str, Any], Any], Any] = lambda path, asked, answer: answer
        self.asked, self.url = list[tuple[str, dict[str, Any]]](), f"http://127.0.0.1:{self.server_port}"

    @torch.no_grad()
    def answer(self, path: str, asked: dict[str, Any]) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "served", "owned_by": self.engine, "max_model_len": 48}]}
        ids = asked["prompt" if self.engine == "vllm" else "input_ids"]
        k = asked.get("prompt_logprobs") or asked.get("top_logprobs_num") or 0
        if k > self.max_logprobs:
            raise ValueError(400, f"Requested prompt logprobs of {k}, which is greater than max allowed: 20")  # vLLM's
        log_q = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        places = [(row, [y, *row.topk(k).indices.tolist()]) for row, y in zip(log_q[:-1], ids[1:], strict=True)]
        rows = [[[row[i].item(), i, self.tokenizer.decode([i])] for i in entries] for row, entries in places]
        sampling = asked.get("sampling_params", asked)
        chance = torch.Generator().manual_seed(sampling.get("seed", sampling.get("sampling_seed", 0)))
        new = list(ids)
        for _ in range(sampling.get("max_tokens", sampling.get("max_new_tokens"))):
            new.append(int(self.model(torch.tensor([new])).logits[0, -1].softmax(-1).multinomial(1, generator=chance)))
            if new[-1] in sampling.get("stop_token_ids", []):
                break
        if self.engine == "vllm":
            named = [{str(i): {"logprob": p, "decoded_token": text} for p, i, text in row} for row in rows]
            return {"choices": [{"prompt_logprobs": [None, *named], "token_ids": new[len(ids) :]}]}
        rows = [[[None, ids[0], ""]], *rows][asked.get("logprob_start_len", 0) :]
        meta = {
            "input_top_logprobs": [None, *(row[1:] for row in rows[1:])],
            "input_token_logprobs": [r[0] for r in rows],
        }
        return {"output_ids": new[len(ids) :], "meta_info": meta}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        server.asked.append((self.path, asked))
        try:
            status, content = 200, server.changed(self.path, asked, server.answer(self.path, asked))
        except ValueError as error:
            status, content = error.args[0], {"error": {"message": str(error.args[-1])}}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content.encode() if isinstance(content, str) else json.dumps(content).encode())

    do_GET = do_POST

    def log_message(self, *given: Any) -> None: ...


if __name__ == "__main__":
    model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
    with ServedModel(model, tokenizer) as server:
        print(server.url, flush=True)
        server.serve_forever()
