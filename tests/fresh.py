"""Processes that open a checkpoint, forked from one that has imported what they import: tests want dozens of them, and
the imports of each take five seconds.

Such a child has seen nothing of the model that a test made, only its files, as a process that is started anew. It runs
the same program with the same arguments, environment and folder. Two programs are served so, each by a process of its
own, for one of them must not know compresso; any other command is a process as ever, and so are these two for tests
that use the fixture `real_processes`.

Run as a script, with the modules to import: each line of its input is {"program": [...], "env": {...}, "cwd": folder,
"out": file, "err": file}, and for each it prints the child's exit code.
"""

import atexit
import importlib
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SPEC = importlib.util.find_spec("compresso")
assert _SPEC is not None and _SPEC.origin is not None
_PACKAGE = Path(_SPEC.origin).parent
REAL = subprocess.run
_REOPEN = ("-P", "-m", "compresso.formats.reopen")
_OPEN = ("-P", str(_PACKAGE / "engines" / "transformers_process.py"))
_IMPORTS = {
    _REOPEN: ("compresso.formats.reopen", "transformers.models.llama.modeling_llama"),
    _OPEN: ("safetensors.torch", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
}
_AS_ASKED = {"env", "capture_output", "text", "check", "stdin"}
"""What such a process is started with; with more it is a process as ever."""
_SERVED: dict[tuple[str, ...], subprocess.Popen[str]] = {}
"""Processes that have imported what a program imports, from the first time that it is asked for."""


def run(command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run`, forked where the command is one of the two programs."""
    words = [str(part) for part in command] if isinstance(command, list | tuple) else []
    known = next(
        (one for one in _IMPORTS if words[:1] == [sys.executable] and tuple(words[1:][: len(one)]) == one), None
    )
    if known is None or not options.keys() <= _AS_ASKED or not (options.get("text") and options.get("capture_output")):
        return REAL(command, **options)
    with tempfile.TemporaryDirectory() as scratch:
        out, err = (Path(scratch, name) for name in ("out", "err"))
        job = {"program": words[2:], "env": dict(options.get("env") or os.environ), "cwd": str(Path.cwd())}
        code = _forked(known, {**job, "out": str(out), "err": str(err)})
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


def _forked(known: tuple[str, ...], job: dict[str, Any]) -> int:
    process = _SERVED.get(known) or _SERVED.setdefault(known, _started(_IMPORTS[known]))
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def _started(modules: Sequence[str]) -> subprocess.Popen[str]:
    path = os.pathsep.join(part for part in (str(_PACKAGE.parent), os.environ.get("PYTHONPATH")) if part)
    process = subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", __file__, *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )
    atexit.register(_stop, process)
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise RuntimeError(f"{__file__} does not start; run it by hand with {' '.join(modules)}")
    return process


def _stop(process: subprocess.Popen[str]) -> None:
    process.communicate()


def _child(job: dict[str, Any]) -> None:
    """Run a program as a process of its own would; never returns."""
    code = 1
    for place, stream in (("out", 1), ("err", 2)):
        file = os.open(job[place], os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream)
    try:
        os.environ.clear()
        os.environ.update(job["env"])
        os.chdir(job["cwd"])
        if "HF_MODULES_CACHE" in job["env"]:  # transformers reads it once, when it is imported
            for module in [one for one in sys.modules.values() if "HF_MODULES_CACHE" in getattr(one, "__dict__", {})]:
                module.HF_MODULES_CACHE = job["env"]["HF_MODULES_CACHE"]  # type: ignore[attr-defined]
        program = job["program"]
        if program[0] == "-m":
            sys.argv = program[1:]
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = program
            runpy.run_path(program[0], run_name="__main__")
        code = 0
    except SystemExit as stop:  # as the interpreter does at the end of a program
        if stop.code is not None and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main(modules: list[str]) -> None:
    """Import, and serve until the input ends."""
    for module in modules:
        importlib.import_module(module)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _child(json.loads(line))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
