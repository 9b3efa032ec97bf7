"""Draw several responses per prompt, for raters to rate: `axolotl amopo generate --candidates N`.

    {"prompt": "Is tea healthy?", "responses": [
        {"text": "...", "settings": "honesty=5", "temperature": 1.0, "seed": 1738291,
         "model": "...", "finished": true}, ...]}

A row is the prompt's own, with what `axolotl amopo rate` takes. Every response has a seed of its
own, from `--seed`, the prompt and the number of the draw: who draws it again, alone or in another
batch, gets the same text (a server may promise less). Of equal texts one stays, and another is
drawn in place of the others, a few times.

Settings and temperatures take turns: each prompt goes on where the one before has stopped, so that
all are used alike, whatever N is.
"""

import json
import os
import random
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import batched, product
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from axolotl_amopo.commands.kit.generator import Generator, Progress, Sampling, ignore_progress
from axolotl_amopo.commands.kit.questions import Prompt
from axolotl_amopo.endpoint import Completion, Endpoint, Request
from axolotl_amopo.errors import AMoPOError, DataError
from axolotl_amopo.model.generate import Seeded
from axolotl_amopo.steering.steering import Settings, Steering, written

# How often a prompt's missing responses are drawn again, where texts were equal or empty.
ROUNDS = 4
# Prompts whose responses are drawn together, and then written.
PROMPTS_AT_ONCE = 32


class Draw(NamedTuple):
    """Say how one response is drawn."""

    prompt: Prompt
    settings: Settings
    temperature: float
    seed: int


class Drawn(NamedTuple):
    """Hold what was drawn."""

    text: str
    finished: bool  # false where max_new_tokens cut it off


#: Yields each draw's place and what was drawn, in any order; None where the server refuses it.
Source = Callable[[Sequence[Draw]], Iterator[tuple[int, Drawn | None]]]


@dataclass
class Counts:
    """Count what came of the draws."""

    prompts: int = 0
    responses: int = 0
    unfinished: int = 0
    equal: int = 0  # drawn and left out, as empty ones are
    refused: int = 0
    short: int = 0  # prompts with fewer responses than asked for


@dataclass
class InProcess:
    """Draw with a model in this process."""

    generator: Generator
    sampling: Sampling
    progress: Progress = ignore_progress

    def __call__(self, draws: Sequence[Draw]) -> Iterator[tuple[int, Drawn | None]]:
        """Yield all draws, when the last one is there.

        Raises:
            DataError: for a prompt that the chat template refuses or that leaves no room.
        """
        ids = [self._ids(draw) for draw in draws]
        seeded = [Seeded(draw.temperature, draw.seed) for draw in draws]
        made = self.generator.engine.generate(ids, self.sampling, self.progress, seeded)
        for place, tokens in enumerate(made):
            text, finished = self.generator.text(tokens), self.generator.finished(tokens)
            yield place, Drawn(text, finished)

    def _ids(self, draw: Draw) -> list[int]:
        prompt = draw.prompt
        try:
            return self.generator.ids(prompt.messages, draw.settings, prompt.tools)
        except TemplateError as error:
            raise DataError(
                f"{prompt.where}: the chat template refuses this conversation ({error})."
            ) from None


@dataclass
class Served:
    """Draw with a model behind an OpenAI-compatible server; the instruction stands in messages."""

    endpoint: Endpoint
    steering: Steering | None
    sampling: Sampling
    progress: Progress = ignore_progress
    tokens: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "completion": 0})

    def __call__(self, draws: Sequence[Draw]) -> Iterator[tuple[int, Drawn | None]]:
        """Yield each draw as it comes.

        Raises:
            AMoPOError: where the server fails; what came before is yielded.
        """
        for place, reply in self.endpoint.complete(map(self._request, draws)):
            self.progress(1)
            if not isinstance(reply, Completion):
                yield place, None
                continue
            self.tokens["prompt"] += reply.prompt_tokens
            self.tokens["completion"] += reply.completion_tokens
            yield place, Drawn(reply.text.strip(), reply.finished)

    def _request(self, draw: Draw) -> Request:
        messages = draw.prompt.messages
        options: dict[str, Any] = {
            "max_tokens": self.sampling.max_new_tokens,
            "temperature": draw.temperature,
            "top_p": self.sampling.top_p,
            "seed": draw.seed,
            "tools": draw.prompt.tools,
        }
        if self.steering:
            messages = self.steering.messages(messages, draw.settings)
            options["chat_template_kwargs"] = self.steering.chat_template_kwargs or None
        return Request(messages, options)


def spread_of(steering: Steering | None) -> list[Settings]:
    """Return the settings by which responses differ if nobody names others.

    They are none, everything at its best, and each dimension at its best and its worst.
    """
    if steering is None:
        return [{}]
    each: list[Settings] = [{}, steering.everything()]
    for dimension in steering.dimensions:
        tries = steering.tries(dimension) if steering.takes_numbers else []
        ends = {steering.best(dimension), *tries[:1], *tries[-1:]} if tries else {None}
        each += [{dimension.name: end} for end in sorted(ends, key=lambda end: end or 0)]
    return list({steering.instruction(one): one for one in reversed(each)}.values())[::-1]


