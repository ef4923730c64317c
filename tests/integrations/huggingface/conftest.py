"""Tiny models made here: random ones of two architectures, and two that were trained a little, so that laws differ."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from models import gpt2, llama, train


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)  # matrices of 32 columns gain nothing from more


@pytest.fixture(scope="session")
def pairs():
    """name -> (pi_theta, pi_t), vocabularies of 100 tokens."""
    a, b, c = llama(seed=1), gpt2(seed=2), llama(seed=3)
    return {
        "llama, gpt2": (a, b),
        "gpt2, llama": (b, a),
        "llama, llama": (a, c),
        "trained": (train(llama(seed=4, scale=0.02), jump=3), train(gpt2(seed=5, scale=0.02), jump=4)),
    }


@pytest.fixture(scope="session")
def small_pair():
    """Two trained models with 8 tokens, so that the law of three tokens can be written down."""
    made = [
        train(make(vocab=8, seed=seed, scale=0.02), jump=jump) for make, seed, jump in ((llama, 6, 2), (gpt2, 7, 3))
    ]
    for model in made:
        model.generation_config.eos_token_id = None
    return tuple(made)
