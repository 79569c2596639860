"""One-class protocols: who is trained on, held out and tested on, counted as the papers count."""

import collections
import random

import pytest

from jaxad.data import oneclass, split
from jaxad.data.dataset import DataError
from jaxad.data.files import Arrays
from jaxad.data.records import Plan

CLASSES = [str(n) for n in range(10)]


def plan_of(text, *, train, test, classes=CLASSES):
    """The roles of all pictures: `train` and `test` of each class."""
    pictures = [
        (f"{role}/{c}/{i}", role, c)
        for role, n in (("train", train), ("test", test))
        for c in classes
        for i in range(n)
    ]
    random.Random(0).shuffle(pictures)
    plan = Plan("idx", Arrays({}, "here", ""), [])
    left = oneclass.choose(plan, pictures, oneclass.parse("here", text, classes))
    assert {r.file for r in plan.records}.isdisjoint(left) and len(plan.records) + len(left) == len(pictures)
    roles, _ = split.roles(plan.records, holdout=0.1, seed=0, clip=1, origin="here")
    return plan, collections.Counter((role, record.label) for role, record in zip(roles, plan.records, strict=True))


def test_balanced_is_the_protocol_of_cifar():
    plan, counts = plan_of("3:balanced", train=500, test=100)
    assert counts == {("train", 0): 450, ("holdout", 0): 50, ("test", 0): 100, ("test", 1): 100}
    kinds = collections.Counter(record.defect for record in plan.records if record.label == 1)
    assert set(kinds) == set(CLASSES) - {"3"} and min(kinds.values()) > 2  # of every other class
    assert all(record.file.startswith("test/") for record in plan.records if record.label == 1)


def test_all_other_pictures_by_default():
    assert plan_of(3, train=50, test=10)[1] == {("train", 0): 45, ("holdout", 0): 5, ("test", 0): 10, ("test", 1): 90}


@pytest.mark.parametrize(("text", "anomalous"), [("9:folds", 9 * 1400), ("9:folds:10%", 155), ("9:folds:50%", 1400)])
def test_folds_are_the_protocol_of_fashion_mnist(text, anomalous):
    plan, counts = plan_of(text, train=6000, test=1000)
    wanted = {("train", 0): 4200, ("holdout", 0): 1400, ("test", 0): 1400, ("test", 1): anomalous}
    assert counts == wanted
    tested = [record.file for record in plan.records if record.role == "test" and record.label == 0]
    assert any(name.startswith("train/") for name in tested)  # pooled: not the given test part


def test_draws_depend_on_names_only():
    first, second = plan_of("1:balanced", train=20, test=10)[0], plan_of("1:balanced", train=30, test=10)[0]
    drawn = [{record.file for record in plan.records if record.label == 1} for plan in (first, second)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 10


def test_every_class_is_normal():
    assert plan_of("all", train=20, test=10)[1] == {("train", 0): 180, ("holdout", 0): 20, ("test", 0): 100}


@pytest.mark.parametrize(
    ("text", "classes", "normal"), [("a:b", ["a:b", "a"], "a:b"), ("1", ["0", "2"], "2"), ("cat:folds", ["cat"], "cat")]
)
def test_names_go_first(text, classes, normal):
    assert oneclass.parse("here", text, classes).normal == normal


def test_mistakes_are_named():
    with pytest.raises(
        DataError, match=r"'3:half' has the option 'half'; expected 'balanced'.*--normal-class 3:balanced"
    ):
        oneclass.parse("here", "3:half", CLASSES)
    with pytest.raises(DataError, match="no test pictures of '3'.*3:folds:50%"):
        plan_of("3:balanced", train=10, test=0)
