"""Messages that are kept name no folder of this machine, and what was measured is not touched."""

import platform
import sys
import tempfile
from pathlib import Path

import pytest

from compresso.checkpoint.places import without_places, without_places_in


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home of" / "xyzzy"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "xyzzy")
    monkeypatch.setenv("LOGNAME", "xyzzy")
    monkeypatch.setenv("COMPRESSO_DATA", "/mnt/xyzzy/data")
    return home


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{home}/models/small/config.json is damaged", "config.json is damaged"),
        ("in {home}: no space", "in the home folder: no space"),
        ("'{home}/.cache' is full", "'.cache' is full"),
        ("/mnt/xyzzy/data/datasets/a.jsonl:3", "a.jsonl:3"),
        ("{tmp}/tmpa1b2/model.gguf does not open", "a temporary file does not open"),
        ("{prefix}/lib/python3/site-packages/x.py:7", "x.py:7"),
        ("install --prefix {prefix} x", "install --prefix the Python environment x"),
        ("cannot open /srv/disks/one/part-0.bin (2)", "cannot open part-0.bin (2)"),
        ('File "/opt/build/llama.cpp/src/a.cpp", line 3', 'File "a.cpp", line 3'),
        (r"C:\Users\xyzzy\models\a.bin is gone", "a.bin is gone"),
        ("/srv/home/xyzzy is full", "a folder is full"),
        (f"/srv/out/.result.{platform.node() or 'host'}.123.partial/x", "x"),
        ("/srv/out/.result.vm.123.partial", "result"),
    ],
)
def test_a_path_goes_by_its_last_part(text: str, wanted: str, home: Path) -> None:
    given = text.format(home=home, tmp=tempfile.gettempdir(), prefix=sys.prefix)
    assert without_places(given) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "1,234 tokens/s and 3/4 units",
        "Salesforce/wikitext, owner/name:config",
        "https://huggingface.co/owner/name/tree/main",
        "and/or, 2:4, ~3, ../outside, model.layers.0",
        "",
    ],
)
def test_what_is_no_absolute_path_stays(text: str) -> None:
    assert without_places(text) == text


def test_a_record_is_cleaned_where_it_speaks(home: Path) -> None:
    record = {
        "engines": [{"reason": f"{home}/x.gguf", "difference": 0.5}],
        "samples": [{"prompt": "ls", "text": "/usr/bin/env"}],
        "segmented": [{"picture": "iVBO/usr/bin/env/9+/a=="}],
        "sha256": "/a/b",
        "none": None,
        "counts": (1, 2),
    }
    found = without_places_in(record)
    assert found == record | {"engines": [{"reason": "x.gguf", "difference": 0.5}], "counts": [1, 2]}
