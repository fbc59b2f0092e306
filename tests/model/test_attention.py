import pytest
import torch
from attention_reference import plain_softmax_attention, qkv

from pertoken.model.attention import AttentionLayout, KVCache, attention, cached_attention

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
LENGTHS = [
    (1,),
    (7,),
    (1, 1, 1),
    (129, 128, 7, 1),
    (1, 7, 128, 129),
    (300, 300),
    (300, 2, 2, 2, 300),
    (33, 32, 31, 30, 5, 4, 3, 2, 1),
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_and_its_gradients_are_exact_per_document(lengths, kv_heads):
    inputs = qkv(sum(lengths), kv_heads=kv_heads)
    out = attention(*inputs, layout=AttentionLayout.of(lengths, CPU))
    expected = plain_softmax_attention(*inputs, lengths)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    for got, want in zip(
        torch.autograd.grad((out * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_gradcheck_with_padding_inside():
    layout = AttentionLayout.of((3, 2, 1), CPU)
    assert layout.positions is not None
    inputs = qkv(6, heads=2, kv_heads=1, head_dim=2)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, layout=layout), inputs)


def test_no_documents_give_nothing_but_zero_gradients():
    inputs = qkv(0)
    out = attention(*inputs, layout=AttentionLayout.of((), CPU))
    assert out.shape == inputs[0].shape
    out.sum().backward()
    assert all(x.grad is not None for x in inputs)


@pytest.mark.parametrize(
    ("lengths", "rectangles"),
    [
        ((), ()),
        ((5,), ((1, 5),)),
        ((5, 5, 5), ((3, 5),)),  # one length: one rectangle, nothing padded
        ((20, 19, 18), ((3, 20),)),  # a few padded rows are cheaper than another rectangle
        ((1000, 999, 10, 9), ((2, 1000), (2, 10))),
        ((1000, 10, 1000), ((1, 1000), (1, 10), (1, 1000))),  # consecutive documents only
    ],
    ids=str,
)
def test_rectangles_hold_similar_neighbors(lengths, rectangles):
    layout = AttentionLayout.of(lengths, CPU)
    assert layout.rectangles == rectangles
    assert (layout.positions is None) == (sum(s * t for s, t in rectangles) == sum(lengths))


def test_rectangles_are_the_cheapest_of_all_cuts():
    def cost(rectangles):
        return sum(s * t * (t + 32) + 256**2 for s, t in rectangles)

    def all_cuts(lengths):
        for marks in range(2 ** (len(lengths) - 1)):
            groups = [[lengths[0]]]
            for i, length in enumerate(lengths[1:]):
                if marks >> i & 1:
                    groups.append([])
                groups[-1].append(length)
            yield [(len(group), max(group)) for group in groups]

    for lengths in [(340, 299, 250, 249, 180, 160), (10, 200, 300, 20, 300, 310, 5), (150, 149, 90, 60, 60, 1)]:
        got = cost(AttentionLayout.of(lengths, CPU).rectangles)
        assert got == min(cost(cut) for cut in all_cuts(lengths)), lengths


@pytest.mark.parametrize("chunks", [(9,), (1,) * 9, (4, 1, 1, 3), (1, 5, 3)], ids=str)
def test_cached_attention_equals_attention_however_the_tokens_arrive(chunks):
    inputs = [x.detach() for x in qkv(sum(chunks))]
    cache = KVCache(layers=2, kv_heads=2, head_dim=8, max_length=12, like=inputs[0])
    outputs = []
    for part in zip(*(x.split(chunks) for x in inputs), strict=True):
        outputs.append(cached_attention(*part, cache=cache, layer=1))
        cache.length += part[0].shape[0]
    expected = plain_softmax_attention(*inputs, (sum(chunks),))
    torch.testing.assert_close(torch.cat(outputs), expected, rtol=1e-10, atol=1e-12)
