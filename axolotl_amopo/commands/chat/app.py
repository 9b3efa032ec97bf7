"""Serve a page on which the base's and the tuned model's answers stand side by side."""

import itertools
import socket
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import gradio as gr
from jinja2 import TemplateError

from axolotl_amopo.commands.kit.generator import Generator, Sampling
from axolotl_amopo.commands.kit.models import TrainedModel
from axolotl_amopo.data.rows import Message
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.steering.steering import OVERALL, Settings, Weights

NOTHING = "Nothing is asked for: the question goes to the model as it is."
# The header's name of a long folder must not widen a phone's page.
CSS = "h1 {overflow-wrap: anywhere} footer {display: none !important}"
# Answers are Markdown, in which an image's address could carry the conversation away.
HEAD = (
    '<meta http-equiv="Content-Security-Policy" content="'
    "img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "style-src 'self' 'unsafe-inline'; font-src 'self' data:\">"
)


class ComparedModels:
    """Answer as the tuned model or as its base.

    An adapter is switched off for the base's answers; beside a whole model, its base is loaded too.

    Raises:
        AMoPOError: where a model can't be loaded.
    """

    def __init__(self, trained: TrainedModel, *, with_base: bool):
        self.steering = trained.steering
        self.name = trained.folder.resolve().name
        self.tuned = Generator(trained, "transformers")
        self.names = ["base", "tuned"] if with_base else ["tuned"]
        self._base = self.tuned
        if with_base and not trained.is_adapter:
            self._base = Generator(trained, "transformers", base=True)
        self._lock = threading.Lock()  # an adapter that is off is off for all visitors

    def answer(
        self, side: str, messages: list[Message], settings: Settings, sampling: Sampling
    ) -> tuple[str, bool]:
        """Return the next turn of a conversation, and whether it ended by itself.

        Args:
            side: `base` or `tuned`.

        Raises:
            AMoPOError: for settings or a conversation that the model does not take.
        """
        generator = self.tuned if side == "tuned" else self._base
        try:
            ids = generator.ids(messages, settings)
        except TemplateError as error:
            raise AMoPOError(f"the chat template refuses this conversation ({error}).") from None
        with self._lock:
            model = generator.engine.model
            switched = side == "base" and generator is self.tuned
            with model.disable_adapter() if switched else nullcontext():
                (made,) = generator.engine.generate([ids], sampling)
        return generator.text(made), generator.finished(made)


