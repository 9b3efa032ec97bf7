"""Run the experiments on WebNLG's ratings by people: one command, which can be killed and repeated.

    python experiments/webnlg/webnlg.py --model quickstart-run/SmolLM2-135M-Instruct
    python experiments/webnlg/webnlg.py plain texts --only simpo/fold-1-seed-1

Stages, all of them by default and in this order; each does what is missing:

    tune      half-length runs, six per family; the best learning rate and beta: results/tuned.yml
    plain     axolotl amopo compare work/plain.yml
    prompted  axolotl amopo compare work/prompted.yml
    texts     what the trained models write, and what proxies say of it
    summary   summary.md from results/*.jsonl, no model needed

Runs and models are in `work/`, which git ignores; their lines are copied to `results/`. A line that
is there already stays as it is, and whether the new run agrees with it is printed.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # what is computed is the same everywhere
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tables
import texts
import yaml
from facts import write_data

from axolotl_amopo.commands.compare.comparison import Comparison, changed, read_comparison
from axolotl_amopo.commands.compare.work import finished
from axolotl_amopo.config.files import read_yaml
from axolotl_amopo.errors import AMoPOError

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COMPARISONS = ("tune", "plain", "prompted")
STAGES = (*COMPARISONS, "texts", "summary")
# What two runs of the same config may differ by, on machines that add up in another order.
MARGIN_TOLERANCE = 1e-2

Json = dict[str, Any]


def compare_values(name: str, arms: Json, tuned: Json, work: Path) -> Json:
    """Return the compare file of a comparison.

    Args:
        arms: what arms.yml holds.
        tuned: learning_rate and rl_beta by family.
        work: the folder with the model and the data.
    """
    of = arms[name]
    base = changed(arms["base"], of["base"]) | {"base_model": str(work / "model")}
    data = {"type": "amopo.rated", "ds_type": "json", "split": "train"}
    values: Json = {"measure": arms["measure"], "output": str(work / name)}
    if name == "tune":
        base |= {
            "datasets": [{"path": str(work / "tune-train.jsonl")} | data],
            "test_datasets": [{"path": str(work / "tune-heldout.jsonl")} | data],
        }
        variants = {
            f"{family}_{rate:g}_{beta:g}": keys | {"learning_rate": rate, "rl_beta": beta}
            for family, keys in of["families"].items()
            for rate, beta in itertools.product(of["learning_rate"], keys["rl_beta"])
        }
        values["measure"] = arms["measure"] | {"untuned": False}
        values["baseline"] = next(iter(variants))
    else:
        base["datasets"] = [{"path": str(work / "prompts.jsonl")} | data]
        variants = {
            variant: tuned[keys["family"]] | {k: v for k, v in keys.items() if k != "family"}
            for variant, keys in of["variants"].items()
        }
        values |= {"baseline": of["baseline"], "folds": arms["folds"]}
    return {"base": base, "variants": variants} | values


def read(name: str, arms: Json, work: Path, tuned_file: Path) -> Comparison:
    """Write the compare file of a comparison into the work folder, and read it.

    Raises:
        AMoPOError: where nothing is tuned yet.
    """
    tuned = read_yaml(tuned_file) if tuned_file.is_file() else {}
    if name != "tune" and not tuned:
        raise AMoPOError(f"{tuned_file} is not there; run the stage tune first.")
    values = compare_values(name, arms, tuned, work)
    path = work / f"{name}.yml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return read_comparison(path)


def prepare(model: Path | None, data: Path, work: Path) -> None:
    """Write the data, and link the model: no line of a result is to name a folder of this machine.

    Raises:
        AMoPOError: where the model is not there, or another one was linked.
    """
    work.mkdir(parents=True, exist_ok=True)
    write_data(data, work)
    link = work / "model"
    if model and not link.exists():
        link.symlink_to(model.resolve())
    if model and link.resolve() != model.resolve():
        raise AMoPOError(f"{link} is {link.resolve()}; delete {work} to begin with another model.")
    if not (link / "config.json").is_file():
        raise AMoPOError(f"{link} is no model; name its folder with --model.")


def collect(lines: list[Json], path: Path) -> None:
    """Add lines to a file of results; one that is there stays, and is compared with the new one."""
    there = {key_of(line): line for line in read_lines(path)}
    before, agree = len(there), 0
    for line in lines:
        old = there.setdefault(key_of(line), line)
        if old is not line and (what := difference(old, line)):
            print(f"{path.name}: {line['run']}: {what}; the line that was there stays", flush=True)
        elif old is not line:
            agree += 1
    print(f"{path.name}: {len(there) - before} lines added, {agree} as they were", flush=True)
    path.parent.mkdir(exist_ok=True)
    new = path.with_name(f"_{path.name}")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in there.values())
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def read_lines(path: Path) -> list[Json]:
    """Return the lines of a file of results, none where it is not there."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def key_of(line: Json) -> tuple[Any, ...]:
    """Return what tells a line of a run, or of its texts, apart."""
    return tuple(line.get(key) for key in ("comparison", "run", "ask", "seed"))


