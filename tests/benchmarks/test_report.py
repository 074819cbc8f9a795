import io
import json
import math
import re
from urllib.parse import unquote

import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from benchmarks import figures, report
from benchmarks.bench import Results
from benchmarks.readings import READINGS, early, honest, late, lowest
from benchmarks.report import Rounds
from benchmarks.statistics import summarize
from benchmarks.suite import Suite
from server.folder import RunFolder

NAN = math.nan


@pytest.fixture
def results(write_suite, tmp_path):
    """Makes results: ``results(rows, ...)``, where a row is the rounds of each seed, as columns; None has not finished."""

    def make(rows: dict[str, list[dict | None]], changes: dict | None = None, failures: dict | None = None) -> Results:
        labels = {
            f"strategies.{row}": {"label": f"Row {row}", "strategy": {"name": "fedavg", "epochs": i + 3}} for i, row in enumerate(rows)
        }
        seeds = max(map(len, rows.values()))
        suite = Suite.load(write_suite({**labels, "seeds": seeds, **(changes or {})})).only(list(rows))
        made = Results(suite, tmp_path, failures or {})
        for cell in suite.cells:
            if cell.swept is None and (columns := rows[cell.row][cell.seed]) is not None:
                record(made, cell, columns)
        return made

    return make


def record(made: Results, cell, columns: dict[str, list[float]]) -> None:
    """Write a finished run of a cell."""
    folder = RunFolder(made.folder(cell))
    folder.write_manifest({"status": "finished"})
    rows = [dict(zip(["round", *columns], row, strict=True)) for row in zip(range(99), *columns.values(), strict=False)]
    folder.rounds.write_text("".join(json.dumps({k: None if v != v else v for k, v in row.items()}) + "\n" for row in rows))


def losses(*values: float) -> list[dict[str, list[float]]]:
    """A row whose seeds end at these test losses."""
    return [{"test_loss": [9.0, value], "test_accuracy": [0.0, 0.5], "validation_loss": [9.0, 1.0]} for value in values]


def found(made: Results) -> list[report.Block]:
    return list(report.blocks(made.suite, Rounds(made)))


def written(made: Results) -> str:
    return report.markdown(made, found(made), report.costs(made.suite, Rounds(made)), [])


def printed(made: Results) -> str:
    console = Console(file=io.StringIO(), width=160)
    report.print_tables(console, made)
    return console.file.getvalue()


def line(text: str, label: str) -> str:
    """The line of a Markdown table that begins with a label."""
    return next(line for line in text.splitlines() if line.startswith(f"| {label} |"))


@pytest.mark.parametrize(
    ("test_loss", "validation_loss", "rounds"),
    [
        ([1, 9, 5, 7], [1, 3, 9, 8], (2, 1)),  # the untrained model is never the answer
        ([1, NAN, 5, NAN, 7], [NAN] * 5, (2, None)),  # what was not measured chooses nothing
        ([1, 5, 5], [1, 2, 2], (1, 1)),  # the first of equals
        ([1], [1], (0, 0)),
        ([NAN, NAN], [NAN, NAN], (None, None)),
    ],
)
def test_selections_pick_the_rounds_they_say(test_loss, validation_loss, rounds):
    table = pd.DataFrame({"test_loss": test_loss, "validation_loss": validation_loss, "step": range(len(test_loss))})
    assert (lowest("test_loss")(table), honest(table)) == rounds
    assert READINGS["last"].of(table, "step") == len(test_loss) - 1
    chosen = READINGS["honest"].of(table, "step")
    assert chosen == rounds[1] if rounds[1] is not None else math.isnan(chosen)


def test_a_curve_may_be_read_by_its_beginning_or_its_end():
    table = pd.DataFrame({"round": range(31), "acc": [100.0, *(float(number) if number % 2 == 0 else NAN for number in range(1, 31))]})
    assert early(table, "acc") == 6.0, "rounds 2, 4, 6, 8 and 10"
    assert late(table, "acc") == 16.0, "rounds 2 to 30, the untrained model is no evaluation of the training"
    assert math.isnan(early(table[:2], "acc"))


