"""The benchmark at toy size: what it reports is what was measured, of what it says."""

import copy
import json
import random
import statistics
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from recipes import bench, report
from recipes.settings import DEFAULT, ECONOMICAL, SETTINGS
from snr_hooks import SNROptimizer, spectra


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(
        bench, "MODELS", {"test_resnet": (32, 4, {}), "test_vit": (32, 4, {"img_size": 32})}
    )


@pytest.mark.slow
def test_the_whole_benchmark_runs_and_writes_its_report(tiny, tmp_path, capsys):
    bench.main(
        [
            "--repetitions",
            "2",
            "--largest",
            "1",
            "--output",
            str(tmp_path),
            "--models",
            *bench.MODELS,
        ]
    )
    result = json.loads((tmp_path / "bench.json").read_text())
    for model in bench.MODELS:
        assert result["own_work"][model].keys() == SETTINGS.keys()
        assert result["exact_work"][model] > 0
        for found in result["own_work"][model].values():
            assert 0 < found["low"] <= found["ratio"] <= found["high"]
        assert result["whole_step"][model]["none"]["milliseconds"] > 0
        assert {DEFAULT, ECONOMICAL, "spectral_norm"} < result["whole_step"][model].keys()
        assert set(bench.ADDED) < result["short_step"][model].keys()
    text = (tmp_path / "bench.md").read_text()
    assert text in capsys.readouterr().out
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("part", "abcdef")
def test_parts_can_be_measured_alone(part, tiny, tmp_path):
    options = ["--repetitions", "1", "--largest", "1", "--models", "test_resnet"]
    bench.main([*options, "--parts", part, "--output", str(tmp_path)])
    result = json.loads((tmp_path / "bench.json").read_text())
    expected = ["own_work", "whole_step", "memory", "memory", "growth", "in_training"]
    found = {key for key in expected if result.get(key)}
    assert found == {expected["abcdef".index(part)]}
    headings = {line[:3] for line in (tmp_path / "bench.md").read_text().splitlines()}
    shown = {"(c)"} if part == "d" else {f"({part})"}
    assert {heading for heading in headings if heading.startswith("(")} == shown


def test_memory_is_the_same_when_measured_again():
    model = nn.Linear(300, 200, bias=False)
    # The first makes an identity matrix that all wrappers share from then on.
    _, second, third = (bench.memory(model, {"n_vectors": 2}) for _ in range(3))
    assert second == third


def test_fake_tensors_that_a_compiler_left_are_passed_over():
    with FakeTensorMode():
        fake = torch.empty(2, 3)
    assert bench.memory(nn.Linear(20, 30), {})["weights"] == 1
    assert fake.shape == (2, 3)


def test_a_hooked_step_adds_every_term_once():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    optimizer = bench.wrapped(model, {})
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.param_groups[0]["snr_lambda"] = 1.0
    norms = optimizer.spectral_norms()
    bench.hooked_step(optimizer)()
    for name, p in model.named_parameters():
        added = (p.grad - before[name]).norm().item()
        assert added == pytest.approx(norms.get(name, 0.0), rel=1e-5)


def test_both_penalties_are_half_lambda_sigma_squared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 1000))
    for penalty in (bench.power_penalty(model), bench.exact_penalty(model)):
        for _ in range(60):
            value = penalty()
        sigma = torch.linalg.matrix_norm(model[1].weight.detach(), 2)
        assert value.item() == pytest.approx(bench.STRENGTH / 2 * sigma.item() ** 2, rel=1e-2)


@pytest.mark.parametrize("method", ["none", "spectral_norm", "weight decay", *SETTINGS])
def test_a_training_step_leaves_the_model_it_was_given_alone(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 1000))
    before = [p.clone() for p in model.parameters()]
    step = bench.training_step(model, method, 4, 2)
    assert step() > step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_memory_counts_what_the_wrapper_keeps():
    model = nn.Linear(300, 200, bias=False)
    found = bench.memory(model, {"n_vectors": 2})
    # Two vectors on each side in float32, filled up with zeros; room for products is given back.
    assert found["state_percent"] == pytest.approx(100 * 2 * 500 / (300 * 200), rel=0.15)
    assert 0 < found["largest_temporary_percent"] < 10
    assert found["weights"] == 1


