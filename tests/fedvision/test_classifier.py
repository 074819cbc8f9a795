import math
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from fedvision.data import Examples, Spec
from fedvision.errors import ExperimentError
from fedvision.gallery import Gallery
from fedvision.learners.check import CHECKS, Case, check_learner
from fedvision.learners.classifier import Classifier, correct, cross_entropy, scores
from fedvision.learners.learner import Group, Interchangeable, Loss, mean_over_examples
from fedvision.metrics import Metrics
from fedvision.models import CNN, MLP
from fedvision.registry import learners
from fedvision.seeds import generator

IMAGES = Spec((3, 16, 16), 4)


def test_the_loss_of_one_logit_is_binary_cross_entropy():
    logits, labels = torch.tensor([[2.0], [-1.0], [0.0]]), torch.tensor([1, 1, 0])
    expected = [-math.log(1 / (1 + math.exp(-2))), -math.log(1 / (1 + math.exp(1))), -math.log(0.5)]
    assert cross_entropy(logits, labels).tolist() == pytest.approx(expected)


def test_the_loss_of_several_logits_is_categorical_cross_entropy():
    logits, labels = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), torch.tensor([2, 0])
    total = math.exp(1) + math.exp(2) + math.exp(3)
    assert cross_entropy(logits, labels).tolist() == pytest.approx([-math.log(math.exp(3) / total), math.log(3)])


def test_two_logits_and_one_say_the_same():
    single, labels = torch.randn(20, 1, generator=generator(0)), torch.arange(20) % 2
    double = torch.cat([torch.zeros_like(single), single], 1)
    assert torch.allclose(cross_entropy(single, labels), cross_entropy(double, labels), atol=1e-6)
    assert torch.equal(correct(single, labels), correct(double, labels))
    assert torch.equal(scores(single), scores(double))


def test_more_classes_have_no_score():
    assert scores(torch.zeros(5, 3)) is None


def test_the_loss_is_a_mean_over_the_batch():
    learner, rng = Classifier(hidden=(4,)), generator(0)
    model = learner.build(Spec((2, 2), 3), rng)
    batch = Examples({"image": torch.rand(6, 2, 2, generator=rng), "label": torch.arange(6) % 3})
    whole = learner.loss(model, batch, 0.0, rng).total
    halves = [learner.loss(model, part, 0.0, rng).total for part in batch.batches(3)]
    assert torch.allclose(whole, torch.stack(halves).mean())
    assert whole.item() == pytest.approx(learner.evaluate(model, batch).result()["loss"])


@pytest.mark.parametrize(("classes", "outputs", "expected"), [(2, None, 1), (2, 2, 2), (2, 1, 1), (3, None, 3), (10, 12, 12)])
def test_two_classes_need_one_logit_and_others_one_each(classes, outputs, expected):
    model = Classifier(hidden=(4,), outputs=outputs).build(Spec((4,), classes), generator(0))
    assert model.classifier.out_features == expected


def test_binary_tasks_have_areas_and_others_have_not():
    def measured(classes: int) -> set[str]:
        learner = Classifier(hidden=(4,))
        batch = Examples({"image": torch.rand(6, 4, generator=generator(0)), "label": torch.arange(6) % classes})
        return set(learner.evaluate(learner.build(Spec((4,), classes), generator(0)), batch).result())

    assert measured(2) == {"loss", "accuracy", "auroc", "auprc"}
    assert measured(3) == {"loss", "accuracy"}


def test_models_have_the_papers_sizes_by_default():
    mlp = Classifier().build(Spec((2, 14, 14), 2), generator(0))
    cnn = Classifier(model="cnn").build(Spec((3, 16, 16), 10), generator(0))
    assert isinstance(mlp, MLP) and sum(p.numel() for p in mlp.parameters()) == 306_151
    assert isinstance(cnn, CNN) and sum(p.numel() for p in cnn.parameters()) == 241_674


def test_any_timm_model_can_be_named():
    learner = Classifier(model="resnet10t")
    model = learner.build(IMAGES, generator(0))
    assert model.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 4)
    assert learner.head(model) is model.fc


