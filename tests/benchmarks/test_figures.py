import math

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from benchmarks import figures
from benchmarks.suite import Sweep
from fedvision.data import FederatedData
from fedvision.gallery import Gallery

METRICS = {"test_loss": "test loss", "test_accuracy": "test accuracy"}


def table(**columns: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"round": range(len(next(iter(columns.values()))))} | columns)


def swept(values: tuple[float, ...] = (0.0, 0.1, 10.0)) -> Sweep:
    return Sweep(title="A sweep", column="x", rows=(), key="strategy.penalty_weight", values=values)


def dealt(counts: list[list[int]]) -> FederatedData:
    """Clients that hold ``counts[client][class]`` examples."""
    labels = [torch.repeat_interleave(torch.arange(len(held)), torch.tensor(held)) for held in counts]
    every = torch.arange(len(counts[0]))
    parts = [(torch.zeros(len(label), 1, 2, 2), label) for label in labels]
    return FederatedData.from_arrays(parts, None, test=(torch.zeros(len(every), 1, 2, 2), every), name="dealt")


def saved(figure, path) -> Image.Image:
    """The figure as it is in its file."""
    with Image.open(figures.save(figure, path / "figure.png")) as image:
        image.load()
        return image


def texts(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def test_curves_draw_each_part_that_was_measured():
    rounds = table(
        train_loss=[3.0, 2.0, 1.0], test_loss=[4.0, 3.0, 2.0], validation_loss=[math.nan] * 3, test_accuracy=[0.1, math.nan, 0.3]
    )
    loss, accuracy = figures.curves(rounds).axes
    assert [line.get_label() for line in loss.lines] == ["training silos", "test"]
    assert [list(line.get_ydata()) for line in loss.lines] == [[3, 2, 1], [4, 3, 2]]
    (line,) = accuracy.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 2], [0.1, 0.3])
    assert (loss.get_ylabel(), accuracy.get_ylabel(), loss.get_xlabel()) == ("loss", "accuracy", "round")


def test_curves_show_how_right_a_model_is_by_whatever_its_learner_measures():
    only_loss, segments = (figures.curves(table(test_loss=[2.0, 1.0], **more)).axes for more in ({}, {"test_miou": [0.1, 0.5]}))
    assert [axes.get_ylabel() for axes in only_loss] == ["loss"]
    assert [axes.get_ylabel() for axes in segments] == ["loss", "mIoU"]
    assert list(segments[1].lines[0].get_ydata()) == [0.1, 0.5]


def test_runs_are_compared_by_what_they_have_in_common():
    one, two = (
        table(test_loss=[2.0], test_accuracy=[0.5], test_miou=[0.4]),
        table(test_loss=[2.0], test_miou=[0.1], test_accuracy=[math.nan]),
    )
    assert figures.in_common({"a": [one], "b": [two]}) == {"test_loss": "test loss", "test_miou": "test mIoU"}


def test_curves_of_one_round_show_a_point(tmp_path):
    figure = figures.curves(table(test_loss=[2.0]))
    assert [line.get_marker() for line in figure.axes[0].lines] == ["o"]
    saved(figure, tmp_path)


def test_a_part_keeps_its_color_when_another_was_not_measured():
    both, one = (figures.curves(rounds).axes[0] for rounds in (table(train_loss=[1.0], test_loss=[2.0]), table(test_loss=[2.0])))
    assert both.lines[1].get_color() == one.lines[0].get_color()


def test_the_partition_stacks_what_each_client_holds():
    counts = [[3, 0, 1], [0, 2, 2]]
    (axes,) = figures.partition(dealt(counts)).axes
    heights = np.array([[bar.get_height() for bar in bars] for bars in axes.containers]).T
    bottoms = np.array([[bar.get_y() for bar in bars] for bars in axes.containers]).T
    assert heights.tolist() == counts
    assert bottoms.tolist() == [[0, 3, 3], [0, 0, 2]]
    assert texts(axes.get_legend()) == ["class 0", "class 1", "class 2"]
    assert axes.get_title() == "Partition of dealt"


