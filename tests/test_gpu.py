"""What needs a GPU: the engine behind `accelerate`, our modules and the Embedder; graphs, streams, memory, fp8."""

from __future__ import annotations

import copy
import pickle
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from test_gpu_engine import engine_of, make, ragged
from transformers import BertConfig, BertForMaskedLM, BertModel

import bert_fast
from bert_fast import engine, modules, ops
from bert_fast.engine.gpu import GpuEngine
from bert_fast.engine.graphs import RECORD_AT
from bert_fast.inputs import BertInputs
from bert_fast.loading import parse_device

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda:0")

#: Bounds on the relative error of the last hidden state of a small random model, about twice what CPUs show.
MAX_ERROR = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 2e-2, "fp8": 1e-1}


def has_fp8():
    return torch.cuda.get_device_capability() >= (8, 9)


def has_bf16():
    return torch.cuda.get_device_capability() >= (8, 0)


def available():
    return [p for p in MAX_ERROR if (p != "fp8" or has_fp8()) and (p != "bf16" or has_bf16())]


@pytest.fixture(params=list(MAX_ERROR))
def precision(request):
    if request.param not in available():
        pytest.skip(f"this GPU has no {request.param}")
    return request.param


@pytest.fixture(autouse=True)
def _plain_memory(_poisoned_memory):
    """Deterministic algorithms ask cuBLAS for settings of their own; here the engine runs as it does for users."""
    torch.use_deterministic_algorithms(False)


