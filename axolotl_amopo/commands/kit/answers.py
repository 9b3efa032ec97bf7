"""Answer prompts with a trained model, under one or several settings.

Example:

    answers = generate_answers(
        find_model("outputs/adapter"), [text_prompt("Is tea healthy?")], [{"honesty": 5}]
    )
    answers[0].turns[0]
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from axolotl_amopo.commands.kit.generator import (
    Generator,
    Progress,
    Sampling,
    ignore_progress,
)
from axolotl_amopo.commands.kit.models import TrainedModel
from axolotl_amopo.commands.kit.questions import Prompt
from axolotl_amopo.errors import DataError
from axolotl_amopo.steering.steering import Settings, Weights

GREEDY = Sampling()


@dataclass
class Answer:
    """Hold a model's answer to one prompt under one setting."""

    prompt: Prompt
    settings: Settings
    instruction: str
    turns: list[str] = field(default_factory=list)  # one per question
    tokens: int = 0
    finished: bool = True  # false where max_new_tokens cut an answer off


def generate_answers(
    trained: TrainedModel,
    prompts: Iterable[Prompt],
    each: Sequence[Settings] = ({},),
    sampling: Sampling = GREEDY,
    *,
    backend: str = "auto",
    base: bool = False,
    progress: Callable[[int], Progress] = lambda count: ignore_progress,
) -> list[Answer]:
    """Load a model and return its answers, see `answer_prompts`.

    Args:
        trained: from `find_model`.
        backend: `transformers`, `vllm`, or `auto`: vLLM on a GPU where it is installed.
        base: answer with the untuned model.
        progress: called with the number of questions when the model is loaded; what it returns is
            called with the number of those that were just answered.

    Raises:
        AMoPOError: for a model that can't be loaded, or settings that it can't be asked for.
        DataError: for a prompt that the chat template refuses or that leaves no room for an answer.
    """
    for settings in filter(None, each):
        trained.steering.asked(settings)  # fails before the model is loaded
    generator = Generator(trained, backend, base=base)
    prompts = list(prompts)
    count = sum(prompt.questions for prompt in prompts) * len(each)
    return answer_prompts(generator, prompts, each, sampling, progress(count))


def answer_prompts(
    generator: Generator,
    prompts: Iterable[Prompt],
    each: Sequence[Settings],
    sampling: Sampling,
    progress: Progress = ignore_progress,
) -> list[Answer]:
    """Return every prompt's answer under each of the settings: all of the first prompt first.

    A prompt's later questions are asked after the answers to the earlier ones.

    Args:
        progress: called with the number of questions that were just answered.

    Raises:
        AMoPOError: for settings that the model can't be asked for.
        DataError: for a prompt that the chat template refuses or that leaves no room for an answer.
    """
    instructions = [generator.instruction(settings) for settings in each]
    answers = [
        Answer(prompt, settings, text)
        for prompt in prompts
        for settings, text in zip(each, instructions, strict=True)
    ]
    waiting = answers
    while waiting:
        ids = [_prompt_ids(generator, one) for one in waiting]
        made = generator.engine.generate(ids, sampling, progress)
        for answer, ids in zip(waiting, made, strict=True):
            answer.turns.append(generator.text(ids))
            answer.tokens += len(ids)
            answer.finished &= generator.finished(ids)
        waiting = [one for one in waiting if len(one.turns) < one.prompt.questions]
    return answers


def answer_row(answer: Answer, model: str) -> dict[str, Any]:
    """Return the prompt's own row with `response` and `amopo` in it."""
    response = answer.turns if answer.prompt.later else answer.turns[0]
    about = {
        "model": model,
        "weights" if isinstance(answer.settings, Weights) else "settings": dict(answer.settings),
        "instruction": answer.instruction,
        "finished": answer.finished,
    }
    return answer.prompt.row | {"response": response, "amopo": about}


def _prompt_ids(generator: Generator, answer: Answer) -> list[int]:
    prompt = answer.prompt
    try:
        return generator.ids(prompt.conversation(answer.turns), answer.settings, prompt.tools)
    except TemplateError as error:
        raise DataError(
            f"{prompt.where}: the chat template refuses this conversation ({error})."
        ) from None
