"""Talk over several turns on one quantized cache; replies appear as they are generated.

    python examples/chat.py
    python examples/chat.py --interactive
    python examples/chat.py --model smollm2
    python examples/chat.py --model PATH_OR_ID --interactive

The cache is made once. Each turn feeds it the new tokens only. A token is quantized once and then stays as it is.
Without `--model` it runs offline on the small recall model that ships with kvq: each turn tells it some records and
asks for one from this turn or an earlier one. Any other model gets a section of Python's manual, and questions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from kvq import KVQ
from kvq.evaluation.model_loading import EMBEDDED_NAME, load_model
from kvq.evaluation.recall import RECORD_LENGTH, VOCABULARY, decode_tokens, sample_recall_batch

TURNS, RECORDS_A_TURN = 5, 30


class Chat:
    """A conversation, the tokens that were fed, and the one cache that holds them."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.cache = KVQ(model=model, nbits_k=4, nbits_v=2)
        self.messages: list[dict[str, str]] = []
        self.text = tokenizer.bos_token or ""
        self.fed = torch.empty(0, dtype=torch.long)

    def say(self, message: str) -> None:
        """Add a message of the user and stream the reply."""
        inputs = self._encode(message).to(self.model.device)
        self._forget_what_changed(inputs[0])
        output = self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            past_key_values=self.cache,
            do_sample=False,
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **self.options,
        )
        self.fed = output[0]
        reply = self.tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": reply})
        self.text += f" {reply}"

    def _encode(self, message: str) -> torch.Tensor:
        """Return the whole conversation with the new message, `[1, T]`."""
        self.messages.append({"role": "user", "content": message})
        if self.tokenizer.chat_template:
            encoded = self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            self.text += f"\n{message}"
            encoded = self.tokenizer(self.text, return_tensors="pt", add_special_tokens=False)
        return encoded["input_ids"]

    def _forget_what_changed(self, tokens: torch.Tensor) -> None:
        """Crop the cache to what it shares with the conversation: a template may write past turns in another way."""
        held = self.cache.get_seq_length()
        limit = min(held, len(tokens) - 1)
        differing = (self.fed[:limit] != tokens[:limit]).nonzero()
        shared = int(differing[0]) if len(differing) else limit
        if shared < held:
            self.cache.crop(shared - held)


def main() -> None:
    arguments = parse_arguments()
    is_embedded = arguments.model == EMBEDDED_NAME
    model, tokenizer = load_model(arguments.model, on_step=print)
    # The embedded model has no token for the end of a text; its answers end with a full stop.
    stop = {"eos_token_id": tokenizer.convert_tokens_to_ids(".")} if is_embedded else {}
    chat = Chat(model, tokenizer, max_new_tokens=arguments.max_new_tokens, **stop)
    canned = tell_records() if is_embedded else ((message, None) for message in MESSAGES)
    if arguments.interactive and is_embedded:
        first, _ = next(canned)
        print(f"The embedded model reads these records and a question about one of them:\n{first}")
        chat.say(first)
    for message, right in read_turns(is_embedded) if arguments.interactive else canned:
        if not arguments.interactive:
            print(f"\nyou:   {message}" if len(message) < 120 else f"\nyou:   {message[:60]} ... {message[-40:]}")
        print("model: ", end="", flush=True)
        chat.say(message)
        if right:
            print(f"right: {right}")
        memory = chat.cache.memory()
        held, plain = memory.total_bytes / 1024, memory.full_precision_bytes / 1024
        print(f"[{chat.cache.get_seq_length()} tokens: {held:.0f} KiB, {plain:.0f} KiB in full precision]")
    if chat.messages:
        print(f"\n{chat.cache.memory()}")


MESSAGES = (
    f"This is a section of Python's manual:\n\n{topics['for']}\nWhat is it about?",
    "What does the break statement do in a loop?",
    "And its else clause?",
)
"""Turns for any language model."""


def tell_records() -> Iterator[tuple[str, str]]:
    """Yield the turns for the embedded model: new records and a question about one of all so far; the right answer."""
    generator = torch.Generator().manual_seed(2)
    told = TURNS * RECORDS_A_TURN
    batch = sample_recall_batch(1, told, 1, generator=generator)
    records = batch.context[0, 1:].reshape(told, RECORD_LENGTH)
    for turn in range(TURNS):
        new = records[turn * RECORDS_A_TURN : (turn + 1) * RECORDS_A_TURN]
        asked = records[int(torch.randint((turn + 1) * RECORDS_A_TURN, (1,), generator=generator))].tolist()
        yield decode_tokens([*new.flatten().tolist(), VOCABULARY.index("?"), asked[0]]), decode_tokens(asked[1:])


def read_turns(in_vocabulary: bool) -> Iterator[tuple[str, None]]:
    """Yield lines from the keyboard until an empty one; `in_vocabulary`: only words that the embedded model knows."""
    if in_vocabulary:
        print(f"Ask for another (`? Name`), or tell it more; it knows {len(VOCABULARY)} words. An empty line ends it.")
    while True:
        try:
            line = input("\nyou:   ").strip()
        except EOFError:
            print()
            return
        unknown = set(line.replace(".", " ").split()) - set(VOCABULARY) if in_vocabulary else set()
        if unknown:
            print(f"not in its vocabulary: {' '.join(sorted(unknown))}")
        elif line:
            yield line, None
        else:
            return


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Talk over several turns on one quantized cache.")
    parser.add_argument(
        "--model",
        default=EMBEDDED_NAME,
        metavar="PATH_OR_ID",
        help="a causal model, or 'smollm2': a real one, fetched once; default: the embedded one, offline",
    )
    parser.add_argument("--interactive", action="store_true", help="read the turns from the keyboard")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="of each reply; default: 100")
    return parser.parse_args()


if __name__ == "__main__":
    main()
