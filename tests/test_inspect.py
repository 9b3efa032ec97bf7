"""`axolotl amopo inspect`: its numbers by hand, its page, and the rows that training gets."""

import copy
import json
import multiprocessing
import os
import re
import sys
from html.parser import HTMLParser
from types import ModuleType

import pytest
from axolotl.utils.dict import DictDefault
from click.testing import CliRunner
from datasets import Dataset
from runs import config, prepare, write_config, write_jsonl
from test_data import data_format

from axolotl_amopo.commands import amopo
from axolotl_amopo.commands.inspect.gather import gather
from axolotl_amopo.commands.inspect.page import inspection_page
from axolotl_amopo.commands.inspect.text import print_inspection
from axolotl_amopo.commands.kit import prepare as anew
from axolotl_amopo.data.pipeline import watch_preparations
from axolotl_amopo.errors import CONTROL


def row(question, *answers):
    return {
        "prompt": question,
        "responses": [
            {"text": text, "scores": {"helpfulness": h, "honesty": t}} for text, h, t in answers
        ],
    }


# Winners: a longer one that honesty disagrees with, a shorter one all agree on, and a tie.
ROWS = [
    row("First?", ("A long <b>answer</b>.", 5, 2), ("Short.", 1, 3)),
    row("Second “très” one?", ("No.", 4, 4), ("A longer answer than that.", 2, 1)),
    row("Third?", ("One.", 3, 3), ("Two.", 3, 3)),
]
EVAL = [row("First?", ("Yes.", 5, 5), ("No.", 1, 1))]


@pytest.fixture(scope="module")
def path(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("inspect")
    data = write_jsonl(folder / "data.jsonl", [*ROWS, ROWS[1]])
    test = [{"path": str(write_jsonl(folder / "eval.jsonl", EVAL)), "type": "amopo.rated"}]
    block = {"dimensions": ["helpfulness", "honesty"], "rating_levels": 5}
    test[0]["scale"] = [1, 5]
    values = config(folder, tiny_model, data, test_datasets=test, amopo=block)
    return write_config(folder, values)


@pytest.fixture(scope="module")
def datasets(path):
    return prepare(path)[1]


@pytest.fixture(scope="module")
def report(path):
    return gather(str(path), rows=2)


def test_counts(report):
    train, test = report.entries
    assert (train.split, test.split) == ("train", "test")
    assert (train.rows, train.prompts, train.responses) == (4, 4, 8)
    assert (train.pairs_made, train.pairs_kept) == (3, 3)
    assert train.dropped == {"pairs whose responses tie": 1}
    assert (train.repeated_prompts, train.repeated_pairs) == (1, 1)
    assert (report.train_rows, report.eval_rows, report.shared_prompts) == (3, 1, 1)
    assert train.prompts_per_example == 3


def test_ratings(report):
    train = report.entries[0]
    assert train.ratings["helpfulness"] == [("1", 1), ("2", 2), ("3", 2), ("4", 2), ("5", 1)]
    assert train.missing == {"helpfulness": 0, "honesty": 0}
    assert train.disagreement["helpfulness"]["honesty"] == pytest.approx(1 / 3)
    assert train.disagreement["helpfulness"]["helpfulness"] == 0
    assert train.correlation["honesty"]["honesty"] == pytest.approx(1)
    # Helpfulness: longer, shorter, shorter. Honesty: all shorter.
    assert train.longer_wins["overall"] == pytest.approx(1 / 3)
    assert train.longer_wins["helpfulness"] == pytest.approx(1 / 3)
    assert train.longer_wins["honesty"] == 0


def test_tokens_are_those_of_the_rows(report, datasets):
    lengths = [len(ids) for ids in datasets.train_dataset["input_ids"]]
    assert report.entries[0].tokens["longest"] == max(lengths)
    assert sum(count for _, count in report.entries[0].token_counts) == 3


def test_the_model_sees_what_is_shown(report, datasets, tokenizer):
    example = report.entries[0].examples[0]
    rows = {tokenizer.decode(r["prompt_ids"][0]): r["response_ids"] for r in datasets.train_dataset}
    shown = "".join(piece.text for piece in example.seen[0].pieces)
    winner, loser = ("".join(piece.text for piece in side) for side in example.responses)
    assert [tokenizer.decode(ids) for ids in rows[shown]] == [winner, loser]
    assert (winner, loser) == ("A long <b>answer</b>.<|im_end|>", "Short.<|im_end|>")
    kinds = {piece.kind for seen in example.seen for piece in seen.pieces}
    assert kinds == {"special", "text", "instruction"}
    instructions = [p.text for p in example.seen[1].pieces if p.kind == "instruction"]
    assert len(instructions) == 1 and "helpfulness is 5 of 5" in instructions[0]
    assert {piece.kind for piece in example.responses[0]} == {"response", "special"}


def test_warnings_say_what_would_hurt(report):
    text = " ".join(report.warnings)
    assert "1 pairs stand there more than once" in text
    assert "1 of 1 pairs of the evaluation have a prompt that is trained on" in text


class Words(HTMLParser):
    def __init__(self):
        super().__init__()
        self.words, self.tags = "", set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}  # nothing is fetched

    def handle_data(self, data):
        self.words += data


