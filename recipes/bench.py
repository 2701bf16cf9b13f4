"""What the term costs, next to weight decay: ``python -m recipes.bench``.

What is compared is timed in turn, in this one process; whole training steps in an order that is
drawn anew for every round, for what ran before leaves its traces in caches and memory. A
repetition is a cycle of sixteen steps, so that settings that do not do the same in every step are
timed as a whole; figures are medians over repetitions, but those of whole steps are means, without
rounds that something else disturbed. The spread is that of the middle 80 percent of repetitions.
Models are drawn from a fixed seed. Nothing here asserts a time. Compare figures within a run only.
"""

import argparse
import copy
import gc
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from recipes.data import Digits
from recipes.frontier import errors
from recipes.report import draw_bench, markdown_table
from recipes.settings import DEFAULT, ECONOMICAL, SETTINGS, Idle
from snr_hooks import SNROptimizer, discover

Case = tuple[int, int, dict[str, Any]]
"""Image size and batch size of the whole training step, and options of the model."""

MODELS: dict[str, Case] = {
    "resnet18": (32, 64, {}),
    "resnet50": (64, 16, {}),
    "mobilenetv3_large_100": (96, 32, {}),
    "convnext_tiny": (64, 16, {}),
    "vit_small_patch16_224": (64, 32, {"img_size": 64}),
    "vit_base_patch16_224": (64, 16, {"img_size": 64}),
}
"""What is measured on a CPU, unless other models are named."""

OTHERS: Case = (224, 8, {})
"""Other models on a CPU."""

ON_GPU: Case = (224, 256, {})
"""All models on a GPU, where the step is under bfloat16 autocast."""

SHORT = 4
"""Batch size of steps that are short. What is added to a step does not depend on the size of the
batch, and a step of half a second varies by more than that."""

STRENGTH = 1e-6
"""lambda: small enough that hundreds of terms without a step in between leave finite gradients."""

CYCLE = 16
"""Steps that are timed together: as many as it takes until all settings do the same again. At rest
the default takes one step with all vectors of one side and seven of the other, then the reverse."""

SETTLING = 3 * CYCLE
"""Untimed training steps before those of (b): in the first of a training, vectors that start from
random ones are still on their way, and take more work than in all others."""

Times = dict[str, list[float]]


def measure(
    functions: Mapping[str, Callable[[], object]],
    repetitions: int,
    *,
    warm_up: int = 2,
    order: random.Random | None = None,
) -> Times:
    """Time functions in turn, again and again.

    Args:
        functions: What to time, by name.
        repetitions: How often each.
        warm_up: Untimed rounds before.
        order: Draws the order of each round; without it, it is always that of ``functions``.

    Returns:
        The times of each in seconds.
    """
    times: Times = {name: [] for name in functions}
    names = list(functions)
    for repetition in range(-warm_up, repetitions):
        if order is not None:
            order.shuffle(names)
        for name in names:
            _wait()
            start = time.perf_counter()
            functions[name]()
            _wait()
            if repetition >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kernels(function: Callable[[], object]) -> tuple[int, float]:
    """Return how many kernels, copies and fills a function starts on the GPU, and their seconds."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        function()
        _wait()
    events = [e for e in recorded.key_averages() if e.device_type.name == "CUDA"]
    return sum(e.count for e in events), sum(e.self_device_time_total for e in events) / 1e6


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def cycles(times: Sequence[float]) -> list[float]:
    """Return the mean time over each full cycle."""
    return [statistics.mean(times[i : i + CYCLE]) for i in range(0, len(times), CYCLE)]


DISTURBED = 1.25
"""A step that takes so many times its median was held up by something else. What a method does in
its dearest steps, but for exact SVD, adds less."""


def added_by(plain: Sequence[float], method: Sequence[float]) -> float:
    """Return the mean of what a method adds to a step, without rounds that were disturbed.

    A median would pass over the dear steps of a method, if they are few and vary.
    """
    limits = [DISTURBED * statistics.median(times) for times in (plain, method)]
    return statistics.mean(
        after - before
        for before, after in zip(plain, method, strict=True)
        if before < limits[0] and after < limits[1]
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the ends of the middle 80 percent."""
    values = sorted(values)
    cut = len(values) // 10
    return {
        "ratio": statistics.median(values),
        "low": values[cut],
        "high": values[-1 - cut],
    }


# --- (a) the term alone ---


