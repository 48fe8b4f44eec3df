"""
Test that every result exists once: the tables in README.md and docs/ are what docs/results/ says.

    python -m pytest tests/test_results.py
"""
import ast, glob, json, os, re, shutil, sys
from types import SimpleNamespace

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import ConfigError
from evaluate import wilson
from extras import curves, results

STORE = results.read_store(ROOT)
RECORDS = STORE[0]
LITERAL = STORE[2]
CONFIGS = sorted(glob.glob(os.path.join(ROOT, "config", "*.py")))
PERCENTAGE = re.compile(r"(\d+(?:\.\d+)?) ?%")

def read(name, root=ROOT):
    """Read a text file of the repository."""
    with open(os.path.join(root, name), encoding="utf-8") as f:
        return f.read()

def cells_of(records):
    """Yield (metric, records of one cell of a table): one player, one decoding, all seeds."""
    names = ("experiment", *results.PLAYER, "decoding")
    keys = dict.fromkeys(results.key_of(record, names) for record in records)
    for experiment, *player, decoding in keys:
        wanted = dict(zip(results.PLAYER, player), experiment=experiment, decoding=decoding)
        for metric in results.METRICS:
            found = results.select(records, metric, **wanted)
            if found:
                yield metric, found

def rates_in(records):
    """Return all rates of the records, and all pooled rates."""
    rates = []
    for metric, found in cells_of(records):
        rates.append(results.pooled(found, metric)[0])
        rates += [results.percentage(record, metric) for record in found]
    return rates

def unknown_percentages(text, records):
    """Return the percentages in a text that are no rate of the records, rounded as the text rounds."""
    rates = rates_in(records)
    unknown = []
    for number in PERCENTAGE.findall(text):
        decimals = len(number.partition(".")[2])
        if number not in {f"{rate:.{decimals}f}" for rate in rates}:
            unknown.append(number)
    return unknown

@pytest.fixture
def copy(tmp_path):
    """A small repository: the records and one page."""
    shutil.copytree(os.path.join(ROOT, "docs", "results"), tmp_path / "docs" / "results")
    (tmp_path / "assets").mkdir()
    shutil.copy(os.path.join(ROOT, curves.PICTURE), tmp_path / "assets")
    (tmp_path / "README.md").write_text("# Hello\n")
    page = "<!-- results: grid_mixed -->\n<!-- end of results -->\n"
    (tmp_path / "docs" / "page.md").write_text(f"before\n{page}after\n")
    return tmp_path


# ------------------------------------------------------------------------------------------------ tables
def test_the_tables_are_those_of_the_records():
    """README and docs hold what `python -m extras.results` would write."""
    for path in results.targets(ROOT):
        text = read(path)
        assert results.generate(path, text, STORE) == text, "run python -m extras.results"

def test_readme_and_results_have_tables():
    assert "<!-- results: headline -->" in read("README.md")
    assert "<!-- results: grid_mixed -->" in read("docs/results.md")

def test_no_record_is_left_out():
    """Every experiment and every measured table is shown somewhere."""
    names = {record["experiment"] for record in RECORDS} | set(LITERAL)
    shown = set()
    for path in results.targets(ROOT):
        shown |= {name for _, name, _ in results.BLOCK.findall(read(path))}
    assert names <= shown

def test_results_page_shows_every_rate():
    """The rate of each record, and each pooled rate with its interval, can be found on the page."""
    page = read("docs/results.md")
    for metric, found in cells_of(RECORDS):
        assert results.cell(found, metric) in page
        for record in found:
            assert f"{results.percentage(record, metric):.1f}" in results.cell(found, metric)

def test_prose_of_the_results_page_has_no_other_rate():
    prose = results.BLOCK.sub("", read("docs/results.md"))
    assert unknown_percentages(prose.replace("95 % interval", ""), RECORDS) == []

@pytest.mark.parametrize("path", CONFIGS, ids=[os.path.basename(path) for path in CONFIGS])
def test_rates_in_config_headers_are_records(path):
    name = os.path.basename(path)[:-3]
    header = ast.get_docstring(ast.parse(read(path))) or ""
    own = [record for record in RECORDS if record.get("config") == name]
    assert unknown_percentages(header, own) == []


