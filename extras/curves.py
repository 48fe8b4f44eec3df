"""
Keep the curves of recorded runs, and show the reader which of them are healthy.

`python -m extras.results add` keeps them: docs/results/curves.jsonl has a line for each run and phase.
`python -m extras.results` makes of them the table of healthy ranges in docs/method.md and the picture of
failures, assets/failures.svg. docs/results/curves.json says which runs both are about.
"""
import json, math, os

from configurator import is_number
from extras.flag_mistakes import ConfigError
from extras.report import chart, curves_svg, read_metrics
from extras.whole_files import read_json, write_whole

CURVES = os.path.join("docs", "results", "curves.jsonl")
SPEC = os.path.join("docs", "results", "curves.json")
PICTURE = os.path.join("assets", "failures.svg")
# A curve is kept as at most so many points, each the mean of some lines of metrics.jsonl.
POINTS = 30
# The table has the mean of so many last points.
LAST = 3
KEPT = (
    *("nll", "td_error", "pess", "q_mean", "v_mean", "adv_action", "pass_action", "pass_syntax"),
    *("return_predicted", "return_observed", "grad_norm", "eval/success", "eval/valid"),
)
RUN = ("experiment", "method", "variant", "seed", "phase")


# ---- what is kept ----
def mean_of(rows, name):
    """Return the mean of a metric over some lines, to four digits; None where no line has it."""
    values = [row[name] for row in rows if is_number(row.get(name)) and math.isfinite(row[name])]
    if not values:
        return None
    return float(f"{sum(values) / len(values):.4g}")

def thinned(rows):
    """Return the curves of some lines of metrics.jsonl: {metric or "step": at most POINTS values}."""
    size = math.ceil(len(rows) / POINTS)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    curves = {"step": [part[-1]["step"] for part in parts]}
    for name in KEPT:
        values = [mean_of(part, name) for part in parts]
        if any(value is not None for value in values):
            curves[name] = values
    return curves

def curve_records(run, names):
    """Make the records of a run's curves, one for each phase. names: what identifies the run."""
    path = os.path.join(run, "metrics.jsonl")
    if not os.path.exists(path):
        return []
    rows = read_metrics(path)
    found = []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        own = [row for row in rows if row["phase"] == phase]
        found.append({**names, "phase": phase, "curves": thinned(own)})
    return found

def key_of_curve(record):
    """Return what identifies a record."""
    return tuple(record.get(name, "") for name in RUN)

def read_curves(root):
    """Read what the table and the picture are made of: (curves.json, {key of a run: its curves})."""
    kept = {}
    with open(os.path.join(root, CURVES), encoding="utf-8") as f:
        for line in f:
            record = json.loads(line)
            kept[key_of_curve(record)] = record["curves"]
    return read_json(os.path.join(root, SPEC)), kept

def keep_curves(run, names, root):
    """Put the curves of a run into curves.jsonl, in place of those of the run that it repeats."""
    path = os.path.join(root, CURVES)
    new = curve_records(run, names)
    keys = [key_of_curve(record) for record in new]
    with open(path, encoding="utf-8") as f:
        old = [json.loads(line) for line in f]
    kept = [record for record in old if key_of_curve(record) not in keys]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept + new))


# ---- the table of healthy ranges ----
def last_values(curves, name):
    """Return a metric at the end of a phase, the mean of the last points; None where it is not known."""
    values = [value for value in curves.get(name, [])[-LAST:] if value is not None]
    if not values:
        return None
    return sum(values) / len(values)

def digits(value, is_share):
    """Format a value of a metric."""
    if is_share:
        return f"{100 * value:.0f} %"
    return f"{value:.2f}" if abs(value) >= 0.05 else f"{value:.3f}"

def range_cell(runs, name):
    """Format from where to where a metric lies at the end of some runs."""
    values = [last_values(curves, name) for curves in runs]
    values = [value for value in values if value is not None]
    if not values:
        return ""
    is_share = name.startswith(("pass_", "eval/"))
    low = digits(min(values), is_share)
    high = digits(max(values), is_share)
    if low == high:
        return low
    return f"{low.removesuffix(' %')} to {high}"

def ranges_rows(spec, kept):
    """Return the rows of the healthy ranges: one for each metric, with a column for each group of runs."""
    groups = {}
    for column in spec["columns"]:
        runs = []
        for key, curves in kept.items():
            experiment, method, variant, _, phase = key
            if experiment in column["experiments"] and (method, variant, phase) == ("afsft", "", "offline"):
                runs.append(curves)
        if runs:
            noun = "run" if len(runs) == 1 else "runs"
            groups[f"{column['label']}, {len(runs)} {noun}"] = runs
    rows = [["", *groups]]
    for name in spec["metrics"]:
        rows.append([f"`{name}`", *(range_cell(runs, name) for runs in groups.values())])
    return rows


# ---- the picture of failures ----
def failures_svg(spec, kept):
    """Draw the charts of curves.json, a metric of a healthy run beside one that failed -> the SVG."""
    charts = []
    for drawing in spec["charts"]:
        series = {}
        for label, key, metric in drawing["lines"]:
            curves = kept.get(tuple(key), {})
            if metric not in curves:
                raise ConfigError(f"{SPEC} wants {metric} of {key}, which {CURVES} does not have.")
            factor = drawing.get("factor", 1)
            pairs = zip(curves["step"], curves[metric])
            series[label] = [(step, factor * value) for step, value in pairs if value is not None]
        charts.append(chart(drawing["title"], series, "update, offline"))
    return curves_svg(charts)