def test_the_partition_of_many_clients_shows_the_first_and_says_so(tmp_path):
    figure = figures.partition(dealt([[1, 1]] * 70))
    (axes,) = figure.axes
    assert len(axes.containers[0]) == figures.MOST_CLIENTS == 60
    assert axes.get_xlabel() == "client (the first 60 of 70)"
    assert saved(figure, tmp_path).width <= 12 * 150


def test_the_partition_of_one_client_counts_it_in_whole_numbers(tmp_path):
    figure = figures.partition(dealt([[2, 1]]))
    saved(figure, tmp_path)
    low, high = figure.axes[0].get_xlim()
    assert [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high] == [0]


@pytest.mark.parametrize(("classes", "named"), [(20, True), (100, False)])
def test_the_partition_of_many_classes_names_as_many_as_fit(tmp_path, classes, named):
    figure = figures.partition(dealt([[1] * classes] * 3))
    saved(figure, tmp_path)
    legend = figure.axes[0].get_legend()
    assert (legend is not None) == named
    if legend is not None:
        assert len(texts(legend)) == classes
        box, page = legend.get_window_extent(), figure.bbox
        assert box.y0 >= page.y0 and box.x1 <= page.x1  # on the page as a whole


def test_a_comparison_draws_means_and_bands_of_one_deviation():
    runs = {
        "A": [table(test_loss=[4.0, 2.0]), table(test_loss=[6.0, 4.0])],
        "B": [table(test_loss=[1.0, 1.0]), table(test_loss=[1.0, 1.0])],
    }
    (axes,) = figures.comparison(runs, {"test_loss": "test loss"}).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[5, 3], [1, 1]]
    band = axes.collections[0].get_paths()[0].vertices
    at_first = band[band[:, 0] == 0, 1]
    assert (at_first.min(), at_first.max()) == pytest.approx((5 - math.sqrt(2), 5 + math.sqrt(2)))
    assert texts(axes.get_legend()) == ["A", "B"]


def test_a_comparison_has_one_panel_a_metric_and_one_legend(tmp_path):
    runs = {"A": [table(test_loss=[1.0, 2.0], test_accuracy=[0.5, 0.6])]}
    figure = figures.comparison(runs, METRICS, "Title")
    assert [axes.get_ylabel() for axes in figure.axes] == ["test loss", "test accuracy"]
    assert [axes.get_legend() is not None for axes in figure.axes] == [False, True]
    assert figure.get_suptitle() == "Title"
    image = saved(figure, tmp_path)
    assert image.format == "PNG" and (image.width, image.height) == (1500, 540)


def test_a_comparison_passes_over_rounds_that_were_not_evaluated():
    runs = {"A": [table(test_loss=[3.0, math.nan, 1.0]), table(test_loss=[5.0, math.nan, 1.0])]}
    (line,) = figures.comparison(runs, {"test_loss": "x"}).axes[0].lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 2], [4, 1])


def test_a_comparison_of_one_round_shows_points(tmp_path):
    figure = figures.comparison({"A": [table(test_loss=[3.0])], "B": [table(test_loss=[4.0])]}, {"test_loss": "x"})
    assert [line.get_marker() for line in figure.axes[0].lines] == ["o", "o"]
    saved(figure, tmp_path)


def test_a_comparison_survives_a_metric_that_was_never_a_number(tmp_path):
    runs = {"A": [table(test_loss=[1.0, 2.0])], "B": [table(test_loss=[math.nan, math.nan])]}
    figure = figures.comparison(runs, {"test_loss": "x"})
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [2, 0]
    saved(figure, tmp_path)


