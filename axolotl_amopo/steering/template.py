"""A chat template that steers by a line of the system message: transformers, vLLM, llama.cpp.

    {"role": "system", "content": "amopo: helpfulness=4, honesty=5\nYou are a cook."}

The first line of the system message says what to ask for: dimensions with their ratings, `overall`,
`none`, or `weights helpfulness=0.7, honesty=0.3`. It is taken out, and the system message with it
where that was all; the instruction goes where training had it; then the model's own template
renders what there is. Without such a line nothing changes, unless settings were put into the
template when it was made, or come as its variable `amopo` (`apply_chat_template(...,
amopo="helpfulness=4")`, `chat_template_kwargs`).
"""

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from axolotl_amopo.config.instructions import ENVIRONMENT, dimension_facts
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.steering.steering import (
    BY_WEIGHT,
    OVERALL,
    Settings,
    Steering,
    Weights,
    written,
)

PREFIX = "amopo:"
END = "end of amopo's steering"
PROLOGUE = Path(__file__).with_name("prologue.jinja")


def steered(template: str, steering: Steering, settings: Settings | None = None) -> str:
    """A chat template that steers.

    Args:
        template: the model's own; one that steers already is steered anew.
        settings: what a conversation that says nothing else is to ask for.
    """
    steering.asked(settings or {})
    dimensions = {
        d.name: dimension_facts(d.name, d.description, d.scale, None)
        | dict(zip(("low", "high"), steering.range(d), strict=True), best=steering.best(d))
        for d in steering.dimensions
    }
    values = {
        "ONE": with_literals(steering.template),
        "SEVERAL": with_literals(steering.overall_template),
        "DIMENSIONS": literal(dimensions),
        "KNOWN": literal(", ".join(steering.prompts)),
        "DEFAULT": literal(written(settings or {})),
        "OVERALL": repr(steering.overall),
        "ONE_PROMPT": repr(steering.one_prompt),
        "RATED": repr(steering.takes_numbers),
        "WEIGHTED": repr(steering.weighted),
        "BY_WEIGHT": repr(BY_WEIGHT),
        "TAKES_WEIGHTS": repr(steering.takes_weights),
        "STEPS": repr(steering.rating_levels - 1 if steering.rating_levels else 0),
        "PLACE": repr(steering.instruction_place),
        "END": END,
    }
    prologue = PROLOGUE.read_text(encoding="utf-8")
    return re.sub("<<([A-Z_]+)>>", lambda found: values[found[1]], prologue) + unsteered(template)


def unsteered(template: str) -> str:
    """The model's own chat template."""
    _, end, own = template.rpartition(f"{{#- {END} #}}\n")
    return own if end else template


def literal(value: Any) -> str:
    """Return a value as Jinja source, with none but the escapes that llama.cpp's engine knows."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def with_literals(source: str) -> str:
    """A Jinja template with its text as string literals.

    What a newline beside a tag becomes depends on the environment; transformers' is another than
    that of training.
    """
    made, comment = [], False
    for _, kind, text in ENVIRONMENT.lex(source):
        comment = comment or kind == "comment_begin"
        if kind == "data":
            made.append(f"{{{{ {literal(text)} }}}}")
        elif not comment and not kind.startswith("raw_"):
            made.append(text)
        comment = comment and kind != "comment_end"
    return "".join(made)


def check(tokenizer: Any, template: str, steering: Steering) -> None:
    """Hold a template that steers against what training rendered, by conversations and settings.

    Raises:
        AMoPOError: where they differ, or the template fails.
    """
    own = unsteered(template)
    user, system = {"role": "user", "content": "Why?"}, {"role": "system", "content": "Be brief."}
    told = [user, {"role": "assistant", "content": "So."}, {"role": "user", "content": "Really? "}]
    every: list[Settings] = [{}, *({d.name: None} for d in steering.dimensions)]
    if steering.takes_numbers and not steering.weighted:
        for d in steering.dimensions:
            low, high = d.scale
            between = round(low + 0.4 * (high - low), 2)  # as `written` writes it
            every += [{d.name: rating} for rating in (low, between, high)]
    if steering.takes_weights:
        names = [d.name for d in steering.dimensions]
        uneven = Weights({name: round(0.7 / (1 + i), 2) for i, name in enumerate(names)})
        weights = [Weights({names[0]: 0.35}), Weights.fromkeys(names, 0.7), uneven]
        every += weights + [dict(one) for one in weights if steering.weighted]
    every += [{OVERALL: None}] * steering.overall

    def render(messages: list[dict], chat_template: str) -> str:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=chat_template,
            add_generation_prompt=True,
            tokenize=False,
            **steering.chat_template_kwargs,
        )

    for messages in ([user], [system, user], told):
        for settings in every:
            try:
                expected = render(steering.messages(messages, settings), own)
            except TemplateError:  # it takes no system message
                continue
            given = [message for message in messages if message is system]
            rest = [message for message in messages if message is not system]
            said = given[0]["content"] if given else ""
            line = f"{PREFIX} {written(settings)}\n{said}"
            try:
                made = render([{"role": "system", "content": line}, *rest], template)
            except TemplateError as error:
                made = f"an error: {error}"
            if made != expected:
                raise AMoPOError(
                    f"the template for '{written(settings)}' would render {made!r}, where training "
                    f"rendered {expected!r}; please report it."
                )
