"""Nothing grows: not over many steps, and not over many wrappers."""

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from _models import build

from snr_hooks import SNROptimizer
from snr_hooks.hooks import _hooked


def resident():
    """Bytes of memory that this process holds."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def held(model):
    """What must not grow: objects, open files, hooks on parameters, hooked weights."""
    gc.collect()
    hooks = [
        len(getattr(p, name) or ())
        for p in model.parameters()
        for name in ("_backward_hooks", "_post_accumulate_grad_hooks")
    ]
    return {
        "objects": len(gc.get_objects()),
        "files": len(os.listdir("/proc/self/fd")),
        "hooks": hooks,
        "hooked": len(_hooked),
    }


def assert_no_growth(before, after, *, objects):
    assert after.pop("objects") - before.pop("objects") <= objects
    assert after == before


OPTIONS = [{}, {"n_power_iterations": 0.125, "n_vectors": 1}]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("options", OPTIONS)
def test_twenty_thousand_steps(options):
    model = build("mlp", torch.float32)
    base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    opt = SNROptimizer(base, model, **options)

    def steps(n):
        for _ in range(n):
            opt.zero_grad()
            model(model.example).square().mean().backward()
            opt.step()

    steps(4000)  # allocators and caches have settled
    before, bytes_before = held(model), resident()
    steps(16000)
    assert_no_growth(before, held(model), objects=50)
    assert resident() - bytes_before < 2**21  # 131 bytes a step
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("remove", [True, False])
def test_three_thousand_wrappers_leave_nothing_behind(remove):
    model = build("mlp", torch.float32)
    base = torch.optim.SGD(model.parameters(), lr=0.01)

    def cycles(n):
        for i in range(n):
            opt = SNROptimizer(base, model)
            if i % 10 == 0:  # the first use of a weight takes most of the time
                model(model.example).square().mean().backward()
                opt.zero_grad()
            if remove:
                opt.remove()
            gone.append(weakref.ref(opt))
            del opt  # before the next one wraps the same weights

    gone = []
    gc.collect()
    gc.disable()  # a cycle of references would keep its wrapper
    try:
        cycles(20)
        opt = SNROptimizer(base, model)
        term, hooks = weakref.ref(opt._term), weakref.ref(opt._hooks)
        opt.remove()
        del opt
        assert term() is hooks() is None
        assert not any(reference() for reference in gone)
    finally:
        gc.enable()
    cycles(480)
    before, bytes_before = held(model), resident()
    cycles(2500)
    assert_no_growth(before, held(model), objects=2500 + 50)  # and the weak references here
    assert resident() - bytes_before < 2**22
    assert not any(reference() for reference in gone)
    assert all(not getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())
    assert base.param_groups[0].keys() == torch.optim.SGD([torch.ones(1)]).param_groups[0].keys()
