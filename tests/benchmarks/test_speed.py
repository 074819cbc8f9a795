"""The instrument of speed: its methods compute the same, its meter and its report say what is. Nothing here is timed."""

import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.speed import __main__ as command
from benchmarks.speed import aggregation, learners, measure, plain_albef, privacy, report, scaling, silos, steps
from benchmarks.speed.child import Turns, decoded, encoded
from benchmarks.speed.jobs import CONVOLUTIONS, CROSS_SILO, JOBS, MANY_SMALL
from benchmarks.speed.measure import Whole, difference
from benchmarks.speed.memory import MARK, Family, Meter
from benchmarks.speed.methods import FLOWER, FLOWER_ONE_THREAD, IN_PROCESS, METHODS, PLAIN, PLAIN_TWO, Method
from benchmarks.speed.plain import several_processes
from benchmarks.speed.results import Point, Ratio, Results, Target, machine, targets
from fedvision.albef.bert import TextSize, WordModel, initialized
from fedvision.assembly import Assembly
from fedvision.data import Spec
from fedvision.errors import EngineError
from fedvision.experiment import Experiment
from fedvision.learners.classifier import Classifier
from fedvision.seeds import generator

LOCAL = replace(MANY_SMALL, clients=6, cohort=3, examples=7, batch=3, shape=(1, 3, 3))
CENTRAL = replace(CROSS_SILO, clients=3, cohort=3, examples=5, shape=(1, 3, 3))
TINY_JOBS = pytest.mark.parametrize("job", [LOCAL, CENTRAL], ids=["local steps", "gradients"])


def computed(job, method, rounds=3):
    told = []
    weights = METHODS[method].run(job, rounds, told.append)
    assert told == list(range(rounds + 1))
    return weights


# ---- jobs and methods -----------------------------------------------------------------------------------------------


@TINY_JOBS
def test_our_engine_computes_what_the_plain_loop_computes(job):
    assert difference(computed(job, IN_PROCESS), computed(job, PLAIN)) < 1e-5


def test_two_processes_compute_what_one_computes():
    assert difference(several_processes(LOCAL, 2, lambda number: None, workers=2), computed(LOCAL, PLAIN, 2)) < 1e-5


@pytest.mark.slow
@pytest.mark.ray
@TINY_JOBS
def test_flower_computes_what_the_plain_loop_computes(job):
    assert measure.wholes(job, [FLOWER], 2, print)[FLOWER].difference < 1e-5


def test_every_round_trains_another_cohort_of_the_right_size():
    cohorts = LOCAL.cohorts(5)
    assert {len(set(cohort)) for cohort in cohorts} == {3} and len({tuple(cohort) for cohort in cohorts}) > 1


