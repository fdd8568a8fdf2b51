"""Every option of every command, once: its type, its name and its help."""

from pathlib import Path
from typing import Annotated

import typer

LARGEST_SEED = 2**63 - 1
_SEED = typer.Option(help="Seed of everything random.", min=-LARGEST_SEED - 1, max=LARGEST_SEED, show_default="0")
_DEVICE = typer.Option(metavar="D", help="cpu, cuda, cuda:1, ...", show_default="cpu")
_LAYER = "Layer, or a suffix that only it has; see list-layers."
_AT = (
    "In place of --layer: the whole model; its tokens move at this depth, embeddings or block:K (what enters block K)."
)
_GOAL = (
    "Of the whole model: decision (its own class or next token stays), nearest (the nearest of the --anchors does), "
    "hidden or pooled (its last hidden states, or their mean, move by at most --tolerance)."
)
_TOLERANCE = "Allowed move of the output: 1% of its norm, or a number. Default 10%."
_THREAT = (
    "frobenius, per-token, any-token, token:I or tokens:I,J,...; of the token measure: wasserstein:P or coupling:P "
    "(P = 1, 2, inf; :within:R bounds the tokens), copies:K."
)
_METHOD = typer.Option(
    "--attack",
    "--method",
    metavar="NAME",
    help="The attack; see attnrobust list attacks.",
    show_default="the threat's own",
)
_WORKERS = typer.Option(metavar="N", help="Worker processes; 0 works in this process.", min=0, show_default="0")

# ---- what is asked ---------------------------------------------------------------------------------------------------

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="minilm, smollm2, a Hugging Face directory or name, or a weights file.")
]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="MODEL", help="As for compare.")]
Layer = Annotated[str | None, typer.Option(metavar="NAME", help=_LAYER)]
Layers = Annotated[list[str] | None, typer.Option("--layer", metavar="NAME", help="Name, suffix or glob; repeatable.")]
At = Annotated[str | None, typer.Option("--at", metavar="DEPTH", help=_AT)]
Depths = Annotated[list[str] | None, typer.Option("--at", metavar="DEPTH", help=f"{_AT} A glob too; repeatable.")]
GoalName = Annotated[str | None, typer.Option("--goal", metavar="GOAL", help=_GOAL)]
GoalNames = Annotated[list[str] | None, typer.Option("--goal", metavar="GOAL", help=f"{_GOAL} Repeatable.")]
Anchors = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Of --goal nearest: UTF-8 text, one sentence a line and class.")
]
Row = Annotated[
    int | None,
    typer.Option("--row", metavar="I", help="Token whose output counts, where a model has one per token; -1 the last."),
]
Images = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE|FOLDER",
        help="Inputs: pictures (PNG, JPEG, ...), which the model's own image processor prepares; or .npz or "
        ".safetensors, every array (c, h, w) is one, as pixel_values.",
    ),
]
Texts = Annotated[Path | None, typer.Option(metavar="FILE", help="Inputs: UTF-8 text, one a line.")]
Tokens = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Inputs: .npz or .safetensors, every array (n, d) is one.")
]
Dataset = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH", help="Inputs: the texts of a column of Parquet, CSV or JSON lines, or of a datasets directory."
    ),
]
ColumnName = Annotated[
    str | None, typer.Option("--column", metavar="NAME", help="The column of --dataset; default text, or the only one.")
]
Tolerance = Annotated[str | None, typer.Option(metavar="X", help=_TOLERANCE)]
Tolerances = Annotated[
    list[str] | None, typer.Option("--tolerance", metavar="X", help=f"{_TOLERANCE} A goal each; repeatable.")
]
Readout = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Linear readout (weight, bias) of the layer's output: its label must stay instead. It is not the model's "
        "decision.",
    ),
]
Pool = Annotated[
    str | None, typer.Option(metavar="P", help="mean or row:I (or all, for a tolerance): the part that counts.")
]
Label = Annotated[int | None, typer.Option(metavar="CLASS", help="The label; default the clean prediction.")]
ThreatKey = Annotated[str, typer.Option("--threat", metavar="T", help=_THREAT)]
Threats = Annotated[list[str] | None, typer.Option("--threat", metavar="T", help=f"{_THREAT} Repeatable.")]
Seed = Annotated[int, _SEED]
SeedChange = Annotated[int | None, _SEED]
Device = Annotated[str, _DEVICE]
DeviceChange = Annotated[str | None, _DEVICE]

# ---- methods and their cost ------------------------------------------------------------------------------------------