def wrapped(model: nn.Module, setting: dict[str, Any], strength: float = STRENGTH) -> SNROptimizer:
    """Wrap an optimizer that does nothing, and give every weight a gradient."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return SNROptimizer(Idle(model.parameters()), model, strength, **setting)


def hooked_step(optimizer: SNROptimizer) -> Callable[[], None]:
    """Return a function that does all that the wrapper does in a training step.

    It calls the hooks that backward would call, in the same order, and steps. What is left out
    is autograd's own time to call a Python function.
    """
    parameters = _parameters(optimizer)[::-1]
    before = [list((p._backward_hooks or {}).values()) for p in parameters]
    after = [list((p._post_accumulate_grad_hooks or {}).values()) for p in parameters]

    def step() -> None:
        with torch.no_grad():
            for parameter, first, second in zip(parameters, before, after, strict=True):
                assert parameter.grad is not None
                for hook in first:
                    hook(parameter.grad)
                for hook in second:
                    hook(parameter)
        optimizer.step()

    return step


def _parameters(optimizer: SNROptimizer) -> list[nn.Parameter]:
    """Return the regularized parameters, each once, also if it is several targets."""
    return list({id(target.parameter): target.parameter for target in optimizer.targets}.values())


def weight_decay(optimizer: SNROptimizer) -> Callable[[], None]:
    """Return a function that adds weight decay to the same gradients."""
    weights = [parameter.detach() for parameter in _parameters(optimizer)]
    grads = [p.grad for p in _parameters(optimizer) if p.grad is not None]
    return lambda: torch._foreach_add_(grads, weights, alpha=STRENGTH)


def own_work(
    model: nn.Module, settings: dict[str, dict[str, Any]], repetitions: int
) -> dict[str, Any]:
    """Measure (a): what the wrapper does in a step, over weight decay, per setting."""
    found = {}
    for name, setting in settings.items():
        optimizer = wrapped(model, setting)
        functions = {"floor": weight_decay(optimizer), "step": hooked_step(optimizer)}
        times = measure(functions, CYCLE * repetitions, warm_up=CYCLE)
        floor_ms = 1e3 * statistics.median(cycles(times["floor"]))
        found[name] = _over_decay(times) | {"floor_ms": floor_ms}
        if _device(model).type == "cuda":
            found[name]["on_device"] = _on_device(**functions)
        optimizer.remove()
    return found


def _over_decay(times: Times) -> dict[str, float]:
    """Return the spread of the time of a step over weight decay's, cycle by cycle."""
    pairs = zip(cycles(times["floor"]), cycles(times["step"]), strict=True)
    return spread([step / decay for decay, step in pairs])


def _on_device(floor: Callable[[], None], step: Callable[[], None]) -> float:
    """Return the time that kernels of a cycle take, over those of weight decay."""
    return kernels(_cycle_of(step))[1] / kernels(_cycle_of(floor))[1]


def _cycle_of(step: Callable[[], None]) -> Callable[[], None]:
    def cycle() -> None:
        for _ in range(CYCLE):
            step()

    return cycle


def exact_work(model: nn.Module) -> float:
    """Measure (a) once for ``exact=True``: an SVD of every weight, over weight decay."""
    optimizer = wrapped(model, {"exact": True})
    floor = measure({"": weight_decay(optimizer)}, CYCLE)[""]
    exact = measure({"": hooked_step(optimizer)}, 1, warm_up=0)[""]
    optimizer.remove()
    return exact[0] / statistics.median(floor)


# --- (b) a whole training step ---


def power_penalty(model: nn.Module) -> Callable[[], Tensor]:
    """Return the penalty by autograd, with one power iteration a step on each weight."""
    targets = discover(model).targets
    device = _device(model)
    lengths = [target.view.shape(target.parameter)[1] for target in targets]
    vectors = [torch.randn(length, device=device) for length in lengths]

    def penalty() -> Tensor:
        total = torch.zeros((), device=device)
        for i, (_, parameter, view, *_) in enumerate(targets):
            matrix = view.matrix(parameter)
            with torch.no_grad():
                u = nn.functional.normalize(matrix @ vectors[i], dim=0)
                vectors[i] = nn.functional.normalize(matrix.mT @ u, dim=0)
            total = total + (u @ matrix @ vectors[i]).square()
        return STRENGTH / 2 * total

    return penalty


