"""Run a module in several processes of this machine, on the CPU."""

import os
import subprocess
import sys

from looplm.failures import UserError


def run_module(module: str, arguments: list[str], *, ranks: int, seconds: float, shown: bool) -> None:
    """Run ``python -m module`` under torchrun, one thread a process, even if the machine has a GPU.

    Args:
        module: its name.
        arguments: its command line.
        ranks: number of processes.
        seconds: after which they are killed.
        shown: pass their output through; otherwise errors are printed if they fail.

    Raises:
        UserError: a process failed, or they took too long.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", module, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipe = None if shown else subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as torchrun:
        try:
            _, errors = torchrun.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            torchrun.terminate()  # so that it ends its processes too
            torchrun.communicate()
            fix = "repeat it on an idle machine; if it hangs again, report it"
            raise UserError(f"{module}: took more than {seconds:g} s in {ranks} processes; {fix}") from error
    if torchrun.returncode:
        print(errors or "", end="", file=sys.stderr)
        status = torchrun.returncode
        raise UserError(f"{module}: ended with status {status} in {ranks} processes; see its output above")
