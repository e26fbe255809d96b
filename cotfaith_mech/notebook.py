"""What a notebook shows of one chain: its steps coloured by an effect, and the layer x step map of a patch."""

from __future__ import annotations

from dataclasses import dataclass

from . import views
from .chains import Chain
from .errors import CotfaithError
from .markup import caption, chain_markup, framed, limit_of, map_markup, scale, signed
from .outcomes import Table
from .tables import Results, table


@dataclass(frozen=True)
class ChainView:
    """A chain with one effect of each step, which a notebook shows as colours.

    `values`: pandas.Series by step, NaN where a step was not measured; unit and meaning are those of `effect`.
    """

    chain: Chain
    reader: str
    effect: views.Effect
    values: Table

    def _repr_html_(self) -> str:
        chain, values, unit = self.chain, self.values.tolist(), self.effect.unit
        label = f"{self.effect.label}, reader {self.reader}: {self.effect.meaning} ({unit})"
        shown = chain_markup(chain.prompt, chain.steps, chain.cue, chain.answer, values, unit)
        return shown + framed(scale(limit_of(values), label))


@dataclass(frozen=True)
class Heatmap:
    """What a patch of each step at each layer does to the logit difference, which a notebook shows as colours.

    `values`: pandas.DataFrame, a row a step and a column a layer, of the edited run minus the base run (logits); NaN
    where nothing was measured.
    """

    chain: Chain
    reader: str
    variant: str
    values: Table

    def _repr_html_(self) -> str:
        layers = [int(layer) for layer in self.values.columns]
        cells = self.values.to_numpy(float)
        titles = [
            [f"step {j}, layer {at}: {signed(value, 'logits')}" for at, value in zip(layers, row, strict=True)]
            for j, row in enumerate(cells.tolist())
        ]
        names = [f"{j}  {step.strip()}" for j, step in enumerate(self.chain.steps)]
        title = f"Patching {self.variant}, reader {self.reader}, problem {self.chain.problem_id}: step x layer"
        label = "change of the logit difference (logits)"
        drawn = map_markup(names, layers, cells, titles) + scale(limit_of(cells.ravel().tolist()), label)
        return framed(caption(title) + drawn)


def chain_view(results: Results, chain: Chain, effect: str | None = None, reader: str | None = None) -> ChainView:
    """The steps of `chain` with an effect that `results` hold of each: 'knockout', 'mistake', 'patch', 'direct',
    'infogain' or 'entropy_drop' (None: the first of these that was measured).

    `results` as for `table`; `reader` is needed where they are of several. Raises CotfaithError when the effect was not
    measured on this chain, naming those that were.
    """
    rows, reader = _of_chain(results, chain, reader)
    found = views.step_effects(rows)
    measured = [known for known in views.EFFECTS if known.key in set(found["effect"])]
    chosen = next((known for known in measured if effect in (None, known.key)), None)
    if chosen is None:
        raise CotfaithError(
            f"The results hold no effect {effect or 'of single steps'!r} of this chain's steps, but "
            f"{', '.join(known.key for known in measured) or 'none at all'}; measure_knockout, measure_behaviour, "
            "measure_patching and measure_attribution give them."
        )
    values = found[found["effect"] == chosen.key].set_index("step")["value"]
    return ChainView(chain, reader, chosen, values.astype(float).reindex(range(len(chain.steps))))


def heatmap(results: Results, chain: Chain, variant: str | None = None, reader: str | None = None) -> Heatmap:
    """The layer x step map of patching whole steps of `chain`.

    `results` as for `table`; `variant` is that of the records ('noise', 'denoise/z', …; None: the plainest, denoising
    before noising); `reader` is needed where results are of several. Raises CotfaithError when nothing such was
    measured, naming the variants that were.
    """
    rows, reader = _of_chain(results, chain, reader)
    cells = views.patches(rows)
    variants = sorted(set(cells["variant"]))
    if not variants or variant not in (None, *variants):
        raise CotfaithError(
            f"The results hold no patch {variant or 'of whole steps'!r} of this chain, but "
            f"{', '.join(variants) or 'none at all'}; measure_patching with parts=('step',) gives them."
        )
    variant = variant or views.main_patch(variants)
    chosen = cells[cells["variant"] == variant]
    wide = chosen.pivot_table(index="step", columns="layer", values="effect").astype(float)
    return Heatmap(chain, reader, variant, wide.reindex(range(len(chain.steps))).sort_index(axis=1))


def _of_chain(results: Results, chain: Chain, reader: str | None) -> tuple[Table, str]:
    """The records of `chain` and one reader, and which reader that is."""
    rows = table(results)
    rows = rows[rows["chain_id"] == chain.chain_id]
    readers = sorted(set(rows["reader"]))
    if not readers:
        raise CotfaithError(
            f"The results hold nothing of chain {chain.chain_id} of problem {chain.problem_id!r}; "
            "measure it, or give the chain that was measured."
        )
    if reader is None and len(readers) == 1:
        (reader,) = readers
    if reader not in readers:
        raise CotfaithError(
            f"The results hold chain {chain.chain_id} of problem {chain.problem_id!r} as read by "
            f"{', '.join(readers)}, and reader={reader!r} was asked for; name one of these readers."
        )
    return rows[rows["reader"] == reader], str(reader)
