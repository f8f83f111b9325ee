"""A process in which chat templates of others are rendered.

A template comes from anyone, and nested loops, texts that double and comparisons of nested lists can all take forever.
Python's own signal handlers wait until a call into C returns. Therefore the kernel ends this process when a rendering
has used up its processor time. The next rendering starts another process, in a tenth of a second.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent


class TemplateFault(Exception):
    """A template that fails, refuses its input, or takes too long.

    Attributes:
        reason: what it has raised, in one line.
        line: where its syntax is wrong, if it is.
    """

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.line = reason, line


class TemplateProcess:
    """The process, as seen by the one that asks it. It is started on demand; threads take turns.

    Args:
        module: it calls :func:`serve` when it is run.
    """

    _process: subprocess.Popen[str] | None

    def __init__(self, module: str) -> None:
        self._module = module
        self._forget()
        atexit.register(self._stop)
        os.register_at_fork(after_in_child=self._forget)  # a forked process must not ask its parent's

    def render(self, source: str, given: Mapping[str, Any] | None, seconds: float) -> str:
        """Return a template rendered with the names that it is ``given``; without those, compile it only.

        Raises:
            TemplateFault: it fails, or takes more than ``seconds`` of processor time.
        """
        request = json.dumps({"source": source, "given": given, "seconds": seconds})
        with self._turn:
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", self._module],
                    cwd=_ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            try:
                answer = self._exchange(self._process, request)
            except BaseException:  # such as KeyboardInterrupt: the next answer would be that to this request
                self._process.kill()
                self._stop()
                raise
            if not answer:
                status = self._stop()
                if status == -signal.SIGPROF:
                    raise TemplateFault(f"it takes longer than {seconds:g} seconds")
                raise TemplateFault(f"it ends Python with status {status}")
        found = json.loads(answer)
        if "text" not in found:
            raise TemplateFault(**found)
        return str(found["text"])

    @staticmethod
    def _exchange(process: subprocess.Popen[str], request: str) -> str:
        """Return the answer to a request; nothing if the process has ended."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return ""
        return process.stdout.readline()

    def _forget(self) -> None:
        self._turn = threading.Lock()
        self._process = None

    def _stop(self) -> int | None:
        """End the process, if there is one, and return its status."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.communicate()
        return process.returncode


def serve(
    render: Callable[[str, Mapping[str, Any] | None], str],
    explain: Callable[[Exception], tuple[str, int | None]],
    memory: int,
) -> None:
    """Answer requests until the input ends.

    Args:
        render: a template, with the names that it is given.
        explain: returns reason and line of what a template has raised.
        memory: the most bytes of the process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the terminal is for the process that asks
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = min(limit for limit in (soft, memory) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # SIGPROF ends a process that does not handle it
        try:
            answer: dict[str, Any] = {"text": render(request["source"], request["given"])}
        except Exception as error:
            reason, number = explain(error)
            answer = {"reason": reason, "line": number}
        written = json.dumps(answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(written, flush=True)