def test_no_two_of_many_strategies_look_alike(tmp_path):
    names = [f"strategy {i}" for i in range(14)]
    compared = figures.comparison({name: [table(test_loss=[i, i + 1.0])] for i, name in enumerate(names)}, {"test_loss": "x"})
    assert len({(line.get_color(), line.get_linestyle()) for line in compared.axes[0].lines}) == 14
    barred = figures.environments({name: pd.DataFrame({"0": [0.5], "1": [0.6]}) for name in names})
    assert len({(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in barred.axes[0].containers}) == 14
    saved(compared, tmp_path)
    saved(barred, tmp_path)


def test_environments_are_groups_of_bars_with_deviations():
    accuracies = {"A": pd.DataFrame({"0": [0.4, 0.6], "3": [0.9, 0.9]}), "B": pd.DataFrame({"0": [0.7, 0.7], "3": [0.8, 1.0]})}
    (axes,) = figures.environments(accuracies, "Title").axes
    bars = [container for container in axes.containers if hasattr(container, "patches")]
    assert [[bar.get_height() for bar in group] for group in bars] == [pytest.approx([0.5, 0.9]), pytest.approx([0.7, 0.9])]
    deviations = [np.diff([end[1] for end in segment])[0] / 2 for segment in bars[0].errorbar.lines[2][0].get_segments()]
    assert deviations == pytest.approx([math.sqrt(0.02), 0])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "3"]
    for at in range(2):  # the bars of one environment stand side by side around its tick
        left, right = (group[at].get_x() for group in bars)
        assert left + bars[0][at].get_width() == pytest.approx(right) == pytest.approx(at)


def test_environments_of_one_seed_have_no_deviations(tmp_path):
    figure = figures.environments({"A": pd.DataFrame({"0": [0.4], "1": [0.9]})})
    (bars,) = figure.axes[0].containers
    assert bars.errorbar is None
    saved(figure, tmp_path)


def test_many_environments_fit_on_one_page(tmp_path):
    rng = np.random.default_rng(0)
    accuracies = {name: pd.DataFrame(rng.uniform(size=(3, 20)), columns=[str(i) for i in range(20)]) for name in "ABCDEF"}
    assert saved(figures.environments(accuracies), tmp_path).width == 14 * 150


def test_an_environment_that_was_never_measured_leaves_a_gap(tmp_path):
    figure = figures.environments({"A": pd.DataFrame({"0": [0.4, 0.5], "1": [math.nan, math.nan]})})
    bars = next(container for container in figure.axes[0].containers if hasattr(container, "patches"))
    assert [bar.get_height() for bar in bars] == [pytest.approx(0.45), pytest.approx(math.nan, nan_ok=True)]
    saved(figure, tmp_path)


