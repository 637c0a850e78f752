"""Segmentation by example: what holds for any weights, its closed form, and its episodes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinokit.config import registry
from dinokit.data.objects import objects_of_ids
from dinokit.eval._dense import labels_of_nearest
from dinokit.segment.encoder import Encoder, Items
from dinokit.segment.episodes import class_mask, classes_of, draw_episode, labels_of, labels_on_canvas, marked
from dinokit.segment.in_context import Examples, InContextHead, attend, label_shares
from dinokit.segment.recipe import Context


def random_head(**sizes):
    torch.manual_seed(0)
    head = InContextHead(12, Context(**{"width": 16, "hidden": 8, **sizes})).eval()
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return head


@pytest.fixture
def examples():
    torch.manual_seed(1)
    return Examples(torch.randn(40, 12), torch.rand(40, 3).softmax(dim=1))


@pytest.fixture
def query():
    torch.manual_seed(2)
    return torch.randn(12, 4, 4), torch.randn(3, 32, 32)


@torch.no_grad()
def test_renumbering_the_classes_renumbers_the_answer(examples, query):
    head, order = random_head(), torch.tensor([2, 0, 1])
    before = head(*query, examples)
    after = head(*query, Examples(examples.features, examples.shares[:, order]))
    torch.testing.assert_close(after, before[order])
    assert before.shape == (3, 16, 16)


@torch.no_grad()
def test_neither_the_order_of_examples_nor_giving_them_twice_matters(examples, query):
    head, order = random_head(), torch.randperm(40)
    before = head(*query, examples)
    shuffled = Examples(examples.features[order], examples.shares[order])
    torch.testing.assert_close(head(*query, shuffled), before, rtol=1e-4, atol=1e-4)
    twice = Examples(examples.features.repeat(2, 1), examples.shares.repeat(2, 1))
    torch.testing.assert_close(head(*query, twice), before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_answer_is_linear_in_the_labels(examples, query):
    head = random_head()
    other = torch.rand(40, 3)
    mixed = head(*query, Examples(examples.features, 0.3 * examples.shares + 0.7 * other))
    parts = [head(*query, Examples(examples.features, shares)) for shares in (examples.shares, other)]
    torch.testing.assert_close(mixed, 0.3 * parts[0] + 0.7 * parts[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nearest", [0, 5])
@torch.no_grad()
def test_its_closed_form_is_the_vote_of_neighbours(examples, query, nearest):
    """One layer that compares the features as they are, as sharply as the vote does."""
    head = InContextHead(12, Context(width=12, depth=1, heads=1, hidden=4, nearest=nearest)).eval()
    torch.nn.init.eye_(head.project.weight)
    torch.nn.init.zeros_(head.project.bias)
    head.norm = torch.nn.Identity()
    head.layers[0].sharpness.fill_(np.log(50))  # 1 / 0.02
    head.sharpness.zero_()
    head.weights.bias.copy_(torch.tensor([-1e4, -1e4, -1e4, -1e4, 0, -1e4, -1e4, -1e4, -1e4]))
    answer = head(*query, examples)
    x, keys = F.normalize(query[0].flatten(1).T, dim=1), F.normalize(examples.features, dim=1)
    votes = labels_of_nearest(x, keys, examples.shares, nearest or 40, temp=0.02)
    grid = votes.T.unflatten(1, (4, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    torch.testing.assert_close(answer, grid, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_examples_of_one_class_alone_give_that_class(examples, query):
    head = InContextHead(12, Context(width=12, depth=2, heads=2, hidden=4)).eval()
    shares = torch.zeros(40, 2)
    shares[:, 0] = 1
    answer = head(*query, Examples(examples.features, shares))
    assert (answer[0] > answer[1]).all()


def test_attention_to_few_keys_ignores_the_others():
    q, k = torch.randn(2, 3, 4), torch.randn(2, 9, 4)
    weights = attend(q, k, nearest=2)
    assert ((weights > 0).sum(dim=2) == 2).all()
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(2, 3))


def test_shares_are_counted_over_labelled_pixels():
    labels = torch.tensor([[0, 1, -1, -1], [1, 1, -1, 2], [-1] * 4, [-1] * 4])
    shares, used = label_shares(labels, 3, 2)
    torch.testing.assert_close(shares[:2], torch.tensor([[0.25, 0.75, 0], [0, 0, 1.0]]))
    assert used.tolist() == [True, True, False, False]


# Episodes.


@pytest.fixture
def items(backbone):
    section = {"name": "scenes", "size": 32, "count": 40, "split": "train", "kinds": ["bars", "dots", "net"]}
    return Items(registry.build("data.objects", section), Encoder(backbone, 32), 1.0)


def test_an_episode_is_a_function_of_its_position(items):
    one, again = (draw_episode(items, 2, 20, 0, 7) for _ in range(2))
    assert (one.label, one.index) == (again.label, again.index)
    assert all(torch.equal(a.canvas, b.canvas) for a, b in zip(one.examples, again.examples, strict=True))
    indices = {draw_episode(items, 1, 20, 0, position).index for position in range(10)}
    assert len(indices) > 5


def test_episodes_of_an_evaluation_do_not_depend_on_the_canvas(items, backbone):
    larger = Items(items.source, Encoder(backbone, 64), 1.0)
    for position in range(12):
        one, other = (draw_episode(each, 2, 40, 0, position, stored=True) for each in (items, larger))
        assert (one.label, one.index, one.other) == (other.label, other.index, other.other)


def test_examples_show_the_class_and_are_other_images(items):
    for position in range(8):
        episode = draw_episode(items, 2, 20, 0, position)
        assert episode.label in classes_of(episode.query, 20)
        assert episode.other != episode.label
        canvases = [episode.query.canvas, *(item.canvas for item in episode.examples)]
        assert len({canvas.numpy().tobytes() for canvas in canvases}) == 3
        for item in episode.examples:
            assert class_mask(item, episode.label).sum() >= 20
        examples = marked(episode.examples, episode.label, items.encoder)
        assert examples.features.shape == (32, 48)
        area = sum(class_mask(item, episode.label).mean() for item in episode.examples) / 2
        assert examples.shares[:, 1].mean().item() == pytest.approx(area, abs=1e-5)


def test_beyond_the_image_there_are_no_labels(backbone):
    class Wide:
        classes = ("a",)

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return np.zeros((10, 40, 3), np.uint8), objects_of_ids(np.ones((10, 40), np.uint8))

    item = Items(Wide(), Encoder(backbone, 32), 1.0)[0]
    labels = labels_of(item, 0)
    assert (labels[:8] == 1).all()
    assert (labels[8:] == -1).all()
    ids = np.repeat([[0, 2, 1, 0]], 10, axis=0).repeat(10, axis=1)
    assert labels_on_canvas(item.frame, ids)[0].tolist() == np.repeat([0, 2, 1, 0], 8).tolist()


def test_features_are_computed_of_the_images_of_an_episode_alone(items):
    """A class is looked for in many images, and the backbone is what costs."""
    episode = draw_episode(items, 2, 20, 0, 7)
    assert not any("features" in vars(item) for item in items._kept.values())
    marked(episode.examples, episode.label, items.encoder)
    assert sum("features" in vars(item) for item in items._kept.values()) == 2


def test_classes_that_no_two_images_share_are_refused(items):
    with pytest.raises(ValueError, match="No class has 5000 pixels in 2 images of 40"):
        draw_episode(items, 1, 5000, 0, 0)