def large(cls=BertModel, **options):
    """Sizes that fp8 products take, in multiples of 16."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "num_hidden_layers": 3} | options
    torch.manual_seed(0)
    return cls(BertConfig(vocab_size=80, max_position_embeddings=600, **sizes)).eval().to(GPU)


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def call(model, **options):
    ids = torch.arange(2, 42, device=GPU).reshape(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **options)


def serving(model):
    with torch.no_grad():
        return engine.serving(model, model.config.hidden_act, model.config.num_attention_heads)


# ---------------------------------------------------------------------------------------------- behind the public API


def test_accelerate(precision):
    expected = call(large())
    model = bert_fast.accelerate(large(), precision=precision)
    assert isinstance(serving(model), GpuEngine)
    for _ in range(RECORD_AT + 1):
        got = call(model)
        assert got.last_hidden_state.dtype == torch.float32
        assert relative_error(got.last_hidden_state[0], expected.last_hidden_state[0]) < MAX_ERROR[precision]
        assert relative_error(got.pooler_output, expected.pooler_output) < 3 * MAX_ERROR[precision]
        assert not got.last_hidden_state[1, 9:].any()
    states = call(model, output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert relative_error(states[-1], got.last_hidden_state) < MAX_ERROR[precision]
    again = pickle.loads(pickle.dumps(model))
    assert relative_error(call(again).last_hidden_state, got.last_hidden_state) < MAX_ERROR[precision]
    assert relative_error(call(copy.deepcopy(model)).last_hidden_state, got.last_hidden_state) < MAX_ERROR[precision]
    restored = call(bert_fast.restore(model)).last_hidden_state
    torch.testing.assert_close(restored, expected.last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_precision_of_the_parameters(dtype):
    if dtype == torch.bfloat16 and not has_bf16():
        pytest.skip("this GPU has no bf16")
    expected = call(large()).last_hidden_state
    model = bert_fast.accelerate(large().to(dtype))
    assert serving(model) is not None
    for _ in range(RECORD_AT + 1):
        got = call(model).last_hidden_state
        assert got.dtype == dtype
        assert relative_error(got[0], expected[0]) < MAX_ERROR[engine.PRECISION_OF[dtype]]


def test_refusals():
    with pytest.raises(
        ValueError, match="precision is 'int8', expected one of fp32, fp16, bf16, fp8 on cuda; it runs on cpu"
    ):
        bert_fast.accelerate(large(), precision="int8")
    name = torch.cuda.get_device_name()
    for missing in set(MAX_ERROR) - set(available()):
        with pytest.raises(ValueError, match=f"precision is '{missing}', but {name}"):
            bert_fast.accelerate(large(), precision=missing)


def test_released_originals():
    half = "bf16" if has_bf16() else "fp16"
    before = torch.cuda.memory_allocated()
    model = large(num_hidden_layers=12)
    whole = torch.cuda.memory_allocated() - before
    bert_fast.accelerate(model, precision=half, free_originals=True)
    assert torch.cuda.memory_allocated() - before < 0.6 * whole
    expected = call(large(num_hidden_layers=12)).last_hidden_state
    assert relative_error(call(model).last_hidden_state[0], expected[0]) < MAX_ERROR[half]
    with pytest.raises(ValueError, match="weights were released"):
        model.state_dict()


def test_weights_that_change():
    model = bert_fast.accelerate(large())
    for _ in range(RECORD_AT + 1):
        before = call(model).last_hidden_state
    with torch.no_grad():
        model.encoder.layer[1].attention.self.query.weight.mul_(3.0)
    after = call(model).last_hidden_state
    assert relative_error(after[0], before[0]) > 1e-3
    plain = call(bert_fast.restore(model)).last_hidden_state
    assert relative_error(after[0], plain[0]) < MAX_ERROR["fp32"]


def test_gradients_come_without_a_precision():
    model = bert_fast.accelerate(large())
    rows = model(torch.arange(2, 12, device=GPU)[None]).last_hidden_state
    (rows * torch.randn_like(rows)).sum().backward()
    assert model.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0


def test_without_the_extension(monkeypatch):
    """The fingerprint is taken in Python then."""
    monkeypatch.setattr(ops, "extension", lambda: None)
    expected = call(large()).last_hidden_state
    model = bert_fast.accelerate(large(), precision="fp16")
    assert isinstance(serving(model), GpuEngine)
    assert relative_error(call(model).last_hidden_state[0], expected[0]) < MAX_ERROR["fp16"]


def test_a_precision_that_the_model_left_behind():
    model = bert_fast.accelerate(large(), precision="fp16").cpu()
    ids = torch.arange(2, 12)[None]
    with torch.no_grad(), pytest.warns(ops.FallbackWarning, match="precision 'fp16' does not run on cpu"):
        rows = model(ids).last_hidden_state
    with torch.no_grad():
        torch.testing.assert_close(rows, large().cpu()(ids).last_hidden_state, rtol=0, atol=1e-4)


def test_a_head_of_ours():
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, "num_hidden_layers": 2}
    theirs = BertForMaskedLM(BertConfig(vocab_size=80, **sizes)).eval().to(GPU)
    ours = modules.BertForMaskedLM(bert_fast.BertConfig(vocab_size=80, **sizes))
    ours.load_state_dict(theirs.state_dict())
    ours = ours.eval().to(GPU)
    ids = torch.randint(0, 80, (3, 17), device=GPU)
    mask = torch.rand(3, 17, device=GPU) < 0.7
    mask[:, 0] = True
    with torch.no_grad():
        expected = theirs(ids, mask.long()).logits
        for _ in range(RECORD_AT + 1):
            torch.testing.assert_close(ours(ids, mask).logits[mask], expected[mask], rtol=0, atol=1e-4)


def test_ids_are_checked_and_the_process_lives():
    model = bert_fast.accelerate(large())
    for ids in (torch.full((1, 9), 80, device=GPU), torch.full((64, 64), -5, device=GPU)):
        for _ in range(RECORD_AT + 1):
            with (
                torch.no_grad(),
                pytest.raises(ValueError, match=r"input_ids (80|-5) at index \(0, 0\) is out of range"),
            ):
                model(ids)
    assert call(model).last_hidden_state.isfinite().all()
    torch.cuda.synchronize()


# --------------------------------------------------------------------------------------------- graphs, streams, threads


@pytest.mark.parametrize("lengths", [(1,), (128,), (5, 0, 33), (200, 100, 7), (16,) * 40])
def test_graphs_equal_eager(lengths):
    """Every use: launched, recorded, replayed; bit by bit once it is recorded."""
    model = large().half()
    run, batch = engine_of(model), ragged(*lengths)
    eager = engine_of(model)
    eager._graphs = None
    rows = [run.rows(batch) for _ in range(5)]
    vectors = [run.vectors(batch, ["mean", "cls"], True) for _ in range(5)]
    assert len(run._graphs._cache) == 2
    for kind in (rows, vectors):
        assert all(torch.equal(kind[RECORD_AT], other) for other in kind[RECORD_AT:])
    for got, expected in ((rows[-1], eager.rows(batch)), (vectors[-1], eager.vectors(batch, ["mean", "cls"], True))):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-2)
    states = []
    torch.testing.assert_close(rows[-1], eager.rows(batch, states), rtol=0, atol=2e-2)


def test_the_recorded_ones_are_bounded_and_share_memory():
    run = engine_of(large().half())
    for length in range(1, 513, 4):
        for _ in range(RECORD_AT + 1):
            run.rows(ragged(length))
    torch.cuda.synchronize()
    used = torch.cuda.memory_reserved()
    assert 1 < len(run._graphs._cache) <= 64
    for length in range(512, 0, -4):
        run.vectors(ragged(length), ["mean"], True)
    assert torch.cuda.memory_reserved() - used < 2**28


def test_a_graph_that_goes_harms_no_other():
    """What it leaves, cuBLAS's workspace too, is not given to the system while another graph uses it."""
    run = engine_of(large().half())
    run._graphs._cache._capacity = 2
    batches = [ragged(length) for length in (20, 40, 80)]
    expected = [run.rows(batch) for batch in batches]
    for batch in batches:
        run.rows(batch)
    assert len(run._graphs._cache) == 2
    torch.cuda.empty_cache()
    for batch, rows in zip(batches, expected, strict=True):
        for _ in range(RECORD_AT):
            torch.testing.assert_close(run.rows(batch), rows, rtol=0, atol=2e-2)