def test_no_temporary_is_as_large_as_a_weight():
    for name in ("resnet18", "vit_small_patch16_224"):
        model = timm.create_model(name)
        for setting in (ECONOMICAL, DEFAULT):
            found = bench.memory(model, SETTINGS[setting])
            assert found["largest_temporary_percent"] < 60
            assert found["state_percent"] < 2


def test_operators_outside_products_do_not_grow_with_the_number_of_weights():
    counts = []
    for n_weights in (10, 30):
        model = nn.ModuleList([nn.Linear(16, 16, bias=False) for _ in range(n_weights)])
        counts.append(bench.memory(model, {})["operators"])
    # For each weight the product, with its views, and the addition.
    assert counts[1] - counts[0] <= 20 * 6


def test_disturbed_rounds_do_not_count_but_dear_steps_do_wherever_they_are():
    plain = [10.0] * 80
    method = [11.0] * 80
    for cycle in range(10):
        method[8 * cycle + cycle % 8] = 13.0
    assert bench.added_by(plain, method) == pytest.approx(1.25)
    plain[3] = method[14] = 13.75 + 1e-6  # more than 1.25 times the median; none of the dear steps
    assert bench.added_by(plain, method) == pytest.approx(1 + 2 * 10 / 78)


def test_a_cycle_is_a_whole_number_of_periods_of_the_default():
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 30))
    optimizer = bench.wrapped(model, SETTINGS[DEFAULT])
    step = bench.hooked_step(optimizer)
    sides = []
    for _ in range(20 * bench.CYCLE):
        step()
        entries = optimizer.state_dict()["snr_hooks"]["vectors"].values()
        sides.append([(len(e["left"]), len(e["right"]), int(e.get("rest", -1))) for e in entries])
    *_, before, last = (sides[i : i + bench.CYCLE] for i in range(0, len(sides), bench.CYCLE))
    assert before == last
    assert len({side[0] for side in map(tuple, last)}) == bench.CYCLE  # and no less


def test_own_work_is_the_step_over_weight_decay_by_cycles(monkeypatch):
    # Seven cheap steps and one dear one: the mean over a cycle, not the median over steps.
    times = {"floor": [1.0] * 16, "step": ([2.0] * 7 + [10.0]) * 2}
    monkeypatch.setattr(bench, "measure", lambda *_, **__: times)
    model = nn.Linear(4, 3)
    found = bench.own_work(model, {"a": {}}, 2)["a"]
    assert found["ratio"] == found["low"] == found["high"] == pytest.approx(3.0)


def test_a_whole_step_is_compared_with_the_plain_one(tiny, monkeypatch):
    def fake(functions, repetitions, **_):
        return {name: [1.0 if name == "none" else 1.25] * 8 * repetitions for name in functions}

    monkeypatch.setattr(bench, "measure", fake)
    found = bench.whole_step("test_resnet", timm.create_model("test_resnet"), 1)
    assert found["none"]["milliseconds"] == 1000
    assert found[DEFAULT]["ratio"] == pytest.approx(25)
    assert found["penalty, exact SVD"]["ratio"] == pytest.approx(25)


def test_shares_are_of_what_the_penalty_adds_to_steps_of_a_few_images(tiny, monkeypatch):
    times = {"none": 1.0, "weight decay": 1.125, ECONOMICAL: 1.25, DEFAULT: 1.5}
    sizes = []

    def step(model, method, size, batch):
        sizes.append((size, batch))
        return method

    def fake(functions, repetitions, **_):
        taken = times | {"penalty, power iteration": 2.0}
        return {name: [taken[name]] * 8 * repetitions for name in functions}

    monkeypatch.setattr(bench, "training_step", step)
    monkeypatch.setattr(bench, "measure", fake)
    found = bench.short_step("test_resnet", nn.Linear(1, 1), 1)
    assert set(sizes) == {(32, bench.SHORT)}
    assert found["none"]["milliseconds"] == 1000
    assert {name: entry["share"] for name, entry in found.items() if name != "none"} == {
        "weight decay": 0.125,
        ECONOMICAL: 0.25,
        DEFAULT: 0.5,
        "penalty, power iteration": 1,
    }
    assert found[DEFAULT]["ratio"] == 500


