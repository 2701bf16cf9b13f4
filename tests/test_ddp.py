"""DistributedDataParallel trains as one process on the joined batch does."""

import pytest

WORKER = "_ddp_worker.py"
TRAJECTORIES = [
    "plain",
    "accumulating",
    "accumulating_in_views",
    "clipping",
    "static_graph",
    "small_buckets",
    "find_unused",
    "zero",
    "operators",
    "decoupled",
]


@pytest.mark.parametrize("case", TRAJECTORIES)
def test_fifty_steps_equal_those_of_one_process_on_the_joined_batch(found, case):
    for rank in found["trajectories"]:
        assert rank[case]["targets"] == [
            "conv.weight",
            "hidden.weight",
            "head.weight",
            "extra.weight",
        ]
        assert rank[case]["from_reference"] <= 5e-12
        assert rank[case]["from_plain"] > 0.05


def test_parameters_and_vectors_are_bitwise_the_same_on_all_ranks(found):
    for rank in found["trajectories"]:
        assert rank.keys() == {*TRAJECTORIES, "default"}
        assert not any(case["differing"] for case in rank.values())


def test_further_products_are_decided_alike_up_to_the_tolerance(found):
    """Which weights get some may differ from one process, but not between ranks; see above."""
    for rank in found["trajectories"]:
        assert rank["default"]["from_reference"] <= 0.01 < 0.05 < rank["default"]["from_plain"]


def test_a_weight_used_on_some_ranks_gets_its_share_with_a_warning(found):
    n = len(found["unused_on_some_ranks"])
    for rank in found["unused_on_some_ranks"]:
        shares = {"conv.weight": 1, "hidden.weight": 1, "head.weight": 1, "extra.weight": 1 / n}
        assert rank["shares"] == pytest.approx(shares, rel=1e-12)
        assert rank["differing"] == []
        assert len(rank["warnings"]) == 10  # every other step
        for message in rank["warnings"]:
            assert message.startswith("'extra.weight' has a gradient that no backward pass of this")


def test_a_checkpoint_of_rank_0_continues_on_all(found):
    # With more than two summands the order counts, and a new DDP sums in another order in its
    # first step, before it arranges its buckets.
    bound = 0 if len(found["resumed"]) == 2 else 1e-14
    assert max(rank["distance"] for rank in found["resumed"]) <= bound


def test_the_optimizer_may_be_wrapped_before_ddp(two):
    assert max(rank["from_reference"] for rank in two["wrapped_first"]) <= 1e-12


def test_a_bfloat16_communication_hook_rounds_the_term_and_keeps_ranks_together(two):
    for rank in two["compressed"]:
        assert max(rank["errors"].values()) < 2**-7
        assert rank["differing"] == []


def test_ranks_that_run_out_of_data_leave_by_join(two):
    assert [rank["steps"] for rank in two["joined"]] == [5, 6]
    assert all(rank["differing"] == [] for rank in two["joined"])


def test_running_statistics_are_averaged(found):
    n = len(found["averaged"])
    assert found["averaged"] == [(n - 1) / 2] * n