def test_a_suite_chooses_its_readings(results):
    text = written(results({"a": losses(1.0, 2.0)}, {"readings": ["late", "last"], "rows_are": "method"}))
    assert "| method | median of last 20 | last round |" in text and "lowest test loss" not in text
    assert "*median of last 20* evaluations is the protocol of DoubleMatch's tables; *last round* chooses nothing." in text


def test_a_table_reports_its_metric_at_the_selected_rounds(results):
    run = {"test_loss": [9, 2, 1, 3], "validation_loss": [9, 0, 5, 5], "test_auroc": [0.1, 0.2, 0.3, 0.4]}
    made = results({"a": [run]}, {"tables": [{"title": "Areas", "metric": "test_auroc", "scale": 10.0, "better": "higher"}]})
    (block,) = found(made)
    assert {selection: summary.mean for selection, summary in block.rows["a"].items()} == {"paper": 3, "honest": 2, "last": 4}


def test_rows_are_compared_over_their_paired_seeds(results):
    rows = {"a": [1.0, 5.0, 9.0], "b": [1.2, 5.3, 9.1], "c": [4.0, 8.0, 12.1]}
    (block,) = found(results({row: losses(*values) for row, values in rows.items()}))
    expected = summarize({row: tuple(values) for row, values in rows.items()})
    assert {row: summaries["last"] for row, summaries in block.rows.items()} == expected


def test_the_best_is_bold_and_ties_are_marked(results):
    rows = {"a": losses(1.0, 2.0, 3.0), "b": losses(1.1, 1.9, 3.2), "c": losses(5.0, 6.1, 7.0)}
    text = written(results(rows))
    assert line(text, "Row a").count("**") == 6 and "≈" not in line(text, "Row a")
    assert line(text, "Row b").count("≈ ") == 3 and "**" not in line(text, "Row b")
    assert "≈" not in line(text, "Row c") and "**" not in line(text, "Row c")
    assert "| 6.033 ± 1.002 [5.000, 7.000] |" in line(text, "Row c")


def test_the_best_is_the_highest_where_higher_is_better(results):
    tables = [{"title": "T", "metric": "test_loss", "better": "higher"}]
    text = written(results({"a": losses(1.0, 2.0, 3.0), "c": losses(5.0, 6.1, 7.0)}, {"tables": tables}))
    assert "**" in line(text, "Row c") and "**" not in line(text, "Row a")


def test_published_numbers_stand_beside_ours(results):
    made = results(
        {"a": losses(1.0, 2.0), "b": losses(3.0, 4.0)}, {"experiments.digits.paper": {"test_loss": {"a": [0.566, 0.009]}, "test_auroc": {}}}
    )
    text = written(made)
    assert "| strategy | published | lowest test loss | silo validation | last round |" in text
    assert line(text, "Row a").startswith("| Row a | 0.566 ± 0.009 | **1.500 ± 0.707")
    assert line(text, "Row b").startswith("| Row b | – |")
    assert "0.566 ± 0.009" in printed(made)


def test_without_published_numbers_there_is_no_such_column(results):
    assert "| strategy | lowest test loss |" in written(results({"a": losses(1.0)}))


def test_runs_that_are_missing_are_named(results):
    made = results({"a": losses(1.0, 2.0), "b": [*losses(3.0), None], "c": [None, None]})
    assert list(found(made)[0].rows) == ["a"]
    sentence = "Left out: Row b (1 run missing), Row c (2 runs missing)."
    assert sentence in written(made) and sentence in printed(made)


def test_a_row_with_a_run_that_came_to_no_number_is_named(results):
    diverged = {"test_loss": [9.0, NAN], "test_accuracy": [0.1, 0.1], "validation_loss": [9.0, NAN]}
    made = results({"a": losses(1.0, 2.0), "b": [*losses(3.0), diverged]})
    assert list(found(made)[0].rows) == ["a"]
    assert "Left out: Row b (not a number in some run)." in written(made)


