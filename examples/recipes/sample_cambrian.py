"""Draw the paper's training set from a download of Cambrian-7M: equal parts of six kinds of questions.

    python sample_cambrian.py Cambrian7M_withsystemprompt.jsonl cambrian-10k.jsonl

Choi et al. (2604.03316) train on 10 000 questions, equally many of OCR, general VQA, counting, code, maths
and science. Which part of Cambrian-7M is which kind is not published, and we could not read the file: `KINDS` is
a start, by the first folder of a record's image. Read what the script says it passed over, and change the kinds
with --kinds FILE (YAML: kind -> folders). Only the first question of a conversation is taken, and only if it has
an image. Folders of no kind are counted and named, not guessed.

The lines written have image (as in the download: put the file beside its folders), question, answer, task
and image_id, which is what `sinkscope train-lsg` reads. Standard library only, unless --kinds is given.
"""

import argparse
import json
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

KINDS = {
    "OCR": ["ocr_vqa", "textvqa", "docvqa", "infographic_vqa", "synthdog", "rendered_text", "st_vqa", "arxivqa"],
    "general VQA": ["gqa", "vg", "coco", "vqav2", "okvqa", "aokvqa", "vizwiz", "sharegpt4v", "allava"],
    "counting": ["clevr", "tallyqa", "clevr_math", "mapqa", "figureqa"],
    "code": ["websight", "design2code", "datikz", "screenqa", "chart2code"],
    "maths": ["geo170k", "mathvision", "mathinstruct", "geomverse", "tabmwp", "unigeo", "inter-gps", "raven"],
    "science": ["scienceqa", "ai2d", "tqa", "pathvqa", "pmc-vqa", "dvqa"],
}  # fmt: skip
IMAGE = "<image>"


def kind_of(image, kinds):
    """The kind of a record, by the first folder of its image; None if it is of no kind."""
    folder = Path(image).parts[0].lower()
    return next((kind for kind, folders in kinds.items() if folder in folders), None)


def question_of(record):
    """Image, question and answer of a record's first exchange, or None if it has none."""
    image, turns = record.get("image"), record.get("conversations") or []
    if not isinstance(image, str) or len(turns) < 2:
        return None
    first, second = turns[:2]
    if first.get("from") != "human" or second.get("from") != "gpt":
        return None
    question, answer = first["value"].replace(IMAGE, "").strip(), second["value"].strip()
    if not question or not answer or IMAGE in second["value"]:
        return None
    return {"image": image, "question": question, "answer": answer}


def sample(lines, kinds, total, seed):
    """``total / kinds`` records of every kind, by reservoir sampling, and what was passed over."""
    each, chance = total // len(kinds), random.Random(seed)
    kept, seen, strange = defaultdict(list), Counter(), Counter()
    for line in lines:
        if not line.strip():
            continue
        made = question_of(json.loads(line))
        if made is None:
            strange["no image, or no question with an answer"] += 1
            continue
        kind = kind_of(made["image"], kinds)
        if kind is None:
            strange[f"folder {Path(made['image']).parts[0]}"] += 1
            continue
        seen[kind] += 1
        record = {**made, "task": kind, "image_id": made["image"]}
        if len(kept[kind]) < each:
            kept[kind].append(record)
        elif (place := chance.randrange(seen[kind])) < each:
            kept[kind][place] = record
    return kept, seen, strange, each


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="the JSON lines of Cambrian-7M")
    parser.add_argument("out", help="where to write")
    parser.add_argument("--total", type=int, default=10_000, help="questions in all (10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument("--kinds", help="a YAML file: kind -> folders")
    given = parser.parse_args()
    kinds = KINDS
    if given.kinds:
        import yaml

        kinds = yaml.safe_load(Path(given.kinds).read_text(encoding="utf-8"))
    with open(given.source, encoding="utf-8") as lines:
        kept, seen, strange, each = sample(lines, kinds, given.total, given.seed)
    for kind in kinds:
        print(f"{kind:<12} {len(kept[kind]):>6} of {seen[kind]}")
    for what, count in strange.most_common(20):
        print(f"passed over: {count} with {what}")
    short = [kind for kind in kinds if len(kept[kind]) < each]
    if short:
        sys.exit(
            f"Got fewer than {each} questions of {short}; expected as many of every kind. Name their "
            "folders with --kinds, or write a smaller --total. Nothing was written."
        )
    records = [record for kind in kinds for record in kept[kind]]
    random.Random(given.seed).shuffle(records)
    Path(given.out).write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    print(f"{len(records)} questions: {given.out}")


if __name__ == "__main__":
    main()
