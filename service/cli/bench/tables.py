"""The benchmarks' results as tables of the terminal."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table

from service.cli import text

if TYPE_CHECKING:
    from nanomoe.bench.generation import Figures
    from service.cli.bench.cohort_rates import CohortRate
    from service.cli.bench.lifecycle import Beside, ClaimTime, Delays, Recovery, Traffic
    from service.cli.bench.queue_rates import QueueRates
    from service.cli.bench.served import Served
    from service.cli.bench.sweep_requests import SweepTimes
    from service.cli.bench.turnaround import Turnaround


def generation_table(figures: Iterable["Figures"]) -> Table:
    """One row for each model and number of texts at once: tokens a second, and how many times each peer's."""
    table = text.new_table(
        "model", ">entries", "sampling", ">at once", ">tok/s", ">nanoGPT", ">times", ">transformers", ">times"
    )  # fmt: skip
    for one in figures:
        for speed in one.speeds:
            cells = [one.model, f"{one.vocab_size:,}", speed.sampling, str(speed.at_once)]
            cells.append(f"{speed.tok_per_sec['nanomoe']:,.0f}")
            for peer in ("nanogpt", "transformers"):
                measured = peer in speed.ratio
                cells.append(f"{speed.tok_per_sec[peer]:,.0f}" if measured else "-")
                cells.append(f"{speed.ratio[peer]:.1f}" if measured else "-")
            table.add_row(*cells)
    return table


def first_token_table(figures: Iterable["Figures"]) -> Table:
    """Milliseconds to the first token, and the limit of a single text."""
    table = text.new_table(
        "model", ">entries", ">first token", ">nanoGPT", ">transformers", ">limit, 1 at once", ">as stored"
    )  # fmt: skip
    for one in figures:
        first = one.first_token_seconds
        table.add_row(
            one.model,
            f"{one.vocab_size:,}",
            *(f"{1e3 * first[who]:.1f} ms" if who in first else "-" for who in ("nanomoe", "nanogpt", "transformers")),
            f"{one.limit_tok_per_sec:,.0f} tok/s",
            f"{one.limit_as_stored_tok_per_sec:,.0f} tok/s",
        )
    return table


def numerics(figures: Iterable["Figures"]) -> Iterable[str]:
    """How the engine computed each model's tokens, and against which bandwidth its limit was taken."""
    for one in figures:
        yield (
            f"{one.model}, {one.vocab_size:,}: {one.numerics}; "
            f"{one.n_active_params / 1e6:.1f} M active weights read at {one.read_bytes_per_sec / 1e9:.0f} GB/s"
        )


def served_table(served: Iterable["Served"]) -> Table:
    """Through HTTP beside the engine alone."""
    table = text.new_table(
        "model", ">entries", ">at once", ">engine tok/s", ">HTTP tok/s", ">HTTP / engine", ">first chunk"
    )  # fmt: skip
    for one in served:
        table.add_row(
            one.model,
            f"{one.vocab_size:,}",
            str(one.at_once),
            f"{one.engine_tok_per_sec:,.0f}",
            f"{one.http_tok_per_sec:,.0f}",
            f"{one.ratio:.2f}",
            f"{1e3 * one.first_token_seconds:.1f} ms",
        )
    return table


def claims_table(claims: Iterable["ClaimTime"]) -> Table:
    """One row for each number of queued jobs."""
    table = text.new_table(">queued jobs", ">claim, median", ">largest")
    for one in claims:
        table.add_row(f"{one.n_queued:,}", _ms(one.median_seconds), _ms(one.max_seconds))
    return table


def queue_table(found: "QueueRates") -> Table:
    """One row for each kind of transaction and number of jobs in it."""
    table = text.new_table("transaction", ">jobs in one", ">jobs/s", ">CPU a job", ">p50", ">p99")
    for one in found.rates:
        times = (_ms(one.cpu_seconds_per_job), _ms(one.p50_seconds), _ms(one.p99_seconds))
        table.add_row(one.what, str(one.at_once), f"{one.jobs_per_sec:,.0f}", *times)
    return table


def sweeps_table(found: "SweepTimes") -> Table:
    """One row for each request."""
    table = text.new_table(f"sweep of {found.n_jobs:,} jobs", ">median", ">largest", ">answer")
    for one in found.requests:
        table.add_row(one.request, _ms(one.median_seconds), _ms(one.max_seconds), f"{one.n_bytes / 1000:,.0f} kB")
    return table