def test_a_row_that_diverged_late_keeps_what_it_reached(results):
    late = {"test_loss": [9.0, 2.0, NAN], "validation_loss": [9.0, 2.0, NAN]}
    text = written(results({"a": losses(1.0, 1.0), "b": [late, late]}))
    cells = [cell.strip() for cell in line(text, "Row b").split("|")[2:-1]]
    assert cells[0].startswith("2.000") and cells[2] == "–"


def test_a_metric_that_was_null_in_every_round_breaks_nothing(results):
    never = {"test_loss": [NAN, NAN], "test_accuracy": [NAN, NAN], "validation_loss": [NAN, NAN], "train_loss": [1.0, 1.0]}
    target = {"metric": "test_loss", "value": 1.0}
    text = written(results({"a": losses(1.0), "b": [never]}, {"experiments.digits.target": target}))
    assert "Left out: Row b (not a number in some run)." in text
    assert line(text[text.index("## Cost") :], "Row b") == "| Row b | 0 of 1 | – | – |"


def test_a_metric_that_some_rows_lack_breaks_nothing(results):
    run = {"test_loss": [9.0, 1.0], "test_auroc": [0.5, 0.7]}
    tables = [{"title": "Areas", "metric": "test_auroc", "better": "higher"}, {"title": "Nowhere", "metric": "test_nothing"}]
    target = {"metric": "test_auroc", "value": 0.6}
    text = written(results({"a": [run], "b": losses(1.0)}, {"tables": tables, "experiments.digits.target": target}))
    assert "**0.700" in line(text, "Row a")
    assert "Left out: Row b" in text
    assert "Nowhere" not in text
    assert "| Row a | 1 of 1 | 1.0 |" in text and "| Row b | 0 of 1 | – |" in text


def test_one_seed_is_no_interval_and_no_difference(results):
    made = results({"a": losses(1.0), "b": losses(100.0)})
    text = written(made)
    assert line(text, "Row a") == "| Row a | **1.000 ± 0.000** | **1.000 ± 0.000** | **1.000 ± 0.000** |"
    assert line(text, "Row b") == "| Row b | ≈ 100.0 ± 0.0 | ≈ 100.0 ± 0.0 | ≈ 100.0 ± 0.0 |"
    assert "1 paired seed:" in text and "1 paired seed;" in printed(made)


def test_a_bench_without_a_finished_run_reports_why(results):
    made = results({"a": [None]}, failures={"small-a-0123": "the dog ate it"})
    assert [path.name for path in report.write(made)] == ["report.md", "report.csv", "report.tex"]
    text = written(made)
    assert "- `small-a-0123`: the dog ate it" in text
    assert "|" not in text.split("## Not computed")[1]
    assert "the dog ate it" in printed(made)


def test_the_terminal_prints_brackets_as_they_are(results):
    made = results({"a": losses(1.0)}, {"strategies.a.label": "FedAvg [ours]", "tables": [{"title": "[1/2]", "metric": "test_loss"}]})
    made.failures["cell"] = "[strategy] Krum: [/] is no rule"
    shown = printed(made)
    assert all(text in shown for text in ("FedAvg [ours]", "[1/2]: Digits", "cell: [strategy] Krum: [/] is no rule"))


def test_the_terminal_shows_what_the_markdown_does(results):
    made = results({"a": losses(1.0, 2.0, 3.0), "b": losses(1.1, 1.9, 3.2)})
    cells = [cell.strip(" *") for cell in line(written(made), "Row b").split("|")[2:-1]]
    row = next(text for text in printed(made).splitlines() if "Row b" in text)
    assert [cell.split(" [")[0] for cell in cells] == [cell.strip() for cell in row.split("│")[2:-1]]


