"""The V2 runner's interface, which needs a GPU to run, driven by a stand-in for the runner's own bookkeeping.

vLLM's loader for that runner builds the processor, which holds the real target and is called as the runner calls it.
The stand-in assumes the following, all of it read in vLLM 0.32.0 below ``vllm/v1/worker/gpu``:

* ``states.py``: a request takes the slot that was freed last. Its prompt_len and prefill_len are on the host at once;
  after a preemption prefill_len includes the answer so far. Its tokens and total_len are staged writes.
* ``model_runner.py``, execute_model: each step, even one that runs nothing, first frees the slots of ended and
  preempted requests without telling the processor, then calls add_request for new ones, then makes the staged writes,
  the processor's last.
* ``model_runner.py``, prepare_inputs: without drafts there is one row of logits per running request, in any order,
  even for a prompt that is read in chunks. seq_lens_cpu_upper_bound is then exact.
* ``sample/sampler.py``: apply is called if any processor's add_request returned true for a running request, so it may
  be called without a request of ours. It gets a float32 copy of the logits after grammars, logit_bias, penalties and
  bad words; input_ids holds each row's last token. A token drawn from a row shorter than prefill_len is discarded.
* ``input_batch.py``, post_update: before the next step begins, the drawn token is in all_token_ids at total_len, and
  total_len grows by one.
* ``vllm/v1/core/sched``: a request that ends by its length is not scheduled again. A request that ends by a token may
  run once more, since the next step is scheduled before the token is known.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines import SHAPE
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor as V1Interface
from vllm.v1.worker.gpu.sample.logits_processor import (
    LogitsContext,
    build_custom_logits_processors,
    build_custom_logits_processors_params_validator,
)

from optsample_triton.integrations.vllm import OptimalSampling, processor, read_records
from reference import truth

NAME = "optsample_triton.integrations.vllm:OptimalSampling"
VOCAB, SLOTS, LONGEST, STOP = 12, 3, 24, 5
EXTRAS = [None, {"optsample": True}, {"optsample_alpha": 0.3}, {"optsample": True, "optsample_target_prompt": [7, 8]}]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    set_seed(3)
    shape = {**SHAPE, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **shape)).save_pretrained(folder)
    return folder


def config(
    folder: Any,
    given: dict[str, Any],
    async_scheduling: bool = True,
    embeds: bool = False,
    sleep: bool = False,
    **more: Any,
) -> Any:
    """What the processor reads of an engine's configuration."""
    served = SimpleNamespace(
        get_vocab_size=lambda: VOCAB,
        tokenizer=None,
        skip_tokenizer_init=True,
        max_model_len=LONGEST,
        enable_prompt_embeds=embeds,
        enable_sleep_mode=sleep,
    )
    usual = {
        "speculative_config": None,
        "model_config": served,
        "parallel_config": SimpleNamespace(),
        "scheduler_config": SimpleNamespace(async_scheduling=async_scheduling),
        "additional_config": {"optsample": {"target": str(folder), "log_interval": 0, **given}},
    }
    return SimpleNamespace(**{**usual, **more})


class Request:
    """A request, and what its tokens and logits must be."""

    def __init__(self, name: int, prompt: list[int], extra: dict[str, Any] | None, max_tokens: int):
        self.name, self.prompt, self.extra, self.output, self.computed = name, prompt, extra, [], 0
        named = None if extra is None else {**extra, "optsample_id": name}
        self.params = SamplingParams(max_tokens=max_tokens, stop_token_ids=[STOP], extra_args=named)
        self.laws: list[torch.Tensor] = []

    @property
    def text(self) -> list[int]:
        return self.prompt + self.output

    @property
    def ended(self) -> bool:
        return len(self.output) >= self.params.max_tokens or self.output[-1:] == [STOP] or len(self.text) >= LONGEST

    @torch.no_grad()
    def law(self, model: LlamaForCausalLM, theta: torch.Tensor) -> torch.Tensor:
        """log q* of the next token, for these logits of the policy."""
        prompt = self.extra.get("optsample_target_prompt", self.prompt)
        t = model(input_ids=torch.tensor([prompt + self.output])).logits[0, -1]
        return truth.log_q(theta.double(), t.double(), alpha=self.extra.get("optsample_alpha"))


