"""What becomes of a command whose output nobody takes."""

import subprocess
import sys

import pytest

COMMAND = f"{sys.executable} -c 'from compresso.cli import main; main()' recipes"


def _shell(line: str) -> tuple[int, str]:
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error() -> None:
    assert _shell(f"{{ sleep 0.2; exec {COMMAND}; }} | true; exit ${{PIPESTATUS[0]}}") == (0, "")


@pytest.mark.slow
def test_a_closed_output_is_no_error() -> None:
    assert _shell(f"exec {COMMAND} >&-") == (0, "")


UNKNOWN = f"{COMMAND} nothing-of-the-kind"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (f"exec {COMMAND} 2>&-", 0, ""),
        (f"exec {COMMAND} <&- >&- 2>&-", 0, ""),
        (f"exec {UNKNOWN} 2>&-", 2, ""),
        (f"exec {UNKNOWN} >&- 2>/dev/full", 2, ""),
        (f"exec {UNKNOWN} >/dev/full", 2, "RecipeError: unknown recipe 'nothing-of-the-kind'"),
        (f"exec {COMMAND} >/dev/full", 3, "ResourceError: [Errno 28] No space left on device"),
        (f"exec {COMMAND} >/dev/full 2>&-", 3, ""),
        (f"PYTHONIOENCODING=ascii {COMMAND} compresso >/dev/null", 0, ""),
    ],
)
def test_streams_that_take_nothing_leave_the_exit_code(line: str, code: int, said: str) -> None:
    found, error = _shell(line)
    assert found == code, error
    assert error.startswith(said)
    assert len(error.splitlines()) == bool(said)
