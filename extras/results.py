"""
Generate the tables of results in README.md and docs/ from the records in docs/results/.

    python -m extras.results             # write all tables again
    python -m extras.results --check     # exit with 1 if a file differs from its records
    python -m extras.results add out/numberline --experiment=grid_mixed

A table is placed between the lines `<!-- results: NAME -->` and `<!-- end of results -->`. NAME is
`headline`, `families`, `losses`, `curves`, an experiment of runs.jsonl, or a table of measurements.json or
published.json. `add` records a finished run. Curves and their picture are in extras/curves.py.

runs.jsonl has one line for each run, phase and way of decoding. Rates are percentages: `goal` (goal
reached), `clean` (summed reward > 0), `solvable` (goal reached, of the deals that can be solved), `valid`
(valid actions). `goal_k` counts the episodes behind `goal`, where the count is known. A seed such as "0+1+2"
marks a record of several seeds together. `variant` names what differs from the experiment's main run.
"""
import glob, json, os, re, shlex, sys, time

from buffer import Buffer
from configurator import configure
from evaluate import wilson
from extras.curves import PICTURE, failures_svg, keep_curves, ranges_rows, read_curves
from extras.flag_mistakes import ConfigError, nearest
from extras.whole_files import read_json, write_whole

# --- config ---
check = False    # compare only
experiment = ''  # of `add`: the table that the run belongs to
variant = ''     # of `add`: what differs from the experiment's main run, for the table
hardware = ''    # of `add`: the machine that the run was made on
note = ''        # of `add`: one sentence for the reader
command = ''     # of `add`: what was run; '': the last command of the run, as meta.json has it
# --- end of config ---

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUNS = os.path.join("docs", "results", "runs.jsonl")
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)

METRICS = {
    "goal": "goal reached",
    "clean": "summed reward > 0",
    "solvable": "goal reached, deals that can be solved",
    "valid": "valid actions",
}
METHODS = {
    "script": "",
    "data": "recorded play",
    "sft": "SFT",
    "fbc": "filtered cloning",
    "awr": "AWR",
    "afsft": "AFSFT",
}
PHASES = {
    "played": "",
    "data": "",
    "offline": "offline",
    "online": "then online",
}
DECODINGS = {
    "greedy": "greedy",
    "sampled": "sampled",
    "hidden": "greedy, picture hidden",
}
EVALUATIONS = {
    "greedy": "greedy",
    "sampled, T=1": "sampled",
    "picture hidden, greedy": "hidden",
}
# Experiments whose tables have an interval for each seed, because all seeds play the same deals.
SEED_INTERVALS = ("blackjack", "points24")
# Tables with a row for an experiment and a few of its rates.
SMALL = ("headline", "families", "losses")
PLAYER = ("env", "method", "variant", "phase")
IDENTITY = ("experiment", *PLAYER, "decoding", "seed")
DATA = ("experiment", "env", "method", "seed", "n", "goal", "valid")


# ---------------------------------------------------------------------------------------------------- records
def read_records(root=ROOT):
    """Read runs.jsonl: a list of dictionaries, in the order in which they were added."""
    with open(os.path.join(root, RUNS), encoding="utf-8") as f:
        return [json.loads(line) for line in f]

def read_store(root=ROOT):
    """Read all that the tables are made of.

    Returns (records, small tables by name, literal tables by name, what extras/curves.py keeps).
    """
    folder = os.path.join(root, "docs", "results")
    literal = read_json(os.path.join(folder, "measurements.json"))
    literal |= read_json(os.path.join(folder, "published.json"))
    small = {name: read_json(os.path.join(folder, f"{name}.json")) for name in SMALL}
    return read_records(root), small, literal, read_curves(root)

def key_of(record, names):
    """Return what identifies a record, or the player that it belongs to."""
    return tuple(record.get(name, "") for name in names)

def episodes(record, metric):
    """Return the number of episodes behind a rate, None if it is unknown or if actions are counted."""
    if metric == "valid":
        return None
    return record.get(f"{metric}_n", record.get("n"))

