"""Against the running engine: tokens, caches, grammars and log-probabilities."""

from engines import greedy, some_prompts

MIXED = [
    None,
    {"optsample_alpha": 0.3},
    {"optsample": True},
    {"optsample": True, "optsample_target_prompt": "look here: "},
    {"optsample_method": "ess_balance", "optsample_target_prompt": [5, 6, 7, 250]},
]


def test_mixed_requests_equal_a_two_model_loop(start):
    engine = start()
    prompts = some_prompts([5, 9, 33, 2, 17])
    outputs = engine.generate(prompts, [greedy(extra=extra) for extra in MIXED])
    for prompt, extra, output in zip(prompts, MIXED, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == engine.two_models(prompt, 16, extra)
    assert engine.left_over() == (0, 0, 0)
