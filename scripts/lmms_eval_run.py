"""Score the bundled model with lmms-eval from its command line, plain and edited, and check every answer.

    python scripts/lmms_eval_run.py --make ENV        once: an environment with lmms-eval, some 6 GB
    ENV/bin/python scripts/lmms_eval_run.py           3 minutes on one core, without network

Draws scenes into two local tasks (free answers, and options), trains a gate, runs ``python -m lmms_eval``
once per condition of one recipe, reads the logs back, and asks the same questions with ``compare``. Fails if
an answer or a number differs. Writes benchmarks/results/lmms_eval.md; with --save FOLDER also the logs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import textwrap
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ROOT / "scripts" / "lmms_eval_constraints.txt"
PLUGIN = "sinkscope.lmms_eval"
NOISE = 40.0  # enough that the model makes errors
RULES = {"v_detector": "norm:86", "l_detector": "received:1.4x"}
CONDITIONS = {
    "base": "[]",
    "gated": "{gate: GATE}",
    "masked": "{edit: {kind: top attended, edit: mask, k: 8}}",
    "blocked": "[{AttentionKnockout: {queries: last, keys: image, layers: [3, 4]}}]",
}
UTILS = """
def answers(doc, results):
    return {"right": float(results[0].strip().lower() == doc["answer"])}
"""
FREE = """
task: scenes_free
dataset_path: parquet
dataset_kwargs: {data_files: {test: FOLDER/free.parquet}}
test_split: test
output_type: generate_until
doc_to_visual: image
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 4, temperature: 0, do_sample: false, until: ["."]}
process_results: !function utils.answers
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]
"""
OPTIONS = """
task: scenes_options
dataset_path: parquet
dataset_kwargs: {data_files: {test: FOLDER/options.parquet}}
test_split: test
output_type: multiple_choice
doc_to_visual: image
doc_to_text: question
doc_to_target: answer
doc_to_choice: [red, green, blue, yellow, purple]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
METRICS = {"scenes_free": "right", "scenes_options": "acc"}


def make(folder: Path) -> None:
    """An environment with the versions of the constraints, and this checkout."""
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "-c", VERSIONS]
    subprocess.run([*pip, "lmms-eval", "torch", "torchvision", "-e", ROOT], check=True)


def questions(scenes: int) -> dict[str, list[dict[str, Any]]]:
    """Free questions and questions with options about the same test scenes."""
    from sinkscope.bundled import scene_questions
    from sinkscope.bundled.scenes import COLOURS

    free = list(scene_questions(scenes, 4, noise=NOISE))
    asked = scene_questions(scenes, 8, noise=NOISE)
    options = [{**one, "choices": list(COLOURS)} for one in asked if one["task"] == "colour"]
    return {"free": free, "options": options}


def write_tasks(folder: Path, asked: dict[str, list[dict[str, Any]]]) -> None:
    """The two tasks as YAML over parquet, with PNG images."""
    from datasets import Dataset

    folder.mkdir()
    for name, records in asked.items():
        columns = ("image", "question", "answer")
        lines = [{column: one[column] for column in columns} for one in records]
        Dataset.from_list(lines).to_parquet(folder / f"{name}.parquet")
    (folder / "utils.py").write_text(UTILS)
    for name, text in {"free": FREE, "options": OPTIONS}.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))


def write_recipe(folder: Path) -> Path:
    """A gate, trained for a moment, and the recipe of all conditions."""
    import sinkscope as ss
    from sinkscope import detectors
    from sinkscope.bundled import TRAIN_SEEDS, scene_questions

    train = list(scene_questions(120, 4, seeds=TRAIN_SEEDS, noise=NOISE))
    how = {
        "v_detector": detectors.Norm(86.0),
        "epochs": 3,
        "lr": 0.05,
        "batch": 16,
        "progress": False,
    }
    made = ss.train_lsg(ss.load_bundled(), train, ["embed"], **how)
    made.gates["embed"].save_pretrained(folder / "gate")
    lines = [f"{key}: {value}" for key, value in RULES.items()] + ["conditions:"]
    lines += [f"  {name}: {text}" for name, text in CONDITIONS.items()]
    path = folder / "edits.yaml"
    path.write_text("\n".join(lines).replace("GATE", str(folder / "gate")) + "\n")
    return path


def run(name: str, recipe: Path, tasks: Path, out: Path) -> str:
    """One run of lmms-eval's command line; returns what it printed."""
    arguments = f"base=bundled,recipe={recipe},condition={name},out={out}"
    words = ["--model", "sinkscope", "--model_args", arguments, "--batch_size", "8"]
    words += ["--tasks", ",".join(METRICS), "--include_path", str(tasks)]
    words += ["--output_path", str(out), "--log_samples"]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tasks / "home")}
    paths = {"PYTHONPATH": str(ROOT), "LMMS_EVAL_PLUGINS": PLUGIN}
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *words],
        env={**os.environ, **offline, **paths},
        capture_output=True,
        text=True,
    )
    if done.returncode or not list(out.rglob("*_samples_*.jsonl")):
        raise SystemExit(f"lmms_eval {' '.join(words)}\n{done.stdout}\n{done.stderr}")
    return done.stdout + done.stderr


