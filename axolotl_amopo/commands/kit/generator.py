"""Generate with a trained model that is asked for ratings: conversations in, token ids out."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from axolotl_amopo.commands.kit.models import (
    ADAPTER,
    TrainedModel,
    chat_tokenizer,
    load_model,
    load_tokenizer,
)
from axolotl_amopo.data.rows import Message
from axolotl_amopo.data.tokenizer import ChatTokenizer
from axolotl_amopo.errors import AMoPOError, DataError
from axolotl_amopo.model.generate import (
    Seeded,
    continue_prompts,
    generation_config,
    stop_tokens,
    until_stop,
)
from axolotl_amopo.steering.steering import Settings

# Called with the number of prompts that were just answered.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Sampling:
    """Say how tokens are chosen; with a temperature of 0, the likeliest."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 8


def ignore_progress(count: int) -> None:
    """Take a count of prompts that were answered, and show nothing."""


class TransformersEngine:
    """Generate with transformers, in batches of prompts padded on their left.

    Raises:
        AMoPOError: where the model can't be loaded.
    """

    def __init__(self, trained: TrainedModel, chat: ChatTokenizer, *, base: bool = False):
        self.model = load_model(trained, base=base)
        self.stops = stop_tokens(self.model, *stop_ids(chat))
        self.longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        progress: Progress = ignore_progress,
        draws: Sequence[Seeded] | None = None,
    ) -> list[list[int]]:
        """Return the continuation of each prompt, with the stop token that ended it.

        Args:
            prompts: token ids.
            progress: called with the number of prompts that were just answered.
            draws: temperature and seed of each, in place of those of `sampling`.

        Raises:
            DataError: for a prompt that leaves no room for an answer.
        """
        import torch

        longest = max(map(len, prompts), default=0)
        if self.longest and longest >= self.longest:
            raise DataError(
                f"a prompt of {longest} tokens leaves no room for an answer: the model takes "
                f"{self.longest}."
            )
        temperature = 0.0 if draws else sampling.temperature
        config = generation_config(self.stops, sampling.max_new_tokens, temperature, sampling.top_p)
        torch.manual_seed(sampling.seed)
        return continue_prompts(
            self.model,
            prompts,
            config,
            sampling.batch_size,
            progress,
            draws=draws,
            top_p=sampling.top_p,
        )


class VLLMEngine:
    """Generate with vLLM, where it is installed: run by hand, by no test."""

    def __init__(self, trained: TrainedModel, chat: ChatTokenizer, *, base: bool = False):
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.stops = sorted(stop_ids(chat))
        adapted = trained.is_adapter and not base
        whole = trained.base_folder() if trained.is_adapter or base else str(trained.folder)
        options: dict[str, Any] = {}
        if adapted:
            # By hand: vLLM's environment needs no peft.
            config = json.loads((trained.folder / ADAPTER).read_text(encoding="utf-8"))
            rank = max(config["r"], *(config.get("rank_pattern") or {}).values(), 0)
            options = {"enable_lora": True, "max_lora_rank": vllm_lora_rank(rank)}
        self.model = LLM(model=whole, **options)
        self.adapter = LoRARequest("amopo", 1, str(trained.folder.resolve())) if adapted else None

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        progress: Progress = ignore_progress,
        draws: Sequence[Seeded] | None = None,
    ) -> list[list[int]]:
        """Return the continuation of each prompt, see `TransformersEngine.generate`."""
        from vllm import SamplingParams

        every = draws or [Seeded(sampling.temperature, sampling.seed)] * len(prompts)
        made = self.model.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            [
                SamplingParams(
                    max_tokens=sampling.max_new_tokens,
                    temperature=one.temperature,
                    top_p=sampling.top_p,
                    seed=one.seed,
                    stop_token_ids=self.stops,
                )
                for one in every
            ],
            lora_request=self.adapter,
            use_tqdm=False,
        )
        progress(len(prompts))
        return [until_stop(list(one.outputs[0].token_ids), self.stops) for one in made]


def vllm_lora_rank(rank: int) -> int:
    """Return vLLM's `max_lora_rank` for adapters of a rank.

    vLLM takes few others than 8, 16, 32, ... 512
    (https://github.com/vllm-project/vllm/blob/main/vllm/config/lora.py).
    """
    return max(8, 1 << (rank - 1).bit_length())


class Generator:
    """Turn conversations and settings into prompts, and continue them with a model.

    Args:
        trained: from `find_model`.
        backend: `transformers`, `vllm`, or `auto`: vLLM on a GPU where it is installed.
        base: answer with the untuned model.

    Raises:
        AMoPOError: where the model or its tokenizer can't be loaded.
    """

    def __init__(self, trained: TrainedModel, backend: str = "auto", *, base: bool = False):
        self.trained = trained
        self.tokenizer = load_tokenizer(trained)
        self.chat = chat_tokenizer(trained, self.tokenizer)
        self.engine = choose_engine(backend)(trained, self.chat, base=base)

    def instruction(self, settings: Settings) -> str:
        """Return the instruction of some settings, empty where they are.

        Raises:
            AMoPOError: for settings that the model can't be asked for.
        """
        return self.trained.steering.instruction(settings) if settings else ""

    def ids(self, messages: list[Message], settings: Settings, tools: Any = None) -> list[int]:
        """Return a conversation's token ids, those of training for the same instruction.

        Raises:
            AMoPOError: for settings that the model can't be asked for.
            TemplateError: for a conversation that the chat template refuses.
        """
        if settings:
            messages = self.trained.steering.messages(messages, settings)
        return self.chat.prompt_ids(messages, tools)

    def text(self, ids: list[int]) -> str:
        """Return token ids as text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def finished(self, ids: list[int]) -> bool:
        """Return whether an answer ended by itself, not at `max_new_tokens`."""
        return bool(ids) and ids[-1] in self.engine.stops


def choose_engine(backend: str) -> type[TransformersEngine] | type[VLLMEngine]:
    """Return the engine of a backend's name, see `Generator`.

    Raises:
        AMoPOError: for vLLM where it is not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if backend == "vllm" and not installed:
        raise AMoPOError("vLLM is not installed here; install it, or leave --backend out.")
    if backend == "auto" and installed:
        import torch

        backend = "vllm" if torch.accelerator.is_available() else "transformers"
    return VLLMEngine if backend == "vllm" else TransformersEngine


def stop_ids(chat: ChatTokenizer) -> set[int]:
    """Return the tokens that end an answer: EOS, and that with which the template ends a turn."""
    return {chat.tokenizer.eos_token_id, chat.end_id()}