def exact_penalty(model: nn.Module) -> Callable[[], Tensor]:
    """Return the penalty by autograd through an exact SVD of each weight."""
    targets = discover(model).targets

    def penalty() -> Tensor:
        norms = [torch.linalg.matrix_norm(view.matrix(p), 2) for _, p, view, *_ in targets]
        return STRENGTH / 2 * torch.stack(norms).square().sum()

    return penalty


def training_step(model: nn.Module, method: str, size: int, batch: int) -> Callable[[], float]:
    """Return a function that takes a whole training step with a method."""
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    device = _device(model)
    penalty: Callable[[], Tensor] = lambda: torch.zeros((), device=device)  # noqa: E731
    if method == "spectral_norm":
        for name, *_ in discover(model).targets:
            module, _, tensor = name.rpartition(".")
            spectral_norm(model.get_submodule(module), tensor)
    elif method == "penalty, power iteration":
        penalty = power_penalty(model)
    elif method == "penalty, exact SVD":
        penalty = exact_penalty(model)
    decay = STRENGTH if method == "weight decay" else 0.0
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=decay
    )
    if method in SETTINGS:
        optimizer = SNROptimizer(optimizer, model, STRENGTH, **SETTINGS[method])
    images, labels = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    images, labels = images.to(device), labels.to(device)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss = loss + penalty()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    return step


ADDED = ["weight decay", ECONOMICAL, DEFAULT, "penalty, power iteration"]
"""What is compared in short steps; in long ones that and more."""


def _case(name: str, device: torch.device) -> Case:
    return ON_GPU if device.type == "cuda" else MODELS.get(name, OTHERS)


def whole_step(name: str, model: nn.Module, repetitions: int) -> dict[str, Any]:
    """Measure (b): what each method adds to a training step, in percent of the step."""
    size, batch, _ = _case(name, _device(model))
    found = added((*ADDED, "spectral_norm"), model, size, batch, repetitions)
    base = found["none"]["milliseconds"]
    for method, entry in found.items():
        if method != "none":
            found[method] = {key: 100 * value / base for key, value in entry.items()}
    step = training_step(model, "penalty, exact SVD", size, batch)
    exact = 1e3 * measure({"": step}, 1, warm_up=0)[""][0]
    found["penalty, exact SVD"] = {"ratio": 100 * (exact - base) / base}
    return found


def short_step(name: str, model: nn.Module, repetitions: int) -> dict[str, Any]:
    """Measure (b): what methods add to a step, in milliseconds and as shares of the penalty's."""
    size, _, _ = _case(name, _device(model))
    found = added(ADDED, model, size, SHORT, 2 * repetitions)  # they are short
    for method in ADDED:
        found[method]["share"] = found[method]["ratio"] / found[ADDED[-1]]["ratio"]
    return found


def added(
    methods: Sequence[str], model: nn.Module, size: int, batch: int, repetitions: int
) -> dict[str, dict[str, float]]:
    """Measure in milliseconds what methods add to a training step, and the plain step."""
    steps = {method: training_step(model, method, size, batch) for method in ["none", *methods]}
    times = measure(steps, CYCLE * repetitions, warm_up=SETTLING, order=random.Random())
    found = {"none": {"milliseconds": 1e3 * statistics.median(times["none"])}}
    for method in methods:
        pairs = zip(times["none"], times[method], strict=True)
        differences = [1e3 * (after - before) for before, after in pairs]
        found[method] = spread(cycles(differences))
        found[method]["ratio"] = 1e3 * added_by(times["none"], times[method])
    return found


