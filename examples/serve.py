"""Serve a model over HTTP from quantized caches, and reuse what two prompts have in common.

    python examples/serve.py
    python examples/serve.py --port 8000
    python examples/serve.py --port 8000 --model smollm2
    python examples/serve.py --port 8000 --model PATH_OR_ID --config examples/configs/k4v4.yaml --keep 8

The endpoints are like OpenAI's, `/v1/completions` and `/v1/chat/completions`, as far as a prompt and a length go:

    curl localhost:8000/v1/completions -d '{"prompt": "The assert statement", "max_tokens": 30}'

The caches of the last requests are kept. A prompt that begins like one of them takes a fork, which shares the quantized
tokens, cuts it to what both have in common, and computes the rest only; `cached_tokens` in the answer says how many
tokens that spared. One request is computed at a time, greedily: `temperature` and the like have no effect. Without
`--port` the program asks its own server some questions about a list of records, on the small recall model that ships
with kvq, and ends.
"""

from __future__ import annotations

import argparse
import json
import threading
import urllib.request
from collections import deque
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvq import KVQ
from kvq.errors import CacheStateError
from kvq.evaluation.model_loading import EMBEDDED_NAME, load_model
from kvq.evaluation.recall import decode_tokens, sample_recall_batch

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
LEAST_COMMON = 16
"""Tokens in common that are worth a fork."""
QUESTIONS = 3


class Service:
    """A model with the caches of its last requests.

    Args:
        model: a causal model.
        tokenizer: its tokenizer.
        config: the configuration of the caches, or None for the defaults.
        keep: how many caches are kept.
        length: tokens of an answer where the request does not say.

    Attributes:
        length: as given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: Path | None = None,
        keep: int = 4,
        length: int = 30,
    ) -> None:
        model.set_attn_implementation("kvq")  # what `attach` does: attention reads the caches packed
        KVQ(config, model=model)  # to raise here, and not at the first request
        self._model = model
        self._tokenizer = tokenizer
        self._config = config
        self._kept: deque[KVQ] = deque(maxlen=keep)
        self._turn = threading.Lock()
        self.length = length

    def complete(self, prompt: str, max_tokens: int, *, is_formatted: bool = False) -> dict[str, Any]:
        """Return the continuation of a prompt, greedy, with the counts of tokens.

        Args:
            prompt: the text.
            max_tokens: most tokens of the answer.
            is_formatted: whether the prompt has all special tokens in it, as a chat template leaves it.

        Raises:
            ValueError: the prompt has no tokens, or more than the model has positions.
        """
        encoded = self._tokenizer(prompt, return_tensors="pt", add_special_tokens=not is_formatted)
        token_ids = encoded["input_ids"].to(self._model.device)
        self._check_length(token_ids.shape[1], max_tokens)
        with self._turn:
            cache, cached = self._find_cache(token_ids)
            output = self._model.generate(
                token_ids,
                attention_mask=torch.ones_like(token_ids),
                past_key_values=cache,
                max_new_tokens=max_tokens,
                do_sample=False,
            )
            cache.token_ids = output
            self._kept.append(cache)
        written = output[0, token_ids.shape[1] :]
        return {
            "text": self._tokenizer.decode(written, skip_special_tokens=True),
            "finish_reason": "length" if len(written) == max_tokens else "stop",
            "prompt_tokens": token_ids.shape[1],
            "completion_tokens": len(written),
            "cached_tokens": cached,
        }

    def format_chat(self, messages: Any) -> str:
        """Return the prompt of a conversation.

        Raises:
            ValueError: there is no chat template, it refuses the messages, or these are no texts with a role.
        """
        if not self._tokenizer.chat_template:
            raise ValueError("this model has no chat template; use /v1/completions")
        if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
            raise ValueError("'messages' must be a list of objects with the texts 'role' and 'content'")
        try:
            prompt: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error
        return prompt

    def describe_kept(self) -> str:
        """Return in words what the newest of the kept caches holds."""
        memory = self._kept[-1].memory()
        sizes = [f"{count / 1024:.0f} KiB" for count in (memory.total_bytes, memory.full_precision_bytes)]
        return f"{len(self._kept)} caches are kept; the newest holds {sizes[0]}, {sizes[1]} in full precision"

    def _check_length(self, prompt: int, answer: int) -> None:
        """Refuse what the model has no positions for; the lengths are tokens."""
        most = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if not prompt:
            raise ValueError("the prompt has no tokens")
        if most is not None and prompt + answer > most:
            raise ValueError(f"{prompt} tokens and an answer of {answer} are more than the {most} of this model")

    def _find_cache(self, token_ids: torch.Tensor) -> tuple[KVQ, int]:
        """Return a cache to go on with, and how many tokens of the prompt it holds."""
        best = max(self._kept, key=lambda cache: cache.count_matching(token_ids), default=None)
        if best is not None and best.count_matching(token_ids) >= LEAST_COMMON:
            try:
                cache = best.fork()
                return cache, cache.crop_to_prefix(token_ids)
            except CacheStateError:
                pass  # states of linear attention and bounded windows cannot go back: read the whole prompt
        return KVQ(self._config, model=self._model), 0


class Handler(BaseHTTPRequestHandler):
    """Answers requests by the service of its server."""

    server: Server

    def do_POST(self) -> None:
        """Answer one request; http.server calls this."""
        if self.path not in (COMPLETIONS, CHAT):
            self._refuse(HTTPStatus.NOT_FOUND, f"there is no {self.path}; post to {COMPLETIONS} or {CHAT}")
            return
        try:
            answer = self._answer(json.loads(self.rfile.read(max(0, int(self.headers.get("Content-Length", 0))))))
        except (ValueError, TypeError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except Exception as error:  # the server goes on
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")
            raise
        else:
            self._send(HTTPStatus.OK, answer)

    def log_message(self, *_arguments: object) -> None:
        """Say nothing of each request."""

    def _answer(self, request: Any) -> dict[str, Any]:
        if not isinstance(request, dict):
            raise TypeError("the body is no JSON object")
        if request.get("stream"):
            raise ValueError("streaming is not supported here; leave out 'stream'")
        is_chat = self.path == CHAT
        service = self.server.service
        prompt = service.format_chat(request.get("messages")) if is_chat else request.get("prompt")
        lengths = (request.get(name) for name in ("max_completion_tokens", "max_tokens"))
        length = next((one for one in lengths if one is not None), service.length)
        if not isinstance(prompt, str) or not prompt:
            raise ValueError("'prompt' must be a text that is not empty")
        if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= 4096:
            raise ValueError("'max_tokens' must be a whole number from 1 to 4096")
        return describe(service.complete(prompt, length, is_formatted=is_chat), is_chat=is_chat)

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._send(status, {"error": {"message": reason}})

    def _send(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """Listens on this machine only.

    Args:
        service: what computes the answers.
        port: where; 0: any free one.
    """

    daemon_threads = True

    def __init__(self, service: Service, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.service = service


def is_message(message: Any) -> bool:
    """Return whether one entry of `messages` is a text with a role."""
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def describe(done: dict[str, Any], *, is_chat: bool) -> dict[str, Any]:
    """Return a completion in the words of OpenAI's interface."""
    text = {"message": {"role": "assistant", "content": done["text"]}} if is_chat else {"text": done["text"]}
    return {
        "object": "chat.completion" if is_chat else "text_completion",
        "choices": [{"index": 0, **text, "finish_reason": done["finish_reason"]}],
        "usage": {
            "prompt_tokens": done["prompt_tokens"],
            "completion_tokens": done["completion_tokens"],
            "total_tokens": done["prompt_tokens"] + done["completion_tokens"],
            "prompt_tokens_details": {"cached_tokens": done["cached_tokens"]},
        },
    }


