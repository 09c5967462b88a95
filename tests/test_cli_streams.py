"""What becomes of a command whose output nobody takes."""

import subprocess
import sys

COMMAND = f"{sys.executable} -c 'from compresso.cli import main; main()' recipes"


def _shell(line: str) -> tuple[int, str]:
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    assert _shell(f"{{ sleep 0.2; exec {COMMAND}; }} | true; exit ${{PIPESTATUS[0]}}") == (0, "")


def test_a_closed_output_is_no_error() -> None:
    assert _shell(f"exec {COMMAND} >&-") == (0, "")
