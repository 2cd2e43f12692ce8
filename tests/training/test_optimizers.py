"""The optimisers against their formulas, parameter by parameter in float64, and the groups of a BERT."""

import copy
import math

import pytest
import torch
from torch import nn

from bert_fast import BertConfig, electra, modules
from bert_fast.config import ElectraConfig
from bert_fast.training.freezing import train_last_layers
from bert_fast.training.optimizers import LAMB, OPTIMIZERS, BertAdam, adamw, make_optimizer, parameter_groups

SHAPES = [
    (5, 7),  # a matrix
    (3,),  # a vector
    (),  # a number
    (0, 4),  # nothing at all
]


def parameters(dtype=torch.float64):
    """As many groups as there are kinds: with decay and without."""
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES * 2]


def groups(params):
    half = len(params) // 2
    return [{"params": params[:half]}, {"params": params[half:], "weight_decay": 0.0, "lr": 0.003}]


def train(optimizer, params, num_steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        optimizer.step()


def bert_adam(p, g, m, v, step, lr, wd):
    """google-research/bert, optimization.py, AdamWeightDecayOptimizer.apply_gradients."""
    m.copy_(0.9 * m + 0.1 * g)
    v.copy_(0.999 * v + 0.001 * g * g)
    update = m / (v.sqrt() + 1e-6)
    p -= lr * (update + wd * p)


def adam_w(p, g, m, v, step, lr, wd):
    """Loshchilov and Hutter (2019), algorithm 2."""
    m.copy_(0.9 * m + 0.1 * g)
    v.copy_(0.999 * v + 0.001 * g * g)
    update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-6)
    p -= lr * (update + wd * p)


def lamb(p, g, m, v, step, lr, wd, limit=math.inf):
    """You et al. (2019), algorithm 2, with the ratio of apex's multi_tensor_lamb.cu."""
    m.copy_(0.9 * m + 0.1 * g)
    v.copy_(0.999 * v + 0.001 * g * g)
    update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-6) + wd * p
    ratio = 1.0
    if wd and p.norm() > 0 and update.norm() > 0:
        ratio = min((p.norm() / update.norm()).item(), limit)
    p -= lr * ratio * update


@pytest.mark.parametrize(("name", "formula"), [("adamw", adam_w), ("bert_adam", bert_adam), ("lamb", lamb)])
def test_formula(name, formula):
    params, expected = parameters(), [p.detach().clone() for p in parameters()]
    train(make_optimizer(name, groups(params), lr=0.01, weight_decay=0.1), params, 5)
    generator = torch.Generator().manual_seed(1)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected]
    for step in range(1, 6):
        for index, (p, (m, v)) in enumerate(zip(expected, moments, strict=True)):
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            lr, wd = (0.01, 0.1) if index < len(SHAPES) else (0.003, 0.0)
            formula(p, g, m, v, step, lr, wd)
    for got, want in zip(params, expected, strict=True):
        torch.testing.assert_close(got.detach(), want, rtol=1e-12, atol=1e-12)


