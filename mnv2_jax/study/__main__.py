"""Plans, trains and reports a study: ``python -m mnv2_jax.study run digits_widths --workdir=studies/digits_widths``."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser, folder_type
from mnv2_jax.study.design import Run, Study, load_study, runs_of, study_files

if TYPE_CHECKING:
    import argparse

    from mnv2_jax.study.plan import Cost

_HELP_AFTER = """\
plan    prints the runs, their cost, and which claims the planned seeds can decide (--format=commands or slurm-array:
        the jobs for a scheduler; --measure: also times the train step of each cell on this machine)
run     trains what is missing; any number of these commands, on any machines that share the folder, work together
status  prints how far every run is, and the time left
report  writes report.html, report.md, results.csv and verdicts.json into the folder
compare prints any runs side by side: compare RUN RUN … [--html=FILE.html]
check   takes the first steps of a training in several ways, and names where they part: check --config=…, check RUN RUN

STUDY is the name of one of the project's studies ({names}), or a .py file with a function get_study().

examples:
  python -m mnv2_jax.study plan digits_widths
  python -m mnv2_jax.study run digits_widths --workdir=studies/digits_widths
  python -m mnv2_jax.study report digits_widths --workdir=studies/digits_widths
  python -m mnv2_jax.study compare runs/a runs/b --html=comparison.html