# --- (c) memory and (d) launches ---


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, and notes the largest tensor that one of them allocated."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators = 0
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Run an operator and look at what it returns."""
        kwargs = kwargs or {}
        known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        self.operators += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage(leaf) not in known:
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def memory(model: nn.Module, setting: dict[str, Any]) -> dict[str, float]:
    """Measure (c), memory, and (d), launches.

    Args:
        model: The model.
        setting: Options of SNROptimizer.

    Returns:
        Bytes that the wrapper keeps, in percent of the parameters' bytes; the largest tensor that
        a step allocates, in percent of the largest weight; operators a step; kernels a step on
        a GPU, if there is one.
    """
    for parameter in model.parameters():  # whose place might be used again and not be counted
        parameter.grad = None
    before = _tensors_alive()
    optimizer = wrapped(model, setting)
    gradients = {_storage(p.grad) for p in model.parameters() if p.grad is not None}
    step = hooked_step(optimizer)
    for _ in range(CYCLE):
        step()
    after = _tensors_alive()
    kept = sum(size for place, size in after.items() if place not in before.keys() | gradients)
    with Allocations() as allocations:
        for _ in range(CYCLE):
            step()
    weights = [target.parameter for target in optimizer.targets]
    found = {
        "state_percent": 100 * kept / sum(p.nbytes for p in model.parameters()),
        "largest_temporary_percent": 100 * allocations.largest / max(w.nbytes for w in weights),
        "operators": round(allocations.operators / CYCLE),
        "weights": len(weights),
    }
    if _device(model).type == "cuda":
        found["kernels"] = round(kernels(_cycle_of(step))[0] / CYCLE)
    optimizer.remove()
    return found


def _tensors_alive() -> dict[int, int]:
    """Return place and size of the storage of every tensor that Python can reach."""
    gc.collect()
    # Not those of subclasses: a compiler leaves fake ones, which have no storage.
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    return {_storage(t): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}


# --- (e) growth ---


def growth(repetitions: int, largest: int, device: torch.device) -> dict[str, Any]:
    """Measure (e): milliseconds a step by the number of parameters, and of weights."""
    by_parameters: dict[str, list[tuple[float, float]]] = {}
    for millions in (1, 3, 10, 30, 100, 300, 600):
        if millions <= largest:
            side = round((millions * 1e6 / 50) ** 0.5)
            _grow(by_parameters, millions * 1e6, _layers(50, side, device), repetitions)
    by_weights: dict[str, list[tuple[float, float]]] = {}
    for count in (10, 30, 100, 300, 500):
        _grow(by_weights, count, _layers(count, 16, device), 3 * repetitions)
    slopes = {
        name: 1e3 * (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
        for name, points in by_weights.items()
    }
    return {
        "parameters": by_parameters,
        "weights": by_weights,
        "microseconds_per_weight": slopes,
    }


def _layers(count: int, side: int, device: torch.device) -> nn.Module:
    layers = [nn.Linear(side, side, bias=False, device=device) for _ in range(count)]
    return nn.ModuleList(layers)


def _grow(
    points: dict[str, list[tuple[float, float]]], x: float, model: nn.Module, repetitions: int
) -> None:
    for name in (ECONOMICAL, DEFAULT):
        optimizer = wrapped(model, SETTINGS[name])
        functions = {"weight decay": weight_decay(optimizer), name: hooked_step(optimizer)}
        for key, times in measure(functions, CYCLE * repetitions, warm_up=CYCLE).items():
            if key == name or name == ECONOMICAL:
                points.setdefault(key, []).append((x, 1e3 * statistics.median(cycles(times))))
        optimizer.remove()


# --- (f) along a training ---

TRAININGS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd, 0.01": lambda model: _sgd(model, 0.01),
    "sgd, 0.1": lambda model: _sgd(model, 0.1),
    "adamw, 0.001": lambda model: torch.optim.AdamW(model.parameters(), lr=0.001),
}
"""Optimizers and learning rates."""


def _sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True)


def along_training(
    model: nn.Module, create: Callable[[nn.Module], torch.optim.Optimizer], size: int, n_cycles: int
) -> dict[str, float]:
    """Measure (f): (a) for the default, while its term regularizes a training on digits.

    There weights move, and it takes the more products with them the further they do.

    Args:
        model: The model; it is not changed.
        create: Makes the optimizer.
        size: Of the images, in pixels.
        n_cycles: How long to train, in cycles of steps of 16 images.

    Returns:
        The ratio, as in (a), over all cycles; products with a weight in a step; median and worst
        error of sigma in percent, over the weights at the end. Nothing if the training diverged.
    """
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    images, labels = (part.to(_device(model)) for part in _digits(size))
    optimizer, training = wrapped(model, SETTINGS[DEFAULT], strength=0.01), create(model)
    floor, step = weight_decay(optimizer), hooked_step(optimizer)
    times: Times = {"floor": [], "step": []}
    order = random.Random()  # whichever comes first finds the caches cold
    for _ in range(CYCLE * n_cycles):
        chosen = torch.randint(len(images), (16,)).to(images.device)
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        # Which leaves the hooks alone: they are called below.
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(gradient)
        functions = {"floor": floor, "step": step}
        for name, taken in measure(functions, 1, warm_up=0, order=order).items():
            times[name] += taken
        training.step()
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        return {}
    products = optimizer.n_products_taken / (CYCLE * n_cycles * len(optimizer.targets))
    deviations = errors(optimizer.spectral_norms(), model)
    return _over_decay(times) | {
        "products": products,
        "median_error": 100 * statistics.median(deviations),
        "worst_error": 100 * max(deviations),
    }


def _digits(size: int) -> tuple[Tensor, Tensor]:
    """Return images of a size, shape ``(N, 3, size, size)``, from -1 to 1, and labels."""
    digits = Digits("train")
    images = torch.stack([pil_to_tensor(image) for image in digits.images]).float()
    return nn.functional.interpolate(images / 127.5 - 1, size), torch.tensor(digits.labels)


# --- the report ---


def machine(device: torch.device) -> str:
    """Return what the figures depend on, besides the code."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {where}"