def test_the_csv_reads_back_to_the_same_numbers(results):
    made = results(
        {"a": losses(1.0, 2.0, 3.0), "b": losses(1.25, 1.9, 3.2)}, {"experiments.digits.paper": {"test_loss": {"a": [0.5, 0.25]}}}
    )
    table = pd.read_csv(io.StringIO(report.csv(made.suite, found(made)))).set_index(["strategy", "selection"])
    (block,) = found(made)
    assert set(table.index) == {(row, selection) for row in "ab" for selection in ("paper", "honest", "last")}
    for (row, selection), values in table.iterrows():
        summary = block.rows[row][selection]
        assert tuple(values[["mean", "std", "ci_low", "ci_high", "p_holm"]]) == (
            summary.mean,
            summary.std,
            summary.low,
            summary.high,
            summary.p,
        )
        assert tuple(values[["seed0", "seed1", "seed2"]]) == summary.values
        assert (values["best"], values["tied_with_best"]) == (summary.best, summary.tied)
    assert table.loc["a", "published_mean"].tolist() == [0.5] * 3
    assert table.loc["b", "published_std"].isna().all()


def test_the_latex_tables_are_balanced_and_escaped(results):
    made = results(
        {"a": losses(1.0, 2.0), "b": losses(1.1, 1.9)},
        {"strategies.a.label": "R&D_1 50%", "experiments.digits.paper": {"test_loss": {"a": [0.5, 0.1]}}},
    )
    text = report.latex(made.suite, found(made))
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    assert text.count("{") == text.count("}")
    (columns,) = re.findall(r"\\begin\{tabular\}\{(\w+)\}", text)
    assert columns == "lrrrr"
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert [len(re.findall(r"(?<!\\)&", line)) for line in body] == [len(columns) - 1] * 3
    assert body[1].startswith(r"R\&D\_1 50\% & 0.500 $\pm$ 0.100 & \textbf{1.500 $\pm$ 0.707} &")
    assert body[2].startswith(r"Row b & -- & $\approx$ 1.500 $\pm$ 0.566")
    assert text.isascii()


def test_the_markdown_links_to_pictures_that_exist(results):
    made = results({"a": losses(1.0, 2.0)})
    paths = report.write(made)
    assert (made.path / "report.csv").read_text() == report.csv(made.suite, found(made))
    assert (made.path / "report.tex").read_text() == report.latex(made.suite, found(made))
    links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", (made.path / "report.md").read_text())
    assert [made.path / unquote(link) for link in links] == [path for path in paths if path.suffix == ".png"] != []
    for path in paths[3:]:
        with Image.open(path) as image:
            assert image.format == "PNG"
    assert [path.name for path in paths[:3]] == ["report.md", "report.csv", "report.tex"] and all(path.exists() for path in paths)


def test_markdown_links_survive_an_experiment_with_a_blank_in_its_name(results, write_suite):
    experiment = Suite.load(write_suite()).experiments["digits"].experiment
    changes = {"experiments": {"my digits": {"experiment": experiment, "title": "Mine"}}}
    made = results({"a": losses(1.0)}, changes)
    report.write(made)
    assert "](figures/my%20digits-curves.png)" in (made.path / "report.md").read_text()


def test_costs_are_counted_until_the_target_is_reached(results):
    def run(test_loss: list[float]) -> dict[str, list[float]]:
        rounds = len(test_loss)
        return {"test_loss": test_loss, "bytes_up": [0, *[2e6] * (rounds - 1)], "bytes_down": [0, *[1e6] * (rounds - 1)]}

    rows = {"a": [run([9, 5, 3, 1, 7]), run([9, 8, 7, 6, 4])], "b": [run([9, 8, NAN, 4, 1]), run([9, 8, 8, 8, 8])], "c": [run([9, 9])] * 2}
    made = results(rows, {"experiments.digits.target": {"metric": "test_loss", "value": 4.0}})
    costs = report.costs(made.suite, Rounds(made))["digits"]
    # a reaches 4 in its rounds 2 and 4, b in round 3 with its first seed only; each round moves 3 MB.
    assert [(cost.row, cost.reached, cost.seeds, cost.rounds, cost.megabytes) for cost in costs[:2]] == [
        ("a", 2, 2, 3, 9),
        ("b", 1, 2, 3, 9),
    ]
    assert (costs[2].reached, math.isnan(costs[2].rounds), math.isnan(costs[2].megabytes)) == (0, True, True)
    text = written(made)
    assert "Until test loss is at most 4;" in text
    assert [line(text[text.index("## Cost") :], f"Row {row}").split("|", 2)[2] for row in "abc"] == [
        " 2 of 2 | 3.0 | 9.0 |",
        " 1 of 2 | 3.0 | 9.0 |",
        " 0 of 2 | – | – |",
    ]


