"""Train an image classifier: one run, from its config to its summary.

    python train.py --config configs/digits_revnet.py
                    [--workdir DIR] [--config.KEY=VALUE ...] [--eval_only]

The order of decisions, numbered as in main():

 1. What is asked for: the config, checked before anything is computed, downloaded or written; then
    the run's other processes and the mesh of all their devices.
 2. Whose folder it is: one run a workdir, of one config; a finished run says so and ends here.
 3. The data, whole, on the devices, or a stream of them.
 4. Where the run stands: at its start, or at its newest whole checkpoint.
 5. The programs, compiled: one for training steps, one for evaluation.
 6. The loop. At a step where something is due, in this order: log, evaluate, save; then stop if the
    run is complete or a signal asks for it; then dispatch steps up to the next one where it is.
 7. The result: summary.json, curves.png, and a table.

A run is a function of its config: it may be stopped or killed at any time, and started again by
the same command it ends in the same parameters: bit for bit on the same machine's CPUs; on a GPU,
where each start compiles anew and may choose other algorithms, but for rounding. Of several
processes the first alone reads and writes the workdir, which gets config.json, metrics.jsonl,
terms.json, tensorboard/, checkpoints/, and at the end summary.json and curves.png.

Exit codes: 0 done, or stopped by SIGTERM or SIGINT with everything saved; 1 the run failed; 2 it
was asked for something impossible. The last two come with a sentence on stderr.
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from revjax.data import DataError
from revjax.grid import stream_bound
from revjax.training.checkpoints import Checkpoints, Restored
from revjax.training.command_line import parse_arguments
from revjax.training.compiler import set_xla_flags
from revjax.training.config import Config, check_config, optional_keys
from revjax.training.curves import draw_curves
from revjax.training.errors import ConfigError, TrainingError
from revjax.training.evaluation import Evaluator
from revjax.training.feed import CLASSES, open_feed, terms_of
from revjax.training.interrupt import Stopped, StopSignals, exit_now
from revjax.training.mesh import get, make_mesh, put
from revjax.training.metrics import MetricsLog
from revjax.training.optimizer import learning_rate_schedule, make_optimizer
from revjax.training.pace import Pace
from revjax.training.processes import (
    Companions,
    arrays_from_first,
    from_first,
    is_first,
    join_processes,
)
from revjax.training.progress import Progress
from revjax.training.state import Abstract, abstract_model, draw, initial_state, state_shardings
from revjax.training.step import Report, make_train_steps
from revjax.training.summary import SHOWN, best_validation, device_name, summary_table, versions
from revjax.training.votes import Votes, cast
from revjax.training.workdir import (
    FREE_KEYS,
    check_same_config,
    check_same_terms,
    lock_workdir,
    read_json,
    write_json,
)


def main(argv: Sequence[str], stop: StopSignals) -> None:
    """Do what the command line asks for, or raise the sentence that says why not."""
    began = time.monotonic()

    # -- 1. What is asked for ---------------------------------------------------------------------

    arguments = parse_arguments(argv)
    if isinstance(arguments, str):
        return print(arguments)
    config, workdir = check_config(arguments.config), arguments.workdir
    join_processes(arguments.coordinator, arguments.processes, arguments.process)
    model = abstract_model(config)
    mesh = make_mesh(config)
    optimizer = make_optimizer(config.optim)
    initial = partial(initial_state, config, optimizer)

    with contextlib.ExitStack() as resources:
        resources.enter_context(Companions())
        if arguments.eval_only:
            return evaluate_only(config, arguments.config.to_dict(), workdir, model, mesh, stop)

        # -- 2. Whose folder it is ----------------------------------------------------------------

        summary_path, complete = workdir / "summary.json", False
        if is_first():
            resources.enter_context(lock_workdir(workdir))
            check_same_config(workdir, arguments.config.to_dict(), defaults=optional_keys())
            write_json(workdir / "config.json", arguments.config.to_dict())
            if summary_path.exists():
                summary = read_json(summary_path, *SHOWN)
                if complete := summary["steps"] == config.steps:
                    print(f"The run in {workdir} is complete.\n{summary_table(summary)}")
        if from_first(complete):
            return

        # -- 3. The data --------------------------------------------------------------------------

        with stop.raising():  # half-prepared data are removed on the way out
            feed = resources.enter_context(contextlib.closing(open_feed(config, mesh, complain)))
        if is_first():
            check_same_terms(workdir, terms_of(config, mesh))

        # -- 4. Where the run stands --------------------------------------------------------------

        checkpoints = None  # the other processes have none
        if is_first():
            checkpoints = resources.enter_context(
                Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)
            )
        restored = restore_newest(checkpoints, config, mesh)
        state, step, earlier = restored or (*stop.wait_for(partial(draw, initial, mesh)), 0, 0.0)
        if restored:
            tell(f"going on from step {step} of {config.steps}, saved in {workdir}.")
        metrics = MetricsLog(workdir, step, writes=is_first())
        resources.callback(metrics.close)
        saved = step  # the last step that is on the disk, or will be before this returns

        # -- 5. The programs, compiled ------------------------------------------------------------

        schedule = learning_rate_schedule(config.optim)
        train_steps = make_train_steps(config, model, optimizer, schedule, mesh)
        evaluate = Evaluator(config, model, feed, mesh)
        tell(f"compiling {config.model.name} for {device_name(mesh)}.")
        no_votes = cast(mesh, False)
        train_steps, _ = stop.wait_for(
            train_steps.lower(state, *feed.training(step, 0), np.int32(0), no_votes).compile,
            partial(evaluate.compile, state),
        )

        # -- 6. The loop --------------------------------------------------------------------------

        quiet = not is_first()
        progress = resources.enter_context(
            contextlib.closing(Progress(step, config.steps, quiet=quiet))
        )
        pace = Pace(config.batch_size)
        bound = stream_bound(config.model.grid_bits) if config.model.grid_bits is not None else None
        peak = 0.0
        pending: Dispatch | None = None  # the newest dispatch; the device may still be at it
        agreed = Votes(stop=0, pace=1)

        def account(dispatch: Dispatch) -> None:
            """Wait for a dispatch, then fail, warn and log as its report says."""
            nonlocal peak, agreed
            report: Report = jax.device_get(dispatch.report)
            agreed = Votes(*map(int, report.agreed))  # these arrays last as long as the report's
            pace.finished(dispatch.num_steps)
            progress.advance(dispatch.num_steps)
            if report.failed_step:
                raise TrainingError(
                    not_finite("loss, gradient or update", int(report.failed_step), saved)
                )
            if bound is not None and report.run_peak > bound >= peak:
                progress.say(
                    f"at step {dispatch.step} the stream has reached {report.run_peak:.4g}, past "
                    f"{bound:.4g}, up to which reconstruction is exact: gradients are now those "
                    "of a plain float stream; set config.model.grid_bits smaller."
                )
            peak = float(report.run_peak)
            if is_due(dispatch.step, config.log_every, config.steps) and report.counted:
                row = {
                    "step": dispatch.step,
                    "split": "train",
                    "loss": float(report.loss),
                    "accuracy": float(report.accuracy),
                    "learning_rate": float(report.learning_rate),
                    "images_per_second": pace.images_per_second(),
                }
                if model.has_stream:
                    row["stream_peak"] = float(report.stream_peak)
                if config.skip_nonfinite:
                    row["skipped_steps"] = int(report.skipped)
                metrics.write(row)
                progress.row(row)

        def untested() -> list[str]:
            """The splits without a row of this step; a run that ended amid them has some."""
            return [name for name in feed.evaluated if not metrics.has(name, step)]

        while True:
            alone = jax.process_count() == 1  # and need not ask
            stopping = bool(agreed.stop or (alone and stop.requested))
            testing = untested() if is_due(step, config.eval_every, config.steps) else []
            saving = is_due(step, config.checkpoint_every, config.steps) or stopping
            if pending and (testing or saving):
                account(pending)
                pending = None
            if testing and not stopping:
                for row in evaluate(state, testing, stop):
                    if not np.isfinite(row["loss"]):
                        raise TrainingError(not_finite(f"{row['split']} loss", step, saved))
                    rate = float(schedule(step - 1 - state.skipped))
                    row = {"step": step} | row | {"learning_rate": rate}
                    metrics.write(row)
                    progress.row(row)
                if untested():  # told to stop: save first, evaluate the others after the next start
                    agreed = agreed._replace(stop=1)
                    continue
            if saving and step > saved:
                metrics.sync()
                host_state = get(state)
                if checkpoints:
                    checkpoints.save(step, host_state, earlier + time.monotonic() - began)
                saved = step
            if stopping or step == config.steps:
                break

            if testing or saving:
                pace.restart()
            intervals = (config.log_every, config.eval_every, config.checkpoint_every)
            due_next = min(step + every - step % every for every in intervals)
            num_steps = min(due_next - step, config.steps - step, int(agreed.pace), feed.longest)
            batches = feed.training(step, num_steps)
            votes = cast(mesh, stop.requested is not None, pace.steps)
            state, report = train_steps(state, *batches, np.int32(num_steps), votes)
            step += num_steps
            if pending:  # the previous dispatch: the host never waits for the newest
                account(pending)
            pending = Dispatch(step, num_steps, report)

        # -- 7. The result ------------------------------------------------------------------------

        progress.close()
        if not checkpoints:
            return
        checkpoints.wait()
        if step < config.steps or untested():
            by = stop.requested or "a signal to another process"
            where = f"saved in {checkpoints.directory}" if step else "nothing to save yet"
            print(f"Stopped by {by} at step {step} of {config.steps}: {where}.")
            return
        result = metrics.last("test") or {}
        summary = {
            "model": config.model.name,
            "data": config.data.name,
            "parameters": model.num_parameters,
            "steps": config.steps,
            "precise_bn_batches": config.precise_bn_batches if model.has_statistics else None,
            "test_loss": result["loss"],
            "test_accuracy": result["accuracy"],
            "test_error": 1 - result["accuracy"],
            "wall_seconds": round(earlier + time.monotonic() - began, 1),
            "device": device_name(mesh),
            "versions": versions(),
            "stream_peak": float(state.stream_peak) if model.has_stream else None,
            "stream_bound": bound,
        }
        if config.skip_nonfinite:
            summary["skipped_steps"] = int(state.skipped)
        if feed.broken:
            summary["broken_images"] = len(feed.broken)  # met by process 0 since this start
        if config.data.validation:
            summary["best_validation"] = best_validation(metrics.rows)
        title = f"{config.model.name} on {config.data.name}"
        draw_curves(metrics.rows, title, workdir / "curves.png")
        write_json(summary_path, summary)
        print(f"Done: {workdir}\n{summary_table(summary)}")


class Dispatch(NamedTuple):
    """Training steps given to the device."""

    step: int  # of the run, after them
    num_steps: int
    report: Report


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether `step` ends an interval of `every` steps, or the run."""
    return step > 0 and (step % every == 0 or step == steps)