# ----------------------------------------------------------------------------------------------- records
def test_records_are_consistent():
    """A record exists once, is named by known words, and its rates are those of its counts."""
    keys = [results.key_of(record, results.IDENTITY) for record in RECORDS]
    assert len(set(keys)) == len(keys)
    decodings = {*results.DECODINGS, "played"}
    for record in RECORDS:
        assert record["method"] in results.METHODS
        assert record["phase"] in results.PHASES
        assert record["decoding"] in decodings
        assert record["source"] if "commit" not in record else record["commit"]
        rates = [metric for metric in results.METRICS if metric in record]
        assert rates
        for metric in rates:
            assert 0 <= record[metric] <= 100
            if f"{metric}_k" in record:
                assert results.percentage(record, metric) == pytest.approx(record[metric], abs=0.0501)

def test_pooled_rates_count_episodes():
    """Seeds of 300, 200 and 200 episodes are pooled by episodes, not by rates."""
    records = results.select(
        RECORDS,
        "goal",
        experiment="babyai_gotolocal",
        variant="500 updates",
        decoding="sampled",
    )
    assert [record["n"] for record in records] == [300, 200, 200]
    k = sum(record["goal_k"] for record in records)
    rate, low, high = results.pooled(records, "goal")
    assert rate == pytest.approx(100 * k / 700)
    assert (low, high) == pytest.approx([100 * bound for bound in wilson(k, 700)])
    assert results.rate(rate, low, high) == "87.1 [84.5, 89.4]"