def successes(record, metric):
    """Return the count behind a rate, computed from the rounded rate where it was not written down."""
    if f"{metric}_k" in record:
        return record[f"{metric}_k"]
    return record[metric] / 100 * episodes(record, metric)

def percentage(record, metric):
    """Return a rate in percent, from its count where there is one."""
    if f"{metric}_k" in record:
        return 100 * (successes(record, metric) / episodes(record, metric))
    return record[metric]

def pooled(records, metric):
    """Pool the episodes of several records: (rate, low, high) in %, Wilson's 95 % interval.

    Without the number of episodes it is the mean of the rates, and low and high are None.
    """
    counts = [episodes(record, metric) for record in records]
    if None in counts:
        rates = [percentage(record, metric) for record in records]
        return sum(rates) / len(rates), None, None
    n = sum(counts)
    k = sum(successes(record, metric) for record in records)
    low, high = wilson(k, n)
    return 100 * (k / n), 100 * low, 100 * high

def select(records, metric, **wanted):
    """Return the records with a rate for this metric that have the wanted values, one for each seed.

    A record of several seeds together is used only where there is none of a single seed.
    """
    found = []
    for record in records:
        if metric in record and all(record.get(name, "") == value for name, value in wanted.items()):
            found.append(record)
    single = [record for record in found if not isinstance(record.get("seed"), str)]
    return sorted(single, key=lambda record: record.get("seed", 0)) or found