def test_a_target_of_an_accuracy_is_reached_from_below(results):
    run = {"test_loss": [9, 1, 1], "test_accuracy": [0.1, 0.7, 0.9], "bytes_up": [0, 1e6, 1e6], "bytes_down": [0, 0, 0]}
    made = results({"a": [run]}, {"experiments.digits.target": {"metric": "test_accuracy", "value": 0.7}})
    (cost,) = report.costs(made.suite, Rounds(made))["digits"]
    assert (cost.rounds, cost.megabytes) == (1, 1)
    assert "Until test accuracy is at least 0.7;" in written(made)


def test_environments_are_drawn_in_order_at_the_honest_round(results, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "environments", lambda accuracies, title: drawn.update(accuracies) or figures.curves(pd.DataFrame()))
    numbered = {f"validation_environment{e}_accuracy": [0.0, e / 100, 0.5] for e in (10, 2, 0)}
    run = {"test_loss": [9, 5, 1], "test_accuracy": [0, 0, 0], "validation_loss": [9, 1, 5], **numbered}
    lacking = {name: values for name, values in run.items() if "environment10" not in name}
    report.write(results({"a": [run, lacking]}))
    assert list(drawn["Row a"].columns) == ["0", "2", "10"]
    assert drawn["Row a"].iloc[0].tolist() == [0, 0.02, 0.1]
    assert drawn["Row a"].iloc[1].tolist() == [0, 0.02, pytest.approx(NAN, nan_ok=True)]


def test_one_environment_is_no_picture(results):
    run = {"test_loss": [9, 5], "test_accuracy": [0, 0], "validation_environment0_accuracy": [0.1, 0.2]}
    assert [path.name for path in report.write(results({"a": [run]}))[3:]] == ["digits-curves.png"]


def test_a_sweep_is_drawn_from_the_values_that_have_every_seed(results, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "sweep", lambda lines, asked: drawn.update(lines) or figures.curves(pd.DataFrame()))
    sweep = {"title": "Epochs", "column": "digits", "rows": ["a"], "key": "strategy.epochs", "values": [7, 8, 9]}
    made = results({"a": losses(1.0, 2.0)}, {"sweeps": [sweep]})
    for cell in made.suite.cells:
        if cell.swept and (cell.seed, cell.swept[1]) != (1, 8):
            value = cell.swept[1] + cell.seed
            record(made, cell, {"test_loss": [99.0, value, value + 1], "test_accuracy": [0, 0, 0]})
    assert report.write(made)[-1].name == "sweep1-epochs.png"
    assert {label: table.to_dict("list") for label, table in drawn.items()} == {"Row a": {7: [7, 8], 9: [9, 10]}}


def test_a_suite_without_sweeps_environments_or_targets_draws_its_curves_only(results):
    made = results({"a": losses(1.0)})
    assert [path.name for path in report.write(made)[3:]] == ["digits-curves.png"]
    assert "## Cost" not in written(made)


def test_a_run_that_has_not_finished_is_not_read(results):
    made = results({"a": losses(1.0)})
    (cell,) = made.suite.cells
    RunFolder(made.folder(cell)).write_manifest({"status": "running"})
    assert Rounds(made)(cell) is None
