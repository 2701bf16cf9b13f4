"""Models sharded by ``fully_shard`` (FSDP2) train as whole ones do, and no weight is gathered."""

import weakref

import pytest
import torch

from snr_hooks.sharding import add_up

WORKER = "_fsdp_worker.py"
TRAJECTORIES = [
    "default",
    "clipped",
    "adamw",
    "one_vector",
    "iteration",
    "every_other_step",
    "exact",
    "decoupled",
    "two_values",
]


@pytest.mark.parametrize("case", TRAJECTORIES)
def test_twenty_steps_equal_those_of_the_whole_model_on_the_joined_batch(found, case):
    for rank in found["trajectories"]:
        assert len(rank[case]["targets"]) == 5  # also the weight with a single row
        assert rank[case]["from_reference"] <= 5e-12
        assert rank[case]["from_plain"] > 0.01


def test_vectors_are_bitwise_the_same_on_all_ranks(found):
    for rank in found["trajectories"]:
        assert rank.keys() == set(TRAJECTORIES)
        assert not any(case["differing"] for case in rank.values())


def test_other_layouts_equal_the_whole_model(found):
    for rank in found["layouts"]:
        assert "(Shard(dim=1),)" in rank["along_columns"]["placements"]
        if len(found["layouts"]) == 4:
            assert rank["replicated"]["placements"] == ["(Replicate(), Shard(dim=0))"]
        for case in rank.values():
            assert case["from_reference"] <= 1e-12


def test_the_term_is_that_of_the_sharded_master_weights_under_any_mixed_precision(two):
    for rank in two["terms"]:
        assert max(rank["float64"].values()) < 1e-9
        assert max(rank["bfloat16"].values()) < 1e-5
        assert max(rank["reduced_in_bfloat16"].values()) < 1e-5


def test_accumulation_without_communication_gets_one_term_a_step(found):
    assert max(found["accumulation"]) <= 1e-12


def test_a_step_adds_one_collective_of_three_vectors_a_weight_and_gathers_nothing(found):
    for rank in found["communication"]:
        lengths = {rank["outputs"], rank["inputs"]}
        seen = set()
        for plain, ours in zip(rank["plain"], rank["regularized"], strict=True):
            added = list(ours["gloo:all_reduce"])
            for size in plain["gloo:all_reduce"]:
                added.remove(size)
            assert len(added) == 1
            seen.add(added[0] / 4)
            others = {name: calls for name, calls in ours.items() if name != "gloo:all_reduce"}
            assert others == {
                name: calls for name, calls in plain.items() if name != "gloo:all_reduce"
            }
        assert seen == lengths  # in turn, as the sides alternate


def test_norms_and_audit_are_those_of_the_whole_model(two):
    n = len(two["norms"])
    for rank in two["norms"]:
        assert rank["difference"] < 1e-12
        assert rank["described"] == f"5 x 18 matrix, flatten(1), rows over {n} processes"
        sharded, whole = ([line.split()[-3:-1] for line in text] for text in rank["audit"])
        assert sharded == whole


def test_sharding_after_wrapping_and_fsdp1_are_refused_before_a_step(two):
    for rank in two["refused"]:
        assert rank.pop("unchanged")
        after = rank.pop("wrapped before fully_shard")
        assert "expected 'conv.weight' to be the parameter that was wrapped" in after
        assert "build the optimizer and the wrapper anew" in after
        assert rank.pop("operator").startswith("expected view 'matrix' of the stored weight for")
        reason = rank.pop("split twice")
        assert reason.startswith("sharded as (Shard(dim=0), Shard(dim=1)): only weights that")
        assert len(rank) == 4
        for message in rank.values():
            assert "found FullyShardedDataParallel (FSDP1)" in message
            assert "use torch.distributed.fsdp.fully_shard" in message


def test_a_checkpoint_of_two_processes_continues_on_two_and_on_four(found):
    assert max(found["checkpoints"]) <= 1e-12


def test_an_evaluation_before_wrapping_or_stepping_hides_no_weight(two):
    for rank in two["after_an_evaluation"]:
        assert len(rank["targets"]) == 5
        assert rank["from_reference"] <= 1e-12
        assert rank["step"] == rank["add"] == "no error"


def test_names_leave_wrappers_out_that_were_sharded(two):
    names = ["conv.weight", "up.weight", "hidden.weight", "narrow.weight", "head.weight"]
    assert two["wrapped_inside"] == [names, names]


def test_collectives_are_held_until_the_next_ones_so_that_no_thread_releases_their_tensors(
    monkeypatch,
):
    """Of two groups, as gloo's threads abort a process that ends meanwhile (see ``sharding``)."""

    class Work:
        waited = False

        def wait(self):
            self.waited = True

    seen = []

    def all_reduce(tensor, group, async_op):
        assert async_op
        work = Work()
        seen.append(weakref.ref(work))
        return work

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    add_up([("one", torch.ones(3)), ("other", torch.ones(3))])
    assert [work().waited for work in seen] == [True, True]
    add_up([])  # of a model that is not sharded
    assert [work() is None for work in seen] == [False, False]
    add_up([("one", torch.ones(3))])
    assert [work() is None for work in seen] == [True, True, False]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    add_up([("not a member", torch.ones(3))])