def difference(old: Json, new: Json) -> str:
    """Return how a run differs from what was recorded of it, empty where it agrees."""
    if "texts" in new:
        other = sum(a != b for a, b in zip(old["texts"], new["texts"], strict=True))
        return f"{other} of {len(new['texts'])} texts are other ones" if other else ""
    if old["config"] != new["config"]:
        return "made with another config"
    margins = [line["scored"]["plain"] for line in (old, new)]
    furthest = max(abs((a or 0) - (b or 0)) for a, b in zip(*margins, strict=True))
    return f"margins differ by up to {furthest:.3g}" if furthest > MARGIN_TOLERANCE else ""


def compare(comparison: Comparison, options: argparse.Namespace, results: Path) -> int:
    """Run `axolotl amopo compare`, keep the lines of complete runs, and return its exit code."""
    command = [str(Path(sys.executable).parent / "axolotl-amopo"), "compare", comparison.path]
    if options.dry_run:
        return subprocess.run([*command, "--dry-run"], check=False).returncode
    command += ["--no-check", "--jobs", options.jobs, "--shard", options.shard]
    done = subprocess.run([*command, "--only", options.only], check=False)
    lines = [line for run in comparison.runs() if (line := finished(comparison.folder(run)))]
    for scored in (line["scored"] for line in lines):  # without the folder, a quarter of the file
        scored["where"] = [where.rpartition("/")[2] for where in scored["where"]]
    if lines:
        collect(lines, results)
    return done.returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct")
    data = ROOT.parent / "shared" / "data" / "webnlg2020" / "rated.jsonl"
    parser.add_argument("--data", type=Path, default=data, help="rated.jsonl of webnlg2020")
    parser.add_argument("--arms", type=Path, default=HERE / "arms.yml", help="what is compared")
    parser.add_argument("--work", type=Path, default=(HERE / "work").relative_to(ROOT))
    parser.add_argument("--results", type=Path, default=(HERE / "results").relative_to(ROOT))
    parser.add_argument("--jobs", default="1", help="of `axolotl amopo compare`: runs at once")
    parser.add_argument("--shard", default="1/1", help="of the same: a part of the runs, 1/2")
    parser.add_argument("--only", default="*", help="of the same: runs of this name")
    parser.add_argument("--dry-run", action="store_true", help="of the same: train nothing")
    options = parser.parse_args(arguments)
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"{min(unknown)!r} is none of the stages {', '.join(STAGES)}")
    stages = options.stages or STAGES
    try:
        return run(stages, options)
    except AMoPOError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


def run(stages: Sequence[str], options: argparse.Namespace) -> int:
    """Run stages in their order; one that fails ends it."""
    arms, work, results = read_yaml(options.arms), options.work, options.results
    tuned_file = results / "tuned.yml"
    if set(stages) != {"summary"}:
        prepare(options.model, options.data, work)
    for name in COMPARISONS:
        if name not in stages:
            continue
        comparison = read(name, arms, work, tuned_file)
        code = compare(comparison, options, results / f"{name}.jsonl")
        if code:
            return code
        if name == "tune" and not (tuned_file.is_file() or options.dry_run):
            chosen = tables.choose(comparison, read_lines(results / "tune.jsonl"))
            tuned_file.write_text(yaml.safe_dump(chosen, sort_keys=False), encoding="utf-8")
    for name in COMPARISONS[1:] if "texts" in stages else ():
        comparison = read(name, arms, work, tuned_file)
        asked = texts.tasks(name, comparison, list(map(str, arms["asks"])))
        number, count = map(int, options.shard.split("/"))
        todo = [task for task in asked if fnmatchcase(task.run.label, options.only)]
        texts.write_texts(todo[number - 1 :: count], comparison, arms["sampling"])
        lines = [json.loads(p.read_text("utf-8")) for p in comparison.output.glob(texts.FILES)]
        collect(sorted(lines, key=key_of), results / "texts.jsonl")
    if "summary" in stages:
        work.mkdir(parents=True, exist_ok=True)
        written = read_lines(results / "texts.jsonl")
        parts = [
            tables.section(read(name, arms, work, tuned_file), lines, written)
            for name in COMPARISONS
            if (lines := read_lines(results / f"{name}.jsonl"))
        ]
        (results / "summary.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        print(f"Written: {results / 'summary.md'}")
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