def taken(of):
    """Times of functions by name, with one slow step a cycle, in another phase in each."""

    def measure(functions, repetitions, **_):
        times = {name: [of(name)] * repetitions for name in functions}
        for i, steps in enumerate(times.values()):
            for cycle in range(repetitions // 8):
                steps[8 * cycle + (cycle + i) % 8] += 10.0 * (i + 1)
        return times

    return measure


def test_single_slow_steps_count_neither_for_what_is_added_nor_for_shares(monkeypatch):
    penalty = bench.ADDED[-1]
    monkeypatch.setattr(bench, "MODELS", {"x": (32, 7, {})})
    monkeypatch.setattr(bench, "training_step", lambda *_: None)
    monkeypatch.setattr(
        bench, "measure", taken(lambda name: {"none": 1.0, penalty: 3}.get(name, 2))
    )
    found = bench.short_step("x", nn.Linear(1, 1), 5)
    assert found["none"]["milliseconds"] == 1000
    assert found[DEFAULT]["ratio"] == 1000
    assert found[DEFAULT]["share"] == 0.5


def test_the_first_steps_of_a_training_are_not_timed_and_their_order_is_drawn(monkeypatch):
    untimed = []

    def measure(functions, repetitions, *, warm_up, order):
        untimed.append(warm_up)
        assert isinstance(order, random.Random)
        return {name: [1.0] * repetitions for name in functions}

    monkeypatch.setattr(bench, "training_step", lambda *_: None)
    monkeypatch.setattr(bench, "measure", measure)
    bench.added(["a"], nn.Linear(1, 1), 32, 4, 2)
    assert untimed == [bench.SETTLING]


def test_whole_steps_have_the_batch_of_the_model_and_all_methods(monkeypatch):
    steps = []
    monkeypatch.setattr(bench, "MODELS", {"x": (32, 7, {})})
    monkeypatch.setattr(bench, "training_step", lambda _, *step: steps.append(step))
    monkeypatch.setattr(bench, "measure", taken(lambda _: 1.0))
    bench.whole_step("x", nn.Linear(1, 1), 8)
    methods, sizes, batches = zip(*steps, strict=True)
    assert {"none", "spectral_norm", "penalty, exact SVD", *bench.ADDED} == set(methods)
    assert (set(sizes), set(batches)) == ({32}, {7})


def test_the_table_of_short_steps_says_what_was_measured():
    entry = {"ratio": 2.0, "low": 1.0, "high": 3.0, "share": 0.25}
    found = {"none": {"milliseconds": 9.0}} | dict.fromkeys(bench.ADDED, entry)
    lines = bench._short_steps({"x": found})
    assert "| none | 9 ms |" in lines
    assert f"| {DEFAULT} | +2.0 (+1.0 to +3.0); 0.25 |" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repetitions", "0"], "expected a positive whole number, found '0'"),
        (["--largest", "some"], "expected a positive whole number, found 'some'"),
        (["--parts", "ag"], "expected letters from a to f, found 'ag'"),
        (["--parts", ""], "expected letters from a to f, found ''"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--models", "resnet19"], "expected the name of a timm model, found 'resnet19'"),
        (["--models"], "expected at least one argument"),
    ],
)
def test_options_that_would_measure_nothing_are_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.main([*arguments, "--output", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["", "below"])
def test_an_output_that_is_no_folder_is_refused_before_anything_is_measured(
    place, tmp_path, capsys
):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(SystemExit):
        bench.main(["--output", str(file / place)])
    assert "expected --output to be a folder that can be made, found" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_a_gpu_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda", "--output", str(tmp_path / "out")])
    assert "expected a GPU for --device cuda, found none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_picture_of_other_figures_does_not_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SETTINGS", {ECONOMICAL: SETTINGS[ECONOMICAL]})
    (tmp_path / "bench.png").write_text("of the run before")
    bench.main(["--models", "test_vit", "--parts", "c", "--output", str(tmp_path)])
    assert not (tmp_path / "bench.png").exists()
    assert "(a)" not in (tmp_path / "bench.md").read_text()


