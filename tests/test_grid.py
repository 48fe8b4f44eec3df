"""
The runs behind the tables of comparison: what differs between two of them, and what is made again.

    python -m pytest tests/test_grid.py
"""
import json, os, shlex, subprocess, sys
from types import SimpleNamespace

import pytest

import bench
from configurator import check_config, configure
from extras import grid
from test_model import refuses

def settings(cell):
    """Read a run's settings as train.py does."""
    return check_config(configure(bench.TRAIN, cell.flags.split(), quiet=True))

def test_methods_of_a_world_differ_in_nothing_else():
    """The baseline has the same data, windows, updates and base, and plays without the critic's help."""
    by_place = {}
    for cell in grid.cells():
        if cell.variant or cell.experiment.startswith("ablation_"):
            continue
        own = vars(settings(cell))
        assert own.pop("actor_loss") == grid.method_of(cell)
        assert own["q_weight"] == 0
        assert own["online_updates"] == 0
        by_place.setdefault((cell.experiment, cell.seed), []).append(own)
    for found in by_place.values():
        assert len(found) == len(grid.METHODS)
        assert all(own == found[0] for own in found)

def test_an_ablation_changes_one_key():
    """Each is compared with a run that differs in nothing else, of the grid or one of its own."""
    plain = {}
    for cell in grid.cells():
        if cell.variant == "" and grid.method_of(cell) == "afsft":
            plain[cell.experiment.partition("_")[2], cell.seed] = settings(cell)
    # in this order, an experiment's own run replaces the grid's
    count = 0
    for cell in grid.cells():
        if cell.experiment.startswith("ablation_") and cell.variant:
            world = cell.experiment.partition("_")[2]
            own = vars(settings(cell))
            before = vars(plain[world, cell.seed])
            changed = [f"{key}={value}" for key, value in own.items() if value != before[key]]
            assert changed == [cell.variant]
            count += 1
    assert count > 100

def test_names_and_places_belong_to_one_run():
    """Two runs with one folder, or one place in the tables, would hide each other."""
    names = set()
    places = set()
    for cell in grid.cells():
        assert settings(cell).seed == cell.seed
        place = (cell.experiment, grid.method_of(cell), cell.variant, cell.seed)
        assert cell.name not in names
        assert place not in places
        names.add(cell.name)
        places.add(place)

@pytest.fixture
def small(tmp_path, monkeypatch):
    """Three runs that a script stands in for: the second one fails. -> (settings, names in the tables)"""
    recorded = []
    made = []
    for name in ("a", "b", "c"):
        made.append(grid.Cell(name, "grid_small", name, 0, "config/numberline.py"))
    code = "import os, sys; os.makedirs(sys.argv[1]); sys.argv[2] == 'b' and sys.exit(3); "
    code += "open(sys.argv[1] + '/eval.json', 'w')"

    def start(cell, cfg, is_begun):
        return subprocess.Popen([sys.executable, "-c", code, grid.folder_of(cell, cfg), cell.name])

    monkeypatch.setattr(grid, "start", start)
    monkeypatch.setattr(grid, "add_to_tables", lambda cell, cfg: recorded.append(cell.name))
    cfg = SimpleNamespace(out=str(tmp_path / "grid"), jobs=2, hours=0.0, only="")
    return cfg, made, recorded

def test_a_run_that_fails_does_not_stop_the_others(small, capsys):
    """Its name is told, and its results are not recorded."""
    cfg, made, recorded = small
    assert grid.run(cfg, made) == ["b"]
    assert sorted(recorded) == ["a", "c"]
    assert "b ended with 3" in capsys.readouterr().out

def test_finished_runs_are_recorded_and_not_made_again(small, monkeypatch):
    """A grid that was stopped goes on where it was."""
    cfg, made, recorded = small
    os.makedirs(os.path.join(cfg.out, "a"))
    with open(os.path.join(cfg.out, "a", "eval.json"), "w") as f:
        f.write("{}")
    done = dict(experiment="grid_small", method="afsft", variant="c", seed=0)
    monkeypatch.setattr(grid.results, "read_records", lambda: [done])
    states = [grid.state_of(cell, cfg, [done]) for cell in made]
    assert states == ["finished", "missing", "recorded"]
    grid.run(cfg, [made[0], made[2]])
    assert recorded == ["a"]
    assert not os.path.exists(os.path.join(cfg.out, "c"))

def test_a_run_that_was_begun_goes_on(tmp_path, monkeypatch):
    """With a checkpoint it is resumed; without one it starts anew."""
    calls = []
    monkeypatch.setattr(grid.subprocess, "Popen", lambda argv, **kwargs: calls.append(argv))
    cfg = SimpleNamespace(out=str(tmp_path))
    [cell] = [cell for cell in grid.cells() if cell.name == "mixed_sft_0"]
    folder = tmp_path / cell.name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({}))
    assert grid.state_of(cell, cfg, []) == "begun"
    grid.start(cell, cfg, True)
    (folder / "ckpt").mkdir()
    grid.start(cell, cfg, True)
    assert [argv[-1] for argv in calls] == ["--overwrite=True", "--resume=True"]

def test_mistakes_are_told():
    """No run has the name, or there is nothing to make runs with."""
    refuses("No run has 'chess' in its name", lambda: grid.main(["--only=chess"]))
    refuses("jobs=0 would make no run", lambda: grid.main(["run", "--jobs=0"]))

def test_the_command_of_a_run_can_be_typed_in_a_shell():
    """A shell takes quotes away: --data_mix={'expert':0.3} would arrive without them."""
    for cell in grid.cells():
        typed = shlex.split(grid.command_of(cell))
        assert typed == ["python", "train.py", *cell.flags.split()]