class Runner:
    """What the runner keeps, with CPU tensors instead of its buffers."""

    def __init__(self, folder: Any, settings: dict[str, Any], **more: Any):
        def tensor(*shape: int) -> Any:
            return SimpleNamespace(gpu=torch.full(shape, -7, dtype=torch.int32), np=np.full(shape, -7, dtype=np.int32))

        self.states = SimpleNamespace(
            device=torch.device("cpu"),
            max_num_reqs=SLOTS,
            vocab_size=VOCAB,
            all_token_ids=tensor(SLOTS, LONGEST),
            prompt_len=tensor(SLOTS),
            prefill_len=tensor(SLOTS),
            total_len=tensor(SLOTS),
        )
        (self.processor,) = build_custom_logits_processors(config(folder, settings, **more), self.states, False, [NAME])
        self.model = LlamaForCausalLM.from_pretrained(folder).eval()
        self.free = list(range(SLOTS))
        self.slots: dict[Request, int] = {}
        self.staged: list[tuple[int, list[int]]] = []
        self.mixed: dict[Request, bool] = {}

    def add(self, request: Request) -> None:
        slot = self.free.pop()
        self.slots[request] = slot
        request.computed = 0
        self.states.prompt_len.np[slot], self.states.prefill_len.np[slot] = len(request.prompt), len(request.text)
        self.staged.append((slot, request.text))
        self.mixed[request] = self.processor.add_request(slot, request.params)

    def remove(self, request: Request) -> None:
        self.free.append(self.slots.pop(request))

    def begin(self) -> None:
        for slot, text in self.staged:
            self.states.all_token_ids.gpu[slot, : len(text)] = torch.tensor(text, dtype=torch.int32)
            self.states.total_len.gpu[slot] = len(text)
        self.staged = []
        self.processor.apply_staged_writes()

    def step(self, scheduled: list[tuple[Request, int]], seed: int) -> None:
        """Run the model on ``count`` more tokens of each request, check the logits, draw."""
        for request, count in scheduled:
            request.computed += count
        slots = torch.tensor([self.slots[request] for request, _ in scheduled])
        ends = torch.tensor([request.computed for request, _ in scheduled])
        logits = torch.randn(len(scheduled), VOCAB, generator=torch.Generator().manual_seed(seed))
        logits[:, 11] = -torch.inf
        given = logits.clone()
        if seed % 2 or any(self.mixed[request] for request, _ in scheduled):
            context = LogitsContext(
                expanded_idx_mapping=slots,
                idx_mapping=slots,
                idx_mapping_np=slots.numpy(),
                expanded_local_pos=torch.zeros_like(slots),
                pos=ends - 1,
                input_ids=torch.tensor([r.text[r.computed - 1] for r, _ in scheduled], dtype=torch.int32),
                seq_lens_upper_bound_np=ends.numpy().astype(np.int32),
            )
            logits = self.processor.apply(logits, context)
        for row, (request, _) in enumerate(scheduled):
            whole = request.computed == len(request.text)
            if request.extra is None or not whole or request.ended:
                assert torch.equal(logits[row], given[row])
            else:
                torch.testing.assert_close(
                    logits[row].double(), request.law(self.model, given[row]), atol=2e-5, rtol=1e-5
                )
            if whole:
                self.draw(request, logits[row], given[row])

    def draw(self, request: Request, law: torch.Tensor, theta: torch.Tensor) -> None:
        token, length = int(law.argmax()), len(request.text)
        slot = self.slots[request]
        if length < LONGEST:
            self.states.all_token_ids.gpu[slot, length] = token
        self.states.total_len.gpu[slot] += 1
        if not request.ended:  # the token of an extra step is discarded
            request.output.append(token)
            request.laws.append(theta)


def test_speculation_is_refused(target):
    with pytest.raises(ValueError, match="speculative_config must be None"):
        Runner(target, {}, speculative_config=SimpleNamespace())


def test_embeddings_are_refused(target):
    """This runner would show zeros in place of the embeddings."""
    with pytest.raises(ValueError, match="enable_prompt_embeds must be False"):
        Runner(target, {}, embeds=True)


def test_sleep_is_refused(target):
    with pytest.raises(ValueError, match="enable_sleep_mode must be False"):
        Runner(target, {}, sleep=True)
    assert OptimalSampling(config(target, {}, sleep=True), torch.device("cpu"), False).settings.target == str(target)