def not_finite(what: str, step: int, saved: int) -> str:
    """Say that a number is infinite or not a number, and what to do."""
    kept = f"what was saved up to step {saved} is kept" if saved else "nothing was saved yet"
    return (
        f"the {what} is not finite at step {step}; {kept}; try a smaller "
        "config.optim.learning_rate, or float32 where config.model.dtype is bfloat16, in another "
        "--workdir."
    )


def restore_newest(checkpoints: Checkpoints | None, config: Config, mesh: Mesh) -> Restored | None:
    """The newest whole checkpoint, on the devices; process 0 reads it, and the others get it."""
    template = jax.eval_shape(partial(initial_state, config, make_optimizer(config.optim)))
    restored = checkpoints.restore_newest(template, tell) if checkpoints else None
    found = from_first(restored and (restored.step, restored.wall_seconds))
    if found is None:
        return None
    step, wall_seconds = found
    state = (
        restored.state if restored else jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), template)
    )
    state = put(arrays_from_first(state), state_shardings(mesh, template))
    return Restored(state, step, wall_seconds)


def evaluate_only(
    config: Config,
    values: dict[str, Any],
    workdir: Path,
    model: Abstract,
    mesh: Mesh,
    stop: StopSignals,
) -> None:
    """Print the loss and accuracy of the newest checkpoint, of each split; write nothing."""
    with contextlib.ExitStack() as resources:
        checkpoints = None
        if is_first():
            free = (*FREE_KEYS, "precise_bn_batches")
            check_same_config(workdir, values, free, optional_keys())
            terms = terms_of(config, mesh)
            kept = {CLASSES: terms[CLASSES]} if CLASSES in terms else {}
            check_same_terms(workdir, kept, writes=False)
            if (workdir / "checkpoints").is_dir():
                checkpoints = resources.enter_context(
                    Checkpoints(workdir / "checkpoints", read_only=True)
                )
        restored = restore_newest(checkpoints, config, mesh)
    if restored is None:
        raise TrainingError(f"{workdir} has no checkpoint to evaluate; train there first.")
    with stop.raising():
        feed = open_feed(config, mesh, complain)
    evaluate = Evaluator(config, model, feed, mesh)
    stop.wait_for(partial(evaluate.compile, restored.state))
    rows = list(evaluate(restored.state, feed.evaluated, stop))
    if len(rows) < len(feed.evaluated):
        raise Stopped(stop.requested)
    for row in rows if is_first() else ():
        shown = f"{row['split']} loss {row['loss']:.4f}, accuracy {row['accuracy']:.2%}"
        print(f"step {restored.step}: {shown}")


