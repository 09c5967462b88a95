"""Command lines that may die: a process imports compresso once and forks a child for each line it reads.

Run as a script. Each line of its input is {"arguments": [...], "log": file, "event": "kill" | "term" | "nan" | "limit"
| "", "phase": str, "at": int}; for each it prints the child's exit code, negative for a signal. The event comes after
`at` updates of the phase: the process is killed, gets SIGTERM, or every loss from then on is NaN. The phase "saved" is
the moment after `at` stages were saved. Under "limit" the system lets the child have `at` MB of data more than it
begins with (Linux).
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresso import cli
from compresso.checkpoint.workfolder import WorkFolder
from compresso.training.progress import Progress


def arm(event: str, phase: str, at: int) -> None:
    """Let the event happen in this process."""

    def happen() -> None:
        if event == "nan":
            from compresso.core.loss import NEXT_TOKEN

            plain = NEXT_TOKEN.mean
            object.__setattr__(NEXT_TOKEN, "mean", lambda logits, labels: plain(logits, labels) * float("nan"))
        else:
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM}[event])

    step, save_stage = Progress.step, WorkFolder.save_stage
    done_in_phase: dict[str, int] = {}

    def stepped(self: Progress, done: int, now: str, facts: Any, tokens: float) -> None:
        step(self, done, now, facts, tokens)
        done_in_phase[now] = done
        if now == phase and done == at:
            happen()

    def saved(self: WorkFolder, index: int, *rest: Any) -> Path:
        folder = save_stage(self, index, *rest)
        if phase == "saved" and index + 1 == at:
            happen()
        return folder

    Progress.step = stepped  # type: ignore[method-assign]
    WorkFolder.save_stage = saved  # type: ignore[method-assign]


def reopened(folder: Path, model: Any, ids: Tensor, atol: float) -> float:
    """Not reopened: tests of runs do that, and it costs seconds."""
    return 0.0


def child(job: dict[str, Any]) -> None:
    """Run one command line; never returns."""
    import compresso.runner.output
    import compresso.runner.run
    from compresso.runner import final_evaluation

    final_evaluation.SPEED_NEW, final_evaluation.SPEED_ROUNDS = 4, 2  # as in tests/conftest.py
    compresso.runner.output.reopen_and_compare = reopened  # type: ignore[assignment]
    sys.modules["compresso.runner.execution"].parity_records = lambda folder: []  # type: ignore[attr-defined]
    with open(job["log"], "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if job["event"] == "limit":
        told = Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]  # kB
        size = int(told) * 1024 + job["at"] * 1_000_000
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    elif job["event"]:
        arm(job["event"], job["phase"], job["at"])
    cli.main(job["arguments"])


def main() -> None:
    """Serve until the input ends."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(job)
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
