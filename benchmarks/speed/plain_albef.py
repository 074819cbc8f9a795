"""ALBEF's training by hand: torch's own transformer layers, which compute the same as BERT's, and a loop as one writes it."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedvision.albef.bert import EPSILON, TextSize
from fedvision.albef.views import image_normalization
from fedvision.albef.vision import image_encoder
from fedvision.data import Examples, Spec
from fedvision.data.texts import decode_texts
from fedvision.learners.albef import ALBEF
from fedvision.seeds import generator, global_generators
from fedvision.wordpiece import cleaned_caption


class Text(nn.Module):
    """Layers that read words, layers that look at a picture, and a head for words."""

    def __init__(self, size: TextSize) -> None:
        super().__init__()
        width = size.width
        options: dict[str, Any] = {
            "d_model": width, "nhead": size.heads, "dim_feedforward": size.perceptron, "dropout": size.dropout,
            "activation": "gelu", "layer_norm_eps": EPSILON, "batch_first": True,
        }  # fmt: skip
        self.words, self.places = nn.Embedding(size.vocabulary, width, padding_idx=size.padding), nn.Embedding(size.positions, width)
        self.kinds, self.norm, self.dropout = nn.Embedding(2, width), nn.LayerNorm(width, eps=EPSILON), nn.Dropout(size.dropout)
        self.reading = nn.ModuleList([nn.TransformerEncoderLayer(**options) for _ in range(size.fusion)])
        self.looking = nn.ModuleList([nn.TransformerDecoderLayer(**options) for _ in range(size.layers - size.fusion)])
        self.dense, self.head_norm = nn.Linear(width, width), nn.LayerNorm(width, eps=EPSILON)
        self.bias = nn.Parameter(torch.zeros(size.vocabulary))

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The words alone."""
        hidden = self.words(ids) + self.places(torch.arange(ids.shape[1])) + self.kinds.weight[0]
        hidden = self.dropout(self.norm(hidden))
        for layer in self.reading:
            hidden = layer(hidden, src_key_padding_mask=~mask)
        return hidden  # type: ignore[no-any-return]

    def look(self, hidden: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """The words beside a picture."""
        for layer in self.looking:
            hidden = layer(hidden, tokens, tgt_key_padding_mask=~mask)
        return hidden

    def say(self, hidden: Tensor) -> Tensor:
        """Logits of all words."""
        return F.linear(self.head_norm(F.gelu(self.dense(hidden))), self.words.weight, self.bias)


class Network(nn.Module):
    """What has a copy: two encoders, and what makes features of them."""

    def __init__(self, learner: ALBEF, spec: Spec) -> None:
        super().__init__()
        vision, text = learner.vision_size(spec), learner.text_size()
        features = learner.features or learner.size.features
        self.eyes, self.text = image_encoder(vision, generator(0, "model"), learner.xavier), Text(text)
        self.see, self.tell = nn.Linear(vision.width, features), nn.Linear(text.width, features)

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens and features of pictures, and of texts."""
        tokens, words = self.eyes(images), self.text.read(ids, mask)
        return tokens, F.normalize(self.see(tokens[:, 0]), dim=-1), words, F.normalize(self.tell(words[:, 0]), dim=-1)


def plain_albef(learner: ALBEF, model: Any, examples: Examples, preset: Any, optimizer: dict[str, Any]) -> Callable[[int], None]:
    """Steps of training by hand."""
    with global_generators(generator(0, "plain model")):
        network, judge = Network(learner, preset.spec), nn.Linear(learner.size.text.width, 2)
    slow, temperature = copy.deepcopy(network).requires_grad_(False), nn.Parameter(torch.tensor(learner.temperature))
    trained = [*network.parameters(), *judge.parameters(), temperature]
    groups = [
        {"params": [param for param in trained if param.ndim != 1], "weight_decay": optimizer["weight_decay"]},
        {"params": [param for param in trained if param.ndim == 1], "weight_decay": 0.0},
    ]
    captions, pieces, alpha = [texts[0] for texts in decode_texts(examples.fields["caption"])], learner.pieces, learner.alpha
    queue, images_before, texts_before = learner.queue or learner.size.queue, model.image_queue.clone(), model.text_queue.clone()

    def train(steps: int) -> None:
        rng, place, b = generator(0, "plain"), 0, preset.batch
        normalized = image_normalization(3)
        adamw = torch.optim.AdamW(groups, lr=optimizer["lr"])
        for _ in range(steps):
            index = torch.randperm(len(examples), generator=rng)[:b]
            images = normalized(examples.image[index])
            ids, mask = pieces([cleaned_caption(captions[i]) for i in index.tolist()], learner.longest)
            chosen, blank, other = (
                torch.bernoulli(torch.full(ids.shape, p), generator=rng).bool() for p in (learner.mask_probability, 0.8, 0.5)
            )
            chosen = chosen & (ids != pieces.pad) & (ids != pieces.begin)
            anything = torch.randint(pieces.size, ids.shape, generator=rng)
            masked = torch.where(chosen & blank, pieces.mask, torch.where(chosen & other, anything, ids))
            tokens, image, words, text = network(images, ids, mask)
            with torch.no_grad():
                tokens_slow, image_slow, _, text_slow = slow(images, ids, mask)
                all_images, all_texts = torch.cat([image_slow.T, images_before], 1), torch.cat([text_slow.T, texts_before], 1)
                taught = (image_slow @ all_texts / temperature, text_slow @ all_images / temperature)
                truth = torch.eye(b, b + queue)
                targets = [alpha * each.softmax(1) + (1 - alpha) * truth for each in taught]
                words_slow = slow.text.look(slow.text.read(masked, mask), mask, tokens_slow)
                advice = slow.text.say(words_slow[chosen]).softmax(1)
            own = (image @ all_texts / temperature, text @ all_images / temperature)
            itc = sum(F.cross_entropy(each, target) for each, target in zip(own, targets, strict=True)) / 2
            with torch.no_grad():
                strangers, others = (torch.multinomial(each[:, :b].softmax(1).fill_diagonal_(0.0), 1, generator=rng)[:, 0] for each in own)
            fused = network.text.look(
                torch.cat([words, words, words[strangers]]),
                torch.cat([mask, mask, mask[strangers]]),
                torch.cat([tokens, tokens[others], tokens]),
            )
            itm = F.cross_entropy(judge(fused[:, 0]), torch.cat([torch.ones(b), torch.zeros(2 * b)]).long())
            logits = network.text.say(network.text.look(network.text.read(masked, mask), mask, tokens)[chosen])
            mlm = (1 - alpha) * F.cross_entropy(logits, ids[chosen]) + alpha * F.cross_entropy(logits, advice)
            adamw.zero_grad()
            (itc + itm + mlm).backward()
            adamw.step()
            with torch.no_grad():
                oldest = torch.arange(place, place + b) % queue
                images_before[:, oldest], texts_before[:, oldest] = image_slow.T, text_slow.T
                place = (place + b) % queue
                temperature.clamp_(0.001, 0.5)
                torch._foreach_lerp_(list(slow.parameters()), list(network.parameters()), 1 - learner.momentum)

    return train