def chat_page(models: ComparedModels) -> gr.Blocks:
    """Return the page; programs can call its `/ask` and `/instruction` too."""
    steering = models.steering
    names = [dimension.name for dimension in steering.dimensions]

    def settings_of(overall: bool, by_weight: bool, *controls: Any) -> dict[str, float | None]:
        wanted, ratings, shares = itertools.batched(controls, len(names))
        asked = {
            name: number if steering.takes_numbers else None
            for name, on, number in zip(
                names, wanted, shares if by_weight else ratings, strict=True
            )
            if on
        }
        if by_weight:
            return Weights(asked or (dict.fromkeys(names, 1.0) if overall else {}))
        return ({OVERALL: None} if overall else {}) | asked

    def instruction(*controls: Any) -> str:
        try:
            return steering.instruction(settings_of(*controls)) or NOTHING
        except AMoPOError as error:
            return f"This can't be asked for: {error}"

    def ask(
        question: str,
        history: dict[str, list[Message]],
        tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        steer_base: bool,
        *controls: Any,
    ) -> Iterator[tuple]:
        if not question.strip():
            raise gr.Error("Write a question first.", print_exception=False)
        sampling = Sampling(int(tokens), temperature, top_p, int(seed))
        before = {side: history.get(side, []) for side in models.names}
        history = {
            side: [*turns, {"role": "user", "content": question}] for side, turns in before.items()
        }
        yield "", history, *(history[side] for side in models.names)
        try:
            settings = settings_of(*controls)
            for side in reversed(models.names):
                chosen = settings if side == "tuned" or steer_base else {}
                text, finished = models.answer(side, history[side], chosen, sampling)
                if not finished:
                    gr.Info(f"{side.capitalize()}: cut off after {sampling.max_new_tokens} tokens")
                history[side] = [*history[side], {"role": "assistant", "content": text}]
                yield "", history, *(history[side] for side in models.names)
        except AMoPOError as error:
            # An unanswered question would stand before the next one.
            yield question, before, *(before[side] for side in models.names)
            raise gr.Error(str(error), print_exception=False) from None

    with gr.Blocks(title=f"AMoPO: {models.name}", analytics_enabled=False) as blocks:
        gr.Markdown(f"# {models.name}")
        history = gr.State({})
        with gr.Row():
            question = gr.Textbox(
                label="Question",
                placeholder="Enter asks; Shift+Enter is a new line",
                scale=5,
                min_width=300,
            )
            with gr.Column(scale=1, min_width=140):
                send = gr.Button("Ask", variant="primary")
                clear = gr.Button("Start anew")
        with gr.Row():
            wanted, ratings, shares = [], [], []
            for d in steering.dimensions:
                with gr.Column(min_width=240):
                    lower = " (lower is better)" if d.direction == "lower" else ""
                    wanted.append(gr.Checkbox(label=f"Ask for {d.name}"))
                    tries = steering.tries(d)
                    ratings.append(
                        gr.Slider(
                            *steering.range(d),
                            value=steering.best(d),
                            step=round(tries[1] - tries[0], 6),
                            label=(d.description or d.name) + lower,
                            buttons=[],
                            interactive=False,
                            visible=steering.takes_numbers,
                        )
                    )
                    shares.append(
                        gr.Slider(
                            0.0,
                            1.0,
                            value=0.5,
                            step=0.1,
                            label=f"Weight: {d.description or d.name}",
                            buttons=[],
                            interactive=False,
                            visible=False,
                        )
                    )
        with gr.Row():
            with gr.Column(scale=1, min_width=240):
                overall = gr.Checkbox(
                    label="Ask for all dimensions",
                    info="At their best, or as set above",
                    visible=steering.overall,
                )
                by_weight = gr.Checkbox(
                    label="Ask by weights",
                    info="They become ratings of all dimensions",
                    visible=steering.takes_weights and not steering.weighted,
                )
            with gr.Column(scale=3, min_width=300):
                seen = gr.Textbox(NOTHING, label="The instruction", interactive=False)
        with gr.Accordion("Sampling", open=False):
            tokens = gr.Slider(16, 2048, value=256, step=16, label="Longest answer, in tokens")
            temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0: likeliest)")
            top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top p")
            seed = gr.Number(0, precision=0, label="Seed")
            steer_base = gr.Checkbox(
                value=True,
                label="The base gets the instruction too",
                visible=len(models.names) > 1,
            )
        with gr.Row():
            shown = [
                gr.Chatbot(
                    label=side.capitalize(),
                    min_width=300,
                    height=400,
                    buttons=["copy"],
                    feedback_options=None,
                    autoscroll=False,
                )
                for side in models.names
            ]

        controls = [overall, by_weight, *wanted, *ratings, *shares]
        by_weight.change(
            lambda on: (
                [gr.update(visible=not on)] * len(names) + [gr.update(visible=on)] * len(names)
            ),
            by_weight,
            [*ratings, *shares],
            show_progress="hidden",
            api_visibility="private",
        )
        for box, *sliders in zip(wanted, ratings, shares, strict=True):
            box.change(
                lambda on: [gr.update(interactive=on)] * 2, box, sliders, show_progress="hidden",
                api_visibility="private",
            )  # fmt: skip
        gr.on(
            [control.change for control in controls],
            instruction,
            controls,
            seen,
            show_progress="hidden",
            trigger_mode="always_last",
            api_name="instruction",
        )
        gr.on(
            [question.submit, send.click],
            ask,
            [question, history, tokens, temperature, top_p, seed, steer_base, *controls],
            [question, history, *shown],
            api_name="ask",
        )
        gr.on(
            [clear.click, *(side.clear for side in shown)],
            lambda: ({}, *([] for _ in shown)),
            None,
            [history, *shown],
            api_visibility="private",
        )
    return blocks


def free_port(host: str, port: int) -> int:
    """Return the port, or for 0 any that is free; call it before a model is loaded.

    Raises:
        AMoPOError: where the port is taken, or the host is not this machine's.
    """
    try:
        with socket.create_server((host, port)) as server:
            return server.getsockname()[1]
    except OSError as error:
        raise AMoPOError(
            f"The page can't be served on {host}:{port} ({error.strerror}); name another --port, "
            "or --port 0 for any that is free."
        ) from None


def serve(blocks: gr.Blocks, *, host: str, port: int, share: bool) -> None:
    """Serve a page until the process is stopped.

    Raises:
        AMoPOError: where the port has been taken since.
    """
    try:
        _, local, public = blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            css=CSS,
            head=HEAD,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise AMoPOError(f"The page can't be served on {host}:{port}: {error}") from None
    print(f"Open {public or local}", flush=True)
    blocks.block_thread()
