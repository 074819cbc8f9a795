import pytest
import torch

from fedvision.albef import gradcam
from fedvision.albef.model import Pretraining
from fedvision.albef.retrieval import Retrieval
from fedvision.seeds import generator


@pytest.fixture
def retrieval(vision, text, group):
    network = Retrieval(vision, text, 16, 16, generator(0, "model")).eval()
    network.load_state_dict(group("ret/sd/"))
    return network


@pytest.mark.golden
@pytest.mark.parametrize("layer", [2, 3])
def test_words_look_where_the_reference_s_look(retrieval, inputs, group, agree, layer):
    given = group(f"grd/itm_blk{layer}/")
    watched = gradcam.match(retrieval, *inputs, layer)
    agree(watched.attention, given["attn"], "attention")
    agree(watched.gradient, given["attn_grad"], "gradient", atol=1e-4, rtol=1e-3)
    maps = gradcam.over_words(watched, inputs[2])
    agree(maps, given["gradcam_per_token"], "words")
    agree(gradcam.over_text(maps), given["gradcam"], "text")


@pytest.mark.golden
def test_a_picture_looks_where_the_reference_s_looks(retrieval, inputs, group, agree):
    watched = gradcam.similarity(retrieval, *inputs, 1)
    agree(gradcam.of_classification_token(watched), group("grd/itc_blk1/")["gradcam"], "picture", atol=1e-4)


@pytest.fixture
def network(vision, text):
    return Pretraining(vision, text, 16, 16, generator(0, "model"), deviation=0.3).eval()


def both(network, inputs):
    words = gradcam.match(network, *inputs, 3)
    return [*words, *gradcam.similarity(network, *inputs, 1)]


def test_gradients_are_found_where_none_are_computed(network, inputs):
    plain = both(network, inputs)
    with torch.inference_mode():
        inside = both(network, tuple(values.clone() for values in inputs))
    with torch.no_grad():
        without = both(network, inputs)
    for one, two, three in zip(plain, inside, without, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
        assert one.abs().sum() > 0


def test_a_network_that_was_watched_is_as_before(network, inputs):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fused = [block.attn.fused_attn for block in network.visual_encoder.blocks]
    both(network, inputs)
    with pytest.raises(IndexError):
        gradcam.match(network, inputs[0], inputs[1] + 1000, inputs[2], 3)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(param.grad is None for param in network.parameters())
    assert [block.attn.fused_attn for block in network.visual_encoder.blocks] == fused
    assert not any(block.attn.attn_drop._forward_hooks for block in network.visual_encoder.blocks)
    assert all(gradcam.looked_at(network.text_encoder.bert, layer).watch is None for layer in (2, 3))


def test_watched_attention_is_the_network_s_own(network, inputs):
    """What is moved in it moves the score as the gradient says."""
    images, ids, mask = inputs
    bert, attend = network.text_encoder.bert, gradcam.looked_at(network.text_encoder.bert, 3)
    watched = gradcam.match(network, *inputs, 3)
    change = 1e-3 * torch.randn(watched.attention.shape, generator=generator(0, "change"))

    def score(step):
        attend.watch = lambda attention: attention + step * change
        with torch.no_grad():
            hidden = bert(ids, mask, [network.visual_encoder(images)])
            attend.watch = None
            return network.itm_head(hidden[:, 0])[:, 1].double().sum()

    expected = (watched.gradient * change).double().sum()
    assert float((score(1.0) - score(-1.0)) / 2) == pytest.approx(float(expected), rel=0.05)
