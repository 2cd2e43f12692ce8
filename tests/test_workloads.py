"""What a GPU is measured on: batches, kernels alone, and the peer without padding; all of it tried on the CPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import kernels
from benchmarks.cases import GPU_COMPILED, GPU_WORKLOADS, KERNELS, MODELS, QUICK_KERNELS, KernelCase
from benchmarks.peers import BASELINE, SUBJECT, varlen
from bert_fast.benchmarking import Case, parse_case
from bert_fast.config import BertConfig
from bert_fast.ops.attention import attention
from bert_fast.timing import relative_error


@pytest.mark.parametrize("batch_size", [1, 8, 64, 728, 4096])
def test_squad_lengths_have_one_distribution(batch_size: int) -> None:
    case = parse_case(f"squad{batch_size}")
    assert len(case.lengths) == batch_size
    assert 32 <= min(case.lengths) <= max(case.lengths) <= 384
    if batch_size > 1:
        assert sum(case.lengths) / batch_size == pytest.approx(180, abs=3 if batch_size >= 64 else 8)
        assert list(case.lengths) != sorted(case.lengths)
    assert parse_case(case.name) == case


def test_squad_lengths_reach_the_cut() -> None:
    lengths = parse_case("squad4096").lengths
    assert max(lengths) == 384
    assert 0.01 < sum(length == 384 for length in lengths) / 4096 < 0.05
    logs = torch.tensor(lengths).double().log()
    assert logs.median().item() == pytest.approx(math.log(165), abs=0.01)
    assert logs.std().item() == pytest.approx(0.45, abs=0.02)


def test_workloads_can_be_run() -> None:
    for workload in (*GPU_WORKLOADS, *GPU_COMPILED):
        assert workload.dtype in SUBJECT.cuda
        assert workload.dtype in BASELINE.cuda
        assert max(max(parse_case(case).lengths) for case in workload.cases) <= 512
        assert isinstance(MODELS[workload.model].source, BertConfig)  # nothing from the network
    compiled = {(w.model, w.dtype, case) for w in GPU_COMPILED for case in w.cases}
    assert compiled <= {(w.model, w.dtype, case) for w in GPU_WORKLOADS for case in w.cases}


def test_kernels_are_several_times_the_cache() -> None:
    for case in KERNELS:
        assert kernels.work(case).bytes >= 200e6, case  # an H200 has 60 MB


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in QUICK_KERNELS for name in kernels.contenders(case, ["torch", "bert_fast"])],
    ids=lambda value: value if isinstance(value, str) else f"{value.op}-{value.case}",
)
def test_a_kernel_contender_gives_the_answer(case: KernelCase, name: str) -> None:
    runner = kernels.Runner(name, "cpu")
    with torch.inference_mode():
        answers = [kernels.sample(case, runner(case)).float() for _ in range(3)]
        expected = kernels.truth(case, "cpu")
    allowed = 1e-5 if case.dtype == "float32" else 2e-2
    assert relative_error(answers[0], expected) <= allowed
    assert relative_error(answers[1], expected) > 0.1  # the second set of inputs ...
    assert torch.equal(answers[2], answers[0])  # ... and the first again


def test_a_runner_given_the_same_case_anew_begins_with_the_first_inputs() -> None:
    runner, case = kernels.Runner("bert_fast", "cpu"), QUICK_KERNELS[-1]
    first = runner(case)
    assert torch.equal(runner(replace(case)), first)


def test_work_of_kernels_by_hand() -> None:
    attention_work = kernels.work(KernelCase("attention", "2x8", width=128))
    assert (attention_work.flops, attention_work.bytes) == (4 * 128 * 2 * 64, 4 * 16 * 128 * 2)
    norm = kernels.work(KernelCase("residual_layer_norm", "2x8", width=128))
    gradient = kernels.work(KernelCase("attention_backward", "2x8", width=128, dropout_p=0.1))
    assert (gradient.flops, gradient.bytes) == (10 * 128 * 2 * 64, 8 * 16 * 128 * 2)
    assert gradient.case == "2x8, width 128, dropout 0.1"
    assert (norm.flops, norm.bytes, norm.case) == (0, 3 * 16 * 128 * 2, "2x8, width 128")
    assert kernels.work(KernelCase("pooling", "2x8", width=128)).bytes == (16 + 2) * 128 * 2
    assert kernels.work(KernelCase("bias_gelu", "2x8", "float32", 128)).bytes == 2 * 16 * 128 * 4
    assert kernels.work(KernelCase("linear_gelu", "2x8", width=128)).flops == 2 * 16 * 128 * 512
    assert kernels.work(KernelCase("embedding_layer_norm", "2x8", width=128)).bytes == 2 * 16 * 128 * 2 + 16 * 24


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(ValueError, match="op is 'softmax'"):
        kernels.arguments(KernelCase("softmax", "2x8"), "cpu")


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, _: Tensor, longest: int, __: int) -> Tensor:
    return attention(q, k, v, cu_seqlens=cu, max_seqlen=longest, impl="reference")


def test_varlen_peer_gives_transformers_answer() -> None:
    from benchmarks.cases import build_model

    config = replace(MODELS["tiny"].source, initializer_range=0.2)
    model = build_model(config)
    inputs = Case("ragged", (3, 11, 1, 7)).inputs(config.vocab_size)
    inputs["token_type_ids"] = inputs["input_ids"] % 2
    real = inputs["attention_mask"].bool()
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state
        answer = varlen.build(model, "float32", attend=_plain_attention)(inputs)
    assert relative_error(answer[real], expected[real]) < 1e-5
    assert not answer[~real].any()


def test_varlen_peer_refuses_another_activation() -> None:
    from benchmarks.cases import build_model

    model = build_model(replace(MODELS["tiny"].source, hidden_act="relu"))
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        varlen.build(model, "float32")