# ----------------------------------------------------------------------------------------------------- tables
def markdown(rows):
    """Format rows of texts, the first of which is the header, as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)

def rate(value, low=None, high=None):
    """Format a rate with its interval, if it has one."""
    text = f"{value:.1f}"
    if low is not None:
        text += f" [{low:.1f}, {high:.1f}]"
    return text

def seeds_of(records):
    """Name the seeds of a cell, unless they are 0, 1, 2 or there are none (a script plays all starts)."""
    seeds = [str(record.get("seed", "")) for record in records]
    if seeds in (["0", "1", "2"], [""]):
        return ""
    if len(seeds) == 1 and seeds[0].isdigit():
        return f"seed {seeds[0]}: "
    return f"seeds {', '.join(seeds)}: "

def cell(records, metric):
    """Format the records of one player and one way of decoding: each seed, then all together."""
    if not records:
        return ""
    rates = [pooled([record], metric) for record in records]
    together = pooled(records, metric)
    if records[0]["method"] == "data":
        # the recorded play is what it is: no interval
        rates = [one[:1] for one in rates]
        together = together[:1]
    elif len(records) > 1 and records[0]["experiment"] in SEED_INTERVALS:
        together = together[:1]
    elif len(records) > 1:
        rates = [one[:1] for one in rates]
    text = " / ".join(rate(*one) for one in rates)
    if len(records) > 1:
        text += f" ({rate(*together)})"
    return seeds_of(records) + text

def episode_counts(records, metric):
    """Format the number of episodes of each seed, once where they are equal."""
    counts = [f"{episodes(record, metric):,}" for record in records if episodes(record, metric)]
    if len(set(counts)) == 1:
        return counts[0]
    return " / ".join(counts)

def label(player, several):
    """Name a player by method, variant and phase, and by environment if there are several."""
    env, method, variant, phase = player
    name = METHODS[method]
    if variant:
        name = f"{name} ({variant})" if name else variant
    if PHASES[phase] and method != "sft":
        name += f", {PHASES[phase]}"
    if several:
        name = f"{env}: {name}"
    return name

def players_of(records):
    """Return the players of an experiment: by environment, then method, phase and variant."""
    players = list(dict.fromkeys(key_of(record, PLAYER) for record in records))
    envs = list(dict.fromkeys(player[0] for player in players))
    variants = sorted(dict.fromkeys(player[2] for player in players), key=bool)

    def place(player):
        env, method, variant, phase = player
        method_and_phase = list(METHODS).index(method), list(PHASES).index(phase)
        return envs.index(env), *method_and_phase, variants.index(variant)
    return sorted(players, key=place)

def table(records, metric):
    """Build the table of one experiment and one metric: a row for each player, a column for each decoding."""
    players = players_of(records)
    several = len({player[0] for player in players}) > 1
    rows = []
    for player in players:
        wanted = dict(zip(PLAYER, player))
        cells = []
        shown = []
        for decoding in DECODINGS:
            found = select(records, metric, decoding=decoding, **wanted)
            if decoding == "sampled":
                found = found or select(records, metric, decoding="played", **wanted)
            cells.append(cell(found, metric))
            shown = shown or found
        if shown:
            rows.append([label(player, several), *cells, episode_counts(shown, metric)])
    header = ["", *DECODINGS.values(), "episodes a seed"]
    columns = zip(header, *rows)
    filled = [column for column in columns if column[0] == "" or any(column[1:])]
    return list(zip(*filled))

def tables(records):
    """Format the tables of an experiment, one for each metric; metrics with equal tables share one."""
    titles = {}
    for metric in METRICS:
        if any(metric in record for record in records):
            text = markdown(table(records, metric))
            titles.setdefault(text, []).append(METRICS[metric])
    parts = []
    for text, names in titles.items():
        title = ", and ".join(names)
        parts.append(f"{title[0].upper()}{title[1:]}, %:\n\n{text}")
    return "\n\n".join(parts)

def conditions(record):
    """Name the machine of a record, and its q_weight."""
    parts = [record.get("hardware", "")]
    if record.get("q_weight"):
        parts.append(f"q_weight {record['q_weight']:g} at play")
    return ", ".join(filter(None, parts))

def when(records):
    """Format when some records were measured, and at which commits: "2026-11-30 (f430c98b, 4b0e414a)"."""
    days = {}
    for record in records:
        commits = days.setdefault(record.get("date", ""), {})
        commits.setdefault(record.get("commit", ""))
    parts = []
    for day, commits in days.items():
        names = ", ".join(filter(None, commits))
        parts.append(f"{day} ({names})".strip() if names else day)
    return ", ".join(parts)

def distinct(things):
    """List the things that are not empty, each once, in their order."""
    return [thing for thing in dict.fromkeys(things) if thing]

def origins(records):
    """Build the table of how each player was run: command without seed, conditions, minutes, remarks.

    The seeds of a command share a line, which lists all their commits.
    """
    groups = {}
    for record in sorted(records, key=lambda record: str(record.get("seed", ""))):
        command = re.sub(r" --seed=\d+", "", record.get("command", ""))
        key = (command, conditions(record), record.get("source", ""))
        groups.setdefault(key, []).append(record)
    rows = [["", "command", "how it was measured", "minutes", "remarks"]]
    for (command, place, source), found in groups.items():
        names = distinct(label(key_of(record, PLAYER), several=False) for record in found)
        code = f"`{command}`" if command else ""
        measured = ", ".join(distinct([place, when(found), source]))
        # one number for each run, or the one that all have
        runs = distinct((record.get("seed"), str(record.get("minutes", ""))) for record in found)
        minutes = distinct(time for _, time in runs)
        if len(minutes) > 1:
            minutes = [time for _, time in runs if time]
        notes = distinct(record.get("note", "") for record in found)
        rows.append(["; ".join(names), code, measured, " / ".join(minutes), "; ".join(notes)])
    return rows

def experiment_block(records):
    """Format one experiment: its tables, and how each player was run."""
    return f"{tables(records)}\n\n{markdown(origins(records))}"

def literal_block(spec):
    """Format a table whose cells are kept as texts, with its note and how they were measured below."""
    parts = [spec.get(name, "") for name in ("hardware", "date")]
    if "command" in spec:
        parts.insert(0, f"`{spec['command']}`")
    how = ", ".join(filter(None, parts))
    if how:
        how = f"{spec.get('verb', 'Measured')}: {how}. "
    note = f"{spec['note']} " if "note" in spec else ""
    return f"{markdown([spec['columns'], *spec['rows']])}\n\n{note}{how}Source: {spec['source']}."


# ----------------------------------------------------------------------------------------------- small tables
def whole(value):
    """Round half up to a whole percent."""
    return str(int(value + 0.5 + 1e-9))

def small_value(records, row, phase, decoding, variants):
    """Round the first rate that one of the variants has: (text, whether it is of one seed)."""
    wanted = dict(experiment=row["experiment"], phase=phase, decoding=decoding)
    if "env" in row:
        wanted["env"] = row["env"]
    method = "sft" if variants is row.get("sft") else "afsft"
    for name in variants:
        found = select(records, row["metric"], method=method, variant=name, **wanted)
        if found:
            return whole(pooled(found, row["metric"])[0]), len(found) == 1
    return "–", False

def small_cell(records, row, column):
    """Format one cell of a small table: greedy / sampled, and its marks."""
    if column not in row:
        return ""
    phase = "online" if column == "online" else "offline"
    pair = []
    for decoding in ("greedy", "sampled"):
        pair.append(small_value(records, row, phase, decoding, row[column]))
    texts = [text for text, _ in pair]
    measured = [one_seed for text, one_seed in pair if text != "–"]
    if not measured:
        return "–"
    marks = [row.get(f"{column}_mark", "")]
    if all(measured):
        marks.insert(0, "¹")
    else:
        texts = [f"{text}¹" if one_seed else text for text, one_seed in pair]
    return " ".join([" / ".join(texts), *filter(None, marks)])

def small_block(records, spec):
    """Format a small table, such as README's: a row for each experiment."""
    rows = [spec["columns"]]
    for row in spec["rows"]:
        wanted = dict(experiment=row["experiment"], method="data", variant="")
        data = select(records, row["metric"], **wanted)
        cells = [row["label"], whole(pooled(data, row["metric"])[0])]
        cells += [small_cell(records, row, column) for column in ("sft", "offline", "online")]
        rows.append(cells)
    return f"{markdown(rows)}\n\n{spec['note']}"

