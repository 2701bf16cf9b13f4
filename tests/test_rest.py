"""At rest: steps that multiply the best vector of each weight alone, while nothing rises."""

import copy
import math

import pytest
import torch
from torch import nn

from snr_hooks import SNROptimizer, discover
from snr_hooks.estimators import CALM, FEW, MOST_REFINEMENTS, REST, SubspaceIteration, _Batch
from snr_hooks.subspace import Subspaces
from snr_hooks.views import MatrixView

TOLERANCE = 5e-4


def some_layers():
    torch.manual_seed(0)
    shapes = ((30, 50), (40, 25), (24, 200), (3, 9))
    return nn.ModuleList(nn.Linear(n, m, bias=False).double() for m, n in shapes)


def move(layers, drift, seed=0):
    """Move weights by a drift relative to themselves, each in a direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layers.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p += (drift * p.std() * noise).to(p.dtype)


def settled(layers, n_vectors=3, tolerance=TOLERANCE, choose=None):
    """Return an iteration on the layers whose next ``REST`` steps are at rest, and its targets."""
    targets = discover(layers, choose=choose).targets
    iteration = SubspaceIteration(1, n_vectors, tolerance, 0)
    for _ in range(200):
        iteration.advance(targets)
        if rest_of(iteration) == REST:
            return iteration, targets
    raise AssertionError("the iteration never came to rest")


def moving_state(iteration):
    """Return the state as of an iteration that is not at rest."""
    return {
        name: {side: entry[side] for side in ("left", "right")}
        for name, entry in iteration.state_dict().items()
    }


def rest_of(iteration):
    found = {entry.get("rest") for entry in iteration.state_dict().values()}
    numbers = {None if rest is None else int(rest) for rest in found}
    assert len(numbers) == 1
    return numbers.pop()


def exact(target):
    weight = target.parameter.detach()
    return torch.linalg.matrix_norm(target.view.matrix(weight).double(), 2).item()


@pytest.fixture
def rows(monkeypatch):
    """How many vectors every product is taken with."""
    found = []

    def recording(prepare):
        def prepared(view, weight, vectors, out):
            product = prepare(view, weight, vectors, out)
            return lambda: (found.append(len(vectors)), product())

        return prepared

    for name in ("matvec", "rmatvec"):
        monkeypatch.setattr(MatrixView, name, recording(getattr(MatrixView, name)))
    return found


@pytest.mark.parametrize("n_vectors", [2, 3, 4, 5])
def test_one_step_after_those_at_rest_is_with_all_vectors(rows, n_vectors):
    layers = some_layers()
    iteration, targets = settled(layers, n_vectors)
    numbers = [min(n_vectors, *target.parameter.shape) for target in targets]
    for _ in range(3):
        rows.clear()
        for _ in range(REST + 1):
            iteration.advance(targets)
        assert rows[: 4 * REST] == [1] * 4 * REST
        # Those with as many vectors are multiplied together.
        assert sorted(rows[4 * REST :]) == sorted(numbers)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_term_at_rest_is_the_gradient_of_a_lower_bound_for_the_weights_as_they_are(side, dtype):
    layers = some_layers().to(dtype)
    iteration, targets = settled(layers)
    if (side == "right") != _next_is_right(iteration):
        for _ in range(REST + 1):
            iteration.advance(targets)
    assert rest_of(iteration) == REST
    assert (side == "right") == _next_is_right(iteration)
    for step in range(REST):
        move(layers, 1e-4, seed=step)
        for target, term in zip(targets, iteration.advance(targets), strict=True):
            weight = target.parameter.detach().double()
            u, v, add = term.u.double(), term.v.double(), term.add
            fixed = (v if side == "right" else u).clone()
            free = weight.clone().requires_grad_()
            bound = free @ fixed if side == "right" else free.mT @ fixed
            (gradient,) = torch.autograd.grad(bound.square().sum() / 2, free)
            added = torch.zeros_like(target.parameter)
            add(added, term.sigma)
            eps = 100 * torch.finfo(dtype).eps
            torch.testing.assert_close(added.double(), gradient, rtol=eps, atol=eps)
            assert term.sigma == pytest.approx(bound.norm().item(), rel=eps)
            assert term.sigma <= exact(target) * (1 + eps)
            assert term.sigma >= exact(target) * (1 - TOLERANCE)
            assert (u.norm().item(), v.norm().item()) == pytest.approx((1, 1), rel=eps)
    assert rest_of(iteration) == 0


def _next_is_right(iteration):
    return _next_is_right_of(iteration.state_dict())


def _next_is_right_of(state):
    entry = next(iter(state.values()))
    return entry["right"].shape[-2] > entry["left"].shape[-2]


@pytest.mark.parametrize("at", range(REST))
@pytest.mark.parametrize("change", ["jump", "the largest jumps", "other weights"])
def test_weights_that_changed_are_found_in_the_same_step(change, at):
    """What comes is what an iteration that never rests would have found from the same vectors."""
    layers = some_layers()
    iteration, targets = settled(layers)
    for _ in range(at):
        iteration.advance(targets)
    if change == "the largest jumps":
        move(layers[2:3], 2)
    elif change == "jump":
        move(layers, 2)
    else:
        for layer in layers:
            nn.init.orthogonal_(layer.weight)  # all singular values are alike
            layer.weight.data[0] *= 3  # but one
    twin = SubspaceIteration(1, 3, TOLERANCE, 0).restored(moving_state(iteration), targets)
    for term, expected in zip(iteration.advance(targets), twin.advance(targets), strict=True):
        assert term.sigma == expected.sigma
        assert torch.equal(term.u, expected.u)
        assert torch.equal(term.v, expected.v)


def with_small_weights(kind, n_vectors, side):
    """Return an iteration at rest on a side, its targets, and the first layers, which are small."""
    torch.manual_seed(0)
    kinds = {
        "matrix": [nn.Linear(40, 30, bias=False)],
        "blocks": [nn.Conv2d(16, 24, 3, groups=4)],
        "two": [nn.Conv2d(16, 24, 3, groups=4), nn.Linear(20, 30, bias=False)],
    }
    small = nn.ModuleList(kinds[kind]).double()
    layers = nn.ModuleList([*small, nn.Linear(80, 100), nn.Linear(9, 14)]).double()
    targets = discover(layers, choose="blocks").targets
    iteration = SubspaceIteration(1, n_vectors, TOLERANCE, 0)
    for _ in range(200):
        iteration.advance(targets)
        if rest_of(iteration) == REST - 1 and _next_is_right(iteration) == side:
            return iteration, targets, small
    raise AssertionError("the iteration never came to rest on this side")


def jump(layers, size=1.0):
    """Change the last rows of each, of one block if there are any."""
    with torch.no_grad():
        for layer in layers:
            rows = layer.weight[-6:]
            rows += size * torch.linspace(-1, 1, rows.numel()).sin().view(rows.shape)


def copies(terms):
    return [(term.sigma_as_tensor(), term.u.clone(), term.v.clone()) for term in terms]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("n_vectors", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["matrix", "blocks", "two"])
@pytest.mark.parametrize("side", [True, False])
def test_a_small_weight_that_jumps_gets_two_products_with_all_its_vectors(
    monkeypatch, n_vectors, kind, side
):
    """From the same vectors come the same ones; the other weights rest as if nothing was."""
    monkeypatch.setattr("snr_hooks.estimators.MOST_REFINEMENTS", 1)
    iteration, targets, small = with_small_weights(kind, n_vectors, side)
    state = iteration.state_dict()
    undisturbed = copies(iteration.restored(state, targets).advance(targets))
    jump(small)
    twin = SubspaceIteration(2, n_vectors, math.inf, 0).restored(moving_state(iteration), targets)
    expected = copies(twin.advance(targets))
    shown, before = copies(iteration.peek(targets)), iteration.n_products_taken
    terms = iteration.advance(targets)
    found, after = copies(terms), iteration.state_dict()
    n = len(small)
    assert iteration.n_products_taken - before == len(targets) + 2 * n
    assert rest_of(iteration) == REST - 2
    assert all(map(same, found, expected[:n] + undisturbed[n:]))
    assert all(map(same, found, shown))
    for i, target in enumerate(targets):
        source = twin.state_dict() if i < n else state
        for key in ("left", "right"):
            assert torch.equal(after[target.name][key], source[target.name][key])
        added = torch.zeros_like(target.parameter)
        terms[i].add(added, terms[i].sigma)
        sigma, u, v = (part.view(-1, *part.shape[-1:]) for part in found[i])
        outer = sigma.view(-1, 1, 1) * u.view(-1, u.shape[-1], 1) * v.view(-1, 1, v.shape[-1])
        torch.testing.assert_close(added, outer.view(added.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_vectors", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["matrix", "blocks", "two"])
@pytest.mark.parametrize("side", [True, False])
def test_a_small_weight_that_jumped_rests_with_the_pair_that_was_found(n_vectors, kind, side):
    iteration, targets, small = with_small_weights(kind, n_vectors, side)
    jump(small)
    pairs = copies(iteration.advance(targets))
    for _ in range(2):
        resumed = iteration.restored(iteration.state_dict(), targets)
        before = iteration.n_products_taken
        found = copies(iteration.advance(targets))
        assert iteration.n_products_taken - before == len(targets)
        assert all(map(same, copies(resumed.advance(targets)), found))
        for target, (sigma, u, v), (_, old_u, old_v) in zip(targets, found, pairs, strict=True):
            matrix = target.view.matrix(target.parameter.detach())
            fixed, old, new, map_ = (v, old_v, u, matrix) if side else (u, old_u, v, matrix.mT)
            assert torch.equal(fixed, old)
            image = (map_ @ fixed.view(*map_.shape[:-2], -1, 1)).view(new.shape)
            torch.testing.assert_close(sigma[..., None] * new, image, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_vectors", [2, 4])  # of which no image leans between two pairs
def test_a_small_weight_that_jumps_is_refined_as_long_as_that_raises_its_sigma(n_vectors):
    counts = set()
    for size in torch.logspace(-2, 0.5, 60).tolist():
        iteration, targets, small = with_small_weights("matrix", n_vectors, side=True)
        jump(small, size)
        state, target = moving_state(iteration), targets[0]
        weight, (v, *_) = target.parameter.detach(), state[target.name]["right"]
        image, partner = weight @ v, state[target.name]["left"][0]
        sigmas, rises = [image.norm().item()], image.norm() > (1 + TOLERANCE) * (image @ partner)
        twin = SubspaceIteration(2, n_vectors, math.inf, 0).restored(state, targets)
        while rises and len(sigmas) <= MOST_REFINEMENTS:
            sigmas.append(twin.advance(targets)[0].sigma)
            rises = sigmas[-1] > (1 + TOLERANCE) * sigmas[-2]
        before = iteration.n_products_taken
        assert iteration.advance(targets)[0].sigma == pytest.approx(sigmas[-1], rel=1e-12)
        n_pairs = len(sigmas) - 1
        assert iteration.n_products_taken - before == len(targets) + 2 * n_pairs
        counts.add(n_pairs)
    assert len(counts) > 2
    assert counts >= {0, MOST_REFINEMENTS}


def test_a_weight_that_overflows_in_its_own_steps_ends_the_rest():
    layers = some_layers().float()
    iteration, targets = settled(layers)
    state = iteration.state_dict()["1.weight"]
    with torch.no_grad():
        weight = layers[1].weight.uniform_(1, 2)  # whose product with the best vector is small
        if _next_is_right(iteration):
            weight -= torch.outer(weight @ state["right"][0], state["right"][0])
        else:
            weight -= torch.outer(state["left"][0], state["left"][0] @ weight)
        weight *= 3e38 / weight.abs().max()
    before = iteration.n_products_taken
    terms = iteration.advance(targets)
    assert iteration.n_products_taken - before < 2 * len(targets)  # no step of all
    assert not math.isfinite(terms[1].sigma)
    assert rest_of(iteration) is None


def test_few_is_counted_in_entries_of_matrices():
    """A gain of a normalized weight is small, and what it takes a product with is not."""
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(90, 60), nn.Linear(50, 30)]).double()
    nn.utils.parametrizations.weight_norm(layers[0])
    layers[0].parametrizations.weight.original1.requires_grad_(False)
    iteration, targets = settled(layers, choose={"0.*": {"weight": "effective"}})
    assert [target.parameter.numel() for target in targets] == [60, 1500]
    with torch.no_grad():
        targets[0].parameter[:8] *= torch.linspace(1, 40, 8)[:, None]
    before = iteration.n_products_taken
    iteration.advance(targets)
    assert rest_of(iteration) is None
    assert iteration.n_products_taken - before >= 2 * len(targets)  # a step of all


@pytest.mark.parametrize(("rows", "few"), [(10, True), (11, False)])
def test_a_quarter_of_the_entries_is_few(rows, few):
    torch.manual_seed(0)
    shapes = ((rows, 20), (30, 20))
    layers = nn.ModuleList(nn.Linear(n, m, bias=False).double() for m, n in shapes)
    assert (rows * 20 <= FEW * sum(m * n for m, n in shapes)) == few
    iteration, targets = settled(layers)
    move(layers[:1], 2)
    iteration.advance(targets)
    assert (rest_of(iteration) == REST - 1) == few


def test_a_weight_that_is_rescaled_stays_at_rest_with_the_right_sigma():
    layers = some_layers()
    iteration, targets = settled(layers)
    with torch.no_grad():
        for layer in layers:
            layer.weight *= 1e3
    for target, term in zip(targets, iteration.advance(targets), strict=True):
        assert term.sigma == pytest.approx(exact(target), rel=TOLERANCE)
    assert rest_of(iteration) == REST - 1


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_weights_that_are_zero_or_not_finite_do_not_rest(value):
    layers = some_layers()
    iteration, targets = settled(layers)
    sound = copy.deepcopy(layers.state_dict())
    with torch.no_grad():
        layers[0].weight.fill_(value)
    for _ in range(3):
        term = iteration.advance(targets)[0]
        assert not term.sigma > 0 or term.sigma == math.inf
        if value == 0:
            assert term.u.isfinite().all()
            assert term.v.isfinite().all()
    layers.load_state_dict(sound)
    for target, term in zip(targets, iteration.advance(targets), strict=True):
        assert term.sigma == pytest.approx(exact(target), rel=0.1)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, "an infinite entry"])
def test_a_step_takes_one_product_where_a_weight_is_zero_or_not_finite(value):
    layers = some_layers()
    iteration, targets = settled(layers)
    with torch.no_grad():
        if value == "an infinite entry":
            layers[0].weight[0, 0] = math.inf
        else:
            layers[0].weight.fill_(value)
    iteration.advance(targets)  # which finds out
    for _ in range(REST + 2):
        before = iteration.n_products_taken
        iteration.advance(targets)
        assert iteration.n_products_taken - before == len(targets)
        assert rest_of(iteration) is None


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e-36),
        (torch.float32, 1e-40),
        (torch.float32, 1e-44),
        (torch.float64, 1e-150),
        (torch.float64, 1e-170),
        (torch.float64, 1e-310),
    ],
)
def test_weights_near_and_below_the_normal_numbers_leave_terms_finite_at_rest(dtype, scale):
    layers = some_layers().to(dtype)
    iteration, targets = settled(layers)
    exactly = [exact(target) * scale for target in targets]
    with torch.no_grad():
        for layer in layers:
            layer.weight *= scale
    for _ in range(2):
        for term, sigma in zip(iteration.advance(targets), exactly, strict=True):
            assert term.u.isfinite().all()
            assert term.v.isfinite().all()
            assert 0 <= term.sigma <= sigma * (1 + 1e-3) or scale in (1e-44, 1e-310)
            assert term.sigma >= sigma * (1 - 1e-3) or scale not in (1e-36, 1e-150)


@pytest.mark.parametrize("options", [(2, 3, TOLERANCE, 0), (1, 3, math.inf, 0)])
def test_a_state_at_rest_rests_no_more_where_no_step_does(options):
    iteration, targets = settled(some_layers())
    other = SubspaceIteration(*options).restored(iteration.state_dict(), targets)
    assert rest_of(other) is None
    other.advance(targets)
    assert rest_of(other) is None


def test_weights_of_one_kind_rest_while_those_of_another_move():
    layers = some_layers()[:3].append(nn.Linear(30, 20, bias=False))  # in float32, the last
    iteration, targets = settled(layers)
    for step in range(REST):
        move(layers[3:], 1.0, seed=step)
        before, n_before = iteration.state_dict(), iteration.n_products_taken
        iteration.advance(targets)
        after = iteration.state_dict()
        assert [int(after[t.name].get("rest", -1)) for t in targets] == [*[REST - 1 - step] * 3, -1]
        for target in targets[:3]:
            for side in ("left", "right"):
                assert torch.equal(after[target.name][side], before[target.name][side])
        assert iteration.n_products_taken - n_before >= len(targets)
    weight = targets[3].parameter.detach()
    [*_, shown] = iteration.peek(targets)
    assert shown.sigma == pytest.approx(torch.linalg.matrix_norm(weight, 2).item(), rel=0.05)


@pytest.mark.parametrize("side", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_term_at_rest_is_exact_for_every_view(side, dtype):
    torch.manual_seed(0)
    model = nn.ModuleList(
        [
            nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last),
            nn.ConvTranspose2d(6, 8, 3),
            nn.Conv2d(8, 12, 3, groups=4),
            nn.Linear(20, 10),
            nn.utils.parametrizations.weight_norm(nn.Linear(12, 9)),
        ]
    ).to(dtype)
    choose = {"*": {"view": "blocks"}, "4.*": {"weight": "effective"}}
    targets = discover(model, choose=choose).targets
    assert len(targets) == 6
    iteration = SubspaceIteration(1, 3, TOLERANCE, 0)
    for _ in range(100):
        iteration.advance(targets)
        if rest_of(iteration) == REST and _next_is_right(iteration) == side:
            break
    else:
        pytest.fail("the iteration never came to rest on this side")
    for p in model.parameters():
        p.data *= 1.5
    terms = iteration.advance(targets)
    assert rest_of(iteration) == REST - 1
    for target, term in zip(targets, terms, strict=True):
        matrix = target.view.matrix(target.parameter.detach()).double()
        u, v = term.u.double(), term.v.double()
        sigma = torch.as_tensor(term.sigma, dtype=torch.float64)[..., None]
        if u.ndim > 1:  # blocks, and one singular value each
            matrix = matrix[:, None]
        free = matrix @ v[..., None] if side else matrix.mT @ u[..., None]
        torch.testing.assert_close(
            sigma * (u if side else v), free[..., 0], rtol=1e-3, atol=1e-3 * float(sigma.max())
        )


@pytest.mark.parametrize("ahead", [1, 3, 5])
def test_weights_that_rest_at_different_times_continue_from_a_state_as_without_one(ahead):
    """Some weights miss a step, so that they are on the other side from others like them."""
    layers = some_layers()
    targets = discover(layers).targets
    live = SubspaceIteration(1, 3, TOLERANCE, 0)
    live.advance(targets)
    move(layers, 2)  # so that none is at rest
    for chosen in (*[targets[:2]] * ahead, targets):  # some come to rest sooner
        live.advance(chosen)
    assert len(live._batches) == 2
    n_batches = []
    for _ in range(2 * REST):
        n_batches.append(len(live._batches))
        other = live.restored(live.state_dict(), targets)
        shown = [term.sigma for term in live.peek(targets)]
        terms = live.advance(targets)
        assert shown == [term.sigma for term in terms]
        for term, expected in zip(other.advance(targets), terms, strict=True):
            assert term.sigma == expected.sigma
            assert torch.equal(term.u, expected.u)
            assert torch.equal(term.v, expected.v)
        states = other.state_dict(), live.state_dict()
        for name, entry in states[1].items():
            assert entry.keys() == states[0][name].keys()
            assert all(torch.equal(part, states[0][name][key]) for key, part in entry.items())
    assert n_batches == sorted(n_batches, reverse=True)  # where they meet they stay together


@pytest.mark.parametrize(
    ("options", "choose"),
    [
        ({"tolerance": math.inf}, None),
        ({"n_power_iterations": 1}, None),
        ({"n_vectors": 1}, None),
        ({}, {"*": {"top": 2}}),
        ({"n_vectors": 4}, {"1.weight": {"top": 2}}),
    ],
)
def test_who_asks_for_the_same_work_in_every_step_gets_it(monkeypatch, options, choose):
    calls = []
    for name in ("stay", "step"):
        call = getattr(Subspaces, name)
        monkeypatch.setattr(
            Subspaces, name, lambda s, *a, n=name, c=call: (calls.append(n), c(s, *a))[1]
        )
    layers = some_layers()[:3]
    opt = SNROptimizer(
        torch.optim.SGD(layers.parameters(), lr=0.0), layers, 0.1, choose=choose, **options
    )
    for _ in range(12):
        opt.zero_grad()
        sum(p.sum() for p in layers.parameters()).backward()
        opt.step()
    assert "stay" not in calls
    assert all("rest" not in e for e in opt.state_dict()["snr_hooks"]["vectors"].values())


@pytest.mark.parametrize("view", ["matrix", "blocks"])
def test_a_run_resumed_at_rest_is_bitwise_the_uninterrupted_one(view):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 6), nn.Linear(6, 2)
        )
        inner = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        return model, SNROptimizer(inner, model, 0.01, choose=view)

    def train(model, opt, n_steps):
        for _ in range(n_steps):
            opt.zero_grad()
            model(torch.linspace(-1, 1, 4 * 4 * 4 * 4).view(4, 4, 4, 4)).square().mean().backward()
            opt.step()

    rests = set()
    for n_steps in range(40, 41 + REST):
        model, opt = build()
        train(model, opt, n_steps)
        state = copy.deepcopy((model.state_dict(), opt.state_dict()))
        rests |= {int(e.get("rest", -1)) for e in state[1]["snr_hooks"]["vectors"].values()}
        train(model, opt, REST + 3)
        resumed, other = build()
        resumed.load_state_dict(state[0])
        other.load_state_dict(state[1])
        train(resumed, other, REST + 3)
        for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)
        for name, entry in opt.state_dict()["snr_hooks"]["vectors"].items():
            for key, part in entry.items():
                assert torch.equal(part, other.state_dict()["snr_hooks"]["vectors"][name][key])
    assert rests >= set(range(REST + 1))


def test_looking_at_rest_changes_nothing_and_shows_the_next_term():
    layers = some_layers()
    iteration, targets = settled(layers)
    for _ in range(REST + 2):
        move(layers, 1e-5)
        before = iteration.state_dict()
        shown = [term.sigma for term in iteration.peek(targets)]
        for name, entry in iteration.state_dict().items():
            assert entry.keys() == before[name].keys()
            assert all(torch.equal(part, before[name][key]) for key, part in entry.items())
        assert [term.sigma for term in iteration.advance(targets)] == shown


def test_vectors_that_look_around_lean_in_steps_that_move_them_alone(monkeypatch):
    calls = []
    for owner, name in ((Subspaces, "lean"), (_Batch, "rest")):
        call = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda s, *a, n=name, c=call: (calls.append(n), c(s, *a))[1]
        )
    layers = some_layers()[:3]
    iteration, targets = settled(layers)
    calls.clear()
    for _ in range(REST + 1):
        iteration.advance(targets)
    assert calls == ["rest"] * (REST + 1) + ["lean"]


def test_a_weight_that_is_new_ends_the_rest_of_the_others():
    layers = some_layers()[:3]
    iteration, _ = settled(layers[:2])
    before = iteration.n_products_taken
    iteration.advance(discover(layers).targets)
    assert iteration.n_products_taken - before >= 3
    assert rest_of(iteration) != REST - 1


@pytest.mark.parametrize("rest", [torch.tensor(-1), torch.tensor(REST + 1), torch.ones(2), 2])
def test_a_state_with_another_number_of_steps_is_refused(rest):
    iteration, targets = settled(some_layers())
    state = {name: {**entry} for name, entry in iteration.state_dict().items()}
    state[targets[0].name]["rest"] = rest
    with pytest.raises(ValueError, match=rf"expected 'rest' of '0.weight'.* 0 to {REST}, found"):
        iteration.restored(state, targets)


def test_a_state_at_rest_whose_first_vector_is_not_of_unit_length_is_refused():
    iteration, targets = settled(some_layers())
    state = {name: {**entry} for name, entry in iteration.state_dict().items()}
    side = "right" if _next_is_right(iteration) else "left"
    entry = state[targets[0].name]
    entry[side] = entry[side] * torch.tensor([[1.5], [1.0], [1.0]])
    with pytest.raises(ValueError, match="which is at rest, to be unit vectors, found norms"):
        iteration.restored(state, targets)
    del entry["rest"]
    iteration.restored(state, targets)  # a step with all vectors takes account of their lengths


@pytest.mark.parametrize("after_rest", [False, True])
def test_a_step_that_raises_few_sigmas_by_much_is_followed_by_rest(after_rest):
    """A few get further products, until they rise no more; with many, only the fast ones do."""
    layers = some_layers()[:3]
    iteration, targets = settled(layers)
    sizes = [target.parameter.numel() for target in targets]
    limit = TOLERANCE if after_rest else CALM * TOLERANCE
    found = set()
    for step in range(120):
        move(layers if step % 2 else layers[1:2], 0.05 * 1.02**step, seed=step)
        state = moving_state(iteration)
        rises = rises_in_a_step_of_all(state, targets)
        if after_rest:
            as_at_rest(state)
        iteration = iteration.restored(state, targets)
        iteration.advance(targets)
        rising = [i for i, rise in enumerate(rises) if rise > limit]
        few = sum(sizes[i] for i in rising) <= FEW * sum(sizes)
        assert rest_of(iteration) == (REST if few else None)
        refined = rising if few else [i for i, rise in enumerate(rises) if rise > TOLERANCE]
        n_more = iteration.n_products_taken - len(targets)
        assert 2 * len(refined) <= n_more <= 8 * len(refined)
        found.add((few, bool(rising), any(rise > TOLERANCE for rise in rises)))
    # None rises; few do, by more than the tolerance, or many; few or many by a part of it.
    assert found >= {(True, False, False), (True, True, True), (False, True, True)}
    assert after_rest or found >= {(True, True, False), (False, True, False)}


def test_weights_that_end_their_rest_come_to_rest_again_where_rises_are_small():
    """Not where a step raises many by more than a fifth of the tolerance, as if none had rested."""
    layers = some_layers()[:3]
    iteration, targets = settled(layers)
    side, state = _next_is_right(iteration), moving_state(iteration)
    move(layers, 0.12)
    with torch.no_grad():  # turned, so that the products are longer than along their partners
        for layer in layers:
            skew = torch.randn(*[len(layer.weight) if side else layer.weight.shape[1]] * 2)
            turn = torch.linalg.matrix_exp(0.02 * (skew - skew.T).double())
            layer.weight.copy_(turn @ layer.weight if side else layer.weight @ turn)
    rises = rises_in_a_step_of_all(state, targets)
    assert sum(CALM * TOLERANCE < rise < TOLERANCE for rise in rises) > 1
    assert max(rises) < TOLERANCE
    before = iteration.n_products_taken
    iteration.advance(targets)
    assert iteration.n_products_taken - before == 2 * len(targets)
    assert rest_of(iteration) is None


def rises_in_a_step_of_all(state, targets):
    """By how much a step raises each sigma, relative to it."""
    first = "right" if _next_is_right_of(state) else "left"
    twin = SubspaceIteration(1, 3, math.inf, 0).restored(state, targets)
    rises = []
    for target, term in zip(targets, twin.advance(targets), strict=True):
        vector, weight = state[target.name][first][0], target.parameter.detach()
        image = weight @ vector if first == "right" else vector @ weight
        rises.append(term.sigma / (image.norm() / vector.norm()).item() - 1)
    return rises


def as_at_rest(state):
    """Let the steps at rest be over: the next is of all."""
    first = "right" if _next_is_right_of(state) else "left"
    for entry in state.values():
        entry["rest"] = torch.tensor(0)
        entry[first] = entry[first].clone()
        entry[first][0] /= entry[first][0].norm()


def test_a_product_that_is_longer_by_more_than_the_tolerance_ends_the_rest():
    """Power iteration would raise sigma by that: neither more nor less decides."""
    woken = set()
    for drift in torch.logspace(-4, -1, 60).tolist():
        layers = some_layers()[:1]
        iteration, targets = settled(layers)
        (entry,) = iteration.state_dict().values()
        move(layers, drift)
        weight = layers[0].weight.detach()
        if _next_is_right(iteration):
            product = weight @ entry["right"][0]
            partner = entry["left"][-1]
        else:
            product = weight.mT @ entry["left"][0]
            partner = entry["right"][-1]
        longer = (product.norm() / (product @ partner)).item() - 1
        iteration.advance(targets)
        assert (rest_of(iteration) == REST - 1) == (longer < TOLERANCE)
        woken.add((longer < CALM * TOLERANCE, longer < TOLERANCE))
    assert woken == {(True, True), (False, True), (False, False)}
