"""Engines short of memory: prompts read in chunks, requests preempted, target caches dropped."""

from engines import greedy, some_prompts

from optsample_triton.integrations.vllm import read_records

EXTRAS = [
    {"optsample": True},
    None,
    {"optsample_alpha": 0.6, "optsample_target_prompt": "look here: "},
    {"optsample_method": "entropy"},
]


def crowd(engine, lengths, steps, seed):
    """Many requests at once; each must generate what it would generate alone."""
    prompts = some_prompts(lengths, seed=seed)
    extras = [EXTRAS[k % len(EXTRAS)] for k in range(len(prompts))]
    named = [None if extra is None else {**extra, "optsample_id": k} for k, extra in enumerate(extras)]
    outputs = engine.generate(prompts, [greedy(steps, extra) for extra in named])
    made = [list(output.outputs[0].token_ids) for output in outputs]
    for prompt, extra, tokens in zip(prompts, extras, made, strict=True):
        assert tokens == engine.two_models(prompt, steps, extra)
    assert engine.left_over() == (0, 0, 0)
    return made


def test_chunked_prefill_and_preemption(start, tmp_path):
    path = tmp_path / "records.jsonl"
    engine = start(
        {"records": str(path), "prefill_chunk": 7},
        num_gpu_blocks_override=9,
        block_size=32,
        max_num_batched_tokens=32,
        max_num_seqs=8,
        enable_prefix_caching=False,
    )
    made = crowd(engine, [50, 20, 31, 33, 64, 5, 40, 90], steps=24, seed=1)
    assert engine.count("num_preemptions") > 0
    # A preempted request has one line for each part; read_records joins them.
    assert len(path.read_text().splitlines()) > len(read_records(path))
    records = {one["id"]: one for one in read_records(path)}
    assert {name: one["tokens"] for name, one in records.items()} == {k: made[k] for k in records}
    assert set(records) == {0, 2, 3, 4, 6, 7}
    for one in records.values():
        assert len(one["alpha"]) == len(one["log_t"]) == 24
        assert None not in one["alpha"] + one["log_t"]


def test_target_caches_are_bounded(start):
    engine = start()
    target, highest = engine.processor.mixer.target, 0
    read = target.read

    def watched(*arguments):
        nonlocal highest
        logits = read(*arguments)
        highest = max(highest, target.tokens)
        return logits

    target.read = watched
    used = []
    for limit in (1, 60, 150, 1000):
        target.cache_tokens, target.evicted, highest = limit, 0, 0
        crowd(engine, [50, 4, 20, 31, 33], steps=8, seed=2)
        assert highest <= limit
        assert (target.evicted > 0) == (limit < 1000)
        used.append(highest)
    assert used[0] == 0 < used[1] < used[2] < used[3]
    # Samples of one prompt start from one cache; once they continue, each counts separately.
    (prompt,) = some_prompts([30], seed=3)
    target.cache_tokens, target.evicted, highest = 100, 0, 0
    outputs = engine.generate([prompt] * 5, [greedy(6, {"optsample": True})] * 5)
    expected = engine.two_models(prompt, 6, {"optsample": True})
    assert [list(one.outputs[0].token_ids) for one in outputs] == [expected] * 5
    assert highest <= 100 < 5 * 31
    assert target.evicted > 0


def test_the_log_line(start, caplog_vllm):
    engine = start({"log_interval": 1e-6})
    engine.generate(some_prompts([10, 20]), [greedy(4, {"optsample": True}), greedy(4)])
    lines = [line for line in caplog_vllm if line.startswith("q*: ")]
    assert len(lines) >= 4
    assert "1 requests running, 2 rows mixed, 0 of them invalid; target: 1 caches with 11 of 131072 tokens" in lines[1]
