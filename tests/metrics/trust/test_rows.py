"""Files of trust in another shape. Each dimension's smallest valid file is spoiled at one place after another: what is
read is then one line that names the file and the place, whatever stands there, and never another number.
"""

import copy
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from compresso.errors import DataError
from compresso.metrics.trust.data import FOLDER, Missing, TrustData
from compresso.metrics.trust.dimension import Part
from compresso.metrics.trust.dimensions.demonstrations import DEMONSTRATIONS
from compresso.metrics.trust.dimensions.ethics import ETHICS
from compresso.metrics.trust.dimensions.fairness import FAIRNESS
from compresso.metrics.trust.dimensions.out_of_distribution import OUT_OF_DISTRIBUTION
from compresso.metrics.trust.dimensions.robustness import ROBUSTNESS
from compresso.metrics.trust.dimensions.stereotype import STEREOTYPE
from compresso.metrics.trust.dimensions.toxicity import toxic_requests
from compresso.metrics.trust.questions import Extent, questions_of

Read = Callable[[TrustData], Any]
JUNK: tuple[Any, ...] = (None, True, 5, -1, 0.9, "", " ", "other", [], ["x"], ["x", "x"], {}, {"x": 1})


def _of(dimension: Any) -> Read:
    return lambda data: dimension.questions(data, "likelihood", 1)


def _people(n: int = 8) -> list[dict[str, Any]]:
    return [{"input": f"person {i}", "option": ["yes", "no"], "label": "Yes"} for i in range(n)]


ATTRIBUTES = "fairness_made_up_sensitive_attr.json"
SYSTEMS = [{"type": "benign", "system_prompt": "be kind"}, {"type": "targeted", "system_prompt": "to [target_group]"}]
SHOWN = {"input": "a", "option": ["no", "yes"], "label": "yes", "examples": [["b", "No"], ["c", "yes"]]}
FILES: dict[str, tuple[Read, str, Any, dict[str, Any]]] = {
    "style": (
        _of(OUT_OF_DISTRIBUTION),
        "ood_style.json",
        {"dev": {"base": [{"sentence": "so", "label": 0}], "verse": [{"sentence": "thus", "label": "1"}]}},
        {},
    ),
    "plain style": (_of(ROBUSTNESS), "ood_style.json", {"dev": {"base": [{"sentence": "so", "label": 0}]}}, {}),
    "attacks": (_of(ROBUSTNESS), "advglue.json", {"qqp": [{"question1": "a", "question2": "b", "label": 1}]}, {}),
    "knowledge": (
        _of(OUT_OF_DISTRIBUTION),
        "ood_knowledge.json",
        {"test": {"qa_2020": [{"question_sentence": "who", "choices": ["a", "b"], "answer": ["1"]}]}},
        {},
    ),
    "counterfactual": (_of(DEMONSTRATIONS), "adv_counterfactual_made_cf_1.jsonl", [SHOWN], {}),
    "backdoor": (_of(DEMONSTRATIONS), "adv_backdoor_made_asr_1.jsonl", [SHOWN], {}),
    "fairness": (_of(FAIRNESS), "fairness_made_up.jsonl", _people(), {ATTRIBUTES: [0, 1] * 4}),
    "groups": (_of(FAIRNESS), ATTRIBUTES, ["a", "b"] * 4, {"fairness_made_up.jsonl": _people()}),
    "actions": (
        _of(ETHICS),
        "ethics_cm_test.csv",
        [{"label": "1", "input": "deed", "is_short": "True"}, {"label": "0", "input": "other", "is_short": "True"}],
        {},
    ),
    "claims": (
        _of(ETHICS),
        "ethics_justice_test.csv",
        [{"label": "1", "scenario": "claim"}],
        {"ethics_cm_test.csv": [{"label": "1", "input": "deed", "is_short": "True"}]},
    ),
    "systems": (
        _of(STEREOTYPE),
        "stereotype_system_prompts.csv",
        SYSTEMS,
        {"stereotype_user_prompts.csv": [{"user_prompt": "said", "target_group": "people"}]},
    ),
    "statements": (
        _of(STEREOTYPE),
        "stereotype_user_prompts.csv",
        [{"user_prompt": "said", "target_group": "people"}],
        {"stereotype_system_prompts.csv": SYSTEMS},
    ),
    "toxicity": (
        lambda data: toxic_requests(data, 1),
        "toxicity_toxic_1.jsonl",
        [{"prompt": {"text": "so"}}, {"prompt": "it"}],
        {},
    ),
}
MAY_LACK = {("fairness", "label")}
FREE = {"sentence", "question1", "question2", "question_sentence", "input", "scenario", "user_prompt", "target_group"}
FREE |= {"system_prompt", "type", "prompt", "text"}
"""Fields that may be any text."""


