"""The child process that trains one job after another, or several together as a cohort: it reads them from stdin and
reports on stdout, one message a line.

Knows no database: all its input comes from its supervisor, and it exits when the supervisor is gone. It is started
before there is a job, imports torch, touches no GPU and waits. Between two jobs nothing of the first is left but, on
a GPU, the captured step for the next job of its shape; where that is not certain, after a failure for example, the
process exits, and the supervisor starts another.
"""

import argparse
import faulthandler
import gc
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn, get_args

from nanomoe.config import JobConfig
from nanomoe.logs import LogFormat, configure_logging
from nanomoe.processes import die_with_parent
from worker.channel import Channel, JobChannel
from worker.cohort_trainer import is_stacked, run_cohort
from worker.job_trainer import run_job
from worker.memory import use_one_arena
from worker.protocol import Idle, Ready
from worker.supervision import Supervision

if TYPE_CHECKING:
    from nanomoe.training.run import Run

log = logging.getLogger(__name__)


def main() -> NoReturn:
    """Warm up, then train job after job until the process should exit."""
    options = _parser().parse_args()
    die_with_parent(options.parent)
    use_one_arena()
    configure_logging(options.log_format)
    channel = Channel()
    supervision = Supervision(options.until)
    faulthandler.enable()
    # The message holds the request; the supervisor's signal only interrupts a system call of the main thread.
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: supervision.terminated())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cohort = _warm_up(measures_cohort=options.measure_cohort, gpu=options.gpu)
    train_jobs(channel, supervision, cohort, on_gpu=options.gpu is not None)
    sys.stderr.flush()
    if supervision.should_exit:
        # Die by SIGTERM, so that the supervisor counts no crash for a job that was just sent.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    # Exit without cleanup: tearing down torch takes longer than a short job.
    os._exit(0)


def train_jobs(channel: Channel, supervision: Supervision, cohort: int | None = None, *, on_gpu: bool = False) -> None:
    """Train job after job, until one fails or leaves something behind, or someone asks the process to exit. `cohort`:
    most jobs that it should be given together, where that was measured."""
    from nanomoe.training.steps.kept import KeptSteps
    from nanomoe.training.steps.loops.compiling import LOOPS
    from worker.process_state import ProcessState

    measured_without_loops = cohort is not None and not on_gpu and not LOOPS.are_compiled()
    kept_steps = KeptSteps()
    new_state = ProcessState(kept_steps.forget)
    channel.send(Ready(cohort=cohort))
    while (assigned := supervision.wait_for_jobs()) is not None:
        starts, lock = assigned
        new_state.restore()
        if len(starts) == 1 and not is_stacked(starts[0]):
            about_job = JobChannel(channel, starts[0].assignment)
            done = run_job(starts[0], about_job, supervision, kept_steps)
            about_job.send(done)
            none_failed = done.outcome != "failed"
        else:
            none_failed = run_cohort(starts, channel, supervision)
        if not none_failed or supervision.should_exit:
            return
        if (left := new_state.what_is_left()) is not None:
            log.warning("trainer_exits: %s", left)
            return
        if measured_without_loops and LOOPS.are_compiled():
            log.info("trainer_exits: training loops are compiled by now, with which company gains another time")
            return
        # Closed, never unlocked: a child of a job that still lives keeps the slot locked.
        os.close(lock)
        channel.send(Idle())


def _warm_up(*, measures_cohort: bool, gpu: str | None = None) -> int | None:
    """Import what a job needs, train a toy to its end, and a step at the default size: much of torch is loaded, and its
    kernels are chosen, by the first step of a kind only. Touches no GPU. Returns how many jobs should be trained
    together on this CPU, or on the GPU of this name, if that is to be measured and could be."""
    gc.disable()  # nothing that an import makes is garbage: a tenth of its time went into looking for some
    import torch

    from nanomoe.compiling import start_threads
    from nanomoe.tokenizer import BUNDLED, load_tokenizer
    from nanomoe.training.loop import train
    from nanomoe.training.run import prepare

    def run_of(config: JobConfig, text: str) -> "Run":
        return prepare(config, text, load_tokenizer(config.tokenizer)).run

    n_threads = torch.get_num_threads()  # each run sets its own; cohorts are to find those of the process
    toy = JobConfig(tokenizer="bytes", block_size=4, n_layer=2, n_head=1, n_embd=4, use_moe=True, epochs=1)
    for _ in train(run_of(toy, "warm up")):
        pass
    run_of(JobConfig(tokenizer=BUNDLED), "Era uma vez " * 30).train_step()
    torch.set_num_threads(n_threads)
    start_threads()
    cohort: int | None = None
    if measures_cohort and gpu is None:
        from nanomoe.training.cohort_width import measured_cohort_width

        cohort = measured_cohort_width(n_threads)
    elif measures_cohort and gpu is not None:
        from nanomoe.training.program_width import measured_program_width

        cohort = measured_program_width(gpu)
    # What is there now stays: to search it after every job for what is unreachable took 0.15 s (measured).
    gc.collect()
    gc.freeze()
    gc.enable()
    return cohort


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m worker.trainer", description="Started by a worker.")
    parser.add_argument("--parent", type=int, required=True, help="process id of the supervisor")
    parser.add_argument(
        "--until",
        type=float,
        required=True,
        help="monotonic time to exit at without a later keep-alive",
    )
    parser.add_argument("--measure-cohort", action="store_true", help="measure how many jobs to train together")
    parser.add_argument("--gpu", metavar="MODEL", help="name of the GPU that it trains on; without it, a CPU")
    parser.add_argument("--log-format", choices=get_args(LogFormat), default="console")
    return parser


if __name__ == "__main__":
    main()
