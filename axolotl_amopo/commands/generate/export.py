"""Write answers as a file: our own rows, or the layout that a benchmark's judge reads.

jsonl        each row as it was, with `response` (a list where there were several questions) and
             `amopo`: model, settings (or weights), instruction, and whether the answer came to its
             end
alpaca_eval  a JSON list of instruction, output, generator and the row's dataset
             (https://github.com/tatsu-lab/alpaca_eval, example/outputs.json)
arena_hard   uid, ans_id, model, messages, tstamp, one row per line; the lengths and markdown
             counts for its style control come from its own utils/add_markdown_info.py
             (https://github.com/lmarena/arena-hard-auto, gen_answer.py)
mt_bench     question_id, answer_id, model_id, choices, tstamp, one row per line
             (https://github.com/lm-sys/FastChat, fastchat/llm_judge/gen_model_answer.py)

Benchmarks get the question as it stood, without the instruction, for a judge compares answers to
the question alone.
"""

import json
import time
import uuid
from collections.abc import Iterable
from typing import Any

from axolotl_amopo.commands.kit.answers import Answer, answer_row
from axolotl_amopo.commands.kit.questions import Prompt
from axolotl_amopo.errors import DataError

# The key by which a benchmark finds its questions.
KEYS = {"arena_hard": "uid", "mt_bench": "question_id"}


def check_style(prompts: Iterable[Prompt], style: str) -> None:
    """Refuse prompts that are not the benchmark's own, before they are answered.

    Raises:
        DataError: naming file, row and key.
    """
    key = KEYS.get(style)
    for prompt in prompts if key else ():
        if prompt.row.get(key) is None:
            raise DataError(
                f"{prompt.where}, key '{key}': is missing; --format {style} is for the "
                "benchmark's own questions; or write --format jsonl."
            )


def export_answers(answers: Iterable[Answer], style: str, model: str) -> str:
    """Return the text of a file of answers.

    Args:
        style: jsonl, alpaca_eval, arena_hard or mt_bench.
        model: the model's name in the file.
    """
    rows = [ROWS[style](answer, model) for answer in answers]
    if style == "alpaca_eval":
        return json.dumps(rows, ensure_ascii=False, indent=2) + "\n"
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _alpaca_eval(answer: Answer, model: str) -> dict[str, Any]:
    row = {
        "instruction": _question(answer),
        "output": answer.turns[0],
        "generator": model,
    }
    dataset = answer.prompt.row.get("dataset")
    return row | ({"dataset": dataset} if dataset else {})


def _arena_hard(answer: Answer, model: str) -> dict[str, Any]:
    return {
        "uid": answer.prompt.row["uid"],
        "ans_id": uuid.uuid4().hex,
        "model": model,
        "messages": [
            {"role": "user", "content": _question(answer)},
            {"role": "assistant", "content": {"answer": answer.turns[0]}},
        ],
        "tstamp": time.time(),
    }


def _mt_bench(answer: Answer, model: str) -> dict[str, Any]:
    return {
        "question_id": answer.prompt.row["question_id"],
        "answer_id": uuid.uuid4().hex,
        "model_id": model,
        "choices": [{"index": 0, "turns": answer.turns}],
        "tstamp": time.time(),
    }


ROWS = {
    "jsonl": answer_row,
    "alpaca_eval": _alpaca_eval,
    "arena_hard": _arena_hard,
    "mt_bench": _mt_bench,
}


def _question(answer: Answer) -> str:
    return answer.prompt.messages[-1]["content"]
