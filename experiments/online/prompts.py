"""Write the prompts of WebNLG 2020 into two files: those of the rounds, and those held out.

    python experiments/online/prompts.py RATED.jsonl experiments/online/work

People's ratings are left out: the rounds rate what the model writes by exact counts.
"""

import json
import random
import sys
from pathlib import Path

HELD_OUT = 40


def main(source: str, folder: str) -> None:
    """Write `prompts.jsonl` and `held_out.jsonl`."""
    with open(source, encoding="utf-8") as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    random.Random(0).shuffle(prompts)
    Path(folder).mkdir(parents=True, exist_ok=True)
    parts = {"held_out": prompts[:HELD_OUT], "prompts": prompts[HELD_OUT:]}
    for name, texts in parts.items():
        lines = (json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts)
        (Path(folder) / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