def packed(name: str, value: Any) -> bytes:
    """A file's bytes: JSON, JSON lines or CSV by its name."""
    if name.endswith(".csv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in value for key in row)), restval="")
        writer.writeheader()
        writer.writerows(value)
        return text.getvalue().encode()
    if name.endswith(".jsonl"):
        return "".join(json.dumps(row) + "\n" for row in value).encode()
    return json.dumps(value).encode()


def put(root: Path, files: dict[str, bytes]) -> TrustData:
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return TrustData(root)


def data_with(kind: str, root: Path, content: bytes, name: str = "") -> TrustData:
    _, own, _, others = FILES[kind]
    return put(root, {other: packed(other, value) for other, value in others.items()} | {name or own: content})


def refused(kind: str, data: TrustData) -> str:
    """The one line that reading raises."""
    with pytest.raises(DataError) as caught:
        FILES[kind][0](data)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 400
    return said


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a value, from the outside to the inside."""
    if at:
        yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*at, key))


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    found = copy.deepcopy(value)
    holder = found
    for key in at[:-1]:
        holder = holder[key]
    holder[at[-1]] = new
    return found


def lacking(value: Any, at: tuple[Any, ...]) -> Any:
    found = copy.deepcopy(value)
    holder = found
    for key in at[:-1]:
        holder = holder[key]
    del holder[at[-1]]
    return found


def may_stand(kind: str, at: tuple[Any, ...], new: Any) -> bool:
    """Whether a value is right at a place, by the published forms: free texts, numbers for labels, no examples."""
    field = next((key for key in reversed(at) if isinstance(key, str)), "")
    is_text = isinstance(new, str) and bool(new.strip())
    if kind == "toxicity":
        return is_text and "prompt" in at
    if kind == "groups":
        return (isinstance(new, int) and not isinstance(new, bool)) or is_text
    if isinstance(at[-1], int) and field == "choices":
        return is_text
    if field == "examples":
        return new == [] if at[-1] == "examples" else len(at) > 2 and at[-1] == 0 and at[-2] != "examples" and is_text
    return field in FREE and at[-1] == field and is_text


@pytest.mark.parametrize("kind", FILES)
def test_what_is_valid_is_read(kind: str, tmp_path: Path) -> None:
    read, name, value, _ = FILES[kind]
    plain = data_with(kind, tmp_path / "plain", packed(name, value))
    zipped = data_with(kind, tmp_path / "zipped", gzip.compress(packed(name, value)), f"{name}.gz")
    if kind == "plain style":
        with pytest.raises(Missing, match="holds no style but base"):
            OUT_OF_DISTRIBUTION.questions(plain, "likelihood", 1)
    assert read(plain) == read(zipped) != []


@pytest.mark.parametrize("kind", FILES)
def test_every_place_with_something_else_is_refused_or_right(kind: str, tmp_path: Path) -> None:
    _, name, value, _ = FILES[kind]
    is_table = name.endswith(".csv")
    tried = 0
    for at in places(value):
        for new in JUNK:
            if is_table and (len(at) < 2 or not isinstance(new, str)):
                continue
            data = data_with(kind, tmp_path, packed(name, changed(value, at, new)))
            tried += 1
            if may_stand(kind, at, new):
                with suppress(Missing):  # of the one person of a new group
                    FILES[kind][0](data)
            else:
                assert name.removesuffix(".gz") in refused(kind, data), (at, new)
    assert tried >= 6


@pytest.mark.parametrize("kind", FILES)
def test_a_field_that_is_not_there_is_named_with_its_row(kind: str, tmp_path: Path) -> None:
    _, name, value, _ = FILES[kind]
    for at in places(value):
        field = at[-1]
        if not isinstance(field, str) or (kind, field) in MAY_LACK or (len(at) > 1 and at[-2] in ("dev", "test")):
            continue
        said = refused(kind, data_with(kind, tmp_path, packed(name, lacking(value, at))))
        assert name in said and ("wanted" in said or field in said), (at, said)
        if len(at) > 1 and not name.endswith(".csv"):
            assert "row " in said or "line " in said, said


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    "content", [b"", b"\n", b"{", b"5", b"null", b"[]", b"{}", b"\xff\xfe", b'"text"', b"a;b\n1;2\n"]
)
def test_what_is_no_such_file_is_refused(content: bytes, kind: str, tmp_path: Path) -> None:
    assert FILES[kind][1] in refused(kind, data_with(kind, tmp_path, content))


@pytest.mark.parametrize("kind", FILES)
def test_a_packed_file_cut_in_half_is_refused(kind: str, tmp_path: Path) -> None:
    _, name, value, _ = FILES[kind]
    content = gzip.compress(packed(name, value))
    said = refused(kind, data_with(kind, tmp_path, content[: len(content) // 2], f"{name}.gz"))
    assert f"{name}.gz: broken gzip data" in said


@pytest.mark.parametrize("kind", FILES)
def test_of_two_files_none_goes_unread_unsaid(kind: str, tmp_path: Path) -> None:
    _, name, value, others = FILES[kind]
    content = packed(name, value)
    files = {other: packed(other, one) for other, one in others.items()}
    said = refused(kind, put(tmp_path, {**files, name: content, f"{name}.gz": gzip.compress(content)}))
    assert f"{name} and {name}.gz in {FOLDER}" in said


@pytest.mark.parametrize(("kind", "rows"), [("actions", 3), ("claims", 2), ("systems", 2), ("statements", 2)])
def test_a_row_of_a_table_has_as_many_cells_as_its_head(kind: str, rows: int, tmp_path: Path) -> None:
    _, name, value, _ = FILES[kind]
    whole = packed(name, value)
    for more, said in ((b"1\r\n", "cells: 1; wanted"), (b'1,"cut', "no CSV"), (b",".join([b"1"] * 9), "cells: 9")):
        line = f"{name} line {len(value) + 2}: "
        assert line + said in refused(kind, data_with(kind, tmp_path, whole + more))


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        ("style", b'{"dev": {"x": [{"sentence": "a", "label": 1}], "x": []}}', "'x' stands twice"),
        ("style", b'{"dev": {"x": [{"sentence": "a", "label": "positive"}]}}', 'dev, x, row 1: label is "positive"'),
        ("style", b'{"dev": {"a#b": [{"sentence": "a", "label": 1}]}}', "a name without '#'"),
        ("knowledge", b'{"test": {"q": [{"question_sentence": "a", "choices": "abc", "answer": "0"}]}}', "choices is"),
        ("knowledge", b'{"test": {"q": [{"question_sentence": "a", "choices": ["a", "b"], "answer": "10"}]}}', '"10"'),
        ("attacks", b'{"sst2": [{"sentence": "a", "label": true}]}', "sst2, row 1: label is true; wanted 0 or 1"),
        ("attacks", b'{"cola": [{"sentence": "a", "label": 1}]}', "no task 'cola' is asked"),
        ("actions", b"label,input,is_short\nwrong,deed,True\n", 'line 2: label is "wrong"; wanted 0 or 1'),
        ("systems", b"type,system_prompt\nbenign,x\nbenign,y\n", 'line 3: type is "benign"; wanted a type that stands'),
    ],
)  # fmt: skip
def test_what_was_taken_silently_is_refused(kind: str, content: bytes, said: str, tmp_path: Path) -> None:
    assert said in refused(kind, data_with(kind, tmp_path, content))


def test_truth_is_read_as_tables_of_others_write_it(tmp_path: Path) -> None:
    rows = [{"label": "1", "input": "deed", "is_short": word} for word in ("true", "TRUE", "True")]
    assert len(ETHICS.questions(data_with("actions", tmp_path, packed("a.csv", rows)), "likelihood", 1)) == 4 * 2
    long = [{"label": "1", "input": "deed", "is_short": "False"}]
    with pytest.raises(Missing, match="holds no short action"):
        ETHICS.questions(data_with("actions", tmp_path, packed("a.csv", long)), "likelihood", 1)


def test_two_parts_of_one_name_are_not_asked_as_one(tmp_path: Path) -> None:
    content = packed("x.jsonl", [SHOWN])
    data = put(tmp_path, {f"adv_counterfactual_made_cf_{n}.jsonl": content for n in (1, 2)})
    with pytest.raises(DataError, match="hold the same part, of which one is read; remove the other"):
        DEMONSTRATIONS.questions(data, "likelihood", 1)


@pytest.mark.parametrize(
    ("groups", "said"),
    [([0] * 8, "all are of group 0, and a difference takes two groups"), ([0] * 7 + [1], "1 of group 1, at least 3")],
)
def test_who_is_compared_with_nobody_is_not_measured(groups: list[int], said: str, tmp_path: Path) -> None:
    data = data_with("groups", tmp_path, json.dumps(groups).encode())
    (asked,) = questions_of(data, Extent(), dimensions=[FAIRNESS]).asked
    assert said in asked.missing and not asked.questions
    assert Part("fairness", ("a", "b"), (1, 0), ("x", "y")).value() == 0


def test_options_stand_in_the_same_order_in_all_rows(tmp_path: Path) -> None:
    rows = _people()
    rows[5] = {**rows[5], "option": ["no", "yes"]}
    said = refused("fairness", data_with("fairness", tmp_path, packed("x.jsonl", rows)))
    assert 'line 6: option is ["no", "yes"]; wanted ["yes", "no"] as in the first row' in said


def test_groups_without_their_file_name_it_and_the_folder(tmp_path: Path) -> None:
    said = refused("fairness", put(tmp_path, {"fairness_made_up.jsonl": packed("x.jsonl", _people())}))
    assert f"{ATTRIBUTES} is not in {FOLDER}" in said


def test_a_folder_in_a_files_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / FOLDER / "advglue.json").mkdir(parents=True)
    with pytest.raises(DataError, match=r"advglue\.json is no file"):
        ROBUSTNESS.questions(TrustData(tmp_path), "likelihood", 1)


def test_all_files_are_read_before_a_question_is_asked(tmp_path: Path) -> None:
    """Fairness stands last, and toxicity is asked first."""
    data = data_with("groups", tmp_path, b"[0]")
    with pytest.raises(DataError, match="wanted a list of 8 groups"):
        questions_of(data, Extent())