def ask(port: int, **request: Any) -> dict[str, Any]:
    """Post a request to a server on this machine and return its answer."""
    address = f"http://127.0.0.1:{port}/v1/completions"
    with urllib.request.urlopen(address, data=json.dumps(request).encode()) as reply:
        answer: dict[str, Any] = json.load(reply)
        return answer


def show(server: Server) -> None:
    """Ask questions about one document, which is read with the first of them."""
    batch = sample_recall_batch(1, 160, QUESTIONS, generator=torch.Generator().manual_seed(1))
    document = decode_tokens(batch.context[0].tolist())
    for question, right in zip(batch.questions[0], batch.answers[0], strict=True):
        prompt = f"{document} {decode_tokens(question[:2].tolist())}"
        answer = ask(server.server_port, prompt=prompt, max_tokens=4)
        usage = answer["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        print(f"\nprompt:   {usage['prompt_tokens']} tokens, {cached} of them cached")
        print(f"answer:   {answer['choices'][0]['text'].strip()}")
        print(f"right:    {decode_tokens(right.tolist())}")
    print(f"\n{server.service.describe_kept()}")


def main() -> None:
    arguments = parse_arguments()
    model, tokenizer = load_model(arguments.model, on_step=print)
    server = Server(
        Service(model, tokenizer, arguments.config, arguments.keep, arguments.max_new_tokens), arguments.port or 0
    )
    if arguments.port is None:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        show(server)
        server.shutdown()
        server.server_close()
        return
    print(f"listening on http://127.0.0.1:{server.server_port}; Ctrl-C ends")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve a model from quantized caches that share their prefixes.")
    parser.add_argument(
        "--model",
        default=EMBEDDED_NAME,
        metavar="PATH_OR_ID",
        help="a causal model, or 'smollm2': a real one, fetched once; default: the embedded one, offline",
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help="serve here until Ctrl-C; default: ask some questions, end"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="the configuration of the caches")
    parser.add_argument("--keep", type=int, default=4, metavar="N", help="caches that are kept; default: 4")
    parser.add_argument(
        "--max-new-tokens", type=int, default=30, metavar="N", help="where a request names no max_tokens; default: 30"
    )
    arguments = parser.parse_args()
    if arguments.keep < 1:
        parser.error("--keep must be at least 1")
    return arguments


if __name__ == "__main__":
    main()