def test_bert_adam_by_hand():
    """m = 0.1 g, v = 0.001 g^2: the first update is 0.1 / sqrt(0.001) = 3.16228, whatever the gradient."""
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = BertAdam([p], lr=0.1, eps=0.0, weight_decay=0.01)
    p.grad = torch.tensor([4.0, -0.5], dtype=torch.float64)
    optimizer.step()
    # 1 - 0.1 (3.16227766 + 0.01), -2 - 0.1 (-3.16227766 - 0.02)
    torch.testing.assert_close(p.detach(), torch.tensor([0.682772234, -1.681772234], dtype=torch.float64))
    p.grad = torch.tensor([4.0, 0.5], dtype=torch.float64)
    optimizer.step()
    # m = 0.9 * 0.4 + 0.4 = 0.76 and -0.045 + 0.05 = 0.005; v = 0.001999 g^2, root 0.17884071 and 0.02235509:
    # 0.68277223 - 0.1 (4.24959 + 0.0068277), -1.68177223 - 0.1 (0.223663 - 0.0168177)
    torch.testing.assert_close(
        p.detach(), torch.tensor([0.2571305, -1.7024568], dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


def test_lamb_clips_its_ratio():
    params, limit = parameters(), 0.5
    train(LAMB(params, lr=0.01, weight_decay=0.1, max_trust_ratio=limit), params, 1)
    generator = torch.Generator().manual_seed(1)
    clipped = 0
    for got, p in zip(params, parameters(), strict=True):
        p, g = p.detach().clone(), torch.randn(p.shape, generator=generator, dtype=torch.float64)
        free = p.clone()
        lamb(free, g, torch.zeros_like(p), torch.zeros_like(p), 1, 0.01, 0.1)
        lamb(p, g, torch.zeros_like(p), torch.zeros_like(p), 1, 0.01, 0.1, limit)
        clipped += not torch.equal(free, p)
        torch.testing.assert_close(got.detach(), p, rtol=1e-12, atol=1e-12)
    assert clipped


def test_lamb_moves_what_is_zero():
    """A classifier may start there: a ratio of 0 would hold it."""
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    LAMB([p], lr=0.1, weight_decay=0.1).step()
    torch.testing.assert_close(p.detach(), torch.full((3,), -0.1))


def test_lamb_counts_the_steps_of_each_parameter():
    """A parameter that is thawed later has its bias corrected from its own first step."""
    early, late = (nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64)) for _ in range(2))
    optimizer = LAMB([early, late], lr=0.1)
    early.grad = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    optimizer.step()
    after_one, early.grad, late.grad = early.detach().clone(), None, early.grad
    optimizer.step()
    assert torch.equal(early.detach(), after_one)
    assert torch.equal(late.detach(), after_one)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_continues_bit_for_bit(name, tmp_path):
    whole, first = parameters(torch.float32), parameters(torch.float32)
    straight = make_optimizer(name, groups(whole), lr=0.01)
    train(straight, whole, 3, seed=1)
    train(straight, whole, 3, seed=2)
    before = make_optimizer(name, groups(first), lr=0.01)
    train(before, first, 3, seed=1)
    torch.save(before.state_dict(), tmp_path / "state.pt")
    second = [nn.Parameter(p.detach().clone()) for p in first]
    after = make_optimizer(name, groups(second), lr=0.5)
    after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(after, second, 3, seed=2)
    for got, want in zip(second, whole, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_nan_gradient_spoils_its_own_parameter_only(name):
    clean, spoilt = parameters(), parameters()
    for params in (clean, spoilt):
        optimizer = make_optimizer(name, params, lr=0.01, weight_decay=0.1)
        train(optimizer, params, 1)
        if params is spoilt:
            params[0].grad[0, 0] = math.nan
        optimizer.step()
    assert spoilt[0].isnan().any()
    for got, want in zip(spoilt[1:], clean[1:], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("name", "message"),
    [("bert_adam", "sparse"), ("lamb", r"dense gradients only, got a torch.sparse_coo one of a parameter \(5, 4\)")],
)
def test_a_sparse_gradient_is_refused_and_nothing_is_changed(name, message):
    table = nn.Embedding(5, 4, sparse=True)
    before = table.weight.detach().clone()
    optimizer = make_optimizer(name, table.parameters(), lr=0.1)
    table(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert torch.equal(table.weight, before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_a_gradient_nothing_happens_to_a_parameter(name):
    params = parameters()
    optimizer = make_optimizer(name, params, lr=0.1)
    before = [p.detach().clone() for p in params]
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert set(optimizer.state) == {params[0]}
    assert not torch.equal(params[0], before[0])
    for got, want in zip(params[1:], before[1:], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dtypes_and_the_closure(name):
    """Parameters of two dtypes in one group, and a closure that needs gradients."""
    params = [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    optimizer = make_optimizer(name, params, lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = sum((p.double() ** 2).sum() for p in params)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[2] < losses[1] < losses[0] == 8.0


@pytest.mark.parametrize("build", [adamw, BertAdam])
def test_adam_is_fused(build):
    assert build(groups(parameters())).defaults["fused"]
    assert not build([nn.Parameter(torch.empty(3, device="meta"))]).defaults["fused"]


def test_bert_adam_where_there_is_no_fused_kernel():
    """Other devices take torch's other forms, which count steps elsewhere."""
    fused, other = parameters(), parameters()
    plain = BertAdam(groups(other), lr=0.01)
    for group in plain.param_groups:
        group["fused"] = False
    train(BertAdam(groups(fused), lr=0.01), fused, 4)
    train(plain, other, 4)
    for got, want in zip(fused, other, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sgd", {}, "optimizer is 'sgd', expected one of adamw, bert_adam, lamb"),
        ("adamw", {"lr": -1.0}, "Invalid learning rate: -1.0"),
        ("bert_adam", {"eps": -1.0}, "Invalid epsilon value: -1.0"),
        ("lamb", {"lr": -1.0}, "lr is -1.0"),
        ("lamb", {"eps": math.nan}, "eps is nan"),
        ("lamb", {"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        ("lamb", {"max_trust_ratio": 0.0}, "max_trust_ratio is 0.0"),
    ],
)
def test_what_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(name, parameters(), **({"lr": 0.1} | options))


# --- groups of parameters


def config(num_hidden_layers=2):
    return BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )


def models():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertConfig(**vars(config()))
    names = ("BertForSequenceClassification", "BertForMaskedLM", "BertForPreTraining", "BertForQuestionAnswering")
    for name in names:
        yield getattr(modules, name)(config())
        yield getattr(transformers, name)(theirs)
    shape = {**vars(config()), "embedding_size": 8}
    yield electra.ElectraForSequenceClassification(ElectraConfig(**shape))
    yield transformers.ElectraForSequenceClassification(transformers.ElectraConfig(**shape))


def by_name(model, found):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group for group in found for parameter in group["params"]}


def test_no_decay_on_biases_and_layer_norm():
    for model in models():
        settings = by_name(model, parameter_groups(model, 0.1, weight_decay=0.01))
        assert settings.keys() == dict(model.named_parameters()).keys()
        assert {group["lr"] for group in settings.values()} == {0.1}
        for name, group in settings.items():
            assert group["weight_decay"] == (0.0 if "bias" in name or "LayerNorm" in name else 0.01), name


def test_decay_by_layer_as_electra():
    """Its _get_layer_lrs: lr * decay ** (n_layers + 2 - depth); embeddings 0, layer i i + 1, the task n_layers + 2."""
    for model in models():
        for name, group in by_name(model, parameter_groups(model, 0.1, layer_decay=0.8)).items():
            depth = 4
            for key, place in (("embeddings", 0), ("layer.0.", 1), ("layer.1.", 2), ("pooler.", 3)):
                depth = place if key in name else depth
            assert group["lr"] == pytest.approx(0.1 * 0.8 ** (4 - depth)), name


def test_ten_layers_are_in_order():
    model = modules.BertForSequenceClassification(config(num_hidden_layers=11))
    settings = by_name(model, parameter_groups(model, 1.0, layer_decay=0.5))
    rates = [settings[f"bert.encoder.layer.{index}.output.dense.weight"]["lr"] for index in range(11)]
    assert rates == [0.5 ** (12 - index) for index in range(11)]


def test_frozen_parameters_are_left_out():
    model = modules.BertForSequenceClassification(config())
    train_last_layers(model, 1)
    for layer_decay in (1.0, 0.8):
        names = by_name(model, parameter_groups(model, 0.1, layer_decay=layer_decay)).keys()
        assert names == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(name.startswith(("bert.encoder.layer.1.", "bert.pooler.", "classifier.")) for name in names)


def test_groups_make_an_optimizer():
    model = modules.BertForSequenceClassification(config())
    for name in OPTIMIZERS:
        trained = copy.deepcopy(model)
        optimizer = make_optimizer(name, parameter_groups(trained, 0.1, layer_decay=0.8), lr=0.1)
        trained(torch.tensor([[2, 5, 3]]), labels=torch.tensor([1])).loss.backward()
        optimizer.step()
        for (name_, after), before in zip(trained.named_parameters(), model.parameters(), strict=True):
            assert not torch.equal(after, before) or name_.endswith("key.bias"), name_  # its true gradient is 0


def test_groups_refuse():
    model = modules.BertForSequenceClassification(config())
    with pytest.raises(ValueError, match=r"layer_decay is 1.1"):
        parameter_groups(model, 0.1, layer_decay=1.1)
    with pytest.raises(ValueError, match=r"a Sequential has no parameters under embeddings and encoder.layer.0"):
        parameter_groups(nn.Sequential(nn.Linear(2, 2)), 0.1, layer_decay=0.8)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the BertForSequenceClassification requires a gradient"):
        parameter_groups(model, 0.1)