def losses_cell(records, metric, others):
    """Format a rate over all seeds with its interval, and how many seeds there are if not three.

    It is bold if its interval lies above those of all others. others: lists of records.
    """
    if not records:
        return "–"
    mark = {1: " ¹", 2: " ²"}.get(len(records), "")
    found = pooled(records, metric)
    text = rate(*found)
    highest = [pooled(other, metric)[2] for other in others if other]
    if highest and found[1] > max(highest):
        text = f"**{text}**"
    return text + mark

def losses_block(records, spec):
    """Format the table that compares the losses: a row for each world that has a run."""
    rows = [spec["columns"]]
    for row in spec["rows"]:
        metric = row["metric"]
        own = dict(experiment=row["experiment"], variant="")
        if "env" in row:
            own["env"] = row["env"]
        data = select(records, metric, method="data", **own)
        if not data:
            continue
        cells = [row["label"], rate(pooled(data, metric)[0])]
        found = []
        for method in spec["methods"]:
            played = dict(method=method, phase="offline", decoding="sampled", **own)
            found.append(select(records, metric, **played))
        for i, one in enumerate(found):
            others = found[:i] + found[i + 1 :]
            cells.append(losses_cell(one, metric, others))
        rows.append(cells)
    return f"{markdown(rows)}\n\n{spec['note']}"


# ------------------------------------------------------------------------------------------------------ files
def read_text(path):
    """Read a text file."""
    with open(path, encoding="utf-8") as f:
        return f.read()