def test_a_sweep_draws_means_and_deviations_by_value(tmp_path):
    lines = {
        "A": pd.DataFrame({0.0: [1.0, 3.0], 0.1: [2.0, 2.0], 10.0: [5.0, 6.0]}),
        "B": pd.DataFrame({0.0: [1.0, 1.0], 10.0: [4.0, 4.0]}),
    }
    figure = figures.sweep(lines, swept())
    (axes,) = figure.axes
    curves = [container.lines[0] for container in axes.containers]
    assert [list(line.get_xdata()) for line in curves] == [[0, 0.1, 10], [0, 10]]
    assert [list(line.get_ydata()) for line in curves] == [[2, 2, 5.5], [1, 4]]
    spread = [segment[1][1] - segment[0][1] for segment in axes.containers[0].lines[2][0].get_segments()]
    assert spread == pytest.approx([2 * math.sqrt(2), 0, math.sqrt(2)])
    assert texts(axes.get_legend()) == ["A", "B"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("penalty weight", "test loss", "A sweep")
    saved(figure, tmp_path)


@pytest.mark.parametrize(
    ("values", "scale"), [((0.0, 0.1, 10.0), "symlog"), ((1.0, 2.0, 3.0), "linear"), ((0.0,), "linear"), ((-1.0, 0.0), "linear")]
)
def test_a_sweep_over_magnitudes_has_a_logarithmic_axis(tmp_path, values, scale):
    figure = figures.sweep({"A": pd.DataFrame({value: [1.0] for value in values})}, swept(values))
    assert figure.axes[0].get_xscale() == scale
    saved(figure, tmp_path)


def test_legends_stand_beside_what_they_explain(tmp_path):
    drawn = [
        figures.comparison({"A": [table(test_loss=[1.0, 2.0])]}, {"test_loss": "x"}),
        figures.environments({"A": pd.DataFrame({"0": [0.4], "1": [0.9]})}),
        figures.sweep({"A": pd.DataFrame({1.0: [1.0], 2.0: [2.0]})}, swept((1.0, 2.0))),
        figures.partition(dealt([[1, 2]])),
    ]
    for figure in drawn:
        saved(figure, tmp_path)
        (axes,) = figure.axes
        assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1


def test_the_pictures_of_a_run_are_its_curves_its_partition_and_examples(tmp_path, federated):
    from server.folder import RunFolder

    folder = RunFolder(tmp_path)
    folder.rounds.write_text('{"round": 0, "test_loss": 2.0}\n{"round": 1, "test_loss": null}\n')
    names = ("curves.png", "partition.png", "examples.png")
    assert figures.of_run(folder, federated) == [tmp_path / "figures" / name for name in names]
    for path in (tmp_path / "figures").iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG" and 300 < image.height < 2000


def test_examples_are_shown_one_row_a_client_and_one_for_the_test_set():
    red, green = np.zeros((3, 2, 4, 4), np.float32), np.zeros((3, 2, 4, 4), np.float32)
    red[:, 0], green[:, 1] = 1, 1
    labels = np.zeros(3, int)
    data = FederatedData.from_arrays(train=[(red, labels), (green, labels)], test=(red, labels))
    (axes,) = figures.examples(data).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["client 0", "client 1", "test"]
    canvas = axes.get_images()[0].get_array()
    assert [canvas[row * 6, 0].tolist() for row in range(3)] == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]


def test_there_are_no_pictures_of_examples_that_are_no_images():
    table = (np.zeros((4, 7), np.float32), np.zeros(4, int))
    assert figures.examples(FederatedData.from_arrays(train=[table], test=table)) is None


def test_a_picture_replaces_the_one_before(tmp_path):
    before = saved(figures.curves(table(test_loss=[1.0, 2.0])), tmp_path)
    after = saved(figures.curves(table(test_loss=[2.0, 1.0])), tmp_path)
    assert before.tobytes() != after.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


# ---- galleries ------------------------------------------------------------------------------------------------------


def plain(color, height=8, width=8):
    return np.full((height, width, 3), color, np.uint8)


def test_a_gallery_has_its_titles_and_its_caption():
    figure = figures.gallery(Gallery(["one", "two"], ["a", "b", "c"], [[plain(0)] * 3, [plain(9), None, plain(9)]], "What is seen."))
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]
    assert [text.get_text() for text in figure.texts] == ["What is seen."]


def test_small_pictures_are_enlarged_without_blurring_them(tmp_path):
    checks = ((np.indices((8, 8)).sum(0) % 2)[..., None] * np.array([255, 0, 0])).astype(np.uint8)
    image = np.asarray(saved(figures.gallery(Gallery(["row"], ["column"], [[checks]])), tmp_path).convert("RGB")).reshape(-1, 3)
    squares = {color: int((image == color).all(1).sum()) for color in ((255, 0, 0), (0, 0, 0))}
    assert squares[255, 0, 0] == 32 * 18**2
    assert 32 * 18**2 <= squares[0, 0, 0] < 1.2 * 32 * 18**2  # titles are black too