def test_ranks_hold_the_same_batches(target, tmp_path, monkeypatch):
    """Only one rank writes records, but a stop token ends a request's cache on all of them in the same step."""
    seen = []
    for rank in range(2):
        monkeypatch.setattr(processor, "model_parallel_is_initialized", lambda: True)
        monkeypatch.setattr(processor, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        path = tmp_path / f"{rank}.jsonl"
        runner, chance = Runner(target, {"records": str(path)}), random.Random(0)
        states, stopped, over = [], 0, []
        for number in range(90):
            for request in over:
                runner.remove(request)
            while runner.free and chance.random() < 0.4:
                prompt = [chance.randrange(VOCAB) for _ in range(chance.randint(1, 6))]
                runner.add(Request(number, prompt, {"optsample": True}, 15))
            runner.begin()
            ends = [request for request in runner.slots if request.ended]
            if runner.slots:
                runner.step([(one, len(one.text) - one.computed) for one in runner.slots], number)
            over = [r for r in runner.slots if r in ends or (r.ended and r.output[-1] != STOP)]
            stopped += len(ends)
            caches = runner.processor.mixer.target._caches
            batches = list(dict.fromkeys(id(one.batch) for one in caches.values()))
            states.append([(k.index, x.length, x.row, batches.index(id(x.batch))) for k, x in caches.items()])
        runner.begin()
        runner.processor.tracker.close()
        seen.append(states)
        assert path.exists() == (rank == 0)
        assert stopped > 5
    assert seen[0] == seen[1]


def test_a_record_of_a_text_that_the_target_cannot_read(target, tmp_path):
    path = tmp_path / "records.jsonl"
    runner = Runner(target, {"records": str(path)})
    runner.processor.mixer.target.longest = 3
    request = Request(0, [1, 2, 3, 4, 6], {"optsample": True}, 2)
    runner.add(request)
    request.law = lambda _, theta: theta.double()
    for number in range(2):
        runner.begin()
        runner.step([(request, len(request.text) - request.computed)], number)
    runner.begin()
    (record,) = read_records(path)
    assert record["tokens"] == request.output
    assert record["prompt_tokens"] == 5
    assert record["status"] == [3, 3]


def test_a_target_prompt_without_tokens(target):
    """Without a tokeniser a text has no tokens, so there is no q*, not even one of the answer without a prompt."""
    runner = Runner(target, {})
    request = Request(0, [1, 2], {"optsample_target_prompt": "look"}, 4)
    request.law = lambda _, theta: theta.double()
    runner.add(request)
    for number in range(3):
        runner.begin()
        runner.step([(request, len(request.text) - request.computed)], number)
    assert len(request.output) == 3


def test_one_class_for_both_runners():
    assert issubclass(OptimalSampling, V1Interface)
    validate = build_custom_logits_processors_params_validator([NAME])
    validate(SamplingParams(extra_args={"optsample": True}))
    validate(SamplingParams(extra_args={"optsample_alpha": -1e6}))
    for alpha in (1e300, -3e38):
        with pytest.raises(Exception, match="optsample_alpha must be a finite number between -1e6 and 1e6"):
            validate(SamplingParams(extra_args={"optsample_alpha": alpha}))
    with pytest.raises(Exception, match="optsample must be true or false"):
        validate(SamplingParams(extra_args={"optsample": 3}))


@settings(max_examples=15, phases=[Phase.generate])
@given(data=st.data())
def test_any_order_of_events(target, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    limit = data.draw(st.sampled_from([20, 1000]), label="cache_tokens")
    runner = Runner(target, {"records": str(path), "cache_tokens": limit})
    waiting: list[Request] = []  # preempted
    requests: list[Request] = []
    over: list[Request] = []  # ended, but still in the batch for a step
    for number in range(data.draw(st.integers(5, 40), label="steps")):
        for request in over:
            runner.remove(request)
        over = []
        for request in list(runner.slots):
            event = data.draw(st.sampled_from(["goes on"] * 8 + ["aborted", "preempted"]))
            if event != "goes on":
                runner.remove(request)
                if event == "preempted" and request.computed >= len(request.text) - 1:
                    waiting.append(request)
        while runner.free and data.draw(st.booleans(), label="one more"):
            if waiting:
                runner.add(waiting.pop())
                continue
            prompt = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6))
            extra = data.draw(st.sampled_from(EXTRAS))
            requests.append(Request(len(requests), prompt, extra, data.draw(st.integers(1, 9))))
            runner.add(requests[-1])
        runner.begin()
        scheduled = []
        for request in data.draw(st.permutations(list(runner.slots))):
            left = len(request.text) - request.computed
            if data.draw(st.sampled_from([True] * 5 + [False])):
                scheduled.append((request, data.draw(st.integers(1, left)) if left > 1 else left))
        if scheduled:
            runner.step(scheduled, seed=number)
        for request in list(runner.slots):
            if request.ended:
                # A length is known beforehand; a token only after one more step has been scheduled.
                by_token = request.output[-1] == STOP and len(request.output) < request.params.max_tokens
                if not by_token or len(request.text) >= LONGEST:
                    runner.remove(request)
                elif request not in over:
                    over.append(request)
    assert runner.processor.mixer.target.tokens <= limit
    runner.processor.tracker.close()
    assert len(runner.processor.mixer.target) == 0
    records = {one["id"]: one for one in read_records(path)}
    assert set(records) == {one.name for one in requests if one.extra is not None and one.output}
    for name, one in records.items():
        assert one["tokens"] == requests[name].output
        assert one["prompt_tokens"] == len(requests[name].prompt)
        assert one["status"] == [0] * len(one["tokens"])
        for token, log_theta, theta in zip(one["tokens"], one["log_theta"], requests[name].laws, strict=True):
            assert log_theta == pytest.approx(float(theta.double().log_softmax(-1)[token]), abs=2e-5)
