"""E-Sparse on whole models: the pattern holds where it is said to, dense weights are only moved, and limits are those
of its neighbours.
"""

import pytest
import torch
from pydantic import ValidationError

from compresso.core.sparsity import lowest_in_groups
from compresso.methods.e_sparse import ESparse
from compresso.methods.wanda import Wanda
from compresso.sweep.targets import Where
from tests.methods.conftest import MakeJob


def holds(weight: torch.Tensor, n: int = 2, m: int = 4) -> bool:
    return bool(((weight.reshape(len(weight), -1, m) != 0).sum(dim=2) == n).all())


def test_the_pattern_holds_as_it_lies_or_in_the_order_of_the_records(make_job: MakeJob) -> None:
    job = ESparse()(make_job())
    facts, state = job.records["e_sparse"], job.model.state_dict()
    assert facts["folded"] == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    readers = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    orders = {tuple(group["linears"]): group["order"] for group in facts["orders"]}
    assert orders and not any("down_proj" in name for names in orders for name in names)
    for name in (name for name in state if name.endswith("proj.weight")):
        parent, _, own = name.removesuffix(".weight").rpartition(".")
        together = next((names for names in readers if own in names), (own,))
        order = orders.get(tuple(f"{parent}.{one}" for one in together))
        assert holds(state[name] if order is None else state[name][:, order])
        assert order is None or not holds(state[name])
    assert all(max(shares.values()) >= 1 for shares in facts["retained"].values())
    assert facts["sparsity"] == 0.5


def test_with_folded_orders_alone_every_weight_is_n_of_m_as_it_lies(make_job: MakeJob) -> None:
    job = ESparse(shuffle="folded")(make_job())
    assert all(holds(tensor) for name, tensor in job.model.state_dict().items() if name.endswith("proj.weight"))
    assert job.records["e_sparse"]["orders"] == [] and len(job.records["e_sparse"]["folded"]) == 3


def test_where_all_weights_stay_only_their_places_change(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    import compresso.methods.e_sparse as module

    monkeypatch.setattr(module, "lowest_in_groups", lambda scores, n, m: torch.zeros_like(scores, dtype=torch.bool))
    dense, job = make_job(), ESparse()(make_job(folder="other"))
    ids = torch.tensor([row["input_ids"] for row in dense.rows])
    with torch.no_grad():
        torch.testing.assert_close(
            job.model(input_ids=ids).logits, dense.model(input_ids=ids).logits, atol=1e-5, rtol=1e-5
        )
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(job.model.get_parameter(name), dense.model.get_parameter(name))


def test_without_shuffle_a_huge_alpha_is_wanda(make_job: MakeJob) -> None:
    wanda = Wanda(pattern="2:4", sparsity=None)(make_job()).model.state_dict()
    found = ESparse(alpha=1e9, shuffle="none")(make_job(folder="other")).model.state_dict()
    assert all(torch.equal(tensor, wanda[name]) for name, tensor in found.items())


def test_without_shuffle_norm_and_difference_of_entropies_it_is_magnitude(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    import compresso.methods.e_sparse as module

    monkeypatch.setattr(module, "entropy", lambda counts: torch.ones(counts.shape[1]))
    dense = make_job().model.state_dict()
    found = ESparse(pattern="1:4", alpha=0, shuffle="none")(make_job(folder="other")).model.state_dict()
    for name, tensor in found.items():
        if name.endswith("proj.weight"):
            assert torch.equal(tensor == 0, lowest_in_groups(dense[name].abs(), 1, 4) | (dense[name] == 0))


def test_without_the_writers_down_has_an_order_in_the_records(make_job: MakeJob) -> None:
    job = ESparse(where=Where(modules=("*.down_proj",)))(make_job())
    facts = job.records["e_sparse"]
    assert facts["folded"] == [] and facts["orders"]
    assert {name for group in facts["orders"] for name in group["linears"]} <= {
        f"model.layers.{i}.mlp.down_proj" for i in range(3)
    }


def test_a_block_that_cuts_groups_is_refused() -> None:
    with pytest.raises(ValidationError, match="block=10 is no multiple of the 4 of pattern 2:4"):
        ESparse(block=10)