def test_any_model_of_timm_can_be_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SETTINGS", {ECONOMICAL: SETTINGS[ECONOMICAL]})
    bench.main(
        ["--models", "test_vit", "--parts", "c", "--repetitions", "1", "--output", str(tmp_path)]
    )
    assert list(json.loads((tmp_path / "bench.json").read_text())["memory"]) == ["test_vit"]
    assert bench._case("test_vit", torch.device("cpu")) == bench.OTHERS
    assert bench._case("resnet18", torch.device("cpu")) == bench.MODELS["resnet18"]
    assert bench._case("resnet18", torch.device("cuda")) == bench.ON_GPU


def test_kernels_are_what_runs_on_the_gpu(monkeypatch):
    def event(device, count, microseconds):
        kind = SimpleNamespace(name=device)
        return SimpleNamespace(device_type=kind, count=count, self_device_time_total=microseconds)

    called = []
    # The profiler lists the calls of the runtime, too, which run on the CPU.
    events = [event("CUDA", 3, 20.0), event("CPU", 5, 0.0), event("CUDA", 1, 10.0)]
    recorded = SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(bench, "profile", lambda activities: nullcontext(recorded))
    assert bench.kernels(lambda: called.append(1)) == (4, pytest.approx(30e-6))
    assert called == [1]


def test_time_of_kernels_is_that_of_a_cycle_over_weight_decay(monkeypatch):
    steps, counts = [], []

    def kernels(cycle):
        steps.clear()
        cycle()
        counts.append(len(steps))
        return len(steps), sum(steps)

    monkeypatch.setattr(bench, "kernels", kernels)
    found = bench._on_device(lambda: steps.append(2.0), lambda: steps.append(3.0))
    assert found == pytest.approx(1.5)
    assert counts == [bench.CYCLE, bench.CYCLE]


def test_the_table_has_what_was_measured_on_a_gpu():
    entry = {"ratio": 9.0, "low": 8.0, "high": 10.0, "on_device": 1.25}
    memory = {
        "state_percent": 1.0,
        "largest_temporary_percent": 2.0,
        "operators": 3,
        "weights": 4,
        "kernels": 5,
    }
    measured = {
        "device": "cuda",
        "machine": "card",
        "own_work": {"x": {"a": entry}},
        "exact_work": {},
        "whole_step": {},
        "short_step": {},
        "memory": {"x": {"a": memory}},
        "in_training": {},
    }
    lines = bench.table(measured).splitlines()
    assert "| a | 9.00 (8.00-10.00); kernels alone 1.25 |" in lines
    assert "| a | 1.00 / 2.0; 3 / 4, 5 kernels |" in lines
    assert "on a GPU are not known" not in lines[-1]


