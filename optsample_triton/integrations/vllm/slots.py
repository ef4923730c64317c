"""The V2 model runner: slots that are reused, tokens on the device, and no message when a request ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optsample_triton.integrations.vllm.mixer import MixedRequest, Mixer
from optsample_triton.integrations.vllm.target import Texts


@dataclass(eq=False)
class Slot(MixedRequest):
    index: int = 0
    served: int = 0  # tokens of the served text at the last step, prompt included
    generated: int = 0  # how many of them were generated


class Slots:
    """Which request is in which slot.

    The runner reports when a slot is filled, never when it is freed. A request ends here as soon as its own parameters
    say so. Other ends (a stop string, an abort) are noticed when a step runs without the request: then its record is
    handed over. Its cache is dropped when it has not been used for a while, or when the slot is refilled.
    """

    def __init__(self, mixer: Mixer, admit: Callable[..., Slot | None], states: Any, max_model_len: int):
        self.mixer, self.admit, self.states, self.max_model_len = mixer, admit, states, max_model_len
        self.requests: dict[int, Slot] = {}
        self._ran: list[Slot] = []

    def add(self, index: int, params: Any) -> bool:
        """Put a request into a slot; return whether it is mixed."""
        self._settle()  # while the device still holds the tokens of the slot's last request
        self.mixer.end(self.requests.pop(index, None))
        request = self.admit(Slot, params, 0, ())
        if request is None:
            return False
        request.index = index
        self.requests[index] = request
        return True

    def flush(self) -> None:
        """Called before every step, even one that runs nothing."""
        self._settle()
        for one in self._ran:
            # Its slot may have been refilled since.
            if self.requests.get(one.index) is one and self._ended(one):
                self.mixer.end(self.requests.pop(one.index))
        self._ran = []
        self.mixer.log(len(self.requests))

    def apply(self, logits: Tensor, context: Any) -> Tensor:
        running = context.idx_mapping_np.tolist()
        if self.requests:
            for index in self.requests.keys() - set(running):
                self.mixer.hand_over(self.requests[index])
        rows, requests = [], []
        for row, index in enumerate(running):
            request = self.requests.get(index)
            length = int(context.seq_lens_upper_bound_np[row])  # exact without speculation
            # The prompt is still being read: the engine discards what is drawn from this row.
            if request is None or length < int(self.states.prefill_len.np[index]):
                continue
            request.served = length
            request.generated = length - int(self.states.prompt_len.np[index])
            if request.record is not None and not request.record.prompt_tokens:
                served = self._served(request)
                start = request.served - request.generated
                request.record.begin(start, served[start:])
            rows.append(row)
            requests.append(request)
        self._ran = requests
        if not rows:
            return logits
        texts = Texts(
            [one.prompt.length(one.served - one.generated) + one.generated for one in requests],
            context.input_ids[torch.tensor(rows, device=context.input_ids.device)].long(),
            lambda i: self._text(requests[i]),
        )
        return self.mixer.mix(logits, rows, requests, texts)

    def close(self) -> None:
        try:
            self._settle()
        finally:  # even if the device fails, hand over what is already known
            for one in self.requests.values():
                self.mixer.end(one)
            self.requests = {}

    def _text(self, one: Slot) -> list[int]:
        """All tokens that the target has to read. Waits for the device."""
        served, start = self._served(one), one.served - one.generated
        prompt = one.prompt.ids(served[:start])
        return prompt and [*prompt, *served[start:]]

    def _served(self, one: Slot) -> list[int]:
        tokens: list[int] = self.states.all_token_ids.gpu[one.index, : one.served].tolist()
        return tokens

    def _settle(self) -> None:
        """Fetch the tokens of the last step for the records."""
        waiting = [one for one, _ in self.mixer.waiting()]
        if not waiting:
            return
        all_ids, total = self.states.all_token_ids.gpu, self.states.total_len.gpu
        index = torch.tensor([one.index for one in waiting], device=all_ids.device)
        place = torch.tensor([one.served for one in waiting], device=all_ids.device)
        tokens = all_ids[index, place.clamp(max=all_ids.shape[1] - 1)]
        found = torch.stack([tokens.long(), (total[index] > place).long()], 1).tolist()
        self.mixer.settle([token if drawn else None for token, drawn in found])

    def _ended(self, one: Slot) -> bool:
        """Whether the engine stops this request: by its length or, if its tokens are recorded, by the last one."""
        params, limit = one.params, one.params.max_tokens
        if one.served + 1 >= self.max_model_len or (limit is not None and one.generated + 1 >= limit):
            return True
        if one.record is None or not one.record.tokens:
            return False
        last = one.record.tokens[-1]
        return bool(last == params.eos_token_id or last in (params.stop_token_ids or ()))