"""


def main() -> None:
    """Reads the flags and does what they say."""
    if sys.argv[1:2] == ["compare"]:
        from mnv2_jax.study import compare

        return compare.main(sys.argv[2:])
    if sys.argv[1:2] == ["check"]:
        from mnv2_jax.study import check

        return check.main(sys.argv[2:])
    parser = Parser(
        "Plans, trains and reports a study: its claims, its runs, its verdicts.",
        _HELP_AFTER.format(names=", ".join(study_files())),
    )
    parser.add_argument("what", choices=list(_VERBS), help="what to do")
    parser.add_argument("study", metavar="STUDY", help="name or file of the study")
    parser.add_argument("--workdir", type=folder_type, metavar="DIR", help="the study's folder (default: studies/NAME)")
    parser.add_argument(
        "--format", choices=("table", "commands", "slurm-array"), default="table", help="with plan: what is printed"
    )
    parser.add_argument("--measure", action="store_true", help="with plan: time the train step of each cell here")
    parser.add_argument("--retry", action="store_true", help="with run: train those again that failed")
    parser.add_json_flag()
    args, overrides = parser.parse(sys.argv[1:])
    if overrides:
        raise UserError(f"--config.{overrides[0]}: a study's file says what is trained; change it there")
    for flag, verb in (("retry", "run"), ("format", "plan"), ("measure", "plan")):
        if getattr(args, flag) not in (False, "table") and args.what != verb:
            raise UserError(f"--{flag} is used with {verb} only; leave it out")
    if args.measure and args.format != "table":
        raise UserError(f"--measure prints times and --format={args.format} jobs; leave one out")
    study = load_study(args.study)
    name = pathlib.PurePath(args.study).stem
    args.workdir = args.workdir or pathlib.Path("studies", name)
    _VERBS[args.what](study, runs_of(study), name, args)


def _plan(study: Study, runs: Sequence[Run], name: str, args: argparse.Namespace) -> None:
    from mnv2_jax.study import judgement, plan

    if args.format == "commands":
        return print("\n".join(plan.job_lines(runs, str(args.workdir))))
    if args.format == "slurm-array":
        return print(plan.slurm_array(runs, str(args.workdir)), end="")
    costs = [plan.cost_of(run, study.train_images) for run in runs]
    chances = [judgement.chances_of(study, claim) for claim in study.claims]
    total = sum(cost.training_madds or 0 for cost in costs)
    unknown = next((cost.why for cost in costs if cost.images is None), "")
    if args.json:
        rows = [
            {"name": run.name, "arguments": run.arguments, **cost._asdict()}
            for run, cost in zip(runs, costs, strict=True)
        ]
        decided = [
            {"claim": judgement.sentence(c), "decided": x.decided} for c, x in zip(study.claims, chances, strict=True)
        ]
        answer = {"runs": rows, "training_madds": total, "claims": decided}
        if args.measure:
            answer |= _measure(runs, costs, sys.stderr)
        return print(json.dumps(answer))
    for run, cost in zip(runs, costs, strict=True):
        images = "images unknown" if cost.images is None else f"{cost.images:>13,.0f} images"
        print(f"{run.name:<44} {cost.madds / 1e6:>9,.2f} M MAdds {images}  {' '.join(run.arguments)}")
    print(f"{len(runs)} runs, {total:.2e} multiply-adds of training ({plan.PASSES} × those of inference)")
    if unknown:
        print(f"without the runs whose data can't be opened here: {unknown}")
    for claim, chance in zip(study.claims, chances, strict=True):
        print(
            f"{judgement.sentence(claim)}: if exactly true, {len(study.seeds)} seeds decide it with a probability of"
            f" {chance.decided:.0%}, at a spread of {100 * study.spread:.2f} points"
        )
    for relation in study.relations:
        print(judgement.sentence(relation))
    if args.measure:
        _measure(runs, costs, sys.stdout)


def _measure(runs: Sequence[Run], costs: Sequence[Cost], out: TextIO) -> dict[str, Any]:
    """Times the step of each cell, and prints each time as it comes; returns them with the hours of all steps."""
    from mnv2_jax.study import measure

    measured = {}
    for run in measure.first_runs(runs):
        each = measured[run.cell.name] = measure.measure(run)
        words = (
            each.why if each.ms is None else f"{each.ms:>10,.2f} ms a step {each.images_per_second:>10,.0f} images/s"
        )
        print(f"{each.cell:<44} {words}", file=out, flush=True)
    timed = [each for each in measured.values() if each.ms is not None]
    if not timed:
        raise UserError(f"no cell can be trained on this machine, the first for: {next(iter(measured.values())).why}")
    seconds = [measure.seconds_of(run, cost.steps, measured) for run, cost in zip(runs, costs, strict=True)]
    known = [each for each in seconds if each is not None]
    hours = sum(known) / 3600
    print(
        f"{hours:,.2f} hours for the steps alone of {len(known)} of {len(runs)} runs, one after the other on this"
        f" machine ({timed[0].device}); evaluations, starts and waits for data come on top",
        file=out,
    )
    return {"measured": [each._asdict() for each in measured.values()], "hours_of_steps": hours}


def _run(study: Study, runs: Sequence[Run], name: str, args: argparse.Namespace) -> None:
    from mnv2_jax.study import work

    if args.retry:
        work.retry(args.workdir, runs)
    states = work.work(
        args.workdir, runs, lambda line: print(line, file=sys.stderr if args.json else sys.stdout, flush=True)
    )
    _answer(study, states, args)
    if failed := [state for state in states if state.name == "failed"]:
        raise UserError(
            f"{len(failed)} of {len(states)} runs failed, the first of them {failed[0].run.name}:"
            f" {failed[0].failure['line']}; its log is in {args.workdir}/logs; --retry trains them again"
        )


def _status(study: Study, runs: Sequence[Run], name: str, args: argparse.Namespace) -> None:
    from mnv2_jax.study.state import read_state

    _answer(study, [read_state(args.workdir, run) for run in runs], args)


def _answer(study: Study, states: Sequence[Any], args: argparse.Namespace) -> None:
    """Prints the states of the runs, and the time left."""
    from mnv2_jax.runs.progress import duration
    from mnv2_jax.study.results import metric_of, score
    from mnv2_jax.study.state import seconds_left

    left, (metric, when) = seconds_left(states), metric_of(study)
    scores = [score(s.summary, metric, when) if s.summary else s.evaluation.get(metric) for s in states]
    if args.json:
        rows = [
            {"name": s.run.name, "state": s.name, "share": s.share, "seconds": s.seconds, "score": value}
            for s, value in zip(states, scores, strict=True)
        ]
        return print(json.dumps({"runs": rows, "seconds_left": left}))
    for state, value in zip(states, scores, strict=True):
        shown = "" if value is None else f"  {metric} {value:.2%}" + ("" if state.summary else " so far")
        note = f"  {state.failure['line']}" if state.failure else ""
        print(f"{state.run.name:<44} {state.name:<8} {state.share:>4.0%} {duration(state.seconds):>9}{shown}{note}")
    counts = {name: sum(state.name == name for state in states) for name in ("done", "running", "stopped", "failed")}
    words = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none begun"
    print(f"{len(states)} runs: {words}" + ("" if not left else f"; about {duration(left)} left"))


def _report(study: Study, runs: Sequence[Run], name: str, args: argparse.Namespace) -> None:
    from mnv2_jax.study.judgement import judge_all
    from mnv2_jax.study.report import write_report
    from mnv2_jax.study.state import read_state

    states = [read_state(args.workdir, run) for run in runs]
    if all(state.name == "waiting" for state in states):
        raise UserError(f"{args.workdir}: no run of the study has begun; start them with study run, then report")
    page = write_report(args.workdir, name, study, states)
    judged = judge_all(study, states)
    if args.json:
        return print(json.dumps({"report": str(page), "claims": [each.to_json() for each in judged]}))
    for each in judged:
        print(f"{each.what}: {each.sentence}")
    print(page)


_VERBS: Mapping[str, Callable[[Study, Sequence[Run], str, Any], None]] = {
    "plan": _plan,
    "run": _run,
    "status": _status,
    "report": _report,
}

if __name__ == "__main__":
    exit_on_user_error(main)
