"""The V1 runner's real InputBatch, driven at random: additions, removals, refilled rows, moves and swaps."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_slots import EXTRAS, LONGEST, SLOTS, VOCAB, Request, config, target  # noqa: F401 (a fixture)
from transformers import LlamaForCausalLM
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from optsample_triton.integrations.vllm import OptimalSampling, read_records


class Batch:
    """The runner's batch. ``ahead``: with asynchronous scheduling a token is known only after the next step began."""

    def __init__(self, folder, given, ahead=False):
        self.ahead = ahead
        self.processor = OptimalSampling(config(folder, given, async_scheduling=ahead), torch.device("cpu"), False)
        self.batch = InputBatch(
            max_num_reqs=SLOTS,
            max_model_len=LONGEST,
            max_num_batched_tokens=64,
            device=torch.device("cpu"),
            vocab_size=VOCAB,
            block_sizes=[16],
            max_num_blocks_per_req=[2],
            logitsprocs=LogitsProcessors([self.processor]),
            logitsprocs_need_output_token_ids=True,
        )
        self.model = LlamaForCausalLM.from_pretrained(folder).eval()
        self.running: dict[str, Request] = {}

    def add(self, request):
        state = CachedRequestState(
            req_id=str(request.name),
            prompt_token_ids=request.prompt,
            mm_features=[],
            sampling_params=request.params,
            generator=None,
            block_ids=([0],),
            num_computed_tokens=0,
            output_token_ids=request.output,
        )
        self.batch.add_request(state)
        self.running[str(request.name)] = request

    def remove(self, request):
        self.batch.remove_request(str(request.name))
        del self.running[str(request.name)]

    def step(self, seed, partial):
        self.batch.update_async_output_token_ids()  # as the runner does before it samples
        logits = torch.randn(len(self.running), VOCAB, generator=torch.Generator().manual_seed(seed))
        logits[:, 11] = -torch.inf
        given, mixed = logits.clone(), self.processor.apply(logits)
        for row, name in enumerate(self.batch.req_ids):
            request = self.running[name]
            if request.extra is None:
                assert torch.equal(mixed[row], given[row])
            else:
                expected = request.law(self.model, given[row])
                torch.testing.assert_close(mixed[row].double(), expected, atol=2e-5, rtol=1e-5)
            if name not in partial:
                request.output.append(-1 if self.ahead else int(mixed[row].argmax()))
                request.laws.append(given[row])
        if self.ahead:
            copied = SimpleNamespace(synchronize=lambda: None)
            self.batch.set_async_sampled_token_ids(mixed.argmax(-1, keepdim=True), copied)
            rows = enumerate(self.batch.req_ids)
            self.batch.prev_req_id_to_index = {name: row for row, name in rows if name not in partial}


@settings(max_examples=15, phases=[Phase.generate])
@given(data=st.data())
def test_any_order_of_events(target, tmp_path_factory, data):  # noqa: F811
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    one = Batch(target, {"records": str(path)})
    requests, paused = [], []
    for number in range(data.draw(st.integers(5, 40), label="steps")):
        for request in list(one.running.values()):
            event = data.draw(st.sampled_from(["goes on"] * 8 + ["aborted", "preempted"]))
            if request.ended or event != "goes on":
                one.remove(request)
                if event == "preempted" and not request.ended:
                    paused.append(request)
        while len(one.running) < SLOTS and data.draw(st.booleans(), label="one more"):
            if paused and paused[0] not in one.running.values():
                one.add(paused.pop(0))
                continue
            prompt = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6))
            request = Request(len(requests), prompt, data.draw(st.sampled_from(EXTRAS)), data.draw(st.integers(1, 9)))
            requests.append(request)
            one.add(request)
        one.batch.condense()
        if len(one.running) > 1 and data.draw(st.booleans(), label="swap"):
            first, second = data.draw(st.permutations(range(len(one.running))))[:2]
            one.batch.swap_states(first, second)
        one.batch.refresh_metadata()
        mixed = [request for request in one.running.values() if request.extra is not None]
        assert len(one.processor.tracker.requests) == len(mixed)
        assert len(one.processor.mixer.target) <= len(mixed)
        if one.running:
            one.step(number, data.draw(st.sets(st.sampled_from(sorted(one.running)))))
    for request in list(one.running.values()):
        one.remove(request)
    one.batch.condense()
    one.batch.refresh_metadata()
    assert len(one.processor.mixer.target) == len(one.processor.tracker.requests) == 0
    records = {record["id"]: record for record in read_records(path)}
    assert set(records) == {request.name for request in requests if request.extra is not None and request.output}
    for name, record in records.items():
        assert record["tokens"] == requests[name].output
        for token, log_theta, theta in zip(record["tokens"], record["log_theta"], requests[name].laws, strict=True):
            assert log_theta == pytest.approx(float(theta.double().log_softmax(-1)[token]), abs=2e-5)


def test_steps_that_begin_before_the_last_tokens_are_known(target):  # noqa: F811
    one, chance, read = Batch(target, {}, ahead=True), random.Random(0), 0
    for number in range(60):
        for request in list(one.running.values()):
            if request.ended or chance.random() < 0.05:
                one.remove(request)
        while len(one.running) < SLOTS and chance.random() < 0.5:
            prompt = [chance.randrange(VOCAB) for _ in range(chance.randint(1, 6))]
            one.add(Request(read, prompt, chance.choice(EXTRAS), 9))
            read += 1
        one.batch.condense()
        one.batch.refresh_metadata()
        if one.running:
            one.step(number, {name for name in one.running if chance.random() < 0.1})
    built = one.processor.mixer.target.built
    assert 0 < built <= read  # a missing token would have made the text unreadable for the target


