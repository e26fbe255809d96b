"""A model that NDIF holds: every pass is one of nnsight's requests, and no weight is on this machine.

Here are its tokenizer, its config, and its module tree on the meta device, by which sites get their names. The server
is nnsight's CONFIG.API.HOST (NDIF_HOST), the key its CONFIG.API.APIKEY (NDIF_API_KEY), which no record and no manifest
holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

from torch import Tensor

from ..errors import CotfaithError, EndpointError
from ..model import Run
from .nnsight import NnsightModel
from .weights import Weights, attention_of


class NdifModel(NnsightModel):
    """Whole forwards on NDIF, one request each, and greedy writing. What reads weights is refused.

    `weights_hash` names the server, the model and the hub's commit of its config: the values are not to be seen.
    Raises CotfaithError where there is no key, or config and tokenizer are neither cached nor on the hub.
    """

    def __init__(self, name: str) -> None:
        import nnsight
        import transformers
        from nnsight.schema.config import CONFIG

        if not CONFIG.API.APIKEY:
            raise CotfaithError(f"{name!r} is to run on NDIF, which wants a key; put yours into NDIF_API_KEY.")
        CONFIG.APP.REMOTE_LOGGING = False
        try:
            config = transformers.AutoConfig.from_pretrained(name)
            traced: Any = nnsight.TransformersModel(
                name,
                task="text-generation",
                tokenizer=transformers.AutoTokenizer.from_pretrained(name),
                attn_implementation=attention_of(config),
            )
        except (OSError, ValueError) as error:
            raise CotfaithError(
                f"Config and tokenizer of {name!r} are neither in the hub's cache nor to be had "
                f"({type(error).__name__}); give a hub id that NDIF serves (`nnsight.status()` lists them)."
            ) from error
        served = f"{name}@{CONFIG.API.HOST} {getattr(config, '_commit_hash', None)}"
        identity = hashlib.sha256(served.encode()).hexdigest()[:16]
        super().__init__(Weights(name, traced._module, traced.tokenizer, identity), remote=True, traced=traced)
        self.info = replace(self.info, backend="ndif", device="cpu")

    def run(self, *args: Any, **kwargs: Any) -> Run:
        """See `Model.run`. Raises EndpointError where NDIF gives no result."""
        with self._asking():
            return super().run(*args, **kwargs)

    def _continued(self, **settings: Any) -> Tensor:
        if settings.pop("logits_processor"):
            self._refuse("draws are made by code of this process; set temperature: 0")
        model = self._traced
        ids, mask = settings.pop("input_ids"), settings.pop("attention_mask")
        with self._asking():  # noqa: SIM117
            with model.generate({"input_ids": ids, "attention_mask": mask}, remote=True, **settings) as tracer:
                written = tracer.result.save()
        return written

    @contextmanager
    def _asking(self) -> Iterator[None]:
        import httpx
        import websocket
        from nnsight.intervention.backends.remote import RemoteError
        from nnsight.schema.config import CONFIG

        try:
            yield
        except (RemoteError, OSError, httpx.HTTPError, websocket.WebSocketException) as error:
            told = " ".join(str(error).replace(CONFIG.API.APIKEY or "\0", "***").split())[:300]
            raise EndpointError(
                f"NDIF gave no result for {self.info.name!r} ({type(error).__name__}: {told}); see whether it is "
                "served (`nnsight.status()`) and the key is right, and run again."
            ) from error

    def direct_path(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("direct contributions read its weights; leave attribution out")

    def written_norm(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("attention weighed by values reads its weights; leave attribution out")

    def lens(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("the logit lens reads its weights; leave the decision trace out")

    def _refuse(self, why: str) -> NoReturn:
        raise CotfaithError(f"{self.info.name!r} is on NDIF and not here: {why}.")
