"""bench/train_step.py: FlexAttention, SDPA, the public step and ours give one loss and gradient; no wrong side wins."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT
from higgs_tune.train.data.batch import collate
from torch import nn

CPU = torch.device("cpu")
VOCABULARY = 1_000


@pytest.fixture(autouse=True)
def _bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


@pytest.mark.fast
def test_all_sides_give_one_loss_and_one_gradient() -> None:
    """The table's four sides at tiny sizes, two packs."""
    import train_step

    options = train_step.Options(size="tiny", samples=4, vocabulary=VOCABULARY, tokens_per_pack=1024, parts=True,
                                 pairs=1)  # fmt: skip
    *_, result = train_step.measure(options, CPU)
    assert list(result["sides"]) == ["public", "packed peer", "ours", "ours, plain"] and result["packs"] > 1
    for name, apart in result["relative_differences"].items():
        assert max(apart.values()) < 1e-5, name


def test_in_bfloat16_float32_is_the_reference() -> None:
    """A side may be a quarter farther from it than the public step in bfloat16 is."""
    import train_step

    options = train_step.Options(size="tiny", samples=4, vocabulary=VOCABULARY, tokens_per_pack=1024, parts=True,
                                 pairs=1, dtype="bfloat16")  # fmt: skip
    *_, result = train_step.measure(options, CPU)
    apart, limits = result["relative_differences"], result["limits"]
    assert result["exact"] == "public, float32" and apart["public"]["gradients"] > 1e-4
    assert limits["gradients"] == limits["grad_norm"] == 1.25 * apart["public"]["gradients"]
    assert all(train_step.agrees(found, limits) for found in apart.values()), apart
    wrong = apart["ours"] | {"gradients": 2 * apart["public"]["gradients"]}
    assert not train_step.agrees(wrong, limits)


@pytest.mark.fast
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flex_attention_is_sdpa_sample_by_sample(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, by plain operations: samples whose lengths are no multiple of a block, and a mask by hand."""
    from models import packed_peer, synthetic

    # torch refuses backward on a CPU, for want of a compiled kernel; the plain operations have one
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    samples = [synthetic.synthetic_sample(n, frames=(7 + 40 * n, 20), text=50 + n) for n in range(4)]
    samples, ids = synthetic.narrow(samples, synthetic.IDS, VOCABULARY)
    model = synthetic.make_model(synthetic.config_of(synthetic.SIZES["tiny"], VOCABULARY, ids), CPU, dtype)
    parameters = [p for p in synthetic.with_lora(model).parameters() if p.requires_grad]
    batch = collate(samples, 0.0, ids)
    q, k, v = (torch.randn(1, heads, batch.positions, 32) for heads in (4, 2, 2))
    of_sample = torch.repeat_interleave(torch.arange(4), torch.tensor(batch.lengths))
    mask = (of_sample[:, None] == of_sample).tril()
    expected = nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    weights = torch.ones(2 + ids.codebooks)
    losses, gradients = [], []
    for attend in (packed_peer.sdpa_attend(batch), packed_peer.flex_attend(batch, compiled=False)):
        torch.testing.assert_close(attend(q, k, v), expected)
        losses.append(packed_peer.peer_step(model, weights, batch, attend))
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        for parameter in parameters:
            parameter.grad = None
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=0.0)
    assert (gradients[1] - gradients[0]).norm() < tolerance * gradients[0].norm()


@pytest.mark.fast
@pytest.mark.parametrize(("wrong", "choice"), [
    ((), "triton"), (("ours, triton",), "compiled"), (("ours", "ours, triton"), "compiled"),
    (("ours", "ours, compiled", "ours, triton"), None),
])  # fmt: skip
@pytest.mark.parametrize("apart", [2e-2, float("nan")])
def test_a_side_that_differs_is_not_chosen(wrong: tuple[str, ...], choice: str | None, apart: float) -> None:
    """Whichever of its figures it is; plain operations and the peer are no choice, however fast."""
    import train_step

    seconds = {"packed peer": 0.1, "ours, plain": 0.1, "ours": 3.0, "ours, compiled": 2.0, "ours, triton": 1.0}
    sides = [train_step.Side(name, [], torch.sum, seconds=[value]) for name, value in seconds.items()]
    for figure in ("loss", "grad_norm", "gradients"):
        figures = {"loss": 1e-7, "grad_norm": 1e-7, "gradients": 1e-7}
        found = {name: figures | ({figure: apart} if name in wrong else {}) for name in seconds}
        assert train_step.fastest(sides, found, train_step.limits_of(found, "float32")) == choice
