import pytest
import torch

from fedvision.errors import ExperimentError
from fedvision.leopart.network import Network, uniform_streak, unit_rows
from fedvision.leopart.vision import VisionSize, VisionTransformer, class_attention, scaled_positions
from fedvision.seeds import generator

golden = pytest.mark.golden


@golden
def test_tokens_of_crops_of_any_size_are_the_references(reference, arrays, agree):
    model = reference().model
    with torch.no_grad():
        for side in (64, 96, 32):
            agree(model.tokens(arrays[f"vit_x{side}"]), arrays[f"vit_tokens{side}"], f"tokens of {side}")
        seen = model.observed(arrays["vit_x64"])
    agree(seen.tokens, arrays["vit_tokens64"])
    agree(seen.attention, arrays["vit_clsattn64"])


@golden
def test_embeddings_and_scores_are_the_references(reference, arrays, agree):
    with torch.no_grad():
        seen = reference().model([arrays["vit_x64"], arrays["vit_x32"]], unit=False)
    agree(seen.embeddings, arrays["head_emb"])
    agree(seen.scores, arrays["head_scores"])


@golden
def test_positions_are_scaled_as_the_reference_scales_them(arrays, agree):
    for side, grid in ((96, 6), (448, 28), (224, 14)):
        agree(scaled_positions(arrays["pos_in"], grid, grid), arrays[f"pos_{side}"], f"positions for {side}")


@golden
def test_names_and_shapes_are_the_references(reference, keys):
    tiny = {name: list(tensor.shape) for name, tensor in reference().state_dict().items() if name not in ("queue", "uniform_steps")}
    assert tiny == keys["tiny"]
    with torch.device("meta"):
        small = Network(VisionSize(), 2048, 256, 300, torch.Generator())
    assert {name: list(tensor.shape) for name, tensor in small.state_dict().items()} == keys["vits16"]