def test_along_a_training_the_weights_move_under_the_term(monkeypatch):
    times = {"floor": [0.5], "step": [2.0]}
    orders = set()

    def measure(functions, repetitions, warm_up, order):
        assert (repetitions, warm_up) == (1, 0)
        orders.add(order)
        for function in functions.values():
            function()
        return times

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "CYCLE", 2)
    monkeypatch.setattr(bench, "STRENGTH", 0.0)  # of weight decay, whose rounding would grow
    made = []

    def create(model):
        made.append(model)
        return torch.optim.SGD(model.parameters(), lr=0.1)

    model = timm.create_model("test_resnet")
    before = [p.clone() for p in model.parameters()]
    found = bench.along_training(model, create, 32, 2)
    assert all(map(torch.equal, model.parameters(), before))
    assert len(orders) == 1  # one that goes on, not the same draw in every step
    assert isinstance(orders.pop(), random.Random)
    twin = copy.deepcopy(model)  # trained likewise, in the usual loop
    optimizer = SNROptimizer(torch.optim.SGD(twin.parameters(), lr=0.1), twin, 0.01)
    torch.manual_seed(0)
    images, labels = bench._digits(32)
    for parameter in twin.parameters():  # the same random numbers
        torch.randn_like(parameter)
    for _ in range(4):
        chosen = torch.randint(len(images), (16,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    for moved, expected in zip(made[0].parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-6)
    assert found["ratio"] == 4
    assert found["products"] == optimizer.n_products_taken / 4 / len(optimizer.targets) > 1
    norms = optimizer.spectral_norms()
    exact = {name: float(values[0]) for name, values in spectra(twin).items()}
    deviations = [100 * abs(1 - norms[name] / exact[name]) for name in norms]
    assert found["worst_error"] == pytest.approx(max(deviations), rel=1e-3, abs=1e-3)
    assert found["median_error"] == pytest.approx(statistics.median(deviations), rel=1e-3, abs=1e-3)


def test_a_training_that_diverged_says_so():
    def create(model):
        return torch.optim.SGD(model.parameters(), lr=1e30)

    assert bench.along_training(timm.create_model("test_resnet"), create, 32, 1) == {}
    [*_, line] = bench._trainings({"x": {key: {} for key in bench.TRAININGS}})
    assert line == "| adamw, 0.001 | diverged |"


# --- what is measured ---


def test_warm_up_rounds_are_not_timed():
    calls = []
    times = bench.measure({"a": lambda: calls.append(1)}, 3, warm_up=2)
    assert (len(calls), len(times["a"])) == (5, 3)


def test_a_drawn_order_is_another_in_every_round_and_the_same_in_every_run():
    def rounds(order):
        calls = []
        functions = {name: partial(calls.append, name) for name in "abc"}
        times = bench.measure(functions, 20, warm_up=1, order=order)
        assert {name: len(taken) for name, taken in times.items()} == dict.fromkeys("abc", 20)
        return ["".join(calls[i : i + 3]) for i in range(0, 63, 3)]

    drawn = rounds(random.Random(0))
    assert {"".join(sorted(names)) for names in drawn} == {"abc"}
    assert len(set(drawn)) == 6
    assert drawn == rounds(random.Random(0)) != rounds(random.Random(1))
    assert set(rounds(None)) == {"abc"}


def test_times_are_noted_under_the_name_of_what_took_them(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def spend(seconds):
        clock[0] += seconds

    functions = {"short": partial(spend, 1.0), "long": partial(spend, 2.0)}
    times = bench.measure(functions, 8, order=random.Random(0))
    assert times == {"short": [1.0] * 8, "long": [2.0] * 8}


def test_models_are_the_same_in_every_run(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(bench, "SETTINGS", {})
    monkeypatch.setattr(bench, "own_work", lambda model, *_: drawn.append(model) or {})
    monkeypatch.setattr(bench, "exact_work", lambda model: 1.0)
    for _ in range(2):
        torch.rand(3)
        bench.main(["--models", "test_vit", "--parts", "a", "--output", str(tmp_path)])
    assert all(map(torch.equal, *(model.parameters() for model in drawn)))


def test_the_spread_is_that_of_the_middle_eighty_percent():
    descending = [float(i) for i in range(20, 0, -1)]
    assert bench.spread(descending) == {"ratio": 10.5, "low": 3, "high": 18}


def test_the_floor_is_weight_decay(monkeypatch):
    monkeypatch.setattr(bench, "STRENGTH", 0.5)
    model = nn.Linear(4, 3, bias=False)
    optimizer = bench.wrapped(model, {})
    before = model.weight.grad.clone()
    bench.weight_decay(optimizer)()
    torch.testing.assert_close(model.weight.grad, before + 0.5 * model.weight.detach())


def test_a_hooked_step_calls_the_hooks_before_accumulation_too():
    model = nn.Linear(4, 3, bias=False)
    optimizer = bench.wrapped(model, {})
    called = []
    model.weight.register_hook(called.append)
    step = bench.hooked_step(optimizer)
    step()
    step()
    assert len(called) == 2


def test_exact_work_is_one_step_over_the_median_floor(monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda _, n, **__: {"": [10.0] if n == 1 else [2.0] * n})
    assert bench.exact_work(nn.Linear(4, 3)) == 5


@pytest.mark.parametrize("make", [bench.power_penalty, bench.exact_penalty])
def test_the_gradient_of_both_penalties_is_the_term(make, monkeypatch):
    monkeypatch.setattr(bench, "STRENGTH", 0.5)
    layer = nn.Linear(4, 3, bias=False)
    penalty = make(nn.Sequential(layer))
    for _ in range(100):
        value = penalty()
    value.backward()
    u, sigma, vh = torch.linalg.svd(layer.weight.detach())
    term = 0.5 * sigma[0] * torch.outer(u[:, 0], vh[0])
    torch.testing.assert_close(layer.weight.grad, term, rtol=1e-3, atol=1e-4)


def two_layers():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 1000))


@pytest.mark.parametrize(
    ("method", "decay", "options", "n_normalized"),
    [
        ("none", 0.0, [], 0),
        ("weight decay", bench.STRENGTH, [], 0),
        (ECONOMICAL, 0.0, [SETTINGS[ECONOMICAL]], 0),
        (DEFAULT, 0.0, [{}], 0),
        ("spectral_norm", 0.0, [], 2),
    ],
)
def test_methods_are_what_they_are_called(method, decay, options, n_normalized, monkeypatch):
    sgd = Mock(wraps=torch.optim.SGD)
    monkeypatch.setattr(torch.optim, "SGD", sgd)
    wrapper = Mock(wraps=SNROptimizer)
    monkeypatch.setattr(bench, "SNROptimizer", wrapper)
    norm = Mock(wraps=bench.spectral_norm)
    monkeypatch.setattr(bench, "spectral_norm", norm)
    bench.training_step(two_layers(), method, 4, 2)
    assert [call.kwargs["weight_decay"] for call in sgd.call_args_list] == [decay]
    assert [call.kwargs for call in wrapper.call_args_list] == options
    assert norm.call_count == n_normalized


@pytest.mark.parametrize(
    ("method", "name"),
    [("penalty, power iteration", "power_penalty"), ("penalty, exact SVD", "exact_penalty")],
)
def test_penalties_are_in_the_loss(method, name, monkeypatch):
    for penalty in ("power_penalty", "exact_penalty"):
        value = torch.tensor(100.0 if penalty == name else 0.0)
        monkeypatch.setattr(bench, penalty, Mock(return_value=Mock(return_value=value)))
    model = two_layers()
    plain = bench.training_step(model, "none", 4, 2)()
    assert bench.training_step(model, method, 4, 2)() == pytest.approx(plain + 100, rel=1e-5)


def test_a_temporary_is_compared_with_the_largest_weight(monkeypatch):
    class Allocations(bench.Allocations):
        largest = property(lambda _: 300 * 200 * 4, lambda *_: None)

    monkeypatch.setattr(bench, "Allocations", Allocations)
    model = nn.ModuleList([nn.Linear(300, 200, bias=False) for _ in range(2)])
    assert bench.memory(model, {})["largest_temporary_percent"] == 100


def test_growth_is_in_microseconds_a_weight(monkeypatch):
    def grow(points, x, *_):
        points.setdefault("a", []).append((x, 2.0 * x))  # milliseconds

    monkeypatch.setattr(bench, "_grow", grow)
    found = bench.growth(1, 1, torch.device("cpu"))
    assert found["microseconds_per_weight"] == {"a": pytest.approx(2000)}


def test_points_of_growth_are_in_milliseconds(monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda f, n, **_: {name: [0.25] * n for name in f})
    points = {}
    bench._grow(points, 7.0, nn.Linear(4, 4), 1)
    names = ["weight decay", ECONOMICAL, DEFAULT]
    assert points == {name: [(7.0, 250.0)] for name in names}


def test_the_picture_shows_ratios_with_their_spread(tmp_path, unrendered):
    bench_of_one = {
        "own_work": {"m": {"a": {"ratio": 2.0, "low": 1.0, "high": 5.0}}},
        "growth": {"parameters": {"a": [(1, 1)]}, "weights": {"a": [(1, 1)]}},
    }
    unrendered.setattr(report.plt, "close", lambda _: None)
    report.draw_bench(tmp_path / "bench.png", bench_of_one)
    axis = report.plt.gcf().axes[0]
    [bars] = [drawn for drawn in axis.containers if getattr(drawn, "patches", None)]
    [[low, high]] = bars.errorbar.lines[2][0].get_segments()
    assert (bars.patches[0].get_height(), low[1], high[1]) == (2, 1, 5)