Methods = Annotated[
    str | None,
    typer.Option(
        "--certificates", "--methods", metavar="A,B",
        help="Certificates to run; default those that apply and can win. See attnrobust list certificates.",
    ),
]  # fmt: skip
AllCertificates = Annotated[
    bool, typer.Option("--all-certificates", help="Every certificate that applies, also those that cannot win.")
]
Method = Annotated[str, _METHOD]
MethodChange = Annotated[str | None, _METHOD]
Epsilon = Annotated[
    float | None, typer.Option(metavar="R", help="Fixed budget: the worst point within it, not the nearest violation.")
]
TokenRadii = Annotated[
    bool,
    typer.Option("--token-radii", help="Attack every token alone, too: its own radius, for the report's heat map."),
]
Attacks = Annotated[str | None, typer.Option(metavar="A,B,C", help="The attacks; see attnrobust list attacks.")]
ProtocolName = Annotated[
    str | None,
    typer.Option(
        "--protocol",
        metavar="NAME",
        help="standard: a fixed measurement without options; --out is then one .json file.",
    ),
]
Epsilons = Annotated[
    str | None, typer.Option(metavar="R,R", help="Where success is counted; default around the best radii.")
]
Queries = Annotated[int | None, typer.Option(metavar="N", help="Most forward evaluations of one input.")]
Seconds = Annotated[float | None, typer.Option(metavar="S", help="Most wall time of one input.")]
Restarts = Annotated[int | None, typer.Option(metavar="N", help="Starting points.")]
Steps = Annotated[int | None, typer.Option(metavar="N", help="Steps of a round.")]
Budgets = Annotated[
    list[str] | None,
    typer.Option("--budget", metavar="'NAME KEY=N ...'", help="Of one attack: restarts, steps, queries, seconds."),
]
Decision = Annotated[
    bool,
    typer.Option("--decision", help="The whole model instead: its nearest anchor, from the embeddings and block 5 on."),
]
Heads = Annotated[bool, typer.Option("--heads/--no-heads", help="Rank the heads too.")]

# ---- smoothing -------------------------------------------------------------------------------------------------------

Sigma = Annotated[
    float,
    typer.Option(metavar="S", help="Standard deviation of the noise on every coordinate of the tokens that move."),
]
Samples = Annotated[int, typer.Option(metavar="N", help="Votes that bound the majority's probability.", min=10)]
FailureProbability = Annotated[
    float, typer.Option(metavar="P", help="Of everything that is stated about one input, at most.")
]

# ---- Lipschitz bounds ------------------------------------------------------------------------------------------------

BallRadius = Annotated[
    float | None,
    typer.Option("--radius", metavar="R", help="Radius of the ball of tokens; default the largest token norm."),
]
Count = Annotated[int | None, typer.Option("--n", metavar="N", help="Token count, where there are no inputs.")]
MoveSize = Annotated[
    float | None,
    typer.Option("--epsilon", metavar="E", help="Size of finite moves around the input; default 1% of its norm."),
]
SearchSteps = Annotated[
    int | None,
    typer.Option("--search", metavar="N", help="Steps of ascent for lower bounds; default 40 if small, else 0."),
]

# ---- how it is run ---------------------------------------------------------------------------------------------------

ConfigFile = Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="YAML or JSON; flags go over it.")]
Engine = Annotated[str | None, typer.Option(metavar="E", help="local (default) or ray.")]
Workers = Annotated[int, _WORKERS]
WorkersChange = Annotated[int | None, _WORKERS]
Timeout = Annotated[float | None, typer.Option(metavar="S", help="Seconds a row may take; needs workers.")]
ShardText = Annotated[str | None, typer.Option("--shard", metavar="i/N", help="Compute only this share of the rows.")]

# ---- what is printed and written -------------------------------------------------------------------------------------

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout instead of tables, one object a line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
FailUnder = Annotated[
    float | None, typer.Option(metavar="R", help="Exit with 1 if the radius of any input is below R.")
]
ResultsOut = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Write results.parquet, results.json and gap.png there.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the results of another job in --out.")]
RunDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="Output directory of a run.")]
RunOut = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Output directory; resumable. Default attnrobust-run.")
]
ScanOut = Annotated[Path, typer.Option("--out", metavar="DIR", help="Rows, resumable; see run and report.")]
BenchOut = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="Rows, one run for each attack; resumable. With --protocol the result's file."
    ),
]
ResultsFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Results of bench --protocol, as .json files.")]
PageOut = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Write the tables as a page, .md or .html, too.")
]
ReportOut = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Where to write; default beside the results.")
]
PrintConfig = Annotated[bool, typer.Option("--print", help="Print the effective configuration (the default).")]
Csv = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the rows as CSV.")]
Jsonl = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the rows as JSON lines.")]
LogTo = Annotated[
    str | None,
    typer.Option(metavar="TRACKER", help="Tell mlflow, wandb or tensorboard the configuration, figures and rows."),
]
MinCertified = Annotated[
    str | None,
    typer.Option(
        metavar="R",
        help="Least certified radius: a number, 0.3% (of the norm of what the threat moves), '2% token' (of the median "
        "token norm) or '5% word' (of the way to the nearest other word).",
    ),
]
Baseline = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Also compare with this earlier run, by layer, threat and goal.")
]
Worse = Annotated[
    str,
    typer.Option("--worse", metavar="P%", help="Share by which a median certified radius may fall below --baseline."),
]
MaxGap = Annotated[float | None, typer.Option(metavar="G", help="Largest gap.")]
Quantile = Annotated[float, typer.Option(metavar="Q", help="Share of the rows that may fall short.")]
Kinds = Annotated[
    list[str] | None,
    typer.Option("--kind", metavar="K", help="Only certificates of this kind count: float64, rigorous, probabilistic."),
]
Junit = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the verdict as JUnit XML.")]


def split_names(text: str) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]