def test_streams():
    run = engine_of(large().half())
    batches = [ragged(*lengths, seed=i) for i, lengths in enumerate([(40, 9), (64,), (1,), (20, 20, 20)])]
    expected = [run.rows(batch) for batch in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for turn in range(40):
        which = turn % len(batches)
        with torch.cuda.stream(streams[(turn * 7) % len(streams)]):
            results.append((which, run.rows(batches[which])))
    torch.cuda.synchronize()
    for which, rows in results:
        torch.testing.assert_close(rows, expected[which], rtol=0, atol=2e-2)


def test_threads_with_two_engines():
    models = [make(seed=seed, num_hidden_layers=1) for seed in (0, 1)]
    runs = [engine_of(model) for model in models]
    batches = [ragged(*lengths, seed=i) for i, lengths in enumerate([(3, 40, 9), (64,), (1,), (20, 20, 20, 20)])]
    expected = [[run.rows(batch) for batch in batches] for run in runs]
    torch.cuda.synchronize()

    def work(index):
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(40):
                run, batch = (index + turn) % 2, (index * 7 + turn) % len(batches)
                rows = runs[run].rows(batches[batch])
                torch.testing.assert_close(rows.cpu(), expected[run][batch].cpu(), rtol=0, atol=1e-4)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))


def test_while_the_caller_records():
    model = bert_fast.accelerate(large().half())
    ids, mask = torch.randint(0, 80, (4, 30), device=GPU), torch.ones(4, 30, dtype=torch.int64, device=GPU)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(ids, mask)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rows = model(ids, mask).last_hidden_state
        for _ in range(3):
            ids.copy_(torch.randint(0, 80, (4, 30), device=GPU))
            mask.copy_((torch.rand(4, 30, device=GPU) < 0.6).long())
            graph.replay()
            expected = model(ids, mask).last_hidden_state
            torch.testing.assert_close(rows, expected, rtol=0, atol=2e-2)
        with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(ValueError, match="input_ids is on the CPU"):
            serving(model).rows(ragged(5))
        unpacked = bert_fast.accelerate(large().half())
        with (
            torch.cuda.graph(torch.cuda.CUDAGraph()),
            pytest.raises(ValueError, match="weights of the model are not packed"),
        ):
            unpacked(ids, mask)
        torch.testing.assert_close(unpacked(ids, mask).last_hidden_state, expected, rtol=0, atol=2e-2)