def test_prompts_given_as_embeddings(target):  # noqa: F811
    """The target cannot read embeddings, but it can read a prompt of its own."""
    processor = OptimalSampling(config(target, {}, async_scheduling=False), torch.device("cpu"), False)
    asked = [SamplingParams(extra_args=EXTRAS[k]) for k in (1, 3)]
    added = [(row, params, None, []) for row, params in enumerate(asked)]
    processor.update_state(BatchUpdate(batch_size=2, removed=[], added=added, moved=[]))
    logits = torch.randn(2, VOCAB)
    mixed = processor.apply(logits.clone())
    assert torch.equal(mixed[0], logits[0])
    request = Request(0, [], EXTRAS[3], 1)
    expected = request.law(LlamaForCausalLM.from_pretrained(target), logits[1])
    torch.testing.assert_close(mixed[1].double(), expected, atol=2e-5, rtol=1e-5)


def one_row(processor, extra, output, logits):
    """The row of one request after a prompt of two tokens."""
    added = [(0, SamplingParams(extra_args=extra), [3, 4], output)]
    processor.update_state(BatchUpdate(batch_size=1, removed=[], added=added, moved=[]))
    return processor.apply(logits.clone())


def test_a_law_that_float32_cannot_hold_never_reaches_the_sampler(target, tmp_path):  # noqa: F811
    path = tmp_path / "records.jsonl"
    processor = OptimalSampling(
        config(target, {"records": str(path)}, async_scheduling=False), torch.device("cpu"), False
    )
    logits, output = torch.randn(1, VOCAB), []
    one_row(processor, {"optsample_alpha": 0.3, "optsample_id": "a"}, output, logits)
    processor.tracker.requests[0].alpha = 1e300  # what admission would have refused
    assert torch.equal(processor.apply(logits.clone()), logits)
    output.append(7)  # drawn when the process ends
    processor.tracker.close()
    (record,) = read_records(path)
    assert record["status"] == [3]
    assert record["alpha"] == [None]
    assert record["log_q"] == record["log_theta"]


def test_a_grammar_that_allows_nothing_shared(target, tmp_path):  # noqa: F811
    """There is no q*, so the policy's row stays, including the tokens allowed beyond the shared entries."""
    path = tmp_path / "records.jsonl"
    given = {"records": str(path), "vocab_size": VOCAB - 3, "temperature_theta": 2.0}
    processor = OptimalSampling(config(target, given, async_scheduling=False), torch.device("cpu"), False)
    logits, output = torch.full((1, VOCAB), -torch.inf), []
    logits[0, VOCAB - 2 :] = torch.tensor([1.0, 3.0])
    mixed = one_row(processor, {"optsample": True}, output, logits)
    assert torch.equal(mixed, logits / 2)
    output.append(VOCAB - 1)
    processor.update_state(None)
    processor.tracker.close()
    (record,) = read_records(path)
    assert record["status"] == [3]
    assert record["log_q"] == record["log_theta"] == [pytest.approx(-math.log1p(math.exp(-1)))]
    assert record["log_t"] == record["alpha"] == [None]


def test_tokens_that_the_engine_takes_back(target, tmp_path):  # noqa: F811
    """The engine does this if it could not load keys and values from an external cache."""
    path = tmp_path / "records.jsonl"
    processor = OptimalSampling(
        config(target, {"records": str(path)}, async_scheduling=False), torch.device("cpu"), False
    )
    logits, request = torch.randn(1, VOCAB), Request(0, [3, 4], {"optsample": True}, 9)
    model, output = LlamaForCausalLM.from_pretrained(target), request.output
    one_row(processor, request.extra, output, logits)
    for kept, token in [(1, 5), (1, 6), (2, 7), (1, 8)]:  # how many tokens stay, and the next one drawn
        output.append(token)
        del output[kept:]
        processor.update_state(None)
        expected = request.law(model, logits[0])
        mixed = processor.apply(logits.clone())
        torch.testing.assert_close(mixed[0].double(), expected, atol=2e-5, rtol=1e-5)
    output.append(9)
    processor.tracker.close()
    (record,) = read_records(path)
    assert record["tokens"] == output == [5, 9]
    assert record["log_q"][1] == pytest.approx(float(expected[9]), abs=2e-5)


def test_asynchronous_scheduling_goes_without_records(target, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="async_scheduling must be False for records in this model runner"):
        OptimalSampling(config(target, {"records": str(tmp_path / "r")}, async_scheduling=True), "cpu", False)
    assert OptimalSampling(config(target, {}, async_scheduling=True), "cpu", False).apply(torch.ones(1, 12)).eq(1).all()


def test_batch_sharded_sampling_is_refused(target):  # noqa: F811
    with pytest.raises(ValueError, match="enable_batch_sharded_sampling must be off"):
        OptimalSampling(
            config(target, {}, parallel_config=SimpleNamespace(enable_batch_sharded_sampling=True)), "cpu", False
        )