def cohorts_table(found: Iterable["CohortRate"]) -> Table:
    """One row for each sweep."""
    columns = (">together", ">jobs/min", ">times as fast", ">transactions a job", ">peak memory", ">wait behind it")
    table = text.new_table("sweep", *columns)
    for one in found:
        table.add_row(
            f"{one.n_jobs} x {one.shape}, {one.n_steps} steps",
            str(one.width),
            f"{one.jobs_per_minute:,.1f}",
            "" if one.times_as_fast is None else f"{one.times_as_fast:.2f}",
            f"{one.transactions_per_job:.1f}",
            "" if one.peak_bytes is None else f"{one.peak_bytes / 2**20:,.0f} MiB",
            f"{one.seconds_behind:,.1f} s",
        )
    return table


def traffic_table(traffic: Iterable["Traffic"]) -> Table:
    """Submissions with and without training beside them."""
    table = text.new_table("beside", ">submits/s", ">GET /jobs/{id}, p50", ">p99")
    for one in traffic:
        cells = [f"{one.submits_per_sec:,.0f}", _ms(one.get_p50_seconds), _ms(one.get_p99_seconds)]
        table.add_row("a job in training" if one.training else "an idle worker", *cells)
    return table


def delays_table(delays: "Delays | None", recoveries: Iterable["Recovery"]) -> Table:
    """What a user waits for."""
    table = text.new_table("from", "to", ">median", ">largest")
    rows = (
        {}
        if delays is None
        else {
            ("submit, idle warm worker", "running"): delays.submit_to_running,
            ("submit, idle warm worker", "first training step"): delays.submit_to_first_step,
            ("cancel", "cancelled, no process left"): delays.cancel_to_cancelled,
            ("cancel", "first step of the next job"): delays.cancel_to_next_first_step,
        }
    )
    for (since, until), (median, largest) in rows.items():
        table.add_row(since, until, _ms(median), _ms(largest))
    for one in recoveries:
        since = f"worker killed, lease {one.lease_seconds:g} s, {one.database}"
        table.add_row(since, "running again", f"{one.kill_to_running:.1f} s", "")
        table.add_row(since, "first new step", f"{one.kill_to_new_step:.1f} s", "")
    return table


def turnaround_table(one: "Turnaround") -> Table:
    """Jobs one after the other through one worker, and the reference job beside a plain script."""
    table = text.new_table("from", "to", ">median", ">90 % within", ">times")
    split = one.tiny_split
    rows = {
        ("submit, idle worker", "first step in the row, reference shape"): one.submit_to_first_step,
        ("one job succeeded", "first step of the next, reference shape"): one.end_to_next_first_step,
        ("one job cancelled", "first step of the next, reference shape"): one.cancelled_to_next_first_step,
        ("one tiny job succeeded", "first step of the next"): one.tiny_end_to_next_first_step,
        ("one tiny job succeeded", "the next is claimed"): split.end_to_claim,
        ("a tiny job is claimed", "its last checkpoint is in its row"): split.claim_to_last_checkpoint,
        ("its last checkpoint is in its row", "it has succeeded"): split.last_checkpoint_to_end,
        (f"submit, reference job, {one.reference_steps} steps", f"succeeded, loss {one.job_loss:.4f}"): (
            one.submit_to_succeeded
        ),
    }
    if one.script_seconds is not None:
        rows["plain script started", f"ended, loss {one.script_loss:.4f}"] = one.script_seconds
    for (since, until), times in rows.items():
        table.add_row(since, until, _ms(times.median), _ms(times.p90), str(times.n))
    if one.times_as_fast_as_script is not None:
        table.add_row("reference job", "times as fast as the script", f"{one.times_as_fast_as_script:.2f}", "", "")
    table.add_row("tiny jobs, one worker", "jobs a minute", f"{one.tiny_per_minute:.0f}", "", str(split.end_to_claim.n))
    return table


def beside_table(one: "Beside") -> Table:
    """Training speed without and during generation."""
    table = text.new_table("training", ">steps/s", ">of alone")
    table.add_row("alone", f"{one.steps_per_sec:.1f}", "")
    table.add_row("beside one client that streams", f"{one.steps_per_sec_beside:.1f}", f"{one.ratio:.2f}")
    return table


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"