@pytest.mark.parametrize(
    ("learner", "spec", "message"),
    [
        (Classifier(model="resnet1O"), IMAGES, "unknown learner.model 'resnet1O'; did you mean 'resnet"),
        (Classifier(model="resnet10t", hidden=(3,)), IMAGES, "learner.hidden does not apply to the timm model 'resnet10t'"),
        (Classifier(normalization="group"), IMAGES, "learner.normalization is for timm models; 'mlp' has no BatchNorm: leave it out"),
        (Classifier(model="cnn"), Spec((7,), 2), "learner.model = 'cnn' needs images, the inputs have shape (7,); use 'mlp'"),
        (Classifier(model="resnet10t"), Spec((7,), 2), "needs images"),
        (Classifier(model="cnn"), Spec((1, 8, 8), 2), "needs images of at least 14x14, the data has (8, 8); use 'mlp'"),
        (Classifier(model="cnn", hidden=(8, 8)), IMAGES, "learner.hidden = [8, 8]: the cnn has three convolutions"),
        (Classifier(model="cnn", hidden=(8, 8, 9)), IMAGES, "each a multiple of 8 wide"),
        (Classifier(outputs=2), IMAGES, "learner.outputs = 2 cannot tell 4 classes apart"),
        (Classifier(outputs=1), Spec((3,), 3), "learner.outputs = 1 cannot tell 3 classes apart"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(learner, spec, message):
    with pytest.raises(ExperimentError) as caught:
        learner.build(spec, generator(0))
    assert message in str(caught.value)


# ---- the conformance suite ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", learners.names())
def test_every_registered_learner_conforms(name):
    check_learner(name)


@pytest.mark.parametrize(
    "learner",
    [Classifier(model="cnn", hidden=(8, 8, 8)), Classifier(hidden=()), Classifier(hidden=(5,), outputs=4), Classifier(model="test_resnet")],
    ids=lambda learner: f"{learner.model}-{learner.hidden}",
)
def test_other_classifiers_conform(learner):
    check_learner(learner)


def test_a_learner_may_be_checked_on_ones_own_data():
    binary = Examples({"image": torch.rand(5, 7, generator=generator(0)), "label": torch.arange(5) % 2})
    check_learner(Classifier(hidden=(3,)), binary)
    check_learner(Classifier(hidden=(3,)), binary, Spec((7,), 5))


@dataclass(frozen=True, kw_only=True)
class Sound(Classifier):
    """A learner that others spoil in one respect each."""

    hidden: tuple[int, ...] | None = (4,)


@dataclass
class Mutable:
    """Not frozen."""


@dataclass(frozen=True, kw_only=True)
class Nameless(Sound):
    pass


Nameless.__doc__ = ""


@dataclass(frozen=True, kw_only=True)
class BuildsFromTheGlobalGenerator(Sound):
    """Its weights are torch's."""

    def build(self, spec, rng):
        return MLP(spec.image_shape, self.hidden, spec.classes)


@dataclass(frozen=True, kw_only=True)
class BuildsConstants(Sound):
    """Every model is the same."""

    def build(self, spec, rng):
        return super().build(spec, generator(0, "constant"))


@dataclass(frozen=True, kw_only=True)
class BuildsInfinities(Sound):
    """Some weight is infinite."""

    def build(self, spec, rng):
        model = super().build(spec, rng)
        nn.init.constant_(model.classifier.bias, math.inf)
        return model


@dataclass(frozen=True, kw_only=True)
class ViewsInPlace(Sound):
    """Its view darkens the original."""

    def train_view(self, batch, rng):
        batch.image.mul_(0.5)
        return batch


@dataclass(frozen=True, kw_only=True)
class ViewsDropExamples(Sound):
    """Its view is shorter."""

    def train_view(self, batch, rng):
        return batch[1:] if len(batch) > 1 else batch


@dataclass(frozen=True, kw_only=True)
class ViewsFromTheGlobalGenerator(Sound):
    """Its view is drawn by Python."""

    def train_view(self, batch, rng):
        return Examples({**batch.fields, "image": batch.image + random.random()})


@dataclass(frozen=True, kw_only=True)
class LossPerExample(Sound):
    """Its loss is no scalar."""

    def loss(self, model, batch, progress, rng):
        return Loss(cross_entropy(model(batch.image), batch.label))


@dataclass(frozen=True, kw_only=True)
class LossVanishes(Sound):
    """Its loss is NaN at the end of the training."""

    def loss(self, model, batch, progress, rng):
        return Loss(super().loss(model, batch, progress, rng).total * (math.nan if progress == 1 else 1))


@dataclass(frozen=True, kw_only=True)
class LossIsConstant(Sound):
    """Nothing to learn."""

    def loss(self, model, batch, progress, rng):
        return Loss(super().loss(model, batch, progress, rng).total * 0)


@dataclass(frozen=True, kw_only=True)
class LossRemembers(Sound):
    """Its loss grows with every call."""

    calls = [0]  # noqa: RUF012

    def loss(self, model, batch, progress, rng):
        self.calls[0] += 1
        return Loss(super().loss(model, batch, progress, rng).total * self.calls[0])


@dataclass(frozen=True, kw_only=True)
class LossHasVectorParts(Sound):
    """A part is no scalar."""

    def loss(self, model, batch, progress, rng):
        total = super().loss(model, batch, progress, rng).total
        return Loss(total, {"half": total.expand(2)})


@dataclass(frozen=True, kw_only=True)
class LossRegularizesItsOwnModel(Sound):
    """Its loss reads the parameters of a model that it remembers, not of the one it is given."""

    held = []  # noqa: RUF012

    def loss(self, model, batch, progress, rng):
        if isinstance(model, nn.Module):
            self.held[:] = [model]
        return Loss(super().loss(model, batch, progress, rng).total + self.held[0].classifier.weight.square().sum())


@dataclass(frozen=True, kw_only=True)
class MeanMetrics(Sound):
    """Its metrics are means, which do not add."""

    def evaluate(self, model, batch):
        return Metrics(len(batch), {"loss": super().evaluate(model, batch).result()["loss"]})


@dataclass(frozen=True, kw_only=True)
class NoLossMetric(Sound):
    """It measures accuracy alone."""

    def evaluate(self, model, batch):
        measured = super().evaluate(model, batch)
        return replace(measured, sums={"accuracy": measured.sums["accuracy"]})


@dataclass(frozen=True, kw_only=True)
class NeedsTwo(Sound):
    """It contrasts examples with each other."""

    def loss(self, model, batch, progress, rng):
        return Loss(super().loss(model, batch, progress, rng).total + model(batch.image).std(0).sum())


@dataclass(frozen=True, kw_only=True)
class SumDeclaredMean(Sound):
    """Its loss grows with the batch."""

    @mean_over_examples
    def loss(self, model, batch, progress, rng):
        return Loss(super().loss(model, batch, progress, rng).total * len(batch))


@dataclass(frozen=True, kw_only=True)
class ForeignHead(Sound):
    """Its head is no part of the model."""

    def head(self, model):
        return self.build(Spec((3, 16, 16), 3), generator(0)).classifier


@dataclass(frozen=True, kw_only=True)
class DrawTrains(Sound):
    """Its draw moves the model."""

    def draw(self, model, train, index, rng):
        with torch.no_grad():
            model.classifier.bias.add_(1)
        return super().draw(model, train, index, rng)


@dataclass(frozen=True, kw_only=True)
class DrawsTheFirst(Sound):
    """It looks only at how many turns there are, if they are not a slice."""

    def draw(self, model, train, index, rng):
        return super().draw(model, train, index if isinstance(index, slice) else slice(len(index)), rng)


@dataclass(frozen=True, kw_only=True)
class GroupsOthers(Sound):
    """Its groups name the parameters of another model."""

    def groups(self, model):
        return [Group(["backbone.weight"])]


@dataclass(frozen=True, kw_only=True)
class PicturesTrain(Sound):
    """Sound, save that drawing changes the model."""

    def pictures(self, model, examples):
        next(model.parameters()).data.add_(1)
        return {}


class PicturesDiffer(Sound):
    """Sound, save that each picture is another one."""

    def pictures(self, model, examples):
        drawn.append(Gallery(["a"], ["b"], [[np.full((1, 1, 3), len(drawn), np.uint8)]]))
        return {"noise": drawn[-1]}


drawn = []


class PicturesNoted(Sound):
    """Sound, save that what stands below a picture is another word each time."""

    def pictures(self, model, examples):
        noted.append("word")
        return {"words": Gallery(["a"], ["b"], [[None]], notes=[[f"{len(noted)}"]])}


noted = []


class PicturesHidden(Sound):
    """Sound, save that a picture would be written elsewhere."""

    def pictures(self, model, examples):
        return {"../me": Gallery(["a"], ["b"], [[None]])}


class PicturesTwice(Sound):
    """Sound, save that a picture is called like another."""

    def pictures(self, model, examples):
        return {"curves": Gallery(["a"], ["b"], [[None]])}


class PicturesPlain(Sound):
    """Sound, save that a picture is no gallery."""

    def pictures(self, model, examples):
        return {"one": examples.image.numpy()}


class RemembersBeside(Sound):
    """What follows its steps is kept outside of the state dict."""

    def follow(self, model, batch, progress):
        model.classifier.bias.add_(getattr(model, "steps", 0))
        model.steps = getattr(model, "steps", 0) + float(model.classifier.bias.any())


class CallsClassesInterchangeable(Sound):
    """The order of its outputs means something."""

    def interchangeable(self, model):
        return (Interchangeable("classifier.weight", ("classifier.bias",)),)


class CallsOthersInterchangeable(Sound):
    """What it says goes with its rows has others."""

    def interchangeable(self, model):
        return (Interchangeable("classifier.weight", ("body.1.weight", "elsewhere")),)


SPOILT = {
    CallsClassesInterchangeable: "change with the order of 'classifier.weight', which is said to mean nothing",
    CallsOthersInterchangeable: r"names \[.*'elsewhere'\], which are no arrays of the model with as many rows",
    Nameless: "docstring has no first line",
    BuildsFromTheGlobalGenerator: "draws from the global generator of torch",
    BuildsConstants: "does not draw its weights from the generator",
    BuildsInfinities: "not finite",
    ViewsInPlace: "changes the examples in place",
    ViewsDropExamples: "makes 5 examples of 6",
    ViewsFromTheGlobalGenerator: "draws from the global generator of random",
    LossPerExample: "expected a scalar",
    LossVanishes: "nan at progress 1",
    LossIsConstant: "does not depend on any parameter",
    LossRemembers: "for the same generator",
    LossHasVectorParts: r"parts \['half'\]",
    LossRegularizesItsOwnModel: "functional_call",
    MeanMetrics: "in two halves",
    NoLossMetric: "no loss",
    NeedsTwo: "of one example",
    SumDeclaredMean: "is declared mean_over_examples, but loss of a batch",
    DrawTrains: "draw changes the model",
    DrawsTheFirst: "differs for a slice and for its indices",
    GroupsOthers: r"groups names \['backbone.weight'\], which are no parameters",
    RemembersBeside: "remembers what its model's state dict does not hold",
    PicturesTrain: "pictures changes the model",
    PicturesDiffer: r"pictures draws \['noise'\] differently",
    PicturesNoted: r"pictures draws \['words'\] differently",
    PicturesHidden: r"pictures names one '\.\./me'",
    PicturesTwice: "as a picture of every run is called",
    PicturesPlain: "gives a ndarray for 'one', expected a Gallery",
    ForeignHead: "head is not a module of the model",
}


def test_the_sound_learner_conforms():
    check_learner(Sound())


@pytest.mark.filterwarnings("ignore:std\\(\\)")
@pytest.mark.parametrize("kind", SPOILT, ids=lambda kind: kind.__name__)
def test_the_suite_catches_a_learner_that(kind):
    with pytest.raises(AssertionError, match=SPOILT[kind]):
        check_learner(kind())


def test_the_suite_catches_a_learner_that_is_not_frozen():
    with pytest.raises(AssertionError, match="is not a frozen dataclass"):
        CHECKS[0](Case(Mutable(), Examples({}), IMAGES))


def test_a_vision_transformer_takes_images_of_another_size_than_its_own():
    model = Classifier(model="test_vit").build(Spec((3, 64, 64), 4), generator(0)).eval()
    assert model(torch.rand(2, 3, 64, 64, generator=generator(1))).shape == (2, 4)