def render_text(name, store):
    """Return the text of the block NAME."""
    records, small, literal, curves = store
    if name == "losses":
        return losses_block(records, small[name])
    if name == "curves":
        return f"{markdown(ranges_rows(*curves))}\n\n{curves[0]['note']}"
    if name in small:
        return small_block(records, small[name])
    if name in literal:
        return literal_block(literal[name])
    own = [record for record in records if record["experiment"] == name]
    if not own:
        known = [*small, "curves", *literal, *dict.fromkeys(record["experiment"] for record in records)]
        hint = nearest(name, known, "see docs/results/")
        raise ConfigError(f"There are no results of the name {name}; {hint}.")
    return experiment_block(own)

def generate(path, text, store):
    """Return the text of a file with all its tables generated again."""
    starts = text.count("<!-- results: ")
    if starts != len(BLOCK.findall(text)) or starts != text.count("<!-- end of results -->"):
        raise ConfigError(f"{path}: a table has no end, put `<!-- end of results -->` on a line below each.")

    def fill(match):
        return f"{match[1]}\n{render_text(match[2], store)}\n\n{match[3]}"
    return BLOCK.sub(fill, text)

def targets(root=ROOT):
    """Return the files that may hold tables."""
    return [os.path.join(root, "README.md"), *sorted(glob.glob(os.path.join(root, "docs", "*.md")))]

def update_files(root=ROOT, check_only=False):
    """Write all tables again; with check_only raise a ConfigError that names the files that differ."""
    store = read_store(root)
    different = []
    for path in targets(root):
        text = read_text(path)
        name = os.path.relpath(path, root)
        new = generate(name, text, store)
        if new == text:
            continue
        different.append(name)
        if not check_only:
            write_whole(path, new)
    picture = os.path.join(root, PICTURE)
    try:
        drawn = failures_svg(*store[-1])
    except ConfigError as error:
        # The run that the picture needs may be the next one to be added.
        if check_only:
            raise
        print(f"{PICTURE} stays as it is: {error}")
        return different
    if not os.path.exists(picture) or read_text(picture) != drawn:
        different.append(PICTURE)
        if not check_only:
            write_whole(picture, drawn)
    if check_only and different:
        names = ", ".join(different)
        raise ConfigError(f"{names}: the tables differ from docs/results/, run python -m extras.results.")
    return different


# -------------------------------------------------------------------------------------------------------- add
def read_evaluations(run):
    """Read the results of a run, {name of the row: summary}, and the q_weight that they were played with."""
    offline = os.path.join(run, "eval_offline.json")
    final = os.path.join(run, "eval.json")
    results = {}
    if os.path.exists(offline):
        results |= read_json(offline)
    if not os.path.exists(final):
        if results:
            return results, None
        raise ConfigError(f"{run!r} has no eval.json: finish the run, or use python evaluate.py {run}")
    evaluation = read_json(final)
    return results | evaluation["results"], evaluation["q_weight"]

def minutes_of(run):
    """Return how long a run took, by metrics.jsonl; None without one.

    The clock of a resumed run starts anew.
    """
    path = os.path.join(run, "metrics.jsonl")
    if not os.path.exists(path):
        return None
    earlier = seconds = 0.0
    with open(path, encoding="utf-8") as f:
        for line in f:
            now = sum(value for name, value in json.loads(line).items() if name.startswith("time/"))
            if now < seconds:
                earlier += seconds
            seconds = now
    return round((earlier + seconds) / 60, 1)

def rates_of(summary):
    """Return the rates of a summary as fields of a record."""
    n = summary["episodes"]
    fields = {"n": n}
    for metric, name in (("goal", "success"), ("clean", "success_return")):
        k = round(summary[name] * n)
        fields[metric] = round(100 * (k / n), 1)
        fields[f"{metric}_k"] = k
    fields["valid"] = round(100 * summary["valid"], 1)
    return fields

def records_of(summary, shared, own):
    """Make the records of one summary: one, and one for each environment where several were played."""
    record = shared | own | rates_of(summary)
    found = [record]
    for env, part in summary.get("by_env", {}).items():
        name = f"{shared['experiment']}_tasks"
        found.append(record | rates_of(part) | {"experiment": name, "env": env})
    return found

