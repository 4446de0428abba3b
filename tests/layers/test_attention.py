"""Attention by products of our own says the same as its definition, where it pays and nowhere else."""

import pytest
import torch
from torch import Tensor

from stts_lightning import create_model
from stts_lightning.layers import attention, products
from stts_lightning.layers.attention import attend


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attention is worth products, as on a processor whose default product lags."""
    for module in (attention, products):
        monkeypatch.setattr(module, "default_lags", lambda: True)
    for name in ("WORTH_A_THREAD", "WORTH_KEEPING_NONE"):
        monkeypatch.setattr(attention, name, 0)


def drawn(batch: int, heads: int, tokens: int, keys: int, channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values as a linear layer leaves them: heads side by side."""
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(batch, n, heads, channels, generator=generator).to(dtype) for n in (tokens, keys, keys))
    return [x.requires_grad_().transpose(1, 2) for x in rows]


def defined(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + (0 if bias is None else bias.double())
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2).float()


SIZES = [(1, 1, 40, 9, 8), (2, 3, 21, 7, 4), (2, 2, 7, 30, 12), (1, 4, 1, 5, 6)]


@pytest.mark.usefixtures("pays")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pieces", ["queries", "weights", "one"])
@pytest.mark.parametrize("biased", [False, True])
def test_it_says_what_its_definition_says_and_so_does_its_backward_pass(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int, int, int], pieces: str, biased: bool
) -> None:
    if pieces == "queries":
        monkeypatch.setattr(attention, "PIECE", 6)  # Several, the last one smaller.
    if pieces == "weights":
        monkeypatch.setattr(attention, "WEIGHTS_AT_A_TIME", 4 * size[3])
    parts = drawn(*size)
    if biased:
        parts.append(torch.randn(*size[1:4], generator=torch.Generator().manual_seed(4)).requires_grad_())
    out, wanted = attend(*parts), defined(*parts)
    assert "Attend" in type(out.grad_fn.next_functions[0][0]).__name__  # type: ignore[union-attr]
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=1e-5)
    above = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours, plain = torch.autograd.grad(out, parts, above), torch.autograd.grad(wanted, parts, above)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(attend(*parts), out, atol=2e-6, rtol=1e-5)


@pytest.mark.usefixtures("pays")
def test_gradients_may_come_as_one_number_for_all() -> None:
    parts = drawn(2, 2, 9, 5, 4)
    ours = torch.autograd.grad(attend(*parts).sum(), parts)
    torch.testing.assert_close(ours, torch.autograd.grad(defined(*parts).sum(), parts), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("pays")
def test_nothing_but_queries_keys_and_values_is_kept() -> None:
    parts, kept = drawn(1, 2, 50, 40, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attend(*parts)
    assert sorted(kept) == sorted(x.numel() for x in parts)


@pytest.mark.parametrize(("lags", "biased", "ours"), [(False, False, False), (True, False, True), (False, True, True)])
@pytest.mark.parametrize("large", [False, True])
def test_the_library_attends_where_products_do_not_pay(
    monkeypatch: pytest.MonkeyPatch, pays: None, lags: bool, biased: bool, ours: bool, large: bool
) -> None:
    monkeypatch.setattr(attention, "default_lags", lambda: lags)
    if not large:
        monkeypatch.undo()
    parts = drawn(1, 2, 9, 5, 4)
    if biased:
        parts.append(torch.randn(2, 9, 5, requires_grad=True))
    made_by = type(attend(*parts).grad_fn.next_functions[0][0]).__name__  # type: ignore[union-attr]
    assert ("Attend" in made_by) == (ours and large)


def test_bf16_is_left_to_the_library(pays: None) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        parts = drawn(1, 2, 9, 5, 4, torch.bfloat16)
        wanted = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        assert attend(*parts).equal(wanted)


@pytest.mark.parametrize("columns", [(5, 12), (12, 5)])
@pytest.mark.parametrize("lags", [False, True])
def test_the_gradient_of_a_weight_in_parts(monkeypatch: pytest.MonkeyPatch, lags: bool, columns: tuple[int, int]) -> None:
    monkeypatch.setattr(products, "default_lags", lambda: lags)
    above, rows = (torch.randn(30, n, generator=torch.Generator().manual_seed(n)) for n in columns)
    found = None
    for part in (slice(0, 20), slice(20, 30)):
        found = products.outer(above[part], rows[part], found)
    torch.testing.assert_close(found, above.T @ rows)
    assert products.outer(above[:0], rows[:0]).equal(torch.zeros(columns))
    with torch.autocast("cpu", torch.bfloat16):  # As a backward pass may find it.
        inside = products.outer(above[20:], rows[20:], products.outer(above[:20], rows[:20]))
    torch.testing.assert_close(inside, found)


def test_what_the_default_product_is_worth_is_asked_of_the_cpu_whatever_tensors_are_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    product, seen = products.product, []

    def watched(x: Tensor, *rest: Tensor | None) -> Tensor:
        seen.append((x.device.type, x.dtype, torch.is_autocast_enabled("cpu")))
        return product(x, *rest)

    monkeypatch.setattr(products, "product", watched)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            products.default_lags.__wrapped__()
    finally:
        torch.set_default_dtype(torch.float32)
    assert set(seen) == {("cpu", torch.float32, False)}


@pytest.mark.parametrize("name", ["mvit_tiny", "video_swin_tiny"])
@pytest.mark.parametrize("selection", [None, "t0_0.5_s2_0.75"])
def test_a_model_learns_alike_either_way(monkeypatch: pytest.MonkeyPatch, selection: str | None, name: str) -> None:
    found = []
    for pays in (False, True):
        for module in (attention, products):
            monkeypatch.setattr(module, "default_lags", lambda pays=pays: pays)
        for least in ("WORTH_A_THREAD", "WORTH_KEEPING_NONE"):
            monkeypatch.setattr(attention, least, 0 if pays else 2**40)
        torch.manual_seed(0)
        model = create_model(name, selection, 4).train()
        clip = torch.randn(2, 3, *model.backbone.clip_size, generator=torch.Generator().manual_seed(3))
        model.slots.seed_noise([1, 2])
        torch.nn.functional.cross_entropy(model(clip), torch.tensor([0, 3])).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 50
    for name, plain in found[0].items():  # Some are zero but for rounding, as a score's bias moves no maximum.
        assert (found[1][name] - plain).abs().max() < 5e-5 * plain.abs().max() + 2e-6, name