def test_the_jobs_have_the_sizes_of_the_yardsticks():
    assert [(job.clients, job.cohort, job.examples, job.batch) for job in JOBS.values()] == [
        (1000, 100, 50, 10),
        (100, 10, 64, 16),
        (5, 5, 2000, None),
    ]
    assert sum(param.numel() for param in MANY_SMALL.build().parameters()) == 392 * 390 + 390 + 390 * 390 + 390 + 390 + 1
    assert CONVOLUTIONS.build()(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


def test_a_job_survives_being_written_as_text():
    assert decoded(encoded(CONVOLUTIONS)) == CONVOLUTIONS


def test_a_method_whose_engine_is_not_there_says_so():
    assert "no engine 'quantum'" in (Method("", lambda *_: {}, engine="quantum").missing or "")
    assert METHODS[PLAIN].missing is None


def test_the_difference_is_that_of_the_worst_array():
    reference = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}
    assert difference({"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.0])}, reference) == pytest.approx(0.1)


# ---- processes and memory -------------------------------------------------------------------------------------------


def test_a_turn_tells_its_rounds_and_waits(capfd):
    waits = iter(["\n"] * 3)

    class Resume:
        def readline(self):
            return next(waits)

    turns = Turns(2, sys.stdout, Resume())
    for number in range(6):
        turns(number)
    lines = capfd.readouterr().out.splitlines()
    assert ["ready" in line for line in lines] == [True, False, False] and next(waits, None) is None
    assert len(turns.rest()) == 1


def test_methods_take_turns_and_leave_nothing_behind(monkeypatch):
    seen = []
    monkeypatch.setattr(measure, "once", lambda job, method, turn: [0.0] * turn)
    found = measure.by_turns(LOCAL, [PLAIN, FLOWER], repeats=2, turn=2, say=seen.append)
    assert {name: [len(rounds) for rounds in repeats] for name, repeats in found.items()} == {PLAIN: [2, 2], FLOWER: [2, 2]}
    assert len(seen) == 4


def test_a_method_that_fails_shows_its_last_words_and_costs_no_other_its_numbers():
    said = []
    assert measure.by_turns(replace(LOCAL, model="no-such-model"), [PLAIN], 1, 1, said.append) == {}
    assert "no-such-model" in said[0] and "it did not start" in said[1]


ALLOCATES = "import sys; block = b'x' * (60 << 20); print('here', flush=True); sys.stdin.read()"


def test_the_meter_sees_what_a_process_of_the_family_allocates():
    environment = os.environ | {MARK: "test-of-the-meter"}
    line, pipe = [sys.executable, "-S", "-c", ALLOCATES], subprocess.PIPE
    process = subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True, env=environment)
    family = Family("test-of-the-meter")
    with Meter(family, 0.01) as meter:
        process.stdout.readline()
        assert family.members() == [process.pid]
        assert family.memory() > 60 << 20
        while not meter.peak > 60 << 20:
            pass
    family.kill()
    process.communicate()
    assert 60 << 20 < meter.peak < 100 << 20 and not family.members()


# ---- results and report ---------------------------------------------------------------------------------------------


def made_up():
    """Every method takes ten milliseconds times its place in the table, half as much again in the second repeat."""
    rounds = {name: [[0.010 * i, 0.010 * i], [0.015 * i, 0.015 * i]] for i, name in enumerate(METHODS, 1)}
    whole = {name: Whole(10.0, 1.0, 100 * i, [1.0], 1e-7).summary for i, name in enumerate(METHODS, 1)}
    aggregated = {aggregation.READING: [1.0, 2.0], aggregation.ARITHMETIC: [1.5, 3.0], aggregation.GEOMETRIC: [20.0, 32.0]}
    return Results(
        machine={"CPU": "made up"},
        settings={"repeats": 2},
        skipped={"ray-1": "there is no engine"},
        rounds={"J1": rounds},
        whole={"J1": whole},
        differences={"J1": dict.fromkeys(METHODS, 2e-7)},
        population=[Point(1000, 100, 1.0, 0.100, 10**8), Point(100_000, 100, 6.0, 0.105, 2 * 10**8)],
        cohorts=[Point(1000, 10, 1.0, 0.1, 10**8), Point(1000, 1000, 1.0, 0.1, 10**8 + 10**6)],
        aggregation={"1": aggregated},
    )


def test_ratios_are_of_the_same_repeat():
    assert Ratio.of([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == Ratio(3.0, 2.0, 4.0)
    assert made_up().ratio("J1", PLAIN_TWO, PLAIN) == Ratio(2.0, 2.0, 2.0)
    assert made_up().ratio("J1", "not measured", PLAIN) is None


def test_flower_is_compared_at_its_best():
    results = made_up()
    assert results.flower("J1") == FLOWER and results.flower("J2") is None
    results.rounds["J1"][FLOWER_ONE_THREAD] = [[0.001], [0.001]]
    assert results.flower("J1") == FLOWER_ONE_THREAD


def test_targets_say_met_or_missed_by_how_much():
    found = {target.name: target for target in targets(made_up())}
    assert found["J1: Flower's simulation / our Ray engine"].verdict == "missed by 85%"
    assert found["J2: Flower's simulation / our Ray engine"].verdict == "not measured"
    assert found["100,000 clients: start"].verdict == "missed by 20%"
    assert found["100,000 clients: a round against one of 1,000 clients"].value == pytest.approx(5)
    assert found["in process: growth of peak memory with the cohort"].met
    assert found[f"{aggregation.GEOMETRIC} / reading its inputs once"].value == 18
    assert Target("", 9.0, 8.0, higher=True).met and not Target("", 9.0, 8.0).met


def test_results_survive_being_saved(tmp_path):
    made_up().save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == made_up()


def test_the_report_holds_what_was_measured(tmp_path):
    paths = report.write(made_up(), tmp_path)
    assert {path.name for path in paths} == {"report.md", "results.json", "ratios.png", "scaling.png"}
    text = (tmp_path / "report.md").read_text()
    for part in (
        "CPU made up",
        "## J1: many small",
        "| ours, in process | 38 | 3.00 (3.00 to 3.00) |",
        "there is no engine",
        "105.0",
        "2e-07",
    ):
        assert part in text, part
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables) and "nan" not in text


def test_a_report_of_nothing_is_a_report():
    assert report.markdown(Results()).startswith("# Speed")


def test_the_machine_is_described():
    assert {"CPU", "cores", "cache", "RAM", "Python", "torch", "flwr"} <= machine().keys()


def test_scaling_takes_the_median_and_leaves_the_first_and_last_round_out():
    def measured(job, method, rounds):
        return Whole(9.0, job.clients / 100, job.clients, [99.0, *([1.0] * (rounds - 2)), 99.0])

    few, many = scaling.populations((100, 1000), rounds=3, repeats=2, measure=measured)
    assert few == Point(100, 100, 1.0, 1.0, 100) and many.peak == 1000
    assert [point.cohort for point in scaling.cohorts((10, 20), rounds=1, measure=measured)] == [10, 20]


def test_the_command_line_measures_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "by_turns", lambda job, methods, repeats, turn, say: {PLAIN: [[0.1] * turn] * repeats})
    chosen = command.options(["--quick", "--jobs", "J1", "--methods", PLAIN, FLOWER])
    assert chosen.methods == [PLAIN] and chosen.parts == ["rounds"] and chosen.jobs == ["J1"]
    command.main(["--quick", "--jobs", "J1", "--methods", PLAIN, "--out", str(tmp_path)])
    assert "| plain loop | 100 | 1.00" in (tmp_path / "report.md").read_text() and "report.md" in capsys.readouterr().out


def test_aggregation_is_measured_by_threads(capsys):
    found = aggregation.measured(2, 10, 1, [1], with_flower=True)
    assert list(found) == ["1"] and all(len(times) == 1 and math.isfinite(times[0]) for times in found["1"].values())
    assert "| arithmetic mean |" in aggregation.markdown(found["1"], "tiny")


@pytest.mark.parametrize("name", ["DoubleMatch, tiny", "USI, tiny", "ALBEF, tiny"])
def test_local_steps_of_the_papers_learners_are_compared_with_plain_loops(name):
    found = learners.ratios(learners.PRESETS[name], steps=1, repeats=2)
    assert len(found) == 2 and all(ratio > 0 for ratio in found)


def test_steps_under_privacy_are_compared_with_plain_ones(monkeypatch, capsys):
    small = privacy.Preset(Classifier(hidden=(4,)), Spec((1, 2, 2), 3), 5)
    monkeypatch.setattr(privacy, "PRESETS", {"tiny": small, "other": small})
    monkeypatch.setattr(sys, "argv", ["privacy", "--steps", "1", "--repeats", "2", "--only", "tiny"])
    threads = torch.get_num_threads()
    privacy.main()
    torch.set_num_threads(threads)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[0] == "| private / plain | `ghost` | `explicit` |" and len(rows) == 3
    assert re.fullmatch(r"\| tiny( \| [\d.]+ \[[\d.]+ to [\d.]+\]){2} \|", rows[2])


def test_private_steps_take_as_many_examples_as_plain_ones(monkeypatch):
    small = privacy.Preset(Classifier(hidden=(4,)), Spec((1, 2, 2), 3), 5)
    seen, honest = [], Classifier.loss

    def listening(self, model, batch, *others):
        seen.append(len(batch))
        return honest(self, model, batch, *others)

    monkeypatch.setattr(Classifier, "loss", listening)
    for loop in privacy.loops(small).values():
        loop(2)
    assert seen == [5] * 6


def as_torchs(layer, other):
    """The weights of a layer of BERT's as torch's own."""
    halves = {"self_attn": other.attention, "multihead_attn": getattr(other, "crossattention", None)}
    for name, attention in halves.items():
        if attention is None:
            continue
        own, inputs = getattr(layer, name), (attention.self.query, attention.self.key, attention.self.value)
        own.in_proj_weight.data, own.in_proj_bias.data = (
            torch.cat([getattr(linear, kind) for linear in inputs]) for kind in ("weight", "bias")
        )
        own.out_proj.load_state_dict(attention.output.dense.state_dict())
    norms = [attention.output.LayerNorm for attention in halves.values() if attention is not None] + [other.output.LayerNorm]
    for number, norm in enumerate(norms, 1):
        getattr(layer, f"norm{number}").load_state_dict(norm.state_dict())
    layer.linear1.load_state_dict(other.intermediate["dense"].state_dict())
    layer.linear2.load_state_dict(other.output.dense.state_dict())


@torch.no_grad()
def test_the_text_network_that_albef_is_compared_with_computes_the_same():
    size = TextSize(vocabulary=30, width=16, heads=2, perceptron=24, layers=4, fusion=2, positions=8, context=16, dropout=0.0)
    model, plain = WordModel(size), plain_albef.Text(size)
    initialized(model, generator(0), 0.3)
    embeddings, head = model.bert.embeddings, model.cls["predictions"]
    pairs = {"words": "word", "places": "position", "kinds": "token_type"}
    for own, other in pairs.items():
        getattr(plain, own).load_state_dict(getattr(embeddings, f"{other}_embeddings").state_dict())
    plain.norm.load_state_dict(embeddings.LayerNorm.state_dict())
    plain.dense.load_state_dict(head.transform["dense"].state_dict())
    for layer, other in zip([*plain.reading, *plain.looking], model.bert.layers, strict=True):
        as_torchs(layer, other)
    assert sum(param.numel() for param in plain.parameters()) == sum(param.numel() for param in model.parameters())
    ids, tokens = torch.randint(1, 30, (3, 6), generator=generator(1)), torch.randn(3, 5, 16, generator=generator(2))
    mask = torch.arange(6) < torch.tensor([6, 4, 2])[:, None]
    hidden = plain.look(plain.read(ids, mask), mask, tokens)
    expected = model.bert(ids, mask, [tokens])
    assert torch.allclose(hidden[mask], expected[mask], atol=1e-5)
    assert torch.allclose(plain.say(hidden)[mask], model.words(expected)[mask], atol=1e-5)


@pytest.mark.slow
def test_a_step_as_large_as_published_has_finite_gradients_and_fits_into_memory():
    free = int(re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) / 2**20
    if free < 10:
        pytest.skip(f"needs 10 GiB of memory, {free:.1f} are free")
    found = steps.alone("ALBEF, ViT-B and BERT at 256 pixels, 2 pictures", threads=1, steps=1)
    assert found.finite and found.parameters == 419_873_911 and found.gibibytes < 12
    assert found.seconds > 0 and found.processor_seconds > 0


def test_a_step_is_measured(monkeypatch, capsys):
    small = replace(learners.PRESETS["ALBEF, tiny"], batch=4)
    found = steps.measured(small, 1)
    assert found.finite and found.seconds > 0 and found.gibibytes > 0.1
    monkeypatch.setattr(steps, "alone", lambda name, threads, count: found._replace(finite=False))
    monkeypatch.setattr("sys.argv", ["steps", "--only", "ALBEF"])
    steps.main()
    assert "NOT FINITE" in capsys.readouterr().out


def test_a_step_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(steps, "PUBLISHED", {})
    with pytest.raises(EngineError, match=r"(?s)the process of nothing ended with status 2; .*invalid choice"):
        steps.alone("nothing", 1)


# ---- silos ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("megabytes", [1, 20])
def test_the_model_of_silos_is_as_large_as_asked(megabytes):
    assembly = Assembly.of(Experiment.load("quickstart", silos.settings(megabytes, 2)))
    assert sum(tensor.nbytes for tensor in assembly.initial.values()) == pytest.approx(megabytes * 1e6, rel=0.02)


def test_the_peak_of_a_federations_process_is_seen_though_it_has_become_smaller(tmp_path):
    program = tmp_path / "flwr-clientapp"
    program.write_text("import time\nheld = bytearray(b'1') * 150_000_000\ndel held\nprint('ready', flush=True)\ntime.sleep(60)\n")
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE) as running, silos.peaks() as found:
        assert running.stdout is not None and running.stdout.readline() == b"ready\n"
        while "flwr-clientapp" not in found:
            time.sleep(0.05)
        running.kill()
    assert found["flwr-clientapp"] > 150_000_000


def test_the_table_of_silos_leaves_out_rounds_that_evaluate():
    rows = [{"round": number, "seconds": number + 0.5, "bytes_down": 6_000_000} for number in range(4)]
    rows[0]["test_loss"] = rows[3]["test_loss"] = 1.0
    told = silos.markdown(rows, {"flower-superlink": 147_000_000})
    assert told.startswith("2 MB, 3 silos: 1.5 to 2.5 s a round") and "| `flower-superlink` | 147 |" in told