def tell(sentence: str) -> None:
    """Say something that is no result, once for all processes."""
    if is_first():
        complain(sentence)


def complain(sentence: str) -> None:
    """Say why this process cannot go on."""
    print(f"train.py: {sentence}", file=sys.stderr, flush=True)


def fail(code: int, *sentences: str) -> int:
    """Say why the run failed, and return the exit code."""
    for sentence in sentences:
        complain(sentence)
    if jax.distributed.is_initialized():  # its end would wait for the other processes
        exit_now(code)
    return code


def run(argv: Sequence[str]) -> int:
    """Run `main` and return the exit code, with a sentence on stderr where it is not 0.

    There is a second sentence where the run's last checkpoint could not be written either.
    """
    with StopSignals() as stop:
        try:
            main(argv, stop)
        except (ConfigError, TrainingError, DataError) as error:
            notes = getattr(error, "__notes__", ())
            ours = (note for note in notes if not note.startswith("-----"))  # not JAX's, on frames
            sentences = (str(error), *ours)
            return fail(2 if isinstance(error, ConfigError) else 1, *sentences)
        except OSError as error:
            return fail(
                1,
                f"a file could not be read or written ({error}); what is saved is whole: make room "
                "or mend that, and start again by the same command.",
            )
        except jax.errors.JaxRuntimeError as error:
            if not any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "Out of memory")):
                raise
            reason = str(error).splitlines()[0].rstrip(".")
            return fail(
                1,
                f"the device's memory is too small ({reason}); take a smaller config.batch_size or "
                "a smaller network.",
            )
        except Stopped:
            print(f"Stopped by {stop.requested}: there was nothing to save.")
            exit_now(0)
    return 0


if __name__ == "__main__":
    set_xla_flags()  # before a device is used
    sys.exit(run(sys.argv))
