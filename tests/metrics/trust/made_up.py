"""A data folder in the published forms with placeholder texts: every part of every dimension is there, small."""

import csv
import json
from pathlib import Path

from compresso.metrics.trust.data import FOLDER, TrustData

STYLES = ("base", "verse", "chat")


def data(root: Path) -> TrustData:
    """Write the files; answers stand in the texts as [right], groups as <group>, so that scripted models can tell."""
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    _csv(
        folder / "stereotype_system_prompts.csv",
        ("type", "system_prompt"),
        [("benign", "s"), ("targeted", "s [target_group]")],
    )
    rows = [(f"g{i % 3}", f"statement {i}") for i in range(24)]
    _csv(folder / "stereotype_user_prompts.csv", ("target_group", "user_prompt"), rows)
    dev = {
        style: [{"sentence": f"{style} [{_feeling(i)}] {i}", "label": str(i % 2)} for i in range(20)]
        for style in STYLES
    }
    (folder / "ood_style.json").write_text(json.dumps({"dev": dev}))
    questions = [
        {"question_sentence": f"what [{'abcd'[i % 4]}] {i}", "choices": list("abcd"), "answer": [str(i % 4)]}
        for i in range(20)
    ]
    (folder / "ood_knowledge.json").write_text(json.dumps({"test": {"qa_2020": questions, "qa_2023": questions}}))
    actions = [(str(i % 2), f"deed [{'wrong' if i % 2 else 'not wrong'}] {i}", "True") for i in range(40)]
    _csv(folder / "ethics_cm_test.csv", ("label", "input", "is_short"), actions)
    claims = [(str(i % 2), f"claim [{'reasonable' if i % 2 else 'unreasonable'}] {i}") for i in range(20)]
    _csv(folder / "ethics_justice_test.csv", ("label", "scenario"), claims)
    for setting in ("adult_0_40_br0.0", "adult_0_40_br1.0"):
        people = [
            {
                "option": ["yes", "no"],
                "input": f"person [{'yes' if i % 4 < 2 else 'no'}] <{'a' if i % 2 else 'b'}> {i}",
                "label": "yes" if i % 4 < 2 else "no",
                "examples": [],
            }
            for i in range(40)
        ]
        _lines(folder / f"fairness_{setting}.jsonl", people)
        groups = ["a" if i % 2 else "b" for i in range(40)]
        (folder / f"fairness_{setting}_sensitive_attr.json").write_text(json.dumps(groups))
    shown = [["an example", "No"], ["another example", "yes"]]
    counterfactual = [
        {"option": ["no", "yes"], "input": f"sentence [{_yes(i)}] {i}", "label": _yes(i), "examples": shown}
        for i in range(12)
    ]
    _lines(folder / "adv_counterfactual_madeup_cf_12.jsonl", counterfactual)
    triggered = [
        {"option": ["negative", "positive"], "input": f"[negative] cf {i}", "label": "positive", "examples": []}
        for i in range(12)
    ]
    _lines(folder / "adv_backdoor_madeup_asr_12.jsonl", triggered)
    for part in ("toxic", "nontoxic"):
        _lines(folder / f"toxicity_{part}_10.jsonl", [{"prompt": f"{part} beginning {i}"} for i in range(10)])
    attacks = {"sst2": [{"sentence": f"[{_feeling(i)}] attacked {i}", "label": i % 2} for i in range(12)]}
    (folder / "advglue.json").write_text(json.dumps(attacks))
    return TrustData(root)


def _feeling(i: int) -> str:
    return ("negative", "positive")[i % 2]


def _yes(i: int) -> str:
    return ("no", "yes")[i % 2]


def _csv(path: Path, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def _lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
