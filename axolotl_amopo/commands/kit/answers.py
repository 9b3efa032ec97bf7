"""Prompts under settings -> answers, in batches."""

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jinja2 import TemplateError

from axolotl_amopo.commands.generate.questions import Prompt
from axolotl_amopo.commands.kit.trained import Trained, chat_tokenizer, load_model, load_tokenizer
from axolotl_amopo.data.rows import Message
from axolotl_amopo.data.tokenizer import ChatTokenizer
from axolotl_amopo.errors import AMoPOError, DataError
from axolotl_amopo.steering.steering import Settings


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; with a temperature of 0, the likeliest."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 8


@dataclass
class Answer:
    """One prompt answered under one setting."""

    prompt: Prompt
    settings: Settings
    instruction: str
    turns: list[str] = field(default_factory=list)  # one a question
    tokens: int = 0
    finished: bool = True  # false where max_new_tokens cut an answer off


class Engine(Protocol):
    """What makes tokens of tokens."""

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, done: Callable[[int], None]
    ) -> list[list[int]]:
        """What follows each prompt, its end of turn included where it came to one.

        `done` is told how many prompts were answered.
        """


class Transformers:
    """transformers' own generation, prompts of a length together and padded on their left."""

    def __init__(self, trained: Trained, chat: ChatTokenizer, *, base: bool = False):
        self.model = load_model(trained, base=base)
        own = self.model.generation_config.eos_token_id
        own = own if isinstance(own, list) else [own]
        self.stops = sorted(stop_ids(chat) | {stop for stop in own if stop is not None})
        self.longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, done: Callable[[int], None]
    ) -> list[list[int]]:
        import torch
        from transformers import GenerationConfig

        pad = self.stops[0]
        how: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            how = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": 0,
            }
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens, eos_token_id=self.stops, pad_token_id=pad, **how
        )
        torch.manual_seed(sampling.seed)
        # Longest first: what doesn't fit into memory shows at once.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        answers: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), sampling.batch_size):
            batch = order[start : start + sampling.batch_size]
            width = len(prompts[batch[0]])
            if self.longest and width >= self.longest:
                raise DataError(
                    f"a prompt of {width} tokens leaves no room for an answer: the model takes "
                    f"{self.longest}."
                )
            ids = [[pad] * (width - len(prompts[i])) + prompts[i] for i in batch]
            mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch]
            device = self.model.device
            with torch.inference_mode():
                made = self.model.generate(
                    input_ids=torch.tensor(ids, device=device),  # [B, T]
                    attention_mask=torch.tensor(mask, device=device),
                    generation_config=config,
                )
            for i, row in zip(batch, made[:, width:].tolist(), strict=True):
                answers[i] = until(row, self.stops)
            done(len(batch))
        return answers


class VLLM:
    """vLLM's generation, where it is installed. Not run by this package's tests."""

    def __init__(self, trained: Trained, chat: ChatTokenizer, *, base: bool = False):
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.stops = sorted(stop_ids(chat))
        adapted = trained.is_adapter and not base
        whole = trained.base_folder() if trained.is_adapter or base else str(trained.folder)
        options: dict[str, Any] = {}
        if adapted:
            from peft import PeftConfig

            config = PeftConfig.from_pretrained(str(trained.folder))
            rank = max(config.r, *config.rank_pattern.values(), 0)
            options = {"enable_lora": True, "max_lora_rank": room_for(rank)}
        self.model = LLM(model=whole, **options)
        self.adapter = LoRARequest("amopo", 1, str(trained.folder.resolve())) if adapted else None

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, done: Callable[[int], None]
    ) -> list[list[int]]:
        from vllm import SamplingParams

        made = self.model.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
                stop_token_ids=self.stops,
            ),
            lora_request=self.adapter,
            use_tqdm=False,
        )
        done(len(prompts))
        return [until(list(one.outputs[0].token_ids), self.stops) for one in made]


def room_for(rank: int) -> int:
    """The `max_lora_rank` for adapters of a rank: vLLM takes few others than 8, 16, 32, ... 512
    (https://github.com/vllm-project/vllm/blob/main/vllm/config/lora.py).
    """
    return max(8, 1 << (rank - 1).bit_length())


class Generator:
    """A trained model, or its base, that answers under settings.

    Args:
        backend: `transformers`, `vllm`, or `auto`: vLLM on a GPU where it is installed.
        base: answer with the untuned model.

    Raises:
        AMoPOError: where the model or its tokenizer can't be loaded.
    """

    def __init__(self, trained: Trained, backend: str = "auto", *, base: bool = False):
        self.trained = trained
        self.tokenizer = load_tokenizer(trained)
        self.chat = chat_tokenizer(trained, self.tokenizer)
        self.engine: Engine = choose(backend)(trained, self.chat, base=base)

    def answers(
        self,
        prompts: Iterable[Prompt],
        each: Sequence[Settings],
        sampling: Sampling,
        done: Callable[[int], None] = lambda count: None,
    ) -> list[Answer]:
        """Every prompt's answer under each of the settings, prompt by prompt.

        A prompt's later questions are asked after the answers to those before them.

        Raises:
            AMoPOError: for settings that the model can't be asked for.
            DataError: for a prompt that the chat template refuses or the model has no room for.
        """
        asked = [self.instruction(settings) for settings in each]
        answers = [
            Answer(prompt, settings, text)
            for prompt in prompts
            for settings, text in zip(each, asked, strict=True)
        ]
        waiting = answers
        while waiting:
            made = self.engine.generate([self._ids(one) for one in waiting], sampling, done)
            for answer, ids in zip(waiting, made, strict=True):
                answer.turns.append(self.text(ids))
                answer.tokens += len(ids)
                answer.finished &= self.ended(ids)
            waiting = [one for one in waiting if len(one.turns) < one.prompt.questions]
        return answers

    def instruction(self, settings: Settings) -> str:
        return self.trained.steering.instruction(settings) if settings else ""

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def ended(self, ids: list[int]) -> bool:
        return bool(ids) and ids[-1] in self.engine.stops

    def ids(self, messages: list[Message], settings: Settings, tools: Any = None) -> list[int]:
        """A conversation's token ids, exactly those of training for the same instruction."""
        if settings:
            messages = self.trained.steering.messages(messages, settings)
        return self.chat.prompt_ids(messages, tools)

    def _ids(self, answer: Answer) -> list[int]:
        prompt = answer.prompt
        try:
            return self.ids(prompt.conversation(answer.turns), answer.settings, prompt.tools)
        except TemplateError as error:
            raise DataError(
                f"{prompt.where}: the chat template refuses this conversation ({error})."
            ) from None


def choose(backend: str) -> type[Transformers] | type[VLLM]:
    """The engine of that name.

    Raises:
        AMoPOError: for vLLM where it is not installed.
    """
    there = importlib.util.find_spec("vllm") is not None
    if backend == "vllm" and not there:
        raise AMoPOError("vLLM is not installed here; install it, or leave --backend out.")
    if backend == "auto" and there:
        import torch

        backend = "vllm" if torch.accelerator.is_available() else "transformers"
    return VLLM if backend == "vllm" else Transformers


def stop_ids(chat: ChatTokenizer) -> set[int]:
    """The tokens that end an answer: EOS, and what the template closes a turn with."""
    tokenizer = chat.tokenizer
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    turn = chat.response_ids([{"role": "user", "content": "a"}], "a")
    return {tokenizer.eos_token_id} | (special & set(turn))


def until(ids: list[int], stops: Sequence[int]) -> list[int]:
    """Up to the first of the stops, that one included."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + 1]