def compared(asked: dict[str, list[dict[str, Any]]], recipe: Path) -> Any:
    """The same questions under the same conditions, with `compare`."""
    import sinkscope as ss
    from sinkscope.cli.experiments import condition
    from sinkscope.cli.recipes import parse_detector, read_yaml

    lvlm, rules = ss.load_bundled(), {key: parse_detector(text) for key, text in RULES.items()}
    read = read_yaml(str(recipe))["conditions"]
    made = {name: condition(name, what, lvlm) for name, what in read.items()}
    data = [{**one, "task": f"scenes_{name}"} for name, part in asked.items() for one in part]
    return ss.compare(lvlm, data, made, **rules)


def check(logs: Any, ours: Any) -> list[str]:
    """Lines about what agrees; stops at the first answer that does not."""
    keys, out = ["task", "condition"], []
    for column in ("given", "correct", "touched"):
        theirs = logs.table.sort_values([*keys, "item"])[[*keys, column]].reset_index(drop=True)
        own = ours.table.sort_values([*keys, "item"])[[*keys, column]].reset_index(drop=True)
        if column == "given":  # of options the log holds losses
            theirs, own = (x[x["task"] == "scenes_free"] for x in (theirs, own))
        one, two = (x[column].astype(str if column == "given" else float) for x in (theirs, own))
        differ = int((one.values != two.values).sum())
        out.append(f"`{column}` of {len(one)} answers: {differ} differ")
        if differ:
            raise SystemExit(
                f"{out[-1]}\n{theirs[one.values != two.values]}\n{own[one.values != two.values]}"
            )
    return out


def main() -> None:
    """Make the environment, or run and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--make", type=Path, metavar="ENV", help="make the environment, and stop")
    parser.add_argument("--scenes", type=int, default=30)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="copy the logs")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "lmms_eval.md"
    )
    given = parser.parse_args()
    if given.make:
        make(given.make)
        return
    from sinkscope.experiments import read_lmms_eval

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        asked = questions(given.scenes)
        write_tasks(folder / "tasks", asked)
        recipe = write_recipe(folder)
        said, outs = {}, {name: folder / "runs" / name for name in CONDITIONS}
        for name, out in outs.items():
            said[name] = run(name, recipe, folder / "tasks", out)
            print(name, "done", flush=True)
        logs = read_lmms_eval(outs, metric=METRICS)
        agree = check(logs, compared(asked, recipe))
        touched = [
            line.partition("sinkscope: ")[2].removesuffix("\x1b[0m")
            for text in said.values()
            for line in text.splitlines()
            if "sinkscope: '" in line
        ]
        for one in outs if given.save else ():
            for file in [*outs[one].rglob("*.jsonl"), *outs[one].glob("*.json")]:
                target = given.save / one / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(file.read_text().replace(f"{folder}/", ""))
        tables = [f"{name}\n{table(text)}" for name, text in said.items()]
        report(given.out, recipe, folder, tables, touched, agree, logs)


def table(text: str) -> str:
    """The table of results that lmms-eval prints."""
    return "\n".join(line for line in text.splitlines() if line.startswith("|"))


def report(path: Path, recipe: Path, folder: Path, *parts: Any) -> None:
    """Write what was measured, with the versions."""
    tables, touched, agree, logs = parts
    names = ("lmms-eval", "torch", "torchvision", "transformers", "nnsight", "datasets")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    documents = logs.table.groupby("task")["item"].nunique().to_dict()
    text = f"""# lmms-eval from its command line

Written by `scripts/lmms_eval_run.py`. Python {sys.version.split()[0]}, {versions}; CPU, offline.
The bundled model on drawn scenes with noise {NOISE:g}; documents: {documents}.

```text
LMMS_EVAL_PLUGINS={PLUGIN} python -m lmms_eval --model sinkscope
  --model_args base=bundled,recipe=edits.yaml,condition=NAME,out=OUT
  --tasks {",".join(METRICS)} --include_path TASKS --output_path OUT --log_samples --batch_size 8
```

The recipe:

```yaml
{recipe.read_text().replace(str(folder) + "/", "").strip()}
```

## What lmms-eval printed

```text
{chr(10).join(tables)}
```

What the plug-in said at the end of each run:

```text
{chr(10).join(one.replace(str(folder) + "/", "") for one in touched)}
```

## Read back

`read_lmms_eval` of the four folders, with paired 95 % intervals over images:

{logs.to_markdown()}

The same questions asked with `ss.compare`: {"; ".join(agree)}.
"""
    path.write_text(textwrap.dedent(text))
    print(text)


if __name__ == "__main__":
    main()
