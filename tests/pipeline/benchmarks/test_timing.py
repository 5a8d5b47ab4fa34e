from pipeline.benchmarks.harness import Spread, steady_rate, take_turns


def test_contenders_take_turns_after_one_call_each_to_warm_up():
    calls = []

    def contender(name, values):
        def measure():
            calls.append(name)
            return values.pop(0)

        return measure

    found = take_turns({"a": contender("a", [9, 1, 2, 3]), "b": contender("b", [9, 4, 5, 6])}, repeats=3)
    assert found == {"a": [1, 2, 3], "b": [4, 5, 6]}  # the warm-up is not counted
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]  # nobody always comes first


def test_a_spread_is_the_median_with_its_extremes():
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_the_clock_runs_from_when_every_worker_has_finished_a_range():
    assert steady_rate([(3.0, 10), (4.0, 10), (5.0, 20), (6.0, 30)], workers=2) == 50 / 2.0
    assert steady_rate([(3.0, 10), (5.0, 20)], workers=1) == 20 / 2.0