@pytest.mark.parametrize("side", [1, 8, 50, 224])
def test_nothing_of_a_gallery_is_cut_off(tmp_path, side):
    titles = ["a title that is rather long for a single picture", "prediction"]
    shown = Gallery(["some long row title", "x"], titles, [[plain(99, side, side)] * 2] * 2, "A caption that goes on for a while. " * 6)
    figure = figures.gallery(shown)
    image = saved(figure, tmp_path)
    pixels = np.asarray(image.convert("L"))
    assert all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    (axes,) = figure.axes
    boxes = [label.get_window_extent() for label in (*axes.get_xticklabels(), *axes.get_yticklabels(), *figure.texts)]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= image.width and box.y1 <= image.height for box in boxes)
    above, caption = boxes[:2], boxes[-1]
    assert above[0].x1 <= above[1].x0 and caption.y1 <= axes.get_window_extent().y0


def boxes_of(figure, tmp_path):
    """Where each text of a gallery is, by the text without line breaks; and where the pictures are."""
    saved(figure, tmp_path)
    (axes,) = figure.axes
    return {" ".join(text.get_text().split()): text.get_window_extent() for text in (*axes.texts, *figure.texts)}, axes.get_window_extent()


@pytest.mark.parametrize("side", [8, 50, 224])
def test_notes_stand_under_their_pictures_or_in_their_place(tmp_path, side):
    long = "mmmm wwww mmmm iiii words that go on and on"
    notes = [[long, "short", "alone: " + long], ["red 93%\nblue 5%\ngreen 2%", "", "x"]]
    pictures = [[plain(99, side, side), plain(99, side, side), None]] * 2
    figure = figures.gallery(Gallery(["a", "b"], ["x", "y", "z"], pictures, "The caption.", notes))
    boxes, whole = boxes_of(figure, tmp_path)
    shown = side * max(144 // side, 1)
    across = whole.width / 3
    column = lambda box: int((box.x0 - whole.x0) / across)  # noqa: E731
    order = [boxes[name] for name in (long, "short", "red 93% blue 5% green 2%")]
    assert [column(box) for box in order] == [0, 1, 0] and all(
        box.width <= shown + 1 for box in boxes.values() if box != boxes["The caption."]
    )
    first, _, second = order
    assert whole.y1 - shown - 30 <= first.y1 <= whole.y1 - shown  # right under the picture
    assert second.y1 <= first.y0 - shown  # the second row's picture is between
    assert second.y0 >= whole.y0 and boxes["The caption."].y1 <= whole.y0
    alone = boxes[f"alone: {long}"]
    assert column(alone) == 2 and alone.y1 <= whole.y1 and alone.y0 >= first.y0 - 30
    assert abs((alone.y0 + alone.y1) / 2 - (first.y0 + whole.y1) / 2) <= 24  # in the middle of its row


def test_a_gallery_without_notes_is_as_high_as_its_pictures(tmp_path):
    rows = [[plain(99, 144, 144)]] * 2
    heights = [
        saved(figures.gallery(Gallery(["a", "b"], ["x"], rows, "", notes)), tmp_path).height
        for notes in ((), [[""]] * 2, [["a"], [""]], [["a\nb"], ["c"]])
    ]
    assert heights[0] == heights[1] < heights[2] < heights[3]


def test_words_of_a_gallery_are_no_formulas(tmp_path):
    text = "$5 and $\\x"
    figure = figures.gallery(Gallery([text], [text], [[plain(0)]], text, [[text]]))
    boxes, _ = boxes_of(figure, tmp_path)
    assert list(boxes) == [text]


def test_pictures_of_several_sizes_stand_in_the_middle_of_their_places(tmp_path):
    image = saved(figures.gallery(Gallery(["r"], ["a", "b"], [[plain(200, 200, 200), plain(100, 4, 8)]])), tmp_path).convert("RGB")
    pixels = np.asarray(image)[..., 0]
    (rows, _), (small_rows, _) = np.nonzero(pixels == 200), np.nonzero(pixels == 100)
    assert np.ptp(small_rows[(small_rows > rows.min()) & (small_rows < rows.max())]) + 1 >= 4 * 18
    assert abs(np.median(rows) - np.median(small_rows)) <= 4