def test_the_page_has_the_numbers_and_runs_nothing(report):
    text = inspection_page(report)
    parsed = Words()
    parsed.feed(text)
    assert "script" not in parsed.tags and "b>answer" in parsed.words
    assert "<b>answer" not in text
    assert "33%" in parsed.words and "rounded to 5 levels" in parsed.words
    assert len(re.findall(r'<i style="height', text)) == sum(
        len(counts) for e in report.entries for counts in [e.token_counts, *e.ratings.values()]
    )


def test_the_data_commands_no_terminal(report, capsys):
    hostile = copy.deepcopy(report)
    (example, *_) = hostile.entries[0].examples
    for piece in (*example.responses[0], *example.seen[0].pieces):
        piece.text = "\x1b[2J\x9b31m"
    print_inspection(hostile)
    printed = capsys.readouterr().out
    assert "\\x1b[2J" in printed and not CONTROL.search(printed)


def test_who_watches_sees_what_is_prepared_meanwhile(tokenizer):
    """In order, each watcher its own, and nobody once the block is left, also by an error."""

    def wrap(rows, **block):
        block = {"dimensions": ["helpfulness", "honesty"]} | block
        data_format("rated", tokenizer, **block).wrap_dataset(Dataset.from_list(rows))

    with watch_preparations() as outer:
        with pytest.raises(ZeroDivisionError), watch_preparations() as inner:
            wrap([*ROWS, ROWS[1]])
            wrap(EVAL, group_by_prompt=True)
            raise ZeroDivisionError
        assert not outer
        wrap(EVAL)
    wrap(EVAL)
    first, second = inner
    assert (len(first.dataset), len(first.prepared), first.kept) == (4, 3, [0, 1, 2])
    assert [len(examples) for _, examples in first.prompts()] == [1, 1, 0, 1]
    assert (len(second.prepared), second.dropped.total()) == (1, 0)
    assert second.format.config.group_by_prompt
    assert len(outer) == 1


def run(*arguments):
    return CliRunner().invoke(amopo, ["inspect", *map(str, arguments)])


def test_the_command(path, tmp_path):
    done = run(path, "--rows", 1, "--find", "“très” one")
    assert done.exit_code == 0, done.output
    assert "A longer answer than that." in done.output and "Short." not in done.output
    assert "3 different prompts per pair, with ratings rounded to 5 levels" in done.output
    assert "3 pairs to train on" in done.output and '"base_model"' not in done.output
    assert max(map(len, done.output.splitlines()[-20:])) <= 80
    html = tmp_path / "data.html"
    done = run(path, "--html", html, "--json")
    made = json.loads(done.stdout)
    assert made["train_rows"] == 3
    assert {"axolotl-amopo", "axolotl", "python", "torch"} <= made["versions"].keys()
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")
    again = run(path, "--html", html)
    assert again.exit_code == 1 and "--force" in again.output
    done = run(path, "--html", html, "--force", "--quiet")
    assert done.exit_code == 0 and not done.output
    for wrong, said in ((tmp_path, "is a folder"), (tmp_path / "no" / "a.html", "no such folder")):
        done = run(path, "--html", wrong, "--force")
        assert done.exit_code == 1 and said in done.output


def test_a_bad_row_is_one_sentence(tmp_path, tiny_model):
    data = write_jsonl(tmp_path / "bad.jsonl", [row("Why?", ("a", 9, 1), ("b", 1, 1))])
    done = run(write_config(tmp_path, config(tmp_path, tiny_model, data)))
    assert done.exit_code == 1
    assert "row 1, key 'responses[0].scores.helpfulness': 9 is outside the scale" in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("is_script", [True, False], ids=["script", "notebook"])
def test_what_is_spawned_to_save_rows_leaves_the_main_module_alone(
    is_script, tmp_path, monkeypatch
):
    script, mark = tmp_path / "main.py", tmp_path / "imported"
    script.write_text(f"open({str(mark)!r}, 'w').close()", encoding="utf-8")
    main = ModuleType("__main__")
    main.__spec__ = None
    if is_script:
        main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    before = dict(vars(main))

    def spawn(*_: object) -> tuple[None, None]:
        process = multiprocessing.get_context("spawn").Process(target=os.getpid)
        process.start()
        process.join()
        assert process.exitcode == 0
        return None, None

    monkeypatch.setattr(anew, "prepare_datasets", spawn)
    with anew.prepared_anew(DictDefault(), None):
        assert not mark.exists() and vars(main) == before
    spawn()
    assert mark.exists() == is_script
