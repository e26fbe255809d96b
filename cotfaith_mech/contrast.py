"""The reader's answer a* against a foil: where in the forced answer they part, and what is read there.

Logit difference is read at the first token where a* and the foil diverge, their shared prefix teacher-forced; the
probability of a* is that of all its tokens. Source: MEASURES 'Reading an answer'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .chains import token_spans
from .errors import CotfaithError
from .model import Reduce
from .reading import Trunk


@dataclass(frozen=True)
class AnswerContrast:
    """Where a* and a foil part: token ids of a*, index of the first differing one, and the two tokens there."""

    answer_ids: tuple[int, ...]
    index: int
    answer_token: int
    foil_token: int

    @classmethod
    def of(cls, trunk: Trunk, foil: str) -> AnswerContrast:
        """Contrast of the trunk's a* with `foil`; CotfaithError where they cannot be compared token by token."""
        own = _answer_ids(trunk, trunk.chain.answer)
        other = _answer_ids(trunk, foil)
        if own == other:
            raise CotfaithError(f"The foil {foil!r} is the reader's own answer; give another foil.")
        if len(own) != len(other):
            raise CotfaithError(
                f"a* {trunk.chain.answer!r} has {len(own)} tokens and the foil {foil!r} has {len(other)}; "
                "give a foil of the same token length."
            )
        index = next(i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a != b)
        return cls(own, index, own[index], other[index])

    @classmethod
    def named(cls, trunk: Trunk, answer: str | None) -> AnswerContrast:
        """Contrast with another answer (`'22'`), or where there is none with the runner-up: the likeliest other token
        in place of a*'s first visible one."""
        if answer is not None:
            return cls.of(trunk, f" {answer}")
        own = _answer_ids(trunk, trunk.chain.answer)
        index = next((i for i, token in enumerate(own) if trunk.model.decode([token]).strip()), 0)
        logits = trunk.run.logits(len(own) + 1)[index]
        first, second = logits.topk(2).indices.tolist()
        return cls(own, index, own[index], second if first == own[index] else first)

    @classmethod
    def alone(cls, trunk: Trunk) -> AnswerContrast:
        """a* without a foil: its logit difference is 0 and means nothing, its probability is read as ever."""
        own = _answer_ids(trunk, trunk.chain.answer)
        return cls(own, 0, own[0], own[0])

    def difference(self, logits: Float[Tensor, "row 1 vocab"]) -> Float[Tensor, "row"]:
        """Logit difference of a* and the foil, of the logits where they part alone."""
        return logits[:, 0, self.answer_token] - logits[:, 0, self.foil_token]

    def beside(self, base: Float[Tensor, "read vocab"]) -> Reduce:
        """`reduce`, and as a last column the divergence KL(base || edited) of the next token where a* and the foil
        part, in nats."""
        own = base[self.index].log_softmax(-1)

        def reduce(logits: Float[Tensor, "cell read vocab"]) -> Float[Tensor, "cell 7"]:
            edited, kept = logits[:, self.index].log_softmax(-1), own.to(logits.device)
            divergence = torch.where(kept.exp() == 0, 0, kept.exp() * (kept - edited)).sum(-1)
            return torch.cat([self.reduce(logits), divergence[:, None]], 1)

        return reduce

    def reduce(self, logits: Float[Tensor, "cell read vocab"]) -> Float[Tensor, "cell 6"]:
        """Logit difference, p(a*), is the foil's token the argmax where they part, is a*'s, is all of a* greedy, log
        p(a*) in nats.

        All are NaN where a logit is: the argmax of such logits says nothing.
        """
        logits = logits[:, : len(self.answer_ids)]
        here = logits[:, self.index]
        ids = torch.tensor(self.answer_ids, device=logits.device)
        logp = logits.log_softmax(-1).gather(2, ids.expand(len(logits), -1)[..., None]).sum((1, 2))
        greedy = (logits.argmax(-1) == ids).all(-1).to(logp)
        difference = here[:, self.answer_token] - here[:, self.foil_token]
        says = [(here.argmax(-1) == token).to(logp) for token in (self.foil_token, self.answer_token)]
        found = torch.stack([difference, logp.exp(), *says, greedy, logp], 1)
        return found.masked_fill(logp.isnan()[:, None], torch.nan)

    @property
    def n_logits(self) -> int:
        return len(self.answer_ids) + 1


def _answer_ids(trunk: Trunk, answer: str) -> tuple[int, ...]:
    forced = trunk.chain.with_answer(answer)
    encoding = trunk.model.encode(forced.text)
    return encoding.ids[token_spans(forced, encoding).answer[0] :]