def run_records(run, cfg):
    """Make the records of a finished run from its eval.json, config.json, meta.json and recorded data."""
    settings = read_json(os.path.join(run, "config.json"))
    meta = read_json(os.path.join(run, "meta.json"))
    results, q_weight = read_evaluations(run)
    config = [word for word in meta["argv"] if word.endswith(".py")]
    names = settings["env"].split(",")
    written = os.path.getmtime(os.path.join(run, "config.json"))
    shared = dict(
        experiment=cfg.experiment,
        env=names[0] if len(names) == 1 else f"all {len(names)} tasks",
        method=settings["actor_loss"],
        variant=cfg.variant,
        seed=settings["seed"],
        q_weight=settings["q_weight"] if q_weight is None else q_weight,
        minutes=minutes_of(run),
        date=time.strftime("%Y-%m-%d", time.gmtime(written)),
        commit=meta["commit"][:8],
        config=os.path.basename(config[-1])[:-3] if config else "",
        command=cfg.command or f"python train.py {shlex.join(meta['argv'])}",
        hardware=cfg.hardware,
        note=cfg.note,
    )
    last_phase = "online" if settings["online_updates"] else "offline"
    found = []
    for name, summary in results.items():
        early = name.startswith("offline, ")
        decoding = name.removeprefix("offline, ")
        own = dict(
            phase="offline" if early else last_phase,
            decoding=EVALUATIONS.get(decoding, decoding),
        )
        found += records_of(summary, shared, own)
    folder = settings.get("data") or os.path.join(run, "data")
    if os.path.exists(os.path.join(folder, "metadata.jsonl")):
        own = dict(method="data", variant="", phase="data", decoding="played", q_weight=None, minutes=None)
        found += records_of(Buffer(folder).stats(), shared, own)
    return found

def add(run, cfg, root=ROOT):
    """Append the records of a run to runs.jsonl; if one is there already, write nothing and say so."""
    if not os.path.exists(os.path.join(run, "config.json")):
        raise ConfigError(f"{run!r} is not a run folder: it has no config.json.")
    if not cfg.experiment:
        raise ConfigError("Name the table of the run, for instance --experiment=grid_mixed.")
    old = read_records(root)
    present = {key_of(record, IDENTITY) for record in old}
    data = {key_of(record, DATA) for record in old}
    new = []
    for record in run_records(run, cfg):
        if record["method"] == "data":
            # runs of one seed share their recorded data; other data needs a variant of its own
            if key_of(record, DATA) in data:
                continue
            if key_of(record, IDENTITY) in present:
                record["variant"] = cfg.variant
        if key_of(record, IDENTITY) in present:
            name = label(key_of(record, PLAYER), several=False)
            sentence = f"{cfg.experiment} has {name}, {record['decoding']}, seed {record['seed']} already"
            raise ConfigError(f"{sentence}: give this run a --variant, or delete the old line of {RUNS}.")
        new.append({name: value for name, value in record.items() if value not in (None, "")})
    with open(os.path.join(root, RUNS), "a", encoding="utf-8") as f:
        for record in new:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
    settings = read_json(os.path.join(run, "config.json"))
    names = dict(experiment=cfg.experiment, method=settings["actor_loss"], variant=cfg.variant)
    keep_curves(run, names | {"seed": settings["seed"]}, root)
    return new

def main(argv):
    """Add a run if asked to, then write or check all tables."""
    run = None
    if argv[:1] == ["add"]:
        if len(argv) < 2 or argv[1].startswith("-"):
            raise ConfigError("Name the run folder: python -m extras.results add out/run --experiment=NAME")
        run = argv[1]
        argv = argv[2:]
    cfg = configure(__file__, argv, files=False, quiet=True)
    if run:
        print(f"{len(add(run, cfg))} records of {run} added to {RUNS}.")
    different = update_files(check_only=cfg.check)
    for name in different:
        print(f"{name}: written")


if __name__ == "__main__":
    main(sys.argv[1:])