def table(bench: dict[str, Any]) -> str:
    """Return the results as Markdown, those of the parts that were run."""
    lines = [f"{bench['machine']}. Medians, in brackets the middle 80 % of the repetitions."]
    if bench["own_work"]:
        lines += _term_alone(bench["own_work"], bench["exact_work"])
    if bench["whole_step"]:
        lines += _whole_steps(bench["whole_step"]) + _short_steps(bench["short_step"])
    if bench["memory"]:
        lines += _memory(bench["memory"])
    if bench["in_training"]:
        lines += _trainings(bench["in_training"])
    if "growth" in bench:
        constants = ", ".join(
            f"{name} {value:.1f}"
            for name, value in bench["growth"]["microseconds_per_weight"].items()
        )
        lines += ["", f"(e) Microseconds for each additional small weight: {constants}."]
    if bench["device"] != "cuda":
        lines += ["", "Measured on a CPU: kernel launches and times on a GPU are not known."]
    return "\n".join(lines) + "\n"


def _titled(title: str, rows: list[list[str]]) -> list[str]:
    return ["", title, "", *markdown_table(rows)]


def _term_alone(measured: dict[str, Any], exact: dict[str, float]) -> list[str]:
    """Return the table of (a)."""
    rows = [["", *measured]]
    for name in next(iter(measured.values())):
        cells = []
        for entry in (found[name] for found in measured.values()):
            cells.append("{ratio:.2f} ({low:.2f}-{high:.2f})".format(**entry))
            if "on_device" in entry:
                cells[-1] += f"; kernels alone {entry['on_device']:.2f}"
        rows.append([name, *cells])
    rows.append(["exact SVD", *(f"{ratio:.0f} (once)" for ratio in exact.values())])
    title = "(a) The wrapper's own work in a step, over weight decay on the same tensors:"
    return _titled(title, rows)


def _whole_steps(measured: dict[str, Any]) -> list[str]:
    """Return the table of (b) for whole steps."""
    rows = [["", *measured]]
    for method in next(iter(measured.values())):
        cells = []
        for entry in (found[method] for found in measured.values()):
            if "milliseconds" in entry:
                cells.append(f"{entry['milliseconds']:.0f} ms")
            elif "low" in entry:
                cells.append("{ratio:+.1f} ({low:+.1f} to {high:+.1f})".format(**entry))
            else:
                cells.append(f"{entry['ratio']:+.0f} (once)")
        rows.append([method, *cells])
    title = (
        "(b) What a method adds to a whole training step, in percent of it: the mean, without "
        f"rounds in which a step took {DISTURBED} times its median, in brackets the middle 80 % "
        "of the cycles:"
    )
    return _titled(title, rows)


def _memory(measured: dict[str, Any]) -> list[str]:
    """Return the table of (c) and (d)."""
    rows = [["", *measured]]
    for name in next(iter(measured.values())):
        cells = []
        for entry in (found[name] for found in measured.values()):
            cell = "{state_percent:.2f} / {largest_temporary_percent:.1f}; {operators} / {weights}"
            cells.append(cell.format(**entry))
            if "kernels" in entry:
                cells[-1] += f", {entry['kernels']} kernels"
        rows.append([name, *cells])
    title = (
        "(c) Memory that the wrapper keeps, in percent of the parameters' bytes / the largest "
        "temporary, in percent of the largest weight; (d) operators a step / weights:"
    )
    return _titled(title, rows)