def test_out_of_memory():
    run = engine_of(large().half())
    expected = [run.rows(ragged(20)) for _ in range(3)][-1]
    torch.cuda.empty_cache()  # what earlier tests left would be enough
    free, total = torch.cuda.mem_get_info()
    limit = (torch.cuda.memory_reserved() + 2**28) / total
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        ids = torch.zeros(600, 512, dtype=torch.int64, device=GPU)
        with pytest.raises(
            torch.OutOfMemoryError, match="no memory is left on cuda:0 for this forward: a smaller batch"
        ):
            run.padded(BertInputs(ids))
        assert len(run._graphs._cache) == 0
        torch.testing.assert_close(run.rows(ragged(20)), expected, rtol=0, atol=2e-2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert free > 0
    for _ in range(RECORD_AT):
        torch.testing.assert_close(run.rows(ragged(20)), expected, rtol=0, atol=2e-2)
    assert len(run._graphs._cache) == 1, "graphs are recorded again"


def test_inputs_elsewhere():
    run = engine_of(large())
    with pytest.raises(ValueError, match="input_ids is on cpu but the model is on cuda:0"):
        run.padded(BertInputs(torch.zeros(1, 5, dtype=torch.int64)))


def test_nothing_waits_for_the_device():
    """A batch that the host knows takes no synchronisation; a padded one waits for an event, which is none of these."""
    run = engine_of(large().half())
    batches = [ragged(20), ragged(600, 600)]
    ids, mask = torch.randint(0, 80, (8, 64), device=GPU), torch.ones(8, 64, device=GPU)
    for turn in range(4):
        torch.cuda.set_sync_debug_mode("error" if turn == 3 else "default")
        try:
            for batch in batches:
                run.rows(batch)
                run.vectors(batch, ["mean"], True)
            run.padded(BertInputs(ids, mask))
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------------------------ the embedder


def test_the_embedder_gives_what_it_gives_on_the_cpu(precision):
    texts = [f"a text of {'very ' * (i % 40)}many words, number {i}" for i in range(700)]
    expected = bert_fast.Embedder("demo", device="cpu").encode(texts, normalize_embeddings=True)
    embedder = bert_fast.Embedder("demo", device="cuda", precision=precision)
    vectors = embedder.encode(texts, normalize_embeddings=True)
    cosines = (vectors * expected).sum(1)
    assert cosines.min() > {"fp32": 1 - 1e-5, "fp16": 1 - 1e-4, "bf16": 0.999, "fp8": 0.98}[precision]
    again = embedder.encode(iter(texts), normalize_embeddings=True, batch_size=1)
    np.testing.assert_allclose(vectors, again, rtol=0, atol={"fp32": 1e-5, "fp16": 1e-3}.get(precision, 2e-2))
    one = embedder.encode(texts[5], normalize_embeddings=True, convert_to_tensor=True)
    assert one.is_cuda
    assert float(one.cpu() @ torch.from_numpy(vectors[5])) > 0.99


def test_the_embedder_with_a_prompt():
    texts = ["one text", "another, longer text", ""]
    results = []
    for device in ("cpu", "cuda"):
        embedder = bert_fast.Embedder("demo", device=device)
        object.__setattr__(embedder.recipe, "include_prompt", False)
        results.append(embedder.encode(texts, prompt="search: "))
    np.testing.assert_allclose(*results, rtol=0, atol=1e-4)


def test_verify(precision):
    from bert_fast.verify import verify

    report = verify("demo", precision=precision, device="cuda")
    print(report)
    assert report.passed


# ------------------------------------------------------------------------------------------------- speed, not asserted


@pytest.mark.parametrize("way", ["padded", "vectors", "serving"])
def test_host_cost(way):
    """What the host does for a forward of BERT-base with one text of 16 tokens; printed."""
    model = bert_fast.accelerate(BertModel(BertConfig()).eval().half().to(GPU))
    run, batch = serving(model), ragged(16)
    ids, mask = (torch.ones(1, 16, dtype=torch.int64, device=GPU) for _ in range(2))
    calls = {
        "padded": lambda: run.padded(BertInputs(ids, mask)),
        "vectors": lambda: run.vectors(batch, ("mean",), True),
        "serving": lambda: serving(model),
    }
    for _ in range(10):
        calls[way]()
    seconds = []
    for _ in range(200):
        torch.cuda.synchronize()
        start = time.perf_counter()
        calls[way]()
        seconds.append(time.perf_counter() - start)
    print(f"host cost, BERT-base, one text of 16 tokens, {way}: {statistics.median(seconds) * 1e6:.1f} us")


def test_the_kernel_tests_of_packing_on_the_gpu_in_a_process_of_their_own():
    """Without this process's caches: what the first call of a fresh process does."""
    program = """
import torch, bert_fast
from transformers import BertConfig, BertModel
model = bert_fast.accelerate(BertModel(BertConfig(num_hidden_layers=2)).eval().half().cuda())
with torch.inference_mode():
    for _ in range(4):
        rows = model(torch.ones(2, 9, dtype=torch.int64, device="cuda")).last_hidden_state
assert rows.isfinite().all()
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"device is 'cuda:99', but torch can use \d+ GPUs"):
        parse_device("cuda:99")
