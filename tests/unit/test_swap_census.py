"""The census: each byte of the model's weights once, with the modules that use it whole."""

import pytest
import torch
from torch import nn

from offload.swap.census import (
    Census,
    ModuleInfo,
    WeightInfo,
    gives_rows,
    named_weights,
    storage_key,
    take_census,
    unmovable_reason,
    uses_rows_only,
)


class Tied(nn.Module):
    """An embedding whose table is also the last layer's weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.inner = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight


def sizes(census):
    return {weight.name: weight.nbytes for weight in census.weights}


def users(census):
    return {module.name: module.weights for module in census.modules}


def test_weights_are_listed_in_the_model_s_order_with_their_users():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.LayerNorm(5))
    census = take_census(model)
    assert sizes(census) == {"0.weight": 60, "0.bias": 20, "2.weight": 20, "2.bias": 20}
    assert list(sizes(census)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert users(census) == {"0": ("0.weight", "0.bias"), "2": ("2.weight", "2.bias")}
    assert census.weight_nbytes == 120


def test_tied_weights_are_counted_once_and_used_twice():
    census = take_census(Tied())
    assert sizes(census) == {"embed.weight": 176, "inner.weight": 64}
    assert users(census) == {"inner": ("inner.weight",), "head": ("embed.weight",)}


def test_two_parameters_over_the_same_bytes_are_one_weight():
    model = nn.Module()
    model.first = nn.Parameter(torch.zeros(3, 4))
    model.second = nn.Parameter(model.first.data)
    found = list(named_weights(model))
    assert [(name, len(parameters)) for name, parameters in found] == [("first", 2)]


def test_parts_of_one_storage_are_weights_of_their_own():
    whole = torch.zeros(10)
    model = nn.ParameterList([nn.Parameter(whole[:4]), nn.Parameter(whole[4:])])
    assert sizes(take_census(model)) == {"0": 16, "1": 24}


def test_weights_without_bytes_are_told_apart():
    model = nn.ParameterList([nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(0))])
    assert sizes(take_census(model)) == {"0": 0, "1": 0}


def test_weights_on_the_meta_device_are_told_apart():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), Tied())
    assert sizes(take_census(model)) == {
        "0.weight": 64,
        "1.weight": 64,
        "2.embed.weight": 176,
        "2.inner.weight": 64,
    }


def test_lookups_use_rows_unless_they_scale_the_whole_table():
    assert uses_rows_only(nn.Embedding(5, 2))
    assert uses_rows_only(nn.EmbeddingBag(5, 2))
    assert not uses_rows_only(nn.Embedding(5, 2, max_norm=1.0))
    assert not uses_rows_only(nn.Linear(5, 2))
    census = take_census(nn.Sequential(nn.Embedding(5, 2), nn.Embedding(5, 2, max_norm=1.0)))
    assert users(census) == {"1": ("1.weight",)}
    assert set(sizes(census)) == {"0.weight", "1.weight"}


def test_containers_are_never_called():
    model = nn.Module()
    model.items = nn.ParameterList([nn.Parameter(torch.zeros(2))])
    model.named = nn.ParameterDict({"a": nn.Parameter(torch.zeros(3))})
    census = take_census(model)
    assert sizes(census) == {"items.0": 8, "named.a": 12}
    assert census.modules == ()


def test_a_module_s_own_parameters_are_its_to_use():
    model = nn.Module()
    model.scale = nn.Parameter(torch.zeros(2))
    model.absent = None
    model.register_parameter("none", None)
    assert users(take_census(model)) == {"": ("scale",)}


def test_frozen_weights_need_no_gradient():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 9, bias=False))
    model[0].weight.requires_grad_(False)
    census = take_census(model)
    assert [weight.trainable for weight in census.weights] == [False, True]
    assert census.module_nbytes() == {"0": 400, "1": 720}
    assert census.working_set_nbytes() == 720


def test_a_weight_that_one_of_its_owners_trains_is_trainable():
    model = nn.Module()
    model.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    model.trained = nn.Parameter(model.frozen.data)
    assert [weight.trainable for weight in take_census(model).weights] == [True]


def test_a_lookup_s_working_set_is_its_gradient_if_that_is_made_whole():
    table = nn.Embedding(5, 2)
    assert take_census(table).by_rows == {"weight"}
    assert take_census(table).working_set_nbytes() == 0
    assert take_census(table, whole_gradients=True).module_nbytes() == {"weight": 40}
    assert take_census(table, whole_tables=True).working_set_nbytes() == 80
    assert take_census(table.requires_grad_(False), whole_gradients=True).module_nbytes() == {}
    assert take_census(nn.EmbeddingBag(5, 2)).working_set_nbytes() == 40
    assert Census(weights=(), modules=()).working_set_nbytes() == 0


class Scaled(nn.Embedding):
    def forward(self, indices):
        return super().forward(indices) * 8.0


def test_only_a_plain_embedding_gives_rows():
    assert gives_rows(nn.Embedding(5, 2, padding_idx=1, scale_grad_by_freq=True))
    assert not gives_rows(nn.Embedding(5, 2, max_norm=1.0))
    assert not gives_rows(nn.Embedding(5, 2, sparse=True))
    assert not gives_rows(nn.EmbeddingBag(5, 2))
    assert not gives_rows(nn.Linear(5, 2))
    assert not gives_rows(Scaled(5, 2))
    patched = nn.Embedding(5, 2)
    patched.forward = lambda indices: indices
    assert not gives_rows(patched)
    model = nn.Sequential(nn.Embedding(5, 2), Scaled(5, 2), Scaled(5, 2))
    model[2].weight = model[0].weight
    census = take_census(model)
    assert (census.lookups, census.by_rows) == ({"0.weight", "1.weight"}, set())


def test_a_tied_weight_s_gradient_counts_for_the_module_that_uses_it_whole():
    model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 5, bias=False))
    model[1].weight = model[0].weight
    census = take_census(model)
    assert census.by_rows == census.lookups == set()
    assert census.module_nbytes() == {"1": 80}


def test_a_weight_that_a_module_uses_twice_counts_once():
    linear = nn.Bilinear(3, 3, 3, bias=False)
    linear.register_parameter("again", linear.weight)
    census = take_census(linear)
    assert users(census) == {"": ("weight",)}
    assert census.working_set_nbytes() == 2 * 27 * 4


def test_records_are_frozen():
    with pytest.raises(AttributeError):
        WeightInfo(name="w", nbytes=1, trainable=True).nbytes = 2
    with pytest.raises(AttributeError):
        ModuleInfo(name="m", weights=()).weights = ("w",)


class Wrapped(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        (nn.Parameter(torch.zeros(3, 4)), None),
        (nn.Parameter(torch.zeros(3, 4, device="meta")), "meta device"),
        (nn.Parameter(torch.zeros(3, 4).t()), "not contiguous"),
        (nn.Parameter(torch.zeros(2, 2).to_sparse()), "torch.sparse_coo"),
        (nn.Parameter(torch.zeros(2).as_subclass(Wrapped)), "Wrapped"),
    ],
    ids=["plain", "meta", "transposed", "sparse", "subclass"],
)
def test_what_can_not_be_moved_says_why(parameter, reason):
    found = unmovable_reason(parameter)
    assert found is None if reason is None else reason in found


def test_views_have_the_storage_of_their_base():
    base = torch.zeros(6)
    assert storage_key(base[2:].view(2, 2)) == storage_key(base)
    assert storage_key(base) != storage_key(base.clone())