def test_wilson_is_the_published_interval():
    """Compare with the formula's known values: 1 of 10, 0 of 10, and symmetry."""
    assert wilson(1, 10) == pytest.approx((0.0179, 0.4042), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    low, high = wilson(3, 40)
    assert wilson(37, 40) == pytest.approx((1 - high, 1 - low))

def test_headline_marks_what_is_not_like_for_like():
    """A cell of one seed has a mark, a cell that was not measured is a dash."""
    rows = [row.split(" | ") for row in results.render_text("headline", STORE).splitlines()]
    cells = {row[0].strip("| "): row[1:] for row in rows if len(row) == 5}
    for row in STORE[1]["headline"]["rows"]:
        wanted = dict(experiment=row["experiment"], method="sft", variant=row["sft"][0], decoding="sampled")
        found = results.select(RECORDS, row["metric"], **wanted)
        sft = cells[row["label"]][1]
        assert (sft == "–") == (not found)
        assert ("¹" in sft) == (len(found) == 1)

def test_seeds_of_a_command_share_a_line_with_all_their_commits():
    """Ten lines about five commands hid which commands there are."""
    shared = dict(method="sft", phase="offline", decoding="greedy", hardware="a CPU", n=10, goal=1.0)
    runs = ((0, "2026-11-29", "aaa", 4.0), (1, "2026-11-30", "bbb", 5.0), (2, "2026-11-30", "ccc", 4.0))
    records = []
    for seed, date, commit, minutes in runs:
        command = f"python train.py --seed={seed} config/x.py"
        records.append(dict(shared, seed=seed, command=command, date=date, commit=commit, minutes=minutes))
    # the order of the records does not count
    header, *lines = results.origins(records[::-1])
    measured = "a CPU, 2026-11-29 (aaa), 2026-11-30 (bbb, ccc)"
    assert lines == [["SFT", "`python train.py config/x.py`", measured, "4.0 / 5.0 / 4.0", ""]]
    assert len(header) == len(lines[0])

def test_losses_are_compared_by_their_intervals():
    """A loss is bold where its interval lies above all others; one of one seed has a mark."""

    def run(method, seed, goal, phase="offline"):
        return dict(
            experiment="x",
            method=method,
            phase=phase,
            decoding="sampled",
            seed=seed,
            n=100,
            goal=goal,
            goal_k=goal,
        )

    spec = dict(
        columns=["", "", "sft", "fbc", "awr"],
        methods=["sft", "fbc", "awr"],
        rows=[
            dict(label="x", experiment="x", metric="goal"),
            dict(label="none", experiment="none", metric="goal"),
        ],
        note="Note.",
    )
    records = [
        run("data", 0, 10, "data"),
        run("sft", 0, 50),
        run("fbc", 0, 90),
        run("fbc", 1, 94),
    ]
    *_, row, empty, note = results.losses_block(records, spec).splitlines()
    assert row == "| x | 10.0 | 50.0 [40.4, 59.6] ¹ | **92.0 [87.4, 95.0]** ² | – |"
    assert (empty, note) == ("", "Note.")
    close = [*records, run("awr", 0, 88)]
    assert "**" not in results.losses_block(close, spec)


# -------------------------------------------------------------------------------------------------- curves
def test_a_curve_is_kept_as_a_few_means():
    """65 lines become 22 points; what a line does not have, or what is not finite, does not count."""
    rows = [{"step": 10 * (i + 1), "nll": float(i), "lr": 1.0} for i in range(65)]
    rows[1]["nll"] = float("nan")
    del rows[2]["nll"]
    kept = curves.thinned(rows)
    assert set(kept) == {"step", "nll"}
    assert len(kept["step"]) == len(kept["nll"]) == 22 <= curves.POINTS
    assert kept["step"][0] == 30 and kept["step"][-1] == 650
    assert kept["nll"][:2] == [0.0, 4.0]

def test_ranges_are_those_of_the_last_points():
    """The table has the lowest and the highest AFSFT run; baselines, ablations, online play do not count."""
    spec = dict(
        columns=[
            dict(label="x", experiments=["x"]),
            dict(label="none", experiments=["none"]),
        ],
        metrics=["nll", "pass_action"],
    )
    kept = {
        ("x", "afsft", "", 0, "offline"): dict(
            nll=[9, 9, 1, 1, 1],
            pass_action=[0.5],
        ),
        ("x", "afsft", "", 1, "offline"): dict(
            nll=[9, 0.0123, 0.0123, 0.0123],
            pass_action=[0.75, None],
        ),
        ("x", "afsft", "", 1, "online"): dict(nll=[7, 7, 7], pass_action=[1, 1, 1]),
        ("x", "sft", "", 0, "offline"): dict(nll=[8, 8, 8]),
        ("x", "afsft", "gamma=0.9", 0, "offline"): dict(nll=[8, 8, 8]),
    }
    assert curves.ranges_rows(spec, kept) == [
        ["", "x, 2 runs"],
        ["`nll`", "0.012 to 1.00"],
        ["`pass_action`", "50 to 75 %"],
    ]

def test_every_run_of_the_grid_has_its_curves():
    """What docs/method.md calls healthy is all of these runs, not a choice of them."""
    _, kept = curves.read_curves(ROOT)
    for record in RECORDS:
        # the tasks of a run have one curve together
        is_run = record["experiment"].startswith("grid_") and not record["experiment"].endswith("_tasks")
        if is_run and record["method"] != "data":
            assert curves.key_of_curve(record) in kept

def test_add_keeps_the_curves_of_a_run_once(copy, tmp_path):
    run = finished_run(tmp_path / "run")
    before = len(curves.read_curves(copy)[1])
    results.add(run, flags(), copy)
    _, kept = curves.read_curves(copy)
    assert len(kept) == before + 1
    assert kept["grid_mixed", "afsft", "", 7, "online"] == {"step": [400], "nll": [0.5]}
    # a run that is made again has new curves
    text = read("metrics.jsonl", run).replace("0.5", "0.25")
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    curves.keep_curves(run, dict(experiment="grid_mixed", method="afsft", variant="", seed=7), copy)
    _, repeated = curves.read_curves(copy)
    assert repeated["grid_mixed", "afsft", "", 7, "online"]["nll"] == [0.25]
    assert len(repeated) == len(kept)

def test_a_picture_without_its_curves_is_one_sentence():
    key = ["x", "afsft", "", 0, "offline"]
    spec = dict(charts=[dict(title="", lines=[["healthy", key, "nll"]])])
    for kept in ({}, {tuple(key): dict(step=[1, 2])}):
        with pytest.raises(ConfigError, match="wants nll of"):
            curves.failures_svg(spec, kept)
    assert "healthy" in curves.failures_svg(spec, {tuple(key): dict(step=[1, 2], nll=[0.5, None])})


# --------------------------------------------------------------------------------------------------- check
def test_check_names_the_file_that_differs(copy):
    with pytest.raises(ConfigError, match="docs/page.md: the tables differ"):
        results.update_files(copy, check_only=True)
    assert results.update_files(copy) == ["docs/page.md"]
    assert results.update_files(copy, check_only=True) == []
    text = read("docs/page.md", copy)
    assert text.startswith("before\n") and text.endswith("after\n")
    (copy / "docs" / "page.md").write_text(text.replace("100.0", "99.2"))
    with pytest.raises(ConfigError, match="python -m extras.results") as error:
        results.update_files(copy, check_only=True)
    assert str(error.value).count("\n") == 0

def test_a_picture_that_lacks_a_run_does_not_stop_the_tables(copy, capsys):
    """The run that it wants may be the next one of a grid; only a check fails."""
    results.update_files(copy)
    (copy / "docs" / "results" / "curves.jsonl").write_text("")
    before = read(curves.PICTURE, copy)
    assert results.update_files(copy) == []
    assert "stays as it is" in capsys.readouterr().out
    assert read(curves.PICTURE, copy) == before
    with pytest.raises(ConfigError, match="does not have"):
        results.update_files(copy, check_only=True)

def test_a_table_without_end_or_records_is_one_sentence(copy):
    page = copy / "docs" / "page.md"
    page.write_text("<!-- results: grid_mixed -->\n")
    with pytest.raises(ConfigError, match="has no end"):
        results.update_files(copy)
    page.write_text("<!-- results: grid_mixd -->\n<!-- end of results -->\n")
    with pytest.raises(ConfigError, match="nearest: grid_mixed"):
        results.update_files(copy)


# ----------------------------------------------------------------------------------------------------- add
def summary(n, k, valid):
    """Make a summary of evaluate.py: n episodes, k of them successful and clean."""
    return dict(
        episodes=n,
        success=k / n,
        success_return=k / n,
        success_95=list(wilson(k, n)),
        success_return_95=list(wilson(k, n)),
        valid=valid,
    )

def finished_run(folder, seed=7):
    """Write the files of a finished run with two phases that `add` reads."""
    folder.mkdir()
    argv = ["config/numberline.py", f"--seed={seed}", "--lr=1e-3"]
    settings = dict(
        env="NumberLine",
        actor_loss="afsft",
        seed=seed,
        q_weight=0.0,
        data="",
        online_updates=100,
    )
    offline = {"offline, greedy": summary(30, 29, 1.0), "offline, sampled, T=1": summary(30, 20, 0.9)}
    final = {"greedy": summary(30, 30, 1.0), "sampled, T=1": summary(30, 25, 0.95)}
    evaluation = dict(seed=seed, q_weight=0.0, argv=argv, results=offline | final)
    files = {
        "config.json": settings,
        "meta.json": dict(argv=argv, commit="0123456789abcdef"),
        "eval_offline.json": offline,
        "eval.json": evaluation,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    metrics = {"step": 400, "phase": "online", "nll": 0.5}
    metrics |= {"time/rollout": 30.0, "time/update": 60.0, "time/eval": 30.0}
    (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    return str(folder)

def flags(**given):
    """Make the settings of `add`."""
    cfg = dict(experiment="grid_mixed", variant="", hardware="a box", note="", command="")
    return SimpleNamespace(**cfg | given)

def test_add_appends_the_rows_of_a_run(copy, tmp_path):
    run = finished_run(tmp_path / "run")
    new = results.add(run, flags(), copy)
    records = results.read_records(copy)
    assert records == RECORDS + new
    rows = [(r["phase"], r["decoding"], r["goal"], r["goal_k"], r["n"], r["valid"]) for r in new]
    assert rows == [
        ("offline", "greedy", 96.7, 29, 30, 100.0),
        ("offline", "sampled", 66.7, 20, 30, 90.0),
        ("online", "greedy", 100.0, 30, 30, 100.0),
        ("online", "sampled", 83.3, 25, 30, 95.0),
    ]
    record = new[0]
    assert record["seed"] == 7
    assert record["minutes"] == 2.0
    assert record["commit"] == "01234567"
    assert record["config"] == "numberline"
    assert record["command"] == "python train.py config/numberline.py --seed=7 --lr=1e-3"
    results.update_files(copy)
    assert "`python train.py config/numberline.py --lr=1e-3` | a box" in read("docs/page.md", copy)

def test_the_command_of_a_run_that_was_stopped_is_given(copy, tmp_path):
    """Of such a run meta.json has the last command only, with its --resume=True."""
    run = finished_run(tmp_path / "run")
    whole = "python train.py config/numberline.py"
    new = results.add(run, flags(command=whole), copy)
    assert {record["command"] for record in new} == {whole}

def test_the_minutes_of_a_resumed_run_are_those_of_all_its_parts(tmp_path):
    """The clock in metrics.jsonl starts anew with each start: a run of 11 minutes was recorded with 1.2."""
    run = finished_run(tmp_path / "run")
    rows = ""
    for step, seconds in ((10, 60.0), (20, 240.0), (30, 30.0), (40, 120.0)):
        rows += json.dumps({"step": step, "time/update": seconds}) + "\n"
    (tmp_path / "run" / "metrics.jsonl").write_text(rows)
    assert results.minutes_of(run) == 6.0

def test_add_refuses_a_run_twice(copy, tmp_path):
    run = finished_run(tmp_path / "run")
    results.add(run, flags(), copy)
    before = results.read_records(copy)
    with pytest.raises(ConfigError, match="grid_mixed has AFSFT, offline, greedy, seed 7 already"):
        results.add(run, flags(), copy)
    assert results.read_records(copy) == before
    assert len(results.add(run, flags(variant="lr 1e-3"), copy)) == 4

def test_recorded_data_is_added_once_for_a_seed(copy, tmp_path, monkeypatch):
    """Runs on the same data share its record; other data is refused without a variant."""
    run = finished_run(tmp_path / "run")
    (tmp_path / "run" / "data").mkdir()
    (tmp_path / "run" / "data" / "metadata.jsonl").write_text("")
    stats = summary(600, 150, 0.8)
    monkeypatch.setattr(results, "Buffer", lambda folder: SimpleNamespace(stats=lambda: stats))
    new = results.add(run, flags(), copy)
    assert [record["method"] for record in new] == 4 * ["afsft"] + ["data"]
    new = results.add(run, flags(variant="again"), copy)
    assert [record["method"] for record in new] == 4 * ["afsft"]
    stats["success"] = 0.5
    new = results.add(run, flags(variant="other data"), copy)
    assert [record["variant"] for record in new] == 5 * ["other data"]
    with pytest.raises(ConfigError, match="already"):
        results.add(run, flags(), copy)

def test_add_keeps_the_tasks_of_a_run_apart(copy, tmp_path):
    run = finished_run(tmp_path / "run")
    settings = json.loads(read("config.json", run)) | dict(env="NumberLine,EZPoints", online_updates=0)
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    parts = dict(NumberLine=summary(15, 15, 1.0), EZPoints=summary(15, 5, 1.0))
    evaluation = dict(q_weight=0.0, results={"greedy": summary(30, 20, 1.0) | dict(by_env=parts)})
    (tmp_path / "run" / "eval.json").write_text(json.dumps(evaluation))
    os.remove(os.path.join(run, "eval_offline.json"))
    new = results.add(run, flags(experiment="both"), copy)
    rows = [(record["experiment"], record["env"], record["phase"], record["goal"]) for record in new]
    assert rows == [
        ("both", "all 2 tasks", "offline", 66.7),
        ("both_tasks", "NumberLine", "offline", 100.0),
        ("both_tasks", "EZPoints", "offline", 33.3),
    ]

def test_add_says_what_is_missing(copy, tmp_path):
    with pytest.raises(ConfigError, match="not a run folder"):
        results.add(str(tmp_path / "nothing"), flags(), copy)
    run = finished_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="--experiment="):
        results.add(run, flags(experiment=""), copy)
    os.remove(os.path.join(run, "eval.json"))
    os.remove(os.path.join(run, "eval_offline.json"))
    with pytest.raises(ConfigError, match="has no eval.json"):
        results.add(run, flags(), copy)
    with pytest.raises(ConfigError, match="Name the run folder"):
        results.main(["add", "--experiment=x"])
