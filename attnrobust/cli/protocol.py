"""``bench --protocol``: the standard measurement, and its result as one file."""

from collections.abc import Mapping
from pathlib import Path

from attnrobust.cli.exits import ExitCode
from attnrobust.cli.interrupt import stopping
from attnrobust.cli.output import console, place, print_json, say
from attnrobust.cli.progress import tracked
from attnrobust.errors import InputError
from attnrobust.runs.storage.atomic import require_writable_file, write_text


def bench_by_protocol(
    name: str,
    changes: Mapping[str, object],
    refused: Mapping[str, object],
    *,
    out: Path | None,
    json: bool,
    quiet: bool,
) -> int:
    """Measure by a protocol and write its result.

    Args:
        name: The protocol's.
        changes: Model, layers, inputs and execution, as ``load_config`` takes them.
        refused: Every option that a protocol fixes, with its value; None where it was not given.
        out: The result's file; the runs go beside it. None takes the protocol's name.
        json: Print the result too, in place of the table.
        quiet: No progress.
    """
    from attnrobust.runs.config import load_config
    from attnrobust.runs.early import require_files
    from attnrobust.runs.protocol import protocol_named, refuse_options, run_protocol

    protocol = protocol_named(name)
    refuse_options(protocol, refused)
    target = Path(f"attnrobust-{protocol.name}.json") if out is None else out
    if target.suffix != ".json":
        raise InputError(f"--out {target}: with --protocol the result is one file; give a name that ends in .json")
    require_writable_file(target, option="--out")
    config = load_config(changes={**changes, "output": target.with_suffix(".runs"), "seed": protocol.seed})
    require_files(config)
    with stopping() as stop:
        outcomes = run_protocol(
            protocol, config, stop=stop, watch=lambda rows, total: tracked(rows, total, quiet=quiet, places=True)
        )
    if remaining := sum(outcome.remaining for outcome in outcomes):
        say(f"{remaining} rows are left and no result is written; give the same command again to go on")
        return ExitCode.INTERRUPTED
    from attnrobust.reports.leaderboard import leaderboard, tables
    from attnrobust.runs.protocol_result import document_text, protocol_document
    from attnrobust.runs.work import Workbench

    document = protocol_document(protocol, model_name(config.model), Workbench(config).sources, outcomes)
    write_text(target, document_text(document))
    if json:
        print_json(document)
    else:
        for table in tables(leaderboard({str(target): document})):
            console().print(table)
    say(f"wrote {place(target)}, results {document['results'][:12]}")
    return ExitCode.UNSOUND if any(line["unsound"] for line in document["summary"]) else ExitCode.OK


def model_name(given: str) -> str:
    """A model's name without the directories of this machine."""
    return Path(given).resolve().name if Path(given).exists() else given
