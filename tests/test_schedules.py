"""Schedules: curves over a run that are plain functions of its progress."""
import copy
import math
import pickle

import pytest

import kdlab as kd
from kdlab.schedules import Schedule, constant, cosine, drawn, exponential, linear

ALL = [constant(3), linear(4, 1), cosine(4, 1), exponential(4, 1), linear(0, 1, begin=.2, end=.4), drawn({0: 8, .25: 2, 1: 3}),
       drawn([(.5, 1)]), drawn([(0, 8), (5, 4)], epochs=10, hold=True), 1 - linear(0, 1), linear(1, 2) * cosine(1, 0),
       3 * (linear(0, 1) + 2) / 2, -constant(1)]


@pytest.mark.parametrize("s", ALL, ids=repr)
def test_a_schedule_is_a_plain_value(s):
    for twin in (copy.deepcopy(s), pickle.loads(pickle.dumps(s))):
        assert twin == s and hash(twin) == hash(s) and twin.values(7) == s.values(7)
    assert isinstance(s(.3), float) and s(-1) == s(0) and s(2) == s(1)
    assert eval(repr(s), vars(kd.schedules)).values() == pytest.approx(s.values()) # it prints as it is written


@pytest.mark.parametrize("make", [linear, cosine, exponential])
def test_ends_are_exact_and_between_them_it_moves_one_way(make):
    for a, b in ((4, 1), (.1, .7), (-2, -1), (1e-3, 1e3), (1 / 3, 1 / 7)):
        s = make(a, b)
        values = s.values(33)
        assert (s(0), s(1)) == (a, b)
        assert all((y - x) * (b - a) > 0 for x, y in zip(values, values[1:]))


@pytest.mark.parametrize("p", [0., .1, .37, .5, .99, 1.])
def test_the_equations(p):
    assert linear(3, 7)(p) == pytest.approx(3 + 4 * p, rel=1e-12)
    assert cosine(3, 7)(p) == pytest.approx(5 - 2 * math.cos(math.pi * p), rel=1e-12)
    assert exponential(3, 7)(p) == pytest.approx(math.exp((1 - p) * math.log(3) + p * math.log(7)), rel=1e-12)
    assert drawn([(0, 3), (1, 7)])(p) == pytest.approx(linear(3, 7)(p), rel=1e-12)


def test_begin_and_end():
    s = linear(2, 6, begin=.25, end=.75)
    assert [s(p) for p in (0, .25, .5, .75, 1)] == [2, 2, 4, 6, 6]


def test_stairs_change_at_the_point_and_not_before():
    s = drawn([(0, 8), (5, 4), (8, 1)], epochs=10, hold=True)
    assert [s(p) for p in (0, .499, .5, .79, .8, 1)] == [8, 8, 4, 4, 1, 1]
    assert drawn([(.5, 3), (.6, 4)], hold=True)(0) == 3


def test_sums_and_products():
    s, t = linear(0, 2), cosine(1, 0)
    for p in (0., .3, 1.):
        assert (s + t)(p) == s(p) + t(p) and (s * t)(p) == s(p) * t(p) and (s - t)(p) == s(p) - t(p)
        assert (1 - s)(p) == 1 - s(p) and (s / 4)(p) == s(p) / 4 and (2 * s * 3)(p) == 6 * s(p) and sum([s, t])(p) == s(p) + t(p)
    assert repr(.5 * (1 - linear(0, 1))) == "0.5*(1 - linear(0, 1))"


def test_what_is_no_number_decides_for_itself():
    class Loss:
        def __rmul__(self, other): return "weighted", other

    assert linear(0, 1) * Loss() == ("weighted", linear(0, 1))
    for wrong in ("2", True, None):
        with pytest.raises(TypeError): linear(0, 1) * wrong
        with pytest.raises(TypeError): wrong - linear(0, 1)


@pytest.mark.parametrize("wrong, says", [
    (lambda: linear(math.nan, 1), "first must be a finite number"), (lambda: cosine(0, "1"), "last must be a finite number"),
    (lambda: linear(0, 1, begin=.5, end=.5), "begin < end"), (lambda: linear(0, 1, end=1.5), "begin < end"),
    (lambda: exponential(0, 1), "one sign"), (lambda: exponential(-1, 1), "one sign"), (lambda: constant(True), "value must be"),
    (lambda: drawn([]), "pairs"), (lambda: drawn([1, 2]), "pairs"), (lambda: drawn([(0, 1), (0, 2)]), "ascend"),
    (lambda: drawn([(0, 1), (5, 2)]), "ascend from 0 to 1, got"), (lambda: drawn([(0, 1), (11, 2)], epochs=10), "0 to 10 epochs"),
    (lambda: linear(0, 1).values(1), "n must be"), (lambda: linear(0, 1) * math.inf, "finite"),
])
def test_wrong_arguments_are_named(wrong, says):
    with pytest.raises(ValueError, match=says): wrong()


def test_the_base_class_is_what_they_all_are():
    assert all(type(s) is Schedule for s in ALL)