def _short_steps(measured: dict[str, Any]) -> list[str]:
    """Return the table of (b) for short steps."""
    plain = [f"{found['none']['milliseconds']:.0f} ms" for found in measured.values()]
    rows = [["", *measured], ["none", *plain]]
    for method in ADDED:
        cells = [
            "{ratio:+.1f} ({low:+.1f} to {high:+.1f}); {share:.2f}".format(**found[method])
            for found in measured.values()
        ]
        rows.append([method, *cells])
    title = (
        f"(b) What it adds in milliseconds, likewise, to steps of {SHORT} images; as a share of "
        "what the penalty adds:"
    )
    return _titled(title, rows)


def _trainings(measured: dict[str, Any]) -> list[str]:
    """Return the table of (f)."""
    rows = [["", *measured]]
    form = (
        "{ratio:.2f} ({low:.2f}-{high:.2f}); {products:.2f}; {median_error:.2g} / {worst_error:.2g}"
    )
    for name in TRAININGS:
        cells = [
            form.format(**found[name]) if found[name] else "diverged" for found in measured.values()
        ]
        rows.append([name, *cells])
    title = (
        f"(f) As (a), of {DEFAULT}, over cycles of a training on digits: ratio; products with a "
        "weight in a step; median / worst error of sigma at the end in percent:"
    )
    return _titled(title, rows)


def _positive(text: str) -> int:
    """Read an option; argparse turns the error into a message."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive whole number, found {text!r}")
    return int(text)


def _model(text: str) -> str:
    if text.partition(".")[0] not in timm.list_models():
        raise argparse.ArgumentTypeError(f"expected the name of a timm model, found {text!r}")
    return text


def _parts(text: str) -> str:
    if not text or not set(text) <= set("abcdef"):
        raise argparse.ArgumentTypeError(f"expected letters from a to f, found {text!r}")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.bench", description=__doc__)
    parser.add_argument(
        "--models", nargs="+", type=_model, default=list(MODELS), help="any of timm's"
    )
    parser.add_argument("--repetitions", type=_positive, default=5, help=f"of {CYCLE} steps each")
    parser.add_argument(
        "--largest", type=_positive, default=600, help="millions of parameters in (e)"
    )
    parser.add_argument(
        "--parts",
        type=_parts,
        default="abcdef",
        help="a: the term alone; b: what it adds to a step; c, d: memory, operators and kernels; "
        "e: growth; f: the term alone while a model is trained",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is one"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/bench"),
        help="folder, whose bench.json, bench.md and bench.png are replaced: figures of several "
        "runs do not compare; a picture takes parts a and e",
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a GPU for --device cuda, found none that torch can use")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"expected --output to be a folder that can be made, found {error}")
    bench: dict[str, Any] = {
        "device": device.type,
        "machine": machine(device),
        "own_work": {},
        "exact_work": {},
        "whole_step": {},
        "short_step": {},
        "memory": {},
        "in_training": {},
    }
    for name in tqdm(options.models):
        torch.manual_seed(0)
        model = timm.create_model(name, **_case(name, device)[2]).to(device)
        if "a" in options.parts:
            bench["own_work"][name] = own_work(model, SETTINGS, options.repetitions)
            bench["exact_work"][name] = exact_work(model)
        if "c" in options.parts or "d" in options.parts:
            bench["memory"][name] = {
                setting: memory(model, options_) for setting, options_ in SETTINGS.items()
            }
        if "b" in options.parts:
            for parameter in model.parameters():
                parameter.grad = None
            bench["whole_step"][name] = whole_step(name, model, options.repetitions)
            bench["short_step"][name] = short_step(name, model, options.repetitions)
        if "f" in options.parts:
            size, _, _ = _case(name, device)
            bench["in_training"][name] = {
                title: along_training(model, create, size, options.repetitions)
                for title, create in TRAININGS.items()
            }
    if "e" in options.parts:
        bench["growth"] = growth(max(options.repetitions // 2, 1), options.largest, device)
    (options.output / "bench.json").write_text(json.dumps(bench, indent=1))
    text = table(bench)
    (options.output / "bench.md").write_text(text)
    print(text)
    picture = options.output / "bench.png"
    picture.unlink(missing_ok=True)
    if "growth" in bench and bench["own_work"]:
        draw_bench(picture, bench)


if __name__ == "__main__":
    main()