def draw_candidates(
    prompts: Iterable[Prompt],
    count: int,
    spread: Sequence[Settings],
    temperatures: Sequence[float],
    source: Source,
    *,
    model: str,
    seed: int = 0,
    done: Container[str] = (),
    counts: Counts | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield each prompt's row with `count` different responses, in order.

    A prompt for which none can be had is left out and counted.

    Args:
        prompts: of one question each.
        spread: settings that the model can be asked for.
        temperatures: above 0.
        model: its name in the rows.
        done: keys of prompts that have their row already, see `drawn_before`.
        counts: is added to.

    Raises:
        AMoPOError: where the source fails; rows that are complete are yielded before.
    """
    counts = counts or Counts()
    ways = list(product(temperatures, spread))
    left = ((n, prompt) for n, prompt in enumerate(prompts) if _key(prompt.row) not in done)
    for part in batched(left, PROMPTS_AT_ONCE):
        found: list[dict[str, dict[str, Any]]] = [{} for _ in part]  # responses by their texts
        failed: AMoPOError | None = None
        for attempt in range(ROUNDS):
            draws, owners = [], []
            for place, (number, prompt) in enumerate(part):
                for missing in range(count - len(found[place])):
                    turn = number * count + attempt + missing
                    temperature, settings = ways[turn % len(ways)]
                    key = f"{seed}/{_key(prompt.row)}/{attempt}/{missing}"
                    own = random.Random(key).getrandbits(31)
                    draws.append(Draw(prompt, settings, temperature, own))
                    owners.append(place)
            if not draws:
                break
            # By place, so that which of two equal texts stays does not depend on who was faster.
            made: dict[int, Drawn | None] = {}
            try:
                for i, drawn in source(draws):
                    made[i] = drawn
            except AMoPOError as error:
                failed = error
            for i in sorted(made):
                drawn, draw, texts = made[i], draws[i], found[owners[i]]
                if drawn is None:
                    counts.refused += 1
                elif not drawn.text or drawn.text in texts:
                    counts.equal += 1
                else:
                    texts[drawn.text] = {
                        "text": drawn.text,
                        "settings": written(draw.settings),
                        "temperature": draw.temperature,
                        "seed": draw.seed,
                        "model": model,
                        "finished": drawn.finished,
                    }
            if failed:
                break
        for (_, prompt), texts in zip(part, found, strict=True):
            if failed and len(texts) < count:
                continue
            counts.short += len(texts) < count
            if texts:
                counts.prompts += 1
                counts.responses += len(texts)
                counts.unfinished += sum(not one["finished"] for one in texts.values())
                yield _row(prompt, list(texts.values()))
        if failed:
            raise failed


def _row(prompt: Prompt, responses: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the prompt's own row with responses behind those that it has."""
    row = prompt.row
    own = row.get("responses")
    if row.get("prompt") is None and row.get("messages") is None:  # it is an instruction
        row = {"messages": prompt.messages} | row
    return row | {"responses": [*(own if isinstance(own, list) else []), *responses]}


def check_prompts(prompts: Iterable[Prompt]) -> None:
    """Refuse prompts with several questions.

    Raises:
        DataError: naming file and row.
    """
    for prompt in prompts:
        if prompt.later:
            raise DataError(
                f"{prompt.where}, key 'turns': has {prompt.questions} questions, and --candidates "
                "answers one; write it as messages, up to the question to answer."
            )


def drawn_before(prompts: Iterable[Prompt], output: Path) -> set[str]:
    """Return the keys of prompts with a row in a file that was begun; take half a line off its end.

    Raises:
        DataError: for a file that holds something else, or rows of other prompts.
    """
    *lines, rest = output.read_bytes().split(b"\n")  # a killed process leaves half a line
    done: set[str] = set()
    for number, line in enumerate(lines, start=1):
        try:
            done.add(_key(json.loads(line)))
        except (ValueError, AttributeError):
            raise DataError(
                f"{output}, line {number}: is no row of candidates; name another --output."
            ) from None
    if others := len(done - {_key(prompt.row) for prompt in prompts}):
        raise DataError(
            f"{output}: has rows of {others} prompts that the input lacks; name the input that it "
            "was begun with, or another --output."
        )
    if rest:
        os.truncate(output, output.stat().st_size - len(rest))
    return done


def _key(row: dict[str, Any]) -> str:
    """Return what tells a row's prompt from others, whatever responses it has."""
    asked = {
        name: row.get(name) for name in ("messages", "prompt", "instruction", "system", "tools")
    }
    if asked["instruction"] is not None:
        asked["messages"] = None  # put there beside it, see `_row`
    return json.dumps(asked, sort_keys=True)
